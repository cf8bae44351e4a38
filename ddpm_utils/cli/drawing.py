"""Loading weights and drawing images, as shared by `train`, `sample` and `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoints, config, data, pretrained, runtime, sampling
from ..config import TrainConfig
from ..diffusion import Denoiser
from ..schedules import make_schedule

BATCH = 256  # images drawn at once; part of what a seed means


def load_weights(what: str, device) -> tuple[nn.Module, TrainConfig]:
    """Return the averaged network in eval mode, and its config.

    `what` is the name of shipped weights, a run's folder (its last.pt is read), or a checkpoint.
    Raises FileNotFoundError that lists the available names, and ValueError on a file that is
    damaged or was not written by this package.
    """
    if what in pretrained.names():
        return pretrained.load(what, device)
    path = Path(what)
    if not path.exists():
        names = ", ".join(pretrained.names())
        raise FileNotFoundError(
            f"no weights {what!r}: give a run's folder, a checkpoint, or one of {names}"
        )
    path = path / "last.pt" if path.is_dir() else path
    payload = checkpoints.read(path)
    cfg = config.from_dict(payload["config"])
    model = pretrained.build(cfg)
    checkpoints.check_weights(path, payload.get("ema"), model)
    model.load_state_dict(payload["ema"])
    return runtime.place(model, device).eval(), cfg


@dataclass(frozen=True)
class Plan:
    """The settings for drawing images.

    `n` images are drawn by `sampler`: "ddim" or "dpm" in `steps` network calls, or "ddpm" in all T.
    `variance` belongs to the sampler "ddpm".
    """

    n: int
    sampler: str
    steps: int
    seed: int
    variance: str = "beta_tilde"
    clamp: bool = True  # of x0_hat to [−1, 1]; never done for a network whose images lie in [0, 1]

    def __str__(self):
        return (
            f"n {self.n:,}, {self.sampler}, {self.steps} network calls an image, seed {self.seed}"
        )


def plan(
    cfg: TrainConfig,
    n: int,
    sampler: str = "ddim",
    steps: int | None = None,
    seed: int = 0,
) -> Plan:
    """Return a `Plan` that fits `cfg`.

    By default, `steps` is 50 for ddim, 20 for dpm and T for ddpm. Raises ValueError on settings
    that do not fit.
    """
    every = cfg.timesteps
    if not 1 <= n <= 100_000:
        raise ValueError(f"n={n} is outside 1 … 100000")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is outside 0 … {2**32 - 1}")
    if steps is None:
        steps = min(every, {"ddim": 50, "dpm": 20, "ddpm": every}[sampler])
    if sampler == "ddpm" and steps != every:
        raise ValueError(
            f"steps={steps}: the sampler ddpm takes all {every} steps; leave --steps out, or take "
            "ddim"
        )
    if not 1 <= steps <= every:
        raise ValueError(f"steps={steps} is outside 1 … {every}, the steps of these weights")
    return Plan(n, sampler, steps, seed)


def times_of(cfg: TrainConfig, how: Plan) -> list[int]:
    """Return the timesteps of the network calls, descending, then −1 for the finished image."""
    spacing = "log_snr" if how.sampler == "dpm" else "uniform"
    return [*sampling.spaced_timesteps(make_schedule(**cfg.noise()), how.steps, spacing), -1]


def draw(
    model: nn.Module,
    cfg: TrainConfig,
    how: Plan,
    device,
    wanted=(),
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the drawn images, and the states x_t of the first batch at the times `wanted`.

    The images are (n, C, H, W) in model range on the CPU; the states are {t: x_t}. A network with
    labels draws them in turn: 0, 1, 2, … and again.
    """
    # prepare the denoiser, the batches and the samplers
    schedule = make_schedule(**cfg.noise()).to(device)
    denoise = Denoiser(model, schedule, cfg.target, how.clamp and cfg.data_range == "symmetric")
    rng = torch.Generator(device=device).manual_seed(how.seed)
    batches = torch.arange(how.n).split(BATCH)
    samplers = {
        "ddpm": lambda shape, y: sampling.ddpm_sample(
            denoise, schedule, shape, how.variance, rng, y
        ),
        "ddim": lambda shape, y: sampling.ddim_sample(
            denoise, schedule, shape, how.steps, 0.0, rng, y
        ),
        "dpm": lambda shape, y: sampling.dpm_solver_sample(
            denoise, schedule, shape, how.steps, rng, y
        ),
    }
    bar = tqdm(total=len(batches) * (how.steps + 1), desc="draw", unit="call", disable=None)
    wanted, kept, parts = set(wanted), {}, []
    for numbers in batches:
        # choose the shape and the labels of a batch
        shape = (len(numbers), cfg.channels, cfg.image_size, cfg.image_size)
        y = (numbers % cfg.num_classes).to(device) if cfg.num_classes else None
        # run the sampler, and keep the wanted states of the first batch
        for t, x_t, _ in samplers[how.sampler](shape, y):
            bar.update()
            if not parts and t in wanted:
                kept[t] = data.to_symmetric(x_t.cpu(), cfg.data_range)
        parts.append(data.to_symmetric(x_t.cpu(), cfg.data_range))
    bar.close()
    return torch.cat(parts), kept
