# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The closed-form discriminator on CUDA, without reading anything back to the host.

    y = exp(-eta (l - min l)),  e = 1 - y,  D = 1 / (1 + w)
    JS: w = y / (r + e) with r the root of 1 / mean(1 / (r + e)) = (1 + r) / 2
    KL: w = y / mean y

Method: as csrc/cpu/closed_form_discriminator.cpp. Newton's iteration from r = 1 takes at most 12 steps on the hardest
of our tests; a fixed number of launches makes one each, every program of a launch adding up the partial sums of the
launch before in one order, so that all hold the same r. No atomics.

Floor, bytes a sample of float32: 8 (read l, write v), 4 a step, 12 (read v, write D, w), 100 in all; up to some ten
million samples v stays in L2 and launches count as much.

Layout: at most PROGRAMS programs, each owning every PROGRAMS-th block of BLOCK samples. v = e, or -y where e > 1/2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.reference.closed_form_discriminator import LARGEST_SHARE

BLOCK = 1024
PROGRAMS = 256
STEPS = 20


@triton.jit
def one_minus_exp(u):
    """1 - exp(-u) for u >= 0: in float32 by a series where the difference would cancel. In float64 an error of 1e-16 is
    none beside r >= 1e-6.
    """
    e = 1.0 - tl.exp(-u)
    if u.dtype == tl.float32:
        series = u * 0.0 + 1.0
        for k in tl.static_range(10, 1, -1):
            series = 1.0 - u * (1.0 / k) * series
        e = tl.where(u < 0.5, u * series, e)
    return e


@triton.jit
def tilt_kernel(l_ptr, lowest_ptr, eta_ptr, v_ptr, sum_ptr, N, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """v of all samples, and the sum of the y of each program."""
    lowest, eta = tl.load(lowest_ptr), tl.load(eta_ptr)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(tl.program_id(0) * BLOCK, N, PROGRAMS * BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        l = tl.load(l_ptr + i, mask=i < N, other=0.0)
        u = (l - lowest) * eta.to(l.dtype)
        e = one_minus_exp(u)
        y = tl.exp(-u)
        tl.store(v_ptr + i, tl.where(e > 0.5, -y, e), mask=i < N)
        total += tl.where(i < N, y, 0.0).to(tl.float64)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def parts(v):
    """e and y; -0 holds y = 0."""
    BITS: tl.constexpr = tl.int64 if v.dtype == tl.float64 else tl.int32
    beyond = v.to(BITS, bitcast=True) < 0
    return tl.where(beyond, 1.0 + v, v), tl.where(beyond, -v, 1.0 - v)


@triton.jit
def newton(partial_ptr, r, N, least, PROGRAMS: tl.constexpr):
    """The iterate after r, from the sums over 1 / (r + e) and its square."""
    p = tl.arange(0, PROGRAMS)
    h = tl.sum(tl.load(partial_ptr + 2 * p), 0) / N
    square = tl.sum(tl.load(partial_ptr + 2 * p + 1), 0) / N
    return tl.maximum(r - (1.0 / h - (1.0 + r) / 2.0) / (square / (h * h) - 0.5), least)


@triton.jit
def sums_kernel(
    v_ptr, partial_ptr, r_ptr, least_ptr, step, N, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr
):
    """Sums of step `step`, [steps, PROGRAMS, 2], at the r that those of the step before lead to, r_ptr [steps]."""
    least = tl.load(least_ptr)
    if FIRST:
        r = least * 0.0 + 1.0
    else:
        r = newton(partial_ptr + (step - 1) * 2 * PROGRAMS, tl.load(r_ptr + step - 1), N, least, PROGRAMS)
    first_sum = tl.zeros([BLOCK], tl.float64)
    second_sum = tl.zeros([BLOCK], tl.float64)
    for first in range(tl.program_id(0) * BLOCK, N, PROGRAMS * BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        v = tl.load(v_ptr + i, mask=i < N, other=0.0)
        e, _ = parts(v)
        q = tl.where(i < N, 1.0 / (e + r.to(v.dtype)), 0.0).to(tl.float64)
        first_sum += q
        second_sum += q * q
    out = partial_ptr + (step * PROGRAMS + tl.program_id(0)) * 2
    tl.store(out, tl.sum(first_sum, 0))
    tl.store(out + 1, tl.sum(second_sum, 0))
    if tl.program_id(0) == 0:
        tl.store(r_ptr + step, r)


@triton.jit
def finish_kernel(
    v_ptr,
    partial_ptr,  # JS: sums of the last step; KL: those of y
    r_ptr,  # JS: r of the last step
    lowest_ptr,
    eta_ptr,
    least_ptr,
    discriminator_ptr,
    weight_ptr,
    c_ptr,
    N,
    JENSEN_SHANNON: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    eta = tl.load(eta_ptr)
    if JENSEN_SHANNON:
        r = newton(partial_ptr, tl.load(r_ptr), N, tl.load(least_ptr), PROGRAMS)
        shift = tl.log(1.0 + r)
    else:
        r = tl.sum(tl.load(partial_ptr + tl.arange(0, PROGRAMS)), 0) / N
        shift = tl.log(r)
    lowest = tl.load(lowest_ptr).to(tl.float64)
    broken = (lowest - lowest) * eta  # NaN for a penalty that is not finite
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    v = tl.load(v_ptr + i, mask=i < N, other=0.0)
    e, y = parts(v)
    own = (r + broken).to(v.dtype)
    if JENSEN_SHANNON:
        w = y / (e + own)
        D = (e + own) / (1.0 + own)
    else:
        w = y / own
        D = 1.0 / (1.0 + w)
    tl.store(weight_ptr + i, w, mask=i < N)
    tl.store(discriminator_ptr + i, D, mask=i < N)
    if tl.program_id(0) == 0:
        tl.store(c_ptr, eta * lowest - shift + broken)


def closed_form_discriminator(penalty: Tensor, eta: float, game: str) -> tuple[Tensor, Tensor, Tensor]:
    """D, w [N] and c [1] float64 of contiguous float32 or float64 penalties [N], N > 0."""
    N, js = len(penalty), game == "js"

    def doubles(*shape: int) -> Tensor:
        return penalty.new_empty(shape, dtype=torch.float64)

    v, D, w = (torch.empty_like(penalty) for _ in range(3))
    lowest = penalty.amin()
    wide_eta = doubles(1).fill_(eta)  # plain numbers would be passed on in float32
    least = doubles(1).fill_(max(1 / LARGEST_SHARE - 1, 1 / (2 * N - 1)))
    sums, r, c = doubles(STEPS, PROGRAMS, 2), doubles(STEPS), doubles(1)
    tilt_kernel[(PROGRAMS,)](penalty, lowest, wide_eta, v, sums, N, PROGRAMS, BLOCK)
    for step in range(STEPS if js else 0):
        sums_kernel[(PROGRAMS,)](v, sums, r, least, step, N, PROGRAMS, BLOCK, step == 0)
    last = (sums[-1], r[-1:]) if js else (sums, r)
    finish_kernel[(triton.cdiv(N, BLOCK),)](v, *last, lowest, wide_eta, least, D, w, c, N, js, PROGRAMS, BLOCK)
    return D, w, c
