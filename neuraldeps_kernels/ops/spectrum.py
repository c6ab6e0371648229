"""Singular values, numerical rank and low-rank truncation of batches of matrices a [..., m, n], k = min(m, n).

    a = sum_i sigma_i u_i v_i',   sigma_1 >= .. >= sigma_k >= 0,   rank = #{ i : sigma_i > max(atol, rtol sigma_1) }

Operators on [B, m, n]:

- `torch.ops.neuraldeps.svdvals`, `.matrix_rank`: csrc/torch/spectrum.cpp, csrc/cpu/spectrum.cpp, csrc/cuda/spectrum.cu.
- `torch.ops.neuraldeps.low_rank_project`: products with the leading singular vectors.
- `.svdvals_backward` and `.low_rank_project_backward`: their gradients, which have no gradient themselves.

On CUDA nothing waits for the device, except in PyTorch's own functions: those serve, in float64, what is too long for
our kernels (`_LONGEST_ON_CUDA`, `_LONGEST_BASIS_ON_CUDA`), and everything where the CUDA library does not load.

Source: papers of section "Spectra and rank"; the counting without an SVD and the gradient of the truncation are ours.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import spectrum as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_RULES = ("default", "authors_gram")
_EPS32 = 2.0**-23

# Singular vectors come from our kernel up to this short side, with matrices for most of its lanes; LAPACK is faster
# beyond. The gradient of the values holds both sides of one matrix in its work space.
_LONGEST_BASIS, _LONGEST_BASIS_OF_FEW, _FEW, _LONGEST_SIDE = 256, 32, 4, 4096

# The same on CUDA, where a matrix has one block: of values and ranks (ND_SPECTRUM_LONGEST of cuda_api.h), and of
# vectors, whose rotations cost ten times as much.
_LONGEST_ON_CUDA = 1024
_LONGEST_BASIS_ON_CUDA, _LONGEST_BASIS_OF_FEW_ON_CUDA, _FEW_ON_CUDA = 512, 160, 16


@annotated
def svdvals(a: Tensor, *, check: bool = False) -> Tensor:
    """Singular values of `a`, descending.

    Args:
        a: [..., m, n], float32, float64, bfloat16 or float16; any strides, m or n or the batch may be 0.
        check: raise if `a` holds NaN or infinity. That reads values: on CUDA the host waits.

    Returns:
        [..., min(m, n)], float64 for float64 `a`, else float32, with errors of a few last digits of sigma_1 at most. A
        matrix with NaN or infinity has NaN values. Differentiable once: the gradient of sigma_i is u_i v_i', one choice
        of it where values repeat, and 0 for a vanishing sigma_i. What backward needs is kept: k (k + 4) float64 numbers
        a matrix, k = min(m, n), or singular vectors where LAPACK serves.

        On the CPU a value depends on its own matrix alone, to the last bit, but for one step: batches of fewer than 4
        matrices go to LAPACK beyond min(m, n) = 64 (a single one beyond 32, in float64 always), larger ones beyond 256
        (in float64 beyond 128, or where one side is more than twice the other). On CUDA it does up to 1024.

    Raises:
        ValueError: `a` has fewer than 2 dimensions; with `check`, it holds NaN or infinity.
        TypeError: `a` is no tensor of these dtypes.

    Source: our choice of method, csrc/cpu/spectrum.cpp.
    """
    _check_matrices(a, check)
    flat = _flat(a)
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(flat):
        return _as_batch(_Svdvals.apply(flat), a)  # type: ignore[no-untyped-call]
    if flat.requires_grad and torch.is_grad_enabled():
        return _as_batch(_svdvals_for_gradient(flat), a)
    return _as_batch(torch.ops.neuraldeps.svdvals(flat), a)


@annotated
def matrix_rank(
    a: Tensor,
    *,
    rtol: float | Tensor | None = None,
    atol: float | None = None,
    rule: str = "default",
    hermitian: bool = False,
    check: bool = False,
) -> Tensor:
    """Number of singular values of `a` above `max(atol, rtol sigma_1)`, as `torch.linalg.matrix_rank`.

    Args:
        a: as in `svdvals`.
        rtol: tolerance relative to sigma_1, or a 1-D tensor of R of them, counted in one pass. Default `max(m, n) eps`
            (eps of float64 for float64 `a`, else of float32), or 0 if `atol` is positive.
        atol: absolute tolerance; default 0.
        rule: where `rtol` is not given, its default: "default" as above, or "authors_gram", the rule of the authors'
            code, which counts eigenvalues of the Gram matrix above `n eps32` of the largest (eps32 = 2^-23, n columns):
            `rtol = sqrt(n eps32)` for `a` itself, and `n eps32` with `hermitian`, where `a` is that Gram matrix.
        hermitian: `a` is symmetric, only its lower triangle is read, and its absolute eigenvalues are counted.
        check: raise if `a` holds NaN or infinity. That reads values: on CUDA the host waits.

    Returns:
        int64 [...], or [..., R] for a 1-D `rtol`. 0 for a zero or empty matrix, -1 where a matrix holds NaN or
        infinity. A singular value at the threshold counts if it is above it; one within about 1e-8 (relative) of it may
        count either way, and in float32 so may one whose distance from it is of the order of 1e-15 sigma_1.

    Raises:
        ValueError: a shape does not fit, a tolerance is negative or NaN, `rule` is unknown or given beside `rtol` or
            `atol`; with `check`, `a` holds NaN or infinity.
        TypeError: `a` is no tensor of these dtypes.

    Source: rank as in Rank Diminishing (arXiv 2206.06072); counting without an SVD is ours.
    """
    _check_matrices(a, check)
    if hermitian and a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a must be square with hermitian=True, not {list(a.shape)}")
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {rule!r}")
    if rule != "default" and (rtol is not None or atol is not None):
        raise ValueError(f"rule={rule!r} sets the tolerance: give neither rtol={rtol} nor atol={atol}")
    atol_value = _checked_atol(atol)
    if rtol is None:
        rtol = _default_rtol(a, atol_value, rule, hermitian)
    tolerances = _checked_rtol(rtol)
    rank = torch.ops.neuraldeps.matrix_rank(_flat(a), tolerances.reshape(-1), atol_value, hermitian)
    rank = _as_batch(rank, a)
    return rank if tolerances.dim() else rank.squeeze(-1)


@annotated
def effective_rank(a: Tensor, *, check: bool = False) -> Tensor:
    """exp of the entropy of sigma_i / sum_j sigma_j: between 1 and min(m, n), 0 for a zero or empty matrix.

    Args:
        a, check: as in `svdvals`.

    Returns:
        [...], of the dtype of `svdvals`, differentiable; NaN where a matrix holds NaN or infinity.

    Raises:
        ValueError, TypeError: as `svdvals`.

    Source: the entropy effective rank of Roy and Vetterli.
    """
    values = svdvals(a, check=check)
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total == 0, 1.0, total)
    positive = torch.where(share == 0, 1.0, share)  # p log p = 0 at 0, without a gradient there
    return torch.where(total[..., 0] == 0, 0.0, (-(positive * positive.log()).sum(-1)).exp())


@annotated
def stable_rank(a: Tensor, *, check: bool = False) -> Tensor:
    """|a|_F^2 / |a|_2^2 = sum_i (sigma_i / sigma_1)^2: between 1 and the rank, 0 for a zero or empty matrix.

    Args:
        a, check: as in `svdvals`.

    Returns:
        [...], of the dtype of `svdvals`, differentiable; NaN where a matrix holds NaN or infinity.

    Raises:
        ValueError, TypeError: as `svdvals`.
    """
    values = svdvals(a, check=check)
    if values.shape[-1] == 0:
        return values.sum(-1)
    top = values[..., :1]
    return (values / torch.where(top == 0, 1.0, top)).square().sum(-1)


@annotated
def low_rank_project(a: Tensor, k: int, *, mode: str = "exact", check: bool = False) -> Tensor:
    """The nearest matrix of rank at most k, `sum_(i <= k) sigma_i u_i v_i'`.

    Args:
        a: as in `svdvals`.
        k: number of terms, at least 0; all of them, and so `a` itself, from min(m, n) on.
        mode: of the gradient: "exact", or "detach", which takes the projection on the leading singular vectors of the
            shorter side as a constant: cheaper, and without the growth at a small gap.
        check: raise if `a` holds NaN or infinity. That reads values: on CUDA the host waits.

    Returns:
        [..., m, n] in the dtype of `a`; NaN where a matrix holds NaN or infinity. Differentiable once. The gradient
        couples kept with dropped terms only, so repeated values on either side are no obstacle; it grows with
        `1 / (sigma_k - sigma_(k+1))`, and where those two are equal the truncation has no unique value, and the term is
        left out. Where the rank r of a matrix is below k it is the gradient of the truncation to r terms, in particular
        0 for a zero matrix.

    Raises:
        ValueError: `a` has fewer than 2 dimensions, k is negative or `mode` unknown; with `check`, `a` holds NaN or
            infinity.
        TypeError: `a` is no tensor of these dtypes, or `k` is no integer.

    Source: research notes, section 3 (ours).
    """
    _check_matrices(a, check)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    if mode not in ("exact", "detach"):
        raise ValueError(f"mode must be one of exact, detach, not {mode!r}")
    if mode == "detach" and k < min(a.shape[-2:]) and a.numel() > 0:
        return _as_batch(_project_on_constant(_flat(a), k), a)
    return _as_batch(_LowRankProject.apply(_flat(a), k), a)  # type: ignore[no-untyped-call]


@annotated
def principal_directions(
    rows: Tensor, rank: int | None = None, *, energy: float | None = None
) -> tuple[Tensor, Tensor]:
    """The subspace that rows, such as gradients, share: leading right singular vectors.

    Args:
        rows: [M, d], or L problems [L, M, d], finite; float32, float64, bfloat16 or float16. Not centred.
        rank: r, 1 to min(M, d); 1 if neither it nor `energy` is given.
        energy: in (0, 1]: the smallest r whose squared singular values have this share of the sum, in each of the
            problems. The host waits for it.

    Returns:
        Orthonormal directions [r, d] or [L, r, d] and all singular values, descending, [k] or [L, k], k = min(M, d), in
        the dtype of `rows` (float32 for 16-bit ones). Signs are arbitrary, and so are directions of repeated or
        vanishing values: compare projectors. Without gradients.

    Raises:
        ValueError: shapes, `rank` or `energy` do not fit, both are given, or `rows` holds NaN or infinity.
        TypeError: `rows` is no tensor of these dtypes.

    Source: our choice.
    """
    _check_matrices(rows, True)
    if rows.dim() > 3 or 0 in rows.shape:
        raise ValueError(f"rows must be [M, d] or [L, M, d] with no dimension empty, not {list(rows.shape)}")
    if rank is not None and energy is not None:
        raise ValueError("give rank or energy, not both")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], not {energy}")
    most = min(rows.shape[-2:])
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(f"rank must be in 1..{most}, not {rank}")
    a = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    flat = a if a.dim() == 3 else a[None]
    s, V = _right_basis(_tall(flat))
    r = rank or 1
    if energy is not None:
        share = s.square().cumsum(1) / s.square().sum(1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        r = min(most, int((share < energy * (1 - 1e-12)).sum(1).amax()) + 1)
    leading = V[..., :r]
    if flat.shape[1] < flat.shape[2]:  # those of the short side, carried over; QR keeps them orthonormal where s = 0
        leading = torch.linalg.qr(flat.double().mT @ leading)[0]
    U, values = leading.mT.to(a.dtype).contiguous(), s.to(a.dtype)
    return (U, values) if rows.dim() == 3 else (U[0], values[0])


# ------------------------------------------------------------------------------------------------ arguments


def _check_matrices(a: Tensor, check: bool) -> None:
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a torch.Tensor, not {type(a).__name__}")
    if a.dtype not in _INPUT_DTYPES:
        raise TypeError(f"a must be float32, float64, bfloat16 or float16, not {a.dtype}; convert it first")
    if a.dim() < 2:
        raise ValueError(f"a must be [..., m, n], not {list(a.shape)}")
    if check and not bool(a.isfinite().all()):
        raise ValueError("a holds NaN or infinity; expected finite matrices")


def _checked_atol(atol: float | None) -> float:
    value = 0.0 if atol is None else float(atol)
    if not value >= 0:
        raise ValueError(f"atol must be a number that is not negative, not {atol}")
    return value


def _checked_rtol(rtol: float | Tensor) -> Tensor:
    """rtol [] or [R] in float64 on the CPU."""
    if isinstance(rtol, Tensor):
        if rtol.dim() > 1 or rtol.is_complex():
            raise ValueError(f"rtol must be a number or a 1-D tensor, not {rtol.dtype} {list(rtol.shape)}")
        return rtol.detach().to(device="cpu", dtype=torch.float64)
    if not rtol >= 0:
        raise ValueError(f"rtol must be a number that is not negative, not {rtol}")
    return torch.tensor(rtol, dtype=torch.float64, device="cpu")


def _default_rtol(a: Tensor, atol: float, rule: str, hermitian: bool) -> float:
    if rule == "authors_gram":
        on_gram = a.shape[-1] * _EPS32
        return on_gram if hermitian else float(on_gram**0.5)
    if atol > 0:
        return 0.0
    return max(a.shape[-2:]) * torch.finfo(_value_dtype(a)).eps


def _value_dtype(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)


def _flat(a: Tensor) -> Tensor:
    """a as [B, m, n]."""
    if a.dim() == 3:
        return a
    return a[None] if a.dim() == 2 else a.flatten(0, -3)


def _as_batch(result: Tensor, a: Tensor) -> Tensor:
    """result [B, ...] of the matrices of a as [*batch of a, ...]."""
    return result if a.dim() == 3 else result.reshape(*a.shape[:-2], *result.shape[1:])


# ------------------------------------------------------------------------------------------------ vectors


def _without_autocast(function: Any) -> Any:
    """`function` of tensors in the precision it names, also where autocast is on."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def _by_kernel(a: Tensor) -> bool:
    """Whether our kernel serves the singular vectors of a [B, m, n]."""
    shortest = min(a.shape[1:])
    if a.device.type == "cuda":
        limit = _LONGEST_BASIS_ON_CUDA if a.shape[0] >= _FEW_ON_CUDA else _LONGEST_BASIS_OF_FEW_ON_CUDA
        return shortest <= limit and _cuda_library_serves()
    longest = _LONGEST_BASIS if a.shape[0] >= _FEW else _LONGEST_BASIS_OF_FEW
    return a.dtype != torch.float64 and a.device.type == "cpu" and shortest <= longest


def _gradient_by_kernel(a: Tensor) -> bool:
    """Whether our kernel serves the gradient of the values of a [B, m, n]."""
    return _by_kernel(a) and (a.device.type == "cuda" or max(a.shape[1:]) <= _LONGEST_SIDE)


@functools.cache
def _cuda_library_serves() -> bool:
    reason = torch.ops.neuraldeps.cuda_library_error()
    if reason:
        _log.warning("spectrum on CUDA runs on the plain PyTorch reference: %s", reason)
    return not reason


def _served_on_cuda(a: Tensor) -> bool:
    """Whether our kernels serve values and ranks of a CUDA a [B, m, n]."""
    return min(a.shape[1:]) <= _LONGEST_ON_CUDA and _cuda_library_serves()


def _svdvals_on_cuda(a: Tensor) -> Tensor:
    if _served_on_cuda(a):
        return torch.ops.neuraldeps.svdvals_device(a)  # type: ignore[no-any-return]
    return reference.svdvals(a)


def _matrix_rank_on_cuda(a: Tensor, rtol: Tensor, atol: float, hermitian: bool) -> Tensor:
    if _served_on_cuda(a):
        return torch.ops.neuraldeps.matrix_rank_device(a, rtol, atol, hermitian)  # type: ignore[no-any-return]
    return reference.matrix_rank(a, rtol, atol, hermitian)


def _tall(a: Tensor) -> Tensor:
    """a or its transpose, whichever has at least as many rows as columns."""
    return a if a.shape[-2] >= a.shape[-1] else a.mT


def _right_basis(a: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [B, n], descending, and right singular vectors, columns of [B, n, n], of tall a [B, m, n], in
    float64. Vectors of vanishing values are any orthonormal ones.
    """
    if _by_kernel(a):
        s, vh = torch.ops.neuraldeps.singular_basis(a)
    else:
        _, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return s, vh.mT


def _finite_matrices(a: Tensor) -> tuple[Tensor, Tensor]:
    """a with zeros in place of matrices with NaN or infinity, and which those are [B, 1, 1]."""
    wrong = ~a.isfinite().all(-1).all(-1)[:, None, None]
    return torch.where(wrong, torch.zeros((), dtype=a.dtype, device=a.device), a), wrong


def _low_rank_project(a: Tensor, k: int) -> Tensor:
    """a V_k V_k', V_k the leading right singular vectors."""
    if k >= min(a.shape[1:]) or a.numel() == 0:
        return a.clone(memory_format=torch.contiguous_format)
    finite, wrong = _finite_matrices(a)
    tall = _tall(finite)
    _, V = _right_basis(tall)
    kept = V[..., :k]
    projected = (tall.double() @ kept) @ kept.mT
    oriented = projected if tall.shape == a.shape else projected.mT
    return torch.where(wrong, torch.nan, oriented).to(a.dtype).contiguous()


@_without_autocast
def _project_on_constant(a: Tensor, k: int) -> Tensor:
    """a V_k V_k' as `_low_rank_project`, V_k a constant of the gradient."""
    with torch.no_grad():
        finite, wrong = _finite_matrices(a)
        kept = _right_basis(_tall(finite))[1][..., :k]
    tall = _tall(torch.where(wrong, torch.nan, a)).double()
    projected = (tall @ kept) @ kept.mT
    return (projected if a.shape[-2] >= a.shape[-1] else projected.mT).to(a.dtype).contiguous()


def _low_rank_project_backward(grad: Tensor, a: Tensor, k: int) -> Tensor:
    """With P = V_k V_k' of tall a and D of its Gram matrix, d(a P) = da P + a dP and

        dP = sum over kept i and dropped j of (v_i v_j' + v_j v_i') (v_i' dD v_j) / (sigma_i^2 - sigma_j^2),

    so that dL/da = G P + a V (C + C') V', C_ij = (H_ij + H_ji) / (sigma_i^2 - sigma_j^2), H = V' a' G V.
    """
    if k >= min(a.shape[1:]) or a.numel() == 0:
        return grad.clone(memory_format=torch.contiguous_format)
    finite, wrong = _finite_matrices(a)
    tall = _tall(finite)
    transposed = tall.shape != a.shape
    s, V = _right_basis(tall)
    A, G = tall.double(), (grad.mT if transposed else grad).double()
    largest = s.amax(-1, keepdim=True)
    rank = (s > largest * (max(a.shape[1:]) * torch.finfo(_value_dtype(a)).eps)).sum(-1, keepdim=True)  # [B, 1]
    index = torch.arange(s.shape[-1], device=a.device)
    kept = (index < k) & (index < rank)  # [B, n]
    AV, GV = A @ V, G @ V
    H = AV.mT @ GV
    gap = (s[:, :, None] - s[:, None, :]) * (s[:, :, None] + s[:, None, :])
    coupled = kept[:, :, None] & ~kept[:, None, :] & (gap > 0)
    C = torch.where(coupled, (H + H.mT) / torch.where(coupled, gap, 1.0), 0.0)
    result = (GV * kept[:, None, :] + AV @ (C + C.mT)) @ V.mT
    return torch.where(wrong, torch.nan, result.mT if transposed else result).to(a.dtype).contiguous()


def _svdvals_for_gradient(a: Tensor) -> Tensor:
    """Values of a [B, m, n] by the way whose gradient is the fastest."""
    if _gradient_by_kernel(a):
        rule = _Svdvals if a.device.type == "cuda" else _SvdvalsByKernel
        return rule.apply(a)  # type: ignore[no-any-return, no-untyped-call]
    if a.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not bool(a.isfinite().all()):
        return _SvdvalsByLapack.apply(a)  # type: ignore[no-any-return, no-untyped-call]
    values = torch.linalg.svdvals(a.to(_value_dtype(a)))
    return torch.where(values > 0, values, 0.0)  # no gradient at 0


def _svdvals_backward(grad: Tensor, a: Tensor) -> Tensor:
    """U diag(grad) V' [B, m, n] from grad [B, k]; vanishing values give nothing."""
    if a.numel() == 0:
        return torch.zeros_like(a, memory_format=torch.contiguous_format)
    if not _gradient_by_kernel(a):
        finite, wrong = _finite_matrices(a)
        return torch.where(wrong, torch.nan, _gradient_by_svd(grad, finite)).to(a.dtype).contiguous()
    return _gradient_of_form(grad, a, None)


def _gradient_of_form(grad: Tensor, a: Tensor, form: Tensor | None) -> Tensor:
    gradient, unresolved = torch.ops.neuraldeps.svdvals_gradient(grad.to(_value_dtype(a)), a, form)
    if a.device.type == "cpu" and bool(unresolved.any()):  # on CUDA all are resolved
        gradient[unresolved] = _gradient_by_svd(grad[unresolved], a[unresolved].double()).float()
    result: Tensor = gradient.to(a.dtype)
    return result


def _gradient_by_svd(grad: Tensor, a: Tensor) -> Tensor:
    return _weighted_terms(grad, *torch.linalg.svd(a.to(_value_dtype(a)), full_matrices=False))


def _weighted_terms(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """sum_i weight_i u_i v_i' over the values that do not vanish."""
    product: Tensor = (u * torch.where(s > 0, weight.to(s.dtype), 0.0)[:, None, :]) @ vh
    return product


# ------------------------------------------------------------------------------------------------ operator rules


def _values_like(a: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], min(a.shape[1], a.shape[2])), dtype=_value_dtype(a))


def _ranks_like(a: Tensor, rtol: Tensor, atol: float, hermitian: bool) -> Tensor:
    return a.new_empty((a.shape[0], rtol.shape[0]), dtype=torch.int64)


def _basis_like(a: Tensor) -> tuple[Tensor, Tensor]:
    B, k = a.shape[0], min(a.shape[1], a.shape[2])
    return a.new_empty((B, k), dtype=torch.float64), a.new_empty((B, k, k), dtype=torch.float64)


def _values_and_form_like(a: Tensor) -> tuple[Tensor, Tensor]:
    k = min(a.shape[1], a.shape[2])
    return _values_like(a), a.new_empty(((a.shape[0] + 7) // 8 * 8 * k * (k + 4),), dtype=torch.float64)


def _gradient_like(grad: Tensor, a: Tensor, form: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape, dtype=_value_dtype(a)), a.new_empty((a.shape[0],), dtype=torch.bool)


def _matrices_like(a: Tensor, *_: Any) -> Tensor:
    return a.new_empty(a.shape)


def _fold_batch(op: Any, matrices: int, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """vmap rule: the new dimension joins the batch of the leading `matrices` arguments."""
    if any(dim is not None for dim in in_dims[matrices:]):
        raise ValueError("vmap may not run over tolerances: give all of them as a 1-D rtol")

    def folded(arg: Tensor, dim: int | None) -> Tensor:
        batched = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return batched.flatten(0, 1)

    def unfolded(result: Tensor) -> Tensor:
        each = result.shape[0] // max(info.batch_size, 1)
        return result.reshape(info.batch_size, each, *result.shape[1:])

    results = op(*(folded(args[i], in_dims[i]) for i in range(matrices)), *args[matrices:])
    if isinstance(results, Tensor):
        return unfolded(results), 0
    return tuple(map(unfolded, results)), (0,) * len(results)


class _Gradient(torch.autograd.Function):
    """A backward operator `op` of (grad, a, ..): there is no second gradient."""

    @staticmethod
    def forward(op: Any, *args: Any) -> Tensor:
        return op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError("svdvals and low_rank_project are differentiable once, not twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Any, *args: Any) -> Any:
        return _fold_batch(functools.partial(_Gradient.apply, op), 2, info, in_dims[1:], args)


def _gradient(op: Any, *args: Any) -> Tensor:
    """`op(*args)`, refusing a gradient of its own; torch.compile has no second gradients anyway."""
    return op(*args) if torch.compiler.is_compiling() else _Gradient.apply(op, *args)  # type: ignore[no-any-return, no-untyped-call]


class _Svdvals(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return torch.ops.neuraldeps.svdvals(a)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        op = torch.ops.neuraldeps.svdvals_backward.default
        return _gradient(op, grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _fold_batch(_Svdvals.apply, 1, info, in_dims, args)


class _SvdvalsByKernel(torch.autograd.Function):
    """Values with the tridiagonal form that their gradient starts from."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, form = torch.ops.neuraldeps.svdvals_with_form(a)
        ctx.save_for_backward(a, form)
        return values  # type: ignore[no-any-return]

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        a, form = ctx.saved_tensors
        return _gradient_of_form(grad, a, form)


class _SvdvalsByLapack(torch.autograd.Function):
    """Values with the vectors for their gradient from one decomposition."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, a: Tensor) -> Tensor:
        finite, wrong = _finite_matrices(a)
        u, s, vh = torch.linalg.svd(finite.to(_value_dtype(a)), full_matrices=False)
        ctx.save_for_backward(u, s, vh, wrong)
        ctx.dtype = a.dtype
        return torch.where(wrong[..., 0], torch.nan, s)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        u, s, vh, wrong = ctx.saved_tensors
        return torch.where(wrong, torch.nan, _weighted_terms(grad, u, s, vh)).to(ctx.dtype)


class _LowRankProject(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, k: int) -> Tensor:
        return torch.ops.neuraldeps.low_rank_project(a, k)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.k = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        op = torch.ops.neuraldeps.low_rank_project_backward.default
        return _gradient(op, grad, *ctx.saved_tensors, ctx.k), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _fold_batch(_LowRankProject.apply, 1, info, in_dims, args)


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object


def _register() -> None:
    _library.define("svdvals_backward(Tensor grad, Tensor a) -> Tensor")
    _library.define("low_rank_project(Tensor a, int k) -> Tensor")
    _library.define("low_rank_project_backward(Tensor grad, Tensor a, int k) -> Tensor")
    in_torch = {
        "svdvals_backward": _svdvals_backward,
        "low_rank_project": _low_rank_project,
        "low_rank_project_backward": _low_rank_project_backward,
    }
    for name, function in in_torch.items():
        _library.impl(name, _without_autocast(function), "CPU")
        _library.impl(name, _without_autocast(function), "CUDA")
    _library.impl("svdvals", _without_autocast(_svdvals_on_cuda), "CUDA")
    _library.impl("matrix_rank", _without_autocast(_matrix_rank_on_cuda), "CUDA")
    shapes_and_matrices: dict[str, tuple[Any, int]] = {  # no matrices: no vmap
        "svdvals": (_values_like, 1),
        "matrix_rank": (_ranks_like, 1),
        "svdvals_device": (_values_like, 1),
        "matrix_rank_device": (_ranks_like, 1),
        "singular_basis": (_basis_like, 1),
        "svdvals_with_form": (_values_and_form_like, 0),
        "svdvals_gradient": (_gradient_like, 2),
        "svdvals_backward": (lambda grad, a: _matrices_like(a), 2),
        "low_rank_project": (_matrices_like, 1),
        "low_rank_project_backward": (lambda grad, a, k: _matrices_like(a), 2),
    }
    for name, (fake, matrices) in shapes_and_matrices.items():
        op = getattr(torch.ops.neuraldeps, name).default

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = op, matrices: int = matrices) -> Any:
            return _fold_batch(op, matrices, info, in_dims, args)

        torch.library.register_fake(f"neuraldeps::{name}", fake)
        if matrices:
            torch.library.register_vmap(f"neuraldeps::{name}", rule)
    for name, rules in (("svdvals", _Svdvals), ("low_rank_project", _LowRankProject)):
        torch.library.register_autograd(f"neuraldeps::{name}", rules.backward, setup_context=rules.setup_context)


_register()
