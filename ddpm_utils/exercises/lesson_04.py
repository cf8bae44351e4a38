"""Checks for lesson 04: training."""

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_share_of_start(guess) -> Verdict:
    """Check the share of the random start in an average of the weights.

    With decay 0.9999, after ten passes of 937 batches, it is 0.9999 ** 9370.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"{guess!r} is not a number: give the share as a number between 0 and 1")
    share, guess = 0.9999 ** (10 * (60_000 // 64)), float(guess)
    if abs(guess - share) < 0.02:
        return right(
            f"{share:.2f}: after ten passes nearly two fifths of the average are still the random "
            "start"
        )
    if abs(guess - (1 - share)) < 0.02:
        return wrong(
            f"{guess:.2f} is the share of the trained weights: the start is what remains, d to "
            "the power of n"
        )
    if abs(guess - 0.9999**10) < 5e-4:
        return wrong(
            "that is ten updates: the average is updated at every step, and a pass has 60,000 // "
            "64 of them"
        )
    if abs(guess - 0.9999 ** (60_000 // 64)) < 0.01:
        return wrong("that is the share after a single pass: there are ten")
    if abs(guess - share * 100) < 2:
        return wrong("that is in percent: give a number between 0 and 1")
    if guess < 0.01:
        return wrong(
            f"{guess:.2g} forgets too fast: each step multiplies the start by 0.9999, and there "
            "are 9,370 steps"
        )
    return wrong(
        f"{guess:.2f} is not it: how many updates are there in ten passes, and by what is the "
        "start multiplied?"
    )


def check_v_from_eps(answer) -> Verdict:
    """Check answer(x_t, alpha_bar_t, eps), which is v.

    It is compared with the definition of v on random numbers.
    """
    rng = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, generator=rng, dtype=torch.float64)
    alpha_bar = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    cosine, sine = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t, v = cosine * x0 + sine * eps, cosine * eps - sine * x0
    value, problem = attempt(answer, x_t, alpha_bar, eps)
    if problem:
        return problem
    value = float64(value)
    if tuple(value.shape) != (64,):
        return wrong(
            f"the result has shape {tuple(value.shape)}, expected that of x_t, {tuple(x_t.shape)}"
        )

    def near(other):
        return torch.allclose(value, other, rtol=1e-5, atol=1e-6)

    if near(v):
        return right(
            "v = (eps − √(1 − ᾱ)·x_t) / √ᾱ agrees with its definition at every noise level"
        )
    if near(-v):
        return wrong("the sign is turned: with little noise v must be close to +eps")
    if near(eps - sine * x_t):
        return wrong(
            "the division by √ᾱ is missing: solve ε = √(1 − ᾱ)·x_t + √ᾱ·v for v to the end"
        )
    if near((eps - (1 - alpha_bar) * x_t) / alpha_bar) or near((eps - sine * x_t) / alpha_bar):
        return wrong("a square root is missing: the factors are √ᾱ and √(1 − ᾱ), not ᾱ and 1 − ᾱ")
    if near(cosine * eps - sine * x_t):
        return wrong(
            "that is the definition of v with x_t in the place of x0: the two are not the same "
            "image"
        )
    if near((x_t - sine * eps) / cosine):
        return wrong("that is x0: one more step, or solve ε = √(1 − ᾱ)·x_t + √ᾱ·v for v directly")
    worst = (value - v).abs().max().item()
    return wrong(
        f"off by up to {worst:.2g}: start from ε = √(1 − ᾱ)·x_t + √ᾱ·v, the second half of (04.8)"
    )


def check_loss_of_zero(answer) -> Verdict:
    """Check the expected v loss of a network that answers 0.

    answer(alpha_bar, power) → alpha_bar + (1 − alpha_bar)·power.
    """
    alpha_bar, power = torch.linspace(0.0, 1.0, 11, dtype=torch.float64), 0.6
    value, problem = attempt(answer, alpha_bar, power)
    if problem:
        return problem
    value = float64(value).expand(11)

    def near(other):
        return torch.allclose(value, other, rtol=1e-6, atol=1e-9)

    if near(alpha_bar + (1 - alpha_bar) * power):
        return right(
            "ᾱ + (1 − ᾱ)·power: pure noise at the clean end, the image itself at the noisy end"
        )
    if near(1 - alpha_bar + alpha_bar * power):
        return wrong("that is the mean square of x_t: in v noise and image have changed places")
    if near(alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * power):
        return wrong("squaring v squares its factors too: the roots go away")
    if near(alpha_bar - (1 - alpha_bar) * power):
        return wrong(
            "a minus sign survived: (a − b)² has + b², and only the middle term is negative, with "
            "mean 0"
        )
    if near(torch.ones(11, dtype=torch.float64)):
        return wrong(
            "1 is right for eps, whose variance is 1: v also contains the image, with mean "
            "square `power`"
        )
    if near(alpha_bar + (1 - alpha_bar) * power**2):
        return wrong("`power` is a mean square already: do not square it again")
    return wrong(
        "not it: write v² out, three terms, and take the mean of each, with E[eps] = 0 and "
        "E[eps²] = 1"
    )
