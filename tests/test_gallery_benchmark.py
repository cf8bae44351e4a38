"""The benchmark of the gallery: contestants against their tutorials, equal noise, memory, and a run
in fast mode that goes on.
"""

import csv
import json

import numpy as np
import pytest
import torch

from benchmarks import gallery as module
from benchmarks import measure
from benchmarks.contestants import Article
from ddpm_utils import evaluation, runtime
from ddpm_utils.diffusion import q_sample
from ddpm_utils.gallery.anime import Attention
from ddpm_utils.schedules import make_schedule

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


def images(n=16):
    return torch.randint(0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- contestants


def test_article_is_the_contestant_of_the_other_benchmark(own_folders):
    one, other = module.CONTESTANTS["article"](images(), 0, CPU), Article(images(), 0, CPU)
    assert (one.batch_size, one.clip, one.average, one.target) == (128, None, None, "eps")
    for made in (one, other):
        made.batch_size = 4
        made.step(0.1)
        made.step(0.9)
    assert torch.equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize(
    ("name", "rates", "batch", "clip", "parameters"),
    [
        ("article", (1e-3, 1e-3), 128, None, 606_852),
        ("guide", (1e-3, 2e-5), 128, 1.0, 8_058_049),
        ("anime", (1e-4, 1e-4), 32, None, 10_846_433),
    ],
)
def test_each_trains_as_its_tutorial_says(
    own_folders,
    name,
    rates,
    batch,
    clip,
    parameters,
):
    made = module.CONTESTANTS[name](images(), 0, CPU)
    assert type(made.optimizer) is torch.optim.Adam and made.average is None
    assert (made.rate(0.0), made.rate(1.0)) == pytest.approx(rates)
    assert (made.batch_size, made.clip, made.target, len(made.schedule)) == (
        batch,
        clip,
        "eps",
        1000,
    )
    assert sum(p.numel() for p in made.model.parameters()) == parameters
    assert made.images.shape[-1] == module.SIZES[name] and made.precision(CPU) == torch.float32


def test_mnist32_sees_images_from_0_to_1_and_averages_from_the_first_step(fast):
    made = module.CONTESTANTS["mnist32"](images(), 0, CPU)
    x = module.data.to_model_range(made.images)
    assert x.shape[-2:] == (32, 32) and 0 <= x.min() < 0.005 and x.max() == 1
    before = weights(made.average)
    made.batch_size = 2
    made.step(0.5)
    torch.testing.assert_close(
        weights(made.average), torch.lerp(before, weights(made.model), 1e-4), rtol=0, atol=1e-7
    )
    assert made.rate(0.3) == pytest.approx(2e-5)


def test_from_zero_holds_the_implied_image_in_0_to_1():
    schedule, t = make_schedule("linear", 1000), torch.tensor([100, 600])
    x0, eps = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    x_t = q_sample(schedule, x0, t, eps)
    denoise = module.FromZero(lambda x, t, y: eps, schedule, clamp=False)
    torch.testing.assert_close(denoise(x_t, t), x0, rtol=0, atol=1e-4)
    x0_hat = module.FromZero(lambda x, t, y: 3 * eps, schedule, clamp=False)(x_t, t)
    assert x0_hat.min() == 0 and x0_hat.max() == 1


# --- measuring


def test_multiply_adds_of_attention_are_counted_in_full():
    n, c = 64, 16
    counted = module.multiply_adds(OnlyAttention(c), (c, 8, 8), CPU)
    assert counted == 4 * n * c**2 + 2 * n**2 * c


class OnlyAttention(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attention = Attention(channels)

    def forward(self, x, t):
        return self.attention(x)


def test_a_training_step_is_three_answers(own_folders):
    made = module.for_the_stopwatch("article", "common", CPU)
    one = module.multiply_adds(made.model, (1, 28, 28), CPU)
    trained = measure.flops_per_image(made.model, (1, 28, 28), CPU)
    assert 2.9 * 2 * one < trained <= 3 * 2 * one  # the first layer owes its input no gradient


def test_everybody_is_timed_at_the_published_size_and_at_a_common_one(own_folders):
    sizes = {
        (name, s): tuple(module.random_images(name, s, CPU).shape[1:])
        for name in module.NAMES
        for s in ("published", "common")
    }
    assert sizes["anime", "published"] == (3, 48, 48) and sizes["mnist32", "published"] == (
        1,
        32,
        32,
    )
    assert all(shape == (1, 28, 28) for (_, setting), shape in sizes.items() if setting == "common")
    assert module.for_the_stopwatch("guide", "common", CPU).images.shape[1:] == (1, 32, 32)
    for name in ("ours", "article"):
        assert module.for_the_stopwatch(name, "common", CPU).batch_size == module.COMMON_BATCH


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(fast):
    held = torch.zeros(2**28)  # a gigabyte here is no business of the child's
    used, by = module.memory_of("article", "common", CPU)
    assert held.numel() and 2**20 < used < 2**30 and "fresh process" in by


def test_the_noise_is_the_same_for_small_and_large_canvases(fast, monkeypatch):
    starts = {}
    monkeypatch.setattr(
        module.sampling,
        "ddim_sample",
        lambda denoise, schedule, shape, steps, start: iter([(-1, start, start)]),
    )
    for name in ("article", "guide"):
        made = module.CONTESTANTS[name](images(), 0, CPU)
        starts[name] = module.draw_images(made, 5, 28)
    assert starts["article"].shape == (5, 1, 28, 28) and torch.equal(
        starts["article"], starts["guide"]
    )


# --- the run


def test_a_run_from_the_shell_writes_measures_and_goes_on(fast, monkeypatch, capsys):
    """Digits, one turn each, two small networks on the stopwatch; given again, nothing is measured
    twice.
    """
    monkeypatch.setattr(module, "NAMES", ("ours", "article"))
    monkeypatch.setattr(module, "memory_of", lambda name, setting, device: (2**20, "nobody"))
    monkeypatch.setattr(module, "flops_per_image", lambda *args: 1.0)
    monkeypatch.setattr(
        "benchmarks.recipes.pretrained.obtain_classifier",
        lambda *args: evaluation.Classifier().eval(),
    )
    load = measure.data.load_images
    monkeypatch.setattr(
        measure.data, "load_images", lambda *args: load(*args, say=False).first(100)
    )
    command = ["--contestants", "ours", "--minutes", "0.002", "--device", "cpu"]
    module.main(command)
    out = runtime.output_dir("benchmarks") / "gallery_cpu.jsonl"
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    steps, drawn = rows[:4], rows[4:]
    assert {(r["contestant"], r["setting"]) for r in steps} == {
        (n, s) for n in module.NAMES for s in ("published", "common")
    }
    assert all(
        r["images_per_second"] > 0 and r["multiply_adds"] > 0 and r["memory"] == 2**20
        for r in steps
    )
    assert [r["contestant"] for r in drawn] == ["ours"] and drawn[0]["distance"] >= 0 < drawn[0][
        "floor"
    ]
    assert str(fast) not in json.dumps(rows)
    with np.load(out.with_suffix(".npz")) as file:
        assert (
            list(file) == ["ours"]
            and file["ours"].shape == (8, 1, 28, 28)
            and file["ours"].dtype == np.uint8
        )
    assert out.with_suffix(".png").is_file() and not list(out.parent.glob("*.part*"))
    with open(out.with_suffix(".csv"), encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == set(module.COLUMNS)
    assert [row["distance"] for row in table if row["contestant"] == "article"] == [
        "",
        "",
        "not measured",
    ]
    assert "| article | | | not measured | |" in capsys.readouterr().out
    module.main(command)
    assert out.read_text(encoding="utf-8").count("\n") == len(rows)
    assert not list(runtime.checkpoint_dir("benchmarks").rglob("*.pt"))


def test_results_of_another_machine_are_refused(fast, monkeypatch):
    out = runtime.output_dir("benchmarks") / "gallery_cpu.jsonl"
    row = {"what": "step"} | measure.machine(CPU, "scikit-learn's digits") | {"machine": "another"}
    out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="name another file"):
        module.main(["--device", "cpu"])


def test_report_without_results(fast, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.gallery"):
        module.report(tmp_path / "nothing.jsonl")
