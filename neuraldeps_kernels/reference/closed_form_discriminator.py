"""The closed-form discriminator in plain PyTorch: bisection for the JS game, a softmax for the KL game."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SHARE = 1 - 1e-6  # s of a sample
_STEPS = 100  # halve the bracket of 46 nats to less than a float64 can tell


def closed_form_discriminator(penalty: Tensor, eta: float, game: str) -> tuple[Tensor, Tensor, Tensor]:
    """D, w [N] in the dtype of `penalty` and c [1] float64; see ops/closed_form_discriminator.py.

    Works in float64. With t = eta min l - c > 0 and u = eta (l - min l) the density ratio of the JS game is
    1 / expm1(u + t); its mean falls with t, and is bisected until it is 1.
    """
    u = eta * penalty.double()
    lowest = u.amin()
    u = u - lowest
    if game == "kl":
        c = -torch.logsumexp(-u, 0) + torch.log(torch.tensor(float(len(u)), dtype=torch.float64, device=u.device))
        weight = torch.exp(c - u)
        c = c + lowest
    else:
        low = torch.tensor(LARGEST_SHARE, dtype=torch.float64, device=u.device).log().neg().log()
        high = torch.tensor(0.7, dtype=torch.float64, device=u.device).log()  # mean 1 / expm1(t) = 1 at t = log 2 most
        for _ in range(_STEPS):
            middle = (low + high) / 2
            above = torch.expm1(u + middle.exp()).reciprocal().mean() > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        t = low.exp()
        weight = torch.expm1(u + t).reciprocal()
        c = lowest - t
        weight, c = torch.where(lowest.isfinite(), weight, torch.nan), torch.where(lowest.isfinite(), c, torch.nan)
    return (1 / (1 + weight)).to(penalty.dtype), weight.to(penalty.dtype), c[None]
