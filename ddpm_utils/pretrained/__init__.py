"""Small weights that we trained, each beside a JSON card that says how it was made.

There are diffusion networks and classifiers.
"""

import copy
import json
from pathlib import Path

import torch

from .. import checkpoints, data, gallery, runs, runtime, training
from ..config import TrainConfig, from_dict
from ..evaluation import Classifier, train_classifier
from ..unet import UNet

FOLDER = Path(__file__).parent
# how the files of the classifiers begin; all others are diffusion networks
CLASSIFIER = "classifier_"


def names() -> list[str]:
    """Return the names of the diffusion networks that come with the package."""
    return sorted(
        path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith(CLASSIFIER)
    )


def classifier_names() -> list[str]:
    """Return the data sets for which a classifier comes with the package."""
    return sorted(path.stem.removeprefix(CLASSIFIER) for path in FOLDER.glob(f"{CLASSIFIER}*.json"))


def card(name: str) -> dict:
    """Return the card that says how the weights `name` were made.

    Raises FileNotFoundError that lists the available names if there is no such card, and ValueError
    if it is damaged.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        there = [*names(), *(CLASSIFIER + dataset for dataset in classifier_names())]
        raise FileNotFoundError(
            f"no pretrained weights {name!r}: there are {', '.join(there) or 'none'}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is damaged ({error}): take it from the repository again"
        ) from error


def build(cfg: TrainConfig) -> torch.nn.Module:
    """Return the network that `cfg.model` names, with fresh weights from the global generator.

    The network is our own U-Net or one of the gallery.
    """
    if cfg.model == "unet":
        return UNet(**cfg.network())
    return gallery.build(cfg.model, cfg.timesteps, cfg.channels)


def load(name: str, device="cpu") -> tuple[torch.nn.Module, TrainConfig]:
    """Return the averaged network `name` in eval mode on `device`, and its config.

    Reads only tensors from the file and runs no code from it.
    """
    cfg = from_dict(card(name)["config"])
    model = build(cfg)
    _read_weights(name, model)
    return runtime.place(model, device).eval(), cfg


def _read_weights(name: str, model: torch.nn.Module) -> None:
    path = FOLDER / f"{name}.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing beside its card: take it from the repository again"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path.name} is damaged ({type(error).__name__}): take it from the repository again"
        ) from error
    checkpoints.check_weights(path, weights, model)
    model.load_state_dict(weights)


def matching(cfg: TrainConfig) -> str | None:
    """Return the name of shipped weights that `cfg` can use, or None."""
    return next(
        (name for name in names() if not cfg.differences(from_dict(card(name)["config"]))), None
    )


def obtain(cfg: TrainConfig, device="cpu", seconds: float = 60.0) -> torch.nn.Module:
    """Return an averaged network in eval mode whose weights fit `cfg`.

    One printed line says where the weights come from. They come from the newest checkpoint of
    lesson 04 under `checkpoints/` whose config agrees on `config.WEIGHT_FIELDS`; if there is none,
    from shipped weights that fit; and otherwise from training here for `seconds`, which is
    announced in capitals.
    """
    model = build(cfg)
    # look for the reader's own checkpoints, newest first
    files = sorted(
        runtime.checkpoint_dir("lesson_04").glob("*/last.pt"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in files:
        try:
            payload = checkpoints.read(path)
            if cfg.differences(from_dict(payload["config"])):
                continue
            checkpoints.check_weights(path, payload.get("ema"), model)
        except ValueError as error:
            print(f"weights: passed over {runtime.short_path(path)}: {error}")
            continue
        model.load_state_dict(payload["ema"])
        print(f"weights: your own, from {runtime.short_path(path)}, {payload['step']:,} steps")
        return runtime.place(model, device).eval()
    # otherwise use shipped weights
    name = matching(cfg)
    if name is not None:
        made = card(name)
        print(
            f"weights: shipped with the package, {name}, {made['minutes']} minutes on "
            f"{made['hardware']}"
        )
        return load(name, device)[0]
    # otherwise train here
    print(
        f"WEIGHTS: NONE FIT THIS CONFIG. Training for {seconds:.0f} s now; expect rough images. "
        "Lesson 04 trains properly."
    )
    return _train_briefly(cfg, model, device, seconds)


def load_classifier(dataset: str = "fashion_mnist", device="cpu") -> Classifier:
    """Return the shipped classifier of `dataset` in eval mode on `device`.

    The metrics (module `evaluation`) use its features. Raises FileNotFoundError that lists the
    available names. For images of any other kind, see `obtain_classifier`.
    """
    card(CLASSIFIER + dataset)
    model = Classifier()
    _read_weights(CLASSIFIER + dataset, model)
    return runtime.place(model, device).eval()


def obtain_classifier(train_set: data.ImageSet, device="cpu") -> Classifier:
    """Return a classifier in eval mode for images like `train_set`.

    One printed line says where the classifier comes from. It is the shipped one if there is one for
    this data set at 28×28. Otherwise it is trained here, which takes seconds for the digits.
    """
    shape, title = tuple(train_set.images.shape[1:]), train_set.title
    dataset = next(
        (
            name
            for name in classifier_names()
            if data.TITLES[name] == title and shape == (1, 28, 28)
        ),
        None,
    )
    if dataset is not None:
        right = card(CLASSIFIER + dataset)["test_accuracy"]
        print(f"classifier: shipped with the package, right on {right:.2%} of {title}'s test set")
        return load_classifier(dataset, device)
    print(
        f"classifier: none is shipped for {title} of {shape[-2]}×{shape[-1]}; training one now on "
        f"{len(train_set):,} images"
    )
    return train_classifier(
        train_set.images, train_set.labels, len(train_set.classes), device=device
    )


def _train_briefly(
    cfg: TrainConfig, model: torch.nn.Module, device, seconds: float
) -> torch.nn.Module:
    """Train for about `seconds`, and return the averaged network.

    The speed is measured over a few steps. The run then has as many steps as fit into `seconds`,
    and its learning rate falls to its final value.
    """
    train_set = data.load_images(cfg.dataset, image_size=cfg.image_size, pad=cfg.pad)
    images, labels = train_set.images, train_set.labels if cfg.num_classes else None
    few = training.TrainState(
        cfg.replace(epochs=6 * cfg.batch_size / len(images)), copy.deepcopy(model), device
    )
    # the first step of a GPU also loads and chooses its kernels
    next(runs.train(few, images, labels=labels))
    for record in runs.train(few, images, labels=labels):  # noqa: B007
        pass
    seen = min(record.images_per_second * seconds, cfg.epochs * len(images))
    state = training.TrainState(cfg.replace(epochs=max(1e-6, seen / len(images))), model, device)
    for record in runs.train(state, images, labels=labels):  # noqa: B007
        pass
    print(f"weights: trained {record.step:,} steps, loss {record.loss:.3f}")
    return state.ema.model
