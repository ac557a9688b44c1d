"""``hopper-attention bench``: timing the kernels against their peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SUITES_HELP = (
    "What to measure: forward, forward-shapes, host, rmse, backward, backward-shapes, "
    "backward-rmse, varlen, fp8, quantize, fp8-accuracy, or all. "
    "forward: bf16, d 64, 128, 256, 16,384 tokens; forward-shapes: other head dims, GQA, windows, "
    "fp16; host: the host's time a call, through autograd and in FP8 too; rmse: errors of whole "
    "outputs; backward: the backward pass alone, deterministic too, on forward's shapes from 1k "
    "on; backward-shapes: on other head dims, GQA, windows; backward-rmse: errors of dQ, dK and "
    "dV; varlen: packed batches, both passes, beside dense ones; fp8: forward's shapes in e4m3; "
    "quantize: the quantizer alone and with attention; fp8-accuracy: errors by recipe and by "
    "context."
)


def bench(
    suites: Annotated[list[str] | None, typer.Argument(help=_SUITES_HELP)] = None,
    peers: Annotated[bool, typer.Option(help="Time the peers, too.")] = True,
    peers_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with fa3.so and fa3_fp8.so (and libcudart.so.12, where they need that)."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Only shapes whose name matches, such as 'd128 causal' or 's(512|1024) '. A name "
            "reads 'bf16 d128 causal b4 s4096 h16'.",
        ),
    ] = None,
    reps: Annotated[int, typer.Option(min=20, help="Timed calls for each shape, at least.")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, for a first look.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="File to put the records into; those of the same sources and device stay in it.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the forward suite (.png, .svg, .pdf).")
    ] = None,
    plot_only: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Measure nothing: show a stored file, with --plot too."),
    ] = None,
) -> None:
    """Times hopper_attention against FlashAttention-3, cuDNN and FlashAttention-2.

    In FP8 against cuDNN (the package nvidia-cudnn-frontend) and vLLM's FlashAttention-3.

    Contestants take turns on each shape; their outputs are checked against float64 in the same run.
    The exit code is 1 when our own kernels did not run or were wrong anywhere.
    """
    from hopper_attention._extras import STUDY, MissingExtraError, require
    from hopper_attention.bench.shapes import SUITES
    from hopper_attention.bench.table import make_console

    console = make_console()
    if plot is not None:
        try:
            require(STUDY, "matplotlib")
        except MissingExtraError as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from error
    if plot_only is not None:
        _show_stored(console, plot_only, plot, suites)
        return
    names = list(SUITES) if suites and "all" in suites else list(dict.fromkeys(suites or []))
    unknown = [name for name in names if name not in SUITES]
    if not names or unknown:
        what = f"unknown suite {unknown[0]!r}" if unknown else "name a suite"
        raise typer.BadParameter(f"{what}: {', '.join(SUITES)} or all", param_hint="SUITES")
    raise typer.Exit(_measure(console, names, peers, peers_dir, only, reps, quick, json_file, plot))


def _show_stored(
    console: Console, source: Path, picture: Path | None, suites: Sequence[str] | None
) -> None:
    from hopper_attention.bench import records, table

    try:
        document = records.load(source)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--plot-only") from error
    wanted = [
        record
        for record in document["records"]
        if not suites or "all" in suites or record["suite"] in suites
    ]
    table.print_results(console, wanted)
    _print_machine(console, document)
    if picture is not None:
        _plot(console, document, picture)


def _measure(
    console: Console,
    names: Sequence[str],
    peers: bool,
    peers_dir: Path | None,
    only: str | None,
    reps: int,
    quick: bool,
    json_file: Path | None,
    picture: Path | None,
) -> int:
    import torch

    from hopper_attention.bench import runner, session, shapes, table
    from hopper_attention.bench.contestants import OURS

    try:
        plan = [(name, runner.select(shapes.suite_shapes(name, quick), only)) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    plan = [(name, chosen) for name, chosen in plan if chosen]
    if not plan:
        raise typer.BadParameter(f"{only!r} matches no shape", param_hint="--only")
    if not torch.cuda.is_available():
        console.print(
            "bench needs a CUDA device, and PyTorch finds none: `hopper-attention doctor` says why."
            " Stored results can be shown anywhere: --plot-only FILE.json",
            soft_wrap=True,
        )
        return 1
    takes_part, missing = _gather([name for name, _ in plan], peers, peers_dir)
    for name, reason in missing.items():
        console.print(f"{name} takes no part: {escape(reason)}", soft_wrap=True)
    if not any(takes_part.values()):
        console.print("nothing can be timed", soft_wrap=True)
        return 1
    stale = session.stale_sources()
    if stale is not None:
        console.print(f"warning: {escape(stale)}", soft_wrap=True)
    try:
        work = session.start(takes_part["forward"], plan, reps, json_file)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from error
    work.backward, work.fp8 = takes_part["backward"], takes_part["fp8"]
    work.varlen = takes_part["varlen"]
    lost = _run(console, work)
    document = work.document()
    table.print_results(console, work.outcome.records)
    _print_machine(console, document)
    _print_excluded(console, work.outcome.excluded)
    if json_file is not None and work.outcome.records:
        console.print(f"{escape(str(json_file))}: {escape(work.kept)}", soft_wrap=True)
        if work.header["sources"] is None:
            console.print(
                "warning: the sources were not found, so the file does not say which kernels these "
                "are; run this in the source tree",
                soft_wrap=True,
            )
    if picture is not None:
        _plot(console, document, picture)
    if lost is not None:
        console.print(f"stopped early: {escape(lost)}", soft_wrap=True)
    failed = OURS in missing or work.outcome.ours_failed() or lost is not None
    return 1 if failed else 0


def _gather(
    names: Sequence[str], peers: bool, peers_dir: Path | None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Collects who takes part in the suites of these names, by kind, and why others do not."""
    from hopper_attention.bench import backward, contestants, fp8, shapes, varlen

    kinds: dict[str, tuple[Sequence[str], Callable[..., tuple[Sequence[Any], dict[str, str]]]]] = {
        "fp8": (shapes.FP8_SUITES, fp8.gather_fp8),
        "backward": (shapes.BACKWARD_SUITES, backward.gather_backward),
        "varlen": (("varlen",), varlen.gather_varlen),
        "forward": (("forward", "forward-shapes", "host", "rmse"), contestants.gather),
    }
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    missing: dict[str, str] = {}
    for kind, (suites, gather) in kinds.items():
        if not set(names).isdisjoint(suites):
            takes_part, without = gather(peers, peers_dir)
            found[kind] = list(takes_part)
            missing.update(without)
    return found, missing


def _run(console: Console, work: Any) -> str | None:
    """Runs a session under a progress bar; returns why it stopped early, or None."""
    from hopper_attention.bench.runner import DeviceLostError

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=work.steps())
        done = -1

        def progress(label: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=label, completed=done)

        try:
            work.run(progress)
        except DeviceLostError as error:
            work.save()
            return str(error)
        except KeyboardInterrupt:
            work.save()
            return "interrupted"
        bar.update(task, description="done", completed=work.steps())
    return None


def _print_machine(console: Console, document: dict[str, Any]) -> None:
    ceilings = document.get("ceilings", {}).get(document.get("date"))
    parts = [
        str(document.get("device")),
        f"driver {document.get('driver')}",
        f"CUDA {document.get('cuda')}",
        f"PyTorch {document.get('torch')}",
        str(document.get("date")),
    ]
    if ceilings:
        parts.append(
            f"bf16 matrix product {ceilings['matmul_bf16_tflops']:.0f} TFLOP/s, "
            f"copy {ceilings['copy_gbps']:.0f} GB/s"
        )
    parts.append(f"sources {str(document.get('sources'))[:12]}")
    console.print(escape("; ".join(parts)), soft_wrap=True)


def _print_excluded(console: Console, excluded: Sequence[tuple[str, str, str]]) -> None:
    """Says who was not measured where: a line for each kind of reason, with its first case."""
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, label, reason in excluded:
        kind = reason.partition(":")[0]  # what follows a colon are figures and details
        grouped.setdefault((name, kind), []).append((label, reason))
    for (name, _), cases in grouped.items():
        label, reason = cases[0]
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        console.print(
            f"{name} was not measured on {escape(label)}{more}: {escape(reason)}", soft_wrap=True
        )


def _plot(console: Console, document: dict[str, Any], picture: Path) -> None:
    from hopper_attention.bench.plot import plot_forward

    try:
        plot_forward(document, picture)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--plot") from error
    console.print(f"drawn: {escape(str(picture))}", soft_wrap=True)
