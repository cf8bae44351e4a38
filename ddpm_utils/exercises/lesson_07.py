"""Checks for lesson 07: guidance."""

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_convention(guess) -> Verdict:
    """Check exercise 7.1: the scale of `Guided` that equals w = 0.3 in Ho and Salimans."""
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"a number is wanted, such as 4.0; got {guess!r}")
    if abs(guess - 1.3) < 1e-6:
        return right(
            "scale = 1 + w: their w counts how far to go beyond the answer with the label."
        )
    if abs(guess - 0.3) < 1e-6:
        return wrong(
            "with a scale of 0.3 the label would be mostly ignored: their w = 0 is already the "
            "answer with the label."
        )
    if abs(guess + 0.7) < 1e-6:
        return wrong("the other way round: scale = 1 + w, so w = scale − 1.")
    return wrong("not that: collect (1 + w)·named − w·free as free + scale·(named − free).")


def check_interval(answer) -> Verdict:
    """Check exercise 7.2: guidance for each image where low <= t < high.

    Elsewhere, the result is the answer with the label.
    """
    free, named = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, scale, low, high = torch.tensor([0, 100, 250, 400, 900]), 3.0, 100, 400
    got, problem = attempt(answer, free, named, t, scale, low, high)
    if problem:
        return problem
    if not isinstance(got, torch.Tensor) or got.shape != free.shape:
        return wrong(
            f"the answer has the shape of the two given ones, {tuple(free.shape)}; got "
            f"{tuple(getattr(got, 'shape', ()))}."
        )
    guided = free + scale * (named - free)

    def where(inside, outside=named):
        return torch.where(torch.tensor(inside).view(-1, 1, 1, 1), guided, outside)

    if torch.allclose(got, where([False, True, True, False, False])):
        return right(
            "inside the interval the guided answer, outside the network's own with the label."
        )
    if torch.allclose(got, where([False, True, True, False, False], free)):
        return wrong(
            "outside you forget the label: there the answer is `named` (scale 1), not `free` "
            "(scale 0)."
        )
    if torch.allclose(got, where([False, True, True, True, False])):
        return wrong("t = high is guided in yours: the interval is low <= t < high.")
    if torch.allclose(got, where([False, False, True, False, False])):
        return wrong("t = low is not guided in yours: the interval is low <= t < high.")
    if torch.allclose(got, where([True, False, False, True, True])):
        return wrong("inside and outside are exchanged.")
    if torch.allclose(got, guided):
        return wrong("you guide at every time.")
    return wrong(
        "not that: look at each image's own t, and choose between free + scale·(named − free) "
        "and named."
    )


def check_log_odds(answer) -> Verdict:
    """Check exercise 7.3: the log-odds ln p(+|x) − ln p(−|x).

    For N(−m, s²) and N(m, s²), equally likely, they are 2·m·x / s².
    """
    x, m, s2 = torch.tensor([-1.0, 0.2, 0.7], dtype=torch.float64), 0.4, 0.09
    got, problem = attempt(answer, x, m, s2)
    if problem:
        return problem
    got = float64(got)
    if got.shape != x.shape:
        return wrong(
            f"one value for each x is wanted, shape {tuple(x.shape)}; yours has {tuple(got.shape)}."
        )
    plus, minus = (torch.distributions.Normal(mean, s2**0.5).log_prob(x) for mean in (m, -m))

    def same(value):
        return torch.allclose(got, value, rtol=1e-6)

    if same(plus - minus):
        return right(
            "a straight line without end: there is always something to gain by going further."
        )
    if same(minus - plus):
        return wrong("the sign: where x is positive, the right-hand class is the likelier.")
    if same((plus - minus).sigmoid()):
        return wrong("that is p(+|x) itself; its log-odds are asked for, and they are simpler.")
    if same((plus - minus) / 2):
        return wrong("a factor of 2 is missing: (x + m)² − (x − m)² = 4·m·x, over 2·s².")
    if same((plus - minus) * s2**0.5):
        return wrong("divide by the variance s², not by the standard deviation.")
    return wrong(
        "not that: subtract the exponents, −(x − m)²/2s² + (x + m)²/2s²; the squares cancel."
    )
