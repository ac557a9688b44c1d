"""Packed batches for the GPU tests, and their comparison; the rule is `checking`'s."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from checking import (
    DEVICE,
    ERROR_FACTOR,
    ERROR_SLACK,
    LSE_ABSOLUTE,
    LSE_RELATIVE,
    LSE_SOFTCAP,
    largest_error,
    same_precision,
)
from torch import Tensor

import hopper_attention
from hopper_attention import reference
from hopper_attention._sequences import attend_to_each
from hopper_attention.checks_varlen import Lengths

# Lengths 0, 1, one off a tile's rows and keys, prime, and longer on either side.
ROWS = (77, 300, 0, 129, 1000, 1, 128, 64, 127, 191, 193, 2, 63, 65, 257, 521)
KEYS = (77, 300, 40, 500, 1000, 1, 0, 333, 129, 64, 2, 176, 1023, 80, 79, 521)

CANARY = -12345.0  # rounds to a number in bf16, and is no output of ours


def cumulate(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


@dataclass(frozen=True)
class Packed:
    """A packed batch; head_dim_v is head_dim when 0, keys are rows when None.

    Attributes:
        rows: Of q, for each sequence.
        keys: Likewise.
        used_q: How many of its rows each sequence uses; None: no seqused_q.
        used_k: Likewise.
        behind: Rows of q, and as many keys, behind the last sequence.
    """

    rows: tuple[int, ...] = ROWS
    keys: tuple[int, ...] | None = KEYS
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    behind: int = 0
    head_dim: int = 128
    head_dim_v: int = 0
    heads: int = 6
    heads_kv: int = 2
    dtype: torch.dtype = torch.bfloat16

    def but(self, **changes: Any) -> Packed:
        """The batch with some fields changed."""
        return replace(self, **changes)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draws contiguous q, k and v from N(0, 1)."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        total_q = sum(self.rows) + self.behind
        total_k = sum(self.rows if self.keys is None else self.keys) + self.behind
        sizes = (
            (total_q, self.heads, self.head_dim),
            (total_k, self.heads_kv, self.head_dim),
            (total_k, self.heads_kv, self.head_dim_v or self.head_dim),
        )
        q, k, v = (
            torch.randn(size, device=DEVICE, dtype=self.dtype, generator=generator)
            for size in sizes
        )
        return q, k, v

    def lengths(self) -> Lengths:
        """On the device."""
        used = [
            None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE)
            for x in (self.used_q, self.used_k)
        ]
        keys = self.rows if self.keys is None else self.keys
        return Lengths(cumulate(self.rows), cumulate(keys), *used)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernel's output and log-sum-exp."""
    cu_q, cu_k, used_q, used_k = lengths
    result: tuple[Tensor, Tensor] = hopper_attention.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, None, None, used_q, used_k), return_attn_probs=True, **options
    )
    return result


def check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, **options: Any
) -> tuple[Tensor, Tensor]:
    """Runs the kernel on poisoned outputs and compares with float64; returns (out, lse)."""
    total_q, heads, _ = q.shape
    out = torch.full((total_q, heads, v.shape[2]), math.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((heads, total_q), math.nan, device=q.device)
    del out, lse  # the memory that the outputs will be allocated in, as far as it can be told
    out, lse = attention(q, k, v, lengths, **options)
    compare(out, lse, q, k, v, lengths, **options)
    return out, lse


def compare(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, **options: Any
) -> None:
    """Asserts the rule for outputs that are there already."""
    total_q, heads, _ = q.shape
    assert (out.shape, lse.shape) == ((total_q, heads, v.shape[2]), (heads, total_q))
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert out.is_contiguous()
    options = {name: value for name, value in options.items() if name != "sm_margin"}
    exact, exact_lse = reference.varlen_attention(q, k, v, *lengths, **options)

    def usual_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return same_precision(q, k, v, **options), q.new_zeros(1, heads, q.shape[1])

    usual, _ = attend_to_each(usual_attention, q, k, v, lengths)
    allowed = ERROR_FACTOR * largest_error(usual, exact) + ERROR_SLACK
    error = largest_error(out, exact)
    what = f"q {tuple(q.shape)}, k {tuple(k.shape)}, d_v {v.shape[2]}, {q.dtype}, {options}"
    assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g}"
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty), f"{what}: lse is -inf elsewhere"
    assert not out.transpose(0, 1)[empty].any(), f"{what}: a row without a key is not 0"
    lse_error = (lse.double() - exact_lse)[~empty].abs()
    lse_allowed = LSE_ABSOLUTE + LSE_RELATIVE * exact_lse[~empty].abs()
    lse_allowed += LSE_SOFTCAP * options.get("softcap", 0.0)
    assert (lse_error <= lse_allowed).all(), f"{what}: lse is off by {lse_error.max().item():.3g}"
