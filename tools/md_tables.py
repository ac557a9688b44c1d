"""What the tables of README.md and docs/ are made of."""

from __future__ import annotations

from collections.abc import Sequence

from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.rmse import STANDARD

MISSING = "–"
# Of implementations, in the tables' order.
NAMES = {
    OURS: "hopper-attention",
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    STANDARD: "standard",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all columns but the first `left` are aligned to the right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def listing(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def bullets(lines: Sequence[str]) -> str:
    """Summary lines as a list, without the suites that they begin with."""
    return "\n".join(f"- {line.partition(': ')[2]}" for line in lines)


def length(tokens: int) -> str:
    """A sequence length, short."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def number(value: float | None, digits: int = 0) -> str:
    """A figure with so many digits after the point, or the sign of one that is missing."""
    return MISSING if value is None else f"{value:.{digits}f}"
