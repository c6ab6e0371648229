"""CovLasso: a category's logit as a sparse linear combination of the others', from the covariance alone.

For target i, with the coefficient of i itself pinned to -1, so that Theta' f is prediction minus target:

    Theta_i(lam) = argmin  Theta' S Theta + lam * sum_j penalty_j |Theta_j|

There is no factor 1/2: lam is twice the alpha of `sklearn.linear_model.Lasso`. The target may also belong to another
network (`CrossCovariance`), the coefficients may be kept nonnegative, and a ridge may be added. The solution is exact
(block active set, csrc/cpu/covlasso.cpp), any number of coefficients may be nonzero, and every target carries a
certificate. Source: papers on neural dependencies state the problem; solver, path, certificate and gradient are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuraldeps_kernels.ops.covariance import CrossCovariance
from neuraldeps_kernels.ops.covlasso_rules import INFO_FIELDS, Solved, Start, lambda_max_of, solve_targets
from neuraldeps_kernels.ops.covlasso_solution import (
    STATUS_NAMES,
    CovLassoPath,
    CovLassoSolution,
    csr,
    dense_rows,
    ranges,
)
from neuraldeps_kernels.ops.factored import FactoredCovariance, FactoredProblems
from neuraldeps_kernels.profiling import annotated

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

_CHUNK = 1 << 24  # padded coefficients held at once
_FULL_SUPPORT = 4096  # predictors up to which every support finds room at once
_FIRST_SUPPORT = 1024  # coefficients a problem may have at first, beyond that many predictors
_WORTH_A_PROBE = 1 << 18  # padded coefficients of a path from which room for all of them costs more than a few solves

__all__ = [
    "STATUS_NAMES",
    "CovLassoPath",
    "CovLassoSolution",
    "covlasso",
    "covlasso_path",
    "covlasso_top_k",
    "lambda_max",
    "solve_targets",
]

Scalar = float | int
Covariance = Tensor | CrossCovariance | FactoredCovariance


@annotated
def lambda_max(
    cov: Covariance,
    targets: Tensor | Sequence[int] | None = None,
    *,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
) -> Tensor:
    """The smallest penalty of each target at which no coefficient is nonzero: `2 max_j |S_ij| / penalty_j` over j != i.

    Args:
        cov, targets, candidates, penalty_factors: as in `covlasso`.
        nonnegative: of coefficients that may not be negative: the maximum of `S_ij`, not of its magnitude.

    Returns:
        [T] float64, differentiable in `cov`; 0 where a target is uncorrelated with every candidate.

    Raises:
        ValueError, TypeError: as `covlasso`.
    """
    return _checked_problem(cov, targets, candidates, penalty_factors, nonnegative).lambda_max()


@annotated
def covlasso(
    cov: Covariance,
    lam: Tensor | Scalar | None = None,
    *,
    lam_ratio: Tensor | Scalar | None = None,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    warm_start: CovLassoSolution | None = None,
) -> CovLassoSolution:
    """Solves CovLasso for many targets from one covariance.

    Args:
        cov: [n, n] covariance of the logits, symmetric positive semidefinite, in squared logit units. float32 and
            float64 are solved as they are; float16 and bfloat16 are computed in float32. Entries may differ from their
            mirror image by 1e-5 of the largest variance; their mean is used. On the CPU an exactly symmetric float32
            covariance of n = 16, 48, 80, ... categories, such as 10,000, is read where it is; others are copied once a
            call, which takes their memory again. Or a `FactoredCovariance`, solved in float64 and not differentiable,
            whose [n, n] covariance is never formed. Or a `CrossCovariance`: its n targets are
            then explained by its m predictors, and "n" below is m.
        lam: penalty, a positive number or [T]; squared logit units, twice the alpha of scikit-learn.
        lam_ratio: penalty as a fraction of each target's `lambda_max`, a positive number or [T]. Exactly one of `lam`
            and `lam_ratio` is given.
        targets: [T] categories to explain, default all; a repeated target is solved again.
        candidates: bool [n] or [T, n], True where a category may be a predictor; default all. The target itself never
            is, whatever the mask says, and a target without candidates has an empty support.
        penalty_factors: [n], positive multiples of the penalty of each category; default ones.
        nonnegative: only coefficients >= 0.
        ridge: adds `ridge * sum_j Theta_j^2` over the predictors to what is minimised (elastic net; squared logit
            units, as a diagonal of the covariance).
        tol: KKT violation allowed, relative to `lambda_max / 2`. float32 reaches about 1e-6, float64 1e-12.
        max_pivots: coordinates that may enter or leave before a target is given up as capped, default
            `10000 + 20 n`.
        warm_start: a solution of as many targets over the same predictors, whose supports and signs are started from,
            such as that of a slightly different covariance. It changes the time, not the result.

    Returns:
        CovLassoSolution. Its coefficients and `err2` are differentiable in `cov` and `lam` (implicit gradient on the
        support; a coefficient that is zero has zero gradient). A target that correlates with no candidate has an empty
        support and `err2 = S_ii`, whatever the penalty.

    Raises:
        ValueError: `cov` is not square, not symmetric, not finite or has a negative diagonal; `lam` or `lam_ratio` is
            not positive and finite, or both or none is given; `ridge` is negative; a target is out of range; a shape
            does not fit. On CUDA values are not checked, as that would make the host wait: a covariance with NaN
            comes back with a status other than converged.
        TypeError: an argument has the wrong dtype.

    The number of nonzeros depends on the data, so a call on CUDA waits once for the result, like `torch.nonzero`; the
    operator `torch.ops.neuraldeps.covlasso` below it never does.
    """
    problem = _checked_problem(cov, targets, candidates, penalty_factors, nonnegative, ridge)
    limits = _checked_limits(problem, tol, max_pivots)
    if (lam is None) == (lam_ratio is None):
        given = "none" if lam is None else "both"
        raise ValueError(f"exactly one of lam and lam_ratio must be given, not {given}")
    if lam_ratio is None:
        lams = _per_target("lam", lam, problem)
    else:
        lams = _per_target("lam_ratio", lam_ratio, problem) * problem.lambda_max()
    return _solved(problem, lams, limits, warm_start)


@annotated
def covlasso_path(
    cov: Covariance,
    *,
    n_lambdas: int = 20,
    lam_min_ratio: float = 1e-2,
    lams: Tensor | Sequence[float] | None = None,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    warm_start: CovLassoSolution | None = None,
) -> CovLassoPath:
    """Solves CovLasso for many targets along decreasing penalties, each solution the start of the next.

    Args:
        cov, targets, candidates, penalty_factors, nonnegative, ridge, tol, warm_start: as in `covlasso`.
        n_lambdas: number of penalties L, spaced geometrically from each target's `lambda_max` (no coefficient yet) to
            `lam_min_ratio` times that.
        lam_min_ratio: in (0, 1).
        lams: [L], or [T, L] with penalties for every target, positive and strictly decreasing; replaces the two above.
        max_pivots: as in `covlasso`, for every step from one penalty to the next.

    Returns:
        CovLassoPath. Differentiable as the result of `covlasso`. Every solution is certified by itself; one that is
        not converged is not carried on to the next penalty.

    Raises:
        ValueError: `lams` is empty, not positive or not strictly decreasing; `n_lambdas` is below 1; `lam_min_ratio`
            is not between 0 and 1; and as `covlasso`.
        TypeError: as `covlasso`.
    """
    problem = _checked_problem(cov, targets, candidates, penalty_factors, nonnegative, ridge)
    limits = _checked_limits(problem, tol, max_pivots)
    grid = _geometric_grid(problem, n_lambdas, lam_min_ratio) if lams is None else _checked_grid(lams, problem)
    solution = _solved(problem, grid, limits, warm_start)
    return CovLassoPath(
        coefficients=solution.coefficients,
        targets=solution.targets,
        lams=grid,
        lambda_max=solution.lambda_max[:, 0],
        err2=solution.err2,
        relative_error=solution.relative_error,
        n_nonzero=solution.n_nonzero,
        duality_gap=solution.duality_gap,
        kkt_violation=solution.kkt_violation,
        n_pivots=solution.n_pivots,
        status=solution.status,
    )


@annotated
def covlasso_top_k(
    cov: Covariance,
    k: int,
    *,
    position: float = 1e-3,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
) -> CovLassoSolution:
    """Solves CovLasso for many targets, each at the largest penalty that gives exactly k nonzero coefficients.

    The path is followed from `lambda_max` down (homotopy, in float64) to the first segment (low, high) on which k
    coefficients are nonzero. At `high` the k-th of them is still zero, so the largest penalty itself does not exist;
    the solution is that at `high - position (high - low)`. The number of nonzeros may fall and rise along a path: k
    nonzeros may occur again at smaller penalties.

    Args:
        cov, targets, candidates, penalty_factors, nonnegative, ridge, tol: as in `covlasso`.
        k: number of nonzeros, from 1 to the number of candidates.
        position: where on the segment, in (0, 1): near 0 the largest penalty, near 1 the best fit with k nonzeros
            before the next one changes.
        max_pivots: coordinates that may enter or leave on the whole path.

    Returns:
        CovLassoSolution, `lam` chosen as above. Status "too_few" where no penalty gives k nonzeros, because the
        covariance has a smaller rank, fewer categories correlate with the target, or several enter at once; the
        coefficients are then those at the end of the last segment with fewer. Differentiable in `cov` at the `lam`
        found, which counts as a constant.

    Raises:
        ValueError: `k` is not between 1 and the number of candidates of every target, `position` not between 0 and 1;
            and as `covlasso`.
        TypeError: as `covlasso`.
    """
    problem = _checked_problem(cov, targets, candidates, penalty_factors, nonnegative, ridge)
    limits = _checked_limits(problem, tol, max_pivots)
    _check_count(k, problem)
    _check_number("position", position)
    if not 0 < position < 1:
        raise ValueError(f"position must be between 0 and 1, not {position}")
    found: list[Tensor] = []

    def follow(rows: Tensor, _: int) -> Solved:
        solved, lam = problem.top_k(rows, k, limits, position)
        found.append(lam)
        return solved

    with torch.no_grad():
        parts = _solve_in_chunks(problem, 1, limits.max_pivots, follow, k, full=k)
        lams = torch.cat(found) if found else problem.cov.new_empty(0, dtype=torch.float64)
        solution = _solution(problem, lams, parts)
    if not (torch.is_grad_enabled() and problem.requires_grad()):
        return solution
    attached = covlasso(
        cov,
        lams.clamp_min(torch.finfo(torch.float64).tiny),
        targets=problem.targets,
        candidates=candidates,
        penalty_factors=penalty_factors,
        nonnegative=nonnegative,
        ridge=ridge,
        tol=tol,
        max_pivots=max_pivots,
        warm_start=solution,
    )
    return replace(attached, lam=lams, status=torch.where(solution.status > 0, solution.status, attached.status))


# ------------------------------------------------------------------------------------------------ the problem


@dataclass(frozen=True)
class _Limits:
    tol: float
    max_pivots: int


@dataclass(frozen=True)
class _Problem:
    """Checked arguments. Without cross the targets count rows of cov, else rows of cross [m, n] and variance [m]."""

    cov: Tensor  # [n, n]
    cross: Tensor | None
    variance: Tensor | None  # float64
    targets: Tensor  # [T] int64
    penalty: Tensor | None  # [n] or [T, n], infinite for what is no candidate
    nonnegative: bool
    ridge: float

    @property
    def n(self) -> int:
        return self.cov.shape[1]

    @property
    def max_support(self) -> int:
        return self.n if self.cross is not None else max(self.n - 1, 1)

    def lambda_max(self) -> Tensor:
        """[T] float64."""
        return lambda_max_of(self.cov, self.targets, self.penalty, self.cross, self.nonnegative)

    def variances(self) -> Tensor:
        """[T] float64, of the targets."""
        if self.variance is not None:
            return self.variance[self.targets]
        return self.cov.diagonal()[self.targets].double()

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Targets, penalty, cross and variance of some of the targets."""
        penalty = self.penalty if self.penalty is None or self.penalty.dim() == 1 else self.penalty[rows]
        return self.targets[rows], penalty, self.cross, self.variance

    def in_float64(self) -> _Problem:
        def double(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.double()

        return replace(self, cov=self.cov.double(), cross=double(self.cross), penalty=double(self.penalty))

    def solve(self, rows: Tensor, lams: Tensor, limits: _Limits, capacity: int, start: Start | None) -> Solved:
        """Some of the targets, at lams [R] or along lams [R, L]."""
        targets, penalty, cross, variance = self.rows(rows)
        tol, max_pivots = limits.tol, limits.max_pivots
        options = (cross, variance, self.nonnegative, self.ridge, start)
        return solve_targets(self.cov, targets, lams, penalty, tol, max_pivots, capacity, *options)

    def top_k(self, rows: Tensor, k: int, limits: _Limits, position: float) -> tuple[Solved, Tensor]:
        """Some of the targets with k nonzeros, and their lam; in float64."""
        exact = self.in_float64()
        targets, penalty, cross, variance = exact.rows(rows)
        options = (penalty, limits.tol, limits.max_pivots, position, cross, variance, exact.nonnegative, exact.ridge)
        value, index, count, info, lam = torch.ops.neuraldeps.covlasso_top_k(exact.cov, targets, k, *options)
        return (value.to(self.cov.dtype), index, count, info), lam

    def requires_grad(self) -> bool:
        return self.cov.requires_grad or (self.cross is not None and self.cross.requires_grad)

    def quadratic_error(self, theta: Tensor) -> Tensor:
        """err2 of dense coefficients theta [T * L, n], differentiable: [T * L] float64."""
        lams = theta.shape[0] // max(1, len(self.targets))
        of = self.targets.repeat_interleave(lams)
        own = (theta @ self.cov * theta).sum(1).double()
        c = self.cov[of] if self.cross is None else self.cross[of]
        return self.variances().repeat_interleave(lams) - 2 * (c * theta).sum(1).double() + own


@dataclass(frozen=True)
class _FactoredProblem(_Problem):
    """A `_Problem` solved in float64, whose cov is a stand-in of the right shape and device, and of no memory."""

    problems: FactoredProblems

    def lambda_max(self) -> Tensor:
        return self.problems.lambda_max()

    def variances(self) -> Tensor:
        return self.problems.cov.variances(self.targets)

    def solve(self, rows: Tensor, lams: Tensor, limits: _Limits, capacity: int, start: Start | None) -> Solved:
        return self.problems.take(rows).solve(lams, limits.tol, limits.max_pivots, capacity, start)

    def top_k(self, rows: Tensor, k: int, limits: _Limits, position: float) -> tuple[Solved, Tensor]:
        return self.problems.take(rows).top_k(k, limits.tol, limits.max_pivots, position)


# ------------------------------------------------------------------------------------------------ argument checks


def _checked_problem(
    cov: Covariance,
    targets: Tensor | Sequence[int] | None,
    candidates: Tensor | None,
    penalty_factors: Tensor | None,
    nonnegative: bool,
    ridge: float = 0.0,
) -> _Problem:
    cross = variance = None
    excluded = False
    if isinstance(cov, FactoredCovariance):
        matrix = torch.zeros((), dtype=torch.float64, device=cov.device).expand(cov.shape)
    elif isinstance(cov, CrossCovariance):
        matrix, excluded = _checked_covariance(cov.cov), cov.exclude_same
        cross, variance = cov.cross.to(matrix.dtype), cov.variance.double()
    else:
        matrix = _checked_covariance(cov)
    _check_number("ridge", ridge)
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be finite and not negative, not {ridge}")
    indices = _checked_targets(targets, matrix if cross is None else cross)
    penalty = _penalty(matrix, len(indices), candidates, penalty_factors)
    if excluded:
        ones = matrix.new_ones(()) if penalty is None else penalty
        same = indices[:, None] == torch.arange(matrix.shape[1], device=matrix.device)
        penalty = torch.where(same, torch.inf, ones)
    asked = (indices, penalty, bool(nonnegative), float(ridge))
    if isinstance(cov, FactoredCovariance):
        return _FactoredProblem(matrix, None, None, *asked, FactoredProblems(cov, *asked))
    return _Problem(matrix, cross, variance, *asked)


def _checked_limits(problem: _Problem, tol: float, max_pivots: int | None) -> _Limits:
    _check_number("tol", tol)
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    pivots = 10_000 + 20 * problem.n if max_pivots is None else max_pivots
    if pivots < 1:
        raise ValueError(f"max_pivots must be at least 1, not {max_pivots}")
    return _Limits(tol, pivots)


def _checked_covariance(cov: Tensor) -> Tensor:
    if not isinstance(cov, Tensor):
        raise TypeError(
            f"cov must be a torch.Tensor, a CrossCovariance or a FactoredCovariance, not {type(cov).__name__}"
        )
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"cov must be a square matrix [n, n], not {list(cov.shape)}")
    if cov.shape[0] == 0:
        raise ValueError("cov must have at least one category, not 0")
    if cov.dtype in (torch.float16, torch.bfloat16):
        return cov.float()
    if cov.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cov must be floating point, not {cov.dtype}")
    return cov


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")


def _check_device(name: str, value: object, cov: Tensor) -> None:
    if isinstance(value, Tensor) and value.device != cov.device:
        raise ValueError(f"{name} must be on the device of cov, {cov.device}, not {value.device}")


def _checked_targets(targets: Tensor | Sequence[int] | None, cov: Tensor) -> Tensor:
    """[T] int64, each a row of `cov`."""
    n = cov.shape[0]
    if targets is None:
        return torch.arange(n, device=cov.device)
    _check_device("targets", targets, cov)
    indices = torch.as_tensor(targets, device=cov.device)
    if indices.numel() == 0:
        indices = indices.long()
    if indices.dim() != 1:
        raise ValueError(f"targets must be one-dimensional [T], not {list(indices.shape)}")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"targets must be integers, not {indices.dtype}")
    indices = indices.long()
    if cov.device.type == "cpu" and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        wrong = indices[(indices < 0) | (indices >= n)][0]
        raise ValueError(f"targets contains {int(wrong)}; expected 0 to {n - 1}")
    return indices


def _per_target(name: str, value: Tensor | Scalar | None, problem: _Problem) -> Tensor:
    """`value` as a float64 tensor [T] on the device of the covariance, positive and finite."""
    num_targets = len(problem.targets)
    if isinstance(value, str):
        raise TypeError(f"{name} must be a number or a tensor, not {value!r}")
    _check_device(name, value, problem.cov)
    given = torch.as_tensor(value, dtype=torch.float64, device=problem.cov.device)
    if given.dim() > 1 or (given.dim() == 1 and given.shape[0] != num_targets):
        raise ValueError(f"{name} must be a number or [{num_targets}], not {list(given.shape)}")
    if given.device.type == "cpu" and not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return given.expand(num_targets)


def _geometric_grid(problem: _Problem, n_lambdas: int, lam_min_ratio: float) -> Tensor:
    """[T, L] from lambda_max down to lam_min_ratio of it."""
    _check_number("lam_min_ratio", lam_min_ratio)
    if not isinstance(n_lambdas, int):
        raise TypeError(f"n_lambdas must be an integer, not {n_lambdas!r}")
    if n_lambdas < 1:
        raise ValueError(f"n_lambdas must be at least 1, not {n_lambdas}")
    if not 0 < lam_min_ratio < 1:
        raise ValueError(f"lam_min_ratio must be between 0 and 1, not {lam_min_ratio}")
    steps = torch.linspace(0, 1, n_lambdas, dtype=torch.float64, device=problem.cov.device)
    return problem.lambda_max()[:, None] * lam_min_ratio**steps


def _checked_grid(lams: Tensor | Sequence[float], problem: _Problem) -> Tensor:
    """`lams` as [T, L]: positive, finite and strictly decreasing."""
    num_targets = len(problem.targets)
    if isinstance(lams, str):
        raise TypeError(f"lams must be numbers or a tensor, not {lams!r}")
    _check_device("lams", lams, problem.cov)
    grid = torch.as_tensor(lams, dtype=torch.float64, device=problem.cov.device)
    if grid.dim() not in (1, 2) or grid.shape[-1] == 0 or (grid.dim() == 2 and grid.shape[0] != num_targets):
        raise ValueError(f"lams must be [L] or [{num_targets}, L] with L >= 1, not {list(grid.shape)}")
    if grid.device.type == "cpu":
        if not bool(((grid > 0) & grid.isfinite()).all()):
            raise ValueError(f"lams must be positive and finite, not {lams}")
        if not bool((grid.diff() < 0).all()):
            raise ValueError(f"lams must be strictly decreasing, not {lams}")
    return grid.expand(num_targets, -1)


def _check_count(k: int, problem: _Problem) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, not {type(k).__name__}")
    most = problem.n if problem.cross is not None else problem.n - 1
    if problem.penalty is not None and problem.cov.device.type == "cpu" and len(problem.targets):
        allowed = problem.penalty.isfinite().expand(len(problem.targets), problem.n)
        number = allowed.sum(1)
        if problem.cross is None:
            number = number - allowed.gather(1, problem.targets[:, None])[:, 0].long()
        most = int(number.min())
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to the number of candidates, {most}, not {k}")


def _padded_start(warm_start: CovLassoSolution | None, problem: _Problem) -> Start | None:
    """Coefficients [T, c], columns [T, c] and their number [T] of a solution."""
    if warm_start is None:
        return None
    if not isinstance(warm_start, CovLassoSolution):
        raise TypeError(f"warm_start must be a CovLassoSolution, not {type(warm_start).__name__}")
    given, expected = list(warm_start.coefficients.shape), [len(problem.targets), problem.n]
    if given != expected:
        raise ValueError(f"warm_start has coefficients {given}; expected {expected}")
    _check_device("warm_start", warm_start.coefficients, problem.cov)
    crow = warm_start.coefficients.crow_indices()
    count = crow.diff()
    width = int(count.max()) if len(count) else 0
    rows = torch.repeat_interleave(count)
    place = torch.arange(len(rows), device=rows.device) - crow[rows]
    value = problem.cov.new_zeros(len(count), width)
    index = torch.zeros(len(count), width, dtype=torch.int32, device=value.device)
    value[rows, place] = warm_start.coefficients.values().detach().to(value.dtype)
    index[rows, place] = warm_start.coefficients.col_indices().int()
    return value, index, count.int()


def _penalty(cov: Tensor, num_targets: int, candidates: Tensor | None, penalty_factors: Tensor | None) -> Tensor | None:
    """Penalty factors [n] or [T, n] in the dtype of `cov`, infinite for what is no candidate; None: all ones."""
    n, on_cpu = cov.shape[0], cov.device.type == "cpu"
    factors = None
    if penalty_factors is not None:
        _check_device("penalty_factors", penalty_factors, cov)
        factors = torch.as_tensor(penalty_factors, dtype=cov.dtype, device=cov.device)
        if factors.shape != (n,):
            raise ValueError(f"penalty_factors must be [{n}], not {list(factors.shape)}")
        if on_cpu and not bool(((factors > 0) & factors.isfinite()).all()):
            raise ValueError("penalty_factors must be positive and finite; use candidates to exclude a category")
    if candidates is None:
        return factors
    _check_device("candidates", candidates, cov)
    allowed = torch.as_tensor(candidates, device=cov.device)
    if allowed.dtype != torch.bool:
        raise TypeError(f"candidates must be bool, not {allowed.dtype}")
    if allowed.shape not in ((n,), (num_targets, n)):
        raise ValueError(f"candidates must be [{n}] or [{num_targets}, {n}], not {list(allowed.shape)}")
    ones = cov.new_ones(()) if factors is None else factors
    return torch.where(allowed, ones, torch.inf)


# ------------------------------------------------------------------------------------------------ solving

Solve = Callable[[Tensor, int], Solved]  # (numbers of the targets, capacity)


def _solved(problem: _Problem, lams: Tensor, limits: _Limits, warm_start: CovLassoSolution | None) -> CovLassoSolution:
    """At lams [T], or along lams [T, L]."""
    start = _padded_start(warm_start, problem)

    def solve(rows: Tensor, capacity: int) -> Solved:
        of_rows = None if start is None else tuple(x[rows] for x in start)
        return problem.solve(rows, lams[rows], limits, capacity, of_rows)

    per_target = lams.shape[1] if lams.dim() == 2 else 1
    capacity = _first_capacity(problem, lams, limits)
    return _solution(problem, lams, _solve_in_chunks(problem, per_target, limits.max_pivots, solve, capacity))


def _first_capacity(problem: _Problem, lams: Tensor, limits: _Limits) -> int:
    """Coefficients a problem may have at first; a support that needs more is solved again."""
    full = problem.max_support
    if problem.n > _FULL_SUPPORT:
        return min(full, _FIRST_SUPPORT)
    if lams.dim() == 1 or lams.numel() * full < _WORTH_A_PROBE:
        return full
    # Zeros of a path cost memory traffic: room for what some targets need at its end, and half as much again.
    rows = torch.linspace(0, len(lams) - 1, min(8, len(lams)), device=lams.device).long()
    with torch.no_grad():
        count = problem.solve(rows, lams[rows, -1], limits, full, None)[2]
    return min(full, int(1.5 * float(count.max())) + 16)


@dataclass(frozen=True)
class _Part:
    """Compact solutions of some targets."""

    targets: Tensor  # [R] their numbers
    column: Tensor  # [nnz]
    value: Tensor  # [nnz]
    count: Tensor  # [R * L]
    info: Tensor  # [R * L, 6]


def _solve_in_chunks(
    problem: _Problem, num_lams: int, max_pivots: int, solve: Solve, capacity: int, full: int | None = None
) -> list[_Part]:
    """Solutions of all targets, in chunks that bound the memory. Supports find `capacity` places at first; targets
    whose supports need more, up to `full` (default: all that can be), are solved again.
    """
    full = problem.max_support if full is None else full
    rows = torch.arange(len(problem.targets), device=problem.cov.device)
    parts: list[_Part] = []
    while len(rows):
        chunk = max(1, _CHUNK // (num_lams * capacity))
        overflowed = []
        for first in range(0, len(rows), chunk):
            some = rows[first : first + chunk]
            value, index, count, info = solve(some, capacity)
            if capacity < full:
                status, pivots = info[..., INFO_FIELDS.index("status")], info[..., INFO_FIELDS.index("n_pivots")]
                cut = ((status == 1) & (pivots < max_pivots)).view(len(some), -1).any(1)
                if bool(cut.any()):
                    overflowed.append(some[cut])
                    some, value, index, count, info = (x[~cut] for x in (some, value, index, count, info))
            parts.append(_compact(some, value, index, count, info))
        rows = torch.cat(overflowed) if overflowed else rows[:0]
        capacity = min(full, 4 * capacity)
    return parts


def _compact(targets: Tensor, value: Tensor, index: Tensor, count: Tensor, info: Tensor) -> _Part:
    capacity, count = value.shape[-1], count.reshape(-1).long()
    flat = ranges(torch.arange(len(count), device=count.device) * capacity, count)
    return _Part(targets, index.reshape(-1)[flat], value.reshape(-1)[flat], count, info.reshape(-1, len(INFO_FIELDS)))


def _solution(problem: _Problem, lams: Tensor, parts: list[_Part]) -> CovLassoSolution:
    """Fields [T], or [T, L] for lams [T, L]; coefficients [T * L, n]."""
    column, value, count, info = _in_order(problem, lams, parts)
    coefficients = csr(count, column, value, problem.n)
    fields = {name: x.view(lams.shape) for name, x in zip(INFO_FIELDS, info.unbind(1), strict=True)}
    err2 = fields["err2"]
    if value.requires_grad:
        err2 = problem.quadratic_error(dense_rows(coefficients)).view(lams.shape)
    variance = problem.variances().view(-1, *(1,) * (lams.dim() - 1))
    return CovLassoSolution(
        coefficients=coefficients,
        targets=problem.targets,
        lam=lams,
        lambda_max=fields["lambda_max"],
        err2=err2,
        relative_error=torch.where(variance > 0, err2 / variance, 0.0),
        n_nonzero=count.view(lams.shape),
        duality_gap=fields["duality_gap"],
        kkt_violation=fields["kkt_violation"],
        n_pivots=fields["n_pivots"].long(),
        status=fields["status"].long(),
    )


def _in_order(problem: _Problem, lams: Tensor, parts: list[_Part]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Column, value, count and info of the parts together, in the order of the targets."""
    if not parts:
        cov = problem.cov
        empty = cov.new_empty(0, len(INFO_FIELDS), dtype=torch.float64)
        return cov.new_empty(0, dtype=torch.int32), cov.new_empty(0), problem.targets[:0], empty
    targets, column, value, count, info = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("targets", "column", "value", "count", "info")
    )
    if len(parts) == 1 or bool((targets.diff() > 0).all()):
        return column, value, count, info
    per_target = lams.shape[1] if lams.dim() == 2 else 1
    order = (targets.argsort()[:, None] * per_target + torch.arange(per_target, device=targets.device)).view(-1)
    entries = ranges((count.cumsum(0) - count)[order], count[order])
    return column[entries], value[entries], count[order], info[order]
