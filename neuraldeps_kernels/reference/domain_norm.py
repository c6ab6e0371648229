"""Plain PyTorch twin of the operators of `neuraldeps_kernels.ops.domain_norm`, with their names and arguments.

It is the oracle of the tests (in float64), what CUDA tensors go to where Triton is missing, and, being differentiable
throughout, the second derivative of the operators. Nothing here but `strict` makes the host wait for a device.
Statistics are float32 (float64 for float64 x), those of domains float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """g [N, C], means of x [N, C, *] over its trailing dimensions, and q [N, C], means of (x - g)^2; 0 of no values."""
    flat = _flat(x)
    if flat.shape[2] == 0:
        return flat.sum(2), flat.sum(2)
    mean = flat.mean(2)
    return mean, (flat - mean[:, :, None]).square().mean(2)


def centred_affine(
    x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str
) -> Tensor:
    """act(scale (x - mean) + shift + residual) in the dtype of x; the tables are [N, C]."""
    y = _over_x(scale, x) * (_wide(x) - _over_x(mean, x)) + _over_x(shift, x)
    if residual is not None:
        y = y + residual
    return (y.relu() if activation == "relu" else y).to(x.dtype)


def centred_affine_sums(grad: Tensor, x: Tensor, mean: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """S1 = sum of dy' and S2 = sum of dy' (x - mean) over the trailing dimensions, [N, C]; dy' = dy where y > 0."""
    masked = _flat(_masked(grad, y))
    return masked.sum(2), (masked * (_flat(x) - mean[:, :, None])).sum(2)


def centred_affine_input_grad(
    grad: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    offset: Tensor,
    slope: Tensor,
    y: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """dx = scale dy' + offset + slope (x - mean) and, with `residual`, dy' (else an empty tensor), in x's dtype."""
    dx = _over_x(offset, x) + _over_x(slope, x) * (_wide(x) - _over_x(mean, x))
    if grad is None or scale is None:
        return dx.to(x.dtype), x.new_empty(0)
    masked = _masked(grad, y)
    dx = dx + _over_x(scale, x) * _wide(masked)
    return dx.to(x.dtype), masked.to(x.dtype, copy=True) if residual else x.new_empty(0)


def domain_batch_norm(
    x: Tensor,
    domain: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_domains: int,
    training: bool,
    eps: float,
    activation: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and mean, biased variance [D, C] in float64 and count [D] in int64 of the values of each domain.

    Without `training`: mean and variance are the running ones, count is 0, and id -1 means the pooled domain. Samples
    of any other id that names no domain are NaN.
    """
    if training:
        mean, variance, count = domain_statistics(x, domain, num_domains)
        if strict and bool((count == 1).any()):
            raise ValueError(single_value_message(count))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean.double(), running_var.double()
        count = torch.zeros(num_domains, dtype=torch.int64, device=x.device)
    table_mean, table_variance = pooled_rows(mean, variance)
    gamma, beta = affine_rows(weight, mean, 1.0), affine_rows(bias, mean, 0.0)
    rows = _row_of(domain, num_domains)
    wrong = _wrong_ids(domain, num_domains, training)
    wide = _wide(x).dtype
    pivot = table_mean[rows].to(wide)
    scale = gamma[rows] / (table_variance[rows] + eps).sqrt()
    shift = beta[rows] - scale * (table_mean[rows] - pivot.double())
    shift = torch.where(wrong[:, None], torch.nan, shift)
    y = centred_affine(x, pivot, scale.to(wide), shift.to(wide), residual, activation)
    return y, mean, variance, count


def domain_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    y: Tensor | None,
    training: bool,
    eps: float,
    shared_affine: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, gradients of weight and bias ([D, C], or [C] with `shared_affine`) in the dtype of statistics, and dy'.

    Samples whose id names no domain have dx = NaN and no part in the gradients of weight and bias.
    """
    D = mean.shape[0]
    table_mean, table_variance = pooled_rows(mean, variance)
    rows = _row_of(domain, D)
    wide = _wide(x).dtype
    pivot = table_mean[rows].to(wide)
    S1, S2 = (table.double() for table in centred_affine_sums(grad, x, pivot, y))
    S2 = S2 - (table_mean[rows] - pivot.double()) * S1
    wrong = _wrong_ids(domain, D, training)
    member = (rows[:, None] == torch.arange(D + 1, device=x.device)) & ~wrong[:, None]  # [N, D + 1]
    sum1, sum2 = _sums(S1, member), _sums(S2, member)
    rstd = (table_variance + eps).rsqrt()
    gamma = affine_rows(weight, mean, 1.0)
    moves = torch.cat([count != 1, count.new_ones(1, dtype=torch.bool)])[:, None]  # a single value is always at 0
    scale = torch.where(moves, gamma * rstd, 0.0)
    dweight, dbias = (_of_parameter(table, shared_affine) for table in (sum2 * rstd, sum1))
    offset, slope = torch.zeros_like(scale), torch.zeros_like(scale)
    if training:
        over = 1 / torch.cat([count, count.new_zeros(1)]).clamp(min=1).double()[:, None]
        slope = -scale * rstd.square() * sum2 * over
        offset = -scale * sum1 * over
    shift = offset[rows] - slope[rows] * (table_mean[rows] - pivot.double())
    shift = torch.where(wrong[:, None], torch.nan, shift)
    dx, dresidual = centred_affine_input_grad(
        grad, x, pivot, scale[rows].to(wide), shift.to(wide), slope[rows].to(wide), y, residual
    )
    return dx, dweight.to(wide), dbias.to(wide), dresidual


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    momentum: float | None,
) -> None:
    """Moves the running statistics of the domains with count > 0 towards mean and the unbiased variance, in place.

    The step is `momentum`, or 1 over the number of batches of the domain, this one included, where that is None.
    """
    present = count > 0
    if num_batches_tracked is not None:
        num_batches_tracked.add_(present.to(num_batches_tracked.dtype))
    if momentum is None:
        assert num_batches_tracked is not None
        step = 1 / num_batches_tracked.clamp(min=1).double()[:, None]
    else:
        step = torch.full_like(mean[:, :1], momentum)
    unbiased = variance * (count.double() / (count - 1).clamp(min=1))[:, None]
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        moved = running + step * (batch - running)
        running.copy_(torch.where(present[:, None], moved, running))


# ------------------------------------------------------------------------------------------------ domains


def domain_statistics(x: Tensor, domain: Tensor, num_domains: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [D, C] in float64 and count [D] in int64; 0 of a domain without values."""
    g, q = (table.double() for table in instance_moments(x))
    return merged_moments(g, q, domain, num_domains, math.prod(x.shape[2:]))


def merged_moments(
    g: Tensor, q: Tensor, domain: Tensor, num_domains: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from instance moments g, q [N, C] of `values` values each: law of total variance."""
    member = domain[:, None] == torch.arange(num_domains, device=g.device)  # [N, D]
    instances = member.sum(0)
    over = 1 / instances.clamp(min=1).to(g.dtype)[:, None]
    mean = _sums(g, member) * over
    index = domain.clamp(0, num_domains - 1)
    variance = _sums(q + (g - mean[index]).square(), member) * over
    return mean, variance, instances * values


def pooled_rows(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """mean and variance [D + 1, C]: the last row pools all domains, each with the same weight."""
    pooled = mean.mean(0, keepdim=True)
    pooled_variance = (variance + (mean - pooled).square()).mean(0, keepdim=True)
    return torch.cat([mean, pooled]), torch.cat([variance, pooled_variance])


def affine_rows(parameter: Tensor | None, mean: Tensor, default: float) -> Tensor:
    """weight or bias [D, C] or [C] as float64 [D + 1, C], whose last row is the mean over domains."""
    if parameter is None:
        return torch.full((mean.shape[0] + 1, mean.shape[1]), default, dtype=torch.float64, device=mean.device)
    table = parameter.double().expand(mean.shape)
    return torch.cat([table, table.mean(0, keepdim=True)])


def single_value_message(count: Tensor) -> str:
    domain = int((count == 1).nonzero()[0, 0])
    return f"domain {domain} has a single value per channel, which strict=True does not accept in training"


def _row_of(domain: Tensor, num_domains: int) -> Tensor:
    """Row of each sample in a table [D + 1, C]."""
    return torch.where((domain < 0) | (domain >= num_domains), num_domains, domain)


def _wrong_ids(domain: Tensor, num_domains: int, training: bool) -> Tensor:
    """Which samples [N] have an id that names no domain."""
    return (domain < (0 if training else -1)) | (domain >= num_domains)


def _of_parameter(table: Tensor, shared: bool) -> Tensor:
    """Gradient [D + 1, C] of the rows of `affine_rows` as that of the parameter."""
    own = table[:-1] + table[-1:] / max(table.shape[0] - 1, 1)
    return own.sum(0) if shared else own


def _sums(table: Tensor, member: Tensor) -> Tensor:
    """Sums [D, C] of the rows of table [N, C] by member [N, D]; other rows may be NaN, so they are not multiplied."""
    zero = torch.zeros((), dtype=table.dtype, device=table.device)
    return torch.stack([torch.where(column[:, None], table, zero).sum(0) for column in member.unbind(1)])


# ------------------------------------------------------------------------------------------------ shapes


def _wide(x: Tensor) -> Tensor:
    """x in float64 if it is that, else in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: Tensor) -> Tensor:
    """x as [N, C, values], in float32 or float64."""
    return _wide(x).reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _over_x(table: Tensor, x: Tensor) -> Tensor:
    """table [N, C] with the number of dimensions of x."""
    return table.reshape(*table.shape, *(1,) * (x.dim() - 2))


def _masked(grad: Tensor, y: Tensor | None) -> Tensor:
    return grad if y is None else torch.where(y > 0, grad, 0)
