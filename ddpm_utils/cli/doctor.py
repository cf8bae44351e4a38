"""`doctor`: say what is installed, what runs here, and what to do about the rest."""

import importlib.metadata
import platform
import sys

from packaging.requirements import Requirement

LFS = b"version https://git-lfs"  # how a Git LFS pointer file begins
# What a lesson imports. Kept equal to requirements.txt by a test; JupyterLab is left to those who
# open lessons with it.
FLOORS = (
    "torch>=2.11",
    "torchvision>=0.26",
    "numpy>=2.1",
    "matplotlib>=3.10",
    "einops>=0.8.2",
    "imageio>=2.37",
    "scikit-learn>=1.6",
    "platformdirs>=4.3",
    "filelock>=3.16",
    "tqdm>=4.67",
    "tyro>=1.0",
)


def check_packages() -> list[str]:
    """Print each package with its minimum version, and return what is wrong."""
    problems = []
    for requirement in map(Requirement, FLOORS):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        print(
            f"  {'ok ' if ok else 'BAD'} {requirement.name:14}{version or 'missing':20}needs "
            f"{requirement.specifier}"
        )
        if not ok:
            problems.append(
                f"{requirement.name} is {version or 'missing'}: pip install '{requirement}'"
            )
    return problems


def check_pair() -> list[str]:
    """Return what is wrong between torch and torchvision, which must come from one index."""
    cure = "install both from one index: pip install --upgrade --force-reinstall torch torchvision"
    try:
        torch_version = importlib.metadata.version("torch")
        needed = [Requirement(text) for text in importlib.metadata.requires("torchvision") or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # missing packages have been named already
    for requirement in needed:
        if requirement.name == "torch" and not requirement.specifier.contains(
            torch_version, prereleases=True
        ):
            vision = importlib.metadata.version("torchvision")
            return [
                f"torchvision {vision} wants {requirement}, but torch is {torch_version}: {cure}"
            ]
    try:
        import torchvision  # noqa: F401 — a pair of two builds fails here, with "operator torchvision::nms does not exist"
    except Exception as error:
        return [f"torchvision cannot be imported beside torch {torch_version} ({error}): {cure}"]
    return []


def check_device() -> list[str]:
    """Print the device that lessons would use."""
    from .. import runtime

    print(
        f"      {runtime.hardware(runtime.pick_device())}"
        + (", fast mode is on" if runtime.is_fast() else "")
    )
    return []


def check_folders() -> list[str]:
    """Print where outputs, checkpoints and data are, and return what is wrong with these folders.

    Creates none of them.
    """
    from .. import runtime

    problems, named = [], runtime.data_dir_override()
    written = {"outputs": runtime.output_path(), "checkpoints": runtime.checkpoint_dir()}
    written |= {"data": runtime.data_dir()} if named is None else {}
    for name, folder in written.items():
        print(f"      {name:14}{folder}")
        try:
            runtime.check_folder(folder)
        except OSError as error:
            problems.append(str(error))
    if named is not None:
        print(f"      {'data':14}{named} (DDPM_DATA_DIR)")
    if named is not None and not named.is_dir():
        problems.append(f"DDPM_DATA_DIR names {named}, which is no folder: correct it or unset it")
    return problems


def check_data() -> list[str]:
    """Print which data sets are on disk, and return what is wrong with them.

    A missing data set is not a problem; an incomplete or damaged one is.
    """
    from .. import data, runtime

    problems, sets = [], ("fashion_mnist", "mnist")
    # choose the folders to search
    named, own = runtime.data_dir_override(), runtime.data_dir()
    places = (
        {"the data folder": own}
        if named is None
        else {"DDPM_DATA_DIR": named, "the data folder": own}
    )
    nothing_named = named is not None and named.is_dir()
    # look for each data set, and stop at the first folder with files of it
    for dataset in sets:
        state = "not on disk: a lesson downloads it, or falls back to scikit-learn's digits"
        for place, root in places.items():
            folder = data.raw_folder(dataset, root)
            files = data.read_files(dataset, folder)
            if files.absent:
                continue
            nothing_named = nothing_named and place != "DDPM_DATA_DIR"
            state = f"in {place}" + ("" if files.whole else ", NOT WHOLE")
            if not files.whole:
                problems.append(
                    f"{data.TITLES[dataset]} in {folder} is not whole ({files.problems()}): "
                    "put the published files there, packed (.gz) or not, or move the rest away"
                )
            break
        print(f"      {data.TITLES[dataset]:14}{state}")
    # report a DDPM_DATA_DIR without any data set
    if nothing_named:
        wanted = " nor ".join(
            data.raw_folder(dataset, named).relative_to(named).as_posix() for dataset in sets
        )
        problems.append(
            f"DDPM_DATA_DIR names {named}, which holds neither {wanted}: correct it or unset it"
        )
    return problems


def check_weights() -> list[str]:
    """Print which weights come with the package, and return what is wrong with their files."""
    from .. import pretrained

    stems = sorted(
        {path.stem for end in ("pt", "json") for path in pretrained.FOLDER.glob(f"*.{end}")}
    )
    print(f"      {', '.join(stems) or 'none'}")
    if not stems:
        return [
            f"no weights in {pretrained.FOLDER}: install the package or clone the repository again"
        ]
    return [problem for stem in stems for problem in _check_weight(stem)]


def _check_weight(stem: str) -> list[str]:
    """Return what is wrong with one network's weights or their card."""
    from .. import pretrained

    again = "take it from the repository again"
    for path in (pretrained.FOLDER / f"{stem}.json", pretrained.FOLDER / f"{stem}.pt"):
        if not path.is_file():
            return [f"{path.name} is missing in {path.parent}: {again}"]
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return [
                    f"{path.name} is a Git LFS pointer and not the file itself: run `git lfs pull`"
                ]
    try:
        if stem.startswith(pretrained.CLASSIFIER):
            pretrained.load_classifier(stem.removeprefix(pretrained.CLASSIFIER))
        else:
            pretrained.load(stem)
    except Exception as error:
        cure = "" if again in str(error) else f": {again}"
        return [f"{stem} cannot be loaded ({type(error).__name__}: {error}){cure}"]
    return []


def run(options=None) -> int:
    """Print the report, and return 0 if every lesson can run here, else 1.

    It works even if torch is missing.
    """
    print(f"Python {platform.python_version()} on {platform.system()}")
    problems = (
        []
        if sys.version_info >= (3, 11)
        else [f"Python {platform.python_version()} is too old: 3.11 is needed"]
    )
    print("packages")
    problems += check_packages() + check_pair()
    checks = {
        "device": check_device,
        "folders": check_folders,
        "data": check_data,
        "weights": check_weights,
    }
    for name, check in checks.items():
        print(name)
        try:
            problems += check()
        except Exception as error:  # report it in one line and continue
            problems.append(f"{type(error).__name__}: {error}")
    problems = list(dict.fromkeys(problems))  # several checks may fail for one reason
    print(
        "\n".join(["", "To fix:", *(f"  {problem}" for problem in problems)])
        if problems
        else "\nAll is well."
    )
    return 1 if problems else 0
