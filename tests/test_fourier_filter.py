"""The Fourier filter layer against torch.fft in float64, direct circular convolution, and its algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from neuraldeps_kernels.nn import FourierFilter2d, resize_filter
from neuraldeps_kernels.ops.fourier_filter import fourier_filter2d
from neuraldeps_kernels.reference import fourier_filter as reference

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = torch.ops.neuraldeps
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative l2 error of y and dx against float64 on the same rounded inputs: research notes, section 4. That of dweight,
# which is never rounded to 16 bits, is the float32 one.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-14, torch.bfloat16: 3e-3, torch.float16: 4e-4}
LAYOUTS = ["NHWC", "NCHW"]

pytestmark = pytest.mark.usefixtures("one_thread")

# (H, W): every unrolled length; single rows, columns and pixels; both parities; each radix, a prime beyond them, and
# products of several of them, square and not; long and thin.
GRIDS = [
    *((n, n) for n in (7, 8, 14, 16, 28, 32, 56, 64)),
    *((1, 1), (1, 2), (2, 1), (2, 2), (1, 17), (22, 1)),
    *((3, 5), (5, 4), (6, 5), (7, 14), (9, 10), (15, 20), (11, 13), (31, 31), (49, 26), (96, 12), (64, 7)),
]
# (B, C): one image and one channel; channels below, at and beyond the lanes (16, 8, 4); an odd batch.
SIZES = [(1, 1), (5, 19), (2, 32)]


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def images(B: int, H: int, W: int, C: int, dtype: torch.dtype, layout: str = "NHWC", seed: int = 0) -> Tensor:
    return normal((B, H, W, C) if layout == "NHWC" else (B, C, H, W), dtype, seed)


def weights(H: int, W: int, C: int, dtype: torch.dtype = torch.float64, groups: int | None = None) -> Tensor:
    """The real view of a filter that is not Hermitian-consistent."""
    channels = (C,) if groups is None else (groups, C // groups, C // groups)
    return normal((H, W // 2 + 1, *channels, 2), dtype, seed=1)


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def composite(x: Tensor, weight: Tensor, layout: str = "NHWC", norm: str = "ortho") -> Tensor:
    """irfft2(rfft2(x) K) by torch, in float64."""
    dims = (1, 2) if layout == "NHWC" else (2, 3)
    X = torch.fft.rfft2(x.double(), dim=dims, norm=norm)
    K = torch.view_as_complex(weight.double().contiguous())
    if K.dim() == 3:
        Y = X * (K if layout == "NHWC" else K.permute(2, 0, 1))
    else:
        channels_last = X if layout == "NHWC" else X.permute(0, 2, 3, 1)
        Y = torch.einsum("buvgi,uvgio->buvgo", channels_last.unflatten(-1, K.shape[2:4]), K).flatten(-2)
        Y = Y if layout == "NHWC" else Y.permute(0, 3, 1, 2)
    return torch.fft.irfft2(Y, s=[x.shape[d] for d in dims], dim=dims, norm=norm)


def composite_gradients(g: Tensor, x: Tensor, weight: Tensor, layout: str = "NHWC") -> tuple[Tensor, Tensor]:
    """dx and dweight by torch's own autograd through torch.fft, in float64."""
    leaves = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    dx, dweight = torch.autograd.grad(composite(*leaves, layout), leaves, g.double())
    return dx, dweight


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def in_memory_order(x: Tensor, layout: str, other: bool) -> Tensor:
    """x, or the same numbers with its channels and its pixels exchanged in memory."""
    if not other:
        return x
    if layout == "NCHW":
        return x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------ against torch.fft


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_and_gradients_match_torch(grid: tuple[int, int]) -> None:
    H, W = grid
    for dtype in DTYPES:
        for (B, C), layout in zip(SIZES, ("NHWC", "NCHW", "NHWC"), strict=True):
            if B * H * W * C > 150_000:
                continue
            x, g = images(B, H, W, C, dtype, layout), images(B, H, W, C, dtype, layout, seed=2)
            weight = weights(H, W, C, weight_dtype(dtype))
            y = fourier_filter2d(x, weight, layout=layout)
            dx, dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
            want_dx, want_dweight = composite_gradients(g, x, weight, layout)
            few = 2 if B * H * W * C < 100 else 1  # the rounding of a few numbers may be above its average
            assert y.dtype == dx.dtype == dtype
            assert error(y, composite(x, weight, layout)) <= few * TOLERANCE[dtype]
            assert error(dx, want_dx) <= few * TOLERANCE[dtype]
            assert error(dweight, want_dweight) <= TOLERANCE[weight_dtype(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(7, 7), (8, 6), (2, 3), (16, 16), (15, 33)], ids=str)
def test_memory_orders(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Channels or pixels innermost, mixed among x and g, slices, and strides that need a copy: one result, to rounding,
    in the memory order of x; planes of fewer pixels than lanes as well.
    """
    H, W = grid
    for layout in LAYOUTS:
        x, g = images(3, H, W, 21, dtype, layout), images(3, H, W, 21, dtype, layout, seed=2)
        weight = weights(H, W, 21, weight_dtype(dtype))
        want = fourier_filter2d(x, weight, layout=layout)
        want_dx, want_dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
        tolerance = {"rtol": 0, "atol": 4 * float(want.double().abs().max()) * torch.finfo(dtype).eps}
        for other_x, other_g in ((True, True), (True, False), (False, True)):
            moved = in_memory_order(x, layout, other_x)
            y = fourier_filter2d(moved, weight, layout=layout)
            assert y.stride() == torch.empty_like(moved).stride()
            torch.testing.assert_close(y, want, **tolerance)
            dx, dweight = OPERATORS.fourier_filter2d_backward(
                in_memory_order(g, layout, other_g), moved, weight, layout, "ortho"
            )
            assert dx.stride() == torch.empty_like(moved).stride()
            torch.testing.assert_close(dx, want_dx, **tolerance)
            assert error(dweight, want_dweight.double()) <= 1e-6
        wide = torch.cat([x, x], 3)[..., : x.shape[3]]
        torch.testing.assert_close(fourier_filter2d(wide, weight, layout=layout), want, **tolerance)
        apart = torch.stack([x, x], 4)[..., 0]
        torch.testing.assert_close(fourier_filter2d(apart, weight, layout=layout), want, **tolerance)
        one = x[:1].expand(3, -1, -1, -1)
        assert torch.equal(fourier_filter2d(one, weight, layout=layout)[2], want[0])


# (C, G): blocks below, at and beyond the lanes, with rests of vectors and of rows; one block; a channel each.
BLOCKS = [(6, 1), (6, 3), (96, 4), (48, 3), (19, 1), (20, 2), (70, 2), (34, 1), (21, 21)]


@pytest.mark.parametrize(("C", "groups"), BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_channels(dtype: torch.dtype, C: int, groups: int) -> None:
    """One image, fewer and more than rows at once; odd, even, unrolled and single-line grids."""
    for index, (B, H, W) in enumerate(((3, 6, 5), (1, 7, 7), (17, 4, 8), (2, 14, 3), (5, 1, 6), (6, 5, 1))):
        layout = LAYOUTS[index % 2]
        x, g = images(B, H, W, C, dtype, layout), images(B, H, W, C, dtype, layout, seed=2)
        weight = weights(H, W, C, weight_dtype(dtype), groups)
        want_dx, want_dweight = composite_gradients(g, x, weight, layout)
        dx, dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
        y = fourier_filter2d(x, torch.view_as_complex(weight), layout=layout)
        assert y.dtype == dx.dtype == dtype
        assert error(y, composite(x, weight, layout)) <= TOLERANCE[dtype]
        assert error(dx, want_dx) <= TOLERANCE[dtype]
        assert error(dweight, want_dweight) <= TOLERANCE[weight_dtype(dtype)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_images_of_blocks(layout: str) -> None:
    """More than are transformed at once; diagonal blocks are filters of channels."""
    x, g = images(21, 64, 32, 64, torch.float32, layout), images(21, 64, 32, 64, torch.float32, layout, seed=2)
    weight = weights(64, 32, 64, torch.float32, 32)
    y = fourier_filter2d(x, weight, layout=layout)
    dx, dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
    want_dx, want_dweight = composite_gradients(g, x, weight, layout)
    assert error(y, composite(x, weight, layout)) <= 5e-7
    assert error(dx, want_dx) <= 5e-7
    assert error(dweight, want_dweight) <= 5e-7
    x = images(3, 4, 8, 6, torch.float32, layout)
    diagonal = torch.diag_embed(weights(4, 8, 6, torch.float32).movedim(-1, 2)).movedim(2, -1)[:, :, None]
    same = fourier_filter2d(x, weights(4, 8, 6, torch.float32), layout=layout)
    torch.testing.assert_close(fourier_filter2d(x, diagonal, layout=layout), same, rtol=0, atol=1e-5)


def test_norms_and_weight_forms() -> None:
    """All norms are one filter, as the two transforms undo each other's factors; complex and real weights of any float
    dtype are one weight.
    """
    x, weight = images(2, 6, 5, 3, torch.float32), weights(6, 5, 3, torch.float32)
    y = fourier_filter2d(x, weight)
    for norm in ("ortho", "backward", "forward"):
        assert error(y, composite(x, weight, norm=norm)) <= 5e-7
        assert torch.equal(fourier_filter2d(x, weight, norm=norm), y)
    assert torch.equal(fourier_filter2d(x, torch.view_as_complex(weight)), y)
    assert torch.equal(fourier_filter2d(x, torch.view_as_complex(weight.double())), y)
    half = fourier_filter2d(x, weight.bfloat16())
    assert torch.equal(half, fourier_filter2d(x, weight.bfloat16().float()))
    assert torch.equal(fourier_filter2d(x, weight.transpose(0, 1).contiguous().transpose(0, 1)), y)


def test_empty_batch() -> None:
    for layout in LAYOUTS:
        for groups in (None, 2):
            x, weight = images(0, 5, 4, 6, torch.float32, layout), weights(5, 4, 6, torch.float32, groups)
            assert fourier_filter2d(x, weight, layout=layout).shape == x.shape
            dx, dweight = OPERATORS.fourier_filter2d_backward(x, x, weight, layout, "ortho")
            assert dx.shape == x.shape
            assert dweight.shape == weight.shape
            assert not dweight.any()


# ------------------------------------------------------------------------------------------------ acceptance checks


def test_identity() -> None:
    """Check 1 of the paper file."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for H, W in GRIDS:
            x = images(2, H, W, 3, dtype)
            one = torch.stack([torch.ones(H, W // 2 + 1, 3), torch.zeros(H, W // 2 + 1, 3)], -1).to(dtype)
            assert float((fourier_filter2d(x, one) - x).abs().max()) <= tolerance


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (6, 5), (5, 6)], ids=str)
def test_convolution(grid: tuple[int, int]) -> None:
    """Check 2: direct circular convolution with k = irfft2(K), K not Hermitian."""
    H, W = grid
    x, weight = images(2, H, W, 3, torch.float64).numpy(), weights(H, W, 3)
    k = torch.fft.irfft2(torch.view_as_complex(weight), s=(H, W), dim=(0, 1)).numpy()
    want = sum(
        k[a, b] * np.roll(x, (a, b), (1, 2)) for a in range(H) for b in range(W)
    )  # y[h, w] = sum k[a, b] x[h - a, w - b]
    np.testing.assert_allclose(fourier_filter2d(torch.from_numpy(x), weight).numpy(), want, atol=1e-12)


grids = st.tuples(st.integers(1, 18), st.integers(1, 18))
seeds = st.integers(0, 2**31 - 2)


@settings(deadline=None, max_examples=30)
@given(grid=grids, seed=seeds, shift=st.tuples(st.integers(-20, 20), st.integers(-20, 20)))
def test_shift_equivariance(grid: tuple[int, int], seed: int, shift: tuple[int, int]) -> None:
    """Check 3."""
    x, weight = images(2, *grid, 3, torch.float64, seed=seed), weights(*grid, 3)
    shifted = fourier_filter2d(x.roll(shift, (1, 2)), weight)
    torch.testing.assert_close(shifted, fourier_filter2d(x, weight).roll(shift, (1, 2)), rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(grid=grids, seed=seeds)
def test_linearity(grid: tuple[int, int], seed: int) -> None:
    """Check 4: in x and in K; zero K gives zero."""
    x, z = (images(2, *grid, 3, torch.float64, seed=s) for s in (seed, seed + 1))
    K, L = weights(*grid, 3), weights(*grid, 3).flip(0)
    close = {"rtol": 0.0, "atol": 1e-11}
    torch.testing.assert_close(
        fourier_filter2d(2 * x - z, K), 2 * fourier_filter2d(x, K) - fourier_filter2d(z, K), **close
    )
    torch.testing.assert_close(
        fourier_filter2d(x, 2 * K - L), 2 * fourier_filter2d(x, K) - fourier_filter2d(x, L), **close
    )
    assert not fourier_filter2d(x, torch.zeros_like(K)).any()


@settings(deadline=None, max_examples=30)
@given(grid=grids, seed=seeds)
def test_composition(grid: tuple[int, int], seed: int) -> None:
    """Check 5: filters of real kernels multiply."""
    x = images(2, *grid, 3, torch.float64, seed=seed)
    first, second = (torch.fft.rfft2(normal((*grid, 3), seed=seed + s), dim=(0, 1), norm="ortho") for s in (1, 2))
    twice = fourier_filter2d(fourier_filter2d(x, first), second)
    torch.testing.assert_close(twice, fourier_filter2d(x, first * second), rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(grid=grids, seed=seeds)
def test_energy(grid: tuple[int, int], seed: int) -> None:
    """Check 6: |K| = 1 keeps the energy, and sum c_v |X|^2, read off the gradient of K at g = x, is that of x."""
    H, W = grid
    x = images(2, H, W, 3, torch.float64, seed=seed)
    spectrum = torch.fft.rfft2(normal((H, W, 3), seed=seed + 1), dim=(0, 1))
    y = fourier_filter2d(x, spectrum / spectrum.abs())
    torch.testing.assert_close(y.square().sum((0, 1, 2)), x.square().sum((0, 1, 2)))
    _, dweight = OPERATORS.fourier_filter2d_backward(x, x, weights(H, W, 3), "NHWC", "ortho")
    torch.testing.assert_close(dweight[..., 0].sum((0, 1)), x.square().sum((0, 1, 2)))
    assert float(dweight[..., 1].abs().max()) <= 1e-10 * float(x.square().sum())


@settings(deadline=None, max_examples=30)
@given(grid=grids, seed=seeds, u=st.integers(0, 17))
def test_null_directions(grid: tuple[int, int], seed: int, u: int) -> None:
    """Check 7: Im K[0, 0], and equal amounts in Im K[u, v], Im K[-u, v] for v = 0 and W/2, change nothing."""
    H, W = grid
    u %= H
    x, weight = images(2, H, W, 3, torch.float64, seed=seed), weights(H, W, 3)
    y = fourier_filter2d(x, weight)
    for v in {0, W // 2} if W % 2 == 0 else {0}:
        changed = weight.clone()
        changed[u, v, :, 1] += 3
        if u != -u % H:
            changed[-u % H, v, :, 1] += 3
        torch.testing.assert_close(fourier_filter2d(x, changed), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 2], ids=str)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 2), (1, 1)], ids=str)
def test_gradients(grid: tuple[int, int], groups: int | None, layout: str) -> None:
    """Check 8, and second derivatives: both parities of W, K not Hermitian; dK by its formula; dx with conj K on g."""
    H, W = grid
    x, weight = images(2, H, W, 4, torch.float64, layout), weights(H, W, 4, groups=groups)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return fourier_filter2d(x, weight, layout=layout)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    g = images(2, H, W, 4, torch.float64, layout, seed=3)
    dx, dweight = torch.autograd.grad(function(*leaves), leaves, g)
    torch.testing.assert_close(dx, function(g, reference.adjoint(weight)))
    frozen = torch.autograd.grad(function(leaves[0], weight), leaves[0], g)[0]
    torch.testing.assert_close(frozen, dx)
    if groups is None:
        channels_last = (x, g) if layout == "NHWC" else (x.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1))
        X, G = (torch.fft.rfft2(z, dim=(1, 2), norm="ortho") for z in channels_last)
        c = torch.tensor([1.0 if v in (0, W - v) else 2.0 for v in range(W // 2 + 1)], dtype=torch.float64)
        torch.testing.assert_close(torch.view_as_complex(dweight), c[:, None] * (X.conj() * G).sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (1, 4)], ids=str)
def test_modes_of_the_module(grid: tuple[int, int], layout: str) -> None:
    """Check 9: "separable" is Y = a Re X + i b Im X; "amplitude" commutes with the reversal."""
    H, W = grid
    x = images(2, H, W, 3, torch.float64, layout)
    dims = (1, 2) if layout == "NHWC" else (2, 3)
    separable = FourierFilter2d(3, H, W, layout, "separable", dtype=torch.float64)
    a, b = separable.weight.detach().unbind(-1) if layout == "NHWC" else separable.weight.detach().permute(3, 2, 0, 1)
    X = torch.fft.rfft2(x, dim=dims)
    want = torch.fft.irfft2(torch.complex(a * X.real, b * X.imag), s=(H, W), dim=dims)
    torch.testing.assert_close(separable(x), want)
    assert torch.autograd.gradcheck(separable, (x.clone().requires_grad_(),))

    amplitude = FourierFilter2d(3, H, W, layout, "amplitude", dtype=torch.float64)

    def reversal(z: Tensor) -> Tensor:
        return z.flip(dims).roll((1, 1), dims)

    torch.testing.assert_close(amplitude(reversal(x)), reversal(amplitude(x)))
    K = torch.nn.functional.softplus(amplitude.weight.detach())
    assert bool((K > 0).all())
    torch.testing.assert_close(amplitude(x), fourier_filter2d(x, K.to(torch.complex128), layout=layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "C"), [((56, 56), 64), ((28, 28), 128), ((14, 14), 256), ((7, 7), 512)], ids=str)
def test_stages_of_the_backbone(grid: tuple[int, int], C: int, dtype: torch.dtype) -> None:
    """Check 10: the four stage sizes against the composite in float64."""
    x, g = images(2, *grid, C, dtype), images(2, *grid, C, dtype, seed=2)
    weight = weights(*grid, C, torch.float32)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = fourier_filter2d(*leaves)
    dx, dweight = torch.autograd.grad(y, leaves, g)
    want_dx, want_dweight = composite_gradients(g, x.detach(), weight.detach())
    assert error(y.detach(), composite(x.detach(), weight.detach())) <= TOLERANCE[dtype]
    assert error(dx, want_dx) <= TOLERANCE[dtype]
    assert error(dweight, want_dweight) <= TOLERANCE[torch.float32]


# ------------------------------------------------------------------------------------------------ robustness


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_plane(dtype: torch.dtype, value: float) -> None:
    for layout in LAYOUTS:
        for H, W in ((7, 7), (6, 5), (1, 3), (16, 16)):
            x, weight = images(4, H, W, 20, dtype, layout), weights(H, W, 20, weight_dtype(dtype))
            clean = fourier_filter2d(x, weight, layout=layout)
            (x[1, 0, 1, 17] if layout == "NHWC" else x[1, 17, 0, 1]).fill_(value)
            y = fourier_filter2d(x, weight, layout=layout)
            wrong = torch.zeros_like(y, dtype=torch.bool)
            (wrong[1, :, :, 17] if layout == "NHWC" else wrong[1, 17]).fill_(True)
            assert bool(y[wrong].isnan().all())
            assert torch.equal(y[~wrong], clean[~wrong])
            g = torch.ones_like(x)
            dx, dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
            assert bool(dx.isfinite().all())
            assert bool(dweight[:, :, 17].isnan().any())
            assert bool(dweight[:, :, :17].isfinite().all())


def test_the_largest_16_bit_numbers() -> None:
    """The spectrum is far beyond the range of float16; results beyond it are infinite, those in it are not."""
    x = torch.full((1, 16, 16, 3), 6e4, dtype=torch.float16)
    one = torch.zeros(16, 9, 3, 2)
    one[..., 0] = 1
    assert torch.equal(fourier_filter2d(x, one), x)
    assert bool(fourier_filter2d(x, 2 * one).isposinf().all())
    assert torch.equal(
        fourier_filter2d(torch.full((1, 4, 4, 1), 2.0**-24).half(), one[:4, :3, :1])[0, 0, 0, 0], x.new_tensor(2.0**-24)
    )


def test_an_image_does_not_see_its_batch() -> None:
    """To the last bit, beside images of any size as well."""
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = images(7, 9, 14, 20, dtype, layout), weights(9, 14, 20, torch.float32)
            y = fourier_filter2d(x, weight, layout=layout)
            for part in (slice(0, 1), slice(3, 6), slice(5, 7)):
                assert torch.equal(fourier_filter2d(x[part], weight, layout=layout), y[part])
            x[3] *= 1e6
            assert torch.equal(fourier_filter2d(x, weight, layout=layout)[[2, 4]], y[[2, 4]])
            blocks = weights(9, 14, 20, torch.float32, 2)
            y = fourier_filter2d(x, blocks, layout=layout)
            for part in (slice(0, 1), slice(3, 6), slice(5, 7)):
                assert torch.equal(fourier_filter2d(x[part], blocks, layout=layout), y[part])
            x[3, 0, 0, 0] = torch.nan
            y[3] = fourier_filter2d(x[3:4], blocks, layout=layout)
            assert torch.equal(fourier_filter2d(x, blocks, layout=layout).nan_to_num(), y.nan_to_num())
            bad = y[3].isnan().all(dim=(0, 1) if layout == "NHWC" else (1, 2))
            assert int(bad.sum()) == 10
            assert bool(y[3].isnan().sum() == 10 * 9 * 14)


def test_the_same_bits_for_any_number_of_threads() -> None:
    for H, W, C, groups in ((14, 14, 48, None), (5, 6, 100, None), (33, 20, 7, None), (14, 14, 48, 2), (5, 6, 99, 3)):
        x, g = (images(23, H, W, C, torch.float32, seed=s) for s in (0, 2))
        weight = weights(H, W, C, torch.float32, groups)
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            backward = OPERATORS.fourier_filter2d_backward(g, x, weight, "NHWC", "ortho")
            results.append((fourier_filter2d(x, weight), *backward))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def largest_errors_of_this_level() -> None:
    """Prints the level in use and the largest error over its tolerance."""
    torch.set_num_threads(1)
    worst = 0.0
    for dtype in DTYPES:
        for layout in LAYOUTS:
            sizes = ((7, 7, None), (14, 16, None), (28, 8, None), (11, 30, None), (64, 56, None), (1, 1, None))
            for H, W, groups in (*sizes, (14, 14, 1), (6, 5, 3)):
                x, g = (images(3, H, W, 21, dtype, layout, seed=s) for s in (0, 2))
                weight = weights(H, W, 21, weight_dtype(dtype), groups)
                dx, dweight = OPERATORS.fourier_filter2d_backward(g, x, weight, layout, "ortho")
                want_dx, want_dweight = composite_gradients(g, x, weight, layout)
                y = fourier_filter2d(x, weight, layout=layout)
                rounding = TOLERANCE[dtype] * (1.5 if H == 1 else 1)
                worst = max(worst, error(y, composite(x, weight, layout)) / rounding, error(dx, want_dx) / rounding)
                worst = max(worst, error(dweight, want_dweight) / TOLERANCE[weight_dtype(dtype)])
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    for numbers in (halves, halves.view(torch.bfloat16)):  # all but those whose double overflows
        x = numbers[numbers.float().abs() <= 1e38]
        x = x[: len(x) // 17 * 17].reshape(-1, 1, 1, 17)  # a full vector and the rest of one
        one = torch.tensor([1.0, 0.0]).expand(1, 1, 17, 2)
        worst = worst if torch.equal(fourier_filter2d(x, one), x) else math.inf
    print(torch.ops.neuraldeps.cpu_levels()[2], worst)


def test_every_instruction_set_level(cpu_levels: list[str], run_python: Callable[..., object]) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_fourier_filter import *; largest_errors_of_this_level()"
    )
    for level in cpu_levels:
        result = run_python(code, str(ROOT / "tests"), NEURALDEPS_CPU_LEVEL=level, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        used, worst = result.stdout.split()
        assert used == level
        assert float(worst) <= 1


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """The kernels alone, on images, weights and work space of exactly the sizes they ask for; compiled as they stand,
    since the unrolled lengths take a minute to optimise."""
    assert_sanitized("fourier_filter_sanitizer_driver.cpp", "fourier_filter.cpp", flags=["-O0"])


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("groups", [None, 2], ids=str)
def test_opcheck(groups: int | None) -> None:
    for layout in LAYOUTS:
        for dtype in (torch.float64, torch.bfloat16):
            x, weight = images(2, 3, 4, 4, dtype, layout), weights(3, 4, 4, weight_dtype(dtype), groups)
            for leaf in (x, in_memory_order(x, layout, True), x[:0]):
                leaves = leaf.requires_grad_(dtype != torch.bfloat16), weight.requires_grad_(dtype != torch.bfloat16)
                torch.library.opcheck(OPERATORS.fourier_filter2d.default, (*leaves, layout, "ortho"))
                torch.library.opcheck(
                    OPERATORS.fourier_filter2d_backward.default,
                    (x[:0] if len(leaf) == 0 else x, *leaves, layout, "ortho"),
                )
                x = x.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 2], ids=str)
def test_vmap_and_func(groups: int | None, layout: str) -> None:
    H, W = 4, 3

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return fourier_filter2d(x, weight, layout=layout)

    xs = torch.stack([images(2, H, W, 4, torch.float64, layout, seed=s) for s in range(3)])
    ws = torch.stack(
        [weights(H, W, 4, groups=groups), weights(H, W, 4, groups=groups) + 1, weights(H, W, 4, groups=groups) - 1], -1
    )
    each = [function(x, w) for x, w in zip(xs, ws.unbind(-1), strict=True)]
    torch.testing.assert_close(vmap(function, (0, -1))(xs, ws), torch.stack(each))
    torch.testing.assert_close(
        vmap(function, (1, None))(xs.transpose(0, 1), ws[..., 0])[1], function(xs[1], ws[..., 0])
    )
    torch.testing.assert_close(vmap(function, (None, -1))(xs[0], ws)[1], function(xs[0], ws[..., 1]))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight).pow(3).sum()

    gradients = vmap(grad(loss, (0, 1)), (0, -1))(xs, ws)
    leaves = xs[1].clone().requires_grad_(), ws[..., 1].clone().requires_grad_()
    for got, want in zip(gradients, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(got[1], want)
    tangents = images(2, H, W, 4, torch.float64, layout, seed=9), ws[..., 2]
    y, dy = jvp(function, (xs[0], ws[..., 0]), tangents)
    torch.testing.assert_close(y, each[0])
    torch.testing.assert_close(dy, function(tangents[0], ws[..., 0]) + function(xs[0], tangents[1]))
    x = xs[0, :1].clone()
    second = hessian(lambda z: loss(z, ws[..., 0]))(x)
    torch.testing.assert_close(second, torch.autograd.functional.hessian(lambda z: loss(z, ws[..., 0]), x))


def test_compile_export_and_autocast() -> None:
    x, layer = images(2, 6, 5, 4, torch.float32), FourierFilter2d(4, 6, 5)
    modes = (
        (layer, "inductor"),
        *((FourierFilter2d(4, 6, 5, mode=m), "aot_eager") for m in ("separable", "amplitude")),
    )
    for module, backend in modes:
        gradients = []
        for function in (module, torch.compile(module, fullgraph=True, backend=backend)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            function(leaf).square().sum().backward()
            gradients.append((leaf.grad, module.weight.grad.clone()))
        torch.testing.assert_close(*gradients)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},))
    more = images(5, 6, 5, 4, torch.float32)
    torch.testing.assert_close(exported.module()(more), layer(more))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        half = layer(torch.nn.functional.linear(x, torch.eye(4)))
        assert half.dtype == torch.bfloat16
        assert error(half.detach(), composite(x.bfloat16(), layer.weight.detach())) <= 3e-3


# ------------------------------------------------------------------------------------------------ the module


def test_weights_of_gfnet_load() -> None:
    """GFNet's layout [H, W//2+1, C, 2] and its name; another grid by bicubic interpolation, which keeps the corners."""
    weight = weights(7, 7, 3, torch.float32)
    layer = FourierFilter2d(3, 7, 7)
    layer.load_state_dict({"complex_weight": weight})
    assert torch.equal(layer.weight, weight)
    stack = torch.nn.Sequential(torch.nn.Identity(), FourierFilter2d(3, 7, 7))
    stack.load_state_dict({"1.complex_weight": weight})
    assert torch.equal(stack[1].weight, weight)
    x = images(2, 7, 7, 3, torch.float32)
    tokens = x.flatten(1, 2)
    assert torch.equal(layer(tokens), layer(x).flatten(1, 2))
    assert error(layer(x).detach(), composite(x, weight)) <= 5e-7

    larger = resize_filter(weight, 14, 12)
    assert larger.shape == (14, 7, 3, 2)
    for u, v in ((0, 0), (-1, 0), (0, -1), (-1, -1)):
        torch.testing.assert_close(larger[u, v], weight[u, v])
    torch.testing.assert_close(resize_filter(weight, 7, 7), weight)
    assert torch.equal(torch.view_as_real(resize_filter(torch.view_as_complex(weight), 14, 12)), larger)
    blocks = resize_filter(weights(4, 4, 6, torch.float32, 2), 8, 8)
    assert blocks.shape == (8, 5, 2, 3, 3, 2)
    assert resize_filter(torch.ones(3, 2), 5, 5).shape == (5, 3)


def test_modules_of_blocks_and_other_dtypes() -> None:
    x = images(2, 4, 5, 6, torch.float32)
    layer = FourierFilter2d(6, 4, 5, groups=2)
    assert layer.weight.shape == (4, 3, 2, 3, 3, 2)
    assert error(layer(x).detach(), composite(x, layer.weight.detach())) <= 5e-7
    assert "groups=2" in repr(layer)
    halved = FourierFilter2d(6, 4, 5).bfloat16()
    y = halved(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert halved.weight.grad is not None
    assert halved.weight.grad.dtype == torch.bfloat16
    shared = normal((2, 3, 3, 2), torch.float32).expand(4, 3, 2, 3, 3, 2)  # AFNO: one block for all frequencies
    assert error(fourier_filter2d(x, shared), composite(x, shared)) <= 5e-7


def test_the_low_pass_filter_is_learned() -> None:
    """Check 14: regression on an ideal low-pass response, from the identity."""
    generator = torch.Generator().manual_seed(0)
    layer = FourierFilter2d(2, 8, 8)
    u, v = torch.fft.fftfreq(8)[:, None], torch.fft.rfftfreq(8)[None]
    mask = ((u.square() + v.square()).sqrt() < 0.25).float()[..., None].expand(8, 5, 2)
    target = torch.stack([mask, torch.zeros_like(mask)], -1)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.ones(8, 5, 2), torch.zeros(8, 5, 2)], -1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(400):
        x = torch.randn(16, 8, 8, 2, generator=generator)
        optimizer.zero_grad()
        (layer(x) - fourier_filter2d(x, target)).square().mean().backward()
        optimizer.step()
    learned = layer.weight.detach()
    assert float((learned[..., 0] - mask).abs().max()) <= 1e-3
    assert float(learned[..., 1].abs().max()) < 0.05


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, w: fourier_filter2d(x[0], w), ValueError, r"x must be \[B, H, W, C\].*not \[4, 5, 6\]"),
        (lambda x, w: fourier_filter2d(x[:, :0], w), ValueError, "x must be"),
        (
            lambda x, w: fourier_filter2d(x, w[:, :2]),
            ValueError,
            r"weight must be \[4, 3, 6\] complex.*not torch.float32",
        ),
        (lambda x, w: fourier_filter2d(x, w, layout="NCHW"), ValueError, r"weight must be \[5, 4, 4\]"),
        (lambda x, w: fourier_filter2d(x, w[..., None, :]), ValueError, "weight must be"),
        (lambda x, w: fourier_filter2d(x, w, layout="HWC"), ValueError, "layout must be"),
        (lambda x, w: fourier_filter2d(x, w, norm="none"), ValueError, "norm must be"),
        (lambda x, w: fourier_filter2d(x, w.to("meta")), ValueError, "x and weight must be on one device"),
        (lambda x, w: fourier_filter2d(x.int(), w), TypeError, "x must be float32"),
        (lambda x, w: fourier_filter2d(x, w.int()), TypeError, "weight must be complex or floating-point"),
        (lambda x, w: fourier_filter2d(x.numpy(), w), TypeError, "x must be a torch.Tensor, not ndarray"),
        (lambda x, w: OPERATORS.fourier_filter2d(x, w.double(), "NHWC", "ortho"), ValueError, "weight must be"),
        (lambda x, w: OPERATORS.fourier_filter2d(x, w, "CHW", "ortho"), ValueError, "layout must be"),
        (lambda x, w: OPERATORS.fourier_filter2d_backward(x[:1], x, w, "NHWC", "ortho"), ValueError, "grad must have"),
        (lambda x, w: FourierFilter2d(0, 4, 5), ValueError, "channels must be at least 1, not 0"),
        (lambda x, w: FourierFilter2d(6, 4, 5, layout="x"), ValueError, "layout must be"),
        (lambda x, w: FourierFilter2d(6, 4, 5, mode="x"), ValueError, "mode must be"),
        (lambda x, w: FourierFilter2d(6, 4, 5, groups=4), ValueError, "groups must divide channels"),
        (lambda x, w: FourierFilter2d(6, 4, 5, mode="amplitude", groups=2), ValueError, "groups must divide channels"),
        (lambda x, w: FourierFilter2d(6, 4, 5)(x[:, 0]), ValueError, r"x must be \[B, 4 \* 5, 6\] tokens"),
        (lambda x, w: FourierFilter2d(6, 5, 5)(x), ValueError, "weight must be"),
        (lambda x, w: resize_filter(w[0, 0, 0], 4, 4), ValueError, "weight must be"),
    ],
)
def test_bad_input(call: Callable[[Tensor, Tensor], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(images(2, 4, 5, 6, torch.float32), weights(4, 5, 6, torch.float32))
