"""A folder of images of every kind becomes one tensor or a stream; what cannot be read is named."""

import contextlib
import json
import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_utils import data, folders, runtime
from ddpm_utils.folders import FolderImages, find_images, load_folder, read_image, train_and_test
from ddpm_utils.runs import train
from ddpm_utils.training import TrainState


@pytest.fixture
def faces(own_folders, tmp_path):
    """A folder with one image of each format, some below it, and a file that is none."""
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "c.JPEG", "more/d.webp", "more/e.png")):
        pixels = rng.integers(0, 256, (40 + 7 * i, 60 - 5 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def flat(color, size=(30, 20), mode="RGB"):
    return Image.new(mode, size, color)


def test_finds_every_format_in_order_and_below(faces):
    assert [path.name for path in find_images(faces)] == [
        "a.png",
        "b.jpg",
        "c.JPEG",
        "d.webp",
        "e.png",
    ]


def test_a_folder_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no image: expected files of these formats: PNG"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 48])
def test_one_tensor_of_uint8(faces, size, channels):
    found = load_folder(faces, size, channels)
    assert found.images.shape == (5, channels, size, size) and found.images.dtype == torch.uint8
    assert (
        found.labels.tolist() == [0] * 5 and found.classes == ("faces",) and found.title == "faces"
    )


def test_colors_survive_and_gray_is_gray(tmp_path):
    flat((255, 0, 10)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", 4).flatten(1).unique(dim=1).tolist() == [
        [255],
        [0],
        [10],
    ]
    flat(77, mode="L").save(tmp_path / "gray.png")
    assert read_image(tmp_path / "gray.png", 4).unique().tolist() == [77]
    assert read_image(tmp_path / "gray.png", 4, 1).shape == (1, 4, 4)


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
    Image.fromarray(np.broadcast_to(ramp, (1024, 1024)).copy()).save(
        tmp_path / "ramp.jpg", quality=95
    )
    got = read_image(tmp_path / "ramp.jpg", 16, 1)[0, 8].float()
    expected = torch.from_numpy(ramp.reshape(16, 64).mean(axis=1)).float()
    assert (got - expected).abs().max() < 4


def test_unreadable_files_are_named_counted_and_left_out(faces, capsys):
    whole = (faces / "a.png").read_bytes()
    (faces / "bad.png").write_bytes(b"no image at all")
    (faces / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = load_folder(faces, 8)
    said = capsys.readouterr().out
    assert len(found) == 5 and "2 of 7 files" in said and "left out" in said
    assert "bad.png (UnidentifiedImageError), cut.png (OSError: " in said
    with pytest.raises(ValueError, match="2 of 7 files.*bad.png"):
        load_folder(faces, 8, strict=True)


def test_a_folder_of_nothing_but_damaged_files(own_folders, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(
        ValueError,
        match=r"9 of 9 files.*4.png \(UnidentifiedImageError\) and others; repair or remove",
    ):
        load_folder(tmp_path, 8)


@pytest.mark.parametrize(
    "size, channels, pad", [(0, 3, 0), (8, 2, 0), (8, 4, 0), (8, 3, 4), (8, 3, -1)]
)
def test_bad_numbers_are_refused_and_not_taken_for_damaged_files(faces, size, channels, pad):
    for read in (load_folder, train_and_test, read_image):
        with pytest.raises(
            ValueError, match=f"^image_size={size}, channels={channels}, pad={pad}: "
        ):
            read(faces, size, channels, pad=pad)


def test_read_once_and_again_when_a_file_changes(faces, monkeypatch):
    reads = []
    decode = folders._decode
    monkeypatch.setattr(
        folders, "_decode", lambda path, *rest: reads.append(path.name) or decode(path, *rest)
    )
    first = load_folder(faces, 8)
    assert len(reads) == 5
    assert torch.equal(load_folder(faces, 8).images, first.images) and len(reads) == 5
    load_folder(faces, 16)
    assert len(reads) == 10
    flat("white").save(faces / "a.png")
    os.utime(faces / "a.png", (time.time() + 5, time.time() + 5))
    assert load_folder(faces, 8).images[0].min() == 255 and len(reads) == 15


def test_a_cache_that_cannot_be_written_is_a_warning(faces, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert len(load_folder(faces, 8)) == 5


def test_progress_is_told(faces):
    told = []
    load_folder(faces, 8, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_border_is_black_and_inside_the_size(tmp_path):
    flat("white").save(tmp_path / "white.png")
    image = read_image(tmp_path / "white.png", 12, 1, pad=2)
    assert image.shape == (1, 12, 12) and image[:, 2:-2, 2:-2].min() == 255
    assert image.sum() == 255 * 8 * 8


# held out, and left on disk


@pytest.fixture
def numbered(own_folders, tmp_path):
    """120 images of one gray each, its number."""
    for i in range(120):
        flat(i, (9, 9), "L").save(tmp_path / f"{i:03}.png")
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
def test_every_fiftieth_image_is_held_out(numbered, stream):
    part, held_out = train_and_test(numbered, 8, 1, stream=stream)
    assert held_out.images[:, 0, 0, 0].tolist() == [0, 50, 100]
    shown = part.images[torch.arange(len(part))]
    assert shown.dtype == torch.uint8 and tuple(shown.shape) == tuple(part.images.shape) == (
        117,
        1,
        8,
        8,
    )
    assert shown[:, 0, 0, 0].tolist() == [i for i in range(120) if i % 50]
    assert len(part.labels) == 117 and part.title == numbered.name


def test_of_many_images_about_a_thousand_are_held_out(monkeypatch, numbered):
    monkeypatch.setattr(folders, "MOST_HELD_OUT", 2)
    assert len(train_and_test(numbered, 8, 1)[1]) == 2


def test_one_image_is_too_few(own_folders, tmp_path):
    flat("red").save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="holds 1 image.*at least 2"):
        train_and_test(tmp_path, 8)


@pytest.mark.parametrize(
    ("free", "kind"), [(4 * 120 * 64, torch.Tensor), (4 * 120 * 64 - 1, FolderImages)]
)
def test_what_fills_more_than_a_quarter_of_the_free_memory_stays_on_disk(
    numbered,
    monkeypatch,
    capsys,
    free,
    kind,
):
    monkeypatch.setattr(runtime, "free_memory", lambda device: free)
    assert isinstance(train_and_test(numbered, 8, 1)[0].images, kind)
    assert ("left on disk" in capsys.readouterr().out) == (kind is FolderImages)


def test_a_streamed_run_and_its_resumption_are_the_run_in_memory_bit_for_bit(numbered, tiny, net):
    """With dropout, whose masks come from the global generator, from which
    a DataLoader might draw.
    """
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


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("how", ["damaged", "deleted"])
def test_a_file_that_goes_bad_after_the_check_is_named_in_one_line(numbered, how, ahead):
    """The cure must let `--resume` go on, which wants the same images."""
    images = train_and_test(numbered, 8, 1, stream=True)[0].images
    file, picked = numbered / "007.png", torch.tensor([5, 6])  # 000 is held out
    file.write_bytes(b"no image") if how == "damaged" else file.unlink()
    with images.ahead([picked]) if ahead else contextlib.nullcontext():
        with pytest.raises(
            ValueError, match=r"^.*007.png cannot be read \(\w+Error.*\): put the file back.*\Z"
        ):
            images[picked]


def test_a_stream_takes_indices_on_the_cpu_alone(numbered):
    """To bring them from a GPU would wait for it in every step."""
    with pytest.raises(ValueError, match="^picked is on meta, expected it on the CPU"):
        FolderImages(find_images(numbered), 8, 1)[torch.tensor([1], device="meta")]


# whatever Pillow opens comes out right or is named

RAMP = np.array([[0, 21845, 43690, 65535]], dtype=np.uint16)
EIGHT = [0, 85, 170, 255]


def png(rows, depth: int, kind: int, clear: bytes = b"") -> bytes:
    """A PNG file of one row of bytes, which Pillow cannot write in every depth."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    width = len(rows) * 8 // (depth * {0: 1, 2: 3, 4: 2}[kind])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + (chunk(b"tRNS", clear) if clear else b"")
        + pixels
        + chunk(b"IEND", b"")
    )


def tiff(
    content: bytes,
    width: int,
    bits: int,
    photometric: int = 1,
    order: str = "<",
    form: int = 1,
) -> bytes:
    """A TIFF file of one row. Photometric 0: 0 is white; form 1 is unsigned, 2 signed, 3 float."""
    tags = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: 1,
        279: len(content),
        339: form,
    }
    content += b"\0" * (len(content) % 2)
    out = (
        (b"II" if order == "<" else b"MM")
        + struct.pack(order + "HI", 42, 8 + len(content))
        + content
    )
    out += struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        out += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return out + struct.pack(order + "I", 0)


def stretched(path, width: int = 4) -> list[int]:
    """The gray values of a file of one row, made square, since the center alone would be seen."""
    with Image.open(path) as image:
        assert image.size == (width, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "PIL.ImageOps.fit",
            lambda image, size, method: image.resize((width, width), Image.Resampling.NEAREST),
        )
        return read_image(path, width, 1)[0, 0].tolist()


def big(values) -> bytes:
    return np.asarray(values).astype(">u2").tobytes()


def little(values) -> bytes:
    return np.asarray(values).astype("<u2").tobytes()


GRAY_FILES = {
    "png of 16 bits": ("png", png(big(RAMP), 16, 0), EIGHT),
    "png of 16 bits, white clear": ("png", png(big(RAMP), 16, 0, big([0])), [255, 85, 170, 255]),
    "png of 16 bits, rounded": ("png", png(big([0, 128, 129, 65406]), 16, 0), [0, 0, 1, 254]),
    "png of 4 bits, clear": ("png", png(b"\x05\xaf", 4, 0, b"\0\x05"), [0, 255, 170, 255]),
    "png of 2 bits, clear": ("png", png(b"\x1b", 2, 0, b"\0\x01"), [0, 255, 170, 255]),
    "png of 16 bits with alpha": (
        "png",
        png(big([0, 65535, 21845, 65535, 43690, 65535, 0, 0]), 16, 4),
        EIGHT,
    ),
    "rgb png of 16 bits, clear": (
        "png",
        png(big([0x1234] * 3 + [21845] * 3 + [43690] * 3 + [65535] * 3), 16, 2, big([0x1234] * 3)),
        [255, 85, 170, 255],
    ),
    "pgm of 16 bits": ("pgm", b"P5 4 1 65535\n" + big(RAMP), EIGHT),
    "pgm of 10 bits": ("pgm", b"P5 4 1 1023\n" + big([0, 341, 682, 1023]), EIGHT),
    "tiff of 16 bits": ("tif", tiff(little(RAMP), 4, 16), EIGHT),
    "tiff of 16 bits, big-endian": ("tiff", tiff(big(RAMP), 4, 16, order=">"), EIGHT),
    "tiff of 16 bits, 0 is white": ("tif", tiff(little(RAMP), 4, 16, photometric=0), EIGHT[::-1]),
    "tiff of 12 bits": ("tif", tiff(bytes.fromhex("000555aaafff"), 4, 12), EIGHT),
    "tiff of 8 bits, 0 is white": ("tif", tiff(bytes(EIGHT), 4, 8, photometric=0), EIGHT[::-1]),
    "tiff of 4 bits": ("tif", tiff(b"\x05\xaf", 4, 4), EIGHT),
}


@pytest.mark.parametrize("case", GRAY_FILES)
def test_every_depth_of_gray_has_the_right_values(tmp_path, case):
    suffix, content, expected = GRAY_FILES[case]
    (tmp_path / f"ramp.{suffix}").write_bytes(content)
    assert stretched(tmp_path / f"ramp.{suffix}") == expected


def test_a_ramp_of_16_bits_is_not_clipped(tmp_path):
    """Scaling after the reduction to 8 bits: within 1 of the same ramp as an image of 8 bits."""
    ramp = np.broadcast_to(np.linspace(0, 65535, 64).astype(np.uint16), (64, 64))
    Image.fromarray(ramp.copy()).save(tmp_path / "deep.png")
    Image.fromarray(np.round(ramp / 257).astype(np.uint8)).save(tmp_path / "flat.png")
    deep, eight = (read_image(tmp_path / name, 4)[0, 0].int() for name in ("deep.png", "flat.png"))
    assert (deep - eight).abs().max() <= 1
    expected = torch.linspace(0, 255, 64).view(4, 16).mean(1)
    assert (deep - expected).abs().max() < 4  # a clipped one is 203, 255, 255, 255


RED = (200, 30, 60)
MODE_FILES = {  # mode: (suffix, image in that mode, options, the color that is seen)
    "1": ("png", flat("black").convert("1"), {}, (0, 0, 0)),
    "L": ("bmp", flat(77, mode="L"), {}, (77, 77, 77)),
    "LA": ("png", flat((77, 128), mode="LA"), {}, (166, 166, 166)),
    "P": ("gif", flat(RED).quantize(4), {}, RED),
    "P with one clear color": ("gif", flat(RED).quantize(4), {"transparency": 0}, (255, 255, 255)),
    "P with an alpha for each color": (
        "png",
        flat(RED).quantize(4),
        {"transparency": b"\x80"},
        (227, 142, 157),
    ),
    "PA": ("tif", flat(RED).quantize(4).convert("PA"), {}, RED),
    "RGB": ("jfif", flat(RED), {"quality": 100}, RED),
    "RGB as avif": ("avif", flat(RED), {"quality": 100}, RED),
    "RGB as jp2": ("jp2", flat(RED), {}, RED),
    "RGBA": ("webp", flat((*RED, 128), mode="RGBA"), {"lossless": True}, (227, 142, 157)),
    "RGBX": ("tif", flat((*RED, 0), mode="RGBX"), {}, RED),
    "CMYK": ("tif", flat((55, 225, 195, 0), mode="CMYK"), {}, RED),
    "CMYK of Adobe": ("jpg", flat((55, 225, 195, 0), mode="CMYK"), {"quality": 100}, RED),
    "YCbCr": ("tif", flat(RED).convert("YCbCr"), {}, RED),
    "LAB": ("tiff", flat(RED).convert("LAB"), {}, RED),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODE_FILES)
def test_every_mode_has_the_right_color(tmp_path, mode, channels):
    suffix, image, options, color = MODE_FILES[mode]
    form = {"jfif": "JPEG"}.get(suffix)
    image.save(tmp_path / f"a.{suffix}", format=form, **options)
    expected = torch.tensor(color if channels == 3 else [np.dot(color, (0.299, 0.587, 0.114))])
    got = read_image(tmp_path / f"a.{suffix}", 4, channels)[:, 0, 0]
    assert (got - expected).abs().max() <= 2


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (tiff(struct.pack("<4f", 0, 0.5, 1, 2), 4, 32, form=3), "F"),
        (tiff(struct.pack("<4I", 0, 1, 2, 3), 4, 32), "I"),
        (tiff(little(RAMP), 4, 16, form=2), "I"),
        (tiff(bytes(EIGHT), 4, 8, form=2), "L"),
    ],
    ids=["float", "32 bits", "16 bits with sign", "8 bits with sign"],
)
def test_pixels_without_an_agreed_range_are_named(faces, capsys, content, mode):
    (faces / "deep.tif").write_bytes(content)
    assert len(load_folder(faces, 8)) == 5
    reason = f"mode {mode} has no agreed range: convert it to 8 or 16 bits"
    assert f"deep.tif (ValueError: {reason}); left out" in capsys.readouterr().out


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    for suffix in ("gif", "png", "webp", "tif"):
        flat("black").save(tmp_path / f"a.{suffix}", save_all=True, append_images=[flat("white")])
        assert read_image(tmp_path / f"a.{suffix}", 4).max() == 0


def test_upper_case_suffixes_are_read_and_other_files_counted(faces, capsys):
    for suffix in (".BMP", ".TIF", ".Gif"):
        flat("red").save(faces / f"z{suffix}")
    for name in (
        "b.heic",
        "c.heic",
        "list",
        "._a.jpg",
        ".DS_Store",
        ".hidden/a.jpg",
        "__MACOSX/a.jpg",
    ):
        (faces / name).parent.mkdir(exist_ok=True)
        (faces / name).write_bytes(b"")
    for stream in (False, True):
        assert sum(map(len, train_and_test(faces, 8, stream=stream))) == 8
        said = capsys.readouterr().out
        assert said.startswith("data: 8 images of 8×8, RGB, from ") and said.count("\n") == 1
        assert said.endswith("; 4 other files passed over (.heic, no suffix, .txt)\n")


def test_a_folder_of_other_files_alone_says_what_is_there(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.heic").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds no image; 3 other files passed over \(.heic\): expected files"
    ):
        find_images(tmp_path)


# whatever decoding a file raises


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_costs_neither_the_image_nor_its_turn(
    own_folders, tmp_path, capsys, suffix
):
    """A rational of −1/0, on which Pillow's `exif_transpose` raises, and a pointer to nowhere."""
    lying = flat("black", (40, 20))
    lying.paste(flat("white", (20, 20)), (0, 0))
    turn = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    blocks = {
        "rational": turn + struct.pack(">HHII", 0x011A, 10, 1, 38) + struct.pack(">Iii", 0, -1, 0),
        "pointer": turn + struct.pack(">HHII", 0x8769, 4, 1, 0xFFFFFFF0) + bytes(4),
    }
    for name, block in blocks.items():
        lying.save(tmp_path / f"{name}.{suffix}", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + block)
    for i, block in enumerate((b"MM\0*\0\0\0\x08\0\x09\x01", b"MM\0*\0\0", b"neither II nor MM")):
        lying.save(tmp_path / f"x{i}.{suffix}", exif=b"Exif\0\0" + block)
    found = load_folder(tmp_path, 20, 1).images.float()
    assert len(found) == 5 and "cannot be read" not in capsys.readouterr().out
    assert found[:2, :, :8].mean() > 250 and found[:2, :, 12:].mean() < 5
    # the others say nothing that can be read
    assert found[2:, :, :, :8].mean() > 250 and found[2:, :, :, 12:].mean() < 5


def test_noise_is_not_taken_for_a_format_without_a_signature(tmp_path):
    flat("red").save(tmp_path / "a.png", format="TGA")
    with pytest.raises(OSError, match="cannot identify"):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize(
    "error",
    [
        struct.error,
        SyntaxError,
        ValueError,
        ZeroDivisionError,
        MemoryError,
        RecursionError,
        KeyError,
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_decoding_raises_names_the_file_and_spares_the_others(
    faces,
    monkeypatch,
    capsys,
    stream,
    error,
):
    decode = folders._decode

    def fail(path, *form):
        if path.name == "c.JPEG":
            raise error("bad")
        return decode(path, *form)

    monkeypatch.setattr(folders, "_decode", fail)
    assert sum(map(len, train_and_test(faces, 8, stream=stream))) == 4
    reason = f"{error.__name__}: {error('bad')}"
    assert (
        f"files in {runtime.short_path(faces)} cannot be read: c.JPEG ({reason}); left out"
        in capsys.readouterr().out
    )
    with pytest.raises(
        ValueError, match=r"1 of 5 files.*c.JPEG \(.*bad.*\); repair or remove them$"
    ):
        train_and_test(faces, 8, stream=stream, strict=True)


def test_ctrl_c_is_no_damaged_file(faces, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_decode", stop)
    with pytest.raises(KeyboardInterrupt):
        load_folder(faces, 8)


def test_pillow_warns_and_logs_in_silence(faces, monkeypatch, capfd, caplog):
    # a warning, and an error from twice as many on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    flat("red", (50, 41)).save(faces / "large.png")
    flat("red", (50, 81)).save(faces / "larger.png")
    many = tiff(bytes(10), 1, 8)
    (faces / "many.tif").write_bytes(
        many.replace(struct.pack("<HHIH", 277, 3, 1, 1), struct.pack("<HHIH", 277, 3, 1, 10))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_folder(faces, 8)
        read_image(faces / "large.png", 8)
    out, err = capfd.readouterr()
    assert len(found) > 0 and err == "" and caplog.records == []
    assert (
        "larger.png (DecompressionBombError" in out and "many.tif (UnidentifiedImageError)" in out
    )
    assert "large.png" not in out.replace("larger.png", "")


def test_names_of_any_bytes_are_named_in_one_line(faces, capsys):
    for name in (b"caf\xe9.png", b"two\nlines.png"):
        Path(os.fsdecode(os.fsencode(faces) + b"/" + name)).write_bytes(b"no")
    assert len(load_folder(faces, 8)) == 5
    said = capsys.readouterr().out
    assert r"caf\udce9.png" in said and r"two\nlines.png" in said and said.count("\n") == 2
    said.encode()


# the same images in memory and as a stream


def everything(folder, stream):
    """Pixels, paths' order and digests of both parts."""
    part, held_out = train_and_test(folder, 8, stream=stream)
    return part.images[torch.arange(len(part))], held_out.images, data.digest(part.images)


def test_memory_and_stream_hold_the_same_images_with_the_same_digest(faces):
    for i in range(60):
        flat((i, 9, 4 * i)).save(faces / f"{i}.png")
    (faces / "0.png").write_bytes(b"no image")  # which would be held out
    (faces / "33.png").write_bytes(b"")
    (faces / "._a.jpg").write_bytes(b"no image")
    (faces / "lost.png").symlink_to(faces / "nowhere.png")
    in_memory, streamed = everything(faces, False), everything(faces, True)
    assert len(in_memory[0]) == 61 and len(in_memory[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(in_memory[:2], streamed[:2], strict=True))
    assert in_memory[2] == streamed[2]
    whole = load_folder(faces, 8).images
    good = [path for path in find_images(faces) if path.name not in ("0.png", "33.png", "lost.png")]
    stream = FolderImages(good, 8)
    assert stream.digests == data.image_digests(whole)
    assert stream.only(torch.tensor([4, 2])).digests == [stream.digests[4], stream.digests[2]]


def test_a_stream_without_a_check_names_what_its_digest_meets(faces):
    (faces / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0.png cannot be read"):
        data.digest(FolderImages(find_images(faces), 8))


def test_the_check_of_a_stream_is_kept_and_told_of(faces, monkeypatch):
    (faces / "bad.png").write_bytes(b"no image")
    told, reads, decode = [], [], folders._decode
    monkeypatch.setattr(
        folders, "_decode", lambda path, *form: reads.append(path.name) or decode(path, *form)
    )
    tell = {"stream": True, "progress": lambda done, total: told.append((done, total))}
    first = data.digest(train_and_test(faces, 8, **tell)[0].images)
    assert told == [(i, 6) for i in range(1, 7)]
    reads.clear()
    assert data.digest(train_and_test(faces, 8, **tell)[0].images) == first
    # the one held out, and another try at the bad one
    assert set(reads) == {"a.png", "bad.png"} and len(told) == 6


# links, hidden and closed folders


def test_links_to_folders_are_followed_once_and_without_loops(own_folders, tmp_path):
    folder, other, unrelated = (tmp_path / name for name in ("set", "other", "unrelated"))
    for path in (folder / "a", other / "deep", unrelated):
        path.mkdir(parents=True)
        flat("red").save(path / "x.png")
    links = {
        "a/self": folder / "a",
        "a/root": folder,
        "a/again": folder / "b",
        "up": tmp_path,
        "b": other,
        "c": other,
        "one.png": unrelated / "x.png",
        "nowhere": tmp_path / "nowhere",
        "p": folder / "q",
        "q": folder / "p",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert [path.relative_to(folder).as_posix() for path in find_images(folder)] == [
        "a/x.png",
        "b/deep/x.png",
        "one.png",
    ]
    (tmp_path / "link").symlink_to(folder)
    assert len(find_images(tmp_path / "link")) == 3
    assert len(load_folder(tmp_path / "link", 8)) == 3


def test_a_folder_of_links_alone(own_folders, tmp_path):
    (tmp_path / "store").mkdir()
    flat("red").save(tmp_path / "store" / "x.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "more").symlink_to(Path("..") / "store")
    assert [path.name for path in find_images(tmp_path / "set")] == ["x.png"]


def test_a_pipe_is_not_read(faces):
    os.mkfifo(faces / "pipe.png")
    waiting = threading.Thread(target=load_folder, args=(faces, 8), daemon=True)
    waiting.start()
    waiting.join(30)
    assert not waiting.is_alive() and len(load_folder(faces, 8)) == 5


@pytest.fixture
def closed(monkeypatch):
    """Makes a folder one that may not be opened, also for root, whom permissions do not stop."""
    names, scandir = [], os.scandir

    def guarded(path="."):
        if Path(path).name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    return names.append


def test_a_folder_that_cannot_be_opened_is_named(faces, capsys, closed):
    closed("more")
    assert len(load_folder(faces, 8)) == 3
    reason = "more (PermissionError: Permission denied)"
    assert (
        f"data: 1 folder in {runtime.short_path(faces)} cannot be opened: {reason}; left out"
        in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="1 folder in .* cannot be opened: more"):
        load_folder(faces, 8, strict=True)
    closed("faces")
    with pytest.raises(
        PermissionError,
        match=r"^[^\n]*faces cannot be opened \(Permission denied\): allow reading it$",
    ):
        find_images(faces)


# what this project wrote itself


def run_files(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(
            json.dumps({"dataset": "x", "timesteps": 10}) if name == "config.json" else ""
        )
    for name in ("grid.png", "strip.png", "deeper/samples.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        flat("red").save(folder / name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("marks", [["last.pt"], ["best.pt"], ["config.json"], ["samples.json"]])
def test_folders_of_runs_and_samples_are_left_out(faces, capsys, marks, stream):
    run_files(faces / "more" / "run", *marks)
    assert sum(map(len, train_and_test(faces, 8, stream=stream))) == 5
    expected = (
        f"data: 1 folder of runs or samples in {runtime.short_path(faces)} left out: more/run\n"
    )
    assert expected in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=rf"more/run holds {marks[0]}.*: choose a folder that holds"
    ):
        load_folder(faces / "more" / "run", 8)


def test_the_outputs_folder_is_left_out_and_not_created(faces, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_OUTPUT_DIR", str(faces / "out"))
    find_images(faces)
    assert not (faces / "out").exists()
    run_files(faces / "out" / "lessons")
    (faces / "link").symlink_to(faces / "out")
    assert len(load_folder(faces, 8)) == 5
    assert (
        "1 folder of runs or samples" in (said := capsys.readouterr().out)
        and "left out: out\n" in said
    )
    with pytest.raises(ValueError, match="out is the folder of outputs or checkpoints: choose"):
        load_folder(faces / "out", 8)
    assert len(load_folder(faces / "out" / "lessons", 8)) == 3  # asked for by name


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"timesteps": 3}', "[" * 100_000])
def test_other_files_of_these_names_are_no_run(faces, content):
    (faces / "config.json").write_text(content)
    (faces / "samples.json").write_text(content)
    assert len(find_images(faces)) == 5


# the cache


def caches(root, kind):
    return list((root / "data" / "folders").glob(f"*-{kind}.pt"))


def garbage(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def overwritten_inside(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    file.write_bytes(content)


def folder_in_its_place(file):
    file.unlink()
    file.mkdir()
    (file / "x").write_text("")


class Pickled:
    """What no cache holds, and no unpickler may build."""


def rows_of(kind, n=5):
    return torch.ones(n, *((3, 8, 8) if kind == "images" else (8,)), dtype=torch.uint8)


DAMAGES = {
    "garbage": lambda file, kind: garbage(file),
    "cut": lambda file, kind: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file, kind: os.truncate(file, 0),
    "overwritten inside": lambda file, kind: overwritten_inside(file),
    "a folder": lambda file, kind: folder_in_its_place(file),
    "a link to nowhere": lambda file, kind: (file.unlink(), file.symlink_to("nowhere")),
    "another object": lambda file, kind: torch.save(Pickled(), file),
    "a list": lambda file, kind: torch.save([1, 2], file),
    "other keys": lambda file, kind: torch.save({"images": rows_of(kind), "bad": {}}, file),
    "another dtype": lambda file, kind: torch.save(
        {"rows": rows_of(kind).float(), "bad": {}}, file
    ),
    "another shape": lambda file, kind: torch.save(
        {"rows": rows_of(kind)[..., :4], "bad": {}}, file
    ),
    "too few rows": lambda file, kind: torch.save({"rows": rows_of(kind, 4), "bad": {}}, file),
    "bad files that are not there": lambda file, kind: torch.save(
        {"rows": rows_of(kind, 4), "bad": {9: ""}}, file
    ),
    "bad files without a reason": lambda file, kind: torch.save(
        {"rows": rows_of(kind, 4), "bad": {4: 1}}, file
    ),
    "bad files in a list": lambda file, kind: torch.save(
        {"rows": rows_of(kind, 4), "bad": [4]}, file
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_named_and_made_again(
    faces,
    own_folders,
    capsys,
    damage,
    stream,
):
    kind = "digests" if stream else "images"
    sound = everything(faces, stream)
    (cache,) = caches(own_folders, kind)
    DAMAGES[damage](cache, kind)
    named = f"data: the cache data/folders/{cache.name} is damaged and will be made again\n"
    for words in (named, ""):
        capsys.readouterr()
        found = everything(faces, stream)
        assert torch.equal(found[0], sound[0]) and found[2] == sound[2]
        said = capsys.readouterr().out
        assert said.startswith(words) and ("the cache" in said) == bool(words)
    assert caches(own_folders, kind) == [cache] and cache.is_file()


def test_a_folder_that_was_moved_finds_its_cache(faces, own_folders, monkeypatch):
    first = load_folder(faces, 8).images
    moved = faces.rename(faces.with_name("people"))
    monkeypatch.setattr(folders, "_decode", None)
    assert torch.equal(load_folder(moved, 8).images, first)


def test_two_folders_of_equal_names_sizes_and_dates_are_two(own_folders, tmp_path):
    """As from two archives that keep one date for all."""
    for name, color in (("one", "black"), ("two", "white")):
        (tmp_path / name).mkdir()
        flat(color).save(tmp_path / name / "x.bmp")
        os.utime(tmp_path / name / "x.bmp", (0, 0))
        assert load_folder(tmp_path / name, 8).images.unique().tolist() == [
            0 if color == "black" else 255
        ]


def test_a_file_that_could_not_be_read_is_tried_again(faces, monkeypatch):
    """Permissions and memory may have been given since, which no date tells."""
    decode = folders._decode
    refuse = {"a.png"}

    def guarded(path, *form):
        if path.name in refuse:
            raise PermissionError(13, "Permission denied")
        return decode(path, *form)

    monkeypatch.setattr(folders, "_decode", guarded)
    assert len(load_folder(faces, 8)) == len(load_folder(faces, 8)) == 4
    refuse.clear()
    assert len(load_folder(faces, 8)) == 5


def test_a_full_disk_leaves_no_part_of_a_cache(faces, own_folders, monkeypatch):
    def full(payload, file):
        file.write(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(
        RuntimeWarning, match="written .PytorchStreamWriter failed.*reads all files again"
    ):
        assert len(load_folder(faces, 8)) == 5
    assert not list((own_folders / "data" / "folders").iterdir())
