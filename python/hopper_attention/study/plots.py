"""The study's pictures of 16 bits: error by layer and head of a model, and error by source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .recipes import is_fp8
from .records import Row, Source, Study
from .settings import MODEL
from .words import OURS, STANDARD

DPI = 160
INK = "#1f2933"
FAINT = "#66717e"
TITLE_SIZE = 13

# A hue for each format, light for standard attention and dark for ours; told apart by eyes that
# see no red or no green, and in print without colour.
_HUES = (("#a9cce8", "#1f6fb2"), ("#f9c89b", "#c8590b"), ("#b9dcae", "#2f7d32"))

# More cells than this cannot hold a legible number each.
_MAX_NUMBERED_CELLS = 160


def plot_heads(study: Study, path: Path) -> bool:
    """Draws the relative RMSE of every layer and head of the model, and ours over standard's.

    Args:
        study: the study; its rows of level "head" from the source "model" are drawn.
        path: the PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    rows = study.select("head", MODEL)
    formats = _in_16_bits(rows)
    if not formats:
        return False
    layers = sorted({row.layer for row in rows if row.layer is not None})
    height = min(8.0, 1.1 + 0.34 * len(layers))
    figure = Figure(
        figsize=(14.0, height * len(formats) + 0.8),
        layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.06),
    )
    axes = figure.subplots(len(formats), 3, squeeze=False)
    for line, name in zip(axes, formats, strict=True):
        standard, ours = (_grid(rows, layers, name, method) for method in (STANDARD, OURS))
        known = [grid for grid in (standard, ours) if grid is not None]
        norm = _log_norm(np.concatenate([grid.ravel() for grid in known]))
        for axis, grid, method in ((line[0], standard, STANDARD), (line[1], ours, OURS)):
            _heat_map(axis, grid, layers, f"{method} {name}: relative RMSE", "YlGnBu", norm)
        line[0].set_ylabel("layer", color=FAINT)
        ratio = None if standard is None or ours is None else ours / standard
        _heat_map(line[2], ratio, layers, f"ours / standard, {name}", "RdBu_r", _ratio_norm(ratio))
        _bar(figure, [line[0], line[1]], _power_of_ten)
        _bar(figure, [line[2]], lambda value: f"{value:.2g}×")
    source = next(source for source in study.sources if source.name == MODEL)
    figure.suptitle(
        f"Error of attention against float64, layer by layer and head by head: {source.title}",
        x=0.008,
        ha="left",
        color=INK,
        fontsize=TITLE_SIZE,
    )
    figure.savefig(path, dpi=DPI)
    return True


def plot_sources(study: Study, path: Path) -> bool:
    """Draws the relative RMSE of each contestant on each source as bars.

    Args:
        study: the study; its rows of level "all" are drawn.
        path: the PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    rows = study.select("all")
    formats = _in_16_bits(rows)
    if not formats:
        return False
    rows = [row for row in rows if row.format in formats]
    contestants = list(dict.fromkeys((row.method, row.format) for row in rows))
    figure = Figure(figsize=(3.2 + 3.0 * len(study.sources), 4.6), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(contestants)
    for place, (method, name) in enumerate(contestants):
        hue = _HUES[formats.index(name) % len(_HUES)][method == OURS]
        offset = (place - (len(contestants) - 1) / 2) * width
        for group, source in enumerate(study.sources):
            row = _find(rows, source, method, name)
            if row is None or not row.relative_rmse > 0:
                continue
            label = f"{method} {name}" if group == 0 else None
            _error_bar(axis, group + offset, width, row, hue, label)
    _label_sources(axis, study)
    figure.suptitle(
        "Error of attention against float64, source by source",
        x=0.012,
        ha="left",
        color=INK,
        fontsize=TITLE_SIZE,
    )
    figure.savefig(path, dpi=DPI)
    return True


def _in_16_bits(rows: list[Row]) -> list[str]:
    """The formats that standard attention has too; FP8 has pictures of its own."""
    return list(dict.fromkeys(row.format for row in rows if not is_fp8(row.format)))


def _error_bar(axis: Axes, x: float, width: float, row: Row, hue: str, label: str | None) -> None:
    """A bar, its number, and a tick where the arithmetic alone would end."""
    axis.bar(x, row.relative_rmse, 0.92 * width, color=hue, label=label, zorder=2)
    axis.annotate(
        _power_of_ten(row.relative_rmse, digits=1),
        (x, row.relative_rmse),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    if row.arithmetic_relative_rmse > 0:
        ends = (x - 0.40 * width, x + 0.40 * width)
        axis.hlines(row.arithmetic_relative_rmse, *ends, color=INK, linewidth=1.6, zorder=3)


def _label_sources(axis: Axes, study: Study) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    shown = [row for row in study.select("all") if not is_fp8(row.format)]
    marks = [row.arithmetic_relative_rmse for row in shown]
    low = min([low, *(0.6 * mark for mark in marks if mark > 0)])
    axis.set_ylim(low * 0.8, high * 1.1)
    axis.set_ylabel("relative RMSE", color=INK)
    axis.set_xticks(range(len(study.sources)), [_source_label(s) for s in study.sources])
    axis.yaxis.set_minor_locator(NullLocator())
    mark = Line2D([], [], color=INK, linewidth=1.6, label="the arithmetic alone")
    handles = [*axis.get_legend_handles_labels()[0], mark]
    axis.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
    )
    axis.grid(axis="y", color="#e3e7eb", linewidth=0.8, zorder=0)
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)


def _source_label(source: Source) -> str:
    shape = source.shape
    sizes = f"{shape['seqlen_k']} keys, head dim {shape['head_dim']}"
    if source.name == MODEL:
        return f"{source.title.rsplit(' on ', 1)[0]}\n{source.layers} layers, {sizes}"
    return f"{source.title}\n{sizes}"


def _find(rows: list[Row], source: Source, method: str, name: str) -> Row | None:
    wanted = (source.name, method, name)
    return next((row for row in rows if (row.source, row.method, row.format) == wanted), None)


def _grid(rows: list[Row], layers: list[int], format_name: str, method: str) -> np.ndarray | None:
    """(layers, heads) of relative RMSE; NaN where a layer has fewer heads. None without rows."""
    chosen = [row for row in rows if (row.format, row.method) == (format_name, method)]
    if not chosen:
        return None
    heads = 1 + max(row.head for row in chosen if row.head is not None)
    grid = np.full((len(layers), heads), np.nan)
    for row in chosen:
        assert row.layer is not None
        assert row.head is not None
        grid[layers.index(row.layer), row.head] = row.relative_rmse
    return grid


def _log_norm(values: np.ndarray) -> LogNorm:
    """A logarithmic scale over the values that it can show."""
    shown = values[np.isfinite(values) & (values > 0)]
    if shown.size == 0:
        return LogNorm(1e-8, 1.0)
    low, high = float(shown.min()), float(shown.max())
    return LogNorm(low / 1.02, high * 1.02)


def _ratio_norm(ratio: np.ndarray | None) -> Normalize:
    """A logarithmic scale with 1 in its middle."""
    shown = np.array([]) if ratio is None else ratio[np.isfinite(ratio) & (ratio > 0)]
    reach = max(1.25, float(np.exp(np.abs(np.log(shown)).max()))) if shown.size else 2.0
    return LogNorm(1 / reach, reach)


def _heat_map(
    axis: Axes,
    grid: np.ndarray | None,
    layers: list[int],
    title: str,
    colours: str,
    norm: Normalize,
) -> None:
    """One map of layers by heads, with a number in each cell where there is room."""
    if grid is None:
        axis.set_visible(False)
        return
    axis.set_facecolor("#d5d9de")  # shows through where a value is missing or not finite
    axis.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel("head", color=FAINT)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 4, 5, 10]))
    shown = range(0, len(layers), -(-len(layers) // 16))
    axis.set_yticks(list(shown), [str(layers[place]) for place in shown])
    axis.tick_params(colors=FAINT, labelsize=8.5, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if grid.size > _MAX_NUMBERED_CELLS:
        return
    finite = grid[np.isfinite(grid)]
    unit = 10.0 ** np.floor(np.log10(finite.min())) if finite.size and finite.min() > 0 else 1.0
    unit = 1.0 if unit > 1e-2 else unit
    if unit < 1.0:
        axis.set_title(f"in {_power_of_ten(unit)}", fontsize=9, color=FAINT, loc="right")
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            scaled = value / unit
            digits = 2 if unit == 1.0 else int(scaled < 9.95)
            colour = _ink_on(axis, value)
            axis.text(
                x, y, f"{scaled:.{digits}f}", ha="center", va="center", fontsize=8, color=colour
            )


def _power_of_ten(value: float, digits: int = 0) -> str:
    """A number such as 5e-4 in the notation of print, with some digits after the point."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    factor = "" if mantissa == "1" else rf"{mantissa} \times "
    return f"${factor}10^{{{int(exponent)}}}$"


def _ink_on(axis: Axes, value: float) -> str:
    """White or dark, whichever reads better on the colour of a value."""
    red, green, blue, _ = axis.images[0].to_rgba(np.asarray(value))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _bar(figure: Figure, axes: list[Axes], form: Callable[[float], str]) -> None:
    """A colour bar beside some maps that share a scale."""
    drawn = [axis for axis in axes if axis.images]
    if not drawn:
        return
    bar = figure.colorbar(drawn[0].images[0], ax=drawn, pad=0.012, aspect=22)
    bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(colors=FAINT, labelsize=8.5, length=0, which="both")
    bar.outline.set_visible(False)
