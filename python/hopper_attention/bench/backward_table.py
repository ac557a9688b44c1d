"""What the backward suites found: figures for tables, and the lines that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hopper_attention.bench.backward import FA3_DETERMINISTIC, OURS_DETERMINISTIC
from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.ratios import Comparison, RowRatio, ratio_line, ratio_to
from hopper_attention.bench.records import Record, shape_of
from hopper_attention.bench.shapes import Shape

# The rows of suite backward's tables that compare.
BEST_PEER: RowRatio = ("ours / best peer", lambda one: one.ratio)
DETERMINISTIC_RATIOS: tuple[RowRatio, ...] = (
    ("deterministic: ours / fa3", lambda one: ratio_to(one, FA3_DETERMINISTIC, OURS_DETERMINISTIC)),
    ("ours: deterministic / not", lambda one: ratio_to(one, OURS, OURS_DETERMINISTIC)),
)
BACKWARD_RATIOS = (BEST_PEER, *DETERMINISTIC_RATIOS)


def deterministic_lines(suite: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Sums up what the order of the sums costs, and how it compares with FlashAttention-3's."""
    lines = [
        ratio_line(f"{suite}: {label}", comparisons, ratio_of)
        for label, ratio_of in DETERMINISTIC_RATIOS
    ]
    return [line for line in lines if line is not None]


@dataclass(frozen=True)
class GradientErrors:
    """Errors of one gradient in one shape, from one run.

    Attributes:
        shape: The problem.
        distribution: What Q, K and V were drawn from.
        part: "dq", "dk" or "dv".
        rmse: Root mean square errors by implementation.
    """

    shape: Shape
    distribution: str
    part: str
    rmse: dict[str, float]

    def ratio(self, peers: Sequence[str] = PEERS) -> float | None:
        """Our error over the least of the peers', or None where either was not measured."""
        theirs = [self.rmse[name] for name in peers if name in self.rmse]
        if OURS not in self.rmse or not theirs:
            return None
        return self.rmse[OURS] / min(theirs)


def read_errors(records: Iterable[Record]) -> list[GradientErrors]:
    """Sorts suite backward-rmse's records: the newest run of each shape that has ours."""
    groups: dict[tuple[Shape, str, str], dict[str, dict[str, float]]] = {}
    for record in records:
        if record["suite"] == "backward-rmse":
            key = (shape_of(record), record["distribution"], record["part"])
            by_run = groups.setdefault(key, {})
            by_run.setdefault(str(record["run"]), {})[record["impl"]] = record["rmse"]
    return [
        GradientErrors(*key, max(by_run.items(), key=lambda pair: (OURS in pair[1], pair[0]))[1])
        for key, by_run in groups.items()
    ]


def error_lines(found: Sequence[GradientErrors]) -> list[str]:
    """Sums suite backward-rmse up: the largest ratios to FlashAttention-3 and to the best peer."""
    lines = []
    for words, peers in (("fa3", ("fa3",)), ("best peer", PEERS)):
        rated = [(ratio, one) for one in found if (ratio := one.ratio(peers)) is not None]
        if rated:
            ratio, worst = max(rated, key=lambda pair: pair[0])
            lines.append(
                f"backward-rmse: ours / {words}: at most {ratio:.3f} ({worst.part}, "
                f"{worst.distribution}, {worst.shape.label}), {len(rated)} gradients"
            )
    return lines
