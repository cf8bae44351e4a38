"""Figures of lesson 09, The exact denoiser."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Ellipse
from torch import Tensor

from .. import data, plots

COMPONENT_COLORS = (plots.DATA, plots.NOISE, plots.MODEL)
SPAN = (-2.6, 2.6)  # of the plane in the drawings of two-pixel images


def samples(exact: Tensor, copied: Tensor, network: Tensor, similar: Tensor) -> plots.Image:
    """Return what two denoisers draw, with the nearest training images below each."""
    rows = [
        ("exact denoiser", exact),
        ("nearest\ntraining image", copied),
        ("trained network", network),
        ("nearest\ntraining image", similar),
    ]
    return _image_rows(
        rows,
        "Images by the exact denoiser, equal to the training images below; images by the trained "
        "network from the same noise, similar to the training images below but not equal.",
        box=90,
    )


def one_sample(moments: dict[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> plots.Image:
    """Return the first sample at several moments.

    `moments` is {(noise level, number of candidates): (states, guesses)}.
    """
    titles = [f"noise {level:.2f}\n{count:,.0f}" for level, count in moments]
    states = torch.stack([x_t[0] for x_t, _ in moments.values()])
    guesses = torch.stack([x0_hat[0] for _, x0_hat in moments.values()])
    return _image_rows(
        [("noisy $x_t$", states), (r"guess $\hat x_0$", guesses)],
        "The guess starts as a gray blur and is finished while x_t above it is still noise.",
        titles,
    )


def answers(moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]], truth: Tensor) -> plots.Image:
    """Return one image under falling noise, and the answers of the network and the exact denoiser.

    `moments` is {noise level: (x_t, answer of the network, exact answer)}, each (1, C, H, W).
    """
    rows = []
    for row, name in enumerate(("noisy", "network", "exact")):
        rows.append((name, torch.cat([images[row] for images in moments.values()] + [truth])))
    return _image_rows(
        rows,
        "A test image under falling noise. The network's guess becomes this image; the exact "
        "denoiser's guess becomes another one.",
        [*(f"noise {level:.2f}" for level in moments), "truth"],
    )


def one_pixel(axis: Tensor, prior: Tensor, cases: dict[float, tuple[Tensor, Tensor]]):
    """Return one panel per noise level with prior, likelihood, posterior and best answer.

    `cases` is {noise level: (likelihood, posterior)}, each over `axis`.
    """
    fig, axes = plots.figure(1, len(cases), width=8.8, height=2.8, sharey=True)
    for ax, (level, (likelihood, posterior)) in zip(axes, cases.items(), strict=True):
        best = (posterior * axis).sum().item()
        ax.fill_between(
            axis, prior / prior.max(), color=plots.DATA, alpha=0.25, lw=0, label="prior"
        )
        ax.plot(axis, likelihood / likelihood.max(), "--", color=plots.NOISE, label="likelihood")
        ax.plot(axis, posterior / posterior.max(), color=plots.MODEL, label="posterior")
        ax.axvline(best, color="black", lw=1.2, label="best answer")
        ax.set(
            title=f"noise level {level:.2f},\nbest answer {best:.2f}", xlabel="clean value $x_0$"
        )
    axes[0].set_ylabel("height (peak = 1)")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right center")
    return plots.show(
        fig,
        "A prior with two bumps, a likelihood and a posterior for three noise levels. The best "
        "answer moves from the right bump to a value between the bumps.",
    )


def candidates(log_snr: Tensor, counts: Tensor) -> plots.Image:
    """Return the number of candidate images (times, runs) over the log-SNR."""
    fig, ax = plots.figure(width=7.4, height=3.4)
    ax.semilogy(log_snr, counts, color=plots.MODEL, lw=0.9, alpha=0.8)
    ax.set(ylabel="candidates", xlim=(-8, 8), ylim=(0.7, None))
    _noise_levels(ax)
    return plots.show(
        fig,
        "Curves of the number of candidate images: nearly all images on the left, then a fall "
        "to one while the noise is still stronger than the image.",
    )


def losses(
    log_snr: Tensor, curves: dict[tuple[str, str], Tensor], calculated: Tensor
) -> plots.Image:
    """Return the losses of the denoisers on training images (left) and test images (right).

    `curves` is {(denoiser, "training" or "test"): losses}; `calculated` is the best linear loss.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    colors = dict(zip(names, (plots.NOISE, plots.MODEL, plots.DATA), strict=True))
    fig, axes = plots.figure(1, 2, width=8.8, height=3.8, sharey=True)
    for ax, which in zip(axes, ("training", "test"), strict=True):
        for name in names:
            y = curves[name, which].clamp(min=1e-9)
            ax.semilogy(log_snr, y, color=colors[name], label=name)
        ax.semilogy(log_snr, calculated, ":", color="black", lw=1.3, label="linear, calculated")
        ax.set_title(f"on {which} images")
        ax.set(xlim=(-8, 7), ylim=(1e-4, 5))
        _noise_levels(ax)
    axes[0].set_ylabel(r"squared error of $\hat\varepsilon$ per pixel")
    axes[0].text(0.4, 1.4e-4, "exact: falls to 0", color=plots.NOISE, fontsize=9)
    axes[1].legend(loc="lower right", fontsize=9)
    return plots.show(
        fig,
        "Loss against log-SNR for three denoisers. On training images the exact one falls to zero. "
        "On test images it rises above all others once there is little noise.",
    )


def field(
    panels: dict[float, tuple[Tensor, Tensor]],
    lattice: Tensor,
    plane: Tensor,
    means: Tensor,
    covariances: Tensor,
) -> plots.Image:
    """Return one panel per noise level: posterior shares as shading, guesses as arrows.

    `panels` is {noise level: (shares on the plane (n·n, 3), guesses at the lattice points)};
    `plane` is (n·n, 2), the Cartesian product of n values with themselves.
    """
    fig, axes = plots.figure(1, len(panels), width=9.0, height=3.4, sharex=True, sharey=True)
    base = torch.tensor([matplotlib.colors.to_rgb(color) for color in COMPONENT_COLORS])
    n = round(len(plane) ** 0.5)
    edge = (plane[0, 0].item(), plane[-1, 0].item())
    for ax, (level, (shares, guesses)) in zip(axes, panels.items(), strict=True):
        light = 1 - 0.4 * (1 - shares @ base)
        ax.imshow(light.view(n, n, 3).transpose(0, 1), origin="lower", extent=(*edge, *edge))
        for mean, covariance, color in zip(means, covariances, COMPONENT_COLORS, strict=True):
            _ellipse(ax, mean, covariance, color)
        move = {"angles": "xy", "scale_units": "xy", "scale": 2.5, "width": 0.009}
        ax.quiver(*lattice.T, *(guesses - lattice).T, color="black", **move)
        ax.grid(False)
        ax.set(title=f"noise level {level:.2f}", xlabel="first pixel", xlim=edge, ylim=edge)
    axes[0].set_ylabel("second pixel")
    return plots.show(
        fig,
        "Arrows from lattice points toward the best guess at three noise levels: to one center, to "
        "blends of three components, and each to its own component.",
    )


def flow_animation(
    path: Path, states: Tensor, component: Tensor, captions: Sequence[str]
) -> plots.Image:
    """Write a GIF of the points `states` (frames, N, 2), colored by component, and return it.

    The paths of a few points are drawn, each from a ring at its start. The first frame is held.
    """
    inside = (states[0].abs() < 0.9 * SPAN[1]).all(dim=1)
    chosen = [((component == kind) & inside).nonzero()[:6, 0] for kind in range(3)]
    traced = torch.cat(chosen)
    frames = [_frame(states[: i + 1], component, traced) for i in range(len(states))]
    hold = 8  # copies of the first frame
    frames, captions = [frames[0]] * hold + frames, [captions[0]] * hold + list(captions)
    plots.save_gif(path, frames, ms=180, hold_ms=3000, grays=12, captions=captions)
    return plots.show_file(
        path,
        "A round cloud of points, in three colors with sharp borders, shrinks, splits, and becomes "
        "three clusters: one round, one long, one slanted.",
        frames[0].shape[-1],
    )


def orders(calls: Sequence[int], errors: dict[str, Sequence[float]]) -> plots.Image:
    """Return the relative errors of the variances against the number of calls."""
    fig, ax = plots.figure(width=7.4, height=4.0)
    colors = (plots.NOISE, plots.EXTRA, plots.DATA, plots.MODEL, plots.MODEL)
    looks = ("o-", "s-", "^-", "D-", "D--")
    for (name, values), color, look in zip(errors.items(), colors, looks, strict=True):
        ax.loglog(calls, values, look, color=color, ms=4, label=name)
    first, last = calls[0], calls[-1]
    for power, at in ((1, 0.4), (2, 0.006)):
        end = at * (first / last) ** power
        ax.loglog([first, last], [at, end], ":", color=plots.REFERENCE, lw=1.2)
        ax.text(last * 1.08, end, f"slope −{power}", color=plots.REFERENCE, fontsize=8, va="center")
    ax.set(xlabel="calls of the denoiser", ylabel="relative error of the variances")
    ax.set_xlim(first * 0.9, last * 1.9)
    fig.legend(loc="outside right upper", fontsize=8, handlelength=3.2)
    return plots.show(
        fig,
        "Error against calls, both logarithmic: three lines of slope −1; the second-order solver "
        "is lower and bends toward slope −1, or keeps slope −2 with steps even in log-SNR.",
    )


def _image_rows(
    rows: Sequence[tuple[str, Tensor]], alt: str, titles: Sequence[str] = (), box: int = 62
) -> plots.Image:
    """Return rows of images with labels on the left; each image pixel is a square of screen pixels.

    `rows` holds pairs of a label and images (K, C, H, W) in model range. `titles` are the texts
    above the columns, K or none. Images are enlarged by the largest whole number that keeps them
    within `box` screen pixels.
    """
    count, side = len(rows[0][1]), rows[0][1].shape[-1]
    scale = max(1, box // side)
    pitch, left, top = scale * side + 6, 128, 38 if titles else 6
    width, height = left + pitch * count, top + pitch * len(rows)
    dpi = plots.STYLE["savefig.dpi"]
    fig, ax = plots.figure(width=width / dpi, height=height / dpi)
    ax.remove()
    fig.set_layout_engine("none")
    for row, (label, images) in enumerate(rows):
        y = top + row * pitch
        middle = 1 - (y + scale * side / 2) / height
        fig.text((left - 8) / width, middle, label, ha="right", va="center", fontsize=10)
        for i, image in enumerate(images):
            x, size = left + i * pitch, scale * side
            box = (x / width, 1 - (y + size) / height, size / width, size / height)
            panel = fig.add_axes(box)
            panel.imshow(plots.tile(image[None]), vmin=0, vmax=255, interpolation="nearest")
            panel.axis("off")
    for i, title in enumerate(titles):
        x = (left + i * pitch + scale * side / 2) / width
        fig.text(x, 1 - (top - 5) / height, title, ha="center", va="bottom", fontsize=9)
    return plots.show(fig, alt)


def _noise_levels(ax) -> None:
    """Label the x-axis as log-SNR, with the noise level along the top."""
    ax.set_xlabel("log-SNR (sampling runs from left to right)")
    top = ax.secondary_xaxis("top")
    levels = torch.tensor([0.999, 0.99, 0.9, 0.7, 0.3, 0.1, 0.03])
    top.set_xticks((1 / levels.square() - 1).log().tolist())
    top.set_xticklabels([f"{level:.3g}" for level in levels.tolist()], fontsize=8)
    top.set_xlabel("noise level", fontsize=9)


def _ellipse(ax, mean: Tensor, covariance: Tensor, color: str) -> None:
    """Draw the line of two standard deviations around a Gaussian."""
    values, vectors = torch.linalg.eigh(covariance)
    width, height = (4 * values.sqrt()).tolist()
    angle = torch.atan2(vectors[1, 0], vectors[0, 0]).rad2deg().item()
    ax.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, fill=False, color=color, lw=2))


def _frame(states: Tensor, component: Tensor, traced: Tensor) -> Tensor:
    """The last of the states with the paths so far, as an image (1, 3, H, W) in model range."""
    fig, ax = plots.figure(width=3.6, height=3.6)
    for kind, color in enumerate(COMPONENT_COLORS):
        ax.plot(*states[-1, component == kind].T, ".", color=color, ms=2)
    for i in traced.tolist():
        ax.plot(*states[:, i].T, color="black", lw=0.7)
        ax.plot(*states[0, i], "o", color="black", mfc="white", ms=4)
        ax.plot(*states[-1, i], "o", color="black", ms=3)
    ax.set(xlim=SPAN, ylim=SPAN, aspect="equal", xlabel="first pixel", ylabel="second pixel")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return data.to_model_range(pixels.view(height, width, 4)[None, :, :, :3].movedim(3, 1))
