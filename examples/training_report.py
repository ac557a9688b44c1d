"""What train_gpt.py measured: its file, a table for the terminal and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich import box
from rich.console import Console
from rich.table import Table

LABELS = {
    "standard": "standard (matmul, softmax, matmul)",
    "sdpa": "PyTorch's scaled_dot_product_attention",
    "ours": "hopper-attention",
    "ours-fp8": "hopper-attention, FP8 forward",
    "reference": "reference (float64)",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLORS = {
    "standard": "#999999",
    "sdpa": "#009e73",
    "ours": "#d55e00",
    "ours-fp8": "#0072b2",
    "reference": "#cc79a7",
}
_SMOOTHED = 20  # steps in an average of training losses

Document = Mapping[str, Any]


class Run(TypedDict):
    """One training.

    Attributes:
        attention: who computed attention.
        head_dim: the model's head dimension.
        parameters: the model's weights.
        tokens_per_second: of training steps, after a warm-up.
        peak_bytes: the most device memory that tensors took, or None on a CPU.
        losses: the training loss of each step, nats a byte.
        held_out: (steps taken, mean loss of the held-out windows).
    """

    attention: str
    head_dim: int
    parameters: int
    tokens_per_second: float
    peak_bytes: int | None
    losses: list[float]
    held_out: list[tuple[int, float]]


def save(document: Document, path: Path) -> None:
    """Writes the results, losses with six digits after the point."""
    runs = [
        {
            **run,
            "tokens_per_second": round(run["tokens_per_second"], 1),
            "losses": [round(loss, 6) for loss in run["losses"]],
            "held_out": [(step, round(loss, 6)) for step, loss in run["held_out"]],
        }
        for run in document["runs"]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(run) for run in runs)  # a line each
    rest = json.dumps({**document, "runs": None}, indent=2)
    path.write_text(rest.replace('"runs": null', f'"runs": [\n{lines}\n  ]') + "\n")


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def last_loss(run: Run) -> float:
    """The held-out loss at the end, nats a byte."""
    return run["held_out"][-1][1]


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and the up to 19 before it."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    begins = [max(0, end - _SMOOTHED) for end in range(1, len(sums))]
    return [(sums[end] - sums[begin]) / (end - begin) for end, begin in enumerate(begins, start=1)]


def by_head_dim(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Runs that are compared with one another."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["head_dim"], []).append(run)
    return groups


def print_table(console: Console, document: Document) -> None:
    """Prints speeds and losses; differences and ratios are to the first attention of each model."""
    settings = document["settings"]
    millions = document["runs"][0]["parameters"] / 1e6
    table = Table(
        title=f"{millions:.1f} M weights, {settings['steps']} steps of {settings['batch']} × "
        f"{settings['seqlen']} bytes, {document['device'] or 'CPU'}",
        box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2,
    )
    table.add_column("attention")
    for name in ("head dim", "tokens/s", "ratio", "peak, GiB", "held-out loss", "difference"):
        table.add_column(name, justify="right")
    for head_dim, runs in by_head_dim(document["runs"]).items():
        first = runs[0]
        for run in runs:
            peak = run["peak_bytes"]
            table.add_row(
                run["attention"],
                str(head_dim),
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tokens_per_second'] / first['tokens_per_second']:.2f}",
                "-" if peak is None else f"{peak / 2**30:.2f}",
                f"{last_loss(run):.4f}",
                f"{last_loss(run) - last_loss(first):+.4f}",
            )
    console.print(table)


def plot(document: Document, path: Path) -> None:
    """Draws the loss curves over each other, and beside them each one's difference to the first."""
    from matplotlib.figure import Figure

    groups = by_head_dim(document["runs"])
    figure = Figure(figsize=(11, 0.8 + 3.4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), (head_dim, runs) in zip(axes, groups.items(), strict=True):
        first = smoothed(runs[0]["losses"])
        for index, run in enumerate(runs):
            color, label = _COLORS.get(run["attention"]), LABELS[run["attention"]]
            # the first is drawn widest, so that it can be seen under the others
            width = 1.2 + 0.9 * (len(runs) - 1 - index)
            steps = range(1, len(run["losses"]) + 1)
            left.plot(steps, run["losses"], color=color, linewidth=width, label=label)
            places, losses = zip(*run["held_out"], strict=True)
            left.plot(places, losses, "o", color=color, markersize=2 + width, fillstyle="none")
            pairs = zip(smoothed(run["losses"]), first, strict=True)
            differences = [loss - other for loss, other in pairs]
            right.plot(steps, differences, color=color, linewidth=1.4)
        left.set_title(f"loss, head dimension {head_dim} (circles: held-out text)", fontsize=10)
        right.set_title(
            f"difference to {LABELS[runs[0]['attention']]}, mean of {_SMOOTHED} steps", fontsize=10
        )
        left.set_ylabel("nats a byte")
        for axis in (left, right):
            axis.grid(color="#e5e5e5", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date in the file, so that the same results give the same picture
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
