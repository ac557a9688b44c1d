"""Suite host beyond the forward pass: both passes through autograd, and calls in FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hopper_attention
from hopper_attention.bench.contestants import OURS, Contestant, Sdpa, UnavailableError
from hopper_attention.bench.ratios import Comparison, compare_records
from hopper_attention.bench.records import Record, make_record
from hopper_attention.bench.runner import Outcome, Progress, explained, make_inputs, rounded
from hopper_attention.bench.shapes import Shape
from hopper_attention.bench.timing import Clock, HostClock, Run, round_robin, warm_up

AUTOGRAD = "forward and backward"
QUANTIZE = "quantize"
E4M3 = "e4m3 forward"
FP8_CALL = "quantize and e4m3 forward"
# What a record of the suite says in "part"; those of the 16-bit forward pass say nothing.
PARTS = (AUTOGRAD, QUANTIZE, E4M3, FP8_CALL)


def has_parts(shape: Shape) -> bool:
    """Whether these calls are timed on a shape: one is enough, as they cost the same on others."""
    return shape.head_dim == 128 and shape.causal


def compare_host(records: Sequence[Record], part: str | None = None) -> list[Comparison]:
    """One part's records of the suite; None is the forward pass's. See `compare_records`."""
    return compare_records([r for r in records if r.get("part") == part], "host")


def run_host_parts(
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
    """Times `PARTS` on the shapes that have them; arguments are those of `runner.run_timed`.

    Outputs are not checked here, but in the suites of the device's time.
    """
    clock = clock or HostClock()
    contexts = {one.name: one.context for one in contestants}
    for shape in filter(has_parts, shapes):
        progress(f"{shape.label}, {', '.join(PARTS)}")
        inputs = make_inputs(shape, device)
        for part in PARTS:
            ready: dict[str, Run] = {}
            for name, call in _calls(part, shape, contestants, inputs):
                try:
                    with explained(name, shape.label, clock), contexts[name]():
                        warm_up(call, clock)
                except UnavailableError as reason:
                    outcome.excluded.append((name, shape.label, f"{part}: {reason}"))
                else:
                    ready[name] = call
            for name, ms in round_robin(ready, reps, clock, contexts).items():
                measured = {"part": part, "ms": rounded(ms), "host_us": rounded(ms * 1e3)}
                outcome.records.append(make_record("host", name, shape, run, **measured))
        after_shape()


def _calls(
    part: str, shape: Shape, contestants: Sequence[Contestant], qkv: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[str, Run]]:
    """Who makes the calls of a part, and how."""
    q, k, v = qkv
    causal, names = shape.causal, [one.name for one in contestants]
    attend = partial(hopper_attention.flash_attn_func, causal=causal)
    if OURS in names and part == AUTOGRAD:
        yield OURS, _with_gradients(attend, qkv)
    elif OURS in names and part == QUANTIZE:
        yield OURS, partial(hopper_attention.quantize, q, k, v)
    elif OURS in names and part == E4M3:
        e4m3 = torch.float8_e4m3fn
        yield OURS, partial(attend, q.to(e4m3), k.to(e4m3), v.to(e4m3))
    elif OURS in names:
        yield OURS, partial(hopper_attention.flash_attn_fp8_func, q, k, v, causal=causal)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for one in contestants if part == AUTOGRAD else ():
        if isinstance(one, Sdpa):
            call = partial(sdpa, is_causal=causal, enable_gqa=shape.heads != shape.heads_kv)
            # views before leaves, so that autograd differentiates attention alone
            yield one.name, _with_gradients(call, [x.transpose(1, 2) for x in qkv])


def _with_gradients(call: Callable[..., Any], inputs: Sequence[Tensor]) -> Run:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    dout = torch.randn_like(inputs[0])  # these shapes' outputs are like q

    def run() -> object:
        return torch.autograd.grad(call(*leaves), leaves, dout)

    return run
