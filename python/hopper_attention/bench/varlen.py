"""The contestants of suite varlen: packed batches, here and by FlashAttention-3, and dense ones.

Each does the forward pass, the backward pass, or both. As in the other suites the backward pass is
timed alone: given dO, Q, K, V, O and the log-sum-exp, find dQ, dK and dV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hopper_attention.bench.backward import FA3_DETERMINISTIC, OURS_DETERMINISTIC, Gradients
from hopper_attention.bench.contestants import (
    OURS,
    UnavailableError,
    collect,
    load_fa3,
    require_kernels,
)
from hopper_attention.bench.shapes import PACKED, Shape

OURS_DENSE = "hopper_attention_dense"  # the same sequences in a dense batch
FORWARD, BACKWARD = PARTS = ("forward", "backward")


@dataclass(frozen=True)
class PackedBatch:
    """A packed batch whose sequences have as many keys as queries.

    Attributes:
        shape: The problem.
        q: (tokens, heads, head_dim)
        k: (tokens, heads_kv, head_dim)
        v: (tokens, heads_kv, head_dim_v)
        dout: (tokens, heads, head_dim_v)
        cu_seqlens: (batch + 1,) int32, where each sequence begins, and where the last ends.
    """

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor

    @property
    def longest(self) -> int:
        """The longest sequence's length."""
        return max(self.shape.lengths)

    def rows(self, sequence: int) -> slice:
        """The rows of one sequence."""
        end = sum(self.shape.lengths[: sequence + 1])
        return slice(end - self.shape.lengths[sequence], end)


def draw(shape: Shape, device: str, seed: int = 0) -> PackedBatch:
    """Draws a batch from N(0, 1)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(heads: int, head_dim: int) -> Tensor:
        size = (sum(shape.lengths), heads, head_dim)
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    q, k = normal(shape.heads, shape.head_dim), normal(shape.heads_kv, shape.head_dim)
    v, dout = normal(shape.heads_kv, shape.head_dim_v), normal(shape.heads, shape.head_dim_v)
    bounds = [0, *accumulate(shape.lengths)]
    return PackedBatch(shape, q, k, v, dout, torch.tensor(bounds, dtype=torch.int32, device=device))


class PackedContestant(Protocol):
    """An implementation of attention of packed batches.

    Attributes:
        name: What its records are under.
        parts: Which passes it takes part in, of `PARTS`.
    """

    name: str
    parts: tuple[str, ...]

    def takes(self, shape: Shape) -> bool:
        """Whether the problem is one for it."""

    def forward(self, batch: PackedBatch) -> Callable[[], Tensor]:
        """Prepares a forward call, which returns (tokens, heads, head_dim_v).

        Raises:
            UnavailableError: The implementation does not do this problem.
        """

    def backward(self, batch: PackedBatch) -> Callable[[], Gradients]:
        """Runs the forward pass; prepares a backward call, which returns dQ, dK and dV.

        Raises:
            UnavailableError: The implementation does not do this problem.
        """


class OursPacked:
    """This package's `flash_attn_varlen_func`, and the operator of its gradient."""

    def __init__(self, deterministic: bool = False) -> None:
        import hopper_attention
        from hopper_attention import ops_varlen_backward

        require_kernels()
        self.name = OURS_DETERMINISTIC if deterministic else OURS
        self.parts: tuple[str, ...] = (BACKWARD,) if deterministic else PARTS
        self._deterministic = deterministic
        self._attend = hopper_attention.flash_attn_varlen_func
        self._backward = ops_varlen_backward.backward

    def takes(self, shape: Shape) -> bool:
        """Takes all; see `PackedContestant.takes`."""
        return True

    def _call(self, batch: PackedBatch, return_attn_probs: bool) -> Any:
        bounds, longest = batch.cu_seqlens, batch.longest
        return self._attend(
            *(batch.q, batch.k, batch.v, bounds, bounds, longest, longest),
            causal=batch.shape.causal,
            return_attn_probs=return_attn_probs,
        )

    def forward(self, batch: PackedBatch) -> Callable[[], Tensor]:
        """Prepares a call; see `PackedContestant.forward`."""
        return lambda: cast(Tensor, self._call(batch, False))

    def backward(self, batch: PackedBatch) -> Callable[[], Gradients]:
        """Prepares a call; see `PackedContestant.backward`."""
        out, lse = self._call(batch, True)
        shape, bounds = batch.shape, batch.cu_seqlens
        tensors = (
            batch.dout,
            None,
            batch.q,
            batch.k,
            batch.v,
            out,
            lse,
            bounds,
            bounds,
            None,
            None,
        )
        scalars = (shape.head_dim**-0.5, shape.causal, -1, -1, 0.0, self._deterministic)
        return lambda: cast(Gradients, self._backward(*tensors, *scalars))


class OursDense:
    """This package's dense kernels, where the sequences have one length."""

    name = OURS_DENSE
    parts: tuple[str, ...] = PARTS

    def __init__(self) -> None:
        import hopper_attention
        from hopper_attention import ops_backward

        require_kernels()
        self._attend = hopper_attention.flash_attn_func
        self._backward = ops_backward.backward

    def takes(self, shape: Shape) -> bool:
        """Whether all sequences have one length; see `PackedContestant.takes`."""
        return shape.layout == PACKED

    def forward(self, batch: PackedBatch) -> Callable[[], Tensor]:
        """Prepares a call; see `PackedContestant.forward`."""
        q, k, v = (x.unflatten(0, (batch.shape.batch, -1)) for x in (batch.q, batch.k, batch.v))
        causal = batch.shape.causal
        return lambda: cast(Tensor, self._attend(q, k, v, causal=causal)).flatten(0, 1)

    def backward(self, batch: PackedBatch) -> Callable[[], Gradients]:
        """Prepares a call; see `PackedContestant.backward`."""
        shape = batch.shape
        tensors = (batch.q, batch.k, batch.v, batch.dout)
        q, k, v, dout = (x.unflatten(0, (shape.batch, -1)) for x in tensors)
        out, lse = self._attend(q, k, v, causal=shape.causal, return_attn_probs=True)
        scalars = (shape.head_dim**-0.5, shape.causal, -1, -1, 0.0, False)

        def run() -> Gradients:
            found = self._backward(dout, None, q, k, v, out, lse, *scalars)
            return cast(Gradients, tuple(x.flatten(0, 1) for x in found))

        return run


class Fa3Packed:
    """FlashAttention-3's operators with ``cu_seqlens``."""

    def __init__(self, peers_dir: Path | None = None, deterministic: bool = False) -> None:
        where = load_fa3(peers_dir)
        if deterministic and not hasattr(torch.ops.flash_attn_3, "bwd"):
            raise UnavailableError(f"{where} does not define torch.ops.flash_attn_3.bwd")
        self.name = FA3_DETERMINISTIC if deterministic else "fa3"
        self.parts: tuple[str, ...] = (BACKWARD,) if deterministic else PARTS
        self._deterministic = deterministic
        self._operators = torch.ops.flash_attn_3

    def takes(self, shape: Shape) -> bool:
        """Takes all; see `PackedContestant.takes`."""
        return True

    def _keywords(self, batch: PackedBatch) -> dict[str, Any]:
        return {
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), batch.cu_seqlens),
            **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), batch.longest),
            "softmax_scale": batch.shape.head_dim**-0.5,
            "is_causal": batch.shape.causal,
        }

    def forward(self, batch: PackedBatch) -> Callable[[], Tensor]:
        """Prepares a call; see `PackedContestant.forward`."""
        call, keywords = self._operators.fwd, self._keywords(batch)
        q, k, v = batch.q, batch.k, batch.v
        return lambda: cast(Tensor, call(q, k, v, num_splits=1, **keywords)[0])

    def backward(self, batch: PackedBatch) -> Callable[[], Gradients]:
        """Prepares a call; see `PackedContestant.backward`."""
        q, k, v, dout, keywords = batch.q, batch.k, batch.v, batch.dout, self._keywords(batch)
        out, lse = self._operators.fwd(q, k, v, num_splits=1, **keywords)[:2]
        call, deterministic = self._operators.bwd, self._deterministic

        def run() -> Gradients:
            found = call(dout, q, k, v, out, lse, deterministic=deterministic, **keywords)
            return cast(Gradients, tuple(found[:3]))

        return run


def gather_varlen(
    peers: bool = True, peers_dir: Path | None = None
) -> tuple[list[PackedContestant], dict[str, str]]:
    """Collects the contestants of suite varlen, as `contestants.gather` the forward's.

    Args:
        peers: Whether to take FlashAttention-3, too.
        peers_dir: Folder of the peers' files, or None.

    Returns:
        The contestants, ours first, and the reason for each that is missing.
    """
    makers: dict[str, Callable[[Path | None], PackedContestant]] = {
        OURS: lambda _: OursPacked(),
        OURS_DETERMINISTIC: lambda _: OursPacked(deterministic=True),
        OURS_DENSE: lambda _: OursDense(),
    }
    if peers:
        makers["fa3"] = Fa3Packed
        makers[FA3_DETERMINISTIC] = lambda folder: Fa3Packed(folder, deterministic=True)
    return collect(makers, peers_dir)
