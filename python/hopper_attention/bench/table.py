"""Tables of results for a terminal, plain where the output is none."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hopper_attention.bench import backward_table, fp8_table, varlen_table
from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.host import PARTS, compare_host
from hopper_attention.bench.ratios import Comparison, RowRatio, compare_records, ratio_line
from hopper_attention.bench.records import Record
from hopper_attention.bench.rmse import STANDARD
from hopper_attention.bench.shapes import BACKWARD_SUITES, FP8_SUITES, short_dtype

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
        if suite == "backward-rmse":
            _print_gradients(console, records)
            continue
        if suite == "varlen":
            _print_varlen(console, records)
            continue
        if suite in FP8_SUITES:
            _print_fp8(console, suite, records)
            continue
        comparisons = compare_host(records) if suite == "host" else compare_records(records, suite)
        if suite in ("forward", "backward"):
            of_forward = backward_table.BACKWARD_RATIOS[:1]
            rows = of_forward if suite == "forward" else backward_table.BACKWARD_RATIOS
            console.print(_grid_table(console, f"{suite}, bf16, TFLOP/s", comparisons, rows))
        else:
            console.print(_list_table(console, suite, comparisons))
        if suite == "host":
            _print_host_parts(console, records)
        lines = [summary_line(suite, comparisons)]
        if suite in BACKWARD_SUITES:
            lines += backward_table.deterministic_lines(suite, comparisons)
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)


def summary_line(suite: str, comparisons: Sequence[Comparison]) -> str:
    """Says in a line how a suite's shapes compare with the best peers."""
    names = [p for p in PEERS if any(p in one.values for one in comparisons)]
    title = f"{suite}: ours / best of {', '.join(names)}"
    line = ratio_line(title, comparisons, lambda one: one.ratio)
    if line is None:
        return f"{suite}: no shape with both ours and a peer's measurement in one run"
    alone = sum(one.ratio is None for one in comparisons)
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


def _print_fp8(console: Console, suite: str, records: Sequence[Record]) -> None:
    """Prints the tables of a suite of e4m3, and the lines that sum it up."""
    if suite == "fp8":
        comparisons = fp8_table.compare_fp8(records)
        title = "fp8, TFLOP/s; fa3 in bf16"
        tables = [_grid_table(console, title, comparisons, fp8_table.FP8_RATIOS)]
        lines = fp8_table.fp8_lines(comparisons)
    elif suite == "quantize":
        tables = [_rates_table(console, records), _end_to_end_table(console, records)]
        lines = fp8_table.quantize_lines(records)
    else:
        found = fp8_table.read_accuracy(records)
        tables = [_recipes_table(console, found), _context_table(console, found)]
        lines = fp8_table.accuracy_lines(found)
    for table in tables:
        if table.row_count:
            console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _print_varlen(console: Console, records: Sequence[Record]) -> None:
    """Prints a table for each pass over packed batches, and the lines that sum it up."""
    for part in varlen_table.RATIOS:
        comparisons = varlen_table.compare_varlen(records, part)
        if not comparisons:
            continue
        console.print(_list_table(console, "varlen", comparisons, part))
        for line in varlen_table.varlen_lines(part, comparisons):
            console.print(line, soft_wrap=True, markup=False)


def _print_host_parts(console: Console, records: Sequence[Record]) -> None:
    """Prints a table for each of the suite's parts beyond the forward pass that was measured."""
    for part in PARTS:
        if comparisons := compare_host(records, part):
            console.print(_list_table(console, "host", comparisons, part))


def _rates_table(console: Console, records: Sequence[Record]) -> Table:
    """GB/s of the quantizer, a row for each recipe, a column for each head dimension."""
    rates = fp8_table.quantizer_rates(records)
    table = _new_table(console, "quantize, GB/s (over the copy's)")
    table.add_column("recipe", no_wrap=True)
    for one in rates:
        table.add_column(f"d{one.shape.head_dim}", justify="right", no_wrap=True)
    for recipe in dict.fromkeys(name for one in rates for name in one.by_recipe):
        cells = []
        for one in rates:
            rate, share = one.by_recipe.get(recipe), one.share(recipe)
            words = _MISSING if rate is None else f"{rate:.0f}"
            cells.append(words if share is None else f"{words} ({share:.2f})")
        table.add_row(recipe, *cells)
    if rates:
        copies = [_MISSING if one.copy is None else f"{one.copy:.0f}" for one in rates]
        table.add_row("copy", *copies)
    return table


def _end_to_end_table(console: Console, records: Sequence[Record]) -> Table:
    """TFLOP/s from 16-bit tensors to the output."""
    table = _new_table(console, "quantize and attention, TFLOP/s")
    for name in ("shape", "e4m3", "bf16", "ratio"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    for one in fp8_table.end_to_end(records):
        speeds = [_MISSING if x is None else f"{x:.0f}" for x in (one.fp8, one.bf16)]
        table.add_row(one.shape.label, *speeds, _ratio_text(one.ratio))
    return table


def _recipes_table(console: Console, found: fp8_table.Accuracy) -> Table:
    """Errors of each recipe, and how the emulation's compare."""
    table = _new_table(console, "fp8-accuracy: rmse against float64")
    distributions = list(dict.fromkeys(name for _, name in found.rmse))
    table.add_column("recipe", no_wrap=True)
    for name in distributions:
        table.add_column(name, justify="right", no_wrap=True)
    for name in distributions:
        table.add_column(f"emulated / card, {name}", justify="right", no_wrap=True)
    for recipe in dict.fromkeys(name for name, _ in found.rmse):
        cells = []
        for values, digits in ((found.rmse, ".3e"), (found.emulated, ".3f")):
            for name in distributions:
                value = values.get((recipe, name))
                cells.append(_MISSING if value is None else f"{value:{digits}}")
        table.add_row(recipe, *cells)
    return table


def _context_table(console: Console, found: fp8_table.Accuracy) -> Table:
    """The mean error of uniform attention by keys, in percent."""
    table = _new_table(console, "fp8-accuracy: mean error of uniform attention, %")
    contexts = sorted({keys for _, _, keys in found.bias})
    table.add_column("d", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for keys in contexts:
        table.add_column(_short_length(keys), justify="right", no_wrap=True)
    for head_dim, impl in sorted({key[:2] for key in found.bias}):
        values = [found.bias.get((head_dim, impl, keys)) for keys in contexts]
        cells = [_MISSING if value is None else f"{100 * value:+.2f}" for value in values]
        table.add_row(str(head_dim), impl, *cells)
    return table


def _grid_table(
    console: Console,
    title: str,
    comparisons: Sequence[Comparison],
    ratios: Sequence[RowRatio],
) -> Table:
    """TFLOP/s by sequence length, with rows of ratios for each head dimension and mask."""
    lengths = sorted({one.shape.seqlen_q for one in comparisons})
    table = _new_table(console, title)
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
        for label, ratio_of in ratios:
            texts = [_ratio_text(ratio_of(one) if one else None) for one in cells]
            last = label == ratios[-1][0]
            table.add_row(*titles, f"[bold]{label}[/]", *texts, end_section=last)
    return table


def _list_table(
    console: Console, suite: str, comparisons: Sequence[Comparison], part: str = ""
) -> Table:
    """A row for each shape, a column for each implementation."""
    unit = "µs of the host's time a call" if suite == "host" else "TFLOP/s"
    if suite in BACKWARD_SUITES:
        unit += "; det: deterministic"
    table = _new_table(console, f"{suite}{part and f' {part}'}, {unit}")
    table.add_column("shape", no_wrap=True)
    names = _implementations(comparisons)
    for name in names:
        title = name.replace(OURS, "ours").replace("_deterministic", " det").replace("_", " ")
        table.add_column(title, justify="right", no_wrap=True)
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


def _print_gradients(console: Console, records: Sequence[Record]) -> None:
    """Prints errors of gradients, a row for each, and the lines that sum them up."""
    found = backward_table.read_errors(records)
    present = {name for one in found for name in one.rmse}
    names = [name for name in (OURS, *PEERS, STANDARD) if name in present]
    table = _new_table(console, "backward-rmse against float64")
    for title in ("dtype", "shape", "values", ""):
        table.add_column(title, no_wrap=True)
    for name in names:
        table.add_column("ours" if name == OURS else name, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for one in found:
        numbers = [f"{one.rmse[name]:.3g}" if name in one.rmse else _MISSING for name in names]
        ratio = one.ratio()
        titles = [short_dtype(one.shape.dtype), f"d{one.shape.head_dim} {one.shape.mask}"]
        titles += [one.distribution, one.part]
        table.add_row(*titles, *numbers, _MISSING if ratio is None else f"{ratio:.3f}")
    console.print(table)
    for line in backward_table.error_lines(found):
        console.print(line, soft_wrap=True, markup=False)


def _dims(record: Record) -> str:
    shape: dict[str, int] = {name: record[name] for name in ("batch", "seqlen_q", "heads")}
    return "b{batch} s{seqlen_q} h{heads}".format(**shape)


def _short_length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
