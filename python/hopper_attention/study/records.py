"""The study's rows, and the JSON and CSV files that hold them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .evaluate import Measured, Results
from .formats import Contestant
from .inputs import AttentionInputs

SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """The error of one contestant on one source, one of its layers, or one of their heads.

    Attributes:
        source: "model", "normal" or "outliers".
        level: "all" for the whole source, "layer", or "head".
        layer: the layer's place in the model; None where the row is not of one layer.
        layer_name: the attention module's name in the model; None likewise.
        head: the query head; None where the row is not of one head.
        format: the format's name.
        method: "standard" or "ours".
        by: who computed: "kernel", "emulation" or "pytorch"; several, with "+", where it differs.
        rmse, relative_rmse, max_error, cosine: against float64 on the inputs as given.
        arithmetic_rmse, arithmetic_relative_rmse: against float64 on the inputs as rounded to
            the format's 16 bits, so without what that rounding costs.
        elements: how many output elements were compared.
        nonfinite: how many of them are NaN or infinite.
    """

    source: str
    level: str
    layer: int | None
    layer_name: str | None
    head: int | None
    format: str
    method: str
    by: str
    rmse: float
    relative_rmse: float
    max_error: float
    cosine: float
    arithmetic_rmse: float
    arithmetic_relative_rmse: float
    elements: int
    nonfinite: int


@dataclass(frozen=True)
class Source:
    """Where Q, K and V came from.

    Attributes:
        name: "model", "normal" or "outliers".
        title: what it is, in a few words.
        shape: batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v and causal of its
            problems; the first layer's, where layers differ.
        layers: number of layers; 0 for a distribution.
        tokens: tokens of text in all; 0 for a distribution.
    """

    name: str
    title: str
    shape: dict[str, Any]
    layers: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class ContextRow:
    """The error of our attention where every key counts the same, at one number of keys.

    Attributes:
        format: the format's name.
        by: who computed: "kernel" or "emulation".
        head_dim: of Q, K and V.
        keys: number of keys.
        bias: the mean of O / R - 1, where R is float64's.
        rms: the root mean square of O / R - 1.
    """

    format: str
    by: str
    head_dim: int
    keys: int
    bias: float
    rms: float


@dataclass(frozen=True)
class SpeedRow:
    """The time of one call on the card, the median of some.

    Attributes:
        format: the format's name.
        batch, seqlen, heads, head_dim, causal: the problem.
        quantize_ms: the quantizer alone; 0 in 16 bits.
        attention_ms: attention of tensors in the format.
        total_ms: from 16-bit tensors to the output, measured as one.
    """

    format: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool
    quantize_ms: float
    attention_ms: float
    total_ms: float


@dataclass(frozen=True)
class Study:
    """All that a run of the study found out; speed is of a card alone."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    sources: list[Source]
    rows: list[Row]
    seconds: float
    context: list[ContextRow] = field(default_factory=list)
    speed: list[SpeedRow] = field(default_factory=list)

    def select(self, level: str, source: str | None = None) -> list[Row]:
        """The rows of one level, of one source or of all."""
        return [row for row in self.rows if row.level == level and source in (None, row.source)]


def make_row(
    contestant: Contestant,
    measured: Measured,
    *,
    source: str,
    level: str,
    layer: int | None = None,
    layer_name: str | None = None,
    head: int | None = None,
) -> Row:
    """A row from what was measured: of all heads together, or of `head`."""
    total = measured.total if head is not None else measured.total.over_heads()
    arithmetic = measured.arithmetic if head is not None else measured.arithmetic.over_heads()
    metrics = total.metrics(head or 0)
    inner = arithmetic.metrics(head or 0)
    return Row(
        source=source,
        level=level,
        layer=layer,
        layer_name=layer_name,
        head=head,
        format=contestant.format,
        method=contestant.method,
        by="+".join(sorted(measured.by)),
        rmse=metrics.rmse,
        relative_rmse=metrics.relative_rmse,
        max_error=metrics.max_error,
        cosine=metrics.cosine,
        arithmetic_rmse=inner.rmse,
        arithmetic_relative_rmse=inner.relative_rmse,
        elements=metrics.elements,
        nonfinite=metrics.nonfinite,
    )


def head_rows(
    results: Results, source: str, layer: int | None, layer_name: str | None
) -> list[Row]:
    """One row for each head of each contestant."""
    return [
        make_row(
            contestant,
            measured,
            source=source,
            level="head",
            layer=layer,
            layer_name=layer_name,
            head=head,
        )
        for contestant, measured in results.items()
        for head in range(len(measured.total.elements))
    ]


def describe_shape(inputs: AttentionInputs) -> dict[str, Any]:
    """A problem's sizes, as `Source.shape` holds them."""
    return {
        "batch": inputs.batch,
        "seqlen_q": inputs.seqlen_q,
        "seqlen_k": inputs.seqlen_k,
        "heads": inputs.heads,
        "heads_kv": inputs.heads_kv,
        "head_dim": inputs.query.shape[-1],
        "head_dim_v": inputs.value.shape[-1],
        "causal": inputs.causal,
    }


def write_json(study: Study, path: Path) -> None:
    """Writes the whole study; numbers that JSON cannot hold (NaN, infinity) become null."""
    document = {"schema": SCHEMA, **asdict(study)}
    path.write_text(json.dumps(_without_nan(document), indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Study:
    """Reads what `write_json` wrote; null measures come back as NaN.

    Raises:
        ValueError: where the file is of another schema.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema of {path} is {document.get('schema')!r}; allowed is {SCHEMA}")
    return Study(
        settings=document["settings"],
        environment=document["environment"],
        sources=[Source(**source) for source in document["sources"]],
        rows=[_row(row) for row in document["rows"]],
        seconds=document["seconds"],
        context=[ContextRow(**_with_nan(row)) for row in document["context"]],
        speed=[SpeedRow(**row) for row in document["speed"]],
    )


def write_csv(study: Study, path: Path) -> None:
    """Writes the rows, one a line, with the attributes of `Row` as the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in study.rows)


def read_csv(path: Path) -> list[Row]:
    """Reads what `write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row({k: v or None for k, v in row.items()}) for row in csv.DictReader(file)]


_MEASURES = tuple(f.name for f in fields(Row) if f.type == "float")
_COUNTS = tuple(f.name for f in fields(Row) if f.type in ("int", "int | None"))


def _row(values: dict[str, Any]) -> Row:
    """A row from JSON's or CSV's values."""
    typed = dict(values)
    for name in _MEASURES:
        typed[name] = math.nan if values[name] is None else float(values[name])
    for name in _COUNTS:
        typed[name] = None if values[name] is None else int(values[name])
    return Row(**typed)


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
