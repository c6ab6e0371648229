"""NVTX ranges: one domain, `neuraldeps`, and one range per call of a public function.

The C++ launches below the operators add theirs in the same domain (csrc/include/neuraldeps/nvtx.hpp). Whether a
profiler listens is asked once, at import: if none does, a decorated function stays exactly the function it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import nvtx
import torch

P = ParamSpec("P")
R = TypeVar("R")

_domain = nvtx.get_domain("neuraldeps")


def annotated(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with an NVTX range of its name around each call; `function` itself where no profiler listens.

    Inside torch.compile the range is left out, as it would break the graph.
    """
    attributes = _domain.get_event_attributes(message=function.__name__)
    if attributes is None:
        return function

    @functools.wraps(function)
    def with_range(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        _domain.push_range(attributes)
        try:
            return function(*args, **kwargs)
        finally:
            _domain.pop_range()

    return with_range
