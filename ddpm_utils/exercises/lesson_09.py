"""Checks for lesson 09: the best possible denoiser."""

import math

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def check_lead(guess) -> Verdict:
    """Check exercise 9.1: the mean of ln p₁ − ln p₂ for two images.

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
        "not that: put x_t = √ᾱ·x₁ + √(1−ᾱ)·ε into both exponents of (09.3), subtract, and take "
        "the mean over ε."
    )


def check_variance(answer) -> Verdict:
    """Check exercise 9.2: the variance of each pixel of x0, given the shares of the images.

    answer(shares, images) → variances (B, D), for shares (B, N) and images (N, D).
    """
    rng = torch.Generator().manual_seed(9)
    shares = (2 * torch.randn(2, 5, generator=rng, dtype=torch.float64)).softmax(dim=1)
    images = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    got, problem = attempt(answer, shares, images)
    if problem:
        return problem
    got = float64(got)
    mean = shares @ images
    truth = torch.stack([p @ (images - m).square() for p, m in zip(shares, mean, strict=True)])
    if got.shape != truth.shape:
        return wrong(
            f"one variance per noisy image and pixel, shape {tuple(truth.shape)}; yours has "
            f"{tuple(got.shape)}."
        )

    def is_near(value):
        return torch.allclose(got, value, rtol=1e-6)

    if is_near(truth):
        return right(
            "it agrees with the squared deviations from the guess, each weighted by its share."
        )
    if is_near(shares @ images.square()):
        return wrong("this is the mean of the squares; the square of the mean must be subtracted.")
    if is_near(-truth):
        return wrong("the sign: the mean of the squares minus the square of the mean.")
    if is_near(truth.sqrt()):
        return wrong("this is the standard deviation; leave out the square root.")
    if is_near(images.var(dim=0).expand_as(truth)) or is_near(
        images.var(dim=0, correction=0).expand_as(truth)
    ):
        return wrong("this is the variance over all images alike; weight each by its share.")
    if is_near(mean):
        return wrong("this is the guess itself, the mean of x0.")
    if is_near(truth / len(images)):
        return wrong("the shares sum to 1 already: do not divide by the number of images.")
    return wrong(
        "not that: the mean of the squares is shares @ images², and the mean is shares @ images."
    )


def check_factor(answer) -> Verdict:
    """Check exercise 9.3: the factor by which a noiseless DDIM step multiplies x_t for N(0, c).

    answer(alpha_bar_t, alpha_bar_s, c) → the factor.
    """
    now, then = (torch.tensor(v, dtype=torch.float64) for v in ([0.02, 0.3, 0.6], [0.1, 0.5, 0.99]))
    c = 0.25
    got, problem = attempt(answer, now, then, c)
    if problem:
        return problem
    got = float64(got).expand_as(now)
    before, after = now * c + 1 - now, then * c + 1 - then
    truth = ((now * then).sqrt() * c + ((1 - now) * (1 - then)).sqrt()) / before

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
    if is_near(then.sqrt() * now.sqrt() * c / before):
        return wrong(
            "that is the part that comes through x̂₀; the noise that is kept, √(1 − ᾱ_s)·ε̂, is "
            "missing."
        )
    if is_near(truth * before):
        return wrong("both x̂₀ and ε̂ carry the factor 1/(ᾱ_t·c + 1 − ᾱ_t).")
    return wrong(
        "not that: x̂₀ = √ᾱ_t·c·x_t/V and ε̂ = √(1−ᾱ_t)·x_t/V with V = ᾱ_t·c + 1 − ᾱ_t, put into "
        "(06.1) with σ = 0."
    )
