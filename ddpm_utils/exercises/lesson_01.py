"""Checks for lesson 01: the forward process."""

import math

import torch

from . import Verdict, attempt, float64, is_number, right, unanswered, wrong


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)


def check_crossing(guess, schedule) -> Verdict:
    """Check whether `guess` is the first t at which noise outweighs the image (SNR < 1).

    A guess within 5 % of the steps is right.
    """
    if guess is None:
        return unanswered()
    if not is_number(guess):
        return wrong(f"{guess!r} is no number: give a step t, such as {len(schedule) // 3}")
    steps = len(schedule)
    if not 0 <= guess < steps:
        return wrong(f"t = {guess} is no step of this schedule: t runs from 0 to {steps - 1}")
    snr = schedule.snr()
    first = int((snr < 1).nonzero()[0])
    there = snr[round(guess)].item() if round(guess) < steps else snr[-1].item()
    if abs(guess - first) <= max(1, 0.05 * steps):
        return right(
            f"SNR falls below 1 at t = {first}, {(first + 1) / steps:.0%} of the way; your guess "
            f"was {guess}"
        )
    if 0 < guess < 1:
        return wrong(
            f"{guess} looks like a fraction of the way: multiply it by T = {steps} to get a step"
        )
    if abs(guess - steps / 2) <= max(1, 0.03 * steps):
        return wrong(
            f"half of the steps is not half of the noise: at t = {guess} the SNR is down to "
            f"{there:.3g} already"
        )
    side = (
        "too late: noise won earlier"
        if guess > first
        else "too early: the image is still the stronger part"
    )
    return wrong(f"{side}. At t = {guess} the SNR is {there:.3g}, and you are looking for 1")


def check_even_betas(answer, timesteps: int, last_std: float) -> Verdict:
    """Check betas whose noise level rises evenly from last_std / T to last_std.

    answer(timesteps, last_std) → betas.
    """
    betas, problem = attempt(answer, timesteps, last_std)
    if problem:
        return problem
    betas = float64(betas)
    if betas.shape == (timesteps - 1,):
        return wrong(
            "one beta is missing: before the first step alpha_bar is 1, put that 1 in front and "
            "then divide"
        )
    if betas.shape != (timesteps,):
        return wrong(f"expected {timesteps} betas in a vector, got shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas < 1)).all()):
        return wrong(
            "some betas lie outside (0, 1): is the ratio upside down? beta_t = 1 − alpha_bar_t / "
            "alpha_bar_(t−1)"
        )
    wanted = last_std * torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    std = (1 - (1 - betas).cumprod(dim=0)).sqrt()
    tolerance = 1e-5  # 1 − alpha_bar loses digits where the std is small, in float32 most of all
    if bool(((std.square() - wanted.square()).abs() < tolerance).all()):
        return right(
            f"the noise level rises by {last_std / timesteps:.2g} at every step, to {std[-1]:.3f}"
        )
    if bool(((std - wanted.sqrt() * math.sqrt(last_std)).abs() < 1e-3).all()):
        return wrong(
            "your noise *variance* rises evenly; its root, the level, was asked for: alpha_bar = 1 "
            "− std²"
        )
    if bool(((betas - wanted.square()).abs() < 1e-4).all()):
        return wrong(
            "these are 1 − alpha_bar, the noise gathered so far: a beta is what a single step "
            "adds to it"
        )
    if bool(((betas - (1 - wanted.square())).abs() < 1e-4).all()):
        return wrong("these are the alpha_bars: a beta is 1 minus the ratio of two neighbors")
    ratio = torch.cat([betas.new_ones(1), 1 - wanted.square()])
    if bool(((betas - ratio[1:] / ratio[:-1]).abs() < 1e-4).all()):
        return wrong("these are the alphas, the ratios themselves: beta_t = 1 − alpha_t is missing")
    i = int((std - wanted).abs().argmax())
    return wrong(f"the noise level is {std[i]:.3f} at t = {i}, where {wanted[i]:.3f} was asked for")


def check_jump(answer, schedule) -> Verdict:
    """Check the factor and the variance of q(x_t | x_s), s < t.

    answer(alpha_bars, s, t) → (factor, variance).
    """
    alpha_bars, alphas = float64(schedule.alpha_bars), float64(schedule.alphas)
    steps = len(schedule)
    for s, t in ((steps // 10, steps // 4), (steps // 4, steps // 2)):
        got, problem = attempt(answer, alpha_bars, s, t)
        if problem:
            return problem
        if not isinstance(got, tuple | list) or len(got) != 2:
            return wrong(
                "return two numbers: what x_s is multiplied by, and the variance of the noise "
                "that is added"
            )
        factor, variance = (float(v) for v in got)
        # the reference goes step by step: one alpha per step, from s + 1 to t
        kept = alphas[s + 1 : t + 1].prod().item()
        if _close(factor, math.sqrt(kept)) and _close(variance, 1 - kept):
            continue
        here = f"from s = {s} to t = {t}: "
        if _close(factor, kept):
            return wrong(
                here
                + f"your factor is {factor:.4f}, the square of what it should be: take the root"
            )
        if _close(factor, alpha_bars[t].sqrt().item()):
            return wrong(
                here + "your factor is the one that leads from the clean image; from x_s, part of "
                "the way is done"
            )
        right_factor = _close(factor, math.sqrt(kept))
        if not right_factor and _close(factor, math.sqrt(alphas[s:t].prod().item())):
            return wrong(
                here
                + "off by one: x_s has had step s already, so the first alpha to come is that of "
                "s + 1"
            )
        if _close(variance, (alpha_bars[s] - alpha_bars[t]).item()):
            return wrong(
                here
                + "your variance is what x_t has more than x_s; but the noise of x_s shrinks on "
                "the way, "
                "so more must be added than the difference"
            )
        if _close(variance, math.sqrt(1 - kept)):
            return wrong(
                here + f"{variance:.4f} is the standard deviation; the variance was asked for"
            )
        return wrong(
            here
            + f"you say {factor:.4f} and {variance:.4f}; single steps give {math.sqrt(kept):.4f} "
            f"and {1 - kept:.4f}"
        )
    return right("the chain of single steps agrees with your jump, from two places to two others")
