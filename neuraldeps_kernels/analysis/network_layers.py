"""Named layers of a network, what they put out, and a forward pass that measurements of rank can rest on.

Numerical ranks are counts of small numbers: a forward pass rounded to bfloat16 or TF32 gives wrong ones. `measuring`
therefore refuses reduced precision where it can be seen and turns it off where it is a setting.

Source: section 4 of the notes on "Rank Diminishing in Deep Neural Networks" (arXiv 2206.06072) for the precision that
is needed; the choice of layers is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

OUTPUT = "output"  # name of the network itself as a layer, unless it has a child of that name

_FULL = (torch.float32, torch.float64)
_RESHAPES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layer:
    """A module whose output is measured."""

    name: str  # in `named_modules`, or OUTPUT
    kind: str  # its class
    shape: tuple[int, ...]  # of its output for one sample

    @property
    def width(self) -> int:
        """Number of features D of one sample."""
        return prod(self.shape)


class _ReachedLastError(Exception):
    """Ends a forward pass after the last layer that is asked for."""


@contextmanager
def measuring(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """The network in eval mode, in full float32 or float64, without gradients; all settings are restored at the end.

    TF32 and bfloat16 inside of float32 products and convolutions are turned off on every backend, and attention runs on
    its plain form, which has a forward derivative.

    Raises:
        ValueError: autocast is on.
        TypeError: a floating parameter or buffer is not float32 or float64, or the inputs are of another dtype.
    """
    for device in {"cpu", inputs.device.type}:
        if torch.is_autocast_enabled(device):
            raise ValueError(f"autocast must be off on {device}: ranks need the forward pass in full float32")
    _check_dtypes(model, inputs)
    training = [(module, module.training) for module in model.modules()]
    backends: Any = torch.backends
    products = (
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    )
    precision = [setting.fp32_precision for setting in products]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
        for module, mode in training:
            stack.callback(setattr, module, "training", mode)
        for setting, value in zip(products, precision, strict=True):
            stack.callback(setattr, setting, "fp32_precision", value)
            setting.fp32_precision = "ieee"
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def find_layers(model: nn.Module, example: Tensor, names: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """The layers called `names`, or the network's own chain of layers, in the order in which they are evaluated.

    The chain: children of the network, entries of a list or `Sequential` in place of the list, then the output. Modules
    that only reshape, run more than once or give something else than one floating tensor are left out.

    Args:
        model: in the context of `measuring`.
        example: [1, ...], one input.
        names: of `named_modules`, or "output".

    Raises:
        ValueError: an unknown or repeated name, or a layer that does not run exactly once in a forward pass.
        TypeError: a named layer does not give one floating tensor; a module computes in reduced precision.
    """
    modules = _modules(model)
    chosen = list(_chain(model)) if names is None else list(names)
    unknown = [name for name in chosen if name not in modules]
    if unknown:
        raise ValueError(f"layers has {unknown[0]!r}, which is no module of {type(model).__name__}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers must be distinct, got {chosen}")
    outputs: dict[str, list[Any]] = {name: [] for name in modules}
    order: list[str] = []

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"{name} gives {output.dtype}: ranks need the forward pass in full float32")
        outputs[name].append(output)
        order.append(name)

    with _hooked(modules, keep):
        model(example)
    found = []
    for name in sorted(chosen, key=lambda name: order.index(name) if name in order else len(order)):
        given = outputs[name]
        floating = len(given) == 1 and isinstance(given[0], Tensor) and given[0].is_floating_point()
        whole = floating and given[0].dim() > 0 and len(given[0]) == 1
        if whole:
            found.append(Layer(name, type(modules[name]).__name__, tuple(given[0].shape[1:])))
        elif names is not None and len(given) != 1:
            raise ValueError(f"layers has {name!r}, which runs {len(given)} times in a forward pass, not once")
        elif names is not None:
            raise TypeError(f"layers has {name!r}, whose output is not one floating tensor of the batch")
    last = found[-2:]
    if names is None and len(last) == 2 and outputs[last[0].name][0] is outputs[last[1].name][0]:
        del found[-1]  # the output of the network is that of its last child
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that gives one floating tensor; give layers")
    return tuple(found)


def visit_layers(
    model: nn.Module, inputs: Tensor, layers: Sequence[Layer], visit: Callable[[int, Tensor], None]
) -> None:
    """Runs the network until the last of `layers` and calls `visit(index, output)` at each, before anything changes it.

    A layer may be given any number of times.
    """
    modules = _modules(model)
    places: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        places.setdefault(layer.name, []).append(index)
    waiting = set(places)

    def pass_on(name: str, output: Any) -> None:
        for index in places[name]:
            visit(index, output)
        waiting.discard(name)
        if not waiting:
            raise _ReachedLastError

    with _hooked({name: modules[name] for name in places}, pass_on):
        try:
            model(inputs)
        except _ReachedLastError:
            return
    raise ValueError(f"layer {min(waiting)!r} did not run: the network must take the same path for every input")


def _check_dtypes(model: nn.Module, inputs: Tensor) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    floating = [(name, value) for name, value in named if value.is_floating_point()]
    for name, value in floating:
        if value.dtype not in _FULL:
            raise TypeError(f"model must be float32 or float64, but {name} is {value.dtype}; use model.float()")
    expected = floating[0][1].dtype if floating else inputs.dtype
    if inputs.dtype not in _FULL or inputs.dtype != expected:
        raise TypeError(f"inputs must be {expected if expected in _FULL else 'float32 or float64'}, not {inputs.dtype}")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    modules.setdefault(OUTPUT, model)
    return modules


def _chain(model: nn.Module) -> Iterator[str]:
    children = list(model.named_children())
    while len(children) == 1 and not isinstance(children[0][1], _LISTS) and list(children[0][1].children()):
        outer, wrapped = children[0]
        children = [(f"{outer}.{name}", child) for name, child in wrapped.named_children()]
    yield from _entries(children)
    if _modules(model)[OUTPUT] is model:
        yield OUTPUT


def _entries(children: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    for name, child in children:
        if isinstance(child, _LISTS):
            yield from _entries([(f"{name}.{key}", entry) for key, entry in child.named_children()])
        elif not isinstance(child, _RESHAPES):
            yield name


@contextmanager
def _hooked(modules: dict[str, nn.Module], visit: Callable[[str, Any], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in modules.items():
            # The hook must not return a value: that would replace the output.
            def hook(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                visit(name, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
