"""The published networks to the digit: parameter counts, formulas, shapes, and where the gradient does not reach."""

import math

import pytest
import torch
from torch import nn

from ddpm_utils import gallery
from ddpm_utils.gallery.article import embedding_table

DEAD = {"up1.blocks.2.norm.weight", "up1.blocks.2.norm.bias"}


@pytest.fixture
def article():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gallery.build("article")


def batch(n=2, size=28):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, size, size, generator=rng), torch.arange(n) * 333


def count(model, trainable_only=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def test_every_name_builds_and_an_unknown_one_is_refused_with_the_names_there_are():
    assert "article" in gallery.names() == sorted(gallery.names())
    assert all(isinstance(gallery.build(name), nn.Module) for name in gallery.names())
    with pytest.raises(ValueError, match="'artikel'.*'article'"):
        gallery.build("artikel")


def test_the_article_counts_606852_parameters_of_which_506852_are_trained(article):
    assert (count(article), count(article, trainable_only=True)) == (606_852, 506_852)


def test_the_table_is_the_formula_row_by_row(article):
    """Entry by entry as sources write it: sin(t·w_j) in even columns j, cos(t·w_{j−1}) in odd ones, w_j = 10000^(−2j/100)."""
    table = article.table.weight
    assert table.shape == (1000, 100) and not table.requires_grad
    for t in (0, 1, 37, 500, 999):
        for j in range(100):
            w = 10_000 ** (-2 * (j - j % 2) / 100)
            expected = math.cos(t * w) if j % 2 else math.sin(t * w)
            assert table[t, j].item() == pytest.approx(expected, abs=1e-6), (t, j)


def test_as_documented_more_than_half_of_the_columns_stand_almost_still(article):
    assert (article.table.weight.std(dim=0) < 0.05).sum() == 55


def test_the_table_follows_the_number_of_timesteps():
    assert torch.equal(embedding_table(1000, 100)[:50], embedding_table(50, 100))
    assert count(gallery.build("article", timesteps=50)) == 506_852 + 50 * 100


def test_the_layers_of_the_article_are_those_published(article):
    """Shapes of all convolutions in order, written down from the source's description of its levels."""
    found = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], isinstance(m, nn.ConvTranspose2d))
        for m in article.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]  # fmt: skip

    def blocks(*widths):
        pairs = zip(widths[:-1], widths[1:], strict=True)
        return [conv for a, b in pairs for conv in ((a, b, 3, 1, False), (b, b, 3, 1, False))]

    assert found == [
        *blocks(1, 10, 10, 10), (10, 10, 4, 2, False),
        *blocks(10, 20, 20, 20), (20, 20, 4, 2, False),
        *blocks(20, 40, 40, 40), (40, 40, 2, 1, False), (40, 40, 4, 2, False),
        *blocks(40, 20, 20, 40), (40, 40, 4, 2, True), (40, 40, 2, 1, True),
        *blocks(80, 40, 20, 20), (20, 20, 4, 2, True),
        *blocks(40, 20, 10, 10), (10, 10, 4, 2, True),
        *blocks(20, 10, 10, 10), (10, 1, 3, 1, False),
    ]  # fmt: skip
    norms = [m.normalized_shape for m in article.modules() if isinstance(m, nn.LayerNorm)]
    entries = [(1, 10, 10), (10, 20, 20), (20, 40, 40), (40, 20, 20), (80, 40, 20), (40, 20, 10), (20, 10, 10)]
    sizes = [28, 14, 7, 3, 7, 14, 28]
    assert norms == [(c, s, s) for level, s in zip(entries, sizes, strict=True) for c in level]


def test_a_forward_by_hand_of_the_first_level(article):
    """Time added once, before the first norm; norm over channels and pixels together; SiLU after each convolution."""
    x, t = batch()
    h = x + article.down1.time(article.table.weight[t])[:, :, None, None]
    for block in article.down1.blocks:
        flat = h.flatten(1)
        variance = flat.var(dim=1, unbiased=False, keepdim=True)
        h = ((flat - flat.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()).view_as(
            h
        )  # norms start at weight 1, bias 0
        for conv in (block.conv1, block.conv2):
            h = conv(h)
            h = h * h.sigmoid()
    torch.testing.assert_close(article.down1(x, article.table(t)), h, rtol=1e-4, atol=1e-5)


def test_every_trainable_parameter_gets_a_gradient_but_the_dead_norm(article):
    x, t = batch(4)
    article(x, t).square().mean().backward()
    without = {n for n, p in article.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert without == DEAD
    assert sum(dict(article.named_parameters())[name].numel() for name in DEAD) == 15_680
    assert article.table.weight.grad is None


def test_time_reaches_the_output_from_every_level_but_the_first(article):
    """One channel plus a number, normalised over that channel, is what it was: the first level never learns the time."""
    x, t = batch()
    before = article(x, t)
    assert before.shape == x.shape and before.isfinite().all()

    def change(name):
        level = getattr(article, name)
        handle = level.time.register_forward_hook(lambda module, args, out: out + torch.arange(out.shape[1]) + 1)
        after = article(x, t)
        handle.remove()
        return (after - before).abs().max().item()

    assert change("down1") < 2e-7
    assert all(change(name) > 1e-6 for name in ("down2", "down3", "mid", "up3", "up2", "up1"))


def test_skips_join_levels_of_one_size(article):
    """Each up level is shown the answer of the down level of its size, first, and beside it what comes from below."""
    x, t = batch()
    kept = {}
    for name in ("down1", "down2", "down3", "up1", "up2", "up3"):
        getattr(article, name).register_forward_hook(
            lambda module, args, out, name=name: kept.update({name: (args[0], out)})
        )
    article(x, t)
    for i in "123":
        skip = kept[f"down{i}"][1]
        assert torch.equal(kept[f"up{i}"][0][:, : skip.shape[1]], skip)


@pytest.mark.parametrize(
    ("x", "t", "y", "words"),
    [
        (torch.zeros(2, 1, 32, 32), torch.zeros(2).long(), None, r"\(2, 1, 32, 32\).*\(batch, 1, 28, 28\)"),
        (torch.zeros(2, 3, 28, 28), torch.zeros(2).long(), None, r"\(2, 3, 28, 28\)"),
        (torch.zeros(1, 28, 28), torch.zeros(1).long(), None, r"\(1, 28, 28\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(3).long(), None, r"t has shape \(3,\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2), None, "float32"),
        (torch.zeros(2, 1, 28, 28), torch.tensor([0, 1000]), None, "0 … 1000.*rows 0 … 999"),
        (torch.zeros(2, 1, 28, 28), torch.tensor([-1, 5]), None, "-1 … 5"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2).long(), torch.zeros(2).long(), "labels"),
    ],
)
def test_bad_input_is_refused_in_words(article, x, t, y, words):
    with pytest.raises(ValueError, match=words):
        article(x, t, y)


@pytest.mark.parametrize("settings", [{"timesteps": 0}, {"time_dim": 99}, {"time_dim": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        gallery.build("article", **settings)


def test_every_activation_of_the_article_is_a_silu(article):
    found = {type(m) for m in article.modules() if not list(m.children())}
    assert found == {nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.Linear, nn.Embedding, nn.SiLU}
    assert (
        sum(isinstance(m, nn.SiLU) for m in article.modules()) == 7 + 2
    )  # seven time MLPs, and beside the 2×2 convolutions
