"""Samplers: generators that yield every state on the way from noise to picture, and a function that keeps the last."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .diffusion import eval_mode, p_sample
from .schedules import NoiseSchedule


def ddpm_sample(model, schedule: NoiseSchedule, shape, target: str = "eps", variance: str = "beta_tilde", clamp: bool = True,
                generator: torch.Generator | None = None, y=None) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Ancestral sampling, DDPM Algorithm 2, from x_T ~ N(0, I) of the given shape (B, C, H, W).

    Yields (t, x_t, x0_hat) for t = T−1 … 0, x0_hat being the network's guess from x_t, then (−1, x0, x0): T + 1 triples.
    Pass the EMA network for the best pictures. The model is in eval mode meanwhile. The same generator seed gives the same
    picture on the same device.
    """
    device = schedule.betas.device
    with eval_mode(model):
        x_t = torch.randn(shape, generator=generator, device=device)
        for step in reversed(range(len(schedule))):
            t = torch.full((shape[0],), step, device=device)
            x_prev, x0_hat = p_sample(model, schedule, x_t, t, target, variance, clamp, generator, y)
            yield step, x_t, x0_hat
            x_t = x_prev
        yield -1, x_t, x_t


def last(states: Iterator[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Run a sampler to its end and return the finished pictures."""
    return deque(states, maxlen=1).pop()[1]


def keep(states: Iterator[tuple[int, Tensor, Tensor]], wanted) -> dict[int, tuple[Tensor, Tensor]]:
    """Run a sampler to its end and return {t: (x_t, x0_hat)} for the wanted t and always for −1, on the CPU."""
    wanted = {int(t) for t in wanted} | {-1}
    return {t: (x_t.cpu(), x0_hat.cpu()) for t, x_t, x0_hat in states if t in wanted}
