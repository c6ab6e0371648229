"""Triton kernels of the distillation loss: in the interpreter against the float64 reference, and compiled for GPUs that
need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_distillation_kl_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import triton_lane

from neuraldeps_kernels.ops import distillation_kl as ops
from neuraldeps_kernels.reference import distillation_kl as reference

triton = pytest.importorskip("triton")

from test_distillation_kl import GRADIENT_LIMIT, laid_out, logits, oracle  # noqa: E402
from test_triton import ARCHITECTURES, interpreter, resources_of  # noqa: E402

from neuraldeps_kernels.triton import distillation_kl as kernels  # noqa: E402

_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


# One class; few; several blocks and a tail.
@interpreter
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
@pytest.mark.parametrize("dtype", _TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (4, 77), (2, 700)], ids=str)
def test_interpreted_kernels(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSKD check 1."""
    monkeypatch.setattr(kernels, "FORWARD_BLOCK", 256)
    monkeypatch.setattr(kernels, "BACKWARD_BLOCK", 128)
    for temperature in (1.0, 6.0):
        student, teacher = (laid_out(logits(shape, seed, dtype), layout) for seed in (0, 1))
        loss, statistics = kernels.distillation_kl_forward(student, teacher, temperature)
        want, gradient = oracle(student, teacher, temperature)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert abs(float(loss) - float(want)) <= (1e-13 if dtype == torch.float64 else 1e-5) * float(want)
        _, expected = reference.distillation_kl_forward(student, teacher, temperature)
        torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=1e-6)
        grad = torch.tensor(3.0)
        found = kernels.distillation_kl_backward(grad, student, teacher, statistics, temperature)
        assert found.dtype == dtype
        # The interpreter cuts numbers off where a device rounds them to bfloat16.
        limit = 3 * temperature * GRADIENT_LIMIT[dtype] * (2 if dtype == torch.bfloat16 else 1)
        torch.testing.assert_close(found.double(), 3 * gradient, rtol=0, atol=limit)


@interpreter
def test_interpreted_extremes() -> None:
    """SSKD check 2: +-1e4; small divergences; equal logits; NaN in one row; no rows."""
    student, teacher = (1e4 * torch.randn(4, 200).sign() for _ in range(2))
    loss, statistics = kernels.distillation_kl_forward(student, teacher, 16.0)
    want, gradient = oracle(student, teacher, 16.0)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    found = kernels.distillation_kl_backward(torch.ones(()), student, teacher, statistics, 16.0)
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=1e-5)
    near = teacher / 1e4 + 1e-3 * torch.randn(4, 200)
    loss, _ = kernels.distillation_kl_forward(near, teacher / 1e4, 2.0)
    assert abs(float(loss) / float(oracle(near, teacher / 1e4, 2.0)[0]) - 1) <= 1e-3
    assert float(kernels.distillation_kl_forward(near, near, 2.0)[0]) == 0.0
    near[1, 3] = torch.nan
    loss, statistics = kernels.distillation_kl_forward(near, teacher / 1e4, 2.0)
    assert loss.isnan()
    found = kernels.distillation_kl_backward(torch.ones(()), near, teacher / 1e4, statistics, 2.0)
    assert torch.equal(found.isnan().any(1), torch.arange(4) == 1)
    loss, statistics = kernels.distillation_kl_forward(near[:0], near[:0], 2.0)
    assert float(loss) == 0.0
    assert kernels.distillation_kl_backward(loss, near[:0], near[:0], statistics, 2.0).shape == (0, 200)


@interpreter
def test_what_a_cuda_tensor_meets() -> None:
    student, teacher = logits((3, 40), 0), logits((3, 40), 1)
    forward = ops._on_cuda("distillation_kl", reference.distillation_kl_forward)
    for found, want in zip(
        forward(student, teacher, 2.0), kernels.distillation_kl_forward(student, teacher, 2.0), strict=True
    ):
        assert torch.equal(found, want)


# ------------------------------------------------------------------------------------------------ compile lane


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Both kernels for 31,423 classes and for few."""
    found: dict[str, dict[str, int]] = {}
    integers = dict.fromkeys(("C", "student_stride", "teacher_stride", "N"), "i32")
    for dtype, name in _TYPES.items():
        pointers = dict.fromkeys(("student_ptr", "teacher_ptr", "dstudent_ptr"), f"*{name}")
        pointers |= dict.fromkeys(("divergence_ptr", "statistics_ptr"), "*fp64") | {"grad_ptr": "*fp32"}
        types = integers | pointers | {"temperature": "fp64"}
        for C in (31_423, 100):
            for kernel, largest in (
                (kernels.divergence_kernel, kernels.FORWARD_BLOCK),
                (kernels.gradient_kernel, kernels.BACKWARD_BLOCK),
            ):
                options = kernels.block_of(C, largest, dtype)
                constants = {"STAT": kernels.wide_type(dtype), "BLOCK": options["BLOCK"]}
                label = f"{kernel.__name__} {name} {C}"
                found[label] = resources_of(kernel, types, constants, arch, num_warps=options["num_warps"])
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] == used["spills"] == 0, (label, used)
        assert used["shared"] <= 48 * 1024, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
