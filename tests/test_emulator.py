"""The emulation of CUDA on the CPU (csrc/emu): planted faults are found, correct kernels are right and clean.

faults/*.cu hold kernels with one fault each, device/*.cu correct kernels that check themselves against plain C++.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import emulation
import numpy as np
import pytest
import torch
from emulation import ORDERS, SANITIZERS

TESTS = Path(__file__).parent
DEVICE_SOURCES = [TESTS / "device" / f"{name}.cu" for name in ("main", "collectives", "memory", "arithmetic")]
FAULT_SOURCES = [TESTS / "device" / "main.cu", *sorted((TESTS / "faults").glob("*.cu"))]


@cache
def faulty_program(sanitizer: str) -> Path:
    return emulation.build_program(FAULT_SOURCES, sanitizer=sanitizer)


@cache
def correct_program(sanitizer: str) -> Path:
    return emulation.build_program([*DEVICE_SOURCES, TESTS / "device" / "emulator.cu"], sanitizer=sanitizer)


# What finds each fault, by build. Plain: in the three orders of ORDERS; the others: in the first alone.
#   "silent"    nothing: same results in every order, exit status 0
#   "orders"    results that differ between orders
#   "nan"       results that are NaN
#   other text  what the report on stderr says
RACE, OVERRUN = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
DEADLOCK, RETURNED = "deadlock", "names a lane that has returned"
PAST_THE_END = "wrote past the end of the dynamic shared memory"
FAULTS = {  # name: (plain, address, thread)
    "missing_barrier": ("orders", "silent", RACE),
    "missing_barrier_in_loop": ("orders", "silent", RACE),
    "syncwarp_for_barrier": ("orders", "silent", RACE),
    "different_barriers": ("meet at different barriers",) * 3,
    "barrier_and_shuffle": (DEADLOCK,) * 3,
    "shared_overrun": ("silent", "index 32 out of bounds for type 'int [32]'", "silent"),
    "dynamic_shared_overrun": (PAST_THE_END, OVERRUN, PAST_THE_END),
    "global_overrun": ("silent", OVERRUN, "WARNING: ThreadSanitizer"),  # in its view: of memory already freed
    "unset_dynamic_shared": ("nan", "nan", "nan"),
    "unset_global": ("nan", "nan", "nan"),
    "misaligned_float4": ("silent", "misaligned address", "silent"),
    "overflow_rewritten": ("silent", "silent", "silent"),
    "overflow": ("silent", "signed integer overflow: 70000 * 70000", "silent"),
    "copy_used_too_early": ("silent", "silent", "silent"),  # but see test_a_copy_happens_when_waited_for
    "copy_never_waited_for": ("before its asynchronous copies are done",) * 3,
    "one_element_by_many": ("orders", "silent", RACE),
    "count_without_atomic": ("silent", "silent", RACE),
    "one_element_by_blocks": ("orders", "silent", "silent"),
    "block_after_block": ("orders", "silent", "silent"),
    "shared_from_block_before": ("orders", "silent", "silent"),
    "shuffle_after_return": (RETURNED,) * 3,
    "missing_syncwarp": ("orders", "silent", RACE),
    "different_masks": ("disagree about the mask",) * 3,
    "lane_outside_its_mask": ("the calling lane is not in its own mask",) * 3,
    "source_outside_mask": ("a shuffle reads a lane outside its mask",) * 3,
    "different_collectives": ("meet at different collectives",) * 3,
    "full_mask_of_partial_warp": ("names a lane that is not there",) * 3,
}


def outcome(results: list[subprocess.CompletedProcess[str]]) -> str:
    """What several runs of one program show, in the words of FAULTS; all of stderr if there was a report."""
    if any(result.returncode for result in results):
        assert all(result.returncode for result in results)
        return "\n".join(result.stderr for result in results)
    if any("nan" in result.stdout for result in results):
        return "nan"
    return "silent" if len({result.stdout for result in results}) == 1 else "orders"


def test_every_planted_fault_is_listed():
    planted = re.findall(r"ND_CASE\((\w+)\)", "".join(source.read_text() for source in FAULT_SOURCES))
    assert sorted(planted) == sorted(FAULTS)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault: str, sanitizer: str):
    program = faulty_program(sanitizer)
    orders = ORDERS if sanitizer == "plain" else ORDERS[:1]
    found = outcome([emulation.run(program, fault, order=order) for order in orders])
    assert FAULTS[fault][list(SANITIZERS).index(sanitizer)] in found


def test_a_race_is_reported_with_the_lines_of_the_kernel():
    report = emulation.run(faulty_program("thread"), "missing_barrier").stderr
    source = (TESTS / "faults" / "barriers.cu").read_text().splitlines()
    lines = [int(n) for n in re.findall(r"#0 missing_barrier \S*barriers\.cu:(\d+)", report)]
    assert sorted(source[n - 1].strip() for n in lines) == [
        "out[64 * blockIdx.x + t] = s[63 - t];",
        "s[t] = t + 100 * blockIdx.x;",
    ]


def test_a_deadlock_is_reported_thread_by_thread():
    report = emulation.run(faulty_program("plain"), "barrier_and_shuffle").stderr.splitlines()
    assert report[0] == "nd_emu: barrier_and_shuffle<<<(1,1,1), (64,1,1)>>>, block (0,0,0): deadlock"
    shuffle, barrier = r"__shfl_xor_sync at \S*barriers\.cu:\d+, mask ffffffff", r"__syncthreads at \S*barriers\.cu:\d+"
    expected = [
        rf"  thread \(0,0,0\) to \(31,0,0\): {barrier}",
        rf"  thread \(32,0,0\) to \(39,0,0\): {shuffle}",
        rf"  thread \(40,0,0\): {barrier}",
        rf"  thread \(41,0,0\) to \(63,0,0\): {shuffle}",
    ]
    assert len(report) == 5
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, report[1:], strict=True))


def test_a_copy_happens_when_waited_for():
    result = emulation.run(faulty_program("plain"), "copy_used_too_early")
    # Not waited for, waited for, of a group not yet waited for: zeros are what was there before the data, ones.
    assert result.stdout.split()[1:] == ["0"] * 32 + ["1"] * 32 + ["0"] * 32


@pytest.mark.parametrize(
    ("sanitizer", "order"),
    [(sanitizer, order) for sanitizer in SANITIZERS for order in (ORDERS[1:] if sanitizer == "thread" else ORDERS)],
)
def test_correct_kernels(sanitizer: str, order: str):
    result = emulation.run(correct_program(sanitizer), order=order)
    assert result.returncode == 0, result.stdout + result.stderr


def test_correct_kernels_with_the_portable_stack_switch():
    program = emulation.build_program(DEVICE_SOURCES[:2], definitions=["ND_EMU_UCONTEXT=1"])
    result = emulation.run(program, order="random:2")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_limits_of_devices(device: str):
    cases = ("shared_memory_must_be_allowed", "device_properties", "shapes_of_launches")
    result = emulation.run(correct_program("plain"), *cases, ND_EMU_DEVICE=device)
    assert result.returncode == 0, result.stdout
    optin = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}[device] << 10
    refused = {int(n) for n in re.findall(r"touch_shared<<<.*, (\d+)>>>: invalid argument", result.stderr)}
    assert refused == {(48 << 10) + 4, (64 << 10) + 4, optin + 4}


def test_an_unknown_case_fails():
    assert emulation.run(correct_program("plain"), "no_such_case").returncode == 1


@pytest.mark.parametrize("variable", ["ND_EMU_ORDER=random:x", "ND_EMU_ORDER=backward", "ND_EMU_DEVICE=sm_10"])
def test_an_unknown_setting_is_refused(variable: str):
    name, _, value = variable.partition("=")
    settings = {"ND_EMU_DEVICE": "sm_90", name: value}
    result = emulation.run(
        correct_program("plain"),
        "last_error",
        "vector_loads",
        order=settings.pop("ND_EMU_ORDER", "forward"),
        **settings,
    )
    assert result.returncode != 0
    assert f"{variable}: expected one of" in result.stderr


# ---- half and bfloat16 against NumPy and torch ----


@cache
def float16_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulation.build_library([TESTS / "device" / "float16.cu"])))


def call(name: str, *arguments: np.ndarray | int) -> None:
    pointers = [
        a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments
    ]
    assert getattr(float16_library(), name)(*pointers) == 0


class Half:
    name = "half"

    @staticmethod
    def rounded(x: np.ndarray) -> np.ndarray:
        """float32 or float64 -> bits [uint16], nearest even, by NumPy."""
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)

    @staticmethod
    def widened(bits: np.ndarray) -> np.ndarray:
        return bits.view(np.float16).astype(np.float32)


class Bfloat16:
    name = "bfloat16"

    @staticmethod
    def rounded(x: np.ndarray) -> np.ndarray:
        """float32 or float64 -> bits [uint16]. torch goes through float32: rounded to odd, that loses no tie."""
        with np.errstate(over="ignore"):
            nearest = x.astype(np.float32)
        away = np.abs(nearest.astype(np.float64)) > np.abs(x)
        towards_zero = np.where(away, np.nextafter(nearest, np.float32(0)), nearest)
        odd = np.where(towards_zero == x, towards_zero.view(np.uint32), towards_zero.view(np.uint32) | 1)
        safe = np.where(np.isfinite(x) & np.isfinite(nearest), odd.astype(np.uint32).view(np.float32), nearest)
        return torch.from_numpy(safe).bfloat16().view(torch.int16).numpy().view(np.uint16)

    @staticmethod
    def widened(bits: np.ndarray) -> np.ndarray:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


FORMATS = [Half, Bfloat16]
ALL_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, widened: Callable[[np.ndarray], np.ndarray]) -> None:
    nan = np.isnan(widened(expected))
    np.testing.assert_array_equal(np.isnan(widened(actual)), nan)
    np.testing.assert_array_equal(actual[~nan], expected[~nan])


def samples_around_ties(f: type[Half | Bfloat16]) -> np.ndarray:
    """Every number of the format, the midpoints between neighbours, and doubles just beside those: [float64]."""
    numbers = f.widened(ALL_BITS)
    numbers = np.unique(numbers[np.isfinite(numbers)]).astype(np.float64)
    ties = (numbers[1:] + numbers[:-1]) / 2
    beyond = numbers[-1] + (numbers[-1] - numbers[-2]) * np.array(
        [0.49, 0.5, 0.51, 2]
    )  # rounds to the largest, or over
    special = [np.inf, np.nan, 0.0, -0.0, 5e-324, 1e300]
    x = np.concatenate([numbers, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), beyond, special])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("f", FORMATS)
def test_float16_to_float(f):
    x = np.empty(ALL_BITS.size, np.float32)
    call(f"{f.name}_to_float", ALL_BITS, x, x.size)
    np.testing.assert_array_equal(x, f.widened(ALL_BITS))
    np.testing.assert_array_equal(np.signbit(x), ALL_BITS >> 15 == 1)


@pytest.mark.parametrize("f", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float16_from_float(f, dtype):
    with np.errstate(over="ignore"):
        x = samples_around_ties(f).astype(dtype)
    bits = np.empty(x.size, np.uint16)
    call(f"{f.name}_from_{'float' if dtype == np.float32 else 'double'}", x, bits, x.size)
    assert_same_bits(bits, f.rounded(x), f.widened)


@pytest.mark.parametrize("f", FORMATS)
def test_float16_arithmetic(f):
    rng = np.random.default_rng(0)
    special = f.rounded(np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-7, 6e4], np.float32))
    near_one = f.rounded(rng.normal(size=20000).astype(np.float32))
    a = np.concatenate([rng.permutation(ALL_BITS), near_one, np.repeat(special, special.size)])
    b = np.concatenate([rng.permutation(ALL_BITS), rng.permutation(near_one), np.tile(special, special.size)])
    out = np.empty((10, a.size), np.uint16)
    call(f"{f.name}_combine", a, b, out, a.size)
    with np.errstate(all="ignore"):
        x, y = f.widened(a), f.widened(b)
        wide = x.astype(np.float64)
        exact = [x + y, x - y, x * y, x / y, wide * y + wide]  # the float32 results round as the exact ones do
        for k, value in enumerate(exact):
            assert_same_bits(out[k], f.rounded(value), f.widened)
        np.testing.assert_array_equal(f.widened(out[5]), np.fmax(x, y))
        np.testing.assert_array_equal(f.widened(out[6]), np.fmin(x, y))
        np.testing.assert_array_equal(out[7], a ^ 0x8000)
        np.testing.assert_array_equal(out[8], a & 0x7FFF)
        np.testing.assert_array_equal(out[9], np.select([x < y, x == y, x > y], [1, 2, 3], 0))


@pytest.mark.parametrize("f", FORMATS)
def test_pairs_of_float16(f):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32)
    out = np.empty((4, a.size), np.uint16)
    call(f"{f.name}_combine_pairs", a, b, out, a.size)
    x, y = (f.widened(f.rounded(v)) for v in (a, b))
    wide = x.astype(np.float64)
    for k, value in enumerate([x + y, x * y, wide * y + wide, x.reshape(-1, 2)[:, ::-1].ravel()]):
        np.testing.assert_array_equal(out[k], f.rounded(value))


@pytest.mark.parametrize("f", FORMATS)
@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_of_pairs(f, order, monkeypatch):
    monkeypatch.setenv("ND_EMU_ORDER", order)
    total = np.empty(1, np.float32)
    call(f"{f.name}_sum_warp", np.arange(64, dtype=np.float32) / 64, total)  # sums that both formats hold exactly
    assert total[0] == f.widened(f.rounded(np.array([31.5], np.float32)))[0]


# ---- the same sources as CUDA ----


@pytest.fixture(scope="module")
def cuda_program(build_script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The correct kernels compiled by nvcc (with PTX for every device), and all other sources compiled along."""
    nvcc = build_script.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    out = tmp_path_factory.mktemp("cuda")
    flags = ["-std=c++17", "-gencode", "arch=compute_80,code=compute_80", f"-I{emulation.ROOT / 'csrc' / 'include'}"]

    def compiled(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        result = subprocess.run([nvcc, *flags, "-c", source, "-o", target], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return target

    others = [*FAULT_SOURCES[1:], TESTS / "device" / "float16.cu"]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compiled, [*DEVICE_SOURCES, *others]))
    program = out / "correct"
    subprocess.run([nvcc, *objects[: len(DEVICE_SOURCES)], "-o", program], check=True)
    return program


@pytest.mark.compile
def test_sources_are_cuda(cuda_program: Path):
    """The emulation takes nothing for CUDA that nvcc refuses, as far as these sources go."""
    assert cuda_program.is_file()


@pytest.mark.gpu
def test_correct_kernels_on_a_device(cuda_program: Path):
    result = subprocess.run([cuda_program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- the build cache ----

SMALL_PROGRAM = '#include "neuraldeps/device.hpp"\nint main() { return STATUS; }\n'


def test_products_are_built_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emulation, "CACHE", tmp_path / "cache")
    source = tmp_path / "small.cu"
    source.write_text(SMALL_PROGRAM)
    first = emulation.build_program([source], definitions=["STATUS=3"])
    built = first.stat().st_mtime_ns
    assert emulation.run(first).returncode == 3
    assert emulation.build_program([source], definitions=["STATUS=3"]) == first
    assert first.stat().st_mtime_ns == built
    assert emulation.build_program([source], definitions=["STATUS=4"]) != first
    (tmp_path / "status.h").write_text("#define STATUS 5\n")
    source.write_text('#include "status.h"\n' + SMALL_PROGRAM)
    changed = emulation.build_program([source])
    (tmp_path / "status.h").write_text("#define STATUS 6\n")
    changed_again = emulation.build_program([source])
    assert [emulation.run(p).returncode for p in (changed, changed_again)] == [5, 6]


def test_a_compiler_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emulation, "CACHE", tmp_path / "cache")
    source = tmp_path / "broken.cu"
    source.write_text("int main() { return missing_name; }\n")
    with pytest.raises(RuntimeError, match="missing_name"):
        emulation.build_program([source])
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
