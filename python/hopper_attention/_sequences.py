"""Packed batches cut into sequences, which `reference` and `emulation` attend to one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from . import checks
from .checks_varlen import Lengths, packed_dims

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attend_to_each(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence by itself; autograd passes through it.

    Args:
        attention: of dense tensors with batch 1; gives out and lse.
        q: (total_q, heads, head_dim).
        k: (total_k, heads_kv, head_dim).
        v: (total_k, heads_kv, head_dim_v).
        lengths: the batch's; they are read.

    Returns:
        out (total_q, heads, head_dim_v) and lse (heads, total_q), contiguous, in the dtypes that
        attention gives; 0 and -inf in rows that no sequence uses.

    Raises:
        ValueError: a shape, device or length is not allowed.
        TypeError: a type or dtype is not allowed.
    """
    tensors = {name: x for name, x in lengths._asdict().items() if x is not None}
    checks.tensors(q=q, k=k, v=v, **tensors)
    packed_dims(q, k, v, lengths)
    q_bounds = _bounds("cu_seqlens_q", lengths.cu_seqlens_q, q.shape[0])
    k_bounds = _bounds("cu_seqlens_k", lengths.cu_seqlens_k, k.shape[0])
    q_used = _used("seqused_q", lengths.seqused_q, q_bounds)
    k_used = _used("seqused_k", lengths.seqused_k, k_bounds)
    outs, lses = [], []
    for i, (rows, keys) in enumerate(zip(q_used, k_used, strict=True)):
        q_begin, k_begin = q_bounds[i], k_bounds[i]
        part = slice(k_begin, k_begin + keys)
        out, lse = attention(q[None, q_begin : q_begin + rows], k[None, part], v[None, part])
        idle = q_bounds[i + 1] - q_begin - rows
        outs += [out[0], out.new_zeros(idle, *out.shape[2:])]
        lses += [lse[0], lse.new_full((lse.shape[1], idle), -torch.inf)]
    # Of no rows: it has the dtypes where there is no sequence, and checks the other arguments.
    out, lse = attention(q[None, :0], k[None, :0], v[None, :0])
    behind = q.shape[0] - q_bounds[-1]
    outs.append(out.new_zeros(behind, *out.shape[2:]))
    lses.append(lse.new_full((lse.shape[1], behind), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _bounds(name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > total:
        raise ValueError(f"{name} must rise from 0 to at most {total}, got {bounds}")
    return bounds


def _used(name: str, seqused: torch.Tensor | None, bounds: list[int]) -> list[int]:
    lengths = [end - begin for begin, end in pairwise(bounds)]
    if seqused is None:
        return lengths
    used: list[int] = seqused.tolist()
    if any(not 0 <= n <= length for n, length in zip(used, lengths, strict=True)):
        raise ValueError(f"{name} must be from 0 to the sequences' {lengths}, got {used}")
    return used
