"""Exact denoisers: formulas for the best possible x0_hat where the data distribution is known.

Each is a denoiser, denoise(x_t, t, y=None) → x0_hat = E[x0 | x_t]. It ignores y.
"""

import torch
from torch import Tensor, nn

from .diffusion import at
from .schedules import NoiseSchedule


class GaussianDenoiser(nn.Module):
    """The best denoiser for data x0 ~ N(mean, covariance).

    x0_hat = m + √ā·C·(ā·C + (1 − ā)·I)⁻¹·(x_t − √ā·m), where m is the mean, C the covariance and
    ā = alpha_bar_t. This is the conditional mean of a Gaussian. For any other data with the same
    mean and covariance it is the best *linear* denoiser (the Wiener filter). `mean` is (D,) for
    data of D values (pixels in any shape). `covariance` is (D, D), symmetric, with no eigenvalue
    below 0. Raises ValueError on shapes that do not fit, or on a matrix that is not a covariance.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, covariance: Tensor):
        super().__init__()
        values, vectors = eigen(covariance, mean)
        self.schedule, self.mean = schedule, mean.reshape(-1)
        self.values, self.vectors = values.to(mean), vectors.to(mean)

    def forward(self, x_t: Tensor, t: Tensor, y=None) -> Tensor:
        return self.posterior(x_t, t)[0]

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x_t], shaped like x_t, and ln q(x_t) up to a constant, (B,)."""
        flat = x_t.flatten(1)
        alpha_bar_t = at(self.schedule.alpha_bars, t, flat)
        variance = alpha_bar_t * self.values + 1 - alpha_bar_t  # of x_t, along each eigenvector
        centered = (flat - alpha_bar_t.sqrt() * self.mean) @ self.vectors
        whitened = centered / variance
        x0_hat = self.mean + (alpha_bar_t.sqrt() * self.values * whitened) @ self.vectors.T
        log_density = -0.5 * (centered * whitened + variance.log()).sum(dim=1)
        return x0_hat.view_as(x_t), log_density

    def loss(self, target: str = "eps") -> Tensor:
        """Return the expected squared error per value at every t, shape (T,).

        No linear denoiser can reach a lower error. In each direction of variance λ the error of x0
        is λ(1 − ā)/(āλ + 1 − ā). The error of eps is ā/(1 − ā) times that, and the error of v is
        1/(1 − ā) times that. Raises ValueError unless `target` is "eps", "x0" or "v".
        """
        if target not in ("eps", "x0", "v"):
            raise ValueError(f"target={target!r} is not known: choose 'eps', 'x0' or 'v'")
        alpha_bars = self.schedule.alpha_bars.cpu().double()[:, None]
        values = self.values.cpu().double()[None]
        common = (values / (alpha_bars * values + 1 - alpha_bars)).mean(dim=1)  # the error of v
        factor = {"v": 1.0, "eps": alpha_bars[:, 0], "x0": 1 - alpha_bars[:, 0]}
        return (common * factor[target]).float()


class MixtureDenoiser(nn.Module):
    """The best denoiser for a mixture of Gaussians.

    It averages the denoisers of the components, each weighted by the probability that x_t came from
    that component. `weights` is (K,), positive, summing to 1; `means` is (K, D); `covariances` is
    (K, D, D). Raises ValueError on shapes that do not fit, on weights that are not positive or do
    not sum to 1, or on a matrix that is not a covariance.
    """

    def __init__(
        self, schedule: NoiseSchedule, weights: Tensor, means: Tensor, covariances: Tensor
    ):
        super().__init__()
        check_mixture(weights, means, covariances)
        self.log_weights = weights.log()
        self.parts = [
            GaussianDenoiser(schedule, m, c) for m, c in zip(means, covariances, strict=True)
        ]

    def forward(self, x_t: Tensor, t: Tensor, y=None) -> Tensor:
        x0_hats, log_densities = zip(*(part.posterior(x_t, t) for part in self.parts), strict=True)
        # Bayes' rule, (B, K)
        shares = (self.log_weights + torch.stack(log_densities, dim=1)).softmax(dim=1)
        return torch.einsum("bk,kb...->b...", shares, torch.stack(x0_hats))


class DataDenoiser(nn.Module):
    """The best denoiser for data that consist of the given images only.

    It returns the mean of the images, each weighted by the probability that x_t came from it:
    x0_hat = Σ wᵢ·xᵢ with w = softmax(−|x_t − √ā·xᵢ|² / (2·(1 − ā))). `images` is (N, …) in model
    range, all equally likely. This denoiser minimizes a network's training loss on these images,
    and it uses no other image.
    """

    def __init__(self, schedule: NoiseSchedule, images: Tensor):
        super().__init__()
        if len(images) == 0 or not images.is_floating_point():
            raise ValueError(
                f"images: {tuple(images.shape)} {images.dtype}, expected at least one float image"
            )
        self.schedule, self.images = schedule, images.flatten(1)
        self.squares = self.images.square().sum(dim=1)

    def forward(self, x_t: Tensor, t: Tensor, y=None) -> Tensor:
        return (self.shares(x_t, t) @ self.images).view_as(x_t)

    def shares(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the probability that x_t came from each image, (B, N), with rows that sum to 1."""
        flat = x_t.flatten(1)
        alpha_bar_t = at(self.schedule.alpha_bars, t, flat)
        # |x_t|² is the same for all images and drops out of the softmax.
        fits = alpha_bar_t.sqrt() * flat @ self.images.T - alpha_bar_t / 2 * self.squares
        return (fits / (1 - alpha_bar_t)).softmax(dim=1)


def fit_gaussian(schedule: NoiseSchedule, x0: Tensor) -> GaussianDenoiser:
    """Return the best linear denoiser for data with the mean and covariance of x0.

    x0 is (N, …), floats in model range.
    """
    flat = x0.flatten(1).cpu().double()
    return GaussianDenoiser(schedule, flat.mean(dim=0).float().to(x0.device), torch.cov(flat.T))


def eigen(covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, none below 0, and the eigenvectors of a covariance, in float64.

    `covariance` is (D, D). Raises ValueError unless it is a covariance that fits D means.
    """
    d = mean.numel()
    if covariance.shape != (d, d) or not torch.allclose(covariance, covariance.T, atol=1e-6):
        raise ValueError(
            f"covariance must be symmetric of shape ({d}, {d}) to go with {d} means, got "
            f"{tuple(covariance.shape)}"
        )
    values, vectors = torch.linalg.eigh(covariance.cpu().double())  # some devices lack float64
    # rounding may push an eigenvalue of 0 below 0
    rounding = d * torch.finfo(covariance.dtype).eps * values[-1].abs()
    if values[0] < -rounding:
        raise ValueError(
            f"covariance has the eigenvalue {values[0].item():.3g}: variances cannot be negative"
        )
    return values.clamp(min=0), vectors


def check_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    """Raise ValueError unless the arguments describe a mixture of K Gaussians.

    There must be K positive weights that sum to 1, means (K, D) and covariances (K, D, D).
    """
    k = len(weights)
    if weights.ndim != 1 or not (weights > 0).all() or abs(weights.sum().item() - 1) > 1e-5:
        raise ValueError(f"weights={weights.tolist()} must be positive and sum to 1")
    if (
        means.ndim != 2
        or len(means) != k
        or covariances.shape != (k, means.shape[1], means.shape[1])
    ):
        raise ValueError(
            f"{k} weights go with means ({k}, D) and covariances ({k}, D, D): got "
            f"{tuple(means.shape)} and {tuple(covariances.shape)}"
        )
