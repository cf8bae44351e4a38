"""One training step, the average of the weights, and the loop as a generator that stops and resumes exactly."""

import contextlib
import copy
import functools
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
from torch import Tensor, nn

from . import checkpoints, distributed, runtime
from .checkpoints import NotSaved
from .config import TrainConfig
from .data import digest, to_model_range
from .diffusion import diffusion_loss, eval_mode, q_sample, training_target
from .optimizer import make_optimizer
from .schedules import NoiseSchedule, make_schedule

EXPLODED = 1e3  # a loss; the answer 0 has about 1, whatever the target
READ_EVERY = 50  # steps after which a GPU, which runs behind its host, is waited for to look at the losses


class TrainingDiverged(RuntimeError):
    """The loss was no finite number, or an enormous one. The message names step, config and the last good checkpoint."""


def sample_timesteps(n: int, timesteps: int, generator: torch.Generator | None = None, device="cpu",
                     middle: bool = False) -> Tensor:  # fmt: skip
    """n timesteps, one from each n-th part of 0 … T−1 (VDM, 2107.00630, I.1): each uniform, or with `middle` on a hill.

    Uniform as in Algorithm 1: spreading a batch evenly leaves the expected loss as it is and takes most of the luck out of its
    value. On the hill, s = t/T has the density 6·s·(1 − s), a weighted loss (as 2403.03206, 3.1): better pictures sooner.
    """
    u = torch.rand(n, generator=generator, device=device)
    part = torch.randperm(n, generator=generator, device=device)
    s = (part + u) / n
    if middle:
        s = 0.5 - (torch.asin(1 - 2 * s) / 3).sin()  # where 3s² − 2s³, the share of times below s, is what it was
    return (s * timesteps).long().clamp(max=timesteps - 1)


def drop_labels(y: Tensor, share: float, none: int, generator: torch.Generator | None = None) -> Tensor:
    """Labels y (B,), each replaced by `none` with probability `share` (2207.12598, Algorithm 1), independent of the others."""
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < share
    return y.masked_fill(dropped, none)


def train_step(model, optimizer, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor,
               target: str = "eps", grad_clip: float = 1.0, y=None) -> Tensor:  # fmt: skip
    """One pass through DDPM Algorithm 1, lines 2–5: loss, gradient (clipped to norm `grad_clip`), step. Returns the loss."""
    with runtime.autocast(x0.device):
        loss = diffusion_loss(model, schedule, x0, t, eps, target, y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach()


class EMA:
    """An average of the weights over the steps: θ_ema ← d·θ_ema + (1 − d)·θ, d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp keeps a short run from averaging in its random start. `model` is the averaged network, always in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - d)
        self.updates += 1


def learning_rate(step: int, total: int, cfg: TrainConfig) -> float:
    """The rate at `step` = 0 … total−1: a linear rise over `warmup_steps`, `lr`, then a linear fall to `lr_floor · lr`."""
    rise = (step + 1) / max(1, min(cfg.warmup_steps, total // 4))
    start = cfg.decay_from * total
    fall = 1 - (1 - cfg.lr_floor) * max(0.0, step - start) / max(1.0, total - start)
    return cfg.lr * min(1.0, rise, fall)


def step_generator(seed: int, step: int, device="cpu") -> torch.Generator:
    """A generator that depends on nothing but seed and step, so that a resumed run draws what the whole run would have drawn."""
    return torch.Generator(device=device).manual_seed((seed * 1_000_003 + step) % 2**63)


def batch_indices(n_images: int, step: int, cfg: TrainConfig, device="cpu") -> Tensor:
    """Which images step `step` sees: each pass over the data is a new permutation, and batches run on from pass to pass."""
    number, offset = divmod(step * cfg.batch_size, n_images)
    order = permutation(n_images, cfg.seed, number, device)
    while len(order) < offset + cfg.batch_size:
        number += 1
        order = torch.cat([order, permutation(n_images, cfg.seed, number, device)])
    return order[offset : offset + cfg.batch_size]


@functools.lru_cache(maxsize=4)
def permutation(n_images: int, seed: int, number: int, device="cpu") -> Tensor:
    """The order of the images in pass `number`, the same on every device. Treat it as read-only: four are remembered."""
    return torch.randperm(n_images, generator=step_generator(seed + 1_000_000_007, number)).to(device)


@dataclass
class Clock:
    """Seconds that a run has spent in its steps, without what the caller does in between."""

    busy: float = 0.0

    @contextlib.contextmanager
    def running(self):
        """Count the time inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.busy += time.perf_counter() - began


@dataclass(frozen=True)
class StepRecord:
    """What the loop reports after a step. `held_out` is the EMA network's loss on held-out images, where it was measured."""

    step: int
    total: int
    loss_tensor: Tensor  # a scalar, still on the device
    lr: float
    images_per_second: float
    held_out: float | None = None
    clock: Clock | None = field(default=None, repr=False, compare=False)

    @property
    def loss(self) -> float:
        """The loss of the whole batch. A GPU is waited for: to read the losses of many steps at once, see `losses`."""
        return losses([self])[0]


def losses(records: list[StepRecord]) -> list[float]:
    """The losses of `records`, read from the device in one go. Waiting for its steps counts as their time."""
    if not records:
        return []
    with records[-1].clock.running() if records[-1].clock else contextlib.nullcontext():
        return torch.stack([record.loss_tensor for record in records]).tolist()


class TrainState:
    """Everything a run consists of: config, network, its EMA, optimizer, schedule and the number of steps done."""

    def __init__(self, cfg: TrainConfig, model: nn.Module, device="cpu"):
        self.cfg, self.device = cfg, torch.device(device)
        self.model = runtime.place(model, self.device)
        self.ema = EMA(self.model, cfg.ema_decay)
        self.optimizer = make_optimizer(self.model, cfg)
        self.schedule = make_schedule(**cfg.noise()).to(self.device)
        self.step = 0
        self.best = math.inf  # the lowest held-out loss so far
        self.data = None  # what `describe_data` says of the images it is trained on, once it is
        self.stopped = False  # True once the reader has pressed stop; set it to end the loop
        self.read_every = 1 if self.device.type == "cpu" else READ_EVERY
        self.unsaved = None  # the NotSaved of the latest save point, if it failed


def train(state: TrainState, images: Tensor, held_out: Tensor | None = None, folder: Path | str | None = None,
          evaluate_every: int | None = None, labels: Tensor | None = None) -> Iterator[StepRecord]:  # fmt: skip
    """Run `state` to the end of its config, yielding a StepRecord after every step.

    images: (N, C, H, W) uint8, moved to the device once; or `folders.FolderImages`, read a batch at a time. With `held_out`
    images, their loss is measured every `evaluate_every` steps (a tenth of the run if not given). With a `folder`, `last.pt` is
    written at those points and at the end, and `best.pt` when the held-out loss is the lowest so far. The stop button (Ctrl-C)
    or SIGTERM ends the loop between two steps, with `state.stopped` set and `last.pt` written: calling `train` again goes on
    exactly.

    Inside `distributed.group` every process makes this same call and sees the loss of the whole batch; process 0 alone
    measures and writes. Leave the loop early with `state.stopped = True`, which reaches the others: after `break` they wait.

    A save that fails is a warning, and is tried again at the next point. Raises NotSaved at once if `folder` cannot be
    written to, and after the last step if its save failed; ValueError on images that are not uint8, are empty, or are
    not those of the run's first steps, on labels that do not go with them, and on processes that do not agree;
    TrainingDiverged when the loss is not finite or beyond `EXPLODED` (on a GPU up to `READ_EVERY` steps later);
    distributed.WorkerLost when another process dies (over Gloo; NCCL may wait for its timeout instead).
    """
    cfg, mine = state.cfg, distributed.share(state.cfg.batch_size)
    streamed = not isinstance(images, Tensor)
    if not streamed:
        check_images(images)
    if held_out is not None:
        check_images(held_out)
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected one an image: ({len(images)},)")
    if folder is not None and distributed.rank() == 0:
        checkpoints.check_writable(folder)
    facts = describe_data(images, labels)  # of the tensors where they are, before they move
    if not streamed:
        images = images.to(state.device)
        labels = None if labels is None else labels.to(state.device)
    total = cfg.steps(len(images))
    order = (batch_indices(len(images), step, cfg)[mine] for step in range(state.step, total))
    ahead = images.ahead(order) if streamed else contextlib.nullcontext()
    every = evaluate_every or math.ceil(total / 10)
    state.model.train()
    state.stopped, state.unsaved = False, None
    with _stop_between_steps(state), distributed.lost_worker(lambda: _lost(state, folder)), ahead:
        distributed.agree(step=state.step, config=cfg.run_name(), **facts)
        check_same_data(state, facts)
        state.data = facts
        model = distributed.replicate(state.model, state.ema.model)
        first, unread, leave = state.step, {}, False
        clock, speed = Clock(), 0.0  # images a second
        while state.step < total and not leave:
            with clock.running():
                lr = learning_rate(state.step, total, cfg)
                loss, stop = distributed.gather(_one_step(state, model, images, labels, lr), state.stopped)
                unread[state.step] = loss
                done = state.step + 1
                point = done % every == 0 or done == total
                look = point or (done - first - 1) % state.read_every == 0
                if look:
                    _read(state, unread, folder)
                    leave = bool(stop)
                state.ema.update(state.model)
                state.step = done
            if look:  # in between, a GPU's host knows when a step was ordered and not when it was done
                speed = (state.step - first) * cfg.batch_size / clock.busy
            measured = _measure_and_save(state, held_out, folder) if point else None
            yield StepRecord(state.step, total, loss, lr, speed, measured, clock)
            leave = leave or (state.stopped and distributed.world() == 1)
        if unread:  # stopped between two looks
            _read(state, unread, folder)
        state.stopped = state.stopped or leave
        if leave and folder is not None:  # the stop may have come in a step, or while the caller was drawing
            _measure_and_save(state, None, folder)
    if state.unsaved:
        raise NotSaved(f"the run ended at step {state.step}, but {state.unsaved}")


def describe_data(images, labels: Tensor | None) -> dict:
    """What a checkpoint keeps of the images (N, C, H, W) and labels (N,): their shape, and a digest of each."""
    kept = None if labels is None else hashlib.blake2b(labels.cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return {"shape": list(images.shape), "images": digest(images), "labels": kept}


def check_same_data(state: TrainState, now: dict) -> None:
    """Raise ValueError that says what differs, if the run came to its step on other data than `now` (`describe_data`)."""
    if state.step == 0:
        return
    words = {"shape": "number and size (N, C, H, W)", "images": "pixels (digest)", "labels": "labels (digest)"}
    differing = [
        f"{words[name]} {then} then, {now[name]} now" for name, then in (state.data or {}).items() if then != now[name]
    ]
    if differing:
        raise ValueError(
            f"the run came to step {state.step} on other data: {'; '.join(differing)}. "
            "Give it the same images to go on, or start a new run"
        )


def _one_step(state: TrainState, model: nn.Module, images: Tensor, labels: Tensor | None, lr: float) -> Tensor:
    """Step number `state.step`: its batch, timesteps and noise depend on that number and the seed alone. Returns the loss."""
    cfg, mine = state.cfg, distributed.share(state.cfg.batch_size)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if distributed.world() > 1:  # dropout: other masks in every process, the same ones again in a resumed run
        torch.manual_seed((cfg.seed * 1_000_003 + state.step) * distributed.world() + distributed.rank())
    where = state.device if isinstance(images, Tensor) else "cpu"  # a streamed batch is picked where it is read
    picked = batch_indices(len(images), state.step, cfg, where)
    rng = step_generator(cfg.seed, state.step, state.device)
    n, timesteps = cfg.batch_size, len(state.schedule)
    if cfg.timestep_draw == "uniform":
        t = torch.randint(timesteps, (n,), generator=rng, device=state.device)[mine]
    else:
        t = sample_timesteps(n, timesteps, rng, state.device, cfg.timestep_draw == "middle")[mine]
    eps = torch.randn(n, *images.shape[1:], generator=rng, device=state.device)[mine]
    y = None if labels is None else labels[picked].to(state.device)
    y = None if y is None else drop_labels(y, cfg.label_drop, cfg.num_classes, rng)[mine]
    x0 = to_model_range(images[picked[mine]].to(state.device), cfg.data_range)
    return train_step(model, state.optimizer, state.schedule, x0, t, eps, cfg.target, cfg.grad_clip, y)


def _read(state: TrainState, unread: dict[int, Tensor], folder: Path | str | None) -> None:
    """Look at the losses of the latest steps, by number, and forget them. Raises TrainingDiverged."""
    for number, loss in zip(unread, torch.stack([*unread.values()]).tolist(), strict=True):
        if not loss < EXPLODED:  # which NaN is not either
            raise TrainingDiverged(_divergence(state, loss, number, folder))
    unread.clear()


def _measure_and_save(state: TrainState, held_out: Tensor | None, folder: Path | str | None) -> float | None:
    if not torch.stack([weight.isfinite().all() for weight in state.model.parameters()]).all():
        raise TrainingDiverged(_divergence(state, math.nan, state.step, folder))
    if distributed.rank() != 0:
        return None
    measured, cfg = None, state.cfg
    if held_out is not None:
        measured = held_out_loss(state.ema.model, state.schedule, held_out, cfg.target, data_range=cfg.data_range)
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
        warnings.warn(f"step {state.step}: {error}", RuntimeWarning, stacklevel=4)  # at the caller's loop
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
        f"loss={loss:g} at step {step} of {cfg.run_name()} (lr={cfg.lr}, batch_size={cfg.batch_size}, "
        f"grad_clip={cfg.grad_clip}); {_last_good(folder)}. Lower lr, or look for NaN in the images."
    )


def _lost(state: TrainState, folder: Path | str | None) -> str:
    return (
        f"another process died at step {state.step} (its own message, if it left one, says why); {_last_good(folder)}"
    )


@contextlib.contextmanager
def _stop_between_steps(state: TrainState):
    """While inside, Ctrl-C and SIGTERM set `state.stopped` and cut no step in half. A second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
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


@torch.no_grad()
def held_out_loss(model, schedule: NoiseSchedule, images: Tensor, target: str, batch_size: int = 256, seed: int = 0,
                  data_range: str = "symmetric") -> float:  # fmt: skip
    """Mean loss on `images` (uint8) with timesteps and noise fixed by `seed`, so that two networks meet the same questions."""
    per_t = loss_per_timestep(model, schedule, images, target, None, batch_size, seed, data_range)
    return per_t.mean().item()


@torch.no_grad()
def loss_per_timestep(model, schedule: NoiseSchedule, images: Tensor, target: str, timesteps: Tensor | None,
                      batch_size: int = 256, seed: int = 0, data_range: str = "symmetric") -> Tensor:  # fmt: skip
    """Squared error per pixel of each image at its own timestep (`timesteps` (N,), or None for an even spread). Shape (N,)."""
    device = schedule.betas.device
    rng = torch.Generator(device=device).manual_seed(seed)
    if timesteps is None:
        timesteps = torch.linspace(0, len(schedule) - 1, len(images)).long()
    losses = []
    with eval_mode(model):
        for x_u8, t in zip(images.split(batch_size), timesteps.split(batch_size), strict=True):
            x0, t = to_model_range(x_u8, data_range).to(device), t.to(device)
            eps = torch.randn(x0.shape, generator=rng, device=device)
            prediction = model(q_sample(schedule, x0, t, eps), t, None)
            losses.append((prediction - training_target(schedule, x0, t, eps, target)).square().flatten(1).mean(1))
    return torch.cat(losses)


def check_images(images: Tensor) -> Tensor:
    """`images`; ValueError unless it is a non-empty (N, C, H, W) uint8 tensor."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}, expected at least one (C, H, W) image in uint8"
        )
    return images
