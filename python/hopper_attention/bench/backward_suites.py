"""The backward suites: contestants in turn on each shape, and errors of whole gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hopper_attention.bench import gradients
from hopper_attention.bench.backward import (
    FA3_DETERMINISTIC,
    OURS_DETERMINISTIC,
    BackwardContestant,
    BoundBackward,
    Gradients,
)
from hopper_attention.bench.contestants import UnavailableError
from hopper_attention.bench.records import make_record
from hopper_attention.bench.rmse import STANDARD, draw
from hopper_attention.bench.runner import (
    Outcome,
    Progress,
    explained,
    make_inputs,
    rounded,
)
from hopper_attention.bench.shapes import BACKWARD_FACTOR, Shape
from hopper_attention.bench.timing import Clock, CudaClock, round_robin, warm_up
from hopper_attention.study.distributions import DISTRIBUTIONS

# Theirs are the sums of the others in another order: suite backward-rmse leaves them out.
_DETERMINISTIC = (OURS_DETERMINISTIC, FA3_DETERMINISTIC)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and dout


def draw_dout(shape: Shape, device: str, seed: int = 1) -> Tensor:
    """Draws the output's gradient from N(0, 1): (batch, seqlen_q, heads, head_dim_v)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (shape.batch, shape.seqlen_q, shape.heads, shape.head_dim_v)
    dtype = getattr(torch, shape.dtype)
    return torch.randn(size, device=device, dtype=dtype, generator=generator)


def run_backward(
    suite: str,
    shapes: Sequence[Shape],
    contestants: Sequence[BackwardContestant],
    outcome: Outcome,
    run: str,
    reps: int = 30,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Times the backward pass alone.

    Args:
        suite: The suite's name.
        shapes: The problems.
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
        _run_shape(suite, shape, contestants, outcome, run, reps, clock, device)
        after_shape()


def _run_shape(
    suite: str,
    shape: Shape,
    contestants: Sequence[BackwardContestant],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
    device: str,
) -> None:
    try:
        inputs: Inputs = (*make_inputs(shape, device), draw_dout(shape, device))
        expected = gradients.expect(shape, inputs)
    except torch.OutOfMemoryError as error:
        outcome.exclude_all([one.name for one in contestants], shape.label, error)
        return
    runs: dict[str, Callable[[], Gradients]] = {}
    errors: dict[str, float] = {}
    for contestant in contestants:
        try:
            bound, rmse = _check(contestant, shape, inputs, expected, clock)
        except UnavailableError as unavailable:
            outcome.excluded.append((contestant.name, shape.label, str(unavailable)))
        else:
            runs[contestant.name], errors[contestant.name] = bound.run, rmse
    for name, ms in round_robin(runs, reps, clock).items():
        measured = {
            "ms": rounded(ms),
            "tflops": rounded(BACKWARD_FACTOR * shape.flops() / ms * 1e-9),
            "rmse": rounded(errors[name]),
        }
        outcome.records.append(make_record(suite, name, shape, run, **measured))


def _check(
    contestant: BackwardContestant,
    shape: Shape,
    inputs: Inputs,
    expected: gradients.ExpectedGradients,
    clock: Clock,
) -> tuple[BoundBackward, float]:
    """Warms a contestant up and checks its gradients; raises UnavailableError, DeviceLostError."""
    with explained(contestant.name, shape.label, clock):
        bound = contestant.bind(shape, *inputs)
        warm_up(bound.run, clock)
        errors = gradients.compare(bound.to_bshd(bound.run()), expected)
        clock.synchronize()
    complaint = gradients.wrong(errors, expected)
    if complaint is not None:
        raise UnavailableError(complaint)
    return bound, errors.rmse


def run_backward_rmse(
    shapes: Sequence[Shape],
    contestants: Sequence[BackwardContestant],
    outcome: Outcome,
    run: str,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Measures the root mean square errors of dQ, dK and dV, standard attention's too.

    Args:
        shapes: The problems; as many queries as keys, K and V for each query head.
        contestants: Who takes part; the deterministic variants do not.
        outcome: Where records and exclusions go.
        run: When this run began, for the records.
        clock: Waits for the device.
        device: Where the tensors live.
        progress: Is called with a label before each measurement.
        after_shape: Is called after each shape and distribution.
    """
    clock = clock or CudaClock()
    taking_part = [one for one in contestants if one.name not in _DETERMINISTIC]
    for shape in shapes:
        dout = draw_dout(shape, device)
        for distribution in DISTRIBUTIONS:
            label = f"{shape.label} {distribution}"
            progress(label)
            inputs: Inputs = (*draw(shape, distribution, device), dout)
            found: dict[str, Gradients] = {}
            for contestant in taking_part:
                try:
                    with explained(contestant.name, label, clock):
                        bound = contestant.bind(shape, *inputs)
                        found[contestant.name] = bound.to_bshd(bound.run())
                        clock.synchronize()
                except UnavailableError as reason:
                    outcome.excluded.append((contestant.name, label, str(reason)))
            for impl, errors in _errors(shape, inputs, found).items():
                if not all(map(math.isfinite, errors)):
                    outcome.excluded.append((impl, label, "the gradients hold NaN or infinity"))
                    continue
                for part, rmse in zip(gradients.NAMES, errors, strict=True):
                    fields: dict[str, Any] = {"part": part, "distribution": distribution}
                    fields |= {"ms": None, "rmse": rmse}
                    outcome.records.append(make_record("backward-rmse", impl, shape, run, **fields))
            after_shape()


def _errors(shape: Shape, inputs: Inputs, found: dict[str, Gradients]) -> dict[str, list[float]]:
    """Root mean square errors of dQ, dK and dV by name, with those of standard attention."""
    parts = range(len(gradients.NAMES))
    squares = {name: [0.0 for _ in parts] for name in (*found, STANDARD)}
    for place in [(b, h) for b in range(shape.batch) for h in range(shape.heads_kv)]:
        qkvd = gradients.at_place(shape, inputs, place)
        truth = gradients.exact(shape, *qkvd)
        values = {name: gradients.at_place(shape, x, place) for name, x in found.items()}
        values[STANDARD] = list(gradients.standard(shape, *qkvd))
        for name, of_place in values.items():
            for i in parts:
                squares[name][i] += (of_place[i].double() - truth[i]).square().sum().item()
    counts = [x.numel() for x in inputs[:3]]
    return {name: [math.sqrt(sums[i] / counts[i]) for i in parts] for name, sums in squares.items()}
