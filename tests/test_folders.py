"""A folder of pictures of every kind becomes one tensor; what cannot be read is named; nothing is read twice."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_utils import folders, runtime
from ddpm_utils.folders import FolderImages, find_images, load_folder, read_image, train_and_test
from ddpm_utils.training import TrainState, train


@pytest.fixture
def pictures(own_folders, tmp_path):
    """A folder with one picture of each format, some below it, and files that are none."""
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "c.JPEG", "more/d.webp", "more/e.png")):
        pixels = rng.integers(0, 256, (40 + 7 * i, 60 - 5 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, format={"jpg": "JPEG", "JPEG": "JPEG"}.get(name.split(".")[-1]))
    (folder / "notes.txt").write_text("no picture")
    return folder


def flat(colour, size=(30, 20), mode="RGB"):
    return Image.new(mode, size, colour)


def test_finds_every_format_in_order_and_below(pictures):
    assert [path.name for path in find_images(pictures)] == ["a.png", "b.jpg", "c.JPEG", "d.webp", "e.png"]


def test_a_folder_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no picture: .png"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 48])
def test_one_tensor_of_uint8(pictures, size, channels):
    found = load_folder(pictures, size, channels)
    assert found.images.shape == (5, channels, size, size) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0] * 5 and found.classes == ("faces",) and found.title == "faces"


def test_colours_survive_and_grey_is_grey(tmp_path):
    flat((255, 0, 10)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", 4).flatten(1).unique(dim=1).tolist() == [[255], [0], [10]]
    flat(77, mode="L").save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", 4).unique().tolist() == [77]
    assert read_image(tmp_path / "grey.png", 4, 1).shape == (1, 4, 4)


def test_the_middle_is_kept_and_the_shorter_side_fits(tmp_path):
    wide = flat("black", (90, 30))
    wide.paste(flat("white", (30, 30)), (30, 0))
    wide.save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 30, 1).min() == 255


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "glass.png")
    assert read_image(tmp_path / "glass.png", 5).min() == 255
    Image.new("P", (10, 10), 0).save(tmp_path / "table.png", transparency=0)
    assert read_image(tmp_path / "table.png", 5).min() == 255


def test_a_photo_taken_upright_stands_upright(tmp_path):
    lying = flat("black", (40, 20))
    lying.paste(flat("white", (20, 20)), (0, 0))  # its left half is what belongs on top
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90° to the right
    lying.save(tmp_path / "photo.png", exif=exif)
    upright = read_image(tmp_path / "photo.png", 20, 1)[0].float()
    assert upright[:8].mean() > 250 and upright[12:].mean() < 5


def test_a_large_jpeg_is_what_it_is_in_full(tmp_path):
    """Decoding at a fraction of the size is a short cut, and must not be seen."""
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (1024, 1024)).copy()).save(tmp_path / "ramp.jpg", quality=95)
    got = read_image(tmp_path / "ramp.jpg", 16, 1)[0, 8].float()
    expected = torch.from_numpy(ramp.reshape(16, 64).mean(axis=1)).float()
    assert (got - expected).abs().max() < 4


def test_unreadable_files_are_named_counted_and_left_out(pictures, capsys):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "bad.png").write_bytes(b"no picture at all")
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = load_folder(pictures, 8)
    said = capsys.readouterr().out
    assert len(found) == 5 and "2 of 7 files" in said and "bad.png, cut.png" in said and "left out" in said
    with pytest.raises(ValueError, match="2 of 7 files.*bad.png"):
        load_folder(pictures, 8, strict=True)


def test_a_folder_of_nothing_but_damaged_files(own_folders, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="9 of 9 files.*4.png and others"):
        load_folder(tmp_path, 8)


@pytest.mark.parametrize("size, channels", [(0, 3), (8, 2), (8, 4)])
def test_bad_numbers_are_refused_and_not_taken_for_damaged_files(pictures, size, channels):
    with pytest.raises(ValueError, match=f"image_size={size}, channels={channels}"):
        load_folder(pictures, size, channels)


def test_read_once_and_again_when_a_file_changes(pictures, monkeypatch):
    reads = []
    monkeypatch.setattr(folders, "read_image", lambda path, *rest: reads.append(path.name) or read_image(path, *rest))
    first = load_folder(pictures, 8)
    assert len(reads) == 5
    assert torch.equal(load_folder(pictures, 8).images, first.images) and len(reads) == 5
    load_folder(pictures, 16)
    assert len(reads) == 10
    flat("white").save(pictures / "a.png")
    os.utime(pictures / "a.png", (time.time() + 5, time.time() + 5))
    assert load_folder(pictures, 8).images[0].min() == 255 and len(reads) == 15


def test_a_cache_that_cannot_be_written_is_a_warning(pictures, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert len(load_folder(pictures, 8)) == 5


def test_progress_is_told(pictures):
    told = []
    load_folder(pictures, 8, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_border_is_black_and_inside_the_size(tmp_path):
    flat("white").save(tmp_path / "white.png")
    image = read_image(tmp_path / "white.png", 12, 1, pad=2)
    assert image.shape == (1, 12, 12) and image[:, 2:-2, 2:-2].min() == 255
    assert image.sum() == 255 * 8 * 8


# held out, and left on disk


@pytest.fixture
def numbered(own_folders, tmp_path):
    """120 pictures of one grey each, its number."""
    for i in range(120):
        flat(i, (9, 9), "L").save(tmp_path / f"{i:03}.png")
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
def test_every_fiftieth_picture_is_held_out(numbered, stream):
    part, held_out = train_and_test(numbered, 8, 1, stream=stream)
    assert held_out.images[:, 0, 0, 0].tolist() == [0, 50, 100]
    shown = part.images[torch.arange(len(part))]
    assert shown.dtype == torch.uint8 and tuple(shown.shape) == tuple(part.images.shape) == (117, 1, 8, 8)
    assert shown[:, 0, 0, 0].tolist() == [i for i in range(120) if i % 50]
    assert len(part.labels) == 117 and part.title == numbered.name


def test_of_many_pictures_about_a_thousand_are_held_out(monkeypatch, numbered):
    monkeypatch.setattr(folders, "MOST_HELD_OUT", 2)
    assert len(train_and_test(numbered, 8, 1)[1]) == 2


def test_one_picture_is_too_few(own_folders, tmp_path):
    flat("red").save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="holds 1 picture.*at least 2"):
        train_and_test(tmp_path, 8)


@pytest.mark.parametrize(("free", "kind"), [(4 * 120 * 64, torch.Tensor), (4 * 120 * 64 - 1, FolderImages)])
def test_what_fills_more_than_a_quarter_of_the_free_memory_stays_on_disk(numbered, monkeypatch, capsys, free, kind):
    monkeypatch.setattr(runtime, "free_memory", lambda device: free)
    assert isinstance(train_and_test(numbered, 8, 1)[0].images, kind)
    assert ("left on disk" in capsys.readouterr().out) == (kind is FolderImages)


def test_a_streamed_run_and_its_resumption_are_the_run_in_memory_bit_for_bit(numbered, tiny, net):
    """With dropout, whose masks come from the global generator, which a DataLoader draws from if it is let."""
    cfg = tiny(dataset="./numbered", dropout=0.2, epochs=0.3, pad=1)

    def losses(stream, stop=None):
        images = train_and_test(numbered, 8, 1, pad=1, stream=stream)[0].images
        torch.manual_seed(3)
        state, found = TrainState(cfg, net(cfg)), []
        while len(found) < cfg.steps(len(images)):
            for record in train(state, images):
                found.append(record.loss)
                state.stopped = record.step == stop
        return found

    in_memory = losses(False)
    assert len(in_memory) == 9 and losses(True) == in_memory and losses(True, stop=4) == in_memory


def test_batches_come_in_the_order_that_was_foretold(numbered):
    images = FolderImages(find_images(numbered), 8, 1)
    order = [torch.tensor([5, 3]), torch.tensor([7])]
    with images.ahead(order):
        assert images[order[0]][:, 0, 0, 0].tolist() == [5, 3]
        with pytest.raises(IndexError, match="not the batch that comes next"):
            images[order[0]]
    assert images[order[0]][:, 0, 0, 0].tolist() == [5, 3]


def test_a_damaged_file_of_a_stream_is_named_in_one_line(numbered):
    (numbered / "007.png").write_bytes(b"no picture")
    images, picked = FolderImages(find_images(numbered), 8, 1), torch.tensor([6, 7])
    with pytest.raises(ValueError, match="^[^\n]*007.png cannot be read: delete it, or mend it$"):
        images[picked]
    with (
        images.ahead([picked]),
        pytest.raises(ValueError, match="^[^\n]*007.png cannot be read: delete it, or mend it$"),
    ):
        images[picked]
