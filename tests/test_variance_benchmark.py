"""The benchmark of the two variances in fast mode: what it writes, and that it goes on."""

import json

import pytest
import torch

from benchmarks import measure
from benchmarks import variance as module
from ddpm_utils import diffusion, oracle, pretrained, runtime, sampling
from ddpm_utils.schedules import NoiseSchedule, cosine_betas


def test_writes_measures_and_goes_on(fast, capsys):
    out = runtime.output_dir("benchmarks") / "variance_cpu.jsonl"
    module.main(["--device", "cpu", "--seeds", "0", "1"])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["beta"] != row["beta_tilde"] and row["beta"] > 0 for row in rows)
    assert "| 2 |" in capsys.readouterr().out
    module.main(["--device", "cpu", "--seeds", "0", "1", "2"])
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(SystemExit, match="another machine or setting"):
        module.main(["--device", "cpu", "--split", "5"])


def test_shipped_weights_are_measured_not_the_readers(monkeypatch):
    monkeypatch.delenv("DDPM_FAST", raising=False)
    monkeypatch.setattr(pretrained, "obtain", None)  # would look for checkpoints first
    model, cfg = measure.shipped_network("mnist", torch.device("cpu"))
    assert cfg.dataset == "mnist" and not model.training


def test_split_at_the_end_is_the_sampler_itself():
    """From T − 1 on every step is single: the images are those of `ddpm_sample`, bit for bit."""
    schedule, shape = NoiseSchedule(cosine_betas(30)), (3, 1, 2, 2)
    denoise = oracle.GaussianDenoiser(schedule, torch.zeros(4), 0.3 * torch.eye(4))
    both = module.draw_both(denoise, schedule, shape, 29, seed=5)
    for variance, images in both.items():
        rng = torch.Generator().manual_seed(5)
        states = sampling.ddpm_sample(denoise, schedule, shape, variance, generator=rng)
        assert torch.equal(images, sampling.last(states))


def final_variance(schedule, data_variance: float, split: int, name: str) -> float:
    """Variance of the samples for Gaussian data of this variance and the exact denoiser."""
    t, one = torch.arange(len(schedule)), torch.ones(len(schedule), 1, dtype=torch.float64)
    alpha_bar = schedule.alpha_bars.double()[:, None]
    x0_hat = alpha_bar.sqrt() * data_variance / (alpha_bar * data_variance + 1 - alpha_bar)
    step_of = {v: diffusion.p_mean_variance(schedule, x0_hat, one, t, v) for v in module.VARIANCES}
    v = 1.0
    for step in reversed(range(len(schedule))):
        mean, noise = step_of[name if step <= split else "beta_tilde"]
        v = mean[step].item() ** 2 * v + (noise[step].item() if step > 0 else 0.0)
    return v


def test_the_last_hundred_steps_hold_nearly_all_of_the_difference():
    """Where the data are narrow, which is where the two variances differ at all."""
    schedule = NoiseSchedule(cosine_betas(1000))
    for data_variance in (1e-4, 1e-3, 1e-2):
        base = final_variance(schedule, data_variance, 999, "beta_tilde")
        whole, part = (
            final_variance(schedule, data_variance, split, "beta") / base - 1
            for split in (999, 100)
        )
        assert 0.04 < whole and 0.9 * whole < part < whole
