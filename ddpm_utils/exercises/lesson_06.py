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
        return wrong(f"expected a number, such as 0.9; got {guess!r}")
    if abs(guess - math.sqrt(0.5)) < 0.01:
        return right(
            "√½ = 0.707: each noise contributes a quarter of its variance, and independent "
            "variances add."
        )
    slips = {
        1.0: "that is the value on the arc; on the line each noise has the factor ½, and its "
        "variance the factor ¼.",
        0.5: "that is the variance, ¼ + ¼; take its square root.",
        0.25: "that is the variance of one of the two; add that of the other, and take the "
        "square root.",
        math.sqrt(2): "that is the standard deviation of the sum; halfway is half of the sum.",
        0.0: "they do not cancel: the noises are independent, not opposite.",
    }
    for slip, words in slips.items():
        if abs(guess - slip) < 0.01:
            return wrong(words)
    return wrong("not quite: add the variances of ½ times each noise, then take the square root.")


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
            return wrong(f"expected a list of whole numbers; got {got!r}")
        step = timesteps // steps
        wanted = [i * step for i in reversed(range(steps))]
        where = f"T = {timesteps}, {steps} steps: "
        if got == wanted[::-1]:
            return wrong(
                where + "these are the right times, but rising; a sampler starts with the noisiest."
            )
        if len(got) != steps:
            return wrong(
                where
                + f"you list {len(got)} times; there may be more multiples of {step} below T than "
                "steps."
            )
        if got == [t - 1 for t in range(timesteps, 0, -step)][:steps]:
            return wrong(
                where
                + "you count down from T − 1. That is a better spacing (“trailing”), but not this "
                "one."
            )
        if got != wanted:
            return wrong(
                where + f"your list begins {got[:3]} and ends {got[-2:]}; expected {wanted[:3]} … "
                f"{wanted[-2:]}."
            )
    return right(
        "the first time is 980 for 50 steps, not 999: the network is told that pure noise still "
        "contains some image."
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
        return wrong("expected two coefficients: return a, b, where x_s = a·x_t + b·ε.")
    a, b = (float64(value).expand_as(now) for value in got)
    true_a = (then / now).sqrt()
    true_b = (1 - then).sqrt() - true_a * (1 - now).sqrt()

    def same(value, target):
        return torch.allclose(value, target, rtol=1e-6)

    if same(a, true_a) and same(b, true_b):
        return right("b is negative: a step toward the image scales x_t up and removes noise.")
    if same(a, true_a) and same(b, -true_b):
        return wrong(
            "the sign of b: the step is written a·x_t + b·ε with a plus, and it removes noise."
        )
    if same(a, true_a) and same(b, (1 - then).sqrt()):
        return wrong(
            "this b is the noise that x_s should have, but a·x_t contains noise as well: subtract "
            "a·√(1 − ᾱ_t)."
        )
    if same(a, then.sqrt()):
        return wrong(
            "this a is √ᾱ_s, the weight of x̂₀. Insert x̂₀ = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t and collect x_t."
        )
    if same(a, 1 / true_a):
        return wrong("a is upside down: the step scales the image up, by √(ᾱ_s/ᾱ_t).")
    if same(a, true_a):
        return wrong(
            "a is right; b is not: it is √(1 − ᾱ_s) from (06.1) and a second part that comes "
            "from x̂₀."
        )
    if same(b, true_b):
        return wrong("b is right; a is not: the weight of x_t comes from x̂₀ alone.")
    return wrong(
        "neither coefficient is right: put x̂₀ = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t into (06.1) with σ = 0."
    )
