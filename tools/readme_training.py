"""The section of docs/training.md that is made from a stored run of examples/train_gpt.py."""

from __future__ import annotations

import sys
from pathlib import Path

from md_tables import listing, number, table

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ROOT / "benchmarks" / "results" / "train_h200.json"
PICTURE = ROOT / "docs" / "images" / "training_h200.png"

_examples = str(ROOT / "examples")
sys.path.insert(0, _examples)
import training_report  # noqa: E402

sys.path.remove(_examples)


def section(path: Path = TRAINING) -> str:
    """Speeds, losses and the picture; or that there are none.

    Args:
        path: what `train_gpt.py --json` wrote.
    """
    if not path.exists():
        return "No run on a card is stored yet."
    document = training_report.load(path)
    return "\n\n".join([_what(document), _picture(document), _rows(document), _losses(document)])


def draw(path: Path = TRAINING, picture: Path = PICTURE) -> None:
    """Draws the picture, where there is a run."""
    if path.exists():
        training_report.plot(training_report.load(path), picture)


def _what(document: training_report.Document) -> str:
    settings, corpus = document["settings"], document["corpus"]
    tokens = settings["batch"] * settings["seqlen"]
    options = [
        words
        for name, words in (
            ("compiled", "blocks compiled by torch.compile"),
            ("checkpointing", "activations of blocks recomputed"),
            ("deterministic", "our 16-bit backward pass deterministic"),
        )
        if settings[name]
    ]
    extra = f", {listing(options)}" if options else ""
    return (
        f"{document['device']}, PyTorch {document['torch']}, {str(document['date'])[:10]}: "
        f"{document['runs'][0]['parameters'] / 1e6:.1f} million weights in {settings['layers']} "
        f"layers, {settings['steps']} steps of {tokens:,} bytes in sequences of "
        f"{settings['seqlen']:,}{extra}; {corpus['training_bytes'] / 1e6:.1f} MB of text from "
        f"{corpus['files']:,} files, {corpus['held_out_bytes'] / 1e6:.1f} MB of it held out."
    )


def _picture(document: training_report.Document) -> str:
    names = [training_report.LABELS[name] for name in _attentions(document)]
    return f"![Loss curves of {listing(names)}](images/{PICTURE.name})"


def _attentions(document: training_report.Document) -> list[str]:
    return list(dict.fromkeys(run["attention"] for run in document["runs"]))


def _rows(document: training_report.Document) -> str:
    rows = []
    for head_dim, runs in training_report.by_head_dim(document["runs"]).items():
        first = runs[0]
        for run in runs:
            peak = run["peak_bytes"]
            loss = training_report.last_loss(run)
            rows.append(
                [
                    str(head_dim),
                    training_report.LABELS[run["attention"]],
                    f"{run['tokens_per_second']:,.0f}",
                    f"**{run['tokens_per_second'] / first['tokens_per_second']:.2f}**",
                    number(None if peak is None else peak / 2**30, 2),
                    f"{loss:.4f}",
                    f"{loss - training_report.last_loss(first):+.4f}",
                ]
            )
    first_name = _attentions(document)[0]
    header = [
        *("d", "attention", "tokens/s", f"over {first_name}", "peak memory, GiB"),
        *("held-out loss", f"less {first_name}'s"),
    ]
    return table(header, rows, left=2)


def _losses(document: training_report.Document) -> str:
    """How far apart the losses are over the whole training, in a sentence for each model."""
    sentences = []
    for head_dim, runs in training_report.by_head_dim(document["runs"]).items():
        base = training_report.smoothed(runs[0]["losses"])
        apart = []
        for run in runs[1:]:
            pairs = zip(training_report.smoothed(run["losses"]), base, strict=True)
            most = max(abs(loss - other) for loss, other in pairs)
            apart.append(f"{training_report.LABELS[run['attention']]} {most:.4f}")
        if apart:
            sentences.append(
                f"Furthest from the first's training loss, head dimension {head_dim}, nats a byte "
                f"in the mean of 20 steps: {listing(apart)}."
            )
    return " ".join(sentences)
