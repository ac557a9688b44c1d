"""``hopper-attention tune``: timing the candidate configs of a kernel on the card at hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from hopper_attention.bench.shapes import Shape
    from hopper_attention.tune.build import Builder, Built
    from hopper_attention.tune.candidates import Candidates
    from hopper_attention.tune.rules import Instance, Rules

_LENGTHS = "512,2048,16384"
_SHORT_LENGTHS = "256,512,1024"


def tune(
    instance: Annotated[
        str | None,
        typer.Argument(help="Name of a kernel, such as bf16_d128_full; none lists them."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="The source checkout; by default the one that this is run in."),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE,...",
            help="Values to try of a field of ForwardConfig, or FIELD=all; repeatable, for every "
            "combination. Without it, the neighbourhood of the chosen config.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help=f"Sequence lengths; by default {_LENGTHS}, of a kernel for few keys "
            f"{_SHORT_LENGTHS}.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="full or causal; by default causal for a masked kernel."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each candidate.")] = 5,
    reps: Annotated[int, typer.Option(min=1, help="Timed calls of a problem in a turn.")] = 10,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Kernels compiled at once; by default cores and memory decide."),
    ] = None,
    build_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where candidates are compiled, and kept; by default build/tune in the checkout."
        ),
    ] = None,
    definitions: Annotated[
        list[str] | None,
        typer.Option("--define", metavar="NAME=VALUE", help="A CMake definition; repeatable."),
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile, time nothing; needs no card.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to put the results into.")
    ] = None,
) -> None:
    """Compiles candidate configs of a forward kernel and times them, for the choice in config.h.

    Each candidate is a library of its own, timed in processes of its own, the candidates in turn;
    outputs are checked against float64. Needs a source checkout, nvcc and CMake. The exit code is 1
    when the chosen config or everything else failed.
    """
    from hopper_attention.tune.report import make_console
    from hopper_attention.tune.rules import TuneError, find_source

    console = make_console()
    try:
        root = find_source(source)
        with _rules(root) as rules:
            if instance is None:
                _list(console, rules)
                return
            row = _find(rules, instance)
            shapes = _shapes(row, lengths, mask)
            candidates = _candidates(rules, row, choices or [])
        _say_left_out(console, candidates)
        if not compile_only:
            _check_card()
        folder = build_dir or root / "build" / "tune"
        builder = _builder(root, folder, row, definitions or [])
        built = _build(console, builder, candidates, jobs)
        header = _header(builder)
        code = _finish(
            console, row, built, shapes, header, (0 if compile_only else rounds), reps, json_file
        )
    except TuneError as error:
        console.print(f"tune: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    raise typer.Exit(code)


@contextmanager
def _rules(root: Path) -> Iterator[Rules]:
    from hopper_attention.tune.rules import Rules

    with tempfile.TemporaryDirectory(prefix="hopper-attention-tune-") as folder:
        yield Rules(root, Path(folder))


def _list(console: Console, rules: Rules) -> None:
    from hopper_attention.tune.rules import label

    width = max(len(name) for name in rules.instances)
    for name, row in rules.instances.items():
        console.print(f"{name:<{width}}  {label(row.chosen)}", soft_wrap=True, markup=False)


def _find(rules: Rules, name: str) -> Instance:
    if name not in rules.instances:
        raise typer.BadParameter(
            f"no kernel is named {name!r}; the names are {', '.join(rules.instances)}",
            param_hint="INSTANCE",
        )
    return rules.instances[name]


def _shapes(row: Instance, lengths: str | None, mask: str | None) -> list[Shape]:
    from hopper_attention.tune.run import problems

    if mask not in (None, "full", "causal"):
        raise typer.BadParameter(f"mask is {mask!r}; allowed: full, causal", param_hint="--mask")
    if lengths is None:
        lengths = _SHORT_LENGTHS if row.mask == "short" else _LENGTHS
    try:
        numbers = [int(text) for text in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{lengths!r} must be integers separated by commas", param_hint="--lengths"
        ) from None
    try:
        return problems(row, numbers, mask)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="INSTANCE, --lengths or --mask") from error


def _candidates(rules: Rules, row: Instance, choices: Sequence[str]) -> Candidates:
    from hopper_attention.tune.candidates import choose, parse_choices

    try:
        return choose(rules, row, parse_choices(rules, row, choices))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error


def _say_left_out(console: Console, candidates: Candidates) -> None:
    from hopper_attention.tune.rules import label

    for cost in candidates.left_out:
        words = f"left out: {label(cost.config)}: {cost.error}"
        console.print(words, markup=False, soft_wrap=True)


def _check_card() -> None:
    import hopper_attention
    from hopper_attention.tune.rules import TuneError

    reason = hopper_attention.unavailable_reason()
    if reason is not None:
        raise TuneError(f"nothing can be timed here ({reason}); --compile-only needs no card")


def _builder(root: Path, folder: Path, row: Instance, definitions: Sequence[str]) -> Builder:
    from hopper_attention.tune.build import Builder, find_nvcc
    from hopper_attention.tune.rules import TuneError

    try:
        nvcc = find_nvcc()
    except TuneError:
        nvcc = None  # what was compiled elsewhere can be timed; the builder says where it cannot
    return Builder(root, folder, row, nvcc, tuple(definitions))


def _build(
    console: Console, builder: Builder, candidates: Candidates, jobs: int | None
) -> list[Built]:
    from hopper_attention.tune.build import default_jobs

    total = len(candidates.costs)
    with _bar(console, total) as step:
        step(f"compiling {total} candidates", 0)
        return builder.build(
            candidates.costs, jobs or default_jobs(), lambda: step(f"compiling {total} candidates")
        )


def _finish(
    console: Console,
    row: Instance,
    built: Sequence[Built],
    shapes: Sequence[Shape],
    header: dict[str, Any],
    rounds: int,
    reps: int,
    json_file: Path | None,
) -> int:
    """Times what was built, unless rounds is 0, and shows it; returns the exit code."""
    from hopper_attention.tune import report, run, worker

    processes = worker.Processes()

    def measure(job: worker.Job) -> dict[str, float]:
        times: dict[str, float] = processes.call(worker.load_and_measure, job)
        return times

    with _bar(console, rounds * len(built)) as step:
        results = run.take_turns(row, built, shapes, rounds, reps, measure, step)
    console.print(report.make_table(console, row, results, shapes if rounds else []))
    for result in results:
        if result.error is not None:
            words = f"failed: {result.built.label}: {result.error}"
            console.print(words, markup=False, soft_wrap=True)
    line = report.summary(results, shapes)
    if line is not None:
        console.print(line, markup=False, soft_wrap=True)
    console.print("; ".join(f"{k} {v}" for k, v in header.items()), markup=False, soft_wrap=True)
    if json_file is not None:
        header = {**header, "rounds": rounds, "reps": reps}
        text = json.dumps(report.document(header, row, results, shapes), indent=1)
        json_file.write_text(text + "\n")
        console.print(f"written: {escape(str(json_file))}", soft_wrap=True)
    return 1 if not results or results[0].error is not None else 0


def _header(builder: Builder) -> dict[str, Any]:
    from hopper_attention.bench import machine, sources
    from hopper_attention.tune.build import nvcc_version

    nvcc = nvcc_version(builder.nvcc) if builder.nvcc else None
    return {**machine.describe(), "sources": sources.tree_hash(builder.source), "nvcc": nvcc}


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def step(label: str, advance: int = 1) -> None:
            bar.update(task, description=label, advance=advance)

        yield step
