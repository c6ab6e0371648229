# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Region-wise mixup of images x_v, x_i [N, C, H, W] on CUDA, and its backward.

    x_m = lam x_v + (1 - lam) x_i,    dx_v = lam g,  dx_i = (1 - lam) g,    dratio = sums of g (x_v - x_i)

The functions have the names and arguments of the operators of `ops/region_mixup.py`.

Floor, bytes an element of s bytes: 3 s forward; backward 3 s for images, 3 s for ratios, 5 s for both.

Layout: a program owns up to BLOCK pixels of one region of one pair, for all channels. Its ratio is one number in a
register; with soft borders it is mixed from those of the region and its neighbours, up to three by dimension. Sums for
the ratios go to a table [N, regions, parts of a region, neighbours], which is added up afterwards in a fixed order: no
atomics. Contiguous and channels-last images are read as they are. Limits: float32, bfloat16, float16; an image and the
number of programs below 2^31.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.ops.layouts import beside, dense, is_channels_last, result_like

BLOCK = 1024  # pixels of a program


@triton.jit
def neighbour_share(pixel, region, pixels, regions, soft, NEIGHBOUR: tl.constexpr):
    """Part of region + NEIGHBOUR (-1, 0, 1) in a pixel of `region`."""
    low = (region * pixels + regions - 1) // regions
    high = ((region + 1) * pixels + regions - 1) // regions
    centre = pixel.to(tl.float32) + 0.5
    before = tl.maximum(0.5 - (centre - low) / soft, 0.0)
    after = tl.maximum((centre - high) / soft + 0.5, 0.0)
    before = tl.where(region == 0, 0.0, before)
    after = tl.where(region == regions - 1, 0.0, after)
    if NEIGHBOUR == -1:
        return before
    if NEIGHBOUR == 1:
        return after
    return 1.0 - before - after


@triton.jit
def place_of(H, W, Rh, Rw, parts, BLOCK: tl.constexpr):
    """n, row and column of the region, row and column [BLOCK] of pixels, and which of them are in the region."""
    program = tl.program_id(0)
    part = program % parts
    a = (program // (parts * Rw)) % Rh
    b = (program // parts) % Rw
    n = program // (parts * Rw * Rh)
    top, bottom = (a * H + Rh - 1) // Rh, ((a + 1) * H + Rh - 1) // Rh
    left, right = (b * W + Rw - 1) // Rw, ((b + 1) * W + Rw - 1) // Rw
    pixel = part * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < (bottom - top) * (right - left)
    return n, a, b, top + pixel // (right - left), left + pixel % (right - left), inside


@triton.jit
def ratio_of(ratio_ptr, n, a, b, h, w, H, W, Rh, Rw, soft, SOFT: tl.constexpr):
    """lam [BLOCK], NaN where a ratio is outside 0..1."""
    at = ratio_ptr + n.to(tl.int64) * Rh * Rw
    lam = tl.zeros_like(h).to(tl.float32)
    if not SOFT:
        ratio = tl.load(at + a * Rw + b)
        return lam + tl.where((ratio >= 0.0) & (ratio <= 1.0), ratio, float("nan"))
    for da in tl.static_range(-1, 2):
        row_share = neighbour_share(h, a, H, Rh, soft, da)
        for db in tl.static_range(-1, 2):
            there = (a + da >= 0) & (a + da < Rh) & (b + db >= 0) & (b + db < Rw)
            ratio = tl.load(at + (a + da) * Rw + b + db, mask=there, other=0.0)
            ratio = tl.where((ratio >= 0.0) & (ratio <= 1.0), ratio, float("nan"))
            share = row_share * neighbour_share(w, b, W, Rw, soft, db)
            lam += tl.where(share > 0.0, share * ratio, 0.0)
    return lam


@triton.jit
def mix_kernel(
    v_ptr,  # [N, C, H, W], strides C H W, channel, and of pixels `step`
    i_ptr,
    ratio_ptr,  # [N, Rh, Rw] float32
    out_ptr,
    C,
    H,
    W,
    Rh,
    Rw,
    soft,
    parts,
    channel,
    step,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, a, b, h, w, inside = place_of(H, W, Rh, Rw, parts, BLOCK)
    lam = ratio_of(ratio_ptr, n, a, b, h, w, H, W, Rh, Rw, soft, SOFT)
    first = n.to(tl.int64) * C * H * W
    at = (h * W + w) * step
    for c in range(C):
        v = tl.load(v_ptr + first + c * channel + at, mask=inside, other=0.0).to(tl.float32)
        i = tl.load(i_ptr + first + c * channel + at, mask=inside, other=0.0).to(tl.float32)
        mixed = lam * v + (1.0 - lam) * i
        low, high = tl.where(v < i, v, i), tl.where(v < i, i, v)
        mixed = tl.where(mixed < low, low, mixed)
        mixed = tl.where(mixed > high, high, mixed)
        mixed = tl.where(lam == 1.0, v, tl.where(lam == 0.0, i, mixed))
        tl.store(out_ptr + first + c * channel + at, mixed, mask=inside)


@triton.jit
def gradient_kernel(
    grad_ptr,  # as v_ptr
    v_ptr,
    i_ptr,
    ratio_ptr,
    dv_ptr,
    di_ptr,
    sums_ptr,  # [N, Rh, Rw, parts], or with SOFT [N, Rh, Rw, parts, 3, 3], float32
    C,
    H,
    W,
    Rh,
    Rw,
    soft,
    parts,
    channel,
    step,
    SOFT: tl.constexpr,
    IMAGES: tl.constexpr,
    RATIOS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, a, b, h, w, inside = place_of(H, W, Rh, Rw, parts, BLOCK)
    first = n.to(tl.int64) * C * H * W
    at = (h * W + w) * step
    product = tl.zeros_like(h).to(tl.float32)
    if IMAGES:
        lam = ratio_of(ratio_ptr, n, a, b, h, w, H, W, Rh, Rw, soft, SOFT)
    for c in range(C):
        g = tl.load(grad_ptr + first + c * channel + at, mask=inside, other=0.0).to(tl.float32)
        if IMAGES:
            tl.store(dv_ptr + first + c * channel + at, lam * g, mask=inside)
            tl.store(di_ptr + first + c * channel + at, (1.0 - lam) * g, mask=inside)
        if RATIOS:
            v = tl.load(v_ptr + first + c * channel + at, mask=inside, other=0.0).to(tl.float32)
            i = tl.load(i_ptr + first + c * channel + at, mask=inside, other=0.0).to(tl.float32)
            product += g * (v - i)
    if RATIOS:
        program = tl.program_id(0).to(tl.int64)
        if SOFT:
            for da in tl.static_range(-1, 2):
                row_share = neighbour_share(h, a, H, Rh, soft, da)
                for db in tl.static_range(-1, 2):
                    share = row_share * neighbour_share(w, b, W, Rw, soft, db)
                    total = tl.sum(tl.where(share > 0.0, share * product, 0.0), 0)
                    tl.store(sums_ptr + program * 9 + (da + 1) * 3 + db + 1, total)
        else:
            tl.store(sums_ptr + program, tl.sum(product, 0))


# ------------------------------------------------------------------------------------------------ operators


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Queues the kernel on the current stream of the device of x."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](*arguments, **constants)


def sizes_of(x: Tensor, ratio: Tensor, soft: int) -> tuple[int, ...]:
    """C, H, W, Rh, Rw, soft, parts, channel, step."""
    C, H, W = x.shape[1:]
    Rh, Rw = ratio.shape[1], ratio.shape[2] if ratio.dim() == 3 else 1
    parts = triton.cdiv(triton.cdiv(H, Rh) * triton.cdiv(W, Rw), BLOCK)
    channel, step = (1, C) if is_channels_last(x) else (H * W, 1)
    return C, H, W, Rh, Rw, max(soft, 1), parts, channel, step


def warps_of(soft: int) -> int:
    """More share the registers that soft borders take."""
    return 8 if soft > 1 else 4


def region_mixup(x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int) -> Tensor:
    x_v = dense(x_v)
    x_i, ratio = beside(x_i, x_v), ratio.contiguous()
    mixed = result_like(x_v)
    if x_v.numel() == 0:
        return mixed
    sizes = sizes_of(x_v, ratio, soft)
    constants = {"SOFT": soft > 1, "BLOCK": BLOCK, "num_warps": warps_of(soft)}
    launch(mix_kernel, ratio.numel() * sizes[6], x_v, x_v, x_i, ratio, mixed, *sizes, **constants)
    return mixed


def region_mixup_backward(
    grad: Tensor, x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int, images: bool, ratios: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_v = dense(x_v)
    grad, x_i, ratio = beside(grad, x_v), beside(x_i, x_v), ratio.contiguous()
    dv, di = (result_like(x_v) if images else ratio.new_empty(0) for _ in range(2))
    if x_v.numel() == 0:
        return dv, di, torch.zeros_like(ratio) if ratios else ratio.new_empty(0)
    sizes = sizes_of(x_v, ratio, soft)
    Rh, Rw, parts = sizes[3], sizes[4], sizes[6]
    neighbours = (3, 3) if soft > 1 else ()
    sums = ratio.new_empty((x_v.shape[0], Rh, Rw, parts, *neighbours) if ratios else (0,))
    constants = {"SOFT": soft > 1, "IMAGES": images, "RATIOS": ratios, "BLOCK": BLOCK}
    constants["num_warps"] = warps_of(soft)
    launch(gradient_kernel, ratio.numel() * parts, x_v, grad, x_v, x_i, ratio, dv, di, sums, *sizes, **constants)
    if not ratios:
        return dv, di, ratio.new_empty(0)
    by_region = sums.sum(3, dtype=torch.float64)
    if soft > 1:
        by_region = _gathered(by_region)
    return dv, di, by_region.to(ratio.dtype).reshape(ratio.shape)


def _gathered(sums: Tensor) -> Tensor:
    """[N, Rh, Rw] of sums [N, Rh, Rw, 3, 3], of which the last two say to which neighbour they belong."""
    N, Rh, Rw = sums.shape[:3]
    total = sums.new_zeros(N, Rh + 2, Rw + 2)
    for da in range(3):
        for db in range(3):
            total[:, da : da + Rh, db : db + Rw] += sums[:, :, :, da, db]
    return total[:, 1:-1, 1:-1]
