"""Logits on disk: the shipped covariance of two ImageNet networks, and readers of a user's own files.

`imagenet_covariance.npz` beside this file holds what the demo and the benchmarks measure on: the joint covariance S
[2000, 2000] of the logits of efficientnet-lite0 (first 1000) and efficientnet-lite1 (last 1000), divided by the number
of crops, over random crops of photographs, cut-outs and drawings. Stored as float32: upper triangle (rows, diagonal
included), its bytes split into four planes, which compress better; so S is symmetric to the bit.
`imagenet_class_names.txt` has the names of the 1000 categories in the order of the logits.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROVENANCE = (
    "Covariance of the ImageNet-1k logits of efficientnet-lite0 and efficientnet-lite1 over random crops of "
    "photographs, cut-outs and drawings from distribution packages. No crop comes from a picture, or a near-duplicate "
    "of a picture, that neuraldeps_kernels.data.pictures finds in foolbox, gradio, imgaug, scikit-image or "
    "scikit-learn: those are held out."
)

_COVARIANCE = Path(__file__).with_name("imagenet_covariance.npz")
_CLASS_NAMES = Path(__file__).with_name("imagenet_class_names.txt")


@dataclass(frozen=True)
class ImagenetCovariance:
    """Statistics of the logits of efficientnet-lite0 and -lite1 on the same crops; n = 1000."""

    joint: Tensor  # [2n, 2n] float32, symmetric to the bit; lite0 first
    mean: Tensor  # [2n] float32
    class_names: tuple[str, ...]  # [n]
    crops: int  # number of logit vectors
    pictures: int  # number of pictures that the crops were cut from
    provenance: str

    @property
    def num_categories(self) -> int:
        """n."""
        return len(self.class_names)

    @property
    def lite0(self) -> Tensor:
        """Covariance [n, n] of efficientnet-lite0 alone, contiguous."""
        return self.joint[: self.num_categories, : self.num_categories].contiguous()

    @property
    def lite1(self) -> Tensor:
        """Covariance [n, n] of efficientnet-lite1 alone, contiguous."""
        return self.joint[self.num_categories :, self.num_categories :].contiguous()

    @property
    def lite0_mean(self) -> Tensor:
        """Mean logits [n] of efficientnet-lite0."""
        return self.mean[: self.num_categories]

    @property
    def lite1_mean(self) -> Tensor:
        """Mean logits [n] of efficientnet-lite1."""
        return self.mean[self.num_categories :]


def load_imagenet_covariance() -> ImagenetCovariance:
    """The shipped statistics; takes about 0.1 s."""
    return read_covariance(_COVARIANCE, imagenet_class_names())


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 category names of ImageNet-1k in the order of the logits (two names occur twice: crane, maillot)."""
    return tuple(_CLASS_NAMES.read_text(encoding="utf-8").splitlines())


def write_covariance(path: Path, joint: Tensor, mean: Tensor, *, crops: int, pictures: int, provenance: str) -> None:
    """Writes the file that `read_covariance` reads: joint [m, m] float32 symmetric, mean [m] float32."""
    matrix = joint.float().numpy()
    if matrix.shape != (len(mean), len(mean)) or not np.array_equal(matrix, matrix.T):
        raise ValueError(f"joint must be symmetric [m, m] with m = len(mean) = {len(mean)}, got shape {matrix.shape}")
    upper = np.ascontiguousarray(matrix[np.triu_indices(len(mean))], dtype="<f4")
    np.savez_compressed(
        path,
        upper_bytes=np.ascontiguousarray(upper.view(np.uint8).reshape(-1, 4).T),  # [4, m (m + 1) / 2]
        mean=mean.float().numpy(),
        crops=crops,
        pictures=pictures,
        provenance=provenance,
    )


def read_covariance(path: Path, class_names: tuple[str, ...]) -> ImagenetCovariance:
    """Reads a file of `write_covariance`; class_names [n] are those of each of its two networks, m = 2n."""
    with np.load(path, allow_pickle=False) as file:
        upper = np.ascontiguousarray(file["upper_bytes"].T).view("<f4").ravel()
        mean, crops, pictures = file["mean"], int(file["crops"]), int(file["pictures"])
        provenance = str(file["provenance"])
    matrix = np.zeros((len(mean), len(mean)), np.float32)
    matrix[np.triu_indices(len(mean))] = upper
    matrix += np.triu(matrix, 1).T
    return ImagenetCovariance(
        joint=torch.from_numpy(matrix),
        mean=torch.from_numpy(mean),
        class_names=class_names,
        crops=crops,
        pictures=pictures,
        provenance=provenance,
    )


def read_logits(path: str | Path, key: str | None = None) -> Tensor:
    """Logits [N, n] of a `.npy`, `.npz`, `.pt`/`.pth` or `.safetensors` file, in the file's floating dtype.

    A file of several arrays needs `key`. Nothing is unpickled. Raises ValueError that starts with the path where the
    file is missing, unreadable or truncated, or where the array is not 2-D, not floating, empty, of fewer than 2
    samples, or holds NaN or infinity.
    """
    logits = _choose(Path(path), read_arrays(path), key)
    if logits.ndim != 2:
        raise ValueError(f"{path}: expected logits [samples, categories], found shape {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{path}: expected floating-point logits, found {logits.dtype}")
    if len(logits) < 2 or logits.shape[1] == 0:
        raise ValueError(f"{path}: expected at least 2 samples and 1 category, found shape {list(logits.shape)}")
    finite = logits.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        number = int((~finite).sum())
        raise ValueError(f"{path}: {number} NaN or infinite logits, the first at sample {row}, category {column}")
    return logits


def read_lines(path: str | Path, length: int, what: str) -> list[str]:
    """The `length` lines of a UTF-8 text file, blanks at their ends removed; ValueError where the number is another.

    `what` names a line in the message, such as "class name".
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {_reason(error)}") from error
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) != length:
        raise ValueError(f"{path}: expected {length} lines, one {what} each, found {len(lines)}")
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty, expected one {what} a line")
    return lines


def read_arrays(path: str | Path) -> Mapping[str, Tensor]:
    """The arrays of numbers in a `.npy`, `.npz`, `.pt`/`.pth` or `.safetensors` file by name; nothing is unpickled.

    Raises ValueError that starts with the path where the file is missing, of another kind, unreadable or truncated.
    """
    path = Path(path)
    readers = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".safetensors": _read_safetensors,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; expected one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return reader(path)
    except Exception as error:  # each format's library has its own classes of errors for a broken file
        raise ValueError(f"{path}: cannot be read: {_reason(error)}") from error


def _choose(path: Path, arrays: Mapping[str, Tensor], key: str | None) -> Tensor:
    keys = ", ".join(arrays) or "none"
    if key is None:
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        raise ValueError(f"{path}: expected one array, found {len(arrays)} ({keys}); choose with key (--key)")
    if key not in arrays:
        raise ValueError(f"{path}: has no array {key!r}; found {keys}")
    return arrays[key]


def _read_npy(path: Path) -> dict[str, Tensor]:
    return {"array": _from_numpy(np.load(path, allow_pickle=False))}


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive, or truncated")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    text = [name for name, array in arrays.items() if array.dtype.kind in "US"]  # such as paths of pictures
    return {name: _from_numpy(array) for name, array in arrays.items() if name not in text}


def _read_torch(path: Path) -> dict[str, Tensor]:
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        return {"tensor": content.detach()}
    if isinstance(content, Mapping):
        return {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    raise ValueError(f"expected a tensor or a dict of tensors, found {type(content).__name__}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _from_numpy(array: Any) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise ValueError(f"expected an array of numbers, found {getattr(array, 'dtype', type(array).__name__)}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native))


def _reason(error: BaseException) -> str:
    """First line of the message of an error, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
