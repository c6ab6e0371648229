"""UP-ReID on rendered pedestrians: what pre-training without labels brings to fine-tuning with few.

3,000 pictures of 1,500 people by 60 cameras, two of each, are pre-trained on without labels; then the baseline is
fine-tuned with 6 people, once by each of four cameras, and finds 80 others. Beside it stand "mAP of 20 people", the
same with 20 labelled people, and "zero-shot mAP", that of features as they are after pre-training.

Variants differ in the pre-training alone; the first has none. `steps` are those of the pre-training.
"""

from __future__ import annotations

from typing import Any

import torch

from neuraldeps_kernels.data.batches import Augmentation, Batches, IdentitySampler, UniformSampler
from neuraldeps_kernels.data.pedestrian_splits import PedestrianSplit, pretraining_split
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages
from neuraldeps_kernels.models.baseline import Baseline
from neuraldeps_kernels.models.reid_network import ReidNetwork, small_network
from neuraldeps_kernels.models.training import Method, evaluate, train
from neuraldeps_kernels.models.up_reid import UPReID

VIEWS = Augmentation(crop=(0.45, 1.0), grey=0.2, erase=0.5, erase_area=(0.02, 0.3))
PRETRAINING = {"features": 64, "queue_size": 1024, "momentum": 0.99}
TRAINING: dict[str, Any] = {"lr": 5e-3, "schedule": "one-cycle"}
TUNING_STEPS, FEW, MANY = 100, 6, 20
VARIANTS: dict[str, dict[str, Any] | None] = {
    "random init": None,
    "MoCo": {"consistency_weight": 0.0, "patch_weight": 0.0},
    "+ consistency": {"patch_weight": 0.0},
    "+ intrinsic": {"consistency_weight": 0.0},
    "+ both": {},
    "+ both, no mining": {"mining": "none"},
}


def run(variant: str, seed: int, steps: int = 150, **people: int) -> dict[str, float]:
    """Metrics of a variant; `people` are options of pretraining_split."""
    options, split = VARIANTS[variant], pretraining_split(seed, **{"train_ids": MANY, **people})
    assert split.unlabelled is not None
    torch.manual_seed(seed)
    pretrained = UPReID(_network(1), **PRETRAINING, **(options or {}))
    if options is not None:
        sampler = UniformSampler(len(split.unlabelled), size=64, seed=seed)
        batches = Batches(split.unlabelled, sampler, VIEWS, views=2, seed=seed)
        train(pretrained, batches, steps=steps, **TRAINING)
    backbone = pretrained.network.backbone
    few, many = (_fine_tuned(backbone, part, seed) for part in (_first_people(split.train), split.train))
    metrics, reranked = (_metrics(few, split, rerank=rerank) for rerank in (False, True))
    return {
        "mAP": metrics.map,
        "rank-1": metrics.rank(1),
        "mINP": metrics.minp,
        "re-ranked mAP": reranked.map,
        f"mAP of {MANY} people": _metrics(many, split).map,
        "zero-shot mAP": _metrics(pretrained, split).map,
    }


def _network(num_ids: int) -> ReidNetwork:
    """With channels last, which makes its convolutions faster on the CPU."""
    return ReidNetwork(small_network().to(memory_format=torch.channels_last), num_ids)


def _first_people(people: PedestrianImages) -> PedestrianImages:
    return people[torch.isin(people.ids, people.ids.unique()[:FEW])]


def _fine_tuned(backbone: torch.nn.Module, people: PedestrianImages, seed: int) -> Baseline:
    """The baseline, from a backbone as it is."""
    num_ids = len(people.ids.unique())
    torch.manual_seed(seed)
    method = Baseline(_network(num_ids))
    method.network.backbone.load_state_dict(backbone.state_dict())
    sampler = IdentitySampler(people.ids, identities=min(12, num_ids), pictures=4, seed=seed)
    batches = Batches(people, sampler, Augmentation(pad=4), seed=seed)
    train(method, batches, steps=TUNING_STEPS, **TRAINING)
    return method


def _metrics(method: Method, split: PedestrianSplit, *, rerank: bool = False) -> Any:
    return evaluate(method, split.query, split.gallery, rerank=rerank)
