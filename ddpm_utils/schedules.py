"""Noise schedules: how much noise each step adds.

The sources are DDPM (arXiv 2006.11239), section 4, and Improved DDPM (arXiv 2102.09672), Eq. 17.
"""

import math
import warnings

import torch
from torch import Tensor


def linear_betas(timesteps: int, scale: float = 1.0) -> Tensor:
    """Return the betas of DDPM's linear schedule (section 4).

    Beta rises evenly from 1e-4 to 0.02, both multiplied by `scale`. The two ends were chosen for
    T = 1000. For another T, `scale = 1000 / T` keeps the total amount of noise. Returns a float64
    tensor of shape (timesteps,). Raises ValueError if a beta would leave (0, 1).
    """
    check_count(timesteps)
    if not 0 < 0.02 * scale < 1:
        raise ValueError(
            f"scale={scale} makes the last beta {0.02 * scale:g}, outside (0, 1): keep scale "
            "below 50"
        )
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    """Return the betas of the cosine schedule (Improved DDPM, Eq. 17).

    alpha_bar(u) = cos²(π/2 · (u + s) / (1 + s)), where u is the fraction of the steps completed.
    Each beta takes alpha_bar from one step to the next and is at most 0.999. Returns a float64
    tensor of shape (timesteps,).
    """
    check_count(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bars = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=0.999)


class NoiseSchedule:
    """Three vectors of length T, indexed by t = 0 … T−1: betas, alphas and alpha_bars.

    The paper's t is ours + 1. alpha_t = 1 − beta_t, and alpha_bar_t is the product of all alphas up
    to and including t (DDPM, below Eq. 4). The vectors are computed in float64 and stored in
    float32. Raises ValueError on betas that are not a vector inside (0, 1). Warns if alpha_bars[-1]
    leaves a visible share of the image in x_T.
    """

    def __init__(self, betas: Tensor):
        betas = check_betas(betas)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(dim=0)
        warn_if_signal_remains(betas, alpha_bars)
        self.betas, self.alphas, self.alpha_bars = betas.float(), alphas.float(), alpha_bars.float()

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device) -> "NoiseSchedule":
        """Move the three vectors, in place as `nn.Module.to` does, and return self."""
        self.betas, self.alphas, self.alpha_bars = (
            v.to(device) for v in (self.betas, self.alphas, self.alpha_bars)
        )
        return self

    def snr(self) -> Tensor:
        """Return the signal-to-noise ratio of each step (VDM, arXiv 2107.00630, Eq. 2).

        It is alpha_bar / (1 − alpha_bar).
        """
        return self.alpha_bars / (1 - self.alpha_bars)


def make_schedule(name: str, timesteps: int, scale: float = 1.0) -> NoiseSchedule:
    """Return the schedule called `name` ("linear" or "cosine").

    `scale` multiplies the linear betas. The cosine schedule does not use it. Raises ValueError on
    any other name.
    """
    if name == "linear":
        return NoiseSchedule(linear_betas(timesteps, scale))
    if name == "cosine":
        return NoiseSchedule(cosine_betas(timesteps))
    raise ValueError(f"schedule {name!r} is not known: choose 'linear' or 'cosine'")


def check_count(timesteps: int) -> None:
    """Raise ValueError unless `timesteps` is a whole number of at least 1."""
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(
            f"timesteps={timesteps!r} must be a whole number of at least 1, such as 1000"
        )


def check_betas(betas: Tensor) -> Tensor:
    """Return `betas` as float64 on the CPU.

    Raises ValueError unless it is a non-empty vector with every value strictly between 0 and 1.
    """
    betas = betas.cpu() if isinstance(betas, Tensor) else betas  # some devices lack float64
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) == 0:
        raise ValueError(
            f"betas must be a vector of at least one number, got shape {tuple(betas.shape)}"
        )
    bad = (~((betas > 0) & (betas < 1))).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"betas[{i}]={betas[i].item():g} is outside (0, 1): a step may remove some of the "
            "image, not none or all"
        )
    return betas


def warn_if_signal_remains(betas: Tensor, alpha_bars: Tensor, visible: float = 0.05) -> None:
    """Warn if x_T still holds more than `visible` times the image.

    Sampling starts from pure noise and would not match such an x_T.
    """
    left = alpha_bars[-1].sqrt().item()
    if left <= visible:
        return
    # log alpha_bar is nearly linear in the betas, so this factor brings it to DDPM's end point,
    # 4.0e-5.
    factor = math.log(4.0e-5) / min(alpha_bars[-1].log().item(), -1e-12)
    short = factor * betas.max().item() >= 0.99  # so few steps that a beta would reach 1
    advice = (
        "Take more timesteps"
        if short
        else f"Multiply the betas by about {factor:.3g}, or take more timesteps"
    )
    warnings.warn(
        f"the last step still holds {left:.2f} of the image "
        f"(alpha_bars[-1]={alpha_bars[-1].item():.3g}), but sampling starts "
        f"from pure noise. {advice}.",
        stacklevel=3,
    )


def check_timesteps(t: Tensor, timesteps: int) -> None:
    """Raise ValueError unless `t` holds whole numbers in 0 … T−1.

    The range is checked on the CPU only. On a GPU the check would stop the stream at every step,
    and indexing raises an error there for t ≥ T by itself (a negative t counts from the end, as
    everywhere in PyTorch).
    """
    if t.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"t has dtype {t.dtype}: timesteps are whole numbers, use torch.long")
    if t.device.type == "cpu" and t.numel() and (t.min() < 0 or t.max() >= timesteps):
        raise ValueError(
            f"t holds {t.min().item()} … {t.max().item()}, but this schedule has steps 0 … "
            f"{timesteps - 1}"
        )
