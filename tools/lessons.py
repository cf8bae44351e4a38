"""Execute, render, copy and export the lessons, and change the repository's address in them.

python tools/lessons.py run [NN …]     execute lessons 00–05, or those named, into outputs/lessons/
                                       (--all: the whole series)
python tools/lessons.py render [NN …]  execute at full size into notebooks/ itself
python tools/lessons.py copy FOLDER    unexecuted copies, each with its folded solutions put in
python tools/lessons.py html FOLDER    static pages; every image has its alternative text
python tools/lessons.py script FILE    the code of lesson 00 as a Python file
python tools/lessons.py address URL    put another address into pyproject.toml, README and lessons
"""

import argparse
import os
import re
import shutil
import sys
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
# images that pages show, and which output of a rendered lesson each is
ASSETS = {
    "from_noise.gif": "lesson_05/first.gif",
    "00_one_page.gif": "lesson_00/one_page.gif",
    "01_forward.gif": "lesson_01/first.gif",
    "02_clock.png": "lesson_02/first.png",
    "03_unet.png": "lesson_03/first.png",
    "04_training.png": "lesson_04/first.png",
    "09_exact_denoiser.png": "lesson_09/first.png",
    "12_four_unets.png": "lesson_12/first.png",
}
# what `run` executes unless told otherwise: about 30 minutes on two cores without AVX-512
FIRST = ("00", "01", "02", "03", "04", "05")
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)

# What the script and HTML exporters of nbconvert read. No version: it would change with every
# render.
LANGUAGE = {
    "name": "python",
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}

# nbconvert's own `lab` template ignores the alternative text that an output carries in its
# metadata.
PAGE = """
{%- extends "lab/index.html.j2" -%}
{%- block data_png -%}
{%- set alt = output | get_metadata("alt", "image/png") -%}
{{ super() | replace("<img ", '<img alt="' ~ alt | escape_html ~ '" ' if alt else "<img ", 1) }}
{%- endblock data_png -%}
"""

# An address of the repository is one of these with OWNER/NAME behind it.
HOSTS = (
    "https://github.com/",
    "https://colab.research.google.com/github/",
    "https://raw.githubusercontent.com/",
)
SETUP_ADDRESS = re.compile(r'(?m)^REPOSITORY = "https://github\.com/(.+)"$')


def lessons(wanted=()) -> list[Path]:
    """The lessons in order, or those whose number is in `wanted`.

    Raises SystemExit on a number that no lesson has.
    """
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [number for number in wanted if number not in [path.name[:2] for path in found]]
    if unknown:
        sys.exit(
            f"no lesson {', '.join(unknown)}: there are "
            f"{', '.join(path.name[:2] for path in found)}"
        )
    return [path for path in found if not wanted or path.name[:2] in wanted]


def forget_outputs(notebook) -> None:
    """Leave every code cell as if it had never been run."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def execute(notebook, folder: Path, env: dict | None = None) -> float:
    """Run every cell of `notebook` in a fresh kernel whose current folder is `folder`.

    Returns the seconds it took.
    """
    forget_outputs(notebook)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],  # the kernel warns about its transport on every start
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.perf_counter()
    client.execute(env={**os.environ, **(env or {})})
    return time.perf_counter() - start


# Colab and JupyterLab show a cell with this metadata as one line.
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}


def clean(notebook) -> None:
    """Leave in the metadata only what a reader needs."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = LANGUAGE
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in {"tags", *FOLDED}}
        )


def run(paths: list[Path], into: Path, alone: bool = False) -> None:
    """Execute each lesson and write the result to `into`, with one line a lesson.

    `alone` hides the weights that lesson 04 left on this machine from the others, so that they show
    what a first reader sees.
    """
    into.mkdir(parents=True, exist_ok=True)
    total = 0.0
    for path in paths:
        print(f"{path.stem} …", end=" ", flush=True)
        notebook = nbformat.read(path, as_version=4)
        number, env = path.name[:2], {}
        if alone and number != "04":
            env["DDPM_CHECKPOINT_DIR"] = str(ROOT / "outputs" / "render")
        if number == "00":  # knows nothing of the repository around it
            env["DDPM_OUTPUT_DIR"] = os.environ.get("DDPM_OUTPUT_DIR") or str(ROOT / "outputs")
            env["DDPM_DATA_DIR"] = os.environ.get("DDPM_DATA_DIR") or str(ROOT / "data")
        seconds = execute(notebook, NOTEBOOKS, env)
        clean(notebook)
        nbformat.write(notebook, into / path.name)
        total += seconds
        print(f"{seconds:.0f} s", flush=True)
        for made in sorted((ROOT / "outputs").glob(f"lesson_{number}/*.gif")):
            print(f"  {shown(made)}", flush=True)
    print(
        f"{len(paths)} lessons in {total / 60:.1f} min, peak memory {peak_memory():.2f} GiB; "
        f"executed copies in {shown(into)}"
    )


def peak_memory() -> float:
    """The largest memory that one of the kernels has held, in GiB; nan where the system does not
    tell.
    """
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def with_solutions(notebook):
    """Put a code cell with the folded solution, and the exercise's own check asserted, after each
    exercise's solution.
    """
    cells, check = [], None
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            called = re.search(
                r"^lesson_\d\d\.\w+\(.*\)\s*$",
                cell.source.strip().splitlines()[-1] if cell.source else "",
            )
            check = called.group(0) if called else check
        solution = SOLUTION.search(cell.source) if cell.cell_type == "markdown" else None
        if solution and check:
            lines = [
                solution.group(1).rstrip(),
                f"verdict = {check}",
                "print(verdict)",
                "assert verdict.passed is True, verdict",
            ]
            cells.append(
                nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["solution"]})
            )
            check = None
    notebook.cells = cells
    return notebook


def with_parameters(notebook, changes: dict):
    """Replace values in the cell tagged `parameters`.

    Raises KeyError if a name is not assigned there.
    """
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in changes.items():
        cell.source, n = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source)
        if n != 1:
            raise KeyError(f"{name} is not assigned once in the parameters cell")
    return notebook


def copy(into: Path) -> None:
    """Write the lessons with their solutions to `into`, emptied of older ones, ready to be executed
    by a test.
    """
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("*.ipynb"):
        old.unlink()
    for path in lessons():
        notebook = with_solutions(nbformat.read(path, as_version=4))
        forget_outputs(notebook)
        nbformat.write(notebook, into / path.name)


def page_of(notebook) -> str:
    """A lesson as a static page: each image with its alternative text, links to lessons as links to
    their pages.
    """
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(raw_template=PAGE).from_notebook_node(notebook)
    return re.sub(r'(href="\d\d_\w+)\.ipynb', r"\1.html", page)


def export(into: Path) -> None:
    """Write every lesson to `into` as a static page, with the images that it links to."""
    into.mkdir(parents=True, exist_ok=True)
    shutil.copytree(NOTEBOOKS / "assets", into / "assets", dirs_exist_ok=True)
    for path in lessons():
        page = page_of(nbformat.read(path, as_version=4))
        (into / f"{path.stem}.html").write_text(page, encoding="utf-8")


def script_of(notebook) -> str:
    """The code of a notebook as a Python file, each part under its heading."""
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    parts = [f'"""{title}. Generated from the notebook of the same name by `make script`."""']
    for cell in notebook.cells[1:]:
        if cell.cell_type == "code":
            parts.append(cell.source)
        else:
            parts += re.findall(r"(?m)^##+ .*$", cell.source)
    return "\n\n\n".join(parts) + "\n"


def repository() -> str:
    """The repository's address, from pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"][
        "Repository"
    ]


def in_address(name: str) -> re.Pattern:
    """Matches whole addresses of the repository `name` (OWNER/NAME), not those of NAME-2 or
    NAME.io.
    """
    hosts = "|".join(map(re.escape, HOSTS))
    return re.compile(rf"({hosts}){re.escape(name)}(?![\w-]|\.(?!git\b)\w)")


def with_address(text: str, old: str, new: str) -> str:
    """`text` with the repository `new` in place of `old` in every address.

    Raises SystemExit if `text` links to `new` already: a later change could not tell the two apart.
    """
    if old != new and in_address(new).search(text):
        sys.exit(
            f"https://github.com/{new} is cited as another project: give the address of your own "
            "repository"
        )
    return in_address(old).sub(lambda found: found[1] + new, text)


def lesson_with_address(path: Path, old: str, new: str) -> str:
    """The text of a lesson's file with another address in its setup and markdown cells; outputs
    stay as they are.

    The setup cell says which address to replace: after a merge it may be another than `old`.
    """
    notebook = nbformat.read(path, as_version=4)
    setup = [found for cell in notebook.cells for found in SETUP_ADDRESS.findall(cell.source)]
    old = setup[0] if setup else old
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_address(cell.source, old, new)
        elif cell.cell_type == "code":
            cell.source = SETUP_ADDRESS.sub(f'REPOSITORY = "https://github.com/{new}"', cell.source)
    return nbformat.writes(notebook) + "\n"


def change_address(url: str) -> None:
    """Put `url` into pyproject.toml, README.md and the lessons.

    Raises SystemExit unless it is an address on GitHub.
    """
    url = url.strip().removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[A-Za-z0-9_-]+/(?!\.+$)[A-Za-z0-9_.-]+", url):
        sys.exit(
            f"REPO={url!r} is not the address of a GitHub repository: try make address "
            "REPO=https://github.com/you/name"
        )
    old, new = (address.removeprefix("https://github.com/") for address in (repository(), url))
    project, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    texts = {path: lesson_with_address(path, old, new) for path in lessons()}
    texts[readme] = with_address(readme.read_text(encoding="utf-8"), old, new)
    texts[project] = re.sub(
        r'(?m)^Repository = ".*"$', f'Repository = "{url}"', project.read_text(encoding="utf-8")
    )
    for path, text in texts.items():  # only now, when every text is known to be fine
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"{shown(path)}: changed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "render", "copy", "html", "script", "address"])
    parser.add_argument("what", nargs="*", help="lesson numbers, a folder, or an address")
    parser.add_argument(
        "--all", action="store_true", help="run: the whole series, not lessons 00–05 alone"
    )
    asked = parser.parse_args()
    if asked.command == "run":
        run(lessons(asked.what or (() if asked.all else FIRST)), ROOT / "outputs" / "lessons")
    elif asked.command == "render":
        run(lessons(asked.what), NOTEBOOKS, alone=True)
        (NOTEBOOKS / "assets").mkdir(exist_ok=True)
        for name, made in ASSETS.items():
            if (ROOT / "outputs" / made).is_file():
                shutil.copy(ROOT / "outputs" / made, NOTEBOOKS / "assets" / name)
    elif len(asked.what) != 1:
        parser.error(f"{asked.command} takes one argument")
    elif asked.command == "copy":
        copy(Path(asked.what[0]))
    elif asked.command == "html":
        export(Path(asked.what[0]))
    elif asked.command == "script":
        (page,) = lessons(["00"])
        text = script_of(nbformat.read(page, as_version=4))
        Path(asked.what[0]).write_text(text, encoding="utf-8")
    else:
        change_address(asked.what[0])
