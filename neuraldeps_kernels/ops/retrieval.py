"""Exact nearest neighbours and k-reciprocal re-ranking without an N x N matrix.

Operators (csrc/torch/retrieval.cpp, csrc/torch/reranking.cpp): `neighbors`, `neighbor_lists`, `reciprocal_encoding`,
`jaccard_rerank`, `jaccard_rerank_top_k`, `jaccard_distance`. Rows are the queries, then the gallery, N = nq + ng:

    d(i, j)  = |x_i - x_j|^2                  t(i, j) = d(i, j) / max_j d(i, j)
    R(i, k)  = { g among the k + 1 nearest of i : i among the k + 1 nearest of g }
    R*(i)    = R(i, k1) and, for c in R(i, k1) of which |R(c, k1/2) n R(i, k1)| > 2/3 |R(c, k1/2)|, all of R(c, k1/2)
    V(i, g)  = exp(-t(i, g)) / sum over R*(i),     V'(i) = mean of V over the k2 nearest of i
    Jaccard  = 1 - s / (2 - s),   s(i, j) = sum_c min(V'(i, c), V'(j, c))
    result   = (1 - lambda) Jaccard + lambda t

On CUDA retrieval_cuda.py searches for neighbours, an encoding has room behind its last entry, and jaccard_distance
waits for the size of its result. Source: Zhong et al., CVPR 2017, as stated above; where public implementations differ,
the choice is ours and the others are options. The certified search and the exact top rows are ours.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from neuraldeps_kernels.ops import retrieval_cuda
from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import retrieval as reference

_log = logging.getLogger("neuraldeps_kernels")

METRICS = ("sqeuclidean", "cosine", "inner_product")
_POWERS = (2, 4)
_NORMALIZE = ("max", "none")
_LIST_LENGTHS = ("k1+1", "k1")
_LONGER_LISTS = 3  # neighbours of a query for each of its top_k rows, so that they settle almost every query
_GRADIENT_VALUES = 1 << 24  # differences held at once by the gradient


@annotated
def knn(x: Tensor, k: int, *, y: Tensor | None = None, metric: str = "sqeuclidean") -> tuple[Tensor, Tensor]:
    """The k nearest rows of `y` (of `x` itself if None) for every row of `x`, exactly.

    Args:
        x: [N, D], float32, float64, bfloat16 or float16; any strides.
        k: 1 to M, the number of rows searched; within `x` every row is its own first neighbour, but for duplicates.
        y: [M, D] of the dtype and device of `x`.
        metric: "sqeuclidean" |x - y|^2, "cosine" 1 - <x, y> / (|x| |y|), or "inner_product" -<x, y>.

    Returns:
        (distances, indices), [N, k] ascending: the order of float64 distances of the values given, equal ones by index,
        whatever the number of threads. int64 indices; distances float64 for float64 `x`, else float32, differentiable
        in `x` and `y`. No N x M matrix is formed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, k is out of range, the metric is unknown, a row is not finite
            or, for cosines, zero. On CUDA the host waits for one number to know that; compiled, or captured in a CUDA
            graph, it does not, and all distances are NaN.
        TypeError: an argument is no tensor of these dtypes.

    Source: our choice of method, csrc/cpu/retrieval.cpp.
    """
    _check_rows("x", x)
    if y is not None:
        _check_rows("y", y)
        _check_alike(x, y, "y", "x")
    among = len(x if y is None else y)
    _check_range("k", k, among, "the number of rows to search")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    distances, indices = torch.ops.neuraldeps.neighbors(x, y, k, metric, True)
    _check_accepted(distances, metric, x=x, **({} if y is None else {"y": y}))
    return distances.to(torch.promote_types(x.dtype, torch.float32)), indices


@annotated
def k_reciprocal_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    top_k: int | None = None,
    power: int = 2,
    normalize: str = "max",
    list_length: str = "k1+1",
) -> Tensor | tuple[Tensor, Tensor]:
    """Re-ranked distances of every query with the gallery (module docstring).

    Args:
        query, gallery: [nq, D] and [ng, D], float32, float64, bfloat16 or float16, one dtype and device.
        k1: neighbours that may be reciprocal; lists end at N.
        k2: neighbours averaged in the local query expansion, 1 for none.
        lambda_value: weight of the original distance, 0 to 1.
        top_k: return only the smallest so many of each row, without an nq x ng matrix; None: all.
        power: 2, or 4 for distances squared once more (weights and t are of d^2), as some toolkits compute.
        normalize: "max" divides by each row's largest distance; "none": t = d.
        list_length: "k1+1" counts the row itself beside k1 others, as published; "k1" counts it as one of them.

    Returns:
        [nq, ng] float32, or with `top_k` (distances, indices), [nq, top_k] ascending, equal ones by index, float64 and
        int64, padded with infinity and -1 beyond ng. Both agree with the float64 definition to about 1e-6.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of range, a row is not finite.
        TypeError: an argument is no tensor of these dtypes.

    Source: Zhong et al., CVPR 2017.
    """
    options = _Options(k1, k2, lambda_value, power, normalize, list_length)
    _check_rows("query", query)
    _check_rows("gallery", gallery)
    _check_alike(gallery, query, "gallery", "query")
    if top_k is not None:
        _check_range("top_k", top_k, None, "")
    nq, ng = len(query), len(gallery)
    if nq == 0 or ng == 0:
        return _nothing(query, nq, ng, top_k)
    query, gallery = _at_least_float32(query.detach()), _at_least_float32(gallery.detach())
    k = min(max(k1 + 1, k2), nq + ng)
    query_k = 0 if top_k is None else min(max(_LONGER_LISTS * top_k, k), nq + ng)
    key, index, largest, query_key, query_index, dense = torch.ops.neuraldeps.neighbor_lists(
        query, gallery, k, query_k, top_k is None, True
    )
    _check_accepted(key, "sqeuclidean", query=query, gallery=gallery)
    encoding = options.encoding(index, key, largest, query, gallery)
    if top_k is None:
        return options.mixed(encoding, largest, dense)
    return options.best(encoding, query_index, query_key, largest, query, gallery, top_k)


@annotated
def k_reciprocal_rerank_from_neighbors(
    indices: Tensor,
    distances: Tensor,
    num_queries: int,
    *,
    row_max: Tensor | None = None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    top_k: int | None = None,
    power: int = 2,
    normalize: str = "max",
    list_length: str = "k1+1",
) -> Tensor | tuple[Tensor, Tensor]:
    """`k_reciprocal_rerank` from neighbour lists of any search engine.

    Args:
        indices: int64 [N, K], for each row (the queries first, then the gallery) its K nearest among all N rows, itself
            included, nearest first.
        distances: [N, K] squared Euclidean distances, ascending.
        num_queries: nq.
        row_max: [N] largest squared distance of each row; needed for `normalize="max"`. With other values (a bound, a
            constant) the weights are those of these values.
        k1, k2, lambda_value, top_k, power, normalize, list_length: as in `k_reciprocal_rerank`.

    Returns:
        As `k_reciprocal_rerank`. Neighbour sets, and with them the Jaccard distances up to weights, are exact if K is
        k1 + 1 and k2 or more. What no list holds is not known: such a distance counts as the last one listed for the
        row, in the weights of expanded sets and in t. Longer lists make less of it.

    Raises:
        ValueError: shapes do not fit, an index is out of range, distances of a row are not ascending or not finite,
            `row_max` is missing, an option is out of range.
        TypeError: an argument is no tensor of these dtypes.
    """
    options = _Options(k1, k2, lambda_value, power, normalize, list_length)
    key, largest = _checked_lists(indices, distances, row_max, normalize)
    N = len(indices)
    if not 0 <= num_queries <= N:
        raise ValueError(f"num_queries must be in 0..{N}, the number of rows, not {num_queries}")
    if top_k is not None:
        _check_range("top_k", top_k, None, "")
    if num_queries in (0, N):
        return _nothing(distances, num_queries, N - num_queries, top_k)
    encoding = options.encoding(indices, key, largest, None, None)
    own_key, own_index = key[:num_queries], indices[:num_queries]
    if top_k is not None:
        return options.best(encoding, own_index, own_key, largest, None, None, top_k)
    full = own_key[:, -1:].expand(-1, N).clone().scatter_(1, own_index, own_key)
    return options.mixed(encoding, largest, full[:, num_queries:].float().contiguous())


@annotated
def jaccard_distance(
    x: Tensor, *, k1: int = 20, k2: int = 6, power: int = 2, normalize: str = "max", list_length: str = "k1+1"
) -> Tensor:
    """Jaccard distances of all rows with all, for clustering into pseudo-labels.

    Args:
        x: [N, D], float32, float64, bfloat16 or float16.
        k1, k2, power, normalize, list_length: as in `k_reciprocal_rerank`.

    Returns:
        torch.sparse_csr_tensor [N, N] float32 of the distances below 1, those of a row with itself (0) among them. All
        others are 1. `sklearn.cluster.DBSCAN(metric="precomputed")` takes it as a SciPy matrix.

    Raises:
        ValueError, TypeError: as `k_reciprocal_rerank`.

    Source: Zhong et al., CVPR 2017; as sparse rows: our choice.
    """
    options = _Options(k1, k2, 0.0, power, normalize, list_length)
    _check_rows("x", x)
    N = len(x)
    if N == 0:
        return torch.zeros((0, 0), dtype=torch.float32, device=x.device).to_sparse_csr()
    x = _at_least_float32(x.detach())
    key, index, largest, *_ = torch.ops.neuraldeps.neighbor_lists(x[:0], x, min(max(k1 + 1, k2), N), 0, False, True)
    _check_accepted(key, "sqeuclidean", x=x)
    crow, col, value = torch.ops.neuraldeps.jaccard_distance(*options.encoding(index, key, largest, x[:0], x))
    return torch.sparse_csr_tensor(crow, col.long(), value, size=(N, N), check_invariants=False)


class _Options:
    """What is common to all forms of the re-ranking, checked."""

    def __init__(self, k1: int, k2: int, lambda_value: float, power: int, normalize: str, list_length: str) -> None:
        _check_range("k1", k1, None, "")
        _check_range("k2", k2, None, "")
        if not 0 <= lambda_value <= 1:
            raise ValueError(f"lambda_value must be in [0, 1], not {lambda_value}")
        for name, value, known in (
            ("power", power, _POWERS),
            ("normalize", normalize, _NORMALIZE),
            ("list_length", list_length, _LIST_LENGTHS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")
        self.forward = k1 + (list_length == "k1+1")
        self.half = round(k1 / 2) + 1  # round takes halves to the even number
        self.k2 = k2
        self.lambda_value = float(lambda_value)
        self.power = power
        self.normalize = normalize == "max"

    def encoding(
        self, index: Tensor, key: Tensor, largest: Tensor, query: Tensor | None, gallery: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.neuraldeps.reciprocal_encoding(  # type: ignore[no-any-return]
            index, key, largest, query, gallery, self.forward, self.half, self.k2, self.normalize, self.power
        )

    def mixed(self, encoding: tuple[Tensor, Tensor, Tensor], largest: Tensor, dense: Tensor) -> Tensor:
        torch.ops.neuraldeps.jaccard_rerank(*encoding, largest, dense, self.lambda_value, self.normalize, self.power)
        return dense

    def best(
        self,
        encoding: tuple[Tensor, Tensor, Tensor],
        index: Tensor,
        key: Tensor,
        largest: Tensor,
        query: Tensor | None,
        gallery: Tensor | None,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        distance, found, _ = torch.ops.neuraldeps.jaccard_rerank_top_k(
            *encoding, index, key, largest, query, gallery, top_k, self.lambda_value, self.normalize, self.power
        )
        return distance, found


# ------------------------------------------------------------------------------------------------ checks


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {x.dtype}")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be [N, D] with D of 1 or more, not {list(x.shape)}")


def _check_alike(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x_name} and {y_name} must have one number of columns, not {x.shape[1]} and {y.shape[1]}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must have one dtype and device, not {x.dtype} on {x.device} and {y.dtype} on "
            f"{y.device}"
        )


def _check_range(name: str, value: int, most: int | None, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1 or (most is not None and value > most):
        limit = "1 or more" if most is None else f"in 1..{most}, {what}"
        raise ValueError(f"{name} must be {limit}, not {value}")


def _check_accepted(key: Tensor, metric: str, **rows: Tensor) -> None:
    """Raises for rows that CUDA kernels refuse: all keys [N, k] are NaN then. Reads a value, where the host may."""
    if not key.is_cuda or key.numel() == 0 or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    if not bool(key[0, 0].isnan()):
        return
    wanted = "finite and without zero rows" if metric == "cosine" else "finite"
    for name, x in rows.items():
        refused = ~x.isfinite().all(1) | ((x == 0).all(1) & (metric == "cosine"))
        if bool(refused.any()):
            raise ValueError(f"{name} must be {wanted}, but its row {int(refused.int().argmax())} is not")


def _checked_lists(indices: Tensor, distances: Tensor, row_max: Tensor | None, normalize: str) -> tuple[Tensor, Tensor]:
    """Distances [N, K] and row maxima [N] in float64."""
    for name, value in (("indices", indices), ("distances", distances), ("row_max", row_max)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, not {indices.dtype}")
    if indices.dim() != 2 or indices.shape != distances.shape or indices.shape[1] < 1:
        raise ValueError(
            f"indices and distances must be [N, K] with K of 1 or more, not {list(indices.shape)} and "
            f"{list(distances.shape)}"
        )
    key = distances.detach().double()
    if indices.is_cuda and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(indices):
        raise ValueError(f"indices must be in 0..{len(indices) - 1}, but one is not")
    descending = (~(key.diff(dim=1) >= 0)).any(1) | ~key.isfinite().all(1)
    if bool(descending.any()):
        row = int(descending.nonzero()[0])
        raise ValueError(f"distances must be finite and ascending in every row, but row {row} is not")
    if row_max is None:
        if normalize == "max":
            raise ValueError("row_max must be given with normalize='max'")
        return key, key[:, -1].contiguous()
    if row_max.shape != indices.shape[:1] or not bool(row_max.isfinite().all()):
        raise ValueError(f"row_max must be [N] = [{len(indices)}] and finite, not {list(row_max.shape)}")
    return key, row_max.detach().double()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nothing(like: Tensor, nq: int, ng: int, top_k: int | None) -> Tensor | tuple[Tensor, Tensor]:
    if top_k is None:
        return like.new_empty((nq, ng), dtype=torch.float32)
    distances = like.new_full((nq, top_k), torch.inf, dtype=torch.float64)
    return distances, torch.full_like(distances, -1, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ operator rules


def _neighbors_like(x: Tensor, y: Tensor | None, k: int, metric: str, reduced: bool) -> tuple[Tensor, Tensor]:
    key = x.new_empty((x.shape[0], k), dtype=torch.float64)
    return key, torch.empty_like(key, dtype=torch.int64)


def _neighbors_and_largest_like(x: Tensor, y: Tensor, k: int, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    key, index = _neighbors_like(x, y, k, "sqeuclidean", reduced)
    return key, index, key.new_empty(x.shape[0])


def _save_neighbors(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, _, ctx.metric, _ = inputs
    ctx.save_for_backward(x, y, output[1])
    ctx.mark_non_differentiable(output[1])


def _neighbors_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    x, y, index = ctx.saved_tensors
    dx, dy = torch.ops.neuraldeps.neighbors_backward(grad, x, y, index, ctx.metric)
    return (dx + dy, None, None, None, None) if y is None else (dx, dy, None, None, None)


def _gradients(grad: Tensor, x: Tensor, y: Tensor | None, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients by x as the row that searches, and by y (x if None) as the rows found."""
    base = (x if y is None else y).double()
    dx, dy = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(base)
    rows = max(1, _GRADIENT_VALUES // max(1, index.shape[1] * x.shape[1]))
    for begin in range(0, len(x), rows):
        part = slice(begin, begin + rows)
        da, db = _pair_gradients(x[part].double()[:, None], base[index[part]], grad[part].double()[..., None], metric)
        dx[part] = da.sum(1)
        found, db = index[part].reshape(-1), db.reshape(-1, x.shape[1])
        if x.is_cuda:  # which sorts, and so adds in a fixed order
            dy.index_put_((found,), db, accumulate=True)
        else:
            dy.index_add_(0, found, db)
    return dx.to(x.dtype), dy.to(x.dtype)


def _pair_gradients(a: Tensor, b: Tensor, grad: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Of distances of a [rows, 1, D] and b [rows, k, D], in both, for each pair: [rows, k, D]; grad [rows, k, 1]."""
    if metric == "inner_product":
        return -grad * b, -grad * a
    if metric == "sqeuclidean":
        return 2 * grad * (a - b), 2 * grad * (b - a)
    a_length, b_length = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    a, b = a / a_length, b / b_length
    cosine = (a * b).sum(-1, keepdim=True)
    return grad * (cosine * a - b) / a_length, grad * (cosine * b - a) / b_length


def _gradients_like(grad: Tensor, x: Tensor, y: Tensor | None, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x if y is None else y).shape)


def _lists_like(
    query: Tensor, gallery: Tensor, k: int, query_k: int, dense: bool, reduced: bool, metric: str = "sqeuclidean"
) -> tuple[Tensor, ...]:
    nq, ng = query.shape[0], gallery.shape[0]
    key = query.new_empty((nq + ng, k), dtype=torch.float64)
    query_key = query.new_empty((nq, query_k), dtype=torch.float64)
    block = query.new_empty((nq if dense else 0, ng if dense else 0), dtype=torch.float32)
    return (
        key,
        torch.empty_like(key, dtype=torch.int64),
        key.new_empty(nq + ng),
        query_key,
        torch.empty_like(query_key, dtype=torch.int64),
        block,
    )


def _encoding_like(index: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _csr_like(index, len(index))


def _pairs_like(crow: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _csr_like(crow, len(crow) - 1)


def _csr_like(like: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    value = like.new_empty(entries, dtype=torch.float32)
    return like.new_empty(rows + 1, dtype=torch.int64), torch.empty_like(value, dtype=torch.int32), value


def _mixed_like(*_: Any) -> None:
    pass


def _best_like(
    crow: Tensor, col: Tensor, value: Tensor, index: Tensor, key: Tensor, largest: Tensor, query: Tensor | None,
    gallery: Tensor | None, top_k: int, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    best = key.new_empty((index.shape[0], top_k))
    return best, torch.empty_like(best, dtype=torch.int64), index.new_empty(1)


def _on_cuda(name: str, function: Any) -> Any:
    """What takes CUDA tensors: the operator `<name>_device` if there is one and its library loads, else `function`."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast("cuda", enabled=False):
            return (_device_operator(name) or function)(*args)

    return run


@functools.cache
def _device_operator(name: str) -> Any:
    found = getattr(torch.ops.neuraldeps, f"{name}_device", None)
    reason = torch.ops.neuraldeps.cuda_library_error() if found else "there is no CUDA kernel for it"
    if reason:
        _log.warning("%s on CUDA runs on the plain PyTorch reference: %s", name, reason)
    return None if reason else found


_library = torch.library.Library("neuraldeps", "FRAGMENT")
_library.define("neighbors_backward(Tensor grad, Tensor x, Tensor? y, Tensor index, str metric) -> (Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _library.impl("neighbors_backward", _gradients, _key)
for _name in ("neighbors", "neighbors_and_largest", "neighbor_lists"):
    _schema = str(getattr(torch.ops.neuraldeps, _name).default._schema)
    _library.define(_schema.removeprefix("neuraldeps::").replace(_name, f"{_name}_device", 1))
    _library.impl(f"{_name}_device", getattr(retrieval_cuda, _name), "CUDA")
for _name in (
    "neighbors",
    "neighbors_and_largest",
    "neighbor_lists",
    "reciprocal_encoding",
    "jaccard_rerank",
    "jaccard_rerank_top_k",
    "jaccard_distance",
):
    _library.impl(_name, _on_cuda(_name, getattr(reference, _name)), "CUDA")

torch.library.register_fake("neuraldeps::neighbors", _neighbors_like)
torch.library.register_fake("neuraldeps::neighbors_backward", _gradients_like)
torch.library.register_fake("neuraldeps::neighbors_and_largest", _neighbors_and_largest_like)
torch.library.register_fake("neuraldeps::neighbor_lists", _lists_like)
torch.library.register_fake("neuraldeps::reciprocal_encoding", _encoding_like)
torch.library.register_fake("neuraldeps::jaccard_rerank", _mixed_like)
torch.library.register_fake("neuraldeps::jaccard_rerank_top_k", _best_like)
torch.library.register_fake("neuraldeps::jaccard_distance", _pairs_like)
torch.library.register_autograd("neuraldeps::neighbors", _neighbors_backward, setup_context=_save_neighbors)
