"""Singular values, ranks and truncations against LAPACK in float64, planted spectra and invariances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, vmap

from neuraldeps_kernels.ops import spectrum as ops
from neuraldeps_kernels.ops.spectrum import effective_rank, low_rank_project, matrix_rank, stable_rank, svdvals
from neuraldeps_kernels.reference import spectrum as reference

# Matrices this small gain nothing from more, and the oracle's threads would wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Largest error over sigma_1: the rounding of a float32 result, or that of a float64 decomposition.
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 2e-7, torch.float16: 2e-7, torch.float64: 1e-14}
TOLERANCES = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7], dtype=torch.float64)

# [B, m, n]: the smallest; fewer matrices than lanes (8, 4, 2), one chain and a bit, several groups of 16; short sides
# around registers and the tiles of the products (8, 16, 24); tall and wide; around the limits 64 (few matrices), 160
# (ranks by lanes) and 256 (values by lanes).
SHAPES = [
    (3, 1, 1),
    (1, 1, 5),
    (2, 7, 1),
    (5, 2, 2),
    (9, 3, 7),
    (17, 16, 16),
    (33, 9, 4),
    (5, 33, 20),
    (6, 25, 300),
    (1, 64, 70),
    (2, 65, 65),
    (4, 129, 130),
    (2, 161, 170),
    (4, 270, 257),
]


def oracle(a: Tensor) -> np.ndarray:
    return torch.linalg.svdvals(a.double()).numpy()


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(batch: int, n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((batch, n, k), torch.float64, seed))[0]


def planted(batch: int, m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """[B, m, n] float64 with singular values `values` [min(m, n)] or [B, min(m, n)]."""
    k = min(m, n)
    u, v = orthonormal(batch, m, k, seed), orthonormal(batch, n, k, seed + 1)
    return (u * values.expand(batch, k)[:, None, :]) @ v.mT


def count(values: np.ndarray, rtol: Tensor, atol: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Ranks [B, R], and where no value is so near to the threshold that it may count either way."""
    threshold = np.maximum(atol, rtol.numpy() * values[:, :1])  # [B, R]
    distance = np.abs(values[:, None, :] - threshold[:, :, None]).min(-1)
    # Beyond the documented 1e-8, the rounding of the reference itself, and of a float32 input.
    return (values[:, None, :] > threshold[:, :, None]).sum(-1), distance > 1e-8 * threshold + 1e-14 * values[:, :1]


def assert_ranks(got: Tensor, values: np.ndarray, rtol: Tensor, atol: float = 0.0) -> None:
    want, clear = count(values, rtol, atol)
    assert clear.any()
    np.testing.assert_array_equal(got.numpy()[clear], want[clear])


# ------------------------------------------------------------------------------------------------ values and ranks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_ranks_match_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a = normal(shape, dtype, seed=sum(shape))
    values, want = svdvals(a), oracle(a)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values.shape == want.shape
    assert (np.abs(values.double().numpy() - want) <= TOLERANCE[dtype] * want[:, :1]).all()
    rtol = torch.tensor([0.7, 0.1, 1e-2, 1e-4, 1e-7], dtype=torch.float64)
    assert_ranks(matrix_rank(a, rtol=rtol), want, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(40, 16, 16), (20, 64, 64), (10, 40, 200), (6, 128, 100), (3, 190, 200)], ids=str)
@pytest.mark.parametrize("spectrum", ["noise", "exact", "graded", "clustered"])
def test_ranks_down_to_small_tolerances(shape: tuple[int, int, int], dtype: torch.dtype, spectrum: str) -> None:
    B, m, n = shape
    k = min(m, n)
    values = {
        "noise": torch.cat([torch.logspace(0, -1.5, k // 3), torch.full((k - k // 3,), 1e-4)]),
        "exact": torch.cat([torch.ones(k // 3), torch.zeros(k - k // 3)]),
        "graded": torch.logspace(0, -8, k),
        "clustered": torch.cat([torch.ones(k // 2), torch.full((k - k // 2,), 3e-6)]),
    }[spectrum].double()
    a = planted(B, m, n, values).to(dtype)
    assert_ranks(matrix_rank(a, rtol=TOLERANCES), oracle(a), TOLERANCES)


@pytest.mark.parametrize(("n", "batch"), [(8, 1000), (24, 200), (170, 6)])
def test_planted_ranks(n: int, batch: int) -> None:
    """T11 of the paper file: every rank 0..n, condition 1e3."""
    generator = torch.Generator().manual_seed(n)
    rank = torch.arange(batch) % (n + 1)
    values = 10 ** (-3 * torch.rand(batch, n, generator=generator, dtype=torch.float64))
    values = torch.where(torch.arange(n) < rank[:, None], values, 0.0)
    a = planted(batch, n, n, values)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(matrix_rank(a.to(dtype), rtol=1e-4), rank), dtype


def test_the_authors_rule() -> None:
    """T4 of the paper file: on a log-spaced spectrum, counted on the Jacobian and on its Gram matrix."""
    for n in (12, 60, 200):
        cut = (n * 2.0**-23) ** 0.5
        values = torch.logspace(0, -5, n, dtype=torch.float64)
        values = torch.where((values / cut - 1).abs() < 0.05, 1.2 * cut, values).sort(descending=True)[0]
        a = planted(4, 2 * n, n, values)
        want = int((values > cut * values[0]).sum())
        assert matrix_rank(a.float(), rule="authors_gram").tolist() == [want] * 4
        assert matrix_rank(a.mT @ a, rule="authors_gram", hermitian=True).tolist() == [want] * 4


def test_inertia_is_the_count_of_eigenvalues() -> None:
    """T12 of the paper file: 1000 random positive semidefinite matrices, by lanes and by LDL'."""
    for n, batch in ((20, 990), (180, 10)):
        x = normal((batch, n // 2, n), seed=n)
        gram = x.mT @ x
        eigenvalues = np.linalg.eigvalsh(gram.double().numpy())[:, ::-1].copy()
        rtol = torch.tensor([0.3, 0.05, 1e-3], dtype=torch.float64)
        threshold = rtol.numpy() * eigenvalues[:, :1]
        clear = np.abs(eigenvalues[:, None, :] / threshold[:, :, None] - 1).min(-1) > 1e-4
        want = (np.abs(eigenvalues)[:, None, :] > threshold[:, :, None]).sum(-1)
        got = matrix_rank(gram, rtol=rtol, hermitian=True).numpy()
        np.testing.assert_array_equal(got[clear], want[clear])
        assert clear.mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 170])
def test_hermitian(n: int, dtype: torch.dtype) -> None:
    """Eigenvalues of both signs; only the lower triangle is read."""
    a = normal((5, n, n), dtype, seed=n)
    lower = a.tril()
    symmetric = (lower + lower.tril(-1).mT).double()
    values = np.sort(np.abs(np.linalg.eigvalsh(symmetric.numpy())))[:, ::-1]
    rtol = torch.tensor([0.9, 0.5, 0.1, 1e-3], dtype=torch.float64)
    lower[torch.ones(n, n).triu(1).bool().expand(5, n, n)] = 99.0  # not read
    assert_ranks(matrix_rank(lower, rtol=rtol, hermitian=True), values, rtol)


def test_tolerances_are_those_of_torch() -> None:
    a = planted(20, 30, 20, torch.logspace(0, -9, 20, dtype=torch.float64))
    for x in (a.float(), a):
        assert torch.equal(matrix_rank(x), torch.linalg.matrix_rank(x))
        for tolerances in ({"rtol": 1e-3}, {"atol": 2e-4}, {"rtol": 1e-4, "atol": 3e-3}, {"rtol": 1e-2, "atol": 1e-4}):
            assert torch.equal(matrix_rank(x, **tolerances), torch.linalg.matrix_rank(x, **tolerances)), tolerances
    several = matrix_rank(a, rtol=TOLERANCES, atol=5e-6)
    one_by_one = [matrix_rank(a, rtol=t, atol=5e-6) for t in TOLERANCES.tolist()]
    assert torch.equal(several, torch.stack(one_by_one, -1))
    assert matrix_rank(a, rtol=torch.tensor(1e-3)).shape == (20,)
    assert matrix_rank(a, rtol=torch.tensor([])).shape == (20, 0)
    assert matrix_rank(torch.eye(3), rtol=1.0) == 0  # at the threshold is not above it
    assert matrix_rank(torch.eye(3), atol=1e9) == 0
    assert matrix_rank(torch.eye(3), rtol=0.0) == 3


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-37, 2.0**-140])
def test_scale(scale: float) -> None:
    """The last one makes float32 entries subnormal, so the matrix itself is coarser."""
    for n in (6, 40, 180):
        a = (planted(5, n, n, torch.logspace(0, -2, n, dtype=torch.float64)) * scale).float()
        want = oracle(a)
        assert (np.abs(svdvals(a).double().numpy() - want) <= 2e-7 * want[:, :1] + 2.0**-149).all()
        rtol = torch.tensor([0.5, 0.051], dtype=torch.float64)
        assert_ranks(matrix_rank(a, rtol=rtol), want, rtol)
        assert_ranks(matrix_rank(a, atol=0.1 * scale)[:, None], want, torch.zeros(1, dtype=torch.float64), 0.1 * scale)
    a = normal((7, 12, 9), torch.float64) * 1e250
    np.testing.assert_allclose(svdvals(a).numpy(), oracle(a / 1e250) * 1e250, rtol=1e-12)
    assert matrix_rank(a, atol=1e252).tolist() == (oracle(a / 1e250) > 100).sum(-1).tolist()


def test_repeated_and_vanishing_values() -> None:
    for dtype in DTYPES:
        for n in (1, 5, 16, 40, 180):
            eye, ones, zeros = torch.eye(n, dtype=dtype), torch.ones(n, n, dtype=dtype), torch.zeros(n, n, dtype=dtype)
            a = torch.stack([eye, ones, zeros, -3 * eye])
            tolerance = TOLERANCE[dtype]
            values = svdvals(a).double()
            want = torch.zeros(4, n, dtype=torch.float64)
            want[0], want[1, 0], want[3] = 1, n, 3
            assert bool(((values - want).abs() <= tolerance * want[:, :1]).all())
            assert matrix_rank(a, rtol=1e-5).tolist() == [n, 1, 0, n]
            assert matrix_rank(a, rtol=1e-5, hermitian=True).tolist() == [n, 1, 0, n]
            torch.testing.assert_close(
                effective_rank(a).double(), torch.tensor([n, 1, 0, n]).double(), rtol=1e-4, atol=0
            )
            torch.testing.assert_close(stable_rank(a).double(), torch.tensor([n, 1, 0, n]).double(), rtol=1e-5, atol=0)


def test_empty_and_batch_shapes() -> None:
    assert svdvals(torch.zeros(0, 3, 4)).shape == (0, 3)
    assert svdvals(torch.zeros(2, 0, 4)).shape == (2, 0)
    assert matrix_rank(torch.zeros(2, 0, 4)).tolist() == [0, 0]
    assert matrix_rank(torch.zeros(0, 3, 3), rtol=TOLERANCES).shape == (0, 6)
    assert effective_rank(torch.zeros(2, 3, 0)).tolist() == [0, 0]
    assert stable_rank(torch.zeros(2, 0, 3)).tolist() == [0, 0]
    assert low_rank_project(torch.zeros(2, 0, 3), 1).shape == (2, 0, 3)
    assert low_rank_project(torch.zeros(0, 2, 3), 1).shape == (0, 2, 3)
    a = normal((2, 3, 4, 5))
    assert svdvals(a).shape == (2, 3, 4)
    assert torch.equal(svdvals(a)[1, 2], svdvals(a[1, 2]))
    assert matrix_rank(a[0, 0]).shape == ()
    assert matrix_rank(a, rtol=TOLERANCES).shape == (2, 3, 6)
    assert low_rank_project(a, 2).shape == a.shape


def test_strides() -> None:
    a = normal((9, 14, 12))
    for view in (a.mT, a[:, ::2], a[:, :, ::2], a.flip(0), a[:1].expand(5, 14, 12), a.transpose(0, 1), a[:, 3:7, 2:9]):
        dense = view.contiguous()
        torch.testing.assert_close(svdvals(view), svdvals(dense), rtol=1e-6, atol=1e-7)
        assert torch.equal(matrix_rank(view, rtol=0.2), matrix_rank(dense, rtol=0.2))
        torch.testing.assert_close(low_rank_project(view, 2), low_rank_project(dense, 2))
        leaf, dense_leaf = view.clone().requires_grad_(), dense.clone().requires_grad_()
        for x in (leaf, dense_leaf):
            svdvals(x.as_strided(x.shape, x.stride())).square().sum().backward()
        torch.testing.assert_close(leaf.grad, dense_leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 12, 12), (21, 30, 20)], ids=str)
def test_a_matrix_does_not_see_its_batch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Bitwise, for batches of at least 4 and any place in them, beside NaN as well."""
    a = normal(shape, dtype)
    values, ranks = svdvals(a), matrix_rank(a, rtol=TOLERANCES)
    for part in (slice(0, 4), slice(3, 8), slice(5, 21), slice(1, 18)):
        assert torch.equal(svdvals(a[part]), values[part])
        assert torch.equal(matrix_rank(a[part], rtol=TOLERANCES), ranks[part])
    neighbours = a.clone()
    neighbours[::2] = torch.nan
    assert torch.equal(svdvals(neighbours)[1::2], values[1::2])
    assert torch.equal(matrix_rank(neighbours, rtol=TOLERANCES)[1::2], ranks[1::2])
    assert torch.equal(svdvals(neighbours.nan_to_num(5))[1::2], values[1::2])


def test_the_same_bits_for_any_number_of_threads() -> None:
    """Also where a batch is too small for full groups on every thread, which then are halved."""
    for batch in (300, 20, 9):
        a = normal((batch, 20, 24))
        large = normal((3, 180, 180))
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            ranks = matrix_rank(a, rtol=TOLERANCES * 30), matrix_rank(a.double(), rtol=0.3), matrix_rank(large)
            results.append((svdvals(a), svdvals(a.double()), gradient_of_values(a), low_rank_project(a, 3), *ranks))
        assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def largest_errors_of_this_level() -> None:
    """Prints the level in use, the largest error over its tolerance, and the number of wrong ranks and gradients."""
    worst, wrong = 0.0, 0
    for dtype in DTYPES:
        for shape in [(3, 1, 1), (19, 13, 17), (5, 40, 33), (2, 70, 70), (2, 170, 165)]:
            a = normal(shape, dtype, seed=3)
            want = oracle(a)
            error = np.abs(svdvals(a).double().numpy() - want) / want[:, :1]
            worst = max(worst, float(error.max()) / TOLERANCE[dtype])
            ranks, clear = count(want, TOLERANCES)
            wrong += int(((matrix_rank(a, rtol=TOLERANCES).numpy() != ranks) & clear).sum())
            if dtype == torch.float32:
                wrong += int(not torch.allclose(gradient_of_values(a), svd_gradient(a).float(), atol=1e-4))
                wrong += int(not torch.allclose(low_rank_project(a, 2), reference.low_rank_project(a, 2), atol=1e-5))
    print(torch.ops.neuraldeps.cpu_levels()[2], worst, wrong)


def test_every_instruction_set_level(cpu_levels: list[str], run_python) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_spectrum import *; largest_errors_of_this_level()"
    for level in cpu_levels:
        result = run_python(code, str(ROOT / "tests"), NEURALDEPS_CPU_LEVEL=level, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        used, worst, wrong = result.stdout.split()
        assert (used, wrong) == (level, "0")
        assert float(worst) <= 1


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31 - 2),
    batch=st.integers(1, 10),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_invariances(seed: int, batch: int, m: int, n: int, dtype: torch.dtype) -> None:
    a = normal((batch, m, n), dtype, seed)
    values, ranks = svdvals(a).double(), matrix_rank(a, rtol=0.3)
    top = values[:, :1]
    near = ((values - 0.3 * top).abs() <= 1e-5 * top).any(-1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    rotated = (orthonormal(batch, m, m, seed + 1) @ a.double()).to(dtype)
    for other, factor in (
        (a.mT.contiguous(), 1.0),
        (a[:, rows][:, :, columns], 1.0),
        (-0.25 * a, 0.25),
        (rotated, 1.0),
    ):
        assert bool(((svdvals(other).double() - factor * values).abs() <= tolerance * factor * top).all())
        assert bool(((matrix_rank(other, rtol=0.3) == ranks) | near).all())
    energy = a.double().square().sum((-1, -2))
    torch.testing.assert_close(values.square().sum(-1), energy, rtol=1e-5, atol=0)
    assert bool((values.diff(dim=-1) <= 0).all())
    assert bool((values >= 0).all())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 2), m=st.integers(1, 12), n=st.integers(1, 12), k=st.integers(0, 13))
def test_low_rank_project_is_the_nearest(seed: int, m: int, n: int, k: int) -> None:
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        a = normal((4, m, n), dtype, seed)
        projected = low_rank_project(a, k)
        values = oracle(a)
        residual = torch.linalg.matrix_norm((a - projected).double()).numpy()
        np.testing.assert_allclose(residual, np.sqrt((values[:, k:] ** 2).sum(-1)), atol=tolerance * values[:, 0].max())
        assert bool((matrix_rank(projected, rtol=1e-4) <= k).all())
        torch.testing.assert_close(low_rank_project(projected, k), projected, rtol=0, atol=10 * tolerance)


# ------------------------------------------------------------------------------------------------ gradients


def gradient_of_values(a: Tensor, seed: int = 5) -> Tensor:
    leaf = a.clone().requires_grad_()
    values = svdvals(leaf)
    (values * normal(tuple(values.shape), values.dtype, seed)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def svd_gradient(a: Tensor, seed: int = 5) -> Tensor:
    """U diag(g) V' in float64 for the same g."""
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (u * normal(tuple(s.shape), dtype, seed).double()[..., None, :]) @ vh


# By kernel and by LAPACK, tall and wide, few and many, beyond one chain and one block of 8 columns.
GRADIENT_SHAPES = [(5, 1, 1), (6, 1, 4), (17, 8, 8), (9, 30, 17), (4, 20, 60), (1, 9, 12), (2, 40, 41), (4, 90, 100)]


@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_gradient_of_values(shape: tuple[int, int, int]) -> None:
    limits = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for dtype in DTYPES:
        a = normal(shape, dtype, seed=2)
        got = gradient_of_values(a)
        assert got.dtype == dtype
        assert got.shape == a.shape
        assert float((got.double() - svd_gradient(a)).abs().max()) <= limits[dtype]


def test_gradient_where_the_gram_matrix_does_not_resolve() -> None:
    """Values down to 1e-7 of the largest, in float32: LAPACK in float64 for these, not for their neighbours."""
    values = torch.logspace(0, -7, 10, dtype=torch.float64)
    a = torch.cat([normal((5, 14, 10)), planted(3, 14, 10, values).float()])
    assert float((gradient_of_values(a).double() - svd_gradient(a)).abs().max()) <= 1e-5
    full = a.clone()
    full[2] = torch.nan
    got = gradient_of_values(full)
    assert bool(got[2].isnan().all())
    assert float((got.double() - svd_gradient(a))[[0, 1, 3, 4, 5, 6, 7]].abs().max()) <= 1e-5


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-7, 1e-10, 0.0])
def test_gradient_of_neighbouring_values(gap: float) -> None:
    """Pairs of values `gap` apart with one weight, a function of both: sum of u v' over the pair is well conditioned.

    Vectors of close values come from another iteration, lane by lane, so neighbours of other kinds stand beside.
    """
    values = torch.linspace(1, 0.3, 6, dtype=torch.float64).repeat_interleave(2)
    values[1::2] *= 1 - gap
    a = torch.cat([planted(3, 15, 12, values, seed=7), normal((5, 15, 12), torch.float64, 3)]).float()
    weight = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 1.0]).repeat_interleave(2)
    leaf = a.clone().requires_grad_()
    (svdvals(leaf) * weight).sum().backward()
    assert leaf.grad is not None
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    error = (leaf.grad.double() - (u * weight.double()) @ vh).abs().amax((1, 2))
    assert float(error.max()) <= 2e-6, error


def test_a_gradient_does_not_see_its_batch() -> None:
    """Bitwise; beside NaN, zeros and repeated values, whose vectors are found in other ways, as well."""
    for shape in ((19, 12, 12), (10, 30, 20)):
        a = normal(shape)
        want, basis = gradient_of_values(a), torch.ops.neuraldeps.singular_basis(a)[1]
        for neighbour in (torch.nan, 0.0, torch.eye(*shape[1:])):
            neighbours = a.clone()
            neighbours[::2] = neighbour
            assert torch.equal(gradient_of_values(neighbours)[1::2], want[1::2])
            assert torch.equal(torch.ops.neuraldeps.singular_basis(neighbours)[1][1::2], basis[1::2])


def test_gradient_with_and_without_the_form_of_the_values() -> None:
    for shape in ((19, 12, 12), (5, 30, 20), (3, 7, 33)):
        a, grad_of_values = normal(shape), normal((shape[0], min(shape[1:])), seed=1)
        for view in (a, a.mT):
            values, form = torch.ops.neuraldeps.svdvals_with_form(view)
            assert torch.equal(values, svdvals(view.contiguous()))
            with_form, _ = torch.ops.neuraldeps.svdvals_gradient(grad_of_values, view, form)
            without, _ = torch.ops.neuraldeps.svdvals_gradient(grad_of_values, view)
            torch.testing.assert_close(with_form, without, rtol=0, atol=1e-6)
        moved = torch.empty(len(form) + 1, dtype=torch.float64)[1:].copy_(form)  # no longer aligned to 64 bytes
        assert torch.equal(torch.ops.neuraldeps.svdvals_gradient(grad_of_values, a.mT, moved)[0], with_form)


def test_gradient_at_repeated_and_vanishing_values() -> None:
    """The nuclear norm: U V' on the range, 0 beyond it."""
    for dtype in (torch.float32, torch.float64):
        for n in (4, 40):
            ones, zeros = torch.ones(n, n, dtype=dtype), torch.zeros(n, n, dtype=dtype)
            a = torch.stack([3 * torch.eye(n, dtype=dtype), zeros, ones, torch.eye(n, dtype=dtype)])
            a.requires_grad_()
            svdvals(a)[:2].sum().backward()
            assert a.grad is not None
            torch.testing.assert_close(a.grad[0], torch.eye(n, dtype=dtype), rtol=0, atol=1e-5)
            assert not a.grad[1:2].any()
            a.grad = None
            svdvals(a)[2, 0].backward()
            torch.testing.assert_close(a.grad[2], ones / n, rtol=0, atol=1e-5)
            a.grad = None
            effective_rank(a).sum().backward()
            assert bool(a.grad.isfinite().all())


@pytest.mark.parametrize("function", [svdvals, lambda a: low_rank_project(a, 2)], ids=["values", "truncation"])
def test_a_second_gradient_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    a = normal((5, 6, 5)).requires_grad_()
    (first,) = torch.autograd.grad(function(a).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(lambda y: function(y).square().sum())(x).square().sum())(a.detach())


@pytest.mark.parametrize("shape", [(2, 4, 3), (5, 3, 4), (3, 3)], ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    a = normal(shape, torch.float64, seed=1).requires_grad_()
    for function in (svdvals, effective_rank, stable_rank, lambda x: low_rank_project(x, 2)):
        torch.autograd.gradcheck(function, (a,))


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([3, 3, 3, 1, 0.5, 0.2], 3),  # repeated kept
        ([3, 2, 1, 0.5, 0.5, 0.5], 3),  # repeated dropped
        ([3, 2, 0, 0, 0, 0], 2),  # rank k
        ([2, 2, 1, 1, 0, 0], 2),  # both
        ([5, 4, 3, 2, 1, 0.5], 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 8)], ids=str)
def test_gradient_of_the_truncation(values: list[float], k: int, shape: tuple[int, int]) -> None:
    """Against central differences of NumPy's truncation; torch's own gradient of it has NaN at repeated values."""
    a = planted(1, *shape, torch.tensor(values, dtype=torch.float64))[0]
    direction, weight = normal(shape, torch.float64, 8), normal(shape, torch.float64, 9)

    def value(x: np.ndarray) -> float:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        return float((((u[:, :k] * s[:k]) @ vh[:k]) * weight.numpy()).sum())

    step = 1e-5
    ahead, back = ((a + sign * step * direction).numpy() for sign in (1, -1))
    want = (value(ahead) - value(back)) / (2 * step)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        leaf = a.detach().to(dtype, copy=True).requires_grad_()
        (low_rank_project(leaf, k) * weight.to(dtype)).sum().backward()
        assert leaf.grad is not None
        assert abs(float((leaf.grad.double() * direction).sum()) - want) <= tolerance * (1 + abs(want))


@pytest.mark.parametrize("shape", [(3, 9, 6), (3, 6, 9), (5, 5)], ids=str)
def test_detached_truncation(shape: tuple[int, ...]) -> None:
    """FAMLP: the value of the exact mode, the gradient dY V_k V_k' (U_k U_k' dY of wide ones)."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a, grad_of_y = normal(shape, dtype).requires_grad_(), normal(shape, dtype, seed=1)
        y = low_rank_project(a, 2, mode="detach")
        torch.testing.assert_close(y, low_rank_project(a, 2), rtol=0, atol=tolerance)
        (got,) = torch.autograd.grad(y, a, grad_of_y)
        u, _, vh = torch.linalg.svd(a.detach().double(), full_matrices=False)
        u, v, g = u[..., :2], vh[..., :2, :].mT, grad_of_y.double()
        want = g @ v @ v.mT if shape[-2] >= shape[-1] else u @ u.mT @ g
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
        for k in (min(shape[-2:]), 50):
            assert torch.equal(low_rank_project(a, k, mode="detach"), a)
    a = normal((2, 4, 3))
    a[0, 1, 1] = torch.nan
    assert bool(low_rank_project(a, 1, mode="detach")[0].isnan().all())
    torch.testing.assert_close(vmap(lambda x: low_rank_project(x, 1, mode="detach"))(a)[1], low_rank_project(a, 1)[1])


def test_gradient_of_the_truncation_without_a_unique_value() -> None:
    """Zero, below rank k, no gap, everything kept: finite, and 0 for zero."""
    for dtype in (torch.float32, torch.float64):
        a = torch.stack([torch.zeros(5, 5), torch.ones(5, 5), torch.eye(5)]).to(dtype).requires_grad_()
        weight = normal((3, 5, 5), dtype)
        (low_rank_project(a, 2) * weight).sum().backward()
        assert a.grad is not None
        assert bool(a.grad.isfinite().all())
        assert not a.grad[0].any()
        mean = torch.full((5, 5), 0.2, dtype=dtype)  # projection on the range of ones
        tangent = mean @ weight[1] + weight[1] @ mean - mean @ weight[1] @ mean
        torch.testing.assert_close(a.grad[1], tangent, rtol=0, atol=1e-5)
        a.grad = None
        (low_rank_project(a, 7) * weight).sum().backward()
        assert torch.equal(a.grad, weight)


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for shape in ((3, 4, 5), (0, 3, 2), (2, 7, 3)):
        a = normal(shape, dtype)
        rtol = torch.tensor([1e-2, 1e-4], dtype=torch.float64)
        operators = torch.ops.neuraldeps
        for requires_grad in (False, dtype in (torch.float32, torch.float64)):
            leaf = a.clone().requires_grad_(requires_grad)
            torch.library.opcheck(operators.svdvals.default, (leaf,))
            torch.library.opcheck(operators.low_rank_project.default, (leaf, 2))
        torch.library.opcheck(operators.matrix_rank.default, (a, rtol, 0.0, False))
        values = torch.promote_types(dtype, torch.float32)
        torch.library.opcheck(operators.svdvals_backward.default, (normal((shape[0], min(shape[1:])), values), a))
        torch.library.opcheck(operators.low_rank_project_backward.default, (a, a, 2))
        if dtype != torch.float64:
            torch.library.opcheck(operators.singular_basis.default, (a,))
            # A form has numbers that are never read, which may differ from call to call.
            torch.library.opcheck(
                operators.svdvals_with_form.default, (a,), test_utils=("test_schema", "test_faketensor")
            )
            grad_of_values, form = normal((shape[0], min(shape[1:]))), operators.svdvals_with_form(a)[1]
            torch.library.opcheck(operators.svdvals_gradient.default, (grad_of_values, a))
            torch.library.opcheck(operators.svdvals_gradient.default, (grad_of_values, a, form))


def test_vmap_and_func() -> None:
    a = normal((3, 4, 6, 5))
    for function in (svdvals, lambda x: matrix_rank(x, rtol=TOLERANCES), lambda x: low_rank_project(x, 2)):
        torch.testing.assert_close(vmap(vmap(function))(a), function(a))
        torch.testing.assert_close(vmap(function, in_dims=1)(a), function(a).transpose(0, 1))

    def loss(x: Tensor) -> Tensor:
        return svdvals(x).square().sum() + low_rank_project(x, 2).square().sum()

    leaf = a.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(vmap(vmap(grad(loss)))(a), leaf.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad(lambda x: svdvals(x).square().sum())(a), 2 * a, rtol=1e-4, atol=1e-5)
    assert jacrev(svdvals)(a[0, 0]).shape == (5, 6, 5)
    with pytest.raises(ValueError, match="1-D rtol"):
        vmap(lambda t: torch.ops.neuraldeps.matrix_rank(a[0], t, 0.0, False))(torch.rand(3, 2, dtype=torch.float64))


def test_compile_and_autocast() -> None:
    a = normal((5, 9, 7))

    def step(x: Tensor) -> tuple[Tensor, ...]:
        values = svdvals(x)
        ranks = matrix_rank(x, rtol=1e-2), matrix_rank(x), effective_rank(x), stable_rank(x)
        return values, *ranks, low_rank_project(x, 3)

    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(compiled(a), step(a), strict=True):
        torch.testing.assert_close(got, want)
    gradients = []
    for function in (step, compiled):
        leaf = a.clone().requires_grad_()
        values, _, _, effective, stable, projected = function(leaf)
        (values.sum() + effective.sum() + stable.sum() + projected.square().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = svdvals(a.bfloat16())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.numpy(), oracle(a.bfloat16()).astype(np.float32), rtol=0, atol=1e-5)
        assert low_rank_project(a, 3).dtype == torch.float32
        torch.testing.assert_close(low_rank_project(a, 3), reference.low_rank_project(a, 3), rtol=0, atol=1e-5)
        large = normal((2, 40, 45)).requires_grad_()
        svdvals(large).square().sum().backward()
        torch.testing.assert_close(large.grad, 2 * large.detach(), rtol=0, atol=1e-4)


def test_the_reference_is_the_oracle() -> None:
    for shape in ((4, 6, 5), (3, 2, 9)):
        a = normal(shape)
        np.testing.assert_allclose(reference.svdvals(a).numpy(), oracle(a), rtol=1e-6)
        rtol = torch.tensor([0.5, 0.1], dtype=torch.float64)
        assert_ranks(reference.matrix_rank(a, rtol, 0.0, False), oracle(a), rtol)
        assert_ranks(reference.matrix_rank(a, rtol, 0.4, False), oracle(a), rtol, 0.4)
    wrong = normal((2, 3, 3))
    wrong[0, 1, 1] = torch.inf
    assert reference.matrix_rank(wrong, torch.tensor([0.1]), 0.0, True)[0].tolist() == [-1]
    assert bool(reference.svdvals(wrong)[0].isnan().all())
    assert bool(reference.low_rank_project(wrong, 1)[0].isnan().all())
    assert reference.matrix_rank(torch.zeros(2, 0, 3), torch.tensor([0.1]), 0.0, False).tolist() == [[0], [0]]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    for shape in [(6, 7, 5), (2, 70, 75), (5, 180, 170)]:
        a = normal(shape, dtype)
        a[1, 2, 4] = value
        square = a[:, : min(shape[1:]), : min(shape[1:])]
        values = svdvals(a)
        assert bool(values[1].isnan().all())
        assert bool(values[0].isfinite().all())
        assert matrix_rank(a, rtol=TOLERANCES)[1].tolist() == [-1] * 6
        assert int(matrix_rank(a, rtol=0.5)[0]) > 0
        assert matrix_rank(square, hermitian=True).tolist()[1] == -1
        projected = low_rank_project(a, 2)
        assert bool(projected[1].isnan().all())
        assert bool(projected[0].isfinite().all())
        assert bool(effective_rank(a)[1].isnan())
        assert bool(stable_rank(a)[1].isnan())
        for function in (svdvals, matrix_rank, effective_rank, stable_rank, lambda x, **k: low_rank_project(x, 1, **k)):
            with pytest.raises(ValueError, match="a holds NaN or infinity"):
                function(a, check=True)
            function(normal((2, 3, 3), dtype), check=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: svdvals(a[0, 0]), ValueError, r"a must be \[..., m, n\], not \[5\]"),
        (lambda a: svdvals(a.int()), TypeError, "a must be float32"),
        (lambda a: svdvals(a.numpy()), TypeError, "a must be a torch.Tensor, not ndarray"),
        (
            lambda a: matrix_rank(a, hermitian=True),
            ValueError,
            r"a must be square with hermitian=True, not \[2, 4, 5\]",
        ),
        (lambda a: matrix_rank(a, rtol=-1.0), ValueError, "rtol must be a number that is not negative, not -1.0"),
        (lambda a: matrix_rank(a, rtol=float("nan")), ValueError, "rtol must"),
        (lambda a: matrix_rank(a, rtol=torch.tensor([0.1, -0.1])), ValueError, "rtol must not be negative"),
        (lambda a: matrix_rank(a, rtol=torch.zeros(2, 2)), ValueError, r"rtol must be a number or a 1-D tensor"),
        (lambda a: matrix_rank(a, atol=-1.0), ValueError, "atol must"),
        (lambda a: matrix_rank(a, rule="theirs"), ValueError, "rule must be one of default, authors_gram"),
        (lambda a: matrix_rank(a, rule="authors_gram", rtol=0.1), ValueError, "sets the tolerance"),
        (lambda a: low_rank_project(a, -1), ValueError, "k must be at least 0, not -1"),
        (lambda a: low_rank_project(a, 1.0), TypeError, "k must be an int, not float"),
        (lambda a: low_rank_project(a, 1, mode="none"), ValueError, "mode must be one of exact, detach, not 'none'"),
        (lambda a: torch.ops.neuraldeps.svdvals(a[0]), ValueError, r"a must be \[B, m, n\]"),
        (lambda a: torch.ops.neuraldeps.singular_basis(a.double()), ValueError, "a must be float32"),
        (lambda a: torch.ops.neuraldeps.svdvals_gradient(a[:, 0], a), ValueError, "grad must be"),
        (lambda a: torch.ops.neuraldeps.svdvals_with_form(a.double()), ValueError, "a must be float32"),
        (
            lambda a: torch.ops.neuraldeps.svdvals_gradient(a[:, 0, :4].contiguous(), a, a[0, 0].double()),
            ValueError,
            "form must be that of svdvals_with_form",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal((2, 4, 5)))


def blocks_and_repeats(n: int) -> Tensor:
    """[9, n, n] of small integers, whose tridiagonal forms split or have vanishing rows."""
    blocks = torch.block_diag(torch.ones(n // 2, n // 2), torch.eye(n - n // 2))
    pattern = torch.arange(n) % 3
    same = (pattern[:, None] == pattern).float()
    path = torch.diag_embed(torch.ones(n - 1), 1)
    single = torch.zeros(n, n)
    single[n // 2, n // 3] = 2.0
    pairs = torch.eye(n).roll(1, 0)
    graded = torch.diag(10.0 ** -torch.arange(n))
    return torch.stack(
        [torch.ones(n, n), torch.eye(n), torch.zeros(n, n), blocks, same, path, single, pairs + pairs.T, graded]
    )


def test_a_basis_is_orthonormal_and_diagonalises() -> None:
    random = [normal(shape, seed=4) for shape in ((5, 1, 3), (9, 12, 12), (4, 40, 33), (5, 6, 50))]
    for a in [*random, *map(blocks_and_repeats, (2, 3, 5, 9, 20, 41))]:
        shape = a.shape
        values, basis = torch.ops.neuraldeps.singular_basis(a)
        tall = ops._tall(a).double()
        torch.testing.assert_close(basis @ basis.mT, torch.eye(min(shape[1:])).double().expand_as(basis))
        np.testing.assert_allclose(values.numpy(), oracle(a), rtol=1e-6, atol=1e-7 * float(values.max()))
        products = basis @ tall.mT @ tall @ basis.mT
        torch.testing.assert_close(
            products, torch.diag_embed(values.square()), rtol=1e-10, atol=2e-12 * float(values.max()) ** 2
        )


# ------------------------------------------------------------------------------------------------ sanitizers, GPU


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """The kernel alone, on buffers of exactly the sizes it asks for."""
    assert_sanitized("spectrum_sanitizer_driver.cpp", "spectrum.cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_matches_the_cpu(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        a = normal(shape, dtype)
        torch.testing.assert_close(svdvals(a.cuda()).cpu(), svdvals(a), rtol=0, atol=1e-5)
        assert_ranks(matrix_rank(a.cuda(), rtol=TOLERANCES).cpu(), oracle(a), TOLERANCES)
        torch.testing.assert_close(low_rank_project(a.cuda(), 2).cpu(), low_rank_project(a, 2), rtol=0, atol=1e-3)
