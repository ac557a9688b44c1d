"""One attention problem: its Q, K and V and how they are to be combined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Q, K, V and the options of one call of attention.

    Attributes:
        query: (batch, seqlen_q, heads, head_dim), any floating dtype.
        key: (batch, seqlen_k, heads_kv, head_dim); heads is a multiple of heads_kv.
        value: (batch, seqlen_k, heads_kv, head_dim_v).
        softmax_scale: the factor on QK^T.
        causal: whether a query sees only the keys up to its own position, aligned bottom right.
        window_size: keys to the left and to the right that a query sees; -1 is no bound.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.query.shape[0]

    @property
    def seqlen_q(self) -> int:
        """Number of queries in each sequence."""
        return self.query.shape[1]

    @property
    def seqlen_k(self) -> int:
        """Number of keys in each sequence."""
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[2]

    @property
    def heads_kv(self) -> int:
        """Number of key and value heads."""
        return self.key.shape[2]

    def to(self, target: torch.dtype | torch.device) -> AttentionInputs:
        """The same problem with Q, K and V rounded to a dtype or moved to a device."""
        return replace(
            self,
            query=self.query.to(target),
            key=self.key.to(target),
            value=self.value.to(target),
        )

    def pieces(self, max_scores: int) -> Iterator[tuple[slice, AttentionInputs]]:
        """Cuts the problem along batch and heads, so that a piece's score matrices stay small.

        Args:
            max_scores: how many elements the score matrices of one piece may have together; a
                piece has at least one sequence and one KV head, however long they are.

        Yields:
            The query heads that the piece holds, and the piece.
        """
        group = self.heads // self.heads_kv
        per_head = max(1, group * self.seqlen_q * self.seqlen_k)
        heads_kv = min(self.heads_kv, max(1, max_scores // per_head))
        batch = min(self.batch, max(1, max_scores // (per_head * heads_kv)))
        for start_b in range(0, self.batch, batch):
            rows = slice(start_b, start_b + batch)
            for start_h in range(0, self.heads_kv, heads_kv):
                kv = slice(start_h, min(start_h + heads_kv, self.heads_kv))
                q = slice(kv.start * group, kv.stop * group)
                piece = replace(
                    self,
                    query=self.query[rows, :, q],
                    key=self.key[rows, :, kv],
                    value=self.value[rows, :, kv],
                )
                yield q, piece

    def num_pieces(self, max_scores: int) -> int:
        """How many pieces `pieces` yields."""
        return sum(1 for _ in self.pieces(max_scores))
