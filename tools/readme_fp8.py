"""The sections on FP8: from the study, and from the suites of e4m3 on a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from md_tables import MISSING, length, listing, number, table

from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.fp8 import BASE, FAST
from hopper_attention.bench.fp8_table import (
    FP8_RATIOS,
    compare_fp8,
    fp8_lines,
    quantizer_rates,
    read_accuracy,
)
from hopper_attention.bench.fp8_table import end_to_end as read_end_to_end
from hopper_attention.bench.ratios import Comparison, ratio_to, summary
from hopper_attention.bench.records import run_of
from hopper_attention.study import Study
from hopper_attention.study.recipes import RECIPES, is_fp8
from hopper_attention.study.verdict import fp8_in_words

# The suite that a section is made from.
SUITE_OF = {
    "fp8_headline": "fp8-accuracy",
    "fp8_forward": "fp8",
    "fp8_quantizer": "quantize",
    "fp8_end_to_end": "quantize",
    "fp8_rmse": "fp8-accuracy",
    "fp8_uniform": "fp8-accuracy",
}
_NAMES = {
    OURS: "hopper-attention",
    FAST: "hopper-attention, fast",
    "cudnn_fp8": "cuDNN",
    "fa3_fp8": "FlashAttention-3 of vLLM",
    BASE: "FlashAttention-3 in bf16",
}

Document = Mapping[str, Any]


def headline(results: Document) -> str:
    """How fast and how right, in a sentence."""
    comparisons = compare_fp8(results["records"])

    def mean(peer: str) -> str:
        ratios = [ratio_to(one, peer) for one in comparisons]
        found = summary([ratio for ratio in ratios if ratio is not None])
        return MISSING if found is None else f"{found[0]:.2f}"

    bias = read_accuracy(results["records"]).bias
    longest = max(keys for _, _, keys in bias)
    worst = {
        impl: max(abs(x) for (_, name, keys), x in bias.items() if (name, keys) == (impl, longest))
        for impl in (OURS, FAST)
    }
    return (
        f"In FP8, with sums that stay right at any context length, it runs at {mean('cudnn_fp8')} "
        f"times the speed of cuDNN's FP8 and {mean('fa3_fp8')} times that of vLLM's two-level "
        f"FlashAttention-3 (geometric means of {len(comparisons)} shapes, the same run); uniform "
        f"attention over {longest:,} keys, where fast accumulation loses {worst[FAST]:.0%}, is off "
        f"by at most {100 * worst[OURS]:.3f}%. [docs/fp8.md](docs/fp8.md) has the tables."
    )


def forward(results: Document) -> str:
    """TFLOP/s of suite fp8 by length, and what they say."""
    comparisons = compare_fp8(results["records"])
    lengths = sorted({one.shape.seqlen_q for one in comparisons})
    groups: dict[tuple[int, str], dict[int, Comparison]] = {}
    for one in comparisons:
        group = groups.setdefault((one.shape.head_dim, one.shape.mask), {})
        group[one.shape.seqlen_q] = one
    rows = []
    for (head_dim, mask), by_length in groups.items():
        cells = [by_length.get(tokens) for tokens in lengths]
        for name, title in _NAMES.items():
            values = [one.values.get(name) if one else None for one in cells]
            if any(values):
                rows.append([str(head_dim), mask, title, *map(number, values)])
        for label, ratio_of in FP8_RATIOS:
            ratios = [ratio_of(one) if one else None for one in cells]
            rows.append(["", "", f"**{label}**", *(f"**{number(x, 2)}**" for x in ratios)])
    run, _ = run_of(results, "fp8")
    lines = "\n".join(f"- {line.removeprefix('fp8: ')}" for line in fp8_lines(comparisons))
    tables = table(["d", "mask", "TFLOP/s", *map(length, lengths)], rows, left=3)
    return f"{lines}\n\n{tables}\n\n{results['device']}, {run}."


def quantizer(results: Document) -> str:
    """GB/s of the quantizer by recipe and head dimension."""
    rates = quantizer_rates(results["records"])
    rows = []
    for recipe in dict.fromkeys(name for one in rates for name in one.by_recipe):
        cells = [
            f"{number(one.by_recipe.get(recipe))} ({number(one.share(recipe), 2)})" for one in rates
        ]
        rows.append([f"`{recipe}`", *cells])
    rows.append(["device copy", *(number(one.copy) for one in rates)])
    return table(["GB/s (over the copy's)", *(f"d {one.shape.head_dim}" for one in rates)], rows)


def end_to_end(results: Document) -> str:
    """Quantizing and attention together beside bf16's attention."""
    rows = [
        [one.shape.label, number(one.fp8), number(one.bf16), f"**{number(one.ratio, 2)}**"]
        for one in read_end_to_end(results["records"])
    ]
    return table(["TFLOP/s", "quantizer and e4m3", "bf16", "ratio"], rows)


def rmse(results: Document) -> str:
    """Errors of the recipes on the card, and the emulation's over them."""
    found = read_accuracy(results["records"])
    distributions = list(dict.fromkeys(name for _, name in found.rmse))
    rows = []
    for recipe in dict.fromkeys(name for name, _ in found.rmse):
        title = _NAMES.get(recipe, f"`{recipe}`")
        errors = [found.rmse.get((recipe, name)) for name in distributions]
        emulated = [found.emulated.get((recipe, name)) for name in distributions]
        cells = [MISSING if error is None else f"{error:.2e}" for error in errors]
        rows.append([title, *cells, *(number(ratio, 3) for ratio in emulated)])
    header = ["RMSE", *distributions, *(f"emulated / card, {name}" for name in distributions)]
    return table(header, rows)


def uniform(results: Document) -> str:
    """Mean errors of uniform attention on the card, in percent."""
    found = read_accuracy(results["records"])
    contexts = sorted({keys for _, _, keys in found.bias})
    rows = []
    for head_dim, impl in sorted({key[:2] for key in found.bias}):
        values = [found.bias.get((head_dim, impl, keys)) for keys in contexts]
        cells = [MISSING if value is None else f"{100 * value:+.2f}" for value in values]
        rows.append([str(head_dim), _NAMES[impl], *cells])
    return table(["d", "mean error, %", *map(length, contexts)], rows, left=2)


def _by_whom(result: Study) -> str:
    computed = {row.by for row in result.rows if is_fp8(row.format)}
    computed |= {row.by for row in result.context if is_fp8(row.format)}
    return f"FP8 by {listing(sorted(computed))}, {result.environment['device']}."


def fp8_recipes(result: Study) -> str:
    """Relative RMSE of each FP8 recipe by source, in percent, and 16 bits beside them."""
    ours = {(row.format, row.source): row for row in result.select("all") if row.method == "ours"}
    names = [source.name for source in result.sources]
    rows = []
    for name in dict.fromkeys(key[0] for key in ours):
        words = RECIPES[name].words if is_fp8(name) else ""
        cells = [f"{100 * ours[name, source].relative_rmse:.3f}" for source in names]
        rows.append([f"`{name}`", words, *cells])
    titles = [source.title.split(" on ")[0] for source in result.sources]
    text = table(["format", "", *titles], rows, left=2)
    return f"{text}\n\nRelative RMSE against float64, in percent. {_by_whom(result)}"


def fp8_context(result: Study) -> str:
    """The bias of uniform attention by number of keys, in percent."""
    names = list(dict.fromkeys(row.format for row in result.context))
    # Adding 0 leaves no minus sign to what is rounded to 0.
    bias = {(row.format, row.keys): round(100 * row.bias, 2) + 0.0 for row in result.context}
    keys = sorted({row.keys for row in result.context})
    rows = [[f"`{name}`", *(f"{bias[name, count]:+.2f}" for count in keys)] for name in names]
    text = table(["mean error, %", *map(length, keys)], rows)
    return f"{text}\n\n{_by_whom(result)}"


def fp8_words(result: Study) -> str:
    """What the study of FP8 found, a sentence or two an item."""
    return "\n".join(f"- {line}" for line in fp8_in_words(result))


def fp8_speed(result: Study) -> str:
    """Milliseconds of each recipe on the card, and its speed over bf16's."""
    rows = []
    base = {
        (row.batch, row.seqlen, row.causal): row.total_ms
        for row in result.speed
        if row.format == "bf16"
    }
    for row in result.speed:
        mask = "causal" if row.causal else "full"
        shape = f"{row.batch} × {row.seqlen} × {row.heads} × {row.head_dim}, {mask}"
        times = (row.quantize_ms, row.attention_ms, row.total_ms)
        ratio = base[row.batch, row.seqlen, row.causal] / row.total_ms
        cells = [f"{time:.3f}" for time in times]
        rows.append([shape, f"`{row.format}`", *cells, f"**{ratio:.2f}**"])
    header = [
        "batch × tokens × heads × d",
        "format",
        "quantize",
        "attention",
        "both",
        "bf16 / both",
    ]
    where = f"Milliseconds, {result.environment['device']}, {result.environment['date']}."
    return f"{table(header, rows, left=2)}\n\n{where}"
