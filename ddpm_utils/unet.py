"""The network: a small U-Net of residual blocks with time embeddings and some self-attention.

Every residual block receives the time. Self-attention is used at the levels where it is cheap.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .embeddings import TimeEmbedding


def fold_pixels(x: Tensor, fold: int) -> Tensor:
    """(B, C, H, W) → (B, C·fold², H/fold, W/fold): each fold × fold patch becomes one position.

    No information is lost.
    """
    return rearrange(x, "b c (h f) (w g) -> b (c f g) h w", f=fold, g=fold)


def unfold_pixels(x: Tensor, fold: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    return rearrange(x, "b (c f g) h w -> b c (h f) (w g)", f=fold, g=fold)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set the weights and the bias of `layer` to zero and return it.

    A residual branch that ends in such a layer starts at zero.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """(B, c_in, H, W), (B, time_dim) → (B, c_out, H, W): two convolutions beside a shortcut.

    The time embedding scales and shifts the signal between the two convolutions, after the second
    normalization (as in Improved DDPM), so that the normalization cannot undo it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        time_dim: int,
        groups: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """(B, C, H, W) → the same shape: self-attention over all positions, added to its input."""

    def __init__(self, channels: int, heads: int = 4, groups: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads
        )
        fits = q @ k.mT / q.shape[-1] ** 0.5
        h = fits.softmax(dim=-1) @ v
        return x + self.out(rearrange(h, "b heads (h w) c -> b (heads c) h w", h=x.shape[2]))


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then self-attention if `attention` is true.

    The output of every block is appended to `skips`.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        time_dim: int,
        attention: bool,
        heads: int,
        groups: int,
        dropout: float,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(width, width, time_dim, groups, dropout) for _ in range(blocks)
        )
        self.attention = SelfAttention(width, heads, groups) if attention else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(h, emb)
            skips.append(h)
        return self.attention(h)


class UpLevel(nn.Module):
    """Residual blocks at one resolution; each concatenates its input with the latest of `skips`."""

    def __init__(
        self,
        width: int,
        blocks: int,
        time_dim: int,
        groups: int,
        dropout: float,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(2 * width, width, time_dim, groups, dropout) for _ in range(blocks)
        )

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return h


class Upsample(nn.Module):
    """(B, c_in, H, W) → (B, c_out, 2H, 2W): nearest-neighbor upsampling, then a convolution.

    The convolution smooths the blocks of equal pixels.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The U-Net: model(x_t, t, y=None) → a tensor shaped like x_t.

    x_t is (B, channels, H, W) float, t is (B,) long, and y is (B,) long labels, or None for "no
    label". H and W must be multiples of `self.divisor`. Raises ValueError on widths, groups, heads
    or sizes that do not fit.
    """

    def __init__(
        self,
        channels: int = 1,
        widths=(48, 64),
        blocks: int = 2,
        attention_levels=(1,),
        fold: int = 2,
        time_dim: int = 128,
        groups: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        num_classes: int = 0,
    ):
        super().__init__()
        check_widths(widths, attention_levels, groups, heads)
        self.channels, self.fold, self.num_classes = channels, fold, num_classes
        self.divisor = fold * 2 ** (len(widths) - 1)
        self.time = TimeEmbedding(time_dim)
        # the last row means "no label"
        self.label = nn.Embedding(num_classes + 1, time_dim) if num_classes else None
        self.stem = nn.Conv2d(channels * fold**2, widths[0], 3, padding=1)
        attends = [level in attention_levels for level in range(len(widths))]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.downs = nn.ModuleList(
            DownLevel(w, blocks, time_dim, a, heads, groups, dropout)
            for w, a in zip(widths, attends, strict=True)
        )
        self.shrinks = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.ups = nn.ModuleList(UpLevel(w, blocks, time_dim, groups, dropout) for w in widths)
        self.grows = nn.ModuleList(Upsample(b, a) for a, b in pairs)
        self.norm = nn.GroupNorm(groups, widths[0])
        self.head = zero_init(nn.Conv2d(widths[0], channels * fold**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        check_input(x, t, y, self)
        # embed the timestep and the label
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label(torch.full_like(t, self.num_classes) if y is None else y)
        # go down the levels and collect the skips
        h, skips = self.stem(fold_pixels(x, self.fold)), []
        for i, level in enumerate(self.downs):
            h = level(h if i == 0 else self.shrinks[i - 1](h), emb, skips)
        # go up the levels and concatenate the skips
        for i, level in reversed(list(enumerate(self.ups))):
            h = level(h, emb, skips)
            h = self.grows[i - 1](h) if i > 0 else h
        return unfold_pixels(self.head(F.silu(self.norm(h))), self.fold)


def check_widths(widths, attention_levels, groups: int, heads: int) -> None:
    """Raise ValueError unless groups and heads divide the widths.

    `groups` must divide every width, and `heads` every width with attention.
    """
    for i, width in enumerate(widths):
        if width % groups:
            raise ValueError(
                f"groups={groups} does not divide widths[{i}]={width}: try "
                f"{max(1, round(width / groups)) * groups}"
            )
        if i in attention_levels and width % heads:
            both = math.lcm(groups, heads)
            raise ValueError(
                f"heads={heads} does not divide widths[{i}]={width}: try "
                f"{max(1, round(width / both)) * both}"
            )


def check_input(x: Tensor, t: Tensor, y: Tensor | None, model: UNet) -> None:
    """Raise ValueError unless x_t, t and y have the shapes and dtypes that `model` takes.

    The message for a wrong height or width names the nearest sizes that work.
    """
    # check the images
    if x.ndim != 4 or x.shape[1] != model.channels:
        raise ValueError(
            f"x_t has shape {tuple(x.shape)}, expected (batch, {model.channels}, height, width)"
        )
    d = model.divisor
    if x.shape[2] % d or x.shape[3] % d:
        sizes = sorted({max(1, s // d + up) * d for s in x.shape[2:] for up in (0, 1)})
        raise ValueError(
            f"height × width {x.shape[2]} × {x.shape[3]} must be multiples of {d}: try "
            f"{' or '.join(map(str, sizes))}"
        )
    # check the timesteps
    if t.shape != x.shape[:1] or t.is_floating_point():
        raise ValueError(
            f"t has shape {tuple(t.shape)} and dtype {t.dtype}, expected ({len(x)},) whole "
            "numbers: one timestep an image"
        )
    # check the labels
    if y is not None and model.label is None:
        raise ValueError(
            "labels y were given, but this network was built with num_classes=0: build it with "
            "the number of classes"
        )
    if y is not None and (y.shape != t.shape or y.is_floating_point()):
        raise ValueError(
            f"y has shape {tuple(y.shape)} and dtype {y.dtype}, expected ({len(x)},) whole "
            "numbers: one label an image"
        )
    if (
        y is not None
        and y.device.type == "cpu"
        and y.numel()
        and (y.min() < 0 or y.max() > model.num_classes)
    ):
        raise ValueError(
            f"y holds {y.min().item()} … {y.max().item()}, but labels are 0 … "
            f"{model.num_classes}, the last for none"
        )
