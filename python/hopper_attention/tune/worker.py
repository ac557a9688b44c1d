"""Timing one candidate in a process of its own: a kernel that hangs or faults takes nothing along.

The process loads the candidate's library first. The package's compiled module then finds a library
of the name it needs already there, and the whole package runs on the candidate.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

import hopper_attention
from hopper_attention.bench import accuracy
from hopper_attention.bench.contestants import Bound
from hopper_attention.bench.runner import expect_fp8, make_inputs
from hopper_attention.bench.shapes import Shape
from hopper_attention.bench.timing import Clock, CudaClock, warm_up
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.tune.rules import TuneError

Run = Callable[[], torch.Tensor]

_CLEAN_UP_SECONDS = 20.0  # what CUDA may take to end a process that has answered


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        library: The candidate's library.
        instance: The kernel's name.
        label: The candidate's config, which it gives as its reason.
        shapes: The problems.
        reps: Timed calls of each.
        check: Whether outputs are checked against float64 first.
        recipe: How the problems of a kernel of e4m3 are quantized, before the time is taken; None
            for 16 bits.
    """

    library: Path
    instance: str
    label: str
    shapes: tuple[Shape, ...]
    reps: int
    check: bool
    recipe: Fp8Recipe | None = None


def load_and_measure(job: Job) -> dict[str, float]:
    """Loads the job's library, then as `measure`; once a process, before any other call."""
    ctypes.CDLL(str(job.library))
    with torch.inference_mode():
        return measure(job, CudaClock(), "cuda")


def measure(job: Job, clock: Clock, device: str) -> dict[str, float]:
    """Times a candidate.

    Args:
        job: What is to be done.
        clock: What measures.
        device: Where the tensors live.

    Returns:
        The median milliseconds of a call by the shape's label.

    Raises:
        TuneError: Calls run another kernel, or an output is wrong.
    """
    found = {}
    for shape in job.shapes:
        inputs = make_inputs(shape, device)
        bound, plan = _prepare(shape, inputs, job.recipe)
        if (plan.instance, plan.reason) != (job.instance, job.label):
            raise TuneError(
                f"{shape.label} runs {plan.instance} ({plan.reason}), not {job.instance} "
                f"({job.label}): the candidate's library was not loaded, or does not serve this"
            )
        warm_up(bound.run, clock)
        if job.check:
            out = bound.to_bshd(bound.run())
            if bound.stands_for is None:
                expected = accuracy.expect(shape, *inputs)
            else:
                expected = expect_fp8(shape, bound, out)
            complaint = accuracy.wrong(accuracy.compare(out, expected), expected)
            if complaint is not None:
                raise TuneError(f"{shape.label}: {complaint}")
        found[shape.label] = statistics.median(clock.batch(bound.run, job.reps))
    return found


def _prepare(
    shape: Shape,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    recipe: Fp8Recipe | None,
) -> tuple[Bound, hopper_attention.Explanation]:
    """The call to time, and which kernel it runs."""
    options: dict[str, Any] = {"causal": shape.causal, "window_size": shape.window}
    if recipe is None:
        attend = partial(hopper_attention.flash_attn_func, *inputs, **options)
        return Bound(cast(Run, attend), _same), hopper_attention.explain(*inputs, **options)
    quantized = hopper_attention.quantize(*inputs, recipe)
    attend = partial(hopper_attention.flash_attn_fp8_func, quantized, **options)
    bound = Bound(cast(Run, attend), _same, quantized.dequantize)
    return bound, hopper_attention.explain(quantized, **options)


def _same(out: torch.Tensor) -> torch.Tensor:
    return out


class Processes:
    """Runs functions, each call in a fresh process that has imported this module already."""

    def __init__(self, timeout: float = 180.0) -> None:
        """Prepares; starts nothing.

        Args:
            timeout: Seconds after which a process counts as hung.
        """
        self._timeout = timeout
        # Its server imports torch once, and never touches CUDA: what CUDA needs to survive a fork.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Calls function(argument) in a process.

        Args:
            function: A function of a module.
            argument: What can be pickled, as the result must be.

        Raises:
            TuneError: The function raised, or its process died or hung.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_enter, args=(sender, function, argument))
        process.start()
        sender.close()
        try:
            if not receiver.poll(self._timeout):
                raise TuneError(f"its process did not end within {self._timeout:.0f} s")
            fine, answer = receiver.recv()
            process.join(_CLEAN_UP_SECONDS)
        except EOFError:
            process.join(_CLEAN_UP_SECONDS)
            raise TuneError(f"its process died (exit code {process.exitcode})") from None
        finally:
            receiver.close()
            if process.is_alive():
                process.kill()
            process.join()
        if not fine:
            raise TuneError(answer)
        return answer


def _enter(sender: Connection, function: Callable[[Any], Any], argument: Any) -> None:
    try:
        answer = (True, function(argument))
    except TuneError as error:
        answer = (False, str(error))
    except Exception as error:
        answer = (False, f"{type(error).__name__}: {error}".splitlines()[0])
    sender.send(answer)
    sender.close()
