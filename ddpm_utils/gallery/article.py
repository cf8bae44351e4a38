"""The network of the Fashion-MNIST article, after Brian Pulfer's DDPM.

It has ten channels at full size, and its norms are tied to 28×28.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_times_and_labels

SIZE = 28  # pixels a side: the shapes of the norms are part of the weights


def embedding_table(timesteps: int, dim: int, mend: bool = False) -> Tensor:
    """Return the table of time embeddings, (timesteps, dim).

    Column 2i is sin(t·w_i), and column 2i + 1 is cos(t·w_i), with w_i = 10000^(−4i/dim). The
    Transformer (arXiv 1706.03762, 3.5), and this function with `mend`, have 10000^(−2i/dim). As
    published, the frequencies fall twice as fast, down to 10000^−2.
    """
    w = 10_000.0 ** ((-2 if mend else -4) * torch.arange(dim // 2, dtype=torch.float64) / dim)
    angles = torch.arange(timesteps)[:, None] * w
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


class Block(nn.Module):
    """Convolution block: (B, c_in, size, size) → (B, c_out, size, size).

    LayerNorm over all (c_in, size, size), then conv3 and SiLU, twice.
    """

    def __init__(self, size: int, c_in: int, c_out: int, normalize: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm((c_in, size, size))
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if self.normalize else x
        return F.silu(self.conv2(F.silu(self.conv1(x))))


class Level(nn.Module):
    """Three blocks at one size.

    The time passes through an MLP of the level and is added to the input of the blocks. widths: of
    the input, then of each output.
    """

    def __init__(
        self,
        size: int,
        widths: tuple[int, int, int, int],
        time_dim: int,
        normalize_last: bool = True,
    ):
        super().__init__()
        c = widths[0]
        self.time = nn.Sequential(nn.Linear(time_dim, c), nn.SiLU(), nn.Linear(c, c))
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.Sequential(
            *(Block(size, a, b, normalize_last or i < 2) for i, (a, b) in enumerate(pairs))
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.blocks(x + self.time(emb)[:, :, None, None])


class Article(nn.Module):
    """The network: model(x_t, t, y=None) → ε, shaped like x_t.

    It has 606,852 parameters at T = 1000, of which the 100·T of the table are frozen. It has three
    faults: the first norm removes the time of the first level again; the last norm is never called;
    55 of the table's 100 columns hardly change with t. `mend` corrects the table.

    x_t: (B, 1, 28, 28) float; t: (B,) long in 0 … timesteps − 1; y must be None, because the
    network takes no labels. Raises ValueError on any other input (if t is beyond the table, only on
    the CPU; elsewhere, PyTorch raises its own error).
    """

    def __init__(self, timesteps: int = 1000, time_dim: int = 100, mend: bool = False):
        super().__init__()
        if timesteps < 1 or time_dim < 2 or time_dim % 2:
            raise ValueError(
                f"timesteps={timesteps}, time_dim={time_dim}: expected at least 1, and an even "
                "number of at least 2"
            )
        self.table = nn.Embedding.from_pretrained(
            embedding_table(timesteps, time_dim, mend), freeze=True
        )
        self.down1 = Level(28, (1, 10, 10, 10), time_dim)
        self.to14 = nn.Conv2d(10, 10, 4, stride=2, padding=1)
        self.down2 = Level(14, (10, 20, 20, 20), time_dim)
        self.to7 = nn.Conv2d(20, 20, 4, stride=2, padding=1)
        self.down3 = Level(7, (20, 40, 40, 40), time_dim)
        self.to3 = nn.Sequential(
            nn.Conv2d(40, 40, 2), nn.SiLU(), nn.Conv2d(40, 40, 4, stride=2, padding=1)
        )  # 7 → 6 → 3
        self.mid = Level(3, (40, 20, 20, 40), time_dim)
        self.from3 = nn.Sequential(
            nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2)
        )
        self.up3 = Level(7, (80, 40, 20, 20), time_dim)
        self.from7 = nn.ConvTranspose2d(20, 20, 4, stride=2, padding=1)
        self.up2 = Level(14, (40, 20, 10, 10), time_dim)
        self.from14 = nn.ConvTranspose2d(10, 10, 4, stride=2, padding=1)
        self.up1 = Level(28, (20, 10, 10, 10), time_dim, normalize_last=False)
        self.head = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        check_input(x, t, y, self.table.num_embeddings)
        emb = self.table(t)
        h1 = self.down1(x, emb)
        h2 = self.down2(self.to14(h1), emb)
        h3 = self.down3(self.to7(h2), emb)
        h = self.from3(self.mid(self.to3(h3), emb))
        h = self.from7(self.up3(torch.cat([h3, h], dim=1), emb))
        h = self.from14(self.up2(torch.cat([h2, h], dim=1), emb))
        return self.head(self.up1(torch.cat([h1, h], dim=1), emb))


def check_input(x: Tensor, t: Tensor, y: Tensor | None, timesteps: int) -> None:
    """Raise ValueError unless x_t, t and y are valid inputs of the article's network."""
    if x.ndim != 4 or x.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(
            f"x_t has shape {tuple(x.shape)}, expected (batch, 1, {SIZE}, {SIZE}): the norms of "
            "this network fit no other size; resize the images"
        )
    check_times_and_labels(x, t, y, timesteps)
