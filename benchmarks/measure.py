"""What the benchmarks share: the clock, the machine's peak, the work in a step, and what the
machine is called.
"""

import math
import os
import platform
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_utils import config, data, pretrained, runtime


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock read now is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def package_precision(device: torch.device) -> torch.dtype:
    """What `runtime.autocast` has matrices multiplied in on this device."""
    with runtime.autocast(device):
        enabled = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def matrix_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    side, best = runtime.shrink(8192 if device.type == "cuda" else 2048, 128), math.inf
    a = torch.randn(side, side, device=device).to(precision)
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def flops_per_image(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> float:
    """Floating point operations of convolutions and matrix products, forward and backward, for one
    image (C, H, W).
    """
    x, t = torch.zeros(2, *shape, device=device), torch.zeros(2, dtype=torch.long, device=device)
    # Attention as plain products: what a fused kernel computes again on the way back is no work of
    # the network's.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t).square().mean().backward()
    model.zero_grad()
    return counter.get_total_flops() / 2


def real_sets(dataset: str | None = None) -> tuple[data.ImageSet, data.ImageSet]:
    """Training and test set of `dataset`, by default Fashion-MNIST (in fast mode, digits).

    SystemExit if they are not to be had.
    """
    dataset = dataset or runtime.shrink("fashion_mnist", "digits")
    train_set, test_set = data.load_images(dataset, "train"), data.load_images(dataset, "test")
    if train_set.title != data.TITLES[dataset]:
        raise SystemExit(
            f"{data.TITLES[dataset]} was not found: nothing is measured on {train_set.title}"
        )
    return train_set, test_set


def shipped_network(dataset: str, device: torch.device) -> tuple[nn.Module, config.TrainConfig]:
    """The shipped weights of `dataset` and their config, never a checkpoint of the reader's own.

    In fast mode, a small network that was trained for two seconds.
    """
    if runtime.is_fast():
        cfg = config.for_this_run(config.TrainConfig(dataset))
        return pretrained.obtain(cfg, device, seconds=2), cfg
    return pretrained.load(dataset, device)


def machine(device: torch.device, title: str) -> dict:
    """What results must have in common to be compared."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu
        )
    return {
        "device": runtime.hardware(device),
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": title,
        "fast": runtime.is_fast(),
    }
