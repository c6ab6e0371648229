"""The projected step against float64 PyTorch and the algebra of projections."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuraldeps_kernels.ops.projected_step import projected_step
from neuraldeps_kernels.reference import projected_step as reference

OPERATOR = torch.ops.neuraldeps.projected_step
WIDE = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(B: int, L: int, R: int, d: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(B + L + R + d)
    z, gradient, origin = (torch.randn(B, L, d, generator=generator, dtype=torch.float64) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(L, d, max(R, 1), generator=generator, dtype=torch.float64))[0].mT[:, :R]
    step = torch.rand(B, generator=generator, dtype=torch.float64)
    values = {"z": z, "gradient": gradient, "basis": basis, "step": step, "origin": origin}
    return {name: value.to(dtype) for name, value in values.items()}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(
    ("B", "L", "R", "d"),
    # no direction; one; below, at and beyond four at a time; d below, at and beyond vectors and runs; layers; nothing
    [(3, 1, 0, 8), (5, 1, 1, 16), (4, 2, 3, 37), (7, 18, 4, 64), (2, 1, 9, 1031), (1, 1, 3, 3), (0, 2, 1, 5)],
    ids=str,
)
def test_matches_float64(B: int, L: int, R: int, d: int, dtype: torch.dtype) -> None:
    values = problem(B, L, R, d, dtype)
    wide = {name: value.double() for name, value in values.items()}
    for rho in (0.0, 0.3):
        origin = {} if rho == 0 else {"origin": values["origin"]}
        moved, p, squares = projected_step(
            values["z"], values["gradient"], values["basis"], values["step"], rho=rho, **origin
        )
        want = reference.projected_step(*(wide[name] for name in ("z", "gradient", "basis", "step", "origin")), rho)
        assert moved.dtype == p.dtype == squares.dtype == dtype
        torch.testing.assert_close(moved.double(), want[0], rtol=0, atol=4 * TOLERANCE[dtype])
        torch.testing.assert_close(p.double(), want[1], rtol=0, atol=4 * TOLERANCE[dtype])
        torch.testing.assert_close(squares.double(), want[2].sum(1), rtol=4 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_algebra() -> None:
    """p is in the subspace, h - p orthogonal to it; a full basis gives the plain gradient step."""
    values = problem(6, 1, 4, 30)
    z, g, step = values["z"][:, 0], values["gradient"][:, 0], values["step"]
    basis = values["basis"][0]
    moved, p, squares = projected_step(z, g, basis, step)
    torch.testing.assert_close(p @ basis.mT @ basis, p)
    torch.testing.assert_close((g - p) @ basis.mT, torch.zeros(6, 4, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(squares, p.square().sum(1))
    torch.testing.assert_close((moved - z) / -step[:, None], p)
    everything = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    torch.testing.assert_close(projected_step(z, g, everything, 0.5)[0], z - 0.5 * g)


def test_levels_and_threads_agree(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = """
import torch, neuraldeps_kernels
from neuraldeps_kernels.reference import projected_step as reference
generator = torch.Generator().manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
    z, g, o = (torch.randn(33, 3, 133, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    U = torch.randn(3, 6, 133, generator=generator, dtype=torch.float64).to(dtype) / 12
    a = torch.rand(33, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.ops.neuraldeps.projected_step(z, g, U, a, o, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    wide = [value.double() for value in (z, g, U, a, o)]
    for value, exact in zip(results[0], reference.projected_step(*wide, 0.1)):
        assert float((value.double() - exact).abs().max()) <= tolerance
"""
    for level in cpu_levels:
        result = run_python(code, NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, (level, result.stderr)


def test_gradients_and_rules() -> None:
    values = [value.requires_grad_() for value in problem(3, 2, 2, 5).values()]
    z, gradient, basis, step, origin = values

    def run(z: Tensor, gradient: Tensor, basis: Tensor, step: Tensor, origin: Tensor | None, rho: float) -> Any:
        return OPERATOR(z, gradient, basis, step, origin, rho)

    assert torch.autograd.gradcheck(lambda *v: run(*v, 0.4), tuple(values))
    assert torch.autograd.gradcheck(lambda *v: run(*v, None, 0.0), (z, gradient, basis, step))
    torch.library.opcheck(OPERATOR, (z, gradient, basis, step, origin, 0.4))
    torch.library.opcheck(OPERATOR, (z, gradient, basis, step, None, 0.0))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"z": torch.zeros(3)}, ValueError, r"z must be \[B, d\]"),
        ({"z": torch.zeros(3, 5, dtype=torch.bfloat16)}, TypeError, "z must be a float32"),
        ({"gradient": torch.zeros(3, 4)}, ValueError, "gradient must be"),
        ({"gradient": torch.zeros(3, 5).double()}, ValueError, "gradient must be"),
        ({"basis": torch.zeros(1, 2, 5)}, ValueError, "basis must be"),
        ({"basis": torch.zeros(2, 4)}, ValueError, "basis must be"),
        ({"origin": torch.zeros(1, 5)}, ValueError, "origin must be"),
        ({"rho": 0.1}, ValueError, "rho must be"),
        ({"rho": float("nan"), "origin": torch.zeros(3, 5)}, ValueError, "rho must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    values: dict[str, Any] = {
        "z": torch.zeros(3, 5),
        "gradient": torch.zeros(3, 5),
        "basis": torch.zeros(2, 5),
        "step": 1.0,
    }
    with pytest.raises(error, match=match):
        projected_step(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_on_a_device(dtype: torch.dtype) -> None:
    for sizes in ((256, 18, 4, 512), (19, 1, 17, 70), (3, 2, 0, 5)):
        values = problem(*sizes, dtype)
        wide = [value.double() for value in values.values()]
        got = OPERATOR(*(value.cuda() for value in values.values()), 0.3)
        for value, want in zip(got, reference.projected_step(*wide, 0.3), strict=True):
            torch.testing.assert_close(
                value.cpu().double(), want, rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 1e-12
            )


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """Both kernels of knowledge extrapolation."""
    kernels = ("closed_form_discriminator.cpp", "projected_step.cpp")
    assert_sanitized("extrapolation_sanitizer_driver.cpp", *kernels)
