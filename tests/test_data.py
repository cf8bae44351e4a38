"""The data sources, each absent, in part and damaged, without network and without the real sets;
and the two ranges.
"""

import functools
import gzip
import hashlib
import http.server
import os
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


def write_set(folder: Path, seed: int = 0) -> dict[str, str]:
    """Four small IDX files in `folder`, and the SHA-256 of their contents by name, as in
    `data.CONTENTS`.
    """
    folder.mkdir(parents=True)
    rng, contents = np.random.default_rng(seed), {}
    for split, n in SIZES.items():
        pixels, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        for file, magic, shape, values in [
            (data.FILES[split][0], 2051, (n, 28, 28), pixels),
            (data.FILES[split][1], 2049, (n,), labels),
        ]:
            header = np.array([magic, *shape], ">i4").tobytes()
            content = header + values.astype(np.uint8).tobytes()
            (folder / file).write_bytes(gzip.compress(content, mtime=0))
            contents[file] = hashlib.sha256(content).hexdigest()
    return contents


def contents(split: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    drawn = {
        name: (rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n))
        for name, n in SIZES.items()
    }
    return torch.from_numpy(drawn[split][0].astype(np.uint8))[:, None], torch.from_numpy(
        drawn[split][1]
    )


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
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
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
def own(own_folders, monkeypatch, tmp_path):
    """The project's data folder, empty, with no other source but the digits; the small set is the
    published one.
    """
    import sklearn.datasets  # noqa: F401 — here, so that no test that measures time waits for it
    import torchvision

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    published = write_set(tmp_path / "pattern")
    monkeypatch.setattr(data, "CONTENTS", {"fashion_mnist": published, "mnist": published})
    for cls in (torchvision.datasets.FashionMNIST, torchvision.datasets.MNIST):
        monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:9/"])
    return own_folders / "data"


@pytest.fixture
def mine(own, monkeypatch, tmp_path):
    """The small set's raw folder below the folder that DDPM_DATA_DIR names, whole."""
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "mine"))
    write_set(tmp_path / "mine" / "FashionMNIST" / "raw")
    return tmp_path / "mine" / "FashionMNIST" / "raw"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def mirrors(monkeypatch, *addresses):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", list(addresses))


def is_digits(found) -> bool:
    return (
        found.title == "scikit-learn's digits"
        and "scikit-learn" in found.source
        and found.classes == data.DIGITS
    )


# DDPM_DATA_DIR


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("dataset", "name"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")]
)
def test_named_folder_good(
    own,
    monkeypatch,
    tmp_path,
    capsys,
    dataset,
    name,
    split,
):
    write_set(tmp_path / "mine" / name / "raw")
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "mine"))
    found = data.load_images(dataset, split)
    assert (
        is_the_small_set(found, split)
        and found.source == "DDPM_DATA_DIR"
        and found.title == data.TITLES[dataset]
    )
    assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
    (line,) = capsys.readouterr().out.splitlines()
    assert "DDPM_DATA_DIR" in line and data.TITLES[dataset] in line and str(SIZES[split]) in line
    assert not own.exists()


@pytest.mark.parametrize("asked", ["train", "test"])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", [file for files in data.FILES.values() for file in files])
def test_named_folder_damaged_is_refused_by_name_and_left_alone(
    mine,
    own,
    file,
    kind,
    asked,
):
    damage(mine / file, kind)
    left = snapshot(mine)
    with pytest.raises(ValueError, match=rf"damaged: {file} \(.*unset DDPM_DATA_DIR") as error:
        data.load_images("fashion_mnist", asked)
    assert str(mine) in str(error.value) and "missing" not in str(error.value)
    assert snapshot(mine) == left and not own.exists()


@pytest.mark.parametrize("asked", ["train", "test"])
@pytest.mark.parametrize(
    "gone",
    [
        data.FILES["test"],
        data.FILES["train"],
        [files[1] for files in data.FILES.values()],
        data.FILES["train"][:1],
    ],
    ids=["only train", "only test", "no labels", "one file"],
)
def test_named_folder_with_part_of_a_set_is_refused_with_the_names_of_missing_files(
    mine, own, gone, asked
):
    for file in gone:
        (mine / file).unlink()
    write_set(own / "FashionMNIST" / "raw")  # whole, and not looked at
    with pytest.raises(ValueError, match=rf"missing: {', '.join(gone)}\): add") as error:
        data.load_images("fashion_mnist", asked)
    assert str(mine) in str(error.value) and "unset DDPM_DATA_DIR" in str(error.value)


def test_images_beside_the_labels_of_another_set_are_refused(mine, tmp_path):
    write_set(tmp_path / "other", seed=1)
    labels = data.FILES["train"][1]
    os.replace(tmp_path / "other" / labels, mine / labels)
    with pytest.raises(
        ValueError, match=rf"damaged: {labels} \(its content is not the published one\)"
    ):
        data.load_images("fashion_mnist")


def repack(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7))


def unpack(path: Path) -> None:
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def unpack_in_place(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def drop_suffix(path: Path) -> None:
    path.rename(path.with_suffix(""))


def good_beside_damaged(path: Path) -> None:
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    damage(path, "truncated")


def damaged_beside_good(path: Path) -> None:
    path.with_suffix("").write_bytes(b"")


def good_beside_folder(path: Path) -> None:
    unpack(path)
    path.mkdir()


FORMS = [
    repack,
    unpack,
    unpack_in_place,
    drop_suffix,
    good_beside_damaged,
    damaged_beside_good,
    good_beside_folder,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["named", "own"])
def test_any_form_of_the_published_content_is_good_and_stays_as_it_is(
    own,
    mine,
    monkeypatch,
    form,
    where,
):
    raw = mine
    if where == "own":
        monkeypatch.delenv("DDPM_DATA_DIR")
        raw = own / "FashionMNIST" / "raw"
        write_set(raw)
    for file in list(raw.iterdir()):
        form(file)
    left = snapshot(raw)
    for split in data.FILES:
        assert is_the_small_set(data.load_images("fashion_mnist", split), split)
    assert snapshot(raw) == left


@pytest.mark.parametrize("there", ["no folder", "empty folder", "another set", "the folder itself"])
def test_named_folder_without_the_set_goes_on_to_the_next_source(
    own,
    mine,
    monkeypatch,
    capsys,
    there,
):
    if there == "another set":
        mine.parent.rename(mine.parent.with_name("MNIST"))
    elif there == "the folder itself":
        monkeypatch.setenv("DDPM_DATA_DIR", str(mine))
    else:
        for file in mine.iterdir():
            file.unlink()
        if there == "no folder":
            mine.rmdir()
    write_set(own / "FashionMNIST" / "raw")
    found = data.load_images("fashion_mnist")
    assert is_the_small_set(found) and found.source == "data"
    assert "no Fashion-MNIST in DDPM_DATA_DIR (FashionMNIST/raw in " in capsys.readouterr().out


# The project's own folder, and the download into it


def test_own_folder_good_asks_no_mirror(own, monkeypatch, silent_mirror):
    write_set(own / "FashionMNIST" / "raw")
    mirrors(monkeypatch, silent_mirror)
    start = time.perf_counter()
    assert is_the_small_set(data.load_images("fashion_mnist"))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("kind", DAMAGE)
def test_own_folder_damaged_is_replaced_by_a_download_and_the_damaged_file_is_kept(
    own,
    monkeypatch,
    mirror,
    capsys,
    kind,
):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, address + "set/")
    raw = own / "FashionMNIST" / "raw"
    write_set(raw)
    file = data.FILES["train"][0]
    damaged = damage(raw / file, kind)
    assert is_the_small_set(data.load_images("fashion_mnist", "test"), "test")
    assert (
        f"data: downloaded {file} into data/FashionMNIST/raw; the damaged"
        in capsys.readouterr().out
    )
    (kept,) = raw.glob("damaged-*/*")
    assert kept.name == file and kept.read_bytes() == damaged
    assert sorted(path.name for path in raw.iterdir() if path.is_file()) == sorted(
        data.CONTENTS["mnist"]
    )
    (folder / "set").rename(folder / "gone")
    assert is_the_small_set(data.load_images("fashion_mnist"))  # from disk this time


def test_a_folder_in_the_place_of_a_file_is_kept_too(own, monkeypatch, mirror):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, address + "set/")
    raw = own / "FashionMNIST" / "raw"
    (raw / data.FILES["test"][1]).mkdir(parents=True)
    (raw / data.FILES["test"][1] / "notes.txt").write_text("mine")
    assert is_the_small_set(data.load_images("fashion_mnist"))
    assert [path.read_text() for path in raw.glob("damaged-*/*/notes.txt")] == ["mine"]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("server", ["closed", "wrong files", "two of four"])
def test_without_a_replacement_nothing_in_the_own_folder_changes(
    own,
    monkeypatch,
    mirror,
    capsys,
    kind,
    server,
):
    """Damaged or not, the files may be the user's own: a failed or interrupted download leaves them
    alone.
    """
    address, folder = mirror
    write_set(folder / "set", seed=1 if server == "wrong files" else 0)
    mirrors(monkeypatch, "http://127.0.0.1:9/" if server == "closed" else address + "set/")
    if server == "two of four":
        for file in data.FILES["test"]:
            (folder / "set" / file).unlink()
    raw = own / "FashionMNIST" / "raw"
    write_set(raw)
    for files in data.FILES.values():
        damage(raw / files[0], kind)
        (raw / files[1]).unlink()
    left = snapshot(raw)
    assert is_digits(data.load_images("fashion_mnist"))
    assert snapshot(raw) == left and len(list(raw.iterdir())) == 2
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "does not hold all of Fashion-MNIST" in line
    ]
    assert (
        len(lines) == 1
        and "data/FashionMNIST/raw" in lines[0]
        and "put these files there" in lines[0]
    )
    for image_file, label_file in data.FILES.values():
        assert lines[0].index("missing:") < lines[0].index(label_file) < lines[0].index("damaged:")
        assert lines[0].index("damaged:") < lines[0].index(image_file)


def test_a_data_folder_that_cannot_be_written_to_is_told_with_its_cure(
    own, monkeypatch, mirror, capsys
):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, address + "set/")
    own.write_text("a file where the folder should be")
    assert is_digits(data.load_images("fashion_mnist"))
    assert f"{own} is no folder): set DDPM_DATA_DIR to a folder" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["good", "closed", "404", "damaged"])
def test_own_folder_absent_is_downloaded_from_the_mirror_that_has_it(
    own, monkeypatch, mirror, first
):
    address, folder = mirror
    write_set(folder / "set")
    write_set(folder / "bad", seed=1)
    before = {
        "closed": "http://127.0.0.1:9/",
        "404": address + "nothing/",
        "damaged": address + "bad/",
    }
    mirrors(monkeypatch, *(before[name] for name in [first] if name in before), address + "set/")
    found = data.load_images("fashion_mnist")
    assert is_the_small_set(found) and found.source == "data"
    assert is_the_small_set(data.load_images("fashion_mnist", "test"), "test")


def in_time(seconds: float, work) -> tuple:
    """work() in a thread, and whether it ended in time: a call that waits for ever fails the test
    and does not hang it.
    """
    answer = []
    thread = threading.Thread(target=lambda: answer.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return tuple(answer)


def test_a_mirror_that_never_answers_decides_within_15_s(own, monkeypatch, silent_mirror):
    mirrors(monkeypatch, silent_mirror, silent_mirror)
    found = in_time(15, lambda: data.load_images("fashion_mnist"))
    assert found and is_digits(found[0])


def test_a_mirror_that_never_answers_does_not_stand_before_one_that_does(
    own, monkeypatch, silent_mirror, mirror
):
    address, folder = mirror
    write_set(folder / "set")
    mirrors(monkeypatch, silent_mirror, address + "set/")
    found = in_time(15, lambda: data.load_images("fashion_mnist"))
    assert found and is_the_small_set(found[0])


# One source for both splits


@pytest.mark.parametrize("order", [("train", "test"), ("test", "train")])
def test_a_source_that_appears_between_the_splits_is_not_mixed_in(own, order):
    """Such as a network that came back: two data sets in one run would be worse than the digits."""
    first, second = order
    assert is_digits(data.load_images("fashion_mnist", first))
    write_set(own / "FashionMNIST" / "raw")
    assert is_digits(data.load_images("fashion_mnist", second))
    # loaded again: chosen anew
    assert is_the_small_set(data.load_images("fashion_mnist", first), first)
    assert is_the_small_set(data.load_images("fashion_mnist", second), second)


@pytest.mark.parametrize("spoil", ["gone", "damaged"])
def test_files_that_go_bad_between_the_splits_end_in_an_error(own, spoil):
    raw = own / "FashionMNIST" / "raw"
    write_set(raw)
    data.load_images("fashion_mnist")
    file = raw / data.FILES["test"][1]
    file.unlink() if spoil == "gone" else damage(file, "truncated")
    with pytest.raises(ValueError, match=rf"does not now \(.*{file.name}.*put the files back"):
        data.load_images("fashion_mnist", "test")
    assert is_digits(data.load_images("fashion_mnist")) and is_digits(
        data.load_images("fashion_mnist", "test")
    )


def test_each_data_set_has_its_own_source(own):
    write_set(own / "MNIST" / "raw")
    assert is_digits(data.load_images("fashion_mnist"))
    assert is_the_small_set(data.load_images("mnist", "test"), "test")
    assert is_digits(data.load_images("fashion_mnist", "test"))


# The last source


@pytest.mark.parametrize("server", ["closed", "404", "wrong files"])
def test_no_download_ends_at_the_digits_without_a_traceback(
    own,
    monkeypatch,
    mirror,
    capsys,
    server,
):
    address, folder = mirror
    write_set(folder / "set", seed=1)
    mirrors(
        monkeypatch,
        {"closed": "http://127.0.0.1:9/", "404": address, "wrong files": address + "set/"}[server],
    )
    found = data.load_images("fashion_mnist")
    assert is_digits(found) and found.images.shape == (1500, 1, 28, 28)
    lines = capsys.readouterr().out.splitlines()
    assert "scikit-learn's digits" in lines[-1] and "because Fashion-MNIST" in lines[-1]
    assert (
        "data/FashionMNIST/raw does not hold all of Fashion-MNIST (missing: "
        f"{', '.join(data.CONTENTS['mnist'])})" in lines[-2]
    )


def test_say_false_leaves_out_the_ordinary_line_and_never_a_fallback(own, capsys):
    data.load_images("mnist", say=False)
    data.load_images("mnist", "test", say=False)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "because MNIST is neither" in line
    ]
    assert len(lines) == 2 and "train split" in lines[0] and "test split" in lines[1]
    write_set(own / "MNIST" / "raw")
    data.load_images("mnist", say=False)
    data.load_images("digits", say=False)
    assert capsys.readouterr().out == ""


def test_digits_are_scikit_learns_1797_with_their_labels(own_folders):
    from sklearn.datasets import load_digits

    raw = load_digits()
    sets = [
        data.load_images("digits", split, image_size=8, say=False) for split in ("train", "test")
    ]
    images, labels = torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(labels, torch.from_numpy(raw.target)) and labels.dtype == torch.int64
    assert (images[:, 0].numpy() - raw.images * 255 / 16).max() <= 0.5 and images.max() == 255


def test_digits_are_resized_to_28_and_keep_their_look(own_folders, capsys):
    small, large = (data.load_images("digits", "test", image_size=size) for size in (8, 28))
    assert large.images.shape == (297, 1, 28, 28) and is_digits(large)
    back = torch.nn.functional.interpolate(
        large.images.float(), size=8, mode="bilinear", antialias=True
    )
    pair = torch.stack([back.flatten(), small.images.float().flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95
    assert all("digits" in line for line in capsys.readouterr().out.splitlines())


def test_padding_adds_black_and_resamples_nothing(own_folders, capsys):
    plain = data.load_images("digits", image_size=8, say=False)
    padded = data.load_images("digits", image_size=12, pad=2, say=False)
    assert padded.images.shape[-2:] == (12, 12) and torch.equal(
        padded.images[..., 2:-2, 2:-2], plain.images
    )
    assert padded.images.sum() == plain.images.sum()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        dict(dataset="cifar"),
        dict(split="valid"),
        dict(image_size=0),
        dict(image_size=8, pad=4),
        dict(pad=-1),
    ],
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


@pytest.mark.parametrize(
    "x", [torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)]
)
def test_to_model_range_refuses_what_is_not_uint8(x):
    with pytest.raises(ValueError, match=f"{x.dtype}.*expected uint8"):
        data.to_model_range(x)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, dtype=torch.uint8), "uint8"),
        (torch.tensor([0, 1]), "int64"),
        (torch.tensor([0.0, float("nan")]), "NaN"),
    ],
)
def test_to_image_range_refuses_integers_and_nan(x, words):
    with pytest.raises(ValueError, match=words):
        data.to_image_range(x)


# The real sets, where they are


@pytest.mark.parametrize(
    ("dataset", "name", "black"),
    [("fashion_mnist", "FashionMNIST", 0.50), ("mnist", "MNIST", 0.81)],
)
def test_the_real_sets(monkeypatch, dataset, name, black):
    raw = REAL / name / "raw"
    if not all((raw / file).is_file() for files in data.FILES.values() for file in files):
        pytest.skip(f"{data.TITLES[dataset]} is not on disk")
    monkeypatch.setenv("DDPM_DATA_DIR", str(REAL))  # refused, and not replaced, if it is damaged
    for split, n in (("train", 60_000), ("test", 10_000)):
        found = data.load_images(dataset, split)
        assert (
            found.images.shape == (n, 1, 28, 28)
            and found.images.max() == 255
            and found.images.min() == 0
        )
        counts = found.labels.bincount()
        assert len(counts) == 10 and (counts > 0.08 * n).all()
        assert (found.images == 0).float().mean() == pytest.approx(black, abs=0.01)
