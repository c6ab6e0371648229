"""Triton kernels of pose-weighted pooling: in the interpreter against the float64 reference, and compiled for GPUs that
need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_pose_weighted_pool_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_lane

from neuraldeps_kernels.ops import pose_weighted_pool as ops
from neuraldeps_kernels.reference import pose_weighted_pool as reference

triton = pytest.importorskip("triton")

from test_pose_weighted_pool import largest_error, normal, positive  # noqa: E402
from test_triton import ARCHITECTURES, interpreter, resources_of  # noqa: E402

from neuraldeps_kernels.triton import pose_weighted_pool as kernels  # noqa: E402

# The interpreter cuts numbers off where a device rounds them to bfloat16: a whole last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


# One map; part of a block of channels in each dtype; two blocks, and positions beyond one; more maps than 16.
@interpreter
@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize(
    ("shape", "K", "dtype", "last"),
    [
        ((1, 1, 2, 1), 1, torch.float32, False),
        *(((2, 20, 8, 4), 5, dtype, False) for dtype in TOLERANCE),
        ((2, 70, 9, 8), 3, torch.float32, True),
        ((1, 37, 3, 5), 17, torch.float32, True),
    ],
    ids=str,
)
def test_interpreted_kernels(shape: tuple[int, ...], K: int, dtype: torch.dtype, last: bool, groups: bool) -> None:
    features, maps = normal(shape, dtype, 0, last), positive((shape[0], K, *shape[2:]))
    pooled = kernels.pose_weighted_pool(features, maps, groups, 1e-6)
    grad = normal(tuple(pooled.shape), dtype, 2)
    wide = features.double(), maps.double()
    assert largest_error(pooled, reference.pose_weighted_pool(*wide, groups=groups)) < TOLERANCE[dtype]
    want = reference.pose_weighted_pool_backward(grad.double(), *wide, groups, 1e-6, True, True)
    for asked in ((True, True), (True, False), (False, True)):
        found = kernels.pose_weighted_pool_backward(grad, features, maps, groups, 1e-6, *asked)
        for k, on in enumerate(asked):
            if on:
                assert largest_error(found[k], want[k]) < TOLERANCE[dtype if k == 0 else torch.float32]
            else:
                assert found[k].numel() == 0
        assert not asked[0] or found[0].stride() == features.stride()


@interpreter
def test_interpreted_groups_are_blocks_of_the_whole() -> None:
    """Check 4."""
    features, maps = normal((2, 23, 4, 4)), positive((2, 4, 4, 4))
    whole = kernels.pose_weighted_pool(features, maps, False, 1e-6)
    group = reference.group_of_channel(23, 4, features.device)
    by_group = kernels.pose_weighted_pool(features, maps, True, 1e-6)
    assert torch.equal(by_group, whole[:, group, torch.arange(23)])


@interpreter
def test_interpreted_zero_maps_strides_and_nothing_at_all() -> None:
    """Check 2: a zero map gives exactly 0 and no gradient."""
    features, maps = normal((4, 12, 8, 8))[:, ::2, :, ::2], positive((2, 4, 8, 4)).transpose(0, 1)
    maps[:, 1] = 0
    pooled = kernels.pose_weighted_pool(features, maps, False, 1e-6)
    assert largest_error(pooled, reference.pose_weighted_pool(features.double(), maps.double())) < 2e-6
    assert not pooled[:, 1].any()
    grad = torch.zeros(4, 2, 6)
    grad[:, 1] = 1
    assert not kernels.pose_weighted_pool_backward(grad, features, maps, False, 1e-6, True, False)[0].any()
    for N, C, K, h in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        features, maps = torch.ones(N, C, h, 2), torch.ones(N, K, h, 2)
        pooled = kernels.pose_weighted_pool(features, maps, False, 1e-6)
        assert pooled.shape == (N, K, C)
        assert not pooled.any()
        dF, dH = kernels.pose_weighted_pool_backward(pooled, features, maps, False, 1e-6, True, True)
        assert (dF.shape, dH.shape) == (features.shape, maps.shape)
        assert not dF.any()
        assert not dH.any()


def test_what_goes_to_the_reference_on_cuda() -> None:
    """float64 and very many maps; its results are those of the reference, in the layout of the features."""
    features, maps = normal((2, 6, 4, 3), torch.float64, last=True), positive((2, 2, 4, 3), torch.float64)
    assert ops._triton_kernels(features, maps) is None
    assert ops._triton_kernels(features.float(), positive((2, 33, 4, 3))) is None
    assert ops._triton_kernels(features.float(), maps.float()) is kernels
    for groups in (False, True):
        pooled = ops._on_cuda("pose_weighted_pool", 0)(features, maps, groups, 1e-6)
        assert torch.equal(pooled, reference.pose_weighted_pool(features, maps, groups=groups))
        arguments = (torch.ones_like(pooled), features, maps, groups, 1e-6, True, True)
        found = ops._on_cuda("pose_weighted_pool_backward", 1)(*arguments)
        expected = reference.pose_weighted_pool_backward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].stride() == features.stride()


# ------------------------------------------------------------------------------------------------ compile lane


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Both kernels for 16 x 8 positions: up to 16 maps in both layouts, and 32 maps in groups."""
    found: dict[str, dict[str, int]] = {}
    integers = dict.fromkeys(("C", "S", "K", "channel", "position"), "i32") | {"eps": "fp32"}
    for name in ("fp32", "bf16"):
        pointers = dict.fromkeys(("features_ptr", "pooled_ptr", "grad_ptr", "dfeatures_ptr"), f"*{name}")
        types: dict[str, Any] = integers | pointers
        types |= dict.fromkeys(("maps_ptr", "divisor_ptr", "partial_ptr"), "*fp32")
        for K, unit in ((5, "position"), (5, "channel"), (32, "position"))[: 3 if name == "fp32" else 1]:
            blocks = kernels.blocks_of(K)
            options = {"num_warps": blocks.pop("num_warps")}
            constants: dict[str, Any] = {unit: 1, "GROUPS": K > 16, **blocks}
            label = f"{name} K{K} {unit}"
            found[f"pool {label}"] = resources_of(kernels.pool_kernel, types, constants, arch, **options)
            constants |= {"FEATURES": True, "MAPS": True}
            found[f"gradient {label}"] = resources_of(kernels.gradient_kernel, types, constants, arch, **options)
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_with_next_to_no_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] <= 8, (label, used)  # two registers
        assert used["shared"] <= 99 * 1024, (label, used)  # what a program may have on every architecture
        assert used["tensor_core"] > 0, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
