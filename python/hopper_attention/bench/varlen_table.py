"""What suite varlen found: comparisons by pass, and the lines that sum them up."""

from __future__ import annotations

from collections.abc import Sequence

from hopper_attention.bench.backward import FA3_DETERMINISTIC, OURS_DETERMINISTIC
from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.ratios import (
    Comparison,
    RowRatio,
    compare_records,
    ratio_line,
    ratio_to,
)
from hopper_attention.bench.records import Record
from hopper_attention.bench.varlen import BACKWARD, FORWARD, OURS_DENSE

FA3_RATIO: RowRatio = ("ours / fa3", lambda one: ratio_to(one, "fa3"))
DENSE_RATIO: RowRatio = ("packed / dense", lambda one: ratio_to(one, OURS_DENSE))
DETERMINISTIC_RATIO: RowRatio = (
    "deterministic: ours / fa3",
    lambda one: ratio_to(one, FA3_DETERMINISTIC, OURS_DETERMINISTIC),
)
RATIOS: dict[str, tuple[RowRatio, ...]] = {
    FORWARD: (FA3_RATIO, DENSE_RATIO),
    BACKWARD: (FA3_RATIO, DENSE_RATIO, DETERMINISTIC_RATIO),
}


def compare_varlen(records: Sequence[Record], part: str) -> list[Comparison]:
    """One pass's records by shape; see `ratios.compare_records`."""
    of_part = [r for r in records if r["suite"] == "varlen" and r["part"] == part]
    return compare_records(of_part, "varlen", OURS, ("fa3",))


def varlen_lines(part: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Sums one pass up: against FlashAttention-3, and against dense batches."""
    lines = [
        ratio_line(f"varlen {part}: {label}", comparisons, ratio_of)
        for label, ratio_of in RATIOS[part]
    ]
    return [line for line in lines if line is not None]
