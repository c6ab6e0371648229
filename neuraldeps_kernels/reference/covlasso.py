"""Covariance Lasso in plain PyTorch, float64: the oracle of the tests and the fallback where no kernel serves.

Problem t of T, for theta [m] over the predictors:

    minimise  theta' S theta - 2 c_t.theta + v_t + ridge |theta|^2 + lam_t sum_j penalty_j |theta_j| ,    lam_t > 0

(theta >= 0 if `nonnegative`). Within one covariance S = cov [n, n], i = targets[t]: c_t = S_i, v_t = S_ii and i itself
is no predictor; this is Theta' S Theta + lam |theta|_1 with Theta_i = -1 pinned. Across two sets of categories S = cov
[m, m] of the predictors (or [T, m, m], one matrix a problem), c_t = cross[i], v_t = variance[i], nothing is left out.
There is no factor 1/2: lam is twice the alpha of the usual library lasso. With the covariance of the residual with
every predictor, rho = c - S theta - ridge theta, theta is optimal iff for every j

    rho_j = (lam/2) penalty_j sign(theta_j)  where theta_j != 0,     |rho_j| <= (lam/2) penalty_j  where theta_j = 0 ,

the last without the bars if `nonnegative`. Every function takes the problem in the same form:

    cov [m, m] or [T, m, m]; targets int64 [T]; lam float64 [T] or a scalar tensor; penalty None (all ones), [m] or
    [T, m], positive, +inf where predictor j may not be used; cross [q, m] and variance [q], the rows that `targets`
    indexes, or None for both; nonnegative; ridge >= 0. A function ignores what its result does not depend on.

theta [T, m] is float64, 0 at the target itself; bound = (lam/2) penalty [T, m]. Nothing here is differentiable:
`gradients` states the derivatives. err2 = v - 2 c.theta + theta' S theta has neither ridge nor penalty.

`covlasso` and `path` (coordinate descent and a Newton step on the face of the current signs) solve one lam at a time
and from zero, `homotopy` and `top_k` follow the kinks of the whole path: two independent ways to the same theta.

Source: the problem is that of "Neural Dependencies Emerging from Learning Massive Categories" (arXiv 2211.12339); the
solvers and the derivatives are ours. The homotopy is the Lasso variant of least angle regression (Efron, Hastie,
Johnstone, Tibshirani, 2004), with the direction at ties found as a least-squares problem with sign constraints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SWEEPS = 3  # coordinate sweeps between two Newton steps
NEW_CATEGORIES = 16  # least number of violators that may join the working set in a round
RIDGES = (1e-12, 1e-9, 1e-6, 1e-3, 1.0)  # of the unit diagonal: the first is used that makes the Newton system definite
CHUNK_ELEMENTS = 1 << 26  # float64 elements of the gathered sub-matrices of one chunk of targets
TIE = 1e-10  # of the bound: predictors so near to it have reached it (homotopy)
ROUNDING = 1e-13  # of sqrt(S_jj v): rounding of rho_j (homotopy)


class Segment(NamedTuple):
    """Stretch low < lam < high of one path on which the support a and its signs do not change.

    There theta_a(lam) = (S_aa + ridge)^-1 (c_a - (lam/2) penalty_a signs), continuous from segment to segment.
    """

    high: float
    low: float
    support: Tensor  # int64 [k], increasing
    signs: Tensor  # float64 [k]


class TopK(NamedTuple):
    """First segment, from large lam to small, with exactly k nonzero coefficients, and the solution at one point."""

    theta: Tensor  # [T, m]
    lam: Tensor  # [T]
    high: Tensor  # [T]
    low: Tensor  # [T]
    found: Tensor  # bool [T]


def lambda_max(
    cov: Tensor,
    targets: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """Smallest lam with an empty support: 2 max_j |c_j| / penalty_j, float64 [T]; 0 where nothing may enter."""
    problems = _problems(cov, targets, penalty, cross, variance, ridge)
    strength = problems.c.clamp_min(0) if nonnegative else problems.c.abs()
    return 2 * (strength / problems.factors).amax(1)


def covlasso(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-12,
    max_rounds: int = 200,
) -> Tensor:
    """theta [T, m] float64 of `targets` int64 [T] at `lam` [T] (or a scalar tensor).

    A target is left when its KKT violation is at most `tol` (relative to lambda_max / 2, see `kkt_violation`), after
    `max_rounds` rounds, or when its objective is so negative that S cannot be positive semidefinite; the caller checks
    which. The result is finite in any case. Works on every device that has float64.
    """
    A, c, v, factors = _problems(cov, targets, penalty, cross, variance, ridge)
    curvature = A.diagonal(dim1=1, dim2=2)  # [1 or T, m]
    # Powers of two that bring the diagonals to [1/2, 2]: f'_j = unit_j f_j changes no bit of any product.
    unit, own = _power_of_two(curvature), _power_of_two(v)[:, None]
    top = lambda_max(cov, targets, penalty, cross=cross, variance=variance, nonnegative=nonnegative)[:, None]
    bound = torch.where(curvature > 0, _bound(factors, lam) * own * unit, torch.inf)
    allowed = tol / 2 * top * own * unit
    A, c, v = unit[:, :, None] * A * unit[:, None, :], c * own * unit, v * own[:, 0] ** 2
    theta = torch.zeros_like(c)
    chunk = max(1, CHUNK_ELEMENTS // max(1, c.shape[1] ** 2))
    for t in range(0, len(c), chunk):
        rows = slice(t, t + chunk)
        own_rows = A if len(A) == 1 else A[rows]
        theta[rows] = _solve(own_rows, c[rows], v[rows], bound[rows], allowed[rows], nonnegative, max_rounds)
    return theta * unit / own


def path(
    cov: Tensor,
    targets: Tensor,
    lams: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-12,
) -> Tensor:
    """theta [T, L, m] at every lam of `lams` [L] or [T, L], each solved from zero, so that no order matters."""
    lams = lams.expand(len(targets), lams.shape[-1])
    solved = [
        covlasso(
            cov, targets, lam, penalty, cross=cross, variance=variance, nonnegative=nonnegative, ridge=ridge, tol=tol
        )
        for lam in lams.unbind(1)
    ]
    return torch.stack(solved, 1)


def top_k(
    cov: Tensor,
    targets: Tensor,
    k: int,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    position: float = 1e-3,
) -> TopK:
    """First segment of each path with exactly k >= 1 nonzeros, solved at lam = high - position (high - low).

    The number of nonzeros is not monotone in lam: k may come back at smaller lam. Where no segment has k nonzeros,
    theta is the end of the path, high = low = lam are the lam of it (see `homotopy`), and `found` is False.
    """
    problems = _problems(cov, targets, penalty, cross, variance, ridge)
    theta, ends = torch.zeros_like(problems.c), torch.zeros(len(targets), 2, dtype=torch.float64)
    found = torch.zeros_like(targets, dtype=torch.bool)
    for t in range(len(targets)):
        A, c, factors = problems.A[min(t, len(problems.A) - 1)], problems.c[t], problems.factors[t]
        last = None
        for last in _segments(A, c, problems.v[t], factors, nonnegative):
            if len(last.support) == k:
                found[t] = True
                break
        if last is None:
            continue
        high, low, support, signs = last if found[t] else last._replace(high=last.low)
        ends[t] = torch.tensor([high, low], dtype=torch.float64)
        theta[t] = _on_segment(A, c, factors, support, signs, high - position * (high - low))
    highs, lows = ends.to(theta.device).unbind(1)
    return TopK(theta, highs - position * (highs - lows), highs, lows, found)


def homotopy(
    cov: Tensor,
    target: int,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> list[Segment]:
    """All segments of the path of one target, from lambda_max (the first `high`) to 0.

    The path ends earlier, with the last `low` above 0, where the predictors that would be used next are dependent to
    rounding.
    """
    which = torch.tensor([target], device=cov.device)
    A, c, v, factors = _problems(cov, which, penalty, cross, variance, ridge)
    return list(_segments(A[0], c[0], v[0], factors[0], nonnegative))


def residual_covariance(
    cov: Tensor,
    theta: Tensor,
    targets: Tensor,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """rho [T, m] = c - S theta - ridge theta: covariance of the residual with every predictor less the ridge's part.

    Within one covariance the entry at the target itself is that of the residual with the target, E[e f_i].
    """
    problems = _problems(cov, targets, None, cross, variance, ridge)
    return problems.c - _product(problems.A, theta.double())


def err2(
    cov: Tensor,
    theta: Tensor,
    targets: Tensor,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """Mean squared residual v - 2 c.theta + theta' S theta, without ridge and penalty, float64 [T]."""
    A, c, v, _ = _problems(cov, targets, None, cross, variance, 0.0)
    theta = theta.double()
    return (v - (theta * c).sum(1)) - (theta * (c - _product(A, theta))).sum(1)


def kkt_violation(
    cov: Tensor,
    theta: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """Largest violation of the optimality conditions, relative to lambda_max / 2, float64 [T].

    0 where lambda_max = 0 (nothing correlates with the target) and theta = 0; +inf where an excluded category is used,
    or a negative coefficient where none is allowed.
    """
    A, c, _, factors = _problems(cov, targets, penalty, cross, variance, ridge)
    theta = theta.double()
    violation = _violation(c - _product(A, theta), theta, _bound(factors, lam), nonnegative)
    worst = violation.amax(1).clamp_min(0)
    top = lambda_max(cov, targets, penalty, cross=cross, variance=variance, nonnegative=nonnegative)
    return torch.where(worst == 0, 0.0, worst / (top / 2))  # NaN stays NaN


def duality_gap(
    cov: Tensor,
    theta: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """Primal minus dual objective, float64 [T], in the units of v; bounds the excess of the objective if S is PSD.

    With tau = min(1, min_j bound_j / |rho_j|) (over rho_j > 0 if `nonnegative`) the scaled residual tau e is dual
    feasible and gap = err2 + 2 sum_j bound_j |theta_j| - 2 tau E[e f_i] + tau^2 err2, where E[e f_i] = v - c.theta and
    err2 includes ridge |theta|^2: the ridge is one more sample per predictor, on which the target is 0.
    """
    A, c, v, factors = _problems(cov, targets, penalty, cross, variance, ridge)
    bound, theta = _bound(factors, lam), theta.double()
    rho = c - _product(A, theta)
    residual_target = v - (theta * c).sum(1)
    error = residual_target - (theta * rho).sum(1)
    size = rho.clamp_min(0) if nonnegative else rho.abs()
    tau = torch.where(size > bound, bound / size, 1.0).amin(1)
    norm = torch.where(theta != 0, bound * theta.abs(), 0.0).sum(1)
    return error + 2 * norm - 2 * tau * residual_target + tau**2 * error


def gradients(
    cov: Tensor,
    theta: Tensor,
    targets: Tensor,
    grad_theta: Tensor,
    penalty: Tensor | None = None,
    *,
    cross: Tensor | None = None,
    variance: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
) -> tuple[Tensor, ...]:
    """(dL/dcov like cov, symmetric; dL/dlam [T]; with `cross` dL/dcross like it) from grad_theta = dL/dtheta [T, m].

    Off the kinks of the path: on the support a, with A = S_aa + ridge, s = sign(theta_a) and u = grad_theta,
    w_a = A^-1 u_a (zero elsewhere),  dL/dS = -(w theta' + theta w') / 2,  dL/dc = w,
    dL/dlam = -(1/2) sum_j penalty_j s_j w_j.
    Within one covariance c belongs to S: then theta is extended by the pinned -1 in dL/dS. The sign constraint of a
    nonnegative problem changes nothing on the support, and theta does not depend on v.
    """
    A, _, _, factors = _problems(cov, targets, penalty, cross, variance, ridge)
    grad_cov, grad_lam = torch.zeros_like(A), torch.zeros_like(factors[:, 0])
    grad_cross = None if cross is None else torch.zeros_like(cross, dtype=torch.float64)
    for t, i in enumerate(targets.tolist()):
        a, matrix = theta[t].nonzero()[:, 0], min(t, len(A) - 1)
        w = torch.zeros_like(factors[t])
        w[a] = torch.linalg.solve(A[matrix][a][:, a], grad_theta[t, a].double())
        extended = theta[t].double().clone()
        if grad_cross is None:
            extended[i] = -1
        else:
            grad_cross[i] += w
        product = torch.outer(w, extended)
        grad_cov[matrix] -= (product + product.T) / 2
        grad_lam[t] = -(w[a] * factors[t, a] * theta[t, a].sign()).sum() / 2
    found = grad_cov.view(cov.shape), grad_lam
    return found if grad_cross is None else (*found, grad_cross)


# ---------------------------------------------------------------------------------------------------------- the problem


class _Problems(NamedTuple):
    """Problems theta' A theta - 2 c.theta + v + lam factors.|theta|."""

    A: Tensor  # [1 or T, m, m], the ridge on its diagonal
    c: Tensor  # [T, m]
    v: Tensor  # [T]
    factors: Tensor  # [T, m], +inf where a predictor may not be used, the target itself included


def _problems(
    cov: Tensor, targets: Tensor, penalty: Tensor | None, cross: Tensor | None, variance: Tensor | None, ridge: float
) -> _Problems:
    if (cross is None) != (variance is None):
        raise ValueError(f"variance must be {'left out' if cross is None else 'given'}, as cross is")
    S = cov.detach().double()
    A = (S if S.dim() == 3 else S[None]) + ridge * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    c = (S if cross is None else cross.detach().double())[targets]
    v = (S.diagonal() if variance is None else variance.detach().double())[targets]
    factors = torch.ones_like(c) if penalty is None else torch.ones_like(c) * penalty.detach().double()
    if cross is None:
        factors = factors.scatter(1, targets[:, None], torch.inf)
    return _Problems(A, c, v, factors)


def _bound(factors: Tensor, lam: Tensor) -> Tensor:
    """(lam/2) penalty [T, m] float64; +inf where a predictor is excluded, whatever lam."""
    half = lam.detach().double().to(factors.device).expand(len(factors))[:, None] / 2
    return torch.where(factors.isinf(), torch.inf, half * factors)


def _product(A: Tensor, x: Tensor) -> Tensor:
    """A_t x_t [T, m] for A [1 or T, m, m] symmetric and x [T, m]."""
    return x @ A[0] if len(A) == 1 else torch.bmm(A, x[:, :, None])[:, :, 0]


def _power_of_two(variance: Tensor) -> Tensor:
    """2^-k nearest to variance^(-1/2); 1 where the variance is not positive."""
    exponent = torch.where(variance > 0, -(variance.clamp_min(1e-300).log2() / 2).round(), 0.0)
    return torch.ldexp(torch.ones_like(variance), exponent)


# ---------------------------------------------------------------------------------------------- one lam, from zero


def _violation(rho: Tensor, theta: Tensor, bound: Tensor, nonnegative: bool) -> Tensor:
    """Distance of rho from the subdifferential of bound |theta|, [T, m]; at most 0 where the condition holds."""
    on_support = (rho - bound * theta.sign()).abs()
    if not nonnegative:
        return torch.where(theta != 0, on_support, rho.abs() - bound)
    return torch.where(theta < 0, torch.inf, torch.where(theta > 0, on_support, rho - bound))


def _solve(
    A: Tensor, c: Tensor, v: Tensor, bound: Tensor, allowed: Tensor, nonnegative: bool, max_rounds: int
) -> Tensor:
    """theta with violation <= allowed [T, m]: grow a working set, solve on it, look at all predictors again."""
    m = c.shape[1]
    # One predictor that correlates with nothing fills the unused places of shorter working sets.
    A = torch.nn.functional.pad(A, (0, 1, 0, 1))
    A[:, m, m] = 1
    c = torch.nn.functional.pad(c, (0, 1))
    bound = torch.nn.functional.pad(bound, (0, 1), value=1.0)
    theta = torch.zeros_like(c)
    live = torch.arange(len(c), device=c.device)
    for _ in range(max_rounds):
        matrix = live if len(A) > 1 else torch.zeros_like(live)  # the A of each problem
        rho = c[live] - _product(A if len(A) == 1 else A[live], theta[live])
        violation = _violation(rho, theta[live], bound[live], nonnegative)[:, :m]
        unsolved = (violation > allowed[live]).any(1)
        live, matrix = live[unsolved], matrix[unsolved]
        if live.numel() == 0:
            break
        index = _working_set(theta[live, :m], violation[unsolved])  # [L, K], m where unused
        Q = A[matrix[:, None, None], index[:, :, None], index[:, None, :]]  # [L, K, K]
        q, limits = c[live[:, None], index], bound[live[:, None], index]  # [L, K]
        x = _descend(Q, q, limits, theta[live[:, None], index], nonnegative)
        # err2 >= 0 bounds the objective below by -v if S is a covariance; far below there is no minimum to find.
        sound = _objective(Q, q, limits, x)[:, 0] > -2 * v[live]
        live, index, x = live[sound], index[sound], x[sound]
        theta[live[:, None], index] = x
    return theta[:, :m]


def _working_set(theta: Tensor, violation: Tensor) -> Tensor:
    """Support and worst violators of each target (no more new than old ones), increasing, then m: int64 [T, K]."""
    m = theta.shape[1]
    support = theta != 0
    size = support.sum(1)
    limit = size + size.clamp_min(NEW_CATEGORIES)  # [T]
    key = torch.where(support, torch.inf, violation)
    value, index = key.topk(min(m, int(limit.max())), dim=1)
    used = (value > 0) & (torch.arange(value.shape[1], device=value.device) < limit[:, None])
    index = torch.where(used, index, m).sort(1).values
    return index[:, : int(used.sum(1).max())]


def _descend(Q: Tensor, q: Tensor, bound: Tensor, x: Tensor, nonnegative: bool) -> Tensor:
    """Cyclic sweeps, then Newton steps until no sign changes, on x' Q x - 2 q.x + 2 bound.|x|: x [T, K], Q [T, K, K].

    The objective never rises.
    """
    x = x.clone()
    rho = q - (Q @ x[:, :, None])[:, :, 0]
    curvature = Q.diagonal(dim1=1, dim2=2)
    for _ in range(SWEEPS):
        for j in range(x.shape[1]):
            z = curvature[:, j] * x[:, j] + rho[:, j]
            size = (z if nonnegative else z.abs()) - bound[:, j]
            new = torch.sign(z) * size.clamp_min(0) / curvature[:, j]
            rho -= (new - x[:, j])[:, None] * Q[:, j]
            x[:, j] = new
    rows = torch.arange(x.shape[0], device=x.device)
    for _ in range(x.shape[1]):
        x[rows], flipped = _newton_step(Q[rows], q[rows], bound[rows], x[rows])
        rows = rows[flipped]
        if rows.numel() == 0:
            break
    return x


def _newton_step(Q: Tensor, q: Tensor, bound: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser on the face of the present signs, or the better of two points on the way, and whether signs change.

    These are the first sign change on the segment, and the minimiser with the changed signs set to zero. The objective
    falls along the segment whatever the rank of Q (ridged, the step stays finite), so the first point never ascends.
    """
    active = x != 0
    slope = torch.where(active, q - (Q @ x[:, :, None])[:, :, 0] - bound * x.sign(), 0.0)
    step = _solve_ridged(torch.where(active[:, :, None] & active[:, None, :], Q, 0.0), active, slope)
    flips = active & ((x + step) * x <= 0)
    reach = torch.where(flips, -x / step, 1.0).amin(1, keepdim=True) if x.shape[1] else x
    first = torch.where(flips & (-x / step <= reach), 0.0, x + reach * step)
    clipped = torch.where(flips, 0.0, x + step)
    better = _objective(Q, q, bound, clipped) <= _objective(Q, q, bound, first)
    return torch.where(better, clipped, first), flips.any(1)


def _solve_ridged(face: Tensor, active: Tensor, slope: Tensor) -> Tensor:
    """step [T, K] with (face + ridge) step = slope on the active part; zero where no ridge makes the face definite."""
    step = torch.zeros_like(slope)
    rows = torch.arange(face.shape[0], device=face.device)
    for ridge in RIDGES:
        system = face[rows]
        system.diagonal(dim1=1, dim2=2).add_(torch.where(active[rows], ridge, 1.0))
        factor, info = torch.linalg.cholesky_ex(system)
        solved = torch.cholesky_solve(slope[rows, :, None], factor)[:, :, 0]
        good = (info == 0) & solved.isfinite().all(1)
        step[rows[good]] = solved[good]
        rows = rows[~good]
        if rows.numel() == 0:
            break
    return step


def _objective(Q: Tensor, q: Tensor, bound: Tensor, x: Tensor) -> Tensor:
    """x' Q x - 2 q.x + 2 bound.|x|, [T, 1]: the objective less v."""
    return (x * ((Q @ x[:, :, None])[:, :, 0] - 2 * q) + 2 * bound * x.abs()).sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------ the path by its kinks


def _segments(A: Tensor, c: Tensor, v: Tensor, factors: Tensor, nonnegative: bool) -> Iterator[Segment]:
    """Segments of one path in turn: A [m, m] with the ridge, c and factors [m], v scalar."""
    lam = 2 * float(((c.clamp_min(0) if nonnegative else c.abs()) / factors).max())
    end = 1e-9 * lam
    rounding = ROUNDING * (A.diagonal().clamp_min(0) * v).sqrt()
    support, reached = torch.zeros_like(c, dtype=torch.bool), torch.zeros_like(c, dtype=torch.bool)
    signs, current = torch.zeros_like(c), None
    while lam > end:
        theta = _on_segment(A, c, factors, support.nonzero()[:, 0], signs[support], lam)
        rho, bound = c - A @ theta, lam / 2 * factors
        size = rho if nonnegative else rho.abs()
        tied = support | reached | ((size >= bound * (1 - TIE) - rounding) & factors.isfinite())
        signs = torch.where(support, signs, rho.sign())
        slope = _direction(A, factors, tied, support, signs)  # d theta / d(-lam/2)
        if slope is None:
            break
        support = support | (slope != 0)
        half, dropped, reached = _next_event(A, theta, rho, factors, slope, support, tied, lam, nonnegative)
        a = support.nonzero()[:, 0]
        same = current is not None and torch.equal(current.support, a) and torch.equal(current.signs, signs[a])
        if current is not None and not same:
            yield current
        high = current.high if current is not None and same else lam
        lam = 0.0 if lam - 2 * half <= end else lam - 2 * half
        current = Segment(high, lam, a, signs[a])
        support = support & ~dropped
    if current is not None:
        yield current


def _on_segment(A: Tensor, c: Tensor, factors: Tensor, support: Tensor, signs: Tensor, lam: float) -> Tensor:
    """theta [m]: A_aa theta_a = c_a - (lam/2) penalty_a signs, zero off the support a."""
    theta = torch.zeros_like(c)
    if len(support):
        right = c[support] - lam / 2 * factors[support] * signs
        theta[support] = torch.linalg.solve(A[support][:, support], right)
    return theta


def _direction(A: Tensor, factors: Tensor, tied: Tensor, support: Tensor, signs: Tensor) -> Tensor | None:
    """Change [m] of theta per decrease of lam/2, right after a kink.

    It minimises (1/2) d' A d - (penalty signs).d over the `tied` predictors, those at their bound, where one whose
    coefficient is still zero may only move away from zero on its side: signs_j d_j >= 0. This decides which of several
    tied predictors enter. The method is that of Lawson and Hanson (1974) with the support always free. None if A is not
    positive definite, to rounding, on the predictors that enter.
    """
    d, member, weight = torch.zeros_like(factors), support.clone(), torch.where(tied, factors, 0.0) * signs
    for _ in range(10 + 3 * len(factors)):  # in exact arithmetic it ends; rounding may make it turn round
        wanted, a = torch.zeros_like(d), member.nonzero()[:, 0]
        triangle, failed = torch.linalg.cholesky_ex(A[a][:, a])
        if failed:
            return None
        wanted[a] = torch.cholesky_solve(weight[a, None], triangle)[:, 0]
        wrong = member & ~support & (wanted * signs <= 0)
        if wrong.any():  # go as far as the constraints allow, and give up what has become zero
            reach = torch.where(wrong, d / (d - wanted), torch.inf)
            d = d + reach.min() * (wanted - d)
            member &= ~(wrong & (reach <= reach.min()))
            d[~member] = 0
            continue
        d = wanted
        gain = torch.where(tied & ~member, (weight - A @ d) * signs, 0.0)
        if gain.max() <= 1e-9 * factors[tied].max():
            return d
        member[gain.argmax()] = True
    return None


def _next_event(
    A: Tensor,
    theta: Tensor,
    rho: Tensor,
    factors: Tensor,
    slope: Tensor,
    support: Tensor,
    tied: Tensor,
    lam: float,
    nonnegative: bool,
) -> tuple[float, Tensor, Tensor]:
    """(decrease of lam/2 to the next kink, predictors whose coefficient is zero there, those that reach the bound)."""
    fall, bound = A @ slope, lam / 2 * factors  # rho falls by `fall` per unit, the bound by `factors`
    to_zero = torch.where(support & (theta * slope < 0), -theta / slope, torch.inf)
    outside = ~support & factors.isfinite()
    above = outside & ~(tied & (rho > 0)) & (factors > fall)
    below = outside & ~(tied & (rho < 0)) & (factors > -fall) & (not nonnegative)
    to_bound = torch.minimum(
        torch.where(above, (bound - rho) / (factors - fall), torch.inf),
        torch.where(below, (bound + rho) / (factors + fall), torch.inf),
    )
    half = min(lam / 2, float(to_zero.min()), float(to_bound.min()))
    return half, to_zero <= half * (1 + TIE), to_bound <= half * (1 + TIE)
