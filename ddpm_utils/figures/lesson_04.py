"""Drawings of lesson 04: training."""

import math

import torch
from torch import Tensor

from .. import plots, schedules

DPI = plots.STYLE["savefig.dpi"]


def _canvas(width: int, height: int):
    """Return a figure and axes that cover it; one unit is one pixel, and y points down."""
    fig, ax = plots.figure(width=width / DPI, height=height / DPI)
    fig.set_layout_engine("none")
    ax.set_position([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig, ax


def _place(ax, pixels, left: float, top: float, scale: int) -> None:
    """Draw a grayscale image on a canvas; each of its pixels becomes scale × scale pixels."""
    height, width = (scale * size for size in pixels.shape)
    ax.imshow(
        pixels,
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
        aspect="auto",
        extent=(left, left + width, top + height, top),
    )


def _arrow(ax, start: tuple, end: tuple, color: str, width: float = 1.5) -> None:
    """Draw an arrow whose tip touches `end`."""
    style = {"arrowstyle": "->", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def _label(ax, text: str, point: tuple, color: str, offset=(0, 0), **align) -> None:
    """Write `text` beside a point of the data; `offset` is in points."""
    ax.annotate(text, point, offset, textcoords="offset points", color=color, **align)


def image_rows(rows: dict[str, Tensor], title: str, alt: str) -> plots.Image:
    """Return rows of grayscale images with a title and with labels on the left.

    `rows` is {label: (K, 1, H, W)} in model range. Each pixel is drawn as scale × scale pixels.
    """
    grids = [plots.tile(images, columns=len(images)) for images in rows.values()]
    scale = max(1, round(56 / grids[0].shape[0]))
    height, width = (scale * size for size in grids[0].shape)
    left, top, step = 150, 28, height + 6
    fig, ax = _canvas(left + width + 4, top + step * len(grids))
    ax.text(left, top / 2, title, fontsize=11, va="center")
    for i, (label, grid) in enumerate(zip(rows, grids, strict=True)):
        _place(ax, grid, left, top + i * step, scale)
        ax.text(left - 8, top + i * step + height / 2, label, ha="right", va="center")
    return plots.show(fig, alt)


def chain(clean: Tensor, seed: int = 0) -> plots.Image:
    """Return the chain from a clean image (1, 1, H, W) to noise, with the terms of the bound.

    It is drawn for T = 10 steps of the cosine schedule.
    """
    # walk the chain
    source = torch.Generator().manual_seed(seed)
    states = [clean.detach().cpu()]
    for beta in schedules.cosine_betas(10).float():
        noise = torch.randn(clean.shape, generator=source)
        states.append((1 - beta).sqrt() * states[-1] + beta.sqrt() * noise)
    # draw its states from left to right
    scale = max(1, 84 // clean.shape[-1])
    size = scale * clean.shape[-1]
    step, gap, top = size + 46, 70, 54
    places = {0: 12, 1: 12 + step, 4: 12 + 2 * step + gap}
    places |= {5: places[4] + step, 10: places[4] + 2 * step + gap}
    names = {0: "$x_0$", 1: "$x_1$", 4: "$x_{t-1}$", 5: "$x_t$", 10: "$x_T$"}
    fig, ax = _canvas(places[10] + size + 24, top + size + 52)
    for k, left in places.items():
        _place(ax, plots.tile(states[k]), left, top, scale)
        ax.text(left + size / 2, top - 9, names[k], ha="center")
    # connect them with arrows, and dots where states are left out
    left_out = [places[1] + step - 23 + gap / 2, places[5] + step - 23 + gap / 2]
    for x in left_out:
        ax.text(x, top + size / 2, "…", ha="center", va="center", fontsize=13)
    starts = places[0], places[1], left_out[0] + 12 - size, places[4], places[5]
    for x in (*starts, left_out[1] + 12 - size):
        near, far = x + size + 6, x + size + 40
        _arrow(ax, (near, top + size * 0.35), (far, top + size * 0.35), plots.NOISE)
        _arrow(ax, (far, top + size * 0.65), (near, top + size * 0.65), plots.MODEL)
    ax.text(12, 14, "forward: add noise (fixed)", color=plots.NOISE, va="center")
    ax.text(212, 14, "backward: remove noise (learned)", color=plots.MODEL, va="center")
    # mark the terms of the bound
    below = top + size + 8
    terms = {(0, 1): "$L_0$: last backward step", (4, 5): "$L_{t-1}$: one backward step"}
    terms[10, 10] = "$L_T$: pure noise?"
    for (first, last), text in terms.items():
        ends = places[first] + 2, places[last] + size - 2
        ax.plot([ends[0], *ends, ends[1]], [below, below + 7, below + 7, below], "k", lw=1)
        ax.text(sum(ends) / 2, below + 26, text, ha="center", va="center")
    return plots.show(fig, "Chain from a clean image to noise; brackets mark the terms of a bound.")


def bound_weights(weight: Tensor) -> plots.Image:
    """Return the weights (T,) of the bound beside those of the simple loss, both with mean 1."""
    steps = torch.arange(1, len(weight) + 1)
    relative = weight / weight.mean()
    fig, ax = plots.figure(height=2.8)
    ax.loglog(steps, relative, color=plots.REFERENCE)
    ax.loglog(steps, torch.ones(len(steps)), color=plots.MODEL)
    at = len(steps) // 100
    _label(ax, "the bound, $w_t$", (steps[at], relative[at]), plots.REFERENCE, (8, 4))
    _label(ax, "the simple loss", (2, 1), plots.MODEL, (0, -14))
    ax.set(
        xlabel="timestep t of the paper, 1 … T",
        ylabel="weight (mean 1)",
        title="The bound stresses the steps with little noise",
    )
    return plots.show(
        fig, "The weight in the bound falls steeply with t; in the simple loss it is constant."
    )


def circle(angle: float = 0.6) -> plots.Image:
    """Return x_t on the unit circle between x0 and eps, with its tangent v of length 1."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.linspace(0, math.pi / 2, 50)
    fig, ax = plots.figure(width=3.4, height=3.5)
    ax.plot(turn.cos(), turn.sin(), color=plots.REFERENCE, lw=1)
    arrows = {"$x_0$": (1, 0), "$\\varepsilon$": (0, 1), "$x_t$": (cos, sin)}
    for (label, end), color in zip(arrows.items(), (plots.DATA, plots.NOISE, "k"), strict=True):
        _arrow(ax, (0, 0), end, color, 2)
        ax.text(1.08 * end[0], 1.08 * end[1], label, color=color, ha="center", va="center")
    tip = cos - sin, sin + cos
    _arrow(ax, (cos, sin), tip, plots.MODEL, 2)
    ax.text(tip[0] + 0.06, tip[1], "$v$", color=plots.MODEL, va="center")
    arc = torch.linspace(0, angle, 20)
    ax.plot(0.22 * arc.cos(), 0.22 * arc.sin(), color="k", lw=1)
    ax.text(0.27, 0.06, "$\\varphi_t$")
    ax.set(xlim=(-0.12, 1.2), ylim=(-0.06, 1.48), aspect="equal")
    ax.axis("off")
    return plots.show(
        fig, "Unit arrows x0, eps and x_t on a quarter circle; the arrow v is the tangent at x_t."
    )


def target_weights(ratio: Tensor) -> plots.Image:
    """Return the weights of the image's error in three losses; `ratio` (T,) is the SNR."""
    last = len(ratio) - 1
    fig, ax = plots.figure(height=3.0)
    ax.semilogy(ratio + 1, color=plots.MODEL, lw=3)
    ax.semilogy(ratio, color=plots.NOISE)
    ax.semilogy(torch.ones(len(ratio)), color=plots.DATA, ls="--")
    names = (
        ("$v$: $1/(1-\\barα_t)$", 0.2, ratio + 1, plots.MODEL, (6, 8)),
        ("$ε$: $\\barα_t/(1-\\barα_t)$", 0.75, ratio, plots.NOISE, (-104, -12)),
        ("$x_0$: 1", 0.1, torch.ones(len(ratio)), plots.DATA, (0, -14)),
    )
    for text, share, curve, color, offset in names:
        t = round(share * last)
        _label(ax, text, (t, curve[t]), color, offset)
    ax.set(
        xlabel="timestep t",
        ylabel="weight of the image's error",
        ylim=(1e-4, 1e5),
        title="The ε loss almost ignores the image at large t",
    )
    return plots.show(fig, "The weights that three losses give to the error of the image, over t.")


def _binned(losses: Tensor, timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centers, means and standard errors of 25 parts of t."""
    parts = losses.chunk(25)
    centers = (torch.arange(len(parts)) + 0.5) * timesteps / len(parts)
    means = torch.stack([part.mean() for part in parts])
    errors = torch.stack([part.std() / len(part) ** 0.5 for part in parts])
    return centers, means, errors


def loss_curve_and_split(
    batch_losses: list[float],
    affine_loss: Tensor,
    loss_at: dict[int, Tensor],
) -> plots.Image:
    """Return the loss of each batch, and at two moments the held-out loss split by t.

    `affine_loss` (T,) is the loss of the best affine denoiser. `loss_at` is {step: losses (N,)},
    the losses at evenly spread timesteps.
    """
    timesteps = len(affine_loss)
    fig, (left, right) = plots.figure(1, 2, width=8.4, height=3.3)
    # one number for each batch, and their running mean
    steps = range(1, len(batch_losses) + 1)
    left.plot(steps, batch_losses, color=plots.MODEL, lw=0.8, label="network, one batch")
    window = max(1, len(batch_losses) // 8)
    smooth = torch.tensor(batch_losses).unfold(0, window, 1).mean(dim=1)
    middles = torch.arange(len(smooth)) + (window + 1) / 2
    left.plot(middles, smooth, color=plots.EXTRA, lw=2, label=f"network, mean of {window} batches")
    left.axhline(affine_loss.mean(), color=plots.REFERENCE, ls="--", label="best affine denoiser")
    left.set(xlabel="step", ylabel="loss", ylim=(0, 0.5), title="The loss curve looks flat …")
    left.legend()
    # the same, split by t
    right.semilogy(affine_loss, color=plots.REFERENCE, ls="--")
    t = round(0.88 * (timesteps - 1))
    point, align = (t, affine_loss[t]), {"ha": "right", "va": "top"}
    _label(right, "best affine\ndenoiser", point, plots.REFERENCE, (-6, 2), **align)
    styles = ((":", (0, 7), "bottom", "network, "), ("-", (0, -7), "top", ""))
    for (step, losses), (style, offset, va, name) in zip(loss_at.items(), styles, strict=True):
        centers, means, _ = _binned(losses, timesteps)
        right.semilogy(centers, means, color=plots.MODEL, ls=style)
        end = centers[-1], means[-1]
        text, align = f"{name}step {step}", {"ha": "right", "va": va, "fontsize": 9}
        _label(right, text, end, plots.MODEL, offset, **align)
    right.axvline(0.6 * timesteps, color=plots.REFERENCE, lw=0.8)
    right.text(0.61 * timesteps, 0.6, "0.6 T", color=plots.REFERENCE)
    right.set(xlabel="timestep t", ylabel="held-out loss at t", title="… but falls at large t")
    return plots.show(fig, "Left, the loss curve flattens. Right, the loss still falls at large t.")


def run_and_split(marks: Tensor, losses: Tensor, affine_loss: Tensor, target: str) -> plots.Image:
    """Return the losses during the main training, and those of the trained network, split by t.

    A row of `marks` holds step, training loss, and held-out loss of raw and averaged weights.
    `losses` (N,) belong to evenly spread timesteps; `affine_loss` is (T,).
    """
    fig, (left, right) = plots.figure(1, 2, width=8.4, height=3.3)
    curves = (
        ("held out, raw weights", 2, plots.NOISE, (6, 8)),
        ("held out, averaged weights", 3, plots.MODEL, (8, -40)),
        ("training batches", 1, plots.EXTRA, (-50, -22)),
    )
    for label, column, color, offset in curves:
        left.plot(marks[:, 0], marks[:, column], "o-", ms=4, color=color)
        for mark in marks[2:3]:  # the third, where there is one
            _label(left, label, (mark[0], mark[column]), color, offset)
    left.set(xlabel="step", ylabel=f"loss, target {target}")
    left.set_title("The average leads while the rate is high")
    # split by t
    centers, means, errors = _binned(losses, len(affine_loss))
    right.plot(affine_loss, color=plots.REFERENCE, ls="--")
    right.errorbar(centers, means, 2 * errors, color=plots.MODEL)
    t = len(affine_loss) // 8
    _label(right, "best affine denoiser", (t, affine_loss[t]), plots.REFERENCE, (8, 4))
    text = "network ± 2 standard errors"
    right.text(0.5, 0.02, text, color=plots.MODEL, ha="center", transform=right.transAxes)
    right.set(xlabel="timestep t", ylabel=f"held-out loss, target {target}")
    right.set_title("Better than affine, except at the end")
    right.set_ylim(bottom=0)
    return plots.show(
        fig, "Left, losses fall during the run. Right, the network is below the affine denoiser."
    )
