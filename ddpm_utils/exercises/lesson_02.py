"""Checks for lesson 02: time embeddings."""

import math

import torch

from ..embeddings import sinusoidal_embedding
from . import Verdict, attempt, is_number, right, unanswered, wrong


def check_frozen(guess, timesteps: int, dim: int) -> Verdict:
    """Check how many dimensions range over less than 0.1 in `timesteps` steps.

    A guess that is off by one is right.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"{guess!r} is not a number: give how many of the {dim} dimensions are frozen")
    frozen, sines = _frozen(timesteps, dim), _frozen(timesteps, dim, sines_only=True)
    if abs(guess - frozen) <= 1:
        return right(
            f"{frozen} of {dim} are frozen in {timesteps} steps: {sines} sines and "
            f"{frozen - sines} cosines"
        )
    if abs(guess - (dim - frozen)) <= 1:
        return wrong("that is how many move; the question is how many are frozen")
    if abs(guess - _frozen(5 * timesteps, dim)) <= 1:
        return wrong(
            f"that many were frozen in {5 * timesteps} steps; each hand now gets a fifth as far"
        )
    if abs(guess - sines) <= 1 or abs(guess - 2 * sines) <= 1:
        return wrong(
            "you counted cosines as sines: a cosine starts flat, and is frozen up to an angle of "
            "0.45, not 0.10"
        )
    if abs(guess - 2 * (frozen - sines)) <= 1:
        return wrong(
            "you counted sines as cosines: a sine is frozen only up to an angle of 0.10, not 0.45"
        )
    side = "many" if guess > frozen else "few"
    return wrong(
        f"too {side}: a hand is frozen when w · (T − 1) stays below 0.10 (its sine) or 0.45 (its "
        "cosine)"
    )


def _frozen(timesteps: int, dim: int, sines_only: bool = False) -> int:
    """Count the frozen dimensions on the embedding itself, without the lesson's formula."""
    emb = sinusoidal_embedding(torch.arange(timesteps), dim)
    still = emb.amax(dim=0) - emb.amin(dim=0) < 0.1
    return int(still[: dim // 2].sum() if sines_only else still.sum())


def check_table(answer) -> Verdict:
    """Check the interleaved sinusoidal table with the right speeds, answer(t, d)."""
    t, d = torch.tensor([0, 1, 7, 150, 999]), 20
    got, problem = attempt(answer, t, d)
    if problem:
        return problem
    if not isinstance(got, torch.Tensor) or got.shape != (len(t), d):
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        return wrong(f"expected a tensor of shape ({len(t)}, {d}), one row a timestep, got {shape}")
    got = got.detach().cpu().double()

    def is_near(sines, cosines):
        table = torch.stack(
            [(t[:, None] * sines).sin(), (t[:, None] * cosines).cos()], dim=2
        ).flatten(1)
        return torch.allclose(got, table, atol=5e-4, rtol=0)

    even = torch.arange(0, d, 2, dtype=torch.float64)
    w = 10_000.0 ** (-even / d)
    if is_near(w, w):
        return right(
            "columns 2i and 2i + 1 are the sine and the cosine of one hand, and the speeds fall "
            "as in (02.4)."
        )
    if is_near(w**2, w**2):
        return wrong(
            "the speeds still fall twice as fast: the exponent is −2i/d, and the column number is "
            "2i already"
        )
    if is_near(w**2, 10_000.0 ** (-2 * (even + 1) / d)) or is_near(
        w, 10_000.0 ** (-(even + 1) / d)
    ):
        return wrong(
            "sine and cosine have different speeds: both columns of a pair belong to the same "
            "hand i"
        )
    if is_near(w.sqrt(), w.sqrt()):
        return wrong(
            "the speeds fall half as fast as they should: the exponent is −2i/d, with i the "
            "number of the pair"
        )
    if torch.allclose(got, sinusoidal_embedding(t, d).double(), atol=5e-4, rtol=0):
        return wrong(
            "the values are right but stand in two halves: interleave them, sine, cosine, sine, "
            "cosine"
        )
    if torch.allclose(got.view(len(t), -1, 2).flip(2).flatten(1), _pairs(t, w), atol=5e-4, rtol=0):
        return wrong("sine and cosine have changed places: sines go to the even columns 0, 2, 4, …")
    if (got[0, 0::2] != 0).any() or (got[0, 1::2] != 1).any():
        return wrong("at t = 0 every even column must be sin 0 = 0 and every odd one cos 0 = 1")
    return wrong(
        "at t = 0 it is right, so the columns are in order, but the speeds are not 10000^(−2i/d)"
    )


def _pairs(t, w):
    """Return the sine and cosine of each speed side by side."""
    return torch.stack([(t[:, None] * w).sin(), (t[:, None] * w).cos()], dim=2).flatten(1)


def check_distance(answer) -> Verdict:
    """Check answer(k, d), the distance of two embeddings that are k steps apart."""
    ratios = []
    for k, d in ((3, 16), (40, 64), (500, 128)):
        got, problem = attempt(answer, k, d)
        if problem:
            return problem
        try:
            got = float(got)
        except (TypeError, ValueError):
            return wrong(f"a single number is wanted, got {type(got).__name__}")
        e = sinusoidal_embedding(torch.tensor([17, 17 + k]), d).double()
        ratios.append((got, (e[0] - e[1]).norm().item(), (e[0] @ e[1]).item(), d))

    def all_are(value):
        return all(
            math.isclose(got, value(true, dot, d), rel_tol=1e-3) for got, true, dot, d in ratios
        )

    if all_are(lambda true, dot, d: true):
        return right(
            "it needs neither t nor s: the two embeddings I built at t = 17 and 17 + k are exactly "
            "that far apart."
        )
    if all_are(lambda true, dot, d: true**2):
        return wrong("this is the squared distance of (02.7): take the root")
    if all_are(lambda true, dot, d: dot):
        return wrong("this is the dot product of (02.6); the distance is √(d − 2 · dot product)")
    if all_are(lambda true, dot, d: math.sqrt(max(d - dot, 0))):
        return wrong(
            "the factor 2 before the dot product is missing: ‖a − b‖² = ‖a‖² + ‖b‖² − 2 a·b"
        )
    if all_are(lambda true, dot, d: math.sqrt(max(2 * d - 2 * dot, 0))):
        return wrong("you took ‖e‖² = d for each of the two; there are d/2 hands, so ‖e‖² = d/2")
    if all_are(lambda true, dot, d: math.sqrt(max(d / 2 - dot, 0))):
        return wrong(
            "this is the distance divided by √2: ‖a‖² and ‖b‖² are d/2 each and add up to d"
        )
    got, true, _, d = ratios[0]
    return wrong(
        f"for k = 3 and d = {d} you say {got:.4f}; two embeddings 3 steps apart are {true:.4f} "
        "apart"
    )
