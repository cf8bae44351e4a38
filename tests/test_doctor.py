"""`python -m ddpm_utils doctor` finds what is wrong and says what to do."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from lesson_files import ROOT

from ddpm_utils import __main__ as command
from ddpm_utils import data
from ddpm_utils.cli import doctor


@pytest.fixture
def versions(monkeypatch):
    """Change the versions that the doctor sees: versions({"torch": "2.3.0"}); None takes a package away."""
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


@pytest.mark.parametrize(("found", "words"), [(None, "einops is missing"), ("0.7.0", "einops is 0.7.0")])
def test_a_missing_or_old_package_is_named_with_its_cure(own_folders, versions, capsys, found, words):
    versions({"einops": found})
    assert command.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert words in out and "pip install 'einops>=0.8.2'" in out


def test_a_torchvision_made_for_another_torch_is_named_with_its_cure(versions, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.3.0"])
    versions({"torch": "2.11.0", "torchvision": "0.18.0"})
    (problem,) = doctor.check_pair()
    assert "torchvision 0.18.0 wants torch==2.3.0" in problem and "--force-reinstall torch torchvision" in problem


def test_a_damaged_data_file_is_named(own_folders, capsys):
    folder = data.raw_folder("mnist", own_folders / "data")
    folder.mkdir(parents=True)
    for files in data.FILES.values():
        for file in files:
            (folder / file).write_bytes(b"torn")
    assert command.main(["doctor"]) == 1
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().out


def test_it_works_without_torch(tmp_path):
    """Where torch is missing, the doctor is what says so: in a process that cannot import it."""
    code = "import sys; sys.modules['torch'] = None; from ddpm_utils.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "torch" in done.stdout and "To mend:" in done.stdout and done.stderr == ""
