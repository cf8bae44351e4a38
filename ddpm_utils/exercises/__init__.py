"""Checks for the readers' answers, one module a lesson. A check returns a Verdict: right, or what is wrong and why, in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """passed: True, False, or None where nothing has been answered yet. A cell that ends in one shows `words`."""

    passed: bool | None
    words: str

    def __repr__(self) -> str:
        return {True: "✓ ", False: "✗ ", None: "… "}[self.passed] + self.words


def right(words: str) -> Verdict:
    return Verdict(True, words)


def wrong(words: str) -> Verdict:
    return Verdict(False, words)


def unanswered(words: str = "not answered yet: put your answer in the place of None and run the cell again") -> Verdict:
    return Verdict(None, words)
