"""How weights move: Muon, which steps by directions, and the choice between it and Adam."""

import torch
from torch import Tensor, nn

from .config import TrainConfig


def orthogonalize(matrices: Tensor, turns: int = 5) -> Tensor:
    """The same singular vectors, every singular value brought near 1 (between 0.7 and 1.2): the
    direction, without the sizes.

    matrices: (..., rows, columns). A Newton–Schulz iteration (Jordan et al. 2024, "Muon"): each
    turn maps a singular value s to a·s + b·s³ + c·s⁵. All turns are polynomials in x xᵀ, so they
    are multiplied up there, where matrices are small.
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
    """AdamW, except that a convolution's weight moves by its orthogonalized momentum (Jordan et al.
    2024; 2502.16982, Eq. 4).

    That weight is taken as the matrix (c_out, height · width · c_in), which is its order in memory.
    The factor 0.2 · √max(rows, columns) makes the entries of a step as large as AdamW's, so that
    both share one learning rate. Matrices of one shape are handled in one go.
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
            gradient = torch.stack([weight.grad.movedim(1, -1).flatten(1) for weight in weights])
            state = self.state[weights[0]]
            if not state:  # AdamW wants to see a step when it loads what was saved
                state |= {"momentum": torch.zeros_like(gradient), "step": torch.zeros(())}
            momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
            steps = orthogonalize(gradient.lerp(momentum, self.momentum))  # Nesterov's look ahead
            rate = group["lr"] * 0.2 * max(group["shape"]) ** 0.5
            for weight, step in zip(weights, steps, strict=True):
                rows = weight.movedim(1, -1)
                rows.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    step.view(rows.shape), alpha=rate
                )
                weight.grad = None  # spent: AdamW below leaves a weight without gradient alone
        super().step()


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names.

    Adam's fused version does the same arithmetic in one pass and must be asked for.
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
