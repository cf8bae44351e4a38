"""Optimizers: Muon, which orthogonalizes its steps, and the choice between Muon and Adam."""

import torch
from torch import Tensor, nn

from .config import TrainConfig


def orthogonalize(matrices: Tensor, turns: int = 5) -> Tensor:
    """Return matrices with the same singular vectors and every singular value near 1.

    Singular values above 0.2 % of the matrix norm end between about 0.7 and 1.2; smaller ones stay
    smaller. The result keeps the direction of each matrix without the sizes. The matrices have
    shape (..., rows, columns). This is a Newton–Schulz iteration (Jordan et al. 2024, "Muon"): each
    turn maps a singular value s to a·s + b·s³ + c·s⁵. Every turn is a polynomial in x xᵀ, so the
    turns are multiplied together in that smaller space first.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # no singular value above 1
    gram, one = x @ x.mT, torch.eye(x.shape[-2], device=x.device)
    turn = product = None
    for _ in range(turns):
        gram = gram if turn is None else turn @ gram @ turn
        turn = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product = turn if product is None else turn @ product
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, except that the weights of convolutions move by their orthogonalized momentum.

    The sources are Jordan et al. 2024 and 2502.16982, Eq. 4. A convolution's weight is treated as
    the matrix (c_out, height · width · c_in), which is its order in memory. The factor
    0.2 · √max(rows, columns) makes the entries of a step as large as those of AdamW, so that both
    share one learning rate. Matrices of the same shape are processed together.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95, **adamw):
        shapes = {}
        for weight in model.parameters():
            shape = (len(weight), weight[0].numel()) if weight.ndim > 2 else ()
            shapes.setdefault(shape, []).append(weight)
        super().__init__(
            [{"params": weights, "shape": shape} for shape, weights in shapes.items()],
            lr=lr,
            **adamw,
        )
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not group["shape"] or not weights:
                continue
            # stack gradients of the same shape as matrices
            gradient = torch.stack([weight.grad.movedim(1, -1).flatten(1) for weight in weights])
            # update the momentum and orthogonalize the step
            state = self.state[weights[0]]
            if not state:  # AdamW expects a step when it loads a saved state
                state |= {"momentum": torch.zeros_like(gradient), "step": torch.zeros(())}
            momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
            steps = orthogonalize(gradient.lerp(momentum, self.momentum))  # Nesterov momentum
            # decay the weights and take the step
            rate = group["lr"] * 0.2 * max(group["shape"]) ** 0.5
            for weight, step in zip(weights, steps, strict=True):
                rows = weight.movedim(1, -1)
                rows.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    step.view(rows.shape), alpha=rate
                )
                weight.grad = None  # AdamW below skips a weight without a gradient
        super().step()


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `cfg` names.

    The fused version of Adam does the same arithmetic in one pass. It has to be enabled explicitly.
    """
    settings = {
        "lr": cfg.lr,
        "weight_decay": cfg.weight_decay,
        "fused": next(model.parameters()).device.type in ("cpu", "cuda"),
    }
    if cfg.optimizer == "muon":
        return Muon(model, **settings)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[cfg.optimizer](
        model.parameters(), **settings
    )
