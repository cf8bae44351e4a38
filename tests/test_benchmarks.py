"""The benchmark: contestants against what they claim to be, the clock, resuming, equal noise and n,
and the table.
"""

import contextlib
import functools
import json
import math
import time

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants, measure, profile_step, recipes, results
from benchmarks.contestants import (
    CHOICES,
    CONTESTANTS,
    Article,
    Diffusers,
    DiffusersNetwork,
    Ours,
    Paper,
    Sketch,
    Training,
)
from benchmarks.sketch import Sketch as SketchNetwork
from ddpm_utils import evaluation, runs, runtime, training
from ddpm_utils.config import TrainConfig
from ddpm_utils.diffusion import q_sample

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("same_numbers_every_time")


def images(n=64, size=28):
    return torch.randint(0, 256, (n, 1, size, size), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def contestant(name, n=64, seed=0):
    made = CONTESTANTS[name](images(n), seed, CPU)
    if name != "ours":
        made.batch_size = min(made.batch_size, 4)
    return made


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the sketch


def test_the_sketch_has_its_size_and_its_work():
    model = SketchNetwork()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.62
    assert measure.flops_per_image(model, (1, 28, 28), CPU) == pytest.approx(0.23e9, rel=0.05)


def test_the_sketch_is_frozen():
    """Weights from a formula, an input from a formula, and the answer as it was on the day the file
    was written.
    """
    model = SketchNetwork()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                (torch.arange(p.numel(), dtype=torch.float64).square() * 0.7 + i)
                .sin()
                .view(p.shape)
                * 0.1
            )
    x = (torch.arange(2 * 784, dtype=torch.float64) * 0.11).sin().view(2, 1, 28, 28)
    y = model(x.float(), torch.tensor([3, 700])).detach().double()
    assert y.shape == x.shape
    found = [y.mean().item(), y.std().item(), y[0, 0, 5, 7].item(), y[1, 0, 20, 3].item()]
    assert found == pytest.approx([0.0049982, 0.0928536, -0.0414364, -0.0678524], rel=1e-3)


def test_the_sketch_starts_at_zero_and_is_told_the_time():
    model, x, t = SketchNetwork(), torch.randn(2, 1, 28, 28), torch.tensor([0, 500])
    assert not model(x, t).any()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    assert not torch.allclose(model(x, t), model(x, t + 100), atol=1e-4)


def test_the_sketch_attends_once_at_7_by_7_with_four_heads(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append(q.shape) or v,
    )
    SketchNetwork()(torch.zeros(2, 1, 28, 28), torch.zeros(2).long())
    assert seen == [(2, 4, 49, 16)]


def test_rate_average_and_batch_of_the_sketch():
    made = Sketch(images(128), 0, CPU)
    made.steps = 0
    assert made.rate(0.0) == pytest.approx(2e-5)
    made.steps = 5000
    found = [made.rate(p) for p in (0.1, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([2e-3, 2e-3, 2e-3 * 0.51, 2e-3 * 0.02])
    assert (made.batch_size, made.target, made.clip, made.optimizer.defaults["weight_decay"]) == (
        64,
        "v",
        None,
        0.0,
    )
    # of the new weights in the average, at update n
    for n, share in ((0, 0.9), (9, 9 / 19), (5000, 0.01)):
        made.steps = n
        for p in made.average.parameters():
            p.zero_()
        made.step(0.0)
        torch.testing.assert_close(weights(made.average), share * weights(made.model))


# --- the peers


def test_unet2dmodel_is_the_one_of_3_7_million_parameters():
    model = DiffusersNetwork()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 3.7
    attends = [
        any("Attention" in type(m).__name__ for m in block.modules())
        for block in model.net.down_blocks
    ]
    assert attends == [False, True, False]
    assert tuple(model.net.config.block_out_channels) == (32, 64, 128)


def test_diffusers_sees_the_noise_of_its_own_scheduler(own_folders):
    made, theirs = contestant("diffusers"), DDPMScheduler(num_train_timesteps=1000)
    x0 = torch.randn(5, 1, 28, 28)
    eps = torch.randn(5, 1, 28, 28)
    t = torch.tensor([0, 1, 100, 700, 999])
    torch.testing.assert_close(
        q_sample(made.schedule, x0, t, eps), theirs.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5
    )


def test_diffusers_follows_the_cosine_rate_of_its_tutorial():
    made = contestant("diffusers")
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3)
    theirs = get_cosine_schedule_with_warmup(optimizer, 50, 1000)
    for step in range(1000):
        if step:
            assert made.rate(step / 1000) == pytest.approx(
                theirs.get_last_lr()[0], rel=1e-6, abs=1e-9
            ), step
        optimizer.step()
        theirs.step()
    assert 0 < made.rate(0.0) < 1e-4 and (Diffusers.batch_size, Diffusers.clip) == (16, 1.0)
    assert type(made.optimizer) is torch.optim.AdamW and made.average is None


def test_article_trains_as_published(own_folders):
    made = Article(images(), 0, CPU)
    group = made.optimizer.param_groups[0]
    assert type(made.optimizer) is torch.optim.Adam
    assert (made.rate(0.0), made.rate(1.0), group["weight_decay"], made.batch_size) == (
        1e-3,
        1e-3,
        0,
        128,
    )
    assert (made.clip, made.average, made.target, made.constant, len(made.schedule)) == (
        None,
        None,
        "eps",
        True,
        1000,
    )
    assert sum(p.numel() for p in made.model.parameters()) == 606_852
    torch.testing.assert_close(made.schedule.betas, torch.linspace(1e-4, 0.02, 1000))


def test_articles_sampler_is_the_published_formula(fast):
    """x ← (x − (1 − α)/√(1 − ᾱ)·ε)/√α + √β·z, nothing clamped, no noise at the end."""
    made, rng = contestant("article"), torch.Generator().manual_seed(5)
    states = [x for _, x, _ in made.own_sample((2, 1, 28, 28), torch.Generator().manual_seed(5))]
    s, x = made.schedule, torch.randn(2, 1, 28, 28, generator=rng)
    for i, t in enumerate(reversed(range(len(s)))):
        torch.testing.assert_close(states[i], x, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            eps = made.model(x, torch.full((2,), t))
        noise = torch.randn(2, 1, 28, 28, generator=rng)
        alpha, alpha_bar, beta = s.alphas[t], s.alpha_bars[t], s.betas[t]
        x = (x - (1 - alpha) / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt() + (
            t > 0
        ) * beta.sqrt() * noise
    torch.testing.assert_close(states[-1], x, rtol=1e-3, atol=1e-3)


def test_peers_multiply_in_float32_whatever_the_package_does_on_this_cpu(fast, monkeypatch):
    monkeypatch.setattr(
        runtime, "autocast", lambda device: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    seen = {}
    for name in ("sketch", "article", "ours"):
        made = contestant(name)
        layer = next(m for m in made.model.modules() if isinstance(m, nn.Conv2d))
        layer.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.dtype})
        )
        made.step(0.1)
        assert seen[name] == made.precision(CPU)
    assert seen == {"sketch": torch.float32, "article": torch.float32, "ours": torch.bfloat16}
    assert Diffusers.precision(CPU) == torch.float32
    in_half = Ours.describe(CPU, False)
    monkeypatch.setattr(runtime, "autocast", lambda device: contextlib.nullcontext())
    assert Ours.describe(CPU, False) != in_half


def test_only_the_article_brings_a_sampler_and_a_constant_rate():
    own = [name for name, kind in CONTESTANTS.items() if kind.own_sample is not Training.own_sample]
    assert own == [name for name, kind in CONTESTANTS.items() if kind.constant] == ["article"]


# --- ours


def test_ours_is_the_packages_own_training_bit_for_bit(fast):
    """Were the clock to run as evenly as the steps, the benchmark and `runs.train` would make the
    same weights.
    """
    made = contestant("ours", 640)
    state = training.TrainState(made.cfg, contestant("ours", 640).model)
    total = made.cfg.steps(640)
    for record in runs.train(state, images(640)):
        assert record.total == total == 20
        made.step(record.step / total - 1 / total)
    assert torch.equal(weights(made.model), weights(state.model))
    assert torch.equal(weights(made.network()), weights(state.ema.model))
    assert not torch.equal(weights(made.model), weights(made.network()))


def test_ours_is_the_default_and_paper_three_words_away(own_folders):
    cfg = Ours.config(CPU)
    assert cfg == TrainConfig()
    assert Paper.config(CPU) == cfg.replace(
        schedule="linear", target="eps", timestep_draw="uniform"
    )
    assert Ours.config(torch.device("cuda")) == TrainConfig(**contestants.preset_for("cuda"))


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_takes_back_one_thing(own_folders, monkeypatch, name):
    default, other = Ours.config(CPU).to_dict(), CHOICES[name].config(CPU).to_dict()
    changed = {field for field in default if default[field] != other[field]}
    assert (
        changed <= {"lr", "decay_from", "optimizer"}
        if name == "adamw"
        else len(changed) == (name != "float32")
    )
    monkeypatch.setattr(contestants, "package_precision", lambda device: torch.bfloat16)
    assert CHOICES[name].describe(CPU, False) != Ours.describe(CPU, False)


def test_the_contestant_in_float32_multiplies_in_float32(fast, monkeypatch):
    monkeypatch.delenv("DDPM_FLOAT32")
    monkeypatch.setattr(runtime, "_cpu_features", lambda: {"avx512_bf16": True})
    kinds = {}
    for name in ("ours", "float32"):
        made = contestant(name)
        made.model.stem.register_forward_hook(
            lambda m, x, y, name=name: kinds.update({name: y.dtype})
        )
        made.step(0.5)
    assert kinds == {"ours": torch.bfloat16, "float32": torch.float32}


def test_the_rate_of_ours_follows_the_clock(own_folders, monkeypatch):
    made, seen = contestant("ours"), []
    monkeypatch.setattr(training, "draw_batch", lambda run, images: (None, None, None, None))
    monkeypatch.setattr(
        training,
        "train_step",
        lambda model, optimizer, *rest: seen.append(optimizer.param_groups[0]["lr"]),
    )
    cfg = made.cfg
    for made.steps, progress in (
        (0, 0.0),
        (1, 0.5),
        (9_000, 0.015),
        (9_000, 0.5),
        (9_000, 1.0),
        (18_000, 0.5),
    ):
        made.step(progress)
    rise = training.learning_rate(0, 10**9, cfg)
    assert seen[0] == rise <= cfg.lr and seen[2] == pytest.approx(cfg.lr, rel=1e-4)
    assert seen[4] == pytest.approx(cfg.lr * cfg.lr_floor, rel=1e-6)
    assert seen[3] == pytest.approx(training.learning_rate(5000, 10_000, cfg))
    # twice as fast a machine, the same rate at the same time
    assert seen[5] == pytest.approx(seen[3])


# --- every contestant


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_saved_contestant_goes_on_exactly(fast, name, tmp_path):
    whole = contestant(name)
    whole.step(0.1)
    whole.seconds, whole.warm_up_seconds = 1.5, 0.5
    recipes.save(whole.state(), tmp_path / "state.pt")
    for _ in range(2):
        whole.step(0.4)
    again = contestant(name)
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (again.steps, again.seconds, again.warm_up_seconds) == (1, 1.5, 0.5)
    for _ in range(2):
        again.step(0.4)
    assert torch.equal(weights(whole.model), weights(again.model))
    assert torch.equal(weights(whole.network()), weights(again.network()))


@pytest.mark.parametrize("name", ["ours", "sketch"])
def test_warming_up_leaves_no_trace(fast, name):
    made, plain = contestant(name), contestant(name)
    made.warm_up()
    assert (made.steps, made.seconds) == (0, 0.0) and made.warm_up_seconds > 0
    for one in (made, plain):
        one.step(0.0)
    assert torch.equal(weights(made.model), weights(plain.model))
    assert torch.equal(weights(made.network()), weights(plain.network()))


@pytest.mark.slow
def test_compiled_ours_is_ours(fast, monkeypatch):
    """The wiring of --compile with the backend that traces but generates no code: same weights, and
    a warm-up without trace.
    """
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: real(model, backend="aot_eager"))
    plain, compiled = contestant("ours"), Ours(images(), 0, CPU, compiled=True)
    compiled.warm_up()
    for made in (plain, compiled):
        made.step(0.0)
        made.step(0.5)
    assert compiled.forward is not compiled.model and compiled.warm_up_seconds > 0
    torch.testing.assert_close(weights(compiled.model), weights(plain.model))
    torch.testing.assert_close(weights(compiled.network()), weights(plain.network()))
    assert Ours.describe(CPU, True) != Ours.describe(CPU, False)


@pytest.mark.parametrize("name", ["ours", "sketch", "article"])
def test_seeds_make_different_runs_and_the_same_seed_the_same(fast, name):
    one, same, other = (contestant(name, seed=seed) for seed in (0, 0, 1))
    for made in (one, same, other):
        made.step(0.1)
    assert torch.equal(weights(one.model), weights(same.model))
    assert not torch.equal(weights(one.model), weights(other.model))


def test_every_pass_sees_each_image_once(fast):
    made = contestant("article", n=12)
    for _ in range(2):
        seen = torch.cat([made.draw() for _ in range(3)])
        assert sorted(seen.tolist()) == list(range(12))


class Sleeper(Training):
    """A contestant whose step sleeps; its one weight counts the steps."""

    pace, batch_size = 0.004, 1
    settings = "sleeper"
    log: list = []

    def build(self):
        return nn.Conv2d(1, 1, 1)

    def make_optimizer(self):
        return torch.optim.SGD(self.model.parameters(), lr=1.0)

    def step(self, progress):
        self.log.append((type(self).__name__, progress))
        time.sleep(self.pace)
        self.steps += 1
        with torch.no_grad():
            self.model.bias += 1


class Steady(Sleeper):
    constant = True

    def own_sample(self, shape, rng):
        return iter([(0, torch.zeros(shape), None)])


def test_the_clock_runs_in_turns_alone(fast):
    made = Sleeper(images(), 0, CPU)
    Sleeper.log.clear()
    made.turn(0.1, 0.05)
    after = made.seconds
    assert 0.05 <= after < 0.05 + 0.5
    time.sleep(0.05)
    assert made.seconds == after
    made.turn(0.1, 0.1)
    assert 0.1 <= made.seconds < 0.1 + 0.5
    progress = [p for _, p in Sleeper.log]
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1
    assert made.steps == len(progress) <= made.seconds / Sleeper.pace


# --- the run


@pytest.fixture
def bench(fast, monkeypatch):
    """Builds a Bench of sleepers with a metric that looks at nothing; keyword arguments go to the
    Bench.
    """
    monkeypatch.setitem(CONTESTANTS, "ours", Sleeper)
    monkeypatch.setitem(CONTESTANTS, "article", Steady)
    monkeypatch.setattr(recipes, "draw_images", lambda made, n, own: (n, own, made.seconds))
    monkeypatch.setattr(recipes, "flops_per_image", lambda *args: 1e6)
    monkeypatch.setattr(
        runtime, "shrink", lambda full, fast: 0.02 if full == recipes.TURN else fast
    )

    class FrechetMetric:
        def __init__(self, *args):
            pass

        def distance(self, images):
            return 10.0

        def floor(self, n):
            return 100.0 / n

    monkeypatch.setattr(recipes, "FrechetMetric", FrechetMetric)
    Sleeper.log.clear()

    def build(plan, n=8):
        return recipes.Bench(
            plan, fast / "results.jsonl", n, CPU, False, "python -m benchmarks.recipes"
        )

    return build


PLAN = {"ours": {0.06: [0, 1], 0.12: [0]}, "article": {0.06: [0], 0.12: [0]}}


def test_contestants_take_turns_until_all_stand_at_the_mark(bench):
    bench(PLAN).run()
    names = [name for name, _ in Sleeper.log]
    switches = sum(a != b for a, b in zip(names[:-1], names[1:], strict=True))
    assert switches >= 6  # one after the other there would be three
    rows = results.read_rows(bench(PLAN).out)
    assert [row["mark"] for row in rows] == sorted(row["mark"] for row in rows)
    found = {
        (row["contestant"], row["mark"], row["seed"], row["sampler"], row["n"]) for row in rows
    }
    assert found == {
        ("ours", 0.06, 0, "common", 8),
        ("ours", 0.06, 1, "common", 8),
        ("ours", 0.12, 0, "common", 8),
        ("article", 0.06, 0, "common", 8),
        ("article", 0.12, 0, "common", 8),
        ("article", 0.06, 0, "own", 2),
        ("article", 0.12, 0, "own", 2),
    }
    assert len(rows) == len(found)
    for row in rows:
        assert row["mark"] <= row["seconds"] < row["mark"] + 0.5
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert row["floor"] == 100 / row["n"]


def test_a_falling_rate_starts_afresh_for_each_mark_and_a_constant_one_goes_on(bench):
    bench(PLAN).run()
    starts = [name for name, progress in Sleeper.log if progress == 0]
    assert starts.count("Sleeper") == 3 and starts.count("Steady") == 1
    # nothing is left of finished runs
    assert not list(runtime.checkpoint_dir("benchmarks").rglob("*.pt"))


def test_what_is_done_is_not_done_again(bench):
    bench(PLAN).run()
    Sleeper.log.clear()
    bench(PLAN).run()
    assert Sleeper.log == []
    bench(PLAN | {"ours": {0.06: [2]}}).run()
    assert {name for name, _ in Sleeper.log} == {"Sleeper"}


def test_an_interrupted_run_goes_on_from_its_last_turn(bench, monkeypatch):
    plan, step = {"ours": {0.2: [0]}}, Sleeper.step

    def stop_late(self, progress):
        if progress > 0.5:
            raise KeyboardInterrupt
        step(self, progress)

    monkeypatch.setattr(Sleeper, "step", stop_late)
    with pytest.raises(KeyboardInterrupt):
        bench(plan).run()
    monkeypatch.setattr(Sleeper, "step", step)
    Sleeper.log.clear()
    one = bench(plan)
    one.run()
    assert Sleeper.log[0][1] > 0.3
    assert one.rows[0]["steps"] > len(Sleeper.log)


def test_what_was_left_of_another_mark_is_not_gone_on_with(bench, monkeypatch):
    """Its learning rate was on the way to another end."""

    def stop(self):
        raise KeyboardInterrupt

    # looked at after the first turn has been saved
    monkeypatch.setattr(Sleeper, "is_finite", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        bench({"ours": {0.1: [0]}}).run()
    monkeypatch.delattr(Sleeper, "is_finite")
    assert len(list(runtime.checkpoint_dir("benchmarks").rglob("*.pt"))) == 1
    Sleeper.log.clear()
    bench({"ours": {0.2: [0]}}).run()
    assert Sleeper.log[0][1] == 0


def test_a_cut_between_two_samplers_repeats_only_the_second(bench, monkeypatch):
    plan, draw = {"article": {0.05: [0]}}, recipes.draw_images

    def stop(made, n, own):
        if own:
            raise KeyboardInterrupt
        return draw(made, n, own)

    monkeypatch.setattr(recipes, "draw_images", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(plan).run()
    monkeypatch.setattr(recipes, "draw_images", draw)
    Sleeper.log.clear()
    bench(plan).run()
    assert Sleeper.log == []
    assert [row["sampler"] for row in results.read_rows(bench(plan).out)] == ["common", "own"]


def test_another_recipe_or_n_is_measured_again_and_another_machine_refused(bench, monkeypatch):
    plan = {"ours": {0.02: [0]}}
    bench(plan).run()
    bench(plan, n=16).run()
    assert [row["n"] for row in results.read_rows(bench(plan).out)] == [8, 16]
    monkeypatch.setattr(Sleeper, "settings", "another sleeper")
    bench(plan).run()
    assert len(bench(plan).rows) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(SystemExit, match="--out"):
        bench(plan)


def test_what_cannot_be_measured_is_refused_before_any_training(bench, monkeypatch):
    with pytest.raises(SystemExit, match="--n 298: .* 297"):
        bench(PLAN, n=298)
    monkeypatch.setattr(runtime, "shrink", lambda full, fast: full)
    # no Fashion-MNIST anywhere
    monkeypatch.setattr(recipes.data, "_from_folders", lambda *args: None)
    with pytest.raises(SystemExit, match="Fashion-MNIST was not found"):
        bench(PLAN)
    assert Sleeper.log == []


def test_a_run_that_diverges_is_a_result_and_holds_nobody_up(bench, monkeypatch):
    def explode(self, progress):
        with torch.no_grad():
            self.model.bias.fill_(math.nan)
        time.sleep(0.01)
        self.steps += 1

    monkeypatch.setattr(Sleeper, "step", explode)
    one = bench({"ours": {0.1: [0]}})
    one.run()
    assert one.rows[0]["distance"] is None and one.rows[0]["seconds"] < 0.1
    assert "| diverged |" in results.report(one.out)


def test_the_plan_measures_what_it_should(own_folders):
    assert set(recipes.PLAN) == set(CONTESTANTS) - set(CHOICES)
    assert set(recipes.CHOICES_PLAN) == {"ours", *CHOICES}
    assert recipes.choose(recipes.CHOICES_PLAN, ["ours"], None, None) == {"ours": {120: [0, 1, 2]}}
    assert recipes.PLAN["ours"][300] == recipes.PLAN["sketch"][300] == [0, 1, 2]
    for slow in ("article", "diffusers"):
        assert set(recipes.PLAN[slow]) == {300, 600}
    for mark in (60, 120, 300, 600):
        assert all(mark in recipes.PLAN[name] for name in ("ours", "paper", "sketch"))
    assert recipes.choose(recipes.PLAN, None, None, None) == recipes.PLAN
    assert recipes.choose(recipes.PLAN, ["ours"], [5, 7], None) == {
        "ours": {300: [0, 1, 2], 420: [0]}
    }
    assert recipes.choose(recipes.PLAN, ["ours"], [2, 2.5], None) == {"ours": {120: [0], 150: [0]}}
    assert recipes.choose(recipes.PLAN, ["sketch"], [5], [4]) == {"sketch": {300: [4]}}


# --- the metric


def test_floor_and_distance_at_any_n(fast, monkeypatch):
    monkeypatch.setattr(
        recipes.pretrained, "obtain_classifier", lambda *args: evaluation.Classifier().eval()
    )
    train_set, test_set = (
        recipes.data.load_images("digits", split, say=False) for split in ("train", "test")
    )
    metric = recipes.FrechetMetric(train_set.first(300), test_set.first(100), CPU)
    draws = metric.real[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    expected = [
        evaluation.frechet_distance(draws[i : i + 30], metric.reference) for i in (0, 30, 60)
    ]
    assert metric.floor(30) == pytest.approx(sum(expected) / 3)
    # the smaller the sample, the larger its own error
    assert metric.floor(10) > metric.floor(30) > metric.floor(100)
    assert metric.distance(train_set.images[:300]) == pytest.approx(0, abs=1e-4)
    assert metric.distance(255 - test_set.images[:100]) > metric.distance(test_set.images[:100])
    with pytest.raises(ValueError, match="n=101 .* 100 test images"):
        metric.floor(101)


def answer_zero(met, module, args, out):
    met.append(args[0])
    return torch.zeros_like(out)


def test_every_contestant_meets_the_same_noise_and_shows_its_average(fast):
    met = {}
    for name in ("ours", "paper", "article", "sketch"):
        made = contestant(name)
        for p in made.model.parameters():
            p.data.fill_(math.nan)  # the raw weights are never asked where there is an average
        shown = made.model if name == "article" else made.average
        hook = shown.register_forward_hook(functools.partial(answer_zero, met.setdefault(name, [])))
        found = recipes.draw_images(made, 5, own=False, batch=3)
        hook.remove()
        assert found.shape == (5, 1, 28, 28) and found.dtype == torch.uint8
    calls = len(met["ours"]) // 2
    for name, inputs in met.items():
        assert [len(x) for x in inputs] == [3] * calls + [2] * calls
        assert torch.equal(inputs[0], met["ours"][0]) and torch.equal(
            inputs[calls], met["ours"][calls]
        ), name
    assert not torch.equal(met["ours"][0][:2], met["ours"][calls])


# --- measuring


def test_work_of_a_known_network():
    """Forward and backward of two convolutions: the gradient of the first one's input is nobody's
    business.
    """

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, x, t, y=None):
            return self.b(self.a(x))

    one = 2 * 8 * 9 * 28 * 28
    assert measure.flops_per_image(Two(), (1, 28, 28), CPU) == 2 * one + 3 * one


def test_attention_is_counted():
    """Two products of 49 × 49 × 64 forward; backward each takes two more."""
    model = SketchNetwork()
    whole = measure.flops_per_image(model, (1, 28, 28), CPU)
    model.attention = nn.Identity()
    convs = 3 * 2 * 49 * 64 * (192 + 64)
    assert (
        whole - measure.flops_per_image(model, (1, 28, 28), CPU) == 3 * 2 * 2 * 49 * 49 * 64 + convs
    )


def test_the_peak_is_that_of_a_real_product(own_folders, monkeypatch):
    """A clock that ticks once a reading: eight products, a second each."""
    ticks = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setenv("DDPM_FAST", "1")
    assert measure.matrix_peak(CPU, torch.float32) == 2 * 128**3


# --- the table


def row(
    name,
    mark,
    distance,
    seed=0,
    n=1000,
    sampler="common",
    **more,
):
    return {
        "contestant": name,
        "mark": mark,
        "seed": seed,
        "n": n,
        "sampler": sampler,
        "distance": distance,
        "calls": 50,
        "floor": 2.5,
        "seconds": mark,
        "warm_up_seconds": 0.0,
        "steps": 10,
        "images": 640,
        "images_per_second": 500.0,
        "parameters": 12_345,
        "flops_per_image": 2e8,
        "precision": "float32",
        "peak_flops": 2e11,
        "settings": "s",
        "date": "2026-01-02",
        "command": "python -m benchmarks.recipes",
        "device": "CPU",
        "machine": "M",
        "threads": 2,
        "torch": "2",
        "data": "Fashion-MNIST",
        "fast": False,
    } | more


ROWS = [
    row("ours", 60, 90.0),
    row("sketch", 60, 180.0),
    row("sketch", 300, 60.0),
    row("ours", 300, 25.0),
    row("ours", 300, 20.0, seed=1),
    row("ours", 300, 40.0, seed=2),
    row("article", 300, 500.0),
    row("article", 300, 700.0, n=250, sampler="own", floor=10.0, calls=1000),
    row("ours", 300, 21.0, n=4000, floor=1.0),
]


def test_the_table_shows_medians_ranges_and_multiples_of_the_floor_at_equal_n(tmp_path):
    out = tmp_path / "results.jsonl"
    for one in ROWS:
        results.append(out, one)
    text = results.report(out)
    assert (
        "| ours | 12,345 | 500 | 200 | 50% float32 | 90.0 (36.0×) | 25.0 (10.0×) [20.0 … 40.0, 3 "
        "seeds] |" in text
    )
    assert "| sketch | 12,345 | 500 | 200 | 50% float32 | 180.0 (72.0×) | 60.0 (24.0×) |" in text
    assert "| article | 12,345 | 500 | 200 | 50% float32 |  | 500.0 (200.0×) |" in text
    assert "| article | 12,345 | 500 | 200 | 50% float32 | 700.0 (70.0×) |" in text
    assert "share of the distance of sketch: 0.50 at 1 min, 0.42 at 5 min" in text
    assert "the sketch's 60.0 of 5 min: ours is there at 5 min" in text
    assert "the sketch's 180.0 of 1 min: ours is there at 1 min" in text
    at_4000, at_1000, own = text.split("## ")[1:]
    assert "n = 4,000" in at_4000 and "| ours" in at_4000 and "sketch" not in at_4000
    assert "n = 1,000" in at_1000 and "21.0 (" not in at_1000
    assert "n = 250" in own and "1000 calls" in own and "floor 10.00" in own
    assert "200 GFLOP/s in float32" in text and "not Inception" in text
    assert out.with_suffix(".md").read_text() == text
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + len(ROWS) and lines[1].startswith("ours,60,0,common,1000,90.0,2.5")
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_line_cut_short_loses_nothing_else(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    results.append(out, ROWS[0])
    out.write_text(out.read_text() + json.dumps(ROWS[1])[:30])
    results.append(out, ROWS[2])
    assert results.read_rows(out) == [ROWS[0], ROWS[2]]
    assert "cut short" in capsys.readouterr().out


def test_only_the_latest_recipe_and_the_latest_of_two_results_count():
    rows = [row("ours", 60, 9.0), row("ours", 300, 5.0), row("sketch", 60, 7.0)]
    rows += [row("ours", 60, 3.0, settings="new"), row("ours", 60, 2.0, settings="new")]
    found = results.summary(results.current(rows), 1000, "common")
    assert {
        name: {m: [r["distance"] for r in of] for m, of in by.items()} for name, by in found.items()
    } == {
        "sketch": {60: [7.0]},
        "ours": {60: [2.0]},
    }


def test_a_report_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.recipes"):
        results.report(tmp_path / "none.jsonl")


# --- from the shell


def test_a_short_run_from_end_to_end_and_again(fast, capsys, monkeypatch):
    monkeypatch.setattr(
        recipes.pretrained, "obtain_classifier", lambda *args: evaluation.Classifier().eval()
    )
    load = recipes.data.load_images
    monkeypatch.setattr(
        recipes.data, "load_images", lambda *args: load(*args, say=False).first(150)
    )
    command = ["--contestants", "ours", "sketch", "--minutes", "0.002", "--device", "cpu"]
    recipes.main(command)
    out = runtime.output_dir("benchmarks") / "recipes_cpu.jsonl"
    rows = results.read_rows(out)
    assert [(r["contestant"], r["n"], r["sampler"]) for r in rows] == [
        ("ours", 8, "common"),
        ("sketch", 8, "common"),
    ]
    for r in rows:
        assert 0 < r["floor"] and r["distance"] >= 0 and r["images"] > 0 and r["peak_flops"] > 0
        assert r["command"] == "python -m benchmarks.recipes " + " ".join(command)
        assert str(fast) not in json.dumps(r)
    capsys.readouterr()
    recipes.main(command)
    assert results.read_rows(out) == rows
    recipes.main([*command, "--out", str(fast / "other.jsonl")])
    assert results.read_rows(fast / "other.jsonl")[0]["command"].endswith("--out other.jsonl")
    recipes.main(["--report", "--device", "cpu"])
    assert "| ours |" in capsys.readouterr().out


def test_the_profile_accounts_for_the_whole_step(fast):
    made = contestant("sketch")
    seconds, shares = profile_step.profile_step(made, 1)
    assert seconds > 0 and sum(shares.values()) == pytest.approx(1)
    expected = {
        "convolutions",
        "normalization",
        "activations",
        "optimizer",
        "the average (EMA)",
        "batch, noise and loss",
    }
    assert expected <= set(shares) and "clipping" not in shares
    assert shares["convolutions"] > 0.1
    assert "clipping" in profile_step.profile_step(contestant("ours"), 1)[1]


def test_convolutions_by_themselves_do_the_work_that_is_counted(fast):
    made = contestant("article")
    found = profile_step.convolutions(made)
    layers = [m for m in made.model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert sum(times for _, _, times in found) == len(layers) and len(found) < len(layers)
    for layer, shape, _ in found[:4] + [
        entry for entry in found if isinstance(entry[0], nn.ConvTranspose2d)
    ]:
        took, reached = profile_step.time_convolution(layer, shape, made, 1)
        x = torch.zeros(shape, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        assert took * reached == pytest.approx(counter.get_total_flops())


def test_sampling_is_measured_by_calls(fast):
    made, calls = contestant("ours"), []
    made.network().register_forward_hook(lambda *args: calls.append(1))
    rates = profile_step.calls_per_second(made, 2, 3)
    assert list(rates) == ["network alone", "ddim_sample", "ddpm_sample"] and all(
        r > 0 for r in rates.values()
    )
    assert len(calls) == 3 * 3 * (3 + 1)


def test_the_profile_from_the_shell(fast, capsys):
    profile_step.main(["--device", "cpu"])
    text = capsys.readouterr().out
    for words in ("of the peak", "| convolutions |", "| ddim_sample |", "3×3, stride 2"):
        assert words in text
