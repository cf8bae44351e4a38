"""The command line's flags: those of `train` are the fields of `TrainConfig`, explained by the comments beside them."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from pathlib import Path

from .. import config
from ..config import TrainConfig
from ..recipes import RECIPES

PROGRAM = "python -m ddpm_utils"
SAMPLES = 64  # pictures that `sample` draws if neither a flag nor a recipe says how many
EXAMPLES = {
    "train": f"""examples:
  {PROGRAM} train                                 the default
  {PROGRAM} train --dataset mnist --out my_run    another data set
  {PROGRAM} train --out my_run --resume           goes on exactly
  {PROGRAM} train --schedule linear --target eps  much like DDPM
  {PROGRAM} train --recipe guide                  as a tutorial does""",
    "sample": f"""examples:
  {PROGRAM} sample                                 shipped weights
  {PROGRAM} sample --weights my_run --n 16         a run of your own
  {PROGRAM} sample --weights mnist --sampler ddpm  as in the paper
  {PROGRAM} sample --recipe guide                  what it shows""",
    "evaluate": f"""examples:
  {PROGRAM} evaluate                              shipped weights
  {PROGRAM} evaluate --weights my_run --n 10000   a finer ruler
  {PROGRAM} evaluate --json > report.json         for another program""",
}


def notes_of(cls) -> dict[str, tuple[str, str]]:
    """{field: (part, note)} of a dataclass: the comment beside each field, and the comment line that heads its part."""
    part, notes = "", {}
    for line in inspect.getsource(cls).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            part = heading[1]
        elif field := re.fullmatch(r"    (\w+): [^#]+? = [^#]+  # (.+)", line):
            notes[field[1]] = part, field[2]
    return notes


def flag(name: str) -> str:
    """The flag of a field: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


def given(options: argparse.Namespace) -> dict:
    """The fields of `TrainConfig` that were named on the command line, and no others."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(options).items() if name in names}


class Formatter(argparse.HelpFormatter):
    """Wraps descriptions and leaves examples, which hold line breaks, as they are."""

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises ValueError on bad input instead of printing the usage, and suggests the nearest flag."""

    def __init__(self, *arguments, **options):
        def formatter(prog):
            return Formatter(prog, max_help_position=30)

        super().__init__(*arguments, **options, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message}; {self.prog} --help lists what there is")

    def refuse(self, words: list[str]) -> None:
        """Raise ValueError if `words`, which no flag has claimed, hold anything."""
        if words:
            near = difflib.get_close_matches(words[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.75)
            self.error(f"unknown: {' '.join(words)}" + "".join(f" (did you mean {flag}?)" for flag in near))


def build_parser() -> Parser:
    """The parser of all four commands. Of what it reads, `command` names the chosen one and `parser` holds its parser."""
    parser = Parser(prog=PROGRAM, usage=f"{PROGRAM} command [flags]",
                    description="Train, sample and measure diffusion models from a shell.")  # fmt: skip
    commands = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="command", parser_class=Parser, prog=PROGRAM
    )

    def add(name, note, about="", usage=" [flags]"):
        made = commands.add_parser(
            name, help=note, description=about or f"{note.capitalize()}.", epilog=EXAMPLES.get(name),
            usage=f"{PROGRAM} {name}{usage}",
        )  # fmt: skip
        made.set_defaults(parser=made)
        return made

    train = add("train", "train a network into a folder, or go on with a run that was stopped",
                "Train a network. Writes into a folder: config.json, last.pt, best.pt (lowest loss on held-out pictures), "
                "loss.csv and a grid of samples. Ctrl-C stops between two steps; --resume goes on exactly. Under torchrun, "
                "every process takes its share of each batch.",
                usage=" [--out FOLDER] [--resume] [flags]")  # fmt: skip
    _add_recipe(train, "train as this source did: the fields below are its own, unless flags change them")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="the run's folder [outputs/runs/NAME-OF-THE-CONFIG]")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, with its own config")
    _add_device(train)
    train.add_argument("--tensorboard", action="store_true", help="log for TensorBoard as well, if that is installed")
    _add_config(train)

    sample = add("sample", "draw pictures from trained weights: grid, strip and GIF",
                 "Draw pictures from trained weights. Writes grid.png, strip.png (how the first pictures come about) and "
                 "samples.gif (at most the first 64 of them) into a folder.")  # fmt: skip
    _add_recipe(sample, "draw what this source shows, by its own sampler, from weights trained by its recipe")
    _add_weights(sample, n=SAMPLES)
    sample.set_defaults(weights=None, n=None, sampler=None)  # a recipe has its own
    sample.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go [outputs/samples/NAME]")
    _add_device(sample)

    evaluate = add("evaluate", "measure trained weights against real pictures",
                   "Measure pictures drawn from trained weights against real ones. Every distance stands beside its "
                   "floor: what real test pictures get at the same n. The table goes to stdout, all else to stderr.")  # fmt: skip
    _add_weights(evaluate, n=1000)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    _add_device(evaluate)

    add("doctor", "say what is installed, what runs here, and what to do about the rest", usage="")
    return parser


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", metavar="NAME", help='"cpu", "cuda", "cuda:1", "mps" [the best one here]')


def _add_recipe(parser: Parser, note: str) -> None:
    names = ", ".join(f'"{name}"' for name in RECIPES)
    parser.add_argument("--recipe", choices=tuple(RECIPES), metavar="NAME", help=f"{note}; {names}")


def _add_weights(parser: Parser, n: int) -> None:
    parser.add_argument(
        "--weights", default="fashion_mnist", metavar="WHAT",
        help="a name of shipped weights, a run's folder (its last.pt) or a checkpoint [fashion_mnist]",
    )  # fmt: skip
    parser.add_argument("--n", type=int, default=n, metavar="N", help=f"pictures, 1 … 100000 [{n}]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise, 0 … 4294967295 [%(default)s]")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", metavar="NAME",
                        help='"ddim" or "ddpm" [ddim]')  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="network calls a picture, 1 … T [ddim 50, ddpm T]")


def _add_config(parser: Parser) -> None:
    """One flag a field. A flag that is not given leaves no trace, so that `--resume` can tell it from one that is."""
    groups, notes = {}, notes_of(TrainConfig)
    on_gpu = config.preset_for("cuda")
    for field in dataclasses.fields(TrainConfig):
        part, note = notes[field.name]
        group = groups.setdefault(part, None) or parser.add_argument_group(part)
        groups[part] = group
        many = isinstance(field.default, tuple)
        kind = int if many else type(field.default)
        default = _shown(field.default) + (f"; GPU {_shown(on_gpu[field.name])}" if field.name in on_gpu else "")
        group.add_argument(
            flag(field.name), dest=field.name, type=kind, nargs="*" if many else None, default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "NAME"}[kind], help=f"{note} [{default}]".replace("%", "%%"),
        )  # fmt: skip


def _shown(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (`sys.argv` if None). `--batch_size` is as good as `--batch-size`. Raises ValueError."""
    words = sys.argv[1:] if arguments is None else arguments
    spelt = [re.sub(r"^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in words]
    options, unknown = build_parser().parse_known_args(spelt)
    options.parser.refuse(unknown)
    return options
