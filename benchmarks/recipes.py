"""Train contestants in one run on one machine, in turns, to equal wall-clock marks, and measure
what each draws by then.

`python -m benchmarks.recipes` trains what the plan below says, appends a line of JSON for every
measurement, and writes table, CSV and plot beside it; given again, it goes on where it was stopped.
`--report` writes the table from what is there.
"""

import argparse
import datetime
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from ddpm_utils import data, evaluation, pretrained, runtime, sampling

from .contestants import CHOICES, CONTESTANTS, Ours, Training
from .measure import flops_per_image, machine, matrix_peak, real_sets
from .results import append, comparable_rows, minutes, place_and_command, report

# contestant: {mark in seconds of training: seeds}. A mark is a run of its own, whose learning rate
# ends there; only a contestant whose rate never falls (`Article`) is one run, read off at each of
# its marks.
PLAN = {
    "ours": {60: [0], 120: [0], 150: [0], 300: [0, 1, 2], 600: [0]},
    "paper": {60: [0], 120: [0], 300: [0], 600: [0]},
    "sketch": {60: [0], 100: [0], 120: [0], 300: [0, 1, 2], 600: [0]},
    "article": {300: [0], 600: [0]},
    "diffusers": {300: [0], 600: [0]},
}
# What each choice of the default buys: it alone is taken back. Three seeds of ours show how much of
# a difference is luck.
CHOICES_PLAN = {"ours": {120: [0, 1, 2]}} | {name: {120: [0]} for name in CHOICES}
# seconds that a contestant trains before the next one's turn, so that the machine's noise hits all
# alike
TURN = 15.0
# samples of the common sampler; a contestant's own sampler is measured at a quarter of them
N = 1000
DDIM_STEPS = 50  # of the common sampler
SAMPLING_SEED = 1234  # of the noise that all contestants start from


class FrechetMetric:
    """Fréchet distance to the whole training set in the features of our own classifier, and the
    floor at any n.
    """

    def __init__(self, train_set: data.ImageSet, test_set: data.ImageSet, device: torch.device):
        self.classifier = pretrained.obtain_classifier(train_set, device)
        self.reference = evaluation.extract_features(self.classifier, train_set.images)
        self.real = evaluation.extract_features(self.classifier, test_set.images)

    def distance(self, images: Tensor) -> float:
        return evaluation.frechet_distance(
            evaluation.extract_features(self.classifier, images), self.reference
        )

    def floor(self, n: int) -> float:
        """The mean distance of n real test images, over as many disjoint draws as the test set
        gives.
        """
        if n > len(self.real):
            raise ValueError(
                f"n={n} samples cannot be compared with {len(self.real)} test images: take fewer"
            )
        draws = self.real[
            torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        ].split(n)
        return statistics.fmean(
            evaluation.frechet_distance(part, self.reference) for part in draws if len(part) == n
        )


def ddim_steps() -> int:
    """Network calls of the common sampler."""
    return runtime.shrink(DDIM_STEPS, 5)


def draw_images(contestant: Training, n: int, own: bool, batch: int = 250) -> Tensor:
    """n images (n, 1, H, W) uint8 by the contestant's own sampler or the common one: every
    contestant meets the same noise.
    """
    rng = torch.Generator(contestant.device).manual_seed(SAMPLING_SEED)
    parts = []
    for first in range(0, n, batch):
        shape = (min(batch, n - first), *contestant.images.shape[1:])
        if own:
            states = contestant.own_sample(shape, rng)
        else:
            states = sampling.ddim_sample(
                contestant.denoiser(), contestant.schedule, shape, ddim_steps(), generator=rng
            )
        parts.append(data.to_image_range(sampling.last(states)).cpu())
    return torch.cat(parts)


class Bench:
    """The run: the plan, what is done of it, and the contestants in training."""

    def __init__(
        self,
        plan: dict,
        out: Path,
        n: int,
        device: torch.device,
        compiled: bool,
        command: str,
    ):
        self.plan = plan
        self.out = out
        self.n = n
        self.device = device
        self.compiled = compiled
        self.command = command
        train_set, test_set = real_sets()
        if n > len(test_set):
            raise SystemExit(
                f"--n {n}: the floor needs as many test images, and there are {len(test_set)}"
            )
        self.same = machine(device, train_set.title)
        self.rows = comparable_rows(out, self.same)
        self.images = train_set.images.to(device)
        self.sets = train_set, test_set
        self.live: dict[tuple, Training] = {}

    def run(self) -> None:
        """Mark by mark, shortest first; at each, all that have one take turns until they have
        reached it.
        """
        for mark in sorted({mark for marks in self.plan.values() for mark in marks}):
            entries = [
                (name, seed) for name, marks in self.plan.items() for seed in marks.get(mark, [])
            ]
            waiting = [entry for entry in entries if self.missing(*entry, mark)]
            if not waiting:
                continue
            if not hasattr(self, "metric"):  # costs a minute, and nothing where all is done
                self.metric = FrechetMetric(*self.sets, self.device)
                self.floors = {n: self.metric.floor(n) for n in (self.n, own_n(self.n))}
            print(f"{minutes(mark)} min: {len(waiting)} trainings in turns", flush=True)
            precisions = {CONTESTANTS[name].precision(self.device) for name in self.plan}
            self.peaks = {
                precision: matrix_peak(self.device, precision) for precision in precisions
            }
            while waiting:
                name, seed = waiting.pop(0)
                if self.train_a_turn(name, seed, mark):
                    self.measure(name, seed, mark)
                    self.close(name, seed, mark)
                else:
                    waiting.append((name, seed))

    def missing(self, name: str, seed: int, mark: float) -> list[str]:
        """The samplers whose result at this mark is not there yet; results of another recipe or n
        do not count.
        """
        kind, settings = CONTESTANTS[name], self.settings(name)
        wanted = {"common": self.n} | (
            {"own": own_n(self.n)} if kind.own_sample is not Training.own_sample else {}
        )
        done = {
            (r["contestant"], r["seed"], r["mark"], r["sampler"], r["n"], r["settings"])
            for r in self.rows
        }
        return [
            sampler
            for sampler, n in wanted.items()
            if (name, seed, mark, sampler, n, settings) not in done
        ]

    def settings(self, name: str) -> str:
        return CONTESTANTS[name].describe(self.device, self.compiles(name))

    def compiles(self, name: str) -> bool:
        return self.compiled and issubclass(CONTESTANTS[name], Ours)

    def key(self, name: str, seed: int, mark: float) -> str:
        """One run a mark, or one for all of them where the rate is constant."""
        return f"{name}-{seed}" if CONTESTANTS[name].constant else f"{name}-{seed}-{mark}"

    def checkpoint(self, key: str) -> Path:
        return runtime.checkpoint_dir("benchmarks", self.out.stem, f"{key}.pt")

    def train_a_turn(self, name: str, seed: int, mark: float) -> bool:
        """Train one contestant for a while, and save it.

        True once it stands at the mark, or its weights are no numbers.
        """
        key = self.key(name, seed, mark)
        contestant = self.live.get(key) or self.open(name, seed, mark)
        if contestant.seconds < mark:
            contestant.turn(mark, min(mark, contestant.seconds + runtime.shrink(TURN, 0.2)))
            save(
                {"settings": self.settings(name), "mark": mark, "state": contestant.state()},
                self.checkpoint(key),
            )
        return contestant.seconds >= mark or not contestant.is_finite()

    def open(self, name: str, seed: int, mark: float) -> Training:
        """The contestant, warmed up where something is compiled, and as far as an earlier start of
        the same recipe took it.
        """
        contestant = CONTESTANTS[name](self.images, seed, self.device, self.compiles(name))
        if self.device.type == "cuda" or self.compiles(name):
            contestant.warm_up()
        key = self.key(name, seed, mark)
        if self.checkpoint(key).is_file():
            saved = torch.load(self.checkpoint(key), map_location="cpu", weights_only=True)
            if saved["settings"] == self.settings(name) and saved["mark"] <= mark:
                contestant.load(saved["state"])
        self.live[key] = contestant
        return contestant

    def close(self, name: str, seed: int, mark: float) -> None:
        """Forget a run that has no mark ahead."""
        if not (CONTESTANTS[name].constant and any(later > mark for later in self.plan[name])):
            key = self.key(name, seed, mark)
            del self.live[key]
            self.checkpoint(key).unlink(missing_ok=True)

    def measure(self, name: str, seed: int, mark: float) -> None:
        """Sample, compare, and write a row a sampler."""
        contestant = self.live[self.key(name, seed, mark)]
        precision = contestant.precision(self.device)
        for sampler in self.missing(name, seed, mark):
            own = sampler == "own"
            n = own_n(self.n) if own else self.n
            distance = (
                self.metric.distance(draw_images(contestant, n, own))
                if contestant.is_finite()
                else None
            )
            images = contestant.steps * contestant.batch_size
            row = {
                "contestant": name,
                "seed": seed,
                "mark": mark,
                "sampler": sampler,
                "n": n,
                "calls": len(contestant.schedule) if own else ddim_steps(),
                "distance": distance,
                "floor": self.floors[n],
                "seconds": contestant.seconds,
                "warm_up_seconds": contestant.warm_up_seconds,
                "steps": contestant.steps,
                "images": images,
                "images_per_second": images / contestant.seconds,
                "parameters": sum(p.numel() for p in contestant.model.parameters()),
                "flops_per_image": flops_per_image(
                    contestant.model, self.images.shape[1:], self.device
                ),
                "precision": str(precision).removeprefix("torch."),
                "peak_flops": self.peaks[precision],
                "settings": self.settings(name),
                **self.same,
                "date": datetime.date.today().isoformat(),
                "command": self.command,
            }
            append(self.out, row)
            self.rows.append(row)
            words = "diverged" if distance is None else f"{distance:.1f}, floor {row['floor']:.2f}"
            print(
                f"  {name}, seed {seed}: {words} (n = {n}, {sampler} sampler), "
                f"{images:,} images, {row['images_per_second']:.0f} a second",
                flush=True,
            )


def own_n(n: int) -> int:
    """How many images a contestant's own sampler draws, a thousand calls each: a quarter of n."""
    return max(2, n // 4)


def save(payload: dict, path: Path) -> None:
    """Write `payload` to `path`, which is always whole."""
    with runtime.whole_file(path) as file:
        torch.save(payload, file)


def choose(
    plan: dict, names: list[str] | None, marks: list[float] | None, seeds: list[int] | None
) -> dict:
    """The plan, or the part of it, or the marks (in minutes) and seeds, that the command line asks
    for.
    """
    chosen = {}
    for name in names or plan:
        usual = (CHOICES_PLAN | PLAN | plan)[name]
        usual = {mark / 600: s for mark, s in usual.items()} if runtime.is_fast() else usual
        wanted = usual
        if marks is not None:
            near = [
                next((u for u in usual if abs(u / 60 - m) < 0.01 * m), 60 * m) for m in marks
            ]  # 1.67 is 100 seconds
            wanted = {mark: usual.get(mark, [0]) for mark in near}
        chosen[name] = {mark: seeds or usual_seeds for mark, usual_seeds in wanted.items()}
    return chosen


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        help="who trains; the plan's if left out",
    )
    parser.add_argument(
        "--choices",
        action="store_true",
        help="measure what each choice of the default buys, instead",
    )
    parser.add_argument(
        "--minutes", nargs="+", type=float, help="marks for each, instead of the plan's"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="seeds at every mark, instead of the plan's"
    )
    parser.add_argument(
        "--n", type=int, default=runtime.shrink(N, 8), help="samples a measurement (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, mps; the best one here if left out")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for ours and paper; CUDA graphs on a GPU",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file of the results (benchmarks/recipes_<device>.jsonl or choices_…)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing, write the table from the results there are",
    )
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    stem = f"{'choices' if args.choices else 'recipes'}_{device.type}"
    out, command = place_and_command("recipes", arguments, args.out, stem)
    if not args.report:
        plan = choose(
            CHOICES_PLAN if args.choices else PLAN, args.contestants, args.minutes, args.seeds
        )
        try:
            Bench(plan, out, args.n, device, args.compile, command).run()
        except KeyboardInterrupt:
            raise SystemExit(
                "stopped: the same command goes on from the last turn of each contestant"
            ) from None
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
