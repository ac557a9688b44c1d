"""V as the FP8 kernels' second product reads it: transposed, and its keys permuted.

In the second product's A operand a thread holds four adjacent columns of P; of the first product's
result it has columns 2a and 2a + 1 of each eight. In the order of keys that `key_of_slot` gives,
both are the same, and P stays in its registers.
"""

from __future__ import annotations

import torch

V_TOKENS_PADDING = 128
"""Transposed V has a multiple of so many keys a sequence."""

_SLOTS = 16


def key_of_slot(slot: int) -> int:
    """Which of 16 neighbouring keys a slot of transposed V holds: 0, 1, 8, 9, 2, 3, 10, 11, ..."""
    quad, place = divmod(slot, 4)
    return 2 * quad + place if place < 2 else 8 + 2 * quad + place - 2


def transpose_v(v: torch.Tensor) -> torch.Tensor:
    """Transposes V, permutes its keys and pads them with zeros.

    Args:
        v: (batch, seqlen_k, heads_kv, head_dim_v), any dtype.

    Returns:
        (batch, heads_kv, head_dim_v, padded), padded = seqlen_k rounded up to `V_TOKENS_PADDING`;
        [b, h, c, 16 g + slot] is V[b, 16 g + key_of_slot(slot), h, c].
    """
    batch, seqlen, heads, head_dim = v.shape
    padded = -(-seqlen // V_TOKENS_PADDING) * V_TOKENS_PADDING
    whole = torch.zeros(batch, padded, heads, head_dim, dtype=v.dtype, device=v.device)
    whole[:, :seqlen] = v
    # key 8 half + 2 quad + pair of sixteen goes to slot 4 quad + 2 half + pair
    keys = whole.view(batch, padded // _SLOTS, 2, 4, 2, heads, head_dim)
    slots = keys.permute(0, 5, 6, 1, 3, 2, 4)
    return slots.reshape(batch, heads, head_dim, padded)


def untranspose_v(v: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """The inverse of `transpose_v`.

    Args:
        v: (batch, heads_kv, head_dim_v, padded).
        seqlen_k: keys to return.

    Returns:
        (batch, seqlen_k, heads_kv, head_dim_v).
    """
    batch, heads, head_dim, padded = v.shape
    slots = v.view(batch, heads, head_dim, padded // _SLOTS, 4, 2, 2)
    keys = slots.permute(0, 3, 5, 4, 6, 1, 2)
    return keys.reshape(batch, padded, heads, head_dim)[:, :seqlen_k]
