"""Where and how a lesson runs: device, seed, fast mode, folders. The only room that reads environment variables."""

import contextlib
import os
import random
import re
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def is_fast() -> bool:
    """True when `DDPM_FAST=1`: everything runs, on sizes that finish in seconds and pictures that mean nothing."""
    return _is_on("DDPM_FAST")


def shrink(full, fast):
    """`full`, or `fast` in fast mode. Lessons shrink their counts with this; networks shrink in `config.for_this_run`."""
    return fast if is_fast() else full


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best one here: an NVIDIA or AMD GPU, an Apple GPU, the CPU.

    Raises ValueError if `name` is no device that this machine has.
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
            f"device {name!r} is not here; this machine has: {', '.join(here)}. Leave it out to take the best one."
        )
    return torch.device(name)


def seed_everything(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Seed Python, NumPy and PyTorch, and return a generator on `device` with the same seed for draws that must repeat."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 — for libraries that draw from the global generator
    torch.manual_seed(seed)
    return torch.Generator(device=device).manual_seed(seed)


def autocast(device: torch.device | str):
    """bfloat16 autocast where the hardware multiplies it faster than float32, else nothing. `DDPM_FLOAT32=1` turns it off.

    That is NVIDIA from compute capability 8 on, and CPUs with AVX512-BF16 or AMX (Zen 4, Sapphire Rapids and newer).
    """
    device = torch.device(device)
    if _is_on("DDPM_FLOAT32"):
        return contextlib.nullcontext()
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    if device.type == "cpu" and any(_cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16")):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _cpu_features() -> dict:
    return getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell


def data_dir_override() -> Path | None:
    """The folder named by `DDPM_DATA_DIR`, or None."""
    value = os.environ.get("DDPM_DATA_DIR", "")
    return Path(value).expanduser() if value else None


def data_dir() -> Path:
    """`data/` beside the package, whatever the current folder is. Not created here."""
    return ROOT / "data"


def output_dir(*parts: str) -> Path:
    """`outputs/` beside the package (or the folder named by `DDPM_OUTPUT_DIR`), with `parts` below it; created."""
    base = os.environ.get("DDPM_OUTPUT_DIR", "")
    path = (Path(base).expanduser() if base else ROOT / "outputs").joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def checkpoint_dir(*parts: str) -> Path:
    """`checkpoints/` beside the package (or the folder named by `DDPM_CHECKPOINT_DIR`), with `parts` below it.

    In fast mode a folder `fast` comes in between, since its weights are worth nothing. Not created here.
    """
    base = os.environ.get("DDPM_CHECKPOINT_DIR", "")
    path = Path(base).expanduser() if base else ROOT / "checkpoints"
    return path.joinpath(*(["fast"] if is_fast() else []), *parts)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes free on `device`. Of main memory Linux alone tells; elsewhere 4 GiB are assumed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return 4 * 2**30


def short_path(path: Path | str) -> str:
    """`path` relative to the project where it lies inside it, else its last two parts: fit to print in a shared notebook."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "/".join(path.parts[1:][-2:])


def hardware(device: torch.device | str) -> str:
    """The hardware in a few words, such as `CPU, 2 cores` or `NVIDIA T4`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return "Apple GPU" if device.type == "mps" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def start(seed: int, device: str | None = None) -> tuple[torch.device, torch.Generator]:
    """First call of a lesson: pick the device, seed everything, say both in one line, and shout if fast mode is on."""
    chosen = pick_device(device)
    rng = seed_everything(seed, chosen)
    print(f"device: {hardware(chosen)} · torch {torch.__version__.split('+')[0]} · seed {seed}")
    if is_fast():
        print(
            "FAST MODE (DDPM_FAST=1): every size is shrunk to finish in seconds. Pictures and figures below mean nothing."
        )
    return chosen, rng
