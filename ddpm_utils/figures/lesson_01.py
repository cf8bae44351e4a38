"""Figures of lesson 01: the forward process."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..schedules import NoiseSchedule

DPI = plots.STYLE["figure.dpi"]


def noise_levels(mixtures: Tensor, levels: Sequence[float], name: str) -> plots.Image:
    """Show one image at several noise levels, side by side."""
    width = _shown_size(mixtures[0], 84)
    fig, ax = _canvas(len(mixtures) * (width + 6), width + 48)
    for i, (image, level) in enumerate(zip(mixtures, levels, strict=True)):
        left = 3 + i * (width + 6)
        _draw(ax, image, left, 3, width)
        ax.text(left + width / 2, width + 8, f"σ = {level:.2f}", ha="center", va="bottom")
    title = "Details go first, large shapes last"
    ax.text(len(mixtures) * (width + 6) / 2, width + 28, title, ha="center", fontsize=11)
    return plots.show(fig, f"{len(mixtures)} copies of one image ({name}), from noise level 0 to 1")


def standard_deviations(stds: dict[str, list[float]]) -> plots.Image:
    """Plot the standard deviation of all pixels against the steps taken, one curve per factor."""
    fig, ax = plots.figure(width=7.4, height=3.2)
    # color, place of the label along the curve, shift in points, alignment
    styles = (
        (plots.DATA, 1.0, (-4, 5), "bottom"),
        (plots.REFERENCE, 0.6, (-8, 2), "bottom"),
        (plots.NOISE, 1.0, (-4, -6), "top"),
    )
    for (label, values), (color, part, shift, side) in zip(stds.items(), styles, strict=True):
        ax.plot(values, color=color)
        at = round(part * (len(values) - 1))
        place = {"textcoords": "offset points", "ha": "right", "va": side, "color": color}
        ax.annotate(f"factor {label}", (at, values[at]), shift, **place)
    ax.set(xlabel="steps taken", ylabel="standard deviation of all pixels", ylim=(0, None))
    ax.set_title("Only the square root keeps the standard deviation at 1")
    return plots.show(
        fig,
        "Three curves over the steps taken: with the root the standard deviation stays at 1; "
        "without scaling it rises past 3; with 1 − β it falls to 0.7",
    )


def animation(path: Path, states: dict[int, Tensor], level_of: Tensor) -> plots.Image:
    """Write the walk of a batch of images as a GIF and show it.

    `states` maps a timestep to a batch; −1 stands for the clean images. `level_of` holds the noise
    level after each step.
    """
    captions = [
        "clean images" if t < 0 else f"t = {t}    noise level {level_of[t]:.3f}" for t in states
    ]
    frames = list(states.values())
    scale = max(1, 56 // frames[0].shape[-1])
    gif = plots.save_gif(path, frames, columns=8, ms=300, scale=scale, grays=8, captions=captions)
    width = 8 * (frames[0].shape[-1] + 1) * scale - scale
    alt = f"{len(frames[0])} images dissolve into noise; the second half looks like noise"
    return plots.show_file(gif, alt, width)


def chain(states: dict[int, Tensor], level_of: Tensor) -> plots.Image:
    """Draw states of one walk as a chain, with one jump across it.

    `states` maps a timestep to an image; −1 stands for the clean image.
    """
    times, images = list(states), list(states.values())
    width, gap, bottom = _shown_size(images[0], 84), 74, 26
    fig, ax = _canvas(len(images) * width + (len(images) - 1) * gap + 40, width + 122)
    middle = bottom + width / 2
    arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0}
    # the images, and a small arrow into each but the first
    for i, (t, image) in enumerate(states.items()):
        left = 20 + i * (width + gap)
        _draw(ax, image, left, bottom, width)
        label = "$x_0$, clean" if t < 0 else f"$x_{{{t}}}$, level {level_of[t]:.2f}"
        ax.text(left + width / 2, bottom - 6, label, ha="center", va="top")
        if i:
            ax.annotate("", (left - 5, middle), (left - gap + 5, middle), arrowprops=arrow)
            n = t - times[i - 1]
            steps = f"{n} steps" if n > 1 else "1 step"
            ax.text(left - gap / 2, middle + 5, steps, ha="center", va="bottom", fontsize=9)
    # the jump
    start, end = 20 + width / 2, left + width / 2
    top = bottom + width + 4
    arc = arrow | {"connectionstyle": f"arc3,rad={-130 / (end - start)}"}
    arc |= {"color": plots.NOISE, "lw": 2}
    ax.annotate("", (end, top), (start, top), arrowprops=arc)
    ax.text(
        (start + end) / 2, top + 70, "one jump, (01.5)", ha="center", va="bottom", color=plots.NOISE
    )
    return plots.show(
        fig,
        f"A chain of {len(images)} images from clean to noise, joined by small arrows that say how "
        "many steps they take; an arc jumps from the first image to the last",
    )


def one_pixel(
    walks: dict[int, Tensor], jumps: dict[int, Tensor], schedule: NoiseSchedule, clean: float
) -> plots.Image:
    """Compare the distribution of one pixel after walks, after jumps, and in (01.4).

    Both dictionaries map a timestep to the draws of the pixel; `clean` is its clean value.
    """
    fig, axes = plots.figure(1, len(walks), width=8.4, height=3.0, sharex=True, sharey=True)
    for ax, (t, draws) in zip(axes, walks.items(), strict=True):
        alpha_bar_t = schedule.alpha_bars[t].item()
        mean, std = math.sqrt(alpha_bar_t) * clean, math.sqrt(1 - alpha_bar_t)
        v = mean + std * torch.linspace(-4, 4, 97)
        bins = v[::3].tolist()
        ax.hist(draws.tolist(), bins, density=True, alpha=0.4, label="walks")
        ax.hist(jumps[t].tolist(), bins, density=True, histtype="step", lw=1.4, label="jumps")
        density = torch.distributions.Normal(mean, std).log_prob(v).exp()
        ax.plot(v, density, "k--", lw=1.2, label="formula (01.4)")
        ax.axvline(clean, color=plots.REFERENCE, lw=1, ls=":", label="clean value")
        ax.set(title=f"t = {t}, noise level {std:.2f}", xlabel="value of the pixel", yticks=[])
        ax.set_xlim(-4, 4)
        ax.grid(visible=False)
    axes[0].set_ylabel("density")
    axes[-1].legend(loc="upper left", handlelength=1.4, borderaxespad=0)
    fig.suptitle("Walks and jumps follow the same bell curve", fontsize=11)
    return plots.show(
        fig,
        "Histograms of one pixel at three timesteps; walks, jumps and formula agree, and the bell "
        "widens and moves from the clean value to 0",
    )


def signal_and_noise(schedules: dict[str, NoiseSchedule]) -> plots.Image:
    """Plot the factors of image and noise of each schedule, and the SNR of all of them."""
    fig, axes = plots.figure(1, len(schedules) + 1, width=8.6, height=3.2)
    snr_ax = axes[-1]
    # line style, place of the label along the SNR curve, shift in points, alignment
    styles = (
        {"ls": "-", "part": 0.5, "shift": (-6, -4), "ha": "right", "va": "top"},
        {"ls": "--", "part": 0.25, "shift": (4, 5), "ha": "left", "va": "bottom"},
    )
    for (label, schedule), ax, style in zip(schedules.items(), axes, styles, strict=False):
        signal, noise, snr = _factors_and_snr(schedule)
        end = len(schedule) - 1
        # the two factors, and where they are equal
        ax.plot(signal, color=plots.DATA)
        ax.plot(noise, color=plots.NOISE)
        ax.text(0, 1.03, "image", color=plots.DATA, va="bottom")
        ax.text(end, 1.03, "noise", color=plots.NOISE, ha="right", va="bottom")
        after = int((snr < 1).nonzero()[0])
        log_before, log_after = snr[after - 1 : after + 1].log().tolist()
        crossing = after + log_after / (log_before - log_after)  # where the line is at log 1 = 0
        ax.plot(crossing, math.sqrt(0.5), "ko", ms=5)
        place = {"textcoords": "offset points", "va": "center"}
        ax.annotate("SNR = 1", (crossing, math.sqrt(0.5)), (14, 0), **place)
        ax.set(title=f"factors, {label} schedule", xlabel="t", ylim=(0, 1.2))
        # the ratio of their squares
        snr_ax.semilogy(snr, color=plots.MODEL, ls=style["ls"])
        at = round(style["part"] * end)
        place = {"textcoords": "offset points", "ha": style["ha"], "va": style["va"]}
        snr_ax.annotate(label, (at, snr[at]), style["shift"], **place, color=plots.MODEL)
    snr_ax.axhline(1, color=plots.REFERENCE, lw=1)
    snr_ax.text(end, 1.4, "SNR = 1", color=plots.REFERENCE, ha="right", va="bottom")
    snr_ax.set(title="signal-to-noise ratio", xlabel="t")
    for ax in axes:
        ax.set_xlim(-0.03 * end, 1.03 * end)
    fig.suptitle("The noise takes over sooner with the linear schedule", fontsize=11)
    return plots.show(
        fig,
        "Three panels over t: the factors of image and noise cross near a quarter of the steps for "
        "the linear schedule and near half for the cosine; the SNR of the linear schedule is lower "
        "until the very end",
    )


def quarter_circles(schedules: dict[str, NoiseSchedule], points: int = 25) -> plots.Image:
    """Plot the factor of the noise against that of the image, at evenly spread timesteps."""
    fig, axes = plots.figure(1, len(schedules), width=7.4, height=3.7, sharey=True)
    angle = torch.linspace(0, math.pi / 2, 100)
    for ax, (label, schedule) in zip(axes, schedules.items(), strict=True):
        part = torch.linspace(0, len(schedule) - 1, points).round().long()
        signal, noise, _ = _factors_and_snr(schedule)
        ax.plot(angle.cos(), angle.sin(), color=plots.REFERENCE, lw=0.8)
        ax.plot(signal[part], noise[part], "o", ms=5, color=plots.MODEL)
        ax.annotate("first step", (signal[0], noise[0]), (-9, 0), **_BESIDE, ha="right")
        ax.annotate("last step", (signal[-1], noise[-1]), (0, -12), **_BESIDE, ha="left")
        ax.set(title=label, xlabel="factor of the image", aspect="equal")
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes[0].set_ylabel("factor of the noise")
    title = f"{points} evenly spread timesteps: the linear ones pile up at the noise end"
    fig.suptitle(title, fontsize=11)
    return plots.show(
        fig,
        f"Two quarter circles with {points} dots each, from the clean image to noise; the linear "
        "dots pile up at the noise end, the cosine dots are evenly spread",
    )


def percentages(
    titles: Sequence[str], images: dict[str, Tensor], levels: dict[str, list[float]]
) -> plots.Image:
    """Show an image at percentages of the steps, in one row per schedule.

    `levels` holds the noise level of each image, which is written below it.
    """
    (first, *_) = images.values()
    width, label_width = _shown_size(first[0], 112), 66
    row_height = width + 26
    full = label_width + len(titles) * (width + 10)
    fig, ax = _canvas(full, len(images) * row_height + 46)
    for row, (label, batch) in enumerate(reversed(images.items())):
        bottom = 22 + row * row_height
        ax.text(label_width - 8, bottom + width / 2, label, ha="right", va="center")
        for i, (image, level) in enumerate(zip(batch, levels[label], strict=True)):
            left = label_width + i * (width + 10)
            _draw(ax, image, left, bottom, width)
            text = f"level {level:.3f}"
            ax.text(left + width / 2, bottom - 4, text, ha="center", va="top", fontsize=9)
    for i, column in enumerate(titles):
        center = label_width + i * (width + 10) + width / 2
        top = len(images) * row_height + 2
        ax.text(center, top, column, ha="center", va="bottom")
    title = "Same percentage of the steps, different noise"
    ax.text((full + label_width) / 2, top + 22, title, ha="center", va="bottom", fontsize=11)
    return plots.show(
        fig,
        f"The same image at four percentages of the steps ({'; '.join(titles)}), in one row per "
        f"schedule ({', '.join(images)}), with the noise level below each",
    )


def images_found(
    times: list[int], hits: list[float], schedule: NoiseSchedule, unseen: float = 0.96
) -> plots.Image:
    """Plot how many of 100 images are found at each of `times`, against the noise level.

    Noise levels above `unseen` are shaded.
    """
    alpha_bars = schedule.alpha_bars.double().cpu()
    level, snr = (1 - alpha_bars).sqrt()[times], (alpha_bars / (1 - alpha_bars))[times]
    fig, ax = plots.figure(width=8.4, height=3.7)
    right = snr[-1].item() / 1.5
    ax.axvspan((1 - unseen**2) / unseen**2, right, color="0.94", lw=0)
    ax.semilogx(snr, hits, "o-", color=plots.DATA)
    ax.axhline(1, color=plots.REFERENCE, ls="--")
    ax.text(snr[0] * 1.4, 3, "pure guessing: 1", color=plots.REFERENCE, va="bottom")
    for ratio, hit in zip(snr, hits, strict=True):
        ax.annotate(f"{hit:.0f}", (ratio, hit), (5, 5), textcoords="offset points")
    ax.text(right * 1.2, 108, "to our eyes: next to nothing", ha="right", va="top")
    labels = [
        f"{v:.3f}\nt = {t}" if v < 0.9995 else f"{v:.5f}\nt = {t}"
        for v, t in zip(level.tolist(), times, strict=True)
    ]
    ax.set_xticks(snr, labels, fontsize=8)
    ax.minorticks_off()
    ax.grid(axis="x", visible=False)
    ax.set(xlim=(snr[0] * 1.6, right), ylim=(0, 114), ylabel="images found of 100")
    ax.set_xlabel("noise level, spaced by the logarithm of the SNR")
    ax.set_title("A simple comparison finds images that the eye cannot see")
    return plots.show(
        fig,
        "Images found of 100 against the noise level: nearly all up to 0.9, most at 0.96, about 30 "
        "at 0.99, and 1 or 2 at the end",
    )


_BESIDE = {"textcoords": "offset points", "va": "center", "fontsize": 9}


def _factors_and_snr(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of image and noise, and their squared ratio, on the CPU."""
    alpha_bars = schedule.alpha_bars.cpu()
    return alpha_bars.sqrt(), (1 - alpha_bars).sqrt(), schedule.snr().cpu()


def _shown_size(image: Tensor, about: int) -> int:
    """The whole multiple of the width of the image that is closest to `about` pixels."""
    return image.shape[-1] * max(1, round(about / image.shape[-1]))


def _canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty figure whose coordinates are its pixels, from the lower left corner."""
    fig, ax = plots.figure(width=(width + 0.01) / DPI, height=(height + 0.01) / DPI)
    fig.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return fig, ax


def _draw(ax: Axes, image: Tensor, left: int, bottom: int, width: int) -> None:
    """Draw a square image on a canvas, each of its pixels as a square of whole pixels."""
    limits = {"xlim": ax.get_xlim(), "ylim": ax.get_ylim()}
    extent = (left, left + width, bottom, bottom + width)
    pixels = plots.tile(image[None])
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
    ax.set(aspect="auto", **limits)
