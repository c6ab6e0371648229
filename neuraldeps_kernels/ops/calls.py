"""How an operator with a gradient is registered and called by the shortest way.

torch's rule of an operator's gradient costs a small call as much as everything else, and torch.func does not see it: an
autograd.Function does for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers the rules of `torch.ops.neuraldeps.<name>`, from tensors and constants to a tensor.

    Returns:
        A function that calls it: compiled as the operator, else past its rules; in torch.func grad and vjp of any
        depth, not vmap.
    """
    op = getattr(torch.ops.neuraldeps, name).default
    torch.library.register_fake(f"neuraldeps::{name}", fake)
    torch.library.register_autograd(f"neuraldeps::{name}", backward, setup_context=setup_context)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        setup_context(ctx, args, output)
        return output

    eager_rules = {"forward": forward, "backward": backward}
    rules = {"forward": op, "setup_context": setup_context, "backward": backward}
    eager: Any
    in_transform: Any
    eager, in_transform = (
        type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in found.items()})
        for found in (eager_rules, rules)
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if any(isinstance(arg, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(arg) for arg in args):
            return in_transform.apply(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return eager.apply(*args)
        return below_autograd(*args)

    return call
