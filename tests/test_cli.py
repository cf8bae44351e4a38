"""The command line: runs that can be stopped and go on exactly, files that open, bad input told in
one line.
"""

import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings

import imageio.v3 as iio
import pytest
import torch
from conftest import TINY
from lesson_files import ROOT
from PIL import Image
from test_config import OTHER
from test_training import same

from ddpm_utils import __main__ as command
from ddpm_utils import (
    checkpoints,
    config,
    data,
    distributed,
    evaluation,
    plots,
    pretrained,
    runs,
    runtime,
    training,
)
from ddpm_utils.cli import drawing, flags, losslog
from ddpm_utils.cli import sample as sample_command
from ddpm_utils.cli import train as train_command
from ddpm_utils.config import TrainConfig

pytestmark = pytest.mark.usefixtures("own_folders")
CONFIG = TINY | {"batch_size": 16, "epochs": 0.2, "dropout": 0.2, "fold": 1}
STEPS = 19  # of CONFIG on 1,500 digits; saved after every second one


def flag(name: str) -> str:
    """The flag of a field: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


def words(settings: dict) -> list[str]:
    """Flags for a dict of fields."""
    line = []
    for name, value in settings.items():
        line += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return line


def train(*more, **changes) -> int:
    return command.main(["train", *words(CONFIG | changes), *map(str, more)])


def rows(folder) -> list[dict]:
    with open(folder / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_speed(table: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "images_per_second"} for row in table
    ]


def error_of(capsys) -> str:
    """What stderr says, which must be one line that starts with `error: `."""
    text = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


def checkpoint(folder, name="last.pt") -> dict:
    return checkpoints.read(folder / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train("--out", folder) == 0
    return folder


def press_stop_at(
    monkeypatch, step: int, action=lambda *_: signal.raise_signal(signal.SIGINT)
) -> None:
    """Have `action` called when row `step` has been written."""
    write = train_command.write_rows

    def write_and_stop(fresh, log, board):
        last = fresh[-1].step if fresh else None
        write(fresh, log, board)
        if last == step:
            action(signal.SIGINT, None)

    monkeypatch.setattr(train_command, "write_rows", write_and_stop)


# train


def test_a_run_folder_holds_config_checkpoints_losses_and_a_grid(whole):
    files = {path.name for path in whole.iterdir() if path.name != ".lock"}
    assert files == {"config.json", "last.pt", "best.pt", "loss.csv", "samples.png"}
    cfg = config.from_dict(json.loads((whole / "config.json").read_text()))
    assert cfg == TrainConfig(**CONFIG) == config.from_dict(checkpoint(whole)["config"])
    assert checkpoint(whole)["step"] == cfg.steps(1500) == STEPS
    # 64 images of 8×8 with gaps of 2
    assert Image.open(whole / "samples.png").size == (8 * (8 + 2) - 2,) * 2


def test_the_losses_are_a_row_a_step_and_lossless(whole, tmp_path):
    table, cfg = rows(whole), TrainConfig(**CONFIG)
    assert list(table[0]) == list(losslog.COLUMNS)
    assert [int(row["step"]) for row in table] == list(range(1, STEPS + 1))
    assert [step for step, row in enumerate(table, 1) if row["held_out"]] == [
        *range(2, STEPS, 2),
        STEPS,
    ]
    assert [float(row["lr"]) for row in table] == pytest.approx(
        [training.learning_rate(i, STEPS, cfg) for i in range(STEPS)], rel=1e-5
    )
    assert min(float(row["held_out"] or 9) for row in table) == pytest.approx(
        checkpoint(whole)["best"], rel=1e-8
    )
    # The same run by hand, from the package.
    images = data.load_images("digits", image_size=8)
    held_out = data.load_images("digits", "test", image_size=8)
    runtime.seed_everything(cfg.seed)
    state = training.TrainState(cfg, pretrained.build(cfg))
    records = list(runs.train(state, images.images, held_out.images[:512]))
    for row, record in zip(table, records, strict=True):
        # to the last bit of a float32
        assert torch.tensor(float(row["loss"])) == record.loss_tensor
        assert not row["held_out"] or float(row["held_out"]) == pytest.approx(
            record.held_out, rel=1e-8
        )
    assert same(state.ema.model.state_dict(), checkpoint(whole)["ema"])
    x, _ = drawing.draw(state.ema.model, cfg, drawing.Plan(64, "ddim", 50, cfg.seed), "cpu")
    assert (iio.imread(whole / "samples.png") == plots.tile(x)).all()


@pytest.mark.parametrize("stop", [1, 7, 8, STEPS - 1])
def test_a_stopped_and_resumed_run_is_the_whole_run_bit_for_bit(
    whole,
    tmp_path,
    monkeypatch,
    capsys,
    stop,
):
    with monkeypatch.context() as patch:
        press_stop_at(patch, stop)
        assert train("--out", tmp_path) == 130
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert (
        last_line
        == f"stopped at step {stop}; to go on: python -m ddpm_utils train --resume --out {tmp_path}"
    )
    assert checkpoint(tmp_path)["step"] == stop and not (tmp_path / "samples.png").exists()
    torch.manual_seed(99)
    assert command.main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert f"goes on from step {stop}" in capsys.readouterr().out
    assert same(checkpoint(tmp_path), checkpoint(whole))
    assert without_speed(rows(tmp_path)) == without_speed(rows(whole))
    assert (tmp_path / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


KILL = """
import os, signal, sys
from ddpm_utils import __main__ as command
from ddpm_utils.cli import losslog
add = losslog.LossLog.add
def add_and_die(log, records):
    add(log, records)
    if log.path.read_text().count("\\n") > 7:
        open(log.path, "a").write("8,0.")  # half a row
        os.kill(os.getpid(), signal.SIGKILL)
losslog.LossLog.add = add_and_die
command.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs kill −9")
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(whole, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILL, "train", *words(CONFIG), "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint(tmp_path)["step"] == 6 and len(rows(tmp_path)) == 8  # seven and a half
    assert train("--resume", "--out", tmp_path) == 0  # the same flags again contradict nothing
    assert same(checkpoint(tmp_path)["ema"], checkpoint(whole)["ema"])
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, STEPS + 1)]


def test_a_run_that_had_written_nothing_but_its_config_begins_again(whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    (tmp_path / "loss.csv").write_text("step,loss,lr,images_per_second,held_out\n1,9,9,9,\n")
    assert command.main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert same(checkpoint(tmp_path), checkpoint(whole))
    assert without_speed(rows(tmp_path)) == without_speed(rows(whole))


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    assert train("--resume", "--out", tmp_path / "again") == 0
    assert same(checkpoint(tmp_path / "again"), checkpoint(whole)) and rows(
        tmp_path / "again"
    ) == rows(whole)


def test_without_out_the_folder_is_named_after_the_config_and_found_again(own_folders, capsys):
    assert train(epochs=0.02) == 0
    folder = own_folders / "outputs" / "runs" / TrainConfig(**CONFIG | {"epochs": 0.02}).run_name()
    assert (folder / "samples.png").is_file()
    assert train(epochs=0.02) == 2 and "holds a run already" in capsys.readouterr().err
    assert train("--resume", epochs=0.02) == 0
    assert train("--resume", epochs=0.03) == 2 and "no run to resume" in capsys.readouterr().err


def test_a_run_is_never_overwritten(whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert train("--out", whole, seed=1) == 2
    assert (
        f"holds a run already. To go on with it: python -m ddpm_utils train --resume --out {whole};"
        in error_of(capsys)
    )
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-3}, {"widths": (16,), "seed": 5}, {"dataset": "mnist"}]
)
def test_flags_that_contradict_a_resumed_run_are_named(whole, capsys, changes):
    assert command.main(["train", "--resume", "--out", str(whole), *words(changes)]) == 2
    text = error_of(capsys)
    for name, value in changes.items():
        assert f"{name}: {value!r} against {getattr(TrainConfig(**CONFIG), name)!r}" in text


def test_a_changed_or_damaged_config_is_told(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(TrainConfig(**CONFIG).replace(lr=0.01).to_dict()))
    assert command.main(["train", "--resume", "--out", str(file.parent)]) == 2
    assert "lr: 0.01 against 0.005" in error_of(capsys)
    file.write_text("{")
    assert command.main(["train", "--resume", "--out", str(file.parent)]) == 2
    assert "config.json is no JSON" in error_of(capsys)
    file.unlink()
    assert command.main(["train", "--resume", "--out", str(file.parent)]) == 0


def test_labels_reach_network_and_sampler(tmp_path):
    assert train("--out", tmp_path, num_classes=10, epochs=0.1) == 0
    embedding = checkpoint(tmp_path)["model"]["label.weight"]
    runtime.seed_everything(0)
    start = pretrained.build(TrainConfig(**CONFIG | {"num_classes": 10})).label.weight
    moved = (embedding - start).abs().sum(dim=1) > 1e-4
    # every digit was learned, and the row for "no label" from the images whose label was withheld
    assert moved.all()
    assert (
        command.main(
            [
                "sample",
                "--weights",
                str(tmp_path),
                "--n",
                "1",
                "--steps",
                "2",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )


def test_the_article_with_its_own_optimizer_and_draw_of_timesteps(tmp_path, monkeypatch):
    recipe = dict(
        dataset="digits",
        image_size=28,
        timesteps=4,
        beta_scale=40.0,
        schedule="linear",
        target="eps",
        model="article",
        optimizer="adam",
        timestep_draw="uniform",
        batch_size=4,
        epochs=0.006,
        warmup_steps=0,
        decay_from=1.0,
        ema_decay=0.0,
        grad_clip=1e6,
    )
    monkeypatch.setattr(train_command, "HELD_OUT", 8)
    monkeypatch.setattr(train_command, "SAMPLES", 4)
    assert command.main(["train", *words(recipe), "--out", str(tmp_path)]) == 0
    assert {row["lr"] for row in rows(tmp_path)} == {"0.003"}
    model, cfg = drawing.load_weights(str(tmp_path), "cpu")
    assert type(model).__name__ == "Article" and cfg == TrainConfig(**recipe)


def test_without_a_network_a_run_learns_digits_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_download", lambda dataset, root: False)
    arguments = [
        "train",
        "--out",
        str(tmp_path),
        *words(CONFIG | {"dataset": "mnist", "epochs": 0.02}),
    ]
    assert command.main(arguments) == 0
    assert "because MNIST is neither on disk nor to be downloaded" in capsys.readouterr().out
    assert config.from_dict(checkpoint(tmp_path)["config"]).dataset == "digits"


def test_a_run_is_not_resumed_on_other_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_download", lambda dataset, root: False)
    (tmp_path / "config.json").write_text(
        json.dumps(TrainConfig(**CONFIG | {"dataset": "mnist"}).to_dict())
    )
    assert command.main(["train", "--out", str(tmp_path), "--resume"]) == 2
    assert "learns from MNIST, which is neither on disk" in error_of(capsys)


def test_fast_mode_shrinks_a_run_and_its_resumption_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST", "1")
    settings = words({"dataset": "digits", "image_size": 8, "epochs": 0.1, "batch_size": 64})
    with monkeypatch.context() as patch:
        press_stop_at(patch, 3)
        assert command.main(["train", "--out", str(tmp_path), *settings]) == 130
    assert command.main(["train", "--out", str(tmp_path), *settings, "--resume"]) == 0
    cfg = config.from_dict(checkpoint(tmp_path)["config"])
    assert cfg.timesteps == 50 and cfg.batch_size == 16 and cfg == config.for_this_run(cfg)


def test_presets_of_the_hardware_lie_under_the_flags():
    on_gpu = train_command.planned_config(
        {"batch_size": 64}, "fashion_mnist", torch.device("cuda", 0)
    )
    assert on_gpu == TrainConfig(**config.preset_for("cuda") | {"batch_size": 64})
    small = train_command.planned_config({}, "digits", "cpu", 1500)
    assert small == TrainConfig(dataset="digits", epochs=60.0)  # as many steps from 1,500 images
    assert train_command.planned_config({"epochs": 2.0}, "digits", "cpu", 1500).epochs == 2.0


def test_a_diverged_run_ends_in_one_line(tmp_path, monkeypatch, capsys):
    step = training.train_step

    calls = iter(range(100))

    def spoil(*arguments):
        return step(*arguments) * (torch.nan if next(calls) == 6 else 1)

    monkeypatch.setattr(training, "train_step", spoil)
    assert train("--out", tmp_path) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: loss=nan at step 6") and "last.pt" in text
    assert len(rows(tmp_path)) == 6 and checkpoint(tmp_path)["step"] == 6


def test_what_the_folder_does_not_take_is_saved_elsewhere(whole, tmp_path, monkeypatch, capsys):
    save, folder, temporary = checkpoints.save, tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()

    def full(path, state):
        if path.parent == folder:
            raise checkpoints.NotSaved("the disk is full")
        return save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        patch.setattr("tempfile.tempdir", str(temporary))
        press_stop_at(patch, 9)
        assert train("--out", folder) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    (saved,) = temporary.rglob("last.pt")
    assert (
        text.startswith("error: ") and f"saved as {saved}: copy it to {folder / 'last.pt'}" in text
    )
    shutil.copy(saved, folder)
    assert train("--resume", "--out", folder) == 0
    assert same(checkpoint(folder)["ema"], checkpoint(whole)["ema"])
    assert without_speed(rows(folder)) == without_speed(rows(whole))


def test_where_nothing_can_be_saved_that_is_said(tmp_path, monkeypatch, capsys):
    def full(path, state):
        raise checkpoints.NotSaved("the disk is full")

    monkeypatch.setattr(checkpoints, "save", full)
    assert train("--out", tmp_path, epochs=0.02) == 2
    assert re.search(
        r"error: neither .* nor .* takes the run's state at step 2",
        capsys.readouterr().err.splitlines()[-1],
    )


def test_tensorboard_holds_every_step_once_after_a_resumption(tmp_path, monkeypatch):
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # cut off after step 7, saved after step 6: a step is done twice
    with monkeypatch.context() as patch:
        press_stop_at(patch, 7, signal.default_int_handler)
        assert train("--tensorboard", "--out", tmp_path) == 130
    assert command.main(["train", "--tensorboard", "--resume", "--out", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    table = rows(tmp_path)
    assert set(scalars) == {"loss", "lr", "images_per_second", "held_out"}
    assert scalars["loss"] == [
        (int(row["step"]), pytest.approx(float(row["loss"]), rel=1e-6)) for row in table
    ]
    assert [step for step, _ in scalars["held_out"]] == [
        int(row["step"]) for row in table if row["held_out"]
    ]


def test_without_tensorboard_the_flag_is_refused_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("--tensorboard", "--out", tmp_path / "run") == 2
    assert "pip install tensorboard" in error_of(capsys) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
def test_under_torchrun_two_processes_make_the_same_run(whole, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ddpm_utils",
    ]
    done = subprocess.run(
        [
            *launch,
            "train",
            *words(CONFIG | {"dropout": 0.0}),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "two"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote config.json") == 1 and "2 processes" in done.stdout
    assert train("--out", tmp_path / "one", dropout=0.0) == 0
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)
    assert (
        Image.open(tmp_path / "two" / "samples.png").size == Image.open(whole / "samples.png").size
    )


def test_only_process_0_prints_and_writes(tmp_path, monkeypatch, capsys):
    names = {
        name: getattr(distributed, name)
        for name in ("group", "world", "agree", "first_process_only")
    }
    monkeypatch.setattr(
        train_command, "distributed", types.SimpleNamespace(**names, rank=lambda: 1)
    )
    assert train("--out", tmp_path / "run", epochs=0.02) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {".lock", "last.pt", "best.pt"}  # by `checkpoints` and `training`, unpatched


# sample


def drawn(folder) -> dict:
    return {name: (folder / name).read_bytes() for name in ("grid.png", "strip.png", "samples.gif")}


def test_sample_writes_grid_strip_and_gif(whole, tmp_path, capsys):
    assert (
        command.main(
            ["sample", "--weights", str(whole), "--n", "7", "--steps", "5", "--out", str(tmp_path)]
        )
        == 0
    )
    assert f"to {tmp_path}" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (3 * 10 - 2, 3 * 10 - 2)
    assert Image.open(tmp_path / "strip.png").format == "PNG"
    gif = iio.imread(tmp_path / "samples.gif")
    # five calls and the finished images
    assert gif.shape[:3] == (6, 2 * (3 * 9 - 1), 2 * (3 * 9 - 1))
    assert Image.open(tmp_path / "samples.gif").info["loop"] == 0


def test_the_grid_is_what_the_package_draws(whole, tmp_path):
    from ddpm_utils import sampling
    from ddpm_utils.diffusion import Denoiser
    from ddpm_utils.schedules import make_schedule

    assert (
        command.main(
            ["sample", "--weights", str(whole), "--n", "1", "--seed", "3", "--out", str(tmp_path)]
        )
        == 0
    )
    cfg = TrainConfig(**CONFIG)
    model = pretrained.build(cfg)
    model.load_state_dict(checkpoint(whole)["ema"])
    rng = torch.Generator().manual_seed(3)
    schedule = make_schedule(**cfg.noise())
    denoise = Denoiser(model, schedule, cfg.target)
    states = sampling.ddim_sample(denoise, schedule, (1, 1, 8, 8), 50, generator=rng)
    assert (iio.imread(tmp_path / "grid.png") == plots.tile(sampling.last(states))).all()
    assert (
        command.main(
            [
                "sample",
                "--weights",
                str(whole),
                "--n",
                "1",
                "--sampler",
                "ddpm",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    rng = torch.Generator().manual_seed(0)
    states = sampling.ddpm_sample(denoise, schedule, (1, 1, 8, 8), generator=rng)
    assert (iio.imread(tmp_path / "grid.png") == plots.tile(sampling.last(states))).all()
    assert iio.imread(tmp_path / "samples.gif").shape[0] == sample_command.FRAMES
    assert (
        command.main(
            [
                "sample",
                "--weights",
                str(whole),
                "--n",
                "1",
                "--sampler",
                "dpm",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    rng = torch.Generator().manual_seed(0)
    times = sampling.spaced_timesteps(schedule, 20, "log_snr")
    states = sampling.dpm_solver_sample(denoise, schedule, (1, 1, 8, 8), times, generator=rng)
    assert (iio.imread(tmp_path / "grid.png") == plots.tile(sampling.last(states))).all()


def test_a_seed_decides_all_and_more_images_begin_with_the_same(whole, monkeypatch):
    model, cfg = drawing.load_weights(str(whole), "cpu")
    monkeypatch.setattr(drawing, "BATCH", 3)

    def images(n, seed):
        return drawing.draw(model, cfg, drawing.plan(cfg, n, steps=4, seed=seed), "cpu")[0]

    eight = images(8, 0)
    assert eight.shape == (8, 1, 8, 8) and torch.equal(images(8, 0), eight)
    assert torch.equal(images(6, 0), eight[:6]) and not torch.equal(images(8, 1), eight)
    assert not torch.equal(eight[:3], eight[3:6])


def test_weights_come_by_folder_file_and_name(whole, own_folders, monkeypatch, capsys):
    first, _ = drawing.load_weights(str(whole), "cpu")
    for what, saved in ((str(whole / "last.pt"), "last.pt"), (str(whole / "best.pt"), "best.pt")):
        model, cfg = drawing.load_weights(what, "cpu")
        assert same(model.state_dict(), checkpoint(whole, saved)["ema"]) and cfg == TrainConfig(
            **CONFIG
        )
    assert same(first.state_dict(), checkpoint(whole)["ema"]) and not first.training
    shipped, cfg = drawing.load_weights("mnist", "cpu")
    assert (
        same(shipped.state_dict(), pretrained.load("mnist")[0].state_dict())
        and cfg.dataset == "mnist"
    )
    assert command.main(["sample", "--n", "1", "--steps", "1"]) == 0
    assert Image.open(own_folders / "outputs" / "samples" / "fashion_mnist" / "grid.png").size == (
        28,
        28,
    )


def test_labeled_weights_draw_the_labels_in_turn(tiny, monkeypatch):
    cfg, asked = tiny(num_classes=3), []
    model = pretrained.build(cfg)
    model.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[2].tolist()))
    monkeypatch.setattr(drawing, "BATCH", 4)
    drawing.draw(model, cfg, drawing.plan(cfg, 7, steps=1), "cpu")
    assert asked == [[0, 1, 2, 0], [1, 2, 0]]


def test_the_interrupt_key_ends_a_command_with_130(whole, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "draw", interrupt)
    assert command.main(["sample", "--weights", str(whole), "--out", str(whole / "never")]) == 130
    assert capsys.readouterr().err == "stopped\n"


# evaluate


@pytest.fixture
def quick_classifier(monkeypatch):
    """A classifier that has learned nothing, at once; the same every time."""

    def obtain(train_set, device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return evaluation.Classifier(10)

    monkeypatch.setattr(pretrained, "obtain_classifier", obtain)
    return obtain(None, "cpu")


def test_evaluate_prints_json_and_nothing_else_on_stdout(whole, quick_classifier, capsys):
    assert (
        command.main(
            [
                "evaluate",
                "--weights",
                str(whole),
                "--n",
                "40",
                "--steps",
                "3",
                "--seed",
                "2",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    model, cfg = drawing.load_weights(str(whole), "cpu")
    x, _ = drawing.draw(model, cfg, drawing.plan(cfg, 40, steps=3, seed=2), "cpu")
    real = (data.load_images("digits", split, image_size=8).images for split in ("train", "test"))
    reference, held_out = (evaluation.extract_features(quick_classifier, images) for images in real)
    report = evaluation.compare(quick_classifier, data.to_image_range(x), reference, held_out, 2)
    expected = json.loads(json.dumps(report.to_dict()))
    assert found["config"] == cfg.to_dict() and (
        found["sampler"],
        found["steps"],
        found["seed"],
    ) == ("ddim", 3, 2)
    for name, value in expected.items():
        assert found[name] == (
            pytest.approx(value, rel=1e-6) if isinstance(value, float | dict | list) else value
        ), name


def test_evaluate_prints_the_table(whole, quick_classifier, capsys):
    assert command.main(["evaluate", "--weights", str(whole), "--n", "40", "--steps", "3"]) == 0
    printed = capsys.readouterr()
    assert (
        "Fréchet distance" in printed.out
        and "floor" in printed.out
        and "n = 40 samples" in printed.out
    )
    assert printed.out.splitlines()[0] == f"{whole}: n 40, ddim, 3 network calls an image, seed 0"
    assert "data: " in printed.err


def test_evaluate_refuses_what_has_no_floor_before_it_draws(
    whole, quick_classifier, monkeypatch, capsys
):
    monkeypatch.setattr(drawing, "draw", None)
    for n in (19, 298):
        assert command.main(["evaluate", "--weights", str(whole), "--n", str(n)]) == 2
        assert f"n={n} is outside 20 … 297" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(data, "_download", lambda dataset, root: False)
    assert command.main(["evaluate", "--weights", "mnist", "--n", "20"]) == 2
    assert (
        "these weights draw MNIST, which is neither on disk"
        in capsys.readouterr().err.splitlines()[-1]
    )


# bad input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --batch-size 0", "batch_size=0 is outside 1 … 4096"),
        ("train --lr nan", "lr=nan"),
        ("train --epochs -1", "epochs=-1.0"),
        ("train --dataset cifar", "dataset='cifar' is not known: choose one of"),
        ("train --model resnet", "model='resnet'"),
        ("train --widths", "widths is empty"),
        ("train --widths 10", "groups=4 does not divide widths[0]=10"),
        ("train --device tpu", "device 'tpu' is not here"),
        ("train --resume --out {tmp}/none", "no run to resume in"),
        ("train --dataset digits --out {tmp}/file/below", "file is no folder"),
        ("train --dataset digits --image-size 30 --out {tmp}/new", "must be multiples of 4"),
        (
            "train --dataset digits --channels 3 --out {tmp}/new",
            "expected (batch, 3, height, width)",
        ),
        (
            "train --dataset digits --num-classes 5 --out {tmp}/new",
            "num_classes=5, but scikit-learn's digits has 10",
        ),
        ("train --dataset digits --model article --num-classes 10 --out {tmp}/new", "labels"),
        (
            "sample --weights nothing",
            "give a run's folder, a checkpoint, or one of fashion_mnist, fashion_mnist_labels, "
            "mnist",
        ),
        ("sample --weights {tmp}", "no checkpoint at"),
        ("sample --weights {tmp}/file", "is no whole checkpoint"),
        ("sample --weights {tmp}/foreign.pt", "was not written by ddpm_utils"),
        ("sample --n 0", "n=0 is outside 1 … 100000"),
        ("sample --seed -1", "seed=-1 is outside"),
        ("sample --steps 0", "steps=0 is outside 1 … 1000"),
        ("sample --steps 1001", "steps=1001 is outside 1 … 1000"),
        ("sample --sampler ddpm --steps 50", "takes all 1000 steps"),
        ("evaluate --weights {tmp}/file", "is no whole checkpoint"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, line, says):
    (tmp_path / "file").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    before = sorted(tmp_path.rglob("*"))
    assert command.main(line.format(tmp=tmp_path).split()) == 2
    assert says in error_of(capsys)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is begun


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "Expected one of {train, sample, evaluate, doctor}"),
        ("trian", "Unrecognized options: trian"),
        (
            "train --batchsize 3",
            "Unrecognized options: --batchsize, 3 .* Perhaps you meant: --batch-size INT",
        ),
        ("train --bogus", "Unrecognized options: --bogus"),
        ("train --lr fast", "Error parsing --lr: could not convert string to float: 'fast'"),
        ("train --batch-size 1.5", "Error parsing --batch-size"),
        ("train --batch-size", "Missing value for argument '--batch-size"),
        ("train --recipe manga", "invalid choice 'manga' for argument '--recipe'"),
        ("evaluate --recipe anime", "Unrecognized options: --recipe, anime"),
        (
            "sample --lr 1",
            "Unrecognized options: --lr, 1 .* run python -m ddpm_utils sample --help",
        ),
        ("sample --n many", "Error parsing --n"),
        ("sample --sampler euler", "invalid choice 'euler' for argument '--sampler'"),
        ("evaluate --lr 1", "Unrecognized options: --lr"),
        ("doctor --json", "Unrecognized options: --json"),
    ],
)
def test_a_bad_command_line_names_the_flag_and_ends_with_status_2(
    tmp_path,
    monkeypatch,
    capsys,
    line,
    says,
):
    monkeypatch.chdir(tmp_path)
    assert command.main(line.split()) == 2
    printed = capsys.readouterr()
    assert re.search(says, " ".join(re.sub("[│╭╰─╮╯]", " ", printed.err).split())), printed.err
    assert printed.out == "" and [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_mistake_of_the_programs_own_keeps_its_traceback(whole, monkeypatch):
    monkeypatch.setattr(drawing, "plan", None)
    with pytest.raises(TypeError):
        command.main(["sample", "--weights", str(whole)])


def test_a_full_gpu_is_told_in_one_line(whole, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2 GiB.")

    monkeypatch.setattr(drawing, "draw", full)
    assert command.main(["sample", "--weights", str(whole), "--out", str(whole / "never")]) == 2
    assert error_of(capsys) == "error: CUDA out of memory. Tried to allocate 2 GiB.\n"


def test_a_warning_is_one_line_without_a_place_in_the_source(whole, monkeypatch, capsys):
    def warn(*arguments):
        warnings.warn("the last step\nholds 0.36 of the image", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(drawing, "draw", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        command.main(["sample", "--weights", str(whole), "--out", str(whole / "never")])
    assert (
        capsys.readouterr().err == "warning: the last step holds 0.36 of the image\nerror: enough\n"
    )


# flags and help


def test_every_field_is_a_flag_that_brings_its_value_back():
    written = flags.parse(["train", *words(OTHER)])
    assert written.given == OTHER and TrainConfig(**written.given) == TrainConfig(**OTHER)
    assert flags.parse(["train"]).given == {}
    # A flag that was given is told from a default, even where they are equal.
    assert flags.parse(["train", "--batch-size", "32", "--resume"]).given == {"batch_size": 32}
    few = flags.parse(["train", "--batch_size=8", "--attention-levels", "--out", "lr"]).given
    assert few == {"batch_size": 8, "attention_levels": ()}


@pytest.mark.parametrize("name", ["", "train", "sample", "evaluate", "doctor"])
def test_help_says_what_there_is(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    plain = " ".join(re.sub("[│╭╰─╮╯]", " ", text).split())
    if name == "train":
        source = inspect.getsource(TrainConfig)
        for field in dataclasses.fields(TrainConfig):
            default = (
                " ".join(map(str, field.default))
                if isinstance(field.default, tuple)
                else field.default
            )
            # the comment behind the field, or the line above it
            found = re.search(
                rf"^(?:    # (.+)\n)?    {field.name}: [^#\n]+(?:  # (.+))?$", source, re.MULTILINE
            )
            note = re.escape(found[2] or found[1])
            kind = r"(STR|INT|FLOAT|\[INT \[INT \.\.\.\]\])"
            default = re.escape(str(default))
            assert re.search(rf"{flag(field.name)} {kind} {note} \(default: {default}\)", plain)
    elif not name:
        assert all(f"• {command} " in plain for command in flags.COMMANDS)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom ddpm_utils.__main__ import main\nassert main(['train', '--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--batch-size" in done.stdout, done.stderr


def test_every_command_of_the_documentation_is_understood():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    readme = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = re.findall(
        r"^(?!\$)[^|`\n]*-m ddpm_utils (.*)$", readme.replace("\\\n", " "), re.MULTILINE
    )
    lines = [line.split("  #")[0].split() for line in lines]
    assert {line[0] for line in lines} == {"train", "sample", "evaluate", "doctor"} and len(
        lines
    ) >= 9
    for line in lines:
        TrainConfig(**getattr(flags.parse(line), "given", {}))


# the small parts


def record(step, loss=0.5, held_out=None):
    return runs.StepRecord(step, 10, torch.tensor(loss), 1e-3, 100.0, held_out)


def test_rows_after_the_checkpoint_and_torn_rows_are_cut(tmp_path):
    path = tmp_path / "loss.csv"
    log = losslog.LossLog(path)
    log.add([record(1), record(2, held_out=0.25), record(3)])
    kept = path.read_text().splitlines()[:3]
    for torn in ("", "4,0.1", "4", "4,1,1,1", "\n", "x,1,1,1,\n"):
        path.write_text(path.read_text() + torn)
        again = losslog.LossLog(path, 2)
        assert path.read_text().splitlines() == kept
        again.add([record(3)])
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"] and rows(tmp_path)[1][
        "held_out"
    ] == "0.25"
    losslog.LossLog(path)
    assert path.read_text() == ",".join(losslog.COLUMNS) + "\n" and not list(tmp_path.glob(".*"))


def test_rows_that_a_full_disk_refuses_wait(tmp_path, monkeypatch):
    log = losslog.LossLog(tmp_path / "loss.csv")
    log.add([record(1)])

    class Full:
        def __init__(self, *arguments):
            self.file = open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        def truncate(self, n):
            return self.file.truncate(n)

        def seek(self, n):
            return self.file.seek(n)

    with (
        monkeypatch.context() as patch,
        pytest.warns(RuntimeWarning, match="No space left on device"),
    ):
        patch.setattr(losslog, "open", Full, raising=False)
        log.add([record(2)])
    log.add([record(3)])
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_spread_keeps_both_ends():
    assert sample_command.spread([5, 4, 3, 2, 1, 0, -1], 3) == [5, 2, -1]
    assert sample_command.spread([1, 0, -1], 60) == [1, 0, -1]
