"""A run on disk: one file that is always whole, read without running code from it, from which a run goes on exactly."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import torch
from torch import nn

from . import config, runtime

SCHEMA = 1  # of the checkpoint file; a change that old files do not fit raises it


class NotSaved(OSError):
    """A checkpoint could not be written: the disk is full, the folder read-only. The state is still in memory."""


def save(path: Path | str, state) -> Path:
    """Write one file with all of `state`, a `training.TrainState`, and return its path.

    It is written under a temporary name, flushed to disk, then renamed, so that `path` is always whole. Raises NotSaved if
    it cannot be written; what was there before stays.
    """
    path = Path(path)
    payload = {
        "schema": SCHEMA,
        "config": state.cfg.to_dict(),
        "step": state.step,
        "best": state.best,
        "data_shape": state.data_shape,
        "model": state.model.state_dict(),
        "ema": state.ema.model.state_dict(),
        "ema_updates": state.ema.updates,
        "optimizer": state.optimizer.state_dict(),
        "rng": torch.get_rng_state(),  # dropout draws from the global generator; all else from seed and step
        "rng_cuda": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
    }
    buffer = io.BytesIO()  # in memory first: PyTorch's own writer hides what a full disk says
    torch.save(payload, buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_litter(path)
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise NotSaved(
            f"{runtime.short_path(path)} was not written ({error.strerror or error}). All of it is still in memory: "
            "make room, or call checkpoints.save with another path"
        ) from error
    return path


def _remove_litter(path: Path) -> None:
    """Delete the unfinished files of saves to `path` whose process was killed."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        pid = part.suffixes[-2][1:]
        # Windows keeps a file that is being written, and `kill` means something else there.
        with contextlib.suppress(OSError):
            if os.name == "posix" and pid.isdigit():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 0)  # only asks whether it lives
                    continue
            part.unlink()


def read(path: Path | str) -> dict:
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


def load(path: Path | str, state, strict: bool = True):
    """Put a checkpoint into `state`, a `training.TrainState`, which is returned and goes on exactly where it was saved.

    Raises ValueError that shows each field in which the configs differ: all fields if `strict` (a resumed run must be the same
    run), else those that decide what the weights mean.
    """
    payload = read(path)
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
    if strict:
        state.data_shape = payload.get("data_shape")  # a file of an earlier version does not say
    torch.set_rng_state(payload["rng"])
    if payload["rng_cuda"] is not None and state.device.type == "cuda":
        torch.cuda.set_rng_state(payload["rng_cuda"], state.device)
    return state
