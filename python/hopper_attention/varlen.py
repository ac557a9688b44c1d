"""Attention of packed batches with FlashAttention-3's signature, defaults and return values."""

from __future__ import annotations

from typing import Any, Literal

import torch

from . import _autograd, checks, checks_varlen, ops, ops_varlen, ops_varlen_backward
from ._eager import EagerCalls
from .checks_varlen import Lengths
from .interface import normalise

_is_compiling = torch.compiler.is_compiling
_eager = EagerCalls(
    "forward_varlen",
    (
        *("q", "k", "v", *Lengths._fields, "softmax_scale", "causal", "qv", *ops.DESCALES),
        *("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa"),
        *("deterministic", "sm_margin"),
    ),
    ops.memory,
    ops_varlen_backward.formula,
    Lengths._fields,
)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each sequence of a packed batch: sequences of any lengths, end to end.

    Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and of the output, and rows
    cu_seqlens_k[i] to cu_seqlens_k[i + 1] of k and v. Each is attended to as `flash_attn_func`
    does, and nothing in another sequence, not even NaN, has a part in it. The lengths are read
    on the device when the kernels run, so a CUDA graph may be replayed with others.

    Lengths of 0 are allowed. Rows of q that no sequence uses, those beyond seqused_q or behind the
    last sequence, give 0 and a log-sum-exp of -inf, and gradients of 0; so do keys that no sequence
    uses. Where cu_seqlens are not what they should be the output is meaningless, and so are
    gradients, but no memory outside the tensors is touched.

    q, k and v have gradients, as in `flash_attn_func`.

    Args:
        q: (total_q, heads, head_dim), float16 or bfloat16, on a Hopper GPU. head_dim is a multiple
            of 8 up to 256.
        k: (total_k, heads_kv, head_dim); heads_kv divides heads (MHA, GQA, MQA).
        v: (total_k, heads_kv, head_dim_v); head_dim_v equals head_dim, or is a multiple of 8 up to
            128 where head_dim is at most 192.
        cu_seqlens_q: (batch + 1,) int32, contiguous, on q's device: where each sequence begins in
            q, and where the last ends; rising from 0 to at most total_q.
        cu_seqlens_k: likewise in k and v.
        max_seqlen_q: 0 or more, or None. Kept for FlashAttention's callers: it is not needed and
            has no effect.
        max_seqlen_k: likewise.
        seqused_q: (batch,) int32, contiguous, on q's device: how many of its rows of q a sequence
            uses, from its first; masks are aligned to what is used. None is all.
        seqused_k: likewise of k and v.
        softmax_scale: as in `flash_attn_func`, and so are the arguments below.
        causal: likewise.
        qv: not built yet: None.
        q_descale: None: packed batches in e4m3 are not built yet.
        k_descale: likewise.
        v_descale: likewise.
        window_size: likewise.
        attention_chunk: not built yet: 0.
        softcap: likewise.
        num_splits: likewise.
        pack_gqa: likewise.
        deterministic: likewise.
        sm_margin: likewise.
        return_attn_probs: likewise.

    Returns:
        out, (total_q, heads, head_dim_v), contiguous, in q's dtype; or (out, softmax_lse) where
        return_attn_probs, softmax_lse (heads, total_q) in float32 with the natural logarithm.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        NotImplementedError: an argument asks for what is not built yet, or a tensor has a
            forward-mode tangent.
        RuntimeError: the compiled library is missing, the device is no Hopper GPU, or CUDA fails.
    """
    given = (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        softmax_scale,
        causal,
        qv,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        deterministic,
        sm_margin,
    )
    again: ops.Outputs | Literal[False] | None = None
    # These have no effect, and change from batch to batch; what is none of them is refused below.
    if not _is_compiling() and _is_length(max_seqlen_q) and _is_length(max_seqlen_k):
        again = _eager.call(*given)
        if again:
            return again if return_attn_probs else again[0]
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    scalars = prepare(
        q,
        k,
        v,
        lengths,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    if deterministic is not False:
        deterministic = checks.flag("deterministic", deterministic)
    ways = (ops_varlen.operator, ops_varlen.without_gradient, ops_varlen_backward.differentiable)
    attend = _autograd.shortest_way("hopper_attention::forward_varlen", *ways, q, k, v, *lengths)
    out, lse = attend(q, k, v, *lengths, *scalars, deterministic)
    if again is False:
        its_arguments = (q, k, v, *lengths, *scalars)
        _eager.adopt(given, ops_varlen._calls, its_arguments, (*scalars[:-1], deterministic))
    return (out, lse) if return_attn_probs else out


def _is_length(max_seqlen: Any) -> bool:
    return max_seqlen is None or (type(max_seqlen) is int and max_seqlen >= 0)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    **arguments: object,
) -> ops.Scalars:
    """Checks the types of `flash_attn_varlen_func`'s arguments; returns the operator's scalars.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_varlen_func`.
    """
    for name, tensor in lengths._asdict().items():
        if not isinstance(tensor, torch.Tensor) and (name[:2] == "cu" or tensor is not None):
            checks.tensors(**{name: tensor})
    checks_varlen.max_seqlen("max_seqlen_q", max_seqlen_q)
    checks_varlen.max_seqlen("max_seqlen_k", max_seqlen_k)
    if isinstance(q, torch.Tensor) and q.dtype is torch.float8_e4m3fn:
        checks_varlen.limits(q.dtype, 0, 0)
    return normalise(q, k, v, **arguments)
