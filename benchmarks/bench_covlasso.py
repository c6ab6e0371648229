"""CovLasso on the CPU: microseconds a target, and other packages' at the same certified accuracy.

Ours solves all n targets in one call, packing of the covariance included; the time is divided by n. A peer solves a
sample: targets at equally spaced ranks of the support size, so that their mean work is that of all. The violation of
the optimality conditions is recomputed in float64 for all, from the float32 covariance that ours is given.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks import bench_covlasso_large as large
from benchmarks import peers_covlasso as rivals
from benchmarks.harness import Budget, Case, Contender, Missing, Rates, Recipe, measured_rates
from neuraldeps_kernels.data.logits import load_imagenet_covariance
from neuraldeps_kernels.data.synthetic_logits import clustered_logits

PILOTS = 8  # targets on which a peer's tolerance is chosen
MOST_TARGETS = 24  # of a peer in a round
MAX_PIVOTS = 1_000_000
PEER_SLACK = 10.0  # a peer may miss the accuracy by this factor on targets that are no pilots, which favours it
SKLEARN_F64, SKLEARN_F32, LASSO, ADELIE = (rivals.PEERS[i].name for i in (0, 1, 2, 4))

# Microseconds a target, ratio to peers, asked of ours on one core with AVX-512.
REAL_GOALS: dict[float, tuple[float, dict[str, float]]] = {
    0.2: (6.0, {SKLEARN_F64: 55}),
    0.1: (16.0, {SKLEARN_F64: 55}),
    0.05: (50.0, {SKLEARN_F64: 80}),
    0.02: (180.0, {SKLEARN_F64: 140}),
    0.01: (450.0, {SKLEARN_F64: 200}),
}
JOINT_GOALS = {0.2: 7.0, 0.1: 20.0, 0.05: 60.0, 0.02: 280.0}
SYNTHETIC_GOALS = {
    10: (2.5, {SKLEARN_F64: 300, LASSO: 500}),
    28: (8.0, {SKLEARN_F64: 200, LASSO: 350}),
}
FASTEST_RIVAL_GOAL = 300.0  # synthetic: celer, adelie, skglm, lars_path_gram


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Recipes of all cases, cheapest first within a covariance."""
    rivals.silence_peers()
    for ratio, (goal_us, goals) in REAL_GOALS.items():
        yield Recipe(f"covlasso lite0 ratio {ratio}", _build(lite0, ratio, budget, goal_us, goals, rivals.PEERS))
    for k, (goal_us, goals) in SYNTHETIC_GOALS.items():
        goals = goals | {peer.name: FASTEST_RIVAL_GOAL for peer in rivals.PEERS[3:7]}
        yield Recipe(f"covlasso synthetic k {k}", _build(synthetic, None, budget, goal_us, goals, rivals.PEERS, k))
    for ratio, goal_us in JOINT_GOALS.items():
        name = f"covlasso joint ratio {ratio}"
        yield Recipe(name, _build(joint, ratio, budget, goal_us, {}, rivals.PEERS[:1]))
    yield Recipe("covlasso lite0 preparation", lambda: preparation_case(lite0()))
    yield Recipe("covlasso lite0 ratio 0.2, 2 threads", lambda: threads_case(lite0(), 0.2, 2))
    yield from large.cases(budget)


def _build(
    source: Callable[[], Tensor],
    ratio: float | None,
    budget: Budget,
    goal_us: float,
    goals: dict[str, float],
    peers: tuple[rivals.Peer, ...],
    k: int = 0,
) -> Callable[[], Case]:
    def build() -> Case:
        cov = source()
        chosen = ratio_for(cov, k) if ratio is None else ratio
        kind = f"synthetic k {k}" if ratio is None else f"{source.__name__} ratio {ratio}"
        return solve_case(f"covlasso {kind}", cov, chosen, budget, goal_us, goals, peers)

    return build


@functools.cache
def lite0() -> Tensor:
    return load_imagenet_covariance().lite0


@functools.cache
def joint() -> Tensor:
    return load_imagenet_covariance().joint


@functools.cache
def synthetic() -> Tensor:
    """[1000, 1000] float32, of 50,000 synthetic logits from 512 features; entries exact to rounding."""
    x = clustered_logits(1000, 512, 50_000)[0].double()
    x -= x.mean(0)
    return (x.T @ x / len(x)).float()


def ratio_for(cov: Tensor, k: float) -> float:
    """The lam_ratio, to 2 %, at which the mean support is k."""
    low, high = 1e-3, 1.0  # the support shrinks as the ratio grows
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        mean = nk.covlasso(cov, lam_ratio=middle, targets=range(0, len(cov), 20)).n_nonzero.double().mean()
        low, high = (low, middle) if mean < k else (middle, high)
    return float((low * high) ** 0.5)


# ------------------------------------------------------------------------------------------------ cases


def solve_case(
    name: str,
    cov: Tensor,
    ratio: float,
    budget: Budget,
    goal_us: float | None = None,
    goals: dict[str, float] | None = None,
    peers: tuple[rivals.Peer, ...] = (),
) -> Case:
    """All n targets at `ratio`: the operator in float32, the public call, float64 at 1e-12, and peers."""
    n = len(cov)
    solution = nk.covlasso(cov, lam_ratio=ratio)
    order = solution.n_nonzero.argsort(stable=True)
    k = solution.n_nonzero.double()
    rates = measured_rates(1, cov.nbytes, torch.float32)
    return Case(
        name,
        {"n": n, "ratio": round(ratio, 4), "dtype": "float32", "tol": 1e-6},
        ours=operator(f"ours operator {str(cov.dtype)[6:]}", cov, ratio, 1e-6, goal_us),
        variants=(
            public_call(cov, ratio),
            operator("ours operator float64, 1e-12", cov.double(), ratio, 1e-12, goal=2),
        ),
        peers=[peer_contender(peer, cov, ratio, order, budget, (goals or {}).get(peer.name)) for peer in peers],
        bytes=float(4 * n * k.mean()),  # one certifying pass over the rows of the support
        flops=float((k**3 / 3).mean()),  # one Cholesky factor
        rates=Rates(rates.copy, rates.gemm),
        facts={"k": f"{k.mean():.1f} (median {k.median():.0f}, most {k.max():.0f})", "ratio": f"{ratio:.4g}"},
    )


def operator(name: str, cov: Tensor, ratio: float, tol: float, goal: float | None = None) -> Contender:
    """`torch.ops.neuraldeps.covlasso` on all targets; the error is the largest violation over all of them."""
    n = len(cov)
    targets = torch.arange(n)
    lam = ratio * nk.lambda_max(cov)
    capacity = int(nk.covlasso(cov, lam, tol=tol).n_nonzero.max()) + 1

    def run() -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.covlasso(cov, targets, lam, None, tol, MAX_PIVOTS, capacity)

    def error(result: tuple[Tensor, ...]) -> float:
        value, index, count, _ = result
        inside = torch.arange(capacity) < count[:, None]
        theta = torch.zeros(n, n, dtype=torch.float64)
        theta.scatter_add_(1, index.long(), torch.where(inside, value.double(), 0.0))
        return largest_violation(cov, theta, lam)

    return Contender(name, run, n, error, tol, goal)


def public_call(cov: Tensor, ratio: float) -> Contender:
    """`nk.covlasso(cov, lam_ratio=ratio)` on all targets: checks, lambda_max, sparse result included."""
    lam = ratio * nk.lambda_max(cov)
    return Contender(
        "ours nk.covlasso",
        lambda: nk.covlasso(cov, lam_ratio=ratio),
        len(cov),
        lambda solution: largest_violation(cov, solution.dense().double(), lam),
        1e-6,
    )


def largest_violation(cov: Tensor, theta: Tensor, lam: Tensor, targets: Tensor | None = None) -> float:
    """Of the optimality conditions by the rows of theta [T, n], over lambda_max / 2; float64."""
    targets = torch.arange(len(cov)) if targets is None else targets
    cov = cov.double()
    gradient = theta @ cov - cov[targets]
    bound = lam[:, None] / 2
    violation = torch.where(theta != 0, (gradient + bound * theta.sign()).abs(), (gradient.abs() - bound).clamp_min(0))
    violation.scatter_(1, targets[:, None], 0.0)
    top = nk.lambda_max(cov, targets)
    return float((violation.amax(1) / torch.where(top > 0, top / 2, 1.0)).max())


def preparation_case(cov: Tensor) -> Case:
    """What a call costs beside its targets: checks and packing (one target at its lambda_max), lambda_max of all."""
    first, everything = torch.arange(1), torch.arange(len(cov))
    top = nk.lambda_max(cov, first)
    return Case(
        "covlasso lite0 preparation",
        {"n": len(cov), "dtype": "float32"},
        ours=Contender(
            "ours checks and packing",
            lambda: torch.ops.neuraldeps.covlasso(cov, first, top, None, 1e-6, MAX_PIVOTS, 1),
        ),
        variants=(
            Contender("ours lambda_max operator", lambda: torch.ops.neuraldeps.lambda_max(cov, everything, None)),
            Contender("ours nk.lambda_max", lambda: nk.lambda_max(cov)),
        ),
        bytes=2.0 * cov.nbytes,
        rates=measured_rates(1, cov.nbytes, torch.float32),
    )


def threads_case(cov: Tensor, ratio: float, threads: int) -> Case:
    """The whole public call on several threads."""
    return Case(
        f"covlasso lite0 ratio {ratio}, {threads} threads",
        {"n": len(cov), "ratio": ratio, "dtype": "float32", "tol": 1e-6},
        ours=operator("ours operator float32", cov, ratio, 1e-6),
        variants=(public_call(cov, ratio),),
        threads=threads,
    )


# ------------------------------------------------------------------------------------------------ peers


def peer_contender(
    peer: rivals.Peer, cov: Tensor, ratio: float, order: Tensor, budget: Budget, goal: float | None
) -> Contender | Missing:
    """The peer on a sample of targets, at the loosest tolerance that serves; `order` sorts targets by support size."""
    if failure := rivals.import_failure(peer):
        return Missing(peer.name, failure)
    pilots = [problem_of(cov, ratio, target) for target in spread(order, PILOTS)]
    tolerance = rivals.loosest_tolerance(peer, pilots, budget.search_seconds)
    if isinstance(tolerance, str):
        return Missing(peer.name, tolerance)
    sample = [problem_of(cov, ratio, target) for target in spread(order, sample_size(peer, pilots, tolerance, budget))]

    return timed_peer(peer, sample, tolerance, goal)


def timed_peer(
    peer: rivals.Peer, sample: Sequence[rivals.Problem | rivals.PathProblem], tolerance: float, goal: float | None
) -> Contender:
    """The peer on all problems of the sample, one after the other."""

    def run() -> list[np.ndarray]:
        return [peer.solve(problem, tolerance) for problem in sample]

    def error(found: list[np.ndarray]) -> float:
        return max(problem.violation(w) for problem, w in zip(sample, found, strict=True))

    note = f"{len(sample)} targets, violation {peer.accuracy:.0e}" + (f", tol {tolerance:.0e}" if tolerance < 1 else "")
    return Contender(peer.name, run, len(sample), error, PEER_SLACK * peer.accuracy, goal, note)


def spread(order: Tensor, count: int) -> list[int]:
    """`count` entries of `order` at the middles of as many equal parts."""
    count = min(count, len(order))
    return [int(order[(2 * i + 1) * len(order) // (2 * count)]) for i in range(count)]


def sample_size(peer: rivals.Peer, pilots: list[rivals.Problem], tolerance: float, budget: Budget) -> int:
    """As many targets as fit in a round of the budget, by the time of the pilots, 3 at least."""
    start = time.perf_counter()
    for problem in pilots:
        peer.solve(problem, tolerance)
    each = (time.perf_counter() - start) / len(pilots)
    return max(3, min(MOST_TARGETS, int(budget.round_seconds / each)))


def problem_of(cov: Tensor, ratio: float, target: int) -> rivals.Problem:
    """The problem of one target in float64; those of one covariance share its memory and its root."""
    return _problem(_Key(cov), ratio, target)


class _Key:
    """A covariance as a dictionary key: by identity."""

    def __init__(self, cov: Tensor) -> None:
        self.cov = cov

    def __hash__(self) -> int:
        return id(self.cov)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.cov is self.cov


@functools.lru_cache(1)
def _float64_and_root(key: _Key) -> tuple[np.ndarray, np.ndarray]:
    cov = key.cov.double().numpy()
    return cov, rivals.root_of(cov)


@functools.lru_cache(MOST_TARGETS)
def _problem(key: _Key, ratio: float, target: int) -> rivals.Problem:
    cov, root = _float64_and_root(key)
    strongest = np.abs(np.delete(cov[target], target)).max()
    return rivals.Problem(cov, target, ratio * float(strongest), root)
