"""Eager calls that were made before, made again with nothing between the caller and the library.

Checking a call's arguments, the dispatcher and autograd's Python take three times as long as the
rest of a call but its launches. Where nobody but autograd could see the call, the compiled module
(eager_calls.h) finds it by the arguments of the public function itself, asks PyTorch whether that
is so, and makes it; likewise the backward pass. Everybody else's calls go the long way: those under
modes in Python, transformations of functorch, tracers, profilers, torch.compile, forward-mode
differentiation or an autocast rule for the operator, and those of subclasses of tensors.

What is not asked is whether somebody has put another kernel in the place of the operator's own for
CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import _autograd, _library, checks
from ._calls import CallTable

# (ctx, its saved tensors or None where nobody took them, dout, dlse) -> dq, dk, dv and None
Differentiate = Callable[[Any, Any, Any, Any], tuple[torch.Tensor | None, ...]]

_NUM_DIFFERENTIABLE = 3  # q, k and v, first of the arguments
_profiler_enabled = torch._C._autograd._profiler_enabled
_alone = (partial(torch._C._dispatch_tls_is_dispatch_key_excluded, _autograd._AUTOGRAD),)


def _conditions(name: str) -> tuple[Any, ...]:
    """What eager_calls.h calls so, of an operator with its namespace."""
    return (
        tuple(_autograd._PLAIN_TYPES),
        _autograd._included_keys,
        _autograd.PLAIN_KEYS,
        (_autograd._has_function_mode, _profiler_enabled, checks.may_have_tangents),
        _autograd._has_autocast,
        partial(_autograd._has_autocast_rule, name),
        torch.is_grad_enabled,
    )


def _not_yet(*_: Any) -> bool:
    """What calls are answered before there is a table: whoever can, remembers."""
    return False


def _never(*_: Any) -> None:
    """What calls are answered where there can be no table."""


class Formula:
    """How q, k and v get gradients: an autograd.Function whose passes are compiled code."""

    def __init__(
        self,
        name: str,
        backward_name: str,
        calls: Callable[[], CallTable],
        differentiate: Differentiate,
    ) -> None:
        """A formula.

        Args:
            name: of the forward operator, which grad_fn's name shows.
            backward_name: of the backward operator, with its namespace.
            calls: gives the table of the backward operator's calls.
            differentiate: what to do where the compiled code cannot.
        """
        self._names = name, backward_name
        self._calls = calls
        self._differentiate = differentiate

    def open(self) -> Callable[..., Any] | None:
        """The function's `apply`; None where there can be no tables."""
        library, calls, differentiate = _library.load(), self._calls(), self._differentiate
        if not calls.open():
            return None

        class Function(torch.autograd.Function):
            forward = staticmethod(library.eager_forward)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                # compiled autograd calls it
                return differentiate(ctx, None, *gradients)

        name, backward_name = self._names
        _autograd._name_node(Function, name)
        of_ctx: Any = Function._backward_cls
        of_ctx.apply = library.eager_backward(
            calls.call,
            _conditions(backward_name),
            torch._C._get_deterministic_algorithms,
            differentiate,
            _NUM_DIFFERENTIABLE + 1,
        )
        # Function.apply is this, behind what functorch needs; the exchange interface reads none of
        # functorch's wrappers.
        apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply
        return apply


class EagerCalls:
    """Eager calls of a public function, by its own arguments.

    Attributes:
        call: call(*arguments): the results; None where the call must go the long way; False where
            it need not, were it remembered.
        table: the calls.
    """

    __slots__ = ("_formula", "_name", "_saved", "call", "table")

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        memory: Callable[[], tuple[Callable[..., Any], ...]],
        formula: Formula | None = None,
        saved: Sequence[str] = (),
    ) -> None:
        """No calls.

        Args:
            name: the operator's behind the function.
            arguments: names of what `call` takes, of which q, k and v are the first where there is
                a formula.
            memory: as `CallTable`'s.
            formula: how to make gradients; None leaves calls that want some alone.
            saved: names of what the backward operator takes behind q, k, v and the results.
        """
        self.table = CallTable(arguments, (), (), memory)
        self.call: Callable[..., Any] = _not_yet
        self._name = name
        self._formula = formula
        self._saved = tuple(map(self.table.arguments.index, saved))

    def open(self) -> bool:
        """Whether calls can be remembered."""
        if self.call is _not_yet:
            self.call = self._make_call() if self.table.open() else _never
        return self.call is not _never

    def _make_call(self) -> Callable[..., Any]:
        formula = None
        if self._formula is not None and (apply := self._formula.open()) is not None:
            formula = (apply, tuple(range(_NUM_DIFFERENTIABLE)), self._saved, _alone)
        call: Callable[..., Any] = _library.load().eager_calls(
            self.table.call, _conditions(f"hopper_attention::{self._name}"), formula
        )
        return call

    def adopt(
        self,
        arguments: tuple[Any, ...],
        table: CallTable,
        its_arguments: tuple[Any, ...],
        scalars: tuple[Any, ...] | None = None,
        num_results: int | None = None,
    ) -> None:
        """Has `call` make a call that the operator's table knows, where it does.

        Args:
            arguments: the call's.
            table: the operator's calls.
            its_arguments: the call's, by that one.
            scalars: the backward operator's; None where the call has no gradient.
            num_results: how many results are wanted; the others must be empty. None is all.
        """
        if table.is_closed:
            self.call = _never
        elif table.known(*its_arguments) is not None and self.open():
            self.table.adopt(arguments, table, its_arguments, scalars, num_results)
