"""What holds for the package as a whole: quiet imports, arrows that point one way, docstrings,
size.
"""

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import ddpm_utils

PACKAGE = Path(ddpm_utils.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMMAND_LINE = {"__main__", "cli"}  # may import all, is imported by none, and is counted apart
MAY_IMPORT = {
    "runtime": set(),
    "settings": set(),
    "config": {"runtime"},
    "recipes": {"config"},
    "data": {"runtime"},
    "folders": {"data", "runtime"},
    "schedules": set(),
    "diffusion": {"schedules"},
    "embeddings": set(),
    "unet": {"embeddings"},
    "distributed": {"runtime"},
    "optimizer": {"config"},
    "checkpoints": {"config", "runtime"},
    "training": {"optimizer", "diffusion", "schedules", "data", "config", "runtime", "distributed"},
    "runs": {"training", "checkpoints", "data", "config", "runtime", "distributed"},
    "sampling": {"diffusion", "schedules"},
    "evaluation": {"data", "diffusion", "schedules", "runtime"},
    "oracle": {"diffusion", "schedules"},
    "pretrained": {
        "gallery",
        "unet",
        "config",
        "data",
        "runtime",
        "training",
        "runs",
        "checkpoints",
        "evaluation",
    },
    "gallery": set(),
    "exercises": {"embeddings", "unet"},
    "plots": {"data"},
    "figures": {"data", "diffusion", "plots", "schedules"},
}


def module_name(file: Path) -> str:
    """`ddpm_utils.pretrained.make` for ddpm_utils/pretrained/make.py."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module(file: Path) -> str:
    """The module a file belongs to; "" for the package's own `__init__`."""
    return (module_name(file).split(".") + [""])[1]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_modules(file: Path) -> set[str]:
    """Modules of the package that `file` imports anywhere, inside functions too."""
    package = module_name(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(parse(file)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [base + [alias.name] for alias in node.names]
        found |= {target[1] for target in targets if target[0] == "ddpm_utils" and len(target) > 1}
    return (found & (set(MAY_IMPORT) | COMMAND_LINE)) - {module(file)}


WATCH = """
import os, sys
root, venv = sys.argv[1], sys.prefix
touched = []
def watch(event, args):
    if event.startswith("socket.connect"):
        touched.append((event, str(args)))
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.listdir") and args:
        named = isinstance(args[0], (str, bytes, os.PathLike))
        path = os.path.abspath(os.fsdecode(args[0])) if named else ""
        code = event == "open" and path.endswith((".py", ".pyc"))
        code = code or event in ("os.listdir", "os.scandir")
        mine = path.startswith((root + os.sep, os.getcwd() + os.sep))
        mine = mine and not path.startswith(venv + os.sep)
        if mine and not code:
            touched.append((event, path))
sys.addaudithook(watch)
sys.path.insert(0, root)
import ddpm_utils, importlib
for name in sys.argv[2:]:
    importlib.import_module(name)
    heavy = sorted({"torchvision", "sklearn", "matplotlib.pyplot", "IPython"} & set(sys.modules))
    assert not heavy, f"{name} imports {heavy}"
assert not touched, touched
"""


def test_importing_every_module_prints_nothing_loads_nothing_heavy_and_touches_no_disk(tmp_path):
    names = [module_name(file) for file in FILES if file.name != "__main__.py"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(PACKAGE.parent), *names],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if module(file) not in {"", *COMMAND_LINE}], ids=module_name
)
def test_the_arrows_between_modules_point_one_way(file):
    assert module(file) in MAY_IMPORT, (
        f"{file.name} is a new module: say in MAY_IMPORT what it may import"
    )
    beyond = imported_modules(file) - MAY_IMPORT[module(file)]
    assert not beyond, f"{module(file)} may not import {beyond}"


def test_the_table_of_arrows_has_no_circle():
    left = {name: set(targets) for name, targets in MAY_IMPORT.items()}
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}
    assert "diffusion" not in MAY_IMPORT["unet"] | MAY_IMPORT["data"] | MAY_IMPORT["plots"]


def test_the_package_itself_imports_no_module():
    assert imported_modules(PACKAGE / "__init__.py") == set()


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_runtime_reads_environment_variables(file):
    """And the command line sets one, before torch is loaded."""
    names = {node.attr for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute)}
    names |= {
        alias.name
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert module(file) in ("runtime", "__main__") or not names & {
        "environ",
        "environb",
        "getenv",
        "putenv",
    }


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_module_and_every_public_function_and_class_has_a_docstring(file):
    tree = parse(file)
    assert ast.get_docstring(tree), f"{file.name} does not say what it is for"
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_calls_plt_show(file):
    assert "plt.show(" not in "".join(line.split("#")[0] for line in code_of(file))


def code_of(file: Path) -> list[str]:
    """The lines of `file` that hold code: no blank line, no comment, no docstring."""
    source = file.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return [
        line for number, line in enumerate(source.splitlines(), 1) if number in lines - docstrings
    ]


CORE = {
    *("schedules", "diffusion", "embeddings", "unet", "optimizer"),
    *("training", "sampling", "oracle", "evaluation"),
}


def test_what_implements_diffusion_is_an_evenings_reading():
    assert sum(len(code_of(file)) for file in FILES if module(file) in CORE) <= 1500


def test_the_package_is_small():
    """Counted in statements, which do not depend on the layout; docstrings are none."""
    beside = {"gallery", "exercises", "figures", *COMMAND_LINE}
    counted = [file for file in FILES if module(file) not in beside]
    statements = [
        node
        for file in counted
        for node in ast.walk(parse(file))
        if isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    assert len(statements) <= 2450
