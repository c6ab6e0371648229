"""What training for re-identification has in common: losses, optimiser, schedule.

Notation: features u [N, F], identities y int64 [N], domains d int64 [N] in 0..D-1. Source: the usual strong
baseline of re-identification.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu, softplus

LABEL_SMOOTHING, MARGIN = 0.1, 0.3
LEARNING_RATE, WEIGHT_DECAY = 3.5e-4, 5e-4
CALIBRATIONS = ("center_weight", "scale_weight", "scale_bias")  # w_m, w_v, b_v: without weight decay

# ------------------------------------------------------------------------------------------------ losses


def identity_losses(logits: Tensor, labels: Tensor, *, smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """Cross-entropy [N] of logits [N, n] with smoothed labels int64 [N]."""
    return cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")


def batch_hard_triplet_losses(
    features: Tensor, labels: Tensor, domain: Tensor | None = None, *, margin: float = MARGIN
) -> Tensor:
    """max(0, margin + farthest positive - nearest negative) [N], Euclidean distances within the batch.

    Args:
        features: [N, F].
        labels: int64 [N].
        domain: int64 [N]: only pairs of one domain count; None: all pairs.

    Returns:
        float32 [N], float64 for float64 features; 0 for a sample without a positive or without a negative.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    pairs = torch.ones_like(same) if domain is None else domain[:, None] == domain
    positive = same & pairs & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = ~same & pairs
    farthest = torch.where(positive, distance, -math.inf).amax(1)
    nearest = torch.where(negative, distance, math.inf).amin(1)
    complete = positive.any(1) & negative.any(1)
    return relu(margin + torch.where(complete, farthest, 0) - torch.where(complete, nearest, margin))


def mean_over_domains(losses: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """Mean over the domains in the batch of their mean loss: a number from losses [N]."""
    member = domain == torch.arange(num_domains, device=domain.device)[:, None]  # [D, N]
    size = member.sum(1)
    means = torch.where(member, losses, 0).sum(1) / size.clamp_min(1)
    return means.sum() / (size > 0).sum().clamp_min(1)


def restitution_ranking_loss(z: Tensor, f: Tensor, f_minus: Tensor, labels: Tensor) -> Tensor:
    """Reinforced features shall tell identities better than the base, contaminated ones worse.

        softplus(D_f(a,p) - D_z(a,p)) + softplus(D_z(a,n) - D_f(a,n))
        + softplus(D_z(a,p) - D_-(a,p)) + softplus(D_-(a,n) - D_z(a,n)),   D(u, v) = 1/2 - u.v / (2 |u| |v|)

    averaged over samples a with, by D_f, their farthest positive p and nearest negative n.

    Args:
        z, f, f_minus: pooled features [N, C].
        labels: int64 [N].

    Returns:
        A number; 0 if no sample has both a positive and a negative.
    """
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    distances = [_cosine_distances(u) for u in (z, f, f_minus)]
    chosen = distances[1].detach()
    p = torch.where(positive, chosen, -math.inf).argmax(1, keepdim=True)
    n = torch.where(same, math.inf, chosen).argmin(1, keepdim=True)
    (z_p, f_p, minus_p), (z_n, f_n, minus_n) = ([d.gather(1, other)[:, 0] for d in distances] for other in (p, n))
    losses = softplus(f_p - z_p) + softplus(z_n - f_n) + softplus(z_p - minus_p) + softplus(minus_n - z_n)
    complete = positive.any(1) & ~same.all(1)
    return torch.where(complete, losses, 0).sum() / complete.sum().clamp_min(1)


def _cosine_distances(u: Tensor) -> Tensor:
    """D [N, N] of features [N, C]."""
    unit = normalize(u, dim=1)
    return 0.5 - 0.5 * unit @ unit.mT


# ------------------------------------------------------------------------------------------------ optimisation


def reid_optimizer(
    model: nn.Module, *, lr: float = LEARNING_RATE, weight_decay: float = WEIGHT_DECAY
) -> torch.optim.Adam:
    """Adam on the parameters that need a gradient, without weight decay on the calibrations of norms."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if name.rpartition(".")[2] in CALIBRATIONS else decayed).append(parameter)
    groups = [{"params": parameters, "weight_decay": w} for parameters, w in ((decayed, weight_decay), (free, 0.0))]
    return torch.optim.Adam(groups, lr=lr)


def learning_rate_factor(
    warm_up: int = 10, start: float = 0.01, milestones: tuple[int, ...] = (40, 70)
) -> Callable[[int], float]:
    """Factor of the learning rate by epoch, for LambdaLR: from `start` to 1 in `warm_up`, a tenth at milestones."""

    def factor(epoch: int) -> float:
        decay = 0.1 ** sum(epoch >= milestone for milestone in milestones)
        return decay * min(1.0, start + (1 - start) * epoch / max(warm_up, 1))

    return factor
