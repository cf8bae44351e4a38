"""What a GPU would refuse, found without one: float64 on Apple's GPUs, other devices' random
numbers, memory layouts.
"""

import inspect

import pytest
import torch
from networks import as_network
from torch import Tensor

from ddpm_utils import checkpoints, config, evaluation, oracle, runs, runtime, training
from ddpm_utils.diffusion import Denoiser
from ddpm_utils.exercises import (
    float64,
    lesson_01,
    lesson_02,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
)
from ddpm_utils.schedules import NoiseSchedule, cosine_betas, make_schedule


class OnApple(Tensor):
    """A tensor that computes on the CPU and refuses float64, as those of Apple's GPUs do."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        out = super().__torch_function__(function, types, arguments, named or {})
        to_cpu = function.__name__ == "cpu" or (
            function.__name__ == "to" and "cpu" in map(str, arguments[1:])
        )
        if isinstance(out, OnApple) and to_cpu:
            return out.as_subclass(Tensor)
        if isinstance(out, OnApple) and out.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                "support float64."
            )
        return out


def apple(tensor) -> OnApple:
    return torch.as_tensor(tensor).float().as_subclass(OnApple)


@pytest.fixture
def schedule():
    """The cosine schedule with its three vectors on the pretended device."""
    made = make_schedule("cosine", 100)
    made.betas, made.alphas, made.alpha_bars = map(
        apple, (made.betas, made.alphas, made.alpha_bars)
    )
    return made


def test_the_pretended_device_refuses_float64():
    for refused in (
        lambda x: x.double(),
        lambda x: x.double().cpu(),
        lambda x: x.to(torch.float64),
        lambda x: torch.zeros_like(x, dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="doesn't support float64"):
            refused(apple([1.0]))
    assert type(apple([1.0]).cpu().double()) is type(apple([1.0]).to("cpu")) is Tensor


def test_exercises_take_a_schedule_on_the_device(schedule):
    def jump(alpha_bars, s, t):
        kept = alpha_bars[t] / alpha_bars[s]
        return kept.sqrt(), 1 - kept

    assert lesson_01.check_jump(jump, schedule).passed
    first = int((schedule.snr() < 1).nonzero()[0])
    assert lesson_01.check_crossing(first, schedule).passed


def test_a_right_answer_on_the_device_is_right():
    verdict = lesson_01.check_even_betas(lambda *arguments: apple(even_betas(*arguments)), 50, 0.99)
    assert verdict.passed, verdict


ANSWERED = [
    (module, name)
    for module in (lesson_02, lesson_04, lesson_05, lesson_06, lesson_07, lesson_08, lesson_09)
    for name, check in vars(module).items()
    if name.startswith("check_") and list(inspect.signature(check).parameters) == ["answer"]
]


@pytest.mark.parametrize(("module", "name"), ANSWERED, ids=[name for _, name in ANSWERED])
def test_a_wrong_answer_on_the_device_is_told_as_such(module, name):
    """The check says what is wrong with the answer, and nothing about the device."""
    pair = name in ("check_v_mean", "check_coefficients")

    def answer(first, *rest):
        one = apple(torch.as_tensor(first).detach() + 7.0)
        return (one, one) if pair else one

    verdict = getattr(module, name)(answer)
    assert (
        verdict.passed is False and "float64" not in verdict.words and "MPS" not in verdict.words
    ), verdict


def even_betas(timesteps, last_std):
    std = last_std * torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bars = torch.cat([torch.ones(1, dtype=torch.float64), 1 - std.square()])
    return 1 - alpha_bars[1:] / alpha_bars[:-1]


@pytest.mark.parametrize(
    "value", [3, 0.1, [0.1, 0.2], torch.tensor([0.1, 0.2]), apple([0.1, 0.2])], ids=str
)
def test_answers_become_float64_on_the_cpu(value):
    got = float64(value)
    assert type(got) is Tensor and got.dtype == torch.float64 and got.device.type == "cpu"
    assert torch.allclose(
        got, torch.tensor(value if isinstance(value, int | float) else [0.1, 0.2]).double()
    )


def test_a_list_keeps_all_its_digits():
    assert float64([0.1])[0].item() == 0.1


def test_schedules_are_made_of_betas_on_the_device():
    made = NoiseSchedule(apple(cosine_betas(100)))
    assert torch.allclose(made.alpha_bars, make_schedule("cosine", 100).alpha_bars, atol=1e-6)


def test_exact_denoisers_are_fitted_on_the_device(schedule):
    x0 = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    on_cpu = make_schedule("cosine", 100)
    here = oracle.fit_gaussian(on_cpu, x0)
    there = oracle.fit_gaussian(schedule, apple(x0))
    assert torch.allclose(there.loss("v"), here.loss("v"), atol=1e-6)
    t = torch.arange(50)
    assert torch.allclose(there(apple(x0), t).as_subclass(Tensor), here(x0, t), atol=1e-5)
    network = as_network(there, schedule, "v")
    assert torch.allclose(
        network(apple(x0), t).as_subclass(Tensor), as_network(here, on_cpu, "v")(x0, t), atol=1e-5
    )
    back = Denoiser(network, schedule, "v", clamp=False)(apple(x0), t)
    assert type(back) is OnApple and torch.allclose(
        back.as_subclass(Tensor), here(x0, t), atol=1e-5
    )


def test_metrics_take_tensors_on_the_device():
    a, b = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    assert evaluation.frechet_distance(apple(a), apple(b)) == pytest.approx(
        evaluation.frechet_distance(a, b), rel=1e-5
    )
    assert evaluation.precision_recall(apple(a), apple(b)) == evaluation.precision_recall(a, b)
    assert evaluation.coverage(apple(a), apple(b)) == evaluation.coverage(a, b)
    distances, indices = evaluation.nearest_neighbors(apple(a), apple(b), k=2)
    expected, order = evaluation.nearest_neighbors(a, b, k=2)
    assert torch.equal(indices, order) and torch.allclose(distances, expected, atol=1e-6)
    found = evaluation.memorization(apple(a), apple(b), apple(b + 0.1))
    assert found.copies()[0] == evaluation.memorization(a, b, b + 0.1).copies()[0]


# random numbers


def test_training_a_classifier_leaves_every_generator_as_it_was(monkeypatch):
    """`torch.manual_seed` reseeds the GPUs as well; a GPU's state cannot be seen here, but the call
    can.
    """
    calls = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: calls.append(seed))
    before = torch.get_rng_state()
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    before = torch.get_rng_state()
    first, second = (
        evaluation.train_classifier(
            images, torch.arange(40) % 2, 2, epochs=1, batch_size=20, seed=3
        )
        for _ in "ab"
    )
    assert torch.equal(torch.get_rng_state(), before) and not calls
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_random_state_of_an_apple_gpu_is_in_the_checkpoint(tiny, net, tmp_path, monkeypatch):
    cfg = tiny()
    state = training.TrainState(cfg, net(cfg))
    # for the checkpoint, which asks where the random numbers come from
    state.device = torch.device("mps")
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.arange(4, dtype=torch.uint8))
    checkpoints.save(tmp_path / "last.pt", state)
    restored = []
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    checkpoints.load(tmp_path / "last.pt", state)
    assert len(restored) == 1 and restored[0].tolist() == [0, 1, 2, 3]
    state.device = torch.device("cpu")
    checkpoints.load(tmp_path / "last.pt", state)
    assert len(restored) == 1


# memory layout and hardware


class Mover(torch.nn.Module):
    """Keeps what `to` was asked for."""

    def to(self, device, memory_format=None):
        self.asked = str(device), memory_format
        return self


@pytest.mark.parametrize(
    ("device", "capability", "layout"),
    [
        ("cpu", None, torch.channels_last),
        ("cuda:0", (8, 0), torch.channels_last),
        ("cuda:0", (9, 0), torch.channels_last),
        ("cuda:0", (7, 5), torch.contiguous_format),
        ("mps", None, torch.contiguous_format),
    ],
)
def test_networks_get_the_layout_that_suits_the_device(monkeypatch, device, capability, layout):
    monkeypatch.setattr(runtime, "capability", lambda device: capability)
    assert runtime.place(Mover(), device).asked == (device, layout)


def test_no_layout_is_chosen_anywhere_else():
    from pathlib import Path

    package = Path(runtime.__file__).parent
    found = [
        path.name
        for path in package.rglob("*.py")
        if "channels_last" in path.read_text(encoding="utf-8")
    ]
    assert found == ["runtime.py"]


def test_an_old_gpu_gets_fewer_passes_and_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.delenv("DDPM_FLOAT32", raising=False)
    assert runtime.capability("cuda") == (7, 5)
    assert config.preset_for("cuda", capability=runtime.capability("cuda"))["epochs"] == 6.0
    assert not isinstance(runtime.autocast("cuda"), torch.autocast)


# streamed batches and permutations


def test_a_streamed_batch_is_picked_on_the_cpu(tiny, net, monkeypatch):
    """Its indices never visit the device, so that a GPU is not waited for at every step."""
    asked, cfg = [], tiny(epochs=1)
    images = torch.randint(
        0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    class Streamed:
        shape, digests = images.shape, []

        def __len__(self):
            return len(images)

        def __getitem__(self, picked):
            assert picked.device.type == "cpu"
            asked.append(picked)
            return images[picked]

        def ahead(self, order):
            import contextlib

            return contextlib.nullcontext()

    devices = []
    indices = training.batch_indices
    monkeypatch.setattr(
        training,
        "batch_indices",
        lambda n, step, cfg, device="cpu": devices.append(str(device)) or indices(n, step, cfg),
    )
    state = training.TrainState(cfg, net(cfg))
    # written "cpu:0", so that it can be told from the default
    state.device = torch.device("cpu", 0)
    list(runs.train(state, Streamed()))
    assert len(asked) == 6 and set(devices) == {"cpu"}
    devices.clear()
    state = training.TrainState(cfg, net(cfg))
    state.device = torch.device("cpu", 0)
    list(runs.train(state, images))
    assert set(devices) == {"cpu:0"}  # a tensor's batches are picked where it lies
