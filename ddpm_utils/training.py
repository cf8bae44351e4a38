"""One training step, the average of the weights, the loop as a generator, and checkpoints that resume exactly."""

import contextlib
import copy
import functools
import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import config, runtime
from .config import TrainConfig
from .data import to_model_range
from .diffusion import diffusion_loss, eval_mode, q_sample, training_target
from .schedules import NoiseSchedule, make_schedule

SCHEMA = 1  # of the checkpoint file; a change that old files do not fit raises it


class TrainingDiverged(RuntimeError):
    """The loss was no finite number. The message names the step and the last good checkpoint."""


def sample_timesteps(n: int, timesteps: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """n timesteps, each uniform on 0 … T−1 as in Algorithm 1, but one from each n-th part of the range (VDM, 2107.00630, I.1).

    Spreading a batch evenly leaves the expected loss as it is and takes most of the luck out of its value.
    """
    u = torch.rand(n, generator=generator, device=device)
    part = torch.randperm(n, generator=generator, device=device)
    return ((part + u) / n * timesteps).long().clamp(max=timesteps - 1)


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


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; the fused version does the same arithmetic in one pass and must be asked for."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)


def step_generator(seed: int, step: int, device="cpu") -> torch.Generator:
    """A generator that depends on nothing but seed and step, so that a resumed run draws what the whole run would have drawn."""
    return torch.Generator(device=device).manual_seed((seed * 1_000_003 + step) % 2**63)


def batch_indices(n_images: int, step: int, cfg: TrainConfig) -> Tensor:
    """Which images step `step` sees: each pass over the data is a new permutation, and batches run on from pass to pass."""
    number, offset = divmod(step * cfg.batch_size, n_images)
    order = permutation(n_images, cfg.seed, number)
    while len(order) < offset + cfg.batch_size:
        number += 1
        order = torch.cat([order, permutation(n_images, cfg.seed, number)])
    return order[offset : offset + cfg.batch_size]


@functools.lru_cache(maxsize=2)
def permutation(n_images: int, seed: int, number: int) -> Tensor:
    """The order of the images in pass `number`. Treat it as read-only: the two latest are remembered."""
    return torch.randperm(n_images, generator=step_generator(seed + 1_000_000_007, number))


@dataclass(frozen=True)
class StepRecord:
    """What the loop reports after a step. `held_out` is the EMA network's loss on held-out images, where it was measured."""

    step: int
    total: int
    loss: float
    lr: float
    images_per_second: float
    held_out: float | None = None


class TrainState:
    """Everything a run consists of: config, network, its EMA, optimizer, schedule and the number of steps done."""

    def __init__(self, cfg: TrainConfig, model: nn.Module, device="cpu"):
        self.cfg, self.device = cfg, torch.device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.ema = EMA(self.model, cfg.ema_decay)
        self.optimizer = make_optimizer(self.model, cfg)
        self.schedule = make_schedule(**cfg.noise()).to(self.device)
        self.step = 0
        self.best = math.inf  # the lowest held-out loss so far
        self.stopped = False  # True once the reader has pressed stop


def train(state: TrainState, images: Tensor, held_out: Tensor | None = None, folder: Path | str | None = None,
          evaluate_every: int | None = None, labels: Tensor | None = None) -> Iterator[StepRecord]:  # fmt: skip
    """Run `state` to the end of its config, yielding a StepRecord after every step.

    images: (N, C, H, W) uint8, moved to the device once. With `held_out` images, their loss is measured every
    `evaluate_every` steps (a tenth of the run if not given). With a `folder`, `last.pt` is written at those points and at the
    end, and `best.pt` when the held-out loss is the lowest so far. The stop button (Ctrl-C) ends the loop between two steps,
    with `state.stopped` set and `last.pt` written: calling `train` again goes on exactly.
    Raises ValueError on images that are not uint8 or are empty; TrainingDiverged when the loss is no finite number.
    """
    cfg, images = state.cfg, check_images(images).to(state.device)
    if held_out is not None:
        check_images(held_out)
    if labels is not None:
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected one a picture: ({len(images)},)")
        labels = labels.to(state.device)
    total = cfg.steps(len(images))
    every = evaluate_every or math.ceil(total / 10)
    state.model.train()
    state.stopped = False
    with _stop_between_steps(state):
        first, busy = state.step, 0.0  # seconds spent in steps; what the caller does in between does not count
        while state.step < total and not state.stopped:
            began = time.perf_counter()
            lr = learning_rate(state.step, total, cfg)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            picked = batch_indices(len(images), state.step, cfg).to(state.device)
            rng = step_generator(cfg.seed, state.step, state.device)
            x0 = to_model_range(images[picked])
            t = sample_timesteps(len(x0), len(state.schedule), rng, state.device)
            eps = torch.randn(x0.shape, generator=rng, device=state.device)
            y = None if labels is None else labels[picked]
            loss = train_step(
                state.model, state.optimizer, state.schedule, x0, t, eps, cfg.target, cfg.grad_clip, y
            ).item()
            if not math.isfinite(loss):
                raise TrainingDiverged(_divergence(state, loss, folder))
            state.ema.update(state.model)
            state.step += 1
            busy += time.perf_counter() - began
            speed = (state.step - first) * cfg.batch_size / busy
            measured = None
            if state.step % every == 0 or state.step == total:
                measured = _measure_and_save(state, held_out, folder)
            yield StepRecord(state.step, total, loss, lr, speed, measured)
        if state.stopped and folder is not None:  # the stop may have come in a step, or while the caller was drawing
            _measure_and_save(state, None, folder)


def _measure_and_save(state: TrainState, held_out: Tensor | None, folder: Path | str | None) -> float | None:
    if not all(weight.isfinite().all() for weight in state.model.parameters()):
        raise TrainingDiverged(_divergence(state, math.nan, folder))
    measured = None if held_out is None else held_out_loss(state.ema.model, state.schedule, held_out, state.cfg.target)
    better = measured is not None and measured < state.best
    if better:
        state.best = measured
    if folder is not None:
        save_checkpoint(Path(folder) / "last.pt", state)
        if better:
            save_checkpoint(Path(folder) / "best.pt", state)
    return measured


def _divergence(state: TrainState, loss: float, folder) -> str:
    last = Path(folder) / "last.pt" if folder is not None else None
    where = (
        f"the last good checkpoint is {runtime.short_path(last)}"
        if last and last.is_file()
        else "no checkpoint was written"
    )
    return f"loss={loss} at step {state.step} with lr={state.cfg.lr}; {where}. Lower lr, or look for NaN in the images."


@contextlib.contextmanager
def _stop_between_steps(state: TrainState):
    """While inside, Ctrl-C sets `state.stopped` instead of cutting a step in half. A second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return

    def stop(signum, frame):
        state.stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def held_out_loss(
    model, schedule: NoiseSchedule, images: Tensor, target: str, batch_size: int = 256, seed: int = 0
) -> float:
    """Mean loss on `images` (uint8) with timesteps and noise fixed by `seed`, so that two networks meet the same questions."""
    per_t = loss_per_timestep(model, schedule, images, target, None, batch_size, seed)
    return per_t.mean().item()


@torch.no_grad()
def loss_per_timestep(model, schedule: NoiseSchedule, images: Tensor, target: str, timesteps: Tensor | None,
                      batch_size: int = 256, seed: int = 0) -> Tensor:  # fmt: skip
    """Squared error per pixel of each image at its own timestep (`timesteps` (N,), or None for an even spread). Shape (N,)."""
    device = schedule.betas.device
    rng = torch.Generator(device=device).manual_seed(seed)
    if timesteps is None:
        timesteps = torch.linspace(0, len(schedule) - 1, len(images)).long()
    losses = []
    with eval_mode(model):
        for x_u8, t in zip(images.split(batch_size), timesteps.split(batch_size), strict=True):
            x0, t = to_model_range(x_u8).to(device), t.to(device)
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


def save_checkpoint(path: Path | str, state: TrainState) -> Path:
    """Write one file with all of `state`: under a temporary name, flushed to disk, then renamed, so `path` is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {
        "schema": SCHEMA,
        "config": state.cfg.to_dict(),
        "step": state.step,
        "best": state.best,
        "model": state.model.state_dict(),
        "ema": state.ema.model.state_dict(),
        "ema_updates": state.ema.updates,
        "optimizer": state.optimizer.state_dict(),
        "rng": torch.get_rng_state(),  # dropout draws from the global generator; all else from seed and step
        "rng_cuda": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path | str) -> dict:
    """The contents of a checkpoint, without running any code from it.

    Raises FileNotFoundError if there is none, ValueError if the file is damaged, foreign or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {runtime.short_path(path)}: train first, or look for last.pt and best.pt in the run's folder"
        )
    try:
        with zipfile.ZipFile(path) as file:  # PyTorch itself does not look at the checksums
            if file.testzip():
                raise ValueError("a checksum is wrong")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{runtime.short_path(path)} is no whole checkpoint ({type(error).__name__}): take another, such as best.pt"
        ) from error
    if not isinstance(payload, dict) or not {"schema", "config"} <= payload.keys():
        raise ValueError(f"{runtime.short_path(path)} was not written by ddpm_utils: it has no schema and config")
    if payload["schema"] != SCHEMA:
        raise ValueError(
            f"{runtime.short_path(path)} has schema {payload['schema']}, this version reads {SCHEMA}: "
            "train again, or use the version that wrote it"
        )
    return payload


def check_weights(path: Path | str, weights, model: nn.Module) -> None:
    """Raise ValueError unless `weights`, read from `path`, are a state dict with the names and shapes of `model`."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if not isinstance(weights, dict) or {name: getattr(w, "shape", None) for name, w in weights.items()} != shapes:
        raise ValueError(f"{runtime.short_path(path)} holds no weights of this network: take another file")


def load_checkpoint(path: Path | str, state: TrainState, strict: bool = True) -> TrainState:
    """Put a checkpoint into `state`, which then goes on exactly where it was saved.

    Raises ValueError that shows each field in which the configs differ: all fields if `strict` (a resumed run must be the same
    run), else those that decide what the weights mean.
    """
    payload = read_checkpoint(path)
    saved = config.from_dict(payload["config"])
    fields = tuple(state.cfg.to_dict()) if strict else config.WEIGHT_FIELDS
    differing = state.cfg.differences(saved, fields)
    if differing:
        raise ValueError(
            f"the config does not match {runtime.short_path(path)} (yours against the file's): {'; '.join(differing)}"
        )
    check_weights(path, payload.get("model"), state.model)
    check_weights(path, payload.get("ema"), state.ema.model)
    state.model.load_state_dict(payload["model"])
    state.ema.model.load_state_dict(payload["ema"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.ema.updates, state.step, state.best = payload["ema_updates"], payload["step"], payload["best"]
    torch.set_rng_state(payload["rng"])
    if payload["rng_cuda"] is not None and state.device.type == "cuda":
        torch.cuda.set_rng_state(payload["rng_cuda"], state.device)
    return state
