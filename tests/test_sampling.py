"""The samplers with a perfect denoiser against exact moments, and what they promise: modes, seeds,
shapes, range.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from networks import as_network
from torch import nn

from ddpm_utils.diffusion import Denoiser, predict_eps, predict_x0, q_posterior, training_target
from ddpm_utils.oracle import GaussianDenoiser
from ddpm_utils.sampling import (
    Guided,
    ddim_encode,
    ddim_sample,
    ddim_step,
    ddpm_sample,
    dpm_solver_sample,
    eval_mode,
    keep,
    last,
    multistep_guess,
    spaced_timesteps,
)
from ddpm_utils.schedules import NoiseSchedule, cosine_betas, linear_betas, make_schedule
from ddpm_utils.unet import UNet

MEAN = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[0.30, 0.10, 0.00], [0.10, 0.20, -0.05], [0.00, -0.05, 0.02]], dtype=torch.float64
)


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def betas_for(name, timesteps):
    return (
        linear_betas(timesteps, scale=1000 / timesteps)
        if name == "linear"
        else cosine_betas(timesteps)
    )


def exact_moments(betas, variance):
    """Mean and covariance of the sampler's result for N(MEAN, COVARIANCE), in float64.

    The perfect x0_hat is linear in x_t, so every reverse step is x_{t−1} = A x_t + b + noise, and
    moments go through it exactly.
    """
    identity = torch.eye(3, dtype=torch.float64)
    alpha_bars = (1 - betas).cumprod(0).tolist()
    mean, cov = torch.zeros(3, dtype=torch.float64), identity
    for t in reversed(range(len(betas))):
        beta, ab, ab_prev = betas[t].item(), alpha_bars[t], alpha_bars[t - 1] if t else 1.0
        gain = ab**0.5 * COVARIANCE @ torch.linalg.inv(ab * COVARIANCE + (1 - ab) * identity)
        to_x0, to_x_t = ab_prev**0.5 * beta / (1 - ab), (1 - beta) ** 0.5 * (1 - ab_prev) / (1 - ab)
        a = to_x0 * gain + to_x_t * identity
        b = to_x0 * (MEAN - ab**0.5 * gain @ MEAN)
        noise = 0.0 if t == 0 else beta if variance == "beta" else beta * (1 - ab_prev) / (1 - ab)
        mean, cov = a @ mean + b, a @ cov @ a.T + noise * identity
    return mean, cov


def perfect(schedule):
    return GaussianDenoiser(schedule, MEAN.float(), COVARIANCE.float())


def sampled(betas, variance, target, n):
    """By way of a network that predicts `target` and knows the data."""
    schedule = NoiseSchedule(betas)
    network = as_network(perfect(schedule), schedule, target)
    denoise = Denoiser(network, schedule, target, clamp=False)
    return (
        last(ddpm_sample(denoise, schedule, (n, 1, 1, 3), variance, seeded())).flatten(1).double()
    )


def assert_moments(
    x,
    mean,
    cov,
    errors=4.5,
    bias=0.0,
):
    """Within `errors` standard errors of n normal draws, for the covariance √((C_ii C_jj + C_ij²) /
    n), plus a known bias.
    """
    n, var = len(x), cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= errors * (var / n).sqrt() + bias).all()
    assert (
        (torch.cov(x.T) - cov).abs() <= errors * ((var[:, None] * var + cov**2) / n).sqrt() + bias
    ).all()


# ---- the sampler with a perfect network


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("name, target", [("linear", "eps"), ("cosine", "v"), ("cosine", "x0")])
def test_moments_are_those_of_the_linear_recursion(name, target, variance):
    """With few steps the result is not the data's distribution, but it is
    known exactly for that T.
    """
    betas = betas_for(name, 40)
    assert_moments(sampled(betas, variance, target, 40_000), *exact_moments(betas, variance))


@pytest.mark.parametrize("variance, timesteps", [("beta_tilde", 1000), ("beta", 250)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_moments_approach_the_data_s(name, variance, timesteps):
    """The rest falls like 1 / T.

    Beta-tilde, the lower bound, ends too narrow in every direction; beta, the upper, too wide.
    """
    mean, cov = exact_moments(betas_for(name, timesteps), variance)
    _, rough = exact_moments(betas_for(name, timesteps // 4), variance)
    assert (mean - MEAN).abs().max() < 1e-4
    assert (cov - COVARIANCE).abs().max() < 0.02 * COVARIANCE.max()
    assert 3 < (rough - COVARIANCE).abs().max() / (cov - COVARIANCE).abs().max() < 5
    sign = -1 if variance == "beta_tilde" else 1
    assert (sign * torch.linalg.eigvalsh(cov - COVARIANCE) > 0).all()


@pytest.mark.parametrize("variance, timesteps", [("beta_tilde", 1000), ("beta", 500)])
def test_with_many_steps_the_samples_are_the_data(variance, timesteps):
    """No recursion here: the data's own moments, give or take standard errors and the 1 / T that
    remains.
    """
    assert_moments(
        sampled(betas_for("cosine", timesteps), variance, "v", 4000), MEAN, COVARIANCE, bias=0.0025
    )


# ---- against diffusers


@pytest.mark.parametrize(
    "target, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_whole_chain_agrees_with_diffusers(target, theirs):
    """The same seed draws x_T, then one noise a step; 20 steps of float32 roundings apart."""
    schedule = make_schedule("linear", 20, 40)
    scheduler = DDPMScheduler(num_train_timesteps=20, prediction_type=theirs, clip_sample=True)
    scheduler.alphas_cumprod = schedule.alpha_bars
    scheduler.set_timesteps(20)

    def model(x, t, y=None):
        return (x.roll(1, dims=-1) * (1 + t.view(-1, 1, 1, 1) / 20)).sin()

    g = seeded(4)
    x = torch.randn(3, 2, 4, 4, generator=g)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.repeat(3)), t, x, generator=g).prev_sample
    denoise = Denoiser(model, schedule, target)
    ours = last(ddpm_sample(denoise, schedule, (3, 2, 4, 4), generator=seeded(4)))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


# ---- what it yields


def test_yields_every_state_from_noise_to_image():
    schedule, calls = make_schedule("cosine", 12), []

    def model(x, t, y):
        calls.append((t, y))
        return 0.3 * x

    y = torch.tensor([1, 2])
    denoise = Denoiser(model, schedule, "v")
    states = list(ddpm_sample(denoise, schedule, (2, 1, 3, 3), generator=seeded(), y=y))
    assert [t for t, _, _ in states] == [*range(11, -1, -1), -1]
    assert torch.equal(states[0][1], torch.randn(2, 1, 3, 3, generator=seeded()))
    assert torch.equal(
        torch.stack([t for t, _ in calls]), torch.arange(11, -1, -1)[:, None].expand(12, 2)
    )
    assert all(given is y for _, given in calls)
    for t, x_t, x0_hat in states[:-1]:
        expected = predict_x0(schedule, x_t, torch.full((2,), t), 0.3 * x_t, "v").clamp(-1, 1)
        assert torch.equal(x0_hat, expected)
    assert torch.equal(states[-1][1], states[-1][2])
    # at t = 0 the mean is x0_hat
    torch.testing.assert_close(states[-1][1], states[-2][2], rtol=0, atol=1e-3)


def test_last_and_keep_pick_from_the_states():
    schedule = make_schedule("cosine", 10)
    denoise = Denoiser(lambda x, t, y: x, schedule)
    states = list(ddpm_sample(denoise, schedule, (2, 1, 2, 2), generator=seeded()))
    assert torch.equal(last(iter(states)), states[-1][1])
    kept = keep(iter(states), [9, torch.tensor(4)])
    assert sorted(kept) == [-1, 4, 9]
    assert torch.equal(kept[4][0], states[5][1]) and torch.equal(kept[4][1], states[5][2])


def test_leaves_yielded_states_alone():
    """A reader who collects the states for a GIF must not find them changed by later steps."""
    schedule = make_schedule("cosine", 10)
    denoise = Denoiser(lambda x, t, y: x, schedule)
    states = ddpm_sample(denoise, schedule, (2, 1, 2, 2), generator=seeded())
    _, x_t, x0_hat = next(states)
    before = x_t.clone(), x0_hat.clone()
    last(states)
    assert torch.equal(x_t, before[0]) and torch.equal(x0_hat, before[1])


# ---- seeds, range, shapes


def test_same_seed_same_image_and_another_seed_another():
    schedule, shape = make_schedule("cosine", 10), (2, 1, 4, 4)
    denoise = Denoiser(lambda x, t, y: 0.1 * x, schedule, "v")

    def image(seed):
        return last(ddpm_sample(denoise, schedule, shape, generator=seeded(seed)))

    torch.manual_seed(1)
    first = image(7)
    torch.manual_seed(2)  # the global generator plays no part
    assert torch.equal(first, image(7))
    assert not torch.equal(first, image(8))


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize(
    "name, timesteps, scale",
    [("linear", 100, 10), ("linear", 50, 20), ("cosine", 50, 1), ("cosine", 200, 1)],
)
def test_clamped_images_lie_in_the_model_s_range_exactly(name, timesteps, scale, variance):
    """A network that wants images far too bright and far too dark gets −1 and 1, and no more."""
    schedule = make_schedule(name, timesteps, scale)

    def model(x, t, y):
        return 5 * torch.ones_like(x).cumsum(dim=1).sub(1.5).sign()

    denoise = Denoiser(model, schedule, "x0")
    x = last(ddpm_sample(denoise, schedule, (2, 2, 3, 3), variance, seeded()))
    assert x.min().item() == -1 and x.max().item() == 1


def test_clamp_off_lets_a_prediction_through():
    schedule = make_schedule("cosine", 10)
    denoise = Denoiser(lambda x, t, y: torch.full_like(x, 3.0), schedule, "x0", clamp=False)
    x = last(ddpm_sample(denoise, schedule, (1, 1, 2, 2), generator=seeded()))
    torch.testing.assert_close(x, torch.full_like(x, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (5, 3, 8, 4), (2, 1, 12, 20)])
def test_any_batch_and_any_size_the_network_takes(shape):
    model = UNet(channels=shape[1], widths=(8, 8), blocks=1, groups=4, heads=2, time_dim=8)
    schedule = make_schedule("cosine", 3)
    x = last(ddpm_sample(Denoiser(model, schedule), schedule, shape, generator=seeded()))
    assert x.shape == shape and x.isfinite().all()


@pytest.mark.filterwarnings("ignore:the last step still holds")
def test_one_timestep_is_enough():
    schedule = make_schedule("linear", 1)
    denoise = Denoiser(lambda x, t, y: x, schedule, "x0")
    states = list(ddpm_sample(denoise, schedule, (1, 1, 2, 2), generator=seeded()))
    assert [t for t, _, _ in states] == [0, -1]


def test_refuses_an_unknown_word():
    schedule = make_schedule("cosine", 3)
    with pytest.raises(ValueError, match="target='noise' is not known: choose"):
        last(ddpm_sample(Denoiser(lambda x, t, y: x, schedule, "noise"), schedule, (1, 1, 2, 2)))
    with pytest.raises(ValueError, match="variance='large' is not known: choose"):
        last(
            ddpm_sample(
                Denoiser(lambda x, t, y: x, schedule), schedule, (1, 1, 2, 2), variance="large"
            )
        )


# ---- modes


SCHEDULE = make_schedule("cosine", 5)
EVERY_SAMPLER = {
    "ddpm": lambda denoise, **more: ddpm_sample(denoise, SCHEDULE, (2, 1, 2, 2), **more),
    "ddim": lambda denoise, **more: ddim_sample(denoise, SCHEDULE, (2, 1, 2, 2), 5, **more),
    "dpm": lambda denoise, **more: dpm_solver_sample(denoise, SCHEDULE, (2, 1, 2, 2), 5, **more),
    "encode": lambda denoise, **more: ddim_encode(
        denoise, SCHEDULE, torch.zeros(2, 1, 2, 2), 5, **more
    ),
}


class Watcher(nn.Module):
    """Says 0.1·x and notes the mode it was called in; with `fail_at`, raises at that step."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.inner, self.fail_at, self.modes = nn.Dropout(0.5), fail_at, []

    def forward(self, x, t, y=None):
        self.modes.append((self.training, self.inner.training))
        if t[0] == self.fail_at:
            raise RuntimeError("out of paint")
        return 0.1 * x


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_meanwhile_and_the_old_mode_afterwards(training, sampler):
    model = Watcher().train(training)
    denoise = Denoiser(model, SCHEDULE, "v")
    last(EVERY_SAMPLER[sampler](denoise))
    assert model.modes == [(False, False)] * 5
    assert model.training == training and model.inner.training == training and denoise.training


@pytest.mark.parametrize("training", [True, False])
def test_old_mode_after_a_run_abandoned_midway(training):
    model = Watcher().train(training)
    states = ddpm_sample(Denoiser(model, SCHEDULE, "v"), SCHEDULE, (1, 1, 2, 2))
    next(states)
    assert not model.training
    states.close()
    assert model.training == training and model.inner.training == training


def test_old_mode_after_a_break_out_of_the_loop():
    model = Watcher().train()

    def first_state():
        for state in ddpm_sample(Denoiser(model, SCHEDULE, "v"), SCHEDULE, (1, 1, 2, 2)):
            return state

    first_state()
    assert model.training and model.inner.training


def test_old_mode_after_an_exception():
    model = Watcher(fail_at=2).train()
    with pytest.raises(RuntimeError, match="out of paint"):
        last(ddpm_sample(Denoiser(model, SCHEDULE, "v"), SCHEDULE, (1, 1, 2, 2)))
    assert model.training and model.inner.training


@pytest.mark.parametrize("outer, inner", [(True, False), (False, True)])
def test_every_part_gets_its_own_mode_back(outer, inner):
    """A part that was frozen in eval mode stays frozen; one that was left in training mode is not
    trained on samples.
    """
    model = Watcher().train(outer)
    model.inner.train(inner)
    with eval_mode(model):
        assert not model.training and not model.inner.training
    assert (model.training, model.inner.training) == (outer, inner)


def test_takes_a_plain_function_for_a_model():
    with eval_mode(lambda x, t, y: x) as model:
        assert model(1, 2, 3) == 1


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_takes_a_plain_function_for_a_denoiser_and_hands_it_the_labels(sampler):
    calls, y = [], torch.tensor([1, 2])

    def denoise(x_t, t, y):
        calls.append((t.tolist(), y))
        return 0.3 * x_t

    states = list(EVERY_SAMPLER[sampler](denoise, y=y))
    times = [t for t, _, _ in states if t >= 0]
    assert [t for t, _ in calls] == [[t, t] for t in times] and sorted(times) == [0, 1, 2, 3, 4]
    assert all(given is y for _, given in calls)
    assert all(torch.equal(x0_hat, 0.3 * x_t) for t, x_t, x0_hat in states if t >= 0)


# ---- DDIM


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_step_agrees_with_diffusers(name, eta):
    schedule = NoiseSchedule(betas_for(name, 1000))
    theirs = DDIMScheduler(
        trained_betas=schedule.betas.numpy(), clip_sample=True, set_alpha_to_one=True
    )
    theirs.set_timesteps(50)
    for t in (980, 500, 20, 0):  # 20 steps apart; the last one lands on the image
        x_t, prediction = torch.randn(2, 4, 1, 6, 6, generator=seeded(t))
        noise = torch.randn(4, 1, 6, 6, generator=seeded(t + 1))
        at_t, landing = torch.full((4,), t), torch.full((4,), max(t - 20, -1))
        x0_hat = predict_x0(schedule, x_t, at_t, prediction, "eps").clamp(-1, 1)
        got = ddim_step(schedule, x_t, at_t, landing, x0_hat, eta, seeded(t + 1))
        theirs_too = {
            "eta": eta,
            "use_clipped_model_output": True,
            "variance_noise": noise if eta else None,
        }
        torch.testing.assert_close(
            got, theirs.step(prediction, t, x_t, **theirs_too).prev_sample, rtol=1e-4, atol=1e-4
        )


def test_ddim_with_all_noise_and_all_steps_is_ddpm():
    """eta = 1 from t to t − 1: the mean and the variance of the posterior (2010.02502, section
    4.1).
    """
    schedule = NoiseSchedule(betas_for("linear", 50))
    x_t, x0_hat = torch.tensor([0.7, -0.2]).view(2, 1, 1, 1, 1).expand(2, 20_000, 1, 1, 1)
    for t in (1, 25, 49):
        at_t = torch.full((20_000,), t)
        mean, variance = q_posterior(schedule, x0_hat, x_t, at_t)
        drawn = ddim_step(schedule, x_t, at_t, at_t - 1, x0_hat, 1.0, seeded(t))
        assert abs(drawn.mean() - mean[0]) < 5 * variance[0].sqrt() / 20_000**0.5
        assert abs(drawn.var() / variance[0] - 1) < 5 * (2 / 20_000) ** 0.5


def test_ddim_of_the_exact_denoiser_comes_closer_with_more_steps():
    schedule = NoiseSchedule(betas_for("cosine", 1000))
    denoise = perfect(schedule)

    def error(steps):
        states = ddim_sample(denoise, schedule, (40_000, 1, 1, 3), steps, generator=seeded())
        x = last(states).flatten(1).double()
        return (torch.cov(x.T) - COVARIANCE).norm().item()

    errors = [error(steps) for steps in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.02  # of a covariance of norm 0.4; its own spread at 40,000 draws is 0.003


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_calls_the_network_as_often_as_asked(net, tiny, steps):
    cfg = tiny(timesteps=50)
    model, schedule, calls = net(cfg).train(), make_schedule(**cfg.noise()), []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1].tolist()))
    denoise = Denoiser(model, schedule, "v")
    states = list(ddim_sample(denoise, schedule, (2, 1, 8, 8), steps, generator=seeded()))
    times = [t for t, _, _ in states]
    assert calls == [[t, t] for t in times[:-1]] and len(calls) == steps
    assert times[0] == 49 and times[-1] == -1 and (steps == 1 or times[-2] == 0)
    assert times == sorted(set(times), reverse=True)
    assert all(x0_hat.abs().max() <= 1 for _, _, x0_hat in states)
    assert torch.equal(states[-1][1], states[-2][2])  # the last step lands on the last guess
    assert model.training
    again = last(ddim_sample(denoise, schedule, (2, 1, 8, 8), steps, generator=seeded()))
    assert torch.equal(again, states[-1][1])


@pytest.mark.parametrize("steps", [0, 51, -3])
def test_ddim_refuses_times_that_the_schedule_has_not(steps):
    with pytest.raises(ValueError, match=f"steps={steps} is outside 1 … 50"):
        spaced_timesteps(make_schedule("cosine", 50), steps)


# ---- which times


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "log_snr"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 37, 99, 100])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_times_fall_from_the_first_to_the_last_and_none_comes_twice(name, steps, spacing):
    times = spaced_timesteps(
        make_schedule(name, 100, 10 if name == "linear" else 1), steps, spacing
    )
    assert len(times) == steps and times == sorted(set(times), reverse=True)
    assert times[0] == 99 and (steps == 1 or times[-1] == 0)


def test_spacings_mean_what_they_say():
    schedule = make_schedule("cosine", 1000)
    assert spaced_timesteps(schedule, 4) == [999, 666, 333, 0]
    assert spaced_timesteps(schedule, 4, "quadratic") == [999, 444, 111, 0]
    linear = make_schedule("linear", 1000)
    log_snr = linear.snr().double().log()
    gaps = log_snr[spaced_timesteps(linear, 9, "log_snr")].diff()
    assert gaps.max() / gaps.min() < 1.5  # the schedule's own steps are coarse near t = 0
    with pytest.raises(ValueError, match="spacing='even' is not known: choose"):
        spaced_timesteps(schedule, 9, "even")


@pytest.mark.parametrize("sample", [ddim_sample, dpm_solver_sample])
def test_times_may_be_given_one_by_one(sample):
    schedule, calls = make_schedule("cosine", 50), []

    def model(x, t, y):
        calls.append(t[0].item())
        return 0.1 * x

    denoise = Denoiser(model, schedule, "v")
    last(sample(denoise, schedule, (1, 1, 2, 2), [49, 30, 29, 3], generator=seeded()))
    assert calls == [49, 30, 29, 3]
    for times in ([], [3, 3], [3, 10], [50, 2], [4, -1]):
        with pytest.raises(ValueError, match="must fall from at most 49 to at least 0"):
            last(sample(denoise, schedule, (1, 1, 2, 2), times))


# ---- second order


def wavy(x, t, y=None):
    """A network with some shape to it: smooth, not linear, different at every time."""
    return torch.tanh(1.3 * x + 0.4 * torch.sin(t / 100).view(-1, 1, 1, 1)) - 0.3 * x.roll(
        1, dims=-1
    )


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("target, theirs_name", [("eps", "epsilon"), ("v", "v_prediction")])
def test_dpm_solver_agrees_with_diffusers_from_equal_noise(name, target, theirs_name, clamp):
    schedule = NoiseSchedule(betas_for(name, 1000))
    options = (
        {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
        if clamp
        else {}
    )
    theirs = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.numpy(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type=theirs_name,
        final_sigmas_type="zero",
        **options,
    )
    start, times = torch.randn(3, 1, 6, 6, generator=seeded()), spaced_timesteps(schedule, 20)
    # there the first division is by 0.006; stay where float32 has digits
    if name == "linear" and target == "eps":
        times = spaced_timesteps(schedule, 25)[5:]
    theirs.set_timesteps(timesteps=times)
    x = start
    for t in theirs.timesteps:
        x = theirs.step(wavy(x, t.expand(3)), t, x).prev_sample
    denoise = Denoiser(wavy, schedule, target, clamp)
    got = last(dpm_solver_sample(denoise, schedule, start.shape, times, start=start))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_stochastic_dpm_solver_agrees_with_diffusers_from_equal_noise(spacing, order):
    """With eta = 1, the sampler is SDE-DPM-Solver++, if both add the same noise at every step."""
    schedule = NoiseSchedule(betas_for("cosine", 1000))
    theirs = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.numpy(),
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        prediction_type="v_prediction",
        final_sigmas_type="zero",
    )
    times = spaced_timesteps(schedule, 20, spacing)
    theirs.set_timesteps(timesteps=times)
    x, rng = torch.randn(3, 1, 6, 6, generator=seeded()), seeded(1)
    start = x
    for t in theirs.timesteps:
        noise = torch.randn(x.shape, generator=rng)
        x = theirs.step(wavy(x, t.expand(3)), t, x, variance_noise=noise).prev_sample
    denoise = Denoiser(wavy, schedule, "v", clamp=False)
    got = ddim_sample(
        denoise, schedule, start.shape, times, 1.0, seeded(1), start=start, order=order
    )
    torch.testing.assert_close(last(got), x, rtol=1e-4, atol=1e-4)


def test_dpm_solver_with_eta_is_ddim_of_second_order_with_eta():
    schedule = make_schedule("cosine", 1000)
    denoise, shape = Denoiser(wavy, schedule, "v"), (2, 1, 4, 4)
    times = spaced_timesteps(schedule, 12, "log_snr")
    got, without = (
        last(dpm_solver_sample(denoise, schedule, shape, 12, seeded(3), eta=eta)) for eta in (1, 0)
    )
    same = last(ddim_sample(denoise, schedule, shape, times, 1.0, seeded(3), order=2))
    assert torch.equal(got, same) and (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [7, 50])
def test_ddim_agrees_with_diffusers_from_equal_noise(name, steps):
    schedule = NoiseSchedule(betas_for(name, 1000))
    theirs = DDIMScheduler(
        trained_betas=schedule.betas.numpy(),
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(steps)
    x = start = torch.randn(3, 1, 6, 6, generator=seeded())
    for t in theirs.timesteps:
        x = theirs.step(wavy(x, t.expand(3)), t, x, use_clipped_model_output=True).prev_sample
    denoise = Denoiser(wavy, schedule)
    got = last(ddim_sample(denoise, schedule, start.shape, theirs.timesteps.tolist(), start=start))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_number_of_dpm_solver_steps_is_spread_in_the_log_snr(name):
    schedule = NoiseSchedule(betas_for(name, 1000))
    denoise, shape = Denoiser(wavy, schedule, "v"), (2, 1, 4, 4)
    times = spaced_timesteps(schedule, 20, "log_snr")

    def states(sample, *steps, **order):
        return list(sample(denoise, schedule, shape, *steps, generator=seeded(3), **order))

    expected = states(dpm_solver_sample, 20)
    assert [t for t, _, _ in expected] == [*times, -1]
    for same in (
        states(dpm_solver_sample),  # 20 is the default
        states(dpm_solver_sample, times),
        states(ddim_sample, times, order=2),
    ):
        for (t, x_t, x0_hat), (same_t, same_x_t, same_x0_hat) in zip(expected, same, strict=True):
            assert t == same_t and torch.equal(x_t, same_x_t) and torch.equal(x0_hat, same_x0_hat)
    for other in (
        states(dpm_solver_sample, spaced_timesteps(schedule, 20)),
        states(ddim_sample, times),
    ):
        assert (other[-1][1] - expected[-1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [0, 51, -3])
def test_dpm_solver_refuses_times_that_the_schedule_has_not(steps):
    schedule = make_schedule("cosine", 50)
    with pytest.raises(ValueError, match=f"steps={steps} is outside 1 … 50"):
        last(dpm_solver_sample(Denoiser(wavy, schedule), schedule, (1, 1, 2, 2), steps))


def test_the_guess_of_the_second_order_is_exact_on_a_line():
    """A guess that is linear in λ is foretold without error, half-way
    between the ends of the step.
    """
    schedule = make_schedule("cosine", 1000)
    lam = schedule.snr().double().log() / 2
    t_before, t, t_next = (torch.tensor([time]) for time in (800, 500, 350))
    on_line = [(0.3 - 0.7 * lam[time]).float().view(1, 1, 1, 1) for time in (800, 500)]
    half_way = 0.3 - 0.7 * (lam[500] + lam[350]) / 2
    got = multistep_guess(schedule, t_before, t, t_next, *on_line)
    torch.testing.assert_close(got.item(), half_way.item(), rtol=1e-5, atol=1e-5)
    assert multistep_guess(schedule, t_before, t, torch.tensor([-1]), *on_line) == on_line[1]


def test_second_order_falls_with_the_square_of_the_steps():
    """Against the probability flow of N(0, λ) in closed form: x grows as the standard deviation
    √(ᾱλ + 1 − ᾱ) does.
    """
    schedule, value = NoiseSchedule(betas_for("cosine", 4000)), 0.25
    denoise = GaussianDenoiser(schedule, torch.zeros(1), torch.full((1, 1), value))
    std = (schedule.alpha_bars * value + 1 - schedule.alpha_bars).sqrt()
    x_T = torch.ones(1, 1, 1, 1)

    def error(sample, steps):
        # the last betas are cut off: one large step
        times = [t for t in spaced_timesteps(schedule, steps) if t < 3900]
        states = {t: x for t, x, _ in sample(denoise, schedule, x_T.shape, times, start=x_T)}
        return abs(states[0] - std[0] / std[times[0]]).item()

    ddim, dpm = (
        [error(sample, steps) for steps in (20, 40, 80)]
        for sample in (ddim_sample, dpm_solver_sample)
    )
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in zip(ddim[:-1], ddim[1:], strict=True))
    assert all(3.3 < coarse / fine < 4.7 for coarse, fine in zip(dpm[:-1], dpm[1:], strict=True))
    assert dpm[-1] < ddim[-1] / 2


# ---- there and back


def test_encoding_and_decoding_come_back_the_closer_the_more_steps():
    schedule = NoiseSchedule(betas_for("cosine", 1000))
    denoise = perfect(schedule)
    x0 = torch.randn(50, 1, 1, 3, generator=seeded()) * 0.4

    def there_and_back(steps):
        *_, (t, x_T, _) = ddim_encode(denoise, schedule, x0, steps)
        assert t == 999
        back = last(ddim_sample(denoise, schedule, x0.shape, steps, start=x_T))
        return (back - x0).square().mean().sqrt().item()

    errors = [there_and_back(steps) for steps in (10, 40, 160, 640)]
    assert (
        all(1.5 < coarse / fine < 5 for coarse, fine in zip(errors[:-1], errors[1:], strict=True))
        and errors[3] < 0.02
    )


def test_encoding_a_gaussian_gives_its_own_noise():
    """The data's standard scores, rotated back: what the probability flow of a Gaussian does,
    whitening.
    """
    schedule = NoiseSchedule(betas_for("cosine", 1000))
    denoise = perfect(schedule)
    z = torch.randn(10_000, 3, generator=seeded(), dtype=torch.float64)
    x0 = (MEAN + z @ torch.linalg.cholesky(COVARIANCE).T).float().view(-1, 1, 1, 3)
    x_T = last(ddim_encode(denoise, schedule, x0, 1000)).flatten(1).double()
    assert x_T.mean(dim=0).abs().max() < 0.05
    assert (torch.cov(x_T.T) - torch.eye(3)).abs().max() < 0.06


# ---- guidance


class Labeled(nn.Module):
    """Answers by label; notes how it was called."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.num_classes) if y is None else y
        self.calls.append((len(x), y.tolist(), self.training))
        return torch.tensor([1.0, 2.0, 4.0, 0.5])[y].view(-1, 1, 1, 1) * x


@pytest.mark.parametrize(
    "scale, expected", [(0.0, [0.5, 0.5]), (1.0, [2.0, 4.0]), (3.0, [5.0, 11.0])]
)
def test_guidance_goes_beyond_the_named_answer(scale, expected):
    """0.5 + scale · (named − 0.5); the paper's w = scale − 1 gives (1 + w)·named − w·free."""
    model, x = Labeled(), torch.ones(2, 1, 1, 1)
    t, y = torch.zeros(2, dtype=torch.long), torch.tensor([1, 2])
    got = Guided(model, scale)(x, t, y).flatten().tolist()
    assert got == pytest.approx(expected)
    w, named, free = scale - 1, torch.tensor([2.0, 4.0]), 0.5
    assert got == pytest.approx(((1 + w) * named - w * free).tolist())


def test_guidance_asks_for_both_answers_in_one_call_in_eval_mode():
    model, schedule = Labeled().train(), make_schedule("cosine", 10)
    y = torch.tensor([0, 2])
    denoise = Denoiser(Guided(model, 2.0), schedule, "v")
    last(ddim_sample(denoise, schedule, (2, 1, 2, 2), 3, y=y, generator=seeded()))
    assert model.calls == [(4, [0, 2, 3, 3], False)] * 3 and model.training
    model.calls.clear()
    Guided(model, 2.0)(torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long))
    assert model.calls == [(2, [3, 3], True)]


def test_guidance_is_the_same_whatever_the_network_predicts():
    """Targets are affine in one another at fixed x_t and t, with one and the same factor, so they
    may be guided as they come.
    """
    schedule = make_schedule("cosine", 50)
    x_t, named, free = torch.randn(3, 4, 1, 2, 2, generator=seeded())
    t = torch.tensor([3, 20, 30, 45])
    mixed = {}
    for target in ("eps", "x0", "v"):
        a, b = (
            training_target(schedule, x0, t, predict_eps(schedule, x_t, t, x0), target)
            for x0 in (named, free)
        )
        mixed[target] = predict_x0(schedule, x_t, t, b + 2.5 * (a - b), target)
    torch.testing.assert_close(mixed["eps"], mixed["x0"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed["v"], mixed["x0"], rtol=1e-3, atol=1e-3)


def test_guidance_needs_a_network_that_knows_labels():
    with pytest.raises(ValueError, match="num_classes=0"):
        Guided(UNet(widths=(8, 8), groups=4, heads=2, time_dim=8), 2.0)


def test_guided_sampling_of_a_real_network(net, tiny):
    cfg = tiny(timesteps=20, num_classes=10)
    model, schedule = net(cfg), make_schedule(**cfg.noise())
    # as built, its residual branches are shut, and no label passes
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    y = torch.arange(4)
    one, two, plain = (
        last(
            ddim_sample(
                Denoiser(network, schedule, "v"), schedule, (4, 1, 8, 8), 5, y=y, generator=seeded()
            )
        )
        for network in (Guided(model, 1.0), Guided(model, 3.0), model)
    )
    assert torch.equal(one, plain) and not torch.allclose(one, two)


class Leaning(nn.Module):
    """1.6·x with a label and 2·x without: guided by 3, 0.8·x."""

    num_classes = 1

    def forward(self, x, t, y=None):
        return torch.tensor([1.6, 2.0])[y].view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_guidance_is_combined_before_the_clamp(target):
    """By hand: guide the answers, take x0_hat from the result, clamp.

    Clamping both x0_hat first gives another image.
    """
    schedule, scale, model = make_schedule("cosine", 50), 3.0, Leaning()
    x_t, t = torch.randn(4, 1, 2, 2, generator=seeded()), torch.tensor([3, 20, 30, 40])
    y, none = torch.zeros_like(t), torch.ones_like(t)
    guided = model(x_t, t, none) + scale * (model(x_t, t, y) - model(x_t, t, none))
    by_hand = predict_x0(schedule, x_t, t, guided, target).clamp(-1, 1)
    got = Denoiser(Guided(model, scale), schedule, target)(x_t, t, y)
    torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-6)
    clamped = Denoiser(model, schedule, target)
    named_x0, free_x0 = clamped(x_t, t, y), clamped(x_t, t, none)
    clamped_first = (free_x0 + scale * (named_x0 - free_x0)).clamp(-1, 1)
    assert (clamped_first - by_hand).abs().max() > 0.1


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_guidance_may_lead_two_images_beyond_the_range_back_into_it(target):
    """2 without the label and 1.5 with it: 2 + 3 · (1.5 − 2) = 0.5.

    Clamped first, both are 1, and so is what guidance makes.
    """
    schedule, t = make_schedule("cosine", 50), torch.tensor([3, 20, 30, 40])
    x_t = torch.randn(4, 1, 2, 2, generator=seeded())
    y = torch.zeros(4, dtype=torch.long)
    free = torch.ones(4).long()

    def image(x, t, y):
        return torch.tensor([1.5, 2.0])[y].view(-1, 1, 1, 1).expand_as(x)

    class Network(nn.Module):
        num_classes = 1

        def forward(self, x, t, y=None):
            return as_network(image, schedule, target)(x, t, y)

    x0_hat = Denoiser(Guided(Network(), 3.0), schedule, target)(x_t, t, y)
    torch.testing.assert_close(x0_hat, torch.full_like(x_t, 0.5), rtol=0, atol=1e-4)
    for label in (y, free):
        clamped = Denoiser(Network(), schedule, target)(x_t, t, label)
        torch.testing.assert_close(clamped, torch.ones_like(x_t), rtol=0, atol=0)


@pytest.mark.parametrize("order", [0, 3, "2"])
def test_an_order_that_is_no_order_is_refused(order):
    schedule = make_schedule("cosine", 20)
    with pytest.raises(ValueError, match=r"order=.* is not known: choose 1 \(DDIM\) or 2"):
        last(ddim_sample(lambda x, t, y: x, schedule, (1, 1, 2, 2), 5, order=order))
