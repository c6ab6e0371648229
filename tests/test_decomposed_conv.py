"""Convolutions decomposed into bases by modality and shared coefficients; checks are numbered as in the paper file.

The oracle is conv2d in float64 with kernels that einsum puts together.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from neuraldeps_kernels.models.resnet import ResNet
from neuraldeps_kernels.nn import DecomposedConv2d, DomainBatchNorm2d, decompose_convolutions, modality_context
from neuraldeps_kernels.nn.conversion import convert_domain_batch_norm

DOUBLE = torch.float64
MIXED = 2  # id between two modalities
pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(*sizes: Any, seed: int = 0, dtype: torch.dtype = DOUBLE, **options: Any) -> DecomposedConv2d:
    """With atoms that differ between modalities."""
    torch.manual_seed(seed)
    made = DecomposedConv2d(*sizes, dtype=dtype, **options)
    with torch.no_grad():
        made.atoms.add_(0.3 * torch.randn(made.atoms.shape, dtype=dtype))
        if made.bias is not None:
            made.bias.copy_(torch.randn(made.bias.shape, dtype=dtype))
    return made


def oracle(conv: DecomposedConv2d, x: Tensor, weights: Tensor) -> Tensor:
    """Sample by sample, with its own kernel: weights [N, M]."""
    atoms = torch.einsum("nm,mkhw->nkhw", weights, conv.atoms)
    kernels = torch.einsum("oik,nkhw->noihw", conv.coefficients, atoms)
    geometry = (conv.stride, conv.padding, conv.dilation)
    return torch.cat([conv2d(x[n : n + 1], kernels[n], conv.bias, *geometry) for n in range(len(x))])


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * max(float(want.detach().abs().max()), 1.0)


# ------------------------------------------------------------------------------------------------ two forms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-13)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("k", "padding"), [(1, 0), (3, 1), (3, 0), (7, 3), ((3, 5), (2, 1))])
def test_check_3_two_steps_are_the_dense_form(
    k: Any, padding: Any, stride: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Check 3: equal outputs and gradients, also those of the oracle."""
    K = 1 if k == 1 else 6
    dense = layer(3, 4, k, stride, padding, num_basis=K, form="dense", dtype=dtype)
    two_step = copy.deepcopy(dense)
    two_step.form = "two-step"
    x = normal(5, 3, 13, 10, dtype=dtype)
    modality = torch.tensor([0, 1, 1, 0, 1])
    results = []
    for module in (dense, two_step):
        leaf = x.clone().requires_grad_()
        y = module(leaf, modality)
        y.square().sum().backward()
        results.append([y, leaf.grad, module.atoms.grad, module.coefficients.grad, module.bias.grad])
    for a, b in zip(*results, strict=True):
        close(a, b, tolerance)
    double = copy.deepcopy(dense).double()
    close(results[0][0].double(), oracle(double, x.double(), torch.eye(2, dtype=DOUBLE)[modality]), tolerance)


def test_check_3_gradients_are_those_of_the_einsum() -> None:
    """Check 3: dA^m = sum_{o,i} c dW^m and dc = sum_m <dW^m, A^m>, from dW of plain convolutions."""
    conv = layer(3, 5, 3, 1, 1, num_basis=4, bias=False)
    x, modality = normal(6, 3, 8, 7), torch.tensor([0, 1, 0, 0, 1, 1])
    dy = normal(6, 5, 8, 7, seed=1)
    conv(x, modality).backward(dy)
    dW = []
    for m in range(2):
        plain = conv.plain(m)
        plain(x[modality == m]).backward(dy[modality == m])
        dW.append(plain.weight.grad)
    want = torch.stack([torch.einsum("oik,oihw->khw", conv.coefficients, d) for d in dW])
    close(conv.atoms.grad, want, 1e-12)
    want = sum(torch.einsum("oihw,khw->oik", d, A) for d, A in zip(dW, conv.atoms, strict=True))
    close(conv.coefficients.grad, want, 1e-12)


@pytest.mark.parametrize("form", ["dense", "two-step"])
def test_check_3_gradcheck(form: str) -> None:
    """Check 3: in float64, of a batch with mixed and unknown samples, also by the weights of mixed ones."""
    conv = layer(2, 2, 3, 2, 1, num_basis=3, form=form)
    modality = torch.tensor([1, MIXED, 0, -1])
    inputs = [normal(4, 2, 5, 4), normal(4, 2, seed=1), *(p.detach().clone() for p in conv.parameters())]

    def function(x: Tensor, mixture: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in conv.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(conv, named, (x, modality, mixture))

    assert torch.autograd.gradcheck(function, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("k", [(1, 1), (3, 3), (7, 7), (2, 3)])
def test_check_3_full_decomposition_is_the_layer(k: tuple[int, int]) -> None:
    """Check 3: K = kh kw reproduces a dense convolution, in every modality."""
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, k, stride=2, padding=1)
    conv = DecomposedConv2d.from_dense(dense, num_basis=k[0] * k[1])
    x = normal(3, 4, 11, 9, dtype=torch.float32)
    for modality in (0, 1, -1):
        close(conv(x, modality), dense(x), 1e-5)
        close(conv.plain(modality)(x), dense(x), 1e-5)
    fine = DecomposedConv2d.from_dense(dense.double(), num_basis=k[0] * k[1])
    close(fine.kernel(0), dense.weight, 1e-14)


@pytest.mark.parametrize("K", [1, 3, 6])
def test_truncated_decomposition_is_the_best(K: int) -> None:
    """Eckart-Young: the squared error is that of the singular values left out, W as [Co Ci, 9]."""
    dense = nn.Conv2d(5, 7, 3, bias=False, dtype=DOUBLE)
    conv = DecomposedConv2d.from_dense(dense, num_basis=K)
    left_out = torch.linalg.svdvals(dense.weight.detach().reshape(35, 9))[K:].square().sum()
    assert float((conv.kernel(1) - dense.weight).detach().square().sum()) == pytest.approx(float(left_out), rel=1e-10)
    assert float(conv.orthogonality().detach()) < 1e-24


def test_random_filters_lose_what_is_left_out() -> None:
    """Relative error of the output for white filters and white images: a little below sqrt(1 - K / 9)."""
    torch.manual_seed(0)
    dense, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), normal(2, 64, 24, 12, dtype=torch.float32)
    want = dense(x).detach()
    for K in (3, 6):
        error = (DecomposedConv2d.from_dense(dense, num_basis=K)(x, 0) - want).detach().norm() / want.norm()
        assert 0.95 < float(error) / (1 - K / 9) ** 0.5 < 1


# ------------------------------------------------------------------------------------------------ modalities


@pytest.mark.parametrize("form", ["dense", "two-step"])
def test_check_4_only_the_modality_present_is_trained(form: str) -> None:
    """Check 4: atoms and norm of the other modality have gradients of exactly zero, its statistics stay."""
    conv, norm = layer(3, 4, 3, num_basis=5, form=form, bias=False), DomainBatchNorm2d(4, 3, dtype=DOUBLE)
    before = norm.running_mean.clone()
    with modality_context(1):
        norm(conv(normal(4, 3, 8, 6))).square().sum().backward()
    for grad in (conv.atoms.grad, norm.weight.grad, norm.bias.grad):
        assert bool((grad[0] == 0).all())
        assert bool((grad[1] != 0).any())
    assert torch.equal(norm.running_mean[[0, 2]], before[[0, 2]])
    assert not torch.equal(norm.running_mean[1], before[1])


@settings(deadline=None, max_examples=25)
@given(modality=st.lists(st.integers(0, 1), min_size=2, max_size=7), form=st.sampled_from(["dense", "two-step"]))
def test_check_4_mixed_batch_is_two_batches(modality: list[int], form: str) -> None:
    """Check 4: outputs, and coefficients receive the sum over modalities."""
    conv, ids = layer(2, 3, 3, 1, 1, num_basis=4, form=form), torch.tensor(modality)
    x = normal(len(ids), 2, 6, 5)
    y = conv(x, ids)
    y.square().sum().backward()
    both, summed = conv.atoms.grad.clone(), conv.coefficients.grad.clone()
    parts = []
    for m in (0, 1):
        rows = ids == m
        if bool(rows.any()):
            conv.zero_grad()
            part = conv(x[rows], m)
            part.square().sum().backward()
            close(y[rows], part, 1e-13)
            close(both[m], conv.atoms.grad[m], 1e-12)
            parts.append(conv.coefficients.grad.clone())
        else:
            assert bool((both[m] == 0).all())
    close(summed, sum(parts), 1e-12)


def test_check_5_equal_modalities_cannot_be_told_apart() -> None:
    """Check 5: with equal atoms and sets of the norm, swapping the flag changes no bit."""
    torch.manual_seed(0)
    conv, norm = DecomposedConv2d(3, 8, 3, padding=1), DomainBatchNorm2d(8, 3)
    x = normal(6, 3, 9, 7, dtype=torch.float32)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    norm(conv(x, 0), torch.zeros_like(ids))
    with torch.no_grad():
        for table in (norm.running_mean, norm.running_var):
            table.copy_(table[0].clone())
    norm.eval()
    assert torch.equal(norm(conv(x, ids), ids), norm(conv(x, 1 - ids), 1 - ids))
    assert torch.equal(norm(conv(x, 0), torch.zeros_like(ids)), norm(conv(x, 1), torch.ones_like(ids)))


def test_mixed_samples_have_interpolated_atoms() -> None:
    """Also a batch of all kinds of ids in any order, weights that are given taking the place of those around."""
    conv = layer(3, 4, 3, 2, 1, num_basis=5)
    x, ids = normal(8, 3, 9, 7), torch.tensor([1, MIXED, 0, -1, MIXED, 1, 0, -1])
    mixture = torch.rand(8, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    weights = torch.eye(2, dtype=DOUBLE)[ids.clamp(0, 1)]
    weights[ids == -1] = 0.5
    weights[ids == MIXED] = mixture[ids == MIXED]
    want = oracle(conv, x, weights)
    close(conv(x, ids, mixture), want, 1e-13)
    close(conv._weighted(x, conv._weights(ids, mixture, x)), want, 1e-13)
    with modality_context(ids, mixture):
        close(conv(x), want, 1e-13)
        close(conv(x, ids, 1 - mixture)[ids != MIXED], want[ids != MIXED], 1e-13)
    close(conv(x, MIXED, mixture), oracle(conv, x, mixture), 1e-13)
    equal = oracle(conv, x, torch.full((8, 2), 0.5, dtype=DOUBLE))
    for unknown in (conv(x, -1), conv(x, MIXED), conv.eval()(x)):
        close(unknown, equal, 1e-13)


def test_contexts_nest_and_end() -> None:
    conv, x = layer(1, 1, 3), normal(2, 1, 4, 4)
    with modality_context(0):
        with modality_context(MIXED, torch.tensor([[0.0, 1.0]] * 2, dtype=DOUBLE)):
            close(conv(x), conv(x, 1), 1e-14)
        assert torch.equal(conv(x), conv(x, 0))
    with pytest.raises(ValueError, match="modality must be given in training"):
        conv(x)
    assert torch.equal(layer(1, 1, 3, num_modalities=1)(x), layer(1, 1, 3, num_modalities=1)(x, 0))


def test_penalties() -> None:
    """Orthogonality and leash as they are defined, for three modalities."""
    conv = layer(2, 2, 3, num_modalities=3, num_basis=4)
    A = conv.atoms.detach().flatten(2)
    want = sum(float((a @ a.T - torch.eye(4, dtype=DOUBLE)).square().sum()) for a in A)
    assert float(conv.orthogonality()) == pytest.approx(want, rel=1e-12)
    pairs = ((0, 1), (0, 2), (1, 2))
    assert float(conv.leash()) == pytest.approx(sum(float((A[l] - A[m]).square().sum()) for l, m in pairs), rel=1e-12)
    assert float(DecomposedConv2d(2, 2, 3).orthogonality()) < 1e-9


def test_initial_kernels_have_the_variance_of_he() -> None:
    torch.manual_seed(0)
    kernel = DecomposedConv2d(64, 64, 3, num_basis=6).kernel(0)
    assert float(kernel.var()) == pytest.approx(2 / (64 * 9), rel=0.1)


# ------------------------------------------------------------------------------------------------ compiled, autocast


def test_compiles_as_one_graph() -> None:
    conv = layer(2, 3, 3, 1, 1, num_basis=4, form="two-step")
    x, ids, mixture = normal(5, 2, 6, 5), torch.tensor([1, 0, MIXED, -1, 0]), torch.rand(5, 2, dtype=DOUBLE)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    close(compiled(x, ids, mixture), conv(x, ids, mixture), 1e-13)
    close(compiled(x, 1), conv(x, 1), 1e-13)
    wrong = torch.compile(conv, fullgraph=True, backend="aot_eager")(x, torch.tensor([0, 1, 3, 0, 0]))
    assert wrong.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False]


def test_autocast_puts_kernels_together_in_float32() -> None:
    """The atoms may differ by less than bfloat16 resolves: what is rounded is the kernel."""
    conv = layer(8, 8, 3, 1, 1, num_basis=6, form="dense", dtype=torch.float32)
    x = normal(2, 8, 9, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, 0)
        want = conv2d(x, conv.kernel(0), conv.bias, padding=1)
        assert conv.kernel(0).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)


@pytest.mark.parametrize("form", ["dense", "two-step"])
def test_memory_formats_and_empty_batches(form: str) -> None:
    conv = layer(4, 3, 3, 1, 1, num_basis=4, form=form)
    x, ids = normal(6, 4, 8, 5), torch.tensor([0, 1, 0, 1, 1, MIXED])
    close(conv(x.contiguous(memory_format=torch.channels_last), ids), conv(x, ids), 1e-13)
    close(conv(normal(6, 8, 8, 5)[:, ::2], ids), conv(normal(6, 8, 8, 5)[:, ::2].contiguous(), ids), 1e-13)
    assert conv(x[:0], ids[:0]).shape == (0, 3, 8, 5)


def test_parameters_of_16_bits() -> None:
    conv = DecomposedConv2d(4, 3, 3, padding=1, dtype=torch.bfloat16)
    x, ids = normal(3, 4, 8, 5).bfloat16(), torch.tensor([0, MIXED, -1])
    assert conv(x, ids).dtype == torch.bfloat16
    close(conv(x, ids).double(), copy.deepcopy(conv).double()(x.double(), ids), 0.03)


# ------------------------------------------------------------------------------------------------ whole networks


def test_convolutions_of_a_network_are_replaced() -> None:
    """A ResNet with all singular values computes what it did; 1 x 1 convolutions and shared layers stay as they are."""
    torch.manual_seed(0)
    network = ResNet(18, width=4).eval()
    x = normal(2, 3, 64, 32, dtype=torch.float32)
    want = network(x)
    wide = sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in network.modules())
    full = convert_domain_batch_norm(decompose_convolutions(copy.deepcopy(network), 2, 49), 2).eval()
    layers = [m for m in full.modules() if isinstance(m, DecomposedConv2d)]
    assert len(layers) == wide
    assert {(m.kernel_size[0], m.num_basis) for m in layers} == {(3, 9), (7, 49)}
    with modality_context(torch.tensor([0, 1])):
        close(full(x), want, 1e-4)
    small = decompose_convolutions(copy.deepcopy(network))
    assert {m.num_basis for m in small.modules() if isinstance(m, DecomposedConv2d)} == {6, 12}

    conv = nn.Conv2d(2, 2, 3)
    twice = decompose_convolutions(nn.Sequential(conv, nn.ReLU(), conv))
    assert twice[0] is twice[2]
    assert isinstance(twice[0], DecomposedConv2d)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DecomposedConv2d(3, 0, 3), ValueError, "must be positive, not 3, 0 and 2"),
        (lambda: DecomposedConv2d(3, 4, 3, num_basis=10), ValueError, r"num_basis must be in 1\.\.9"),
        (lambda: DecomposedConv2d(3, 4, 3, num_basis=0), ValueError, r"num_basis must be in 1\.\.9"),
        (lambda: DecomposedConv2d(3, 4, 3, form="fast"), ValueError, "form must be one of auto, dense, two-step"),
        (lambda: DecomposedConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "conv must have one group"),
        (
            lambda: DecomposedConv2d.from_dense(nn.Conv2d(4, 4, 3, padding="same")),
            ValueError,
            "conv must have one group",
        ),
        (
            lambda: decompose_convolutions(nn.Sequential(nn.Conv2d(2, 2, 5))),
            ValueError,
            "num_basis must name K for kernels of height 5",
        ),
    ],
)
def test_bad_layers_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((normal(2, 4, 5, 5), 0), ValueError, r"x must be \[N, 3, H, W\], not \[2, 4, 5, 5\]"),
        ((normal(2, 3, 5), 0), ValueError, r"x must be \[N, 3, H, W\]"),
        ((normal(2, 3, 5, 5), 3), ValueError, r"modality must be in -1\.\.2, not 3"),
        ((normal(2, 3, 5, 5), -2), ValueError, r"modality must be in -1\.\.2, not -2"),
        ((normal(2, 3, 5, 5), torch.tensor([0, 3])), ValueError, r"ids in -1\.\.2, not 3"),
        ((normal(2, 3, 5, 5), torch.tensor([0, -2])), ValueError, r"ids in -1\.\.2, not -2"),
        ((normal(2, 3, 5, 5), torch.tensor([0, 1, 1])), ValueError, r"modality must be \[2\]"),
        (
            (normal(2, 3, 5, 5), torch.tensor([0.0, 1.0])),
            TypeError,
            "modality must be int64 or int32, not torch.float32",
        ),
        ((normal(2, 3, 5, 5), "visible"), TypeError, "modality must be an int64 tensor"),
        ((normal(2, 3, 5, 5), 2, torch.ones(2, 3)), ValueError, r"mixture must be \[2, 2\], not \[2, 3\]"),
        ((normal(2, 3, 5, 5), 2, torch.ones(2, 2).long()), TypeError, "mixture must be a floating-point tensor"),
    ],
)
def test_bad_inputs_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(3, 4, 3)(*arguments)
