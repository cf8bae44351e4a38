"""Checks for lesson 03: parameters, padding and normalization.

The exercises are about the parameters of a block, padding to a size that is divisible, and the part
of a shift that survives a normalization.
"""

import torch

from ..unet import ResBlock
from . import Verdict, attempt, right, wrong


def check_parameters(answer) -> Verdict:
    """Check answer(c_in, c_out, time_dim), the number of parameters of a ResBlock."""
    for c_in, c_out, time_dim in ((64, 32, 128), (32, 32, 128), (16, 48, 20)):
        given, failed = attempt(answer, c_in, c_out, time_dim)
        if failed:
            return failed
        true = sum(p.numel() for p in ResBlock(c_in, c_out, time_dim).parameters())
        if given != true:
            case = f"for ResBlock({c_in}, {c_out}, {time_dim}) you say {given:,}"
            return wrong(f"{case}: {_parameter_slip(given - true, c_in, c_out, time_dim)}")
    return right("every parameter is accounted for, with and without the 1 × 1 shortcut")


def _parameter_slip(off: int, c_in: int, c_out: int, time_dim: int) -> str:
    shortcut = c_in * c_out + c_out
    slips = {
        -2
        * (
            c_in + c_out
        ): "the two normalizations are missing; each has a weight and a bias for every channel",
        -4 * c_out: "the biases of the convolutions and of the time layer are missing",
        -5 * c_out: "the biases are missing, that of the shortcut too",
        -(time_dim + 1)
        * c_out: "the time layer makes a scale and a shift, so it has 2·c_out outputs",
        -shortcut: "the 1 × 1 shortcut is missing; it is there whenever c_in differs from c_out",
        9
        * c_out
        * (c_in - c_out): "the second convolution goes from c_out to c_out channels, not from c_in",
    }
    if c_in == c_out:
        slips = {
            shortcut: "where c_in equals c_out the shortcut is the identity and owns nothing"
        } | slips
    return slips.get(
        off,
        f"that is {abs(off):,} too {'many' if off > 0 else 'few'}; count norm, conv and time one "
        "by one",
    )


def check_padding(answer) -> Verdict:
    """Check answer(x, divisor), which is x with black pixels around it.

    Its sides are the next multiples of divisor.
    """
    for height, width, divisor in ((30, 30, 4), (28, 28, 4), (29, 33, 8)):
        x = torch.linspace(-0.9, 0.9, 2 * height * width).view(2, 1, height, width)
        given, failed = attempt(answer, x, divisor)
        if failed:
            return failed
        if not isinstance(given, torch.Tensor) or given.ndim != 4:
            return wrong(
                "your function should return a batch of images, a tensor with four sides as x has"
            )
        case = f"{height} × {width} with divisor {divisor}"
        expected = tuple(-(-side // divisor) * divisor for side in (height, width))
        if tuple(given.shape[:2]) != (2, 1):
            return wrong(
                f"{case}: batch and channels changed to {tuple(given.shape[:2])}; pad the last "
                "two sides only"
            )
        if tuple(given.shape[2:]) != expected:
            if height % divisor == 0:
                return wrong(
                    f"{case} fits already, yet it came back as {tuple(given.shape[2:])}: divisor "
                    "− side % divisor is a whole divisor there; take −side % divisor"
                )
            return wrong(
                f"{case} came back as {tuple(given.shape[2:])}, expected {expected}, the next "
                "multiples"
            )
        top, left = (expected[0] - height) // 2, (expected[1] - width) // 2
        places = [
            (a, b)
            for a in {top, expected[0] - height - top}
            for b in {left, expected[1] - width - left}
        ]
        inside = [given[:, :, a : a + height, b : b + width] for a, b in places]
        if not any(torch.equal(part, x) for part in inside):
            if torch.equal(given[:, :, :height, :width], x):
                return wrong(
                    f"{case}: everything went to the right and below; share it between both sides"
                )
            return wrong(
                f"{case}: the image is not found in the middle of the result: pad, do not resize"
            )
        border = given.sum() - x.sum()
        pixels = given.numel() - x.numel()
        if pixels and (border / pixels + 1).abs() > 1e-4:
            gray = (border / pixels).item()
            hint = " In model range 0 is a middle gray" if abs(gray) < 1e-4 else ""
            return wrong(
                f"{case}: the border has the mean value {gray:.2f}, but black is −1.{hint}"
            )
    return right("the next size that divides, black around, the image untouched in the middle")


def check_survivors(answer) -> Verdict:
    """Check answer(channels, groups), the share of a shift that survives a GroupNorm after it.

    It is a share of the variance of the shift.
    """
    for channels, groups in ((32, 8), (64, 8), (32, 32), (32, 1)):
        given, failed = attempt(answer, channels, groups)
        if failed:
            return failed
        if not isinstance(given, int | float):
            return wrong(
                f"your function returned {given!r}, but a share is a number between 0 and 1"
            )
        true = 1 - groups / channels
        if abs(given - true) > 1e-6:
            case = f"for {channels} channels in {groups} groups you say {given:.4g}"
            if abs(given - groups / channels) < 1e-6:
                return wrong(
                    f"{case}: that is the share which is lost, the part along the means of the "
                    "groups"
                )
            if abs(given - (1 - 1 / groups)) < 1e-6:
                return wrong(
                    f"{case}: 1/groups would be the loss if a group held `groups` channels; how "
                    "many does it hold?"
                )
            if abs(given - (1 - groups / channels) ** 0.5) < 1e-6:
                return wrong(
                    f"{case}: that is a ratio of standard deviations; the question is about "
                    "variances"
                )
            return wrong(
                f"{case}: test yourself at groups = channels, where each channel is its own mean "
                "and nothing is left"
            )
    return right(
        "one direction a group is lost, out of channels / groups: nothing survives where each "
        "channel is a group"
    )
