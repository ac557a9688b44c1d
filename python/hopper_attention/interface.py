"""Attention functions with FlashAttention-3's signatures, defaults and return values."""

from __future__ import annotations

from typing import Any, Literal

import torch

from . import _autograd, checks, fp8, ops, ops_backward, ops_fp8
from ._eager import EagerCalls
from .ops import Scalars

_is_compiling = torch.compiler.is_compiling
_eager = EagerCalls(
    "forward",
    (
        *("q", "k", "v", "softmax_scale", "causal", "qv", *ops.DESCALES, "window_size"),
        *("attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin"),
        "learnable_sink",
    ),
    ops.memory,
    ops_backward.formula,
)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    learnable_sink: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention: softmax(softmax_scale * q k^T + mask) v, exactly, in one kernel; differentiable.

    Query head i reads key-value head i // (heads / heads_kv). Query row i stands at key position
    i + seqlen_k - seqlen_q: masks are aligned at the bottom right. A row that sees no key gives 0
    and a log-sum-exp of -inf.

    Strided tensors are read in place, (b, h, s, d) ones transposed to (b, s, h, d) among them. A
    tensor is copied first only where its last dimension is not contiguous, or where its address or
    a stride is not a multiple of 16 bytes; `explain` reports such copies.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16 or float8_e4m3fn, on a Hopper GPU.
            head_dim is a multiple of 8 up to 256.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads (MHA, GQA, MQA).
        v: (batch, seqlen_k, heads_kv, head_dim_v); head_dim_v equals head_dim, or is a multiple of
            8 up to 128 where head_dim is at most 192.
        softmax_scale: finite factor of q k^T; None is head_dim ** -0.5.
        causal: row i sees keys up to its position; overrides window_size[1] by 0.
        qv: not built yet: None.
        q_descale: (batch, heads_kv) float32, any strides: what e4m3 values of q are to be
            multiplied by; None is 1, and all that 16-bit tensors take. `flash_attn_fp8_func` has
            finer scales.
        k_descale: likewise for k.
        v_descale: likewise for v.
        window_size: (left, right), the keys seen before and after a row's position; -1 or None is
            unbounded.
        attention_chunk: not built yet: 0.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        num_splits: over how many blocks the keys of one query are split; 1, or 0 (the library
            chooses, which is 1 until splitting is built).
        pack_gqa: a hint of FlashAttention-3's about speed; taken, and without effect.
        deterministic: the backward pass adds up q's gradient in a fixed order, so that the same
            call gives the same bits; slower. So does torch.use_deterministic_algorithms(True). All
            else is always deterministic.
        sm_margin: multiprocessors to leave free for other work.
        return_attn_probs: also return the log-sum-exp.
        learnable_sink: (heads,) float32, a logit a head that joins the softmax of each of its rows
            without a value (the attention sink of gpt-oss):
            P = exp(score) / (exp(sink) + sum of exp(score)). It is not multiplied by softmax_scale,
            and -inf is none. Differentiable, but for e4m3 tensors.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), contiguous, in q's dtype, bfloat16 where that is
        float8_e4m3fn; or (out, softmax_lse) where return_attn_probs, softmax_lse
        (batch, heads, seqlen_q) in float32 with the natural logarithm. A sink is part of its sum,
        so that a row that sees no key has its sink there.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        NotImplementedError: an argument asks for what is not built yet, a tensor has a forward-mode
            tangent, or, where q is e4m3, requires grad.
        RuntimeError: the compiled library is missing, the device is no Hopper GPU, or CUDA fails.
    """
    given = (
        q,
        k,
        v,
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
        learnable_sink,
    )
    again: ops.Outputs | Literal[False] | None = None if _is_compiling() else _eager.call(*given)
    if again:
        return again if return_attn_probs else again[0]
    descales = (q_descale, k_descale, v_descale)
    in_fp8 = isinstance(q, torch.Tensor) and q.dtype is torch.float8_e4m3fn
    checked_descales = (None,) * 3 if in_fp8 else descales
    scalars = normalise(*given[:6], *checked_descales, *given[9:14], sm_margin)
    if deterministic is not False:
        deterministic = checks.flag("deterministic", deterministic)
    if learnable_sink is not None:
        checks.tensors(learnable_sink=learnable_sink)
    if in_fp8:
        out, lse = fp8.attention_of_e4m3(q, k, v, descales, learnable_sink, scalars)
    else:
        ways = (ops.operator, ops.without_gradient, ops_backward.differentiable)
        attend = _autograd.shortest_way("hopper_attention::forward", *ways, q, k, v, learnable_sink)
        out, lse = attend(q, k, v, *scalars, learnable_sink, deterministic)
    if again is False:
        _remember(given, scalars, deterministic)
    return (out, lse) if return_attn_probs else out


def _remember(given: tuple[Any, ...], scalars: Scalars, deterministic: bool) -> None:
    """Has a call that was made by the long way made again by the short one."""
    q, k, v, *_, learnable_sink = given
    if q.dtype is torch.float8_e4m3fn:
        descales = given[6:9]
        its_arguments = ops_fp8.arguments_of_e4m3(q, k, v, descales, learnable_sink, scalars)
        _eager.adopt(given, ops_fp8._calls, ops_fp8.seen_by_table(*its_arguments))
        return
    of_backward = None if learnable_sink is not None else (*scalars[:-1], deterministic)
    _eager.adopt(given, ops._calls, (q, k, v, *scalars, learnable_sink), of_backward)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    learnable_sink: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` of q, k and v that lie in one tensor; they are read from it in place.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); or, with num_heads_q given for GQA and MQA,
            (batch, seqlen, num_heads_q + 2 * heads_kv, head_dim) with q's heads first, then k's,
            then v's.
        softmax_scale: as in `flash_attn_func`, and so are the other arguments.
        causal: likewise.
        q_descale: likewise.
        k_descale: likewise.
        v_descale: likewise.
        window_size: likewise.
        attention_chunk: not built yet: 0.
        softcap: likewise.
        deterministic: likewise.
        num_heads_q: heads of q where qkv has 4 dimensions.
        sm_margin: likewise.
        return_attn_probs: likewise.
        learnable_sink: likewise.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: qkv's shape is not allowed, or as `flash_attn_func`.
        TypeError: as `flash_attn_func`.
        NotImplementedError: as `flash_attn_func`.
        RuntimeError: as `flash_attn_func`.
    """
    q, k, v = _unpack(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        learnable_sink=learnable_sink,
    )


def normalise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: Any,
    causal: Any,
    qv: Any,
    q_descale: Any,
    k_descale: Any,
    v_descale: Any,
    window_size: Any,
    attention_chunk: Any,
    softcap: Any,
    num_splits: Any,
    pack_gqa: Any,
    sm_margin: Any,
) -> Scalars:
    """Checks the types of `flash_attn_func`'s arguments and turns them into the operator's.

    Values and shapes are checked by the operator itself, which can also be called without this.

    Returns:
        (softmax_scale, causal, window_left, window_right, softcap, sm_margin).

    Raises:
        TypeError, NotImplementedError: as `flash_attn_func`.
        ValueError: num_splits is negative, or a descale is given.
    """
    if not (
        isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    ):
        checks.tensors(q=q, k=k, v=v)
    if qv is not None:
        _not_built("qv", "None")
    if q_descale is not None or k_descale is not None or v_descale is not None:
        given = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        name = next(name for name, value in given.items() if value is not None)
        raise ValueError(
            f"{name} must be None where q is {q.dtype}: scales belong to torch.float8_e4m3fn"
        )
    if attention_chunk != 0:
        _not_built("attention_chunk", "0", attention_chunk)
    if num_splits != 1 and num_splits != 0:
        if checks.integer("num_splits", num_splits) < 0:
            raise ValueError(f"num_splits must be 0 or more, got {num_splits}")
        _not_built("num_splits", "1, or 0 (the library chooses)", num_splits)
    if pack_gqa is not None:
        checks.flag("pack_gqa", pack_gqa)
    if softmax_scale is None:
        softmax_scale = checks.default_scale(q)
    elif type(softmax_scale) is not float:
        softmax_scale = checks.real("softmax_scale", softmax_scale)
    if causal is not True and causal is not False:
        causal = checks.flag("causal", causal)
    if type(softcap) is not float:
        softcap = checks.real("softcap", softcap)
    if type(sm_margin) is not int:
        sm_margin = checks.integer("sm_margin", sm_margin)
    window_left, window_right = checks.window(window_size)
    return softmax_scale, causal, window_left, window_right, softcap, sm_margin


def _unpack(
    qkv: torch.Tensor, num_heads_q: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks.tensors(qkv=qkv)
    if num_heads_q is not None:
        num_heads_q = checks.integer("num_heads_q", num_heads_q)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        if num_heads_q is not None and num_heads_q != qkv.shape[3]:
            raise ValueError(
                f"num_heads_q must be None or qkv's {qkv.shape[3]} heads where qkv has 5 "
                f"dimensions, got {num_heads_q}"
            )
        q, k, v = qkv.unbind(dim=2)
        return q, k, v
    if qkv.dim() != 4:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + "
            f"2 * heads_kv, head_dim) with num_heads_q, got shape {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise ValueError("num_heads_q must be given where qkv has 4 dimensions, got None")
    heads_kv, rest = divmod(qkv.shape[2] - num_heads_q, 2)
    if num_heads_q < 0 or heads_kv < 0 or rest:
        raise ValueError(
            "num_heads_q must leave an even number of heads for k and v, got "
            f"{num_heads_q} of qkv's {qkv.shape[2]} heads"
        )
    q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)
    return q, k, v


def _not_built(name: str, allowed: str, value: Any = None) -> None:
    got = "" if value is None else f", got {value!r}"
    raise NotImplementedError(f"{name} is not built yet: it must be {allowed}{got}")
