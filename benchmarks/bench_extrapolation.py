"""Knowledge extrapolation on the CPU: the closed-form discriminator, the projected step, principal directions.

Peers of the discriminator: bisection of 60 passes in PyTorch, and our own method, Newton's iteration that climbs to the
root, in PyTorch. Of the step: its definition in PyTorch. Of the directions: torch.linalg.svd. Errors are relative to
float64: of the weights, of the moved codes, of the projector.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Budget, Case, Contender, Recipe, measured_rates
from neuraldeps_kernels.ops.closed_form_discriminator import closed_form_discriminator
from neuraldeps_kernels.ops.projected_step import projected_step
from neuraldeps_kernels.ops.spectrum import principal_directions
from neuraldeps_kernels.reference import closed_form_discriminator as discriminator_reference
from neuraldeps_kernels.reference import projected_step as step_reference

SAMPLES, ETA = 1_000_000, 1.0
STEPS = ((256, 1, 512), (2048, 1, 512), (256, 18, 512))  # [B, L, d]: codes, a million values, w+
RANKS = (1, 4, 16)
GRADIENTS = (18, 256, 512)  # w+: layers, samples, dimensions
GOAL = 3.0  # times the speed of eager PyTorch, for the discriminator and the step
LIMITS = {torch.float32: 2e-5, torch.float64: 1e-10}
PASSES = 60


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    for dtype in (torch.float32, torch.float64):
        name = f"discriminator 1M {_short(dtype)}"
        yield Recipe(name, _recipe(discriminator_case, name, dtype))
    for shape in STEPS:
        for rank in RANKS:
            name = f"projected_step {'x'.join(map(str, shape))} r {rank}"
            yield Recipe(name, _recipe(step_case, name, shape, rank))
    for rank in (1, 8):
        name = f"principal_directions {'x'.join(map(str, GRADIENTS))} r {rank}"
        yield Recipe(name, _recipe(directions_case, name, rank))


def _recipe(case: Callable[..., Case], *arguments: object) -> Callable[[], Case]:
    return lambda: case(*arguments)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ discriminator


def bisected(penalty: Tensor, eta: float, passes: int = PASSES) -> tuple[Tensor, Tensor]:
    """D and w of the JS game: log t is halved `passes` times for mean 1 / expm1(u + t) = 1."""
    u = eta * penalty
    u = u - u.amin()
    low, high = (torch.tensor(t, dtype=u.dtype, device=u.device).log() for t in (1e-6, 0.7))
    for _ in range(passes):
        middle = (low + high) / 2
        above = torch.expm1(u + middle.exp()).reciprocal().mean() > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    w = torch.expm1(u + low.exp()).reciprocal()
    return 1 / (1 + w), w


def newton(penalty: Tensor, eta: float, steps: int = 30) -> tuple[Tensor, Tensor]:
    """D and w of the JS game by the iteration of csrc/torch/closed_form_discriminator.cpp; the host looks at each."""
    u = eta * penalty
    y = torch.exp(u.amin() - u)
    e = 1 - y
    r, tolerance = torch.ones((), dtype=u.dtype, device=u.device), 1e-15 if u.dtype == torch.float64 else 1e-7
    least = max(1 / discriminator_reference.LARGEST_SHARE - 1, 1 / (2 * len(u) - 1))
    for _ in range(steps):
        t = (r + e).reciprocal()
        h = t.mean()
        following = r - (1 / h - (1 + r) / 2) / (t.square().mean() / (h * h) - 0.5)
        following = following.clamp_min(least)
        settled = bool((following - r).abs() <= tolerance * r)
        r = following
        if settled:
            break
    w = y / (r + e)
    return 1 / (1 + w), w


def discriminator_case(name: str, dtype: torch.dtype, samples: int = SAMPLES) -> Case:
    k = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    target = 2.0
    penalty = 0.5 * (k - target).square()
    exact = discriminator_reference.closed_form_discriminator(penalty.double(), ETA, "js")[1]

    def error(found: tuple[Tensor, ...]) -> float:
        return float((found[1].double() - exact).norm() / exact.norm())

    operator = torch.ops.neuraldeps.closed_form_discriminator
    limit = LIMITS[dtype]
    return Case(
        name,
        {"N": samples, "dtype": _short(dtype), "eta": ETA, "game": "js"},
        ours=Contender("ours operator", lambda: operator(penalty, ETA, "js"), 1, error, limit),
        variants=[
            Contender(
                "ours nk.closed_form_discriminator",
                lambda: closed_form_discriminator(k, target, ETA),
                1,
                error,
                limit,
                note="from knowledge",
            )
        ],
        peers=[
            Contender("eager bisection", lambda: bisected(penalty, ETA), 1, error, 1e-3, GOAL, f"{PASSES} passes"),
            Contender("eager Newton", lambda: newton(penalty, ETA), 1, error, 1e-3, GOAL, "our method"),
        ],
        bytes=float(3 * penalty.nbytes),
        rates=measured_rates(1, max(1 << 16, penalty.nbytes), dtype),
    )


# ------------------------------------------------------------------------------------------------ step, directions


def step_case(name: str, shape: tuple[int, int, int], rank: int) -> Case:
    B, L, d = shape
    generator = torch.Generator().manual_seed(0)
    z, gradient, origin = (torch.randn(shape, generator=generator) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(L, d, rank, generator=generator))[0].mT.contiguous()
    a, rho = torch.rand(B, generator=generator), 0.02
    exact = step_reference.projected_step(*(t.double() for t in (z, gradient, basis, a, origin)), rho)

    def error(found: tuple[Tensor, ...]) -> float:
        return max(float((got.double() - want).norm() / want.norm()) for got, want in zip(found, exact, strict=False))

    def ours() -> tuple[Tensor, ...]:
        return projected_step(z, gradient, basis, a, origin=origin, rho=rho)[:2]

    def eager() -> tuple[Tensor, ...]:
        return step_reference.projected_step(z, gradient, basis, a, origin, rho)

    return Case(
        name,
        {"B": B, "L": L, "d": d, "rank": rank, "dtype": "float32"},
        ours=Contender("ours projected_step", ours, 1, error, 2e-6),
        peers=[Contender("eager PyTorch", eager, 1, error, 1e-5, GOAL)],
        bytes=float(5 * z.nbytes + basis.nbytes),
        flops=float(z.numel() * (4 * rank + 5)),
        rates=measured_rates(1, max(1 << 16, z.nbytes), torch.float32),
    )


def directions_case(name: str, rank: int, shape: tuple[int, int, int] = GRADIENTS) -> Case:
    """Gradients with a few strong directions that all samples share."""
    L, M, d = shape
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(L, 8, d, generator=generator) * torch.linspace(4, 1, 8)[:, None]
    rows = torch.randn(L, M, 8, generator=generator) @ shared + torch.randn(shape, generator=generator)
    leading = torch.linalg.svd(rows.double(), full_matrices=False)[2][:, :rank]
    exact = leading.mT @ leading

    def error(U: Tensor) -> float:
        return float((U.double().mT @ U.double() - exact).norm() / exact.norm())

    return Case(
        name,
        {"L": L, "M": M, "d": d, "rank": rank, "dtype": "float32"},
        ours=Contender("ours principal_directions", lambda: principal_directions(rows, rank)[0], L, error, 1e-4),
        peers=[
            Contender(
                "torch.linalg.svd",
                lambda: torch.linalg.svd(rows, full_matrices=False)[2][:, :rank],
                L,
                error,
                1e-3,
            )
        ],
        bytes=float(rows.nbytes / L),
        flops=float(d * min(M, d) * (min(M, d) + 1)) + 4 / 3 * min(M, d) ** 3,
        rates=measured_rates(1, max(1 << 16, rows.nbytes), torch.float64),
    )
