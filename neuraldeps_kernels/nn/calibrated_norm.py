"""Calibrated norms: BatchNorm by domain between two calibrations (CSBN), and instance norm with a gate (CIN).

Notation as in domain_norm.py: instance moments g, q [N, C] of x, result A (x - g) + B. `scale_and_shift` of a layer
gives A, B from g, q alone, so that layers chain on tables [N, C] and x is read twice and written once for all of them.

Source: inspired by CFD (arXiv 2111.13945); both formulas are our choice, after Representative BatchNorm.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuraldeps_kernels.nn.domain_norm import (
    DomainNorm,
    Rows,
    active_group,
    domain_ids,
    pooled_statistics,
    rows_of,
)
from neuraldeps_kernels.ops.domain_norm import MergeOverRanks, normalize, update_running_statistics


class CalibratedBatchNorm(DomainNorm):
    """CSBN: BatchNorm per domain between two calibrations by each sample's own mean.

        xc = x + w_m g                                  centring
        xs = (xc - m_d) / sqrt(v_d + eps)               standardisation by mean and variance of xc over the own domain
        y = gamma sigmoid(w_v mean(xs) + b_v) xs + beta scaling

    w_m, w_v [C] start at 0 and b_v [C] at 1, so that the layer starts as sigmoid(1) = 0.73 times BatchNorm per domain.
    Running statistics are those of xc. Eval: statistics of the domain, for an unseen one (-1) pooled over domains; the
    calibrations stay those of the sample.

    Args:
        per_domain_affine: gamma, beta [D, C]; else [C], shared by all domains.
        unit_start: gamma starts at 1 / sigmoid(1), so that the layer starts as BatchNorm.
        synchronize: the batch, in training, is that of all processes together.
        process_group: which processes; default all.
        others: as DomainBatchNorm2d. forward(x, domain=None, *, residual=None, activation=None) as there.

    Source: inspired by CFD: calibration of Representative BatchNorm around domain-specific BatchNorm.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        per_domain_affine: bool = False,
        track_running_stats: bool = True,
        activation: str | None = None,
        unit_start: bool = False,
        synchronize: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            num_domains,
            eps,
            momentum,
            track_running_stats=track_running_stats,
            per_domain_affine=per_domain_affine,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.unit_start, self.synchronize, self.process_group = unit_start, synchronize, process_group
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.center_weight = nn.Parameter(torch.empty(num_features, **place))  # w_m
        self.scale_weight = nn.Parameter(torch.empty(num_features, **place))  # w_v
        self.scale_bias = nn.Parameter(torch.empty(num_features, **place))  # b_v
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w_m = w_v = 0, b_v = 1, gamma = 1 (or 1 / sigmoid(1)), beta = 0."""
        super().reset_parameters()
        nn.init.zeros_(self.center_weight)
        nn.init.zeros_(self.scale_weight)
        nn.init.ones_(self.scale_bias)
        if self.unit_start:
            nn.init.constant_(self.weight, 1 + math.exp(-1))

    def forward(
        self,
        x: Tensor,
        domain: Tensor | int | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        statistics = self.statistics(x, domain)

        def coefficients(g: Tensor, q: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            return self.scale_and_shift(g, q, statistics, *parameters)

        y, batch = normalize(
            x, coefficients, *self.calibration(), residual=residual, activation=activation or self.activation
        )
        self.update(*batch)
        return y

    def calibration(self) -> tuple[Tensor, ...]:
        """w_m, w_v, b_v, gamma, beta: the parameters of `scale_and_shift`."""
        return self.center_weight, self.scale_weight, self.scale_bias, self.weight, self.bias

    def statistics(self, x: Tensor, domain: Tensor | int | None) -> Statistics:
        """Where the statistics of each sample of x come from; errors as in `forward`."""
        self.check(x)
        D, seen = self.num_domains, self.uses_batch
        ids = domain_ids(domain, x, D, seen)
        if seen or self.running_mean is None or self.running_var is None:
            return Statistics(rows_of(ids, x, D), math.prod(x.shape[2:]), None, None)
        mean, var = (table.double() for table in (self.running_mean, self.running_var))
        pooled = pooled_statistics(mean, var)
        mean, var = (torch.cat([table, row[None]]) for table, row in zip((mean, var), pooled, strict=True))
        return Statistics(rows_of(ids, x, D, unseen=D), math.prod(x.shape[2:]), mean, var)

    def scale_and_shift(
        self,
        g: Tensor,
        q: Tensor,
        statistics: Statistics,
        center: Tensor,
        scale: Tensor,
        gate: Tensor,
        gamma: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, ...]:
        """A, B [N, C] from instance moments; with statistics of the batch m, v [D, C] and M [D] after them."""
        rows, mean, var = statistics.rows, statistics.mean, statistics.var
        batch: tuple[Tensor, ...] = ()
        if mean is None or var is None:
            mu, within, between, count = self._moments(g, q, rows, statistics.positions)
            stretch = 1 + center.double()
            mean, var = stretch * mu, within + stretch.square() * between
            offset = (1 + center) * (g - rows.of(mu)).to(g.dtype)  # float64 until the large parts have cancelled
            batch = mean, var, count
        else:
            offset = ((1 + center) * g.double() - rows.of(mean)).to(g.dtype)
        inverse = rows.of((var + self.eps).rsqrt().to(g.dtype))
        if self.per_domain_affine:
            gamma, beta = (rows.of(torch.cat([table, table.mean(0, keepdim=True)])) for table in (gamma, beta))
        t = offset * inverse
        scaled = gamma * torch.sigmoid(scale * t + gate)
        return scaled * inverse, rows.or_nan(scaled * t + beta), *batch

    def _moments(self, g: Tensor, q: Tensor, rows: Rows, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each domain, over all ranks: mean of g, of q, and of (g - its mean)^2 [D, C] float64, and M [D].

        The variance of xc is the second plus (1 + w_m)^2 times the third.
        """
        D, C = self.num_domains, self.num_features
        instances = rows.sums(torch.ones_like(g[:, :1], dtype=torch.float64), D)  # [D, 1]
        share = 1 / instances.clamp_min(1)
        wide = g.double()
        mu, within = share * rows.sums(wide, D), share * rows.sums(q.double(), D)
        between = share * rows.sums((wide - rows.of(mu)).square(), D)
        count = instances[:, 0].long() * positions
        group = active_group(self.process_group) if self.synchronize else None
        if group is not None:
            means, spread = torch.cat([mu, within], 1), torch.cat([between, torch.zeros_like(between)], 1)
            means, spread, count = MergeOverRanks.apply(means, spread, count, group)  # type: ignore[no-untyped-call]
            mu, within, between = means[:, :C], means[:, C:], spread[:, :C]
        return mu, within, between, count

    def update(self, *batch: Tensor) -> None:
        """Moves the running statistics towards m, v, M of a batch, as `scale_and_shift` gave them, if it gave them."""
        if batch and self.training and self.running_mean is not None and self.running_var is not None:
            mean, var, count = (table.detach() for table in batch)
            buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
            update_running_statistics(*buffers, mean, var, count, self.momentum)


class Statistics(NamedTuple):
    """Statistics for a batch by rows: domains, and in the last row, where they are running ones, the unseen domain."""

    rows: Rows
    positions: int  # HW
    mean: Tensor | None  # [D + 1, C]; None for those of the batch itself
    var: Tensor | None


class CalibratedBatchNorm1d(CalibratedBatchNorm):
    __doc__ = CalibratedBatchNorm.__doc__
    dimensions = (2, 3)


class CalibratedBatchNorm2d(CalibratedBatchNorm):
    __doc__ = CalibratedBatchNorm.__doc__
    dimensions = (4,)


class CalibratedInstanceNorm2d(nn.Module):
    """CIN: instance norm with a gate that sees the contrast which the norm removes.

        y = gamma sigmoid(w log sqrt(q + eps) + b) (x - g) / sqrt(q + eps) + beta

    w [C] starts at 0 and b [C] at 1. No statistics of the batch: the same in training and eval. Source: inspired by
    CFD; the formula is ours.

    Args:
        num_features: C.
        activation: None or "relu", applied after the residual.

    forward(x, *, residual=None, activation=None): x [N, C, H, W]; residual and activation as in DomainBatchNorm2d.
    """

    takes_residual = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be positive, not {num_features}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', not {activation!r}")
        self.num_features, self.eps, self.activation = num_features, eps, activation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **place))  # gamma
        self.bias = nn.Parameter(torch.empty(num_features, **place))  # beta
        self.scale_weight = nn.Parameter(torch.empty(num_features, **place))  # w
        self.scale_bias = nn.Parameter(torch.empty(num_features, **place))  # b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w = 0, b = 1, gamma = 1, beta = 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.scale_weight)
        nn.init.ones_(self.scale_bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, activation={self.activation}"

    def calibration(self) -> tuple[Tensor, ...]:
        """w, b, gamma, beta: the parameters of `scale_and_shift`."""
        return self.scale_weight, self.scale_bias, self.weight, self.bias

    def scale_and_shift(
        self, q: Tensor, scale: Tensor, gate: Tensor, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A, B [N, C] from instance variances."""
        return calibrated_instance_scale(q, scale, gate, gamma, self.eps), beta.expand_as(q)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be [N, {self.num_features}, H, W], not {list(x.shape)}")

        def coefficients(g: Tensor, q: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            return self.scale_and_shift(q, *parameters)

        activation = activation or self.activation
        return normalize(x, coefficients, *self.calibration(), residual=residual, activation=activation)[0]


def calibrated_instance_scale(q: Tensor, scale: Tensor, gate: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """A [N, C] of CIN: gamma sigmoid(w log sqrt(q + eps) + b) / sqrt(q + eps)."""
    return gamma * torch.sigmoid(0.5 * scale * (q + eps).log() + gate) * (q + eps).rsqrt()
