"""Compile CUDA C++ for the CPU with the emulation of csrc/emu, and run it: what the tests of every .cu file share.

Two products, both from the same unmodified sources:

    library = build_library(CUDA_SOURCES)                # Path of a .so with the C interface of cuda_api.h, for ctypes
    program = build_program([path], sanitizer="thread")  # Path of an executable; one source has main()
    result = run(program, "case", order="random:3")      # CompletedProcess with text: .returncode, .stdout, .stderr

`sanitizer` is one of SANITIZERS: "plain" (-O2), "address" (AddressSanitizer and UndefinedBehaviorSanitizer, which end
the program at the first finding) or "thread" (ThreadSanitizer, likewise). Only plain libraries can be loaded into
Python; sanitized code runs as a program of its own. `order` is one of ORDERS or "random:<seed>": the order in which the
emulation runs the threads of a block and the blocks of a launch. Inside Python set os.environ["ND_EMU_ORDER"]; each
launch reads it. Sources include "neuraldeps/device.hpp"; device/cases.hpp helps to write programs.

Objects and products are kept under build/emulation, named by the hash of the preprocessed source and the command line:
a second call costs one preprocessor run a source, and an edited source or header is never missed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "emulation"
CUDA_SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
ORDERS = ("forward", "reverse", "random:1")
SANITIZERS = {
    "plain": ("-O2",),
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}
COMPILE_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{ROOT / 'csrc' / 'emu'}",
    f"-I{ROOT / 'csrc' / 'include'}",
)


def build_library(sources: Sequence[Path], *, sanitizer: str = "plain", definitions: Sequence[str] = ()) -> Path:
    """Shared library of `sources`; `definitions` are preprocessor definitions such as "NAME=1"."""
    return _build(sources, ".so", sanitizer, definitions)


def build_program(
    sources: Sequence[Path], *, sanitizer: str = "plain", definitions: Sequence[str] = (), flags: Sequence[str] = ()
) -> Path:
    """Executable of `sources`, one of which defines main(); `flags` go to the compiler after its own."""
    return _build(sources, "", sanitizer, definitions, flags)


def run(
    program: Path, *arguments: str, order: str = "forward", timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `program arguments...` with the given thread and block order; keywords become environment variables."""
    options = {
        "ND_EMU_ORDER": order,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    }
    return subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **options, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _build(
    sources: Sequence[Path], suffix: str, sanitizer: str, definitions: Sequence[str], more_flags: Sequence[str] = ()
) -> Path:
    flags = (*COMPILE_FLAGS, *SANITIZERS[sanitizer], *more_flags, *(f"-D{d}" for d in definitions))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(Path(source).resolve(), flags), sources))
    link = (_compiler(), *SANITIZERS[sanitizer], *(("-shared",) if suffix == ".so" else ()))
    key = _digest(*link, *(o.name for o in objects))
    name = f"{Path(sources[0]).stem}-{sanitizer}-{key}{suffix}"
    return _cached(CACHE / name, lambda out: _call([*link, *map(str, objects), "-o", out]))


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    """Object file of one source: a .cu file is compiled as C++."""
    command = (_compiler(), *flags, "-x", "c++", str(source))
    key = _digest(_compiler_version(), _call([*command, "-E"]), *flags)
    return _cached(CACHE / f"{source.stem}-{key}.o", lambda out: _call([*command, "-c", "-o", out]))


def _cached(product: Path, make: Callable[[str], object]) -> Path:
    """`product`, made at most once even by test processes that run side by side, and never seen half-written."""
    product.parent.mkdir(parents=True, exist_ok=True)
    with open(product.with_name(product.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not product.exists():
            unfinished = product.with_name(product.name + ".part")
            make(str(unfinished))
            unfinished.replace(product)
    return product


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _compiler_version() -> str:
    return _call([_compiler(), "--version"])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _call(command: Sequence[str]) -> str:
    """Standard output of a compiler call; RuntimeError with its messages if it fails."""
    result = subprocess.run(list(command), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout
