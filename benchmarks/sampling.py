"""Quality against network calls: every sampler draws from the shipped weights, from the same noise,
with few calls and many.

`python -m benchmarks.sampling` appends a line of JSON for every measurement and writes CSV and plot
beside it; given again, it goes on where it was stopped. `--names`, `--calls` and `--seeds` choose
points of the plan. Lesson 06 draws its slow points from the CSV.
"""

import datetime
import statistics
import sys
import time
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from ddpm_utils import data, plots, pretrained, runtime, sampling
from ddpm_utils.diffusion import Denoiser
from ddpm_utils.schedules import make_schedule

from .measure import machine, real_sets, shipped_network, synchronize
from .recipes import FrechetMetric
from .results import (
    append,
    comparable_rows,
    place_and_command,
    results_parser,
    rows_to_report,
    write_csv,
)

# name: (sampler, spacing, eta, the numbers of calls)
PLAN = {
    "ancestral (DDPM)": ("ddpm", "uniform", 1.0, [1000]),
    "DDIM": ("ddim", "uniform", 0.0, [5, 7, 10, 15, 20, 30, 50, 100, 250]),
    "DDIM, quadratic": ("ddim", "quadratic", 0.0, [5, 10, 20, 50]),
    "DDIM, log-SNR": ("ddim", "log_snr", 0.0, [5, 10, 20, 50]),
    "DDIM, η = 1": ("ddim", "uniform", 1.0, [10, 20, 50, 100]),
    "DDIM, η = 1, log-SNR": ("ddim", "log_snr", 1.0, [10, 15, 20, 30, 50, 100]),
    "DPM-Solver++ 2M": ("dpm", "uniform", 0.0, [5, 7, 10, 15, 20, 30, 50, 100]),
    "DPM-Solver++ 2M, quadratic": ("dpm", "quadratic", 0.0, [5, 10, 20, 50]),
    "DPM-Solver++ 2M, log-SNR": ("dpm", "log_snr", 0.0, [5, 10, 15, 20, 30, 50]),
    "SDE-DPM-Solver++ 2M": ("dpm", "uniform", 1.0, [10, 20, 50]),
    "SDE-DPM-Solver++ 2M, log-SNR": ("dpm", "log_snr", 1.0, [10, 15, 20, 30, 50, 100]),
    "DPM-Solver++ 2M, one jump": ("dpm", "one_jump", 0.0, [10, 15, 20, 30]),
    "SDE-DPM-Solver++ 2M, one jump": ("dpm", "one_jump", 1.0, [10, 15, 20, 30, 50]),
}
N = 1000  # images a measurement
BATCH = 250
SEED = 0  # of the noise that all start from, unless --seeds names others
COLUMNS = (
    "name",
    "sampler",
    "spacing",
    "eta",
    "calls",
    "n",
    "distance",
    "floor",
    "seconds",
    "weights",
    "seed",
    "device",
    "machine",
    "threads",
    "torch",
    "data",
    "date",
    "command",
)


def times_of(schedule, calls: int, spacing: str) -> list[int]:
    """The times of `spaced_timesteps`, or with "one_jump" those even in the log-SNR, but with a
    single step from T−1 to a noise level below 0.999 (lesson 06).
    """
    if spacing != "one_jump":
        return sampling.spaced_timesteps(schedule, calls, spacing)
    levels = (1 - schedule.alpha_bars).sqrt()
    for number in range(calls, len(schedule) + 1):
        first, *rest = sampling.spaced_timesteps(schedule, number, "log_snr")
        rest = [t for t in rest if levels[t] < 0.999]
        if len(rest) >= calls - 1:
            return [first, *rest[len(rest) - calls + 1 :]]
    return sampling.spaced_timesteps(schedule, calls, "log_snr")


def draw(
    denoise,
    schedule,
    shape,
    sampler: str,
    spacing: str,
    eta: float,
    calls: int,
    rng,
) -> Tensor:
    """Images of `shape` in model range, from the noise that `rng` gives next."""
    if sampler == "ddpm":
        return sampling.last(sampling.ddpm_sample(denoise, schedule, shape, generator=rng))
    times = times_of(schedule, calls, spacing)
    if sampler == "ddim":
        return sampling.last(sampling.ddim_sample(denoise, schedule, shape, times, eta, rng))
    return sampling.last(sampling.dpm_solver_sample(denoise, schedule, shape, times, rng, eta=eta))


def measure(
    model,
    cfg,
    metric: FrechetMetric,
    n: int,
    device,
    sampler: str,
    spacing: str,
    eta: float,
    calls: int,
    seed: int = SEED,
) -> dict:
    """Fréchet distance of n images, and the seconds it took to draw them."""
    schedule = make_schedule(**cfg.noise()).to(device)
    denoise = Denoiser(model, schedule, cfg.target)
    rng, parts = torch.Generator(device).manual_seed(seed), []
    synchronize(device)
    began = time.perf_counter()
    for first in range(0, n, BATCH):
        shape = (min(BATCH, n - first), cfg.channels, cfg.image_size, cfg.image_size)
        parts.append(draw(denoise, schedule, shape, sampler, spacing, eta, calls, rng))
    synchronize(device)
    seconds = time.perf_counter() - began
    return {
        "distance": metric.distance(data.to_image_range(torch.cat(parts)).cpu()),
        "seconds": seconds,
    }


def run(
    out: Path,
    n: int,
    device,
    most: int,
    command: str,
    names=(),
    seeds=(SEED,),
    only=(),
) -> None:
    """All points of the plan of up to `most` calls that `out` lacks, few calls first.

    `names` and `only` choose samplers and numbers of calls; by default, all are measured.
    """
    dataset = runtime.shrink("fashion_mnist", "digits")
    train_set, test_set = real_sets()
    model, cfg = shipped_network(dataset, device)
    same = {
        "weights": "fast mode" if runtime.is_fast() else pretrained.card(dataset)["date"],
        **machine(device, train_set.title),
    }
    rows = comparable_rows(out, same)
    points = [
        (calls, name, seed)
        for name in names or PLAN
        for calls in PLAN[name][-1]
        for seed in seeds
        if calls <= min(most, cfg.timesteps) and (not only or calls in only)
    ]
    done = {(row["calls"], row["name"], row["seed"]) for row in rows if row["n"] == n}
    waiting = [point for point in sorted(points) if point not in done]
    if not waiting:
        return
    metric = FrechetMetric(train_set, test_set, device)
    floor = metric.floor(n)
    for calls, name, seed in waiting:
        sampler, spacing, eta, _ = PLAN[name]
        found = measure(model, cfg, metric, n, device, sampler, spacing, eta, calls, seed)
        row = {
            "name": name,
            "sampler": sampler,
            "spacing": spacing,
            "eta": eta,
            "calls": calls,
            "n": n,
            **found,
            "floor": floor,
            "seed": seed,
            **same,
            "date": datetime.date.today().isoformat(),
            "command": command,
        }
        append(out, row)
        print(
            f"{name}, {calls} calls, seed {seed}: {found['distance']:.2f}, floor {floor:.2f}, "
            f"{found['seconds']:.0f} s",
            flush=True,
        )


def report(out: Path) -> str:
    """A table in Markdown, which is returned, and CSV and plot beside `out`; means over the seeds.

    Raises FileNotFoundError if there are no results.
    """
    rows = rows_to_report(out, "sampling")
    rows.sort(key=lambda row: (list(PLAN).index(row["name"]), row["calls"], row["seed"]))
    write_csv(out, COLUMNS, rows)
    calls = sorted({row["calls"] for row in rows})
    lines = [
        "| sampler | " + " | ".join(f"{c} calls" for c in calls) + " |",
        "|---" + "|---:" * len(calls) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {c: f"{value:.1f}" for c, value in means(rows, name).items()}
        lines.append(f"| {name} | " + " | ".join(found.get(c, "") for c in calls) + " |")
    draw_plot(rows, out.with_suffix(".png"))
    return "\n".join(lines)


def means(rows: list[dict], name: str) -> dict[int, float]:
    """The mean distance over the seeds, by the number of calls."""
    found: dict = {}
    for row in rows:
        if row["name"] == name:
            found.setdefault(row["calls"], []).append(row["distance"])
    return {calls: statistics.fmean(values) for calls, values in found.items()}


def draw_plot(rows: list[dict], path: Path) -> None:
    """Distance over floor against calls, both logarithmic, a line a sampler."""
    fig, ax = plots.figure(width=7.0, height=4.2)
    for name, sign in zip(
        dict.fromkeys(row["name"] for row in rows), cycle("osD^vP*X"), strict=False
    ):
        found = {c: value / rows[0]["floor"] for c, value in means(rows, name).items()}
        ax.loglog(list(found), list(found.values()), marker=sign, label=name)
    ax.set(xlabel="network calls an image", ylabel="Fréchet distance / floor")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(path)


def main(arguments: list[str]) -> None:
    parser = results_parser("sampling", __doc__)
    parser.add_argument(
        "--n", type=int, default=runtime.shrink(N, 24), help="images a measurement (%(default)s)"
    )
    parser.add_argument(
        "--most",
        type=int,
        default=1000,
        help="leave out what takes more calls than this (%(default)s)",
    )
    parser.add_argument("--names", nargs="+", choices=PLAN, default=[], help="samplers (all)")
    parser.add_argument("--calls", type=int, nargs="+", default=[], help="numbers of calls (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEED], help="of the noise (0)")
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("sampling", arguments, args.out, f"sampling_{device.type}")
    if not args.report:
        run(out, args.n, device, args.most, command, args.names, args.seeds, args.calls)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
