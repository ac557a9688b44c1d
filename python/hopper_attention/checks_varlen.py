"""Checks of packed batches: every error names the argument, what it was and what is allowed.

The lengths themselves lie on the device and are not read: the kernels hold them to the tensors'
totals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import checks


class Lengths(NamedTuple):
    """Where the sequences of a packed batch lie; int32 tensors, (batch + 1,) and (batch,)."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


def packed_dims(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths) -> checks.Dims:
    """Checks that the tensors of a packed batch fit together; totals and head counts may be 0.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_kv, head_dim), q's dtype and device; heads_kv divides heads.
        v: (total_k, heads_kv, head_dim_v), likewise.
        lengths: on q's device.

    Returns:
        (batch, total_q, total_k, heads, heads_kv, head_dim, head_dim_v).

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (total, heads, head_dim) in a packed batch, got "
                f"{tensor.dim()}: {tuple(tensor.shape)}"
            )
    total_q, heads, head_dim = q.shape
    total_k, heads_kv, head_dim_k = k.shape
    total_v, heads_v, head_dim_v = v.shape
    if total_k != total_v:
        checks._fail("number of rows (dimension 0)", k=total_k, v=total_v)
    if heads_kv != heads_v:
        checks._fail("number of heads (dimension 1)", k=heads_kv, v=heads_v)
    if head_dim != head_dim_k:
        checks._fail("head dimension (dimension 2)", q=head_dim, k=head_dim_k)
    checks.belong_together(q, k, v, heads, heads_kv)
    batch = batch_of(lengths, q.device)
    return batch, total_q, total_k, heads, heads_kv, head_dim, head_dim_v


def batch_of(lengths: Lengths, device: torch.device) -> int:
    """Checks shapes, dtypes and devices of the lengths; returns the number of sequences.

    Raises:
        ValueError: a shape or device is not allowed.
        TypeError: a dtype is not allowed.
    """
    for name, tensor in lengths._asdict().items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must have 1 dimension and be contiguous, got shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on q's device, {device}, got {tensor.device}")
    entries, entries_k = lengths.cu_seqlens_q.shape[0], lengths.cu_seqlens_k.shape[0]
    if entries < 1 or entries != entries_k:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both have batch + 1 entries, got "
            f"{entries} and {entries_k}"
        )
    for name, tensor in (("seqused_q", lengths.seqused_q), ("seqused_k", lengths.seqused_k)):
        if tensor is not None and tensor.shape[0] != entries - 1:
            raise ValueError(
                f"{name} must have an entry for each of the {entries - 1} sequences of "
                f"cu_seqlens_q, got {tensor.shape[0]}"
            )
    return entries - 1


def limits(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> int:
    """`checks.kernel_limits` of packed batches.

    Raises:
        NotImplementedError: dtype is an FP8 type.
        TypeError, ValueError: as `checks.kernel_limits`.
    """
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise NotImplementedError(
            f"q, k and v: packed batches of {dtype} are not built yet; pass torch.float16 or "
            "torch.bfloat16, or sequences of one length to flash_attn_func"
        )
    return checks.kernel_limits(dtype, head_dim, head_dim_v)


def request(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, scalars: tuple[Any, ...]
) -> tuple[int, checks.Dims]:
    """Checks all that the kernels ask of a call but its device, addresses and strides.

    Args:
        q: as `packed_dims` takes it.
        k: likewise.
        v: likewise.
        lengths: likewise.
        scalars: softmax_scale, causal, window_left, window_right, softcap, sm_margin.

    Returns:
        The dtype's code in the C interface, and the dimensions.

    Raises:
        ValueError, TypeError, NotImplementedError: as the functions above.
    """
    dims = packed_dims(q, k, v, lengths)
    batch, total_q, total_k, heads, _, head_dim, head_dim_v = dims
    code = limits(q.dtype, head_dim, head_dim_v)
    softmax_scale, _, window_left, window_right, softcap, sm_margin = scalars
    checks.scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    checks.lengths(batch, total_q, total_k, heads)
    return code, dims


def max_seqlen(name: str, value: Any) -> None:
    """Checks an argument that the kernels do without.

    Raises:
        TypeError: value is neither an int nor None.
        ValueError: value is negative.
    """
    if value is None:
        return
    if type(value) is not int:  # what torch.compile makes of an int is one, and stays symbolic
        value = checks.integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, or None, got {value}")
