"""The closed-form mathematics: q, its posterior, p, the loss, and the denoiser, named as in DDPM
(arXiv 2006.11239).

Two interfaces divide the package. A *network* answers what it was trained for: model(x_t, t,
y=None) → eps, x0 or v. Losses and training speak to networks. A *denoiser* answers with the clean
image: denoise(x_t, t, y=None) → x0_hat. Samplers and metrics speak to denoisers. `Denoiser` makes
one of a network, and the exact solutions in `oracle` are denoisers already.

Another path from image to noise, such as flow matching's straight line, is to be another module
with functions of its own behind the same denoiser interface, not a general path that these
functions are written for: a line here then reads like its equation in the paper, and a line there
does, too.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedules import NoiseSchedule, check_timesteps


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], shaped (B, 1, 1, …) so that it multiplies a batch shaped like x.

    Raises ValueError on a bad t.
    """
    check_timesteps(t, len(values))
    return values[t].view(-1, *[1] * (x.ndim - 1))


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √alpha_bar_t · x0 + √(1 − alpha_bar_t) · eps: a draw of q(x_t | x0) in one jump (DDPM
    Eq. 4).

    x0, eps: (B, …), eps standard normal; t: (B,) long in 0 … T−1. Returns (B, …).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * eps


def velocity(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = √alpha_bar_t · eps − √(1 − alpha_bar_t) · x0 (Progressive Distillation, arXiv 2202.00512,
    section 4).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x0


def training_target(
    schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, target: str = "eps"
) -> Tensor:
    """What the network is asked for: "eps" (DDPM Eq. 14), "x0", or "v". Shaped like x0."""
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    if target == "v":
        return velocity(schedule, x0, t, eps)
    raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")


def predict_x0(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor, target: str = "eps"
) -> Tensor:
    """The clean image x0_hat that a prediction at (x_t, t) implies: DDPM Eq. 15 for "eps"; √ᾱ·x_t
    − √(1−ᾱ)·v for "v".
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    if target == "eps":
        return (x_t - (1 - alpha_bar_t).sqrt() * prediction) / alpha_bar_t.sqrt()
    if target == "x0":
        return prediction
    if target == "v":
        return alpha_bar_t.sqrt() * x_t - (1 - alpha_bar_t).sqrt() * prediction
    raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")


def predict_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x0_hat: Tensor) -> Tensor:
    """The noise that remains once x0_hat is taken out: eps = (x_t − √alpha_bar_t · x0_hat) / √(1 −
    alpha_bar_t).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    return (x_t - alpha_bar_t.sqrt() * x0_hat) / (1 - alpha_bar_t).sqrt()


def diffusion_loss(
    model, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, target: str = "eps", y=None
) -> Tensor:
    """Mean squared error of the network's answer at x_t ~ q(x_t | x0): L_simple (DDPM Eq. 14) for
    "eps". A scalar.
    """
    x_t = q_sample(schedule, x0, t, eps)
    prediction = model(x_t, t, y)
    return F.mse_loss(prediction, training_target(schedule, x0, t, eps, target))


def q_posterior(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t−1} | x_t, x0) (DDPM Eq. 6–7).

    The variance is beta-tilde, shaped (B, 1, …); 0 at t = 0.
    """
    beta_t, alpha_t = at(schedule.betas, t, x_t), at(schedule.alphas, t, x_t)
    one = schedule.alpha_bars.new_ones(1)  # before the first step nothing is lost
    alpha_bar_prev = at(torch.cat([one, schedule.alpha_bars[:-1]]), t, x_t)
    # This is 1 − alpha_bar_t, written so that at t = 0 it is beta_t to the last bit and the mean is
    # x0 itself.
    noise_t = beta_t + alpha_t * (1 - alpha_bar_prev)
    mean = (
        alpha_bar_prev.sqrt() * beta_t * x0 + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t
    ) / noise_t
    return mean, (1 - alpha_bar_prev) / noise_t * beta_t


def p_mean_variance(
    schedule: NoiseSchedule, x0_hat: Tensor, x_t: Tensor, t: Tensor, variance: str = "beta_tilde"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of p(x_{t−1} | x_t): the posterior with x0_hat for x0; "beta_tilde" or
    "beta" (DDPM section 3.2).
    """
    mean, beta_tilde = q_posterior(schedule, x0_hat, x_t, t)
    if variance == "beta_tilde":
        return mean, beta_tilde
    if variance == "beta":
        return mean, at(schedule.betas, t, x_t)
    raise ValueError(f"variance={variance!r} is not known: choose 'beta_tilde' or 'beta'")


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """`model` in eval mode inside the block, as it was afterwards, whatever happens."""
    modes = (
        [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    )
    for part, _ in modes:
        part.training = False
    try:
        yield model
    finally:
        for part, training in modes:
            part.training = training


class Denoiser(nn.Module):
    """denoise(x_t, t, y=None) → x0_hat: the clean image that the answer of `model` to (x_t, t, y)
    implies.

    `target` says what the network predicts: "eps", "x0" or "v". With `clamp`, x0_hat is held in
    [−1, 1], where the images are. The one place where a prediction becomes an image; no gradient
    passes.
    """

    def __init__(self, model, schedule: NoiseSchedule, target: str = "eps", clamp: bool = True):
        super().__init__()
        self.model, self.schedule, self.target, self.clamp = model, schedule, target, clamp

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        x0_hat = predict_x0(self.schedule, x_t, t, self.model(x_t, t, y), self.target)
        return x0_hat.clamp(-1, 1) if self.clamp else x0_hat


def p_sample(
    denoise,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    variance: str = "beta_tilde",
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step: a draw of p(x_{t−1} | x_t), the posterior (DDPM Eq. 6–7) with x0_hat for
    x0. Returns (x_prev, x0_hat).

    With an unclamped `Denoiser` this is DDPM's Algorithm 2, lines 3–4. No noise is added where t =
    0.
    """
    x0_hat = denoise(x_t, t, y)
    mean, var = p_mean_variance(schedule, x0_hat, x_t, t, variance)
    noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
    not_last = (t > 0).view(-1, *[1] * (x_t.ndim - 1))
    return mean + not_last * var.sqrt() * noise, x0_hat
