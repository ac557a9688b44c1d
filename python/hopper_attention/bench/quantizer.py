"""Suite quantize: the quantizer's rate by recipe, and its time and attention's together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hopper_attention
from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.records import make_record
from hopper_attention.bench.runner import (
    Outcome,
    Progress,
    check_alive,
    explain_failure,
    make_inputs,
    rounded,
)
from hopper_attention.bench.shapes import TOKENS, Shape
from hopper_attention.bench.timing import Clock, CudaClock, Run, round_robin, warm_up
from hopper_attention.study.recipes import DEFAULT, RECIPES

COPY = "copy"  # a device copy that reads and writes as many bytes
BF16 = "hopper_attention_bf16"  # our own forward of the 16-bit tensors
END_TO_END_HEAD_DIM = 128

# The quantizer does not know how products are added up.
QUANTIZER_RECIPES = {
    name: named.recipe for name, named in RECIPES.items() if named.recipe.accumulation == "fp32"
}


def quantized_bytes(shape: Shape) -> int:
    """Counts what quantizing must move: each 16-bit input read once, each output written once.

    Scales are left out: at most 4 bytes a token, of 3 bytes an element.
    """
    of_queries = shape.seqlen_q * shape.heads * shape.head_dim
    of_keys = shape.seqlen_k * shape.heads_kv * (shape.head_dim + shape.head_dim_v)
    return 3 * shape.batch * (of_queries + of_keys)


def measures_rates(shape: Shape) -> bool:
    """Whether the quantizer is timed alone on a shape: one for each head dimension."""
    return not shape.causal and shape.seqlen_q == TOKENS


def run_quantize(
    shapes: Sequence[Shape],
    outcome: Outcome,
    run: str,
    reps: int = 30,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Times the quantizer beside a copy, and quantizing with attention beside bf16's attention.

    Args:
        shapes: The problems.
        outcome: Where records and exclusions go.
        run: When this run began, for the records.
        reps: Timed calls of each contestant, at least.
        clock: What measures.
        device: Where the tensors live.
        progress: Is called with each shape's label before it is measured.
        after_shape: Is called after each shape.

    Raises:
        DeviceLostError: The CUDA context is broken; what was measured before is in outcome.
    """
    clock = clock or CudaClock()
    for shape in shapes:
        progress(shape.label)
        q, k, v = make_inputs(shape, device)
        if measures_rates(shape):
            _rates(shape, (q, k, v), outcome, run, reps, clock)
        if shape.head_dim == END_TO_END_HEAD_DIM:
            _end_to_end(shape, (q, k, v), outcome, run, reps, clock)
        after_shape()


def _rates(
    shape: Shape,
    qkv: tuple[Tensor, Tensor, Tensor],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
) -> None:
    moved = quantized_bytes(shape)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=qkv[0].device).random_()
    target = torch.empty_like(source)
    runs: dict[str, Run] = {COPY: lambda: target.copy_(source)}
    for name, recipe in QUANTIZER_RECIPES.items():
        runs[name] = partial(hopper_attention.quantize, *qkv, recipe)
    times = _time(shape, runs, outcome, reps, clock)
    for name, ms in times.items():
        impl = COPY if name == COPY else OURS
        recipe_name = {} if name == COPY else {"recipe": name}
        measured: dict[str, Any] = {"ms": rounded(ms), "gbps": rounded(moved / ms * 1e-6)}
        fields = {"part": "quantize", **recipe_name, **measured}
        outcome.records.append(make_record("quantize", impl, shape, run, **fields))


def _end_to_end(
    shape: Shape,
    qkv: tuple[Tensor, Tensor, Tensor],
    outcome: Outcome,
    run: str,
    reps: int,
    clock: Clock,
) -> None:
    causal, recipe = shape.causal, RECIPES[DEFAULT].recipe
    runs: dict[str, Run] = {
        OURS: partial(hopper_attention.flash_attn_fp8_func, *qkv, recipe=recipe, causal=causal),
        BF16: partial(hopper_attention.flash_attn_func, *qkv, causal=causal),
    }
    times = _time(shape, runs, outcome, reps, clock)
    for name, ms in times.items():
        measured = {"ms": rounded(ms), "tflops": rounded(shape.flops() / ms * 1e-9)}
        fields = {"part": "end to end", **measured}
        outcome.records.append(make_record("quantize", name, shape, run, **fields))


def _time(
    shape: Shape, runs: Mapping[str, Run], outcome: Outcome, reps: int, clock: Clock
) -> dict[str, float]:
    ready = {}
    for name, run in runs.items():
        try:
            warm_up(run, clock)
        except Exception as error:  # the others go on
            reason = explain_failure(error)
            check_alive(clock, f"{name} on {shape.label}: {reason}")
            impl = name if name in (COPY, BF16) else OURS
            outcome.excluded.append((impl, shape.label, reason))
        else:
            ready[name] = run
    return round_robin(ready, reps, clock)
