"""Weights by whatever name, and pictures drawn from them: what `train`, `sample` and `evaluate` share."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoints, config, data, pretrained, runtime, sampling
from ..config import TrainConfig
from ..diffusion import Denoiser
from ..schedules import make_schedule
from .progress import Progress

BATCH = 256  # pictures drawn at once; part of what a seed means


def load_weights(what: str, device) -> tuple[nn.Module, TrainConfig]:
    """The averaged network in eval mode and its config: shipped weights by name, a run's folder (its last.pt), a checkpoint.

    Raises FileNotFoundError that lists the names there are; ValueError on a damaged or foreign file.
    """
    if what in pretrained.names():
        return pretrained.load(what, device)
    path = Path(what)
    if not path.exists():
        names = ", ".join(pretrained.names())
        raise FileNotFoundError(f"no weights {what!r}: give a run's folder, a checkpoint, or one of {names}")
    path = path / "last.pt" if path.is_dir() else path
    payload = checkpoints.read(path)
    cfg = config.from_dict(payload["config"])
    model = pretrained.build(cfg)
    checkpoints.check_weights(path, payload.get("ema"), model)
    model.load_state_dict(payload["ema"])
    return runtime.place(model, device).eval(), cfg


@dataclass(frozen=True)
class Plan:
    """How pictures are drawn: `n` of them by `sampler`, "ddim" in `steps` network calls or "ddpm" in all T, with `variance`."""

    n: int
    sampler: str
    steps: int
    seed: int
    variance: str = "beta_tilde"
    clamp: bool = True  # of x0_hat to [−1, 1]; never done for a network whose pictures lie in [0, 1]

    def __str__(self):
        return f"n {self.n:,}, {self.sampler}, {self.steps} network calls a picture, seed {self.seed}"


def plan(cfg: TrainConfig, n: int, sampler: str = "ddim", steps: int | None = None, seed: int = 0) -> Plan:
    """A `Plan` that fits `cfg`; without `steps`, 50 for DDIM and T for DDPM. Raises ValueError on what does not fit."""
    every = cfg.timesteps
    if not 1 <= n <= 100_000:
        raise ValueError(f"n={n} is outside 1 … 100000")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is outside 0 … {2**32 - 1}")
    if steps is None:
        steps = every if sampler == "ddpm" else min(50, every)
    if sampler == "ddpm" and steps != every:
        raise ValueError(f"steps={steps}: the sampler ddpm takes all {every} steps; leave --steps out, or take ddim")
    if not 1 <= steps <= every:
        raise ValueError(f"steps={steps} is outside 1 … {every}, the steps of these weights")
    return Plan(n, sampler, steps, seed)


def times_of(cfg: TrainConfig, how: Plan) -> list[int]:
    """The timesteps at which the network is called, descending, and −1 for the finished picture."""
    return [*sampling.spaced_timesteps(make_schedule(**cfg.noise()), how.steps), -1]


def draw(model: nn.Module, cfg: TrainConfig, how: Plan, device, wanted=()) -> tuple[Tensor, dict[int, Tensor]]:
    """The pictures (n, C, H, W) in model range on the CPU, and {t: x_t} of the first batch at the wanted t.

    A network with labels draws them in turn: 0, 1, 2, … and again.
    """
    schedule = make_schedule(**cfg.noise()).to(device)
    denoise = Denoiser(model, schedule, cfg.target, how.clamp and cfg.data_range == "symmetric")
    rng = torch.Generator(device=device).manual_seed(how.seed)
    batches = torch.arange(how.n).split(BATCH)
    progress = Progress("draw", len(batches) * (how.steps + 1))
    wanted, kept, done, parts = set(wanted), {}, 0, []
    for numbers in batches:
        shape = (len(numbers), cfg.channels, cfg.image_size, cfg.image_size)
        y = (numbers % cfg.num_classes).to(device) if cfg.num_classes else None
        if how.sampler == "ddpm":
            states = sampling.ddpm_sample(denoise, schedule, shape, how.variance, rng, y)
        else:
            states = sampling.ddim_sample(denoise, schedule, shape, how.steps, 0.0, rng, y)
        for t, x_t, _ in states:
            done += 1
            progress.update(done)
            if not parts and t in wanted:
                kept[t] = data.to_symmetric(x_t.cpu(), cfg.data_range)
        parts.append(data.to_symmetric(x_t.cpu(), cfg.data_range))
    progress.close()
    return torch.cat(parts), kept
