"""How much does it matter how a network is given the timestep?

`python -m benchmarks.embeddings` trains the small network of lesson 02 with eight embeddings of t,
three seeds each, and measures its loss on held-out images. Within a seed, all eight start from the
same weights and see the same images, steps and noise. It appends a line of JSON for every network
and goes on where it was stopped.

The definitions from `one_for_all` to `PlayNet` are those of lesson 02 (a test compares them).
"""

import datetime
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_utils import data, runtime
from ddpm_utils.diffusion import q_sample
from ddpm_utils.embeddings import TimeEmbedding, sinusoidal_embedding
from ddpm_utils.schedules import make_schedule

from .measure import machine, real_sets
from .results import append, comparable_rows, place_and_command, results_parser, rows_to_report

SEEDS = (0, 1, 2)
# the settings of the lesson
T, DIM, WIDTH, BATCH, LR = 1000, 128, 24, 64, 2e-3
N_BINS = 10
SHIFTS = (0, 10, 100, 250)  # steps by which the network is told too late a timestep


def one_for_all(t: Tensor, dim: int) -> Tensor:
    """No information: the embedding of t = 0, whatever t is."""
    return sinusoidal_embedding(torch.zeros_like(t), dim)


def raw_t(t: Tensor, dim: int) -> Tensor:
    """The number t itself, copied into every dimension."""
    return t.float()[:, None].expand(-1, dim)


def fraction(t: Tensor, dim: int) -> Tensor:
    """The number t / T, copied into every dimension."""
    return raw_t(t, dim) / T


def sinusoid_of_fraction(t: Tensor, dim: int) -> Tensor:
    """The sinusoid, but of t / T: the speeds were meant for whole steps."""
    return sinusoidal_embedding(t / T, dim)


def interleave(sines_and_cosines: Tensor) -> Tensor:
    """Sines in the even columns and cosines in the odd ones."""
    return torch.stack(sines_and_cosines.chunk(2, dim=1), dim=2).flatten(1)


def twice_the_decay(t: Tensor, dim: int) -> Tensor:
    """The exponent counts columns, where it should count pairs of columns."""
    columns = torch.arange(0, dim, 2, device=t.device)
    angles = t[:, None] * 10_000.0 ** (-2 * columns / dim)
    return interleave(torch.cat([angles.sin(), angles.cos()], dim=1))


def half_as_wide(t: Tensor, dim: int) -> Tensor:
    """A complete sinusoid in half of the columns; the others are 0."""
    kept = dim // 4 * 2
    return F.pad(sinusoidal_embedding(t, kept), (0, dim - kept))


def fast_hands_only(t: Tensor, dim: int) -> Tensor:
    """The first columns of an interleaved table of width 4 · dim, as many as above."""
    kept = dim // 4 * 2
    return F.pad(interleave(sinusoidal_embedding(t, 4 * dim))[:, :kept], (0, dim - kept))


class PlayNet(nn.Module):
    """Three residual convolutions, each scaled and shifted by an embedding of t.

    `embed(t, dim)` returns that embedding, of shape (B, dim).
    """

    def __init__(self, width: int, dim: int, embed):
        super().__init__()
        self.dim, self.embed = dim, embed
        self.mlp = TimeEmbedding(dim).mlp
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.scales = nn.ModuleList(nn.Linear(dim, 2 * width) for _ in range(3))
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def features(self, x_t: Tensor, t: Tensor) -> Tensor:
        emb = F.silu(self.mlp(self.embed(t, self.dim)))
        h = self.enter(x_t)
        for conv, linear in zip(self.convs, self.scales, strict=True):
            scale, shift = linear(emb)[:, :, None, None].chunk(2, dim=1)
            h = h + conv(F.silu(h * (1 + scale) + shift))
        return F.silu(h)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.features(x_t, t))


# in the order of the table
EMBEDDINGS = {
    "sinusoid of t": sinusoidal_embedding,
    "t / T": fraction,
    "twice the decay": twice_the_decay,
    "sinusoid of t / T": sinusoid_of_fraction,
    "half as wide": half_as_wide,
    "fast hands only": fast_hands_only,
    "no t": one_for_all,
    "raw t": raw_t,
}


def small(images: data.ImageSet, device: torch.device) -> Tensor:
    """The images in model range, each block of 2×2 pixels averaged."""
    return F.avg_pool2d(data.to_model_range(images.images), 2).to(device)


def train(
    embed,
    images: Tensor,
    schedule,
    steps: int,
    seed: int,
) -> nn.Module:
    """A network trained for `steps` steps; weights and batches depend on the seed alone."""
    device = images.device
    torch.manual_seed(seed)
    net = PlayNet(WIDTH, DIM, embed).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    for _ in range(steps):
        # draw images, steps and noise
        which = torch.randint(len(images), (BATCH,), generator=generator, device=device)
        t = torch.randint(T, (BATCH,), generator=generator, device=device)
        eps = torch.randn((BATCH, *images.shape[1:]), generator=generator, device=device)
        # take a step of Adam
        loss = F.mse_loss(net(q_sample(schedule, images[which], t, eps), t), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def held_out_errors(net: nn.Module, images: Tensor, schedule, seed: int, late: int = 0) -> Tensor:
    """Squared error on each image, with steps spread evenly; the network is told t + late."""
    t = torch.arange(len(images), device=images.device) * T // len(images)
    generator = torch.Generator(images.device).manual_seed(seed + 1)
    eps = torch.randn(images.shape, generator=generator, device=images.device)
    answer = net(q_sample(schedule, images, t, eps), (t + late).clamp(max=T - 1))
    return (answer - eps).square().flatten(1).mean(dim=1).cpu()


def run(
    out: Path,
    steps: int,
    seeds,
    device: torch.device,
    command: str,
) -> None:
    """All networks that `out` lacks."""
    train_set, test_set = real_sets()
    same = {"steps": steps, **machine(device, train_set.title)}
    done = {(row["embedding"], row["seed"]) for row in comparable_rows(out, same)}
    images = small(train_set, device)
    held_out = small(test_set.first(runtime.shrink(2000, 200)), device)
    schedule = make_schedule("linear", T).to(device)
    for seed in seeds:
        for name, embed in EMBEDDINGS.items():
            if (name, seed) in done:
                continue
            began = time.perf_counter()
            net = train(embed, images, schedule, steps, seed)
            seconds = time.perf_counter() - began
            errors = {late: held_out_errors(net, held_out, schedule, seed, late) for late in SHIFTS}
            row = {
                "embedding": name,
                "seed": seed,
                "loss": errors[0].mean().item(),
                "bins": [part.mean().item() for part in errors[0].chunk(N_BINS)],
                "late": {late: each.mean().item() for late, each in errors.items()},
                "n": len(held_out),
                **same,
                "seconds": seconds,
                "date": datetime.date.today().isoformat(),
                "command": command,
            }
            append(out, row)
            print(f"{name}, seed {seed}: loss {row['loss']:.4f}", flush=True)


def report(out: Path) -> str:
    """A table in Markdown. Raises FileNotFoundError if there are no results."""
    rows = rows_to_report(out, "embeddings")
    best = {row["seed"]: row["loss"] for row in rows if row["embedding"] == "sinusoid of t"}
    lines = ["| embedding | seeds | loss | against the sinusoid of t |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(row["embedding"] for row in rows):
        mine = [row for row in rows if row["embedding"] == name]
        loss = [row["loss"] for row in mine]
        more = [row["loss"] / best.get(row["seed"], math.nan) - 1 for row in mine]
        lines.append(
            f"| {name} | {len(mine)} | {statistics.fmean(loss):.4f} ({min(loss):.4f} … "
            f"{max(loss):.4f}) | {statistics.fmean(more):+.0%} ({min(more):+.0%} … "
            f"{max(more):+.0%}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = results_parser("embeddings", __doc__)
    parser.add_argument("--steps", type=int, default=runtime.shrink(400, 5), help="training steps")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("embeddings", arguments, args.out, f"embeddings_{device.type}")
    if not args.report:
        run(out, args.steps, args.seeds, device, command)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
