"""How an implementation compares with the best of its peers, shape by shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.records import Record, key_of, shape_of
from hopper_attention.bench.shapes import FP8, FP8_SUITES, Shape


@dataclass(frozen=True)
class Comparison:
    """One shape's measurements from one run.

    Attributes:
        suite: Name of the suite.
        shape: The problem.
        run: When the run began.
        values: What was measured, by implementation: TFLOP/s, or microseconds in suite "host".
        ours: Name of the implementation that is compared.
        peers: Names of its peers, measured or not.
    """

    suite: str
    shape: Shape
    run: str
    values: dict[str, float]
    ours: str
    peers: Sequence[str]

    @property
    def best_peer(self) -> str | None:
        """The fastest peer that was measured, or None."""
        measured = [name for name in self.peers if name in self.values]
        if not measured:
            return None
        pick = min if self.suite == "host" else max
        return pick(measured, key=lambda name: self.values[name])

    @property
    def ratio(self) -> float | None:
        """Our speed over the best peer's, or None where either was not measured."""
        best = self.best_peer
        if best is None or self.ours not in self.values:
            return None
        mine, theirs = self.values[self.ours], self.values[best]
        return theirs / mine if self.suite == "host" else mine / theirs


# What a row or a line of a table compares, with its title.
RowRatio = tuple[str, Callable[[Comparison], float | None]]


def ratio_to(one: Comparison, name: str, ours: str = OURS) -> float | None:
    """Our speed over one contestant's, or None where either was not measured."""
    return replace(one, ours=ours, peers=(name,)).ratio


def compare_records(
    records: Sequence[Record], suite: str, ours: str = OURS, peers: Sequence[str] = PEERS
) -> list[Comparison]:
    """Gathers a suite's records by shape and run.

    A peer that was not measured is left out, never counted as slow. Where a shape was measured in
    several runs, the newest that has our record is taken, for ratios hold only within a run.

    Args:
        records: Records of any suites.
        suite: The suite to compare: one that measures time.
        ours: Name of the implementation that is compared.
        peers: Names of its peers.

    Returns:
        A comparison for each shape, in the order of the records.
    """
    groups: dict[str, dict[str, Comparison]] = {}
    field = "host_us" if suite == "host" else "tflops"
    for record in records:
        if record["suite"] != suite or record.get(field) is None:
            continue
        if suite in FP8_SUITES:  # where some compute in 16 bits, to be compared with
            record = {**record, "dtype": FP8}
        same_shape = key_of({**record, "impl": ""})
        runs = groups.setdefault(same_shape, {})
        run = str(record.get("run", ""))
        comparison = runs.setdefault(
            run, Comparison(suite, shape_of(record), run, {}, ours, tuple(peers))
        )
        comparison.values[record["impl"]] = float(record[field])
    chosen = []
    for runs in groups.values():
        newest = sorted(runs.values(), key=lambda one: (one.ours in one.values, one.run))
        chosen.append(newest[-1])
    return chosen


def summary(ratios: Sequence[float]) -> tuple[float, float] | None:
    """Computes the geometric mean and the minimum of ratios; None without any."""
    if not ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)


def ratio_line(
    title: str,
    comparisons: Sequence[Comparison],
    ratio_of: Callable[[Comparison], float | None],
) -> str | None:
    """Sums a ratio up in a line, after the title; None where no shape has it."""
    rated = [(ratio, one) for one in comparisons if (ratio := ratio_of(one)) is not None]
    found = summary([ratio for ratio, _ in rated])
    if found is None:
        return None
    worst = min(rated, key=lambda pair: pair[0])[1].shape.label
    return (
        f"{title}: geometric mean {found[0]:.3f}, least {found[1]:.3f} ({worst}), "
        f"{len(rated)} shapes"
    )
