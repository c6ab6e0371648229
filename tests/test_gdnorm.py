"""Acceptance checks of GDNorm, each named by its number, and the reference model.

Oracles are nn.BatchNorm layers of single domains, autograd through float64 PyTorch, and the formulas of the paper file
written out.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import close, generator, normal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuraldeps_kernels import domain_batch_norm, instance_moments
from neuraldeps_kernels.data.samplers import DomainBalancedSampler
from neuraldeps_kernels.models.gdnorm import GDNorm, combined_loss, forward_with_paths, path_weight
from neuraldeps_kernels.models.reid_training import learning_rate_factor, reid_optimizer
from neuraldeps_kernels.models.resnet import ResNet, folded, load_imagenet
from neuraldeps_kernels.nn import (
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    DomainCoordinates,
    GaussianProcessBatchNorm1d,
    GaussianProcessBatchNorm2d,
    batch_norm_paths,
    convert_domain_batch_norm,
    domain_context,
    export_batch_norm,
    fuse_domain_batch_norm,
    path_coefficients,
    path_context,
    regression_coefficients,
    sample_coordinates,
)
from neuraldeps_kernels.reference.domain_norm import merged_moments

DOUBLE = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(layer: nn.Module, seed: int = 1) -> Any:
    """`layer` with random positive weights, biases and running statistics."""
    g = generator(seed)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                positive = name.endswith(("weight", "var"))
                values = torch.rand(tensor.shape, generator=g, dtype=DOUBLE) + 0.3 if positive else None
                values = torch.randn(tensor.shape, generator=g, dtype=DOUBLE) if values is None else values
                tensor.copy_(values)
    return layer


def rows_through_own_layers(layers: list[Any], x: Tensor, domain: Tensor) -> Tensor:
    """Each domain's rows through its own BatchNorm, put back in place."""
    y = torch.zeros_like(x)
    for k, layer in enumerate(layers):
        rows = (domain == k).nonzero()[:, 0]
        if len(rows):
            y = y.index_copy(0, rows, layer(x[rows]))
    return y


# ------------------------------------------------------------------------------------------------ checks 1 to 7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (DOUBLE, 1e-12)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (DomainBatchNorm2d, nn.BatchNorm2d, (6, 5, 7, 3)),
        (DomainBatchNorm1d, nn.BatchNorm1d, (9, 5)),
        (DomainBatchNorm1d, nn.BatchNorm1d, (4, 5, 11)),
    ],
)
def test_check_1_one_domain_is_batch_norm(
    ours: Any, theirs: Any, shape: tuple[int, ...], momentum: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Check 1: output, dx, dgamma, dbeta, running statistics and counter, in training and eval."""
    reference = theirs(5, momentum=momentum, dtype=dtype)
    with torch.no_grad():
        reference.weight.copy_(normal(5, seed=3))
        reference.bias.copy_(normal(5, seed=4))
    layer = ours(5, 1, momentum=momentum, dtype=dtype)
    layer.load_state_dict(reference.state_dict())
    for step in range(4):
        training = step < 3
        x = (2 * normal(*shape, seed=step) + 1).to(dtype)
        dy = normal(*shape, seed=10 + step).to(dtype)
        results = []
        for module in (layer, reference):
            module.train(training)
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf) if module is reference else module(leaf, torch.zeros(shape[0], dtype=torch.int64))
            y.backward(dy)
            results.append((y.detach(), leaf.grad, module.weight.grad.view(-1), module.bias.grad.view(-1)))
        for got, want in zip(*results, strict=True):
            close(got, want, tolerance, 1.0)
        close(layer.running_mean[0], reference.running_mean, tolerance, 1.0)
        close(layer.running_var[0], reference.running_var, tolerance)
        assert layer.num_batches_tracked.tolist() == [int(reference.num_batches_tracked)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(13, 4, 5, 3), (13, 4)])
def test_check_2_mixed_batch_is_each_domain_by_itself(shape: tuple[int, ...], training: bool) -> None:
    """Check 2: equality with a BatchNorm a domain; permuting the batch permutes the output."""
    one, two = (DomainBatchNorm1d, nn.BatchNorm1d) if len(shape) == 2 else (DomainBatchNorm2d, nn.BatchNorm2d)
    layers = [randomised(two(4, dtype=DOUBLE), seed).train(training) for seed in range(3)]
    layer = one(4, 3, dtype=DOUBLE).train(training)
    states = [module.state_dict() for module in layers]
    layer.load_state_dict({name: torch.stack([state[name] for state in states]) for name in states[0]})
    domain = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1, 1, 1, 0, 2])[torch.randperm(13, generator=generator(5))]
    x = normal(*shape, seed=6).requires_grad_()
    order = torch.randperm(13, generator=generator(7))
    permuted = copy.deepcopy(layer)(x[order], domain[order])
    y, want = layer(x, domain), rows_through_own_layers(layers, x, domain)
    close(y, want, 1e-13)
    close(permuted, y[order], 1e-14)
    dy = normal(*shape, seed=8)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    theirs = torch.autograd.grad(want, [x, *(p for m in layers for p in (m.weight, m.bias))], dy)
    for got, expected in zip(gradients, (theirs[0], torch.stack(theirs[1::2]), torch.stack(theirs[2::2])), strict=True):
        close(got, expected, 1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        want = torch.stack([getattr(module, name) for module in layers])
        torch.testing.assert_close(getattr(layer, name), want, rtol=1e-13, atol=1e-14)


def test_check_3_absent_domain_is_left_alone() -> None:
    """Check 3: buffers to the last bit, gradients exactly zero, and the domain works again when it is present."""
    layer = randomised(DomainBatchNorm2d(4, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x, domain = normal(6, 4, 3, 3, dtype=torch.float32), torch.tensor([0, 2, 2, 0, 0, 2])
    layer(x, domain).square().sum().backward()
    assert torch.equal(layer.weight.grad[1], torch.zeros(4))
    assert torch.equal(layer.bias.grad[1], torch.zeros(4))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layer, name)[1], before[name][1])
        assert not torch.equal(getattr(layer, name)[0], before[name][0])
    layer(x, torch.ones(6, dtype=torch.int64)).square().sum().backward()
    assert layer.num_batches_tracked.tolist() == [1, 1, 1]
    assert bool((layer.weight.grad[1] != 0).all())
    assert not torch.equal(layer.running_mean[1], before["running_mean"][1])


def test_check_4_gradcheck_with_a_single_image_and_an_absent_domain() -> None:
    """Check 4: domain 0 has a single image, domain 2 none."""
    domain = torch.tensor([1, 0, 1, 3, 3, 1])
    x, weight, bias = (t.requires_grad_() for t in (normal(6, 2, 2, 2), normal(4, 2, seed=1), normal(4, 2, seed=2)))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return domain_batch_norm(x, domain, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_check_5_each_domain_is_standardised() -> None:
    """Check 5: mean 0 and variance v / (v + eps)."""
    x = 3 * normal(12, 4, 5, 5) + torch.arange(12)[:, None, None, None] % 3 * 10
    domain = torch.arange(12) % 3
    y = DomainBatchNorm2d(4, 3, eps=0.1, dtype=DOUBLE)(x, domain)
    for k in range(3):
        inside, result = x[domain == k], y[domain == k]
        v = inside.var((0, 2, 3), correction=0)
        assert result.mean((0, 2, 3)).abs().max() < 1e-14
        close(result.var((0, 2, 3), correction=0), v / (v + 0.1), 1e-13)


def test_check_6_moments_merge_over_domains_and_ranks() -> None:
    """Check 6: law of total variance; the two-rank case with processes is in test_nn_domain_norm.py."""
    x, domain = 2 * normal(10, 3, 4, 5) + 1, torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1, 0])
    g, q = instance_moments(x)
    mean, var, count = merged_moments(g, q, domain, 3, 20)
    share = (count.double() / count.sum())[:, None]
    total = (share * mean).sum(0)
    close(total, x.mean((0, 2, 3)), 1e-14, 1.0)
    close((share * (var + (mean - total).square())).sum(0), x.var((0, 2, 3), correction=0), 1e-14)

    parts = [merged_moments(g[part], q[part], domain[part], 3, 20) for part in (slice(0, 4), slice(4, 10))]
    sizes = torch.stack([part[2] for part in parts])[:, :, None].double()
    merged = sum(n * part[0] for n, part in zip(sizes, parts, strict=True)) / sizes.sum(0)
    spread = sum(n * (part[1] + (part[0] - merged).square()) for n, part in zip(sizes, parts, strict=True))
    close(merged, mean, 1e-14)
    close(spread / sizes.sum(0), var, 1e-14)


@settings(deadline=None, max_examples=20)
@given(a=st.lists(st.floats(0.1, 50), min_size=3, max_size=3), b=st.lists(st.floats(-100, 100), min_size=3, max_size=3))
def test_check_7_affine_invariance(a: list[float], b: list[float]) -> None:
    """Check 7: x -> a_k x + b_k changes the output by O(eps)."""
    x, domain = normal(12, 4, 3, 3), torch.arange(12) % 3
    scale, shift = (torch.tensor(values, dtype=DOUBLE)[domain][:, None, None, None] for values in (a, b))
    layer = DomainBatchNorm2d(4, 3, eps=1e-9, dtype=DOUBLE)
    close(layer(scale * x + shift, domain), layer(x, domain), 1e-6)


# ------------------------------------------------------------------------------------------------ checks 8 to 10: paths


def network(num_domains: int = 3, seed: int = 1, **options: Any) -> nn.Sequential:
    """Convolution, norm, ReLU, convolution, norm of Gaussian processes, with random domains; float64."""
    layers = [
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        GaussianProcessBatchNorm2d(4, num_domains, **options),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        GaussianProcessBatchNorm2d(3, num_domains, **options),
    ]
    return randomised(nn.Sequential(*layers).double(), seed)


def theta(model: nn.Module) -> Tensor:
    """[D, P]: weight, bias, mean, log(var + eps) of all layers."""
    norms = [layer for layer in model.modules() if isinstance(layer, GaussianProcessBatchNorm2d)]
    kinds = [torch.cat([getattr(n, name) for n in norms], 1) for name in ("weight", "bias", "running_mean")]
    return torch.cat([*kinds, torch.cat([(n.running_var + n.eps).log() for n in norms], 1)], 1).detach()


def sampled_theta(model: nn.Module, coefficients: Tensor, **options: Any) -> Tensor:
    """[S, P], read back from the tables of the layers."""
    tables = batch_norm_paths(model, coefficients, **options).layers
    parts = [torch.cat([table[kind] for table in tables], 1) for kind in range(3)]
    return torch.cat([*parts, torch.cat([(table.var + 1e-5).log() for table in tables], 1)], 1).detach()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_check_8_paths_have_the_moments_of_the_process(alpha: float) -> None:
    """Check 8: coefficients of sum 1; mean m and covariance alpha^2 K over 2e5 draws within 2 %; rank of K is D - 1."""
    D, S = 4, 200_000
    c = path_coefficients(D, S, alpha=alpha, generator=generator(3)).double()
    assert (c.sum(1) - 1).abs().max() < 1e-5
    domains = theta(network(D))
    m = domains.mean(0)
    K = (domains - m).T @ (domains - m) / (D - 1)
    assert torch.linalg.matrix_rank(K) == D - 1
    mixing = c.T @ c / S - torch.outer(c.mean(0), c.mean(0))  # covariance of the coefficients
    close(mixing, alpha**2 * (torch.eye(D, dtype=DOUBLE) - 1 / D) / (D - 1), 0.02)
    close(domains.T @ mixing @ domains, alpha**2 * K, 0.02)
    close(c.mean(0) @ domains, m, 0.02)
    close(sampled_theta(network(D), c[:50]), c[:50] @ domains, 1e-7)  # log var comes back through the floor eps


def test_check_8_special_paths() -> None:
    """Check 8: alpha = 0 and one domain give the mean path, identical domains identical paths; variance positive."""
    model = network(3)
    c = path_coefficients(3, 5, alpha=0.0, generator=generator(1))
    close(sampled_theta(model, c), theta(model).mean(0).expand(5, -1), 1e-7)
    assert torch.equal(path_coefficients(1, 4, generator=generator(1)), torch.ones(4, 1))

    same = network(3)
    for layer in same.modules():
        if isinstance(layer, GaussianProcessBatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.data.copy_(tensor.data[:1].expand_as(tensor))
    paths = sampled_theta(same, path_coefficients(3, 6, alpha=2.0, generator=generator(2)))
    close(paths, theta(same)[:1].expand(6, -1), 1e-6)

    wild = path_coefficients(3, 1000, alpha=5.0, generator=generator(4))
    for space in ("log", "raw"):
        for table in batch_norm_paths(network(3, var_space=space), wild).layers:
            assert bool((table.var >= 0).all())
    outside = (path_coefficients(4, 20_000, generator=generator(5)) < 0).any(1).double().mean()
    assert 0.89 < outside < 0.93  # 91 % leave the convex hull of four domains


def test_check_8_draws_follow_the_generator() -> None:
    first, second = (path_coefficients(3, 4, generator=generator(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, path_coefficients(3, 4, generator=generator(10)))
    model, noise = network(3), torch.full((4,), 0.3)
    a, b = (sampled_theta(model, first, noise=noise, generator=generator(9)) for _ in range(2))
    assert torch.equal(a, b)


def test_paths_under_autocast_are_float32() -> None:
    model, c = network(3).float(), path_coefficients(3, 4, generator=generator(1))
    want = sampled_theta(model, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampled_theta(model, c), want)


def test_check_8_independent_noise_has_the_asked_variance() -> None:
    """tau > 0 adds sqrt(tau) std(p) eps(p)."""
    model, S = network(3), 20_000
    c = torch.full((S, 3), 1 / 3)
    draws = sampled_theta(model, c, noise=torch.full((S,), 0.1), generator=generator(11))
    std = theta(model).std(0)
    assert ((draws.std(0) / (0.1 * std) - 1).abs() < 0.03).all()


@pytest.mark.parametrize("space", ["log", "raw"])
def test_check_9_paths_that_are_domains_and_the_mean_path(space: str) -> None:
    """Check 9: c = one-hot(k) is eval with domain k; c = 1/D is the mean path, also folded into the convolutions."""
    model, x = network(3, var_space=space), normal(6, 2, 5, 5, seed=20)
    every = torch.cat([torch.eye(3, dtype=DOUBLE), torch.full((1, 3), 1 / 3, dtype=DOUBLE)])
    paths = batch_norm_paths(model, every)
    for k in range(4):
        with path_context(paths, torch.full((6,), k)):
            on_path = model.train()(x)
        domain = k if k < 3 else -1
        with domain_context(domain):
            close(model.eval()(x), on_path, 1e-12)
        close(export_batch_norm(model, domain).eval()(x), on_path, 1e-12)
        first = fuse_domain_batch_norm(model[0], model[1], domain)
        second = fuse_domain_batch_norm(model[3], model[4], domain)
        close(second(first(x).relu()), on_path, 1e-12)
    close(model.eval()(x), on_path, 1e-12)  # without ids: the mean path
    index = torch.tensor([3, 0, 1, 2, 1, 0])
    with path_context(paths, index):
        mixed = model.train()(x)
    with domain_context(torch.where(index == 3, -1, index)):
        close(model.eval()(x), mixed, 1e-12)


def test_check_9_variance_of_the_mean_path() -> None:
    """Geometric mean of var + eps, its arithmetic mean, or the variance of the union of domains."""
    for options, expected in (
        ({}, lambda mean, var: (var + 1e-5).log().mean(0).exp() - 1e-5),
        ({"var_space": "raw"}, lambda mean, var: var.mean(0)),
        ({"pooled_variance": True}, lambda mean, var: var.mean(0) + mean.var(0, correction=0)),
    ):
        layer = randomised(GaussianProcessBatchNorm2d(4, 3, dtype=DOUBLE, **options))
        plain = layer.plain()
        close(plain.running_var, expected(layer.running_mean, layer.running_var), 1e-12)
        close(plain.running_mean, layer.running_mean.mean(0), 1e-14)


def test_check_10_gradient_of_a_path_reaches_the_domains() -> None:
    """Check 10: d(sum y)/dgamma_k is c_k times that of the mixed gamma; buffers are constants and stay as they are."""
    layer = randomised(GaussianProcessBatchNorm2d(4, 3, dtype=DOUBLE))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    c = path_coefficients(3, 1, generator=generator(2)).double()
    paths = batch_norm_paths(layer, c)
    table = paths.layers[0]
    for tensor in (table.mean, table.var):
        assert not tensor.requires_grad
    x = normal(5, 4, 3, 3).requires_grad_()
    with path_context(paths, torch.zeros(5, dtype=torch.int64)):
        y = layer(x)
    y.square().sum().backward(retain_graph=True)
    mixed = torch.autograd.grad(y.square().sum(), [table.weight, table.bias])
    close(layer.weight.grad, c.T * mixed[0], 1e-12)
    close(layer.bias.grad, c.T * mixed[1], 1e-12)
    scale = (table.weight * (table.var + 1e-5).rsqrt())[0, :, None, None].detach()
    close(x.grad, 2 * y.detach() * scale, 1e-12)
    for name, value in layer.state_dict().items():
        if "running" in name or "tracked" in name:
            assert torch.equal(value, before[name])


def test_check_10_gradcheck_on_two_paths() -> None:
    layer, c, index = randomised(GaussianProcessBatchNorm1d(3, 2, dtype=DOUBLE)), normal(2, 2), torch.tensor([0, 1, 1])

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias}

        class OnPaths(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = layer

            def forward(self, x: Tensor) -> Tensor:
                with path_context(batch_norm_paths(self, c), index):
                    return self.norm(x)

        return torch.func.functional_call(OnPaths(), {f"norm.{name}": value for name, value in values.items()}, (x,))

    inputs = tuple(t.detach().clone().requires_grad_() for t in (normal(3, 3), layer.weight, layer.bias))
    assert torch.autograd.gradcheck(function, inputs)


# ------------------------------------------------------------------------------------------------ checks 11 to 13


def test_check_11_regression_interpolates_the_domains() -> None:
    """Check 11: exact at the data without noise, m with deviation s far away, permutation of domains irrelevant."""
    z, values = normal(4, 3), normal(4, 50, seed=1)
    at_data = regression_coefficients(z, z, noise_variance=0.0)
    close(at_data.coefficients @ values, values, 1e-12)
    assert at_data.noise.max() < 1e-6
    noisy = regression_coefficients(z, z)
    close(noisy.coefficients @ values, values, 1e-4)
    far = regression_coefficients(z, z + 1e3)
    close(far.coefficients @ values, values.mean(0).expand(4, -1), 1e-12)
    close(far.noise, torch.ones(4, dtype=DOUBLE), 1e-12)
    close(at_data.coefficients.sum(1), torch.ones(4, dtype=DOUBLE), 1e-12)

    points, order = normal(6, 3, seed=2), torch.tensor([2, 0, 3, 1])
    one, other = regression_coefficients(z, points), regression_coefficients(z[order], points)
    close(other.coefficients @ values[order], one.coefficients @ values, 1e-10)
    close(other.noise, one.noise, 1e-10)


def test_check_11_formula_of_the_posterior() -> None:
    z, points, l, noise = normal(5, 2), normal(3, 2, seed=1), 0.7, 1e-2
    values = normal(5, 7, seed=2)
    m = values.mean(0)
    K = torch.exp(-torch.cdist(z, z).square() / (2 * l * l)) + noise * torch.eye(5, dtype=DOUBLE)
    k = torch.exp(-torch.cdist(points, z).square() / (2 * l * l))
    got = regression_coefficients(z, points, noise_variance=noise, length=l)
    close(got.coefficients @ values, m + k @ torch.linalg.solve(K, values - m), 1e-12)
    close(got.noise.square(), 1 - (k * torch.linalg.solve(K, k.T).T).sum(1), 1e-12)


def test_check_11_default_length_is_the_median_distance() -> None:
    z = normal(6, 2)
    median = torch.pdist(z).quantile(0.5)
    points = sample_coordinates(z, 5, generator=generator(3))
    assert points.shape == (5, 2)
    assert torch.equal(points, sample_coordinates(z, 5, generator=generator(3)))
    one = regression_coefficients(z, points)
    other = regression_coefficients(z, points, length=float(median))
    close(one.coefficients, other.coefficients, 1e-12)
    inside = sample_coordinates(z, 500, spread=0.0, generator=generator(4))  # convex combinations
    assert bool(((inside >= z.amin(0)) & (inside <= z.amax(0))).all())


def test_check_11_coordinates_from_features() -> None:
    coordinates = DomainCoordinates(3, 10, momentum=0.5)
    means = normal(3, 10, dtype=torch.float32)
    domain = torch.tensor([0, 2, 0, 2])
    coordinates.update(means[domain], domain)
    unit = nn.functional.normalize(means, dim=1)
    close(coordinates.features[[0, 2]], unit[[0, 2]], 1e-6)
    assert coordinates.seen.tolist() == [True, False, True]
    assert not coordinates.features[1].any()
    coordinates.update(-means, torch.arange(3))
    close(coordinates.features[0], 0 * unit[0], 1e-6, 1.0)  # half of each
    close(coordinates.features[1], -unit[1], 1e-6)
    z = coordinates()
    assert z.shape == (3, 3)
    close(torch.cdist(z, z), torch.cdist(coordinates.features.double(), coordinates.features.double()), 1e-12)


def test_check_11_paths_of_a_network_from_regression() -> None:
    model, z = network(3), normal(3, 2)
    posterior = regression_coefficients(z, z, noise_variance=0.0)
    got = sampled_theta(model, posterior.coefficients, noise=posterior.noise, generator=generator(1))
    close(got, theta(model), 1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_check_12_large_mean(layout: torch.memory_format) -> None:
    """Check 12: x = 1e3 + 0.1 noise in float32; the one-pass sum of squares is off by far more."""
    x = (1e3 + 0.1 * normal(8, 4, 16, 16)).float().contiguous(memory_format=layout)
    layer = DomainBatchNorm2d(4, 2, momentum=1.0)
    layer(x, torch.arange(8) % 2)
    for k in range(2):
        exact = x[k::2].double().var((0, 2, 3))
        assert ((layer.running_var[k] / exact - 1).abs() < 1e-3).all()
        naive = x[k::2].square().mean((0, 2, 3)) - x[k::2].mean((0, 2, 3)).square()
        assert ((naive / exact - 1).abs() > 1e-3).any()


def toy_loss(lam: float, seed: int) -> float:
    """Cross-entropy on an unseen domain of a linear model on the norm, trained with weight lam on the paths."""
    g = generator(seed)
    F, direction = 6, torch.randn(6, 3, generator=g)
    scale = torch.exp(0.5 * torch.randn(3, F, generator=g))  # domain 2 is the unseen one
    shift = torch.randn(3, F, generator=g)

    def batch(domain: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(len(domain), F, generator=g)
        return scale[domain] * x + shift[domain], (x @ direction).argmax(1)

    torch.manual_seed(seed)
    model = nn.Sequential(GaussianProcessBatchNorm1d(F, 2), nn.Linear(F, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    domain = torch.arange(64) % 2
    for step in range(100):
        x, y = batch(domain)
        c = path_coefficients(2, generator=g) if lam > 0 and step >= 20 else torch.empty(0, 2)
        loss = combined_loss([cross_entropy(out, y) for out in forward_with_paths(model, x, domain, c)], lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = batch(torch.full((2000,), 2))
    with torch.no_grad():
        return float(cross_entropy(model.eval()(x), y))


def test_check_13_training_on_paths_helps_an_unseen_domain() -> None:
    """Check 13: mean loss over seeds under an unseen scale and shift, mean path, not worse than without paths."""
    seeds = range(4)
    without = sum(toy_loss(0.0, seed) for seed in seeds) / len(seeds)
    with_paths = sum(toy_loss(1.0, seed) for seed in seeds) / len(seeds)
    assert with_paths <= without


# ------------------------------------------------------------------------------------------------ model


def reid_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """24 images of 3 domains, 2 identities a domain, 4 images an identity."""
    labels = torch.arange(6).repeat_interleave(4)
    pattern = normal(6, 3, 32, 16, seed=100, dtype=torch.float32)
    images = pattern[labels] + 0.5 * normal(24, 3, 32, 16, seed=seed, dtype=torch.float32)
    return images * (1 + labels // 2)[:, None, None, None] + labels[:, None, None, None] // 2, labels, labels // 2


def test_training_steps_reduce_the_loss_and_the_export_agrees() -> None:
    torch.manual_seed(0)
    model = GDNorm(6, 3, depth=18, width=8)
    optimizer = reid_optimizer(model, lr=2e-3)
    losses = []
    for step in range(12):
        images, labels, domain = reid_batch(step)
        coefficients = path_coefficients(3, 1, generator=generator(step))
        outputs = model(images, domain, coefficients)
        assert len(outputs) == 2
        loss = combined_loss([model.loss(out, labels, domain) for out in outputs], path_weight(step, settling=4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(model.loss(outputs[0], labels, domain).detach()))
    assert losses[-1] < 0.7 * losses[0]
    images, _, domain = reid_batch(99)
    model.eval()
    with torch.no_grad():
        for k in (-1, 0, 2):
            features = model(images, k)
            close(features, model.exported(k)(images), 1e-4)
            close(features.norm(dim=1), torch.ones(24), 1e-6)
        assert torch.equal(model(images), model(images, -1))
        close(model(images, domain)[domain == 1], model(images[domain == 1], 1), 1e-5)
    assert not any("Domain" in type(m).__name__ or "Gaussian" in type(m).__name__ for m in model.exported().modules())


def test_a_step_with_paths_from_regression() -> None:
    """Reading B: coordinates from features, a random point among the domains, its posterior as a noisy path."""
    torch.manual_seed(0)
    model, coordinates = GDNorm(6, 3, depth=18, width=8), DomainCoordinates(3, 64)
    images, labels, domain = reid_batch()
    for norm in model.modules():
        if isinstance(norm, GaussianProcessBatchNorm2d | GaussianProcessBatchNorm1d):
            randomised(norm)
    (pooled, _), *_ = model(images, domain, torch.empty(0, 3))
    coordinates.update(pooled, domain)
    z = coordinates()
    paths = regression_coefficients(z, sample_coordinates(z, 2, generator=generator(1)))
    twin = copy.deepcopy(model)  # as statistics move with each call
    outputs = [network(images, domain, *paths, generator=generator(2)) for network in (model, twin)]
    assert len(outputs[0]) == 3
    for one, other in zip(*outputs, strict=True):
        close(one[0], other[0], 1e-6)
    assert not torch.allclose(outputs[0][1][0], outputs[0][2][0])
    combined_loss([model.loss(out, labels, domain) for out in outputs[0]]).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_statistics_are_those_of_the_domains_alone() -> None:
    """The paths neither use nor change the running statistics."""
    torch.manual_seed(0)
    model = GDNorm(6, 3, depth=18, width=8)
    alone = copy.deepcopy(model)
    images, _, domain = reid_batch()
    source, on_path = model(images, domain, path_coefficients(3, 1, generator=generator(0)))
    close(source[0], alone(images, domain)[0], 1e-6)
    assert not torch.allclose(source[0], on_path[0])
    for (name, value), (_, want) in zip(model.named_buffers(), alone.named_buffers(), strict=True):
        assert torch.equal(value, want), name


def test_weight_of_paths_and_learning_rate() -> None:
    assert [path_weight(epoch) for epoch in (0, 4, 5, 80)] == [0, 0, 1, 1]
    source, path = torch.tensor(2.0), torch.tensor(3.0)
    assert combined_loss([source], 1.0) == 2
    assert combined_loss([source, path, 3 * path], 0.5) == 2 + 0.5 * 6
    factor = learning_rate_factor()
    assert factor(0) == pytest.approx(0.01)
    assert factor(5) == pytest.approx(0.505)
    assert [factor(e) for e in (10, 39, 40, 70)] == pytest.approx([1, 1, 0.1, 0.01])


def test_converted_network_trains_on_paths() -> None:
    """Any network with BatchNorm: conversion, one step, export."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    model = convert_domain_batch_norm(plain, 2, kind="gaussian_process")
    x, domain = normal(8, 2, 5, 5, dtype=torch.float32), torch.arange(8) % 2
    outputs = forward_with_paths(model, x, domain, path_coefficients(2, 3, generator=generator(0)))
    assert [tuple(out.shape) for out in outputs] == [(8, 5)] * 4
    combined_loss([out.square().mean() for out in outputs]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(forward_with_paths(model, x, domain, torch.empty(0, 2))) == 1


@pytest.mark.parametrize(
    "error",
    [
        lambda: path_coefficients(0),
        lambda: path_coefficients(2, alpha=-1.0),
        lambda: batch_norm_paths(nn.Linear(2, 2), torch.ones(1, 2)),
        lambda: batch_norm_paths(network(3), torch.ones(1, 2)),
        lambda: batch_norm_paths(network(3), torch.ones(2, 3), torch.ones(3)),
        lambda: batch_norm_paths(nn.Sequential(network(3), network(2)), torch.ones(1, 3)),
        lambda: batch_norm_paths(nn.Sequential(network(3), network(3, var_space="raw")), torch.ones(1, 3)),
        lambda: GaussianProcessBatchNorm2d(3, 2, var_space="linear"),
        lambda: regression_coefficients(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: regression_coefficients(torch.zeros(2, 3), torch.zeros(1, 3), noise_variance=0.0),
        lambda: regression_coefficients(normal(2, 3), torch.zeros(1, 3), length=-1.0),
        lambda: GDNorm(4, 2, depth=18, width=4)(torch.zeros(2, 3, 32, 16), None, torch.ones(1, 2)),
        lambda: DomainCoordinates(2, 3, momentum=1.0),
    ],
)
def test_bad_input(error: Any) -> None:
    with pytest.raises(ValueError, match=r"must"):
        error()


def test_index_of_a_path_that_does_not_exist() -> None:
    model = network(3)
    with (
        path_context(batch_norm_paths(model, torch.ones(2, 3)), torch.tensor([0, 2])),
        pytest.raises(ValueError, match=r"index must hold ids in 0..1, not 2"),
    ):
        model(normal(2, 2, 4, 4))


def test_paths_of_another_network() -> None:
    model, other = network(3), GaussianProcessBatchNorm2d(2, 3)
    batch_norm_paths(model, torch.ones(1, 3))
    with path_context(batch_norm_paths(other, torch.ones(1, 3)), torch.zeros(2, dtype=torch.int64)):
        for layer in (model[1], model[4]):
            with pytest.raises(ValueError, match="paths must be those of the network"):
                layer(normal(2, layer.num_features, 4, 4))


# ------------------------------------------------------------------------------------------------ backbone


def torchvision_names(depth: int) -> list[str]:
    """Parameters and buffers of torchvision's ResNet, by its naming rule."""
    bottleneck, blocks = (depth >= 50, {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth])
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    for layer, count in enumerate(blocks, 1):
        for block in range(count):
            prefix = f"layer{layer}.{block}."
            for i in range(1, 4 if bottleneck else 3):
                names += [f"{prefix}conv{i}.weight", *(f"{prefix}bn{i}.{name}" for name in norm)]
            if block == 0 and (bottleneck or layer > 1):
                names += [f"{prefix}downsample.0.weight", *(f"{prefix}downsample.1.{name}" for name in norm)]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("depth", [18, 50])
def test_backbone_takes_torchvision_weights(depth: int) -> None:
    torch.manual_seed(0)
    plain = ResNet(depth, width=8)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            randomised(norm)
    state = plain.state_dict()
    assert sorted([*state, "fc.weight", "fc.bias"]) == sorted(torchvision_names(depth))
    state = {**state, "fc.weight": torch.zeros(1000, 9), "fc.bias": torch.zeros(1000)}
    model = ResNet(depth, width=8, norm=lambda channels: GaussianProcessBatchNorm2d(channels, 3))
    load_imagenet(model, state)
    x = normal(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        want = plain.eval()(x)
        close(model.eval()(x), want, 1e-4)
        close(folded(model)(x), want, 1e-4)
    assert want.shape == (2, model.channels[-1], 2, 2)  # last stride 1
    assert ResNet(depth, width=8, last_stride=2).eval()(x).shape[2:] == (1, 1)
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"lacks \['layer1.0.conv1.weight'\]"):
        load_imagenet(model, state)
    with pytest.raises(ValueError, match="depth must be"):
        ResNet(20)


def test_resnet_50_has_the_norms_of_the_paper_file() -> None:
    """53 layers, 26,560 channels, 106,240 numbers on a path."""
    with torch.device("meta"):
        model = ResNet(50, norm=lambda channels: GaussianProcessBatchNorm2d(channels, 4))
    norms = [m for m in model.modules() if isinstance(m, GaussianProcessBatchNorm2d)]
    assert len(norms) == 53
    assert sum(m.num_features for m in norms) == 26_560
    assert math.prod(model.channels) == 256 * 512 * 1024 * 2048


# ------------------------------------------------------------------------------------------------ batches


def pictures_of_domains() -> tuple[Tensor, Tensor]:
    """Identities and domains of 3 domains with 9, 4 and 5 identities of 1 to 6 pictures, in mixed order."""
    sizes = torch.arange(18) % 6 + 1
    identities = torch.cat([torch.arange(9), torch.arange(4), torch.arange(5)])
    domains = torch.tensor([0] * 9 + [1] * 4 + [7] * 5)
    order = torch.randperm(int(sizes.sum()), generator=generator(1))
    return identities.repeat_interleave(sizes)[order], domains.repeat_interleave(sizes)[order]


@pytest.mark.parametrize(("P", "K"), [(4, 4), (1, 1), (3, 2)])
def test_batches_hold_identities_of_every_domain(P: int, K: int) -> None:
    identities, domains = pictures_of_domains()
    sampler = DomainBalancedSampler(identities, domains, identities_per_domain=P, pictures_per_identity=K, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-9 // P)
    seen: dict[int, list[int]] = {0: [], 1: [], 7: []}
    for batch in batches:
        groups = torch.tensor(batch).view(3, P, K)
        for domain, group in zip((0, 1, 7), groups, strict=True):
            assert (domains[group] == domain).all()
            people = identities[group]
            assert (people == people[:, :1]).all()
            assert people[:, 0].unique().numel() == P  # no identity twice
            for row, person in zip(group.tolist(), people[:, 0].tolist(), strict=True):
                available = int(((identities == person) & (domains == domain)).sum())
                assert len(set(row)) == min(K, available)
            seen[domain] += people[:, 0].tolist()
    for domain, count in ((0, 9), (1, 4), (7, 5)):
        assert len(seen[domain]) >= 9
        for start in range(0, len(seen[domain]) - count + 1, count):  # all of a domain before any comes again
            assert sorted(seen[domain][start : start + count]) == list(range(count))


def test_epochs_differ_and_processes_share_them() -> None:
    identities, domains = pictures_of_domains()
    sampler = DomainBalancedSampler(identities, domains, identities_per_domain=2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(DomainBalancedSampler(identities, domains, identities_per_domain=2, seed=1)) != first
    parts = [DomainBalancedSampler(identities, domains, identities_per_domain=2, rank=r, world=2) for r in range(2)]
    assert [len(part) for part in parts] == [3, 3]  # 5 batches filled up to 6
    batches = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert batches[:5] == first
    loader = torch.utils.data.DataLoader(torch.arange(len(domains)), batch_sampler=sampler)
    assert next(iter(loader)).shape == (3 * 2 * 4,)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], [0]), {}, r"must be \[N\]"),
        (([], []), {}, r"must be \[N\]"),
        (([0, 1, 2, 0, 1], [0, 0, 0, 1, 1]), {"identities_per_domain": 3}, "domain 1 must have at least 3 identities"),
        (([0, 1], [0, 0]), {"identities_per_domain": 0}, "must be positive"),
        (([0, 1], [0, 0]), {"rank": 2, "world": 2}, "rank in 0..world-1"),
    ],
)
def test_bad_batches(arguments: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainBalancedSampler(*arguments, **{"identities_per_domain": 1, **options})
