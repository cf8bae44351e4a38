"""The short trainings of lesson 04 in fast mode."""

import json

import pytest

from benchmarks import short_runs as module
from ddpm_utils import config, runtime


def test_writes_measures_and_goes_on(fast, capsys):
    out = runtime.output_dir("benchmarks") / "short_runs_cpu.jsonl"
    module.main(["--device", "cpu", "--seeds", "0"])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["experiment"] for row in rows] == list(module.STEPS)
    for row in rows:
        assert [int(step) for step in row["steps"]] == [5, 10]
        assert all(len(at["bins"]) == module.N_BINS for at in row["steps"].values())
        assert bool(row["moved"]) == (row["experiment"] == "paper")
    module.main(["--device", "cpu", "--seeds", "0", "1"])
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2 * len(module.STEPS)
    assert "| constant | 1 |" in capsys.readouterr().out


def test_report_without_results_says_what_to_run(fast, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.short_runs"):
        module.report(tmp_path / "none.jsonl")


def test_the_setting_of_the_paper_is_algorithm_1():
    cfg = module.settings("paper", 0, 60_000)
    assert all(getattr(cfg, name) == value for name, value in config.PAPER.items())
    assert (cfg.optimizer, cfg.warmup_steps, cfg.decay_from) == ("adam", 0, 1.0)
