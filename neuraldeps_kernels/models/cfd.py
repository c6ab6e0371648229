"""Reference model inspired by CFD: features decomposed into identity, domain and entangled parts.

"Calibrated Feature Decomposition for Generalizable Person Re-Identification" (arXiv 2111.13945). Of the paper only the
abstract could be read, and its repository holds no code: formulas, losses and numbers are our reconstruction.

    xh = CSBN(x; d),   z = CIN(xh),   R = xh - z           calibrated map, its identity part, what the norm removed
    (e_dom, e_ent) = softmax of the pairs of MLP(GAP(R)),   a = sigmoid(MLP(GAP(e_ent R)))          [N, C]
    f = z + a e_ent R                                       reinforced identity map, the result
    f_minus = z + (1 - a) e_ent R + e_dom R                 contaminated map, seen by a loss only

All gates follow from means over positions, so every map is x under an affine map per sample and channel: from instance
moments g, q of x come A, B [N, C] with f = A (x - g) + B, and only f is written. Means: GAP(f) = B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from torch.utils.checkpoint import checkpoint

from neuraldeps_kernels.models.reid_training import (
    batch_hard_triplet_losses,
    identity_losses,
    mean_over_domains,
    restitution_ranking_loss,
)
from neuraldeps_kernels.models.resnet import ResNet
from neuraldeps_kernels.nn.calibrated_norm import (
    CalibratedBatchNorm1d,
    CalibratedBatchNorm2d,
    CalibratedInstanceNorm2d,
    Statistics,
)
from neuraldeps_kernels.nn.conversion import convert_domain_batch_norm
from neuraldeps_kernels.nn.domain_norm import domain_context
from neuraldeps_kernels.ops import domain_norm as ops

DOMAIN_WEIGHT, RANKING_WEIGHT = 0.1, 0.1  # l_dom, l_dec


class Decomposition(NamedTuple):
    """Coefficients [N, C] of the maps of a CFD module, each map being A (x - g) + B."""

    f: tuple[Tensor, Tensor]
    z: tuple[Tensor, Tensor]
    f_minus: tuple[Tensor, Tensor]
    e_dom: Tensor
    e_ent: Tensor
    a: Tensor
    p: Tensor  # GAP(R)
    statistics: tuple[Tensor, ...]  # of the batch, in training


class Pooled(NamedTuple):
    """Features [N, C] for the losses of one module."""

    domain: Tensor  # GAP(R_dom)
    z: Tensor  # GAP(relu(.)) of the maps
    f: Tensor
    f_minus: Tensor


class CFDModule(nn.Module):
    """x [N, C, H, W] to the reinforced identity map f of the same shape.

    Args:
        channels: C.
        num_domains: D.
        reduction: the hidden layers of the gates have C / reduction units, at least one.
        eps, momentum: of the norms.

    forward(x, domain=None): f; one read of x for moments, one read and one write. domain as DomainBatchNorm2d.
    with_pools(x, domain=None): (f, Pooled), for training with the losses of the decomposition.
    """

    def __init__(
        self,
        channels: int,
        num_domains: int,
        *,
        reduction: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.csbn = CalibratedBatchNorm2d(channels, num_domains, eps, momentum)
        self.cin = CalibratedInstanceNorm2d(channels, eps)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, 2 * channels)  # split of R
        self.fc3, self.fc4 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)  # reinforcement

    def forward(self, x: Tensor, domain: Tensor | int | None = None) -> Tensor:
        statistics = self.csbn.statistics(x, domain)

        def coefficients(g: Tensor, q: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            parts = self.decomposition(g, q, statistics, parameters)
            return *parts.f, *parts.statistics

        f, batch = ops.normalize(x, coefficients, *self.coefficient_parameters())
        self.csbn.update(*batch)
        return f

    def with_pools(self, x: Tensor, domain: Tensor | int | None = None) -> tuple[Tensor, Pooled]:
        statistics = self.csbn.statistics(x, domain)
        g, q = ops.instance_moments(x)
        parts = self.decomposition(g, q, statistics, self.coefficient_parameters())
        self.csbn.update(*parts.statistics)
        f = ops.centred_affine(x, g, *parts.f)
        pools = (relu_pool(x, g, *map_) for map_ in (parts.z, parts.f, parts.f_minus))
        return f, Pooled(parts.e_dom * parts.p, *pools)

    def coefficient_parameters(self) -> tuple[Tensor, ...]:
        gates = (self.fc1, self.fc2, self.fc3, self.fc4)
        linears = (parameter for layer in gates for parameter in (layer.weight, layer.bias))
        return *self.csbn.calibration(), *self.cin.calibration(), *linears

    def decomposition(
        self, g: Tensor, q: Tensor, statistics: Statistics, parameters: tuple[Tensor, ...]
    ) -> Decomposition:
        """All coefficients from instance moments [N, C] and `coefficient_parameters`, in the dtype of the moments."""
        csbn, cin = parameters[:5], parameters[5:9]
        w1, b1, w2, b2, w3, b3, w4, b4 = parameters[9:]
        A1, m1, *batch = self.csbn.scale_and_shift(g, q, statistics, *csbn)
        scale, m2 = self.cin.scale_and_shift(A1.square() * q, *cin)
        A2 = scale * A1
        p = m1 - m2
        with torch.autocast(g.device.type, enabled=False):
            split = linear(linear(p, w1, b1).relu(), w2, b2).unflatten(1, (2, -1)).softmax(1)
            e_dom, e_ent = split[:, 0], split[:, 1]
            a = linear(linear(e_ent * p, w3, b3).relu(), w4, b4).sigmoid()
        kept = a * e_ent  # share of R in f
        return Decomposition(
            f=(A2 + kept * (A1 - A2), m2 + kept * p),
            z=(A2, m2),
            f_minus=(A1 - kept * (A1 - A2), m1 - kept * p),
            e_dom=e_dom,
            e_ent=e_ent,
            a=a,
            p=p,
            statistics=tuple(batch),
        )


def relu_pool(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Means [N, C] over positions of relu(scale (x - mean) + shift), whose map is formed again for the gradient."""

    def pooled(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = ops.centred_affine(x, mean, scale, shift, activation="relu")
        return y.flatten(2).mean(2, dtype=mean.dtype)

    return checkpoint(pooled, x, mean, scale, shift, use_reentrant=False)  # type: ignore[no-any-return]


class CFDOutputs(NamedTuple):
    """What the losses see of a batch."""

    pooled: Tensor  # u [N, F] before the neck
    logits: Tensor  # [N, identities]
    domain_logits: list[Tensor]  # a module each, [N, D]
    modules: list[Pooled]


class CFD(nn.Module):
    """ResNet with CFD modules after some stages, global mean, neck and linear classifier.

    Args:
        num_identities: of all source domains together.
        num_domains: D.
        depth, width, last_stride: as models.resnet.ResNet. `load_imagenet(model.backbone, state_dict)` loads weights.
        stages: after which of the stages 1 to 4 a module stands.
        reduction: as CFDModule.
        calibrate_all: every BatchNorm of the backbone is a CalibratedBatchNorm2d.
        calibrated_neck: the neck is a CalibratedBatchNorm1d; else plain BatchNorm.

    forward(images, domain=None):
        training: CFDOutputs.
        eval: features [N, F] of length 1 for retrieval; domain None or -1 for unseen.
    """

    def __init__(
        self,
        num_identities: int,
        num_domains: int,
        *,
        depth: int = 50,
        width: int = 64,
        last_stride: int = 1,
        stages: tuple[int, ...] = (1, 2, 3),
        reduction: int = 16,
        calibrate_all: bool = False,
        calibrated_neck: bool = True,
    ) -> None:
        super().__init__()
        if not set(stages) <= {1, 2, 3, 4}:
            raise ValueError(f"stages must be among 1, 2, 3, 4, not {stages}")
        self.num_domains = num_domains
        self.backbone = ResNet(depth, width=width, last_stride=last_stride)
        if calibrate_all:
            convert_domain_batch_norm(self.backbone, num_domains, kind="calibrated")
        channels = {stage: self.backbone.channels[stage - 1] for stage in sorted(stages)}
        self.decompositions = nn.ModuleDict(
            {str(stage): CFDModule(C, num_domains, reduction=reduction) for stage, C in channels.items()}
        )
        self.domain_classifiers = nn.ModuleDict(
            {str(stage): nn.Linear(C, num_domains) for stage, C in channels.items()}
        )
        features = self.backbone.channels[-1]
        self.neck: nn.Module = (
            CalibratedBatchNorm1d(features, num_domains) if calibrated_neck else nn.BatchNorm1d(features)
        )
        self.classifier = nn.Linear(features, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images: Tensor, domain: Tensor | int | None = None) -> Any:
        if domain is None:
            return self._outputs(images)
        with domain_context(domain):
            return self._outputs(images)

    def _outputs(self, images: Tensor) -> Any:
        x = self.backbone.stem(images)
        modules: list[Pooled] = []
        domain_logits: list[Tensor] = []
        for number, stage in enumerate(self.backbone.stages, 1):
            x = stage(x)
            name = str(number)
            if name not in self.decompositions:
                continue
            module = self.decompositions[name]
            assert isinstance(module, CFDModule)
            if self.training:
                x, pools = module.with_pools(x)
                modules.append(pools)
                domain_logits.append(self.domain_classifiers[name](pools.domain))
            else:
                x = module(x)
        pooled = x.mean((2, 3))
        features = self.neck(pooled)
        if not self.training:
            return normalize(features.float(), dim=1)
        return CFDOutputs(pooled, self.classifier(features), domain_logits, modules)

    def loss(
        self,
        outputs: CFDOutputs,
        labels: Tensor,
        domain: Tensor,
        *,
        domain_weight: float = DOMAIN_WEIGHT,
        ranking_weight: float = RANKING_WEIGHT,
    ) -> Tensor:
        """L_id + L_tri + l_dom L_dom + l_dec L_dec: the last two are means over modules."""
        losses = identity_losses(outputs.logits, labels) + batch_hard_triplet_losses(outputs.pooled, labels)
        total = mean_over_domains(losses, domain, self.num_domains)
        if outputs.modules:
            total = total + domain_weight * domain_loss(outputs.domain_logits, domain)
            rankings = [restitution_ranking_loss(m.z, m.f, m.f_minus, labels) for m in outputs.modules]
            total = total + ranking_weight * torch.stack(rankings).mean()
        return total


def domain_loss(logits: list[Tensor], domain: Tensor) -> Tensor:
    """L_dom: cross-entropy of the D domains, mean over modules; log D for zero logits."""
    return torch.stack([cross_entropy(one.float(), domain) for one in logits]).mean()
