"""Puts measured figures into README.md and docs/, and draws their pictures.

A section between `<!-- begin NAME -->` and `<!-- end NAME -->` holds nothing written by hand: it is
made here from stored results, and tests/python/test_readme.py compares the two.

    python tools/readme_tables.py           writes the sections and the pictures
    python tools/readme_tables.py --check   changes nothing; says which sections are out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import readme_backward
import readme_dtypes
import readme_fp8
import readme_training
import readme_varlen
from md_tables import MISSING, NAMES, length, listing, number, table

import hopper_attention
from hopper_attention.bench import records
from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.host import PARTS, compare_host
from hopper_attention.bench.plot import plot_forward
from hopper_attention.bench.ratios import Comparison, compare_records, summary
from hopper_attention.bench.shapes import short_dtype
from hopper_attention.study import Study
from hopper_attention.study.plots import plot_heads
from hopper_attention.study.plots_fp8 import plot_context, plot_recipes
from hopper_attention.study.recipes import is_fp8
from hopper_attention.study.records import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200.json"
STUDY = ROOT / "benchmarks" / "results" / "study_cpu.json"
EVIDENCE = ROOT / "tests" / "gpu" / "evidence.json"
TILES = Path(hopper_attention.__file__).parent / "tiles.json"
CARD_STUDY = ROOT / "benchmarks" / "results" / "study_h200.json"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("architecture", "backward", "fp8", "performance", "training")
    ),
)
FORWARD_PICTURE = ROOT / "docs" / "images" / "forward_h200.png"
STUDY_PICTURE = ROOT / "docs" / "images" / "study_heads.png"
RECIPES_PICTURE = ROOT / "docs" / "images" / "fp8_recipes.png"
CONTEXT_PICTURE = ROOT / "docs" / "images" / "fp8_context.png"

_DISTRIBUTIONS = {"normal": "N(0, 1)", "outliers": "N(0, 1) + N(0, 100) · Bernoulli(0.001)"}

Document = Mapping[str, Any]


def _implementations(comparisons: Sequence[Comparison]) -> list[str]:
    present = {name for one in comparisons for name in one.values}
    return [name for name in (OURS, *PEERS) if name in present]


def _ratio(comparison: Comparison | None) -> str:
    ratio = None if comparison is None else comparison.ratio
    return MISSING if ratio is None else f"{ratio:.2f}"


def _summary_of(comparisons: Sequence[Comparison]) -> str:
    """Mean and least of a suite's ratios, as a sentence; empty where there are none."""
    rated = [(one.ratio, one) for one in comparisons if one.ratio is not None]
    found = summary([ratio for ratio, _ in rated])
    if found is None:
        return ""
    least = min(rated, key=lambda pair: pair[0])[1]
    peers = listing([NAMES[name] for name in _implementations(comparisons) if name != OURS])
    return (
        f"hopper-attention runs at {found[0]:.2f} times the speed of the fastest of {peers}: the "
        f"geometric mean of {len(rated)} shapes, each against the peer that is fastest there. The "
        f"least ratio is {found[1]:.2f} ({least.shape.label})."
    )


def headline(results: Document) -> str:
    """What the picture shows, in two sentences."""
    comparisons = compare_records(results["records"], "forward")
    shape = comparisons[0].shape
    tokens, hidden = shape.batch * shape.seqlen_q, shape.heads * shape.head_dim
    return (
        f"One {results['device']}, {short_dtype(shape.dtype)} forward, {tokens:,} tokens, hidden "
        f"size {hidden:,}, {str(results['date'])[:10]}. {_summary_of(comparisons)}"
    )


def machine(results: Document) -> str:
    """Where and when the figures were measured."""
    run, ceilings = records.run_of(results, "forward")
    return (
        f"{results['device']}, driver {results['driver']}, CUDA {results['cuda']}, PyTorch "
        f"{results['torch']}, {run}. In the same run a bf16 matrix product of 8192³ "
        f"reached {ceilings['matmul_bf16_tflops']:.0f} TFLOP/s, and a device copy "
        f"{ceilings['copy_gbps']:,.0f} GB/s read plus written."
    )


def forward(results: Document) -> str:
    """TFLOP/s of suite forward by length."""
    comparisons = compare_records(results["records"], "forward")
    lengths = sorted({one.shape.seqlen_q for one in comparisons})
    groups: dict[tuple[int, str], dict[int, Comparison]] = {}
    for one in comparisons:
        group = groups.setdefault((one.shape.head_dim, one.shape.mask), {})
        group[one.shape.seqlen_q] = one
    rows = []
    for (head_dim, mask), bylength in groups.items():
        cells = [bylength.get(length) for length in lengths]
        for name in _implementations(list(bylength.values())):
            values = [one.values.get(name) if one else None for one in cells]
            numbers = [MISSING if value is None else f"{value:.0f}" for value in values]
            rows.append([str(head_dim), mask, NAMES[name], *numbers])
        rows.append(["", "", "**ours / best peer**", *(f"**{_ratio(one)}**" for one in cells)])
    return table(["d", "mask", "TFLOP/s", *map(length, lengths)], rows, left=3)


def _by_row(named: Sequence[tuple[str, Comparison]], unit: str, digits: int) -> str:
    """A table with a row for each comparison, named so."""
    names = _implementations([one for _, one in named])
    rows = []
    for title, one in named:
        numbers = [number(one.values.get(name), digits) for name in names]
        rows.append([title, *numbers, f"**{_ratio(one)}**"])
    return table([unit, *(NAMES[name] for name in names), "ours / best peer"], rows)


def _by_shape(comparisons: Sequence[Comparison], unit: str, digits: int) -> str:
    text = _by_row([(one.shape.label, one) for one in comparisons], unit, digits)
    return f"{_summary_of(comparisons)}\n\n{text}"


def shapes(results: Document) -> str:
    """TFLOP/s of suite forward-shapes."""
    return _by_shape(compare_records(results["records"], "forward-shapes"), "TFLOP/s", 0)


def host(results: Document) -> str:
    """Microseconds of suite host; of its parts, too, where they were measured."""
    found = results["records"]
    text = _by_shape(compare_host(found), "µs a call", 1)
    parts = [(part, one) for part in PARTS for one in compare_host(found, part)]
    if not parts:
        return text
    words = f"Other calls of {parts[0][1].shape.label}; both passes go through autograd:"
    return f"{text}\n\n{words}\n\n{_by_row(parts, 'µs a call', 1)}"


def rmse(results: Document) -> str:
    """Errors of suite rmse."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for record in results["records"]:
        if record["suite"] == "rmse":
            key = (short_dtype(record["dtype"]), _DISTRIBUTIONS[record["distribution"]])
            rows.setdefault(key, {})[record["impl"]] = record["rmse"]
    names = [name for name in NAMES if any(name in values for values in rows.values())]
    lines = []
    for key, values in rows.items():
        best = min(values[name] for name in PEERS if name in values)
        numbers = [f"{values[name]:.2e}" if name in values else MISSING for name in names]
        lines.append([*key, *numbers, f"**{values[OURS] / best:.3f}**"])
    header = ["dtype", "inputs", *(NAMES[name] for name in names), "ours / best peer"]
    return table(header, lines, left=2)


def evidence(found: Document) -> str:
    """The GPU tests' outcome."""
    if "passed" in found:
        text = (
            f"GPU tests on one {found['device']}, {str(found['date'])[:10]}: {found['passed']} "
            f"passed, {found['failed']} failed, {found['skipped']} skipped."
        )
    else:
        text = "No outcome of the GPU tests is stored."
    if "pending" in found:
        text += f" **Pending: {found['pending']}.** So figures here may be of older kernels."
    return text


def study(result: Study) -> str:
    """Relative errors by source, and what they say."""
    rows, sentences = [], []
    for source in result.sources:
        by = {(row.method, row.format): row for row in result.select("all", source.name)}
        formats = list(dict.fromkeys(name for _, name in by if not is_fp8(name)))
        for name in formats:
            usual, ours = by["standard", name], by["ours", name]
            cells = [f"{row.relative_rmse:.2e}" for row in (usual, ours)]
            ratio = ours.relative_rmse / usual.relative_rmse
            alone = ours.arithmetic_relative_rmse / usual.arithmetic_relative_rmse
            title = source.title.split(" on ")[0]
            rows.append([title, name, *cells, f"**{ratio:.2f}**", f"{alone:.2f}"])
    heads = {
        (row.format, row.layer, row.head, row.method): row.relative_rmse
        for row in result.select("head", "model")
        if not is_fp8(row.format)
    }
    for name in dict.fromkeys(key[0] for key in heads):
        ratios = [
            error / heads[name, layer, head, "standard"]
            for (format_name, layer, head, method), error in heads.items()
            if (format_name, method) == (name, "ours")
        ]
        better = sum(ratio < 1 for ratio in ratios)
        sentences.append(
            f"In {name}, ours is nearer to float64 in {better} of the model's {len(ratios)} heads; "
            f"its error there is {min(ratios):.2f} to {max(ratios):.2f} times standard's."
        )
    header = ["inputs", "format", "standard", "ours", "ours / standard", "arithmetic alone"]
    by_whom = listing(sorted({row.by for row in result.rows if row.method == "ours"}))
    where = f"Relative RMSE against float64; ours by {by_whom}, {result.environment['device']}."
    return f"{' '.join(sentences)}\n\n{table(header, rows, left=2)}\n\n{where}"


def tiles(instances: Sequence[Document]) -> str:
    """The kernels' tiles by head dimension; both dtypes have the same."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for one in instances:
        dims = str(one["head_dim"])
        if one["head_dim_v"] != one["head_dim"]:
            dims += f", V {one['head_dim_v']}"
        tile = f"{one['tile_m']} × {one['tile_n']}"
        key = (dims, one["mask"], tile, str(one["num_consumers"]), str(one["stages"]))
        rows.setdefault(key, []).append(short_dtype(one["dtype"]))
    header = ["head dim", "mask", "tile, rows × keys", "consumers", "stages", "dtypes"]
    return table(header, [[*key, ", ".join(dtypes)] for key, dtypes in rows.items()], left=2)


_FROM_RESULTS: dict[str, Callable[[Document], str]] = {
    "headline": headline,
    "machine": machine,
    "forward": forward,
    "shapes": shapes,
    "host": host,
    "rmse": rmse,
    "backward": readme_backward.backward,
    "backward_deterministic": readme_backward.deterministic,
    "backward_shapes": readme_backward.shapes,
    "backward_rmse": readme_backward.rmse,
    "varlen_forward": readme_varlen.forward,
    "varlen_backward": readme_varlen.backward,
    "fp8_headline": readme_fp8.headline,
    "fp8_forward": readme_fp8.forward,
    "fp8_quantizer": readme_fp8.quantizer,
    "fp8_end_to_end": readme_fp8.end_to_end,
    "fp8_rmse": readme_fp8.rmse,
    "fp8_uniform": readme_fp8.uniform,
    "dtypes": readme_dtypes.dtypes,
}


def make_sections(results: Path = RESULTS) -> tuple[dict[str, str], dict[str, Path]]:
    """Makes every section whose source is there.

    Args:
        results: a result file of `hopper-attention bench all`.

    Returns:
        The text of each section by name, and the missing file of each that cannot be made.
    """
    sources: dict[str, tuple[Path, Callable[[], str]]] = {
        "evidence": (EVIDENCE, lambda: evidence(json.loads(EVIDENCE.read_text()))),
        "study": (STUDY, lambda: study(read_json(STUDY))),
        "fp8_recipes": (STUDY, lambda: readme_fp8.fp8_recipes(read_json(STUDY))),
        "fp8_context": (STUDY, lambda: readme_fp8.fp8_context(read_json(STUDY))),
        "fp8_words": (STUDY, lambda: readme_fp8.fp8_words(read_json(STUDY))),
        "fp8_speed": (CARD_STUDY, lambda: readme_fp8.fp8_speed(read_json(CARD_STUDY))),
        "tiles": (TILES, lambda: tiles(json.loads(TILES.read_text()))),
    }
    document: Document = records.load(results) if results.exists() else {"records": []}
    for name, make_one in _FROM_RESULTS.items():
        sources[name] = (results, partial(make_one, document))
    suites = {record["suite"] for record in document["records"]}
    suite_of = readme_backward.SUITE_OF | readme_varlen.SUITE_OF | readme_fp8.SUITE_OF
    suite_of |= readme_dtypes.SUITE_OF
    absent = {name for name, suite in suite_of.items() if suite not in suites}
    made, missing = {"training": readme_training.section()}, {}
    for name, (path, make) in sources.items():
        if path.exists() and name not in absent:
            made[name] = make()
        else:
            missing[name] = path
    return made, missing


def sections_of(page: str) -> dict[str, str]:
    """The sections of a page, by name."""
    pattern = r"<!-- begin (\w+) -->\n\n(.*?)\n\n<!-- end \1 -->"
    return {match[1]: match[2] for match in re.finditer(pattern, page, re.DOTALL)}


def replace_sections(page: str, made: Mapping[str, str]) -> str:
    """The page with new text in those of its sections that were made."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in made:
            return match[0]
        return f"{match[1]}\n{made[match[2]]}\n\n{match[3]}"

    pattern = r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)"
    return re.sub(pattern, fill, page, flags=re.DOTALL)


def main() -> int:
    """Writes or checks the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of benchmark results")
    args = parser.parse_args()
    made, missing = make_sections(args.results)
    for name, path in missing.items():
        print(f"section {name} stays as it is: nothing for it in {path}")
    stale = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = replace_sections(old, made)
        if new != old:
            stale.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    if args.check:
        return 1 if stale else 0
    readme_training.draw()
    if args.results.exists():
        plot_forward(records.load(args.results), FORWARD_PICTURE)
    if STUDY.exists():
        STUDY_PICTURE.parent.mkdir(parents=True, exist_ok=True)
        stored = read_json(STUDY)
        plot_heads(stored, STUDY_PICTURE)
        plot_recipes(stored, RECIPES_PICTURE)
        plot_context(stored, CONTEXT_PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
