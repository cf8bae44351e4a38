"""Grids that lose nothing, GIFs read back, images that survive every viewer."""

import base64
import io
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_utils import plots
from ddpm_utils.data import to_model_range

SIZE = 3


def grays(values, channels=1, size=SIZE):
    """One constant image a value (0 … 255), in model range."""
    images = (
        torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, size, size)
    )
    return to_model_range(images)


def read_gif(path):
    """Frames as RGB arrays, durations in ms, and how often it repeats."""
    with Image.open(path) as gif:
        frames, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.array(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        return frames, durations, gif.info.get("loop")


# tile


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("columns", [None, 1, 2, 3, 5, 40])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 16])
def test_tile_drops_no_image_and_pads_with_white(n, columns, channels):
    values, gap = [10 * i for i in range(n)], 2
    image = plots.tile(grays(values, channels), columns, gap)
    k = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // k)
    height, width = rows * (SIZE + gap) - gap, k * (SIZE + gap) - gap
    assert image.dtype == np.uint8 and image.shape == (height, width) + (
        (3,) if channels == 3 else ()
    )
    for i in range(rows * k):
        top, left = (i // k) * (SIZE + gap), (i % k) * (SIZE + gap)
        cell = image[top : top + SIZE, left : left + SIZE]
        assert (cell == (values[i] if i < n else 255)).all()
    assert (image != 255).sum() == n * SIZE * SIZE * channels


def test_tile_keeps_colors_and_orientation():
    x = torch.rand(1, 3, 4, 5) * 2 - 1
    assert np.array_equal(
        plots.tile(x), ((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    )
    assert plots.tile(x.expand(4, -1, -1, -1), columns=2, gap=0).shape == (8, 10, 3)


@pytest.mark.parametrize("value", [0, 1, 90, 128, 254, 255])
def test_a_constant_gray_stays_that_gray(value):
    assert (plots.tile(grays([value])) == value).all()
    # whatever stands beside it
    assert (plots.tile(grays([value, 255 - value]), gap=0)[:, :SIZE] == value).all()


def test_values_beyond_the_range_are_clamped():
    assert plots.tile(torch.full((1, 1, 2, 2), 3.0)).min() == 255
    assert plots.tile(torch.full((1, 1, 2, 2), -3.0)).max() == 0


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(0, 1, 4, 4), r"\(0, 1, 4, 4\).*at least 1"),
        (torch.zeros(2, 2, 4, 4), r"\(2, 2, 4, 4\).*1 or 3 channels"),
        (torch.zeros(4, 4), r"\(4, 4\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 1, 4, 4), float("nan")), "NaN"),
    ],
)
def test_tile_refuses_what_is_no_batch_of_images_in_model_range(x, words):
    with pytest.raises(ValueError, match=words):
        plots.tile(x)


# figures


def test_figures_are_made_without_pyplot_and_closed_by_nobody():
    before = set(sys.modules)
    fig, axes = plots.figure(2, 3)
    assert axes.shape == (2, 3) and "matplotlib.pyplot" not in set(sys.modules) - before
    assert not isinstance(plots.figure()[1], np.ndarray)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_the_tile_on_a_fixed_range(channels):
    x = grays([100] * 5, channels)
    (image,) = plots.grid(x, columns=2, title="five").axes[0].images
    assert np.array_equal(image.get_array(), plots.tile(x, 2)) and image.get_clim() == (0, 255)


def test_strip_has_a_row_a_name_and_a_title_a_column():
    fig = plots.strip(
        {"a": grays([0, 50, 100]), "b": grays([1, 2, 3])}, ["t=0", "t=1", "t=2"], "all"
    )
    assert len(fig.axes) == 6 and [ax.get_title() for ax in fig.axes[:3]] == ["t=0", "t=1", "t=2"]
    assert [fig.axes[i].get_ylabel() for i in (0, 3)] == ["a", "b"]
    assert {ax.images[0].get_clim() for ax in fig.axes} == {(0, 255)}


def test_strip_refuses_a_row_that_does_not_fit_its_titles():
    with pytest.raises(ValueError, match="'a' holds 3 images.*2 titles"):
        plots.strip({"a": grays([0, 1, 2])}, ["x", "y"])


def test_show_keeps_every_pixel_and_saves_gray_ones_once():
    colored = plots.figure()[0]
    colored.axes[0].plot([0, 1], color=plots.NOISE)
    for fig, shape in ((plots.grid(grays([7])), 2), (colored, 3)):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=plots.STYLE["savefig.dpi"])
        drawn = iio.imread(buffer.getvalue(), extension=".png")
        kept = iio.imread(plots.show(fig, "a figure").data)
        assert kept.ndim == shape and (drawn[..., 3] == 255).all()
        assert (kept.reshape(*drawn.shape[:2], -1) == drawn[..., :3]).all()


def test_show_makes_a_png_with_its_text():
    image = plots.show(plots.grid(grays([7])), "one gray square")
    assert image.data.startswith(b"\x89PNG")
    bundle, metadata = image._repr_mimebundle_()
    assert (
        bundle["text/plain"] == "one gray square"
        and metadata["image/png"]["alt"] == "one gray square"
    )


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_an_empty_alt_is_refused(alt, tmp_path):
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show(plots.grid(grays([7])), alt)
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show_file(plots.save_gif(tmp_path / "a.gif", [grays([7])]), alt)


# frame_times


@pytest.mark.parametrize("frames", [2, 3, 10, 51, 60])
@pytest.mark.parametrize("timesteps", [1, 2, 50, 1000])
def test_frame_times_are_as_many_as_asked_with_first_and_last(timesteps, frames):
    times = plots.frame_times(timesteps, frames)
    assert len(times) == frames and times[0] == timesteps - 1 and times[-1] == -1
    assert times == sorted(times, reverse=True) and all(type(t) is int for t in times)
    if frames <= timesteps + 1:
        assert len(set(times)) == frames


@pytest.mark.parametrize("frames", [1, 0, -3])
def test_frame_times_refuses_fewer_than_two(frames):
    with pytest.raises(ValueError, match=f"frames={frames}"):
        plots.frame_times(100, frames)


# GIFs


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_frames_durations_scale_and_loop_read_back(tmp_path, channels):
    states = [grays([0, 51, 102, 153, 255 - 17 * i], channels) for i in range(4)]
    path = plots.save_gif(
        tmp_path / "new" / "a.gif", states, columns=3, ms=80, hold_ms=700, scale=4
    )
    frames, durations, loop = read_gif(path)
    assert len(frames) == 4 and durations == [80, 80, 80, 700] and loop == 0
    for frame, state in zip(frames, states, strict=True):
        image = plots.tile(state, 3, gap=1)
        image = image if channels == 3 else np.repeat(image[..., None], 3, axis=2)
        assert np.array_equal(frame, image.repeat(4, axis=0).repeat(4, axis=1))


def test_identical_frames_keep_their_time(tmp_path):
    states = [grays([0])] * 5 + [grays([255])] * 3
    _, durations, loop = read_gif(plots.save_gif(tmp_path / "a.gif", states, ms=50, hold_ms=1000))
    assert sum(durations) == 7 * 50 + 1000 and loop == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("values", [[255], [0, 255], [0, 0]], ids=["one", "two", "twice the same"])
def test_few_and_small_frames_are_a_gif_too(tmp_path, values, size):
    frames, *_ = read_gif(
        plots.save_gif(tmp_path / "a.gif", [grays([v], size=size) for v in values])
    )
    assert [frame.shape for frame in frames] == [(size, size, 3)] * len(set(values))
    assert (
        [frame.min() for frame in frames]
        == [frame.max() for frame in frames]
        == sorted(set(values))
    )


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_a_constant_gray_keeps_its_level_in_every_frame(tmp_path, levels):
    states = [torch.cat([grays([119], size=8), torch.randn(1, 1, 8, 8)]) for _ in range(4)]
    frames, *_ = read_gif(plots.save_gif(tmp_path / "a.gif", states, columns=2, grays=levels))
    shown = np.stack([frame[:8, :8] for frame in frames]).astype(int)
    assert (
        len(frames) == 4
        and shown.min() == shown.max()
        and abs(shown.min() - 119) <= 128 / (levels - 1)
    )
    assert len(np.unique(np.stack(frames))) <= levels


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "zero frames"),
        ([torch.zeros(1, 1, 4, 4, dtype=torch.uint8)], "uint8"),
        ([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan"))], "NaN"),
        (
            [torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4)],
            r"different shapes.*\(1, 1, 4, 4\).*\(2, 1, 4, 4\)",
        ),
        ([torch.zeros(1, 2, 4, 4)], "1 or 3 channels"),
    ],
)
def test_bad_frames_are_refused_and_no_file_is_made(tmp_path, frames, words):
    with pytest.raises(ValueError, match=words):
        plots.save_gif(tmp_path / "new" / "a.gif", frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [dict(grays=1), dict(grays=257), dict(scale=-1), dict(ms=0), dict(hold_ms=-10)],
    ids=str,
)
def test_bad_gif_options_are_refused_by_name(tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        plots.save_gif(tmp_path / "a.gif", [grays([0]), grays([255])], **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_captions_stand_above_the_frames_and_leave_them_alone(tmp_path, channels):
    states = [grays([v], size=40).expand(-1, channels, -1, -1) for v in (0, 136, 255)]
    frames, *_ = read_gif(
        plots.save_gif(tmp_path / "a.gif", states, captions=["t = 9", "t = 8", "t = 0"])
    )
    bands = [frame[:-40] for frame in frames]
    assert all(band.shape == (20, 40, 3) and band.max() == 255 for band in bands)
    assert all((band < 100).any() for band in bands)  # some ink
    assert not np.array_equal(bands[0], bands[1]) and not np.array_equal(bands[1], bands[2])
    assert [np.unique(frame[-40:]).tolist() for frame in frames] == [[0], [136], [255]]
    with pytest.raises(ValueError, match="1 captions for 3 frames"):
        plots.save_gif(tmp_path / "b.gif", states, captions=["t = 9"])


def test_a_gif_is_shown_under_the_type_that_viewers_keep(tmp_path):
    path = plots.save_gif(tmp_path / "a.gif", [grays([0]), grays([255])])
    bundle, metadata = plots.show_file(path, "black, then white", width=200)._repr_mimebundle_()
    raw = base64.b64decode(bundle["image/png"])
    assert raw[:6] == b"GIF89a" and raw == path.read_bytes() and "image/gif" not in bundle
    assert metadata == {"image/png": {"alt": "black, then white", "width": 200}}
    assert len(read_gif(io.BytesIO(raw))[0]) == 2


def test_a_gif_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.gif"):
        plots.show_file(tmp_path / "gone.gif", "nothing")
