"""What do three seeds say about a flat loss curve and about averaged weights?

`python -m benchmarks.short_runs` repeats two experiments of lesson 04 with three seeds. `paper`
trains the default network for 200 steps in the setting of DDPM and measures its loss at every
timestep after half of the steps and after all of them. It also draws images in which the best
affine denoiser replaces the network at one end of the process. `average` trains a small network
with a constant and with a falling learning rate, and measures the raw and the averaged weights. It
appends a line of JSON for every training and goes on where it was stopped.
"""

import datetime
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ddpm_utils import config, data, oracle, runs, runtime, sampling, training
from ddpm_utils.config import TrainConfig
from ddpm_utils.diffusion import Denoiser
from ddpm_utils.unet import UNet

from .measure import machine, real_sets
from .results import append, comparable_rows, place_and_command, results_parser, rows_to_report

SEEDS = (0, 1, 2)
STEPS = {"paper": 200, "constant": 400, "falling": 400}
N_BINS = 25
N_DRAWN = 32
DDIM_STEPS = 100
SWITCH = 0.6  # share of T from which on a step counts as the noisy end


def settings(name: str, seed: int, n_images: int) -> TrainConfig:
    """The config of an experiment: the settings of lesson 04."""
    steps = runtime.shrink(STEPS[name], 10)
    if name == "paper":
        cfg = TrainConfig(**config.PAPER, optimizer="adam", lr=1e-3, warmup_steps=0, grad_clip=1e6)
        cfg = cfg.replace(decay_from=1.0)
    else:
        falls_from = 1.0 if name == "constant" else 0.0
        cfg = TrainConfig(widths=(16, 16), blocks=1, warmup_steps=20, decay_from=falls_from)
    cfg = config.for_this_run(cfg.replace(seed=seed))
    return cfg.replace(epochs=steps * cfg.batch_size / n_images)


def switched(at_the_end, before, from_t: int):
    """A denoiser that is `at_the_end` for t ≥ from_t, and `before` for smaller t."""

    def denoise(x_t: Tensor, t: Tensor, y=None) -> Tensor:
        return at_the_end(x_t, t) if t[0] >= from_t else before(x_t, t)

    return denoise


def draw(denoise, schedule, shape, seed: int) -> Tensor:
    """Images from the same noise for every denoiser."""
    rng = torch.Generator(schedule.betas.device).manual_seed(seed + 1)
    calls = runtime.shrink(DDIM_STEPS, 5)
    states = sampling.ddim_sample(denoise, schedule, shape, calls, eta=1.0, generator=rng)
    return sampling.last(states).cpu()


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def swaps(state: training.TrainState, images: Tensor) -> dict:
    """How far images move if the affine denoiser replaces the network, in root mean square."""
    schedule = state.schedule
    fit_on = data.to_model_range(images[: runtime.shrink(20_000, 1000)]).to(state.device)
    affine = oracle.fit_gaussian(schedule, fit_on)
    network = Denoiser(state.model, schedule, state.cfg.target)
    from_t = round(SWITCH * len(schedule))
    contestants = {
        "everywhere": affine,
        "noisy_end": switched(affine, network, from_t),
        "all_but_the_noisy_end": switched(network, affine, from_t),
    }
    shape = (runtime.shrink(N_DRAWN, 4), *images.shape[1:])
    drawn = draw(network, schedule, shape, state.cfg.seed)
    return {
        name: distance(draw(denoise, schedule, shape, state.cfg.seed), drawn)
        for name, denoise in contestants.items()
    }


def measure(name: str, seed: int, train_set, test_set, device) -> dict:
    """Train, and measure half-way and at the end."""
    cfg = settings(name, seed, len(train_set))
    runtime.seed_everything(seed)
    state = training.TrainState(cfg, UNet(**cfg.network()), device)
    losses, at_steps = [], {}
    for record in runs.train(state, train_set.images):
        losses.append(record.loss)
        if record.step in (record.total // 2, record.total):
            raw, averaged = (
                training.loss_per_timestep(
                    model, state.schedule, test_set.images, cfg.target, None
                ).cpu()
                for model in (state.model, state.ema.model)
            )
            recent = losses[-max(1, record.total // 10) :]
            at_steps[record.step] = {
                "batches": statistics.fmean(recent),
                "raw": raw.mean().item(),
                "averaged": averaged.mean().item(),
                "bins": [part.mean().item() for part in raw.chunk(N_BINS)],
            }
    moved = swaps(state, train_set.images) if name == "paper" else {}
    return {"steps": at_steps, "moved": moved}


def run(out: Path, seeds, device: torch.device, command: str) -> None:
    """All trainings that `out` lacks."""
    train_set, test_set = real_sets()
    test_set = test_set.first(runtime.shrink(2048, 75))
    same = machine(device, train_set.title)
    done = {(row["experiment"], row["seed"]) for row in comparable_rows(out, same)}
    for seed in seeds:
        for name in STEPS:
            if (name, seed) in done:
                continue
            began = time.perf_counter()
            row = {
                "experiment": name,
                "seed": seed,
                **measure(name, seed, train_set, test_set, device),
                "n": len(test_set),
                **same,
                "seconds": time.perf_counter() - began,
                "date": datetime.date.today().isoformat(),
                "command": command,
            }
            append(out, row)
            print(f"{name}, seed {seed}: {row['seconds']:.0f} s", flush=True)


def change(row: dict, part: slice) -> float:
    """By which share the loss in some bins of t changed in the second half of the training."""
    before, after = (sum(at["bins"][part]) for at in row["steps"].values())
    return after / before - 1


def report(out: Path) -> str:
    """Two tables in Markdown. Raises FileNotFoundError if there are no results."""
    rows = rows_to_report(out, "short_runs")
    lines = ["| seed | change of the loss | first fifth of t | last fifth |", "|---|--:|--:|--:|"]
    for row in (row for row in rows if row["experiment"] == "paper"):
        parts = slice(None), slice(0, N_BINS // 5), slice(-(N_BINS // 5), None)
        shares = " | ".join(f"{change(row, part):+.0%}" for part in parts)
        lines.append(f"| {row['seed']} | {shares} |")
    lines += ["", "| rate | seed | raw weights | averaged weights |", "|---|---|--:|--:|"]
    for row in (row for row in rows if row["experiment"] != "paper"):
        last = list(row["steps"].values())[-1]
        lines.append(
            f"| {row['experiment']} | {row['seed']} | {last['raw']:.4f} | {last['averaged']:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = results_parser("short_runs", __doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("short_runs", arguments, args.out, f"short_runs_{device.type}")
    if not args.report:
        run(out, args.seeds, device, command)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
