"""Lasso solvers of other packages on one target's problem, unmodified: each at its best setting, one thread.

All minimise `w' Q w / 2 - q' w + alpha |w|_1` with Q, q the covariance without the target and alpha = lam / 2. What a
peer needs beside that (the Gram matrix without the target, a root of the covariance, its own matrix object) is made
outside the timed part, which favours the peer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Solve = Callable[[Any, float], np.ndarray]  # (problem, tolerance) to w [n-1], or for a path [L, n-1]


@dataclass(frozen=True, eq=False)
class Problem:
    """CovLasso of one target as other packages state it."""

    cov: np.ndarray  # [n, n] float64, contiguous
    target: int
    alpha: float  # lam / 2
    root: np.ndarray  # [r, n], root' root = cov

    @functools.cached_property
    def gram(self) -> np.ndarray:
        """[n-1, n-1], C-contiguous."""
        return np.ascontiguousarray(np.delete(np.delete(self.cov, self.target, 0), self.target, 1))

    @functools.cached_property
    def gram32(self) -> np.ndarray:
        return self.gram.astype(np.float32)

    @functools.cached_property
    def correlation(self) -> np.ndarray:
        """[n-1]."""
        return np.delete(self.cov[self.target], self.target)

    @functools.cached_property
    def norm(self) -> float:
        """Standard deviation of the target: a "sample" of length 1 whose square is its variance."""
        return float(self.cov[self.target, self.target]) ** 0.5

    @functools.cached_property
    def design(self) -> np.ndarray:
        """[r, n-1], Fortran-ordered: rows whose products are those of the covariance."""
        return np.asfortranarray(np.delete(self.root, self.target, 1))

    @functools.cached_property
    def response(self) -> np.ndarray:
        """[r]."""
        return np.ascontiguousarray(self.root[:, self.target])

    @functools.cached_property
    def adelie_matrix(self) -> Any:
        import adelie

        return adelie.matrix.dense(np.asfortranarray(self.gram), method="cov", n_threads=1)

    @functools.cached_property
    def scm_model(self) -> Any:
        from scm2cpp_learn import CovLasso

        return CovLasso(gram=self.gram, corr=self.correlation, nobs=1)

    def violation(self, w: np.ndarray, alpha: float | None = None) -> float:
        """Largest violation of the optimality conditions at `alpha`, default the problem's, by w [n-1]; over
        max_j |q_j|, in float64.
        """
        alpha = self.alpha if alpha is None else alpha
        w = np.asarray(w, np.float64)
        support = np.flatnonzero(w)
        gradient = self.gram[:, support] @ w[support] - self.correlation
        violation = np.maximum(np.abs(gradient) - alpha, 0)
        violation[support] = np.abs(gradient[support] + alpha * np.sign(w[support]))
        return float(violation.max() / np.abs(self.correlation).max())


@dataclass(frozen=True, eq=False)
class PathProblem:
    """CovLasso of one target at falling penalties."""

    problem: Problem
    alphas: np.ndarray  # [L] lam / 2, falling

    def violation(self, path: np.ndarray) -> float:
        """Largest over the path w [L, n-1]."""
        return max(self.problem.violation(w, float(a)) for w, a in zip(path, self.alphas, strict=True))


@dataclass(frozen=True)
class Peer:
    """One way to solve a `Problem`, or a `PathProblem`."""

    name: str
    package: str  # module that must be importable
    accuracy: float  # violation at which it is compared
    decades: Sequence[int]  # tolerances 10^-d tried, loosest first
    solve: Solve


def root_of(cov: np.ndarray) -> np.ndarray:
    """[r, n] with root' root = cov, r the numerical rank."""
    values, vectors = np.linalg.eigh(cov)
    kept = values > values[-1] * 1e-12
    return np.ascontiguousarray((vectors[:, kept] * np.sqrt(values[kept])).T)


def import_failure(peer: Peer) -> str | None:
    """Why the package cannot be used; None if it can."""
    try:
        importlib.import_module(peer.package)
    except Exception as error:  # a compiled package may fail at import in its own ways
        return f"{peer.package} not importable ({type(error).__name__})"
    return None


def loosest_tolerance(peer: Peer, problems: Sequence[Problem | PathProblem], seconds: float) -> float | str:
    """The loosest power of ten at which all problems reach the peer's accuracy, or why there is none.

    The search ends after `seconds`, at the earliest when the solve in progress returns.
    """
    reached = float("inf")
    peer.solve(problems[0], 10.0 ** -peer.decades[0])  # some compile themselves at the first call
    end = time.perf_counter() + seconds
    for decade in peer.decades:
        worst = 0.0
        for problem in problems:
            worst = max(worst, problem.violation(peer.solve(problem, 10.0**-decade)))
            if time.perf_counter() > end:
                return f"no tolerance found in {seconds:g} s, last violation {worst:.0e} at 1e-{decade}"
            if not worst <= peer.accuracy:
                break
        reached = min(reached, worst)
        if worst <= peer.accuracy:
            return 10.0**-decade
    return f"misses {peer.accuracy:.0e} at any tolerance, best {reached:.0e}"


# ------------------------------------------------------------------------------------------------ solvers


def _sklearn_gram(problem: Problem, tol: float, dtype: type, max_iter: int) -> np.ndarray:
    from sklearn.linear_model import _cd_fast

    gram = problem.gram if dtype is np.float64 else problem.gram32
    correlation, norm = problem.correlation.astype(dtype), np.array([problem.norm], dtype)
    start, chance = np.zeros(len(gram), dtype), np.random.RandomState(0)
    # The nine arguments that all versions share; later ones (random, positive, do_screening) have defaults.
    return _cd_fast.enet_coordinate_descent_gram(
        start, problem.alpha, 0.0, gram, correlation, norm, max_iter, tol, chance
    )[0]


def _sklearn_gram_f64(problem: Problem, tol: float) -> np.ndarray:
    return _sklearn_gram(problem, tol, np.float64, 30_000)


def _sklearn_gram_f32(problem: Problem, tol: float) -> np.ndarray:
    return _sklearn_gram(problem, tol, np.float32, 3_000)


def _sklearn_lasso(problem: Problem, tol: float) -> np.ndarray:
    from sklearn.linear_model import Lasso

    model = Lasso(
        alpha=problem.alpha / len(problem.response),
        precompute=problem.gram,
        fit_intercept=False,
        tol=tol,
        max_iter=30_000,
    )
    return model.fit(problem.design, problem.response).coef_


def _sklearn_lars(problem: Problem, tol: float) -> np.ndarray:
    from sklearn.linear_model import lars_path_gram

    return lars_path_gram(
        problem.correlation, problem.gram, n_samples=1, alpha_min=problem.alpha, method="lasso", return_path=False
    )[2]


def _adelie(problem: Problem, tol: float) -> np.ndarray:
    import adelie

    with contextlib.redirect_stdout(io.StringIO()):
        state = adelie.solver.gaussian_cov(
            problem.adelie_matrix,
            problem.correlation,
            lmda_path=np.array([problem.alpha]),
            tol=tol,
            early_exit=False,
            rdev_tol=0,
            max_iters=10**7,
            progress_bar=False,
        )
    return state.betas.toarray()[-1]


def _celer(problem: Problem, tol: float) -> np.ndarray:
    from celer import celer_path

    alpha = problem.alpha / len(problem.response)
    return celer_path(problem.design, problem.response, "lasso", alphas=[alpha], tol=tol)[1][:, 0]


def _skglm(problem: Problem, tol: float) -> np.ndarray:
    from skglm.datafits import QuadraticHessian
    from skglm.penalties import L1
    from skglm.solvers import AndersonCD

    scale = np.abs(problem.correlation).max()  # its tolerance is an absolute violation
    solver = AndersonCD(tol=tol * scale, fit_intercept=False)
    return solver.solve(problem.gram, -problem.correlation, QuadraticHessian(), L1(problem.alpha))[0]


def _scm2cpp(problem: Problem, tol: float) -> np.ndarray:
    return problem.scm_model.fit(problem.alpha, tol=tol, max_sweeps=20_000)


PEERS = (
    Peer("scikit-learn Gram kernel f64", "sklearn", 1e-6, range(4, 17), _sklearn_gram_f64),
    Peer("scikit-learn Gram kernel f32", "sklearn", 1e-4, range(3, 8), _sklearn_gram_f32),
    Peer("scikit-learn Lasso(precompute)", "sklearn", 1e-6, range(4, 17), _sklearn_lasso),
    Peer("scikit-learn lars_path_gram", "sklearn", 1e-6, (0,), _sklearn_lars),
    Peer("adelie gaussian_cov", "adelie", 1e-6, range(11, 18), _adelie),
    Peer("celer_path on cov^(1/2)", "celer", 1e-6, range(4, 17), _celer),
    Peer("skglm AndersonCD on the Gram", "skglm", 1e-6, range(5, 10), _skglm),
    Peer("scm2cpp-learn CovLasso", "scm2cpp_learn", 1e-6, range(4, 13), _scm2cpp),
)


# ------------------------------------------------------------------------------------------------ solvers of a path


def _sklearn_gram_path(path: PathProblem, tol: float, dtype: type, max_iter: int) -> np.ndarray:
    """As scikit-learn's own path: the coefficients at one penalty start the next."""
    from sklearn.linear_model import _cd_fast

    problem = path.problem
    gram = problem.gram if dtype is np.float64 else problem.gram32
    correlation, norm = problem.correlation.astype(dtype), np.array([problem.norm], dtype)
    w, chance = np.zeros(len(gram), dtype), np.random.RandomState(0)
    found = np.empty((len(path.alphas), len(gram)), dtype)
    for row, alpha in zip(found, path.alphas, strict=True):
        w = _cd_fast.enet_coordinate_descent_gram(w, alpha, 0.0, gram, correlation, norm, max_iter, tol, chance)[0]
        row[:] = w
    return found


def _sklearn_gram_path_f64(path: PathProblem, tol: float) -> np.ndarray:
    return _sklearn_gram_path(path, tol, np.float64, 30_000)


def _sklearn_gram_path_f32(path: PathProblem, tol: float) -> np.ndarray:
    return _sklearn_gram_path(path, tol, np.float32, 3_000)


def _sklearn_lars_path(path: PathProblem, tol: float) -> np.ndarray:
    """The breakpoints of the whole path, and the penalties between them by interpolation, which is exact."""
    from sklearn.linear_model import lars_path_gram

    problem = path.problem
    alphas, _, w = lars_path_gram(
        problem.correlation, problem.gram, n_samples=1, alpha_min=path.alphas[-1], method="lasso"
    )
    place = np.interp(-path.alphas, -alphas, np.arange(len(alphas)))
    low = np.minimum(place.astype(int), len(alphas) - 2)
    share = place - low
    return (w[:, low] * (1 - share) + w[:, low + 1] * share).T


def _adelie_path(path: PathProblem, tol: float) -> np.ndarray:
    import adelie

    with contextlib.redirect_stdout(io.StringIO()):
        state = adelie.solver.gaussian_cov(
            path.problem.adelie_matrix,
            path.problem.correlation,
            lmda_path=path.alphas,
            tol=tol,
            early_exit=False,
            rdev_tol=0,
            max_iters=10**7,
            progress_bar=False,
        )
    return state.betas.toarray()


def _celer_whole_path(path: PathProblem, tol: float) -> np.ndarray:
    from celer import celer_path

    problem = path.problem
    alphas = path.alphas / len(problem.response)
    return celer_path(problem.design, problem.response, "lasso", alphas=alphas, tol=tol)[1].T


PATH_PEERS = (
    Peer("scikit-learn Gram kernel f64, warm", "sklearn", 1e-6, range(4, 17), _sklearn_gram_path_f64),
    Peer("scikit-learn Gram kernel f32, warm", "sklearn", 1e-4, range(3, 8), _sklearn_gram_path_f32),
    Peer("scikit-learn lars_path_gram", "sklearn", 1e-6, (0,), _sklearn_lars_path),
    Peer("adelie gaussian_cov path", "adelie", 1e-6, range(11, 18), _adelie_path),
    Peer("celer_path on cov^(1/2)", "celer", 1e-6, range(4, 17), _celer_whole_path),
)


def silence_peers() -> None:
    """Convergence warnings say nothing here: what counts is the violation, and that is measured."""
    warnings.filterwarnings("ignore", module="sklearn|celer|skglm|adelie|scm2cpp_learn|numba")
    warnings.filterwarnings("ignore", message=".*[Cc]onverge.*")
