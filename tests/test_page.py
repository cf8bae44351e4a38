"""Lesson 00, the page that stands alone: its size, its mathematics against the package, its copy
as a script.
"""

import ast
import re

import pytest
import torch
from lesson_files import (
    COPIES,
    PAGE,
    ROOT,
    code_cells,
    code_of,
    images_of,
    outputs_of,
    printed,
    read_lesson,
    text_of,
    tool,
)
from torch import nn
from torch.testing import assert_close

from ddpm_utils import diffusion, embeddings, sampling
from ddpm_utils.schedules import NoiseSchedule, cosine_betas


@pytest.fixture(scope="module")
def page():
    """The names that the page defines, with T = 40 and without data; nothing is trained."""
    names = {}
    for cell in code_cells(read_lesson(PAGE)):
        tree = ast.parse(cell.source)
        kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        mathematics = "betas = " in cell.source or "parameters" in cell.metadata.get("tags", [])
        tree.body = [node for node in tree.body if mathematics or isinstance(node, kept)]
        names |= {"device": "cpu"}
        exec(compile(tree, PAGE, "exec"), names)
        if "T" in names:
            names["T"] = 40
    return names


@pytest.fixture
def schedule():
    return NoiseSchedule(cosine_betas(40))


def test_is_one_page():
    notebook = read_lesson(PAGE)
    lines = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    code = [line for line in code_of(notebook).splitlines() if line.strip()]
    assert len(lines) <= 12 and max(lines) <= 25 and len(code) <= 200
    assert len(text_of(notebook).split()) <= 900
    assert "ddpm_utils" not in code_of(notebook)


def test_script_is_the_code_of_the_notebook():
    script = (ROOT / "examples" / "ddpm_on_one_page.py").read_text(encoding="utf-8")
    assert script == tool.script_of(read_lesson(PAGE)), "run `make script`"
    assert ast.dump(ast.parse(code_of(read_lesson(PAGE)))) == ast.dump(
        ast.Module(ast.parse(script).body[1:], type_ignores=[])
    )


def test_schedule_is_the_packages(page, schedule):
    assert torch.equal(page["alpha_bars"], schedule.alpha_bars)


def test_q_sample_is_the_packages(page, schedule):
    x0, eps = torch.randn(2, 5, 1, 4, 4)
    t = torch.tensor([0, 1, 20, 38, 39])
    assert_close(page["q_sample"](x0, t, eps), diffusion.q_sample(schedule, x0, t, eps))


def test_velocity_is_the_packages(page, schedule):
    x0, eps = torch.randn(2, 5, 1, 4, 4)
    t = torch.tensor([0, 1, 20, 38, 39])
    assert_close(page["velocity"](x0, t, eps), diffusion.velocity(schedule, x0, t, eps))


def test_embedding_is_the_packages(page):
    t = torch.arange(1000)
    ours = embeddings.sinusoidal_embedding(t, 128)
    assert_close(page["time_embedding"](t, 128), ours, atol=1e-4, rtol=0)  # float32 of angles


def chain(schedule):
    """A noisy batch, a prediction v of it, and the package's denoiser that predicts it."""
    rng = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 3, 1, 4, 4, generator=rng)
    return x, v, diffusion.Denoiser(lambda x, t, y=None: v, schedule, "v")


@pytest.mark.parametrize(("t", "t_next"), [(39, 30), (20, 19), (5, 0), (3, -1), (0, -1)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_step_is_ddim(page, schedule, t, t_next, eta):
    x, v, denoise = chain(schedule)
    now, after = torch.full((3,), t), torch.full((3,), t_next)
    x0_hat = denoise(x, now)
    torch.manual_seed(5)
    stepped, guess = page["reverse_step"](x, v, t, t_next, eta)
    torch.manual_seed(5)
    expected = sampling.ddim_step(schedule, x, now, after, x0_hat, eta)
    assert_close(guess, x0_hat)
    assert_close(stepped, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("t", [39, 20, 1, 0])
def test_reverse_step_with_all_the_noise_is_ddpm(page, schedule, t):
    """eta = 1 and t_next = t − 1: the posterior of Eq. 6 and 7 with beta-tilde."""
    x, v, denoise = chain(schedule)
    now = torch.full((3,), t)
    torch.manual_seed(5)
    stepped, _ = page["reverse_step"](x, v, t, t - 1, 1.0)
    torch.manual_seed(5)
    expected, _ = diffusion.p_sample(denoise, schedule, x, now, "beta_tilde")
    assert_close(stepped, expected, atol=1e-5, rtol=1e-5)


def test_sampler_calls_the_network_as_often_as_it_says(page):
    class Noise(nn.Module):
        def forward(self, x, t):
            self.times.append(t[0].item())
            return torch.zeros_like(x)

    network = Noise()
    for calls, times in ((1, [39]), (4, [39, 26, 13, 0]), (40, list(range(39, -1, -1)))):
        network.times, page["average"] = [], network
        states = list(page["sample"](2, calls))
        assert network.times == times
        assert [t for t, _, _ in states] == [*times, -1]
        assert torch.equal(states[-1][1], states[-1][2])  # the finished images


def test_network_has_no_idle_part(page):
    torch.manual_seed(0)
    model = page["UNet"]()
    for parameter in model.parameters():  # zero layers would hide what lies before them
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 1, 28, 28)
    early, late = (model(x, torch.full((2,), t)) for t in (3, 30))
    assert early.shape == x.shape and not torch.allclose(early, late)
    early.square().mean().backward()
    idle = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert not idle


def test_executed_copy():
    if not (COPIES / f"{PAGE}.ipynb").is_file():
        pytest.fail("the executed copies are missing: run `make test`, or its nbmake line")
    notebook = read_lesson(PAGE, COPIES)
    assert "FAST MODE" in printed(notebook)
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    images = images_of(notebook)
    assert len(images) == 4 and images[-1][:6] == b"GIF89a"


def test_asset_of_the_first_screen_is_there_and_small():
    (target,) = re.findall(r"!\[[^\]]+\]\((assets/[^)]+)\)", read_lesson(PAGE).cells[0].source)
    assert (tool.NOTEBOOKS / target).stat().st_size <= 300_000
