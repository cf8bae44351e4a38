"""Device, seed, fast mode and folders."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_utils import runtime

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.mark.parametrize(("value", "fast"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_fast_mode_follows_the_variable(monkeypatch, value, fast):
    if value is not None:
        monkeypatch.setenv("DDPM_FAST", value)
    assert runtime.is_fast() is fast
    assert runtime.shrink(1000, 3) == (3 if fast else 1000)
    assert ("fast" in runtime.checkpoint_dir("lesson").parts) is fast


def test_start_says_device_and_seed_in_one_line_and_shouts_in_fast_mode(monkeypatch, capsys):
    device, rng = runtime.start(7, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "seed 7" in lines[0] and "CPU" in lines[0] and device.type == "cpu"
    assert rng.initial_seed() == 7
    monkeypatch.setenv("DDPM_FAST", "1")
    runtime.start(7, "cpu")
    assert "FAST MODE" in capsys.readouterr().out


def test_pick_device_takes_what_there_is():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_device(torch.device("cpu")) == torch.device("cpu")
    assert runtime.pick_device().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["tpu", "GPU", "", "cuda:0"])
def test_pick_device_refuses_what_there_is_not(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"not here.*cpu") as error:
        runtime.pick_device(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["cuda:1", "cuda:7", "cuda:x"])
def test_pick_device_refuses_a_card_beyond_the_last(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=name):
        runtime.pick_device(name)


def test_seed_everything_repeats_every_source_of_chance():
    def draw():
        rng = runtime.seed_everything(5)
        return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=rng).item()  # noqa: NPY002

    assert draw() == draw()


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "avx512_f"])
@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_autocast_on_a_cpu_follows_its_features_unless_told_otherwise(monkeypatch, feature, variable):
    monkeypatch.setattr(runtime, "_cpu_features", lambda: {feature: True, "sse": True})
    monkeypatch.delenv("DDPM_FLOAT32", raising=False)
    if variable is not None:
        monkeypatch.setenv("DDPM_FLOAT32", variable)
    with runtime.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    wanted = feature.endswith("bf16") and variable != "1"
    assert product.dtype == (torch.bfloat16 if wanted else torch.float32)


def test_the_cpu_s_features_can_be_asked_for():
    assert isinstance(dict(runtime._cpu_features()), dict)


@pytest.mark.parametrize("path", ["/", "/data", "/a/b", "/a/b/c/d", "~", "here", "../up"])
def test_short_path_is_never_absolute(path):
    short = runtime.short_path(Path(path).expanduser())
    assert not Path(short).is_absolute() and len(Path(short).parts) <= 2


def test_short_path_inside_the_project_is_relative_to_it(own_folders):
    assert runtime.short_path(own_folders / "a" / "b" / "c.pt") == "a/b/c.pt"


def test_folders_lie_beside_the_package_and_only_outputs_is_made(own_folders, monkeypatch, tmp_path):
    assert runtime.data_dir() == own_folders / "data" and not runtime.data_dir().exists()
    assert runtime.checkpoint_dir("x") == own_folders / "checkpoints" / "x" and not runtime.checkpoint_dir().exists()
    assert runtime.output_dir("x") == own_folders / "outputs" / "x" and (own_folders / "outputs" / "x").is_dir()
    monkeypatch.setenv("DDPM_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DDPM_CHECKPOINT_DIR", str(tmp_path / "kept"))
    assert runtime.checkpoint_dir("x") == tmp_path / "kept" / "x"
    assert runtime.output_dir("y") == tmp_path / "elsewhere" / "y" and (tmp_path / "elsewhere" / "y").is_dir()


def test_data_dir_override(monkeypatch):
    monkeypatch.delenv("DDPM_DATA_DIR", raising=False)
    assert runtime.data_dir_override() is None
    monkeypatch.setenv("DDPM_DATA_DIR", "~/sets")
    assert runtime.data_dir_override() == Path.home() / "sets"
