"""The picture of the forward suite: TFLOP/s by sequence length, head dimension and mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hopper_attention._extras import STUDY, require
from hopper_attention.bench.contestants import OURS, PEERS
from hopper_attention.bench.ratios import Comparison, compare_records
from hopper_attention.bench.records import run_of

_LABELS = {
    OURS: "hopper-attention",
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLORS = {OURS: "#d55e00", "fa3": "#0072b2", "cudnn": "#009e73", "fa2": "#999999"}
_MARKERS = {OURS: "o", "fa3": "s", "cudnn": "^", "fa2": "v"}
_INK = "#333333"


def plot_forward(document: Mapping[str, Any], path: Path) -> None:
    """Draws the forward suite's results.

    Args:
        document: A result file's content.
        path: The picture's file; its suffix chooses the format.

    Raises:
        ValueError: The document has no records of suite "forward".
        ModuleNotFoundError: matplotlib, of the extra "study", is not installed.
    """
    comparisons = compare_records(document["records"], "forward")
    if not comparisons:
        raise ValueError("there are no records of suite 'forward' to draw")
    require(STUDY, "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    head_dims = sorted({one.shape.head_dim for one in comparisons})
    masks = [m for m in ("full", "causal") if any(one.shape.mask == m for one in comparisons)]
    ceiling = run_of(document, "forward")[1].get("matmul_bf16_tflops")
    figure, axes = plt.subplots(
        len(masks),
        len(head_dims),
        figsize=(1.2 + 3.2 * len(head_dims), 0.9 + 2.6 * len(masks)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, mask in enumerate(masks):
        for column, head_dim in enumerate(head_dims):
            panel = [
                one
                for one in comparisons
                if one.shape.mask == mask and one.shape.head_dim == head_dim
            ]
            _draw_panel(axes[row][column], panel, ceiling)
            axes[row][column].set_title(f"head dimension {head_dim}, {mask}", fontsize=10)
        axes[row][0].set_ylabel("TFLOP/s")
    highest = max(value for one in comparisons for value in one.values.values())
    axes[0][0].set_ylim(0, 1.06 * max(highest, ceiling or 0.0))  # of all: they share the axis
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    first = [name for name in _LABELS.values() if name in lines]
    names = first + [name for name in lines if name not in first]
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    figure.suptitle(_title(document, comparisons), fontsize=11, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date in the file, so that the same results give the same picture
    metadata = {"Software": None} if path.suffix == ".png" else None
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)


def _draw_panel(axis: Any, panel: list[Comparison], ceiling: float | None) -> None:
    present = {name for one in panel for name in one.values}
    known = [name for name in (*reversed(PEERS), OURS) if name in present]
    for name in [*sorted(present.difference(known)), *known]:  # ours last, on top
        points = sorted(
            (one.shape.seqlen_q, one.values[name]) for one in panel if name in one.values
        )
        axis.plot(
            [length for length, _ in points],
            [value for _, value in points],
            label=_LABELS.get(name, name),
            color=_COLORS.get(name),
            marker=_MARKERS.get(name, "x"),
            markersize=4,
            linewidth=2.2 if name == OURS else 1.4,
        )
    if ceiling is not None:
        axis.axhline(
            ceiling, color=_INK, linewidth=0.9, linestyle=":", label="matrix product, 8192³"
        )
    lengths = sorted({one.shape.seqlen_q for one in panel})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=_INK)


def _title(document: Mapping[str, Any], comparisons: list[Comparison]) -> str:
    device = document.get("device") or "unknown device"
    shape = comparisons[0].shape
    tokens, hidden = shape.batch * shape.seqlen_q, shape.heads * shape.head_dim
    return f"Attention forward, bf16, {device}: {tokens:,} tokens, hidden size {hidden:,}"
