"""The recipes of the four source tutorials: how each trains, and which images it draws.

Their networks are in `gallery`. All four use T = 1000 linear betas, ε as the target, uniform t and
Adam. Except for the guide, they use a constant learning rate without clipping. None of them gives
labels to its network, and none clamps x̂0 during sampling: only the finished image is clipped to
its range.
"""

from dataclasses import dataclass

from .config import DATASETS, PAPER

SHARED = PAPER | {
    "channels": 1,
    "timesteps": 1000,
    "beta_scale": 1.0,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "num_classes": 0,
    "warmup_steps": 0,
    "decay_from": 1.0,
    "grad_clip": 1e6,
    "ema_decay": 0.0,
}


@dataclass(frozen=True)
class Recipe:
    """How a source tutorial trains, and which images it draws.

    `config`: fields of `TrainConfig`. The other fields say what is drawn from the trained network,
    by ancestral sampling in all T steps.

    images: number of images in the grid; columns: of the grid; variance: "beta" or "beta_tilde";
    strip: the times (of T = 1000) at which the state of every image is shown, or () for no strip;
    frames, filmed: number of frames in the GIF and of images in it, or 0 for no GIF.
    """

    config: dict
    images: int
    columns: int
    variance: str = "beta"
    strip: tuple[int, ...] = ()
    frames: int = 0
    filmed: int = 0


RECIPES = {
    # Faces, in color, from a folder that the reader brings: there is no default. As published it
    # keeps the weights of the epoch with the lowest loss in training; here best.pt has the lowest
    # loss on images held out.
    "anime": Recipe(
        SHARED
        | {
            "model": "anime",
            "image_size": 48,
            "channels": 3,
            "batch_size": 32,
            "lr": 1e-4,
            "epochs": 50.0,
        },
        images=12,
        columns=6,
        variance="beta_tilde",
    ),
    # Published for Fashion-MNIST and MNIST. It, too, keeps the epoch with the lowest loss in
    # training.
    "article": Recipe(
        SHARED
        | {
            "model": "article",
            "dataset": "fashion_mnist",
            "image_size": 28,
            "batch_size": 128,
            "lr": 1e-3,
            "epochs": 20.0,
        },
        images=100,
        columns=10,
        frames=100,
        filmed=16,
    ),
    # Fragments, with the advice to start small, to clip gradients and to let the rate fall. All
    # numbers but those of the schedule are ours, and so are the data, padded to the next size that
    # halves three times.
    "guide": Recipe(
        SHARED
        | {
            "model": "guide",
            "dataset": "mnist",
            "image_size": 32,
            "pad": 2,
            "batch_size": 128,
            "lr": 1e-3,
            "epochs": 20.0,
            "grad_clip": 1.0,
            "decay_from": 0.0,
            "lr_floor": 0.02,
        },
        images=16,
        columns=4,
    ),
    # Images in [0, 1]: a range that exists in this recipe alone. Its average is timm's, 0.9999 from
    # the first step on; ours rises to that over 90,000 steps (this run has 70,312), and so forgets
    # the random start. As published the last batch of an epoch is dropped if it is not full; here
    # batches run on from pass to pass. The grid is ours.
    "mnist32": Recipe(
        SHARED
        | {
            "model": "mnist32",
            "dataset": "mnist",
            "image_size": 32,
            "pad": 2,
            "data_range": "unit",
            "batch_size": 64,
            "lr": 2e-5,
            "epochs": 75.0,
            "ema_decay": 0.9999,
        },
        images=10,
        columns=5,
        strip=(999, 700, 550, 400, 300, 200, 100, 50, 15, 0),
    ),
}


def fields(name: str, **chosen) -> dict:
    """Return fields of `TrainConfig`: those in `chosen`, over those of the recipe `name`.

    The built-in data sets are gray with every recipe; images of a folder are read with the channels
    of the recipe's network. Raises ValueError on an unknown name, and if the recipe is for your own
    images and `chosen` names none.
    """
    if name not in RECIPES:
        raise ValueError(
            f"recipe={name!r} is not known: choose one of {', '.join(map(repr, RECIPES))}"
        )
    merged = RECIPES[name].config | chosen
    if "dataset" not in merged:
        raise ValueError(
            f"the recipe {name!r} is for images of your own: name their folder, as in --dataset "
            "./faces"
        )
    if merged["dataset"] in DATASETS and "channels" not in chosen:
        merged["channels"] = 1
    return merged
