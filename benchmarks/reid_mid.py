"""Variants of MID for benchmarks/reid_studies.py: infrared queries, visible gallery, rendered pedestrians.

    base                 cross-entropy and triplet loss of both modalities, a shared network
    global mixup         and of pairs mixed by one ratio, even in 0..1 (Beta(1, 1))
    random regions       by a ratio of each of six stripes
    agent                by ratios of the agent, one choice (bandit), rewards normalised by batch
    constant ratio 0.1   by that ratio of light everywhere: what the agent has to be held against
    decomposition        bases and norms by modality in the first two convolutions, random ratios of stripes
    decomposition, agent the same with the agent

Mixed pictures of the last two take both ways, and the embeddings are averaged. All variants of a seed see the same
people, pictures and batches and start from the same random numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from neuraldeps_kernels.data.batches import Augmentation, Batches, IdentitySampler
from neuraldeps_kernels.data.pedestrian_splits import PedestrianSplit, cross_modality_split
from neuraldeps_kernels.models.mid import MID
from neuraldeps_kernels.models.reid_network import ReidNetwork, small_network
from neuraldeps_kernels.models.training import History, embedded, ranked, train

STEPS = 200
LEARNING_RATE = 5e-3
AUGMENTATION = Augmentation(pad=4)
_SHARED: dict[str, Any] = {"decomposed": False, "modality_norm": False}
_AVERAGED: dict[str, Any] = {"mixed_path": "average"}
# Utilities grow with training: not normalised, they make the agent believe in whatever ratio it takes late.
_AGENT: dict[str, Any] = {"mixing": "agent", "normalized_reward": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"mixing": "none", **_SHARED},
    "global mixup": {"mixing": "global", **_SHARED},
    "random regions": {"mixing": "random", **_SHARED},
    "agent": {**_AGENT, **_SHARED},
    "constant ratio 0.1": {"mixing": "constant", "constant_ratio": 0.1, **_SHARED},
    "decomposition": {"mixing": "random", **_AVERAGED},
    "decomposition, agent": {**_AGENT, **_AVERAGED},
}


def trained(
    variant: str, seed: int, steps: int, *, train_ids: int = 200, test_ids: int = 60
) -> tuple[MID, History, PedestrianSplit]:
    """The method after training, what was logged, and the people."""
    split = cross_modality_split(seed, train_ids=train_ids, test_ids=test_ids)
    sampler = IdentitySampler(
        split.train.ids, identities=8, pictures=4, infrared=split.train.infrared, infrared_pictures=4, seed=seed
    )
    torch.manual_seed(seed)
    method = MID(ReidNetwork(small_network(), train_ids), state_stage=2, seed=seed, **VARIANTS[variant])
    batches = Batches(split.train, sampler, AUGMENTATION, seed=seed)
    history = train(
        method, batches, steps=steps, lr=LEARNING_RATE, schedule="one-cycle", description=f"{variant}, seed {seed}"
    )
    return method, history, split


def run(variant: str, seed: int, steps: int = STEPS, **people: int) -> dict[str, float]:
    """mAP, rank-1, mINP and re-ranked mAP of one training; `people` as `trained`."""
    method, _, split = trained(variant, seed, steps, **people)
    query, gallery = (embedded(method, part, augmentation=AUGMENTATION) for part in (split.query, split.gallery))
    metrics, again = (
        ranked(query, gallery, split.query, split.gallery, rerank=rerank, camera_rule="none")
        for rerank in (False, True)
    )
    return {"mAP": metrics.map, "rank-1": metrics.rank1, "mINP": metrics.minp, "re-ranked mAP": again.map}
