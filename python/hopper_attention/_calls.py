"""Calls that were made before, made again by the compiled library in one step.

An operator's Python derives from the tensors what the library is to be told: a fifth of a short
call's time, and most of it again and again the same. `CallTable` leaves that to the compiled module
(call_table.h), which finds a call by what its tensors look like and allocates its results. It reads
tensors through PyTorch's C exchange interface, which came with PyTorch 2.10; before that, and for
calls that need copies, every call goes through Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _library

_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def _unknown(*_: Any) -> None:
    """What a table without entries finds."""


class CallTable:
    """An operator's calls by their arguments.

    Attributes:
        call: call(*arguments), with tensors, None and scalars, in one order throughout: the results
            as a tuple, or None where it was not made before.
        order: the addresses that the prepared calls take, by their places in
            (*arguments, *outputs, stream, shared workspace, nothing).
    """

    __slots__ = ("_memory", "_remember", "call", "order")

    def __init__(
        self,
        arguments: Sequence[str],
        outputs: Sequence[str],
        addresses: Sequence[str],
        memory: Callable[[], tuple[Callable[..., Any], ...]],
    ) -> None:
        """An empty table.

        Args:
            arguments: names of what `call` takes.
            outputs: names of what is allocated: the results, and maybe a workspace behind them.
            addresses: what the prepared calls take, of these names, "stream", "shared workspace"
                and "nothing".
            memory: gives the functions that call_table.h calls empty, current_device and workspace.
        """
        places = (*arguments, *outputs, "stream", "shared workspace", "nothing")
        self.order = tuple(map(places.index, addresses))
        self._memory = memory
        self.call: Callable[..., Any] = _unknown
        self._remember: Callable[..., None] | None = None

    def remember(
        self,
        arguments: tuple[Any, ...],
        run: Callable[..., None],
        outputs: tuple[Any, ...],
        num_results: int,
    ) -> None:
        """Has `call` make a call that passed the checks and needs no copies.

        Args:
            arguments: the call's.
            run: the prepared call.
            outputs: shape, strides and dtype of each output.
            num_results: how many of the outputs are results.
        """
        if self._remember is None:
            make = _library.load().call_table
            found = None if _exchange is None else make(_exchange, *self._memory())
            self.call, self._remember = found or (_unknown, _unknown)
        self._remember(arguments, run, outputs, num_results, self.order)
