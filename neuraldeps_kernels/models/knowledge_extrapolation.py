"""A reconstruction of knowledge extrapolation: one piece of knowledge of a generator moves, the rest stays put.

"Principled Knowledge Extrapolation with GANs" (ICML 2022, arXiv 2205.13444). Of the paper only the abstract could be
read; the game, its closed forms and the descent are derived anew and are ours.

A generator G with prior z ~ N(0, I) has the law p of G(z), knowledge K(x) its value on an image. Extrapolating K to k*
means the law q nearest to p that is paid for l(K) = |K - k*|^2 / 2: its density ratio depends on K alone, so that
nothing is changed at a given K. `knowledge_weights` finds it as weights of samples, `principal_knowledge_descent` by
moving the codes of given images,

    E(z) = eta l(K(G(z))) + rho |z - z0|^2 / 2,    z <- z - a P h,   h = grad E,

with P the projection on the principal subspace of the gradients of K over the batch, which all samples share: what is
particular to a sample, and may raise K without its meaning, drops out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuraldeps_kernels.ops.closed_form_discriminator import (
    Discriminator,
    closed_form_discriminator,
    knowledge_penalty,
)
from neuraldeps_kernels.ops.covariance import covariance
from neuraldeps_kernels.ops.projected_step import projected_step
from neuraldeps_kernels.ops.spectrum import principal_directions

Generator = Callable[[Tensor], Tensor]  # codes [B, d] or [B, L, d] to samples [B, ...]
Knowledge = Callable[[Tensor], Tensor]  # samples to [B] or [B, m]

MODES = ("svd", "topk", "natural", "full")
SLOPE, SHRINK, HALVINGS = 1e-4, 0.5, 20  # of Armijo's rule
LEAST_DIRECTION = 1e-6


@dataclass(frozen=True)
class Whitening:
    """Codes of an empirical law, such as the mapped latents of a generator, as if drawn from N(0, I).

    w = mean + scale z, for each of the layers of [B, L, d] codes.
    """

    mean: Tensor  # [d] or [L, d]
    scale: Tensor  # [d, d] or [L, d, d], lower triangular

    @classmethod
    def of_samples(cls, codes: Tensor, *, ridge: float = 1e-6) -> Whitening:
        """Of codes [N, d] or [N, L, d]; `ridge` times the mean variance is added to the covariance.

        Raises:
            ValueError: other dimensions, fewer than 2 codes, or a covariance that is not positive definite.
        """
        if codes.dim() not in (2, 3) or len(codes) < 2:
            raise ValueError(f"codes must be [N, d] or [N, L, d] with N > 1, not {list(codes.shape)}")
        wide = codes.double()
        layers = wide.transpose(0, 1) if codes.dim() == 3 else wide[None]  # [L, N, d]
        spread = covariance(layers)
        diagonal = spread.diagonal(dim1=1, dim2=2)
        eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
        scale, failed = torch.linalg.cholesky_ex(spread + ridge * diagonal.mean(1)[:, None, None] * eye)
        if bool(failed.any()):
            raise ValueError("codes must have a covariance that is positive definite; give more of them or a ridge")
        mean, scale = wide.mean(0).to(codes.dtype), scale.to(codes.dtype)
        return cls(mean, scale if codes.dim() == 3 else scale[0])

    def decode(self, z: Tensor) -> Tensor:
        """w of whitened codes."""
        moved: Tensor = self.mean + (self.scale @ z[..., None])[..., 0]
        return moved

    def encode(self, w: Tensor) -> Tensor:
        """Whitened codes of w."""
        centred = (w - self.mean)[..., None]
        whitened: Tensor = torch.linalg.solve_triangular(self.scale, centred, upper=False)[..., 0]
        return whitened


@dataclass
class Trace:
    """What a descent did, a number a step and sample."""

    energies: list[Tensor] = field(default_factory=list)  # [steps + 1][B]: E, never rising
    knowledge: list[Tensor] = field(default_factory=list)  # [steps + 1][B, m]
    step_sizes: list[Tensor] = field(default_factory=list)  # [steps][B]: a, 0 where z stayed
    rank: int = 0  # of the last subspace; 0 without one
    evaluations: int = 0  # of the generator, over all samples
    gradients: int = 0  # of the knowledge, over all samples

    @property
    def steps(self) -> int:
        return len(self.step_sizes)


@dataclass(frozen=True)
class Extrapolation:
    """Moved codes in the coordinates they were given in, and how they got there."""

    z: Tensor
    trace: Trace


def principal_knowledge_descent(
    generator: Generator,
    knowledge: Knowledge,
    z0: Tensor,
    target: float | Tensor,
    *,
    eta: float = 1.0,
    rho: float = 0.02,
    mode: str = "svd",
    rank: int = 1,
    energy: float | None = None,
    coordinates: int | None = None,
    preserve: Tensor | None = None,
    preserve_map: Knowledge | None = None,
    whitening: Whitening | None = None,
    penalty: str = "squared",
    sharpness: float = 1.0,
    tolerance: float | None = None,
    steps: int = 60,
    refresh: int = 1,
    batch_size: int = 256,
) -> Extrapolation:
    """Moves codes z0 until the knowledge of what they generate is at the target, everything else as little as can be.

    Args:
        generator: G, differentiable, samples independent of each other (a network in eval mode).
        knowledge: K, differentiable, [B] or [B, m] from samples.
        z0: codes [B, d] or [B, L, d] of L layers (w+), float32 or float64.
        target: k*, a number or [m].
        eta, rho: weights of the penalty and of the distance from z0, both >= 0.
        mode: "svd", the principal subspace; "topk", the latent coordinates along which K changes most on average;
            "natural", the direction that changes `preserve_map` least; "full", the plain gradient.
        rank, energy: of "svd", see `principal_directions`; `energy` replaces `rank`.
        coordinates: of "topk", in each layer; default 8, or all d where there are fewer.
        preserve: orthonormal directions [R, d] or [L, R, d] that must not be moved along, such as the principal
            directions of other knowledge.
        preserve_map: of "natural", features [B, q] of samples.
        whitening: of codes that are not drawn from N(0, I); distances are then those of the whitened codes.
        penalty, sharpness: of the knowledge, see `closed_form_discriminator`.
        tolerance: a sample stops within this distance of the target (for "push", from where K >= k* on); default a
            hundredth of the deviation of K over the batch.
        steps: at most so many; `refresh`: a new subspace every so many.
        batch_size: samples that the generator takes at a time.

    Returns:
        Codes in the shape of z0, and a trace. E never rises for any sample. Samples do not influence each other but by
        the subspace.

    Raises:
        ValueError: an argument does not fit, or K is NaN or infinite at z0.
        TypeError: z0 is no tensor of these dtypes.

    Source: a reconstruction, see the head of this file; every default is our choice.
    """
    if not isinstance(z0, Tensor) or z0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"z0 must be a float32 or float64 tensor, not {z0.dtype if isinstance(z0, Tensor) else type(z0)}"
        )
    if z0.dim() not in (2, 3) or 0 in z0.shape:
        raise ValueError(f"z0 must be [B, d] or [B, L, d] with no dimension empty, not {list(z0.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "natural" and preserve_map is None:
        raise ValueError('mode "natural" needs preserve_map, the features to keep')
    coordinates = min(8, z0.shape[-1]) if coordinates is None else coordinates
    if not 1 <= coordinates <= z0.shape[-1]:
        raise ValueError(f"coordinates must be in 1..{z0.shape[-1]}, not {coordinates}")
    for name, weight in (("eta", eta), ("rho", rho)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} must be finite and >= 0, not {weight}")
    for name, count in (("steps", steps), ("refresh", refresh), ("batch_size", batch_size)):
        if count < (0 if name == "steps" else 1):
            raise ValueError(f"{name} must be positive, not {count}")

    origin = z0.detach() if whitening is None else whitening.encode(z0.detach())
    problem = _Problem(generator, knowledge, whitening, target, eta, rho, penalty, sharpness, batch_size, origin)
    kept = _checked_directions(preserve, origin)
    z, everyone = origin.clone(), torch.arange(len(origin), device=origin.device)
    k, E = problem.evaluate(z, everyone)
    if not bool(k.isfinite().all()):
        raise ValueError("knowledge must be finite on the samples of z0")
    near = _default_tolerance(k, target) if tolerance is None else torch.full_like(k[0], tolerance)
    trace = Trace([E.clone()], [k.clone()])
    active = ~problem.reached(k, near)
    basis: Tensor | None = None
    for step in range(steps):
        moving = active.nonzero()[:, 0]
        if len(moving) == 0:
            break
        fresh = step % refresh == 0
        gradients = problem.jacobian(knowledge, z, everyone if fresh else moving)  # [n, m, ...]
        if fresh:
            basis = _subspace(mode, gradients, rank, energy, coordinates, kept)
            gradients = gradients[moving]
        uphill = problem.penalty_gradient(k[moving], gradients)
        if basis is None:
            h = uphill + rho * (z[moving] - origin[moving])
            p = h if preserve_map is None or mode == "full" else _natural(h, problem.jacobian(preserve_map, z, moving))
            p = _without(p, kept)
            slope = (h * p).flatten(1).sum(1)
        else:
            _, p, slope = projected_step(z[moving], uphill, basis, 1.0, origin=origin[moving], rho=rho)
        a = problem.line_search(z, k, E, moving, p, slope)
        active[moving[a == 0]] = False
        active &= ~problem.reached(k, near)
        trace.energies.append(E.clone())
        trace.knowledge.append(k.clone())
        trace.step_sizes.append(torch.zeros_like(E).index_copy_(0, moving, a))
        trace.rank = 0 if basis is None else basis.shape[-2]
    trace.evaluations, trace.gradients = problem.evaluations, problem.gradients
    return Extrapolation(z if whitening is None else whitening.decode(z), trace)


def knowledge_directions(
    generator: Generator,
    knowledge: Knowledge,
    z: Tensor,
    *,
    rank: int = 1,
    energy: float | None = None,
    whitening: Whitening | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Principal directions [R, d] or [L, R, d] of knowledge at codes z, for `preserve` of another knowledge's descent.

    Arguments as of `principal_knowledge_descent`; those of several pieces of knowledge are kept together by
    `joint_directions`.
    """
    origin = z.detach() if whitening is None else whitening.encode(z.detach())
    problem = _Problem(generator, knowledge, whitening, 0.0, 0.0, 0.0, "squared", 1.0, batch_size, origin)
    gradients = problem.jacobian(knowledge, origin, torch.arange(len(origin), device=origin.device))
    directions = _subspace("svd", gradients, rank, energy, 0, None)
    assert directions is not None
    return directions


def joint_directions(directions: Sequence[Tensor]) -> Tensor:
    """Orthonormal directions of the sum of subspaces, each [R, d] or [L, R, d]; at most d of them."""
    rows = torch.cat(list(directions), -2)
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    count = int((s > 1e-6).sum(-1).amin())
    joint: Tensor = vh[..., :count, :].to(rows.dtype).contiguous()
    return joint


class _Problem:
    """E and its parts for chosen samples of a batch; counts what the generator is asked for."""

    def __init__(
        self,
        generator: Generator,
        knowledge: Knowledge,
        whitening: Whitening | None,
        target: float | Tensor,
        eta: float,
        rho: float,
        penalty: str,
        sharpness: float,
        batch_size: int,
        origin: Tensor,
    ) -> None:
        self.generator, self.knowledge, self.whitening = generator, knowledge, whitening
        self.target = torch.as_tensor(target, dtype=origin.dtype, device=origin.device)
        self.eta, self.rho, self.batch_size, self.origin = eta, rho, batch_size, origin
        self.penalty, self.sharpness = penalty, sharpness
        self.evaluations = self.gradients = 0

    def _values(self, feature: Knowledge, z: Tensor) -> Tensor:
        """[n, m] of codes z [n, ...]."""
        values = feature(self.generator(z if self.whitening is None else self.whitening.decode(z)))
        values = values[:, None] if values.dim() == 1 else values
        if values.dim() != 2 or len(values) != len(z):
            raise ValueError(f"knowledge must be [B] or [B, m] for B = {len(z)} samples, not {list(values.shape)}")
        self.evaluations += len(z)
        return values.to(z.dtype)

    def evaluate(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """K [n, m] and E [n] at z [n, ...], codes of the samples `rows`."""
        with torch.no_grad():
            k = torch.cat([self._values(self.knowledge, part) for part in z.split(self.batch_size)])
        distance = (z - self.origin[rows]).flatten(1).square().sum(1)
        return k, self.eta * self._penalties(k) + 0.5 * self.rho * distance

    def _penalties(self, k: Tensor) -> Tensor:
        return knowledge_penalty(k, self.target, penalty=self.penalty, sharpness=self.sharpness)

    def jacobian(self, feature: Knowledge, z: Tensor, rows: Tensor) -> Tensor:
        """Gradients [n, m, ...] of each feature at the codes of the samples `rows`."""
        parts = []
        for part in z[rows].split(self.batch_size):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                values = self._values(feature, leaf)
                last = values.shape[1] - 1
                each = [
                    torch.autograd.grad(values[:, j].sum(), leaf, retain_graph=j < last)[0] for j in range(last + 1)
                ]
            parts.append(torch.stack(each, 1))
            self.gradients += len(part) * (last + 1)
        return torch.cat(parts)

    def penalty_gradient(self, k: Tensor, gradients: Tensor) -> Tensor:
        """eta grad l [n, ...] from K [n, m] and its gradients [n, m, ...]."""
        leaf = k.detach().requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(self._penalties(leaf).sum(), leaf)
        return self.eta * torch.einsum("nm,nm...->n...", slopes, gradients)

    def reached(self, k: Tensor, near: Tensor) -> Tensor:
        gap = (k - self.target) if self.penalty == "squared" else (self.target - k).clamp_min(0)
        return (gap.abs() <= near).all(1)

    def line_search(self, z: Tensor, k: Tensor, E: Tensor, moving: Tensor, p: Tensor, slope: Tensor) -> Tensor:
        """Armijo's rule: moves rows of z by -a p, updates k and E; returns a [n], 0 where nothing is gained."""
        a = torch.zeros_like(slope)
        left = (slope > LEAST_DIRECTION**2).nonzero()[:, 0]
        size = 1.0
        for _ in range(HALVINGS + 1):
            if len(left) == 0:
                break
            rows = moving[left]
            tried = z[rows] - size * p[left]
            tried_k, tried_E = self.evaluate(tried, rows)
            better = tried_E <= E[rows] - SLOPE * size * slope[left]  # not where it is NaN
            won = rows[better]
            z[won], k[won], E[won] = tried[better], tried_k[better], tried_E[better]
            a[left[better]] = size
            left, size = left[~better], size * SHRINK
        return a


def _default_tolerance(k: Tensor, target: float | Tensor) -> Tensor:
    """A hundredth of the deviation of K over the batch [m], of its way to the target for a single sample."""
    spread = k.std(0, correction=0)
    way = (torch.as_tensor(target, dtype=k.dtype, device=k.device) - k).abs().mean(0)
    return 0.01 * torch.where(spread > 0, spread, way)


def _checked_directions(preserve: Tensor | None, z: Tensor) -> Tensor | None:
    """[R, d] or [L, R, d], orthonormal in each layer."""
    if preserve is None:
        return None
    shape = [*z.shape[1:-1], preserve.shape[-2] if preserve.dim() > 1 else 0, z.shape[-1]]
    if preserve.dim() != z.dim() or list(preserve.shape) != shape:
        wanted = f"[R, {z.shape[-1]}]" if z.dim() == 2 else f"[{z.shape[1]}, R, {z.shape[-1]}]"
        raise ValueError(f"preserve must be {wanted}, not {list(preserve.shape)}")
    kept = preserve.detach().to(z)
    eye = torch.eye(kept.shape[-2], dtype=z.dtype, device=z.device)
    if not bool(((kept @ kept.mT - eye).abs() <= 1e-4).all()):
        raise ValueError("preserve must have orthonormal rows, as principal_directions returns them")
    orthonormal: Tensor = torch.linalg.qr(kept.double().mT)[0].mT
    return orthonormal.to(z.dtype)


def _without(p: Tensor, kept: Tensor | None) -> Tensor:
    """p [n, d] or [n, L, d] without what lies along kept directions."""
    if kept is None:
        return p
    along = p[..., None, :] @ kept.mT  # [n, .., 1, R]
    return p - (along @ kept)[..., 0, :]


def _subspace(
    mode: str, gradients: Tensor, rank: int, energy: float | None, coordinates: int, kept: Tensor | None
) -> Tensor | None:
    """Orthonormal rows [r, d] or [L, r, d] to move along, from gradients [n, m, ...]; None: no restriction."""
    if mode not in ("svd", "topk"):
        return None
    rows = gradients.flatten(0, 1)  # [n m, d] or [n m, L, d]
    if mode == "topk":
        chosen = rows.abs().mean(0).topk(coordinates, -1).indices
        basis = torch.nn.functional.one_hot(chosen, rows.shape[-1]).to(rows)
    else:
        stacked = rows.transpose(0, 1) if rows.dim() == 3 else rows
        r = None if energy is not None else min(rank, *stacked.shape[-2:])
        basis = principal_directions(stacked, r, energy=energy)[0]
    if kept is None:
        return basis
    _, s, rest = torch.linalg.svd(_off(basis, kept).double(), full_matrices=False)
    return torch.where(s[..., None] > 1e-6, rest, 0.0).to(basis.dtype)


def _off(basis: Tensor, kept: Tensor) -> Tensor:
    return basis - basis @ kept.mT @ kept


def _natural(h: Tensor, J: Tensor, damping: float = 1e-3) -> Tensor:
    """(J'J + e I)^-1 h, scaled to the length of h, for features with Jacobians J [n, q, ...]; e is `damping` times the
    mean square of their singular values.
    """
    flat, J = h.flatten(1).double(), J.flatten(2).double()
    outer = J @ J.mT  # [n, q, q]
    e = damping * outer.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(outer.shape[1], dtype=outer.dtype, device=outer.device)
    inner = torch.linalg.solve(outer + e[:, None, None] * eye, J @ flat[..., None])
    p = flat - (J.mT @ inner)[..., 0]
    length = flat.norm(dim=1, keepdim=True) / p.norm(dim=1, keepdim=True).clamp_min(1e-300)
    scaled: Tensor = (length * p).view(h.shape)
    return scaled.to(h.dtype)


# ------------------------------------------------------------------------------------------------ weights, closed forms


def knowledge_weights(
    generator: Generator,
    knowledge: Knowledge,
    z: Tensor,
    target: float | Tensor,
    *,
    eta: float = 1.0,
    game: str = "js",
    penalty: str = "squared",
    sharpness: float = 1.0,
    batch_size: int = 256,
) -> Discriminator:
    """The extrapolated law as weights of samples of the prior, w = q / p: resample codes by them.

    Arguments as of `principal_knowledge_descent` and `closed_form_discriminator`, z codes drawn from the prior. Far
    targets leave few samples with weight: see `effective_sample_size`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    with torch.no_grad():
        k = torch.cat([knowledge(generator(part)) for part in z.split(batch_size)])
    return closed_form_discriminator(k, target, eta, game, penalty=penalty, sharpness=sharpness)


def shifted_prior_discriminator(z: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """D [B] between the prior N(0, I) and N(mu, I) at codes z [B, d], and KL of the latter from the former.

    D = sigmoid(-mu . z + |mu|^2 / 2),   KL = |mu|^2 / 2
    """
    if z.dim() != 2 or mu.shape != z.shape[1:]:
        raise ValueError(f"z must be [B, d] and mu [d], not {list(z.shape)} and {list(mu.shape)}")
    divergence = 0.5 * mu.square().sum()
    return torch.sigmoid(divergence - z @ mu), divergence
