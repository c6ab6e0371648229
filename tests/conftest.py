"""What all tests share: skipping without a GPU, the emulated CUDA library, instruction-set levels, the build script."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import emulation
import pytest
import setuptools
import torch

import neuraldeps_kernels  # noqa: F401  registers torch.ops.neuraldeps


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def emulated() -> Path:
    """Library of all csrc/cuda/*.cu compiled for the CPU: the C interface of cuda_api.h on host memory."""
    return emulation.build_library(emulation.CUDA_SOURCES)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For oracles of many small operations, which a second thread only slows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cpu_levels() -> list[str]:
    """Instruction-set levels that this processor runs, slowest first."""
    return torch.ops.neuraldeps.cpu_levels()[1].split()


@pytest.fixture(scope="session")
def assert_sanitized(build_script: ModuleType, cpu_levels: list[str]) -> Callable[..., None]:
    """assert_sanitized(driver, *kernels, definitions, flags): tests/<driver> calls csrc/cpu/<kernel>, and all is well.

    One program, for the best level, under AddressSanitizer and UndefinedBehaviorSanitizer.
    """
    level = cpu_levels[-1]

    def check(driver: str, *kernels: str, definitions: Sequence[str] = (), flags: Sequence[str] = ()) -> None:
        program = emulation.build_program(
            [emulation.ROOT / "tests" / driver, *(emulation.ROOT / "csrc" / "cpu" / kernel for kernel in kernels)],
            sanitizer="address",
            definitions=[f"ND_CPU_LEVEL={level}", *definitions],
            flags=["-fopenmp-simd", *build_script.cpu_levels()[level], *flags],
        )
        result = emulation.run(program, timeout=600.0, ASAN_OPTIONS="detect_leaks=1")
        assert result.returncode == 0, result.stdout + result.stderr

    return check


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(code, *arguments, **environment): `code` in a fresh interpreter, with text output; never raises.

    What is decided once a process (NEURALDEPS_CPU_LEVEL, TRITON_INTERPRET) needs one of its own.
    """

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def build_script() -> ModuleType:
    """setup.py as a module, without building anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("NEURALDEPS_CUDA", "0")
        specification = importlib.util.spec_from_file_location("build_script", emulation.ROOT / "setup.py")
        assert specification
        assert specification.loader
        module = importlib.util.module_from_spec(specification)
        sys.modules["build_script"] = module
        specification.loader.exec_module(module)
        module.usable_nvcc.cache_clear()
    return module
