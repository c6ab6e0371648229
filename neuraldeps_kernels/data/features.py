"""Features of a set of pictures on disk, with their identities and cameras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neuraldeps_kernels.data.logits import read_arrays, read_lines

_IDS, _CAMERAS = ("ids", "pids", "labels"), ("cameras", "camids", "cams")
_TEXT = (".txt", ".csv", "")


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of features and what is known of them."""

    features: Tensor  # [N, D] floating
    ids: Tensor | None  # int64 [N]
    cameras: Tensor | None  # int64 [N]

    def __len__(self) -> int:
        return len(self.features)


def read_features(
    path: str | Path,
    *,
    key: str | None = None,
    ids: str | Path | None = None,
    cameras: str | Path | None = None,
) -> Features:
    """Features of a `.npy`, `.npz`, `.pt`/`.pth` or `.safetensors` file.

    Args:
        path: holds an array `features` [N, D], or the one named `key`, or a single floating array of two dimensions;
            and, if known, integers `ids` (`pids`, `labels`) and `cameras` (`camids`, `cams`) [N].
        ids, cameras: files that hold these instead: a single array, or a text file with a number on every line.

    Raises:
        ValueError: a file is missing, unreadable or without such arrays, shapes do not fit, or a value is no finite
            number; the message starts with the path.
    """
    path = Path(path)
    arrays = read_arrays(path)
    features = _chosen(path, arrays, key)
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(
            f"{path}: expected features [N, D] of one row and column or more, found {list(features.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"{path}: expected floating-point features, found {features.dtype}")
    if not bool((finite := features.isfinite().all(1)).all()):
        raise ValueError(f"{path}: features must be finite, but row {int((~finite).nonzero()[0])} is not")
    return Features(
        features,
        _numbers(path, arrays, _IDS, ids, len(features), "identity"),
        _numbers(path, arrays, _CAMERAS, cameras, len(features), "camera"),
    )


def _chosen(path: Path, arrays: Mapping[str, Tensor], key: str | None) -> Tensor:
    found = ", ".join(arrays) or "none"
    if key is not None:
        if key not in arrays:
            raise ValueError(f"{path}: has no array {key!r}; found {found}")
        return arrays[key]
    if "features" in arrays:
        return arrays["features"]
    tables = [x for x in arrays.values() if x.is_floating_point() and x.dim() == 2]
    if len(arrays) == 1 or len(tables) == 1:
        return tables[0] if tables else next(iter(arrays.values()))
    raise ValueError(f"{path}: expected an array 'features', found {found}; choose with key (--key)")


def _numbers(
    path: Path, arrays: Mapping[str, Tensor], names: tuple[str, ...], other: str | Path | None, length: int, what: str
) -> Tensor | None:
    """int64 [length], or None where there are none."""
    if other is not None:
        path = Path(other)
        if path.suffix.lower() in _TEXT:
            return _parsed(path, read_lines(path, length, what), what)
        arrays = read_arrays(path)
        values = next(iter(arrays.values())) if len(arrays) == 1 else None
        if values is None:
            raise ValueError(f"{path}: expected one array, found {len(arrays)} ({', '.join(arrays) or 'none'})")
    else:
        values = next((arrays[name] for name in names if name in arrays), None)
        if values is None:
            return None
    if values.shape != (length,) or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{path}: expected {length} whole numbers, one {what} a row, found {list(values.shape)} of {values.dtype}"
        )
    return values.long()


def _parsed(path: Path, lines: list[str], what: str) -> Tensor:
    try:
        return torch.tensor([int(line) for line in lines])
    except ValueError as error:
        raise ValueError(f"{path}: expected a whole number on every line, one {what} each: {error}") from error
