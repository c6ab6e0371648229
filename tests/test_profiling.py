"""NVTX ranges: seen by a profiler, in Python and in C++, and absent where none listens."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from neuraldeps_kernels.profiling import annotated

SOLVE = """
import torch
import neuraldeps_kernels as nk
cov = torch.eye(4) + 0.5
assert nk.covlasso(cov, lam_ratio=0.5).status.tolist() == [0] * 4
try:
    nk.covlasso(cov, lam=-1.0)
except ValueError:
    print("refused")
"""


@pytest.fixture(scope="module")
def nvtx_headers(build_script: ModuleType) -> Path:
    nvcc = build_script.find_nvcc()
    if nvcc is None:
        pytest.skip("the NVTX headers come with the CUDA toolkit, and there is none")
    return build_script.toolkit_of(nvcc) / "include"


@pytest.fixture(scope="module")
def profiler(nvtx_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Library that prints each range, in place of a profiler."""
    library = tmp_path_factory.mktemp("nvtx") / "libprofiler.so"
    source = Path(__file__).with_name("nvtx_injection.cpp")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-isystem", nvtx_headers, source, "-o", library]
    subprocess.run(command, check=True)
    return library


def test_ranges_of_python_and_cpp_nest_in_one_domain(run_python, profiler):
    result = run_python(SOLVE, NVTX_INJECTION64_PATH=str(profiler))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    solved, refused = lines[: lines.index("refused")], lines[-3:]
    depth, seen = 0, set()
    for line in solved:
        kind, _, name = line.partition(" ")
        depth -= kind == "pop"
        if kind == "push":
            seen.add((name, depth))
            depth += 1
    assert depth == 0
    assert ("neuraldeps:covlasso", 0) in seen  # the public function
    assert ("neuraldeps:covlasso", 1) in seen  # the launch below its operator
    assert refused == ["push neuraldeps:covlasso", "pop neuraldeps", "refused"]  # an exception closes its range


def test_bench_profiles_a_case_after_a_warm_up(run_python, profiler):
    """`neuraldeps bench CASE --profile`: ranges of the warm-up and then of the case, each around its calls of ours."""
    name = "overhead operator call, inference mode"
    command = ["bench", "overhead", "--quick", "--case", name, "--profile"]
    code = f"from neuraldeps_kernels.cli import main; main({command})"
    result = run_python(code, NVTX_INJECTION64_PATH=str(profiler))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    places = [lines.index(f"push neuraldeps:{part}") for part in ("warm-up", name)]
    ends = [place + lines[place:].index("pop neuraldeps") for place in places]
    assert places[0] < ends[0] < places[1] < ends[1]
    assert lines.count(f"push neuraldeps:{name}") == 1
    assert "x ours" not in result.stdout  # no table: nothing is timed


def test_without_a_profiler_a_public_function_is_left_as_it_is():
    def function(x: int) -> int:
        return x

    assert annotated(function) is function


def test_annotated_functions_compile_under_a_profiler(run_python, profiler):
    code = """
import torch
from neuraldeps_kernels.profiling import annotated

@annotated
def double(x):
    return 2 * x

assert double.__name__ == "double" and hasattr(double, "__wrapped__")
compiled = torch.compile(double, fullgraph=True, backend="eager")
assert compiled(torch.ones(1)).item() == 2
"""
    result = run_python(code, NVTX_INJECTION64_PATH=str(profiler))
    assert result.returncode == 0, result.stderr
    assert "double" not in result.stdout


def test_cpp_ranges_are_built_where_the_headers_are(nvtx_headers):
    assert '"nvtx": true' in torch.ops.neuraldeps.build_info()
