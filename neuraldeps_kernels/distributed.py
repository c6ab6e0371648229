"""CovLasso over the processes of a torch.distributed group: each rank solves a share of the targets, all get the whole.

The problems of different targets share nothing but the covariance, which every rank holds (that of `all_reduce` of the
accumulators, say). With W ranks, rank r solves the targets at positions r, r + W, r + 2 W, ...: what a target costs is
known only once it is solved, but categories that stand together are often alike and cost alike, so taking turns spreads
them. Results travel as padded tensors and are put back in order, bit for bit those of one process; only with a
FactoredCovariance, whose products run over all targets of a call at once, may they differ from those by rounding.

    1. every rank checks its arguments; checksums of all of them are exchanged (one small all_gather);
    2. every rank solves its targets;
    3. errors and sizes are exchanged (one small all_gather), then the results (three all_gathers).

An error of one rank in 1 or 2 is raised on all of them. A rank that dies makes the exchange of the others fail: with
gloo a RuntimeError follows, at once where the connection broke and at the latest after the timeout of the group; with
NCCL its watchdog ends the processes after that timeout. The timeout has to be longer than the ranks may be apart when
they have solved their share. Tensors travel on the device of the covariance where the group
has a backend for it other than gloo, else through the host.

Results carry no gradient: the coefficients of other ranks have no graph here. Differentiate a local `covlasso` of the
targets of interest instead.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from neuraldeps_kernels.ops import covlasso as solver
from neuraldeps_kernels.ops.covariance import CrossCovariance
from neuraldeps_kernels.ops.covlasso import Covariance, Scalar
from neuraldeps_kernels.ops.covlasso_solution import CovLassoPath, CovLassoSolution, csr, ranges, select_rows
from neuraldeps_kernels.ops.factored import FactoredCovariance
from neuraldeps_kernels.profiling import annotated

__all__ = ["covlasso", "covlasso_path", "covlasso_top_k"]

Value = TypeVar("Value")
Result = TypeVar("Result", CovLassoSolution, CovLassoPath)

_NUMBERS = 16  # integers that a rank may tell the others at once
_MESSAGE_BYTES = 512
_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)  # codes 1, 2, 3; anything else is the last
# Dimensions of an argument that has an entry for each target; with fewer, all targets share it.
_PER_TARGET_DIMENSIONS = {"targets": 1, "lam": 1, "lam_ratio": 1, "lams": 2, "candidates": 2}


@annotated
def covlasso(
    cov: Covariance,
    lam: Tensor | Scalar | None = None,
    *,
    lam_ratio: Tensor | Scalar | None = None,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    warm_start: CovLassoSolution | None = None,
    group: dist.ProcessGroup | None = None,
) -> CovLassoSolution:
    """`neuraldeps_kernels.covlasso` with the targets shared out over the ranks of `group`.

    Args:
        cov, lam, lam_ratio, targets, candidates, penalty_factors, nonnegative, ridge, tol, max_pivots, warm_start: as
            there, for all targets and the same on every rank.
        group: the processes taking part, default all; each of them has to call this.

    Returns:
        The solutions of all targets, on every rank; detached, without a gradient.

    Raises:
        ValueError, TypeError: as `neuraldeps_kernels.covlasso`, on all ranks even if one alone meets it; ValueError
            also where an argument differs between ranks, naming it.
        RuntimeError: `torch.distributed` is not initialised, or a rank died or did not come within the timeout.
    """
    return _solve_sharded(
        "covlasso",
        solver.covlasso,
        cov,
        group,
        lam=lam,
        lam_ratio=lam_ratio,
        targets=targets,
        candidates=candidates,
        penalty_factors=penalty_factors,
        nonnegative=nonnegative,
        ridge=ridge,
        tol=tol,
        max_pivots=max_pivots,
        warm_start=warm_start,
    )


@annotated
def covlasso_path(
    cov: Covariance,
    *,
    n_lambdas: int = 20,
    lam_min_ratio: float = 1e-2,
    lams: Tensor | Sequence[float] | None = None,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    warm_start: CovLassoSolution | None = None,
    group: dist.ProcessGroup | None = None,
) -> CovLassoPath:
    """`neuraldeps_kernels.covlasso_path` with the targets shared out over the ranks of `group`.

    Arguments, result and errors are those of `neuraldeps_kernels.covlasso_path`; for the rest see `covlasso` above.
    """
    return _solve_sharded(
        "covlasso_path",
        solver.covlasso_path,
        cov,
        group,
        n_lambdas=n_lambdas,
        lam_min_ratio=lam_min_ratio,
        lams=lams,
        targets=targets,
        candidates=candidates,
        penalty_factors=penalty_factors,
        nonnegative=nonnegative,
        ridge=ridge,
        tol=tol,
        max_pivots=max_pivots,
        warm_start=warm_start,
    )


@annotated
def covlasso_top_k(
    cov: Covariance,
    k: int,
    *,
    position: float = 1e-3,
    targets: Tensor | Sequence[int] | None = None,
    candidates: Tensor | None = None,
    penalty_factors: Tensor | None = None,
    nonnegative: bool = False,
    ridge: float = 0.0,
    tol: float = 1e-6,
    max_pivots: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> CovLassoSolution:
    """`neuraldeps_kernels.covlasso_top_k` with the targets shared out over the ranks of `group`.

    Arguments, result and errors are those of `neuraldeps_kernels.covlasso_top_k`; for the rest see `covlasso` above.
    """
    return _solve_sharded(
        "covlasso_top_k",
        solver.covlasso_top_k,
        cov,
        group,
        k=k,
        position=position,
        targets=targets,
        candidates=candidates,
        penalty_factors=penalty_factors,
        nonnegative=nonnegative,
        ridge=ridge,
        tol=tol,
        max_pivots=max_pivots,
    )


@torch.no_grad()
def _solve_sharded(
    name: str, solve: Callable[..., Result], cov: Covariance, group: dist.ProcessGroup | None, **arguments: Any
) -> Result:
    """`solve(cov, **arguments)`, which is called `name`."""
    ranks = _Ranks(name, group)

    def prepared() -> tuple[tuple[int, dict[str, Any]], list[int]]:
        checksums = [_checksum(value) for value in (name, cov, *arguments.values())]
        num_targets = _number_of_targets(cov, arguments["targets"])
        if arguments["targets"] is None:
            arguments["targets"] = range(num_targets)
        mine = slice(ranks.rank, num_targets, ranks.world)
        shares = {name: _share(name, value, num_targets, mine) for name, value in arguments.items()}
        return (num_targets, shares), checksums

    (num_targets, shares), checksums = ranks.together(prepared)
    _check_agreement(["the function called", "cov", *arguments], checksums)

    def solved() -> tuple[Result, list[int]]:
        result = solve(cov, **shares)
        rows = len(result.targets)
        return result, [len(result.coefficients.values()), result.coefficients.shape[0] // rows if rows else 0]

    result, sizes = ranks.together(solved)
    if num_targets == 0:
        return result
    most_entries, rows_per_target = (max(column) for column in list(zip(*sizes, strict=True))[:2])
    return _gathered(ranks, result, num_targets, most_entries, rows_per_target)


class _Ranks:
    """The processes that take part in one call, and what they tell each other."""

    def __init__(self, name: str, group: dist.ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{name} needs torch.distributed: call torch.distributed.init_process_group first")
        self.name, self.group = name, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group does not contain this process")
        backends = dist.get_backend_config(group).split(",")
        self._backends = dict(backend.split(":") for backend in backends)

    def device_for(self, device: torch.device) -> torch.device:
        """Where tensors that live on `device` are exchanged."""
        if device.type == "cpu" and "cpu" in self._backends:
            return device
        if self._backends.get(device.type, "gloo") != "gloo":
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, all of one shape: [world, *shape], on the device of x."""
        here = x.to(self.device_for(x.device)).contiguous()
        parts = here.new_empty((self.world, *here.shape))
        if here.numel():
            try:
                dist.all_gather(list(parts.unbind()), here, group=self.group)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{self.name} on rank {self.rank} of {self.world}: the exchange with the other ranks failed; one "
                    f"of them has died or did not call {self.name} within the timeout of the group ({error})"
                ) from error
        return parts.to(x.device)

    def together(self, step: Callable[[], tuple[Value, list[int]]]) -> tuple[Value, list[list[int]]]:
        """Takes a step on every rank.

        Returns:
            The value of `step` here and its integers, at most `_NUMBERS`, of every rank (padded by zeros).

        Raises:
            Exception: `step` raised on some rank: its own error there, that of the first such rank elsewhere.
        """
        failure: Exception | None = None
        outcome: tuple[Value, list[int]] | None = None
        try:
            outcome = step()
        except Exception as error:  # the other ranks wait for word from this one, whatever it is
            failure = error
        numbers = [] if outcome is None else outcome[1]
        code = 0 if failure is None else _code(failure)
        header = torch.tensor([code, *numbers, *[0] * (_NUMBERS - len(numbers))], dtype=torch.int64)
        table = self.all_gather(header)
        failed = table[:, 0].nonzero()[:, 0].tolist()
        if failed:
            message = str(failure).encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
            messages = self.all_gather(torch.tensor(list(message), dtype=torch.uint8))
            if failure is not None:
                raise failure
            text = bytes(messages[failed[0]].tolist()).rstrip(b"\0").decode(errors="replace")
            raise _ERRORS[int(table[failed[0], 0]) - 1](f"rank {failed[0]}: {text}")
        assert outcome is not None
        return outcome[0], table[:, 1:].tolist()


def _code(failure: Exception) -> int:
    """1-based number of its class in `_ERRORS`."""
    return next((code for code, kind in enumerate(_ERRORS, 1) if isinstance(failure, kind)), len(_ERRORS))


# ------------------------------------------------------------------------------------------------ arguments


def _number_of_targets(cov: Covariance, targets: Tensor | Sequence[int] | None) -> int:
    if targets is not None:
        indices = torch.as_tensor(targets)
        if indices.dim() != 1:
            raise ValueError(f"targets must be one-dimensional [T], not {list(indices.shape)}")
        return len(indices)
    if isinstance(cov, CrossCovariance):
        return cov.cross.shape[0]
    if not isinstance(cov, (Tensor, FactoredCovariance)):
        raise TypeError(f"cov must be a torch.Tensor or another covariance, not {type(cov).__name__}")
    if len(cov.shape) != 2:
        raise ValueError(f"cov must be a square matrix [n, n], not {list(cov.shape)}")
    return cov.shape[0]


def _share(name: str, value: Any, num_targets: int, mine: slice) -> Any:
    """The part of an argument that belongs to the targets of this rank; the argument itself where all share it."""
    if name == "warm_start" and isinstance(value, CovLassoSolution):
        return _solution_rows(value, num_targets, mine)
    if name not in _PER_TARGET_DIMENSIONS or value is None:
        return value
    shape = torch.as_tensor(value).shape
    if len(shape) != _PER_TARGET_DIMENSIONS[name]:
        return value
    if shape[0] != num_targets:
        raise ValueError(f"{name} must have one entry for each of the {num_targets} targets, not {list(shape)}")
    return value[mine]


def _solution_rows(solution: CovLassoSolution, num_targets: int, mine: slice) -> CovLassoSolution:
    if len(solution.targets) != num_targets:
        raise ValueError(f"warm_start must have {num_targets} targets, not {len(solution.targets)}")
    rows = torch.arange(num_targets, device=solution.targets.device)[mine]
    parts = {name: value[rows] for name, value in _dense_fields(solution).items()}
    return dataclasses.replace(solution, coefficients=select_rows(solution.coefficients, rows), **parts)


def _checksum(value: Any) -> int:
    """The same on two ranks whose `value` is the same to the last bit; up to chance (2^-32) different otherwise."""
    if isinstance(value, Tensor) and value.layout == torch.sparse_csr:
        return _checksum([tuple(value.shape), value.crow_indices(), value.col_indices(), value.values()])
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return zlib.crc32(data.data, zlib.crc32(repr((value.device.type, value.dtype, tuple(value.shape))).encode()))
    if isinstance(value, (list, tuple)):
        return zlib.crc32(repr([_checksum(part) for part in value]).encode())
    if isinstance(value, FactoredCovariance):
        return _checksum(["factored", value.weight, value.hidden_cov])
    if dataclasses.is_dataclass(value):
        return _checksum([getattr(value, field.name) for field in dataclasses.fields(value)])
    return zlib.crc32(repr(value).encode())


def _check_agreement(names: list[str], checksums: list[list[int]]) -> None:
    for name, column in zip(names, zip(*checksums, strict=True), strict=False):
        different = [rank for rank, checksum in enumerate(column) if checksum != column[0]]
        if different:
            raise ValueError(f"{name} must be the same on all ranks, but differs from rank 0 on {different}")


# ------------------------------------------------------------------------------------------------ results


def _dense_fields(result: CovLassoSolution | CovLassoPath) -> dict[str, Tensor]:
    """All fields with one row per target."""
    names = [field.name for field in dataclasses.fields(result) if field.name != "coefficients"]
    return {name: getattr(result, name) for name in names}


def _gathered(ranks: _Ranks, result: Result, num_targets: int, most_entries: int, rows_per_target: int) -> Result:
    """The result of all targets from that of every rank's.

    The fields, exact in float64, travel as one matrix [targets of a rank, width], the coefficients as values and
    columns padded to `most_entries`.
    """
    most_targets = -(-num_targets // ranks.world)

    def padded(x: Tensor, length: int) -> Tensor:
        return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])

    def ordered(parts: Tensor) -> Tensor:
        """[world, most_targets, ...] -> [T, ...]: target r + i world is number i of rank r."""
        return parts.transpose(0, 1).flatten(0, 1)[:num_targets]

    coefficients = result.coefficients
    count = coefficients.crow_indices().diff().view(len(result.targets), rows_per_target)
    local = {"count": count, **_dense_fields(result)}
    matrix = torch.cat([x.reshape(len(x), x.shape[1:].numel()).double() for x in local.values()], 1)
    matrices = ranks.all_gather(padded(matrix, most_targets))
    columns = matrices.split([x.shape[1:].numel() for x in local.values()], 2)
    fields = {
        name: ordered(column).to(x.dtype).view(num_targets, *x.shape[1:])
        for (name, x), column in zip(local.items(), columns, strict=True)
    }

    values = ranks.all_gather(padded(coefficients.values(), most_entries)).view(-1)
    indices = ranks.all_gather(padded(coefficients.col_indices().int(), most_entries)).view(-1)
    entries = columns[0].sum(2).long()  # [world, most_targets]
    first = torch.arange(ranks.world, device=entries.device)[:, None] * most_entries + entries.cumsum(1) - entries
    order = ranges(ordered(first), ordered(entries))
    fields["coefficients"] = csr(fields.pop("count").view(-1), indices[order], values[order], coefficients.shape[1])
    return dataclasses.replace(result, **fields)
