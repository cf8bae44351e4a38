"""Drawings of lesson 03: the network, the two foldings, the parameters and the measurements."""

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .. import plots

GRAY, BLUE, GREEN, ORANGE = plots.REFERENCE, plots.DATA, plots.MODEL, plots.NOISE
HEIGHT, DROP = 1.8, 3.2  # of a box, and from one level to the next


def network(
    size: int,
    widths: tuple[int, ...],
    blocks: int,
    fold: int,
    attention_levels: tuple[int, ...],
) -> plots.Image:
    """The U-Net with one row per level, and one residual block from the inside."""
    rows = 1.9 * len(widths)
    fig, (top, bottom) = plots.figure(2, 1, width=9.0, height=2.2 + rows, height_ratios=(rows, 2.2))
    fig.get_layout_engine().set(hspace=0.12)
    parts = _parts(len(widths), blocks, attention_levels)
    _draw_unet(top, parts, len(widths), blocks)
    for level, width in enumerate(widths):
        side = size // fold // 2**level
        label = f"level {level}\n{width} channels\n{side} × {side} positions"
        mine = [x for x, (_, of) in enumerate(parts) if of == level]
        jumps = [(a + b) / 2 for a, b in zip(mine, mine[1:], strict=False) if b > a + 1]
        x, side_of_x = (jumps[0], "center") if jumps else (mine[0] - 1.4, "right")
        top.text(x, -DROP * level, label, ha=side_of_x, va="center", linespacing=1.5)
    _draw_block(bottom)
    top.set_title("The U-Net: every green block receives the time")
    bottom.set_title("A green block from the inside")
    return plots.show(
        fig,
        "Boxes for the parts of the U-Net at each level, with skip connections from the down "
        "blocks to the up blocks. Below, one residual block with its shortcut and its time input.",
    )


def _parts(levels: int, blocks: int, attention_levels) -> list[tuple[str, int]]:
    """Every part of the U-Net with its level, in the order of the forward pass."""
    down, up = [], []
    for level in range(levels):
        attention = [("attention", level)] * (level in attention_levels)
        down += [("stride 2", level)] * (level > 0) + [("down block", level)] * blocks + attention
        up = [("up block", level)] * blocks + [("upsample", level - 1)] * (level > 0) + up
    start, end = [("fold", 0), ("stem", 0)], [("output layer", 0), ("unfold", 0)]
    return [("noisy image", 0), *start, *down, *up, *end, ("prediction", 0)]


def _draw_unet(ax, parts: list[tuple[str, int]], levels: int, blocks: int) -> None:
    colors = {"down block": GREEN, "up block": GREEN, "attention": plots.EXTRA}
    colors |= {"noisy image": BLUE, "prediction": BLUE}
    waiting = []
    for x, (name, level) in enumerate(parts):
        y = -DROP * level
        _box(ax, x, y, 0.66, HEIGHT, name, colors.get(name, GRAY))
        if x > 0:
            before = -DROP * parts[x - 1][1]
            paths = {
                0: [(x - 0.67, y), (x - 0.33, y)],
                1: [(x - 0.67, before), (x, before), (x, y - HEIGHT / 2)],
                -1: [(x - 1, before - HEIGHT / 2), (x - 1, y), (x - 0.33, y)],
            }
            _arrow(ax, paths[(y > before) - (y < before)], GRAY)
        if name == "down block":
            waiting.append(x)
        if name == "up block":
            start, edge = waiting.pop(), y + HEIGHT / 2
            high = edge + 0.3 * (blocks - len(waiting) % blocks)
            path = [(start, edge), (start, high), (x, high), (x, edge)]
            _arrow(ax, path, ORANGE, "--")
    above = HEIGHT / 2 + 0.3 * blocks + 0.12
    middle = (len(parts) - 1) / 2
    ax.text(middle, above, "skip connections", ha="center", va="bottom", color=ORANGE)
    ax.set(xlim=(-0.5, len(parts) - 0.5), ylim=(-DROP * (levels - 1) - 1.0, above + 0.5))
    ax.axis("off")


def _draw_block(ax) -> None:
    names = ["x", "GroupNorm", "SiLU", "conv 3 × 3", "GroupNorm", "scale, shift", "SiLU"]
    names += ["conv 3 × 3\n(starts at 0)", "+", "output"]
    widths = [0.45, 1.45, 0.9, 1.45, 1.45, 1.6, 0.9, 1.6, 0.45, 1.1]
    x, middles = 0.0, []
    for name, width in zip(names, widths, strict=True):
        middles.append(x + width / 2)
        height = 1.1 if width > 0.5 else 0.5
        _box(ax, middles[-1], 0, width, height, name, GREEN if name == names[5] else GRAY)
        x += width + 0.4
        if name != "output":
            _arrow(ax, [(x - 0.4, 0), (x, 0)], GRAY)
    time, plus = middles[5], middles[8]
    _box(ax, time, -1.75, 3.9, 0.75, "time embedding → SiLU → Linear", GREEN)
    _arrow(ax, [(time, -1.375), (time, -0.55)], GREEN)
    _arrow(ax, [(middles[0], 0.25), (middles[0], 1.0), (plus, 1.0), (plus, 0.25)], ORANGE)
    words = "shortcut (with a 1 × 1 convolution if the number of channels changes)"
    ax.text((middles[0] + plus) / 2, 1.1, words, ha="center", va="bottom", color=ORANGE)
    ax.set(xlim=(-0.1, x - 0.3), ylim=(-2.2, 1.6))
    ax.axis("off")


def _box(ax, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(Rectangle(corner, width, height, facecolor=color, alpha=0.3))
    turn = 90 if height > 2 * width else 0
    ax.text(x, y, text, ha="center", va="center", rotation=turn, fontsize=9)


def _arrow(ax, points: list[tuple[float, float]], color: str, style: str = "-") -> None:
    ax.plot(*zip(*points, strict=True), style, color=color, linewidth=1.2)
    tip = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=tip)


def foldings(image: Tensor, folded: Tensor, reshaped: Tensor) -> plots.Image:
    """The image (1, 1, H, W) beside its two foldings (1, 4, H/2, W/2), in whole-number scaling."""
    side = folded.shape[-1]
    small = side * max(1, 112 // side)  # pixels a side of a channel in the figure
    large, gap, dpi = 2 * small, 14, plots.STYLE["savefig.dpi"]
    left, height = large + 110, large + 56
    width = left + 4 * small + 3 * gap
    matplotlib.rcParams.update(plots.STYLE)
    fig = Figure(figsize=(width / dpi, height / dpi), layout="none")

    def put(x: int, y: int, pixels: Tensor, side: int, title: str) -> None:
        ax = fig.add_axes((x / width, y / height, side / width, side / height))
        ax.imshow(pixels.cpu(), vmin=-1, vmax=1, interpolation="nearest")
        ax.axis("off")
        fig.text((x + side / 2) / width, (y + side + 6) / height, title, ha="center", fontsize=10)

    put(0, 16, image[0, 0], large, f"the image, {2 * side} × {2 * side}")
    for y, name, channels in ((small + 28, "fold_pixels", folded), (0, "reshape", reshaped)):
        fig.text((left - 12) / width, (y + small / 2) / height, name, ha="right", va="center")
        for i, pixels in enumerate(channels[0]):
            put(left + i * (small + gap), y, pixels, small, f"channel {i}")
    return plots.show(
        fig,
        "fold_pixels gives four small copies of the image; reshape gives four horizontal bands in "
        "which every second row is the other half of the row above it.",
    )


def parameters(counts: dict[str, tuple[int, int, int]]) -> plots.Image:
    """Bars of the parameters of each part: convolutions and norms, time, attention."""
    fig, ax = plots.figure(width=8.0, height=1.2 + 0.32 * len(counts))
    totals = {part: sum(values) for part, values in counts.items()}
    everything, longest = sum(totals.values()), max(totals.values())
    left = [0] * len(counts)
    kinds = (("convolutions and norms", BLUE), ("time", GREEN), ("attention", plots.EXTRA))
    for (kind, color), values in zip(kinds, zip(*counts.values(), strict=True), strict=True):
        label = f"{kind}: {sum(values) / everything:.0%} of all"
        ax.barh(list(counts), values, left=left, color=color, label=label)
        for row, value in enumerate(values):
            if value > 0.05 * longest:
                at, words = left[row] + value / 2, f"{value / 1000:.0f}"
                ax.text(at, row, words, ha="center", va="center", color="white", fontsize=9)
            left[row] += value
    for row, total in enumerate(totals.values()):
        words = f"{total / 1000:.0f}" if total > 9950 else f"{total / 1000:.1f}"
        ax.text(total + 0.01 * longest, row, words, va="center", fontsize=9, fontweight="bold")
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlim=(0, 1.08 * longest), xticks=[], xlabel="thousands of parameters (bold: total)")
    first, second = sorted(totals, key=totals.get, reverse=True)[:2]
    share = (totals[first] + totals[second]) / everything
    title = f"“{first}” and “{second}” hold {share:.0%} of the {everything:,} parameters"
    ax.set_title(title, loc="left")
    fig.legend(loc="outside lower center", ncols=3)
    return plots.show(
        fig, "Parameters of each part in the order of the forward pass; the way up is largest."
    )


def two_tests(
    blocks: list[str],
    steps: list[int],
    gradients: list[list[float]],
    changes: list[list[float]],
) -> plots.Image:
    """Two tables with a row per block and a column per number of training steps."""
    fig, axes = plots.figure(1, 2, width=9.4, height=1.2 + 0.3 * len(blocks), sharey=True)
    titles = (
        "Gradient norm at the block's time layer",
        "Output change, one block at a wrong timestep",
    )
    for ax, columns, title in zip(axes, (gradients, changes), titles, strict=True):
        table = torch.tensor(columns).T
        ax.imshow(table.clamp(min=1e-9).log10(), cmap="Blues", aspect="auto", vmin=-8, vmax=2)
        for row, values in enumerate(table.tolist()):
            for column, value in enumerate(values):
                words = f"{value:.0e}".replace("e-0", "e-") if value > 0 else "0"
                ax.text(column, row, words, ha="center", va="center", fontsize=9)
        ax.set(xticks=range(len(steps)), xticklabels=steps, xlabel="training steps", title=title)
        ax.set(yticks=range(len(blocks)), yticklabels=blocks)
        ax.axvline(1.5, color=ORANGE)
        ax.grid(False)
    return plots.show(
        fig, "Both tables: exact zeros after 0 and 1 steps, nonzero in every block from 2 steps on."
    )


def views(rows: list[dict]) -> plots.Image | None:
    """Bars with the range over the seeds for the share of the gradient that lies far away."""
    if not rows:
        return None
    networks = list(dict.fromkeys(row["network"] for row in rows))
    kinds = list(dict.fromkeys(row["norms"] for row in rows))
    fig, axes = plots.figure(1, len(kinds), width=9.0, height=2.5, sharex=True, sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        for y, name in enumerate(networks):
            shares = [100 * r["share"] for r in rows if (r["network"], r["norms"]) == (name, kind)]
            low, high = min(shares), max(shares)
            ax.barh(y, sum(shares) / len(shares), color=GREEN, height=0.6)
            ax.text(high + 0.6, y, f"{low:.1f} … {high:.1f} %", va="center", fontsize=9)
        ax.set(xlim=(0, 33), yticks=range(len(networks)), yticklabels=networks)
        ax.set(title=f"norms: {kind}", xlabel="share far away (%)")
    axes[0].invert_yaxis()
    return plots.show(
        fig, "The coarse level nearly doubles the share; without normalizations it is below 1 %."
    )


def errors(
    levels: tuple[float, ...],
    error: dict[tuple[str, int], Tensor],
    ratio: dict[tuple[str, int], Tensor],
    live: list[dict],
) -> plots.Image:
    """The error at each noise level, and as a multiple of the error of the network as built."""
    colors = {"as built": GREEN, "skips zeroed": ORANGE, "no attention": plots.EXTRA}
    fig, (left, middle, right) = plots.figure(1, 3, width=9.6, height=3.4, sharex=True)
    for (name, seed), values in error.items():
        left.plot(levels, values, ".-", color=colors[name])
        if name == "skips zeroed":
            middle.plot(levels, ratio[name, seed], ".-", color=colors[name])
        if name == "no attention":
            right.plot(levels, 100 * (ratio[name, seed] - 1), ".-", color=colors[name])
    for row in live:
        left.plot(levels, row["error"], "k+", zorder=3)
    left.text(0.45, 0.33, "skips zeroed", color=ORANGE)
    left.text(0.05, 0.07, "as built and\nno attention", color=GREEN)
    left.text(0.42, 0.66, "+ this run", color="black")
    left.set(title="Mean squared error", ylim=(0, None))
    middle.set(title="Skips zeroed: error ÷ as built", yscale="log", ylim=(0.9, 16))
    middle.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    middle.minorticks_off()
    middle.axhline(1, color=GRAY, linestyle="--")
    right.axhline(0, color=GRAY, linestyle="--")
    right.set_title("No attention: change in %, by seed")
    for ax in (left, middle, right):
        ax.set(xlabel="noise level", xticks=[0, 0.25, 0.5, 0.75, 1], xlim=(0, 1.04))
    return plots.show(
        fig,
        "Error against noise level: zeroed skips raise it everywhere, most at high noise; "
        "removing the attention changes it by a few percent at most.",
    )
