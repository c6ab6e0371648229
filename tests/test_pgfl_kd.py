"""Acceptance checks of PGFL-KD, each named by its number. Checks 1 to 4 of the pooling itself are in
test_pose_weighted_pool.py; here are what the branches make of it, the losses, the method in the training loop."""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from neuraldeps_kernels.cli import train as cli_train
from neuraldeps_kernels.data.batches import MIRRORED_JOINTS, Augmentation, Batch, Batches, IdentitySampler
from neuraldeps_kernels.data.pedestrian_splits import occlusion_split
from neuraldeps_kernels.models import pgfl_kd
from neuraldeps_kernels.models.baseline import Baseline
from neuraldeps_kernels.models.pgfl_kd import PGFLKD, Maps, attention_loss
from neuraldeps_kernels.models.reid_network import ReidNetwork, small_network
from neuraldeps_kernels.models.training import evaluate, train
from neuraldeps_kernels.nn.heatmaps import FOUR_PARTS, joint_heatmaps, part_heatmaps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import reid_pgfl_kd

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = 8
SPLIT = occlusion_split(1, train_ids=IDS, test_ids=6, height=32, width=16)


def made(seed: int = 0, **options: Any) -> PGFLKD:
    torch.manual_seed(seed)
    return PGFLKD(ReidNetwork(small_network(4, 24), IDS), **options)


def batches(seed: int = 0) -> Batches:
    sampler = IdentitySampler(SPLIT.train.ids, identities=3, pictures=2, seed=seed)
    return Batches(SPLIT.train, sampler, Augmentation(pad=1), seed=seed)


def batch() -> Batch:
    return batches()[0]


def random_maps(N: int, K: int, h: int = 4, w: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(N, K, h, w, generator=torch.Generator().manual_seed(seed))


def branches_of(method: PGFLKD, given: Batch) -> tuple[Any, dict[str, Any], Maps]:
    main = method.network(given.images)
    assert given.joints is not None
    maps = method.maps(given.joints, given.images, main.map)
    return main, {name: method.branch(name, main.map, maps) for name in method.branches}, maps


# ------------------------------------------------------------------------------------------------ branches


def test_branches_pool_by_their_maps() -> None:
    """Checks 1, 3 and 4 in the branches: FEB by the foreground alone, SAB group by group, invisible parts 0."""
    method = made().eval()
    features, parts = torch.randn(2, 24, 4, 2), random_maps(2, 4)
    foreground = random_maps(2, 1, seed=1)
    foreground[:, :, 2:] = 0
    visible = torch.tensor([[True, False, True, True], [False, False, False, False]])
    maps = Maps(parts, foreground, visible)
    own = method.branches["foreground"].features(features)
    want = (own * foreground).sum((2, 3)) / (foreground.sum((2, 3)) + 1e-6)
    torch.testing.assert_close(method.branch("foreground", features, maps).pooled, want)
    noisy = features.clone()
    noisy[:, :, 2:] += 1e3
    changed = method.branch("foreground", noisy, maps).pooled
    torch.testing.assert_close(changed, method.branch("foreground", features, maps).pooled, rtol=0, atol=1e-6)

    pooled = method.branch("semantics", features, maps).pooled
    own = method.branches["semantics"].features(features)
    for k in range(4):
        group = slice(6 * k, 6 * k + 6)
        block = (own[:, group] * parts[:, k : k + 1]).sum((2, 3)) / (parts[:, k].sum((1, 2)) + 1e-6)[:, None]
        torch.testing.assert_close(pooled[0, group], block[0] * visible[0, k])
    assert not pooled[1].any()


def test_channels_that_no_group_divides() -> None:
    torch.manual_seed(0)
    method = PGFLKD(ReidNetwork(small_network(4, 22), IDS), parts=6)
    found = method.losses(batch(), 1.0)
    assert all(bool(loss.isfinite()) for loss in found.values())
    assert pgfl_kd.group_of_channel(22, 6).bincount().tolist() == [3, 3, 3, 3, 3, 7]


def test_mirrored_pictures_and_joints() -> None:
    """Check 8: maps mirror with the joints, and pooled features stay, of a mirrored F."""
    method = made().eval()
    given = batch()
    assert given.joints is not None
    W = given.images.shape[3]
    mirrored = given.joints[:, MIRRORED_JOINTS].clone()
    mirrored[..., 0] = W - mirrored[..., 0]
    features = method.network(given.images).map
    maps, flipped = (method.maps(joints, given.images, features) for joints in (given.joints, mirrored))
    torch.testing.assert_close(flipped.parts, maps.parts.flip(3), rtol=0, atol=1e-6)
    for name in method.branches:
        torch.testing.assert_close(
            method.branch(name, features.flip(3), flipped).pooled,
            method.branch(name, features, maps).pooled,
            rtol=0,
            atol=1e-6,
        )


def test_rendered_maps() -> None:
    """Check 10: peak 1 on the centre of a cell, zeros where nothing is visible, groups as maxima to the last bit."""
    joints = torch.zeros(2, 17, 3)
    joints[0, 3] = torch.tensor([10.0, 22.0, 1.0])  # of 32 x 16 pixels on 8 x 4 cells: centre of cell (5, 2)
    joints[1, 12] = torch.tensor([3.0, 17.5, 0.7])
    joints[1, 5] = torch.tensor([torch.nan, torch.inf, 0.0])
    single = joint_heatmaps(joints, 32, 16, 8, 4)
    assert single[0, 3].argmax() == 5 * 4 + 2
    assert single[0, 3].max() == 1
    assert not single[joints[..., 2] == 0].any()
    found = part_heatmaps(joints, 32, 16, 8, 4)
    for k, group in enumerate(FOUR_PARTS):
        assert torch.equal(found[:, k], torch.stack([single[:, j] for j in group]).amax(0))
    assert torch.equal(found[:, -1], single.amax(1))
    maps = made().maps(joints, torch.zeros(2, 3, 32, 16), torch.zeros(2, 24, 8, 4))
    assert maps.visible.tolist() == [[True, False, False, False], [False, True, True, False]]


# ------------------------------------------------------------------------------------------------ losses


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_attention_loss(N: int, K: int, seed: int) -> None:
    """Check 5: at least the entropy of the map, which it is where the attention is the map; a constant on a group
    changes nothing; invisible parts have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    maps = random_maps(N, K, seed=seed).double() + 1e-3
    visible = torch.rand(N, K, generator=generator) < 0.7
    features = torch.randn(N, 3 * K + 1, 4, 2, generator=generator).double().requires_grad_()
    target = maps / maps.sum((2, 3), keepdim=True)
    entropies = -(target * target.log()).sum((2, 3))
    entropy = float(entropies[visible].mean()) if bool(visible.any()) else 0.0
    loss = attention_loss(features, maps, visible)
    assert float(loss.detach()) >= entropy - 1e-12

    ideal = (target.log() / 5).repeat_interleave(3, 1)
    ideal = torch.cat([ideal, ideal[:, -1:]], 1)
    assert float(attention_loss(ideal, maps, visible)) == pytest.approx(entropy, abs=1e-9)
    shift = torch.zeros(3 * K + 1)
    shift[3 * (K - 1) :] = 7.0
    shifted = attention_loss(features.detach() + shift[:, None, None], maps, visible)
    assert float(shifted) == pytest.approx(float(loss.detach()), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, features)
    group = pgfl_kd.group_of_channel(3 * K + 1, K)
    assert not gradient[~visible[:, group]].any()
    assert bool(gradient[visible[:, group]].any()) == bool(visible.any())


def test_attention_of_maps_of_zeros_is_finite() -> None:
    features = torch.randn(2, 8, 4, 2, requires_grad=True)
    for visible in (torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)):
        loss = attention_loss(features, torch.zeros(2, 2, 4, 2), visible)
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_no_gradient_of_distillation_reaches_the_branches() -> None:
    """Check 6; and none is 0 in the main branch."""
    method = made()
    given = batch()
    main, branches, maps = branches_of(method, given)
    method.distillation_loss(main, branches, maps).backward()
    assert all(p.grad is None for p in method.branches.parameters())
    for parameter in (*method.network.backbone.parameters(), method.network.classifier.weight):
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


def test_losses_at_the_beginning_are_those_of_three_branches() -> None:
    """Check 6: with r = 0, three times L_id and the attention of SAB."""
    method, given = made(), batch()
    found = method.losses(given, 0.0)
    assert found["distillation"] == found["interaction"] == 0
    plain = made(distillation=False, interaction="none").losses(given, 0.0)
    assert set(found) - set(plain) == {"distillation", "interaction"}
    assert float(sum(found.values())) == pytest.approx(float(sum(plain.values())), rel=1e-6)
    later = [float(made().losses(given, progress)["distillation"]) for progress in (0.05, 0.1, 0.2, 1.0)]
    assert later[0] * 2 == pytest.approx(later[1], rel=1e-5)
    assert later[1] * 2 == pytest.approx(later[2], rel=1e-5)
    assert later[2] == later[3]


def test_distillation_in_numbers() -> None:
    method, given = made(logit_weight=0.3, feature_weight=0.7, attention_weight=0.0), batch()
    main, branches, maps = branches_of(method, given)
    want = 0.0
    for branch in branches.values():
        teacher, student = (torch.softmax(z.double() / 4, 1) for z in (branch.logits, main.logits))
        want += 0.3 * 16 * float((teacher * (teacher / student).log()).sum(1).mean())
    p, q = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (main.pooled, branches["foreground"].pooled))
    want += 0.7 * float((p - q).square().sum(1).mean())
    assert float(method.distillation_loss(main, branches, maps)) == pytest.approx(want, rel=1e-4)


def test_interaction() -> None:
    """Check 9: no groups give the main branch's own loss, all of them the feature of the parts through its neck and
    classifier; running statistics stay; gradients reach both branches."""
    method, given = made(), batch()
    main, branches, maps = branches_of(method, given)
    N, semantics = len(given), branches["semantics"]
    before = copy.deepcopy(method.network.neck.state_dict())
    own = pgfl_kd.hybrid(main.pooled, semantics.pooled, torch.zeros(N, 4, dtype=torch.bool))
    assert torch.equal(own, main.pooled)
    torch.testing.assert_close(method.main_logits(own), main.logits)
    other = pgfl_kd.hybrid(main.pooled, semantics.pooled, torch.ones(N, 4, dtype=torch.bool))
    assert torch.equal(other, semantics.pooled)
    neck = method.network.neck
    by_hand = (other - other.mean(0)) / (other.var(0, correction=0) + neck.eps).sqrt() * neck.weight
    torch.testing.assert_close(method.main_logits(other), by_hand @ method.network.classifier.weight.T)
    gradients = torch.autograd.grad(
        method.interaction_loss(main, branches, maps, given.ids), [main.pooled, semantics.pooled]
    )
    assert all(bool(g.any()) for g in gradients)
    after = method.network.neck.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_groups_are_some_but_not_all() -> None:
    torch.manual_seed(0)
    chosen = pgfl_kd.random_groups(4000, 3)
    counts = (chosen * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    assert counts[0] == counts[7] == 0
    assert bool((counts[1:7] > 550).all())


def test_partners_complete_what_is_hidden() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    visible = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    partner, chosen = pgfl_kd.completing_partners(labels, visible)
    assert partner[:2].tolist() == [1, 0]
    assert labels[partner].tolist() == labels.tolist()
    assert chosen.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("interaction", pgfl_kd.INTERACTIONS)
def test_every_interaction_trains(interaction: str) -> None:
    method, given = made(interaction=interaction, parts=6, total=True), batch()
    found = method.losses(given, 0.5)
    assert ("interaction" in found) == (interaction != "none")
    sum(found.values()).backward()  # type: ignore[union-attr]
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_pictures_whose_joints_are_all_hidden() -> None:
    given = batch()
    assert given.joints is not None
    hidden = given.joints.clone()
    hidden[..., 2] = 0
    method = made()
    found = method.losses(Batch(**{**given.__dict__, "joints": hidden}), 1.0)
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in method.parameters())


# ------------------------------------------------------------------------------------------------ training and test


def test_tests_need_the_main_branch_alone() -> None:
    """Check 7: without the branches the same features to the last bit; parameters and flops of the baseline."""
    method = made()
    train(method, batches(), steps=3, lr=1e-3)
    images = batch().images
    method.eval()
    with FlopCounterMode(display=False) as counter:
        features = method.embed(images)
    baseline = Baseline(copy.deepcopy(method.network)).eval()
    with FlopCounterMode(display=False) as plain:
        assert torch.equal(baseline.embed(images), features)
    assert counter.get_total_flops() == plain.get_total_flops() > 0
    del method.branches
    assert torch.equal(method.embed(images), features)
    count = sum(p.numel() for p in method.parameters())
    assert count == sum(p.numel() for p in baseline.parameters())
    assert evaluate(method, SPLIT.query, SPLIT.gallery).map > 0


def test_the_main_branch_alone_is_the_baseline() -> None:
    method = made(foreground=False, semantics=False, distillation=False, interaction="none")
    baseline = Baseline(copy.deepcopy(method.network))
    given = batch()
    a, b = method.losses(given, 0.5), baseline.losses(given, 0.5)
    assert {name: float(x) for name, x in a.items()} == {name: float(x) for name, x in b.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_training_has_the_same_bits(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"steps": 6, "lr": 1e-3, "precision": precision, "checkpoint_every": 3}
    whole = made()
    torch.manual_seed(5)
    train(whole, batches(), **options)

    class Interrupted(Exception):
        pass

    def stop(_: PGFLKD) -> float:
        raise Interrupted

    first = made()
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        train(first, batches(), out=tmp_path, score=stop, score_every=4, **options)
    again = made(seed=3)
    train(again, batches(), out=tmp_path, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_features_with_pose() -> None:
    method = made().eval()
    given = batch()
    assert given.joints is not None
    found = method.embed_with_pose(given.images, given.joints)
    assert found.shape == (len(given), 3 * 24)
    torch.testing.assert_close(found[:, :24].norm(dim=1), torch.ones(len(given)))
    unit = torch.nn.functional.normalize(method.embed(given.images), dim=1)
    assert torch.equal(found[:, :24], unit)


@pytest.mark.parametrize("dataset", ["synthetic", "dukemtmc"])
def test_configurations_make_the_method(dataset: str) -> None:
    stages = cli_train.read_config("pgfl-kd", dataset, None)
    method = cli_train.make_method(stages[-1], 5)
    assert isinstance(method, PGFLKD)
    assert set(method.branches) == {"foreground", "semantics"}


def test_bad_options() -> None:
    for words, options in [
        ("parts must be one of 4, 6, 13, not 5", {"parts": 5}),
        ("interaction must be one of", {"interaction": "all"}),
        ("interaction 'semantics' needs", {"semantics": False}),
        ("interaction 'foreground' needs", {"foreground": False, "interaction": "foreground"}),
        ("distillation needs", {"foreground": False, "semantics": False, "interaction": "none"}),
        ("sigma must be positive", {"sigma": 0.0}),
        ("temperature must be positive", {"temperature": float("inf")}),
        ("ramp must be in", {"ramp": 1.0}),
        ("threshold must be in", {"threshold": -0.1}),
    ]:
        with pytest.raises(ValueError, match=words):
            made(**options)
    with pytest.raises(ValueError, match="at most the channels"):
        PGFLKD(ReidNetwork(small_network(4, 8), IDS), parts=13)
    with pytest.raises(ValueError, match="needs joints"):
        made().losses(Batch(**{**batch().__dict__, "joints": None}), 0.5)


# ------------------------------------------------------------------------------------------------ the study


@pytest.mark.parametrize("variant", reid_pgfl_kd.VARIANTS)
def test_every_variant_of_the_study_runs(variant: str) -> None:
    found = reid_pgfl_kd.run(variant, 0, 2, train_ids=12, test_ids=3, height=32, width=16)
    assert list(found) == ["mAP", "rank-1", "mINP", "re-ranked mAP"]
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.study
def test_the_branches_help_the_main_one() -> None:
    """Check 11: means of three seeds that no weight was chosen on, occluded queries."""
    variants, seeds = ("MB", "interaction", "pose at test"), (2, 3, 4)
    found = {(variant, seed): reid_pgfl_kd.run(variant, seed) for variant in variants for seed in seeds}

    def mean(variant: str, metric: str) -> float:
        return statistics.fmean(found[variant, seed][metric] for seed in seeds)

    assert mean("interaction", "mINP") >= mean("MB", "mINP") + 0.01
    assert mean("interaction", "mAP") >= mean("MB", "mAP") + 0.005
    assert mean("pose at test", "mAP") >= mean("interaction", "mAP") - 0.01
