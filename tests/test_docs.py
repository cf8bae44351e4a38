"""README, requirements, environment and doctor say the same, and what README links to is there."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from lesson_files import ROOT, read_lesson, tool
from packaging.requirements import Requirement

from ddpm_utils.cli.doctor import FLOORS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and line[0] not in "#-"]
    return {requirement.name: str(requirement.specifier) for requirement in found}


def test_conda_and_pip_agree():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    found = {Requirement(line).name: str(Requirement(line).specifier) for line in conda}
    assert found.pop("python") == ">=3.11"
    found["torch"] = found.pop("pytorch")
    assert found == requirements("requirements.txt")


def test_doctor_knows_the_floors():
    found = {Requirement(line).name: str(Requirement(line).specifier) for line in FLOORS}
    assert found | {"jupyterlab": requirements("requirements.txt")["jupyterlab"]} == requirements(
        "requirements.txt"
    )


def test_floors_are_lower_bounds():
    both = requirements("requirements.txt") | requirements("requirements-test.txt")
    assert all(re.fullmatch(r">=[\d.]+", floor) for floor in both.values())


def test_readme_lists_every_lesson_with_its_badge():
    owner = tool.repository().removeprefix("https://github.com/")
    linked = set(re.findall(r"notebooks/(\d\d_\w+)\.ipynb", README))
    names = [path.stem for path in tool.lessons()]
    assert linked == set(names)
    for name in names:
        assert (
            f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}.ipynb"
            in README
        )
        title = read_lesson(name).cells[0].source.splitlines()[0].split("·", 1)[1].strip()
        assert title.lower() in README.lower()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_link_to_what_is_there(page):
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


GENERATED = ("data", "outputs", "checkpoints", ".venv", "build", "dist", "ddpm_utils.egg-info")


@pytest.mark.parametrize("folder", GENERATED)
def test_what_is_generated_is_ignored(folder):
    done = subprocess.run(["git", "check-ignore", "-q", f"{folder}/file"], cwd=ROOT)
    assert done.returncode == 0


def test_a_wheel_holds_the_package_with_its_weights_and_asks_for_what_it_needs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "ddpm_utils", source / "ddpm_utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(wheel, check=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as file:
        names = set(file.namelist())
        metadata = next(file.read(name).decode() for name in names if name.endswith("/METADATA"))
    code_and_weights = [
        path for end in ("py", "pt", "json") for path in (source / "ddpm_utils").rglob(f"*.{end}")
    ]
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {path.relative_to(source).as_posix() for path in code_and_weights}
    needed = set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, flags=re.MULTILINE))
    assert needed == set(requirements("requirements.txt"))


def test_nothing_generated_is_tracked():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not [name for name in tracked if name.split("/")[0] in GENERATED]
    assert not [
        name
        for name in tracked
        if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 4_000_000
    ]


def test_words_are_plain_and_american():
    """The field's words: image, setting, metric, module, gray, color, neighbor, normalization."""
    odd = re.compile(
        r"picture|\bknobs?\b|\brulers?\b|(?<!make )\brooms?\b|grey|colour|neighbour|isation\b", re.I
    )
    files = list(PAGES)
    for folder in ("ddpm_utils", "benchmarks", "tools"):
        files += (ROOT / folder).rglob("*.py")
    for file in files:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if odd.search(line)]
        assert not found, f"{file.relative_to(ROOT)}: {found[0].strip()}"
