"""Folders of pictures, of any size and shape: read into one uint8 tensor, or, where memory is short, a batch at a time."""

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import runtime
from .data import ImageSet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODES = {1: "L", 3: "RGB"}
MOST_NAMED = 5  # unreadable files that are named before the rest is counted


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


def read_image(path: Path | str, image_size: int, channels: int = 3) -> Tensor:
    """One file as (channels, image_size, image_size) uint8: upright, scaled so that the shorter side fits, cut in the middle.

    What is transparent becomes white. Raises OSError on a file that is no picture or is cut short, ValueError on bad numbers.
    """
    from PIL import Image, ImageOps

    if channels not in MODES or image_size < 1:
        raise ValueError(f"image_size={image_size}, channels={channels}: expected at least 1, and 1 (grey) or 3 (RGB)")
    with Image.open(path) as image:
        image.draft(MODES[channels], (2 * image_size, 2 * image_size))  # lets a JPEG decode at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        image = ImageOps.fit(image.convert(MODES[channels]), (image_size, image_size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.movedim(2, 0).contiguous()


def load_folder(folder: Path | str, image_size: int, channels: int = 3, strict: bool = False, say: bool = True,
                progress: Callable[[int, int], None] | None = None) -> ImageSet:  # fmt: skip
    """Every picture of a folder in one uint8 tensor (N, channels, image_size, image_size), by threads.

    Files that cannot be read are named, counted and left out; with `strict` they raise ValueError. The tensor is kept under
    `data/folders/` and read from there as long as no file has changed. `progress(done, total)` is told how far it is.
    Raises as `find_images` does, and ValueError if no file can be read.
    """
    paths, folder = find_images(folder), Path(folder)
    cache = runtime.data_dir() / "folders" / f"{folder.resolve().name}-{_fingerprint(paths, image_size, channels)}.pt"
    if cache.is_file():
        kept = torch.load(cache, map_location="cpu", weights_only=True)
        images, bad = kept["images"], kept["bad"]
    else:
        images, bad = _read_all(paths, image_size, channels, progress)
        if len(images):
            _keep(cache, {"images": images, "bad": bad})
    _tell(bad, len(paths), strict, folder)
    if say:
        size = f"{image_size}×{image_size}, {'RGB' if channels == 3 else 'grey'}"
        print(f"data: {len(images):,} images of {size}, from {runtime.short_path(folder)}")
    labels = torch.zeros(len(images), dtype=torch.long)
    return ImageSet(images, labels, (folder.resolve().name,), folder.resolve().name, runtime.short_path(folder))


def _fingerprint(paths: list[Path], image_size: int, channels: int) -> str:
    """Changes with any file's name, size or date, and with what is asked for."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((seen, image_size, channels)).encode()).hexdigest()[:12]


def _read_all(paths: list[Path], image_size: int, channels: int, progress) -> tuple[Tensor, list[str]]:
    """The pictures that can be read, and the names of the files that cannot."""
    from PIL import Image

    def attempt(path: Path):
        try:
            return read_image(path, image_size, channels)
        except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on files that are damaged
            return None

    images, bad = [], []
    with ThreadPoolExecutor(max_workers=min(32, 2 * (os.cpu_count() or 1))) as threads:
        for path, image in zip(paths, threads.map(attempt, paths), strict=True):
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
