"""The contestants: each a network with the way it is trained, one step at a time, on a clock of its
own.
"""

import json
import math
import os
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_utils import data, gallery, pretrained, runtime, sampling, training
from ddpm_utils.config import PAPER, UNNAMED, TrainConfig, for_this_run, preset_for
from ddpm_utils.diffusion import Denoiser, q_sample, training_target
from ddpm_utils.schedules import make_schedule

from .measure import package_precision, synchronize
from .sketch import Sketch as SketchNetwork

WARM_UP_STEPS = 10  # on a GPU or when compiled, before the clock starts


class Training:
    """One contestant in training.

    `seconds` is its clock: it runs in `turn` alone, and there through every part of a step.
    """

    target, batch_size, clip = "eps", 128, None
    constant = False  # True: the rate never falls, so one run serves all marks
    memory_format = torch.contiguous_format
    settings = ""  # the recipe in words

    def __init__(self, images: Tensor, seed: int, device: torch.device, compiled: bool = False):
        self.images, self.device = images, device
        self.steps, self.seconds, self.warm_up_seconds = 0, 0.0, 0.0
        self.rng = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the same weights on every device
            torch.manual_seed(seed)
            self.model = self.build().to(device, memory_format=self.memory_format)
        self.average: nn.Module | None = None
        self.order = torch.empty(0, dtype=torch.long, device=device)
        self.set_up(seed, compiled)

    @classmethod
    def describe(cls, device: torch.device, compiled: bool) -> str:
        """The recipe in words; two results belong together if it is the same."""
        return cls.settings

    def set_up(self, seed: int, compiled: bool) -> None:
        """What the subclass needs beside `model`: here the paper's linear schedule and Adam at a
        constant rate.
        """
        steps = runtime.shrink(1000, 50)
        self.schedule = make_schedule("linear", steps, 1000 / steps).to(self.device)
        self.optimizer = self.make_optimizer()

    def draw(self) -> Tensor:
        """Which images the next step sees: each pass is a new permutation."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.images), generator=self.rng, device=self.device)
        picked, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return picked

    def rate(self, progress: float) -> float:
        """The learning rate after `progress` = 0 … 1 of the run's time."""
        raise NotImplementedError

    def step(self, progress: float) -> None:
        """One step as the contestant takes it, from gathering the images to
        averaging the weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(progress)
        x0 = data.to_model_range(self.images[self.draw()])
        t = torch.randint(len(self.schedule), (len(x0),), generator=self.rng, device=self.device)
        eps = torch.randn(x0.shape, generator=self.rng, device=self.device)
        with self.autocast():
            prediction = self.model(q_sample(self.schedule, x0, t, eps), t)
            loss = F.mse_loss(prediction, training_target(self.schedule, x0, t, eps, self.target))
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.steps += 1

    @classmethod
    def precision(cls, device: torch.device) -> torch.dtype:
        """What it multiplies in: half as many bits where a GPU has them, and on a CPU float32,
        whatever the package does.
        """
        return package_precision(device) if device.type == "cuda" else torch.float32

    def autocast(self):
        enabled = self.precision(self.device) != torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def warm_up(self) -> None:
        """Steps that leave no trace but compiled code: `warm_up_seconds` are told apart from
        `seconds`.
        """
        before, began = self.state(), time.perf_counter()
        for _ in range(runtime.shrink(WARM_UP_STEPS, 2)):
            self.step(0.0)
        synchronize(self.device)
        self.warm_up_seconds = time.perf_counter() - began
        self.load(before)

    def turn(self, budget: float, until: float) -> None:
        """Train until the clock shows `until`; `budget` is where the run, and its learning rate,
        ends.
        """
        self.model.train()
        synchronize(self.device)
        before, began = self.seconds, time.perf_counter()
        while self.seconds < until:
            self.step(self.seconds / budget)
            self.seconds = before + time.perf_counter() - began
        synchronize(self.device)
        self.seconds = before + time.perf_counter() - began

    def network(self) -> nn.Module:
        """The network to sample from: the averaged one where there is one."""
        return self.model if self.average is None else self.average

    def denoiser(self) -> Denoiser:
        """What the common samplers call."""
        return Denoiser(self.network(), self.schedule, self.target)

    def own_sample(self, shape, rng: torch.Generator):
        """The states of the contestant's own sampler, or None if it brings none."""
        return None

    def is_finite(self) -> bool:
        return all(weight.isfinite().all().item() for weight in self.network().parameters())

    def state(self) -> dict:
        """All that `load` needs to go on exactly from here, in copies that later steps do not
        touch.
        """
        pieces = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order,
        }
        pieces["average"] = None if self.average is None else self.average.state_dict()
        numbers = {"steps": self.steps, "seconds": self.seconds, "rng": self.rng.get_state()}
        return _copied(pieces) | numbers | {"warm_up_seconds": self.warm_up_seconds}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order = state["order"].to(self.device)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.warm_up_seconds = max(self.warm_up_seconds, state["warm_up_seconds"])
        self.rng.set_state(state["rng"])


def _copied(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


class Ours(Training):
    """The package's default: its config, network, optimizer, average, learning rate and training
    step.
    """

    memory_format = torch.channels_last
    changes = {}

    def __init__(self, images: Tensor, seed: int, device: torch.device, compiled: bool = False):
        self.cfg = self.config(device).replace(seed=seed)
        super().__init__(images, seed, device, compiled)

    @classmethod
    def config(cls, device: torch.device) -> TrainConfig:
        return for_this_run(
            TrainConfig(
                **(preset_for(device.type, capability=runtime.capability(device)) | cls.changes)
            )
        )

    @classmethod
    def describe(cls, device: torch.device, compiled: bool) -> str:
        # the clock says when the run ends
        fields = cls.config(device).replace(epochs=1.0).to_dict()
        # as older results say it
        fields = {key: value for key, value in fields.items() if UNNAMED.get(key) != value}
        return f"{json.dumps(fields)} in {cls.precision(device)}" + " compiled" * compiled

    @classmethod
    def precision(cls, device: torch.device) -> torch.dtype:
        return package_precision(device)

    def build(self) -> nn.Module:
        return pretrained.build(self.cfg)

    def set_up(self, seed: int, compiled: bool) -> None:
        self.run = training.TrainState(self.cfg, self.model, self.device)
        self.model = self.run.model
        self.average = self.run.ema.model
        self.optimizer = self.run.optimizer
        self.schedule = self.run.schedule
        self.target = self.cfg.target
        self.batch_size = self.cfg.batch_size
        # On a GPU this mode records CUDA graphs; the weights belong to `model` all the same.
        self.forward = torch.compile(self.model, mode="reduce-overhead") if compiled else self.model

    def step(self, progress: float) -> None:
        # The package counts in steps: were the run to end after `total` of them, it would now be as
        # far as the clock says.
        total = round(self.steps / progress) if progress > 0.02 else 10**9
        lr = training.learning_rate(self.steps, total, self.cfg)
        self.run.step = self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x0, t, eps, _ = training.draw_batch(self.run, self.images)
        training.train_step(
            self.forward, self.optimizer, self.schedule, x0, t, eps, self.target, self.cfg.grad_clip
        )
        self.run.ema.update(self.model)
        self.steps += 1

    def load(self, state: dict) -> None:
        super().load(state)
        self.run.ema.updates = self.steps


class Paper(Ours):
    """Ours in the setting of DDPM itself."""

    changes = PAPER


def without(**changes) -> type[Ours]:
    """Ours with one choice taken back, for the table of what each choice buys."""
    return type("Without", (Ours,), {"changes": changes})


class Float32(Ours):
    """Ours without bfloat16."""

    @classmethod
    def precision(cls, device: torch.device) -> torch.dtype:
        return torch.float32

    def step(self, progress: float) -> None:
        with mock.patch.dict(os.environ, {"DDPM_FLOAT32": "1"}):
            super().step(progress)


class Article(Training):
    """The article's recipe: its network, Adam 1e-3, batch 128, uniform t, no average, no clipping;
    its own sampler beside.
    """

    constant = True
    settings = (
        "article network, Adam 1e-3 constant, batch 128, linear T=1000, eps, uniform t, no "
        "EMA, no clipping"
    )

    def build(self) -> nn.Module:
        return gallery.build("article", timesteps=runtime.shrink(1000, 50))

    def make_optimizer(self):
        return torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def rate(self, progress: float) -> float:
        return 1e-3

    @classmethod
    def precision(cls, device: torch.device) -> torch.dtype:
        return torch.float32  # as published

    def own_sample(self, shape, rng: torch.Generator):
        denoise = Denoiser(self.model, self.schedule, "eps", clamp=False)
        return sampling.ddpm_sample(denoise, self.schedule, shape, "beta", rng)


class Diffusers(Training):
    """What a user of diffusers would take: `UNet2DModel`, trained as the library's tutorial does,
    at a rate fit for minutes.

    The tutorial: AdamW, batch 16, gradients clipped to 1, a cosine rate after a warm-up, no
    average. Its rate of 1e-4 and 500 steps of warm-up are meant for hours; here they are 1e-3 and a
    twentieth of the time.
    """

    batch_size, clip = 16, 1.0
    settings = (
        "UNet2DModel 32/64/128, AdamW 1e-3, 5 % warm-up, cosine to 0, batch 16, clip 1, "
        "linear T=1000, eps, no EMA"
    )

    def build(self) -> nn.Module:
        return DiffusersNetwork()

    def make_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def rate(self, progress: float) -> float:
        return 1e-3 * min(
            max(progress, 1e-3) / 0.05,
            0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress - 0.05) / 0.95)),
        )


class DiffusersNetwork(nn.Module):
    """`UNet2DModel` behind the contract model(x_t, t, y=None)."""

    def __init__(self):
        super().__init__()
        # a test dependency, needed by those alone who ask for this contestant
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x, t).sample


class Sketch(Training):
    """The mark to beat, frozen.

    What its description leaves open is set in its favor: fused AdamW, a fused average.
    """

    target, batch_size, memory_format = "v", 64, torch.channels_last
    settings = (
        "sketch network, AdamW 2e-3 without decay, 100 steps warm-up, linear to 2 % over the "
        "second half, batch 64, "
        "cosine T=1000, v, uniform t, EMA min(0.99, (1+n)/(10+n)), channels_last, no clipping"
    )

    def build(self) -> nn.Module:
        return SketchNetwork()

    def make_optimizer(self):
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.0, fused=fused)

    def set_up(self, seed: int, compiled: bool) -> None:
        super().set_up(seed, compiled)
        self.schedule = make_schedule("cosine", runtime.shrink(1000, 50)).to(self.device)
        self.average = (
            self.build()
            .to(self.device, memory_format=self.memory_format)
            .eval()
            .requires_grad_(False)
        )
        self.average.load_state_dict(self.model.state_dict())

    def rate(self, progress: float) -> float:
        return 2e-3 * min(1.0, (self.steps + 1) / 100, 1 - 0.98 * max(0.0, progress - 0.5) / 0.5)

    def step(self, progress: float) -> None:
        decay = min(0.99, (1 + self.steps) / (10 + self.steps))
        super().step(progress)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )


CHOICES = {
    "adamw": without(optimizer="adamw", lr=2e-3, decay_from=0.3),  # the rate that suits it
    "float32": Float32,
    "fold1": without(fold=1),
    "narrow": without(widths=(32, 64)),
    "groups8": without(groups=8),
    "no-attention": without(attention_levels=()),
    "eps": without(target="eps"),
    "linear": without(schedule="linear"),
    "stratified-t": without(timestep_draw="stratified"),
    "uniform-t": without(timestep_draw="uniform"),
    "no-average": without(ema_decay=0.0),
    "constant-rate": without(decay_from=1.0),
    "batch128": without(batch_size=128),
}
CONTESTANTS = {
    "ours": Ours,
    "paper": Paper,
    "sketch": Sketch,
    "article": Article,
    "diffusers": Diffusers,
} | CHOICES
