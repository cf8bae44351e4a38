"""Checkpoints: a run saved in one file, from which it continues exactly.

The file is always complete. Reading it does not run any code from it.
"""

import contextlib
import copy
import io
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from . import config, runtime

SCHEMA = 1  # of the checkpoint file; raised when a change makes old files unreadable
# What a run needs to go on. Files of an earlier version lack "data" and "rng_mps".
ENTRIES = {
    "step": int,
    "best": float,
    "model": dict,
    "ema": dict,
    "ema_updates": int,
    "optimizer": dict,
    "rng": Tensor,
    "rng_cuda": Tensor | None,
}


class NotSaved(OSError):
    """A checkpoint could not be written (for example, a full disk or a read-only folder).

    The state is still in memory.
    """


def save(path: Path | str, state) -> Path:
    """Write all of `state`, a `training.TrainState`, to one file and return its path.

    The file is written under a temporary name, flushed to disk, and then renamed, so that `path` is
    always complete. Raises NotSaved if the file cannot be written; an earlier file at `path` is
    then kept.
    """
    path = Path(path)
    payload = {
        "schema": SCHEMA,
        "config": state.cfg.to_dict(),
        "step": state.step,
        "best": state.best,
        "data": state.data,
        "model": state.model.state_dict(),
        "ema": state.ema.model.state_dict(),
        "ema_updates": state.ema.updates,
        "optimizer": state.optimizer.state_dict(),
        # dropout draws from the global generator; all else from seed and step
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None,
        "rng_mps": torch.mps.get_rng_state() if state.device.type == "mps" else None,
    }
    buffer = io.BytesIO()  # in memory first: PyTorch's own writer hides the error of a full disk
    torch.save(payload, buffer)
    try:
        _remove_litter(path)
        with runtime.whole_file(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise NotSaved(
            f"{runtime.short_path(path)} was not written ({error.strerror or error}). All of it "
            "is still in memory: make room, or call checkpoints.save with another path"
        ) from error
    return path


def check_writable(folder: Path | str) -> None:
    """Create `folder`, and raise NotSaved if nothing can be written to it.

    A run calls this before its first step, so that it does not fail after hours of training.
    """
    try:
        runtime.make_folder(folder)
    except OSError as error:
        raise NotSaved(str(error)) from error


@contextlib.contextmanager
def claim(folder: Path | str):
    """Reserve `folder` for this process inside the `with` block.

    Raises ValueError if another process has claimed the folder, and NotSaved as `check_writable`
    does.

    The operating system ends a claim when its process ends, however it ends. On a file system
    without locks, every claim succeeds.
    """
    from filelock import FileLock, Timeout

    check_writable(folder)
    lock = FileLock(Path(folder) / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another run: wait for its end, or choose another folder"
        ) from None
    except NotImplementedError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()


def _remove_litter(path: Path) -> None:
    """Delete the unfinished files of saves to `path` whose process was killed."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        pid = part.suffixes[-2][1:]
        # Windows keeps a file that is being written, and `kill` means something else there.
        with contextlib.suppress(OSError):
            if os.name == "posix" and pid.isdigit():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 0)  # only checks whether the process runs
                    continue
            part.unlink()


def read(path: Path | str) -> dict:
    """Return the contents of a checkpoint without running any code from it.

    Raises FileNotFoundError if there is no checkpoint, and ValueError if the file is damaged, was
    not written by this package, or has another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {runtime.short_path(path)}: train first, or look for last.pt and "
            "best.pt in the run's folder"
        )
    # check the checksums and read the file
    try:
        with zipfile.ZipFile(path) as file:  # PyTorch itself does not look at the checksums
            if file.testzip():
                raise ValueError("a checksum is wrong")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{runtime.short_path(path)} is no whole checkpoint ({type(error).__name__}): take "
            "another, such as best.pt"
        ) from error
    # check the origin, the schema and the entries
    if (
        not isinstance(payload, dict)
        or "schema" not in payload
        or not isinstance(payload.get("config"), dict)
    ):
        raise ValueError(
            f"{runtime.short_path(path)} was not written by ddpm_utils: it has no schema and config"
        )
    if payload["schema"] != SCHEMA:
        raise ValueError(
            f"{runtime.short_path(path)} has schema {payload['schema']}, this version reads "
            f"{SCHEMA}: train again, or use the version that wrote it"
        )
    _check_entries(path, payload, ("step", "ema"))
    return payload


def _check_entries(path: Path, payload: dict, names) -> None:
    """Raise ValueError naming those of `names` that `payload` lacks or has in another type."""
    wrong = [name for name in names if not isinstance(payload.get(name, ...), ENTRIES[name])]
    if wrong:
        raise ValueError(
            f"{runtime.short_path(path)} is no whole checkpoint: {', '.join(wrong)} missing or of "
            "another type. Take another, such as best.pt"
        )


def check_weights(path: Path | str, weights, model: nn.Module) -> None:
    """Raise ValueError unless `weights` is a state dict with the names and shapes of `model`.

    `path` is the file from which the weights were read.
    """
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if (
        not isinstance(weights, dict)
        or {name: getattr(w, "shape", None) for name, w in weights.items()} != shapes
    ):
        raise ValueError(
            f"{runtime.short_path(path)} holds no weights of this network: take another file"
        )


def load(path: Path | str, state, strict: bool = True):
    """Load a checkpoint into `state`, a `training.TrainState`, and return `state`.

    The run then continues exactly where it was saved. Raises ValueError, and leaves `state`
    unchanged, if the file lacks an entry or the configs differ. With `strict`, the two configs must
    describe one run (`TrainConfig.contradictions`); otherwise, only the fields that decide what the
    weights mean must agree.
    """
    # compare the configs
    path, payload = Path(path), read(path)
    saved = config.from_dict(payload["config"])
    differing = state.cfg.contradictions(saved) if strict else state.cfg.differences(saved)
    if differing:
        raise ValueError(
            f"the config does not match {runtime.short_path(path)} (yours against the file's): "
            f"{'; '.join(differing)}"
        )
    # check all entries before the state changes
    _check_entries(path, payload, ENTRIES)
    check_weights(path, payload["model"], state.model)
    check_weights(path, payload["ema"], state.ema.model)
    _check_rng(path, payload["rng"])
    # load the optimizer, the weights and the counters
    _load_optimizer(path, payload["optimizer"], state.optimizer)
    state.model.load_state_dict(payload["model"])
    state.ema.model.load_state_dict(payload["ema"])
    state.ema.updates = payload["ema_updates"]
    state.step = payload["step"]
    state.best = payload["best"]
    if strict:
        # an earlier version's file has only the shape of its images, or nothing
        shape = payload.get("data_shape")
        state.data = payload.get("data") or ({"shape": list(shape)} if shape else None)
    # restore the random generators
    torch.set_rng_state(payload["rng"])
    if payload["rng_cuda"] is not None and state.device.type == "cuda":
        torch.cuda.set_rng_state(payload["rng_cuda"], state.device)
    if payload.get("rng_mps") is not None and state.device.type == "mps":
        torch.mps.set_rng_state(payload["rng_mps"])
    return state


def _load_optimizer(path: Path, saved: dict, optimizer) -> None:
    """Load the state `saved` into `optimizer`.

    Raises ValueError, and changes nothing, if the state belongs to other weights.
    """
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(saved)
        for weight, kept in optimizer.state.items():
            sizes = [
                value.numel() for value in kept.values() if isinstance(value, Tensor) and value.ndim
            ]
            # Muon keeps one tensor for several weights of a shape
            if any(size % weight.numel() for size in sizes):
                raise ValueError("its averages have other shapes than the weights")
    except Exception as error:
        optimizer.load_state_dict(before)
        raise ValueError(
            f"{runtime.short_path(path)} holds no state of this optimizer ({error}): take "
            "another, such as best.pt"
        ) from error


def _check_rng(path: Path, state: Tensor) -> None:
    """Raise ValueError unless `state` is a valid state of a random generator."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{runtime.short_path(path)} holds no state of a random generator ({error}): take "
            "another, such as best.pt"
        ) from error
