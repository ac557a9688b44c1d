"""Checks of the e4m3 forward's arguments: every error names the argument and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import checks
from .recipe import QK_BLOCK_TOKENS

_OUTPUTS = (torch.float16, torch.bfloat16)
WHOLE = 0  # tokens of a scale that covers the sequence


@dataclass(frozen=True)
class Tensors:
    """The operator's tensors; None is a scale of 1, or no sink."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    v_token_factor: torch.Tensor | None = None
    learnable_sink: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What the shapes of a call say."""

    dims: checks.Dims
    q_tokens: int  # that a scale covers: 1, 128 or `WHOLE`
    k_tokens: int
    q_per_kv: bool  # q's scales are those of heads_kv heads
    v_per_channel: bool


def request(
    x: Tensors,
    out_dtype: torch.dtype,
    v_transposed: bool,
    scalars: tuple[float, bool, int, int, float, int],
) -> Request:
    """Checks all but addresses and strides; nothing is read from a tensor.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a dtype is not allowed.
    """
    for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v)):
        if tensor.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} must be torch.float8_e4m3fn, got {tensor.dtype}")
    if out_dtype not in _OUTPUTS:
        raise TypeError(f"out_dtype must be torch.bfloat16 or torch.float16, got {out_dtype}")
    dims = checks.attention_dims(x.q, x.k, _as_rows(x.k, x.v) if v_transposed else x.v)
    batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v = dims
    checks.kernel_limits(out_dtype, head_dim, head_dim_v)
    softmax_scale, _, window_left, window_right, softcap, sm_margin = scalars
    checks.scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    checks.lengths(batch, seqlen_q, seqlen_k, heads)
    q_tokens = _tokens("q_descale", x.q_descale, x, (batch, heads, seqlen_q), heads_kv)
    k_tokens = _tokens("k_descale", x.k_descale, x, (batch, heads_kv, seqlen_k), heads_kv)
    factor = x.v_token_factor
    if factor is not None:
        _check_floats("v_token_factor", factor, x.q)
        if factor.shape != (batch, heads_kv, seqlen_k):
            raise ValueError(
                f"v_token_factor must be (batch, heads_kv, seqlen_k), {batch, heads_kv, seqlen_k}, "
                f"got {tuple(factor.shape)}"
            )
    if x.learnable_sink is not None:
        checks.sink(x.learnable_sink, heads, x.q.device)
    q_per_kv = x.q_descale is not None and x.q_descale.dim() == 2
    per_channel = _is_per_channel(x, batch, heads_kv, head_dim_v)
    return Request(dims, q_tokens, k_tokens, q_per_kv, per_channel)


def _as_rows(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A view of a transposed v with the shape that it has in rows."""
    if v.dim() != 4 or k.dim() != 4:
        return v
    padded = -(-k.shape[1] // QK_BLOCK_TOKENS) * QK_BLOCK_TOKENS
    if v.shape[3] != padded:
        raise ValueError(
            "v must be (batch, heads_kv, head_dim_v, seqlen_k rounded up to "
            f"{QK_BLOCK_TOKENS}) where v_transposed, got {tuple(v.shape)} beside seqlen_k "
            f"{k.shape[1]}"
        )
    return v[..., : k.shape[1]].permute(0, 3, 1, 2)


def _tokens(
    name: str,
    descale: torch.Tensor | None,
    x: Tensors,
    sizes: tuple[int, int, int],
    heads_kv: int,
) -> int:
    """Tokens that one scale covers. Where lengths make that ambiguous the answers mean the same."""
    if descale is None:
        return WHOLE
    _check_floats(name, descale, x.q)
    batch, heads, seqlen = sizes
    if descale.dim() == 2 and descale.shape == (batch, heads_kv):
        return WHOLE
    blocks = -(-seqlen // QK_BLOCK_TOKENS)
    if descale.dim() == 3 and descale.shape[:2] == (batch, heads):
        for count, tokens in ((1, WHOLE), (blocks, QK_BLOCK_TOKENS), (seqlen, 1)):
            if descale.shape[2] == count:
                return tokens
    raise ValueError(
        f"{name} must be (batch, heads_kv), {batch, heads_kv}, or (batch, heads, n), "
        f"({batch}, {heads}, n) with n 1, {blocks} (blocks of {QK_BLOCK_TOKENS} tokens) or "
        f"{seqlen} (tokens), got {tuple(descale.shape)}"
    )


def _is_per_channel(x: Tensors, batch: int, heads_kv: int, head_dim_v: int) -> bool:
    descale = x.v_descale
    if descale is None:
        return False
    _check_floats("v_descale", descale, x.q)
    if descale.dim() == 2 and descale.shape == (batch, heads_kv):
        return False
    if descale.dim() == 3 and descale.shape[:2] == (batch, heads_kv):
        if descale.shape[2] == 1:
            return False
        if descale.shape[2] == head_dim_v:
            return True
    raise ValueError(
        f"v_descale must be (batch, heads_kv), {batch, heads_kv}, or (batch, heads_kv, n), "
        f"({batch}, {heads_kv}, n) with n 1 or {head_dim_v} (channels), got {tuple(descale.shape)}"
    )


def _check_floats(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be torch.float32, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
