"""Training with dependencies: a penalty on how well categories explain each other, and the covariance it needs.

Notation: F [B, n] logits of a batch, Fc those less the batch mean, Theta_i [n] the coefficients of dependency i with -1
at its target t_i, held constant; e_i = Fc Theta_i [B] its residual, C_i = |Fc_{t_i}|^2 / B the variance of its target,

    R_i = (|e_i|^2 / B) / C_i     the share of the target's variance that the dependency leaves unexplained,
    dR_i/dF = 2 / (B C_i) (e_i Theta_i' - R_i Fc_{t_i} 1_{t_i}') ,

where 1_t is the unit vector of category t. Source: section 6.2 of the notes on "Neural Dependencies Emerging from
Learning Massive Categories" (arXiv 2211.12339). The paper says that a regulariser built from dependencies improves
robustness; this form of it, its gradient and its defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from neuraldeps_kernels.ops.covariance import centered_moments
from neuraldeps_kernels.ops.covlasso_solution import CovLassoSolution

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("break", "bind")


class DependencyRegularizer(nn.Module):
    """Penalty that breaks dependencies, or binds categories to them; a number to be added to the loss, with a weight.

        break: mean_i max(0, mu - R_i)     no category may be explained by its dependency beyond a share 1 - mu
        bind:  mean_i R_i                  categories shall follow their dependencies

    The dependencies are constants here. They come from `covlasso`, whose `candidates` and `targets` say which relations
    count, and are found anew now and then, as the network changes:

        statistics, regularizer = MomentumCovariance(n), DependencyRegularizer()
        for step, (x, y) in enumerate(loader):
            logits = model(x)
            statistics.update(logits)
            if step % 100 == 99:
                regularizer.refresh(nk.covlasso(statistics.compute(), lam_ratio=0.1))
            (cross_entropy(logits, y) + 0.1 * regularizer(logits)).backward()

    and `optimizer.step()` as always. Before the first `refresh` the penalty is 0. Several processes call
    `statistics.all_reduce()` before it, so that all find the same dependencies.

    Cost, with K coefficients in all: two passes over F and its gradient and 4 B K multiplications; memory beside F and
    its gradient: a transposed copy of F within the call and 2 B T numbers until the backward pass. No n x n matrix.

    Precision: float32 for float32, bfloat16 and float16 logits, float64 for float64, with autocast on or off; the
    gradient has the dtype of the logits. `torch.compile` compiles it in one graph; the first `refresh` that changes the
    number of coefficients compiles once more, for any number. Differentiable once: `create_graph=True`, and so
    `torch.func.grad`, raise RuntimeError.

    Processes: while `training` and `torch.distributed` is initialised, R_i is that of the whole batch over the
    processes of `group`, so every process has to call forward and backward alike; n + 1, 2 T and, in the backward
    pass, T numbers are added up over them. Every process returns the same value. Its gradient is that of the sum over
    processes of what they return, which after the averaging of DistributedDataParallel is the gradient of one process
    with the whole batch. In eval mode a process is on its own.

    Where the variance of a target in the batch is at most `eps`, as in a batch of one, R_i is not defined and counts
    as 1 with zero gradient: breaking, such a dependency adds nothing (for mu <= 1).

    Args:
        dependencies: of categories on categories of the same network, T of them; None for none yet.
        mode: "break" or "bind".
        mu: the share R_i from which a dependency counts as broken, in (0, 1].
        eps: smallest variance of a target, in squared logit units.
        group: processes that share a batch; default all.

    Raises:
        ValueError, TypeError: naming the argument; as `refresh`.
    """

    targets: Tensor  # int64 [T]
    row_start: Tensor  # int64 [T]: where the entries of a dependency begin
    column: Tensor  # int64 [T + K]: categories of Theta_1, Theta_2, ...
    value: Tensor  # [T + K]: their coefficients, -1 at the targets
    column_start: Tensor  # int64 [n]: the same entries by category, with T more for the variances of targets
    row: Tensor  # int64 [2 T + K]: i for a coefficient of dependency i, T + i for the variance of its target
    row_value: Tensor  # [2 T + K]: coefficients, and 1 for variances

    def __init__(
        self,
        dependencies: CovLassoSolution | None = None,
        *,
        mode: Literal["break", "bind"] = "break",
        mu: float = 0.5,
        eps: float = 1e-8,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be 'break' or 'bind', not {mode!r}")
        if not 0 < mu <= 1:
            raise ValueError(f"mu must be in (0, 1], not {mu}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        self.mode, self.mu, self.eps, self.group = mode, mu, eps, group
        for name in _BUFFERS:
            kind = torch.float32 if name.endswith("value") else torch.int64
            self.register_buffer(name, torch.zeros(0, dtype=kind))
        if dependencies is not None:
            self.refresh(dependencies)

    @property
    def num_dependencies(self) -> int:
        """T."""
        return len(self.targets)

    @torch.no_grad()
    def refresh(self, dependencies: CovLassoSolution) -> None:
        """Replaces the dependencies; they may be others, and more or fewer, than before.

        Raises:
            TypeError: `dependencies` is no CovLassoSolution.
            ValueError: a coefficient is not finite, or a category predicts itself, as between networks.
        """
        if not isinstance(dependencies, CovLassoSolution):
            raise TypeError(f"dependencies must be a CovLassoSolution, not {type(dependencies).__name__}")
        theta = dependencies.coefficients.detach()
        (T, n), device = theta.shape, self.targets.device
        targets = dependencies.targets.to(device)
        rows = torch.repeat_interleave(theta.crow_indices().diff()).to(device)
        columns, values = theta.col_indices().to(device), theta.values().to(device)
        if not bool(values.isfinite().all()):
            raise ValueError("dependencies must have finite coefficients")
        if bool((targets >= n).any()) or bool((targets[rows] == columns).any()):
            raise ValueError("dependencies must be those of one network, in which no category predicts itself")
        each = torch.arange(T, device=device)
        row, column = torch.cat([rows, each]), torch.cat([columns, targets])
        value = torch.cat([values, values.new_full((T,), -1.0)])
        by_row = row.argsort(stable=True)
        self.targets, self.column, self.value = targets, column[by_row], value[by_row]
        self.row_start = _starts(row, T)
        row, column = torch.cat([row, T + each]), torch.cat([column, targets])
        value = torch.cat([value, values.new_ones(T)])
        by_column = column.argsort(stable=True)
        self.row, self.row_value = row[by_column], value[by_column]
        self.column_start = _starts(column, n)

    def residual_ratios(self, logits: Tensor) -> Tensor:
        """R [T] of a batch of logits [B, n], float32 or float64, differentiable once.

        Raises:
            TypeError: `logits` is no tensor of float32, float64, bfloat16 or float16.
            ValueError: `logits` is not [B, n] with at least one row.
        """
        self._check(logits)
        if not self.num_dependencies:
            return logits.new_zeros(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        structure = tuple(getattr(self, name) for name in _BUFFERS)
        group = _active_group(self.group) if self.training else None
        return _ResidualRatios.apply(logits, *structure, self.eps, group)[0]  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, logits: Tensor) -> Tensor:
        """The penalty [] of logits [B, n], float32 or float64; errors as `residual_ratios`."""
        ratios = self.residual_ratios(logits)
        terms = (self.mu - ratios).clamp_min(0) if self.mode == "break" else ratios
        return terms.sum() / max(self.num_dependencies, 1)

    def extra_repr(self) -> str:
        return f"num_dependencies={self.num_dependencies}, mode={self.mode!r}, mu={self.mu}, eps={self.eps}"

    def _check(self, logits: Tensor) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a torch.Tensor, not {type(logits).__name__}")
        if logits.dtype not in _INPUT_DTYPES:
            raise TypeError(f"logits must be float32, float64, bfloat16 or float16, not {logits.dtype}")
        n = len(self.column_start) if self.num_dependencies else None
        if logits.dim() != 2 or len(logits) == 0 or (n is not None and logits.shape[1] != n):
            expected = "n" if n is None else str(n)
            raise ValueError(f"logits must be [B, {expected}] with B >= 1, not {list(logits.shape)}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Takes over the dependencies of the state, however many they are."""
        for name in _BUFFERS:
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape, dtype=stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


class MomentumCovariance(nn.Module):
    """Covariance of logits while the network changes: an exponentially weighted mean and covariance over batches.

    A batch that is t updates old has weight momentum^t, shared equally by its rows. With W the sum of the weights,
    times 1 - momentum, and mean and M those of all rows under these weights, a batch of mean m and covariance C does

        W' = momentum W + w,  w = 1 - momentum,  d = m - mean,
        mean' = mean + (w / W') d,     M' = momentum M + w C + (momentum W w / W') d d' ,

    and S = M / W. As W counts what has been seen, the first values are as unbiased as later ones: nothing is mixed
    with a start of zero. State: buffers `weight` [], `mean` [n] and `moment` [n, n], float64, part of the state
    dict, on the device of the module.

    An update costs the covariance of the batch, B n^2 operations, and a pass over n^2 numbers: for large n, update
    every few steps. Processes update on their own; `all_reduce`, called by all of them before `compute`, makes the
    state that of the joined batches.

    Args:
        n: categories.
        momentum: what is kept of the past at an update, in [0, 1): 0.99 remembers some 100 batches.

    Raises:
        ValueError: `n` or `momentum` is out of range.
    """

    weight: Tensor
    mean: Tensor
    moment: Tensor

    def __init__(self, n: int, momentum: float = 0.99) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        self.n, self.momentum = n, momentum
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(n, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(n, n, dtype=torch.float64))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Adds a batch of logits [B, n], of which no gradient is recorded.

        Raises:
            ValueError: `logits` is not [B, n] with at least one row or, on the CPU, has values that are not finite.
            TypeError: `logits` has another dtype than float32, float64, bfloat16 and float16.
        """
        if logits.dtype not in _INPUT_DTYPES:
            raise TypeError(f"logits must be float32, float64, bfloat16 or float16, not {logits.dtype}")
        if logits.dim() != 2 or len(logits) == 0 or logits.shape[1] != self.n:
            raise ValueError(f"logits must be [B, {self.n}] with B >= 1, not {list(logits.shape)}")
        count, mean, moment = (part[0] for part in centered_moments(logits.detach()[None]))
        past, share = self.momentum * self.weight, 1 - self.momentum
        weight = past + share
        delta = mean - self.mean
        self.moment.mul_(self.momentum).add_(moment * (share / count))
        self.moment.addr_(delta * (past * share / weight), delta)
        self.mean.add_(delta * (share / weight))
        self.weight.copy_(weight)

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Joins the batches of all processes of `group` (default: all), which have made the same number of updates.

        Afterwards all hold the same state: that of one process whose batches were theirs together, if batches have the
        same size. It may be called again and again.

        Raises:
            RuntimeError: `torch.distributed` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group first")
        sums = torch.cat([self.weight[None], self.weight * self.mean])
        dist.all_reduce(sums, group=group)
        weight = sums[0]
        mean = torch.where(weight > 0, sums[1:] / weight, 0.0)
        delta = self.mean - mean
        moment = torch.addr(self.moment, delta * self.weight, delta)
        dist.all_reduce(moment, group=group)
        processes = dist.get_world_size(group)
        self.weight.copy_(weight / processes)
        self.mean.copy_(mean)
        self.moment.copy_(moment / processes)

    def compute(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """S [n, n], ready for `covlasso`; NaN before the first update."""
        return (self.moment / self.weight).to(dtype)

    def extra_repr(self) -> str:
        return f"n={self.n}, momentum={self.momentum}"


# ------------------------------------------------------------------------------------------------ residual ratios

_BUFFERS = ("targets", "row_start", "column", "value", "column_start", "row", "row_value")


class _ResidualRatios(torch.autograd.Function):
    """R [T] of F [B, n], and what its gradient needs: e [T, B], Fc_t [T, B] and 2 / (B C) [T], 0 where C <= eps.

    Both directions are sparse matrix products, rows of n or T times B numbers summed by `embedding_bag`, which reads
    every row as a whole; F is transposed for it. Sums over processes are exchanged in float64.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        row_start: Tensor,
        column: Tensor,
        value: Tensor,
        column_start: Tensor,
        row: Tensor,
        row_value: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        f = logits.T.to(dtype, memory_format=torch.contiguous_format, copy=True)  # F' [n, B]
        total, rows = f.sum(1), f.new_full((1,), f.shape[1], dtype=torch.float64)
        if group is not None:
            joined = _summed(torch.cat([total.double(), rows]), group)
            total, rows = joined[:-1], joined[-1:]
        f -= (total / rows).to(dtype)[:, None]
        e = embedding_bag(column, f, row_start, mode="sum", per_sample_weights=value.to(dtype))
        target = f[targets]
        squares = torch.cat([e.square().sum(1), target.square().sum(1)])
        if group is not None:
            squares = _summed(squares.double(), group)
        unexplained, variance = squares.view(2, -1) / rows  # [T], in squared logit units
        flat = variance <= eps
        ratios = torch.where(flat, 1.0, unexplained / variance).to(dtype)
        slope = torch.where(flat, 0.0, 2 / (rows * variance)).to(dtype)
        return ratios, e, target, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, *structure, _, ctx.group = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtype = logits.dtype
        ctx.save_for_backward(*structure[4:], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph, but e and Fc_t are constants
            raise RuntimeError("DependencyRegularizer is differentiable once: its gradient has no gradient")
        column_start, row, row_value, ratios, e, target, slope = ctx.saved_tensors
        if ctx.group is not None:
            grad = _summed(grad, ctx.group)
        pull = grad * slope
        sources = torch.cat([e * pull[:, None], target * (-pull * ratios)[:, None]])  # [2 T, B]
        grad_f = embedding_bag(row, sources, column_start, mode="sum", per_sample_weights=row_value.to(sources.dtype))
        return (grad_f.T.to(ctx.dtype).contiguous(), *[None] * 9)


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the processes of `group`."""
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values


def _active_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes to join, default all; None where this one is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def _starts(bags: Tensor, number: int) -> Tensor:
    """Where each of `number` bags begins, int64 [number], once the entries with these bags are sorted by them."""
    sizes = bags.bincount(minlength=number)
    return sizes.cumsum(0) - sizes
