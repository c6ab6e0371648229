"""Rendered data sets for training and testing: who and what is in them, by a seed. No person is in two parts.

    retrieval_split         people of some cameras, found by the same cameras
    occlusion_split         the same with occluders: some in training, all queries, few in the gallery
    cross_modality_split    people by light and in infrared; infrared queries, visible gallery
    pretraining_split       unlabelled people of many cameras, few labelled ones, tests by the cameras of these
    generalization_split    labelled domains, unlabelled people of many cameras, tests in domains not seen before

Default sizes are those of the studies in benchmarks/reid_*.py, strengths of styles as well; all are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians

_TRAIN, _QUERY, _GALLERY, _OTHER = range(4)  # what seeds of pictures are for
_STRENGTH, _WIDE_STRENGTH = 0.6, 0.8
_FAR_CAMERAS = 1000  # cameras from here on belong to unlabelled pictures


@dataclass(frozen=True, eq=False)
class PedestrianSplit:
    """Parts of a rendered data set."""

    train: PedestrianImages
    query: PedestrianImages
    gallery: PedestrianImages
    unlabelled: PedestrianImages | None = None  # its ids are not for learning

    def targets(self) -> list[tuple[PedestrianImages, PedestrianImages]]:
        """Query and gallery of each domain that is tested on, to be judged apart."""
        return [
            (self.query[self.query.domains == domain], self.gallery[self.gallery.domains == domain])
            for domain in self.query.domains.unique()
        ]


def retrieval_split(
    seed: int = 0,
    *,
    train_ids: int = 200,
    test_ids: int = 80,
    num_cameras: int = 4,
    occlusion: tuple[float, float, float] = (0.0, 0.0, 0.0),
    height: int = 64,
    width: int = 32,
) -> PedestrianSplit:
    """Each person once by every camera in training and gallery, as queries by the first two cameras.

    Args:
        occlusion: probabilities of an occluder in training, query and gallery.

    Raises:
        ValueError: as `pedestrians`; `num_cameras` is below 2.
    """
    if num_cameras < 2:
        raise ValueError(f"num_cameras must be 2 or more, for positives of another camera, not {num_cameras}")
    of = _Source(seed, height, width)
    return PedestrianSplit(
        of(_TRAIN, 0, train_ids, num_cameras=num_cameras, occlusion=occlusion[0]),
        of(_QUERY, train_ids, test_ids, num_cameras=2, occlusion=occlusion[1]),
        of(_GALLERY, train_ids, test_ids, num_cameras=num_cameras, occlusion=occlusion[2]),
    )


def occlusion_split(
    seed: int = 0, *, train_ids: int = 200, test_ids: int = 80, height: int = 64, width: int = 32
) -> PedestrianSplit:
    """`retrieval_split` with occluders in 40 % of the training pictures, all queries and 10 % of the gallery."""
    return retrieval_split(
        seed, train_ids=train_ids, test_ids=test_ids, occlusion=(0.4, 1.0, 0.1), height=height, width=width
    )


def cross_modality_split(
    seed: int = 0, *, train_ids: int = 200, test_ids: int = 60, height: int = 64, width: int = 32
) -> PedestrianSplit:
    """Each person once by cameras 0 to 3, which see light, and twice by the infrared cameras 4 and 5.

    Queries are infrared, the gallery is visible. Raises as `pedestrians`.
    """
    of = _Source(seed, height, width)
    infrared = {"first_camera": 4, "num_cameras": 2, "images_per_camera": 2, "infrared": True}
    train = [of(_TRAIN, 0, train_ids), of(_TRAIN, 0, train_ids, **infrared)]
    return PedestrianSplit(
        PedestrianImages.concatenate(train),
        of(_QUERY, train_ids, test_ids, **infrared),
        of(_GALLERY, train_ids, test_ids),
    )


def pretraining_split(
    seed: int = 0,
    *,
    train_ids: int = 20,
    test_ids: int = 80,
    unlabelled_cameras: int = 60,
    unlabelled_ids: int = 25,
    height: int = 64,
    width: int = 32,
) -> PedestrianSplit:
    """Unlabelled: `unlabelled_cameras`, each with two pictures of `unlabelled_ids` people of its own.

    Labelled: each person once by cameras 0 to 3. Queries: once by cameras 0 and 1; gallery: twice by cameras 2 and 3.
    Raises as `pedestrians`.
    """
    of = _Source(seed, height, width)
    people = train_ids + test_ids
    return PedestrianSplit(
        of(_TRAIN, 0, train_ids),
        of(_QUERY, train_ids, test_ids, num_cameras=2),
        of(_GALLERY, train_ids, test_ids, first_camera=2, num_cameras=2, images_per_camera=2),
        of.street(people, unlabelled_cameras, unlabelled_ids, images_per_camera=2, domain=1),
    )


def generalization_split(
    seed: int = 0,
    *,
    source_domains: int = 3,
    train_ids: int = 60,
    target_domains: int = 2,
    test_ids: int = 80,
    unlabelled_cameras: int = 60,
    unlabelled_ids: int = 10,
    height: int = 64,
    width: int = 32,
) -> PedestrianSplit:
    """People and cameras of several domains, numbered: sources, then targets, then the unlabelled pictures.

    A source has `train_ids` people, twice by each of two cameras. A target has `test_ids` people, once by two query
    cameras and twice by two others of the gallery; its styles are wider. Unlabelled: `unlabelled_cameras` of wide
    style, each with three pictures of `unlabelled_ids` people of its own, 10 % with an occluder.

    Raises:
        ValueError: as `pedestrians`; there is no source or no target.
    """
    if min(source_domains, target_domains) < 1:
        raise ValueError(f"domains must be 1 or more, not {source_domains} sources and {target_domains} targets")
    of = _Source(seed, height, width)
    train = [
        of(_TRAIN, d * train_ids, train_ids, first_camera=2 * d, num_cameras=2, images_per_camera=2, domain=d)
        for d in range(source_domains)
    ]
    query, gallery = [], []
    for target in range(target_domains):
        first_id = source_domains * train_ids + target * test_ids
        camera = 2 * source_domains + 4 * target
        wide = {"num_cameras": 2, "style_strength": _WIDE_STRENGTH, "domain": source_domains + target}
        query.append(of(_QUERY, first_id, test_ids, first_camera=camera, **wide))
        gallery.append(of(_GALLERY, first_id, test_ids, first_camera=camera + 2, images_per_camera=2, **wide))
    people = source_domains * train_ids + target_domains * test_ids
    strange = {"style_strength": _WIDE_STRENGTH, "occlusion": 0.1, "domain": source_domains + target_domains}
    return PedestrianSplit(
        PedestrianImages.concatenate(train),
        PedestrianImages.concatenate(query),
        PedestrianImages.concatenate(gallery),
        of.street(people, unlabelled_cameras, unlabelled_ids, images_per_camera=3, **strange),
    )


class _Source:
    """Pictures of one size by one seed, which also decides people and styles."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self._common = {"identity_seed": seed, "style_seed": seed, "height": height, "width": width}
        self._seed = seed

    def __call__(self, part: int, first_id: int, num_ids: int, **options: Any) -> PedestrianImages:
        options = {"style_strength": _STRENGTH, **self._common, **options}
        return pedestrians(num_ids, first_id=first_id, seed=4 * self._seed + part, **options)

    def street(self, first_id: int, num_cameras: int, num_ids: int, **options: Any) -> PedestrianImages:
        """Cameras that share nobody, with `num_ids` people each."""
        if num_cameras < 1:
            raise ValueError(f"unlabelled_cameras must be 1 or more, not {num_cameras}")
        return PedestrianImages.concatenate(
            [
                self(
                    _OTHER,
                    first_id + camera * num_ids,
                    num_ids,
                    first_camera=_FAR_CAMERAS + camera,
                    num_cameras=1,
                    **options,
                )
                for camera in range(num_cameras)
            ]
        )
