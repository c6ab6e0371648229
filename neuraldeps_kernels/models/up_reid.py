"""Reference model inspired by UP-ReID: momentum contrast of persons without labels, consistent with the originals.

"Unleashing Potential of Unsupervised Pre-Training with Intra-Identity Regularization for Person Re-Identification"
(CVPR 2022, arXiv 2112.00317). Of the paper the abstract, the start of the introduction and a caption could be read:
augmented pictures shall agree with their originals as a whole, and local patches of each picture shall be told apart.
How both are done and all weights are ours; momentum contrast follows the public code of LUPerson.

    x_1, x_2, x_0 [N, 3, H, W]  two augmented views and the original; q = enc(x_1), k = enc'(x_2), o = enc'(x_0) [N, d]
    Q [K, d]                    queue of former k; enc' follows enc: theta' <- m theta' + (1 - m) theta
    u_m, v_m [N, d]             patch m of x_1 by enc and of x_0 by enc': mean of the map over the patch, second head

    L   = L_con + lambda_g r L_cons + lambda_p r (L_int + L_crs),  r: ramp over the training
    L_con  = -log softmax([<q, k>, q Q^T] / tau)[0]
    L_cons = KL(softmax(o Q^T / tau_t) || softmax(q Q^T / tau)) + eta (2 - 2 <q, o>)
    L_int  = -log softmax over m' of (<u_m, v_m'> / tau_p) at m' = m;  L_crs: over the pictures n' of the batch at n

Without lambda_g and lambda_p it is plain momentum contrast, bit for bit. The backbone then starts another model, as
models/baseline.py.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from neuraldeps_kernels.data.batches import Batch, View
from neuraldeps_kernels.models.reid_network import ReidNetwork
from neuraldeps_kernels.models.training import Method, of_all_ranks, rank_and_ranks
from neuraldeps_kernels.ops.queue_contrast import enqueue, momentum_update, queue_contrast

MININGS = ("patches", "negatives", "none")

# ------------------------------------------------------------------------------------------------ geometry of patches


def patch_boxes(rows: int, columns: int, height: int, width: int) -> Tensor:
    """x0, y0, x1, y1 [M, 4] of M = rows x columns equal patches of a picture, row by row, in its pixels."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = torch.stack([x, y, x + 1, y + 1], -1).view(-1, 4)
    return corners * torch.tensor([width / columns, height / rows] * 2)


def boxes_in_view(boxes: Tensor, view: View) -> Tensor:
    """Where boxes [M, 4] or [N, M, 4] of the originals lie in their views, [N, M, 4], in pixels of the views.

    They may reach beyond the view.
    """
    origin, scale, width = _frame(view)
    return _mirrored((boxes - origin) * scale, view.flipped, width)


def boxes_in_original(boxes: Tensor, view: View) -> Tensor:
    """Inverse of `boxes_in_view`: boxes [M, 4] or [N, M, 4] of views in pixels of the originals, [N, M, 4]."""
    origin, scale, width = _frame(view)
    return _mirrored(boxes, view.flipped, width) / scale + origin


def _frame(view: View) -> tuple[Tensor, Tensor, int]:
    """Origin of views in their originals and pixels of the view a pixel of the original, x, y, x, y [N, 1, 4]; W."""
    H, W = view.images.shape[2:]
    size = view.boxes[:, 2:] - view.boxes[:, :2]
    scale = size.new_tensor([W, H]) / size
    return view.boxes[:, None, [0, 1, 0, 1]], scale[:, None, [0, 1, 0, 1]], W


def _mirrored(boxes: Tensor, flipped: Tensor, width: int) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.where(flipped[:, None, None], torch.stack([width - x1, y0, width - x0, y1], -1), boxes)


def cell_weights(boxes: Tensor, picture: tuple[int, int], cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How much each cell of a map counts in the mean over boxes, and which part of each box the picture shows.

    The map is taken as constant over a cell, so that the mean over a box is exact and needs no samples.

    Args:
        boxes: [..., 4] in pixels of the picture; may reach beyond it.
        picture: H, W.
        cells: h, w of the map.

    Returns:
        [..., h w], which sum to 1, or 0 for a box outside; [...] in 0..1.
    """
    (H, W), (h, w) = picture, cells
    x0, y0, x1, y1 = (boxes * boxes.new_tensor([w / W, h / H] * 2)).unbind(-1)
    shared = _overlap(y0, y1, h)[..., :, None] * _overlap(x0, x1, w)[..., None, :]
    area = shared.sum((-2, -1))
    share = area / ((x1 - x0) * (y1 - y0))
    return (shared / area.clamp_min(1e-12)[..., None, None]).flatten(-2), share


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Length [..., cells] of [low, high] inside of each cell [i, i + 1]."""
    left = torch.arange(cells, device=low.device)
    return (torch.minimum(high[..., None], left + 1) - torch.maximum(low[..., None], left)).clamp_min(0)


# ------------------------------------------------------------------------------------------------ losses


def intrinsic_losses(u: Tensor, v: Tensor, temperature: float, *, doubled: bool = False) -> Tensor:
    """-log softmax over the patches m' of a picture of <u_m, v_m'> / temperature, at m' = m: [N, M].

    Args:
        u, v: unit rows [N, M, d] of patches of the views and of the originals.
        doubled: the most similar other patch counts twice.
    """
    similarity = u @ v.mT / temperature  # [N, M, M]
    own = similarity.diagonal(dim1=1, dim2=2)
    if doubled and u.shape[1] > 1:
        same = torch.eye(u.shape[1], dtype=torch.bool, device=u.device)
        hardest = similarity.masked_fill(same, -math.inf).argmax(2, keepdim=True)
        similarity = torch.cat([similarity, similarity.gather(2, hardest)], 2)
    return similarity.logsumexp(2) - own


def cross_losses(u: Tensor, v: Tensor, temperature: float) -> Tensor:
    """-log softmax over the pictures n' of <u_m of n, v_m of n'> / temperature, at n' = n: [N, M]. See above."""
    similarity = u.transpose(0, 1) @ v.permute(1, 2, 0) / temperature  # [M, N, N]
    return (similarity.logsumexp(2) - similarity.diagonal(dim1=1, dim2=2)).mT


def hardest_mean(losses: Tensor, valid: Tensor, count: int) -> Tensor:
    """Mean of the `count` largest of the valid losses [N, M] of each row, of all where there are fewer; 0 of none."""
    hardest = torch.where(valid, losses, -math.inf).topk(count, 1).indices
    kept = valid.gather(1, hardest)
    return torch.where(kept, losses.gather(1, hardest), 0).sum() / kept.sum().clamp_min(1)


# ------------------------------------------------------------------------------------------------ method


class ProjectionHeads(nn.Module):
    """C -> C -> relu -> d for whole pictures and, with `patches`, another one for patches."""

    def __init__(self, channels: int, features: int, *, patches: bool) -> None:
        super().__init__()
        self.whole = _head(channels, features)
        self.patch = _head(channels, features) if patches else None


def _head(channels: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, features))


def _unit(head: nn.Module, x: Tensor) -> Tensor:
    """Rows of length 1 [..., d] of x [..., C], float32 at least."""
    rows = head(x)
    return normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


class UPReID(Method):
    """See the head of the file. Batches have at least two views; identities are not looked at.

    Args:
        network: its backbone is trained, neck and classifier stay as they are.
        features: d.
        queue_size: K, at least the pictures of a batch, of all processes together.
        momentum: m.
        temperature, target_temperature, patch_temperature: tau, tau_t, tau_p.
        consistency_weight, patch_weight: lambda_g and lambda_p; 0: that part is left out.
        point_weight: eta.
        symmetric: consistency of the second view, too; the mean of both.
        patches: rows and columns of patches of the original.
        aligned: a patch is the same part of the body in view and original, by the box of the view; else patches of the
            view are those of its frame.
        least_visible: part of a patch that a view has to show; else the patch does not count in it.
        cross: with L_crs.
        mining: "patches": of each picture the `hard_patches` largest losses count; "negatives": in L_int the most
            similar other patch counts twice; "none".
        hard_patches: None: half of the patches, at least one.
        ramp: share of the training with r = 0, and share over which r then grows to 1.
        seed: of how pictures are shuffled among processes, so that statistics of norms do not tell views of a picture.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        network: ReidNetwork,
        *,
        features: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.1,
        target_temperature: float = 0.07,
        patch_temperature: float = 0.2,
        consistency_weight: float = 0.5,
        patch_weight: float = 0.3,
        point_weight: float = 1.0,
        symmetric: bool = False,
        patches: tuple[int, int] = (4, 1),
        aligned: bool = True,
        least_visible: float = 0.5,
        cross: bool = True,
        mining: str = "patches",
        hard_patches: int | None = None,
        ramp: tuple[float, float] = (0.3, 0.1),
        seed: int = 0,
    ) -> None:
        super().__init__()
        rows, columns = patches
        if mining not in MININGS:
            raise ValueError(f"mining must be one of {', '.join(MININGS)}, not {mining!r}")
        if min(features, queue_size, rows, columns) < 1:
            raise ValueError(f"features, queue_size, patches must be positive, not {features}, {queue_size}, {patches}")
        hard = max(rows * columns // 2, 1) if hard_patches is None else hard_patches
        if not 1 <= hard <= rows * columns:
            raise ValueError(f"hard_patches must be in 1..{rows * columns}, the number of patches, not {hard}")
        temperatures = {"temperature": temperature, "target_temperature": target_temperature}
        for name, value in (temperatures | {"patch_temperature": patch_temperature}).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        weights = {"consistency_weight": consistency_weight, "patch_weight": patch_weight, "point_weight": point_weight}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        shares = {"momentum": momentum, "least_visible": least_visible, "ramp[0]": ramp[0], "ramp[1]": ramp[1]}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, not {value}")
        self.network = network
        self.momentum, self.patches, self.ramp = momentum, (rows, columns), ramp
        self.temperatures, self.patch_temperature = temperatures, patch_temperature
        self.consistency_weight, self.patch_weight, self.point_weight = consistency_weight, patch_weight, point_weight
        self.symmetric, self.aligned, self.cross = symmetric, aligned, cross
        self.least_visible, self.mining = least_visible, mining
        self.kept_patches = hard if mining == "patches" else rows * columns
        queue = normalize(torch.randn(queue_size, features), dim=1)
        self.heads = ProjectionHeads(network.channels, features, patches=patch_weight > 0)
        self.momentum_backbone = copy.deepcopy(network.backbone).requires_grad_(False)
        self.momentum_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.register_buffer("queue", queue)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._generator = torch.Generator().manual_seed(seed)
        self._keys: Tensor | None = None  # of the step at hand

    def trained_parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the backbone and the heads."""
        return [{"params": self._online_parameters(), "weight_decay": weight_decay}]

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        """Pooled features p [N, C] of the backbone."""
        return self.network.pool(self.network.backbone(images))

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if len(batch.views) < 2:
            raise ValueError(f"batches must have 2 views of each picture, not {len(batch.views)}")
        first, second = batch.views[:2]
        ramp = self._ramp(progress)
        consistency_weight, patch_weight = ramp * self.consistency_weight, ramp * self.patch_weight
        features = self.network.backbone(first.images)  # the map [N, C, h, w]
        q = _unit(self.heads.whole, self.network.pool(features))
        k, _ = self._momentum_rows(second.images)
        self._keys = k
        o, v = None, None
        if consistency_weight or patch_weight:
            o, v = self._momentum_rows(batch.images, patches=patch_weight > 0)
        target = o if consistency_weight else None
        contrast, divergence = queue_contrast(q, k, self.queue, original=target, **self.temperatures)
        losses = {"contrast": contrast}
        if target is not None:
            consistency = divergence + self._distance(q, target)
            if self.symmetric:
                consistency = (consistency + self._consistency_of(second, k, target)) / 2
            losses["consistency"] = consistency_weight * consistency
        if v is not None:
            losses["patches"] = patch_weight * self._patch_loss(features, first, v)
        return losses

    def after_step(self, batch: Batch, progress: float) -> dict[str, float]:
        """The momentum encoder follows; the keys of the step join the queue."""
        assert self._keys is not None
        behind = [*self.momentum_backbone.parameters(), *self.momentum_heads.parameters()]
        momentum_update(behind, self._online_parameters(), self.momentum)
        enqueue(self.queue, self.pointer, of_all_ranks(self._keys))
        self._keys = None
        return {}

    def _online_parameters(self) -> list[nn.Parameter]:
        return [*self.network.backbone.parameters(), *self.heads.parameters()]

    def _ramp(self, progress: float) -> float:
        """r."""
        begin, length = self.ramp
        if progress < begin:
            return 0.0
        return min(1.0, (progress - begin) / length) if length else 1.0

    @torch.no_grad()
    def _momentum_rows(self, images: Tensor, *, patches: bool = False) -> tuple[Tensor, Tensor | None]:
        """Rows [N, d] of pictures by the momentum encoder, and [N, M, d] of their patches if asked for.

        Norms take the statistics of these pictures; several processes exchange them at random before.
        """
        rank, ranks = rank_and_ranks()
        own = slice(rank * len(images), (rank + 1) * len(images))
        order = torch.arange(0)
        if ranks > 1:
            order = torch.randperm(ranks * len(images), generator=self._generator).to(images.device)
            images = of_all_ranks(images)[order[own]]
        features = self.momentum_backbone(images)
        rows = [_unit(self.momentum_heads.whole, self.network.pool(features))]
        if patches:
            boxes = self._patch_boxes(images)
            weights, _ = cell_weights(boxes, _size(images), _size(features))
            rows.append(self._patch_rows(self.momentum_heads, features, weights))
        if ranks > 1:
            rows = [of_all_ranks(x)[order.argsort()[own]] for x in rows]
        return rows[0], rows[1] if patches else None

    def _distance(self, q: Tensor, o: Tensor) -> Tensor:
        """eta (2 - 2 <q, o>), mean over pictures."""
        return self.point_weight * (2 - 2 * (q * o).sum(1)).mean()

    def _consistency_of(self, view: View, k: Tensor, o: Tensor) -> Tensor:
        """L_cons of the second view."""
        q = _unit(self.heads.whole, self.network.pool(self.network.backbone(view.images)))
        return queue_contrast(q, k, self.queue, original=o, **self.temperatures)[1] + self._distance(q, o)

    def _patch_loss(self, features: Tensor, view: View, v: Tensor) -> Tensor:
        """L_int + L_crs of a view's map against patches v of the originals."""
        boxes = self._patch_boxes(view.images)
        boxes = boxes_in_view(boxes, view) if self.aligned else boxes.expand(len(features), -1, -1)
        weights, share = cell_weights(boxes, _size(view.images), _size(features))
        u = self._patch_rows(self.heads, features, weights)
        with torch.autocast(u.device.type, enabled=False):
            losses = intrinsic_losses(u, v, self.patch_temperature, doubled=self.mining == "negatives")
            if self.cross:
                losses = losses + cross_losses(u, v, self.patch_temperature)
        return hardest_mean(losses, share >= self.least_visible, self.kept_patches)

    def _patch_boxes(self, images: Tensor) -> Tensor:
        """Patches [M, 4] of originals."""
        return patch_boxes(*self.patches, *_size(images)).to(images.device)

    def _patch_rows(self, heads: ProjectionHeads, features: Tensor, weights: Tensor) -> Tensor:
        """Unit rows [N, M, d] of means of a map [N, C, h, w], weights [M or N, M, h w]."""
        assert heads.patch is not None
        return _unit(heads.patch, weights.to(features.dtype) @ features.flatten(2).mT)


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width of pictures or maps."""
    return images.shape[2], images.shape[3]
