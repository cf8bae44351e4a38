"""Images as one uint8 tensor, found on the first rung of a ladder that holds, and the two functions that change their range.

The rungs: the folder in `DDPM_DATA_DIR`; `data/` beside the package; a download into it; scikit-learn's digits.
"""

import gzip
import hashlib
import socket
import threading
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime

GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")
TITLES = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "digits": "scikit-learn's digits"}
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W) uint8; labels: (N,) long; classes: a name a label; title: what they are; source: where from."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    title: str
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def first(self, n: int) -> "ImageSet":
        """The first n images, or all if there are fewer."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])


def to_model_range(images: Tensor, data_range: str = "symmetric") -> Tensor:
    """uint8 0 … 255 → float32 in exactly [−1, 1], or [0, 1] if `data_range` is "unit". Raises ValueError on another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images have dtype {images.dtype}, expected uint8 (0 … 255): they may be in model range already"
        )
    return images.float() / 255 if data_range == "unit" else images.float() / 127.5 - 1


def to_symmetric(x: Tensor, data_range: str) -> Tensor:
    """Pictures that a network of this `data_range` drew → [−1, 1], in which all else takes them."""
    return 2 * x - 1 if data_range == "unit" else x


def to_image_range(x: Tensor) -> Tensor:
    """Float [−1, 1] → uint8 0 … 255, rounded; values beyond are clamped. The inverse of `to_model_range` on all 256 values.

    Raises ValueError on integers, which are in image range already, and on NaN.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, expected floats in [−1, 1]: uint8 images are in image range already")
    if x.isnan().any():
        raise ValueError("x holds NaN: look at the loss of the training that made it")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> Tensor:
    """`images`; ValueError unless it is a non-empty (N, C, H, W) uint8 tensor."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}, expected at least one (C, H, W) "
            "image in uint8: data.to_image_range makes them from floats in [−1, 1]"
        )
    return images


def image_digests(images: Tensor) -> list[bytes]:
    """A digest of the pixels of each image (N, C, H, W) uint8, 8 bytes each: equal images have equal digests."""
    return [hashlib.blake2b(image, digest_size=8).digest() for image in images.cpu().contiguous().numpy()]


def digest(images) -> str:
    """A digest of a set of images in its order: the same for a uint8 tensor and for the `folders.FolderImages` of its files."""
    each = image_digests(images) if isinstance(images, Tensor) else images.digests
    return hashlib.blake2b(b"".join(each), digest_size=8).hexdigest()


def load_images(
    dataset: str = "fashion_mnist", split: str = "train", image_size: int = 28, pad: int = 0, say: bool = True
) -> ImageSet:
    """Fashion-MNIST, MNIST or the digits, grey, resized to image_size − 2·pad and then padded with black to image_size.

    Walks the ladder and says in one line which rung held; with no network it ends at scikit-learn's digits and raises nothing.
    `pad=2` with `image_size=32` turns 28×28 into 32×32 without resampling.
    Raises ValueError on an unknown name or split, and on a damaged file in `DDPM_DATA_DIR`, which is yours to mend.
    """
    if dataset not in TITLES or split not in FILES:
        raise ValueError(
            f"no split {split!r} of data set {dataset!r}: choose from {', '.join(TITLES)} and from {', '.join(FILES)}"
        )
    if pad < 0 or image_size <= 2 * pad:
        raise ValueError(f"image_size={image_size} with pad={pad} leaves no pixels: keep 0 ≤ pad < image_size / 2")
    found = None if dataset == "digits" else _from_folders(dataset, split)
    if found is None:
        images, labels, source = *_digits(split), "the scikit-learn package"
        dataset, asked = "digits", dataset
        if asked != "digits":
            source += f", because {TITLES[asked]} is neither on disk nor to be downloaded"
    else:
        images, labels, source = found
    inner = image_size - 2 * pad
    if images.shape[-1] != inner:
        images = (
            F.interpolate(images.float(), size=(inner, inner), mode="bilinear", antialias=True)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
    images = F.pad(images, [pad] * 4)
    if say:
        print(
            f"data: {TITLES[dataset]}, {split} split, {len(images):,} images of {image_size}×{image_size}, from {source}"
        )
    classes = GARMENTS if dataset == "fashion_mnist" else DIGITS
    return ImageSet(images, labels, classes, TITLES[dataset], source)


def raw_folder(dataset: str, root: Path) -> Path:
    """Where torchvision keeps the files of `dataset` below `root`."""
    return root / TITLES[dataset].replace("-", "") / "raw"


def damaged_files(dataset: str, root: Path, splits=tuple(FILES)) -> list[str] | None:
    """None if a file of the splits is missing under `root`; else those whose checksum is not the published one."""
    from torchvision.datasets.utils import check_integrity

    folder, files = raw_folder(dataset, root), [file for split in splits for file in FILES[split]]
    if not all((folder / file).is_file() for file in files):
        return None
    checksums = dict(_torchvision_class(dataset).resources)
    return [file for file in files if not check_integrity(str(folder / file), checksums[file])]


def _from_folders(dataset: str, split: str) -> tuple[Tensor, Tensor, str] | None:
    """Images, labels and source from the first rung that is a folder and holds, or None."""
    override, own = runtime.data_dir_override(), runtime.data_dir()
    if override is not None:
        damaged = damaged_files(dataset, override, [split])
        if damaged:
            raise ValueError(
                f"{damaged[0]} in {raw_folder(dataset, override)} is damaged (its checksum is not the published one): "
                "replace it, or unset DDPM_DATA_DIR"
            )
        if damaged is not None:
            return *_read(split, raw_folder(dataset, override)), "DDPM_DATA_DIR"
        print(f"data: no {TITLES[dataset]} in DDPM_DATA_DIR ({runtime.short_path(override)}), looking further")
    damaged = damaged_files(dataset, own, [split])
    for file in damaged or ():
        print(f"data: {file} in {runtime.short_path(own)} is damaged and will be replaced")
        (raw_folder(dataset, own) / file).unlink()
    if damaged != [] and not (_download(dataset, own) and damaged_files(dataset, own, [split]) == []):
        return None
    return *_read(split, raw_folder(dataset, own)), runtime.short_path(own)


def _torchvision_class(dataset: str):
    import torchvision  # a second or two: paid only by those who look for these sets

    return {"fashion_mnist": torchvision.datasets.FashionMNIST, "mnist": torchvision.datasets.MNIST}[dataset]


def _read(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """The two IDX files of a split: a header of 16 (images) or 8 bytes (labels), then one byte a value."""
    image_file, label_file = FILES[split]
    labels = np.frombuffer(gzip.decompress((folder / label_file).read_bytes()), np.uint8, offset=8)
    images = np.frombuffer(gzip.decompress((folder / image_file).read_bytes()), np.uint8, offset=16)
    return torch.from_numpy(images.reshape(len(labels), 1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))


def _download(dataset: str, root: Path) -> bool:
    """Fetch the set into `root` through torchvision if one of its mirrors answers within 5 s. True if that worked."""
    cls = _torchvision_class(dataset)
    answers = []

    def knock(url):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4):
                answers.append(url)
        except Exception as error:  # whatever the network does, the ladder has one more rung
            answers.append(error)

    # A name server that does not answer ignores every timeout that Python can set, hence threads that may be left behind.
    doors = [
        threading.Thread(target=knock, args=(mirror + cls.resources[0][0],), daemon=True) for mirror in cls.mirrors
    ]
    for door in doors:
        door.start()
    for door in doors:
        door.join(timeout=5)
    alive = [mirror for mirror in cls.mirrors if mirror + cls.resources[0][0] in answers]
    if not alive:
        return False
    from torchvision.datasets.utils import download_url

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision itself waits for ever
    try:
        for file, checksum in cls.resources:
            download_url(alive[0] + file, raw_folder(dataset, root), file, checksum)
    except Exception as error:
        print(f"data: the download of {TITLES[dataset]} failed ({type(error).__name__}: {error})")
        return False
    finally:
        socket.setdefaulttimeout(patience)
    return True


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8×8 pixels and 17 greys, from scikit-learn's own files: 1,500 to train on, 297 to test on."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    images = torch.from_numpy(np.round(raw.images[part] * (255 / 16)).astype(np.uint8))
    return images[:, None], torch.from_numpy(raw.target[part].astype(np.int64))
