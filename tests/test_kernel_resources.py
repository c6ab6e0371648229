"""Registers, stack and static shared memory of every CUDA kernel, for every default architecture, within their budget.

`python tests/test_kernel_resources.py --update` writes the budget anew from the built library.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("kernel_resources.json")
LIBRARY = ROOT / "neuraldeps_kernels" / "_lib" / "libneuraldeps_cuda.so"
FIELDS = ("REG", "STACK", "SHARED")


def measured_resources() -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {REG, STACK, SHARED}}} of the built library, by cuobjdump from the triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    resources: dict[str, dict[str, dict[str, int]]] = {}
    architecture = ""
    for line, usage in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if found := re.match(r"arch = (sm_\d+)", line):
            architecture = found[1]
        if found := re.match(r"\s*Function (\S+):", line):
            values = dict(re.findall(r"(\w+):(\d+)", usage))
            resources.setdefault(found[1], {})[architecture] = {field: int(values[field]) for field in FIELDS}
    return resources


@pytest.mark.compile
@pytest.mark.skipif(not LIBRARY.is_file(), reason="built without CUDA kernels")
def test_every_kernel_is_within_its_budget():
    """A kernel that is new, gone, or above its registers, stack (spills) or static shared memory fails."""
    budget, measured = json.loads(BUDGET.read_text()), measured_resources()
    assert set(measured) == set(budget)
    above = [
        f"{kernel} {architecture} {field}: {used[field]} > {budget[kernel][architecture][field]}"
        for kernel, architectures in measured.items()
        for architecture, used in architectures.items()
        for field in FIELDS
        if used[field] > budget[kernel][architecture][field]
    ]
    assert not above, "\n".join(above)


@pytest.mark.compile
@pytest.mark.skipif(not LIBRARY.is_file(), reason="built without CUDA kernels")
def test_static_and_dynamic_shared_memory_fit_a_block():
    """Static shared memory leaves room for the dynamic part below the 48 KB that need no attribute."""
    for kernel, architectures in measured_resources().items():
        for architecture, used in architectures.items():
            assert used["SHARED"] <= 48 * 1024, f"{kernel} {architecture}"


if __name__ == "__main__" and "--update" in sys.argv:
    BUDGET.write_text(json.dumps(measured_resources(), indent=1, sort_keys=True) + "\n")
