"""Samplers: generators of the states from noise to image, and functions that keep some of them.

A sampler takes a denoiser, denoise(x_t, t, y=None) → x0_hat (see `diffusion`). It does not depend
on the network or on what the network predicts.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .diffusion import at, eval_mode, p_sample, predict_eps
from .schedules import NoiseSchedule


def ddpm_sample(
    denoise,
    schedule: NoiseSchedule,
    shape,
    variance: str = "beta_tilde",
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sample with all T steps: ancestral sampling (DDPM Algorithm 2).

    Sampling starts from x_T ~ N(0, I) of the given shape (B, C, H, W). Yields (t, x_t, x0_hat) for
    t = T−1 … 0, where x0_hat is the clean image estimated from x_t, and then (−1, x0, x0): T + 1
    triples in total. A network inside `denoise` is in eval mode during sampling; the averaged one
    (EMA) gives the best images. The same generator seed gives the same images on the same device.
    """
    device = schedule.betas.device
    with eval_mode(denoise):
        x_t = torch.randn(shape, generator=generator, device=device)
        for step in reversed(range(len(schedule))):
            t = torch.full((shape[0],), step, device=device)
            x_prev, x0_hat = p_sample(denoise, schedule, x_t, t, variance, generator, y)
            yield step, x_t, x0_hat
            x_t = x_prev
        yield -1, x_t, x_t


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "uniform") -> list[int]:
    """Return `steps` distinct times from 0 … T−1, descending from T−1 to 0.

    One step gives T−1 alone. Times that would coincide are shifted until they differ. `spacing` is
    "uniform" in t; "quadratic" (DDIM, 2010.02502, appendix D.2), which is denser toward 0; or
    "log_snr", even in the logarithm of the signal-to-noise ratio (DPM-Solver, 2206.00927). Raises
    ValueError unless 1 ≤ steps ≤ T, and on any other `spacing`.
    """
    last = len(schedule) - 1
    if not 1 <= steps <= last + 1:
        raise ValueError(
            f"steps={steps} is outside 1 … {last + 1}: a schedule of T={last + 1} has no other "
            "times"
        )
    # space the times by the chosen rule
    share = 1 - torch.linspace(0, 1, steps, dtype=torch.float64)  # of the range, descending
    if spacing == "uniform":
        times = last * share
    elif spacing == "quadratic":
        times = last * share**2
    elif spacing == "log_snr":
        log_snr = schedule.snr().cpu().double().log()
        wanted = log_snr[0] + (log_snr[last] - log_snr[0]) * share
        times = (log_snr - wanted[:, None]).abs().argmin(dim=1).double()
    else:
        raise ValueError(
            f"spacing={spacing!r} is not known: choose 'uniform', 'quadratic' or 'log_snr'"
        )
    # round the times and shift those that coincide
    i = torch.arange(steps)
    rising = (times.round().long().flip(0) - i).cummax(dim=0).values + i
    return rising.minimum(i + last + 1 - steps).flip(0).tolist()


def ddim_step(
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    x0_hat: Tensor,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Step from x_t at time t to any other time t_next (DDIM, 2010.02502, Eq. 12).

    x_next = √ᾱ_next·x0_hat + √(1 − ᾱ_next − σ²)·eps_hat + σ·noise. At t_next = −1 the result is the
    finished image. eta = 0 adds no noise, and only then may t_next be later than t. eta = 1 is the
    first-order step of SDE-DPM-Solver++ (2211.01095), and over all T steps DDPM. x_t and x0_hat
    have shape (B, …); t and t_next are (B,) long.
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    last = (t_next < 0).view(alpha_bar_t.shape)
    alpha_bar_next = at(schedule.alpha_bars, t_next.clamp(min=0), x_t).masked_fill(last, 1.0)
    eps_hat = predict_eps(schedule, x_t, t, x0_hat)
    if eta == 0:
        return alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next).sqrt() * eps_hat
    sigma2 = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_next)
    x_next = (
        alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next - sigma2).clamp(min=0).sqrt() * eps_hat
    )
    return x_next + sigma2.sqrt() * torch.randn(
        x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype
    )


def multistep_guess(
    schedule: NoiseSchedule,
    t_before: Tensor,
    t: Tensor,
    t_next: Tensor,
    x0_before: Tensor,
    x0_hat: Tensor,
) -> Tensor:
    """Extrapolate x0_hat to the middle of the step (DPM-Solver++ 2M, 2211.01095, Algorithm 2).

    The guess lies halfway from t to t_next in λ = ½·ln(ᾱ / (1 − ᾱ)), on the line through the clean
    images estimated at t_before and t:
    x0_hat + (λ_next − λ_t) / (2·(λ_t − λ_before)) · (x0_hat − x0_before). At t_next = −1, where λ
    is infinite, it is x0_hat itself.
    """
    half_log_snr = schedule.snr().log() / 2
    lam_before, lam_t, lam_next = (
        at(half_log_snr, s.clamp(min=0), x0_hat) for s in (t_before, t, t_next)
    )
    share = (lam_next - lam_t) / (2 * (lam_t - lam_before))
    last = (t_next < 0).view(share.shape)
    return x0_hat + share.masked_fill(last, 0.0) * (x0_hat - x0_before)


def ddim_sample(
    denoise,
    schedule: NoiseSchedule,
    shape,
    steps: int | Sequence[int] = 50,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
    start: Tensor | None = None,
    order: int = 1,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sample with few calls of `denoise` (DDIM, 2010.02502, Eq. 12).

    Sampling starts from x_T ~ N(0, I) of `shape`, or from `start`. `steps` is the number of steps,
    spread evenly over 0 … T−1, or the times themselves, descending. `order` 2 adds the
    extrapolation that turns DDIM into DPM-Solver++ 2M, and DDIM with eta = 1 into SDE-DPM-Solver++
    2M (see `dpm_solver_sample`). Yields (t, x_t, x0_hat) at each time, then (−1, x0, x0). Raises
    ValueError if `order` is not 1 or 2, or if the times do not descend within 0 … T−1.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order} is not known: choose 1 (DDIM) or 2 (DPM-Solver++ 2M)")
    device, times = schedule.betas.device, check_times(schedule, steps)
    before = None  # the time and the x0_hat of the previous step
    with eval_mode(denoise):
        x_t = torch.randn(shape, generator=generator, device=device) if start is None else start
        for step, following in zip(times, [*times[1:], -1], strict=True):
            t = torch.full((shape[0],), step, device=device)
            t_next = torch.full_like(t, following)
            # predict the clean image
            x0_hat = guess = denoise(x_t, t, y)
            if order == 2 and before is not None:
                guess = multistep_guess(schedule, before[0], t, t_next, before[1], x0_hat)
            # step to the next noise level
            x_next = ddim_step(schedule, x_t, t, t_next, guess, eta, generator)
            yield step, x_t, x0_hat
            x_t, before = x_next, (t, x0_hat)
        yield -1, x_t, x_t


def dpm_solver_sample(
    denoise,
    schedule: NoiseSchedule,
    shape,
    steps: int | Sequence[int] = 20,
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
    start: Tensor | None = None,
    eta: float = 0.0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sample with second-order steps: DPM-Solver++ 2M (2211.01095, Algorithm 2).

    Each step is a DDIM step whose clean image is extrapolated to the middle of the step from the
    last two estimates (see `multistep_guess`). The first and the last step are those of DDIM.
    eta = 1 gives SDE-DPM-Solver++ 2M of the same paper, because its first-order step is `ddim_step`
    with eta = 1 and its second-order correction is the same extrapolation. If `steps` is a number,
    the times are spread evenly in the log-SNR, which suits this solver best. The other arguments
    and the results are those of `ddim_sample`.
    """
    times = spaced_timesteps(schedule, steps, "log_snr") if isinstance(steps, int) else steps
    return ddim_sample(denoise, schedule, shape, times, eta, generator, y, start, order=2)


def ddim_encode(
    denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    steps: int | Sequence[int] = 50,
    y: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run DDIM upward: from images x0 (B, C, H, W) to their noise (DDIM, 2010.02502, section 4.3).

    The steps are those of DDIM without noise, in ascending order; x0 is used as the state at the
    first time. Yields (t, x_t, x0_hat) at each time. The last x_t is the noise, from which
    `ddim_sample` with the same `steps` returns to the images. Use a `Denoiser` with clamp=False,
    because a clamped step cannot be undone.
    """
    device, times = schedule.betas.device, check_times(schedule, steps)[::-1]
    with eval_mode(denoise):
        x_t = x0
        # the last state is yielded; the step after it is not used
        for step, following in zip(times, [*times[1:], times[-1]], strict=True):
            t = torch.full((len(x0),), step, device=device)
            x0_hat = denoise(x_t, t, y)
            yield step, x_t, x0_hat
            x_t = ddim_step(schedule, x_t, t, torch.full_like(t, following), x0_hat)


class Guided(nn.Module):
    """A network with classifier-free guidance (2207.12598, Eq. 6): model(x_t, t, y=None).

    It wraps a network with labels and goes into a `Denoiser`. The prediction is
    free + scale · (named − free), where `named` and `free` are the network's predictions with and
    without the label y. Scale 0 ignores the label, 1 gives the network unchanged, and a larger
    scale exaggerates what the label changes. The paper's w is scale − 1. Both predictions come from
    one call on a batch of twice the size. Without y, or at scale 1, the network is called once
    without guidance. Raises ValueError if the network has no labels.
    """

    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        if not model.num_classes:
            raise ValueError(
                "this network was built with num_classes=0: there is no label to be guided by"
            )
        self.model, self.scale = model, scale

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None or self.scale == 1:
            return self.model(x_t, t, y)
        none = torch.full_like(y, self.model.num_classes)
        both = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, none]))
        named, free = both.chunk(2)
        return free + self.scale * (named - free)


def check_times(schedule: NoiseSchedule, steps: int | Sequence[int]) -> list[int]:
    """Return the times at which a sampler calls the network, as a descending list.

    Raises ValueError unless the times are strictly descending and lie in 0 … T−1.
    """
    if isinstance(steps, int):
        return spaced_timesteps(schedule, steps)
    times = [int(t) for t in steps]
    falling = all(a > b for a, b in zip(times[:-1], times[1:], strict=True))
    if not times or not falling or times[0] >= len(schedule) or times[-1] < 0:
        raise ValueError(
            f"the times {times} must fall from at most {len(schedule) - 1} to at least 0: see "
            "spaced_timesteps"
        )
    return times


def last(states: Iterator[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Run a sampler to its end and return the finished images."""
    return deque(states, maxlen=1).pop()[1]


def keep(states: Iterator[tuple[int, Tensor, Tensor]], wanted) -> dict[int, tuple[Tensor, Tensor]]:
    """Run a sampler to its end and return {t: (x_t, x0_hat)} on the CPU.

    The dictionary holds the wanted t and always −1.
    """
    wanted = {int(t) for t in wanted} | {-1}
    return {t: (x_t.cpu(), x0_hat.cpu()) for t, x_t, x0_hat in states if t in wanted}
