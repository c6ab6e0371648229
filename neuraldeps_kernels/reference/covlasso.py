"""Covariance Lasso in plain PyTorch, float64: the oracle of the tests and the fallback where no kernel serves.

For target i, with Theta_i = -1 pinned,

    Theta_i(lam) = argmin over Theta of  Theta' S Theta + lam * sum_j penalty_j |Theta_j| ,    lam > 0 .

There is no factor 1/2: lam is twice the alpha of the usual library lasso. With rho = -(S Theta), the covariance of the
residual with every category, Theta is optimal iff for every j != i

    rho_j = (lam/2) penalty_j sign(Theta_j)  where Theta_j != 0,     |rho_j| <= (lam/2) penalty_j  where Theta_j = 0 .

Notation: S = cov [n, n] symmetric; T targets; theta [T, n] float64 is Theta without the pinned entry (0 there);
penalty is None (all ones), [n] or [T, n], positive, +inf where category j may not be used; bound = (lam/2) penalty
[T, n]. Nothing here is differentiable: `gradients` states the derivatives.

Source: the problem is that of "Neural Dependencies Emerging from Learning Massive Categories" (arXiv 2211.12339); the
solver (coordinate descent and a Newton step on the face of the current signs) and the derivatives are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 3  # coordinate sweeps between two Newton steps
NEW_CATEGORIES = 16  # least number of violators that may join the working set in a round
RIDGES = (1e-12, 1e-9, 1e-6, 1e-3, 1.0)  # of the unit diagonal: the first is used that makes the Newton system definite
CHUNK_ELEMENTS = 1 << 26  # float64 elements of the gathered sub-matrices of one chunk of targets


def lambda_max(cov: Tensor, targets: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Smallest lam with an empty support: 2 max_{j != i} |S_ij| / penalty_j, float64 [T]; 0 where nothing may enter."""
    return 2 * (cov.detach().double()[targets].abs() / _penalty(cov, targets, penalty)).amax(1)


def covlasso(
    cov: Tensor,
    targets: Tensor,
    lam: Tensor,
    penalty: Tensor | None = None,
    *,
    tol: float = 1e-12,
    max_rounds: int = 200,
) -> Tensor:
    """theta [T, n] float64 of `targets` int64 [T] at `lam` [T] (or a scalar tensor).

    A target is left when its KKT violation is at most `tol` (relative to lambda_max / 2, see `kkt_violation`), after
    `max_rounds` rounds, or when its objective is so negative that S cannot be positive semidefinite; the caller checks
    which. The result is finite in any case. Works on every device that has float64.
    """
    S = cov.detach().double()
    diagonal = S.diagonal()
    # Powers of two that bring the diagonal to [1/2, 2]: f'_j = scale_j f_j changes no bit of any product.
    exponent = torch.where(diagonal > 0, -(diagonal.clamp_min(1e-300).log2() / 2).round(), 0.0)
    scale = torch.ldexp(torch.ones_like(diagonal), exponent)
    S = scale[:, None] * S * scale
    bound = _bound(cov, targets, lam, penalty) * scale[targets, None] * scale
    bound[:, diagonal <= 0] = torch.inf
    allowed = tol / 2 * lambda_max(cov, targets, penalty)[:, None] * scale[targets, None] * scale
    chunk = max(1, CHUNK_ELEMENTS // max(1, S.shape[0] ** 2))
    parts = [
        _solve(S, i, b, a, max_rounds) * scale / scale[i, None]
        for i, b, a in zip(targets.split(chunk), bound.split(chunk), allowed.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else bound


def residual_covariance(cov: Tensor, theta: Tensor, targets: Tensor) -> Tensor:
    """rho [T, n] = -(S Theta): covariance of the residual f_i - theta . f with every category, float64."""
    S = cov.detach().double()
    return S[targets] - theta.double() @ S


def err2(cov: Tensor, theta: Tensor, targets: Tensor) -> Tensor:
    """Mean squared residual Theta' S Theta = E[e f_i] - theta . E[e f], float64 [T]."""
    rho = residual_covariance(cov, theta, targets)
    return rho.gather(1, targets[:, None])[:, 0] - (theta.double() * rho).sum(1)


def kkt_violation(cov: Tensor, theta: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Largest violation of the optimality conditions, relative to lambda_max / 2, float64 [T].

    0 where lambda_max = 0 (nothing correlates with the target) and theta = 0; +inf where an excluded category is used.
    """
    bound = _bound(cov, targets, lam, penalty)
    worst = _violation(residual_covariance(cov, theta, targets), theta.double(), bound).amax(1).clamp_min(0)
    return torch.where(worst == 0, 0.0, worst / (lambda_max(cov, targets, penalty) / 2))  # NaN stays NaN


def duality_gap(cov: Tensor, theta: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Primal minus dual objective, float64 [T], in the units of S_ii; bounds the excess of the objective if S is PSD.

    With tau = min(1, min_j bound_j / |rho_j|) the scaled residual tau e is dual feasible and
    gap = err2 + 2 sum_j bound_j |theta_j| - 2 tau E[e f_i] + tau^2 err2.
    """
    bound = _bound(cov, targets, lam, penalty)
    theta = theta.double()
    rho = residual_covariance(cov, theta, targets)
    residual_target = rho.gather(1, targets[:, None])[:, 0]  # E[e f_i]
    error = residual_target - (theta * rho).sum(1)
    tau = torch.where(rho.abs() > bound, bound / rho.abs(), 1.0).amin(1)
    norm = torch.where(theta != 0, bound * theta.abs(), 0.0).sum(1)
    return error + 2 * norm - 2 * tau * residual_target + tau**2 * error


def gradients(
    cov: Tensor, theta: Tensor, targets: Tensor, grad_theta: Tensor, penalty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dL/dS [n, n] symmetric, dL/dlam [T]) from grad_theta = dL/dtheta [T, n], off the kinks of the path.

    On the support a, with A = S_aa, s = sign(theta_a) and u = grad_theta:
    w_a = A^-1 u_a (zero elsewhere),  dL/dS = -(w Theta' + Theta w') / 2,  dL/dlam = -(1/2) sum_j penalty_j s_j w_j.
    """
    S = cov.detach().double()
    factors = _penalty(cov, targets, penalty)
    grad_cov, grad_lam = torch.zeros_like(S), S.new_zeros(targets.shape[0])
    for t, i in enumerate(targets.tolist()):
        a = theta[t].nonzero()[:, 0]
        w = torch.zeros_like(S[0])
        w[a] = torch.linalg.solve(S[a][:, a], grad_theta[t, a].double())
        pinned = theta[t].double().clone()
        pinned[i] = -1
        product = torch.outer(w, pinned)
        grad_cov -= (product + product.T) / 2
        grad_lam[t] = -(w[a] * factors[t, a] * theta[t, a].sign()).sum() / 2
    return grad_cov, grad_lam


def _penalty(cov: Tensor, targets: Tensor, penalty: Tensor | None) -> Tensor:
    """Penalty factors [T, n] float64, +inf at the target itself."""
    shape = (targets.shape[0], cov.shape[0])
    ones = torch.ones(shape, dtype=torch.float64, device=cov.device)
    weight = ones if penalty is None else ones * penalty.detach().double()
    return weight.scatter(1, targets[:, None], torch.inf)


def _bound(cov: Tensor, targets: Tensor, lam: Tensor, penalty: Tensor | None) -> Tensor:
    """(lam/2) penalty [T, n] float64; +inf where a category is excluded, whatever lam."""
    weight = _penalty(cov, targets, penalty)
    half = lam.detach().double().to(cov.device).expand(targets.shape[0])[:, None] / 2
    return torch.where(weight.isinf(), torch.inf, half * weight)


def _violation(rho: Tensor, theta: Tensor, bound: Tensor) -> Tensor:
    """Distance of rho from the subdifferential of bound |theta|, [T, n]; at most 0 where the condition holds."""
    return torch.where(theta != 0, (rho - bound * theta.sign()).abs(), rho.abs() - bound)


def _solve(S: Tensor, targets: Tensor, bound: Tensor, allowed: Tensor, max_rounds: int) -> Tensor:
    """theta [T, n] with violation <= allowed [T, n]: grow a working set, solve on it, look at all categories again."""
    n = S.shape[0]
    # One category that correlates with nothing fills the unused places of shorter working sets.
    S = torch.nn.functional.pad(S, (0, 1, 0, 1))
    S[n, n] = 1
    bound = torch.nn.functional.pad(bound, (0, 1), value=1.0)
    theta = S.new_zeros(targets.shape[0], n + 1)
    live = torch.arange(targets.shape[0], device=S.device)
    for _ in range(max_rounds):
        rho = S[targets[live]] - theta[live] @ S
        violation = _violation(rho, theta[live], bound[live])[:, :n]
        unsolved = (violation > allowed[live]).any(1)
        live = live[unsolved]
        if live.numel() == 0:
            break
        index = _working_set(theta[live, :n], violation[unsolved])  # [L, K], n where unused
        Q = S[index[:, :, None], index[:, None, :]]  # [L, K, K]
        q = S[targets[live, None], index]  # [L, K]
        x = _descend(Q, q, bound[live[:, None], index], theta[live[:, None], index])
        # err2 >= 0 bounds the objective below by -S_ii if S is a covariance; far below there is no minimum to find.
        sound = _objective(Q, q, bound[live[:, None], index], x)[:, 0] > -2 * S[targets[live], targets[live]]
        live, index, x = live[sound], index[sound], x[sound]
        theta[live[:, None], index] = x
    return theta[:, :n]


def _working_set(theta: Tensor, violation: Tensor) -> Tensor:
    """Support and worst violators of each target (no more new than old ones), increasing, then n: int64 [T, K]."""
    n = theta.shape[1]
    support = theta != 0
    size = support.sum(1)
    limit = size + size.clamp_min(NEW_CATEGORIES)  # [T]
    key = torch.where(support, torch.inf, violation)
    value, index = key.topk(min(n, int(limit.max())), dim=1)
    used = (value > 0) & (torch.arange(value.shape[1], device=value.device) < limit[:, None])
    index = torch.where(used, index, n).sort(1).values
    return index[:, : int(used.sum(1).max())]


def _descend(Q: Tensor, q: Tensor, bound: Tensor, x: Tensor) -> Tensor:
    """Cyclic sweeps, then Newton steps until no sign changes, on x' Q x - 2 q.x + 2 bound.|x|: x [T, K], Q [T, K, K].

    The objective never rises.
    """
    x = x.clone()
    rho = q - (Q @ x[:, :, None])[:, :, 0]
    curvature = Q.diagonal(dim1=1, dim2=2)
    for _ in range(SWEEPS):
        for j in range(x.shape[1]):
            z = curvature[:, j] * x[:, j] + rho[:, j]
            new = torch.sign(z) * (z.abs() - bound[:, j]).clamp_min(0) / curvature[:, j]
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
    """x' Q x - 2 q.x + 2 bound.|x|, [T, 1]: the objective less S_ii."""
    return (x * ((Q @ x[:, :, None])[:, :, 0] - 2 * q) + 2 * bound * x.abs()).sum(1, keepdim=True)
