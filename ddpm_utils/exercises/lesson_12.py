"""Checks for lesson 12: periods, receptive fields and attention.

The exercises are about the periods in a truncated table, how many pixels a stack of convolutions
sees, and the operations of attention.
"""

import math

from . import Verdict, attempt, is_number, right, wrong


def check_period(answer) -> Verdict:
    """Check exercise 12.1: the longest period, in steps, in a truncated table.

    answer(columns) → the period among the first columns of a table of 512.
    """
    for columns in (64, 128, 256, 512):
        given, failed = attempt(answer, columns)
        if failed:
            return failed
        if not is_number(given):
            return wrong(
                f"a number of steps is wanted, such as 12.5; your function returned {given!r}"
            )
        true = 2 * math.pi * 10_000 ** (2 * (columns // 2 - 1) / 512)
        if abs(given - true) > 0.005 * true:
            return wrong(
                f"for {columns} columns you say {given:,.1f} steps: "
                f"{_period_slip(given, true, columns)}"
            )
    return right(
        "19 steps for 64 columns, 61 for 128, 606 for 256: only the widest layers know a period "
        "longer than T."
    )


def _period_slip(given: float, true: float, columns: int) -> str:
    slips = {
        2
        * math.pi
        * 10_000
        ** (
            2 * (columns / 2) / 512
        ): "that pair is one too far: C columns hold the pairs i = 0 … C/2 − 1.",
        2
        * math.pi
        * 10_000
        ** (
            2 * (columns - 1) / 512
        ): "sine and cosine share a frequency: C columns hold C/2 of them.",
        2
        * math.pi
        * 10_000
        ** (2 * columns / 512): "sine and cosine share a frequency: C columns hold C/2 of them.",
        true / (2 * math.pi): "that is 1/w; a full turn is 2π of it.",
        2 * math.pi / true: "that is the frequency w; a period is 2π divided by it.",
        2
        * math.pi
        * 10_000
        ** (
            2 * (columns // 2 - 1) / columns
        ): "the table has 512 columns: they were cut, not made anew.",
    }
    near = (words for value, words in slips.items() if abs(given - value) <= 0.01 * abs(value))
    return next(
        near, "the slowest column has the lowest frequency w, and returns after 2π/w steps."
    )


def check_reach(answer) -> Verdict:
    """Check exercise 12.2: how many pixels per side one output sees.

    answer(layers) → the number of pixels, for layers of (kernel, stride).
    """
    stacks = (
        [(3, 1)],
        [(3, 1)] * 4,
        [(3, 1), (3, 2), (3, 1)],
        [(3, 1), (4, 2), (3, 1), (4, 2), (2, 1), (3, 1)],
    )
    for layers in stacks:
        given, failed = attempt(answer, list(layers))
        if failed:
            return failed
        if not is_number(given):
            return wrong(f"a number of pixels is wanted; your function returned {given!r}")
        true = _reach(layers)
        if given != true:
            return wrong(
                f"for (kernel, stride) = {layers} you say {given:g}: "
                f"{_reach_slip(given, layers, true)}"
            )
    return right("a layer adds kernel − 1 steps, each as long as all strides before it together.")


def _reach(layers) -> int:
    pixels, step = 1, 1
    for kernel, stride in layers:
        pixels += (kernel - 1) * step
        step *= stride
    return pixels


def _reach_slip(given: float, layers, true: int) -> str:
    early, step = 1, 1
    for kernel, stride in layers:
        step *= stride
        early += (kernel - 1) * step
    if given == true - 1:
        return "one short: a stack of no layers sees one pixel, so begin with 1."
    if given == (true - 1) / 2:
        return "that is how far it sees to one side; the question is about the whole side."
    if given == 1 + sum(kernel - 1 for kernel, _ in layers):
        return (
            "after a stride neighbors are further apart: a later layer's kernel counts in "
            "longer steps."
        )
    if given == early:
        return "a layer's own stride lengthens the steps of those after it, and not its own."
    if given == 1 + sum((kernel - 1) * stride for kernel, stride in layers):
        return "the strides of all layers before it multiply; you used the layer's own alone."
    return (
        f"it is {true}: go through the layers and keep two numbers, the pixels seen and the "
        "length of a step."
    )


def check_attention(answer) -> Verdict:
    """Check exercise 12.3: the multiply-adds of a self-attention with its four projections.

    answer(side, channels) → the number of multiply-adds.
    """
    for side, channels in ((4, 24), (7, 64), (48, 64)):
        given, failed = attempt(answer, side, channels)
        if failed:
            return failed
        if not is_number(given):
            return wrong(f"a number is wanted; your function returned {given!r}")
        n = side**2
        tables, projections = 2 * n**2 * channels, 4 * n * channels**2
        if given == tables + projections:
            continue
        case = f"for {side}×{side} positions and {channels} channels you say {given:,.0f}"
        slips = {
            tables: "the projections are missing: q, k, v and the answer are each a C×C product "
            "at every position.",
            projections: "the table is missing: N×N fits, and N×N shares times the values.",
            tables // 2
            + projections: "only one product with the table: there are the fits, and the shares "
            "times the values.",
            tables
            + 3
            * n
            * channels**2: "the projection of the answer is missing; q, k and v are three of four.",
            tables
            + n * channels**2: "q, k, v and the answer have a projection each: four of them.",
            2
            * (
                tables + projections
            ): "you count a multiplication and an addition as two; here they are one.",
            2 * side**2 * channels
            + 4 * side * channels**2: "N is the number of positions, side times side.",
        }
        words = slips.get(
            given,
            "each of N² fits is a product over C channels in all heads together, and so is the "
            "way back.",
        )
        return wrong(f"{case}: {words}")
    return right(
        "2·N²·C for the table and 4·N·C² for the projections: beyond N = 2C the table costs more."
    )
