"""Inputs for the GPU tests, and the comparison that they share.

The rule: against attention in float64, the largest error is at most twice that of PyTorch's
attention in the same precision plus 1e-5; the log-sum-exp agrees; rows without a key are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hopper_attention
from hopper_attention import reference
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.standard import standard_attention

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16]
# (head_dim, head_dim_v) of every compiled kernel
TILES = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]

ERROR_FACTOR = 2.0
ERROR_SLACK = 1e-5
# fp32 sums of exponentials whose arguments are themselves fp32 sums
LSE_ABSOLUTE = 1e-4
LSE_RELATIVE = 1e-5
# tanh is within 1e-7 and rounded, as its argument is; of scores up to the soft cap
LSE_SOFTCAP = 2.0**-20


@dataclass(frozen=True)
class Problem:
    """Sizes of one problem; head_dim_v and heads_kv are head_dim and heads when 0."""

    seqlen_q: int = 200
    seqlen_k: int = 200
    head_dim: int = 128
    head_dim_v: int = 0
    batch: int = 2
    heads: int = 3
    heads_kv: int = 0
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draws contiguous q, k and v from N(0, 1)."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        heads_kv, head_dim_v = self.heads_kv or self.heads, self.head_dim_v or self.head_dim
        sizes = (
            (self.batch, self.seqlen_q, self.heads, self.head_dim),
            (self.batch, self.seqlen_k, heads_kv, self.head_dim),
            (self.batch, self.seqlen_k, heads_kv, head_dim_v),
        )
        q, k, v = (
            torch.randn(size, device=DEVICE, dtype=self.dtype, generator=generator)
            for size in sizes
        )
        return q, k, v

    def but(self, **changes: Any) -> Problem:
        """The problem with some sizes changed."""
        return replace(self, **changes)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The kernel's output and log-sum-exp."""
    result: tuple[Tensor, Tensor] = hopper_attention.flash_attn_func(
        q, k, v, return_attn_probs=True, **options
    )
    return result


def poison_outputs(q: Tensor, v: Tensor) -> None:
    """Leaves NaN in the memory that the outputs will be allocated in, as far as it can be told."""
    batch, seqlen_q, heads, _ = q.shape
    out = torch.full((batch, seqlen_q, heads, v.shape[3]), math.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, seqlen_q), math.nan, device=q.device)
    del out, lse


def standard_inputs(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionInputs:
    """A problem for PyTorch's attention, with the options of `flash_attn_func`."""
    scale = options.get("softmax_scale")
    return AttentionInputs(
        q,
        k,
        v,
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=options.get("causal", False),
        window_size=options.get("window_size", (-1, -1)),
        softcap=options.get("softcap", 0.0),
    )


def same_precision(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention, step by step in the inputs' dtype."""
    return standard_attention(standard_inputs(q, k, v, **options))


def rmse(out: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference."""
    return (out.double() - exact).square().mean().sqrt().item()


def largest_error(out: Tensor, exact: Tensor) -> float:
    """Largest difference; NaN where there is one."""
    return (out.double() - exact).abs().max().item() if exact.numel() else 0.0


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Runs the kernel on poisoned outputs and compares with float64; returns (out, lse)."""
    poison_outputs(q, v)
    out, lse = attention(q, k, v, **options)
    compare(out, lse, q, k, v, **options)
    return out, lse


def compare(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Asserts the rule for outputs that are there already."""
    batch, seqlen_q, heads, _ = q.shape
    head_dim_v = v.shape[3]
    assert out.shape == (batch, seqlen_q, heads, head_dim_v)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.shape == (batch, heads, seqlen_q)
    assert lse.dtype == torch.float32
    options = {name: value for name, value in options.items() if name != "sm_margin"}
    exact, exact_lse = reference.attention(q, k, v, **options)
    usual = largest_error(same_precision(q, k, v, **options), exact)
    what = (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, d_v {head_dim_v}, {q.dtype}, "
        f"{options}: largest error"
    )
    error, allowed = largest_error(out, exact), ERROR_FACTOR * usual + ERROR_SLACK
    assert error <= allowed, f"{what} {error:.3g}, allowed {allowed:.3g}"
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty), f"{what}: lse is -inf elsewhere"
    assert not out.transpose(1, 2)[empty].any(), f"{what}: a row without a key is not 0"
    lse_error = (lse.double() - exact_lse)[~empty].abs()
    lse_allowed = LSE_ABSOLUTE + LSE_RELATIVE * exact_lse[~empty].abs()
    lse_allowed += LSE_SOFTCAP * options.get("softcap", 0.0)
    assert (lse_error <= lse_allowed).all(), f"{what}: lse is off by {lse_error.max().item():.3g}"


def surround(
    tensor: Tensor, padding: tuple[int, int, int, int], fill: float = math.nan
) -> tuple[Tensor, Tensor]:
    """Puts a tensor into the middle of a larger one that holds fill.

    Args:
        tensor: (batch, seq, head, dim)
        padding: Elements before and after it in each dimension; those of the last are put after it
            only, and are a multiple of 8, so that the address and the strides stay aligned.
        fill: What lies around it.

    Returns:
        The larger tensor, and the view of it with the tensor's values.
    """
    batch, seq, head, last = padding
    sizes = [size + 2 * pad for size, pad in zip(tensor.shape[:3], padding[:3], strict=True)]
    around = torch.full(
        (*sizes, tensor.shape[3] + last), fill, dtype=tensor.dtype, device=tensor.device
    )
    view = around[
        batch : batch + tensor.shape[0],
        seq : seq + tensor.shape[1],
        head : head + tensor.shape[2],
        : tensor.shape[3],
    ]
    view.copy_(tensor)
    return around, view


def strided(tensor: Tensor, padding: tuple[int, int, int, int], fill: float = math.nan) -> Tensor:
    """The view that `surround` makes."""
    return surround(tensor, padding, fill)[1]


def heads_outside(tensor: Tensor) -> Tensor:
    """The same values, (batch, head, seq, dim) in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(tensor: Tensor) -> Tensor:
    """The same values, (seq, batch, head, dim) in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def name(value: Any) -> str | None:
    """A readable id for pytest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "plain"
    return None
