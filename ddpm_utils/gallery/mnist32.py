"""The network of "DDPM from scratch" on MNIST, with 35 million weights.

A level is residual block, attention (in two of the levels), residual block. The sides shrink from
32 to 16, 8 and 4 pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_input

TIME_DIM, HEADS = 512, 8


def embedding_table(timesteps: int) -> Tensor:
    """Return the table of time embeddings, (timesteps, 512).

    Column 2i is sin(t·w_i), and column 2i + 1 is cos(t·w_i), with w_i = 10000^(−2i/512).
    """
    w = 10_000.0 ** (-2 * torch.arange(TIME_DIM // 2, dtype=torch.float64) / TIME_DIM)
    angles = torch.arange(timesteps)[:, None] * w
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


class Residual(nn.Module):
    """Residual block: (B, C, H, W) → the same.

    The first C columns of the embedding are added to the input. GroupNorm, ReLU and conv3, applied
    twice to the sum, are added to it.
    """

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(32, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Sequential(
            nn.GroupNorm(32, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x + emb[:, : x.shape[1], None, None]
        return x + self.second(self.dropout(self.first(x)))


class Attention(nn.Module):
    """Self-attention: (B, C, H, W) → the same, with eight heads over all positions and no norm.

    As published, the attention drops weights in eval mode too, and its result is not added to its
    input; `mend` corrects both.
    """

    def __init__(self, channels: int, dropout: float, mend: bool):
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.dropout, self.mend = dropout, mend

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (
            self.qkv(x.flatten(2).transpose(1, 2))
            .view(b, h * w, 3, HEADS, c // HEADS)
            .permute(2, 0, 3, 1, 4)
        )
        dropping = self.dropout if self.training or not self.mend else 0.0
        found = (
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropping)
            .transpose(1, 2)
            .reshape(b, h * w, c)
        )
        found = self.out(found).transpose(1, 2).view_as(x)
        return x + found if self.mend else found


class Level(nn.Module):
    """Residual block, attention where chosen, residual block.

    Returns the result, and what goes on to the next level.
    """

    def __init__(
        self,
        channels: int,
        attention: bool,
        onwards: nn.Module,
        dropout: float,
        mend: bool,
    ):
        super().__init__()
        self.first, self.second = Residual(channels, dropout), Residual(channels, dropout)
        self.attention = Attention(channels, dropout, mend) if attention else nn.Identity()
        self.onwards = onwards

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.attention(self.first(x, emb)), emb)
        return x, self.onwards(x)


class Mnist32(nn.Module):
    """The network: model(x_t, t, y=None) → ε, shaped like x_t.

    It has 35,178,689 parameters; the table of T = 1000 rows is not a parameter. It has these
    faults: a level of C channels sees only the first C of the 512 columns, which at 64 channels
    means periods of up to 19 steps; the attention drops weights in eval mode too, and its result is
    not added to its input. `mend` corrects the attention.

    x_t: (B, 1, H, W) float, with H and W multiples of 8; t: (B,) long in 0 … timesteps − 1; y must
    be None. Raises ValueError on any other input.
    """

    def __init__(self, timesteps: int = 1000, dropout: float = 0.1, mend: bool = False):
        super().__init__()
        self.register_buffer("table", embedding_table(timesteps), persistent=False)

        def down(c: int, attention: bool) -> Level:
            return Level(c, attention, nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), dropout, mend)

        def up(c: int, attention: bool) -> Level:
            return Level(
                c, attention, nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1), dropout, mend
            )

        self.stem = nn.Conv2d(1, 64, 3, padding=1)
        self.downs = nn.ModuleList([down(64, False), down(128, True), down(256, False)])
        self.ups = nn.ModuleList([up(512, False), up(512, False), up(384, True)])
        self.head = nn.Sequential(
            nn.Conv2d(256, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        check_input(x, t, y, 1, divisor=8, timesteps=len(self.table))
        emb, h, skips = self.table[t], self.stem(x), []
        for level in self.downs:
            skip, h = level(h, emb)
            skips.append(skip)
        for level in self.ups:
            _, h = level(h, emb)
            h = torch.cat([h, skips.pop()], dim=1)
        return self.head(h)
