"""Triton kernels compiled ahead of time for GPUs that need not be there: what a module's front ends launch, as machine
code and what it uses. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ARCHITECTURES = [80, 90, 100, 120]
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, options


class _Recorder:
    """Stands where a kernel stood in its module and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def launches_of(module: ModuleType, recipe: Callable[[], object]) -> list[Launch]:
    """What `recipe` launches of the kernels of `module`, whose arguments may be on the CPU."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                patch.setattr(module, name, _Recorder(value, launches))
        recipe()
    return launches


def compiled(launch: Launch, arch: int) -> dict[str, int]:
    """Registers, bytes of stack and shared memory, threads, atomics and tensor-core instructions of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, options = launch
    types, constants, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name], hints[(i,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    warps = options.get("num_warps", 4)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=hints)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": result.metadata.shared,
        "threads": 32 * warps,
        "atomics": len(re.findall(r"\b(?:atom|red)\.", result.asm["ptx"])),
        "products": len(re.findall(r"\b(?:wgmma|mma|tcgen05\.mma)\S*\.", result.asm["ptx"])),
    }


def print_compiled(launches: dict[str, Launch], arch: int) -> None:
    """As JSON, by label, what launches compile to; for the process that `resources` starts."""
    print(json.dumps({label: compiled(launch, arch) for label, launch in launches.items()}))


def resources(file: str, arch: int, cache: Path) -> dict[str, dict[str, int]]:
    """What `file ARCH` prints last, as JSON: by label what kernels use, found in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, file, str(arch)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return found
