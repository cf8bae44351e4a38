"""The training step, the EMA of the weights, the plain training loop and the evaluation losses."""

import copy
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import distributed, runtime
from .config import TrainConfig
from .data import to_model_range
from .diffusion import diffusion_loss, eval_mode, q_sample, training_target
from .optimizer import make_optimizer
from .schedules import NoiseSchedule, make_schedule

# steps between two reads of the losses on a GPU, since each read waits for the GPU
READ_EVERY = 50


def sample_timesteps(
    n: int,
    timesteps: int,
    generator: torch.Generator | None = None,
    device="cpu",
    middle: bool = False,
) -> Tensor:
    """Draw n timesteps, one from each n-th part of 0 … T−1 (a variant of VDM, 2107.00630, I.1).

    Each is uniform in its part. Spreading a batch evenly keeps the expected loss of Algorithm 1 and
    removes most of the variance of its value. With `middle`, s = t/T has the density 6·s·(1 − s),
    which weights the loss (2403.03206, 3.1, weights the middle as well).
    """
    # draw one value from each n-th part of 0 … 1
    u = torch.rand(n, generator=generator, device=device)
    part = torch.randperm(n, generator=generator, device=device)
    s = (part + u) / n
    if middle:
        # invert 3s² − 2s³, the distribution function of the density 6s(1 − s)
        s = 0.5 - (torch.asin(1 - 2 * s) / 3).sin()
    return (s * timesteps).long().clamp(max=timesteps - 1)


def drop_labels(
    y: Tensor, share: float, none: int, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each label of y (B,) by `none` with probability `share` (2207.12598, Algorithm 1).

    The labels are dropped independently of each other.
    """
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < share
    return y.masked_fill(dropped, none)


def train_step(
    model,
    optimizer,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    target: str = "eps",
    grad_clip: float = 1.0,
    y: Tensor | None = None,
) -> Tensor:
    """Run DDPM Algorithm 1, lines 2–5, once and return the loss.

    The step computes the loss and the gradient, clips the gradient to norm `grad_clip`, and updates
    the weights.
    """
    # compute the loss, in lower precision where that is faster
    with runtime.autocast(x0.device):
        loss = diffusion_loss(model, schedule, x0, t, eps, target, y)
    # update the weights with the clipped gradient
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach()


class EMA:
    """An exponential moving average of the weights over the steps.

    θ_ema ← d·θ_ema + (1 − d)·θ with d = min(decay, (1 + n) / (10 + n)) at update n. The rise of d
    gives the random start little weight in a short run. `model` is the averaged network, always in
    eval mode.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - d)
        self.updates += 1


def learning_rate(step: int, total: int, cfg: TrainConfig) -> float:
    """Return the learning rate at `step` = 0 … total−1.

    The rate rises linearly over `warmup_steps`, but over at most a quarter of the run. It then
    stays at `lr`, and after the share `decay_from` of the run it falls linearly to `lr_floor · lr`.
    """
    rise = (step + 1) / max(1, min(cfg.warmup_steps, total // 4))
    start = cfg.decay_from * total
    fall = 1 - (1 - cfg.lr_floor) * max(0.0, step - start) / max(1.0, total - start)
    return cfg.lr * min(1.0, rise, fall)


def step_generator(seed: int, step: int, device="cpu") -> torch.Generator:
    """Return a generator that depends on the seed and the step only.

    A resumed run therefore draws what the whole run would have drawn.
    """
    return torch.Generator(device=device).manual_seed((seed * 1_000_003 + step) % 2**63)


def batch_indices(n_images: int, step: int, cfg: TrainConfig, device="cpu") -> Tensor:
    """Return the indices of the images in the batch of step number `step`.

    Each pass over the data is a new permutation. A batch may continue from one pass into the next.
    """
    number, offset = divmod(step * cfg.batch_size, n_images)
    order = permutation(n_images, cfg.seed, number, device)
    while len(order) < offset + cfg.batch_size:
        number += 1
        order = torch.cat([order, permutation(n_images, cfg.seed, number, device)])
    return order[offset : offset + cfg.batch_size]


@functools.lru_cache(maxsize=4)
def permutation(n_images: int, seed: int, number: int, device="cpu") -> Tensor:
    """Return the order of the images in pass `number`, the same on every device.

    Treat it as read-only, because the latest four are cached.
    """
    return torch.randperm(n_images, generator=step_generator(seed + 1_000_000_007, number)).to(
        device
    )


class TrainState:
    """The state of a run: config, network, EMA, optimizer, schedule and number of steps done."""

    def __init__(self, cfg: TrainConfig, model: nn.Module, device="cpu"):
        self.cfg, self.device = cfg, torch.device(device)
        self.model = runtime.place(model, self.device)
        self.ema = EMA(self.model, cfg.ema_decay)
        self.optimizer = make_optimizer(self.model, cfg)
        self.schedule = make_schedule(**cfg.noise()).to(self.device)
        self.step = 0
        self.best = math.inf  # the lowest held-out loss so far
        # the training data as `runs.describe_data` describes them, None before training
        self.data = None
        self.stopped = False  # True after the reader pressed stop; set it to end `runs.train`
        # steps between two reads of the losses
        self.read_every = 1 if self.device.type == "cpu" else READ_EVERY
        self.unsaved = None  # the NotSaved of the latest save point, if it failed


def draw_batch(
    state: TrainState, images, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return x0, t, eps and y of step number `state.step`, on the device of `state`.

    They depend on the step number and the seed only. `images` is (N, C, H, W) uint8 or
    `folders.FolderImages`. Each of several processes gets its share of the batch.
    """
    cfg, mine = state.cfg, distributed.share(state.cfg.batch_size)
    n = cfg.batch_size
    timesteps = len(state.schedule)
    rng = step_generator(cfg.seed, state.step, state.device)
    # which images; the indices of a streamed batch stay on the CPU
    where = state.device if isinstance(images, Tensor) else "cpu"
    picked = batch_indices(len(images), state.step, cfg, where)
    x0 = to_model_range(images[picked[mine]].to(state.device), cfg.data_range)
    # which noise levels
    if cfg.timestep_draw == "uniform":
        t = torch.randint(timesteps, (n,), generator=rng, device=state.device)
    else:
        t = sample_timesteps(n, timesteps, rng, state.device, cfg.timestep_draw == "middle")
    # which noise, and which labels
    eps = torch.randn(n, *images.shape[1:], generator=rng, device=state.device)
    if labels is None:
        return x0, t[mine], eps[mine], None
    y = drop_labels(labels[picked].to(state.device), cfg.label_drop, cfg.num_classes, rng)
    return x0, t[mine], eps[mine], y[mine]


def training_steps(
    state: TrainState,
    images,
    labels: Tensor | None = None,
    model: nn.Module | None = None,
) -> Iterator[Tensor]:
    """Run DDPM Algorithm 1 to the end of the config and yield the loss of each step.

    The loop starts at `state.step`. The loss stays on the device. `images` and `labels` are those
    of `draw_batch`. `model` is used in place of `state.model`, whose weights it shares, for example
    compiled or replicated. This is the plain loop; `runs.train` adds everything else that a run
    needs.
    """
    cfg, model = state.cfg, model or state.model
    total = cfg.steps(len(images))
    while state.step < total:
        # draw images, times and noise
        x0, t, eps, y = draw_batch(state, images, labels)
        # take a step
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, total, cfg)
        loss = train_step(
            model, state.optimizer, state.schedule, x0, t, eps, cfg.target, cfg.grad_clip, y
        )
        # average the weights
        state.ema.update(state.model)
        state.step += 1
        yield loss


@torch.no_grad()
def held_out_loss(
    model,
    schedule: NoiseSchedule,
    images: Tensor,
    target: str,
    batch_size: int = 256,
    seed: int = 0,
    data_range: str = "symmetric",
) -> float:
    """Return the mean loss on `images` (uint8).

    `seed` fixes the timesteps and the noise, so that two networks get the same inputs.
    """
    per_t = loss_per_timestep(model, schedule, images, target, None, batch_size, seed, data_range)
    return per_t.mean().item()


@torch.no_grad()
def loss_per_timestep(
    model,
    schedule: NoiseSchedule,
    images: Tensor,
    target: str,
    timesteps: Tensor | None,
    batch_size: int = 256,
    seed: int = 0,
    data_range: str = "symmetric",
) -> Tensor:
    """Return the squared error per pixel of each image at its own timestep, shape (N,).

    `timesteps` has shape (N,). None spreads the timesteps evenly.
    """
    device = schedule.betas.device
    # fix the noise and the timesteps
    rng = torch.Generator(device=device).manual_seed(seed)
    if timesteps is None:
        timesteps = torch.linspace(0, len(schedule) - 1, len(images)).long()
    losses = []
    with eval_mode(model):
        for x_u8, t in zip(images.split(batch_size), timesteps.split(batch_size), strict=True):
            # add noise to a batch and predict the target
            x0, t = to_model_range(x_u8, data_range).to(device), t.to(device)
            eps = torch.randn(x0.shape, generator=rng, device=device)
            prediction = model(q_sample(schedule, x0, t, eps), t, None)
            # measure the error of each image
            losses.append(
                (prediction - training_target(schedule, x0, t, eps, target))
                .square()
                .flatten(1)
                .mean(1)
            )
    return torch.cat(losses)
