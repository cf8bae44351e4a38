"""Metrics for generated images: classifier features, distances between sets of them, and what
they cannot see.
"""

import copy
import math
from dataclasses import asdict, astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import runtime
from .data import check_images
from .diffusion import eval_mode, p_mean_variance, q_posterior, q_sample
from .schedules import NoiseSchedule


class Classifier(nn.Module):
    """(B, C, H, W) in [−1, 1] → (B, classes) logits; `features` returns the 96 numbers before the
    last layer.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1):
        super().__init__()
        self.convs = nn.Sequential(
            *self.stage(channels, 32),
            nn.MaxPool2d(2),
            *self.stage(32, 64),
            nn.MaxPool2d(2),
            *self.stage(64, 64),
            nn.AdaptiveMaxPool2d(3),
            nn.Flatten(),
        )
        self.squeeze = nn.Linear(64 * 9, 96)
        self.head = nn.Linear(96, num_classes)

    @staticmethod
    def stage(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.squeeze(self.convs(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int = 10,
    epochs: int = 6,
    shift: int = 1,
    batch_size: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    device="cpu",
) -> Classifier:
    """A `Classifier` in eval mode, trained on images (N, C, H, W) uint8 and labels (N,) long in 0 …
    num_classes − 1.

    AdamW with weight decay 0.02; the rate rises over 200 steps and falls to 0; every batch is moved
    by up to `shift` pixels. All that is drawn depends on `seed` alone. Raises ValueError on images
    or labels of another kind.
    """
    check_images(images)
    if labels.shape != images.shape[:1] or not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"labels must be whole numbers in 0 … {num_classes - 1}, one an image, shape "
            f"({len(images)},): got shape {tuple(labels.shape)}, {labels.unique().tolist()[:20]}"
        )
    n, (height, width) = len(images), images.shape[-2:]
    batch_size = min(batch_size, n)
    total = epochs * (n // batch_size)
    warmup = min(200, max(1, total // 4))
    # the layers draw from the global generator, which stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed the GPUs, too
        model = runtime.place(Classifier(num_classes, images.shape[1]), device)
        rng = torch.default_generator.clone_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    for step in range(total):
        if step % (n // batch_size) == 0:
            order = torch.randperm(n, generator=rng).split(batch_size)
        picked = order[step % (n // batch_size)]
        x = F.pad(images[picked].to(device) / 127.5 - 1, [shift] * 4, value=-1.0)
        top, left = torch.randint(0, 2 * shift + 1, (2,), generator=rng).tolist()
        logits = model(x[:, :, top : top + height, left : left + width])
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 1 - step / total)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[picked].to(device)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def extract_features(classifier: Classifier, images: Tensor, batch_size: int = 100) -> Tensor:
    """Features of `images` (N, C, H, W) uint8 in float64, shape (N, 96), on the CPU.

    ValueError on images of another kind.
    """
    device = next(classifier.parameters()).device
    parts = check_images(images).split(batch_size)
    with eval_mode(classifier):
        return torch.cat(
            [classifier.features(part.to(device) / 127.5 - 1).cpu().double() for part in parts]
        )


@torch.no_grad()
def class_probabilities(classifier: Classifier, features: Tensor) -> Tensor:
    """What the classifier makes of images with these features (N, 96): (N, classes) float64 on
    the CPU, rows that sum to 1.
    """
    weight = classifier.head.weight
    if features.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)}, expected (N, {weight.shape[1]}): see "
            "extract_features"
        )
    return classifier.head(features.to(weight.device, weight.dtype)).cpu().double().softmax(dim=1)


def class_histogram(predictions: Tensor, num_classes: int) -> Tensor:
    """The share of each class among predictions (N,) long: (num_classes,) float64, summing to 1.

    A mode that is missing shows.
    """
    if predictions.dtype != torch.int64 or not (
        0 <= predictions.min() and predictions.max() < num_classes
    ):
        raise ValueError(
            f"predictions have dtype {predictions.dtype}, expected int64 in 0 … "
            f"{num_classes - 1}: the argmax of class_probabilities, one an image"
        )
    return predictions.cpu().bincount(minlength=num_classes).double() / len(predictions)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D) (1706.08500, Eq. 6).

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½), in float64. The trace of the root is the sum of the
    roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which are real. The distance falls as N grows, so
    compare at equal N only. Raises ValueError on features that do not fit or are not finite.
    """
    a, b = check_features(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Kernel distance of features (N, D) and (M, D) (KID, Bińkowski et al., 1801.01401, section 3).

    The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x·y / D + 1)³: the mean
    of k within a, plus that within b, minus twice that between them. No feature is compared with
    itself, so two sets from one distribution give 0 on average at any size, and a negative value
    about every other time. Raises ValueError on features that do not fit or are not finite.
    """
    a, b = check_features(a, b)

    def total(x, y):  # a thousand rows at a time, or the matrix of all pairs fills the memory
        return sum(((part @ y.T / y.shape[1] + 1) ** 3).sum() for part in x.split(1000))

    def within(x):
        itself = ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def neighbor_radii(features: Tensor, k: int) -> Tensor:
    """The distance of each feature (N, D) to its k-th nearest other: (N,).

    ValueError unless 1 ≤ k < N.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k={k} is outside 1 … {len(features) - 1}, the number of other features")
    parts = [
        torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1000)
    ]
    return torch.cat(parts)  # k + 1, because the nearest of all is the feature itself


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 1904.06991, Eq. 1–2) of fake (M, D)
    against real features (N, D).

    Around each feature lies a ball that reaches to its k-th nearest neighbor. Precision: the share
    of fakes inside some real ball. Recall: the share of reals inside some fake ball. Both change
    with N and M: compare at equal numbers.
    """
    real, fake = check_features(real, fake)

    def share_inside(points, others):
        radii = neighbor_radii(others, k)
        inside = [(torch.cdist(part, others) <= radii).any(dim=1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """The share of real features whose ball, reaching to the k-th nearest real neighbor, holds a
    fake (Naeem, 2002.09797).

    Unlike recall it builds no ball around a fake, so a few odd samples cannot cover much.
    """
    real, fake = check_features(real, fake)
    nearest = torch.cat([torch.cdist(part, fake).amin(dim=1) for part in real.split(1000)])
    return (nearest <= neighbor_radii(real, k)).double().mean().item()


def check_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64; ValueError unless they are (N, D) and (M, D) finite floats, N and M at least
    2.
    """
    for x in (a, b):
        if x.ndim != 2 or not x.is_floating_point() or len(x) < 2:
            raise ValueError(
                f"features have shape {tuple(x.shape)} and dtype {x.dtype}, expected floats (N, "
                "D) of at least 2 images, so that they have a covariance: see extract_features"
            )
        if not x.isfinite().all():
            raise ValueError(
                "features hold NaN or infinite values: look at the images and at the classifier"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features are {a.shape[1]} and {b.shape[1]} wide: take both from the same classifier"
        )
    return a.cpu().double(), b.cpu().double()


@dataclass(frozen=True)
class Scores:
    """What is measured on one set of features."""

    frechet: float
    kernel: float
    precision: float
    recall: float
    coverage: float


@dataclass(frozen=True)
class Report:
    """The scores of n samples beside the floor: those of n held-out real images.

    `floor` is the mean over `draws` sets of n that share no image, and `floor_spread` the standard
    deviation of their scores, NaN for one draw. `classes` and `real_classes` are the share of each
    class among the samples and among all held-out images, as the classifier sees them.
    """

    n: int
    reference_n: int
    draws: int
    samples: Scores
    floor: Scores
    floor_spread: Scores
    classes: tuple[float, ...]
    real_classes: tuple[float, ...]
    note: str = "features of our own classifier, not Inception: compare within this project only"

    @property
    def ratio(self) -> float:
        """Fréchet distance over its floor: 1 is what real images reach."""
        return self.samples.frechet / self.floor.frechet

    def to_dict(self) -> dict:
        """Plain values only, fit for JSON."""
        values = {**asdict(self), "ratio": self.ratio}
        if self.draws == 1:
            values["floor_spread"] = None
        return values

    def __str__(self) -> str:
        def line(name, mine, real, spread=""):
            return f"{name:18}{mine:>12}{real:>12}{spread}"

        def scored(name, field, digits):
            mine, real, spread = (
                f"{getattr(scores, field):.{digits}f}"
                for scores in (self.samples, self.floor, self.floor_spread)
            )
            return line(name, mine, real, f" ± {spread}" if self.draws > 1 else "")

        draws = f", mean ± deviation of {self.draws} draws" if self.draws > 1 else ""
        return "\n".join(
            [
                f"n = {self.n:,} samples against {self.reference_n:,} real images; floor: "
                f"{self.n:,} held-out images{draws}",
                f"({self.note})",
                line("", "samples", "floor"),
                scored("Fréchet distance", "frechet", 2) + f"   ratio {self.ratio:.2f}",
                scored("kernel distance", "kernel", 2),
                scored("precision", "precision", 3),
                scored("recall", "recall", 3),
                scored("coverage", "coverage", 3),
                line("rarest class", f"{min(self.classes):.1%}", f"{min(self.real_classes):.1%}"),
                line("largest class", f"{max(self.classes):.1%}", f"{max(self.real_classes):.1%}"),
            ]
        )


KERNEL_REFERENCE = 10_000  # reference features that a kernel distance is taken to, at most


def score(features: Tensor, reference: Tensor, generator: torch.Generator | None = None) -> Scores:
    """Every score of features (n, D) against `reference` (N, D), N ≥ n.

    The Fréchet distance is taken to the whole reference, and the kernel distance to a random 10,000
    of it at most, whose pairs can be counted in a second. Precision, recall and coverage, which
    change with the size of the reference, are taken to a random n of it.
    """
    order = torch.randperm(len(reference), generator=generator)
    same, many = reference[order[: len(features)]], reference[order[:KERNEL_REFERENCE]]
    return Scores(
        frechet_distance(features, reference),
        kernel_distance(features, many),
        *precision_recall(same, features),
        coverage(same, features),
    )


def compare(
    classifier: Classifier, samples: Tensor, reference: Tensor, held_out: Tensor, seed: int = 0
) -> Report:
    """Compare samples (n, C, H, W) uint8, and held-out real images, with the same real features.

    reference (N, D), held_out (M, D): features of the training and of the test set. The floor is
    the mean over as many draws of n held-out images as share none, at most ten. Raises ValueError
    if N or M is below n: a floor at another n would be no floor.
    """
    check_features(reference, held_out)
    n, most = len(samples), min(len(reference), len(held_out))
    if not 20 <= n <= most:
        raise ValueError(
            f"{n} samples cannot be held against {len(reference)} reference and {len(held_out)} "
            f"held-out images at equal n: give 20 … {most} samples"
        )
    rng = torch.Generator().manual_seed(seed)
    features = extract_features(classifier, samples)
    shuffled = held_out[torch.randperm(len(held_out), generator=rng)]
    draws = [part for part in shuffled.split(n)[:10] if len(part) == n]
    # the scores of the samples, and of each draw of real images
    mine = score(features, reference, rng)
    floors = [astuple(score(part, reference, rng)) for part in draws]
    floors = torch.tensor(floors, dtype=torch.float64)
    spread = floors.std(dim=0) if len(draws) > 1 else torch.full_like(floors[0], math.nan)
    # the classes that the classifier sees
    shares = []
    for some in (features, held_out):
        predictions = class_probabilities(classifier, some).argmax(dim=1)
        histogram = class_histogram(predictions, classifier.head.out_features)
        shares.append(tuple(histogram.tolist()))
    return Report(
        n,
        len(reference),
        len(draws),
        mine,
        Scores(*floors.mean(dim=0).tolist()),
        Scores(*spread.tolist()),
        *shares,
    )


def nearest_neighbors(
    queries: Tensor, points: Tensor, k: int = 1, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """The k points nearest to each query by Euclidean distance: distances (N, k) float64,
    ascending, and indices (N, k).

    queries (N, …), points (M, …): images of any dtype (uint8 gives distances in gray levels) or
    features. They are found in float32 by |q|² + |p|² − 2q·p, `chunk` points at a time, and their
    distances then taken exactly: a copy has distance 0.
    """
    if queries.shape[1:] != points.shape[1:] or not 1 <= k <= len(points):
        raise ValueError(
            f"queries are {tuple(queries.shape[1:])} each, points {tuple(points.shape[1:])} each, "
            f"and k={k}: expected equal shapes and k in 1 … {len(points)}, the number of points"
        )
    points, found = points.flatten(1), []
    for part in queries.flatten(1).split(256):
        near, index = (
            part.new_empty((len(part), 0), dtype=torch.float32),
            part.new_empty((len(part), 0), dtype=torch.long),
        )
        for start in range(0, len(points), chunk):
            distances = torch.cdist(part.float(), points[start : start + chunk].float())
            numbers = torch.arange(start, start + distances.shape[1], device=part.device).expand_as(
                distances
            )
            near, order = torch.cat([near, distances], dim=1).topk(
                min(k, start + chunk, len(points)), largest=False
            )
            index = torch.cat([index, numbers], dim=1).gather(1, order)
        # Apple's GPUs know no float64
        difference = points[index].cpu().double() - part.cpu().double()[:, None]
        exact, order = difference.norm(dim=2).sort(dim=1, stable=True)
        found.append((exact, index.cpu().gather(1, order)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@dataclass(frozen=True)
class Memorization:
    """Distances of samples (n, 2) and of held-out real images (m, 2) to their two nearest training
    images.

    `indices` (n, 2) says which training images are nearest to each sample.
    """

    samples: Tensor
    held_out: Tensor
    indices: Tensor

    def nearer(self, quantile: float = 0.01) -> float:
        """The share of samples nearer to the training set than the nearest `quantile` of held-out
        images: about that, if new.
        """
        return (self.samples[:, 0] < self.held_out[:, 0].quantile(quantile)).double().mean().item()

    def copies(self, ratio: float = 1 / 3) -> tuple[float, float]:
        """The share of samples, and of held-out images, with the nearest training image below
        `ratio` times as far as the second.

        The criterion of Gu et al. (2310.02664). It is blind where the training set holds an image
        twice.
        """
        return tuple(
            (d[:, 0] < ratio * d[:, 1]).double().mean().item()
            for d in (self.samples, self.held_out)
        )


def memorization(samples: Tensor, train_images: Tensor, held_out: Tensor) -> Memorization:
    """How near samples come to the training set, and how near held-out real images of the same kind
    come.

    All three are images (N, C, H, W) uint8, for pixel distance, or features (N, D). Only the
    held-out images tell what is near: blurred samples are nearer to everything. With Meehan et al.
    (2004.05675): copying is to be nearer than they are.
    """
    distances, indices = nearest_neighbors(samples, train_images, k=2)
    return Memorization(distances, nearest_neighbors(held_out, train_images, k=2)[0], indices)


def gaussian_kl(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """KL(N(mean_a, var_a) ‖ N(mean_b, var_b)) of each value, in nats: ½(ln(v_b / v_a) + (v_a + (m_a
    − m_b)²) / v_b − 1).
    """
    return 0.5 * (var_b.log() - var_a.log() + (var_a + (mean_a - mean_b) ** 2) / var_b - 1)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """ln of the mass that N(mean, var) gives to the bin of each x0, in nats (DDPM Eq. 13).

    x0 takes the 256 values −1 … 1; a bin reaches 1/255 to either side, the outermost to infinity,
    so the masses sum to 1.
    """
    low, high = (((x0 + edge - mean) / var.sqrt()) for edge in (-1 / 255, 1 / 255))
    low, high = low.masked_fill(x0 < -0.999, -math.inf), high.masked_fill(x0 > 0.999, math.inf)
    # there both tails are near 1 and their difference is lost: take it on the other side
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-(log_low - log_high).exp())


def in_float64(schedule: NoiseSchedule) -> NoiseSchedule:
    """The same betas in float64 on the CPU: the terms near t = 0 are made of 1 − ᾱ, of which
    float32 keeps few digits.
    """
    exact = copy.copy(schedule)
    exact.betas = schedule.betas.cpu().double()
    exact.alphas = 1 - exact.betas
    exact.alpha_bars = exact.alphas.cumprod(dim=0)
    return exact


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T, what x_T still tells of x0: KL(q(x_T | x0) ‖ N(0, I)) in bits per dimension, (B,) (DDPM
    Eq. 5). No network in it.
    """
    alpha_bar = in_float64(schedule).alpha_bars[-1]
    nats = gaussian_kl(
        alpha_bar.sqrt() * x0.double(), 1 - alpha_bar, torch.zeros(()), torch.ones(())
    )
    return nats.flatten(1).mean(dim=1) / math.log(2)


@torch.no_grad()
def bound_term(
    denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    variance: str = "beta_tilde",
) -> Tensor:
    """L_t of each x0 at x_t ~ q(x_t | x0), in bits per dimension, (B,) (DDPM Eq. 5; the paper's
    L_{t−1} with our t + 1 = its t).

    For t > 0 the KL between the true step back, q(x_{t−1} | x_t, x0), and the one with x0_hat for
    x0; at t = 0 the negative log-likelihood of x0 under Eq. 13, with beta_tilde of t = 1 for the
    variance, which is 0 there, as in the paper's code. x0 (B, …) in [−1, 1], t (B,), eps (B, …): on
    the CPU, where all but the denoiser is worked out, in float64.
    """
    device, schedule = schedule.betas.device, in_float64(schedule)
    x_t = q_sample(schedule, x0.double(), t, eps.double())
    x0_hat = denoise(x_t.float().to(device), t.to(device), None).cpu().double()
    mean, var = q_posterior(schedule, x0.double(), x_t, t)
    mean_hat, var_hat = p_mean_variance(schedule, x0_hat, x_t, t, variance)
    nats, first = gaussian_kl(mean, var, mean_hat, var_hat), t == 0
    if first.any():
        decoder = q_posterior(schedule, x0[:1], x_t[:1], t.new_tensor([1]))[1]
        nats[first] = -discretized_log_likelihood(x0[first].double(), mean_hat[first], decoder)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def weighted_timesteps(
    n: int, timesteps: int, calls: int | None, generator=None
) -> tuple[Tensor, Tensor]:
    """Which terms to work out for each of n images, and weights that make the weighted sum right on
    average: both (n, calls).

    All T with weight 1 if `calls` is None. Else t is drawn with probability ∝ 1 / (t + 1), about as
    the terms fall, one t from each of `calls` equal parts of that probability, and weighs 1 /
    (calls · probability) (importance sampling, 2102.09672, 3.3).
    """
    if calls is None:
        return torch.arange(timesteps).expand(n, timesteps), torch.ones(
            n, timesteps, dtype=torch.float64
        )
    if not 1 <= calls <= timesteps:
        raise ValueError(
            f"calls={calls} is outside 1 … {timesteps}, the terms there are: None takes all of them"
        )
    share = 1 / torch.arange(1, timesteps + 1, dtype=torch.float64)
    share /= share.sum()
    u = (
        torch.arange(calls) + torch.rand(n, calls, generator=generator, dtype=torch.float64)
    ) / calls
    t = torch.searchsorted(share.cumsum(dim=0), u).clamp(max=timesteps - 1)
    return t, 1 / (calls * share[t])


@dataclass(frozen=True)
class Bound:
    """The variational bound in bits per dimension: `total` ± `error`, the standard error over the n
    images.

    `prior` is L_T, and `terms` (T,) holds the mean of each L_t over the images that met it, NaN if
    none did.
    """

    n: int
    total: float
    error: float
    prior: float
    terms: Tensor


def bits_per_dimension(
    denoise,
    schedule: NoiseSchedule,
    images: Tensor,
    variance: str = "beta_tilde",
    calls: int | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Bound:
    """Upper bound on the code length of images (N, C, H, W) uint8 under the model: L_T + Σ L_t
    (DDPM Eq. 5, section 3.3).

    Bits per value, of which a raw image has 8. `calls`: calls of `denoise` an image, None for all T
    terms; fewer give the same total on average (see `weighted_timesteps`). A network is in eval
    mode meanwhile; `generator` is one of the CPU.
    """
    times, weights = weighted_timesteps(len(check_images(images)), len(schedule), calls, generator)
    terms, priors = torch.empty_like(weights), []
    with eval_mode(denoise):
        for rows in torch.arange(len(images)).split(batch_size):
            x0 = images[rows].cpu().double() / 127.5 - 1
            priors.append(prior_term(schedule, x0))
            for column in range(times.shape[1]):
                eps = torch.randn(x0.shape, generator=generator)
                terms[rows, column] = bound_term(
                    denoise, schedule, x0, times[rows, column], eps, variance
                )
    totals = torch.cat(priors) + (weights * terms).sum(dim=1)
    seen = times.flatten().bincount(minlength=len(schedule))
    mean_terms = (
        torch.zeros(len(schedule), dtype=torch.float64).index_add(
            0, times.flatten(), terms.flatten()
        )
        / seen
    )
    error = (totals.std() / len(totals) ** 0.5).item() if len(totals) > 1 else math.nan
    return Bound(
        len(images), totals.mean().item(), error, torch.cat(priors).mean().item(), mean_terms
    )
