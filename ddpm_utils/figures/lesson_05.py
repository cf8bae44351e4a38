"""Figures of lesson 05, Sampling."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import plots
from ..schedules import NoiseSchedule

SYMBOL = {"beta_tilde": r"$\tilde\beta_t$", "beta": r"$\beta_t$"}
COLOR = {"beta_tilde": plots.MODEL, "beta": plots.NOISE}


def clock(schedule: NoiseSchedule, t: int, between: str = "\nnoise") -> str:
    """The timestep and the noise level as a label; t = −1 is the finished image."""
    if t < 0:
        return "finished image"
    return f"t = {t}{between} {(1 - schedule.alpha_bars[t]).sqrt().item():.3f}"


def animation(
    path: Path,
    kept: dict[int, tuple[Tensor, Tensor]],
    times: Sequence[int],
    schedule: NoiseSchedule,
    title: str,
) -> plots.Image:
    """Write the GIF of up to sixteen images from noise to the end, and return it."""
    frames = [kept[t][0][:16] for t in times]
    columns = min(8, len(frames[0]))
    plots.save_gif(
        path,
        frames,
        columns=columns,
        ms=250,
        hold_ms=3000,
        scale=2,
        grays=10,
        captions=[clock(schedule, t, "    noise level") for t in times],
    )
    width = 2 * (columns * (frames[0].shape[-1] + 1) - 1)
    return plots.show_file(path, f"Squares of noise turn into images like those of {title}.", width)


def states(
    kept: dict[int, tuple[Tensor, Tensor]], times: Sequence[int], schedule: NoiseSchedule
) -> plots.Image:
    """The first image at several timesteps, above the guesses made from it."""
    rows = {"$x_t$": torch.stack([kept[t][0][0] for t in times])}
    rows[r"guess $\hat x_0$"] = torch.stack([kept[t][1][0] for t in times])
    fig = _strip(rows, [clock(schedule, t) for t in times])
    return plots.show(
        fig,
        "Eight states of one image from noise to the end, and below each the guess of the clean "
        "image, which starts as a gray blur and soon has an outline.",
    )


def posterior(
    x: Tensor, jump: Tensor, likelihood: Tensor, product: Tensor, x0: Tensor, x_t: Tensor
) -> plots.Image:
    """The two sources of the posterior and their product, all scaled to height 1."""
    fig, ax = plots.figure(width=7.4, height=3.0)
    curves = (
        (likelihood, plots.NOISE, "likelihood\n$q(x_t | x_{t-1})$", 0.6, "left"),
        (jump, plots.DATA, "density\n$q(x_{t-1} | x_0)$", 0.7, "right"),
        (product, plots.MODEL, "posterior", 1.05, "top"),
    )
    for y, color, text, height, side in curves:
        ax.plot(x, y, color=color)
        peak = int(y.argmax())
        if side == "top":
            ax.text(x[peak], height, text, color=color, ha="left")
            continue
        part = slice(None, peak + 1) if side == "left" else slice(peak, None)
        foot = x[part][(y[part] - height).abs().argmin()].item()
        shift, align = (-0.12, "right") if side == "left" else (0.12, "left")
        ax.text(foot + shift, height, text, color=color, ha=align, va="center")
    for value, name, shift, align in ((x_t, "x_t", -0.06, "right"), (x0, "x_0", 0.06, "left")):
        ax.axvline(value.item(), color=plots.REFERENCE, ls="--", lw=1.2)
        text = f"${name} = {value.item():g}$"
        ax.text(value.item() + shift, 1.2, text, color=plots.REFERENCE, ha=align)
    ax.set(xlim=(x[0].item(), x[-1].item()), ylim=(-0.03, 1.33), yticks=[0, 0.5, 1])
    ax.set(xlabel="value of $x_{t-1}$", ylabel="height (peak = 1)")
    ax.set_title("The posterior is narrower than either of its sources")
    return plots.show(fig, "Two bell curves over the pixel value and their product, narrower.")


def weights(ratio: Tensor, of_state: Tensor, of_guess: Tensor) -> plots.Image:
    """Left the ratio of the two standard deviations, right the two weights in the mean."""
    t = torch.arange(len(ratio))
    fig, (left, right) = plots.figure(1, 2, width=8.6, height=3.1, sharex=True)
    left.plot(t, ratio, color=plots.MODEL)
    left.set(title="The two variances differ only near $t=0$", ylim=(-0.03, 1.08))
    left.set(xlabel="timestep t", ylabel=r"ratio $\sqrt{\tilde\beta_t\,/\,\beta_t}$")
    right.semilogy(t, of_state, color=plots.NOISE)
    right.semilogy(t, of_guess, color=plots.DATA)
    middle = len(t) // 2
    right.text(middle, 0.62, "weight of $x_t$", color=plots.NOISE, ha="center", va="top")
    early = len(t) // 4
    height = 1.3 * of_guess[early].item()
    right.text(early, height, r"weight of the guess $\hat x_0$", color=plots.DATA)
    right.set(title="The mean is almost all $x_t$", xlabel="timestep t", ylim=(1e-3, 2))
    right.set_ylabel("weight (logarithmic)")
    return plots.show(
        fig,
        "Left, the ratio of the two standard deviations jumps from 0 to almost 1 near t = 0 and "
        "stays there. Right, the weight of the state is near 1 except at both ends, and that of "
        "the guess is below 0.01 for most of the path.",
    )


def one_step(
    x_t: Tensor, x0_hat: Tensor, move: Tensor, noise: Tensor, x_prev: Tensor, t: int
) -> plots.Image:
    """The parts of one step for the first image, move and noise on one scale."""
    size_of_move, size_of_noise = (part.square().mean().sqrt().item() for part in (move, noise))
    factor = max(1, round(0.35 / size_of_noise))
    more = max(1, round(0.35 / size_of_move))
    parts = [x_t, factor * move, factor * noise, x_prev, more * move, x0_hat]
    titles = [
        "$x_t$",
        f"+ move of the mean\n× {factor}",
        f"+ noise\n× {factor}, the same scale",
        "= $x_{t-1}$",
        f"the same move\n× {more}",
        r"guess $\hat x_0$",
    ]
    row = torch.stack([part[0] for part in parts])
    times = size_of_noise / size_of_move
    title = f"One step at t = {t}: the noise is {times:.0f} times as large as the move"
    fig = _strip({"": row}, titles, box=112, gap=10, title=title)
    return plots.show(
        fig,
        "Six images: the state; the move of the mean, which is even gray; the noise on the same "
        "scale, clearly visible; the next state; the move enlarged, noisy as well; the guess.",
    )


def last_noise(clean: Tensor, z: Tensor, sigmas: dict[int, float]) -> plots.Image:
    """One image with the noise of the last step left in, by the length T of the schedule."""
    images = torch.stack([clean] + [clean + sigma * z for sigma in sigmas.values()])
    side = clean.shape[-1] * 2 // 7
    corner = 4 * (images[:, :, :side, :side] + 1) - 1
    titles = ["no noise"]
    titles += [f"T = {n}\n{127.5 * sigma:.1f} gray levels" for n, sigma in sigmas.items()]
    rows = {"image": images, "corner,\n4 × contrast": corner}
    fig = _strip(rows, titles, box=112)
    return plots.show(fig, "One image with the noise of the last step left in, for shorter T.")


def ends(rows: dict[str, Tensor]) -> plots.Image:
    """The ends of several runs, a row for each common starting point."""
    count = len(next(iter(rows.values())))
    fig = _strip(rows, [f"end {i + 1}" for i in range(count)])
    return plots.show(fig, "Images reached from four states of one image with fresh noise.")


def bias(lengths: Sequence[int], errors: dict[str, Tensor], stds: Tensor) -> plots.Image:
    """Error of the standard deviation in percent against T; `errors` is {variance: (T, pixel)}."""
    fig, ax = plots.figure(width=7.4, height=3.2)
    for variance, of_pixels in errors.items():
        for error, std, style in zip(of_pixels.T, stds.tolist(), (".--", ".-"), strict=True):
            ax.semilogx(lengths, error, style, color=COLOR[variance])
            text = f"{SYMBOL[variance]}, data std {std:.2f}"
            ax.text(
                lengths[0] / 1.08, error[0], text, color=COLOR[variance], ha="right", va="center"
            )
    ax.axhline(0, color=plots.REFERENCE, lw=1)
    ax.set(xlim=(lengths[0] / 2.6, lengths[-1] * 1.1), xticks=lengths, xticklabels=lengths)
    ax.minorticks_off()
    ax.set(xlabel="steps T (logarithmic)", ylabel="error of the std, %")
    ax.set_title(r"Exact denoiser: $\tilde\beta_t$ gives too little spread, $\beta_t$ too much")
    return plots.show(
        fig, "Two lines above zero and two below it; all four approach zero as T grows."
    )


def two_values(x: Tensor, panels: dict[str, tuple[Tensor, Tensor]]) -> plots.Image:
    """True density of the previous state and the Gaussian of the same variance, a panel each."""
    fig, axes = plots.figure(1, len(panels), width=8.6, height=3.2, sharex=True)
    for ax, (title, (density, gaussian)) in zip(axes, panels.items(), strict=True):
        ax.plot(x, density, color=plots.DATA)
        ax.plot(x, gaussian, "--", color=plots.NOISE)
        top = density.max().item()
        ax.set(title=title, xlabel="value of $x_{t-1}$", ylim=(-0.03 * top, 1.2 * top))
        peak = x[density.argmax()].abs().item()
        ax.text(peak + 0.12, 1.04 * top, "true density", color=plots.DATA)
    axes[0].text(-1.2, 0.27, "Gaussian step", color=plots.NOISE, ha="right")
    axes[1].text(0.3, 0.8 * top, "Gaussian step\n(the same curve)", color=plots.NOISE, va="top")
    axes[0].set_ylabel("density, given $x_t = 0$")
    fig.suptitle("A long step back has two likely outcomes, a short step only one", fontsize=11)
    return plots.show(
        fig, "With 5 steps the true density has two peaks; with 100, one narrow bell."
    )


def benchmark(percent: dict[str, list[float]]) -> plots.Image:
    """How much larger the Fréchet distance is with beta than with beta-tilde, a dot per seed."""
    fig, ax = plots.figure(width=7.4, height=1.9)
    for i, values in enumerate(percent.values()):
        ax.plot(values, [-i] * len(values), "o", color=plots.DATA, ms=8, alpha=0.8)
    ax.axvline(0, color=plots.REFERENCE, lw=1.2)
    ax.text(0.1, 0.5, r"$\tilde\beta_t$ better →", color=plots.REFERENCE, va="center")
    ax.text(-0.1, 0.5, r"← $\beta_t$ better", color=plots.REFERENCE, va="center", ha="right")
    ax.set(yticks=[-i for i in range(len(percent))], yticklabels=list(percent))
    ax.set(xlim=(-2, 8), ylim=(0.5 - max(2, len(percent)), 0.8))
    ax.set_xlabel(r"Fréchet distance with $\beta_t$ relative to $\tilde\beta_t$, difference in %")
    if percent:
        ax.set_title(r"On images, $\tilde\beta_t$ is slightly better in all six pairs")
    return plots.show(fig, "Six dots, all to the right of the zero line.")


def changes(images: Tensor, differences: dict[str, Tensor]) -> plots.Image:
    """Images above twenty times their changes; under each its mean change in gray levels."""
    rows, notes, marked = {"images": images}, {}, {}
    for name, difference in differences.items():
        levels = 127.5 * difference.abs().flatten(1).mean(dim=1)
        label = f"{name},\nchange × 20"
        rows[label] = (20 * difference).clamp(-1, 1)
        notes[label] = [f"{level:.1f} levels" for level in levels.tolist()]
        marked[label] = int(levels.argmax())
    fig = _strip(rows, [f"{i + 1}" for i in range(len(images))], notes=notes, marked=marked)
    return plots.show(
        fig,
        "Images, and twenty times their change under the other variance and the other clamp; the "
        "mean change in gray levels stands under each, and the largest is framed.",
    )


def _strip(
    rows: dict[str, Tensor],
    titles: Sequence[str],
    box: int = 84,
    gap: int = 6,
    title: str = "",
    notes: dict[str, list[str]] | None = None,
    marked: dict[str, int] | None = None,
):
    """Rows of images, each image pixel an exact square of screen pixels.

    Images are enlarged by the largest whole number that keeps them within `box` screen pixels.
    `notes` holds texts to write under the images of a row, `marked` an image of it to frame.
    """
    notes, marked = notes or {}, marked or {}
    sides = [x.shape[-1] * max(1, box // x.shape[-1]) for x in rows.values()]
    pitch, line, dpi = max(sides) + gap, 15, plots.STYLE["savefig.dpi"]
    # measure the figure in screen pixels
    above = line * (1 + max(text.count("\n") for text in titles)) + 6 + (26 if title else 0)
    lines = max(1 + name.count("\n") for name in rows)
    left = 8 + line * lines if any(rows) else 4
    width = left + pitch * len(titles)
    height = above + sum(
        side + gap + line * (name in notes) for name, side in zip(rows, sides, strict=True)
    )
    fig, ax = plots.figure(width=width / dpi, height=height / dpi)
    ax.remove()
    fig.set_layout_engine("none")
    if title:
        fig.text(0.5, 1 - 4 / height, title, ha="center", va="top", fontsize=11)
    # place the images, their titles and notes
    top = above
    for (name, images), side in zip(rows.items(), sides, strict=True):
        middle = 1 - (top + side / 2) / height
        fig.text((left - 6) / width, middle, name, rotation=90, ha="right", va="center", fontsize=9)
        for i, image in enumerate(images):
            x = left + i * pitch
            ax = fig.add_axes((x / width, 1 - (top + side) / height, side / width, side / height))
            ax.imshow(plots.tile(image[None]), vmin=0, vmax=255, interpolation="nearest")
            ax.axis("off")
            at = (x + side / 2) / width
            if top == above:
                fig.text(at, 1 - (top - 4) / height, titles[i], ha="center", fontsize=9)
            if name in notes:
                below = 1 - (top + side + 2) / height
                fig.text(at, below, notes[name][i], ha="center", va="top", fontsize=9)
            if marked.get(name) == i:
                for spine in ax.spines.values():
                    spine.set(visible=True, color=plots.NOISE, linewidth=2.5)
                ax.axis("on")
                ax.set(xticks=[], yticks=[])
        top += side + gap + line * (name in notes)
    return fig
