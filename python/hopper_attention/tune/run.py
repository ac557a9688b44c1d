"""Candidates take turns: every round each is timed once, in a process of its own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hopper_attention.bench.shapes import FP8, HIDDEN_SIZE, TOKENS, Shape
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.tune.build import Built
from hopper_attention.tune.rules import Instance, TuneError
from hopper_attention.tune.worker import Job

LENGTHS = (512, 2_048, 16_384)

_FP8_FAST = FP8 + "_fast"  # key.h's name

Measure = Callable[[Job], dict[str, float]]


@dataclass
class Result:
    """What came of a candidate.

    Attributes:
        built: The candidate.
        chosen: Whether it is what config.h chooses.
        rounds: Milliseconds of a call by the shape's label, one dictionary a round.
        error: Why it takes no part, or None.
    """

    built: Built
    chosen: bool
    rounds: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def ms(self, shape: Shape) -> float:
        """The median of the rounds, milliseconds of a call."""
        return statistics.median(times[shape.label] for times in self.rounds)

    def tflops(self, shape: Shape) -> float:
        """The rate at `ms`, in 1e12 floating-point operations a second; causal counts half."""
        return shape.flops() / self.ms(shape) * 1e-9

    def speed(self, reference: Result, shapes: Sequence[Shape]) -> float:
        """How often it is as fast as another: the geometric mean over shapes."""
        ratios = [reference.ms(shape) / self.ms(shape) for shape in shapes]
        return math.prod(ratios) ** (1 / len(ratios))


def problems(
    instance: Instance, lengths: Sequence[int] = LENGTHS, mask: str | None = None
) -> list[Shape]:
    """Lists the problems that an instance is timed on: 16,384 tokens, hidden size about 2048.

    Args:
        instance: The kernel.
        lengths: Tokens of a sequence.
        mask: "full" or "causal"; None takes what the kernel is for.

    Raises:
        ValueError: A length is not positive, or the kernel cannot mask or serves packed batches.
    """
    if instance.mask == "packed":
        alike = instance.name.replace("packed", "masked")
        raise ValueError(
            f"{instance.name} serves packed batches, which are not timed here; {alike}, whose tile "
            "is the same, can be"
        )
    mask = mask or ("full" if instance.mask == "full" else "causal")
    if mask == "causal" and instance.mask == "full":
        raise ValueError(f"{instance.name} computes no causal mask: mask must be full")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be 1 or more, got {list(lengths)}")
    heads = max(1, HIDDEN_SIZE // instance.head_dim)
    return [
        Shape(
            FP8 if is_fp8(instance) else instance.dtype,
            instance.head_dim,
            instance.head_dim_v,
            max(1, TOKENS // length),
            length,
            length,
            heads,
            heads,
            mask == "causal",
        )
        for length in lengths
    ]


def is_fp8(instance: Instance) -> bool:
    """Whether a kernel is one of e4m3, whichever way it adds up."""
    return instance.dtype in (FP8, _FP8_FAST)


def recipe_for(instance: Instance, shapes: Sequence[Shape]) -> Fp8Recipe | None:
    """How to quantize problems so that this kernel serves them; None for 16 bits."""
    if not is_fp8(instance):
        return None
    if instance.dtype == _FP8_FAST:
        return Fp8Recipe(accumulation="fast")
    # Without a mask a masked kernel is for V as rows of tokens.
    unmasked = any(shape.mask == "full" for shape in shapes)
    return Fp8Recipe(transpose_v=instance.mask == "full" or not unmasked)


def take_turns(
    instance: Instance,
    candidates: Sequence[Built],
    shapes: Sequence[Shape],
    rounds: int,
    reps: int,
    measure: Measure,
    progress: Callable[[str], None] = lambda label: None,
) -> list[Result]:
    """Times candidates, each once a round.

    Args:
        instance: The kernel.
        candidates: The candidates; the first is the chosen one.
        shapes: The problems.
        rounds: How often each has its turn.
        reps: Timed calls of a problem in each turn.
        measure: Does a job, in a process of its own.
        progress: Is called with a candidate's label before its turn.

    Returns:
        A result for each candidate, in their order. Who fails has no further turn. Outputs are
        checked in the first round.
    """
    recipe = recipe_for(instance, shapes)
    results = [Result(built, index == 0, [], built.error) for index, built in enumerate(candidates)]
    for turn in range(rounds):
        start = turn % len(results) if results else 0  # the first in line meets the coolest card
        for result in results[start:] + results[:start]:
            library = result.built.library
            if result.error is not None or library is None:
                continue
            label = result.built.label
            progress(label)
            job = Job(library, instance.name, label, tuple(shapes), reps, turn == 0, recipe)
            try:
                result.rounds.append(measure(job))
            except TuneError as error:
                result.error = str(error)
    return results
