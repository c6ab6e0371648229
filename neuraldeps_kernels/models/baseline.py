"""The strong baseline of re-identification as a Method: identities by cross-entropy, distances by triplets.

    L = cross-entropy(z, y), labels smoothed by 0.1  +  batch-hard triplet(p, y), margin 0.3

Every other method is compared with it. Source: the usual strong baseline.
"""

from __future__ import annotations

from torch import Tensor

from neuraldeps_kernels.data.batches import Batch
from neuraldeps_kernels.models.reid_network import ReidNetwork
from neuraldeps_kernels.models.reid_training import (
    LABEL_SMOOTHING,
    MARGIN,
    batch_hard_triplet_losses,
    identity_losses,
)
from neuraldeps_kernels.models.training import Method


class Baseline(Method):
    """See the head of the file. Labels of batches are 0 .. network.num_ids - 1."""

    def __init__(self, network: ReidNetwork, *, smoothing: float = LABEL_SMOOTHING, margin: float = MARGIN) -> None:
        super().__init__()
        self.network, self.smoothing, self.margin = network, smoothing, margin

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        _, pooled, _, logits = self.network(batch.images)
        return {
            "identity": identity_losses(logits, batch.ids, smoothing=self.smoothing).mean(),
            "triplet": batch_hard_triplet_losses(pooled, batch.ids, margin=self.margin).mean(),
        }

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        return self.network(images).feature  # type: ignore[no-any-return]
