"""The flags of the command line.

The flags of `train` are the fields of `TrainConfig`, explained by the comments beside them. Tyro
builds the parser from these classes: it uses comments as help texts, turns underscores into
hyphens, and is imported in a tenth of a second.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import TrainConfig
from ..recipes import RECIPES

PROGRAM = "python -m ddpm_utils"


def optional(kind, metavar: str, default: str):
    """Return the type of a flag that may be left out; `default` says what happens then."""
    return Annotated[
        kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")
    ]


RecipeFlag = optional(Literal[tuple(RECIPES)], "{" + ",".join(RECIPES) + "}", "none")
DeviceFlag = optional(str, "NAME", "the best one here")
Sampler = Literal["ddim", "dpm", "ddpm"]
StepsFlag = optional(int, "INT", "50 for ddim, 20 for dpm, T for ddpm")


@dataclass(frozen=True)
class Fields(TrainConfig):
    """The fields as typed, without validation.

    Whether they fit together is known only once the recipe, or the run to resume, is known.
    """

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class Train:
    """Train a network into a folder, or resume a run that was stopped.

    The folder gets config.json, last.pt, best.pt (lowest loss on held-out images), loss.csv and
    samples.png. Ctrl-C stops between two steps; --resume continues exactly. Under torchrun, every
    process takes its share of each batch.
    """

    out: optional(Path, "FOLDER", "outputs/runs/NAME-OF-THE-CONFIG") = None  # the run's folder
    # continue the run in the folder, with its own config; --epochs makes it longer
    resume: bool = False
    recipe: RecipeFlag = None  # train as this source tutorial does; other flags change what it says
    device: DeviceFlag = None  # "cpu", "cuda", "cuda:1" or "mps"
    tensorboard: bool = False  # log for TensorBoard as well, if that is installed
    fields: Annotated[Fields, tyro.conf.arg(name="")] = Fields()
    # the fields that were named
    given: Annotated[dict, tyro.conf.Suppress] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Draw images from trained weights.

    Writes grid.png, strip.png (the first images at several timesteps), samples.gif and
    samples.json.
    """

    # name of shipped weights, a run's folder or a checkpoint
    weights: optional(str, "WHAT", "fashion_mnist") = None
    n: optional(int, "INT", "64, or what the recipe shows") = None  # images, 1 … 100000
    seed: int = 0  # of the noise, 0 … 4294967295
    # DDIM, DPM-Solver++ 2M, or ancestral sampling
    sampler: optional(Sampler, "{ddim,dpm,ddpm}", "ddim") = None
    steps: StepsFlag = None  # network calls per image, 1 … T
    # draw what this source tutorial shows, from weights trained by its recipe
    recipe: RecipeFlag = None
    # where the files go
    out: optional(Path, "FOLDER", "outputs/samples/NAME-OF-THE-WEIGHTS") = None
    device: DeviceFlag = None  # "cpu", "cuda", "cuda:1" or "mps"


@dataclass(frozen=True)
class Evaluate:
    """Measure images drawn from trained weights against real ones.

    Every distance is printed beside its floor, the distance of real test images at the same n. The
    table goes to stdout, and everything else goes to stderr.
    """

    # name of shipped weights, a run's folder (its last.pt) or a checkpoint
    weights: str = "fashion_mnist"
    n: int = 1000  # images, 20 … the size of the test set
    seed: int = 0  # of the noise, 0 … 4294967295
    sampler: Sampler = "ddim"  # DDIM, DPM-Solver++ 2M, or ancestral sampling
    steps: StepsFlag = None  # network calls per image, 1 … T
    json: bool = False  # print one JSON object instead of the table
    device: DeviceFlag = None  # "cpu", "cuda", "cuda:1" or "mps"


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, what runs here, and what to do about the rest."""


COMMANDS = {"train": Train, "sample": Sample, "evaluate": Evaluate, "doctor": Doctor}


def parse(words: list[str] | None = None) -> Train | Sample | Evaluate | Doctor:
    """Parse the command line (`sys.argv` if None).

    Exits with 0 after --help, and with 2 after a message on stderr.
    """
    words = sys.argv[1:] if words is None else words
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    if not words or words[0] not in COMMANDS:  # prints help or an error
        about = "Train, sample and measure diffusion models from a shell."
        return tyro.cli(
            Train | Sample | Evaluate | Doctor,
            args=words,
            prog=PROGRAM,
            description=about,
            config=config,
        )
    # parse the flags of one command
    command = tyro.cli(
        COMMANDS[words[0]], args=words[1:], prog=f"{PROGRAM} {words[0]}", config=config
    )
    # record which fields of the config were named
    if isinstance(command, Train):
        named = {
            word.split("=")[0].removeprefix("--").replace("-", "_")
            for word in words
            if word.startswith("--")
        }
        values = {
            field.name: getattr(command.fields, field.name) for field in dataclasses.fields(Fields)
        }
        command = dataclasses.replace(
            command, given={name: values[name] for name in values if name in named}
        )
    return command
