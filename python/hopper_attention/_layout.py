"""Which tensors the kernels read in place, and which must be copied first.

TMA, which loads the tiles, wants a contiguous head dimension, and an address and strides that are
multiples of 16 bytes. Everything here is for 16-bit elements.
"""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

Strides = tuple[int, int, int]  # of batch, sequence and head, in elements
PackedStrides = tuple[int, int]  # of sequence and head

_GRANULE = 16  # bytes
_GRANULE_ELEMENTS = _GRANULE // 2
# Bits that no legal stride has: below 16 bytes, or from 2^40 bytes on (as the sign is).
_ILLEGAL_BITS = ~((1 << 39) - _GRANULE_ELEMENTS)


def kernel_view(tensor: torch.Tensor) -> tuple[torch.Tensor, Strides]:
    """The tensor, or a contiguous copy where its layout demands one, and its strides."""
    batch, seq, head, last = tensor.stride()
    if last == 1 and not (batch | seq | head) & _ILLEGAL_BITS and not tensor.data_ptr() % _GRANULE:
        return tensor, (batch, seq, head)
    if copy_reason(tensor) is not None:
        # Not .contiguous(): that would return a contiguous tensor at an odd address as it is.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor, _legal_strides(tensor)


def planned_strides(tensor: torch.Tensor) -> Strides:
    """The strides that `kernel_view` would return, without the copy."""
    if copy_reason(tensor) is None:
        return _legal_strides(tensor)
    seqlen, heads, head_dim = tensor.shape[1:]
    return seqlen * heads * head_dim, heads * head_dim, head_dim


def packed_view(tensor: torch.Tensor) -> tuple[torch.Tensor, PackedStrides]:
    """`kernel_view` of a tensor without a batch dimension."""
    if copy_reason(tensor[None]) is not None:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor, _legal_strides(tensor[None])[1:]


def planned_packed_strides(tensor: torch.Tensor) -> PackedStrides:
    """The strides that `packed_view` would return, without the copy."""
    return planned_strides(tensor[None])[1:]


def copy_reason(tensor: torch.Tensor) -> str | None:
    """Why the kernels cannot read this tensor in place, or None when they can."""
    if tensor.numel() == 0:
        return None
    last = tensor.stride(3)
    if last != 1:
        return f"the last dimension has stride {last}, not 1"
    for name, stride in zip(("batch", "sequence", "head"), _legal_strides(tensor), strict=True):
        if stride & _ILLEGAL_BITS:
            return f"the {name} stride, {stride * 2} bytes, is not a multiple of {_GRANULE}"
    if _address(tensor) % _GRANULE:
        return f"the address is not a multiple of {_GRANULE} bytes"
    return None


def _legal_strides(tensor: torch.Tensor) -> Strides:
    # Nothing is read along a dimension of size 1 or of an empty tensor: 0 is as good, and legal.
    empty = tensor.numel() == 0
    sizes, strides = tensor.shape, tensor.stride()
    batch, seq, head = (0 if empty or sizes[i] == 1 else strides[i] for i in range(3))
    return batch, seq, head


def _address(tensor: torch.Tensor) -> int:
    if isinstance(tensor, FakeTensor):
        # It has no memory: as if its storage began aligned.
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
