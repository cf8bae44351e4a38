"""A ruler for generated pictures: classifier features, distances between sets of them, and what they cannot see."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion import eval_mode


class Classifier(nn.Module):
    """(B, C, H, W) in [−1, 1] → (B, classes) logits; `features` returns the 96 numbers before the last layer."""

    def __init__(self, num_classes: int = 10, channels: int = 1):
        super().__init__()
        self.convs = nn.Sequential(
            *self.stage(channels, 32), nn.MaxPool2d(2), *self.stage(32, 64), nn.MaxPool2d(2),
            *self.stage(64, 64), nn.AdaptiveMaxPool2d(3), nn.Flatten(),
        )  # fmt: skip
        self.squeeze = nn.Linear(64 * 9, 96)
        self.head = nn.Linear(96, num_classes)

    @staticmethod
    def stage(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.squeeze(self.convs(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(images: Tensor, labels: Tensor, num_classes: int = 10, epochs: int = 6, shift: int = 1,
                     batch_size: int = 128, lr: float = 4e-3, seed: int = 0, device="cpu") -> Classifier:  # fmt: skip
    """A `Classifier` in eval mode, trained on images (N, C, H, W) uint8 and labels (N,) long in 0 … num_classes − 1.

    AdamW with weight decay 0.02; the rate rises over 200 steps and falls to 0; every batch is moved by up to `shift` pixels.
    All that is drawn depends on `seed` alone. Raises ValueError on images or labels of another kind.
    """
    check_images(images)
    if labels.shape != images.shape[:1] or not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(f"labels must be whole numbers in 0 … {num_classes - 1}, one an image, shape ({len(images)},): "
                         f"got shape {tuple(labels.shape)}, {labels.unique().tolist()[:20]}")  # fmt: skip
    n, (height, width) = len(images), images.shape[-2:]
    batch_size = min(batch_size, n)
    total = epochs * (n // batch_size)
    warmup = min(200, max(1, total // 4))
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator, which stays as it was
        torch.manual_seed(seed)
        model = Classifier(num_classes, images.shape[1]).to(device, memory_format=torch.channels_last)
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
def extract_features(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of `images` (N, C, H, W) uint8 in float64, shape (N, 96), on the CPU. ValueError on images of another kind."""
    return _in_batches(classifier, classifier.features, images, batch_size)


@torch.no_grad()
def class_probabilities(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """What the classifier believes of `images` (N, C, H, W) uint8: (N, classes) float64 on the CPU, each row summing to 1."""
    return _in_batches(classifier, classifier, images, batch_size).softmax(dim=1)


def _in_batches(classifier: Classifier, function, images: Tensor, batch_size: int) -> Tensor:
    device = next(classifier.parameters()).device
    with eval_mode(classifier):
        parts = [function(part.to(device) / 127.5 - 1).cpu() for part in check_images(images).split(batch_size)]
    return torch.cat(parts).double()


def check_images(images: Tensor) -> Tensor:
    """`images`; ValueError unless it is a non-empty (N, C, H, W) uint8 tensor."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)} and dtype {images.dtype}, expected at least one (C, H, W) "
                         "image in uint8: data.to_image_range makes them from floats in [−1, 1]")  # fmt: skip
    return images


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (N, D), (M, D) (Heusel et al., 1706.08500, Eq. 6).

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½). The trace of the root comes from the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which are real.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()
