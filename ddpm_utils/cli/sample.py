"""`sample`: pictures from trained weights, as a grid, as a strip that shows how they come about, and as a GIF."""

import argparse
from pathlib import Path

import imageio.v3 as iio
import torch
from torch import Tensor

from .. import plots, runtime
from . import drawing

ROWS, COLUMNS = 6, 10  # of the strip, at most
FRAMES, FILMED = 60, 64  # of the GIF: frames and pictures, at most


def run(options: argparse.Namespace) -> int:
    """Draw, and write three files. Raises FileNotFoundError and ValueError before anything is drawn or written."""
    device = runtime.pick_device(options.device)
    model, cfg = drawing.load_weights(options.weights, device)
    how = drawing.plan(cfg, options.n, options.sampler, options.steps, options.seed)
    folder = options.out or runtime.output_dir("samples") / Path(options.weights).resolve().stem
    folder.mkdir(parents=True, exist_ok=True)
    times = drawing.times_of(cfg, how)
    x, kept = drawing.draw(model, cfg, how, device, times[:-1] if len(times) <= FRAMES else spread(times, FRAMES))
    kept[-1] = x[: len(next(iter(kept.values())))]
    write(folder, x, kept)
    print(f"{options.weights}: {how}")
    print(f"wrote grid.png, strip.png and samples.gif to {folder}")
    return 0


def spread(times: list[int], n: int) -> list[int]:
    """At most n of `times`, evenly spread, the first and the last among them."""
    return [times[i] for i in torch.linspace(0, len(times) - 1, min(n, len(times))).round().long().tolist()]


def write(folder: Path, x: Tensor, states: dict[int, Tensor]) -> None:
    """`grid.png` of all pictures x, pixel by pixel; `strip.png` and `samples.gif` of states {t: (N, C, H, W)}, −1 the last."""
    iio.imwrite(folder / "grid.png", plots.tile(x))
    times = sorted(states, reverse=True)
    columns = spread(times, COLUMNS)
    rows = {f"no. {i + 1}": torch.stack([states[t][i] for t in columns]) for i in range(min(len(states[-1]), ROWS))}
    figure = plots.strip(rows, [f"t = {t}" if t >= 0 else "done" for t in columns])
    (folder / "strip.png").write_bytes(plots.show(figure, "Noise turns into pictures from left to right").data)
    frames = [states[t][:FILMED] for t in times]
    plots.save_gif(folder / "samples.gif", frames, ms=80, hold_ms=2000, scale=2)
