"""Which variance of the reverse step gives better images: beta, or beta-tilde?

`python -m benchmarks.variance` draws images with both from the shipped weights of two data sets,
three seeds each, and measures their Fréchet distance. It appends a line of JSON for every
measurement and goes on where it was stopped.

The two variances differ most in the last steps: beta-tilde / beta is 0.5 at t = 1 and 0.98 at
t = 100 (cosine schedule, T = 1000). So by default both chains share their first part, 60 steps of
DDPM's process (DDIM with eta = 1) down to t = 100, and then take every single step with the same
noise. `--split 999` takes every step from the first on, four times as many network calls.
"""

import datetime
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ddpm_utils import data, runtime, sampling
from ddpm_utils.diffusion import Denoiser, p_sample
from ddpm_utils.schedules import make_schedule

from .measure import machine, real_sets, shipped_network
from .recipes import FrechetMetric
from .results import append, comparable_rows, place_and_command, results_parser, rows_to_report

DATASETS = ("fashion_mnist", "mnist")
VARIANCES = ("beta_tilde", "beta")
SEEDS = (0, 1, 2)
N, BATCH = 1000, 250  # images a measurement, images drawn at once
SHARED_STEPS = 60  # of the part that both chains share


@torch.no_grad()
def draw_both(
    denoise,
    schedule,
    shape,
    split: int,
    seed: int,
) -> dict[str, Tensor]:
    """Images of `shape` by either variance: one chain down to t = split, from there on two."""
    device = schedule.betas.device
    rng = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=rng, device=device)
    # the shared part
    last = len(schedule) - 1
    steps = min(SHARED_STEPS, last - split)
    times = [round(last + (split - last) * i / max(1, steps)) for i in range(steps + 1)]
    for now, after in zip(times[:-1], times[1:], strict=True):
        t, t_next = (torch.full((len(x),), value, device=device) for value in (now, after))
        x = sampling.ddim_step(schedule, x, t, t_next, denoise(x, t), eta=1.0, generator=rng)
    # every step from there on, with the same noise for both
    state, images = rng.get_state(), {}
    for variance in VARIANCES:
        rng.set_state(state)
        images[variance] = x
        for step in reversed(range(split + 1)):
            t = torch.full((len(x),), step, device=device)
            images[variance], _ = p_sample(
                denoise, schedule, images[variance], t, variance, generator=rng
            )
    return images


def run(
    out: Path,
    n: int,
    split: int,
    datasets,
    seeds,
    device,
    command: str,
) -> None:
    """All measurements that `out` lacks."""
    for dataset in datasets:
        train_set, test_set = real_sets(dataset)
        same = {"n": n, "split": split, **machine(device, "")}
        done = {(row["dataset"], row["seed"]) for row in comparable_rows(out, same)}
        model, cfg = shipped_network(dataset, device)
        schedule = make_schedule(**cfg.noise()).to(device)
        denoise = Denoiser(model, schedule, cfg.target)
        metric = FrechetMetric(train_set, test_set, device)
        floor = metric.floor(n)
        for seed in (seed for seed in seeds if (dataset, seed) not in done):
            began, parts = time.perf_counter(), []
            for i, first in enumerate(range(0, n, BATCH)):
                shape = (min(BATCH, n - first), cfg.channels, cfg.image_size, cfg.image_size)
                at = min(split, len(schedule) - 1)
                parts.append(draw_both(denoise, schedule, shape, at, 1000 * seed + i))
            row = {"dataset": dataset, "seed": seed, "floor": floor, **same}
            for variance in VARIANCES:
                images = torch.cat([part[variance] for part in parts])
                row[variance] = metric.distance(data.to_image_range(images).cpu())
            row["seconds"] = time.perf_counter() - began
            row |= {"date": datetime.date.today().isoformat(), "command": command}
            append(out, row)
            print(f"{dataset}, seed {seed}: " + words(row), flush=True)


def words(row: dict) -> str:
    return ", ".join(f"{variance} {row[variance]:.2f}" for variance in VARIANCES)


def report(out: Path) -> str:
    """A table in Markdown. Raises FileNotFoundError if there are no results."""
    rows = rows_to_report(out, "variance")
    lines = [
        "| data | seeds | floor | beta-tilde | beta | beta − beta-tilde |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == dataset]
        columns = [[row[variance] for row in mine] for variance in VARIANCES]
        columns.append([row["beta"] - row["beta_tilde"] for row in mine])
        cells = []
        for values in columns:
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(
            f"| {data.TITLES[dataset]} | {len(mine)} | {mine[0]['floor']:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = results_parser("variance", __doc__)
    sets = runtime.shrink(DATASETS, ("digits",))
    parser.add_argument("--n", type=int, default=runtime.shrink(N, 24), help="images drawn")
    parser.add_argument("--split", type=int, default=100, help="t where the chains part")
    parser.add_argument("--datasets", nargs="*", choices=sets, default=sets)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("variance", arguments, args.out, f"variance_{device.type}")
    if not args.report:
        run(out, args.n, args.split, args.datasets, args.seeds, device, command)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
