"""Checks for lesson 08: distances between sets of features, and the effect of chance on them."""

import math

import torch

from . import Verdict, attempt, is_number, right, unanswered, wrong


def check_distance(guess) -> Verdict:
    """Check exercise 8.1: the Fréchet distance of N(0, 1) and N(0.5, 1.5²).

    The two differ in this way in each of 96 independent coordinates.
    """
    if guess is None:
        return unanswered()
    if isinstance(guess, torch.Tensor) and guess.numel() == 1:
        guess = guess.item()
    if not is_number(guess):
        return wrong(f"a number is wanted, such as 12.0; got {guess!r}")
    if abs(guess - 48) < 0.01:
        return right(
            "48: each coordinate adds 0.5² for the shift and (1.5 − 1)² for the stretch, and "
            "there are 96."
        )
    slips = {
        0.5: "that is one coordinate: there are 96, and their contributions add.",
        48**0.5: "that is the root of it: (08.3) is a squared distance.",
        24.0: "that is one of two parts: the shift of the means and the change of the width "
        "contribute equally here.",
        96.0: "you added 0.5 and 0.5: both enter squared.",
        96
        * (0.25 + 1.25): "the width enters by the standard deviations: (1.5 − 1)², not 1.5² − 1.",
        96
        * (0.25 + 1.25**2): "you squared the difference of the variances: (1.5 − 1)² is asked for.",
        96
        * (
            0.25 + 1 + 1.5 - 2 * 1.5**0.5
        ): "you took 1.5 for the variance: it is the standard deviation.",
        96
        * 3.5: "the last term of (08.3) is missing: take away twice the root of λ, which is 1² · "
        "1.5².",
        96 * (3.5 - 2 * 2.25): "the last term holds the root of λ: λ itself is 1² · 1.5² = 2.25.",
    }
    for slip, words in slips.items():
        if abs(guess - slip) < 0.01 * max(1.0, abs(slip)):
            return wrong(words)
    return wrong(
        "not that: write (08.3) for one coordinate, where all matrices are numbers, then multiply "
        "by 96."
    )


def check_density(answer) -> Verdict:
    """Check exercise 8.2: the density of fake features (2002.09797, Eq. 4).

    answer(real, fake, k) → the number of real points' balls that hold a fake, averaged over the
    fakes and divided by k.
    """
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=rng, dtype=torch.float64)
    fake = 0.7 * torch.randn(25, 3, generator=rng, dtype=torch.float64) + 0.2
    k = 4
    got, problem = attempt(answer, real, fake, k)
    if problem:
        return problem
    if torch.as_tensor(got).numel() != 1:
        return wrong(
            f"one number is wanted; got a tensor of shape {tuple(torch.as_tensor(got).shape)}: "
            "take the mean."
        )
    got, between = float(got), torch.cdist(fake, real)

    def radii(points, k):
        return torch.cdist(points, points).sort(dim=1).values[:, k]  # column 0 is the point itself

    def share(inside):
        return inside.double().sum(dim=1).mean().item()

    inside = between <= radii(real, k)

    def is_near(value):
        return abs(got - value) < 1e-6

    if is_near(share(inside) / k):
        return right(
            f"density {got:.2f} on the points of the check: every ball that holds a sample "
            "counts, over k."
        )
    among_all = (
        "you took the mean over the real points: sum over them, then take the mean over "
        "the samples."
    )
    around_fakes = "these are balls around the samples: density uses those around the real points."
    of_fakes = between.T <= radii(fake, k)
    slips = {
        share(inside): "the division by k is missing: without it real images score about k.",
        share(
            inside.any(dim=1, keepdim=True)
        ): "this is precision: count the balls a sample lies in, do not ask for any.",
        share(inside.any(dim=1, keepdim=True))
        / k: "count the balls that a sample lies in; you asked whether there is any.",
        share(inside) / len(real): among_all,
        share(inside) / len(real) / k: among_all,
        share(inside.T) / k: "the mean runs over the samples, not over the real points.",
        share(between <= radii(real, k - 1))
        / k: "the k-th nearest *other* point is meant: the nearest of all is the point.",
        share(of_fakes) / k: around_fakes,
        share(of_fakes.T) / k: around_fakes,
    }
    for slip, words in slips.items():
        if is_near(slip):
            return wrong(words)
    return wrong(
        "not that: for each sample, the number of real points whose ball reaches it; the mean of "
        "that, over k."
    )


def check_means_part(answer) -> Verdict:
    """Check exercise 8.3: the expected squared distance of the means of two sets.

    answer(trace, n, m) → the distance for n and m values from one source.
    """
    cases = [(3.0, 10, 20), (7.5, 50, 1000), (1.0, 4, 4)]
    values = []
    for case in cases:
        got, problem = attempt(answer, *case)
        if problem:
            return problem
        if torch.as_tensor(got).numel() != 1:
            return wrong(
                "one number is wanted: the sum over the coordinates is in the trace already."
            )
        values.append(float(got))

    def is_near(formula):
        return all(
            math.isclose(value, formula(*case), rel_tol=1e-6)
            for value, case in zip(values, cases, strict=True)
        )

    if is_near(lambda trace, n, m: trace * (1 / n + 1 / m)):
        return right(
            "trace · (1/n + 1/m): chance alone, and it goes only with the number of images."
        )
    one = "only one set scatters in this: the mean of the other has a variance of its own."
    slips = [
        (lambda trace, n, m: trace / n, one),
        (lambda trace, n, m: trace / m, one),
        (
            lambda trace, n, m: trace / (n + m),
            "the two means are not pooled: each has its own variance, and those add.",
        ),
        (
            lambda trace, n, m: trace * 2 / (n + m),
            "that takes both sets to be of the middle size: add 1/n and 1/m.",
        ),
        (
            lambda trace, n, m: abs(trace / n - trace / m),
            "variances add, also where the things themselves are subtracted.",
        ),
        (
            lambda trace, n, m: trace / (n * m),
            "each mean has a variance over its own number; they add, they do not multiply.",
        ),
        (
            lambda trace, n, m: (trace * (1 / n + 1 / m)) ** 0.5,
            "that is the root: (08.3) holds the squared distance.",
        ),
        (
            lambda trace, n, m: trace * (n**-0.5 + m**-0.5),
            "1/√n is for the standard deviation of a mean, 1/n for its variance.",
        ),
        (
            lambda trace, n, m: trace * (1 / (n - 1) + 1 / (m - 1)),
            "n − 1 is for estimating a variance: that of a mean has n.",
        ),
        (
            lambda trace, n, m: 0.0,
            "0 is the mean of the difference, not of its square: the two means never agree "
            "exactly.",
        ),
    ]
    for formula, words in slips:
        if is_near(formula):
            return wrong(words)
    return wrong(
        "not that: what is the variance of a mean of n independent values, and of the difference "
        "of two such means?"
    )
