"""The benchmarks of lesson 03: their networks differ only in what they name, and both go on."""

import ast
import inspect
import json

import pytest
import torch
from lesson_files import code_of, definitions, read_lesson
from torch import nn

from benchmarks import unet_parts, unet_view
from ddpm_utils import runtime
from ddpm_utils.config import TrainConfig
from ddpm_utils.schedules import make_schedule
from ddpm_utils.unet import ResBlock

pytestmark = pytest.mark.usefixtures("same_numbers_every_time")
SMALL = TrainConfig(widths=(8, 12), blocks=1, attention_levels=(1,), time_dim=16)


def rows_of(stem: str) -> list[dict]:
    out = runtime.output_dir("benchmarks") / f"{stem}_cpu.jsonl"
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_parts_writes_measures_and_goes_on(fast, capsys):
    unet_parts.main(["--device", "cpu", "--seeds", "0"])
    rows = rows_of("unet_parts")
    assert [row["network"] for row in rows] == list(unet_parts.NETWORKS)
    assert all(len(row["error"]) == len(unet_parts.NOISE_STD) for row in rows)
    unet_parts.main(["--device", "cpu", "--seeds", "0", "1"])
    assert len(rows_of("unet_parts")) == 2 * len(unet_parts.NETWORKS)
    assert "| skips zeroed |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another machine or setting"):
        unet_parts.main(["--device", "cpu", "--steps", "4"])


def test_view_writes_measures_and_goes_on(fast, capsys):
    unet_view.main(["--device", "cpu", "--seeds", "0"])
    n = len(unet_view.variants(SMALL)) * len(unet_view.NORMS)
    assert len(rows_of("unet_view")) == n
    assert all(0 <= row["share"] <= 1 for row in rows_of("unet_view"))
    unet_view.main(["--device", "cpu", "--seeds", "0", "1"])
    assert len(rows_of("unet_view")) == 2 * n
    assert "| all levels |" in capsys.readouterr().out


@pytest.mark.parametrize("module", [unet_parts, unet_view])
def test_report_without_results_says_what_to_run(module, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"python -m {module.__name__}"):
        module.report(tmp_path / "none.jsonl")


def test_lesson_defines_the_same():
    """Names, numbers and the zeroed skips; the rest of the lesson is shorter than the benchmark."""
    lesson = definitions(code_of(read_lesson("03_unet")))
    (in_lesson,), (in_benchmark,) = (
        found["zero_skips"] for found in (lesson, definitions(inspect.getsource(unet_parts)))
    )
    assert ast.dump(ast.Module(in_lesson.body[1:], [])) == ast.dump(
        ast.Module(in_benchmark.body[1:], [])
    )
    code = code_of(read_lesson("03_unet"))
    assert f"LEVELS = {unet_parts.NOISE_STD}" in code
    assert f"PLAY_STEPS = {unet_parts.STEPS} " in code
    assert all(f'"{name}"' in code for name in unet_parts.NETWORKS)


def test_networks_of_a_seed_start_from_the_same_weights():
    nets = {name: unet_parts.build(name, SMALL, seed=3) for name in unet_parts.NETWORKS}
    weights = {name: net.state_dict() for name, net in nets.items()}
    for name in ("skips zeroed", "no attention"):
        for key, value in weights[name].items():
            assert torch.equal(value, weights["as built"][key])
    assert weights["skips zeroed"].keys() == weights["as built"].keys()
    assert not any("attention" in key for key in weights["no attention"])
    # the attention adds nothing before the first step: one function, with and without it
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 99])
    for net in nets.values():
        nn.init.constant_(net.head.weight, 0.1)
    answer = {name: net(x, t) for name, net in nets.items()}
    torch.testing.assert_close(answer["no attention"], answer["as built"])
    assert not torch.allclose(answer["skips zeroed"], answer["as built"])


def test_zeroed_skips_do_not_reach_the_way_up():
    net = unet_parts.build("skips zeroed", SMALL, seed=0)
    for block in (module for module in net.modules() if isinstance(module, ResBlock)):
        block.conv2.reset_parameters()
    h, emb = torch.randn(2, 12, 4, 4), torch.randn(2, 16)
    skips = [torch.randn(2, 8, 4, 4), torch.randn(2, 12, 4, 4)]
    zeros = [torch.zeros_like(skip) for skip in skips]
    assert torch.equal(net.ups[-1](h, emb, skips), net.ups[-1](h, emb, zeros))
    assert not skips[0].any()  # what the fine level reads next


def test_batches_and_errors_depend_on_the_seed_alone():
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    schedule = make_schedule("linear", 100, scale=10)
    first, again = (
        unet_parts.noisy_batch(images, schedule, 4, torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # a fresh network answers zero, so its error is the mean square of the noise
    net = unet_parts.build("as built", SMALL, seed=0)
    values = unet_parts.errors(net, images, schedule, seed=0)
    assert torch.equal(values, unet_parts.errors(net, images, schedule, seed=0))
    assert (values - 1).abs().max() < 0.35  # 512 numbers: about five standard errors


def test_fixed_statistics_change_the_gradient_and_not_the_value():
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(2, 4, 5, 5) + 1).requires_grad_()
    fixed = unet_view.FixedStatistics(norm)
    torch.testing.assert_close(fixed(x), norm(x), rtol=0, atol=1e-5)
    # one output depends on its own input alone once the statistics are fixed
    (through,) = torch.autograd.grad(norm(x)[0, 0, 2, 2], x)
    (alone,) = torch.autograd.grad(fixed(x)[0, 0, 2, 2], x)
    assert (through[0, :2] != 0).all()
    assert alone.count_nonzero() == 1 and alone[0, 0, 2, 2] != 0


@pytest.mark.parametrize("norms", unet_view.NORMS)
def test_view_is_a_share_of_every_input(norms):
    net = unet_view.build(SMALL, norms, seed=0)
    kinds = [type(module) for module in net.modules()]
    assert (nn.GroupNorm in kinds) == (norms != "removed")
    assert (unet_view.FixedStatistics in kinds) == (norms == "fixed statistics")
    seen = unet_view.view(net, timesteps=100, seed=0)
    assert seen.shape == (28, 28) and (seen >= 0).all()
    torch.testing.assert_close(seen.sum(), torch.tensor(1.0))


def test_variants_are_as_deep_as_their_names_say():
    blocks = {}
    for name, changes in unet_view.variants(SMALL).items():
        net = unet_view.build(SMALL.replace(**changes), "as built", seed=0)
        blocks[name] = sum(isinstance(module, ResBlock) for module in net.modules())
    assert blocks["fine level, as deep"] == blocks["all levels"] == blocks["all, with attention"]
    assert blocks["fine level alone"] == blocks["all levels"] / 2
    # of 28 pixels, 14 - 10 = 4 on one side and 3 on the other are far from the middle
    assert unet_view.far_away().sum() == 28**2 - 21**2
