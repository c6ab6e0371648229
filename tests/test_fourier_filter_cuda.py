"""The CUDA Fourier filter, emulated, through its C interface, against torch.fft in float64; and on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import neuraldeps_kernels  # noqa: F401  registers torch.ops.neuraldeps

DRIVER = Path(__file__).with_name("fourier_filter_cuda_driver.cu")
KERNEL = emulation.ROOT / "csrc" / "cuda" / "fourier_filter.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Largest relative l2 error of y, dx and dweight, the last in float32 whatever the images (research notes, section 4).
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
CHANNELS = {7: 37, 14: 19, 16: 17, 28: 9, 32: 10, 56: 5, 64: 5}  # by grid: a whole tile, and part of one
Kernel = Callable[..., tuple[Tensor, ...]]
planes_too = pytest.mark.parametrize("planes", [False, True], ids=["pixels", "planes"])
P, I = ctypes.c_void_p, ctypes.c_int64


class Arguments(ctypes.Structure):
    """NdFourierFilterArgs of cuda_api.h."""

    _fields_ = [
        ("batch", I), ("height", I), ("width", I), ("channels", I), ("dtype", ctypes.c_int32),
        ("planes", ctypes.c_int32), ("weight", P),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulation.build_library([KERNEL])))


@pytest.fixture
def kernel(functions: ctypes.CDLL) -> Kernel:
    """kernel(x, weight[, grad], planes=False): y, or dx and dweight, into memory of nonsense with guards around it."""
    size = functions.nd_fourier_filter_backward_workspace
    size.restype, size.argtypes = ctypes.c_size_t, [P]
    functions.nd_fourier_filter.argtypes = [P] * 4
    functions.nd_fourier_filter_backward.argtypes = [P] * 7

    def run(x: Tensor, weight: Tensor, grad: Tensor | None = None, planes: bool = False) -> tuple[Tensor, ...]:
        B, C, (H, W) = x.shape[0], x.shape[1 if planes else 3], x.shape[2:] if planes else x.shape[1:3]
        args = Arguments(B, H, W, C, DTYPES[x.dtype], planes, weight.data_ptr())
        image, guard = Guarded(x.shape, x.dtype), Guarded(weight.shape, torch.float32)
        if grad is None:
            code = functions.nd_fourier_filter(ctypes.byref(args), x.data_ptr(), image.address, None)
            assert code == 0
            return (image.checked(),)
        bytes_needed = size(ctypes.byref(args))
        assert bytes_needed % 8 == 0
        workspace = Guarded((bytes_needed // 4,), torch.float32)
        pointers = (grad.data_ptr(), x.data_ptr(), image.address, guard.address, workspace.address, None)
        assert functions.nd_fourier_filter_backward(ctypes.byref(args), *pointers) == 0
        workspace.checked()
        return image.checked(), guard.checked()

    return run


class Guarded:
    """Memory of `shape` with 64 values of nonsense around it and in it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.size = shape, int(np.prod(shape))
        self.memory = torch.full((self.size + 128,), -77.0, dtype=dtype)
        self.address = self.memory[64:].data_ptr()

    def checked(self) -> Tensor:
        assert (self.memory[:64] == -77).all()
        assert (self.memory[64 + self.size :] == -77).all()
        return self.memory[64 : 64 + self.size].reshape(self.shape)


def problem(B: int, N: int, C: int, dtype: torch.dtype, planes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gradient of y, and a weight [N, N//2+1, C, 2] that is not Hermitian."""
    chance = torch.Generator().manual_seed(N + 100 * C)
    shape = (B, C, N, N) if planes else (B, N, N, C)
    x, grad = (torch.randn(shape, generator=chance).to(dtype) for _ in range(2))
    return x, grad, torch.randn(N, N // 2 + 1, C, 2, generator=chance)


def oracle(x: Tensor, weight: Tensor, grad: Tensor, planes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight in float64, by full transforms of a filter extended point by point, and autograd."""
    x, grad = (a.double().permute(0, 2, 3, 1) if planes else a.double() for a in (x, grad))
    H, W = x.shape[1:3]
    x, weight = x.clone().requires_grad_(), weight.double().requires_grad_()
    K, mirror = torch.view_as_complex(weight), (-torch.arange(H)) % H
    half = [(K[:, v] + K[mirror, v].conj()) / 2 if 2 * v % W == 0 else K[:, v] for v in range(W // 2 + 1)]
    full = torch.stack([half[v] if 2 * v <= W else half[W - v][mirror].conj() for v in range(W)], 1)
    y = torch.fft.ifft2(torch.fft.fft2(x, dim=(1, 2)) * full, dim=(1, 2)).real
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    y, dx = (a.detach().permute(0, 3, 1, 2) if planes else a.detach() for a in (y, dx))
    return y, dx, dweight


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_right(kernel: Kernel, B: int, N: int, C: int, dtype: torch.dtype, planes: bool) -> None:
    x, grad, weight = problem(B, N, C, dtype, planes)
    y, dx, dweight = oracle(x, weight, grad, planes)
    assert relative_error(kernel(x, weight, planes=planes)[0], y) < TOLERANCE[dtype]
    found_dx, found_dweight = kernel(x, weight, grad, planes=planes)
    assert relative_error(found_dx, dx) < TOLERANCE[dtype]
    assert relative_error(found_dweight, dweight) < TOLERANCE[torch.float32]


@planes_too
@pytest.mark.parametrize("N", CHANNELS)
def test_matches_torch_fft(kernel: Kernel, N: int, planes: bool) -> None:
    """Check 10: a pair and a single image; more channels than a tile has, its last one in part."""
    assert_right(kernel, 3, N, CHANNELS[N], torch.float32, planes)


@planes_too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [7, 28])  # one thread a line, and two
def test_16_bit_images(kernel: Kernel, N: int, dtype: torch.dtype, planes: bool) -> None:
    assert_right(kernel, 2, N, 3, dtype, planes)


@pytest.mark.parametrize("N", [56, 64])
def test_narrow_tiles(kernel: Kernel, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of devices with little shared memory; the backward pass has no others."""
    monkeypatch.setenv("ND_EMU_DEVICE", "sm_120")
    x, grad, weight = problem(2, N, 3, torch.float32, False)
    assert relative_error(kernel(x, weight)[0], oracle(x, weight, grad, False)[0]) < TOLERANCE[torch.float32]


@given(B=st.integers(1, 5), C=st.integers(1, 70), planes=st.booleans())
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_and_channels(kernel: Kernel, B: int, C: int, planes: bool) -> None:
    assert_right(kernel, B, 7, C, torch.float32, planes)


def test_many_pairs_for_a_block(kernel: Kernel) -> None:
    """More pairs than blocks of either pass; the sums of the last block are shorter."""
    assert_right(kernel, 8211, 7, 1, torch.float32, False)


@planes_too
@pytest.mark.parametrize("N", [7, 28, 56])
def test_thread_orders(kernel: Kernel, N: int, planes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad, weight = problem(3, N, 2, torch.float32, planes)
    results = []
    for order in emulation.ORDERS:
        monkeypatch.setenv("ND_EMU_ORDER", order)
        results.append((*kernel(x, weight, planes=planes), *kernel(x, weight, grad, planes=planes)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@planes_too
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_plane_that_is_not_finite(kernel: Kernel, wrong: float, planes: bool) -> None:
    """It is NaN as a whole, and dweight of its channel nowhere finite; the image paired with it is untouched."""
    x, grad, weight = problem(4, 7, 3, torch.float32, planes)
    y, dx, dweight = oracle(x, weight, grad, planes)

    def plane(images: Tensor, b: int, c: int) -> Tensor:
        return images[b, c] if planes else images[b, :, :, c]

    spoiled_x, spoiled_grad = x.clone(), grad.clone()
    plane(spoiled_x, 1, 2)[3, 4] = plane(spoiled_grad, 2, 0)[5, 1] = wrong
    for found, expected, (b, c) in [
        (kernel(spoiled_x, weight, planes=planes)[0], y, (1, 2)),
        (kernel(x, weight, spoiled_grad, planes=planes)[0], dx, (2, 0)),
    ]:
        assert plane(found, b, c).isnan().all()
        plane(found, b, c)[:] = plane(expected, b, c)
        assert relative_error(found, expected) < TOLERANCE[torch.float32]
    assert relative_error(kernel(spoiled_x, weight, grad, planes=planes)[0], dx) < TOLERANCE[torch.float32]
    for images, c in (((spoiled_x, grad), 2), ((x, spoiled_grad), 0)):
        found = kernel(images[0], weight, images[1], planes=planes)[1]
        assert not found[:, :, c].isfinite().any()
        found[:, :, c] = dweight[:, :, c]
        assert relative_error(found, dweight) < TOLERANCE[torch.float32]


def test_no_images(kernel: Kernel) -> None:
    empty, weight = torch.empty(0, 14, 14, 5), problem(1, 14, 5, torch.float32, False)[2]
    assert kernel(empty, weight)[0].shape == empty.shape
    assert not kernel(empty, weight, empty)[1].any()


def test_what_is_served(functions: ctypes.CDLL) -> None:
    for sizes, dtype, serves in [
        ((2, 14, 14, 5), torch.float32, True),
        ((2, 14, 16, 5), torch.float32, False),
        ((2, 14, 14, 5), torch.float64, False),
        ((2, 14, 14, 0), torch.float32, False),
        ((2, 14, 14, 2**19 + 1), torch.float32, False),
        ((-1, 14, 14, 5), torch.float32, False),
    ]:
        args = Arguments(*sizes, DTYPES[dtype], 0, None)
        assert functions.nd_fourier_filter_serves(ctypes.byref(args)) == serves
        if not serves:
            assert functions.nd_fourier_filter(ctypes.byref(args), None, None, None) == 1  # cudaErrorInvalidValue
            assert functions.nd_fourier_filter_backward(ctypes.byref(args), *[None] * 6) == 1
            assert functions.nd_fourier_filter_backward_workspace(ctypes.byref(args)) == 0


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer: str) -> None:
    """One thread a line, and two in columns and four in rows; several pairs, tiles in part; every dtype."""
    sources = [DRIVER, KERNEL]
    program = emulation.build_program(sources, sanitizer=sanitizer, definitions=["ND_FOURIER_FILTER_FEW_GRIDS"])
    for case in ("7 7 3 33 0 0", "7 7 2 5 2 1", "32 64 3 1 0 0", "32 64 2 3 3 1"):
        result = emulation.run(program, *case.split(), order="random:3")
        assert result.returncode == 0, f"{case}: {result.stdout}{result.stderr}"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grid", [*((N, N) for N in CHANNELS), (15, 20), (31, 31), (96, 96)], ids=str)
def test_device_agrees_with_the_cpu(grid: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Templates and Triton kernels, in both memory formats; results repeat bit for bit."""
    H, W = grid
    chance = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(5, H, W, 37, generator=chance).to(dtype) for _ in range(2))
    weight = torch.randn(H, W // 2 + 1, 37, 2, generator=chance)
    order = (0, 1, 2, 3) if layout == "NHWC" else (0, 3, 1, 2)
    for images in ((x, grad), tuple(a.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for a in (x, grad))):
        a, g = (image.permute(order) for image in images)
        backward = torch.ops.neuraldeps.fourier_filter2d_backward
        cpu = (torch.ops.neuraldeps.fourier_filter2d(a.double(), weight.double(), layout, "ortho"),)
        cpu += backward(g.double(), a.double(), weight.double(), layout, "ortho")
        results = []
        for _ in range(2):
            on_device = (a.cuda(), weight.cuda(), layout, "ortho")
            results.append((torch.ops.neuraldeps.fourier_filter2d(*on_device), *backward(g.cuda(), *on_device)))
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
        assert results[0][0].stride() == a.stride()
        for found, expected, tolerance in zip(
            results[0], cpu, (TOLERANCE[dtype], TOLERANCE[dtype], TOLERANCE[torch.float32]), strict=True
        ):
            assert relative_error(found.cpu(), expected) < tolerance


@pytest.mark.gpu
def test_device_beyond_32_bit_offsets() -> None:
    x = torch.zeros(2**31 // (49 * 1024) + 3, 7, 7, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(7, 7, 1024, device="cuda")
    weight = torch.randn(7, 4, 1024, 2, device="cuda")
    y = torch.ops.neuraldeps.fourier_filter2d(x, weight, "NHWC", "ortho")
    assert not y[:-2].any()
    assert torch.equal(y[-1:], torch.ops.neuraldeps.fourier_filter2d(x[-2:], weight, "NHWC", "ortho")[-1:])
