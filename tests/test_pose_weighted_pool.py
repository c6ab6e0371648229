"""Pose-weighted pooling against float64 and its own algebra; checks 1 to 4 are named in the docstrings."""

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
from neuraldeps_kernels.reference import pose_weighted_pool as reference

OPS = torch.ops.neuraldeps
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Largest error relative to the largest value, of results in that dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 5e-3, torch.float16: 7e-4}

pytestmark = pytest.mark.usefixtures("one_thread")

# [N, C, h, w] and K: the small network; more channels than a block; odd everything; one map; maps beyond the registers;
# fewer channels than a vector.
CASES = [
    ((3, 128, 8, 4), 5),
    ((1, 600, 16, 8), 4),
    ((2, 37, 7, 5), 3),
    ((2, 20, 3, 3), 1),
    ((1, 40, 16, 8), 17),
    ((2, 3, 5, 1), 2),
]


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def positive(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(features: Tensor, maps: Tensor, groups: bool = False, eps: float = 1e-6) -> Tensor:
    """By einsum in float64; with groups the blocks (k, group k) of it."""
    F, H = features.double(), maps.double()
    pooled = torch.einsum("nchw,nkhw->nkc", F, H) / (H.sum((2, 3)) + eps)[:, :, None]
    if not groups:
        return pooled
    C, K = F.shape[1], H.shape[1]
    ends = [k * (C // K) for k in range(K)] + [C]
    return torch.cat([pooled[:, k, ends[k] : ends[k + 1]] for k in range(K)], 1)


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


# ------------------------------------------------------------------------------------------------ against float64


@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "K"), CASES, ids=str)
def test_forward_and_gradients(shape: tuple[int, ...], K: int, dtype: torch.dtype, last: bool, groups: bool) -> None:
    """Check 1: equality with einsum."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [normal(shape, dtype, 0, last), positive((shape[0], K, *shape[2:]), wide)]
    leaves = [t.requires_grad_() for t in leaves]
    pooled = nk.pose_weighted_pool(*leaves, groups=groups)
    grad = normal(tuple(pooled.shape), dtype, 2)
    dF, dH = torch.autograd.grad(pooled, leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = oracle(*exact, groups)
    want_dF, want_dH = torch.autograd.grad(want, exact, grad.double())
    assert pooled.dtype == dF.dtype == dtype
    assert dH.dtype == wide
    assert dF.stride() == leaves[0].stride()
    assert largest_error(pooled, want) <= TOLERANCE[dtype]
    assert largest_error(dF, want_dF) <= TOLERANCE[dtype]
    assert largest_error(dH, want_dH) <= TOLERANCE[wide]


@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
def test_gradcheck_to_second_order(groups: bool) -> None:
    """Check 1: in float64 for features and maps."""
    leaves = [normal((2, 5, 3, 2), torch.float64), positive((2, 2, 3, 2), torch.float64)]
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda F, H: nk.pose_weighted_pool(F, H, groups=groups), leaves)
    assert torch.autograd.gradgradcheck(lambda F, H: nk.pose_weighted_pool(F, H, groups=groups), leaves)


@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
def test_reference_is_the_definition(groups: bool) -> None:
    leaves = [t.requires_grad_() for t in (normal((2, 7, 4, 3)).double(), positive((2, 3, 4, 3)).double())]
    pooled = reference.pose_weighted_pool(*leaves, groups=groups)
    want = oracle(*leaves, groups)
    assert largest_error(pooled, want) < 1e-15
    grad = normal(tuple(pooled.shape)).double()
    found = reference.pose_weighted_pool_backward(grad, *leaves, groups, 1e-6, True, True)
    for a, b in zip(found, torch.autograd.grad(want, leaves, grad), strict=True):
        assert largest_error(a, b) < 1e-14


# ------------------------------------------------------------------------------------------------ properties


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1000),
)
def test_algebra_of_any_shape(shape: tuple[int, ...], K: int, dtype: torch.dtype, last: bool, seed: int) -> None:
    """Checks 1, 2 and 4: ones give the plain mean, one cell its value, zeros exactly 0 and no gradient; a factor
    changes nothing; maps permute; linear in F; groups are blocks of the whole."""
    N, C, h, w = shape
    F = normal(shape, dtype, seed, last).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    H = 0.1 + positive((N, K, h, w), wide, seed)
    limit = 1e-5 + 4 * TOLERANCE[dtype]

    ones, cell, zero = torch.ones(N, 1, h, w), torch.zeros(N, 1, h, w), torch.zeros(N, 1, h, w)
    cell[:, :, seed % h, seed % w] = 1
    pooled = nk.pose_weighted_pool(F, torch.cat([ones, cell, zero, H.float()], 1))
    torch.testing.assert_close(pooled[:, 0].double(), F.double().mean((2, 3)), rtol=limit, atol=limit)
    torch.testing.assert_close(pooled[:, 1].double(), F.double()[:, :, seed % h, seed % w], rtol=limit, atol=limit)
    assert not pooled[:, 2].any()
    assert not torch.autograd.grad(pooled[:, 2].sum(), F)[0].any()

    plain = nk.pose_weighted_pool(F, H)
    torch.testing.assert_close(nk.pose_weighted_pool(F, 8 * H), plain, rtol=limit, atol=limit)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nk.pose_weighted_pool(F, H[:, order]), plain[:, order])
    other = normal(shape, dtype, seed + 1, last)
    both = nk.pose_weighted_pool((F + other).detach(), H)
    parts = plain + nk.pose_weighted_pool(other, H)
    torch.testing.assert_close(both, parts, rtol=4 * limit, atol=4 * limit)

    if C >= K:
        by_group = nk.pose_weighted_pool(F, H, groups=True)
        group = reference.group_of_channel(C, K, F.device)
        assert torch.equal(by_group, plain[:, group, torch.arange(C)])


def test_zero_map_has_a_finite_gradient() -> None:
    """Check 2: of the maps too."""
    leaves = [normal((1, 6, 4, 2)).requires_grad_(), torch.zeros(1, 2, 4, 2, requires_grad=True)]
    for groups in (False, True):
        found = torch.autograd.grad(nk.pose_weighted_pool(*leaves, groups=groups).sum(), leaves)
        assert not found[0].any()
        assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_what_lies_outside_a_map_does_not_matter(last: bool) -> None:
    """Check 3: features there changed by 1e3, the same result."""
    F, H = normal((2, 40, 8, 4), last=last), positive((2, 3, 8, 4))
    H[:, :, 3:6] = 0
    noisy = F.clone()
    noisy[:, :, 3:6] += 1e3 * normal((2, 40, 3, 4), seed=3)
    assert torch.equal(nk.pose_weighted_pool(noisy, H), nk.pose_weighted_pool(F, H))


def test_groups_receive_no_gradient_of_another_map() -> None:
    """Check 4."""
    F, H = normal((2, 11, 4, 3)).requires_grad_(), positive((2, 3, 4, 3)).requires_grad_()
    pooled = nk.pose_weighted_pool(F, H, groups=True)
    for k, channels in enumerate((slice(0, 3), slice(3, 6), slice(6, 11))):
        dF, dH = torch.autograd.grad(pooled[:, channels].sum(), [F, H], retain_graph=True)
        outside = [c for c in range(11) if c not in range(*channels.indices(11))]
        assert not dF[:, outside].any()
        assert bool(dF[:, channels].all())
        assert [bool(dH[:, j].any()) for j in range(3)] == [j == k for j in range(3)]


def test_flipped_maps_and_features() -> None:
    """Check 8 of the pooling: the order of positions does not matter."""
    F, H = normal((2, 30, 8, 4)), positive((2, 4, 8, 4))
    torch.testing.assert_close(
        nk.pose_weighted_pool(F.flip(3), H.flip(3)), nk.pose_weighted_pool(F, H), rtol=1e-6, atol=1e-6
    )


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    F, H = normal((2, 20, 4, 4)), positive((2, 3, 4, 4))
    both = [t.clone().requires_grad_() for t in (F, H)]
    expected = torch.autograd.grad(nk.pose_weighted_pool(*both).square().sum(), both)
    for k in range(2):
        leaves = [F.clone(), H.clone()]
        leaves[k].requires_grad_()
        (found,) = torch.autograd.grad(nk.pose_weighted_pool(*leaves).square().sum(), leaves[k])
        assert torch.equal(found, expected[k])


def test_strides_that_need_a_copy_and_nothing_at_all() -> None:
    base, maps = normal((4, 12, 8, 8)), positive((6, 4, 8, 4)).transpose(0, 1)
    F, H = base[:, ::2, :, ::2], maps[:, ::2]
    assert torch.equal(nk.pose_weighted_pool(F, H), nk.pose_weighted_pool(F.contiguous(), H.contiguous()))
    x = F.contiguous().requires_grad_()
    (dF,) = torch.autograd.grad(nk.pose_weighted_pool(x, H).sum(), x)  # a gradient of stride 0
    torch.testing.assert_close(dF[:, 0], (H / (H.sum((2, 3), keepdim=True) + 1e-6)).sum(1))
    for N, C, K, h in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        leaves = [torch.zeros(N, C, h, 2, requires_grad=True), torch.zeros(N, K, h, 2, requires_grad=True)]
        pooled = nk.pose_weighted_pool(*leaves)
        assert pooled.shape == (N, K, C)
        assert not pooled.any()
        for leaf, found in zip(leaves, torch.autograd.grad(pooled.sum(), leaves), strict=True):
            assert found.shape == leaf.shape
            assert not found.any()


def test_the_same_bits_with_any_number_of_threads() -> None:
    for last in (False, True):
        leaves = [t.requires_grad_() for t in (normal((3, 700, 8, 4), last=last), positive((3, 4, 8, 4)))]
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pooled = nk.pose_weighted_pool(*leaves)
            found.append([pooled, *torch.autograd.grad(pooled.square().sum(), leaves)])
        torch.set_num_threads(1)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
def test_opcheck(groups: bool, last: bool) -> None:
    leaves = [t.requires_grad_() for t in (normal((2, 5, 4, 3), last=last), positive((2, 2, 4, 3)))]
    torch.library.opcheck(OPS.pose_weighted_pool.default, (*leaves, groups, 1e-6))
    plain = [t.detach() for t in leaves]
    grad = normal((2, 5) if groups else (2, 2, 5), seed=2)
    for of_features, of_maps in ((True, True), (True, False), (False, True)):
        arguments = (grad, *plain, groups, 1e-6, of_features, of_maps)
        torch.library.opcheck(OPS.pose_weighted_pool_backward.default, arguments)


def test_compile_transforms_and_autocast() -> None:
    leaves = [t.requires_grad_() for t in (normal((2, 6, 4, 3)), positive((2, 2, 4, 3)))]

    def loss(F: Tensor, H: Tensor) -> Tensor:
        return nk.pose_weighted_pool(F, H).square().sum() + nk.pose_weighted_pool(F, H, groups=True).square().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found in (torch.autograd.grad(compiled(*leaves), leaves), torch.func.grad(loss, (0, 1))(*leaves)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nk.pose_weighted_pool(*leaves), nk.pose_weighted_pool(leaves[0].detach(), leaves[1]))
        half = leaves[0].bfloat16()
        assert nk.pose_weighted_pool(half, leaves[1]).dtype == torch.bfloat16
    assert nk.pose_weighted_pool(leaves[0], leaves[1].bfloat16()).dtype == torch.float32


def test_bad_input() -> None:
    F, H = normal((2, 6, 4, 3)), positive((2, 2, 4, 3))
    for error, words, arguments, options in [
        (TypeError, "features must be a torch.Tensor", (F.numpy(), H), {}),
        (TypeError, "features must be float32", (F.int(), H), {}),
        (TypeError, "maps must be a floating", (F, H.int()), {}),
        (ValueError, r"features must be \[N, C, h, w\]", (F[0], H), {}),
        (ValueError, r"maps must be \[2, K, 4, 3\]", (F, H[:1]), {}),
        (ValueError, r"maps must be \[2, K, 4, 3\]", (F, H[..., :2]), {}),
        (ValueError, "maps are on meta", (F, H.to("meta")), {}),
        (ValueError, r"1\.\.6 maps", (F, positive((2, 7, 4, 3))), {"groups": True}),
        (ValueError, r"1\.\.6 maps", (F, H[:, :0]), {"groups": True}),
        (ValueError, "eps must be positive", (F, H), {"eps": 0.0}),
        (ValueError, "eps must be positive", (F, H), {"eps": float("nan")}),
    ]:
        with pytest.raises(error, match=words):
            nk.pose_weighted_pool(*arguments, **options)
    for words, arguments in [
        ("maps must be", (F, H.double(), False, 1e-6)),
        ("maps must be", (F, H[:, :, :2], False, 1e-6)),
        ("maps must be 1..6", (F, positive((2, 7, 4, 3)), True, 1e-6)),
        ("eps must be positive", (F, H, False, -1.0)),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=words):
            OPS.pose_weighted_pool(*arguments)


# ------------------------------------------------------------------------------------------------ every level

LEVEL_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_pose_weighted_pool as tests
torch.set_num_threads(1)
for dtype in tests.DTYPES:
    for shape, K in tests.CASES:
        for case in range(4):
            tests.test_forward_and_gradients(shape, K, dtype, case % 2 == 0, case < 2)
tests.test_algebra_of_any_shape()
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


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """Memory and arithmetic of the kernels of region_mixup and pose_weighted_pool."""
    kernels = ("region_mixup.cpp", "pose_weighted_pool.cpp")
    assert_sanitized("reid_ops_sanitizer_driver.cpp", *kernels, flags=["-O0"])  # a third of the time with -O1
