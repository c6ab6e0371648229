# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""InfoNCE and KL of rows q, o [N, d] with a long queue Q [K, d] on CUDA, and their gradients in q, without [N, K].

    S = q Q' / tau, R = o Q' / tau_t;    log sum exp of both, A = E_p_q[Q], B = E_p_o[Q], E_p_o[R - S]
    L_con = mean softplus(lse S - l), l = <q, k> / tau       dL_con / dq = -sigmoid(lse S - l) (k - A) / (tau N)
    KL = mean of E_p_o[R - S] - lse R + lse S                dKL / dq = (A - B) / (tau N)

Floor: 2 N K d multiply-adds with o, as many again with a gradient, at the rate of the type below; the queue is read
once a block of rows, from L2.

Layout: q and o are one set of rows X [R, d]. A program of `accumulate_kernel` owns BLOCK_N of them and a slab of the
queue, which it walks in tiles of BLOCK_K rows with a running maximum, as flash attention does; its part of A or B stays
in registers. `merge_kernel` owns a row: it merges the slabs in their order and forms losses and gradients; E_p_o[R - S]
is <o, B> / tau_t - <q, B> / tau. Nothing depends on timing: no atomics.

Precision of the products: float32 tf32x3 (each factor split in two, three passes), about 1e-6 of a logit's scale, also
for a 16-bit queue; float64 throughout for float64.

Limits: d <= LONGEST; more columns go to the reference. K below 2^31 - BLOCK_K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.reference import queue_contrast as reference
from neuraldeps_kernels.triton.domain_norm import launch

LONGEST = 128  # columns, whose sums of one block of rows fit the registers
TARGET_PROGRAMS = 264  # two a multiprocessor of the largest devices
MIN_SLAB_ROWS = 512


@triton.jit
def accumulate_kernel(
    x_ptr,  # X [R, d]: q, then o
    queue_ptr,  # [K, d], rows queue_stride apart
    largest_ptr,  # [slabs, R] m, the largest logit of each row in each slab; sum_ptr: [slabs, R] sum of exp(logit - m)
    sum_ptr,
    sums_ptr,  # [slabs, R, d] sum of exp(logit - m) Q
    N,  # rows of q
    R,
    K,
    d,
    queue_stride,
    slab_rows,  # a multiple of BLOCK_K
    slabs,
    temperature: tl.float64,
    target_temperature: tl.float64,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    SUM: tl.constexpr = x_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == SUM else "ieee"
    slab = tl.program_id(0) % slabs
    n = (tl.program_id(0) // slabs) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_K)
    at = n.to(tl.int64)[:, None] * d + c[None, :]
    own = (n < R)[:, None] & (c < d)[None, :]
    x = tl.load(x_ptr + at, mask=own, other=0.0)
    over = tl.where(n < N, tl.full((), 1.0 / temperature, SUM), tl.full((), 1.0 / target_temperature, SUM))
    lowest: tl.constexpr = -1e300 if tl.float64 == SUM else -1e37
    largest = tl.full([BLOCK_N], lowest, SUM)
    total = tl.zeros([BLOCK_N], SUM)
    sums = tl.zeros([BLOCK_N, BLOCK_D], SUM)
    end = tl.minimum(K, (slab + 1) * slab_rows)
    for first in range(slab * slab_rows, end, BLOCK_K):
        inside = first + j < end
        place = (first + j).to(tl.int64)[:, None] * queue_stride + c[None, :]
        tile = tl.load(queue_ptr + place, mask=inside[:, None] & (c < d)[None, :], other=0.0).to(SUM)
        logits = tl.dot(x, tl.trans(tile), input_precision=PRECISION, out_dtype=SUM) * over[:, None]
        logits = tl.where(inside[None, :], logits, lowest)
        top = tl.maximum(largest, tl.max(logits, 1))
        kept = tl.exp(largest - top)
        e = tl.where(inside[None, :], tl.exp(logits - top[:, None]), 0.0)
        largest, total = top, total * kept + tl.sum(e, 1)
        if SUMS:
            sums = tl.dot(e, tile, sums * kept[:, None], input_precision=PRECISION, out_dtype=SUM)

    row = slab.to(tl.int64) * R + n
    tl.store(largest_ptr + row, largest, mask=n < R)
    tl.store(sum_ptr + row, total, mask=n < R)
    if SUMS:
        tl.store(sums_ptr + slab.to(tl.int64) * R * d + at, sums, mask=own)


@triton.jit
def merged_softmax(largest_ptr, sum_ptr, row, R, slabs, BLOCK_SLABS: tl.constexpr):
    """m and s of a row over all slabs, float64."""
    slab = tl.arange(0, BLOCK_SLABS)
    at = slab.to(tl.int64) * R + row
    tops = tl.load(largest_ptr + at, mask=slab < slabs, other=-float("inf")).to(tl.float64)
    m = tl.max(tops, 0)
    return m, tl.sum(tl.load(sum_ptr + at, mask=slab < slabs, other=0.0).to(tl.float64) * tl.exp(tops - m), 0)


@triton.jit
def merged_mean(largest_ptr, sums_ptr, row, m, s, c, R, d, slabs, SUM: tl.constexpr):
    """E_p[Q] [BLOCK_D] of a row."""
    mean = tl.zeros_like(c).to(SUM)
    for slab in range(slabs):
        at = (tl.zeros((), tl.int64) + slab) * R + row
        share = (tl.exp(tl.load(largest_ptr + at).to(tl.float64) - m) / s).to(SUM)
        mean += share * tl.load(sums_ptr + at * d + c, mask=c < d, other=0.0)
    return mean


@triton.jit
def merge_kernel(
    x_ptr,  # X [R, d]: q, then o
    k_ptr,  # [N, d]
    largest_ptr,  # [slabs, R], as sum_ptr
    sum_ptr,
    sums_ptr,  # [slabs, R, d]
    losses_ptr,  # [2, N] float64: both losses of each row over N
    dcontrast_ptr,  # [N, d], as dconsistency_ptr
    dconsistency_ptr,
    N,
    R,
    d,
    slabs,
    temperature: tl.float64,
    target_temperature: tl.float64,
    over: tl.float64,  # 1 / (tau N)
    ORIGINAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLABS: tl.constexpr,
):
    SUM: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    m_q, s_q = merged_softmax(largest_ptr, sum_ptr, n, R, slabs, BLOCK_SLABS)
    lse_q = m_q + tl.log(s_q)
    q = tl.load(x_ptr + n * d + c, mask=c < d, other=0.0)
    k = tl.load(k_ptr + n * d + c, mask=c < d, other=0.0)
    excess = lse_q - tl.sum(q.to(tl.float64) * k.to(tl.float64), 0) / temperature
    small = tl.exp(-tl.abs(excess))
    tl.store(losses_ptr + n, (tl.maximum(excess, 0.0) + tl.log(1.0 + small)) / N)
    mean_q = q
    if GRADIENT:
        mean_q = merged_mean(largest_ptr, sums_ptr, n, m_q, s_q, c, R, d, slabs, SUM)
        sigmoid = tl.where(excess < 0.0, small, 1.0) / (1.0 + small)
        tl.store(dcontrast_ptr + n * d + c, (-over * sigmoid).to(SUM) * (k - mean_q), mask=c < d)
    if ORIGINAL:
        m_o, s_o = merged_softmax(largest_ptr, sum_ptr, N + n, R, slabs, BLOCK_SLABS)
        mean_o = merged_mean(largest_ptr, sums_ptr, N + n, m_o, s_o, c, R, d, slabs, SUM)
        o = tl.load(x_ptr + (N + n) * d + c, mask=c < d, other=0.0)
        target = tl.sum(o.to(tl.float64) * mean_o.to(tl.float64), 0) / target_temperature
        found = tl.sum(q.to(tl.float64) * mean_o.to(tl.float64), 0) / temperature
        divergence = target - (m_o + tl.log(s_o)) - found + lse_q
        tl.store(losses_ptr + N + n, tl.where(divergence < 0.0, 0.0, divergence) / N)
        if GRADIENT:
            tl.store(dconsistency_ptr + n * d + c, (mean_q - mean_o) * tl.full((), over, SUM), mask=c < d)


@dataclass(frozen=True)
class Config:
    """Sizes of `accumulate_kernel`."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int


def config_of(d: int, dtype: torch.dtype) -> Config:
    """The largest blocks that compile without spills."""
    block_d = max(16, triton.next_power_of_2(d))
    return Config(16, 16, block_d, 8) if dtype == torch.float64 else Config(32, 32, block_d, 8)


def slabs_of(R: int, K: int, config: Config) -> tuple[int, int]:
    """Number of slabs and their rows, so that about TARGET_PROGRAMS run but none has few rows."""
    blocks = triton.cdiv(R, config.block_n)
    wanted = max(1, min(TARGET_PROGRAMS // blocks, K // MIN_SLAB_ROWS))
    rows = triton.cdiv(triton.cdiv(K, wanted), config.block_k) * config.block_k
    return triton.cdiv(K, rows), rows


def queue_contrast_forward(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    original: Tensor | None,
    temperature: float,
    target_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, d), K = q.shape, len(queue)
    if N == 0 or K == 0 or d > LONGEST:
        arguments = (q, k, queue, original, temperature, target_temperature, gradient)
        return reference.queue_contrast_forward(*arguments)
    x = q.contiguous() if original is None else torch.cat([q, original])
    k = k.contiguous()
    queue = queue if queue.stride(1) == 1 else queue.contiguous()
    R = len(x)
    config = config_of(d, q.dtype)
    slabs, slab_rows = slabs_of(R, K, config)
    largest, total = q.new_empty((2, slabs, R))
    with_sums = gradient or original is not None
    sums = q.new_empty((slabs, R, d) if with_sums else 0)
    losses = q.new_zeros((2, N), dtype=torch.float64)
    dcontrast = q.new_empty((N if gradient else 0, d))
    dconsistency = q.new_empty((N if gradient and original is not None else 0, d))
    launch(
        accumulate_kernel, triton.cdiv(R, config.block_n) * slabs, q,
        *(x, queue, largest, total, sums, N, R, K, d, queue.stride(0), slab_rows, slabs),
        *(temperature, target_temperature),
        SUMS=with_sums, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    launch(
        merge_kernel, N, q,
        *(x, k, largest, total, sums, losses, dcontrast, dconsistency, N, R, d, slabs),
        *(temperature, target_temperature, 1 / (temperature * N)),
        ORIGINAL=original is not None, GRADIENT=gradient, BLOCK_D=config.block_d,
        BLOCK_SLABS=triton.next_power_of_2(slabs), num_warps=1,
    )  # fmt: skip
    contrast, consistency = (row.sum(dtype=q.dtype) for row in losses)
    return contrast, consistency, dcontrast, dconsistency
