"""CovLasso where the logits are linear in few features: Sigma = W H W', never formed.

    logits = hidden W' (+ bias)      hidden [N, d], W [n, d]      H [d, d] covariance of hidden      d << n

is the last layer of a classifier with very many outputs, such as a language model's vocabulary. A gradient needs no row
of Sigma: Sigma theta - c_t = W (H u) with u = W' theta - w_t. The method is that of working sets, for all targets of a
call at once:

1. a pass: G = W V, V [d, T] the vectors H u, over blocks of the rows of W; of what violates the optimality conditions
   outside the working set, the worst columns of each target, at most as many as the set holds (64 to 512);
2. the covariance among the columns of each working set, W_M H W_M', grows by their rows, in float64;
3. `torch.ops.neuraldeps.covlasso` solves all working sets, each from its last support and signs;
4. until a pass in float64 finds no violation in any of the n columns: this pass is the certificate. Passes before it
   are in float32 where W is.

A number of nonzeros is reached by homotopy over all columns: between two events (a column joins, a coefficient
vanishes) coefficients and gradient are linear in lam, and one pass of two vectors a target finds the next event.

Cost of a pass: 2 n d T flops; a penalty takes some ten, a number of nonzeros twice as many as the path has events.
Memory besides W and the results: some multiples of `_BLOCK` values for a pass and of `_GRAM` for the working sets,
whose covariances are held up to `_HELD` entries (0.5 GB), or those of one group of targets. Results are those of any
other batch of targets to rounding, not to the bit, as with all matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuraldeps_kernels.ops.covariance import covariance
from neuraldeps_kernels.ops.covlasso_rules import Solved, Start

_BLOCK = 1 << 23  # values of a pass held at once: rows of W, and products
_GRAM = 1 << 23  # entries of the covariances among working sets solved at once
_HELD = 1 << 26  # entries of all such covariances; beyond it half of the targets wait
_TARGETS = 1024  # targets of a chunk
_LEAST_GROWTH, _MOST_GROWTH = 64, 512  # columns a round may add to a working set

_SHORTEST = 1e-12  # of lambda_max / 2: segments of a path below are ties
_DEPENDENT = 1e-12  # of a variance: less left of it by the active columns means dependence
_END_OF_PATH = 0.999  # position on a last segment that has too few nonzeros

_CONVERGED, _CAPPED, _COLLINEAR, _TOO_FEW = 0, 1, 2, 4  # of STATUS_NAMES


class FactoredCovariance:
    """Covariance of logits `hidden @ weight.T + bias`, kept as the covariance of `hidden` and `weight`.

    Args:
        hidden: [N, d] features of N samples; any dtype that `covariance` takes, which computes H in float64.
        weight: [n, d], on the device of `hidden`. float32 and float64 are used as they are and not copied; float16 and
            bfloat16 become float32.
        bias: [n], shifts the mean only.
        center: as in `covariance`.

    Raises:
        ValueError: a shape or a device does not fit, or an entry is not finite (checked on the CPU).
        TypeError: a dtype is not floating point.

    `FactoredCovariance.from_moments` takes the covariance of the features instead, as a `CovarianceAccumulator` gives
    it for features that arrive in chunks. Solutions are float64, and not differentiable in `hidden` and `weight`.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, center: bool = True) -> None:
        self._set(covariance(hidden.detach(), center=center), weight, hidden.detach().double().mean(0), bias)

    @classmethod
    def from_moments(
        cls,
        hidden_cov: Tensor,
        weight: Tensor,
        *,
        hidden_mean: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> FactoredCovariance:
        """From the covariance [d, d] and the mean [d] of the features; without the mean, `mean` is None."""
        self = cls.__new__(cls)
        self._set(hidden_cov.detach().double(), weight, hidden_mean, bias)
        return self

    def _set(self, hidden_cov: Tensor, weight: Tensor, hidden_mean: Tensor | None, bias: Tensor | None) -> None:
        _check_factors(hidden_cov, weight, hidden_mean, bias)
        half = weight.dtype in (torch.float16, torch.bfloat16)
        self.weight = (weight.float() if half else weight).detach().contiguous()
        self.hidden_cov = (hidden_cov + hidden_cov.T) / 2
        self.mean: Tensor | None = None
        if hidden_mean is not None:
            shift = 0.0 if bias is None else bias.detach().double()
            self.mean = torch.cat([part @ hidden_mean.detach().double() for _, part in self._parts()]) + shift

    @property
    def shape(self) -> torch.Size:
        """[n, n]."""
        return torch.Size((len(self.weight), len(self.weight)))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def diagonal(self) -> Tensor:
        """Variances [n], summed in float64."""
        return torch.cat([self._variances(part) for _, part in self._parts()]).to(self.dtype)

    def rows(self, targets: Tensor | Sequence[int]) -> Tensor:
        """Rows [T, n] of the covariance, summed in float64."""
        targets = torch.as_tensor(targets, device=self.device)
        v = self.weight[targets].double() @ self.hidden_cov
        out = torch.empty(len(v), len(self.weight), dtype=self.dtype, device=self.device)
        for columns, product in self.products(v):
            out[:, columns] = product.to(self.dtype)
        return out

    def dense(self) -> Tensor:
        """The whole covariance [n, n], symmetric: for small n."""
        every = self.rows(torch.arange(len(self.weight), device=self.device))
        return (every + every.T) / 2

    def products(self, v: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """v W' for v [T, d] in `dtype`: blocks of columns and the products [T, b] there."""
        v = v.to(dtype)
        for columns, part in self._parts(len(v), dtype):
            yield columns, v @ part.T

    def variances(self, targets: Tensor) -> Tensor:
        """[T] float64."""
        return self._variances(self.weight[targets].double())

    def _variances(self, rows: Tensor) -> Tensor:
        return ((rows @ self.hidden_cov) * rows).sum(1).clamp_min(0.0)

    def _parts(self, width: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of the weight, of a size that leaves room for `width` products a row."""
        n, d = self.weight.shape
        size = max(256, _BLOCK // (width + d))
        for first in range(0, n, size):
            rows = slice(first, min(n, first + size))
            yield rows, self.weight[rows].to(dtype)

    def __repr__(self) -> str:
        n, d = self.weight.shape
        return f"FactoredCovariance(n={n}, rank<={d}, dtype={self.dtype}, device={self.device})"


def _check_factors(hidden_cov: Tensor, weight: Tensor, hidden_mean: Tensor | None, bias: Tensor | None) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, not {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, not {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [n, d] with n, d >= 1, not {list(weight.shape)}")
    n, d = weight.shape
    if hidden_cov.shape != (d, d):
        raise ValueError(f"the covariance of hidden must be [{d}, {d}] beside weight, not {list(hidden_cov.shape)}")
    for name, value, shape in (("bias", bias, (n,)), ("the mean of hidden", hidden_mean, (d,))):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} beside weight [{n}, {d}], not {list(value.shape)}")
    for name, value in (("the covariance of hidden", hidden_cov), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != weight.device:
            raise ValueError(f"{name} is on {value.device}, but weight is on {weight.device}; they must agree")
        if value.device.type == "cpu" and not bool(value.isfinite().all()):
            raise ValueError(f"{name} has a NaN or infinite entry")


# ------------------------------------------------------------------------------------------------ solving


@dataclass(frozen=True)
class FactoredProblems:
    """T problems of one factored covariance; every method works on all of them."""

    cov: FactoredCovariance
    targets: Tensor  # [T] int64
    penalty: Tensor | None  # [n] or [T, n], infinite for what is no candidate
    nonnegative: bool
    ridge: float

    def take(self, rows: Tensor) -> FactoredProblems:
        penalty = self.penalty
        if penalty is not None and penalty.dim() == 2:
            penalty = penalty[rows]
        return FactoredProblems(self.cov, self.targets[rows], penalty, self.nonnegative, self.ridge)

    def lambda_max(self) -> Tensor:
        """[T] float64."""
        return _in_chunks(len(self.targets), lambda rows: self.take(rows)._lambda_max())

    def solve(self, lams: Tensor, tol: float, max_pivots: int, capacity: int, start: Start | None = None) -> Solved:
        """As `covlasso_rules.solve_targets`, for lams [T] or [T, L] of any number of targets."""
        shape = lams.shape
        lams = lams.reshape(shape[0], -1)
        out = _Results.empty(self, lams.shape[1], capacity)
        for first in range(0, len(lams), _TARGETS):
            rows = torch.arange(first, min(len(lams), first + _TARGETS), device=lams.device)
            solver = _Solver(self, lams, tol, max_pivots, out)
            solver.follow([solver.begin(rows, None if start is None else tuple(x[rows] for x in start))])
        return (
            out.value.view(*shape, capacity),
            out.index.view(*shape, capacity),
            out.count.view(shape),
            out.info.view(*shape, -1),
        )

    def top_k(self, k: int, tol: float, max_pivots: int, position: float) -> tuple[Solved, Tensor]:
        """As `torch.ops.neuraldeps.covlasso_top_k`, for any number of targets."""
        device, count_all = self.cov.device, len(self.targets)
        lam = torch.zeros(count_all, dtype=torch.float64, device=device)
        complete = torch.zeros(count_all, dtype=torch.bool, device=device)
        spent = torch.zeros_like(self.targets)
        value = torch.zeros(count_all, k, dtype=torch.float64, device=device)
        index = torch.zeros(count_all, k, dtype=torch.int32, device=device)
        size = max(1, min(_TARGETS, _GRAM // (k + 8) ** 2))
        for rows in torch.arange(count_all, device=device).split(size):
            path = _Homotopy(self.take(rows), k, max_pivots)
            path.follow()
            at = torch.where(path.complete, position, _END_OF_PATH)
            lam[rows], complete[rows] = 2 * (path.high - at * (path.high - path.low)), path.complete
            spent[rows] = path.pivots
            order = (path.sign == 0).int().argsort(dim=1, stable=True)[:, :k]
            value[rows, : order.shape[1]] = path.sign.gather(1, order)
            index[rows, : order.shape[1]] = path.sets.index.gather(1, order).int()
        start = (value, index, torch.where(complete, k, 0).int())
        value, index, count, info = self.solve(lam, tol, max_pivots, k, start)
        status = info[:, 4]
        missed = torch.where(complete, _COLLINEAR, _TOO_FEW).double()
        status = torch.where((status == _CONVERGED) & (count != k), missed, status)
        info[:, 3] += spent
        info[:, 4] = torch.where(~complete & (spent >= max_pivots), float(_CAPPED), status)
        return (value, index, count, info), lam

    def _lambda_max(self) -> Tensor:
        best = torch.zeros(len(self.targets), dtype=torch.float64, device=self.cov.device)
        for columns, g in self.cov.products(-self.own()):
            strength = self.pull(g) / self.factors(columns)
            best = torch.maximum(best, self.without_target(strength, columns, 0.0).amax(1))
        return 2 * best

    def own(self) -> Tensor:
        """H w_t of every target: [T, d] float64."""
        return self.cov.weight[self.targets].double() @ self.cov.hidden_cov

    def pull(self, g: Tensor) -> Tensor:
        """How strongly a gradient asks for its coefficient to become nonzero."""
        return -g if self.nonnegative else g.abs()

    def factors(self, columns: slice) -> Tensor:
        """Penalty factors of some columns: [1] or [T, b] or [b], float64."""
        if self.penalty is None:
            return torch.ones(1, dtype=torch.float64, device=self.cov.device)
        return self.penalty[..., columns].double()

    def factors_at(self, index: Tensor) -> Tensor:
        """Penalty factors [T, M] float64 of columns index [T, M]; infinite at index -1 and at the target itself."""
        if self.penalty is None:
            factors = torch.ones(index.shape, dtype=torch.float64, device=index.device)
        else:
            factors = self.penalty.expand(len(index), -1).gather(1, index.clamp_min(0)).double()
        return factors.masked_fill((index < 0) | (index == self.targets[:, None]), torch.inf)

    def without_target(self, x: Tensor, columns: slice, value: float) -> Tensor:
        return _put(x, self.targets[:, None], columns, value)

    def rows_of_weight(self, index: Tensor) -> Tensor:
        """W at columns index [T, M], zero at index -1: [T, M, d] float64."""
        return self.cov.weight[index.clamp_min(0)].double().masked_fill_((index < 0)[..., None], 0.0)

    def combined(self, index: Tensor, value: Tensor) -> Tensor:
        """W' theta [T, d] float64 of coefficients value [T, M] in columns index [T, M]."""
        out = torch.empty(len(index), self.cov.weight.shape[1], dtype=torch.float64, device=index.device)
        step = max(1, _BLOCK // max(1, index.shape[1] * out.shape[1]))
        for first in range(0, len(index), step):
            some = slice(first, first + step)
            out[some] = (value[some, None, :] @ self.rows_of_weight(index[some]))[:, 0]
        return out


def _put(x: Tensor, index: Tensor, columns: slice, value: float) -> Tensor:
    """x [T, b], the columns `columns` of something, with `value` at the columns index [T, M]; in place."""
    row, place = ((index >= columns.start) & (index < columns.stop)).nonzero(as_tuple=True)
    x[row, index[row, place] - columns.start] = value
    return x


def _read(x: Tensor, index: Tensor, columns: slice, out: Tensor) -> None:
    """Into out [T, M] the entries of x [T, b], the columns `columns` of something, at the columns index [T, M]."""
    row, place = ((index >= columns.start) & (index < columns.stop)).nonzero(as_tuple=True)
    out[row, place] = x[row, index[row, place] - columns.start].to(out.dtype)


def _in_chunks(count: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat(
        [function(rows) for rows in torch.arange(count).split(_TARGETS)] or [torch.empty(0, dtype=torch.float64)]
    )


@dataclass(frozen=True)
class _Results:
    """Outputs of T targets along L penalties, as the operator returns them."""

    value: Tensor  # [T, L, capacity]
    index: Tensor
    count: Tensor  # [T, L]
    info: Tensor  # [T, L, 6]

    @classmethod
    def empty(cls, problems: FactoredProblems, num_lams: int, capacity: int) -> _Results:
        shape, device = (len(problems.targets), num_lams), problems.cov.device
        return cls(
            torch.zeros(*shape, capacity, dtype=torch.float64, device=device),
            torch.zeros(*shape, capacity, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(*shape, 6, dtype=torch.float64, device=device),
        )

    def write(self, rows: Tensor, lam: int, index: Tensor, value: Tensor) -> Tensor:
        """Coefficients value [R, M] in columns index [R, M]; returns which supports were cut."""
        capacity = self.value.shape[2]
        nonzero = value != 0
        columns = torch.where(nonzero, index, torch.iinfo(torch.int64).max)
        columns, order = columns.sort(1)
        width = min(capacity, columns.shape[1])
        count = nonzero.sum(1)
        inside = torch.arange(width, device=index.device) < count[:, None]
        self.index[rows, lam, :width] = torch.where(inside, columns[:, :width], 0).int()
        self.value[rows, lam, :width] = torch.where(inside, value.gather(1, order)[:, :width], 0.0)
        self.count[rows, lam] = count.clamp_max(capacity).int()
        return count > capacity


@dataclass
class _WorkingSets:
    """Of R targets: M columns each, -1 where a target has fewer, and the last solution there."""

    rows: Tensor  # [R] numbers of the targets
    top: Tensor  # [R] lambda_max / 2
    own: Tensor  # [R, d] H w_t
    index: Tensor  # [R, M]
    value: Tensor  # [R, M] coefficients; their signs alone matter before the first solve
    pivots: Tensor  # [R] at the present penalty
    status: Tensor  # [R] of the last solve
    live: Tensor  # [R] bool: not yet solved at the present penalty
    cross: Tensor  # [R, M] covariance with the target
    cov: Tensor  # [R, M, M] float64

    @classmethod
    def empty(cls, rows: Tensor, top: Tensor, own: Tensor) -> _WorkingSets:
        none, pivots, status = own.new_zeros(len(rows), 0), torch.zeros_like(rows), torch.zeros_like(rows)
        live = torch.ones_like(rows, dtype=torch.bool)
        return cls(rows, top, own, none.long(), none, pivots, status, live, none, none[..., None].expand(-1, -1, 0))

    @property
    def width(self) -> int:
        return self.index.shape[1]

    def most(self) -> int:
        """Nonzeros of the largest support."""
        return int((self.value != 0).sum(1).max()) if self.value.numel() else 0

    def packed(self) -> Tensor:
        """[R, most] places in the working sets, those of nonzero coefficients first."""
        return (self.value == 0).int().argsort(dim=1, stable=True)[:, : self.most()]

    def supports(self) -> tuple[Tensor, Tensor]:
        """Columns, -1 where there are fewer, and coefficients: [R, most] each."""
        order = self.packed()
        value = self.value.gather(1, order)
        return self.index.gather(1, order).masked_fill(value == 0, -1), value

    def take(self, some: Tensor) -> _WorkingSets:
        return _WorkingSets(*(x[some] for x in vars(self).values()))

    def bare(self) -> _WorkingSets:
        """The live ones, without the covariances, for a pass."""
        small = {name: x[self.live] for name, x in vars(self).items() if name not in ("cross", "cov")}
        none = self.own.new_zeros(len(small["rows"]), 0)
        return _WorkingSets(**small, cross=none, cov=none)

    def without_cov(self) -> _WorkingSets:
        return replace(self, cov=self.own.new_zeros(len(self.rows), 0, 0))

    def widened(self, by: int) -> None:
        """Room for more columns."""
        pad = torch.nn.functional.pad
        self.index = pad(self.index, (0, by), value=-1)
        self.value, self.cross = pad(self.value, (0, by)), pad(self.cross, (0, by))
        self.cov = pad(self.cov, (0, by, 0, by))

    def compact(self) -> None:
        """Drops the columns without a coefficient."""
        order = self.packed()
        across = order[:, :, None].expand(-1, -1, self.width)
        self.cov = self.cov.gather(1, across).gather(2, order[:, None, :].expand(-1, order.shape[1], -1))
        self.cross = self.cross.gather(1, order)
        self.index, self.value = self.supports()


def _joined(groups: list[_WorkingSets]) -> _WorkingSets:
    """The live ones of all groups, without the covariances."""
    parts = [group.bare() for group in groups]
    width = max(part.width for part in parts)
    for part in parts:
        by = (0, width - part.width)
        part.index, part.value = (
            torch.nn.functional.pad(x, by, value=v) for x, v in ((part.index, -1), (part.value, 0))
        )
    return _WorkingSets(*(torch.cat(x) for x in zip(*(vars(part).values() for part in parts), strict=True)))


def _extend(problems: FactoredProblems, sets: _WorkingSets, at: Tensor, columns: Tensor) -> None:
    """Adds columns [len(at), p], -1 for none, to the working sets number `at`."""
    size, p = sets.width, columns.shape[1]
    sets.widened(p)
    sets.index[at, size:] = columns
    step = max(1, _BLOCK // max(1, (size + 2 * p) * sets.own.shape[1]))
    for first in range(0, len(at), step):
        some = at[first : first + step]
        added = problems.rows_of_weight(columns[first : first + step])
        sets.cross[some, size:] = (added @ sets.own[some, :, None])[..., 0]
        added_h = added @ problems.cov.hidden_cov
        among = added_h @ added.mT
        sets.cov[some, size:, size:] = (among + among.mT) / 2
        if size:
            across = added_h @ problems.rows_of_weight(sets.index[some, :size]).mT
            sets.cov[some, size:, :size] = across
            sets.cov[some, :size, size:] = across.mT


@dataclass(frozen=True)
class _Pass:
    """What a pass over all columns found for R targets."""

    violators: Tensor  # [R, p] the worst outside the working sets, -1 where there are fewer
    worst: Tensor  # [R] the largest violation off the support
    reach: Tensor  # [R] the largest pull over its bound off the support
    g: Tensor  # [R, k] the gradient at the support, without ridge


class _Solver:
    """Problems along their penalties lams [T, L], answers written to `out`."""

    def __init__(self, problems: FactoredProblems, lams: Tensor, tol: float, max_pivots: int, out: _Results) -> None:
        self.problems, self.lams, self.tol, self.max_pivots, self.out = problems, lams, tol, max_pivots, out

    def begin(self, rows: Tensor, start: Start | None) -> _WorkingSets:
        """Working sets of some targets: the supports given, or none."""
        these = self.problems.take(rows)
        sets = _WorkingSets.empty(rows, these.lambda_max() / 2, these.own())
        if start is not None:
            value, index, number = start
            used = (torch.arange(index.shape[1], device=index.device) < number[:, None]) & (value != 0)
            if self.problems.nonnegative:
                used &= value > 0
            index = index.long().masked_fill(~used, -1)
            index = index.masked_fill(these.factors_at(index).isinf(), -1)
            _extend(self.problems, sets, torch.arange(len(rows), device=rows.device), index)
            sets.value = torch.where(index >= 0, value.double(), 0.0)
        return sets

    def follow(self, groups: list[_WorkingSets], first: int = 0) -> None:
        """The penalties from number `first` on, which may be under way. The groups of targets have working sets of
        their own size, but share every pass.
        """
        for lam in range(first, self.lams.shape[1]):
            if lam > first:
                for group in groups:
                    group.pivots, group.live = torch.zeros_like(group.pivots), torch.ones_like(group.live)
                    if group.width > 2 * group.most() + _LEAST_GROWTH:
                        group.compact()
            while any(bool(group.live.any()) for group in groups):
                for group in groups:
                    if group.width and bool(group.live.any()):
                        self.solve_sets(group, lam)
                violators = self.scan(_joined(groups), lam)
                groups[:] = [part for group in groups for part in self.grown(group, violators)]
                if len(groups) > 1 and sum(group.cov.numel() for group in groups) > _HELD:
                    waiting = [group.without_cov() for group in groups[len(groups) // 2 :]]
                    del groups[len(groups) // 2 :]
                    self.follow(groups, lam)
                    groups.clear()
                    self.follow([self.with_cov(group) for group in waiting], lam)
                    return

    def with_cov(self, sets: _WorkingSets) -> _WorkingSets:
        """What `without_cov` has left out, computed again."""
        filled = replace(sets, index=sets.index[:, :0], value=sets.value[:, :0], cross=sets.cross[:, :0])
        _extend(self.problems, filled, torch.arange(len(sets.rows), device=sets.rows.device), sets.index)
        filled.value = sets.value
        return filled

    def grown(self, group: _WorkingSets, violators: Tensor) -> list[_WorkingSets]:
        """The group, or its halves if it is too large, with its violators [T, p] added; live where there are any."""
        group.live = group.live & (violators[group.rows] >= 0).any(1)
        at = group.live.nonzero()[:, 0]
        if not len(at):
            return [group]
        columns = violators[group.rows[at]]
        columns = columns[:, : int((columns >= 0).sum(1).max())]
        if len(group.rows) > 1 and len(group.rows) * (group.width + columns.shape[1]) ** 2 > _GRAM:
            order = (violators[group.rows] >= 0).sum(1).argsort(stable=True)
            return [part for half in order.chunk(2) for part in self.grown(group.take(half), violators)]
        _extend(self.problems, group, at, columns)
        return [group]

    def solve_sets(self, sets: _WorkingSets, lam: int) -> None:
        """Solves the live working sets, each from its last solution."""
        at = sets.live.nonzero()[:, 0]
        some = sets if len(at) == len(sets.rows) else sets.take(at)
        these, order = self.problems.take(some.rows), some.packed()
        value, index, count, info = torch.ops.neuraldeps.covlasso(
            some.cov,
            torch.arange(len(at), device=at.device),
            self.lams[some.rows, lam],
            these.factors_at(some.index),
            self.tol / 4,
            self.max_pivots,
            some.width,
            some.cross,
            self.problems.cov.variances(these.targets),
            these.nonnegative,
            these.ridge,
            some.value.gather(1, order),
            order.int(),
            (some.value != 0).sum(1).int(),
        )
        inside = torch.arange(index.shape[1], device=index.device) < count[:, None]
        sets.value[at] = torch.zeros_like(some.value).scatter_add_(1, index.long(), torch.where(inside, value, 0.0))
        sets.pivots[at] += info[:, 3].long()
        sets.status[at] = info[:, 4].long()

    def scan(self, sets: _WorkingSets, lam: int) -> Tensor:
        """Violators [T, p] outside the working sets by number of the target, -1 for none. Where there are none, and
        where no pivots are left, the answer is written.
        """
        u = self.residual(sets)
        spent = (sets.status == _CAPPED) | (sets.pivots >= self.max_pivots)
        certify = torch.ones_like(spent)
        found = torch.full((len(self.lams), max(_LEAST_GROWTH, min(_MOST_GROWTH, sets.width))), -1, device=u.device)
        if self.problems.cov.dtype != torch.float64:
            rough = self.all_columns(sets, u, lam, found.shape[1], self.problems.cov.dtype).violators
            certify = spent | (rough < 0).all(1)
            found[sets.rows[~certify]] = rough[~certify]
        at = certify.nonzero()[:, 0]
        if len(at):
            some, u, spent = sets.take(at), u[at], spent[at]
            exact = self.all_columns(some, u, lam, found.shape[1], torch.float64)
            done = spent | (exact.violators < 0).all(1)
            found[some.rows[~done]] = exact.violators[~done]
            self.report(some, u, lam, exact, done)
        return found

    def residual(self, sets: _WorkingSets) -> Tensor:
        """u = W' theta - w_t: [R, d] float64."""
        these = self.problems.take(sets.rows)
        return these.combined(*sets.supports()) - these.cov.weight[these.targets].double()

    def all_columns(self, sets: _WorkingSets, u: Tensor, lam: int, most: int, dtype: torch.dtype) -> _Pass:
        """A pass in `dtype`, u as of `residual`. In float64 all of the answer is meant, else the violators alone."""
        these, support = self.problems.take(sets.rows), sets.supports()[0]
        a = (self.lams[sets.rows, lam] / 2).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        best, found = [u.new_zeros(len(u), 0, dtype=dtype)], [support[:, :0]]
        worst, reach, at_support = u.new_zeros(len(u)), u.new_zeros(len(u)), u.new_zeros(support.shape)
        for columns, g in these.cov.products(u @ these.cov.hidden_cov, dtype):
            _read(g, support, columns, at_support)
            pull = _put(these.without_target(these.pull(g), columns, 0.0), support, columns, 0.0)
            bound = (a * these.factors(columns)).to(dtype)
            if dtype == torch.float64:
                reach = torch.maximum(reach, (pull / bound).amax(1))
                worst = torch.maximum(worst, (pull - bound).amax(1))
            outside = _put(these.without_target(pull.sub_(bound), columns, -torch.inf), sets.index, columns, -torch.inf)
            top = outside.topk(min(most, outside.shape[1]), dim=1)
            best.append(top.values)
            found.append(top.indices + columns.start)
        excess = torch.cat(best, 1)
        excess, order = excess.topk(min(most, excess.shape[1]), dim=1)
        violators = torch.cat(found, 1).gather(1, order).masked_fill(excess <= (self.tol / 2 * sets.top)[:, None], -1)
        return _Pass(torch.nn.functional.pad(violators, (0, most - order.shape[1]), value=-1), worst, reach, at_support)

    def report(self, sets: _WorkingSets, u: Tensor, lam: int, found: _Pass, done: Tensor) -> None:
        """Writes the answers of those `done`, from u as of `residual` and a pass in float64."""
        these = self.problems.take(sets.rows)
        index, theta = sets.supports()
        bound = torch.where(index < 0, 0.0, (self.lams[sets.rows, lam] / 2)[:, None] * these.factors_at(index))
        g = torch.where(index < 0, 0.0, found.g + these.ridge * theta)
        worst = torch.cat([found.worst[:, None], (g + bound * theta.sign()).abs()], 1).amax(1)
        on_support = torch.where(bound > 0, g.abs() / bound, 0.0)
        reach = torch.cat([found.reach[:, None], on_support], 1).amax(1)
        own_rows = these.cov.weight[these.targets].double()
        variance, linear = (own_rows * sets.own).sum(1), ((u + own_rows) * sets.own).sum(1)
        err2 = ((u @ these.cov.hidden_cov) * u).sum(1)
        ridged, tau = err2 + these.ridge * theta.square().sum(1), 1 / reach.clamp_min(1.0)
        gap = ridged + 2 * (bound * theta.abs()).sum(1) - tau * (2 * (variance - linear) - tau * ridged)
        violation = torch.where(sets.top > 0, worst / sets.top, 0.0)
        cut = self.out.write(sets.rows[done], lam, index[done], theta[done])
        missed = torch.where(sets.status == _CONVERGED, _COLLINEAR, sets.status)
        status = torch.where(violation <= self.tol, _CONVERGED, missed)
        info = torch.stack([err2, gap, violation, sets.pivots.double(), status.double(), 2 * sets.top], 1)
        self.out.info[sets.rows[done], lam] = info[done]
        self.out.info[sets.rows[done][cut], lam, 4] = _CAPPED


# ------------------------------------------------------------------------------------------------ homotopy


class _Homotopy:
    """Paths of R targets from lambda_max down to the first segment with k nonzeros, or to the end; in float64.

    The active columns are those of the working set with a sign. With a = lam / 2 the coefficients are
    inv(S_AA) (c_A - a p_A sign_A); as a falls by t they move by t step, and the gradient by t slope.
    """

    def __init__(self, problems: FactoredProblems, k: int, max_pivots: int) -> None:
        self.problems, self.k, self.max_pivots = problems, k, max_pivots
        rows = torch.arange(len(problems.targets), device=problems.cov.device)
        self.sets = _WorkingSets.empty(rows, problems.lambda_max() / 2, problems.own())
        self.sign = self.sets.value  # [R, M]
        self.a, self.high, self.low = (self.sets.top.clone() for _ in range(3))
        self.complete = torch.zeros_like(rows, dtype=torch.bool)
        self.pivots = torch.zeros_like(rows)
        self.left = torch.full_like(rows, -1)  # the column that has just left
        self.barred = torch.zeros(len(rows), problems.cov.shape[0], dtype=torch.bool, device=rows.device)

    def follow(self) -> None:
        """`high` and `low` become the ends of the segment, `complete` where it has k nonzeros; without one, those of
        the last segment that has fewer.
        """
        live = torch.arange(len(self.a), device=self.a.device)
        while True:
            shortest = _SHORTEST * self.sets.top
            live = live[(self.a[live] > shortest[live]) & (self.pivots[live] < self.max_pivots)]
            if not len(live):
                return
            value, step = self.coefficients(live)
            length, leaving, joining = self.next_event(live, value, step)
            event = torch.maximum(leaving, joining) >= 0
            low = torch.where(event, self.a[live] - length, 0.0)
            count, visible = (self.sign[live] != 0).sum(1), length > shortest[live]
            kept = visible & (count <= self.k)
            self.high[live[kept]], self.low[live[kept]] = self.a[live[kept]], low[kept]
            self.complete[live] = visible & (count == self.k)
            goes_on = event & ~self.complete[live]
            live, leaving, joining = live[goes_on], leaving[goes_on], joining[goes_on]
            self.a[live] = low[goes_on]
            self.left[live] = -1
            self.pivots[live] += 1
            self.drop(live[leaving >= 0], leaving[leaving >= 0])
            self.join(live[joining >= 0], joining[joining >= 0])

    def coefficients(self, live: Tensor) -> tuple[Tensor, Tensor]:
        """On the active columns, at the present a: coefficients and how they move as a falls; [len(live), M] each."""
        factor, pull = self.factor(live), self.pulls(live)
        right = torch.where(pull == 0, 0.0, self.sets.cross[live] - self.a[live, None] * pull)
        solved = torch.cholesky_solve(torch.stack([right, pull], 2), factor)
        return solved[..., 0], solved[..., 1]

    def pulls(self, live: Tensor) -> Tensor:
        """penalty_j sign_j, 0 where not active."""
        factors = self.problems.take(live).factors_at(self.sets.index[live])
        return torch.where(self.sign[live] == 0, 0.0, factors * self.sign[live])

    def factor(self, live: Tensor) -> Tensor:
        """Cholesky factor of the ridged S_AA [len(live), M, M]; rows of the identity for what is not active."""
        active = self.sign[live] != 0
        eye = torch.eye(self.sets.width, dtype=torch.float64, device=live.device)
        system = self.sets.cov[live] + self.problems.ridge * eye
        factor: Tensor = torch.linalg.cholesky_ex(torch.where(active[:, :, None] & active[:, None, :], system, eye))[0]
        return factor

    def next_event(self, live: Tensor, value: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far a falls until coefficient number `leaving` vanishes or column `joining` enters, -1 if not."""
        these, a, pull = self.problems.take(live), self.a[live], self.pulls(live)
        index = self.sets.index[live].masked_fill(pull == 0, -1)
        along = (pull != 0) & (value * pull > 0)
        lengths = torch.where(along & (value * step < 0), -value / step, torch.inf)
        lengths = torch.where((pull != 0) & ~along & (step * pull < 0), 0.0, lengths)  # at zero, it follows its sign
        length, leaving = a * (1 - _SHORTEST), torch.full_like(live, -1)
        if lengths.shape[1]:
            first, place = lengths.min(1)
            leaving = torch.where(first < length, place, leaving)
            length = torch.minimum(first, length)
        joining = torch.full_like(live, -1)
        u = these.combined(index, value) - these.cov.weight[these.targets].double()
        both = torch.cat([u, these.combined(index, step)]) @ these.cov.hidden_cov
        barred = self.barred[live]
        for columns, products in these.cov.products(both):
            g, slope = products.chunk(2)
            until = self.lengths_to_join(live, g, slope, these.factors(columns), columns)
            until = torch.where(barred[:, columns], torch.inf, until)
            until = _put(these.without_target(until, columns, torch.inf), index, columns, torch.inf)
            first, place = until.min(1)
            joining = torch.where(first < length, place + columns.start, joining)
            leaving = torch.where(first < length, -1, leaving)
            length = torch.minimum(first, length)
        return length, leaving, joining

    def lengths_to_join(self, live: Tensor, g: Tensor, slope: Tensor, p: Tensor, columns: slice) -> Tensor:
        """How far a falls until |g_j| reaches a p_j; a column that has just left starts there, moving away from it."""
        bound = self.a[live, None] * p
        left = torch.zeros_like(g, dtype=torch.bool)
        _put(left, self.left[live, None], columns, True)
        allowed = p.isfinite()
        below = allowed & (p - slope > _SHORTEST * p) & ~(left & (g < 0))
        length = torch.where(below, (bound + g).clamp_min(0.0) / (p - slope), torch.inf)
        if self.problems.nonnegative:
            return length
        above = allowed & (p + slope > _SHORTEST * p) & ~(left & (g > 0))
        return torch.minimum(length, torch.where(above, (bound - g).clamp_min(0.0) / (p + slope), torch.inf))

    def drop(self, rows: Tensor, place: Tensor) -> None:
        self.left[rows] = self.sets.index[rows, place]
        self.sign[rows, place] = 0.0
        self.barred[rows] = False

    def join(self, rows: Tensor, column: Tensor) -> None:
        """The columns enter against the sign of their gradient, unless they are combinations of the active ones: then
        they are barred until one of those leaves.
        """
        if not len(rows):
            return
        known = self.sets.index[rows] == column[:, None]
        added = torch.where(known.any(1), -1, column)
        if bool((added >= 0).any()):
            self.widen(rows, added)
        place = (self.sets.index[rows] == column[:, None]).int().argmax(1)
        active = self.sign[rows] != 0
        beside = torch.where(active, self.sets.cov[rows, place], 0.0)
        z = torch.linalg.solve_triangular(self.factor(rows), beside[..., None], upper=False)[..., 0]
        variance = self.sets.cov[rows, place, place] + self.problems.ridge
        independent = variance - z.square().sum(1) > _DEPENDENT * variance
        self.barred[rows, column] = ~independent
        value, _ = self.coefficients(rows)
        g = (beside * value).sum(1) - self.sets.cross[rows, place]
        entering = rows[independent]
        self.sign[entering, place[independent]] = torch.where(g > 0, -1.0, 1.0)[independent].double()

    def widen(self, rows: Tensor, columns: Tensor) -> None:
        """Adds one column to each of some working sets, -1 for none."""
        _extend(self.problems, self.sets, rows, columns[:, None])
        self.sign = torch.nn.functional.pad(self.sign, (0, 1))
