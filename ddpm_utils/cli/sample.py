"""`sample`: images from trained weights, as a grid, a strip and a GIF.

The strip shows how the images emerge from noise.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import torch
from torch import Tensor

from .. import checkpoints, config, plots, pretrained, runtime
from ..config import TrainConfig
from ..recipes import RECIPES
from . import drawing, flags

ABOUT = "samples.json"  # says where the files beside it come from
SAMPLES = 64  # images, if neither a flag nor a recipe says how many
ROWS, COLUMNS = 6, 10  # of the strip, at most
FRAMES, FILMED, MS = 60, 64, 80  # of the GIF: frames and images, at most; milliseconds a frame


@dataclass(frozen=True)
class Views:
    """Which views of the images are written.

    `strip` and `film` are lists of times, with −1 for the finished images. An empty list means that
    there is no such view.
    """

    columns: int | None  # of the grid; None: a square
    strip: list[int]
    rows: int  # of the strip, at most
    film: list[int]
    filmed: int  # images in the film, at most
    hold_ms: int  # of its last frame


def run(options: flags.Sample) -> int:
    """Draw images, and write the files.

    Raises FileNotFoundError and ValueError before anything is drawn or written.
    """
    device = runtime.pick_device(options.device)
    weights = options.weights or (
        default_run(options.recipe) if options.recipe else "fashion_mnist"
    )
    model, cfg = drawing.load_weights(weights, device)
    how, views = (of_recipe if options.recipe else usual)(options, cfg)
    about = {
        "weights": weights if weights in pretrained.names() else str(Path(weights).resolve()),
        **dataclasses.asdict(how),
    }
    folder = options.out or free_folder(options.recipe or name_of(weights), about)
    checkpoints.check_writable(folder)
    x, kept = drawing.draw(model, cfg, how, device, {*views.strip, *views.film})
    names = write(folder, x, kept, views)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{weights}: {how}")
    print(f"wrote {', '.join([*names, ABOUT])} to {folder}")
    return 0


def name_of(weights: str) -> str:
    """Return a name for the weights.

    It is the name of shipped weights, of a run's folder, or of both a folder and the checkpoint in
    it, such as `my_run-best`.
    """
    path = Path(weights).resolve()
    return (
        weights
        if weights in pretrained.names()
        else f"{path.parent.name}-{path.stem}"
        if path.is_file()
        else path.name
    )


def free_folder(name: str, about: dict) -> Path:
    """Return `outputs/samples/NAME`, with a number added if that folder is taken.

    A folder is taken if it exists, unless its samples.json says that its files come from `about`.
    """
    for number in itertools.count(1):
        folder = runtime.output_path("samples", name if number == 1 else f"{name}-{number}")
        try:
            if json.loads((folder / ABOUT).read_text(encoding="utf-8")) == about:
                return folder
        except (OSError, ValueError):  # none there, or none of ours
            if not folder.exists():
                return folder


def default_run(name: str) -> str:
    """Return the folder of a run that `train --recipe name` made without other flags.

    Raises FileNotFoundError if there is no such run.
    """
    cfg = config.for_this_run(TrainConfig(**RECIPES[name].config))
    folder = runtime.output_dir("runs") / cfg.run_name()
    if not (folder / "last.pt").is_file():
        where = runtime.short_path(folder.parent)
        raise FileNotFoundError(
            f"no run of the recipe {name!r} as it stands in {where}: name a run's folder with "
            "--weights"
        )
    return str(folder)


def usual(options: flags.Sample, cfg: TrainConfig) -> tuple[drawing.Plan, Views]:
    """Return what `sample` draws without a recipe."""
    n = SAMPLES if options.n is None else options.n
    how = drawing.plan(cfg, n, options.sampler or "ddim", options.steps, options.seed)
    film = spread(drawing.times_of(cfg, how), FRAMES)
    return how, Views(None, spread(film, COLUMNS), ROWS, film, FILMED, 2000)


def of_recipe(options: flags.Sample, cfg: TrainConfig) -> tuple[drawing.Plan, Views]:
    """Return what the source of a recipe shows.

    Raises ValueError if the flags name a sampler or a number of steps.
    """
    if options.sampler or options.steps:
        raise ValueError(
            f"the recipe {options.recipe!r} has its own sampler, in all steps: leave --sampler "
            "and --steps out"
        )
    recipe, every = RECIPES[options.recipe], cfg.timesteps
    n = recipe.images if options.n is None else options.n
    how = dataclasses.replace(
        drawing.plan(cfg, n, "ddpm", None, options.seed), variance=recipe.variance, clamp=False
    )
    strip = [t * every // 1000 for t in recipe.strip]  # the same shares of the way if T is not 1000
    film = plots.frame_times(every, recipe.frames) if recipe.frames else []
    return how, Views(
        recipe.columns, strip, n, film, recipe.filmed, MS * max(1, recipe.frames // 3)
    )


def spread(times: list[int], n: int) -> list[int]:
    """Return at most n of `times`, evenly spread, with the first and the last among them."""
    return [
        times[i]
        for i in torch.linspace(0, len(times) - 1, min(n, len(times))).round().long().tolist()
    ]


def write(folder: Path, x: Tensor, states: dict[int, Tensor], views: Views) -> list[str]:
    """Write the image files, and return their names.

    `grid.png` shows all images x, pixel by pixel. `strip.png` and `samples.gif` show the states
    {t: (N, C, H, W)}.
    """
    iio.imwrite(folder / "grid.png", plots.tile(x, views.columns))
    names = ["grid.png"]
    if views.strip:
        n = min(len(states[views.strip[0]]), views.rows)
        rows = {f"no. {i + 1}": torch.stack([states[t][i] for t in views.strip]) for i in range(n)}
        figure = plots.strip(rows, [f"t = {t}" if t >= 0 else "done" for t in views.strip])
        (folder / "strip.png").write_bytes(
            plots.show(figure, "Noise turns into images from left to right").data
        )
        names.append("strip.png")
    if views.film:
        frames = [states[t][: views.filmed] for t in views.film]
        plots.save_gif(folder / "samples.gif", frames, ms=MS, hold_ms=views.hold_ms, scale=2)
        names.append("samples.gif")
    return names
