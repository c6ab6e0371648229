"""Plain PyTorch twin of `neuraldeps_kernels.ops.pose_weighted_pool`: the oracle of the tests, in float64, what serves
where no kernel does, and, being differentiable throughout, the second derivative of the operator.

Notation: features F [N, C, h, w], maps H [N, K, h, w] (in float64 for float64 features, else in float32),
D [N, K] = sum of H + eps; G is the gradient of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pose_weighted_pool(features: Tensor, maps: Tensor, *, groups: bool = False, eps: float = 1e-6) -> Tensor:
    """[N, K, C] sum_hw F H / D in the dtype of the features; with `groups` [N, C], by the map of the group."""
    F, H, D = _flat(features, maps, eps)
    if groups:
        group = group_of_channel(F.shape[1], H.shape[1], F.device)
        return ((F * H[:, group]).sum(2) / D[:, group]).to(features.dtype)
    return (H @ F.mT / D[:, :, None]).to(features.dtype)


def pose_weighted_pool_backward(
    grad: Tensor, features: Tensor, maps: Tensor, groups: bool, eps: float, of_features: bool, of_maps: bool
) -> tuple[Tensor, Tensor]:
    """dF in the dtype of the features, with `of_features`, and dH in that of the maps, with `of_maps`; else empty.

    dF = sum_k (G_kc / D_k) H_k,   dH_k = P_k - sum_hw(H_k P_k) / D_k   with   P_k = sum_c (G_kc / D_k) F_c.
    """
    F, H, D = _flat(features, maps, eps)
    G = grad.to(F.dtype)
    if groups:  # as [N, K, C] that is 0 beside the group of a channel
        own = torch.arange(H.shape[1], device=F.device)[:, None] == group_of_channel(F.shape[1], H.shape[1], F.device)
        G = torch.where(own, G[:, None], 0)
    A = G / D[:, :, None]
    dF = dH = maps.new_empty(0)
    if of_features:
        dF = (A.mT @ H).reshape(features.shape).to(features.dtype)
    if of_maps:
        P = A @ F
        dH = (P - (H * P).sum(2, keepdim=True) / D[:, :, None]).reshape(maps.shape).to(maps.dtype)
    return dF, dH


def group_of_channel(C: int, K: int, device: torch.device) -> Tensor:
    """[C] int64: groups of C // K channels, the last takes the rest."""
    return (torch.arange(C, device=device) // (C // K)).clamp(max=K - 1)


def _flat(features: Tensor, maps: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """F [N, C, hw], H [N, K, hw], D [N, K] in the dtype of the sums."""
    wide = torch.promote_types(features.dtype, torch.float32)
    H = maps.to(wide).flatten(2)
    return features.to(wide).flatten(2), H, H.sum(2) + eps
