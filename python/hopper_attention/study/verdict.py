"""Which FP8 recipe a model should take, and what it costs: words made from a study's numbers."""

from __future__ import annotations

from .recipes import DEFAULT, RECIPES, is_fp8
from .records import ContextRow, Row, SpeedRow, Study
from .settings import MODEL

# A recipe that is better by less is not worth a name of its own.
_WORTH = 0.97
_BASELINE = "bf16"


def fp8_in_words(study: Study) -> list[str]:
    """The verdict in sentences; empty without an FP8 recipe."""
    rows = [row for row in study.select("all") if is_fp8(row.format)]
    lines = [_recipes_of(study, source.name, source.title) for source in study.sources]
    lines += [_smoothing(study), _context(study.context), _speed(study.speed)]
    if rows:
        lines.append(_verdict(study))
    return [line for line in lines if line]


def _fp8_rows(study: Study, source: str) -> dict[str, Row]:
    return {row.format: row for row in study.select("all", source) if is_fp8(row.format)}


def _recipes_of(study: Study, source: str, title: str) -> str:
    """The recipes by rising error, against the default."""
    rows = _fp8_rows(study, source)
    if DEFAULT not in rows or not rows[DEFAULT].rmse > 0:
        return ""
    base = rows[DEFAULT]
    text = f"FP8 on {title}: the default's relative RMSE is {base.relative_rmse:.1e}"
    sixteen = [row for row in study.select("all", source) if row.format == _BASELINE]
    sixteen = [row for row in sixteen if row.method == "ours" and row.rmse > 0]
    if sixteen:
        text += f", {base.rmse / sixteen[0].rmse:.0f} times that of {_BASELINE}"
    others = sorted((row.rmse / base.rmse, name) for name, row in rows.items() if name != DEFAULT)
    if not others:
        return text + "."
    listed = ", ".join(f"{name} {ratio:.2f}" for ratio, name in others)
    return f"{text}. Others' error over the default's: {listed}."


def _smoothing(study: Study) -> str:
    """In how many of the model's heads the smoothing of K helps."""
    heads: dict[tuple[int | None, int | None], dict[str, float]] = {}
    for row in study.select("head", MODEL):
        heads.setdefault((row.layer, row.head), {})[row.format] = row.rmse
    ratios = [
        errors["fp8-smooth"] / errors[DEFAULT]
        for errors in heads.values()
        if errors.get(DEFAULT, 0.0) > 0 and "fp8-smooth" in errors
    ]
    if not ratios:
        return ""
    better = sum(ratio < 1 for ratio in ratios)
    return (
        f"Smoothing K lowers the error in {better} of the model's {len(ratios)} heads: "
        f"{min(ratios):.2f} to {max(ratios):.2f} times the default's."
    )


def _context(rows: list[ContextRow]) -> str:
    """What the accumulation does at the least and the largest number of keys."""
    parts = []
    for name in dict.fromkeys(row.format for row in rows):
        found = [row for row in rows if row.format == name]
        least = min(found, key=lambda row: row.keys)
        most = max(found, key=lambda row: row.keys)
        parts.append(
            f"{name} is off by {_percent(least.bias)} at {least.keys:,} keys"
            + (f" and {_percent(most.bias)} at {most.keys:,}" if most.keys > least.keys else "")
        )
    return "Uniform attention, whose answer is known: " + "; ".join(parts) + "." if parts else ""


def _speed(rows: list[SpeedRow]) -> str:
    """The default's speed over bf16's, quantizer included."""
    parts = []
    for row in rows:
        if row.format != DEFAULT:
            continue
        shape = (row.batch, row.seqlen, row.heads, row.head_dim, row.causal)
        for base in rows:
            if base.format == _BASELINE and shape == (
                base.batch,
                base.seqlen,
                base.heads,
                base.head_dim,
                base.causal,
            ):
                mask = "causal" if row.causal else "full"
                ratio = base.total_ms / row.total_ms
                parts.append(f"{ratio:.2f} at {row.seqlen:,} tokens, {mask}")
    if not parts:
        return ""
    return f"Speed of {DEFAULT} over {_BASELINE}, quantizer included: {'; '.join(parts)}."


def _verdict(study: Study) -> str:
    """The recipe for the model, or for the last source where there is no model."""
    names = [source.name for source in study.sources]
    source = MODEL if MODEL in names else names[-1]
    rows = _fp8_rows(study, source)
    exact = {name: row for name, row in rows.items() if row.nonfinite == 0}
    slow = {name: row for name, row in exact.items() if _accumulates_right(name)}
    if not slow:
        return ""
    best = min(slow, key=lambda name: slow[name].rmse)
    if DEFAULT in slow and slow[best].rmse > _WORTH * slow[DEFAULT].rmse:
        best = DEFAULT
    title = next(one.title for one in study.sources if one.name == source)
    fast = (
        " Fast accumulation gains nothing in accuracy and loses all at long contexts."
        if any(not _accumulates_right(name) for name in rows)
        else ""
    )
    return (
        f"Verdict for {title}: {best} ({RECIPES[best].words}), relative RMSE "
        f"{slow[best].relative_rmse:.1e}. Its cost: {RECIPES[best].cost}.{fast}"
    )


def _accumulates_right(name: str) -> bool:
    return RECIPES[name].recipe.accumulation == "fp32"


def _percent(share: float) -> str:
    percent = round(100 * share, 1 if abs(share) >= 0.01 else 2) + 0.0  # no minus before a zero
    return f"{percent:+.1f}%" if abs(share) >= 0.01 else f"{percent:+.2f}%"
