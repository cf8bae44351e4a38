"""Train the weights that come with the package.

Run `python -m ddpm_utils.pretrained.make [name …]`, or `make pretrained`. The names are those of
the files: `mnist` is a diffusion network, `classifier_mnist` a classifier. With `--further EPOCHS`,
the weights that are there are trained for so many more passes, and the card says so.

If a run is interrupted, the same command continues it from its last checkpoint under
`checkpoints/`.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import torch

from .. import checkpoints, data, runs, runtime, training
from ..config import TrainConfig
from ..evaluation import class_probabilities, extract_features, train_classifier
from . import CLASSIFIER, FOLDER, build, card, load

RECIPES = {
    "fashion_mnist": TrainConfig(dataset="fashion_mnist", epochs=8, ema_decay=0.998),
    "mnist": TrainConfig(dataset="mnist", epochs=5, ema_decay=0.998),
    "fashion_mnist_labels": TrainConfig(
        dataset="fashion_mnist", num_classes=10, epochs=6, ema_decay=0.998
    ),
    "mnist_labels": TrainConfig(dataset="mnist", num_classes=10, epochs=4, ema_decay=0.998),
}
CLASSIFIERS = {"fashion_mnist": {"epochs": 6, "shift": 1}, "mnist": {"epochs": 4, "shift": 2}}


def make(name: str, further: float | None = None) -> Path:
    """Train `name` to the end of its recipe, and write its weights and card beside this file.

    `further` starts from the weights that are there, and trains them for so many more passes at
    half the learning rate. Returns the card's path.
    """
    # set up the data and the network
    cfg, folder, before = RECIPES[name], runtime.checkpoint_dir(f"pretrained_{name}"), None
    if further is not None:
        before = card(name)
        seed = cfg.seed + 1 + len(before.get("further", []))
        cfg = cfg.replace(epochs=further, lr=cfg.lr / 2, seed=seed)
        folder = runtime.checkpoint_dir(f"pretrained_{name}_further_{seed}")
    device = runtime.pick_device()
    runtime.seed_everything(cfg.seed)
    train_set, test_set = _real_images(cfg.dataset)
    state = training.TrainState(cfg, load(name)[0].train() if before else build(cfg), device)
    # continue from the last checkpoint, if there is one
    minutes_file = folder / "minutes.json"
    minutes = 0.0
    if (folder / "last.pt").is_file():
        checkpoints.load(folder / "last.pt", state)
        minutes = json.loads(minutes_file.read_text())
        print(f"{name}: goes on from step {state.step}, after {minutes:.1f} minutes")
    # train and keep track of the time
    start = time.perf_counter() - 60 * minutes
    labels = train_set.labels if cfg.num_classes else None
    for record in runs.train(state, train_set.images, test_set.images[:2048], folder, 250, labels):
        if record.held_out is not None:
            minutes = (time.perf_counter() - start) / 60
            minutes_file.write_text(json.dumps(minutes))
            print(
                f"{name}: step {record.step}/{record.total}, {minutes:.1f} min, "
                f"{record.images_per_second:.0f} images/s, held-out loss {record.held_out:.4f}",
                flush=True,
            )
    if state.stopped:
        minutes_file.write_text(json.dumps((time.perf_counter() - start) / 60))
        raise SystemExit(
            f"{name}: stopped at step {state.step}; the same command goes on from there"
        )
    # write the weights and the card
    torch.save(state.ema.model.state_dict(), FOLDER / f"{name}.pt")
    made = {
        "config": cfg.to_dict(),
        "data": f"{train_set.title}, {len(train_set):,} training images",
        "weights": f"average (EMA) after {state.step:,} steps",
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "held_out_loss": round(record.held_out, 5),
        "held_out_images": 2048,
        "minutes": round(minutes, 1),
        "seed": cfg.seed,
    }
    if before:
        # the card of the first run, with this one added
        run = {key: made[key] for key in ("weights", "minutes", "seed")}
        run |= {"epochs": cfg.epochs, "lr": cfg.lr, "hardware": runtime.hardware(device)}
        made = before | {
            "held_out_loss": made["held_out_loss"],
            "minutes": round(before["minutes"] + minutes, 1),
            "further": [*before.get("further", []), run],
        }
    return _write_card(name, device, made)


def make_classifier(dataset: str) -> Path:
    """Train the classifier of `dataset`, measure it on the test set, and write weights and card.

    Returns the card's path.
    """
    recipe, device = CLASSIFIERS[dataset], runtime.pick_device()
    train_set, test_set = _real_images(dataset)
    # train and measure the time
    start = time.perf_counter()
    model = train_classifier(
        train_set.images, train_set.labels, len(train_set.classes), **recipe, device=device
    )
    minutes = (time.perf_counter() - start) / 60
    # measure the accuracy on the test set
    right = (
        class_probabilities(model, extract_features(model, test_set.images)).argmax(dim=1)
        == test_set.labels
    )
    # write the weights and the card
    torch.save(model.state_dict(), FOLDER / f"{CLASSIFIER}{dataset}.pt")
    return _write_card(
        CLASSIFIER + dataset,
        device,
        {
            "recipe": recipe,
            "data": f"{train_set.title}, {len(train_set):,} training images",
            "parameters": sum(p.numel() for p in model.parameters()),
            "test_accuracy": round(right.double().mean().item(), 4),
            "test_images": len(test_set),
            "minutes": round(minutes, 1),
            "seed": 0,
        },
    )


def _real_images(dataset: str) -> tuple[data.ImageSet, data.ImageSet]:
    train_set, test_set = data.load_images(dataset, "train"), data.load_images(dataset, "test")
    if train_set.title != data.TITLES[dataset]:
        raise FileNotFoundError(
            f"{dataset} was not found: weights for it cannot be made from {train_set.title}"
        )
    return train_set, test_set


def _write_card(name: str, device, made: dict) -> Path:
    made |= {
        "hardware": runtime.hardware(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "license": "MIT, like the rest of this repository",
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    print(f"{name}: wrote {runtime.short_path(path)}")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Train the weights named on the command line. The module's docstring describes it."""
    classifiers = [CLASSIFIER + dataset for dataset in CLASSIFIERS]
    parser = argparse.ArgumentParser(prog="python -m ddpm_utils.pretrained.make")
    parser.add_argument("names", nargs="*", help="weights to train; all if left out")
    parser.add_argument("--further", type=float, help="more passes for the weights that are there")
    asked = parser.parse_args(arguments)
    # check every name before the first of them trains
    networks = list(RECIPES) if asked.further is not None else [*RECIPES, *classifiers]
    names = asked.names or networks
    for name in names:
        if name in classifiers and name not in networks:
            parser.error(f"{name} is a classifier, and --further trains diffusion networks only")
        if name not in networks:
            parser.error(f"there is no {name!r}; choose from {', '.join(networks)}")
    for name in names:
        if name in classifiers:
            make_classifier(name.removeprefix(CLASSIFIER))
        else:
            make(name, asked.further)


if __name__ == "__main__":
    main()
