"""Reference model inspired by SSKD: a student learns unlabelled people as mixtures of known ones, from its teacher.

"Semi-Supervised Domain Generalizable Person Re-Identification" (arXiv 2108.05045). Losses and data flow follow the
public code; choices of ours are marked.

    f [N, d]      feature after the neck; w_j [d], j = 1..C, class weights;  c_j = <f, w_j> / (|f| |w_j|)
    z_j = s c_j                                                           plain logits
    u_y = s max(0, 1 + m - c_y) (c_y - (1 - m)),  u_j = s max(0, c_j + m) (c_j - m)    circle logits, max(..) constant

    L = L_c(u) + KD(z(x_l), z'(x_l); T_l) + KD(z_aux(x_u), z'(x_u); T_u)
    L_c      cross-entropy with targets 1 - eps and eps / (C - 1), mean over the samples whose loss is not 0
    KD       ops/distillation_kl.py, from the frozen teacher z'
    z_aux    an auxiliary classifier on the same feature, which unlabelled images alone train and tests do not use

Without a teacher this is the first stage, L = L_c, of student and teacher alike; the second starts from both.

Labelled and unlabelled images pass the student at once: `StreamBatchNorm` normalises each stream by itself and moves
the shared running statistics by the labelled stream, then the unlabelled one, as two passes do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from neuraldeps_kernels.data.batches import Batch
from neuraldeps_kernels.models.reid_network import ReidNetwork
from neuraldeps_kernels.models.training import Method
from neuraldeps_kernels.nn.domain_norm import context, domain_context
from neuraldeps_kernels.ops.distillation_kl import distillation_kl
from neuraldeps_kernels.ops.domain_norm import domain_batch_norm

TEACHER_NORMS = ("running", "batch")
CLASSIFIERS = ("auxiliary", "main")
BLOCK = 1024  # classes whose logits are there at once

# ------------------------------------------------------------------------------------------------ losses


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """c [N, C] of features [N, d] and class weights [C, d], in float32 (float64 for float64) also under autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return linear(*_unit_rows(features, weight))


def circle_logits(cosine: Tensor, own: Tensor, *, scale: float, margin: float) -> Tensor:
    """u [N, C] of cosines c [N, C]; own, bool [N, C]: which class is that of the sample. max(..) has no gradient."""
    return scale * _bracket(cosine, own, margin) * torch.where(own, cosine - (1 - margin), cosine - margin)


def circle_loss(
    features: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float, smoothing: float
) -> Tensor:
    """L_c of features [N, d], class weights [C, d] and labels int64 [N] in 0..C-1; 0 of no samples.

    At most one [N, C] matrix is in memory: the cosines, which become their gradient. Differentiable once.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _CircleLoss.apply(*_unit_rows(features, weight), labels, scale, margin, smoothing)  # type: ignore[no-any-return, no-untyped-call]


def _unit_rows(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(features.dtype, torch.float32)
    return normalize(features.to(wide), dim=1), normalize(weight.to(wide), dim=1)


def _bracket(cosine: Tensor, own: Tensor, margin: float) -> Tensor:
    cosine = cosine.detach()
    return torch.where(own, 1 + margin - cosine, cosine + margin).clamp_min(0)


class _CircleLoss(torch.autograd.Function):
    """L_c of unit rows, block of classes by block."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, w: Tensor, labels: Tensor, scale: float, margin: float, smoothing: float
    ) -> Tensor:
        C, c = len(w), f @ w.mT
        eps = smoothing if C > 1 else 0.0
        right, wrong = (f.new_full((), share) for share in (1 - eps, eps / max(C - 1, 1)))
        blocks = [(c[:, at : at + BLOCK], _own(labels, at, min(at + BLOCK, C))) for at in range(0, C, BLOCK)]
        largest = f.new_full((len(f),), -math.inf)
        total, plain, right_logit = (f.new_zeros(len(f)) for _ in range(3))
        for part, own in blocks:
            u = circle_logits(part, own, scale=scale, margin=margin)
            top = torch.maximum(largest, u.amax(1))
            total = total * (largest - top).exp() + (u - top[:, None]).exp().sum(1)
            largest, plain = top, plain + u.sum(1)
            right_logit = right_logit + torch.where(own, u, 0).sum(1)
        log_sum = largest + total.log()
        losses = log_sum - right * right_logit - wrong * (plain - right_logit)
        counted = (losses != 0).to(losses.dtype)
        share = counted / counted.sum().clamp_min(1)
        if any(ctx.needs_input_grad):
            for part, own in blocks:
                u = circle_logits(part, own, scale=scale, margin=margin)
                du = (u - log_sum[:, None]).exp() - torch.where(own, right, wrong)
                part.copy_(du * (scale * _bracket(part, own, margin)) * share[:, None])
            ctx.save_for_backward(f, w, c)
        return (losses * share).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f, w, dc = ctx.saved_tensors
        needs_f, needs_w = ctx.needs_input_grad[:2]
        return grad * (dc @ w) if needs_f else None, grad * (dc.mT @ f) if needs_w else None, None, None, None, None


def _own(labels: Tensor, begin: int, end: int) -> Tensor:
    """Bool [N, end - begin]: which class of the block is the label."""
    return labels[:, None] == torch.arange(begin, end, device=labels.device)


# ------------------------------------------------------------------------------------------------ two streams


class _StreamNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that, in training and within `domain_context(streams)`, streams int64 [N] of 0 and 1, normalises each
    stream by its own statistics; running ones are moved by stream 0, then by stream 1. Else BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        streams = context.domain
        if not self.training or not isinstance(streams, Tensor):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        means, variances = (table.new_zeros(2, len(table)) for table in (self.running_mean, self.running_var))
        y = domain_batch_norm(
            x, streams, means, variances, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )
        for stream in range(2):
            self.num_batches_tracked += 1
            step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(means[stream], step)
            self.running_var.lerp_(variances[stream], step)
        return y


class StreamBatchNorm1d(_StreamNorm, nn.BatchNorm1d):
    __doc__ = _StreamNorm.__doc__


class StreamBatchNorm2d(_StreamNorm, nn.BatchNorm2d):
    __doc__ = _StreamNorm.__doc__


_STREAM_NORMS: dict[type[nn.Module], type[_StreamNorm]] = {
    nn.BatchNorm1d: StreamBatchNorm1d,
    nn.BatchNorm2d: StreamBatchNorm2d,
}


def with_streams(network: nn.Module) -> None:
    """Replaces every BatchNorm1d and BatchNorm2d that tracks statistics, with its parameters and state."""
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if type(norm) in _STREAM_NORMS and norm.track_running_stats:
                made = _STREAM_NORMS[type(norm)](norm.num_features, norm.eps, norm.momentum, norm.affine)  # type: ignore[arg-type]
                assert isinstance(norm.running_mean, Tensor)
                made.to(norm.running_mean).load_state_dict(norm.state_dict())
                made.weight, made.bias = norm.weight, norm.bias  # type: ignore[assignment]
                made.train(norm.training)
                setattr(module, name, made)


# ------------------------------------------------------------------------------------------------ method


class SSKD(Method):
    """See the head of the file. Labels of batches are 0 .. network.num_ids - 1, those of unlabelled images not read.

    Args:
        network: the student, changed in place: its classifier starts as a cosine classifier does (Kaiming-uniform), its
            BatchNorms become `StreamBatchNorm`.
        teacher: trained in a first stage, of as many classes; None: this is a first stage. It is frozen here.
        scale, margin: s, m.
        smoothing: eps.
        labelled_temperature, unlabelled_temperature: T_l, T_u; they belong to s = 64 and scale with it.
        labelled_weight, unlabelled_weight: of the two distillations; 0: none of it, nor of its images.
        unlabelled_classifier: "auxiliary", or "main" for both streams (to compare with). The auxiliary one starts from
            the class weights of the teacher where those fit, else Kaiming-uniform; a teacher that is loaded later has
            to be copied there as well, as the presets do.
        teacher_norm: "running": the teacher is in eval mode; "batch": it normalises by each batch and its running
            statistics drift, as in the released code.

    Raises:
        ValueError: an option is unknown or out of range, or the teacher knows another number of classes.
    """

    def __init__(
        self,
        network: ReidNetwork,
        teacher: ReidNetwork | None = None,
        *,
        scale: float = 64.0,
        margin: float = 0.35,
        smoothing: float = 0.1,
        labelled_temperature: float = 16.0,
        unlabelled_temperature: float = 6.0,
        labelled_weight: float = 1.0,
        unlabelled_weight: float = 1.0,
        unlabelled_classifier: str = "auxiliary",
        teacher_norm: str = "running",
    ) -> None:
        super().__init__()
        if unlabelled_classifier not in CLASSIFIERS:
            raise ValueError(f"unlabelled_classifier must be one of {CLASSIFIERS}, not {unlabelled_classifier!r}")
        if teacher_norm not in TEACHER_NORMS:
            raise ValueError(f"teacher_norm must be one of {TEACHER_NORMS}, not {teacher_norm!r}")
        if not (scale > 0 and 0 <= smoothing < 1 and min(labelled_temperature, unlabelled_temperature) > 0):
            raise ValueError("scale and temperatures must be positive, smoothing in [0, 1)")
        if min(labelled_weight, unlabelled_weight) < 0:
            raise ValueError(f"weights must be 0 or more, not {labelled_weight} and {unlabelled_weight}")
        if teacher is not None and teacher.num_ids != network.num_ids:
            raise ValueError(f"teacher knows {teacher.num_ids} identities, but the student learns {network.num_ids}")
        self.scale, self.margin, self.smoothing = scale, margin, smoothing
        self.temperatures = labelled_temperature, unlabelled_temperature
        self.weights = labelled_weight, unlabelled_weight
        self.teacher_norm = teacher_norm
        with_streams(network)
        nn.init.kaiming_uniform_(network.classifier.weight, a=math.sqrt(5))
        self.network = network
        self.teacher = teacher
        self.auxiliary: nn.Linear | None = None
        if teacher is not None:
            teacher.requires_grad_(False)
            if unlabelled_classifier == "auxiliary":
                self.auxiliary = nn.Linear(network.channels, network.num_ids, bias=False)
                if teacher.channels == network.channels:
                    self.auxiliary.load_state_dict(teacher.classifier.state_dict())
        self.train()

    def train(self, mode: bool = True) -> SSKD:
        super().train(mode)
        if self.teacher is not None and self.teacher_norm == "running":
            self.teacher.eval()
        return self

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        other = batch.unlabelled
        if self.teacher is None or self.weights[1] == 0 or other is None or len(other) == 0:
            other = None
        f, f_other = self._features(batch, other)
        main = self.network.classifier.weight
        options = {"scale": self.scale, "margin": self.margin, "smoothing": self.smoothing}
        losses = {"circle": circle_loss(f, main, batch.ids, **options)}
        if self.teacher is None:
            return losses
        if self.weights[0] > 0:
            losses["labelled"] = self._distillation(f, main, batch, 0)
        if other is not None:
            assert f_other is not None
            weight = main if self.auxiliary is None else self.auxiliary.weight
            losses["unlabelled"] = self._distillation(f_other, weight, other, 1)
        return losses

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        return _feature(self.network, images)

    def trained_parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        """Biases without weight decay."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in trained if name.endswith("bias") == of_biases], "weight_decay": decay}
            for of_biases, decay in ((False, weight_decay), (True, 0.0))
        ]

    def _features(self, batch: Batch, other: Batch | None) -> tuple[Tensor, Tensor | None]:
        """Features of labelled and unlabelled images, in one pass."""
        if other is None:
            return _feature(self.network, batch.images), None
        streams = torch.cat([torch.zeros_like(batch.ids), torch.ones_like(other.ids)])
        with domain_context(streams):
            both = _feature(self.network, torch.cat([batch.images, other.images]))
        return both[: len(batch)], both[len(batch) :]

    def _distillation(self, features: Tensor, weight: Tensor, batch: Batch, stream: int) -> Tensor:
        """Weighted KD of a stream: 0 labelled, 1 unlabelled."""
        assert self.teacher is not None
        with torch.no_grad():
            known = cosines(_feature(self.teacher, batch.images), self.teacher.classifier.weight)
        # KD of logits s c at temperature T is s^2 times that of c at T / s.
        divergence = distillation_kl(cosines(features, weight), known, self.temperatures[stream] / self.scale)
        return self.weights[stream] * self.scale**2 * divergence


def _feature(network: ReidNetwork, images: Tensor) -> Tensor:
    """f [N, d], without the logits that the network would add."""
    return network.neck(network.pool(network.backbone(images)))  # type: ignore[no-any-return]
