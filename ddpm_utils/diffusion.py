"""The closed-form mathematics of diffusion: q, its posterior, p, the loss and the denoiser.

The names are those of DDPM (arXiv 2006.11239).

The package has two interfaces. A *network* predicts the quantity it was trained on:
model(x_t, t, y=None) → eps, x0 or v. Losses and training take networks. A *denoiser* returns the
clean image: denoise(x_t, t, y=None) → x0_hat. Samplers and metrics take denoisers. `Denoiser` turns
a network into a denoiser. The exact solutions in `oracle` are denoisers already.

Another path from image to noise, such as the straight line of flow matching, belongs in another
module with its own functions and the same denoiser interface. The functions here are not
generalized to arbitrary paths, so that each line reads like its equation in the paper.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedules import NoiseSchedule, check_timesteps


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Return values[t], shaped (B, 1, 1, …) so that it multiplies a batch shaped like x.

    Raises ValueError on a t that `check_timesteps` rejects.
    """
    check_timesteps(t, len(values))
    return values[t].view(-1, *[1] * (x.ndim - 1))


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return a sample x_t of q(x_t | x0), computed in one step (DDPM Eq. 4).

    x_t = √alpha_bar_t · x0 + √(1 − alpha_bar_t) · eps. The images x0 and the standard normal noise
    eps have shape (B, …); t is (B,) long in 0 … T−1. Returns a tensor of shape (B, …).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * eps


def velocity(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return the velocity v (Progressive Distillation, arXiv 2202.00512, section 4).

    v = √alpha_bar_t · eps − √(1 − alpha_bar_t) · x0.
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x0)
    return alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x0


def training_target(
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    target: str = "eps",
) -> Tensor:
    """Return the network's regression target: "eps" (DDPM Eq. 14), "x0" or "v".

    The result has the shape of x0. Raises ValueError on any other `target`.
    """
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    if target == "v":
        return velocity(schedule, x0, t, eps)
    raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")


def predict_x0(
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    prediction: Tensor,
    target: str = "eps",
) -> Tensor:
    """Return the clean image x0_hat that a prediction at (x_t, t) implies.

    This is DDPM Eq. 15 for "eps", the prediction itself for "x0", and
    √alpha_bar_t · x_t − √(1 − alpha_bar_t) · v for "v". Raises ValueError on any other `target`.
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
    """Return the noise that x_t contains if its clean image is x0_hat.

    eps = (x_t − √alpha_bar_t · x0_hat) / √(1 − alpha_bar_t).
    """
    alpha_bar_t = at(schedule.alpha_bars, t, x_t)
    return (x_t - alpha_bar_t.sqrt() * x0_hat) / (1 - alpha_bar_t).sqrt()


def diffusion_loss(
    model,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    target: str = "eps",
    y=None,
) -> Tensor:
    """Return the mean squared error of the network's prediction at x_t ~ q(x_t | x0), a scalar.

    For "eps" this is L_simple (DDPM Eq. 14).
    """
    x_t = q_sample(schedule, x0, t, eps)
    prediction = model(x_t, t, y)
    return F.mse_loss(prediction, training_target(schedule, x0, t, eps, target))


def q_posterior(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of q(x_{t−1} | x_t, x0) (DDPM Eq. 6–7).

    The variance is beta-tilde, shaped (B, 1, …). It is 0 at t = 0.
    """
    beta_t, alpha_t = at(schedule.betas, t, x_t), at(schedule.alphas, t, x_t)
    one = schedule.alpha_bars.new_ones(1)  # alpha_bar before the first step
    alpha_bar_prev = at(torch.cat([one, schedule.alpha_bars[:-1]]), t, x_t)
    # This is 1 − alpha_bar_t, written so that at t = 0 it equals beta_t exactly and the mean is x0.
    noise_t = beta_t + alpha_t * (1 - alpha_bar_prev)
    mean = (
        alpha_bar_prev.sqrt() * beta_t * x0 + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t
    ) / noise_t
    return mean, (1 - alpha_bar_prev) / noise_t * beta_t


def p_mean_variance(
    schedule: NoiseSchedule,
    x0_hat: Tensor,
    x_t: Tensor,
    t: Tensor,
    variance: str = "beta_tilde",
) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of p(x_{t−1} | x_t).

    The mean is that of the posterior q with x0_hat in place of x0. The variance is "beta_tilde" or
    "beta" (DDPM section 3.2). Raises ValueError on any other `variance`.
    """
    mean, beta_tilde = q_posterior(schedule, x0_hat, x_t, t)
    if variance == "beta_tilde":
        return mean, beta_tilde
    if variance == "beta":
        return mean, at(schedule.betas, t, x_t)
    raise ValueError(f"variance={variance!r} is not known: choose 'beta_tilde' or 'beta'")


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Put `model` in eval mode inside the block and restore its modes afterwards.

    The modes are restored even after an error. An object that is not an `nn.Module` passes
    unchanged.
    """
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
    """A denoiser made from a network: denoise(x_t, t, y=None) → x0_hat.

    x0_hat is the clean image that the prediction of `model` at (x_t, t, y) implies. `target` names
    what the network predicts: "eps", "x0" or "v". If `clamp` is true, x0_hat is clamped to [−1, 1],
    the range of the images. The package converts predictions to images only here. No gradient is
    computed.
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
    """Take one reverse step: draw x_prev from p(x_{t−1} | x_t) and return (x_prev, x0_hat).

    The distribution is the posterior (DDPM Eq. 6–7) with x0_hat in place of x0. With an unclamped
    `Denoiser` this is DDPM's Algorithm 2, lines 3–4. No noise is added where t = 0.
    """
    x0_hat = denoise(x_t, t, y)
    mean, var = p_mean_variance(schedule, x0_hat, x_t, t, variance)
    noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
    not_last = (t > 0).view(-1, *[1] * (x_t.ndim - 1))
    return mean + not_last * var.sqrt() * noise, x0_hat
