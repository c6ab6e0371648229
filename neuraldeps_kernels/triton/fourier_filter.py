# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The Fourier filter of images of any size on CUDA, by matrix products: for grids that csrc/cuda/fourier_filter.cu has
no kernel for.

    y = irfft2(rfft2(x) K),    dx = irfft2(rfft2(g) conj(K)),    dK = c_v sum_b conj(X_b) G_b / (H W)

x, y, g, dx [B, H, W, C] of any strides; K, dK [H, Wf, C, 2], Wf = W//2 + 1; half spectra X, G [B, H, Wf, C];
c_v = 1 in columns v = 0 and W/2, else 2. Of K only what is consistent with real images counts: in those two columns it
is (K[u] + conj K[-u]) / 2.

Method: three products with the matrices of real discrete Fourier transforms,

    X' = rows(x) [2 Wf, W],    Y' = conj(F) (K (F X')) [H, H],    y = rows of Y' by [W, 2 Wf], with c_v / (H W),

the middle one, with the product by K between, in one kernel. Backward, that kernel transforms x and g of a range of
images, adds conj(X) G up and leaves one partial sum a range, which are added in order: no atomics.

Floor, bytes an element of float32: 8 for x and y, and 16 for X' and Y', which go through memory (or stay in L2; columns
pass through it once more between their two products). Flops: 2 (H + W) multiply-adds an element forward, of three TF32
products each ("tf32x3": errors as in float32), which is below the time of the memory up to about 64 points a side.

Layout: a program owns [points of a line, some channels]; lanes run over channels, so that channels-last images are
read in whole sectors; points are padded to 16, 32, 64 or 128. Limits: H, W <= 128; float32, bfloat16, float16. The
first call of a size copies its matrices to the device, which no CUDA graph can record.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TARGET_PROGRAMS = 512  # of the backward pass: a few a multiprocessor on any current device
BLOCK_J = 16  # points of a factor in one product
ROW_CHANNELS, COLUMN_CHANNELS = 32, 16  # of a program of either kernel


@triton.jit
def lines_kernel(
    in_ptr,  # [B, H, J, C], strides in_batch, in_row, in_point, in_channel
    matrix_ptr,  # [I, J] float32
    out_ptr,  # [B, H, I, C]: sum_j matrix[i, j] in[j]
    H,
    I,
    J,
    C,
    in_batch,
    in_row,
    in_point,
    in_channel,
    out_batch,
    out_row,
    out_point,
    out_channel,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Rows of images by a matrix."""
    tiles = (C + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    tiles_i = (I + BLOCK_I - 1) // BLOCK_I
    c = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    i = (tl.program_id(0) // tiles % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    line = (tl.program_id(0) // (tiles * tiles_i)).to(tl.int64)
    in_ptr += line // H * in_batch + line % H * in_row
    out_ptr += line // H * out_batch + line % H * out_row
    channels = c.to(tl.int64)[None, :]
    total = tl.zeros([BLOCK_I, BLOCK_CHANNELS], tl.float32)
    for first in range(0, J, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        matrix = tl.load(matrix_ptr + i[:, None] * J + j[None, :], mask=(i < I)[:, None] & (j < J)[None, :], other=0.0)
        inside = (j < J)[:, None] & (c < C)[None, :]
        values = tl.load(in_ptr + j.to(tl.int64)[:, None] * in_point + channels * in_channel, mask=inside, other=0.0)
        total = tl.dot(matrix, values.to(tl.float32), total, input_precision="tf32x3")
    inside = (i < I)[:, None] & (c < C)[None, :]
    out = out_ptr + i.to(tl.int64)[:, None] * out_point + channels * out_channel
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def transformed_column(
    column_ptr, cos_ptr, sin_ptr, H, Wf, C, c, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, INVERSE: tl.constexpr
):
    """Real and imaginary part of the transform, [BLOCK_H, channels], of a column in [H, 2, Wf, C]."""
    u = tl.arange(0, BLOCK_H)
    real = tl.zeros([BLOCK_H, c.shape[0]], tl.float32)
    imag = tl.zeros([BLOCK_H, c.shape[0]], tl.float32)
    for first in range(0, H, BLOCK_J):
        h = first + tl.arange(0, BLOCK_J)
        in_matrix = (u < H)[:, None] & (h < H)[None, :]
        cosine = tl.load(cos_ptr + u[:, None] * H + h[None, :], mask=in_matrix, other=0.0)
        sine = tl.load(sin_ptr + u[:, None] * H + h[None, :], mask=in_matrix, other=0.0)
        inside = (h < H)[:, None] & (c < C)[None, :]
        if INVERSE:
            sine = -sine
        at = column_ptr + h.to(tl.int64)[:, None] * (2 * Wf * C) + c[None, :]
        x_real = tl.load(at, mask=inside, other=0.0)
        x_imag = tl.load(at + Wf * C, mask=inside, other=0.0)
        real = tl.dot(cosine, x_real, real, input_precision="tf32x3")
        real = tl.dot(sine, x_imag, real, input_precision="tf32x3")
        imag = tl.dot(cosine, x_imag, imag, input_precision="tf32x3")
        imag = tl.dot(sine, -x_real, imag, input_precision="tf32x3")
    return real, imag


@triton.jit
def columns_kernel(
    half_ptr,  # [B, H, 2, Wf, C] float32: transformed rows of x, or of g with GRADIENT; replaced by those of y or dx
    other_ptr,  # with GRADIENT, those of x
    weight_ptr,  # [H, Wf, C, 2] float32
    cos_ptr,  # [H, H] float32: cos(2 pi u h / H)
    sin_ptr,
    sums_ptr,  # with GRADIENT, [splits, H, Wf, C, 2] float32: sums of conj(X) G
    B,
    H,
    W,
    Wf,
    C,
    image,  # values of half_ptr an image
    split_images,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    GRADIENT: tl.constexpr,  # conj(K), and the sums
):
    """Columns v of a range of images, transformed, multiplied by K and transformed back."""
    tiles = (C + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    c = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    v = tl.program_id(0) // tiles % Wf
    split = tl.program_id(0) // (tiles * Wf)
    u = tl.arange(0, BLOCK_H)
    inside = (u < H)[:, None] & (c < C)[None, :]
    filter_at = weight_ptr + ((u * Wf + v).to(tl.int64)[:, None] * C + c[None, :]) * 2
    k_real = tl.load(filter_at, mask=inside, other=0.0)
    k_imag = tl.load(filter_at + 1, mask=inside, other=0.0)
    if (2 * v) % W == 0:
        opposite = weight_ptr + (((H - u) % H * Wf + v).to(tl.int64)[:, None] * C + c[None, :]) * 2
        k_real = 0.5 * (k_real + tl.load(opposite, mask=inside, other=0.0))
        k_imag = 0.5 * (k_imag - tl.load(opposite + 1, mask=inside, other=0.0))
    if GRADIENT:
        k_imag = -k_imag
        sum_real = tl.zeros([BLOCK_H, BLOCK_CHANNELS], tl.float32)
        sum_imag = tl.zeros([BLOCK_H, BLOCK_CHANNELS], tl.float32)
    first_image = split * split_images
    column = half_ptr + first_image.to(tl.int64) * image + v * C
    other = other_ptr + first_image.to(tl.int64) * image + v * C
    for _ in range(first_image, tl.minimum(B, first_image + split_images)):
        real, imag = transformed_column(column, cos_ptr, sin_ptr, H, Wf, C, c, BLOCK_H, BLOCK_J, False)
        if GRADIENT:
            x_real, x_imag = transformed_column(other, cos_ptr, sin_ptr, H, Wf, C, c, BLOCK_H, BLOCK_J, False)
            sum_real += x_real * real + x_imag * imag
            sum_imag += x_real * imag - x_imag * real
            other += image
        # Through memory, where the next product takes a few points at a time: as a whole they would not fit registers.
        out = column + u.to(tl.int64)[:, None] * (2 * Wf * C) + c[None, :]
        tl.debug_barrier()
        tl.store(out, real * k_real - imag * k_imag, mask=inside)
        tl.store(out + Wf * C, real * k_imag + imag * k_real, mask=inside)
        tl.debug_barrier()
        real, imag = transformed_column(column, cos_ptr, sin_ptr, H, Wf, C, c, BLOCK_H, BLOCK_J, True)
        tl.debug_barrier()
        tl.store(out, real, mask=inside)
        tl.store(out + Wf * C, imag, mask=inside)
        column += image
    if GRADIENT:
        sums = sums_ptr + (((split * H + u) * Wf + v).to(tl.int64)[:, None] * C + c[None, :]) * 2
        tl.store(sums, sum_real, mask=inside)
        tl.store(sums + 1, sum_imag, mask=inside)


@functools.lru_cache(64)
def row_matrices(H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[2 Wf, W], from a row to the real parts of its half spectrum and then the imaginary ones; and [W, 2 Wf], back."""
    cosine, sine = (part[: W // 2 + 1] for part in _turns(W))
    c = _shares(H, W)
    forward, back = torch.cat([cosine, -sine]), torch.cat([c * cosine, -c * sine]).T
    return forward.to(device, torch.float32), back.to(device, torch.float32).contiguous()


@functools.lru_cache(64)
def column_matrices(H: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin(2 pi u h / H) [H, H]."""
    cosine, sine = _turns(H)
    return cosine.to(device, torch.float32), sine.to(device, torch.float32)


@functools.lru_cache(64)
def weight_shares(H: int, W: int, device: torch.device) -> Tensor:
    """c_v / (H W), [Wf, 1, 1]."""
    return _shares(H, W)[..., None].to(device, torch.float32)


def _shares(H: int, W: int) -> Tensor:
    """c_v / (H W), [Wf, 1] float64 on the CPU."""
    c = [1.0 if 2 * v % W == 0 else 2.0 for v in range(W // 2 + 1)]
    return torch.tensor(c, dtype=torch.float64)[:, None] / (H * W)


def _turns(n: int) -> tuple[Tensor, Tensor]:
    """cos and sin(2 pi i j / n) [n, n] in float64 on the CPU."""
    steps = torch.arange(n)
    angle = (steps[:, None] * steps % n).double() * (2 * math.pi / n)
    return angle.cos(), angle.sin()


def _block(points: int) -> int:
    return max(16, int(triton.next_power_of_2(points)))


def _launch_lines(source: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out [B, H, I, C] = matrix [I, J] by source [B, H, J, C]."""
    B, H, J, C = source.shape
    I = out.shape[2]
    block = min(64, _block(I))
    programs = triton.cdiv(C, ROW_CHANNELS) * triton.cdiv(I, block) * B * H
    lines_kernel[(programs,)](
        source, matrix, out, H, I, J, C, *source.stride(), *out.stride(),
        BLOCK_I=block, BLOCK_J=BLOCK_J, BLOCK_CHANNELS=ROW_CHANNELS, num_warps=4,
    )  # fmt: skip


def _half_spectra(x: Tensor) -> Tensor:
    """[B, H, 2 Wf, C] float32: the rows of x [B, H, W, C], transformed."""
    B, H, W, C = x.shape
    half = torch.empty((B, H, 2 * (W // 2 + 1), C), dtype=torch.float32, device=x.device)
    _launch_lines(x, row_matrices(H, W, x.device)[0], half)
    return half


def _launch_columns(half: Tensor, other: Tensor, weight: Tensor, sums: Tensor, W: int, splits: int) -> None:
    B, H, _, C = half.shape
    block = _block(H)
    programs = triton.cdiv(C, COLUMN_CHANNELS) * (W // 2 + 1) * splits
    columns_kernel[(programs,)](
        half, other, weight, *column_matrices(H, half.device), sums, B, H, W, W // 2 + 1, C, half.stride(0),
        triton.cdiv(B, splits),
        BLOCK_H=block, BLOCK_J=BLOCK_J, BLOCK_CHANNELS=COLUMN_CHANNELS, GRADIENT=sums is not half,
        **column_options(H),
    )  # fmt: skip


def column_options(H: int) -> dict[str, int]:
    """Warps and stages of `columns_kernel`, so that its registers hold what a program works on."""
    return {"num_warps": 4 if H <= 16 else 8, "num_stages": 3 if H <= 64 else 1}


def _store_rows(half: Tensor, y: Tensor) -> None:
    H, W = y.shape[1:3]
    _launch_lines(half, row_matrices(H, W, y.device)[1], y)


def filter_images(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """y = irfft2(rfft2(x) K).

    Args:
        x: [B, H, W, C] of any strides.
        y: memory of the result, likewise.
        weight: K [H, Wf, C, 2], contiguous float32.
    """
    if x.numel():
        half = _half_spectra(x)
        _launch_columns(half, half, weight, half, x.shape[2], splits=x.shape[0])
        _store_rows(half, y)
    return y


def filter_gradients(grad: Tensor, x: Tensor, dx: Tensor, weight: Tensor) -> Tensor:
    """dweight [H, Wf, C, 2]; dx is filled as y of `filter_images` is."""
    B, H, W, C = x.shape
    if not x.numel():
        return torch.zeros_like(weight)
    columns = triton.cdiv(C, COLUMN_CHANNELS) * (W // 2 + 1)
    split_images = triton.cdiv(B, max(1, min(B, TARGET_PROGRAMS // columns)))
    splits = triton.cdiv(B, split_images)
    sums = torch.empty((splits, *weight.shape), dtype=torch.float32, device=x.device)
    half = _half_spectra(grad)
    _launch_columns(half, _half_spectra(x), weight, sums, W, splits)
    _store_rows(half, dx)
    return weight_shares(H, W, x.device) * sums.sum(0)
