"""BatchNorm whose domains are sample paths of a Gaussian process over its parameters, and random paths between them.

    theta [D, P]     weight, bias, mean and log variance of every channel of a network, a row for each domain
    c [S, D]         coefficients of S paths, rows of sum 1: theta_s = sum_k c_sk theta_k, for all layers at once

    layers           GaussianProcessBatchNorm1d/2d, path_context
    reading A        path_coefficients: the empirical process, whose covariance is that of the domains
    reading B        DomainCoordinates, sample_coordinates, regression_coefficients: regression over a coordinate
    both             batch_norm_paths: all parameters of a network on S paths as one product

Source: inspired by GDNorm (arXiv 2203.01723), whose mean and covariance functions could not be read: both are our
choice.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuraldeps_kernels.nn.domain_norm import (
    DomainBatchNorm,
    Rows,
    context,
    domain_ids,
    pooled_statistics,
    rows_of,
)
from neuraldeps_kernels.ops.domain_norm import centred_affine
from neuraldeps_kernels.reference.domain_norm import merged_moments


class PathTables(NamedTuple):
    """Parameters of one layer on S paths, each [S, C]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor  # without eps, not negative


class BatchNormPaths(NamedTuple):
    """Parameters of all layers of a network on S paths, by the position of the layer."""

    layers: tuple[PathTables, ...]

    def of(self, layer: GaussianProcessBatchNorm) -> PathTables:
        """Those of `layer`; ValueError if it belongs to another network."""
        known = layer.position < len(self.layers)
        if not known or self.layers[layer.position].mean.shape[1] != layer.num_features:
            raise ValueError(f"paths must be those of the network of {layer}: make them by batch_norm_paths")
        return self.layers[layer.position]


class path_context:
    """`with path_context(paths, index): model(x)`: layers of a Gaussian process normalise sample n by path index[n].

    No statistics are taken from the batch and none are updated. It wins over `domain_context`, an explicit domain over
    both. As `domain_context`, it belongs to the process.

    Args:
        paths: of `batch_norm_paths(model, ...)`, of the same model.
        index: int64 [N] in 0..S-1.
    """

    def __init__(self, paths: BatchNormPaths, index: Tensor) -> None:
        self.paths, self.index = paths, index

    def __enter__(self) -> None:
        self._outer = context.paths, context.path
        context.paths, context.path = self.paths, self.index

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context.paths, context.path = self._outer


class GaussianProcessBatchNorm(DomainBatchNorm):
    """DomainBatchNorm whose domains are sample paths of a Gaussian process over the parameters of BatchNorm.

    Training: as DomainBatchNorm; inside `path_context` an affine map with the parameters of a path, that is of an
    imaginary domain. Eval: as DomainBatchNorm for known ids, while the unseen domain (-1, the default) is the mean
    path: means over domains of weight, bias and mean, and the variance below.

    The variance enters the process as u = log(var + eps) ("log"), so that the mean path has the geometric mean of
    var + eps, or as var + eps itself ("raw"). A path outside the domains may have less than eps there and gets eps.
    With pooled_variance the mean path has that of the union of domains instead: mean_k[var_k + (mean_k - mean)^2].

    Args:
        num_features, num_domains, eps, momentum, activation: as DomainBatchNorm2d.
        var_space: "log" or "raw".
        pooled_variance: see above.

    forward(x, domain=None, *, residual=None, activation=None): as DomainBatchNorm2d.

    Source: inspired by GDNorm (arXiv 2203.01723); eps is inside u, so that a path that is a domain is exactly that
    domain.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        var_space: str = "log",
        pooled_variance: bool = False,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, num_domains, eps, momentum, activation=activation, device=device, dtype=dtype)
        if var_space not in ("log", "raw"):
            raise ValueError(f"var_space must be 'log' or 'raw', not {var_space!r}")
        self.var_space, self.pooled_variance = var_space, pooled_variance
        self.position = 0  # among the layers of its network, set by batch_norm_paths

    def forward(
        self,
        x: Tensor,
        domain: Tensor | int | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        paths, path = context.paths, context.path
        if domain is None and paths is not None and path is not None:
            self.check(x)
            tables = paths.of(self)
            rows = rows_of(path, x, len(tables.mean), name="index")
            return self._by_rows(x, tables, rows, residual, activation)
        if self.training:
            return super().forward(x, domain, residual=residual, activation=activation)
        self.check(x)
        return self._eval(x, domain, residual, activation)

    def _eval(self, x: Tensor, domain: Tensor | int | None, residual: Tensor | None, activation: str | None) -> Tensor:
        D, mean_path = self.num_domains, self.mean_path()
        domains = PathTables(self.weight, self.bias, self.running_mean, self.running_var)
        tables = PathTables(*(torch.cat(pair) for pair in zip(domains, mean_path, strict=True)))
        rows = rows_of(domain_ids(domain, x, D, False), x, D, unseen=D)
        return self._by_rows(x, tables, rows, residual, activation)

    def _by_rows(
        self, x: Tensor, tables: PathTables, rows: Rows, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        """act(weight (x - mean) / sqrt(var + eps) + bias + residual), each sample with its row of the tables [R, C]."""
        scale = tables.weight * (tables.var + self.eps).rsqrt()
        mean, scale, shift = rows.of(tables.mean), rows.of(scale), rows.or_nan(rows.of(tables.bias))
        return centred_affine(x, mean, scale, shift, residual=residual, activation=activation or self.activation)

    def mean_path(self) -> PathTables:
        """Weight, bias, mean and variance [1, C] of the mean path."""
        weight, bias, mean, var = (
            table.mean(0, keepdim=True)
            for table in (self.weight, self.bias, self.running_mean, _to_space(self.running_var, self))
        )
        if self.pooled_variance:
            return PathTables(weight, bias, mean, pooled_statistics(self.running_mean, self.running_var)[1][None])
        return PathTables(weight, bias, mean, _from_space(var, self))

    @torch.no_grad()
    def row(self, domain: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if domain >= 0:
            return super().row(domain)
        weight, bias, mean, var = self.mean_path()
        return mean[0], var[0], weight[0], bias[0]


def _to_space(var: Tensor, layer: GaussianProcessBatchNorm) -> Tensor:
    """What stands for a variance in the process."""
    return (var + layer.eps).log() if layer.var_space == "log" else var + layer.eps


def _from_space(value: Tensor, layer: GaussianProcessBatchNorm) -> Tensor:
    """The variance that `value` stands for, at least 0."""
    return ((value.exp() if layer.var_space == "log" else value) - layer.eps).clamp_min(0)


class GaussianProcessBatchNorm1d(GaussianProcessBatchNorm):
    __doc__ = GaussianProcessBatchNorm.__doc__
    dimensions, plain_type = (2, 3), nn.BatchNorm1d


class GaussianProcessBatchNorm2d(GaussianProcessBatchNorm):
    __doc__ = GaussianProcessBatchNorm.__doc__
    dimensions, plain_type = (4,), nn.BatchNorm2d


def path_coefficients(
    num_domains: int,
    num_paths: int = 1,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random paths of the empirical process of D domains as combinations of them: c [S, D] float32, rows of sum 1.

        theta_s = m + alpha sum_k w_sk (theta_k - m) / sqrt(D - 1) = sum_k c_sk theta_k,   w_s ~ N(0, I)

    so that mean and covariance of theta_s are the empirical ones, the covariance times alpha^2. alpha = 0 is the mean
    path, one domain its own only path. Source: inspired by GDNorm (arXiv 2203.01723).

    Raises:
        ValueError: a number is not positive, or alpha is negative.
    """
    if num_domains < 1 or num_paths < 1:
        raise ValueError(f"num_domains and num_paths must be positive, not {num_domains} and {num_paths}")
    if not alpha >= 0:
        raise ValueError(f"alpha must not be negative, not {alpha}")
    w = torch.randn(num_paths, num_domains, generator=generator, device=device)
    return 1 / num_domains + alpha * (w - w.mean(1, keepdim=True)) / math.sqrt(max(num_domains - 1, 1))


def batch_norm_paths(
    model: nn.Module,
    coefficients: Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> BatchNormPaths:
    """Parameters of all GaussianProcessBatchNorm layers of `model` on the paths `coefficients`, as one product.

        theta_s = sum_k c_sk theta_k + noise_s std(theta) eps_s

    theta [D, P] holds weight, bias, mean and log variance of every channel of the network, std [P] their standard
    deviation over domains (divisor D - 1), eps_s standard normal. The gradient reaches the weights and biases of the
    domains, c_sk times that of the path; statistics and noise are constants.

    Args:
        coefficients: [S, D], of `path_coefficients` or `regression_coefficients`.
        noise: [S], such as sqrt(tau) of section 3.2 or the posterior deviation of 3.3; default none.
        generator: of eps.

    Raises:
        ValueError: the model has no such layer, its layers differ in D, eps or var_space, or a shape does not fit.

    Source: inspired by GDNorm (arXiv 2203.01723).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GaussianProcessBatchNorm)]
    if not layers:
        raise ValueError("model must have GaussianProcessBatchNorm layers; convert_domain_batch_norm makes them")
    first = layers[0]
    for position, layer in enumerate(layers):
        if (layer.num_domains, layer.eps, layer.var_space) != (first.num_domains, first.eps, first.var_space):
            raise ValueError(f"model must have layers of one num_domains, eps and var_space, not {first} and {layer}")
        layer.position = position
    if coefficients.dim() != 2 or coefficients.shape[1] != first.num_domains:
        raise ValueError(f"coefficients must be [S, {first.num_domains}], not {list(coefficients.shape)}")
    if noise is not None and noise.shape != coefficients.shape[:1]:
        raise ValueError(f"noise must be [{len(coefficients)}], one a path, not {list(noise.shape)}")
    variances = torch.cat([layer.running_var for layer in layers], 1)
    kinds = [
        *(layer.weight for layer in layers),
        *(layer.bias for layer in layers),
        *(layer.running_mean for layer in layers),
        _to_space(variances, first),
    ]
    theta = torch.cat(kinds, 1)  # [D, P]
    with torch.autocast(theta.device.type, enabled=False):
        mixed = coefficients.to(theta.dtype) @ theta
    if noise is not None:
        eps = torch.randn(mixed.shape, generator=generator, device=mixed.device, dtype=mixed.dtype)
        mixed = mixed + noise[:, None].to(theta.dtype) * _deviation(theta.detach()) * eps
    weight, bias, mean, var = mixed.chunk(4, 1)
    channels = [layer.num_features for layer in layers]
    statistics = (mean.detach(), _from_space(var.detach(), first))
    tables = (table.split(channels, 1) for table in (weight, bias, *statistics))
    return BatchNormPaths(tuple(PathTables(*layer) for layer in zip(*tables, strict=True)))


def _deviation(theta: Tensor) -> Tensor:
    """Standard deviation [P] over domains, 0 of one domain."""
    return ((theta - theta.mean(0)).square().sum(0) / max(theta.shape[0] - 1, 1)).sqrt()


class RegressionPaths(NamedTuple):
    """Posterior of Gaussian process regression at S points."""

    coefficients: Tensor  # [S, D], rows of sum 1: the posterior mean as a combination of the domains
    noise: Tensor  # [S]: its standard deviation over that of theta


def regression_coefficients(
    coordinates: Tensor, points: Tensor, *, noise_variance: float = 1e-6, length: float | None = None
) -> RegressionPaths:
    """Gaussian process regression of theta over coordinates of domains: posterior at `points`.

        k(z, z') = exp(-|z - z'|^2 / (2 l^2)),   K = k(Z, Z) + noise_variance I
        mean  m(p) + k(z*, Z) K^-1 (theta(p) - m(p)),   variance  s(p)^2 [1 - k(z*, Z) K^-1 k(Z, z*)]

    with m and s the mean and standard deviation of theta over domains.

    Args:
        coordinates: z [D, r], points: z* [S, r]; computed in float64.
        length: l; default the median distance of two domains, at least 1e-6.

    Raises:
        ValueError: a shape does not fit, a number is negative, or two domains coincide with noise_variance = 0.

    Source: inspired by GDNorm (arXiv 2203.01723), reading B.
    """
    if coordinates.dim() != 2 or points.dim() != 2 or coordinates.shape[1] != points.shape[1]:
        raise ValueError(
            f"coordinates [D, r] and points [S, r] must agree in r, not {list(coordinates.shape)}, {list(points.shape)}"
        )
    if not noise_variance >= 0 or not (length is None or length > 0):
        raise ValueError(f"noise_variance must not be negative and length positive, not {noise_variance}, {length}")
    z, query = coordinates.double(), points.double()
    scale = _median_distance(z) if length is None else torch.tensor(length, dtype=torch.float64, device=z.device)
    D = len(z)
    K = _rbf(z, z, scale) + noise_variance * torch.eye(D, dtype=torch.float64, device=z.device)
    L, failed = torch.linalg.cholesky_ex(K)
    if z.device.type == "cpu" and bool(failed):
        raise ValueError("coordinates must be distinct points, or noise_variance positive")
    cross = _rbf(query, z, scale)
    weights = torch.cholesky_solve(cross.mT, L).mT  # [S, D]
    variance = (1 - (weights * cross).sum(1)).clamp_min(0)
    return RegressionPaths(weights + (1 - weights.sum(1, keepdim=True)) / D, variance.sqrt())


def sample_coordinates(
    coordinates: Tensor, num_paths: int = 1, *, spread: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Random points z* [S, r] among the domains: sum_k pi_k z_k + spread l eps, pi ~ Dirichlet(1), eps ~ N(0, I).

    Source: inspired by GDNorm (arXiv 2203.01723).
    """
    z = coordinates.double()
    device, S = z.device, num_paths
    exponential = (
        -torch.rand(S, len(z), generator=generator, device=device, dtype=torch.float64).clamp_min(1e-300).log()
    )
    eps = torch.randn(S, z.shape[1], generator=generator, device=device, dtype=torch.float64)
    return exponential / exponential.sum(1, keepdim=True) @ z + spread * _median_distance(z) * eps


def _rbf(a: Tensor, b: Tensor, length: Tensor) -> Tensor:
    """k(a, b) [len(a), len(b)]."""
    squares = (a[:, None] - b[None]).square().sum(2)
    return (-squares / (2 * length.square())).exp()


def _median_distance(z: Tensor) -> Tensor:
    """Median distance of two rows of z [D, r], at least 1e-6; 1 for a single row."""
    if len(z) < 2:
        return z.new_ones(())
    return torch.pdist(z).quantile(0.5).clamp_min(1e-6)


class DomainCoordinates(nn.Module):
    """Coordinates of the domains for `regression_coefficients`: running means of their features, projected.

    Args:
        num_domains: D.
        num_features: F.
        momentum: share of the old mean that stays at an update; the first update of a domain sets it.
    """

    features: Tensor  # [D, F]
    seen: Tensor  # bool [D]

    def __init__(self, num_domains: int, num_features: int, *, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        self.momentum = momentum
        self.register_buffer("features", torch.zeros(num_domains, num_features))
        self.register_buffer("seen", torch.zeros(num_domains, dtype=torch.bool))

    @torch.no_grad()
    def update(self, features: Tensor, domain: Tensor) -> None:
        """Moves the means of the domains in the batch: features [N, F], each scaled to length 1, domain int64 [N]."""
        unit = nn.functional.normalize(features.to(self.features.dtype), dim=1)
        batch, _, samples = merged_moments(unit, torch.zeros_like(unit), domain, len(self.features), 1)
        kept = torch.where(self.seen, self.momentum, 0.0)[:, None]
        present = samples > 0
        self.features.copy_(
            torch.where(present[:, None], kept * self.features + (1 - kept) * batch.to(unit), self.features)
        )
        self.seen.logical_or_(present)

    def forward(self, dimensions: int = 8) -> Tensor:
        """z [D, r] float64: principal components of the means over domains, r the smaller of `dimensions` and D."""
        centred = self.features.double()
        centred = centred - centred.mean(0)
        U, S, _ = torch.linalg.svd(centred, full_matrices=False)
        return (U * S)[:, :dimensions]  # type: ignore[no-any-return]
