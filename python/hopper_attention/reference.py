"""Attention in float64, as plainly as it can be written: what everything else is measured against.

With query row i at key position p = i + seqlen_k - seqlen_q:

    S_ij = softmax_scale * q_i . k_j
    S_ij = softcap * tanh(S_ij / softcap)                    where softcap > 0
    S_ij = -inf                     where j < p - window_left or j > p + window_right
    LSE_i = log(exp(learnable_sink) + sum_j exp(S_ij))       the head's sink, where it has one
    O_i = sum_j exp(S_ij - LSE_i) v_j                        0 where no key is seen

Attention and its log-sum-exp are as in Dao et al., "FlashAttention" (arXiv:2205.14135) and
"FlashAttention-2" (arXiv:2307.08691), whose causal mask is aligned at the bottom right where the
lengths differ; the FP16 and FP8 kernels that it judges, in Shah et al., "FlashAttention-3"
(arXiv:2407.08608). The sink, a logit without a value, is that of Agarwal et al., "gpt-oss-120b &
gpt-oss-20b Model Card" (arXiv:2508.10925), after Xiao et al., "Efficient Streaming Language Models
with Attention Sinks" (arXiv:2309.17453).
"""

from __future__ import annotations

from functools import partial

import torch

from . import checks
from ._sequences import attend_to_each
from .checks_varlen import Lengths

_MAX_SCORES = 2**24  # of float64 held at a time, a few times over: 128 MiB each


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 on the tensors' device; autograd passes through it.

    Args:
        q: (batch, seqlen_q, heads, head_dim), any floating-point dtype.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads.
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        softmax_scale: factor of q k^T; None is head_dim ** -0.5.
        causal: row i sees keys up to its position; overrides window_size[1] by 0.
        window_size: (left, right), the keys seen before and after a row's position; -1 or None is
            unbounded.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        learnable_sink: (heads,) float32, a logit that joins the softmax of each row of its head
            without a value; -inf, or None, is none.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q), both float64. A
        row that sees no key has out 0 and its sink, or -inf, as lse.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
    """
    checks.tensors(q=q, k=k, v=v)
    _, seqlen_q, seqlen_k, heads, heads_kv, _, _ = checks.attention_dims(q, k, v)
    scale = checks.default_scale(q) if softmax_scale is None else softmax_scale
    left, right = checks.window(window_size)
    checks.scalars(scale, left, right, softcap, sm_margin=0)
    if causal:
        right = 0

    if learnable_sink is not None:
        checks.sink(learnable_sink, heads, q.device)
    q, k, v = (x.to(torch.float64).transpose(1, 2) for x in (q, k, v))  # (batch, heads, seq, dim)
    if heads_kv:
        k = k.repeat_interleave(heads // heads_kv, dim=1)
        v = v.repeat_interleave(heads // heads_kv, dim=1)

    rows_at_once = max(1, _MAX_SCORES // max(1, q.shape[0] * heads * seqlen_k))
    chunks = []
    for begin in range(0, max(1, seqlen_q), rows_at_once):
        scores = q[:, :, begin : begin + rows_at_once] @ k.transpose(2, 3) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        rows = torch.arange(begin, begin + scores.shape[2], device=q.device)
        hidden = ~visible(rows + seqlen_k - seqlen_q, seqlen_k, left, right)
        scores = scores.masked_fill(hidden, -torch.inf)
        logits = scores
        if learnable_sink is not None:
            sink = learnable_sink.to(torch.float64)[:, None, None].expand(*scores.shape[:3], 1)
            logits = torch.cat([scores, sink], dim=3)
        lse = torch.logsumexp(logits, dim=3, keepdim=True)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0))
        chunks.append((weights @ v, lse.squeeze(3)))
    out = torch.cat([out for out, _ in chunks], dim=2)
    lse = torch.cat([lse for _, lse in chunks], dim=2)
    return out.transpose(1, 2).contiguous(), lse


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of each sequence of a packed batch; autograd passes through it.

    Args:
        q: (total_q, heads, head_dim), any floating-point dtype.
        k: (total_k, heads_kv, head_dim); heads_kv divides heads.
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,) int32, rising from 0 to at most total_q: sequence i has rows
            cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
        cu_seqlens_k: likewise of k and v.
        seqused_q: (batch,) int32, how many of its rows of q a sequence uses; None is all.
        seqused_k: likewise of k and v.
        softmax_scale: as in `attention`, and so are the other arguments.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.

    Returns:
        out (total_q, heads, head_dim_v) and lse (heads, total_q), both float64. Rows that see no
        key or that no sequence uses have out 0 and lse -inf.

    Raises:
        ValueError: a shape, device, length or number is not allowed.
        TypeError: a type or dtype is not allowed.
    """
    attend = partial(
        attention,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    return attend_to_each(attend, q, k, v, lengths)


def visible(positions: torch.Tensor, seqlen_k: int, left: int, right: int) -> torch.Tensor:
    """Which keys rows at these positions see: bool (rows, seqlen_k); -1 is an unbounded side."""
    keys = torch.arange(seqlen_k, device=positions.device)
    distance = keys - positions[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen
