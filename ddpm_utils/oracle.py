"""Perfect denoisers: where the data's distribution is known, the best possible network is a formula."""

import torch
from torch import Tensor, nn

from .diffusion import at, training_target
from .schedules import NoiseSchedule


class GaussianDenoiser(nn.Module):
    """The best prediction for data x0 ~ N(mean, covariance), as a model(x_t, t, y=None).

    With C the covariance and ā = alpha_bar_t: x0_hat = m + √ā·C·(ā·C + (1 − ā)·I)⁻¹·(x_t − √ā·m), the conditional mean of a
    Gaussian. For data of any other kind with these moments it is the best *linear* denoiser (the Wiener filter).
    mean: (D,) for data of D values (pixels in any shape); covariance: (D, D), symmetric, no eigenvalue below 0.
    Raises ValueError on shapes that do not fit, or on a covariance that is none.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, covariance: Tensor, target: str = "eps"):
        super().__init__()
        d = mean.numel()
        if covariance.shape != (d, d) or not torch.allclose(covariance, covariance.T, atol=1e-6):
            raise ValueError(
                f"covariance must be symmetric of shape ({d}, {d}) to go with {d} means, got {tuple(covariance.shape)}"
            )
        values, vectors = torch.linalg.eigh(covariance.double())
        rounding = d * torch.finfo(covariance.dtype).eps * values[-1].abs()  # it may push a flat direction below 0
        if values[0] < -rounding:
            raise ValueError(f"covariance has the eigenvalue {values[0].item():.3g}: variances cannot be negative")
        self.schedule, self.target = schedule, target
        self.values = values.clamp(min=0).to(mean.dtype).to(mean.device)
        self.vectors, self.mean = vectors.to(mean.dtype).to(mean.device), mean.reshape(-1)

    def forward(self, x_t: Tensor, t: Tensor, y=None) -> Tensor:
        flat = x_t.flatten(1)
        alpha_bar_t = at(self.schedule.alpha_bars, t, flat)
        centred = (flat - alpha_bar_t.sqrt() * self.mean) @ self.vectors
        whitened = centred / (alpha_bar_t * self.values + 1 - alpha_bar_t)
        eps_hat = (((1 - alpha_bar_t).sqrt() * whitened) @ self.vectors.T).view_as(x_t)
        x0_hat = (self.mean + (alpha_bar_t.sqrt() * self.values * whitened) @ self.vectors.T).view_as(x_t)
        return training_target(self.schedule, x0_hat, t, eps_hat, self.target)

    def loss(self, target: str = "eps") -> Tensor:
        """Its expected squared error per value at every t, shape (T,): what any linear denoiser can reach at best.

        In each direction of variance λ the x0 error is λ(1 − ā)/(āλ + 1 − ā); eps scales it by ā/(1 − ā), v by 1/(1 − ā).
        """
        if target not in ("eps", "x0", "v"):
            raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")
        alpha_bars, values = self.schedule.alpha_bars.double()[:, None], self.values.double()[None]
        common = (values / (alpha_bars * values + 1 - alpha_bars)).mean(dim=1)  # the error of v
        factor = {"v": 1.0, "eps": alpha_bars[:, 0], "x0": 1 - alpha_bars[:, 0]}
        return (common * factor[target]).float()


def fit_gaussian(schedule: NoiseSchedule, x0: Tensor, target: str = "eps") -> GaussianDenoiser:
    """The best linear denoiser for data whose mean and covariance are those of x0 (N, …), floats in model range."""
    flat = x0.flatten(1).double()
    return GaussianDenoiser(schedule, flat.mean(dim=0).float(), torch.cov(flat.T), target)
