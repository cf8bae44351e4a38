"""Figures of lesson 06, Fast sampling."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .. import plots
from ..schedules import NoiseSchedule

DPI = plots.STYLE["savefig.dpi"]
SPACINGS = {"uniform": plots.DATA, "quadratic": plots.NOISE, "log_snr": plots.MODEL}
COLORS = {
    "DDIM": plots.DATA,
    "DDIM, η = 1": plots.NOISE,
    "DPM-Solver++ 2M": plots.MODEL,
    "SDE-DPM-Solver++ 2M": plots.EXTRA,
}
MARKERS = {"DDIM": "o", "DDIM, η = 1": "s", "DPM-Solver++ 2M": "^", "SDE-DPM-Solver++ 2M": "D"}


def rows_of_images(
    rows: dict[str, Tensor], alt: str, titles: Sequence[str] = (), side: int = 84
) -> plots.Image:
    """Rows of images with labels on the left; an image pixel is a square of screen pixels.

    `rows` is {label: (K, C, H, W)} in model range, `titles` names the columns, and an image is at
    most `side` screen pixels wide.
    """
    grids = [plots.tile(images, columns=len(images)) for images in rows.values()]
    columns, image = len(next(iter(rows.values()))), next(iter(rows.values())).shape[-1]
    scale = max(1, side // image)
    height, width = (scale * size for size in grids[0].shape[:2])
    left = 20 + 7 * max(len(line) for name in rows for line in name.split("\n"))
    top = 24 if titles else 4
    fig, ax = _canvas(left + width + 4, top + (height + 6) * len(grids))
    for i, (label, grid) in enumerate(zip(rows, grids, strict=True)):
        y = top + i * (height + 6)
        extent = (left, left + width, y + height, y)
        ax.imshow(grid, vmin=0, vmax=255, interpolation="nearest", aspect="auto", extent=extent)
        ax.text(left - 8, y + height / 2, label, ha="right", va="center", linespacing=1.3)
    for i, text in enumerate(titles):
        pitch = (width + 2 * scale) / columns
        ax.text(left + i * pitch + scale * image / 2, top - 6, text, ha="center", fontsize=9)
    return plots.show(fig, alt)


def times(schedule: NoiseSchedule, chosen: dict[str, list[int]]) -> plots.Image:
    """The times of each spacing, left on the axis of t and right on that of √(1 − ᾱ) / √ᾱ."""
    ratio = schedule.snr().rsqrt()
    fig, (left, right) = plots.figure(1, 2, width=8.6, height=2.3, sharey=True)
    for row, (name, of_name) in enumerate(chosen.items()):
        left.plot(of_name, [-row] * len(of_name), "o", color=SPACINGS[name], ms=5)
        right.semilogx(ratio[of_name], [-row] * len(of_name), "o", color=SPACINGS[name], ms=5)
    left.set(xlabel="timestep t", ylim=(0.5 - len(chosen), 0.5))
    left.set(yticks=[-row for row in range(len(chosen))], yticklabels=list(chosen))
    left.set_title("The same ten times by t …")
    right.set_title("… and by the ratio of noise to signal")
    right.set_xlabel(r"$r=\sqrt{1-\bar\alpha_t}\,/\sqrt{\bar\alpha_t}$ (logarithmic)")
    right.axvspan(20, ratio[-1].item() * 2, color=plots.REFERENCE, alpha=0.2, lw=0)
    right.text(60, -0.55, "nothing but noise", fontsize=9, color=plots.REFERENCE)
    return plots.show(
        fig,
        "Ten dots in each of three rows. By t, uniform times are even, quadratic times are denser "
        "toward 0, and log-SNR times are dense at both ends. By the logarithm of noise to signal, "
        "log-SNR times are even, and half of them lie where there is nothing but noise.",
    )


def spread(calls: Sequence[int], kept: dict[str, list[float]]) -> plots.Image:
    """The share of the data's standard deviation that samplers keep, against calls."""
    fig, ax = plots.figure(width=7.4, height=3.2)
    for name, shares in kept.items():
        color, marker = COLORS[_solver(name)], MARKERS[_solver(name)]
        ax.semilogx(calls, shares, "-", marker=marker, color=color, ms=5, label=name)
    ax.axhline(1, color=plots.REFERENCE, ls="--", lw=1.2)
    ax.text(calls[0], 1.02, "exact", color=plots.REFERENCE)
    ax.set(xticks=calls, xticklabels=calls, xlabel="network calls (logarithmic)", ylim=(0, 1.2))
    ax.set(ylabel="std of samples / std of data")
    ax.set_title("Exact denoiser: second order keeps the spread with few calls")
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return plots.show(
        fig,
        "The two curves of second order reach 1 at twenty calls, with fresh noise and without. The "
        "two of first order stay below 1, that with fresh noise lowest.",
    )


def one_step(
    r: Tensor, exact: Tensor, start: tuple, aims: dict[str, float], r_next: float
) -> plots.Image:
    """An exact curve u(r), and straight steps from `start` that aim at guesses at r = 0."""
    fig, ax = plots.figure(width=7.4, height=3.4)
    r_t, u_t = start
    ax.plot(r, exact, color=plots.REFERENCE, label="exact curve")
    colors = plots.DATA, plots.MODEL
    for (name, guess), color in zip(aims.items(), colors, strict=True):
        u_next = guess + (u_t - guess) * r_next / r_t
        ax.plot([r_t, r_next], [u_t, u_next], "-", color=color, label=name)
        ax.plot([r_next, 0], [u_next, guess], ":", color=color)
        ax.plot([r_next], [u_next], "o", color=color)
        ax.plot([0], [guess], "s", color=color, clip_on=False, zorder=3)
    ax.plot([r_t], [u_t], "o", color="black")
    ax.axvline(r_next, color=plots.REFERENCE, lw=0.8, ls="--")
    ax.annotate("$x_t$", (r_t, u_t), (6, 4), textcoords="offset points")
    ax.text(r_next + 0.01, 0.05, "the steps end here", color=plots.REFERENCE)
    ax.set(xlabel="noise-to-signal ratio r (sampling runs to the left)", ylabel="scaled image u")
    ax.set(xlim=(-0.02, r.max().item()), ylim=(0, None))
    ax.set_title("A step is a straight line toward the guess at r = 0")
    ax.legend(loc="lower right")
    return plots.show(
        fig,
        "A curve and two straight steps from one point of it. Both end below the curve, the one "
        "that aims at the guess of the middle of the step less than a third as far away.",
    )


def orders(calls: Sequence[int], errors: dict[tuple[str, str], list[float]]) -> plots.Image:
    """Errors against calls on logarithmic axes; keys are (solver, spacing)."""
    fig, ax = plots.figure(width=7.4, height=3.8)
    for (solver, spacing), values in errors.items():
        style = {"uniform": "--", "log_snr": "-"}[spacing]
        label = f"{solver}, {'λ-even' if spacing == 'log_snr' else spacing} times"
        marker = MARKERS[solver]
        ax.loglog(calls, values, style, marker=marker, color=COLORS[solver], ms=5, label=label)
    ends = [values[-1] for values in errors.values()]
    for slope, end in ((1, max(ends) * 1.9), (2, min(ends) / 2.2)):
        line = [end * (calls[-1] / count) ** slope for count in calls[2:]]
        ax.loglog(calls[2:], line, ":", color=plots.REFERENCE, lw=1.4)
        ax.text(calls[-1] * 1.06, end, f"slope −{slope}", color=plots.REFERENCE, va="center")
    ax.set(xticks=calls, xticklabels=calls, xlim=(calls[0] * 0.9, calls[-1] * 1.9))
    ax.minorticks_off()
    ax.set(xlabel="network calls (logarithmic)", ylabel="error of x at t = 0 (logarithmic)")
    ax.set_title("Exact denoiser: DDIM is of first order, 2M of second")
    ax.legend(loc="lower left", fontsize=8, handlelength=4)
    return plots.show(
        fig,
        "Four falling lines. The two of DDIM fall with slope −1, the two of the second-order "
        "solver with slope −2 from 40 calls on; with λ-even times it lies lowest everywhere.",
    )


def quality(
    curves: dict[str, dict[int, float]],
    here: dict[tuple[str, int], float],
    floor: float,
    ancestral: float | None,
    between_seeds: float,
    n: int,
) -> plots.Image:
    """Fréchet distances {sampler: {calls: distance}} with bars of two standard deviations.

    `between_seeds` is the standard deviation between noise seeds as a share of the distance.
    Points of `here` are drawn solid, all others hollow.
    """
    fig, ax = plots.figure(width=8.2, height=4.6)
    for name, points in curves.items():
        color, marker = COLORS[_solver(name)], MARKERS[_solver(name)]
        calls, values = list(points), list(points.values())
        bars = [2 * between_seeds * value for value in values]
        ax.errorbar(calls, values, bars, color=color, lw=1.5, capsize=3)
        ax.plot(calls, values, marker, color=color, mfc="white", ms=6, zorder=3)
        live = [count for count in calls if (name, count) in here]
        heights = [here[name, count] for count in live]
        ax.plot(live, heights, marker, color=color, ms=6, zorder=4, label=name)
    most = max(count for points in curves.values() for count in points)
    if ancestral is not None:
        ax.axhline(ancestral, color="black", ls="--", lw=1.2)
        ax.text(5, ancestral * 0.97, "1,000 calls (lesson 05)", va="top")
    ax.axhline(floor, color=plots.REFERENCE, ls="--", lw=1.2)
    ax.text(5, floor * 1.04, "floor: real images", color=plots.REFERENCE)
    ax.set(xscale="log", yscale="log", xlabel="network calls per image (logarithmic)")
    ticks = [c for c in (5, 10, 20, 30, 50, 100, 250) if c <= most]
    ax.set_xticks(ticks, ticks)
    top = max(value for points in curves.values() for value in points.values())
    heights = [h for h in (2, 5, 10, 15, 20, 30, 50, 100, 200) if h < 1.5 * top]
    ax.set_yticks(heights, heights)
    ax.minorticks_off()
    ax.set_ylabel("Fréchet distance (logarithmic)")
    ax.set_title(f"Quality against network calls, n = {n:,}")
    ax.legend(loc="upper right")
    return plots.show(
        fig,
        "Fréchet distance against calls for four samplers, with error bars. The floor of real "
        "images and the distance of a thousand calls are dashed lines below the curves.",
    )


def walk(
    path: Path, frames: Sequence[Tensor], fractions: Sequence[float], columns: int
) -> plots.Image:
    """Write the GIF of images that change with the fraction of the arc, and return it."""
    captions = [f"fraction of the arc f = {f:.2f}" for f in fractions]
    plots.save_gif(path, frames, columns=columns, ms=100, hold_ms=600, scale=3, captions=captions)
    width = 3 * (columns * (frames[0].shape[-1] + 1) - 1)
    return plots.show_file(path, f"{len(frames[0])} images change into others and back.", width)


def _solver(name: str) -> str:
    """The name of a sampler without its spacing."""
    return name.removesuffix(", log-SNR")


def _canvas(width: int, height: int):
    """Return a figure and axes that cover it; one unit is one pixel, and y points down."""
    fig, ax = plots.figure(width=width / DPI, height=height / DPI)
    fig.set_layout_engine("none")
    ax.set_position([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig, ax
