"""One command for a GPU: builds, tests, sanitises, measures, profiles, and writes everything down as it goes.

    python benchmarks/gpu_visit.py --minutes 25 --out out/gpu              # all steps, most important cases first
    python benchmarks/gpu_visit.py --minutes 9 --out out/gpu --resume      # goes on where the last call stopped
    python benchmarks/gpu_visit.py --out out/rehearsal --emulate           # the same steps, tiny, on the CPU

Needs torch, triton, numpy, scipy, setuptools and nvcc; uses cupy, pytest, compute-sanitizer and ncu where they are and
says where they are not. Nothing is downloaded or installed: the package is built in place for the architecture at hand,
without its module for arrays if pybind11 is missing.

Each step runs in a process of its own with a limit on its time, so that neither a crash nor a hang ends the visit. In
the folder given by --out:

    visit.jsonl         a line as each step starts and one as it ends: done, failed, missing (a tool), cut (no time)
    visit.log           everything the steps print
    <date>-gpu.jsonl    one line a benchmark case, as benchmarks/results; copied there at the end
    tests.xml, ncu-*.txt, summary.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUMMARY_SECONDS = 10.0  # kept back for the summary
LEAST_SECONDS = 8.0  # a step is not begun with less
LIMITS = {"facts": 90, "build": 300, "tests": 360, "sanitizer": 150, "cases": 1200, "ncu": 120}  # seconds a process
CASE_SECONDS = 150  # of one benchmark case, set-up and peers included
OUT_OF_TIME = 3  # exit status of a worker that leaves cases for the next call
CRASHES = 2  # a case that ended its process so often is given up
TAIL = 2000  # characters of a failed step's output in its record

Record = dict[str, Any]

# Asked of each row of benchmarks/README.md: what stands there, what begins the names of its cases ("": none yet).
GOALS = (
    ("covlasso all 1000 targets, k ~ 10", "covlasso synthetic k 10", "<= 100 us; >= 50x batched FISTA"),
    ("covlasso all 1000 targets, k ~ 25", "covlasso synthetic k 25", "<= 250 us; >= 50x batched FISTA"),
    ("covlasso real covariance, ratio .2", "covlasso lite0 ratio 0.2", ">= 50x batched FISTA"),
    ("covlasso real covariance, ratio .1", "covlasso lite0 ratio 0.1", ">= 50x batched FISTA"),
    ("covlasso real covariance, ratio .05", "covlasso lite0 ratio 0.05", ">= 50x batched FISTA"),
    ("covlasso path of 20 penalties, 1 to .1", "covlasso path lite0", "-"),
    ("covlasso exactly 20 nonzeros", "covlasso top 20 lite0", "-"),
    ("covlasso n = 10,000, k ~ 30", "covlasso n 10000", "<= 12 ms; >= 70 % of the memory bound"),
    ("covariance 1M x 1000 bf16", "covariance 1M x 1000 bfloat16", ">= 1.7x torch.mm"),
    ("covariance 1M x 1000 fp32", "covariance 1M x 1000 float32", ">= 1.7x torch.mm"),
    ("covariance 1M x 1000 fp64", "covariance 1M x 1000 float64", "-"),
    ("fourier_filter2d forward, with backward", "fourier_filter ", ">= 5x eager (bf16 8x), >= 6x; >= 60 % of copy"),
    ("domain_batch_norm, large", "domain_norm 64x256x64x32", ">= 2x loop; <= 1.15x F.batch_norm; >= 75 % of 12 B/elt"),
    ("domain_batch_norm, mid-sized", "domain_norm 64x256x16x8", ">= 2x loop; <= 1.15x F.batch_norm"),
    ("domain_batch_norm, [N, C]", "domain_norm 128x2048", ">= 10x loop; <= 1.15x F.batch_norm"),
    ("matrix_rank 33..512", "matrix_rank ", ">= 50x torch.linalg; >= 3x fp64 Gram and cupy eigvalsh"),
    ("svdvals 33..128 with gradient", "svdvals ", ">= 20x torch"),
    ("21 exact nearest neighbours, Market / MSMT17", "retrieval knn ", "-"),
    ("re-ranking Market / MSMT17 / 440k", "rerank ", "<= 8 ms / 100 ms / 1.2 s; >= 10x dense PyTorch"),
    ("gnn_rerank Market", "gnn ", ">= 10x dense PyTorch"),
    ("retrieval_metrics Market / MSMT17", "retrieval_metrics ", "-"),
    ("region_mixup, forward and backward", "region_mixup ", ">= 2x eager"),
    ("pose_weighted_pool, forward and backward", "pose_weighted_pool ", ">= 2x eager"),
    ("distillation_kl, forward and backward", "distillation_kl ", ">= 2x eager"),
    ("queue_contrast, forward and backward", "queue_contrast ", ">= 2x eager"),
    ("closed_form_discriminator, 1M samples", "closed_form_discriminator ", "-"),
    ("projected_step, 1M and w+ values", "projected_step ", "-"),
)

# What test modules import, and may be absent: tests marked `gpu` only have to be collected with it.
TEST_PACKAGES = ("hypothesis", "sklearn", "PIL", "matplotlib", "networkx", "rich", "safetensors", "typer")
TEST_STAND_INS = '''\
"""A plugin of pytest: packages that are not there import as empty shells; tests that hypothesis drives are skipped."""
import importlib.abc
import importlib.util
import sys
import types

import pytest


class Anything:
    """Takes every call and attribute."""

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Shell(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return {"given": skipped, "settings": unchanged}.get(name) or Anything()


def skipped(*args, **kwargs):
    return pytest.mark.skip(reason="hypothesis is not installed")


def unchanged(*args, **kwargs):
    return lambda test: test


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Shell(spec.name)

    def exec_module(self, module):
        pass


def is_missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


MISSING = {name for name in PACKAGES if is_missing(name)}
sys.meta_path.insert(0, Shells())
'''

# A package that may be absent where nobody profiles: ranges that do nothing.
NVTX_STAND_IN = '''\
"""Stands in for the package nvtx: no profiler listens."""
import contextlib


class _Domain:
    def get_event_attributes(self, *args, **kwargs):
        return None


def get_domain(name):
    return _Domain()


def annotate(*args, **kwargs):
    return contextlib.nullcontext()
'''

FACTS = """
import importlib.metadata, json, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "cupy-cuda13x", "numpy", "scipy", "pytest", "hypothesis", "pybind11", "setuptools", "nvtx"):
    try:
        facts[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        facts[name] = "not installed"
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    facts |= {"device": device.name, "devices": torch.cuda.device_count(), "free_gib": round(free / 2**30, 1)}
    facts |= {"architecture": f"{device.major}.{device.minor}"}
print(json.dumps(facts))
"""

LIBRARY_ERROR = "import torch, neuraldeps_kernels as nk; print(torch.ops.neuraldeps.cuda_library_error())"


@dataclass(frozen=True)
class Outcome:
    """What a step came to: done, failed, missing (a tool is not there), or cut (no time; the next call repeats it)."""

    status: str
    detail: Record


@dataclass
class Visit:
    """Folder, time left and records of a visit."""

    out: Path
    emulate: bool
    deadline: float  # by time.monotonic()
    commit: str | None

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    # -------------------------------------------------------------------------------- records

    @property
    def records_file(self) -> Path:
        return self.out / "visit.jsonl"

    def records(self) -> list[Record]:
        return records_of(self.records_file)

    def latest(self, step: str) -> Record | None:
        return next((record for record in reversed(self.records()) if record["step"] == step), None)

    def times_started(self, step: str) -> int:
        return sum(record["step"] == step and record["status"] == "started" for record in self.records())

    def is_over(self, step: str) -> bool:
        record = self.latest(step)
        return record is not None and record["status"] not in ("started", "cut")

    def note(self, step: str, status: str, seconds: float = 0.0, **detail: Any) -> None:
        """Writes and prints the state of a step."""
        record = {"step": step, "status": status, "seconds": round(seconds, 1), "detail": detail}
        cut = self.records_file.exists() and not self.records_file.read_text().endswith("\n")
        with self.records_file.open("a") as file:
            file.write("\n" * cut + json.dumps(record) + "\n")
        if status != "started":
            text = ", ".join(f"{key} {value}" for key, value in detail.items() if key != "output")
            print(f"{step:<40} {status:<8} {seconds:6.1f} s  {text}"[:240], flush=True)

    def results(self) -> list[Record]:
        """Records of the benchmark cases, the latest of each."""
        records = [record for file in sorted(self.out.glob("*-gpu.jsonl")) for record in records_of(file)]
        return list({record["case"]: record for record in records}.values())

    # -------------------------------------------------------------------------------- processes

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic() - SUMMARY_SECONDS

    def environment(self, **changes: str) -> dict[str, str]:
        """Of all child processes: this checkout first, a stand-in for nvtx where it is absent."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if importlib.util.find_spec("nvtx") is None:
            folder = self.out / "stand_ins"
            folder.mkdir(exist_ok=True)
            (folder / "nvtx.py").write_text(NVTX_STAND_IN)
            paths.append(str(folder))
        lane = {"TRITON_INTERPRET": "1"} if self.emulate else {}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **lane, **changes}

    def run(self, command: Sequence[object], seconds: float, **environment: str) -> tuple[int, str]:
        """Exit status (-signal if killed; -9 also past `seconds`) and output of a process; the log gets both."""
        words, limit = list(map(str, command)), max(1.0, min(seconds, self.seconds_left))
        with (self.out / "visit.log").open("a+") as log:
            log.write(f"\n$ {' '.join(words)}   (at most {limit:.0f} s)\n")
            log.flush()
            start = log.seek(0, os.SEEK_END)
            # A process group of its own, so that it can be ended whole; whoever ends this script ends it too.
            settings = self.environment(**environment)
            process = subprocess.Popen(words, cwd=ROOT, env=settings, stdout=log, stderr=log, preexec_fn=os.setpgrp)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            log.seek(start)
            output = log.read()
        return code, output

    def judged(self, command: Sequence[object], seconds: float, **environment: str) -> Outcome:
        """Done if the process ends with 0."""
        code, output = self.run(command, seconds, **environment)
        return Outcome("done", {}) if code == 0 else failed(code, output)


def records_of(file: Path) -> list[Record]:
    """All lines of a file, which need not exist; one that a crash cut is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def failed(code: int, output: str) -> Outcome:
    reason = "out of time or killed" if code == -9 else f"exit status {code}"
    return Outcome("failed", {"reason": reason, "output": output[-TAIL:]})


def found_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}")


# ------------------------------------------------------------------------------------------------ steps


def facts(visit: Visit) -> Outcome:
    """Versions of everything, device, driver, commit, tools."""
    code, output = visit.run([sys.executable, "-c", FACTS], LIMITS["facts"])
    if code != 0:
        return failed(code, output)
    found = json.loads(output.splitlines()[-1])
    found["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["commit"] = visit.commit or first_line("git", "describe", "--always", "--abbrev=12", "--dirty=+")
    found |= {tool: bool(found_tool(tool)) for tool in ("nvcc", "compute-sanitizer", "ncu", "nsys")}
    if "device" not in found and not visit.emulate:
        return Outcome("failed", found | {"reason": "torch sees no GPU"})
    return Outcome("done", found)


def first_line(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def build(visit: Visit) -> Outcome:
    """In place, for the device's architecture, CUDA required. A rehearsal only asks that command for its help."""
    architecture = ((visit.latest("facts") or {}).get("detail") or {}).get("architecture", "9.0")
    settings = {"NEURALDEPS_CUDA_ARCH_LIST": architecture, "NEURALDEPS_LINEINFO": "1", "MAX_JOBS": str(os.cpu_count())}
    settings["NEURALDEPS_CUDA"] = "auto" if visit.emulate else "1"
    settings["NEURALDEPS_NATIVE"] = "1" if importlib.util.find_spec("pybind11") else "0"
    command = [sys.executable, "setup.py", "build_ext", "--inplace", *(["--help"] if visit.emulate else [])]
    outcome = visit.judged(command, LIMITS["build"], **settings)
    if outcome.status != "done":
        return outcome
    code, output = visit.run([sys.executable, "-c", LIBRARY_ERROR], LIMITS["facts"])
    if code != 0 or (output.strip() and not visit.emulate):
        return failed(code, output)
    return Outcome("done", {"architecture": architecture})


def tests(visit: Visit) -> Outcome:
    """`pytest -m gpu`, which compares every hot path with its oracle; in a rehearsal all of them are skipped."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome("missing", {"reason": "pytest is not installed"})
    report = visit.out / "tests.xml"
    code, output = visit.run([*test_command(visit.out), f"--junitxml={report}"], LIMITS["tests"])
    counts = test_counts(report) if report.exists() else {}
    if code != 0:
        outcome = failed(code, output)
        return Outcome("failed", counts | outcome.detail)
    return Outcome("done", counts)


def test_command(folder: Path) -> list[object]:
    """pytest on the files with tests for a GPU; the plugin that stands in for missing packages goes to `folder`."""
    stand_ins = folder / "stand_ins"
    stand_ins.mkdir(exist_ok=True)
    (stand_ins / "gpu_visit_packages.py").write_text(TEST_STAND_INS.replace("PACKAGES", repr(TEST_PACKAGES)))
    start = f"import sys; sys.path.insert(0, {str(stand_ins)!r}); import pytest; sys.exit(pytest.main())"
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    options = ["-m", "gpu", "-v", "--tb=short", "--maxfail=30", "--continue-on-collection-errors"]
    return [sys.executable, "-c", start, *options, "-p", "no:cacheprovider", "-p", "gpu_visit_packages", *files]


def test_counts(report: Path) -> Record:
    """Numbers of tests by outcome, and the names of those that failed."""
    suites = list(xml.etree.ElementTree.parse(report).getroot().iter("testsuite"))
    counts: Record = {
        key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        case.get("name")
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | ({"bad": bad[:20]} if bad else {})


def sanitized(tool: str) -> Callable[[Visit], Outcome]:
    """The step that runs every operator once under one tool of compute-sanitizer; a rehearsal goes without the tool."""

    def step(visit: Visit) -> Outcome:
        program = [sys.executable, "-m", "benchmarks.gpu_cases"]
        if visit.emulate:
            return visit.judged([*program, "--cpu"], LIMITS["sanitizer"])
        sanitizer = found_tool("compute-sanitizer")
        if sanitizer is None:
            return Outcome("missing", {"reason": "compute-sanitizer is not there"})
        options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "50"]
        # Every tensor an allocation of its own, so that an access beyond it is seen.
        command = [sanitizer, *options, *program]
        code, output = visit.run(command, LIMITS["sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summaries = [line for line in output.splitlines() if "SUMMARY" in line]
        said: Record = {"summary": summaries[-1]} if summaries else {}
        return Outcome("done", said) if code == 0 else Outcome("failed", said | failed(code, output).detail)

    return step


def measurements(visit: Visit) -> Outcome:
    """Rates and benchmark cases, in a process that is started again if a case brings it down."""
    while True:
        before = [r for r in visit.records() if r["status"] == "started"]
        code, output = visit.run(
            [*own_command(visit), "--worker", f"--seconds={visit.seconds_left:.0f}"], LIMITS["cases"]
        )
        crashed = [r["step"] for r in visit.records() if r["status"] == "started"][len(before) :]
        crashed = [step for step in crashed if not visit.is_over(step)]
        if code == 0 or not crashed or visit.seconds_left < LEAST_SECONDS:
            break
        if visit.times_started(crashed[-1]) >= CRASHES or code == -signal.SIGALRM:
            visit.note(crashed[-1], "failed", reason=f"ended its process ({code})", output=output[-TAIL:])
    cases = [record for record in visit.records() if record["step"].startswith("case ")]
    states = {r["step"]: r["status"] for r in cases}
    counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
    if code in (0, OUT_OF_TIME):
        return Outcome("cut" if code else "done", counts)
    return Outcome("failed", counts | failed(code, output).detail)


def own_command(visit: Visit) -> list[object]:
    """This script for a child, in the same folder and mode."""
    mode = ["--emulate"] if visit.emulate else []
    commit = [f"--commit={visit.commit}"] if visit.commit else []
    return [sys.executable, Path(__file__), "--out", visit.out, *mode, *commit]


def counters(visit: Visit) -> Outcome:
    """ncu on the two cases farthest from their floor; a rehearsal runs them without it."""
    fractions = {r["case"]: r["floor_fraction"] for r in visit.results() if r["floor_fraction"]}
    worst = sorted(fractions, key=fractions.__getitem__)[:2]
    ncu = found_tool("ncu")
    if ncu is None and not visit.emulate:
        return Outcome("missing", {"reason": "ncu is not there"})
    detail: Record = {}
    for number, case in enumerate(worst, 1):
        report = visit.out / f"ncu-{number}.txt"
        options = ["--profile-from-start", "off", "--clock-control", "none", "--set", "detailed"]
        options += ["--launch-count", "12", "--log-file", report]
        tool = [] if visit.emulate else [ncu, *options]
        code, output = visit.run([*tool, *own_command(visit), "--worker", f"--profile={case}"], LIMITS["ncu"])
        text = report.read_text() if report.exists() else ""
        detail[case] = kernel_lines(text) if code == 0 else failed(code, output).detail
    bad = [case for case, found in detail.items() if isinstance(found, dict)]
    return Outcome("failed" if bad or not worst else "done", detail)


def kernel_lines(text: str) -> list[str]:
    """A line a kernel of ncu's report: name, duration, throughputs, occupancy, registers."""
    asked = r"^\s+(Duration|Memory Throughput|Compute \(SM\) Throughput|Achieved Occupancy|Registers Per Thread)\s+"
    lines: list[dict[str, str]] = []
    for line in text.splitlines():
        if ", Context " in line:
            lines.append({"kernel": line.strip().split("(")[0][:60]})
        elif lines and (found := re.match(asked + r"(\S+)\s+([\d.,]+)\s*$", line)):
            lines[-1].setdefault(found[1], f"{found[3]} {found[2]}")
    return [", ".join(f"{k} {v}" if k != "kernel" else v for k, v in line.items()) for line in lines]


STEPS: dict[str, Callable[[Visit], Outcome]] = {
    "facts": facts,
    "build": build,
    "tests": tests,
    "memcheck": sanitized("memcheck"),
    "racecheck": sanitized("racecheck"),
    "measurements": measurements,
    "counters": counters,
}


def take(visit: Visit, step: str) -> None:
    """Runs a step that is not over, if there is time, and notes how it went."""
    if visit.is_over(step):
        return
    if visit.seconds_left < LEAST_SECONDS:
        print(f"{step:<40} no time left", flush=True)
        return
    visit.note(step, "started")
    start = time.monotonic()
    try:
        outcome = STEPS[step](visit)
    except Exception as error:  # a fault of one step must not end the visit
        outcome = Outcome("failed", {"reason": f"{type(error).__name__}: {error}"})
    if outcome.status == "failed" and visit.seconds_left < 1:
        outcome = Outcome("cut", outcome.detail)
    visit.note(step, outcome.status, time.monotonic() - start, **outcome.detail)


# ------------------------------------------------------------------------------------------------ worker


def work(visit: Visit, seconds: float, profiled: str | None) -> int:
    """In the child: rates, then every case that is not over yet; or one case alone for a profiler."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import gpu_cases, harness

    card = gpu_cases.Card(torch.device("cpu"), True) if visit.emulate else gpu_cases.first_card()
    if card.tiny and not visit.emulate:
        raise SystemExit("torch sees no GPU")
    budget = harness.Budget(True, 0.0, 0.01, 1.5) if visit.emulate else harness.Budget(False, 3.0, 0.3, 9.0)
    if visit.emulate:
        torch.set_num_threads(1)  # too small for more
    if profiled is not None:
        alone = dataclasses.replace(budget, search_seconds=0.0)  # without peers
        harness.profile(next(r for r in gpu_cases.recipes(card, alone) if r.name == profiled).build(), 2, 2)
        return 0
    end = time.monotonic() + seconds
    if not visit.is_over("rates"):
        start, rates = time.monotonic(), dataclasses.asdict(card.rates)
        visit.note("rates", "done", time.monotonic() - start, **rates)
    for recipe in gpu_cases.recipes(card, budget):
        if time.monotonic() > end - LEAST_SECONDS:
            return OUT_OF_TIME
        measure_case(visit, recipe, budget, card)
    return 0


def measure_case(visit: Visit, recipe: Any, budget: Any, card: Any) -> None:
    """One benchmark case: started, then done with its record in the results, or failed and why."""
    from benchmarks import harness

    step = f"case {recipe.name}"
    if visit.is_over(step):
        return
    visit.note(step, "started")
    signal.alarm(CASE_SECONDS)  # not caught: ends this process even inside a call that hangs
    start = time.monotonic()
    try:
        case = recipe.build()
        record = harness.stamped(harness.measure(case, budget), "gpu", visit.emulate, card.device)
    except Exception as error:  # of any kind: the next cases shall run
        signal.alarm(0)
        visit.note(step, "failed", time.monotonic() - start, reason=f"{type(error).__name__}: {error}"[:TAIL])
        return
    signal.alarm(0)
    record |= {"commit": visit.commit} if visit.commit else {}
    harness.append_record(visit.out / f"{datetime.date.today().isoformat()}-gpu.jsonl", record | {"case": recipe.name})
    visit.note(step, "done", time.monotonic() - start, us=record["ours"]["us"], fraction=record["floor_fraction"])


# ------------------------------------------------------------------------------------------------ summary


def summary(visit: Visit) -> str:
    """Markdown: what was measured on, the steps, asked and measured, kernels."""
    return "\n".join([*heading(visit), "", *step_table(visit), "", *goal_table(visit), "", *notes(visit)])


def heading(visit: Visit) -> Iterator[str]:
    found = (visit.latest("facts") or {"detail": {}})["detail"]
    yield "## CUDA, asked and measured" if not visit.emulate else "## Rehearsal on the CPU: no time here means anything"
    yield ""
    keys = ("driver", "torch", "cuda", "triton", "cupy-cuda13x", "commit")
    yield ", ".join([found.get("device", "no GPU"), *(f"{key} {found.get(key, 'unknown')}" for key in keys)]) + "."
    if rates := visit.latest("rates"):
        detail = rates["detail"]
        gemm = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in detail["gemm"].items())
        yield (
            f"Copies: {detail['memory'] / 1e9:.4g} GB/s in memory, {detail['cache'] / 1e9:.4g} GB/s in the caches; "
            f"matrix products in TFLOP/s: {gemm}."
        )


def step_table(visit: Visit) -> Iterator[str]:
    yield from (row(["step", "state", "s", ""]), row(["---"] * 4))
    for step in STEPS:
        record = visit.latest(step) or {"status": "not run", "seconds": 0.0, "detail": {}}
        status = {"started": "cut"}.get(record["status"], record["status"])
        detail = {} if step in ("facts", "counters") else record["detail"]  # these have places of their own
        reason = record["detail"].get("reason", "")
        text = ", ".join(f"{key} {value}" for key, value in detail.items() if key != "output") or reason
        yield row([step, status, f"{record['seconds']:.0f}", text])


def goal_table(visit: Visit) -> Iterator[str]:
    columns = ("case", "asked", "input", "ours, us", "graph, us", "peers, time over ours", "of the limit")
    yield row(columns)
    yield row(["---"] * len(columns))
    results = visit.results()
    for title, start, asked in GOALS:
        matching = [record for record in results if start and record["case"].startswith(start)]
        for record in matching:
            yield row([title, asked, *measured_cells(record)])
        if not matching:
            yield row([title, asked, "", case_state(visit, start), "", "", ""])


def row(cells: Sequence[str]) -> str:
    """One row of a Markdown table; long text is cut."""
    return f"| {' | '.join(' '.join(text.replace('|', '/').split())[:300] for text in cells)} |"


def measured_cells(record: Record) -> list[str]:
    """What was solved, time of ours and of its graph, peers, fraction of the floor."""
    graphs = [f"{p['us']:.4g}" if p["status"] == "timed" else p["reason"] for p in record["peers"] if is_graph(p)]
    peers = [
        f"{p['name']} {p['ratio']:.3g}x" if p["status"] == "timed" else f"{p['name']}: {p['status']}, {p['reason']}"
        for p in record["peers"]
        if not is_graph(p)
    ]
    given = ", ".join(f"{name} {value}" for name, value in record["facts"].items())
    fraction = f"{record['floor_fraction']:.1%}" if record["floor_fraction"] else ""
    return [given, f"{record['ours']['us']:.4g}", "".join(graphs), "; ".join(peers), fraction]


def is_graph(entry: Record) -> bool:
    return str(entry["name"]).endswith(", graph")


def case_state(visit: Visit, start: str) -> str:
    """Why a row has no result; `start` begins the names of its cases, and is empty where there is none yet."""
    record = next((r for r in reversed(visit.records()) if start and r["step"].startswith(f"case {start}")), None)
    if record is None:
        return "not yet measured"
    return f"{record['status']}: {record['detail'].get('reason', 'cut off')}"


def notes(visit: Visit) -> Iterator[str]:
    record = visit.latest("counters")
    for case, lines in (record["detail"] if record else {}).items():
        if isinstance(lines, list):
            yield f"Kernels of {case}:"
            yield ""
            yield from (f"- {line}" for line in lines or ["no report"])
            yield ""


def keep_results(visit: Visit) -> None:
    """Lines of this visit that benchmarks/results does not hold yet are added there."""
    for file in visit.out.glob("*-gpu.jsonl"):
        kept = ROOT / "benchmarks" / "results" / file.name
        there = kept.read_text().splitlines() if kept.exists() else []
        with kept.open("a") as results:
            results.writelines(f"{line}\n" for line in file.read_text().splitlines() if line not in there)


# ------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the visit; 1 if a step failed or was cut off."""
    options = parsed(argv)
    visit = Visit(options.out.resolve(), options.emulate, time.monotonic() + 60 * options.minutes, options.commit)
    if options.worker:
        return work(visit, options.seconds, options.profile)
    if not options.resume:
        forget(visit)
    if importlib.util.find_spec("nvtx") is None:
        print("nvtx is not installed: ranges are left out")
    for step in STEPS:
        take(visit, step)
    text = summary(visit)
    (visit.out / "summary.md").write_text(text + "\n")
    if not visit.emulate:
        keep_results(visit)
    print(f"\n{text}")
    return int(any((visit.latest(step) or {"status": "cut"})["status"] not in ("done", "missing") for step in STEPS))


def forget(visit: Visit) -> None:
    """Removes what an earlier visit left in the folder."""
    for pattern in ("visit.*", "*-gpu.jsonl", "tests.xml", "ncu-*.txt", "summary.md"):
        for file in visit.out.glob(pattern):
            file.unlink()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_visit", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0, help="of this call; steps that do not fit are left")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--resume", action="store_true", help="keep what DIR has and do the rest")
    parser.add_argument("--emulate", action="store_true", help="tiny sizes on the CPU: a rehearsal")
    parser.add_argument("--commit", help="what the records name where there is no git history")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    parser.add_argument("--profile", metavar="CASE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
