"""The GPU visit: its rehearsal from end to end, resuming, and every operator on a device as streams, graphs and
torch.compile use it. The operators' cases run on the CPU as well, so that they are known to be right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import neuraldeps_kernels as nk
from neuraldeps_kernels._info import CUDA_KERNELS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_cases, gpu_visit, harness  # noqa: E402
from benchmarks.gpu_cases import OPERATIONS, Operation, relative_error  # noqa: E402

CARD = gpu_cases.Card(torch.device("cpu"), tiny=True)
CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
all_that_do_not_wait = pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if not o.waits], ids=lambda operation: operation.name
)


def inputs_of(operation: Operation, seed: int, device: str) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in operation.inputs(torch.Generator().manual_seed(seed)))


def on_cpu(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in inputs)


# ------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@every_operation
def test_operator_meets_its_oracle_on_poisoned_memory(operation: Operation, device: str) -> None:
    seed = torch.Generator().seed() % 2**31
    inputs = inputs_of(operation, seed, device)
    with harness.poisoned_outputs():
        assert torch.empty(3, device=device).isnan().all()
        first, second = operation.run(*inputs), operation.run(*inputs)
    assert operation.error(first, on_cpu(inputs)) <= operation.tolerance, f"seed {seed}"
    assert torch.equal(first, second)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.gradient], ids=lambda operation: operation.name)
def test_gradient_is_that_of_float64(operation: Operation, device: str) -> None:
    inputs = inputs_of(operation, 1, device)
    expected = operation.squares_gradient(tuple(x.double() for x in on_cpu(inputs)))
    with harness.poisoned_outputs():
        gradient = operation.squares_gradient(inputs)
    assert relative_error(gradient, expected) <= (1e-8 if inputs[0].dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize(
    "operation",
    {o.run: o for o in OPERATIONS if o.compiles and not o.waits}.values(),
    ids=lambda operation: operation.name,
)
def test_operator_under_torch_compile(operation: Operation, device: str) -> None:
    """Each function once, as one graph; on a GPU some of them with the code that inductor writes around them."""
    inputs = inputs_of(operation, 2, device)
    written = device == "cuda" and operation.name.startswith(("covlasso", "lambda_max", "covariance"))
    torch.compiler.reset()
    compiled = torch.compile(operation.run, fullgraph=True, backend="inductor" if written else "eager")
    assert operation.error(compiled(*inputs), on_cpu(inputs)) <= operation.tolerance


@pytest.mark.gpu
@all_that_do_not_wait
def test_operator_waits_for_nothing_but_its_stream(operation: Operation) -> None:
    """Inputs are made late on a side stream; a kernel on another stream would read what was there before."""
    inputs = inputs_of(operation, 3, "cuda")
    late = [torch.full_like(x, math.nan) for x in inputs]
    operation.run(*inputs)  # compiles and loads what needs it
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        torch.cuda.set_sync_debug_mode("error")  # the host must not wait
        try:
            result = operation.run(*late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert operation.error(result, on_cpu(inputs)) <= operation.tolerance


@pytest.mark.gpu
@all_that_do_not_wait
def test_operator_in_a_graph_follows_its_inputs(operation: Operation) -> None:
    inputs, others = inputs_of(operation, 4, "cuda"), inputs_of(operation, 5, "cuda")
    replay = harness.replayed(lambda: operation.run(*inputs), torch.device("cuda"))
    for target, source in zip(inputs, others, strict=True):
        target.copy_(source)
    result = replay()
    torch.cuda.synchronize()
    assert operation.error(result, on_cpu(others)) <= operation.tolerance
    assert torch.equal(result, operation.run(*others))


@pytest.mark.gpu
@every_operation
def test_operator_on_the_last_device(operation: Operation) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = inputs_of(operation, 6, f"cuda:{torch.cuda.device_count() - 1}")
    assert torch.cuda.current_device() == 0
    assert operation.error(operation.run(*inputs), on_cpu(inputs)) <= operation.tolerance


# ------------------------------------------------------------------------------------------------ cases


def test_fista_finds_what_covlasso_finds() -> None:
    cov = gpu_cases.lite0(CARD)
    lam = 0.3 * gpu_cases.largest_lam(cov)
    fista = gpu_cases.Fista(cov, lam, torch.float64)
    theta = fista.advance(fista.start(), 800)[0]
    torch.testing.assert_close(theta, nk.covlasso(cov.double(), lam, tol=1e-12).dense(), rtol=0, atol=1e-5)
    assert gpu_cases.largest_violation(cov, theta, lam) <= 1e-6


def test_violation_sees_wrong_coefficients_and_padding() -> None:
    cov = gpu_cases.lite0(CARD)
    lam = 0.3 * gpu_cases.largest_lam(cov)
    arguments = (cov, torch.arange(len(cov)), lam, None, 1e-6, gpu_cases.MAX_PIVOTS, len(cov))
    value, index, count, info = torch.ops.neuraldeps.covlasso(*arguments)
    assert gpu_cases.solution_error(cov, lam, (value, index, count, info)) <= 1e-6
    changed = value.clone()
    changed[3, 0] *= 1.01
    assert gpu_cases.solution_error(cov, lam, (changed, index, count, info)) > 1e-5
    unwritten = value.clone()
    unwritten[3, -1] = math.nan
    assert gpu_cases.solution_error(cov, lam, (unwritten, index, count, info)) == math.inf


def test_a_peer_that_cannot_run_is_missing() -> None:
    def absent() -> None:
        import no_such_package  # noqa: F401

    peer = gpu_cases.available(harness.Contender("rival", absent))
    assert isinstance(peer, harness.Missing)
    assert "no_such_package" in peer.reason


class Seen(TorchDispatchMode):
    """Names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "neuraldeps":
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


# Operators of hot paths whose names begin otherwise.
HOT_PATHS = {"neighbor": "retrieval", "reciprocal": "retrieval", "jaccard": "retrieval"}


def in_torch_alone(operator: str) -> bool:
    """Whether no kernel serves the operator's hot path on CUDA."""
    prefixes = HOT_PATHS | {path: path for path in CUDA_KERNELS}
    paths = [path for prefix, path in prefixes.items() if operator.startswith(prefix)]
    return bool(paths) and CUDA_KERNELS[max(paths, key=len)] is None


def test_every_operator_with_a_cuda_kernel_is_run() -> None:
    """By the small calls that streams, graphs and compute-sanitizer see; on the CPU, which has the same operators."""
    with Seen() as seen:
        for operation in OPERATIONS:
            inputs = inputs_of(operation, 0, "cpu")
            operation.run(*inputs)
            if operation.gradient:
                operation.squares_gradient(inputs)
    served = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("neuraldeps::")
        and all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA"))
    }
    assert len(served) > 20
    assert not [name for name in sorted(served - seen.names) if not in_torch_alone(name)]


def test_every_hot_path_with_a_cuda_kernel_is_timed() -> None:
    names = [recipe.name for recipe in gpu_cases.recipes(CARD, harness.Budget.of(quick=True))]
    starts = {"spectrum": "svdvals", "gnn_rerank": "gnn"}
    served = [starts.get(path, path) for path, kernel in CUDA_KERNELS.items() if kernel is not None]
    assert not [start for start in served if not any(start in name for name in names)]


def test_every_goal_has_its_cases() -> None:
    names = [recipe.name for recipe in gpu_cases.recipes(CARD, harness.Budget.of(quick=True))]
    prefixes = [start for _, start, _ in gpu_visit.GOALS if start]
    assert all(any(name.startswith(start) for name in names) for start in prefixes)
    assert all(sum(name.startswith(start) for start in prefixes) == 1 for name in names)


# ------------------------------------------------------------------------------------------------ visit


def visit(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "gpu_visit.py", "--emulate", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)


def test_rehearsal_runs_every_step_and_resumes_with_nothing_to_do(tmp_path: Path) -> None:
    result = visit("--out", tmp_path, "--minutes", 14)
    assert result.returncode == 0, result.stdout + result.stderr + (tmp_path / "visit.log").read_text()[-5000:]
    records = [json.loads(line) for line in (tmp_path / "visit.jsonl").read_text().splitlines()]
    states = {record["step"]: record["status"] for record in records}
    assert set(states.values()) == {"done"}
    cases = [recipe.name for recipe in gpu_cases.recipes(CARD, harness.Budget.of(quick=True))]
    assert set(states) == {*gpu_visit.STEPS, "rates", *(f"case {name}" for name in cases)}
    (results,) = tmp_path.glob("*-gpu.jsonl")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["case"] for record in found] == cases
    for record in found:
        assert {"device", "versions", "commit", "date", "floor_fraction", "rounds"} <= set(record)
        assert record["ours"]["status"] == "timed"
        assert str(ROOT) not in json.dumps(record)
    triton = [v for r in found if "float32" in r["case"] and "covariance" in r["case"] for v in r["variants"]]
    assert [v["name"] for v in triton] == ["ours Triton kernels"]
    text = (tmp_path / "summary.md").read_text()
    assert text in result.stdout
    assert text.count("not yet measured") == sum(not start for _, start, _ in gpu_visit.GOALS)

    before = (tmp_path / "visit.jsonl").read_text()
    assert visit("--out", tmp_path, "--resume").returncode == 0
    assert (tmp_path / "visit.jsonl").read_text() == before


def test_needs_no_packages_but_those_it_names(tmp_path: Path, run_python) -> None:
    """A device may lack everything else: nvtx is stood in for, tables and thread limits are not used."""
    (tmp_path / "nvtx.py").write_text(gpu_visit.NVTX_STAND_IN)
    code = (
        "import sys\n"
        "for name in ('rich', 'typer', 'threadpoolctl', 'sklearn', 'matplotlib', 'PIL', 'safetensors', 'cupy'):\n"
        "    sys.modules[name] = None\n"
        "import torch, nvtx\n"
        "assert nvtx.__doc__.startswith('Stands in')\n"
        "from benchmarks import gpu_cases, harness\n"
        "card = gpu_cases.Card(torch.device('cpu'), True)\n"
        "case = gpu_cases.path_case(card, gpu_cases.lite0(card), 3, 0.5)\n"
        "print(harness.measure(case, harness.Budget(True, 0.0, 0.01, 0.1))['rounds'])\n"
        "harness.profile(case, 1, 1)\n"
    )
    result = run_python(code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == harness.MIN_ROUNDS


def test_tests_for_a_gpu_are_collected_without_other_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {gpu_visit.TEST_PACKAGES}:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    there = new_visit(tmp_path / "out")
    command = [*gpu_visit.test_command(there.out), "--collect-only", "-q"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis brings one
    code, output = there.run(command, 300, **environment)
    assert code == 0, output[-3000:]
    marked = [file.name for file in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in file.read_text()]
    assert not [name for name in marked if f"<Module {name}>" not in output]


def test_without_time_nothing_starts_and_the_summary_says_so(tmp_path: Path) -> None:
    result = visit("--out", tmp_path, "--minutes", 0.1)
    assert result.returncode == 1
    assert not (tmp_path / "visit.jsonl").exists()
    assert "| build | not run |" in (tmp_path / "summary.md").read_text()


def new_visit(folder: Path, seconds: float = 300.0) -> gpu_visit.Visit:
    import time

    return gpu_visit.Visit(folder, True, time.monotonic() + seconds + gpu_visit.SUMMARY_SECONDS, None)


def test_a_step_that_was_cut_off_runs_again_and_one_that_failed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, calls = new_visit(tmp_path), []
    monkeypatch.setitem(gpu_visit.STEPS, "facts", lambda _: calls.append(1) or gpu_visit.Outcome("failed", {}))
    there.note("facts", "started")
    with there.records_file.open("a") as file:
        file.write('{"step": "facts", "sta')  # the machine went away here
    gpu_visit.take(there, "facts")
    gpu_visit.take(there, "facts")
    assert len(calls) == 1
    assert [record["status"] for record in there.records()] == ["started", "started", "failed"]


def test_a_fault_in_a_step_is_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = new_visit(tmp_path)
    monkeypatch.setitem(gpu_visit.STEPS, "build", lambda _: 1 // 0)
    gpu_visit.take(there, "build")
    record = there.latest("build")
    assert record is not None
    assert record["status"] == "failed"
    assert "ZeroDivisionError" in record["detail"]["reason"]


def test_a_process_past_its_time_is_ended_and_its_output_kept(tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = new_visit(tmp_path).judged([sys.executable, "-c", code], 3)
    assert outcome.status == "failed"
    assert outcome.detail == {"reason": "out of time or killed", "output": "begun\n"}
    assert "begun" in (tmp_path / "visit.log").read_text()


def test_a_case_that_ends_its_process_is_given_up_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is replaced by one that dies in its second case."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time; from pathlib import Path; from benchmarks.gpu_visit import Visit\n"
        "visit = Visit(Path(sys.argv[1]), True, time.monotonic() + 60, None)\n"
        "for case in ('case a', 'case b', 'case c'):\n"
        "    if not visit.is_over(case):\n"
        "        visit.note(case, 'started')\n"
        "        case == 'case b' and os.abort()\n"
        "        visit.note(case, 'done')\n"
    )
    monkeypatch.setattr(gpu_visit, "own_command", lambda visit: [sys.executable, worker, visit.out])
    there = new_visit(tmp_path)
    outcome = gpu_visit.measurements(there)
    assert outcome.status == "done"
    assert outcome.detail == {"done": 2, "failed": 1}
    assert there.times_started("case b") == gpu_visit.CRASHES


def test_reports_of_the_tools_are_read(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
        '<testcase name="bad"><failure message="x"/></testcase></testsuite></testsuites>'
    )
    counts = gpu_visit.test_counts(report)
    assert counts == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "bad": ["bad"]}
    ncu = (
        "  void nd::solve<float>(Args) (1056, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0\n"
        "    Duration                         us        91.52\n"
        "    Memory Throughput                 %        41.70\n"
        "    Memory Throughput      Tbyte/second         1.02\n"
        "    Achieved Occupancy                %        48.11\n"
    )
    expected = ["void nd::solve<float>, Duration 91.52 us, Memory Throughput 41.70 %, Achieved Occupancy 48.11 %"]
    assert gpu_visit.kernel_lines(ncu) == expected


def test_results_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_visit, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    there = new_visit(tmp_path / "out")
    (there.out / "2030-01-01-gpu.jsonl").write_text('{"case": "a"}\n')
    gpu_visit.keep_results(there)
    gpu_visit.keep_results(there)
    assert (tmp_path / "benchmarks" / "results" / "2030-01-01-gpu.jsonl").read_text() == '{"case": "a"}\n'
