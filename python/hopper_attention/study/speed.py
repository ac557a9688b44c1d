"""The speed of the formats on the card, from 16-bit tensors to the output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import hopper_attention
from hopper_attention.bench.timing import CudaClock, Run, round_robin, warm_up

from .recipes import RECIPES
from .records import SpeedRow
from .settings import Progress, Settings

# As in the benchmarks: 16,384 tokens and a hidden size of 2,048.
_TOKENS = 16384
_HIDDEN = 2048
_LENGTHS = (4096, 16384)
_HEAD_DIM = 128
_BASELINE = "bf16"
_REPEATS = 20

TITLE = "speed"


def measure_speed(settings: Settings, device: torch.device, progress: Progress) -> list[SpeedRow]:
    """Times bf16 and each FP8 recipe in turn; nothing on a CPU or without an FP8 format."""
    names = [name for name in settings.formats if name in RECIPES]
    if device.type != "cuda" or not hopper_attention.is_available() or not names:
        return []
    progress.start(TITLE)
    progress.expect(2 * len(_LENGTHS))
    rows = []
    for seqlen in _LENGTHS:
        for causal in (False, True):
            rows += _measure_shape(names, seqlen, causal, device)
            progress.advance()
    progress.finish()
    return rows


def _measure_shape(
    names: Sequence[str], seqlen: int, causal: bool, device: torch.device
) -> list[SpeedRow]:
    batch, heads = _TOKENS // seqlen, _HIDDEN // _HEAD_DIM
    shape = (batch, seqlen, heads, _HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(3))
    clock = CudaClock()
    runs = _calls(names, q, k, v, causal)
    for run in runs.values():
        warm_up(run, clock)
    times = round_robin(runs, _REPEATS, clock)
    rows = []
    for name in (_BASELINE, *names):
        total = times[f"{name} total"]
        quantize = times.get(f"{name} quantize", 0.0)
        attention = times.get(f"{name} attention", total)
        rows.append(
            SpeedRow(name, batch, seqlen, heads, _HEAD_DIM, causal, quantize, attention, total)
        )
    return rows


def _calls(
    names: Sequence[str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> dict[str, Run]:
    """What is timed, by format and part."""
    api: Any = hopper_attention
    runs: dict[str, Run] = {
        f"{_BASELINE} total": partial(api.flash_attn_func, q, k, v, causal=causal)
    }
    for name in names:
        recipe = RECIPES[name].recipe
        fp8_func = partial(api.flash_attn_fp8_func, causal=causal)
        runs[f"{name} quantize"] = partial(api.quantize, q, k, v, recipe)
        runs[f"{name} attention"] = partial(fp8_func, api.quantize(q, k, v, recipe))
        runs[f"{name} total"] = partial(fp8_func, q, k, v, recipe=recipe)
    return runs
