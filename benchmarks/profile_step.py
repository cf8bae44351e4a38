"""Where the time of one training step goes, how fast each convolution is by itself, and what
sampling adds to the network.

`python -m benchmarks.profile_step [--contestant sketch] [--device cuda] [--compile]`: prints,
writes nothing.
"""

import argparse
import collections
import math
import sys
import time
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm_utils import data, runtime, sampling

from .contestants import CONTESTANTS, Ours, Training
from .measure import flops_per_image, machine, matrix_peak, synchronize

# What an operator of the network does, by parts of its name; the first line that fits counts.
GROUPS = {
    "convolutions": ("convolution",),
    "attention (its products)": (
        "scaled_dot_product",
        "flash_attention",
        "efficient_attention",
        "bmm",
        "softmax",
    ),
    "linear layers": ("addmm", "aten::mm", "aten::linear"),
    "normalization": ("group_norm", "layer_norm", "batch_norm"),
    "activations": ("silu", "relu", "gelu", "sigmoid"),
    "joins, copies, casts, upsampling": (
        "cat",
        "copy_",
        "clone",
        "contiguous",
        "upsample",
        "slice",
        "narrow",
        "fill_",
        "zero_",
    ),
    "the average (EMA)": ("lerp",),
}
CLIP, FORWARD = "clipping", "the network, forward"


def group_of(event: FunctionEvent) -> str:
    """The group whose account an operator's own time goes to: that of the part of the step it runs
    in, else that of its name.
    """
    inside, parent = set(), event
    while parent is not None:
        inside.add(parent.name)
        parent = parent.cpu_parent
    if any(name.startswith("Optimizer.step") for name in inside):
        return "optimizer"
    if CLIP in inside:
        return "clipping"
    for group, parts in GROUPS.items():
        if any(part in event.name for part in parts):
            return group
    backward = any(name.startswith("autograd::engine") for name in inside)
    if FORWARD in inside or backward:
        return (
            "other arithmetic of the network"
            if event.name.startswith("aten::")
            else "autograd's bookkeeping"
        )
    return "batch, noise and loss"


def profile_step(contestant: Training, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds a step without the profiler, and the share of each group in a step with it.

    They sum to 1.

    On a GPU the shares are of the time of its kernels, elsewhere of the wall clock; what no
    operator accounts for is Python's.
    """
    device, model = contestant.device, contestant.model.train()
    for _ in range(3):
        contestant.step(0.1)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        contestant.step(0.1)
    synchronize(device)
    seconds = (time.perf_counter() - began) / steps

    ranges = []
    before = model.register_forward_pre_hook(
        lambda *_: ranges.append(record_function(FORWARD).__enter__())
    )
    after = model.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None))
    clip = nn.utils.clip_grad_norm_

    def clip_in_range(*args, **kwargs):
        with record_function(CLIP):
            return clip(*args, **kwargs)

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with (
        mock.patch.object(nn.utils, "clip_grad_norm_", clip_in_range),
        profile(activities=activities) as found,
    ):
        began = time.perf_counter()
        for _ in range(steps):
            contestant.step(0.1)
        synchronize(device)
        wall = time.perf_counter() - began
    before.remove()
    after.remove()
    shares = collections.Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            shares[group_of(event)] += own / 1e6
    if not on_gpu:
        shares["Python"] = max(0.0, wall - shares.total())
    return seconds, {name: value / shares.total() for name, value in shares.most_common()}


def convolutions(contestant: Training) -> list[tuple[nn.Module, torch.Size, int]]:
    """Every shape of convolution in the network: one such layer, the shape of its input, and how
    often it is met in a step.
    """
    met = {}

    def note(layer, args, out):
        kernel = (
            type(layer),
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
        )
        first = met.setdefault((kernel, args[0].shape), [layer, args[0].shape, 0])
        first[2] += 1

    layers = [
        m for m in contestant.model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    x = torch.zeros(contestant.batch_size, *contestant.images.shape[1:], device=contestant.device)
    with torch.no_grad():
        contestant.model(x, torch.zeros(len(x), dtype=torch.long, device=contestant.device))
    for hook in hooks:
        hook.remove()
    return [tuple(entry) for entry in met.values()]


def time_convolution(
    layer: nn.Module, shape: torch.Size, contestant: Training, repeat: int
) -> tuple[float, float]:
    """Seconds of a convolution by itself, forward and backward, and its FLOP/s."""
    x = torch.randn(shape, device=contestant.device).to(contestant.precision(contestant.device))
    x = x.to(memory_format=contestant.memory_format).requires_grad_()
    with contestant.autocast():
        y = layer(x)
    grad, best = torch.randn_like(y), math.inf
    for _ in range(repeat):
        synchronize(contestant.device)
        began = time.perf_counter()
        with contestant.autocast():
            y = layer(x)
        torch.autograd.grad(y, (x, layer.weight), grad)
        synchronize(contestant.device)
        best = min(best, time.perf_counter() - began)
    places = y if isinstance(layer, nn.Conv2d) else x  # where the kernel is laid down
    products = 2 * len(x) * layer.in_channels * layer.out_channels * math.prod(layer.kernel_size)
    return best, 3 * products * math.prod(places.shape[2:]) / best


def calls_per_second(contestant: Training, batch: int, calls: int) -> dict[str, float]:
    """Network calls a second on `batch` images: the bare forward pass, and inside the samplers."""
    model, schedule, device = contestant.network(), contestant.schedule, contestant.device
    shape = (batch, *contestant.images.shape[1:])
    x, t = torch.randn(shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    rng = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def bare():
        model.eval()
        while True:
            yield model(x, t)

    def rate(make) -> float:
        best = math.inf
        for _ in range(3):
            states = make()
            next(states)  # the first call pays for what is prepared once
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                next(states)
            synchronize(device)
            best = min(best, time.perf_counter() - began)
        return calls / best

    denoise = contestant.denoiser()
    return {
        "network alone": rate(bare),
        "ddim_sample": rate(
            lambda: sampling.ddim_sample(denoise, schedule, shape, calls + 2, generator=rng)
        ),
        "ddpm_sample": rate(lambda: sampling.ddpm_sample(denoise, schedule, shape, generator=rng)),
    }


def main(arguments: list[str]) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--contestant", choices=list(CONTESTANTS), default="ours", help="whose step (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, mps; the best one here if left out")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for ours and paper")
    args = parser.parse_args(arguments)
    device, kind = runtime.pick_device(args.device), CONTESTANTS[args.contestant]
    train_set = data.load_images(runtime.shrink("fashion_mnist", "digits"), "train")
    contestant = kind(
        train_set.images.to(device), 0, device, args.compile and issubclass(kind, Ours)
    )
    where, precision = machine(device, train_set.title), contestant.precision(device)
    peak = matrix_peak(device, precision)
    flops = flops_per_image(contestant.model, contestant.images.shape[1:], device)
    seconds, shares = profile_step(contestant, runtime.shrink(30, 2))
    speed = contestant.batch_size / seconds
    parameters = sum(p.numel() for p in contestant.model.parameters())
    print(
        f"{where['machine']}; {where['device']}; torch {where['torch']}; "
        f"matrix products {peak / 1e9:.0f} GFLOP/s in {precision}\n"
        f"{args.contestant}: {parameters:,} parameters, {flops / 1e6:.0f} MFLOP an image; "
        f"a step of {contestant.batch_size} images takes {1000 * seconds:.1f} ms: "
        f"{speed:.0f} images/s, {speed * flops / peak:.0%} of the peak\n"
    )
    print("| part of a step | ms | share |\n|---|---:|---:|")
    for name, share in shares.items():
        print(f"| {name} | {1000 * seconds * share:.2f} | {share:.1%} |")
    print("\n| convolution | input | times | ms each | of the peak |\n|---|---|---:|---:|---:|")
    for layer, shape, times in convolutions(contestant):
        took, reached = time_convolution(layer, shape, contestant, runtime.shrink(20, 1))
        kernel = "×".join(map(str, layer.kernel_size))
        name = f"{layer.in_channels} → {layer.out_channels}, {kernel}, stride {layer.stride[0]}"
        name += ", transposed" * isinstance(layer, nn.ConvTranspose2d)
        print(
            f"| {name} | {shape[2]}×{shape[3]} | {times} | {1000 * took:.2f} | "
            f"{reached / peak:.0%} |"
        )
    batch, calls = runtime.shrink(100, 2), runtime.shrink(48, 3)
    print(f"\n| sampling, {batch} images | calls/s | of the network alone |\n|---|---:|---:|")
    rates = calls_per_second(contestant, batch, calls)
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / rates['network alone']:.0%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
