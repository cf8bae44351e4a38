"""Every setting of a training run in one frozen, validated dataclass."""

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

DATASETS = ("fashion_mnist", "mnist", "digits")
SCHEDULES = ("linear", "cosine")
TARGETS = ("eps", "x0", "v")
# Our network, and those of `gallery`, which is too slow to import here.
MODELS = ("unet", "anime", "article", "guide", "mnist32")
OPTIMIZERS = ("muon", "adamw", "adam")
RANGES = ("symmetric", "unit")
DRAWS = ("middle", "stratified", "uniform")

# Fields that files of an earlier version lack, and what those files meant; the defaults may move
# on.
ADDED = {
    "model": "unet",
    "timestep_draw": "stratified",
    "optimizer": "adamw",
    "label_drop": 0.0,
    "pad": 0,
    "data_range": "symmetric",
}

# Fields that came after runs had been named: at these values the name is what it was, and the run's
# folder is found.
UNNAMED = {"label_drop": 0.1, "pad": 0, "data_range": "symmetric"}

FULL_SET = 60_000  # training images of Fashion-MNIST and MNIST, for which the presets are made

# The setting of DDPM (2006.11239): its schedule, what its network predicts, and how Algorithm 1
# draws t.
PAPER = {"schedule": "linear", "target": "eps", "timestep_draw": "uniform"}

# Fields that decide what a set of weights means. Runs that agree on them can share weights.
WEIGHT_FIELDS = (
    "dataset",
    "image_size",
    "channels",
    "pad",
    "data_range",
    "timesteps",
    "schedule",
    "beta_scale",
    "target",
    "model",
    "widths",
    "blocks",
    "attention_levels",
    "fold",
    "time_dim",
    "groups",
    "heads",
    "num_classes",
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run.

    `TrainConfig(**PAPER)` follows Algorithms 1 and 2 of DDPM exactly. Raises ValueError on
    construction if a value is not valid; the message names the field, its value, what was expected,
    and the nearest fix.
    """

    # data

    # "fashion_mnist", "mnist", "digits", or a folder of images, such as ./faces
    dataset: str = "fashion_mnist"
    image_size: int = 28  # pixels a side, 8 … 256
    channels: int = 1  # 1 (gray) or 3 (RGB)
    pad: int = 0  # black pixels on each side, within image_size, 0 … less than half of it
    # of the network's images: [−1, 1], or "unit", [0, 1], for the recipe mnist32 alone
    data_range: str = "symmetric"

    # diffusion

    timesteps: int = 1000  # T, 2 … 10000
    schedule: str = "cosine"  # of the betas, "linear" or "cosine"
    # multiplies the linear betas, 0.001 … 1000; 1000 / T keeps the noise of T = 1000
    beta_scale: float = 1.0
    target: str = "v"  # what the network predicts, "eps", "x0" or "v"

    # network

    # "unet", of the fields below, or a gallery member: "anime", "article", "guide", "mnist32"
    model: str = "unet"
    widths: tuple[int, ...] = (48, 64)  # channels of each level, multiples of `groups`
    blocks: int = 2  # residual blocks a level, down and up, 1 … 8
    # levels (0 is the finest) with self-attention; may be empty
    attention_levels: tuple[int, ...] = (1,)
    # f × f pixels become one position with f² times the channels, 1 … 8; 1 leaves the image alone
    fold: int = 2
    time_dim: int = 128  # width of the time embedding, even, 2 … 4096
    groups: int = 4  # of the group normalizations, 1 … 1024
    heads: int = 4  # of the attention, 1 … 1024; must divide the width of the levels that attend
    dropout: float = 0.0  # in the residual blocks, in training only, 0 … 0.9
    num_classes: int = 0  # labels the network is told, 0 … 10000; 0: no labels

    # optimization

    epochs: float = 1.5  # passes over the training images, 1e-6 … 1e5, may be a fraction
    batch_size: int = 32  # images a step, 1 … 4096
    # share of the labels that training withholds, so that the network can do without, 0 … 1
    label_drop: float = 0.1
    # in a batch: "middle" (spread, ends rare), "stratified" (spread) or "uniform"
    timestep_draw: str = "middle"
    optimizer: str = "muon"  # "muon", "adamw" or "adam"
    lr: float = 3e-3  # peak learning rate, 1e-6 … 1e-1
    warmup_steps: int = 100  # steps of linear rise to `lr`, 0 … 1000000
    # share of the run after which the rate falls linearly, 0 … 1; 1: it stays
    decay_from: float = 0.0
    lr_floor: float = 0.02  # share of `lr` left at the end, 0 … 1
    weight_decay: float = 0.0  # of the optimizer, 0 … 1
    grad_clip: float = 1.0  # largest norm of the gradient, 1e-6 … 1e6
    ema_decay: float = 0.99  # of the averaged weights, 0 (no averaging) … 0.99999
    seed: int = 0  # of weights, batches, timesteps and noise, 0 … 4294967295

    def __post_init__(self):
        for name in ("widths", "attention_levels"):  # a list read from JSON is as good as a tuple
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or any(
                type(value) is not int for value in values
            ):
                raise ValueError(
                    f"{name}={values!r} must be a tuple of whole numbers, such as (48, 64) or (1,)"
                )
            object.__setattr__(self, name, tuple(values))
        if not isinstance(self.dataset, str) or not re.search(r"[/\\]", self.dataset):  # no path
            self._one_of(
                "dataset",
                DATASETS,
                f", or give a folder of images as a path, such as './{self.dataset}'",
            )
        self._one_of("schedule", SCHEDULES)
        self._one_of("target", TARGETS)
        self._one_of("model", MODELS)
        self._one_of("timestep_draw", DRAWS)
        self._one_of("optimizer", OPTIMIZERS)
        self._within("image_size", 8, 256)
        self._one_of("channels", (1, 3))
        self._within("pad", 0, (self.image_size - 1) // 2)
        self._one_of("data_range", RANGES)
        self._within("timesteps", 2, 10_000)
        self._within("beta_scale", 1e-3, 1e3)
        self._within("blocks", 1, 8)
        self._within("fold", 1, 8)
        self._within("time_dim", 2, 4096)
        if self.time_dim % 2:
            raise ValueError(
                f"time_dim={self.time_dim} must be even, for sines and cosines: try "
                f"{self.time_dim + 1}"
            )
        self._within("groups", 1, 1024)
        self._within("heads", 1, 1024)
        self._within("seed", 0, 2**32 - 1)
        self._within("dropout", 0.0, 0.9)
        self._within("num_classes", 0, 10_000)
        self._within("epochs", 1e-6, 1e5)
        self._within("batch_size", 1, 4096)
        self._within("label_drop", 0.0, 1.0)
        self._within("lr", 1e-6, 1e-1)
        self._within("warmup_steps", 0, 1_000_000)
        self._within("decay_from", 0.0, 1.0)
        self._within("lr_floor", 0.0, 1.0)
        self._within("weight_decay", 0.0, 1.0)
        self._within("grad_clip", 1e-6, 1e6)
        self._within("ema_decay", 0.0, 0.99999)
        if not self.widths:
            raise ValueError(
                "widths is empty: give one number of channels a level, such as (48, 64)"
            )
        for i, width in enumerate(self.widths):
            for name in ("groups", "heads") if i in self.attention_levels else ("groups",):
                n = getattr(self, name)
                if width < 1 or width % n:
                    nearest = max(1, round(width / n)) * n
                    raise ValueError(
                        f"{name}={n} does not divide widths[{i}]={width}: try a width of {nearest}"
                    )
        for level in self.attention_levels:
            if not 0 <= level < len(self.widths):
                raise ValueError(
                    f"attention_levels holds {level}, but widths {self.widths} has levels 0 … "
                    f"{len(self.widths) - 1}"
                )

    def _one_of(self, name, options, more=""):
        value = getattr(self, name)
        if value not in options:
            raise ValueError(
                f"{name}={value!r} is not known: choose one of "
                f"{', '.join(map(repr, options))}{more}"
            )

    def _within(self, name, low, high):
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):  # NaN fails the comparison
            nearest = (
                min(max(value, low), high)
                if isinstance(value, int | float) and value == value
                else low
            )
            raise ValueError(
                f"{name}={value!r} is outside {low} … {high}: the nearest allowed value is "
                f"{nearest}"
            )
        if isinstance(low, int) and value != int(value):
            raise ValueError(f"{name}={value!r} must be a whole number: try {round(value)}")
        # 2 and 2.0 are one config with one `run_name`
        object.__setattr__(self, name, type(low)(value))

    @property
    def folder(self) -> Path | None:
        """The folder of images that `dataset` names, or None."""
        return None if self.dataset in DATASETS else Path(self.dataset).expanduser()

    def network(self) -> dict:
        """Return the keyword arguments for `unet.UNet`.

        To build whichever network `model` names, use `pretrained.build`.
        """
        names = (
            "channels",
            "widths",
            "blocks",
            "attention_levels",
            "fold",
            "time_dim",
            "groups",
            "heads",
            "dropout",
            "num_classes",
        )
        return {name: getattr(self, name) for name in names}

    def noise(self) -> dict:
        """Return the keyword arguments for `schedules.make_schedule`."""
        return {"name": self.schedule, "timesteps": self.timesteps, "scale": self.beta_scale}

    def steps(self, n_images: int) -> int:
        """Return the number of optimizer steps in a run over `n_images` images, at least 1."""
        return max(1, round(self.epochs * n_images / self.batch_size))

    def replace(self, **changes) -> "TrainConfig":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def run_name(self) -> str:
        """Return a folder name unique to this config, such as `fashion_mnist-v-1f0a9c3e`."""
        named = sorted(
            (key, value) for key, value in self.to_dict().items() if UNNAMED.get(key) != value
        )
        digest = hashlib.sha256(repr(named).encode()).hexdigest()[:8]
        data = re.sub(r"\W+", "_", self.folder.resolve().name) if self.folder else self.dataset
        return f"{data}-{self.target}-{digest}"

    def to_dict(self) -> dict:
        """Return the fields as plain values that fit into JSON and a checkpoint."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def contradictions(self, other: "TrainConfig") -> list[str]:
        """Return the `differences` in all fields that a resumed run must keep.

        A resumed run may be longer (`epochs`), and the folder of its images may have moved, because
        a checkpoint identifies the images by a digest.
        """
        free = {"epochs"} | ({"dataset"} if self.folder and other.folder else set())
        return self.differences(other, [name for name in self.to_dict() if name not in free])

    def differences(self, other: "TrainConfig", fields=WEIGHT_FIELDS) -> list[str]:
        """Return the `fields` in which two configs differ, each as `name: mine against theirs`.

        With the default `fields`, the list is empty if the two configs can share weights.
        """
        return [
            f"{f}: {getattr(self, f)!r} against {getattr(other, f)!r}"
            for f in fields
            if getattr(self, f) != getattr(other, f)
        ]


def from_dict(values: dict) -> TrainConfig:
    """Return the config that `TrainConfig.to_dict` wrote.

    Fields that an older version did not write are taken from `ADDED`. Raises ValueError on a field
    that this version does not have.
    """
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(TrainConfig)})
    if unknown:
        raise ValueError(
            f"unknown config field {', '.join(unknown)}: the file comes from another version of "
            "ddpm_utils"
        )
    return TrainConfig(**(ADDED | values))


def preset_for(
    device_type: str,
    n_images: int = FULL_SET,
    capability: tuple[int, int] | None = None,
) -> dict:
    """Return the fields that suit the hardware and the number of training images.

    On a GPU, the levels are wider, the batches are larger, and there are more passes. There are
    half as many passes on an NVIDIA GPU with a compute capability below 8.0, which trains in
    float32. A set of fewer than 60,000 images gets proportionally more passes, so that the number
    of steps stays the same.
    """
    large = {"widths": (64, 128), "batch_size": 128, "ema_decay": 0.999}
    old_gpu = capability is not None and capability < (8, 0)
    epochs = 1.5 if device_type == "cpu" else 6.0 if old_gpu else 12.0
    return ({} if device_type == "cpu" else large) | {
        "epochs": min(1e5, epochs * max(1.0, FULL_SET / n_images))
    }


def for_this_run(cfg: TrainConfig) -> TrainConfig:
    """Return `cfg`, or in fast mode the same run with everything that costs time shrunk.

    The betas grow as T shrinks, so that the amount of noise stays the same. The widths of the
    gallery's networks are fixed: these networks see fewer and smaller images instead, of a size
    that all but one of them can take.
    """
    # brings torch, which a command line that only shows its help does not wait for
    from . import runtime

    if not runtime.is_fast():
        return cfg
    timesteps = min(cfg.timesteps, 50)
    # shrink the data for a network of fixed widths
    if cfg.model != "unet":
        size = cfg.image_size if cfg.model == "article" else 8
        cfg = cfg.replace(
            epochs=min(cfg.epochs, 2e-4),
            batch_size=min(cfg.batch_size, 4),
            image_size=size,
            pad=min(cfg.pad, 2),
        )
    # shrink the schedule, our network and the run
    return cfg.replace(
        timesteps=timesteps,
        beta_scale=min(cfg.beta_scale * cfg.timesteps / timesteps, 40.0),
        widths=tuple(math.lcm(2 * cfg.groups, cfg.heads) for _ in cfg.widths),
        blocks=1,
        batch_size=min(cfg.batch_size, 16),
        epochs=min(cfg.epochs, 0.5),
        warmup_steps=min(cfg.warmup_steps, 5),
    )
