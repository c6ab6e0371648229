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
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import neuraldeps_kernels as nk
from neuraldeps_kernels._info import _processor

with contextlib.suppress(ImportError):  # a visit to a GPU measures without tables and limits on threads
    import nvtx
    from rich.console import Console
    from rich.table import Table
    from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {name: f"bench_{name}" for name in ("covlasso", "covlasso_path", "covariance", "spectrum", "overhead")}
BENCHES |= {"domain_norm": "bench_domain_norm"}
BENCHES |= {"fourier_filter": "bench_fourier_filter"}
BENCHES |= {"retrieval_metrics": "bench_retrieval_metrics"}
BENCHES |= {"retrieval": "bench_retrieval"}
BENCHES |= {"extrapolation": "bench_extrapolation"}
BENCHES |= {"reid_ops": "bench_reid_ops"}
BENCHES |= {"distillation": "bench_distillation"}
BENCHES |= {"gpu": "gpu_cases"}  # argument of the command: module
SCHEMA = 1
MIN_ROUNDS = 5
TABLE_WIDTH = 150  # columns, where the output is no wider terminal
VERSIONS = ("numpy", "scipy", "triton", "cupy-cuda13x", "scikit-learn", "adelie", "celer", "skglm", "scm2cpp-learn")
VERSIONS += ("faiss-cpu", "fastreid", "pyppbox-torchreid", "torchmetrics", "pytorch-metric-learning")


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
    threads: int = 1  # 0: as many as torch takes
    device: torch.device | None = None  # times are taken there, by events; None: on the CPU, by `timer_for`
    bytes: float = 0.0  # per unit, that must be moved
    flops: float = 0.0  # per unit
    rates: Rates | None = None  # what bytes and flops are held against; None: no floor
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: int = MIN_ROUNDS  # at least; 2 or more, fewer than others where a contender takes minutes


@dataclass(frozen=True)
class Rates:
    """Speed of the machine in the same run and with the threads of the case."""

    copy: float  # bytes/s, read plus written
    gemm: float  # flop/s


@dataclass(frozen=True)
class Budget:
    """How much time a case may take."""

    quick: bool
    case_seconds: float  # rounds stop after this, but not before those of the case
    round_seconds: float  # a peer gets as many units a round as fit, see `bench_covlasso`
    search_seconds: float  # for choosing one peer's tolerance

    @staticmethod
    def of(quick: bool) -> Budget:
        return Budget(True, 1.5, 0.05, 2.0) if quick else Budget(False, 12.0, 0.3, 20.0)


# ------------------------------------------------------------------------------------------------ measuring


def checked_error(contender: Contender) -> float | None:
    """The error of one run, which also warms up; None where the contender has no measure of error."""
    with poisoned_outputs():
        result = contender.run()
    return None if contender.error is None else float(contender.error(result))


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Memory that torch hands out holds NaN or the largest integer, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what it allocates
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds from an idle device to the end of what `run` queued, by CUDA events; of the wall clock on the CPU."""
    if device.type == "cpu":
        return seconds_of(run)
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def on_device_clock(contender: Contender, device: torch.device) -> Contender:
    """The contender, timed by `device_seconds`."""
    return replace(contender, run=lambda: device_seconds(contender.run, device), clock=float)


def replayed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` captured as a CUDA graph, which costs the host one launch; on the CPU `run` itself.

    Every call returns the same tensors, with new values.
    """
    if device.type == "cpu":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def timer_for(threads: int) -> Callable[[], float]:
    """One thread: CPU time of this process, which other processes on the machine do not stretch; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def interleaved_seconds(
    contenders: Sequence[Contender],
    budget: Budget,
    timer: Callable[[], float],
    seed: int = 0,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds a unit of every contender, one entry a round; the order within a round is random."""
    order, chance = list(contenders), random.Random(seed)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    while len(seconds[order[0].name]) < min_rounds or time.perf_counter() - start < budget.case_seconds:
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


@dataclass(frozen=True)
class DeviceRates:
    """Speed of one device, bytes/s (read plus written) and flop/s."""

    memory: float  # copies far beyond the caches
    cache: float  # copies of 4 MB within them, from a graph
    gemm: dict[str, float]  # by type: float32, tf32, bfloat16, float64


@functools.cache
def device_rates(device: torch.device, tiny: bool = False) -> DeviceRates:
    """Best of some runs on random numbers; `tiny` for a rehearsal."""
    large, size = (1 << 20, 128) if tiny else (1 << 31, 8192)
    return DeviceRates(
        memory=_copy_rate(device, large, 1),
        cache=_copy_rate(device, min(large, 1 << 22), 2 if tiny else 100),
        gemm={
            "float32": _gemm_rate(device, size // 2, torch.float32),
            "tf32": _gemm_rate(device, size, torch.float32, "high"),
            "bfloat16": _gemm_rate(device, size, torch.bfloat16),
            "float64": _gemm_rate(device, size // 2, torch.float64),
        },
    )


def _copy_rate(device: torch.device, size: int, repeats: int) -> float:
    """Of `Tensor.copy_` between two buffers of `size` bytes, `repeats` times in a row."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copies = replayed(lambda: [target.copy_(source) for _ in range(repeats)], device)
    return 2 * repeats * source.nbytes / min(device_seconds(copies, device) for _ in range(9))


def _gemm_rate(device: torch.device, size: int, dtype: torch.dtype, precision: str = "highest") -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with float32_precision(precision):
        return 2 * size**3 / min(device_seconds(lambda: a @ b, device) for _ in range(7))


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Matrix products of float32: "highest", or "high" for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """torch and the BLAS libraries use this many threads; 0: no limit."""
    if threads == 0:
        yield
        return
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
        clocked = timed if case.device is None else [on_device_clock(contender, case.device) for contender in timed]
        seconds = interleaved_seconds(clocked, budget, timer_for(case.threads), min_rounds=case.rounds)

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
        "timer": _timer_name(case),
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


def _timer_name(case: Case) -> str:
    if case.device is not None and case.device.type == "cuda":
        return "CUDA events"
    return "process CPU" if case.threads == 1 else "wall"


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


@functools.cache
def device_facts(device: torch.device) -> dict[str, Any]:
    """Of the GPU that a result was measured on, in place of the processor's; empty for the CPU."""
    if device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "processor": _processor(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _first_line(*command: str) -> str:
    """First line that a command prints, or why there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown: {type(error).__name__}"


def _commit() -> str:
    """Commit of the checkout, with a plus where tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamped(record: dict[str, Any], bench: str, quick: bool, device: torch.device | None) -> dict[str, Any]:
    """A record with everything that it depends on."""
    there = {} if device is None else device_facts(device)
    return {"schema": SCHEMA, "bench": bench, "quick": quick, **machine(), **there, **record}


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
        for build in importlib.import_module(f"benchmarks.{BENCHES[name]}").cases(budget, options):
            if options.case and options.case not in build.name:
                continue
            found += 1
            failures += not _run_case(name, build, budget, options, console)
    if not found:
        console.print(f"no case has {options.case!r} in its name" if options.case else "no case for this machine")
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
    results = options.results or default_results(budget.quick, "cpu" if case.device is None else case.device.type)
    append_record(results, stamped(record, bench, budget.quick, case.device))
    return True


def profile(case: Case, warm_up: int = 3, repeats: int = 10) -> None:
    """Runs ours alone in NVTX ranges "warm-up" and the name of the case, for a profiler around this process.

    On a GPU the second range is also the capture range of the CUDA profiler API.
    """
    on_gpu = case.device is not None and case.device.type == "cuda"
    with threads_limited(case.threads):
        for message, count in (("warm-up", warm_up), (case.name, repeats)):
            capture = torch.cuda.profiler.profile() if on_gpu and message != "warm-up" else contextlib.nullcontext()
            with capture, nvtx.annotate(message, domain="neuraldeps"):
                for _ in range(count):
                    case.ours.run()
                if on_gpu:
                    torch.cuda.synchronize(case.device)


def default_results(quick: bool, kind: str = "cpu") -> Path:
    """Full runs are kept in the repository, quick ones in out/, which git ignores."""
    day = datetime.date.today().isoformat()
    return (
        ROOT / "out" / "bench" / f"{day}-quick.jsonl" if quick else ROOT / "benchmarks/results" / f"{day}-{kind}.jsonl"
    )


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
