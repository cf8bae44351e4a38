"""Execute, render and copy the lessons, and change the repository's address in them.

python tools/lessons.py run [NN …]       lessons 01–05 or those named, executed into outputs/lessons/; --all: the whole series
python tools/lessons.py render [NN …]    execute at full size into notebooks/ itself
python tools/lessons.py copy FOLDER      unexecuted copies with every folded solution put in after its exercise
python tools/lessons.py address URL      put another repository's address into pyproject.toml, README and lessons
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
ASSETS = {"from_noise.gif": "lesson_05/first.gif"}  # what README shows, and which picture of a rendered lesson it is
FIRST = ("01", "02", "03", "04", "05")  # what `run` executes unless told otherwise: a quarter of an hour on two cores
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


def lessons(wanted=()) -> list[Path]:
    """The lessons in order, or those whose number is in `wanted`. Raises SystemExit on a number that no lesson has."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [number for number in wanted if number not in [path.name[:2] for path in found]]
    if unknown:
        sys.exit(f"no lesson {', '.join(unknown)}: there are {', '.join(path.name[:2] for path in found)}")
    return [path for path in found if not wanted or path.name[:2] in wanted]


def forget_outputs(notebook) -> None:
    """Leave every code cell as if it had never been run."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def execute(notebook, folder: Path, env: dict | None = None) -> float:
    """Run every cell of `notebook` in a fresh kernel whose current folder is `folder`. Returns the seconds it took."""
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


def clean(notebook) -> None:
    """Leave in the metadata only what a reader needs."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key == "tags"})


def run(paths: list[Path], into: Path, alone: bool = False) -> None:
    """Execute each lesson and write the result to `into`, with one line a lesson.

    `alone` hides the weights that lesson 04 left on this machine from the others, so that they show what a first reader sees.
    """
    into.mkdir(parents=True, exist_ok=True)
    total = 0.0
    for path in paths:
        print(f"{path.stem} …", end=" ", flush=True)
        notebook = nbformat.read(path, as_version=4)
        hidden = {"DDPM_CHECKPOINT_DIR": str(ROOT / "outputs" / "render")} if alone and path.name[:2] != "04" else {}
        seconds = execute(notebook, NOTEBOOKS, hidden)
        clean(notebook)
        nbformat.write(notebook, into / path.name)
        total += seconds
        print(f"{seconds:.0f} s", flush=True)
    print(
        f"{len(paths)} lessons in {total / 60:.1f} min, peak memory {peak_memory():.2f} GiB; executed copies in {shown(into)}"
    )
    for gif in sorted((ROOT / "outputs").glob("lesson_*/*.gif")):
        print(f"  {shown(gif)}")


def peak_memory() -> float:
    """The largest memory that one of the kernels has held, in GiB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def with_solutions(notebook):
    """Put a code cell with the folded solution, and the exercise's own check asserted, after each exercise's solution."""
    cells, check = [], None
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            called = re.search(
                r"^lesson_\d\d\.\w+\(.*\)\s*$", cell.source.strip().splitlines()[-1] if cell.source else ""
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
            cells.append(nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["solution"]}))
            check = None
    notebook.cells = cells
    return notebook


def with_parameters(notebook, changes: dict):
    """Replace values in the cell tagged `parameters`. Raises KeyError if a name is not assigned there."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in changes.items():
        cell.source, n = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source)
        if n != 1:
            raise KeyError(f"{name} is not assigned once in the parameters cell")
    return notebook


def copy(into: Path) -> None:
    """Write the lessons with their solutions to `into`, emptied of older ones, ready to be executed by a test."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("*.ipynb"):
        old.unlink()
    for path in lessons():
        notebook = with_solutions(nbformat.read(path, as_version=4))
        forget_outputs(notebook)
        nbformat.write(notebook, into / path.name)


def repository() -> str:
    """The repository's address, from pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def change_address(url: str) -> None:
    """Replace the address wherever it stands: owner and name are enough to find it in links, badges and setup cells."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        sys.exit(f"{url!r} is no address of the form https://github.com/OWNER/NAME")
    old, new = (address.removeprefix("https://github.com/") for address in (repository(), url))
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", *lessons()]:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8")
            print(f"{shown(path)}: {text.count(old)} places")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "render", "copy", "address"])
    parser.add_argument("what", nargs="*", help="lesson numbers, a folder, or an address")
    parser.add_argument("--all", action="store_true", help="run: the whole series, not lessons 01–05 alone")
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
    else:
        change_address(asked.what[0])
