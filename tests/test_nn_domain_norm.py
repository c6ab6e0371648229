"""Norms by domain as modules: ids, contexts, state dicts, conversion, fusion, compilation, processes.

What the layers compute is tested in test_gdnorm.py and test_cfd.py, the operators below them in test_domain_norm.py.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensors
import torch
import torch.distributed as dist
from test_distributed import on_every_rank
from torch import Tensor, nn

import neuraldeps_kernels as nk
from neuraldeps_kernels.models.backbones import ResNet
from neuraldeps_kernels.models.gdnorm import GDNorm, combined_loss
from neuraldeps_kernels.nn import (
    CalibratedBatchNorm1d,
    CalibratedBatchNorm2d,
    CalibratedInstanceNorm2d,
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    DomainBatchNorm3d,
    GaussianProcessBatchNorm1d,
    GaussianProcessBatchNorm2d,
    SyncDomainBatchNorm2d,
    batch_norm_paths,
    convert_domain_batch_norm,
    domain_context,
    export_batch_norm,
    fuse_domain_batch_norm,
    path_coefficients,
    path_context,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BY_DOMAIN_2D = [DomainBatchNorm2d, SyncDomainBatchNorm2d, CalibratedBatchNorm2d, GaussianProcessBatchNorm2d]
IDS = torch.tensor([2, 0, 1, 1, 0, 2])


normal = functools.partial(tensors.normal, dtype=torch.float32)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-6) -> None:
    tensors.close(got, want, tolerance, at_least=1.0)


def randomised(layer: nn.Module, seed: int = 1) -> Any:
    """`layer` with random parameters and running statistics, weights and variances positive."""
    g = tensors.generator(seed)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=g)
                tensor.copy_(values.abs() + 0.3 if name.endswith(("weight", "running_var")) else values)
    return layer


# ------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
@pytest.mark.parametrize("training", [True, False])
def test_context_is_the_argument(kind: Any, training: bool) -> None:
    layer, x = randomised(kind(4, 3)).train(training), normal(6, 4, 3, 3)
    want = layer(x, IDS)
    with domain_context(IDS):
        close(nn.Sequential(layer)(x), want)
        other = copy.deepcopy(layer)(x, IDS.roll(1))
        with domain_context(1):
            inner = layer(x)
            close(layer(x, IDS), want)  # the argument wins
        close(layer(x), want)  # the outer context again
    close(inner, layer(x, torch.ones_like(IDS)))
    close(inner, layer(x, 1))
    assert not torch.allclose(other, want)
    close(layer(x, IDS.int()), want)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_without_ids(kind: Any) -> None:
    """Training needs ids where there are several domains; in eval they are unseen."""
    layer, x = randomised(kind(4, 3)), normal(6, 4, 3, 3)
    with pytest.raises(ValueError, match="domain must be given in training"):
        layer(x)
    with domain_context(IDS), domain_context(None), pytest.raises(ValueError, match="domain must be given"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x), layer(x, -1))
    assert torch.equal(layer(x), layer(x, torch.full((6,), -1)))
    single = kind(4, 1)
    close(single(x), single(x, torch.zeros(6, dtype=torch.int64)))


def test_context_closes_after_an_error_and_is_seen_by_other_threads() -> None:
    layer, x = DomainBatchNorm2d(4, 3), normal(6, 4, 3, 3)
    with pytest.raises(RuntimeError, match="inside"), domain_context(IDS):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="domain must be given"):
        layer(x)
    results: list[Tensor] = []
    with domain_context(IDS):
        thread = threading.Thread(target=lambda: results.append(layer(x)))
        thread.start()
        thread.join()
    close(results[0], layer(x, IDS))


def test_checkpointing_inside_the_context() -> None:
    layer, x = randomised(CalibratedBatchNorm2d(4, 3)), normal(6, 4, 3, 3).requires_grad_()
    want = torch.autograd.grad(copy.deepcopy(layer)(x, IDS).square().sum(), x)[0]
    with domain_context(IDS):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        close(torch.autograd.grad(y.square().sum(), x)[0], want)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, "domain"),
        (torch.tensor([0, 1, -1, 1, 0, 0]), ValueError, "domain"),
        (torch.tensor([0, 1]), ValueError, r"domain must be \[6\]"),
        (torch.zeros(6), TypeError, "domain must be int64"),
        (3, ValueError, "domain must be in 0..2, not 3"),
        (-1, ValueError, "domain must be in 0..2, not -1"),
        ("street", TypeError, "domain must be an int64 tensor"),
    ],
)
def test_bad_ids(kind: Any, domain: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(4, 3)(normal(6, 4, 3, 3), domain)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_bad_arguments(kind: Any) -> None:
    for shape in ((6, 4), (6, 3, 3, 3), (6, 4, 3, 3, 3)):
        with pytest.raises(ValueError, match="x must have 4 dimensions and 4 channels"):
            kind(4, 3)(normal(*shape), IDS)
    for arguments, options in (((0, 3), {}), ((4, 0), {}), ((4, 3), {"eps": 0.0}), ((4, 3), {"momentum": 1.5})):
        with pytest.raises(ValueError, match="must be"):
            kind(*arguments, **options)
    with pytest.raises(ValueError, match="activation must be None or 'relu'"):
        kind(4, 3, activation="gelu")
    with pytest.raises(ValueError, match="residual must have the shape"):
        kind(4, 3)(normal(6, 4, 3, 3), IDS, residual=normal(6, 4, 3, 1))


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*BY_DOMAIN_2D, CalibratedInstanceNorm2d])
def test_residual_and_activation(kind: Any, training: bool) -> None:
    """In the call, and the activation as an option of the layer; gradients of what is fused are those of the steps."""
    by_domain = kind is not CalibratedInstanceNorm2d
    layer = randomised(kind(4, 3) if by_domain else kind(4)).train(training)
    arguments = (IDS,) if by_domain else ()
    x, residual = (normal(6, 4, 3, 3, seed=s).requires_grad_() for s in (1, 2))
    plain = copy.deepcopy(layer)
    want = torch.relu(plain(x, *arguments) + residual)
    got = layer(x, *arguments, residual=residual, activation="relu")
    close(got, want)
    dy = normal(6, 4, 3, 3, seed=3)
    for one, other in zip(
        torch.autograd.grad(got, [x, residual], dy), torch.autograd.grad(want, [x, residual], dy), strict=True
    ):
        close(one, other, 1e-5)
    with_relu = kind(4, 3, activation="relu") if by_domain else kind(4, activation="relu")
    with_relu.load_state_dict(layer.state_dict())
    close(with_relu.train(training)(x, *arguments), copy.deepcopy(layer)(x, *arguments).relu())


def test_affine_and_tracking_options() -> None:
    x = normal(6, 4, 5)
    bare = DomainBatchNorm1d(4, 3, affine=False, track_running_stats=False)
    assert list(bare.state_dict()) == []
    assert torch.equal(bare(x, IDS), copy.deepcopy(bare).eval()(x, IDS))  # batch statistics in eval, too
    with pytest.raises(ValueError, match="domain must be given"):
        bare.eval()(x)
    shared = randomised(DomainBatchNorm1d(4, 3, per_domain_affine=False))
    assert shared.weight.shape == (4,)
    full = DomainBatchNorm1d(4, 3)
    full.load_state_dict({name: v.expand(3, 4) if v.shape == (4,) else v for name, v in shared.state_dict().items()})
    for training in (True, False):
        close(shared.train(training)(x, IDS), full.train(training)(x, IDS))
    bare = CalibratedBatchNorm1d(4, 3, track_running_stats=False)
    assert torch.equal(bare(x, IDS), copy.deepcopy(bare).eval()(x, IDS))
    assert DomainBatchNorm3d(2, 2)(normal(4, 2, 3, 2, 2), IDS[:4] % 2).shape == (4, 2, 3, 2, 2)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_empty_batch(kind: Any) -> None:
    layer = randomised(kind(4, 3))
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        y = layer.train(training)(torch.empty(0, 4, 3, 3, requires_grad=True), torch.empty(0, dtype=torch.int64))
        assert y.shape == (0, 4, 3, 3)
        if training:
            y.sum().backward()
            assert not layer.weight.grad.any()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_reset_and_description(kind: Any) -> None:
    layer = randomised(kind(4, 3))
    layer(normal(6, 4, 3, 3), IDS)
    layer.reset_parameters()
    for name, value in kind(4, 3).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert repr(layer).startswith(f"{kind.__name__}(4, num_domains=3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_half_precision_keeps_float32_statistics(kind: Any, dtype: torch.dtype) -> None:
    """16-bit x in, 16-bit y out; parameters, their gradients and statistics float32, as under autocast."""
    layer, x = randomised(kind(4, 3)), normal(6, 4, 5, 5).to(dtype).requires_grad_()
    exact, wide = copy.deepcopy(layer), x.detach().float().requires_grad_()
    dy = normal(6, 4, 5, 5, seed=1).to(dtype)
    for training in (True, False):
        y, want = layer.train(training)(x, IDS), exact.train(training)(wide, IDS)
        assert y.dtype == dtype
        close(y.float(), want, 1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(nn.Conv2d(4, 4, 1)(wide), IDS).dtype == torch.bfloat16
    layer.train()(x, IDS).backward(dy)
    exact.train()(wide, IDS).backward(dy.float())
    assert x.grad.dtype == dtype
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        close(one.grad, other.grad, 2e-2)
    close(layer.running_var, exact.running_var, 1e-6)


@pytest.mark.parametrize("kind", [*BY_DOMAIN_2D, CalibratedInstanceNorm2d])
def test_same_bits_with_any_number_of_threads(kind: Any) -> None:
    by_domain = kind is not CalibratedInstanceNorm2d
    layer = randomised(kind(300, 3) if by_domain else kind(300))
    x, ids = normal(240, 300, 2, 2), torch.arange(240) % 3
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        module, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        y = module(leaf, *([ids] if by_domain else []))
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.set_num_threads(1)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_state_dict_round_trip_copy_and_pickle(kind: Any) -> None:
    layer, x = randomised(kind(4, 3)), normal(6, 4, 3, 3)
    layer(x, IDS)
    other = kind(4, 3)
    other.load_state_dict(layer.state_dict())
    want = layer.eval()(x, IDS)
    for twin in (other.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, IDS), want)
    assert layer.state_dict()["running_mean"].shape == (3, 4)
    assert layer.state_dict()["num_batches_tracked"].tolist() == [1, 1, 1]
    for wrong in (layer, nn.BatchNorm2d(5)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            kind(4, 2).load_state_dict(wrong.state_dict())


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_plain_batch_norm_is_loaded_into_every_domain(kind: Any) -> None:
    plain, x = randomised(nn.BatchNorm2d(4)), normal(6, 4, 3, 3)
    plain(x)
    layer = kind(4, 3)
    layer.load_state_dict(plain.state_dict(), strict=kind is not CalibratedBatchNorm2d)
    for k in range(3):
        assert torch.equal(layer.running_var[k], plain.running_var)
    assert layer.num_batches_tracked.tolist() == [1, 1, 1]
    layer.running_mean[0] += 1  # rows do not share memory
    assert torch.equal(layer.running_mean[1], plain.running_mean)
    if kind is not CalibratedBatchNorm2d:
        close(layer.eval()(x, 1), plain.eval()(x))
    assert plain.state_dict()["weight"].shape == (4,)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_functional_call_and_gradient_of_a_function(kind: Any) -> None:
    layer, x = randomised(kind(4, 3)), normal(6, 4, 3, 3)
    parameters = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        for value in changed.parameters():
            value.mul_(2)
    want = changed(x, IDS)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        return torch.func.functional_call(layer, {**parameters, **buffers}, (x, IDS)).square().sum()

    close(loss(parameters), want.square().sum())
    want.square().sum().backward()
    gradients = torch.func.grad(loss)(parameters)
    for name, value in changed.named_parameters():
        close(gradients[name], value.grad, 1e-5)


# ------------------------------------------------------------------------------------------------ compile, export


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*BY_DOMAIN_2D, CalibratedInstanceNorm2d])
def test_compiles_in_one_graph(kind: Any, training: bool) -> None:
    torch._dynamo.reset()
    by_domain = kind is not CalibratedInstanceNorm2d
    layer = randomised(kind(4, 3) if by_domain else kind(4)).train(training)
    arguments = (IDS,) if by_domain else ()
    plain, x, dy = copy.deepcopy(layer), normal(6, 4, 3, 3), normal(6, 4, 3, 3, seed=1)
    results = []
    for module in (torch.compile(layer, fullgraph=True, backend="aot_eager"), plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf, *arguments, residual=2 * x, activation="relu")
        y.backward(dy)
        results.append((y, leaf.grad))
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-5)
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        close(one.grad, other.grad, 1e-5)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        close(one, other)


def test_compiled_model_sees_the_contexts() -> None:
    """Opened outside of the compiled function: other ids are other inputs, and no context is another graph."""
    torch._dynamo.reset()
    model = randomised(nn.Sequential(nn.Conv2d(2, 4, 1), GaussianProcessBatchNorm2d(4, 3), nn.ReLU()))
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), normal(6, 2, 3, 3)
    model.eval()
    for ids in (IDS, IDS.roll(1), 1, None):
        with domain_context(ids):
            close(compiled(x), model(x))
    paths = batch_norm_paths(model, path_coefficients(3, 2, generator=torch.Generator().manual_seed(1)))
    with path_context(paths, IDS % 2):
        close(compiled(x), model(x))
    close(compiled(x), model(x))


def test_context_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    model = randomised(nn.Sequential(DomainBatchNorm2d(4, 3), nn.ReLU())).eval()

    def function(x: Tensor, ids: Tensor) -> Tensor:
        with domain_context(ids):
            return model(x)

    x = normal(6, 4, 3, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.roll(1)):
        close(compiled(x, ids), function(x, ids))
    assert torch.equal(model(x), model[0](x).relu())  # nothing stays open


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DomainBatchNorm2d, CalibratedBatchNorm2d, GaussianProcessBatchNorm2d])
def test_inductor(kind: Any) -> None:
    torch._dynamo.reset()
    layer, x = randomised(kind(4, 3)), normal(6, 4, 3, 3)
    plain = copy.deepcopy(layer)
    close(torch.compile(layer, fullgraph=True)(x, IDS), plain(x, IDS), 1e-5)
    close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_export(kind: Any) -> None:
    layer, x = randomised(kind(4, 3)).eval(), normal(6, 4, 3, 3)
    with torch.no_grad():
        program = torch.export.export(layer, (x, IDS))
        close(program.module()(x, IDS.roll(1)), layer(x, IDS.roll(1)))
        unseen = torch.export.export(nn.Sequential(layer), (x,))
        close(unseen.module()(2 * x), layer(2 * x))


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("domain", DomainBatchNorm2d),
        ("sync", SyncDomainBatchNorm2d),
        ("gaussian_process", GaussianProcessBatchNorm2d),
        ("calibrated", CalibratedBatchNorm2d),
        ("calibrated_instance", CalibratedInstanceNorm2d),
        ("instance", nn.InstanceNorm2d),
    ],
)
def test_conversion_of_a_network(kind: str, expected: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = ResNet(10, width=8, blocks_per_stage=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomised(module)
            module.momentum = None
    model.head.weight.requires_grad_(False)
    model.blocks[0].norm1.bias.requires_grad_(False)
    plain, x = copy.deepcopy(model).eval(), normal(6, 3, 16, 16)
    number = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    options = {"unit_start": True} if kind == "calibrated" else {}
    converted = convert_domain_batch_norm(model, 3, kind=kind, **options)
    assert converted is model
    assert sum(type(m) is expected for m in model.modules()) == number
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert not model.blocks[0].norm1.bias.requires_grad
    assert model.blocks[0].norm1.weight.requires_grad
    with domain_context(IDS):
        model.train()(x).square().sum().backward()
    if kind in ("domain", "sync", "gaussian_process", "calibrated"):
        assert model.blocks[0].norm1.momentum is None
        fresh = convert_domain_batch_norm(copy.deepcopy(plain), 3, kind=kind, **options).eval()
        with torch.no_grad():
            for domain in (-1, 2, IDS):
                with domain_context(domain):
                    close(fresh(x), plain(x), 1e-4)


def test_conversion_of_special_cases() -> None:
    root = convert_domain_batch_norm(nn.BatchNorm1d(4, eps=1e-3).eval(), 2)
    assert type(root) is DomainBatchNorm1d
    assert root.eps == 1e-3
    assert not root.training
    shared = nn.BatchNorm2d(3)
    model = convert_domain_batch_norm(nn.Sequential(shared, nn.ReLU(), shared), 2)
    assert model[0] is model[2]
    assert type(convert_domain_batch_norm(nn.SyncBatchNorm(3), 2, kind="sync")) is SyncDomainBatchNorm2d
    assert type(convert_domain_batch_norm(nn.BatchNorm3d(3), 2)) is DomainBatchNorm3d
    neck = nn.BatchNorm1d(3)
    assert convert_domain_batch_norm(neck, 2, kind="instance") is neck
    bare = convert_domain_batch_norm(nn.BatchNorm2d(3, affine=False, track_running_stats=False), 2)
    assert (bare.affine, bare.track_running_stats) == (False, False)
    double = convert_domain_batch_norm(nn.BatchNorm2d(3, dtype=torch.float64), 2, kind="calibrated")
    assert double.running_var.dtype == torch.float64
    with pytest.raises(ValueError, match="kind must be one of"):
        convert_domain_batch_norm(model, 2, kind="layer")
    with pytest.raises(ValueError, match="has no norm for BatchNorm3d"):
        convert_domain_batch_norm(nn.BatchNorm3d(3), 2, kind="calibrated")
    with pytest.raises(ValueError, match="must track"):
        convert_domain_batch_norm(nn.BatchNorm2d(3, track_running_stats=False), 2, kind="gaussian_process")


@pytest.mark.parametrize("domain", [-1, 0, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(3, 4), DomainBatchNorm1d, (5, 3)),
        (nn.Conv1d(3, 4, 3), GaussianProcessBatchNorm1d, (5, 3, 7)),
        (nn.Conv2d(3, 4, 3, stride=2, bias=False), DomainBatchNorm2d, (5, 3, 7, 6)),
        (nn.Conv2d(4, 4, 3, groups=2), GaussianProcessBatchNorm2d, (5, 4, 7, 6)),
        (nn.Conv3d(3, 4, 2), DomainBatchNorm3d, (5, 3, 4, 4, 4)),
    ],
)
def test_fusion_with_the_layer_before(
    layer: nn.Module, norm: Any, shape: tuple[int, ...], activation: str | None, domain: int
) -> None:
    randomised(layer)
    domain_norm = randomised(norm(4, 3, activation=activation)).eval()
    x = normal(*shape)
    before = copy.deepcopy(layer.state_dict())
    fused = fuse_domain_batch_norm(layer, domain_norm, domain)
    want = domain_norm(layer(x), domain)
    close(fused(x), want, 2e-6)
    close(domain_norm.plain(domain).eval()(layer(x)), want, 2e-6)
    assert not any("DomainBatchNorm" in type(m).__name__ for m in fused.modules())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_fusion_and_export_errors() -> None:
    conv, norm = nn.Conv2d(3, 4, 1), DomainBatchNorm2d(4, 2)
    with pytest.raises(TypeError, match="conv must be"):
        fuse_domain_batch_norm(nn.ReLU(), norm)
    with pytest.raises(TypeError, match="norm must be"):
        fuse_domain_batch_norm(conv, CalibratedBatchNorm2d(4, 2))
    with pytest.raises(ValueError, match="norm must have the 4 channels"):
        fuse_domain_batch_norm(conv, DomainBatchNorm2d(3, 2))
    with pytest.raises(ValueError, match=r"domain must be in -1..1, not 2"):
        fuse_domain_batch_norm(conv, norm, 2)
    with pytest.raises(ValueError, match=r"domain must be in -1..1, not 2"):
        export_batch_norm(norm, 2)
    with pytest.raises(ValueError, match="track_running_stats must be True"):
        DomainBatchNorm2d(4, 2, track_running_stats=False).plain()


@pytest.mark.parametrize("kind", ["domain", "gaussian_process"])
def test_exported_network_is_plain(kind: str) -> None:
    torch.manual_seed(0)
    model = convert_domain_batch_norm(ResNet(10, width=8, blocks_per_stage=1), 3, kind=kind)
    for module in model.modules():
        if isinstance(module, DomainBatchNorm2d | GaussianProcessBatchNorm2d):
            randomised(module)
    x = normal(4, 3, 16, 16)
    for domain in (-1, 1):
        plain = export_batch_norm(model, domain).eval()
        assert not any(isinstance(m, DomainBatchNorm2d | GaussianProcessBatchNorm2d) for m in plain.modules())
        with torch.no_grad(), domain_context(domain):
            close(plain(x), model.eval()(x), 1e-4)
    assert any(isinstance(m, DomainBatchNorm2d | GaussianProcessBatchNorm2d) for m in model.modules())


def test_everything_is_exported() -> None:
    for name in nk.nn.__all__:
        assert getattr(nk.nn, name).__name__ == name
    assert nk.nn.__all__ == sorted(nk.nn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm'"):
        nk.nn.BatchNorm  # noqa: B018


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*BY_DOMAIN_2D, CalibratedInstanceNorm2d])
def test_cuda_is_the_cpu(kind: Any, training: bool) -> None:
    by_domain = kind is not CalibratedInstanceNorm2d
    layer = randomised(kind(4, 3) if by_domain else kind(4)).train(training)
    x, dy = normal(6, 4, 5, 5), normal(6, 4, 5, 5, seed=1)
    results = []
    for device in ("cuda", "cpu"):
        module, leaf = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        y = module(leaf, *([IDS.to(device)] if by_domain else []), activation="relu")
        y.backward(dy.to(device))
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([value.cpu() for value in (y, leaf.grad, *gradients, *module.buffers())])
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BY_DOMAIN_2D)
def test_wrong_ids_on_cuda_give_nan(kind: Any) -> None:
    layer, ids = randomised(kind(4, 3)).cuda(), torch.tensor([2, 0, 3, 1, 0, -2], device="cuda")
    y = layer(normal(6, 4, 3, 3).cuda(), ids)
    assert y.isnan().flatten(1).all(1).tolist() == [False, False, True, False, False, True]


# ------------------------------------------------------------------------------------------------ processes

SIZES = {2: [5, 3], 4: [4, 0, 1, 3]}  # samples of each rank, 8 in all; with 4 processes one has none


def sync_layer(kind: Callable[..., nn.Module]) -> Any:
    return randomised(kind(4, 4).double())


def check_sync(rank: int, world: int, kind: Callable[..., nn.Module]) -> None:
    """Output, gradients and statistics of each rank are its part of those of one process; domain 3 is absent."""
    x, dy = 3 * normal(8, 4, 3, 2, dtype=torch.float64) + 1, normal(8, 4, 3, 2, seed=1, dtype=torch.float64)
    domain = torch.tensor([0, 1, 2, 2, 0, 1, 0, 2])
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    layer, leaf = sync_layer(kind), x[mine].clone().requires_grad_()
    single, whole = sync_layer(kind), x.clone().requires_grad_()
    if hasattr(single, "synchronize"):
        single.synchronize = False
    else:
        single._group = lambda: None
    for _ in range(2):
        y, want = layer(leaf, domain[mine]), single(whole, domain)
    close(y, want[mine], 1e-13)
    y.backward(dy[mine])
    want.backward(dy)
    close(leaf.grad, whole.grad[mine], 1e-12)
    for one, other in zip(layer.parameters(), single.parameters(), strict=True):
        total = one.grad.clone()
        dist.all_reduce(total)
        close(total, other.grad, 1e-12)
    for name, value in layer.named_buffers():
        close(value, dict(single.named_buffers())[name], 1e-13)
    layer.eval()(leaf, domain[mine])  # no exchange: another number of calls on each rank is no deadlock
    if rank == 0:
        layer(leaf, domain[mine])


def check_sync_domain(rank: int, world: int) -> None:
    check_sync(rank, world, SyncDomainBatchNorm2d)


def check_sync_calibrated(rank: int, world: int) -> None:
    check_sync(rank, world, lambda *sizes: CalibratedBatchNorm2d(*sizes, synchronize=True))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", [check_sync_domain, check_sync_calibrated])
def test_check_6_processes_share_a_batch(check: Any, world: int, tmp_path: Path) -> None:
    """Check 6 of GDNorm: the all-reduced moments are those of one process with the whole batch."""
    on_every_rank(check, world, tmp_path)


def check_data_parallel(rank: int, world: int) -> None:
    """GDNorm under DistributedDataParallel, sources and a path in one call: gradients are the means over ranks."""
    torch.manual_seed(0)
    model = GDNorm(6, 3, depth=18, width=4)
    batches = [normal(12, 3, 32, 16, seed=part) for part in range(world)]
    labels = torch.arange(6).repeat_interleave(2)
    coefficients = path_coefficients(3, 1, generator=torch.Generator().manual_seed(0))

    def gradients(module: nn.Module, images: Tensor) -> list[Tensor]:
        outputs = module(images, labels // 2, coefficients)
        combined_loss([model.loss(out, labels, labels // 2) for out in outputs]).backward()
        return [parameter.grad for parameter in module.parameters() if parameter.requires_grad]

    got = gradients(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), batches[rank])
    parts = [gradients(copy.deepcopy(model), images) for images in batches]
    for one, *others in zip(got, *parts, strict=True):
        close(one, sum(others) / world, 1e-5)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    on_every_rank(check_data_parallel, 2, tmp_path)


def test_sync_alone_is_the_plain_layer() -> None:
    layer, x = randomised(SyncDomainBatchNorm2d(4, 3)), normal(6, 4, 3, 3)
    plain = DomainBatchNorm2d(4, 3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, IDS), plain(x, IDS))
