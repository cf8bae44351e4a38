"""The exact denoisers against Bayes in float64, against brute force, and against their own promised
loss.
"""

import math

import pytest
import torch
from networks import as_network

from ddpm_utils.diffusion import Denoiser, diffusion_loss, predict_eps, q_sample, velocity
from ddpm_utils.oracle import DataDenoiser, GaussianDenoiser, MixtureDenoiser, fit_gaussian
from ddpm_utils.schedules import NoiseSchedule, cosine_betas, linear_betas, make_schedule

TARGETS = ["eps", "x0", "v"]


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


def exact(betas):
    """A schedule that stays in float64, so that a formula can be compared to its last digits."""
    schedule = NoiseSchedule(betas)
    schedule.betas, schedule.alphas, schedule.alpha_bars = betas, 1 - betas, (1 - betas).cumprod(0)
    return schedule


def gaussian(d=4, seed=0):
    """A mean and a full covariance in float64, one direction of it flat."""
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, d - 1, generator=g, dtype=torch.float64) * 0.4
    return torch.randn(d, generator=g, dtype=torch.float64) * 0.3, factor @ factor.T


def draw(mean, covariance, n, seed=1):
    values, vectors = torch.linalg.eigh(covariance)
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=mean.dtype)
    return mean + (z * values.clamp(min=0).sqrt()) @ vectors.T


def test_x0_hat_is_the_conditional_mean():
    """Bayes for jointly normal x0 and x_t, at every t: m + Cov(x0, x_t) Cov(x_t)⁻¹ (x_t − E x_t),
    solved and not decomposed.
    """
    mean, cov = gaussian()
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = torch.randn(50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = []
    for ab, x in zip(schedule.alpha_bars, x_t, strict=True):
        cov_x_t = ab * cov + (1 - ab) * torch.eye(4, dtype=torch.float64)
        expected.append(mean + ab.sqrt() * cov @ torch.linalg.solve(cov_x_t, x - ab.sqrt() * mean))
    got = GaussianDenoiser(schedule, mean, cov)(x_t.view(50, 1, 2, 2), t)
    assert got.shape == (50, 1, 2, 2)
    torch.testing.assert_close(got.flatten(1), torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [0, 10, 25, 49])
def test_x0_hat_is_the_posterior_mean_by_brute_force(step):
    """Two pixels, the prior on a grid, each point weighted by the likelihood of x_t: no matrix
    anywhere.
    """
    mean = torch.tensor([0.2, -0.4], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    schedule = exact(linear_betas(50, scale=20))
    x_t = torch.tensor([[0.7, -0.1]], dtype=torch.float64)
    axis = torch.linspace(-5, 5, 1201, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    ab = schedule.alpha_bars[step]
    determinant = 0.5 * 0.3 - 0.2**2
    a, b = (x0 - mean).T
    log_prior = -(0.3 * a**2 - 0.4 * a * b + 0.5 * b**2) / (2 * determinant)
    log_likelihood = -((x_t - ab.sqrt() * x0) ** 2).sum(1) / (2 * (1 - ab))
    expected = (log_prior + log_likelihood).softmax(0) @ x0
    got = GaussianDenoiser(schedule, mean, cov)(x_t, torch.tensor([step]))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-6)


def test_no_linear_change_of_the_prediction_does_better():
    """The error of the conditional mean is uncorrelated with x_t: correlations of n pairs stay
    within a few 1 / √n.
    """
    mean, cov = gaussian()
    schedule, n = exact(cosine_betas(50)), 20_000
    x0, t = draw(mean, cov, n), torch.full((n,), 20)
    eps = torch.randn(n, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_t = q_sample(schedule, x0, t, eps)
    error = GaussianDenoiser(schedule, mean, cov)(x_t, t) - x0
    correlation = torch.corrcoef(torch.cat([error, x_t], dim=1).T)[:4, 4:]
    assert correlation.abs().max() < 4.5 / n**0.5


def test_what_x0_hat_leaves_is_the_conditional_mean_of_the_noise_and_of_v():
    """Bayes for eps and x_t: √(1 − ā) Cov(x_t)⁻¹ (x_t − E x_t); v is made of this and of E[x0 |
    x_t].
    """
    mean, cov = gaussian()
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = torch.randn(50, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x0_mean, eps_mean = [], []
    for ab, x in zip(schedule.alpha_bars, x_t, strict=True):
        cov_x_t = ab * cov + (1 - ab) * torch.eye(4, dtype=torch.float64)
        whitened = torch.linalg.solve(cov_x_t, x - ab.sqrt() * mean)
        x0_mean.append(mean + ab.sqrt() * cov @ whitened)
        eps_mean.append((1 - ab).sqrt() * whitened)
    x0_mean, eps_mean = torch.stack(x0_mean), torch.stack(eps_mean)
    model = GaussianDenoiser(schedule, mean, cov)
    eps_hat = predict_eps(schedule, x_t, t, model(x_t, t))
    torch.testing.assert_close(eps_hat, eps_mean, rtol=1e-8, atol=1e-8)
    for target, expected in (
        ("eps", eps_mean),
        ("x0", x0_mean),
        ("v", velocity(schedule, x0_mean, t, eps_mean)),
    ):
        answer = as_network(model, schedule, target)(x_t, t)
        torch.testing.assert_close(answer, expected, rtol=1e-8, atol=1e-8)


def test_the_log_density_is_that_of_x_t_up_to_a_constant():
    """Here the constant is ½·D·ln 2π, the same at every t."""
    mean, cov = gaussian()
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model = GaussianDenoiser(schedule, mean, cov)
    x0_hat, log_density = model.posterior(x_t, t)
    assert torch.equal(x0_hat, model(x_t, t)) and log_density.shape == (50,)
    ab = schedule.alpha_bars[:, None]
    covs = ab[..., None] * cov + (1 - ab)[..., None] * torch.eye(4, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(ab.sqrt() * mean, covs).log_prob(
        x_t.flatten(1)
    )
    constant = torch.full((50,), 2 * math.log(2 * math.pi), dtype=torch.float64)
    torch.testing.assert_close(log_density - expected, constant, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", [0, 15, 35, 49])
def test_promised_loss_is_the_measured_loss(target, step):
    """Standard error from the spread of the n squared errors themselves."""
    mean, cov = gaussian()
    schedule, n = exact(cosine_betas(50)), 20_000
    model = GaussianDenoiser(schedule, mean, cov)
    network = as_network(model, schedule, target)
    x0, t = draw(mean, cov, n), torch.full((n,), step)
    eps = torch.randn(n, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = {"eps": eps, "x0": x0, "v": velocity(schedule, x0, t, eps)}[target]
    squares = ((network(q_sample(schedule, x0, t, eps), t) - wanted) ** 2).mean(1)
    loss = diffusion_loss(network, schedule, x0, t, eps, target)
    assert loss.item() == pytest.approx(squares.mean().item(), rel=1e-9)
    assert model.loss(target)[step].item() == pytest.approx(
        squares.mean().item(), abs=4.5 * squares.std().item() / n**0.5
    )


def test_loss_has_one_value_a_timestep_and_its_known_ends():
    """Unit variance: every linear guess is equally good for v; x0 is lost at the end and eps at the
    start.
    """
    schedule = make_schedule("cosine", 1000)
    model = GaussianDenoiser(schedule, torch.zeros(3), torch.eye(3))
    torch.testing.assert_close(model.loss("v"), torch.ones(1000))
    torch.testing.assert_close(model.loss("x0"), 1 - schedule.alpha_bars)
    torch.testing.assert_close(model.loss("eps"), schedule.alpha_bars)
    assert torch.equal(model.loss(), model.loss("eps"))


def test_fit_takes_mean_and_covariance_from_images():
    schedule, mean, cov = make_schedule("cosine", 50), *gaussian()
    images = draw(mean, cov, 500).float().view(500, 1, 2, 2)
    fitted = fit_gaussian(schedule, images)
    flat = images.flatten(1).double()
    by_hand = GaussianDenoiser(
        schedule,
        flat.mean(0).float(),
        (flat - flat.mean(0)).T.mm(flat - flat.mean(0)).float() / 499,
    )
    x_t, t = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(6)), torch.arange(50)
    torch.testing.assert_close(fitted(x_t, t), by_hand(x_t, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.mean, flat.mean(0).float())


@pytest.mark.parametrize("n", [2, 20, 200])
def test_fit_takes_fewer_images_than_pixels(n):
    """Flat directions are the rule in images (a black border); their eigenvalues are 0 up to
    rounding, on either side of it.
    """
    images = torch.randn(n, 1, 12, 12, generator=torch.Generator().manual_seed(n)).clamp(-1, 1)
    images[..., :2] = -1
    schedule = make_schedule("cosine", 50)
    x0_hat = fit_gaussian(schedule, images)(torch.randn(5, 1, 12, 12), torch.arange(0, 50, 10))
    torch.testing.assert_close(x0_hat[..., :2], -torch.ones(5, 1, 12, 2), rtol=0, atol=0.01)


def test_data_of_a_single_image_is_found_at_once():
    """Without variance there is nothing to guess."""
    schedule = make_schedule("cosine", 50)
    image = torch.tensor([0.1, -0.2, 0.3])
    model = GaussianDenoiser(schedule, image, torch.zeros(3, 3))
    t = torch.arange(50)
    torch.testing.assert_close(model(torch.randn(50, 3), t), image.expand(50, 3))
    assert (model.loss("eps") == 0).all()


@pytest.mark.parametrize(
    "covariance, message",
    [
        (torch.eye(2), r"symmetric of shape \(3, 3\) to go with 3 means, got \(2, 2\)"),
        (torch.ones(3), r"symmetric of shape \(3, 3\) to go with 3 means, got \(3,\)"),
        (torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]), "must be symmetric"),
        (
            torch.diag(torch.tensor([1.0, -0.5, 1.0])),
            "eigenvalue -0.5: variances cannot be negative",
        ),
    ],
)
def test_refuses_what_is_no_covariance(covariance, message):
    with pytest.raises(ValueError, match=message):
        GaussianDenoiser(make_schedule("cosine", 10), torch.zeros(3), covariance)


def test_refuses_an_unknown_target():
    schedule = make_schedule("cosine", 10)
    model = GaussianDenoiser(schedule, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="target='noise' is not known: choose 'eps', 'x0' or 'v'"):
        Denoiser(model, schedule, "noise")(torch.zeros(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="target='noise' is not known: choose 'eps', 'x0' or 'v'"):
        model.loss("noise")


@pytest.mark.parametrize(
    "t, message",
    [(torch.tensor([10]), "t holds 10 … 10, .* 0 … 9"), (torch.tensor([1.0]), "use torch.long")],
)
def test_refuses_a_bad_t(t, message):
    model = GaussianDenoiser(make_schedule("cosine", 10), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 2), t)


# ---- a mixture


def mixture():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([[-0.8, 0.1], [0.5, 0.6], [0.3, -0.7]], dtype=torch.float64)
    factors = (
        torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.25
    )
    return weights, means, factors @ factors.mT + 0.01 * torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 10, 25, 49])
def test_the_mixture_s_guess_is_the_posterior_mean_by_brute_force(step):
    """The density of the mixture on a grid of x0, each point weighed by the likelihood of x_t."""
    weights, means, covariances = mixture()
    schedule = exact(cosine_betas(50))
    x_t = torch.tensor([[0.7, -0.1], [-0.9, 0.4]], dtype=torch.float64)
    axis = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    parts = [
        torch.distributions.MultivariateNormal(m, c).log_prob(x0)
        for m, c in zip(means, covariances, strict=True)
    ]
    log_prior = torch.logsumexp(torch.stack(parts) + weights.log()[:, None], dim=0)
    ab = schedule.alpha_bars[step]
    expected = []
    for x in x_t:
        log_likelihood = -((x - ab.sqrt() * x0) ** 2).sum(1) / (2 * (1 - ab))
        expected.append((log_prior + log_likelihood).softmax(0) @ x0)
    got = MixtureDenoiser(schedule, weights, means, covariances)(x_t, torch.full((2,), step))
    # At step 0 the noise, 0.0064 wide, is little more than a cell of the grid.
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-3 if step == 0 else 1e-5)


def test_a_mixture_of_one_is_a_gaussian():
    mean, cov = gaussian()
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one = MixtureDenoiser(schedule, torch.ones(1, dtype=torch.float64), mean[None], cov[None])
    # A division by √(1 − ā), 0.04 or more, makes eps of it: what holds here holds for eps to 1e-7.
    expected = GaussianDenoiser(schedule, mean, cov)(x_t, t)
    torch.testing.assert_close(one(x_t, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weights": torch.tensor([0.5, 0.6])}, "sum to 1"),
        ({"weights": torch.tensor([1.5, -0.5])}, "positive"),
        ({"means": torch.zeros(3, 2)}, "2 weights go with means"),
        ({"covariances": torch.eye(3).expand(2, 3, 3)}, "2 weights go with means"),
        ({"covariances": -torch.eye(2).expand(2, 2, 2)}, "variances cannot be negative"),
    ],
)
def test_refuses_what_is_no_mixture(change, words):
    good = {
        "weights": torch.tensor([0.5, 0.5]),
        "means": torch.zeros(2, 2),
        "covariances": torch.eye(2).expand(2, 2, 2),
    }
    with pytest.raises(ValueError, match=words):
        MixtureDenoiser(make_schedule("cosine", 10), **(good | change))


# ---- a finite set


def test_the_data_denoiser_is_bayes_over_the_images():
    schedule, rng = exact(cosine_betas(50)), torch.Generator().manual_seed(3)
    images = torch.rand(6, 1, 3, 3, generator=rng, dtype=torch.float64) * 2 - 1
    x_t, t = torch.randn(50, 1, 3, 3, generator=rng, dtype=torch.float64), torch.arange(50)
    model = DataDenoiser(schedule, images)
    for step in (0, 20, 49):
        ab = schedule.alpha_bars[step]
        likelihoods = (
            torch.distributions.Normal(ab.sqrt() * images, (1 - ab).sqrt())
            .log_prob(x_t[step])
            .flatten(1)
            .sum(1)
        )
        shares = likelihoods.softmax(0)
        torch.testing.assert_close(
            model.shares(x_t[step : step + 1], t[step : step + 1])[0], shares
        )
        expected = torch.einsum("n,nchw->chw", shares, images)
        torch.testing.assert_close(model(x_t[step : step + 1], t[step : step + 1])[0], expected)


def test_the_data_denoiser_is_a_mixture_of_points():
    """Gaussians that shrink to their means leave the same answers."""
    schedule, rng = exact(cosine_betas(50)), torch.Generator().manual_seed(3)
    images = torch.rand(5, 1, 1, 2, generator=rng, dtype=torch.float64) * 2 - 1
    x_t, t = torch.randn(40, 1, 1, 2, generator=rng, dtype=torch.float64), torch.arange(10, 50)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    points = torch.zeros(5, 2, 2, dtype=torch.float64)
    limit = MixtureDenoiser(schedule, weights, images.flatten(1), points)
    torch.testing.assert_close(
        DataDenoiser(schedule, images)(x_t, t), limit(x_t, t), rtol=1e-8, atol=1e-8
    )


def test_no_other_answer_has_a_smaller_loss_on_the_images():
    """Brute force over scalings and shifts of the guess, on the training images themselves."""
    schedule, rng = exact(cosine_betas(50)), torch.Generator().manual_seed(3)
    images = torch.rand(4, 2, generator=rng, dtype=torch.float64) * 2 - 1
    x0, t = images[torch.randint(4, (40_000,), generator=rng)], torch.full((40_000,), 25)
    x_t = q_sample(schedule, x0, t, torch.randn(x0.shape, generator=rng, dtype=torch.float64))
    guess = DataDenoiser(schedule, images)(x_t, t)
    best = (guess - x0).square().mean()
    for factor, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.05), (1.0, -0.05)):
        assert (factor * guess + shift - x0).square().mean() > best


def test_the_data_denoiser_refuses_bytes():
    with pytest.raises(ValueError, match="expected at least one float image"):
        DataDenoiser(make_schedule("cosine", 10), torch.zeros(3, 1, 2, 2, dtype=torch.uint8))


# ---- all of them behind a network


def oracles(schedule):
    """One denoiser of each kind, for images of 1×1×2 pixels in float64."""
    points = torch.tensor([[-0.9, 0.2], [0.4, 0.8], [1.0, -1.0]], dtype=torch.float64)
    return {
        "gaussian": GaussianDenoiser(schedule, *gaussian(2)),
        "mixture": MixtureDenoiser(schedule, *mixture()),
        "data": DataDenoiser(schedule, points.view(3, 1, 1, 2)),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "data"])
def test_a_network_that_answers_for_an_oracle_gives_its_x0_hat_back(kind, target):
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = 3 * torch.randn(
        50, 1, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    oracle = oracles(schedule)[kind]
    x0_hat, network = oracle(x_t, t), as_network(oracle, schedule, target)
    found = Denoiser(network, schedule, target, clamp=False)(x_t, t)
    torch.testing.assert_close(found, x0_hat, rtol=1e-9, atol=1e-9)
    assert kind == "data" or (x0_hat.abs() > 1).any()
    clamped = Denoiser(network, schedule, target)(x_t, t)
    torch.testing.assert_close(clamped, x0_hat.clamp(-1, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "data"])
def test_oracles_ignore_labels(kind):
    schedule, t = exact(cosine_betas(50)), torch.arange(50)
    x_t = torch.randn(50, 1, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    oracle = oracles(schedule)[kind]
    assert torch.equal(oracle(x_t, t, torch.arange(50) % 10), oracle(x_t, t))
