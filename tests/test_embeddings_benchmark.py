"""The benchmark of the embeddings in fast mode, and that it measures what lesson 02 defines."""

import ast
import inspect
import json

import pytest
import torch
from lesson_files import code_of, definitions, read_lesson

from benchmarks import embeddings as module
from ddpm_utils import runtime


def test_lesson_defines_the_same():
    lesson = definitions(code_of(read_lesson("02_time_embeddings")))
    here = definitions(inspect.getsource(module))
    names = {embed.__name__ for embed in module.EMBEDDINGS.values()} - {"sinusoidal_embedding"}
    for name in (*names, "interleave", "PlayNet"):
        (in_lesson,), (in_benchmark,) = lesson[name], here[name]
        assert ast.dump(in_lesson) == ast.dump(in_benchmark), f"{name} differs from lesson 02's"


def test_writes_measures_and_goes_on(fast, capsys):
    out = runtime.output_dir("benchmarks") / "embeddings_cpu.jsonl"
    module.main(["--device", "cpu", "--seeds", "0"])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["embedding"] for row in rows] == list(module.EMBEDDINGS)
    assert all(len(row["bins"]) == module.N_BINS and row["loss"] > 0 for row in rows)
    blind = next(row for row in rows if row["embedding"] == "no t")
    assert len(set(blind["late"].values())) == 1
    module.main(["--device", "cpu", "--seeds", "0", "1"])
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2 * len(module.EMBEDDINGS)
    assert "| raw t | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another machine or setting"):
        module.main(["--device", "cpu", "--steps", "6"])


@pytest.mark.parametrize("name", module.EMBEDDINGS)
@pytest.mark.parametrize("dim", [16, 18, 128])
def test_every_embedding_has_the_same_width(name, dim):
    e = module.EMBEDDINGS[name](torch.tensor([0, 1, 999]), dim)
    assert e.shape == (3, dim) and e.dtype == torch.float32
    assert torch.equal(e[0], e[2]) == (name == "no t")


def test_twice_the_decay_has_the_hands_of_half_the_width():
    t, dim = torch.arange(1000), 128
    table = module.twice_the_decay(t, dim)[:, : dim // 2]
    expected = module.interleave(module.half_as_wide(t, dim)[:, : dim // 2])
    torch.testing.assert_close(table, expected, rtol=0, atol=4e-4)
