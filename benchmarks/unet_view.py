"""How far one output pixel of the U-Net sees, and which of its parts carry the view.

`python -m benchmarks.unet_view` measures the gradient of the middle output pixel with respect to
every input pixel of untrained networks, three seeds each, and the share of it that lies more than
ten pixels away. It separates two effects of the group normalizations: they rescale the branches,
and their mean and variance connect all positions. With "fixed statistics" the gradient does not
pass through mean and variance, so only the rescaling is left. It appends a line of JSON for every
network and goes on where it was stopped; lesson 03 prints the table.
"""

import datetime
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_utils import runtime
from ddpm_utils.config import TrainConfig, for_this_run
from ddpm_utils.unet import UNet

from .measure import machine
from .results import append, comparable_rows, place_and_command, results_parser, rows_to_report

SEEDS = (0, 1, 2)
SIZE, FAR, N = 28, 10, 32  # pixels a side, pixels that count as far, random inputs
NORMS = ("as built", "fixed statistics", "removed")


def variants(cfg: TrainConfig) -> dict[str, dict]:
    """The networks by name, as changes of `cfg`."""
    fine = {"widths": cfg.widths[:1], "attention_levels": ()}
    return {
        "fine level alone": fine,
        "fine level, as deep": fine | {"blocks": len(cfg.widths) * cfg.blocks},
        "all levels": {"attention_levels": ()},
        "all, with attention": {},
    }


class FixedStatistics(nn.Module):
    """The group normalization `norm`, whose mean and variance count as constants going back."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.norm.num_groups, -1))
        fixed = grouped.detach()
        mean = fixed.mean(dim=(2, 3, 4), keepdim=True)
        variance = fixed.var(dim=(2, 3, 4), keepdim=True, correction=0)
        normed = ((grouped - mean) / (variance + self.norm.eps).sqrt()).flatten(1, 2)
        return normed * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def change_norms(net: nn.Module, norms: str) -> nn.Module:
    """Replace every group normalization of `net` by what `norms` says."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm) and norms == "fixed statistics":
                setattr(module, name, FixedStatistics(child))
            elif isinstance(child, nn.GroupNorm) and norms == "removed":
                setattr(module, name, nn.Identity())
    return net


def build(cfg: TrainConfig, norms: str, seed: int) -> nn.Module:
    """A network from `seed` in which no convolution is zero."""
    torch.manual_seed(seed)
    net = UNet(**cfg.network())
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return change_norms(net, norms)


def view(net: nn.Module, timesteps: int, seed: int) -> Tensor:
    """Mean size of the gradient of the middle output pixel, (SIZE, SIZE), with sum 1."""
    device = next(net.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    n = runtime.shrink(N, 2)
    x = torch.randn(n, 1, SIZE, SIZE, generator=rng, device=device).requires_grad_()
    t = torch.randint(timesteps, (n,), generator=rng, device=device)
    net(x, t)[:, 0, SIZE // 2, SIZE // 2].sum().backward()
    seen = x.grad.abs().mean(dim=(0, 1)).cpu()
    return seen / seen.sum()


def far_away() -> Tensor:
    """True for the pixels more than FAR rows or columns from the middle, (SIZE, SIZE)."""
    away = (torch.arange(SIZE) - SIZE // 2).abs()
    return torch.maximum(away[:, None], away[None, :]) > FAR


def run(out: Path, seeds, device: torch.device, command: str) -> None:
    """All measurements that `out` lacks."""
    cfg = for_this_run(TrainConfig(schedule="linear", target="eps"))
    far = far_away()
    same = {
        "far": FAR,
        "n": runtime.shrink(N, 2),
        "uniform": far.float().mean().item(),
        **machine(device, "random inputs"),
    }
    done = {(row["network"], row["norms"], row["seed"]) for row in comparable_rows(out, same)}
    for network, changes in variants(cfg).items():
        for norms, seed in ((norms, seed) for norms in NORMS for seed in seeds):
            if (network, norms, seed) in done:
                continue
            net = build(cfg.replace(**changes), norms, seed).to(device)
            share = view(net, cfg.timesteps, seed)[far].sum().item()
            row = {"network": network, "norms": norms, "seed": seed, "share": share, **same}
            row |= {"date": datetime.date.today().isoformat(), "command": command}
            append(out, row)


def report(out: Path) -> str:
    """A table in Markdown: mean and range over the seeds.

    Raises FileNotFoundError if there are no results.
    """
    rows = rows_to_report(out, "unet_view")
    lines = [
        f"Share of the gradient from more than {rows[0]['far']} pixels away; a uniform view has "
        f"{rows[0]['uniform']:.1%}.",
        "",
        "| network | norms " + " | norms ".join(NORMS) + " |",
        "|---" + "|---:" * len(NORMS) + "|",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        cells = []
        for norms in NORMS:
            mine = [r["share"] for r in rows if (r["network"], r["norms"]) == (network, norms)]
            cells.append(f"{statistics.fmean(mine):.1%} [{min(mine):.1%}, {max(mine):.1%}]")
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = results_parser("unet_view", __doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    device = runtime.pick_device(args.device)
    out, command = place_and_command("unet_view", arguments, args.out, f"unet_view_{device.type}")
    if not args.report:
        run(out, args.seeds, device, command)
    print(report(out))


if __name__ == "__main__":
    main(sys.argv[1:])
