"""Triton kernels without a GPU, in two lanes that cannot share a process (Triton decides at import):

- interpreter (TRITON_INTERPRET=1): the kernels as NumPy programs against the plain PyTorch reference;
- compile (marker `compile`, TRITON_INTERPRET unset): machine code for sm_80/90/100/120, which must not spill registers
  and must use tensor cores where they are meant.

`python tests/test_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton_lane

from neuraldeps_kernels.ops import covariance as ops
from neuraldeps_kernels.reference import covariance as reference

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from neuraldeps_kernels.triton import covariance as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ARCHITECTURES = [80, 90, 100, 120]
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

interpreter = pytest.mark.skipif(
    not INTERPRETED or TRITON_VERSION < (3, 7), reason="needs TRITON_INTERPRET=1 and Triton 3.7 (loops with NumPy 2.4)"
)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bit patterns and multiplies those; this gives it the numbers."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, numbers(a), numbers(b), *rest)
    )


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def assert_moments_match(x: torch.Tensor, weights: torch.Tensor | None, tolerance: float) -> None:
    weight_sum, mean, moment = ops._centered_moments_on_cuda(x, weights)
    want_sum, want_mean, want_moment = reference.centered_moments(x, weights)
    torch.testing.assert_close(weight_sum, want_sum, rtol=1e-12, atol=0)
    spread = float((want_moment.diagonal(dim1=1, dim2=2).amax() / want_sum.amax()).sqrt()) + 1e-9
    torch.testing.assert_close(mean, want_mean, rtol=1e-12, atol=1e-5 * spread)
    scale = float(want_moment.abs().amax()) + 1e-9
    torch.testing.assert_close(moment, want_moment, rtol=0, atol=tolerance * scale)
    assert torch.equal(moment, moment.mT)


@interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
# One entry; a batch; part of a tile; 3 tiles, the last cut; two ranges of rows; several flushes of a range.
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (1, 100, 17), (1, 200, 130), (1, 2500, 20), (2, 1300, 8)], ids=str
)
def test_interpreted_kernel(shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool) -> None:
    for offset in (0.0, 100.0):
        x, weights = rows_of(shape, dtype, offset), None
        if weighted:
            weights = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
            weights[:, 1::3] = 0
            x[:, 1::3] = torch.nan
        assert_moments_match(x, weights, 1e-12 if dtype == torch.float64 else 2e-6)


@interpreter
def test_interpreted_kernel_on_views_and_empty_input() -> None:
    x = rows_of((4, 40, 24), torch.float32)
    for view in (x[::2], x[:, ::3, 3:9], x.mT, x[:1].expand(2, 40, 24)):
        assert_moments_match(view, None, 1e-6)
    for empty, weights in [
        (torch.empty(2, 0, 3), None),
        (torch.empty(0, 5, 3), None),
        (rows_of((2, 5, 3), torch.float32), torch.zeros(2, 5, dtype=torch.float64)),
    ]:
        weight_sum, mean, moment = kernels.centered_moments(empty, weights)
        assert not weight_sum.any()
        assert (mean.shape, moment.shape) == ((len(empty), 3), (len(empty), 3, 3))
        assert not mean.any()
        assert not moment.any()


@interpreter
def test_interpreted_kernel_on_a_constant_column() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = rows_of((1, 50, 5), dtype)
        x[:, :, 2] = 0.1
        _, mean, moment = kernels.centered_moments(x)
        assert not moment[0, 2].any()
        assert mean[0, 2] == x[0, 0, 2].double()


def test_tiles_are_numbered_row_by_row() -> None:
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")

    @triton.jit
    def list_tiles(out, first, COUNT: tl.constexpr):
        k = tl.arange(0, COUNT)
        row, column = kernels.lower_tile(first + k)
        tl.store(out + k, row * 100000 + column)

    for row in (0, 1, 2, 57, 1000, 5000, 20000):  # 20000: columns in millions
        first, out = row * (row + 1) // 2, torch.zeros(64, dtype=torch.int32)
        list_tiles[(1,)](out, first, COUNT=64)
        rows, columns = out // 100000, out % 100000
        expected = torch.arange(first, first + 64)
        assert torch.equal(rows * (rows + 1) // 2 + columns, expected.int())
        assert bool((columns <= rows).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pivot_of_16_bit_rows(dtype: torch.dtype) -> None:
    """Far from zero it is a number of the dtype, so that shifted rows are exact; near zero there is none."""
    x = rows_of((1, 300, 4), dtype) + torch.tensor([0.0, 3.0, 100.0, -500.0], dtype=dtype)
    pivot = kernels.pivot_of(x, None)
    assert torch.equal(pivot, pivot.to(dtype).float())
    assert (pivot != 0).tolist() == [[False, False, True, True]]
    shifted = x.float() - pivot[:, None]
    assert torch.equal(shifted, shifted.to(dtype).float())


def test_splits_keep_every_program_busy() -> None:
    for rows in (1, 1023, 1024, 5000, 10**6):
        for tiles in (1, 36, 10**5):
            splits = kernels.num_splits(rows, tiles)
            assert 1 <= splits <= kernels.TARGET_PROGRAMS
            assert splits == 1 or rows // splits >= kernels.MIN_SPLIT_ROWS


# ------------------------------------------------------------------------------------------------ compile lane

_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|DMMA)\b")


def resources_of(
    function: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int
) -> dict[str, int]:
    """Registers, bytes of stack (spills), spill instructions and tensor-core instructions of the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if signature[name].startswith("*")}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code.stdout)),
        "tensor_core": len(_TENSOR_CORE.findall(code.stdout)),
        "shared": compiled.metadata.shared,
    }


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Every kernel as n = 1000 columns launch it (a multiple of 8, not of 16)."""
    found = {}
    for dtype, name in _TYPES.items():
        for weighted in (False, True):
            sizes = kernels.config_of(1000, dtype, weighted)
            wide = "*fp64" if dtype == torch.float64 else "*fp32"
            types = dict.fromkeys(("N", "n_units", "row_stride_units", "split_rows", "tiles", "splits"), "i32")
            types |= {"x_ptr": f"*{name}", "pivot_ptr": wide, "root_ptr": wide, "batch_stride_units": "i64"}
            types |= dict.fromkeys(("partial_ptr", "sums_ptr"), "*fp64")
            constants = {
                "UNIT": 8,
                "BLOCK": sizes.block,
                "BLOCK_ROWS": sizes.block_rows,
                "FLUSH_ROWS": sizes.flush_rows,
                "WEIGHTED": weighted,
            }
            options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
            label = f"{name} {'weighted' if weighted else 'plain'}"
            found[label] = resources_of(kernels.partial_moments_kernel, types, constants, arch, **options)
    types = dict.fromkeys(("partial_ptr", "shift_ptr", "weight_sum_ptr", "moment_ptr"), "*fp64")
    types |= dict.fromkeys(("n", "tiles", "splits"), "i32")
    constants = {"BLOCK": 128, "ROWS": kernels.FINISH_ROWS}
    found["finish"] = resources_of(kernels.finish_moments_kernel, types, constants, arch, num_warps=4)
    return found


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] == used["spills"] == 0, (label, used)
        assert used["shared"] <= 99 * 1024, (label, used)  # what a program may have on every architecture
        # Chips of 12.0 have no tensor cores for float64.
        meant = label != "finish" and not (label.startswith("fp64") and arch == 120)
        assert (used["tensor_core"] > 0) == meant, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
