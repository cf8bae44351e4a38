"""The optimizer: matrices that move by directions, everything else as in AdamW."""

import pytest
import torch

from ddpm_utils import optimizer as module


@pytest.mark.parametrize("shape", [(32, 288), (64, 64), (128, 36), (3, 16, 48)])
def test_orthogonalize_keeps_the_directions_and_levels_the_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = module.orthogonalize(x)
    diagonal = u.mT @ got @ vh.mT  # the same singular vectors: nothing off the diagonal
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.median() > 0.65 and values.max() < 1.25


def test_orthogonalize_does_not_see_the_scale():
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        module.orthogonalize(1e3 * x), module.orthogonalize(1e-3 * x), rtol=1e-3, atol=1e-4
    )


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(6, 8, 1), torch.nn.SiLU(), torch.nn.Conv2d(8, 6, 1))


class AsMatrices(torch.nn.Module):
    """The same two layers with weights that are matrices, which is all that
    PyTorch's Muon takes.
    """

    def __init__(self):
        super().__init__()
        self.own = torch.nn.ParameterList(
            weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()
            for weight in two_layers().parameters()
        )

    def forward(self, x):
        w1, b1, w2, b2 = self.own
        x = torch.nn.functional.silu(x.flatten(1) @ w1.T + b1) @ w2.T + b2
        return x[..., None, None]


def descend(model, optimizer, steps=5):
    for step in range(steps):
        x = torch.randn(32, 6, 1, 1, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_muon_moves_matrices_as_pytorch_does_and_vectors_as_adamw_does():
    ours, theirs = two_layers(), AsMatrices()
    optimizer = module.Muon(ours, lr=0.01, weight_decay=0.1)
    matrices = [weight for weight in theirs.parameters() if weight.ndim == 2]
    vectors = [weight for weight in theirs.parameters() if weight.ndim == 1]
    reference = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.1),
    ]

    class Both:
        def zero_grad(self):
            theirs.zero_grad()

        def step(self):
            for part in reference:
                part.step()

    start = [weight.detach().clone() for weight in ours.parameters()]
    descend(ours, optimizer)
    descend(theirs, Both())
    for before, a, b in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        moved = (a - before).norm()
        assert moved > 0.01
        # PyTorch iterates in bfloat16, of 8 binary digits
        assert (a - b.view_as(a)).norm() < 0.03 * moved


def test_muon_learns_and_resumes_bit_for_bit(tmp_path):
    whole, first = two_layers(), two_layers()
    a, b = module.Muon(whole, lr=0.02), module.Muon(first, lr=0.02)
    start = descend(two_layers(), module.Muon(two_layers(), lr=1e-6), steps=1)
    assert descend(whole, a, 60) < 0.5 * start
    descend(first, b, 20)
    torch.save([first.state_dict(), b.state_dict()], tmp_path / "half.pt")
    second = two_layers()
    c = module.Muon(second, lr=0.02)
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    second.load_state_dict(weights)
    c.load_state_dict(state)
    descend(first, b, 7)
    descend(second, c, 7)
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)
