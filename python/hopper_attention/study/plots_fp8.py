"""The study's pictures of FP8: error by recipe, and error over the length of the context."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .plots import DPI, FAINT, INK, TITLE_SIZE
from .recipes import DEFAULT, RECIPES, is_fp8
from .records import ContextRow, Row, Study
from .words import OURS

_DEFAULT_HUE, _OTHER_HUE, _FAST_HUE = "#1f6fb2", "#a9cce8", "#c8590b"
_LINES = {"fp16": ":", "bf16": "--"}
_HUES = {"fp16": "#66717e", "bf16": "#2f7d32"}


def plot_recipes(study: Study, path: Path) -> bool:
    """Draws the relative RMSE of each FP8 recipe on each source; 16 bits as lines beside them.

    Args:
        study: the study; its rows of level "all" are drawn.
        path: the PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    names = [name for name in RECIPES if any(row.format == name for row in study.rows)]
    if not names:
        return False
    figure = Figure(
        figsize=(1.6 + 4.2 * len(study.sources), 1.7 + 0.36 * len(names)), layout="constrained"
    )
    axes = figure.subplots(1, len(study.sources), squeeze=False, sharey=True)[0]
    for axis, source in zip(axes, study.sources, strict=True):
        rows = [row for row in study.select("all", source.name) if row.method == OURS]
        _bars(axis, names, rows)
        axis.set_title(source.title.split(" on ")[0], fontsize=10, color=INK, loc="left")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) + 0.3, -0.6)  # the first on top, and room for the legend
    _title(figure, "Error of the FP8 recipes against float64, relative RMSE in percent")
    figure.savefig(path, dpi=DPI)
    return True


def plot_context(study: Study, path: Path) -> bool:
    """Draws the error of uniform attention over the number of keys, one line a format.

    Args:
        study: the study; its `context` is drawn.
        path: the PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    if not study.context:
        return False
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(row.format for row in study.context):
        rows = sorted((r for r in study.context if r.format == name), key=lambda row: row.keys)
        _curve(axis, name, rows)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    keys = sorted({row.keys for row in study.context})
    axis.set_xticks(keys, [f"{count // 1024}k" for count in keys])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axis.set_xlabel("keys", color=FAINT)
    axis.set_ylabel("error, root mean square", color=INK)
    axis.legend(frameon=False, fontsize=9)
    _plain(axis, "both")
    _title(figure, "Uniform attention over V = 1 + noise, whose answer is 1: error by context")
    figure.savefig(path, dpi=DPI)
    return True


def _bars(axis: Axes, names: list[str], rows: list[Row]) -> None:
    by_name = {row.format: row for row in rows}
    found = [100 * by_name[name].relative_rmse for name in names if name in by_name]
    for place, name in enumerate(names):
        if name not in by_name:
            continue
        percent = 100 * by_name[name].relative_rmse
        axis.barh(place, percent, 0.7, color=_hue(name), zorder=2)
        axis.annotate(
            f"{percent:.2f}",
            (percent, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    for row in rows:
        if not is_fp8(row.format):
            style = _LINES.get(row.format, "-")
            label = f"{row.format} {100 * row.relative_rmse:.2g}"
            axis.axvline(100 * row.relative_rmse, color=FAINT, linestyle=style, label=label)
    if any(not is_fp8(row.format) for row in rows):
        axis.legend(frameon=False, fontsize=8.5, loc="lower right", ncols=2)
    axis.set_xlim(0, 1.18 * max(found, default=1.0))
    _plain(axis, "x")


def _curve(axis: Axes, name: str, rows: list[ContextRow]) -> None:
    fast = is_fp8(name) and RECIPES[name].recipe.accumulation == "fast"
    hue = _HUES.get(name, _FAST_HUE if fast else _DEFAULT_HUE)
    label = name + (f", {RECIPES[name].recipe.accumulation} accumulation" if is_fp8(name) else "")
    errors = [100 * row.rms for row in rows]
    axis.plot([row.keys for row in rows], errors, "o-", color=hue, label=label, markersize=4)
    axis.annotate(
        f"{errors[-1]:.2g}%",
        (rows[-1].keys, errors[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=hue,
        annotation_clip=False,
    )


def _hue(name: str) -> str:
    if name == DEFAULT:
        return _DEFAULT_HUE
    return _FAST_HUE if RECIPES[name].recipe.accumulation == "fast" else _OTHER_HUE


def _plain(axis: Axes, grid: str) -> None:
    axis.grid(axis=grid, color="#e3e7eb", linewidth=0.8, zorder=0)  # type: ignore[arg-type]
    axis.tick_params(colors=INK, labelsize=9, length=0, which="both")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", color=INK, fontsize=TITLE_SIZE)
