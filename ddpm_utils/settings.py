"""Checks of the values in a lesson's config cell, called in that cell.

Each check raises ValueError on a bad value. The message names the setting and its value, says what
was expected, and gives a value to try.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real


def one_of(name: str, value, options: Iterable) -> None:
    """Raise ValueError unless `value` is one of `options`, of the same type (1 is not True)."""
    options = tuple(options)
    if not any(type(option) is type(value) and option == value for option in options):
        choices = ", ".join(map(repr, options))
        raise ValueError(f"{name}={value!r} is not known: choose one of {choices}")


def within(
    name: str,
    value,
    low: Real,
    high: Real,
    multiple_of: int = 1,
    or_none: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number in `low` … `high`.

    If `low` is a whole number, `value` must be a whole number and a multiple of `multiple_of`. With
    `or_none`, it may be None. Text, bools and NaN do not count as numbers.
    """
    if or_none and value is None:
        return
    whole = isinstance(low, Integral)
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if is_number and low <= value <= high and not (whole and value % multiple_of):  # NaN fails this
        return
    kind = (
        f"a multiple of {multiple_of}"
        if multiple_of > 1
        else "a whole number"
        if whole
        else "a number"
    )
    none = " or None" if or_none else ""
    nearest = _nearest(value, low, high, multiple_of) if whole else [_clamp(value, low, high)]
    advice = " or ".join(map(str, nearest))
    raise ValueError(f"{name}={value!r} must be {kind} in {low} … {high}{none}: try {advice}")


def widths(
    name: str,
    value,
    least: int,
    most: int,
    or_none: bool = False,
) -> None:
    """Raise ValueError unless `value` is a tuple of `least` … `most` whole numbers.

    Each must be a positive multiple of 4. With `or_none`, `value` may be None.
    """
    if or_none and value is None:
        return
    good = isinstance(value, tuple | list) and least <= len(value) <= most
    if not good or any(type(width) is not int or width < 4 or width % 4 for width in value):
        levels = f"{least}" if least == most else f"{least} to {most}"
        none = " or None" if or_none else ""
        raise ValueError(
            f"{name}={value!r} must be {levels} widths, each a multiple of 4{none}: try "
            f"{(48, 64, 96, 128)[:least]}"
        )


def _clamp(value, low: Real, high: Real) -> Real:
    """Return the number in `low` … `high` nearest to `value`, or `low` if `value` is no number."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    return min(max(value, low), high) if is_number else low


def _nearest(value, low: int, high: int, multiple_of: int) -> list[int]:
    """Return the multiples in `low` … `high` next to `value`, on both sides where both exist."""
    steps = _clamp(value, low, high) / multiple_of
    lowest, highest = -(-low // multiple_of), high // multiple_of
    return sorted(
        {_clamp(round_(steps), lowest, highest) * multiple_of for round_ in (math.floor, math.ceil)}
    )
