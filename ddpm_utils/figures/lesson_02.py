"""Drawings of lesson 02: time embeddings."""

import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .. import plots

DPI = plots.STYLE["figure.dpi"]
HANDS = plots.NOISE, plots.EXTRA, plots.MODEL, plots.DATA


def one_pixel(x: Tensor, told: dict[int, Tensor], blind: Tensor, mark: float) -> Figure:
    """The best guess of the noise against the observed value, told t and not told t."""
    at = int((x - mark).abs().argmin())
    fig, ax = plots.figure(width=8.0, height=3.8)
    ax.plot(x, blind, color="black", linewidth=4)
    ax.axvline(mark, color="black", linewidth=0.8)
    shades = plots.EXTRA, plots.DATA, plots.MODEL, plots.NOISE
    lines = [(blind[at].item(), "not told t", "black")]
    for (step, curve), color in zip(told.items(), shades, strict=True):
        ax.plot(x, curve, color=color)
        ax.plot(mark, curve[at], "o", color=color)
        lines.append((curve[at].item(), f"told t = {step}", color))
    # the labels, from the highest guess to the lowest
    beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    ax.annotate(f"guess at $x_t$ = {mark:g}", (1, 1.6), (10, 0), **beside)
    for row, (guess, text, color) in enumerate(sorted(lines, key=lambda line: -line[0])):
        text = f"{text}: {guess:+.1f}".replace("-", "−")
        ax.annotate(text, (1, 0.95 - 0.6 * row), (10, 0), color=color, weight="bold", **beside)
    ax.set(xlim=(-2, 2), ylim=(-3.5, 3.5))
    ax.set_xticks([-2, -1, 0, mark, 1, 2], ["−2", "−1", "0", f"{mark:g}", "1", "2"])
    ax.set(xlabel="observed value $x_t$", ylabel="best guess of the noise ε")
    ax.set_title("One observed value, a different best guess at each timestep")
    return fig


def clock(t: Tensor, speeds: Tensor) -> Figure:
    """A dial for each timestep, four hands on it, and the sine and cosine of each hand."""
    fig, axes = plots.figure(1, len(t), width=8.0, height=3.0)
    rim = torch.linspace(0, 2 * math.pi, 100)
    for ax, step in zip(axes, t.tolist(), strict=True):
        ax.plot(rim.sin(), rim.cos(), color=plots.REFERENCE, linewidth=1)
        for i, (speed, color) in enumerate(zip(speeds.tolist(), HANDS, strict=True)):
            sine, cosine = math.sin(step * speed), math.cos(step * speed)
            look = {"color": color, "lw": 2 + 2.5 * i, "zorder": 5 - i, "solid_capstyle": "butt"}
            ax.plot([0, sine], [0, cosine], label=f"hand {i}: {speed:g} rad/step", **look)
            for y, value in ((-1.4, sine), (-1.75, cosine)):
                number = f"{value:.2f}".replace("-", "−")
                ax.text(-1.05 + 0.7 * i, y, number, color=color, ha="center", fontsize=9)
        ax.set(title=f"t = {step}", xlim=(-1.35, 1.35), ylim=(-1.9, 1.1), aspect="equal")
        ax.axis("off")
    axes[0].text(-1.85, -1.4, "sin")
    axes[0].text(-1.85, -1.75, "cos")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(speeds), columnspacing=1.5)
    return fig


def _pixel_axes(ax, left: int, bottom: int, width: int, height: int) -> None:
    """Put an axes at whole pixels of its figure."""
    fig = ax.figure
    fig.set_layout_engine("none")
    across, up = fig.get_size_inches() * DPI
    ax.set_position([left / across, bottom / up, width / across, height / up])


def heat_map(emb: Tensor, n_steps: int = 60, columns: tuple[int, ...] = ()) -> Figure:
    """The first steps of an embedding, each value a block of whole pixels; some columns in full."""
    dim = emb.shape[1]
    tall = dim * max(1, 256 // dim)
    fig, (left, right) = plots.figure(1, 2, width=8.0, height=(tall + 84) / DPI)
    _pixel_axes(left, 55, 48, 4 * n_steps, tall)
    _pixel_axes(right, 425, 48, 200, tall)
    look = {"aspect": "auto", "cmap": "RdBu_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
    heat = left.imshow(emb[:n_steps].T, **look)
    left.axhline(dim / 2 - 0.5, color="black", linewidth=0.8)
    left.text(n_steps - 2, dim * 0.485, "sines", ha="right", va="bottom")
    left.text(n_steps - 2, dim * 0.985, "cosines", ha="right", va="bottom", color="white")
    left.grid(False)
    left.set(xlabel="timestep t", ylabel="column of e(t)", yticks=range(0, dim, dim // 4))
    left.set_title(f"e(t) in the first {n_steps} steps")
    # the colors, in a bar from −1 to 1
    bar = fig.add_axes([0, 0, 1, 1])
    _pixel_axes(bar, 55 + 4 * n_steps + 12, 48, 10, tall)
    fig.colorbar(heat, cax=bar, ticks=[-1, 0, 1])
    # three columns over the whole process
    for i, color in zip(columns, (plots.NOISE, plots.MODEL, plots.DATA), strict=True):
        left.plot([-0.5, n_steps - 0.5], [i, i], ":", color=color)
        left.text(1, i - 1, f"column {i}", color=color, fontsize=9, va="bottom")
        right.plot(emb[:, i], color=color)
        right.annotate(
            f"column {i}", (len(emb), emb[-1, i]), (6, 0), textcoords="offset points", color=color
        )
    right.set(xlabel="timestep t", ylabel="$\\sin(w_i t)$", xlim=(0, len(emb)), ylim=(-1.1, 1.1))
    right.set_yticks([-1, 0, 1])
    right.set_title(f"three sines over all {len(emb)} steps")
    return fig


def similarity(dots: Tensor, shown: tuple[int, ...], n_steps: int = 80) -> Figure:
    """A corner of the matrix of dot products, and three of its rows against the gap."""
    tall = 3 * n_steps
    fig, (left, right) = plots.figure(1, 2, width=8.0, height=(tall + 84) / DPI)
    _pixel_axes(left, 55, 48, tall, tall)
    _pixel_axes(right, 425, 48, 280, tall)
    heat = left.imshow(dots[:n_steps, :n_steps], cmap="viridis", interpolation="nearest")
    left.set(xlabel="timestep s", ylabel="timestep t")
    left.set_title(f"e(t) · e(s), first {n_steps} steps")
    left.grid(False)
    bar = fig.add_axes([0, 0, 1, 1])
    _pixel_axes(bar, 55 + tall + 12, 48, 10, tall)
    fig.colorbar(heat, cax=bar)
    # rows of the whole matrix, the first the thickest
    looks = (plots.DATA, 6), (plots.NOISE, 3.5), ("black", 1)
    for step, (color, thick) in zip(shown, looks, strict=True):
        gaps, order = (torch.arange(len(dots)) - step).abs().sort()
        row = dots[step][order]
        right.plot(gaps[1:], row[1:], color=color, linewidth=thick, label=f"t = {step}")
    right.set(xscale="log", xlim=(1, len(dots)), xlabel="gap |t − s|, steps", ylabel="e(t) · e(s)")
    right.set_title("three rows of the full matrix")
    right.legend()
    return fig


def block_diagram(dim: int, width: int) -> Figure:
    """How a block of the network uses the time embedding, with the shapes of the lesson."""
    arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0}
    time = ["t\n(B,)", "sinusoid\ne(t)", "Linear", "SiLU", "Linear", f"emb(t)\n(B, {dim})"]
    change = ["SiLU", "Linear", f"scale, shift\n(B, {width}) each"]
    main = ["h\n(B, C, H, W)", "· (1 + scale)\n+ shift", "SiLU", "conv", "+", "h′"]
    fig, ax = plots.figure(width=8.0, height=3.9)
    for low, high, color, name in (
        (2.9, 4.2, plots.DATA, "TimeEmbedding: once per call"),
        (-0.4, 2.6, plots.MODEL, f"block: C = {width} channels"),
    ):
        ax.add_patch(Rectangle((1.1, low), 5.35, high - low, facecolor="#F4F4F4", edgecolor=color))
        ax.text(1.2, high - 0.29, name, color=color)
    # the second row runs from right to left
    for y, start, way, texts in ((3.4, 0, 1, time), (1.8, 3, -1, change), (0.5, 0, 1, main)):
        for i, text in enumerate(texts):
            x = 0.4 + 1.35 * (start + way * i)
            box = Rectangle((x - 0.53, y - 0.34), 1.06, 0.68, facecolor="white", edgecolor="black")
            ax.add_patch(box)
            ax.text(x, y, text, ha="center", va="center", fontsize=9)
            if i > 0:
                ax.annotate("", (x - 0.53 * way, y), (x - 0.82 * way, y), arrowprops=arrow)
    ax.annotate("", (4.98, 1.8), (7.15, 3.06), arrowprops=arrow | {"connectionstyle": "angle"})
    ax.annotate("", (1.75, 0.84), (1.75, 1.46), arrowprops=arrow)
    ax.plot([0.4, 0.4, 5.8], [0.16, -0.2, -0.2], color="black", linewidth=1)
    ax.annotate("", (5.8, 0.16), (5.8, -0.2), arrowprops=arrow)
    ax.text(3.1, -0.14, "skip: h unchanged", ha="center", fontsize=9)
    ax.set_title("The time embedding scales and shifts the channels of a block")
    ax.axis("off")
    return fig


def losses_by_part(with_t: Tensor, without_t: Tensor, timesteps: int) -> Figure:
    """The loss in equal parts of the process; the ratio of the two is written above each pair."""
    centers = (torch.arange(len(with_t)) + 0.5) * timesteps / len(with_t)
    ratios = without_t / with_t
    fig, ax = plots.figure(width=7.2, height=3.5)
    ax.plot(centers, without_t, "s-", color=plots.NOISE)
    ax.plot(centers, with_t, "o-", color=plots.MODEL)
    for x, y, ratio in zip(centers.tolist(), without_t.tolist(), ratios.tolist(), strict=True):
        ax.annotate(f"× {ratio:.1f}", (x, y), (0, 9), textcoords="offset points", ha="center")
    label = {"textcoords": "offset points", "va": "center"}
    ax.annotate("without t", (centers[-1], without_t[-1]), (10, 0), color=plots.NOISE, **label)
    ax.annotate("with t", (centers[-1], with_t[-1]), (10, 0), color=plots.MODEL, **label)
    ax.set(xlabel="timestep t", ylabel="loss", yscale="log", xlim=(0, 1.1 * timesteps))
    ax.set_xticks([timesteps * fifth // 5 for fifth in range(6)])
    low, high = min(with_t.min(), without_t.min()), max(with_t.max(), without_t.max())
    ax.set_ylim(low.item() / 2, high.item() * 2)
    ax.set_title("Not knowing t multiplies the loss most at the end of the process")
    return fig


def added_by_size(sizes: list[int], added: list[float], network: float) -> Figure:
    """What not knowing t adds for images of more and more pixels, and for the trained network."""
    fig, ax = plots.figure(width=7.2, height=3.4)
    ax.plot(sizes, added, "o-", color=plots.MODEL)
    for size, percent in zip(sizes, added, strict=True):
        ax.annotate(f"{percent:.0f} %", (size, percent), (6, 5), textcoords="offset points")
    ax.plot(sizes[-1], network, "s", color=plots.NOISE)
    ax.annotate(
        f"network of section 5,\nFashion-MNIST: {network:.0f} %",
        (sizes[-1], network),
        (12, 8),
        textcoords="offset points",
        color=plots.NOISE,
        ha="right",
        va="bottom",
    )
    middle = len(sizes) // 2
    ax.annotate(
        "exact, pixels of ±1",
        (sizes[middle], added[middle]),
        (-14, -24),
        color=plots.MODEL,
        textcoords="offset points",
        ha="right",
    )
    ax.set(xscale="log", yscale="log", xlabel="pixels in the image", ylabel="added loss, percent")
    ax.set(xlim=(0.85, 300), ylim=(4, 250))
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_yticks([5, 10, 50, 100], ["5", "10", "50", "100"])
    ax.minorticks_off()
    ax.set_title("The more pixels, the less it costs not to know t")
    return fig


def probes(t: Tensor, estimates: dict[str, Tensor], true_std: Tensor) -> Figure:
    """Noise levels that linear probes read off the features, beside the true ones."""
    fig, axes = plots.figure(1, len(estimates), width=8.0, height=3.2, sharex=True, sharey=True)
    for ax, (name, estimate) in zip(axes, estimates.items(), strict=True):
        ax.plot(t, estimate, ".", color=plots.NOISE, markersize=3)
        ax.plot(t, true_std, color="black", linewidth=1.5)
        ax.set(xlabel="timestep t", title=name)
    end, height = t[-1].item(), true_std[-1].item()
    axes[0].text(end, 0.25, "dots: estimates of σ", color=plots.NOISE, ha="right")
    axes[0].text(end, 0.10, "line: true σ", ha="right")
    axes[0].set(ylabel="σ", ylim=(-0.1, max(1.3, 1.3 * height)))
    return fig


def embedding_losses(losses: dict[str, list[float]], source: str) -> Figure:
    """A row of marks for each embedding, one for each seed, and their mean as a bar."""
    fig, ax = plots.figure(width=7.2, height=0.42 * len(losses) + 1.0)
    for y, values in enumerate(losses.values()):
        mean = sum(values) / len(values)
        for seed, (value, mark) in enumerate(zip(values, "os^", strict=False)):
            named = {"label": f"seed {seed}"} if y == 0 else {}
            ax.plot(value, y, mark, color=plots.DATA, markersize=6, alpha=0.7, **named)
        ax.plot([mean, mean], [y - 0.3, y + 0.3], color="black", linewidth=2.5)
    ax.set_yticks(range(len(losses)), list(losses))
    ax.set(ylim=(len(losses) - 0.5, -0.6), xlabel="loss on held-out images")
    ax.legend(loc="upper right")
    ax.set_title(f"{source}: one mark a seed, bar: mean (the axis does not start at 0)")
    return fig


def distances(gaps: Tensor, curves: dict[str, Tensor]) -> Figure:
    """The distance of two embeddings against their gap; each curve is named in the axes."""
    shades = plots.REFERENCE, plots.NOISE, plots.MODEL, plots.EXTRA
    fig, ax = plots.figure(width=7.2, height=3.7)
    for (name, curve), color in zip(curves.items(), shades, strict=True):
        ax.plot(gaps, curve, color=color)
        at, shift, side = (2, (0, 8), "bottom") if color == plots.NOISE else (7, (4, -8), "top")
        ax.annotate(
            name, (gaps[at], curve[at]), shift, textcoords="offset points", color=color, va=side
        )
    ax.set(xscale="log", yscale="log", ylim=(1e-3, 60), xlabel="gap |t − s|, steps")
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000) if tick <= len(gaps)]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(ylabel="distance of e(t) and e(s)")
    ax.set_title("Fast hands only: the distance stops growing after a few steps")
    return fig
