"""Covariance matrices for the CovLasso tests: float64 [n, n], exactly symmetric, a function of `seed` alone."""

from __future__ import annotations

import torch
from tensors import normal
from torch import Tensor

from neuraldeps_kernels.data.synthetic_logits import clustered_logits


def covariance_of(x: Tensor) -> Tensor:
    """Centred covariance [n, n] of samples x [N, n], divided by N."""
    centred = x.double() - x.double().mean(0)
    S = centred.T @ centred / len(x)
    return (S + S.T) / 2


def mixed(n: int, seed: int, samples: int = 2000) -> Tensor:
    """Random correlations of full rank: `samples` normal vectors times a random square matrix."""
    return covariance_of(normal(samples, n, seed=seed) @ normal(n, n, seed=seed + 1))


def low_rank(n: int, rank: int, seed: int, noise: float = 0.0, samples: int = 1000) -> Tensor:
    """Logits that are linear in `rank` features; `noise` is the standard deviation of an independent part."""
    x = normal(samples, rank, seed=seed) @ normal(rank, n, seed=seed + 1)
    return covariance_of(x + noise * normal(samples, n, seed=seed + 2))


def clustered(n: int, features: int, seed: int, samples: int = 3000) -> Tensor:
    """Covariance of `clustered_logits`: what a trained classifier looks like, of rank min(n - 1, features)."""
    return covariance_of(clustered_logits(n, features, samples, seed)[0])


def repeated(S: Tensor, copies: int) -> Tensor:
    """The first `copies` categories once more at the end: exact duplicates, [n + copies, n + copies]."""
    index = torch.cat([torch.arange(len(S)), torch.arange(copies)])
    return S[index][:, index]


def near_duplicates(n: int, copies: int, seed: int, difference: float) -> Tensor:
    """`n` mixed categories and `copies` of them that differ by noise of standard deviation `difference`."""
    x = normal(2000, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return covariance_of(torch.cat([x, x[:, :copies] + difference * normal(2000, copies, seed=seed + 2)], 1))


def unequal_scales(S: Tensor, decades: float, seed: int) -> Tensor:
    """Category j in its own unit, between 10^-decades and 10^decades."""
    generator = torch.Generator().manual_seed(seed)
    unit = 10 ** (decades * (2 * torch.rand(len(S), generator=generator, dtype=torch.float64) - 1))
    return unit[:, None] * S * unit


def equicorrelated(n: int, correlation: float) -> Tensor:
    """Unit variances and one common correlation; positive definite for -1/(n-1) < correlation < 1."""
    S = torch.full((n, n), correlation, dtype=torch.float64)
    return S.fill_diagonal_(1.0)


def toeplitz(n: int, correlation: float) -> Tensor:
    """correlation^|i-j|: an autoregressive chain, whose inverse is tridiagonal."""
    distance = torch.arange(n, dtype=torch.float64)
    return correlation ** (distance[:, None] - distance).abs()


def indefinite(n: int, seed: int, negative: int = 1) -> Tensor:
    """Positive diagonal, `negative` eigenvalues well below zero."""
    vectors = torch.linalg.qr(normal(n, n, seed=seed))[0]
    values = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    values[:negative] = -0.3
    S = (vectors * values) @ vectors.T
    return (S + S.T) / 2


def planted(seed: int, n: int = 60, samples: int = 2000, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Covariance in which category 0 is 4 others with |coefficient| in [0.4, 1] plus noise, and theta_0 [n]."""
    generator = torch.Generator().manual_seed(seed)
    support = 1 + torch.randperm(n - 1, generator=generator)[:4]
    size = 0.4 + 0.6 * torch.rand(4, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (4,), generator=generator) * 2.0 - 1
    theta = torch.zeros(n, dtype=torch.float64)
    theta[support] = size * sign
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    x[:, 0] = x @ theta + noise * torch.randn(samples, generator=generator, dtype=torch.float64)
    return covariance_of(x), theta


def joint(m: int, n: int, seed: int, noise: float = 0.5, samples: int = 1000) -> Tensor:
    """m mixed predictors, then n targets that are each a combination of three of them plus noise: [m + n, m + n]."""
    x = normal(samples, m, seed=seed) @ (torch.eye(m, dtype=torch.float64) + 0.4 * normal(m, m, seed=seed + 1))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(m, n, dtype=torch.float64)
    for target in range(n):
        weight[torch.randperm(m, generator=generator)[:3], target] = torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64)
    return covariance_of(torch.cat([x, x @ weight + noise * normal(samples, n, seed=seed + 2)], 1))


def stand_in() -> Tensor:
    """0 is 1 plus 2 plus a bit of e, 3 is 1 plus 2 less e: first on the path of 0, it leaves once 1 and 2 are there."""
    weight = torch.tensor([[1.0, 1, 0.2], [1, 0, 0], [0, 1, 0], [1, 1, -1]], dtype=torch.float64)
    variance = torch.tensor([1.0, 0.81, 0.01], dtype=torch.float64)  # of 1, 2 and e
    return (weight * variance) @ weight.T
