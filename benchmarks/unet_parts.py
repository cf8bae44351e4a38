"""What the long skips and the attention of the U-Net contribute early in training.

`python -m benchmarks.unet_parts` trains the network of lesson 03 as built, with its skips set to
zero, and without its attention, three seeds each, and measures the error of the predicted noise at
eight noise levels. The three networks of a seed compute the same function before the first step,
except for the missing skips, and see the same batches. It appends a line of JSON for every network
and goes on where it was stopped; lesson 03 plots the lines.
"""

import datetime
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_utils import data, runtime
from ddpm_utils.config import TrainConfig, for_this_run
from ddpm_utils.diffusion import q_sample
from ddpm_utils.schedules import NoiseSchedule, make_schedule
from ddpm_utils.unet import UNet

from .measure import machine, real_sets
from .results import append, comparable_rows, place_and_command, results_parser, rows_to_report

NETWORKS = ("as built", "skips zeroed", "no attention")
SEEDS = (0, 1, 2)
STEPS, BATCH, HELD_OUT = 200, 32, 256  # training steps, images a step, images of the measurement
NOISE_STD = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


def zero_skips(net: nn.Module) -> nn.Module:
    """Make the way up of `net` read zeros in place of the skips; parameters and work stay."""

    def zeros(_module, inputs):
        skips = inputs[2]
        skips[:] = [torch.zeros_like(skip) for skip in skips]

    # the deepest level is the first to read the list
    net.ups[-1].register_forward_pre_hook(zeros)
    return net


def build(name: str, cfg: TrainConfig, seed: int) -> nn.Module:
    """The network called `name`, with the weights that `seed` gives to the network as built."""
    torch.manual_seed(seed)
    net = UNet(**cfg.network())
    if name == "no attention":
        weights = net.state_dict()
        net = UNet(**cfg.replace(attention_levels=()).network())
        net.load_state_dict({key: weights[key] for key in net.state_dict()})
    return zero_skips(net) if name == "skips zeroed" else net


def noisy_batch(images: Tensor, schedule: NoiseSchedule, n: int, rng: torch.Generator):
    """n noisy training images x_t, their timesteps t and the noise in them."""
    device = images.device
    picked = torch.randint(len(images), (n,), generator=rng, device=device)
    t = torch.randint(len(schedule), (n,), generator=rng, device=device)
    x0 = data.to_model_range(images[picked])
    eps = torch.randn(x0.shape, generator=rng, device=device)
    return q_sample(schedule, x0, t, eps), t, eps


def train(
    net: nn.Module,
    images: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    seed: int,
) -> nn.Module:
    """Train on batches that depend on `seed` alone; the rate rises, then falls to zero."""
    net = runtime.place(net, images.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    rise_and_fall = [min(1, (step + 1) / 50, 2 * (1 - step / steps)) for step in range(steps + 1)]
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall.__getitem__)
    rng = torch.Generator(images.device).manual_seed(seed)
    for _ in range(steps):
        x_t, t, eps = noisy_batch(images, schedule, BATCH, rng)
        loss = F.mse_loss(net(x_t, t), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net


@torch.no_grad()
def errors(net: nn.Module, images: Tensor, schedule: NoiseSchedule, seed: int) -> Tensor:
    """Mean squared error of the predicted noise, one value per noise level, the same noise for all
    networks of a seed.
    """
    noise_std = (1 - schedule.alpha_bars).sqrt()
    rng = torch.Generator(images.device).manual_seed(seed + 1)
    x0 = data.to_model_range(images)
    values = []
    for level in NOISE_STD:
        t = (noise_std - level).abs().argmin().expand(len(x0))
        eps = torch.randn(x0.shape, generator=rng, device=images.device)
        values.append(F.mse_loss(net(q_sample(schedule, x0, t, eps), t), eps))
    return torch.stack(values).cpu()


def run(out: Path, steps: int, seeds, device: torch.device, command: str) -> None:
    """All measurements that `out` lacks."""
    train_set, test_set = real_sets()
    held_out = test_set.first(runtime.shrink(HELD_OUT, 16)).to(device).images
    images = train_set.to(device).images
    same = {"steps": steps, "n": len(held_out), **machine(device, train_set.title)}
    done = {(row["network"], row["seed"]) for row in comparable_rows(out, same)}
    cfg = for_this_run(TrainConfig(schedule="linear", target="eps"))
    schedule = make_schedule(**cfg.noise()).to(device)
    todo = [(name, seed) for seed in seeds for name in NETWORKS if (name, seed) not in done]
    for name, seed in todo:
        began = time.perf_counter()
        net = train(build(name, cfg, seed), images, schedule, steps, seed)
        row = {"network": name, "seed": seed, **same}
        row |= {"noise_std": NOISE_STD, "error": errors(net, held_out, schedule, seed).tolist()}
        row |= {"seconds": time.perf_counter() - began}
        row |= {"date": datetime.date.today().isoformat(), "command": command}
        append(out, row)
        print(f"{name}, seed {seed}: mean error {statistics.fmean(row['error']):.4f}", flush=True)


def report(out: Path) -> str:
    """A table in Markdown: mean and range over the seeds.

    Raises FileNotFoundError if there are no results.
    """
    rows = rows_to_report(out, "unet_parts")
    heads = " | ".join(f"{level:g}" for level in rows[0]["noise_std"])
    lines = [f"| noise level | {heads} |", "|---" * (len(rows[0]["noise_std"]) + 1) + "|"]
    for name in NETWORKS:
        columns = zip(*(row["error"] for row in rows if row["network"] == name), strict=True)
        cells = [f"{statistics.fmean(v):.4f} [{min(v):.4f}, {max(v):.4f}]" for v in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = results_parser("unet_parts", __doc__)
    parser.add_argument("--steps", type=int, default=runtime.shrink(STEPS, 3))
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("unet_parts", arguments, args.out, f"unet_parts_{device.type}")
    if not args.report:
        run(out, args.steps, args.seeds, device, command)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
