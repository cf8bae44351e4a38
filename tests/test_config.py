"""Every setting: its range, and what keeps two runs apart."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest

from ddpm_utils import config, schedules
from ddpm_utils.config import TrainConfig
from ddpm_utils.unet import UNet

FIELDS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
NAN, INF = float("nan"), float("inf")
BAD = {
    "dataset": ["cifar", "", None],
    "image_size": [0, 7, 257, 28.5, "28", None],
    "channels": [0, 2, 4, "1"],
    "pad": [-1, 14, 1.5, "2", None],
    "data_range": ["[0, 1]", "", None],
    "timesteps": [0, 1, -5, 10_001, 10.5, "1000", NAN, True],
    "schedule": ["quadratic", None],
    "beta_scale": [0, -1, 1e4, NAN, INF, "1"],
    "target": ["epsilon", None],
    "model": ["resnet", "", None],
    "widths": [(), (0, 64), (-8, 64), (10, 64), (32.5, 64), ("a", 64), 32, None],
    "blocks": [0, 9, 1.5],
    "attention_levels": [(2,), (-1,), ("a",), (0.5,), 1],
    "fold": [0, 9, 1.5],
    "time_dim": [0, -2, 15, 2.5, "16"],
    "groups": [0, -8, 7, 1.5, "8"],
    "heads": [0, -1, 5, 1.5, "4"],
    "dropout": [-0.1, 0.95, NAN, "0"],
    "num_classes": [-1, 1.5],
    "epochs": [0, -1, NAN, INF, "3"],
    "batch_size": [0, -1, 4097, 2.5],
    "timestep_draw": ["even", None],
    "optimizer": ["sgd", "", None],
    "lr": [0, -1e-3, 1, NAN],
    "warmup_steps": [-1, 1.5],
    "decay_from": [-0.1, 1.1],
    "lr_floor": [-0.1, 1.1],
    "weight_decay": [-0.1, 2],
    "label_drop": [-0.1, 1.5],
    "grad_clip": [0, -1, INF, NAN],
    "ema_decay": [-0.1, 1.0, 1, NAN],
    "seed": [1.5, "zero", None],
}
OTHER = {
    "dataset": "mnist",
    "image_size": 32,
    "channels": 3,
    "pad": 2,
    "data_range": "unit",
    "timesteps": 500,
    "schedule": "linear",
    "beta_scale": 2.0,
    "target": "eps",
    "model": "article",
    "widths": (32, 32),
    "blocks": 1,
    "attention_levels": (),
    "fold": 1,
    "time_dim": 64,
    "groups": 8,
    "heads": 2,
    "dropout": 0.1,
    "num_classes": 10,
    "epochs": 1.0,
    "batch_size": 16,
    "label_drop": 0.2,
    "timestep_draw": "uniform",
    "optimizer": "adam",
    "lr": 1e-3,
    "warmup_steps": 0,
    "decay_from": 1.0,
    "lr_floor": 0.0,
    "weight_decay": 0.1,
    "grad_clip": 2.0,
    "ema_decay": 0.0,
    "seed": 1,
}


def test_the_tables_above_name_every_field():
    assert set(BAD) == set(OTHER) == set(FIELDS)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_with_its_field_and_value(field, value):
    with pytest.raises(ValueError, match=field) as error:
        TrainConfig(**{field: value})
    shown = value[0] if isinstance(value, tuple) and value else value
    assert str(shown) in str(error.value) or value == ()


def test_the_ends_of_a_range_are_inside_and_the_nearest_value_is_named():
    assert (
        TrainConfig(
            ema_decay=0.99999, dropout=0.9, lr=1e-6, epochs=1e-6, batch_size=4096
        ).batch_size
        == 4096
    )
    with pytest.raises(ValueError, match="batch_size=5000.*nearest allowed value is 4096"):
        TrainConfig(batch_size=5000)
    with pytest.raises(ValueError, match="nearest allowed value is 0.9$"):
        TrainConfig(dropout=1.5)


@pytest.mark.parametrize(
    "field", [name for name, value in FIELDS.items() if type(value) is int and name != "channels"]
)
def test_a_whole_number_written_as_a_float_becomes_an_int(field):
    assert type(getattr(TrainConfig(**{field: float(FIELDS[field])}), field)) is int


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["default", "other"])
def test_round_trip_through_a_dict_and_through_json(changes):
    cfg = TrainConfig(**changes)
    assert config.from_dict(cfg.to_dict()) == cfg
    assert config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_a_config_written_before_a_field_existed_means_what_it_meant():
    added = {
        "model": "unet",
        "timestep_draw": "stratified",
        "optimizer": "adamw",
        "label_drop": 0.0,
        "pad": 0,
        "data_range": "symmetric",
    }
    cfg = TrainConfig(**added, lr=1e-3)
    assert (
        config.from_dict(
            {name: value for name, value in cfg.to_dict().items() if name not in added}
        )
        == cfg
    )
    assert config.from_dict(TrainConfig(**OTHER).to_dict()) == TrainConfig(**OTHER)


def test_from_dict_refuses_a_field_it_does_not_know():
    with pytest.raises(ValueError, match="betas_end"):
        config.from_dict(TrainConfig().to_dict() | {"betas_end": 0.02})


def test_run_name_differs_for_every_field_and_is_a_plain_folder_name():
    names = [TrainConfig().run_name()] + [
        TrainConfig(**{field: value}).run_name() for field, value in OTHER.items()
    ]
    assert len(set(names)) == len(names)
    assert all(name == name.replace("/", "").replace(" ", "") for name in names)


def test_a_path_is_a_folder_of_images_and_a_bare_word_is_not():
    cfg = TrainConfig(dataset="~/my faces/")
    assert cfg.folder == Path.home() / "my faces" and cfg.run_name().startswith("my_faces-v-")
    assert TrainConfig(dataset="./x").run_name() != TrainConfig(dataset="../x").run_name()
    assert TrainConfig().folder is None
    with pytest.raises(
        ValueError,
        match="dataset='faces' is not known: .*give a folder of images as a path.*'./faces'",
    ):
        TrainConfig(dataset="faces")


def test_a_border_leaves_a_pixel():
    assert TrainConfig(image_size=28, pad=13).pad == 13
    with pytest.raises(
        ValueError, match="pad=14 is outside 0 … 13: the nearest allowed value is 13"
    ):
        TrainConfig(image_size=28, pad=14)


def test_equal_configs_have_the_same_run_name():
    assert TrainConfig(epochs=2, widths=[48, 64]) == TrainConfig(epochs=2.0)
    assert TrainConfig(epochs=2, widths=[48, 64]).run_name() == TrainConfig(epochs=2.0).run_name()


def test_a_new_field_at_its_default_leaves_the_names_of_runs_alone():
    # As an earlier version named this run, and lesson 04 prints.
    assert TrainConfig().run_name() == "fashion_mnist-v-1c4e9dc4"
    assert all(getattr(TrainConfig(), field) == value for field, value in config.UNNAMED.items())


@pytest.mark.parametrize("field", FIELDS)
def test_differences_name_the_field_and_both_values(field):
    mine, theirs = TrainConfig(), TrainConfig(**{field: OTHER[field]})
    (line,) = mine.differences(theirs, fields=tuple(FIELDS))
    assert line.startswith(f"{field}: {FIELDS[field]!r} against {OTHER[field]!r}")
    assert bool(mine.differences(theirs)) == (field in config.WEIGHT_FIELDS)
    assert mine.differences(mine, fields=tuple(FIELDS)) == []


def test_what_decides_the_meaning_of_weights():
    # which leaves no trace in the weights' shapes or use
    network = set(TrainConfig().network()) - {"dropout"}
    others = {
        "dataset",
        "image_size",
        "pad",
        "data_range",
        "timesteps",
        "schedule",
        "beta_scale",
        "target",
        "model",
    }
    assert network | others <= set(config.WEIGHT_FIELDS)


def test_replace_changes_a_copy_and_checks_it():
    cfg = TrainConfig()
    assert cfg.replace(lr=1e-3).lr == 1e-3 and cfg.lr == FIELDS["lr"]
    with pytest.raises(ValueError, match="target"):
        cfg.replace(target="x")


def test_network_and_noise_are_what_the_two_builders_take():
    assert set(TrainConfig().network()) == set(inspect.signature(UNet).parameters)
    assert set(TrainConfig().noise()) == set(inspect.signature(schedules.make_schedule).parameters)


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"), [(2, 100, 10, 20), (0.5, 100, 10, 5), (1e-6, 3, 4, 1)]
)
def test_steps(epochs, images, batch, steps):
    assert TrainConfig(epochs=epochs, batch_size=batch).steps(images) == steps


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_presets_make_a_valid_config_and_network(device):
    UNet(**TrainConfig(**config.preset_for(device)).network())


def test_the_config_itself_outside_fast_mode(monkeypatch):
    monkeypatch.delenv("DDPM_FAST", raising=False)
    cfg = TrainConfig()
    assert config.for_this_run(cfg) is cfg


@pytest.mark.parametrize("timesteps", [30, 50, 200, 1000, 2000])
def test_fast_mode_keeps_the_total_noise_of_the_linear_schedule(monkeypatch, timesteps):
    monkeypatch.setenv("DDPM_FAST", "1")
    full = TrainConfig(schedule="linear", timesteps=timesteps, beta_scale=1000 / timesteps)
    fast = config.for_this_run(full)
    assert fast.timesteps == min(timesteps, 50)
    noise = [
        -math.log(schedules.make_schedule(**cfg.noise()).alpha_bars[-1]) for cfg in (full, fast)
    ]
    assert noise[1] == pytest.approx(noise[0], rel=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 2, "heads": 16},
        {"widths": (64, 128, 256), "attention_levels": (1, 2)},
        {"heads": 32},
    ],
)
def test_fast_mode_shrinks_any_valid_network_to_a_valid_one(monkeypatch, changes):
    monkeypatch.setenv("DDPM_FAST", "1")
    full = TrainConfig(**changes)
    fast = config.for_this_run(full)
    small, large = (
        sum(p.numel() for p in UNet(**cfg.network()).parameters()) for cfg in (fast, full)
    )
    assert small <= large and len(fast.widths) == len(full.widths)
    assert fast.steps(1000) < 100


@pytest.mark.parametrize("model", ["anime", "article", "guide", "mnist32"])
def test_fast_mode_shows_the_gallery_few_and_small_images_of_a_size_it_takes(monkeypatch, model):
    monkeypatch.setenv("DDPM_FAST", "1")
    full = TrainConfig(
        model=model, image_size=28 if model == "article" else 48, pad=0 if model == "article" else 8
    )
    fast = config.for_this_run(full)
    assert fast.image_size == (28 if model == "article" else 8) and fast.image_size > 2 * fast.pad
    assert fast.steps(60_000) <= 3 and config.for_this_run(fast) == fast
