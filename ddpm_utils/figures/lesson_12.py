"""Drawings of lesson 12: five U-Nets side by side."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from torch import Tensor

from .. import plots
from ..data import to_model_range

COLORS = {
    "ours": plots.MODEL,
    "article": plots.DATA,
    "guide*": plots.NOISE,
    "anime": plots.EXTRA,
    "mnist32": plots.REFERENCE,
}


@dataclass(frozen=True)
class Box:
    """A part of a network as a box: its output, and whether it gets the time and has attention."""

    name: str
    channels: int
    side: int
    timed: bool
    attends: bool


def _draw_box(ax, box: Box, x: float, y: float) -> None:
    color = plots.MODEL if box.timed else plots.REFERENCE
    edge = plots.EXTRA if box.attends else "white"
    rectangle = Rectangle((x - 0.46, y - 0.36), 0.92, 0.72, facecolor="white", edgecolor=edge)
    rectangle.set_linewidth(2.5 if box.attends else 0.5)
    ax.add_patch(rectangle)
    ax.add_patch(Rectangle((x - 0.44, y - 0.34), 0.88, 0.68, facecolor=color, alpha=0.35))
    name = box.name.replace("bottleneck", "bottle-\nneck")
    words = f"{name}\n{box.channels}"
    ax.text(x, y, words, ha="center", va="center", fontsize=8, linespacing=1.0)


def _draw_network(ax, boxes: list[Box], skips: dict[str, str]) -> None:
    sides = sorted({box.side for box in boxes}, reverse=True)
    places = {box.name: (i, -1.0 * sides.index(box.side)) for i, box in enumerate(boxes)}
    # the path through the network
    points = list(places.values())
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        ax.plot([x0, x1], [y0, y1], color=plots.REFERENCE, linewidth=1.0, zorder=0)
    for box in boxes:
        _draw_box(ax, box, *places[box.name])
    # the skips, each above its row
    for source, target in skips.items():
        (x0, y), (x1, y1) = places[source], places[target]
        high = max(y, y1) + 0.5
        ax.plot([x0, x0, x1], [y + 0.36, high, high], "--", color=plots.NOISE, linewidth=1.3)
        tip = {"arrowstyle": "-|>", "color": plots.NOISE, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (x1, y1 + 0.36), (x1, high), arrowprops=tip)
    ax.set(ylim=(0.55 - len(sides), 0.62), yticks=[-i for i in range(len(sides))], xticks=[])
    ax.set_yticklabels([f"{side} × {side}" for side in sides], fontsize=8)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def networks(
    boxes: dict[str, list[Box]], skips: dict[str, dict[str, str]], parameters: dict[str, int]
) -> plots.Image:
    """Draw each network as boxes, one row per resolution, with its skips as dashed arrows."""
    heights = [len({box.side for box in of_net}) for of_net in boxes.values()]
    size = {"width": 9.4, "height": 0.6 * sum(heights) + 0.4 * len(boxes) + 0.4}
    fig, axes = plots.figure(len(boxes), 1, height_ratios=heights, **size)
    longest = max(len(of_net) for of_net in boxes.values())
    for ax, (name, of_net) in zip(axes, boxes.items(), strict=True):
        _draw_network(ax, of_net, skips[name])
        ax.set_xlim(-0.6, longest - 0.4)
        ax.set_title(f"{name}: {parameters[name]:,} parameters", loc="left", fontsize=10)
    signs = [
        Patch(facecolor=plots.MODEL, alpha=0.35, label="gets the time"),
        Patch(facecolor=plots.REFERENCE, alpha=0.35, label="does not"),
        Patch(facecolor="white", edgecolor=plots.EXTRA, linewidth=2.5, label="has attention"),
        Line2D([], [], color=plots.NOISE, linestyle="--", label="skip"),
    ]
    axes[0].legend(handles=signs, loc="center right", fontsize=9)
    alt = "Five U-Nets as boxes in rows of equal resolution, with dashed arrows for the skips."
    return plots.show(fig, alt)


def costs(
    parameters: dict[str, int],
    convolutions: dict[str, float],
    products: dict[str, float],
    speed: dict[str, float],
) -> plots.Image:
    """Three panels on log axes: parameters, multiply-adds per image, and training speed."""
    fig, axes = plots.figure(1, 3, width=9.4, height=2.9, sharey=True)
    names = list(parameters)
    for y, name in enumerate(names):
        color = COLORS[name]
        axes[0].plot(parameters[name], y, "o", color=color)
        axes[1].plot(convolutions[name], y, "o", color=color)
        axes[1].plot(products[name], y, "D", color=color, markerfacecolor="white")
        axes[2].plot(speed[name], y, "o", color=color)
    marks = [
        Line2D([], [], color="black", marker="o", linestyle="", label="convolutions"),
        Line2D([], [], color="black", marker="D", linestyle="", markerfacecolor="white"),
    ]
    marks[1].set_label("matrix products")
    axes[1].legend(handles=marks, loc="lower left", fontsize=8)
    axes[0].set(title="parameters", yticks=range(len(names)), yticklabels=names)
    axes[1].set(title="multiply-adds for one image", xlim=(1e5, 1e10))
    axes[2].set(title="images per second in training")
    axes[0].set(xlim=(3e5, 1e8))
    for ax in axes:
        ax.set_xscale("log")
        ax.margins(y=0.12)
    axes[2].set_xlim(0.5 * min(speed.values()), 2 * max(speed.values()))
    axes[0].invert_yaxis()
    alt = "Parameters, multiply-adds and training speed of five networks, on logarithmic axes."
    return plots.show(fig, alt)


def by_part(
    values: dict[str, dict[str, list[float]]],
    label: str,
    limits: tuple[float, float],
    alt: str,
    mark: tuple[str, str] | None = None,
) -> plots.Image:
    """Dots for the parts of each network, one per seed, in panels with one logarithmic axis.

    `mark` is (network, part): this part gets an arrow.
    """
    fig, axes = plots.figure(1, len(values), width=9.8, height=3.5)
    for ax, (name, parts) in zip(axes, values.items(), strict=True):
        for y, of_part in enumerate(parts.values()):
            ax.plot(of_part, [y] * len(of_part), "o", color=COLORS[name], markersize=4.5, alpha=0.7)
        ax.set(xscale="log", xlim=limits, title=name, ylim=(len(parts) - 0.5, -0.5))
        ax.set_yticks(range(len(parts)), list(parts), fontsize=8)
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.minorticks_off()
        ax.tick_params(axis="x", labelsize=8)
        if mark and mark[0] == name:
            y = list(parts).index(mark[1])
            tip = {"arrowstyle": "-|>", "color": "black"}
            place = (3 * max(parts[mark[1]]), y)
            ax.annotate("", place, (300 * place[0], y), arrowprops=tip)
    fig.supxlabel(label, fontsize=9)
    return plots.show(fig, alt)


def views(maps: dict[str, dict[str, Tensor]]) -> plots.Image:
    """Maps of the gradient, one column per network and one row per variant."""
    rows = list(next(iter(maps.values())))
    fig, axes = plots.figure(len(rows), len(maps), width=9.4, height=1.95 * len(rows))
    for column, (name, of_net) in zip(axes.T, maps.items(), strict=True):
        for ax, seen in zip(column, of_net.values(), strict=True):
            light = (seen / seen.max()).clamp(min=1e-9).log10()
            image = ax.imshow(light, cmap="viridis", vmin=-5, vmax=0)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        column[0].set_title(f"{name}, {len(seen)} × {len(seen)}", fontsize=10)
    for ax, row in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(row)
    fig.colorbar(image, ax=axes, label="log₁₀ of the gradient (peak = 0)", shrink=0.8)
    alt = "Where one output pixel looks in five networks, as published and by convolutions only."
    return plots.show(fig, alt)


def shares(values: dict[str, dict[str, list[float]]]) -> plots.Image:
    """Dots for variants of each network, one per seed, in percent on a logarithmic axis."""
    fig, axes = plots.figure(1, len(values), width=9.4, height=2.4, sharey=True)
    for ax, (name, variants) in zip(axes, values.items(), strict=True):
        for y, of_variant in enumerate(variants.values()):
            percent = [100 * value for value in of_variant]
            ax.plot(percent, [y] * len(percent), "o", color=COLORS[name], markersize=5, alpha=0.7)
        ax.set(xscale="log", xlim=(0.002, 110), title=name, ylim=(len(variants) - 0.5, -0.5))
        ax.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"], fontsize=8)
        ax.minorticks_off()
    axes[0].set_yticks(range(len(variants)), list(variants))
    fig.supxlabel("percent of the gradient from more than 10 pixels away", fontsize=9)
    alt = "Share of the far view in five networks, as published and with parts taken out."
    return plots.show(fig, alt)


def distances(curves: dict[str, Tensor]) -> plots.Image:
    """Distance of two embeddings against the difference of their times, from 1 on.

    A dot is a mean over one of forty bins of equal width on the logarithmic axis.
    """
    styles = ("-", "-", "--", "-", ":", "-.")
    colors = (plots.MODEL, plots.DATA, plots.DATA, plots.REFERENCE, "black", "black")
    fig, ax = plots.figure(width=8.6, height=3.3)
    for (name, curve), style, color in zip(curves.items(), styles, colors, strict=False):
        steps = np.arange(1, len(curve) + 1)
        bins = np.floor(40 * np.log(steps) / np.log(steps[-1] + 1)).astype(int)
        kept = [bins == i for i in np.unique(bins)]
        x = [steps[of_bin].mean() for of_bin in kept]
        y = [curve.numpy()[of_bin].mean() for of_bin in kept]
        ax.plot(x, y, style, color=color, linewidth=1.6, label=name)
    ax.set(xscale="log", ylim=(0, 1.4), xlabel="difference of the two times, in steps")
    ax.set(ylabel="distance / √columns", title="How far apart two times are in the embedding")
    ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    alt = "Distances of embeddings: they grow with the difference for most, and level off early "
    return plots.show(fig, alt + "for the first 64 columns of mnist32.")


def _smooth(history: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, steps and moving mean of the loss, over a twentieth of the steps."""
    seconds, losses = np.array(history).T
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    return seconds[window - 1 :], np.arange(window, len(losses) + 1), mean


def _draw_race(ax, histories: dict[str, list], by_step: bool) -> None:
    for name, runs in histories.items():
        for i, history in enumerate(runs):
            seconds, steps, loss = _smooth(history)
            along = steps if by_step else seconds
            style = ".-" if len(history) < 60 else "-"
            label = {"label": name} if i == 0 else {}
            ax.plot(along, loss, style, color=COLORS[name], linewidth=1.2, alpha=0.8, **label)
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    heights = [h for h in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if low <= h <= high]
    ax.set_yticks(heights, [f"{h:g}" for h in heights])
    ax.minorticks_off()


def race(histories: dict[str, list]) -> plots.Image:
    """The loss of every run against the seconds and against the steps, in two panels."""
    fig, axes = plots.figure(1, 2, width=9.4, height=3.4, sharey=True)
    _draw_race(axes[0], histories, by_step=False)
    _draw_race(axes[1], histories, by_step=True)
    axes[0].set(xlabel="seconds of training", title="by the clock")
    axes[0].set(ylabel="mean squared error of the noise")
    axes[1].set(xlabel="training steps", title="by the step")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    alt = "Loss of five networks, three seeds each, against seconds and against steps."
    return plots.show(fig, alt)


def opening(histories: dict[str, list], images: dict[str, Tensor], title: str) -> plots.Image:
    """The first screen: the race by the clock beside rows of images, uint8 (N, 1, H, W)."""
    fig, axes = plots.figure(1, 2, width=10.4, height=3.3, width_ratios=(1, 1.35))
    _draw_race(axes[0], histories, by_step=False)
    axes[0].set(xlabel="seconds of training", ylabel="error of the predicted noise")
    axes[0].set_title("Trained on a few images", loc="left")
    axes[0].legend(fontsize=8, loc="lower left")
    columns = min(len(of_net) for of_net in images.values())
    rows = torch.cat([to_model_range(of_net[:columns]) for of_net in images.values()])
    pixels = plots.tile(rows, columns=columns)
    axes[1].imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    height = pixels.shape[0] / len(images)
    axes[1].set(xticks=[], yticks=[(i + 0.5) * height for i in range(len(images))])
    axes[1].set_yticklabels(list(images))
    axes[1].tick_params(length=0)
    axes[1].grid(False)
    axes[1].spines[:].set_visible(False)
    axes[1].set_title(title, loc="left")
    alt = "Left: loss of five networks against seconds of training. Right: images that some of "
    return plots.show(fig, alt + "them draw after ten minutes.")


def paths(counts: dict[str, Tensor]) -> plots.Image:
    """Maps of path counts, each with its numbers or, if it is large, with a color bar."""
    fig, axes = plots.figure(1, len(counts), width=8.0, height=3.3)
    for ax, (title, numbers) in zip(axes, counts.items(), strict=True):
        image = ax.imshow(numbers, cmap="Blues", vmin=0)
        ax.set(title=title, xticks=[], yticks=[])
        ax.grid(False)
        size = 9 if len(numbers) < 10 else 6.5
        for (row, column), number in np.ndenumerate(numbers.numpy()):
            color = "white" if number > 0.6 * image.get_clim()[1] else "black"
            words = f"{number:.0f}"
            ax.text(column, row, words, ha="center", va="center", fontsize=size, color=color)
    alt = "Numbers of paths from each position to the coarser level: fewest at the border."
    return plots.show(fig, alt)
