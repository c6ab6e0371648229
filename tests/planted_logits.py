"""Logits of which one is a known combination of others."""

from __future__ import annotations

import torch
from tensors import normal
from torch import Tensor

SUPPORT, COEFFICIENTS, NOISE = [3, 7, 11, 15], [0.9, -0.6, 0.8, 0.5], 0.4


def planted_logits(samples: int = 6000, n: int = 20, seed: int = 0) -> Tensor:
    """Independent logits of means 0, 1, ...; category 0 is 5 + SUPPORT . COEFFICIENTS + NOISE."""
    f = normal(samples, n, seed=seed)
    f[:, 0] = f[:, SUPPORT] @ torch.tensor(COEFFICIENTS, dtype=torch.float64) + NOISE * f[:, 0] + 5
    f[:, 1:] += torch.arange(1, n)
    return f
