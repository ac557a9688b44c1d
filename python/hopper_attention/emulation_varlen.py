"""What the packed batches' kernel computes, on the CPU: `emulation` of each sequence by itself.

A sequence's tiles begin at its own first row and key, so a neighbour changes no rounding.
"""

from __future__ import annotations

from functools import partial

import torch

from . import emulation
from ._sequences import attend_to_each
from .checks_varlen import Lengths, packed_dims


def attention(
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
    tile: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the kernel's roundings within each sequence of a packed batch, on the CPU.

    Args:
        q: (total_q, heads, head_dim), float16 or bfloat16, on the CPU.
        k: (total_k, heads_kv, head_dim); heads_kv divides heads.
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: as in `reference.varlen_attention`.
        cu_seqlens_k: likewise.
        seqused_q: likewise.
        seqused_k: likewise.
        softmax_scale: as in `emulation.attention`, and so are the arguments below.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        tile: (tile_m, tile_n), query rows and keys of a block; None is the kernel's own.

    Returns:
        out (total_q, heads, head_dim_v) in q's dtype and lse (heads, total_q) in float32. Rows that
        see no key or that no sequence uses have out 0 and lse -inf.

    Raises:
        ValueError, TypeError: as `reference.varlen_attention`.
        RuntimeError: as `emulation.attention`.
    """
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    if tile is None:
        *_, head_dim, head_dim_v = packed_dims(q, k, v, lengths)
        row = emulation.kernel_row(q.dtype, head_dim, head_dim_v, 0, masked=True, packed=True)
        tile = row["tile_m"], row["tile_n"]
    attend = partial(
        emulation.attention,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        tile=tile,
    )
    return attend_to_each(attend, q, k, v, lengths)
