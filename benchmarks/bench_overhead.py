"""Costs around the kernels: operator calls, import, and with --build a clean build and the size of the wheel."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import ROOT, Budget, Case, Contender, Recipe

CALLS = 2000  # operator calls in one run
IMPORT_GOAL_US = 0.3e6
BUILD_GOAL_US = 60e6
WHEEL_GOAL_MB = 12.0


def cases(budget: Budget, options: argparse.Namespace) -> Iterator[Recipe]:
    """Operator call with and without autograd, import time, and the build when asked for."""
    yield Recipe("overhead operator call", lambda: call_case(inference=False))
    yield Recipe("overhead operator call, inference mode", lambda: call_case(inference=True))
    yield Recipe("overhead import", import_case)
    if options.build:
        yield Recipe("overhead build", build_case)


def call_case(inference: bool) -> Case:
    """One call on a [2, 2] covariance against operators of torch that also take a matrix and an index."""
    cov, target = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([0])
    lam = torch.tensor([1.0], dtype=torch.float64)
    ops, aten = torch.ops.neuraldeps, torch.ops.aten

    def repeated(function: object, *arguments: object) -> object:
        def run() -> None:
            with torch.inference_mode(inference):
                for _ in range(CALLS):
                    function(*arguments)  # type: ignore[operator]

        return run

    return Case(
        "overhead operator call" + (", inference mode" if inference else ""),
        {"calls": CALLS},
        ours=Contender("neuraldeps::lambda_max", repeated(ops.lambda_max, cov, target, None), CALLS),
        variants=(
            Contender("neuraldeps::covlasso", repeated(ops.covlasso, cov, target, lam, None, 1e-6, 100, 1), CALLS),
        ),
        peers=(
            Contender("aten::index_select", repeated(aten.index_select, cov, 0, target), CALLS),
            Contender("aten::gather", repeated(aten.gather, cov, 0, target[None]), CALLS),
            Contender("aten::linalg_vector_norm", repeated(aten.linalg_vector_norm, cov, 1.0, [1]), CALLS),
        ),
    )


def import_case() -> Case:
    """Importing in a fresh interpreter, after torch; the interpreter times it itself."""
    code = (
        "import time, torch; start = time.perf_counter(); import neuraldeps_kernels; print(time.perf_counter() - start)"
    )

    def run() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    return Case(
        "overhead import",
        {},
        ours=Contender("import neuraldeps_kernels, after torch", run, goal=IMPORT_GOAL_US, clock=float),
    )


def build_case() -> Case:
    """A build from nothing in a copy of the sources; the size of its wheel is a fact of the case."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def run() -> float:
        copy = folder / "clean"
        shutil.rmtree(copy, ignore_errors=True)
        _copy_sources(copy)
        start = time.perf_counter()
        _setup(copy, "build_ext", "--inplace")
        return time.perf_counter() - start

    seconds = run()
    _setup(folder / "clean", "bdist_wheel")
    (wheel,) = (folder / "clean" / "dist").glob("*.whl")
    return Case(
        "overhead build",
        {"jobs": os.environ.get("MAX_JOBS", "default")},
        ours=Contender("clean build", lambda: seconds, goal=BUILD_GOAL_US, clock=float),
        facts={"wheel": f"{wheel.stat().st_size / 1e6:.1f} MB, asked <= {WHEEL_GOAL_MB:g}", "builds": 1},
    )


def _copy_sources(folder: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _setup(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=folder, check=True)
