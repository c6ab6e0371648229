"""Plain PyTorch twin of `neuraldeps_kernels.ops.covariance`: two passes in float64, differentiable by autograd.

It is the oracle of the tests, and what a CUDA tensor falls back to where Triton is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centered_moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weights W, mean m and `sum_r w_r (x_r - m) (x_r - m)'` of each batch entry, in float64.

    Args:
        x: [B, N, n] floating point.
        weights: [B, N], not negative; default ones. Rows of weight 0 do not count, whatever they hold.

    Returns:
        W [B], m [B, n], moment [B, n, n]; all zero where W is zero.
    """
    x = x.double()
    w = x.new_ones(x.shape[:2]) if weights is None else weights.double()
    weight_sum = w.sum(1)
    safe_sum = torch.where(weight_sum > 0, weight_sum, 1.0)
    x = torch.where((w != 0)[..., None], x, 0.0)
    mean = (w[..., None] * x).sum(1) / safe_sum[:, None]
    deviation = x - mean[:, None]
    moment = deviation.mT @ (w[..., None] * deviation)
    return weight_sum, mean, (moment + moment.mT) / 2


def covariance(
    x: Tensor,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`neuraldeps_kernels.covariance` without its checks."""
    batched = x if x.dim() == 3 else x[None]
    batched_weights = weights if weights is None or x.dim() == 3 else weights[None]
    weight_sum, mean, moment = centered_moments(batched, batched_weights)
    if not center:
        moment = moment + weight_sum[:, None, None] * mean[:, :, None] * mean[:, None, :]
    result = (moment / (weight_sum - correction)[:, None, None]).to(dtype)
    return result if x.dim() == 3 else result[0]


def cross_covariance(
    targets: Tensor,
    predictors: Tensor,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """cov [m, m], cross [n, m], variance [n], predictor_mean [m] and target_mean [n], float64, of `targets` [N, n] and
    `predictors` [N, m], cut out of the covariance of the joined columns.
    """
    n = targets.shape[1]
    joined = torch.cat([targets, predictors], 1)
    _, mean, _ = centered_moments(joined[None], None if weights is None else weights[None])
    S = covariance(joined, center=center, correction=correction, weights=weights)
    return S[n:, n:], S[:n, n:], S.diagonal()[:n], mean[0, n:], mean[0, :n]
