"""Timing of our functions and their peers: interleaved, at equal accuracy, as fractions of a measured floor.

A `Case` has our contender, variants of it and peers. First every contender runs once and its error is held against its
limit: ours must pass, a peer that does not is named as refused and not timed. Then each round runs all contenders once
in random order, so that a slow phase of the machine meets all of them; ratios are taken within a round. Each case
prints a table and appends one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import json
import math
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nvtx
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import neuraldeps_kernels as nk
from neuraldeps_kernels._info import _processor

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ("covlasso", "covlasso_path", "covariance", "overhead")
SCHEMA = 1
MIN_ROUNDS = 5
TABLE_WIDTH = 150  # columns, where the output is no wider terminal
VERSIONS = ("numpy", "scipy", "scikit-learn", "adelie", "celer", "skglm", "scm2cpp-learn")


class AccuracyError(AssertionError):
    """Our own result misses the accuracy that the case asks for, so that its time would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    name: str
    run: Callable[[], Any]
    units: int = 1  # units of work (targets, calls) in one run; times are given per unit
    error: Callable[[Any], float] | None = None  # of what `run` returns
    limit: float = float("inf")  # largest error at which the time counts
    goal: float | None = None  # ours: microseconds a unit; a peer: its time over ours
    note: str = ""  # settings, such as the tolerance chosen
    clock: Callable[[Any], float] | None = None  # seconds, from what `run` returns, where another process took them


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be timed, and why: reported, not hidden."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """Contenders for one job; `ours` is what peers and variants are compared with."""

    name: str
    parameters: dict[str, Any]
    ours: Contender
    variants: Sequence[Contender] = ()
    peers: Sequence[Contender | Missing] = ()
    threads: int = 1
    bytes: float = 0.0  # per unit, that must be moved
    flops: float = 0.0  # per unit
    rates: Rates | None = None  # what bytes and flops are held against; None: no floor
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """Speed of the machine in the same run and with the threads of the case."""

    copy: float  # bytes/s, read plus written
    gemm: float  # flop/s


@dataclass(frozen=True)
class Budget:
    """How much time a case may take."""

    quick: bool
    case_seconds: float  # rounds stop after this, but not before MIN_ROUNDS
    round_seconds: float  # a peer gets as many units a round as fit, see `bench_covlasso`
    search_seconds: float  # for choosing one peer's tolerance

    @staticmethod
    def of(quick: bool) -> Budget:
        return Budget(True, 1.5, 0.05, 2.0) if quick else Budget(False, 12.0, 0.3, 20.0)


# ------------------------------------------------------------------------------------------------ measuring


def checked_error(contender: Contender) -> float | None:
    """The error of one run, which also warms up; None where the contender has no measure of error."""
    result = contender.run()
    return None if contender.error is None else float(contender.error(result))


def within_limit(contender: Contender, error: float | None) -> bool:
    """Whether the error allows the time to count; NaN does not."""
    return error is None or error <= contender.limit


def seconds_of(
    run: Callable[[], Any],
    clock: Callable[[Any], float] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one run by `timer`, or by the contender's own clock."""
    start = timer()
    result = run()
    return timer() - start if clock is None else clock(result)


def timer_for(threads: int) -> Callable[[], float]:
    """One thread: CPU time of this process, which other processes on the machine do not stretch; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def interleaved_seconds(
    contenders: Sequence[Contender], budget: Budget, timer: Callable[[], float], seed: int = 0
) -> dict[str, list[float]]:
    """Seconds a unit of every contender, one entry a round; the order within a round is random."""
    order, chance = list(contenders), random.Random(seed)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    while len(seconds[order[0].name]) < MIN_ROUNDS or time.perf_counter() - start < budget.case_seconds:
        chance.shuffle(order)
        for contender in order:
            seconds[contender.name].append(seconds_of(contender.run, contender.clock, timer) / contender.units)
    return seconds


def floor_seconds(case: Case) -> float | None:
    """Seconds a unit if bytes move at the copy rate and then flops run at the matrix-product rate."""
    return case.bytes / case.rates.copy + case.flops / case.rates.gemm if case.rates else None


@functools.cache
def measured_rates(threads: int, buffer_bytes: int, dtype: torch.dtype) -> Rates:
    """Best of some runs of `Tensor.copy_` on two buffers of this size, and of a matrix product of this dtype.

    The product is torch's or NumPy's, whichever is faster: on some processors either has half the rate of the other.
    """
    timer = timer_for(threads)
    with threads_limited(threads):
        source = torch.ones(buffer_bytes // 4)
        target = torch.empty_like(source)
        repeats = max(1, (1 << 26) // buffer_bytes)
        copy = min(seconds_of(lambda: [target.copy_(source) for _ in range(repeats)], timer=timer) for _ in range(9))
        size = 1024
        a = torch.randn(size, size).to(dtype)
        b = a.float().numpy() if dtype == torch.bfloat16 else a.numpy()
        gemm = min(seconds_of(product, timer=timer) for _ in range(9) for product in (lambda: a @ a, lambda: b @ b))
    copy /= repeats
    return Rates(2 * source.nbytes / copy, 2 * size**3 / gemm)


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """torch and the BLAS libraries use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case, budget: Budget) -> dict[str, Any]:
    """The record of a case: checks accuracy, times what passed, and leaves a reason for each peer that did not."""
    with threads_limited(case.threads):
        errors = {case.ours.name: checked_error(case.ours)}
        if not within_limit(case.ours, errors[case.ours.name]):
            raise AccuracyError(f"{case.name}: error {errors[case.ours.name]:.2e}, allowed {case.ours.limit:.0e}")
        rivals = [*case.variants, *(peer for peer in case.peers if isinstance(peer, Contender))]
        errors |= {rival.name: checked_error(rival) for rival in rivals}
        timed = [case.ours, *(rival for rival in rivals if within_limit(rival, errors[rival.name]))]
        seconds = interleaved_seconds(timed, budget, timer_for(case.threads))

    def entry(contender: Contender | Missing) -> dict[str, Any]:
        if isinstance(contender, Missing):
            return {"name": contender.name, "status": "missing", "reason": contender.reason}
        error = errors[contender.name]
        facts = {"name": contender.name, "error": None if error is None or math.isnan(error) else error}
        facts |= {"note": contender.note, "goal": contender.goal, "units": contender.units}
        if contender.name not in seconds:
            return facts | {"status": "refused", "reason": f"error {error:.0e}, allowed {contender.limit:.0e}"}
        return facts | {"status": "timed"} | _summary(seconds[contender.name], seconds[case.ours.name])

    floor = floor_seconds(case)
    ours = entry(case.ours)
    return {
        "case": case.name,
        "parameters": case.parameters | {"threads": case.threads},
        "timer": "process CPU" if case.threads == 1 else "wall",
        "facts": case.facts,
        "ours": ours,
        "variants": [entry(variant) for variant in case.variants],
        "peers": [entry(peer) for peer in case.peers],
        "load": os.getloadavg()[0],  # jobs that wanted a core in the last minute, this one included
        "rounds": len(seconds[case.ours.name]),
        "bytes": case.bytes,
        "flops": case.flops,
        "copy_gb_s": case.rates and case.rates.copy / 1e9,
        "gemm_gflop_s": case.rates and case.rates.gemm / 1e9,
        "floor_us": floor and floor * 1e6,
        "floor_fraction": floor and floor * 1e6 / ours["us"],
    }


def _summary(seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """Median and quartiles of the microseconds, and of the ratio to ours within each round."""
    ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    quartiles = statistics.quantiles(seconds, n=4)
    ratio_quartiles = statistics.quantiles(ratios, n=4)
    return {
        "us": quartiles[1] * 1e6,
        "us_quartiles": [quartiles[0] * 1e6, quartiles[2] * 1e6],
        "us_best": min(seconds) * 1e6,
        "ratio": ratio_quartiles[1],
        "ratio_quartiles": [ratio_quartiles[0], ratio_quartiles[2]],
    }


# ------------------------------------------------------------------------------------------------ reporting


@functools.cache
def machine() -> dict[str, Any]:
    """What a result depends on: processor, versions, instruction-set level, commit, day. No host name, no path."""
    versions = {"neuraldeps_kernels": nk.__version__, "torch": torch.__version__}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_level": torch.ops.neuraldeps.cpu_levels()[2],
        "versions": versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """Commit of the checkout, with a plus where tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False, default=float) + "\n")


def print_record(record: dict[str, Any], console: Console) -> None:
    """The table of a case: times a unit, ratio to ours with its quartiles, goal, error."""
    facts = "  ".join(f"{name} {value}" for name, value in record["facts"].items())
    table = Table(
        title=f"{record['case']}   {facts}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in ("", "us", "quartiles", "x ours", "quartiles", "goal", "error", ""):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=column != "")
    rows = [(record["ours"], True), *((v, False) for v in record["variants"]), *((p, False) for p in record["peers"])]
    for entry, is_ours in rows:
        table.add_row(*_cells(entry, is_ours))
    console.print(table)
    if record["floor_us"]:
        console.print(
            f"floor {record['floor_us']:.3g} us: reached {record['floor_fraction']:.0%}; copy "
            f"{record['copy_gb_s']:.0f} GB/s, matrix product {record['gemm_gflop_s']:.0f} GFLOP/s; "
            f"{record['rounds']} rounds"
        )
    console.print()


def _cells(entry: dict[str, Any], is_ours: bool) -> list[str]:
    error = "" if entry.get("error") is None else f"{entry['error']:.0e}"
    if entry["status"] != "timed":
        return [entry["name"], "-", "", "-", "", "", error, f"{entry['status']}: {entry['reason']}"]
    low, high = entry["us_quartiles"]
    ratio, (ratio_low, ratio_high) = entry["ratio"], entry["ratio_quartiles"]
    goal = entry["goal"]
    asked = "" if goal is None else f"<= {goal:g} us" if is_ours else f"{goal:g}x"
    ratio_cells = ["", ""] if is_ours else [f"{ratio:.3g}", f"{ratio_low:.3g}-{ratio_high:.3g}"]
    return [entry["name"], f"{entry['us']:.4g}", f"{low:.3g}-{high:.3g}", *ratio_cells, asked, error, entry["note"]]


# ------------------------------------------------------------------------------------------------ command


def run_command(argv: Sequence[str]) -> int:
    """`python -m benchmarks`: runs the chosen benchmarks, prints tables, appends JSON lines."""
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := set(options.bench) - set(BENCHES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; expected {', '.join(BENCHES)}")
    budget, console = Budget.of(options.quick), Console(width=max(Console().width, TABLE_WIDTH))
    facts = machine()
    console.print(f"{facts['device']}, {facts['cores']} cores, level {facts['cpu_level']}, commit {facts['commit']}")
    failures = found = 0
    for name in options.bench or BENCHES:
        for build in importlib.import_module(f"benchmarks.bench_{name}").cases(budget, options):
            if options.case and options.case not in build.name:
                continue
            found += 1
            failures += not _run_case(name, build, budget, options, console)
    if not found:
        console.print(f"no case has {options.case!r} in its name")
    return int(failures > 0 or not found)


@dataclass(frozen=True)
class Recipe:
    """A case that is set up when its turn comes, as set-up takes time and memory."""

    name: str
    build: Callable[[], Case]


def _run_case(bench: str, recipe: Recipe, budget: Budget, options: argparse.Namespace, console: Console) -> bool:
    """Whether our result was right; the record goes to the results file."""
    case = recipe.build()
    if options.profile:
        profile(case)
        return True
    try:
        record = measure(case, budget)
    except AccuracyError as error:
        console.print(f"[red]WRONG RESULT[/red] {error}")
        return False
    print_record(record, console)
    results = options.results or default_results(budget.quick)
    append_record(results, {"schema": SCHEMA, "bench": bench, "quick": budget.quick, **machine(), **record})
    return True


def profile(case: Case, warm_up: int = 3, repeats: int = 10) -> None:
    """Runs ours alone in NVTX ranges "warm-up" and the name of the case, for a profiler around this process."""
    with threads_limited(case.threads):
        for message, count in (("warm-up", warm_up), (case.name, repeats)):
            with nvtx.annotate(message, domain="neuraldeps"):
                for _ in range(count):
                    case.ours.run()


def default_results(quick: bool) -> Path:
    """Full runs are kept in the repository, quick ones in out/, which git ignores."""
    day = datetime.date.today().isoformat()
    return ROOT / "out" / "bench" / f"{day}-quick.jsonl" if quick else ROOT / "benchmarks/results" / f"{day}-cpu.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description="Times the kernels against other packages at equal accuracy."
    )
    parser.add_argument("bench", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; default all")
    parser.add_argument("--quick", action="store_true", help="seconds a case instead of minutes")
    parser.add_argument("--case", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines are appended here")
    parser.add_argument("--profile", action="store_true", help="run ours alone in NVTX ranges, time nothing")
    parser.add_argument("--build", action="store_true", help="overhead: also time a clean build and weigh the wheel")
    return parser
