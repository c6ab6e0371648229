"""CovLasso from factors (Sigma = W H W', never formed), and where the covariance is larger than the caches.

Oracles: the plain float64 reference and the dense solver on the covariance formed, and the optimality conditions
recomputed from the factors themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import normal
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels.ops import factored
from neuraldeps_kernels.ops.factored import FactoredCovariance
from neuraldeps_kernels.reference import covlasso as reference

F32, F64 = torch.float32, torch.float64
CONVERGED, CAPPED, TOO_FEW = 0, 1, 4
FIELDS = ("lambda_max", "err2", "relative_error", "duality_gap", "lam")


pytestmark = pytest.mark.usefixtures("one_thread")


def features(d: int, seed: int, samples: int = 400) -> Tensor:
    """Correlated features with an offset: [samples, d] float64."""
    return normal(samples, d, seed=seed) @ normal(d, d, seed=seed + 1) + 3 * normal(1, d, seed=seed + 2)


def tree_weights(n: int, d: int, seed: int) -> Tensor:
    """Rows in clusters of about eight, whose centres are the outputs' only large correlations: [n, d] float64."""
    centre = normal(max(2, n // 8), d, seed=seed)
    member = torch.randint(len(centre), (n,), generator=torch.Generator().manual_seed(seed))
    return centre[member] + 0.8 * normal(n, d, seed=seed + 1)


def factors(n: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> tuple[FactoredCovariance, Tensor]:
    """A factored covariance and the same one formed in float64."""
    cov = FactoredCovariance(features(d, seed), tree_weights(n, d, seed + 10).to(dtype))
    W = cov.weight.double()
    S = W @ cov.hidden_cov @ W.T
    return cov, (S + S.T) / 2


def violation_from_factors(cov: FactoredCovariance, solution, penalty: Tensor, nonnegative: bool, ridge: float):
    """KKT violation [T] over lambda_max / 2, in float64, from W, H and the returned coefficients alone."""
    theta, targets = solution.dense().double(), solution.targets
    W = cov.weight.double()
    g = ((theta @ W - W[targets]) @ cov.hidden_cov) @ W.T + ridge * theta
    a = solution.lam[:, None] / 2 * penalty
    off = (-g if nonnegative else g.abs()) - a
    miss = torch.where(theta != 0, (g + a * theta.sign()).abs(), off.clamp_min(0.0))
    miss[torch.arange(len(targets)), targets] = 0.0
    return miss.amax(1) / (solution.lambda_max / 2)


def options_of(name: str, n: int, num_targets: int) -> dict:
    """Keywords of a call, by name."""
    generator = torch.Generator().manual_seed(3)
    return {
        "plain": {},
        "nonnegative": {"nonnegative": True},
        "ridge": {"ridge": 2.0},
        "penalties": {"penalty_factors": 0.5 + torch.rand(n, generator=generator, dtype=F64)},
        "candidates": {"candidates": torch.rand(num_targets, n, generator=generator) < 0.4},
        "all": {
            "nonnegative": True,
            "ridge": 0.1,
            "penalty_factors": 0.5 + torch.rand(n, generator=generator, dtype=F64),
            "candidates": torch.rand(n, generator=generator) < 0.6,
        },
    }[name]


def penalty_of(n: int, num_targets: int, options: dict) -> Tensor:
    penalty = options.get("penalty_factors", torch.ones(n, dtype=F64)).expand(num_targets, n)
    return torch.where(options["candidates"], penalty, torch.inf) if "candidates" in options else penalty


def same(ours, dense, tolerance: float = 1e-9) -> None:
    """Both converged to the same solution and report the same numbers."""
    assert ours.status.tolist() == dense.status.tolist()
    torch.testing.assert_close(ours.dense(), dense.dense(), rtol=tolerance, atol=tolerance)
    scale = float(dense.err2.abs().max() + dense.lambda_max.max())
    for field in FIELDS:
        torch.testing.assert_close(getattr(ours, field), getattr(dense, field), rtol=tolerance, atol=tolerance * scale)


# ---------------------------------------------------------------------------------------------------- the covariance


@pytest.mark.parametrize("center", [True, False])
def test_the_covariance_of_the_logits(center):
    hidden, weight, bias = features(7, seed=1), tree_weights(40, 7, seed=2), normal(40, seed=3)
    cov = FactoredCovariance(hidden, weight, bias=bias, center=center)
    logits = hidden @ weight.T + bias
    S = nk.covariance(hidden @ weight.T, center=center)
    assert cov.shape == (40, 40)
    assert cov.dtype == F64
    assert cov.device == weight.device
    torch.testing.assert_close(cov.dense(), S)
    torch.testing.assert_close(cov.diagonal(), S.diagonal())
    torch.testing.assert_close(cov.rows([5, 0, 5]), S[[5, 0, 5]])
    torch.testing.assert_close(cov.mean, logits.mean(0))
    assert torch.equal(cov.dense(), cov.dense().T)
    assert "n=40" in repr(cov)


def test_features_that_arrive_in_chunks():
    hidden, weight = features(6, seed=4), tree_weights(30, 6, seed=5)
    moments = nk.CovarianceAccumulator(6)
    for chunk in hidden.split(130):
        moments.update(chunk)
    streamed = FactoredCovariance.from_moments(moments.compute(), weight, hidden_mean=moments.mean)
    torch.testing.assert_close(streamed.dense(), FactoredCovariance(hidden, weight).dense())
    torch.testing.assert_close(streamed.mean, (hidden @ weight.T).mean(0))
    assert FactoredCovariance.from_moments(moments.compute(), weight).mean is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_become_float32(dtype):
    weight = tree_weights(30, 6, seed=6).to(dtype)
    cov = FactoredCovariance(features(6, seed=4), weight)
    assert cov.dtype == F32
    torch.testing.assert_close(cov.weight, weight.float())


def test_predictions_are_those_of_the_logits():
    hidden, weight, bias = features(8, seed=7), tree_weights(50, 8, seed=8), normal(50, seed=9)
    cov = FactoredCovariance(hidden, weight, bias=bias)
    logits = hidden @ weight.T + bias
    solution = nk.covlasso(cov, lam_ratio=0.05, targets=range(0, 50, 7))
    error = solution.predict(logits, cov.mean) - logits[:, ::7]
    torch.testing.assert_close(error.square().mean(0), solution.err2)


# ---------------------------------------------------------------------------------------------------- solving


@pytest.mark.parametrize("name", ["plain", "nonnegative", "ridge", "penalties", "candidates", "all"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_equals_the_dense_solver(name, dtype):
    """Rank 12 of 150 categories, supports up to that rank."""
    cov, S = factors(150, 12, dtype=dtype)
    targets = torch.arange(0, 150, 8)
    options = options_of(name, 150, len(targets))
    penalty = penalty_of(150, len(targets), options)
    nonnegative, ridge = options.get("nonnegative", False), options.get("ridge", 0.0)
    for ratio in (0.5, 0.1, 0.003):
        ours = nk.covlasso(cov, lam_ratio=ratio, targets=targets, **options)
        same(ours, nk.covlasso(S, lam_ratio=ratio, targets=targets, **options), tolerance=1e-7)
        again = violation_from_factors(cov, ours, penalty, nonnegative, ridge)
        assert (again <= 1e-6).all()
        torch.testing.assert_close(ours.kkt_violation, again, rtol=0, atol=1e-11)
        expected = reference.err2(S, ours.dense(), targets)
        torch.testing.assert_close(ours.err2, expected, rtol=1e-9, atol=1e-9 * float(S.diagonal().max()))
    assert torch.equal(
        nk.lambda_max(cov, targets, **{k: v for k, v in options.items() if k != "ridge"}), ours.lambda_max
    )


def test_path_equals_the_dense_one():
    cov, S = factors(120, 15, seed=1)
    targets = torch.arange(0, 120, 10)
    ours, dense = (nk.covlasso_path(c, targets=targets, n_lambdas=12, lam_min_ratio=3e-3) for c in (cov, S))
    torch.testing.assert_close(ours.lams, dense.lams)
    torch.testing.assert_close(ours.dense(), dense.dense(), rtol=1e-8, atol=1e-8)
    assert (ours.status == CONVERGED).all()
    assert (ours.kkt_violation <= 1e-6).all()
    one = nk.covlasso(cov, ours.lams[:, 7], targets=targets)
    torch.testing.assert_close(ours[7].dense(), one.dense(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["plain", "nonnegative", "ridge", "candidates", "all"])
def test_top_k_equals_the_dense_one(name):
    cov, S = factors(80, 9, seed=2, dtype=F32)
    targets = torch.arange(0, 80, 9)
    options = options_of(name, 80, len(targets))
    for k in (1, 4, 8):
        ours, dense = (nk.covlasso_top_k(c, k, targets=targets, position=0.3, **options) for c in (cov, S))
        same(ours, dense, tolerance=1e-7)
        assert (ours.n_nonzero[ours.status == CONVERGED] == k).all()


def test_top_k_against_all_segments_of_the_path():
    """The first segment with k nonzeros, found by the reference from S; `stand_in`-like columns leave and come back."""
    cov, S = factors(40, 6, seed=11)
    for k in (2, 3, 5):
        ours = nk.covlasso_top_k(cov, k, targets=range(10), position=0.5)
        expected = reference.top_k(S, torch.arange(10), k, position=0.5)
        torch.testing.assert_close(ours.lam, expected.lam, rtol=1e-9, atol=0)
        torch.testing.assert_close(ours.dense(), expected.theta, rtol=1e-8, atol=1e-9)


def test_top_k_beyond_the_rank():
    cov, _ = factors(40, 5, seed=3)
    solution = nk.covlasso_top_k(cov, 7, targets=[0, 17])
    assert (solution.status == TOO_FEW).all()
    assert (solution.n_nonzero <= 5).all()
    assert (solution.relative_error < 1e-6).all()
    capped = nk.covlasso_top_k(cov, 3, targets=[0, 17], max_pivots=1)
    assert (capped.status == CAPPED).all()


def test_top_k_where_too_few_correlate():
    """Category 0 is 1 plus half of 2, and independent of 3 and 4: near the end of its path it has two nonzeros."""
    weight = torch.eye(4, dtype=F64)[[0, 0, 1, 2, 3]]
    weight[0, 1] = 0.5
    cov = FactoredCovariance.from_moments(torch.eye(4, dtype=F64), weight)
    for solution in (nk.covlasso_top_k(c, 3, targets=[0]) for c in (cov, cov.dense())):
        assert solution.status.tolist() == [TOO_FEW]
        torch.testing.assert_close(solution.dense(), torch.tensor([[0, 1, 0.5, 0, 0]], dtype=F64), rtol=0, atol=2e-3)


def test_supports_reach_the_rank():
    """Near the end of the path a singular covariance still has a support of at most its rank."""
    cov, _ = factors(300, 24, seed=4)
    solution = nk.covlasso(cov, lam_ratio=1e-5, targets=range(0, 300, 20))
    assert (solution.status == CONVERGED).all()
    assert int(solution.n_nonzero.max()) == 24
    assert (solution.relative_error < 1e-3).all()


def test_warm_start_changes_the_time_alone():
    cov, _ = factors(200, 16, seed=5)
    targets = range(0, 200, 10)
    cold = nk.covlasso(cov, lam_ratio=0.05, targets=targets)
    warm = nk.covlasso(cov, lam_ratio=0.05, targets=targets, warm_start=cold)
    torch.testing.assert_close(warm.dense(), cold.dense(), rtol=1e-9, atol=1e-10)
    assert int(warm.n_pivots.sum()) == 0 < int(cold.n_pivots.sum())
    other = nk.covlasso(cov, lam_ratio=0.4, targets=targets, warm_start=cold)
    torch.testing.assert_close(other.dense(), nk.covlasso(cov, lam_ratio=0.4, targets=targets).dense())


@pytest.mark.parametrize("limit", ["_GRAM", "_BLOCK", "_TARGETS", "_HELD"])
def test_memory_limits_change_nothing(monkeypatch, limit):
    """Groups of one working set, blocks of 256 columns, chunks of three targets, covariances of one target held."""
    cov, _ = factors(700, 16, seed=6, dtype=F32)
    targets = torch.arange(0, 700, 60)

    def solved():
        path = nk.covlasso_path(cov, targets=targets, n_lambdas=4, lam_min_ratio=0.02)
        return path.dense(), nk.covlasso_top_k(cov, 5, targets=targets).dense(), nk.lambda_max(cov, targets)

    before = solved()
    monkeypatch.setattr(factored, limit, {"_GRAM": 1, "_BLOCK": 1, "_TARGETS": 3, "_HELD": 1}[limit])
    if limit == "_HELD":
        monkeypatch.setattr(factored, "_GRAM", 1)  # one target a group
    for one, other in zip(before, solved(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_uncorrelated_and_constant_outputs():
    """A zero row of the weight: a category that neither explains nor needs explaining."""
    weight = tree_weights(30, 6, seed=12)
    weight[4] = 0
    cov = FactoredCovariance(features(6, seed=4), weight)
    solution = nk.covlasso(cov, lam_ratio=0.1, targets=[4, 5])
    assert solution.n_nonzero[0] == 0
    assert (solution.status == CONVERGED).all()
    assert solution.err2[0] == 0
    assert solution.dense()[:, 4].abs().max() == 0
    barred = nk.covlasso(cov, 1.0, targets=[5, 6], candidates=torch.zeros(30, dtype=torch.bool))
    assert barred.n_nonzero.tolist() == [0, 0]
    torch.testing.assert_close(barred.err2, cov.diagonal()[[5, 6]])


def test_no_targets_and_repeated_ones():
    cov, _ = factors(30, 6)
    assert nk.covlasso(cov, 1.0, targets=[]).coefficients.shape == (0, 30)
    assert nk.covlasso_top_k(cov, 2, targets=[]).coefficients.shape == (0, 30)
    twice = nk.covlasso(cov, lam_ratio=0.1, targets=[3, 7, 3]).dense()
    assert torch.equal(twice[0], twice[2])


def test_max_pivots_caps():
    cov, _ = factors(200, 16, seed=5)
    solution = nk.covlasso(cov, lam_ratio=0.01, targets=[0, 50], max_pivots=3)
    assert (solution.status == CAPPED).all()
    again = violation_from_factors(cov, solution, torch.ones(2, 200, dtype=F64), False, 0.0)
    torch.testing.assert_close(solution.kkt_violation, again)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 60),
    d=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    ratio=st.floats(1e-3, 0.9),
    nonnegative=st.booleans(),
    ridge=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([F32, F64]),
)
def test_property_equals_the_dense_solver(n, d, seed, ratio, nonnegative, ridge, dtype):
    cov, S = factors(n, d, seed, dtype)
    options = {"lam_ratio": ratio, "nonnegative": nonnegative, "ridge": ridge, "targets": range(0, n, max(1, n // 5))}
    ours, dense = nk.covlasso(cov, **options), nk.covlasso(S, **options)
    assert (ours.status == CONVERGED).all()
    violation = violation_from_factors(cov, ours, torch.ones(1, n, dtype=F64), nonnegative, ridge)
    assert violation.nan_to_num(0.0).max() <= 1e-6

    def objective(solution) -> Tensor:
        theta = solution.dense()
        return solution.err2 + ridge * theta.square().sum(1) + ours.lam * theta.abs().sum(1)

    # The minimum is unique in value; coefficients may differ where the support is degenerate.
    slack = 1e-5 * S.diagonal()[ours.targets] + 1e-300
    assert ((objective(ours) - objective(dense)).abs() <= slack).all()


# ---------------------------------------------------------------------------------------------------- bad input


def wrong(name: str) -> tuple[type[Exception], str, object]:
    hidden, weight = features(4, seed=1), tree_weights(10, 4, seed=2)
    with_nan = weight.clone()
    with_nan[3, 1] = torch.nan
    cov = FactoredCovariance(hidden, weight)
    return {
        "columns": (
            ValueError,
            r"covariance of hidden must be \[3, 3\]",
            lambda: FactoredCovariance(hidden, weight[:, :3]),
        ),
        "flat weight": (ValueError, r"weight must be \[n, d\]", lambda: FactoredCovariance(hidden, weight[0])),
        "integer weight": (TypeError, "weight must be floating", lambda: FactoredCovariance(hidden, weight.long())),
        "no tensor": (TypeError, "weight must be a torch.Tensor", lambda: FactoredCovariance(hidden, [[1.0]])),
        "nan": (ValueError, "weight has a NaN", lambda: FactoredCovariance(hidden, with_nan)),
        "bias": (
            ValueError,
            r"bias must be \[10\]",
            lambda: FactoredCovariance(hidden, weight, bias=normal(3, seed=1)),
        ),
        "no rows": (ValueError, "hidden|row", lambda: FactoredCovariance(hidden[:0], weight)),
        "target": (ValueError, "targets contains 10", lambda: nk.covlasso(cov, 1.0, targets=[10])),
        "lam": (ValueError, "lam must be positive", lambda: nk.covlasso(cov, -1.0)),
        "k": (ValueError, "k must be from 1", lambda: nk.covlasso_top_k(cov, 10)),
        "ridge": (ValueError, "ridge must be", lambda: nk.covlasso(cov, 1.0, ridge=-1.0)),
        "candidates": (ValueError, "candidates must be", lambda: nk.covlasso(cov, 1.0, candidates=torch.ones(3) > 0)),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("columns", "flat weight", "integer weight", "no tensor", "nan", "bias", "no rows"),
        *("target", "lam", "k", "ridge", "candidates"),
    ],
)
def test_bad_input(name):
    error, message, call = wrong(name)
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------- large

# Solves some targets in a process of its own; prints status, supports, the violation recomputed from the factors in
# float64, and the peak memory in MB, in all and before solving.
MEASURED = """
import json, re, sys
import torch
import neuraldeps_kernels as nk
from neuraldeps_kernels.ops.factored import FactoredCovariance
sys.path.insert(0, sys.argv[4])
from test_covlasso_large import features, tree_weights, violation_from_factors

def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would count the parent's, before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

n, d, ratio = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(2)
cov = FactoredCovariance(features(d, 0, samples=4 * d).float(), tree_weights(n, d, 10).float())
before = peak()
solution = nk.covlasso(cov, lam_ratio=ratio, targets=torch.arange(0, n, n // 64)[:64])
after = peak()
worst = violation_from_factors(cov, solution, torch.ones(1, dtype=torch.float64), False, 0.0).max()
print(json.dumps({"status": solution.status.unique().tolist(), "k": solution.n_nonzero.tolist(),
                  "worst": float(worst), "peak": after, "before": before}))
"""


def measured(run_python, n: int, d: int, ratio: float) -> dict:
    result = run_python(MEASURED, str(n), str(d), str(ratio), str(Path(__file__).parent))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_five_thousand_outputs(run_python):
    """n = 5,000 of rank 64, 64 targets, against the dense solver on the covariance formed."""
    cov, S = factors(5000, 64, seed=20, dtype=F32)
    targets = torch.arange(0, 5000, 79)[:64]
    same(nk.covlasso(cov, lam_ratio=0.2, targets=targets), nk.covlasso(S, lam_ratio=0.2, targets=targets), 1e-7)
    facts = measured(run_python, 5000, 64, 0.05)
    assert facts["status"] == [CONVERGED]
    assert facts["worst"] <= 1e-6
    assert facts["peak"] - facts["before"] <= 300


@pytest.mark.slow
def test_fifty_thousand_outputs(run_python):
    """A language model's vocabulary: n = 50,000 of rank 576, 64 targets; formed it would be 10 GB in float32."""
    facts = measured(run_python, 50_000, 576, 0.1)
    assert facts["status"] == [CONVERGED]
    assert facts["worst"] <= 1e-6
    assert max(facts["k"]) >= 20
    assert facts["peak"] <= 3000


# ---------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("exponent", [0, 10, -10, 45])
def test_a_covariance_read_where_it_is(exponent):
    """Rows of 5 whole cache lines are not copied; those of a strided view are. The results are the same to the bit,
    also beyond the range that is read in place.
    """
    _, S = factors(80, 120, seed=30)
    S = (S * 2.0**exponent).float()
    S = torch.triu(S) + torch.triu(S, 1).T
    apart = torch.zeros(80, 81)[:, :80]
    apart.copy_(S)
    before = S.clone()
    for ratio in (0.3, 0.01):
        one, other = nk.covlasso(S, lam_ratio=ratio), nk.covlasso(apart, lam_ratio=ratio)
        assert torch.equal(one.dense(), other.dense())
        for field in (*FIELDS, "kkt_violation", "n_pivots", "status"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert torch.equal(S, before)


def test_what_is_not_symmetric_is_not_read_in_place():
    """The mean of the triangles is solved, wherever the asymmetry is; too much of it is an error."""
    _, S = factors(80, 120, seed=30)
    S = S.float()
    mean = torch.triu(S) + torch.triu(S, 1).T
    for row in (0, 40, 79):
        tilted = mean.clone()
        tilted[row, 17] += 4e-6 * float(S.diagonal().max())
        exact = (tilted + tilted.T) / 2
        one, other = nk.covlasso(tilted, lam_ratio=0.1), nk.covlasso(exact, lam_ratio=0.1)
        assert torch.equal(one.dense(), other.dense())
        tilted[row, 17] += 1e-3 * float(S.diagonal().max())
        with pytest.raises(ValueError, match="not symmetric"):
            nk.covlasso(tilted, lam_ratio=0.1)
        tilted[row, 17] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            nk.covlasso(tilted, lam_ratio=0.1)
