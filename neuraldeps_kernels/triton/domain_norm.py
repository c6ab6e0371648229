# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Instance moments, centred affine maps and batch norm by domain of x [N, C, *] on CUDA, with their backwards.

    g, q [N, C]: mean and biased variance of the L = H W values of a sample and channel       y = act(A (x - g) + B + r)

The functions have the names, arguments and results of `reference/domain_norm.py`; formulas as there. Here
domains are merged on the device, ids are never read by the host, and nothing depends on timing: no atomics.

Floor, bytes an element of s bytes (float32: s = 4), if memory sets the pace:

    pass                                        reads         writes
    moments (`moments_kernel`)                  s             12 / L
    affine (`affine_kernel`)                    s (+ s r)     s            forward: 3 s = 12, residual 16
    sums (`sums_kernel`)                        2 s (+ s y)   8 / L
    input gradient (`input_grad_kernel`)        2 s (+ s y)   s (+ s dr)   backward: 5 s = 20, ReLU 28, both 32
    all of a slab (`slab_forward_kernel`)       s (+ s r)     s            forward: 2 s = 8, one launch for three
    all of a slab (`slab_backward_kernel`)      2 s (+ s y)   s (+ s dr)   backward: 3 s = 12

The second pass walks the tiles from the last to the first, so that it finds in L2 what the first has left there: a
tensor of half the size of L2 moves 2 s and 3 s as well.

Layout: x is [O, L, I] without a copy, (O, I) = (N C, 1) for contiguous x and (N, C) for channels last and [N, C]; the
table entry (n, c) is o I + i in both. A program owns a tile [BLOCK_O, BLOCK_L, BLOCK_I] of about 8 KB. The reductions
walk along L and keep Welford's mean and moment of the deviations from the first value in every lane; lanes are merged
once, at the end, by the formula of Chan, Golub and LeVeque; never E[x^2] - E[x]^2. A long L is split in parts.
`merge_moments_kernel` and `merge_sums_kernel` then own a (domain, 32 channels) each and add what belongs to the domain
in the order of the samples, in float64. Where a slab [N, L, a few channels] fits the registers of one program, the slab
kernels do all of this in one launch.

Limits: `strict` makes the host wait; tensors without elements go to the reference. N C and L below 2^31 - 8192; from
2^31 elements on offsets have 64 bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.reference import domain_norm as reference

TILE_BYTES = 8192  # of x, in a program of 4 warps: 64 bytes a thread in flight
TARGET_PROGRAMS = 1024  # a few a multiprocessor on any current device
SLAB_BYTES = 1 << 15  # of x as statistics are computed: 16 registers in each of 512 threads
SLAB_DOMAINS = 16  # beyond, the loop over domains in every program costs more than two launches
MERGE_ENTRIES, MERGE_CHANNELS = 64, 32  # tile of the merges
LONG = 2**31  # elements, from which on offsets have 64 bits
CHUNK_ENTRIES = 2048  # that one program of a merge adds


# ------------------------------------------------------------------------------------------------ places and tables


@triton.jit
def place_of(program, parts, O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """o [BLOCK_O, 1, 1], the part of L, and i [1, 1, BLOCK_I] of a program; i varies fastest, then the part."""
    tiles = (I + BLOCK_I - 1) // BLOCK_I
    i = (program % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)[None, None, :]
    o = (program // (tiles * parts)) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None, None]
    return o, (program // tiles) % parts, i


@triton.jit
def masked_gradient(grad_ptr, y_ptr, at, inside, STAT: tl.constexpr, RELU: tl.constexpr):
    """dy', zero outside."""
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(STAT)
    if RELU:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(STAT)
        grad = tl.where(y > 0.0, grad, 0.0)
    return grad


@triton.jit
def activated(y, RELU: tl.constexpr):
    """NaN stays NaN."""
    return tl.where(y < 0.0, 0.0, y) if RELU else y


@triton.jit
def split_mean(mean, STAT: tl.constexpr):
    """A float64 mean as the pivot that is subtracted from x, and what is left of it."""
    pivot = mean.to(STAT)
    return pivot, (mean - pivot.to(tl.float64)).to(STAT)


@triton.jit
def domain_row(
    o,
    i,
    O,
    inside,  # [BLOCK_O, 1, BLOCK_I]
    domain_ptr,  # [N]
    mean_ptr,  # [D, C]
    variance_ptr,  # [D, C]
    weight_ptr,  # [D, C] or, with weight_stride 0, [C]; as bias_ptr
    bias_ptr,
    weight_stride,
    bias_stride,
    C,
    D,
    eps,
    STAT: tl.constexpr,
    ROWS: tl.constexpr,
    POOLED: tl.constexpr,  # id -1 is the mean over the domains
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Of the domain of each (o, i): place in a table [D, C] and whether there is one, pivot, rest of the mean,
    1 / standard deviation, A and B; NaN where the id names no domain."""
    n = o // C if ROWS else o
    c = o % C if ROWS else i
    domain = tl.load(domain_ptr + n, mask=o < O, other=0).to(tl.int64)
    known = inside & (domain >= 0) & (domain < D)
    at = domain * C + c
    missing = float("nan")
    mean = tl.load(mean_ptr + at, mask=known, other=missing).to(tl.float64)
    variance = tl.load(variance_ptr + at, mask=known, other=missing).to(tl.float64)
    weight, bias = (mean * 0.0 + 1.0).to(STAT), (mean * 0.0).to(STAT)
    if WEIGHT:
        weight = tl.load(weight_ptr + domain * weight_stride + c, mask=known, other=missing).to(STAT)
    if BIAS:
        bias = tl.load(bias_ptr + domain * bias_stride + c, mask=known, other=missing).to(STAT)
    if POOLED:
        unseen = inside & (domain == -1)
        if tl.max(tl.max(tl.max(unseen.to(tl.int32), 2), 1), 0) > 0:
            total, spread = tl.zeros_like(mean), tl.zeros_like(mean)
            total_weight, total_bias = tl.zeros_like(weight), tl.zeros_like(bias)
            for d in range(D):
                total += tl.load(mean_ptr + d * C + c, mask=unseen, other=0.0).to(tl.float64)
                if WEIGHT:
                    total_weight += tl.load(weight_ptr + d * weight_stride + c, mask=unseen, other=0.0).to(STAT)
                if BIAS:
                    total_bias += tl.load(bias_ptr + d * bias_stride + c, mask=unseen, other=0.0).to(STAT)
            total = total / D
            for d in range(D):
                between = tl.load(mean_ptr + d * C + c, mask=unseen, other=0.0).to(tl.float64) - total
                spread += tl.load(variance_ptr + d * C + c, mask=unseen, other=0.0).to(tl.float64) + between * between
            mean, variance = tl.where(unseen, total, mean), tl.where(unseen, spread / D, variance)
            weight = tl.where(unseen, total_weight / D if WEIGHT else 1.0, weight)
            bias = tl.where(unseen, total_bias / D if BIAS else 0.0, bias)
    pivot, rest = split_mean(mean, STAT)
    rstd = tl.rsqrt((variance + eps).to(STAT))
    return at, known, pivot, rest, rstd, weight * rstd, bias - weight * rstd * rest


# ------------------------------------------------------------------------------------------------ moments, affine map


@triton.jit
def moments_kernel(
    x_ptr,  # [O, L, I]
    mean_ptr,  # [parts, O, I] float32 or float64
    moment_ptr,  # [parts, O, I] float32, or float64 for float64 x
    O,
    L_units,  # L = L_units UNIT, I = 1 with ROWS, else I = I_units UNIT: tells the compiler how wide it may load
    I_units,
    part_blocks,  # blocks of a part
    parts,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,  # type of offsets into x
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    STAT: tl.constexpr = moment_ptr.dtype.element_ty
    L = L_units * UNIT if ROWS else L_units
    I = 1 if ROWS else I_units * UNIT
    o, part, i = place_of(tl.program_id(0), parts, O, I, BLOCK_O, BLOCK_I)
    inside = (o < O) & (i < I)
    lane = tl.arange(0, BLOCK_L)[None, :, None]
    first = part * (part_blocks * BLOCK_L)
    end = tl.minimum(L, first + part_blocks * BLOCK_L)

    # Deviations from any value of the row are exact where they are small, whatever its mean; a constant row has none.
    pivot = tl.load(x_ptr + (o.to(INDEX) * L + first) * I + i, mask=inside, other=0.0).to(STAT)
    mean = tl.zeros([BLOCK_O, BLOCK_L, BLOCK_I], STAT)
    moment = tl.zeros([BLOCK_O, BLOCK_L, BLOCK_I], STAT)
    count = tl.full([1, 1, 1], 0.0, STAT)
    for start in range(first, end, BLOCK_L):
        own = inside & (start + lane < L)
        x = tl.load(x_ptr + (o.to(INDEX) * L + (start + lane)) * I + i, mask=own, other=0.0).to(STAT)
        count += 1.0
        x -= pivot
        delta = tl.where(own, x - mean, 0.0)
        mean += delta * (1.0 / count)
        moment += delta * (x - mean)

    held = tl.maximum((end - first - lane + BLOCK_L - 1) // BLOCK_L, 0).to(STAT)  # values in each lane
    total = (end - first).to(STAT)
    base = tl.sum(held * mean, 1, keep_dims=True) / total
    delta = mean - base
    moment = tl.sum(moment + held * delta * delta, 1, keep_dims=True) / total
    at = (part.to(INDEX) * O + o) * I + i
    MEAN: tl.constexpr = mean_ptr.dtype.element_ty
    tl.store(mean_ptr + at, pivot.to(MEAN) + base.to(MEAN), mask=inside)
    tl.store(moment_ptr + at, moment, mask=inside)


@triton.jit
def affine_kernel(
    x_ptr,  # [O, L, I], as residual_ptr and y_ptr
    residual_ptr,
    y_ptr,
    mean_ptr,  # [N, C], or with BY_DOMAIN [D, C]; as those below
    scale_ptr,  # A, or the variance
    shift_ptr,  # B, or the bias
    weight_ptr,
    domain_ptr,  # [N]
    kept_mean_ptr,  # [D, C] float64, as kept_variance_ptr: copies that KEEP asks for; kept_count_ptr: [D], zeros
    kept_variance_ptr,
    kept_count_ptr,
    weight_stride,
    bias_stride,
    O,
    L_units,
    I_units,
    C,
    D,
    eps: tl.float64,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    STAT: tl.constexpr,
    BY_DOMAIN: tl.constexpr,
    POOLED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    L = L_units * UNIT if ROWS else L_units
    I = 1 if ROWS else I_units * UNIT
    programs = tl.num_programs(0)
    parts = (L + BLOCK_L - 1) // BLOCK_L
    o, part, i = place_of(programs - 1 - tl.program_id(0), parts, O, I, BLOCK_O, BLOCK_I)
    inside = (o < O) & (i < I)
    l = part * BLOCK_L + tl.arange(0, BLOCK_L)[None, :, None]
    own = inside & (l < L)
    at = (o.to(INDEX) * L + l) * I + i
    x = tl.load(x_ptr + at, mask=own, other=0.0).to(STAT)
    if BY_DOMAIN:
        _, _, pivot, _, _, scale, shift = domain_row(
            o, i, O, inside, domain_ptr, mean_ptr, scale_ptr, weight_ptr, shift_ptr, weight_stride, bias_stride, C, D,
            eps, STAT, ROWS, POOLED, WEIGHT, BIAS,
        )  # fmt: skip
    else:
        entry = o.to(INDEX) * I + i
        pivot = tl.load(mean_ptr + entry, mask=inside, other=0.0).to(STAT)
        scale = tl.load(scale_ptr + entry, mask=inside, other=0.0).to(STAT)
        shift = tl.load(shift_ptr + entry, mask=inside, other=0.0).to(STAT)
    y = scale * (x - pivot) + shift
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=own, other=0.0).to(STAT)
    tl.store(y_ptr + at, activated(y, RELU), mask=own)
    if KEEP:
        BLOCK: tl.constexpr = 256
        for start in range(tl.program_id(0) * BLOCK, D * C, programs * BLOCK):
            k = start + tl.arange(0, BLOCK)
            tl.store(kept_mean_ptr + k, tl.load(mean_ptr + k, mask=k < D * C), mask=k < D * C)
            tl.store(kept_variance_ptr + k, tl.load(scale_ptr + k, mask=k < D * C), mask=k < D * C)
            tl.store(kept_count_ptr + k, tl.zeros_like(k), mask=k < D)


@triton.jit
def sums_kernel(
    grad_ptr,  # [O, L, I], as x_ptr and y_ptr
    x_ptr,
    y_ptr,
    mean_ptr,  # [N, C], or with BY_DOMAIN [D, C]
    variance_ptr,  # [D, C]
    domain_ptr,  # [N]
    sum1_ptr,  # [parts, O, I] float32, or float64 for float64 x; as sum2_ptr
    sum2_ptr,
    O,
    L_units,
    I_units,
    part_blocks,
    parts,
    C,
    D,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BY_DOMAIN: tl.constexpr,
    POOLED: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """S1 and S2, of the deviations from the mean rounded to the type of the sums."""
    STAT: tl.constexpr = sum1_ptr.dtype.element_ty
    L = L_units * UNIT if ROWS else L_units
    I = 1 if ROWS else I_units * UNIT
    o, part, i = place_of(tl.program_id(0), parts, O, I, BLOCK_O, BLOCK_I)
    inside = (o < O) & (i < I)
    lane = tl.arange(0, BLOCK_L)[None, :, None]
    first = part * (part_blocks * BLOCK_L)
    end = tl.minimum(L, first + part_blocks * BLOCK_L)
    if BY_DOMAIN:
        _, _, pivot, _, _, _, _ = domain_row(
            o, i, O, inside, domain_ptr, mean_ptr, variance_ptr, mean_ptr, mean_ptr, 0, 0, C, D, 1.0, STAT, ROWS,
            POOLED, False, False,
        )  # fmt: skip
    else:
        pivot = tl.load(mean_ptr + o.to(INDEX) * I + i, mask=inside, other=0.0).to(STAT)

    sum1 = tl.zeros([BLOCK_O, BLOCK_L, BLOCK_I], STAT)
    sum2 = tl.zeros([BLOCK_O, BLOCK_L, BLOCK_I], STAT)
    for start in range(first, end, BLOCK_L):
        own = inside & (start + lane < L)
        at = (o.to(INDEX) * L + (start + lane)) * I + i
        grad = masked_gradient(grad_ptr, y_ptr, at, own, STAT, RELU)
        x = tl.load(x_ptr + at, mask=own, other=0.0).to(STAT)
        sum1 += grad
        sum2 += tl.where(own, grad * (x - pivot), 0.0)
    at = (part.to(INDEX) * O + o) * I + i
    tl.store(sum1_ptr + at, tl.sum(sum1, 1, keep_dims=True), mask=inside)
    tl.store(sum2_ptr + at, tl.sum(sum2, 1, keep_dims=True), mask=inside)


@triton.jit
def input_grad_kernel(
    grad_ptr,  # [O, L, I], as x_ptr, y_ptr, dx_ptr and dresidual_ptr
    x_ptr,
    y_ptr,
    dx_ptr,
    dresidual_ptr,
    mean_ptr,  # [N, C], or with BY_DOMAIN [D, C]; as those below
    scale_ptr,  # A, or the variance
    offset_ptr,  # offset, or the gradient of the bias
    slope_ptr,  # slope, or the gradient of the weight
    weight_ptr,
    domain_ptr,  # [N]
    count_ptr,  # [D]
    weight_stride,
    O,
    L_units,
    I_units,
    C,
    D,
    eps: tl.float64,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    STAT: tl.constexpr,
    BY_DOMAIN: tl.constexpr,
    TRAINING: tl.constexpr,  # the statistics depend on x; without BY_DOMAIN always
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """dx = A dy' + offset + slope (x - mean) and dy'."""
    L = L_units * UNIT if ROWS else L_units
    I = 1 if ROWS else I_units * UNIT
    parts = (L + BLOCK_L - 1) // BLOCK_L
    o, part, i = place_of(tl.num_programs(0) - 1 - tl.program_id(0), parts, O, I, BLOCK_O, BLOCK_I)
    inside = (o < O) & (i < I)
    l = part * BLOCK_L + tl.arange(0, BLOCK_L)[None, :, None]
    own = inside & (l < L)
    at = (o.to(INDEX) * L + l) * I + i
    if BY_DOMAIN:
        row, known, pivot, rest, rstd, scale, _ = domain_row(
            o, i, O, inside, domain_ptr, mean_ptr, scale_ptr, weight_ptr, mean_ptr, weight_stride, 0, C, D, eps, STAT,
            ROWS, not TRAINING, WEIGHT, False,
        )  # fmt: skip
        if TRAINING:
            n = o // C if ROWS else o
            domain = tl.load(domain_ptr + n, mask=o < O, other=0)
            count = tl.load(count_ptr + domain, mask=(domain >= 0) & (domain < D), other=1).to(STAT)
            slope = -scale * rstd * tl.load(slope_ptr + row, mask=known, other=0.0).to(STAT) / count
            offset = -scale * tl.load(offset_ptr + row, mask=known, other=0.0).to(STAT) / count - slope * rest
    else:
        entry = o.to(INDEX) * I + i
        pivot = tl.load(mean_ptr + entry, mask=inside, other=0.0).to(STAT)
        offset = tl.load(offset_ptr + entry, mask=inside, other=0.0).to(STAT)
        slope = tl.load(slope_ptr + entry, mask=inside, other=0.0).to(STAT)
    dx = tl.zeros([BLOCK_O, BLOCK_L, BLOCK_I], STAT)
    if TRAINING:
        x = tl.load(x_ptr + at, mask=own, other=0.0).to(STAT)
        dx = offset + slope * (x - pivot)
    if GRAD:
        if not BY_DOMAIN:
            scale = tl.load(scale_ptr + entry, mask=inside, other=0.0).to(STAT)
        grad = masked_gradient(grad_ptr, y_ptr, at, own, STAT, RELU)
        dx += scale * grad
        if RESIDUAL:
            tl.store(dresidual_ptr + at, grad, mask=own)
    tl.store(dx_ptr + at, dx, mask=own)


# ------------------------------------------------------------------------------------------------ domains


@triton.jit
def merge_place(E, chunk, C, groups, BLOCK_C: tl.constexpr):
    """First and last entry of a program's chunk, its group, its channels, and the row of its result."""
    tiles = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) // tiles  # (chunk, group)
    first = (row // groups) * chunk
    return first, tl.minimum(E, first + chunk), row % groups, c, row.to(tl.int64)


@triton.jit
def merge_moments_kernel(
    mean_ptr,  # [E, C]: entry (part, n) is of the domain of sample n, without BY_SAMPLE e is of domain e % D
    moment_ptr,  # [E, C] variance of each entry; not read without MOMENT
    domain_ptr,  # [N]
    count_ptr,  # [E] values of each entry; without COUNTED they are those of its part
    merged_mean_ptr,  # [chunks, D, C], as merged_moment_ptr
    merged_moment_ptr,
    merged_count_ptr,  # [chunks, D]
    E,
    N,
    L,
    part_length,
    chunk,  # entries
    C,
    D,
    MOMENT: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and variance of the values of each domain, by the law of total variance, float64; 0 of a domain without."""
    first, end, domain, c, row = merge_place(E, chunk, C, D, BLOCK_C)
    inside = (c < C)[None, :]
    count = tl.full([1], 0.0, tl.float64)
    mean = tl.zeros([1, BLOCK_C], tl.float64)
    moment = tl.zeros([1, BLOCK_C], tl.float64)
    for step in tl.static_range(2):  # the mean, then the moment about it
        total = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
        values = tl.zeros([BLOCK_E], tl.float64)
        for start in range(first, end, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            if BY_SAMPLE:
                own = (e < end) & (tl.load(domain_ptr + e % N, mask=e < end, other=-1) == domain)
            else:
                own = (e < end) & (e % D == domain)
            if COUNTED:
                weight = tl.load(count_ptr + e, mask=own, other=0).to(tl.float64)
            else:
                weight = tl.where(own, tl.minimum(part_length, L - (e // N) * part_length), 0).to(tl.float64)
            at = e.to(tl.int64)[:, None] * C + c[None, :]
            valid = own[:, None] & inside
            value = tl.load(mean_ptr + at, mask=valid, other=0.0).to(tl.float64)
            if step == 1:
                value = (value - mean) * (value - mean)
                if MOMENT:
                    value += tl.load(moment_ptr + at, mask=valid, other=0.0).to(tl.float64)
            total += tl.where(valid, weight[:, None] * value, 0.0)
            values += weight
        if step == 0:
            count = tl.sum(values, 0, keep_dims=True)
            mean = tl.sum(total, 0, keep_dims=True) / tl.maximum(count, 1.0)[:, None]
        else:
            moment = tl.sum(total, 0, keep_dims=True) / tl.maximum(count, 1.0)[:, None]
    at = row * C + c[None, :]
    tl.store(merged_mean_ptr + at, mean, mask=inside)
    tl.store(merged_moment_ptr + at, moment, mask=inside)
    tl.store(merged_count_ptr + row, tl.sum(count, 0), mask=tl.min(c, 0) == 0)


@triton.jit
def merge_sums_kernel(
    sum1_ptr,  # [E, C], as sum2_ptr: entry (part, n) is of the group of sample n, without BY_SAMPLE e is of e % groups
    sum2_ptr,
    domain_ptr,  # [N]
    mean_ptr,  # [D, C] float64, as variance_ptr; read with PARAMETERS
    variance_ptr,
    group_sum1_ptr,  # [chunks, groups, C], as group_sum2_ptr
    group_sum2_ptr,
    E,
    N,
    chunk,
    C,
    D,
    groups,  # D, or D + 1 where the last one is of id -1
    eps: tl.float64,
    STAT: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    PARAMETERS: tl.constexpr,  # results are the gradients of bias and weight, S1 and S2 / standard deviation
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of S1 and S2 over each group in float64."""
    first, end, group, c, row = merge_place(E, chunk, C, groups, BLOCK_C)
    total1 = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
    total2 = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
    for start in range(first, end, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        if BY_SAMPLE:
            domain = tl.load(domain_ptr + e % N, mask=e < end, other=-2)
            own = (e < end) & (domain == tl.where(group < D, group, -1))
        else:
            own = (e < end) & (e % groups == group)
        at = e.to(tl.int64)[:, None] * C + c[None, :]
        valid = own[:, None] & (c < C)[None, :]
        total1 += tl.load(sum1_ptr + at, mask=valid, other=0.0).to(tl.float64)
        total2 += tl.load(sum2_ptr + at, mask=valid, other=0.0).to(tl.float64)
    sum1, sum2 = tl.sum(total1, 0), tl.sum(total2, 0)
    at = row * C + c
    if PARAMETERS:
        _, rest = split_mean(tl.load(mean_ptr + at, mask=c < C, other=0.0), STAT)
        variance = tl.load(variance_ptr + at, mask=c < C, other=1.0)
        sum2 = (sum2 - rest.to(tl.float64) * sum1) * tl.rsqrt((variance + eps).to(STAT)).to(tl.float64)
    tl.store(group_sum1_ptr + at, sum1, mask=c < C)
    tl.store(group_sum2_ptr + at, sum2, mask=c < C)


@triton.jit
def update_kernel(
    running_mean_ptr,  # [D, C], as running_var_ptr
    running_var_ptr,
    batches_ptr,  # [D] number of batches; read and raised with COUNTED
    mean_ptr,  # [D, C] float64, as variance_ptr
    variance_ptr,
    count_ptr,  # [D]
    momentum: tl.float64,
    C,
    COUNTED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns a domain."""
    domain = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + domain)
    if count > 0:
        step = tl.full((), momentum, tl.float64)
        if COUNTED:
            batches = tl.load(batches_ptr + domain) + 1
            tl.store(batches_ptr + domain, batches)
            if CUMULATIVE:
                step = 1.0 / batches.to(tl.float64)
        unbiased = count.to(tl.float64) / tl.maximum(count - 1, 1).to(tl.float64)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            at = domain * C + c
            mean = tl.load(running_mean_ptr + at, mask=c < C, other=0.0).to(tl.float64)
            mean += step * (tl.load(mean_ptr + at, mask=c < C, other=0.0) - mean)
            tl.store(running_mean_ptr + at, mean, mask=c < C)
            variance = tl.load(running_var_ptr + at, mask=c < C, other=0.0).to(tl.float64)
            variance += step * (tl.load(variance_ptr + at, mask=c < C, other=0.0) * unbiased - variance)
            tl.store(running_var_ptr + at, variance, mask=c < C)


# ------------------------------------------------------------------------------------------------ slabs


@triton.jit
def slab_place(
    C_units, L_units, UNIT: tl.constexpr, ROWS: tl.constexpr, INDEX: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """C, L, the axes n [BLOCK_N], l [1, BLOCK_L, 1] and c [BLOCK_C] of a program, and offsets into x [N, L, C]."""
    C = C_units if ROWS else C_units * UNIT
    L = L_units * UNIT if ROWS else L_units
    n, l = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_L)[None, :, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = n.to(INDEX)[:, None, None]
    at = (sample * C + c[None, None, :]) * L + l if ROWS else (sample * L + l) * C + c[None, None, :]
    return C, L, n, l, c, at


@triton.jit
def slab_forward_kernel(
    x_ptr,  # [N, C, L] or, without ROWS, [N, L, C]; as residual_ptr and y_ptr
    residual_ptr,
    y_ptr,
    domain_ptr,  # [N]
    weight_ptr,  # [D, C] or, with weight_stride 0, [C]; as bias_ptr
    bias_ptr,
    mean_ptr,  # [D, C] float64, as variance_ptr
    variance_ptr,
    count_ptr,  # [D]
    weight_stride,
    bias_stride,
    N,
    C_units,
    L_units,
    D,
    eps: tl.float64,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    STAT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Training: everything for BLOCK_C channels of all samples; y takes the place of x domain by domain."""
    C, L, n, l, c, at = slab_place(C_units, L_units, UNIT, ROWS, INDEX, BLOCK_N, BLOCK_L, BLOCK_C)
    own = (n < N)[:, None, None] & (l < L) & (c < C)[None, None, :]
    x = tl.load(x_ptr + at, mask=own, other=0.0).to(STAT)
    domain = tl.load(domain_ptr + n, mask=n < N, other=-1)
    for d in range(D):
        member = (domain == d)[:, None, None] & own
        count = tl.sum((domain == d).to(tl.int32), 0).to(tl.int64) * L
        over = 1.0 / tl.maximum(count, 1).to(STAT)
        base = tl.sum(tl.sum(tl.where(member, x, 0.0), 0), 0) * over
        away = tl.where(member, x - base[None, None, :], 0.0)
        rest = tl.sum(tl.sum(away, 0), 0) * over
        variance = tl.sum(tl.sum(away * away, 0), 0) * over - rest * rest
        variance = tl.where(variance < 0.0, 0.0, variance)
        scale = tl.rsqrt((variance.to(tl.float64) + eps).to(STAT))
        shift = tl.zeros_like(scale)
        if WEIGHT:
            scale *= tl.load(weight_ptr + d * weight_stride + c, mask=c < C, other=0.0).to(STAT)
        if BIAS:
            shift = tl.load(bias_ptr + d * bias_stride + c, mask=c < C, other=0.0).to(STAT)
        x = tl.where(member, scale[None, None, :] * away + (shift - scale * rest)[None, None, :], x)
        tl.store(mean_ptr + d * C + c, base.to(tl.float64) + rest.to(tl.float64), mask=c < C)
        tl.store(variance_ptr + d * C + c, variance, mask=c < C)
        tl.store(count_ptr + d, count, mask=tl.program_id(0) == 0)
    y = tl.where(((domain >= 0) & (domain < D))[:, None, None], x, float("nan"))
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=own, other=0.0).to(STAT)
    tl.store(y_ptr + at, activated(y, RELU), mask=own)


@triton.jit
def slab_backward_kernel(
    grad_ptr,  # [N, C, L] or, without ROWS, [N, L, C]; as x_ptr, y_ptr, dx_ptr and dresidual_ptr
    x_ptr,
    y_ptr,
    dx_ptr,
    dresidual_ptr,
    domain_ptr,  # [N]
    weight_ptr,  # [D, C] or, with weight_stride 0, [C]
    mean_ptr,  # [D, C] float64, as variance_ptr
    variance_ptr,
    dweight_ptr,  # [D, C], as dbias_ptr
    dbias_ptr,
    weight_stride,
    N,
    C_units,
    L_units,
    D,
    eps: tl.float64,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    STAT: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward of training: everything for BLOCK_C channels of all samples, x and dy' in registers."""
    C, L, n, l, c, at = slab_place(C_units, L_units, UNIT, ROWS, INDEX, BLOCK_N, BLOCK_L, BLOCK_C)
    own = (n < N)[:, None, None] & (l < L) & (c < C)[None, None, :]
    grad = masked_gradient(grad_ptr, y_ptr, at, own, STAT, RELU)
    if RESIDUAL:
        tl.store(dresidual_ptr + at, grad, mask=own)
    x = tl.load(x_ptr + at, mask=own, other=0.0).to(STAT)
    domain = tl.load(domain_ptr + n, mask=n < N, other=-1)
    for d in range(D):
        member = (domain == d)[:, None, None] & own
        over = 1.0 / tl.maximum(tl.sum((domain == d).to(tl.int32), 0).to(tl.int64) * L, 1).to(STAT)
        pivot, rest = split_mean(tl.load(mean_ptr + d * C + c, mask=c < C, other=0.0), STAT)
        rstd = tl.rsqrt((tl.load(variance_ptr + d * C + c, mask=c < C, other=1.0) + eps).to(STAT))
        scale = rstd
        if WEIGHT:
            scale *= tl.load(weight_ptr + d * weight_stride + c, mask=c < C, other=0.0).to(STAT)
        standard = (x - pivot[None, None, :] - rest[None, None, :]) * rstd[None, None, :]
        dbias = tl.sum(tl.sum(tl.where(member, grad, 0.0), 0), 0)
        dweight = tl.sum(tl.sum(tl.where(member, grad * standard, 0.0), 0), 0)
        dx = grad - (dbias * over)[None, None, :] - (dweight * over)[None, None, :] * standard
        grad = tl.where(member, scale[None, None, :] * dx, grad)
        tl.store(dbias_ptr + d * C + c, dbias, mask=c < C)
        tl.store(dweight_ptr + d * C + c, dweight, mask=c < C)
    dx = tl.where(((domain >= 0) & (domain < D))[:, None, None], grad, float("nan"))
    tl.store(dx_ptr + at, dx, mask=own)


# ------------------------------------------------------------------------------------------------ configurations


@dataclass(frozen=True)
class View:
    """x as [O, L, I] without gaps, and what the kernels are told of it."""

    x: Tensor
    rows: bool  # I = 1
    N: int
    C: int
    L: int

    @property
    def outer(self) -> int:
        """O."""
        return self.N * self.C if self.rows else self.N

    @property
    def unit(self) -> int:
        """Divides the dimension that is contiguous."""
        return math.gcd(self.L if self.rows else self.C, 16)

    @property
    def units(self) -> tuple[int, int]:
        """L_units and I_units."""
        return (self.L // self.unit, 1) if self.rows else (self.L, self.C // self.unit)

    @property
    def slab_units(self) -> tuple[int, int]:
        """C_units and L_units."""
        return (self.C, self.L // self.unit) if self.rows else (self.C // self.unit, self.L)

    @property
    def wide(self) -> torch.dtype:
        """The type of statistics."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def stat(self) -> tl.dtype:
        return tl.float64 if self.x.dtype == torch.float64 else tl.float32

    @property
    def constants(self) -> dict[str, Any]:
        return {"ROWS": self.rows, "UNIT": self.unit, "INDEX": tl.int64 if self.x.numel() >= LONG else tl.int32}

    @property
    def tiling(self) -> Tiling:
        return tiling_of(self.outer, self.L, 1 if self.rows else self.C, self.x.element_size())

    def programs(self, parts: int) -> int:
        """Tiles of O, times parts of L, times tiles of I."""
        tiles = self.tiling
        across = 1 if self.rows else triton.cdiv(self.C, tiles.block_i)
        return int(triton.cdiv(self.outer, tiles.block_o) * parts * across)


@dataclass(frozen=True)
class Tiling:
    """Sizes of the kernels that walk over [O, L, I]."""

    block_o: int
    block_l: int
    block_i: int
    part_blocks: int  # blocks along L that a program of a reduction takes
    parts: int  # of L, in reductions

    @property
    def part_length(self) -> int:
        return self.part_blocks * self.block_l

    @property
    def constants(self) -> dict[str, Any]:
        return {"BLOCK_O": self.block_o, "BLOCK_L": self.block_l, "BLOCK_I": self.block_i, "num_warps": 4}


@dataclass(frozen=True)
class Slab:
    """Sizes of the slab kernels."""

    block_n: int
    block_l: int
    block_c: int
    num_warps: int

    @property
    def constants(self) -> dict[str, Any]:
        blocks = {"BLOCK_N": self.block_n, "BLOCK_L": self.block_l, "BLOCK_C": self.block_c}
        return blocks | {"num_warps": self.num_warps}


@functools.lru_cache(1024)
def tiling_of(O: int, L: int, I: int, itemsize: int) -> Tiling:
    """Tiles of TILE_BYTES, 256 bytes wide along I; fewer rows and more parts of L until TARGET_PROGRAMS run."""
    elements = TILE_BYTES // itemsize
    block_i = min(triton.next_power_of_2(I), 256 // itemsize)
    block_l = min(triton.next_power_of_2(L), elements // block_i)
    block_o = min(triton.next_power_of_2(O), elements // (block_i * block_l))
    columns, blocks = triton.cdiv(I, block_i), triton.cdiv(L, block_l)
    while block_o > 1 and triton.cdiv(O, block_o) * columns * blocks < TARGET_PROGRAMS:
        block_o //= 2
    programs = triton.cdiv(O, block_o) * columns
    part_blocks = triton.cdiv(blocks, max(1, min(TARGET_PROGRAMS // programs, blocks // 2)))
    return Tiling(block_o, block_l, block_i, part_blocks, triton.cdiv(blocks, part_blocks))


def slab_of(view: View, num_domains: int) -> Slab | None:
    """The slab that a program can hold, 64 bytes wide or else 32; None where it cannot."""
    run = (view.L if view.rows else 1) * view.x.element_size()  # bytes of a channel that lie together
    block_n, block_l = triton.next_power_of_2(view.N), triton.next_power_of_2(view.L)
    for width in (64, 32):
        block_c = min(triton.next_power_of_2(view.C), triton.next_power_of_2(triton.cdiv(width, run)))
        size = block_n * block_l * block_c * view.wide.itemsize
        if size <= SLAB_BYTES and num_domains <= SLAB_DOMAINS:
            return Slab(block_n, block_l, block_c, num_warps=min(16, max(4, size // 2048)))
    return None


# ------------------------------------------------------------------------------------------------ operators


def view_of(x: Tensor) -> View:
    """x [N, C, *] in the layout it has, or in a contiguous copy."""
    N, C = x.shape[:2]
    L = math.prod(x.shape[2:])
    if x.movedim(1, -1).is_contiguous():
        return View(x, False, N, C, L)
    return View(x.contiguous(), L > 1, N, C, L)


def beside(view: View, other: Tensor | None) -> Tensor | None:
    """other [N, C, *] in the layout of the view."""
    if other is None:
        return None
    if view.rows:
        return other.contiguous()
    return other.movedim(1, -1).contiguous().movedim(-1, 1)


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Queues the kernel on the current stream of the device of x."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](*arguments, **constants)


def empty_like(view: View) -> Tensor:
    """Uninitialised, in the layout of the view."""
    return view.x.new_empty_strided(view.x.shape, view.x.stride())


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return reference.instance_moments(x)
    view = view_of(x)
    N, C, L = view.N, view.C, view.L
    parts = view.tiling.parts
    mean, moment = part_moments(view, view.wide if parts == 1 else torch.float64)
    if parts > 1:  # as one domain with a channel for every (n, c)
        merged = (x.new_empty((1, N, C), dtype=view.wide), x.new_empty((1, N, C), dtype=view.wide))
        count = x.new_empty(1, dtype=torch.int64)
        length = view.tiling.part_length
        merge_moments((mean, moment, None, None), (*merged, count), parts, 1, L, length, parts, N * C, 1)
        mean, moment = merged
    return mean[0], moment[0]


def centred_affine(
    x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str
) -> Tensor:
    if x.numel() == 0:
        return reference.centred_affine(x, mean, scale, shift, residual, activation)
    view = view_of(x)
    y = empty_like(view)
    affine(view, y, (mean, scale, shift, None), residual, activation)
    return y


def centred_affine_sums(grad: Tensor, x: Tensor, mean: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return reference.centred_affine_sums(grad, x, mean, y)
    S1, S2 = part_sums(view_of(x), grad, y, mean)
    return (S1[0], S2[0]) if S1.shape[0] == 1 else (S1.sum(0), S2.sum(0))


def centred_affine_input_grad(
    grad: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    offset: Tensor,
    slope: Tensor,
    y: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return reference.centred_affine_input_grad(grad, x, mean, scale, offset, slope, y, residual)
    if grad is None or scale is None:
        grad, y, residual = None, None, False
    return input_grad(view_of(x), grad, y, (mean, scale, offset, slope, None), residual)


def domain_batch_norm(
    x: Tensor,
    domain: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_domains: int,
    training: bool,
    eps: float,
    activation: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D, C = num_domains, x.shape[1]
    if x.numel() == 0:
        return reference.domain_batch_norm(
            x, domain, running_mean, running_var, weight, bias, residual, D, training, eps, activation, strict
        )
    view, domain = view_of(x), domain.contiguous()
    y = empty_like(view)
    mean, variance = (x.new_empty((D, C), dtype=torch.float64) for _ in range(2))
    count = x.new_empty(D, dtype=torch.int64)
    if not training:
        tables = running_mean, running_var, bias, weight
        affine(view, y, tables, residual, activation, domain, eps, True, (mean, variance, count))
        return y, mean, variance, count
    slab = slab_of(view, D)
    if slab is not None:
        slab_forward(view, slab, y, domain, weight, bias, residual, mean, variance, count, eps, activation)
    else:
        merge_samples(view, domain, mean, variance, count)
        affine(view, y, (mean, variance, bias, weight), residual, activation, domain, eps)
    if strict and bool((count == 1).any()):
        raise ValueError(reference.single_value_message(count))
    return y, mean, variance, count


def domain_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    y: Tensor | None,
    training: bool,
    eps: float,
    shared_affine: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = mean.shape[0]
    if x.numel() == 0:
        return reference.domain_batch_norm_backward(
            grad, x, domain, weight, mean, variance, count, y, training, eps, shared_affine, residual
        )
    view, domain = view_of(x), domain.contiguous()
    mean, variance = mean.contiguous(), variance.contiguous()
    slab = slab_of(view, D) if training else None
    if slab is not None:
        dx, dweight, dbias, dresidual = slab_backward(
            view, slab, grad, domain, weight, mean, variance, y, eps, residual
        )
    else:
        S1, S2 = part_sums(view, grad, y, mean, variance, domain, pooled=not training)
        dweight, dbias = merge_sums(view, S1, S2, domain, mean, variance, eps, training)
        tables = (mean, variance, dbias, dweight, weight)
        dx, dresidual = input_grad(view, grad, y, tables, residual, domain, count, eps, training)
    if shared_affine:
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    return dx, dweight, dbias, dresidual


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    momentum: float | None,
) -> None:
    D, C = mean.shape
    buffers = running_mean, running_var, num_batches_tracked
    if mean.numel() == 0 or not all(buffer is None or buffer.is_contiguous() for buffer in buffers):
        reference.update_running_statistics(
            running_mean, running_var, num_batches_tracked, mean, variance, count, momentum
        )
        return
    launch(
        update_kernel,
        D,
        mean,
        running_mean,
        running_var,
        num_batches_tracked,
        mean.contiguous(),
        variance.contiguous(),
        count.contiguous(),
        0.0 if momentum is None else momentum,
        C,
        COUNTED=num_batches_tracked is not None,
        CUMULATIVE=momentum is None,
        BLOCK_C=min(1024, triton.next_power_of_2(C)),
        num_warps=4,
    )


# ------------------------------------------------------------------------------------------------ launches


def part_moments(view: View, mean_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each part of L: [parts, N, C]. In float32 the mean costs the variance of small deviations
    from it the digits that it lacks, so that means to be merged are float64."""
    tiles = view.tiling
    shape = (tiles.parts, view.N, view.C)
    mean, moment = view.x.new_empty(shape, dtype=mean_dtype), view.x.new_empty(shape, dtype=view.wide)
    arguments = (view.x, mean, moment, view.outer, *view.units, tiles.part_blocks, tiles.parts)
    launch(moments_kernel, view.programs(tiles.parts), view.x, *arguments, **view.constants, **tiles.constants)
    return mean, moment


def part_sums(
    view: View,
    grad: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor | None = None,
    domain: Tensor | None = None,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    """S1 and S2 of each part of L, [parts, N, C], about mean [N, C], or with `domain` [D, C]."""
    tiles = view.tiling
    S1, S2 = (view.x.new_empty((tiles.parts, view.N, view.C), dtype=view.wide) for _ in range(2))
    launch(
        sums_kernel,
        view.programs(tiles.parts),
        view.x,
        *(beside(view, grad), view.x, beside(view, y), mean.contiguous(), variance, domain, S1, S2),
        *(view.outer, *view.units, tiles.part_blocks, tiles.parts, view.C, mean.shape[0]),
        **view.constants,
        BY_DOMAIN=domain is not None,
        POOLED=pooled,
        RELU=y is not None,
        **tiles.constants,
    )
    return S1, S2


def affine(
    view: View,
    y: Tensor,
    tables: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    domain: Tensor | None = None,
    eps: float = 0.0,
    pooled: bool = False,
    kept: tuple[Tensor | None, ...] = (None, None, None),
) -> None:
    """y from (mean, scale, shift, None) [N, C], or with `domain` from (mean, variance, bias, weight) [D, C]; there
    `kept` takes copies of mean and variance and a count of zero."""
    mean, scale, shift, weight = (None if table is None else table.contiguous() for table in tables)
    assert mean is not None
    tiles = view.tiling
    launch(
        affine_kernel,
        view.programs(triton.cdiv(view.L, tiles.block_l)),
        view.x,
        *(view.x, beside(view, residual), y, mean, scale, shift, weight, domain, *kept),
        *(row_stride(weight), row_stride(shift), view.outer, *view.units, view.C, mean.shape[0], eps),
        **view.constants,
        STAT=view.stat,
        BY_DOMAIN=domain is not None,
        POOLED=pooled,
        WEIGHT=weight is not None,
        BIAS=shift is not None,
        RESIDUAL=residual is not None,
        RELU=activation == "relu",
        KEEP=kept[0] is not None,
        **tiles.constants,
    )


def input_grad(
    view: View,
    grad: Tensor | None,
    y: Tensor | None,
    tables: tuple[Tensor | None, ...],
    residual: bool,
    domain: Tensor | None = None,
    count: Tensor | None = None,
    eps: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """dx and dy' from (mean, scale, offset, slope, None) [N, C], or with `domain` from (mean, variance, dbias, dweight,
    weight) [D, C]."""
    mean, scale, offset, slope, weight = (None if table is None else table.contiguous() for table in tables)
    assert mean is not None
    tiles, y = view.tiling, beside(view, y)
    dx = empty_like(view)
    dresidual = empty_like(view) if residual else None
    launch(
        input_grad_kernel,
        view.programs(triton.cdiv(view.L, tiles.block_l)),
        view.x,
        *(beside(view, grad), view.x, y, dx, dresidual, mean, scale, offset, slope, weight, domain, count),
        *(row_stride(weight), view.outer, *view.units, view.C, mean.shape[0], eps),
        **view.constants,
        STAT=view.stat,
        BY_DOMAIN=domain is not None,
        TRAINING=training,
        WEIGHT=weight is not None,
        GRAD=grad is not None,
        RESIDUAL=residual,
        RELU=y is not None,
        **tiles.constants,
    )
    return dx, view.x.new_empty(0) if dresidual is None else dresidual


def merge_samples(view: View, domain: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Mean and variance [D, C] and count [D] of the values of each domain."""
    x, N, C, L, D = view.x, view.N, view.C, view.L, mean.shape[0]
    part_mean, part_moment = (x, None) if L == 1 else part_moments(view, torch.float64)
    entries = N if L == 1 else part_mean.shape[0] * N
    chunks = triton.cdiv(entries, CHUNK_ENTRIES)
    parts = (part_mean, part_moment, domain, None)
    results = (mean, variance, count)
    if chunks > 1:
        partial = (
            x.new_empty((chunks * D, C), dtype=torch.float64),
            x.new_empty((chunks * D, C), dtype=torch.float64),
            x.new_empty(chunks * D, dtype=torch.int64),
        )
        merge_moments(parts, partial, entries, N, L, view.tiling.part_length, CHUNK_ENTRIES, C, D)
        merge_moments((*partial[:2], None, partial[2]), results, chunks * D, 1, 1, 1, chunks * D, C, D)
    else:
        merge_moments(parts, results, entries, N, L, view.tiling.part_length, entries, C, D)


def merge_moments(
    parts: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    entries: int,
    N: int,
    L: int,
    part_length: int,
    chunk: int,
    C: int,
    D: int,
) -> None:
    """Queues `merge_moments_kernel` on the mean, variance, domain and count of entries."""
    _, moment, domain, count = parts
    launch(
        merge_moments_kernel,
        triton.cdiv(entries, chunk) * D * triton.cdiv(C, MERGE_CHANNELS),
        results[0],
        *(*parts, *results, entries, N, L, part_length, chunk, C, D),
        MOMENT=moment is not None,
        BY_SAMPLE=domain is not None,
        COUNTED=count is not None,
        BLOCK_E=MERGE_ENTRIES,
        BLOCK_C=MERGE_CHANNELS,
        num_warps=4,
    )


def merge_sums(
    view: View, S1: Tensor, S2: Tensor, domain: Tensor, mean: Tensor, variance: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, [D, C], from S1 and S2 [parts, N, C]."""
    x, (D, C), groups = view.x, mean.shape, mean.shape[0] + (not training)
    entries, dtype = S1.shape[0] * view.N, view.wide if training else torch.float64
    of_sample: Tensor | None = domain

    def merged(chunk: int, dtype: torch.dtype, parameters: bool) -> list[Tensor]:
        chunks = triton.cdiv(entries, chunk)
        tables = [x.new_empty((chunks * groups, C), dtype=dtype) for _ in range(2)]
        launch(
            merge_sums_kernel,
            chunks * groups * triton.cdiv(C, MERGE_CHANNELS),
            x,
            *(S1, S2, of_sample, mean, variance, *tables, entries, view.N, chunk, C, D, groups, eps),
            STAT=view.stat,
            BY_SAMPLE=of_sample is not None,
            PARAMETERS=parameters,
            BLOCK_E=MERGE_ENTRIES,
            BLOCK_C=MERGE_CHANNELS,
            num_warps=4,
        )
        return tables

    if entries > CHUNK_ENTRIES:
        S1, S2 = merged(CHUNK_ENTRIES, torch.float64, False)
        entries, of_sample = S1.shape[0], None
    dbias, dweight = merged(entries, dtype, training)
    if training:
        return dweight, dbias
    means, variances = reference.pooled_rows(mean, variance)
    dweight = (dweight - (means - means.to(view.wide)) * dbias) * (variances + eps).rsqrt()
    return tuple((table[:-1] + table[-1:] / D).to(view.wide) for table in (dweight, dbias))  # type: ignore[return-value]


def slab_forward(
    view: View,
    slab: Slab,
    y: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    eps: float,
    activation: str,
) -> None:
    """Queues `slab_forward_kernel`."""
    weight, bias = (None if table is None else table.contiguous() for table in (weight, bias))
    launch(
        slab_forward_kernel,
        triton.cdiv(view.C, slab.block_c),
        view.x,
        *(view.x, beside(view, residual), y, domain, weight, bias, mean, variance, count),
        *(row_stride(weight), row_stride(bias), view.N, *view.slab_units, mean.shape[0], eps),
        **view.constants,
        STAT=view.stat,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        RELU=activation == "relu",
        **slab.constants,
    )


def slab_backward(
    view: View,
    slab: Slab,
    grad: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    y: Tensor | None,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, the gradients of weight and bias [D, C], and dy'."""
    weight = None if weight is None else weight.contiguous()
    dweight, dbias = (view.x.new_empty(mean.shape, dtype=view.wide) for _ in range(2))
    dx = empty_like(view)
    dresidual = empty_like(view) if residual else None
    launch(
        slab_backward_kernel,
        triton.cdiv(view.C, slab.block_c),
        view.x,
        *(beside(view, grad), view.x, beside(view, y), dx, dresidual, domain, weight, mean, variance, dweight, dbias),
        *(row_stride(weight), view.N, *view.slab_units, mean.shape[0], eps),
        **view.constants,
        STAT=view.stat,
        WEIGHT=weight is not None,
        RESIDUAL=residual,
        RELU=y is not None,
        **slab.constants,
    )
    return dx, dweight, dbias, view.x.new_empty(0) if dresidual is None else dresidual


def row_stride(table: Tensor | None) -> int:
    """From one domain to the next: C of a contiguous table [D, C], 0 of one [C] for all domains."""
    return table.shape[1] if table is not None and table.dim() == 2 else 0
