"""Images as one uint8 tensor, and the two functions that change their range.

The data sources are tried in this order: the folder in `DDPM_DATA_DIR`; the project's own data
folder (see `runtime.data_dir`); a download into that folder; scikit-learn's digits. A source is
used for both splits or for neither.
"""

import gzip
import hashlib
import os
import socket
import tempfile
import threading
import urllib.request
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime

GARMENTS = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGITS = tuple("0123456789")
TITLES = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "digits": "scikit-learn's digits"}
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
# SHA-256 of the unpacked files. The published checksums are those of the packed ones, which change
# when somebody packs the same content again. In the order of FILES.
_SUMS = {
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
CONTENTS = {
    dataset: dict(zip(FILES["train"] + FILES["test"], sums, strict=True))
    for dataset, sums in _SUMS.items()
}


@dataclass(frozen=True)
class ImageSet:
    """A set of images with labels.

    images: (N, C, H, W) uint8; labels: (N,) long; classes: a name per label; title: what the images
    are; source: where they come from.
    """

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
        """Return the first n images, or all if there are fewer."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])


def to_model_range(images: Tensor, data_range: str = "symmetric") -> Tensor:
    """Convert uint8 images (0 … 255) to float32 in model range.

    The range is exactly [−1, 1], or [0, 1] if `data_range` is "unit". Raises ValueError on another
    dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images have dtype {images.dtype}, expected uint8 (0 … 255): they may be in model "
            "range already"
        )
    return images.float() / 255 if data_range == "unit" else images.float() / 127.5 - 1


def to_symmetric(x: Tensor, data_range: str) -> Tensor:
    """Convert images drawn by a network of this `data_range` to [−1, 1].

    All other code uses the range [−1, 1].
    """
    return 2 * x - 1 if data_range == "unit" else x


def to_image_range(x: Tensor) -> Tensor:
    """Convert floats in [−1, 1] to uint8 0 … 255, rounded; values outside are clamped.

    This is the inverse of `to_model_range` on all 256 values. Raises ValueError on integers, which
    are already in image range, and on NaN.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}, expected floats in [−1, 1]: uint8 images are in image range "
            "already"
        )
    if x.isnan().any():
        raise ValueError("x holds NaN: look at the loss of the training that made it")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_images(images: Tensor) -> Tensor:
    """Return `images`; raise ValueError unless it is a non-empty (N, C, H, W) uint8 tensor."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}, expected at least "
            "one (C, H, W) image in uint8: data.to_image_range makes them from floats in [−1, 1]"
        )
    return images


def image_digests(images: Tensor) -> list[bytes]:
    """Return a digest of 8 bytes for the pixels of each image, (N, C, H, W) uint8.

    Equal images have equal digests.
    """
    return [
        hashlib.blake2b(image, digest_size=8).digest()
        for image in images.cpu().contiguous().numpy()
    ]


def digest(images) -> str:
    """Return one digest of a set of images in its order.

    It is the same for a uint8 tensor and for the `folders.FolderImages` of its files.
    """
    each = image_digests(images) if isinstance(images, Tensor) else images.digests
    return hashlib.blake2b(b"".join(each), digest_size=8).hexdigest()


def load_images(
    dataset: str = "fashion_mnist",
    split: str = "train",
    image_size: int = 28,
    pad: int = 0,
    say: bool = True,
) -> ImageSet:
    """Load Fashion-MNIST, MNIST or the digits as grayscale images.

    The images are resized to image_size − 2·pad and padded with black to image_size. For example,
    `pad=2` with `image_size=32` turns 28×28 into 32×32 without resampling.

    The data sources are tried in order, and one printed line says which one was used; `say=False`
    suppresses this line. The last source is scikit-learn's digits, which need no file and no
    network. If they replace the requested data set, the line is printed even with `say=False`, and
    the title shows it.

    A source is used only if all four files of both splits are there, packed (.gz) or not, with the
    published content. The source chosen for one split is also used for the other. It is chosen
    again when the split for which it was chosen is loaded again.

    Raises ValueError on an unknown name or split, if `pad` leaves no pixels, if some files of a set
    in `DDPM_DATA_DIR` are missing or damaged, and if files of the source that was chosen for the
    other split are now missing or damaged.
    """
    if dataset not in TITLES or split not in FILES:
        raise ValueError(
            f"no split {split!r} of data set {dataset!r}: choose from {', '.join(TITLES)} and "
            f"from {', '.join(FILES)}"
        )
    if pad < 0 or image_size <= 2 * pad:
        raise ValueError(
            f"image_size={image_size} with pad={pad} leaves no pixels: keep 0 ≤ pad < image_size "
            "/ 2"
        )
    # choose a source; the digits are the last resort
    found = None if dataset == "digits" else _from_folders(dataset, split)
    fell_back = dataset != "digits" and found is None
    if found is None:
        images, labels, source = *_digits(split), "the scikit-learn package"
    else:
        images, labels, source = found
    if fell_back:
        source += f", because {TITLES[dataset]} is neither on disk nor to be downloaded"
        dataset = "digits"
    # resize and pad
    inner = image_size - 2 * pad
    if images.shape[-1] != inner:
        images = (
            F.interpolate(images.float(), size=(inner, inner), mode="bilinear", antialias=True)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
    images = F.pad(images, [pad] * 4)
    # report where the images come from
    if say or fell_back:
        print(
            f"data: {TITLES[dataset]}, {split} split, {len(images):,} images of "
            f"{image_size}×{image_size}, from {source}"
        )
    classes = GARMENTS if dataset == "fashion_mnist" else DIGITS
    return ImageSet(images, labels, classes, TITLES[dataset], source)


def raw_folder(dataset: str, root: Path) -> Path:
    """Return the folder where torchvision keeps the files of `dataset` below `root`."""
    return root / TITLES[dataset].replace("-", "") / "raw"


@dataclass(frozen=True)
class Files:
    """The result of `read_files`.

    contents: of the good files, by name; missing: names of files; damaged: a reason for each
    damaged file.
    """

    contents: dict[str, bytes]
    missing: list[str]
    damaged: dict[str, str]

    @property
    def whole(self) -> bool:
        return not self.missing and not self.damaged

    @property
    def absent(self) -> bool:
        return not self.contents and not self.damaged

    def problems(self) -> str:
        """Return in a few words what is wrong, with the names of the files."""
        damaged = [f"{file} ({reason})" for file, reason in self.damaged.items()]
        kinds = {"missing": self.missing, "damaged": damaged}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


def read_files(dataset: str, folder: Path, splits=tuple(FILES)) -> Files:
    """Read the files of the splits in `folder` and check their contents.

    Each file may be packed (.gz) or not; one good form is enough.
    """
    found = Files({}, [], {})
    for file in (file for split in splits for file in FILES[split]):
        forms = [
            path
            for path in (folder / file, folder / file.removesuffix(".gz"))
            if os.path.lexists(path)
        ]
        reasons = {}
        for path in forms:
            try:
                found.contents[file] = _unpacked(path, CONTENTS[dataset][file])
                break
            except ValueError as error:
                reasons[path.name] = str(error)
        if not forms:
            found.missing.append(file)
        elif file not in found.contents:
            found.damaged.update(reasons)
    return found


def _unpacked(path: Path, sha256: str) -> bytes:
    """Return the content of a file, whether it is a gzip file or not.

    Raises ValueError with the reason if the file is damaged.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # a browser may have unpacked it and kept the name
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its content is not the published one")
    return content


# The root that was chosen for a data set, None for the digits, and the split of that call.
_chosen: dict[tuple, tuple[Path | None, str]] = {}


def _from_folders(dataset: str, split: str) -> tuple[Tensor, Tensor, str] | None:
    """Return images, labels and source from the first source that holds the whole set, or None.

    The other split comes from the same source, even if a better one has become available, because
    two data sets in one run would be worse.
    """
    override, own = runtime.data_dir_override(), runtime.data_dir()
    key = (dataset, override, own)
    root, first = _chosen.get(key, (None, split))
    if first == split:
        _chosen.pop(key, None)
        root, files = _choose(dataset, override, own)
        _chosen[key] = root, split
    elif root is not None:
        folder = raw_folder(dataset, root)
        files = read_files(dataset, folder, [split])
        if not files.whole:
            raise ValueError(
                f"{folder} held all of {TITLES[dataset]} when the {first} split was loaded and "
                f"does not now ({files.problems()}): put the files back, or load both splits again"
            )
    if root is None:
        return None
    source = "DDPM_DATA_DIR" if root == override else runtime.short_path(own)
    return *_parse(files.contents, split), source


def _choose(dataset: str, override: Path | None, own: Path) -> tuple[Path | None, Files]:
    """Return the first root that holds the whole set, or None, and the files found there.

    The set is downloaded if necessary.
    """
    title = TITLES[dataset]
    # look in DDPM_DATA_DIR first
    if override is not None:
        folder = raw_folder(dataset, override)
        files = read_files(dataset, folder)
        if files.whole:
            return override, files
        if not files.absent:
            raise ValueError(
                f"{folder} does not hold all of {title} ({files.problems()}): "
                "add or replace these files, or unset DDPM_DATA_DIR"
            )
        inside = folder.relative_to(override).as_posix()
        print(
            f"data: no {title} in DDPM_DATA_DIR ({inside} in {runtime.short_path(override)} "
            "holds none of its files), looking further"
        )
    # look in the data folder and download what it lacks
    folder = raw_folder(dataset, own)
    files = read_files(dataset, folder)
    if not files.whole and _download(dataset, own):
        files = read_files(dataset, folder)
    if files.whole:
        return own, files
    print(
        f"data: {runtime.short_path(folder)} does not hold all of {title} ({files.problems()}): "
        "put these files there, packed (.gz) or not"
    )
    return None, files


def _parse(contents: dict[str, bytes], split: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels in the two IDX files of a split.

    A file has a header of 16 bytes (images) or 8 bytes (labels), then one byte per value.
    """
    image_file, label_file = FILES[split]
    labels = np.frombuffer(contents[label_file], np.uint8, offset=8)
    images = np.frombuffer(contents[image_file], np.uint8, offset=16)
    return torch.from_numpy(images.reshape(len(labels), 1, 28, 28).copy()), torch.from_numpy(
        labels.astype(np.int64)
    )


def _download(dataset: str, root: Path) -> bool:
    """Download what the set below `root` lacks, and return True if that worked.

    The files come from a mirror that answers within 5 s. No file in the folder changes before all
    new files have arrived complete, and none of the user's files is deleted.
    """
    # list the files that are missing or damaged
    folder = raw_folder(dataset, root)
    found = read_files(dataset, folder)
    wanted = [file for file in CONTENTS[dataset] if file not in found.contents]
    for mirror in _answering(_mirrors(dataset), wanted[0]):
        try:
            # download to a temporary folder and check the contents
            runtime.make_folder(folder)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
                _fetch(mirror, wanted, Path(temporary))
                good = read_files(dataset, Path(temporary)).contents
                wrong = [file for file in wanted if file not in good]
                if wrong:
                    raise ValueError(f"damaged at {mirror}: {', '.join(wrong)}")
                # move the files into place and keep the damaged ones
                kept = _set_aside([folder / file for file in wanted if file in found.damaged])
                for file in wanted:
                    os.replace(Path(temporary, file), folder / file)
        except Exception as error:
            # after any failure of network or disk, one more source is left
            print(
                f"data: the download of {TITLES[dataset]} failed ({type(error).__name__}: {error})"
            )
            continue
        # report the download
        aside = (
            f"; the damaged files that they replace are kept in {runtime.short_path(kept)}"
            if kept
            else ""
        )
        print(f"data: downloaded {', '.join(wanted)} into {runtime.short_path(folder)}{aside}")
        return True
    return False


def _mirrors(dataset: str) -> list[str]:
    import torchvision  # takes a second or two, and only a download needs it

    classes = {
        "fashion_mnist": torchvision.datasets.FashionMNIST,
        "mnist": torchvision.datasets.MNIST,
    }
    return classes[dataset].mirrors


def _answering(mirrors: list[str], file: str) -> list[str]:
    """Return those mirrors that have the file and answer within 5 s."""
    answers = []

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(mirror + file, method="HEAD"), timeout=4
            ):
                answers.append(mirror)
        except Exception:  # a mirror that does not answer is left out
            pass

    # A name server that does not answer ignores every timeout that Python can set,
    # hence threads that may be left behind.
    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=5)
    return [mirror for mirror in mirrors if mirror in answers]


def _fetch(mirror: str, files: list[str], folder: Path) -> None:
    from torchvision.datasets.utils import download_url

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision itself would wait forever
    try:
        for file in files:
            download_url(mirror + file, folder, file)
    finally:
        socket.setdefaulttimeout(patience)


def _set_aside(paths: list[Path]) -> Path | None:
    """Move the files into a new folder beside them and return it, or None if there are no files.

    They are not deleted, because they may be the user's own.
    """
    if not paths:
        return None
    folder = Path(tempfile.mkdtemp(prefix="damaged-", dir=paths[0].parent))
    for path in paths:
        path.rename(folder / path.name)
    return folder


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of scikit-learn's handwritten digits.

    There are 1,797 images of 8×8 pixels and 17 gray levels: 1,500 to train on and 297 to test on.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    images = torch.from_numpy(np.round(raw.images[part] * (255 / 16)).astype(np.uint8))
    return images[:, None], torch.from_numpy(raw.target[part].astype(np.int64))
