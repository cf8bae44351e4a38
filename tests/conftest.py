"""Fixtures that more than one file uses."""

import os

import pytest  # and nothing of the package: files that need no network shall not wait for torch

# oracles want the digits; what bfloat16 does is tested where it is used
os.environ["DDPM_FLOAT32"] = "1"

TINY = dict(
    dataset="digits",
    image_size=8,
    timesteps=100,
    widths=(8,),
    blocks=1,
    attention_levels=(),
    time_dim=16,
    groups=4,
    heads=1,
    batch_size=4,
    epochs=2.0,
    warmup_steps=2,
    lr=5e-3,
)


@pytest.fixture
def tiny():
    """Builds the smallest useful config; keyword arguments change fields."""
    from ddpm_utils.config import TrainConfig

    return lambda **changes: TrainConfig(**(TINY | changes))


@pytest.fixture
def net():
    """Builds the network of a config, the same weights every time, and leaves the global generator
    as it was.
    """
    import torch

    from ddpm_utils.unet import UNet

    def build(cfg, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return UNet(**cfg.network())

    return build


@pytest.fixture
def same_numbers_every_time():
    """The global generator at seed 0, and afterwards as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def fast(own_folders, monkeypatch):
    """Fast mode, with all folders in a temporary one, which is returned."""
    monkeypatch.setenv("DDPM_FAST", "1")
    return own_folders


@pytest.fixture
def own_folders(monkeypatch, tmp_path):
    """The project's root moved into a temporary folder and every variable of the project unset.

    Returns that folder.
    """
    from ddpm_utils import runtime

    for name in ("DDPM_FAST", "DDPM_DATA_DIR", "DDPM_OUTPUT_DIR", "DDPM_CHECKPOINT_DIR"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(runtime, "ROOT", root)
    monkeypatch.setattr(runtime, "IN_CHECKOUT", True)
    return root
