"""Checks for lesson 06: sampling in few steps, and the path between two noises."""

import math

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_half_way(guess) -> Verdict:
    """Check exercise 6.1: the standard deviation halfway between two noises.

    The path is a straight line between two independent standard normal noises.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"a number is wanted, such as 0.9; got {guess!r}")
    if abs(guess - math.sqrt(0.5)) < 0.01:
        return right(
            "√½ = 0.707: each noise brings a quarter of its variance, and independent variances "
            "add."
        )
    slips = {
        1.0: "that would be so on the arc; on the line each noise enters with the factor ½, and "
        "its variance with ¼.",
        0.5: "that is the variance (or the standard deviation, were the two the same noise): take "
        "the root of ¼ + ¼.",
        0.25: "that is what one of the two brings, as a variance: add the other's, and take the "
        "root.",
        math.sqrt(2): "that is the sum of the two; half-way is half of it.",
        0.0: "they do not cancel: the noises are independent, not opposite.",
    }
    for slip, words in slips.items():
        if abs(guess - slip) < 0.01:
            return wrong(words)
    return wrong(
        "not that: add the variances that the two noises bring with the factor ½ each, then take "
        "the root."
    )


def check_leading(answer) -> Verdict:
    """Check exercise 6.2: the multiples of T // steps below T in descending order.

    answer(timesteps, steps) → a list of `steps` times.
    """
    cases = ((1000, 50), (1000, 20), (100, 7))
    for timesteps, steps in cases:
        got, problem = attempt(answer, timesteps, steps)
        if problem:
            return problem
        try:
            got = [int(t) for t in got]
        except (TypeError, ValueError):
            return wrong(f"a list of whole numbers is wanted; got {got!r}")
        step = timesteps // steps
        wanted = [i * step for i in reversed(range(steps))]
        where = f"T = {timesteps}, {steps} steps: "
        if got == wanted[::-1]:
            return wrong(
                where + "these are the right times, but rising: a sampler begins with the noisiest."
            )
        if len(got) != steps:
            return wrong(
                where
                + f"you list {len(got)} times; the multiples of {step} below T may be more than "
                "are asked for."
            )
        if got == [t - 1 for t in range(timesteps, 0, -step)][:steps]:
            return wrong(
                where
                + "you count down from T − 1. That is a better spacing (“trailing”), but another "
                "one."
            )
        if got != wanted:
            return wrong(
                where + f"your list begins {got[:3]} and ends {got[-2:]}; expected {wanted[:3]} … "
                f"{wanted[-2:]}."
            )
    return right(
        "and the first time is 980 of 999 for 50 steps: the network is told that pure noise still "
        "holds some image."
    )


def check_coefficients(answer) -> Verdict:
    """Check exercise 6.3: the coefficients of the DDIM step x_s = a·x_t + b·eps_hat.

    answer(alpha_bar_t, alpha_bar_s) → (a, b).
    """
    now = torch.tensor([0.02, 0.3, 0.6], dtype=torch.float64)
    then = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    got, problem = attempt(answer, now, then)
    if problem:
        return problem
    if not isinstance(got, tuple | list) or len(got) != 2:
        return wrong("two coefficients are wanted: return a, b, where x_s = a·x_t + b·ε.")
    a, b = (float64(value).expand_as(now) for value in got)
    true_a = (then / now).sqrt()
    true_b = (1 - then).sqrt() - true_a * (1 - now).sqrt()

    def same(value, target):
        return torch.allclose(value, target, rtol=1e-6)

    if same(a, true_a) and same(b, true_b):
        return right("b is negative: a step towards the image scales x_t up, and takes noise out.")
    if same(a, true_a) and same(b, -true_b):
        return wrong(
            "the sign of b: the step is written a·x_t + b·ε, with a plus, and noise is taken out."
        )
    if same(a, true_a) and same(b, (1 - then).sqrt()):
        return wrong(
            "b is the noise that x_s shall have. But a·x_t brings noise along as well: subtract "
            "a·√(1 − ᾱ_t)."
        )
    if same(a, then.sqrt()):
        return wrong(
            "a is √ᾱ_s, the weight of x̂₀. Put x̂₀ = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t in, and collect x_t."
        )
    if same(a, 1 / true_a):
        return wrong("a is upside down: the image grows on the way down, by √(ᾱ_s/ᾱ_t).")
    if same(a, true_a):
        return wrong(
            "a is right; b is not: √(1 − ᾱ_s) straight from (06.1), and a part that comes through "
            "x̂₀."
        )
    if same(b, true_b):
        return wrong("b is right; a is not: the weight of x_t comes through x̂₀ alone.")
    return wrong(
        "neither coefficient fits: put x̂₀ = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t into (06.1) with σ = 0."
    )
