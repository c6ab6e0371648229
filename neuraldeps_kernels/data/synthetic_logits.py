"""Synthetic logits with the covariance of a real classifier: clustered categories, decaying spectrum, redundancy.

Categories sit in a three-level tree in a latent space; features are a noisy rectified linear image of it whose spectrum
decays; the logits are those of a linear discriminant classifier on the features. They sum to a constant, so the rank of
their covariance is min(num_categories - 1, num_features): singular, and strongly so where the feature is narrower than
the output, as in real networks.

Source: our choice (no model of the paper is rebuilt here).
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT = 96  # dimensions of the latent space
LOGIT_STD = 2.5  # standard deviation of all returned logits


def clustered_logits(num_categories: int, num_features: int, num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits float32 [num_samples, num_categories] and labels int64 [num_samples], a function of `seed` alone.

    Raises ValueError where a size is not positive or num_samples is below 2.
    """
    for name, size, least in (
        ("num_categories", num_categories, 1),
        ("num_features", num_features, 1),
        ("num_samples", num_samples, 2),
    ):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def choice(below: int, size: int) -> Tensor:
        return torch.randint(below, (size,), generator=generator)

    coarse = normal(max(4, num_categories // 50), LATENT)
    fine = 0.9 * normal(max(8, num_categories // 8), LATENT)
    fine += coarse[choice(len(coarse), len(fine))]
    centre = fine[choice(len(fine), num_categories)] + 0.7 * normal(num_categories, LATENT)  # [n, latent]
    decay = torch.arange(1, LATENT + 1).pow(-0.35)[:, None]
    mixing = normal(LATENT, num_features) * decay / LATENT**0.5

    labels = choice(num_categories, num_samples)
    latent = centre[labels] + 0.9 * normal(num_samples, LATENT)
    features = (latent @ mixing + 0.35 * normal(num_samples, num_features)).relu()  # [N, d]
    logits = _discriminant(features, labels, num_categories)
    return logits * (LOGIT_STD / logits.std()), labels


def _discriminant(features: Tensor, labels: Tensor, num_categories: int) -> Tensor:
    """Logits [N, n] of linear discriminant analysis fitted on features [N, d] themselves."""
    count = torch.bincount(labels, minlength=num_categories).clamp_min(1)[:, None]
    mean = torch.zeros(num_categories, features.shape[1]).index_add_(0, labels, features) / count  # [n, d]
    within = features - mean[labels]
    scatter = (within.T @ within).double() / len(features)
    scatter.diagonal().add_(0.02)
    centred = (mean - mean.mean(0)).double()
    weight = torch.linalg.solve(scatter, centred.T)  # [d, n]
    bias = -0.5 * (centred.T * weight).sum(0)
    logits: Tensor = features @ weight.float() + bias.float()
    return logits
