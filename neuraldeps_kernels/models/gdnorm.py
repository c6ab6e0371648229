"""Reference model inspired by GDNorm: BatchNorm of each source domain as a path of a Gaussian process.

"Debiased Batch Normalization via Gaussian Process for Generalizable Person Re-Identification" (AAAI 2022, arXiv
2203.01723). Of the paper only the abstract could be read: the process, its use in training and all numbers are the
reconstruction of ours.

One training step, lam being 0 in the first epochs until the statistics have settled:

    source, *on_paths = forward_with_paths(model, images, domain, path_coefficients(D))
    loss(source) + lam mean of loss(on_paths)

or, with the Gaussian process as regression over a coordinate of the domains (`DomainCoordinates` of their features),

    z = coordinates()
    paths = regression_coefficients(z, sample_coordinates(z))
    source, *on_paths = forward_with_paths(model, images, domain, *paths)

The first pass normalises every domain by itself, the others take the same images through imaginary domains, whose
parameters are random combinations of those of the sources and pass their gradient on to them. Unseen domains get the
mean path: one plain BatchNorm, folded into the convolutions by `GDNorm.exported`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from neuraldeps_kernels.models.reid_training import batch_hard_triplet_losses, identity_losses, mean_over_domains
from neuraldeps_kernels.models.resnet import ResNet, folded
from neuraldeps_kernels.nn.domain_norm import domain_context
from neuraldeps_kernels.nn.gaussian_process_norm import (
    GaussianProcessBatchNorm1d,
    GaussianProcessBatchNorm2d,
    batch_norm_paths,
    path_context,
)

SETTLING_EPOCHS = 5


def forward_with_paths(
    network: nn.Module,
    images: Tensor,
    domain: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> list[Any]:
    """Outputs of a network for its source domains and, after them, for the same images on each of S paths.

    Args:
        network: with GaussianProcessBatchNorm layers (`convert_domain_batch_norm(model, D, kind="gaussian_process")`).
        images: [N, ...].
        domain: int64 [N].
        coefficients: [S, D], drawn anew each step; S = 0 for the source domains alone.
        noise, generator: as in `batch_norm_paths`.
    """
    with domain_context(domain):
        outputs = [network(images)]
    if len(coefficients):
        paths = batch_norm_paths(network, coefficients, noise, generator=generator)
        for s in range(len(coefficients)):
            with path_context(paths, torch.full_like(domain, s)):
                outputs.append(network(images))
    return outputs


def combined_loss(losses: Sequence[Tensor], lam: float = 1.0) -> Tensor:
    """loss of the sources + lam times the mean of those of the paths, from [source, path 1, .., path S]."""
    source, *on_paths = losses
    return source + lam * torch.stack(on_paths).mean() if on_paths else source


def path_weight(epoch: int, lam: float = 1.0, settling: int = SETTLING_EPOCHS) -> float:
    """lam of an epoch: 0 in the first `settling` ones."""
    return lam if epoch >= settling else 0.0


class GDNorm(nn.Module):
    """ResNet, global mean, BatchNorm neck and linear classifier; every BatchNorm is one of a Gaussian process.

    Args:
        num_identities: of all source domains together.
        num_domains: D.
        depth, width, last_stride: as models.resnet.ResNet. `load_imagenet(model.backbone, state_dict)` loads weights.
        var_space, pooled_variance: as GaussianProcessBatchNorm2d.

    forward(images, domain=None, coefficients=None, noise=None, generator=None):
        training: (u [N, F] before the neck, logits [N, identities]); with coefficients [S, D] a list of 1 + S such
            pairs, of the sources and of the paths (one call, as DistributedDataParallel wants it).
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
        var_space: str = "log",
        pooled_variance: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"var_space": var_space, "pooled_variance": pooled_variance}
        self.num_domains = num_domains
        self.backbone = ResNet(
            depth,
            width=width,
            last_stride=last_stride,
            norm=lambda channels: GaussianProcessBatchNorm2d(channels, num_domains, **options),
        )
        channels = self.backbone.channels[-1]
        self.neck = GaussianProcessBatchNorm1d(channels, num_domains, **options)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(channels, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(
        self,
        images: Tensor,
        domain: Tensor | int | None = None,
        coefficients: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        if coefficients is not None:
            if not isinstance(domain, Tensor):
                raise ValueError(f"domain must be int64 [N] where coefficients are given, not {domain}")
            return forward_with_paths(self, images, domain, coefficients, noise, generator=generator)
        if domain is None:
            return self._outputs(images)
        with domain_context(domain):
            return self._outputs(images)

    def _outputs(self, images: Tensor) -> Any:
        pooled = self.backbone(images).mean((2, 3))
        features = self.neck(pooled)
        if not self.training:
            return normalize(features.float(), dim=1)
        return pooled, self.classifier(features)

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor, domain: Tensor) -> Tensor:
        """Mean over domains of cross-entropy and triplet loss, of the outputs of one pass."""
        pooled, logits = outputs
        losses = identity_losses(logits, labels) + batch_hard_triplet_losses(pooled, labels, domain)
        return mean_over_domains(losses, domain, self.num_domains)

    def exported(self, domain: int = -1) -> nn.Module:
        """The network for retrieval without norms in its backbone: plain modules, images to features of length 1."""
        neck = self.neck.plain(domain)
        return FeatureNetwork(folded(self.backbone, domain), neck).eval()


class FeatureNetwork(nn.Module):
    """Images [N, 3, H, W] to features [N, F] of length 1: backbone, global mean, neck."""

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.neck(self.backbone(images).mean((2, 3))), dim=1)
