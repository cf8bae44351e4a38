"""The network of the anime faces tutorial: residual units and attention in turn.

There are two ways down and two ways up: see `Down` and `Up`.
"""

import torch
from torch import Tensor, nn

from .checks import check_input

TIME_DIM = 128


def embedding(t: Tensor) -> Tensor:
    """Embed the times: (B,) → (B, 128).

    The result holds the sines of t·w_i, then the cosines, with w_i = 10000^(−2i/128), i = 0 … 63.
    """
    i = torch.arange(TIME_DIM // 2, device=t.device)
    angles = t[:, None] * 10_000.0 ** (-2 * i / TIME_DIM)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Unit(nn.Module):
    """Residual unit: (B, c_in, H, W) → (B, c_out, H, W).

    GroupNorm, SiLU and conv3 are applied twice, and the time is added in between. A 1×1 convolution
    of the input is added to the result.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(TIME_DIM, c_out))
        self.second = nn.Sequential(
            nn.GroupNorm(8, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(c_in, c_out, 1)  # even where c_in = c_out

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.first(x) + self.time(emb)[:, :, None, None]
        return self.second(h) + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention: (B, C, H, W) → the same.

    GroupNorm, then four heads over all H·W positions; the result is added to the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        h, _ = self.attention(
            h, h, h, need_weights=False
        )  # the published one has the weights worked out, and drops them
        return x + h.transpose(1, 2).view_as(x)


class Pairs(nn.Module):
    """Two units, the first from c_in to c_out, each followed by attention."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.units = nn.ModuleList([Unit(c_in, c_out), Unit(c_out, c_out)])
        self.attentions = nn.ModuleList([Attention(c_out), Attention(c_out)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for unit, attention in zip(self.units, self.attentions, strict=True):
            x = attention(unit(x, emb))
        return x


class Down(nn.Module):
    """Downsampling: (B, C, H, W) → (B, C, H/2, W/2).

    A strided convolution makes half of the channels, and the maximum of 2×2 pixels the other half.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.strided = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, half, 4, stride=2, padding=1)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(channels, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.strided(x), self.pooled(x)], dim=1)


class Up(nn.Module):
    """Upsampling: (B, C, H, W) → (B, C/2, 2H, 2W).

    A transposed convolution makes half of the output channels, and bilinear interpolation the other
    half.
    """

    def __init__(self, channels: int):
        super().__init__()
        quarter = channels // 4
        self.transposed = nn.Sequential(
            nn.ConvTranspose2d(channels, quarter, 4, stride=2, padding=1),
            nn.Conv2d(quarter, quarter, 1),
        )
        self.resized = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(channels, quarter, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.transposed(x), self.resized(x)], dim=1)


class Middle(nn.Module):
    """A unit from c_in to c_out, then attention and a unit, twice."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.first = Unit(c_in, c_out)
        self.attentions = nn.ModuleList([Attention(c_out), Attention(c_out)])
        self.units = nn.ModuleList([Unit(c_out, c_out), Unit(c_out, c_out)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.first(x, emb)
        for attention, unit in zip(self.attentions, self.units, strict=True):
            x = unit(attention(x), emb)
        return x


class Anime(nn.Module):
    """The network: model(x_t, t, y=None) → ε, shaped like x_t.

    It has 10,847,299 parameters with 3 channels. Three properties are unusual: a skip connection
    carries the input of a level and not the output of its units; there is no activation before the
    last convolution; at 48×48, the attention of the last level sees 2304 positions.

    x_t: (B, channels, H, W) float, with H and W multiples of 4; t: (B,) long; y must be None.
    Raises ValueError on any other input.
    """

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = channels
        self.time = nn.Sequential(
            nn.Linear(TIME_DIM, TIME_DIM), nn.SiLU(), nn.Linear(TIME_DIM, TIME_DIM)
        )
        self.stem = nn.Conv2d(channels, 32, 3, padding=1)
        self.downs = nn.ModuleList([Pairs(32, 64), Pairs(64, 128), Pairs(128, 256)])
        self.shrinks = nn.ModuleList([Down(64), Down(128), nn.Identity()])
        self.middles = nn.ModuleList([Middle(256, 256), Middle(256, 128)])
        self.grows = nn.ModuleList([nn.Identity(), Up(128), Up(64)])
        self.ups = nn.ModuleList([Pairs(256, 128), Pairs(128, 64), Pairs(64, 16)])
        self.head = nn.Sequential(nn.GroupNorm(8, 16), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        check_input(x, t, y, self.channels, divisor=4)
        emb, h, skips = self.time(embedding(t)), self.stem(x), []
        for level, shrink in zip(self.downs, self.shrinks, strict=True):
            skips.append(h)
            h = shrink(level(h, emb))
        for middle in self.middles:
            h = middle(h, emb)
        for grow, level in zip(self.grows, self.ups, strict=True):
            h = level(torch.cat([grow(h), skips.pop()], dim=1), emb)
        return self.head(h)
