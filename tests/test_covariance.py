"""Covariance: every dtype, shape, instruction-set level and transform against a float64 two-pass oracle in NumPy."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import on_every_rank
from torch.func import grad, jacrev, vmap

import neuraldeps_kernels as nk
import neuraldeps_kernels.triton
from neuraldeps_kernels.ops import covariance as ops
from neuraldeps_kernels.ops.covariance import centered_moments
from neuraldeps_kernels.reference import covariance as reference

ROOT = Path(__file__).resolve().parents[1]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Largest error over the largest entry: rounding of at most 384 products in float32, and of float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}

# Rows: the smallest, around the group of 8 rows packed together, around the block of 384, several blocks.
ROWS = [1, 2, 3, 7, 8, 17, 384, 385, 1100]
# Columns: below, at and above one register (4, 8, 16), a panel (12, 24, 48), a tile (96); one slab and several.
COLUMNS = [1, 2, 5, 15, 16, 17, 33, 48, 97, 257]


def oracle(x: np.ndarray, weights: np.ndarray | None = None, center: bool = True, correction: float = 0) -> np.ndarray:
    """Two passes in float64 over x [N, n]; rows of weight 0 are left out."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    x, w = x[w > 0], w[w > 0]
    if center:
        x = x - (w @ x) / w.sum()
    return (x * w[:, None]).T @ x / (w.sum() - correction)


def rows_of(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0, seed: int = 0
) -> torch.Tensor:
    """Correlated normal rows around `offset`, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x + 0.5 * x.roll(1, -1) + offset).to(dtype)


def as_float64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def relative_error(got: torch.Tensor, want: np.ndarray, floor: float = 0.0) -> float:
    return float(np.abs(got.double().numpy() - want).max() / max(np.abs(want).max(), floor, 1e-300))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COLUMNS)
def test_matches_the_oracle(n: int, dtype: torch.dtype) -> None:
    for N in ROWS:
        x = rows_of((N, n), dtype, seed=N)
        S = nk.covariance(x)
        assert S.dtype == torch.float64
        assert relative_error(S, oracle(as_float64(x)), floor=1e-6) <= TOLERANCE[dtype], N
        assert torch.equal(S, S.T)


def test_many_columns_and_uneven_rows() -> None:
    x = rows_of((1000, 1500), offset=5)  # a result beyond 16 MB
    assert relative_error(nk.covariance(x), oracle(as_float64(x))) <= 1e-6
    x = rows_of((2111, 1000), offset=5)
    assert relative_error(nk.covariance(x), oracle(as_float64(x))) <= 5e-7
    assert relative_error(nk.covariance(x, dtype=torch.float32), oracle(as_float64(x))) <= 6e-7
    assert nk.covariance(x, dtype=torch.float32).dtype == torch.float32


# 3000 and 3e4: float32 data lie on a grid of 2^-12 and 2^-9, on which a plain float32 sum rounds to one side.
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0, 3000.0, 1e4, 3e4])
def test_a_common_offset_costs_no_accuracy(offset: float) -> None:
    x = rows_of((6000, 70), offset=offset)
    assert relative_error(nk.covariance(x), oracle(as_float64(x))) <= 3e-7
    x64 = rows_of((600, 70), torch.float64, offset=offset)
    assert relative_error(nk.covariance(x64), oracle(as_float64(x64))) <= 1e-12


def test_a_mean_that_drifts_away_from_the_pivot() -> None:
    x = rows_of((4000, 20)) + torch.linspace(0, 50, 4000)[:, None]
    assert relative_error(nk.covariance(x), oracle(as_float64(x))) <= 1e-6


def test_a_constant_column_has_variance_zero() -> None:
    for dtype in DTYPES:
        x = rows_of((51, 9), dtype, offset=3)
        x[:, 4] = 0.1
        S = nk.covariance(x)
        assert not S[4].any()
        assert (S.diagonal()[torch.arange(9) != 4] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(dtype: torch.dtype) -> None:
    for N, n in [(1, 3), (9, 17), (390, 33), (900, 110)]:
        x = rows_of((N, n), dtype, offset=2, seed=n)
        w = torch.rand(N, generator=torch.Generator().manual_seed(N)) + 0.1
        w[1::3] = 0
        got = nk.covariance(x, weights=w)
        assert relative_error(got, oracle(as_float64(x), as_float64(w)), floor=1e-6) <= TOLERANCE[dtype]
        x[1::3] = torch.nan
        assert torch.equal(nk.covariance(x, weights=w), got)


def test_weights_are_frequencies() -> None:
    x, counts = rows_of((40, 6)), torch.arange(40) % 4
    repeated = x.repeat_interleave(counts, 0)
    got = nk.covariance(x, weights=counts, correction=1)
    torch.testing.assert_close(got, nk.covariance(repeated, correction=1), rtol=1e-6, atol=1e-7)
    assert torch.equal(nk.covariance(x, weights=counts > 0), nk.covariance(x, weights=(counts > 0).double()))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_center_and_correction(center: bool, correction: float) -> None:
    x = rows_of((30, 7), offset=1.5)
    w = torch.linspace(0.5, 2, 30)
    for weights in (None, w):
        got = nk.covariance(x, center=center, correction=correction, weights=weights)
        assert torch.equal(got, got.T)
        want = oracle(as_float64(x), None if weights is None else as_float64(w), center, correction)
        assert relative_error(got, want) <= 1e-6


def test_agrees_with_torch_cov() -> None:
    x = rows_of((200, 12), torch.float64)
    torch.testing.assert_close(nk.covariance(x, correction=1), torch.cov(x.T), rtol=1e-12, atol=1e-14)


# Fewer problems than threads, as many, more; problems large enough for several tasks.
@pytest.mark.parametrize(("B", "N", "n"), [(1, 20, 5), (2, 300, 100), (7, 33, 17), (0, 5, 3)])
def test_a_batch_is_its_problems_one_by_one(B: int, N: int, n: int) -> None:
    x = rows_of((B, N, n))
    w = torch.rand(B, N, generator=torch.Generator().manual_seed(1))
    for weights in (None, w):
        together = nk.covariance(x, weights=weights)
        assert together.shape == (B, n, n)
        for b in range(B):
            assert torch.equal(together[b], nk.covariance(x[b], weights=None if weights is None else w[b]))


def test_strides() -> None:
    x = rows_of((60, 40))
    for view in (x[::3], x[:, 5:20], x[:, ::2], x.T, x[:1].expand(9, 40), x.flip(0)):
        torch.testing.assert_close(nk.covariance(view), nk.covariance(view.contiguous()), rtol=0, atol=0)
    batch = rows_of((3, 10, 8))
    for view in (batch.transpose(0, 1), batch[:, :, 1:5], batch[:1].expand(4, 10, 8), batch[::2]):
        torch.testing.assert_close(nk.covariance(view), nk.covariance(view.contiguous()), rtol=0, atol=0)


def test_float16_values_of_every_kind() -> None:
    """Subnormal, normal and extreme numbers convert exactly: a single row is its own mean."""
    x = torch.arange(0, 0x7C00, 7, dtype=torch.int16).view(torch.float16)
    x = torch.cat([x, -x])[None, None]
    _, mean, moment = centered_moments(x)
    assert torch.equal(mean, x[0].double())
    assert not moment.any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for shape in [(1500, 30), (1500, 200), (5, 40, 50)]:
            x = rows_of(shape, offset=7)
            torch.set_num_threads(4)
            want = nk.covariance(x)
            torch.set_num_threads(threads)
            assert torch.equal(nk.covariance(x), want)
    finally:
        torch.set_num_threads(before)


def covariances_of_this_level() -> None:
    """Prints the level in use and the largest relative error, for test_every_instruction_set_level."""
    worst = 0.0
    for dtype in DTYPES:
        for N, n in [(3, 1), (400, 17), (900, 100)]:
            x = rows_of((N, n), dtype, offset=3)
            w = (torch.arange(N) % 5).double()
            for weights in (None, w):
                want = oracle(as_float64(x), None if weights is None else w.numpy())
                worst = max(worst, relative_error(nk.covariance(x, weights=weights), want) / TOLERANCE[dtype])
    print(torch.ops.neuraldeps.cpu_levels()[2], worst)


def test_every_instruction_set_level(cpu_levels: list[str], run_python) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_covariance import *; covariances_of_this_level()"
    for level in cpu_levels:
        result = run_python(code, str(ROOT / "tests"), NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, result.stderr
        used, worst = result.stdout.split()
        assert used == level
        assert float(worst) <= 1


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 40),
    n=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, -30.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_properties(seed: int, N: int, n: int, scale: float, offset: float, dtype: torch.dtype) -> None:
    x = rows_of((N, n), torch.float64, seed=seed)
    x = (scale * (x + offset)).to(dtype)
    S = nk.covariance(x)
    top = float(S.diagonal().max()) + 1e-300
    assert torch.equal(S, S.T)
    assert float(torch.linalg.eigvalsh(S)[0]) >= -5e-6 * n * top  # positive semidefinite
    assert bool((S.diagonal() >= 0).all())
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert relative_error(nk.covariance(x[:, permutation]), S[permutation][:, permutation].numpy(), 1e-12 * top) <= 1e-5
    assert relative_error(nk.covariance(4 * x), 16 * S.numpy(), 1e-12 * top) <= 1e-6
    second = nk.covariance(x, center=False)
    mean = centered_moments(x[None])[1][0]
    assert relative_error(second - torch.outer(mean, mean), S.numpy(), floor=1e-6 * float(second.max())) <= 1e-5


# ------------------------------------------------------------------------------------------------ bad input


def nan_at(row: int, column: int, value: float = torch.nan) -> torch.Tensor:
    x = rows_of((10, 4))
    x[row, column] = value
    return x


X, X3 = rows_of((10, 4)), rows_of((2, 3, 4))


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, r"x must be a torch.Tensor, not list", lambda: nk.covariance([[1.0]])),
        (
            TypeError,
            r"x must be float32, .*, not torch.int64",
            lambda: nk.covariance(torch.ones(3, 2, dtype=torch.int64)),
        ),
        (ValueError, r"x must be \[N, n\] .* not \[3\]", lambda: nk.covariance(torch.ones(3))),
        (ValueError, r"x must be \[N, n\] .* not \[3, 0\]", lambda: nk.covariance(torch.ones(3, 0))),
        (ValueError, r"x must have at least one row", lambda: nk.covariance(torch.ones(0, 3))),
        (ValueError, r"below the 1 rows of x, not 1", lambda: nk.covariance(torch.ones(1, 3), correction=1)),
        (ValueError, r"x has no finite covariance in column 2", lambda: nk.covariance(nan_at(5, 2))),
        (ValueError, r"x has no finite covariance in column 0", lambda: nk.covariance(nan_at(0, 0, torch.inf))),
        (ValueError, r"x has no finite .* overflow", lambda: nk.covariance(nan_at(3, 1, 1e30))),
        (TypeError, r"weights must be a torch.Tensor", lambda: nk.covariance(nan_at(0, 0), weights=[1.0] * 10)),
        (TypeError, r"weights must be real", lambda: nk.covariance(torch.ones(2, 2), weights=torch.ones(2) * 1j)),
        (
            ValueError,
            r"weights must be \[10\], .* not \[4\]",
            lambda: nk.covariance(nan_at(0, 0), weights=torch.ones(4)),
        ),
        (ValueError, r"weights holds -1", lambda: nk.covariance(torch.ones(2, 2), weights=torch.tensor([1, -1]))),
        (ValueError, r"weights holds nan", lambda: nk.covariance(torch.ones(1, 2), weights=torch.tensor([torch.nan]))),
        (ValueError, r"weights holds inf", lambda: nk.covariance(torch.ones(1, 2), weights=torch.tensor([torch.inf]))),
        (
            ValueError,
            r"sum of weights is 0; it must be above",
            lambda: nk.covariance(torch.ones(2, 2), weights=torch.zeros(2)),
        ),
        (TypeError, r"dtype must be torch.float64 or", lambda: nk.covariance(torch.ones(2, 2), dtype=torch.float16)),
        (ValueError, r"x must be \[N, 3\], not \[2, 2\]", lambda: nk.CovarianceAccumulator(3).update(torch.ones(2, 2))),
        (ValueError, r"x must be \[N, 2\]", lambda: nk.CovarianceAccumulator(2).update(torch.ones(1, 2, 2))),
        (ValueError, r"x is on meta, but", lambda: nk.CovarianceAccumulator(2).update(torch.ones(2, 2, device="meta"))),
        (ValueError, r"n must be at least 1, not 0", lambda: nk.CovarianceAccumulator(0)),
        (ValueError, r"count of rows is 0", lambda: nk.CovarianceAccumulator(2).compute()),
        (ValueError, r"other has n=3", lambda: nk.CovarianceAccumulator(2).merge(nk.CovarianceAccumulator(3))),
        (
            ValueError,
            r"center=False, but",
            lambda: nk.CovarianceAccumulator(2).merge(nk.CovarianceAccumulator(2, center=False)),
        ),
        (ValueError, r"state must have the keys", lambda: nk.CovarianceAccumulator(2).load_state_dict({})),
        (
            ValueError,
            r"state\['mean'\] must be \[2\], not \[3\]",
            lambda: nk.CovarianceAccumulator(2).load_state_dict(nk.CovarianceAccumulator(3).state_dict()),
        ),
        (RuntimeError, r"init_process_group", lambda: nk.CovarianceAccumulator(2).all_reduce()),
        (TypeError, r"target_logits must be a torch.Tensor, not list", lambda: nk.cross_covariance([1.0], X)),
        (TypeError, r"predictor_logits must be float32, .*, not torch.int32", lambda: nk.cross_covariance(X, X.int())),
        (ValueError, r"target_logits must be \[N, columns\], not \[2, 3, 4\]", lambda: nk.cross_covariance(X3, X)),
        (ValueError, r"predictor_logits has 9 rows, but target_logits 10", lambda: nk.cross_covariance(X, X[1:])),
        (ValueError, r"predictor_logits has dtype torch.float64", lambda: nk.cross_covariance(X, X.double())),
        (ValueError, r"predictor_logits has device meta", lambda: nk.cross_covariance(X, X.to("meta"))),
        (ValueError, r"target_logits must have at least one row", lambda: nk.cross_covariance(X[:0], X[:0])),
        (ValueError, r"below the 1 rows of target_logits", lambda: nk.cross_covariance(X[:1], X[:1], correction=1)),
        (ValueError, r"predictor_logits has no finite .* 2", lambda: nk.cross_covariance(X, nan_at(5, 2))),
        (ValueError, r"target_logits has no finite .* 2", lambda: nk.cross_covariance(nan_at(5, 2), X)),
        (ValueError, r"target_logits has no finite .* overflow", lambda: nk.cross_covariance(nan_at(5, 2, 1e30), X)),
        (ValueError, r"each row of target_logits", lambda: nk.cross_covariance(X, X, weights=torch.ones(4))),
        (ValueError, r"weights holds -1", lambda: nk.cross_covariance(X, X, weights=-torch.ones(10))),
        (ValueError, r"sum of weights is 0", lambda: nk.cross_covariance(X, X, weights=torch.zeros(10))),
        (TypeError, r"dtype must be torch.float64 or", lambda: nk.cross_covariance(X, X, dtype=torch.bfloat16)),
        (ValueError, r"not 3 predictors and 4 targets", lambda: nk.cross_covariance(X, X[:, :3], exclude_same=True)),
        (ValueError, r"m must be at least 1, not 0", lambda: nk.CrossCovarianceAccumulator(2, 0)),
        (ValueError, r"not 3 predictors and 2 targets", lambda: nk.CrossCovarianceAccumulator(2, 3).compute(0, True)),
        (ValueError, r"count of rows is 0", lambda: nk.CrossCovarianceAccumulator(2, 2).compute()),
        (ValueError, r"target_logits must be \[N, 3\]", lambda: nk.CrossCovarianceAccumulator(3, 4).update(X, X)),
        (ValueError, r"predictor_logits must be \[N, 3\]", lambda: nk.CrossCovarianceAccumulator(4, 3).update(X, X)),
        (ValueError, r"predictor_logits has 9 rows", lambda: nk.CrossCovarianceAccumulator(4, 4).update(X, X[1:])),
        (
            ValueError,
            r"predictor_logits is on meta",
            lambda: nk.CrossCovarianceAccumulator(4, 4).update(X, X.to("meta")),
        ),
        (
            ValueError,
            r"other has n=2, m=3, center=True, but the accumulator n=2, m=2, center=True",
            lambda: nk.CrossCovarianceAccumulator(2, 2).merge(nk.CrossCovarianceAccumulator(2, 3)),
        ),
        (
            TypeError,
            r"other must be a CrossCovarianceAccumulator, not CovarianceAccumulator",
            lambda: nk.CrossCovarianceAccumulator(2, 2).merge(nk.CovarianceAccumulator(2)),
        ),
        (ValueError, r"cross must be \[n, m\]", lambda: nk.CrossCovariance(*torch.ones(5, 2))),
        (
            ValueError,
            r"cov must be \[4, 4\] beside cross \[10, 4\]",
            lambda: nk.CrossCovariance(X, X, X[0], X[0], X[0]),
        ),
        (
            ValueError,
            r"variance is torch.float64 on cpu, but cross torch.float32 on cpu",
            lambda: nk.CrossCovariance(X[:4], X[:4], X[0].double(), X[0], X[0]),
        ),
    ],
)
def test_bad_input(error: type[Exception], text: str, call) -> None:
    with pytest.raises(error, match=text):
        call()


# ------------------------------------------------------------------------------------------------ operator, transforms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = rows_of((2, 5, 3), dtype).requires_grad_()
    weights = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    for arguments in ((x, None), (x, weights)):
        torch.library.opcheck(torch.ops.neuraldeps.centered_moments.default, arguments)


@pytest.mark.parametrize("keywords", [{}, {"center": False}, {"correction": 1}], ids=str)
def test_gradients(keywords: dict[str, object]) -> None:
    x = rows_of((2, 6, 3), torch.float64).requires_grad_()
    w = (torch.rand(2, 6, dtype=torch.float64) + 0.5).requires_grad_()
    plain = functools.partial(nk.covariance, **keywords)
    assert torch.autograd.gradcheck(plain, (x,))
    assert torch.autograd.gradcheck(lambda x, w: plain(x, weights=w), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: plain(x, weights=w), (x, w))
    assert torch.autograd.gradcheck(torch.ops.neuraldeps.centered_moments, (x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dtype_and_value(dtype: torch.dtype) -> None:
    x = rows_of((50, 6), dtype, offset=3).requires_grad_()
    nk.covariance(x).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    reference.covariance(exact).square().sum().backward()
    assert x.grad.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(
        x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * float(exact.grad.abs().max())
    )


def test_gradients_at_weight_zero() -> None:
    x = rows_of((6, 3), torch.float64)
    w = torch.tensor([1.0, 2, 0, 1, 1, 3], dtype=torch.float64)
    results = []
    for function, tiny in ((nk.covariance, 0.0), (reference.covariance, 1e-200)):
        leaves = x.clone().requires_grad_(), (w + tiny).requires_grad_()
        function(leaves[0], weights=leaves[1]).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1])
    x[2] = torch.nan
    x.requires_grad_(), w.requires_grad_()
    nk.covariance(x, weights=w).square().sum().backward()
    torch.testing.assert_close(x.grad, results[0][0])
    assert w.grad.isfinite().all()


def test_function_transforms() -> None:
    x = rows_of((4, 9, 3), torch.float64)

    def loss(cov, x):
        return cov(x, correction=1).square().sum()

    ours, plain = functools.partial(loss, nk.covariance), functools.partial(loss, reference.covariance)
    torch.testing.assert_close(grad(ours)(x[0]), grad(plain)(x[0]))
    torch.testing.assert_close(vmap(grad(ours))(x), vmap(grad(plain))(x))
    torch.testing.assert_close(jacrev(nk.covariance)(x[0]), jacrev(reference.covariance)(x[0]))
    torch.testing.assert_close(jacrev(jacrev(ours))(x[0]), jacrev(jacrev(plain))(x[0]))


def test_vmap_is_a_loop() -> None:
    x, w = rows_of((3, 2, 9, 4)), torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vmap(nk.covariance)(x), torch.stack([nk.covariance(part) for part in x]))
    assert torch.equal(vmap(vmap(nk.covariance))(x), nk.covariance(x.flatten(0, 1)).unflatten(0, (3, 2)))
    slices = torch.stack([nk.covariance(x[:, :, r]) for r in range(9)])
    assert torch.equal(vmap(nk.covariance, in_dims=2)(x), slices)
    one = x[0, 0]
    got = vmap(lambda weights: nk.covariance(one, weights=weights))(w)
    assert torch.equal(got, torch.stack([nk.covariance(one, weights=row) for row in w]))
    raw = vmap(torch.ops.neuraldeps.centered_moments, in_dims=(0, None))(x.double(), torch.rand(2, 9).double())
    assert [tuple(out.shape) for out in raw] == [(3, 2), (3, 2, 4), (3, 2, 4, 4)]


def test_compile_and_autocast() -> None:
    def step(x, w):
        return nk.covariance(x, weights=w, correction=1, center=False).diagonal().log().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x = rows_of((20, 5)).requires_grad_()
        value = function(x, torch.linspace(1, 2, 20))
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = rows_of((20, 5)).requires_grad_()
        value = step(x, torch.linspace(1, 2, 20))
        value.backward()
    assert torch.equal(value, results[0][0])
    torch.testing.assert_close(x.grad, results[0][1])


def test_cuda_tensors_without_triton_take_the_reference(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "neuraldeps_kernels.triton.covariance", None)
    monkeypatch.delattr(neuraldeps_kernels.triton, "covariance", raising=False)
    x = rows_of((2, 9, 3))
    with caplog.at_level("DEBUG", "neuraldeps_kernels"):
        got = ops._centered_moments_on_cuda(x, None)
    torch.testing.assert_close(got, reference.centered_moments(x), rtol=0, atol=0)
    assert "covariance runs on the plain PyTorch reference" in caplog.text


def test_meta_tensors_give_shapes() -> None:
    S = nk.covariance(torch.empty(4, 100, 7, device="meta", dtype=torch.bfloat16))
    assert (S.shape, S.dtype, S.device.type) == ((4, 7, 7), torch.float64, "meta")


def test_the_reference_agrees_with_the_oracle() -> None:
    x, w = rows_of((2, 30, 5), offset=4), torch.rand(2, 30)
    for b in range(2):
        want = oracle(as_float64(x[b]), as_float64(w[b]), center=False, correction=1)
        got = reference.covariance(x[b], weights=w[b], center=False, correction=1)
        assert relative_error(got, want) <= 1e-13
    assert relative_error(reference.covariance(x)[1], oracle(as_float64(x[1]))) <= 1e-13


# ------------------------------------------------------------------------------------------------ accumulator


def accumulated(chunks: list[torch.Tensor], **keywords: object) -> nk.CovarianceAccumulator:
    accumulator = nk.CovarianceAccumulator(chunks[0].shape[1], **keywords)
    for chunk in chunks:
        accumulator.update(chunk)
    return accumulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_chunk_sizes_do_not_matter(offset: float, dtype: torch.dtype) -> None:
    offset = min(offset, 30.0) if dtype.itemsize == 2 else offset  # 16 bits resolve no more
    x = rows_of((1000, 21), dtype, offset)
    want, mean = oracle(as_float64(x)), as_float64(x).mean(0)
    for size in (1, 7, 333, 1000):
        accumulator = accumulated(list(x.split(size)))
        assert relative_error(accumulator.compute(), want) <= max(TOLERANCE[dtype], 1e-15 * offset)
        np.testing.assert_allclose(accumulator.mean.numpy(), mean, rtol=1e-9, atol=1e-6)
        assert float(accumulator.count) == 1000


def test_accumulator_of_mixed_and_weighted_chunks() -> None:
    x, w = rows_of((90, 5), torch.float64, offset=2), torch.rand(90, dtype=torch.float64)
    accumulator = nk.CovarianceAccumulator(5)
    accumulator.update(x[:0])
    accumulator.update(x[:30], w[:30])
    accumulator.update(x[30:60].double(), torch.zeros(30))
    accumulator.update(x[60:], w[60:])
    kept = torch.cat([x[:30], x[60:]]), torch.cat([w[:30], w[60:]])
    assert relative_error(accumulator.compute(1), oracle(kept[0].numpy(), kept[1].numpy(), correction=1)) <= 1e-12
    assert float(accumulator.count) == pytest.approx(float(kept[1].sum()))
    before = accumulator.compute()
    with pytest.raises(ValueError, match="x has no finite"):
        accumulator.update(nan_at(0, 0)[:, [0, 1, 2, 3, 0]])
    assert torch.equal(accumulator.compute(), before)


def test_accumulator_without_centering() -> None:
    x = rows_of((64, 4), offset=3)
    accumulator = accumulated(list(x.split(10)), center=False, dtype=torch.float32)
    S = accumulator.compute(correction=1)
    assert S.dtype == accumulator.mean.dtype == torch.float32
    assert relative_error(S, oracle(as_float64(x), center=False, correction=1)) <= 1e-6


def test_merge_order_and_copies() -> None:
    x = rows_of((300, 8), offset=100)
    parts = [accumulated([part]) for part in x.split([10, 190, 100])]
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        total = nk.CovarianceAccumulator(8)
        for k in order:
            total.merge(parts[k])
        results.append(total.compute())
    for result in results:
        assert relative_error(result, oracle(as_float64(x))) <= 1e-6
        assert torch.equal(result, result.T)
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)
    parts[0].merge(parts[0])
    assert float(parts[0].count) == 20
    mean = parts[1].mean
    mean += 1
    assert not torch.equal(mean, parts[1].mean)


def test_state_dict_round_trip() -> None:
    first, second = rows_of((50, 6)).split(25)
    saved = io.BytesIO()
    torch.save(accumulated([first]).state_dict(), saved)
    saved.seek(0)
    accumulator = nk.CovarianceAccumulator(6)
    accumulator.load_state_dict(torch.load(saved, weights_only=True))
    accumulator.update(second)
    assert torch.equal(accumulator.compute(), accumulated([first, second]).compute())
    with pytest.raises(ValueError, match="center"):
        nk.CovarianceAccumulator(6, center=False).load_state_dict(accumulator.state_dict())


def reduce_on_one_rank(rank: int, world: int) -> None:
    """Rows r = rank modulo world of one matrix, the last rank without any: every rank must end with the whole."""
    x = rows_of((200, 6), offset=1e3)
    mine = x[rank :: world - 1] if rank < world - 1 else x[:0]
    accumulator = accumulated([mine])
    accumulator.all_reduce()
    assert relative_error(accumulator.compute(), oracle(as_float64(x))) <= 1e-6
    assert torch.equal(accumulator.compute(), accumulator.compute().T)
    assert float(accumulator.count) == 200
    np.testing.assert_allclose(accumulator.mean.numpy(), as_float64(x).mean(0), rtol=1e-9)
    cross = nk.CrossCovarianceAccumulator(2, 4)
    cross.update(mine[:, :2], mine[:, 2:])
    cross.all_reduce()
    assert worst_cross_error(cross.compute(), x[:, :2], x[:, 2:]) <= 1e-6
    for result in (accumulator.compute(), *fields_of(cross.compute())):
        everywhere = [torch.empty_like(result) for _ in range(world)]
        torch.distributed.all_gather(everywhere, result)
        assert all(torch.equal(one, result) for one in everywhere)
    pair = torch.distributed.new_group([0, 1])
    if rank < 2:
        partial = accumulated([x[rank : rank + 1]])
        partial.all_reduce(pair)
        assert float(partial.count) == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_all_reduce(world: int, tmp_path: Path) -> None:
    on_every_rank(reduce_on_one_rank, world, tmp_path)


# ------------------------------------------------------------------------------------------------ two streams


def two_streams(
    N: int, n: int, m: int, dtype: torch.dtype = torch.float32, offset: float = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [N, n] and predictors [N, m] with common factors."""
    joined = rows_of((N, n + m), torch.float64, seed=seed)
    joined = joined + 0.7 * joined.flip(-1)
    return (joined[:, :n] + offset).to(dtype), (joined[:, n:] - offset / 2).to(dtype)


def cross_oracle(
    targets: torch.Tensor, predictors: torch.Tensor, weights: torch.Tensor | None = None, **keywords: object
) -> tuple[np.ndarray, ...]:
    """cov, cross, variance, predictor_mean and target_mean out of the joint covariance in float64."""
    n, joined = targets.shape[1], np.concatenate([as_float64(targets), as_float64(predictors)], 1)
    w = np.ones(len(joined)) if weights is None else as_float64(weights)
    S, mean = oracle(joined, w, **keywords), w[w > 0] @ joined[w > 0] / w.sum()
    return S[n:, n:], S[:n, n:], S.diagonal()[:n], mean[n:], mean[:n]


def fields_of(result: nk.CrossCovariance) -> tuple[torch.Tensor, ...]:
    return result.cov, result.cross, result.variance, result.predictor_mean, result.target_mean


def worst_cross_error(
    result: nk.CrossCovariance, targets: torch.Tensor, predictors: torch.Tensor, *args: object, **keywords: object
) -> float:
    """Error of cov and variance over their largest entry, of cross over the largest product of deviations, of the means
    over the largest deviation or, where that is larger, a hundredth of the mean."""
    cov, cross, variance, *means = cross_oracle(targets, predictors, *args, **keywords)
    top, scale = cov.max(), np.sqrt(cov.diagonal().max() * variance.max())
    errors = [relative_error(result.cov, cov, 1e-6), relative_error(result.variance, variance, 1e-6)]
    errors.append(float(np.abs(result.cross.double().numpy() - cross).max()) / max(scale, 1e-6))
    for got, want in zip(fields_of(result)[3:], means, strict=True):
        floor = max(np.sqrt(max(top, variance.max())), 1e-3, 1e-2 * np.abs(want).max())
        errors.append(float(np.abs(got.double().numpy() - want).max() / floor))
    return max(errors)


# A single row and column, fewer and more rows than a block of the product (1024), m < n and m > n.
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (17, 33, 2), (1024, 20, 20), (1025, 5, 60), (2500, 70, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_covariance_is_cut_from_the_joint_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    targets, predictors = two_streams(*shape, dtype, offset=2)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(3)) + 0.1
    weights[1::3] = 0
    for w in (None, weights):
        for center, correction in ((True, 0), (False, 0), (True, 0.05)):
            got = nk.cross_covariance(targets, predictors, weights=w, center=center, correction=correction)
            assert all(x.dtype == torch.float64 for x in fields_of(got))
            error = worst_cross_error(got, targets, predictors, w, center=center, correction=correction)
            assert error <= 1.5 * TOLERANCE[dtype]
            assert got.exclude_same == (shape[1] == shape[2])
    targets[1::3], predictors[1::3] = torch.nan, torch.inf
    got_without = nk.cross_covariance(targets, predictors, weights=weights, correction=0.05)
    assert all(torch.equal(a, b) for a, b in zip(fields_of(got), fields_of(got_without), strict=True))


@pytest.mark.parametrize("offset", [0.0, 100.0, 3000.0, 3e4])
def test_an_offset_of_both_streams_costs_no_accuracy(offset: float) -> None:
    targets, predictors = two_streams(6000, 50, 70, offset=offset)
    assert worst_cross_error(nk.cross_covariance(targets, predictors), targets, predictors) <= 3e-7
    targets, predictors = two_streams(600, 50, 70, torch.float64, offset=offset)
    assert worst_cross_error(nk.cross_covariance(targets, predictors), targets, predictors) <= 1e-12


def test_products_of_numbers_on_a_coarse_grid_do_not_round_to_one_side() -> None:
    """Targets that are the predictors themselves, in float32 around 3e4: products of one sign on a grid of 2^-18."""
    x = rows_of((60000, 16), offset=3e4)
    assert worst_cross_error(nk.cross_covariance(x, x), x, x) <= 2e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_columns_of_both_streams(dtype: torch.dtype) -> None:
    targets, predictors = two_streams(1300, 4, 5, dtype, offset=3)
    targets[:, 2], predictors[:, 1] = 0.1, 0.3
    for weights in (None, torch.arange(1300) % 4):
        got = nk.cross_covariance(targets, predictors, weights=weights)
        assert not got.cross[2].any()
        assert not got.cross[:, 1].any()
        assert got.variance[2] == 0
        assert got.cov[1, 1] == 0
        assert got.target_mean[2] == targets[0, 2].double()
        assert (got.cross != 0).sum() == 3 * 4


def test_cross_covariance_of_a_stream_with_itself() -> None:
    x = rows_of((3000, 30), offset=5)
    got = nk.cross_covariance(x, x, dtype=torch.float32, exclude_same=False)
    assert got.cross.dtype == got.variance.dtype == got.cov.dtype == torch.float32
    assert not got.exclude_same
    torch.testing.assert_close(got.cross, got.cov, rtol=0, atol=4e-7 * float(got.cov.max()))
    torch.testing.assert_close(got.variance, got.cov.diagonal(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_allowed_low_precision_products_do_not_reach_the_moments(precision: str) -> None:
    targets, predictors = two_streams(2000, 40, 40)
    want = fields_of(nk.cross_covariance(targets, predictors))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        allowed = torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = fields_of(nk.cross_covariance(targets, predictors))
        assert torch.backends.mkldnn.matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_strides_of_both_streams() -> None:
    joined = rows_of((90, 12), offset=3)
    views = joined[:, :5], joined[:, 5:]
    for targets, predictors in (views, (joined.T[:12, ::9], joined[:12, ::2]), (joined[::3], joined[::3].flip(0))):
        got = nk.cross_covariance(targets, predictors)
        want = nk.cross_covariance(targets.contiguous(), predictors.contiguous())
        for a, b in zip(fields_of(got), fields_of(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), N=st.integers(2, 60), n=st.integers(1, 12), m=st.integers(1, 12))
def test_properties_of_cross_covariance(seed: int, N: int, n: int, m: int) -> None:
    targets, predictors = two_streams(N, n, m, torch.float64, offset=3, seed=seed)
    S = nk.cross_covariance(targets, predictors)
    bound = (S.variance[:, None] * S.cov.diagonal()).sqrt()
    assert bool((S.cross.abs() <= bound * (1 + 1e-12)).all())  # Cauchy-Schwarz
    swapped = nk.cross_covariance(predictors, targets)
    torch.testing.assert_close(swapped.cross.T, S.cross, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(swapped.cov.diagonal(), S.variance, rtol=1e-10, atol=1e-12)
    mixing = torch.randn(m, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = nk.cross_covariance(targets + 7, predictors @ mixing - 7)
    torch.testing.assert_close(mixed.cross, S.cross @ mixing, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(mixed.cov, mixing.T @ S.cov @ mixing, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("keywords", [{}, {"center": False}, {"correction": 1}], ids=str)
def test_cross_covariance_gradients(keywords: dict[str, object]) -> None:
    targets, predictors = (x.requires_grad_() for x in two_streams(6, 3, 2, torch.float64, offset=1))
    w = (torch.rand(6, dtype=torch.float64) + 0.5).requires_grad_()

    def all_fields(targets, predictors, weights=None):
        return fields_of(nk.cross_covariance(targets, predictors, weights=weights, **keywords))

    assert torch.autograd.gradcheck(all_fields, (targets, predictors))
    assert torch.autograd.gradcheck(all_fields, (targets, predictors, w))
    assert torch.autograd.gradgradcheck(all_fields, (targets, predictors, w))
    leaves = [x.detach().clone().requires_grad_() for x in (targets, predictors, w)]
    for function, inputs in ((all_fields, (targets, predictors, w)), (reference.cross_covariance, leaves)):
        extra = {} if function is all_fields else keywords
        fields = function(*inputs[:2], weights=inputs[2], **extra)
        sum(field.sin().sum() for field in fields).backward()
    for x, leaf in zip((targets, predictors, w), leaves, strict=True):
        torch.testing.assert_close(x.grad, leaf.grad)


def test_cross_covariance_gradients_at_weight_zero_and_in_float32() -> None:
    targets, predictors = two_streams(7, 3, 2, torch.float64)
    w = torch.tensor([1.0, 2, 0, 1, 0.5, 1, 3], dtype=torch.float64)
    results = []
    for function, tiny in ((lambda *xs: fields_of(nk.cross_covariance(*xs[:2], weights=xs[2])), 0.0), (None, 1e-200)):
        leaves = [x.clone().requires_grad_() for x in (targets, predictors, w + tiny)]
        fields = function(*leaves) if function else reference.cross_covariance(*leaves[:2], weights=leaves[2])
        sum(field.square().sum() for field in fields).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1])
    targets[2] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (targets, predictors, w)]
    nk.cross_covariance(*leaves[:2], weights=leaves[2]).cross.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    single = two_streams(50, 4, 4)[0].requires_grad_()
    nk.cross_covariance(single, single.detach()).cross.square().sum().backward()
    double = single.detach().double().requires_grad_()
    reference.cross_covariance(double, double.detach())[1].square().sum().backward()
    assert single.grad.dtype == torch.float32
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-5, atol=1e-5 * float(double.grad.abs().max()))


def test_cross_moments_in_transforms() -> None:
    targets, predictors = two_streams(30, 4, 3, torch.float64)
    mean = centered_moments(predictors[None])[1]
    w = torch.rand(1, 30, dtype=torch.float64)
    batch = (targets[None], predictors[None])
    for weights in (None, w):
        weighted_mean = mean if weights is None else centered_moments(batch[1], weights)[1]
        arguments = (batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_(), weighted_mean, weights)
        torch.library.opcheck(torch.ops.neuraldeps.cross_moments.default, arguments)
    pairs = targets.view(3, 10, 4), predictors.view(3, 10, 3)
    got = vmap(lambda x, y: nk.cross_covariance(x, y).cross)(*pairs)
    want = torch.stack([nk.cross_covariance(x, y).cross for x, y in zip(*pairs, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)

    def loss(x, y):
        return nk.cross_covariance(x, y).cross.square().sum()

    def plain(x, y):
        return reference.cross_covariance(x, y)[1].square().sum()

    torch.testing.assert_close(vmap(grad(loss))(*pairs), vmap(grad(plain))(*pairs))
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*batch_rows(batch)), loss(*batch_rows(batch)))
    shapes = nk.cross_covariance(torch.empty(9, 4, device="meta"), torch.empty(9, 3, device="meta"))
    assert (shapes.cross.shape, shapes.variance.shape, shapes.cross.device.type) == ((4, 3), (4,), "meta")


def batch_rows(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0][0], batch[1][0]


def cross_accumulated(
    targets: torch.Tensor, predictors: torch.Tensor, size: int, **keywords: object
) -> nk.CrossCovarianceAccumulator:
    accumulator = nk.CrossCovarianceAccumulator(targets.shape[1], predictors.shape[1], **keywords)
    for x, y in zip(targets.split(size), predictors.split(size), strict=True):
        accumulator.update(x, y)
    return accumulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_chunk_sizes_of_two_streams_do_not_matter(offset: float, dtype: torch.dtype) -> None:
    offset = min(offset, 30.0) if dtype.itemsize == 2 else offset  # 16 bits resolve no more
    targets, predictors = two_streams(150, 13, 21, dtype, offset)
    for size in (1, 40, 150):
        accumulator = cross_accumulated(targets, predictors, size)
        error = worst_cross_error(accumulator.compute(1), targets, predictors, correction=1)
        assert error <= max(TOLERANCE[dtype], 1e-15 * offset)
        assert float(accumulator.count) == 150


def test_weighted_and_uncentred_chunks_of_two_streams() -> None:
    targets, predictors = two_streams(90, 5, 3, torch.float64, offset=2)
    w = torch.rand(90, dtype=torch.float64)
    for center in (True, False):
        accumulator = nk.CrossCovarianceAccumulator(5, 3, center=center, dtype=torch.float32)
        accumulator.update(targets[:0], predictors[:0])
        accumulator.update(targets[:30], predictors[:30], w[:30])
        accumulator.update(targets[:30] + torch.nan, predictors[:30], torch.zeros(30))
        accumulator.update(targets[30:], predictors[30:], w[30:])
        result = accumulator.compute(1)
        assert all(x.dtype == torch.float32 for x in fields_of(result))
        assert worst_cross_error(result, targets, predictors, w, center=center, correction=1) <= 2e-7
    before = accumulator.state_dict()
    for bad in ((targets + torch.nan, predictors), (targets, predictors + torch.nan)):
        with pytest.raises(ValueError, match="has no finite"):
            accumulator.update(*bad)
    after = accumulator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "center")


def test_merge_and_state_of_two_streams() -> None:
    targets, predictors = two_streams(300, 4, 6, torch.float64, offset=100)
    parts = [
        cross_accumulated(x, y, 50)
        for x, y in zip(targets.split([10, 190, 100]), predictors.split([10, 190, 100]), strict=True)
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        total = nk.CrossCovarianceAccumulator(4, 6)
        for k in order:
            total.merge(parts[k])
        result = total.compute()
        assert worst_cross_error(result, targets, predictors) <= 1e-12
        assert torch.equal(result.cov, result.cov.T)
    saved = io.BytesIO()
    torch.save(parts[1].state_dict(), saved)
    saved.seek(0)
    loaded = nk.CrossCovarianceAccumulator(4, 6)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    loaded.merge(parts[0])
    parts[1].merge(parts[0])
    pairs = zip(fields_of(loaded.compute()), fields_of(parts[1].compute()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="center"):
        nk.CrossCovarianceAccumulator(4, 6, center=False).load_state_dict(loaded.state_dict())
    state = {**loaded.state_dict(), "target_mean": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"state\['cross_moment'\] must be \[2, 6\]"):
        nk.CrossCovarianceAccumulator(2, 6).load_state_dict(state)
    result = loaded.compute()
    result.target_mean.add_(1)
    assert not torch.equal(loaded.compute().target_mean, result.target_mean)


# ------------------------------------------------------------------------------------------------ sanitizers, GPU


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    assert_sanitized("cpu_sanitizer_driver.cpp", "covariance.cpp", definitions=["ND_DRIVE_COVARIANCE"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_matches_the_cpu(dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 5), (1000, 1000), (5000, 130), (3, 700, 65)]:
        for offset in (0.0, 100.0):
            x = rows_of(shape, dtype, offset)
            w = (torch.arange(x[..., 0].numel()) % 3).view(x.shape[:-1]).double()
            w = w if int(w.sum()) else None
            for weights in (None, w):
                want = nk.covariance(x, weights=weights)
                got = nk.covariance(x.cuda(), weights=None if weights is None else weights.cuda()).cpu()
                tolerance = 1e-12 if dtype == torch.float64 else 2e-5
                assert float((got - want).abs().max()) <= tolerance * max(float(want.abs().max()), 1e-6)
                assert torch.equal(got, got.mT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_cross_covariance_matches_the_cpu(dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1), (1000, 300, 500), (5000, 130, 7)]:
        targets, predictors = two_streams(*shape, dtype, offset=20)
        w = torch.arange(shape[0]) % 3 + 0.5
        for weights in (None, w):
            want = nk.cross_covariance(targets, predictors, weights=weights)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            try:
                on_gpu = [x if x is None else x.cuda() for x in (targets, predictors, weights)]
                torch.cuda.set_sync_debug_mode("error")  # the host must not wait
                got = nk.cross_covariance(on_gpu[0], on_gpu[1], weights=on_gpu[2])
            finally:
                torch.cuda.set_sync_debug_mode("default")
                torch.set_float32_matmul_precision(before)
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            scale = float(want.cov.abs().max() + want.variance.max()) + 1e-6
            for a, b in ((got.cross, want.cross), (got.variance, want.variance)):
                assert float((a.cpu() - b).abs().max()) <= tolerance * scale
