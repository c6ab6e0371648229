"""A step of principal knowledge descent: gradients projected on the basis of a layer, and the codes moved along.

    h = g + rho (z - origin),   p = sum_k (h . u_k) u_k,   z' = z - a p

Operator: `torch.ops.neuraldeps.projected_step(z, gradient, basis, step, origin, rho) -> (z', p, |p|^2)`, on the CPU
csrc/cpu/projected_step.cpp, on CUDA triton/projected_step.py, else the reference.

Source: a reconstruction of principal knowledge descent (arXiv 2205.13444), of which only the abstract could be read.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import projected_step as reference

_log = logging.getLogger("neuraldeps_kernels")


@annotated
def projected_step(
    z: Tensor,
    gradient: Tensor,
    basis: Tensor,
    step: float | Tensor,
    *,
    origin: Tensor | None = None,
    rho: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Latent codes after a step against their gradients, projected on a subspace.

    Args:
        z: codes [B, d], or [B, L, d] of L layers; float32 or float64, any strides.
        gradient: g, of the shape and dtype of `z`.
        basis: orthonormal rows u_k [R, d], or [L, R, d] of each layer; R = 0 leaves z as it is.
        step: a, a number or [B].
        origin: codes that the proximal term pulls to, of the shape of `z`; None: rho must be 0.
        rho: weight of the proximal term, finite and >= 0.

    Returns:
        z' and p in the shape of `z`, and |p|^2 [B] summed over layers. Differentiable in all tensors.

    Raises:
        TypeError: another dtype, or dtypes that differ.
        ValueError: shapes or `rho` do not fit.

    Source: our choice; see the head of this file.
    """
    if not isinstance(z, Tensor) or z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"z must be a float32 or float64 tensor, not {z.dtype if isinstance(z, Tensor) else type(z)}")
    if z.dim() not in (2, 3):
        raise ValueError(f"z must be [B, d] or [B, L, d], not {list(z.shape)}")
    for name, value, shape in (("gradient", gradient, z.shape), ("origin", origin, z.shape)):
        if value is not None and (value.shape != shape or value.dtype != z.dtype):
            raise ValueError(f"{name} must be {z.dtype} {list(shape)} as z, not {value.dtype} {list(value.shape)}")
    codes = z if z.dim() == 3 else z[:, None]
    B, L, d = codes.shape
    rows = basis if basis.dim() == 3 else basis[None]
    if basis.dim() != z.dim() or rows.shape[0] != L or rows.shape[2] != d or rows.dtype != z.dtype:
        wanted = f"[R, {d}]" if z.dim() == 2 else f"[{L}, R, {d}]"
        raise ValueError(f"basis must be {z.dtype} {wanted}, not {basis.dtype} {list(basis.shape)}")
    if not (math.isfinite(rho) and rho >= 0) or (rho > 0 and origin is None):
        raise ValueError(f"rho must be finite, >= 0, and 0 without an origin, not {rho}")
    a = torch.as_tensor(step, dtype=z.dtype, device=z.device).expand(B)
    like = [None if value is None else value.reshape(codes.shape) for value in (gradient, origin)]
    moved, p, squares = torch.ops.neuraldeps.projected_step(codes, like[0], rows, a, like[1], float(rho))
    return moved.view(z.shape), p.view(z.shape), squares.sum(1)


# ------------------------------------------------------------------------------------------------ operator rules


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, gradient, basis, step, origin, ctx.rho = inputs
    ctx.save_for_backward(z, gradient, basis, step, origin, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, of_moved: Tensor | None, of_direction: Tensor | None, of_squares: Tensor | None
) -> tuple[Tensor | None, ...]:
    """With P the projection and G what reaches p: dh = P G, dU = (h'G + G'h) U for symmetric P = U'U."""
    z, gradient, basis, step, origin, p = ctx.saved_tensors
    G = torch.zeros_like(p) if of_direction is None else of_direction
    if of_moved is not None:
        G = G - step[:, None, None] * of_moved
    if of_squares is not None:
        G = G + 2 * of_squares[..., None] * p
    h = gradient if origin is None else gradient + ctx.rho * (z - origin)
    by_layer = [value.transpose(0, 1) for value in (h, G)]  # [L, B, d]
    along = [value @ basis.mT for value in by_layer]  # [L, B, R]
    dh = (along[1] @ basis).transpose(0, 1)
    dbasis = along[1].mT @ by_layer[0] + along[0].mT @ by_layer[1]
    dstep = None if of_moved is None else -(of_moved * p).sum((1, 2))
    pulled = ctx.rho * dh
    dz = pulled if origin is not None else torch.zeros_like(dh)
    return dz if of_moved is None else dz + of_moved, dh, dbasis, dstep, None if origin is None else -pulled, None


def _like(
    z: Tensor, gradient: Tensor, basis: Tensor, step: Tensor, origin: Tensor | None, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[:2])


def _on_cuda(
    z: Tensor, gradient: Tensor, basis: Tensor, step: Tensor, origin: Tensor | None, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from neuraldeps_kernels.triton import projected_step as kernels
    except ImportError as error:
        _log.debug("projected_step runs on the plain PyTorch reference: %s", error)
        return reference.projected_step(z, gradient, basis, step, origin, rho)
    return kernels.projected_step(z, gradient, basis, step, origin, rho)


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object
_library.impl("projected_step", _on_cuda, "CUDA")
torch.library.register_fake("neuraldeps::projected_step", _like)
torch.library.register_autograd("neuraldeps::projected_step", _backward, setup_context=_setup)
