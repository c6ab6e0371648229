"""Batches of re-identification: who is in them, where views come from, that they follow from seed and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from neuraldeps_kernels.data import batches as b
from neuraldeps_kernels.data.batches import Augmentation, Batches, FolderImages, IdentitySampler, UniformSampler
from neuraldeps_kernels.data.pedestrian_splits import cross_modality_split, retrieval_split
from neuraldeps_kernels.data.reid_folders import ReidSplit, read_market1501
from neuraldeps_kernels.data.reid_writers import JOINTS, write_market1501

PEOPLE = retrieval_split(3, train_ids=7, test_ids=4, height=32, width=16).train
PLAIN = Augmentation(flip=0.0)


def same(a: Any, b: Any) -> bool:
    """Two batches hold the same bits."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b is None or all(same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


# ------------------------------------------------------------------------------------------------ samplers


@settings(deadline=None, max_examples=40)
@given(people=st.integers(3, 9), pictures=st.integers(1, 5), wanted=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_identity_comes_once_an_epoch(people: int, pictures: int, wanted: int, seed: int) -> None:
    ids = torch.arange(people).repeat_interleave(3) * 5 + 2
    sampler = IdentitySampler(ids, identities=wanted, pictures=pictures, seed=seed)
    epoch = [sampler[step][0] for step in range(len(sampler))]
    assert len(sampler) == -(-people // wanted)
    shown = torch.cat([ids[rows][:, 0] for rows in epoch])
    assert set(shown.tolist()) == set(ids.tolist())
    for rows in epoch:
        assert rows.shape == (wanted, pictures)
        assert bool((ids[rows] == ids[rows][:, :1]).all())
        assert len(ids[rows][:, 0].unique()) == wanted
        assert all(len(set(row)) == min(3, pictures) for row in rows.tolist())


def test_modalities_come_in_pairs_of_one_identity() -> None:
    pictures = cross_modality_split(0, train_ids=6, test_ids=2, height=16, width=8).train
    sampler = IdentitySampler(
        pictures.ids, identities=3, pictures=4, infrared=pictures.infrared, infrared_pictures=2, seed=4
    )
    for step in range(5):
        visible, dark = sampler[step]
        assert visible.shape == (3, 4)
        assert dark.shape == (3, 2)
        assert not pictures.infrared[visible].any()
        assert pictures.infrared[dark].all()
        assert torch.equal(pictures.ids[visible][:, 0], pictures.ids[dark][:, 0])
    batch = Batches(pictures, sampler, PLAIN)[0]
    assert batch.infrared.tolist() == [False] * 12 + [True] * 6
    assert torch.equal(batch.ids[:12].view(3, 4)[:, 0], batch.ids[12:].view(3, 2)[:, 0])


def test_any_step_can_be_asked_for_in_any_order() -> None:
    for sampler in (IdentitySampler(PEOPLE.ids, identities=3, pictures=2), UniformSampler(len(PEOPLE), size=5)):
        forward = [sampler[step][0] for step in range(12)]
        again = {step: sampler[step][0] for step in (7, 0, 11, 3)}
        assert all(torch.equal(forward[step], rows) for step, rows in again.items())
        assert not all(torch.equal(forward[step], forward[step + len(sampler)]) for step in range(3))


def test_uniform_sampler_takes_each_picture_once() -> None:
    sampler = UniformSampler(11, size=3, seed=2)
    epoch = torch.cat([sampler[step][0] for step in range(len(sampler))])
    assert len(sampler) == 3
    assert len(epoch.unique()) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities": 8}, "a batch of 8 identities needs as many, but the pictures show 7"),
        ({"identities": 0}, "identities and pictures must be positive"),
        ({"identities": 2, "infrared_pictures": 2}, "identity 0 has no infrared picture, but batches take 2"),
    ],
)
def test_impossible_batches_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdentitySampler(PEOPLE.ids, infrared=PEOPLE.infrared, **options)
    with pytest.raises(ValueError, match=r"size of a batch must be in 1\.\.4, the number of pictures, not 5"):
        UniformSampler(4, size=5)


# ------------------------------------------------------------------------------------------------ augmentation


def reference_view(image: Tensor, box: Tensor, flipped: bool) -> Tensor:
    """The box of image [3, H, W] by bilinear interpolation, pixel by pixel; 0 beyond."""
    _, H, W = image.shape
    padded = torch.nn.functional.pad(image.double(), (1, 1, 1, 1))
    result = torch.empty(3, H, W, dtype=torch.float64)
    x0, y0, x1, y1 = box.double().tolist()
    for row in range(H):
        for column in range(W):
            part = (W - 1 - column if flipped else column) + 0.5
            x = min(max(x0 + part / W * (x1 - x0) - 0.5, -1), W)
            y = min(max(y0 + (row + 0.5) / H * (y1 - y0) - 0.5, -1), H)
            left, top = min(int(np.floor(x)), W - 1), min(int(np.floor(y)), H - 1)
            wx, wy = x - left, y - top
            square = padded[:, top + 1 : top + 3, left + 1 : left + 3]
            weights = torch.tensor([[(1 - wy) * (1 - wx), (1 - wy) * wx], [wy * (1 - wx), wy * wx]])
            result[:, row, column] = (square * weights).sum((1, 2))
    return result


def test_views_are_their_boxes() -> None:
    augmentation = Augmentation(flip=0.5, pad=3, crop=(0.3, 1.0))
    pixels = PEOPLE.images[:6]
    view, _ = augmentation(pixels, None, torch.Generator().manual_seed(5))
    original = augmentation.original(pixels)
    assert 0 < int(view.flipped.sum()) < 6
    for n in range(6):
        wanted = reference_view(original[n], view.boxes[n], bool(view.flipped[n]))
        torch.testing.assert_close(view.images[n].double(), wanted, atol=1e-4, rtol=0)


def test_a_view_of_everything_is_the_picture() -> None:
    view, joints = PLAIN(PEOPLE.images, PEOPLE.joints, torch.Generator())
    torch.testing.assert_close(view.images, PLAIN.original(PEOPLE.images), atol=1e-5, rtol=0)
    assert torch.equal(view.boxes, torch.tensor([0.0, 0.0, 16.0, 32.0]).expand(len(PEOPLE), 4))
    assert joints is not None
    torch.testing.assert_close(joints, PEOPLE.joints)


def test_normalisation() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 4, 2, 3)
    image = Augmentation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0)).original(pixels)
    torch.testing.assert_close(image[0, :, 0, 0], torch.tensor([-1.0, 2.0, -0.3]))


def test_joints_move_with_the_picture() -> None:
    """A white pixel stays under the joint that marks it; left and right change places in the mirror."""
    N, H, W = 40, 32, 16
    generator = torch.Generator().manual_seed(0)
    place = torch.stack([torch.randint(3, W - 3, (N,), generator=generator), torch.randint(4, H - 4, (N,))], 1)
    pixels = torch.zeros(N, H, W, 3, dtype=torch.uint8)
    pixels[torch.arange(N), place[:, 1], place[:, 0]] = 255
    joints = torch.full((N, 17, 3), -5.0)
    joints[:, 9] = torch.cat([place + 0.5, torch.ones(N, 1)], 1)  # left wrist; the right one is 10
    augmentation = Augmentation(flip=0.5, pad=4, mean=(0, 0, 0), std=(1, 1, 1))
    view, moved = augmentation(pixels, joints, generator)
    assert moved is not None
    index = torch.where(view.flipped, 10, 9)
    x, y, visible = moved[torch.arange(N), index].unbind(1)
    inside = (x > 0) & (x < W) & (y > 0) & (y < H)
    assert torch.equal(visible, inside.float())
    assert 0 < int(view.flipped.sum()) < N
    for n in inside.nonzero()[:, 0].tolist():
        assert view.images[n, 0, int(y[n]), int(x[n])] == pytest.approx(1, abs=1e-4)
    assert float(moved[torch.arange(N), 19 - index, 2].max()) <= 0  # the other wrist was not visible


def test_erasing_and_grey() -> None:
    augmentation = Augmentation(flip=0, erase=1.0, erase_area=(0.1, 0.3), grey=1.0)
    joints = torch.cat([torch.rand(200, 17, 2) * torch.tensor([16.0, 32.0]), torch.ones(200, 17, 1)], 2)
    pixels = torch.randint(1, 255, (200, 32, 16, 3), dtype=torch.uint8)
    view, moved = augmentation(pixels, joints, torch.Generator().manual_seed(1))
    assert moved is not None
    erased = (view.images == 0).all(1)  # [N, H, W]
    share = erased.float().mean((1, 2))
    assert 0.05 < float(share.min()) < float(share.max()) < 0.4
    x, y = moved[..., 0].long(), moved[..., 1].long()
    covered = erased[torch.arange(200)[:, None], y.clamp(0, 31), x.clamp(0, 15)]
    hidden = moved[..., 2] == 0
    assert (covered == hidden).float().mean() > 0.95  # but for joints in pixels that an edge divides
    unit = view.images * torch.tensor(b.IMAGENET_STD).view(3, 1, 1) + torch.tensor(b.IMAGENET_MEAN).view(3, 1, 1)
    spread = (unit.amax(1) - unit.amin(1)).masked_fill(erased, 0)
    assert float(spread.max()) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip must be a probability"),
        ({"erase": -0.1}, "erase must be a probability"),
        ({"crop": (0.5, 2.0)}, r"crop must be a range in 0\.\.1"),
        ({"erase_area": (0.4, 0.1)}, "erase_area must be a range"),
        ({"pad": -1}, "pad must be 0 or more"),
    ],
)
def test_impossible_augmentations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# ------------------------------------------------------------------------------------------------ batches


def test_a_batch_follows_from_seed_and_step() -> None:
    def made(seed: int = 0) -> Batches:
        augmentation = Augmentation(pad=2, erase=0.5)
        other = Batches(PEOPLE, UniformSampler(len(PEOPLE), size=6), augmentation, seed=9)
        sampler = IdentitySampler(PEOPLE.ids, identities=3, pictures=2)
        return Batches(PEOPLE, sampler, augmentation, unlabelled=other, seed=seed)

    first, second = made(), made()
    later = [first[step] for step in range(6)]
    assert all(same(later[step], second[step]) for step in (5, 1, 2))
    assert not same(later[0], made(1)[0])
    assert not torch.equal(later[0].images, later[1].images)
    batch = later[4]
    assert batch.unlabelled is not None
    assert batch.unlabelled.ids.tolist() == [-1] * 6
    assert batch.num_pictures == 12
    assert set(torch.cat([x.ids for x in later]).tolist()) == set(range(7))
    assert same(batch.to("cpu"), batch)


def test_two_views_and_the_original() -> None:
    augmentation = Augmentation(crop=(0.2, 1.0), grey=0.2)
    batch = Batches(PEOPLE, UniformSampler(len(PEOPLE), size=8), augmentation, views=2)[3]
    rows = UniformSampler(len(PEOPLE), size=8)[3][0][:, 0]
    assert torch.equal(batch.images, augmentation.original(PEOPLE.images[rows]))
    assert batch.joints is not None
    assert torch.equal(batch.joints, PEOPLE.joints[rows])
    assert len(batch.views) == 2
    assert not torch.equal(batch.views[0].boxes, batch.views[1].boxes)


def test_ranks_share_a_batch() -> None:
    pictures = cross_modality_split(0, train_ids=6, test_ids=2, height=16, width=8).train
    sampler = IdentitySampler(pictures.ids, identities=4, pictures=2, infrared=pictures.infrared, infrared_pictures=2)
    whole = Batches(pictures, sampler, PLAIN)
    parts = [whole.of_rank(rank, 2)[1] for rank in range(2)]
    visible = torch.cat([part.images[:4] for part in parts])
    dark = torch.cat([part.images[4:] for part in parts])
    assert torch.equal(torch.cat([visible, dark]), whole[1].images)
    assert not set(parts[0].ids.tolist()) & set(parts[1].ids.tolist())
    with pytest.raises(ValueError, match=r"4 identities .* cannot be shared by 3 ranks"):
        whole.of_rank(0, 3)


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered data set on disk."""
    root = tmp_path_factory.mktemp("data") / "market"
    split = retrieval_split(3, train_ids=7, test_ids=4, height=32, width=16)
    write_market1501(root, split.train, split.query, split.gallery)
    return root


def test_folder_pictures_are_those_written(market: Path) -> None:
    split = read_market1501(market).train
    pictures = FolderImages(split, 32, 16, joints=market / JOINTS, domain=2)
    rows = torch.tensor([5, 0, 0, 11])
    assert torch.equal(pictures.images[rows], PEOPLE.images[rows])
    assert pictures.joints is not None
    torch.testing.assert_close(pictures.joints, PEOPLE.joints)
    assert torch.equal(pictures.ids, PEOPLE.ids + 1)
    assert pictures.domains.unique().tolist() == [2]
    folder = Batches(pictures, IdentitySampler(pictures.ids, identities=3, pictures=2), Augmentation(pad=2))[4]
    memory = Batches(PEOPLE, IdentitySampler(PEOPLE.ids, identities=3, pictures=2), Augmentation(pad=2))[4]
    assert torch.equal(folder.images, memory.images)
    assert torch.equal(folder.ids, memory.ids)


def test_folder_pictures_are_resized_and_may_be_infrared(market: Path) -> None:
    split = read_market1501(market).query
    pictures = FolderImages(split, 64, 24, infrared_cameras=(2,))
    assert pictures.images[torch.arange(3)].shape == (3, 64, 24, 3)
    assert torch.equal(pictures.infrared, split.cameras == 2)
    assert 0 < int(pictures.infrared.sum()) < len(pictures)


def test_unreadable_pictures_are_named(market: Path, tmp_path: Path) -> None:
    good = read_market1501(market).query.paths[0]
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("P", (10, 20)).save(tmp_path / "palette.png")
    names = ("cut.png", "text.jpg", "gone.png", "palette.png")
    split = ReidSplit(tuple(tmp_path / name for name in names), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    pictures = FolderImages(split, 8, 4)
    for row in range(3):
        with pytest.raises(ValueError, match=f"{names[row]}: cannot be read as a picture"):
            pictures.images[torch.tensor([row])]
    assert pictures.images[torch.tensor([3])].shape == (1, 8, 4, 3)


def test_without_pillow(market: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'needs Pillow: pip install "neuraldeps_kernels\[reid\]"'):
        FolderImages(read_market1501(market).query, 8, 4)


def test_wrong_joints_are_named(market: Path, tmp_path: Path) -> None:
    split = read_market1501(market).train
    path = tmp_path / "joints.npz"
    with pytest.raises(ValueError, match=r"joints\.npz: expected arrays 'names' and 'joints'"):
        FolderImages(split, 8, 4, joints=path)
    np.savez(path, names=np.array(["a.png"]), joints=np.zeros((1, 17, 2)))
    with pytest.raises(ValueError, match=r"joints must be \[1, 17, 3\]"):
        FolderImages(split, 8, 4, joints=path)
    np.savez(path, names=np.array(["a.png"]), joints=np.zeros((1, 17, 3)))
    with pytest.raises(ValueError, match=f"has no joints of {split.paths[0].name}"):
        FolderImages(split, 8, 4, joints=path)
    with pytest.raises(ValueError, match="height, width and threads must be positive"):
        FolderImages(split, 0, 4)
