"""`python -m ddpm_utils doctor` finds what is wrong and says what to do."""

import errno
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import test_data
from lesson_files import ROOT

from ddpm_utils import __main__ as command
from ddpm_utils import data, pretrained
from ddpm_utils.cli import doctor


@pytest.fixture
def versions(monkeypatch):
    """Change the versions that the doctor sees: versions({"torch": "2.3.0"}); None takes a package
    away.
    """
    real = importlib.metadata.version

    def pretend(changes):
        def version(name):
            found = changes.get(name, real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_a_sound_installation_is_well(own_folders, capsys):
    assert command.main(["doctor"]) == 0
    assert "All is well" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "words"), [(None, "einops is missing"), ("0.7.0", "einops is 0.7.0")]
)
def test_a_missing_or_old_package_is_named_with_its_cure(
    own_folders,
    versions,
    capsys,
    found,
    words,
):
    versions({"einops": found})
    assert command.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert words in out and "pip install 'einops>=0.8.2'" in out


def test_a_torchvision_made_for_another_torch_is_named_with_its_cure(versions, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.3.0"])
    versions({"torch": "2.11.0", "torchvision": "0.18.0"})
    (problem,) = doctor.check_pair()
    assert (
        "torchvision 0.18.0 wants torch==2.3.0" in problem
        and "--force-reinstall torch torchvision" in problem
    )


@pytest.fixture
def quick(own_folders, monkeypatch):
    """Own folders, and a doctor that does not load the weights: most of its time."""
    monkeypatch.setattr(doctor, "check_weights", list)
    return own_folders


@pytest.fixture
def small_set(quick, monkeypatch, tmp_path):
    """The small set of test_data in place of both published ones; call it to write it below a
    folder.
    """
    published = test_data.write_set(tmp_path / "pattern")
    monkeypatch.setattr(data, "CONTENTS", {"fashion_mnist": published, "mnist": published})

    def write(root, dataset="fashion_mnist"):
        folder = data.raw_folder(dataset, root)
        test_data.write_set(folder)
        return folder

    return write


def problem_of(capsys) -> str:
    """The one problem that the doctor names, after it has reported that there is one."""
    assert command.main(["doctor"]) == 1
    (problem,) = capsys.readouterr().out.split("To fix:")[1].strip().splitlines()
    return problem


IMAGES, LABELS = data.FILES["train"]


@pytest.mark.parametrize("place", ["own", "named"])
@pytest.mark.parametrize("fault", ["damaged", "missing", "pointer"])
def test_a_set_that_is_not_whole_is_named_with_its_files(
    small_set,
    own_folders,
    monkeypatch,
    tmp_path,
    capsys,
    place,
    fault,
):
    root = own_folders / "data" if place == "own" else tmp_path / "mine"
    if place == "named":
        monkeypatch.setenv("DDPM_DATA_DIR", str(root))
    folder = small_set(root)
    small_set(root, "mnist")
    assert command.main(["doctor"]) == 0
    assert "All is well" in capsys.readouterr().out
    if fault == "missing":
        (folder / LABELS).unlink()
    else:
        (folder / LABELS).write_bytes(b"torn" if fault == "damaged" else POINTER)
    problem = problem_of(capsys)
    assert (
        f"Fashion-MNIST in {folder} is not whole" in problem
        and "put the published files there" in problem
    )
    assert (
        f"{'missing' if fault == 'missing' else 'damaged'}: {LABELS}" in problem
        and IMAGES not in problem
    )


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder", "the raw folder itself"])
def test_a_named_data_folder_that_holds_no_set_is_told(
    small_set,
    monkeypatch,
    tmp_path,
    capsys,
    there,
):
    named = tmp_path / "mine"
    if there == "a file":
        named.write_text("")
    elif there == "an empty folder":
        named.mkdir()
    elif there == "the raw folder itself":
        named = small_set(tmp_path / "mine")
    monkeypatch.setenv("DDPM_DATA_DIR", str(named))
    problem = problem_of(capsys)
    assert f"DDPM_DATA_DIR names {named}, which" in problem and "correct it or unset it" in problem
    assert ("FashionMNIST/raw nor MNIST/raw" in problem) == named.is_dir()


@pytest.mark.parametrize("variable", ["DDPM_OUTPUT_DIR", "DDPM_CHECKPOINT_DIR"])
@pytest.mark.parametrize("obstacle", ["a file", "a file above", "a broken link"])
def test_a_folder_that_cannot_be_made_is_told_with_its_variable(
    quick,
    monkeypatch,
    tmp_path,
    capsys,
    variable,
    obstacle,
):
    folder = tmp_path / "taken" / "below" if obstacle == "a file above" else tmp_path / "taken"
    if obstacle == "a broken link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "taken").write_text("")
    monkeypatch.setenv(variable, str(folder))
    problem = problem_of(capsys)
    assert f"{folder} cannot be written to" in problem and f"set {variable} to a folder" in problem
    assert str(tmp_path / "taken") + " is no folder" in problem


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_checkout_that_cannot_be_written_to_is_told_with_three_cures(
    quick, monkeypatch, capsys, number
):
    def fail(dir=None, **options):
        raise OSError(number, os.strerror(number), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert command.main(["doctor"]) == 1
    problems = capsys.readouterr().out.split("To fix:")[1].strip().splitlines()
    variables = ["DDPM_OUTPUT_DIR", "DDPM_CHECKPOINT_DIR", "DDPM_DATA_DIR"]
    assert len(problems) == 3
    assert all(f"set {name} to" in line for name, line in zip(variables, problems, strict=True))
    assert all(f"({os.strerror(number)})" in line for line in problems)


def test_it_leaves_no_folder_behind(
    quick,
    own_folders,
    monkeypatch,
    tmp_path,
    capsys,
):
    monkeypatch.setenv("DDPM_OUTPUT_DIR", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("DDPM_CHECKPOINT_DIR", "relative/c")
    assert command.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "a" / "b") in out and str(own_folders / "relative" / "c") in out
    assert list(own_folders.iterdir()) == [] and not (tmp_path / "a").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 3354899\n"
WEIGHTS = ["mnist.pt", "classifier_mnist.pt", "mnist.json"]


@pytest.fixture
def shelf(own_folders, monkeypatch, tmp_path):
    """A copy of the shipped weights and their cards."""
    monkeypatch.setattr(
        pretrained, "FOLDER", shutil.copytree(pretrained.FOLDER, tmp_path / "shelf")
    )
    return tmp_path / "shelf"


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("pointer", "is a Git LFS pointer and not the file itself: run `git lfs pull`"),
        ("missing", "is missing in .*: take it from the repository again"),
        ("damaged", "cannot be loaded .*: take it from the repository again"),
        ("empty", "cannot be loaded .*: take it from the repository again"),
    ],
)
def test_weights_that_cannot_be_used_are_named_with_their_cure(
    shelf,
    capsys,
    file,
    fault,
    words,
):
    path = shelf / file
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"pointer": POINTER, "damaged": path.read_bytes()[:300], "empty": b""}[fault]
        )
    problem = problem_of(capsys)
    assert re.search(f"{path.stem}.*{words}", problem) and problem.count("take it from") <= 1


def test_weights_of_another_network_are_named(shelf, capsys):
    shutil.copy(shelf / "classifier_mnist.pt", shelf / "mnist.pt")
    assert "mnist cannot be loaded" in problem_of(capsys)


def test_a_package_without_weights_is_told(shelf, capsys):
    for path in [*shelf.glob("*.pt"), *shelf.glob("*.json")]:
        path.unlink()
    assert "no weights in" in problem_of(capsys)


@pytest.mark.parametrize("variable", ["DDPM_OUTPUT_DIR", "DDPM_CHECKPOINT_DIR", "DDPM_DATA_DIR"])
def test_a_home_that_does_not_exist_is_told_once(quick, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "~no_such_user/x")
    assert f"{variable}='~no_such_user/x' names no folder" in problem_of(capsys)


def test_it_works_without_torch(tmp_path):
    """Where torch is missing, the doctor is what says so: in a process that cannot import it."""
    code = (
        "import sys; sys.modules['torch'] = None; from ddpm_utils.__main__ import main; "
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and "torch" in done.stdout
        and "To fix:" in done.stdout
        and done.stderr == ""
    )
