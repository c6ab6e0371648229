"""`neuraldeps train`: trains a model of re-identification by a configuration and evaluates it.

A configuration is a TOML file of tables, each a set of keywords; unknown ones are errors:

    [data]          height, width, options of the data set's reader and, for SYSU-MM01, `draws` of its gallery; for
                    rendered pedestrians `split` and the options of that function in data/pedestrian_splits.py
    [batches]       `batch_options`
    [augmentation]  data.batches.Augmentation
    [network]       `network_options`; [teacher] the same, for methods that take a teacher
    [method]        options of the model's class
    [training]      models.training.train; `epochs` instead of `steps` counts passes over as many pictures as there are,
                    and warm_up and milestones with it
    [evaluation]    `evaluation_options`
    [start]         "part of the method" = "file of a checkpoint:part of its method": parameters to start from
    [[stages]]      trainings one after the other: `name`, `model`, and tables whose keys replace those above; [start]
                    may name an earlier stage instead of a file. The last one is evaluated.

Presets are in models/configs: MODEL.toml, and MODEL-synthetic.toml for rendered pedestrians.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import statistics
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.table import Table
from torch import Tensor

from neuraldeps_kernels.analysis.formatting import json_text, without_nan
from neuraldeps_kernels.cli.output import console, messages
from neuraldeps_kernels.data import pedestrian_splits, reid_folders
from neuraldeps_kernels.data.batches import (
    Augmentation,
    Batches,
    FolderImages,
    IdentitySampler,
    Pictures,
    UniformSampler,
)
from neuraldeps_kernels.data.pedestrian_splits import PedestrianSplit
from neuraldeps_kernels.data.reid_folders import ReidFolders, ReidSplit
from neuraldeps_kernels.models import training
from neuraldeps_kernels.models.reid_network import ReidNetwork, resnet, small_network
from neuraldeps_kernels.models.training import LAST, Method, Rows, embedded, load_checkpoint, ranked
from neuraldeps_kernels.ops.retrieval_metrics import RetrievalMetrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = {  # module under models, class
    "baseline": ("baseline", "Baseline"),
    "mid": ("mid", "MID"),
    "up-reid": ("up_reid", "UPReID"),
    "sskd": ("sskd", "SSKD"),
    "pgfl-kd": ("pgfl_kd", "PGFLKD"),
}
SPLITS: dict[str, Callable[..., PedestrianSplit]] = {
    "retrieval": pedestrian_splits.retrieval_split,
    "occlusion": pedestrian_splits.occlusion_split,
    "cross-modality": pedestrian_splits.cross_modality_split,
    "pretraining": pedestrian_splits.pretraining_split,
    "generalization": pedestrian_splits.generalization_split,
}
READERS: dict[str, Callable[..., ReidFolders]] = {
    "market1501": reid_folders.read_market1501,
    "dukemtmc": reid_folders.read_dukemtmc,
    "msmt17": reid_folders.read_msmt17,
    "sysu-mm01": reid_folders.read_sysu_mm01,
    "regdb": reid_folders.read_regdb,
}
INFRARED_CAMERAS = {"sysu-mm01": reid_folders.SYSU_QUERY_CAMERAS, "regdb": (2,)}
SYNTHETIC = "synthetic"
METRICS = "metrics.json"
TABLES = ("data", "batches", "augmentation", "network", "teacher", "method", "training", "evaluation", "start")
SHOWN_RANKS = (1, 5, 10)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def models() -> list[str]:
    """Names of the models whose module is there."""
    return [name for name, (module, _) in MODELS.items() if importlib.util.find_spec(_module(module))]


def _module(name: str) -> str:
    return f"neuraldeps_kernels.models.{name}"


def train(
    model: Annotated[str, typer.Argument(metavar="|".join(models()), help="What to train.")],
    dataset: Annotated[str, typer.Option(help="Layout of --data.", metavar="|".join((*READERS, SYNTHETIC)))],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and metrics.json.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set; none for synthetic.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; default: the preset of model and data set.")] = None,
    unlabelled: Annotated[
        Path | None, typer.Option(help="Folder of pictures without labels, for sskd, up-reid.")
    ] = None,
    joints: Annotated[Path | None, typer.Option(help=".npz file of joints of the training pictures.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File of torchvision's parameters of the ResNet that is evaluated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option(help="Default: that of the configuration.", metavar="|".join(training.PRECISIONS))
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches; 0: none beside this one.")] = 0,
    rerank: Annotated[bool, typer.Option("--rerank", help="Also metrics with k-reciprocal re-ranking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON instead of a table.")] = False,
) -> None:
    """Train a model of person re-identification and evaluate it. Under torchrun all processes share each batch."""
    place = _Place.of(device)
    stages = read_config(model, dataset, config)
    last = stages[-1]
    judging = _keywords(evaluation_options, last.tables["evaluation"], "evaluation", last.source)
    _check_out(out, stages[0], resume)
    place.wait()  # before the first one writes there
    reid_set = read_set(dataset, data, last, seed, unlabelled, joints)
    num_ids = len(reid_set.train.ids.unique())
    runs = []
    for number, stage in enumerate(stages):  # what is wrong with a later one shows before the first is trained
        if weights is not None and stage.tables["network"].get("depth") == last.tables["network"].get("depth"):
            stage.tables["network"] = {**stage.tables["network"], "weights": str(weights)}
        batches = make_batches(reid_set, stage, seed)
        torch.manual_seed(1009 * seed + number)
        runs.append((stage, batches, make_method(stage, num_ids), training_options(stage, batches)))
    checkpoints = {stage.name: out / stage.name / LAST for stage in stages}
    for stage, batches, method, options in runs:
        start(method, stage, checkpoints)
        torch.manual_seed(seed)
        try:
            training.train(
                method,
                batches,
                **(options if precision is None else {**options, "precision": precision}),
                device=place.device,
                out=out / stage.name,
                resume=checkpoints[stage.name].is_file(),
                workers=workers,
                settings={"dataset": dataset, "seed": seed, **stage.content()},
                description=stage.name or model,
            )
        except (KeyboardInterrupt, SystemExit):
            messages().print(f"stopped; --resume goes on from {checkpoints[stage.name]}", soft_wrap=True)
            raise
    _, batches, method, _ = runs[-1]
    if place.rank == 0:
        found = judged(method, reid_set, batches.augmentation, rerank, **judging)
        content = {"model": model, "dataset": dataset, "seed": seed, **summary(found)}
        content["stages"] = [stage.content() for stage in stages]
        (out / METRICS).write_text(json_text(content), encoding="utf-8")
        messages().print(f"wrote {out}", soft_wrap=True)
        if as_json:
            typer.echo(json_text(content), nl=False)
        else:
            console().print(_table(content))
    place.wait(leave=True)


def _check_out(out: Path, first: Stage, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} exists and is not a folder")
    if resume and not (out / first.name / LAST).is_file():
        raise ValueError(f"--out {out} holds no checkpoint to resume from")
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; add --resume to go on with it, or choose another folder")


@dataclass(frozen=True)
class _Place:
    """Where this process works: alone, or as a rank of torchrun's group."""

    device: torch.device
    rank: int

    @classmethod
    def of(cls, device: str) -> _Place:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device {device!r} is none that torch knows") from error
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: torch finds no CUDA device")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(chosen, 0)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(chosen, dist.get_rank())

    def wait(self, *, leave: bool = False) -> None:
        """Until all are here; they may part then."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            if leave:
                dist.destroy_process_group()


def _table(content: Mapping[str, Any]) -> Table:
    """mAP, mINP and ranks in percent, over trials with their standard deviation."""
    names = ("mAP", "mINP", *(f"rank-{k}" for k in SHOWN_RANKS))
    table = Table("", *names)
    for row, values in ((name, content[name]) for name in ("original", "reranked") if name in content):
        spread = values.get("standard_deviation")
        cells = [
            f"{100 * values[n]:.1f} ± {100 * spread[n]:.1f}" if spread else f"{100 * values[n]:.2f}" for n in names
        ]
        table.add_row(row, *cells)
    trials = f", mean ± deviation of {values['trials']} trials" if spread else ""
    table.caption = f"percent{trials}; {values['valid_queries']} of {values['queries']} queries valid"
    return table


# ------------------------------------------------------------------------------------------------ configuration


@dataclass
class Stage:
    """One training of a configuration."""

    name: str  # "" for the only one; folder under --out
    model: str
    tables: dict[str, dict[str, Any]]
    source: str  # where the configuration is from, for errors

    def content(self) -> dict[str, Any]:
        """For records: name, model and the tables that are not empty."""
        return {"name": self.name, "model": self.model} | {name: table for name, table in self.tables.items() if table}


def read_config(model: str, dataset: str, path: Path | None) -> list[Stage]:
    """The trainings that a configuration asks for.

    Raises ValueError for an unknown model or data set, a file that cannot be read, and unknown tables and keys.
    """
    _choose("model", model, models())
    _choose("dataset", dataset, [*READERS, SYNTHETIC])
    if path is None:
        name = f"{model}-synthetic" if dataset == SYNTHETIC else model
        path = Path(training.__file__).with_name("configs") / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    listed = content.pop("stages", [{}])
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"{path}: stages must be written as [[stages]]")
    stages = []
    for entry in listed:
        own = {"name": entry.pop("name", ""), "model": entry.pop("model", model)}
        for name, table in (*content.items(), *entry.items()):
            if name not in TABLES or not isinstance(table, dict):
                raise ValueError(f"{path}: unknown table or key {name!r}; known tables: {', '.join(TABLES)}, stages")
        _choose(f"{path}: model", own["model"], models())
        tables = {name: {**content.get(name, {}), **entry.get(name, {})} for name in TABLES}
        stages.append(Stage(**own, tables=tables, source=str(path)))
    if len(stages) > 1 and len({stage.name for stage in stages} - {""}) < len(stages):
        raise ValueError(f"{path}: each of several stages needs a name of its own")
    return stages


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _keywords(
    function: Callable[..., Any], table: Mapping[str, Any], name: str, source: str, *, without: Sequence[str] = ()
) -> dict[str, Any]:
    """The entries of a table as keywords of a function, checked against its signature and annotations."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    parameters = inspect.signature(function).parameters.values()
    keywords = parameters if is_dataclass(function) else [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    known = [p.name for p in keywords if p.name not in without]
    result = {}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r} in [{name}]; known: {', '.join(known) or 'none'}")
        if isinstance(value, list):
            value = tuple(value)
        if not _fits(value, hints.get(key, Any)):
            raise ValueError(f"{source}: {key} in [{name}] must be {_words(hints[key])}, not {value!r}")
        result[key] = float(value) if hints.get(key) is float else value
    return result


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if isinstance(value, tuple):
        return hint is Any or (isinstance(origin, type) and issubclass(tuple, origin)) or origin is Sequence
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint not in (bool, str) or isinstance(value, hint)


def _words(hint: Any) -> str:
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}.get(hint, str(hint))


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, eq=False)
class ReidSet:
    """Pictures to train and to test on."""

    train: Pictures
    query: Pictures
    gallery: Pictures
    protocol: Mapping[str, Any]  # keywords of `retrieval_metrics`
    unlabelled: Pictures | None
    trials: Sequence[tuple[Rows, Rows]]  # of queries and of the gallery, each judged by itself


def read_set(
    dataset: str, root: Path | None, stage: Stage, seed: int, unlabelled: Path | None, joints: Path | None
) -> ReidSet:
    """The data set `dataset` in the folder `root`, by the table [data] of a configuration."""
    if dataset == SYNTHETIC:
        for option, value in {"--data": root, "--unlabelled": unlabelled, "--joints": joints}.items():
            if value is not None:
                raise ValueError(f"{option} does not go with --dataset synthetic")
        return _rendered(stage, seed)
    if root is None:
        raise ValueError(f"--dataset {dataset} needs --data, its folder")
    others = dict(stage.tables["data"])
    size = {"height": others.pop("height", 256), "width": others.pop("width", 128)}
    draws = others.pop("draws", 10) if dataset == "sysu-mm01" else 0
    options = _keywords(READERS[dataset], others, "data", stage.source)
    folders = READERS[dataset](root, **(options | ({"shots": None} if draws else {})))

    def pictures(split: ReidSplit, **more: Any) -> FolderImages:
        return FolderImages(split, **size, infrared_cameras=INFRARED_CAMERAS.get(dataset, ()), **more)

    everything = slice(None)
    return ReidSet(
        pictures(folders.train, joints=joints),
        pictures(folders.query),
        pictures(folders.gallery),
        folders.protocol,
        None if unlabelled is None else pictures(_unlabelled_split(unlabelled)),
        [(everything, _drawn_rows(root, folders.gallery, options, trial)) for trial in range(draws)]
        or [(everything, everything)],
    )


def _rendered(stage: Stage, seed: int) -> ReidSet:
    """A set of data/pedestrian_splits.py; where several domains are tested on, each by itself."""
    others = dict(stage.tables["data"])
    name = others.pop("split", "retrieval")
    _choose("split in [data]", name, list(SPLITS))
    split = SPLITS[name](seed, **_keywords(SPLITS[name], others, "data", stage.source))
    domains = split.query.domains.unique()
    trials = [(split.query.domains == domain, split.gallery.domains == domain) for domain in domains]
    return ReidSet(split.train, split.query, split.gallery, {}, split.unlabelled, trials)


def _drawn_rows(root: Path, gallery: ReidSplit, options: Mapping[str, Any], trial: int) -> Tensor:
    """Rows of SYSU-MM01's whole gallery that are in its gallery number `trial`."""
    place = {path: row for row, path in enumerate(gallery.paths)}
    drawn = reid_folders.read_sysu_mm01(root, **{"shots": 1, **options, "trial": trial}).gallery
    return torch.tensor([place[path] for path in drawn.paths])


def _unlabelled_split(folder: Path) -> ReidSplit:
    paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES))
    if not paths:
        raise ValueError(f"--unlabelled {folder}: has no pictures")
    return ReidSplit(paths, torch.arange(len(paths)), torch.zeros(len(paths), dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ parts of a stage


def make_batches(reid_set: ReidSet, stage: Stage, seed: int) -> Batches:
    """Batches of a stage, by its tables [batches] and [augmentation]."""
    augmentation = Augmentation(**_keywords(Augmentation, stage.tables["augmentation"], "augmentation", stage.source))
    options = _keywords(batch_options, stage.tables["batches"], "batches", stage.source)
    return batch_options(reid_set, augmentation, seed, **options)


def batch_options(
    reid_set: ReidSet,
    augmentation: Augmentation,
    seed: int,
    *,
    identities: int = 16,
    pictures: int = 4,
    infrared_pictures: int = 0,
    views: int = 0,
    size: int = 0,
    unlabelled_size: int = 0,
) -> Batches:
    """Batches of labelled pictures or, with size > 0, of so many without labels: the unlabelled ones if there are any.

    Args:
        identities, pictures, infrared_pictures: of IdentitySampler.
        views: augmented views of each picture beside it.
        unlabelled_size: pictures of the unlabelled stream; 0: none.
    """
    train, other = reid_set.train, reid_set.unlabelled
    if size:
        source = train if other is None else other
        return Batches(source, UniformSampler(len(source), size=size, seed=seed), augmentation, views=views, seed=seed)
    stream = None
    if unlabelled_size:
        if other is None:
            raise ValueError("the configuration takes unlabelled pictures: give their folder by --unlabelled")
        stream = Batches(
            other, UniformSampler(len(other), size=unlabelled_size, seed=seed), augmentation, seed=seed + 1
        )
    sampler = IdentitySampler(
        train.ids,
        identities=identities,
        pictures=pictures,
        infrared=train.infrared,
        infrared_pictures=infrared_pictures,
        seed=seed,
    )
    return Batches(train, sampler, augmentation, views=views, unlabelled=stream, seed=seed)


def network_options(
    num_ids: int,
    *,
    kind: str = "resnet",
    depth: int = 50,
    last_stride: int = 1,
    weights: str | None = None,
    width: int = 16,
    feature: int = 128,
    pooling: str = "mean",
) -> ReidNetwork:
    """A "resnet" of a depth, its weights from a file or random, or a "small" network of width and feature."""
    _choose("kind in [network]", kind, ("resnet", "small"))
    if kind == "small" and weights is not None:
        raise ValueError("weights are those of a ResNet, but the configuration has a small network")
    backbone = (
        small_network(width, feature) if kind == "small" else resnet(depth, last_stride=last_stride, weights=weights)
    )
    return ReidNetwork(backbone, num_ids, pooling=pooling)


def make_method(stage: Stage, num_ids: int) -> Method:
    """The Method of a stage, with random parameters or those of [network].weights."""
    module, name = MODELS[stage.model]
    made: Callable[..., Method] = getattr(importlib.import_module(_module(module)), name)
    networks = {
        table: network_options(num_ids, **_keywords(network_options, stage.tables[table], table, stage.source))
        for table in ("network", "teacher")
        if table == "network" or stage.tables[table]
    }
    return made(**networks, **_keywords(made, stage.tables["method"], "method", stage.source, without=list(networks)))


def start(method: Method, stage: Stage, checkpoints: Mapping[str, Path]) -> None:
    """Loads what [start] names into parts of a method; `checkpoints` are those of stages, by name."""
    for part, origin in stage.tables["start"].items():
        place, _, source = str(origin).rpartition(":")
        path, prefix = checkpoints.get(place, Path(place)), f"{source}." if source else ""
        state = load_checkpoint(path)["method"]
        chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        try:
            method.get_submodule(part).load_state_dict(chosen)
        except (AttributeError, RuntimeError) as error:
            reason = shorten(str(error), 300)
            raise ValueError(f"{path}: its part {source!r} does not fit {part!r} of the model: {reason}") from error


def training_options(stage: Stage, batches: Batches) -> dict[str, Any]:
    """Keywords of `models.training.train` by the table [training], epochs turned into steps."""
    table = dict(stage.tables["training"])
    epochs = table.pop("epochs", None)
    without = ("device", "out", "resume", "score", "score_every", "workers", "settings", "description")
    options = _keywords(training.train, {"steps": 1, **table}, "training", stage.source, without=without)
    if (epochs is None) == ("steps" not in table) or not _fits(epochs, int | None):
        raise ValueError(f"{stage.source}: [training] needs a whole number of epochs or of steps, and not both")
    if "lr" not in table:
        raise ValueError(f"{stage.source}: [training] needs lr")
    if epochs is not None:
        pictures = sum(part.numel() for part in batches.sampler[0])
        epoch = -(-len(batches.pictures) // pictures)  # steps
        options["steps"] = epochs * epoch
        options["warm_up"] = options.get("warm_up", 0) * epoch
        options["milestones"] = tuple(epoch * turn for turn in options.get("milestones", ()))
    return options


# ------------------------------------------------------------------------------------------------ evaluation


def evaluation_options(*, flip: bool = False, batch_size: int = 256) -> dict[str, Any]:
    """How features are taken: also of mirror images, in batches."""
    return {"flip": flip, "batch_size": batch_size}


def judged(
    method: Method, reid_set: ReidSet, augmentation: Augmentation, rerank: bool, **options: Any
) -> dict[str, list[RetrievalMetrics]]:
    """Metrics of each trial, and re-ranked ones if asked for."""
    options = evaluation_options(**options)
    query, gallery = (
        embedded(method, pictures, augmentation=augmentation, progress=True, **options)
        for pictures in (reid_set.query, reid_set.gallery)
    )
    return {
        name: [
            ranked(query, gallery, reid_set.query, reid_set.gallery, rows, rerank=again, **reid_set.protocol)
            for rows in reid_set.trials
        ]
        for name, again in {"original": False, "reranked": True}.items()
        if rerank or not again
    }


def summary(found: Mapping[str, Sequence[RetrievalMetrics]]) -> dict[str, Any]:
    """JSON-able means of mAP, mINP and ranks over trials, and where there are several their standard deviations."""
    content: dict[str, Any] = {}
    for name, trials in found.items():
        values = {"mAP": [m.map for m in trials], "mINP": [m.minp for m in trials]}
        values |= {f"rank-{k}": [m.rank(k) for m in trials] for k in SHOWN_RANKS}
        content[name] = {key: statistics.fmean(row) for key, row in values.items()}
        counts = {"queries": sum(len(m.ap) for m in trials), "valid_queries": sum(m.num_valid for m in trials)}
        content[name] |= {**counts, "trials": len(trials)}
        if len(trials) > 1:
            content[name]["standard_deviation"] = {key: statistics.stdev(row) for key, row in values.items()}
    return without_nan(content)  # type: ignore[no-any-return]
