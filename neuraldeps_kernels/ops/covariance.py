"""Covariance of many rows: one-shot, batched, weighted, streaming and over processes, never as E[x^2] - E[x]^2.

    W = sum_r w_r,   mean = sum_r w_r x_r / W,   moment = sum_r w_r (x_r - mean) (x_r - mean)',
    S = moment / (W - correction)

Two operators compute these in float64 from rows of any floating dtype; everything else is small float64 arithmetic.

- `torch.ops.neuraldeps.centered_moments`: W, mean, moment (CPU: csrc/cpu/covariance.cpp; CUDA: triton/covariance.py).
- `torch.ops.neuraldeps.cross_moments`: the moments of target rows with predictor rows, and the diagonal of the moments
  of the targets. It is rectangular, without a symmetry to exploit, so it is torch's matrix product, block by block.

Source: our choice; the merge of two sets of moments is that of Chan, Golub and LeVeque.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from neuraldeps_kernels.profiling import annotated
from neuraldeps_kernels.reference import covariance as reference

_log = logging.getLogger("neuraldeps_kernels")

_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OUTPUT_DTYPES = (torch.float32, torch.float64)

_BLOCK_ROWS = 1024  # rows of a float32 product before it is added in float64

# Float32 rows with a large offset lie on a coarse grid; so do their products, which then round to one side in a float32
# sum. A factor off every grid makes that rounding random again.
_OFF_GRID = 0.7236068248748779  # a float32 number

Moments = tuple[Tensor, Tensor, Tensor]  # W [B], mean [B, n], moment [B, n, n], all float64


@annotated
def covariance(
    x: Tensor,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Covariance matrix of the columns of `x`, exactly symmetric.

    Args:
        x: [N, n] or [B, N, n], N rows of n variables; float32, float64, bfloat16 or float16. 16-bit and float32 rows
            are multiplied in float32 after a shift towards the mean and summed in float64, so a common offset costs no
            accuracy; float64 is float64 throughout.
        center: subtract the mean. Without it the result is the second moment `sum_r w_r x_r x_r' / (W - correction)`.
        correction: subtracted from the number of rows (from the sum of weights) in the divisor: 0 divides by N, 1 by
            N - 1.
        weights: [N] or [B, N], finite and not negative, of any real dtype: how often each row counts. A row of weight 0
            is not read, so it may hold NaN. With float32 and 16-bit `x` the square roots of the weights have to lie in
            the range of float32.
        dtype: of the result, float64 or float32.

    Returns:
        [n, n] or [B, n, n], differentiable in `x` and `weights`.

    Raises:
        ValueError: a shape does not fit; N is 0 or not above `correction`; a weight is negative or not finite; the sum
            of weights is not above `correction`; `x` holds NaN, infinity or values whose squares overflow. What depends
            on values is checked on the CPU only, as on CUDA it would make the host wait: there NaN in `x`, a negative
            weight and an empty sum give NaN. Under `torch.compile` and `torch.func` an empty sum gives NaN as well.
        TypeError: `x`, `weights` or `dtype` has the wrong type.
    """
    _check_rows("x", x)
    _check_dtype(dtype)
    _check_number_of_rows("x", x, correction, weights)
    weights64 = None if weights is None else _checked_weights(weights, "x", x)
    weight_sum, mean, moment = centered_moments(x if x.dim() == 3 else x[None], weights64)
    if weights64 is not None:
        _check_weight_sum(weight_sum, correction)
    result = _normalised(weight_sum, moment, mean, mean, center, correction).to(dtype)
    return result if x.dim() == 3 else result[0]


@dataclass(frozen=True, eq=False)
class CrossCovariance:
    """What predicting n target variables from m predictors needs; the covariance among the targets is not part of it.

    Attributes:
        cov: [m, m] covariance of the predictors.
        cross: [n, m] covariance of every target with every predictor.
        variance: [n] variance of the targets.
        predictor_mean: [m].
        target_mean: [n].
        exclude_same: predictor i may not explain target i; needs n == m.

    All tensors have one dtype and one device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `exclude_same` where n != m.
    """

    cov: Tensor
    cross: Tensor
    variance: Tensor
    predictor_mean: Tensor
    target_mean: Tensor
    exclude_same: bool = False

    def __post_init__(self) -> None:
        if self.cross.dim() != 2:
            raise ValueError(f"cross must be [n, m], not {list(self.cross.shape)}")
        n, m = self.cross.shape
        shapes = {"cov": (m, m), "variance": (n,), "predictor_mean": (m,), "target_mean": (n,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} beside cross [{n}, {m}], not {list(value.shape)}")
            if (value.dtype, value.device) != (self.cross.dtype, self.cross.device):
                raise ValueError(
                    f"{name} is {value.dtype} on {value.device}, but cross {self.cross.dtype} on {self.cross.device}"
                )
        _check_exclude_same(self.exclude_same, n, m)


@annotated
def cross_covariance(
    target_logits: Tensor,
    predictor_logits: Tensor,
    *,
    center: bool = True,
    correction: float = 0,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    exclude_same: bool | None = None,
) -> CrossCovariance:
    """Covariance of target variables with predictors, and of the predictors among themselves.

    Args:
        target_logits: [N, n], as `x` of `covariance`.
        predictor_logits: [N, m], the same rows (pictures) seen by the other model; dtype and device of `target_logits`.
        center, correction, weights, dtype: as in `covariance`; weights [N].
        exclude_same: whether predictor i may not explain target i; default True where n == m, as for two models of
            the same categories.

    Returns:
        CrossCovariance, its tensors differentiable in `target_logits`, `predictor_logits` and `weights`. Accuracy is
        that of `covariance`: a common offset costs none.

    Raises:
        ValueError, TypeError: as `covariance`; also where the two streams differ in N, dtype or device.
    """
    _check_streams(target_logits, predictor_logits)
    _check_dtype(dtype)
    _check_number_of_rows("target_logits", target_logits, correction, weights)
    n, m = target_logits.shape[1], predictor_logits.shape[1]
    exclude = n == m if exclude_same is None else exclude_same
    _check_exclude_same(exclude, n, m)
    weight_sum, means, moments = _moments_of_streams(target_logits, predictor_logits, weights)
    if weights is not None:
        _check_weight_sum(weight_sum, correction)
    return _cross_covariance_of(weight_sum, means, moments, center, correction, dtype, exclude)


class _Accumulator:
    """Sum of weights, means and centred moments of rows that arrive in chunks, float64.

    A chunk is centred on its own means and merged, so order and size of the chunks matter for rounding only.
    """

    _BLOCKS: ClassVar[dict[str, tuple[str, str]]]  # moment -> means of its rows and of its columns

    def __init__(
        self,
        sizes: dict[str, int],
        means: dict[str, int],
        moments: dict[str, tuple[int, ...]],
        center: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Variables by argument name, length of each mean, shape of each moment (one dimension: a diagonal)."""
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        _check_dtype(dtype)
        self.center, self.dtype, self._sizes = center, dtype, sizes
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._means = {name: torch.zeros(n, dtype=torch.float64, device=device) for name, n in means.items()}
        self._moments = {name: torch.zeros(n, dtype=torch.float64, device=device) for name, n in moments.items()}

    @property
    def device(self) -> torch.device:
        return self._count.device

    @property
    def count(self) -> Tensor:
        """Rows seen (sum of their weights): [] float64."""
        return self._count.clone()

    def _check_chunk(self, name: str, x: Tensor, n: int) -> None:
        _check_rows(name, x)
        if x.dim() != 2 or x.shape[1] != n:
            raise ValueError(f"{name} must be [N, {n}], not {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}, but the accumulator is on {self.device}")

    @torch.no_grad()
    def _merge(self, other: _Accumulator) -> None:
        self._check_compatible("other", other)
        there = [{name: x.to(self.device) for name, x in part.items()} for part in (other._means, other._moments)]
        self._add(other._count.to(self.device), *there)

    def _add(self, count: Tensor, means: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """M += M' + d d' c c' / (c + c') with d = mean' - mean."""
        total = self._count + count
        share = torch.where(total > 0, count / total, 0.0)
        root = (self._count * share).sqrt()
        shift = {name: means[name] - mean for name, mean in self._means.items()}
        for name, moment in self._moments.items():
            moment += moments[name]
            self._add_product(name, moment, shift, root)
        for name, mean in self._means.items():
            mean += shift[name] * share
        self._count = total

    def _add_product(self, name: str, moment: Tensor, shift: dict[str, Tensor], root: Tensor) -> None:
        """moment += root^2 d e' for the shifts d, e of its two means; symmetric to the last bit where d is e."""
        d, e = (shift[mean] * root for mean in self._BLOCKS[name])
        if moment.dim() == 1:
            moment.addcmul_(d, e)
        else:
            moment.addr_(d, e)

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the rows of all processes of `group` (default: all); afterwards every process holds the same state.

        First [count, count * mean] is summed, which gives the common means, and then the moments about those.
        Every process has to call this, also one without rows, on an accumulator of the same sizes.

        Raises:
            RuntimeError: `torch.distributed` is not initialised, or another process died or did not call this within
                the timeout of the group (NCCL: its watchdog ends the processes instead).
            ValueError: another process has other sizes or another `center` (checked on the CPU only).
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group first")
        try:
            self._all_reduce(group)
        except RuntimeError as error:
            raise RuntimeError(
                "all_reduce: the exchange with the other processes failed; one of them has died or did not call "
                f"all_reduce within the timeout of the group ({error})"
            ) from error

    def _all_reduce(self, group: dist.ProcessGroup | None) -> None:
        if self.device.type == "cpu":
            self._check_same_everywhere(group)
        sums = torch.cat([self._count[None], *(self._count * mean for mean in self._means.values())])
        dist.all_reduce(sums, group=group)
        count = sums[0]
        common = torch.where(count > 0, sums[1:] / count, 0.0).split([len(mean) for mean in self._means.values()])
        means = dict(zip(self._means, common, strict=True))
        shift = {name: mean - means[name] for name, mean in self._means.items()}
        moments = {name: moment.clone() for name, moment in self._moments.items()}  # a failure leaves the state alone
        for name, moment in moments.items():
            self._add_product(name, moment, shift, self._count.sqrt())
            dist.all_reduce(moment, group=group)
            if moment.dim() == 2 and len(set(self._BLOCKS[name])) == 1:  # the order of the sum differs by entry
                moments[name] = (moment + moment.T) / 2
        self._count, self._means, self._moments = count.clone(), means, moments

    def _check_same_everywhere(self, group: dist.ProcessGroup | None) -> None:
        sizes = list(self._sizes.values())
        own = torch.tensor([len(sizes), sizes[0], sizes[-1], self.center])
        table = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather(list(table.unbind()), own, group=group)
        if different := (table != own).any(1).nonzero()[:, 0].tolist():
            raise ValueError(
                f"all_reduce needs accumulators of one kind, n and center on all processes; on {different} they differ "
                f"from {self._description()} here"
            )

    def _description(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in {**self._sizes, "center": self.center}.items())

    def state_dict(self) -> dict[str, Any]:
        """`count` [], the means and the moments by name, float64, and the flag `center`."""
        tensors = {"count": self._count, **self._means, **self._moments}
        return {**{name: tensor.clone() for name, tensor in tensors.items()}, "center": self.center}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the state by that of `state_dict`.

        Raises:
            ValueError: a key is missing or unknown, a shape does not fit, or `center` differs.
        """
        own = {"count": self._count, **self._means, **self._moments}
        if set(state) != {*own, "center"}:
            raise ValueError(f"state must have the keys {[*own, 'center']}, not {sorted(state)}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"state[{name!r}] must be {list(tensor.shape)}, not {list(state[name].shape)}")
        if state["center"] != self.center:
            raise ValueError(f"state has center={state['center']}, but the accumulator center={self.center}")
        loaded = {name: state[name].to(device=self.device, dtype=torch.float64, copy=True) for name in own}
        self._count = loaded["count"]
        self._means = {name: loaded[name] for name in self._means}
        self._moments = {name: loaded[name] for name in self._moments}

    def _check_compatible(self, name: str, other: _Accumulator) -> None:
        if type(other) is not type(self):
            raise TypeError(f"{name} must be a {type(self).__name__}, not {type(other).__name__}")
        theirs, ours = other._description(), self._description()
        if theirs != ours:
            raise ValueError(f"{name} has {theirs}, but the accumulator {ours}")


class CovarianceAccumulator(_Accumulator):
    """Covariance of rows that arrive in chunks, on one device or spread over processes.

    State: sum of weights, mean and centred moment, float64 on `device`. Every chunk is centred on its own mean and
    merged in float64, so order and size of the chunks matter for rounding only. A merge touches n^2 values, which
    chunks of some thousand rows hide.

    Args:
        n: columns of every chunk.
        center: as in `covariance`.
        dtype: of what `compute` and `mean` return, float64 or float32.
        device: of the state and of every chunk; default the current default device.

    Raises:
        ValueError: n is not positive.
        TypeError: `dtype` is neither float64 nor float32.
    """

    _BLOCKS: ClassVar[dict[str, tuple[str, str]]] = {"moment": ("mean", "mean")}

    def __init__(
        self,
        n: int,
        *,
        center: bool = True,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__({"n": n}, {"mean": n}, {"moment": (n, n)}, center, dtype, device)
        self.n = n

    @property
    def mean(self) -> Tensor:
        """Mean of the rows: [n] in `dtype`; zero before the first row."""
        return self._means["mean"].to(self.dtype, copy=True)

    @torch.no_grad()
    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows `x` [N, n] with `weights` [N]; N may be 0. Nothing is kept of a chunk that raises.

        Raises:
            ValueError, TypeError: as `covariance`; also if `x` has not n columns or lies on another device.
        """
        self._check_chunk("x", x, self.n)
        weights64 = None if weights is None else _checked_weights(weights, "x", x)
        count, mean, moment = centered_moments(x[None], weights64)
        self._add(count[0], {"mean": mean[0]}, {"moment": moment[0]})

    def merge(self, other: CovarianceAccumulator) -> None:
        """Adds all rows of `other`, which stays as it is and may live on another device.

        Raises:
            ValueError: `other` has another n or center.
            TypeError: `other` is no CovarianceAccumulator.
        """
        self._merge(other)

    def compute(self, correction: float = 0) -> Tensor:
        """The covariance of all rows so far: [n, n] in `dtype`.

        Raises:
            ValueError: the sum of weights is not above `correction` (checked on the CPU only; NaN on CUDA).
        """
        _check_weight_sum(self._count, correction, what="the count of rows")
        mean, moment = self._means["mean"], self._moments["moment"]
        return _normalised(self._count, moment, mean, mean, self.center, correction).to(self.dtype)


class CrossCovarianceAccumulator(_Accumulator):
    """`cross_covariance` of two streams of rows that arrive in chunks, on one device or spread over processes.

    State: sum of weights, both means, the centred moments of the predictors [m, m], of targets with predictors [n, m]
    and the diagonal of those of the targets [n], float64 on `device`.

    Args:
        n: columns of every chunk of target logits.
        m: columns of every chunk of predictor logits.
        center: as in `covariance`.
        dtype: of what `compute` returns, float64 or float32.
        device: of the state and of every chunk; default the current default device.

    Raises:
        ValueError: n or m is not positive.
        TypeError: `dtype` is neither float64 nor float32.
    """

    _BLOCKS: ClassVar[dict[str, tuple[str, str]]] = {
        "predictor_moment": ("predictor_mean", "predictor_mean"),
        "cross_moment": ("target_mean", "predictor_mean"),
        "target_moment": ("target_mean", "target_mean"),
    }

    def __init__(
        self,
        n: int,
        m: int,
        *,
        center: bool = True,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        moments: dict[str, tuple[int, ...]] = {
            "predictor_moment": (m, m),
            "cross_moment": (n, m),
            "target_moment": (n,),
        }
        super().__init__({"n": n, "m": m}, {"predictor_mean": m, "target_mean": n}, moments, center, dtype, device)
        self.n, self.m = n, m

    @torch.no_grad()
    def update(self, target_logits: Tensor, predictor_logits: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows `target_logits` [N, n] beside `predictor_logits` [N, m] with `weights` [N]; N may be 0.

        Nothing is kept of a chunk that raises.

        Raises:
            ValueError, TypeError: as `cross_covariance`; also if a stream has another number of columns or lies on
                another device than the accumulator.
        """
        self._check_chunk("target_logits", target_logits, self.n)
        self._check_chunk("predictor_logits", predictor_logits, self.m)
        _check_streams(target_logits, predictor_logits)
        self._add(*_moments_of_streams(target_logits, predictor_logits, weights))

    def merge(self, other: CrossCovarianceAccumulator) -> None:
        """Adds all rows of `other`, which stays as it is and may live on another device.

        Raises:
            ValueError: `other` has another n, m or center.
            TypeError: `other` is no CrossCovarianceAccumulator.
        """
        self._merge(other)

    def compute(self, correction: float = 0, exclude_same: bool | None = None) -> CrossCovariance:
        """The covariances of all rows so far, in `dtype`; `exclude_same` as in `cross_covariance`.

        Raises:
            ValueError: the sum of weights is not above `correction` (checked on the CPU only; NaN on CUDA), or
                `exclude_same` where n != m.
        """
        exclude = self.n == self.m if exclude_same is None else exclude_same
        _check_exclude_same(exclude, self.n, self.m)
        _check_weight_sum(self._count, correction, what="the count of rows")
        return _cross_covariance_of(
            self._count, self._means, self._moments, self.center, correction, self.dtype, exclude
        )


def centered_moments(x: Tensor, weights: Tensor | None = None) -> Moments:
    """`torch.ops.neuraldeps.centered_moments` with a gradient that `torch.func` transforms understand.

    Args:
        x: [B, N, n] float32, float64, bfloat16 or float16.
        weights: [B, N] float64, finite and not negative; None: ones.

    Returns:
        W [B], mean [B, n], moment [B, n, n], float64; all zero where W is zero.

    Raises:
        ValueError: on the CPU, a weight is negative or not finite, or a column has no finite variance.
    """
    return _CenteredMoments.apply(x, weights)  # type: ignore[no-any-return, no-untyped-call]


def cross_moments(
    targets: Tensor, predictors: Tensor, predictor_mean: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.neuraldeps.cross_moments` with a gradient that `torch.func` transforms understand.

    Args:
        targets: [B, N, n] float32, float64, bfloat16 or float16.
        predictors: [B, N, m] of the same dtype.
        predictor_mean: [B, m] float64, that of `centered_moments`; the values do not depend on it beyond rounding, the
            gradient needs it to be this mean.
        weights: [B, N] float64, finite and not negative; None: ones.

    Returns:
        target_mean [B, n], target_moment `sum_r w_r (x_r - mean)^2` [B, n] and cross_moment [B, n, m], float64; all
        zero where the weights are.

    Raises:
        ValueError: on the CPU, a column of `targets` has no finite variance.
    """
    return _CrossMoments.apply(targets, predictors, predictor_mean, weights)  # type: ignore[no-any-return, no-untyped-call]


def _moments_of_streams(
    target_logits: Tensor, predictor_logits: Tensor, weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Sum of weights, means and moments as CrossCovarianceAccumulator names them."""
    weights64 = None if weights is None else _checked_weights(weights, "target_logits", target_logits)
    try:
        weight_sum, predictor_mean, predictor_moment = centered_moments(predictor_logits[None], weights64)
    except ValueError as error:
        raise ValueError(str(error).replace("x has", "predictor_logits has", 1)) from None
    target_mean, target_moment, cross_moment = cross_moments(
        target_logits[None], predictor_logits[None], predictor_mean, weights64
    )
    means = {"predictor_mean": predictor_mean[0], "target_mean": target_mean[0]}
    moments = {
        "predictor_moment": predictor_moment[0],
        "cross_moment": cross_moment[0],
        "target_moment": target_moment[0],
    }
    return weight_sum[0], means, moments


def _cross_covariance_of(
    weight_sum: Tensor,
    means: dict[str, Tensor],
    moments: dict[str, Tensor],
    center: bool,
    correction: float,
    dtype: torch.dtype,
    exclude_same: bool,
) -> CrossCovariance:
    cov, cross, variance = (
        _normalised(weight_sum, moments[name], means[rows], means[columns], center, correction).to(dtype)
        for name, (rows, columns) in CrossCovarianceAccumulator._BLOCKS.items()
    )
    predictor_mean, target_mean = (means[name].to(dtype, copy=True) for name in ("predictor_mean", "target_mean"))
    return CrossCovariance(cov, cross, variance, predictor_mean, target_mean, exclude_same)


def _normalised(
    weight_sum: Tensor, moment: Tensor, row_mean: Tensor, column_mean: Tensor, center: bool, correction: float
) -> Tensor:
    """moment / (W - correction) [..., n, m] of weight_sum [...], or [..., n] of a diagonal; float64."""
    diagonal = moment.dim() == row_mean.dim()

    def expanded(scalar: Tensor) -> Tensor:
        return scalar[..., None] if diagonal else scalar[..., None, None]

    if not center:
        product = row_mean * column_mean if diagonal else row_mean[..., :, None] * column_mean[..., None, :]
        moment = moment + expanded(weight_sum) * product
    divisor = weight_sum - correction
    return moment / expanded(torch.where(divisor > 0, divisor, torch.nan))


# ------------------------------------------------------------------------------------------------ argument checks


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {x.dtype}; convert it first")
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [N, n] or [B, N, n] with n >= 1, not {list(x.shape)}")


def _check_number_of_rows(name: str, x: Tensor, correction: float, weights: Tensor | None) -> None:
    if x.shape[-2] == 0:
        raise ValueError(f"{name} must have at least one row, not shape {list(x.shape)}")
    if weights is None and x.shape[-2] <= correction:
        raise ValueError(f"correction must be below the {x.shape[-2]} rows of {name}, not {correction}")


def _check_streams(target_logits: Tensor, predictor_logits: Tensor) -> None:
    for name, x in (("target_logits", target_logits), ("predictor_logits", predictor_logits)):
        _check_rows(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} must be [N, columns], not {list(x.shape)}")
    if predictor_logits.shape[0] != target_logits.shape[0]:
        raise ValueError(
            f"predictor_logits has {predictor_logits.shape[0]} rows, but target_logits {target_logits.shape[0]}; "
            "row r of both must be the same sample"
        )
    for what in ("device", "dtype"):
        ours, theirs = getattr(predictor_logits, what), getattr(target_logits, what)
        if ours != theirs:
            raise ValueError(f"predictor_logits has {what} {ours}, but target_logits {theirs}; they must agree")


def _check_exclude_same(exclude_same: bool, n: int, m: int) -> None:
    if exclude_same and n != m:
        raise ValueError(f"exclude_same needs as many predictors as targets, not {m} predictors and {n} targets")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"dtype must be torch.float64 or torch.float32, not {dtype}")


def _checked_weights(weights: Tensor, name: str, x: Tensor) -> Tensor:
    """weights of the rows of `x`, called `name`, as float64 [B, N]."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor, not {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"weights must be real, not {weights.dtype}")
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"weights must be {list(x.shape[:-1])}, one for each row of {name}, not {list(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"weights is on {weights.device}, but {name} is on {x.device}")
    weights = weights.to(torch.float64)
    return weights if x.dim() == 3 else weights[None]


def _check_weight_sum(weight_sum: Tensor, correction: float, what: str = "the sum of weights") -> None:
    if not _has_values(weight_sum):
        return
    smallest = float(weight_sum.detach().min()) if weight_sum.numel() else float("inf")
    if smallest <= correction:
        raise ValueError(f"{what} is {smallest:g}; it must be above correction = {correction}")


def _has_values(x: Tensor) -> bool:
    """Values may be read without making a device wait, breaking a graph or leaving a transform."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not isinstance(x, torch._subclasses.FakeTensor)
    )


# ------------------------------------------------------------------------------------------------ operator rules


def _fake_moments(x: Tensor, weights: Tensor | None) -> Moments:
    B, _N, n = x.shape
    return (
        x.new_empty((B,), dtype=torch.float64),
        x.new_empty((B, n), dtype=torch.float64),
        x.new_empty((B, n, n), dtype=torch.float64),
    )


def _centered_moments_on_cuda(x: Tensor, weights: Tensor | None) -> Moments:
    try:
        from neuraldeps_kernels.triton import covariance as kernels
    except ImportError as error:
        _log.debug("covariance runs on the plain PyTorch reference: %s", error)
        return reference.centered_moments(x, weights)
    return kernels.centered_moments(x, weights)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Moments) -> None:
    weight_sum, mean, _ = output
    ctx.save_for_backward(*inputs, weight_sum, mean)


def _gradient(
    ctx: Any, grad_sum: Tensor | None, grad_mean: Tensor | None, grad_moment: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """With y_r = x_r - mean, which sums to zero under the weights, and G, g, s the gradients of moment, mean and W:

    dL/dx_r = w_r ((G + G') y_r + g / W)        dL/dw_r = y_r' G y_r + g' y_r / W + s

    in float64 for float64 x, else in float32.
    """
    x, weights, weight_sum, mean = ctx.saved_tensors
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = _deviations(x, mean, weights)
        pull = torch.zeros_like(y)  # [B, N, n]: dL/dx_r / w_r
        spread = pull
        if grad_moment is not None:
            spread = y @ (grad_moment + grad_moment.mT).to(dtype)
            pull = spread
        if grad_mean is not None:
            over_sum = torch.where(weight_sum > 0, 1 / weight_sum, 0.0)[:, None]
            pull = pull + (over_sum * grad_mean).to(dtype)[:, None]
        grad_x = pull if weights is None else pull * weights[..., None].to(dtype)
        if weights is None or not ctx.needs_input_grad[1]:
            return grad_x.to(x.dtype), None
        # y' G y is half of y' (G + G') y
        grad_weights = ((pull - 0.5 * spread) * y).sum(-1).double()
        if grad_sum is not None:
            grad_weights = grad_weights + grad_sum[:, None]
        return grad_x.to(x.dtype), grad_weights


def _deviations(x: Tensor, mean: Tensor, weights: Tensor | None) -> Tensor:
    """x - mean [B, N, n], float64 for float64 x, else float32; rows that may not be read count as rows at the mean."""
    y = (x - mean[:, None]).to(torch.promote_types(x.dtype, torch.float32))
    if weights is None:
        return y
    unread = (weights == 0) & ~y.isfinite().all(-1)
    return torch.where(unread[..., None], 0.0, y)


def _fold_batch(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, Any]:
    """vmap rule: the new dimension joins the batch."""

    def folded(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batched.flatten(0, 1)

    outputs = op(*map(folded, args, in_dims))
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0, 0)


@contextmanager
def _full_float32_products(device_type: str) -> Iterator[None]:
    """Float32 matrix products without TF32 or bfloat16 passes, whatever the caller allowed."""
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    settings = backend.matmul
    allowed = settings.fp32_precision
    if allowed in ("none", "ieee"):
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = allowed


def _readable(x: Tensor, weights: Tensor | None) -> Tensor:
    """x [B, N, n] with zeros in the rows of weight 0, which may hold anything."""
    return x if weights is None else torch.where((weights != 0)[..., None], x, 0.0)


def _first_readable(x: Tensor, weights: Tensor | None) -> Tensor:
    """The first row of x [B, N, n] whose weight is not 0: [B, n]."""
    if weights is None:
        return x[:, 0]
    first = (weights != 0).int().argmax(1)
    return x.gather(1, first[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def _cross_moments(
    targets: Tensor, predictors: Tensor, predictor_mean: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_moments` on any device. With pivots p, q (the means in the dtype of the products) and d, e = mean - pivot,

    cross = sum_r w_r (x_r - p) (y_r - q)' - W d e'        diagonal = sum_r w_r (x_r - p)^2 - W d^2

    where x_r are the targets and y_r the predictors.
    """
    (B, N, n), m = targets.shape, predictors.shape[2]
    sums: dict[str, Any] = {"dtype": torch.float64, "device": targets.device}
    dtype = torch.float64 if targets.dtype == torch.float64 else torch.float32
    factor = 1.0 if dtype == torch.float64 else _OFF_GRID
    blocks = [slice(r, r + _BLOCK_ROWS) for r in range(0, N, _BLOCK_ROWS)]
    weight_sum = torch.full((B,), float(N), **sums) if weights is None else weights.sum(1)

    total = torch.zeros(B, n, **sums)
    origin = _first_readable(targets, weights).double() if N else total
    for rows in blocks:
        w = None if weights is None else weights[:, rows]
        x = _readable(targets[:, rows] - origin[:, None], w)  # zeros in a constant column
        total += x.sum(1) if w is None else (x * w[..., None]).sum(1)
    mean = torch.where((weight_sum > 0)[:, None], origin + total / weight_sum[:, None], 0.0)

    p, q = mean.to(dtype), predictor_mean.to(dtype)
    diagonal, cross = torch.zeros(B, n, **sums), torch.zeros(B, n, m, **sums)
    with torch.autocast(targets.device.type, enabled=False), _full_float32_products(targets.device.type):
        for rows in blocks:
            w = None if weights is None else weights[:, rows]
            x = _readable(targets[:, rows].to(dtype) - p[:, None], w)
            y = _readable(predictors[:, rows].to(dtype) - q[:, None], w)
            x *= factor
            if w is not None:
                root = w.sqrt().to(dtype)[..., None]
                x *= root
                y *= root
            diagonal += x.square().sum(1)
            cross += x.mT @ y
    diagonal /= factor * factor
    cross /= factor
    d, e = mean - p, predictor_mean - q
    diagonal -= weight_sum[:, None] * d * d
    diagonal.clamp_(min=0.0)
    cross -= (weight_sum[:, None] * d)[..., None] * e[:, None]
    if targets.device.type == "cpu" and not bool(diagonal.isfinite().all()):
        column = int(diagonal.isfinite().all(0).int().argmin())
        raise ValueError(
            f"target_logits has no finite covariance in column {column}: it holds NaN or infinity, or deviations whose "
            "squares overflow (float32: beyond about 1e19)"
        )
    return mean, diagonal, cross


def _fake_cross_moments(
    targets: Tensor, predictors: Tensor, predictor_mean: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, _N, n), m = targets.shape, predictors.shape[2]
    shapes = ((B, n), (B, n), (B, n, m))
    return tuple(targets.new_empty(shape, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def _setup_cross_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _cross_gradient(
    ctx: Any, grad_mean: Tensor | None, grad_diagonal: Tensor | None, grad_cross: Tensor | None
) -> tuple[Tensor | None, ...]:
    """With the deviations x_r of targets and y_r of predictors, which sum to zero under the weights, and G, h, g the
    gradients of cross, diagonal and target mean:

    dL/dx_r = w_r (G y_r + 2 h x_r + g / W)    dL/dy_r = w_r G' x_r    dL/dw_r = x_r' G y_r + h' x_r^2 + g' x_r / W

    in float64 for float64 rows, else in float32.
    """
    targets, predictors, predictor_mean, weights, mean = ctx.saved_tensors
    with torch.autocast(targets.device.type, enabled=False):
        x, y = _deviations(targets, mean, weights), _deviations(predictors, predictor_mean, weights)
        pull_x, pull_y = torch.zeros_like(x), torch.zeros_like(y)  # dL/dx_r / w_r, dL/dy_r / w_r
        if grad_cross is not None:
            G = grad_cross.to(x.dtype)
            pull_x, pull_y = pull_x + y @ G.mT, pull_y + x @ G
        if grad_mean is not None:
            weight_sum = mean.new_full((len(mean),), float(targets.shape[1])) if weights is None else weights.sum(1)
            over_sum = torch.where(weight_sum > 0, 1 / weight_sum, 0.0)[:, None]
            pull_x = pull_x + (over_sum * grad_mean).to(x.dtype)[:, None]
        spread = torch.zeros_like(x) if grad_diagonal is None else grad_diagonal.to(x.dtype)[:, None] * x
        grad_weights = None
        if weights is not None:
            grad_weights = ((pull_x + spread) * x).sum(-1).double()
        pull_x = pull_x + 2 * spread
        if weights is not None:
            w = weights[..., None].to(x.dtype)
            pull_x, pull_y = pull_x * w, pull_y * w
        return pull_x.to(targets.dtype), pull_y.to(predictors.dtype), None, grad_weights


class _CenteredMoments(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weights: Tensor | None) -> Moments:
        return torch.ops.neuraldeps.centered_moments(x, weights)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _fold_batch(_CenteredMoments.apply, info, in_dims, *args)


class _CrossMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        targets: Tensor, predictors: Tensor, predictor_mean: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.neuraldeps.cross_moments(targets, predictors, predictor_mean, weights)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_cross_context)
    backward = staticmethod(_cross_gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _fold_batch(_CrossMoments.apply, info, in_dims, *args)


def _register(name: str, fake: Any, gradient: Any, setup_context: Any) -> None:
    op = getattr(torch.ops.neuraldeps, name).default

    def vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _fold_batch(op, info, in_dims, *args)

    torch.library.register_fake(f"neuraldeps::{name}", fake)
    torch.library.register_autograd(f"neuraldeps::{name}", gradient, setup_context=setup_context)
    torch.library.register_vmap(f"neuraldeps::{name}", vmap_rule)


_library = torch.library.Library("neuraldeps", "FRAGMENT")  # the registrations live as long as this object
_library.define(
    "cross_moments(Tensor targets, Tensor predictors, Tensor predictor_mean, Tensor? weights) "
    "-> (Tensor target_mean, Tensor target_moment, Tensor cross_moment)"
)
_library.impl("cross_moments", _cross_moments, "CompositeExplicitAutograd")
_library.impl("centered_moments", _centered_moments_on_cuda, "CUDA")
_register("centered_moments", _fake_moments, _gradient, _setup_context)
_register("cross_moments", _fake_cross_moments, _cross_gradient, _setup_cross_context)
