"""Folders of images of any size and shape, read as one uint8 tensor or as batches.

Batches are read where memory is short. Every file is read once before training. Files that cannot
be read are named and left out.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import signal
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import runtime
from .data import ImageSet, image_digests

# Pillow's names. Formats without a signature are left out: noise would be read as an image.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI")
MODES = {1: "L", 3: "RGB"}
TURNS = {  # EXIF's orientation, and what makes the image upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
MOST_NAMED = 5  # files or folders that are named before the rest is counted
LARGEST_SHARE = 0.25  # of the free memory for the tensor of all images; making it takes twice that
HELD_OUT_EVERY, MOST_HELD_OUT = 50, 1000  # one image in 50 is held out, but about 1,000 at most
SAMPLED = 16  # files whose first bytes go into the name of a cache


def find_images(folder: Path | str) -> list[Path]:
    """Return the image files in `folder` and below, sorted by name.

    The formats are those of `FORMATS` that the installed Pillow reads. Links are followed, and each
    folder is entered once. Hidden files and folders are left out, and so are the folders of runs
    and samples. Raises FileNotFoundError if there is no such folder, PermissionError if it cannot
    be opened, and ValueError if it holds no image or belongs to a run.
    """
    return _list(folder).paths


def read_image(path: Path | str, image_size: int, channels: int = 3, pad: int = 0) -> Tensor:
    """Return one file as a (channels, image_size, image_size) uint8 tensor.

    The image is turned upright, scaled so that its shorter side fits, and cropped in the center.
    Transparent areas become white; the outermost `pad` pixels are black. Only the first frame of an
    animation is read. Raises ValueError on invalid arguments and on pixels without an agreed range
    (floats, 32-bit integers). Raises Pillow's error if the file is damaged or is not an image.
    """
    _check_form(image_size, channels, pad)
    with _quiet():
        return _decode(Path(path), image_size, channels, pad)


def load_folder(
    folder: Path | str,
    image_size: int,
    channels: int = 3,
    strict: bool = False,
    say: bool = True,
    progress: Callable[[int, int], None] | None = None,
    pad: int = 0,
) -> ImageSet:
    """Load every image of a folder into one uint8 tensor.

    The tensor has the shape (N, channels, image_size, image_size). Files that cannot be read are
    named, counted and left out; with `strict`, they raise ValueError. The tensor is stored under
    `data/folders/` and read from there as long as no file has changed. `progress(done, total)` is
    called while the files are read. Raises as `find_images` and `read_image` do, and ValueError if
    no file can be read.
    """
    _check_form(image_size, channels, pad)
    listing = _list(folder)
    images, _ = _read_all(listing, (image_size, channels, pad), False, strict, progress)
    if say:
        _say(images.shape, listing)
    return _image_set(images, listing.folder)


def train_and_test(
    folder: Path | str,
    image_size: int,
    channels: int = 3,
    pad: int = 0,
    stream: bool | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    strict: bool = False,
) -> tuple[ImageSet, ImageSet]:
    """Return the images of a folder to train on, and the images held out.

    Every 50th image is held out, from 1 to about 1,000 in all. With `stream`, the images to train
    on stay on disk, as `FolderImages`. By default, they do so if a tensor of all images would take
    more than a quarter of the memory that is free, on the CPU or on `device`. Both ways give the
    same images: every file is read once beforehand, and files that cannot be read are left out, or
    raise ValueError with `strict`. The other arguments and the errors are those of `load_folder`.
    Also raises ValueError if only one image can be read.
    """
    form = (image_size, channels, pad)
    _check_form(*form)
    # list the files and decide whether the images fit in memory
    listing = _list(folder)
    size = len(listing.paths) * channels * image_size**2
    if stream is None:
        stream = size > LARGEST_SHARE * min(map(runtime.free_memory, ("cpu", device)))
    # read every file once
    rows, good = _read_all(listing, form, stream, strict, progress)
    if stream:
        whole = FolderImages(good, *form, digests=[bytes(row) for row in rows.numpy()])
        more = f", left on disk: they would fill {size / 2**30:.3g} GiB"
    else:
        whole, more = rows, ""
    _say(tuple(whole.shape), listing, more)
    # split off the held-out images
    n = len(whole)
    if n < 2:
        raise ValueError(
            f"{runtime.short_path(listing.folder)} holds 1 image that can be read, and at least 2 "
            "are needed, since one is held out: add images"
        )
    held_out = torch.arange(n) % max(HELD_OUT_EVERY, n // MOST_HELD_OUT) == 0
    train, test = (part.nonzero()[:, 0] for part in (~held_out, held_out))
    rest = whole.only(train) if stream else whole[train]
    return _image_set(rest, listing.folder), _image_set(whole[test], listing.folder)


class FolderImages:
    """Images that stay on disk, used in place of a uint8 tensor.

    The tensor would be (N, channels, image_size, image_size). The class has `shape`, `len` and
    `digests`, the `data.image_digests` of that tensor. `images[picked]`, with `picked` (B,) long on
    the CPU, reads these images as (B, channels, image_size, image_size). Raises ValueError that
    names the file if one cannot be read. Raises ValueError if the indices are on another device,
    because the host of a GPU would have to wait for them.
    """

    def __init__(
        self,
        paths: list[Path],
        image_size: int,
        channels: int = 3,
        pad: int = 0,
        digests: list[bytes] | None = None,
    ):
        _check_form(image_size, channels, pad)
        self.reader = _Reader(paths, (image_size, channels, pad))
        self.shape = (len(paths), channels, image_size, image_size)
        self.coming = None
        self._digests = digests

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def digests(self) -> list[bytes]:
        """A digest of the pixels of each image.

        Reads all files if the digests were not given.
        """
        if self._digests is None:
            rows, bad = _decode_all(self.reader.paths, self.reader.form, True, None)
            for i, reason in bad.items():
                raise ValueError(_gone(self.reader.paths[i], reason))
            self._digests = [bytes(row) for row in rows.numpy()]
        return self._digests

    def only(self, picked: Tensor) -> "FolderImages":
        """Return the images at the indices `picked`."""
        order = picked.tolist()
        digests = None if self._digests is None else [self._digests[i] for i in order]
        return FolderImages([self.reader.paths[i] for i in order], *self.reader.form, digests)

    @contextlib.contextmanager
    def ahead(self, order: Iterable[Tensor]):
        """Let workers read the batches of `order` in advance inside the `with` block.

        Batches must then be requested in this order.
        """
        order, later = itertools.tee(order)
        loader = DataLoader(
            self.reader,
            batch_size=None,
            sampler=later,
            num_workers=min(8, os.cpu_count() or 1),
            worker_init_fn=_ignore_stop,
            generator=torch.Generator(),  # else it would draw from the one that dropout draws from
        )
        self.coming = zip(order, loader, strict=True)
        try:
            yield
        finally:
            self.coming = None  # which ends the workers

    def __getitem__(self, picked: Tensor) -> Tensor:
        if picked.device.type != "cpu":
            raise ValueError(f"picked is on {picked.device}, expected it on the CPU: make it there")
        asked, found = (picked, self.reader[picked]) if self.coming is None else next(self.coming)
        if not torch.equal(asked, picked):
            raise IndexError("this is not the batch that comes next in the order given to `ahead`")
        if isinstance(found, str):
            raise ValueError(found)
        return found


class _Reader(Dataset):
    """The data set that the workers read from.

    An item is a batch, or an error message: an exception would be shown as a traceback.
    """

    def __init__(self, paths: list[Path], form: tuple[int, int, int]):
        self.paths, self.form = paths, form

    def __getitem__(self, picked: Tensor) -> Tensor | str:
        images = []
        with _quiet():
            for i in picked.tolist():
                image = _attempt(self.paths[i], self.form)
                if isinstance(image, str):
                    return _gone(self.paths[i], image)
                images.append(image)
        return torch.stack(images)


def _gone(path: Path, reason: str) -> str:
    """Return the message about a file that can no longer be read.

    Leaving the file out now would change the contents of the batches.
    """
    return f"{_printable(path)} cannot be read ({reason}): put the file back as it was"


def _ignore_stop(worker: int) -> None:
    """Let a worker ignore Ctrl-C, which reaches all processes.

    The main process finishes its step and then ends the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_form(image_size: int, channels: int, pad: int) -> None:
    if channels not in MODES or pad < 0 or image_size - 2 * pad < 1:
        raise ValueError(
            f"image_size={image_size}, channels={channels}, pad={pad}: expected at least one pixel "
            "inside the border, pad ≥ 0, and channels 1 (gray) or 3 (RGB)"
        )


# finding files


@dataclass
class _Listing:
    """The contents of a folder."""

    folder: Path
    # the image files in order, each with size and date, or None if these cannot be read
    files: dict[Path, tuple[int, int] | None] = field(default_factory=dict)
    others: Counter = field(default_factory=Counter)  # files of other kinds, by suffix
    runs: list[str] = field(default_factory=list)  # folders with images that this project made
    closed: dict[str, str] = field(default_factory=dict)  # folders that cannot be opened, and why

    @property
    def paths(self) -> list[Path]:
        return list(self.files)

    def name(self, path: Path | str) -> str:
        """Return `path` relative to the folder, in a printable form."""
        return _printable(Path(path).relative_to(self.folder).as_posix())


def _list(folder: Path | str) -> _Listing:
    """List everything in `folder` and below. Raises as `find_images` does."""
    listing, suffixes = _Listing(Path(folder)), _suffixes()
    shown = runtime.short_path(folder)
    if not listing.folder.is_dir():
        raise FileNotFoundError(f"no folder {shown}")
    # collect the image files and count the others
    files = {}
    for here, names in _walk(listing, shown):
        for name in names:
            path, suffix = here / name, Path(name).suffix.lower()
            if _is_hidden(name):
                continue
            found = _stat(path) if suffix in suffixes else None
            # Reading a pipe may never end. What has no stat is kept, so that it will be named.
            if suffix in suffixes and (found is None or stat.S_ISREG(found.st_mode)):
                files[path] = found and (found.st_size, found.st_mtime_ns)
            else:
                listing.others[suffix] += 1
    listing.files = {path: files[path] for path in sorted(files)}
    # explain why there are no images
    if not files:
        left_out = f"; {_runs_left_out(listing)}" if listing.runs else ""
        if listing.closed:
            left_out += f"; cannot be opened: {_with_reasons(listing.closed)}"
        raise ValueError(
            f"{shown} holds no image{_passed_over(listing)}{left_out}: "
            f"expected files of these formats: {', '.join(_formats())}"
        )
    return listing


def _walk(listing: _Listing, shown: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder that may hold images, once, with the names of its files.

    Records the other folders in `listing`.
    """

    def closed(error: OSError) -> None:
        if Path(error.filename) == listing.folder:
            raise type(error)(f"{shown} cannot be opened ({error.strerror}): allow reading it")
        listing.closed[listing.name(error.filename)] = _reason(error, Path(error.filename))

    root, entered = os.path.realpath(listing.folder), set()
    starts = [listing.folder]  # links to folders are added, so that real folders come first
    for start in starts:
        for where, below, names in os.walk(start, onerror=closed):
            here, real = Path(where), os.path.realpath(where)
            known, own = real in entered, _is_own(here, names)
            entered.add(real)
            if own and real == root:
                raise ValueError(f"{shown} {own}: choose a folder that holds only your images")
            if own and not known:
                listing.runs.append(listing.name(here))
            # A link to a folder around the root would bring in what lies beside the root.
            if own or known or (real != root and Path(root).is_relative_to(real)):
                below.clear()
                continue
            below[:] = sorted(name for name in below if not _is_hidden(name))
            starts += [here / name for name in below if os.path.islink(here / name)]
            yield here, names


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that `Image.open` of the installed Pillow accepts.

    MPO is not among them, because Pillow opens it as JPEG.
    """
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def _suffixes() -> set[str]:
    from PIL import Image

    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def _is_hidden(name: str) -> bool:
    """Return whether `name` starts with a dot or is `__MACOSX`.

    macOS writes files such as `._photo.jpg` beside a photo, or into `__MACOSX` in archives.
    """
    return name.startswith(".") or name == "__MACOSX"


def _stat(path: Path) -> os.stat_result | None:
    """Return the status of the file or of what it links to, or None if that is out of reach."""
    try:
        return path.stat()
    except OSError:
        return None


def _is_own(folder: Path, names: list[str]) -> str:
    """Return what shows that this project wrote into `folder`, or "" if nothing does."""
    bases = (runtime.output_path(), runtime.checkpoint_dir())
    if os.path.realpath(folder) in map(os.path.realpath, bases):
        return "is the folder of outputs or checkpoints"
    for name in ("last.pt", "best.pt"):
        if name in names:
            return f"holds {name} of a run"
    if {"samples.json", "grid.png"} <= {*names}:
        return "holds samples.json and grid.png of `sample`"
    if "config.json" in names:
        with contextlib.suppress(OSError, ValueError, RecursionError):  # then it is none of ours
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if isinstance(config, dict) and {"dataset", "timesteps"} <= config.keys():
                return "holds config.json of a run"
    return ""


# messages


def _image_set(images: Tensor | FolderImages, folder: Path) -> ImageSet:
    name, labels = folder.resolve().name, torch.zeros(len(images), dtype=torch.long)
    return ImageSet(images, labels, (name,), name, runtime.short_path(folder))


def _say(shape: tuple[int, ...], listing: _Listing, more: str = "") -> None:
    n, channels, height, width = shape
    form = f"{width}×{height}, {'RGB' if channels == 3 else 'gray'}"
    where = runtime.short_path(listing.folder)
    print(f"data: {_count(n, 'image')} of {form}, from {where}{more}{_passed_over(listing)}")


def _printable(name: Path | str) -> str:
    """Return `name` on one line, escaped if it holds characters that cannot be printed."""
    return str(name) if str(name).isprintable() else ascii(str(name))


def _named(names: Iterable[str]) -> str:
    first = [*itertools.islice(names, MOST_NAMED + 1)]
    return ", ".join(first[:MOST_NAMED]) + (" and others" if len(first) > MOST_NAMED else "")


def _with_reasons(reasons: dict[str, str]) -> str:
    return _named(f"{name} ({reason})" for name, reason in reasons.items())


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _passed_over(listing: _Listing) -> str:
    """Return text such as "; 3 other files passed over (.heic, .txt)", or "" if there are none."""
    if not listing.others:
        return ""
    others = listing.others
    kinds = sorted(others, key=lambda suffix: (-others[suffix], suffix))
    named = _named(_printable(suffix) or "no suffix" for suffix in kinds)
    return f"; {_count(others.total(), 'other file')} passed over ({named})"


def _runs_left_out(listing: _Listing) -> str:
    n, where = _count(len(listing.runs), "folder"), runtime.short_path(listing.folder)
    return f"{n} of runs or samples in {where} left out: {_named(listing.runs)}"


def _tell(listing: _Listing, bad: dict[int, str], strict: bool) -> None:
    """Print what is left out.

    Raises ValueError if `strict` is set and something is left out, or if no file can be read.
    """
    where, paths = runtime.short_path(listing.folder), listing.paths
    if listing.runs:
        print(f"data: {_runs_left_out(listing)}")
    problems = []
    if listing.closed:
        folders = f"{_count(len(listing.closed), 'folder')} in {where}"
        problems.append(f"{folders} cannot be opened: {_with_reasons(listing.closed)}")
    if bad:
        files = f"{len(bad):,} of {_count(len(paths), 'file')} in {where}"
        reasons = {listing.name(paths[i]): reason for i, reason in bad.items()}
        problems.append(f"{files} cannot be read: {_with_reasons(reasons)}")
    if problems and (strict or len(bad) == len(paths)):
        raise ValueError("; ".join(problems) + "; repair or remove them")
    for problem in problems:
        print(f"data: {problem}; left out")


# reading files


@contextlib.contextmanager
def _quiet():
    """Silence Pillow, whose warnings do not name the file.

    This applies to all threads, so use it around them and not inside.
    """
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _decode(path: Path, image_size: int, channels: int, pad: int) -> Tensor:
    from PIL import Image, ImageOps

    size = image_size - 2 * pad
    with Image.open(path, formats=_formats()) as file:
        # lets a JPEG decode at a fraction of its size
        file.draft(MODES[channels], (2 * size, 2 * size))
        image = _upright(_eight_bits(file), file).convert(MODES[channels])
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).view(size, size, channels)
    return F.pad(pixels.movedim(2, 0), [pad] * 4).contiguous()


def _eight_bits(file):
    """Return the image in an open file in mode L or RGB, on white where it is transparent.

    Raises ValueError on pixels without an agreed range.
    """
    from PIL import Image

    _scale_clear_color(file)
    file.load()
    tags = file.tag_v2 if file.format == "TIFF" else {}
    wide = file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM"))
    signed_or_float = {2, 3} & {*tags.get(339, ())}  # SampleFormat
    if signed_or_float or (file.mode in ("I", "F") and not wide):
        raise ValueError(f"mode {file.mode} has no agreed range: convert it to 8 or 16 bits")
    if wide:  # which Pillow itself would clip at 255
        values = np.asarray(file).astype(np.uint32)
        top = 2 ** max(tags.get(258, (16,))) - 1  # BitsPerSample
        if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
            values = top - values
        gray = ((255 * values + top // 2) // top).astype(np.uint8)
        if "transparency" in file.info:
            gray[values == file.info["transparency"]] = 255
        return Image.fromarray(gray)
    if file.has_transparency_data:
        image = file.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return file.convert("L" if file.mode == "L" else "RGB")


def _scale_clear_color(file) -> None:
    """Convert the transparent color of a PNG to 8 bits; Pillow itself converts only the pixels."""
    if file.format == "PNG" and "transparency" in file.info:
        color, raw = file.info["transparency"], file.tile[0][3]
        if raw == "RGB;16B":
            file.info["transparency"] = tuple(value >> 8 for value in color)
        elif raw in ("L;2", "L;4"):
            file.info["transparency"] = color * (85 if raw == "L;2" else 17)


def _upright(image, file):
    """Return `image`, turned as the EXIF block of `file` says.

    A damaged block is ignored.
    """
    from PIL.Image import Transpose

    orientation = None
    with contextlib.suppress(Exception):  # a damaged block must not lose the image
        orientation = file.getexif().get(0x0112)
    return image.transpose(Transpose[TURNS[orientation]]) if orientation in TURNS else image


def _attempt(path: Path, form: tuple[int, int, int]) -> Tensor | str:
    """Return the image, or the reason why it cannot be read.

    All exceptions are caught, because Pillow raises errors of many classes.
    """
    try:
        return _decode(path, *form)
    except Exception as error:
        return _reason(error, path)


def _reason(error: Exception, path: Path) -> str:
    """Return the class and message of `error` in one line.

    A message that repeats the path is left out.
    """
    words = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return type(error).__name__ + (f": {words}" if words and path.name not in words else "")


def _decode_all(
    paths: list[Path],
    form: tuple[int, int, int],
    only_digests: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, dict[int, str]]:
    """Return a row for each file that can be read, and {number: reason} for the others.

    A row is an image (channels, image_size, image_size) or, to save memory, its digest (8,). Both
    are uint8.
    """

    def row(path: Path) -> Tensor | str:
        image = _attempt(path, form)
        if isinstance(image, str) or not only_digests:
            return image
        return torch.tensor([*image_digests(image[None])[0]], dtype=torch.uint8)

    rows, bad = [], {}
    workers = min(32, 2 * (os.cpu_count() or 1))
    with _quiet(), ThreadPoolExecutor(workers) as threads:
        for i, found in enumerate(threads.map(row, paths)):
            if isinstance(found, str):
                bad[i] = found
            else:
                rows.append(found)
            if progress is not None:
                progress(i + 1, len(paths))
    return torch.stack(rows) if rows else torch.empty(0), bad


def _read_all(
    listing: _Listing,
    form: tuple[int, int, int],
    only_digests: bool,
    strict: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, list[Path]]:
    """Return rows as in `_decode_all`, and the paths of these images.

    The rows come from the cache if it holds them.
    """
    paths, (size, channels, _) = listing.paths, form
    kind, shape = ("digests", (8,)) if only_digests else ("images", (channels, size, size))
    cache = runtime.data_dir() / "folders" / f"{_fingerprint(listing, form)}-{kind}.pt"
    rows, bad = _kept(cache, len(paths), shape) or (None, {})
    with _quiet():  # what failed before may have failed for lack of permission or of memory
        mended = any(isinstance(_attempt(paths[i], form), Tensor) for i in bad)
    if rows is None or mended:
        rows, bad = _decode_all(paths, form, only_digests, progress)
        if len(rows):
            _keep(cache, {"rows": rows, "bad": bad})
    _tell(listing, bad, strict)
    return rows, [path for i, path in enumerate(paths) if i not in bad]


# the cache


def _fingerprint(listing: _Listing, form: tuple[int, int, int]) -> str:
    """Return a hash that changes with the form and with any file's name, size or date.

    It does not change with the location of the folder.
    """
    paths = listing.paths
    seen = [(path.relative_to(listing.folder).as_posix(), listing.files[path]) for path in paths]
    digest = hashlib.sha256(repr((seen, form)).encode())
    # Unpacked archives may give all files of two folders the same names, sizes and dates.
    for path in paths[:: max(1, len(paths) // SAMPLED)]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def _kept(cache: Path, n: int, shape: tuple[int, ...]) -> tuple[Tensor, dict[int, str]] | None:
    """Return rows of this shape and {number: reason} for n files, or None.

    Prints a message if the cache is damaged.
    """
    if not os.path.lexists(cache):
        return None
    try:
        with zipfile.ZipFile(cache) as file:
            sound = file.testzip() is None  # the checksums, which `torch.load` does not look at
        kept = torch.load(cache, map_location="cpu", weights_only=True)
        rows, bad = kept["rows"], kept["bad"]
        sound = sound and rows.dtype == torch.uint8 and rows.shape == (n - len(bad), *shape)
        sound = sound and {*bad} <= {*range(n)} and all(isinstance(bad[i], str) for i in bad)
    except Exception:
        sound = False
    if sound:
        return rows, bad
    print(f"data: the cache {runtime.short_path(cache)} is damaged and will be made again")
    return None


def _keep(cache: Path, payload: dict) -> None:
    """Write the cache; a failure is only a warning, because it costs nothing but time."""
    try:
        if cache.is_dir():  # no file can take its place
            cache.rename(cache.with_suffix(".damaged"))
        with runtime.whole_file(cache) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, on a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        words = f"{runtime.short_path(cache)} could not be written ({reason})"
        words += ": the next start reads all files again"
        warnings.warn(words, RuntimeWarning, stacklevel=4)
