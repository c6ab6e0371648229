"""CovLasso along paths of penalties, and at an exact number of nonzeros, on the CPU: microseconds a target.

Ours solves many targets in one call. A peer solves a sample of them, each along the same penalties, warm-started in its
own way. Errors as in bench_covlasso, the largest along the path.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks import peers_covlasso as rivals
from benchmarks.bench_covlasso import (
    MAX_PIVOTS,
    largest_violation,
    lite0,
    problem_of,
    spread,
    synthetic,
    timed_peer,
)
from benchmarks.harness import Budget, Case, Contender, Missing, Recipe

PILOTS = 2  # targets on which a peer's tolerance is chosen
MOST_TARGETS = 8  # of a peer in a round
WARM = rivals.PATH_PEERS[0].name


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Paths, cheapest first, then exact numbers of nonzeros."""
    rivals.silence_peers()
    step = 10 if budget.quick else 1
    yield Recipe(
        "covlasso path synthetic, 20 to .1",
        lambda: path_case("synthetic, 20 to .1", synthetic(), 20, 0.1, step, budget, goals={WARM: 250}),
    )
    yield Recipe("covlasso path lite0, 20 to .1", lambda: path_case("lite0, 20 to .1", lite0(), 20, 0.1, step, budget))
    yield Recipe(
        "covlasso path lite0, 50 to .01",
        lambda: path_case("lite0, 50 to .01", lite0(), 50, 0.01, step, budget, 1200, {WARM: 280}),
    )
    yield Recipe("covlasso path lite0, 50 to .01, 2 threads", lambda: threads_case(lite0(), 50, 0.01, 2))
    for k in (5, 20, 50):
        yield Recipe(f"covlasso top {k} lite0", _top_k_recipe(k, step))


def _top_k_recipe(k: int, step: int) -> Callable[[], Case]:
    return lambda: top_k_case(lite0(), k, step)


def path_case(
    name: str,
    cov: Tensor,
    n_lambdas: int,
    lam_min_ratio: float,
    step: int,
    budget: Budget,
    goal_us: float | None = None,
    goals: dict[str, float] | None = None,
) -> Case:
    """Every `step`-th target along a geometric path: the operator in float32, the public call, peers."""
    targets = torch.arange(0, len(cov), step)
    path = nk.covlasso_path(cov, n_lambdas=n_lambdas, lam_min_ratio=lam_min_ratio, targets=targets)
    order = targets[path.n_nonzero.sum(1).argsort(stable=True)]
    public = Contender(
        "ours nk.covlasso_path",
        lambda: nk.covlasso_path(cov, n_lambdas=n_lambdas, lam_min_ratio=lam_min_ratio, targets=targets),
        len(targets),
        lambda found: _path_violation(cov, targets, found.lams, found.dense().double()),
        1e-6,
    )
    alphas = {int(t): (lams / 2).numpy() for t, lams in zip(targets, path.lams, strict=True)}
    return Case(
        f"covlasso path {name}",
        {"n": len(cov), "lambdas": n_lambdas, "lam_min_ratio": lam_min_ratio, "dtype": "float32", "tol": 1e-6},
        ours=path_operator(cov, targets, path.lams, goal_us),
        variants=(public,),
        peers=[path_peer(peer, cov, alphas, order, budget, (goals or {}).get(peer.name)) for peer in rivals.PATH_PEERS],
        facts={"targets": len(targets), "k at the end": f"{path.n_nonzero[:, -1].double().mean():.1f}"},
    )


def path_operator(cov: Tensor, targets: Tensor, lams: Tensor, goal: float | None = None) -> Contender:
    """`torch.ops.neuraldeps.covlasso` along the paths lams [T, L]."""
    capacity = int(nk.covlasso(cov, lams[:, -1], targets=targets).n_nonzero.max()) + 1

    def run() -> tuple[Tensor, ...]:
        return torch.ops.neuraldeps.covlasso(cov, targets, lams, None, 1e-6, MAX_PIVOTS, capacity)

    def error(result: tuple[Tensor, ...]) -> float:
        value, index, count, _ = result
        inside = torch.arange(capacity) < count[..., None]
        theta = torch.zeros(*count.shape, len(cov), dtype=torch.float64)
        theta.scatter_add_(2, index.long(), torch.where(inside, value.double(), 0.0))
        return _path_violation(cov, targets, lams, theta)

    return Contender("ours operator float32", run, len(targets), error, 1e-6, goal)


def _path_violation(cov: Tensor, targets: Tensor, lams: Tensor, theta: Tensor) -> float:
    """Of theta [T, L, n]."""
    return max(largest_violation(cov, theta[:, x], lams[:, x], targets) for x in range(lams.shape[1]))


def path_peer(
    peer: rivals.Peer, cov: Tensor, alphas: dict[int, np.ndarray], order: Tensor, budget: Budget, goal: float | None
) -> Contender | Missing:
    """The peer on a sample of targets, at the loosest tolerance that serves on the whole path."""
    if failure := rivals.import_failure(peer):
        return Missing(peer.name, failure)

    def problem(target: int) -> rivals.PathProblem:
        return rivals.PathProblem(problem_of(cov, 1.0, target), alphas[target])

    pilots = [problem(target) for target in spread(order, PILOTS)]
    start = time.perf_counter()
    tolerance = rivals.loosest_tolerance(peer, pilots, 4 * budget.search_seconds)
    if isinstance(tolerance, str):
        return Missing(peer.name, tolerance)
    each = (time.perf_counter() - start) / PILOTS
    sample = [problem(t) for t in spread(order, max(PILOTS, min(MOST_TARGETS, int(budget.case_seconds / each))))]

    return timed_peer(peer, sample, tolerance, goal)


def threads_case(cov: Tensor, n_lambdas: int, lam_min_ratio: float, threads: int) -> Case:
    """All targets in one public call on several threads; asked: 0.7 s for all 1000."""
    return Case(
        f"covlasso path lite0, {n_lambdas} to {lam_min_ratio:g}, {threads} threads",
        {"n": len(cov), "lambdas": n_lambdas, "lam_min_ratio": lam_min_ratio, "dtype": "float32", "tol": 1e-6},
        ours=Contender(
            "ours nk.covlasso_path",
            lambda: nk.covlasso_path(cov, n_lambdas=n_lambdas, lam_min_ratio=lam_min_ratio),
            len(cov),
            lambda found: float(found.kkt_violation.max()),
            1e-6,
            700.0,
        ),
        threads=threads,
    )


def top_k_case(cov: Tensor, k: int, step: int) -> Case:
    """Exactly k nonzeros, by homotopy in float64; beside it the cold solve at the penalties found."""
    targets = torch.arange(0, len(cov), step)
    found = nk.covlasso_top_k(cov, k, targets=targets)
    return Case(
        f"covlasso top {k} lite0",
        {"n": len(cov), "k": k, "dtype": "float64 inside", "tol": 1e-6},
        ours=Contender(
            "ours nk.covlasso_top_k",
            lambda: nk.covlasso_top_k(cov, k, targets=targets),
            len(targets),
            lambda solution: float(solution.kkt_violation.max()) if bool((solution.n_nonzero == k).all()) else 1.0,
            1e-6,
        ),
        variants=(
            Contender("ours nk.covlasso there", lambda: nk.covlasso(cov, found.lam, targets=targets), len(targets)),
        ),
        facts={"targets": len(targets)},
    )
