"""Running the suites: contestants in turn on each shape, outputs checked, records made."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hopper_attention.bench import accuracy
from hopper_attention.bench.contestants import OURS, Bound, Contestant, UnavailableError
from hopper_attention.bench.records import Record, make_record
from hopper_attention.bench.shapes import Shape
from hopper_attention.bench.timing import Clock, CudaClock, HostClock, round_robin, warm_up

Progress = Callable[[str], None]


class DeviceLostError(Exception):
    """The CUDA context no longer works, so that nothing more can be measured in this process."""


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        records: The measurements.
        excluded: (implementation, shape's label, reason) of what was not measured.
    """

    records: list[Record] = field(default_factory=list)
    excluded: list[tuple[str, str, str]] = field(default_factory=list)

    def exclude_all(self, names: Iterable[str], label: str, error: torch.OutOfMemoryError) -> None:
        """Excludes everybody from a problem that does not fit the device."""
        reason = f"not enough device memory for the problem: {explain_failure(error)}"
        self.excluded += [(name, label, reason) for name in names]

    def ours_failed(self) -> bool:
        """Whether our own implementation, or a variant of it, is among the excluded."""
        return any(name == OURS or name.startswith(OURS + "_") for name, _, _ in self.excluded)


def select(shapes: Sequence[Shape], only: str | None) -> list[Shape]:
    """Keeps the shapes whose label matches a regular expression.

    Args:
        shapes: The shapes.
        only: The expression, searched for anywhere in the label; None keeps all.

    Raises:
        ValueError: only is no regular expression.
    """
    if only is None:
        return list(shapes)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"only is {only!r}, which is no regular expression: {error}") from error
    return [shape for shape in shapes if pattern.search(shape.label)]


def make_inputs(shape: Shape, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k and v from N(0, 1).

    Returns:
        (batch, seqlen, heads, head_dim) tensors in the shape's `input_dtype`, contiguous.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, shape.input_dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    return (
        normal(shape.batch, shape.seqlen_q, shape.heads, shape.head_dim),
        normal(shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim),
        normal(shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim_v),
    )


def explain_failure(error: BaseException, messages: Sequence[warnings.WarningMessage] = ()) -> str:
    """Says in one line why a contestant failed, with what PyTorch warned of before."""
    first = (str(error) or type(error).__name__).strip().splitlines()[0]
    said = []
    for message in messages:
        text = str(message.message).strip().split("\n")[0].split(" (Triggered internally")[0]
        # PyTorch explains a refused backend in warnings, between others on the backends that the
        # caller switched off
        if text and not text.endswith(("not used because:", "runtime disabled.")):
            said.append(text)
    return "; ".join(dict.fromkeys([first, *said]))


def check_alive(clock: Clock, blame: str) -> None:
    """Raises DeviceLostError when the device no longer works after what blame describes."""
    try:
        clock.synchronize()
    except RuntimeError as error:
        raise DeviceLostError(f"the CUDA context is lost after {blame}") from error


@contextlib.contextmanager
def explained(name: str, label: str, clock: Clock) -> Iterator[None]:
    """Runs a contestant's calls: whatever they raise, the others go on.

    Args:
        name: The contestant's.
        label: The shape's.
        clock: Waits for the device.

    Raises:
        UnavailableError: The calls raised something; the message says what.
        DeviceLostError: They broke the CUDA context.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except UnavailableError:
            raise
        except Exception as error:
            reason = explain_failure(error, caught)
            check_alive(clock, f"{name} on {label}: {reason}")
            raise UnavailableError(reason) from error


def run_timed(
    suite: str,
    shapes: Sequence[Shape],
    contestants: Sequence[Contestant],
    outcome: Outcome,
    run: str,
    reps: int = 30,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Times a suite.

    Args:
        suite: Its name; "host" gives microseconds of the host's time, others TFLOP/s of the
            device's.
        shapes: The problems.
        contestants: Who takes part.
        outcome: Where records and exclusions go, shape by shape.
        run: When this run began, for the records.
        reps: Timed calls of each contestant on each shape, at least.
        clock: What measures; by default as the suite needs.
        device: Where the tensors live.
        progress: Is called with each shape's label before it is measured.
        after_shape: Is called after each shape.

    Raises:
        DeviceLostError: A contestant broke the CUDA context; what was measured before is in
            outcome.
    """
    clock = clock or (HostClock() if suite == "host" else CudaClock())
    for shape in shapes:
        progress(shape.label)
        _run_shape(suite, shape, contestants, outcome, run, reps, clock, device)
        after_shape()


def _run_shape(
    suite: str,
    shape: Shape,
    contestants: Sequence[Contestant],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
    device: str,
) -> None:
    try:
        inputs = make_inputs(shape, device)
        expected = accuracy.expect(shape, *inputs)
    except torch.OutOfMemoryError as error:
        outcome.exclude_all([one.name for one in contestants], shape.label, error)
        return
    ready: dict[str, Bound] = {}
    errors: dict[str, accuracy.Errors] = {}
    contexts = {one.name: one.context for one in contestants}
    for contestant in contestants:
        try:
            bound, found = _check(contestant, shape, inputs, expected, clock)
        except UnavailableError as reason:
            outcome.excluded.append((contestant.name, shape.label, str(reason)))
        else:
            ready[contestant.name], errors[contestant.name] = bound, found
    runs = {name: bound.run for name, bound in ready.items()}
    medians = round_robin(runs, reps, clock, contexts)
    for name, ms in medians.items():
        of = shape if ready[name].stands_for else replace(shape, dtype=shape.input_dtype)
        measured: dict[str, float] = {"ms": rounded(ms)}
        if suite == "host":
            measured["host_us"] = rounded(ms * 1e3)
        else:
            measured["tflops"] = rounded(shape.flops() / ms * 1e-9)
        measured["rmse"] = rounded(errors[name].rmse)
        outcome.records.append(make_record(suite, name, of, run, **measured))


def expect_fp8(shape: Shape, bound: Bound, out: Tensor) -> accuracy.Expected:
    """What the output of a call of e4m3 tensors should be; see `accuracy.expect`."""
    assert bound.stands_for is not None
    usual = partial(accuracy.standard_fp8, out_dtype=bound.out_dtype or out.dtype)
    return accuracy.expect(shape, *bound.stands_for(), usual=usual)


def rounded(value: float) -> float:
    """Rounds a figure to the digits that are kept of it."""
    return float(f"{value:.6g}")


def _check(
    contestant: Contestant,
    shape: Shape,
    inputs: tuple[Tensor, Tensor, Tensor],
    expected: accuracy.Expected,
    clock: Clock,
) -> tuple[Bound, accuracy.Errors]:
    """Warms a contestant up and checks its output; raises UnavailableError or DeviceLostError."""
    with explained(contestant.name, shape.label, clock):
        bound = contestant.bind(shape, *inputs)
        with contestant.context():
            warm_up(bound.run, clock)
            out = bound.to_bshd(bound.run())
        if bound.stands_for is not None:
            expected = expect_fp8(shape, bound, out)
        errors = accuracy.compare(out, expected)
        clock.synchronize()
    complaint = accuracy.wrong(errors, expected)
    if complaint is not None:
        raise UnavailableError(complaint)
    return bound, errors
