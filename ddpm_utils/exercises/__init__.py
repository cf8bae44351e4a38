"""Checks for the readers' answers, one module a lesson.

A check returns a Verdict: right, or what is wrong and why, in words.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """passed: True, False, or None where nothing has been answered yet.

    A cell that ends in one shows `words`.
    """

    passed: bool | None
    words: str

    def __repr__(self) -> str:
        return {True: "✓ ", False: "✗ ", None: "… "}[self.passed] + self.words


def right(words: str) -> Verdict:
    """The verdict on a right answer."""
    return Verdict(True, words)


def wrong(words: str) -> Verdict:
    """The verdict on a wrong answer: `words` say what is wrong and why."""
    return Verdict(False, words)


def unanswered(
    words: str = "not answered yet: put your answer in the place of None and run the cell again",
) -> Verdict:
    """The verdict where nothing has been answered yet."""
    return Verdict(None, words)


def is_number(guess) -> bool:
    """Whether a reader's guess is a finite number; True and False are none."""
    return not isinstance(guess, bool) and isinstance(guess, int | float) and math.isfinite(guess)


def float64(value) -> torch.Tensor:
    """A number, list or tensor as float64 on the CPU, since Apple's GPUs know no float64."""
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    return torch.as_tensor(value, dtype=torch.float64)


def attempt(answer, *arguments):
    """(result of the reader's function, None), or (None, a verdict) where there is none to judge:
    no answer yet, or an error.
    """
    if answer is None:
        return None, unanswered()
    try:
        result = answer(*arguments)
    except Exception as error:  # whatever a reader's function raises is news for the reader
        return None, wrong(f"your function stopped with {type(error).__name__}: {error}")
    return result, unanswered() if result is None else None
