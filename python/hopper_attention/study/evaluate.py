"""Runs the contestants on one attention problem and measures them against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from hopper_attention import reference

from .formats import Contestant
from .inputs import AttentionInputs
from .metrics import ErrorSums

# Elements of score matrix in one piece: float64 makes 256 MiB (CPU) and 2 GiB (GPU) of them, and
# the reference holds a few such matrices at a time.
_MAX_SCORES_CPU = 1 << 25
_MAX_SCORES_CUDA = 1 << 28


@dataclass(frozen=True)
class Measured:
    """What one contestant's output was off by.

    Attributes:
        total: against float64 attention on the inputs as they were given, so that rounding them
            to the format counts. This is how the FlashAttention-3 paper measures.
        arithmetic: against float64 attention on the rounded inputs, so that only what the
            computation itself adds counts.
        by: who computed it; more than one where the problems differed.
    """

    total: ErrorSums
    arithmetic: ErrorSums
    by: frozenset[str]

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.total + other.total, self.arithmetic + other.arithmetic, self.by | other.by
        )


Results = dict[Contestant, Measured]


def max_scores(device: torch.device) -> int:
    """How many elements of score matrix a piece may have on a device."""
    return _MAX_SCORES_CUDA if device.type == "cuda" else _MAX_SCORES_CPU


def evaluate(
    inputs: AttentionInputs,
    contestants: Sequence[Contestant],
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Results:
    """Measures every contestant on one problem, head by head.

    Args:
        inputs: the problem, in any floating dtype and on any device.
        contestants: who computes.
        device: where they compute.
        advance: called after each piece of the problem (`AttentionInputs.num_pieces`).

    Returns:
        The measured errors of each contestant; the sums have one entry per query head.
    """
    results: Results = {}
    for heads, piece in inputs.pieces(max_scores(device)):
        for contestant, measured in _evaluate_piece(piece.to(device), contestants).items():
            placed = Measured(
                measured.total.at_heads(heads, inputs.heads),
                measured.arithmetic.at_heads(heads, inputs.heads),
                measured.by,
            )
            known = results.get(contestant)
            results[contestant] = placed if known is None else known + placed
        advance()
    return results


def add_results(first: Results, second: Results) -> Results:
    """The results over two problems that have the same heads, together."""
    return {c: first[c] + second[c] for c in first}


def merge(results: Iterable[Results]) -> Results:
    """All heads of all results as one; problems may have different heads."""
    merged: Results = {}
    for result in results:
        for contestant, measured in result.items():
            flat = Measured(
                measured.total.over_heads(), measured.arithmetic.over_heads(), measured.by
            )
            known = merged.get(contestant)
            merged[contestant] = flat if known is None else known + flat
    return merged


def _evaluate_piece(inputs: AttentionInputs, contestants: Sequence[Contestant]) -> Results:
    exact = _reference(inputs)
    results: Results = {}
    for dtype in dict.fromkeys(c.input_dtype for c in contestants):
        rounded = inputs.to(dtype)
        given_so = inputs.query.dtype == inputs.key.dtype == inputs.value.dtype == dtype
        exact_rounded = exact if given_so else _reference(rounded)
        for contestant in contestants:
            if contestant.input_dtype != dtype:
                continue
            out, by = contestant.run(rounded)
            results[contestant] = Measured(
                ErrorSums.measure(out, exact),
                ErrorSums.measure(out, exact_rounded),
                frozenset({by}),
            )
    return results


def _reference(inputs: AttentionInputs) -> torch.Tensor:
    out, _ = reference.attention(
        inputs.query,
        inputs.key,
        inputs.value,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
        window_size=inputs.window_size,
        softcap=inputs.softcap,
    )
    return out
