"""The training loop with the parts that make a run safe.

They are stopping, saving, measuring, the detection of divergence, several processes, and the check
that a resumed run has the same data.
"""

import contextlib
import hashlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints, distributed, runtime
from .checkpoints import NotSaved
from .config import TrainConfig
from .data import check_images, digest
from .training import (
    READ_EVERY,
    TrainState,
    batch_indices,
    held_out_loss,
    learning_rate,
    training_steps,
)

EXPLODED = 1e3  # a loss; the answer 0 has about 1, whatever the target
FIVE_MINUTES = 300  # seconds


class TrainingDiverged(RuntimeError):
    """The loss was not finite, or it was very large.

    The message names the step, the config and the last good checkpoint.
    """


@dataclass
class Clock:
    """The seconds that a run has spent in its steps, without the caller's work in between."""

    busy: float = 0.0

    @contextlib.contextmanager
    def running(self):
        """Count the time inside the `with` block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.busy += time.perf_counter() - began


@dataclass(frozen=True)
class StepRecord:
    """The report of the training loop after one step.

    `held_out` is the EMA network's loss on held-out images, where it was measured.
    """

    step: int
    total: int
    loss_tensor: Tensor  # a scalar, still on the device
    lr: float
    images_per_second: float
    held_out: float | None = None
    clock: Clock | None = field(default=None, repr=False, compare=False)

    @property
    def loss(self) -> float:
        """The loss of the whole batch.

        Reading it waits for the GPU. To read the losses of many steps at once, use `losses`.
        """
        return losses([self])[0]


def losses(records: list[StepRecord]) -> list[float]:
    """Return the losses of `records`, read from the device in one transfer.

    The wait for the steps counts as their time.
    """
    if not records:
        return []
    with records[-1].clock.running() if records[-1].clock else contextlib.nullcontext():
        return torch.stack([record.loss_tensor for record in records]).tolist()


class Forecast:
    """An estimate of how long a run will take, from the speed of its first steps.

    `after(record)` returns a sentence once, and otherwise None.

    The first step is left out, because kernels are loaded and chosen in it; the next `READ_EVERY`
    steps are timed.
    """

    def __init__(self, cfg: TrainConfig, n_images: int):
        self.cfg, self.n_images, self.first = cfg, n_images, None

    def after(self, record: StepRecord) -> str | None:
        """Return the forecast as a sentence, or None; call it with the record of every step."""
        if self.first is None:
            self.first, self.began = record.step, record.clock.busy
        if record.step != self.first + READ_EVERY:
            return None
        speed = READ_EVERY * self.cfg.batch_size / (record.clock.busy - self.began)
        minutes = (record.total - record.step) * self.cfg.batch_size / speed / 60
        epochs = FIVE_MINUTES * speed / self.n_images
        return (
            f"{speed:,.0f} images/s: about {minutes:.3g} more minutes for the "
            f"{record.total - record.step:,} steps to come; "
            f"{epochs:.2g} epochs would take five minutes"
        )


def train(
    state: TrainState,
    images: Tensor,
    held_out: Tensor | None = None,
    folder: Path | str | None = None,
    evaluate_every: int | None = None,
    labels: Tensor | None = None,
) -> Iterator[StepRecord]:
    """Run `state` to the end of its config, yielding a StepRecord after every step.

    images: (N, C, H, W) uint8, moved to the device once, or `folders.FolderImages`, read one batch
    at a time. With `held_out` images, their loss is measured every `evaluate_every` steps (by
    default, a tenth of the run). With a `folder`, `last.pt` is written at those points and at the
    end, and `best.pt` when the held-out loss is the lowest so far. The stop button (Ctrl-C) or
    SIGTERM ends the loop between two steps, sets `state.stopped` and writes `last.pt`; calling
    `train` again continues exactly.

    Inside `distributed.group`, every process makes this same call and gets the loss of the whole
    batch; only process 0 measures and writes. To leave the loop early, set `state.stopped = True`,
    which also stops the other processes. After a `break`, they would wait.

    If a save fails, a warning is issued, and the save is tried again at the next point. Raises
    NotSaved at once if `folder` cannot be written to, and after the last step if its save failed.
    Raises ValueError if the images are not uint8, are empty, or are not those of the run's first
    steps, if the labels do not match the images, and if the processes do not agree. Raises
    TrainingDiverged when the loss is not finite or exceeds `EXPLODED` (on a GPU, up to `READ_EVERY`
    steps later). Raises distributed.WorkerLost when another process dies (with Gloo; NCCL may wait
    for its timeout instead).
    """
    cfg, first = state.cfg, state.step
    # prepare the data and check the folder
    facts = describe_data(images, labels)
    images, labels, ahead = _bring(state, images, labels, held_out)
    if folder is not None and distributed.rank() == 0:
        checkpoints.check_writable(folder)
    total = cfg.steps(len(images))
    every = evaluate_every or math.ceil(total / 10)
    state.model.train()
    state.stopped, state.unsaved = False, None
    with _stop_between_steps(state), distributed.lost_worker(lambda: _lost(state, folder)), ahead:
        # check that the processes agree and that a resumed run has the same data
        distributed.agree(step=state.step, config=cfg.run_name(), **facts)
        check_same_data(state, facts)
        state.data = facts
        steps = training_steps(
            state, images, labels, distributed.replicate(state.model, state.ema.model)
        )
        unread, leave, clock, speed = {}, False, Clock(), 0.0
        while state.step < total and not leave:
            number, lr = state.step, learning_rate(state.step, total, cfg)
            # take a step; look at the losses now and then
            with clock.running():
                distributed.seed_dropout(cfg.seed, number)
                unread[number], stop = distributed.gather(next(steps), state.stopped)
                loss = unread[number]
                point = state.step % every == 0 or state.step == total
                look = point or (number - first) % state.read_every == 0
                if look:
                    _read(state, unread, folder)
                    leave = bool(stop)
            # otherwise a GPU's host knows when a step was launched, but not when it finished
            if look:
                speed = (state.step - first) * cfg.batch_size / clock.busy  # images a second
            # measure and save at the points for it; report
            measured = _measure_and_save(state, held_out, folder) if point else None
            yield StepRecord(state.step, total, loss, lr, speed, measured, clock)
            leave = leave or (state.stopped and distributed.world() == 1)
        if unread:  # stopped between two looks
            _read(state, unread, folder)
        state.stopped = state.stopped or leave
        # the stop may have come in a step, or while the caller was drawing
        if leave and folder is not None:
            _measure_and_save(state, None, folder)
    if state.unsaved:
        raise NotSaved(f"the run ended at step {state.step}, but {state.unsaved}")


def _bring(state: TrainState, images, labels: Tensor | None, held_out: Tensor | None):
    """Check the data, and move what is held in memory to the device.

    Returns the images, the labels, and the context in which a stream reads ahead.
    """
    mine = distributed.share(state.cfg.batch_size)
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected one an image: ({len(images)},)"
        )
    if held_out is not None:
        check_images(held_out)
    if isinstance(images, Tensor):
        check_images(images)
        labels = None if labels is None else labels.to(state.device)
        return images.to(state.device), labels, contextlib.nullcontext()
    total = state.cfg.steps(len(images))
    order = (batch_indices(len(images), step, state.cfg)[mine] for step in range(state.step, total))
    return images, labels, images.ahead(order)


def describe_data(images, labels: Tensor | None) -> dict:
    """Return what a checkpoint stores about the images (N, C, H, W) and labels (N,).

    These are the shape of the images, and a digest of the images and of the labels.
    """
    kept = (
        None
        if labels is None
        else hashlib.blake2b(labels.cpu().numpy().tobytes(), digest_size=8).hexdigest()
    )
    return {"shape": list(images.shape), "images": digest(images), "labels": kept}


def check_same_data(state: TrainState, now: dict) -> None:
    """Raise ValueError if a resumed run had other data than `now`, as from `describe_data`.

    The message says what differs.
    """
    if state.step == 0:
        return
    words = {
        "shape": "number and size (N, C, H, W)",
        "images": "pixels (digest)",
        "labels": "labels (digest)",
    }
    differing = [
        f"{words[name]} {then} then, {now[name]} now"
        for name, then in (state.data or {}).items()
        if then != now[name]
    ]
    if differing:
        raise ValueError(
            f"the run came to step {state.step} on other data: {'; '.join(differing)}. "
            "Give it the same images to go on, or start a new run"
        )


def _read(state: TrainState, unread: dict[int, Tensor], folder: Path | str | None) -> None:
    """Check the losses of the latest steps, keyed by step number, and remove them.

    Raises TrainingDiverged if a loss is not below `EXPLODED`.
    """
    for number, loss in zip(unread, torch.stack([*unread.values()]).tolist(), strict=True):
        if not loss < EXPLODED:  # which NaN is not either
            raise TrainingDiverged(_divergence(state, loss, number, folder))
    unread.clear()


def _measure_and_save(
    state: TrainState, held_out: Tensor | None, folder: Path | str | None
) -> float | None:
    if not torch.stack([weight.isfinite().all() for weight in state.model.parameters()]).all():
        raise TrainingDiverged(_divergence(state, math.nan, state.step, folder))
    if distributed.rank() != 0:
        return None
    measured, cfg = None, state.cfg
    if held_out is not None:
        measured = held_out_loss(
            state.ema.model, state.schedule, held_out, cfg.target, data_range=cfg.data_range
        )
    best, state.unsaved = state.best, None
    if measured is not None:
        state.best = min(best, measured)
    if folder is not None:
        _try_to_save(Path(folder) / "last.pt", state)
        if state.best < best and not _try_to_save(Path(folder) / "best.pt", state):
            state.best = best  # so that the next good one is written again
    return measured


def _try_to_save(path: Path, state: TrainState) -> bool:
    try:
        checkpoints.save(path, state)
    except NotSaved as error:
        state.unsaved = error
        # at the caller's loop
        warnings.warn(f"step {state.step}: {error}", RuntimeWarning, stacklevel=4)
        return False
    return True


def _last_good(folder: Path | str | None) -> str:
    last = Path(folder) / "last.pt" if folder is not None else None
    return (
        f"the last good checkpoint is {runtime.short_path(last)}"
        if last and last.is_file()
        else "no checkpoint was written"
    )


def _divergence(state: TrainState, loss: float, step: int, folder: Path | str | None) -> str:
    cfg = state.cfg
    return (
        f"loss={loss:g} at step {step} of {cfg.run_name()} (lr={cfg.lr}, "
        f"batch_size={cfg.batch_size}, grad_clip={cfg.grad_clip}); {_last_good(folder)}. Lower "
        "lr, or look for NaN in the images."
    )


def _lost(state: TrainState, folder: Path | str | None) -> str:
    return (
        f"another process died at step {state.step} (its own message, if it left one, says "
        f"why); {_last_good(folder)}"
    )


@contextlib.contextmanager
def _stop_between_steps(state: TrainState):
    """Let Ctrl-C and SIGTERM set `state.stopped` instead of interrupting a step.

    A second signal has its usual effect.
    """
    # signals belong to the main thread
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        state.stopped = True
        signal.signal(signum, before[signum])

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
