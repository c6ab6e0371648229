"""The projected step of principal knowledge descent in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def projected_step(
    z: Tensor, gradient: Tensor, basis: Tensor, step: Tensor, origin: Tensor | None, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z' = z - a p, p and |p|^2 of codes [B, L, d], bases [L, R, d] and steps a [B]; see ops/projected_step.py."""
    h = gradient if origin is None else gradient + rho * (z - origin)
    p = (h.transpose(0, 1) @ basis.mT @ basis).transpose(0, 1)  # [B, L, d]
    return z - step[:, None, None] * p, p.contiguous(), p.square().sum(-1)
