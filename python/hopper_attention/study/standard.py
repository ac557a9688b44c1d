"""Standard attention in 16 bit: the baseline that stores the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import AttentionInputs


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of two 16-bit matrices, summed in fp32 and rounded once, on any device."""
    if a.is_cuda:
        return a @ b
    # CPUs differ in how they sum 16-bit products; in fp32 and rounded once they agree with the
    # card's tensor cores.
    return (a.float() @ b.float()).to(a.dtype)


def _visible(x: AttentionInputs) -> Tensor | None:
    """(seqlen_q, seqlen_k) bool: which keys each query sees; None where it sees them all."""
    left, right = x.window_size
    if x.causal:
        right = 0
    if left < 0 and right < 0:
        return None
    rows = torch.arange(x.seqlen_q, device=x.query.device)[:, None] + x.seqlen_k - x.seqlen_q
    distance = torch.arange(x.seqlen_k, device=x.query.device)[None, :] - rows
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def standard_scores(x: AttentionInputs) -> Tensor:
    """The scores of standard attention, rounded after the product and after the scale.

    Args:
        x: inputs in float16 or bfloat16.

    Returns:
        (batch, heads, seqlen_q, seqlen_k) in the inputs' dtype; -inf where a key is not seen.
    """
    query = x.query.transpose(1, 2)
    key = x.key.transpose(1, 2).repeat_interleave(x.heads // x.heads_kv, dim=1)
    scores = _matmul(query, key.transpose(2, 3)) * x.softmax_scale
    if x.softcap > 0:
        scores = torch.tanh(scores / x.softcap) * x.softcap
    visible = _visible(x)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def standard_attention(x: AttentionInputs) -> Tensor:
    """softmax(scale * QK^T) V with every intermediate result stored in the inputs' 16 bits.

    What a plain `softmax(q @ k.T * scale) @ v` does in PyTorch: both products sum in fp32 and
    round their result, the scaled scores are rounded again, the softmax computes in fp32 inside
    and rounds its probabilities.

    Args:
        x: inputs in float16 or bfloat16.

    Returns:
        (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype; a row that sees no key is 0.
    """
    value = x.value.transpose(1, 2).repeat_interleave(x.heads // x.heads_kv, dim=1)
    scores = standard_scores(x)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    visible = _visible(x)
    if visible is not None:
        # A softmax over no key at all is NaN, and attention over no key is 0.
        weights = weights.masked_fill(~visible.any(dim=1, keepdim=True), 0.0)
    return _matmul(weights, value).transpose(1, 2)
