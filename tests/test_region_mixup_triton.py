"""Triton kernels of region-wise mixup: in the interpreter against the float64 reference, and compiled for GPUs that
need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_region_mixup_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_lane

from neuraldeps_kernels.ops import region_mixup as ops
from neuraldeps_kernels.reference import region_mixup as reference

triton = pytest.importorskip("triton")

from test_region_mixup import images, largest_error, ratios  # noqa: E402
from test_triton import ARCHITECTURES, interpreter, resources_of  # noqa: E402

from neuraldeps_kernels.triton import region_mixup as kernels  # noqa: E402

# The interpreter cuts numbers off where a device rounds them to bfloat16: a whole last place.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


# Stripes in each dtype; a grid that divides nothing; a pixel a region; more pixels in a region than a program takes.
@interpreter
@pytest.mark.parametrize("soft", [0, 3])
@pytest.mark.parametrize(
    ("shape", "regions", "dtype", "last"),
    [
        *(((2, 3, 12, 4), (3,), dtype, False) for dtype in TOLERANCE),
        ((1, 2, 7, 13), (2, 3), torch.float32, True),
        ((1, 1, 3, 2), (3, 2), torch.float32, False),
        ((1, 2, 50, 52), (2,), torch.float32, True),
    ],
    ids=str,
)
def test_interpreted_kernels(
    shape: tuple[int, ...], regions: tuple[int, ...], dtype: torch.dtype, last: bool, soft: int
) -> None:
    soft = min(soft, *(n // R for n, R in zip(shape[2:], regions, strict=False)))
    x_v, x_i, grad = images(shape, dtype, 0, last), images(shape, dtype, 1), images(shape, dtype, 2)
    ratio = ratios((shape[0], *regions))
    mixed = kernels.region_mixup(x_v, x_i, ratio, soft)
    wide = [t.double() for t in (grad, x_v, x_i, ratio)]
    assert mixed.stride() == x_v.stride()
    assert largest_error(mixed, reference.region_mixup(*wide[1:], soft=soft)) < TOLERANCE[dtype]
    want = reference.region_mixup_backward(*wide, soft, True, True)
    for asked in ((True, True),) if soft else ((True, True), (True, False), (False, True)):
        found = kernels.region_mixup_backward(grad, x_v, x_i, ratio, soft, *asked)
        for k, on in enumerate((asked[0], asked[0], asked[1])):
            if not on:
                assert found[k].numel() == 0
                continue
            assert found[k].shape == want[k].shape
            assert largest_error(found[k], want[k]) < (TOLERANCE[dtype] if k < 2 else 3e-6)


@interpreter
@pytest.mark.parametrize("soft", [0, 2])
def test_interpreted_ends_are_the_parents_bit_for_bit(soft: int) -> None:
    """Check 1; and within the parents elsewhere."""
    x_v, x_i = images((2, 2, 6, 5)), images((2, 2, 6, 5), seed=1)
    x_v[0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, -0.0])
    for value, parent in ((1.0, x_v), (0.0, x_i)):
        mixed = kernels.region_mixup(x_v, x_i, torch.full((2, 3), value), soft)
        assert torch.equal(mixed.view(torch.int32), parent.view(torch.int32))
    x_v = images((2, 2, 6, 5))
    mixed = kernels.region_mixup(x_v, x_i, ratios((2, 3)), soft)
    assert bool((mixed >= torch.minimum(x_v, x_i)).all() & (mixed <= torch.maximum(x_v, x_i)).all())


@interpreter
def test_interpreted_ratios_that_are_none() -> None:
    ratio = torch.tensor([[1.5, torch.nan, -0.1, 0.5]])
    mixed = kernels.region_mixup(torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), ratio, 0)
    assert mixed[0, 0, :, 0].isnan().tolist() == [True, True, True, False]


@interpreter
def test_interpreted_strides_and_nothing_at_all() -> None:
    base = images((4, 6, 8, 10))
    x_v, x_i, ratio = base[::2, ::2, :, ::2], base[1::2, 1::2, :, 1::2], ratios((3, 2)).T
    wide = [t.double() for t in (x_v, x_i, ratio)]
    assert largest_error(kernels.region_mixup(x_v, x_i, ratio, 0), reference.region_mixup(*wide)) < 3e-7
    grad = torch.ones(1).expand(x_v.shape)
    want = reference.region_mixup_backward(grad.double(), *wide, 0, True, True)
    found = kernels.region_mixup_backward(grad, x_v, x_i, ratio, 0, True, True)
    assert all(largest_error(a, b) < 3e-6 for a, b in zip(found, want, strict=True))
    empty, none = torch.empty(0, 3, 6, 4), torch.empty(0, 2)
    assert kernels.region_mixup(empty, empty, none, 0).shape == empty.shape
    assert kernels.region_mixup_backward(empty, empty, empty, none, 0, True, True)[2].shape == none.shape


def test_what_goes_to_the_reference_on_cuda() -> None:
    """float64; its results are those of the reference in the layout of x_v."""
    x_v, x_i = images((2, 3, 6, 4), torch.float64, last=True), images((2, 3, 6, 4), torch.float64, 1)
    ratio, grad = ratios((2, 3), torch.float64), images((2, 3, 6, 4), torch.float64, 2)
    assert ops._triton_kernels(x_v) is None
    assert ops._triton_kernels(x_v.float()) is kernels
    mixed = ops._on_cuda("region_mixup")(x_v, x_i, ratio, 1)
    assert torch.equal(mixed, reference.region_mixup(x_v, x_i, ratio, soft=1))
    found = ops._on_cuda("region_mixup_backward")(grad, x_v, x_i, ratio, 1, True, True)
    expected = reference.region_mixup_backward(grad, x_v, x_i, ratio, 1, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert mixed.stride() == found[0].stride() == x_v.stride()


# ------------------------------------------------------------------------------------------------ compile lane


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Both kernels, of contiguous images (step 1)."""
    integers = dict.fromkeys(("C", "H", "W", "Rh", "Rw", "soft", "parts", "channel"), "i32")
    found: dict[str, dict[str, int]] = {}
    for name in ("fp32", "bf16"):
        pointers = dict.fromkeys((f"{end}_ptr" for end in ("v", "i", "out", "grad", "dv", "di")), f"*{name}")
        types: dict[str, Any] = integers | pointers | {"ratio_ptr": "*fp32", "sums_ptr": "*fp32"}
        for soft in (0, 2):
            constants: dict[str, Any] = {"step": 1, "SOFT": soft > 1, "BLOCK": kernels.BLOCK}
            label, warps = f"{name} soft {soft}", kernels.warps_of(soft)
            found[f"mix {label}"] = resources_of(kernels.mix_kernel, types, constants, arch, num_warps=warps)
            constants |= {"IMAGES": True, "RATIOS": True}
            found[f"gradient {label}"] = resources_of(kernels.gradient_kernel, types, constants, arch, num_warps=warps)
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_with_next_to_no_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] <= 16, (label, used)  # a few addresses
        assert used["shared"] <= 48 * 1024, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
