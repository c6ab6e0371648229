"""Acceptance checks of SSKD, each named by its number: losses, two streams, the method in the training loop.

What the distillation loss does by itself (checks 1 to 3) is tested in test_distillation_kl.py.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neuraldeps_kernels.cli import train as cli_train
from neuraldeps_kernels.data.batches import Augmentation, Batch, Batches, IdentitySampler, UniformSampler
from neuraldeps_kernels.data.pedestrian_splits import generalization_split
from neuraldeps_kernels.models.reid_network import ReidNetwork, small_network
from neuraldeps_kernels.models.sskd import (
    SSKD,
    StreamBatchNorm1d,
    StreamBatchNorm2d,
    circle_logits,
    circle_loss,
    cosines,
    with_streams,
)
from neuraldeps_kernels.models.training import train
from neuraldeps_kernels.nn.domain_norm import domain_context

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = generalization_split(
    1,
    source_domains=2,
    train_ids=8,
    target_domains=1,
    test_ids=5,
    unlabelled_cameras=6,
    unlabelled_ids=6,
    height=32,
    width=16,
)
NUM_IDS = 16
CIRCLE = {"scale": 16.0, "margin": 0.25, "smoothing": 0.1}
OPTIONS: dict[str, Any] = {**CIRCLE, "labelled_temperature": 4.0, "unlabelled_temperature": 2.0}


def network(width: int = 4, seed: int = 0) -> ReidNetwork:
    torch.manual_seed(seed)
    return ReidNetwork(small_network(width, 24), NUM_IDS)


def batches(seed: int = 0, unlabelled: bool = True) -> Batches:
    augmentation, stream = Augmentation(pad=2), None
    if unlabelled:
        assert SPLIT.unlabelled is not None
        sampler = UniformSampler(len(SPLIT.unlabelled), size=12, seed=seed)
        stream = Batches(SPLIT.unlabelled, sampler, augmentation, seed=seed + 1)
    people = IdentitySampler(SPLIT.train.ids, identities=6, pictures=3, seed=seed)
    return Batches(SPLIT.train, people, augmentation, unlabelled=stream, seed=seed)


def method(**options: Any) -> SSKD:
    """Student and a wider teacher, both random."""
    return SSKD(network(), network(8, 1), **{**OPTIONS, **options})


def gradients(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Of the sum of the losses, by parameter; None where none arrives."""
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ classifier


def test_check_4_circle_logits() -> None:
    """Zeros of both logits, and the derivative of the form with a frozen bracket."""
    s, m = 64.0, 0.35
    own = torch.tensor([[True, False, False]])
    at_zero = torch.tensor([[1 - m, m, m]], dtype=torch.float64)
    assert not circle_logits(at_zero, own, scale=s, margin=m).any()
    c = torch.tensor([[0.3, -0.1, 0.8]], dtype=torch.float64, requires_grad=True)
    u = circle_logits(c, own, scale=s, margin=m)
    (found,) = torch.autograd.grad(u.sum(), c)
    frozen = torch.tensor([[1 + m - 0.3, -0.1 + m, 0.8 + m]], dtype=torch.float64)
    torch.testing.assert_close(found, s * frozen)
    step = 1e-6
    for sign in (1, -1):
        moved = s * frozen * (c.detach() + sign * step - at_zero)
        torch.testing.assert_close((moved - u.detach()) / (sign * step), found, rtol=1e-6, atol=1e-6)
    beyond = torch.tensor([[1.0, -0.5, -1.0]], dtype=torch.float64)
    assert circle_logits(beyond, own, scale=s, margin=m)[0, 1:].tolist() == [0.0, 0.0]  # brackets end at 0


def unfused(f: Tensor, w: Tensor, y: Tensor, *, scale: float, margin: float, smoothing: float) -> Tensor:
    """L_c by all matrices."""
    C = len(w)
    c = linear(normalize(f, dim=1), normalize(w, dim=1))
    own = nn.functional.one_hot(y, C).bool()
    targets = torch.full_like(c, smoothing / max(C - 1, 1)).masked_fill(own, 1 - smoothing)
    assert C == 1 or torch.allclose(targets.sum(1), torch.ones(len(f), dtype=c.dtype))  # Check 4
    losses = cross_entropy(circle_logits(c, own, scale=scale, margin=margin), targets, reduction="none")
    return losses.sum() / (losses != 0).sum().clamp_min(1)


@pytest.mark.parametrize("C", [1, 2, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_check_10_fused_loss_is_the_unfused(C: int, dtype: torch.dtype, smoothing: float) -> None:
    """Value and gradients to 1e-5; classes in one block, whole blocks, and a rest."""
    torch.manual_seed(0)
    f, w = (torch.randn(rows, 12, dtype=dtype, requires_grad=True) for rows in (7, C))
    y = torch.randint(C, (7,))
    options = {"scale": 64.0, "margin": 0.35, "smoothing": smoothing}
    loss, twins = circle_loss(f, w, y, **options), [x.detach().double().requires_grad_() for x in (f, w)]
    want = unfused(*twins, y, **options)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=limit, atol=1e-12)
    for got, exact in zip(torch.autograd.grad(3 * loss, (f, w)), torch.autograd.grad(3 * want, twins), strict=True):
        assert float((got.double() - exact).norm()) <= limit * float(exact.norm()) + 1e-12
    with torch.no_grad():
        assert torch.equal(circle_loss(f, w, y, **options), loss)


def test_circle_loss_of_no_samples_and_of_solved_ones() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    w = torch.eye(4).requires_grad_()
    loss = circle_loss(empty, w, torch.zeros(0, dtype=torch.int64), **CIRCLE)
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, w)[0].any()
    f = torch.stack([torch.eye(4)[0], torch.ones(4)])
    y = torch.tensor([0, 1])
    options = {"scale": 256.0, "margin": 0.25, "smoothing": 0.0}
    losses = [circle_loss(f[rows], w, y[rows], **options) for rows in (slice(0, 1), slice(1, 2), slice(None))]
    assert float(losses[0].detach()) == 0.0
    assert torch.equal(losses[2], losses[1])  # the mean of the samples that are not solved


class LargestTensors(TorchDispatchMode):
    """Storages of at least `size` bytes that operators return, by address."""

    def __init__(self, size: int, known: list[Tensor]) -> None:
        super().__init__()
        self.size, self.found = size, set[int]()
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= self.size:
                self.found.add(t.untyped_storage().data_ptr())
        self.found -= self.known
        return result


def test_check_10_memory() -> None:
    """At 31,423 classes one [N, C] matrix, forward and backward; the hook sees several of the unfused loss."""
    torch.manual_seed(0)
    N, C, d = 64, 31_423, 16
    f, w, y = torch.randn(N, d, requires_grad=True), torch.randn(C, d, requires_grad=True), torch.randint(C, (N,))
    counts = []
    for loss in (circle_loss, unfused):
        with LargestTensors(4 * N * C, [f, w]) as seen:
            kept = loss(f, w, y, **CIRCLE)
            kept.backward()
        counts.append(len(seen.found))
    assert counts[0] == 1
    assert counts[1] > 2


# ------------------------------------------------------------------------------------------------ two streams


@pytest.mark.parametrize("sizes", [(7, 5), (1, 9)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_check_6_one_pass_is_two(sizes: tuple[int, int], momentum: float | None) -> None:
    """Outputs, gradients, and running statistics moved by the labelled stream first. In float32, where gradients of
    small batches lose digits in two passes as well, one pass is as near to float64 as two."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        student = network().train()
        for norm in student.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.momentum = momentum
        student.to(dtype)
        plain = copy.deepcopy(student)
        with_streams(student)
        assert sum(isinstance(x, StreamBatchNorm1d | StreamBatchNorm2d) for x in student.modules()) == 5
        assert student.state_dict().keys() == plain.state_dict().keys()
        torch.manual_seed(0)
        images = [torch.randn(n + 1, 3, 32, 16).to(dtype) for n in sizes]
        weights = torch.randn(sum(sizes) + 2, 24).to(dtype)
        streams = torch.cat([torch.full((len(x),), i) for i, x in enumerate(images)])
        with domain_context(streams):
            once = student(torch.cat(images)).feature
        twice = torch.cat([plain(x).feature for x in images])
        (once * weights).sum().backward()
        (twice * weights).sum().backward()
        for passes, feature, model in ((1, once, student), (2, twice, plain)):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            tables = [value.to(dtype) for name, value in model.state_dict().items() if "running" in name]
            found[dtype, passes] = [feature.detach(), *grads], [*tables, model.state_dict()["neck.num_batches_tracked"]]

    def errors(dtype: torch.dtype, passes: int, kind: int) -> list[float]:
        pairs = zip(found[dtype, passes][kind], found[torch.float64, 2][kind], strict=True)
        return [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3)) for a, b in pairs]

    assert max(errors(torch.float64, 1, 0) + errors(torch.float64, 1, 1)) <= 1e-10
    assert max(errors(torch.float32, 1, 1)) <= 1e-5
    for one, two in zip(errors(torch.float32, 1, 0), errors(torch.float32, 2, 0), strict=True):
        assert one <= 4 * two + 1e-5


def test_streams_are_batch_norm_outside_of_the_context() -> None:
    """In eval, and for a batch of one stream, to the last bit."""
    student, plain = network(), network()
    with_streams(student)
    x = torch.randn(4, 3, 32, 16)
    for _ in range(2):
        assert torch.equal(student(x).feature, plain(x).feature)
    student.eval()
    plain.eval()
    with domain_context(torch.tensor([0, 1, 0, 1])):
        assert torch.equal(student(x).feature, plain(x).feature)


# ------------------------------------------------------------------------------------------------ method


def test_check_5_who_learns() -> None:
    """Nothing reaches the teacher, only unlabelled images the auxiliary classifier, only labelled ones the main one."""
    model, batch = method(), batches()[0]
    losses = model.losses(batch, 0.0)
    assert losses.keys() == {"circle", "labelled", "unlabelled"}
    found = gradients({"unlabelled": losses.pop("unlabelled")}, model)
    assert found["auxiliary.weight"] is not None
    assert found["auxiliary.weight"].any()
    assert found["network.classifier.weight"] is None
    assert found["network.backbone.stages.0.conv.weight"] is not None
    assert all(gradient is None for name, gradient in found.items() if name.startswith("teacher"))
    model = method()
    losses = model.losses(batch, 0.0)
    found = gradients({name: losses[name] for name in ("circle", "labelled")}, model)
    assert found["auxiliary.weight"] is None
    assert found["network.classifier.weight"] is not None
    assert all(gradient is None for name, gradient in found.items() if name.startswith("teacher"))


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_check_5_teacher_keeps_its_bits(norm: str) -> None:
    """Over 20 steps, running statistics as well unless the teacher is asked to normalise by batches."""
    model = method(teacher_norm=norm)
    assert model.teacher is not None
    before = copy.deepcopy(model.teacher.state_dict())
    history = train(model, batches(), steps=20, lr=1e-3)
    assert history.rows[-1].keys() >= {"circle", "labelled", "unlabelled"}
    after = model.teacher.state_dict()
    assert all(torch.equal(after[name], p) for name, p in model.teacher.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in changed)
    assert bool(changed) == (norm == "batch")
    assert model.teacher.training == (norm == "batch")


def test_check_7_nothing_unlabelled_is_plain_distillation() -> None:
    """To the bits: an empty unlabelled batch, none at all, weight 0."""
    batch = batches()[0]
    assert batch.unlabelled is not None
    nothing = Batch(
        *(getattr(batch.unlabelled, name)[:0] for name in ("images", "ids", "cameras", "domains", "infrared"))
    )
    results = []
    for options, given in (
        ({}, replace(batch, unlabelled=None)),
        ({}, replace(batch, unlabelled=nothing)),
        ({"unlabelled_weight": 0.0}, batch),
    ):
        model = method(**options)
        losses = model.losses(given, 0.5)
        assert losses.keys() == {"circle", "labelled"}
        results.append([*losses.values(), *(g for g in gradients(losses, model).values() if g is not None)])
        results[-1] += [value for name, value in model.state_dict().items() if "running" in name]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_check_7_a_copy_has_nothing_to_learn() -> None:
    """teacher = student, both by batch statistics or both by running ones: labelled distillation starts at 0."""
    batch = batches()[0]
    model = method(teacher_norm="batch")
    model.teacher = copy.deepcopy(model.network).requires_grad_(False)
    assert float(model.losses(replace(batch, unlabelled=None), 0.0)["labelled"].detach()) <= 1e-9
    model.eval()
    assert float(model.losses(batch, 0.0)["labelled"].detach()) <= 1e-9
    assert float(method().losses(batch, 0.0)["labelled"].detach()) > 1e-3


def test_check_8_labels_of_unlabelled_images_are_not_read() -> None:
    batch, results = batches()[0], []
    assert batch.unlabelled is not None
    for label in (0, -1, 2**62):
        other = replace(batch.unlabelled, ids=torch.full_like(batch.unlabelled.ids, label))
        model = method()
        losses = model.losses(replace(batch, unlabelled=other), 0.0)
        results.append([*losses.values(), *(g for g in gradients(losses, model).values() if g is not None)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_losses_are_their_definition() -> None:
    """From two passes of plain networks, and float64 softmaxes."""
    batch, model = batches()[0], method(labelled_weight=0.5, unlabelled_weight=2.0)
    other = batch.unlabelled
    assert other is not None
    assert model.teacher is not None
    assert model.auxiliary is not None
    student, teacher = copy.deepcopy(model.network), copy.deepcopy(model.teacher).eval()
    losses = model.losses(batch, 0.0)
    f, f_other = student(batch.images).feature, student(other.images).feature

    def divergence(a: Tensor, b: Tensor, T: float) -> float:
        log_p, log_q = (torch.log_softmax(x.detach().double() / T, 1) for x in (b, a))
        return float(T**2 / len(a) * (log_p.exp() * (log_p - log_q)).sum())

    s, main = OPTIONS["scale"], student.classifier.weight
    known = [s * cosines(teacher(x.images).feature, teacher.classifier.weight) for x in (batch, other)]
    want = {
        "circle": float(unfused(f, main, batch.ids, **CIRCLE).detach()),
        "labelled": 0.5 * divergence(s * cosines(f, main), known[0], 4.0),
        "unlabelled": 2.0 * divergence(s * cosines(f_other, model.auxiliary.weight), known[1], 2.0),
    }
    assert {name: float(x.detach()) for name, x in losses.items()} == pytest.approx(want, rel=1e-4)
    joint = SSKD(network(), network(8, 1), **OPTIONS, unlabelled_classifier="main")
    joint.network.load_state_dict(student.state_dict())
    assert joint.auxiliary is None
    found = float(joint.losses(batch, 0.0)["unlabelled"].detach())
    assert found == pytest.approx(divergence(s * cosines(f_other, main), known[1], 2.0), rel=1e-4)


def test_first_stage_has_no_teacher() -> None:
    model = SSKD(network(), **CIRCLE)
    assert model.losses(batches()[0], 0.0).keys() == {"circle"}
    groups = model.trained_parameters(0.1)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in biases}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_bfloat16() -> None:
    """Losses stay float32, near those of float32."""
    batch = batches()[0]
    exact = method().losses(batch, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method().losses(batch, 0.0)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(exact[name].detach()), rel=0.1)


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without an interruption."""
    whole = method()
    train(whole, batches(), steps=6, lr=1e-3)
    broken = method()

    def fail(self: SSKD, batch: Batch, progress: float) -> dict[str, float]:
        if progress >= 0.5:
            raise RuntimeError("stopped")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(SSKD, "after_step", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            train(broken, batches(), steps=6, lr=1e-3, out=tmp_path, checkpoint_every=2)
    resumed = method()
    train(resumed, batches(), steps=6, lr=1e-3, out=tmp_path, checkpoint_every=2, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"unlabelled_classifier": "both"}, "unlabelled_classifier must be one of"),
        ({"teacher_norm": "none"}, "teacher_norm must be one of"),
        ({"labelled_temperature": 0.0}, "scale and temperatures must be positive"),
        ({"smoothing": 1.0}, r"smoothing in \[0, 1\)"),
        ({"unlabelled_weight": -1.0}, "weights must be 0 or more"),
    ],
    ids=lambda value: str(value),
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        method(**options)


def test_teacher_of_other_people() -> None:
    with pytest.raises(ValueError, match="teacher knows 3 identities, but the student learns 16"):
        SSKD(network(), ReidNetwork(small_network(4, 24), 3))


@pytest.mark.parametrize("dataset", ["synthetic", "market1501"])
def test_presets(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages; the last has a teacher, its auxiliary classifier the shape of the teacher's."""
    monkeypatch.setattr(cli_train, "resnet", lambda depth, **_: small_network(depth // 25, 24))
    stages = cli_train.read_config("sskd", dataset, None)
    assert [stage.name for stage in stages] == ["teacher", "student", "distillation"]
    made = [cli_train.make_method(stage, NUM_IDS) for stage in stages]
    last = made[2]
    assert isinstance(last, SSKD)
    parts = stages[2].tables["start"]
    assert parts.keys() == {"network", "teacher", "auxiliary"}
    for part, origin in parts.items():
        stage, _, source = origin.partition(":")
        state = made[["teacher", "student"].index(stage)].get_submodule(source).state_dict()
        last.get_submodule(part).load_state_dict(state)


# ------------------------------------------------------------------------------------------------ Check 9


def test_check_9_distillation_of_unseen_pictures() -> None:
    """The gate: on held-out unlabelled pictures the loss falls to half of what it is at the first step, or less."""
    sizes = {"source_domains": 1, "train_ids": 1, "target_domains": 1, "test_ids": 1, "height": 32, "width": 16}
    pictures = generalization_split(2, **sizes, unlabelled_cameras=12, unlabelled_ids=12).unlabelled
    assert pictures is not None
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    held_out, learned = pictures[order[:60]], pictures[order[60:]]
    teacher = SSKD(network(8, 1), **CIRCLE)
    train(teacher, batches(unlabelled=False), steps=30, lr=5e-3, schedule="one-cycle")
    model = SSKD(network(8), teacher.network, **OPTIONS)
    none = torch.zeros(60, dtype=torch.int64)
    fresh = Batch(Augmentation().original(held_out.images), none, none, none, held_out.infrared)
    given = replace(batches()[0], unlabelled=fresh)

    def loss() -> float:
        return float(copy.deepcopy(model).losses(given, 0.0)["unlabelled"].detach())  # of batch statistics, as trained

    first = loss()
    stream = Batches(learned, UniformSampler(len(learned), size=24, seed=0), Augmentation(pad=2), seed=1)
    people = IdentitySampler(SPLIT.train.ids, identities=6, pictures=3, seed=0)
    both = Batches(SPLIT.train, people, Augmentation(pad=2), unlabelled=stream, seed=0)
    train(model, both, steps=150, lr=1e-2, schedule="one-cycle")
    assert loss() <= 0.5 * first


@pytest.mark.study
def test_check_9_students_in_new_domains() -> None:
    """Mean of three seeds: 3 points of mAP above the first stage, and not below the control of equal steps by 1."""
    from benchmarks import reid_sskd

    found = {
        variant: [reid_sskd.run(variant, seed)["mAP"] for seed in range(3)]
        for variant in ("stage-1 student", "control", "SSKD")
    }
    mean = {variant: statistics.fmean(values) for variant, values in found.items()}
    gains = [a - b for a, b in zip(found["SSKD"], found["control"], strict=True)]
    print(f"SSKD - control: {statistics.fmean(gains):+.4f}, deviation {statistics.stdev(gains):.4f}")
    assert not math.isnan(mean["SSKD"])
    assert mean["SSKD"] >= mean["stage-1 student"] + 0.03
    assert mean["SSKD"] >= mean["control"] - 0.01
