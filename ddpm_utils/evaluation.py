"""Metrics for generated images: feature distances, memorization and the variational bound.

The distances compare sets of classifier features. They cannot detect copies of training images,
which other functions here measure.
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
    """(B, C, H, W) in [−1, 1] → (B, classes) logits.

    `features` returns the 96 numbers before the last layer.
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
    """Train a `Classifier` and return it in eval mode.

    `images` is (N, C, H, W) uint8 and `labels` is (N,) long in 0 … num_classes − 1. Training uses
    AdamW with weight decay 0.02. The learning rate rises over at most 200 steps and falls to 0.
    Every batch is shifted by up to `shift` pixels. All random numbers depend on `seed` only. Raises
    ValueError on other images or labels.
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
    # the layers draw from the global generator; its state is restored afterwards
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
    """Return the features of `images` (N, C, H, W) uint8: (N, 96) float64 on the CPU.

    Raises ValueError on images of another kind.
    """
    device = next(classifier.parameters()).device
    parts = check_images(images).split(batch_size)
    with eval_mode(classifier):
        return torch.cat(
            [classifier.features(part.to(device) / 127.5 - 1).cpu().double() for part in parts]
        )


@torch.no_grad()
def class_probabilities(classifier: Classifier, features: Tensor) -> Tensor:
    """Return the class probabilities of images with these features (N, 96).

    The result is (N, classes) float64 on the CPU, with rows that sum to 1. Raises ValueError on
    features of another shape.
    """
    weight = classifier.head.weight
    if features.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)}, expected (N, {weight.shape[1]}): see "
            "extract_features"
        )
    return classifier.head(features.to(weight.device, weight.dtype)).cpu().double().softmax(dim=1)


def class_histogram(predictions: Tensor, num_classes: int) -> Tensor:
    """Return the share of each class among predictions (N,) long.

    The result is (num_classes,) float64 and sums to 1. It shows whether a mode is missing. Raises
    ValueError on predictions of another kind.
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
    """Return the Fréchet distance between Gaussians fitted to two sets of features.

    The features are (N, D) and (M, D). The distance is |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½)
    (1706.08500, Eq. 6), in float64. The trace of the root is the sum of the roots of the
    eigenvalues of Σ_a^½ Σ_b Σ_a^½, which are real. The distance falls as N grows, so compare at
    equal N only. Raises ValueError on features that do not fit or are not finite.
    """
    a, b = check_features(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the kernel distance of features (KID, Bińkowski et al., 1801.01401, section 3).

    The features are (N, D) and (M, D). The distance is the unbiased squared maximum mean
    discrepancy with the kernel k(x, y) = (x·y / D + 1)³: the mean of k within a, plus that within
    b, minus twice that between them. No feature is compared with itself. Two sets from one
    distribution therefore give 0 on average at any size, and about half of the values are negative.
    Raises ValueError on features that do not fit or are not finite.
    """
    a, b = check_features(a, b)

    def total(x, y):  # 1000 rows at a time, since the matrix of all pairs may not fit
        return sum(((part @ y.T / y.shape[1] + 1) ** 3).sum() for part in x.split(1000))

    def within(x):
        itself = ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def neighbor_radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each feature (N, D) to its k-th nearest other: (N,).

    Raises ValueError unless 1 ≤ k < N.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k={k} is outside 1 … {len(features) - 1}, the number of other features")
    parts = [
        torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1000)
    ]
    return torch.cat(parts)  # k + 1, because the nearest of all is the feature itself


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., 1904.06991, Eq. 1–2).

    They compare fake features (M, D) with real features (N, D). Around each feature lies a ball
    that reaches to its k-th nearest neighbor. Precision is the share of fakes inside some real
    ball. Recall is the share of reals inside some fake ball. Both change with N and M, so compare
    at equal numbers.
    """
    real, fake = check_features(real, fake)

    def share_inside(points, others):
        radii = neighbor_radii(others, k)
        inside = [(torch.cdist(part, others) <= radii).any(dim=1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Return the share of real features whose ball holds a fake (Naeem, 2002.09797).

    The ball reaches to the k-th nearest real neighbor. Unlike recall, coverage builds no ball
    around a fake, so a few outlying samples cannot cover much.
    """
    real, fake = check_features(real, fake)
    nearest = torch.cat([torch.cdist(part, fake).amin(dim=1) for part in real.split(1000)])
    return (nearest <= neighbor_radii(real, k)).double().mean().item()


def check_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets of features in float64 on the CPU.

    Raises ValueError unless they are (N, D) and (M, D) finite floats, with N and M at least 2.
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
    """The five metrics of one set of features."""

    frechet: float
    kernel: float
    precision: float
    recall: float
    coverage: float


@dataclass(frozen=True)
class Report:
    """The scores of n samples beside the floor: those of n held-out real images.

    `floor` is the mean over `draws` sets of n that share no image. `floor_spread` is the standard
    deviation of their scores, NaN for one draw. `classes` and `real_classes` are the share of each
    class among the samples and among all held-out images, as predicted by the classifier.
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
        """The Fréchet distance divided by its floor; real images reach 1."""
        return self.samples.frechet / self.floor.frechet

    def to_dict(self) -> dict:
        """Return plain values only, ready for JSON."""
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


KERNEL_REFERENCE = 10_000  # largest number of reference features for a kernel distance


def score(features: Tensor, reference: Tensor, generator: torch.Generator | None = None) -> Scores:
    """Return every score of features (n, D) against `reference` (N, D), N ≥ n.

    The Fréchet distance uses the whole reference. The kernel distance uses a random subset of at
    most 10,000, whose pairs can be computed in a second. Precision, recall and coverage change with
    the size of the reference, so they use a random subset of n.
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
    classifier: Classifier,
    samples: Tensor,
    reference: Tensor,
    held_out: Tensor,
    seed: int = 0,
) -> Report:
    """Compare samples and held-out real images with the same real features.

    `samples` is (n, C, H, W) uint8. `reference` (N, D) and `held_out` (M, D) are features of the
    training and of the test set. The floor is the mean over as many disjoint draws of n held-out
    images as exist, at most ten. Raises ValueError if n is below 20, or if N or M is below n,
    because a floor at another n would not be comparable.
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
    """Return the k points nearest to each query by Euclidean distance.

    Returns the distances (N, k) float64, ascending, and the indices (N, k). `queries` (N, …) and
    `points` (M, …) are images of any dtype (uint8 gives distances in gray levels) or features. The
    neighbors are found in float32 by |q|² + |p|² − 2q·p, `chunk` points at a time. Their distances
    are then computed exactly, so a copy has distance 0. Raises ValueError if the shapes do not fit,
    or unless 1 ≤ k ≤ M.
    """
    if queries.shape[1:] != points.shape[1:] or not 1 <= k <= len(points):
        raise ValueError(
            f"queries are {tuple(queries.shape[1:])} each, points {tuple(points.shape[1:])} each, "
            f"and k={k}: expected equal shapes and k in 1 … {len(points)}, the number of points"
        )
    points, found = points.flatten(1), []
    for part in queries.flatten(1).split(256):
        # find the nearest points, one chunk at a time
        near = part.new_empty((len(part), 0), dtype=torch.float32)
        index = part.new_empty((len(part), 0), dtype=torch.long)
        for start in range(0, len(points), chunk):
            distances = torch.cdist(part.float(), points[start : start + chunk].float())
            numbers = torch.arange(start, start + distances.shape[1], device=part.device).expand_as(
                distances
            )
            # merge the chunk with the nearest so far
            near, order = torch.cat([near, distances], dim=1).topk(
                min(k, start + chunk, len(points)), largest=False
            )
            index = torch.cat([index, numbers], dim=1).gather(1, order)
        # compute exact distances, on the CPU because Apple's GPUs lack float64
        difference = points[index].cpu().double() - part.cpu().double()[:, None]
        exact, order = difference.norm(dim=2).sort(dim=1, stable=True)
        found.append((exact, index.cpu().gather(1, order)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@dataclass(frozen=True)
class Memorization:
    """Distances of samples and held-out images to their two nearest training images.

    `samples` is (n, 2) and `held_out`, for real images, is (m, 2). `indices` (n, 2) names the
    training images that are nearest to each sample.
    """

    samples: Tensor
    held_out: Tensor
    indices: Tensor

    def nearer(self, quantile: float = 0.01) -> float:
        """Return the share of samples nearer to the training set than the nearest held-out images.

        The threshold is the given quantile of the held-out images' distances. For new images the
        share is about `quantile`.
        """
        return (self.samples[:, 0] < self.held_out[:, 0].quantile(quantile)).double().mean().item()

    def copies(self, ratio: float = 1 / 3) -> tuple[float, float]:
        """Return the shares of samples and of held-out images that count as copies.

        The criterion is that of Gu et al. (2310.02664): the nearest training image is less than
        `ratio` times as far as the second. It misses copies of an image that the training set holds
        twice.
        """
        return tuple(
            (d[:, 0] < ratio * d[:, 1]).double().mean().item()
            for d in (self.samples, self.held_out)
        )


def memorization(samples: Tensor, train_images: Tensor, held_out: Tensor) -> Memorization:
    """Measure how near samples and held-out real images come to the training set.

    All three are images (N, C, H, W) uint8, for pixel distance, or features (N, D). Only held-out
    images of the same kind show which distances are small, because blurred samples are nearer to
    everything. Following Meehan et al. (2004.05675), samples that are nearer than the held-out
    images indicate copying.
    """
    distances, indices = nearest_neighbors(samples, train_images, k=2)
    return Memorization(distances, nearest_neighbors(held_out, train_images, k=2)[0], indices)


def gaussian_kl(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """Return KL(N(mean_a, var_a) ‖ N(mean_b, var_b)) of each value, in nats.

    The formula is ½(ln(v_b / v_a) + (v_a + (m_a − m_b)²) / v_b − 1).
    """
    return 0.5 * (var_b.log() - var_a.log() + (var_a + (mean_a - mean_b) ** 2) / var_b - 1)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return ln of the mass that N(mean, var) gives to the bin of each x0, in nats (DDPM Eq. 13).

    x0 takes the 256 values −1 … 1. A bin reaches 1/255 to either side, and the outermost bins reach
    to infinity, so the masses sum to 1.
    """
    low, high = (((x0 + edge - mean) / var.sqrt()) for edge in (-1 / 255, 1 / 255))
    low, high = low.masked_fill(x0 < -0.999, -math.inf), high.masked_fill(x0 > 0.999, math.inf)
    # in the right tail both CDFs are near 1 and their difference loses digits: use the left one
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-(log_low - log_high).exp())


def in_float64(schedule: NoiseSchedule) -> NoiseSchedule:
    """Return a schedule with the same betas in float64 on the CPU.

    The terms near t = 0 depend on 1 − ᾱ, of which float32 keeps few digits.
    """
    exact = copy.copy(schedule)
    exact.betas = schedule.betas.cpu().double()
    exact.alphas = 1 - exact.betas
    exact.alpha_bars = exact.alphas.cumprod(dim=0)
    return exact


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T | x0) ‖ N(0, I)) in bits per dimension, (B,) (DDPM Eq. 5).

    It measures the information about x0 that is left in x_T. It does not depend on the network.
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
    """Return L_t of each x0 at x_t ~ q(x_t | x0), in bits per dimension, (B,) (DDPM Eq. 5).

    Our t + 1 is the paper's t, so this is the paper's L_{t−1}. For t > 0 it is the KL divergence
    between the true reverse step, q(x_{t−1} | x_t, x0), and the step with x0_hat in place of x0. At
    t = 0 it is the negative log-likelihood of x0 under Eq. 13. The posterior variance is 0 there,
    so beta_tilde of t = 1 is used, as in the paper's code. x0 (B, …) in [−1, 1], t (B,) and eps
    (B, …) are on the CPU, where everything except the denoiser is computed in float64.
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
    """Return the terms to compute for each of n images and their weights, both (n, calls).

    The weighted sum of the terms is right on average. If `calls` is None, it takes all T terms with
    weight 1. Otherwise t is drawn with probability ∝ 1 / (t + 1), which falls about as the terms
    do: one t from each of `calls` equal parts of that probability, with weight
    1 / (calls · probability) (importance sampling, 2102.09672, 3.3). Raises ValueError unless
    1 ≤ calls ≤ T.
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
    """The variational bound in bits per dimension.

    `total` ± `error` is the bound and its standard error over the n images. `prior` is L_T. `terms`
    (T,) holds the mean of each L_t over the images for which it was computed, NaN if there are
    none.
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
    """Return an upper bound on the code length of images under the model (DDPM Eq. 5, section 3.3).

    The bound is L_T + Σ L_t. The images are (N, C, H, W) uint8. The unit is bits per value; a raw
    image has 8. `calls` is the number of calls of `denoise` per image, None for all T terms; fewer
    calls give the same total on average (see `weighted_timesteps`). A network is in eval mode
    during the computation. `generator` must be on the CPU.
    """
    # choose the terms to compute for each image
    times, weights = weighted_timesteps(len(check_images(images)), len(schedule), calls, generator)
    terms, priors = torch.empty_like(weights), []
    # compute the terms, one batch at a time
    with eval_mode(denoise):
        for rows in torch.arange(len(images)).split(batch_size):
            x0 = images[rows].cpu().double() / 127.5 - 1
            priors.append(prior_term(schedule, x0))
            for column in range(times.shape[1]):
                eps = torch.randn(x0.shape, generator=generator)
                terms[rows, column] = bound_term(
                    denoise, schedule, x0, times[rows, column], eps, variance
                )
    # sum over the terms of each image, and average each term over the images
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
