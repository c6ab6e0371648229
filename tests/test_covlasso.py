"""CovLasso: the operator against independent float64 oracles, the identities of its theory, and input made to break it.

Oracles: exhaustive search over sign patterns (n <= 5), scikit-learn's Lasso and enet_path, scipy's L-BFGS-B, and the
coordinate descent of `neuraldeps_kernels.reference.covlasso`, which is itself held against the first three here.
T1, T2, ... name the acceptance checks of the project's notes on arXiv 2211.12339, 3.1 ... their equations.
rho = -(S Theta); lam = 2 alpha of scikit-learn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import cov_factory as make
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, enet_path
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.data.logits import load_imagenet_covariance
from neuraldeps_kernels.ops.covlasso_rules import _solve_by_reference, solve_targets
from neuraldeps_kernels.reference import covlasso as reference

STATUS = {"converged": 0, "capped": 1, "collinear": 2, "not_psd": 3}
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-12}  # reachable KKT violation, relative to lambda_max / 2


pytestmark = pytest.mark.usefixtures("one_thread")


def everyone(S: Tensor) -> Tensor:
    return torch.arange(len(S))


def penalty_of(S: Tensor, targets: Tensor, candidates: Tensor | None, factors: Tensor | None) -> Tensor:
    """Penalty [T, n] with +inf where a category may not be used, as the oracle takes it."""
    penalty = torch.ones(len(S), dtype=F64) if factors is None else factors.double()
    penalty = penalty.expand(len(targets), -1)
    return penalty if candidates is None else torch.where(candidates, penalty, torch.inf)


def recomputed_violation(S: Tensor, solution, candidates=None, factors=None) -> Tensor:
    """KKT violation [T] in float64 of the returned coefficients, against S exactly as the operator was given it."""
    penalty = penalty_of(S, solution.targets, candidates, factors)
    return reference.kkt_violation(S, solution.dense(), solution.targets, solution.lam, penalty)


def coefficient_rounding(S: Tensor, solution) -> Tensor:
    """Violation [T] that storing theta may cost at worst: max_j sum_k |S_jk theta_k| eps / 2 over lambda_max / 2."""
    theta = solution.dense()
    largest = (theta.double().abs() @ S.double().abs()).amax(1)
    return torch.finfo(theta.dtype).eps / 2 * largest / (solution.lambda_max / 2).clamp_min(1e-300)


def certify(S: Tensor, solution, tol: float, candidates=None, factors=None) -> None:
    """Converged, optimal by an independent check, and every reported number equal to what the coefficients imply.

    Where rounding of the coefficients alone may exceed half the tolerance, `collinear` (out of reach) is right as well,
    if the violation is of that size.
    """
    targets, theta = solution.targets, solution.dense()
    penalty = penalty_of(S, targets, candidates, factors)
    variance = S.double().diagonal()[targets]
    assert theta.dtype == (S.dtype if S.dtype == F64 else F32)
    assert (theta.gather(1, targets[:, None]) == 0).all()
    violation = reference.kkt_violation(S, theta, targets, solution.lam, penalty)
    rounding = coefficient_rounding(S, solution)
    for i, name, v, r in zip(targets, solution.status_names, violation, rounding, strict=True):
        out_of_reach = name == "collinear" and r > tol / 2 and v <= 4 * r
        assert (name == "converged" and v <= tol) or out_of_reach, f"target {i} {name}: {v:.2e}, rounding {r:.2e}"
    exact = 1e-5 if S.dtype != F64 else 1e-9
    assert (solution.kkt_violation - violation).abs().max() <= max(tol, exact)
    assert (solution.err2 - reference.err2(S, theta, targets)).abs().le(exact * variance).all()
    gap = reference.duality_gap(S, theta, targets, solution.lam, penalty)
    # tau follows the largest |rho|, so a rounding of rho moves the gap by lambda_max |theta|_1 times that.
    norm = torch.where(theta != 0, theta.double().abs() * penalty, 0.0).sum(1)
    slack = exact * variance + 2 * solution.lambda_max * norm * rounding
    assert (solution.duality_gap - gap).abs().le(slack).all()
    assert solution.n_nonzero.tolist() == (theta != 0).sum(1).tolist()
    torch.testing.assert_close(solution.lambda_max, reference.lambda_max(S, targets, penalty))
    explained = torch.where(variance > 0, solution.err2 / variance, 0.0)
    torch.testing.assert_close(solution.relative_error, explained)


# ---------------------------------------------------------------------------------------------------- the oracles agree


def exhaustive(S: np.ndarray, target: int, lam: float) -> np.ndarray:
    """Minimiser over all 3^(n-1) sign patterns of a positive definite S: exact, and nothing like a solver."""
    others = [j for j in range(len(S)) if j != target]
    best, best_value = np.zeros(len(S)), S[target, target]
    for signs in itertools.product((-1, 0, 1), repeat=len(others)):
        a = [j for j, s in zip(others, signs, strict=True) if s]
        if not a:
            continue
        s = np.array([s for s in signs if s])
        x = np.linalg.solve(S[np.ix_(a, a)], S[a, target] - lam / 2 * s)
        if (np.sign(x) != s).any():
            continue
        value = S[target, target] - 2 * x @ S[a, target] + x @ S[np.ix_(a, a)] @ x + lam * np.abs(x).sum()
        if value < best_value:
            best_value, best = value, np.zeros(len(S))
            best[a] = x
    return best


def scikit_learn(S: Tensor, target: int, lam: float) -> np.ndarray:
    """Lasso on data whose second moment is exactly S: X = sqrt(n) L', S = L L'."""
    n = len(S)
    X = math.sqrt(n) * torch.linalg.cholesky(S).T.numpy()
    others = [j for j in range(n) if j != target]
    model = Lasso(alpha=lam / 2, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
    theta = np.zeros(n)
    theta[others] = model.fit(X[:, others], X[:, target]).coef_
    return theta


@pytest.mark.parametrize("n", [2, 3, 4, 5])  # 3^(n-1) sign patterns
@pytest.mark.parametrize("solve", ["operator", "reference"])
def test_exhaustive_search(n, solve):
    for seed in range(6):
        S = make.mixed(n, seed=10 * seed)
        for ratio in (0.9, 0.5, 0.1, 0.01):
            lam = ratio * reference.lambda_max(S, everyone(S))
            if solve == "operator":
                theta = nk.covlasso(S, lam, tol=1e-12).dense()
            else:
                theta = reference.covlasso(S, everyone(S), lam)
            for i in range(n):
                np.testing.assert_allclose(theta[i].numpy(), exhaustive(S.numpy(), i, lam[i].item()), atol=1e-9)


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_T2_scikit_learn(ratio):
    S = make.mixed(30, seed=3)
    targets = everyone(S)[::6]
    lam = ratio * reference.lambda_max(S, targets)
    solution = nk.covlasso(S, lam, targets=targets, tol=1e-12)
    oracle = reference.covlasso(S, targets, lam)
    for t, i in enumerate(targets.tolist()):
        expected = scikit_learn(S, i, lam[t].item())
        np.testing.assert_allclose(solution.dense()[t].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(oracle[t].numpy(), expected, atol=1e-6)
        np.testing.assert_array_equal(solution.dense()[t].numpy() != 0, np.abs(expected) > 1e-9)


def test_T2_scikit_learn_gram_path():
    """enet_path on the Gram matrix alone: another solver, and the form nearest to ours."""
    S = make.clustered(40, 60, seed=5)
    for i in (0, 17):
        others = [j for j in range(40) if j != i]
        Q, c = S[others][:, others].numpy(), S[others, i].numpy()
        alphas = np.abs(c).max() * np.array([0.5, 0.2, 0.05])
        y = np.zeros(1)
        y[0] = math.sqrt(S[i, i].item())  # only its norm matters beside Q and c
        _, coefficients, _ = enet_path(
            np.zeros((1, 39)), y, l1_ratio=1.0, alphas=alphas, precompute=Q, Xy=c, tol=1e-15, max_iter=300_000,
            check_input=False,
        )  # fmt: skip
        for k, alpha in enumerate(alphas):
            theta = nk.covlasso(S, 2 * float(alpha), targets=[i], tol=1e-12).dense()[0, others].numpy()
            np.testing.assert_allclose(theta, coefficients[:, k], atol=1e-5)


def test_scipy_finds_nothing_better():
    """Objective against a bounded quasi-Newton solver in theta = u - v, u >= 0, v >= 0."""
    S = make.low_rank(15, 6, seed=8, noise=0.1)
    lam = 0.05 * reference.lambda_max(S, everyone(S))
    theta = nk.covlasso(S, lam, tol=1e-12).dense()
    for i in (0, 7, 14):
        others = [j for j in range(15) if j != i]
        Q, c, l = S[others][:, others].numpy(), S[others, i].numpy(), lam[i].item()

        def value(uv, Q=Q, c=c, l=l):
            x = uv[:14] - uv[14:]
            slope = 2 * (Q @ x - c)
            return x @ Q @ x - 2 * c @ x + l * uv.sum(), np.concatenate([slope + l, l - slope])

        found = scipy.optimize.minimize(
            value, np.zeros(28), jac=True, bounds=[(0, None)] * 28,
            options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15},
        )  # fmt: skip
        x = theta[i, others].numpy()
        ours = x @ Q @ x - 2 * c @ x + l * np.abs(x).sum()
        assert abs(ours - found.fun) <= 1e-7 * S[i, i].item()
        assert ours <= found.fun + 1e-12 * S[i, i].item()


def test_reference_certificates_by_loop():
    """The oracle's own violation and gap, entry by entry in Python floats, so that what certifies is itself checked."""
    S = make.mixed(7, seed=1)
    factors = torch.tensor([0.5, 1.0, 2.0, 1.0, math.inf, 1.0, 3.0], dtype=F64)
    targets = torch.tensor([2, 5])
    lam = torch.tensor([0.8, 2.5], dtype=F64)
    theta = reference.covlasso(S, targets, lam, factors, tol=1e-3) + 0.02 * make.normal(2, 7, seed=4)
    theta[:, 4] = 0
    theta[[0, 1], targets] = 0
    theta[0, 0] = 0
    got = (
        reference.kkt_violation(S, theta, targets, lam, factors),
        reference.duality_gap(S, theta, targets, lam, factors),
    )
    for t, i in enumerate(targets.tolist()):
        pinned = theta[t].clone()
        pinned[i] = -1
        rho = [-sum(S[j, k].item() * pinned[k].item() for k in range(7)) for j in range(7)]
        usable = [j for j in range(7) if j not in (i, 4)]
        top = max(abs(S[i, j].item()) / factors[j].item() for j in usable)
        half = lam[t].item() / 2
        worst = 0.0
        for j in usable:
            x, p = theta[t, j].item(), factors[j].item()
            worst = max(worst, abs(rho[j] - half * p * math.copysign(1, x)) if x else abs(rho[j]) - half * p)
        tau = min(1.0, half / max(abs(rho[j]) / factors[j].item() for j in usable))
        error = sum(pinned[j].item() * S[j, k].item() * pinned[k].item() for j in range(7) for k in range(7))
        primal = error + 2 * half * sum(abs(theta[t, j].item()) * factors[j].item() for j in usable)
        dual = 2 * tau * rho[i] - tau**2 * error
        assert got[0][t].item() == pytest.approx(worst / top, rel=1e-10)
        assert got[1][t].item() == pytest.approx(primal - dual, rel=1e-10)
        assert reference.err2(S, theta, targets)[t].item() == pytest.approx(error, rel=1e-10)


# ------------------------------------------------------------------------------------------------ optimality everywhere

COVARIANCES: dict[str, Callable[[], Tensor]] = {
    "mixed": lambda: make.mixed(60, seed=0),  # T1
    "clustered": lambda: make.clustered(150, 200, seed=1),  # what a classifier gives, rank 149
    "singular": lambda: make.clustered(150, 40, seed=2),  # more categories than features: rank 40
    "low rank": lambda: make.low_rank(80, 10, seed=3),
    "low rank and noise": lambda: make.low_rank(80, 10, seed=4, noise=0.05),
    "few samples": lambda: make.mixed(50, seed=5, samples=20),  # rank 19
    "duplicates": lambda: make.repeated(make.mixed(40, seed=6), 20),
    "duplicates of a singular one": lambda: make.repeated(make.low_rank(40, 12, seed=7), 25),
    "near duplicates 1e-3": lambda: make.near_duplicates(30, 20, seed=8, difference=1e-3),
    "near duplicates 1e-6": lambda: make.near_duplicates(30, 20, seed=9, difference=1e-6),
    "scale 1e-8": lambda: 1e-8 * make.mixed(40, seed=10),
    "scale 1e8": lambda: 1e8 * make.mixed(40, seed=11),
    "unequal scales": lambda: make.unequal_scales(make.mixed(40, seed=12), 3, seed=12),
    "unequal scales, singular": lambda: make.unequal_scales(make.low_rank(60, 15, seed=13), 3, seed=13),
    "identity": lambda: torch.eye(20, dtype=F64),
    "diagonal with zeros": lambda: torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64)),
    "equicorrelated": lambda: make.equicorrelated(33, 0.6),  # every correlation ties
    "negative ties": lambda: make.equicorrelated(9, -0.12),  # nearly singular, all equal
    "rank one": lambda: torch.outer(torch.arange(1.0, 18.0, dtype=F64), torch.arange(1.0, 18.0, dtype=F64)),
    "all ones": lambda: torch.ones(19, 19, dtype=F64),
    "chain": lambda: make.toeplitz(70, 0.95),
    "two": lambda: make.mixed(2, seed=14),
    "one block and one": lambda: make.mixed(17, seed=15),  # one more than a vector register of float32
    "constant category": lambda: torch.block_diag(make.mixed(30, seed=16), torch.zeros(2, 2, dtype=F64)),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", COVARIANCES)
def test_T1_kkt(name, dtype):
    """Every target optimal at the reachable tolerance, and as good as the oracle."""
    S = COVARIANCES[name]().to(dtype)
    for ratio in (0.9, 0.5, 0.1, 0.01):
        solution = nk.covlasso(S, lam_ratio=ratio, tol=TOLERANCE[dtype])
        certify(S, solution, TOLERANCE[dtype])
        if dtype == F64:
            some = solution.targets[::5]
            error = reference.err2(S, reference.covlasso(S, some, solution.lam[some]), some)
            assert (solution.err2[some] - error).abs().le(1e-9 * S.diagonal()[some]).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_supports_much_larger_than_the_first_ones(dtype):
    """Sixteen isolated categories first, then hundred that use each other: room must not be guessed from the first."""
    S = torch.block_diag(torch.eye(16, dtype=F64), make.mixed(100, seed=20)).to(dtype)
    solution = nk.covlasso(S, lam_ratio=1e-3, tol=TOLERANCE[dtype])
    certify(S, solution, TOLERANCE[dtype])
    assert solution.n_nonzero[:16].tolist() == [0] * 16
    assert solution.n_nonzero[16:].min() > 80


@pytest.mark.parametrize("dtype", [F32, F64])
def test_full_support(dtype):
    """lam so small that all n - 1 others are used: nothing caps the support."""
    S = make.mixed(200, seed=21, samples=4000).to(dtype)
    solution = nk.covlasso(S, lam_ratio=1e-7, tol=TOLERANCE[dtype], targets=[0, 77, 199])
    certify(S, solution, TOLERANCE[dtype])
    assert solution.n_nonzero.tolist() == [199, 199, 199]


def test_support_of_a_thousand():
    """More coefficients than any fixed buffer would hold."""
    S = make.mixed(1001, seed=22, samples=6000)
    solution = nk.covlasso(S, lam_ratio=1e-6, targets=[500], tol=1e-10)
    certify(S, solution, 1e-10)
    assert solution.n_nonzero.item() >= 990


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sizes_around_the_vector_width(n, dtype):
    S = make.mixed(n, seed=n).to(dtype)
    for ratio in (0.3, 0.003):
        certify(S, nk.covlasso(S, lam_ratio=ratio, tol=TOLERANCE[dtype]), TOLERANCE[dtype])


@pytest.mark.parametrize("exponent", [-40, -20, 20, 40])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_no_absolute_threshold(exponent, dtype):
    """A power of two changes no bit of any product, so it may change no bit of the solution either."""
    S = make.clustered(60, 30, seed=30).to(dtype)
    plain, scaled = nk.covlasso(S, lam_ratio=0.05), nk.covlasso(S * 2.0**exponent, lam_ratio=0.05)
    assert torch.equal(plain.dense(), scaled.dense())
    assert torch.equal(plain.err2 * 2.0**exponent, scaled.err2)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("seed", [40, 41])
def test_bf16_rounded_covariance(kind, seed):
    """Rounding to bfloat16 makes S indefinite: the result is certified or said to fail, never silently wrong."""
    S = (make.low_rank(60, 8, seed), make.clustered(60, 20, seed), make.mixed(60, seed), make.toeplitz(60, 0.99))[kind]
    rounded = S.to(torch.bfloat16).float()
    for ratio in (0.5, 0.1, 0.01, 0.001):
        converged_or_said(rounded, nk.covlasso(rounded, lam_ratio=ratio))


@pytest.mark.parametrize(("seed", "ratio"), [(17, 1e-2), (18, 1e-3), (4, 2e-4)])
def test_float32_semidefinite_is_not_called_indefinite(seed, ratio):
    """S = x' x in small integers is exact in float32, so positive semidefinite to the bit, of rank 20 of 80."""
    x = torch.randint(-1, 2, (20, 80), generator=torch.Generator().manual_seed(seed)).float()
    S = x.T @ x
    solution = nk.covlasso(S, lam_ratio=ratio)
    assert "not_psd" not in solution.status_names
    converged_or_said(S, solution)


@pytest.mark.parametrize(("seed", "n", "ratio"), [(1, 5, 0.03125), (9, 13, 0.01), (367, 14, 0.01), (257, 9, 0.03125)])
def test_float32_certificate_is_not_rounded_away(seed, n, ratio):
    """Categories in units up to 10^4 apart: the certificate of a float32 solution must not suffer from float32."""
    S = make.unequal_scales(make.mixed(n, seed, samples=200), 2, seed).float()
    solution = nk.covlasso(S, lam_ratio=ratio)
    converged_or_said(S, solution)
    violation = recomputed_violation(S, solution)
    assert (solution.kkt_violation - violation).abs().max() <= 5e-7


@pytest.mark.parametrize("name", ["duplicates", "near duplicates", "clustered"])
def test_float32_at_the_end_of_its_precision(name):
    """lam so small that float32 can barely certify: converged is true, frequent, and nothing runs to the cap."""
    S = {
        "duplicates": lambda: make.repeated(make.mixed(60, 0, samples=300), 40),
        "near duplicates": lambda: make.near_duplicates(80, 60, 0, 1e-5),
        "clustered": lambda: make.clustered(200, 60, 0, samples=2000),
    }[name]().float()
    solution = nk.covlasso(S, lam_ratio=1e-4)
    converged_or_said(S, solution)
    assert (solution.status == STATUS["converged"]).double().mean() >= 0.95
    assert solution.n_pivots.max() <= 20 * len(S)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("negative", [1, 5, 20])
def test_indefinite(negative, dtype):
    S = make.indefinite(30, seed=negative, negative=negative).to(dtype)
    for ratio in (0.9, 0.3, 0.03, 1e-4):
        converged_or_said(S, nk.covlasso(S, lam_ratio=ratio))


def converged_or_said(S: Tensor, solution) -> None:
    """Where the status is converged the KKT conditions hold; everything returned is finite."""
    violation = recomputed_violation(S, solution)
    converged = solution.status == STATUS["converged"]
    assert violation[converged].le(1e-6).all()
    assert solution.dense().isfinite().all()
    assert solution.err2.isfinite().all()
    assert set(solution.status_names) <= set(STATUS)


def test_negative_curvature_is_not_called_converged():
    """[[1, 2], [2, 1]] has no minimum for small lam: |2 - theta| + ... falls without bound."""
    S = torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 3.0], [2.0, 3.0, 1.0]], dtype=F64)
    solution = nk.covlasso(S, lam_ratio=0.01)
    violation = recomputed_violation(S, solution)
    for t, name in enumerate(solution.status_names):
        assert name != "converged" or violation[t] <= 1e-6
    assert "not_psd" in solution.status_names


def test_huge_correlation_of_a_constant_category():
    """S_jj = 0 with S_ij != 0 cannot come from data: the covariance is not PSD and must not give infinities."""
    S = torch.tensor([[1.0, 0.5, 0.1], [0.5, 0.0, 0.0], [0.1, 0.0, 1.0]], dtype=F64)
    solution = nk.covlasso(S, lam_ratio=0.1)
    assert solution.dense().isfinite().all()
    assert solution.status_names[0] != "converged"


# -------------------------------------------------------------------------------------------------- theory of section 3


def test_T3_lambda_max():
    S = make.mixed(40, seed=50)
    top = nk.lambda_max(S)
    off = S.clone().fill_diagonal_(0).abs()
    torch.testing.assert_close(top, 2 * off.amax(1), rtol=0, atol=0)
    for factor in (1.0001, 1.0):
        solution = nk.covlasso(S, factor * top)
        assert solution.n_nonzero.tolist() == [0] * 40
        assert torch.equal(solution.err2, S.diagonal())
        assert solution.status_names == ["converged"] * 40
    just_below = nk.covlasso(S, 0.9999 * top, tol=1e-12)
    assert just_below.n_nonzero.tolist() == [1] * 40
    assert just_below.dense().abs().argmax(1).tolist() == off.argmax(1).tolist()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_T3_exactly_lambda_max_by_ratio(dtype):
    S = make.clustered(80, 100, seed=51).to(dtype)
    assert nk.covlasso(S, lam_ratio=1.0).n_nonzero.tolist() == [0] * 80
    assert nk.covlasso(S, lam_ratio=5.0).n_nonzero.tolist() == [0] * 80
    assert nk.covlasso(S, lam_ratio=0.999).n_nonzero.min() >= 1


def test_T4_planted_dependency():
    exact = 0
    for seed in range(100):
        S, theta = make.planted(seed)
        found = nk.covlasso(S, lam_ratio=0.05, targets=[0]).dense()[0]
        exact += torch.equal(found != 0, theta != 0)
    assert exact >= 95


def test_T5_monotone_path():
    S = make.clustered(30, 40, seed=52)
    i = 4
    ratios = torch.logspace(-3, math.log10(1.2), 60, dtype=F64)
    lam = ratios * nk.lambda_max(S)[i]
    path = nk.covlasso(S, lam, targets=[i] * 60, tol=1e-12)
    certify(S, path, 1e-12)
    norm = path.dense().abs().sum(1)
    objective = path.err2 + lam * norm
    assert (path.err2.diff() >= -1e-12 * S[i, i]).all()
    assert (norm.diff() <= 1e-10).all()
    assert (objective.diff() >= -1e-12 * S[i, i]).all()
    slope = objective.diff() / lam.diff()
    assert (slope.diff() <= 1e-9).all()  # concave


def test_T5_slope_of_the_error():
    """d err2 / d lam = (lam/2) s' A^-1 s on a segment; err2 is quadratic there, so central differences are exact."""
    S = make.mixed(30, seed=53)
    compared = 0
    for i in (0, 11, 23):
        for ratio in (0.6, 0.2, 0.05):
            lam = ratio * nk.lambda_max(S)[i]
            step = 1e-3 * lam
            path = nk.covlasso(S, torch.stack([lam - step, lam, lam + step]), targets=[i] * 3, tol=1e-13)
            signs = path.dense().sign()
            if not (torch.equal(signs[0], signs[1]) and torch.equal(signs[1], signs[2])):
                continue
            a = signs[1].nonzero()[:, 0]
            s = signs[1][a]
            expected = lam / 2 * s @ torch.linalg.solve(S[a][:, a], s)
            torch.testing.assert_close((path.err2[2] - path.err2[0]) / (2 * step), expected, rtol=1e-5, atol=0)
            compared += 1
    assert compared >= 5


def test_T6_end_points():
    S = make.mixed(25, seed=54)
    schur = 1 / torch.linalg.inv(S).diagonal()
    others = [[j for j in range(25) if j != i] for i in range(25)]
    determinants = torch.stack([S.det() / S[rest][:, rest].det() for rest in others])
    err2 = nk.covlasso(S, lam_ratio=1e-9, tol=1e-12).err2
    torch.testing.assert_close(err2, schur, rtol=1e-6, atol=0)
    torch.testing.assert_close(err2, determinants, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["mixed", "singular", "near duplicates 1e-3", "unequal scales"])
def test_T7_error_identity_and_gap(name):
    S = COVARIANCES[name]()
    for ratio in (0.5, 0.05, 0.005):
        solution = nk.covlasso(S, lam_ratio=ratio, tol=1e-12)
        theta = solution.dense()
        identity = S.diagonal() - (S * theta).sum(1) - solution.lam / 2 * theta.abs().sum(1)
        assert (solution.err2 - identity).abs().le(1e-8 * S.diagonal()).all()
        assert solution.duality_gap.ge(-1e-10 * S.diagonal()).all()
        assert solution.duality_gap.le(1e-6 * S.diagonal()).all()


def test_T8_redundancy():
    S = make.low_rank(100, 20, seed=55, samples=2000)
    solution = nk.covlasso(S, lam_ratio=1e-3, tol=1e-12)
    certify(S, solution, 1e-12)
    assert solution.relative_error.max() < 1e-4
    assert solution.n_nonzero.max() <= 25


def test_T8_error_bounds_from_the_spectrum():
    """w_n <= err2_i(0+) <= w_n / v_i^2, and min_i err2_i(0+) <= det(S)^(1/n) (3.5)."""
    S = make.low_rank(24, 12, seed=56, noise=0.3)
    values, vectors = torch.linalg.eigh(S)
    err2 = nk.covlasso(S, lam_ratio=1e-9, tol=1e-12).err2
    assert (err2 >= values[0] * (1 - 1e-6)).all()
    assert (err2 <= values[0] / vectors[:, 0] ** 2 * (1 + 1e-6)).all()
    assert err2.min() <= 24 * values[0]
    assert err2.min().log() <= values.log().mean()


@pytest.mark.parametrize("name", ["mixed", "singular", "low rank and noise", "duplicates"])
def test_T8_support_bounds(name):
    """|a| <= 4 err2 w_max(A_aa) / lam^2, and S_jj >= lam^2 / (4 err2) for every member (3.6)."""
    S = COVARIANCES[name]()
    for ratio in (0.5, 0.1, 0.02):
        solution = nk.covlasso(S, lam_ratio=ratio, tol=1e-12)
        for theta, lam, err2 in zip(solution.dense(), solution.lam, solution.err2, strict=True):
            a = theta.nonzero()[:, 0]
            if len(a):
                largest = torch.linalg.eigvalsh(S[a][:, a])[-1]
                assert len(a) <= 4 * err2 * largest / lam**2 * (1 + 1e-9)
                assert (S.diagonal()[a] >= lam**2 / (4 * err2) * (1 - 1e-9)).all()


def test_T9_scale_and_permutation():
    S = make.mixed(35, seed=57)
    plain = nk.covlasso(S, lam_ratio=0.07, tol=1e-12)
    scaled = nk.covlasso(9.0 * S, 9.0 * plain.lam, tol=1e-12)
    torch.testing.assert_close(scaled.dense(), plain.dense(), rtol=0, atol=1e-10)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    permuted = nk.covlasso(S[order][:, order], lam_ratio=0.07, tol=1e-12)
    torch.testing.assert_close(permuted.dense(), plain.dense()[order][:, order], rtol=0, atol=1e-9)


def test_T10_screening_is_safe():
    """2 tau |rho_j| + 2 sqrt(S_jj gap) < lam for some theta implies theta*_j = 0 (3.8); 200 perturbed solutions."""
    discarded = 0
    for seed in range(50):
        S = make.low_rank(30, 8, seed=500 + seed, noise=0.2, samples=200)
        targets = torch.tensor([seed % 30, (7 * seed + 1) % 30, (11 * seed + 2) % 30, (13 * seed + 3) % 30])
        solution = nk.covlasso(S, lam_ratio=0.4, targets=targets, tol=1e-12)
        perturbed = solution.dense() * (1 + 0.02 * make.normal(4, 30, seed=seed))
        gap = reference.duality_gap(S, perturbed, targets, solution.lam) + 1e-12 * S.diagonal()[targets]
        rho = reference.residual_covariance(S, perturbed, targets).abs()
        rho[torch.arange(4), targets] = 0
        tau = (solution.lam / (2 * rho.amax(1))).clamp_max(1.0)
        screened = 2 * tau[:, None] * rho + 2 * (S.diagonal() * gap[:, None]).sqrt() < solution.lam[:, None]
        assert (solution.dense()[screened] == 0).all()
        discarded += int(screened.sum())
    assert discarded > 1000


def test_T15_between_networks():
    """f1 = f2 Q: predictors of network 2 only, through the joint covariance; Q's columns come back."""
    n, generator = 30, torch.Generator().manual_seed(60)
    f2 = torch.randn(4000, n, generator=generator, dtype=F64)
    Q = torch.zeros(n, n, dtype=F64)
    for column in range(n):
        rows = torch.randperm(n, generator=generator)[:3]
        size, sign = torch.rand(3, generator=generator, dtype=F64), torch.randint(0, 2, (3,), generator=generator)
        Q[rows, column] = (0.4 + size) * (2 * sign - 1)
    f1 = f2 @ Q + 0.05 * torch.randn(4000, n, generator=generator, dtype=F64)
    joint = make.covariance_of(torch.cat([f1, f2], 1))
    candidates = torch.arange(2 * n) >= n
    solution = nk.covlasso(joint, lam_ratio=0.05, targets=range(n), candidates=candidates, tol=1e-12)
    certify(joint, solution, 1e-12, candidates=candidates)
    theta = solution.dense()
    assert torch.equal(theta[:, n:] != 0, Q.T != 0)
    assert (theta[:, :n] == 0).all()
    X, y = (f2 - f2.mean(0)).numpy(), (f1 - f1.mean(0)).numpy()
    for i in (0, 13, 29):
        direct = Lasso(alpha=solution.lam[i].item() / 2, fit_intercept=False, tol=1e-13, max_iter=100_000)
        np.testing.assert_allclose(theta[i, n:].numpy(), direct.fit(X, y[:, i]).coef_, atol=1e-6)


# --------------------------------------------------------------------------------------- candidates, penalties, targets


@pytest.mark.parametrize("dtype", [F32, F64])
def test_candidates_equal_the_smaller_problem(dtype):
    S = make.clustered(50, 60, seed=70).to(dtype)
    generator = torch.Generator().manual_seed(70)
    shared = torch.rand(50, generator=generator) < 0.4
    each = torch.rand(50, 50, generator=generator) < 0.4
    for candidates in (shared, each):
        solution = nk.covlasso(S, lam_ratio=0.05, candidates=candidates, tol=TOLERANCE[dtype])
        certify(S, solution, TOLERANCE[dtype], candidates=candidates)
        assert (solution.dense()[~candidates.expand(50, 50)] == 0).all()
        torch.testing.assert_close(nk.lambda_max(S, candidates=candidates).double() * 0.05, solution.lam.double())
        if dtype == F64:
            for i in (0, 31):
                row = candidates if candidates.ndim == 1 else candidates[i]
                keep = torch.cat([torch.tensor([i]), row.nonzero()[:, 0][row.nonzero()[:, 0] != i]])
                small = nk.covlasso(S[keep][:, keep], lam_ratio=0.05, targets=[0], tol=1e-12)
                torch.testing.assert_close(solution.dense()[i][keep[1:]], small.dense()[0, 1:], rtol=0, atol=1e-9)


def test_the_target_is_never_its_own_predictor():
    S = make.mixed(12, seed=69)
    own = torch.eye(12, dtype=torch.bool)
    shared = torch.rand(12, generator=torch.Generator().manual_seed(4)) < 0.5
    shared[:2] = True
    expected = nk.covlasso(S, lam_ratio=0.05, candidates=(shared & ~own))
    assert torch.equal(nk.covlasso(S, lam_ratio=0.05, candidates=(shared | own)).dense(), expected.dense())
    assert torch.equal(nk.covlasso(S, lam_ratio=0.05, candidates=shared).dense(), expected.dense())


def test_candidates_rows_follow_the_targets():
    S = make.mixed(12, seed=71)
    candidates = torch.zeros(2, 12, dtype=torch.bool)
    candidates[0, 3], candidates[1, 8] = True, True
    solution = nk.covlasso(S, lam_ratio=0.2, targets=[10, 1], candidates=candidates)
    assert solution.dense().nonzero().tolist() == [[0, 3], [1, 8]]


def test_empty_candidates():
    """Nothing may be used: the documented result is the empty support, not an error."""
    S = make.mixed(6, seed=72)
    for candidates in (~flags(6), torch.eye(6, dtype=torch.bool)):
        for solution in (
            nk.covlasso(S, lam_ratio=0.2, candidates=candidates),
            nk.covlasso(S, 0.2, candidates=candidates),
        ):
            assert solution.n_nonzero.tolist() == [0] * 6
            assert solution.status_names == ["converged"] * 6
            assert torch.equal(solution.err2, S.diagonal())
            assert solution.duality_gap.abs().max() <= 1e-12
        assert nk.lambda_max(S, candidates=candidates).tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", [F32, F64])
def test_penalty_factors(dtype):
    S = make.clustered(50, 60, seed=73).to(dtype)
    factors = torch.logspace(-1, 1, 50, dtype=dtype)[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    solution = nk.covlasso(S, lam_ratio=0.05, penalty_factors=factors, tol=TOLERANCE[dtype])
    certify(S, solution, TOLERANCE[dtype], factors=factors)
    ones = nk.covlasso(S, lam_ratio=0.05, penalty_factors=torch.ones(50, dtype=dtype))
    assert torch.equal(ones.dense(), nk.covlasso(S, lam_ratio=0.05).dense())


def test_penalty_factors_are_units():
    """A factor p_j is the plain problem with category j measured in units p_j times larger."""
    S = make.mixed(20, seed=74)
    factors = 0.5 + torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=F64)
    factors[5] = 1.0
    scaled = S / factors / factors[:, None]
    got = nk.covlasso(S, lam_ratio=0.1, targets=[5], penalty_factors=factors, tol=1e-12)
    plain = nk.covlasso(scaled, lam_ratio=0.1, targets=[5], tol=1e-12)
    torch.testing.assert_close(got.lam, plain.lam, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.dense(), plain.dense() / factors, rtol=0, atol=1e-10)


def test_candidates_and_penalties_together():
    S = make.clustered(40, 50, seed=75)
    generator = torch.Generator().manual_seed(75)
    candidates = torch.rand(5, 40, generator=generator) < 0.5
    factors = 0.3 + torch.rand(40, generator=generator, dtype=F64)
    solution = nk.covlasso(
        S, lam_ratio=0.03, targets=[3, 9, 0, 39, 20], candidates=candidates, penalty_factors=factors, tol=1e-12
    )
    certify(S, solution, 1e-12, candidates=candidates, factors=factors)


def test_lam_forms():
    """A number, a tensor per target, a ratio and a ratio per target mean what they say."""
    S = make.mixed(20, seed=76)
    targets = [4, 2, 19]
    top = nk.lambda_max(S, targets)
    assert torch.equal(top, nk.lambda_max(S)[targets])
    one = nk.covlasso(S, 0.3, targets=targets)
    assert one.lam.tolist() == pytest.approx([0.3] * 3)
    each = nk.covlasso(S, torch.tensor([0.1, 0.2, 0.3], dtype=F64) * top, targets=targets, tol=1e-12)
    by_ratio = nk.covlasso(S, lam_ratio=torch.tensor([0.1, 0.2, 0.3], dtype=F64), targets=targets, tol=1e-12)
    torch.testing.assert_close(each.dense(), by_ratio.dense(), rtol=0, atol=1e-12)
    torch.testing.assert_close(each.lam, by_ratio.lam)
    assert torch.equal(nk.covlasso(S, torch.tensor(0.3, dtype=F64), targets=targets).dense(), one.dense())


def test_target_forms():
    S = make.mixed(20, seed=77)
    every = nk.covlasso(S, lam_ratio=0.1)
    assert every.targets.tolist() == list(range(20))
    assert every.targets.dtype == torch.int64
    wanted = torch.tensor([7, 3, 19])
    for targets in ([7, 3, 19], (7, 3, 19), wanted, wanted.int(), wanted.numpy()):
        some = nk.covlasso(S, lam_ratio=0.1, targets=targets)
        assert some.targets.tolist() == [7, 3, 19]
        assert torch.equal(some.dense(), every.dense()[[7, 3, 19]])
    assert nk.covlasso(S, lam_ratio=0.1, targets=range(0, 20, 5)).targets.tolist() == [0, 5, 10, 15]


def test_duplicate_targets_give_equal_rows():
    S = make.mixed(20, seed=78)
    solution = nk.covlasso(S, lam_ratio=0.1, targets=[5, 2, 5])
    assert torch.equal(solution.dense()[0], solution.dense()[2])
    assert solution.n_nonzero[0] == solution.n_nonzero[2]


def test_no_targets():
    S = make.mixed(8, seed=79)
    for targets in ([], torch.zeros(0, dtype=torch.int64)):
        solution = nk.covlasso(S, lam_ratio=0.1, targets=targets)
        assert solution.dense().shape == (0, 8)
        assert solution.coefficients.shape == (0, 8)
        assert solution.status_names == []
        assert solution.err2.shape == (0,)
        assert nk.lambda_max(S, targets).shape == (0,)


def test_max_pivots_caps():
    """A cap is reported, costs no more than it says, and leaves a valid if unfinished answer."""
    S = make.clustered(80, 100, seed=80)
    free = nk.covlasso(S, lam_ratio=0.01)
    assert free.n_pivots.min() > 3
    capped = nk.covlasso(S, lam_ratio=0.01, max_pivots=3)
    assert capped.status_names == ["capped"] * 80
    assert capped.dense().isfinite().all()
    reported, violation = capped.kkt_violation.double(), recomputed_violation(S, capped)
    torch.testing.assert_close(reported, violation, rtol=1e-6, atol=1e-9)
    assert violation.min() > 1e-6
    enough = nk.covlasso(S, lam_ratio=0.01, max_pivots=int(free.n_pivots.max()))
    assert torch.equal(enough.dense(), free.dense())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_tol_is_honoured(dtype):
    S = make.clustered(100, 120, seed=81).to(dtype)
    for tol in (1e-2, 1e-4, TOLERANCE[dtype]):
        certify(S, nk.covlasso(S, lam_ratio=0.02, tol=tol), tol)


# ------------------------------------------------------------------------------------------ determinism and environment


ROWS = (
    "lam",
    "lambda_max",
    "err2",
    "relative_error",
    "n_nonzero",
    "duality_gap",
    "kkt_violation",
    "n_pivots",
    "status",
)


def rows(solution) -> dict[str, Tensor]:
    return {"theta": solution.dense()} | {name: getattr(solution, name) for name in ROWS}


@pytest.mark.parametrize("dtype", [F32, F64])
def test_T11_batch_independence(dtype):
    """A row is the same to the last bit whatever is solved beside it, in whatever order."""
    S = make.clustered(120, 60, seed=90).to(dtype)
    every = rows(nk.covlasso(S, lam_ratio=0.03))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    for targets in (order, order[:13], order[:1]):
        some = rows(nk.covlasso(S, lam_ratio=0.03, targets=targets))
        for name, value in some.items():
            assert torch.equal(value, every[name][targets]), name


def test_T11_threads_and_repeats():
    S = make.clustered(120, 60, seed=91).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(rows(nk.covlasso(S, lam_ratio=0.02)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


LEVEL_SCRIPT = """
import sys, torch
import neuraldeps_kernels as nk
problems, out = torch.load(sys.argv[1], weights_only=True), []
for S, ratio in problems:
    solution = nk.covlasso(S, lam_ratio=ratio, tol=1e-6 if S.dtype == torch.float32 else 1e-12)
    out.append((solution.dense(), solution.lam, solution.status))
torch.save(out, sys.argv[2])
print(torch.ops.neuraldeps.cpu_levels()[2])
"""


def test_T11_every_cpu_level(cpu_levels, run_python, tmp_path):
    """Each instruction-set level this processor runs, in its own process, against the oracle."""
    covariances = [make.clustered(70, 90, seed=92), make.low_rank(45, 9, seed=93), make.mixed(33, seed=94)]
    problems = [(S.to(dtype), ratio) for S in covariances for dtype in (F32, F64) for ratio in (0.3, 0.02)]
    torch.save(problems, tmp_path / "problems.pt")
    assert cpu_levels
    expected = {}
    for level in cpu_levels:
        files = str(tmp_path / "problems.pt"), str(tmp_path / "out.pt")
        done = run_python(LEVEL_SCRIPT, *files, NEURALDEPS_CPU_LEVEL=level)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [level]
        for p, (theta, lam, status) in enumerate(torch.load(files[1], weights_only=True)):
            S = problems[p][0]
            targets, tol = everyone(S), TOLERANCE[S.dtype]
            assert (status == 0).all(), level
            assert reference.kkt_violation(S, theta, targets, lam).max() <= tol, level
            if p not in expected:
                expected[p] = reference.err2(S, reference.covlasso(S, targets, lam), targets)
            bound = (1e-5 if S.dtype == F32 else 1e-9) * S.diagonal().double()
            assert (reference.err2(S, theta, targets) - expected[p]).abs().le(bound).all(), level


@pytest.mark.parametrize("dtype", [F32, F64])
def test_layouts(dtype):
    """Transposed, strided, offset and expanded covariances are the matrix they show."""
    S = make.mixed(21, seed=95).to(dtype)
    expected = nk.covlasso(S, lam_ratio=0.1).dense()
    wide = torch.zeros(42, 63, dtype=dtype)
    wide[::2, ::3] = S
    storage = torch.cat([torch.zeros(1, dtype=dtype), S.flatten()])
    ones = torch.ones(1, 1, dtype=dtype).expand(5, 5)
    for view in (S.T, wide[::2, ::3], storage[1:].view(21, 21)):
        assert torch.equal(nk.covlasso(view, lam_ratio=0.1).dense(), expected)
    assert torch.equal(
        nk.covlasso(ones, lam_ratio=0.1).dense(), nk.covlasso(torch.ones(5, 5).to(dtype), lam_ratio=0.1).dense()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    S = make.mixed(24, seed=96).to(dtype)
    half, single = nk.covlasso(S, lam_ratio=0.1), nk.covlasso(S.float(), lam_ratio=0.1)
    assert half.dense().dtype == F32
    assert torch.equal(half.dense(), single.dense())
    assert torch.equal(half.err2, single.err2)
    assert recomputed_violation(S.float(), half).max() <= 1e-6


def test_rounding_asymmetry_is_averaged():
    """A covariance that differs from its mirror image by rounding is solved as the mean of the two."""
    S = make.mixed(24, seed=99)
    other = S + 1e-7 * make.normal(24, 24, seed=98).triu(1)
    mean = (other + other.T) / 2
    lam = 0.1 * reference.lambda_max(mean, everyone(S))
    solution = nk.covlasso(other, lam, tol=1e-12)
    torch.testing.assert_close(solution.dense(), nk.covlasso(mean, lam, tol=1e-12).dense(), rtol=0, atol=1e-9)
    certify(mean, solution, 1e-12)


def test_autocast_does_not_lower_the_precision():
    S = make.mixed(24, seed=97).float()
    expected = nk.covlasso(S, lam_ratio=0.1).dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nk.covlasso(S, lam_ratio=0.1).dense(), expected)


def test_arguments_are_left_alone():
    S = make.mixed(24, seed=98)
    lam = nk.lambda_max(S) * 0.1
    candidates = torch.rand(24, generator=torch.Generator().manual_seed(0)) < 0.7
    factors = torch.full((24,), 1.5, dtype=F64)
    copies = S.clone(), lam.clone(), candidates.clone(), factors.clone()
    nk.covlasso(S, lam, candidates=candidates, penalty_factors=factors)
    for now, then in zip((S, lam, candidates, factors), copies, strict=True):
        assert torch.equal(now, then)


# -------------------------------------------------------------------------------------------------- the solution object


def test_solution_object():
    S = make.clustered(40, 50, seed=100).float()
    solution = nk.covlasso(S, lam_ratio=0.1, targets=[3, 17, 30])
    coefficients = solution.coefficients
    assert coefficients.layout == torch.sparse_csr
    assert coefficients.shape == (3, 40)
    crow, col, value = coefficients.crow_indices(), coefficients.col_indices(), coefficients.values()
    assert crow[0] == 0
    assert crow.diff().tolist() == solution.n_nonzero.tolist()
    assert crow[-1] == len(col) == len(value)
    for t in range(3):
        row = col[crow[t] : crow[t + 1]]
        assert (row.diff() > 0).all()
        assert solution.targets[t] not in row
    assert (value != 0).all()
    assert torch.equal(coefficients.to_dense(), solution.dense())
    for name in (*ROWS, "targets"):
        assert getattr(solution, name).shape == (3,), name
    with pytest.raises(AttributeError):
        solution.lam = None


@pytest.mark.parametrize("dtype", [F32, F64])
def test_predict(dtype):
    x = (make.normal(500, 15, seed=101) @ make.normal(15, 15, seed=102) + 5).to(dtype)
    mean = x.mean(0)
    S = make.covariance_of(x).to(dtype)
    solution = nk.covlasso(S, lam_ratio=0.05, targets=[2, 9], tol=TOLERANCE[dtype])
    theta = solution.dense()
    torch.testing.assert_close(solution.predict(x), x @ theta.T)
    centred = solution.predict(x, mean=mean)
    torch.testing.assert_close(centred, mean[[2, 9]] + (x - mean) @ theta.T)
    residual = (x[:, [2, 9]] - centred).double().square().mean(0)
    torch.testing.assert_close(residual, solution.err2.double(), rtol=1e-3 if dtype == F32 else 1e-10, atol=0)
    assert solution.predict(x[:0]).shape == (0, 2)


def test_zero_variance_target_and_predictor():
    S = torch.block_diag(make.mixed(10, seed=103), torch.zeros(1, 1, dtype=F64))
    for solution in (nk.covlasso(S, lam_ratio=0.1), nk.covlasso(S, 0.5)):
        assert solution.status_names == ["converged"] * 11
        assert solution.n_nonzero[10] == 0
        assert solution.err2[10] == 0
        assert (solution.dense()[:, 10] == 0).all()
        assert solution.kkt_violation.isfinite().all()
        assert not solution.relative_error.isinf().any()
    assert nk.lambda_max(S)[10] == 0


def test_uncorrelated_target():
    S = torch.block_diag(torch.full((1, 1), 3.0, dtype=F64), make.mixed(6, seed=104))
    solution = nk.covlasso(S, lam_ratio=0.1)
    assert solution.n_nonzero[0] == 0
    assert solution.err2[0] == 3.0
    assert solution.relative_error[0] == 1.0
    assert solution.status_names[0] == "converged"


# ------------------------------------------------------------------------------------------------------------ bad input


def good() -> Tensor:
    return make.mixed(5, seed=110)


def flags(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def solve(*arguments, **keywords) -> Callable[[], object]:
    """A call on the good covariance with lam = 0.1, unless `arguments` says otherwise."""
    return lambda: nk.covlasso(good(), *(arguments or (0.1,)), **keywords)


def solve_cov(cov) -> Callable[[], object]:
    return lambda: nk.covlasso(cov, 0.1)


def changed(row: int, column: int, value: float) -> Tensor:
    S = good()
    S[row, column] = S[column, row] = value
    return S


def asymmetric() -> Tensor:
    S = good()
    S[1, 2] += 0.1 * S[1, 1]
    return S


BAD_INPUT: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "not square": (ValueError, "cov", solve_cov(good()[:, :4])),
    "one dimension": (ValueError, "cov", solve_cov(good()[0])),
    "batched": (ValueError, "cov", solve_cov(good()[None])),
    "n = 0": (ValueError, "cov", solve_cov(torch.zeros(0, 0))),
    "not symmetric": (ValueError, "cov", solve_cov(asymmetric())),
    "nan": (ValueError, "cov", solve_cov(changed(1, 3, math.nan))),
    "nan on the diagonal": (ValueError, "cov", solve_cov(changed(2, 2, math.nan))),
    "inf": (ValueError, "cov", solve_cov(changed(0, 4, math.inf))),
    "inf in float16": (ValueError, "cov", solve_cov((1e6 * good()).half())),
    "negative variance": (ValueError, "cov", solve_cov(changed(2, 2, -1.0))),
    "integer cov": (TypeError, "cov", solve_cov(torch.eye(3, dtype=torch.int64))),
    "complex cov": (TypeError, "cov", solve_cov(torch.eye(3, dtype=torch.complex64))),
    "array cov": (TypeError, "cov", solve_cov(np.eye(3))),
    "no lam": (ValueError, "lam", lambda: nk.covlasso(good())),
    "both": (ValueError, "lam", solve(0.1, lam_ratio=0.1)),
    "lam zero": (ValueError, "lam", solve(0.0)),
    "lam negative": (ValueError, "lam", solve(-1.0)),
    "lam nan": (ValueError, "lam", solve(math.nan)),
    "one lam negative": (ValueError, "lam", solve(torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]))),
    "lam of another length": (ValueError, "lam", solve(torch.ones(4))),
    "lam matrix": (ValueError, "lam", solve(torch.ones(5, 1))),
    "lam text": (TypeError, "lam", solve("0.1")),
    "ratio zero": (ValueError, "lam_ratio", solve(None, lam_ratio=0.0)),
    "ratio negative": (ValueError, "lam_ratio", solve(None, lam_ratio=-0.1)),
    "ratio of another length": (ValueError, "lam_ratio", solve(None, lam_ratio=torch.ones(3))),
    "target too large": (ValueError, "targets", solve(targets=[0, 5])),
    "target negative": (ValueError, "targets", solve(targets=[-1])),
    "targets float": (TypeError, "targets", solve(targets=torch.tensor([0.0, 1.0]))),
    "targets bool": (TypeError, "targets", solve(targets=flags(5))),
    "targets matrix": (ValueError, "targets", solve(targets=torch.zeros(2, 2, dtype=torch.int64))),
    "candidates length": (ValueError, "candidates", solve(candidates=flags(4))),
    "candidates rows": (ValueError, "candidates", solve(candidates=flags(2, 5))),
    "candidates float": (TypeError, "candidates", solve(candidates=torch.ones(5))),
    "candidates indices": (TypeError, "candidates", solve(candidates=torch.tensor([0, 1, 2, 3, 4]))),
    "penalty length": (ValueError, "penalty_factors", solve(penalty_factors=torch.ones(4))),
    "penalty zero": (ValueError, "penalty_factors", solve(penalty_factors=torch.tensor([1.0, 0, 1, 1, 1]))),
    "penalty negative": (ValueError, "penalty_factors", solve(penalty_factors=-torch.ones(5))),
    "penalty nan": (ValueError, "penalty_factors", solve(penalty_factors=torch.full((5,), math.nan))),
    "tol zero": (ValueError, "tol", solve(tol=0.0)),
    "tol negative": (ValueError, "tol", solve(tol=-1e-6)),
    "max_pivots zero": (ValueError, "max_pivots", solve(max_pivots=0)),
    "lambda_max not square": (ValueError, "cov", lambda: nk.lambda_max(good()[:3])),
    "lambda_max target": (ValueError, "targets", lambda: nk.lambda_max(good(), [9])),
    "lambda_max candidates": (ValueError, "candidates", lambda: nk.lambda_max(good(), candidates=flags(4))),
    "predict width": (ValueError, "x", lambda: solve()().predict(torch.zeros(3, 4, dtype=F64))),
    "predict mean": (ValueError, "mean", lambda: solve()().predict(torch.zeros(3, 5), mean=torch.zeros(4))),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    error, argument, call = BAD_INPUT[name]
    with pytest.raises(error, match=rf"\b{argument}\b"):
        call()


def test_single_category():
    solution = nk.covlasso(torch.tensor([[2.0]], dtype=F64), lam_ratio=0.5)
    assert solution.dense().tolist() == [[0.0]]
    assert solution.err2.tolist() == [2.0]
    assert solution.status_names == ["converged"]
    assert nk.lambda_max(torch.tensor([[2.0]], dtype=F64)).tolist() == [0.0]


# ------------------------------------------------------------------------------------ derivatives and torch's machinery


def operator_theta(S: Tensor, lam: Tensor, targets: Tensor, penalty: Tensor | None = None, op=None) -> Tensor:
    """theta [T, n] from torch.ops.neuraldeps.covlasso (or `op`), with only differentiable operations around it."""
    op = op or torch.ops.neuraldeps.covlasso
    value, index, _, _ = op(S, targets, lam, penalty, 1e-13, 100_000, max(1, S.shape[-1] - 1))
    return torch.zeros(len(targets), S.shape[-1], dtype=value.dtype).scatter_add(1, index.long(), value)


def away_from_kinks(n: int, ratio: float, targets: Tensor, first_seed: int) -> tuple[Tensor, Tensor]:
    """(S, lam) where every coefficient and every slack is large enough that a small change keeps the signs."""
    for seed in range(first_seed, first_seed + 200):
        S = make.mixed(n, seed=seed)
        lam = ratio * reference.lambda_max(S, targets)
        theta = reference.covlasso(S, targets, lam)
        rho = reference.residual_covariance(S, theta, targets).abs()
        rho[torch.arange(len(targets)), targets] = 0
        slack = (1 - rho / (lam[:, None] / 2))[theta == 0]
        if theta[theta != 0].abs().min() > 1e-2 and slack.min() > 1e-2 and (theta != 0).sum(1).min() > 1:
            return S, lam
    raise AssertionError("no covariance away from kinks")


def test_T12_gradcheck():
    targets = torch.tensor([0, 3, 5])
    S, lam = away_from_kinks(7, 0.3, targets, 200)

    def theta_of(M: Tensor, lam: Tensor) -> Tensor:
        return operator_theta((M + M.T) / 2, lam, targets)

    assert torch.autograd.gradcheck(theta_of, (S.requires_grad_(), lam.requires_grad_()), eps=1e-6, atol=1e-6)


def test_T12_gradient_with_penalties_against_the_formula():
    targets = torch.tensor([2, 6])
    S = make.mixed(9, seed=120).requires_grad_()
    penalty = 0.5 + torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=F64)
    penalty[0, 4] = torch.inf
    lam = (0.2 * reference.lambda_max(S, targets, penalty)).requires_grad_()
    theta = operator_theta(S, lam, targets, penalty)
    weight = make.normal(2, 9, seed=121)
    (theta * weight).sum().backward()
    grad_cov, grad_lam = reference.gradients(S, theta.detach(), targets, weight, penalty)
    torch.testing.assert_close((S.grad + S.grad.T) / 2, grad_cov, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(lam.grad, grad_lam, rtol=1e-8, atol=1e-10)


def test_T12_gradient_of_lam_by_finite_differences():
    S, lam = away_from_kinks(12, 0.1, torch.tensor([1, 8]), 300)
    targets, weight = torch.tensor([1, 8]), make.normal(2, 12, seed=122)
    lam.requires_grad_()
    (operator_theta(S, lam, targets) * weight).sum().backward()
    step = 1e-4 * lam.detach()
    difference = operator_theta(S, lam.detach() + step, targets) - operator_theta(S, lam.detach() - step, targets)
    torch.testing.assert_close(lam.grad, (difference * weight).sum(1) / (2 * step), rtol=1e-6, atol=1e-9)


def test_T12_gradient_through_the_solution():
    """`covlasso(...).dense()` carries the same gradient as the operator."""
    S = make.mixed(10, seed=123)
    weight = make.normal(10, 10, seed=124)
    lam = 0.2 * nk.lambda_max(S)
    through_solution, through_operator = S.clone().requires_grad_(), S.clone().requires_grad_()
    (nk.covlasso(through_solution, lam, tol=1e-12).dense() * weight).sum().backward()
    (operator_theta(through_operator, lam, everyone(S)) * weight).sum().backward()
    torch.testing.assert_close(through_solution.grad, through_operator.grad, rtol=1e-8, atol=1e-10)


def test_T12_gradient_of_error_and_ratio():
    """err2 at a fixed fraction of lambda_max: through coefficients, explicit covariance and lambda_max itself."""
    targets = torch.tensor([0, 3, 5])
    S, _ = away_from_kinks(7, 0.3, targets, 200)

    def error_of(M: Tensor) -> tuple[Tensor, Tensor]:
        solution = nk.covlasso((M + M.T) / 2, lam_ratio=0.3, targets=targets, tol=1e-13)
        return solution.err2, nk.lambda_max((M + M.T) / 2, targets)

    assert torch.autograd.gradcheck(error_of, (S.requires_grad_(),), eps=1e-6, atol=1e-6)


def test_T12_gradient_of_zero_coefficients_is_zero():
    S = make.mixed(10, seed=125)
    targets = torch.tensor([4])
    lam = 0.5 * nk.lambda_max(S, targets)
    theta = operator_theta(S.requires_grad_(), lam, targets)
    ((theta == 0) * theta).sum().backward()
    assert torch.count_nonzero(S.grad) == 0


def test_T12_gradient_on_a_singular_support_is_finite():
    S = make.repeated(make.mixed(12, seed=126), 12).requires_grad_()
    lam = 0.05 * nk.lambda_max(S.detach())
    operator_theta(S, lam, everyone(S)).square().sum().backward()
    assert S.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("penalised", [False, True])
def test_opcheck(dtype, penalised):
    S = make.mixed(9, seed=127).to(dtype).requires_grad_()
    lam = (0.2 * reference.lambda_max(S, everyone(S))).detach().requires_grad_()
    penalty = torch.linspace(0.5, 2, 9, dtype=dtype) if penalised else None
    rest = (penalty, 1e-6 if dtype == F32 else 1e-12, 1000, 8)
    op = torch.ops.neuraldeps.covlasso.default
    torch.library.opcheck(op, (S.detach(), everyone(S), lam.detach(), *rest))
    torch.library.opcheck(op, (S, everyone(S), lam, *rest))
    torch.library.opcheck(torch.ops.neuraldeps.lambda_max.default, (S, everyone(S), penalty))


@pytest.mark.parametrize("op", [torch.ops.neuraldeps.covlasso, solve_targets], ids=["operator", "solve_targets"])
def test_compile_is_one_graph(op):
    S = make.mixed(14, seed=128)
    targets = everyone(S)
    lam = 0.1 * nk.lambda_max(S)

    def loss(S: Tensor, lam: Tensor) -> Tensor:
        return operator_theta((S + S.T) / 2, lam, targets, op=op).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, other = S.clone().requires_grad_(), S.clone().requires_grad_()
    expected, got = loss(plain, lam), compiled(other, lam)
    expected.backward()
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(other.grad, plain.grad)


@pytest.mark.parametrize("op", [torch.ops.neuraldeps.covlasso, solve_targets], ids=["operator", "solve_targets"])
def test_vmap_equals_a_loop(op):
    """Over the covariance and lam, over each alone, and over the targets."""
    stack = torch.stack([make.mixed(11, seed=s) for s in (130, 131, 132)])
    targets = torch.tensor([0, 4, 10])
    lam = torch.stack([0.1 * reference.lambda_max(S, targets) for S in stack])
    which = torch.tensor([[0, 4, 10], [1, 2, 3], [9, 9, 0]])

    def call(S: Tensor, targets: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        return op(S, targets, lam, None, 1e-12, 1000, 10)

    for dims, arguments in (
        ((0, None, 0), (stack, targets, lam)),
        ((0, None, None), (stack, targets, lam[0])),
        ((None, None, 0), (stack[0], targets, lam)),
        ((None, 0, None), (stack[0], which, lam[0])),
        ((2, None, 1), (stack.movedim(0, 2), targets, lam.T)),
    ):
        mapped = torch.vmap(call, in_dims=dims)(*arguments)
        for b in range(3):
            single = [x if dim is None else x.select(dim, b) for x, dim in zip(arguments, dims, strict=True)]
            for got, expected in zip(mapped, call(*single), strict=True):
                assert torch.equal(got[b], expected)


def test_func_grad_and_per_sample_gradients():
    targets = torch.tensor([1, 2])
    stack = torch.stack([make.mixed(8, seed=s) for s in (133, 134)])
    lam = 0.1 * reference.lambda_max(stack[0], targets)

    def loss(S: Tensor) -> Tensor:
        return operator_theta(S, lam, targets, op=solve_targets).square().sum()

    together = torch.vmap(torch.func.grad(loss))(stack)
    for S, got in zip(stack, together, strict=True):
        leaf = S.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(S), leaf.grad)
        torch.testing.assert_close(got, leaf.grad)


def test_operator_output_layout():
    """Rows beyond `count` are zero, indices increase, info holds six float64 numbers a target."""
    S = make.mixed(13, seed=135).float()
    lam = 0.2 * reference.lambda_max(S, everyone(S))
    value, index, count, info = torch.ops.neuraldeps.covlasso(S, everyone(S), lam, None, 1e-6, 1000, 12)
    assert index.dtype == count.dtype == torch.int32
    assert value.dtype == F32
    assert info.dtype == F64
    assert index.shape == value.shape == (13, 12)
    assert info.shape == (13, 6)
    for t in range(13):
        k = int(count[t])
        assert (index[t, :k].diff() > 0).all()
        assert (value[t, :k] != 0).all()
        assert (index[t, k:] == 0).all()
        assert (value[t, k:] == 0).all()
    torch.testing.assert_close(info[:, 5], reference.lambda_max(S, everyone(S)))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("capacity", [39, 3])
def test_fallback_returns_what_the_operator_returns(dtype, capacity):
    """The plain PyTorch path for devices without a kernel: same tensors, same meaning, cut supports included."""
    S = make.mixed(40, seed=137).to(dtype)
    targets, penalty = torch.arange(0, 40, 3), torch.ones(14, 40, dtype=dtype)
    penalty[:, 5] = torch.inf
    lam = 0.05 * reference.lambda_max(S, targets, penalty)
    arguments = (S, targets, lam, penalty, TOLERANCE[dtype], 10_000, capacity)
    expected, got = torch.ops.neuraldeps.covlasso(*arguments), _solve_by_reference(*arguments[:5], *arguments[6:])
    for theirs, ours in zip(expected, got, strict=True):
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
    assert torch.equal(expected[2], got[2])
    assert torch.equal(expected[3][:, 4], got[3][:, 4])
    if capacity == 39:
        assert torch.equal(expected[1], got[1])
        torch.testing.assert_close(expected[0], got[0], rtol=0, atol=1e-4 if dtype == F32 else 1e-9)
        variance = S.diagonal()[targets].double()
        assert (expected[3][:, :2] - got[3][:, :2]).abs().le(1e-5 * variance[:, None]).all()
        theta = torch.zeros(14, 40, dtype=dtype).scatter_add(1, got[1].long(), got[0])
        assert reference.kkt_violation(S, theta, targets, lam, penalty).max() <= TOLERANCE[dtype]


def test_operator_capacity_overflow_is_capped():
    """A support larger than the rows given is cut and said to be capped, never written past the end."""
    S = make.mixed(40, seed=136)
    lam = 0.01 * reference.lambda_max(S, everyone(S))
    full = torch.ops.neuraldeps.covlasso(S, everyone(S), lam, None, 1e-10, 10_000, 39)
    cut = torch.ops.neuraldeps.covlasso(S, everyone(S), lam, None, 1e-10, 10_000, 3)
    assert cut[0].shape == cut[1].shape == (40, 3)
    assert (full[2] > 3).all()
    assert (cut[3][:, 4] == STATUS["capped"]).all()
    assert (cut[2] <= 3).all()


# ----------------------------------------------------------------------------------------------------------- properties

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def covariances(draw) -> Tensor:
    n = draw(st.integers(2, 24))
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["mixed", "low rank", "noisy", "duplicates", "scales", "few"]))
    if kind == "mixed":
        return make.mixed(n, seed, samples=200)
    if kind == "low rank":
        return make.low_rank(n, draw(st.integers(1, n)), seed, samples=100)
    if kind == "noisy":
        return make.low_rank(n, draw(st.integers(1, n)), seed, noise=0.1, samples=100)
    if kind == "duplicates":
        return make.repeated(make.mixed(n, seed, samples=200), draw(st.integers(1, n)))
    if kind == "scales":
        return make.unequal_scales(make.mixed(n, seed, samples=200), 2, seed)
    return make.mixed(n, seed, samples=max(2, n // 2))


ratios = st.floats(1e-3, 1.1)


@PROPERTY
@given(S=covariances(), ratio=ratios, dtype=st.sampled_from([F32, F64]))
def test_property_optimal(S, ratio, dtype):
    S = S.to(dtype)
    certify(S, nk.covlasso(S, lam_ratio=ratio, tol=TOLERANCE[dtype]), TOLERANCE[dtype])


@PROPERTY
@given(n=st.integers(2, 24), seed=st.integers(0, 10_000), ratio=ratios)
def test_property_equivariant(n, seed, ratio):
    """Permutation, a common unit, and the sign of a category (positive definite S: the solution is unique)."""
    S = make.mixed(n, seed, samples=200)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    unit = 10 ** (4 * torch.rand((), generator=generator, dtype=F64) - 2)
    theta = nk.covlasso(S, lam_ratio=ratio, tol=1e-12).dense()
    condition = torch.linalg.cond(S).item()
    near = {"rtol": 0, "atol": 1e-11 * condition + 1e-12}
    permuted = nk.covlasso(S[order][:, order], lam_ratio=ratio, tol=1e-12).dense()
    torch.testing.assert_close(permuted, theta[order][:, order], **near)
    torch.testing.assert_close(nk.covlasso(unit * S, lam_ratio=ratio, tol=1e-12).dense(), theta, **near)
    flipped = nk.covlasso(sign[:, None] * S * sign, lam_ratio=ratio, tol=1e-12).dense()
    torch.testing.assert_close(flipped, sign[:, None] * theta * sign, **near)


@PROPERTY
@given(S=covariances(), low=st.floats(1e-3, 0.9), factor=st.floats(1.01, 5.0))
def test_property_monotone_path(S, low, factor):
    first, second = nk.covlasso(S, lam_ratio=low, tol=1e-12), nk.covlasso(S, lam_ratio=low * factor, tol=1e-12)
    slack = 1e-9 * S.diagonal()
    assert (first.err2 <= second.err2 + slack).all()
    norm = first.dense().abs().sum(1), second.dense().abs().sum(1)
    assert (norm[0] >= norm[1] * (1 - 1e-7) - 1e-12).all()
    assert (first.err2 + first.lam * norm[0] <= second.err2 + second.lam * norm[1] + slack).all()


@PROPERTY
@given(S=covariances(), ratio=ratios, noise=st.floats(0.0, 0.1), seed=st.integers(0, 1000))
def test_property_screening_and_support_bound(S, ratio, noise, seed):
    """Safe screening 3.8 from a perturbed solution, and the support bound 3.6."""
    targets = everyone(S)
    solution = nk.covlasso(S, lam_ratio=ratio, tol=1e-12)
    assume((solution.lam > 0).all())
    theta, variance = solution.dense(), S.diagonal()
    perturbed = theta * (1 + noise * make.normal(*theta.shape, seed=seed))
    gap = reference.duality_gap(S, perturbed, targets, solution.lam).clamp_min(0) + 1e-12 * variance
    rho = reference.residual_covariance(S, perturbed, targets).abs().fill_diagonal_(0)
    tau = (solution.lam / (2 * rho.amax(1)).clamp_min(1e-300)).clamp_max(1.0)
    screened = 2 * tau[:, None] * rho + 2 * (variance * gap[:, None]).sqrt() < solution.lam[:, None] * (1 - 1e-9)
    assert (theta[screened].abs() <= 1e-12).all()
    largest = torch.linalg.matrix_norm(S, 2)
    unpinned = solution.n_nonzero.double()
    assert (unpinned <= 4 * solution.err2 * largest / solution.lam**2 * (1 + 1e-6) + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(("ratio", "median_support"), [(0.2, 20), (0.1, 57), (0.05, 126), (0.01, 380)])
def test_real_logits(ratio, median_support):
    """Covariance of the logits of a real network, 40 targets: certified in float32, supports as large as real ones."""
    S = load_imagenet_covariance().lite0
    targets = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:40]
    solution = nk.covlasso(S, lam_ratio=ratio, targets=targets)
    certify(S, solution, 1e-6)
    assert 0.75 * median_support <= solution.n_nonzero.double().median() <= 1.25 * median_support
    oracle = reference.covlasso(S, targets[:6], solution.lam[:6], tol=1e-10)
    error = reference.err2(S, oracle, targets[:6])
    assert (solution.err2[:6] - error).abs().le(1e-5 * S.double().diagonal()[targets[:6]]).all()


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
def test_T11_gpu_equals_cpu(dtype):
    S = make.clustered(150, 60, seed=140).to(dtype)
    for ratio in (0.3, 0.05, 0.01):
        cpu = nk.covlasso(S, lam_ratio=ratio, tol=TOLERANCE[dtype])
        gpu = nk.covlasso(S.cuda(), lam_ratio=ratio, tol=TOLERANCE[dtype])
        assert recomputed_violation(S, cpu).max() <= TOLERANCE[dtype]
        violation = reference.kkt_violation(S.cuda(), gpu.dense(), gpu.targets, gpu.lam)
        assert violation.max() <= TOLERANCE[dtype]
        assert (gpu.err2.cpu() - cpu.err2).abs().le(1e-5 * S.diagonal()).all()


@pytest.mark.gpu
def test_small_arguments_move_to_the_device_of_cov():
    S = make.mixed(20, seed=142)
    arguments = {"targets": [3, 5], "candidates": flags(20), "penalty_factors": torch.ones(20)}
    solution = nk.covlasso(S.cuda(), torch.ones(2), **arguments)
    assert solution.coefficients.is_cuda
    assert solution.err2.is_cuda
    torch.testing.assert_close(
        solution.dense().cpu(), nk.covlasso(S, torch.ones(2), **arguments).dense(), rtol=0, atol=1e-6
    )


@pytest.mark.gpu
def test_reference_on_gpu():
    S = make.low_rank(40, 12, seed=141, noise=0.1)
    lam = 0.05 * reference.lambda_max(S, everyone(S))
    theta = reference.covlasso(S.cuda(), everyone(S).cuda(), lam.cuda())
    torch.testing.assert_close(theta.cpu(), reference.covlasso(S, everyone(S), lam), rtol=0, atol=1e-9)
