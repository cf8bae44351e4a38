"""The network: shapes, what starts at zero, what time and labels reach, and the blocks against
formulas written out.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from ddpm_utils.unet import ResBlock, SelfAttention, UNet, Upsample, fold_pixels, unfold_pixels

TINY = {"widths": (8, 16), "blocks": 1, "groups": 4, "heads": 2, "time_dim": 8}


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


def awake(model, seed=0):
    """`model` with small random numbers in everything that starts at zero,
    as after some training.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def inputs(batch=2, channels=1, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=g), torch.randint(
        0, 1000, (batch,), generator=g
    )


# ---- the whole network


def test_default_has_its_published_number_of_parameters():
    assert sum(p.numel() for p in UNet().parameters()) == 829_348


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fold", [1, 2, 4])
def test_answers_in_the_shape_of_its_input(size, channels, fold):
    model = UNet(
        channels,
        **{**TINY, "widths": (8,) if fold == 4 else (8, 16)},
        attention_levels=(),
        fold=fold,
    )
    x, t = inputs(2, channels, size)
    assert model(x, t).shape == x.shape


@pytest.mark.parametrize(
    "widths, attention_levels",
    [((8,), (0,)), ((8, 8, 16), (1, 2)), ((4, 8, 8, 16), ()), ((16, 8), (0, 1))],
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_any_number_of_levels_and_blocks(widths, attention_levels, blocks):
    model = awake(UNet(1, widths, blocks, attention_levels, fold=1, time_dim=8, groups=4, heads=2))
    x, t = inputs(1, 1, 16)
    assert model.divisor == 2 ** (len(widths) - 1)
    assert model(x, t).shape == x.shape
    assert sum(isinstance(m, ResBlock) for m in model.modules()) == 2 * blocks * len(widths)
    assert sum(isinstance(m, SelfAttention) for m in model.modules()) == len(attention_levels)


def test_height_and_width_may_differ():
    model = awake(UNet(**TINY))
    x = torch.randn(1, 1, 8, 12)
    assert model(x, torch.tensor([1])).shape == x.shape


def test_starts_by_answering_zero():
    x, t = inputs()
    assert (UNet(**TINY)(x, t) == 0).all()


def test_every_branch_starts_as_the_identity():
    block, attention = ResBlock(8, 8, 8, groups=4), SelfAttention(8, heads=2, groups=4)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 8)), x) and torch.equal(attention(x), x)


def test_every_parameter_takes_part():
    """Backwards from the answer; but a bias of the keys adds the same to a whole row of the
    softmax, which cannot see it.
    """
    model = awake(UNet(**{**TINY, "blocks": 2}))
    x, t = inputs()
    (model(x, t) ** 2).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert idle == []


def test_images_of_a_batch_do_not_mix():
    """Each has its own t, and the answer does not depend on its neighbors."""
    model = awake(UNet(**TINY)).eval()
    x, t = inputs(3)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t), alone, rtol=1e-4, atol=1e-5)


# ---- time


def test_time_reaches_every_block():
    """Every block is told t by itself: with all others deaf, the answer still depends on t."""
    model, (x, _) = awake(UNet(**TINY)).eval(), inputs(1)
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    early, late = torch.tensor([5]), torch.tensor([700])
    assert len(blocks) == 4
    for listening in blocks:
        kept = [b.time.weight.detach().clone() for b in blocks]
        with torch.no_grad():
            for b in blocks:
                if b is not listening:
                    b.time.weight.zero_()
            assert (model(x, early) - model(x, late)).abs().max() > 1e-4
            for b, weight in zip(blocks, kept, strict=True):
                b.time.weight.copy_(weight)


def test_gradient_reaches_the_time_embedding_from_every_block():
    model, (x, t) = awake(UNet(**TINY)), inputs()
    (model(x, t) ** 2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.time.parameters())
    assert all(
        m.time.weight.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, ResBlock)
    )


# ---- dropout and labels


def test_dropout_is_on_in_training_and_off_in_eval():
    model, (x, t) = awake(UNet(**TINY, dropout=0.5)), inputs()
    assert not torch.equal(model.train()(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), model(x, t))


def test_labels_change_the_answer_and_none_is_the_last_of_them():
    model, (x, t) = awake(UNet(**TINY, num_classes=3)).eval(), inputs()
    answers = [model(x, t, torch.full((2,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert (answers[i] - answers[j]).abs().max() > 1e-4
    assert torch.equal(model(x, t), answers[3])
    mixed = model(x, t, torch.tensor([0, 2]))
    torch.testing.assert_close(
        mixed, torch.stack([answers[0][0], answers[2][1]]), rtol=1e-4, atol=1e-5
    )


# ---- the parts, against formulas


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_fold_and_back(fold):
    x = torch.randn(2, 3, 8, 12)
    folded = fold_pixels(x, fold)
    assert folded.shape == (2, 3 * fold**2, 8 // fold, 12 // fold)
    assert torch.equal(unfold_pixels(folded, fold), x)
    assert torch.equal(folded, F.pixel_unshuffle(x, fold))


def test_attention_is_the_softmax_formula():
    """For each head: softmax(q kᵀ / √d) v over all positions, written out with loops."""
    layer = awake(SelfAttention(8, heads=2, groups=4))
    x = torch.randn(2, 8, 3, 5)
    qkv = F.conv2d(
        F.group_norm(x, 4, layer.norm.weight, layer.norm.bias), layer.qkv.weight, layer.qkv.bias
    ).flatten(2)
    q, k, v = qkv[:, :8], qkv[:, 8:16], qkv[:, 16:]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = torch.einsum("bci,bcj->bij", q[:, part], k[:, part]).div(4**0.5).softmax(dim=2)
        heads.append(torch.einsum("bij,bcj->bci", weights, v[:, part]))
    expected = x + F.conv2d(torch.cat(heads, dim=1).view_as(x), layer.out.weight, layer.out.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c_out", [8, 4])
def test_residual_block_is_its_formula(c_out):
    """shortcut + conv(silu(norm(conv(silu(norm(x)))) · (1 + scale) + shift)), scale and shift
    linear in silu(emb).
    """
    block = awake(ResBlock(8, c_out, 6, groups=4))
    x = torch.randn(2, 8, 4, 4)
    emb = torch.randn(2, 6)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias)))
    scale_shift = F.linear(F.silu(emb), block.time.weight, block.time.bias)
    scale, shift = scale_shift[:, :c_out, None, None], scale_shift[:, c_out:, None, None]
    h = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias) * (1 + scale) + shift
    shortcut = x if c_out == 8 else F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(
        block(x, emb), shortcut + block.conv2(F.silu(h)), rtol=1e-4, atol=1e-5
    )


def test_upsample_doubles_by_repeating_pixels_then_convolves():
    layer, x = Upsample(4, 2), torch.randn(1, 4, 3, 5)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated))


# ---- bad input


@pytest.mark.parametrize(
    "levels, fold, height, width",
    [(2, 2, 30, 28), (2, 2, 28, 29), (3, 2, 28, 28), (1, 4, 30, 30), (2, 1, 7, 7), (3, 2, 3, 8)],
)
def test_error_names_sizes_that_work(levels, fold, height, width):
    model = UNet(**{**TINY, "widths": (8,) * levels}, fold=fold)
    t = torch.tensor([0])
    with pytest.raises(
        ValueError, match=rf"{height} × {width} must be multiples of {model.divisor}: try"
    ) as error:
        model(torch.zeros(1, 1, height, width), t)
    sizes = [int(s) for s in str(error.value).split("try ")[1].split(" or ")]
    assert sizes
    for size in sizes:
        model(torch.zeros(1, 1, size, size), t)
        assert min(abs(size - height), abs(size - width)) <= model.divisor


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 8, 8), (2, 1, 8, 8, 8)])
def test_refuses_an_input_of_the_wrong_shape(shape):
    with pytest.raises(
        ValueError,
        match=rf"x_t has shape {re.escape(str(shape))}, expected \(batch, 1, height, width\)",
    ):
        UNet(**TINY)(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


@pytest.mark.parametrize(
    "t", [torch.zeros(2), torch.tensor(3), torch.tensor([1]), torch.zeros(2, 1, dtype=torch.long)]
)
def test_refuses_t_that_is_not_one_whole_number_an_image(t):
    with pytest.raises(ValueError, match=r"t has shape .* expected \(2,\) whole numbers"):
        UNet(**TINY)(torch.zeros(2, 1, 8, 8), t)


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([1]),
        torch.tensor([[1], [2]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 4]),
        torch.tensor([-1, 0]),
    ],
)
def test_refuses_labels_that_are_not_one_known_class_an_image(y):
    """Three classes: 0, 1, 2, and 3 for "no label".

    One label for two images would be handed to both without a word.
    """
    with pytest.raises(ValueError, match=r"^y (has shape|holds) "):
        UNet(**TINY, num_classes=3)(*inputs(), y)


def test_refuses_labels_where_none_were_promised():
    with pytest.raises(
        ValueError,
        match="labels y were given, .* num_classes=0: build it with the number of classes",
    ):
        UNet(**TINY)(*inputs(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": (8, 18)},
        {"widths": (3, 8)},
        {"heads": 3, "widths": (8, 16)},
        {"heads": 3, "widths": (8, 32), "groups": 8},
    ],
)
def test_error_names_a_width_that_works(wrong):
    """Whatever the message proposes in place of the width it blames is then accepted."""
    arguments = {**TINY, **wrong}
    with pytest.raises(
        ValueError, match=r"(groups|heads)=\d+ does not divide widths\[\d\]=\d+: try \d+"
    ) as error:
        UNet(**arguments)
    index, better = (
        int(n) for n in re.search(r"widths\[(\d)\]=\d+: try (\d+)", str(error.value)).groups()
    )
    widths = list(arguments["widths"])
    widths[index] = better
    UNet(**{**arguments, "widths": tuple(widths)})


def test_refuses_an_odd_time_dim_when_it_is_built():
    with pytest.raises(ValueError, match="dim=33 must be even"):
        UNet(**{**TINY, "time_dim": 33})


@pytest.mark.parametrize("widths", [(16,), (16, 32)])
def test_bfloat16_rounds_but_does_not_change_the_answer(widths):
    torch.manual_seed(0)
    model = UNet(widths=widths, attention_levels=(len(widths) - 1,))
    for weight in model.parameters():  # wake the layers that start at zero
        torch.nn.init.normal_(weight, std=0.05)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    exact = model(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x, t)
    assert rough.dtype == torch.bfloat16
    # 8 binary digits: each product is off by up to 0.4 %
    assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("mean", [0.0, 5.0, 50.0])
def test_the_norm_of_bfloat16_is_counted_in_float32_and_rounded_once(mean):
    """Otherwise a group far from zero would lose its variance, which no bfloat16 sum can hold."""
    norm = torch.nn.GroupNorm(4, 16)
    x = (mean + torch.randn(2, 16, 14, 14)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = norm(x)
    expected = norm(x.float())
    assert (got.float() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_a_block_in_float64_stays_in_float64():
    block = ResBlock(8, 16, 4).double()
    assert (
        block(torch.randn(2, 8, 4, 4).double(), torch.randn(2, 4).double()).dtype == torch.float64
    )
