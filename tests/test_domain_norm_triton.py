"""Triton kernels of batch norm by domain: in the interpreter against the float64 reference, and compiled for GPUs that
need not be there (marker `compile`); the two lanes cannot share a process, as in tests/test_triton.py.

`python tests/test_domain_norm_triton.py ARCH` prints what the kernels compile to for one architecture, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_lane
from torch import Tensor

from neuraldeps_kernels.reference import domain_norm as reference

triton = pytest.importorskip("triton")

from neuraldeps_kernels.triton import domain_norm as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
interpreter = pytest.mark.skipif(
    not INTERPRETED or TRITON_VERSION < (3, 7), reason="needs TRITON_INTERPRET=1 and Triton 3.7 (loops with NumPy 2.4)"
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of the largest magnitude: rounding of results in the type, and of sums in float32 or float64.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 5e-4}


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """To a part of the largest magnitude; NaN in the same places."""
    assert found.shape == expected.shape, name
    found, expected = found.double(), expected.double()
    torch.testing.assert_close(found.isnan(), expected.isnan(), msg=name)
    size = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(size, 1e-30), equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def wide(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def check_domain_norm(
    x: Tensor,
    domain: Tensor,
    D: int,
    training: bool = True,
    parameters: str = "domain",
    residual: Tensor | None = None,
    activation: str = "none",
    grad: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Forward, statistics and backward against the reference in float64 on the same rounded inputs."""
    C, dtype = x.shape[1], x.dtype
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    shape = {"domain": (D, C), "shared": (C,)}.get(parameters)
    weight = None if shape is None else (1 + 0.3 * normal(shape, 5)).to(stat)
    bias = None if shape is None else normal(shape, 6).to(stat)
    running = (None, None) if training else (normal((D, C), 7).to(stat), (normal((D, C), 8).square() + 0.5).to(stat))
    arguments = (x, domain, *running, weight, bias, residual, D, training, 1e-5, activation, False)
    y, mean, variance, count = kernels.domain_batch_norm(*arguments)
    want = reference.domain_batch_norm(*map(wide, arguments))
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    exact = min(allowed, 1e-6)
    assert y.dtype == dtype
    assert y.stride() == (
        x.stride() if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous().stride()
    )
    assert_close(y, want[0], allowed, "y")
    assert_close(mean, want[1], exact, "mean")
    assert_close(variance, want[2], exact, "variance")
    assert torch.equal(count, want[3])

    grad = normal(tuple(x.shape), 9, dtype) if grad is None else grad
    kept = y if activation == "relu" else None
    rest = (training, 1e-5, parameters == "shared", residual is not None)
    found = kernels.domain_batch_norm_backward(grad, x, domain, weight, mean, variance, count, kept, *rest)
    back = map(wide, (grad, x, domain, weight, want[1], want[2], count, kept))
    expected = reference.domain_batch_norm_backward(*back, *rest)
    for name, a, b in zip(("dx", "dweight", "dbias", "dresidual"), found, expected, strict=True):
        assert_close(a, b, 2 * (exact if name in ("dweight", "dbias") else allowed), name)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few programs of small tiles, for the interpreter: parts of long rows, several chunks of samples, no slabs."""
    sizes = {"SLAB_BYTES": 0, "TARGET_PROGRAMS": 8, "TILE_BYTES": 256, "CHUNK_ENTRIES": 4, "MERGE_ENTRIES": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(kernels, name, size)
    kernels.tiling_of.cache_clear()
    yield
    kernels.tiling_of.cache_clear()


# [N, C]; rows of a power of 2; odd sizes, 3-D and 1-D.
SHAPES = [(9, 5), (6, 3, 4, 4), (5, 7, 3, 5), (4, 3, 2, 3, 3), (7, 2, 33)]
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@interpreter
@every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slabs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, residual = (laid_out(2 * normal(shape, seed, dtype) + 3, layout) for seed in (0, 1))
    domain = torch.arange(shape[0]) * 2 % 3
    assert kernels.slab_of(kernels.view_of(x), 4)
    check_domain_norm(x, domain, 4)  # domain 3 is absent
    check_domain_norm(x, domain, 4, parameters="shared", residual=residual, activation="relu")


# Every shape in float32, every type in one shape; (2, 2, 20, 16): parts of L, each of several blocks.
SHAPES_AND_DTYPES = [(shape, torch.float32) for shape in (*SHAPES, (2, 2, 20, 16))]
SHAPES_AND_DTYPES += [((4, 3, 2, 3, 3), dtype) for dtype in DTYPES[1:]]


@interpreter
@every_layout
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_passes(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, residual = (laid_out(2 * normal(shape, seed, dtype) + 3, layout) for seed in (0, 1))
    domain = torch.arange(shape[0]) * 2 % 3
    check_domain_norm(x, domain, 4)
    check_domain_norm(x, domain, 4, parameters="shared", residual=residual, activation="relu")
    check_domain_norm(x, domain - 1, 3, training=False, residual=residual, activation="relu")  # -1: pooled


@interpreter
@every_layout
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_operators_on_tables(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, residual, grad = (laid_out(2 * normal(shape, seed, dtype) + 3, layout) for seed in (0, 1, 2))
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift, offset, slope = (normal(shape[:2], seed, stat) for seed in (3, 4, 5, 6))
    exact = min(TOLERANCE[dtype], 1e-6)
    mean, moment = kernels.instance_moments(x)
    for name, found, want in zip(("g", "q"), (mean, moment), reference.instance_moments(x.double()), strict=True):
        assert found.dtype == stat
        assert_close(found, want, exact, name)

    for added, activation in ((None, "none"), (residual, "relu")):
        y = kernels.centred_affine(x, mean, scale, shift, added, activation)
        want_y = reference.centred_affine(*map(wide, (x, mean, scale, shift, added)), activation)
        assert_close(y, want_y, TOLERANCE[dtype], "y")
        kept = y if activation == "relu" else None
        sums = kernels.centred_affine_sums(grad, x, mean, kept)
        want_sums = reference.centred_affine_sums(*map(wide, (grad, x, mean, kept)))
        for name, found, want in zip(("S1", "S2"), sums, want_sums, strict=True):
            assert_close(found, want, exact, name)
        arguments = (grad, x, mean, scale, offset, slope, kept, added is not None)
        found = kernels.centred_affine_input_grad(*arguments)
        want = reference.centred_affine_input_grad(*map(wide, arguments))
        assert_close(found[0], want[0], TOLERANCE[dtype], "dx")
        assert_close(found[1], want[1], TOLERANCE[dtype], "dresidual")

    arguments = (None, x, mean, None, offset, slope, None, False)
    dx, nothing = kernels.centred_affine_input_grad(*arguments)
    assert_close(dx, reference.centred_affine_input_grad(*map(wide, arguments))[0], TOLERANCE[dtype], "dx of moments")
    assert nothing.numel() == 0


@interpreter
def test_more_domains_than_a_slab_takes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    x, domain = normal((80, 4), 0, torch.float32), torch.arange(80) * 7 % 20
    assert kernels.slab_of(kernels.view_of(x), 16)
    assert kernels.slab_of(kernels.view_of(x), 20) is None
    request.getfixturevalue("small_tiles")
    for name in ("CHUNK_ENTRIES", "MERGE_ENTRIES"):
        monkeypatch.setattr(kernels, name, 128)
    check_domain_norm(x, domain, 20)


@interpreter
@pytest.mark.parametrize("path", ["slabs", "passes"])
def test_domains_that_are_absent_single_or_wrong(path: str, request: pytest.FixtureRequest) -> None:
    """Absent: zeros. One value: y = bias, dx = 0. Not finite: that domain alone. No such id: NaN for those samples."""
    if path == "passes":
        request.getfixturevalue("small_tiles")
    x, grad = normal((6, 3, 1), 0, torch.float32), normal((6, 3, 1), 1, torch.float32)
    domain = torch.tensor([0, 0, 2, 3, 3, 7])
    x[4, 1] = torch.nan
    bias = normal((4, 3), 2, torch.float32)
    arguments = (x, domain, None, None, None, bias, None, 4, True, 1e-5, "none", False)
    y, mean, variance, count = kernels.domain_batch_norm(*arguments)
    assert count.tolist() == [2, 0, 1, 2]
    assert not mean[1].any()
    assert not variance[1:3].any()
    assert torch.equal(y[2, :, 0], bias[2])
    wrong = torch.zeros(6, 3, 1, dtype=torch.bool)
    wrong[3:5, 1] = wrong[5] = True
    assert torch.equal(y.isnan(), wrong)
    assert torch.equal(variance.isnan(), torch.eye(4, 3)[[3, 3, 3, 1]] > 0)
    rest = (None, True, 1e-5, False, False)
    dx, dweight, dbias, _ = kernels.domain_batch_norm_backward(grad, x, domain, None, mean, variance, count, *rest)
    assert not dx[2].any()
    assert torch.equal(dx.isnan(), wrong)
    assert not dweight[1].any()
    assert not dbias[1].any()
    with pytest.raises(ValueError, match="domain 2 has a single value"):
        kernels.domain_batch_norm(*arguments[:-1], True)


@interpreter
@pytest.mark.usefixtures("small_tiles")
def test_ids_in_eval() -> None:
    """-1 is the pooled domain, below and above there is none."""
    x = normal((4, 3, 5), 0, torch.float32)
    check_domain_norm(x, torch.tensor([-1, 0, 1, 1]), 2, training=False, parameters="none")
    domain = torch.tensor([-1, 0, 2, -2])
    running = normal((2, 3), 1, torch.float32), normal((2, 3), 2, torch.float32).square()
    y, *_ = kernels.domain_batch_norm(x, domain, *running, None, None, None, 2, False, 1e-5, "none", False)
    assert y.isnan().all(-1).all(-1).tolist() == [False, False, True, True]
    assert not y[:2].isnan().any()


@interpreter
@every_layout
@pytest.mark.parametrize("path", ["slabs", "passes"])
def test_large_mean_and_constants(path: str, layout: str, request: pytest.FixtureRequest) -> None:
    """Check 12: the variance of 1e3 + 0.1 noise to 1e-3 (here 1e-6). A constant has no variance at all."""
    if path == "passes":
        request.getfixturevalue("small_tiles")
    domain = torch.tensor([0, 1, 0, 1, 1])
    x = laid_out((1e3 + 0.1 * normal((5, 2, 11, 3), 0)).float(), layout)
    arguments = (domain, None, None, None, None, None, 2, True, 1e-5, "none", False)
    _, mean, variance, _ = kernels.domain_batch_norm(x, *arguments)
    _, want_mean, want_variance, _ = reference.domain_batch_norm(x.double(), *arguments)
    torch.testing.assert_close(variance, want_variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, want_mean, rtol=1e-8 if path == "slabs" else 1e-7, atol=0)
    constant = torch.where(domain[:, None, None, None] == 0, 0.1, -77.7).expand_as(x).contiguous()
    y, _, variance, _ = kernels.domain_batch_norm(laid_out(constant, layout), *arguments)
    assert not variance.any()
    assert not y.any()


@interpreter
def test_tensors_in_other_layouts() -> None:
    """A view of x is copied; residual and gradient follow its layout; an expanded gradient has stride 0."""
    x = normal((6, 5, 4, 8), 0, torch.float32)
    domain = torch.arange(12)[::2] % 3
    for view in (x[:, :, :, ::2], x.mT, x[:, 1:4]):
        check_domain_norm(view, domain, 3, residual=laid_out(2 * view, "channels_last"), activation="relu")
    last = laid_out(x, "channels_last")
    check_domain_norm(last, domain, 3, residual=x, activation="relu", grad=torch.ones(1, 1, 1, 1).expand_as(x))


@interpreter
@pytest.mark.parametrize("path", ["slabs", "passes"])
def test_64_bit_offsets(path: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "passes":
        request.getfixturevalue("small_tiles")
    monkeypatch.setattr(kernels, "LONG", 1)
    x = normal((5, 7, 3, 5), 0, torch.float32)
    for layout in ("contiguous", "channels_last"):
        check_domain_norm(laid_out(x, layout), torch.arange(5) % 2, 2, activation="relu")
    check_domain_norm(x, torch.arange(5) % 2, 2, training=False)


@interpreter
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_to_normalise(shape: tuple[int, ...]) -> None:
    check_domain_norm(torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64), 2)
    assert not torch.cat(kernels.instance_moments(torch.empty(shape))).any()


@interpreter
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics(dtype: torch.dtype, momentum: float | None) -> None:
    """Domain 1 is absent and keeps its bits; domain 2 has one value; the second buffers have gaps."""
    mean, variance = normal((3, 5), 0), normal((3, 5), 1).square()
    count = torch.tensor([8, 0, 1])
    start = (normal((3, 10), 2, dtype), normal((3, 5), 3, dtype).square(), torch.tensor([4, 5, 0]))
    for gaps in (False, True):
        found, want = [], []
        for copy in (found, want):
            wide_mean, running_var, tracked = (t.clone() for t in start)
            running_mean = wide_mean[:, ::2]
            copy.extend([running_mean if gaps else running_mean.contiguous(), running_var, tracked])
        kernels.update_running_statistics(*found, mean, variance, count, momentum)
        reference.update_running_statistics(*want, mean, variance, count, momentum)
        assert torch.equal(found[2], want[2])
        for a, b, old in zip(found[:2], want[:2], (start[0][:, ::2], start[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
            assert torch.equal(a[1], old[1])
            assert not torch.equal(a[0], old[0])
    if momentum is not None:
        uncounted = [start[0][:, ::2].contiguous(), start[1].clone()]
        kernels.update_running_statistics(*uncounted, None, mean, variance, count, momentum)
        torch.testing.assert_close(uncounted[0], found[0])


# O, L, I as large layers, small maps, one long row, and [N, C] have them.
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    "size",
    [(16384, 2048, 1), (64, 2048, 256), (32768, 49, 1), (3, 10**6, 1), (1, 10**7, 3), (128, 1, 2048), (1, 1, 1)],
    ids=str,
)
def test_tiles_cover_everything_once(size: tuple[int, int, int], itemsize: int) -> None:
    O, L, I = size
    tiles = kernels.tiling_of(O, L, I, itemsize)
    assert tiles.block_o * tiles.block_l * tiles.block_i * itemsize <= kernels.TILE_BYTES
    assert (tiles.parts - 1) * tiles.part_length < L <= tiles.parts * tiles.part_length
    if O * L * I * itemsize > 2 * kernels.TARGET_PROGRAMS * kernels.TILE_BYTES:
        across = triton.cdiv(O, tiles.block_o) * triton.cdiv(I, tiles.block_i)
        assert across * tiles.parts >= kernels.TARGET_PROGRAMS / 2


def test_slabs_fit_the_registers() -> None:
    for shape in [(128, 2048), (64, 256, 16, 8), (8, 64, 8, 4), (64, 512, 7, 7), (500, 3)]:
        for dtype in DTYPES:
            for layout in ("contiguous", "channels_last"):
                slab = kernels.slab_of(kernels.view_of(laid_out(torch.empty(shape, dtype=dtype), layout)), 4)
                if slab is not None:
                    size = slab.block_n * slab.block_l * slab.block_c * max(4, dtype.itemsize)
                    assert size <= kernels.SLAB_BYTES
                    assert size / (32 * slab.num_warps) <= 64  # 16 registers a thread
    assert kernels.slab_of(kernels.view_of(torch.empty(64, 256, 64, 32)), 4) is None


# ------------------------------------------------------------------------------------------------ compile lane

ARCHITECTURES = [80, 90, 100, 120]
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def recorded_launches() -> dict[str, Launch]:
    """Every kernel as it is launched for sizes of real layers, none of them run."""
    found: list[Launch] = []
    launches: dict[str, Launch] = {}
    queue, kernels.launch = kernels.launch, lambda kernel, _n, _x, *a, **c: found.append(Launch(kernel, a, c))

    def record(name: str) -> None:
        launches.update({f"{name}: {launch.kernel.__name__} {i}": launch for i, launch in enumerate(found)})
        found.clear()

    for shape, layout, dtype in (
        ((64, 256, 64, 32), "contiguous", torch.float32),
        ((64, 256, 64, 32), "channels_last", torch.float32),
        ((64, 256, 64, 32), "channels_last", torch.bfloat16),
        ((64, 256, 16, 8), "contiguous", torch.float32),
        ((64, 512, 7, 7), "contiguous", torch.float16),
        ((128, 256, 14, 14), "contiguous", torch.bfloat16),
        ((128, 2048), "contiguous", torch.float32),
        ((5000, 60), "contiguous", torch.float32),
        ((64, 256, 16, 8), "contiguous", torch.float64),
    ):
        train(shape, layout, dtype, True)
        record(f"{list(shape)} {layout} {_TYPES[dtype]}")
    for slab_bytes in (0, kernels.SLAB_BYTES):  # integers that are 1 become constants
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "SLAB_BYTES", slab_bytes)
            train((1, 1), "contiguous", torch.float32, True, D=1)
            train((2, 1, 5), "channels_last", torch.float32, False, D=1)
            record(f"few, slabs of {slab_bytes} bytes")
    for layout in ("contiguous", "channels_last"):
        train((64, 256, 64, 32), layout, torch.float32, False)
        x = laid_out(torch.empty(64, 256, 64, 32), layout)
        table = torch.empty(64, 256)
        kernels.instance_moments(x)
        kernels.centred_affine(x, table, table, table, x, "relu")
        kernels.centred_affine_sums(x, x, table, x)
        kernels.centred_affine_input_grad(x, x, table, table, table, table, x, True)
        kernels.centred_affine_input_grad(None, x, table, None, table, table, None, False)
        record(f"eval, tables {layout}")
    kernels.instance_moments(torch.empty(1, 3, 2000, 1000))
    record("parts")
    buffers = torch.empty(4, 256), torch.empty(4, 256)
    count = torch.empty(4, dtype=torch.int64)
    kernels.update_running_statistics(*buffers, count, buffers[0].double(), buffers[0].double(), count, None)
    record("update")
    kernels.launch = queue
    return launches


def train(shape: tuple[int, ...], layout: str, dtype: torch.dtype, training: bool, D: int = 4) -> None:
    """Forward and backward with everything fused; without `training` by running statistics."""
    x = laid_out(torch.empty(shape, dtype=dtype), layout)
    table = torch.empty(D, shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    domain = torch.empty(shape[0], dtype=torch.int64)
    arguments = (x, domain, table, table, table, table, x, D, training, 1e-5, "relu", False)
    y, mean, variance, count = kernels.domain_batch_norm(*arguments)
    rest = (training, 1e-5, False, True)
    kernels.domain_batch_norm_backward(x, x, domain, table, mean, variance, count, y, *rest)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and hints that the launcher of Triton derives from the arguments: multiples of 16, and 1."""
    names = launch.kernel.arg_names
    types, constants, hints = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.arguments[i] if i < len(launch.arguments) else launch.constants[name]
        if i >= len(launch.arguments) or value is None or (type(value) is int and value == 1):
            types[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], hints[(i,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp64"
        else:
            types[name] = "i32"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def compiled_resources(arch: int) -> dict[str, dict[str, int]]:
    """Registers, bytes of stack and of shared memory, threads, and instructions of some kinds, of every launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    used, seen = {}, {}
    for name, launch in recorded_launches().items():
        types, constants, hints = specialised(launch)
        key = str((launch.kernel.__name__, types, constants, hints, launch.constants["num_warps"]))
        if key in seen:
            continue
        seen[key] = name
        source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=hints)
        options = {"num_warps": launch.constants["num_warps"]}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        ptx = compiled.asm["ptx"]
        used[name] = {
            "registers": int(registers),
            "stack": int(stack),
            "shared": compiled.metadata.shared,
            "vectors": len(re.findall(r"ld\.global\S*\.v[248]\.b", ptx)),
            "threads": 32 * launch.constants["num_warps"],
            "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        }
    return used


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    for label, used in triton_lane.resources(__file__, arch, tmp_path).items():
        assert used["stack"] <= 8, (label, used)  # two registers
        assert used["atomics"] == 0, (label, used)
        assert used["shared"] <= 48 * 1024, (label, used)
        assert used["registers"] * used["threads"] <= 65536, (label, used)
        walks = re.search("moments_kernel|affine|sums_kernel|input_grad|slab", label) and "merge" not in label
        if walks and not label.startswith(("[64, 512, 7, 7]", "few")):
            assert used["vectors"] > 0, (label, used)


if __name__ == "__main__":
    print(json.dumps(compiled_resources(int(sys.argv[1]))))
