"""The closed-form mathematics: q, its posterior, p, and the loss, named as in DDPM (arXiv 2006.11239)."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedules import NoiseSchedule, check_timesteps


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], shaped (B, 1, 1, …) so that it multiplies a batch shaped like x. Raises ValueError on a bad t."""
    check_timesteps(t, len(values))
    return values[t].view(-1, *[1] * (x.ndim - 1))


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √alpha_bar_t · x0 + √(1 − alpha_bar_t) · eps: a draw of q(x_t | x0) in one jump (DDPM Eq. 4).

    x0, eps: (B, …), eps standard normal; t: (B,) long in 0 … T−1. Returns (B, …).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * eps


def velocity(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = √alpha_bar_t · eps − √(1 − alpha_bar_t) · x0 (Progressive Distillation, arXiv 2202.00512, section 4)."""
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x0


def training_target(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, target: str = "eps") -> Tensor:
    """What the network is asked for: "eps" (DDPM Eq. 14), "x0", or "v". Shaped like x0."""
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    if target == "v":
        return velocity(schedule, x0, t, eps)
    raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")


def predict_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor, target: str = "eps") -> Tensor:
    """The clean picture x0_hat that a prediction at (x_t, t) implies: DDPM Eq. 15 for "eps"; √ᾱ·x_t − √(1−ᾱ)·v for "v"."""
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    if target == "eps":
        return (x_t - (1 - alpha_bar_t).sqrt() * prediction) / alpha_bar_t.sqrt()
    if target == "x0":
        return prediction
    if target == "v":
        return alpha_bar_t.sqrt() * x_t - (1 - alpha_bar_t).sqrt() * prediction
    raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")


def predict_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
    """The noise that remains once x0_hat is taken out: eps = (x_t − √alpha_bar_t · x0_hat) / √(1 − alpha_bar_t)."""
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    return (x_t - alpha_bar_t.sqrt() * x0_hat) / (1 - alpha_bar_t).sqrt()


def diffusion_loss(
    model, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, target: str = "eps", y=None
) -> Tensor:
    """Mean squared error of the network's answer at x_t ~ q(x_t | x0): L_simple (DDPM Eq. 14) for "eps". A scalar."""
    x_t = q_sample(schedule, x0, t, eps)
    prediction = model(x_t, t, y)
    return F.mse_loss(prediction, training_target(schedule, x0, t, eps, target))


def q_posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t−1} | x_t, x0) (DDPM Eq. 6–7). The variance is beta-tilde, shaped (B, 1, …); 0 at t = 0."""
    beta_t, alpha_t = at(schedule.betas, t, x_t), at(schedule.alphas, t, x_t)
    one = schedule.alpha_bars.new_ones(1)  # before the first step nothing is lost
    alpha_bar_prev = at(torch.cat([one, schedule.alpha_bars[:-1]]), t, x_t)
    # This is 1 − alpha_bar_t, written so that at t = 0 it is beta_t to the last bit and the mean is x0 itself.
    noise_t = beta_t + alpha_t * (1 - alpha_bar_prev)
    mean = (alpha_bar_prev.sqrt() * beta_t * x0 + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t) / noise_t
    return mean, (1 - alpha_bar_prev) / noise_t * beta_t


def p_mean_variance(
    schedule: NoiseSchedule, x0_hat: Tensor, x_t: Tensor, t: Tensor, variance: str = "beta_tilde"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of p(x_{t−1} | x_t): the posterior with x0_hat for x0; "beta_tilde" or "beta" (DDPM section 3.2)."""
    mean, beta_tilde = q_posterior(schedule, x0_hat, x_t, t)
    if variance == "beta_tilde":
        return mean, beta_tilde
    if variance == "beta":
        return mean, at(schedule.betas, t, x_t)
    raise ValueError(f"variance={variance!r} is not known: choose 'beta_tilde' or 'beta'")


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """`model` in eval mode inside the block, as it was afterwards, whatever happens."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield model
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def p_sample(model, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, target: str = "eps", variance: str = "beta_tilde",
             clamp: bool = True, generator: torch.Generator | None = None, y=None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One reverse step (DDPM Algorithm 2, lines 3–4): returns (x_prev, x0_hat).

    With `clamp`, x0_hat is held in [−1, 1] before the mean is taken from it, so the clamp reaches the picture.
    No noise is added where t = 0.
    """
    x0_hat = predict_x0(schedule, x_t, t, model(x_t, t, y), target)
    if clamp:
        x0_hat = x0_hat.clamp(-1, 1)
    mean, var = p_mean_variance(schedule, x0_hat, x_t, t, variance)
    noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
    not_last = (t > 0).view(-1, *[1] * (x_t.ndim - 1))
    return mean + not_last * var.sqrt() * noise, x0_hat
