"""The closed-form mathematics against diffusers, against Bayes, and against itself."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_utils.diffusion import (
    Denoiser,
    diffusion_loss,
    p_mean_variance,
    p_sample,
    predict_eps,
    predict_x0,
    q_posterior,
    q_sample,
    training_target,
    velocity,
)
from ddpm_utils.schedules import NoiseSchedule, cosine_betas, linear_betas, make_schedule
from ddpm_utils.training import sample_timesteps

EPS = torch.finfo(torch.float32).eps
BETAS = {"linear": linear_betas, "cosine": cosine_betas}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_TARGET = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIR_VARIANCE = {"beta_tilde": "fixed_small", "beta": "fixed_large"}
T = 1000


def exact(betas):
    """A schedule that stays in float64, so that a formula can be compared to its last digits."""
    schedule = NoiseSchedule(betas)
    schedule.betas, schedule.alphas, schedule.alpha_bars = betas, 1 - betas, (1 - betas).cumprod(0)
    return schedule


def draws(n, dtype=torch.float64, seed=0):
    """x0 in [−1, 1] and eps standard normal, both (n, 1, 2, 3)."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 1, 2, 3, generator=g, dtype=torch.float64) * 2 - 1
    return x0.to(dtype), torch.randn(n, 1, 2, 3, generator=g, dtype=torch.float64).to(dtype)


def column(v):
    return v.view(-1, 1, 1, 1)


# ---- against diffusers


@pytest.mark.parametrize("name", BETAS)
def test_forward_and_velocity_agree_with_diffusers(name):
    """Every t. Their alpha_bars are float32 products of T factors, hence T roundings."""
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=THEIR_SCHEDULE[name])
    schedule, t = make_schedule(name, T), torch.arange(T)
    x0, eps = draws(T, torch.float32)
    tolerance = {"rtol": 0, "atol": T * EPS}
    torch.testing.assert_close(
        q_sample(schedule, x0, t, eps), theirs.add_noise(x0, eps, t), **tolerance
    )
    torch.testing.assert_close(
        velocity(schedule, x0, t, eps), theirs.get_velocity(x0, eps, t), **tolerance
    )


@pytest.mark.parametrize("variance", THEIR_VARIANCE)
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("target", THEIR_TARGET)
@pytest.mark.parametrize("name", BETAS)
def test_reverse_step_agrees_with_diffusers(name, target, clamp, variance):
    """With the same float64 alpha_bars on both sides, so that nothing but the formula is compared;
    noise of the same seed.
    """
    schedule = exact(BETAS[name](T))
    theirs = DDPMScheduler(
        num_train_timesteps=T,
        beta_schedule=THEIR_SCHEDULE[name],
        prediction_type=THEIR_TARGET[target],
        clip_sample=clamp,
        variance_type=THEIR_VARIANCE[variance],
    )
    theirs.alphas_cumprod = schedule.alpha_bars
    x_t, prediction = draws(4, seed=1)[1] * 1.5, draws(4, seed=2)[1]
    for step in (0, 1, 2, 10, T // 2, T - 2, T - 1):
        expected = theirs.step(prediction, step, x_t, generator=torch.Generator().manual_seed(step))
        denoise = Denoiser(lambda x, t, y: prediction, schedule, target, clamp)
        generator = torch.Generator().manual_seed(step)
        x_prev, x0_hat = p_sample(
            denoise, schedule, x_t, torch.full((4,), step), variance, generator
        )
        torch.testing.assert_close(x0_hat, expected.pred_original_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x_prev, expected.prev_sample, rtol=1e-9, atol=1e-9)


# ---- q


@pytest.mark.parametrize("name", BETAS)
def test_one_jump_equals_small_steps(name):
    """Mean and variance of x_t, carried step by step through q(x_t | x_{t−1}) = N(√alpha x_{t−1},
    beta).
    """
    betas = BETAS[name](T)
    schedule, t = exact(betas), torch.arange(T)
    mean, var, means, variances = 1.0, 0.0, [], []
    for beta in betas.tolist():
        mean, var = (1 - beta) ** 0.5 * mean, (1 - beta) * var + beta
        means.append(mean)
        variances.append(var)
    one, zero = torch.ones(T, 1, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.float64)
    signal, noise = q_sample(schedule, one, t, zero), q_sample(schedule, zero, t, one)
    torch.testing.assert_close(
        signal[:, 0], torch.tensor(means, dtype=torch.float64), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        noise[:, 0] ** 2, torch.tensor(variances, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_each_image_gets_its_own_t():
    schedule = make_schedule("linear", T)
    x0, eps = draws(3, torch.float32)
    t = torch.tensor([0, 500, 999])
    together = q_sample(schedule, x0, t, eps)
    for i in range(3):
        assert torch.equal(
            together[i : i + 1], q_sample(schedule, x0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        )


# ---- round trips, at every t


@pytest.mark.parametrize("target", THEIR_TARGET)
@pytest.mark.parametrize("name", BETAS)
def test_prediction_to_x0_at_every_t(name, target):
    """Dividing by √ᾱ makes the rounding of √(1−ᾱ)·eps grow: three digits go at the end of the
    cosine. From v, none do.
    """
    schedule, t = make_schedule(name, T), torch.arange(T)
    x0, eps = draws(T, torch.float32)
    x_t = q_sample(schedule, x0, t, eps)
    error = (
        predict_x0(schedule, x_t, t, training_target(schedule, x0, t, eps, target), target) - x0
    ).abs()
    ab = column(schedule.alpha_bars.double())
    growth = ((1 - ab) / ab).sqrt() if target == "eps" else torch.zeros_like(ab)
    assert (error <= 8 * EPS * (1 + growth)).all()


@pytest.mark.parametrize("target", THEIR_TARGET)
@pytest.mark.parametrize("name", BETAS)
def test_prediction_to_eps_at_every_t(name, target):
    """The prediction → x0 → eps.

    Dividing by √(1−ᾱ) makes the rounding of x_t count most where there is little noise.
    """
    schedule, t = make_schedule(name, T), torch.arange(T)
    x0, eps = draws(T, torch.float32)
    x_t = q_sample(schedule, x0, t, eps)
    x0_hat = predict_x0(schedule, x_t, t, training_target(schedule, x0, t, eps, target), target)
    error = (predict_eps(schedule, x_t, t, x0_hat) - eps).abs()
    assert (error <= 8 * EPS * (1 + 1 / (1 - column(schedule.alpha_bars.double())).sqrt())).all()


def test_v_is_the_derivative_along_the_circle():
    """With √ᾱ = cos φ and √(1−ᾱ) = sin φ, v = d x_t / d φ."""
    schedule, t = exact(cosine_betas(T)), torch.arange(T)
    x0, eps = draws(T)
    phi = column(schedule.alpha_bars.sqrt().acos())
    torch.testing.assert_close(
        velocity(schedule, x0, t, eps), -phi.sin() * x0 + phi.cos() * eps, rtol=1e-9, atol=1e-9
    )


# ---- the posterior


@pytest.mark.parametrize("name", BETAS)
def test_posterior_is_the_product_of_two_gaussians(name):
    """Bayes in closed form: precisions add.

    q(x_{t−1} | x0) = N(√ᾱ' x0, 1 − ᾱ') and q(x_t | x_{t−1}) = N(√α x_{t−1}, β).
    """
    schedule, t = exact(BETAS[name](T)), torch.arange(1, T)
    x0, x_t = (v[:, :, 0, 0] for v in draws(T - 1))
    beta, alpha = schedule.betas[1:, None], schedule.alphas[1:, None]
    ab_prev = schedule.alpha_bars[:-1, None]
    var = 1 / (alpha / beta + 1 / (1 - ab_prev))
    mean = var * (alpha.sqrt() * x_t / beta + ab_prev.sqrt() * x0 / (1 - ab_prev))
    got_mean, got_var = q_posterior(schedule, x0, x_t, t)
    torch.testing.assert_close(got_mean, mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got_var, var, rtol=1e-8, atol=0)


@pytest.mark.parametrize("step", [1, 2, 10, 30, 49])
def test_posterior_is_bayes_on_a_grid(step):
    """Bayes by brute force: multiply the two densities on a grid,
    normalize, and take the moments.
    """
    schedule = exact(cosine_betas(50))
    x0, x_t = 0.6, -0.3
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    alpha = schedule.alphas[step]
    beta = schedule.betas[step]
    ab_prev = schedule.alpha_bars[step - 1]
    log_density = -((grid - ab_prev.sqrt() * x0) ** 2) / (2 * (1 - ab_prev)) - (
        x_t - alpha.sqrt() * grid
    ) ** 2 / (2 * beta)
    weight = log_density.softmax(0)
    mean = (weight * grid).sum()
    var = (weight * (grid - mean) ** 2).sum()
    number = torch.ones(1, 1, dtype=torch.float64)
    got_mean, got_var = q_posterior(schedule, x0 * number, x_t * number, torch.tensor([step]))
    assert got_mean.item() == pytest.approx(mean.item(), abs=1e-8)
    assert got_var.item() == pytest.approx(var.item(), rel=1e-6)


@pytest.mark.parametrize("name", BETAS)
def test_posterior_in_float32(name):
    """1 − ᾱ holds a rounding of ᾱ, eps relative to it: the price of float32, paid where there is
    little noise.
    """
    betas, t = BETAS[name](T), torch.arange(T)
    x0, x_t = draws(T, torch.float32)
    mean, var = q_posterior(NoiseSchedule(betas), x0, x_t, t)
    true_mean, true_var = q_posterior(exact(betas), x0.double(), x_t.double(), t)
    size = x0.abs() + x_t.abs()
    loss = 4 * EPS / (1 - column((1 - betas).cumprod(0)))
    assert ((mean - true_mean).abs() <= loss * size).all()
    later = slice(1, None)  # at t = 0 the variance is 0
    before = 4 * EPS / (1 - column((1 - betas).cumprod(0)))[:-1]
    assert ((var - true_var).abs()[later] <= (loss[later] + before) * true_var[later]).all()


@pytest.mark.parametrize(
    "name, timesteps, scale",
    [("linear", T, 1), ("linear", 100, 10), ("cosine", T, 1), ("cosine", 50, 1)],
)
def test_posterior_at_the_last_step_is_x0_itself(name, timesteps, scale):
    """At t = 0 the answer is x0, without noise: exactly, so that an image
    in [−1, 1] stays there.
    """
    schedule, t = make_schedule(name, timesteps, scale), torch.zeros(4, dtype=torch.long)
    x0, x_t = draws(4, torch.float32)
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    mean, var = q_posterior(schedule, x0, x_t, t)
    assert (var == 0).all()
    assert mean.abs().max() <= 1
    torch.testing.assert_close(mean, x0, rtol=2 * EPS, atol=EPS)


def test_p_takes_its_mean_from_x0_hat_and_offers_two_variances():
    schedule, t = exact(linear_betas(T)), torch.arange(T)
    x0_hat, x_t = draws(T)
    mean, beta_tilde = q_posterior(schedule, x0_hat, x_t, t)
    small_mean, small = p_mean_variance(schedule, x0_hat, x_t, t, "beta_tilde")
    large_mean, large = p_mean_variance(schedule, x0_hat, x_t, t, "beta")
    assert torch.equal(small_mean, mean) and torch.equal(large_mean, mean)
    assert torch.equal(small, beta_tilde) and torch.equal(large, column(schedule.betas))
    assert (small < large).all()


# ---- the reverse step


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_no_noise_at_t_0_and_only_there(variance):
    """In one batch: the image at t = 0 gets the mean, the other one noise."""
    schedule, t = make_schedule("cosine", 50), torch.tensor([0, 20])
    x_t, prediction = draws(2, torch.float32)
    denoise = Denoiser(lambda *_: prediction, schedule, "v")
    first, _ = p_sample(denoise, schedule, x_t, t, variance, torch.Generator().manual_seed(1))
    again, _ = p_sample(denoise, schedule, x_t, t, variance, torch.Generator().manual_seed(2))
    assert torch.equal(first[0], again[0])
    assert not torch.isclose(first[1], again[1]).any()


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_noise_has_the_variance_that_was_asked_for(variance):
    """Standard error of a variance from n normal draws: var · √(2 / n)."""
    schedule, n, step = exact(linear_betas(20, scale=40)), 40_000, 10
    t = torch.full((n,), step)
    x_t = torch.zeros(n, 1, dtype=torch.float64)
    denoise = Denoiser(lambda x, t, y: x, schedule, "x0")
    x_prev, _ = p_sample(denoise, schedule, x_t, t, variance, torch.Generator().manual_seed(0))
    _, var = p_mean_variance(schedule, x_t[:1], x_t[:1], t[:1], variance)
    assert x_prev.var().item() == pytest.approx(var.item(), rel=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize("target", THEIR_TARGET)
def test_clamp_reaches_the_mean(target):
    schedule, t = exact(cosine_betas(50)), torch.full((3,), 30)
    x_t, prediction = 3 * draws(3)[1], 3 * draws(3, seed=5)[1]
    clamped = predict_x0(schedule, x_t, t, prediction, target).clamp(-1, 1)
    denoise = Denoiser(lambda *_: prediction, schedule, target)
    x_prev, x0_hat = p_sample(denoise, schedule, x_t, t, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x0_hat, clamped) and x0_hat.abs().max() == 1
    mean, var = q_posterior(schedule, clamped, x_t, t)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3), dtype=x_t.dtype)
    torch.testing.assert_close(x_prev, mean + var.sqrt() * noise)


def test_reverse_step_hands_labels_on_and_keeps_no_graph():
    schedule, seen = make_schedule("cosine", 10), []
    weight = torch.ones(1, requires_grad=True)

    def model(x, t, y):
        seen.append((t, y))
        return weight * x

    t, y = torch.tensor([3, 4]), torch.tensor([7, 8])
    denoise = Denoiser(model, schedule)
    x_prev, x0_hat = p_sample(denoise, schedule, torch.randn(2, 1, 4, 4), t, y=y)
    assert len(seen) == 1 and seen[0][0] is t and seen[0][1] is y
    assert not x_prev.requires_grad and not x0_hat.requires_grad


def test_reverse_step_of_a_plain_denoiser_is_a_draw_around_its_x0_hat():
    """Any function of (x_t, t, y) will do; nothing is clamped or converted on the way."""
    schedule, t, y = exact(cosine_betas(50)), torch.tensor([5, 30, 49]), torch.tensor([1, 2, 3])
    (x0_hat, x_t), seen = draws(3), []
    x0_hat = 3 * x0_hat

    def denoise(*inputs):
        seen.append(inputs)
        return x0_hat

    x_prev, found = p_sample(denoise, schedule, x_t, t, "beta", torch.Generator().manual_seed(3), y)
    assert (
        found is x0_hat
        and len(seen) == 1
        and all(a is b for a, b in zip(seen[0], (x_t, t, y), strict=True))
    )
    mean, var = p_mean_variance(schedule, x0_hat, x_t, t, "beta")
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3), dtype=x_t.dtype)
    torch.testing.assert_close(x_prev, mean + var.sqrt() * noise)


# ---- from a network to a denoiser


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("target", THEIR_TARGET)
def test_a_denoiser_answers_with_the_x0_hat_that_the_prediction_implies(target, clamp):
    schedule, t = exact(cosine_betas(50)), torch.tensor([0, 10, 30, 49])
    x_t, prediction = 3 * draws(4)[1], 3 * draws(4, seed=5)[1]
    expected = predict_x0(schedule, x_t, t, prediction, target)
    assert expected.abs().max() > 1 > expected.abs().min()
    x0_hat = Denoiser(lambda *_: prediction, schedule, target, clamp)(x_t, t)
    assert torch.equal(x0_hat, expected.clamp(-1, 1) if clamp else expected)


@pytest.mark.parametrize("target", THEIR_TARGET)
def test_a_denoiser_of_a_network_that_knows_all_finds_x0(target):
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x0, eps = draws(50)
    x_t, answer = q_sample(schedule, x0, t, eps), training_target(schedule, x0, t, eps, target)
    x0_hat = Denoiser(lambda *_: answer, schedule, target)(x_t, t)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-9, atol=1e-9)


def test_a_denoiser_s_network_predicts_eps_and_is_clamped_unless_told_otherwise():
    schedule, t = exact(cosine_betas(50)), torch.tensor([0, 10, 30, 49])
    x_t, prediction = 3 * draws(4)[1], 3 * draws(4, seed=5)[1]
    expected = predict_x0(schedule, x_t, t, prediction, "eps").clamp(-1, 1)
    assert torch.equal(Denoiser(lambda *_: prediction, schedule)(x_t, t), expected)


@pytest.mark.parametrize("y", [None, torch.tensor([7, 8])])
def test_a_denoiser_hands_its_network_x_t_t_and_labels(y):
    schedule, seen = make_schedule("cosine", 10), []

    def model(*inputs):
        seen.append(inputs)
        return inputs[0]

    x_t, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 4])
    Denoiser(model, schedule)(x_t, t) if y is None else Denoiser(model, schedule)(x_t, t, y)
    ((first, second, third),) = seen
    assert first is x_t and second is t and third is y


@pytest.mark.parametrize("target", THEIR_TARGET)
def test_no_gradient_passes_a_denoiser(target):
    """And outside of it gradients are as they were."""
    schedule, t = make_schedule("cosine", 10), torch.tensor([3, 4])
    network = torch.nn.Conv2d(1, 1, 1)
    x_t = torch.randn(2, 1, 4, 4, requires_grad=True)
    x0_hat = Denoiser(lambda x, t, y: network(x), schedule, target, clamp=False)(x_t, t)
    assert torch.is_grad_enabled() and network(x_t).requires_grad and not x0_hat.requires_grad


def test_a_denoiser_s_network_is_a_part_of_it():
    """Its parameters and its modes are those of the network."""
    network = torch.nn.Dropout(0.5)
    denoise = Denoiser(network, make_schedule("cosine", 10))
    assert network in set(denoise.modules())
    denoise.eval()
    assert not network.training


# ---- the loss


@pytest.mark.parametrize("target", THEIR_TARGET)
def test_loss_is_the_mean_squared_error_at_x_t(target):
    """A model that answers 0 loses the mean square of its target; one that knows x0 and eps loses
    nothing; both see x_t, t, y.
    """
    schedule, t, y = exact(cosine_betas(T)), torch.tensor([0, 300, 999]), torch.tensor([1, 2, 3])
    x0, eps = draws(3)
    wanted = {"eps": eps, "x0": x0, "v": velocity(schedule, x0, t, eps)}[target]
    seen = []

    def zero(x, t, y=None):
        seen.extend([x, t, y])
        return torch.zeros_like(x)

    loss = diffusion_loss(zero, schedule, x0, t, eps, target, y)
    assert loss.shape == () and loss.item() == pytest.approx((wanted**2).mean().item(), rel=1e-12)
    assert torch.equal(seen[0], q_sample(schedule, x0, t, eps)) and seen[1] is t and seen[2] is y
    assert diffusion_loss(lambda x, t, y: wanted, schedule, x0, t, eps, target).item() == 0


# ---- which t training draws


@pytest.mark.parametrize("n, timesteps", [(10, 10), (40, 10), (4, 1), (1000, 1000)])
def test_a_batch_that_covers_the_range_draws_every_t_equally_often(n, timesteps):
    t = sample_timesteps(n, timesteps, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long and t.shape == (n,)
    assert torch.equal(t.bincount(minlength=timesteps), torch.full((timesteps,), n // timesteps))


@pytest.mark.parametrize("n", [1, 3, 7, 32])
def test_every_t_is_drawn_with_the_same_chance(n):
    """20,000 draws over 10 timesteps; spreading a batch evenly can only make the counts steadier
    than independent draws.
    """
    timesteps, g = 10, torch.Generator().manual_seed(0)
    t = torch.cat([sample_timesteps(n, timesteps, g) for _ in range(20_000 // n)])
    share = t.bincount(minlength=timesteps) / len(t)
    assert len(share) == timesteps
    assert (share - 0.1).abs().max() <= 4 * (0.1 * 0.9 / len(t)) ** 0.5


def test_a_batch_is_spread_evenly_but_its_order_tells_nothing():
    t = sample_timesteps(50, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t.sort().values // 20, torch.arange(50))
    assert not torch.equal(t, t.sort().values)


# ---- bad input


@pytest.mark.parametrize(
    "bad, message",
    [(10, "t holds 10 … 10, .* 0 … 9"), (-1, "t holds -1 … -1, .* 0 … 9"), (1.0, "use torch.long")],
)
def test_every_function_refuses_a_bad_t(bad, message):
    schedule, x, t = make_schedule("cosine", 10), torch.zeros(1, 1, 2, 2), torch.tensor([bad])
    for call in (
        lambda: q_sample(schedule, x, t, x),
        lambda: velocity(schedule, x, t, x),
        lambda: predict_x0(schedule, x, t, x),
        lambda: predict_eps(schedule, x, t, x),
        lambda: q_posterior(schedule, x, x, t),
        lambda: Denoiser(lambda x, t, y: x, schedule)(x, t),
        lambda: p_sample(Denoiser(lambda x, t, y: x, schedule), schedule, x, t),
        lambda: p_sample(lambda x, t, y: x, schedule, x, t),
        lambda: diffusion_loss(lambda x, t, y: x, schedule, x, t, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_refuses_an_unknown_target_or_variance():
    schedule, x, t = make_schedule("cosine", 10), torch.zeros(1, 1, 2, 2), torch.tensor([3])
    for call in (
        lambda: training_target(schedule, x, t, x, "noise"),
        lambda: predict_x0(schedule, x, t, x, "noise"),
        lambda: Denoiser(lambda x, t, y: x, schedule, "noise")(x, t),
        lambda: p_sample(Denoiser(lambda x, t, y: x, schedule, "noise"), schedule, x, t),
        lambda: diffusion_loss(lambda x, t, y: x, schedule, x, t, x, "noise"),
    ):
        with pytest.raises(
            ValueError, match="target='noise' is not known: choose 'eps', 'x0' or 'v'"
        ):
            call()
    for call in (
        lambda: p_mean_variance(schedule, x, x, t, "large"),
        lambda: p_sample(Denoiser(lambda x, t, y: x, schedule), schedule, x, t, "large"),
    ):
        with pytest.raises(
            ValueError, match="variance='large' is not known: choose 'beta_tilde' or 'beta'"
        ):
            call()
