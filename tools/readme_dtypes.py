"""The section on fp16's speed beside bf16's, from suites forward and forward-shapes on a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from md_tables import MISSING, NAMES, number, table

from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.ratios import compare_records
from hopper_attention.bench.records import run_of

SUITE_OF = {"dtypes": "forward-shapes"}

Document = Mapping[str, Any]


def dtypes(results: Document) -> str:
    """fp16's rate over bf16's, of each contestant and of a matrix product."""
    records = results["records"]
    bf16 = {one.shape: one.values for one in compare_records(records, "forward")}
    rows = []
    for one in compare_records(records, "forward-shapes"):
        twin = bf16.get(replace(one.shape, dtype="bfloat16"))
        if one.shape.dtype != "float16" or twin is None:
            continue
        cells = [
            number(one.values[name] / twin[name], 3)
            if name in one.values and name in twin
            else MISSING
            for name in (OURS, *PEERS)
        ]
        rows.append([one.shape.label.removeprefix("fp16 "), *cells])
    text = table(["fp16 / bf16", *(NAMES[name] for name in (OURS, *PEERS))], rows)
    ceilings = run_of(results, "forward-shapes")[1]
    if "matmul_fp16_tflops" not in ceilings:
        return text
    product = ceilings["matmul_fp16_tflops"] / ceilings["matmul_bf16_tflops"]
    return (
        f"{text}\n\nIn the same run a matrix product of 8192³ in fp16 reached {product:.3f} of the "
        f"rate in bf16 ({ceilings['matmul_fp16_tflops']:.0f} and "
        f"{ceilings['matmul_bf16_tflops']:.0f} TFLOP/s)."
    )
