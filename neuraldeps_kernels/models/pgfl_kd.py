"""Reference model inspired by PGFL-KD: body parts guide the training for occluded people, tests do without them.

"Pose-Guided Feature Learning with Knowledge Distillation for Occluded Person Re-Identification" (arXiv 2108.00139). Its
abstract names three branches, distillation and interaction; all formulas and weights here are our choice.

    MB    main branch               F [N, C, h, w],  p = mean of F,        f = neck(p),   z = W f       kept for tests
    FEB   foreground-enhanced       F_fe = conv(F),  p_fe by map M,        f_fe, z_fe alike
    SAB   semantics-aligned         F_sa = conv(F),  p_sa, group of channels k by map H_k if part k is visible (u_k)

    L     = L_id(MB) + L_id(FEB) + L_id(SAB) + w_3 L_sem(F_sa) + r (L_kd + L_int),   r from 0 to 1 while `ramp` lasts
    L_id  = cross-entropy, labels smoothed + batch-hard triplet of the pooled feature
    L_sem = mean over visible parts of CE(T_k, A_k),  T_k = H_k / sum H_k,  A_k = softmax(beta mean of F over group k)
    L_kd  = w_1 (KD(z, z_fe) + KD(z, z_sa)) + w_2 mean |p / |p| - p_fe / |p_fe||^2 + w_3 L_sem(F),  teachers detached
    L_int = cross-entropy of hybrids of p and p_sa, some groups of channels of each, through neck and W of MB

H and M are heat maps of joints (nn/heatmaps.py); pooling is ops/pose_weighted_pool.py, KD ops/distillation_kl.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, normalize

from neuraldeps_kernels.data.batches import Batch
from neuraldeps_kernels.models.reid_network import Outputs, ReidNetwork
from neuraldeps_kernels.models.reid_training import (
    LABEL_SMOOTHING,
    MARGIN,
    batch_hard_triplet_losses,
    identity_losses,
)
from neuraldeps_kernels.models.training import Method
from neuraldeps_kernels.nn import heatmaps
from neuraldeps_kernels.ops.distillation_kl import distillation_kl
from neuraldeps_kernels.ops.pose_weighted_pool import pose_weighted_pool

PARTS = {4: heatmaps.FOUR_PARTS, 6: heatmaps.SIX_PARTS, 13: heatmaps.THIRTEEN_PARTS}
INTERACTIONS = ("none", "semantics", "foreground", "pairs", "shared")


class Maps(NamedTuple):
    """Where the parts of N people are on a grid of cells."""

    parts: Tensor  # H [N, K, h, w]
    foreground: Tensor  # M [N, 1, h, w]
    visible: Tensor  # u bool [N, K]


class Branch(NamedTuple):
    """What FEB or SAB makes of N images."""

    map: Tensor  # F_fe or F_sa [N, C, h, w]
    pooled: Tensor  # [N, C]
    feature: Tensor  # [N, C]
    logits: Tensor  # [N, n]


# ------------------------------------------------------------------------------------------------ losses


def group_of_channel(C: int, K: int, device: torch.device | None = None) -> Tensor:
    """Int64 [C]: groups of C // K channels, the last takes the rest, as in `pose_weighted_pool`."""
    return (torch.arange(C, device=device) // (C // K)).clamp(max=K - 1)


def attention_loss(features: Tensor, maps: Tensor, visible: Tensor, *, beta: float = 5.0) -> Tensor:
    """L_sem: every group of channels of F [N, C, h, w] looks at its part.

    Args:
        maps: H [N, K, h, w], K at most C.
        visible: u bool [N, K]; other parts count nowhere.
        beta: of the attention, at positions.

    Returns:
        Mean over visible parts of the cross-entropy between map and attention, at least the entropy of the map; 0
        without any.
    """
    C, K = features.shape[1], maps.shape[1]
    wide = features.float() if features.dtype != torch.float64 else features
    sizes = [C // K] * (K - 1) + [C - (K - 1) * (C // K)]
    means = torch.stack([group.mean(1) for group in wide.split(sizes, 1)], 1)
    log_attention = torch.log_softmax(beta * means.flatten(2), 2)
    target = maps.flatten(2).to(wide.dtype)
    target = target / target.sum(2, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    losses = -(target * log_attention).sum(2)
    return torch.where(visible, losses, 0).sum() / visible.sum().clamp_min(1)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |p / |p| - q / |q||^2 over rows p, q [N, C]; no gradient to the teacher q."""
    return (normalize(student, dim=1) - normalize(teacher.detach(), dim=1)).square().sum(1).mean()


def hybrid(pooled: Tensor, other: Tensor, chosen: Tensor) -> Tensor:
    """`pooled` [N, C] with the groups of channels that are chosen, bool [N, K], taken from `other`."""
    return torch.where(chosen[:, group_of_channel(pooled.shape[1], chosen.shape[1], chosen.device)], other, pooled)


def random_groups(N: int, K: int, device: torch.device | None = None) -> Tensor:
    """Bool [N, K]: some but not all of K >= 2 groups, each such choice as likely as the others."""
    codes = torch.randint(1, 2**K - 1, (N,), device=device)
    return (codes[:, None] >> torch.arange(K, device=device)) % 2 == 1


def completing_partners(labels: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """For each of N pictures the one of the same person, labels int64 [N], that shows most parts which it hides.

    Returns:
        Numbers of the others, int64 [N], and bool [N, K]: parts of `visible` [N, K] that only they show.
    """
    shown = visible.float()
    gained = torch.where(labels[:, None] == labels, (1 - shown) @ shown.mT, -1)
    partner = gained.argmax(1)
    return partner, visible[partner] & ~visible


# ------------------------------------------------------------------------------------------------ model


class _PoseBranch(nn.Module):
    """1 x 1 convolution, BatchNorm and ReLU; neck and classifier as those of ReidNetwork."""

    def __init__(self, channels: int, num_ids: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, channels, 1, bias=False)
        self.features = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
        self.neck = nn.BatchNorm1d(channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(channels, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def finish(self, features: Tensor, pooled: Tensor) -> Branch:
        feature = self.neck(pooled)
        return Branch(features, pooled, feature, self.classifier(feature))


class PGFLKD(Method):
    """See the head of the file. Batches need joints; labels are 0 .. network.num_ids - 1.

    Args:
        foreground, semantics: whether there are FEB and SAB.
        distillation: whether they teach MB.
        interaction: hybrids of MB's pooled feature and SAB's ("semantics"), FEB's ("foreground"), or that of another
            picture of the same person where it alone shows a part ("pairs"); "shared": FEB's and SAB's features
            themselves go through MB's neck and classifier; "none".
        parts: K, of 4, 6 or 13 parts (nn/heatmaps.py).
        sigma: of a joint's heat map, in cells of F.
        total: maps of parts are sums of their joints', at most 1, instead of maxima.
        threshold: a part is visible where its map exceeds this.
        temperature, logit_weight, feature_weight, attention_weight: tau, w_1, w_2, w_3.
        attention_scale: beta.
        ramp: part of the training in which r grows to 1.

    Raises:
        ValueError: an option is unknown or out of range, or asks for a branch that is not there.
    """

    def __init__(
        self,
        network: ReidNetwork,
        *,
        foreground: bool = True,
        semantics: bool = True,
        distillation: bool = True,
        interaction: str = "semantics",
        parts: int = 4,
        sigma: float = 0.9,
        total: bool = False,
        threshold: float = 0.3,
        temperature: float = 4.0,
        logit_weight: float = 0.1,
        feature_weight: float = 0.5,
        attention_weight: float = 0.2,
        attention_scale: float = 5.0,
        ramp: float = 0.2,
        smoothing: float = LABEL_SMOOTHING,
        margin: float = MARGIN,
    ) -> None:
        super().__init__()
        if parts not in PARTS:
            raise ValueError(f"parts must be one of {', '.join(map(str, PARTS))}, not {parts}")
        if parts > network.channels:
            raise ValueError(f"parts must be at most the channels of the network, {network.channels}, not {parts}")
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, not {interaction!r}")
        needed = {"semantics": semantics, "foreground": foreground, "shared": foreground or semantics}
        if not needed.get(interaction, True):
            raise ValueError(f"interaction {interaction!r} needs a branch that is not there")
        if distillation and not (foreground or semantics):
            raise ValueError("distillation needs foreground or semantics, the branches that teach")
        for name, value in {"sigma": sigma, "temperature": temperature}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, not {value}")
        for name, value in {"ramp": ramp, "threshold": threshold}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in 0..1, less than 1, not {value}")
        self.network = network
        branches = {"foreground": foreground, "semantics": semantics}
        self.branches = nn.ModuleDict(
            {name: _PoseBranch(network.channels, network.num_ids) for name, wanted in branches.items() if wanted}
        )
        self.distillation, self.interaction = distillation, interaction
        self.groups, self.sigma, self.total, self.threshold = PARTS[parts], sigma, total, threshold
        self.temperature, self.logit_weight, self.feature_weight = temperature, logit_weight, feature_weight
        self.attention_weight, self.attention_scale = attention_weight, attention_scale
        self.ramp, self.smoothing, self.margin = ramp, smoothing, margin

    def maps(self, joints: Tensor, images: Tensor, features: Tensor) -> Maps:
        """Of joints [N, 17, 3] in pixels of images [N, 3, H, W], on the cells of features [N, C, h, w]."""
        (H, W), (h, w) = images.shape[2:], features.shape[2:]
        found = heatmaps.part_heatmaps(joints, H, W, h, w, self.sigma, groups=self.groups, total=self.total)
        parts = found[:, :-1]
        return Maps(parts, found[:, -1:], parts.amax((2, 3)) > self.threshold)

    def branch(self, name: str, features: Tensor, maps: Maps) -> Branch:
        """FEB ("foreground") or SAB ("semantics") of F."""
        branch = self.branches[name]
        assert isinstance(branch, _PoseBranch)
        own = branch.features(features)
        if name == "foreground":
            return branch.finish(own, pose_weighted_pool(own, maps.foreground)[:, 0])
        pooled = pose_weighted_pool(own, maps.parts, groups=True)
        group = group_of_channel(pooled.shape[1], len(self.groups), pooled.device)
        return branch.finish(own, torch.where(maps.visible[:, group], pooled, 0))

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        main: Outputs = self.network(batch.images)
        found = {"identity": self._identity(main.logits, batch.ids), "triplet": self._triplet(main.pooled, batch.ids)}
        if not self.branches and self.interaction == "none":
            return found
        if batch.joints is None:
            raise ValueError("PGFL-KD needs joints of the pictures that it trains on")
        maps = self.maps(batch.joints, batch.images, main.map)
        branches = {name: self.branch(name, main.map, maps) for name in self.branches}
        for name, branch in branches.items():
            found[name] = self._identity(branch.logits, batch.ids) + self._triplet(branch.pooled, batch.ids)
        if "semantics" in branches:
            found["attention"] = self._attention(branches["semantics"].map, maps)
        share = 1.0 if self.ramp == 0 else min(1.0, progress / self.ramp)
        if self.distillation:
            found["distillation"] = share * self.distillation_loss(main, branches, maps)
        if self.interaction != "none":
            found["interaction"] = share * self.interaction_loss(main, branches, maps, batch.ids)
        return found

    def distillation_loss(self, main: Outputs, branches: dict[str, Branch], maps: Maps) -> Tensor:
        """L_kd, which has no gradient to the branches."""
        total = self._attention(main.map, maps) if "semantics" in branches else main.pooled.new_zeros(())
        for branch in branches.values():
            total = total + self.logit_weight * distillation_kl(main.logits, branch.logits.detach(), self.temperature)
        if "foreground" in branches:
            total = total + self.feature_weight * feature_loss(main.pooled, branches["foreground"].pooled)
        return total

    def interaction_loss(self, main: Outputs, branches: dict[str, Branch], maps: Maps, labels: Tensor) -> Tensor:
        """L_int; the running statistics of the neck are not moved."""
        if self.interaction == "shared":
            features = [branch.pooled for branch in branches.values()]
        elif self.interaction == "pairs":
            partner, chosen = completing_partners(labels, maps.visible)
            features = [hybrid(main.pooled, main.pooled[partner], chosen)]
        else:
            chosen = random_groups(len(labels), len(self.groups), labels.device)
            features = [hybrid(main.pooled, branches[self.interaction].pooled.to(main.pooled.dtype), chosen)]
        return torch.stack([self._identity(self.main_logits(pooled), labels) for pooled in features]).mean()

    def main_logits(self, pooled: Tensor) -> Tensor:
        """Logits [N, n] of pooled features [N, C] by MB's neck, with the statistics of these alone, and classifier."""
        neck = self.network.neck
        feature = batch_norm(pooled, None, None, neck.weight, neck.bias, training=True, eps=neck.eps)
        return self.network.classifier(feature)  # type: ignore[no-any-return]

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        return self.network(images).feature  # type: ignore[no-any-return]

    def embed_with_pose(self, images: Tensor, joints: Tensor) -> Tensor:
        """Features [N, (1 + branches) C] of all branches, each of length 1, of images whose joints are known: what the
        branches could do at test."""
        main: Outputs = self.network(images)
        maps = self.maps(joints, images, main.map)
        found = [main.feature, *(self.branch(name, main.map, maps).feature for name in self.branches)]
        return torch.cat([normalize(feature, dim=1) for feature in found], 1)

    def _identity(self, logits: Tensor, labels: Tensor) -> Tensor:
        return identity_losses(logits, labels, smoothing=self.smoothing).mean()

    def _triplet(self, pooled: Tensor, labels: Tensor) -> Tensor:
        return batch_hard_triplet_losses(pooled, labels, margin=self.margin).mean()

    def _attention(self, features: Tensor, maps: Maps) -> Tensor:
        return self.attention_weight * attention_loss(features, maps.parts, maps.visible, beta=self.attention_scale)
