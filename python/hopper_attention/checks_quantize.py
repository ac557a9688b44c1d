"""Checks of the quantizer's arguments: every error names the argument and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .recipe import Fp8Recipe


@dataclass(frozen=True)
class Call:
    """The operator's arguments after q, k and v."""

    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    recipe: Fp8Recipe
    rotary_interleaved: bool
    rotary_q_offset: int | None
    rotary_k_offset: int

    @classmethod
    def make(
        cls,
        rotary_cos: torch.Tensor | None,
        rotary_sin: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        qk_scale: Any,
        v_scale: Any,
        hadamard: bool,
        seed: int,
        smooth_k: bool,
        transpose_v: bool,
        *rotary: Any,
    ) -> Call:
        """From the operator's arguments, in its order."""
        recipe = Fp8Recipe(
            qk_scale=qk_scale,
            v_scale=v_scale,
            hadamard=hadamard,
            seed=seed,
            smooth_k=smooth_k,
            transpose_v=transpose_v,
        )
        return cls(rotary_cos, rotary_sin, cu_seqlens_q, cu_seqlens_k, recipe, *rotary)

    @property
    def packed(self) -> bool:
        """Whether q, k and v hold sequences one after another."""
        return self.cu_seqlens_q is not None


def request(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> checks.Dims:
    """Checks all but addresses; nothing is read from a tensor.

    Returns:
        (batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v); where packed, batch is
        the number of sequences and the lengths are those of all together.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a dtype is not allowed.
    """
    if call.packed != (call.cu_seqlens_k is not None):
        missing = "cu_seqlens_k" if call.packed else "cu_seqlens_q"
        raise ValueError(f"{missing} is None: cu_seqlens_q and cu_seqlens_k must come together")
    batch = _check_cu_seqlens(q, call) if call.packed else 0
    if call.packed:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dim() != 3:
                raise ValueError(
                    f"{name} must have 3 dimensions (total, heads, head_dim) with cu_seqlens, got "
                    f"{tensor.dim()}: {tuple(tensor.shape)}"
                )
        q, k, v = q[None], k[None], v[None]
    dims = checks.attention_dims(q, k, v)
    dense_batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v = dims
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q, k and v must be torch.float16 or torch.bfloat16, got {q.dtype}")
    for name, size in (("q and k", head_dim), ("v", head_dim_v)):
        if size % 8 or not 8 <= size <= checks.MAX_HEAD_DIM:
            raise ValueError(
                f"head dimension of {name} must be a multiple of 8 from 8 to "
                f"{checks.MAX_HEAD_DIM}, got {size}"
            )
    checks.lengths(dense_batch, seqlen_q, seqlen_k, heads)
    _check_rotary(q, seqlen_q, seqlen_k, head_dim, call)
    batch = batch if call.packed else dense_batch
    return batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v


def _check_cu_seqlens(q: torch.Tensor, call: Call) -> int:
    """Checks what can be seen without reading them; returns the number of sequences."""
    named = (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k))
    for name, tensor in named:
        assert tensor is not None
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] < 2 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be (batch + 1,), contiguous, with at least 2 entries, got "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    batch, batch_k = call.cu_seqlens_q.shape[0] - 1, call.cu_seqlens_k.shape[0] - 1
    if batch != batch_k:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have the same length, got {batch + 1} and "
            f"{batch_k + 1}"
        )
    return batch


def _check_rotary(q: torch.Tensor, seqlen_q: int, seqlen_k: int, head_dim: int, call: Call) -> None:
    cos, sin = call.rotary_cos, call.rotary_sin
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing} is None: rotary_cos and rotary_sin must come together")
    if cos is None or sin is None:
        return
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        if tensor.dim() != 2 or tensor.shape != cos.shape:
            raise ValueError(
                "rotary_cos and rotary_sin must be (positions, rotary_dim / 2), got "
                f"{tuple(cos.shape)} and {tuple(sin.shape)}"
            )
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise TypeError(f"{name} must be of 16 or 32 bits, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % 16 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim, twice the width of rotary_cos, must be a multiple of 16 up to head_dim "
            f"{head_dim}, got {rotary_dim}"
        )
    if call.packed:
        return  # each sequence's positions are known to the device alone
    offset_q = seqlen_k - seqlen_q if call.rotary_q_offset is None else call.rotary_q_offset
    if call.rotary_q_offset is None:
        offset_q += call.rotary_k_offset
    for name, offset, length in (
        ("q", offset_q, seqlen_q),
        ("k", call.rotary_k_offset, seqlen_k),
    ):
        if length and (offset < 0 or offset + length > cos.shape[0]):
            raise ValueError(
                f"{name} stands at positions {offset} to {offset + length - 1}, rotary_cos has "
                f"0 to {cos.shape[0] - 1}; see rotary_q_offset and rotary_k_offset"
            )
