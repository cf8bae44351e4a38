"""What several test files need of the lessons: reading them, and running them changed."""

import ast
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import lessons as tool  # noqa: E402

# where `make test` leaves the lessons it executed in fast mode
COPIES = ROOT / "outputs" / "test" / "lessons"


# the notebook that needs nothing of the package
PAGE = "00_ddpm_on_one_page"


def lesson_names() -> list[str]:
    """The lessons that build the package, all but `PAGE`."""
    return [path.stem for path in tool.lessons() if path.stem != PAGE]


def read_lesson(name: str, folder: Path = tool.NOTEBOOKS):
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def code_of(notebook) -> str:
    return "\n\n".join(cell.source for cell in code_cells(notebook))


def definitions(source: str) -> dict[str, list[ast.AST]]:
    """Top-level functions and classes of `source` by name."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
    return found


def text_of(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs_of(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def images_of(notebook) -> list[bytes]:
    """The decoded bytes of every image in the outputs."""
    import base64

    found = [output.get("data", {}).get("image/png") for output in outputs_of(notebook)]
    return [base64.b64decode(text) for text in found if text]


def printed(notebook) -> str:
    return "".join(output.text for output in outputs_of(notebook) if output.output_type == "stream")
