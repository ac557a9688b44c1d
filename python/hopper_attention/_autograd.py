"""An operator's formula: `torch.library.register_autograd`, without what that costs a call.

That one reads the operator's schema anew in every call, 70 us where the kernels' launches take 20.
The kernel that it puts at the dispatcher's key "Autograd" is made here in the same way, so that
autograd, torch.compile and activation checkpointing find the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def register(
    name: str,
    differentiate: Callable[..., tuple[Any, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    library: torch.library.Library,
) -> None:
    """Makes torch.ops.hopper_attention.<name> differentiable.

    Args:
        name: the operator's, whose arguments are all positional.
        differentiate: differentiate(ctx, *gradients of the results), a gradient or None for each
            of the operator's arguments.
        save: save(ctx, arguments, results), which keeps in ctx what that reads; arguments are all
            of the operator's, those that were left out as their defaults.
        library: where to register.
    """
    operator = getattr(torch.ops.hopper_attention, name).default
    # of those that the dispatcher leaves out, as they are what the schema says
    defaults = tuple(x.default_value for x in operator._schema.arguments)

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *given, keyset = arguments
            results = below(keyset, given)
            save(ctx, (*given, *defaults[len(given) :]), results)
            ctx.num_given = len(given)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *differentiate(ctx, *gradients)[: ctx.num_given], None

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in arguments
        ):
            return Formula.apply(*arguments, keyset)
        return below(keyset, arguments)

    Formula.__name__ = f"{name}_formula"
    library.impl(name, autograd, "Autograd", with_keyset=True)
