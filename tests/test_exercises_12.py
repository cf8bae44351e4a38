"""The checks of lesson 12: right answers pass, and every slip that a check
foresees is told apart.
"""

import math

import pytest

from ddpm_utils.exercises import lesson_12


def period(columns):
    return 2 * math.pi * 10_000 ** (2 * (columns // 2 - 1) / 512)


def reach(layers):
    pixels, step = 1, 1
    for kernel, stride in layers:
        pixels, step = pixels + (kernel - 1) * step, step * stride
    return pixels


def attention(side, channels):
    return 2 * side**4 * channels + 4 * side**2 * channels**2


RIGHT = {"check_period": period, "check_reach": reach, "check_attention": attention}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass_and_none_is_no_answer(name):
    check = getattr(lesson_12, name)
    assert check(RIGHT[name]).passed is True
    assert check(lambda *arguments: None).passed is None and check(None).passed is None
    assert check(lambda *arguments: "many").passed is False
    broken = check(lambda *arguments: 1 / 0)
    assert broken.passed is False and "ZeroDivisionError" in broken.words


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (lambda c: period(c + 2), "one too far"),
        (lambda c: 2 * math.pi * 10_000 ** (2 * c / 512), "share a frequency"),
        (lambda c: 2 * math.pi * 10_000 ** (2 * (c - 1) / 512), "share a frequency"),
        (lambda c: period(c) / (2 * math.pi), "a full turn"),
        (lambda c: 2 * math.pi / period(c), "divided by it"),
        (lambda c: 2 * math.pi * 10_000 ** (2 * (c // 2 - 1) / c), "cut, not made anew"),
        (lambda c: 5.0, "the slowest column"),
    ],
)
def test_slips_about_periods(slip, words):
    verdict = lesson_12.check_period(slip)
    assert verdict.passed is False and words in verdict.words


def step_too_early(layers):
    pixels, step = 1, 1
    for kernel, stride in layers:
        step *= stride
        pixels += (kernel - 1) * step
    return pixels


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (lambda layers: reach(layers) - 1, "one short"),
        (lambda layers: (reach(layers) - 1) / 2 if len(layers) > 1 else 3, "to one side"),
        (lambda layers: 1 + sum(k - 1 for k, _ in layers), "longer steps"),
        (step_too_early, "not its own"),
        (
            lambda layers: (
                1 + sum((k - 1) * s for k, s in layers) if len(layers) > 3 else reach(layers)
            ),
            "multiply",
        ),
        (lambda layers: 99, "keep two numbers"),
    ],
)
def test_slips_about_reach(slip, words):
    verdict = lesson_12.check_reach(slip)
    assert verdict.passed is False and words in verdict.words


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (lambda s, c: 2 * s**4 * c, "projections are missing"),
        (lambda s, c: 4 * s**2 * c**2, "the table is missing"),
        (lambda s, c: s**4 * c + 4 * s**2 * c**2, "only one product"),
        (lambda s, c: 2 * s**4 * c + 3 * s**2 * c**2, "three of four"),
        (lambda s, c: 2 * s**4 * c + s**2 * c**2, "four of them"),
        (lambda s, c: 2 * attention(s, c), "here they are one"),
        (lambda s, c: 2 * s**2 * c + 4 * s * c**2, "side times side"),
        (lambda s, c: 1, "each of N² fits"),
    ],
)
def test_slips_about_attention(slip, words):
    verdict = lesson_12.check_attention(slip)
    assert verdict.passed is False and words in verdict.words
