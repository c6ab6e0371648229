"""Triton kernels of knowledge extrapolation: in the interpreter against the float64 reference, and compiled for GPUs
that need not be there (marker `compile`); the two lanes cannot share a process.

`python tests/test_extrapolation_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton_lane
from torch import Tensor

from neuraldeps_kernels.reference import closed_form_discriminator as discriminator_reference
from neuraldeps_kernels.reference import projected_step as step_reference

pytest.importorskip("triton")

from neuraldeps_kernels.triton import closed_form_discriminator as discriminator
from neuraldeps_kernels.triton import projected_step as step

interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
WIDE = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def penalties(N: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(N)
    return (0.5 * (torch.randn(N, generator=generator, dtype=torch.float64) - 2).square()).to(dtype)


@interpreter
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("N", [1, 1000])  # one sample; several blocks a program, the last in part
def test_discriminator(N: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminator, "PROGRAMS", 4)
    monkeypatch.setattr(discriminator, "BLOCK", 64)
    loss = penalties(N, dtype)
    for game in ("js", "kl"):
        for eta in (0.1, 100.0):
            D, w, c = discriminator.closed_form_discriminator(loss, eta, game)
            want_D, want_w, want_c = discriminator_reference.closed_form_discriminator(loss.double(), eta, game)
            assert D.dtype == w.dtype == dtype
            torch.testing.assert_close(w.double(), want_w, rtol=0, atol=TOLERANCE[dtype] * float(want_w.max()))
            torch.testing.assert_close(D.double(), want_D, rtol=0, atol=TOLERANCE[dtype])
            torch.testing.assert_close(c, want_c, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@interpreter
def test_discriminator_of_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminator, "PROGRAMS", 2)
    monkeypatch.setattr(discriminator, "BLOCK", 16)
    loss = penalties(20, torch.float32)
    loss[3] = torch.inf
    for game in ("js", "kl"):
        D, w, _ = discriminator.closed_form_discriminator(loss, 1.0, game)
        assert w[3] == 0
        assert D[3] == 1
        assert w.isfinite().all()
        for value in discriminator.closed_form_discriminator(loss.index_fill(0, torch.tensor(5), torch.nan), 1.0, game):
            assert value.isnan().all()


@interpreter
@pytest.mark.parametrize("dtype", WIDE, ids=str)
# rank 0, 1, below and beyond the least block; one code and part of a block; d below and beyond a block
@pytest.mark.parametrize(("B", "L", "R", "d"), [(1, 1, 1, 8), (19, 3, 5, 70), (16, 1, 17, 64), (3, 2, 0, 5)], ids=str)
def test_projected_step(B: int, L: int, R: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z, g, origin = (torch.randn(B, L, d, generator=generator, dtype=torch.float64) for _ in range(3))
    basis = torch.linalg.qr(torch.randn(L, d, max(R, 1), generator=generator, dtype=torch.float64))[0].mT[:, :R]
    a = torch.rand(B, generator=generator, dtype=torch.float64)
    values = [value.to(dtype) for value in (z, g, basis, a)]
    for start, rho in ((None, 0.0), (origin.to(dtype), 0.3)):
        got = step.projected_step(*values, start, rho)
        wide = [None if value is None else value.double() for value in (*values, start)]
        for value, want in zip(got, step_reference.projected_step(*wide, rho), strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=4 * TOLERANCE[dtype])


def launches() -> dict[str, triton_lane.Launch]:
    """One of each kind of launch, by label."""
    found: dict[str, triton_lane.Launch] = {}
    for dtype in WIDE:
        loss, z = torch.empty(1 << 16, dtype=dtype), torch.empty(256, 18, 512, dtype=dtype)
        basis = torch.empty(18, 4, 512, dtype=dtype)
        made = triton_lane.launches_of(step, partial(step.projected_step, z, z, basis, z[:, 0, 0], z, 0.1))
        for game in ("js", "kl"):
            solve = partial(discriminator.closed_form_discriminator, loss, 1.0, game)
            made += triton_lane.launches_of(discriminator, solve)
        found |= {f"{launch[0].__name__} {dtype} {launch[1][-3:]}": launch for launch in made}
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", triton_lane.ARCHITECTURES)
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    used = triton_lane.resources(__file__, arch, tmp_path)
    for label, values in used.items():
        assert values["stack"] <= 8, (label, values)  # two registers
        assert values["atomics"] == 0, (label, values)
        assert values["shared"] <= 96 * 1024, (label, values)
        assert values["registers"] * values["threads"] <= 65536, (label, values)
    assert {label.split()[0] for label in used} == {
        "tilt_kernel",
        "sums_kernel",
        "finish_kernel",
        "projected_step_kernel",
    }
    assert all(
        values["products"] for label, values in used.items() if label.startswith("projected_step_kernel torch.float32")
    )


if __name__ == "__main__":
    triton_lane.print_compiled(launches(), int(sys.argv[1]))
