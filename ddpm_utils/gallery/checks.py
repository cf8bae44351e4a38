"""Checks of the inputs of the gallery's networks."""

import torch
from torch import Tensor


def check_input(
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    channels: int,
    divisor: int,
    timesteps: int | None = None,
) -> None:
    """Raise ValueError unless x_t, t and y are valid inputs of a network.

    x_t must be (B, channels, H, W), with H and W multiples of `divisor`; t must be (B,) whole
    numbers; y must be None. `timesteps` is the number of rows in the network's table of times; t is
    compared with it only on the CPU.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"x_t has shape {tuple(x.shape)}, expected (batch, {channels}, height, width)"
        )
    if x.shape[2] % divisor or x.shape[3] % divisor:
        sizes = sorted({max(1, s // divisor + up) * divisor for s in x.shape[2:] for up in (0, 1)})
        raise ValueError(
            f"height × width {x.shape[2]} × {x.shape[3]} must be multiples of {divisor}: try "
            f"{' or '.join(map(str, sizes))}"
        )
    check_times_and_labels(x, t, y, timesteps)


def check_times_and_labels(
    x: Tensor, t: Tensor, y: Tensor | None, timesteps: int | None = None
) -> None:
    """Raise ValueError unless t is (B,) whole numbers and y is None.

    If the network has a table of times, with `timesteps` rows, t must lie within it; this is
    checked only on the CPU.
    """
    if t.shape != x.shape[:1] or t.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"t has shape {tuple(t.shape)} and dtype {t.dtype}, expected ({len(x)},) whole "
            "numbers: one an image"
        )
    if (
        timesteps is not None
        and t.device.type == "cpu"
        and t.numel()
        and (t.min() < 0 or t.max() >= timesteps)
    ):
        raise ValueError(
            f"t holds {t.min().item()} … {t.max().item()}, but the table has rows 0 … "
            f"{timesteps - 1}"
        )
    if y is not None:
        raise ValueError("labels y were given, but this network knows none: leave them out")
