"""Suite varlen: packed batches, both passes, contestants in turn; whole sequences are checked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hopper_attention.bench import accuracy, gradients
from hopper_attention.bench.backward import Gradients
from hopper_attention.bench.contestants import UnavailableError
from hopper_attention.bench.records import make_record
from hopper_attention.bench.runner import (
    Outcome,
    Progress,
    explained,
    rounded,
)
from hopper_attention.bench.shapes import BACKWARD_FACTOR, Shape
from hopper_attention.bench.timing import Clock, CudaClock, round_robin, warm_up
from hopper_attention.bench.varlen import BACKWARD, PARTS, PackedBatch, PackedContestant, draw

VARLEN_NOTE = (
    "suite varlen: part says which pass. tflops counts the operations of the sequences, each by "
    "itself. rmse: as in the suites of dense batches, over the longest sequence and another random "
    "one. hopper_attention_dense: the dense kernels on the same sequences, of one length"
)


@dataclass(frozen=True)
class Expected:
    """What one sequence's output and gradients should be.

    Attributes:
        rows: The sequence's rows.
        output: As `accuracy.expect` has it.
        gradients: As `gradients.expect` has them.
    """

    rows: slice
    output: accuracy.Expected
    gradients: gradients.ExpectedGradients

    def check(self, part: str, found: Any) -> float:
        """The root mean square error of a pass's results; raises UnavailableError if wrong."""
        if part == BACKWARD:
            dq, dk, dv = (x[None, self.rows] for x in found)
            of_gradients = gradients.compare((dq, dk, dv), self.gradients)
            complaint = gradients.wrong(of_gradients, self.gradients)
            rmse = of_gradients.rmse
        else:
            of_output = accuracy.compare(found[None, self.rows], self.output)
            complaint = accuracy.wrong(of_output, self.output)
            rmse = of_output.rmse
        if complaint is not None:
            raise UnavailableError(complaint)
        return rmse


def expect(batch: PackedBatch, seed: int = 0) -> list[Expected]:
    """Computes what the longest sequence, and another one, should come to."""
    lengths = batch.shape.lengths
    longest = lengths.index(max(lengths))
    others = [i for i in range(len(lengths)) if i != longest]
    chosen = [longest, *random.Random(seed).sample(others, min(1, len(others)))]
    found = []
    for sequence in chosen:
        rows = batch.rows(sequence)
        one = batch.shape.sequence(lengths[sequence])
        q, k, v, dout = (x[None, rows] for x in (batch.q, batch.k, batch.v, batch.dout))
        output = accuracy.expect(one, q, k, v, seed)
        found.append(Expected(rows, output, gradients.expect(one, (q, k, v, dout), seed)))
    return found


def run_varlen(
    shapes: Sequence[Shape],
    contestants: Sequence[PackedContestant],
    outcome: Outcome,
    run: str,
    reps: int = 30,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Times both passes of packed batches.

    Args:
        shapes: The problems, of a packed layout.
        contestants: Who takes part.
        outcome: Where records and exclusions go, shape by shape.
        run: When this run began, for the records.
        reps: Timed calls of each contestant on each shape, at least.
        clock: What measures; by default the device's.
        device: Where the tensors live.
        progress: Is called with each shape's label before it is measured.
        after_shape: Is called after each shape.

    Raises:
        DeviceLostError: A contestant broke the CUDA context; what was measured before is in
            outcome.
    """
    clock = clock or CudaClock()
    for shape in shapes:
        progress(shape.label)
        _run_shape(shape, contestants, outcome, run, reps, clock, device)
        after_shape()


def _run_shape(
    shape: Shape,
    contestants: Sequence[PackedContestant],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
    device: str,
) -> None:
    taking_part = [one for one in contestants if one.takes(shape)]
    try:
        batch = draw(shape, device)
        expected = expect(batch)
    except torch.OutOfMemoryError as error:
        outcome.exclude_all([one.name for one in taking_part], shape.label, error)
        return
    for part in PARTS:
        _run_part(part, batch, expected, taking_part, outcome, run, reps, clock)


def _run_part(
    part: str,
    batch: PackedBatch,
    expected: Sequence[Expected],
    contestants: Sequence[PackedContestant],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
) -> None:
    shape = batch.shape
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for contestant in contestants:
        if part not in contestant.parts:
            continue
        label = f"{shape.label} {part}"
        try:
            runs[contestant.name], errors[contestant.name] = _check(
                contestant, part, batch, expected, clock
            )
        except UnavailableError as reason:
            outcome.excluded.append((contestant.name, label, str(reason)))
    operations = shape.flops() * (BACKWARD_FACTOR if part == BACKWARD else 1.0)
    for name, ms in round_robin(runs, reps, clock).items():
        measured: dict[str, Any] = {"part": part, "ms": rounded(ms)}
        measured |= {"tflops": rounded(operations / ms * 1e-9), "rmse": rounded(errors[name])}
        outcome.records.append(make_record("varlen", name, shape, run, **measured))


def _check(
    contestant: PackedContestant,
    part: str,
    batch: PackedBatch,
    expected: Sequence[Expected],
    clock: Clock,
) -> tuple[Callable[[], Tensor | Gradients], float]:
    """Warms a contestant up and checks its results; raises UnavailableError, DeviceLostError."""
    run: Callable[[], Tensor | Gradients]
    with explained(contestant.name, f"{batch.shape.label} {part}", clock):
        run = contestant.backward(batch) if part == BACKWARD else contestant.forward(batch)
        warm_up(run, clock)
        found = run()
        rmse = [one.check(part, found) for one in expected]
        clock.synchronize()
    return run, math.sqrt(sum(x * x for x in rmse) / len(rmse))
