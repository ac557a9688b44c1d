"""An operator's formula: `torch.library.register_autograd`, without what that costs a call.

That one reads the operator's schema anew in every call, 70 us where the kernels' launches take 20.
The kernel that it puts at the dispatcher's key "Autograd" is made here in the same way, so that
autograd, torch.compile and activation checkpointing find the same thing.

That kernel is Python between two passes through the dispatcher, 8 us a call. Eager calls with
nothing but autograd in the first pass's way (`is_plain`) can begin with what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import checks

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
# What the dispatcher looks for in every eager call. Modes, functorch, tracers and dispatchers in
# Python add to it.
_PLAIN_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(
    torch._C.DispatchKey.ADInplaceOrView
)
# Where it is one of these: not the second in inference mode.
PLAIN_KEYS = (_PLAIN_KEYS, torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect))
_included_keys = torch._C._dispatch_tls_local_include_set
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded where autograd is
_has_function_mode = torch._C._is_torch_function_mode_enabled
_has_autocast = torch._C._is_any_autocast_enabled
_unwrap = torch._C._functorch.unwrap_if_dead


def is_plain(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor
) -> bool:
    """Whether only autograd stands between a call of an operator in this thread and its kernel.

    Not so where a mode, a transformation of functorch, a tracer, a subclass of tensors, or an
    autocast rule for the operator would see the call, or where autograd would not.

    Args:
        name: the operator's, "hopper_attention::forward" say.
        q: a tensor of the call's.
        k: another.
        v: another.
        more: the others.
    """
    return (
        type(q) in _PLAIN_TYPES
        and type(k) in _PLAIN_TYPES
        and type(v) in _PLAIN_TYPES
        and (not more or all(type(x) in _PLAIN_TYPES for x in more))
        and _included_keys() == _PLAIN_KEYS
        and not _has_function_mode()
        and not _is_excluded(_AUTOGRAD)
        and not (_has_autocast() and _has_autocast_rule(name, q))
    )


def shortest_way(
    name: str,
    operator: Callable[..., Any],
    without_gradient: Callable[..., Any],
    differentiable: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *more: torch.Tensor | None,
) -> Callable[..., Any]:
    """Of the ways to make a call, the shortest that all who should see it see.

    Args:
        name: the operator's, with its namespace.
        operator: the operator.
        without_gradient: for eager calls whose gradient nobody asks for.
        differentiable: what `register` returned, for plain ones whose gradient somebody does.
        q: a tensor of the call's.
        k: another.
        v: another.
        more: the others.

    Raises:
        NotImplementedError: as `checks.no_tangent`.
    """
    if torch.compiler.is_compiling():
        return operator
    if not checks.needs_grad(q, k, v, *more):
        return without_gradient
    given = [x for x in more if x is not None]
    return differentiable if is_plain(name, q, k, v, *given) else operator


def _has_autocast_rule(name: str, tensor: torch.Tensor) -> bool:
    key = f"Autocast{tensor.device.type.upper()}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def register(
    name: str,
    differentiate: Callable[..., tuple[Any, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    library: torch.library.Library,
    forward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes torch.ops.hopper_attention.<name> differentiable.

    Args:
        name: the operator's, whose arguments are all positional.
        differentiate: differentiate(ctx, *gradients of the results), a gradient or None for each
            of the operator's arguments.
        save: save(ctx, arguments, results), which keeps in ctx what that reads; arguments are all
            of the operator's, those that were left out as their defaults.
        library: where to register.
        forward: the operator, of all its arguments, without gradients; None is the operator itself.

    Returns:
        What autograd makes of a call, for calls that are plain and want a gradient: it takes all of
        the operator's arguments.
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
        checks.no_tangent(*arguments)
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in arguments
        ):
            return Formula.apply(*arguments, keyset)
        return below(keyset, arguments)

    _name_node(Formula, name)
    library.impl(name, autograd, "Autograd", with_keyset=True)
    return _plain_formula(name, differentiate, save, forward or operator)


def _name_node(formula: Any, name: str) -> None:
    """What grad_fn and profilers call a function's backward pass."""
    formula._backward_cls.__name__ = f"{name}_formulaBackward"


def _plain_formula(
    name: str, differentiate: Callable[..., Any], save: Callable[..., None], evaluate: Any
) -> Callable[..., Any]:
    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = evaluate(*arguments)
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    _name_node(Formula, name)
    # Function.apply is this, behind what functorch and wrappers that outlived it need.
    apply = super(torch.autograd.Function, Formula).apply

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        return apply(_unwrap(q), _unwrap(k), _unwrap(v), *rest)

    return attend
