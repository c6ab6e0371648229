"""Builds the three binaries of the package.

- `_lib/libneuraldeps_cuda.so`   CUDA kernels, by nvcc: C interface, static CUDA runtime, no torch
- `_lib/libneuraldeps_ops.so`    torch operators and CPU kernels, by the C++ compiler: libtorch's stable ABI, no Python
- `_native`                      the same CPU kernels for NumPy and CuPy arrays, by pybind11: no torch

Environment: NEURALDEPS_CUDA=1|0|auto, NEURALDEPS_CUDA_ARCH_LIST (else TORCH_CUDA_ARCH_LIST), CUDA_HOME, CUDA_PATH,
CXX, MAX_JOBS, NEURALDEPS_CXXFLAGS, NEURALDEPS_LINEINFO, NEURALDEPS_NATIVE=1|0. Objects stay in build/objects and are
compiled again when their command line, their compiler or a file that they include changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "objects"
CUDA_LIBRARY = "neuraldeps_kernels._lib.libneuraldeps_cuda"
OPS_LIBRARY = "neuraldeps_kernels._lib.libneuraldeps_ops"
NATIVE_MODULE = "neuraldeps_kernels._native"

OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 8)
# PTX runs only on chips newer than it names, so that of 8.0 serves every chip between and after the listed ones.
DEFAULT_ARCHITECTURES = "8.0+PTX 9.0 10.0 12.0"

# Sources of csrc/cpu that are compiled once: nothing in them gains from wider vectors.
SCALAR_SOURCES = ("dispatch.cpp", "gnn_rerank.cpp", "reranking.cpp")
X86_LEVELS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def fail(message: str) -> SystemExit:
    return SystemExit(f"neuraldeps_kernels: {message}")


def num_jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return max(1, min(len(os.sched_getaffinity(0)), 8))
    if not text.isdigit() or int(text) == 0:
        raise fail(f"MAX_JOBS={text!r}: expected a positive number")
    return int(text)


def native_wanted() -> bool:
    """Whether `_native` is built; where pybind11 is not at hand, torch's operators can be built without it."""
    asked = os.environ.get("NEURALDEPS_NATIVE", "1")
    if asked not in ("0", "1"):
        raise fail(f"NEURALDEPS_NATIVE={asked!r}: expected 1 (built) or 0 (left out)")
    return asked == "1"


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home, "bin", "nvcc")
            if not nvcc.is_file():
                raise fail(f"{variable}={home!r}: expected the root of a CUDA toolkit, but {nvcc} does not exist")
            return str(nvcc)
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if not found:
        raise fail(f"cannot read the version of {nvcc}:\n{result.stdout}{result.stderr}")
    return int(found[1]), int(found[2])


def toolkit_of(nvcc: str) -> Path:
    """Root of the toolkit that nvcc itself uses: the nvcc on PATH may be a wrapper script from elsewhere."""
    text = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    return Path(found[1]).resolve() if found else Path(nvcc).resolve().parent.parent


@functools.cache
def usable_nvcc() -> tuple[str | None, str]:
    """(nvcc, "") for the CUDA kernels, or (None, why they are left out)."""
    asked = os.environ.get("NEURALDEPS_CUDA", "auto").lower()
    if asked not in ("0", "1", "auto"):
        raise fail(
            f"NEURALDEPS_CUDA={asked!r}: expected 1 (required), 0 (left out) or auto (built where nvcc is found)"
        )
    if asked == "0":
        return None, "NEURALDEPS_CUDA=0"
    oldest = f"{OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    nvcc = find_nvcc()
    if nvcc is None:
        problem = "nvcc was not found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    elif (version := nvcc_version(nvcc)) < OLDEST_NVCC:
        problem = f"{nvcc} is of CUDA {version[0]}.{version[1]}, and {oldest} or newer is needed"
    else:
        return nvcc, ""
    if asked == "1":
        raise fail(
            f"NEURALDEPS_CUDA=1, but {problem}.\n"
            f"Install the CUDA toolkit {oldest} or newer, or point CUDA_HOME at one; "
            "NEURALDEPS_CUDA=0 builds the CPU kernels alone."
        )
    print(f"neuraldeps_kernels: CPU kernels only: {problem}. NEURALDEPS_CUDA=1 makes this an error.", file=sys.stderr)
    return None, problem


def architectures() -> tuple[str, str]:
    """The environment variable that lists the CUDA architectures ("" if none does) and the list."""
    for variable in ("NEURALDEPS_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST"):
        if listed := os.environ.get(variable, "").strip():
            return variable, listed
    return "", DEFAULT_ARCHITECTURES


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags of the architecture list, which is written as torch writes it: '8.0+PTX 9.0'."""
    variable, listed = architectures()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    flags = []
    for name in re.split(r"[ ;,]+", listed):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            raise fail(f"{variable}={listed!r}: cannot read {name!r}; expected numbers like '8.0 9.0+PTX'")
        if known and f"compute_{found[1]}{found[2]}" not in known:
            offered = " ".join(re.sub(r"compute_(\d+)(\d)$", r"\1.\2", arch) for arch in known)
            raise fail(f"{variable}={listed!r}: {nvcc} cannot compile for {name!r}, only for {offered}")
        number = found[1] + found[2] + found[3]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if found[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cpu_levels() -> dict[str, list[str]]:
    """Instruction-set levels of csrc/cpu and their flags."""
    return X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


@dataclass(frozen=True)
class Step:
    """One call of a compiler or linker. Its output is named by a hash of the command and of the versions of the tools,
    so that builds with other flags, architectures or torch versions never take each other's objects."""

    command: list[str]  # without -o OUTPUT
    inputs: list[Path]
    stem: str
    made_by: str  # versions of the compiler and of the packages whose headers it reads

    @property
    def output(self) -> Path:
        key = hashlib.sha256("\0".join([self.made_by, *self.command]).encode()).hexdigest()[:12]
        return OBJECTS / f"{self.stem}-{key}.o"

    @property
    def depfile(self) -> Path:
        return self.output.with_suffix(".d")

    def is_stale(self) -> bool:
        """Never run, or an input changed since: the files given, and the headers that the compiler noted."""
        if not self.output.is_file():
            return True
        noted = self.depfile.read_text().replace("\\\n", " ").partition(":")[2] if self.depfile.is_file() else ""
        inputs = [*self.inputs, *map(Path, shlex.split(noted))]
        made = self.output.stat().st_mtime_ns
        return any(not path.is_file() or path.stat().st_mtime_ns > made for path in inputs)

    def run(self) -> None:
        unfinished = self.output.with_suffix(".part")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.command, "-o", str(unfinished)]
        if "-c" in command:
            command += ["-MMD", "-MF", str(self.depfile)]
        print(f"+ {shlex.join(command)}\n", end="", flush=True)  # one write: steps run side by side
        started = time.time_ns()
        result = subprocess.run(command)
        if result.returncode != 0:
            raise fail(f"{command[0]} failed with exit status {result.returncode}; its message stands above")
        os.utime(unfinished, ns=(started, started))  # an input edited meanwhile is newer
        unfinished.replace(self.output)


def compile_step(compiler: list[str], flags: list[str], source: Path, stem: str, made_by: str) -> Step:
    return Step([*compiler, *flags, "-c", str(source)], [source], f"{stem}/{source.stem}", made_by)


def run_stale(steps: Sequence[Step]) -> None:
    with ThreadPoolExecutor(num_jobs()) as pool:
        list(pool.map(Step.run, [step for step in steps if step.is_stale()]))


def build_requirement(name: str) -> ModuleType:
    """A module of build-system.requires; a build without isolation must find it installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise fail(f"{name} is needed to build without isolation: python -m pip install {name}") from None


def checked_torch() -> ModuleType:
    torch = build_requirement("torch")
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        oldest = f"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
        raise fail(f"torch {oldest} or newer is needed to build; this is torch {torch.__version__}")
    return torch


class Binaries:
    """The compile and link steps of every binary."""

    def __init__(self) -> None:
        self.torch = checked_torch()
        self.torch_root = Path(self.torch.__file__).parent
        self.pybind11 = build_requirement("pybind11") if native_wanted() else None
        self.nvcc, self.no_cuda_reason = usable_nvcc()
        self.toolkit = toolkit_of(self.nvcc) if self.nvcc else None
        self.cxx = shlex.split(os.environ.get("CXX", "g++"))
        self.user_flags = shlex.split(os.environ.get("NEURALDEPS_CXXFLAGS", ""))
        self.cxx_flags = [
            *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wextra"),
            *(f"-I{ROOT}/csrc/include", f"-fmacro-prefix-map={ROOT}/=", *self.user_flags),
        ]
        self.nvtx = self.toolkit is not None and (self.toolkit / "include/nvtx3/nvtx3.hpp").is_file()

    @functools.cached_property
    def compiler(self) -> str:
        """First line of the C++ compiler's version."""
        try:
            result = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise fail(f"the C++ compiler {shlex.join(self.cxx)!r} does not run ({error}); set CXX") from None
        return result.stdout.splitlines()[0]

    def info(self) -> dict[str, object]:
        """What `neuraldeps info` says of the build."""
        return {
            "compiler": self.compiler,
            "torch": self.torch.__version__,
            "pybind11": self.pybind11 and self.pybind11.__version__,
            "cuda": ".".join(map(str, nvcc_version(self.nvcc))) if self.nvcc else None,
            "cuda_architectures": architectures()[1] if self.nvcc else None,
            "no_cuda_reason": self.no_cuda_reason,
            "nvtx": self.nvtx,
        }

    def cpu(self) -> list[Step]:
        """csrc/cpu: everything but SCALAR_SOURCES once a level."""
        folder = ROOT / "csrc/cpu"
        scalar = [folder / name for name in SCALAR_SOURCES]
        steps = [compile_step(self.cxx, self.cxx_flags, source, "cpu", self.compiler) for source in scalar]
        for level, level_flags in cpu_levels().items():
            flags = [*self.cxx_flags, *level_flags, f"-DND_CPU_LEVEL={level}"]
            for source in sorted(folder.glob("*.cpp")):
                if source not in scalar:
                    steps.append(compile_step(self.cxx, flags, source, f"cpu/{level}", self.compiler))
        return steps

    def ops(self) -> list[Step]:
        target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL"
        flags = [
            *(*self.cxx_flags, "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={target}"),
            *("-isystem", str(self.torch_root / "include")),
        ]
        if self.nvtx:
            flags += ["-DND_NVTX", "-isystem", f"{self.toolkit}/include"]
        steps, made_by = [], f"{self.compiler}, torch {self.torch.__version__}"
        for source in sorted((ROOT / "csrc/torch").glob("*.cpp")):
            # The build facts only where they are used, so that they decide over one object.
            facts = [f"-DND_BUILD_INFO={json.dumps(json.dumps(self.info()))}"] if source.stem == "ops" else []
            steps.append(compile_step(self.cxx, [*flags, *facts], source, "torch", made_by))
        return steps

    def native(self, pybind11: ModuleType) -> list[Step]:
        headers = (pybind11.get_include(), sysconfig.get_paths()["include"])
        flags = [*self.cxx_flags, *(flag for folder in headers for flag in ("-isystem", folder))]
        made_by = f"{self.compiler}, pybind11 {pybind11.__version__}, Python {sys.version}"
        sources = sorted((ROOT / "python_bindings").glob("*.cpp"))
        return [compile_step(self.cxx, flags, source, "native", made_by) for source in sources]

    def cuda(self, nvcc: str) -> list[Step]:
        flags = [
            *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
            *(f"-I{ROOT}/csrc/include", "--threads", "2", *architecture_flags(nvcc)),
        ]
        if "CXX" in os.environ:
            flags += ["-ccbin", self.cxx[0]]
        if os.environ.get("NEURALDEPS_LINEINFO") == "1":
            flags += ["-lineinfo"]
        if nvcc_version(nvcc) >= (13, 0):  # every driver of these versions reads it
            flags += ["--compress-mode=size"]
        made_by = f"{self.compiler}, nvcc {nvcc_version(nvcc)}"
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        return [compile_step([nvcc], flags, source, "cuda", made_by) for source in sources]

    def static_cuda_runtime(self) -> Path:
        for pattern in ("lib64", "lib", "targets/*/lib"):
            for folder in sorted(self.toolkit.glob(pattern)) if self.toolkit else []:
                if (folder / "libcudart_static.a").is_file():
                    return folder / "libcudart_static.a"
        raise fail(f"the CUDA toolkit in {self.toolkit} lacks libcudart_static.a; NEURALDEPS_CUDA=0 builds without it")

    def steps(self) -> dict[str, tuple[list[Step], Step]]:
        """Per binary its compile steps and its link step; nvcc's first, as they take longest."""
        cpu = self.cpu()
        system = ["-Wl,--no-undefined", "-ldl", "-lrt", "-lpthread"]
        torch_flags = [f"-L{self.torch_root}/lib", "-ltorch_cpu", "-lc10"]
        plan = {OPS_LIBRARY: ([*cpu, *self.ops()], [*self.user_flags, *torch_flags, *system])}
        if self.pybind11:
            # A Python module takes the symbols of Python from the interpreter that loads it.
            plan[NATIVE_MODULE] = ([*cpu, *self.native(self.pybind11)], [*self.user_flags, "-ldl"])
        if self.nvcc:
            runtime = [str(self.static_cuda_runtime()), "-Wl,--exclude-libs,ALL", "-s"]
            plan = {CUDA_LIBRARY: (self.cuda(self.nvcc), [*runtime, *system]), **plan}

        def link(name: str, objects: list[Path], flags: list[str]) -> Step:
            command = [*self.cxx, "-shared", *map(str, objects), *flags]
            return Step(command, objects, name.rpartition(".")[2], self.compiler)

        return {
            name: (compiles, link(name, [step.output for step in compiles], flags))
            for name, (compiles, flags) in plan.items()
        }


class Build(build):
    def run(self) -> None:
        # Whatever lies in the library folder goes into the wheel: files of an earlier build must not.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildBinaries(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what was asked for is copied, also over a younger library of another build

    def build_extensions(self) -> None:
        steps = Binaries().steps()
        compiles = {step.output: step for compiles, _ in steps.values() for step in compiles}
        run_stale(list(compiles.values()))
        run_stale([link for _, link in steps.values()])
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(steps[extension.name][1].output), str(output))

    def copy_extensions_to_source(self) -> None:
        (ROOT / self.get_ext_filename(OPS_LIBRARY)).parent.mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        if CUDA_LIBRARY not in (e.name for e in self.extensions):
            (ROOT / self.get_ext_filename(CUDA_LIBRARY)).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        # No Python in the libraries, so no Python tag in their names.
        if fullname.rpartition(".")[2].startswith("lib"):
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))


def extensions() -> list[Extension]:
    names = [OPS_LIBRARY, *([NATIVE_MODULE] if native_wanted() else [])]
    if {"sdist", "egg_info", "dist_info"}.isdisjoint(sys.argv) and usable_nvcc()[0]:
        names.append(CUDA_LIBRARY)
    return [Extension(name, []) for name in names]


setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": BuildBinaries})
