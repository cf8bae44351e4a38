"""00 · DDPM on one page. Generated from the notebook of the same name by `make script`."""


import math
import os
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from einops import rearrange
from IPython.display import Image, display
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets


DATASET = "FashionMNIST"  # or "MNIST"; change a value, then run the cells below
SIZE = 28  # pixels per side, a multiple of 4
T = 1000  # number of timesteps
STEPS = 1500  # training steps
BATCH = 32  # images per training step
LR = 3e-3  # highest learning rate
CALLS = 50  # network calls per sample, at most T
SEED = 0


if os.environ.get("DDPM_FAST") == "1":  # for automated tests: the same code, tiny sizes
    STEPS, BATCH, CALLS = 3, 4, 4
    print("FAST MODE: tiny sizes, so the images mean nothing")
device = "cuda" if torch.cuda.is_available() else "cpu"
out = Path(os.environ.get("DDPM_OUTPUT_DIR", "outputs"), "lesson_00")
out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(SEED)


def load_images():
    """All training images, (N, 1, SIZE, SIZE), with values in [-1, 1]."""
    folder = os.environ.get("DDPM_DATA_DIR") or "data"
    try:
        dataset = getattr(datasets, DATASET)(folder, download=True)
        images = dataset.data[:, None] / 255
    except (OSError, RuntimeError):
        print(f"{DATASET} cannot be downloaded: using scikit-learn's digits instead.")
        images = torch.tensor(load_digits().images)[:, None].float() / 16
    images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return 2 * images - 1


images = load_images()


## 1. The forward process: from an image to noise


u = torch.arange(T + 1, dtype=torch.float64) / T
f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
alpha_bars = torch.cumprod(1 - betas, dim=0).float().to(device)


def q_sample(x0, t, eps):
    """Jump from clean images x0 to noisy images at timesteps t (DDPM, Eq. 4)."""
    a = alpha_bars[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def velocity(x0, t, eps):
    """What the network predicts: v, from which image and noise both follow."""
    a = alpha_bars[t][:, None, None, None]
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def draw(batch, title, file, labels=()):
    """Save a batch (N, 1, H, W) in rows of eight, with labels above, and return it for display."""
    framed = F.pad(batch.cpu().clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    grid = rearrange(framed, "(r c) 1 h w -> (r h) (c w)", c=8)
    rows, text = len(batch) // 8, 0.5 if labels else 0.3
    figure = Figure(figsize=(8, rows + text), dpi=3 * (SIZE + 2))
    axes = figure.add_axes([0, 0, 1, rows / (rows + text)])
    axes.imshow(grid, cmap="gray", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    for i, label in enumerate(labels):
        axes.text((i + 0.5) / 8, 1.02, label, ha="center", transform=axes.transAxes)
    figure.savefig(out / file)
    return Image(out / file, alt=title)


t = torch.linspace(0, T - 1, 8).long()
x0 = images[1:2].to(device).expand(8, -1, -1, -1)
x_t = q_sample(x0, t.to(device), torch.randn_like(x0))
draw(x_t, "The forward process on one image", "forward.png", [f"t = {i}" for i in t.tolist()])


## 2. The network and what it predicts


def time_embedding(t, dim):
    """(B,) timesteps → (B, dim): sines and cosines of t, from fast to slow."""
    i = torch.arange(dim // 2, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10_000) * 2 * i / dim)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the time scales and shifts their features."""

    def __init__(self, c_in, c_out, dim=128):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(4, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)  # the block starts nearly as its shortcut

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention: every position reads from all positions."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        qkv = self.qkv(self.norm(x))
        pattern = "b (n heads c) h w -> n b heads (h w) c"
        q, k, v = rearrange(qkv, pattern, n=3, heads=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b heads (h w) c -> b (heads c) h w", h=x.shape[2]))


class UNet(nn.Module):
    """Noisy images (B, 1, H, W) and timesteps (B,) → the prediction v (B, 1, H, W)."""

    def __init__(self, c=48, c2=96):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.stem = nn.Conv2d(4, c, 3, padding=1)
        self.down1 = ResBlock(c, c)
        self.down2 = ResBlock(c, c)
        self.shrink = nn.Conv2d(c, c2, 3, stride=2, padding=1)
        self.middle1 = ResBlock(c2, c2)
        self.attention = Attention(c2)
        self.middle2 = ResBlock(c2, c2)
        self.grow = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c2, c, 3, padding=1))
        self.up2 = ResBlock(2 * c, c)
        self.up1 = ResBlock(2 * c, c)
        self.head = nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), nn.Conv2d(c, 4, 3, padding=1))

    def forward(self, x, t):
        emb = self.time(time_embedding(t, 128))
        h1 = self.down1(self.stem(F.pixel_unshuffle(x, 2)), emb)
        h2 = self.down2(h1, emb)
        h = self.middle2(self.attention(self.middle1(self.shrink(h2), emb)), emb)
        h = self.up2(torch.cat([self.grow(h), h2], dim=1), emb)
        return F.pixel_shuffle(self.head(self.up1(torch.cat([h, h1], dim=1), emb)), 2)


## 3. Training: jump to a random timestep


model = UNet().to(device)
optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.99))
schedule = OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.05)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
losses = []
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

for step in range(STEPS):
    x0 = images[torch.randint(len(images), (BATCH,))].to(device)
    u = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH  # spread evenly over 0 … 1
    u = 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)  # denser in the middle: inverts 3u² - 2u³
    t = (T * u).long().clamp(max=T - 1).to(device)
    eps = torch.randn_like(x0)
    loss = F.mse_loss(model(q_sample(x0, t, eps), t), velocity(x0, t, eps))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    losses.append(loss.item())
    if (step + 1) % 100 == 0:
        print(f"step {step + 1:,}: mean loss of the last 100 steps {sum(losses[-100:]) / 100:.3f}")


## 4. Sampling: from noise to an image, step by step


def reverse_step(x, v, t, t_next, eta):
    """Step from x at timestep t to t_next, given the prediction v (DDIM, Eq. 12)."""
    a = alpha_bars[t]
    a_next = alpha_bars[t_next] if t_next >= 0 else torch.ones_like(a)
    x0 = (a.sqrt() * x - (1 - a).sqrt() * v).clamp(-1, 1)
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)  # of the fresh noise
    x = a_next.sqrt() * x0 + (1 - a_next - variance).sqrt() * eps
    return x + variance.sqrt() * torch.randn_like(x), x0


@torch.no_grad()
def sample(n, calls=CALLS, eta=0.0):
    """Turn noise into n images: yields t, x_t and the predicted clean images."""
    times = torch.linspace(T - 1, 0, calls).round().long().tolist()
    x = torch.randn(n, 1, SIZE, SIZE, device=device)
    for t, t_next in zip(times, [*times[1:], -1], strict=True):
        v = average(x, torch.full((n,), t, device=device))
        x_next, x0 = reverse_step(x, v, t, t_next, eta)
        yield t, x, x0
        x = x_next
    yield -1, x, x


film = list(sample(16))
samples = film[-1][1]

first = film[0][2]
print(f"first predictions: {first.std(dim=0).mean():.2f}")
print(f"samples:           {samples.std(dim=0).mean():.2f}")
print(f"real images:       {images[:1000].std(dim=0).mean():.2f}")
draw(samples, f"Sixteen samples after {CALLS} network calls", "samples.png")


chosen = [film[CALLS * i // 7] for i in range(8)]
rows = [x[2:3] for _, x, _ in chosen] + [x0[2:3] for _, _, x0 in chosen]
labels = [f"t = {t}" for t, _, _ in chosen[:-1]] + ["sample"]
display(draw(torch.cat(rows), "x_t (top) and its predicted x0 (bottom)", "predictions.png", labels))

frames = []
for t, x, x0 in film[::4] + film[-1:]:
    title = f"t = {t}: x_t (top), predicted x0 (bottom)" if t >= 0 else "after the last step"
    draw(torch.cat([x[:8], x0[:8]]), title, "frame.png")
    frames.append(iio.imread(out / "frame.png")[:, :, 0] // 26 * 28)  # 10 grays: a small file
iio.imwrite(out / "one_page.gif", frames, duration=[150] * (len(frames) - 1) + [2000], loop=0)
alt = "Noise turns into eight images, above the predictions that led there"
Image((out / "one_page.gif").read_bytes(), format="png", alt=alt)  # GitHub shows no GIF outputs


## 5. What next
