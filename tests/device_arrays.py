"""A stand-in for CuPy on host memory: what neuraldeps_kernels.cupy needs, for the emulated CUDA library.

`DeviceArray` is a NumPy array that shows its memory through `__cuda_array_interface__` version 3, as CuPy does, and
like CuPy refuses to meet a plain NumPy array in one operation. `modules(stream)` are the modules `cupy` and
`cupyx.scipy` of such arrays, for `sys.modules`.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse

LEGACY_STREAM = 1  # how version 3 writes the default stream, whose pointer is 0


class DeviceArray(np.ndarray):
    """Device memory by its interface. `stream` is what it says of pending work, None for nothing pending."""

    stream: int | None = LEGACY_STREAM
    changes: dict[str, Any] = {}  # noqa: RUF012  replaced, never filled; entries of the interface to be told otherwise

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.ctypes.data if self.size else 0, not self.flags.writeable),
            "strides": None if self.flags.c_contiguous else self.strides,
            "version": 3,
            "stream": self.stream,
            **self.changes,
        }

    def get(self) -> np.ndarray:
        """A copy for the host."""
        return np.array(self, copy=True, subok=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        _refuse_host_arrays(inputs)
        plain = [x.view(np.ndarray) if isinstance(x, DeviceArray) else x for x in inputs]
        return on_device(getattr(ufunc, method)(*plain, **options))


def on_device(x: Any) -> Any:
    """A NumPy array as a device array of the same memory; anything else as it is."""
    return x.view(DeviceArray) if isinstance(x, np.ndarray) else x


def upload(x: Any, dtype: Any = None) -> DeviceArray:
    """A copy in memory aligned as CUDA aligns it."""
    x = np.asarray(x, dtype)
    memory = np.empty(x.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy.view(DeviceArray)


def modules(stream: int = 0) -> dict[str, ModuleType]:
    """Entries of sys.modules; `stream` is the pointer of the current stream."""
    cupy, cupyx, cupyx_scipy = ModuleType("cupy"), ModuleType("cupyx"), ModuleType("cupyx.scipy")
    cupy.ndarray = DeviceArray
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=stream))
    cupy.asarray = lambda x, dtype=None: x if isinstance(x, DeviceArray) and dtype is None else upload(x, dtype)
    cupy.empty = lambda shape, dtype=float: upload(np.full(shape, 77, dtype))
    cupy.zeros = lambda shape, dtype=float: upload(np.zeros(shape, dtype))
    cupy.__getattr__ = _from_numpy
    cupyx_scipy.sparse = scipy.sparse
    return {"cupy": cupy, "cupyx": cupyx, "cupyx.scipy": cupyx_scipy}


def _from_numpy(name: str) -> Any:
    function = getattr(np, name)

    def on_device_memory(*arguments: Any, **options: Any) -> Any:
        _refuse_host_arrays(arguments)
        return on_device(function(*arguments, **options))

    return on_device_memory


def _refuse_host_arrays(values: Any) -> None:
    if any(type(x) is np.ndarray and x.ndim for x in values):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
