"""Exact nearest neighbours of CUDA tensors: matrix products of 16-bit copies by cuBLAS, all else in our kernels.

`search` queues the stages of csrc/cuda/retrieval.cu and waits for nothing. A tile of products takes no more than
`_TILE_ROWS` x `_TILE_COLUMNS` values, 32 MiB, which the second-level cache of an H100 holds: N x M products come and go
without much of device memory. Beside the results there are, for every row, 2 bytes a value (12 with `dense`, up to
`_FINE_DIM` columns, and without `reduced`) and 12 bytes for each of 4 k + 160 candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

_METRICS = ("sqeuclidean", "cosine", "inner_product")  # by their numbers in cuda_api.h
_TILE_ROWS, _TILE_COLUMNS = 2048, 4096
_FINE_DIM = 128  # up to here products of three parts cost little, and leave next to no candidates
_DENSE_ROWS = 256  # of a product, or a multiple of them: as many as fill the tiles of a matrix product
_SUMMED_COLUMNS = 512  # of rows, whose products tensor cores sum before float32 arithmetic does
_ALIGNMENT = 8  # of the copies


@dataclass(frozen=True)
class Problem:
    """A search for the k nearest rows: of x in y, or, `joined`, of x and then y (or x alone) among themselves."""

    x: Tensor  # [n, D] float32 or float64, values of a row side by side
    y: Tensor | None  # [m, D]
    joined: bool
    metric: str
    k: int
    num_queries: int = 0  # of a joined search: the first rows have query_k neighbours
    query_k: int = 0
    largest: bool = False
    dense: bool = False  # keys of the queries with all other rows
    reduced: bool = True
    bfloat16: bool = False  # copies are bfloat16, not float16

    @property
    def searched(self) -> int:
        """Rows that have neighbours."""
        return len(self.x) + (len(self.y) if self.joined and self.y is not None else 0)

    @property
    def among(self) -> int:
        return self.searched if self.joined or self.y is None else len(self.y)

    @property
    def fine(self) -> bool:
        return not self.reduced or self.x.shape[1] <= _FINE_DIM

    @cached_property
    def how(self) -> list[int]:
        numbers = (self.joined, _METRICS.index(self.metric), self.k, self.num_queries, self.query_k)
        return [int(number) for number in (*numbers, self.largest, self.fine or self.dense, self.fine, self.bfloat16)]


class Kernels(Protocol):
    """The stages, as on a device."""

    def prepare(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Copies [rows, parts D], left and right (empty: as left), and the workspace."""

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out float32 = left right' of 16-bit tensors, summed in float32."""

    def offer(
        self, problem: Problem, workspace: Tensor, product: Tensor, first_row: int, rows: int, first: int, columns: int
    ) -> None:
        """Products [rows, columns or more] of rows with columns from `first` on."""

    def finish(self, problem: Problem, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """key and index [N, k], largest [N], query_key and query_index [num_queries, query_k]."""

    def write_dense(
        self, problem: Problem, workspace: Tensor, product: Tensor, first_row: int, rows: int, dense: Tensor
    ) -> None:
        """Rows of dense from products of queries with all other rows."""


class _Device:
    def prepare(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.neuraldeps.neighbors_prepare(problem.x, problem.y, problem.how)  # type: ignore[no-any-return]

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.ops.aten.mm.dtype_out(left, right.T, torch.float32, out=out)

    def offer(
        self, problem: Problem, workspace: Tensor, product: Tensor, first_row: int, rows: int, first: int, columns: int
    ) -> None:
        torch.ops.neuraldeps.neighbors_offer(
            problem.x, problem.y, problem.how, workspace, product, first_row, rows, first, columns
        )

    def finish(self, problem: Problem, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.neuraldeps.neighbors_finish(  # type: ignore[no-any-return]
            problem.x, problem.y, problem.how, workspace
        )

    def write_dense(
        self, problem: Problem, workspace: Tensor, product: Tensor, first_row: int, rows: int, dense: Tensor
    ) -> None:
        torch.ops.neuraldeps.neighbors_dense(
            problem.x, problem.y, problem.how, workspace, product, first_row, rows, dense
        )


def neighbors(x: Tensor, y: Tensor | None, k: int, metric: str, reduced: bool) -> tuple[Tensor, Tensor]:
    """The operator `neighbors` on CUDA."""
    return search(_problem(x, y, y is None, metric, k, reduced=reduced))[:2]


def neighbors_and_largest(x: Tensor, y: Tensor, k: int, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `neighbors_and_largest` on CUDA."""
    return search(_problem(x, y, False, "sqeuclidean", k, largest=True, reduced=reduced))[:3]


def neighbor_lists(
    query: Tensor, gallery: Tensor, k: int, query_k: int, dense: bool, reduced: bool, metric: str = "sqeuclidean"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator `neighbor_lists` on CUDA."""
    if dense and metric == "inner_product":
        raise ValueError("metric must not be inner_product with dense")
    problem = _problem(query, gallery, True, metric, k, largest=True, reduced=reduced)
    if query_k != 0 and not k <= query_k <= problem.searched:
        raise ValueError(f"query_k must be 0 or in {k}..{problem.searched}, not {query_k}")
    return search(replace(problem, num_queries=len(query), query_k=query_k, dense=dense))


def _problem(
    x: Tensor, y: Tensor | None, joined: bool, metric: str, k: int, *, largest: bool = False, reduced: bool
) -> Problem:
    if x.dim() != 2 or x.shape[1] < 1 or (y is not None and (y.dim() != 2 or y.shape[1] != x.shape[1])):
        raise ValueError("x and y must be [N, D] and [M, D], with columns")
    if y is not None and y.dtype != x.dtype:
        raise ValueError("y must have the dtype of x")
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, not {metric!r}")
    # With this setting products of float16 are summed in float16.
    bfloat16 = torch.backends.cuda.matmul.allow_fp16_accumulation
    y = None if y is None else _readable(y)
    problem = Problem(_readable(x), y, joined, metric, k, largest=largest, reduced=reduced, bfloat16=bfloat16)
    if not 1 <= k <= problem.among < 1 << 31:
        raise ValueError(f"k must be in 1..{problem.among}, the rows to search in (fewer than 2^31), not {k}")
    return problem


def _readable(x: Tensor) -> Tensor:
    x = x.detach()
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide if wide.stride(1) == 1 or wide.shape[1] == 1 else wide.contiguous()


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def search(problem: Problem, kernels: Kernels | None = None) -> Found:
    """key and index [N, k], largest [N], query_key and query_index [num_queries, query_k], dense float32
    [num_queries, N - num_queries]; parts that are not asked for are empty. Where a row is not finite or, for cosines,
    zero, all keys are NaN, and indices are 0, 1, ..
    """
    kernels = kernels or _Device()
    queries, others = problem.num_queries, problem.searched - problem.num_queries
    dense = problem.x.new_empty((queries, others) if problem.dense else (0, 0), dtype=torch.float32)
    if problem.searched == 0:
        empty = problem.x.new_empty((0, problem.k), dtype=torch.float64)
        none = problem.x.new_empty((0, problem.query_k), dtype=torch.float64)
        return empty, empty.long(), empty[:, 0], none, none.long(), dense
    left, right, workspace = kernels.prepare(problem)
    right = right if len(right) else left
    offer_tiles(problem, kernels, left, right, workspace)
    if dense.numel() > 0:
        fill_dense(problem, kernels, left, right, workspace, dense)
    return *kernels.finish(problem, workspace), dense


def offer_tiles(problem: Problem, kernels: Kernels, left: Tensor, right: Tensor, workspace: Tensor) -> None:
    """All products, tile by tile; within one set those of columns from the first row of a tile on."""
    if not problem.fine:  # of three parts the first
        left, right = (copy[:, : _rounded_up(problem.x.shape[1])] for copy in (left, right))
    N, M = problem.searched, problem.among
    most_rows = min(_TILE_ROWS, N)
    most_columns = min(_TILE_ROWS * _TILE_COLUMNS // most_rows // _ALIGNMENT * _ALIGNMENT, _rounded_up(M))
    tile = problem.x.new_empty(most_rows * most_columns, dtype=torch.float32)
    for row in range(0, N, most_rows):
        rows = min(most_rows, N - row)
        for column in range(row if problem.joined else 0, M, most_columns):
            columns = min(most_columns, M - column)
            wide = _rounded_up(columns)
            product = tile[: rows * wide].view(rows, wide)
            kernels.multiply(left[row : row + rows], right[column : column + wide], product)
            kernels.offer(problem, workspace, product, row, rows, column, columns)


def fill_dense(
    problem: Problem, kernels: Kernels, left: Tensor, right: Tensor, workspace: Tensor, dense: Tensor
) -> None:
    """From products of all three parts: those of the first a few columns at a time, for float32 to sum them well."""
    queries, others = dense.shape
    right = right[queries : queries + _rounded_up(others)]
    dim = _rounded_up(problem.x.shape[1])
    cuts = [*range(0, dim, _SUMMED_COLUMNS), dim, 3 * dim]
    step = min(queries, max(1, _TILE_ROWS * _TILE_COLUMNS // len(right) // _DENSE_ROWS) * _DENSE_ROWS)
    buffers = problem.x.new_empty((2, step, len(right)), dtype=torch.float32)
    for row in range(0, queries, step):
        rows = min(step, queries - row)
        total, product = buffers[0, :rows], buffers[1, :rows]
        for begin, end in pairwise(cuts):
            kernels.multiply(left[row : row + rows, begin:end], right[:, begin:end], product if begin else total)
            if begin:
                total.add_(product)
        kernels.write_dense(problem, workspace, total, row, rows, dense)


def _rounded_up(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
