"""SSKD on rendered pedestrians: what a teacher and unlabelled pictures bring in domains not seen before.

Three domains of 60 people train a wide teacher and a narrow student by labels. Then the student goes on: with labels
alone (the control of equal steps, which the others are compared with), or with the teacher as well. Unlabelled are
1,800 pictures of 600 other people by 60 cameras. Metrics are means over two further domains of 80 people each.

`steps` are those of the student in each of the two stages; the teacher takes TEACHER_STEPS.
"""

from __future__ import annotations

import copy
import functools
import statistics
from typing import Any

import torch

from neuraldeps_kernels.data.batches import Augmentation, Batches, IdentitySampler, UniformSampler
from neuraldeps_kernels.data.pedestrian_splits import PedestrianSplit, generalization_split
from neuraldeps_kernels.models.reid_network import ReidNetwork, small_network
from neuraldeps_kernels.models.sskd import SSKD
from neuraldeps_kernels.models.training import evaluate, train

WIDTH, TEACHER_WIDTH, FEATURE = 8, 24, 128
TEACHER_STEPS = 350
LOSSES = {"scale": 16.0, "margin": 0.25, "labelled_temperature": 4.0, "unlabelled_temperature": 2.0}
TRAINING = {"lr": 5e-3, "schedule": "one-cycle"}
# Options of the second stage, None: without a teacher; no second stage for the student of the first.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "control": None,
    "stage-1 student": None,
    "labelled KD": {"unlabelled_weight": 0.0},
    "SSKD": {},
    "unlabelled by the main classifier": {"unlabelled_classifier": "main"},
}


def run(variant: str, seed: int, steps: int = 200) -> dict[str, float]:
    """Metrics of a variant, means over the domains tested on."""
    split = _split(seed)
    student = trained_student(variant, seed, steps)
    found = [
        [evaluate(student, query, gallery, rerank=rerank) for query, gallery in split.targets()]
        for rerank in (False, True)
    ]
    return {
        "mAP": statistics.fmean(m.map for m in found[0]),
        "rank-1": statistics.fmean(m.rank(1) for m in found[0]),
        "mINP": statistics.fmean(m.minp for m in found[0]),
        "re-ranked mAP": statistics.fmean(m.map for m in found[1]),
    }


def trained_student(variant: str, seed: int, steps: int) -> SSKD:
    first = by_labels(WIDTH, seed, steps)
    if variant == "stage-1 student":
        return first
    split, options = _split(seed), VARIANTS[variant]
    teacher = None if options is None else copy.deepcopy(by_labels(TEACHER_WIDTH, seed, TEACHER_STEPS).network)
    torch.manual_seed(1000 + seed)
    student = SSKD(_network(WIDTH, split), teacher, **LOSSES, **(options or {}))
    student.network.load_state_dict(first.network.state_dict())
    train(student, batches(split, seed, teacher is not None), steps=steps, **TRAINING)
    return student


@functools.lru_cache(2)
def by_labels(width: int, seed: int, steps: int) -> SSKD:
    """A network after the first stage. Students and teacher of a seed are kept for its variants."""
    split = _split(seed)
    torch.manual_seed(2000 * width + seed)
    method = SSKD(_network(width, split), **LOSSES)
    train(method, batches(split, seed + 500, False), steps=steps, **TRAINING)
    return method


def batches(split: PedestrianSplit, seed: int, unlabelled: bool) -> Batches:
    """64 labelled pictures and 48 unlabelled ones."""
    augmentation, stream = Augmentation(pad=4), None
    if unlabelled:
        assert split.unlabelled is not None
        sampler = UniformSampler(len(split.unlabelled), size=48, seed=seed)
        stream = Batches(split.unlabelled, sampler, augmentation, seed=seed + 1)
    people = IdentitySampler(split.train.ids, identities=16, pictures=4, seed=seed)
    return Batches(split.train, people, augmentation, unlabelled=stream, seed=seed)


def _network(width: int, split: PedestrianSplit) -> ReidNetwork:
    return ReidNetwork(small_network(width, FEATURE), len(split.train.ids.unique()))


@functools.lru_cache(1)
def _split(seed: int) -> PedestrianSplit:
    return generalization_split(seed)
