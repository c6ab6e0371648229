"""CMC, mAP and mINP of re-identification against the evaluators in use: microseconds a query.

Distances are those of clustered features: identities around centres, a bias of each camera, 30 % distractors. Errors
are absolute, of the mAP against a stable float64 sort (the PyTorch reference). The peers sort every row and sum in
float32, but for "loop", the algorithm as it is published with them, in NumPy. Peers come from PyPI, unmodified:
torchmetrics, pytorch-metric-learning and Cython by the extra `bench`, fast-reid and torchreid by `pip install --no-deps
fastreid pyppbox-torchreid`. Of the last two the Cython evaluators are loaded alone: their packages pin old versions or
bring another torch.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import neuraldeps_kernels as nk
from benchmarks.harness import Budget, Case, Contender, Missing, Rates, Recipe, measured_rates
from neuraldeps_kernels.ops import retrieval_metrics as ops
from neuraldeps_kernels.reference import retrieval_metrics as reference

# Name, queries, gallery, noise of the features: mAP 0.85 as of good networks, and 0.2.
SIZES = [
    ("small", 500, 2000, 2.0),
    ("medium", 1000, 5000, 2.0),
    ("Market-1501", 3368, 15913, 2.0),
    ("Market-1501, hard", 3368, 15913, 3.0),
]
DIMENSION, CAMERAS = 512, 6
GOALS = {"fast-reid Cython": 30.0, "torchreid Cython": 40.0}  # at the size of Market-1501
TORCHMETRICS_QUERIES = 500
SUFFIXES = tuple(importlib.machinery.EXTENSION_SUFFIXES)


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """From matrices by size, then from features; one thread."""
    for size in SIZES[: 2 if budget.quick else None]:
        yield Recipe(f"retrieval_metrics {size[0]}", lambda size=size: _matrix_case(*size))  # type: ignore[misc]
    for label, *size in SIZES[: 1 if budget.quick else 3]:
        name = f"features {label}"
        yield Recipe(f"retrieval_metrics {name}", lambda name=name, size=size: _feature_case(name, *size))  # type: ignore[misc]
    name, size = "features small, no cameras", SIZES[0][1:]
    yield Recipe(f"retrieval_metrics {name}", lambda: _feature_case(name, *size, cameras=False))


def clustered(
    count: int, identities: int, noise: float, distractors: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [count, DIMENSION] of unit length, ids (-1: distractor) and cameras."""
    shared = torch.Generator().manual_seed(0)
    centres, biases = (torch.randn(rows, DIMENSION, generator=shared) for rows in (identities, CAMERAS))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(count) % identities
    cameras = torch.randint(CAMERAS, (count,), generator=generator)
    other = torch.arange(count) >= count * (1 - distractors)
    strength = torch.where(other, 0.6, 1.0)[:, None]  # distractors look a little like somebody
    x = strength * centres[ids] + 0.35 * biases[cameras] + noise * torch.randn(count, DIMENSION, generator=generator)
    return torch.nn.functional.normalize(x), torch.where(other, -1, ids), cameras


def _data(nq: int, ng: int, noise: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    query, query_ids, query_cameras = clustered(nq, nq // 4, noise, 0.0, 1)
    gallery, gallery_ids, gallery_cameras = clustered(ng, nq // 4, noise, 0.3, 2)
    shuffled = torch.randperm(ng, generator=torch.Generator().manual_seed(3))
    return query, gallery[shuffled], [query_ids, gallery_ids[shuffled], query_cameras, gallery_cameras[shuffled]]


def _exact(distances: Tensor, labels: list[Tensor]) -> float:
    """mAP by stable sorts in float64."""
    options = ops._Options(50, "standard", "valid", "same", "all", "images", 1, 0)
    rules = ops._rules(options, distances, *distances.shape, *[*labels, None, None][:4], None)  # type: ignore[arg-type]
    return float(reference.retrieval_metrics(distances, *rules.arguments(), "standard")[0].nanmean())  # type: ignore[arg-type]


def _matrix_case(name: str, nq: int, ng: int, noise: float) -> Case:
    query, gallery, labels = _data(nq, ng, noise)
    distances = torch.addmm(torch.ones(()), query, gallery.T, beta=2, alpha=-2)
    exact = _exact(distances, labels)
    goals = GOALS if name.startswith("Market-1501") else {}

    def error(mean: Any) -> float:
        return abs(float(mean) - exact)

    def ours() -> float:
        return nk.retrieval_metrics(distances, *labels).map

    peers: list[Contender | Missing] = []
    for peer, load in EVALUATORS.items():
        try:
            run = load(distances.numpy(), [x.numpy() for x in labels])
        except ImportError as problem:
            peers.append(Missing(peer, str(problem)))
            continue
        peers.append(Contender(peer, run, nq, error, 1e-5, goals.get(peer)))
    rates = measured_rates(1, distances.nbytes, torch.float32)
    return Case(
        f"retrieval_metrics {name}",
        {"nq": nq, "ng": ng, "noise": noise},
        ours=Contender("ours", ours, nq, error, 1e-12),
        peers=peers,
        bytes=4.0 * ng,
        rates=Rates(rates.copy, rates.gemm),
        facts={"mAP": round(exact, 4)},
    )


def _feature_case(name: str, nq: int, ng: int, noise: float, cameras: bool = True) -> Case:
    """Without a matrix, against the matrix and ours; without cameras also against a package that takes features."""
    query, gallery, labels = _data(nq, ng, noise)
    labels = labels if cameras else labels[:2]
    exact = _exact(2 - 2 * query.double() @ gallery.double().T, labels)

    def ours() -> float:
        return nk.retrieval_metrics_from_features(query, gallery, *labels).map

    def matrix() -> float:
        return nk.retrieval_metrics(torch.addmm(torch.ones(()), query, gallery.T, beta=2, alpha=-2), *labels).map

    def error(mean: Any) -> float:
        return abs(float(mean) - exact)

    peers: list[Contender | Missing] = []
    if not cameras:
        peer = "pytorch-metric-learning"
        try:
            peers = [Contender(peer, _metric_learning(query, gallery, *labels), nq, error, 1e-5)]
        except ImportError as problem:
            peers = [Missing(peer, str(problem))]
    return Case(
        f"retrieval_metrics {name}",
        {"nq": nq, "ng": ng, "D": DIMENSION, "cameras": cameras},
        ours=Contender("ours, certified", ours, nq, error, 1e-9),
        variants=[Contender("float32 matrix, ours", matrix, nq, error, 1e-3)],
        peers=peers,
        flops=2.0 * ng * DIMENSION,
        rates=measured_rates(1, 1 << 26, torch.float32),
        facts={"mAP": round(exact, 4)},
    )


# ------------------------------------------------------------------------------------------------ peers

Run = Callable[[], Any]
Labels = list[np.ndarray]  # query and gallery ids, query and gallery cameras


def _file(distribution: str, *suffixes: str) -> Path:
    """The file of an installed distribution that ends so."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{distribution} is not installed") from error
    found = [file for file in files if str(file).endswith(suffixes) and "rank_cy" in file.name]
    if not found:
        raise ImportError(f"{distribution} {importlib.metadata.version(distribution)} has no {' or '.join(suffixes)}")
    return Path(str(found[0].locate()))


def _torchreid(distances: np.ndarray, labels: Labels) -> Run:
    return _cython_run(_extension(_file("pyppbox-torchreid", *SUFFIXES)), distances, labels)


def _fastreid(distances: np.ndarray, labels: Labels) -> Run:
    """Compiled as its Makefile does, from the source in its wheel."""
    if importlib.util.find_spec("Cython") is None:
        raise ImportError("cython, which compiles it, is not installed")
    folder = Path(tempfile.mkdtemp(prefix="fastreid_rank_"))
    shutil.copy(_file("fastreid", "rank_cy.pyx"), folder)
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-q", "rank_cy.pyx"]
    environment = {**os.environ, "CFLAGS": f"-I{np.get_include()}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    built = [path for path in folder.iterdir() if path.name.endswith(SUFFIXES)]
    if done.returncode or not built:
        raise ImportError(f"it does not compile: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return _cython_run(_extension(built[0]), distances, labels)


def _extension(path: Path) -> ModuleType:
    """A compiled module alone, without the package around it."""
    specification = importlib.util.spec_from_file_location("rank_cy", path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _cython_run(module: ModuleType, distances: np.ndarray, labels: Labels) -> Run:
    def run() -> float:
        result = module.evaluate_cy(distances, *labels, 50)
        if len(result) == 2:  # CMC, mAP
            return float(result[1])
        return float(np.mean(result[1]))  # CMC, AP of the valid queries, INP

    return run


def _loop(distances: np.ndarray, labels: Labels) -> Run:
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels

    def run() -> float:
        order = np.argsort(distances, axis=1)
        matches = gallery_ids[order] == query_ids[:, None]
        precisions = []
        for q in range(len(order)):
            junk = matches[q] & (gallery_cameras[order[q]] == query_cameras[q])
            hits = matches[q][~junk]
            if hits.any():
                share = hits.cumsum() / np.arange(1, len(hits) + 1)
                precisions.append((share * hits).sum() / hits.sum())
        return float(np.mean(precisions))

    return run


def _torchmetrics(distances: np.ndarray, labels: Labels) -> Run:
    """RetrievalMAP, which knows no junk: without it, and as scores above 0; those of 0 and less count for nothing."""
    if len(distances) > TORCHMETRICS_QUERIES:
        raise ImportError("seconds to minutes a run at this size")
    retrieval = importlib.import_module("torchmetrics.retrieval")
    query_ids, gallery_ids, query_cameras, gallery_cameras = (torch.from_numpy(x) for x in labels)
    same = query_ids[:, None] == gallery_ids
    junk = same & (query_cameras[:, None] == gallery_cameras)
    kept = ~junk & (same & ~junk).any(1, keepdim=True)
    index = torch.arange(len(distances))[:, None].expand_as(kept)[kept]
    scores, target = 5 - torch.from_numpy(distances)[kept], same[kept]
    return lambda: float(retrieval.RetrievalMAP()(scores, target, indexes=index))


def _metric_learning(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Run:
    """AccuracyCalculator over the whole gallery; its own search is faiss, where that is not installed brute force."""
    accuracy = importlib.import_module("pytorch_metric_learning.utils.accuracy_calculator")
    inference = importlib.import_module("pytorch_metric_learning.utils.inference")
    distances = importlib.import_module("pytorch_metric_learning.distances")
    name = "mean_average_precision"
    search = inference.CustomKNN(distances.LpDistance())
    calculator = accuracy.AccuracyCalculator(include=(name,), k=None, knn_func=search)
    return lambda: calculator.get_accuracy(query, query_ids, gallery, gallery_ids, False)[name]


EVALUATORS = {
    "fast-reid Cython": _fastreid,
    "torchreid Cython": _torchreid,
    "loop": _loop,
    "torchmetrics RetrievalMAP": _torchmetrics,
}
