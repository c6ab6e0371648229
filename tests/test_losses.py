"""DependencyRegularizer against float64 autograd of its definition, MomentumCovariance against weighted sums."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import neuraldeps_kernels as nk
from neuraldeps_kernels.losses import DependencyRegularizer, MomentumCovariance


def logits_of(B: int, n: int, seed: int = 0, rank: int = 5) -> Tensor:
    """[B, n] float64: `rank` common factors, noise and an offset for each category."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(B, rank, generator=g) @ torch.randn(rank, n, generator=torch.Generator().manual_seed(99))
    return (common + 0.7 * torch.randn(B, n, generator=g) + torch.arange(n) % 7).double()


def dependencies_of(n: int, lam_ratio: float = 0.1, seed: int = 7, **options: Any) -> nk.CovLassoSolution:
    return nk.covlasso(nk.covariance(logits_of(500, n, seed)), lam_ratio=lam_ratio, **options)


def ratios_by_definition(F: Tensor, solution: nk.CovLassoSolution) -> Tensor:
    """R [T] with dense coefficients; autograd follows every step."""
    theta = solution.dense().detach().to(F.dtype).clone()
    theta[torch.arange(len(theta)), solution.targets] -= 1
    fc = F - F.mean(0)
    return (fc @ theta.T).square().mean(0) / fc[:, solution.targets].square().mean(0)


def loss_by_definition(F: Tensor, solution: nk.CovLassoSolution, mode: str, mu: float = 0.5) -> Tensor:
    ratios = ratios_by_definition(F, solution)
    return (mu - ratios).clamp_min(0).mean() if mode == "break" else ratios.mean()


def value_and_gradient(function: Any, F: Tensor) -> tuple[Tensor, Tensor]:
    F = F.detach().clone().requires_grad_()
    value = function(F)
    return value.detach(), torch.autograd.grad(value, F)[0]


# ------------------------------------------------------------------------------------------------ value and gradient


@pytest.mark.parametrize("mode", ["break", "bind"])
@pytest.mark.parametrize(
    ("B", "n", "options"),
    [
        (64, 30, {}),  # every category a target
        (2, 30, {}),  # the smallest batch with a variance
        (257, 40, {"targets": torch.tensor([3, 0, 39])}),  # few targets, first and last column among them
        (64, 30, {"targets": torch.tensor([5, 5, 6])}),  # a target twice
        (64, 30, {"lam_ratio": 1.5}),  # no coefficient at all: R = 1
        (64, 30, {"lam_ratio": 1e-4}),  # nearly all coefficients
        (33, 2, {}),
    ],
)
def test_value_and_gradient_are_those_of_the_definition(B: int, n: int, options: dict[str, Any], mode: str) -> None:
    solution = dependencies_of(n, **options)
    F = logits_of(B, n)
    regularizer = DependencyRegularizer(solution, mode=mode, mu=0.4)
    value, gradient = value_and_gradient(regularizer, F)
    expected, expected_gradient = value_and_gradient(lambda F: loss_by_definition(F, solution, mode, 0.4), F)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        regularizer.residual_ratios(F), ratios_by_definition(F, solution), rtol=1e-11, atol=1e-14
    )


def test_gradient_is_the_formula_of_the_notes() -> None:
    """dR_i/dF = 2 / (B C_ii) (e_i Theta_i' - R_i Fc_i 1_i'), written out for one dependency."""
    solution, F, i = dependencies_of(12), logits_of(20, 12), 4
    theta = solution.dense()[i].clone()
    theta[i] = -1
    fc = F - F.mean(0)
    e, C = fc @ theta, fc[:, i].square().mean()
    R = e.square().mean() / C
    expected = torch.outer(e, theta)
    expected[:, i] -= R * fc[:, i]
    expected *= 2 / (20 * C)
    regularizer = DependencyRegularizer(solution)
    _, gradient = value_and_gradient(lambda F: regularizer.residual_ratios(F)[i], F)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-13)


def test_gradcheck() -> None:
    regularizer = DependencyRegularizer(dependencies_of(8))
    F = logits_of(5, 8).requires_grad_()
    assert torch.autograd.gradcheck(regularizer.residual_ratios, F)
    assert torch.autograd.gradcheck(regularizer, F)


def test_second_derivative_raises_instead_of_being_wrong() -> None:
    F = logits_of(5, 8).requires_grad_()
    value = DependencyRegularizer(dependencies_of(8))(F)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, F, create_graph=True)


def test_logits_stay_as_they_are() -> None:
    """Also where their transpose needs no copy: one row, one column in memory order."""
    for F in (logits_of(1, 8), logits_of(8, 16).T[:, :8], logits_of(9, 8)):
        before = F.clone()
        DependencyRegularizer(dependencies_of(8))(F)
        assert torch.equal(F, before)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 100),
    offset=st.floats(-1000, 1000),
    B=st.integers(2, 40),
)
def test_ratio_does_not_depend_on_scale_and_offset(seed: int, scale: float, offset: float, B: int) -> None:
    regularizer = DependencyRegularizer(dependencies_of(10))
    F = logits_of(B, 10, seed)
    moved = scale * F + offset * torch.arange(10)
    torch.testing.assert_close(regularizer.residual_ratios(moved), regularizer.residual_ratios(F), rtol=1e-7, atol=1e-9)


def test_exact_dependency_has_ratio_zero_and_following_the_gradient_breaks_it() -> None:
    F = logits_of(200, 6)
    F[:, 0] = 0.8 * F[:, 1] - 0.5 * F[:, 2]
    solution = nk.covlasso(nk.covariance(F), lam_ratio=1e-6, targets=[0])
    regularizer = DependencyRegularizer(solution, mu=0.5)
    assert float(regularizer.residual_ratios(F)) < 1e-4
    F += 1e-2 * logits_of(200, 6, seed=3)
    for _ in range(200):
        value, gradient = value_and_gradient(regularizer, F)
        F -= 20 * gradient
    assert float(value) == 0.0
    assert not gradient.any()


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    solution = dependencies_of(30)
    F = logits_of(64, 30).to(dtype)
    regularizer = DependencyRegularizer(solution)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradient = value_and_gradient(regularizer, F)
    expected, expected_gradient = value_and_gradient(lambda F: loss_by_definition(F, solution, "break"), F.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=max(2 * torch.finfo(dtype).eps, 1e-4), atol=1e-6
    )


def test_large_common_offset_costs_little() -> None:
    """Centring comes before the products, so that an offset of 1e4 costs float32 only its rounding of the logits."""
    solution = dependencies_of(30)
    F = (logits_of(256, 30) + 1e4).float()
    value, _ = value_and_gradient(DependencyRegularizer(solution, mode="bind"), F)
    torch.testing.assert_close(value.double(), loss_by_definition(F.double(), solution, "bind"), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------ degenerate batches


@pytest.mark.parametrize(("mode", "expected"), [("break", 0.0), ("bind", 1.0)])
def test_batch_of_one_counts_as_unexplained_with_zero_gradient(mode: str, expected: float) -> None:
    value, gradient = value_and_gradient(DependencyRegularizer(dependencies_of(8), mode=mode), logits_of(1, 8))
    assert float(value) == expected
    assert not gradient.any()


def test_constant_logit_counts_as_unexplained_and_leaves_the_others_alone() -> None:
    solution = dependencies_of(8)
    F = logits_of(20, 8)
    F[:, 3] = 0.1
    regularizer = DependencyRegularizer(solution)
    ratios = regularizer.residual_ratios(F)
    _, gradient = value_and_gradient(lambda F: regularizer.residual_ratios(F)[3], F)
    assert float(ratios[3]) == 1.0
    assert not gradient.any()
    others = torch.arange(8) != 3
    torch.testing.assert_close(ratios[others], ratios_by_definition(F, solution)[others], rtol=1e-10, atol=0)


def test_nan_is_not_hidden() -> None:
    F = logits_of(20, 8)
    F[3, 2] = torch.nan
    assert DependencyRegularizer(dependencies_of(8), mode="bind")(F).isnan()


def test_without_dependencies_the_penalty_is_zero() -> None:
    regularizer = DependencyRegularizer()
    F = logits_of(4, 8).float().requires_grad_()
    loss = F.square().sum() + 0.1 * regularizer(F)
    torch.testing.assert_close(torch.autograd.grad(loss, F)[0], 2 * F.detach())
    assert regularizer.num_dependencies == 0


# ------------------------------------------------------------------------------------------------ module


def test_refresh_replaces_everything() -> None:
    first, second = dependencies_of(20), dependencies_of(20, 0.01, seed=3, targets=[4, 9, 1])
    regularizer = DependencyRegularizer(first)
    regularizer.refresh(second)
    F = logits_of(30, 20)
    torch.testing.assert_close(regularizer(F), DependencyRegularizer(second)(F), rtol=0, atol=0)
    assert regularizer.num_dependencies == 3


def test_dependencies_are_constants() -> None:
    cov = nk.covariance(logits_of(500, 10)).requires_grad_()
    regularizer = DependencyRegularizer(nk.covlasso(cov, lam_ratio=0.1))
    assert not any(buffer.requires_grad for buffer in regularizer.buffers())
    assert not list(regularizer.parameters())


def test_state_dict_carries_dependencies_of_any_number() -> None:
    regularizer = DependencyRegularizer(dependencies_of(20), mode="bind")
    file = io.BytesIO()
    torch.save(regularizer.state_dict(), file)
    file.seek(0)
    for other in (DependencyRegularizer(mode="bind"), DependencyRegularizer(dependencies_of(7), mode="bind")):
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        F = logits_of(9, 20)
        assert torch.equal(other(F), regularizer(F))
    assert torch.equal(copy.deepcopy(regularizer)(F), regularizer(F))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "bend"}, ValueError, "mode must be 'break' or 'bind', not 'bend'"),
        ({"mu": 0.0}, ValueError, r"mu must be in \(0, 1\], not 0.0"),
        ({"mu": 1.5}, ValueError, "mu must be in"),
        ({"eps": 0.0}, ValueError, "eps must be positive, not 0.0"),
        ({"dependencies": torch.eye(3)}, TypeError, "dependencies must be a CovLassoSolution, not Tensor"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DependencyRegularizer(**arguments)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(4, 7), ValueError, r"logits must be \[B, 8\] with B >= 1, not \[4, 7\]"),
        (torch.zeros(0, 8), ValueError, "B >= 1"),
        (torch.zeros(8), ValueError, r"not \[8\]"),
        (torch.zeros(4, 8, dtype=torch.int64), TypeError, "logits must be float32, .* not torch.int64"),
        ([[0.0] * 8], TypeError, "logits must be a torch.Tensor, not list"),
    ],
)
def test_bad_logits(logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DependencyRegularizer(dependencies_of(8))(logits)


def test_dependencies_between_networks_are_refused() -> None:
    f, g = logits_of(200, 6), logits_of(200, 6, seed=1)
    solution = nk.covlasso(nk.cross_covariance(f, g, exclude_same=False), lam_ratio=1e-3)
    with pytest.raises(ValueError, match="no category predicts itself"):
        DependencyRegularizer(solution)


def test_coefficients_that_are_not_finite_are_refused() -> None:
    solution = dependencies_of(8)
    solution.coefficients.values()[0] = torch.nan
    with pytest.raises(ValueError, match="finite coefficients"):
        DependencyRegularizer(solution)


class _LargestTensor(TorchDispatchMode):
    """Numbers in the largest result of any operator."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_nothing_is_larger_than_the_logits() -> None:
    B, n = 8, 3000
    solution = dependencies_of(60, targets=[0, 1, 2])
    theta = solution.coefficients
    wide = torch.sparse_csr_tensor(theta.crow_indices(), 50 * theta.col_indices() + 3, theta.values(), (3, n))
    regularizer = DependencyRegularizer(type(solution)(**{**vars(solution), "coefficients": wide}))
    F = logits_of(B, n).requires_grad_()
    with _LargestTensor() as seen:
        torch.autograd.grad(regularizer(F), F)
    assert seen.largest == B * n


# ------------------------------------------------------------------------------------------------ torch.compile


def test_compiles_in_one_graph_and_again_after_refresh() -> None:
    solutions = [dependencies_of(12, ratio) for ratio in (0.3, 0.1, 0.02)]
    regularizer = DependencyRegularizer(solutions[0])
    torch._dynamo.reset()
    compiled = torch.compile(regularizer, fullgraph=True, backend="aot_eager")
    for solution in solutions:
        regularizer.refresh(solution)
        for B in (16, 5):
            F = logits_of(B, 12)
            value, gradient = value_and_gradient(compiled, F)
            expected, expected_gradient = value_and_gradient(lambda F: loss_by_definition(F, solution, "break"), F)  # noqa: B023
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_inductor_compiles_a_training_step() -> None:
    solution = dependencies_of(12)
    regularizer, head = DependencyRegularizer(solution), nn.Linear(5, 12)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(x)
        return nn.functional.cross_entropy(logits.float(), x.new_zeros(len(x), dtype=torch.int64)) + regularizer(logits)

    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    gradients = [torch.autograd.grad(f(x), head.weight)[0] for f in (loss, torch.compile(loss, fullgraph=True))]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------------------------------------ momentum covariance


def weighted_oracle(batches: list[Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all rows, a row of the batch t updates old weighing momentum^t / its batch size."""
    rows = torch.cat(batches).double()
    age = range(len(batches) - 1, -1, -1)
    shares = [w for batch, t in zip(batches, age, strict=True) for w in [momentum**t / len(batch)] * len(batch)]
    weight = torch.tensor(shares, dtype=torch.float64)
    weight /= weight.sum()
    mean = weight @ rows
    centred = rows - mean
    return mean, (centred * weight[:, None]).T @ centred


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_momentum_covariance_is_the_weighted_one_from_the_first_update(momentum: float, dtype: torch.dtype) -> None:
    statistics = MomentumCovariance(5, momentum)
    batches = [(logits_of(B, 5, seed=B) + B).to(dtype) for B in (7, 1, 20, 3)]
    for t, batch in enumerate(batches):
        statistics.update(batch)
        mean, cov = weighted_oracle(batches[: t + 1], momentum)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(statistics.mean, mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(statistics.compute(), cov, rtol=tolerance, atol=tolerance)


def test_momentum_covariance_records_no_gradient_and_feeds_covlasso() -> None:
    statistics = MomentumCovariance(10, 0.9)
    for seed in range(4):
        statistics.update(logits_of(30, 10, seed).requires_grad_())
    assert not statistics.compute().requires_grad
    solution = nk.covlasso(statistics.compute(torch.float32), lam_ratio=0.1)
    assert set(solution.status_names) == {"converged"}


def test_momentum_covariance_state_dict() -> None:
    one, other = MomentumCovariance(4, 0.9), MomentumCovariance(4, 0.9)
    one.update(logits_of(9, 4))
    other.load_state_dict(one.state_dict())
    for statistics in (one, other):
        statistics.update(logits_of(5, 4, seed=1))
    assert torch.equal(one.compute(), other.compute())
    assert one.compute(torch.float32).dtype == torch.float32
    assert MomentumCovariance(4).compute().isnan().all()


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, r"logits must be \[B, 4\] with B >= 1, not \[3, 5\]"),
        (torch.zeros(0, 4), ValueError, "B >= 1"),
        (torch.zeros(3, 4, dtype=torch.int32), TypeError, "not torch.int32"),
        (torch.full((3, 4), torch.nan), ValueError, "NaN"),
    ],
)
def test_momentum_covariance_refuses_and_keeps_its_state(logits: Tensor, error: type[Exception], message: str) -> None:
    statistics = MomentumCovariance(4)
    statistics.update(logits_of(9, 4))
    before = statistics.compute()
    with pytest.raises(error, match=message):
        statistics.update(logits)
    assert torch.equal(statistics.compute(), before)


@pytest.mark.parametrize(("n", "momentum"), [(0, 0.9), (3, 1.0), (3, -0.1)])
def test_momentum_covariance_bad_arguments(n: int, momentum: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        MomentumCovariance(n, momentum)


def test_all_reduce_without_processes() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        MomentumCovariance(3).all_reduce()


# ------------------------------------------------------------------------------------------------ processes

SHARES = (0, 12, 19)  # rows of the whole batch that two processes have: 12 and 7


def joint_task() -> tuple[nn.Linear, Tensor, nk.CovLassoSolution]:
    """A head, the inputs of the whole batch and dependencies of its logits; the same in every process."""
    torch.manual_seed(0)
    return nn.Linear(4, 10).double(), torch.randn(SHARES[-1], 4).double(), dependencies_of(10)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head, x, solution = joint_task()
    own = x[SHARES[rank] : SHARES[rank + 1]]
    regularizer = DependencyRegularizer(solution, mode="bind")
    found: dict[str, Any] = {}

    model = nn.parallel.DistributedDataParallel(copy.deepcopy(head))
    value = regularizer(model(own))
    value.backward()
    found["ddp"] = value.detach(), model.module.weight.grad

    weight = head.weight.detach().requires_grad_()
    own_scale = rank + 1.0  # upstream gradients may differ: sum_r own_scale_r dL/dF
    found["scaled"] = torch.autograd.grad(own_scale * regularizer(own @ weight.T), weight)

    compiled = torch.compile(regularizer, fullgraph=True, backend="aot_eager")
    found["compiled"] = torch.autograd.grad(compiled(own @ weight.T), weight)

    regularizer.eval()
    found["alone"] = regularizer(own @ weight.T).detach()

    statistics = MomentumCovariance(10, 0.8)
    for step in range(4):
        statistics.update(logits_of(6, 10, seed=10 * step + rank))
        if step % 2:
            statistics.all_reduce()
    found["momentum"] = statistics.mean, statistics.compute(), statistics.weight
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    head, x, solution = joint_task()
    value = loss_by_definition(head(x), solution, "bind")
    (gradient,) = torch.autograd.grad(value, head.weight)
    close = {"rtol": 1e-10, "atol": 1e-13}
    for rank in range(2):
        torch.testing.assert_close(found[rank]["ddp"], (value.detach(), gradient), **close)
        own = x[SHARES[rank] : SHARES[rank + 1]] @ head.weight.detach().T
        torch.testing.assert_close(found[rank]["alone"], loss_by_definition(own, solution, "bind"), **close)
    for name, upstream in (("scaled", 1.0 + 2.0), ("compiled", 2.0)):
        total = found[0][name][0] + found[1][name][0]
        torch.testing.assert_close(total, upstream * gradient, **close)

    joined = [torch.cat([logits_of(6, 10, seed=10 * step + rank) for rank in range(2)]) for step in range(4)]
    mean, cov = weighted_oracle(joined, 0.8)
    for rank in range(2):
        torch.testing.assert_close(found[rank]["momentum"][:2], (mean, cov), **close)
        torch.testing.assert_close(float(found[rank]["momentum"][2]), 1 - 0.8**4)
