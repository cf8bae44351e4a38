"""Where and how a lesson runs: device, random seed, fast mode, folders.

This is the only module that reads the `DDPM_…` environment variables.

In a checkout of the repository, `outputs/`, `checkpoints/` and `data/` are at its root. Outside a
checkout (the package was installed as a wheel), the first two are in the directory that was current
at the time of import, and the data are in the user's cache. `DDPM_OUTPUT_DIR`,
`DDPM_CHECKPOINT_DIR` and `DDPM_DATA_DIR` name other folders. A relative path in them is relative to
the same root and not to the current directory, because Jupyter starts each notebook in the folder
that contains the notebook.
"""

import contextlib
import os
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

_PACKAGE_PARENT = Path(__file__).resolve().parent.parent
# a file that no installed copy has
IN_CHECKOUT = (_PACKAGE_PARENT / "tools" / "lessons.py").is_file()
ROOT = _PACKAGE_PARENT if IN_CHECKOUT else Path.cwd()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def is_fast() -> bool:
    """Return True if fast mode is on (`DDPM_FAST=1`).

    In fast mode everything runs, but on sizes that finish in seconds; the images mean nothing.
    """
    return _is_on("DDPM_FAST")


def shrink(full, fast):
    """Return `full`, or `fast` in fast mode.

    Lessons shrink their counts with this function; networks are shrunk by `config.for_this_run`.
    """
    return fast if is_fast() else full


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, or the best device of this machine.

    The order is: an NVIDIA or AMD GPU, an Apple GPU, the CPU. Raises ValueError if this machine has
    no device `name`.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = (
        ["cpu"]
        + ["cuda"] * (cards > 0)
        + [f"cuda:{i}" for i in range(cards)]
        + ["mps"] * torch.backends.mps.is_available()
    )
    if name is None:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if kind in here))
    if str(name) not in here:
        raise ValueError(
            f"device {name!r} is not here; this machine has: {', '.join(here)}. Leave it out to "
            "take the best one."
        )
    return torch.device(name)


def seed_everything(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Seed Python, NumPy and PyTorch, and return a generator on `device` with the same seed.

    Use the generator for draws that must be repeatable.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 — for libraries that draw from the global generator
    torch.manual_seed(seed)
    return torch.Generator(device=device).manual_seed(seed)


def autocast(device: torch.device | str):
    """Return a context for bfloat16 autocast, or an empty one where that is not faster.

    Hardware that multiplies bfloat16 faster than float32 is: NVIDIA GPUs from compute capability 8
    on, and CPUs with AVX512-BF16 or AMX (Zen 4, Sapphire Rapids and newer). `DDPM_FLOAT32=1` turns
    autocast off.
    """
    device = torch.device(device)
    if _is_on("DDPM_FLOAT32"):
        return contextlib.nullcontext()
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    if device.type == "cpu" and any(
        _cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16")
    ):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def capability(device: torch.device | str) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, such as (7, 5) for a T4, else None."""
    device = torch.device(device)
    return (
        torch.cuda.get_device_capability(device)
        if device.type == "cuda" and torch.cuda.is_available()
        else None
    )


def place(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """Move `model` to `device`, with its convolutions in the memory layout that is fast there.

    The layout is channels_last on a CPU, and on an NVIDIA GPU that trains in bfloat16, because its
    tensor cores prefer it. It is the default layout on all other devices: wrong gradients with
    channels_last have been reported on Apple's GPUs.
    """
    device = torch.device(device)
    last = device.type == "cpu" or (capability(device) or (0, 0)) >= (8, 0)
    return model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def _cpu_features() -> dict:
    return getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell


def _named_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names, or None if it is not set."""
    value = os.environ.get(variable, "")
    try:
        return ROOT / Path(value).expanduser() if value else None
    except RuntimeError as error:  # a home directory that does not exist
        raise ValueError(
            f"{variable}={value!r} names no folder: write out the part with ~"
        ) from error


def data_dir_override() -> Path | None:
    """Return the folder named by `DDPM_DATA_DIR`, or None."""
    return _named_folder("DDPM_DATA_DIR")


def data_dir() -> Path:
    """Return the folder for downloaded data: `data/` in a checkout, else the user's cache.

    The folder is not created here.
    """
    if IN_CHECKOUT:
        return ROOT / "data"
    import platformdirs  # needed by installed copies alone

    return platformdirs.user_cache_path("ddpm-utils", appauthor=False)


def output_path(*parts: str) -> Path:
    """Return `outputs/` (or the folder in `DDPM_OUTPUT_DIR`) with `parts` below it.

    The folder is not created here.
    """
    return (_named_folder("DDPM_OUTPUT_DIR") or ROOT / "outputs").joinpath(*parts)


def output_dir(*parts: str) -> Path:
    """Create the folder of `output_path` and return it. Raises OSError as `make_folder` does."""
    return make_folder(output_path(*parts))


def checkpoint_dir(*parts: str) -> Path:
    """Return `checkpoints/` (or the folder in `DDPM_CHECKPOINT_DIR`) with `parts` below it.

    The folder is not created here. In fast mode, the folder `fast` comes before `parts`, because
    weights trained in that mode are of no use.
    """
    return _checkpoint_base().joinpath(*(["fast"] if is_fast() else []), *parts)


def _checkpoint_base() -> Path:
    return _named_folder("DDPM_CHECKPOINT_DIR") or ROOT / "checkpoints"


def make_folder(folder: Path | str) -> Path:
    """Create `folder` with its parents, check that a file can be written to it, and return it.

    Raises the system's OSError with a message that names the folder, the reason and what to do.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_one_byte(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return folder


def check_folder(folder: Path | str) -> None:
    """Check that `folder`, or its nearest existing parent, can be written to.

    Leaves no file behind. Raises OSError as `make_folder` does.
    """
    folder = Path(folder)
    try:
        _write_one_byte(
            next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        )
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _write_one_byte(folder: Path) -> None:
    """Raise OSError unless a file can be written to `folder`.

    It tries to write one, because permission bits do not show a read-only file system or a full
    disk.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"x")


def _cannot_write(folder: Path, error: OSError) -> OSError:
    obstacles = [
        path for path in (folder, *folder.parents) if os.path.lexists(path) and not path.is_dir()
    ]
    reason = f"{obstacles[0]} is no folder" if obstacles else error.strerror or error
    writable = "to a folder that you can write to"
    cures = {
        output_path(): f"set DDPM_OUTPUT_DIR {writable}",
        _checkpoint_base(): f"set DDPM_CHECKPOINT_DIR {writable}",
        data_dir(): "set DDPM_DATA_DIR to a folder that holds the data sets",
    }
    around = [base for base in cures if folder.absolute().is_relative_to(base)]
    innermost = max(around, key=lambda base: len(base.parts), default=None)
    cure = cures.get(innermost, "choose a folder that you can write to")
    return type(error)(f"{folder} cannot be written to ({reason}): {cure}")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Return the number of free bytes on `device`.

    Only Linux reports how much main memory is free; elsewhere, 4 GiB are assumed.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return 4 * 2**30


@contextlib.contextmanager
def whole_file(path: Path):
    """Yield a binary file that replaces `path` at the end of the `with` block.

    So `path` never holds an incomplete file. If the block raises an exception, an earlier file at
    `path` is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def short_path(path: Path | str) -> str:
    """Return `path` in a form that can be printed in a shared notebook.

    The path is relative to the root if it lies inside it, and starts with `~` in the cache of an
    installed copy. Otherwise only its last two parts are returned.
    """
    path = Path(path).absolute()
    # `data/` may be a link to another disk
    for form in (Path(os.path.normpath(path)), path.resolve()):
        if form.is_relative_to(ROOT):
            return form.relative_to(ROOT).as_posix()
    if not IN_CHECKOUT and path.is_relative_to(data_dir()):
        return str(path).replace(str(Path.home()), "~", 1)
    return "/".join(path.resolve().parts[1:][-2:])


def hardware(device: torch.device | str) -> str:
    """Return the hardware in a few words, such as `CPU, 2 threads` or `NVIDIA T4`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (
        "Apple GPU"
        if device.type == "mps"
        else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    )


# In a notebook: the state of every random generator before a cell ran for the first time, by the
# cell's text.
_BEFORE_CELL: dict[str, dict] = {}


def _random_states(names: dict) -> dict:
    """Return the states of all random generators of a notebook.

    These are the global generators, and every `torch.Generator` among the notebook's `names`.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 — some library may draw from it
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "own": {
            name: value.get_state()
            for name, value in names.items()
            if isinstance(value, torch.Generator)
        },
    }


def _set_random_states(states: dict, names: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])
    for name, state in states["own"].items():
        if isinstance(names.get(name), torch.Generator):
            names[name].set_state(state)


def _before_cell(info) -> None:
    """Give a cell that runs again the random states of its first run.

    The cell then draws the same numbers.
    """
    names = sys.modules["IPython"].get_ipython().user_ns
    if info.raw_cell in _BEFORE_CELL:
        _set_random_states(_BEFORE_CELL[info.raw_cell], names)
    else:
        _BEFORE_CELL[info.raw_cell] = _random_states(names)


def start(seed: int, device: str | None = None) -> tuple[torch.device, torch.Generator]:
    """Pick the device, seed everything, and print both: the first call of a lesson.

    Returns the device and a generator on it. Prints a warning if fast mode is on. From here on, a
    notebook cell that is run again draws the same random numbers as the first time.
    """
    chosen = pick_device(device)
    rng = seed_everything(seed, chosen)
    _BEFORE_CELL.clear()
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell:
        shell.events.register("pre_run_cell", _before_cell)  # a second registration does nothing
    print(f"device: {hardware(chosen)} · torch {torch.__version__.split('+')[0]} · seed {seed}")
    if is_fast():
        print(
            "FAST MODE (DDPM_FAST=1): every size is shrunk to finish in seconds. Images and "
            "figures below mean nothing."
        )
    return chosen, rng
