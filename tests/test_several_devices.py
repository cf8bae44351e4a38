"""Two processes on the CPU train as one process would, stop together, and leave whole files when
one of them is killed.

`torchrun` starts this very file as its worker: what runs there stands in `SCENES` and `main`.
"""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import imageio.v3 as iio
import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]  # torchrun gives its workers neither

import torch  # noqa: E402
from conftest import TINY  # noqa: E402
from torch import nn  # noqa: E402

from ddpm_utils import checkpoints, distributed, training  # noqa: E402
from ddpm_utils.config import TrainConfig  # noqa: E402
from ddpm_utils.folders import FolderImages, find_images  # noqa: E402
from ddpm_utils.runs import TrainingDiverged, train  # noqa: E402
from ddpm_utils.training import TrainState  # noqa: E402
from ddpm_utils.unet import UNet  # noqa: E402

IMAGES = torch.randint(
    0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
HELD_OUT = IMAGES[:6].flip(-1)
LABELS = torch.arange(24)  # every image its own
STEPS = 24


def config(**changes) -> TrainConfig:
    return TrainConfig(
        **(
            TINY
            | dict(
                widths=(8, 16), attention_levels=(1,), num_classes=24, label_drop=0.25, epochs=4.0
            )
            | changes
        )
    )


def state_of(cfg: TrainConfig, weights: int = 0) -> TrainState:
    torch.manual_seed(weights)
    return TrainState(cfg, UNet(**cfg.network()))


def everything(state: TrainState) -> dict:
    parts = {"model": state.model, "ema": state.ema.model, "optimizer": state.optimizer}
    parts = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    return parts | {"step": state.step, "updates": state.ema.updates}


def flat(tree) -> torch.Tensor:
    """All numbers in nested dicts and lists, in order."""
    if isinstance(tree, torch.Tensor):
        return tree.double().flatten()
    if isinstance(tree, dict | list | tuple):
        parts = [flat(part) for part in (tree.values() if isinstance(tree, dict) else tree)]
        return torch.cat(parts) if parts else torch.zeros(0)
    return torch.tensor([float(tree)] if isinstance(tree, int | float) else [], dtype=torch.float64)


def run(state, **arguments) -> dict:
    """Train to the end and say what the records said."""
    records = list(train(state, IMAGES, labels=LABELS, **arguments))
    return {
        "losses": [r.loss for r in records],
        "steps": [r.step for r in records],
        "held_out": [r.held_out for r in records],
        "stopped": state.stopped,
    }


def message(kind, state, **arguments) -> str:
    try:
        run(state, **arguments)
    except kind as error:
        return str(error)
    return "nothing was raised"


# What two processes do. Each function gets the folder for files and returns what this process saw.


def plain(folder):
    """Weights differ at first: both must go on from those of process 0."""
    state, seen = state_of(config(), weights=distributed.rank()), []
    state.model.register_forward_pre_hook(
        lambda module, given: seen.append(given[2].clone()) or None
    )
    mine = folder / f"plain-{distributed.rank()}"
    out = run(state, held_out=HELD_OUT, folder=mine, evaluate_every=10)
    return out | {"state": everything(state), "labels": seen[: STEPS + 2], "wrote": mine.exists()}


def stop_in_one(folder):
    state = state_of(config())
    if distributed.rank() == 1:
        state.model.register_forward_hook(
            lambda *_: signal.raise_signal(signal.SIGINT) if state.step == 4 else None
        )
    return run(state, folder=folder / "stopped") | {"state": everything(state)}


def leave_from_the_loop(folder):
    state, steps = state_of(config()), 0
    for record in train(state, IMAGES, labels=LABELS):
        steps = record.step
        if record.step == 7 and distributed.rank() == 0:
            state.stopped = True
    return steps, state.stopped


def nan_in_one(folder):
    state = state_of(config())
    if distributed.rank() == 1:
        state.model.register_forward_hook(
            lambda m, i, out: out * float("nan") if state.step == 7 else None
        )
    return message(TrainingDiverged, state, folder=folder / "nan", evaluate_every=3)


def uneven(folder):
    return message(ValueError, state_of(config(batch_size=5)))


def other_step(folder):
    state = state_of(config())
    state.step = 3 * distributed.rank()
    return message(ValueError, state)


def other_images(folder):
    """A run is resumed where one process has lost an image."""
    state = checkpoints.load(folder / "one" / "last.pt", state_of(config(), weights=1))
    n = 24 - distributed.rank()
    try:
        next(train(state, IMAGES[:n], labels=LABELS[:n]))
    except ValueError as error:
        return str(error)


def dropout_whole(folder):
    state = state_of(config(dropout=0.3))
    torch.manual_seed(5 + distributed.rank())
    return run(state) | {"state": everything(state)}


def dropout_resumed(folder):
    first, mine = state_of(config(dropout=0.3)), []
    for record in train(first, IMAGES, None, folder / "dropout", labels=LABELS):
        mine.append(record.loss)
        first.stopped = first.stopped or record.step == 9
    distributed.agree(stopped=first.step)  # process 0 has written its file
    second = checkpoints.load(
        folder / "dropout" / "last.pt", state_of(config(dropout=0.3), weights=1)
    )
    torch.manual_seed(99)
    out = run(second)
    return out | {"losses": mine + out["losses"], "state": everything(second), "first": first.step}


def resumed_from_one(folder):
    state = checkpoints.load(folder / "one" / "last.pt", state_of(config(), weights=1))
    return run(state)


def masks(folder):
    """Which activations dropout keeps: other ones in every process."""
    state, kept = state_of(config(dropout=0.5)), []
    first = next(part for part in state.model.modules() if isinstance(part, nn.Dropout))
    first.register_forward_hook(
        lambda m, i, out: kept.append((out != 0).float().mean(dim=(0, 2, 3))) or None
    )
    next(train(state, IMAGES, labels=LABELS))
    return kept[0]


def adamw(folder):
    return run(state_of(config(optimizer="adamw")))


def streamed(folder):
    """The same images from disk, each process reading its own part ahead."""
    images = FolderImages(find_images(folder / "images"), 8, 1)
    return [record.loss for record in train(state_of(config()), images, labels=LABELS)]


def weight_without_loss(folder):
    cfg = config()

    class Odd(UNet):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.never = nn.Linear(2, 2)

    torch.manual_seed(0)
    return run(TrainState(cfg, Odd(**cfg.network())))


def disk_full(folder):
    """The disk fills at step 12: one warning a save, all steps done, and process 0 says at the end
    what is missing.
    """
    state = state_of(config())
    whole, full = checkpoints.os.fsync, OSError(28, "No space left on device")

    def fsync(number):
        if state.step > 10:
            raise full
        whole(number)

    checkpoints.os.fsync = fsync
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            said = message(checkpoints.NotSaved, state, folder=folder / "full", evaluate_every=6)
    finally:
        checkpoints.os.fsync = whole
    return said, [str(one.message) for one in caught if one.category is RuntimeWarning], state.step


SCENES = {
    scene.__name__: scene
    for scene in (
        plain,
        stop_in_one,
        leave_from_the_loop,
        nan_in_one,
        uneven,
        other_step,
        other_images,
        dropout_whole,
        dropout_resumed,
        resumed_from_one,
        masks,
        adamw,
        streamed,
        weight_without_loss,
        disk_full,
    )
}


def long_run(folder):
    """Train until someone interferes. The file `step` says how far process 0 is."""
    state = state_of(config(epochs=1e5))
    try:
        for record in train(state, IMAGES, None, folder, evaluate_every=5, labels=LABELS):
            if distributed.rank() == 0 and record.step % 5 == 0:
                (folder / "step").write_text(str(record.step))
    except distributed.WorkerLost as error:
        sys.exit(f"WorkerLost: {error}")
    (folder / f"left-{distributed.rank()}").write_text(f"{state.step} {state.stopped}")


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.group("cpu") as device:
        assert device.type == "cpu" and distributed.world() == 2
        (folder / f"pid-{distributed.rank()}").write_text(str(os.getpid()))
        if kind == "long":
            return long_run(folder)
        out = {name: scene(folder) for name, scene in SCENES.items()}
        torch.save(out, folder / f"seen-{distributed.rank()}.pt")
    assert distributed.world() == 1  # the group is gone


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    __file__,
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def two_processes(kind: str, folder: Path):
    """`main(kind, folder)` under torchrun; all of it is killed in the end, since processes that
    disagree wait for long.
    """
    job = subprocess.Popen(
        [*TORCHRUN, kind, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        yield job
    finally:
        job.kill()
        for name in ("pid-0", "pid-1"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(
                    int((folder / name).read_text()), getattr(signal, "SIGKILL", signal.SIGTERM)
                )
        job.wait()


# What one process sees of it


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in one process, and the folder in which two processes find the first one's
    file.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("two")
    (folder / "images").mkdir()
    for i, image in enumerate(IMAGES):
        iio.imwrite(folder / "images" / f"{i:02}.png", image[0].numpy())
    half = state_of(config())
    for record in train(half, IMAGES, None, folder / "one", labels=LABELS):
        half.stopped = record.step == 9
    whole, unlike, labels = state_of(config()), state_of(config(seed=1)), []
    whole.model.register_forward_pre_hook(lambda module, given: labels.append(given[2].clone()))
    out = {
        "folder": folder,
        "plain": run(whole, held_out=HELD_OUT, evaluate_every=10),
        "unlike": run(unlike),
    }
    out["plain"]["labels"] = labels
    out |= {"state": everything(whole), "adamw": run(state_of(config(optimizer="adamw")))}
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def two(one):
    """What process 0 and process 1 saw."""
    folder = one["folder"]
    with two_processes("scenes", folder) as job:
        _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=True) for rank in (0, 1)]


def close(a, b, tolerance=1e-5) -> bool:
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < tolerance


def test_two_processes_have_the_losses_of_one(one, two):
    losses = one["plain"]["losses"]
    assert len(losses) == STEPS >= 20 and not close(losses, one["unlike"]["losses"], 1e-2)
    for seen in two:
        assert (
            close(seen["plain"]["losses"], losses)
            and seen["plain"]["steps"] == one["plain"]["steps"]
        )
    assert two[0]["plain"]["losses"] == two[1]["plain"]["losses"]


def test_two_processes_have_the_losses_of_one_with_another_optimizer(one, two):
    assert all(close(seen["adamw"]["losses"], one["adamw"]["losses"]) for seen in two)
    assert not close(one["adamw"]["losses"], one["plain"]["losses"])


def test_images_that_stay_on_disk_change_nothing(two):
    for seen in two:
        assert seen["streamed"] == seen["plain"]["losses"]


def test_both_processes_hold_the_weights_of_one(one, two):
    mine, theirs, single = (
        flat(state) for state in (two[0]["plain"]["state"], two[1]["plain"]["state"], one["state"])
    )
    assert torch.equal(mine, theirs) and torch.allclose(mine, single, atol=1e-4)


def test_the_processes_see_disjoint_halves_of_each_batch(one, two):
    """In order, and with the labels withheld that one process withholds."""
    dropped = 0
    for step in range(STEPS):
        halves = [seen["plain"]["labels"][step].tolist() for seen in two]
        whole = LABELS[training.batch_indices(24, step, config())].tolist()
        both = halves[0] + halves[1]
        assert (
            len(halves[0]) == len(halves[1]) == 2 and both == one["plain"]["labels"][step].tolist()
        )
        assert all(seen in (label, 24) for seen, label in zip(both, whole, strict=True))
        dropped += both.count(24)
    assert 0 < dropped < 2 * STEPS


def test_process_0_alone_measures_and_writes(one, two):
    held_out = one["plain"]["held_out"]
    assert [two[0]["plain"]["wrote"], two[1]["plain"]["wrote"]] == [True, False]
    assert two[1]["plain"]["held_out"] == [None] * STEPS
    measured = [
        (a, b) for a, b in zip(two[0]["plain"]["held_out"], held_out, strict=True) if b is not None
    ]
    assert len(measured) == 3 and close(*zip(*measured, strict=True))


def test_a_stop_in_one_process_stops_both_with_one_file(one, two):
    for seen in two:
        assert seen["stop_in_one"]["stopped"] and seen["stop_in_one"]["steps"] == [1, 2, 3, 4, 5]
    payload = checkpoints.read(one["folder"] / "stopped" / "last.pt")
    assert (
        torch.equal(flat(payload["ema"]), flat(two[1]["stop_in_one"]["state"]["ema"]))
        and payload["step"] == 5
    )


def test_the_loop_of_one_process_can_end_both(two):
    assert [tuple(seen["leave_from_the_loop"]) for seen in two] == [(8, True)] * 2


def test_nan_in_one_process_stops_both_at_that_step(one, two):
    for seen in two:
        assert (
            "loss=nan at step 7 of digits-v-" in seen["nan_in_one"]
            and "nan/last.pt" in seen["nan_in_one"]
        )
    assert checkpoints.read(one["folder"] / "nan" / "last.pt")["step"] == 6


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(two):
    assert {seen["uneven"] for seen in two} == {
        "batch_size=5 does not divide among 2 processes: try 4 or 6"
    }


def test_processes_at_different_steps_are_refused_by_both(two):
    assert two[0]["other_step"] == two[1]["other_step"]
    assert "step is 0 in process 0, 3 in process 1" in two[0]["other_step"]


def test_processes_with_other_images_are_refused_by_both_also_when_they_resume(two):
    assert two[0]["other_images"] == two[1]["other_images"]
    assert (
        "shape is [24, 1, 8, 8] in process 0, [23, 1, 8, 8] in process 1" in two[0]["other_images"]
    )


def test_a_run_resumed_by_as_many_processes_is_the_uninterrupted_one_bit_for_bit_with_dropout(two):
    for seen in two:
        whole, resumed = seen["dropout_whole"], seen["dropout_resumed"]
        assert resumed["first"] == 10 and resumed["losses"] == whole["losses"]
        assert torch.equal(flat(resumed["state"]), flat(whole["state"]))


def test_every_process_has_its_own_dropout(two):
    assert not torch.equal(two[0]["masks"], two[1]["masks"])


def test_a_run_goes_on_in_another_number_of_processes(one, two):
    assert all(
        close(seen["resumed_from_one"]["losses"], one["plain"]["losses"][9:]) for seen in two
    )
    state = checkpoints.load(one["folder"] / "stopped" / "last.pt", state_of(config(), weights=1))
    assert close(run(state)["losses"], one["plain"]["losses"][5:])


def test_weights_that_no_loss_reaches_do_no_harm(one, two):
    assert all(close(seen["weight_without_loss"]["losses"], one["plain"]["losses"]) for seen in two)


def test_a_full_disk_does_not_part_the_processes(one, two):
    said, warned, step = two[0]["disk_full"]
    assert (
        "the run ended at step 24, but full/last.pt was not written (No space left on device)"
        in said
    )
    assert [text.split(":")[0] for text in warned] == [
        "step 12",
        "step 18",
        "step 24",
    ] and step == STEPS
    assert tuple(two[1]["disk_full"]) == ("nothing was raised", [], STEPS)
    assert checkpoints.read(one["folder"] / "full" / "last.pt")["step"] == 6


# Outside torchrun, and with interference


def test_without_torchrun_there_is_one_process():
    with distributed.group("cpu") as device:
        assert device == torch.device("cpu") and (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.share(5) == slice(0, 5)
    model, loss = nn.Linear(1, 1), torch.tensor(2.0)
    assert distributed.replicate(model, model) is model and distributed.gather(loss, False) == (
        loss,
        False,
    )
    distributed.agree(step=1)
    with (
        pytest.raises(RuntimeError, match="^Gloo is a fine place$"),
        distributed.lost_worker(lambda: "lost"),
    ):
        raise RuntimeError("Gloo is a fine place")  # in one process nobody else can have died


@contextlib.contextmanager
def interfered(folder: Path):
    """A long run of two processes, from its tenth step on."""
    with two_processes("long", folder) as job:
        until = time.monotonic() + 200
        while not (folder / "step").is_file() or (folder / "step").read_text() in ("", "5"):
            assert job.poll() is None and time.monotonic() < until, job.communicate(timeout=5)
            time.sleep(0.05)
        yield job


def resumes(folder: Path) -> int:
    """The step at which one process picks up the file, after it has trained one step from there."""
    state = checkpoints.load(folder / "last.pt", state_of(config(epochs=1e5), weights=1))
    step = state.step
    assert next(train(state, IMAGES, labels=LABELS)).step == step + 1
    return step


@pytest.mark.skipif(os.name != "posix", reason="needs kill −9")
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_worker_ends_the_run_with_a_clear_line_and_a_whole_checkpoint(tmp_path, victim):
    with interfered(tmp_path) as job:
        os.kill(int((tmp_path / f"pid-{victim}").read_text()), signal.SIGKILL)
        _, said = job.communicate(timeout=200)
    assert job.returncode != 0
    line = next(line for line in said.splitlines() if line.startswith("WorkerLost: "))
    assert (
        "another process died at step" in line
        and "the last good checkpoint is" in line
        and "last.pt" in line
    )
    assert resumes(tmp_path) >= 10 and not list(tmp_path.glob("left-*"))


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_to_torchrun_stops_all_at_one_step_and_saves_it(tmp_path, signum):
    with interfered(tmp_path) as job:
        job.send_signal(signum)
        job.communicate(timeout=200)
    left = [(tmp_path / f"left-{rank}").read_text().split() for rank in (0, 1)]
    assert left[0] == left[1] and left[0][1] == "True" and resumes(tmp_path) == int(left[0][0])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
