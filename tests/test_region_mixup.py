"""Region-wise mixup against float64 and its own algebra; checks 1 and 2 of the mixup are named in the docstrings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.reference import region_mixup as reference

OPS = torch.ops.neuraldeps
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Largest error of a pixel or gradient of images, relative to the largest value, and of a gradient of ratios.
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 5e-3, torch.float16: 6e-4}
RATIO_TOLERANCE = {torch.float64: 1e-14}

pytestmark = pytest.mark.usefixtures("one_thread")

# [N, C, H, W] and regions: stripes; a grid that divides neither H nor W; a pixel a region; one pixel; rows beyond a
# vector.
CASES = [
    ((2, 3, 24, 12), (6, 1)),
    ((3, 3, 23, 37), (5, 4)),
    ((2, 1, 3, 5), (3, 5)),
    ((1, 2, 1, 1), (1, 1)),
    ((2, 5, 4, 70), (1, 3)),
]


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def ratios(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(x_v: Tensor, x_i: Tensor, ratio: Tensor, soft: int) -> Tensor:
    """Pixel by pixel in float64, from the definition: each border is a ramp of `soft` pixels."""
    v, i, lam = x_v.double(), x_i.double(), ratio.double()
    lam = lam if lam.dim() == 3 else lam[:, :, None]
    H, W = v.shape[2:]
    rows, columns = (
        torch.tensor([[share(p, a, n, R, soft) for a in range(R)] for p in range(n)]).double()
        for n, R in ((H, lam.shape[1]), (W, lam.shape[2]))
    )
    a = torch.einsum("ha,nab,wb->nhw", rows, lam, columns)[:, None]
    return a * v + (1 - a) * i


def share(pixel: int, region: int, pixels: int, regions: int, soft: int) -> float:
    """Part of a region in a pixel: what rises at the region's border less what rises at the next one's."""

    def risen(border: int) -> float:
        at = -(-border * pixels // regions)
        if border == 0 or border == regions:
            return float(border == 0)
        return min(1.0, max(0.0, (pixel + 0.5 - at) / soft + 0.5)) if soft else float(pixel >= at)

    return risen(region) - risen(region + 1)


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


# ------------------------------------------------------------------------------------------------ against float64


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "regions"), CASES, ids=str)
def test_forward_and_gradients(
    shape: tuple[int, ...], regions: tuple[int, int], dtype: torch.dtype, last: bool
) -> None:
    for soft in (0, 1, 2, 4):
        if any(R > 1 and soft > n // R for n, R in zip(shape[2:], regions, strict=True)):
            continue
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [images(shape, dtype, 0, last), images(shape, dtype, 1), ratios((shape[0], *regions), wide)]
        leaves = [t.requires_grad_() for t in leaves]
        grad = images(shape, dtype, 2)
        mixed = nk.region_mixup(*leaves, soft=soft)
        found = torch.autograd.grad(mixed, leaves, grad)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want = oracle(*exact, soft)
        expected = torch.autograd.grad(want, exact, grad.double())
        assert mixed.dtype == dtype
        assert mixed.stride() == found[0].stride() == leaves[0].stride()
        assert largest_error(mixed, want) <= TOLERANCE[dtype]
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert largest_error(a, b) <= TOLERANCE[dtype]
        assert largest_error(found[2], expected[2]) <= RATIO_TOLERANCE.get(dtype, 3e-6)
        assert found[2].dtype == wide


def test_reference_is_the_definition() -> None:
    for shape, regions in CASES:
        x_v, x_i, ratio = (
            images(shape).double(),
            images(shape, seed=1).double(),
            ratios((shape[0], *regions)).double(),
        )
        for soft in (0, 1, min(n // R for n, R in zip(shape[2:], regions, strict=True))):
            assert (
                largest_error(reference.region_mixup(x_v, x_i, ratio, soft=soft), oracle(x_v, x_i, ratio, soft)) < 1e-14
            )


@pytest.mark.parametrize("soft", [0, 2])
def test_gradcheck_to_second_order(soft: int) -> None:
    """Check 1: ratios and both images."""
    leaves = [images((2, 2, 5, 4), torch.float64, 0), images((2, 2, 5, 4), torch.float64, 1)]
    leaves = [t.requires_grad_() for t in (*leaves, 0.1 + 0.8 * ratios((2, 2, 2), torch.float64))]
    assert torch.autograd.gradcheck(lambda *t: nk.region_mixup(*t, soft=soft), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: nk.region_mixup(*t, soft=soft), leaves)


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    for needed in range(1, 8):
        leaves = [images((2, 3, 6, 4)), images((2, 3, 6, 4), seed=1), ratios((2, 3))]
        wanted = [t.requires_grad_() for k, t in enumerate(leaves) if needed >> k & 1]
        every = [t.detach().requires_grad_() for t in leaves]
        found = torch.autograd.grad(nk.region_mixup(*leaves).square().sum(), wanted)
        expected = torch.autograd.grad(nk.region_mixup(*every).square().sum(), every)
        for a, b in zip(found, [g for k, g in enumerate(expected) if needed >> k & 1], strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [0, 2])
def test_ends_are_the_parents_bit_for_bit(dtype: torch.dtype, soft: int) -> None:
    """Check 1: also beside NaN, infinity and negative zero."""
    x_v, x_i = images((2, 3, 12, 19), dtype), images((2, 3, 12, 19), dtype, 1)
    for x in (x_v, x_i):
        x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    x_v[1, 1, 1, :3] = torch.nan
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    for value, parent in ((1.0, x_v), (0.0, x_i)):
        mixed = nk.region_mixup(x_v, x_i, torch.full((2, 3), value), soft=soft)
        assert torch.equal(mixed.view(bits), parent.view(bits))


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 40)),
    st.data(),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_every_grid(shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype, last: bool) -> None:
    """Checks 1 and 2: within the parents; each pixel has one region, whose ratio changes no other pixel; exchanged
    parents and 1 - ratio give the same image; equal ratios are plain mixup."""
    N, _, H, W = shape
    Rh, Rw = data.draw(st.integers(1, H)), data.draw(st.integers(1, W))
    x_v, x_i = images(shape, dtype, 0, last), images(shape, dtype, 1, last)
    ratio = ratios((N, Rh, Rw))
    mixed = nk.region_mixup(x_v, x_i, ratio)
    assert bool((mixed >= torch.minimum(x_v, x_i)).all())
    assert bool((mixed <= torch.maximum(x_v, x_i)).all())

    exchanged = nk.region_mixup(x_i, x_v, 1 - ratio)
    assert float((exchanged.double() - mixed.double()).abs().max()) <= 1e-6 + 4 * TOLERANCE[dtype]
    plain = 0.3 * x_v.double() + 0.7 * x_i.double()
    even = nk.region_mixup(x_v, x_i, torch.full((N, Rh, Rw), 0.3))
    assert float((even.double() - plain).abs().max()) <= 1e-6 + 4 * TOLERANCE[dtype]

    ones, zeros = torch.ones(shape), torch.zeros(shape)
    total = torch.zeros(shape)
    region = data.draw(st.integers(0, Rh * Rw - 1))
    for r in range(Rh * Rw):
        only = torch.zeros(N, Rh * Rw)
        only[:, r] = 1
        cover = nk.region_mixup(ones, zeros, only.view(N, Rh, Rw))
        total += cover
        if r == region:
            changed = ratio.clone().view(N, -1)
            changed[:, r] = 1 - changed[:, r]
            other = nk.region_mixup(x_v, x_i, changed.view(N, Rh, Rw))
            assert torch.equal(other[cover == 0], mixed[cover == 0])
        assert bool(cover.any())
        if r > 8:
            return
    assert torch.equal(total, ones)


def test_a_soft_border_is_a_ramp() -> None:
    x_v, x_i = torch.ones(1, 1, 12, 2), torch.zeros(1, 1, 12, 2)
    mixed = nk.region_mixup(x_v, x_i, torch.tensor([[0.0, 1.0]]), soft=4)
    want = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    assert torch.equal(mixed[0, 0], want[:, None].expand(12, 2))


def test_not_a_number_stays_where_it_is() -> None:
    x_v, x_i = images((1, 2, 6, 20)), images((1, 2, 6, 20), seed=1)
    ratio = torch.tensor([[0.2, torch.nan, 0.7]])
    mixed = nk.region_mixup(x_v, x_i, ratio)
    assert bool(mixed[:, :, 2:4].isnan().all())
    assert not mixed[:, :, [0, 1, 4, 5]].isnan().any()
    x_v[0, 1, 0, 3] = torch.nan
    assert nk.region_mixup(x_v, x_i, torch.full((1, 3), 0.5)).isnan().nonzero().tolist() == [[0, 1, 0, 3]]


def test_strides_that_need_a_copy_and_nothing_at_all() -> None:
    base = images((4, 6, 8, 10))
    x_v, x_i = base[::2, ::2, :, ::2], base[1::2, 1::2, :, 1::2]
    ratio = ratios((3, 2)).T
    want = nk.region_mixup(x_v.contiguous(), x_i.contiguous(), ratio.contiguous())
    assert torch.equal(nk.region_mixup(x_v, x_i, ratio), want)
    x = x_v.contiguous().requires_grad_()
    (dx,) = torch.autograd.grad(nk.region_mixup(x, x_i, ratio).sum(), x)  # a gradient of stride 0
    assert torch.equal(dx, nk.region_mixup(torch.ones_like(x), torch.zeros_like(x), ratio))

    nothing = torch.empty(0, 3, 6, 4, requires_grad=True)
    ratio = torch.empty(0, 2, requires_grad=True)
    found = torch.autograd.grad(nk.region_mixup(nothing, nothing.detach(), ratio).sum(), [nothing, ratio])
    assert [g.shape for g in found] == [nothing.shape, ratio.shape]


def test_the_same_bits_with_any_number_of_threads() -> None:
    leaves = [images((9, 3, 96, 64)), images((9, 3, 96, 64), seed=1), ratios((9, 6, 2))]
    leaves = [t.requires_grad_() for t in leaves]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mixed = nk.region_mixup(*leaves, soft=3)
        found.append([mixed, *torch.autograd.grad(mixed.square().sum(), leaves)])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(last: bool) -> None:
    x_v, x_i, ratio = images((2, 3, 6, 5), last=last), images((2, 3, 6, 5), seed=1), ratios((2, 3, 2))
    leaves = [t.requires_grad_() for t in (x_v, x_i, ratio)]
    torch.library.opcheck(OPS.region_mixup.default, (*leaves, 2))
    plain = [t.detach() for t in leaves]
    for images_too, ratios_too in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (images((2, 3, 6, 5), seed=2), *plain, 1, images_too, ratios_too)
        torch.library.opcheck(OPS.region_mixup_backward.default, arguments)


def test_compile_transforms_and_autocast() -> None:
    leaves = [t.requires_grad_() for t in (images((2, 3, 6, 4)), images((2, 3, 6, 4), seed=1), ratios((2, 3)))]

    def loss(x_v: Tensor, x_i: Tensor, ratio: Tensor) -> Tensor:
        return nk.region_mixup(x_v, x_i, ratio, soft=1).square().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found in (torch.autograd.grad(compiled(*leaves), leaves), torch.func.grad(loss, (0, 1, 2))(*leaves)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nk.region_mixup(*leaves), nk.region_mixup(*leaves))
        assert nk.region_mixup(*leaves).dtype == torch.float32
    half = nk.region_mixup(leaves[0].half(), leaves[1].half(), leaves[2].half())
    assert half.dtype == torch.float16


def test_bad_input() -> None:
    x, ratio = images((2, 3, 6, 4)), ratios((2, 3))
    for error, words, arguments, soft in [
        (TypeError, "x_v must be a torch.Tensor", (x.numpy(), x, ratio), 0),
        (TypeError, "x_v must be float32", (x.int(), x.int(), ratio), 0),
        (TypeError, "x_i must have the dtype", (x, x.double(), ratio), 0),
        (TypeError, "ratio must be a floating", (x, x, ratio.int()), 0),
        (TypeError, "soft must be an int", (x, x, ratio), 1.0),
        (ValueError, r"x_v must be \[N, C, H, W\]", (x[0], x[0], ratio), 0),
        (ValueError, "x_i must have the shape", (x, x[:1], ratio), 0),
        (ValueError, r"ratio must be \[2, R\]", (x, x, ratio[:1]), 0),
        (ValueError, r"ratio must be \[2, R\]", (x, x, ratio[0]), 0),
        (ValueError, r"1\.\.6 regions along H, not 7", (x, x, ratios((2, 7))), 0),
        (ValueError, r"1\.\.6 regions along H, not 0", (x, x, ratios((2, 0))), 0),
        (ValueError, r"1\.\.4 regions along W, not 5", (x, x, ratios((2, 3, 5))), 0),
        (ValueError, "soft must be at least 0", (x, x, ratio), -1),
        (ValueError, "2 pixels along H, not 3", (x, x, ratio), 3),
        (ValueError, "ratio is on meta", (x, x, ratio.to("meta")), 0),
        (ValueError, "ratio must be within", (x, x, ratio + 1), 0),
        (ValueError, "ratio must be within", (x, x, -ratio), 0),
    ]:
        with pytest.raises(error, match=words):
            nk.region_mixup(*arguments, soft=soft)
    for words, arguments in [
        ("soft must be", (x, x, ratio, -1)),
        ("x_i must have shape", (x, x[:1], ratio, 0)),
        ("regions along H", (x, x, ratios((2, 7)), 0)),
        ("ratio must be", (x, x, ratio.double(), 0)),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=words):
            OPS.region_mixup(*arguments)


# ------------------------------------------------------------------------------------------------ every level

LEVEL_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_region_mixup as tests
torch.set_num_threads(1)
for dtype in tests.DTYPES:
    for shape, regions in tests.CASES:
        for last in (False, True):
            tests.test_forward_and_gradients(shape, regions, dtype, last)
    tests.test_ends_are_the_parents_bit_for_bit(dtype, 2)
tests.test_every_grid()
print(json.dumps(torch.ops.neuraldeps.cpu_levels()[2]))
"""


def test_every_instruction_set_level(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Those that are not in use here."""
    for level in set(cpu_levels) - {torch.ops.neuraldeps.cpu_levels()[2]}:
        result = run_python(LEVEL_PROGRAM, __file__.rpartition("/")[0], NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, f"{level}: {result.stderr}"
        assert json.loads(result.stdout.splitlines()[-1]) == level
