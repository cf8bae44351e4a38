"""Beta schedules against diffusers and against their defining equations, and what bad betas and
timesteps get.
"""

import math
import re
import warnings

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_utils.schedules import (
    NoiseSchedule,
    check_timesteps,
    cosine_betas,
    linear_betas,
    make_schedule,
)

EPS = torch.finfo(torch.float32).eps
BETAS = {"linear": linear_betas, "cosine": cosine_betas}
THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
@pytest.mark.parametrize("name", BETAS)
@pytest.mark.filterwarnings("ignore:the last step still holds")
def test_agrees_with_diffusers(name, timesteps):
    """Theirs is a float32 product of T factors 1 − beta: T roundings, and one of size eps / (1 −
    beta) where beta is near 1.
    """
    ours = make_schedule(name, timesteps)
    theirs = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=THEIR_NAME[name])
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=4 * EPS, atol=EPS)
    rtol = timesteps * EPS + EPS / (1 - ours.betas.max().item())
    torch.testing.assert_close(ours.alpha_bars, theirs.alphas_cumprod, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", BETAS)
def test_stored_vectors_are_float64_results_rounded_once(name):
    betas = BETAS[name](1000)
    schedule = NoiseSchedule(betas)
    assert betas.dtype == torch.float64 and len(schedule) == 1000
    assert torch.equal(schedule.betas, betas.float())
    assert torch.equal(schedule.alphas, (1 - betas).float())
    assert torch.equal(schedule.alpha_bars, (1 - betas).cumprod(0).float())


def test_linear_ends_and_even_steps():
    betas = linear_betas(1000)
    assert betas[0].item() == pytest.approx(1e-4, rel=1e-12) and betas[-1].item() == pytest.approx(
        0.02, rel=1e-12
    )
    steps = betas.diff()
    torch.testing.assert_close(
        steps, torch.full_like(steps, (0.02 - 1e-4) / 999), rtol=1e-9, atol=0
    )


def test_scale_multiplies_the_betas_and_keeps_the_total_noise():
    torch.testing.assert_close(linear_betas(100, scale=10), 10 * linear_betas(100))
    whole, short = linear_betas(1000), linear_betas(100, scale=10)
    assert short.sum().item() == pytest.approx(whole.sum().item(), rel=1e-12)


def test_cosine_alpha_bar_is_the_paper_s_equation():
    """Eq. 17 divides by f(0), so that alpha_bar starts at 1; the cap of 0.999 bites at the very end
    only.
    """
    timesteps = 200
    alpha_bars = (1 - cosine_betas(timesteps)).cumprod(0)

    def f(t):
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f(t + 1) / f(0) for t in range(timesteps)], dtype=torch.float64)
    torch.testing.assert_close(alpha_bars[:-1], expected[:-1], rtol=1e-9, atol=0)
    assert cosine_betas(timesteps).max().item() == 0.999


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("timesteps", [1, 2, 7, 1000])
@pytest.mark.filterwarnings("ignore:the last step still holds")
def test_every_length_is_a_valid_schedule(name, timesteps):
    schedule = make_schedule(name, timesteps)
    assert len(schedule) == timesteps
    assert (schedule.alpha_bars > 0).all() and (schedule.alpha_bars < 1).all()
    assert (schedule.alpha_bars.diff() < 0).all()


def test_snr_is_signal_power_over_noise_power():
    schedule = make_schedule("cosine", 100)
    expected = schedule.alpha_bars.double() / (1 - schedule.alpha_bars.double())
    torch.testing.assert_close(schedule.snr().double(), expected, rtol=1e-3, atol=0)
    assert (schedule.snr().diff() < 0).all()


def test_to_moves_and_returns_the_schedule():
    schedule = make_schedule("linear", 1000)
    assert schedule.to("cpu") is schedule
    assert {v.device.type for v in (schedule.betas, schedule.alphas, schedule.alpha_bars)} == {
        "cpu"
    }


@pytest.mark.parametrize("timesteps", [5, 10, 20, 50, 100, 300])
def test_warns_of_visible_signal_and_its_factor_mends_it(timesteps):
    """Short T with the betas made for T = 1000: the advice in the warning is followed to the
    letter.
    """
    with pytest.warns(UserWarning, match="the last step still holds") as record:
        NoiseSchedule(linear_betas(timesteps))
    message = str(record[0].message)
    assert "take more timesteps" in message.lower()
    found = re.search(r"Multiply the betas by about ([\d.e+]+\d)", message)
    if found is None:  # so few steps that no even factor leaves every beta below 1
        assert timesteps <= 20
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseSchedule(linear_betas(timesteps) * float(found.group(1)))


@pytest.mark.parametrize("left, warned", [(0.06, True), (0.04, False)])
def test_warns_from_five_hundredths_of_the_image(left, warned):
    """What is left of the image in x_T is √alpha_bar, not alpha_bar."""
    betas = torch.full((10,), 1 - left ** (2 / 10), dtype=torch.float64)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        NoiseSchedule(betas)
    assert bool(record) == warned


@pytest.mark.parametrize(
    "name, timesteps", [("linear", 1000), ("cosine", 2), ("cosine", 50), ("cosine", 1000)]
)
def test_a_schedule_that_ends_in_noise_does_not_warn(name, timesteps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_schedule(name, timesteps)


@pytest.mark.parametrize("make", [linear_betas, cosine_betas, lambda n: make_schedule("linear", n)])
@pytest.mark.parametrize("timesteps", [0, -3, 2.5, True, "10"])
def test_refuses_a_bad_number_of_timesteps(make, timesteps):
    with pytest.raises(
        ValueError,
        match=rf"timesteps={re.escape(repr(timesteps))} must be .* at least 1, such as 1000",
    ):
        make(timesteps)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_refuses_a_beta_outside_the_open_interval(value):
    with pytest.raises(ValueError, match=rf"betas\[1\]={value:g} is outside \(0, 1\)"):
        NoiseSchedule(torch.tensor([0.1, value, 0.2]))


@pytest.mark.parametrize("betas", [torch.empty(0), torch.full((2, 3), 0.1), torch.tensor(0.1)])
def test_refuses_betas_that_are_no_vector(betas):
    with pytest.raises(
        ValueError,
        match=rf"vector of at least one number, got shape {re.escape(str(tuple(betas.shape)))}",
    ):
        NoiseSchedule(betas)


@pytest.mark.parametrize("scale", [0.0, -1.0, 50.0, math.nan])
def test_refuses_a_scale_that_leaves_the_interval(scale):
    with pytest.raises(
        ValueError, match=rf"scale={scale} .* outside \(0, 1\): keep scale below 50"
    ):
        linear_betas(10, scale=scale)


def test_refuses_an_unknown_schedule():
    with pytest.raises(
        ValueError, match="schedule 'sigmoid' is not known: choose 'linear' or 'cosine'"
    ):
        make_schedule("sigmoid", 10)


@pytest.mark.parametrize("t", [[-1, 3], [0, 10], [11, 2]])
def test_refuses_t_out_of_range(t):
    with pytest.raises(
        ValueError, match=rf"t holds {min(t)} … {max(t)}, but this schedule has steps 0 … 9"
    ):
        check_timesteps(torch.tensor(t), 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_refuses_t_of_the_wrong_kind(dtype):
    with pytest.raises(
        ValueError, match=f"t has dtype {dtype}: timesteps are whole numbers, use torch.long"
    ):
        check_timesteps(torch.tensor([1], dtype=dtype), 10)


def test_takes_both_ends_of_the_range():
    check_timesteps(torch.tensor([0, 9]), 10)
    check_timesteps(torch.tensor([], dtype=torch.long), 10)
