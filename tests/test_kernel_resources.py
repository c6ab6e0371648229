"""Registers, stack and static shared memory of every CUDA kernel, for every default architecture, within their budget.

`python tests/test_kernel_resources.py --update` writes the budget anew. What is measured is the built library, or where
there is none the sources of csrc/cuda, compiled by nvcc.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("kernel_resources.json")
LIBRARY = ROOT / "neuraldeps_kernels" / "_lib" / "libneuraldeps_cuda.so"
ARCHITECTURES = ("80", "90", "100", "120")
FIELDS = ("REG", "STACK", "SHARED")

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not LIBRARY.is_file() and not shutil.which("nvcc"), reason="no CUDA kernels and no nvcc"),
]


@cache
def measured_resources() -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {REG, STACK, SHARED}}}; bytes of stack, and of shared memory with the reserved part."""
    if LIBRARY.is_file():
        return resources_of(LIBRARY)
    resources: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            made = Path(folder, source.stem + ".o")
            codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
            options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}", *codes]
            subprocess.run(["nvcc", *options, "-c", str(source), "-o", str(made)], check=True)
            resources |= resources_of(made)
    return resources


def resources_of(binary: Path) -> dict[str, dict[str, dict[str, int]]]:
    """By cuobjdump from the triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    resources: dict[str, dict[str, dict[str, int]]] = {}
    architecture = ""
    for line, usage in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if found := re.match(r"arch = (sm_\d+)", line):
            architecture = found[1]
        if found := re.match(r"\s*Function (\S+):", line):
            values = dict(re.findall(r"(\w+):(\d+)", usage))
            resources.setdefault(found[1], {})[architecture] = {field: int(values[field]) for field in FIELDS}
    return resources


def test_every_kernel_is_within_its_budget():
    """A kernel that is new, gone, missing for an architecture, or above its budget of a resource fails."""
    budget, measured = json.loads(BUDGET.read_text()), measured_resources()
    assert {k: sorted(v) for k, v in measured.items()} == {k: sorted(v) for k, v in budget.items()}
    above = [
        f"{kernel} {architecture} {field}: {used[field]} > {budget[kernel][architecture][field]}"
        for kernel, architectures in measured.items()
        for architecture, used in architectures.items()
        for field in FIELDS
        if used[field] > budget[kernel][architecture][field]
    ]
    assert not above, "\n".join(above)


def test_covlasso_occupancy():
    """8 blocks of 128 threads an SM in float32, 4 in float64, and next to no stack."""
    kernels = {k: v for k, v in measured_resources().items() if "covlasso" in k and "sort_targets" not in k}
    assert len(kernels) == 3  # solve_targets in both types, find_top_k in float64
    for kernel, architectures in kernels.items():
        registers, stack = (64, 64) if "solve_targetsIf" in kernel else (128, 0)
        for used in architectures.values():
            assert used["REG"] <= registers
            assert used["STACK"] <= stack


def test_static_and_dynamic_shared_memory_fit_a_block():
    """Static shared memory leaves room for the dynamic part below the 48 KB that need no attribute."""
    for kernel, architectures in measured_resources().items():
        for architecture, used in architectures.items():
            assert used["SHARED"] <= 48 * 1024, f"{kernel} {architecture}"


if __name__ == "__main__" and "--update" in sys.argv:
    BUDGET.write_text(json.dumps(measured_resources(), indent=1, sort_keys=True) + "\n")
