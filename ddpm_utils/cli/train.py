"""`train`: a run in a folder of its own, from its first step or resumed.

It runs in one process, or in several under torchrun.
"""

import contextlib
import io
import json
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import (
    checkpoints,
    config,
    data,
    distributed,
    folders,
    plots,
    pretrained,
    recipes,
    runs,
    runtime,
    training,
)
from ..config import TrainConfig
from . import drawing, flags
from .losslog import LossLog

# fewer steps than the first print a hint; the default run on Fashion-MNIST makes the second
FEW_STEPS, DEFAULT_STEPS = 500, 2812
HELD_OUT = 512  # test images on which the loss is measured
SAMPLES = 64  # images in samples.png


def run(options: flags.Train) -> int:
    """Train, and fill the run's folder.

    Returns 0, or 130 if the run was stopped. Raises an exception on bad input and failed runs.
    """
    writer = summary_writer() if options.tensorboard else None
    with distributed.group(options.device) as device, contextlib.ExitStack() as stack:
        if distributed.rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # only process 0 prints
        # prepare the run, claim its folder, and begin or resume it
        cfg, folder, train_set, test_set = prepare(options, device)
        state = build(cfg, train_set, device)
        distributed.first_process_only(lambda: stack.enter_context(claim(folder, options.resume)))
        begin(state, folder, train_set, options.resume)
        # train to the end or until the run is stopped
        labels = train_set.labels if cfg.num_classes else None
        run_loop(
            state,
            folder,
            train_set.images,
            test_set.images[: runtime.shrink(HELD_OUT, 8)],
            labels,
            writer,
        )
        if state.stopped:
            print(
                f"stopped at step {state.step:,}; to go on: {resume_command(folder)}",
                file=sys.stderr,
            )
            return 130
        # draw samples with the averaged weights
        if distributed.rank() == 0:
            how = drawing.plan(cfg, runtime.shrink(SAMPLES, 4), seed=cfg.seed)
            x, _ = drawing.draw(state.ema.model, cfg, how, device)
            iio.imwrite(folder / "samples.png", plots.tile(x))
        print(f"wrote config.json, last.pt, best.pt, loss.csv and samples.png to {folder}")
    return 0


def prepare(options: flags.Train, device) -> tuple[TrainConfig, Path, data.ImageSet, data.ImageSet]:
    """Return config, folder, training images and test images of the run that the flags describe.

    Writes nothing to the run's folder. Flags take precedence over the recipe, and the recipe over
    presets. A resumed run's own config takes precedence over all: a flag that contradicts it raises
    ValueError.
    """
    chosen, resumed = dict(options.given), options.resume and options.out is not None
    if options.recipe:
        chosen = recipes.fields(options.recipe, **chosen)
    if (
        "dataset" in chosen
        and chosen["dataset"] not in config.DATASETS
        and TrainConfig(**chosen).folder
    ):
        # Stored as an absolute path, so that a run can be resumed from anywhere.
        chosen["dataset"] = os.path.abspath(Path(chosen["dataset"]).expanduser())
    # a recipe has no preset: it is the same on all hardware
    preset_of = "cpu" if options.recipe else device
    if options.out is not None and not options.resume:
        refuse_taken(options.out)
    if resumed:
        cfg = resumed_config(saved_config(options.out), chosen, options.out)
    else:
        cfg = planned_config(chosen, TrainConfig(**chosen).dataset, preset_of)
    train_set, test_set = load(cfg, device)
    titles = {title: name for name, title in data.TITLES.items()}
    found = cfg.dataset if cfg.folder else titles[train_set.title]
    if found != cfg.dataset and resumed:
        title = data.TITLES[cfg.dataset]
        raise FileNotFoundError(
            f"{options.out} learns from {title}, which is neither on disk nor to be downloaded"
        )
    if not resumed:  # now the data set and its size are known
        cfg = planned_config(chosen, found, preset_of, len(train_set))
    folder = options.out or runtime.output_dir("runs") / cfg.run_name()
    if cfg.folder and folder.resolve() == cfg.folder.resolve():
        raise ValueError(
            f"{folder} holds your images, and a run's folder is no folder of images: choose "
            "another --out"
        )
    if options.resume and not resumed:
        saved_config(folder)
    if not options.resume:
        refuse_taken(folder)
    classes = len(train_set.classes)
    if cfg.num_classes not in (0, classes):
        raise ValueError(
            f"num_classes={cfg.num_classes}, but {train_set.title} has {classes}: give that, or 0 "
            "for none"
        )
    return cfg, folder, train_set, test_set


def planned_config(
    chosen: dict,
    dataset: str,
    device,
    n_images: int = config.FULL_SET,
) -> TrainConfig:
    """Return the fields `chosen` on top of a preset, shrunk in fast mode.

    The preset suits the device and the number of images. Raises ValueError on a bad field.
    """
    preset = config.preset_for(torch.device(device).type, n_images, runtime.capability(device))
    return config.for_this_run(TrainConfig(**(preset | chosen | {"dataset": dataset})))


def resume_command(folder: Path) -> str:
    """Return the command that resumes the run in `folder`."""
    return f"{flags.PROGRAM} train --resume --out {shlex.quote(str(folder))}"


def refuse_taken(folder: Path) -> None:
    """Raise ValueError if `folder` holds a run, which a new run would overwrite."""
    if (folder / "last.pt").exists():
        raise ValueError(
            f"{folder} holds a run already. To go on with it: {resume_command(folder)}; or choose "
            "another --out"
        )


def saved_config(folder: Path) -> TrainConfig:
    """Return the config of the run in `folder`.

    It is the content of config.json, or the config in last.pt if there is no config.json. Raises
    FileNotFoundError if both files are missing, and ValueError if one is damaged or if the two
    contradict each other.
    """
    last, written = folder / "last.pt", folder / "config.json"
    if not last.is_file() and not written.is_file():
        raise FileNotFoundError(
            f"no run to resume in {folder}: it has neither last.pt nor config.json"
        )
    # read the config in last.pt, if there is one
    cfg = config.from_dict(checkpoints.read(last)["config"]) if last.is_file() else None
    if not written.is_file():
        return cfg
    # read the config that a user may have edited
    try:
        values = json.loads(written.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{written} is no JSON ({error}): write it anew, or delete it if last.pt is there"
        ) from error
    noted = from_json(values, written)
    # compare the two configs
    differing = [] if cfg is None else noted.contradictions(cfg)
    if differing:
        raise ValueError(
            f"{written} was changed since last.pt was written ({'; '.join(differing)}): a resumed "
            "run keeps its config"
        )
    return noted


def from_json(values, path: Path) -> TrainConfig:
    """Return the config in the JSON file at `path`, whose content is `values`.

    Raises ValueError that names the file if `values` is not the config of a run.
    """
    try:
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, expected an object of fields")
        return config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path} is no config of a run: {error}") from error


def resumed_config(cfg: TrainConfig, chosen: dict, folder: Path) -> TrainConfig:
    """Return the config `cfg` of the run in `folder`, with the flags that may change.

    These are `epochs` and the location of the images. Raises ValueError if another flag has a value
    that differs from the run's.
    """
    wanted = config.for_this_run(cfg.replace(**chosen))
    differing = [text for text in wanted.contradictions(cfg) if text.split(":")[0] in chosen]
    if differing:
        raise ValueError(
            f"a resumed run keeps its config; your flags against {folder}: "
            f"{'; '.join(differing)}. Leave these flags out"
        )
    return cfg.replace(
        **{name: getattr(wanted, name) for name in ("epochs", "dataset") if name in chosen}
    )


def load(cfg: TrainConfig, device) -> tuple[data.ImageSet, data.ImageSet]:
    """Return the training and test images.

    On each machine, one process goes first, so that no two download into the same folder.
    """
    first = not distributed.world() > 1 or dist.get_node_local_rank(0) == 0
    form = (cfg.image_size, cfg.channels, cfg.pad)
    bar = tqdm(desc="read", unit="file", disable=None, leave=False)

    def tell(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    for turn in (True, False):
        if first == turn and cfg.folder:
            train_set, test_set = folders.train_and_test(
                cfg.folder, *form, device=device, progress=tell
            )
        elif first == turn:
            train_set = data.load_images(cfg.dataset, image_size=cfg.image_size, pad=cfg.pad)
            test_set = data.load_images(cfg.dataset, "test", cfg.image_size, cfg.pad, say=False)
        distributed.agree()
    bar.close()
    return train_set, test_set


@contextlib.contextmanager
def claim(folder: Path, resume: bool):
    """Keep all other processes from writing to `folder` inside the `with` block.

    Raises ValueError if another process uses the folder, or if it holds a run and `resume` is
    False.
    """
    with checkpoints.claim(folder):
        if not resume:
            refuse_taken(folder)  # another run may have ended there since this one looked
        yield


def build(cfg: TrainConfig, train_set: data.ImageSet, device) -> training.TrainState:
    """Return the state before the first step.

    Raises ValueError if network and images do not fit.
    """
    runtime.seed_everything(cfg.seed)
    state = training.TrainState(cfg, pretrained.build(cfg), device)
    # fail on a wrong size or number of channels before anything is written
    with torch.no_grad():
        x = torch.zeros(1, *train_set.images.shape[1:], device=device)
        y = torch.zeros(1, dtype=torch.long, device=device) if cfg.num_classes else None
        state.ema.model(x, torch.zeros(1, dtype=torch.long, device=device), y)
    return state


def begin(state: training.TrainState, folder: Path, train_set: data.ImageSet, resume: bool) -> None:
    """Load the checkpoint of a resumed run, write config.json, and print what will happen.

    `state` is changed to the state of the run in `folder` if the run is resumed. Raises ValueError
    if the run has made more steps than its config, or the flag --epochs, specifies.
    """
    cfg = state.cfg
    # load the checkpoint and check that the data is the same
    if resume and (folder / "last.pt").is_file():
        checkpoints.load(folder / "last.pt", state)
        facts = runs.describe_data(train_set.images, train_set.labels if cfg.num_classes else None)
        distributed.agree(step=state.step, **facts)
        runs.check_same_data(state, facts)
    # compare the steps made with the steps planned
    total, made = cfg.steps(len(train_set)), state.step
    if made > total:
        passes = made * cfg.batch_size / len(train_set)
        raise ValueError(
            f"epochs={cfg.epochs:g} is {total:,} steps, and this run has made {made:,}: give more "
            f"than {passes:.3g}"
        )
    # store the config beside the checkpoints
    if distributed.rank() == 0:
        with runtime.whole_file(folder / "config.json") as file:
            file.write((json.dumps(cfg.to_dict(), indent=2) + "\n").encode())
    # describe the run and give hints about its length
    size = sum(weights.numel() for weights in state.model.parameters())
    where = runtime.hardware(state.device) + (
        f", {distributed.world()} processes" if distributed.world() > 1 else ""
    )
    print(
        f"train: {cfg.model}, {size:,} parameters, {total:,} steps of {cfg.batch_size} images "
        f"({cfg.epochs:.3g} passes over {len(train_set):,} images), {where}"
    )
    if total < FEW_STEPS and not runtime.is_fast():
        enough = math.ceil(DEFAULT_STEPS * cfg.batch_size / len(train_set))
        print(
            f"train: {total:,} steps are few for a network to learn from; --epochs {enough} makes "
            f"{DEFAULT_STEPS:,}"
        )
    if made == total:
        print(
            f"train: all {total:,} steps are made; to make the run longer, add --epochs N with N "
            f"above {cfg.epochs:g}"
        )
    elif made:
        print(f"train: goes on from step {made:,}")


def run_loop(
    state: training.TrainState,
    folder: Path,
    images,
    held_out,
    labels,
    writer=None,
) -> None:
    """Train to the end or until the run is stopped, logging in process 0.

    If the last save fails, the state is saved elsewhere, and the error message says where.
    """
    chief, first = distributed.rank() == 0, state.step
    total = state.cfg.steps(len(images))
    every = math.ceil(total / 10)
    log = LossLog(folder / "loss.csv", first) if chief else None
    board = writer(folder / "tensorboard", purge_step=first + 1) if chief and writer else None
    bar = tqdm(
        total=total, initial=first, desc="train", unit="step", disable=None if chief else True
    )
    # reading a loss makes a GPU's host wait for it
    often = 1 if state.device.type == "cpu" else training.READ_EVERY
    fresh, words, forecast = [], "", runs.Forecast(state.cfg, len(images))
    try:
        for record in runs.train(state, images, held_out, folder, every, labels):
            if not chief:
                continue
            fresh.append(record)
            if said := forecast.after(record):
                bar.write(f"train: {said}", file=sys.stderr)
            if (
                len(fresh) >= often or record.held_out is not None or (record.step + 1) % every == 0
            ):  # before a save, too
                words = f"loss {record.loss:.4f}  {record.images_per_second:,.0f} images/s"
                write_rows(fresh, log, board)
            bar.set_postfix_str(words, refresh=False)
            bar.update()
            if record.held_out is not None:
                seconds = (total - record.step) * state.cfg.batch_size / record.images_per_second
                left = tqdm.format_interval(seconds)
                so_far = f"{record.step:,}".rjust(len(f"{total:,}"))
                note = (
                    f"step {so_far}/{total:,}  {words}  held-out loss {record.held_out:.4f}  "
                    f"{left} left"
                )
                bar.write(note, file=sys.stderr)
    except checkpoints.NotSaved as error:
        if state.step == first:
            raise
        save_elsewhere(state, folder, error)
    finally:
        if chief:
            write_rows(fresh, log, board)
            bar.close()
        if board:
            board.close()


def write_rows(fresh: list[runs.StepRecord], log: LossLog, board) -> None:
    """Log the records in `fresh`, and clear the list."""
    log.add(fresh)
    for r, loss in zip(fresh, runs.losses(fresh), strict=True) if board else ():
        values = {
            "loss": loss,
            "lr": r.lr,
            "images_per_second": r.images_per_second,
            "held_out": r.held_out,
        }
        for name, value in values.items():
            if value is not None:
                board.add_scalar(name, value, r.step)
    fresh.clear()


def save_elsewhere(state: training.TrainState, folder: Path, error: checkpoints.NotSaved) -> None:
    """Save `state` to a temporary folder, and raise NotSaved that says where it is.

    This is for a state that could not be saved to `folder`. If the temporary folder fails too,
    NotSaved says so.
    """
    try:
        path = checkpoints.save(Path(tempfile.mkdtemp(prefix="ddpm_run_")) / "last.pt", state)
    except OSError:
        raise checkpoints.NotSaved(
            f"neither {folder} nor {tempfile.gettempdir()} takes the run's state at step "
            f"{state.step}: {error}"
        ) from error
    raise checkpoints.NotSaved(
        f"{folder} does not take the run's state at step {state.step} ({error}). It is saved as "
        f"{path}: copy it to {folder / 'last.pt'}; then, to go on: {resume_command(folder)}"
    ) from error


def summary_writer():
    """Return TensorBoard's writer class; raise ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs one more package: pip install tensorboard, or leave the flag out"
        ) from None
    return SummaryWriter
