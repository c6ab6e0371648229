"""Whole models: BatchNorm to norms by domain and back, and into the convolutions before it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from neuraldeps_kernels.nn.calibrated_norm import (
    CalibratedBatchNorm,
    CalibratedBatchNorm1d,
    CalibratedBatchNorm2d,
    CalibratedInstanceNorm2d,
)
from neuraldeps_kernels.nn.domain_norm import (
    UNSEEN,
    DomainBatchNorm,
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    DomainBatchNorm3d,
    SyncDomainBatchNorm2d,
)
from neuraldeps_kernels.nn.gaussian_process_norm import (
    GaussianProcessBatchNorm,
    GaussianProcessBatchNorm1d,
    GaussianProcessBatchNorm2d,
)

Layer = TypeVar("Layer", bound=nn.Module)
_DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.SyncBatchNorm: 2, nn.BatchNorm3d: 3}
_KINDS: dict[str, dict[int, type[nn.Module]]] = {
    "domain": {1: DomainBatchNorm1d, 2: DomainBatchNorm2d, 3: DomainBatchNorm3d},
    "sync": {2: SyncDomainBatchNorm2d},
    "calibrated": {1: CalibratedBatchNorm1d, 2: CalibratedBatchNorm2d},
    "gaussian_process": {1: GaussianProcessBatchNorm1d, 2: GaussianProcessBatchNorm2d},
    "instance": {1: nn.BatchNorm1d, 2: nn.InstanceNorm2d},
    "calibrated_instance": {1: nn.BatchNorm1d, 2: CalibratedInstanceNorm2d},
}


def convert_domain_batch_norm(model: nn.Module, num_domains: int, *, kind: str = "domain", **options: Any) -> nn.Module:
    """Replaces every BatchNorm of `model` by a norm for D domains that starts with its parameters and statistics.

    The model keeps its other modules and is changed in place; use the result, since the model may itself be a norm. A
    norm that occurs twice stays one. Optimisers have to be made afterwards.

    Args:
        model: with nn.BatchNorm1d/2d/3d or nn.SyncBatchNorm (of images) layers; other layers stay.
        num_domains: D.
        kind: "domain" (DomainBatchNorm), "sync" (SyncDomainBatchNorm2d), "calibrated" (CalibratedBatchNorm),
            "gaussian_process" (GaussianProcessBatchNorm), "instance" (nn.InstanceNorm2d), "calibrated_instance"
            (CalibratedInstanceNorm2d). The last two keep BatchNorm1d, as a sample has no variance there.
        options: further arguments of the layers.

    Raises:
        ValueError: unknown kind, or a layer for which that kind has no norm.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")

    def converted(norm: nn.Module) -> nn.Module:
        if type(norm) not in _DIMENSIONS:
            return norm
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        layer = _KINDS[kind].get(_DIMENSIONS[type(norm)])
        if layer is None:
            raise ValueError(f"kind={kind!r} has no norm for {type(norm).__name__}")
        return norm if isinstance(norm, layer) else _converted(norm, layer, num_domains, options)

    return _replaced(model, converted)


def _converted(
    norm: nn.modules.batchnorm._BatchNorm, layer: type[nn.Module], num_domains: int, options: dict[str, Any]
) -> nn.Module:
    """A `layer` with the parameters and statistics of `norm`."""
    tensor = norm.weight if norm.affine else norm.running_mean
    place: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    if layer is nn.InstanceNorm2d:
        made: nn.Module = layer(norm.num_features, norm.eps, affine=True, **place, **options)
    elif layer is CalibratedInstanceNorm2d:
        made = layer(norm.num_features, norm.eps, **place, **options)
    else:
        if issubclass(layer, GaussianProcessBatchNorm | CalibratedBatchNorm):
            if not norm.track_running_stats:
                raise ValueError(f"{norm} must track running statistics")
        else:
            options = {"affine": norm.affine, "track_running_stats": norm.track_running_stats, **options}
        made = layer(norm.num_features, num_domains, norm.eps, norm.momentum, **place, **options)
    own = made.state_dict().keys()
    made.load_state_dict({name: value for name, value in norm.state_dict().items() if name in own}, strict=False)
    if isinstance(made, CalibratedBatchNorm) and made.unit_start:
        with torch.no_grad():
            made.weight.mul_(1 + math.exp(-1))
    for name, parameter in norm.named_parameters():
        getattr(made, name).requires_grad_(parameter.requires_grad)
    return made.train(norm.training)


def export_batch_norm(model: Layer, domain: int = UNSEEN) -> Layer:
    """Copy of `model` with plain BatchNorm layers, which does in eval what `model` does for one domain.

    Args:
        model: with DomainBatchNorm or GaussianProcessBatchNorm layers; other layers stay, among them calibrated ones,
            which are no BatchNorm.
        domain: 0..D-1, or -1 for the unseen one: pooled statistics, or the mean path of a Gaussian process.
    """

    def plain(module: nn.Module) -> nn.Module:
        return module.plain(domain) if isinstance(module, DomainBatchNorm) else module

    return _replaced(copy.deepcopy(model), plain)  # type: ignore[return-value]


def fuse_domain_batch_norm(conv: nn.Module, norm: nn.Module, domain: int = UNSEEN) -> nn.Module:
    """One layer that does in eval what `norm(conv(x), domain)` does: s W with bias beta + s (b - mu).

        s = weight / sqrt(var + eps),   mu, var, weight, beta those of `domain` (-1: unseen, as in `export_batch_norm`)

    Args:
        conv: nn.Conv1d/2d/3d or nn.Linear.
        norm: DomainBatchNorm or GaussianProcessBatchNorm. If its activation is "relu", nn.ReLU follows.

    Raises:
        TypeError: other layers.
        ValueError: the channels do not fit, there is no such domain, or no running statistics.
    """
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        raise TypeError(f"conv must be nn.Conv1d/2d/3d or nn.Linear, not {type(conv).__name__}")
    if not isinstance(norm, DomainBatchNorm):
        raise TypeError(f"norm must be DomainBatchNorm or GaussianProcessBatchNorm, not {type(norm).__name__}")
    if len(conv.weight) != norm.num_features:
        raise ValueError(f"norm must have the {len(conv.weight)} channels of conv, not {norm.num_features}")
    if not UNSEEN <= domain < norm.num_domains:
        raise ValueError(f"domain must be in {UNSEEN}..{norm.num_domains - 1}, not {domain}")
    mean, var, weight, beta = (None if value is None else value.double() for value in norm.row(domain))
    assert mean is not None
    assert var is not None
    s = (var + norm.eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if conv.bias is None else conv.bias.detach().double()) - mean
    fused = copy.deepcopy(conv)
    kernel = conv.weight.detach().double() * s.reshape(-1, *(1,) * (conv.weight.dim() - 1))
    fused.weight = nn.Parameter(kernel.to(conv.weight.dtype))
    fused.bias = nn.Parameter((s * shift + (0 if beta is None else beta)).to(conv.weight.dtype))
    return fused if norm.activation is None else nn.Sequential(fused, nn.ReLU())


def _replaced(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`model` with every module m replaced by replacement(m), each of them once."""
    made = {id(module): replacement(module) for module in model.modules()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and made[id(child)] is not child:
                setattr(parent, name, made[id(child)])
    return made[id(model)]
