"""Checks for lesson 05: the reverse step and the sampler."""

import math

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_last_noise(guess) -> Verdict:
    """Check exercise 5.1: the noise wrongly added at t = 0 with beta_0 = 1e-4.

    The guess is its standard deviation in gray levels of 0 … 255.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"a number is wanted, such as 12.0; got {guess!r}")
    truth, slack = math.sqrt(1e-4) * 127.5, 0.15
    if abs(guess / truth - 1) <= slack:
        return right(
            f"{truth:.3f} gray levels: √1e-4 = 0.01 in model range, and 1 of model range is 127.5 "
            "gray levels."
        )
    slips = {
        math.sqrt(
            1e-4
        ): "that is the standard deviation in model range: how many gray levels is 1 in model "
        "range?",
        1e-4: "that is the variance itself: take its root, then turn model range into gray levels.",
        1e-4
        * 127.5: "you turned the variance into gray levels: a variance is squared, so take its "
        "root first.",
        math.sqrt(1e-4)
        * 255: "[−1, 1] is two wide: 255 gray levels stand for 2, so 1 is worth 127.5 of them, "
        "not 255.",
    }
    for slip, words in slips.items():
        if abs(guess / slip - 1) <= slack:
            return wrong(words)
    return wrong(
        "not that: take the root of beta_0, then multiply by the gray levels in one unit of model "
        "range."
    )


def check_log_mix(answer) -> Verdict:
    """Check exercise 5.2: a mix of the two variances that is even in the logarithm.

    answer(beta, beta_tilde, share) → variances (2102.09672, Eq. 15).
    """
    beta = torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)
    beta_tilde = torch.tensor([0.015, 0.03, 0.001], dtype=torch.float64)
    got, problem = attempt(answer, beta, beta_tilde, 0.25)
    if problem:
        return problem
    got = float64(got)
    if got.shape != beta.shape:
        return wrong(
            f"the variances have shape {tuple(beta.shape)}, your answer has {tuple(got.shape)}: "
            "keep the shape."
        )

    def is_near(value):
        return torch.allclose(got, value, rtol=1e-5, atol=0.0)

    def mix(share):
        return torch.exp(share * beta.log() + (1 - share) * beta_tilde.log())

    if is_near(mix(0.25)):
        return right(
            "share 0 gives beta-tilde, share 1 gives beta, and equal shares between them are "
            "equal factors."
        )
    if is_near(0.25 * beta + 0.75 * beta_tilde):
        return wrong(
            "you mixed the variances themselves: where they differ by a factor of 900 the larger "
            "one wins at any share. Mix their logarithms, then take exp."
        )
    if is_near(mix(0.75)) or is_near(0.75 * beta + 0.25 * beta_tilde):
        return wrong(
            "the two ends are swapped: share = 1 must give beta and share = 0 must give beta-tilde."
        )
    if is_near(mix(0.25).log()):
        return wrong(
            "this is still the logarithm of the variance (and below zero): take exp at the end."
        )
    if is_near(mix(0.25).sqrt()):
        return wrong(
            "this is the standard deviation; the function should return a variance, without the "
            "root."
        )
    return wrong("not that: exp(share · log beta + (1 − share) · log beta_tilde) is asked for.")


def check_v_mean(answer) -> Verdict:
    """Check exercise 5.3: the posterior mean in terms of x_t and v.

    answer(beta_t, alpha_t, alpha_bar_t, alpha_bar_prev) → (a, b), with posterior
    mean = a·x_t − b·v.
    """
    beta = torch.tensor([0.004, 0.05, 0.3], dtype=torch.float64)
    before = torch.tensor([0.95, 0.5, 0.02], dtype=torch.float64)
    alpha = 1 - beta
    now = alpha * before
    got, problem = attempt(answer, beta, alpha, now, before)
    if problem:
        return problem
    if not isinstance(got, tuple | list) or len(got) != 2:
        return wrong("two coefficients are wanted: return a, b, where the mean is a·x_t − b·v.")
    a, b = (float64(value) for value in got)
    true_a, true_b = alpha.sqrt(), before.sqrt() * beta / (1 - now).sqrt()

    def same(value, target):
        return value.shape in (target.shape, torch.Size([])) and torch.allclose(
            value.expand_as(target), target, rtol=1e-6
        )

    if same(a, true_a) and same(b, true_b):
        return right("a = √alpha_t: predicting v = 0 shrinks x_t exactly as the forward step did.")
    if same(a, 1 / true_a):
        return wrong(
            "a = 1/√alpha_t belongs to the mean in ε (05.6). Put x̂₀ = √ᾱ·x_t − √(1−ᾱ)·v into "
            "(05.4) instead."
        )
    if same(a, true_a) and same(b, -true_b):
        return wrong(
            "the sign of b: the mean is written a·x_t − b·v, with the minus outside, so b is "
            "positive."
        )
    if same(a, true_a) and same(b, now.sqrt() * beta / (1 - now).sqrt()):
        return wrong(
            "b has alpha_bar of step t where (05.4) has that of t − 1: x̂₀ is multiplied by "
            "√ᾱ_{t−1}."
        )
    if same(a, true_a) and same(b, before.sqrt() * beta / (1 - now)):
        return wrong(
            "b lacks the factor √(1 − ᾱ_t) with which v enters x̂₀: one root of the denominator "
            "cancels."
        )
    if same(a, true_a):
        return wrong(
            "a is right; b is not: it is the weight of x̂₀ in (05.4) times the weight of v in x̂₀."
        )
    if same(b, true_b):
        return wrong(
            "b is right; a is not: it has two parts, one straight from (05.4) and one through "
            "x̂₀. Add both."
        )
    return wrong(
        "neither coefficient fits: put x̂₀ = √ᾱ_t·x_t − √(1−ᾱ_t)·v into (05.4) and collect x_t, "
        "then v."
    )
