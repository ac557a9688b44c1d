"""Result files: a header, the ceilings of each run, and one record for each measurement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hopper_attention.bench.shapes import Shape

Record = dict[str, Any]

HEADER = ("device", "driver", "cuda", "torch", "date", "sources")
SHAPE_FIELDS = (
    "dtype",
    "head_dim",
    "head_dim_v",
    "batch",
    "seqlen_q",
    "seqlen_k",
    "heads",
    "heads_kv",
    "causal",
    "window",
    "layout",
)
# What was measured, and when: all other fields say what was run.
MEASURED = ("ms", "tflops", "gbps", "host_us", "rmse", "bias", "run")


def make_record(suite: str, impl: str, shape: Shape, run: str, **measured: Any) -> Record:
    """Makes the record of one implementation in one shape.

    Args:
        suite: Name of the suite.
        impl: Name of the implementation.
        shape: The problem.
        run: When the run began. Only records of one run are compared with each other, since a
            card's speed changes with its temperature.
        **measured: ``ms``, ``tflops``, ``gbps``, ``host_us``, ``rmse``,
            ``bias``; also what tells this record from another of the same shape, such as
            ``distribution``, ``recipe`` or ``part``.
    """
    fields = {name: getattr(shape, name) for name in SHAPE_FIELDS}
    fields["window"] = list(shape.window)
    return {"suite": suite, "impl": impl, **fields, **measured, "run": run}


def shape_of(record: Record) -> Shape:
    """Reads a record's shape back."""
    fields = {name: record[name] for name in SHAPE_FIELDS}
    fields["window"] = tuple(fields["window"])
    return Shape(**fields)


def key_of(record: Record) -> str:
    """Names what a record measures: equal for two measurements of the same thing."""
    return json.dumps({k: v for k, v in record.items() if k not in MEASURED}, sort_keys=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: The file is no result file.
    """
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise ValueError(f"{path} is no result file: it has no list of records")
    return document


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a result file, one record a line, in place of what is there."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(value)},"
        for name, value in document.items()
        if name != "records"
    ]
    records = ",\n".join(f"    {json.dumps(record)}" for record in document["records"])
    text = "\n".join(["{", *lines, '  "records": [', records, "  ]", "}"]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def merge(
    old: Mapping[str, Any] | None, header: Mapping[str, Any], records: Iterable[Record]
) -> tuple[dict[str, Any], str]:
    """Puts new records into a result file's content.

    Records of what was measured again are replaced. The others stay if they were measured on the
    same device with the same sources, for then they are still true; else all old ones go.

    Args:
        old: The file's content, or None where there is none yet.
        header: The new run's `HEADER` fields, notes, and ceilings by run.
        records: The new run's records.

    Returns:
        The new content, and a sentence that says what was kept.
    """
    new = list(records)
    if old is None:
        return {**header, "records": new}, f"{len(new)} records, a new file"
    for name, words in (("sources", "other sources"), ("device", "another device")):
        if old.get(name) != header.get(name) or old.get(name) is None:
            sentence = (
                f"{len(new)} records; the {len(old['records'])} old ones were dropped: "
                f"they come from {words} ({old.get(name)}, now {header.get(name)})"
            )
            return {**header, "records": new}, sentence
    measured = {key_of(record) for record in new}
    kept = [record for record in old["records"] if key_of(record) not in measured]
    replaced = len(old["records"]) - len(kept)
    runs = {record["run"] for record in kept + new}
    ceilings = {**old.get("ceilings", {}), **header.get("ceilings", {})}
    ceilings = {run: found for run, found in ceilings.items() if run in runs}
    merged = {**header, "ceilings": ceilings, "records": sorted(kept + new, key=_order)}
    return merged, f"{len(new)} records, {replaced} of them in place of old ones; {len(kept)} kept"


def run_of(document: Mapping[str, Any], suite: str) -> tuple[str, dict[str, float]]:
    """Returns when the last run of a suite began, and the card's ceilings in that run.

    Args:
        document: A result file's content.
        suite: Name of a suite that has records.

    Returns:
        The run, and ``{"matmul_bf16_tflops": ..., "copy_gbps": ...}``, empty if not measured.
    """
    run = max(record["run"] for record in document["records"] if record["suite"] == suite)
    return run, dict(document.get("ceilings", {}).get(run, {}))


def _order(record: Record) -> tuple[Any, ...]:
    return (
        record["suite"],
        record["dtype"],
        record["head_dim"],
        record["head_dim_v"],
        record["causal"],
        record["window"],
        record["seqlen_q"],
        record["batch"],
        record["heads_kv"],
        record.get("part", ""),
        record.get("distribution", ""),
        record.get("recipe", ""),
        record["impl"],
    )
