"""Checks for the readers' answers, one module per lesson.

A check returns a Verdict, which says that the answer is right, or what is wrong and why.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    passed: True, False, or None if there is no answer yet; words: the text that a notebook shows if
    a cell ends in a Verdict.
    """

    passed: bool | None
    words: str

    def __repr__(self) -> str:
        return {True: "✓ ", False: "✗ ", None: "… "}[self.passed] + self.words


def right(words: str) -> Verdict:
    """Return the verdict on a right answer."""
    return Verdict(True, words)


def wrong(words: str) -> Verdict:
    """Return the verdict on a wrong answer; `words` say what is wrong and why."""
    return Verdict(False, words)


def unanswered(
    words: str = "not answered yet: put your answer in the place of None and run the cell again",
) -> Verdict:
    """Return the verdict if there is no answer yet."""
    return Verdict(None, words)


def is_number(guess) -> bool:
    """Return whether a reader's guess is a finite number; True and False are not numbers."""
    return not isinstance(guess, bool) and isinstance(guess, int | float) and math.isfinite(guess)


def float64(value) -> torch.Tensor:
    """Return a number, list or tensor as float64 on the CPU, because Apple's GPUs lack float64."""
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    return torch.as_tensor(value, dtype=torch.float64)


def attempt(answer, *arguments):
    """Call the reader's function and return (result, None), or (None, a verdict).

    The verdict is returned if there is no answer yet, or if the function raises an error.
    """
    if answer is None:
        return None, unanswered()
    try:
        result = answer(*arguments)
    except Exception as error:  # show the reader any error of the function
        return None, wrong(f"your function stopped with {type(error).__name__}: {error}")
    return result, unanswered() if result is None else None
