"""The step, the average, the loop that stops and goes on exactly, and
files that are always whole.
"""

import builtins
import dataclasses
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import nn

from ddpm_utils import checkpoints, diffusion, runs, runtime, training
from ddpm_utils.config import TrainConfig
from ddpm_utils.runs import NotSaved, TrainingDiverged, train
from ddpm_utils.training import EMA, TrainState
from ddpm_utils.unet import UNet

pytestmark = pytest.mark.usefixtures("own_folders")
IMAGES = torch.randint(
    0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
HELD_OUT = IMAGES[:6].flip(-1)
STEPS = 12  # of `tiny` on IMAGES


@pytest.fixture
def fresh(tiny, net):
    """Builds a new state; keyword arguments change fields of the config, `weights` chooses the
    initial ones.
    """

    def build(weights=0, **changes):
        cfg = tiny(**changes)
        return TrainState(cfg, net(cfg, weights))

    return build


def run(state, **arguments):
    return list(train(state, arguments.pop("images", IMAGES), **arguments))


def same(a, b) -> bool:
    """Equality to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def everything(state) -> dict:
    parts = {"model": state.model, "ema": state.ema.model, "optimizer": state.optimizer}
    numbers = {"step": state.step, "best": state.best, "updates": state.ema.updates}
    return {name: part.state_dict() for name, part in parts.items()} | numbers


def copied(state) -> dict:
    import copy

    return copy.deepcopy(everything(state))


def at_forward(model, number, action):
    """Call `action(module, output)` in forward pass `number`, counted from 0; what it returns
    replaces the output.
    """
    calls = iter(range(10**9))
    return model.register_forward_hook(
        lambda m, i, out: action(m, out) if next(calls) == number else None
    )


# timesteps and batches


@pytest.mark.parametrize(("n", "timesteps"), [(7, 10), (32, 10), (1, 5), (4, 100)])
def test_every_timestep_is_drawn_equally_often(n, timesteps):
    rng, draws = torch.Generator().manual_seed(1), 6000 // n
    t = torch.cat([training.sample_timesteps(n, timesteps, rng) for _ in range(draws)])
    counts = t.bincount(minlength=timesteps).double()
    expected = len(t) / timesteps
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Spreading the batch only lowers the statistic: mean T − 1 and standard deviation √(2(T − 1))
    # are its upper bounds.
    assert len(counts) == timesteps and t.dtype == torch.int64
    assert chi_square < timesteps - 1 + 5 * math.sqrt(2 * (timesteps - 1))


@pytest.mark.parametrize("n", [1, 32])
def test_the_middle_is_drawn_with_its_density(n):
    """6·s·(1 − s), whose integral up to s is 3s² − 2s³: counted against the exact share of each
    timestep.
    """
    rng, draws, timesteps = torch.Generator().manual_seed(4), 20_000 // n, 20
    t = torch.cat([training.sample_timesteps(n, timesteps, rng, middle=True) for _ in range(draws)])
    edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    expected = len(t) * (3 * edges**2 - 2 * edges**3).diff()
    chi_square = ((t.bincount(minlength=timesteps) - expected) ** 2 / expected).sum()
    assert t.min() >= 0 and t.max() < timesteps
    assert chi_square < timesteps - 1 + 5 * math.sqrt(2 * (timesteps - 1))


def test_a_batch_of_t_holds_every_timestep_once_in_any_order():
    t = training.sample_timesteps(50, 50, torch.Generator().manual_seed(2))
    assert t.sort().values.tolist() == list(range(50)) and t.tolist() != list(range(50))


def test_place_in_the_batch_says_nothing_about_the_timestep():
    rng = torch.Generator().manual_seed(3)
    t = torch.stack([training.sample_timesteps(4, 100, rng) for _ in range(4000)]).double()
    assert (t.mean(dim=0) - 49.5).abs().max() < 5 * 28.9 / math.sqrt(4000)


@pytest.mark.parametrize(("images", "batch"), [(12, 4), (10, 3), (10, 25), (1, 4), (7, 7)])
def test_every_image_is_seen_once_an_epoch(tiny, images, batch):
    cfg = tiny(batch_size=batch)
    seen = torch.cat([training.batch_indices(images, step, cfg) for step in range(images)])
    passes = seen[: images * batch].view(-1, images)
    assert all(sorted(one.tolist()) == list(range(images)) for one in passes)
    if images == 10:
        assert not torch.equal(passes[0], passes[1])
    assert (
        not torch.equal(
            seen,
            torch.cat(
                [
                    training.batch_indices(images, s, tiny(batch_size=batch, seed=1))
                    for s in range(images)
                ]
            ),
        )
        or images == 1
    )


def test_the_config_chooses_how_timesteps_are_drawn(fresh, monkeypatch):
    seen = {"stratified": [], "uniform": [], "middle": []}
    for draw, batches in seen.items():
        monkeypatch.setattr(
            training,
            "train_step",
            lambda *a, out=batches: out.append(a[4].tolist()) or torch.tensor(1.0),
        )
        run(fresh(timestep_draw=draw, epochs=40))
    parts = {
        draw: [len({t // 25 for t in batch}) for batch in batches] for draw, batches in seen.items()
    }
    assert set(parts["stratified"]) == {4}
    # Of four free draws all fall into different quarters in 4! / 4⁴ = 9 % of the batches.
    share = sum(n == 4 for n in parts["uniform"]) / len(parts["uniform"])
    everyone = torch.tensor(seen["uniform"]).flatten().double()
    assert share < 0.25 and everyone.min() < 5 and everyone.max() > 94
    assert abs(everyone.mean() - 49.5) < 5 * 28.9 / math.sqrt(len(everyone))
    # The density 6·s·(1 − s) has the variance 1/20; the range of 100 times adds 1/12 of a step.
    middle = torch.tensor(seen["middle"]).flatten().double()
    assert abs(middle.std() - 100 * math.sqrt(0.05)) < 2 and abs(middle.mean() - 49.5) < 2


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_the_config_chooses_the_optimizer(fresh, optimizer):
    """They differ in weight decay alone: AdamW shrinks the weight, Adam adds it to a gradient whose
    size it then ignores.
    """
    cfg = fresh(optimizer=optimizer, lr=1e-2, weight_decay=0.5).cfg
    layer = constant(2.0)
    chosen = training.make_optimizer(layer, cfg)
    layer.weight.grad = torch.ones_like(layer.weight)
    chosen.step()
    expected = 2 * (1 - 1e-2 * 0.5) - 1e-2 if optimizer == "adamw" else 2 - 1e-2
    assert layer.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)
    assert chosen.defaults["fused"] is True


# one step


def test_one_batch_is_learned_by_heart(fresh):
    state = fresh(lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    x0 = training.to_model_range(IMAGES[:2])
    t = torch.tensor([20, 70])
    eps = torch.randn(2, 1, 8, 8, generator=rng)
    step = (state.model, state.optimizer, state.schedule, x0, t, eps)
    losses = [training.train_step(*step).item() for _ in range(150)]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("clip", [1e-3, 0.1])
def test_the_gradient_is_clipped_to_its_norm(net, tiny, clip):
    cfg = tiny()
    model = net(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    x0, eps = torch.ones(4, 1, 8, 8), torch.full((4, 1, 8, 8), 5.0)
    schedule = training.make_schedule(**cfg.noise())
    training.train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        schedule,
        x0,
        torch.arange(4),
        eps,
        "eps",
        clip,
    )
    moved = torch.cat(
        [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    ).norm()
    assert moved.item() == pytest.approx(clip, rel=1e-3)


def test_gradients_do_not_pile_up_and_the_loss_is_cut_off(net, tiny):
    cfg = tiny()
    model, schedule = net(cfg), training.make_schedule(**cfg.noise())
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    arguments = (schedule, torch.ones(2, 1, 8, 8), torch.tensor([3, 50]), torch.ones(2, 1, 8, 8))
    grads = []
    for _ in range(2):
        loss = training.train_step(model, still, *arguments, grad_clip=1e6)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert same(*grads) and not loss.requires_grad


# the average


def constant(value: float) -> nn.Module:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize("n", [1, 5, 50])
def test_ema_ramp_in_closed_form(n):
    """From θ_ema = 1 towards a constant 0, what is left of the start is Π (1 + i) / (10 + i) = n!

    9! / (n + 9)!.
    """
    ema = EMA(constant(1.0), decay=0.99999)
    for _ in range(n):
        ema.update(constant(0.0))
    left = math.exp(math.lgamma(n + 1) + math.lgamma(10) - math.lgamma(n + 10))
    assert ema.model.weight[0, 0].item() == pytest.approx(left, rel=1e-5) and ema.updates == n


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema_after_the_ramp_is_the_geometric_average(decay):
    ema, n = EMA(constant(0.0), decay), 20
    ema.updates = 10_000
    for k in range(1, n + 1):
        ema.update(constant(float(k)))
    closed = sum((1 - decay) * decay ** (n - k) * k for k in range(1, n + 1))
    assert ema.model.weight[0, 1].item() == pytest.approx(closed, rel=1e-5)


def test_ema_is_a_copy_in_eval_mode_that_takes_no_gradient():
    model = constant(1.0)
    ema = EMA(model, 0.9)
    nn.init.constant_(model.weight, 7.0)
    assert ema.model.weight.tolist() == [[1.0, 1.0]]
    assert (
        not ema.model.training
        and not ema.model.weight.requires_grad
        and model.training
        and model.weight.requires_grad
    )


# the learning rate


def test_learning_rate_rises_holds_and_falls(tiny):
    cfg = tiny(lr=1e-3, warmup_steps=100, decay_from=0.5, lr_floor=0.1)
    rates = [training.learning_rate(step, 1000, cfg) for step in range(1000)]
    assert (
        rates[0] == pytest.approx(1e-5)
        and rates[49] == pytest.approx(5e-4)
        and rates[99] == pytest.approx(1e-3)
    )
    assert set(rates[99:501]) == {1e-3}
    assert rates[750] == pytest.approx(1e-3 * 0.55) and rates[-1] == pytest.approx(1e-4, rel=0.02)
    assert rates[:100] == sorted(rates[:100]) and rates[500:] == sorted(rates[500:], reverse=True)


@pytest.mark.parametrize(
    "changes",
    [dict(warmup_steps=0), dict(decay_from=0.0), dict(decay_from=1.0), dict(lr_floor=0.0)],
    ids=str,
)
@pytest.mark.parametrize("total", [1, 2, 3, 40])
def test_learning_rate_is_positive_and_never_above_its_peak(tiny, total, changes):
    cfg = tiny(warmup_steps=100).replace(**changes)
    rates = [training.learning_rate(step, total, cfg) for step in range(total)]
    assert all(0 < rate <= cfg.lr for rate in rates)
    assert max(rates) > 0.5 * cfg.lr


# the loop


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_every_target_trains(fresh, target):
    state = fresh(target=target, epochs=10)
    gray = torch.full_like(IMAGES, 200)
    before = training.held_out_loss(state.ema.model, state.schedule, gray, target)
    records = run(state, images=gray, held_out=gray)
    assert records[-1].held_out < 0.8 * before


def test_records_say_what_happened(fresh):
    state = fresh()
    records = run(state, held_out=HELD_OUT, evaluate_every=5)
    assert [r.step for r in records] == list(range(1, STEPS + 1)) and {
        r.total for r in records
    } == {STEPS}
    assert [r.step for r in records if r.held_out is not None] == [5, 10, 12]
    assert all(math.isfinite(r.loss) and r.images_per_second > 0 for r in records)
    assert [r.lr for r in records] == [
        training.learning_rate(i, STEPS, state.cfg) for i in range(STEPS)
    ]
    assert run(state) == [] and not state.stopped


def test_labels_reach_the_network(fresh):
    state = fresh(num_classes=3, label_drop=0.0)
    labels = torch.arange(len(IMAGES)) % 3
    given = []
    state.model.register_forward_pre_hook(lambda m, args: given.append(args[2]))
    run(state, labels=labels)
    picked = [labels[training.batch_indices(len(IMAGES), step, state.cfg)] for step in range(STEPS)]
    assert same(given, picked)


def test_some_labels_are_withheld_each_by_itself():
    y = torch.arange(10).repeat(4000)
    kept = training.drop_labels(y, 0.1, 10, torch.Generator().manual_seed(0))
    gone = kept == 10
    assert torch.equal(kept[~gone], y[~gone]) and torch.equal(y, torch.arange(10).repeat(4000))
    n = len(y)
    assert abs(gone.double().mean() - 0.1) < 5 * (0.09 / n) ** 0.5
    # independent of one another: the share of pairs is the square
    pairs = (gone[::2] & gone[1::2]).double().mean()
    assert abs(pairs - 0.01) < 5 * (0.01 * 0.99 / (n / 2)) ** 0.5
    assert (
        torch.equal(training.drop_labels(y, 0.0, 10), y)
        and (training.drop_labels(y, 1.0, 10) == 10).all()
    )


def test_the_loop_withholds_labels_and_draws_all_else_as_before(fresh):
    """The same batches, times and noise, whatever share of the labels is withheld."""
    labels, seen = torch.arange(len(IMAGES)) % 3, {}
    for share in (0.0, 0.5, 1.0):
        state = fresh(num_classes=3, label_drop=share)
        given = seen.setdefault(share, [])
        state.model.register_forward_pre_hook(lambda m, args, given=given: given.append(args))
        run(state, labels=labels)
    for one, two, three in zip(*seen.values(), strict=True):
        assert (
            torch.equal(one[0], two[0])
            and torch.equal(one[1], two[1])
            and torch.equal(one[0], three[0])
        )
        assert ((two[2] == one[2]) | (two[2] == 3)).all() and (three[2] == 3).all()
    withheld = torch.cat([args[2] == 3 for args in seen[0.5]]).double().mean()
    assert 0.2 < withheld < 0.8


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_global_generator_is_used_by_dropout_alone(fresh, tmp_path, dropout):
    state = fresh(dropout=dropout)
    before = torch.get_rng_state()
    run(state, held_out=HELD_OUT, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), before) == (dropout == 0)


def test_no_float64_anywhere(fresh):
    state = fresh(schedule="linear", beta_scale=10)
    run(state)
    tensors = [
        *state.model.parameters(),
        *state.model.buffers(),
        *state.ema.model.parameters(),
        *state.ema.model.buffers(),
    ]
    tensors += [v for slot in state.optimizer.state.values() for v in slot.values()]
    tensors += [state.schedule.betas, state.schedule.alphas, state.schedule.alpha_bars]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize(
    "images",
    [torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, 1, 8, 8), IMAGES[0]],
    ids=["empty", "float", "one image without a batch"],
)
@pytest.mark.parametrize("which", ["images", "held_out"])
def test_bad_images_are_refused_before_the_first_step(fresh, which, images):
    state = fresh()
    with pytest.raises(ValueError, match="expected at least one") as error:
        run(state, **{which: images})
    assert str(tuple(images.shape)) in str(error.value) and str(images.dtype) in str(error.value)
    assert state.step == 0


@pytest.mark.parametrize(
    "labels", [torch.zeros(5).long(), torch.zeros(30).long()], ids=["too few", "too many"]
)
def test_labels_that_do_not_go_with_the_images_are_refused_before_the_first_step(fresh, labels):
    state = fresh(num_classes=3)
    with pytest.raises(ValueError, match=rf"{len(labels)}.*24"):
        run(state, labels=labels)
    assert state.step == 0


def test_images_that_do_not_fit_the_network_are_refused(fresh):
    with pytest.raises(ValueError, match="9 × 9.*multiples of 2: try 8 or 10"):
        run(fresh(), images=torch.zeros(4, 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\)"):
        run(fresh(), images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))


# NaN


@pytest.mark.parametrize("saved", [True, False])
def test_nan_stops_the_run_names_the_step_and_leaves_the_last_good_file(fresh, tmp_path, saved):
    state = fresh()
    at_forward(state.model, 7, lambda module, out: out * math.nan)
    words = (
        "nan at step 7 .*last good checkpoint is .*last.pt.*Lower lr"
        if saved
        else "step 7.*no checkpoint was written"
    )
    records = []
    with pytest.raises(TrainingDiverged, match=words):
        for record in train(state, IMAGES, folder=tmp_path if saved else None, evaluate_every=3):
            records.append(record)
    assert len(records) == 7
    if saved:
        payload = checkpoints.read(tmp_path / "last.pt")
        assert payload["step"] == 6 and all(w.isfinite().all() for w in payload["model"].values())


def test_weights_that_are_not_finite_are_never_written_over_good_ones(fresh, tmp_path):
    """A loss may be finite while its gradient is not: the weights are ruined one step before the
    loss shows it.
    """
    state = fresh()
    at_forward(
        state.model,
        7,
        lambda module, out: out.register_hook(lambda gradient: gradient * math.inf) and None,
    )
    with pytest.raises(TrainingDiverged):
        run(state, folder=tmp_path, evaluate_every=1)
    payload = checkpoints.read(tmp_path / "last.pt")
    assert payload["step"] == 7 and all(
        w.isfinite().all() for w in (payload["model"] | payload["ema"]).values()
    )


@pytest.mark.parametrize("factor", [1e6, -math.inf])
def test_an_enormous_loss_stops_the_run_and_the_message_names_step_config_and_file(
    fresh, tmp_path, factor
):
    state = fresh()
    at_forward(state.model, 7, lambda module, out: out + factor)
    with pytest.raises(TrainingDiverged) as error:
        run(state, folder=tmp_path, evaluate_every=3)
    loss = "1e+12" if factor == 1e6 else "inf"
    assert f"loss={loss} at step 7 of {state.cfg.run_name()} (lr=0.005, batch_size=4, " in str(
        error.value
    )
    assert checkpoints.read(tmp_path / "last.pt")["step"] == 6
    assert len(str(error.value)) < 300


def test_a_high_loss_is_no_explosion(fresh):
    state = fresh()
    at_forward(state.model, 7, lambda module, out: out + 30)
    assert max(record.loss for record in run(state)) > 800 and state.step == STEPS


# a device that runs behind its host


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes a host wait for its GPU: values that Python asks for, and shapes that
    depend on values.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
        )
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("every", [1, 5])
def test_losses_are_read_as_rarely_as_the_device_wants(fresh, monkeypatch, every):
    monkeypatch.setattr(diffusion, "check_timesteps", lambda *_: None)  # it reads on the CPU alone
    state, plain, looks, waits, records = fresh(epochs=3), fresh(epochs=3), [], [], []
    other = TrainState(state.cfg, UNet(**state.cfg.network()), "meta")
    assert (state.read_every, other.read_every) == (1, training.READ_EVERY)
    state.read_every = every
    read = runs._read
    monkeypatch.setattr(runs, "_read", lambda *a: (looks.append(state.step), read(*a)))
    with Waits() as mode:
        for record in train(state, IMAGES, evaluate_every=9):
            waits.append(mode.count)
            records.append(record)
    assert looks == (list(range(1, 19)) if every == 1 else [1, 6, 9, 11, 16, 18])
    assert waits == [0] * 8 + [1] * 9 + [2]  # at the two save points: are all weights finite?
    assert [r.loss for r in records] == [r.loss for r in run(plain)] and same(
        everything(state), everything(plain)
    )
    assert all(isinstance(r.loss, float) and r.images_per_second > 0 for r in records)


@pytest.mark.parametrize("folder", [True, False])
def test_a_loss_that_is_read_late_is_found_at_its_own_step_and_never_saved(fresh, tmp_path, folder):
    state = fresh(epochs=4)
    state.read_every = 100
    at_forward(state.model, 7, lambda module, out: out * math.nan)
    with pytest.raises(TrainingDiverged, match="loss=nan at step 7 "):
        run(state, folder=tmp_path if folder else None, evaluate_every=5)
    if folder:
        assert checkpoints.read(tmp_path / "last.pt")["step"] == 5


def test_a_stop_reads_what_was_not_read_before_it_saves(fresh, tmp_path):
    state = fresh(epochs=4)
    state.read_every = 100
    at_forward(state.model, 7, lambda module, out: out + 1e3)
    with pytest.raises(TrainingDiverged, match="at step 7 "):
        for record in train(state, IMAGES, folder=tmp_path, evaluate_every=5):
            state.stopped = record.step == 9
    assert checkpoints.read(tmp_path / "last.pt")["step"] == 5


class SlowToRead(Waits):
    """Reading a value from the device takes 30 ms, as on a GPU that is still at work."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        before = self.count
        answer = super().__torch_dispatch__(function, types, arguments, named)
        time.sleep(0.03 * (self.count - before))
        return answer


def test_waiting_for_a_loss_counts_as_time_of_the_steps(fresh):
    """The caller asks for every loss outside of the steps, and the device is waited for there."""
    state = fresh(epochs=2)
    state.read_every = 100
    with SlowToRead():
        records = [(record, record.loss)[0] for record in train(state, IMAGES, evaluate_every=1000)]
    assert len(records) == 12
    assert records[-1].clock.busy > 12 * 0.03
    # a batch of 4 each 30 ms, and not as fast as steps are ordered
    assert records[-1].images_per_second < 4 / 0.03


def test_losses_are_read_in_one_go(fresh):
    records = run(fresh(epochs=2))
    with Waits() as mode:
        values = runs.losses(records)
    assert values == [record.loss for record in records] and mode.count <= 1
    assert runs.losses([]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_loop_never_waits_for_the_gpu(tiny, net):
    cfg = tiny(epochs=1)
    state, images = TrainState(cfg, net(cfg), "cuda"), IMAGES.repeat(8, 1, 1, 1)
    for record in train(state, images, evaluate_every=1000):
        torch.cuda.set_sync_debug_mode("error" if 2 <= record.step < 40 else "default")
    assert state.step == 48


# the stop button


def press_stop(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("moment", ["inside a step", "between two steps"])
def test_the_stop_button_keeps_weights_and_writes_them(fresh, tmp_path, moment):
    state = fresh()
    before = signal.getsignal(signal.SIGINT)
    if moment == "inside a step":
        at_forward(state.model, 4, press_stop)
    records = []
    for record in train(state, IMAGES, folder=tmp_path, evaluate_every=100):
        records.append(record)
        if moment == "between two steps" and record.step == 5:
            press_stop()
    assert state.stopped and state.step == len(records) == 5
    assert signal.getsignal(signal.SIGINT) is before
    payload = checkpoints.read(tmp_path / "last.pt")
    assert payload["step"] == 5 and same(payload["model"], state.model.state_dict())


def test_a_second_press_does_what_it_always_does(fresh):
    state = fresh()
    with pytest.raises(KeyboardInterrupt):
        for _ in train(state, IMAGES):
            press_stop()
            press_stop()


@pytest.mark.parametrize("leave", ["break", "close", "error"])
def test_an_abandoned_loop_gives_the_stop_button_back(fresh, leave):
    before = signal.getsignal(signal.SIGINT)
    loop = train(fresh(), IMAGES)
    next(loop)
    assert signal.getsignal(signal.SIGINT) is not before
    if leave == "close":
        loop.close()
    elif leave == "error":
        with pytest.raises(ZeroDivisionError):
            loop.throw(ZeroDivisionError())
    del loop
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_leaves_signals_alone(fresh):
    state = fresh()
    thread = threading.Thread(target=run, args=(state,))
    thread.start()
    thread.join()
    assert state.step == STEPS


# going on exactly


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [1, 5, 6, 11])
@pytest.mark.parametrize("way", ["stop button", "break", "new state"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    fresh,
    tmp_path,
    way,
    stop,
    dropout,
):
    arguments = dict(held_out=HELD_OUT, evaluate_every=4)
    torch.manual_seed(3)
    whole = fresh(dropout=dropout)
    losses = [record.loss for record in run(whole, **arguments)]

    torch.manual_seed(3)
    state, records = fresh(dropout=dropout), []
    if way != "break":
        at_forward(state.model, stop - 1, press_stop)
    for record in train(state, IMAGES, folder=tmp_path, **arguments):
        records.append(record)
        if way == "break" and record.step == stop:
            break
    assert state.step == stop
    if way == "new state":
        state = fresh(weights=1, dropout=dropout)
        torch.manual_seed(99)
        checkpoints.load(tmp_path / "last.pt", state)
    records += run(state, folder=tmp_path, **arguments)

    assert [record.loss for record in records] == losses and state.step == STEPS
    if way == "break":  # stopping by hand measures once more, which can only lower the best
        assert same(everything(state), everything(whole))
    assert (
        same(everything(state) | {"best": 0}, everything(whole) | {"best": 0})
        and state.best <= whole.best
    )


def test_a_run_that_is_interrupted_twice(fresh, tmp_path):
    whole = fresh(dropout=0.2)
    torch.manual_seed(4)
    run(whole)
    torch.manual_seed(4)
    state = fresh(dropout=0.2)
    for stop in (3, 5):
        at_forward(state.model, stop - state.step - 1, press_stop)
        run(state, folder=tmp_path)
        assert state.stopped and state.step == stop
        state = checkpoints.load(tmp_path / "last.pt", fresh(weights=stop, dropout=0.2))
        torch.manual_seed(stop)
        checkpoints.load(tmp_path / "last.pt", state)
    run(state)
    assert same(everything(state), everything(whole))


def brighter(images):
    """The same images but for one pixel of one image."""
    changed = images.clone()
    changed[5, 0, 3, 3] ^= 1
    return changed


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (IMAGES[:23], r"number and size \(N, C, H, W\) \[24, 1, 8, 8\] then, \[23, 1, 8, 8\] now"),
        (
            IMAGES.flip(0),
            r"other data: pixels \(digest\) \w{16} then, \w{16} now\. Give it the same images",
        ),
        (brighter(IMAGES), r"other data: pixels"),
    ],
    ids=["fewer", "another order", "one pixel"],
)
def test_a_run_goes_on_with_the_images_that_it_began_with(fresh, tmp_path, images, says):
    """With other images, or another number of them, a resumed run would not be the run that was
    stopped.
    """
    state = fresh()
    at_forward(state.model, 2, press_stop)
    run(state, folder=tmp_path)
    resumed = checkpoints.load(tmp_path / "last.pt", fresh())
    for other in (state, resumed):
        with pytest.raises(
            ValueError, match=f"came to step 3 on other data: .*{says.removeprefix('other data: ')}"
        ):
            run(other, images=images)
    run(resumed)
    assert resumed.step == resumed.cfg.steps(24)
    # Other images for old weights: that is allowed.
    tuned = checkpoints.load(tmp_path / "last.pt", fresh(), strict=False)
    run(tuned, images=images)
    assert tuned.data == runs.describe_data(images, None)


def test_a_run_goes_on_with_the_labels_that_it_began_with(fresh, tmp_path):
    labels = torch.arange(24) % 3
    state = fresh(num_classes=3)
    at_forward(state.model, 2, press_stop)
    run(state, folder=tmp_path, labels=labels)
    for other in (labels.flip(0), None):
        resumed = checkpoints.load(tmp_path / "last.pt", fresh(num_classes=3))
        with pytest.raises(
            ValueError, match=r"other data: labels \(digest\) \w{16} then, (\w{16}|None) now\."
        ):
            run(resumed, labels=other)
    run(resumed, labels=labels)
    assert resumed.step == resumed.cfg.steps(24)


def test_a_checkpoint_of_an_earlier_version_knows_the_shape_of_its_images_alone(fresh, tmp_path):
    state = fresh()
    at_forward(state.model, 2, press_stop)
    run(state, folder=tmp_path)
    payload = torch.load(tmp_path / "last.pt", weights_only=True)
    del payload["data"], payload["rng_mps"]
    for shape, refused in (((24, 1, 8, 8), False), ((23, 1, 8, 8), True), (None, False)):
        torch.save(payload | {"data_shape": shape}, tmp_path / "old.pt")
        resumed = checkpoints.load(tmp_path / "old.pt", fresh())
        if refused:
            with pytest.raises(ValueError, match="other data: number and size"):
                run(resumed)
        else:
            run(resumed)
            assert resumed.step == resumed.cfg.steps(24)


# twenty-seven ways to be interrupted

EVERY = 5  # steps between two save points
# where, and the step of the file that is left when all ends there, and when a signal is heeded
# there
POINTS = {
    "before a step": (5, 8),
    "after the optimizer": (5, 8),
    "before the average": (5, 8),
    "in the loop": (5, 7),
    "measuring": (5, 10),
    "half written": (5, 10),
    "before the flush": (5, 10),
    "before the renaming": (5, 10),
    "after the renaming": (10, 10),
}


def interrupt(patch, state, point: str, action) -> None:
    """Have `action()` called once, at `point` of the eighth step or of the second save."""
    step = 7 if POINTS[point][1] < 10 else 10
    left = [action]

    def now(*_):
        if state.step == step and left:
            left.pop()()

    def around(function, before=True):
        def wrapped(*arguments, **named):
            if before:
                now()
            out = function(*arguments, **named)
            if not before:
                now()
            return out

        return wrapped

    class Halved:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            now()
            self.file.write(data[len(data) // 2 :])

    if point == "before a step":
        state.model.register_forward_pre_hook(now)
    elif point == "after the optimizer":
        patch.setattr(state.optimizer, "step", around(state.optimizer.step, before=False))
    elif point == "before the average":
        patch.setattr(state.ema, "update", around(state.ema.update))
    elif point == "measuring":
        state.ema.model.register_forward_pre_hook(now)
    elif point == "half written":
        patch.setattr(runtime, "open", lambda *a: Halved(builtins.open(*a)), raising=False)
    elif point == "before the flush":
        patch.setattr(os, "fsync", around(os.fsync))
    elif point == "before the renaming":
        patch.setattr(os, "replace", around(os.replace))
    elif point == "after the renaming":
        patch.setattr(os, "replace", around(os.replace, before=False))


def a_run(weights: int) -> TrainState:
    """A new state with dropout, the same for the same `weights`."""
    cfg = TrainConfig(**(TINY | {"dropout": 0.2}))
    torch.manual_seed(weights)
    return TrainState(cfg, UNet(**cfg.network()))


def interrupted(state, folder: Path, point: str, action) -> dict:
    """Train until `action` at `point` ends it, or to the end. Returns the losses by step."""
    losses = {}
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, state, point, action)
        for record in train(state, IMAGES, HELD_OUT, folder, EVERY):
            losses[record.step] = record.loss
            if point == "in the loop" and record.step == 7:
                action()
    return losses


def kill_everywhere(folder: Path) -> None:
    """Run by a process of its own: a child for each point, which there sends itself kill −9."""
    torch.set_num_threads(1)
    a_run(0).optimizer.step()  # what the first call imports is imported once
    for point in POINTS:
        child = os.fork()
        if child == 0:
            try:
                interrupted(
                    a_run(0), folder / point, point, lambda: os.kill(os.getpid(), signal.SIGKILL)
                )
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a folder for each point, as the killed process left it."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and kill −9")
    folder, tests = tmp_path_factory.mktemp("killed"), str(Path(__file__).parent)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_training as t; "
        "t.kill_everywhere(t.Path(sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(tests).parent), tests, str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def in_peace():
    """The uninterrupted run: its losses by step and its end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = a_run(0)
    losses = {record.step: record.loss for record in train(state, IMAGES, HELD_OUT, None, EVERY)}
    torch.set_num_threads(threads)
    return losses, everything(state)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", ["signal", "error", "kill"])
@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_run_goes_on_bit_for_bit_from_a_whole_file(
    tmp_path,
    point,
    way,
    request,
    in_peace,
    one_thread,
):
    losses, state, folder = {}, a_run(0), tmp_path
    if way == "signal":
        signum = signal.SIGTERM if len(point) % 2 else signal.SIGINT
        before = signal.signal(signum, lambda *_: pytest.fail("the signal came through"))
        try:
            losses = interrupted(state, folder, point, lambda: signal.raise_signal(signum))
        finally:
            signal.signal(signum, before)
        assert state.stopped
    elif way == "error":
        with pytest.raises(ZeroDivisionError):
            interrupted(state, folder, point, lambda: 1 / 0)
    else:
        folder = request.getfixturevalue("killed") / point
    left = checkpoints.read(folder / "last.pt")["step"]
    assert left == POINTS[point][way == "signal"]

    state = checkpoints.load(folder / "last.pt", a_run(1))
    torch.manual_seed(77)
    checkpoints.load(folder / "last.pt", state)
    losses |= {record.step: record.loss for record in train(state, IMAGES, HELD_OUT, folder, EVERY)}
    whole, end = in_peace
    assert {step: loss for step, loss in whole.items() if step in losses} == losses and max(
        losses
    ) == STEPS
    assert len(losses) == STEPS or (way != "signal" and len(losses) == STEPS - left)
    assert same(everything(state) | {"best": 0}, end | {"best": 0}) and state.best <= end["best"]
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["best.pt", "last.pt"]


# measuring


def test_held_out_loss_repeats_and_leaves_mode_and_chance_alone(fresh):
    state = fresh(dropout=0.5)
    run(state)
    for training_mode in (True, False):
        state.model.train(training_mode)
        before = torch.get_rng_state()
        a, b = (
            training.held_out_loss(state.model, state.schedule, IMAGES, "v", batch_size=5)
            for _ in range(2)
        )
        assert (
            a == b
            and state.model.training is training_mode
            and torch.equal(torch.get_rng_state(), before)
        )


def test_held_out_loss_gives_the_mode_back_after_an_error(fresh):
    state = fresh()
    at_forward(state.model, 0, lambda module, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.held_out_loss(state.model, state.schedule, IMAGES, "v")
    assert state.model.training


def test_loss_per_timestep_meets_the_timesteps_it_is_given(fresh):
    state, met = fresh(), []
    state.model.register_forward_pre_hook(lambda m, args: met.append(args[1]))
    t = torch.arange(len(IMAGES)) * 4
    losses = training.loss_per_timestep(state.model, state.schedule, IMAGES, "eps", t, batch_size=7)
    assert losses.shape == (len(IMAGES),) and torch.equal(torch.cat(met), t)
    # the fresh network answers 0 to noise of variance 1
    assert losses.mean().item() == pytest.approx(1, abs=0.1)


# files


def test_a_checkpoint_comes_back_whole_and_alone(fresh, tmp_path):
    state = fresh()
    run(state)
    path = checkpoints.save(tmp_path / "new" / "folder" / "last.pt", state)
    other = checkpoints.load(path, fresh(weights=1))
    assert same(everything(other), everything(state)) and list(path.parent.iterdir()) == [path]


def test_best_is_kept_beside_last(fresh, tmp_path):
    state = fresh(epochs=4)
    records = run(state, held_out=HELD_OUT, folder=tmp_path, evaluate_every=6)
    measured = {record.step: record.held_out for record in records if record.held_out is not None}
    best = checkpoints.read(tmp_path / "best.pt")
    assert (
        best["best"] == min(measured.values()) == state.best
        and measured[best["step"]] == state.best
    )
    assert checkpoints.read(tmp_path / "last.pt")["step"] == state.step
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".pt") == [
        "best.pt",
        "last.pt",
    ]


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(fresh, tmp_path, monkeypatch):
    state = fresh()
    path = checkpoints.save(tmp_path / "last.pt", state)
    before = path.read_bytes()

    def full_disk(payload, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(path, state)
    assert path.read_bytes() == before and [
        p.name for p in tmp_path.iterdir() if p.suffix != ""
    ] == ["last.pt"]


def fill_disk(patch, *names, steps=range(10**9), state=None):
    """Let the flush of files called so fail, as on a full disk, while the step is in `steps`."""
    whole = builtins.open
    full = []
    patch.setattr(
        runtime,
        "open",
        lambda path, *a: full.append(path.name.split(".pt")[0][1:]) or whole(path, *a),
        raising=False,
    )

    def fsync(number):
        if full[-1] in names and state.step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def test_a_failed_save_is_a_warning_and_tried_again(fresh, tmp_path, monkeypatch):
    state, plain = fresh(), fresh()
    run(plain)
    fill_disk(monkeypatch, "last", steps=(6, 9), state=state)
    with pytest.warns(RuntimeWarning) as caught:
        records = run(state, folder=tmp_path, evaluate_every=3)
    assert [str(one.message).split(" (")[0] for one in caught] == [
        f"step {step}: {tmp_path.name}/last.pt was not written" for step in (6, 9)
    ]
    assert "No space left on device" in str(caught[0].message) and caught[0].filename == __file__
    assert (
        len(records) == STEPS
        and same(everything(state), everything(plain))
        and state.unsaved is None
    )
    assert checkpoints.read(tmp_path / "last.pt")["step"] == STEPS
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["last.pt"]


@pytest.mark.parametrize("end", ["end", "stop"])
def test_a_run_whose_last_save_fails_says_so_and_can_be_saved_elsewhere(
    fresh, tmp_path, monkeypatch, end
):
    state, records = fresh(), []
    last = STEPS if end == "end" else 8
    with monkeypatch.context() as patch, warnings.catch_warnings(action="ignore"):
        fill_disk(patch, "last", steps=range(4, 100), state=state)
        with pytest.raises(NotSaved) as error:
            for record in train(state, IMAGES, folder=tmp_path / "run", evaluate_every=3):
                records.append(record)
                state.stopped = end == "stop" and record.step == 8
    assert len(records) == state.step == last
    assert f"the run ended at step {last}, but run/last.pt was not written (No space left" in str(
        error.value
    )
    assert "checkpoints.save with another path" in str(error.value) and len(str(error.value)) < 250
    assert checkpoints.read(tmp_path / "run" / "last.pt")["step"] == 3
    checkpoints.save(tmp_path / "elsewhere" / "last.pt", state)
    other = checkpoints.load(tmp_path / "elsewhere" / "last.pt", fresh(weights=1))
    assert same(everything(other), everything(state))
    # no old complaint
    assert [r.step for r in run(state, folder=tmp_path / "run")] == list(range(last + 1, STEPS + 1))


def test_a_best_that_was_not_written_is_not_the_best(fresh, tmp_path, monkeypatch):
    state = fresh(epochs=4)
    measures = iter([0.5, 0.4, 0.45, 0.3])
    monkeypatch.setattr(runs, "held_out_loss", lambda *_, **__: next(measures))
    fill_disk(monkeypatch, "best", steps=(12,), state=state)
    with pytest.warns(RuntimeWarning, match="step 12: .*best.pt was not written"):
        bests = [
            (record.step, state.best)
            for record in train(state, IMAGES, HELD_OUT, tmp_path, 6)
            if record.held_out
        ]
    assert bests == [(6, 0.5), (12, 0.5), (18, 0.45), (24, 0.3)]
    assert checkpoints.read(tmp_path / "best.pt")["step"] == 24


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(
    fresh, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    state = fresh()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            NotSaved, match=r"cannot be written to \(.+\): choose a folder that you can write to"
        ):
            run(state, folder=folder)
        with pytest.raises(NotSaved, match="was not written"):
            checkpoints.save(folder / "last.pt", state)

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(
        NotSaved,
        match=r"cannot be written to \(Read-only file system\): choose a folder that you can "
        r"write to",
    ):
        run(state, folder=tmp_path)
    assert state.step == 0 and (tmp_path / "file").read_text() == ""


SMALL_DISK = """
import subprocess, sys, warnings
sys.path[:0] = sys.argv[1:3]
import test_training as t
disk, plain = t.Path(sys.argv[3]), t.a_run(0)
t.run(plain)
whole = t.checkpoints.save(disk.parent / "size.pt", plain).stat().st_size
mount = ["mount", "-t", "tmpfs", "-o", f"size={whole * 5 // 2 // 1024}k", "none", str(disk)]
if subprocess.run(mount).returncode:
    sys.exit(77)
for what in ("full", "read-only"):
    trained = t.a_run(0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for record in t.train(trained, t.IMAGES, folder=disk, evaluate_every=4):
                if record.step == 5 and what == "full":
                    (disk / "other").write_bytes(bytes(whole))
                if record.step == 5 and what == "read-only":
                    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    except t.NotSaved as error:
        print(error)
    assert len(caught) == 2, caught
    assert t.same(t.everything(trained), t.everything(plain))
    assert t.checkpoints.read(disk / "last.pt")["step"] == 4
    assert not list(disk.glob(".*"))
    (disk / "other").unlink(missing_ok=True) if what == "full" else None
    t.checkpoints.save(disk.parent / "elsewhere.pt", trained)
try:
    t.run(t.a_run(0), folder=disk)
except t.NotSaved as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_and_one_that_turns_read_only(tmp_path):
    (tmp_path / "disk").mkdir()
    tests = Path(__file__).parent
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        sys.executable,
        "-c",
        SMALL_DISK,
        tests.parent,
        tests,
    ]
    try:
        done = subprocess.run([*command, tmp_path / "disk"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip("needs the right to mount a file system of its own")
    assert done.returncode == 0, done.stderr
    full, read_only, at_once = done.stdout.splitlines()
    assert (
        "the run ended at step 12, but disk/last.pt was not written (No space left on device)"
        in full
    )
    assert (
        "the run ended at step 12, but disk/last.pt was not written (Read-only file system)"
        in read_only
    )
    assert at_once.endswith(
        "disk cannot be written to (Read-only file system): choose a folder that you can write to"
    )


def test_litter_of_the_dead_is_removed_and_nothing_else(fresh, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [
        f".last.pt.{os.getppid()}.part",
        f".best.pt.{dead.pid}.part",
        ".last.pt.mine.part.txt",
        f"last.pt.{dead.pid}.part",
    ]
    litter = [f".last.pt.{dead.pid}.part", f".last.pt.{os.getpid()}.part"]
    for name in (*keep, *litter):
        (tmp_path / name).write_bytes(b"half")
    checkpoints.save(tmp_path / "last.pt", fresh())
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {*keep, "last.pt"}


KILL = """
import os, random, signal, sys, time
from pathlib import Path
from ddpm_utils import checkpoints, config, training, unet
path = Path(sys.argv[1])
cfg = config.TrainConfig(widths=(64,), blocks=1, attention_levels=(), time_dim=64, dataset="digits")
state = training.TrainState(cfg, unet.UNet(**cfg.network()))
random.seed(0)
for trial in range(5):
    reader, writer = os.pipe()
    state.step = 0
    child = os.fork()
    while child == 0:
        state.step += 1
        checkpoints.save(path, state)
        os.write(writer, b".")
    os.close(writer)
    saved = len(os.read(reader, 1))
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := len(os.read(reader, 4096)):
        saved += told
    os.close(reader)
    checkpoints.load(path, state)
    # each save removes what was left of the one before
    assert len(list(path.parent.glob("*.part"))) <= 1
    assert saved <= state.step <= saved + 1, (trial, saved, state.step)
    print(state.step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill −9")
def test_kill_9_during_a_save_loses_nothing(tmp_path):
    root = Path(training.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "last.pt")],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5


@pytest.fixture
def saved(fresh, tmp_path):
    state = fresh()
    next(train(state, IMAGES))  # a step, so that the optimizer has averages
    return checkpoints.save(tmp_path / "run" / "last.pt", state)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip(path):
    """Change one bit inside a weight."""
    raw = bytearray(path.read_bytes())
    raw[raw.find(torch.load(path)["model"]["time.mlp.0.weight"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(raw)


SPOIL = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit changed": flip,
    "a list": lambda path: torch.save([1, 2], path),
    "weights alone": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "no weights": lambda path: torch.save(dict(list(torch.load(path).items())[:3]), path),
    "weights of another network": lambda path: torch.save(
        torch.load(path) | {"model": {"a": torch.zeros(1)}}, path
    ),
    "a whole module": lambda path: torch.save(nn.Linear(1, 1), path),
    "another schema": lambda path: torch.save(
        torch.load(path) | {"schema": checkpoints.SCHEMA + 1}, path
    ),
    "a config of another kind": lambda path: torch.save(
        torch.load(path) | {"config": ["lr"]}, path
    ),
    "a state of no generator": lambda path: torch.save(
        torch.load(path) | {"rng": torch.zeros(3)}, path
    ),
    "an optimizer of other weights": lambda path: torch.save(
        torch.load(path) | {"optimizer": foreign_optimizer()}, path
    ),
    "an optimizer whose averages do not fit": lambda path: torch.save(
        cut_averages(torch.load(path)), path
    ),
}
for entry in checkpoints.ENTRIES:
    SPOIL[f"no {entry}"] = lambda path, name=entry: torch.save(
        {key: value for key, value in torch.load(path).items() if key != name}, path
    )
    SPOIL[f"{entry} of another type"] = lambda path, name=entry: torch.save(
        torch.load(path) | {name: "a text"}, path
    )


def foreign_optimizer() -> dict:
    return torch.optim.AdamW(nn.Linear(1, 1).parameters()).state_dict()


def cut_averages(payload: dict) -> dict:
    for kept in payload["optimizer"]["state"].values():
        for name, value in kept.items():
            kept[name] = value.flatten()[:-1] if value.numel() > 1 else value
    return payload


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_damaged_or_foreign_file_is_refused_and_changes_nothing(fresh, saved, spoil):
    SPOIL[spoil](saved)
    state = fresh(weights=1)
    before, chance = copied(state), torch.get_rng_state()
    with pytest.raises(ValueError, match="last.pt"):
        checkpoints.load(saved, state)
    assert same(everything(state), before) and torch.equal(torch.get_rng_state(), chance)


def test_the_schema_is_named_on_both_sides(saved):
    SPOIL["another schema"](saved)
    with pytest.raises(
        ValueError,
        match=f"schema {checkpoints.SCHEMA + 1}, this version reads {checkpoints.SCHEMA}",
    ):
        checkpoints.read(saved)


def test_no_code_from_a_file_is_run(tmp_path):
    proof = tmp_path / "boom"
    for name, write in {
        "torch": torch.save,
        "pickle": lambda x, p: p.write_bytes(pickle.dumps(x)),
    }.items():
        write({"schema": 1, "config": {}, "model": Bomb(proof)}, tmp_path / name)
        with (
            pytest.raises(ValueError, match="no whole checkpoint"),
            warnings.catch_warnings(action="ignore"),
        ):
            checkpoints.read(tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir()], ids=["nothing", "a folder"]
)
def test_no_checkpoint_there(fresh, tmp_path, make):
    make(tmp_path / "last.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*last.pt.*train first"):
        checkpoints.load(tmp_path / "last.pt", fresh())


def test_another_config_is_refused_with_every_field_that_differs(fresh, saved):
    state = fresh(weights=1, lr=1e-3, target="eps", timesteps=200)
    before = copied(state)
    with pytest.raises(ValueError, match="does not match run/last.pt") as error:
        checkpoints.load(saved, state)
    for words in (
        "lr: 0.001 against 0.005",
        "target: 'eps' against 'v'",
        "timesteps: 200 against 100",
    ):
        assert words in str(error.value)
    assert "seed" not in str(error.value) and same(everything(state), before)


def test_not_strict_asks_only_for_what_the_weights_mean(fresh, saved):
    checkpoints.load(saved, fresh(weights=1, lr=1e-3, seed=5), strict=False)
    with pytest.raises(ValueError, match="timesteps: 200 against 100"):
        checkpoints.load(saved, fresh(lr=1e-3, timesteps=200), strict=False)


def test_a_field_of_another_version_is_named(fresh, saved):
    payload = torch.load(saved)
    payload["config"]["sharpness"] = 3
    torch.save(payload, saved)
    with pytest.raises(ValueError, match="sharpness.*another version"):
        checkpoints.load(saved, fresh())


def test_a_record_is_read_only(fresh):
    record = next(train(fresh(), IMAGES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.loss = 0.0


def test_measuring_puts_every_part_back_into_its_own_mode(tiny, net):
    """A part that was frozen in eval mode inside a training network stays frozen after a
    measurement.
    """
    state = TrainState(tiny(), net(tiny()).train())
    state.model.head.eval()
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    training.held_out_loss(state.model, state.schedule, images, state.cfg.target)
    assert state.model.training and not state.model.head.training


# how long it will take


def test_a_run_says_once_how_long_it_will_take(fresh, monkeypatch):
    """A step takes a second here, the first one a minute, and what the caller does in between is
    not counted.
    """
    now = [0.0]
    state = fresh(epochs=30)  # 180 steps of 4 images
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    step = training.train_step

    def slow(*arguments):
        now[0] += 60 if state.step == 0 else 1
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", slow)
    forecast, said = runs.Forecast(state.cfg, len(IMAGES)), {}
    for record in train(state, IMAGES, evaluate_every=1000):
        said[record.step] = forecast.after(record)
        now[0] += 1000
    assert [number for number, words in said.items() if words] == [51]
    assert said[51].startswith("4 images/s: about 2.15 more minutes for the 129 steps to come; ")
    assert said[51].endswith("50 epochs would take five minutes")  # 1,200 images


def test_a_run_of_few_steps_says_nothing(fresh):
    state = fresh(epochs=8)  # 48 steps
    forecast = runs.Forecast(state.cfg, len(IMAGES))
    assert [forecast.after(record) for record in train(state, IMAGES)] == [None] * 48


def test_a_resumed_run_is_measured_anew(fresh, tmp_path):
    state = fresh(epochs=30)
    at_forward(state.model, 69, press_stop)
    run(state, folder=tmp_path)
    forecast = runs.Forecast(state.cfg, len(IMAGES))
    said = {record.step: forecast.after(record) for record in train(state, IMAGES)}
    assert [number for number, words in said.items() if words] == [71 + 50]
