"""Singular values, their gradient and ranks of batches on the CPU against torch.linalg: microseconds a matrix.

Matrices have k/3 singular values from 1 to 10^-1.5 and the rest up to 1e-4; with gradients they are normal, as torch's
own gradient is inaccurate beside small values. Errors are over the largest singular value of the float64 SVD of the
same input, those of ranks the share of wrong ones at the tolerances 1e-2 .. 1e-7.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Budget, Case, Contender, Recipe, measured_rates
from neuraldeps_kernels.ops.spectrum import matrix_rank, svdvals

# (batch, m, n): the square ones of GOALS.md, tall, wide, larger than the lanes serve, and one matrix alone.
SHAPES = [
    (512, 16, 16),
    (256, 32, 32),
    (128, 64, 64),
    (64, 128, 128),
    (16, 256, 256),
    (64, 256, 64),
    (256, 196, 32),
    (32, 128, 512),
    (4, 512, 512),
    (1, 64, 64),
    (1, 256, 256),
]
SQUARE = 5  # the first of them have goals
TOLERANCES = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7], dtype=torch.float64)
GOALS = {"rank": 4.0, "values": 1.5, "gradient": 1.5}
LIMITS = {torch.float32: 5e-7, torch.float64: 1e-13}
# torch's float32 values miss our limit on some matrices; they are timed at what they reach.
PEER_LIMIT = {torch.float32: 5e-6, torch.float64: 1e-13}
GRADIENT_LIMIT = 1e-4  # ours; torch in float32 is refused beyond 0.1 only


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Ranks, values, values with gradient; float32, then float64 up to 128."""
    for dtype in (torch.float32, torch.float64):
        for index, shape in enumerate(SHAPES):
            if dtype == torch.float64 and min(shape[1:]) > 128:
                continue
            for job in (_rank_case, _values_case, _gradient_case):
                name = f"{job.__name__.split('_')[1]} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                goal = GOALS[name.split()[0]] if index < SQUARE and dtype == torch.float32 else None
                yield Recipe(f"spectrum {name}", _recipe(job, f"spectrum {name}", shape, dtype, goal))


def _recipe(
    job: Callable[..., Case], name: str, shape: tuple[int, int, int], dtype: torch.dtype, goal: float | None
) -> Callable[[], Case]:
    return lambda: job(name, shape, dtype, goal)


def matrices(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """[B, m, n]: k/3 values from 1 to 10^-1.5, the others up to 1e-4."""
    B, m, n = shape
    k, generator = min(m, n), torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(B, s, k, generator=generator, dtype=torch.float64))[0] for s in (m, n))
    values = 1e-4 * torch.rand(B, k, generator=generator, dtype=torch.float64)
    values[:, : k // 3] = torch.logspace(0, -1.5, k // 3, dtype=torch.float64)
    return ((u * values[:, None]) @ v.mT).to(dtype)


def _case(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, ours: Contender, peer: Contender, flops: float
) -> Case:
    B, m, n = shape
    a_bytes = float(m * n * dtype.itemsize)
    rates = measured_rates(1, max(1 << 16, int(B * a_bytes)), torch.float64)
    parameters = {"B": B, "m": m, "n": n, "dtype": str(dtype).removeprefix("torch.")}
    return Case(name, parameters, ours=ours, peers=[peer], bytes=a_bytes, flops=flops, rates=rates)


def _rank_case(name: str, shape: tuple[int, int, int], dtype: torch.dtype, goal: float | None) -> Case:
    """One tolerance, 1e-3, timed; all of TOLERANCES checked."""
    a = matrices(shape, dtype)
    exact = torch.linalg.svdvals(a.double())
    want = (exact[:, None, :] > TOLERANCES[:, None] * exact[:, :1, None]).sum(-1)  # [B, R]
    rtol = float(TOLERANCES[1])

    def wrong(rank: Tensor) -> float:
        every = matrix_rank(a, rtol=TOLERANCES)
        return float((every != want).double().mean() + (rank != want[:, 1]).double().mean())

    def wrong_of_torch(rank: Tensor) -> float:
        return float((rank != want[:, 1]).double().mean())

    ours = Contender("ours matrix_rank", lambda: matrix_rank(a, rtol=rtol), len(a), wrong, 0.0)
    theirs = Contender(
        "torch.linalg.matrix_rank", lambda: torch.linalg.matrix_rank(a, rtol=rtol), len(a), wrong_of_torch, 0.01, goal
    )
    return _case(name, shape, dtype, ours, theirs, _gram_flops(shape))


def _values_case(name: str, shape: tuple[int, int, int], dtype: torch.dtype, goal: float | None) -> Case:
    a = matrices(shape, dtype)
    exact = torch.linalg.svdvals(a.double())

    def error(values: Tensor) -> float:
        return float(((values.double() - exact).abs() / exact[:, :1]).max())

    ours = Contender("ours svdvals", lambda: svdvals(a), len(a), error, LIMITS[dtype])
    theirs = Contender("torch.linalg.svdvals", lambda: torch.linalg.svdvals(a), len(a), error, PEER_LIMIT[dtype], goal)
    return _case(name, shape, dtype, ours, theirs, _gram_flops(shape))


def _gradient_case(name: str, shape: tuple[int, int, int], dtype: torch.dtype, goal: float | None) -> Case:
    """Values and the gradient of a weighted sum of them."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(shape[0], min(shape[1:]), generator=generator, dtype=torch.float64).to(dtype)
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    exact = (u * weight.double()[:, None]) @ vh

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            leaf = a.detach().requires_grad_()
            function(leaf).backward(weight)
            assert leaf.grad is not None
            return leaf.grad

        return run

    def error(gradient: Tensor) -> float:
        return float((gradient.double() - exact).abs().max())

    ours = Contender("ours svdvals", step(svdvals), len(a), error, GRADIENT_LIMIT)
    theirs = Contender("torch.linalg.svdvals", step(torch.linalg.svdvals), len(a), error, 0.1, goal)
    return _case(name, shape, dtype, ours, theirs, _gram_flops(shape))


def _gram_flops(shape: tuple[int, int, int]) -> float:
    """Of the symmetric Gram matrix of the shorter side and its tridiagonal form."""
    k, longer = min(shape[1:]), max(shape[1:])
    return float(longer * k * (k + 1)) + 4 / 3 * k**3
