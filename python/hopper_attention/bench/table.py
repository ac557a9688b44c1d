"""Tables of results for a terminal, plain where the output is none."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.ratios import Comparison, compare_records, summary
from hopper_attention.bench.records import Record
from hopper_attention.bench.rmse import STANDARD
from hopper_attention.bench.shapes import short_dtype

_MISSING = "-"
_PLAIN_WIDTH = 100


def make_console(stderr: bool = False) -> Console:
    """Makes a console that is plain, and wide enough for every table, when it is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        return Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH, no_color=True)
    return console


def print_results(console: Console, records: Sequence[Record]) -> None:
    """Prints a table for each suite that has records, then the summary of its ratios."""
    suites = list(dict.fromkeys(record["suite"] for record in records))
    for suite in suites:
        if suite == "rmse":
            console.print(_rmse_table(console, [r for r in records if r["suite"] == suite]))
            continue
        comparisons = compare_records(records, suite)
        if suite == "forward":
            console.print(_grid_table(console, comparisons))
        else:
            console.print(_list_table(console, suite, comparisons))
        console.print(summary_line(suite, comparisons), soft_wrap=True, markup=False)


def summary_line(suite: str, comparisons: Sequence[Comparison]) -> str:
    """Says in a line how a suite's shapes compare with the best peers."""
    ratios = [one.ratio for one in comparisons if one.ratio is not None]
    found = summary(ratios)
    if found is None:
        return f"{suite}: no shape with both ours and a peer's measurement in one run"
    mean, least = found
    worst = next(one for one in comparisons if one.ratio == least)
    names = [p for p in PEERS if any(p in one.values for one in comparisons)]
    line = (
        f"{suite}: ours / best of {', '.join(names)}: geometric mean {mean:.3f}, "
        f"least {least:.3f} ({worst.shape.label}), {len(ratios)} shapes"
    )
    alone = len(comparisons) - len(ratios)
    return f"{line}; {alone} without a ratio" if alone else line


def _new_table(console: Console, title: str) -> Table:
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2
    return Table(title=title, box=style, title_justify="left", padding=(0, 1))


def _ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return _MISSING
    color = "green" if ratio >= 1.0 else "yellow" if ratio >= 0.85 else "red"
    return f"[bold {color}]{ratio:.2f}[/]"


def _implementations(comparisons: Sequence[Comparison]) -> list[str]:
    present = {name for one in comparisons for name in one.values}
    known = [name for name in (OURS, *PEERS) if name in present]
    return known + sorted(present.difference(known))


def _grid_table(console: Console, comparisons: Sequence[Comparison]) -> Table:
    """TFLOP/s by sequence length, with a row of ratios for each head dimension and mask."""
    lengths = sorted({one.shape.seqlen_q for one in comparisons})
    table = _new_table(console, "forward, bf16, TFLOP/s")
    for name in ("d", "mask", "implementation"):
        table.add_column(name, no_wrap=True)
    for length in lengths:
        table.add_column(_short_length(length), justify="right", no_wrap=True)
    groups: dict[tuple[int, str], dict[int, Comparison]] = {}
    for one in comparisons:
        group = groups.setdefault((one.shape.head_dim, one.shape.mask), {})
        group[one.shape.seqlen_q] = one
    for (head_dim, mask), by_length in groups.items():
        cells = [by_length.get(length) for length in lengths]
        titles = [str(head_dim), mask]
        for name in _implementations(list(by_length.values())):
            values = [one.values.get(name) if one else None for one in cells]
            numbers = [_MISSING if value is None else f"{value:.0f}" for value in values]
            table.add_row(*titles, name, *numbers)
            titles = ["", ""]
        ratios = [_ratio_text(one.ratio if one else None) for one in cells]
        table.add_row(*titles, "[bold]ours / best peer[/]", *ratios, end_section=True)
    return table


def _list_table(console: Console, suite: str, comparisons: Sequence[Comparison]) -> Table:
    """A row for each shape, a column for each implementation."""
    unit = "µs of the host's time a call" if suite == "host" else "TFLOP/s"
    table = _new_table(console, f"{suite}, {unit}")
    table.add_column("shape", no_wrap=True)
    names = _implementations(comparisons)
    for name in names:
        table.add_column("ours" if name == OURS else name, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    digits = 1 if suite == "host" else 0
    for one in comparisons:
        values = [one.values.get(name) for name in names]
        numbers = [_MISSING if value is None else f"{value:.{digits}f}" for value in values]
        table.add_row(one.shape.label, *numbers, _ratio_text(one.ratio))
    return table


def _rmse_table(console: Console, records: Sequence[Record]) -> Table:
    """Errors of each implementation by dtype and distribution, and ours over the best peer's."""
    table = _new_table(console, "rmse against float64")
    present = {record["impl"] for record in records}
    names = [name for name in (OURS, *PEERS, STANDARD) if name in present]
    names += sorted(present.difference(names))
    table.add_column("dtype", no_wrap=True)
    table.add_column("values", no_wrap=True)
    for name in names:
        table.add_column("ours" if name == OURS else name, justify="right", no_wrap=True)
    table.add_column("ours / best peer", justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        key = (record["dtype"], record["distribution"], _dims(record))
        rows.setdefault(key, {})[record["impl"]] = record["rmse"]
    several = len({dims for _, _, dims in rows}) > 1
    for (dtype, distribution, dims), values in rows.items():
        peers = [values[name] for name in PEERS if name in values]
        ratio = _MISSING
        if peers and OURS in values:
            ratio = f"{values[OURS] / min(peers):.3f}"
        numbers = [f"{values[name]:.3g}" if name in values else _MISSING for name in names]
        title = f"{distribution} {dims}" if several else distribution
        table.add_row(short_dtype(dtype), title, *numbers, ratio)
    return table


def _dims(record: Record) -> str:
    shape: dict[str, int] = {name: record[name] for name in ("batch", "seqlen_q", "heads")}
    return "b{batch} s{seqlen_q} h{heads}".format(**shape)


def _short_length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
