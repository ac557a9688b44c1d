"""The accuracy suite: errors of whole outputs against float64, on two distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.bench.contestants import Contestant, UnavailableError
from hopper_attention.bench.records import make_record
from hopper_attention.bench.runner import (
    Outcome,
    Progress,
    check_alive,
    explain_failure,
)
from hopper_attention.bench.shapes import Shape
from hopper_attention.bench.timing import Clock, CudaClock
from hopper_attention.study.distributions import DISTRIBUTIONS, random_inputs
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.standard import standard_attention

STANDARD = "standard"


def draw(shape: Shape, distribution: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k and v from one of the error study's distributions.

    Args:
        shape: The problem; as many queries as keys, K and V for each query head.
        distribution: A key of `hopper_attention.study.distributions.DISTRIBUTIONS`.
        device: Where the tensors live.
    """
    inputs = random_inputs(
        distribution,
        batch=shape.batch,
        seqlen=shape.seqlen_q,
        heads=shape.heads,
        head_dim=shape.head_dim,
        seed=0,
    )
    inputs = inputs.to(torch.device(device)).to(getattr(torch, shape.input_dtype))
    return inputs.query, inputs.key, inputs.value


def run_rmse(
    shapes: Sequence[Shape],
    contestants: Sequence[Contestant],
    outcome: Outcome,
    run: str,
    clock: Clock | None = None,
    device: str = "cuda",
    progress: Progress = lambda label: None,
    after_shape: Callable[[], None] = lambda: None,
) -> None:
    """Measures the root mean square error of every contestant and of standard attention.

    Args:
        shapes: The problems.
        contestants: Who takes part.
        outcome: Where records and exclusions go.
        run: When this run began, for the records.
        clock: Waits for the device.
        device: Where the tensors live.
        progress: Is called with a label before each measurement.
        after_shape: Is called after each shape and distribution.
    """
    clock = clock or CudaClock()
    for shape in shapes:
        for distribution in DISTRIBUTIONS:
            label = f"{shape.label} {distribution}"
            progress(label)
            q, k, v = draw(shape, distribution, device)
            outputs: dict[str, Tensor] = {}
            for contestant in contestants:
                try:
                    bound = contestant.bind(shape, q, k, v)
                    with contestant.context():
                        outputs[contestant.name] = bound.to_bshd(bound.run())
                    clock.synchronize()
                except UnavailableError as reason:
                    outcome.excluded.append((contestant.name, label, str(reason)))
                except Exception as error:  # whatever a peer raises, the others go on
                    reason_text = explain_failure(error)
                    check_alive(clock, f"{contestant.name} on {label}: {reason_text}")
                    outcome.excluded.append((contestant.name, label, reason_text))
            for name, rmse in _errors(shape, q, k, v, outputs).items():
                extra: dict[str, Any] = {"distribution": distribution, "ms": None, "rmse": rmse}
                if math.isfinite(rmse):
                    outcome.records.append(make_record("rmse", name, shape, run, **extra))
                else:
                    outcome.excluded.append((name, label, "the output holds NaN or infinity"))
            after_shape()


def _errors(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, outputs: dict[str, Tensor]
) -> dict[str, float]:
    """Root mean square errors by name, with that of standard attention."""
    squares = dict.fromkeys([*outputs, STANDARD], 0.0)
    for b in range(shape.batch):  # one head of one sequence at a time fits any memory
        for h in range(shape.heads):
            at = slice(b, b + 1), slice(None), slice(h, h + 1)
            part = q[at], k[at], v[at]
            exact, _ = reference.attention(*part, causal=shape.causal, window_size=shape.window)
            values = {name: out[at] for name, out in outputs.items()}
            values[STANDARD] = standard_attention(
                AttentionInputs(
                    *part,
                    softmax_scale=shape.head_dim**-0.5,
                    causal=shape.causal,
                    window_size=shape.window,
                )
            )
            for name, value in values.items():
                squares[name] += (value.double() - exact).square().sum().item()
    count = shape.batch * shape.seqlen_q * shape.heads * shape.head_dim_v
    return {name: math.sqrt(total / count) for name, total in squares.items()}
