"""Folders of pictures, of any size and shape: read into one uint8 tensor, or, where memory is short, a batch at a time."""

import contextlib
import hashlib
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import runtime
from .data import ImageSet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODES = {1: "L", 3: "RGB"}
MOST_NAMED = 5  # unreadable files that are named before the rest is counted
LARGEST_SHARE = 0.25  # of the free memory, that a tensor of all pictures may take; to make it takes twice as much
HELD_OUT_EVERY, MOST_HELD_OUT = 50, 1000  # one picture in so many is held out of training, and no more than these


def find_images(folder: Path | str) -> list[Path]:
    """The PNG, JPEG and WebP files in `folder` and below, by name, in order.

    Raises FileNotFoundError if there is no such folder, ValueError if it holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {runtime.short_path(folder)}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{runtime.short_path(folder)} holds no picture: {', '.join(SUFFIXES)} are read")
    return found


def read_image(path: Path | str, image_size: int, channels: int = 3, pad: int = 0) -> Tensor:
    """One file as (channels, image_size, image_size) uint8: upright, scaled so that the shorter side fits, cut in the middle.

    What is transparent becomes white; the outermost `pad` pixels are black. Raises OSError on a file that is no picture or is
    cut short, ValueError on bad numbers.
    """
    from PIL import Image, ImageOps

    size = image_size - 2 * pad
    if channels not in MODES or size < 1:
        raise ValueError(
            f"image_size={image_size}, channels={channels}, pad={pad}: expected a pixel at least, and 1 (grey) or 3 (RGB)"
        )
    with Image.open(path) as image:
        image.draft(MODES[channels], (2 * size, 2 * size))  # lets a JPEG decode at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        image = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).view(size, size, channels)
    return F.pad(pixels.movedim(2, 0), [pad] * 4).contiguous()


def load_folder(folder: Path | str, image_size: int, channels: int = 3, strict: bool = False, say: bool = True,
                progress: Callable[[int, int], None] | None = None, pad: int = 0) -> ImageSet:  # fmt: skip
    """Every picture of a folder in one uint8 tensor (N, channels, image_size, image_size), by threads.

    Files that cannot be read are named, counted and left out; with `strict` they raise ValueError. The tensor is kept under
    `data/folders/` and read from there as long as no file has changed. `progress(done, total)` is told how far it is.
    Raises as `find_images` does, and ValueError if no file can be read.
    """
    paths, folder = find_images(folder), Path(folder)
    form = (image_size, channels, pad)
    cache = runtime.data_dir() / "folders" / f"{folder.resolve().name}-{_fingerprint(paths, form)}.pt"
    if cache.is_file():
        kept = torch.load(cache, map_location="cpu", weights_only=True)
        images, bad = kept["images"], kept["bad"]
    else:
        images, bad = _read_all(paths, form, progress)
        if len(images):
            _keep(cache, {"images": images, "bad": bad})
    _tell(bad, len(paths), strict, folder)
    if say:
        _say(images.shape, folder)
    return _image_set(images, folder)


def train_and_test(folder: Path | str, image_size: int, channels: int = 3, pad: int = 0, stream: bool | None = None,
                   device="cpu", progress=None) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """The pictures of a folder to train on, and those held out: every 50th, at least 1 and about 1,000 at most.

    With `stream` the first ones stay on disk, as `FolderImages`; without it that happens where a tensor of them would take more
    than a quarter of the memory that is free, here or on `device`. Other arguments and what it raises as in `load_folder`, and
    ValueError if there is one picture alone.
    """
    paths, folder = find_images(folder), Path(folder)
    size = len(paths) * channels * image_size**2
    if stream is None:
        stream = size > LARGEST_SHARE * min(map(runtime.free_memory, ("cpu", device)))
    if stream:
        whole = FolderImages(paths, image_size, channels, pad)
        _say(whole.shape, folder, f", left on disk: they would fill {size / 2**30:.3g} GiB")
    else:
        whole = load_folder(folder, image_size, channels, progress=progress, pad=pad).images
    n = len(whole)
    if n < 2:
        raise ValueError(f"{runtime.short_path(folder)} holds 1 picture that can be read: at least 2 are needed")
    held_out = torch.arange(n) % max(HELD_OUT_EVERY, n // MOST_HELD_OUT) == 0
    train, test = (part.nonzero()[:, 0] for part in (~held_out, held_out))
    rest = whole.only(train) if stream else whole[train]
    return _image_set(rest, folder), _image_set(whole[test], folder)


class FolderImages:
    """Pictures that stay on disk, in place of a uint8 tensor (N, channels, image_size, image_size): it has `shape` and `len`.

    `images[picked]`, picked (B,) long, reads these: (B, channels, image_size, image_size). Raises ValueError that names a file
    which cannot be read; it is left to you to delete it, as to leave it out would change which batch holds what.
    """

    def __init__(self, paths: list[Path], image_size: int, channels: int = 3, pad: int = 0):
        self.reader = _Reader(paths, (image_size, channels, pad))
        self.shape = (len(paths), channels, image_size, image_size)
        self.coming = None

    def __len__(self) -> int:
        return self.shape[0]

    def only(self, picked: Tensor) -> "FolderImages":
        """Those at the indices `picked`."""
        return FolderImages([self.reader.paths[i] for i in picked.tolist()], *self.reader.form)

    @contextlib.contextmanager
    def ahead(self, order: Iterable[Tensor]):
        """Inside, batches are asked for in this order, and a DataLoader's workers read them before they are."""
        order, later = itertools.tee(order)
        loader = DataLoader(
            self.reader, batch_size=None, sampler=later, num_workers=min(8, os.cpu_count() or 1), worker_init_fn=_ignore_stop,
            generator=torch.Generator(),  # else it would draw from the one that dropout draws from
        )  # fmt: skip
        self.coming = zip(order, loader, strict=True)
        try:
            yield
        finally:
            self.coming = None  # which ends the workers

    def __getitem__(self, picked: Tensor) -> Tensor:
        picked = picked.cpu()
        asked, found = (picked, self.reader[picked]) if self.coming is None else next(self.coming)
        if not torch.equal(asked, picked):
            raise IndexError("this is not the batch that comes next in the order given to `ahead`")
        if isinstance(found, str):
            raise ValueError(found)
        return found


class _Reader(Dataset):
    """What a worker holds: an item is a batch, or the message about a file in it, which as an error would come as a traceback."""

    def __init__(self, paths: list[Path], form: tuple[int, int, int]):
        self.paths, self.form = paths, form

    def __getitem__(self, picked: Tensor) -> Tensor | str:
        images = []
        for i in picked.tolist():
            image = _attempt(self.paths[i], self.form)
            if image is None:
                return f"{self.paths[i]} cannot be read: delete it, or mend it"
            images.append(image)
        return torch.stack(images)


def _ignore_stop(worker: int) -> None:
    """Ctrl-C reaches all processes, but the main one still has a step to finish, and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _image_set(images, folder: Path) -> ImageSet:
    name = folder.resolve().name
    return ImageSet(images, torch.zeros(len(images), dtype=torch.long), (name,), name, runtime.short_path(folder))


def _say(shape: tuple[int, ...], folder: Path, more: str = "") -> None:
    colour = "RGB" if shape[1] == 3 else "grey"
    print(f"data: {shape[0]:,} images of {shape[3]}×{shape[2]}, {colour}, from {runtime.short_path(folder)}{more}")


def _fingerprint(paths: list[Path], form: tuple[int, int, int]) -> str:
    """Changes with any file's name, size or date, and with what is asked for."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((seen, form)).encode()).hexdigest()[:12]


def _attempt(path: Path, form: tuple[int, int, int]) -> Tensor | None:
    """The picture, or None if the file is damaged."""
    from PIL import Image

    try:
        return read_image(path, *form)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on such files
        return None


def _read_all(paths: list[Path], form: tuple[int, int, int], progress) -> tuple[Tensor, list[str]]:
    """The pictures that can be read, and the names of the files that cannot."""
    image_size, channels, _ = form
    images, bad = [], []
    with ThreadPoolExecutor(max_workers=min(32, 2 * (os.cpu_count() or 1))) as threads:
        for path, image in zip(paths, threads.map(lambda path: _attempt(path, form), paths), strict=True):
            if image is None:
                bad.append(path.name)
            else:
                images.append(image)
            if progress is not None:
                progress(len(images) + len(bad), len(paths))
    return (torch.stack(images) if images else torch.empty(0, channels, image_size, image_size, dtype=torch.uint8)), bad


def _keep(cache: Path, payload: dict) -> None:
    """Write under a temporary name, then rename; a folder that cannot be written to costs the next start its time, no more."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        torch.save(payload, part)
        os.replace(part, cache)
    except OSError as error:
        warnings.warn(
            f"{runtime.short_path(cache)} could not be written ({error.strerror})", RuntimeWarning, stacklevel=3
        )


def _tell(bad: list[str], total: int, strict: bool, folder: Path) -> None:
    if not bad:
        return
    named = ", ".join(bad[:MOST_NAMED]) + (" and others" if len(bad) > MOST_NAMED else "")
    words = f"{len(bad)} of {total} files in {runtime.short_path(folder)} cannot be read: {named}"
    if strict or len(bad) == total:
        raise ValueError(words)
    print(f"data: {words}; left out")
