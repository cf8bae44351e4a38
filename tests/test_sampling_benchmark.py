"""The benchmark of the samplers in fast mode: what it writes, that it goes on, and that equal
points draw equal images.
"""

import csv
import json

import pytest
import torch

from benchmarks import sampling as module
from ddpm_utils import config, runtime
from ddpm_utils.diffusion import Denoiser
from ddpm_utils.schedules import make_schedule


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writes_measures_and_goes_on(fast, capsys):
    out = runtime.output_dir("benchmarks") / "sampling_cpu.jsonl"
    module.main(["--device", "cpu", "--most", "5"])
    first = read(out)
    wanted = {(name, c) for name, entry in module.PLAN.items() for c in entry[-1] if c <= 5}
    assert {(row["name"], row["calls"]) for row in first} == wanted and len(first) == len(wanted)
    assert all(
        row["distance"] > row["floor"] > 0 and row["seconds"] > 0 and row["seed"] == 0
        for row in first
    )
    module.main(["--device", "cpu", "--most", "7"])
    again = read(out)
    assert again[: len(first)] == first and {row["calls"] for row in again[len(first) :]} == {7}
    with open(out.with_suffix(".csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(again) and set(rows[0]) == set(module.COLUMNS)
    assert out.with_suffix(".png").is_file() and "| DDIM |" in capsys.readouterr().out


def test_results_of_other_weights_are_refused(fast):
    out = runtime.output_dir("benchmarks") / "sampling_cpu.jsonl"
    module.main(["--device", "cpu", "--most", "5"])
    rows = read(out)
    out.write_text(
        "".join(json.dumps(row | {"weights": "others"}) + "\n" for row in rows), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="name another file"):
        module.main(["--device", "cpu", "--most", "7"])


def test_report_without_results(fast, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.sampling"):
        module.report(tmp_path / "nothing.jsonl")


def test_every_sampler_of_the_plan_starts_from_the_same_noise():
    schedule, starts = make_schedule(**config.TrainConfig(timesteps=50).noise()), []

    def model(x, t, y):
        starts.append(x) if t[0] == 49 else None
        return 0.1 * x

    denoise = Denoiser(model, schedule, "v")
    for sampler, spacing, eta, _ in module.PLAN.values():
        rng = torch.Generator().manual_seed(module.SEED)
        module.draw(denoise, schedule, (2, 1, 4, 4), sampler, spacing, eta, 5, rng)
    assert len(starts) == len(module.PLAN) and all(
        torch.equal(start, starts[0]) for start in starts
    )
