"""The study for the terminal: a progress bar, and a table for each source."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .records import Source, Study
from .settings import MODEL
from .words import OURS


class ProgressBar:
    """A rich progress bar for each source; a `settings.Progress`."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, title: str) -> None:
        """A source begins."""
        self._task = self._bars.add_task(title, total=None)

    def expect(self, steps: int) -> None:
        """It has so many steps."""
        assert self._task is not None
        self._bars.update(self._task, total=steps)

    def advance(self) -> None:
        """One step is done."""
        assert self._task is not None
        self._bars.advance(self._task)

    def finish(self) -> None:
        """The source is done."""
        assert self._task is not None
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        self._bars.update(self._task, total=task.completed)


def source_table(study: Study, source: Source) -> Table:
    """The errors on one source, a row for each contestant."""
    table = _table(f"[bold]{escape(source.title)}[/]\n[dim]{shape_in_words(source)}[/]")
    table.add_column("attention", no_wrap=True)
    table.add_column("by", no_wrap=True)
    columns = ("RMSE", "relative", "max error", "1 − cos", "arithmetic")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in study.select("all", source.name):
        measures = (row.rmse, row.relative_rmse, row.max_error, 1 - row.cosine, row.arithmetic_rmse)
        table.add_row(
            f"{row.method} {row.format}",
            row.by,
            *(f"{measure:.2e}" for measure in measures),
            style="bold" if row.method == OURS else None,
        )
    return table


def context_table(study: Study) -> Table | None:
    """Bias and error of uniform attention by number of keys; None where it was not studied."""
    if not study.context:
        return None
    table = _table("uniform attention over V = 1 + N(0, 1/16): bias (RMS error), in percent")
    table.add_column("keys", justify="right")
    names = list(dict.fromkeys(row.format for row in study.context))
    found = {(row.keys, row.format): row for row in study.context}
    for name in names:
        by = "+".join(sorted({row.by for row in study.context if row.format == name}))
        table.add_column(f"{name}, {by}", justify="right", no_wrap=True)
    for keys in sorted({row.keys for row in study.context}):
        rows = [found[keys, name] for name in names]
        cells = [f"{100 * row.bias:+.2f} ({100 * row.rms:.2f})" for row in rows]
        table.add_row(f"{keys:,}", *cells)
    return table


def speed_table(study: Study) -> Table | None:
    """Milliseconds of each format; None where there was no card."""
    if not study.speed:
        return None
    table = _table("milliseconds on the card")
    for column in ("format", "batch × tokens × heads × d"):
        table.add_column(column, no_wrap=True)
    for column in ("quantize", "attention", "both"):
        table.add_column(column, justify="right")
    for row in study.speed:
        mask = "causal" if row.causal else "full"
        shape = f"{row.batch} × {row.seqlen} × {row.heads} × {row.head_dim}, {mask}"
        times = (row.quantize_ms, row.attention_ms, row.total_ms)
        table.add_row(row.format, shape, *(f"{time:.3f}" for time in times))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def shape_in_words(source: Source) -> str:
    """Sizes of a source, as a line."""
    s = source.shape
    heads = f"{s['heads']} heads"
    if s["heads_kv"] != s["heads"]:
        heads += f" over {s['heads_kv']} KV heads"
    dims = f"head dim {s['head_dim']}"
    if s["head_dim_v"] != s["head_dim"]:
        dims += f" (V {s['head_dim_v']})"
    mask = "causal" if s["causal"] else "no mask"
    sizes = f"batch {s['batch']}, {s['seqlen_q']} tokens, {heads}, {dims}, {mask}"
    if source.name == MODEL:
        return f"{source.layers} layers, {source.tokens:,} tokens of text: {sizes}"
    return sizes


LEGEND = (
    "Errors against float64 attention on the inputs as they are. RMSE is in units of the output, "
    "relative is RMSE over the output's root mean square. Arithmetic is the RMSE of the "
    "computation alone: against float64 on the inputs already rounded to 16 bits."
)
