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

Place = int | tuple[int, int]  # of an address, or of one so many bytes behind it
Step = tuple[Callable[..., None], tuple[Place, ...]]  # a prepared call, and where its addresses are
_BEHIND = ("stream", "shared workspace", "nothing")  # the arguments and outputs


def _unknown(*_: Any) -> None:
    """What a table without entries finds."""


class CallTable:
    """Calls of an operator, or of another function, by their arguments.

    Attributes:
        call: call(*arguments), with tensors, None, scalars, strings and tuples of these, in one
            order throughout: the results as a tuple, or None where it was not made before.
        known: known(*arguments): what was remembered of a call, (steps, outputs, num_results,
            note), or None.
        arguments: their names.
        order: the addresses that the prepared calls take, by their places in
            (*arguments, *outputs, stream, shared workspace, nothing).
    """

    __slots__ = ("_memory", "_remember", "arguments", "call", "known", "order")

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
        self.arguments = tuple(arguments)
        self.order = tuple(map((*arguments, *outputs, *_BEHIND).index, addresses))
        self._memory = memory
        self.call: Callable[..., Any] = _unknown
        self.known: Callable[..., Any] = _unknown
        self._remember: Callable[..., None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether it was found that no calls can be remembered."""
        return self._remember is _unknown

    def open(self) -> bool:
        """Gets ready to remember calls; returns whether they can be."""
        if self._remember is None:
            make = _library.load().call_table
            found = None if _exchange is None else make(_exchange, *self._memory())
            self.call, self._remember, self.known = found or (_unknown,) * 3
        return not self.is_closed

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
        self.remember_steps(arguments, ((run, self.order),), outputs, num_results)

    def remember_steps(
        self,
        arguments: tuple[Any, ...],
        steps: tuple[Step, ...],
        outputs: tuple[Any, ...],
        num_results: int,
        note: Any = None,
    ) -> None:
        """As `remember`, of a call in several steps.

        Args:
            arguments: the call's.
            steps: prepared calls, made one after the other.
            outputs: shape, strides and dtype of each output.
            num_results: how many of the outputs are results.
            note: for whoever looks the call up.
        """
        if self.open():
            assert self._remember is not None
            self._remember(arguments, steps, outputs, num_results, note)

    def adopt(
        self,
        arguments: tuple[Any, ...],
        table: CallTable,
        its_arguments: tuple[Any, ...],
        note: Any = None,
        num_results: int | None = None,
    ) -> None:
        """Remembers a call that another table knows by other arguments, where it does.

        Args:
            arguments: the call's, by this table.
            table: the other.
            its_arguments: the call's, by that one.
            note: for whoever looks the call up.
            num_results: how many results are wanted; the others must be empty. None is all.
        """
        known = table.known(*its_arguments)
        if known is None:
            return
        steps, outputs, given_results, _ = known
        wanted = given_results if num_results is None else num_results
        first, nothing = len(self.arguments), -1
        own = [*range(wanted), *[nothing] * (given_results - wanted)]
        own += range(wanted, wanted + len(outputs) - given_results + len(_BEHIND))
        behind = [own[-1] + first if place == nothing else place + first for place in own]
        places = [*places_of(table.arguments, self.arguments, behind[-1]), *behind]
        outputs = (*outputs[:wanted], *outputs[given_results:])
        self.remember_steps(arguments, moved(steps, places), outputs, wanted, note)


def places_of(names: Sequence[str], arguments: Sequence[str], nothing: int) -> list[int]:
    """The places of names among arguments; `nothing` of those that are not there."""
    place = {name: i for i, name in enumerate(arguments)}
    return [place.get(name, nothing) for name in names]


def moved(steps: Sequence[Step], places: Sequence[Place]) -> tuple[Step, ...]:
    """Steps whose addresses lie elsewhere: at places[i] in place of i."""

    def move(place: Place) -> Place:
        if isinstance(place, int):
            return places[place]
        index, offset = place
        new = places[index]
        return (new, offset) if isinstance(new, int) else (new[0], new[1] + offset)

    return tuple((run, tuple(map(move, order))) for run, order in steps)
