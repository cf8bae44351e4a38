"""The sinusoidal embedding against diffusers, against its formula in float64, and its two geometric
properties.
"""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ddpm_utils.embeddings import TimeEmbedding, sinusoidal_embedding

EPS = torch.finfo(torch.float32).eps


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


@pytest.mark.parametrize("dim", [2, 4, 32, 128])
@pytest.mark.parametrize("max_period", [10_000, 100])
def test_agrees_with_diffusers(dim, max_period):
    """Sines first, and frequencies that stop one short of 1 / max_period: downscale_freq_shift=0,
    as in the Transformer.
    """
    t = torch.arange(1000)
    theirs = get_timestep_embedding(
        t, dim, flip_sin_to_cos=False, downscale_freq_shift=0, max_period=max_period
    )
    # An angle of up to 1000 carries a few roundings of the frequency.
    torch.testing.assert_close(
        sinusoidal_embedding(t, dim, max_period), theirs, rtol=0, atol=4 * EPS * 1000
    )


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_is_the_formula_in_float64(dim):
    t = torch.tensor([0, 1, 17, 999])
    i = torch.arange(dim // 2, dtype=torch.float64)
    angles = t[:, None] * 10_000 ** (-2 * i / dim)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(
        sinusoidal_embedding(t, dim).double(), expected, rtol=0, atol=4 * EPS * 1000
    )


def test_dot_product_depends_on_the_distance_only():
    """e(t) · e(t + k) = Σ cos(k · w_i), for every t."""
    e = sinusoidal_embedding(torch.arange(200), 64).double()
    products = e @ e.T
    w = 10_000 ** (-torch.arange(32, dtype=torch.float64) / 32)
    for k in (0, 1, 5, 50, 150):
        expected = torch.full((200 - k,), (k * w).cos().sum().item(), dtype=torch.float64)
        torch.testing.assert_close(products.diagonal(k), expected, rtol=0, atol=64 * 4 * EPS * 200)


@pytest.mark.parametrize("dim", [2, 32, 128])
def test_norm_is_the_same_at_every_t(dim):
    """Every pair of a sine and a cosine has length 1."""
    norms = sinusoidal_embedding(torch.arange(1000), dim).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((1000,), (dim / 2) ** 0.5), rtol=8 * EPS, atol=0)


def test_no_two_timesteps_look_alike():
    e = sinusoidal_embedding(torch.arange(1000), 128)
    distance = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(1000)
    assert distance.min() > 0.5


def test_range_dtype_and_fractions():
    e = sinusoidal_embedding(torch.tensor([0.0, 0.5, 999.0]), 32)
    assert e.dtype == torch.float32 and e.shape == (3, 32) and e.abs().max() <= 1
    assert e[1, 0].item() == pytest.approx(torch.tensor(0.5).sin().item())
    assert torch.equal(e[0], torch.cat([torch.zeros(16), torch.ones(16)]))


@pytest.mark.parametrize("dim, try_", [(7, 8), (1, 2), (0, 2), (-4, 2)])
def test_refuses_a_dim_that_holds_no_pairs(dim, try_):
    with pytest.raises(ValueError, match=rf"dim={dim} must be even and at least 2.*try {try_}$"):
        sinusoidal_embedding(torch.arange(3), dim)


def test_time_embedding_refuses_an_odd_dim_when_it_is_built():
    with pytest.raises(ValueError, match="dim=33 must be even"):
        TimeEmbedding(33)


def test_time_embedding_is_two_layers_over_the_sinusoid():
    layer, t = TimeEmbedding(16), torch.tensor([0, 3, 500])
    first, _, second = layer.mlp
    h = sinusoidal_embedding(t, 16) @ first.weight.T + first.bias
    expected = (h * h.sigmoid()) @ second.weight.T + second.bias
    torch.testing.assert_close(layer(t), expected)
    layer(t).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
