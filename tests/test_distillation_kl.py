"""Distillation loss over classes against float64 softmaxes. Checks named "Check n" are acceptance checks of SSKD."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuraldeps_kernels import distillation_kl

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.neuraldeps
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOSS_LIMIT = {torch.float64: 1e-13}  # else 1e-5, relative
GRADIENT_LIMIT = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# One class; fewer than lanes; a tail; several chunks and a tail; the classes of the paper.
SHAPES = [(3, 1), (5, 3), (4, 77), (3, 2085), (2, 31_423)]


def oracle(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    a, b = (torch.softmax(x.detach().double() / temperature, 1) for x in (student, teacher))
    log_a, log_b = (torch.log_softmax(x.detach().double() / temperature, 1) for x in (student, teacher))
    count = len(student)
    return temperature**2 / count * (b * (log_b - log_a)).sum(), temperature / count * (a - b)


def logits(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with rows apart from each other, or transposed in memory."""
    if layout == "strided":
        return torch.cat([x, x.new_full((len(x), 5), torch.nan)], 1)[:, : x.shape[1]]
    return x.T.contiguous().T if layout == "transposed" else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Check 1: the loss to 1e-5, the gradient to 1e-6 of (T / N) (p_s - p_t), whose rows sum to 0."""
    for temperature in (1.0, 6.0, 16.0):
        student = laid_out(logits(shape, 0, dtype), layout).requires_grad_()
        teacher = laid_out(logits(shape, 1, dtype), layout)
        loss = distillation_kl(student, teacher, temperature)
        want, gradient = oracle(student, teacher, temperature)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert abs(float(loss.detach()) - float(want)) <= LOSS_LIMIT.get(dtype, 1e-5) * float(want)
        (found,) = torch.autograd.grad(3 * loss, student)
        assert found.dtype == dtype
        limit = GRADIENT_LIMIT[dtype] * (float(gradient.abs().max()) if dtype.itemsize == 2 else temperature)
        torch.testing.assert_close(found.double(), 3 * gradient, rtol=0, atol=3 * limit)
        if dtype.itemsize > 2:
            assert float(found.double().sum(1).abs().max()) <= 1e-6 * temperature


def test_numerical_derivatives() -> None:
    """Check 1: gradcheck in float64, and of the gradient."""
    student = logits((3, 7), 2, torch.float64, 2.0).requires_grad_()
    teacher = logits((3, 7), 3, torch.float64, 2.0)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: distillation_kl(x, teacher, 2.0), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_where_both_agree(dtype: torch.dtype) -> None:
    """Check 1: 0 if and only if the difference is a constant of each row; never negative."""
    student = logits((6, 900), 4, dtype).round(decimals=2)
    assert float(distillation_kl(student, student.clone(), 3.0)) == 0.0
    shifted = student + torch.arange(6, dtype=dtype)[:, None] * 8
    assert 0 <= float(distillation_kl(student, shifted, 3.0)) <= (1e-11 if dtype == torch.float32 else 1e-24)
    for size in (1e-1, 1e-2, 1e-3):
        other = student + size * logits((6, 900), 5, dtype, 1.0)
        want = float(oracle(student, other, 3.0)[0])
        assert want > 0
        # What is left of differences of this size after rounding of the logits that share them.
        assert (
            abs(float(distillation_kl(student, other, 3.0)) - want) <= (1e-3 if dtype == torch.float32 else 1e-9) * want
        )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 5),
    C=st.integers(1, 3000),
    temperature=st.floats(0.5, 50),
    spread=st.floats(0.1, 30),
)
def test_invariances(seed: int, N: int, C: int, temperature: float, spread: float) -> None:
    """Check 2: constants of rows and permutations of classes change nothing."""
    student, teacher = (logits((N, C), seed + i, spread=spread) for i in (0, 1))
    loss = distillation_kl(student, teacher, temperature)
    assert float(loss) >= 0
    torch.testing.assert_close(loss.double(), oracle(student, teacher, temperature)[0], rtol=1e-5, atol=1e-9)
    order = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    permuted = distillation_kl(student[:, order], teacher[:, order], temperature)
    torch.testing.assert_close(permuted, loss, rtol=1e-5, atol=1e-9)
    constant = logits((N, 1), seed + 2, spread=10.0)
    moved = [(student + constant).double() - constant.double(), teacher.double()]  # the logits, as they are rounded
    rounded = distillation_kl(*(x.float() for x in moved), temperature)
    torch.testing.assert_close(distillation_kl(student + constant, teacher, temperature), rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 16.0])
def test_large_logits_are_finite(dtype: torch.dtype, temperature: float) -> None:
    """Check 2: logits of +-1e4."""
    student = (1e4 * torch.randn(4, 200).sign()).to(dtype).requires_grad_()
    teacher = (1e4 * torch.randn(4, 200).sign()).to(dtype)
    loss = distillation_kl(student, teacher, temperature)
    want, gradient = oracle(student, teacher, temperature)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=0)
    (found,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=temperature * GRADIENT_LIMIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("C", [10, 31_423])
def test_limit_of_high_temperature(dtype: torch.dtype, C: int) -> None:
    """Check 3: |centre(a - b)|^2 / (2 C N) within 1e-3 for T of 1e4 x the spread (in float32, digits permitting)."""
    student, teacher = logits((4, C), 6, dtype, 1.0), logits((4, C), 7, dtype, 1.0)
    difference = (student - teacher).double()
    want = (difference - difference.mean(1, keepdim=True)).square().sum() / (2 * C * 4)
    found = distillation_kl(student, teacher, 1e4)
    assert abs(float(found) / float(want) - 1) <= 1e-3


def test_teacher_has_no_gradient() -> None:
    student, teacher = logits((3, 5), 0).requires_grad_(), logits((3, 5), 1).requires_grad_()
    distillation_kl(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not distillation_kl(student.detach(), teacher, 2.0).requires_grad


def test_mixed_dtypes_and_autocast() -> None:
    student, teacher = logits((3, 50), 0, torch.bfloat16).requires_grad_(), logits((3, 50), 1)
    loss = distillation_kl(student, teacher, 2.0)
    torch.testing.assert_close(loss.detach().double(), oracle(student, teacher, 2.0)[0], rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = distillation_kl(student, teacher, 2.0)
    assert torch.equal(again, loss)
    (found,) = torch.autograd.grad(again, student)
    assert found.dtype == torch.bfloat16


def test_nothing_to_distil() -> None:
    student = torch.empty(0, 7, requires_grad=True)
    loss = distillation_kl(student, torch.empty(0, 7), 2.0)
    assert float(loss.detach()) == 0.0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 7)


def test_nan_reaches_its_row_alone() -> None:
    student, teacher = logits((3, 40), 0), logits((3, 40), 1)
    for wrong in (torch.nan, torch.inf):
        for which in (0, 1):
            given = [student.clone(), teacher.clone()]
            given[which][1, 39] = wrong
            given[0].requires_grad_()
            loss = distillation_kl(given[0], given[1], 2.0)
            assert loss.isnan()
            (gradient,) = torch.autograd.grad(loss, given[0])
            assert gradient[1].isnan().any()
            assert gradient[::2].isfinite().all()


def test_bits_do_not_depend_on_threads() -> None:
    student, teacher = logits((37, 3000), 0).requires_grad_(), logits((37, 3000), 1)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = distillation_kl(student, teacher, 4.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


BAD_INPUT: list[tuple[type[Exception], str, Callable[[Tensor, Tensor], Any]]] = [
    (TypeError, "student must be a torch.Tensor, not list", lambda a, b: distillation_kl([1.0], b, 1.0)),
    (TypeError, "teacher must be float32, float64", lambda a, b: distillation_kl(a, b.long(), 1.0)),
    (ValueError, r"student must be \[N, C\] with C >= 1, not \[3\]", lambda a, b: distillation_kl(a[:, 0], b, 1.0)),
    (ValueError, r"with C >= 1, not \[3, 0\]", lambda a, b: distillation_kl(a[:, :0], b, 1.0)),
    (ValueError, r"shape of student, \[3, 4\], not \[3, 3\]", lambda a, b: distillation_kl(a, b[:, 1:], 1.0)),
    (ValueError, "teacher is on meta", lambda a, b: distillation_kl(a, b.to("meta"), 1.0)),
    (ValueError, "temperature must be positive and finite, not 0", lambda a, b: distillation_kl(a, b, 0.0)),
    (ValueError, "temperature must be positive and finite, not nan", lambda a, b: distillation_kl(a, b, float("nan"))),
    (ValueError, "temperature must be positive", lambda a, b: OPS.distillation_kl(a, b, -1.0)),
    (ValueError, "teacher must have the dtype of student", lambda a, b: OPS.distillation_kl(a, b.double(), 1.0)),
    (
        ValueError,
        r"statistics must be float64 \[N, 4\]",
        lambda a, b: OPS.distillation_kl_backward(torch.ones(()), a, b, torch.zeros(3, 3).double(), 1.0),
    ),
]


@pytest.mark.parametrize(("error", "text", "call"), BAD_INPUT, ids=[text for _, text, _ in BAD_INPUT])
def test_bad_input(error: type[Exception], text: str, call: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(error, match=text):
        call(torch.zeros(3, 4), torch.zeros(3, 4))


# ------------------------------------------------------------------------------------------------ around PyTorch


def test_operators_follow_the_rules_of_torch_library() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits((3, 9), 0, dtype).requires_grad_(), logits((3, 9), 1, dtype)
        torch.library.opcheck(OPS.distillation_kl.default, (student, teacher, 2.0))
        loss, statistics = OPS.distillation_kl(student.detach(), teacher, 2.0)
        arguments = (torch.ones_like(loss), student.detach(), teacher, statistics, 2.0)
        torch.library.opcheck(OPS.distillation_kl_backward.default, arguments)


def test_compiled_without_a_break() -> None:
    student, teacher = logits((3, 9), 0).requires_grad_(), logits((3, 9), 1)

    def step(a: Tensor, b: Tensor) -> Tensor:
        return 2 * distillation_kl(a * 1.5, b, 2.0)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(student, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


LEVEL_PROGRAM = """
import sys
import torch
from neuraldeps_kernels import distillation_kl
assert torch.ops.neuraldeps.cpu_levels()[2] == sys.argv[1]
torch.manual_seed(0)

# With statistics m = 0, log s = 0 of the student and an infinitely improbable teacher the gradient is exp(x).
def exponential(x):
    statistics = torch.tensor([[0.0, 0.0, 1e30, 0.0]], dtype=torch.float64)
    zero = torch.zeros_like(x)[None]
    return torch.ops.neuraldeps.distillation_kl_backward(torch.ones(()), x[None], zero, statistics, 1.0)[0]

for dtype, low, high in ((torch.float32, -86.6, 88.7), (torch.float64, -707.7, 709.7)):
    x = torch.cat([torch.linspace(low, high, 200_001, dtype=torch.float64), torch.randn(100_000).double()]).to(dtype)
    want = x.double().exp()
    ulp = torch.exp2(want.log2().floor()) * torch.finfo(dtype).eps
    # float64 has no better oracle here than torch's own function, which has an error of its own
    assert ((exponential(x).double() - want).abs() / ulp).max() <= (1.0 if dtype == torch.float32 else 2.0)
    ends = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan, 2 * low, 2 * high, -1e30, 1e30], dtype=dtype)
    expected = torch.tensor([1.0, 0.0, torch.inf, torch.nan, 0.0, torch.inf, 0.0, torch.inf], dtype=dtype)
    torch.testing.assert_close(exponential(ends), expected, rtol=0, atol=0, equal_nan=True)

limits = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
for dtype, limit in limits.items():
    for N, C in ((3, 1), (5, 3), (4, 77), (3, 2085)):
        student, teacher = (4 * torch.randn(2, N, C)).to(dtype)
        student.requires_grad_()
        loss = distillation_kl(student, teacher, 3.0)
        (gradient,) = torch.autograd.grad(loss, student)
        twin = student.detach().double().requires_grad_()
        log_a, log_b = (torch.log_softmax(x / 3, 1) for x in (twin, teacher.double()))
        want = 9 / N * (log_b.exp() * (log_b - log_a)).sum()
        (exact,) = torch.autograd.grad(want, twin)
        assert abs(loss.item() - want.item()) <= (1e-13 if dtype == torch.float64 else 1e-5) * want.item() + 1e-30
        assert (gradient.double() - exact).abs().max() <= 3 * limit, (dtype, N, C)
"""


def test_every_instruction_set_level(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """exp to 1 ulp, values and gradients, at every level."""
    for level in cpu_levels:
        result = run_python(LEVEL_PROGRAM, level, NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, f"{level}: {result.stderr}"


MEMORY_PROGRAM = """
import resource
import torch
from neuraldeps_kernels import distillation_kl

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
distillation_kl(torch.randn(2, 50, requires_grad=True), torch.randn(2, 50), 2.0).backward()
student, teacher = torch.randn(256, 31_423, requires_grad=True), torch.randn(256, 31_423)
before = peak()
loss = distillation_kl(student, teacher, 16.0)
forward = peak() - before
loss.backward()
print(forward / student.nbytes, (peak() - before) / student.nbytes)
"""


def test_no_softmax_is_stored(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Nothing of the size of the logits but the gradient: [256, 31423] of 32 MB."""
    result = run_python(MEMORY_PROGRAM)
    assert result.returncode == 0, result.stderr
    forward, both = map(float, result.stdout.split())
    assert forward <= 0.15
    assert both <= 1.15


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (48, 31_423), (256, 5000)], ids=str)
def test_gpu_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher = (logits(shape, seed, dtype).cuda() for seed in (0, 1))
    student.requires_grad_()
    loss = distillation_kl(student, teacher, 6.0)
    want, gradient = oracle(student, teacher, 6.0)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-30)
    (found,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=6 * GRADIENT_LIMIT[dtype])


def test_sanitizers(assert_sanitized: Callable[..., None]) -> None:
    """Both kernels, this one and queue_contrast, on arrays of exactly their sizes."""
    assert_sanitized("distillation_sanitizer_driver.cpp", "distillation_kl.cpp", "queue_contrast.cpp")
