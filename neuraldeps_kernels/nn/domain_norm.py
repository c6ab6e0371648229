"""Norms for batches that mix domains, each domain with its own statistics, and how ids reach them.

    x [N, C, *]      samples of any domains, * of HW positions       d [N]      domain ids in 0..D-1, -1 for unseen
    g, q [N, C]      mean and biased variance of a sample            A, B [N, C] y = act(A (x - g) + B + residual)
    m, v [D, C]      mean and biased variance of a domain            M [D]      its samples times HW

Here: domain_context, DomainBatchNorm1d/2d/3d, SyncDomainBatchNorm2d, and what the other norms by domain share with them
(calibrated_norm.py, gaussian_process_norm.py). The arithmetic is that of ops/domain_norm.py.

Source: inspired by GDNorm (arXiv 2203.01723).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuraldeps_kernels.ops.domain_norm import domain_batch_norm

if TYPE_CHECKING:
    from neuraldeps_kernels.nn.gaussian_process_norm import BatchNormPaths

UNSEEN = -1

# ------------------------------------------------------------------------------------------------ ids from outside


class Context:
    """What layers use that are passed no ids: one for the process, so that backward threads see it too."""

    domain: Tensor | int | None = None
    paths: BatchNormPaths | None = None
    path: Tensor | None = None


context = Context()


class domain_context:
    """`with domain_context(ids): model(x)`: domains of the samples for all layers that are passed none.

    Lets ids pass nn.Sequential and foreign networks. An explicit argument of a layer always wins; the innermost context
    wins among several. It belongs to the process and not to a thread: threads that run models at the same time pass ids
    explicitly. What is computed again in the backward pass (checkpointing) needs the context open there as well.

    Args:
        domain: int64 [N], or one int for the whole batch; None closes the outer context.
    """

    def __init__(self, domain: Tensor | int | None) -> None:
        self.domain = domain

    def __enter__(self) -> None:
        self._outer = context.domain
        context.domain = self.domain

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context.domain = self._outer


def domain_ids(domain: Tensor | int | None, x: Tensor, num_domains: int, seen: bool) -> Tensor:
    """Ids int64 [N] of the samples of x; `seen` where the statistics of the batch need every id."""
    if domain is None:
        domain = context.domain
    if domain is None:
        if seen and num_domains > 1:
            raise ValueError("domain must be given in training: int64 [N], an int, or by domain_context")
        domain = 0 if seen else UNSEEN
    if isinstance(domain, int):
        if not (0 if seen else UNSEEN) <= domain < num_domains:
            raise ValueError(f"domain must be in {0 if seen else UNSEEN}..{num_domains - 1}, not {domain}")
        return torch.full((x.shape[0],), domain, dtype=torch.int64, device=x.device)
    if not isinstance(domain, Tensor):
        raise TypeError(f"domain must be an int64 tensor [N] or an int, not {type(domain).__name__}")
    return domain


class Rows(NamedTuple):
    """Which row of tables [R, C] belongs to each sample."""

    row: Tensor  # int64 [N], in 0..R-1
    wrong: Tensor  # bool [N]: the id names no row

    def of(self, table: Tensor) -> Tensor:
        """The row of each sample, [N, C]; its gradient adds up in a fixed order."""
        # index_select would add atomically in its backward on CUDA, indexing in float32 on the CPU.
        return table.index_select(0, self.row) if table.device.type == "cpu" else table[self.row]

    def sums(self, table: Tensor, num_rows: int) -> Tensor:
        """Sums [R, C] of the rows of table [N, C] that belong together; those of wrong ids belong to none."""
        if table.device.type == "cpu" and not torch.compiler.is_compiling():
            return table.new_zeros(num_rows, table.shape[1]).index_add(0, self.row, table)
        member = (self.row == torch.arange(num_rows, device=table.device)[:, None]) & ~self.wrong  # [R, N]
        return torch.where(member[:, :, None], table, 0).sum(1)

    def or_nan(self, shift: Tensor) -> Tensor:
        """shift [N, C], NaN for a wrong id."""
        return torch.where(self.wrong[:, None], torch.nan, shift)


def rows_of(ids: Tensor, x: Tensor, num_rows: int, unseen: int | None = None, name: str = "domain") -> Rows:
    """Rows of ids 0..num_rows-1, and of -1 the row `unseen` if there is one.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also a wrong id.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, not {ids.dtype}")
    if ids.shape != x.shape[:1]:
        raise ValueError(f"{name} must be [{x.shape[0]}], one id for each sample of x, not {list(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"{name} is on {ids.device}, but x is on {x.device}")
    lowest = 0 if unseen is None else UNSEEN
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in ids.aminmax())
        if low < lowest or high >= num_rows:
            raise ValueError(f"{name} must hold ids in {lowest}..{num_rows - 1}, not {low if low < lowest else high}")
    row = ids.long().clamp(0, num_rows - 1)
    if unseen is not None:
        row = torch.where(ids == UNSEEN, unseen, row)
    return Rows(row, (ids < lowest) | (ids >= num_rows))


# ------------------------------------------------------------------------------------------------ tables


def pooled_statistics(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [C] of an unseen domain from those of all, [D, C]: mean, and var_k + (mean_k - mean)^2 averaged."""
    pooled = mean.mean(0)
    return pooled, (var + (mean - pooled).square()).mean(0)


# ------------------------------------------------------------------------------------------------ layers


class DomainNorm(nn.Module):
    """Parameters, buffers and state dict of a norm with statistics by domain."""

    takes_residual = True  # forward(x, residual=..., activation=...)
    dimensions: tuple[int, ...] = ()  # of x
    plain_type: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]

    weight: nn.Parameter | None  # [D, C] or [C]
    bias: nn.Parameter | None
    running_mean: Tensor | None  # [D, C]
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # int64 [D]

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        per_domain_affine: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or num_domains < 1:
            raise ValueError(f"num_features and num_domains must be positive, not {num_features} and {num_domains}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be None or in 0..1, not {momentum}")
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', not {activation!r}")
        self.num_features, self.num_domains, self.eps, self.momentum = num_features, num_domains, eps, momentum
        self.affine, self.track_running_stats, self.per_domain_affine = affine, track_running_stats, per_domain_affine
        self.activation = activation
        table = (num_domains, num_features)
        shape = table if per_domain_affine else table[1:]
        for name, fill in (("weight", 1.0), ("bias", 0.0)):
            value = nn.Parameter(torch.full(shape, fill, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
            buffer = torch.full(table, fill, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, buffer)
        counter = torch.zeros(num_domains, dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch counted."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as `reset_running_stats`."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_domains={self.num_domains}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, activation={self.activation}"
        )

    def check(self, x: Tensor) -> None:
        if x.dim() not in self.dimensions or x.shape[1] != self.num_features:
            dimensions = " or ".join(str(dimension) for dimension in self.dimensions)
            raise ValueError(
                f"x must have {dimensions} dimensions and {self.num_features} channels, not {list(x.shape)}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Values of a plain BatchNorm are those of every domain."""
        for name, value in (*self._parameters.items(), *self._buffers.items()):
            loaded = state_dict.get(prefix + name)
            if value is not None and loaded is not None and loaded.shape == value.shape[1:]:
                state_dict[prefix + name] = loaded.expand(value.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.training or not self.track_running_stats


class DomainBatchNorm(DomainNorm):
    """BatchNorm with parameters and statistics per domain, for batches that mix domains in any order.

    Training: each sample is normalised by mean and biased variance of the samples of its own domain, and running
    statistics change as those of BatchNorm (momentum, None for the cumulative average, unbiased variance), those of
    absent domains not at all, to the last bit. Eval: running statistics of the domain, for an unseen one (-1) those
    pooled over domains with the mean of weight and bias. With one domain it is BatchNorm.

    Args:
        num_features: C.
        num_domains: D.
        eps, momentum, affine, track_running_stats: as BatchNorm.
        per_domain_affine: weight and bias [D, C]; else [C], shared by all domains.
        activation: None or "relu", applied after the residual.

    forward(x, domain=None, *, residual=None, activation=None):
        x: [N, C, *], float32, float64, float16 or bfloat16. Statistics and parameters stay float32 (float64 for
            float64).
        domain: int64 [N], or an int for the whole batch. By default that of `domain_context`; without one, unseen in
            eval, while training raises ValueError unless there is one domain only.
        residual: added to the result, of the shape of x.
        activation: instead of that of the constructor.

    Raises:
        ValueError, TypeError: wrong shapes or dtypes; ids out of range on the CPU (on CUDA, where the host would have
            to wait for them, such samples become NaN).

    Source: inspired by GDNorm (arXiv 2203.01723).
    """

    def forward(
        self,
        x: Tensor,
        domain: Tensor | int | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        self.check(x)
        return domain_batch_norm(
            x,
            domain_ids(domain, x, self.num_domains, self.uses_batch),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.uses_batch,
            momentum=self.momentum,
            eps=self.eps,
            num_batches_tracked=self.num_batches_tracked,
            residual=residual,
            activation=activation or self.activation,
            group=self._group(),
            num_domains=self.num_domains,
        )

    def _group(self) -> dist.ProcessGroup | None:
        """Processes whose batches are one batch."""
        return None

    def plain(self, domain: int = UNSEEN) -> nn.Module:
        """BatchNorm that does in eval what this layer does for `domain`, followed by ReLU if that is its activation.

        Raises:
            ValueError: there is no such domain, or no running statistics.
        """
        if not UNSEEN <= domain < self.num_domains:
            raise ValueError(f"domain must be in {UNSEEN}..{self.num_domains - 1}, not {domain}")
        mean, var, weight, bias = self.row(domain)
        norm = self.plain_type(
            self.num_features, self.eps, self.momentum, affine=weight is not None, device=mean.device, dtype=mean.dtype
        )
        state = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        norm.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=False)
        norm.train(self.training)
        return norm if self.activation is None else nn.Sequential(norm, nn.ReLU())

    @torch.no_grad()
    def row(self, domain: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean, variance, weight and bias [C] of `domain` in eval."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError("track_running_stats must be True: without running statistics there is no plain BatchNorm")
        weight, bias = (
            value if value is None or not self.per_domain_affine else value.mean(0) if domain < 0 else value[domain]
            for value in (self.weight, self.bias)
        )
        if domain >= 0:
            return self.running_mean[domain], self.running_var[domain], weight, bias
        return *pooled_statistics(self.running_mean, self.running_var), weight, bias


class DomainBatchNorm1d(DomainBatchNorm):
    __doc__ = DomainBatchNorm.__doc__
    dimensions, plain_type = (2, 3), nn.BatchNorm1d


class DomainBatchNorm2d(DomainBatchNorm):
    __doc__ = DomainBatchNorm.__doc__
    dimensions, plain_type = (4,), nn.BatchNorm2d


class DomainBatchNorm3d(DomainBatchNorm):
    __doc__ = DomainBatchNorm.__doc__
    dimensions, plain_type = (5,), nn.BatchNorm3d


class SyncDomainBatchNorm2d(DomainBatchNorm2d):
    """DomainBatchNorm2d whose batch, in training, is that of all processes together.

    One exchange of [D, 2 C + 1] numbers in the forward pass and one in the backward pass; the host waits for no device.
    A process without samples of a domain, or without any, takes part like the others.

    Args:
        process_group: which processes; default all. Without torch.distributed, or alone, it is DomainBatchNorm2d.
    """

    def __init__(self, *arguments: Any, process_group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.process_group = process_group

    def _group(self) -> dist.ProcessGroup | None:
        return active_group(self.process_group) if self.uses_batch else None


def active_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group if it has several processes; None where this process is on its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None
