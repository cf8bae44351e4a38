"""Checks for lesson 09: the best possible denoiser."""

import math

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_lead(guess) -> Verdict:
    """Check exercise 9.1: the mean of ln s₁ − ln s₂ for two images.

    Their squared distance |x₁ − x₂|² is 100, and the signal-to-noise ratio is 0.1.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"a number is wanted, such as 2.5; got {guess!r}")
    if abs(guess - 5) < 0.1:
        return right(
            "5 nats, half the signal-to-noise ratio times d²: odds of 150 to 1, under ten times "
            "as much noise."
        )
    slips = {
        10.0: "that is the ratio times d²: the exponent of a Gaussian has a 2 below.",
        0.5: "you took d = 10 without its square.",
        50.0: "that leaves the signal-to-noise ratio out.",
        math.exp(5): "these are the odds; their logarithm is asked for.",
        0.0: "the cross term is 0 on average, but the square of the difference is not.",
        -5.0: "the sign: x₁ is the right one, so it is ahead.",
    }
    for slip, words in slips.items():
        if abs(guess - slip) < max(0.02 * abs(slip), 0.05):
            return wrong(words)
    return wrong(
        "not that: put x_t = √ᾱ·x₁ + √(1−ᾱ)·ε into both exponents of (09.6), subtract, and take "
        "the mean over ε."
    )


def check_score(answer) -> Verdict:
    """Check exercise 9.2: the gradient of ln q(x_t) (Tweedie's formula).

    answer(x_t, x0_hat, alpha_bar_t) → the gradient.
    """
    x_t = torch.tensor([0.7, -0.2, 1.5], dtype=torch.float64, requires_grad=True)
    a, mean, value = torch.tensor(0.6, dtype=torch.float64), 0.3, 0.2
    density = torch.distributions.Normal(a.sqrt() * mean, (a * value + 1 - a).sqrt())
    (truth,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    x_t = x_t.detach()
    x0_hat = mean + a.sqrt() * value / (a * value + 1 - a) * (x_t - a.sqrt() * mean)
    got, problem = attempt(answer, x_t, x0_hat, a)
    if problem:
        return problem
    got = float64(got)
    if got.shape != truth.shape:
        return wrong(
            f"the score has the shape of x_t, {tuple(truth.shape)}; yours has {tuple(got.shape)}."
        )

    def is_near(value):
        return torch.allclose(got, value, rtol=1e-6)

    if is_near(truth):
        return right(
            "it agrees with the derivative that autograd takes of the density of a noisy Gaussian."
        )
    if is_near(-truth):
        return wrong("the sign: the score points to where data are denser, from x_t towards √ᾱ·x̂₀.")
    if is_near(truth * (1 - a).sqrt()):
        return wrong(
            "you divided by √(1 − ᾱ), which gives −ε̂: the exponent of (09.2) brings 1 − ᾱ itself."
        )
    if is_near((x0_hat - x_t) / (1 - a)):
        return wrong("the guess must be scaled: the noise lies around √ᾱ·x₀, not around x₀.")
    if is_near(truth * (1 - a)):
        return wrong("this is the direction; its length lacks the factor 1/(1 − ᾱ).")
    return wrong(
        "not that: the derivative of the exponent in (09.2) is (√ᾱ·x₀ − x_t)/(1 − ᾱ); take its "
        "mean over x₀."
    )


def check_factor(answer) -> Verdict:
    """Check exercise 9.3: the factor by which a noiseless DDIM step multiplies x_t for N(0, value).

    answer(alpha_bar_t, alpha_bar_s, value) → the factor.
    """
    now, then = (torch.tensor(v, dtype=torch.float64) for v in ([0.02, 0.3, 0.6], [0.1, 0.5, 0.99]))
    value = 0.25
    got, problem = attempt(answer, now, then, value)
    if problem:
        return problem
    got = float64(got).expand_as(now)
    before, after = now * value + 1 - now, then * value + 1 - then
    truth = ((now * then).sqrt() * value + ((1 - now) * (1 - then)).sqrt()) / before

    def is_near(other):
        return torch.allclose(got, other, rtol=1e-6)

    if is_near(truth):
        return right(
            "and by Cauchy and Schwarz it is never above the exact flow's: DDIM loses variance in "
            "every step."
        )
    if is_near((after / before).sqrt()):
        return wrong(
            "that is the exact flow. DDIM takes a straight step: put the guess and its ε into "
            "(06.1)."
        )
    if is_near(then.sqrt() * now.sqrt() * value / before):
        return wrong(
            "that is the part that comes through x̂₀; the noise that is kept, √(1 − ᾱ_s)·ε̂, is "
            "missing."
        )
    if is_near(truth * before):
        return wrong("both x̂₀ and ε̂ carry the factor 1/(ᾱ_t·λ + 1 − ᾱ_t).")
    return wrong(
        "not that: x̂₀ = √ᾱ_t·λ·x_t/V and ε̂ = √(1−ᾱ_t)·x_t/V with V = ᾱ_t·λ + 1 − ᾱ_t, put into "
        "(06.1) with σ = 0."
    )
