"""The training loop of all methods of re-identification, and their evaluation.

A `Method` is what a paper adds: losses of a batch, what happens after a step, features at test. `train` does the rest:
optimizer, schedule, mixed precision, several processes, checkpoints, a log. A run that was interrupted after any step
and resumed gives the bits of one that was not.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from neuraldeps_kernels.data.batches import Augmentation, Batch, Batches, Pictures
from neuraldeps_kernels.ops.retrieval import k_reciprocal_rerank
from neuraldeps_kernels.ops.retrieval_metrics import (
    RetrievalMetrics,
    retrieval_metrics,
    retrieval_metrics_from_features,
)
from neuraldeps_kernels.progress import progress_bar, track

Rows = Tensor | slice  # numbers, bool [N] or a slice

FORMAT = 1  # of checkpoints
LAST, BEST, LOG = "last.pt", "best.pt", "log.csv"
OPTIMIZERS = ("adam", "adamw", "sgd")  # sgd: momentum 0.9, Nesterov
SCHEDULES = ("constant", "cosine", "milestones", "one-cycle")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOMENTUM = 0.9
_SHOWN = 300  # characters of an error of torch's
_FLUSH_STEPS = 20  # losses wait on the device so long at most before they are looked at


class Method(nn.Module, ABC):
    """What a paper adds to the loop. All that has to survive a restart is in `state_dict()`.

    Modules and buffers are there by themselves; optimizers of agents and torch.Generator states go through
    `get_extra_state` and `set_extra_state`, as tensors, numbers, strings, lists and dicts (checkpoints are read with
    weights_only). A generator that lives outside `state_dict` is not restored, but torch's and Python's global ones.

    With several processes each has a part of the batch. Gradients are averaged and buffers are those of rank 0; what
    `after_step` changes has to come out alike on all ranks. A module that stays in eval mode says so in `train`.

    `neuraldeps train` makes a subclass as `Subclass(network, *, options)` with a ReidNetwork first, and gives a second
    one as `teacher` where the configuration has one.
    """

    @abstractmethod
    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised, weights applied; progress = step / steps, in 0..1."""

    @abstractmethod
    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        """Features [N, F] at test of images [N, 3, H, W], infrared bool [N]; compared by their cosines."""

    def after_step(self, batch: Batch, progress: float) -> dict[str, float]:
        """After the optimizer's step: momentum teacher, queue, agent. Returns what is logged."""
        return {}

    def trained_parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer; "lr_factor" of a group multiplies the learning rate. Default: one group."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]


@dataclass(frozen=True, eq=False)
class History:
    """What a training logged, a row a step: step (from 1), losses, lr of the first group, what `after_step` returned,
    images_per_s of both streams and all ranks."""

    rows: list[dict[str, float]]
    best: float | None  # best score

    def column(self, name: str) -> list[float]:
        """Values of one column, NaN where a step has none."""
        return [row.get(name, math.nan) for row in self.rows]


# ------------------------------------------------------------------------------------------------ training


def train(
    method: Method,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    optimizer: str = "adam",
    weight_decay: float = 5e-4,
    schedule: str = "constant",
    warm_up: int = 0,
    warm_up_factor: float = 0.01,
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    lr_min: float = 0.0,
    precision: str = "float32",
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    score: Callable[[Method], float] | None = None,
    score_every: int = 500,
    workers: int = 0,
    settings: Mapping[str, Any] | None = None,
    description: str = "training",
) -> History:
    """Trains `method` in place on batches[0], .., batches[steps - 1].

    In a torch.distributed group every rank calls this with the same arguments and gets its part of each batch; rank 0
    writes. SIGINT and SIGTERM, to any of them, end the training after the step at hand, with a checkpoint; a second
    signal ends it at once.

    Args:
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9, Nesterov).
        weight_decay: as `method.trained_parameters` distributes it.
        schedule: of the learning rate by step: "constant", "cosine" down to lr_min, times `decay` at each of
            `milestones`, or "one-cycle" with the maximum lr.
        warm_up: steps of linear growth from warm_up_factor lr to lr, before the schedule (not "one-cycle"); milestones
            count from the first step.
        precision: "float32", or autocast to "bfloat16" or "float16", the latter with scaled losses.
        out: folder for last.pt, best.pt and log.csv; None: nothing is written.
        resume: go on from last.pt in `out`.
        checkpoint_every: steps between checkpoints; there is one at the end, too.
        score: judges the method, higher is better, every `score_every` steps and at the end; the best is kept.
        workers: processes that make batches; 0: this one.
        settings: what else a resumed run has to agree in, such as sizes of the network.
        description: beside the progress bar, which is shown on a terminal.

    Raises:
        ValueError: an option is out of range or unknown; `out` holds a checkpoint although not resumed, or none that
            can be read, or one of other settings; a batch cannot be shared by the ranks; a loss is not finite.
        KeyboardInterrupt, SystemExit: after a signal.
    """
    given = dict(locals())
    _check_options(given)
    rank, ranks = rank_and_ranks()
    device, folder = torch.device(device), None if out is None else Path(out)
    part = batches.of_rank(rank, ranks)
    method.to(device).train()
    updater = _optimizer(optimizer, method.trained_parameters(weight_decay), lr)
    factors = _schedule(updater, schedule, steps, warm_up, warm_up_factor, milestones, decay, lr_min)
    compared = {name: given[name] for name in _COMPARED} | {"method": type(method).__name__, "ranks": ranks}
    compared |= {"batches": batches.settings(), "settings": dict(settings or {})}
    run = _Run(method, updater, factors, precision, device, compared)
    if folder is not None:
        _prepare(folder, resume)
        if resume:
            run.restore(folder / LAST)
    log = _Log(None if folder is None or rank else folder / LOG, run.step)
    loader = DataLoader(
        part,
        batch_size=None,
        sampler=range(run.step, steps),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the global one belongs to the method
        worker_init_fn=_leave_interrupts,
    )
    made = iter(loader)  # before signals are held back: its processes end by them
    ending = 0  # number of a signal
    with _signals_held_back() as arrived, progress_bar() as bar:
        task = bar.add_task(description, total=steps, completed=run.step)
        while run.step < steps and not ending:
            batch = _next(made).to(device)
            log.add(run.step + 1, *run.take_step(batch, run.step / steps), ranks * batch.num_pictures)
            bar.advance(task)
            improved = 0
            if score is not None and not rank and (run.step == steps or run.step % score_every == 0):
                improved = int(run.improved(score(method)))
            ending, improved = run.agreed(arrived[0] if arrived else 0, improved)
            if run.step == steps or ending or improved or run.step % checkpoint_every == 0:
                log.flush()
                run.save(None if rank else folder, best=bool(improved))
    if ending:
        raise KeyboardInterrupt if ending == signal.SIGINT else SystemExit(128 + ending)
    if ranks > 1:
        for buffer in method.buffers():
            dist.broadcast(buffer, 0)
        dist.barrier()  # what rank 0 wrote is there for all
    return History(log.rows, run.best if run.best > -math.inf else None)


_COMPARED = (
    *("steps", "lr", "optimizer", "weight_decay", "precision"),
    *("schedule", "warm_up", "warm_up_factor", "milestones", "decay", "lr_min"),
)


class _Losses(nn.Module):
    """`method.losses` as the forward pass, which DistributedDataParallel wants."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.method.losses(batch, progress)


class _Run:
    """A training between two steps: all that changes from step to step but for the log."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedule: lr_scheduler.LRScheduler,
        precision: str,
        device: torch.device,
        compared: Mapping[str, Any],
    ) -> None:
        self.method, self.optimizer, self.schedule = method, optimizer, schedule
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.casting = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")
        self.compared = json.loads(json.dumps(compared, default=str))  # as they come out of a checkpoint
        self.ranks = compared["ranks"]
        self.step, self.best = 0, -math.inf
        self.losses: nn.Module = _Losses(method)
        if self.ranks > 1:
            self.losses = DistributedDataParallel(self.losses, find_unused_parameters=True)
            self.hosts = dist.new_group(backend="gloo")  # what ranks tell each other need not wait for the device

    def agreed(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks."""
        largest = torch.tensor(numbers)
        if self.ranks > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.hosts)
        return largest.tolist()

    def take_step(self, batch: Batch, progress: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Trains on a batch; returns losses and what else is logged."""
        with self.casting:
            losses: dict[str, Tensor] = self.losses(batch, progress)
        self.optimizer.zero_grad()
        self.scaler.scale(torch.stack([loss.float() for loss in losses.values()]).sum()).backward()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():  # of a first step that the scaler left out
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.schedule.step()
        found = self.method.after_step(batch, progress)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}, {"lr": lr, **found}

    def improved(self, score: float) -> bool:
        """Whether a score is the best so far."""
        better = score > self.best
        self.best = max(self.best, score)
        return better

    def save(self, folder: Path | None, *, best: bool) -> None:
        """Writes last.pt, and best.pt if `best`; ranks without a folder only tell their random numbers."""
        states: list[Any] = [_random_state()]
        if self.ranks > 1:
            states = states * self.ranks
            dist.all_gather_object(states, _random_state(), self.hosts)
        if folder is None:
            return
        content = {
            "format": FORMAT,
            "compared": self.compared,
            "step": self.step,
            "best": self.best,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
        }
        for name in (LAST, BEST) if best else (LAST,):
            _write(content, folder / name)

    def restore(self, path: Path) -> None:
        """Takes the state of a checkpoint of the same settings."""
        content = load_checkpoint(path)
        try:
            for name, (there, here) in _differences(content["compared"], self.compared).items():
                raise ValueError(f"{path}: is of a training with {name} = {there}, not {here}")
            self.method.load_state_dict(content["method"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.scaler.load_state_dict(content["scaler"])
            self.step, self.best = content["step"], content["best"]
            _set_random_state(content["random"][rank_and_ranks()[0]])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: does not fit the training: {shorten(str(error), _SHOWN)}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of last.pt or best.pt, on the CPU; "method" is the state_dict of the Method, "step" the steps done.

    Raises ValueError where the file is missing, cannot be read, or is no checkpoint of this format.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes zip and pickle raise
        reason = shorten(str(error), _SHOWN) or type(error).__name__
        raise ValueError(f"{path}: is no checkpoint that can be read: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, found {found}")
    return content


def _write(content: dict[str, Any], path: Path) -> None:
    """Replaces the file in one step."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _prepare(folder: Path, resume: bool) -> None:
    if resume and not (folder / LAST).is_file():
        raise ValueError(f"{folder}: has no {LAST} to resume from")
    if not resume and (folder / LAST).exists():
        raise ValueError(f"{folder}: holds a training already; resume it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values that two nested dicts do not share, by their path."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*here, *(name for name in there if name not in here)]:
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{name}.{inner}": pair for inner, pair in _differences(a, b).items()}
        elif a != b:
            found[name] = (a, b)
    return found


def _random_state() -> dict[str, Any]:
    """Of the global generators of torch and Python."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rank_and_ranks() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_all_ranks(rows: Tensor) -> Tensor:
    """Rows [n, ...] of each process, one after the other; every process has as many."""
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ optimisation


def _check_options(given: Mapping[str, Any]) -> None:
    for name, known in {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": tuple(PRECISIONS)}.items():
        if given[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {given[name]!r}")
    for name in ("steps", "checkpoint_every", "score_every"):
        if given[name] < 1:
            raise ValueError(f"{name} must be positive, not {given[name]}")
    if not 0 < given["lr"] < math.inf:
        raise ValueError(f"lr must be positive, not {given['lr']}")
    if not 0 <= given["warm_up"] < given["steps"]:
        raise ValueError(f"warm_up must be in 0..{given['steps'] - 1}, less than steps, not {given['warm_up']}")
    if given["warm_up"] and given["schedule"] == "one-cycle":
        raise ValueError("warm_up does not go with the schedule one-cycle, which has its own")
    if given["schedule"] == "milestones" and min(given["milestones"], default=math.inf) < given["warm_up"]:
        raise ValueError(f"milestones must lie behind warm_up = {given['warm_up']}, not {list(given['milestones'])}")
    if not 0 < given["warm_up_factor"] <= 1:
        raise ValueError(f"warm_up_factor must be in (0, 1], not {given['warm_up_factor']}")
    if given["resume"] and given["out"] is None:
        raise ValueError("resume needs out, the folder of the checkpoint")


def _optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    groups = [{**group, "lr": lr * group.get("lr_factor", 1.0)} for group in groups if len(list(group["params"]))]
    for group in groups:
        group.pop("lr_factor", None)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True)
    return (torch.optim.Adam if name == "adam" else torch.optim.AdamW)(groups, lr=lr)


def _schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    steps: int,
    warm_up: int,
    warm_up_factor: float,
    milestones: Sequence[int],
    decay: float,
    lr_min: float,
) -> lr_scheduler.LRScheduler:
    if name == "one-cycle":
        return lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    after: lr_scheduler.LRScheduler
    if name == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up, lr_min)
    else:
        turns = sorted(step - warm_up for step in milestones) if name == "milestones" else []
        after = lr_scheduler.MultiStepLR(optimizer, turns, decay)
    if not warm_up:
        return after
    growth = lr_scheduler.LinearLR(optimizer, warm_up_factor, total_iters=warm_up)
    return lr_scheduler.SequentialLR(optimizer, [growth, after], [warm_up])


# ------------------------------------------------------------------------------------------------ log, signals


class _Log:
    """Rows of a training in memory and in a CSV file, looked at every few steps so that the device need not wait."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self._pictures, self._since = 0, time.perf_counter()
        self.rows: list[dict[str, float]] = []
        self._waiting: list[tuple[int, dict[str, Tensor], dict[str, Any]]] = []
        self._columns: list[str] = []
        if path is not None and step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                kept = itertools.islice(csv.DictReader(file), step)  # a row a step
                self.rows = [{name: float(value) for name, value in row.items() if value} for row in kept]
            for row in self.rows:
                row["step"] = int(row["step"])
        self._rewrite()

    def add(self, step: int, losses: dict[str, Tensor], others: dict[str, Any], pictures: int) -> None:
        self._waiting.append((step, losses, others))
        self._pictures += pictures
        if len(self._waiting) >= _FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Raises ValueError for a loss that is not finite."""
        now = time.perf_counter()
        rate = self._pictures / max(now - self._since, 1e-9)
        rows = []
        for step, losses, others in self._waiting:
            rows.append({"step": step, **{name: float(x) for name, x in (losses | others).items()}})
            if wrong := [name for name in losses if not math.isfinite(rows[-1][name])]:
                raise ValueError(f"{wrong[0]} is {rows[-1][wrong[0]]} in step {step}; a lower lr may help")
            rows[-1]["images_per_s"] = rate
        self._waiting, self._pictures, self._since = [], 0, now
        self.rows += rows
        if any(name not in self._columns for row in rows for name in row):
            self._rewrite()
        elif self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(rows)

    def _rewrite(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if self.path is not None:
            with self.path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(self.rows)


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes; those that make batches leave it to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _next(made: Iterator[Batch]) -> Batch:
    """The next batch; an error of a worker process without the trace of its calls."""
    try:
        return next(made)
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


@contextmanager
def _signals_held_back() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to; a second one acts at once. Other threads than the main one: none."""
    arrived: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def embedded(
    method: Method,
    pictures: Pictures,
    *,
    augmentation: Augmentation | None = None,
    flip: bool = False,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Features float32 [N, F] of length 1, on the CPU, in eval mode.

    Args:
        augmentation: that of the training; its mean and std count.
        flip: mean of the features of a picture and of its mirror image.
        progress: with a bar on a terminal.
    """
    augmentation = Augmentation() if augmentation is None else augmentation
    device, training = next(method.parameters()).device, method.training
    method.eval()
    chunks, found = torch.arange(len(pictures)).split(batch_size), []
    try:
        for rows in track(chunks, "features", len(chunks)) if progress else chunks:
            images = augmentation.original(pictures.images[rows]).to(device)
            infrared = pictures.infrared[rows].to(device)
            features = normalize(method.embed(images, infrared).float(), dim=1)
            if flip:
                features = normalize(features + normalize(method.embed(images.flip(3), infrared).float(), dim=1), dim=1)
            found.append(features.cpu())
    finally:
        method.train(training)
    return torch.cat(found)


def ranked(
    x: Tensor,
    y: Tensor,
    query: Pictures,
    gallery: Pictures,
    rows: tuple[Rows, Rows] = (slice(None), slice(None)),
    *,
    rerank: bool = False,
    **protocol: Any,
) -> RetrievalMetrics:
    """Metrics of features x [nq, F] and y [ng, F] of length 1.

    Args:
        rows: of queries and of the gallery that count.
        rerank: by k-reciprocal neighbours.
        protocol: keywords of `retrieval_metrics`.
    """
    x, y, (q, g) = x[rows[0]], y[rows[1]], rows
    labels = (query.ids[q], gallery.ids[g], query.cameras[q], gallery.cameras[g])
    if not rerank:
        return retrieval_metrics_from_features(x, y, *labels, **protocol)
    distances = k_reciprocal_rerank(x, y)
    assert isinstance(distances, Tensor)
    return retrieval_metrics(distances, *labels, **protocol)


def evaluate(
    method: Method,
    query: Pictures,
    gallery: Pictures,
    protocol: Mapping[str, Any] | None = None,
    *,
    rerank: bool = False,
    augmentation: Augmentation | None = None,
    flip: bool = False,
    batch_size: int = 256,
) -> RetrievalMetrics:
    """Ranks a gallery for every query by the cosine of features.

    Args:
        protocol: keywords of `retrieval_metrics`, such as `ReidFolders.protocol`.
        rerank: by k-reciprocal neighbours.
        augmentation, flip, batch_size: as `embedded`.

    Raises:
        ValueError: there are no pictures, or features are not finite.
    """
    x, y = (
        embedded(method, pictures, augmentation=augmentation, flip=flip, batch_size=batch_size)
        for pictures in (query, gallery)
    )
    return ranked(x, y, query, gallery, rerank=rerank, **(protocol or {}))
