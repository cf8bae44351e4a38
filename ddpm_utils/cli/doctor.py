"""`doctor` says what is installed, what runs here, and what to do about the rest."""

import importlib.metadata
import platform
import sys

from packaging.requirements import Requirement

# What a lesson imports. Kept equal to requirements.txt by a test; JupyterLab is left to those who open lessons with it.
FLOORS = (
    "torch>=2.11",
    "torchvision>=0.26",
    "numpy>=2.1",
    "matplotlib>=3.10",
    "einops>=0.8.2",
    "imageio>=2.37",
    "scikit-learn>=1.6",
    "ipywidgets>=7.7.1",
)


def check_packages() -> list[str]:
    """Print each package with its floor; return what is wrong."""
    problems = []
    for requirement in map(Requirement, FLOORS):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        print(f"  {'ok ' if ok else 'BAD'} {requirement.name:14}{version or 'missing':20}needs {requirement.specifier}")
        if not ok:
            problems.append(f"{requirement.name} is {version or 'missing'}: pip install '{requirement}'")
    return problems


def check_pair() -> list[str]:
    """What is wrong between torch and torchvision, which must come from one index as a pair."""
    cure = "install both from one index: pip install --upgrade --force-reinstall torch torchvision"
    try:
        torch_version = importlib.metadata.version("torch")
        needed = [Requirement(text) for text in importlib.metadata.requires("torchvision") or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # missing packages have been named already
    for requirement in needed:
        if requirement.name == "torch" and not requirement.specifier.contains(torch_version, prereleases=True):
            vision = importlib.metadata.version("torchvision")
            return [f"torchvision {vision} wants {requirement}, but torch is {torch_version}: {cure}"]
    try:
        import torchvision  # noqa: F401 — a pair of two builds fails here, with "operator torchvision::nms does not exist"
    except Exception as error:
        return [f"torchvision cannot be imported beside torch {torch_version} ({error}): {cure}"]
    return []


def check_data() -> list[str]:
    """Print which data sets lie ready; a missing one is no problem, a damaged one is."""
    from .. import data, runtime

    problems = []
    for dataset in ("fashion_mnist", "mnist"):
        found = "neither on disk: a lesson downloads it, or falls back to scikit-learn's digits"
        for folder, name in ((runtime.data_dir_override(), "DDPM_DATA_DIR"), (runtime.data_dir(), "data/")):
            damaged = data.damaged_files(dataset, folder) if folder else None
            if damaged:
                problems.append(f"{', '.join(damaged)} of {data.TITLES[dataset]} in {name} is damaged: delete it")
            if damaged is not None:
                found = f"in {name}" + (", DAMAGED" if damaged else "")
                break
        print(f"      {data.TITLES[dataset]:14}{found}")
    return problems


def run(options=None) -> int:
    """Print the report; 0 if every lesson can run here, else 1. It works where torch itself is missing."""
    print(f"Python {platform.python_version()} on {platform.system()}")
    problems = [] if sys.version_info >= (3, 11) else [f"Python {platform.python_version()} is too old: 3.11 is needed"]
    print("packages")
    problems += check_packages() + check_pair()
    try:
        from .. import pretrained, runtime

        device = runtime.pick_device()
        print(f"device\n      {runtime.hardware(device)}" + (", fast mode is on" if runtime.is_fast() else ""))
        print("data")
        problems += check_data()
        print(f"weights\n      {', '.join(pretrained.names()) or 'none'}")
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    print("\n".join(["", "To mend:", *(f"  {problem}" for problem in problems)]) if problems else "\nAll is well.")
    return 1 if problems else 0
