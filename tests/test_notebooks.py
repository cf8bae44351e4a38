"""The lessons as published, and as `make test` has just executed them in fast mode."""

import ast
import base64
import functools
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from lesson_files import (
    COPIES,
    PAGE,
    ROOT,
    code_cells,
    code_of,
    images_of,
    lesson_names,
    outputs_of,
    printed,
    read_lesson,
    text_of,
    tool,
)

from ddpm_utils import plots

LESSONS = lesson_names()
NOTEBOOKS = [PAGE, *LESSONS]
every_lesson = pytest.mark.parametrize("lesson", LESSONS)
every_notebook = pytest.mark.parametrize("lesson", NOTEBOOKS)
PATH_OF_A_MACHINE = re.compile(
    r"(?<![\w.:/])(/(home|root|Users|tmp|work|opt|mnt)/[\w.-]+|[A-Z]:\\\\)"
)
WITH_GIF = ("01", "05", "06", "07", "09")


@every_notebook
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


@every_notebook
def test_file_is_plain_and_small(lesson):
    path = tool.NOTEBOOKS / f"{lesson}.ipynb"
    notebook = read_lesson(lesson)
    assert path.stat().st_size < 1_100_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}
    assert all(set(cell.metadata) <= {"tags", *tool.FOLDED} for cell in notebook.cells)
    stored = code_of(notebook) + text_of(notebook) + printed(notebook)
    assert not PATH_OF_A_MACHINE.search(stored), PATH_OF_A_MACHINE.search(stored)
    longest = max(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert longest <= 60, f"a cell of {longest} lines"


def test_setup_cell_is_the_same_everywhere():
    setups = {code_cells(read_lesson(name))[0].source for name in LESSONS}
    assert len(setups) == 1, "the setup cell differs between lessons"
    setup = setups.pop()
    assert f'REPOSITORY = "{tool.repository()}"' in setup
    assert setup.startswith("# @title Setup"), "Colab shows this line when it hides the cell"


def test_jupyterlab_and_colab_fold_the_setup_cell_and_no_other():
    for name in LESSONS:
        setup, *others = code_cells(read_lesson(name))
        assert {key: setup.metadata.get(key) for key in tool.FOLDED} == tool.FOLDED
        assert not any(key in cell.metadata for cell in others for key in tool.FOLDED)


@every_notebook
def test_first_cells_and_links(lesson):
    notebook, address = read_lesson(lesson), tool.repository()
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    # a value a line, which is what `with_parameters` replaces
    for line in settings.source.splitlines():
        assert re.fullmatch(r"[A-Z_]+ = ([^#(]*|\([^#]*\) *)(# .*)?", line), line
    badge = f"https://colab.research.google.com/github/{address.removeprefix('https://github.com/')}/blob/main/notebooks/{lesson}.ipynb"
    assert badge in notebook.cells[0].source
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(notebook)):
        if "://" not in target:
            assert (tool.NOTEBOOKS / target).exists(), f"a link to {target}, which is not there"
    at = NOTEBOOKS.index(lesson)
    for neighbor in NOTEBOOKS[max(0, at - 1) : at] + NOTEBOOKS[at + 1 : at + 2]:
        assert f"{neighbor}.ipynb" in notebook.cells[0].source, f"no link to {neighbor}"


def test_only_training_asks_for_a_gpu():
    asking = [name for name in LESSONS if read_lesson(name).metadata.get("accelerator") == "GPU"]
    assert asking == ["04_training"]


@every_notebook
def test_images_have_words(lesson):
    notebook = read_lesson(lesson)
    shown = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(shown) >= 4
    for output in shown:
        assert len(output.metadata["image/png"]["alt"]) > 20
        assert "image/gif" not in output.data
    gifs = [image for image in images_of(notebook) if image[:6] == b"GIF89a"]
    assert all(len(gif) <= 400_000 for gif in gifs)
    if lesson[:2] in WITH_GIF:
        assert gifs


@every_notebook
def test_static_page_shows_every_image_with_its_words(lesson):
    """Our page holds each output's bytes, the GIFs among them, with its alternative text and its
    width.
    """
    from bs4 import BeautifulSoup

    notebook = read_lesson(lesson)
    page = BeautifulSoup(tool.page_of(notebook), "html.parser")
    images = [
        image for image in page.select("img") if image["src"].startswith("data:image/png;base64,")
    ]
    shown = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(images) == len(shown) >= 4
    for image, output in zip(images, shown, strict=True):
        assert base64.b64decode(image["src"].split(",", 1)[1]) == base64.b64decode(
            output.data["image/png"]
        )
        assert image["alt"] == output.metadata["image/png"]["alt"]
        assert image.get("width") == (str(output.metadata["image/png"].get("width", "")) or None)
    assert all(image["alt"].strip() for image in page.select("img"))
    assert not [
        link["href"]
        for link in page.select("a[href]")
        if re.match(r"\d\d_\w+\.ipynb", link["href"])
    ]


@pytest.mark.parametrize(
    "alt", ['"quoted" <b>', "a < b & c > d", "x̂₀ of α", "first\nsecond", "it's <img src=x>"]
)
def test_static_page_keeps_the_words_as_they_are(alt):
    from bs4 import BeautifulSoup

    data, metadata = plots.Image(b"\x89PNG", alt)._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    (image,) = BeautifulSoup(tool.page_of(notebook), "html.parser").select("img")
    assert image["alt"] == alt


def test_export_brings_the_images_that_pages_link_to(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "lessons", lambda: [tool.NOTEBOOKS / f"{LESSONS[0]}.ipynb"])
    tool.export(tmp_path / "new")
    assert (tmp_path / "new" / f"{LESSONS[0]}.html").stat().st_size > 100_000
    assert {path.name for path in (tmp_path / "new" / "assets").iterdir()} >= set(tool.ASSETS)


@every_notebook
def test_script_export_is_a_python_file(lesson):
    from nbconvert import ScriptExporter

    notebook = read_lesson(lesson)
    script, resources = ScriptExporter().from_notebook_node(notebook)
    assert resources["output_extension"] == ".py"
    compile(script, lesson, "exec")
    tool.clean(notebook)  # a render keeps it so
    assert (
        notebook.metadata.language_info
        == tool.LANGUAGE
        == read_lesson(lesson).metadata.language_info
    )


@every_lesson
def test_exercises_have_checks_and_solutions(lesson):
    original = len(read_lesson(lesson).cells)
    checks = [
        cell
        for cell in code_cells(read_lesson(lesson))
        if re.search(r"^lesson_\d\d\.\w+\(", cell.source, re.M)
    ]
    added = len(tool.with_solutions(read_lesson(lesson)).cells) - original
    assert added == len(checks) >= 3


@every_lesson
def test_executed_copy(lesson):
    """`make test` ran the lesson in fast mode, with the folded solutions put in, just before these
    tests.
    """
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
        output.data["text/plain"]
        for output in outputs_of(notebook)
        if "text/plain" in output.get("data", {})
    ]
    assert any(text.startswith("…") for text in unanswered), (
        "a stub must say that it is not answered yet"
    )
    assert len(images_of(notebook)) >= 4
    if lesson[:2] in WITH_GIF:
        assert any(image[:6] == b"GIF89a" for image in images_of(notebook))


# The setup cell, executed in folders of every kind. No case may reach the network.

SETUP = code_cells(read_lesson(LESSONS[0]))[0].source
NEVER = "https://github.com/nobody/never-made-this"
OFFLINE = {"no_proxy": "", "NO_PROXY": ""} | {
    name: "http://127.0.0.1:9"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
}


def run_setup(
    folder,
    address=NEVER,
    before="",
    after="",
    **env,
):
    """Run the setup cell in `folder` as IPython would; `before` and `after` are lines around it.

    Returns the process.
    """
    script = folder / "cell.ipy"
    setup = SETUP.replace(tool.repository(), address)
    script.write_text(f"{before}\n{setup}\n{after}\n", encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | OFFLINE | env
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-banner", script.name]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def namesake(folder, kind):
    """Something else called ddpm_utils in `folder`."""
    if kind == "file":
        (folder / "ddpm_utils.py").write_text("x = 1\n")
    else:
        (folder / "ddpm_utils").mkdir()
    if kind == "package":
        (folder / "ddpm_utils" / "__init__.py").write_text("x = 1\n")


every_namesake = pytest.mark.parametrize("kind", ["package", "folder without __init__", "file"])


def origin_of(tmp_path):
    """The address of a local repository that holds a package like ours."""
    origin = tmp_path / "origin" / "ddpm-from-scratch"
    (origin / "ddpm_utils" / "exercises").mkdir(parents=True)
    (origin / "ddpm_utils" / "__init__.py").write_text("marker = 'cloned'\n")
    (origin / "ddpm_utils" / "exercises" / "lesson_01.py").write_text("")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(origin)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    return origin.as_uri()


def test_setup_cell_is_short():
    lines = SETUP.splitlines()
    assert len(lines) <= 38 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "chosen, found",
    [({}, "200"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_setup_cell_lets_waiting_threads_sleep_unless_the_user_chose(
    tmp_path, monkeypatch, chosen, found
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ddpm_utils").symlink_to(ROOT / "ddpm_utils")
    done = run_setup(tmp_path, after="print(os.environ.get('GOMP_SPINCOUNT'))", **chosen)
    assert done.stdout.strip() == found, done.stdout + done.stderr


@pytest.mark.parametrize("beside", [None, "package", "folder without __init__", "file"])
def test_setup_cell_clones_where_there_is_nothing(tmp_path, beside):
    """Run twice, with and without a namesake beside the notebook; then our package is the one
    imported.
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    if beside:
        namesake(empty, beside)
    address = origin_of(tmp_path)
    again = SETUP.replace(tool.repository(), address)
    done = run_setup(
        empty, address, after=f"{again}\nimport ddpm_utils\nprint(ddpm_utils.marker, len(sys.path))"
    )
    assert done.stdout.startswith("cloned "), done.stdout + done.stderr
    assert (empty / "ddpm-from-scratch").is_dir()


@every_namesake
def test_setup_cell_passes_a_namesake_beside_the_notebook(tmp_path, kind):
    (tmp_path / "notebooks").mkdir()
    namesake(tmp_path / "notebooks", kind)
    (tmp_path / "ddpm_utils").symlink_to(ROOT / "ddpm_utils")
    done = run_setup(
        tmp_path / "notebooks", after="from ddpm_utils import config\nprint(config.DATASETS)"
    )
    assert "fashion_mnist" in done.stdout, done.stdout + done.stderr


def test_setup_cell_takes_an_installed_package_and_passes_an_installed_namesake(tmp_path):
    (tmp_path / "here").mkdir()
    ours = "from ddpm_utils import config\nprint(config.DATASETS)"
    assert "fashion_mnist" in run_setup(tmp_path / "here", after=ours, PYTHONPATH=str(ROOT)).stdout
    namesake(tmp_path, "package")
    done = run_setup(tmp_path / "here", after=ours, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "git failed" in done.stdout  # a namesake is no reason to go on without ours


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            NEVER,
            r"git failed \(fatal: .*https://github.com/nobody/never-made-this.*\): check the "
            r"network, or clone",
        ),
        (
            "https://github.com/OWNER/ddpm-from-scratch",
            "this copy's address is a placeholder: .*make address",
        ),
    ],
)
@pytest.mark.parametrize("beside", [None, "package", "folder without __init__", "file"])
def test_setup_cell_says_in_one_line_what_to_do(tmp_path, address, words, beside):
    if beside:
        namesake(tmp_path, beside)
    done = run_setup(tmp_path, address)
    assert re.fullmatch(rf"Setup: {words}.*\n", done.stdout + done.stderr), (
        done.stdout + done.stderr
    )


def test_setup_cell_without_git(tmp_path):
    done = run_setup(tmp_path, PATH=str(tmp_path))
    assert re.fullmatch(
        r"Setup: git is not installed: install it, or clone or download .*\n", done.stdout
    )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_setup_cell_meets_something_else_where_the_clone_would_go(tmp_path, kind):
    target = tmp_path / NEVER.rsplit("/", 1)[-1]
    target.write_text("x") if kind == "file" else (target / "sub").mkdir(parents=True)
    done = run_setup(tmp_path)
    assert re.fullmatch(
        r"Setup: \S*never-made-this is something else: rename it .*\n", done.stdout
    ), done.stdout


@every_namesake
def test_setup_cell_after_the_import_of_a_namesake(tmp_path, kind):
    namesake(tmp_path, kind)
    done = run_setup(tmp_path, before="import ddpm_utils")
    assert re.fullmatch(
        r"Setup: another ddpm_utils is already imported: restart the kernel .*\n", done.stdout
    )


# The address.


@pytest.fixture
def copy_of_the_texts(tmp_path, monkeypatch):
    """What the address stands in, copied; `tool` works on the copy."""
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(tool.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path


def bytes_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("new", ["a/b", "someone/else", "p/n.g", "x/ddpm-from-scratch", "OWNER/d"])
def test_one_command_changes_the_address_there_and_back(copy_of_the_texts, new):
    old, before = tool.repository(), bytes_below(copy_of_the_texts)
    outputs = {name: outputs_of(read_lesson(name, tool.NOTEBOOKS)) for name in LESSONS}
    tool.change_address(f"https://github.com/{new}")
    assert tool.repository() == f"https://github.com/{new}"
    for path in [copy_of_the_texts / "README.md", *tool.lessons()]:
        text = path.read_text(encoding="utf-8")
        assert old.removeprefix("https://github.com/") not in text.replace(new, "")
        assert f"https://colab.research.google.com/github/{new}/blob/main/notebooks/" in text
    for name in LESSONS:
        changed = read_lesson(name, tool.NOTEBOOKS)
        assert f'REPOSITORY = "https://github.com/{new}"\n' in code_cells(changed)[0].source
        assert outputs_of(changed) == outputs[name]
    tool.change_address(old)
    assert bytes_below(copy_of_the_texts) == before


def test_only_whole_addresses_change():
    text = (
        "https://github.com/a/b, https://github.com/a/b.git and (https://github.com/a/b/issues). "
        "https://github.com/a/b. https://raw.githubusercontent.com/a/b/main/x.gif "
        "https://github.com/a/b-2 https://github.com/a/b.io https://github.com/aa/b "
        "https://example.com/a/b a/b +a/b="
    )
    assert tool.with_address(text, "a/b", "c/d") == (
        "https://github.com/c/d, https://github.com/c/d.git and (https://github.com/c/d/issues). "
        "https://github.com/c/d. https://raw.githubusercontent.com/c/d/main/x.gif "
        "https://github.com/a/b-2 https://github.com/a/b.io https://github.com/aa/b "
        "https://example.com/a/b a/b +a/b="
    )


def test_a_lesson_that_came_with_another_address_gets_the_new_one_too(copy_of_the_texts):
    """After a merge: pyproject.toml has the new address already, one lesson has the old one."""
    stranger = tool.NOTEBOOKS / f"{LESSONS[0]}.ipynb"
    placeholder = stranger.read_bytes()
    tool.change_address("https://github.com/someone/else")
    renamed = stranger.read_bytes()
    stranger.write_bytes(placeholder)
    tool.change_address("https://github.com/someone/else")
    assert stranger.read_bytes() == renamed != placeholder


@pytest.mark.parametrize(
    "typed", ["https://github.com/a/b/", "https://github.com/a/b.git", " https://github.com/a/b\n"]
)
def test_an_address_as_people_paste_it(copy_of_the_texts, typed):
    tool.change_address(typed)
    assert tool.repository() == "https://github.com/a/b"


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "a/b",
        "http://github.com/a/b",
        "https://github.com/a",
        "https://github.com/a/b/c",
        "https://github.com/a/..",
        "https://github.com/a/b c",
        "https://gitlab.com/a/b",
        "git@github.com:a/b.git",
        'https://github.com/a/b"',
        "https://github.com/a/b;x",
        "https://github.com/hojonathanho/diffusion",
    ],
)
def test_what_is_no_address_of_ours_changes_nothing(copy_of_the_texts, typed):
    before = bytes_below(copy_of_the_texts)
    with pytest.raises(
        SystemExit, match="make address REPO=https://github.com/you/name|your own repository"
    ) as error:
        tool.change_address(typed)
    assert "\n" not in str(error.value) and bytes_below(copy_of_the_texts) == before


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("how", ["argument", "environment"])
@pytest.mark.parametrize(
    "typed",
    [
        "x; touch made",
        "$(shell touch made)",
        "$$(touch made)",
        "$(touch made)",
        "`touch made`",
        "x' ; touch made; '",
        'x" ; touch made; "',
        "x\ntouch made",
        "x & touch made",
        "${shell touch made}",
        "--help",
        "",
    ],
)
def test_make_runs_nothing_that_stands_in_the_address(copy_of_the_texts, typed, how):
    (copy_of_the_texts / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "lessons.py", copy_of_the_texts / "tools")
    (copy_of_the_texts / ".venv" / "bin").mkdir(parents=True)
    python = copy_of_the_texts / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -B "$@"\n')
    python.chmod(0o755)
    before = bytes_below(copy_of_the_texts)
    command = [
        "make",
        "-o",
        ".venv/run",
        "address",
        *([f"REPO={typed}"] if how == "argument" else []),
    ]
    env = os.environ | ({"REPO": typed} if how == "environment" else {})
    env = {name: value for name, value in env.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=copy_of_the_texts, env=env, capture_output=True, text=True)
    assert "is not the address of a GitHub repository" in done.stderr, done.stderr
    assert done.returncode and bytes_below(copy_of_the_texts) == before


# The settings: what the comment of each says is what the cell below checks, before it does anything
# else.


class Started(Exception):
    """The checks are over."""


@functools.cache
def before_the_settings(lesson):
    """The names that the lesson's setup cell and imports define, with a `runtime` whose `start`
    ends the cell.
    """
    names = {}
    for cell in code_cells(read_lesson(lesson))[:2]:
        exec(cell.source, names)

    def start(*_):
        raise Started

    return names | {"runtime": SimpleNamespace(start=start)}


def settings_of(lesson):
    """Name, value and comment of each line of the config cell."""
    for line in code_cells(read_lesson(lesson))[2].source.splitlines():
        name, value, comment = re.fullmatch(r"([A-Z_]+) = ([^#]+)# (.*)", line).groups()
        yield name, ast.literal_eval(value.strip()), comment


def check_settings(lesson, **changes):
    """Run the config cell with other values and the cell below it.

    Raises Started if these values are fine.
    """
    names = dict(before_the_settings(lesson))
    config_cell, below = code_cells(read_lesson(lesson))[2:4]
    exec(config_cell.source, names)
    names |= changes
    exec(below.source, names)


def range_in(comment):
    """Lowest and highest value that a comment gives, as numbers; None if it gives no range."""
    found = re.search(r"(-?[\d.,e-]*\d) … ([\d.,e-]*\d)", comment)
    return found and tuple(float(text.replace(",", "")) for text in found.groups())


def good_and_bad(value, comment):
    """Values that a comment allows, and values of every wrong kind."""
    limits, none = range_in(comment), "None:" in comment
    bad = [*([] if none else [None]), "nonsense", object(), [value], float("nan")]
    if limits:
        whole = all(limit == int(limit) for limit in limits) and not isinstance(value, float)
        low, high = (int(limit) if whole else limit for limit in limits)
        good = [low, high, *([None] if none else [])]
        return good, [*bad, low - 1, high + 1, high * 1e6, True, str(high), float("inf")] + [
            low + 0.5
        ] * whole
    if isinstance(value, bool):
        return [True, False], [*bad, 1, 0, "True"]
    if isinstance(value, str):
        good = re.findall(r'"(\w+)"', comment)
        return good, [*bad, good[0].upper(), f" {good[0]}", 0, True]
    if "multiples of 4" in comment:
        good = [(4, 8), (48, 64), *([None] if none else [])]
        return good, [
            *bad,
            48,
            (48,),
            (48, 65),
            (48.0, 64),
            (48, 0),
            (True, 4),
            "48, 64",
            (4,) * 4,
            (),
        ]
    good = [int(text) for text in re.findall(r"\b[124]\b", comment)]
    return good, [*bad, 0, 3, -1, 1.0, True]


@every_lesson
def test_settings_are_checked_where_they_are_set_and_as_their_comments_say(lesson):
    for name, value, comment in settings_of(lesson):
        good, bad = good_and_bad(value, comment)
        assert good, f"{name}: the comment {comment!r} says neither a range nor options"
        for each in [value, *good]:
            with pytest.raises(Started):
                # a size for any number of levels
                check_settings(lesson, **{"IMAGE_SIZE": 64, name: each})
        for each in bad:
            with pytest.raises(ValueError, match=f"^{name}=") as error:
                check_settings(lesson, **{name: each})
            assert "\n" not in str(error.value) and repr(each) in str(error.value)


# What readers change. Each line is one lesson executed whole, in fast mode, with other values in
# its config cell.
CHANGES = {
    "00": [{"T": 200}, {"SIZE": 16}, {"DATASET": "MNIST"}, {"CALLS": 1}, {"SEED": 7}],
    "01": [{"T": 200}, {"T": 37}, {"DATASET": "mnist"}, {"DATASET": "digits"}, {"SEED": 7}],
    "02": [{"T": 200}, {"DIM": 64}, {"DATASET": "digits"}, {"SEED": 7}],
    "03": [
        {"WIDTHS": (16, 32, 32), "IMAGE_SIZE": 32},
        {"DATASET": "digits", "TIMESTEPS": 200},
        {"SEED": 7},
    ],
    "04": [
        {"TARGET": "eps", "SCHEDULE": "linear"},
        {"TARGET": "x0"},
        {"TIMESTEPS": 200},
        {"DATASET": "mnist", "BATCH_SIZE": 16},
        {"TRAIN": False},
        {"SEED": 7},
    ],
    "05": [
        {"DATASET": "mnist"},
        {"DATASET": "digits"},
        {"TIMESTEPS": 200},
        {"SCHEDULE": "linear", "TARGET": "eps"},
    ],
    "06": [
        {"DATASET": "mnist", "STEPS": 3},
        {"DATASET": "digits"},
        {"N_SAMPLES": 40},
        {"STEPS": 200},
        {"SEED": 7},
    ],
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
    "09": [
        {"DATASET": "digits"},
        {"DATASET": "mnist", "N_IMAGES": 100},
        {"STEPS": 200},
        {"SEED": 7},
    ],
    "12": [
        {"DATASET": "digits", "N_RACE": 32},
        {"DATASET": "mnist"},
        {"TIMING_SECONDS": 20.0},
        {"SEED": 7},
    ],
}
CASES = [(name, change) for name in NOTEBOOKS for change in CHANGES.get(name[:2], [])]


def run_in_fast_mode(notebook, folder, **env):
    """Execute `notebook` in `folder`; with the data that DDPM_DATA_DIR names, without a network."""
    tool.execute(
        notebook,
        folder,
        OFFLINE
        | {
            "DDPM_FAST": "1",
            "OMP_NUM_THREADS": "1",
            "DDPM_OUTPUT_DIR": str(folder),
            "DDPM_CHECKPOINT_DIR": str(folder / "checkpoints"),
            **env,
        },
    )
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lesson", "change"), CASES, ids=[f"{name[:2]}-{change}" for name, change in CASES]
)
def test_changed_settings_stay_green(lesson, change, tmp_path):
    notebook = tool.with_parameters(read_lesson(lesson), change)
    run_in_fast_mode(notebook, tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@every_notebook
def test_all_cells_twice_in_one_kernel(lesson, tmp_path):
    notebook = read_lesson(lesson)
    notebook.cells += [
        nbformat.from_dict({**cell, "id": f"again-{i}"}) for i, cell in enumerate(notebook.cells)
    ]
    run_in_fast_mode(notebook, tmp_path, PYTHONPATH=str(ROOT))


# Numbers that depend on the clock or on the memory of the machine.
UNSTEADY = re.compile(
    r"\d[\d.,e+-]*(?= *(s|ms|images/s|GiB|pictures a second|thousand million|more minutes|"
    r"epochs would)\b)"
)


def steady_part(cell):
    """What a cell printed, without times and speeds; nothing where a network was trained for so
    many seconds.
    """
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return "" if "weights: trained" in text else re.sub(r" +", " ", UNSTEADY.sub("#", text))


@pytest.mark.slow
@every_lesson
def test_every_cell_run_again_says_the_same(lesson, tmp_path):
    """Each cell runs twice before the next one does."""
    notebook, cells = read_lesson(lesson), []
    for i, cell in enumerate(code_cells(notebook)):
        cells += [nbformat.from_dict({**cell, "id": f"{run}-{i}"}) for run in ("first", "again")]
    notebook.cells = cells
    run_in_fast_mode(notebook, tmp_path, PYTHONPATH=str(ROOT))
    for first, again in zip(cells[::2], cells[1::2], strict=True):
        assert steady_part(first) == steady_part(again), first.source


@pytest.mark.slow
@every_notebook
def test_without_any_data(lesson, tmp_path):
    """From a copy elsewhere with no data folder and no network that answers: every lesson runs on
    the digits.
    """
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "ddpm_utils", copy / "ddpm_utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "somewhere").mkdir()
    notebook = read_lesson(lesson)
    run_in_fast_mode(notebook, copy / "somewhere", DDPM_DATA_DIR="")
    assert "digits" in printed(notebook)
