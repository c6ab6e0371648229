"""Queue contrast against both [N, K] matrices in float64, the ring buffer against a deque, momentum against a loop.

Checks named "Check n" are acceptance checks of UP-ReID.
"""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from neuraldeps_kernels import enqueue, momentum_update, queue_contrast

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.neuraldeps
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative, of losses and gradients
ROWS = 40  # of the matrices of the oracle at a time


def unit(rows: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x, dim=1).to(dtype)


def oracle(
    q: Tensor, k: Tensor, queue: Tensor, o: Tensor, tau: float = 0.1, tau_t: float = 0.07
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_con, KL and their gradients in q by both matrices, in float64 and a few rows at a time."""
    q, k, queue, o = (x.detach().double() for x in (q, k, queue, o))
    contrast, consistency = q.new_zeros(()), q.new_zeros(())
    gradients: list[list[Tensor]] = [[], []]
    for rows in range(0, len(q), ROWS):
        part = slice(rows, rows + ROWS)
        logits = torch.cat([(q[part] * k[part]).sum(1, keepdim=True), q[part] @ queue.T], 1) / tau
        log_p = torch.log_softmax(logits, 1)
        contrast = contrast - log_p[:, 0].sum()
        p = log_p.exp()
        gradients[0].append(((p[:, :1] - 1) * k[part] + p[:, 1:] @ queue) / (tau * len(q)))
        log_q, log_o = torch.log_softmax(logits[:, 1:], 1), torch.log_softmax(o[part] @ queue.T / tau_t, 1)
        consistency = consistency + (log_o.exp() * (log_o - log_q)).sum()
        gradients[1].append((log_q.exp() - log_o.exp()) @ queue / (tau * len(q)))
    return contrast / len(q), consistency / len(q), torch.cat(gradients[0]), torch.cat(gradients[1])


def assert_relative(got: Tensor, want: Tensor, limit: float) -> None:
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm())
    assert error <= limit * float(want.norm()) + 1e-300, (error, float(want.norm()))


def both_gradients(losses: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    (first,) = torch.autograd.grad(losses[0], q, retain_graph=True)
    (second,) = torch.autograd.grad(losses[1], q)
    return first, second


# N, K, d: of Check 1; more rows than a block, a queue of several slabs, d of no whole register; one of everything.
SIZES = [(N, K, 128) for N in (1, 7, 320) for K in (64, 1000)]
SIZES += [(1, 65_536, 128), (7, 65_536, 128), (700, 2500, 20), (33, 5000, 7), (2, 1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_and_gradients(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Check 1, with and without a gradient and the original."""
    N, K, d = size
    q, k, o = (unit(N, d, seed, dtype) for seed in range(3))
    queue = unit(K, d, 3, dtype)
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o)
    want = oracle(q, k, queue, o)
    for got, exact in zip((*losses, *both_gradients(losses, q)), want, strict=True):
        assert got.dtype == dtype
        if K > 1:  # of a single key every softmax is 1 and KL is rounding
            assert_relative(got, exact, LIMIT[dtype])
    with torch.no_grad():
        for got, exact in zip(queue_contrast(q, k, queue, original=o), losses, strict=True):
            assert torch.equal(got, exact)
    alone = queue_contrast(q, k, queue)
    assert torch.equal(alone[0], losses[0])
    assert float(alone[1].detach()) == 0.0
    assert_relative(torch.autograd.grad(alone[0], q)[0], want[2], LIMIT[dtype])


def test_size_of_pretraining() -> None:
    """Check 1: N = 320, K = 65,536; temperatures that differ from the defaults."""
    q, k, o = (unit(320, 128, seed) for seed in range(3))
    queue = unit(65_536, 128, 3)
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o, temperature=0.2, target_temperature=0.05)
    for got, want in zip((*losses, *both_gradients(losses, q)), oracle(q, k, queue, o, 0.2, 0.05), strict=True):
        assert_relative(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_16_bit_inputs(dtype: torch.dtype, whole: bool) -> None:
    """Check 1: to 1e-2 of the values before rounding, to 1e-5 of those given; only the queue, or all in 16 bits."""
    exact = [unit(7, 128, seed, torch.float64) for seed in range(3)]
    exact_queue = unit(1000, 128, 3, torch.float64)
    q, k, o = (x.to(dtype if whole else torch.float32) for x in exact)
    queue = exact_queue.to(dtype)
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o)
    gradients = both_gradients(losses, q)
    assert losses[0].dtype == torch.float32
    assert gradients[0].dtype == q.dtype
    for i, want in enumerate(oracle(q, k, queue, o)):
        assert_relative((*losses, *gradients)[i], want, 1e-5 if i < 2 or not whole else 4e-3)
    for got, want in zip(losses, oracle(exact[0], exact[1], exact_queue, exact[2]), strict=False):
        assert_relative(got, want, 1e-2)


def test_other_layouts_and_dtypes() -> None:
    """Strided rows, a transposed queue, a float64 queue beside float32 rows and the reverse."""
    q, k, o = (unit(5, 12, seed) for seed in range(3))
    queue = unit(300, 12, 3)
    want = queue_contrast(q, k, queue, original=o)
    wide = torch.cat([queue, queue], 1)
    for other in (wide[:, :12], queue.T.contiguous().T, queue.double()):
        got = queue_contrast(q.T.contiguous().T, k, other, original=o)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    double = queue_contrast(q.double(), k, queue, original=o)
    assert double[0].dtype == torch.float64
    for got, exact in zip(double, oracle(q, k, queue, o), strict=False):
        assert_relative(got, exact, 1e-13)


def test_numerical_derivatives() -> None:
    """Check 1: gradcheck in float64; a second derivative is refused, not wrong."""
    q, k, o = (unit(4, 6, seed, torch.float64) for seed in range(3))
    queue = unit(50, 6, 3, torch.float64)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: queue_contrast(x, k, queue, original=o), q)
    assert torch.autograd.gradcheck(lambda x: queue_contrast(x, k, queue)[0], q)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(queue_contrast(q, k, queue)[0], q, create_graph=True)


@pytest.mark.parametrize("size", [(3, 0, 5), (0, 9, 5), (0, 0, 5)], ids=str)
def test_nothing_to_contrast(size: tuple[int, int, int]) -> None:
    """Check 1: 0 for an empty queue, and for no rows."""
    N, K, d = size
    q = unit(N, d, 0).requires_grad_()
    losses = queue_contrast(q, unit(N, d, 1), unit(K, d, 2), original=unit(N, d, 3))
    assert [float(loss.detach()) for loss in losses] == [0.0, 0.0]
    for gradient in both_gradients(losses, q):
        assert gradient.shape == q.shape
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_are_finite(dtype: torch.dtype) -> None:
    """Check 1: logits of +-1e4."""
    q, k, o = ((31.6 * unit(5, 16, seed)).to(dtype) for seed in range(3))
    queue = torch.cat([31.6 * unit(200, 16, 3), -q.detach().float(), q.detach().float()]).to(dtype)
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o)
    want = oracle(q, k, queue, o)
    for got, exact in zip(losses, want, strict=False):
        assert_relative(got, exact, 1e-5)
    for got, exact in zip(both_gradients(losses, q), want[2:], strict=True):
        assert_relative(got, exact, 1e-2 if dtype == torch.bfloat16 else 1e-3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 40),
    K=st.integers(1, 900),
    d=st.integers(1, 70),
    tau=st.floats(0.05, 2),
    tau_t=st.floats(0.05, 2),
)
def test_properties(seed: int, N: int, K: int, d: int, tau: float, tau_t: float) -> None:
    """Check 2: KL >= 0, and 0 without a gradient where q = o, tau = tau_t; the order of the queue does not matter."""
    q, k, o = (unit(N, d, seed + i) for i in range(3))
    queue = unit(K, d, seed + 3)
    q.requires_grad_()
    options = {"temperature": tau, "target_temperature": tau_t}
    losses = queue_contrast(q, k, queue, original=o, **options)
    want = oracle(q, k, queue, o, tau, tau_t)
    for got, exact in zip(losses, want, strict=False):
        assert float(got.detach()) >= 0
        torch.testing.assert_close(got.detach().double(), exact, rtol=1e-5, atol=2e-6 / min(tau, tau_t))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    shuffled = queue_contrast(q, k, queue[order], original=o, **options)
    for got, same in zip(shuffled, losses, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=2e-6 / min(tau, tau_t))
    consistency = queue_contrast(q, k, queue, original=q, temperature=tau, target_temperature=tau)[1]
    assert float(consistency.detach()) <= 1e-6
    assert float(torch.autograd.grad(consistency, q)[0].abs().max()) <= 1e-6


def test_gradient_reaches_q_alone_and_survives_enqueueing() -> None:
    """Check 3: k, o and the queue are constants; the queue may change before the backward."""
    tensors = [unit(4, 8, seed).requires_grad_() for seed in range(3)]
    queue, pointer = unit(20, 8, 3), torch.zeros(1, dtype=torch.int64)
    q, k, o = tensors
    want = oracle(q, k, queue, o)
    losses = queue_contrast(q, k, queue.requires_grad_(), original=o)
    queue.requires_grad_(False)
    enqueue(queue, pointer, k)
    (losses[0] + 2 * losses[1]).backward()
    assert k.grad is None
    assert o.grad is None
    assert queue.grad is None
    assert q.grad is not None
    assert_relative(q.grad, want[2] + 2 * want[3], 1e-5)


def test_nan_reaches_its_own_row() -> None:
    q, k, o = (unit(5, 8, seed) for seed in range(3))
    queue = unit(20, 8, 3)
    q[2, 3] = torch.nan
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o)
    assert losses[0].isnan()
    assert losses[1].isnan()
    for gradient in both_gradients(losses, q):
        assert torch.equal(gradient.isnan().any(1), torch.arange(5) == 2)
    queue[7] = torch.inf
    assert queue_contrast(unit(5, 8, 0), k, queue, original=o)[1].isnan()


def test_bits_do_not_depend_on_threads() -> None:
    q, k, o = (unit(50, 24, seed) for seed in range(3))
    queue = unit(7000, 24, 3)
    q.requires_grad_()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        losses = queue_contrast(q, k, queue, original=o)
        results.append((*losses, *both_gradients(losses, q)))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ------------------------------------------------------------------------------------------------ ring buffer


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    K=st.integers(1, 23),
    sizes=st.lists(st.integers(0, 23), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_ring_buffer_is_a_deque(seed: int, K: int, sizes: list[int], dtype: torch.dtype) -> None:
    """Check 4: bitwise, with batches that wrap around; rows of unit length."""
    generator = torch.Generator().manual_seed(seed)
    queue, pointer = torch.zeros(K, 6, dtype=dtype), torch.zeros((), dtype=torch.int64)
    rows: deque[Tensor] = deque(maxlen=K)
    written = 0
    for size in sizes:
        keys = torch.randn(size, 6, generator=generator)
        if size > K:
            with pytest.raises(ValueError, match=f"keys must hold at most the {K} rows of the queue, not {size}"):
                enqueue(queue, pointer, keys)
            continue
        enqueue(queue, pointer, keys)
        rows.extend(normalize(keys, dim=1).to(dtype))
        written += size
        assert int(pointer) == written % K
        oldest_first = torch.cat([queue[written % K :], queue[: written % K]]) if written >= K else queue[:written]
        if rows:
            assert torch.equal(oldest_first, torch.stack(list(rows)))
            if dtype != torch.bfloat16:
                torch.testing.assert_close(
                    oldest_first.norm(dim=1), torch.ones(len(rows), dtype=dtype), atol=1e-6, rtol=0
                )


def test_enqueue_stays_outside_autograd() -> None:
    keys = unit(3, 4, 0).requires_grad_()
    queue, pointer = torch.zeros(5, 4), torch.tensor([4])
    enqueue(queue, pointer, keys)
    assert not queue.requires_grad
    assert pointer.tolist() == [2]
    assert torch.equal(queue[[4, 0, 1]], normalize(keys.detach(), dim=1))
    zero = torch.zeros(1, 4)
    enqueue(queue, pointer, zero)
    assert torch.equal(queue[2:3], zero)


# ------------------------------------------------------------------------------------------------ momentum


def parameters(seed: int) -> list[Tensor]:
    """Tensors of several sizes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in ((), (7,), (5, 33), (4, 3, 3, 5), (1000,), (0, 3))]
    made[3] = made[3].to(memory_format=torch.channels_last)
    return [*made, torch.randn(9, 8, generator=generator).T, torch.randn(20, generator=generator)[::2]]


@pytest.mark.parametrize("m", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_momentum_update_is_the_loop(m: float) -> None:
    """Check 8: bitwise, whatever order and layout; m = 0 copies, m = 1 freezes (Check 3)."""
    online, start = parameters(0), parameters(1)
    teacher, looped, reverse = ([t.clone() for t in start] for _ in range(3))
    dense = [t.contiguous().clone() for t in start]
    momentum_update(teacher, online, m)
    momentum_update(reverse[::-1], online[::-1], m)
    momentum_update(dense, [t.contiguous() for t in online], m)
    for mine, theirs in zip(looped, online, strict=True):
        mine.lerp_(theirs, 1 - m)
    for found in (teacher, reverse, dense):
        assert all(torch.equal(a, b) for a, b in zip(found, looped, strict=True))
    if m in (0.0, 1.0):
        assert all(torch.equal(a, b) for a, b in zip(teacher, online if m == 0 else start, strict=True))


def test_closed_form_of_momentum() -> None:
    """Check 3: m^t theta_0 + (1 - m^t) theta_q after t steps of constant theta_q, to 1e-6."""
    start, online = parameters(0), [torch.nn.Parameter(t) for t in parameters(1)]
    teacher = [t.clone() for t in start]
    for _ in range(30):
        momentum_update(teacher, online, 0.99)
    for found, first, end in zip(teacher, start, online, strict=True):
        want = 0.99**30 * first.double() + (1 - 0.99**30) * end.detach().double()
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6)
        assert not found.requires_grad


def test_momentum_of_a_wider_teacher() -> None:
    """A float32 teacher of a 16-bit network."""
    teacher, online = [torch.zeros(5)], [torch.arange(5).bfloat16()]
    momentum_update(teacher, online, 0.75)
    assert teacher[0].dtype == torch.float32
    torch.testing.assert_close(teacher[0], torch.arange(5) * 0.25)
    momentum_update([], [], 0.5)


Call = Callable[[Tensor, Tensor], Any]
BAD_INPUT: list[tuple[type[Exception], str, Call]] = [
    (TypeError, "q must be a torch.Tensor, not list", lambda q, Q: queue_contrast([1.0], q, Q)),
    (TypeError, "k must be float32, float64", lambda q, Q: queue_contrast(q, q.long(), Q)),
    (ValueError, r"q must be \[N, d\] with d >= 1, not \[3\]", lambda q, Q: queue_contrast(q[:, 0], q, Q)),
    (ValueError, r"q must be \[N, d\] with d >= 1, not \[3, 0\]", lambda q, Q: queue_contrast(q[:, :0], q, Q)),
    (ValueError, r"k must have the shape of q, \[3, 4\], not \[2, 4\]", lambda q, Q: queue_contrast(q, q[1:], Q)),
    (ValueError, "queue must have the 4 columns of q, not 3", lambda q, Q: queue_contrast(q, q, Q[:, 1:])),
    (ValueError, "original must have the shape", lambda q, Q: queue_contrast(q, q, Q, original=Q)),
    (ValueError, "original is on meta", lambda q, Q: queue_contrast(q, q, Q, original=q.to("meta"))),
    (ValueError, "temperature must be positive", lambda q, Q: queue_contrast(q, q, Q, temperature=0.0)),
    (ValueError, "target_temperature must be", lambda q, Q: queue_contrast(q, q, Q, target_temperature=float("inf"))),
    (ValueError, "temperatures must be", lambda q, Q: OPS.queue_contrast(q, q, Q, None, 0.1, -1.0, False)),
    (ValueError, "k must have the dtype", lambda q, Q: OPS.queue_contrast(q, q.double(), Q, None, 0.1, 0.1, False)),
    (ValueError, "both be float64", lambda q, Q: OPS.queue_contrast(q, q, Q.double(), None, 0.1, 0.1, False)),
    (TypeError, "pointer must be an int64 tensor", lambda q, Q: enqueue(Q, 0, q)),
    (ValueError, r"pointer must be one number on cpu, not \[2\]", lambda q, Q: enqueue(Q, torch.zeros(2).long(), q)),
    (ValueError, "queue must have the 3 columns of keys", lambda q, Q: enqueue(Q, torch.zeros(()).long(), q[:, 1:])),
    (ValueError, "params must hold 1 tensors", lambda q, Q: momentum_update([q], [q, Q], 0.5)),
    (ValueError, r"params\[0\] must be \[3, 4\]", lambda q, Q: momentum_update([q], [Q], 0.5)),
    (ValueError, "m must be in 0..1, not 1.5", lambda q, Q: momentum_update([q], [q], 1.5)),
    (ValueError, "m must be in 0..1, not nan", lambda q, Q: momentum_update([q], [q], float("nan"))),
    (TypeError, "must be floating-point", lambda q, Q: momentum_update([q.long()], [q], 0.5)),
]


@pytest.mark.parametrize(("error", "text", "call"), BAD_INPUT, ids=[text for _, text, _ in BAD_INPUT])
def test_bad_input(error: type[Exception], text: str, call: Call) -> None:
    with pytest.raises(error, match=text):
        call(torch.zeros(3, 4), torch.zeros(9, 4))


# ------------------------------------------------------------------------------------------------ around PyTorch


def test_operator_follows_the_rules_of_torch_library() -> None:
    q, k, o = (unit(3, 6, seed) for seed in range(3))
    queue = unit(20, 6, 3)
    q.requires_grad_()
    for original in (o, None):
        torch.library.opcheck(OPS.queue_contrast.default, (q, k, queue, original, 0.1, 0.07, True))
    torch.library.opcheck(OPS.queue_contrast.default, (q.detach(), k, queue.bfloat16(), o, 0.1, 0.07, False))
    assert not any(t.requires_grad for t in OPS.queue_contrast(q, k, queue, o, 0.1, 0.07, False))


def test_compiled_without_a_break() -> None:
    q, k, o = (unit(3, 6, seed) for seed in range(3))
    q.requires_grad_()

    def step(q: Tensor, queue: Tensor, pointer: Tensor) -> Tensor:
        contrast, consistency = queue_contrast(normalize(q * 2, dim=1), k, queue, original=o)
        enqueue(queue, pointer, k)
        return contrast + 0.5 * consistency

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        queue, pointer = unit(20, 6, 3), torch.tensor([18])
        loss = function(q, queue, pointer)
        results.append((loss.detach(), *torch.autograd.grad(loss, q), queue, pointer))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast() -> None:
    q, k, queue = (unit(rows, 6, seed).bfloat16() for rows, seed in ((3, 0), (3, 1), (20, 2)))
    q.requires_grad_()
    want = queue_contrast(q, k, queue, original=k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = queue_contrast(q, k, queue, original=k)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


LEVEL_PROGRAM = """
import sys
import torch
from neuraldeps_kernels import queue_contrast
from neuraldeps_kernels.reference import queue_contrast as reference
assert torch.ops.neuraldeps.cpu_levels()[2] == sys.argv[1]
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for N, K, d in ((1, 1, 3), (7, 1000, 128), (40, 3000, 20), (400, 700, 33)):
        q, k, o = torch.nn.functional.normalize(torch.randn(3, N, d), dim=2).to(wide)
        queue = torch.nn.functional.normalize(torch.randn(K, d), dim=1).to(dtype)
        q.requires_grad_()
        twin = q.detach().double().requires_grad_()
        losses = queue_contrast(q, k, queue, original=o)
        exact = reference.queue_contrast(twin, k, queue, original=o)
        for got, want in zip(losses, exact):
            (gradient,) = torch.autograd.grad(got, q, retain_graph=True)
            (expected,) = torch.autograd.grad(want, twin, retain_graph=True)
            limit = 1e-12 if dtype == torch.float64 else 1e-5
            assert abs(got.item() - want.item()) <= limit * want.item() + (K == 1) * 1e-6, (dtype, N, K, d)
            assert (gradient.double() - expected).norm() <= limit * expected.norm() + (K == 1) * 1e-6, (dtype, N, K, d)
"""


def test_every_instruction_set_level(
    cpu_levels: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for level in cpu_levels:
        result = run_python(LEVEL_PROGRAM, level, NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 0, f"{level}: {result.stderr}"


MEMORY_PROGRAM = """
import resource
import torch
from neuraldeps_kernels import queue_contrast

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
N, K, d = 320, 65_536, 128
q, k, o, queue = (torch.randn(rows, d) / d**0.5 for rows in (N, N, N, K))
q.requires_grad_()
sum(queue_contrast(q, k, queue[:100], original=o)).backward()
before = peak()
sum(queue_contrast(q, k, queue, original=o)).backward()
print((peak() - before) / (4 * N * K))
"""


def test_no_matrix_of_queries_and_keys(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Check 1: beside the queue less than a sixth of one [N, K] matrix, of 84 MB."""
    result = run_python(MEMORY_PROGRAM)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1 / 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(7, 1000, 128), (320, 65_536, 128), (33, 5000, 24)], ids=str)
def test_gpu_equals_the_oracle(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, K, d = size
    q, k, o, queue = (unit(rows, d, seed, dtype).cuda() for seed, rows in enumerate((N, N, N, K)))
    q.requires_grad_()
    losses = queue_contrast(q, k, queue, original=o)
    for i, (got, want) in enumerate(zip((*losses, *both_gradients(losses, q)), oracle(q, k, queue, o), strict=True)):
        assert_relative(got, want, LIMIT.get(dtype, 1e-5 if i < 2 else 4e-3))
