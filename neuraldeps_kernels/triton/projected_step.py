# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The projected step of principal knowledge descent on CUDA.

    h = g + rho (z - origin),   p = h U'U,   z' = z - a p,      z [B, L, d], U [L, R, d]

Floor, bytes a value of float32: 20 (read z, g, origin, write z', p); the second pass over z, g and origin, in which
p is formed, finds them in L2. 4 R flops a value, of three TF32 products each in float32 ("tf32x3").

Layout: a program owns CODES codes of one layer, with their products h . u_k [CODES, R] in registers, and passes twice
over d. R is padded to a power of two of at least 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES, WIDTH = 16, 64


@triton.jit
def descent(z_ptr, gradient_ptr, origin_ptr, at, inside, rho, HAS_ORIGIN: tl.constexpr):
    """h of a block of codes."""
    h = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    if HAS_ORIGIN:
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        h += rho.to(h.dtype) * (z - tl.load(origin_ptr + at, mask=inside, other=0.0))
    return h


@triton.jit
def projected_step_kernel(
    z_ptr,  # [B, L, d], as gradient, origin, moved and direction
    gradient_ptr,
    origin_ptr,
    basis_ptr,  # [L, R, d]
    step_ptr,  # [B]
    rho_ptr,
    moved_ptr,
    direction_ptr,
    squares_ptr,  # [B, L]
    B,
    L,
    R,
    d,
    HAS_ORIGIN: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    layer = tl.program_id(0) % L
    b = (tl.program_id(0) // L) * CODES + tl.arange(0, CODES).to(tl.int64)
    k = tl.arange(0, RANK)
    rho = tl.load(rho_ptr)
    NUMBER: tl.constexpr = z_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == NUMBER else "ieee"
    rows = (b * L + layer)[:, None] * d
    basis_ptr += layer.to(tl.int64) * R * d

    along = tl.zeros([CODES, RANK], NUMBER)
    for first in range(0, d, WIDTH):
        j = first + tl.arange(0, WIDTH)
        inside = (b < B)[:, None] & (j < d)[None, :]
        h = descent(z_ptr, gradient_ptr, origin_ptr, rows + j[None, :], inside, rho, HAS_ORIGIN)
        in_basis = (j < d)[:, None] & (k < R)[None, :]
        transposed = tl.load(basis_ptr + k[None, :] * d + j[:, None], mask=in_basis, other=0.0)
        along = tl.dot(h, transposed, along, input_precision=PRECISION, out_dtype=NUMBER)

    a = tl.load(step_ptr + b, mask=b < B, other=0.0)
    squares = tl.zeros([CODES], NUMBER)
    for first in range(0, d, WIDTH):
        j = first + tl.arange(0, WIDTH)
        inside = (b < B)[:, None] & (j < d)[None, :]
        in_basis = (k < R)[:, None] & (j < d)[None, :]
        basis = tl.load(basis_ptr + k[:, None] * d + j[None, :], mask=in_basis, other=0.0)
        p = tl.dot(along, basis, input_precision=PRECISION, out_dtype=NUMBER)
        at = rows + j[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        tl.store(moved_ptr + at, z - a[:, None] * p, mask=inside)
        tl.store(direction_ptr + at, p, mask=inside)
        squares += tl.sum(p * p, 1)
    tl.store(squares_ptr + b * L + layer, squares, mask=b < B)


def projected_step(
    z: Tensor, gradient: Tensor, basis: Tensor, step: Tensor, origin: Tensor | None, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z', p [B, L, d] and |p|^2 [B, L] of float32 or float64 codes."""
    B, L, d = z.shape
    R = basis.shape[1]
    z, gradient, basis, step = (value.contiguous() for value in (z, gradient, basis, step))
    start = z if origin is None else origin.contiguous()
    moved, direction = torch.empty_like(z), torch.empty_like(z)
    squares = z.new_empty(B, L)
    weight = z.new_empty(1, dtype=torch.float64).fill_(rho)  # a plain number would be passed on in float32
    if z.numel():
        projected_step_kernel[(L * triton.cdiv(B, CODES),)](
            *(z, gradient, start, basis, step, weight, moved, direction, squares, B, L, R, d),
            *(origin is not None, CODES, WIDTH, max(16, triton.next_power_of_2(R))),
        )
    return moved, direction, squares
