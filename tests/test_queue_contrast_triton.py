"""Triton kernels of the queue contrast: in the interpreter against both [N, K] matrices in float64, and compiled for
GPUs that need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_queue_contrast_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_lane

from neuraldeps_kernels.ops import queue_contrast as ops
from neuraldeps_kernels.reference import queue_contrast as reference

triton = pytest.importorskip("triton")

from test_queue_contrast import assert_relative, oracle, unit  # noqa: E402
from test_triton import ARCHITECTURES, interpreter, resources_of  # noqa: E402

from neuraldeps_kernels.triton import queue_contrast as kernels  # noqa: E402

_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


# One row; less than a block of each; several blocks of rows and slabs, with tails; wide rows.
@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 17, 2), (5, 30, 8), (40, 200, 20), (3, 90, 100)], ids=str)
def test_interpreted_kernels(size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks 1 and 2; `dtype` of the queue."""
    monkeypatch.setattr(kernels, "MIN_SLAB_ROWS", 64)
    N, K, d = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, o = (unit(N, d, seed, wide) for seed in range(3))
    queue = unit(K, d, 3, dtype)
    found = kernels.queue_contrast_forward(q, k, queue, o, 0.1, 0.07, True)
    for got, want in zip(found, oracle(q, k, queue, o), strict=True):
        assert got.dtype == wide
        assert_relative(got, want, 1e-12 if dtype == torch.float64 else 1e-5)
    values = kernels.queue_contrast_forward(q, k, queue, o, 0.1, 0.07, False)
    assert torch.equal(values[0], found[0])
    assert torch.equal(values[1], found[1])
    assert values[2].numel() == values[3].numel() == 0
    alone = kernels.queue_contrast_forward(q, k, queue, None, 0.1, 0.07, True)
    assert torch.equal(alone[0], found[0])
    assert torch.equal(alone[2], found[2])
    assert float(alone[1]) == alone[3].numel() == 0
    same = kernels.queue_contrast_forward(q, k, queue, q, 0.1, 0.1, True)
    assert 0 <= float(same[1]) <= 1e-6
    assert float(same[3].abs().max()) <= 1e-6


@interpreter
def test_interpreted_extremes() -> None:
    """Check 1: logits of +-1e4; NaN in one row."""
    q, k, o = (31.6 * unit(5, 16, seed) for seed in range(3))
    queue = torch.cat([31.6 * unit(100, 16, 3), -q, q])
    found = kernels.queue_contrast_forward(q, k, queue, o, 0.1, 0.07, True)
    for i, (got, want) in enumerate(zip(found, oracle(q, k, queue, o), strict=True)):
        assert_relative(got, want, 1e-5 if i < 2 else 1e-3)
    q[2, 3] = torch.nan
    found = kernels.queue_contrast_forward(q, k, queue, o, 0.1, 0.07, True)
    assert found[0].isnan()
    assert found[1].isnan()
    for gradient in found[2:]:
        assert torch.equal(gradient.isnan().any(1), torch.arange(5) == 2)


@interpreter
@pytest.mark.parametrize("size", [(3, 0, 5), (0, 9, 5), (2, 9, 130)], ids=str)
def test_what_goes_to_the_reference_on_cuda(size: tuple[int, int, int]) -> None:
    """Nothing to contrast, and rows too wide for the registers."""
    N, K, d = size
    arguments = (unit(N, d, 0), unit(N, d, 1), unit(K, d, 2), unit(N, d, 3), 0.1, 0.07, True)
    for found, want in zip(ops._on_cuda(*arguments), reference.queue_contrast_forward(*arguments), strict=True):
        assert torch.equal(found, want)


def test_slabs_cover_the_queue_once() -> None:
    for N in (1, 7, 320, 4096):
        for K in (1, 63, 1000, 65_536, 10**6):
            for dtype in (torch.float32, torch.float64):
                config = kernels.config_of(128, dtype)
                slabs, rows = kernels.slabs_of(N, K, config)
                assert rows % config.block_k == 0
                assert (slabs - 1) * rows < K <= slabs * rows


# ------------------------------------------------------------------------------------------------ compile lane


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Both kernels for several widths and types of the queue."""
    found: dict[str, dict[str, int]] = {}
    for d in (64, 128):
        for dtype, name in _TYPES.items():
            wide = "*fp64" if dtype == torch.float64 else "*fp32"
            config = kernels.config_of(d, torch.float64 if dtype == torch.float64 else torch.float32)
            pointers = dict.fromkeys(("x", "k", "largest", "sum", "sums", "dcontrast", "dconsistency"), wide)
            types: dict[str, Any] = {f"{key}_ptr": value for key, value in pointers.items()}
            types |= {"queue_ptr": f"*{name}", "losses_ptr": "*fp64"}
            types |= dict.fromkeys(("N", "R", "K", "slab_rows", "slabs"), "i32")
            types |= dict.fromkeys(("temperature", "target_temperature", "over"), "fp64")
            sizes = {"d": d, "BLOCK_D": config.block_d}
            constants = {"SUMS": True, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "queue_stride": d}
            found[f"accumulate {name} {d}"] = resources_of(
                kernels.accumulate_kernel, types, sizes | constants, arch, num_warps=config.num_warps, num_stages=1
            )
            if dtype in (torch.float32, torch.float64):
                constants = {"ORIGINAL": True, "GRADIENT": True, "BLOCK_SLABS": 32}
                found[f"merge {name} {d}"] = resources_of(
                    kernels.merge_kernel, types, sizes | constants, arch, num_warps=1
                )
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] == used["spills"] == 0, (label, used)
        assert used["shared"] <= 99 * 1024, (label, used)  # what a program may have on every architecture
        # Chips of 12.0 have no tensor cores for float64.
        meant = label.startswith("accumulate") and not ("fp64" in label and arch == 120)
        assert (used["tensor_core"] > 0) == meant, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
