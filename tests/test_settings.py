"""What a bad value in a lesson's config cell gets: one line with its name, what was expected and
what to try.
"""

import numpy as np
import pytest

from ddpm_utils import settings

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [25, 26, 4000, np.int64(1000)])
def test_whole_numbers_within(value):
    settings.within("T", value, 25, 4000)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (24, 25),
        (-1, 25),
        (0, 25),
        (4001, 4000),
        (10**30, 4000),
        (INF, 4000),
        (-INF, 25),
        (NAN, 25),
        ("1000", 25),
        (True, 25),
        (None, 25),
        ([1000], 25),
        (1000.0, 1000),
        (99.5, "99 or 100"),
        (np.float64(30), 30),
    ],
)
def test_what_is_no_whole_number_within(value, advice):
    with pytest.raises(
        ValueError, match=rf"^T=.* must be a whole number in 25 … 4000: try {advice}$"
    ) as error:
        settings.within("T", value, 25, 4000)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [1e-4, 5e-3, 0.002, np.float32(0.003)])
def test_numbers_within(value):
    settings.within("LR", value, 1e-4, 5e-3)


def test_a_whole_number_is_a_number():
    settings.within("SCALE", 2, 0.0, 20.0)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (9e-5, 0.0001),
        (0, 0.0001),
        (0.01, 0.005),
        (INF, 0.005),
        (NAN, 0.0001),
        ("2e-3", 0.0001),
        (True, 0.0001),
        (None, 0.0001),
        (1j, 0.0001),
    ],
)
def test_what_is_no_number_within(value, advice):
    with pytest.raises(
        ValueError, match=rf"^LR=.* must be a number in 0.0001 … 0.005: try {advice}$"
    ):
        settings.within("LR", value, 1e-4, 5e-3)


@pytest.mark.parametrize(
    ("value", "low", "multiple", "advice"),
    [
        (28, 8, 8, "24 or 32"),
        (30, 8, 4, "28 or 32"),
        (7, 8, 4, "8"),
        (65, 8, 4, "64"),
        (9, 10, 4, "12"),
        ("28", 8, 8, "8"),
        (29.5, 8, 4, "28 or 32"),
    ],
)
def test_the_multiples_on_both_sides_are_offered(value, low, multiple, advice):
    with pytest.raises(
        ValueError, match=rf"must be a multiple of {multiple} in {low} … 64: try {advice}$"
    ):
        settings.within("IMAGE_SIZE", value, low, 64, multiple_of=multiple)
    for number in map(int, advice.split(" or ")):
        settings.within("IMAGE_SIZE", number, low, 64, multiple_of=multiple)


def test_none_where_it_is_allowed():
    settings.within("EPOCHS", None, 0.1, 100.0, or_none=True)
    settings.widths("WIDTHS", None, 2, 2, or_none=True)
    for check, name, limits in (
        (settings.within, "EPOCHS", (0.1, 100.0)),
        (settings.widths, "WIDTHS", (2, 2)),
    ):
        with pytest.raises(ValueError, match=f"{name}='None' must be .* or None: try"):
            check(name, "None", *limits, or_none=True)


@pytest.mark.parametrize("value", [True, False])
def test_one_of_two(value):
    settings.one_of("CLAMP", value, (True, False))


@pytest.mark.parametrize("value", [1, 0, 1.0, "True", None, np.True_, [True]])
def test_what_only_looks_like_true(value):
    with pytest.raises(ValueError, match="CLAMP=.* is not known: choose one of True, False$"):
        settings.one_of("CLAMP", value, (True, False))


@pytest.mark.parametrize(
    "value", ["sigmoid", "Linear", "linear ", "", None, 0, ["linear"], ("linear", "cosine")]
)
def test_what_is_not_among_the_options(value):
    with pytest.raises(
        ValueError, match="^SCHEDULE=.* is not known: choose one of 'linear', 'cosine'$"
    ):
        settings.one_of("SCHEDULE", value, {"linear": 1, "cosine": 2})


@pytest.mark.parametrize("value", [(4, 4), (48, 64), [48, 64, 96]])
def test_widths(value):
    settings.widths("WIDTHS", value, 2, 3)


@pytest.mark.parametrize(
    "value",
    [
        (48,),
        (48, 64, 96, 128),
        (),
        48,
        "48, 64",
        (48, 65),
        (48, 0),
        (48, -4),
        (48.0, 64),
        (True, 4),
        (48, "64"),
        None,
        np.array([48, 64]),
    ],
)
def test_what_are_no_widths(value):
    with pytest.raises(
        ValueError, match=r"WIDTHS=.* must be 2 to 3 widths, each a multiple of 4: try \(48, 64\)$"
    ):
        settings.widths("WIDTHS", value, 2, 3)
