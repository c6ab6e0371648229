"""CovLasso beyond one penalty: paths, exact sparsity, warm starts, sign constraint, ridge, two networks.

Oracles: scikit-learn (Lasso, ElasticNet, lasso_path, lars_path_gram), scipy's nnls, exhaustive search over supports,
and `neuraldeps_kernels.reference.covlasso`, whose coordinate descent and homotopy share nothing and are held against
the former here. T5, T6, ... name the acceptance checks of the notes on arXiv 2211.12339, 3.1 ... their equations.
rho = c - S theta - ridge theta; lam = 2 alpha of scikit-learn, ridge = its alpha (1 - l1_ratio) in ElasticNet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import cov_factory as make
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet, Lasso, lars_path_gram, lasso_path
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.data.logits import load_imagenet_covariance
from neuraldeps_kernels.ops import covlasso as ops
from neuraldeps_kernels.reference import covlasso as reference

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-6, F64: 1e-12}  # reachable KKT violation, relative to lambda_max / 2
Covariance = Tensor | nk.CrossCovariance


pytestmark = pytest.mark.usefixtures("one_thread")


def everyone(S: Tensor) -> Tensor:
    return torch.arange(len(S))


def across(joint: Tensor, m: int, exclude_same: bool = False) -> nk.CrossCovariance:
    """The first m categories of a joint covariance predict the others."""
    n = len(joint) - m
    zeros = joint.new_zeros(m), joint.new_zeros(n)
    return nk.CrossCovariance(joint[:m, :m], joint[m:, :m], joint.diagonal()[m:], *zeros, exclude_same)


def cast(cov: Covariance, dtype: torch.dtype) -> Covariance:
    if isinstance(cov, Tensor):
        return cov.to(dtype)
    fields = (cov.cov, cov.cross, cov.variance, cov.predictor_mean, cov.target_mean)
    return nk.CrossCovariance(*(x.to(dtype) for x in fields), cov.exclude_same)


class Problem(NamedTuple):
    """What the functions of the reference take, for a call of the public ones."""

    S: Tensor
    penalty: Tensor  # [T, m], +inf where a predictor may not be used
    keywords: dict[str, object]  # cross, variance, nonnegative, ridge
    variance: Tensor  # v [T]
    c: Tensor  # [T, m]


def problem(
    cov: Covariance,
    targets: Tensor,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Problem:
    cross = variance = None
    S = cov
    if not isinstance(cov, Tensor):
        S, cross, variance = cov.cov, cov.cross, cov.variance
    c = (S if cross is None else cross).double()[targets]
    v = (S.diagonal() if variance is None else variance).double()[targets]
    penalty = torch.ones_like(c) if penalty_factors is None else penalty_factors.double().expand(c.shape).clone()
    if candidates is not None:
        penalty[~candidates.expand(c.shape)] = torch.inf
    if cross is None or cov.exclude_same:
        penalty[torch.arange(len(targets)), targets] = torch.inf
    keywords = {"cross": cross, "variance": variance, "nonnegative": nonnegative, "ridge": ridge}
    return Problem(S, penalty, keywords, v, c)


class Rows(NamedTuple):
    """Solutions one below the other: T of a CovLassoSolution, T * L of a CovLassoPath."""

    theta: Tensor
    target: Tensor  # row of the problem, 0 to T - 1
    lam: Tensor
    lambda_max: Tensor
    err2: Tensor
    relative_error: Tensor
    n_nonzero: Tensor
    duality_gap: Tensor
    kkt_violation: Tensor
    status: Tensor


FIELDS = ("err2", "relative_error", "n_nonzero", "duality_gap", "kkt_violation", "status")


def rows_of(solution: nk.CovLassoSolution | nk.CovLassoPath) -> Rows:
    theta = solution.dense()
    lam = solution.lams if theta.dim() == 3 else solution.lam
    length = theta.shape[1] if theta.dim() == 3 else 1
    fields = [getattr(solution, name).flatten() for name in FIELDS]
    target = torch.arange(len(solution.targets)).repeat_interleave(length)
    return Rows(theta.flatten(0, -2), target, lam.flatten(), solution.lambda_max[target], *fields)


def coefficient_rounding(p: Problem, rows: Rows) -> Tensor:
    """Violation [R] that storing theta may cost at worst: max_j sum_k |A_jk theta_k| eps / 2 over lambda_max / 2."""
    largest = (rows.theta.double().abs() @ p.S.double().abs()).amax(1) + p.keywords["ridge"] * rows.theta.abs().amax(1)
    return torch.finfo(rows.theta.dtype).eps / 2 * largest / (rows.lambda_max / 2).clamp_min(1e-300)


def certify(cov: Covariance, solution: nk.CovLassoSolution | nk.CovLassoPath, tol: float, **keywords) -> None:
    """Converged, optimal by an independent check, and every reported number equal to what the coefficients imply.

    Where rounding of the coefficients alone may exceed half the tolerance, `collinear` (out of reach) is right as well,
    if the violation is of that size.
    """
    rows = rows_of(solution)
    targets = solution.targets[rows.target]
    p = problem(cov, solution.targets, **keywords)
    penalty, variance, theta = p.penalty[rows.target], p.variance[rows.target], rows.theta
    assert theta.dtype == p.S.dtype
    assert (theta[penalty.isinf()] == 0).all()
    certificate = (p.S, theta, targets, rows.lam, penalty)
    violation = reference.kkt_violation(*certificate, **p.keywords)
    rounding = coefficient_rounding(p, rows)
    reached = (rows.status == 0) & (violation <= tol)
    excused = (rows.status == 2) & (rounding > tol / 2) & (violation <= 4 * rounding)
    wrong = (~(reached | excused)).nonzero().flatten().tolist()
    assert not wrong, [(r, int(rows.status[r]), float(violation[r]), float(rounding[r])) for r in wrong[:5]]
    exact = 1e-5 if theta.dtype == F32 else 1e-9
    assert (rows.kkt_violation - violation).abs().max() <= max(tol, exact)
    err2 = reference.err2(p.S, theta, targets, **p.keywords)
    assert (rows.err2 - err2).abs().le(exact * variance).all()
    gap = reference.duality_gap(*certificate, **p.keywords)
    # tau follows the largest |rho|, so a rounding r of rho moves the gap by lambda_max |theta|_1 r + err2 (r / lam)^2.
    norm = torch.where(theta != 0, theta.double().abs() * penalty, 0.0).sum(1)
    off_tau = 4 * rounding * rows.lambda_max / rows.lam.clamp_min(1e-300)
    slack = exact * variance + 2 * rows.lambda_max * norm * rounding + off_tau**2 * variance
    assert (rows.duality_gap - gap).abs().le(slack).all()
    assert torch.equal(rows.n_nonzero, (theta != 0).sum(1))
    torch.testing.assert_close(rows.relative_error, torch.where(variance > 0, rows.err2 / variance, 0.0))
    top = reference.lambda_max(p.S, solution.targets, p.penalty, **p.keywords)
    torch.testing.assert_close(solution.lambda_max, top)


def objective(cov: Covariance, solution, **keywords) -> Tensor:
    """err2 + ridge |theta|^2 + lam sum_j penalty_j |theta_j| of every row, in float64."""
    rows, p = rows_of(solution), problem(cov, solution.targets, **keywords)
    theta, penalty = rows.theta.double(), p.penalty[rows.target]
    norm = torch.where(theta != 0, penalty * theta.abs(), 0.0).sum(1)
    err2 = reference.err2(p.S, theta, solution.targets[rows.target], **p.keywords)
    return err2 + p.keywords["ridge"] * theta.square().sum(1) + rows.lam * norm


def rows_only(keywords: dict[str, object], rows: Tensor | int) -> dict[str, object]:
    """The options with the mask of each target reduced to some of the targets."""
    return {name: x[rows] if name == "candidates" else x for name, x in keywords.items()}


def others(n: int, target: int) -> list[int]:
    return [j for j in range(n) if j != target]


def factor(S: Tensor) -> np.ndarray:
    """X [n, n] with X'X / n = S, S positive definite: data whose second moment is exactly S."""
    return math.sqrt(len(S)) * torch.linalg.cholesky(S).T.numpy()


FEATURES: dict[str, tuple[Callable[[], Covariance], dict[str, object]]] = {
    "plain": (lambda: make.mixed(30, seed=0), {}),
    "nonnegative": (lambda: make.mixed(30, seed=1), {"nonnegative": True}),
    "ridge": (lambda: make.mixed(30, seed=2), {"ridge": 2.0}),
    "singular": (lambda: make.clustered(50, 20, seed=3), {}),  # rank 20
    "singular, nonnegative": (lambda: make.clustered(50, 20, seed=4), {"nonnegative": True}),
    "singular, ridge": (lambda: make.clustered(50, 20, seed=5), {"ridge": 0.1}),
    "cross": (lambda: across(make.joint(20, 9, seed=6), 20), {}),
    "cross, same": (lambda: across(make.joint(15, 15, seed=7), 15, exclude_same=True), {}),
    "cross, nonnegative, ridge": (lambda: across(make.joint(20, 9, seed=8), 20), {"nonnegative": True, "ridge": 0.3}),
    "masked": (
        lambda: make.mixed(24, seed=9),
        {"candidates": make.normal(24, 24, seed=10) > 0, "penalty_factors": make.normal(24, seed=11).exp()},
    ),
    "masked, nonnegative, ridge": (
        lambda: across(make.joint(18, 24, seed=12), 18),
        {
            "candidates": make.normal(24, 18, seed=13) > -0.5,
            "penalty_factors": make.normal(18, seed=14).exp(),
            "nonnegative": True,
            "ridge": 0.2,
        },
    ),
}


@pytest.fixture(params=FEATURES)
def feature(request) -> tuple[Covariance, dict[str, object]]:
    covariance, keywords = FEATURES[request.param]
    return covariance(), keywords


# ---------------------------------------------------------------------------------------------------- the oracles agree


def test_homotopy_equals_coordinate_descent(feature):
    """Two unrelated algorithms of the reference: on every segment of the path the same support and coefficients."""
    cov, keywords = feature
    for i in (0, 5):
        targets = torch.tensor([i])
        narrowed = rows_only(keywords, i)
        p = problem(cov, targets, **narrowed)
        segments = reference.homotopy(p.S, i, p.penalty, **p.keywords)
        assert len(segments) >= 3
        assert segments[0].high == pytest.approx(reference.lambda_max(p.S, targets, p.penalty, **p.keywords).item())
        for before, after in itertools.pairwise(segments):
            assert before.low == after.high
        for segment in segments[:: max(1, len(segments) // 6)]:
            lam = torch.tensor([(segment.high + segment.low) / 2], dtype=F64)
            theta = reference.covlasso(p.S, targets, lam, p.penalty, **p.keywords)[0]
            assert torch.equal(theta.nonzero()[:, 0], segment.support)
            assert torch.equal(theta[segment.support].sign(), segment.signs)


@pytest.mark.parametrize("positive", [False, True])
def test_homotopy_equals_lars_path_gram(positive):
    """Every kink and every coefficient there; alpha = lam / 2. S is well conditioned, where that LARS is exact."""
    S = make.mixed(20, seed=20, samples=4000) + 3 * torch.eye(20, dtype=F64)
    for i in (0, 13):
        rest = others(20, i)
        alphas, _, coefficients = lars_path_gram(
            S[i, rest].numpy(), S[rest][:, rest].numpy(), n_samples=1, method="lasso", positive=positive
        )
        segments = reference.homotopy(S, i, nonnegative=positive)
        kinks = [segment.high for segment in segments] + [0.0]
        np.testing.assert_allclose(2 * alphas, kinks, rtol=1e-8, atol=1e-8 * kinks[0])
        lam = torch.tensor(kinks[:-1], dtype=F64)
        theta = reference.covlasso(S, torch.full((len(lam),), i), lam, nonnegative=positive)[:, rest]
        np.testing.assert_allclose(coefficients[:, :-1].T, theta.numpy(), atol=1e-8)


def exhaustive_nonnegative(A: np.ndarray, c: np.ndarray, lam: float) -> np.ndarray:
    """argmin of x'Ax - 2 c.x + lam sum x over x >= 0 by all 2^m supports: exact for positive definite A."""
    best, best_value = np.zeros(len(c)), 0.0
    for chosen in itertools.product((False, True), repeat=len(c)):
        a = np.flatnonzero(chosen)
        if len(a) == 0:
            continue
        x = np.linalg.solve(A[np.ix_(a, a)], c[a] - lam / 2)
        value = x @ A[np.ix_(a, a)] @ x - 2 * c[a] @ x + lam * x.sum()
        if (x >= 0).all() and value < best_value:
            best_value, best = value, np.zeros(len(c))
            best[a] = x
    return best


@pytest.mark.parametrize("solve", ["operator", "reference"])
def test_exhaustive_search_nonnegative(solve):
    for seed, ridge in itertools.product(range(4), (0.0, 0.5)):
        cov = across(make.joint(5, 4, seed=30 + 3 * seed), 5)
        p = problem(cov, torch.arange(4), nonnegative=True, ridge=ridge)
        top = reference.lambda_max(cov.cov, torch.arange(4), **p.keywords)
        for ratio in (0.7, 0.2, 0.01):
            if solve == "operator":
                theta = nk.covlasso(cov, ratio * top, nonnegative=True, ridge=ridge, tol=1e-12).dense()
            else:
                theta = reference.covlasso(cov.cov, torch.arange(4), ratio * top, **p.keywords)
            A = cov.cov.numpy() + ridge * np.eye(5)
            for t in range(4):
                expected = exhaustive_nonnegative(A, cov.cross[t].numpy(), ratio * top[t].item())
                np.testing.assert_allclose(theta[t].numpy(), expected, atol=1e-9)


def test_reference_certificates_by_loop():
    """The oracle's own violation, gap and error with every option, entry by entry in Python floats."""
    cov, ridge = across(make.joint(6, 3, seed=40), 6), 0.4
    factors = torch.tensor([0.5, 1.0, 2.0, 1.0, math.inf, 1.0], dtype=F64)
    targets, lam = torch.tensor([2, 0]), torch.tensor([0.3, 0.5], dtype=F64)
    p = problem(cov, targets, nonnegative=True, ridge=ridge)
    theta = reference.covlasso(cov.cov, targets, lam, factors, tol=1e-3, **p.keywords)
    theta = (theta + 0.02 * make.normal(2, 6, seed=41)).clamp_min(0)
    theta[:, 4] = 0
    certificate = (cov.cov, theta, targets, lam, factors)
    violation = reference.kkt_violation(*certificate, **p.keywords)
    gap, err2 = reference.duality_gap(*certificate, **p.keywords), reference.err2(*certificate[:3], **p.keywords)
    usable = [0, 1, 2, 3, 5]
    for t, i in enumerate(targets.tolist()):
        x, S, c = theta[t].tolist(), cov.cov.tolist(), cov.cross[i].tolist()
        half, v = lam[t].item() / 2, cov.variance[i].item()
        bound = [half * f for f in factors.tolist()]
        rho = [c[j] - sum(S[j][k] * x[k] for k in range(6)) - ridge * x[j] for j in range(6)]
        top = max(c[j] / factors[j].item() for j in usable)
        worst = max(abs(rho[j] - bound[j]) if x[j] else max(rho[j] - bound[j], 0.0) for j in usable)
        error = v - 2 * sum(c[j] * x[j] for j in range(6))
        error += sum(x[j] * S[j][k] * x[k] for j in range(6) for k in range(6))
        tau = min([1.0, *(bound[j] / rho[j] for j in usable if rho[j] > 0)])
        quadratic = error + ridge * sum(value**2 for value in x)
        primal = quadratic + 2 * sum(bound[j] * x[j] for j in usable)
        dual = 2 * tau * (v - sum(c[j] * x[j] for j in range(6))) - tau**2 * quadratic
        assert violation[t].item() == pytest.approx(worst / top, rel=1e-10)
        assert gap[t].item() == pytest.approx(primal - dual, rel=1e-10)
        assert err2[t].item() == pytest.approx(error, rel=1e-10)
    theta[0, 0] = -1e-3
    assert reference.kkt_violation(*certificate, **p.keywords)[0] == math.inf


def test_reference_gradients_by_finite_differences(feature):
    """Central differences of the reference's own solution in S, c and lam, on a random direction."""
    cov, keywords = feature
    targets = torch.arange(4)
    narrowed = rows_only(keywords, targets)
    p = problem(cov, targets, **narrowed)
    lam = 0.3 * reference.lambda_max(p.S, targets, p.penalty, **p.keywords)
    weight, step = make.normal(*p.c.shape, seed=50), 1e-6
    direction = make.covariance_of(make.normal(30, len(p.S), seed=51)) - torch.eye(len(p.S), dtype=F64)
    along = {} if p.keywords["cross"] is None else {"cross": make.normal(*cov.cross.shape, seed=52)}
    slope_lam = lam * make.normal(4, seed=53)

    def loss(s: float) -> Tensor:
        moved = {name: p.keywords[name] + s * x for name, x in along.items()}
        theta = reference.covlasso(
            p.S + s * direction, targets, lam + s * slope_lam, p.penalty, **{**p.keywords, **moved}
        )
        return (theta * weight).sum()

    theta = reference.covlasso(p.S, targets, lam, p.penalty, **p.keywords)
    grads = reference.gradients(p.S, theta, targets, weight, p.penalty, **p.keywords)
    directions = [direction, slope_lam, *along.values()]
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close((loss(step) - loss(-step)) / (2 * step), expected, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------- sign constraint, ridge, two networks


@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_feature_is_certified(feature, dtype):
    cov, keywords = feature
    cov = cast(cov, dtype)
    for ratio in (0.9, 0.3, 0.03):
        certify(cov, nk.covlasso(cov, lam_ratio=ratio, tol=TOLERANCE[dtype], **keywords), TOLERANCE[dtype], **keywords)


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_nonnegative_scikit_learn(ratio):
    S = make.mixed(25, seed=60)
    X, targets = factor(S), [0, 8, 24]
    lam = ratio * nk.lambda_max(S, targets, nonnegative=True)
    solution = nk.covlasso(S, lam, targets=targets, nonnegative=True, tol=1e-12)
    for t, i in enumerate(targets):
        rest = others(25, i)
        model = Lasso(alpha=lam[t].item() / 2, fit_intercept=False, positive=True, tol=1e-14, max_iter=1_000_000)
        expected = model.fit(X[:, rest], X[:, i]).coef_
        np.testing.assert_allclose(solution.dense()[t, rest].numpy(), expected, atol=1e-6)


def test_nonnegative_limit_is_nnls():
    S = make.mixed(25, seed=61)
    X, solution = factor(S) / 5, nk.covlasso(S, lam_ratio=1e-9, nonnegative=True, tol=1e-12)
    for i in range(0, 25, 4):
        rest = others(25, i)
        expected, norm = scipy.optimize.nnls(X[:, rest], X[:, i])
        np.testing.assert_allclose(solution.dense()[i, rest].numpy(), expected, atol=1e-6)
        assert solution.err2[i].item() == pytest.approx(norm**2, rel=1e-6)


def test_nonnegative_without_positive_correlation():
    """Negative correlations alone: lambda_max is 0 and the support empty at every lam."""
    S = make.equicorrelated(9, -0.12)
    assert nk.lambda_max(S, nonnegative=True).tolist() == [0.0] * 9
    for solution in (
        nk.covlasso(S, 1e-3, nonnegative=True),
        nk.covlasso(S, lam_ratio=0.1, nonnegative=True),
        nk.covlasso_path(S, lams=torch.tensor([0.1, 0.01], dtype=F64), nonnegative=True)[1],
        nk.covlasso_path(S, n_lambdas=4, nonnegative=True)[3],
    ):
        assert solution.n_nonzero.tolist() == [0] * 9
        assert solution.status_names == ["converged"] * 9
        assert torch.equal(solution.err2, S.diagonal())
    assert nk.covlasso_top_k(S, 1, nonnegative=True).status_names == ["too_few"] * 9


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nonnegative_where_all_coefficients_are_positive_anyway(dtype):
    """A constraint that does not bind changes nothing beyond rounding; one that does costs error."""
    S = make.equicorrelated(12, 0.4).to(dtype) + torch.diag(torch.linspace(0, 1, 12).to(dtype))
    free, bound = nk.covlasso(S, lam_ratio=0.2), nk.covlasso(S, lam_ratio=0.2, nonnegative=True)
    torch.testing.assert_close(bound.dense(), free.dense(), rtol=0, atol=1e-5)
    S = make.mixed(20, seed=62).to(dtype)
    free, bound = nk.covlasso(S, 0.5), nk.covlasso(S, 0.5, nonnegative=True)
    assert (bound.dense() >= 0).all()
    assert (objective(S, bound, nonnegative=True) >= objective(S, free) * (1 - 1e-6)).all()
    assert (bound.err2 > 1.01 * free.err2).any()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_ridge_scikit_learn(ridge, positive):
    S = make.mixed(25, seed=63)
    X, targets = factor(S), [3, 17]
    lam = 0.05 * nk.lambda_max(S, targets, nonnegative=positive)
    solution = nk.covlasso(S, lam, targets=targets, ridge=ridge, nonnegative=positive, tol=1e-12)
    for t, i in enumerate(targets):
        rest, half = others(25, i), lam[t].item() / 2
        model = ElasticNet(
            alpha=half + ridge, l1_ratio=half / (half + ridge), fit_intercept=False, positive=positive, tol=1e-14,
            max_iter=1_000_000,
        )  # fmt: skip
        expected = model.fit(X[:, rest], X[:, i]).coef_
        np.testing.assert_allclose(solution.dense()[t, rest].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_ridge_is_a_larger_diagonal(dtype):
    """S + ridge I has the same coefficients; its error counts ridge |Theta|^2, the pinned -1 included, besides."""
    S, ridge = make.clustered(40, 15, seed=64).to(dtype), 0.25
    solution = nk.covlasso(S, lam_ratio=0.05, ridge=ridge, tol=TOLERANCE[dtype])
    larger = nk.covlasso(S + ridge * torch.eye(40, dtype=dtype), lam_ratio=0.05, tol=TOLERANCE[dtype])
    near = {"rtol": 0, "atol": 1e-4 if dtype == F32 else 1e-10}
    torch.testing.assert_close(solution.dense(), larger.dense(), **near)
    corrected = larger.err2 - ridge * (1 + larger.dense().double().square().sum(1))
    assert (solution.err2 - corrected).abs().le(1e-4 if dtype == F32 else 1e-10 * S.diagonal()).all()
    assert (nk.covlasso(S, lam_ratio=0.05, ridge=0.0).dense() == nk.covlasso(S, lam_ratio=0.05).dense()).all()


def test_ridge_limit_is_ridge_regression():
    S, ridge = make.low_rank(30, 8, seed=65), 0.7
    solution = nk.covlasso(S, lam_ratio=1e-10, ridge=ridge, tol=1e-13)
    for i in (0, 29):
        rest = others(30, i)
        expected = torch.linalg.solve(S[rest][:, rest] + ridge * torch.eye(29, dtype=F64), S[rest, i])
        torch.testing.assert_close(solution.dense()[i, rest], expected, rtol=0, atol=1e-8)


def test_ridge_treats_duplicates_alike():
    """Exact duplicates share their coefficient under a ridge, where without one any split is optimal."""
    S = make.repeated(make.mixed(20, seed=66), 6)
    solution = nk.covlasso(S, lam_ratio=0.05, ridge=0.5, targets=range(6, 20), tol=1e-12)
    certify(S, solution, 1e-12, ridge=0.5)
    torch.testing.assert_close(solution.dense()[:, :6], solution.dense()[:, 20:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_T15_cross_equals_the_joint_covariance(dtype):
    """n targets from m other predictors, n above and below m: the joint matrix with the targets masked out."""
    for m, n in ((20, 7), (7, 20), (1, 3), (16, 1)):
        joint = make.joint(m, max(n, 1), seed=70).to(dtype) if m >= 3 else make.mixed(m + n, seed=70).to(dtype)
        cov = across(joint, m)
        candidates = torch.arange(m + n) < m
        for ratio in (0.5, 0.05):
            tol = TOLERANCE[dtype]
            apart = nk.covlasso(cov, lam_ratio=ratio, tol=tol)
            together = nk.covlasso(joint, lam_ratio=ratio, targets=range(m, m + n), candidates=candidates, tol=tol)
            certify(cov, apart, tol)
            near = {"rtol": 0, "atol": 1e-3 if dtype == F32 else 1e-9}
            torch.testing.assert_close(apart.dense(), together.dense()[:, :m], **near)
            torch.testing.assert_close(apart.lambda_max, together.lambda_max)
            torch.testing.assert_close(apart.lambda_max, nk.lambda_max(cov))
            assert apart.coefficients.shape == (n, m)
            assert apart.targets.tolist() == list(range(n))


def test_T15_cross_scikit_learn():
    x = make.normal(300, 12, seed=71) @ make.normal(12, 12, seed=72)
    y = x @ make.normal(12, 5, seed=73) + 2 * make.normal(300, 5, seed=74)
    x, y = x - x.mean(0), y - y.mean(0)
    cov = across(make.covariance_of(torch.cat([x, y], 1)), 12)
    targets = [4, 0]
    solution = nk.covlasso(cov, lam_ratio=0.1, targets=targets, tol=1e-12)
    for t, i in enumerate(targets):
        direct = Lasso(alpha=solution.lam[t].item() / 2, fit_intercept=False, tol=1e-13, max_iter=100_000)
        np.testing.assert_allclose(solution.dense()[t].numpy(), direct.fit(x.numpy(), y[:, i].numpy()).coef_, atol=1e-7)
    residual = (y[:, targets] - solution.predict(x)).square().mean(0)
    torch.testing.assert_close(residual, solution.err2, rtol=1e-9, atol=0)
    shifted = solution.predict(x + 3, mean=torch.full((12,), 3.0, dtype=F64), target_mean=torch.arange(5, dtype=F64))
    torch.testing.assert_close(shifted, solution.predict(x) + torch.tensor([4.0, 0.0], dtype=F64))


def test_exclude_same():
    """The same stream twice: with exclude_same the problem within one network, without it the trivial answer."""
    S = make.mixed(15, seed=75)
    twice = torch.cat([torch.cat([S, S], 1)] * 2)
    lam = 0.1 * nk.lambda_max(S)
    apart = nk.covlasso(across(twice, 15, exclude_same=True), lam, tol=1e-12)
    torch.testing.assert_close(apart.dense(), nk.covlasso(S, lam, tol=1e-12).dense(), rtol=0, atol=1e-10)
    trivial = nk.covlasso(across(twice, 15), 1e-6 * S.diagonal(), tol=1e-12)
    torch.testing.assert_close(trivial.dense(), torch.eye(15, dtype=F64), rtol=0, atol=1e-3)
    targets = torch.tensor([3, 11])
    some = nk.covlasso(across(twice, 15, exclude_same=True), lam[targets], targets=targets, tol=1e-12)
    assert torch.equal(some.dense(), apart.dense()[targets])


# ----------------------------------------------------------------------------------------------------------------- path


@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_equals_single_solves(feature, dtype):
    """Every lambda of the warm path is certified, and as good as a cold solve of it alone."""
    cov, keywords = feature
    cov = cast(cov, dtype)
    path = nk.covlasso_path(cov, n_lambdas=9, lam_min_ratio=0.01, tol=TOLERANCE[dtype], **keywords)
    certify(cov, path, TOLERANCE[dtype], **keywords)
    total = objective(cov, path, **keywords).view(path.lams.shape)
    for l in range(9):
        single = nk.covlasso(cov, path.lams[:, l], tol=TOLERANCE[dtype], **keywords)
        cold = objective(cov, single, **keywords)
        variance = problem(cov, path.targets, **keywords).variance
        assert (total[:, l] - cold).abs().le((1e-5 if dtype == F32 else 1e-11) * variance).all()
        if dtype == F64 and "singular" not in str(keywords):
            assert (path[l].n_nonzero - single.n_nonzero).abs().max() <= 1


def test_path_equals_the_reference(feature):
    cov, keywords = feature
    targets = torch.arange(9)[::2]
    narrowed = rows_only(keywords, targets)
    path = nk.covlasso_path(cov, targets=targets, n_lambdas=6, lam_min_ratio=0.05, tol=1e-12, **narrowed)
    p = problem(cov, targets, **narrowed)
    expected = reference.path(p.S, targets, path.lams, p.penalty, **p.keywords)
    torch.testing.assert_close(path.dense(), expected, rtol=0, atol=1e-7)
    assert torch.equal(path.dense() != 0, expected != 0)


@pytest.mark.parametrize("positive", [False, True])
def test_path_scikit_learn(positive):
    S = make.mixed(40, seed=80)
    X = factor(S)
    path = nk.covlasso_path(S, n_lambdas=12, lam_min_ratio=0.02, targets=[0, 21], nonnegative=positive, tol=1e-12)
    for t, i in enumerate([0, 21]):
        rest = others(40, i)
        _, coefficients, _ = lasso_path(
            X[:, rest], X[:, i], alphas=path.lams[t].numpy() / 2, positive=positive, tol=1e-13, max_iter=500_000
        )
        np.testing.assert_allclose(path.dense()[t][:, rest].T.numpy(), coefficients, atol=1e-6)


def test_path_default_grid():
    S = make.mixed(12, seed=81)
    path = nk.covlasso_path(S, targets=[3, 7, 7])
    assert path.lams.shape == (3, 20)
    assert path.lams.dtype == F64
    torch.testing.assert_close(path.lambda_max, nk.lambda_max(S, [3, 7, 7]).double())
    ratio = 0.01 ** (torch.arange(20, dtype=F64) / 19)
    torch.testing.assert_close(path.lams, path.lambda_max[:, None] * ratio, rtol=1e-12, atol=0)
    assert path.n_nonzero[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(path.err2[:, 0], S.diagonal()[[3, 7, 7]])
    assert torch.equal(path.dense()[1], path.dense()[2])
    wide = nk.covlasso_path(S, n_lambdas=5, lam_min_ratio=1e-4)
    torch.testing.assert_close(wide.lams[:, -1], 1e-4 * wide.lambda_max, rtol=1e-12, atol=0)
    one = nk.covlasso_path(S, n_lambdas=1)
    assert one.lams.shape == (12, 1)
    torch.testing.assert_close(one.lams[:, 0], one.lambda_max)


def test_path_given_lambdas():
    """[L] for all targets, or [T, L]; numbers above lambda_max give empty supports on the way."""
    S = make.mixed(12, seed=82)
    top = nk.lambda_max(S).max().item()
    shared = top * torch.tensor([2.0, 0.7, 0.2, 0.05], dtype=F64)
    path = nk.covlasso_path(S, lams=shared, tol=1e-12)
    certify(S, path, 1e-12)
    assert torch.equal(path.lams, shared.expand(12, 4))
    assert path.n_nonzero[:, 0].tolist() == [0] * 12
    each = nk.lambda_max(S)[:, None] * torch.linspace(0.8, 0.1, 12, dtype=F64)[:, None] ** torch.arange(1, 4)
    own = nk.covlasso_path(S, lams=each, tol=1e-12)
    certify(S, own, 1e-12)
    assert torch.equal(own.lams, each)
    for l in range(3):
        near = {"rtol": 0, "atol": 1e-9}
        torch.testing.assert_close(own[l].dense(), nk.covlasso(S, each[:, l], tol=1e-12).dense(), **near)
    assert torch.equal(nk.covlasso_path(S, lams=shared.tolist(), tol=1e-12).dense(), path.dense())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_of_one_lambda_is_the_single_solve(dtype):
    S = make.clustered(60, 30, seed=83).to(dtype)
    lam = 0.05 * nk.lambda_max(S).double()
    path, single = nk.covlasso_path(S, lams=lam[:, None]), nk.covlasso(S, lam)
    assert len(path) == 1
    assert torch.equal(path[0].dense(), single.dense())
    for name in (*FIELDS, "n_pivots", "lambda_max"):
        assert torch.equal(getattr(path[0], name), getattr(single, name)), name


def test_path_object():
    S = make.clustered(20, 30, seed=84).float()
    targets = [3, 17, 4]
    path = nk.covlasso_path(S, n_lambdas=7, targets=targets)
    assert len(path) == 7
    assert path.targets.tolist() == targets
    assert path.coefficients.layout == torch.sparse_csr
    assert path.coefficients.shape == (21, 20)
    assert torch.equal(path.coefficients.to_dense().view(3, 7, 20), path.dense())
    col, crow = path.coefficients.col_indices(), path.coefficients.crow_indices()
    assert torch.equal(crow.diff().view(3, 7), path.n_nonzero)
    assert all((col[crow[r] : crow[r + 1]].diff() > 0).all() for r in range(21))
    for name in (*FIELDS, "n_pivots", "lams"):
        assert getattr(path, name).shape == (3, 7), name
    assert path.lambda_max.shape == (3,)
    for l in (0, 3, 6, -1):
        part = path[l]
        assert isinstance(part, nk.CovLassoSolution)
        assert torch.equal(part.dense(), path.dense()[:, l])
        assert torch.equal(part.lam, path.lams[:, l])
        assert torch.equal(part.lambda_max, path.lambda_max)
        assert part.targets.tolist() == targets
        for name in (*FIELDS, "n_pivots"):
            assert torch.equal(getattr(part, name), getattr(path, name)[:, l]), name
        x = make.normal(5, 20, seed=85).float()
        torch.testing.assert_close(part.predict(x), x @ path.dense()[:, l].T)
    chosen = torch.tensor([6, 0, 2])
    mixed = path.at(chosen)
    three = torch.arange(3)
    assert torch.equal(mixed.dense(), path.dense()[three, chosen])
    assert torch.equal(mixed.lam, path.lams[three, chosen])
    for name in (*FIELDS, "n_pivots"):
        assert torch.equal(getattr(mixed, name), getattr(path, name)[three, chosen]), name
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            path[wrong]
    assert len(list(path)) == 7
    with pytest.raises(AttributeError):
        path.lams = None


def test_path_bad_choice_per_target():
    path = nk.covlasso_path(make.mixed(6, seed=86), n_lambdas=3)
    for wrong in (
        torch.tensor([0, 1]),
        torch.zeros(6, 1, dtype=torch.int64),
        torch.full((6,), 3),
        torch.full((6,), -4),
    ):
        with pytest.raises((ValueError, IndexError)):
            path.at(wrong)
    with pytest.raises(TypeError):
        path.at(torch.zeros(6))


def test_path_without_targets_and_with_one_category():
    path = nk.covlasso_path(make.mixed(8, seed=87), targets=[], n_lambdas=4)
    assert path.dense().shape == (0, 4, 8)
    assert path.lams.shape == (0, 4)
    assert len(path) == 4
    assert path[2].dense().shape == (0, 8)
    alone = nk.covlasso_path(torch.tensor([[2.0]], dtype=F64), n_lambdas=3)
    assert alone.dense().tolist() == [[[0.0]] * 3]
    assert alone.err2.tolist() == [[2.0] * 3]
    assert alone.status.tolist() == [[0, 0, 0]]


def test_path_of_targets_without_candidates():
    """A mask that leaves a target nothing: empty support, converged, and no effect on its neighbours."""
    S = make.mixed(8, seed=88)
    candidates = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    candidates[2] = False
    candidates[5] = torch.arange(8) == 5  # only itself
    path = nk.covlasso_path(S, n_lambdas=5, candidates=candidates, tol=1e-12)
    assert path.status.tolist() == [[0] * 5] * 8
    for t in (2, 5):
        assert path.n_nonzero[t].tolist() == [0] * 5
        assert path.err2[t].tolist() == [S[t, t].item()] * 5
    rest = torch.tensor([0, 1, 3, 4, 6, 7])
    alone = nk.covlasso_path(S, n_lambdas=5, candidates=candidates[rest], targets=rest, tol=1e-12)
    assert torch.equal(alone.dense(), path.dense()[rest])


@pytest.mark.parametrize(
    "name", ["duplicates", "near duplicates", "rank one", "ties", "scales", "constant", "few samples"]
)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_of_degenerate_covariances(name, dtype):
    S = {
        "duplicates": lambda: make.repeated(make.low_rank(30, 9, seed=90), 12),
        "near duplicates": lambda: make.near_duplicates(25, 10, seed=91, difference=1e-4),
        "rank one": lambda: torch.outer(torch.arange(1.0, 12.0, dtype=F64), torch.arange(1.0, 12.0, dtype=F64)),
        "ties": lambda: make.equicorrelated(17, 0.5),  # one more than a vector of float32
        "scales": lambda: make.unequal_scales(make.mixed(20, seed=92), 3, seed=92),
        "constant": lambda: torch.block_diag(make.mixed(12, seed=93), torch.zeros(2, 2, dtype=F64)),
        "few samples": lambda: make.mixed(30, seed=94, samples=10),
    }[name]().to(dtype)
    for keywords in ({}, {"nonnegative": True}, {"ridge": 0.1 * S.diagonal().mean().item()}):
        path = nk.covlasso_path(S, n_lambdas=15, lam_min_ratio=1e-3, tol=TOLERANCE[dtype], **keywords)
        certify(S, path, TOLERANCE[dtype], **keywords)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_carries_its_state(dtype):
    """The pivots of the whole path are far fewer than those of the single solves: it is no loop of cold ones."""
    S = make.clustered(120, 150, seed=95).to(dtype)
    path = nk.covlasso_path(S, n_lambdas=12, targets=range(20))
    cold = sum(nk.covlasso(S, path.lams[:, l], targets=range(20)).n_pivots.sum() for l in range(12))
    assert path.n_pivots.sum() < 0.6 * cold
    certify(S, path, 1e-6)


def test_path_max_pivots_caps():
    S = make.clustered(60, 80, seed=96)
    free = nk.covlasso_path(S, n_lambdas=6)
    capped = nk.covlasso_path(S, n_lambdas=6, max_pivots=2)
    assert capped.dense().isfinite().all()
    assert (capped.status[:, 0] == 0).all()
    assert (capped.status[:, -1] == 1).all()
    p = problem(S, capped.targets)
    rows = rows_of(capped)
    violation = reference.kkt_violation(S, rows.theta, rows.target, rows.lam, p.penalty[rows.target])
    torch.testing.assert_close(rows.kkt_violation, violation, rtol=1e-6, atol=1e-9)
    assert (violation[rows.status == 0] <= 1e-6).all()
    enough = nk.covlasso_path(S, n_lambdas=6, max_pivots=int(free.n_pivots.sum(1).max()))
    assert torch.equal(enough.dense(), free.dense())


# ----------------------------------------------------------------------------------------------- theory along the path


def weighted_norm(cov: Covariance, path: nk.CovLassoPath, **keywords) -> Tensor:
    """sum_j penalty_j |theta_j|, [T, L]."""
    penalty = problem(cov, path.targets, **keywords).penalty[:, None].expand(path.dense().shape)
    return torch.where(path.dense() != 0, penalty * path.dense().abs(), 0.0).sum(2)


def test_T5_monotone_and_concave(feature):
    """lam falls along the path: the error falls, the norm grows, the optimal value is concave and nondecreasing in lam.

    With a ridge the error counts ridge |theta|^2 here: it is part of the quadratic.
    """
    cov, keywords = feature
    path = nk.covlasso_path(cov, n_lambdas=60, lam_min_ratio=1e-3, tol=1e-12, **keywords)
    certify(cov, path, 1e-12, **keywords)
    variance = problem(cov, path.targets, **keywords).variance[:, None]
    norm = weighted_norm(cov, path, **keywords)
    error = path.err2 + keywords.get("ridge", 0.0) * path.dense().square().sum(2)
    value = error + path.lams * norm
    assert (error.diff(dim=1) <= 1e-10 * variance).all()
    assert (norm.diff(dim=1) >= -1e-8 * (1 + norm[:, 1:])).all()
    assert (value.diff(dim=1) <= 1e-10 * variance).all()
    inside = (path.lambda_max > 0)[:, None]
    slope = (value.diff(dim=1) / path.lams.diff(dim=1))[inside.expand(-1, 59)].view(-1, 59)
    step = path.lams[inside[:, 0]].diff(dim=1).abs()
    slack = 1e-10 * variance[inside[:, 0]] / torch.minimum(step[:, 1:], step[:, :-1]) + 1e-8 * slope[:, 1:]
    assert (slope.diff(dim=1) >= -slack).all()  # steeper towards 0


def test_T5_slope_on_segments(feature):
    """d (err2 + ridge |theta|^2) / d lam = (lam/2) g' A_aa^-1 g with g = penalty sign on every segment of the path."""
    cov, keywords = feature
    targets = torch.tensor([1])
    narrowed = rows_only(keywords, 1)
    p, ridge = problem(cov, targets, **narrowed), keywords.get("ridge", 0.0)
    segments = reference.homotopy(p.S, 1, p.penalty, **p.keywords)
    compared = 0
    for segment in segments:
        width = segment.high - segment.low
        if width < 1e-3 * segments[0].high:
            continue
        middle = (segment.high + segment.low) / 2
        lams = torch.tensor([middle + 0.3 * width, middle, middle - 0.3 * width], dtype=F64)
        path = nk.covlasso_path(cov, lams=lams, targets=targets, tol=1e-13, **narrowed)
        error = (path.err2 + ridge * path.dense().square().sum(2))[0]
        a, g = segment.support, segment.signs * p.penalty[0, segment.support]
        assert torch.equal(path.dense()[0, 1].nonzero()[:, 0], a)
        A = p.S[a][:, a] + ridge * torch.eye(len(a), dtype=F64)
        expected = middle / 2 * g @ torch.linalg.solve(A, g)  # err2 is quadratic here: central differences are exact
        torch.testing.assert_close((error[0] - error[2]) / (lams[0] - lams[2]), expected, rtol=1e-5, atol=0)
        compared += 1
    assert compared >= 3


def test_T6_end_points():
    S = make.mixed(25, seed=100)
    path = nk.covlasso_path(S, n_lambdas=12, lam_min_ratio=1e-9, tol=1e-12)
    assert torch.equal(path.err2[:, 0], S.diagonal())
    torch.testing.assert_close(path.err2[:, -1], 1 / torch.linalg.inv(S).diagonal(), rtol=1e-6, atol=0)
    cov = across(make.joint(12, 5, seed=101), 12)
    path = nk.covlasso_path(cov, n_lambdas=12, lam_min_ratio=1e-9, tol=1e-12)
    assert torch.equal(path.err2[:, 0], cov.variance)
    schur = cov.variance - (cov.cross * torch.linalg.solve(cov.cov, cov.cross.T).T).sum(1)
    torch.testing.assert_close(path.err2[:, -1], schur, rtol=1e-6, atol=0)


def test_T7_error_identity_and_gap(feature):
    """At the optimum err2 = v - c.theta - ridge |theta|^2 - (lam/2) sum_j penalty_j |theta_j| (3.4)."""
    cov, keywords = feature
    path = nk.covlasso_path(cov, n_lambdas=15, lam_min_ratio=1e-3, tol=1e-12, **keywords)
    p = problem(cov, path.targets, **keywords)
    v = p.variance[:, None]
    identity = v - (p.c[:, None] * path.dense()).sum(2) - path.lams / 2 * weighted_norm(cov, path, **keywords)
    identity -= keywords.get("ridge", 0.0) * path.dense().square().sum(2)
    assert (path.err2 - identity).abs().le(1e-8 * v).all()
    assert path.duality_gap.ge(-1e-10 * v).all()
    assert path.duality_gap.le(1e-6 * v).all()


def test_T8_redundancy_along_the_path():
    """w_n <= err2_i(0+) <= w_n / v_i^2, min_i err2_i(0+) <= det(S)^(1/n) (3.5); the bounds of 3.6 at every lam."""
    S = make.low_rank(24, 12, seed=102, noise=0.3)
    path = nk.covlasso_path(S, n_lambdas=25, lam_min_ratio=1e-8, tol=1e-12)
    values, vectors = torch.linalg.eigh(S)
    last = path.err2[:, -1]
    assert (last >= values[0] * (1 - 1e-6)).all()
    assert (last <= values[0] / vectors[:, 0] ** 2 * (1 + 1e-6)).all()
    assert last.min().log() <= values.log().mean()
    for row in range(24):
        for l in range(1, 25):
            a, lam, err2 = path.dense()[row, l].nonzero()[:, 0], path.lams[row, l], path.err2[row, l]
            largest = torch.linalg.eigvalsh(S[a][:, a])[-1]
            assert len(a) <= 4 * err2 * largest / lam**2 * (1 + 1e-9)
            assert (S.diagonal()[a] >= lam**2 / (4 * err2) * (1 - 1e-9)).all()


def test_T9_scale_and_permutation_along_a_path():
    S = make.mixed(25, seed=103)
    keywords = {"n_lambdas": 8, "tol": 1e-12, "lam_min_ratio": 0.02}
    plain = nk.covlasso_path(S, **keywords)
    scaled = nk.covlasso_path(9.0 * S, **keywords)
    torch.testing.assert_close(scaled.lams, 9 * plain.lams)
    torch.testing.assert_close(scaled.dense(), plain.dense(), rtol=0, atol=1e-9)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    permuted = nk.covlasso_path(S[order][:, order], **keywords)
    torch.testing.assert_close(permuted.dense(), plain.dense()[order][:, :, order], rtol=0, atol=1e-9)
    ridged = nk.covlasso_path(S, ridge=0.5, nonnegative=True, **keywords)
    scaled = nk.covlasso_path(9.0 * S, ridge=4.5, nonnegative=True, **keywords)
    torch.testing.assert_close(scaled.dense(), ridged.dense(), rtol=0, atol=1e-9)
    doubled = nk.covlasso_path(4.0 * S, **keywords)  # a power of two changes no bit of any product
    assert torch.equal(doubled.dense(), plain.dense())


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_T10_sequential_screening_is_safe(nonnegative, ridge):
    """Rule 3.8 at lam_{l+1} from the solution at lam_l discards nothing that the path then uses."""
    discarded = 0
    for seed in range(8):
        S = make.low_rank(30, 8, seed=110 + 3 * seed, noise=0.2, samples=200)
        path = nk.covlasso_path(
            S, n_lambdas=30, lam_min_ratio=0.2, nonnegative=nonnegative, ridge=ridge, tol=1e-12, targets=range(6)
        )
        p = problem(S, path.targets, nonnegative=nonnegative, ridge=ridge)
        for l in range(29):
            theta, lam = path.dense()[:, l], path.lams[:, l + 1]
            gap = reference.duality_gap(S, theta, path.targets, lam, **p.keywords) + 1e-12 * p.variance
            rho = reference.residual_covariance(S, theta, path.targets, **p.keywords)
            rho = rho.clamp_min(0) if nonnegative else rho.abs()
            rho[torch.arange(6), path.targets] = 0
            tau = (lam / (2 * rho.amax(1)).clamp_min(1e-300)).clamp_max(1.0)
            radius = ((S.diagonal() + ridge) * gap[:, None].clamp_min(0)).sqrt()
            screened = 2 * tau[:, None] * rho + 2 * radius < lam[:, None]
            assert (path.dense()[:, l + 1][screened] == 0).all()
            discarded += int(screened.sum())
    assert discarded > 2000


# --------------------------------------------------------------------------------------------------------------- top k


@pytest.mark.parametrize("dtype", [F32, F64])
def test_top_k_equals_the_homotopy(feature, dtype):
    """Exactly k nonzeros, on the reference's first segment of k, at the asked place of it."""
    cov, keywords = feature
    cov, targets = cast(cov, dtype), torch.tensor([0, 3, 8])
    keywords = rows_only(keywords, targets)
    p = problem(cast(cov, F64), targets, **keywords)
    paths = [reference.homotopy(p.S, i, p.penalty[t], **p.keywords) for t, i in enumerate(targets.tolist())]
    near, compared = 1e-5 if dtype == F32 else 1e-9, 0
    for k in (1, 2, 3, 5, 7):
        solution = nk.covlasso_top_k(cov, k, targets=targets, tol=TOLERANCE[dtype], **keywords)
        chosen = [next((segment for segment in path if len(segment.support) == k), None) for path in paths]
        found = torch.tensor([segment is not None for segment in chosen])
        assert torch.equal(solution.status == 4, ~found)
        assert (solution.n_nonzero[found] == k).all()
        if found.any():
            certify_found(cov, solution, TOLERANCE[dtype], found, **keywords)
        for t, segment in enumerate(chosen):
            if segment is not None:
                expected = segment.high - 1e-3 * (segment.high - segment.low)
                assert abs(solution.lam[t].item() - expected) <= near * segment.high
                assert torch.equal(solution.dense()[t].nonzero()[:, 0], segment.support)
                assert torch.equal(solution.dense()[t, segment.support].sign().double(), segment.signs)
                compared += 1
    assert compared >= 9


def certify_found(cov: Covariance, solution, tol: float, found: Tensor, **keywords) -> None:
    """`certify` for the targets whose k was found."""
    rows = found.nonzero()[:, 0]
    certify(cov, Subset(solution, rows), tol, **rows_only(keywords, rows))


class Subset:
    """Some rows of a solution, with the attributes that `certify` reads."""

    def __init__(self, solution: nk.CovLassoSolution, rows: Tensor):
        self.targets, self.lam, self.lambda_max = solution.targets[rows], solution.lam[rows], solution.lambda_max[rows]
        for name in FIELDS:
            setattr(self, name, getattr(solution, name)[rows])
        self._theta = solution.dense()[rows]

    def dense(self) -> Tensor:
        return self._theta


@pytest.mark.parametrize("k", [1, 4, 9])
def test_top_k_no_larger_lambda_has_k(k):
    """A fine grid between the segment and lambda_max, solved one by one: k nonzeros nowhere."""
    S = make.clustered(40, 60, seed=120)
    solution = nk.covlasso_top_k(S, k, tol=1e-12)
    high = reference.top_k(S, everyone(S), k).high
    assert (solution.n_nonzero == k).all()
    grid = torch.linspace(1e-6, 1, 80, dtype=F64)
    lams = (high[:, None] * (1.2 * solution.lambda_max / high)[:, None] ** grid).flip(1)
    above = nk.covlasso_path(S, lams=lams, tol=1e-12)
    assert (above.n_nonzero != k).all()
    below = nk.covlasso(S, high * (1 - 1e-7), tol=1e-13)
    assert (below.n_nonzero == k).double().mean() > 0.9  # segments shorter than 1e-7 of lam are rare


def test_top_k_where_the_count_is_not_monotone():
    """3 comes first, then 1 and 2, 3 leaves and is back: 1, 2, 3, 2, 3 nonzeros. The first two are meant."""
    S = make.stand_in()
    segments = reference.homotopy(S, 0)
    assert [segment.support.tolist() for segment in segments] == [[3], [1, 3], [1, 2, 3], [1, 2], [1, 2, 3]]
    for position in (0.001, 0.5, 0.999):
        two = nk.covlasso_top_k(S, 2, targets=[0], position=position, tol=1e-12)
        assert two.dense()[0].nonzero()[:, 0].tolist() == [1, 3]
        high, low = segments[1].high, segments[1].low
        assert two.lam.item() == pytest.approx(high - position * (high - low), rel=1e-9)
        three = nk.covlasso_top_k(S, 3, targets=[0], position=position, tol=1e-12)
        assert three.dense()[0].nonzero()[:, 0].tolist() == [1, 2, 3]
    middle = (segments[3].high + segments[3].low) / 2
    assert nk.covlasso(S, middle, targets=[0], tol=1e-12).dense()[0].nonzero()[:, 0].tolist() == [1, 2]


def test_top_k_position():
    """From just below the kink, where the k-th coefficient is nearly zero, to the best fit with these k."""
    S = make.mixed(20, seed=121)
    before = None
    for position in (0.001, 0.25, 0.75, 0.999):
        solution = nk.covlasso_top_k(S, 4, position=position, tol=1e-12)
        certify(S, solution, 1e-12)
        expected = reference.top_k(S, everyone(S), 4, position=position)
        torch.testing.assert_close(solution.lam, expected.lam, rtol=1e-9, atol=0)
        assert (solution.n_nonzero == 4).all()
        if before is not None:
            assert (solution.lam < before.lam).all()
            assert (solution.err2 < before.err2).all()
        before = solution
    default = nk.covlasso_top_k(S, 4, tol=1e-12)
    assert torch.equal(default.dense(), nk.covlasso_top_k(S, 4, position=1e-3, tol=1e-12).dense())
    smallest = default.dense().abs().masked_fill(default.dense() == 0, torch.inf).amin(1)
    assert (smallest < 0.05 * default.dense().abs().amax(1)).all()


@pytest.mark.parametrize("n", [2, 3, 17])
def test_top_k_from_one_to_all(n):
    S = make.mixed(n, seed=122) + 2 * torch.eye(n, dtype=F64)
    for k in range(1, n):
        solution = nk.covlasso_top_k(S, k, tol=1e-12)
        expected = reference.top_k(S, everyone(S), k)
        assert torch.equal(solution.status == 0, expected.found)
        assert (solution.n_nonzero[expected.found] == k).all()
        assert expected.found.double().mean() > 0.6
    assert expected.found.all()  # all n - 1 predictors are used in the end
    first = nk.covlasso_top_k(S, 1, tol=1e-12)
    assert torch.equal(first.dense().abs().argmax(1), S.clone().fill_diagonal_(0).abs().argmax(1))
    torch.testing.assert_close(first.lam, first.lambda_max, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_top_k_rank_limited(dtype):
    """Rank 5 to the bit (small integers): 8 nonzeros never come; the end of the path does, finite and exact."""
    x = torch.randint(-3, 4, (5, 30), generator=torch.Generator().manual_seed(123)).to(dtype)
    S = x.T @ x
    solution = nk.covlasso_top_k(S, 8)
    assert solution.status_names == ["too_few"] * 30
    assert solution.dense().isfinite().all()
    assert (solution.n_nonzero < 8).all()
    assert (solution.lam <= 1e-3 * solution.lambda_max).all()
    assert (solution.relative_error < 1e-4).all()
    found = reference.top_k(S, everyone(S), 3).found  # not with the one target where four enter at once
    assert found.sum() == 29
    assert torch.equal(nk.covlasso_top_k(S, 3).status == 0, found)


def test_top_k_of_targets_with_too_few_among_others():
    """Uncorrelated targets have no first nonzero; the others are not disturbed."""
    S = torch.block_diag(torch.eye(2, dtype=F64), make.mixed(9, seed=124), torch.zeros(1, 1, dtype=F64))
    solution = nk.covlasso_top_k(S, 3, tol=1e-12)
    assert [name == "too_few" for name in solution.status_names] == [t in (0, 1, 11) for t in range(12)]
    assert solution.n_nonzero.tolist() == [0, 0, *[3] * 9, 0]
    assert torch.equal(solution.err2[[0, 1, 11]], S.diagonal()[[0, 1, 11]])
    alone = nk.covlasso_top_k(S, 3, tol=1e-12, targets=range(2, 11))
    assert torch.equal(alone.dense(), solution.dense()[2:11])


def test_top_k_of_duplicates():
    """Of two equal predictors one is enough; k of them come, certified."""
    S = make.repeated(make.mixed(20, seed=125), 20)
    solution = nk.covlasso_top_k(S, 1, tol=1e-12)
    assert solution.n_nonzero.tolist() == [1] * 40  # its own copy, which explains it wholly
    targets = range(20)
    candidates = torch.ones(20, 40, dtype=torch.bool)
    candidates[range(20), range(20, 40)] = False  # not its own copy
    for k in (2, 5):
        solution = nk.covlasso_top_k(S, k, targets=targets, candidates=candidates, tol=1e-12)
        assert (solution.n_nonzero == k).all()
        certify(S, solution, 1e-12, candidates=candidates)


def test_top_k_gradient():
    """That of `covlasso` at the lam found, which counts as a constant; the values are those without a gradient."""
    S = make.mixed(15, seed=127)
    plain = nk.covlasso_top_k(S, 4, position=0.5, tol=1e-12)
    weight, grads = make.normal(15, 15, seed=128), []
    for solve in (lambda S: nk.covlasso_top_k(S, 4, position=0.5, tol=1e-12), lambda S: nk.covlasso(S, plain.lam)):
        leaf = S.clone().requires_grad_()
        solution = solve(leaf)
        ((solution.dense() * weight).sum() + solution.err2.sum()).backward()
        grads.append(leaf.grad)
        assert torch.equal(solution.lam, plain.lam)
        assert torch.equal(solution.status, plain.status)
        assert torch.equal(solution.n_nonzero, plain.n_nonzero)
        torch.testing.assert_close(solution.dense().detach(), plain.dense(), rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-8)
    capped = nk.covlasso_top_k(S.clone().requires_grad_(), 10, max_pivots=3)
    assert capped.status_names == ["capped"] * 15
    rank = make.low_rank(15, 4, seed=129)
    assert nk.covlasso_top_k(rank.requires_grad_(), 9).status_names == ["too_few"] * 15


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_top_k_of_ties(ridge):
    """Equal correlations: all predictors enter at one lam, so that one to n - 2 nonzeros never occur, n - 1 do."""
    S = make.equicorrelated(7, 0.5)
    for k in (1, 3, 5):
        assert nk.covlasso_top_k(S, k, ridge=ridge).status_names == ["too_few"] * 7
    solution = nk.covlasso_top_k(S, 6, ridge=ridge, tol=1e-12)
    assert solution.status_names == ["converged"] * 7
    certify(S, solution, 1e-12, ridge=ridge)
    torch.testing.assert_close(solution.lam, 0.999 * solution.lambda_max, rtol=1e-9, atol=0)


def test_top_k_max_pivots_caps():
    S = make.clustered(60, 80, seed=126)
    capped = nk.covlasso_top_k(S, 10, max_pivots=3)
    assert capped.status_names == ["capped"] * 60
    assert capped.dense().isfinite().all()


# ---------------------------------------------------------------------------------------------------------- warm starts


@pytest.mark.parametrize("dtype", [F32, F64])
def test_warm_start_is_certified_and_saves_pivots(feature, dtype):
    cov, keywords = feature
    cov, tol = cast(cov, dtype), TOLERANCE[dtype]
    previous = nk.covlasso(cov, lam_ratio=0.12, tol=tol, **keywords)
    cold = nk.covlasso(cov, lam_ratio=0.1, tol=tol, **keywords)
    warm = nk.covlasso(cov, lam_ratio=0.1, tol=tol, warm_start=previous, **keywords)
    certify(cov, warm, tol, **keywords)
    difference = (objective(cov, warm, **keywords) - objective(cov, cold, **keywords)).abs()
    assert difference.le((1e-5 if dtype == F32 else 1e-11) * problem(cov, warm.targets, **keywords).variance).all()
    assert warm.n_pivots.sum() < 0.7 * cold.n_pivots.sum()


def test_warm_start_from_the_solution_itself():
    S = make.clustered(60, 80, seed=130)
    cold = nk.covlasso(S, lam_ratio=0.05, tol=1e-12)
    warm = nk.covlasso(S, lam_ratio=0.05, tol=1e-12, warm_start=cold)
    torch.testing.assert_close(warm.dense(), cold.dense(), rtol=0, atol=1e-10)
    assert warm.n_pivots.max() <= 1
    assert warm.status.tolist() == [0] * 60


@pytest.mark.parametrize("dtype", [F32, F64])
def test_warm_start_from_wrong_solutions(dtype):
    """Flipped signs, another covariance, another target's rows, everything at once: never a different optimum."""
    S, tol = make.clustered(50, 70, seed=131).to(dtype), TOLERANCE[dtype]
    cold = nk.covlasso(S, lam_ratio=0.05, tol=tol)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    other = make.mixed(50, seed=132).to(dtype)
    starts = {
        "flipped": nk.covlasso(-S + 2 * torch.diag(S.diagonal()), lam_ratio=0.5, tol=0.9),
        "another covariance": nk.covlasso(other, lam_ratio=1e-3),
        "rows of other targets": nk.covlasso(S[order][:, order], lam_ratio=0.05),
        "empty": nk.covlasso(S, lam_ratio=2.0),
        "capped": nk.covlasso(S, lam_ratio=1e-3, max_pivots=5),
    }
    for name, start in starts.items():
        warm = nk.covlasso(S, lam_ratio=0.05, tol=tol, warm_start=start)
        certify(S, warm, tol)
        difference = (objective(S, warm) - objective(S, cold)).abs()
        assert difference.le((1e-5 if dtype == F32 else 1e-11) * S.double().diagonal()).all(), name


def test_warm_start_with_excluded_indices():
    """Coefficients that are no longer candidates, or of the wrong sign, are passed over."""
    S = make.mixed(30, seed=133)
    start = nk.covlasso(S, lam_ratio=0.02, tol=1e-12)
    candidates = torch.rand(30, 30, generator=torch.Generator().manual_seed(2)) < 0.5
    for keywords in (
        {"candidates": candidates},
        {"nonnegative": True},
        {"candidates": candidates, "nonnegative": True},
    ):
        warm = nk.covlasso(S, lam_ratio=0.05, tol=1e-12, warm_start=start, **keywords)
        certify(S, warm, 1e-12, **keywords)
        cold = nk.covlasso(S, lam_ratio=0.05, tol=1e-12, **keywords)
        torch.testing.assert_close(warm.dense(), cold.dense(), rtol=0, atol=1e-9)


def test_warm_start_whose_support_is_dependent():
    """A start on more predictors than the rank: its factorisation cannot exist, the answer must."""
    full = make.mixed(40, seed=134)
    start = nk.covlasso(full, lam_ratio=1e-6, tol=1e-12)
    assert start.n_nonzero.min() > 35
    S = make.low_rank(40, 6, seed=135)
    certify(S, nk.covlasso(S, lam_ratio=0.05, tol=1e-12, warm_start=start), 1e-12)
    S = make.repeated(make.mixed(20, seed=136), 20)
    certify(S, nk.covlasso(S, lam_ratio=0.05, tol=1e-12, warm_start=start), 1e-12)


def test_warm_start_of_a_path():
    S = make.clustered(40, 60, seed=137)
    start = nk.covlasso(S, lam_ratio=0.5, tol=1e-12)
    cold = nk.covlasso_path(S, n_lambdas=5, tol=1e-12)
    warm = nk.covlasso_path(S, n_lambdas=5, tol=1e-12, warm_start=start)
    certify(S, warm, 1e-12)
    torch.testing.assert_close(warm.dense(), cold.dense(), rtol=0, atol=1e-9)
    resumed = nk.covlasso_path(S, lams=cold.lams[:, 3:], tol=1e-12, warm_start=cold[2])
    torch.testing.assert_close(resumed.dense(), cold.dense()[:, 3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_operator_skips_bad_entries_of_a_start(dtype):
    """Out of range, repeated, the target itself, excluded, count beyond the width: all passed over, never read."""
    S = make.mixed(12, seed=138).to(dtype)
    targets, tol = torch.arange(3), TOLERANCE[dtype]
    lam = 0.1 * reference.lambda_max(S, targets)
    penalty = torch.ones(12, dtype=dtype)
    penalty[7] = torch.inf
    index = torch.tensor([[5, 5, 99, -1, 7], [1, 11, 2, 2, 2], [7, 7, 7, 3, 2**30]], dtype=torch.int32)
    value = torch.tensor([[1, -1, 1, 1, 1], [1, 0, math.nan, 1, -1], [1, 1, 1, math.inf, 1]], dtype=dtype)
    arguments = (S, targets, lam, penalty, tol, 1000, 11)
    cold = torch.ops.neuraldeps.covlasso(*arguments)
    for count in (torch.tensor([5, 5, 5]), torch.tensor([0, 3, 1]), torch.tensor([-3, 5, 5])):
        start = {"start_value": value, "start_index": index, "start_count": count.int()}
        warm = torch.ops.neuraldeps.covlasso(*arguments, **start)
        assert (warm[3][:, 4] == 0).all()
        assert torch.equal(warm[2], cold[2])
        torch.testing.assert_close(warm[0], cold[0], rtol=0, atol=1e-4 if dtype == F32 else 1e-10)


# ------------------------------------------------------------------------------------------ determinism and environment


def tensors(solution) -> list[Tensor]:
    lam = solution.lams if isinstance(solution, nk.CovLassoPath) else solution.lam
    return [solution.dense(), lam, solution.lambda_max, solution.n_pivots, *(getattr(solution, f) for f in FIELDS)]


def all_features(cov: Covariance, **keywords) -> list:
    """A path, an exact sparsity and a warm start."""
    path = nk.covlasso_path(cov, n_lambdas=6, **keywords)
    start = path[2]
    warm = nk.covlasso(cov, 0.5 * path.lams[:, 2], warm_start=start, **keywords)
    return [path, nk.covlasso_top_k(cov, 4, **keywords), warm]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_T11_batch_independence(feature, dtype):
    """A row is the same to the last bit whatever is solved beside it, in whatever order."""
    cov, keywords = feature
    cov = cast(cov, dtype)
    every = all_features(cov, **keywords)
    n = len(every[0].targets)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    for targets in (order, order[:5], order[:1]):
        narrowed = rows_only(keywords, targets)
        for some, whole in zip(all_features(cov, targets=targets, **narrowed), every, strict=True):
            for got, expected in zip(tensors(some), tensors(whole), strict=True):
                assert torch.equal(got, expected[targets])


def test_T11_threads_and_repeats(feature):
    cov, keywords = feature
    cov = cast(cov, F32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append([x for solution in all_features(cov, **keywords) for x in tensors(solution)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_T11_chunks_and_overflow(feature, dtype, monkeypatch):
    """Targets solved a few at a time, in rows that at first are too short for their supports: to the bit the same."""
    cov, keywords = feature
    cov = cast(cov, dtype)
    expected = all_features(cov, **keywords)
    monkeypatch.setattr(ops, "_CHUNK", 200)
    monkeypatch.setattr(ops, "_FULL_SUPPORT", 1)
    monkeypatch.setattr(ops, "_FIRST_SUPPORT", 2)
    for got, whole in zip(all_features(cov, **keywords), expected, strict=True):
        for x, y in zip(tensors(got), tensors(whole), strict=True):
            assert torch.equal(x, y)


LEVEL_SCRIPT = """
import sys, torch
import neuraldeps_kernels as nk
problems, out = torch.load(sys.argv[1], weights_only=True), []
for fields, keywords in problems:
    cov = fields[0] if len(fields) == 1 else nk.CrossCovariance(*fields)
    tol = 1e-6 if fields[0].dtype == torch.float32 else 1e-12
    path = nk.covlasso_path(cov, n_lambdas=8, tol=tol, **keywords)
    top = nk.covlasso_top_k(cov, 4, tol=tol, **keywords)
    out.append((path.dense(), path.lams, path.status, top.dense(), top.lam, top.status))
torch.save(out, sys.argv[2])
print(torch.ops.neuraldeps.cpu_levels()[2])
"""


def test_T11_every_cpu_level(cpu_levels, run_python, tmp_path):
    """Each instruction-set level this processor runs, in its own process, certified in float64."""
    cross = across(make.joint(21, 10, seed=140), 21)
    fields = (cross.cov, cross.cross, cross.variance, cross.predictor_mean, cross.target_mean)
    cases = [
        ((make.clustered(45, 20, seed=141),), {}),
        ((make.mixed(33, seed=142),), {"nonnegative": True}),
        ((make.mixed(33, seed=143),), {"ridge": 1.0}),
        (fields, {"nonnegative": True, "ridge": 0.1}),
    ]
    problems = [(tuple(x.to(dtype) for x in case), keywords) for case, keywords in cases for dtype in (F32, F64)]
    torch.save(problems, tmp_path / "problems.pt")
    assert cpu_levels
    for level in cpu_levels:
        files = str(tmp_path / "problems.pt"), str(tmp_path / "out.pt")
        done = run_python(LEVEL_SCRIPT, *files, NEURALDEPS_CPU_LEVEL=level)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [level]
        for (case, keywords), result in zip(problems, torch.load(files[1], weights_only=True), strict=True):
            path, lams, status, top, top_lam, top_status = result
            p = problem(case[0] if len(case) == 1 else nk.CrossCovariance(*case), torch.arange(len(path)), **keywords)
            row = torch.arange(len(path)).repeat_interleave(8)
            tol = TOLERANCE[path.dtype]
            assert (status == 0).all(), level
            violation = reference.kkt_violation(
                p.S, path.flatten(0, 1), row, lams.flatten(), p.penalty[row], **p.keywords
            )
            assert violation.max() <= tol, level
            good = top_status == 0
            assert good.sum() >= 8, level
            assert ((top != 0).sum(1)[good] == 4).all(), level
            violation = reference.kkt_violation(p.S, top, torch.arange(len(top)), top_lam, p.penalty, **p.keywords)
            assert violation[good].max() <= tol, level


def test_layouts():
    """Transposed, strided and expanded arguments are the matrices they show."""
    cov = across(make.joint(15, 8, seed=144), 15)
    expected = nk.covlasso_path(cov, n_lambdas=4)
    wide = torch.zeros(16, 45, dtype=F64)
    wide[::2, ::3] = cov.cross
    zeros = cov.predictor_mean, cov.target_mean
    doubled = torch.stack([cov.variance, cov.variance], 1)
    for S, cross, variance in (
        (cov.cov.T, cov.cross.T.contiguous().T, cov.variance),
        (cov.cov, wide[::2, ::3], doubled[:, 0]),
    ):
        strided = nk.CrossCovariance(S, cross, variance, *zeros)
        assert torch.equal(nk.covlasso_path(strided, n_lambdas=4).dense(), expected.dense())
        lams = expected.lams.T.contiguous().T
        assert torch.equal(nk.covlasso_path(strided, lams=lams).dense(), expected.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    S = make.mixed(20, seed=145).to(dtype)
    half, single = nk.covlasso_path(S, n_lambdas=4), nk.covlasso_path(S.float(), n_lambdas=4)
    assert half.dense().dtype == F32
    assert torch.equal(half.dense(), single.dense())
    assert torch.equal(nk.covlasso_top_k(S, 3).dense(), nk.covlasso_top_k(S.float(), 3).dense())


def test_arguments_are_left_alone():
    cov = across(make.joint(15, 8, seed=146), 15)
    start = nk.covlasso(cov, lam_ratio=0.2)
    candidates, factors = make.normal(8, 15, seed=147) > -1, make.normal(15, seed=148).exp()
    lams = start.lambda_max[:, None] * torch.tensor([0.5, 0.1], dtype=F64)
    given = (cov.cov, cov.cross, cov.variance, candidates, factors, lams, start.coefficients.values())
    copies = [x.clone() for x in given]
    keywords = {"candidates": candidates, "penalty_factors": factors, "nonnegative": True, "ridge": 0.1}
    nk.covlasso_path(cov, lams=lams, warm_start=start, **keywords)
    nk.covlasso_top_k(cov, 2, **keywords)
    for now, then in zip(given, copies, strict=True):
        assert torch.equal(now, then)


# ------------------------------------------------------------------------------------ derivatives and torch's machinery


def operator_theta(S: Tensor, lam: Tensor, targets: Tensor, penalty: Tensor | None = None, **keywords) -> Tensor:
    """theta [T, m] or [T, L, m] from torch.ops.neuraldeps.covlasso, with only differentiable operations around it."""
    m = S.shape[-1]
    value, index, _, _ = torch.ops.neuraldeps.covlasso(S, targets, lam, penalty, 1e-13, 100_000, m, **keywords)
    zeros = torch.zeros(*lam.shape, m, dtype=value.dtype)
    return zeros.scatter_add(-1, index.long(), value)


def away_from_kinks(p: Problem, targets: Tensor, lams: Tensor) -> bool:
    """Whether every coefficient and slack is so large that a small change of the problem keeps all signs."""
    for lam in lams.unbind(1):
        theta = reference.covlasso(p.S, targets, lam, p.penalty, **p.keywords)
        rho = reference.residual_covariance(p.S, theta, targets, **p.keywords)
        size = rho if p.keywords["nonnegative"] else rho.abs()
        slack = (1 - size / (lam[:, None] / 2 * p.penalty))[(theta == 0) & p.penalty.isfinite()]
        if theta[theta != 0].abs().min() < 1e-3 or (len(slack) and slack.min() < 1e-3):
            return False
    return True


GRADIENTS = {
    "path": {},
    "ridge": {"ridge": 0.5},
    "nonnegative": {"nonnegative": True},
    "nonnegative, ridge": {"nonnegative": True, "ridge": 0.5},
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("two", [False, True], ids=["within", "across"])
def test_T12_gradcheck_of_the_operator(name, two):
    """In cov, lam [T, L] and cross."""
    targets, ratios = torch.tensor([0, 3, 2]), torch.tensor([0.6, 0.25, 0.1], dtype=F64)
    for seed in range(150, 250):
        cov = across(make.joint(6, 4, seed=seed), 6) if two else make.mixed(6, seed=seed)
        p = problem(cov, targets, **GRADIENTS[name])
        lams = reference.lambda_max(p.S, targets, p.penalty, **p.keywords)[:, None] * ratios
        if away_from_kinks(p, targets, lams):
            break
    else:
        raise AssertionError("no covariance away from kinks")
    arguments = [p.S.clone().requires_grad_(), lams.requires_grad_()]
    if two:
        arguments.append(cov.cross.clone().requires_grad_())

    def theta_of(S: Tensor, lams: Tensor, cross: Tensor | None = None) -> Tensor:
        given = {} if cross is None else {"cross": cross, "variance": cov.variance}
        return operator_theta((S + S.T) / 2, lams, targets, **given, **GRADIENTS[name])

    assert torch.autograd.gradcheck(theta_of, arguments, eps=1e-6, atol=1e-6)


def test_T12_gradients_against_the_formula(feature):
    """Operator against `reference.gradients`, summed over the path; candidates and penalties included."""
    cov, keywords = feature
    targets = torch.arange(7)
    narrowed = rows_only(keywords, targets)
    p = problem(cov, targets, **narrowed)
    top = reference.lambda_max(p.S, targets, p.penalty, **p.keywords)
    lams = (top[:, None] * torch.tensor([0.5, 0.2, 0.08], dtype=F64)).requires_grad_()
    S = p.S.clone().requires_grad_()
    given = dict(p.keywords)
    if given["cross"] is not None:
        given["cross"] = cov.cross.clone().requires_grad_()
    theta = operator_theta(S, lams, targets, p.penalty, **given)
    weight = make.normal(*theta.shape, seed=160)
    (theta * weight).sum().backward()
    parts = [
        reference.gradients(p.S, theta[:, l].detach(), targets, weight[:, l], p.penalty, **p.keywords) for l in range(3)
    ]
    near = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close((S.grad + S.grad.T) / 2, sum(part[0] for part in parts), **near)
    torch.testing.assert_close(lams.grad, torch.stack([part[1] for part in parts], 1), **near)
    if given["cross"] is not None:
        torch.testing.assert_close(given["cross"].grad, sum(part[2] for part in parts), **near)


@pytest.mark.parametrize("two", [False, True], ids=["within", "across"])
def test_T12_gradient_through_the_path_object(two):
    """`covlasso_path(...).dense()`, `.err2` and `path[l]` carry the gradient, and so does a grid from lambda_max."""
    targets = torch.tensor([0, 3])
    for seed in range(170, 270):
        cov = across(make.joint(6, 4, seed=seed), 6) if two else make.mixed(6, seed=seed)
        p = problem(cov, targets, ridge=0.2)
        lams = reference.lambda_max(p.S, targets, p.penalty)[:, None] * torch.tensor([0.3, 0.09], dtype=F64)
        if away_from_kinks(p, targets, lams):
            break
    ratios = torch.tensor([0.3, 0.09], dtype=F64)
    parts = [p.S.clone().requires_grad_()]
    if two:
        parts += [cov.cross.clone().requires_grad_(), cov.variance.clone().requires_grad_()]

    def outputs(S: Tensor, cross: Tensor | None = None, variance: Tensor | None = None) -> tuple[Tensor, ...]:
        given = (S + S.T) / 2
        if cross is not None:
            given = nk.CrossCovariance(given, cross, variance, cov.predictor_mean, cov.target_mean)
        lams = nk.lambda_max(given, targets)[:, None] * ratios
        path = nk.covlasso_path(given, lams=lams, targets=targets, ridge=0.2, tol=1e-13)
        return path.dense(), path.err2, path[1].dense(), path[0].err2

    assert torch.autograd.gradcheck(outputs, parts, eps=1e-6, atol=1e-6)


def overloads(dtype: torch.dtype, grad: bool) -> dict[str, tuple[object, tuple, dict[str, object]]]:
    """(operator, arguments, keywords) of every new form."""
    cov = cast(across(make.joint(9, 5, seed=180), 9), dtype)
    S, targets = cov.cov.clone().requires_grad_(grad), torch.tensor([0, 4, 2])
    lam = 0.2 * reference.lambda_max(cov.cov, targets, cross=cov.cross, variance=cov.variance)
    lams = lam[:, None] * torch.tensor([2.0, 1.0], dtype=F64)
    lam, lams = lam.requires_grad_(grad), lams.requires_grad_(grad)
    two = {"cross": cov.cross.clone().requires_grad_(grad), "variance": cov.variance.double()}
    rest = (None, 1e-6 if dtype == F32 else 1e-12, 1000, 9)
    start = {
        "start_value": torch.ones(3, 2, dtype=dtype),
        "start_index": torch.tensor([[1, 2]] * 3, dtype=torch.int32),
        "start_count": torch.tensor([2, 1, 0], dtype=torch.int32),
    }
    top = (cov.cov, targets, 3, None, rest[1], 1000, 0.5)
    everything = {"nonnegative": True, "ridge": 0.1}
    stack = torch.stack([cov.cov * s for s in (1.0, 2.0, 3.0)]).requires_grad_(grad)
    solve, top_k = torch.ops.neuraldeps.covlasso.default, torch.ops.neuraldeps.covlasso_top_k.default
    none = {"cross": None, "variance": None, "nonnegative": False, "ridge": 0.0}
    return {
        "path": (solve, (S, targets, lams, *rest), {}),
        "cross": (solve, (S, targets, lam, *rest), two),
        "path, cross, all": (solve, (S, targets, lams, *rest), {**two, **everything}),
        "start": (solve, (S, targets, lam, *rest), {**everything, **start}),
        "a matrix each": (solve, (stack, targets, lams, *rest), two),
        "top k": (top_k, top, none),
        "top k, cross": (top_k, top, {**everything, "cross": cov.cross, "variance": cov.variance.double()}),
    }


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "name", ["path", "cross", "path, cross, all", "start", "a matrix each", "top k", "top k, cross"]
)
def test_opcheck(dtype, name):
    if dtype == F32 and "top k" in name:  # the path is followed in float64 alone
        op, arguments, keywords = overloads(F32, False)[name]
        with pytest.raises(ValueError, match="float64"):
            op(*arguments, **keywords)
        return
    for grad in (False, True):
        op, arguments, keywords = overloads(dtype, grad)[name]
        torch.library.opcheck(op, arguments, keywords)


def test_operator_with_a_matrix_each_equals_single_calls():
    _, (stack, targets, lams, *rest), two = overloads(F64, False)["a matrix each"]
    together = torch.ops.neuraldeps.covlasso(stack, targets, lams, *rest, **two)
    for t in range(3):
        alone = torch.ops.neuraldeps.covlasso(stack[t], targets[t : t + 1], lams[t : t + 1], *rest, **two)
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got[t : t + 1], expected)


def test_operator_with_a_matrix_each_against_the_reference():
    """Solutions and all three gradients, with every option."""
    _, (stack, targets, lams, *_), two = overloads(F64, True)["a matrix each"]
    keywords = {**two, "nonnegative": True, "ridge": 0.1}
    theta = operator_theta(stack, lams, targets, **keywords)
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in keywords.items()}
    expected = reference.path(stack, targets, lams.detach(), **plain)
    torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-9)
    violation = [reference.kkt_violation(stack, theta[:, l], targets, lams[:, l], **plain) for l in range(2)]
    assert torch.stack(violation).max() <= 1e-12
    weight = make.normal(*theta.shape, seed=183)
    grads = torch.autograd.grad((theta * weight).sum(), (stack, lams, two["cross"]))
    parts = [reference.gradients(stack, theta[:, l].detach(), targets, weight[:, l], **plain) for l in range(2)]
    torch.testing.assert_close((grads[0] + grads[0].mT) / 2, parts[0][0] + parts[1][0])
    torch.testing.assert_close(grads[1], torch.stack([part[1] for part in parts], 1))
    torch.testing.assert_close(grads[2], parts[0][2] + parts[1][2])


def test_operator_output_layout_of_a_path():
    """[T, L, capacity] rows are zero beyond their count; a support that does not fit is cut and called capped."""
    S = make.mixed(13, seed=181).float()
    lams = reference.lambda_max(S, everyone(S))[:, None] * torch.tensor([1.5, 0.3, 0.02], dtype=F64)
    value, index, count, info = torch.ops.neuraldeps.covlasso(S, everyone(S), lams, None, 1e-6, 1000, 12)
    assert (value.shape, index.shape, count.shape, info.shape) == ((13, 3, 12), (13, 3, 12), (13, 3), (13, 3, 6))
    assert (value.dtype, index.dtype, count.dtype, info.dtype) == (F32, torch.int32, torch.int32, F64)
    beyond = torch.arange(12) >= count[..., None]
    assert (value[beyond] == 0).all()
    assert (index[beyond] == 0).all()
    assert (value[~beyond] != 0).all()
    assert (count[:, 0] == 0).all()
    cut = torch.ops.neuraldeps.covlasso(S, everyone(S), lams, None, 1e-6, 1000, 3)
    assert (cut[2] <= 3).all()
    assert torch.equal(cut[3][..., 4] == 1, count > 3)
    fits = count <= 3
    assert torch.equal(cut[0][fits], value[fits][:, :3])


@pytest.mark.parametrize("two", [False, True], ids=["within", "across"])
def test_compile_is_one_graph(two):
    cov = across(make.joint(9, 5, seed=182), 9)
    targets = torch.tensor([0, 4, 2])
    keywords = {"nonnegative": True, "ridge": 0.1}
    given = {"cross": cov.cross, "variance": cov.variance} if two else {}
    top = reference.lambda_max(cov.cov, targets, nonnegative=True, **given)
    lams = top[:, None] * torch.tensor([0.5, 0.1], dtype=F64)

    def loss(S: Tensor, lams: Tensor, cross: Tensor) -> Tensor:
        extra = {"cross": cross, "variance": cov.variance} if two else {}
        return operator_theta((S + S.T) / 2, lams, targets, **extra, **keywords).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [[x.clone().requires_grad_() for x in (cov.cov, lams, cov.cross)] for _ in range(2)]
    values = loss(*leaves[0]), compiled(*leaves[1])
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0])
    for plain, other in zip(*leaves, strict=True):
        torch.testing.assert_close(other.grad, plain.grad)


def test_vmap_equals_a_loop():
    """Over covariances, paths and cross covariances at once, and over the starts."""
    _, (S, targets, lams, *rest), two = overloads(F64, False)["path, cross, all"]
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    keywords = {"variance": two["variance"], "nonnegative": True, "ridge": 0.1}

    def call(S: Tensor, lams: Tensor, cross: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.covlasso(S, targets, lams, *rest, cross=cross, **keywords)

    stacked = [scale.view(-1, 1, 1) * x for x in (S, lams, two["cross"])]
    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        arguments = [x if dim == 0 else x[0] for x, dim in zip(stacked, dims, strict=True)]
        mapped = torch.vmap(call, in_dims=dims)(*arguments)
        for b in range(3):
            single = call(*(x[b] if dim == 0 else x for x, dim in zip(arguments, dims, strict=True)))
            for got, expected in zip(mapped, single, strict=True):
                assert torch.equal(got[b], expected)


# ----------------------------------------------------------------------------------------------------------- properties

PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw) -> tuple[Covariance, dict[str, object]]:
    """Any covariance of up to 20 predictors with any combination of the options."""
    m, seed = draw(st.integers(2, 20)), draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["mixed", "low rank", "noisy", "duplicates", "few", "joint"]))
    cov: Covariance
    if kind == "joint":
        cov = across(make.joint(m + 2, draw(st.integers(1, 6)), seed, samples=100), m + 2)
        shape = cov.cross.shape
    else:
        cov = {
            "mixed": lambda: make.mixed(m, seed, samples=200),
            "low rank": lambda: make.low_rank(m, draw(st.integers(1, m)), seed, samples=100),
            "noisy": lambda: make.low_rank(m, draw(st.integers(1, m)), seed, noise=0.1, samples=100),
            "duplicates": lambda: make.repeated(make.mixed(m, seed, samples=200), draw(st.integers(1, m))),
            "few": lambda: make.mixed(m, seed, samples=max(2, m // 2)),
        }[kind]()
        shape = cov.shape
    keywords: dict[str, object] = {}
    if draw(st.booleans()):
        keywords["nonnegative"] = True
    if draw(st.booleans()):
        keywords["ridge"] = draw(st.floats(1e-3, 1.0))
    if draw(st.booleans()):
        keywords["penalty_factors"] = (0.7 * make.normal(shape[1], seed=seed + 7)).exp()
    if draw(st.booleans()):
        keywords["candidates"] = make.normal(*shape, seed=seed + 8) > draw(st.floats(-1.0, 1.0))
    return cov, keywords


@PROPERTY
@given(drawn=problems(), ratio=st.floats(1e-3, 0.5), length=st.integers(1, 9), dtype=st.sampled_from([F32, F64]))
def test_property_path_is_optimal(drawn, ratio, length, dtype):
    cov, keywords = drawn
    cov, tol = cast(cov, dtype), TOLERANCE[dtype]
    keywords = {name: x.to(dtype) if name == "penalty_factors" else x for name, x in keywords.items()}
    path = nk.covlasso_path(cov, n_lambdas=length, lam_min_ratio=ratio, tol=tol, **keywords)
    certify(cov, path, tol, **keywords)
    total = objective(cov, path, **keywords).view(path.lams.shape)
    if (path.lambda_max > 0).all():
        cold = nk.covlasso(cov, path.lams[:, -1], tol=tol, **keywords)
        variance = problem(cov, path.targets, **keywords).variance
        difference = (total[:, -1] - objective(cov, cold, **keywords)).abs()
        assert difference.le((2e-5 if dtype == F32 else 1e-10) * variance).all()


@PROPERTY
@given(drawn=problems(), k=st.integers(1, 8), position=st.floats(0.001, 0.999))
def test_property_top_k(drawn, k, position):
    """k nonzeros and a certificate or an honest too_few, never anything else; in general position the oracle's lam."""
    cov, keywords = drawn
    p = problem(cov, torch.arange(cov.shape[0] if isinstance(cov, Tensor) else cov.cross.shape[0]), **keywords)
    assume(p.penalty.isfinite().sum(1).min() >= k)
    solution = nk.covlasso_top_k(cov, k, position=position, tol=1e-10, **keywords)
    assert set(solution.status.tolist()) <= {0, 4}
    found = solution.status == 0
    assert (solution.n_nonzero[found] == k).all()
    if found.any():
        certify_found(cov, solution, 1e-10, found, **keywords)
    expected = reference.top_k(p.S, solution.targets, k, p.penalty, position=position, **p.keywords)
    clear = (expected.high - expected.low) > 1e-6 * solution.lambda_max
    assert (found | ~(expected.found & clear)).all()
    both = found & expected.found & clear
    assert (solution.lam - expected.lam)[both].abs().le(1e-6 * expected.high[both]).all()


@PROPERTY
@given(drawn=problems(), other=problems(), ratio=st.floats(1e-3, 1.0), dtype=st.sampled_from([F32, F64]))
def test_property_any_warm_start_is_harmless(drawn, other, ratio, dtype):
    """Whatever the start (here: of random signs on a random support of the same shape), the result is certified."""
    cov, keywords = drawn
    cov, tol = cast(cov, dtype), TOLERANCE[dtype]
    keywords = {name: x.to(dtype) if name == "penalty_factors" else x for name, x in keywords.items()}
    solution = nk.covlasso(cov, lam_ratio=ratio, tol=tol, **keywords)
    T, m = solution.coefficients.shape
    p = problem(cov, solution.targets, **keywords)
    c = make.normal(T, m, seed=int(1e4 * ratio))
    noise = torch.where(make.normal(T, m, seed=1) > 0, c, 0.0).to(dtype)
    count = (noise != 0).sum(1)
    order = (noise == 0).int().argsort(dim=1, stable=True)
    start = {"start_value": noise.gather(1, order), "start_index": order.int(), "start_count": count.int()}
    given = {name: p.keywords[name] for name in ("cross", "nonnegative", "ridge")}
    given["variance"] = None if given["cross"] is None else p.keywords["variance"].double()
    value, index, found, info = torch.ops.neuraldeps.covlasso(
        p.S, solution.targets, solution.lam, p.penalty.to(dtype), tol, 100_000, m, **given, **start
    )
    theta = torch.zeros(T, m, dtype=dtype).scatter_add(1, index.long(), value)
    assert torch.equal((theta != 0).sum(1), found.long())
    violation = reference.kkt_violation(p.S, theta, solution.targets, solution.lam, p.penalty, **p.keywords)
    assert (violation[info[:, 4] == 0] <= tol).all()
    lam = solution.lam.clamp_min(0)
    norm = [torch.where(x != 0, p.penalty * x.double().abs(), 0.0).sum(1) for x in (theta, solution.dense())]
    quadratic = [
        reference.err2(p.S, x, solution.targets, **p.keywords) + p.keywords["ridge"] * x.double().square().sum(1)
        for x in (theta, solution.dense())
    ]
    difference = (quadratic[0] + lam * norm[0]) - (quadratic[1] + lam * norm[1])
    assert difference.abs().le((2e-5 if dtype == F32 else 1e-10) * p.variance).all()


@PROPERTY
@given(drawn=problems(), low=st.floats(1e-3, 0.5))
def test_property_path_is_monotone(drawn, low):
    cov, keywords = drawn
    path = nk.covlasso_path(cov, n_lambdas=12, lam_min_ratio=low, tol=1e-12, **keywords)
    variance = problem(cov, path.targets, **keywords).variance[:, None]
    norm = weighted_norm(cov, path, **keywords)
    error = path.err2 + keywords.get("ridge", 0.0) * path.dense().square().sum(2)
    assert (error.diff(dim=1) <= 1e-9 * variance).all()
    assert (norm.diff(dim=1) >= -1e-7 * norm[:, 1:] - 1e-12).all()
    assert ((error + path.lams * norm).diff(dim=1) <= 1e-9 * variance).all()


@PROPERTY
@given(drawn=problems(), low=st.floats(1e-3, 0.5), noise=st.floats(0.0, 0.1))
def test_property_screening_and_support_bound(drawn, low, noise):
    """T10: rule 3.8 from a perturbed solution discards nothing that is used; |a| <= 4 E w_max(A_aa) / lam^2 (3.6).

    With penalties p_j the predictors are measured in units p_j; with a ridge E is err2 + ridge |theta|^2 and A has it.
    """
    cov, keywords = drawn
    path = nk.covlasso_path(cov, n_lambdas=6, lam_min_ratio=low, tol=1e-12, **keywords)
    assume((path.lambda_max > 0).all())
    rows, p = rows_of(path), problem(cov, path.targets, **keywords)
    targets, penalty, lam = path.targets[rows.target], p.penalty[rows.target], rows.lam
    theta, variance = rows.theta, p.variance[rows.target]
    perturbed = theta * (1 + noise * make.normal(*theta.shape, seed=len(theta)))
    if keywords.get("nonnegative"):
        perturbed = perturbed.clamp_min(0)
    gap = reference.duality_gap(p.S, perturbed, targets, lam, penalty, **p.keywords).clamp_min(0) + 1e-11 * variance
    rho = reference.residual_covariance(p.S, perturbed, targets, **p.keywords)
    strength = (rho.clamp_min(0) if keywords.get("nonnegative") else rho.abs()) / penalty
    tau = (lam / (2 * strength.amax(1)).clamp_min(1e-300)).clamp_max(1.0)
    diagonal = p.S.diagonal() + keywords.get("ridge", 0.0)
    bound = 2 * tau[:, None] * strength + 2 * (diagonal * gap[:, None]).sqrt() / penalty
    assert (theta[bound < lam[:, None] * (1 - 1e-9)].abs() <= 1e-12).all()
    quadratic = rows.err2 + keywords.get("ridge", 0.0) * theta.square().sum(1)
    for r in (theta != 0).any(1).nonzero()[:, 0].tolist():
        a = theta[r].nonzero()[:, 0]
        units = penalty[r, a]
        A = (p.S[a][:, a] + keywords.get("ridge", 0.0) * torch.eye(len(a), dtype=F64)) / units / units[:, None]
        limit = 4 * quadratic[r] * torch.linalg.eigvalsh(A)[-1] / lam[r] ** 2
        assert len(a) <= limit * (1 + 1e-6) + 1e-6


# ------------------------------------------------------------------------------------------------------- large supports


@pytest.mark.parametrize("dtype", [F32, F64])
def test_path_and_top_k_of_large_supports(dtype):
    """Far more coefficients than the first ones of the path suggest: hundreds at its end, 150 asked for."""
    S = make.mixed(300, seed=150, samples=4000).to(dtype)
    targets = [0, 150, 299]
    path = nk.covlasso_path(S, n_lambdas=6, lam_min_ratio=1e-6, targets=targets, tol=TOLERANCE[dtype])
    certify(S, path, TOLERANCE[dtype])
    assert path.n_nonzero[:, -1].tolist() == [299] * 3
    solution = nk.covlasso_top_k(S, 150, targets=targets, tol=TOLERANCE[dtype])
    certify(S, solution, TOLERANCE[dtype])
    assert solution.n_nonzero.tolist() == [150] * 3


# ------------------------------------------------------------------------------------------------------------ real data


def test_real_path():
    """Logits of a real network: 30 targets, 20 lambdas, certified in float32."""
    S = load_imagenet_covariance().lite0
    targets = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:30]
    path = nk.covlasso_path(S, targets=targets, lam_min_ratio=0.05)
    certify(S, path, 1e-6)
    assert 60 <= path.n_nonzero[:, -1].double().median() <= 200
    oracle = reference.covlasso(S, targets[:4], path.lams[:4, -1], tol=1e-10)
    error = reference.err2(S, oracle, targets[:4])
    assert (path.err2[:4, -1] - error).abs().le(1e-5 * S.double().diagonal()[targets[:4]]).all()


def test_real_top_k():
    """Eight predictors of each of 20 categories in the other network, certified in float32."""
    joint = load_imagenet_covariance().joint
    cov = across(joint, 1000, exclude_same=True)
    targets = torch.arange(0, 1000, 50)
    solution = nk.covlasso_top_k(cov, 8, targets=targets)
    assert solution.status_names == ["converged"] * 20
    assert solution.n_nonzero.tolist() == [8] * 20
    certify(cov, solution, 1e-6)
    p = problem(cast(cov, F64), targets[:3])
    expected = reference.top_k(p.S, targets[:3], 8, p.penalty, **p.keywords)
    torch.testing.assert_close(solution.lam[:3], expected.lam, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------ bad input


def good() -> Tensor:
    return make.mixed(5, seed=190)


def good_cross(**changes: Tensor) -> nk.CrossCovariance:
    cov = across(make.joint(6, 4, seed=191), 6)
    fields = {"cov": cov.cov, "cross": cov.cross, "variance": cov.variance, **changes}
    return nk.CrossCovariance(**fields, predictor_mean=cov.predictor_mean, target_mean=cov.target_mean)


def with_entry(x: Tensor, entry: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[entry] = value
    return x


def call(cov: Covariance | None = None, **keywords) -> Callable[[], object]:
    return lambda: nk.covlasso(good() if cov is None else cov, 0.1, **keywords)


def follow(*lams, **keywords) -> Callable[[], object]:
    if lams:
        keywords["lams"] = torch.tensor(lams, dtype=F64)
    return lambda: nk.covlasso_path(good(), **keywords)


def choose(k: object = 2, **keywords) -> Callable[[], object]:
    return lambda: nk.covlasso_top_k(good(), k, **keywords)


def another(n: int, **keywords) -> Callable[[], object]:
    """A warm start over n categories, in a problem of five."""
    return lambda: nk.covlasso(good(), 0.1, warm_start=nk.covlasso(make.mixed(n, seed=192), 0.1, **keywords))


BAD_INPUT: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "increasing lambdas": (ValueError, "lams", follow(0.1, 0.2)),
    "unsorted lambdas": (ValueError, "lams", follow(0.5, 0.1, 0.2)),
    "equal lambdas": (ValueError, "lams", follow(0.5, 0.5, 0.2)),
    "one row increasing": (ValueError, "lams", follow(*[[0.3, 0.2]] * 4, [0.2, 0.3])),
    "lambda zero": (ValueError, "lams", follow(0.5, 0.0)),
    "lambda negative": (ValueError, "lams", follow(0.5, -0.1)),
    "lambda nan": (ValueError, "lams", follow(0.5, math.nan)),
    "lambda infinite": (ValueError, "lams", follow(math.inf, 0.5)),
    "lambdas of another T": (ValueError, "lams", follow([0.2, 0.1], [0.2, 0.1])),
    "lambdas of three dimensions": (ValueError, "lams", follow([[[0.2, 0.1]]])),
    "one number": (ValueError, "lams", lambda: nk.covlasso_path(good(), lams=torch.tensor(0.1, dtype=F64))),
    "no lambdas": (ValueError, "lams", lambda: nk.covlasso_path(good(), lams=torch.zeros(0, dtype=F64))),
    "n_lambdas zero": (ValueError, "n_lambdas", follow(n_lambdas=0)),
    "n_lambdas negative": (ValueError, "n_lambdas", follow(n_lambdas=-3)),
    "ratio zero": (ValueError, "lam_min_ratio", follow(lam_min_ratio=0.0)),
    "ratio one": (ValueError, "lam_min_ratio", follow(lam_min_ratio=1.0)),
    "ratio nan": (ValueError, "lam_min_ratio", follow(lam_min_ratio=math.nan)),
    "n_lambdas float": (TypeError, "n_lambdas", follow(n_lambdas=2.5)),
    "lambdas text": (TypeError, "lams", lambda: nk.covlasso_path(good(), lams="0.1")),
    "ratio text": (TypeError, "lam_min_ratio", follow(lam_min_ratio="0.1")),
    "position text": (TypeError, "position", choose(position="0.1")),
    "ridge text": (TypeError, "ridge", call(ridge="0.1")),
    "path tol": (ValueError, "tol", follow(tol=0.0)),
    "path max_pivots": (ValueError, "max_pivots", follow(max_pivots=0)),
    "path target": (ValueError, "targets", follow(targets=[5])),
    "path candidates": (ValueError, "candidates", follow(candidates=torch.ones(2, 5, dtype=torch.bool))),
    "path penalty": (ValueError, "penalty_factors", follow(penalty_factors=torch.zeros(5))),
    "path ridge": (ValueError, "ridge", follow(ridge=-1.0)),
    "k zero": (ValueError, "k", choose(0)),
    "k negative": (ValueError, "k", choose(-1)),
    "k of all categories": (ValueError, "k", choose(5)),
    "k beyond the candidates": (ValueError, "k", choose(3, candidates=torch.arange(5) < 2)),
    "k float": (TypeError, "k", choose(2.5)),
    "position zero": (ValueError, "position", choose(position=0.0)),
    "position one": (ValueError, "position", choose(position=1.0)),
    "position nan": (ValueError, "position", choose(position=math.nan)),
    "top k tol": (ValueError, "tol", choose(tol=-1.0)),
    "top k target": (ValueError, "targets", choose(targets=[-1])),
    "k beyond the predictors": (ValueError, "k", lambda: nk.covlasso_top_k(good_cross(), 7)),
    "ridge negative": (ValueError, "ridge", call(ridge=-0.1)),
    "ridge nan": (ValueError, "ridge", call(ridge=math.nan)),
    "ridge infinite": (ValueError, "ridge", call(ridge=math.inf)),
    "warm start of fewer categories": (ValueError, "warm_start", another(4)),
    "warm start of more categories": (ValueError, "warm_start", another(6, targets=range(5))),
    "warm start of fewer targets": (ValueError, "warm_start", another(5, targets=[0, 1])),
    "warm start of another kind": (TypeError, "warm_start", call(warm_start=torch.zeros(5, 5))),
    "nan in cross": (ValueError, "cross", call(good_cross(cross=with_entry(good_cross().cross, (1, 2), math.nan)))),
    "inf in cross": (ValueError, "cross", call(good_cross(cross=with_entry(good_cross().cross, (0, 0), math.inf)))),
    "nan in predictors": (ValueError, "cov", call(good_cross(cov=with_entry(good_cross().cov, (1, 1), math.nan)))),
    "variance negative": (
        ValueError, "variance", call(good_cross(variance=with_entry(good_cross().variance, (1,), -1.0))),
    ),
    "variance nan": (
        ValueError, "variance", call(good_cross(variance=with_entry(good_cross().variance, (1,), math.nan))),
    ),
    "cross of other width": (ValueError, "cross", lambda: good_cross(cross=torch.zeros(4, 5, dtype=F64))),
    "variance of other length": (ValueError, "variance", lambda: good_cross(variance=torch.zeros(3, dtype=F64))),
    "cross target": (ValueError, "targets", call(good_cross(), targets=[4])),
    "cross candidates": (ValueError, "candidates", call(good_cross(), candidates=torch.ones(4, dtype=torch.bool))),
    "cross penalty": (ValueError, "penalty_factors", call(good_cross(), penalty_factors=torch.ones(4))),
    "predict width": (ValueError, "x", lambda: call(good_cross())().predict(torch.zeros(3, 4, dtype=F64))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    error, argument, attempt = BAD_INPUT[name]
    with pytest.raises(error, match=rf"\b{argument}\b"):
        attempt()


def operator_keywords(**changes: Tensor) -> dict[str, Tensor]:
    """Those of a good call of the operator with a cross covariance of four targets and a start of three problems."""
    cov = good_cross()
    start = {
        "start_value": torch.zeros(3, 2, dtype=F64),
        "start_index": torch.zeros(3, 2, dtype=torch.int32),
        "start_count": torch.zeros(3, dtype=torch.int32),
    }
    return {"cross": cov.cross, "variance": cov.variance, **start, **changes}


BAD_OPERATOR_INPUT = {
    "cross alone": ("cross", operator_keywords(variance=None)),
    "variance alone": ("variance", operator_keywords(cross=None)),
    "cross width": ("cross", operator_keywords(cross=torch.zeros(4, 5, dtype=F64))),
    "cross dtype": ("cross", operator_keywords(cross=torch.zeros(4, 6))),
    "variance dtype": ("variance", operator_keywords(variance=torch.ones(4))),
    "variance length": ("variance", operator_keywords(variance=torch.ones(3, dtype=F64))),
    "target beyond cross": (
        "targets",
        operator_keywords(cross=torch.zeros(2, 6, dtype=F64), variance=torch.ones(2, dtype=F64)),
    ),
    "part of a start": ("start_index", operator_keywords(start_index=None)),
    "start index dtype": ("start_index", operator_keywords(start_index=torch.zeros(3, 2, dtype=torch.int64))),
    "start value dtype": ("start_value", operator_keywords(start_value=torch.zeros(3, 2))),
    "start rows": ("start_value", operator_keywords(start_value=torch.zeros(2, 2, dtype=F64))),
    "start count": ("start_count", operator_keywords(start_count=torch.zeros(2, dtype=torch.int32))),
    "start widths": ("start_index", operator_keywords(start_index=torch.zeros(3, 1, dtype=torch.int32))),
    "ridge": ("ridge", operator_keywords(ridge=-1.0)),
}


@pytest.mark.parametrize("name", BAD_OPERATOR_INPUT)
def test_operator_checks_its_arguments(name):
    argument, keywords = BAD_OPERATOR_INPUT[name]
    S, targets, lam = good_cross().cov, torch.arange(3), torch.full((3,), 0.1, dtype=F64)
    torch.ops.neuraldeps.covlasso(S, targets, lam, None, 1e-9, 1000, 6, **operator_keywords())
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        torch.ops.neuraldeps.covlasso(S, targets, lam, None, 1e-9, 1000, 6, **keywords)


@pytest.mark.parametrize("shape", [(2, 6, 6), (3, 6, 5), (1, 3, 6, 6)])
def test_operator_checks_the_matrices(shape):
    targets, lam = torch.arange(3), torch.full((3,), 0.1, dtype=F64)
    with pytest.raises(ValueError, match=r"\bcov\b"):
        torch.ops.neuraldeps.covlasso(
            torch.ones(shape, dtype=F64), targets, lam, None, 1e-9, 1000, 6, **operator_keywords()
        )
    with pytest.raises(ValueError, match=r"\bcov\b"):  # a matrix each is for predictors of another network
        torch.ops.neuraldeps.covlasso(torch.ones(3, 6, 6, dtype=F64), targets, lam, None, 1e-9, 1000, 6)
