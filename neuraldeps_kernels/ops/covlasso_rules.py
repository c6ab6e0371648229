"""The operators of the hot path covlasso under torch: shapes, gradients, vmap, autocast, CUDA preparation, fallback.

    covlasso         (cov, targets, lam, penalty, tol, max_pivots, capacity, cross, variance, nonnegative, ridge,
                      start_value, start_index, start_count) -> (value, index, count, info)
    covlasso_top_k   (cov, targets, k, penalty, tol, max_pivots, position, cross, variance, nonnegative, ridge)
                      -> (value, index, count, info, lam)
    lambda_max       (cov, targets, penalty, cross, nonnegative) -> lambda_max

cov [n, n], or [T, n, n] with one matrix a target; targets int64 [T]: rows of cov, or of cross [m, n] with variance [m]
float64; lam float64 [T] or [T, L]; penalty [n] or [T, n], infinite where a category may not be used; None: ones.
Results are [T, ...] or [T, L, ...]: value, index [..., capacity], zero beyond count [...]; info [..., 6] float64.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.reference import covlasso as reference

_log = logging.getLogger("neuraldeps_kernels")

INFO_FIELDS = ("err2", "duality_gap", "kkt_violation", "n_pivots", "status", "lambda_max")
_GRADIENT_ELEMENTS = 1 << 25  # of the systems that are solved at once

Solved = tuple[Tensor, Tensor, Tensor, Tensor]  # value, index, count, info
Start = tuple[Tensor, ...]  # value [T, c], index [T, c] int32, count [T] int32


def solve_targets(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None,
    tol: float,
    max_pivots: int,
    capacity: int,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    start: Start | None = None,
) -> Solved:
    """`torch.ops.neuraldeps.covlasso` with a gradient that `torch.func` transforms understand, of static shape.

    Args:
        cov, targets, lam, penalty, cross, variance: as above; cov float32 or float64, penalty and cross of its dtype.
        tol, max_pivots, nonnegative, ridge: as in `covlasso`.
        capacity: coefficients stored per problem; n holds every support. A support that is cut has status capped.
        start: support and signs that the first lam starts from.

    Returns:
        value, index int32, count int32, info float64 (err2, duality_gap, kkt_violation, n_pivots, status, lambda_max).
    """
    return _SolveTargets.apply(  # type: ignore[no-any-return, no-untyped-call]
        cov, targets, lam, penalty, tol, max_pivots, capacity, cross, variance, nonnegative, ridge, *(start or ())
    )


def lambda_max_of(
    cov: Tensor, targets: Tensor, penalty: Tensor | None, cross: Tensor | None, nonnegative: bool
) -> Tensor:
    """`torch.ops.neuraldeps.lambda_max` with a gradient that `torch.func` transforms understand."""
    return _LambdaMax.apply(cov, targets, penalty, cross, nonnegative)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------------------------------------------ shapes


def _fake_solution(cov: Tensor, shape: torch.Size, capacity: int) -> Solved:
    return (
        cov.new_empty((*shape, capacity)),
        cov.new_empty((*shape, capacity), dtype=torch.int32),
        cov.new_empty(shape, dtype=torch.int32),
        cov.new_empty((*shape, len(INFO_FIELDS)), dtype=torch.float64),
    )


def _fake_covlasso(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None,
    tol: float,
    max_pivots: int,
    capacity: int,
    *options: Any,
    **named: Any,
) -> Solved:
    return _fake_solution(cov, lam.shape, capacity)


def _fake_top_k(cov: Tensor, targets: Tensor, k: int, *options: Any, **named: Any) -> tuple[Tensor, ...]:
    return (*_fake_solution(cov, targets.shape, k), cov.new_empty(targets.shape, dtype=torch.float64))


def _fake_lambda_max(cov: Tensor, targets: Tensor, *options: Any, **named: Any) -> Tensor:
    return cov.new_empty(targets.shape, dtype=torch.float64)


_library = torch.library.Library("neuraldeps", "FRAGMENT")
_library.define(
    "covlasso_backward(Tensor grad, Tensor cov, Tensor targets, Tensor? penalty, Tensor index, Tensor value, "
    "Tensor count, Tensor? cross, float ridge) -> (Tensor grad_cov, Tensor grad_lam, Tensor grad_cross)"
)


def _fake_covlasso_backward(
    grad: Tensor,
    cov: Tensor,
    targets: Tensor,
    penalty: Tensor | None,
    index: Tensor,
    value: Tensor,
    count: Tensor,
    cross: Tensor | None,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cross = cov.new_empty((0,)) if cross is None else cross.new_empty(cross.shape)
    return cov.new_empty(cov.shape), count.new_empty(count.shape, dtype=torch.float64), grad_cross


# ------------------------------------------------------------------------------------------------ gradients


@torch.library.impl("neuraldeps::covlasso_backward", "CompositeExplicitAutograd", lib=_library)
def _covlasso_backward(
    grad: Tensor,
    cov: Tensor,
    targets: Tensor,
    penalty: Tensor | None,
    index: Tensor,
    value: Tensor,
    count: Tensor,
    cross: Tensor | None,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implicit gradient on the support a: with (S_aa + ridge) w = grad_a and signs s,

        dL/dS = -(w Theta' + Theta w') / 2        dL/dlam = -(1/2) sum_j penalty_j s_j w_j        dL/dc = w

    Theta holds the pinned -1 where the target is one of the categories (c is then a row of S); in float64. A singular
    S_aa gets 1e-8 of its mean diagonal added.
    """
    n, batched = cov.shape[-1], cov.dim() == 3
    lams = count.shape[1] if count.dim() == 2 else 1
    grad_cov = torch.zeros_like(cov, dtype=torch.float64)
    grad_lam = torch.zeros(count.numel(), dtype=torch.float64, device=cov.device)
    grad_cross = cov.new_zeros(() if cross is None else cross.shape, dtype=torch.float64)
    k = int(count.max()) if count.numel() else 0
    # One row a problem: a target at one of its lams.
    target = torch.arange(len(targets), device=cov.device).repeat_interleave(lams)
    flat = [x.reshape(-1, x.shape[-1])[:, :k] for x in (grad, index, value)]
    matrices = cov.double() if batched else cov.double()[None]
    chunk = max(1, _GRADIENT_ELEMENTS // max(1, k * k))
    for first in range(0, count.numel() if k else 0, chunk):
        rows = slice(first, first + chunk)
        of = target[rows]
        a, inside = flat[1][rows].long(), torch.arange(k, device=cov.device) < count.reshape(-1)[rows, None]
        matrix = of if batched else torch.zeros_like(of)
        w = _solve_on_support(matrices, matrix, a, inside, torch.where(inside, flat[0][rows].double(), 0.0), ridge)
        theta = torch.where(inside, flat[2][rows].double(), 0.0)
        row_penalty = penalty if penalty is None or penalty.dim() == 1 else penalty[of]
        factors = 1.0 if row_penalty is None else row_penalty.double().expand(len(a), n).gather(1, a)
        grad_lam[rows] = -0.5 * torch.where(inside, factors * theta.sign() * w, 0.0).sum(1)
        zeros = w.new_zeros(len(a), n)
        dense_w, residual = zeros.scatter_add(1, a, w), zeros.scatter_add(1, a, theta)
        if cross is None:
            residual.scatter_add_(1, targets[of, None], zeros.new_full((len(a), 1), -1.0))
        else:
            grad_cross.index_add_(0, targets[of], dense_w)
        if batched:
            grad_cov.index_add_(0, of, -dense_w[:, :, None] * residual[:, None, :])
        else:
            grad_cov -= dense_w.T @ residual
    grad_cov = ((grad_cov + grad_cov.mT) / 2).to(cov.dtype)
    return grad_cov, grad_lam.view(count.shape), grad_cross.to(cov.dtype) if cross is not None else cov.new_empty(0)


def _solve_on_support(cov: Tensor, matrix: Tensor, a: Tensor, inside: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(S_aa + ridge) w = right for padded supports a [T, k] of cov[matrix]; rows outside give zero."""
    both = inside[:, :, None] & inside[:, None, :]
    eye = torch.eye(a.shape[1], dtype=cov.dtype, device=cov.device)
    system = torch.where(both, cov[matrix[:, None, None], a[:, :, None], a[:, None, :]] + ridge * eye, eye)
    factor, failed = torch.linalg.cholesky_ex(system)
    lift = 1e-8 * system.diagonal(dim1=1, dim2=2).mean(1) * (failed > 0)
    repaired, _ = torch.linalg.cholesky_ex(system + lift[:, None, None] * eye)
    return torch.cholesky_solve(right[..., None], torch.where((failed > 0)[:, None, None], repaired, factor))[..., 0]


def _correlations(
    cov: Tensor, targets: Tensor, penalty: Tensor | None, cross: Tensor | None, nonnegative: bool
) -> Tensor:
    """|c_j| / penalty_j of every target and category, of positive c_j if nonnegative, zero at the target itself."""
    c = cov[targets] if cross is None else cross[targets]
    strength = c.clamp_min(0) if nonnegative else c.abs()
    if penalty is not None:
        strength = strength / penalty
    return strength.scatter(1, targets[:, None], 0.0) if cross is None else strength


def _lambda_max_gradient(
    grad: Tensor, cov: Tensor, targets: Tensor, penalty: Tensor | None, cross: Tensor | None, nonnegative: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of cov and cross: the maximum's gradient goes to the strongest entry, halved over the two triangles of cov."""
    strengths = _correlations(cov, targets, penalty, cross, nonnegative)
    strongest = strengths.argmax(1)
    source = cov if cross is None else cross
    slope = 2 * source[targets, strongest].sign() * grad.to(cov.dtype)
    if nonnegative:
        slope = slope * (source[targets, strongest] > 0)
    if penalty is not None:
        slope = slope / (penalty[strongest] if penalty.dim() == 1 else penalty.gather(1, strongest[:, None])[:, 0])
    gradient = torch.zeros_like(source).index_put((targets, strongest), slope, accumulate=True)
    return ((gradient + gradient.T) / 2, None) if cross is None else (None, gradient)


# ------------------------------------------------------------------------------------------------ CUDA


@torch.library.impl("neuraldeps::lambda_max", "CUDA", lib=_library)
def _lambda_max_on_cuda(
    cov: Tensor,
    targets: Tensor,
    penalty: Tensor | None,
    cross: Tensor | None = None,
    nonnegative: bool = False,
) -> Tensor:
    return 2.0 * _correlations(cov, targets, penalty, cross, nonnegative).amax(1).double()


def _padded(rows: Tensor, scale: Tensor | float) -> Tensor:
    """rows [..., n] times scale, in rows of an odd number of whole 64-byte lines, zero beyond n."""
    n, per_line = rows.shape[-1], 64 // rows.element_size()
    lines = max(n + 15, 16) // 16 * 16 // per_line | 1
    padded = rows.new_zeros((*rows.shape[:-1], lines * per_line))
    padded[..., :n] = rows * scale
    return padded


def _packed(cov: Tensor, cross: Tensor | None, ridge: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """cov symmetrised, scaled by a power of four that brings the largest variance near one, the ridge on the diagonal;
    that scale, float64 on the device; cross scaled by it.
    """
    if cov.dim() not in (2, 3) or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov must be a square matrix [n, n] or matrices [T, n, n], not {list(cov.shape)}")
    top = cov.diagonal(dim1=-2, dim2=-1).amax().double() + ridge
    scale = torch.where(top > 0, torch.exp2(-2 * torch.floor(torch.log2(top) / 2)), 1.0)
    packed = _padded(cov + cov.mT, (scale / 2).to(cov.dtype))
    packed.diagonal(dim1=-2, dim2=-1).add_((ridge * scale).to(cov.dtype))
    return packed, scale, None if cross is None else _padded(cross, scale.to(cross.dtype))


def _library_missing(what: str) -> bool:
    reason = torch.ops.neuraldeps.cuda_library_error()
    if reason:
        _log.debug("%s runs on the plain PyTorch reference: %s", what, reason)
    return bool(reason)


@torch.library.impl("neuraldeps::covlasso", "CUDA", lib=_library)
def _covlasso_on_cuda(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None,
    tol: float,
    max_pivots: int,
    capacity: int,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    *start: Tensor | None,
    **named_start: Tensor | None,
) -> Solved:
    if _library_missing("covlasso"):
        options = {"cross": cross, "variance": variance, "nonnegative": nonnegative, "ridge": ridge}
        return _solve_by_reference(cov, targets, lam, penalty, tol, capacity, **options)
    packed, scale, rows = _packed(cov, cross, ridge)
    return torch.ops.neuraldeps.covlasso_packed(  # type: ignore[no-any-return]
        packed,
        scale,
        targets,
        lam,
        penalty,
        tol,
        max_pivots,
        capacity,
        rows,
        variance,
        nonnegative,
        ridge,
        *start,
        **named_start,
    )


@torch.library.impl("neuraldeps::covlasso_top_k", "CUDA", lib=_library)
def _top_k_on_cuda(
    cov: Tensor,
    targets: Tensor,
    k: int,
    penalty: Tensor | None,
    tol: float,
    max_pivots: int,
    position: float,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> tuple[Tensor, ...]:
    if _library_missing("covlasso_top_k"):
        options = {"cross": cross, "variance": variance, "nonnegative": nonnegative, "ridge": ridge}
        return _top_k_by_reference(cov, targets, k, penalty, tol, position, **options)
    packed, scale, rows = _packed(cov, cross, ridge)
    return torch.ops.neuraldeps.covlasso_top_k_packed(  # type: ignore[no-any-return]
        packed, scale, targets, k, penalty, tol, max_pivots, position, rows, variance, nonnegative, ridge
    )


# ------------------------------------------------------------------------------------------------ fallback


def _solve_by_reference(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None,
    tol: float,
    capacity: int,
    **options: Any,
) -> Solved:
    """What the operator returns, from `reference.covlasso`, which has no pivots to count and needs no start.

    Options: cross, variance, nonnegative and ridge.
    """
    columns = [lam] if lam.dim() == 1 else list(lam.unbind(1))
    solved = []
    for column in columns:
        theta = reference.covlasso(cov, targets, column, penalty, tol=tol / 2, **options).to(cov.dtype)
        solved.append(_as_solution(theta, cov, targets, column, penalty, tol, capacity, options))
    if lam.dim() == 1:
        return solved[0]
    value, index, count, info = (torch.stack(parts, 1) for parts in zip(*solved, strict=True))
    return value, index, count, info


def _top_k_by_reference(
    cov: Tensor,
    targets: Tensor,
    k: int,
    penalty: Tensor | None,
    tol: float,
    position: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    found = reference.top_k(cov, targets, k, penalty, position=position, **options)
    value, index, count, info = _as_solution(
        found.theta.to(cov.dtype), cov, targets, found.lam, penalty, tol, k, options
    )
    info[:, INFO_FIELDS.index("status")] = torch.where(found.found, info[:, INFO_FIELDS.index("status")], 4.0)
    return value, index, count, info, found.lam


def _as_solution(
    theta: Tensor,
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None,
    tol: float,
    capacity: int,
    options: dict[str, Any],
) -> Solved:
    """Padded support, coefficients and certificate of dense coefficients theta [T, n]."""
    found = (theta != 0).sum(1)
    count = found.clamp_max(capacity)
    index = (theta == 0).int().argsort(dim=1, stable=True)[:, :capacity]
    inside = torch.arange(index.shape[1], device=index.device) < count[:, None]
    violation = reference.kkt_violation(cov, theta, targets, lam, penalty, **options)
    status = torch.where(found > capacity, 1, torch.where(violation <= tol, 0, 2))
    info = torch.stack(
        [
            reference.err2(cov, theta, targets, **options),
            reference.duality_gap(cov, theta, targets, lam, penalty, **options),
            violation,
            torch.zeros_like(violation),
            status.double(),
            reference.lambda_max(cov, targets, penalty, **options),
        ],
        1,
    )
    pad = (0, capacity - index.shape[1])
    value = torch.nn.functional.pad(torch.where(inside, theta.gather(1, index), 0.0), pad)
    columns = torch.nn.functional.pad(torch.where(inside, index, 0), pad)
    return value, columns.int(), count.int(), info


# ------------------------------------------------------------------------------------------------ registration


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cov, targets, _lam, penalty = inputs[:4]
    value, index, count, info = output
    cross, ctx.ridge, ctx.num_inputs = inputs[7], inputs[10], len(inputs)
    ctx.mark_non_differentiable(index, count, info)
    ctx.save_for_backward(cov, targets, penalty, index, value, count, cross)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    cov, targets, penalty, index, value, count, cross = ctx.saved_tensors
    grad_cov, grad_lam, grad_cross = torch.ops.neuraldeps.covlasso_backward(
        grads[0], cov, targets, penalty, index, value, count, cross, ctx.ridge
    )
    of_inputs: list[Tensor | None] = [None] * ctx.num_inputs
    of_inputs[0], of_inputs[2], of_inputs[7] = grad_cov, grad_lam, None if cross is None else grad_cross
    return tuple(of_inputs)


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
    def forward(*args: Any) -> Solved:
        return torch.ops.neuraldeps.covlasso(*args)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save_for_gradient)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _loop_over_batch(_SolveTargets.apply, info, in_dims, *args)


class _LambdaMax(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.neuraldeps.lambda_max(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.nonnegative = inputs[4]
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cov, targets, penalty, cross = ctx.saved_tensors
        grad_cov, grad_cross = _lambda_max_gradient(grad, cov, targets, penalty, cross, ctx.nonnegative)
        return grad_cov, None, None, grad_cross, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _loop_over_batch(_LambdaMax.apply, info, in_dims, *args)


def _register() -> None:
    torch.library.register_fake("neuraldeps::covlasso", _fake_covlasso)
    torch.library.register_fake("neuraldeps::covlasso_top_k", _fake_top_k)
    torch.library.register_fake("neuraldeps::lambda_max", _fake_lambda_max)
    torch.library.register_fake("neuraldeps::covlasso_backward", _fake_covlasso_backward)
    torch.library.register_autograd("neuraldeps::covlasso", _gradient, setup_context=_save_for_gradient)
    torch.library.register_autograd(
        "neuraldeps::lambda_max", _LambdaMax.backward, setup_context=_LambdaMax.setup_context
    )
    for name in ("covlasso", "covlasso_top_k", "lambda_max", "covlasso_backward"):
        op = getattr(torch.ops.neuraldeps, name).default

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = op) -> tuple[Any, Any]:
            return _loop_over_batch(op, info, in_dims, *args)

        torch.library.register_vmap(f"neuraldeps::{name}", rule)
    for name in ("covlasso", "lambda_max"):
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"neuraldeps::{name}", device, torch.float32)


_register()
