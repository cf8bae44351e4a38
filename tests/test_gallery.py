"""The published networks to the digit: parameter counts, formulas, shapes, and where the gradient
does not reach.
"""

import math

import pytest
import torch
from torch import nn

from ddpm_utils import config, gallery
from ddpm_utils.diffusion import eval_mode
from ddpm_utils.gallery import anime, guide, mnist32
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


# What each of the others counts, takes and leaves without a gradient. Kept small: 2 images of 16
# × 16.
OTHERS = {
    "anime": {"parameters": 10_847_299, "channels": 3, "divisor": 4, "table": False},
    "guide": {"parameters": 8_058_049, "channels": 1, "divisor": 8, "table": False},
    "mnist32": {"parameters": 35_178_689, "channels": 1, "divisor": 8, "table": True},
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    """One of the three networks besides the article's, and what is known of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gallery.build(request.param), OTHERS[request.param]


def test_the_others_count_their_parameters_to_the_digit(other):
    model, known = other
    assert count(model) == count(model, trainable_only=True) == known["parameters"]


def test_anime_counts_10846433_parameters_in_gray():
    assert count(gallery.build("anime", channels=1)) == 10_846_433


def test_the_others_answer_at_every_size_they_take(other):
    model, known = other
    d, c = known["divisor"], known["channels"]
    t = torch.tensor([3, 998])
    for h, w in ((2 * d, 2 * d), (4 * d, 2 * d)):
        answer = model(torch.randn(2, c, h, w, generator=torch.Generator().manual_seed(0)), t)
        assert answer.shape == (2, c, h, w) and answer.isfinite().all()


def test_the_others_refuse_in_words(other):
    model, known = other
    d, c = known["divisor"], known["channels"]
    x, t = torch.zeros(2, c, 2 * d, 2 * d), torch.zeros(2).long()
    cases = [
        (torch.zeros(2, c, 2 * d + 2, 2 * d), t, None, f"multiples of {d}: try {2 * d} or {3 * d}"),
        (torch.zeros(2, c + 1, 2 * d, 2 * d), t, None, rf"expected \(batch, {c}, height, width\)"),
        (x, torch.zeros(3).long(), None, r"t has shape \(3,\)"),
        (x, torch.zeros(2), None, "float32"),
        (x, t, t, "labels"),
    ]
    cases += (
        [(x, torch.tensor([0, 1000]), None, "0 … 1000.*rows 0 … 999")] if known["table"] else []
    )
    for x_t, times, y, words in cases:
        with pytest.raises(ValueError, match=words):
            model(x_t, times, y)


def test_every_parameter_of_the_others_gets_a_gradient(other):
    model, known = other
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, known["channels"], 16, 16, generator=rng)
    model.zero_grad()
    (
        model(x, torch.tensor([3, 700])) - torch.randn(x.shape, generator=rng)
    ).square().mean().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []
    model.zero_grad()


def test_time_reaches_the_answer_of_the_others(other):
    model, known = other
    x = torch.randn(
        1, known["channels"], 16, 16, generator=torch.Generator().manual_seed(0)
    ).expand(3, -1, -1, -1)
    with torch.no_grad(), eval_mode(model):
        one, two, again = model(x, torch.tensor([10, 600, 10]))
    assert (one - two).abs().max() > 1e-4
    assert (
        torch.allclose(one, again, atol=1e-5) or known["table"]
    )  # mnist32's attention drops at random, in eval mode too


def test_embeddings_are_their_formulas():
    """Entry by entry, as sources write them."""
    t = torch.tensor([0, 1, 37, 999])
    faces, hands, table = anime.embedding(t), guide.embedding(t), mnist32.embedding_table(1000)
    assert faces.shape == (4, 128) and hands.shape == (4, 256) and table.shape == (1000, 512)
    for row, time in enumerate(t.tolist()):
        for i in range(64):
            angle = time * 10_000 ** (-2 * i / 128)
            assert faces[row, i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert faces[row, 64 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)
        for i in range(128):
            angle = time * math.exp(-math.log(10_000) * i / 127)
            assert hands[row, i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert hands[row, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)
        for i in range(256):
            angle = time * 10_000 ** (-2 * i / 512)
            assert table[time, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[time, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_first_64_columns_of_mnist32_know_short_periods_alone():
    """What its docstring says: up to 19 steps, 2π over the lowest frequency of the first 64
    columns.
    """
    assert 2 * math.pi * 10_000 ** (2 * 31 / 512) == pytest.approx(19.2, abs=0.1)


def test_the_attention_of_mnist32_drops_in_eval_mode_and_the_mended_one_does_not():
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    for mend in (False, True):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = gallery.build("mnist32", mend=mend).eval()
            assert torch.equal(model(x, t), model(x, t)) == mend
        assert count(model) == 35_178_689


def test_skips_of_anime_carry_what_enters_a_level():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gallery.build("anime", channels=1)
    entered, joined = [], []
    for level in model.downs:
        level.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    for level in model.ups:
        level.register_forward_pre_hook(lambda module, args: joined.append(args[0]))
    with torch.no_grad():
        model(torch.randn(1, 1, 16, 16), torch.tensor([5]))
    assert [x.shape[1] for x in entered] == [32, 64, 128] and [x.shape[1] for x in joined] == [
        256,
        128,
        64,
    ]
    for skip, x in zip(reversed(entered), joined, strict=True):
        assert torch.equal(x[:, -skip.shape[1] :], skip)


def test_config_knows_the_gallery():
    assert config.MODELS == ("unet", *gallery.names())


def test_the_gallery_refuses_color_where_none_was_published():
    for name in ("article", "mnist32"):
        with pytest.raises(ValueError, match=f"channels=3.*{name!r}"):
            gallery.build(name, channels=3)


OVERFITS = {  # pixels, steps, learning rate
    "anime": (8, 60, 1e-3),
    "article": (28, 150, 3e-3),
    "guide": (8, 60, 1e-3),
    "mnist32": (8, 40, 3e-4),
}


@pytest.mark.parametrize("name", OVERFITS)
def test_a_one_batch_overfit(name):
    """It can learn: four images at four times, the loss falls to a tenth."""
    size, steps, lr = OVERFITS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gallery.build(name, channels=1, **({"dropout": 0.0} if name == "mnist32" else {}))
        rng = torch.Generator().manual_seed(0)
        x, wanted = torch.randn(2, 4, 1, size, size, generator=rng)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        t = torch.arange(4) * 200
        losses = []
        for _ in range(steps):
            loss = (model(x, t) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if loss < losses[0] / 10:
                return
    pytest.fail(f"from {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")


@pytest.mark.parametrize("name", gallery.names())
def test_weights_saved_and_loaded_give_the_same_answers(name, tmp_path):
    size = 28 if name == "article" else 8
    x = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        one, other = (gallery.build(name, channels=1) for _ in range(2))
        torch.save(one.state_dict(), tmp_path / "weights.pt")
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        answers = []
        for model in (one, other):
            torch.manual_seed(1)  # for mnist32, whose attention drops in eval mode too
            answers.append(model.eval()(x, t))
    assert torch.equal(*answers)


def test_every_name_builds_and_an_unknown_one_is_refused_with_the_names_there_are():
    assert gallery.names() == ["anime", "article", "guide", "mnist32"]
    with pytest.raises(ValueError, match="'artikel'.*'article'"):
        gallery.build("artikel")


def test_the_article_counts_606852_parameters_of_which_506852_are_trained(article):
    assert (count(article), count(article, trainable_only=True)) == (606_852, 506_852)


def test_the_table_is_the_formula_row_by_row(article):
    """Entry by entry as sources write it: sin(t·w_j) in even columns j, cos(t·w_{j−1}) in odd ones,
    w_j = 10000^(−2j/100).
    """
    table = article.table.weight
    assert table.shape == (1000, 100) and not table.requires_grad
    for t in (0, 1, 37, 500, 999):
        for j in range(100):
            w = 10_000 ** (-2 * (j - j % 2) / 100)
            expected = math.cos(t * w) if j % 2 else math.sin(t * w)
            assert table[t, j].item() == pytest.approx(expected, abs=1e-6), (t, j)


def test_the_mended_table_is_the_transformers_and_fits_the_same_weights(article):
    mended = gallery.build("article", mend=True)
    table = mended.table.weight
    for t in (1, 37, 999):
        for i in range(50):
            assert table[t, 2 * i].item() == pytest.approx(
                math.sin(t * 10_000 ** (-2 * i / 100)), abs=1e-6
            )
            assert table[t, 2 * i + 1].item() == pytest.approx(
                math.cos(t * 10_000 ** (-2 * i / 100)), abs=1e-6
            )
    assert {n: p.shape for n, p in mended.state_dict().items()} == {
        n: p.shape for n, p in article.state_dict().items()
    }
    assert (table.std(dim=0) < 0.05).sum() == 12


def test_as_documented_more_than_half_of_the_columns_stand_almost_still(article):
    assert (article.table.weight.std(dim=0) < 0.05).sum() == 55


def test_the_table_follows_the_number_of_timesteps():
    assert torch.equal(embedding_table(1000, 100)[:50], embedding_table(50, 100))
    assert count(gallery.build("article", timesteps=50)) == 506_852 + 50 * 100


def test_the_layers_of_the_article_are_those_published(article):
    """Shapes of all convolutions in order, written down from the source's description of its
    levels.
    """
    found = [
        (
            m.in_channels,
            m.out_channels,
            m.kernel_size[0],
            m.stride[0],
            isinstance(m, nn.ConvTranspose2d),
        )
        for m in article.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]

    def blocks(*widths):
        pairs = zip(widths[:-1], widths[1:], strict=True)
        return [conv for a, b in pairs for conv in ((a, b, 3, 1, False), (b, b, 3, 1, False))]

    assert found == [
        *blocks(1, 10, 10, 10),
        (10, 10, 4, 2, False),
        *blocks(10, 20, 20, 20),
        (20, 20, 4, 2, False),
        *blocks(20, 40, 40, 40),
        (40, 40, 2, 1, False),
        (40, 40, 4, 2, False),
        *blocks(40, 20, 20, 40),
        (40, 40, 4, 2, True),
        (40, 40, 2, 1, True),
        *blocks(80, 40, 20, 20),
        (20, 20, 4, 2, True),
        *blocks(40, 20, 10, 10),
        (10, 10, 4, 2, True),
        *blocks(20, 10, 10, 10),
        (10, 1, 3, 1, False),
    ]
    norms = [m.normalized_shape for m in article.modules() if isinstance(m, nn.LayerNorm)]
    entries = [
        (1, 10, 10),
        (10, 20, 20),
        (20, 40, 40),
        (40, 20, 20),
        (80, 40, 20),
        (40, 20, 10),
        (20, 10, 10),
    ]
    sizes = [28, 14, 7, 3, 7, 14, 28]
    assert norms == [(c, s, s) for level, s in zip(entries, sizes, strict=True) for c in level]


def test_a_forward_by_hand_of_the_first_level(article):
    """Time added once, before the first norm; norm over channels and pixels together; SiLU after
    each convolution.
    """
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
    without = {
        n
        for n, p in article.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    assert without == DEAD
    assert sum(dict(article.named_parameters())[name].numel() for name in DEAD) == 15_680
    assert article.table.weight.grad is None


def test_time_reaches_the_output_from_every_level_but_the_first(article):
    """One channel plus a number, normalized over that channel, is what it was: the first level
    never learns the time.
    """
    x, t = batch()
    before = article(x, t)
    assert before.shape == x.shape and before.isfinite().all()

    def change(name):
        level = getattr(article, name)
        handle = level.time.register_forward_hook(
            lambda module, args, out: out + torch.arange(out.shape[1]) + 1
        )
        after = article(x, t)
        handle.remove()
        return (after - before).abs().max().item()

    assert change("down1") < 2e-7
    assert all(change(name) > 1e-6 for name in ("down2", "down3", "mid", "up3", "up2", "up1"))


def test_skips_join_levels_of_one_size(article):
    """Each up level is shown the answer of the down level of its size, first, and beside it what
    comes from below.
    """
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
        (
            torch.zeros(2, 1, 32, 32),
            torch.zeros(2).long(),
            None,
            r"\(2, 1, 32, 32\).*\(batch, 1, 28, 28\)",
        ),
        (torch.zeros(2, 3, 28, 28), torch.zeros(2).long(), None, r"\(2, 3, 28, 28\)"),
        (torch.zeros(1, 28, 28), torch.zeros(1).long(), None, r"\(1, 28, 28\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(3).long(), None, r"t has shape \(3,\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2), None, "float32"),
        (torch.zeros(2, 1, 28, 28), torch.tensor([0, 1000]), None, "0 … 1000.*rows 0 … 999"),
        (torch.zeros(2, 1, 28, 28), torch.tensor([-1, 5]), None, "-1 … 5"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2).long(), torch.zeros(2).long(), "labels"),
    ],
)
def test_bad_input_is_refused_in_words(
    article,
    x,
    t,
    y,
    words,
):
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
