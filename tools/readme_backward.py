"""The sections on the backward pass, from its suites on a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from md_tables import MISSING, NAMES, bullets, length, number, table

from hopper_attention.bench.backward import FA3_DETERMINISTIC, OURS_DETERMINISTIC
from hopper_attention.bench.backward_table import (
    BEST_PEER,
    DETERMINISTIC_RATIOS,
    deterministic_lines,
    error_lines,
    read_errors,
)
from hopper_attention.bench.ratios import Comparison, RowRatio, compare_records
from hopper_attention.bench.records import run_of
from hopper_attention.bench.shapes import short_dtype
from hopper_attention.bench.table import summary_line

# The suite that a section is made from.
SUITE_OF = {
    "backward": "backward",
    "backward_deterministic": "backward",
    "backward_shapes": "backward-shapes",
    "backward_rmse": "backward-rmse",
}
_DETERMINISTIC_NAMES = {
    OURS_DETERMINISTIC: "hopper-attention, deterministic",
    FA3_DETERMINISTIC: "FlashAttention-3, deterministic",
}
_VALUES = {"normal": "N(0, 1)", "outliers": "N(0, 1) + N(0, 100) · Bernoulli(0.001)"}
_PARTS = {"dq": "dQ", "dk": "dK", "dv": "dV"}

Document = Mapping[str, Any]


def _by_length(
    comparisons: Sequence[Comparison], names: Mapping[str, str], ratios: Sequence[RowRatio]
) -> str:
    lengths = sorted({one.shape.seqlen_q for one in comparisons})
    groups: dict[tuple[int, str], dict[int, Comparison]] = {}
    for one in comparisons:
        group = groups.setdefault((one.shape.head_dim, one.shape.mask), {})
        group[one.shape.seqlen_q] = one
    rows = []
    for (head_dim, mask), by_length in groups.items():
        cells = [by_length.get(tokens) for tokens in lengths]
        for name, title in names.items():
            values = [one.values.get(name) if one else None for one in cells]
            if any(values):
                rows.append([str(head_dim), mask, title, *map(number, values)])
        for label, ratio_of in ratios:
            found = [ratio_of(one) if one else None for one in cells]
            if any(found):
                rows.append(["", "", f"**{label}**", *(f"**{number(x, 2)}**" for x in found)])
    return table(["d", "mask", "TFLOP/s", *map(length, lengths)], rows, left=3)


def backward(results: Document) -> str:
    """TFLOP/s of suite backward by length, and what they say."""
    comparisons = compare_records(results["records"], "backward")
    run, _ = run_of(results, "backward")
    return "\n\n".join(
        [
            bullets([summary_line("backward", comparisons)]),
            _by_length(comparisons, NAMES, [BEST_PEER]),
            f"{results['device']}, {run}.",
        ]
    )


def deterministic(results: Document) -> str:
    """TFLOP/s of suite backward with gradients of the same bits in every run."""
    comparisons = compare_records(results["records"], "backward")
    tables = _by_length(comparisons, _DETERMINISTIC_NAMES, DETERMINISTIC_RATIOS)
    lines = deterministic_lines("backward", comparisons)
    return f"{bullets(lines)}\n\n{tables}" if lines else tables


def shapes(results: Document) -> str:
    """TFLOP/s of suite backward-shapes."""
    suite = "backward-shapes"
    comparisons = compare_records(results["records"], suite)
    present = {name for one in comparisons for name in one.values}
    titles = {n: t for n, t in (NAMES | _DETERMINISTIC_NAMES).items() if n in present}
    rows = [
        [
            one.shape.label,
            *(number(one.values.get(name)) for name in titles),
            f"**{number(one.ratio, 2)}**",
        ]
        for one in comparisons
    ]
    lines = [summary_line(suite, comparisons), *deterministic_lines(suite, comparisons)]
    text = table(["TFLOP/s", *titles.values(), "ours / best peer"], rows)
    return f"{bullets(lines)}\n\n{text}"


def rmse(results: Document) -> str:
    """Errors of suite backward-rmse."""
    found = read_errors(results["records"])
    names = [name for name in NAMES if any(name in one.rmse for one in found)]
    rows = []
    for one in found:
        dtype, dims = short_dtype(one.shape.dtype), f"{one.shape.head_dim} {one.shape.mask}"
        titles = [dtype, dims, _VALUES[one.distribution], _PARTS[one.part]]
        cells = [f"{one.rmse[name]:.2e}" if name in one.rmse else MISSING for name in names]
        rows.append([*titles, *cells, f"**{number(one.ratio(), 3)}**"])
    header = ["dtype", "d", "Q, K, V", "", *(NAMES[name] for name in names), "ours / best peer"]
    lines, text = error_lines(found), table(header, rows, left=4)
    return f"{bullets(lines)}\n\n{text}" if lines else text
