"""The sections on packed batches, from suite varlen on a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from md_tables import bullets, number, table

from hopper_attention.bench.backward import FA3_DETERMINISTIC, OURS_DETERMINISTIC
from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.records import run_of
from hopper_attention.bench.shapes import LOGNORMAL, Shape
from hopper_attention.bench.varlen import BACKWARD, FORWARD, OURS_DENSE
from hopper_attention.bench.varlen_table import RATIOS, compare_varlen, varlen_lines

# The suite that a section is made from.
SUITE_OF = {"varlen_forward": "varlen", "varlen_backward": "varlen"}
_NAMES = {
    OURS: "hopper-attention",
    "fa3": "FlashAttention-3",
    OURS_DENSE: "ours, dense",
    OURS_DETERMINISTIC: "ours, deterministic",
    FA3_DETERMINISTIC: "FlashAttention-3, deterministic",
}

Document = Mapping[str, Any]


def forward(results: Document) -> str:
    """TFLOP/s of the forward pass by batch, and what they say."""
    return _by_batch(results, FORWARD)


def backward(results: Document) -> str:
    """Likewise of the backward pass."""
    return _by_batch(results, BACKWARD)


def _by_batch(results: Document, part: str) -> str:
    comparisons = compare_varlen(results["records"], part)
    names = [name for name in _NAMES if any(name in one.values for one in comparisons)]
    ratios = [
        (label, ratio_of)
        for label, ratio_of in RATIOS[part]
        if any(ratio_of(one) is not None for one in comparisons)
    ]
    rows = []
    for one in comparisons:
        cells = [number(one.values.get(name)) for name in names]
        cells += [f"**{number(ratio_of(one), 2)}**" for _, ratio_of in ratios]
        rows.append([_batch(one.shape), *cells])
    header = ["TFLOP/s", *(_NAMES[name] for name in names), *(label for label, _ in ratios)]
    lines = varlen_lines(part, comparisons)
    run, _ = run_of(results, "varlen")
    text = [table(header, rows), f"{results['device']}, {run}."]
    return "\n\n".join([bullets(lines), *text] if lines else text)


def _batch(shape: Shape) -> str:
    """A shape's head dimension, heads, mask, and sequences."""
    if shape.layout == LOGNORMAL:
        sequences = f"{shape.batch} lognormal, {sum(shape.lengths):,} tokens"
    else:
        sequences = f"{shape.batch} × {shape.seqlen_q:,}"
    return f"d{shape.head_dim} {shape.heads}/{shape.heads_kv} {shape.mask}, {sequences}"
