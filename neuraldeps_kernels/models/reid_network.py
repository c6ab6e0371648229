"""The usual network of re-identification: backbone, pooling, BatchNorm neck, linear classifier.

    x [N, 3, H, W] -> map [N, C, h, w] -> pooled p [N, C] -> feature f = BN(p), its bias 0 -> logits z = W f [N, n]

The triplet loss takes p, the classifier and retrieval take f. Source: the usual strong baseline; GeM pooling is that of
"Fine-tuning CNN Image Retrieval with No Human Annotation", its exponent fixed.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuraldeps_kernels.data.logits import read_arrays
from neuraldeps_kernels.models.resnet import ResNet, load_imagenet

POOLINGS = ("mean", "gem")
GEM_EXPONENT, GEM_FLOOR = 3.0, 1e-6


class Outputs(NamedTuple):
    """What a ReidNetwork makes of N images."""

    map: Tensor  # F [N, C, h, w]
    pooled: Tensor  # p [N, C]
    feature: Tensor  # f [N, C]
    logits: Tensor  # z [N, n]


class ConvBlock(nn.Module):
    """relu(norm(conv(x))), 3 x 3: [N, C, H, W] to [N, C', H / stride, W / stride]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class SmallNetwork(nn.Module):
    """Four ConvBlocks, 3 -> w -> 2 w -> 4 w -> F channels, strides 1, 2, 2, 2: [N, 3, H, W] to [N, F, H / 8, W / 8]."""

    def __init__(self, width: int = 16, feature: int = 128) -> None:
        super().__init__()
        if width < 1 or feature < 1:
            raise ValueError(f"width and feature must be positive, not {width} and {feature}")
        self.channels = (width, 2 * width, 4 * width, feature)
        before = (3, *self.channels)
        self.stages = nn.ModuleList(
            ConvBlock(before[i], self.channels[i], stride) for i, stride in enumerate((1, 2, 2, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def small_network(width: int = 16, feature: int = 128) -> SmallNetwork:
    """For pictures of 64 x 32 pixels and studies on few cores."""
    return SmallNetwork(width, feature)


def resnet(depth: int = 50, *, width: int = 64, last_stride: int = 1, weights: str | Path | None = None) -> ResNet:
    """ResNet of models/resnet.py; `weights` is a file of torchvision's parameters for that depth, from ImageNet say.

    Raises ValueError where the file cannot be read or its parameters are not those of the network.
    """
    backbone = ResNet(depth, width=width, last_stride=last_stride)
    if weights is not None:
        try:
            load_imagenet(backbone, read_arrays(Path(weights)))
        except RuntimeError as error:  # shapes
            raise ValueError(f"{weights}: {shorten(str(error), 300)}") from error
    return backbone


class ReidNetwork(nn.Module):
    """See the head of the file.

    Args:
        backbone: [N, 3, H, W] to [N, C, h, w], C = channels[-1]; such as `small_network()` or `resnet(50)`.
        num_ids: n, identities trained on.
        pooling: "mean" over positions, or "gem": (mean of max(F, 1e-6)^3)^(1/3).

    Attributes:
        backbone, neck (BatchNorm1d), classifier (Linear without bias); num_ids, channels C.

    Raises:
        ValueError: num_ids is not positive, or the pooling unknown.
    """

    def __init__(self, backbone: nn.Module, num_ids: int, *, pooling: str = "mean") -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids must be positive, not {num_ids}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        self.num_ids, self.pooling = num_ids, pooling
        self.channels: int = backbone.channels[-1]  # type: ignore[assignment, index]
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(self.channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(self.channels, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def pool(self, x: Tensor) -> Tensor:
        """p [N, C] of a map [N, C, h, w]."""
        if self.pooling == "mean":
            return x.mean((2, 3))
        return x.float().clamp_min(GEM_FLOOR).pow(GEM_EXPONENT).mean((2, 3)).pow(1 / GEM_EXPONENT)

    def forward(self, x: Tensor) -> Outputs:
        features = self.backbone(x)
        pooled = self.pool(features)
        feature = self.neck(pooled)
        return Outputs(features, pooled, feature, self.classifier(feature))
