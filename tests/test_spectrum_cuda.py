"""The CUDA kernels of singular values, ranks and vectors, emulated, through their C interface; and on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
# Largest error over sigma_1: the rounding of a float32 result, or that of a float64 decomposition.
TOLERANCE = {F32: 2e-7, BF16: 2e-7, F16: 2e-7, F64: 1e-14}
TOLERANCES = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7], dtype=F64)
KERNEL = emulation.ROOT / "csrc" / "cuda" / "spectrum.cu"
# Shared memory that holds the vectors of a matrix up to about 60 and never the matrix from 20 on.
SMALL = ("ND_SPECTRUM_SHARED_BYTES=12000",)
WIDE = (*SMALL, "ND_SPECTRUM_ONE_WARP=8", "ND_SPECTRUM_FOUR_WARPS=16")  # small matrices with many warps

# [B, m, n]: the smallest; tall and wide; 31..33: one warp and more; 95..97: 4 warps and 16; sides of more than k + 32
# rows, which enter QR in pieces.
SHAPES = [
    (3, 1, 1),
    (2, 1, 5),
    (2, 7, 1),
    (5, 2, 2),
    (3, 3, 7),
    (2, 31, 20),
    (2, 32, 32),
    (2, 33, 40),
    (2, 12, 131),
    (1, 150, 35),
    (1, 97, 97),
]

P, I, D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
FIELDS = {
    "a": P, "dtype": ctypes.c_int32, "batch": I, "m": I, "n": I, "batch_stride": I, "row_stride": I,
    "hermitian": ctypes.c_int32, "values": P, "rank": P, "rtol": P, "num_rtol": I, "atol": D, "basis": P,
    "value_gradient": P, "gradient": P,
}  # fmt: skip


class Arguments(ctypes.Structure):
    """NdSpectrumArgs of cuda_api.h."""

    _fields_ = list(FIELDS.items())


class Emulated:
    """The C interface of an emulated library; results, and everything around them, are nonsense before."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._size, self._run = functions.nd_spectrum_workspace, functions.nd_spectrum
        self._size.restype, self._size.argtypes, self._run.argtypes = ctypes.c_size_t, [P], [P, P, P]

    def call(self, a: Tensor, results: dict[str, Tensor], **more: Any) -> int:
        B, m, n = a.shape
        args = Arguments(a=a.data_ptr(), dtype=DTYPES.index(a.dtype), batch=B, m=m, n=n, **more)
        args.batch_stride, args.row_stride = a.stride(0), a.stride(1)
        guarded = {name: torch.full((x.numel() + 8,), -7, dtype=x.dtype) for name, x in results.items()}
        for name, x in guarded.items():
            setattr(args, name, x.data_ptr())
        needed = self._size(ctypes.byref(args))
        workspace = np.full(needed + 512, 0xA5, np.uint8)
        first = -workspace.ctypes.data % 256
        code = int(self._run(ctypes.byref(args), workspace.ctypes.data + first, None))
        assert (workspace[:first] == 0xA5).all()
        assert (workspace[first + needed :] == 0xA5).all()
        for name, x in guarded.items():
            assert (x[results[name].numel() :] == -7).all()
            results[name].view(-1).copy_(x[: results[name].numel()])
        return code

    def svdvals(self, a: Tensor) -> Tensor:
        values = torch.empty(a.shape[0], min(a.shape[1:]), dtype=F64 if a.dtype == F64 else F32)
        assert self.call(a, {"values": values}) == 0
        return values

    def matrix_rank(self, a: Tensor, rtol: Tensor, atol: float = 0.0, hermitian: bool = False) -> Tensor:
        rank = torch.empty(a.shape[0], len(rtol), dtype=torch.int64)
        options = {"rtol": rtol.data_ptr(), "num_rtol": len(rtol), "atol": atol, "hermitian": hermitian}
        assert self.call(a, {"rank": rank}, **options) == 0
        return rank

    def singular_basis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        B, k = a.shape[0], min(a.shape[1:])
        values, basis = torch.empty(B, k, dtype=F64), torch.empty(B, k, k, dtype=F64)
        assert self.call(a, {"values": values, "basis": basis}) == 0
        return values, basis

    def svdvals_gradient(self, grad: Tensor, a: Tensor) -> Tensor:
        gradient = torch.empty(a.shape, dtype=grad.dtype)
        assert self.call(a, {"gradient": gradient}, value_gradient=grad.data_ptr()) == 0
        return gradient


@pytest.fixture(scope="session")
def run(emulated: Path) -> Emulated:
    return Emulated(emulated)


@pytest.fixture(scope="session")
def run_outside() -> Emulated:
    """Built for so little shared memory that matrices lie in the workspace."""
    return Emulated(emulation.build_library([KERNEL], definitions=SMALL))


class Device:
    """The same methods by the operators, on a device."""

    def svdvals(self, a: Tensor) -> Tensor:
        return torch.ops.neuraldeps.svdvals_device(a.cuda()).cpu()

    def matrix_rank(self, a: Tensor, rtol: Tensor, atol: float = 0.0, hermitian: bool = False) -> Tensor:
        return torch.ops.neuraldeps.matrix_rank_device(a.cuda(), rtol, atol, hermitian).cpu()

    def singular_basis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        values, basis = torch.ops.neuraldeps.singular_basis(a.cuda())
        return values.cpu(), basis.cpu()

    def svdvals_gradient(self, grad: Tensor, a: Tensor) -> Tensor:
        gradient, unresolved = torch.ops.neuraldeps.svdvals_gradient(grad.cuda(), a.cuda())
        assert not unresolved.any()
        return gradient.cpu()


@pytest.fixture(params=["inside", "outside", pytest.param("device", marks=pytest.mark.gpu)])
def either(request: pytest.FixtureRequest, run: Emulated, run_outside: Emulated) -> Emulated | Device:
    return {"inside": run, "outside": run_outside, "device": Device()}[request.param]


def normal(shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def orthonormal(batch: int, n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((batch, n, k), F64, seed))[0]


def planted(batch: int, m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """[B, m, n] float64 with singular values `values` [min(m, n)] or [B, min(m, n)]."""
    k = min(m, n)
    return (orthonormal(batch, m, k, seed) * values.expand(batch, k)[:, None]) @ orthonormal(batch, n, k, seed + 1).mT


def oracle(a: Tensor) -> Tensor:
    return torch.linalg.svdvals(a.double())


def assert_ranks(got: Tensor, values: Tensor, rtol: Tensor, atol: float = 0.0) -> None:
    """Equal wherever no value is so near to a threshold that it may count either way."""
    threshold = (rtol * values[:, :1]).clamp(min=atol)  # [B, R]
    distance = (values[:, None, :] - threshold[:, :, None]).abs().amin(-1)
    clear = distance > 1e-8 * threshold + 1e-14 * values[:, :1]
    assert clear.any()
    assert torch.equal(got[clear], (values[:, None, :] > threshold[:, :, None]).sum(-1)[clear])


def tall(a: Tensor) -> Tensor:
    return a.double() if a.shape[1] >= a.shape[2] else a.double().mT


def assert_basis(a: Tensor, values: Tensor, basis: Tensor, tolerance: float = 1e-13) -> None:
    """Rows are orthonormal, diagonalise a' a, and have the values as lengths of their images, largest first."""
    k = values.shape[1]
    unit = torch.eye(k, dtype=F64)
    assert (basis @ basis.mT - unit).abs().max() <= tolerance
    image = tall(a) @ basis.mT
    top = values[:, :1, None]
    assert (image.mT @ image - torch.diag_embed(values**2)).abs().le(tolerance * top**2).all()
    assert (values[:, :-1] >= values[:, 1:]).all()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more, and the oracle's threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_matches_the_oracle(either, shape, dtype):
    a = normal(shape, dtype, seed=sum(shape))
    want = oracle(a)
    values = either.svdvals(a)
    assert (values.double() - want).abs().le(TOLERANCE[dtype] * want[:, :1]).all()
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert_ranks(either.matrix_rank(a, TOLERANCES), want, TOLERANCES)
    length, basis = either.singular_basis(a)
    assert (length - want).abs().le(1e-14 * want[:, :1] * a.shape[1]).all()
    assert_basis(a, length, basis)
    grad = normal((shape[0], want.shape[1]), values.dtype, seed=1)
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    gradient = either.svdvals_gradient(grad, a)
    exact = (u * grad.double()[:, None]) @ vh
    assert (gradient.double() - exact).abs().max() <= (1e-11 if dtype == F64 else 3e-7)


# in the workspace of an H100, with the largest k, and with rows that enter QR in pieces
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(20, 170, 160), (9, 256, 256), (4, 512, 600), (1, 1024, 1024), (3, 4000, 130)], ids=str
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_matrices_on_a_device(shape, dtype):
    test_everything_matches_the_oracle(Device(), shape, dtype)


SPECTRA = {
    "noise": lambda k: torch.cat([torch.logspace(0, -1.5, k // 3), torch.full((k - k // 3,), 1e-4)]),
    "exact": lambda k: torch.cat([torch.ones(k // 3), torch.zeros(k - k // 3)]),
    "graded": lambda k: torch.logspace(0, -8, k),
    "clustered": lambda k: torch.cat([torch.ones(k // 2), torch.full((k - k // 2,), 3e-6)]),
    "equal": torch.ones,
}


# square with one warp; wide with four; longer than k + 32, of which R is bidiagonalised
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 40, 50), (2, 90, 20)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra_at_every_scale(either, shape, dtype, spectrum):
    """Ranks also where the Gram matrix cannot decide and the bidiagonal form is taken."""
    B, m, n = shape
    values = SPECTRA[spectrum](min(m, n)).double()
    for scale in (1.0, 1e30, 1e-30):
        a = (planted(B, m, n, values) * scale).to(dtype)
        unit = a.double() / scale
        want = oracle(unit)
        assert_ranks(either.matrix_rank(a, TOLERANCES), want, TOLERANCES)
        assert_ranks(either.matrix_rank(a, torch.zeros(1, dtype=F64), 1e-3 * scale), want, TOLERANCES[:1] * 0, 1e-3)
        assert (either.svdvals(a).double() / scale - want).abs().max() <= TOLERANCE[dtype] * (1 + 2 * (dtype == F64))
        length, basis = either.singular_basis(a)
        assert_basis(unit, length / scale, basis)


def test_gradient_of_resolved_values(either):
    """Small values have their own u_i v_i', also where squares in float64 would lose them."""
    values = torch.logspace(0, -7, 24, dtype=F64)
    a = planted(2, 24, 30, values)
    for dtype in (F32, F64):
        own = a.to(dtype)
        u, _, vh = torch.linalg.svd(own.double(), full_matrices=False)
        for i in (0, 12, 23):
            grad = torch.zeros(2, 24, dtype=F64)
            grad[:, i] = 1.0
            gradient = either.svdvals_gradient(grad.to(dtype), own).double()
            exact = u[:, :, i, None] @ vh[:, i, None, :]
            assert (gradient - exact).abs().max() <= 2e-7 if dtype == F32 else 1e-8


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradient_where_values_repeat_or_vanish(either, dtype):
    """With equal weights it is the unitary polar factor of the part that does not vanish; of a zero matrix it is 0."""
    polar = planted(3, 20, 12, torch.ones(12, dtype=F64))
    ones = torch.ones(3, 12, dtype=dtype)
    torch.testing.assert_close(either.svdvals_gradient(ones, polar.to(dtype)).double(), polar, rtol=0, atol=1e-6)
    low = torch.cat(
        [torch.randint(-3, 4, (3, 20, 5), generator=torch.Generator().manual_seed(1)), torch.zeros(3, 20, 7)], 2
    )
    gradient = either.svdvals_gradient(ones, low.to(dtype)).double()
    assert (gradient[:, :, 5:] == 0).all()
    torch.testing.assert_close((gradient * low).sum((1, 2)), oracle(low).sum(1), rtol=1e-6, atol=0)
    assert (either.svdvals_gradient(ones, torch.zeros(3, 20, 12, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_not_finite(either, dtype):
    """NaN values and rank -1 of a matrix with NaN or infinity, 0 of a zero matrix; the others are as without them."""
    for shape in ((5, 6, 9), (5, 60, 20)):
        a = normal(shape, dtype, seed=3)
        plain = either.svdvals(a)
        a[1], a[2, 4, 3], a[3, 0, 0] = 0, torch.nan, -torch.inf
        k = min(shape[1:])
        rtol = torch.tensor([1e-3, 1e-12], dtype=F64)
        assert either.matrix_rank(a, rtol).tolist() == [[k, k], [0, 0], [-1, -1], [-1, -1], [k, k]]
        assert either.matrix_rank(a, rtol * 0, 1e9).tolist() == [[0, 0], [0, 0], [-1, -1], [-1, -1], [0, 0]]
        values = either.svdvals(a)
        assert (values[1] == 0).all()
        assert values[2:4].isnan().all()
        assert torch.equal(values[[0, 4]], plain[[0, 4]])
        length, basis = either.singular_basis(a)
        assert basis[2:4].isnan().all()
        assert length[2:4].isnan().all()
        assert (length[1] == 0).all()
        unit = torch.eye(k, dtype=F64)
        assert (basis[1] @ basis[1].mT - unit).abs().max() == 0
        gradient = either.svdvals_gradient(torch.ones(5, k, dtype=plain.dtype), a)
        assert gradient[2:4].isnan().all()
        assert gradient[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("n", [1, 9, 33])
def test_hermitian(either, n, dtype):
    """Absolute eigenvalues of the lower triangle, whatever is above it; a value at -t counts as one at t."""
    a = normal((3, n, n), dtype, seed=n)
    a[1] = 0
    symmetric = torch.tril(a.double()) + torch.tril(a.double(), -1).mT
    values = torch.linalg.eigvalsh(symmetric).abs().sort(descending=True)[0]
    rtol = torch.tensor([0.7, 0.3, 0.05, 1e-6], dtype=F64)
    got = either.matrix_rank(a, rtol, hermitian=True)
    assert got[1].tolist() == [0] * 4
    assert_ranks(got[[0, 2]], values[[0, 2]], rtol)
    exact = torch.diag_embed(torch.tensor([[4.0, -2.0, 1.0, -1.0]]))
    assert either.matrix_rank(exact, torch.tensor([0.25, 0.26, 0.5], dtype=F64), hermitian=True).tolist() == [[2, 2, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_empty_batch(run, dtype):
    a = normal((3, 20, 24), dtype, seed=5)
    spread = torch.empty(7, 31, 40, dtype=dtype).fill_(torch.nan)[::2, 2:22, 5:29][:3]
    spread.copy_(a)
    assert not spread.is_contiguous()
    assert torch.equal(run.svdvals(spread), run.svdvals(a))
    assert torch.equal(run.matrix_rank(spread, TOLERANCES), run.matrix_rank(a, TOLERANCES))
    assert torch.equal(run.singular_basis(spread)[1], run.singular_basis(a)[1])
    grad = torch.ones(3, 20, dtype=F64 if dtype == F64 else F32)
    assert torch.equal(run.svdvals_gradient(grad, spread), run.svdvals_gradient(grad, a))
    assert run.svdvals(a[:0]).shape == (0, 20)


def test_many_tolerances(run):
    """More than one launch takes, and more than a block has threads."""
    a = normal((2, 20, 20), seed=6)
    rtol = torch.logspace(0, -6, 150, dtype=F64)
    assert_ranks(run.matrix_rank(a, rtol), oracle(a), rtol)


def test_more_matrices_than_slices(run_outside):
    """Blocks take matrices in turn; a result depends on its own matrix alone."""
    a = normal((300, 24, 21), seed=7)
    values, rank = run_outside.svdvals(a), run_outside.matrix_rank(a, TOLERANCES * 1e-3)
    assert torch.equal(values[290:293], run_outside.svdvals(a[290:293]))
    assert torch.equal(rank[290:293], run_outside.matrix_rank(a[290:293], TOLERANCES * 1e-3))
    assert (values.double() - oracle(a)).abs().max() <= 2e-6


def test_where_the_columns_lie_changes_no_bit(run, run_outside):
    """Of vectors, and of float64 values. A Gram matrix in the workspace is updated by panels, with other rounding."""
    wide = normal((1, 100, 98), F64, seed=8)
    assert torch.equal(run.svdvals(wide), run_outside.svdvals(wide))
    for a in (wide, wide.float()):
        assert all(torch.equal(x, y) for x, y in zip(run.singular_basis(a), run_outside.singular_basis(a), strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_thread_order_does_not_matter(either, dtype, monkeypatch):
    a = planted(2, 21, 60, SPECTRA["graded"](21).double()).to(dtype)
    grad = normal((2, 21), dtype)

    def results() -> list[Tensor]:
        basis = either.singular_basis(a)
        return [either.svdvals(a), either.matrix_rank(a, TOLERANCES), *basis, either.svdvals_gradient(grad, a)]

    plain = results()
    for order in ("reverse", "random:1", "random:2"):
        monkeypatch.setenv("ND_EMU_ORDER", order)
        assert all(torch.equal(x, y) for x, y in zip(results(), plain, strict=True))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    decades=st.floats(0, 9),
    log_scale=st.integers(-28, 28),
    dtype=st.sampled_from([F32, F64]),
)
def test_property_ranks_and_values(run, m, n, seed, decades, log_scale, dtype):
    values = torch.logspace(0, -decades, min(m, n), dtype=F64)
    a = (planted(2, m, n, values, seed) * 10.0**log_scale).to(dtype)
    unit = a.double() * 10.0**-log_scale
    want = oracle(unit)
    assert_ranks(run.matrix_rank(a, TOLERANCES * 0.77), want, TOLERANCES * 0.77)
    own = run.svdvals(a).double() * 10.0**-log_scale
    assert (own - want).abs().le((2e-7 if dtype == F32 else 1e-13) * want[:, :1]).all()


def test_refused_arguments(run):
    """Sides of 0, k beyond the limit, an unknown type, two results or none: an error code, nothing written."""
    a = normal((1, 3, 4))
    values = {"values": torch.empty(1, 3)}
    assert run.call(a, values) == 0
    assert run.call(a, values, rank=a.data_ptr()) != 0
    assert run.call(a, {}) != 0
    assert run.call(a[:, :0], values) != 0
    assert run.call(torch.empty(1, 1025, 1).expand(1, 1025, 1025), values) != 0


# types by their digits; with many warps: one, sixteen, four
@pytest.mark.parametrize("problem", [("9", "7", "0123"), ("18", "56", "0"), ("40", "12", "02")], ids=" ".join)
@pytest.mark.parametrize("definitions", [(), WIDE], ids=["default", "wide"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(problem, sanitizer, definitions):
    """No access out of bounds, no undefined behaviour, no race between the threads of a block."""
    sources = [Path(__file__).with_name("spectrum_cuda_driver.cu"), KERNEL]
    program = emulation.build_program(sources, sanitizer=sanitizer, definitions=definitions)
    result = emulation.run(program, *problem, order="random:1")
    assert result.returncode == 0, result.stdout + result.stderr
