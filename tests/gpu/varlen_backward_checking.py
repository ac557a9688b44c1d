"""Gradients of packed batches for the GPU tests; the rule is `backward_checking`'s.

Errors are compared over the whole batch; what is exact, and PyTorch's gradient in the same
precision, are of one sequence after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from backward_checking import (
    GRADIENTS,
    OF_KERNELS,
    Tensors,
    apply_rule,
    check_unseen,
    differentiate,
    draw,
    exact_gradients,
    sum_rounding,
    tile_head_dim,
    usual_gradients,
)
from checking import DEVICE
from torch import Tensor
from varlen_checking import Packed, attention

from hopper_attention.checks_varlen import Lengths

# Rows of the workspace that a sequence begins with, at most
_LARGEST_TILE = 128


class Call:
    """A forward call that can be differentiated again and again.

    Attributes:
        leaves: q, k and v as given, in their own layout, with a gradient.
        out: (total_q, heads, head_dim_v)
        lse: (heads, total_q)
    """

    def __init__(self, inputs: Sequence[Tensor], lengths: Lengths, **options: Any) -> None:
        self.leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            q, k, v = self.leaves
            self.out, self.lse = attention(q, k, v, lengths, **options)

    def gradients(self, dout: Tensor | None, dlse: Tensor | None = None) -> Tensors:
        """dQ, dK and dV, given the gradient of the output, of the log-sum-exp, or of both."""
        return differentiate(self.out, self.lse, self.leaves, dout, dlse)


def gradients(
    inputs: Sequence[Tensor],
    lengths: Lengths,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> Tensors:
    """The kernels' dQ, dK and dV, written to poisoned memory."""
    call = Call(inputs, lengths, **options)
    poison_gradients(inputs, lengths)
    return call.gradients(dout, dlse)


def poison_gradients(inputs: Sequence[Tensor], lengths: Lengths) -> None:
    """Leaves NaN in the memory that gradients and workspace will be allocated in, if it can."""
    total_q, heads, head_dim = inputs[0].shape
    rows = heads * (total_q + len(lengths.cu_seqlens_q) * _LARGEST_TILE)
    poisons = [torch.full(x.shape, math.nan, dtype=x.dtype, device=x.device) for x in inputs]
    poisons.append(torch.full((rows * (tile_head_dim(head_dim) + 2),), math.nan, device=DEVICE))
    del poisons


def used_rows(cu_seqlens: Tensor, seqused: Tensor | None) -> list[slice]:
    """The rows that each sequence uses."""
    bounds = cu_seqlens.tolist()
    used = [end - begin for begin, end in pairwise(bounds)] if seqused is None else seqused.tolist()
    return [slice(begin, begin + n) for begin, n in zip(bounds, used, strict=False)]


def check(
    inputs: Sequence[Tensor],
    lengths: Lengths,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> Tensors:
    """Runs the kernels on poisoned memory and compares with float64; returns the gradients."""
    found = gradients(inputs, lengths, dout, dlse, **options)
    compare(found, inputs, lengths, dout, dlse, **options)
    return found


def check_batch(batch: Packed, **options: Any) -> Tensors:
    """`check` of a batch's random inputs."""
    inputs, dout = draw(batch)
    return check(inputs, batch.lengths(), dout, **options)


def compare(
    found: Sequence[Tensor],
    inputs: Sequence[Tensor],
    lengths: Lengths,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> None:
    """Asserts the rule for gradients that are there already."""
    options = {name: x for name, x in options.items() if name not in OF_KERNELS}
    shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip("qkv", inputs, strict=True))
    what = f"{shapes}, {inputs[0].dtype}, {options}"
    exact = [torch.zeros_like(x, dtype=torch.float64) for x in inputs]
    usual = [torch.zeros_like(x) for x in inputs]
    rounding = dict.fromkeys(GRADIENTS, 0.0)
    of_queries = used_rows(lengths.cu_seqlens_q, lengths.seqused_q)
    of_keys = used_rows(lengths.cu_seqlens_k, lengths.seqused_k)
    for rows, keys in zip(of_queries, of_keys, strict=True):
        parts = (rows, keys, keys)
        qkv = [x[None, part] for x, part in zip(inputs, parts, strict=True)]
        of_out = None if dout is None else dout[None, rows]
        of_lse = None if dlse is None else dlse[None, :, rows]
        for whole, grads in (
            (exact, exact_gradients(qkv, of_out, of_lse, **options)),
            (usual, usual_gradients(qkv, of_out, of_lse, **options)),
        ):
            for x, part, grad in zip(whole, parts, grads, strict=True):
                x[part] = grad[0]
        here = sum_rounding(qkv, of_out, **options)
        rounding = {name: max(value, here[name]) for name, value in rounding.items()}
        own = [x[None, part] for x, part in zip(found, parts, strict=True)]
        check_unseen(own, qkv, what, **options)
    whole_batch = ([x[None] for x in tensors] for tensors in (found, exact, usual, inputs))
    apply_rule(*whole_batch, rounding, what)
    for name, grad, used in zip(GRADIENTS, found, (of_queries, of_keys, of_keys), strict=True):
        idle = torch.ones(grad.shape[0], dtype=torch.bool, device=grad.device)
        for rows in used:
            idle[rows] = False
        assert not grad[idle].any(), f"{what}: {name} of rows that no sequence uses is not 0"
