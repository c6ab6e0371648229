# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Weighted mean and centred second moment of [B, N, n] rows on CUDA: lower-triangle tiles on tensor cores.

    W = sum_r w_r,   mean = sum_r w_r x_r / W,   moment = sum_r w_r (x_r - mean) (x_r - mean)'

Method: as the CPU kernel (csrc/cpu/covariance.cpp). A pivot p near the mean is subtracted while rows are loaded,
y_r = sqrt(w_r) (x_r - p); moment = sum_r y_r y_r' - W d d' with d = mean - p.

Floor: N n (n + 1) / 2 multiply-adds at the rate of the type below; x is read once per tile of a row of tiles, from L2.

Layout: a program owns one tile [BLOCK, BLOCK] of the lower triangle and one range of rows. Its float32 sums are added
to its own float64 partial every FLUSH_ROWS rows, so no two programs write one address and there are no atomics. A
second kernel adds the partials of a tile in the order of the rows, moves them from the pivot to the mean and writes the
tile and its mirror image. The result depends on shape and dtype only, not on the device or on timing.

Precision of the products:
- float32: tf32x3 (each factor split in two, three passes), about 1e-6 of the largest variance.
- bfloat16, float16 without weights: one pass, exact products. The pivot is rounded to the dtype of x, so x - p is exact
  for p/2 <= x <= 2p; and it is 0 for columns whose mean is below 8 deviations, which need no shift: their products
  are those of x itself. float16 deviations beyond 65504 overflow.
- bfloat16, float16 with weights: as float32, since sqrt(w) x does not fit the dtype.
- float64: float64 throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PIVOT_ROWS = 64
SHIFT_ABOVE = 8.0  # deviations: below it a 16-bit column is not shifted
TARGET_PROGRAMS = 512  # a few a multiprocessor on any current device
MIN_SPLIT_ROWS = 1024
FINISH_ROWS = 32


@triton.jit
def lower_tile(tile):
    """Row and column, column <= row, of a tile numbered row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > tile).to(tl.int32)  # the square root may be off by one
    row += ((row + 1) * (row + 2) // 2 <= tile).to(tl.int32)
    return row, tile - row * (row + 1) // 2


@triton.jit
def load_shifted(x_ptr, pivot_ptr, root_ptr, rows, row_end, columns, n, row_stride, WEIGHTED: tl.constexpr):
    """y [rows, columns], zero outside the matrix; rows of weight 0 are zero whatever they hold."""
    inside = (rows < row_end)[:, None] & (columns < n)[None, :]
    pivot = tl.load(pivot_ptr + columns, mask=columns < n, other=0.0)
    if WEIGHTED:
        root = tl.load(root_ptr + rows, mask=rows < row_end, other=0.0)
        inside = inside & (root != 0.0)[:, None]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
    y = tl.where(inside, x.to(pivot.dtype) - pivot[None, :], 0.0)
    return y * root[:, None] if WEIGHTED else y.to(x.dtype)


@triton.jit
def partial_moments_kernel(
    x_ptr,  # [B, N, n], rows row_stride apart, batch entries batch_stride apart
    pivot_ptr,  # [B, n] float32, or float64 for float64 x
    root_ptr,  # [B, N] sqrt(w), dtype of the pivot; not read unless WEIGHTED
    partial_ptr,  # [B, splits, tiles, BLOCK, BLOCK] float64, zero
    sums_ptr,  # [B, splits, padded] float64, zero: sum_r w_r (x_r - p); padded: n rounded up to BLOCK
    N,
    n_units,  # n, strides and batch stride of x in units of UNIT elements: tells the compiler how wide it may load
    row_stride_units,
    batch_stride_units,
    split_rows,
    tiles,
    splits,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FLUSH_ROWS: tl.constexpr,  # a multiple of BLOCK_ROWS
    WEIGHTED: tl.constexpr,
):
    tile, slot = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)  # slot = (batch, split)
    batch, split = slot // splits, (slot % splits).to(tl.int32)
    tile_row, tile_column = lower_tile(tile)
    n, row_stride = n_units * UNIT, row_stride_units * UNIT
    offsets = tl.arange(0, BLOCK)
    j, i = tile_row * BLOCK + offsets, tile_column * BLOCK + offsets
    x_ptr += batch * batch_stride_units * UNIT
    pivot_ptr += batch * n
    root_ptr += batch * N
    partial_ptrs = partial_ptr + (slot * tiles + tile) * BLOCK * BLOCK + offsets[:, None] * BLOCK + offsets[None, :]
    sums_ptrs = sums_ptr + slot * (((n + BLOCK - 1) // BLOCK) * BLOCK) + j
    SUM: tl.constexpr = pivot_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == SUM else "ieee"

    row_end = tl.minimum(N, (split + 1) * split_rows)
    for start in range(split * split_rows, row_end, FLUSH_ROWS):
        flush_end = tl.minimum(row_end, start + FLUSH_ROWS)
        total = tl.zeros([BLOCK, BLOCK], SUM)
        for first in range(start, flush_end, BLOCK_ROWS):
            rows = first + tl.arange(0, BLOCK_ROWS)
            y_j = load_shifted(x_ptr, pivot_ptr, root_ptr, rows, flush_end, j, n, row_stride, WEIGHTED)
            y_i = load_shifted(x_ptr, pivot_ptr, root_ptr, rows, flush_end, i, n, row_stride, WEIGHTED)
            total = tl.dot(tl.trans(y_j), y_i, total, input_precision=PRECISION, out_dtype=SUM)
        for half in range(2):  # at once, the float64 values of the tile would not fit the registers
            mask = (offsets[:, None] // (BLOCK // 2) == half) & (offsets[None, :] < BLOCK)
            tl.store(partial_ptrs, tl.load(partial_ptrs, mask=mask) + total.to(tl.float64), mask=mask)
        if tile_row == tile_column:  # again over rows that lie in L2: above, these sums would cost registers
            column_sums = tl.zeros([BLOCK], SUM)
            for first in range(start, flush_end, BLOCK_ROWS):
                rows = first + tl.arange(0, BLOCK_ROWS)
                share = load_shifted(x_ptr, pivot_ptr, root_ptr, rows, flush_end, j, n, row_stride, WEIGHTED).to(SUM)
                if WEIGHTED:
                    share *= tl.load(root_ptr + rows, mask=rows < flush_end, other=0.0)[:, None]
                column_sums += tl.sum(share, 0)
            tl.store(sums_ptrs, tl.load(sums_ptrs) + column_sums.to(tl.float64))


@triton.jit
def finish_moments_kernel(
    partial_ptr,  # [B, splits, tiles, BLOCK, BLOCK] float64
    shift_ptr,  # [B, n] float64: d = mean - p
    weight_sum_ptr,  # [B] float64
    moment_ptr,  # [B, n, n] float64
    n,
    tiles,
    splits,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a tile that a program finishes
):
    PARTS: tl.constexpr = BLOCK // ROWS
    part, slot = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS  # slot = (batch, tile)
    tile, batch = slot % tiles, (slot // tiles).to(tl.int64)
    tile_row, tile_column = lower_tile(tile)
    local_rows, local_columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    partial_ptrs = partial_ptr + (batch * splits * tiles + tile) * BLOCK * BLOCK
    partial_ptrs += local_rows[:, None] * BLOCK + local_columns[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for _ in range(splits):
        total += tl.load(partial_ptrs)
        partial_ptrs += tiles * BLOCK * BLOCK

    j, i = tile_row * BLOCK + local_rows, tile_column * BLOCK + local_columns
    d_j = tl.load(shift_ptr + batch * n + j, mask=j < n, other=0.0)
    d_i = tl.load(shift_ptr + batch * n + i, mask=i < n, other=0.0)
    total -= (tl.load(weight_sum_ptr + batch) * d_j)[:, None] * d_i[None, :]
    diagonal = j[:, None] == i[None, :]
    total = tl.where(diagonal & (total < 0.0), 0.0, total)
    inside = (j < n)[:, None] & (i[None, :] <= j[:, None])
    moment_ptr += batch * n * n
    tl.store(moment_ptr + j.to(tl.int64)[:, None] * n + i[None, :], total, mask=inside)
    tl.store(moment_ptr + i.to(tl.int64)[None, :] * n + j[:, None], total, mask=inside)


@dataclass(frozen=True)
class Config:
    """Sizes of `partial_moments_kernel`."""

    block: int
    block_rows: int
    flush_rows: int
    num_warps: int
    num_stages: int


def config_of(n: int, dtype: torch.dtype, weighted: bool) -> Config:
    """The configuration for n columns: the largest tile whose sums fit the registers, compiled without spills."""
    block = min(64 if dtype == torch.float64 else 128, max(16, triton.next_power_of_2(n)))
    one_pass = dtype.itemsize == 2 and not weighted
    return Config(
        block,
        block_rows=64 if one_pass else 16,
        flush_rows=1024,
        num_warps=8 if block == 128 else 4,
        num_stages=1 if dtype == torch.float64 else 2,
    )


def num_splits(rows: int, tiles: int) -> int:
    """Ranges of rows, so that about TARGET_PROGRAMS programs run but none has much fewer than MIN_SPLIT_ROWS rows."""
    return max(1, min(TARGET_PROGRAMS // max(tiles, 1), rows // MIN_SPLIT_ROWS))


def centered_moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weights [B], mean [B, n] and moment [B, n, n], float64; all zero where the sum of weights is zero.

    Args:
        x: [B, N, n] float32, float64, bfloat16 or float16; contiguous columns.
        weights: [B, N] float64, not negative (not checked: a negative weight gives NaN).
    """
    B, N, n = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    sizes = config_of(n, x.dtype, weights is not None)
    side = triton.cdiv(n, sizes.block)
    tiles = side * (side + 1) // 2
    splits = num_splits(N, tiles * B)
    split_rows = triton.cdiv(triton.cdiv(N, splits), sizes.block_rows) * sizes.block_rows
    unit = math.gcd(n, x.stride(1), x.stride(0), 16)
    pivot = pivot_of(x, weights)
    root = pivot if weights is None else weights.sqrt().to(pivot.dtype)
    partial = x.new_zeros((B, splits, tiles, sizes.block, sizes.block), dtype=torch.float64)
    sums = x.new_zeros((B, splits, side * sizes.block), dtype=torch.float64)
    moment = x.new_empty((B, n, n), dtype=torch.float64)
    weight_sum = x.new_full((B,), N, dtype=torch.float64) if weights is None else weights.sum(1)
    if B * N:
        partial_moments_kernel[(tiles * splits * B,)](
            x,
            pivot,
            root,
            partial,
            sums,
            N,
            n // unit,
            x.stride(1) // unit,
            x.stride(0) // unit,
            split_rows,
            tiles,
            splits,
            UNIT=unit,
            BLOCK=sizes.block,
            BLOCK_ROWS=sizes.block_rows,
            FLUSH_ROWS=sizes.flush_rows,
            WEIGHTED=weights is not None,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
    any_weight = (weight_sum > 0)[:, None]
    shift = torch.where(any_weight, sums.sum(1)[:, :n] / weight_sum[:, None], 0.0)
    mean = torch.where(any_weight, pivot.double() + shift, 0.0)
    if B:
        rows = min(FINISH_ROWS, sizes.block)
        programs = B * tiles * (sizes.block // rows)
        finish_moments_kernel[(programs,)](
            partial, shift, weight_sum, moment, n, tiles, splits, BLOCK=sizes.block, ROWS=rows, num_warps=4
        )
    return weight_sum, mean, moment


def pivot_of(x: Tensor, weights: Tensor | None) -> Tensor:
    """[B, n] near the mean of x [B, N, n]: the weighted mean of about PIVOT_ROWS rows, evenly spread.

    It is taken relative to the row of largest weight, so that a constant column is its own pivot exactly. float64 for
    float64 x, float32 otherwise; for 16-bit x without weights as the head of this file says.
    """
    B, N, n = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if N == 0:
        return x.new_zeros((B, n), dtype=dtype)
    step = max(1, N // PIVOT_ROWS)
    sample = x[:, ::step].to(dtype)
    if weights is None:
        base = sample[:, 0]
        deviation = (sample - base[:, None]).mean(1)
    else:
        heaviest = weights.argmax(1)
        base = x[torch.arange(B, device=x.device), heaviest].to(dtype)
        w = weights[:, ::step, None].to(dtype)
        total = torch.where(w > 0, w * (sample - base[:, None]), 0.0).sum(1)
        deviation = total / w.sum(1).clamp_min(torch.finfo(dtype).tiny)
    pivot = base + deviation
    if weights is not None or x.element_size() != 2:
        return pivot
    spread = (sample - pivot[:, None]).square().mean(1).sqrt()
    return torch.where(pivot.abs() > SHIFT_ABOVE * spread, pivot.to(x.dtype).to(dtype), 0.0)
