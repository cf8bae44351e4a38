"""The network of the hands-on guide: a plain convolutional U-Net.

It was published in fragments that do not fit together.
"""

import math

import torch
from torch import Tensor, nn

from .checks import check_input

TIME_DIM, WIDTHS = 256, (64, 128, 256)


def embedding(t: Tensor) -> Tensor:
    """Embed the times: (B,) → (B, 256).

    The result holds the sines of t·w_i, then the cosines, with w_i = exp(−ln 10000 · i / 127),
    i = 0 … 127.
    """
    half = TIME_DIM // 2
    w = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t[:, None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Convolution block: (B, c_in, H, W) → (B, c_out, H, W).

    It applies conv3 and ReLU, adds the time, and applies conv3 and ReLU again.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(TIME_DIM, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(x).relu() + self.time(emb)[:, :, None, None]
        return self.conv2(h).relu()


class Guide(nn.Module):
    """The network: model(x_t, t, y=None) → ε, shaped like x_t.

    It has 8,058,049 parameters with 1 channel. The published decoder needs 512 channels where its
    encoder gives 256. This network has the smallest bottleneck that closes the gap: it doubles the
    width at the bottom. The published embedding returns nothing; here it reaches every block.

    x_t: (B, channels, H, W) float, with H and W multiples of 8; t: (B,) long; y must be None.
    Raises ValueError on any other input.
    """

    def __init__(self, channels: int = 1):
        super().__init__()
        self.channels = channels
        self.downs = nn.ModuleList(
            Block(a, b) for a, b in zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)
        )
        self.shrink = nn.MaxPool2d(2)
        self.bottleneck = Block(WIDTHS[-1], 2 * WIDTHS[-1])
        self.grows = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(WIDTHS)
        )
        self.ups = nn.ModuleList(Block(2 * w, w) for w in reversed(WIDTHS))
        self.head = nn.Conv2d(WIDTHS[0], channels, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        check_input(x, t, y, self.channels, divisor=8)
        emb, skips = embedding(t), []
        for block in self.downs:
            x = block(x, emb)
            skips.append(x)
            x = self.shrink(x)
        x = self.bottleneck(x, emb)
        for grow, block in zip(self.grows, self.ups, strict=True):
            x = block(torch.cat([grow(x), skips.pop()], dim=1), emb)
        return self.head(x)
