"""What the suites of e4m3 found: figures for tables, and the lines that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.fp8 import BASE, FAST, FP8_PEERS
from hopper_attention.bench.fp8_accuracy import EMULATION, UNIFORM
from hopper_attention.bench.quantizer import BF16, COPY
from hopper_attention.bench.ratios import (
    Comparison,
    RowRatio,
    compare_records,
    ratio_line,
    ratio_to,
)
from hopper_attention.bench.records import Record, shape_of
from hopper_attention.bench.shapes import Shape

# What FlashAttention-3's own FP8, whose sums are fast and short, has over its bf16 at 16k keys on
# an H200, by head dimension and mask.
FA3_FAST_MULTIPLES = {
    (64, "full"): 1.17,
    (64, "causal"): 1.12,
    (128, "full"): 1.29,
    (128, "causal"): 1.27,
    (256, "full"): 1.54,
    (256, "causal"): 1.45,
}
_MULTIPLES_LENGTH = 16_384


def compare_fp8(records: Sequence[Record]) -> list[Comparison]:
    """Suite fp8's records by shape; see `ratios.compare_records`."""
    return compare_records(records, "fp8", peers=FP8_PEERS)


def fp8_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Sums suite fp8 up: ratios to the FP8 peers, and to FlashAttention-3 in bf16."""
    lines = []
    pairs = [(OURS, peer) for peer in FP8_PEERS] + [(FAST, OURS)]
    for ours, name in pairs:
        ratio_of = partial(ratio_to, name=name, ours=ours)
        line = ratio_line(f"fp8: {ours} / {name}", comparisons, ratio_of)
        lines.append(line or f"fp8: no shape with both {ours} and {name} in one run")
    multiples = [
        f"d{head_dim} {mask} {ratio:.2f} ({fast:.2f})"
        for (head_dim, mask), fast in FA3_FAST_MULTIPLES.items()
        for one in comparisons
        if (one.shape.head_dim, one.shape.mask) == (head_dim, mask)
        and one.shape.seqlen_q == _MULTIPLES_LENGTH
        and (ratio := ratio_to(one, BASE)) is not None
    ]
    if multiples:
        lines.append(
            f"fp8: {OURS} / {BASE} in bf16 at 16k keys (and what FA3's own fast FP8 has over it): "
            + ", ".join(multiples)
        )
    return lines


@dataclass(frozen=True)
class Rates:
    """The quantizer's rates at one head dimension.

    Attributes:
        shape: The problem.
        copy: GB/s of the copy in the same run, or None.
        by_recipe: GB/s by the recipe's name.
    """

    shape: Shape
    copy: float | None
    by_recipe: dict[str, float]

    def share(self, recipe: str) -> float | None:
        """A recipe's rate over the copy's."""
        if self.copy is None or recipe not in self.by_recipe:
            return None
        return self.by_recipe[recipe] / self.copy


@dataclass(frozen=True)
class EndToEnd:
    """TFLOP/s of one shape: quantizing and attention in e4m3, and attention in bf16."""

    shape: Shape
    fp8: float | None
    bf16: float | None

    @property
    def ratio(self) -> float | None:
        """FP8's speed over bf16's."""
        return self.fp8 / self.bf16 if self.fp8 and self.bf16 else None


def quantizer_rates(records: Iterable[Record]) -> list[Rates]:
    """The newest run's rates of each head dimension, in their order."""
    found = []
    for shape, newest in _newest(records, "quantize"):
        copies = [record["gbps"] for record in newest if record["impl"] == COPY]
        rates = {r["recipe"]: r["gbps"] for r in newest if r["impl"] != COPY}
        found.append(Rates(shape, copies[0] if copies else None, rates))
    return sorted(found, key=lambda one: one.shape.head_dim)


def end_to_end(records: Iterable[Record]) -> list[EndToEnd]:
    """The newest run's speeds of each shape."""
    found = []
    for shape, newest in _newest(records, "end to end"):
        speeds = {record["impl"]: record["tflops"] for record in newest}
        found.append(EndToEnd(shape, speeds.get(OURS), speeds.get(BF16)))
    return found


def _newest(records: Iterable[Record], part: str) -> list[tuple[Shape, list[Record]]]:
    """Suite quantize's records of a part by shape, each shape's newest run."""
    groups: dict[Shape, list[Record]] = {}
    for record in records:
        if record["suite"] == "quantize" and record["part"] == part:
            groups.setdefault(shape_of(record), []).append(record)
    newest = []
    for shape, group in groups.items():
        last = max(record["run"] for record in group)
        newest.append((shape, [record for record in group if record["run"] == last]))
    return newest


def quantize_lines(records: Sequence[Record]) -> list[str]:
    """Sums suite quantize up."""
    lines = []
    for rates in quantizer_rates(records):
        shares = {name: rates.share(name) for name in rates.by_recipe}
        words = [f"{name} {share:.2f}" for name, share in shares.items() if share is not None]
        if words:
            lines.append(f"quantize: d{rates.shape.head_dim}, rate / copy's: {', '.join(words)}")
    words = [
        f"{one.shape.mask} s{one.shape.seqlen_q} {one.ratio:.2f}"
        for one in end_to_end(records)
        if one.ratio is not None
    ]
    if words:
        lines.append(f"quantize: with attention, over our own bf16: {', '.join(words)}")
    return lines


@dataclass(frozen=True)
class Accuracy:
    """Suite fp8-accuracy.

    Attributes:
        rmse: By (recipe or peer, distribution), on the largest problem.
        emulated: The emulation's RMSE over the card's by (recipe, distribution).
        bias: Mean relative error of uniform attention by (head dim, implementation, keys).
    """

    rmse: dict[tuple[str, str], float]
    emulated: dict[tuple[str, str], float]
    bias: dict[tuple[int, str, int], float]


def read_accuracy(records: Iterable[Record]) -> Accuracy:
    """Sorts suite fp8-accuracy's records."""
    mine = [record for record in records if record["suite"] == "fp8-accuracy"]
    bias = {
        (r["head_dim"], r["impl"], r["seqlen_k"]): r["bias"]
        for r in mine
        if r["distribution"] == UNIFORM
    }
    rest = [record for record in mine if record["distribution"] != UNIFORM]
    predicted = {_place(r): r["rmse"] for r in rest if r["impl"] == EMULATION}
    rmse: dict[tuple[str, str], float] = {}
    ratios: dict[tuple[str, str], float] = {}
    largest = max((_size(record) for record in rest), default=0)
    for record in rest:
        place = _place(record)
        name = str(record.get("recipe", record["impl"]))
        if record["impl"] == OURS and place in predicted:
            ratios[name, record["distribution"]] = predicted[place] / record["rmse"]
        if record["impl"] != EMULATION and _size(record) == largest:
            rmse[name, record["distribution"]] = record["rmse"]
    return Accuracy(rmse, ratios, bias)


def _place(record: Record) -> tuple[Shape, str, str | None]:
    return shape_of(record), record["distribution"], record.get("recipe")


def _size(record: Record) -> int:
    size: int = record["batch"] * record["heads"] * record["seqlen_q"] * record["seqlen_k"]
    return size


def accuracy_lines(found: Accuracy) -> list[str]:
    """Sums suite fp8-accuracy up."""
    lines = []
    if found.emulated:
        low, high = min(found.emulated.values()), max(found.emulated.values())
        lines.append(f"fp8-accuracy: emulated rmse / the card's: {low:.3f} to {high:.3f}")
    for impl in dict.fromkeys(key[1] for key in found.bias):
        of_impl = {key: value for key, value in found.bias.items() if key[1] == impl}
        (head_dim, _, keys), worst = max(of_impl.items(), key=lambda pair: abs(pair[1]))
        lines.append(
            f"fp8-accuracy: {impl}: uniform attention is off by {100 * worst:+.3f}% at most "
            f"(d{head_dim}, {keys:,} keys)"
        )
    return lines


# The rows of suite fp8's table that compare.
FP8_RATIOS: tuple[RowRatio, ...] = (
    *((f"ours / {name}", lambda one, name=name: ratio_to(one, name)) for name in FP8_PEERS),
    ("ours / fa3 in bf16", lambda one: ratio_to(one, BASE)),
)
