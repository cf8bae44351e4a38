"""Figures in one style: grids, strips, axes for curves, GIFs.

The functions take images in model range [−1, 1] and never call `plt.show()`. Figures are made
without pyplot, so that nothing is drawn twice and no figure has to be closed.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from .data import to_image_range

# One color per role, from the color-blind-safe set of Okabe and Ito.
DATA, NOISE, MODEL, REFERENCE, EXTRA = "#0072B2", "#D55E00", "#009E73", "#767676", "#CC79A7"
STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "image.cmap": "gray",
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": matplotlib.cycler(color=[DATA, NOISE, MODEL, EXTRA, REFERENCE, "#E69F00"]),
}


@dataclass(frozen=True)
class Image:
    """Bytes of a PNG or a GIF with an alternative text.

    A notebook cell that ends in an Image shows it. A GIF uses the type `image/png`: browsers
    examine the bytes and animate it, while notebook viewers and GitHub drop the type `image/gif`.
    Raises ValueError if `alt` is empty.
    """

    data: bytes
    alt: str
    width: int | None = None

    def __post_init__(self):
        if not self.alt.strip():
            raise ValueError("alt is empty: say in a sentence what the image shows")

    def _repr_mimebundle_(self, include=None, exclude=None):
        metadata = {"alt": self.alt} | ({"width": self.width} if self.width else {})
        return {"image/png": base64.b64encode(self.data).decode(), "text/plain": self.alt}, {
            "image/png": metadata
        }


def figure(
    rows: int = 1,
    cols: int = 1,
    width: float = 7.0,
    height: float | None = None,
    **subplots,
):
    """Return a figure in the style of the series, and its axes.

    The axes are a single one, or an array as `Figure.subplots` returns it. Sizes are in inches.
    """
    # not restored, so that a legend or label added later has the same style
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height or 3.0 * rows))
    return fig, fig.subplots(rows, cols, **subplots)


def show(fig: Figure, alt: str) -> Image:
    """Turn a figure into an Image; `alt` is a sentence that says what it shows.

    Raises ValueError on an empty alt.
    """
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=STYLE["savefig.dpi"])
    pixels = iio.imread(buffer.getvalue(), extension=".png")[..., :3]
    if (pixels == pixels[..., :1]).all():  # gray: one channel is enough, in half the bytes
        pixels = pixels[..., 0]
    return Image(iio.imwrite("<bytes>", pixels, extension=".png", optimize=True), alt)


def tile(x: Tensor, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """(N, C, H, W) in model range → one uint8 image (rows, columns[, 3]) with white gaps.

    The last row is padded with white. Raises ValueError unless x is a batch of 1- or 3-channel
    images.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (at least 1 image, 1 or 3 channels, height, "
            "width)"
        )
    columns = columns or int(np.ceil(np.sqrt(len(x))))
    pixels = to_image_range(x.detach().cpu())
    pixels = torch.nn.functional.pad(pixels, (0, gap, 0, gap), value=255)
    blank = torch.full_like(pixels[:1], 255).expand(-len(x) % columns, -1, -1, -1)
    image = rearrange(torch.cat([pixels, blank]), "(r k) c h w -> (r h) (k w) c", k=columns)
    image = image[: image.shape[0] - gap, : image.shape[1] - gap] if gap else image
    return image.squeeze(-1).numpy()


def grid(
    x: Tensor, columns: int | None = None, title: str | None = None, width: float = 5.0
) -> Figure:
    """Return a figure of N images, left to right and top to bottom; any N works."""
    pixels = tile(x, columns)
    fig, ax = figure(
        width=width, height=width * pixels.shape[0] / pixels.shape[1] + (0.35 if title else 0.1)
    )
    _imshow(ax, pixels)
    if title:
        ax.set_title(title)
    return fig


def strip(
    rows: dict[str, Tensor], titles: list[str], title: str | None = None, width: float = 8.0
) -> Figure:
    """Return a figure of rows of images, with one list of column titles above them.

    `rows` is {row label: (K, C, H, W)} and `titles` holds K strings. Raises ValueError if a row
    does not hold one image per title.
    """
    k = len(titles)
    for name, x in rows.items():
        if len(x) != k:
            raise ValueError(f"row {name!r} holds {len(x)} images, but there are {k} titles")
    # make the axes, with space for the titles
    cell = width / k
    lines = 1 + max(text.count("\n") for text in titles)
    fig, axes = figure(
        len(rows),
        k,
        width=width,
        height=cell * len(rows) + 0.2 * lines + (0.3 if title else 0),
        squeeze=False,
    )
    # draw the images and label the rows
    for axes_row, (name, x) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(axes_row, x, strict=True):
            _imshow(ax, tile(image[None]))
        if name:
            axes_row[0].axis("on")
            axes_row[0].set(xticks=[], yticks=[], ylabel=name)
            axes_row[0].spines[:].set_visible(False)
    # add the titles
    for ax, text in zip(axes[0], titles, strict=True):
        ax.set_title(text, fontsize=9)
    if title:
        fig.suptitle(title, fontsize=11)
    return fig


def _imshow(ax, pixels: np.ndarray) -> None:
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.axis("off")


def frame_times(timesteps: int, frames: int) -> list[int]:
    """Return `frames` values of t, evenly spread from T−1 down to −1 (the finished image).

    Both ends are always included. Raises ValueError if `frames` is below 2. If there are more than
    T + 1 frames, some values of t repeat.
    """
    if frames < 2:
        raise ValueError(f"frames={frames}: an animation needs at least a first and a last one")
    return [int(t) for t in np.linspace(timesteps - 1, -1, frames).round()]


def save_gif(
    path: Path | str,
    frames,
    columns: int | None = None,
    ms: int = 60,
    hold_ms: int = 1500,
    scale: int = 1,
    grays: int = 16,
    captions: Sequence[str] | None = None,
) -> Path:
    """Write one animated grid that loops forever and return its path.

    `frames` is a sequence of (N, C, H, W) in model range, all of one shape. Every frame is
    converted by the same fixed rule, so nothing flickers. `ms` is the duration of a frame and
    `hold_ms` that of the last one, both in milliseconds (GIF counts in units of 10 ms). `scale`
    enlarges each pixel. `grays` levels (2 … 256) keep noise small on disk. `captions` holds one
    line of text for each frame, which is written above it. Raises ValueError if there are no
    frames, if they have different shapes or are not floats in model range, if there are not as many
    captions, or if a setting is outside its range.
    """
    # check the frames and the settings
    frames = list(frames)
    if not frames:
        raise ValueError(
            "a GIF of zero frames cannot be written: keep some states of the sampler first"
        )
    if any(f.shape != frames[0].shape for f in frames):
        raise ValueError(
            f"frames have different shapes: {sorted({tuple(f.shape) for f in frames})}"
        )
    if captions is not None and len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} frames: give one for each")
    for name, value, low, high in (
        ("grays", grays, 2, 256),
        ("scale", scale, 1, 64),
        ("ms", ms, 10, 60_000),
        ("hold_ms", hold_ms, 10, 60_000),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is outside {low} … {high}")
    # tile the frames, reduce their gray levels and enlarge their pixels
    step = 255 / (grays - 1)
    images = []
    for i, frame in enumerate(frames):
        image = tile(frame, columns, gap=1)
        image = (np.round(np.round(image / step) * step)).astype(np.uint8)
        image = image.repeat(scale, axis=0).repeat(scale, axis=1)
        images.append(image if captions is None else _under_text(image, captions[i]))
    # write the animation
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a single frame takes a number, not a list
    times = [ms] * (len(images) - 1) + [hold_ms] if len(images) > 1 else hold_ms
    iio.imwrite(path, np.stack(images), extension=".gif", is_batch=True, duration=times, loop=0)
    return path


def _under_text(image: np.ndarray, text: str) -> np.ndarray:
    """The uint8 image below a white band that holds one line of text."""
    band = PIL.Image.new("L" if image.ndim == 2 else "RGB", (image.shape[1], 20), "white")
    font = PIL.ImageFont.load_default(size=13)
    PIL.ImageDraw.Draw(band).text((2, 2), text, fill="black", font=font)
    return np.concatenate([np.asarray(band), image])


def show_file(path: Path | str, alt: str, width: int = 320) -> Image:
    """Return the GIF or PNG at `path` as an Image, shown `width` pixels wide."""
    return Image(Path(path).read_bytes(), alt, width)
