"""The training loop: resuming to the same bits, checkpoints, precision, several processes, evaluation."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import on_every_rank
from torch import Tensor, nn

import neuraldeps_kernels as nk
from neuraldeps_kernels.data.batches import Augmentation, Batch, Batches, IdentitySampler, UniformSampler
from neuraldeps_kernels.data.pedestrian_splits import retrieval_split
from neuraldeps_kernels.models import training
from neuraldeps_kernels.models.baseline import Baseline
from neuraldeps_kernels.models.reid_network import ReidNetwork, resnet, small_network
from neuraldeps_kernels.models.training import BEST, LAST, LOG, Method, evaluate, load_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = retrieval_split(1, train_ids=8, test_ids=6, height=16, width=8)
STEPS = 7


class Restless(Baseline):
    """A baseline with all that a restart could lose: dropout, a generator, an agent's optimizer, a momentum teacher."""

    stop_after = -1  # steps

    def __init__(self) -> None:
        super().__init__(ReidNetwork(small_network(2, 4), 8))
        self.generator = torch.Generator().manual_seed(3)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.agent = nn.Parameter(torch.ones(4))
        self.agent_optimizer = torch.optim.Adam([self.agent], 0.01)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        outputs = self.network(batch.images)
        noise = torch.randn(4, generator=self.generator)
        dropped = nn.functional.dropout(outputs.feature.float() + noise, 0.5)
        losses = super().losses(batch, progress) | {"drop": (1 + progress) * dropped.square().mean()}
        return losses if progress < 0.5 else losses | {"late": outputs.pooled.square().mean()}

    def after_step(self, batch: Batch, progress: float) -> dict[str, float]:
        self.count += 1
        self.teacher.weight.lerp_(self.network.classifier.weight[:4], 0.1)
        self.agent_optimizer.zero_grad()
        (self.agent * torch.rand(4, generator=self.generator)).square().sum().backward()
        self.agent_optimizer.step()
        if int(self.count) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return {"agent": float(self.agent.detach().sum())}

    def trained_parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        backbone = {"params": list(self.network.backbone.parameters()), "lr_factor": 0.1, "weight_decay": weight_decay}
        return [backbone, {"params": [*self.network.classifier.parameters(), self.network.neck.weight]}]

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "agent": self.agent_optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.agent_optimizer.load_state_dict(state["agent"])


def batches(seed: int = 0, world_identities: int = 2) -> Batches:
    """Four steps an epoch."""
    other = Batches(SPLIT.gallery, UniformSampler(len(SPLIT.gallery), size=4), Augmentation(pad=1))
    sampler = IdentitySampler(SPLIT.train.ids, identities=world_identities, pictures=3, seed=seed)
    return Batches(SPLIT.train, sampler, Augmentation(pad=1, erase=0.5), unlabelled=other, seed=seed)


def trained(out: Path | None, *, stop_after: int = -1, **options: Any) -> tuple[Restless, training.History]:
    torch.manual_seed(0)
    method = Restless()
    method.stop_after = stop_after
    history = train(method, batches(), **{"steps": STEPS, "lr": 0.01, "out": out, **options})
    return method, history


def state(method: Method) -> dict[str, Any]:
    """All of the method and torch's random numbers."""
    return {**method.state_dict(), "random": torch.get_rng_state()}


def assert_same_bits(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


def without_rates(history: training.History) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in history.rows]


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "one-cycle"},
        {"optimizer": "sgd", "schedule": "cosine", "warm_up": 3, "lr_min": 1e-4, "precision": "bfloat16"},
        {"optimizer": "adamw", "schedule": "milestones", "warm_up": 2, "milestones": (4, 6), "precision": "float16"},
    ],
    ids=["one-cycle", "sgd", "float16"],
)
def test_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    """Interrupted after every step, also between epochs (after 4), by SIGINT as Ctrl-C sends it."""
    method, history = trained(tmp_path / "whole", **options)
    wanted, rows = state(method), without_rates(history)
    checkpoint = load_checkpoint(tmp_path / "whole" / LAST)
    for step in range(1, STEPS):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            trained(out, stop_after=step, **options)
        assert load_checkpoint(out / LAST)["step"] == step
        torch.rand(step)  # the resumed process has another history
        method, history = trained(out, resume=True, **options)
        assert_same_bits(state(method), wanted)
        assert without_rates(history) == rows
        assert_same_bits(load_checkpoint(out / LAST), checkpoint)


def test_a_training_killed_between_checkpoints_goes_on_from_the_last(tmp_path: Path) -> None:
    class Killed(RuntimeError):
        pass

    def killed(_: Method) -> float:
        raise Killed

    method, history = trained(None)
    wanted, rows = state(method), without_rates(history)
    with pytest.raises(Killed):
        trained(tmp_path, checkpoint_every=2, score=killed, score_every=5)
    assert load_checkpoint(tmp_path / LAST)["step"] == 4
    method, history = trained(tmp_path, resume=True)
    assert_same_bits(state(method), wanted)
    assert without_rates(history) == rows


def test_a_finished_training_resumes_to_itself(tmp_path: Path) -> None:
    method, history = trained(tmp_path)
    again, same = trained(tmp_path, resume=True)
    assert_same_bits(again.state_dict(), method.state_dict())
    assert same.rows == history.rows


def test_sigterm_ends_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    method = Restless()
    monkeypatch.setattr(method, "after_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    with pytest.raises(SystemExit) as end:
        train(method, batches(), steps=3, lr=0.01, out=tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / LAST)["step"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------ checkpoints, log


def test_log_has_a_row_a_step(tmp_path: Path) -> None:
    _, history = trained(tmp_path)
    with (tmp_path / LOG).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["triplet"]) for row in rows] == history.column("triplet")
    assert [bool(row["late"]) for row in rows] == [False] * 4 + [True] * 3
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    assert {"identity", "drop", "lr", "agent"} <= set(rows[0])


def test_the_best_is_kept(tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.7, 6: 0.3, 7: 0.5}

    def score(method: Method) -> float:
        return scores[int(method.count)]  # type: ignore[arg-type]

    _, history = trained(tmp_path, score=score, score_every=2)
    assert history.best == 0.7
    assert load_checkpoint(tmp_path / BEST)["step"] == 4
    assert load_checkpoint(tmp_path / LAST)["step"] == 7
    assert {path.name for path in tmp_path.iterdir()} == {LAST, BEST, LOG}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.02}, r"last\.pt: is of a training with lr = 0\.01, not 0\.02"),
        ({"steps": 9}, r"is of a training with steps = 7, not 9"),
        ({"settings": {"width": 3}}, r"is of a training with settings\.width = None, not 3"),
        ({"optimizer": "sgd"}, r"with optimizer = adam, not sgd"),
        ({"milestones": (3,)}, r"with milestones = \[\], not \[3\]"),
    ],
)
def test_checkpoints_of_other_trainings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, resume=True, **options)


def test_checkpoints_of_other_batches_or_networks_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"with batches\.sampler_seed = 0, not 1"):
        train(Restless(), batches(1), steps=STEPS, lr=0.01, out=tmp_path, resume=True)
    wide = Restless()
    wide.teacher = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="does not fit the training"):
        train(wide, batches(), steps=STEPS, lr=0.01, out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other", "format"])
def test_damaged_checkpoints_are_named(tmp_path: Path, damage: str) -> None:
    trained(tmp_path)
    path = tmp_path / LAST
    content = path.read_bytes()
    if damage == "other":
        torch.save([1, 2], path)
    elif damage == "format":
        torch.save({**load_checkpoint(path), "format": 99}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"no checkpoint", "empty": b""}[damage])
    message = r"last\.pt: (is no checkpoint that can be read|expected a checkpoint of format 1, found (None|99))"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, resume=True)


def test_folders_are_guarded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no last\.pt to resume from"):
        trained(tmp_path, resume=True)
    trained(tmp_path, steps=1)
    with pytest.raises(ValueError, match="holds a training already; resume it or choose another folder"):
        trained(tmp_path)
    with pytest.raises(ValueError, match="resume needs out"):
        trained(None, resume=True)


@pytest.mark.parametrize("failing", ["save", "replace"])
def test_a_failed_write_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    trained(tmp_path, steps=2)
    before = (tmp_path / LAST).read_bytes()

    def full(_: Any, file: Any) -> None:
        if failing == "save":
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(training.torch if failing == "save" else training.os, failing, full)
    with pytest.raises(OSError, match="no space left"):
        training._write({}, tmp_path / LAST)
    assert (tmp_path / LAST).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {LAST, LOG}


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, sgd, not 'lion'"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine"),
        ({"precision": "int8"}, "precision must be one of float32"),
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"warm_up": 7}, r"warm_up must be in 0\.\.6"),
        ({"warm_up": 2, "schedule": "one-cycle"}, "warm_up does not go with the schedule one-cycle"),
        ({"warm_up": 4, "schedule": "milestones", "milestones": (3, 5)}, r"milestones must lie behind warm_up = 4"),
        ({"warm_up_factor": 0}, r"warm_up_factor must be in \(0, 1\]"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(None, **options)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Restless()
    monkeypatch.setattr(
        method,
        "losses",
        lambda batch, progress: {"good": method.agent.sum(), "bad": method.agent.sum() / (0.0 if progress else 1.0)},
    )
    with pytest.raises(ValueError, match="bad is inf in step 2; a lower lr may help"):
        train(method, batches(), steps=3, lr=0.01, out=tmp_path)
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"schedule": "constant", "warm_up": 2, "warm_up_factor": 0.5}, [0.5, 0.75, 1, 1, 1, 1]),
        ({"schedule": "milestones", "milestones": (2, 5), "decay": 0.5}, [1, 1, 0.5, 0.5, 0.5, 0.25]),
        ({"schedule": "milestones", "warm_up": 2, "warm_up_factor": 0.5, "milestones": (3,)}, [0.5, 0.75, 1, 0.1, 0.1]),
        ({"schedule": "cosine", "lr_min": 0.2}, [1, 0.9464, 0.8, 0.6, 0.4, 0.2536]),
    ],
)
def test_schedules(options: dict[str, Any], wanted: list[float]) -> None:
    method = Baseline(ReidNetwork(small_network(1, 2), 8))
    history = train(method, batches(), lr=1.0, steps=len(wanted), **options)
    assert history.column("lr") == pytest.approx(wanted, abs=1e-4)


def test_lr_factor_of_a_group() -> None:
    _, history = trained(None, schedule="constant")
    assert history.column("lr") == pytest.approx([0.001] * STEPS)  # that of the first group, the backbone


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_alike(precision: str) -> None:
    exact, reduced = (trained(None, precision=p, lr=1e-4)[1] for p in ("float32", precision))
    for name in ("identity", "triplet"):
        assert reduced.column(name) == pytest.approx(exact.column(name), rel=0.05, abs=0.05)
        assert reduced.column(name) != exact.column(name)


def test_worker_processes_make_the_same_batches() -> None:
    here, history = trained(None, steps=3)
    there, same = trained(None, steps=3, workers=1)
    assert_same_bits(there.state_dict(), here.state_dict())
    assert without_rates(same) == without_rates(history)


class Unreadable:
    """Pixels that fail as a damaged file does."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        raise ValueError("a/b.jpg: cannot be read as a picture: truncated")


def test_an_error_of_a_worker_process_is_one_line() -> None:
    broken = batches()
    broken.pictures = dataclasses.replace(SPLIT.train, images=Unreadable())
    with pytest.raises(ValueError, match=r"^a/b\.jpg: cannot be read as a picture: truncated$"):
        train(Restless(), broken, steps=3, lr=0.01, workers=1)


# ------------------------------------------------------------------------------------------------ several processes


class Linear(Method):
    """Logits linear in the mean colour: the loss of a batch is the mean of those of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.unused = nn.Linear(2, 2)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        logits = self.linear(batch.images.mean((2, 3)))
        losses = {"identity": nn.functional.cross_entropy(logits, batch.ids)}
        return losses if progress < 0.5 else losses | {"unused": 0.1 * self.unused.weight.square().mean()}

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        return self.linear(images.mean((2, 3)))  # type: ignore[no-any-return]


def plain_batches() -> Batches:
    sampler = IdentitySampler(SPLIT.train.ids, identities=4, pictures=2)
    return Batches(SPLIT.train, sampler, Augmentation(flip=0.0))


def in_each_process(folder: Path, rank: int, world: int) -> None:
    ranks_equal_one_process(folder, rank)
    ranks_resume(folder)


def ranks_equal_one_process(folder: Path, rank: int) -> None:
    torch.manual_seed(rank)  # rank 0 decides how all start
    method = Linear()
    train(method, plain_batches(), steps=6, lr=0.05, optimizer="sgd")
    wanted = torch.load(folder / "one.pt", weights_only=True)
    for name in ("linear.weight", "linear.bias"):
        torch.testing.assert_close(method.state_dict()[name], wanted[name], atol=1e-6, rtol=1e-5)
    assert_alike_on_all_ranks(method)


def ranks_resume(folder: Path) -> None:
    def run(out: Path, stop_after: int = -1, resume: bool = False) -> Restless:
        torch.manual_seed(5)
        method = Restless()
        method.stop_after = stop_after
        options: dict[str, Any] = {"score": lambda method: -float(method.count), "score_every": 1}
        train(method, batches(world_identities=4), steps=5, lr=0.01, out=out, resume=resume, **options)
        return method

    whole = run(folder / "whole")
    assert_alike_on_all_ranks(whole)
    with pytest.raises(KeyboardInterrupt):  # on all ranks, though one alone is told to stop
        run(folder / "stopped", stop_after=2 if dist.get_rank() == 1 else -1)
    dist.barrier()
    resumed = run(folder / "stopped", resume=True)
    assert_same_bits(state(resumed), state(whole))


def assert_alike_on_all_ranks(method: Method) -> None:
    """Parameters and buffers, but for the agent of Restless, which learns from random numbers of its own."""
    named = (*method.named_parameters(), *method.named_buffers())
    flat = torch.cat([x.detach().flatten().double() for name, x in named if name != "agent"])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    assert torch.equal(both[0], both[1])


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    """They train as one does on the whole batch, stay alike, and resume to the same bits."""
    torch.manual_seed(0)
    method = Linear()
    train(method, plain_batches(), steps=6, lr=0.05, optimizer="sgd")
    torch.save(method.state_dict(), tmp_path / "one.pt")
    on_every_rank(partial(in_each_process, tmp_path), 2, tmp_path)


# ------------------------------------------------------------------------------------------------ networks


def test_network_outputs() -> None:
    network = ReidNetwork(small_network(4, 12), 5)
    outputs = network(torch.randn(3, 3, 64, 32))
    assert outputs.map.shape == (3, 12, 8, 4)
    assert torch.equal(outputs.pooled, outputs.map.mean((2, 3)))
    assert outputs.logits.shape == (3, 5)
    assert not network.neck.bias.requires_grad
    assert small_network(4, 12).channels == (4, 8, 16, 12)
    assert [type(stage.conv).__name__ for stage in small_network().stages] == ["Conv2d"] * 4


def test_gem_lies_between_mean_and_maximum() -> None:
    x = torch.rand(4, 6, 5, 3, dtype=torch.float64)
    pooled = ReidNetwork(small_network(2, 6), 5, pooling="gem").pool(x)
    torch.testing.assert_close(pooled.double(), x.pow(3).mean((2, 3)).pow(1 / 3), rtol=1e-5, atol=0)
    assert bool((pooled > x.mean((2, 3))).all())
    assert bool((pooled < x.amax((2, 3))).all())


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    source = resnet(18)
    torch.save({**source.state_dict(), "fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pt")
    taken = resnet(18, weights=tmp_path / "w.pt")
    assert_same_bits(dict(taken.state_dict()), dict(source.state_dict()))
    with pytest.raises(ValueError, match=r"must be that of torchvision's ResNet of the same depth"):
        resnet(34, weights=tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: .*size mismatch"):
        resnet(18, width=32, weights=tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"no\.pt: no such file"):
        resnet(18, weights=tmp_path / "no.pt")


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ids must be positive, not 0"):
        ReidNetwork(small_network(), 0)
    with pytest.raises(ValueError, match="pooling must be one of mean, gem, not 'max'"):
        ReidNetwork(small_network(), 2, pooling="max")
    with pytest.raises(ValueError, match="width and feature must be positive"):
        small_network(0)


# ------------------------------------------------------------------------------------------------ evaluation


class Colours(Linear):
    """Features: mean colours of the left and the right half."""

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        assert infrared is not None
        assert infrared.shape == (len(images),)
        assert not self.training
        return torch.cat([half.mean((2, 3)) for half in images.chunk(2, 3)], 1)


@pytest.mark.parametrize("rerank", [False, True])
def test_evaluation_is_that_of_the_features(rerank: bool) -> None:
    method = Colours()
    query, gallery = SPLIT.query, SPLIT.gallery
    found = evaluate(method, query, gallery, {"camera_rule": "none"}, rerank=rerank, batch_size=5)
    assert method.training
    x, y = (
        nn.functional.normalize(
            torch.cat([half.mean((2, 3)) for half in Augmentation().original(p.images).chunk(2, 3)], 1)
        )
        for p in (query, gallery)
    )
    distances = nk.k_reciprocal_rerank(x, y) if rerank else 1 - x @ y.mT
    assert isinstance(distances, Tensor)
    wanted = nk.retrieval_metrics(distances, query.ids, gallery.ids, camera_rule="none")
    assert found.map == pytest.approx(wanted.map, abs=1e-9)
    assert torch.equal(found.cmc, wanted.cmc)


def test_flipped_features_do_not_depend_on_the_side() -> None:
    mirrored = dataclasses.replace(SPLIT.query, images=SPLIT.query.images.flip(2))
    a, b = (training.embedded(Colours(), pictures, flip=True) for pictures in (SPLIT.query, mirrored))
    torch.testing.assert_close(a, b)
    c, d = (training.embedded(Colours(), pictures) for pictures in (SPLIT.query, mirrored))
    assert not torch.allclose(c, d)


def test_protocol_of_sysu_mm01_is_that_of_a_list() -> None:
    """Check 9 of MID: ranks by identity and the rule of cameras 2 and 3, by brute force on 100 random cases."""
    generator = torch.Generator().manual_seed(9)

    def numbers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    for _ in range(100):
        distances = torch.rand(3, 24, generator=generator, dtype=torch.float64)
        query_ids, gallery_ids = numbers(6, 3), numbers(6, 24)
        query_cameras, gallery_cameras = 3 * (1 + numbers(2, 3)), 1 + numbers(5, 24)
        hits, precisions = [], []
        for q in range(3):
            kept = [g for g in range(24) if not (query_cameras[q] == 3 and gallery_cameras[g] == 2)]
            order = [int(gallery_ids[g]) for g in sorted(kept, key=lambda g: float(distances[q, g]))]
            ranks = [rank for rank, identity in enumerate(order, 1) if identity == query_ids[q]]
            if ranks:
                hits.append(list(dict.fromkeys(order)).index(int(query_ids[q])))
                precisions.append(sum(m / rank for m, rank in enumerate(ranks, 1)) / len(ranks))
        if not hits:
            continue
        labels = (query_ids, gallery_ids, query_cameras, gallery_cameras)
        found = nk.retrieval_metrics(distances, *labels, camera_rule="sysu", ranks_of="identities")
        assert found.map == pytest.approx(sum(precisions) / len(precisions))
        for k in (1, 2, 5):
            assert found.rank(k) == pytest.approx(sum(hit < k for hit in hits) / len(hits))
    one_each = torch.arange(24)
    labels = (query_ids, one_each, query_cameras, torch.ones(24, dtype=torch.int64))
    sysu = nk.retrieval_metrics(distances, *labels, camera_rule="sysu", ranks_of="identities")
    assert sysu.map == nk.retrieval_metrics(distances, *labels, camera_rule="none").map


@pytest.mark.slow
def test_baseline_learns_people() -> None:
    split = retrieval_split(0, train_ids=60, test_ids=30)
    torch.manual_seed(0)
    method = Baseline(ReidNetwork(small_network(8, 64), 60))
    before = evaluate(method, split.query, split.gallery).map
    sampler = IdentitySampler(split.train.ids, identities=8, pictures=4)
    train(method, Batches(split.train, sampler, Augmentation(pad=4)), steps=80, lr=5e-3, schedule="one-cycle")
    after = evaluate(method, split.query, split.gallery).map
    assert before < 0.4
    assert after > before + 0.2
