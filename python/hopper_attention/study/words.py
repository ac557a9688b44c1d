"""What the study's numbers say, in words that are made from them."""

from __future__ import annotations

import math

from .recipes import is_fp8
from .records import Row, Study
from .settings import MODEL
from .verdict import fp8_in_words

STANDARD = "standard"
OURS = "ours"


def in_words(study: Study) -> list[str]:
    """What the numbers say, a sentence or two for each source."""
    lines = []
    for source in study.sources:
        rows = study.select("all", source.name)
        sixteen = [row for row in rows if not is_fp8(row.format)]
        sentences = [_compare_methods(sixteen), _compare_formats(sixteen)]
        if source.name == MODEL:
            sentences.append(_worst_places(study))
        sentences += [_not_finite(row) for row in rows]
        text = " ".join(sentence for sentence in sentences if sentence)
        if text:
            lines.append(f"{source.title}: {text}")
    return lines + fp8_in_words(study)


def _find(rows: list[Row], method: str, format_name: str) -> Row | None:
    found = (row for row in rows if (row.method, row.format) == (method, format_name))
    return next(found, None)


def _formats(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.format for row in rows))


def _compare_methods(rows: list[Row]) -> str:
    """Ours against standard attention, in each format that has both."""
    sentences = []
    for name in _formats(rows):
        ours, standard = _find(rows, OURS, name), _find(rows, STANDARD, name)
        if ours is None or standard is None or standard.rmse == 0:
            continue
        sentence = f"in {name} our error is {ours.rmse / standard.rmse:.2f} times standard's"
        if standard.arithmetic_rmse > 0:
            inner = ours.arithmetic_rmse / standard.arithmetic_rmse
            sentence += f" ({inner:.2f} times in the arithmetic alone)"
        sentences.append(sentence)
    return "; ".join(sentences) + "." if sentences else ""


def _compare_formats(rows: list[Row]) -> str:
    """Our formats against the first of them."""
    ours = [row for row in rows if row.method == OURS]
    if len(ours) < 2 or ours[0].rmse == 0:
        return ""
    parts = [f"{row.format} is {row.rmse / ours[0].rmse:.1f} times" for row in ours[1:]]
    return f"Our error in {' and in '.join(parts)} that in {ours[0].format}."


def _worst_places(study: Study) -> str:
    """The layer and the head where ours is furthest off, in the first format."""
    layers = [row for row in study.select("layer", MODEL) if row.method == OURS]
    if not layers:
        return ""
    name = layers[0].format
    layer = _worst([row for row in layers if row.format == name])
    heads = [row for row in study.select("head", MODEL) if row.method == OURS]
    head = _worst([row for row in heads if row.format == name])
    return (
        f"Ours in {name} is least exact in layer {layer.layer} (relative RMSE "
        f"{layer.relative_rmse:.1e}) and, of all heads, in head {head.head} of layer {head.layer} "
        f"({head.relative_rmse:.1e})."
    )


def _worst(rows: list[Row]) -> Row:
    def error(row: Row) -> float:
        return math.inf if math.isnan(row.relative_rmse) else row.relative_rmse

    return max(rows, key=error)


def _not_finite(row: Row) -> str:
    if row.nonfinite == 0:
        return ""
    return (
        f"{row.nonfinite:,} of {row.elements:,} outputs of {row.method} {row.format} are not "
        "finite."
    )
