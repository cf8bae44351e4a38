"""README, requirements, environment and doctor say the same, and what README links to is there."""

import re

import yaml
from lesson_files import ROOT, lesson_names, read_lesson, tool
from packaging.requirements import Requirement

from ddpm_utils.cli.doctor import FLOORS

README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert found | {"jupyterlab": requirements("requirements.txt")["jupyterlab"]} == requirements("requirements.txt")


def test_floors_are_lower_bounds():
    both = requirements("requirements.txt") | requirements("requirements-test.txt")
    assert all(re.fullmatch(r">=[\d.]+", floor) for floor in both.values())


def test_readme_lists_every_lesson_with_its_badge():
    owner = tool.repository().removeprefix("https://github.com/")
    linked = set(re.findall(r"notebooks/(\d\d_\w+)\.ipynb", README))
    assert linked == set(lesson_names())
    for name in lesson_names():
        assert f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}.ipynb" in README
        title = read_lesson(name).cells[0].source.splitlines()[0].split("·", 1)[1].strip()
        assert title.lower() in README.lower()


def test_readme_links_to_what_is_there():
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"#]+)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_nothing_generated_is_tracked():
    import subprocess

    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    generated = [name for name in tracked if name.split("/")[0] in ("data", "outputs", "checkpoints", ".venv")]
    assert not generated
    assert not [name for name in tracked if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 4_000_000]
