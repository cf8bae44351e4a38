"""Samplers: generators that yield every state on the way from noise to picture, and a function that keeps the last."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .diffusion import at, eval_mode, p_sample, predict_eps, predict_x0
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


def spaced_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` of the times 0 … T−1, evenly spread, the first T−1 and the last 0, descending.

    Raises ValueError unless 1 ≤ steps ≤ T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps} is outside 1 … {timesteps}: a schedule of T={timesteps} has no other times")
    return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().long().tolist()


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, t_next: Tensor, x0_hat: Tensor, eta: float = 0.0,
              generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """From x_t at t to any earlier time t_next (DDIM, 2010.02502, Eq. 12); t_next = −1 is the finished picture.

    x_next = √ᾱ_next·x0_hat + √(1 − ᾱ_next − σ²)·eps_hat + σ·noise. eta = 0 adds no noise; eta = 1 over all T steps is DDPM.
    x_t, x0_hat: (B, …); t, t_next: (B,) long.
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    last = (t_next < 0).view(alpha_bar_t.shape)
    alpha_bar_next = at(schedule.alpha_bars, t_next.clamp(min=0), x_t).masked_fill(last, 1.0)
    eps_hat = predict_eps(schedule, x_t, t, x0_hat)
    sigma2 = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_next)
    x_next = alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next - sigma2).sqrt() * eps_hat
    if eta == 0:
        return x_next
    return x_next + sigma2.sqrt() * torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)


def ddim_sample(model, schedule: NoiseSchedule, shape, steps: int = 50, target: str = "eps", eta: float = 0.0, clamp: bool = True,
                generator: torch.Generator | None = None, y=None) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Sampling with `steps` network calls, evenly spread over 0 … T−1 (DDIM, 2010.02502), from x_T ~ N(0, I) of `shape`.

    Yields (t, x_t, x0_hat) at the times called, then (−1, x0, x0): steps + 1 triples. With `clamp`, x0_hat is held in
    [−1, 1] and eps_hat follows from the clamped one. The model is in eval mode meanwhile.
    """
    device, times = schedule.betas.device, spaced_timesteps(len(schedule), steps)
    with eval_mode(model):
        x_t = torch.randn(shape, generator=generator, device=device)
        for step, following in zip(times, [*times[1:], -1], strict=True):
            t = torch.full((shape[0],), step, device=device)
            with torch.no_grad():
                x0_hat = predict_x0(schedule, x_t, t, model(x_t, t, y), target)
            x0_hat = x0_hat.clamp(-1, 1) if clamp else x0_hat
            x_next = ddim_step(schedule, x_t, t, torch.full_like(t, following), x0_hat, eta, generator)
            yield step, x_t, x0_hat
            x_t = x_next
        yield -1, x_t, x_t


def last(states: Iterator[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Run a sampler to its end and return the finished pictures."""
    return deque(states, maxlen=1).pop()[1]


def keep(states: Iterator[tuple[int, Tensor, Tensor]], wanted) -> dict[int, tuple[Tensor, Tensor]]:
    """Run a sampler to its end and return {t: (x_t, x0_hat)} for the wanted t and always for −1, on the CPU."""
    wanted = {int(t) for t in wanted} | {-1}
    return {t: (x_t.cpu(), x0_hat.cpu()) for t, x_t, x0_hat in states if t in wanted}
