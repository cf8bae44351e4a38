"""The network of the sketch, the mark that our default has to beat: frozen here, whatever becomes
of `ddpm_utils.unet`.

2×2 pixels fold into channels, two levels (14×14 and 7×7), two residual blocks a level on the way
down and two on the way up, one attention at 7×7, one skip a level, joined by concatenation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME, GROUPS, HEADS = 128, 8, 4


def zero(layer: nn.Module) -> nn.Module:
    """`layer` with all weights at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Block(nn.Module):
    """Twice norm, SiLU, conv3, beside a shortcut; time scales and shifts after the second norm; the
    last conv starts at 0.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(TIME, 2 * c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Every position looks at every other, in four heads; added to its input, and nothing at the
    start.
    """

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x))
            .view(n, 3 * HEADS, c // HEADS, -1)
            .transpose(2, 3)
            .chunk(3, dim=1)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(n, c, height, width))


class Sketch(nn.Module):
    """model(x_t, t, y=None) → v shaped like x_t.

    x_t: (B, 1, H, W), H and W multiples of 4; t: (B,) long; y is not looked at.
    """

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME, TIME), nn.SiLU(), nn.Linear(TIME, TIME), nn.SiLU())
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.down14 = nn.ModuleList([Block(32, 32), Block(32, 32)])
        self.to7 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.down7 = nn.ModuleList([Block(64, 64), Block(64, 64)])
        self.attention = Attention(64)
        self.up7 = nn.ModuleList([Block(128, 64), Block(64, 64)])
        self.to14 = nn.Conv2d(64, 32, 3, padding=1)
        self.up14 = nn.ModuleList([Block(64, 32), Block(32, 32)])
        self.norm, self.head = nn.GroupNorm(GROUPS, 32), zero(nn.Conv2d(32, 4, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angles = t[:, None] * torch.exp(
            torch.arange(TIME // 2, device=t.device) * (-2 * math.log(10_000) / TIME)
        )
        emb = self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
        h14 = self.stem(F.pixel_unshuffle(x, 2))
        for block in self.down14:
            h14 = block(h14, emb)
        h7 = self.to7(h14)
        for block in self.down7:
            h7 = block(h7, emb)
        h = torch.cat([self.attention(h7), h7], dim=1)
        for block in self.up7:
            h = block(h, emb)
        h = torch.cat([self.to14(F.interpolate(h, scale_factor=2.0, mode="nearest")), h14], dim=1)
        for block in self.up14:
            h = block(h, emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
