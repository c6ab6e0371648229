"""Batches for re-identification over several domains: P identities of each domain, K pictures of each identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class DomainBalancedSampler(Sampler[list[int]]):
    """Batch sampler: D domains x P identities x K pictures a batch.

    In an epoch every identity of the largest domain comes once (the last batch is filled up), those of smaller domains
    as often as that takes, always all of a domain before any comes again. Of an identity K random pictures are taken,
    without repetition where it has as many. The order follows from seed and epoch alone.

    Args:
        identities: int64 [N] of the pictures; the same number in two domains means two identities.
        domains: int64 [N].
        identities_per_domain: P.
        pictures_per_identity: K.
        seed: of the order.
        rank, world: this process and the number of them; each takes every `world`-th batch, all of them equally many.

    Raises:
        ValueError: sizes do not fit, or a domain has fewer than P identities.

    Source: inspired by GDNorm (arXiv 2203.01723).
    """

    def __init__(
        self,
        identities: Tensor | Sequence[int],
        domains: Tensor | Sequence[int],
        *,
        identities_per_domain: int = 4,
        pictures_per_identity: int = 4,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        labels, groups = torch.as_tensor(identities), torch.as_tensor(domains)
        if labels.dim() != 1 or labels.shape != groups.shape or not len(labels):
            raise ValueError(
                f"identities and domains must be [N] with N > 0, not {list(labels.shape)} and {list(groups.shape)}"
            )
        if identities_per_domain < 1 or pictures_per_identity < 1 or not 0 <= rank < world:
            raise ValueError(
                f"identities_per_domain, pictures_per_identity must be positive and rank in 0..world-1, not "
                f"{identities_per_domain}, {pictures_per_identity}, {rank} of {world}"
            )
        self.P, self.K = identities_per_domain, pictures_per_identity
        self.seed, self.epoch, self.rank, self.world = seed, 0, rank, world
        self._pictures: list[list[Tensor]] = []  # by domain and identity
        for domain in groups.unique().tolist():
            inside = (groups == domain).nonzero()[:, 0]
            order = labels[inside].argsort(stable=True)
            sizes = labels[inside].unique(return_counts=True)[1].tolist()
            self._pictures.append(list(inside[order].split(sizes)))
            if len(sizes) < self.P:
                raise ValueError(f"domain {domain} must have at least {self.P} identities, not {len(sizes)}")
        batches = max(-(-len(pictures) // self.P) for pictures in self._pictures)
        self._batches = -(-batches // world) * world

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return self._batches // self.world

    def set_epoch(self, epoch: int) -> None:
        """Another order; call it before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        seed = 1_000_003 * self.seed + 1009 * self.epoch
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(self._pictures) + 1)]
        identities = [self._identities(len(p), g) for p, g in zip(self._pictures, generators[1:], strict=True)]
        for number in range(self._batches):
            batch = [
                picture
                for pictures, order in zip(self._pictures, identities, strict=True)
                for identity in order[number * self.P : (number + 1) * self.P]
                for picture in self._some(pictures[identity], generators[0])
            ]
            if number % self.world == self.rank:
                yield batch

    def _identities(self, count: int, generator: torch.Generator) -> list[int]:
        """Identities of a domain in the order of the epoch, P for each batch, none twice in a batch."""
        order: list[int] = []
        while len(order) < self._batches * self.P:
            used = len(order) % self.P  # of the batch at hand, by the round before
            taken = set(order[len(order) - used :])
            shuffled = torch.randperm(count, generator=generator).tolist()
            first = [identity for identity in shuffled if identity not in taken][: self.P - used] if used else []
            order += first + [identity for identity in shuffled if identity not in first]
        return order

    def _some(self, pictures: Tensor, generator: torch.Generator) -> list[int]:
        """K pictures of an identity."""
        order = torch.randperm(len(pictures), generator=generator)
        if len(pictures) < self.K:
            order = torch.cat([order, torch.randint(len(pictures), (self.K - len(pictures),), generator=generator)])
        return pictures[order[: self.K]].tolist()
