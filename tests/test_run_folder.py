"""What a run does with its folder and its images: who may write there, when it goes on, and where
samples end up.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from lesson_files import ROOT
from PIL import Image
from test_cli import CONFIG, STEPS, checkpoint, error_of, press_stop_at, rows, train, words
from test_training import same

from ddpm_utils import __main__ as command
from ddpm_utils import checkpoints, config, pretrained
from ddpm_utils.cli import train as train_command
from ddpm_utils.config import TrainConfig

pytestmark = pytest.mark.usefixtures("own_folders")
FOLDER_RUN = {name: value for name, value in CONFIG.items() if name != "dataset"} | {"epochs": 2.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train("--out", folder) == 0
    return folder


@pytest.fixture
def faces(tmp_path):
    """A folder of 40 gray images."""
    folder = tmp_path / "faces"
    write_images(folder, 40)
    return folder


def write_images(folder, n, seed=0):
    folder.mkdir()
    for i, pixels in enumerate(
        torch.randint(0, 256, (n, 8, 8), generator=torch.Generator().manual_seed(seed))
    ):
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{i:03}.png")


def train_on(dataset, *more) -> int:
    line = ["train", *words(FOLDER_RUN), "--dataset", str(dataset), *map(str, more)]
    return command.main(line)


def resume(folder, *more) -> int:
    return command.main(["train", "--resume", "--out", str(folder), *map(str, more)])


def stopped_run(monkeypatch, dataset, out) -> None:
    with monkeypatch.context() as patch:
        press_stop_at(patch, 3)
        assert train_on(dataset, "--out", out) == 130


# the images of a run


def test_a_relative_dataset_is_stored_as_what_it_meant(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stopped_run(monkeypatch, "./faces", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["config"]["dataset"] == str(faces)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_images(elsewhere / "faces", 40, seed=1)  # another folder of that name
    monkeypatch.chdir(elsewhere)
    assert resume(tmp_path / "run") == 0
    assert checkpoint(tmp_path / "run")["step"] == 5  # 39 images twice, 16 a step
    assert (
        train_on("./faces", "--out", tmp_path / "run") == 2
        and "holds a run already" in capsys.readouterr().err
    )


def test_a_home_folder_is_stored_with_its_name(faces, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_on("~/faces", "--out", tmp_path / "run") == 0
    assert checkpoint(tmp_path / "run")["config"]["dataset"] == str(faces)


def test_moved_images_are_named_and_the_run_goes_on(faces, tmp_path, monkeypatch, capsys):
    assert train_on(faces, "--out", tmp_path / "whole") == 0
    stopped_run(monkeypatch, faces, tmp_path / "run")
    moved = faces.rename(tmp_path / "moved")
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    assert "faces" in error_of(capsys)
    assert resume(tmp_path / "run", "--dataset", moved) == 0
    assert same(checkpoint(tmp_path / "run")["ema"], checkpoint(tmp_path / "whole")["ema"])
    assert checkpoint(tmp_path / "run")["config"]["dataset"] == str(moved)
    assert resume(tmp_path / "run") == 0  # and now it knows


@pytest.mark.parametrize(
    "change", ["other images", "another pixel", "one more", "one fewer", "another name"]
)
def test_other_images_are_told_and_nothing_is_changed(
    faces,
    tmp_path,
    monkeypatch,
    capsys,
    change,
):
    stopped_run(monkeypatch, faces, tmp_path / "run")
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    }
    other = tmp_path / "other"
    if change == "other images":
        write_images(other, 40, seed=1)
    else:
        shutil.copytree(faces, other)
    if change == "another pixel":
        pixels = Image.open(other / "007.png")
        pixels.putpixel((0, 0), pixels.getpixel((0, 0)) ^ 255)
        pixels.save(other / "007.png")
    elif change == "one more":
        shutil.copy(other / "000.png", other / "999.png")
    elif change == "one fewer":
        (other / "039.png").unlink()
    elif change == "another name":  # another order of the same images
        (other / "001.png").rename(other / "zzz.png")
    capsys.readouterr()
    assert resume(tmp_path / "run", "--dataset", other) == 2
    says = (
        r"number and size .* then, .* now"
        if change.startswith("one")
        else r"pixels \(digest\) \w+ then, \w+ now"
    )
    assert re.search(
        rf"error: the run came to step 3 on other data: .*{says}", capsys.readouterr().err
    )
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()
    } == before


def test_a_streamed_run_goes_on_from_memory_and_back(faces, tmp_path, monkeypatch):
    from ddpm_utils import folders

    assert train_on(faces, "--out", tmp_path / "whole") == 0
    load = folders.train_and_test
    with monkeypatch.context() as patch:
        patch.setattr(folders, "train_and_test", lambda *a, **named: load(*a, **named, stream=True))
        stopped_run(monkeypatch, faces, tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert same(checkpoint(tmp_path / "run")["ema"], checkpoint(tmp_path / "whole")["ema"])


def test_a_small_set_gets_as_many_steps_as_the_default(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train_command, "run_loop", lambda *arguments: (_ for _ in ()).throw(ValueError("enough"))
    )
    line = [
        *words(
            {
                name: value
                for name, value in FOLDER_RUN.items()
                if name not in ("epochs", "batch_size")
            }
        )
    ]
    assert (
        command.main(["train", *line, "--dataset", str(faces), "--out", str(tmp_path / "run")]) == 2
    )
    assert "2,812 steps of 32 images" in capsys.readouterr().out
    assert train_on(faces, "--out", tmp_path / "few") == 2
    assert (
        "5 steps are few for a network to learn from; --epochs 1154 makes 2,812"
        in capsys.readouterr().out
    )
    assert round(1154 * 39 / 16) >= 2812


@pytest.mark.parametrize("place", ["", "/", "/../faces"])
def test_the_images_are_no_place_for_the_run(faces, capsys, place):
    assert train_on(faces, "--out", f"{faces}{place}") == 2
    assert "holds your images" in capsys.readouterr().err
    assert not [path for path in faces.iterdir() if path.suffix != ".png"]


def test_runs_and_samples_below_the_images_are_left_out(faces, tmp_path, capsys):
    assert train_on(faces, "--out", faces / "run") == 0
    assert (
        command.main(
            [
                "sample",
                "--weights",
                str(faces / "run"),
                "--steps",
                "2",
                "--out",
                str(faces / "drawn"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert train_on(faces, "--out", tmp_path / "next") == 0
    said = capsys.readouterr().out
    assert "2 folders of runs or samples in" in said and "left out: drawn, run" in said
    assert checkpoint(tmp_path / "next")["data"]["shape"] == [39, 1, 8, 8]


# longer runs


def test_a_finished_run_can_be_made_longer(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    assert resume(run) == 0
    assert (
        "all 19 steps are made; to make the run longer, add --epochs N with N above 0.2"
        in capsys.readouterr().out
    )
    assert resume(run, "--epochs", "0.3") == 0
    assert checkpoint(run)["step"] == 28 and checkpoint(run)["config"]["epochs"] == 0.3
    assert [int(row["step"]) for row in rows(run)] == list(range(1, 29))
    assert resume(run) == 0 and checkpoint(run)["step"] == 28  # the config has kept it
    capsys.readouterr()
    assert resume(run, "--epochs", "0.25") == 2
    assert (
        "epochs=0.25 is 23 steps, and this run has made 28: give more than"
        in capsys.readouterr().err
    )
    assert checkpoint(run)["config"]["epochs"] == 0.3


def test_a_stopped_run_can_be_made_longer_and_stopped_again(tmp_path, monkeypatch):
    for step, more in ((4, []), (9, ["--resume", "--epochs", "0.3"])):
        with monkeypatch.context() as patch:
            press_stop_at(patch, step)
            assert train("--out", tmp_path, *more, **({"epochs": 0.3} if more else {})) == 130
    assert resume(tmp_path) == 0 and checkpoint(tmp_path)["step"] == 28


def test_a_longer_run_that_was_killed_before_its_first_save_stays_longer(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"epochs": 0.3}))
    assert resume(run) == 0 and checkpoint(run)["step"] == 28


# one folder, one process

HOLD = """
import sys, time
from ddpm_utils import checkpoints
with checkpoints.claim(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed `tmp_path / "run"`."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"mine\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("flag", [[], ["--resume"]])
def test_a_folder_in_use_is_refused(
    whole,
    holder,
    tmp_path,
    capsys,
    flag,
):
    if flag:
        shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert train("--out", tmp_path / "run", *flag) == 2
    assert re.search(
        r"^error: .*run is in use by another run: wait for its end", capsys.readouterr().err, re.M
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="needs kill −9")
def test_the_claim_of_a_killed_process_blocks_nobody(whole, holder, tmp_path):
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert resume(tmp_path / "run") == 0


def test_of_two_runs_started_together_one_is_made_and_one_refused(tmp_path):
    line = [
        sys.executable,
        "-m",
        "ddpm_utils",
        "train",
        *words(CONFIG),
        "--out",
        str(tmp_path / "run"),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(line, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in "ab"
    ]
    errors = [process.communicate()[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    lost = errors[[process.returncode for process in both].index(2)].splitlines()[-1]
    assert re.match(r"error: .*run (is in use by another run|holds a run already)", lost)
    assert checkpoint(tmp_path / "run")["step"] == STEPS and len(rows(tmp_path / "run")) == STEPS


def test_a_file_system_without_locks_is_trusted(tmp_path, monkeypatch):
    import filelock

    def no_locks(self, *arguments, **named):
        raise NotImplementedError("this file system does not support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    with checkpoints.claim(tmp_path):
        pass


# files that are not what they should be


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "config.json",
            "[1, 2]",
            "config.json is no config of a run: it holds a list, expected an object",
        ),
        ("config.json", "null", "config.json is no config of a run: it holds a NoneType"),
        ("config.json", "", "config.json is no JSON"),
        ("config.json", b"\xff\xfe\x00", "config.json is no JSON"),
        (
            "config.json",
            '{"lr": "fast"}',
            "config.json is no config of a run: lr='fast' is outside",
        ),
        (
            "config.json",
            '{"sharpness": 1}',
            "config.json is no config of a run: unknown config field sharpness",
        ),
        ("last.pt", "", "last.pt is no whole checkpoint"),
        ("last.pt", b"\x80\x02garbage", "last.pt is no whole checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(
    whole,
    tmp_path,
    capsys,
    name,
    content,
    says,
):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert resume(run) == 2
    assert says in error_of(capsys)


@pytest.mark.parametrize("entry", checkpoints.ENTRIES)
def test_a_checkpoint_that_lacks_an_entry_is_named_in_one_line(whole, tmp_path, capsys, entry):
    run = shutil.copytree(whole, tmp_path / "run")
    payload = torch.load(run / "last.pt", weights_only=True)
    del payload[entry]
    torch.save(payload, run / "last.pt")
    assert resume(run) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: ") and f"last.pt is no whole checkpoint: {entry} missing" in text
    assert "Take another, such as best.pt" in text


def test_rows_of_garbage_are_left_out_of_the_losses(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    table = (run / "loss.csv").read_bytes()
    (run / "loss.csv").write_bytes(table + b"\xff\xfe,garbage\n12x,1,2,3,4\n7,1\n")
    assert resume(run) == 0
    assert (run / "loss.csv").read_bytes() == table


# where samples go


def sample(*more) -> int:
    return command.main(["sample", "--n", "2", "--steps", "2", *map(str, more)])


def test_samples_of_two_checkpoints_of_one_name_lie_side_by_side(
    whole, tmp_path, own_folders, capsys
):
    for name in ("A", "B"):
        shutil.copytree(whole, tmp_path / name)
        assert sample("--weights", tmp_path / name / "best.pt") == 0
    assert sorted(os.listdir(own_folders / "outputs" / "samples")) == ["A-best", "B-best"]
    shutil.copytree(whole, tmp_path / "other" / "A")
    for weights in (tmp_path / "A", tmp_path / "other" / "A", tmp_path / "A" / "last.pt", "mnist"):
        assert sample("--weights", weights) == 0
    assert sorted(os.listdir(own_folders / "outputs" / "samples")) == [
        "A",
        "A-2",
        "A-best",
        "A-last",
        "B-best",
        "mnist",
    ]
    about = json.loads((own_folders / "outputs" / "samples" / "A-2" / "samples.json").read_text())
    assert (
        about["weights"] == str(tmp_path / "other" / "A")
        and about["n"] == 2
        and about["steps"] == 2
    )


def test_the_same_samples_again_take_no_second_folder_but_others_do(whole, tmp_path, own_folders):
    run = shutil.copytree(whole, tmp_path / "run")
    assert sample("--weights", run) == sample("--weights", run) == 0
    assert os.listdir(own_folders / "outputs" / "samples") == ["run"]
    assert sample("--weights", run, "--seed", "5") == 0
    assert sorted(os.listdir(own_folders / "outputs" / "samples")) == ["run", "run-2"]


# a reader that goes away


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("line", ["doctor", "--help", "train --help"])
def test_output_closed_by_its_reader_is_no_error(line):
    program = (
        f"{sys.executable} -u -m ddpm_utils {line} | {{ read first; }}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path):
    program = (
        f"{sys.executable} -u -m ddpm_utils train {' '.join(words(CONFIG))} --out "
        f"{tmp_path}/run 2>&1 | head -1"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{program}; exit ${{PIPESTATUS[0]}}"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and checkpoint(tmp_path / "run")["step"] == STEPS


def test_every_error_that_gives_a_command_gives_one_that_works(
    whole, tmp_path, monkeypatch, capsys
):
    spaced = tmp_path / "a run"
    with monkeypatch.context() as patch:
        press_stop_at(patch, 3)
        assert train("--out", spaced) == 130
    (hint,) = re.findall(r"to go on: python -m ddpm_utils (.*)", capsys.readouterr().err)
    import shlex

    assert command.main(shlex.split(hint)) == 0 and checkpoint(spaced)["step"] == STEPS
    assert train("--out", spaced) == 2
    (hint,) = re.findall(r"To go on with it: python -m ddpm_utils (.*);", capsys.readouterr().err)
    assert command.main(shlex.split(hint)) == 0
    assert command.main(["train", "--bogus"]) == 2
    (hint,) = re.findall(r"run python -m ddpm_utils (.*help)", capsys.readouterr().err)
    assert command.main(hint.split()) == 0


def test_presets_know_the_number_of_images_and_the_gpu():
    assert config.preset_for("cpu") == {"epochs": 1.5}
    assert config.preset_for("cpu", 60)["epochs"] == 1500
    assert config.preset_for("cpu", 200_000)["epochs"] == 1.5
    assert (
        config.preset_for("cuda", capability=(8, 0))
        == config.preset_for("cuda")
        == config.preset_for("mps")
    )
    assert config.preset_for("cuda", capability=(7, 5)) == config.preset_for("cuda") | {
        "epochs": 6.0
    }
    assert TrainConfig(**config.preset_for("cpu")) == TrainConfig()
    assert pretrained.build(TrainConfig(**config.preset_for("cuda", 1))) is not None


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "200"), ({"GOMP_SPINCOUNT": "100"}, "100"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_unless_the_user_has_chosen(given, found):
    code = (
        "import os; from ddpm_utils import __main__ as c; c.main(['--help']); "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | given, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == str(found)
