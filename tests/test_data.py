"""The ladder, each rung absent, truncated and wrong, without network and without the real sets; and the two ranges."""

import functools
import gzip
import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_utils import data, runtime

REAL = runtime.data_dir_override() or runtime.data_dir()
SIZES = {"train": 12, "test": 5}


def write_set(folder: Path, seed: int = 0) -> list[tuple[str, str]]:
    """Four small IDX files in `folder`, and their names and checksums as torchvision lists them."""
    folder.mkdir(parents=True)
    rng, resources = np.random.default_rng(seed), []
    for split, n in SIZES.items():
        pixels, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        for file, magic, shape, values in [
            (data.FILES[split][0], 2051, (n, 28, 28), pixels),
            (data.FILES[split][1], 2049, (n,), labels),
        ]:
            header = np.array([magic, *shape], ">i4").tobytes()
            packed = gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)
            (folder / file).write_bytes(packed)
            resources.append((file, hashlib.md5(packed).hexdigest()))
    return resources


def contents(split: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    drawn = {name: (rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)) for name, n in SIZES.items()}
    return torch.from_numpy(drawn[split][0].astype(np.uint8))[:, None], torch.from_numpy(drawn[split][1])


def is_the_small_set(found, split="train"):
    images, labels = contents(split)
    return torch.equal(found.images, images) and torch.equal(found.labels, labels)


DAMAGE = {
    "truncated": lambda packed: packed[:-40],
    "empty": lambda packed: b"",
    "wrong": lambda packed: gzip.compress(gzip.decompress(packed)[::-1]),
    "no gzip": lambda packed: b"<html>404</html>",
}


def damage(file: Path, kind: str) -> bytes:
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    return file.read_bytes()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path):
    """A server on this machine that holds the small set; yields its address and its folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_mirror():
    """An address that takes every call and never answers. Closing it ends all who still wait."""
    door = socket.create_server(("127.0.0.1", 0))
    callers, open_ = [], True

    def accept():
        while open_:
            try:
                callers.append(door.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{door.getsockname()[1]}/"
    open_ = False
    door.shutdown(socket.SHUT_RDWR)
    for end in (door, *callers):
        end.close()


@pytest.fixture
def ladder(own_folders, monkeypatch, tmp_path):
    """A ladder whose lower rungs are empty folders and whose only mirror is a closed door. Returns (own folder, make)."""
    import sklearn.datasets  # noqa: F401 — here, so that no test that measures time waits for it
    import torchvision

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    resources = write_set(tmp_path / "pattern")
    for cls in (torchvision.datasets.FashionMNIST, torchvision.datasets.MNIST):
        monkeypatch.setattr(cls, "resources", resources)
        monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:9/"])
    return own_folders / "data"


def mirrors(monkeypatch, *addresses):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", list(addresses))


def is_digits(found) -> bool:
    return found.title == "scikit-learn's digits" and "scikit-learn" in found.source and found.classes == data.DIGITS


# DDPM_DATA_DIR


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("dataset", "name"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")])
def test_named_folder_good(ladder, monkeypatch, tmp_path, capsys, dataset, name, split):
    write_set(tmp_path / "mine" / name / "raw")
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "mine"))
    found = data.load_images(dataset, split)
    assert is_the_small_set(found, split) and found.source == "DDPM_DATA_DIR" and found.title == data.TITLES[dataset]
    assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
    (line,) = capsys.readouterr().out.splitlines()
    assert "DDPM_DATA_DIR" in line and data.TITLES[dataset] in line and str(SIZES[split]) in line
    assert not ladder.exists()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("which", [0, 1], ids=["images", "labels"])
def test_named_folder_damaged_is_refused_by_name_and_left_alone(ladder, monkeypatch, tmp_path, which, kind):
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    write_set(raw)
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "mine"))
    file = raw / data.FILES["train"][which]
    left = damage(file, kind)
    with pytest.raises(ValueError, match=rf"{file.name}.*damaged.*replace it"):
        data.load_images("fashion_mnist")
    assert file.read_bytes() == left and not ladder.exists()
    assert is_the_small_set(data.load_images("fashion_mnist", "test"), "test")  # the other split is whole


@pytest.mark.parametrize("there", ["no folder", "empty folder", "one file of two"])
def test_named_folder_absent_goes_on_to_the_next_rung(ladder, monkeypatch, tmp_path, capsys, there):
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    if there == "empty folder":
        raw.mkdir(parents=True)
    elif there == "one file of two":
        write_set(raw)
        (raw / data.FILES["train"][1]).unlink()
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "mine"))
    write_set(ladder / "FashionMNIST" / "raw")
    found = data.load_images("fashion_mnist")
    assert is_the_small_set(found) and found.source == "data"
    assert "no Fashion-MNIST in DDPM_DATA_DIR" in capsys.readouterr().out


# data/ beside the package, and the download into it


def test_own_folder_good_asks_no_mirror(ladder, monkeypatch, silent_mirror):
    write_set(ladder / "FashionMNIST" / "raw")
    mirrors(monkeypatch, silent_mirror)
    start = time.perf_counter()
    assert is_the_small_set(data.load_images("fashion_mnist"))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("unpacked", [False, True], ids=["packed only", "unpacked beside"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_own_folder_damaged_is_replaced_by_a_download(ladder, monkeypatch, mirror, capsys, kind, unpacked):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, address + "set/")
    raw = ladder / "FashionMNIST" / "raw"
    write_set(raw)
    if unpacked:  # as torchvision leaves them
        for file in raw.glob("*.gz"):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    damage(raw / data.FILES["train"][0], kind)
    assert is_the_small_set(data.load_images("fashion_mnist"))
    assert f"{data.FILES['train'][0]} in data is damaged and will be replaced" in capsys.readouterr().out
    (folder / "set").rename(folder / "gone")
    assert is_the_small_set(data.load_images("fashion_mnist"))  # from disk this time


@pytest.mark.parametrize("first", ["good", "closed", "404"])
def test_own_folder_absent_is_downloaded_from_the_mirror_that_has_it(ladder, monkeypatch, mirror, first):
    address, folder = mirror
    write_set(folder / "set")
    before = {"good": [], "closed": ["http://127.0.0.1:9/"], "404": [address + "nothing/"]}[first]
    mirrors(monkeypatch, *before, address + "set/")
    found = data.load_images("fashion_mnist")
    assert is_the_small_set(found) and found.source == "data"
    assert is_the_small_set(data.load_images("fashion_mnist", "test"), "test")


def in_time(seconds: float, work) -> tuple:
    """work() in a thread, and whether it ended in time: a call that waits for ever fails the test and does not hang it."""
    answer = []
    thread = threading.Thread(target=lambda: answer.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return tuple(answer)


def test_a_mirror_that_never_answers_decides_within_15_s(ladder, monkeypatch, silent_mirror):
    mirrors(monkeypatch, silent_mirror, silent_mirror)
    found = in_time(15, lambda: data.load_images("fashion_mnist"))
    assert found and is_digits(found[0])


def test_a_mirror_that_never_answers_does_not_stand_before_one_that_does(ladder, monkeypatch, silent_mirror, mirror):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, silent_mirror, address + "set/")
    found = in_time(15, lambda: data.load_images("fashion_mnist"))
    assert found and is_the_small_set(found[0])


# The last rung


@pytest.mark.parametrize("server", ["closed", "404", "wrong files"])
@pytest.mark.parametrize("own", ["absent", "truncated"])
def test_no_download_ends_at_the_digits_without_a_traceback(ladder, monkeypatch, mirror, capsys, own, server):
    address, folder = mirror
    write_set(folder / "set", seed=1)
    mirrors(monkeypatch, {"closed": "http://127.0.0.1:9/", "404": address, "wrong files": address + "set/"}[server])
    if own == "truncated":
        write_set(ladder / "FashionMNIST" / "raw")
        damage(ladder / "FashionMNIST" / "raw" / data.FILES["train"][0], "truncated")
    found = data.load_images("fashion_mnist")
    assert is_digits(found) and found.images.shape == (1500, 1, 28, 28)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "scikit-learn's digits" in last and "because Fashion-MNIST" in last


def test_digits_are_scikit_learns_1797_with_their_labels(own_folders):
    from sklearn.datasets import load_digits

    raw = load_digits()
    sets = [data.load_images("digits", split, image_size=8, say=False) for split in ("train", "test")]
    images, labels = torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(labels, torch.from_numpy(raw.target)) and labels.dtype == torch.int64
    assert (images[:, 0].numpy() - raw.images * 255 / 16).max() <= 0.5 and images.max() == 255


def test_digits_are_resized_to_28_and_keep_their_look(own_folders, capsys):
    small, large = (data.load_images("digits", "test", image_size=size) for size in (8, 28))
    assert large.images.shape == (297, 1, 28, 28) and is_digits(large)
    back = torch.nn.functional.interpolate(large.images.float(), size=8, mode="bilinear", antialias=True)
    pair = torch.stack([back.flatten(), small.images.float().flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95
    assert all("digits" in line for line in capsys.readouterr().out.splitlines())


def test_padding_adds_black_and_resamples_nothing(own_folders, capsys):
    plain = data.load_images("digits", image_size=8, say=False)
    padded = data.load_images("digits", image_size=12, pad=2, say=False)
    assert padded.images.shape[-2:] == (12, 12) and torch.equal(padded.images[..., 2:-2, 2:-2], plain.images)
    assert padded.images.sum() == plain.images.sum()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [dict(dataset="cifar"), dict(split="valid"), dict(image_size=0), dict(image_size=8, pad=4), dict(pad=-1)],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_read(own_folders, monkeypatch, arguments):
    monkeypatch.setattr(data, "_digits", lambda split: pytest.fail("read before the check"))
    with pytest.raises(ValueError, match=str(list(arguments.values())[-1])):
        data.load_images(**{"dataset": "digits"} | arguments)


def test_image_set_first_and_len_and_to(own_folders):
    found = data.load_images("digits", image_size=8, say=False).to("cpu")
    assert len(found) == 1500 and len(found.first(10)) == 10 and len(found.first(10**6)) == 1500
    assert torch.equal(found.first(10).labels, found.labels[:10])


# The two ranges


def test_ranges_are_inverse_on_all_256_values():
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_model_range(values)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_image_range(x), values)
    assert data.to_image_range(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
    assert torch.equal(data.to_image_range(x.half()), values)


@pytest.mark.parametrize("x", [torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)])
def test_to_model_range_refuses_what_is_not_uint8(x):
    with pytest.raises(ValueError, match=f"{x.dtype}.*expected uint8"):
        data.to_model_range(x)


@pytest.mark.parametrize(("x", "words"), [(torch.zeros(2, dtype=torch.uint8), "uint8"), (torch.tensor([0, 1]), "int64"),
                                          (torch.tensor([0.0, float("nan")]), "NaN")])  # fmt: skip
def test_to_image_range_refuses_integers_and_nan(x, words):
    with pytest.raises(ValueError, match=words):
        data.to_image_range(x)


# The real sets, where they are


@pytest.mark.parametrize(
    ("dataset", "name", "black"), [("fashion_mnist", "FashionMNIST", 0.50), ("mnist", "MNIST", 0.81)]
)
def test_the_real_sets(monkeypatch, dataset, name, black):
    raw = REAL / name / "raw"
    if not all((raw / file).is_file() for files in data.FILES.values() for file in files):
        pytest.skip(f"{data.TITLES[dataset]} is not on disk")
    monkeypatch.setenv("DDPM_DATA_DIR", str(REAL))  # refused, and not replaced, if it is damaged
    for split, n in (("train", 60_000), ("test", 10_000)):
        found = data.load_images(dataset, split)
        assert found.images.shape == (n, 1, 28, 28) and found.images.max() == 255 and found.images.min() == 0
        counts = found.labels.bincount()
        assert len(counts) == 10 and (counts > 0.08 * n).all()
        assert (found.images == 0).float().mean() == pytest.approx(black, abs=0.01)
