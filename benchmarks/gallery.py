"""Our network beside the four published ones: what a step costs, and what each draws after equal
time in training.

`python -m benchmarks.gallery` appends a line of JSON for every measurement and writes table,
images and CSV beside it; given again, it goes on where it was stopped. Lesson 12 reads the CSV
and the images.
"""

import argparse
import copy
import datetime
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_utils import data, plots, pretrained, runtime, sampling, training
from ddpm_utils.config import TrainConfig, for_this_run
from ddpm_utils.diffusion import Denoiser, eval_mode
from ddpm_utils.recipes import RECIPES

from .contestants import Ours, Training, without
from .measure import flops_per_image, machine, real_sets, synchronize
from .recipes import SAMPLING_SEED, FrechetMetric, save
from .results import append, comparable_rows, minutes, place_and_command, rows_to_report, write_csv

NO_CLIPPING = 1e6  # a norm that no gradient has
# Pixels a side on Fashion-MNIST: 28, or the next size that the network takes.
SIZES = {"article": 28, "guide": 32, "anime": 28, "mnist32": 32}
SMALL = ("ours", "article", "guide")  # what a CPU trains if nobody is named
NAMES = ("ours", "article", "guide", "anime", "mnist32")
MARK = 600.0  # seconds of training
TURN = 15.0  # seconds that a contestant trains before the next one's turn
# seconds of a turn in which steps are timed, and how many each network has
SPEED_TURN, SPEED_TURNS = 10.0, 5
COMMON_BATCH = 32
# images measured, drawn at a time, calls an image, images kept
N, BATCH, CALLS, SHOWN = 1000, 100, 25, 16
COLUMNS = (
    "what",
    "contestant",
    "setting",
    "channels",
    "size",
    "batch",
    "parameters",
    "trainable",
    "multiply_adds",
    "flops_per_image",
    "images_per_second",
    "memory",
    "memory_by",
    "mark",
    "steps",
    "images",
    "distance",
    "floor",
    "n",
    "calls",
    "seed",
    "precision",
    "settings",
    "device",
    "machine",
    "threads",
    "torch",
    "data",
    "date",
    "command",
)


def recipe(name: str) -> TrainConfig:
    """How the tutorial trains, with the size and channels that it was published for."""
    return TrainConfig(**({"dataset": "fashion_mnist"} | RECIPES[name].config))


class Published(Training):
    """A network of the gallery, trained as its tutorial trains it; in float32, and with the layout
    of memory as it comes.
    """

    member = ""

    def __init__(self, images: Tensor, seed: int, device: torch.device, compiled: bool = False):
        self.cfg = for_this_run(recipe(self.member))
        self.batch_size, self.target = self.cfg.batch_size, self.cfg.target
        self.clip = self.cfg.grad_clip if self.cfg.grad_clip < NO_CLIPPING else None
        if images.shape[1] == 1:
            images = F.pad(images, [(SIZES[self.member] - images.shape[-1]) // 2] * 4)
        # [0, 1] in a range that goes from −1 to 1: the upper half of 256 levels, so 128 levels of
        # gray.
        images = 128 + images // 2 if self.cfg.data_range == "unit" else images
        super().__init__(images, seed, device)

    @classmethod
    def describe(cls, device: torch.device, compiled: bool) -> str:
        return json.dumps(RECIPES[cls.member].config)

    @classmethod
    def precision(cls, device: torch.device) -> torch.dtype:
        return torch.float32

    def build(self) -> nn.Module:
        return pretrained.build(self.cfg.replace(channels=self.images.shape[1]))

    def make_optimizer(self):
        return torch.optim.Adam(self.model.parameters(), lr=self.cfg.lr)

    def set_up(self, seed: int, compiled: bool) -> None:
        super().set_up(seed, compiled)
        if self.cfg.ema_decay:
            self.average = copy.deepcopy(self.model).eval().requires_grad_(False)

    def rate(self, progress: float) -> float:
        return training.learning_rate(round(1000 * progress), 1000, self.cfg)

    def step(self, progress: float) -> None:
        super().step(progress)
        if self.average is not None:
            with torch.no_grad():
                weights = list(self.model.parameters())
                torch._foreach_lerp_(
                    list(self.average.parameters()), weights, 1 - self.cfg.ema_decay
                )

    def denoiser(self) -> Denoiser:
        """It holds x0_hat in the range that the network was trained on."""
        unit = self.cfg.data_range == "unit"
        return (
            FromZero(self.network(), self.schedule, "eps", clamp=False)
            if unit
            else super().denoiser()
        )


class FromZero(Denoiser):
    """A denoiser for images in [0, 1]."""

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t, y).clamp(0, 1)


CONTESTANTS = {"ours": Ours} | {
    name: type(name.capitalize(), (Published,), {"member": name}) for name in RECIPES
}


def random_images(name: str, setting: str, device: torch.device) -> Tensor:
    """A few batches of pure chance, for a stopwatch: of the published shape, or 28×28 in gray."""
    shape = (1, 28, 28)
    if setting == "published" and name != "ours":
        cfg = recipe(name)
        shape = (cfg.channels, cfg.image_size, cfg.image_size)
    rng = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, 256, (runtime.shrink(256, 8), *shape), generator=rng)
        .to(torch.uint8)
        .to(device)
    )


def for_the_stopwatch(name: str, setting: str, device: torch.device) -> Training:
    """The contestant in its published setting, or in the common one: 28×28 in gray (32×32 where 28
    does not fit), batch 32.
    """
    kind = CONTESTANTS[name]
    if name == "ours" and setting == "common":
        kind = without(batch_size=COMMON_BATCH)
    made = kind(random_images(name, setting, device), 0, device)
    if name != "ours":
        batch = COMMON_BATCH if setting == "common" else made.batch_size
        made.batch_size = runtime.shrink(batch, 2)
    return made


def multiply_adds(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> float:
    """Multiplications, each with an addition, of convolutions and matrix products for one answer on
    one image (C, H, W).
    """
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    # With gradients, or PyTorch's own attention module takes a short cut that nothing counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), eval_mode(model):
        model(x, t)
    return counter.get_total_flops() / 2


def resident(field: str) -> int | None:
    """Bytes of this process in memory: now (`VmRSS`) or at most so far (`VmHWM`); the system's own
    count where there is one.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` would not do here: a process inherits its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def load_libraries(device: torch.device) -> None:
    """A step of hardly any network, so that what PyTorch loads on its first step is laid at
    nobody's door.
    """
    layer = nn.Conv2d(1, 8, 3).to(device)
    optimizer = torch.optim.Adam(layer.parameters())
    with runtime.autocast(device):
        layer(torch.zeros(1, 1, 8, 8, device=device)).sum().backward()
    optimizer.step()


def memory_here(name: str, setting: str, device: torch.device) -> tuple[int | None, str]:
    """Bytes that weights, optimizer and three training steps add to a process that has all
    libraries loaded, and who counted.
    """
    load_libraries(device)
    before = resident("VmRSS")
    made = for_the_stopwatch(name, setting, device)
    for _ in range(3):
        made.step(0.5)
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated"
    peak = resident("VmHWM")
    return (
        None if before is None else peak - before
    ), "growth of a fresh process's peak resident memory"


def memory_of(name: str, setting: str, device: torch.device) -> tuple[int | None, str]:
    """`memory_here` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gallery",
        "--memory-of",
        name,
        setting,
        "--device",
        str(device),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {name} could not be measured: {done.stderr[-500:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def facts(name: str, setting: str, made: Training, device: torch.device) -> dict:
    """What a row about a training step says."""
    model, shape = made.model, tuple(made.images.shape[1:])
    memory, memory_by = memory_of(name, setting, device)
    return {
        "what": "step",
        "contestant": name,
        "setting": setting,
        "channels": shape[0],
        "size": shape[-1],
        "batch": made.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "multiply_adds": multiply_adds(model, shape, device),
        "flops_per_image": flops_per_image(model, shape, device),
        "memory": memory,
        "memory_by": memory_by,
    }


def draw_images(made: Training, n: int, side: int) -> Tensor:
    """n images (n, 1, side, side) uint8 by a clamped DDIM; in the middle of larger canvases the
    noise is the same for all.
    """
    device, size = made.device, made.images.shape[-1]
    rng, around = (torch.Generator(device).manual_seed(SAMPLING_SEED + i) for i in (0, 1))
    edge, parts = (size - side) // 2, []
    for first in range(0, n, BATCH):
        shape = (min(BATCH, n - first), 1, size, size)
        start = torch.randn(shape, generator=around, device=device)
        middle = torch.randn(*shape[:2], side, side, generator=rng, device=device)
        start[:, :, edge : edge + side, edge : edge + side] = middle
        steps = sampling.spaced_timesteps(made.schedule, runtime.shrink(CALLS, 5))
        states = sampling.ddim_sample(made.denoiser(), made.schedule, shape, steps, start=start)
        x = sampling.last(states)[:, :, edge : edge + side, edge : edge + side]
        parts.append(data.to_image_range(data.to_symmetric(x, made.cfg.data_range)).cpu())
    return torch.cat(parts)


class Bench:
    """The run: which rows are wanted, which are there, and how the missing ones are made."""

    def __init__(
        self,
        names: list[str],
        mark: float,
        n: int,
        out: Path,
        device: torch.device,
        command: str,
    ):
        self.names = names
        self.mark = mark
        self.n = n
        self.out = out
        self.device = device
        self.command = command
        self.sets = real_sets()
        self.same = machine(device, self.sets[0].title)
        self.rows = comparable_rows(out, self.same)

    def write(self, row: dict) -> None:
        row = row | self.same | {"date": datetime.date.today().isoformat(), "command": self.command}
        append(self.out, row)
        self.rows.append(row)

    def settings(self, name: str) -> str:
        return CONTESTANTS[name].describe(self.device, False)

    def steps(self) -> None:
        """What a training step costs: all networks that miss a row, in turns."""
        done = {
            (row["contestant"], row["setting"], row["settings"])
            for row in self.rows
            if row["what"] == "step"
        }
        both = [(name, setting) for setting in ("published", "common") for name in NAMES]
        wanted = [
            (name, setting)
            for name, setting in both
            if (name, setting, self.settings(name)) not in done
        ]
        timed: dict[tuple, list[float]] = {entry: [] for entry in wanted}
        made = {entry: for_the_stopwatch(*entry, self.device) for entry in wanted}
        for contestant in made.values():
            contestant.step(0.5)  # the first one is slow
        for _ in range(runtime.shrink(SPEED_TURNS, 1)):
            for entry, contestant in made.items():
                steps, seconds = contestant.steps, contestant.seconds
                contestant.turn(math.inf, seconds + runtime.shrink(SPEED_TURN, 0.01))
                images = (contestant.steps - steps) * contestant.batch_size
                timed[entry].append(images / (contestant.seconds - seconds))
        for (name, setting), contestant in made.items():
            row = facts(name, setting, contestant, self.device) | {
                "images_per_second": statistics.median(timed[name, setting]),
                "seed": 0,
                "settings": self.settings(name),
                "precision": str(contestant.precision(self.device)).removeprefix("torch."),
            }
            self.write(row)
            memory = "not measured" if row["memory"] is None else f"{row['memory'] / 2**20:.0f} MiB"
            print(
                f"  {name}, {setting}: {row['images_per_second']:.1f} images/s, {memory}",
                flush=True,
            )

    def quality(self) -> None:
        """Train whom the command names, in turns, to the mark, and draw."""
        drawn = [row for row in self.rows if row["what"] == "quality"]
        done = {(row["contestant"], row["mark"], row["n"], row["settings"]) for row in drawn}
        waiting = [
            name
            for name in self.names
            if (name, self.mark, self.n, self.settings(name)) not in done
        ]
        if not waiting:
            return
        metric, live = FrechetMetric(*self.sets, self.device), {}
        floor, images = metric.floor(self.n), self.sets[0].images.to(self.device)
        print(f"{minutes(self.mark)} min of training: {', '.join(waiting)}", flush=True)
        while waiting:
            name = waiting.pop(0)
            made = live[name] = live.get(name) or self.open(name, images)
            if made.seconds < self.mark:
                made.turn(self.mark, min(self.mark, made.seconds + runtime.shrink(TURN, 0.2)))
                save(
                    {"settings": self.settings(name), "state": made.state()}, self.checkpoint(name)
                )
            if made.seconds < self.mark and made.is_finite():
                waiting.append(name)
                continue
            self.measure(name, made, metric, floor)
            del live[name]
            self.checkpoint(name).unlink(missing_ok=True)

    def checkpoint(self, name: str) -> Path:
        return runtime.checkpoint_dir("benchmarks", self.out.stem, f"{name}-{self.mark:g}.pt")

    def open(self, name: str, images: Tensor) -> Training:
        """The contestant, as far as an earlier start of the same recipe took it."""
        made = CONTESTANTS[name](images, 0, self.device)
        if self.device.type == "cuda":
            made.warm_up()
        if self.checkpoint(name).is_file():
            saved = torch.load(self.checkpoint(name), map_location="cpu", weights_only=True)
            if saved["settings"] == self.settings(name):
                made.load(saved["state"])
        return made

    def measure(self, name: str, made: Training, metric: FrechetMetric, floor: float) -> None:
        """Draw, keep a few images, and write the row."""
        distance = None
        if made.is_finite():
            drawn = draw_images(made, self.n, self.sets[0].images.shape[-1])
            distance = metric.distance(drawn)
            keep_images(self.out, name, drawn[:SHOWN])
        images = made.steps * made.batch_size
        self.write(
            {
                "what": "quality",
                "contestant": name,
                "setting": "Fashion-MNIST",
                "channels": 1,
                "size": made.images.shape[-1],
                "batch": made.batch_size,
                "mark": self.mark,
                "steps": made.steps,
                "images": images,
                "images_per_second": images / made.seconds,
                "distance": distance,
                "floor": floor,
                "n": self.n,
                "calls": runtime.shrink(CALLS, 5),
                "seed": 0,
                "settings": self.settings(name),
                "precision": str(made.precision(self.device)).removeprefix("torch."),
            }
        )
        words = "diverged" if distance is None else f"distance {distance:.1f}, floor {floor:.2f}"
        print(f"  {name}: {words}, {images:,} images", flush=True)


def keep_images(out: Path, name: str, images: Tensor) -> None:
    """Put a contestant's images, uint8, beside those of the others, so that the file is always
    whole.
    """
    path, kept = out.with_suffix(".npz"), {}
    if path.is_file():
        with np.load(path) as file:
            kept = dict(file)
    with runtime.whole_file(path) as file:
        np.savez_compressed(file, **(kept | {name: images.numpy()}))


def latest(rows: list[dict]) -> list[dict]:
    """Of rows about the same thing the last one, in the order of the contestants; an image row for
    everybody.
    """
    found = {(row["what"], row["contestant"], row["setting"], row.get("mark")): row for row in rows}
    drawn = {row["contestant"] for row in found.values() if row["what"] == "quality"}
    for name in {row["contestant"] for row in rows} - drawn:
        found["quality", name, "", None] = {
            "what": "quality",
            "contestant": name,
            "distance": "not measured",
        }
    return sorted(
        found.values(), key=lambda row: (row["what"] == "quality", NAMES.index(row["contestant"]))
    )


def report(out: Path) -> str:
    """Tables in Markdown, returned and written; CSV and a figure of the images.

    Raises FileNotFoundError without results.
    """
    rows = latest(rows_to_report(out, "gallery"))
    write_csv(out, COLUMNS, rows)
    one = next(row for row in rows if "machine" in row)
    lines = [
        f"{one['machine']}; {one['device']}; torch {one['torch']}; {one['data']}; "
        f"`{one['command']}`",
        "",
        "| network | setting | image | batch | parameters | multiply-adds | images/s | in | "
        "memory |",
        "|---|---|---|" + "---:|" * 6,
    ]
    for row in (row for row in rows if row["what"] == "step"):
        shape = f"{row['channels']}×{row['size']}×{row['size']}"
        memory = "not measured" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
        work, speed = f"{row['multiply_adds'] / 1e6:,.0f} M", f"{row['images_per_second']:.1f}"
        cells = [
            row["contestant"],
            row["setting"],
            shape,
            row["batch"],
            f"{row['parameters']:,}",
            work,
            speed,
        ]
        cells += [row["precision"], memory]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| network | minutes of training | images seen | distance | floor |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (row for row in rows if row["what"] == "quality"):
        if "mark" not in row:
            lines.append(f"| {row['contestant']} | | | not measured | |")
            continue
        distance = "diverged" if row["distance"] is None else f"{row['distance']:.1f}"
        cells = [
            row["contestant"],
            minutes(row["mark"]),
            f"{row['images']:,}",
            distance,
            f"{row['floor']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    draw_strips(out)
    text = "\n".join(lines) + "\n"
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def draw_strips(out: Path) -> None:
    """The images that were kept, a row a contestant."""
    if not out.with_suffix(".npz").is_file():
        return
    with np.load(out.with_suffix(".npz")) as file:
        rows = {
            name: data.to_model_range(torch.from_numpy(file[name]))
            for name in NAMES
            if name in file
        }
    count = min(len(x) for x in rows.values())
    plots.strip({name: x[:count] for name, x in rows.items()}, [""] * count).savefig(
        out.with_suffix(".png")
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=NAMES,
        help="who trains (CPU: the three small ones; else all)",
    )
    parser.add_argument("--minutes", type=float, help="of training for each (10)")
    parser.add_argument(
        "--n", type=int, default=runtime.shrink(N, 8), help="images a measurement (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, mps; the best one here if left out")
    parser.add_argument(
        "--out", type=Path, help="file of the results (benchmarks/gallery_<device>.jsonl)"
    )
    parser.add_argument(
        "--steps-only", action="store_true", help="measure what a step costs, and train nobody"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing, write the tables from the results there are",
    )
    # what a child process is asked
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    if args.memory_of:
        print(json.dumps(memory_here(*args.memory_of, device)))
        return
    out, command = place_and_command("gallery", arguments, args.out, f"gallery_{device.type}")
    if not args.report:
        names = args.contestants or (SMALL if device.type == "cpu" else NAMES)
        mark = runtime.shrink(MARK, 0.3) if args.minutes is None else 60 * args.minutes
        bench = Bench(list(names), mark, args.n, out, device, command)
        try:
            bench.steps()
            if not args.steps_only:
                bench.quality()
        except KeyboardInterrupt:
            raise SystemExit(
                "stopped: the same command goes on from the last turn of each contestant"
            ) from None
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
