"""Acceptance checks of CFD, each named by its number, and the reference model.

The oracle is the module written step by step on whole maps: torch operations on x, one a formula of the paper file.
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
from torch.nn.functional import instance_norm, softplus

from neuraldeps_kernels import centred_affine, instance_moments
from neuraldeps_kernels.models.cfd import CFD, CFDModule, domain_loss, relu_pool
from neuraldeps_kernels.models.reid_training import (
    batch_hard_triplet_losses,
    mean_over_domains,
    reid_optimizer,
    restitution_ranking_loss,
)
from neuraldeps_kernels.models.resnet import ResNet, load_imagenet
from neuraldeps_kernels.nn import (
    CalibratedBatchNorm1d,
    CalibratedBatchNorm2d,
    CalibratedInstanceNorm2d,
    DomainBatchNorm2d,
    domain_context,
)

DOUBLE = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(layer: nn.Module, seed: int = 1) -> Any:
    """`layer` with random parameters (weights of norms positive) and running statistics."""
    g = generator(seed)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=g, dtype=DOUBLE)
                if name.startswith("fc") and tensor.dim() == 2:
                    tensor.copy_(values / math.sqrt(tensor.shape[1]))
                else:
                    positive = name.rpartition(".")[2] in ("weight", "running_var")
                    tensor.copy_(values.abs() + 0.3 if positive else 0.6 * values)
    return layer


# ------------------------------------------------------------------------------------------------ step by step


def csbn_by_steps(layer: Any, x: Tensor, domain: Tensor) -> Tensor:
    """Five steps of Representative BatchNorm, the middle ones by domain; training."""
    over = (..., *(None,) * (x.dim() - 2))
    trailing = tuple(range(2, x.dim()))
    g = x.mean(trailing, keepdim=True) if trailing else x
    xc = x + layer.center_weight[over] * g
    xs = torch.zeros_like(x)
    for k in domain.unique():
        inside = domain == k
        rows = xc[inside]
        axes = (0, *trailing)
        m, v = rows.mean(axes, keepdim=True), rows.var(axes, correction=0, keepdim=True)
        xs = xs.index_put((inside.nonzero()[:, 0],), (rows - m) / (v + layer.eps).sqrt())
    t = xs.mean(trailing, keepdim=True) if trailing else xs
    s = torch.sigmoid(layer.scale_weight[over] * t + layer.scale_bias[over])
    if layer.per_domain_affine:
        weight, bias = (table[domain][(slice(None), slice(None), *over[1:])] for table in (layer.weight, layer.bias))
    else:
        weight, bias = (table[over] for table in (layer.weight, layer.bias))
    return weight * s * xs + bias


def cin_by_steps(layer: Any, x: Tensor) -> Tensor:
    g = x.mean((2, 3), keepdim=True)
    q = (x - g).square().mean((2, 3), keepdim=True)
    over = (..., None, None)
    xi = (x - g) / (q + layer.eps).sqrt()
    s = torch.sigmoid(layer.scale_weight[over] * (q + layer.eps).sqrt().log() + layer.scale_bias[over])
    return layer.weight[over] * s * xi + layer.bias[over]


def module_by_steps(module: CFDModule, x: Tensor, domain: Tensor) -> dict[str, Tensor]:
    """Every map and gate of the module; training."""
    xh = csbn_by_steps(module.csbn, x, domain)
    z = cin_by_steps(module.cin, xh)
    R = xh - z
    p = R.mean((2, 3))
    split = module.fc2(module.fc1(p).relu())
    e_dom, e_ent = split.unflatten(1, (2, -1)).softmax(1).unbind(1)
    R_dom, R_ent = e_dom[..., None, None] * R, e_ent[..., None, None] * R
    a = module.fc4(module.fc3(R_ent.mean((2, 3))).relu()).sigmoid()
    f = z + a[..., None, None] * R_ent
    f_minus = z + (1 - a)[..., None, None] * R_ent + R_dom
    return {
        "xh": xh,
        "z": z,
        "R_dom": R_dom,
        "R_ent": R_ent,
        "f": f,
        "f_minus": f_minus,
        "e_dom": e_dom,
        "e_ent": e_ent,
        "a": a,
        "p": p,
    }


def module_and_input(
    N: int = 8, C: int = 6, dtype: torch.dtype = DOUBLE, H: int = 5, W: int = 3
) -> tuple[CFDModule, Tensor, Tensor]:
    """A random module of four domains, one of them absent, one with a single image."""
    module = randomised(CFDModule(C, 4, reduction=2).to(dtype))
    domain = torch.tensor([2, 0, 0, 1, 2, 0, 2, 0] + [0, 2] * (N // 2))[:N]
    return module, (2 * normal(N, C, H, W, seed=5) + 1).to(dtype), domain


# ------------------------------------------------------------------------------------------------ checks 1 to 5: CSBN


def test_check_1_without_calibration_csbn_is_batch_norm() -> None:
    """Check 1: w_m = w_v = 0, b_v = 40, one domain: output, dx, dgamma, dbeta, running statistics."""
    layer, plain = CalibratedBatchNorm2d(4, 1, dtype=DOUBLE), randomised(nn.BatchNorm2d(4, dtype=DOUBLE))
    layer.load_state_dict(plain.state_dict(), strict=False)
    nn.init.constant_(layer.scale_bias, 40)
    for training in (True, True, False):
        results = []
        for module in (layer.train(training), plain.train(training)):
            x = (2 * normal(6, 4, 3, 5) + 1).requires_grad_()
            module.zero_grad()
            y = module(x) if module is plain else module(x, 0)
            y.backward(normal(6, 4, 3, 5, seed=1))
            results.append((y, x.grad, module.weight.grad, module.bias.grad))
        for got, want in zip(*results, strict=True):
            close(got, want, 1e-13, 1.0)
        close(layer.running_mean[0], plain.running_mean, 1e-14)
        close(layer.running_var[0], plain.running_var, 1e-14)
    assert layer.num_batches_tracked.tolist() == [2]


def test_check_2_without_calibration_csbn_is_dsbn() -> None:
    """Check 2: the same with three domains; with any w_m the running mean is 1 + w_m times that of the plain domain."""
    layer = CalibratedBatchNorm2d(4, 3, dtype=DOUBLE, momentum=None)
    plain = DomainBatchNorm2d(4, 3, dtype=DOUBLE, momentum=None, per_domain_affine=False)
    nn.init.constant_(layer.scale_bias, 40)
    x, domain = 2 * normal(8, 4, 3, 3) + 1, torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])
    close(layer(x, domain), plain(x, domain), 1e-13)
    close(layer.running_mean, plain.running_mean, 1e-14)
    close(layer.running_var, plain.running_var, 1e-14)
    with torch.no_grad():
        layer.center_weight.copy_(normal(4, seed=2))
    layer.reset_running_stats()
    layer(x, domain)
    close(layer.running_mean, (1 + layer.center_weight) * plain.running_mean, 1e-13)


@pytest.mark.parametrize("shape", [(7, 4, 3, 5), (7, 4)])
@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("per_domain_affine", [False, True])
def test_check_3_csbn_is_its_definition(shape: tuple[int, ...], domains: int, per_domain_affine: bool) -> None:
    """Check 3: the five steps of Representative BatchNorm (one domain) with random parameters, and all gradients."""
    kind = CalibratedBatchNorm2d if len(shape) == 4 else CalibratedBatchNorm1d
    layer = randomised(kind(4, domains, per_domain_affine=per_domain_affine, dtype=DOUBLE))
    domain = torch.tensor([0, 2, 2, 0, 2, 0, 0]) % domains
    x, dy = (2 * normal(*shape) + 1).requires_grad_(), normal(*shape, seed=1)
    inputs = [x, *layer.parameters()]
    got, want = layer(x, domain), csbn_by_steps(layer, x, domain)
    close(got, want, 1e-12)
    for one, other in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        close(one, other, 1e-10, 1e-3)
    if domains == 3 and per_domain_affine:
        gradient = torch.autograd.grad(layer(x, domain).square().sum(), layer.weight)[0]
        assert torch.equal(gradient[1], torch.zeros(4, dtype=DOUBLE))  # an absent domain


def test_start_is_a_scaled_domain_batch_norm() -> None:
    """At first CSBN is sigmoid(1) times DSBN; with unit_start it is DSBN."""
    x, domain = normal(6, 4, 3, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    want = DomainBatchNorm2d(4, 2, dtype=DOUBLE)(x, domain)
    close(CalibratedBatchNorm2d(4, 2, dtype=DOUBLE)(x, domain), want / (1 + math.exp(-1)), 1e-13)
    close(CalibratedBatchNorm2d(4, 2, unit_start=True, dtype=DOUBLE)(x, domain), want, 1e-13)


def test_check_4_gradcheck_of_csbn() -> None:
    """Check 4: shuffled ids, one domain absent, one with a single image."""
    layer = randomised(CalibratedBatchNorm2d(2, 4, dtype=DOUBLE))
    domain = torch.tensor([2, 0, 0, 1, 2])
    check_gradients(layer, normal(5, 2, 2, 2).requires_grad_(), domain)


def test_check_4_gradcheck_of_cin() -> None:
    """Check 4, with one constant map."""
    x = normal(3, 2, 2, 2)
    x[0, 0] = 1.5
    check_gradients(randomised(CalibratedInstanceNorm2d(2, eps=0.1, dtype=DOUBLE)), x.requires_grad_())


def test_check_4_gradcheck_of_the_module() -> None:
    """Check 4: x and all parameters, of the map and of the pooled features."""
    module = randomised(CFDModule(2, 3, reduction=1, eps=1e-3).double(), seed=3)
    x, domain = normal(4, 2, 2, 2, seed=3).requires_grad_(), torch.tensor([2, 0, 2, 0])
    check_gradients(module, x, domain)
    check_gradients(WithPools(module), x, domain)


class WithPools(nn.Module):
    """Map and pooled features of a module as one vector."""

    def __init__(self, module: CFDModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        f, pools = self.module.with_pools(x, domain)
        return torch.cat([out.flatten() for out in (f, *pools)])


def check_gradients(module: nn.Module, x: Tensor, *arguments: Tensor) -> None:
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, *arguments))

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters))


@settings(deadline=None, max_examples=20)
@given(a=st.lists(st.floats(0.1, 50), min_size=3, max_size=3), b=st.lists(st.floats(-100, 100), min_size=3, max_size=3))
def test_check_5_csbn_does_not_see_scale_and_shift_of_a_domain(a: list[float], b: list[float]) -> None:
    """Check 5: without centring, x -> a_k x + b_k changes the output by O(eps)."""
    layer = randomised(CalibratedBatchNorm2d(4, 3, eps=1e-9, dtype=DOUBLE))
    nn.init.zeros_(layer.center_weight)
    x, domain = normal(9, 4, 3, 3), torch.arange(9) % 3
    scale, shift = (torch.tensor(values, dtype=DOUBLE)[domain][:, None, None, None] for values in (a, b))
    close(layer(scale * x + shift, domain), layer(x, domain), 1e-6)


# ------------------------------------------------------------------------------------------------ checks 6 and 7: CIN


def test_check_6_cin_without_gate_is_instance_norm() -> None:
    """Check 6: w = 0 gives gamma sigmoid(b) IN + beta, which sees neither shift nor positive scale of an instance."""
    layer = randomised(CalibratedInstanceNorm2d(4, eps=1e-9, dtype=DOUBLE))
    nn.init.zeros_(layer.scale_weight)
    x = normal(5, 4, 3, 3)
    gate = torch.sigmoid(layer.scale_bias)
    close(layer(x), instance_norm(x, weight=layer.weight * gate, bias=layer.bias, eps=1e-9), 1e-13)
    scale, shift = normal(5, 1, 1, 1, seed=1).abs() + 0.1, 10 * normal(5, 1, 1, 1, seed=2)
    close(layer(scale * x + shift), layer(x), 1e-6)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1.5, 20), weight=st.floats(-3, 3).filter(lambda w: abs(w) > 0.1))
def test_check_6_gate_of_cin_sees_the_scale(scale: float, weight: float) -> None:
    """Check 6: with w != 0 not invariant to scale but to shift, and monotone in w log(scale)."""
    layer = CalibratedInstanceNorm2d(4, eps=1e-9, dtype=DOUBLE)
    nn.init.constant_(layer.scale_weight, weight)
    x = normal(5, 4, 3, 3)
    ratio = layer(scale * x) / layer(x)
    assert bool((ratio > 1).all()) if weight > 0 else bool((ratio < 1).all())
    close(layer(x + 7), layer(x), 1e-9)
    want = cin_by_steps(layer, scale * x)
    close(layer(scale * x), want, 1e-12)


def test_check_7_instance_norm_does_not_see_centring() -> None:
    """Check 7: why CIN is not RBN around instance norm: centring cancels and the mean of the result is always beta."""
    x, w_m = normal(5, 4, 3, 3), normal(4, seed=1)[:, None, None]
    centred = x + w_m * x.mean((2, 3), keepdim=True)
    close(instance_norm(centred), instance_norm(x), 1e-13)
    assert instance_norm(centred).mean((2, 3)).abs().max() < 1e-14
    constant = CalibratedInstanceNorm2d(4, dtype=DOUBLE)
    nn.init.constant_(constant.bias, 3)
    assert torch.equal(constant(torch.full((2, 4, 3, 3), 5.0, dtype=DOUBLE)), torch.full((2, 4, 3, 3), 3.0).double())


# ------------------------------------------------------------------------------------------------ checks 8, 9: module


def test_check_8_parts_add_up() -> None:
    """Check 8: z + R_dom + R_ent = xh = f + (1 - a) R_ent + R_dom, e_dom + e_ent = 1, 0 < a < 1."""
    module, x, domain = module_and_input()
    g, q = instance_moments(x)
    parts = module.decomposition(g, q, module.csbn.statistics(x, domain), module.coefficient_parameters())
    maps = {name: centred_affine(x, g, *getattr(parts, name)) for name in ("f", "z", "f_minus")}
    xh = copy.deepcopy(module.csbn)(x, domain)
    R = xh - maps["z"]
    e_dom, e_ent, a = (gate[..., None, None] for gate in (parts.e_dom, parts.e_ent, parts.a))
    close(parts.e_dom + parts.e_ent, torch.ones_like(parts.a), 1e-15)
    assert bool(((parts.a > 0) & (parts.a < 1)).all())
    close(maps["f"] + (1 - a) * e_ent * R + e_dom * R, xh, 1e-13)
    close(maps["f_minus"], maps["z"] + (1 - a) * e_ent * R + e_dom * R, 1e-13)
    close(parts.p, R.mean((2, 3)), 1e-13)


@pytest.mark.parametrize(("gate", "expected"), [(-60.0, "z"), (60.0, "xh")])
def test_check_8_ends_of_the_gates(gate: float, expected: str) -> None:
    """Check 8: a = 0 gives f = z; a = 1 with e_ent = 1 gives f = xh."""
    module, x, domain = module_and_input()
    with torch.no_grad():
        for layer in (module.fc2, module.fc4):
            layer.weight.zero_()
        module.fc4.bias.fill_(gate)
        module.fc2.bias[:6] = -60
        module.fc2.bias[6:] = 60
    close(module(x, domain), module_by_steps(module, x, domain)[expected], 1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"), [(DOUBLE, 1e-12, 1e-9), (torch.float32, 1e-5, 1e-4)]
)
def test_check_9_coefficient_form_is_the_module_step_by_step(
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    """Check 9: map, pooled features and all gradients; the steps in float64 of the same values."""
    module, x, domain = module_and_input(N=8, C=32, dtype=dtype, H=8, W=4)
    exact = copy.deepcopy(module).double()
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    f = copy.deepcopy(module)(x, domain)
    with_pools, pools = module.with_pools(leaf, domain)
    steps = module_by_steps(exact, exact_leaf, domain)
    want = {
        "domain": steps["R_dom"].mean((2, 3)),
        **{name: steps[name].relu().mean((2, 3)) for name in ("z", "f", "f_minus")},
    }
    close(f.double(), steps["f"], tolerance)
    close(with_pools.double(), steps["f"], tolerance)
    for name, value in want.items():
        close(getattr(pools, name).double(), value, tolerance)
    weights = [normal(*x.shape, seed=9), *(normal(8, 32, seed=10 + i) for i in range(4))]
    outputs = [with_pools, *pools]
    (sum((out * w.to(dtype)).sum() for out, w in zip(outputs, weights, strict=True))).backward()
    exact_outputs = [steps["f"], *(want[name] for name in pools._fields)]
    (sum((out * w).sum() for out, w in zip(exact_outputs, weights, strict=True))).backward()
    close(leaf.grad.double(), exact_leaf.grad, gradient_tolerance)
    for one, other in zip(module.parameters(), exact.parameters(), strict=True):
        close(one.grad.double(), other.grad, gradient_tolerance)


def test_check_9_both_forms_update_the_statistics_once() -> None:
    module, x, domain = module_and_input()
    other = copy.deepcopy(module)
    module(x, domain)
    other.with_pools(x, domain)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(module.csbn, name), getattr(other.csbn, name))
    assert module.csbn.num_batches_tracked.tolist() == [1, 1, 1, 0]


# ------------------------------------------------------------------------------------------------ checks 10 and 11


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4)],
)
@pytest.mark.parametrize(
    ("C", "H", "W"),
    [
        pytest.param(256, 64, 32, marks=pytest.mark.slow),  # after stage 1
        pytest.param(512, 32, 16, marks=pytest.mark.slow),  # after stage 2
        (1024, 16, 8),  # after stage 3
    ],
)
def test_check_10_kernels_on_the_three_stages(
    C: int, H: int, W: int, dtype: torch.dtype, tolerance: float, gradient_tolerance: float, layout: torch.memory_format
) -> None:
    """Check 10: the module against float64 steps, forward and backward, at the sizes of the paper."""
    N = 4
    module = randomised(CFDModule(C, 2))
    x = (normal(N, C, H, W) + 0.5).to(dtype).contiguous(memory_format=layout)
    domain, dy = torch.tensor([1, 0, 0, 1]), normal(N, C, H, W, seed=1).to(dtype)
    leaf = x.clone().requires_grad_()
    f = module(leaf, domain)
    assert f.dtype == dtype
    assert f.is_contiguous(memory_format=layout)
    f.backward(dy)
    exact_leaf = x.double().requires_grad_()
    exact = module_by_steps(copy.deepcopy(module).double(), exact_leaf, domain)["f"]
    exact.backward(dy.double())
    for got, want, limit in ((f.detach(), exact.detach(), tolerance), (leaf.grad, exact_leaf.grad, gradient_tolerance)):
        assert float((got.double() - want).norm() / want.norm()) <= limit


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_check_11_large_mean(layout: torch.memory_format) -> None:
    """Check 11: q within 1e-3 of float64 at mean 1e3, std 0.1; the centred sum of dy (x - g) beats the other."""
    x = (1e3 + 0.1 * normal(8, 16, 16, 8)).float().contiguous(memory_format=layout)
    g, q = instance_moments(x)
    assert ((q / x.double().var((2, 3), correction=0) - 1).abs() < 1e-3).all()
    dy = normal(8, 16, 16, 8, seed=1, dtype=torch.float32)
    exact = (dy.double() * (x.double() - x.double().mean((2, 3), keepdim=True))).sum((2, 3))
    _, centred = torch.ops.neuraldeps.centred_affine_sums(dy, x, g, None)
    uncentred = (dy * x).sum((2, 3)) - g * dy.sum((2, 3))
    error, other = ((value - exact).norm() / exact.norm() for value in (centred, uncentred))
    assert error < 1e-2
    assert error < 0.5 * other
    layer = randomised(CalibratedBatchNorm2d(16, 2))
    close(layer(x, torch.arange(8) % 2).double(), csbn_by_steps(layer.double(), x.double(), torch.arange(8) % 2), 2e-3)


# ------------------------------------------------------------------------------------------------ check 12: losses


def test_check_12_ranking_loss() -> None:
    """Check 12: 4 log 2 where the parts coincide; smaller when f brings positives closer than z; gradient finite."""
    labels = torch.arange(4).repeat_interleave(3)
    u = normal(12, 5)
    close(restitution_ranking_loss(u, u, u, labels), torch.tensor(4 * math.log(2), dtype=DOUBLE), 1e-14)
    centres = normal(4, 5, seed=1)[labels]
    closer = u + 2 * centres
    assert restitution_ranking_loss(u, closer, u, labels) < restitution_ranking_loss(u, u, u, labels)
    assert restitution_ranking_loss(closer, closer, u, labels) < restitution_ranking_loss(u, u, u, labels)

    module, x, domain = module_and_input()
    _, pools = module.with_pools(x, domain)
    restitution_ranking_loss(pools.z, pools.f, pools.f_minus, torch.arange(8) % 3).backward()
    for layer in (module.fc2, module.fc4):
        assert bool(layer.weight.grad.isfinite().all())
        assert layer.weight.grad.abs().max() > 0
    assert restitution_ranking_loss(u, u, u, torch.arange(12)) == 0  # no sample has a positive


def test_check_12_ranking_loss_is_its_formula() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0])
    z, f, f_minus = (normal(5, 3, seed=s) for s in range(3))

    def D(u: Tensor, a: int, b: int) -> Tensor:
        return 0.5 - u[a] @ u[b] / (2 * u[a].norm() * u[b].norm())

    total = torch.zeros((), dtype=DOUBLE)
    for a in range(5):
        p = max((b for b in range(5) if b != a and labels[b] == labels[a]), key=lambda b: float(D(f, a, b)))
        n = min((b for b in range(5) if labels[b] != labels[a]), key=lambda b: float(D(f, a, b)))
        total += softplus(D(f, a, p) - D(z, a, p)) + softplus(D(z, a, n) - D(f, a, n))
        total += softplus(D(z, a, p) - D(f_minus, a, p)) + softplus(D(f_minus, a, n) - D(z, a, n))
    close(restitution_ranking_loss(z, f, f_minus, labels), total / 5, 1e-13)


def test_check_12_domain_loss() -> None:
    """Check 12: log D for zero logits."""
    logits = [torch.zeros(6, 3), torch.zeros(6, 3)]
    close(domain_loss(logits, torch.arange(6) % 3), torch.tensor(math.log(3)), 1e-6)


def test_triplet_loss_is_batch_hard() -> None:
    u, labels, domain = normal(10, 4), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4]), torch.arange(10) // 5
    got, inside = batch_hard_triplet_losses(u, labels), batch_hard_triplet_losses(u, labels, domain)
    for losses, pairs in ((got, torch.ones(10, 10, dtype=torch.bool)), (inside, domain[:, None] == domain)):
        for a in range(10):
            distance = (u - u[a]).norm(dim=1)
            positive = (labels == labels[a]) & pairs[a] & (torch.arange(10) != a)
            negative = (labels != labels[a]) & pairs[a]
            want = 0.0
            if positive.any() and negative.any():
                want = max(0.0, float(0.3 + distance[positive].max() - distance[negative].min()))
            assert float(losses[a]) == pytest.approx(want, abs=1e-12)
    same = torch.zeros(4, 3, dtype=DOUBLE, requires_grad=True)
    batch_hard_triplet_losses(same, torch.tensor([0, 0, 1, 1])).sum().backward()
    assert bool(same.grad.isfinite().all())


def test_mean_over_domains_weighs_domains_alike() -> None:
    losses, domain = torch.tensor([1.0, 3.0, 10.0, float("nan")]), torch.tensor([0, 0, 2, 2])
    assert mean_over_domains(losses[:3], domain[:3], 4) == (2 + 10) / 2
    assert bool(mean_over_domains(losses, domain, 4).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_pool(dtype: torch.dtype) -> None:
    """Pooled value and gradients of relu(A (x - g) + B); the map itself is not kept for the gradient."""
    x = normal(3, 4, 5, 6).to(dtype).requires_grad_()
    g, A, B = (normal(3, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2, 3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pooled = relu_pool(x, g, A, B)
    assert pooled.dtype == torch.float32
    assert not [t for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()]
    pooled.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, g, A, B)]
    over = (..., None, None)
    want = (leaves[2][over] * (leaves[0] - leaves[1][over]) + leaves[3][over]).relu().mean((2, 3))
    want.square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close(pooled.double(), want, tolerance)
    for got, leaf in zip((x, g, A, B), leaves, strict=True):
        close(got.grad.double(), leaf.grad, tolerance)


# ------------------------------------------------------------------------------------------------ checks 13 and 14


@pytest.mark.parametrize("kind", ["csbn", "module"])
def test_check_13_unseen_domain_is_pooled(kind: str) -> None:
    """Check 13: pooled statistics are those of a domain if all coincide; an image does not depend on the others."""
    module, x, domain = module_and_input()
    layer, csbn = (module, module.csbn) if kind == "module" else (module.csbn, module.csbn)
    layer.eval()
    mean, var = csbn.running_mean, csbn.running_var
    pooled = layer(x)
    known = copy.deepcopy(layer)
    same = known.csbn if kind == "module" else known
    with torch.no_grad():
        same.running_mean.copy_(mean.mean(0).expand_as(mean))
        same.running_var.copy_((var + (mean - mean.mean(0)).square()).mean(0).expand_as(var))
    for k in range(4):
        close(known(x, k), pooled, 1e-13)
    close(known(x), pooled, 1e-13)
    close(layer(x[2:3]), pooled[2:3], 1e-14)
    mixed = layer(x, torch.where(torch.arange(8) < 4, -1, domain))
    close(mixed[:4], pooled[:4], 1e-14)
    close(mixed[4:], layer(x[4:], domain[4:]), 1e-14)


def test_check_14_eval_approaches_training() -> None:
    """Check 14: after many equal batches eval with known ids is the training output, but for the unbiased factor."""
    module, x, domain = module_and_input(N=8, H=16, W=16)
    for _ in range(200):
        trained = module(x, domain)
    close(module.eval()(x, domain), trained, 0.02)
    counts = torch.tensor([4, 1, 3, 0], dtype=DOUBLE)[:3, None] * 256
    with torch.no_grad():
        module.csbn.running_var[:3] *= (counts - 1) / counts
    close(module(x, domain), trained, 1e-6)


# ------------------------------------------------------------------------------------------------ corner cases, model


def test_input_is_not_modified_and_constant_maps_are_finite() -> None:
    module, x, domain = module_and_input(dtype=torch.float32)
    x[0, :3] = 2.5
    x[1] = 0
    before = x.clone()
    leaf = x.requires_grad_()
    module(leaf, domain).square().sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert bool(leaf.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


def test_one_position_and_single_images() -> None:
    """HW = 1: CIN gives beta, CSBN uses the spread of samples; a domain of a single value gives beta."""
    cin = randomised(CalibratedInstanceNorm2d(4, dtype=DOUBLE))
    close(cin(normal(3, 4, 1, 1)), cin.bias[:, None, None].expand(3, -1, 1, 1), 1e-14)
    csbn = randomised(CalibratedBatchNorm1d(4, 3, dtype=DOUBLE))
    x = normal(4, 4)
    y = csbn(x, torch.tensor([0, 1, 0, 0]))
    close(y[1], csbn.bias, 1e-14)
    close(y, csbn_by_steps(csbn, x, torch.tensor([0, 1, 0, 0])), 1e-12)
    assert bool(csbn.running_var.isfinite().all())


def test_non_finite_values_stay_in_their_domain() -> None:
    module, x, domain = module_and_input()
    x[0, 1, 0, 0] = float("nan")  # domain 2
    y = module.csbn(x, domain)
    assert bool(y[domain != 2].isfinite().all())
    assert bool(y[domain == 2][:, [0, 2, 3, 4, 5]].isfinite().all())
    assert bool(module.csbn.running_mean[[0, 1, 3]].isfinite().all())


def test_only_x_is_kept_for_the_gradient() -> None:
    module, x, domain = module_and_input(N=8, C=16, dtype=torch.float32, H=32, W=16)
    leaf, kept = x.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(leaf, domain)
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {leaf.data_ptr()}


def test_module_under_autocast() -> None:
    """Gates and statistics in float32 whatever autocast does outside."""
    module, x, domain = module_and_input(dtype=torch.float32)
    x = x.bfloat16()
    want = copy.deepcopy(module)(x.float(), domain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f, pools = module.with_pools(x, domain)
    assert (f.dtype, pools.domain.dtype, pools.f.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    close(f.float(), want, 8e-3)


def test_module_compiles_in_one_graph_and_exports() -> None:
    torch._dynamo.reset()
    module, x, domain = module_and_input(dtype=torch.float32)
    plain = copy.deepcopy(module)
    close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, domain), plain(x, domain), 1e-5)
    close(module.csbn.running_var, plain.csbn.running_var, 1e-6)
    with torch.no_grad():
        program = torch.export.export(plain.eval(), (x, domain))
        close(program.module()(2 * x, domain), plain(2 * x, domain), 1e-6)


def reid_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """24 images of 3 domains, 2 identities a domain, 4 images an identity."""
    labels = torch.arange(6).repeat_interleave(4)
    pattern = normal(6, 3, 32, 16, seed=100, dtype=torch.float32)
    images = pattern[labels] + 0.5 * normal(24, 3, 32, 16, seed=seed, dtype=torch.float32)
    return images * (1 + labels // 2)[:, None, None, None] + labels[:, None, None, None] // 2, labels, labels // 2


def test_training_steps_reduce_the_loss() -> None:
    torch.manual_seed(0)
    model = CFD(6, 3, depth=18, width=8, reduction=4)
    optimizer = reid_optimizer(model, lr=2e-3)
    free = next(group for group in optimizer.param_groups if not group["weight_decay"])
    assert len(free["params"]) == 3 * 4 + 2 * 3  # three modules and the neck: w_m, w_v, b_v; w, b of CIN
    images, labels, domain = reid_batch()
    losses = []
    for _ in range(16):
        loss = model.loss(model(images, domain), labels, domain)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    images, _, domain = reid_batch(99)
    with torch.no_grad():
        features = model.eval()(images)
        close(features.norm(dim=1), torch.ones(24), 1e-6)
        close(model(images[:3]), features[:3], 1e-5)
        assert not torch.allclose(model(images, domain), features)


def test_options_of_the_model() -> None:
    everywhere = CFD(4, 2, depth=18, width=4, stages=(4,), calibrate_all=True, calibrated_neck=False, reduction=2)
    assert sum(isinstance(m, CalibratedBatchNorm2d) for m in everywhere.modules()) == 20 + 1
    assert isinstance(everywhere.neck, nn.BatchNorm1d)
    load_imagenet(everywhere.backbone, ResNet(18, width=4).state_dict())
    images, labels, domain = torch.randn(4, 3, 32, 16), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    everywhere.loss(everywhere(images, domain), labels, domain).backward()
    plain = CFD(4, 2, depth=18, width=4, stages=())
    with domain_context(domain):
        outputs = plain(images)
    assert outputs.modules == []
    assert bool(plain.loss(outputs, labels, domain).isfinite())
    with pytest.raises(ValueError, match="stages must be"):
        CFD(4, 2, depth=18, width=4, stages=(0,))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda m, x, d: m(x), "domain must be given in training"),
        (lambda m, x, d: m(x, d + 2), r"domain must hold ids in 0..3"),
        (lambda m, x, d: m(x, d[:3]), r"domain must be \[8\]"),
        (lambda m, x, d: m.csbn(x[:, :3], d), "x must have 4 dimensions and 6 channels"),
        (lambda m, x, d: m(x[:, :3], d), "x must have 4 dimensions and 6 channels"),
        (lambda m, x, d: m.with_pools(x[0], d), "x must have 4 dimensions and 6 channels"),
        (lambda m, x, d: m.cin(x[0]), r"x must be \[N, 6, H, W\]"),
        (lambda m, x, d: m.eval()(x, d - 2), r"domain must hold ids in -1..3"),
        (lambda m, x, d: CalibratedInstanceNorm2d(4, activation="gelu"), "activation must be"),
        (lambda m, x, d: CalibratedInstanceNorm2d(4, eps=0.0), "eps must be"),
        (lambda m, x, d: CalibratedInstanceNorm2d(0), "num_features must be"),
    ],
)
def test_bad_input(error: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        error(*module_and_input())
