"""The lessons as published, and as `make test` has just executed them in fast mode."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from lesson_files import (
    COPIES,
    ROOT,
    code_cells,
    code_of,
    lesson_names,
    outputs_of,
    pictures_of,
    printed,
    read_lesson,
    text_of,
    tool,
)

LESSONS = lesson_names()
every_lesson = pytest.mark.parametrize("lesson", LESSONS)
PATH_OF_A_MACHINE = re.compile(r"(?<![\w.:/])(/(home|root|Users|tmp|work|opt|mnt)/[\w.-]+|[A-Z]:\\\\)")
WITH_GIF = ("01", "05", "06", "07", "09")


@every_lesson
def test_outputs_come_from_one_clean_run(lesson):
    notebook = read_lesson(lesson)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run `make render`"
    assert "FAST MODE" not in printed(notebook), "committed outputs must not come from fast mode"
    assert "widgets" not in notebook.metadata
    for output in outputs_of(notebook):
        assert output.output_type != "error", output.evalue
        assert output.get("name") != "stderr", output.text
        assert not any("widget" in kind for kind in output.get("data", {}))


@every_lesson
def test_file_is_plain_and_small(lesson):
    path = tool.NOTEBOOKS / f"{lesson}.ipynb"
    notebook = read_lesson(lesson)
    assert path.stat().st_size < 1_100_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    stored = code_of(notebook) + text_of(notebook) + printed(notebook)
    assert not PATH_OF_A_MACHINE.search(stored), PATH_OF_A_MACHINE.search(stored)
    longest = max(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert longest <= 45, f"a cell of {longest} lines"


@every_lesson
def test_first_cells_and_links(lesson):
    notebook, address = read_lesson(lesson), tool.repository()
    setups = [code_cells(read_lesson(name))[0].source for name in LESSONS]
    assert len(set(setups)) == 1, "the setup cell differs between lessons"
    assert f'REPOSITORY = "{address}"' in setups[0]
    (knobs,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for line in knobs.source.splitlines():  # a value a line, which is what `with_parameters` replaces
        assert re.fullmatch(r"[A-Z_]+ = ([^#(]*|\([^#]*\) *)(# .*)?", line), line
    badge = f"https://colab.research.google.com/github/{address.removeprefix('https://github.com/')}/blob/main/notebooks/{lesson}.ipynb"
    assert badge in notebook.cells[0].source
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(notebook)):
        if "://" not in target:
            assert (tool.NOTEBOOKS / target).exists(), f"a link to {target}, which is not there"
    at = LESSONS.index(lesson)
    for neighbour in LESSONS[max(0, at - 1) : at] + LESSONS[at + 1 : at + 2]:
        assert f"{neighbour}.ipynb" in notebook.cells[0].source, f"no link to {neighbour}"


def test_only_training_asks_for_a_gpu():
    asking = [name for name in LESSONS if read_lesson(name).metadata.get("accelerator") == "GPU"]
    assert asking == ["04_training"]


@every_lesson
def test_pictures_have_words(lesson):
    notebook = read_lesson(lesson)
    shown = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(shown) >= 4
    for output in shown:
        assert len(output.metadata["image/png"]["alt"]) > 20
        assert "image/gif" not in output.data
    gifs = [picture for picture in pictures_of(notebook) if picture[:6] == b"GIF89a"]
    assert all(len(gif) <= 400_000 for gif in gifs)
    if lesson[:2] in WITH_GIF:
        assert gifs


@every_lesson
def test_static_export_shows_every_picture(lesson):
    """What nbconvert writes, and so what GitHub shows, holds each picture, the GIFs among them, byte for byte."""
    from nbconvert import HTMLExporter

    notebook = read_lesson(lesson)
    page = HTMLExporter(embed_images=False).from_notebook_node(notebook)[0]
    for output in outputs_of(notebook):
        data = output.get("data", {}).get("image/png")
        if data:
            assert data.strip()[:200] in page and data.strip()[-200:] in page.replace("\n", "")


@every_lesson
def test_exercises_have_checks_and_solutions(lesson):
    original = len(read_lesson(lesson).cells)
    checks = [cell for cell in code_cells(read_lesson(lesson)) if re.search(r"^lesson_\d\d\.\w+\(", cell.source, re.M)]
    added = len(tool.with_solutions(read_lesson(lesson)).cells) - original
    assert added == len(checks) >= 3


@every_lesson
def test_executed_copy(lesson):
    """`make test` ran the lesson in fast mode, with the folded solutions put in, just before these tests."""
    if not (COPIES / f"{lesson}.ipynb").is_file():
        pytest.fail("the executed copies are missing: run `make test`, or its nbmake line")
    notebook = read_lesson(lesson, COPIES)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "FAST MODE" in printed(notebook)
    for cell in cells:
        for output in cell.outputs:
            assert output.get("name") != "stderr", (cell.source, output.text)
            assert output.output_type != "error"
        if "solution" in cell.metadata.get("tags", []):
            assert cell.outputs[0].text.startswith("✓")
    unanswered = [
        output.data["text/plain"] for output in outputs_of(notebook) if "text/plain" in output.get("data", {})
    ]
    assert any(text.startswith("…") for text in unanswered), "a stub must say that it is not answered yet"
    assert len(pictures_of(notebook)) >= 4
    if lesson[:2] in WITH_GIF:
        assert any(picture[:6] == b"GIF89a" for picture in pictures_of(notebook))


def test_setup_cell_clones_where_there_is_nothing(tmp_path):
    """From an empty folder, the address overridden to a local repository, run twice; then the package can be imported."""
    origin = tmp_path / "origin" / "ddpm-from-scratch"
    origin.mkdir(parents=True)
    (origin / "ddpm_utils").mkdir()
    (origin / "ddpm_utils" / "__init__.py").write_text("marker = 'cloned'\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(origin)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    setup = code_cells(read_lesson(LESSONS[0]))[0].source.replace(tool.repository(), origin.as_uri())
    assert origin.as_uri() in setup
    empty = tmp_path / "empty"
    empty.mkdir()
    program = setup + "\n" + setup + "\nimport ddpm_utils\nassert ddpm_utils.marker == 'cloned'\n"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], cwd=empty, check=True, env=env)
    assert (empty / "ddpm-from-scratch").is_dir()


def test_one_command_changes_the_address(tmp_path, monkeypatch):
    import shutil

    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(tool.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path / "notebooks")
    old = tool.repository().removeprefix("https://github.com/")
    tool.change_address("https://github.com/someone/else")
    assert tool.repository() == "https://github.com/someone/else"
    for path in [tmp_path / "README.md", *tool.lessons()]:
        text = path.read_text(encoding="utf-8")
        assert old not in text and "someone/else" in text
    with pytest.raises(SystemExit, match="no address"):
        tool.change_address("someone/else")


# What readers change. Each line is one lesson executed whole, in fast mode, with other values in its config cell.
CHANGES = {
    "01": [{"T": 200}, {"T": 37}, {"DATASET": "mnist"}, {"DATASET": "digits"}, {"SEED": 7}],
    "02": [{"T": 200}, {"DIM": 64}, {"DATASET": "digits"}, {"SEED": 7}],
    "03": [{"WIDTHS": (16, 32, 32), "IMAGE_SIZE": 32}, {"DATASET": "digits", "TIMESTEPS": 200}, {"SEED": 7}],
    "04": [
        {"TARGET": "eps", "SCHEDULE": "linear"},
        {"TARGET": "x0"},
        {"TIMESTEPS": 200},
        {"DATASET": "mnist", "BATCH_SIZE": 16},
        {"TRAIN": False},
        {"SEED": 7},
    ],
    "05": [{"DATASET": "mnist"}, {"DATASET": "digits"}, {"TIMESTEPS": 200}, {"SCHEDULE": "linear", "TARGET": "eps"}],
    "06": [{"DATASET": "mnist", "STEPS": 3}, {"DATASET": "digits"}, {"N_SAMPLES": 40}, {"STEPS": 200}, {"SEED": 7}],
    "07": [
        {"DATASET": "mnist", "SCALE": 0.0},
        {"DATASET": "digits"},
        {"SCALE": 1.0, "STEPS": 3},
        {"STEPS": 200},
        {"SEED": 7},
    ],
    "08": [
        {"DATASET": "mnist"},
        {"DATASET": "digits"},
        {"N_SAMPLES": 40, "BOUND_IMAGES": 2},
        {"STEPS": 2},
        {"SEED": 7},
    ],
    "09": [{"DATASET": "digits"}, {"DATASET": "mnist", "N_IMAGES": 100}, {"STEPS": 200}, {"SEED": 7}],
    "12": [{"DATASET": "digits", "N_RACE": 200}, {"DATASET": "mnist"}, {"TIMING_SECONDS": 20.0}, {"SEED": 7}],
}
CASES = [(name, change) for name in LESSONS for change in CHANGES.get(name[:2], [])]


def run_in_fast_mode(notebook, folder, **env):
    tool.execute(
        notebook,
        folder,
        {
            "DDPM_FAST": "1",
            "OMP_NUM_THREADS": "1",
            "DDPM_OUTPUT_DIR": str(folder),
            "DDPM_CHECKPOINT_DIR": str(folder / "checkpoints"),
            **env,
        },
    )
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize(("lesson", "change"), CASES, ids=[f"{name[:2]}-{change}" for name, change in CASES])
def test_changed_knobs_stay_green(lesson, change, tmp_path):
    notebook = tool.with_parameters(read_lesson(lesson), change)
    run_in_fast_mode(notebook, tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@every_lesson
def test_all_cells_twice_in_one_kernel(lesson, tmp_path):
    notebook = read_lesson(lesson)
    notebook.cells += [nbformat.from_dict({**cell, "id": f"again-{i}"}) for i, cell in enumerate(notebook.cells)]
    run_in_fast_mode(notebook, tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@every_lesson
def test_without_any_data(lesson, tmp_path):
    """From a copy elsewhere with no data folder and no network that answers: every lesson runs on the digits."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "ddpm_utils", copy / "ddpm_utils", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "somewhere").mkdir()
    unreachable = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    notebook = read_lesson(lesson)
    run_in_fast_mode(notebook, copy / "somewhere", DDPM_DATA_DIR="", no_proxy="", **unreachable)
