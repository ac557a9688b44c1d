"""The table of candidates, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hopper_attention.bench.shapes import Shape
from hopper_attention.tune.rules import Config, Instance, show
from hopper_attention.tune.run import Result

_PLAIN_WIDTH = 160


def make_console() -> Console:
    """Makes a console that is plain, and wide enough for the table, when it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        return Console(highlight=False, width=_PLAIN_WIDTH, no_color=True)
    return console


def ranked(results: Sequence[Result], shapes: Sequence[Shape]) -> list[Result]:
    """Sorts results by speed, the fastest first; without times, as they are; failures last."""
    fine = [result for result in results if result.error is None]
    if fine and all(result.rounds for result in fine):
        reference = fine[0]
        fine = sorted(fine, key=lambda one: one.speed(reference, shapes), reverse=True)
    return fine + [result for result in results if result.error is not None]


def make_table(
    console: Console, instance: Instance, results: Sequence[Result], shapes: Sequence[Shape]
) -> Table:
    """Makes the table, a row for each candidate that was built, sorted by speed.

    TFLOP/s come with milliseconds of a call in brackets; "speed" is the geometric mean over the
    problems of the chosen config's time over the candidate's.
    """
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2
    title = f"{instance.name}, TFLOP/s (ms)"
    table = Table(title=title, box=style, title_justify="left", padding=(0, 1))
    for name in instance.chosen:
        table.add_column(name.replace("num_", "").replace("_", " "), justify="right")
    for name in ("registers", "spilled", "shared KiB"):
        table.add_column(name, justify="right")
    for shape in shapes:
        table.add_column(f"{shape.mask} {shape.seqlen_q}", justify="right", no_wrap=True)
    table.add_column("speed", justify="right")
    table.add_column("")
    chosen = next((one for one in results if one.chosen and one.error is None), None)
    for result in ranked(results, shapes):
        report = result.built.ptxas
        if report is None:
            continue
        cells = [show(value).removeprefix("k") for value in result.built.cost.config.values()]
        cells += [str(report.registers), str(report.spill_bytes)]
        cells.append(f"{result.built.cost.shared_bytes / 1024:.0f}")
        for shape in shapes:
            timed = result.error is None and result.rounds
            rate = f"{result.tflops(shape):.0f} ({result.ms(shape):.3f})" if timed else "-"
            cells.append(rate)
        compared = chosen is not None and chosen.rounds and result.rounds and result.error is None
        cells.append(f"{result.speed(chosen, shapes):.3f}" if chosen and compared else "-")
        cells.append(_remark(result))
        table.add_row(*cells, style="bold" if result.chosen else "")
    return table


def summary(results: Sequence[Result], shapes: Sequence[Shape]) -> str | None:
    """Says how the fastest compares with the chosen one; None where they were not timed."""
    timed = [one for one in ranked(results, shapes) if one.error is None and one.rounds]
    chosen = next((one for one in timed if one.chosen), None)
    if chosen is None:
        return None
    best = timed[0]
    if best is chosen:
        return f"the chosen config is the fastest of {len(timed)}"
    changed = _changes(best.built.cost.config, chosen.built.cost.config)
    speed = best.speed(chosen, shapes)
    return f"fastest of {len(timed)}: {changed}, {speed:.3f} times the chosen config's speed"


def document(
    header: dict[str, Any], instance: Instance, results: Sequence[Result], shapes: Sequence[Shape]
) -> dict[str, Any]:
    """Makes the file's content: the header, the problems, and the candidates, fastest first."""
    rows = []
    for result in ranked(results, shapes):
        built = result.built
        row: dict[str, Any] = {
            "config": built.cost.config,
            "chosen": result.chosen,
            "error": result.error,
            "shared_bytes": built.cost.shared_bytes,
            "fragment_registers": built.cost.fragment_registers,
        }
        if built.ptxas is not None:
            row["registers"] = built.ptxas.registers
            row["spill_bytes"] = built.ptxas.spill_bytes
            row["advisories"] = list(built.ptxas.advisories)
        if result.error is None and result.rounds:
            row["ms"] = {shape.label: round(result.ms(shape), 6) for shape in shapes}
            row["tflops"] = {shape.label: round(result.tflops(shape), 2) for shape in shapes}
        rows.append(row)
    return {**header, "instance": instance.name, "candidates": rows}


def _remark(result: Result) -> str:
    if result.error is not None:
        return "failed"
    advisories = result.built.ptxas.advisories if result.built.ptxas else ()
    return " ".join([*(["chosen"] if result.chosen else []), *advisories])


def _changes(config: Config, chosen: Config) -> str:
    return ", ".join(
        f"{name}={show(value)}" for name, value in config.items() if value != chosen[name]
    )
