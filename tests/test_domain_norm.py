"""Normalisation by domain against per-domain `F.batch_norm`, float64 formulas and the plain PyTorch reference.

Checks named "Check n" are acceptance checks of GDNorm, "CFD check n" of CFD.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import neuraldeps_kernels as nk
from neuraldeps_kernels import centred_affine, domain_batch_norm, instance_moments, normalize
from neuraldeps_kernels.reference import domain_norm as reference

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.neuraldeps
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of y, relative
GRADIENT_LIMIT = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}

SHAPES = [
    (6, 3, 4, 5),  # fewer channels than lanes, positions that fill none
    (8, 70, 7, 7),  # one register group and a rest, a tail along positions
    (5, 130, 4, 4),  # one whole block of channels and a rest; just enough positions for stages
    (7, 33, 3),  # few positions: domain by domain
    (9, 257),  # no position
    (4, 16, 40, 52),  # more values in a row than a flush takes
    (3, 5, 2, 3, 4),  # three trailing dimensions
]
LAYOUTS = ("contiguous", "channels_last", "strided")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides: channels last, or of every second column."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x.contiguous()


def ids_of(N: int, D: int) -> Tensor:
    """Domain D - 1 absent, domain 0 with one sample, the others shuffled."""
    ids = torch.randint(1, D - 1, (N,), generator=torch.Generator().manual_seed(N)) if D > 2 else torch.zeros(N).long()
    ids[N // 2] = 0
    return ids


def by_domain(
    x: Tensor,
    domain: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
    momentum: float = 0.1,
) -> Tensor:
    """Every domain's rows through F.batch_norm, one domain with a single value through its definition."""
    y = torch.zeros_like(x)
    for k in range(weight.shape[0]):
        rows = (domain == k).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        part = x[rows]
        buffers = (None, None) if running_mean is None or running_var is None else (running_mean[k], running_var[k])
        if training and part.numel() == x.shape[1]:
            out = part * 0 + bias[k].reshape(1, -1, *(1,) * (x.dim() - 2))
        else:
            out = F.batch_norm(part, *buffers, weight[k], bias[k], training, momentum)
        y = y.index_put((rows,), out)
    y = y if residual is None else y + residual
    return y.relu() if activation == "relu" else y


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primitives_equal_their_definition(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """CFD check 10: every shape, layout and dtype; results have the layout of x."""
    torch.manual_seed(0)
    x = laid_out((torch.randn(shape) * 2 + 3).to(dtype), layout)
    residual, grad = laid_out(torch.randn(shape).to(dtype), "contiguous"), torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = x.double()
    g, q = instance_moments(x)
    want_g, want_q = reference.instance_moments(exact)
    assert g.dtype == q.dtype == wide
    assert relative(g, want_g) <= 1e-6
    assert relative(q, want_q) <= 1e-6
    tables = [torch.randn(shape[:2]).to(wide) for _ in range(2)]
    for activation in (None, "relu"):
        y = centred_affine(x, g, *tables, residual=residual, activation=activation)
        wanted = (g.double(), *(t.double() for t in tables), residual.double(), activation or "none")
        assert relative(y, reference.centred_affine(exact, *wanted)) <= LIMIT[dtype]
        assert y.dtype == dtype
        if layout != "strided":
            assert y.stride() == x.stride()
        mask = y if activation else None
        sums = OPS.centred_affine_sums(grad, x, g, mask)
        for got, want in zip(sums, reference.centred_affine_sums(grad.double(), exact, g.double(), mask), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
        rest = (tables[0], tables[1], q)
        dx, dr = OPS.centred_affine_input_grad(grad, x, g, *rest, mask, True)
        exact_rest = [t.double() for t in rest]
        want_dx, want_dr = reference.centred_affine_input_grad(
            grad.double(), exact, g.double(), *exact_rest, mask, True
        )
        assert relative(dx, want_dx) <= GRADIENT_LIMIT[dtype]
        assert torch.equal(dr.double(), want_dr)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batch_equals_each_domain_alone(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Check 2: outputs, gradients, running statistics, with residual and ReLU; a domain absent, one of one image."""
    torch.manual_seed(1)
    D, C = 4, shape[1]
    domain = ids_of(shape[0], D)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (laid_out(torch.randn(shape).to(dtype), layout).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(D, C, dtype=wide, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(D, C, dtype=wide), torch.rand(D, C, dtype=wide) + 0.5
    tracked = torch.zeros(D, dtype=torch.int64)
    grad = torch.randn(shape).to(dtype)
    twins = [t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    want_mean, want_var = mean.double(), var.double()
    y = domain_batch_norm(
        *(x, domain, mean, var, weight, bias),
        training=True,
        residual=residual,
        activation="relu",
        num_batches_tracked=tracked,
    )
    linear = by_domain(twins[0], domain, want_mean, want_var, twins[1], twins[2], twins[3])
    assert relative(y, linear.relu().detach()) <= LIMIT[dtype]
    y.backward(grad)
    linear.backward(torch.where(y > 0, grad, 0).double())  # the mask of ours: values at 0 may round to either side
    for got, want in zip((x, weight, bias, residual), twins, strict=True):
        assert want.grad is not None
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        assert relative(got.grad, want.grad) <= GRADIENT_LIMIT[dtype] + (1e-6 if dtype != torch.float64 else 0)
    present = torch.bincount(domain, minlength=D) > 0
    one_value = shape[0] == x.numel() // C  # then domain 0 has a single value
    checked = present & ~(torch.arange(D).eq(0) & one_value)
    assert relative(mean[checked], want_mean[checked]) <= 1e-6
    assert relative(var[checked], want_var[checked]) <= 1e-6
    assert torch.equal(tracked, present.long())


def test_absent_domain_keeps_everything() -> None:
    """Check 3: buffers bit-identical, gradients exactly zero; present again it works."""
    x = torch.randn(6, 5, 4, 4)
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    mean, var, tracked = torch.randn(3, 5), torch.rand(3, 5), torch.tensor([3, 4, 5])
    before = mean.clone(), var.clone()
    domain = torch.tensor([0, 2, 2, 0, 0, 2])
    y = domain_batch_norm(x, domain, mean, var, weight, bias, training=True, num_batches_tracked=tracked)
    y.square().sum().backward()
    assert torch.equal(mean[1], before[0][1])
    assert torch.equal(var[1], before[1][1])
    assert tracked.tolist() == [4, 4, 6]
    assert weight.grad is not None
    assert bias.grad is not None
    assert not weight.grad[1].any()
    assert not bias.grad[1].any()
    domain_batch_norm(x, domain * 0 + 1, mean, var, weight, bias, training=True, num_batches_tracked=tracked)
    assert not torch.equal(mean[1], before[0][1])
    assert tracked.tolist() == [4, 5, 6]


@pytest.mark.parametrize("shape", [(8, 6, 5, 5), (8, 6), (8, 6, 7)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_one_domain_is_batch_norm(shape: tuple[int, ...], momentum: float | None) -> None:
    """Check 1: three training steps and eval, all state equal to nn.BatchNorm."""
    make = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    module = make(6, momentum=momentum).double()
    torch.nn.init.normal_(module.weight)
    mean, var, tracked = torch.zeros(1, 6).double(), torch.ones(1, 6).double(), torch.zeros(1, dtype=torch.int64)
    weight, bias = module.weight.detach()[None].clone(), module.bias.detach()[None].clone()
    domain = torch.zeros(8, dtype=torch.int32)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * 3 + step
        options: dict[str, Any] = {"training": True, "momentum": momentum, "num_batches_tracked": tracked}
        y = domain_batch_norm(x, domain, mean, var, weight, bias, **options)
        torch.testing.assert_close(y, module(x), rtol=1e-12, atol=1e-12)
    assert tracked.item() == 3
    torch.testing.assert_close(mean[0], module.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var[0], module.running_var, rtol=1e-12, atol=1e-12)
    y = domain_batch_norm(x, domain, mean, var, weight, bias, training=False)
    torch.testing.assert_close(y, module.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(10, 20, 6, 6), (10, 20)], ids=str)
def test_eval_with_an_unseen_domain(shape: tuple[int, ...]) -> None:
    """Check 9, CFD check 13: -1 takes pooled statistics and mean weights, with gradients of them."""
    torch.manual_seed(2)
    D = 3
    domain = torch.tensor([0, -1, 2, 1, -1, 0, 0, 2, -1, 1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(D, 20).double(), torch.rand(D, 20).double() + 0.1
    weight, bias = (torch.randn(D, 20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pooled = mean.mean(0)
    rows_mean = torch.cat([mean, pooled[None]])
    rows_var = torch.cat([var, (var + (mean - pooled).square()).mean(0)[None]])
    rows = domain % (D + 1)

    def expand(table: Tensor) -> Tensor:
        return table[rows].reshape(10, 20, *(1,) * (len(shape) - 2))

    gamma, beta = (torch.cat([t, t.mean(0)[None]]) for t in (weight, bias))
    want = expand(gamma) * (x - expand(rows_mean)) / (expand(rows_var) + 1e-5).sqrt() + expand(beta)
    y = domain_batch_norm(x, domain, mean, var, weight, bias, training=False)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    inputs = (x, weight, bias)
    for got, exact in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    shared = domain_batch_norm(x, domain, mean, var, weight[0], bias[0], training=False)
    torch.testing.assert_close(
        shared,
        (expand(weight[:1].expand(4, -1)) * (want - expand(beta)) / expand(gamma))
        + bias[0].reshape(1, 20, *(1,) * (len(shape) - 2)),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("shape", [(16, 24, 9, 9), (64, 24), (16, 24, 64)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_large_means_cost_no_accuracy(shape: tuple[int, ...], layout: str, offset: float) -> None:
    """Check 12, CFD check 11: mean / std up to 1e4 in float32, against float64 of the same rounded values."""
    torch.manual_seed(3)
    x = laid_out(torch.randn(shape) + offset, layout)
    domain = torch.arange(shape[0]) % 3
    y, mean, variance, _ = OPS.domain_batch_norm(x, domain, None, None, None, None, None, 3, True, 1e-5, "none", False)
    ones = torch.ones(3, shape[1], dtype=torch.float64)
    want = by_domain(x.double(), domain, None, None, ones, 0 * ones)
    assert relative(y, want) <= 1e-6
    exact = reference.domain_statistics(x.double(), domain, 3)
    assert relative(mean - offset, exact[0] - offset) <= 1e-5
    assert relative(variance, exact[1]) <= 1e-6
    if len(shape) > 2:
        assert relative(instance_moments(x)[1], reference.instance_moments(x.double())[1]) <= 1e-6


@given(
    seed=st.integers(0, 10**6),
    N=st.integers(1, 12),
    C=st.integers(1, 40),
    S=st.integers(1, 40),
    D=st.integers(1, 5),
    last=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_properties_of_any_batch(seed: int, N: int, C: int, S: int, D: int, last: bool) -> None:
    """Checks 2, 5, 6: each domain's output has mean 0, variance v / (v + eps); permuting the batch permutes the output.

    Permuted samples may be added up in another order, so equality is to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(torch.randn(N, C, S, generator=generator), "channels_last" if last else "contiguous")
    domain = torch.randint(0, D, (N,), generator=generator)
    y, _, variance, count = OPS.domain_batch_norm(x, domain, None, None, None, None, None, D, True, 1e-5, "none", False)
    assert torch.equal(count, torch.bincount(domain, minlength=D) * S)
    _, out_mean, out_variance, _ = OPS.domain_batch_norm(
        y, domain, None, None, None, None, None, D, True, 1e-5, "none", False
    )
    assert out_mean.abs().max() <= 2e-6
    torch.testing.assert_close(out_variance, variance / (variance + 1e-5), rtol=1e-5, atol=1e-5)
    order = torch.randperm(N, generator=generator)
    permuted = domain_batch_norm(x[order], domain[order], None, None, training=True, num_domains=D)
    torch.testing.assert_close(permuted, y[order], rtol=1e-5, atol=1e-5)


def test_affine_changes_of_a_domain_cancel() -> None:
    """Check 7: x -> a_k x + b_k changes the output by O(eps) only."""
    x = torch.randn(12, 8, 6, 6, dtype=torch.float64)
    domain = torch.arange(12) % 3
    a, b = (torch.rand(3, 1, 1, 1).double() + 0.5)[domain], torch.randn(3, 1, 1, 1).double()[domain]
    options: dict[str, Any] = {"training": True, "num_domains": 3, "eps": 1e-12}
    changed = domain_batch_norm(a * x + b, domain, None, None, **options)
    torch.testing.assert_close(changed, domain_batch_norm(x, domain, None, None, **options), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ degenerate cases


def test_single_value() -> None:
    """y = bias, dx = 0, variance 0; strict raises as BatchNorm does."""
    x = torch.randn(3, 4, requires_grad=True)
    domain = torch.tensor([1, 0, 0])
    mean, var, bias = torch.zeros(2, 4), torch.ones(2, 4), torch.randn(2, 4)
    y = domain_batch_norm(x, domain, mean, var, None, bias, training=True)
    torch.testing.assert_close(y[0], bias[1])
    y.square().sum().backward()
    assert x.grad is not None
    assert not x.grad[0].any()
    torch.testing.assert_close(var[1], torch.full((4,), 0.9))
    torch.testing.assert_close(mean[1], 0.1 * x[0].detach())
    with pytest.raises(ValueError, match="domain 1 has a single value per channel"):
        domain_batch_norm(x, domain, mean, var, training=True, strict=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_ids_that_name_no_domain_in_the_reference(training: bool, shared: bool) -> None:
    """NaN for their samples; statistics and gradients of the parameters are those of the other samples."""
    torch.manual_seed(7)
    x, grad = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    domain = torch.tensor([0, 5, 1, 0, -2])
    valid = torch.tensor([True, False, True, True, False])
    running = torch.randn(2, 3), torch.rand(2, 3)
    weight, bias = torch.randn(2, 3) if shared else torch.randn(2, 2, 3)

    def results(rows: Tensor) -> list[Tensor]:
        y, *statistics = reference.domain_batch_norm(
            x[rows], domain[rows], *running, weight, bias, None, 2, training, 1e-5, "none", False
        )
        saved = (grad[rows], x[rows], domain[rows], weight, *statistics, None)
        dx, *rest = reference.domain_batch_norm_backward(*saved, training, 1e-5, shared, False)
        return [y, dx, *statistics, *rest]

    y, dx, *others = results(torch.ones(5, dtype=torch.bool))
    want_y, want_dx, *want_others = results(valid)
    assert bool(y[~valid].isnan().all() and dx[~valid].isnan().all())
    for got, want in zip((y[valid], dx[valid], *others), (want_y, want_dx, *want_others), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    C = shape[1]
    domain = torch.zeros(shape[0], dtype=torch.int64)
    mean, var, tracked = torch.randn(2, C), torch.rand(2, C), torch.zeros(2, dtype=torch.int64)
    weight = torch.ones(2, C, requires_grad=True)
    before = mean.clone(), var.clone()
    options: dict[str, Any] = {"training": training, "num_batches_tracked": tracked, "activation": "relu"}
    y = domain_batch_norm(x, domain, mean, var, weight, **options)
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert tracked.any() == (training and shape == (2, 0, 3, 3))  # which has samples, but no channel
    g, q = instance_moments(x)
    assert not g.any()
    assert not q.any()
    assert centred_affine(x, g, g, g).shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(6, 20, 5, 5), (6, 20)], ids=str)
def test_nan_poisons_only_its_own_domain_and_channel(shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(torch.randn(shape), layout)
    x[2, 7] = torch.nan
    y = domain_batch_norm(x, torch.tensor([0, 1, 1, 0, 1, 0]), None, None, training=True, num_domains=2)
    wrong = torch.zeros(6, 20, dtype=torch.bool)
    wrong[[1, 2, 4], 7] = True
    assert torch.equal(y.isnan().flatten(2).any(2) if y.dim() > 2 else y.isnan(), wrong)


def test_constant_maps_have_finite_gradients() -> None:
    """CFD section 8: q is exactly 0 for a constant map."""
    x = torch.full((4, 3, 5, 5), 7.25, requires_grad=True)
    g, q = instance_moments(x)
    assert not q.any()
    assert torch.equal(g, torch.full((4, 3), 7.25))
    domain_batch_norm(x, torch.arange(4) % 2, None, None, training=True, num_domains=2).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bits_do_not_depend_on_threads_or_on_other_channels() -> None:
    for layout in LAYOUTS[:2]:
        for shape in ((16, 160, 8, 8), (64, 160)):
            x = laid_out(torch.randn(shape), layout)
            domain = torch.arange(shape[0]) % 3
            options: dict[str, Any] = {"training": True, "num_domains": 3}
            one = domain_batch_norm(x, domain, None, None, **options)
            torch.set_num_threads(2)
            two = domain_batch_norm(x, domain, None, None, **options)
            torch.set_num_threads(1)
            assert torch.equal(one, two)
            part = domain_batch_norm(laid_out(x[:, :128], layout), domain, None, None, **options)
            assert torch.equal(part, one[:, :128])


BAD_CALLS: list[tuple[type[Exception], str, Callable[[Tensor, Tensor, Tensor], Any]]] = [
    (TypeError, "x must be a torch.Tensor, not list", lambda x, d, t: instance_moments([1.0])),  # type: ignore[arg-type]
    (TypeError, "x must be float32.*not torch.int64", lambda x, d, t: instance_moments(x.long())),
    (ValueError, r"x must be \[N, C, \*\], not \[6\]", lambda x, d, t: instance_moments(x[:, 0, 0])),
    (ValueError, r"scale must be \[6, 5\].*not \[5, 6\]", lambda x, d, t: centred_affine(x, x[..., 0], t.T, t)),
    (ValueError, "activation must be None or 'relu', not 'gelu'", lambda x, d, t: norm(x, d, activation="gelu")),
    (ValueError, "residual must have the shape of x", lambda x, d, t: norm(x, d, residual=x[:1])),
    (TypeError, "domain must be int64 or int32, not torch.float32", lambda x, d, t: norm(x, d.float())),
    (ValueError, r"domain must be \[6\], one id", lambda x, d, t: norm(x, d[:3])),
    (ValueError, r"domain must hold ids in 0..1, not 2", lambda x, d, t: norm(x, d + 1)),
    (ValueError, r"ids in 0..1, not -1, which marks an unseen domain", lambda x, d, t: norm(x, d - 1)),
    (ValueError, r"ids in -1..1, not -2", lambda x, d, t: norm(x, d - 2, training=False)),
    (ValueError, "running_mean and running_var must be given together", lambda x, d, t: bare(x, d, running_var=t)),
    (ValueError, "num_domains is needed", lambda x, d, t: bare(x, d)),
    (ValueError, r"weight must be \[2, 5\] or \[5\]", lambda x, d, t: norm(x, d, weight=torch.ones(3, 5))),
    (ValueError, "must both be", lambda x, d, t: norm(x, d, weight=torch.ones(5), bias=torch.ones(2, 5))),
    (ValueError, "momentum=None needs num_batches_tracked", lambda x, d, t: norm(x, d, momentum=None)),
    (ValueError, "num_batches_tracked must be int64", lambda x, d, t: norm(x, d, num_batches_tracked=torch.zeros(2))),
    (ValueError, "coefficients must return at least A and B", lambda x, d, t: normalize(x, lambda g, q: (g,))),
    (ValueError, "num_domains|number of domains", lambda x, d, t: bare(x, d, num_domains=0)),
]


def bare(x: Tensor, domain: Tensor, running_var: Tensor | None = None, **options: Any) -> Tensor:
    return domain_batch_norm(x, domain, None, running_var, training=True, **options)


def norm(x: Tensor, domain: Tensor, training: bool = True, **options: Any) -> Tensor:
    return domain_batch_norm(x, domain, torch.zeros(2, 5), torch.ones(2, 5), training=training, **options)


@pytest.mark.parametrize(("error", "text", "call"), BAD_CALLS, ids=[text for _, text, _ in BAD_CALLS])
def test_bad_input(error: type[Exception], text: str, call: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    with pytest.raises(error, match=text):
        call(torch.randn(6, 5, 4), torch.arange(6) % 2, torch.randn(6, 5))


# ------------------------------------------------------------------------------------------------ derivatives


def instance_norm(g: Tensor, q: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of instance normalisation with a gate on the standard deviation, and an extra."""
    scale = weight * torch.sigmoid(q.add(1e-5).log()) * (q + 1e-5).rsqrt()
    return scale, bias.expand_as(g) + 0.1 * g, q.mean(0)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (6, 3, 17), (7, 3)], ids=str)
def test_first_and_second_derivatives(activation: str | None, shape: tuple[int, ...]) -> None:
    """Check 4, CFD check 4: shuffled ids, one absent domain, one of a single image."""
    torch.manual_seed(4)
    domain = ids_of(shape[0], 4)
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"activation": activation}

    def batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return domain_batch_norm(x, domain, None, None, weight, bias, training=True, residual=residual, **options)

    def gated(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return normalize(x, instance_norm, weight[0], bias[0], residual=residual, **options)[0]

    def affine(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        rows = torch.arange(shape[0]) % 4
        return centred_affine(x, bias.tanh()[rows], weight[rows], bias[rows], residual=residual, **options)

    for function in (batch, gated, affine):
        arguments = (x, weight, bias, residual)
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments, atol=1e-4)
    assert torch.autograd.gradcheck(instance_moments, (x,))


def test_normalize_is_the_composition() -> None:
    """Eager with its fused backward, against the two differentiable operators; extras are detached."""
    x = torch.randn(5, 6, 7, 7, requires_grad=True)
    weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    y, (extra,) = normalize(x, instance_norm, weight, bias, activation="relu")
    g, q = instance_moments(x)
    A, B, want_extra = instance_norm(g, q, weight, bias)
    want = centred_affine(x, g, A, B, activation="relu")
    assert torch.equal(y, want)
    assert torch.equal(extra, want_extra)
    assert not extra.requires_grad
    grad = torch.randn_like(y)
    for got, exact in zip(*(torch.autograd.grad(z, (x, weight, bias), grad) for z in (y, want)), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_paths_need_no_moments() -> None:
    """Check 9, section 3.5: an affine map of running statistics, gathered by path, equals eval of that domain."""
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    mean, var = torch.randn(3, 5).double(), torch.rand(3, 5).double() + 0.5
    weight, bias = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    path = torch.tensor([2, 0, 1, 1, 0, 2])
    scale = weight[path] * (var[path] + 1e-5).rsqrt()
    y = centred_affine(x, mean[path], scale, bias[path])
    want = domain_batch_norm(x, path, mean, var, weight, bias, training=False)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    folded = centred_affine(x, torch.zeros(6, 5).double(), scale, bias[path] - scale * mean[path])
    torch.testing.assert_close(folded, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    for got, exact in zip(*(torch.autograd.grad(z, (weight, bias), grad) for z in (y, want)), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def test_what_the_backward_keeps() -> None:
    """Only x, tables, and y of a ReLU."""
    x = torch.randn(8, 16, 12, 12, requires_grad=True)
    weight = torch.ones(2, 16, requires_grad=True)
    domain = torch.arange(8) % 2
    for activation, kept in ((None, 1), ("relu", 2)):
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            domain_batch_norm(x, domain, None, None, weight, training=True, activation=activation)
            small = 8 * (2 * 16 * 3 + 8 + 2)
            assert sum(sizes.values()) <= kept * x.numel() * 4 + small


# ------------------------------------------------------------------------------------------------ around PyTorch


def test_operators_follow_the_rules_of_torch_library() -> None:
    for layout in LAYOUTS:
        x = laid_out(torch.randn(6, 5, 3, 4), layout).requires_grad_()
        tables = [torch.randn(6, 5, requires_grad=True) for _ in range(3)]
        weight, bias = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
        statistics = torch.zeros(4, 5).double(), torch.ones(4, 5).double(), torch.tensor([12, 0, 36, 24])
        domain = torch.tensor([2, 0, 2, 3, 2, 3])
        y = torch.randn(6, 5, 3, 4)
        plain = x.detach()
        shapes = (plain, plain, *(t.detach() for t in tables[:1]))
        calls: dict[str, tuple[Any, ...]] = {
            "instance_moments": (x,),
            "centred_affine": (x, *tables, y, "relu"),
            "centred_affine_sums": (*shapes, y),
            "centred_affine_input_grad": (*shapes, *(t.detach() for t in tables), y, True),
            "domain_batch_norm": (
                *(x, domain, torch.zeros(4, 5), torch.ones(4, 5), weight, bias, None),
                *(4, True, 1e-5, "relu", False),
            ),
            "domain_batch_norm_backward": (
                *(y, plain, domain, weight.detach(), *statistics, y),
                *(True, 1e-5, False, True),
            ),
            "update_running_statistics": (
                *(torch.zeros(4, 5), torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)),
                *(*statistics, 0.1),
            ),
        }
        for name, arguments in calls.items():
            torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_compiled_without_a_break(layout: str) -> None:
    """Forward, gradient by the kernels, and the buffers."""
    domain = torch.arange(6) % 3
    x = laid_out(torch.randn(6, 5, 4, 4), layout).requires_grad_()
    weight, bias = (torch.randn(3, 5, requires_grad=True) for _ in range(2))

    def step(x: Tensor, mean: Tensor, var: Tensor, tracked: Tensor) -> Tensor:
        y = domain_batch_norm(x, domain, mean, var, weight, bias, training=True, num_batches_tracked=tracked)
        return normalize(y, instance_norm, weight[0], bias[0], activation="relu")[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        state = torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)
        y = function(x, *state)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias)), *state))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func() -> None:
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    domain = ids_of(6, 4)
    weight = torch.randn(4, 5, dtype=torch.float64)

    def batch(x: Tensor) -> Tensor:
        return domain_batch_norm(x, domain, None, None, weight, training=True)

    def loss(x: Tensor) -> Tensor:
        return (batch(x).square() * torch.arange(4)).sum()

    def moments(x: Tensor) -> Tensor:
        return instance_moments(x)[1]

    for function in (batch, moments, torch.func.grad(loss)):
        torch.testing.assert_close(torch.func.vmap(function)(x), torch.stack([function(v) for v in x]))
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), torch.autograd.grad(loss(leaf), leaf)[0])


def test_autocast_and_half_parameters() -> None:
    """16-bit values with float32 or 16-bit parameters; gradients have the dtype of their tensor."""
    x = torch.randn(6, 5, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(2, 5, dtype=dtype, requires_grad=True)
        mean, var = torch.zeros(2, 5, dtype=dtype), torch.ones(2, 5, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = domain_batch_norm(x, torch.arange(6) % 2, mean, var, weight, training=True, residual=x.float())
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        assert mean.any()


def test_running_statistics_are_seen_by_autograd_as_changed() -> None:
    mean, var = torch.zeros(2, 5), torch.ones(2, 5)
    version = mean._version
    norm_of = torch.randn(6, 5, 4)
    domain_batch_norm(norm_of, torch.arange(6) % 2, mean, var, training=True)
    assert mean._version > version


LEVEL_PROGRAM = """
import sys
import torch
import neuraldeps_kernels as nk
from neuraldeps_kernels.reference import domain_norm as reference
assert torch.ops.neuraldeps.cpu_levels()[2] == sys.argv[1]
torch.manual_seed(0)
limit = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}
for shape in ((8, 70, 7, 7), (5, 130, 4, 4), (9, 257), (7, 33, 3)):
    for dtype in limit:
        for last in (False, True):
            x = (torch.randn(shape) * 3 + 1).to(dtype)
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
            domain = torch.arange(shape[0]) % 3
            tables = [torch.randn(3, shape[1], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
            args = (None, None, *tables, None, 3, True, 1e-5, "none", False)
            y, *statistics = torch.ops.neuraldeps.domain_batch_norm(x, domain, *args)
            want, *exact = reference.domain_batch_norm(x.double(), domain, *args)
            assert (y.double() - want).norm() <= limit[dtype] * want.norm(), (shape, dtype, last)
            grad = torch.randn(shape).to(dtype)
            rest = (tables[0], *statistics, None, True, 1e-5, False, False)
            got = torch.ops.neuraldeps.domain_batch_norm_backward(grad, x, domain, *rest)
            rest = (tables[0], *exact, None, True, 1e-5, False, False)
            want = reference.domain_batch_norm_backward(grad.double(), x.double(), domain, *rest)
            for a, b in zip(got[:3], want[:3]):
                assert (a.double() - b).norm() <= 3 * limit[dtype] * b.norm(), (shape, dtype, last)
exact = torch.tensor([0.0, -0.0, 1.0, 65504.0, 65520.0, 1e-7, 6e-8, 5.97e-8, 3e-5, -1e-4, float("inf"), float("nan")])
zero, one = torch.zeros(1, 1), torch.ones(1, 1)
for dtype in (torch.float16, torch.bfloat16):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None, None]
    kept = nk.centred_affine(every, zero, one, zero)
    assert torch.equal(kept.nan_to_num(7.0), every.nan_to_num(7.0)) and torch.equal(kept.isnan(), every.isnan())
    doubled = nk.centred_affine(every, zero, one * 1.37, zero)
    assert torch.equal(doubled.nan_to_num(7.0), (every.float() * 1.37).to(dtype).nan_to_num(7.0))
"""


def test_every_instruction_set_level(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Values and gradients within the limits; every 16-bit number is read and rounded as torch does."""
    for level in cpu_levels:
        result = run_python(LEVEL_PROGRAM, level, NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, f"{level}: {result.stderr}"


# ------------------------------------------------------------------------------------------------ several processes

START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["torch", "pytest", "neuraldeps_kernels"])


@contextlib.contextmanager
def process_group(rank: int, world: int, meeting_point: str) -> Iterator[None]:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting_point, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def run_rows(everything: list[Tensor], domain: Tensor, rows: slice, group: Any) -> list[Tensor]:
    """Result, gradients and state of one training step on some of the samples."""
    values, grads, *tables = everything
    x = values[rows].clone().requires_grad_()
    weight, bias = (t.clone().requires_grad_() for t in tables)
    state = torch.zeros(4, 6).double(), torch.ones(4, 6).double(), torch.zeros(4, dtype=torch.int64)
    y = domain_batch_norm(
        *(x, domain[rows], state[0], state[1], weight, bias),
        training=True,
        num_batches_tracked=state[2],
        activation="relu",
        group=group,
    )
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grads[rows]), *state]


def compare_with_one_process(rank: int, world: int, meeting_point: str) -> None:
    """Check 6: samples spread unevenly over ranks, of four one has none and one a single one; domain 3 is absent."""
    with process_group(rank, world, meeting_point):
        domain = torch.tensor([0, 1, 0, 2, 1, 1, 0, 2, 1, 0, 0])
        ends = [0, 4, 11] if world == 2 else [0, 3, 3, 10, 11]
        mine = slice(ends[rank], ends[rank + 1])
        for shape in ((11, 6, 5, 5), (11, 6)):
            generator = torch.Generator().manual_seed(0)
            shapes = (shape, shape, (4, 6), (4, 6))
            everything = [torch.randn(s, generator=generator, dtype=torch.float64) + 1 for s in shapes]
            got = run_rows(everything, domain, mine, dist.group.WORLD)
            want = run_rows(everything, domain, slice(None), None)
            for i in (2, 3):  # gradients of parameters add up over the ranks
                dist.all_reduce(got[i])
            for i in (0, 1):
                want[i] = want[i][mine]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_synchronised_over_processes(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        compare_with_one_process, (world, str(tmp_path / "meeting_point")), nprocs=world, start_method=START_METHOD
    )


# ------------------------------------------------------------------------------------------------ sanitizers, CUDA


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """The kernels alone, on arrays of exactly the sizes they ask for, task by task."""
    assert_sanitized("domain_norm_sanitizer_driver.cpp", "domain_norm.cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_equals_the_cpu(shape: tuple[int, ...]) -> None:
    """Mixed batch with a residual and a ReLU, forward and backward."""
    torch.manual_seed(5)
    domain = ids_of(shape[0], 4)
    tensors = torch.randn(shape), torch.randn(4, shape[1]), torch.randn(4, shape[1]), torch.randn(shape)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in tensors]
        y = nk.domain_batch_norm(
            *(leaves[0], domain.to(device), None, None, leaves[1], leaves[2]), training=True, residual=leaves[3]
        )
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
