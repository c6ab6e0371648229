"""Triton kernels of the Fourier filter: in the interpreter against the float64 reference, and compiled for GPUs that
need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_fourier_filter_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_lane
from torch import Tensor

from neuraldeps_kernels.ops import fourier_filter as ops
from neuraldeps_kernels.reference import fourier_filter as reference

triton = pytest.importorskip("triton")

from test_triton import ARCHITECTURES, interpreter, resources_of  # noqa: E402

from neuraldeps_kernels.triton import fourier_filter as kernels  # noqa: E402

# Relative l2 error. The interpreter cuts numbers off where a device rounds them to bfloat16: a whole last place.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 5e-4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_right(x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """y, dx and dweight against the reference in float64; x, grad [B, H, W, C]."""
    y = kernels.filter_images(x, torch.full_like(x, torch.nan), weight)
    dx = torch.full_like(x, torch.nan)
    dweight = kernels.filter_gradients(grad, x, dx, weight)
    wide = (x.double(), weight.double())
    want_dx, want_dweight = reference.fourier_filter2d_backward(grad.double(), *wide, "NHWC", "ortho")
    assert relative_error(y, reference.fourier_filter2d(*wide, "NHWC", "ortho")) < TOLERANCE[x.dtype]
    assert relative_error(dx, want_dx) < TOLERANCE[x.dtype]
    assert relative_error(dweight, want_dweight) < TOLERANCE[torch.float32]


# One point; a prime; more than 64 rows; channels beyond one tile, in each dtype.
@interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1, 1), torch.float32),
        ((1, 17, 19, 3), torch.float32),
        ((1, 66, 3, 2), torch.float32),
        *(((2, 4, 6, 35), dtype) for dtype in TOLERANCE),
    ],
    ids=str,
)
def test_interpreted_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, H, W, C = shape
    weight = normal(H, W // 2 + 1, C, 2, seed=2)  # not Hermitian
    assert_right(normal(*shape).to(dtype), weight, normal(*shape, seed=1).to(dtype))


@interpreter
def test_interpreted_kernels_on_other_strides() -> None:
    """Planes, a slice of images, and a gradient of stride 0."""
    weight = normal(6, 3, 5, 2, seed=2)
    planes = normal(2, 5, 6, 4).permute(0, 2, 3, 1)
    assert_right(planes, weight, normal(2, 6, 4, 5, seed=1))
    assert_right(normal(4, 6, 8, 5)[::2, :, ::2], weight, normal(1, 1, 1, 5).expand(2, 6, 4, 5))


@interpreter
def test_interpreted_kernels_of_no_images() -> None:
    empty, weight = torch.empty(0, 6, 4, 5), normal(6, 3, 5, 2)
    assert kernels.filter_images(empty, torch.empty_like(empty), weight).shape == empty.shape
    assert not kernels.filter_gradients(empty, empty, torch.empty_like(empty), weight).any()


@interpreter
def test_interpreted_gradient_repeats_bit_for_bit_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad, weight = normal(5, 4, 6, 3), normal(5, 4, 6, 3, seed=1), normal(4, 4, 3, 2)
    found = []
    for programs in (1, 8, 8):  # one range of images, and two, the last shorter
        monkeypatch.setattr(kernels, "TARGET_PROGRAMS", programs)
        found.append(kernels.filter_gradients(grad, x, torch.empty_like(x), weight))
    assert relative_error(found[0], found[1].double()) < 1e-6
    assert torch.equal(found[1], found[2])


@interpreter
@pytest.mark.parametrize("dense_planes", [False, True], ids=["pixels", "planes"])
@pytest.mark.parametrize("layout", ops.LAYOUTS)
def test_operator_on_cuda_without_a_template(layout: str, dense_planes: bool) -> None:
    """What the operator does for such a CUDA tensor: Triton, the result in the memory format of x."""
    x, grad = (normal(2, 5, 6, 4, seed=seed).permute(0, 2, 3, 1) for seed in (0, 1))
    if not dense_planes:
        x, grad = x.contiguous(), grad.contiguous()
    if layout == "NCHW":
        x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    weight = normal(6, 3, 5, 2, seed=2)
    assert ops._triton_kernels(x, weight, layout) is kernels
    y = ops._filter_on_cuda(x, weight, layout, "ortho")
    dx, dweight = ops._gradients_on_cuda(grad, x, weight, layout, "ortho")
    assert y.stride() == dx.stride() == x.stride()
    wide = (x.double(), weight.double(), layout, "ortho")
    want_dx, want_dweight = reference.fourier_filter2d_backward(grad.double(), *wide)
    for found, expected in ((y, reference.fourier_filter2d(*wide)), (dx, want_dx), (dweight, want_dweight)):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]


def test_what_goes_to_the_reference_on_cuda() -> None:
    """float64, lines of more than 128 points, blocks of channels; its results are those of the reference."""
    for x, weight in [
        (normal(1, 4, 6, 2).double(), normal(4, 4, 2, 2).double()),
        (normal(1, 2, 129, 2), normal(2, 65, 2, 2)),
        (normal(1, 4, 6, 4), normal(4, 4, 2, 2, 2, 2)),
    ]:
        assert ops._triton_kernels(x, weight, "NHWC") is None
        assert torch.equal(
            ops._filter_on_cuda(x, weight, "NHWC", "ortho"), reference.fourier_filter2d(x, weight, "NHWC", "ortho")
        )
        found = ops._gradients_on_cuda(x, x, weight, "NHWC", "ortho")
        expected = reference.fourier_filter2d_backward(x, x, weight, "NHWC", "ortho")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------ compile lane


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Both kernels as launched for the largest of each block of points, which need most; channels a multiple of 16."""
    found: dict[str, dict[str, int]] = {}
    integers = dict.fromkeys(("H", "I", "J", "C", "B", "W", "Wf", "split_images"), "i32")
    strides = {f"{end}_{name}": "i64" for end in ("in", "out") for name in ("batch", "row", "point")}
    pointers = {f"{name}_ptr": "*fp32" for name in ("matrix", "half", "other", "weight", "cos", "sin", "sums")}
    types: dict[str, Any] = integers | strides | pointers | {"image": "i64"}
    for name in ("fp32", "bf16"):
        constants = {"BLOCK_I": 64, "BLOCK_J": kernels.BLOCK_J, "BLOCK_CHANNELS": kernels.ROW_CHANNELS}
        constants |= {"in_channel": 1, "out_channel": 1}
        ends = {"in_ptr": f"*{name}", "out_ptr": "*fp32"}
        found[f"lines {name}"] = resources_of(kernels.lines_kernel, types | ends, constants, arch, num_warps=4)
    for H, gradient in ((16, True), (32, True), (64, True), (64, False), (128, True)):
        constants = {"BLOCK_H": H, "BLOCK_J": kernels.BLOCK_J, "BLOCK_CHANNELS": kernels.COLUMN_CHANNELS}
        constants["GRADIENT"] = gradient
        name = f"columns {H}{' gradient' * gradient}"
        found[name] = resources_of(kernels.columns_kernel, types, constants, arch, **kernels.column_options(H))
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_with_next_to_no_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["spills"] <= 24, (label, used)  # a few addresses of long columns; all others have none
        assert used["shared"] <= 99 * 1024, (label, used)  # what a program may have on every architecture
        assert used["tensor_core"] > 0, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
