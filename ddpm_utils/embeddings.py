"""Embeddings that give a network the timestep."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return the sinusoidal embedding of t (Transformer, arXiv 1706.03762, 3.5).

    It holds sin(t·w_i) for i = 0 … dim/2 − 1, then cos(t·w_i), with w_i = max_period^(−2i/dim). t
    is (B,) numbers, whole or not. Returns (B, dim) float32 in [−1, 1]. Raises ValueError if dim is
    odd or below 2.
    """
    check_pairs(dim)
    i = torch.arange(dim // 2, device=t.device)
    w = torch.exp(-math.log(max_period) * 2 * i / dim)
    angles = t.float()[:, None] * w[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """t (B,) → (B, dim): the sinusoidal embedding, then Linear – SiLU – Linear.

    The two layers let the network transform the embedding.
    """

    def __init__(self, dim: int):
        super().__init__()
        check_pairs(dim)
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal_embedding(t, self.dim))


def check_pairs(dim: int) -> None:
    """Raise ValueError unless `dim` is even and at least 2."""
    if dim < 2 or dim % 2:
        raise ValueError(
            f"dim={dim} must be even and at least 2, since sines and cosines come in pairs: try "
            f"{max(2, dim + dim % 2)}"
        )
