# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Distillation loss over many classes on CUDA, and its gradient.

    s = sum exp((x - m) / T),  m = max x       of the student a and the teacher b, online
    u = log p_s - log p_t,     KL = sum p_t (e^u - 1 - u)          every term >= 0, as in csrc/cpu/distillation_kl.cpp
    da = grad T / N (p_s - p_t)

Floor: forward 8 bytes an entry of float32 (a and b read), backward 12 (read again, da written); the second look at a
row in the forward comes from L2. No softmax is stored.

Layout: forward, a program owns a row: each lane keeps its own maximum and sum, merged once in float64, then the terms
of KL are added up. Backward, a program owns BLOCK entries of a row. The sum over rows is torch's, of [N] numbers.

Limits: infinite logits give NaN or infinity. C below 2^31 - BLOCK.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.triton.domain_norm import launch

FORWARD_BLOCK = 4096  # entries that a program has in flight
BACKWARD_BLOCK = 2048


@triton.jit
def over_temperature(x, largest, temperature, STAT: tl.constexpr):
    """(x - m) / T."""
    return (x - largest) * tl.full((), 1.0 / temperature, STAT)


@triton.jit
def lane_softmax(x, inside, largest, total, temperature, STAT: tl.constexpr):
    """Maximum and sum of every lane, with x [BLOCK] taken in."""
    new = tl.where(x > largest, x, largest)  # NaN is left to the sum
    kept = total * tl.exp(over_temperature(largest, new, temperature, STAT))
    return new, kept + tl.where(inside, tl.exp(over_temperature(x, new, temperature, STAT)), 0.0)


@triton.jit
def merged_softmax(largest, total, temperature):
    """m and s of a row, float64, from those of the lanes."""
    m = tl.max(largest, 0)
    scale = tl.exp((largest - m).to(tl.float64) * (1.0 / temperature))
    return m, tl.sum(total.to(tl.float64) * scale, 0)


@triton.jit
def second_order(u):
    """(e^u - 1 - u) / u^2 for |u| <= 1/2, by its Taylor series in float64's length."""
    series = u * (1.0 / 1307674368000.0) + 1.0 / 87178291200.0
    series = series * u + 1.0 / 6227020800.0
    series = series * u + 1.0 / 479001600.0
    series = series * u + 1.0 / 39916800.0
    series = series * u + 1.0 / 3628800.0
    series = series * u + 1.0 / 362880.0
    series = series * u + 1.0 / 40320.0
    series = series * u + 1.0 / 5040.0
    series = series * u + 1.0 / 720.0
    series = series * u + 1.0 / 120.0
    series = series * u + 1.0 / 24.0
    series = series * u + 1.0 / 6.0
    return series * u + 0.5


@triton.jit
def divergence_kernel(
    student_ptr,  # [N, C], rows student_stride apart, as teacher_ptr
    teacher_ptr,
    divergence_ptr,  # [N] float64: T^2 / N KL of each row
    statistics_ptr,  # [N, 4] float64: m and log s of the student, then the teacher
    C,
    student_stride,
    teacher_stride,
    temperature: tl.float64,
    N,
    STAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lane = tl.arange(0, BLOCK)
    lowest: tl.constexpr = -1.7e308 if tl.float64 == STAT else -3.4e38
    top_a = tl.full([BLOCK], lowest, STAT)
    top_b = tl.full([BLOCK], lowest, STAT)
    sum_a = tl.zeros([BLOCK], STAT)
    sum_b = tl.zeros([BLOCK], STAT)
    for start in range(0, C, BLOCK):
        inside = start + lane < C
        a = tl.load(student_ptr + start + lane, mask=inside, other=lowest).to(STAT)
        b = tl.load(teacher_ptr + start + lane, mask=inside, other=lowest).to(STAT)
        top_a, sum_a = lane_softmax(a, inside, top_a, sum_a, temperature, STAT)
        top_b, sum_b = lane_softmax(b, inside, top_b, sum_b, temperature, STAT)
    m_a, s_a = merged_softmax(top_a, sum_a, temperature)
    m_b, s_b = merged_softmax(top_b, sum_b, temperature)
    log_a, log_b = tl.log(s_a), tl.log(s_b)
    high = (log_b - log_a).to(STAT)
    low = (log_b - log_a - high.to(tl.float64)).to(STAT)
    over_a, over_b = (1.0 / s_a).to(STAT), (1.0 / s_b).to(STAT)

    total = tl.zeros([BLOCK], STAT)
    for start in range(0, C, BLOCK):
        inside = start + lane < C
        x_a = tl.load(student_ptr + start + lane, mask=inside, other=0.0).to(STAT) - m_a
        x_b = tl.load(teacher_ptr + start + lane, mask=inside, other=0.0).to(STAT) - m_b
        p_s = tl.exp(over_temperature(x_a, 0.0, temperature, STAT)) * over_a
        p_t = tl.exp(over_temperature(x_b, 0.0, temperature, STAT)) * over_b
        u = (over_temperature(x_a, x_b, temperature, STAT) + high) + low
        term = tl.where(tl.abs(u) <= 0.5, p_t * (u * u) * second_order(u), p_s - p_t - p_t * u)
        total += tl.where(inside, term, 0.0)
    scale = temperature * temperature / N
    tl.store(divergence_ptr + row, tl.sum(total.to(tl.float64), 0) * scale)
    statistics_ptr += row * 4
    tl.store(statistics_ptr, m_a.to(tl.float64))
    tl.store(statistics_ptr + 1, log_a)
    tl.store(statistics_ptr + 2, m_b.to(tl.float64))
    tl.store(statistics_ptr + 3, log_b)


@triton.jit
def gradient_kernel(
    grad_ptr,  # a scalar
    student_ptr,  # [N, C], rows student_stride apart, as teacher_ptr
    teacher_ptr,
    statistics_ptr,  # [N, 4] float64
    dstudent_ptr,  # [N, C]
    C,
    student_stride,
    teacher_stride,
    temperature: tl.float64,
    N,
    STAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (C + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    statistics_ptr += row * 4
    m_a, m_b = tl.load(statistics_ptr).to(STAT), tl.load(statistics_ptr + 2).to(STAT)
    factor = tl.load(grad_ptr).to(tl.float64) * (temperature / N)
    scale_a = (factor * tl.exp(-tl.load(statistics_ptr + 1))).to(STAT)
    scale_b = (factor * tl.exp(-tl.load(statistics_ptr + 3))).to(STAT)
    a = tl.load(student_ptr + row * student_stride + c, mask=c < C, other=0.0).to(STAT)
    b = tl.load(teacher_ptr + row * teacher_stride + c, mask=c < C, other=0.0).to(STAT)
    e_a = tl.exp(over_temperature(a, m_a, temperature, STAT))
    e_b = tl.exp(over_temperature(b, m_b, temperature, STAT))
    tl.store(dstudent_ptr + row * C + c, scale_a * e_a - scale_b * e_b, mask=c < C)


def block_of(C: int, largest: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK, and its warps: up to 8 entries a thread, half as many of float64."""
    block = min(largest // (2 if dtype == torch.float64 else 1), max(128, triton.next_power_of_2(C)))
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 256))}


def dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """What values of a dtype are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def distillation_kl_forward(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = dense_rows(student), dense_rows(teacher)
    N, C = student.shape
    divergence = student.new_empty(N, dtype=torch.float64)
    statistics = student.new_empty((N, 4), dtype=torch.float64)
    if N:
        launch(
            divergence_kernel, N, student,
            *(student, teacher, divergence, statistics, C, student.stride(0), teacher.stride(0), temperature, N),
            STAT=wide_type(student.dtype), **block_of(C, FORWARD_BLOCK, student.dtype),
        )  # fmt: skip
    return divergence.sum(dtype=torch.promote_types(student.dtype, torch.float32)), statistics


def distillation_kl_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float
) -> Tensor:
    student, teacher = dense_rows(student), dense_rows(teacher)
    N, C = student.shape
    dstudent = torch.empty((N, C), dtype=student.dtype, device=student.device)
    if N:
        block = block_of(C, BACKWARD_BLOCK, student.dtype)
        launch(
            gradient_kernel, N * triton.cdiv(C, block["BLOCK"]), student,
            *(grad, student, teacher, statistics.contiguous(), dstudent, C),
            *(student.stride(0), teacher.stride(0), temperature, N),
            STAT=wide_type(student.dtype), **block,
        )  # fmt: skip
    return dstudent
