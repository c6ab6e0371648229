"""CovLasso: a category's logit as a sparse linear combination of the others', from the covariance alone.

For target i, with the coefficient of i itself pinned to -1, so that Theta' f is prediction minus target:

    Theta_i(lam) = argmin  Theta' S Theta + lam * sum_j penalty_j |Theta_j|

There is no factor 1/2: lam is twice the alpha of `sklearn.linear_model.Lasso`. The solution is exact (block active set,
csrc/cpu/covlasso.cpp), any number of coefficients may be nonzero, and every target carries a certificate. Source:
papers on neural dependencies state the problem; solver, certificate and gradient are ours.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import covlasso as reference

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
_log = logging.getLogger("neuraldeps_kernels")

STATUS_NAMES = ("converged", "capped", "collinear", "not_psd")
_INFO_FIELDS = ("err2", "duality_gap", "kkt_violation", "n_pivots", "status", "lambda_max")
_CHUNK = 1 << 24  # padded coefficients held at once

Scalar = float | int


@dataclass(frozen=True, eq=False)
class CovLassoSolution:
    """Solutions of T CovLasso problems over n categories, one row per target.

    Attributes:
        coefficients: [T, n] sparse CSR, columns increasing, dtype of the covariance; the pinned -1 is left out.
        targets: [T] int64.
        lam: [T] float64, the penalty of each target.
        lambda_max: [T] float64, the smallest penalty without any nonzero coefficient.
        err2: [T] float64, mean squared residual `Theta' S Theta`; differentiable where the coefficients are.
        relative_error: [T] float64, `err2 / S_ii`; 0 for a target of zero variance.
        n_nonzero: [T] int64.
        duality_gap: [T] float64, objective minus dual bound, in squared logit units; rounding may leave it slightly
            negative.
        kkt_violation: [T] float64, the largest violation of the optimality conditions over `lambda_max / 2`.
        n_pivots: [T] int64, coordinates that entered or left on the way.
        status: [T] int64, index into `STATUS_NAMES`: 0 converged; 1 capped (`max_pivots` reached); 2 collinear (the
            tolerance is out of reach because predictors of the support are linearly dependent to rounding); 3 not_psd
            (the covariance is not positive semidefinite where it matters, so there may be no minimum).
    """

    coefficients: Tensor
    targets: Tensor
    lam: Tensor
    lambda_max: Tensor
    err2: Tensor
    relative_error: Tensor
    n_nonzero: Tensor
    duality_gap: Tensor
    kkt_violation: Tensor
    n_pivots: Tensor
    status: Tensor

    @property
    def status_names(self) -> list[str]:
        """One of "converged", "capped", "collinear", "not_psd" per target."""
        return [STATUS_NAMES[code] for code in self.status.tolist()]

    @cached_property
    def _dense(self) -> Tensor:
        return _dense_rows(self.coefficients)

    def dense(self) -> Tensor:
        """The coefficients as a dense [T, n] tensor, zero at the targets themselves."""
        return self._dense

    def predict(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """Predicted logits of the targets.

        Args:
            x: [N, n] logits.
            mean: [n] mean logits. With it `mean_i + sum_j theta_j (x_j - mean_j)` is returned, as fits a centred
                covariance; without it `sum_j theta_j x_j`.

        Returns:
            [N, T], dtype of `x`.

        Raises:
            ValueError: `x` or `mean` does not have n columns.
        """
        n = self.coefficients.shape[1]
        if x.dim() != 2 or x.shape[1] != n:
            raise ValueError(f"x must be [N, {n}], not {list(x.shape)}")
        if mean is not None and mean.shape != (n,):
            raise ValueError(f"mean must be [{n}], not {list(mean.shape)}")
        theta = self.dense().to(x.dtype)
        if mean is None:
            return x @ theta.T
        mean = mean.to(x)
        return mean[self.targets] + (x - mean) @ theta.T


def _dense_rows(coefficients: Tensor) -> Tensor:
    rows = torch.repeat_interleave(coefficients.crow_indices().diff())
    flat = rows * coefficients.shape[1] + coefficients.col_indices()
    zeros = coefficients.values().new_zeros(coefficients.shape[0] * coefficients.shape[1])
    return zeros.index_put((flat,), coefficients.values()).view(coefficients.shape)


@annotated
def lambda_max(
    cov: Tensor,
    targets: Tensor | Sequence[int] | None = None,
    *,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
) -> Tensor:
    """The smallest penalty of each target at which no coefficient is nonzero: `2 max_j |S_ij| / penalty_j` over j != i.

    Args:
        cov: [n, n] covariance, float32 or float64 (float16 and bfloat16 are computed in float32).
        targets: [T] categories, default all n.
        candidates: bool [n] or [T, n], the categories that may be predictors; default all.
        penalty_factors: [n], positive; default ones.

    Returns:
        [T] float64, differentiable in `cov`; 0 where a target is uncorrelated with every candidate.

    Raises:
        ValueError, TypeError: as `covlasso`.
    """
    cov = _checked_covariance(cov)
    indices = _checked_targets(targets, cov)
    return _LambdaMax.apply(cov, indices, _penalty(cov, indices, candidates, penalty_factors))  # type: ignore[no-any-return, no-untyped-call]


@annotated
def covlasso(
    cov: Tensor,
    lam: Tensor | Scalar | None = None,
    *,
    lam_ratio: Tensor | Scalar | None = None,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    tol: float = 1e-6,
    max_pivots: int | None = None,
) -> CovLassoSolution:
    """Solves CovLasso for many targets from one covariance.

    Args:
        cov: [n, n] covariance of the logits, symmetric positive semidefinite, in squared logit units. float32 and
            float64 are solved as they are; float16 and bfloat16 are computed in float32. Entries may differ from their
            mirror image by 1e-5 of the largest variance; their mean is used.
        lam: penalty, a positive number or [T]; squared logit units, twice the alpha of scikit-learn.
        lam_ratio: penalty as a fraction of each target's `lambda_max`, a positive number or [T]. Exactly one of `lam`
            and `lam_ratio` is given.
        targets: [T] categories to explain, default all n; a repeated target is solved again.
        candidates: bool [n] or [T, n], True where a category may be a predictor; default all. The target itself never
            is, whatever the mask says, and a target without candidates has an empty support.
        penalty_factors: [n], positive multiples of the penalty of each category; default ones.
        tol: KKT violation allowed, relative to `lambda_max / 2`. float32 reaches about 1e-6, float64 1e-12.
        max_pivots: coordinates that may enter or leave before a target is given up as capped, default
            `10000 + 20 n`.

    Returns:
        CovLassoSolution. Its coefficients and `err2` are differentiable in `cov` and `lam` (implicit gradient on the
        support; a coefficient that is zero has zero gradient). A target that correlates with no candidate has an empty
        support and `err2 = S_ii`, whatever the penalty.

    Raises:
        ValueError: `cov` is not square, not symmetric, not finite or has a negative diagonal; `lam` or `lam_ratio` is
            not positive and finite, or both or none is given; a target is out of range; a shape does not
            fit. On CUDA values are not checked, as that would make the host wait: a covariance with NaN
            comes back with a status other than converged.
        TypeError: an argument has the wrong dtype.

    The number of nonzeros depends on the data, so a call on CUDA waits once for the result, like `torch.nonzero`; the
    operator `torch.ops.neuraldeps.covlasso` below it never does.
    """
    cov = _checked_covariance(cov)
    indices = _checked_targets(targets, cov)
    _check_penalty_choice(lam, lam_ratio)
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    n, num_targets = cov.shape[0], len(indices)
    pivots = 10_000 + 20 * n if max_pivots is None else max_pivots
    if pivots < 1:
        raise ValueError(f"max_pivots must be at least 1, not {max_pivots}")
    penalty = _penalty(cov, indices, candidates, penalty_factors)
    if lam_ratio is None:
        lams = _per_target("lam", lam, num_targets, cov)
    else:
        top: Tensor = _LambdaMax.apply(cov, indices, penalty)  # type: ignore[no-untyped-call]
        lams = _per_target("lam_ratio", lam_ratio, num_targets, cov) * top

    capacity = max(n - 1, 1)
    chunk = max(1, _CHUNK // capacity)
    parts = []
    for t in range(0, num_targets, chunk):
        rows = slice(t, t + chunk)
        parts.append(_solve_compact(cov, indices[rows], lams[rows], _rows(penalty, rows), tol, pivots, capacity))
    return _solution(cov, indices, lams, parts)


def solve_targets(
    cov: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None, tol: float, max_pivots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.neuraldeps.covlasso` with a gradient that `torch.func` transforms understand, of static shape.

    Args:
        cov: [n, n] float32 or float64.
        targets: [T] int64.
        lam: [T] float64.
        penalty: [n] or [T, n] of the dtype of `cov`, infinite where a category is no candidate; None: ones.
        tol, max_pivots: as in `covlasso`.
        capacity: coefficients stored per target; n - 1 holds every support.

    Returns:
        value [T, capacity], index [T, capacity] int32, count [T] int32, info [T, 6] float64 (err2, duality_gap,
        kkt_violation, n_pivots, status, lambda_max). Rows are zero beyond `count`; a cut support has status capped.
    """
    return _SolveTargets.apply(cov, targets, lam, penalty, tol, max_pivots, capacity)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------------------------------------------ argument checks


def _checked_covariance(cov: Tensor) -> Tensor:
    if not isinstance(cov, Tensor):
        raise TypeError(f"cov must be a torch.Tensor, not {type(cov).__name__}")
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"cov must be a square matrix [n, n], not {list(cov.shape)}")
    if cov.shape[0] == 0:
        raise ValueError("cov must have at least one category, not 0")
    if cov.dtype in (torch.float16, torch.bfloat16):
        return cov.float()
    if cov.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cov must be floating point, not {cov.dtype}")
    return cov


def _check_device(name: str, value: object, cov: Tensor) -> None:
    if isinstance(value, Tensor) and value.device != cov.device:
        raise ValueError(f"{name} must be on the device of cov, {cov.device}, not {value.device}")


def _checked_targets(targets: Tensor | Sequence[int] | None, cov: Tensor) -> Tensor:
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


def _check_penalty_choice(lam: object, lam_ratio: object) -> None:
    if (lam is None) == (lam_ratio is None):
        given = "none" if lam is None else "both"
        raise ValueError(f"exactly one of lam and lam_ratio must be given, not {given}")


def _per_target(name: str, value: Tensor | Scalar | None, num_targets: int, cov: Tensor) -> Tensor:
    """`value` as a float64 tensor [T] on the device of `cov`, positive and finite."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a number or a tensor, not {value!r}")
    _check_device(name, value, cov)
    given = torch.as_tensor(value, dtype=torch.float64, device=cov.device)
    if given.dim() > 1 or (given.dim() == 1 and given.shape[0] != num_targets):
        raise ValueError(f"{name} must be a number or [{num_targets}], not {list(given.shape)}")
    if given.device.type == "cpu" and not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return given.expand(num_targets)


def _penalty(cov: Tensor, targets: Tensor, candidates: Tensor | None, penalty_factors: Tensor | None) -> Tensor | None:
    """Penalty factors [n] or [T, n] in the dtype of `cov`, infinite for what is no candidate; None: all ones."""
    n, num_targets, on_cpu = cov.shape[0], len(targets), cov.device.type == "cpu"
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


def _rows(penalty: Tensor | None, rows: slice) -> Tensor | None:
    return penalty if penalty is None or penalty.dim() == 1 else penalty[rows]


_Compact = tuple[Tensor, Tensor, Tensor, Tensor]


def _solve_compact(
    cov: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None, tol: float, max_pivots: int, capacity: int
) -> _Compact:
    """Column [nnz], value [nnz], count [T] and info [T, 6] of a chunk of targets."""
    value, index, count, info = solve_targets(cov, targets, lam, penalty, tol, max_pivots, capacity)
    count = count.long()
    end = count.cumsum(0)
    row_start = torch.arange(len(count), device=count.device) * capacity - (end - count)
    flat = torch.repeat_interleave(row_start, count)
    flat += torch.arange(len(flat), device=flat.device)
    return index.view(-1)[flat], value.reshape(-1)[flat], count, info


def _solution(cov: Tensor, targets: Tensor, lam: Tensor, parts: list[_Compact]) -> CovLassoSolution:
    empty = (cov.new_empty(0, dtype=torch.int32), cov.new_empty(0), targets[:0], lam.new_empty(0, len(_INFO_FIELDS)))
    column, value, count, info = (torch.cat(tensors) for tensors in zip(*(parts or [empty]), strict=True))
    crow = torch.cat([count.new_zeros(1), count.cumsum(0)])
    coefficients = torch.sparse_csr_tensor(
        crow, column.long(), value, (len(targets), cov.shape[0]), check_invariants=False
    )
    fields = dict(zip(_INFO_FIELDS, info.unbind(1), strict=True))
    err2 = fields["err2"]
    if value.requires_grad:
        theta = _dense_rows(coefficients).index_put(
            (torch.arange(len(targets), device=targets.device), targets), cov.new_tensor(-1.0)
        )
        err2 = ((theta @ cov) * theta).sum(1).double()
    variance = cov.diagonal()[targets].double()
    return CovLassoSolution(
        coefficients=coefficients,
        targets=targets,
        lam=lam,
        lambda_max=fields["lambda_max"],
        err2=err2,
        relative_error=torch.where(variance > 0, err2 / variance, 0.0),
        n_nonzero=count,
        duality_gap=fields["duality_gap"],
        kkt_violation=fields["kkt_violation"],
        n_pivots=fields["n_pivots"].long(),
        status=fields["status"].long(),
    )


# ------------------------------------------------------------------------------------------------ operator rules


def _fake_covlasso(
    cov: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None, tol: float, max_pivots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = targets.shape[0]
    return (
        cov.new_empty((rows, capacity)),
        cov.new_empty((rows, capacity), dtype=torch.int32),
        cov.new_empty((rows,), dtype=torch.int32),
        cov.new_empty((rows, len(_INFO_FIELDS)), dtype=torch.float64),
    )


def _fake_lambda_max(cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
    return cov.new_empty(targets.shape, dtype=torch.float64)


_library = torch.library.Library("neuraldeps", "FRAGMENT")
_library.define(
    "covlasso_backward(Tensor grad, Tensor cov, Tensor targets, Tensor? penalty, Tensor index, Tensor value, "
    "Tensor count) -> (Tensor grad_cov, Tensor grad_lam)"
)


def _fake_covlasso_backward(
    grad: Tensor, cov: Tensor, targets: Tensor, penalty: Tensor | None, index: Tensor, value: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    return cov.new_empty(cov.shape), cov.new_empty(targets.shape, dtype=torch.float64)


def _correlations(cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
    """|S_ij| / penalty_j of every target and category, zero at the target itself: [T, n]."""
    strength = cov[targets].abs()
    if penalty is not None:
        strength = strength / penalty
    return strength.scatter(1, targets[:, None], 0.0)


@torch.library.impl("neuraldeps::lambda_max", "CUDA", lib=_library)
def _lambda_max_on_cuda(cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
    return 2.0 * _correlations(cov, targets, penalty).amax(1).double()


def _lambda_max_gradient(grad: Tensor, cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
    """The maximum's gradient goes to the strongest entry, halved over the two triangles."""
    strongest = _correlations(cov, targets, penalty).argmax(1)
    slope = cov[targets, strongest].sign() * grad.to(cov.dtype)
    if penalty is not None:
        slope = slope / (penalty[strongest] if penalty.dim() == 1 else penalty.gather(1, strongest[:, None])[:, 0])
    half = torch.zeros_like(cov).index_put((targets, strongest), slope, accumulate=True)
    return half + half.T


@torch.library.impl("neuraldeps::covlasso_backward", "CompositeExplicitAutograd", lib=_library)
def _covlasso_backward(
    grad: Tensor, cov: Tensor, targets: Tensor, penalty: Tensor | None, index: Tensor, value: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Implicit gradient on the support a: with S_aa w = grad_a and signs s,

        dL/dS = -(w Theta' + Theta w') / 2        dL/dlam = -(1/2) sum_j penalty_j s_j w_j

    in float64; a singular S_aa gets 1e-8 of its mean diagonal added.
    """
    n, num_targets = cov.shape[0], targets.shape[0]
    grad_cov = torch.zeros_like(cov, dtype=torch.float64)
    grad_lam = torch.zeros(num_targets, dtype=torch.float64, device=cov.device)
    k = int(count.max()) if num_targets else 0
    if k == 0:
        return grad_cov.to(cov.dtype), grad_lam
    cov64 = cov.double()
    chunk = max(1, (1 << 25) // (k * k))
    for t in range(0, num_targets, chunk):
        rows = slice(t, t + chunk)
        a, inside = index[rows, :k].long(), torch.arange(k, device=cov.device) < count[rows, None]
        w = _solve_on_support(cov64, a, inside, torch.where(inside, grad[rows, :k].double(), 0.0))
        theta = torch.where(inside, value[rows, :k].double(), 0.0)
        row_penalty = _rows(penalty, rows)
        factors = 1.0 if row_penalty is None else row_penalty.double().expand(len(a), n).gather(1, a)
        grad_lam[rows] = -0.5 * torch.where(inside, factors * theta.sign() * w, 0.0).sum(1)
        zeros = grad_cov.new_zeros(len(a), n)
        residual = zeros.scatter_add(1, a, theta).scatter_add(1, targets[rows, None], zeros.new_full((len(a), 1), -1.0))
        grad_cov -= zeros.scatter_add(1, a, w).T @ residual
    return ((grad_cov + grad_cov.T) / 2).to(cov.dtype), grad_lam


def _solve_on_support(cov: Tensor, a: Tensor, inside: Tensor, right: Tensor) -> Tensor:
    """S_aa w = right for padded supports a [T, k]; rows outside give zero."""
    both = inside[:, :, None] & inside[:, None, :]
    eye = torch.eye(a.shape[1], dtype=cov.dtype, device=cov.device)
    matrix = torch.where(both, cov[a[:, :, None], a[:, None, :]], eye)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    ridge = 1e-8 * matrix.diagonal(dim1=1, dim2=2).mean(1) * (failed > 0)
    repaired, _ = torch.linalg.cholesky_ex(matrix + ridge[:, None, None] * eye)
    return torch.cholesky_solve(right[..., None], torch.where((failed > 0)[:, None, None], repaired, factor))[..., 0]


def _solve_by_reference(
    cov: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None, tol: float, max_pivots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns, from `reference.covlasso`, which has no pivots to count."""
    theta = reference.covlasso(cov, targets, lam, penalty, tol=tol / 2).to(cov.dtype)
    found = (theta != 0).sum(1)
    count = found.clamp_max(capacity)
    index = (theta == 0).int().argsort(dim=1, stable=True)[:, :capacity]
    inside = torch.arange(index.shape[1], device=index.device) < count[:, None]
    violation = reference.kkt_violation(cov, theta, targets, lam, penalty)
    status = torch.where(found > capacity, 1, torch.where(violation <= tol, 0, 2))
    info = torch.stack(
        [
            reference.err2(cov, theta, targets),
            reference.duality_gap(cov, theta, targets, lam, penalty),
            violation,
            torch.zeros_like(violation),
            status.double(),
            reference.lambda_max(cov, targets, penalty),
        ],
        1,
    )
    pad = (0, capacity - index.shape[1])
    value = torch.nn.functional.pad(torch.where(inside, theta.gather(1, index), 0.0), pad)
    columns = torch.nn.functional.pad(torch.where(inside, index, 0), pad)
    return value, columns.int(), count.int(), info


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cov, targets, _lam, penalty = inputs[:4]
    value, index, count, info = output
    ctx.mark_non_differentiable(index, count, info)
    ctx.save_for_backward(cov, targets, penalty, index, value, count)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    cov, targets, penalty, index, value, count = ctx.saved_tensors
    grad_cov, grad_lam = torch.ops.neuraldeps.covlasso_backward(grads[0], cov, targets, penalty, index, value, count)
    return grad_cov, None, grad_lam, None, None, None, None


def _loop_over_batch(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """vmap rule of an operator whose problems share nothing: one call per batch entry."""
    calls = [
        op(*(arg if dim is None else arg.select(dim, b) for arg, dim in zip(args, in_dims, strict=True)))
        for b in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


class _SolveTargets(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if args[0].is_cuda and (reason := torch.ops.neuraldeps.cuda_library_error()):
            _log.debug("covlasso runs on the plain PyTorch reference: %s", reason)
            return _solve_by_reference(*args)
        return torch.ops.neuraldeps.covlasso(*args)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save_for_gradient)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _loop_over_batch(_SolveTargets.apply, info, in_dims, *args)


class _LambdaMax(torch.autograd.Function):
    @staticmethod
    def forward(cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
        return torch.ops.neuraldeps.lambda_max(cov, targets, penalty)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _lambda_max_gradient(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _loop_over_batch(_LambdaMax.apply, info, in_dims, *args)


def _register() -> None:
    torch.library.register_fake("neuraldeps::covlasso", _fake_covlasso)
    torch.library.register_fake("neuraldeps::lambda_max", _fake_lambda_max)
    torch.library.register_fake("neuraldeps::covlasso_backward", _fake_covlasso_backward)
    torch.library.register_autograd("neuraldeps::covlasso", _gradient, setup_context=_save_for_gradient)
    torch.library.register_autograd(
        "neuraldeps::lambda_max", _LambdaMax.backward, setup_context=_LambdaMax.setup_context
    )
    for name in ("covlasso", "lambda_max", "covlasso_backward"):
        op = getattr(torch.ops.neuraldeps, name).default

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = op) -> tuple[Any, Any]:
            return _loop_over_batch(op, info, in_dims, *args)

        torch.library.register_vmap(f"neuraldeps::{name}", rule)
    for name in ("covlasso", "lambda_max"):
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"neuraldeps::{name}", device, torch.float32)


_register()
