"""Device, seed, fast mode and folders."""

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_utils import runtime

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.mark.parametrize(("value", "fast"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_fast_mode_follows_the_variable(monkeypatch, value, fast):
    if value is not None:
        monkeypatch.setenv("DDPM_FAST", value)
    assert runtime.is_fast() is fast
    assert runtime.shrink(1000, 3) == (3 if fast else 1000)
    assert ("fast" in runtime.checkpoint_dir("lesson").parts) is fast


def test_start_says_device_and_seed_in_one_line_and_shouts_in_fast_mode(monkeypatch, capsys):
    device, rng = runtime.start(7, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "seed 7" in lines[0] and "CPU" in lines[0] and device.type == "cpu"
    assert rng.initial_seed() == 7
    monkeypatch.setenv("DDPM_FAST", "1")
    runtime.start(7, "cpu")
    assert "FAST MODE" in capsys.readouterr().out


def test_pick_device_takes_what_there_is():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_device(torch.device("cpu")) == torch.device("cpu")
    assert runtime.pick_device().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["tpu", "GPU", "", "cuda:0"])
def test_pick_device_refuses_what_there_is_not(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"not here.*cpu") as error:
        runtime.pick_device(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["cuda:1", "cuda:7", "cuda:x"])
def test_pick_device_refuses_a_card_beyond_the_last(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=name):
        runtime.pick_device(name)


def test_seed_everything_repeats_every_source_of_chance():
    def draw():
        rng = runtime.seed_everything(5)
        return (
            random.random(),
            np.random.rand(),  # noqa: NPY002
            torch.rand(()).item(),
            torch.rand((), generator=rng).item(),
        )

    assert draw() == draw()


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "avx512_f"])
@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_autocast_on_a_cpu_follows_its_features_unless_told_otherwise(
    monkeypatch, feature, variable
):
    monkeypatch.setattr(runtime, "_cpu_features", lambda: {feature: True, "sse": True})
    monkeypatch.delenv("DDPM_FLOAT32", raising=False)
    if variable is not None:
        monkeypatch.setenv("DDPM_FLOAT32", variable)
    with runtime.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    wanted = feature.endswith("bf16") and variable != "1"
    assert product.dtype == (torch.bfloat16 if wanted else torch.float32)


def test_the_cpu_s_features_can_be_asked_for():
    assert isinstance(dict(runtime._cpu_features()), dict)


@pytest.mark.parametrize("path", ["/", "/data", "/a/b", "/a/b/c/d", "~", "here", "../up"])
def test_short_path_is_never_absolute(path):
    short = runtime.short_path(Path(path).expanduser())
    assert not Path(short).is_absolute() and len(Path(short).parts) <= 2


def test_short_path_inside_the_project_is_relative_to_it(own_folders):
    assert runtime.short_path(own_folders / "a" / "b" / "c.pt") == "a/b/c.pt"


def test_short_path_of_a_data_folder_on_another_disk_stays_short(own_folders, tmp_path):
    (tmp_path / "disk" / "sets").mkdir(parents=True)
    (own_folders / "data").symlink_to(tmp_path / "disk" / "sets")
    assert runtime.short_path(own_folders / "data" / "FashionMNIST") == "data/FashionMNIST"
    assert runtime.short_path(own_folders / "a" / ".." / "b") == "b"


def test_folders_lie_at_the_root_and_only_outputs_is_made(own_folders, monkeypatch, tmp_path):
    assert runtime.data_dir() == own_folders / "data" and not runtime.data_dir().exists()
    assert (
        runtime.checkpoint_dir("x") == own_folders / "checkpoints" / "x"
        and not runtime.checkpoint_dir().exists()
    )
    assert (
        runtime.output_path("x") == own_folders / "outputs" / "x"
        and not runtime.output_path().exists()
    )
    assert (
        runtime.output_dir("x") == own_folders / "outputs" / "x"
        and (own_folders / "outputs" / "x").is_dir()
    )
    monkeypatch.setenv("DDPM_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DDPM_CHECKPOINT_DIR", str(tmp_path / "kept"))
    assert runtime.checkpoint_dir("x") == tmp_path / "kept" / "x"
    assert (
        runtime.output_dir("y") == tmp_path / "elsewhere" / "y"
        and (tmp_path / "elsewhere" / "y").is_dir()
    )


FOLDERS = {
    "DDPM_DATA_DIR": runtime.data_dir_override,
    "DDPM_OUTPUT_DIR": runtime.output_path,
    "DDPM_CHECKPOINT_DIR": runtime.checkpoint_dir,
}


@pytest.mark.parametrize("variable", FOLDERS)
def test_variables_count_from_the_root_wherever_the_process_stands(
    own_folders, monkeypatch, tmp_path, variable
):
    folder, elsewhere = FOLDERS[variable], tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for value, expected in {
        "a/b": own_folders / "a" / "b",
        ".": own_folders,
        "../a": own_folders / ".." / "a",
        "~/sets": Path.home() / "sets",
        str(tmp_path): tmp_path,
    }.items():
        monkeypatch.setenv(variable, value)
        assert folder() == expected
    monkeypatch.setenv(variable, "~no_such_user/x")
    with pytest.raises(ValueError, match=f"{variable}='~no_such_user/x' names no folder"):
        folder()


def test_an_unset_or_empty_variable_names_nothing(own_folders, monkeypatch):
    assert runtime.data_dir_override() is None
    monkeypatch.setenv("DDPM_DATA_DIR", "")
    monkeypatch.setenv("DDPM_OUTPUT_DIR", "")
    assert runtime.data_dir_override() is None and runtime.output_path() == own_folders / "outputs"


# Folders that cannot be written to. Root may write anywhere, so the system's answer is pretended or
# real obstacles are used.


def refuse(monkeypatch, where: str, number: int) -> None:
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(
        *{"making": (os, "mkdir"), "writing": (tempfile, "TemporaryFile")}[where], fail
    )


@pytest.mark.parametrize("where", ["making", "writing"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, PermissionError),
        (errno.EPERM, PermissionError),
        (errno.EROFS, OSError),
        (errno.ENOSPC, OSError),
    ],
)
def test_output_dir_names_folder_reason_and_cure(
    own_folders,
    monkeypatch,
    where,
    number,
    kind,
):
    refuse(monkeypatch, where, number)
    with pytest.raises(kind) as error:
        runtime.output_dir("lesson_05")
    assert str(error.value) == (
        f"{own_folders}/outputs/lesson_05 cannot be written to ({os.strerror(number)}): "
        "set DDPM_OUTPUT_DIR to a folder that you can write to"
    )


@pytest.mark.parametrize("taken", ["outputs", "outputs/lesson_05"])
@pytest.mark.parametrize("obstacle", ["file", "broken link"])
def test_what_stands_in_the_place_of_a_folder_is_named(own_folders, taken, obstacle):
    path = own_folders / taken
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nowhere") if obstacle == "broken link" else path.write_text("")
    for call in (runtime.make_folder, runtime.check_folder):
        with pytest.raises(OSError, match=rf"\({path} is no folder\): set DDPM_OUTPUT_DIR"):
            call(runtime.output_path("lesson_05", "deeper"))


def test_the_cure_fits_the_folder(own_folders, monkeypatch, tmp_path):
    refuse(monkeypatch, "writing", errno.EROFS)
    # inside another of the project's folders
    monkeypatch.setenv("DDPM_CHECKPOINT_DIR", "outputs/kept")
    for folder, cure in {
        runtime.output_path("a"): "set DDPM_OUTPUT_DIR to a folder that you can write to",
        runtime.checkpoint_dir("a"): "set DDPM_CHECKPOINT_DIR to a folder that you can write to",
        runtime.data_dir() / "MNIST": "set DDPM_DATA_DIR to a folder that holds the data sets",
        tmp_path / "run": "choose a folder that you can write to",
    }.items():
        with pytest.raises(OSError) as error:
            runtime.check_folder(folder)
        assert str(error.value) == f"{folder} cannot be written to (Read-only file system): {cure}"


def test_a_good_folder_is_made_and_nothing_is_left_in_it(own_folders):
    runtime.check_folder(own_folders / "a" / "b")
    assert list(own_folders.iterdir()) == []
    assert runtime.make_folder(str(own_folders / "a" / "b")) == own_folders / "a" / "b"
    assert list((own_folders / "a" / "b").iterdir()) == []
    runtime.make_folder(own_folders / "a" / "b")


# An installed copy: the package's folder alone, as in site-packages


WHERE = """
from ddpm_utils import runtime
print(runtime.output_dir("x"), runtime.checkpoint_dir("y"), runtime.data_dir(), sep="\\n")
print(runtime.short_path(runtime.output_path("x")))
print(runtime.short_path(runtime.data_dir()))
"""


@pytest.mark.parametrize("beside", ["nothing", "a foreign project"])
def test_an_installed_copy_writes_nothing_beside_the_package(own_folders, tmp_path, beside):
    site, home, work = (tmp_path / name for name in ("site", "home", "work"))
    source = Path(runtime.__file__).parent
    shutil.copytree(
        source, site / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "gallery")
    )
    home.mkdir()
    work.mkdir()
    if beside == "a foreign project":
        (site / "notebooks").mkdir()
        (site / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    before = sorted(site.rglob("*"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)}
    environment |= {"DDPM_CHECKPOINT_DIR": "kept"}
    done = subprocess.run(
        [sys.executable, "-c", WHERE],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    outputs, checkpoints, cache, short_outputs, short_cache = done.stdout.splitlines()
    assert (outputs, checkpoints) == (str(work / "outputs" / "x"), str(work / "kept" / "y"))
    assert Path(cache).is_relative_to(home) and Path(cache).name == "ddpm-utils"
    assert short_outputs == "outputs/x" and short_cache == cache.replace(str(home), "~")
    assert sorted(site.rglob("*")) == before


def test_this_checkout_is_recognized():
    assert runtime.IN_CHECKOUT


def in_a_notebook(*cells):
    """What each cell prints, run one after the other in one IPython shell."""
    program = (
        "import contextlib, io\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        f"for cell in {list(cells)!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        shell.run_cell(cell, store_history=False).raise_error()\n"
        "    print(said.getvalue().strip().replace(chr(10), ' '))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


START = (
    "from ddpm_utils import runtime; import torch, random, numpy as np; device, rng = "
    "runtime.start(SEED, 'cpu')"
)
OWN = "print(torch.rand(1, generator=rng).item())"
GLOBAL = "print(torch.rand(1).item(), random.random(), np.random.rand())"


@pytest.mark.parametrize(
    "cell",
    [OWN, GLOBAL, "more = torch.Generator().manual_seed(5); print(torch.rand(1, generator=more))"],
)
def test_a_cell_that_runs_again_draws_the_same_numbers(cell):
    other = "print(torch.rand(3, generator=rng), torch.rand(2))"
    *_, first, again, after, back, after_again = in_a_notebook(
        "SEED = 0", START, cell, cell, other, cell, other
    )
    assert first == again == back and after == after_again
    *_, plain = in_a_notebook("SEED = 0", START, cell, other)
    assert after == plain  # the second run changed nothing for the cells below


def test_a_restart_with_another_seed_forgets_what_cells_drew():
    *_, zero, _, _, seven = in_a_notebook("SEED = 0", START, OWN, "SEED = 7", START, OWN)
    *_, fresh = in_a_notebook("SEED = 7", START, OWN)
    assert seven == fresh != zero


def test_a_loop_in_one_cell_still_draws_new_numbers():
    *_, said = in_a_notebook(
        "SEED = 0", START, "print(*[torch.rand(1, generator=rng).item() for _ in range(3)])"
    )
    assert len(set(said.split())) == 3
