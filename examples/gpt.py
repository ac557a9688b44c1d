"""A small GPT whose attention can be chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hopper_attention

VOCABULARY = 256  # a token is a byte


class Attention(str, Enum):
    """Who computes attention."""

    STANDARD = "standard"
    SDPA = "sdpa"
    OURS = "ours"
    OURS_FP8 = "ours-fp8"
    REFERENCE = "reference"


# (batch, seqlen, heads, head_dim) three times, and the output likewise; causal
AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two matrix products and a softmax; the score matrix is stored."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=3, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def attention_function(kind: Attention, deterministic: bool = False) -> AttentionFunction:
    """The function that computes attention of one kind."""

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = hopper_attention.flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        assert isinstance(out, torch.Tensor)
        return out

    def ours_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = hopper_attention.flash_attn_fp8_func(q, k, v, causal=True)
        assert isinstance(out, torch.Tensor)
        return out

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hopper_attention.reference.attention(q, k, v, causal=True)[0].to(q.dtype)

    return {
        Attention.STANDARD: standard_attention,
        Attention.SDPA: sdpa,
        Attention.OURS: ours,
        Attention.OURS_FP8: ours_fp8,
        Attention.REFERENCE: reference,
    }[kind]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864) of (batch, seqlen, heads, head_dim)."""
    first, second = x.float().chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3).to(x.dtype)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalised input and added to it."""

    def __init__(self, width: int, head_dim: int, attention: AttentionFunction) -> None:
        super().__init__()
        self.head_dim, self.attention = head_dim, attention
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, seqlen, width) to the same."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.unbind(2)
        out = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.project(out.flatten(2))
        hidden: torch.Tensor = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + hidden


class GPT(nn.Module):
    """A decoder-only transformer over bytes.

    Args:
        layers: blocks.
        width: size of the residual stream.
        head_dim: divides the width; the quotient is the number of heads.
        seqlen: the longest sequence.
        attention: what each block computes attention with.
        checkpointing: whether a training step stores blocks' inputs alone and runs blocks again.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        layers: int,
        width: int,
        head_dim: int,
        seqlen: int,
        attention: AttentionFunction,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, attention) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(seqlen)[:, None, None] * frequencies  # (seqlen, 1, dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what is added to the residual stream is smaller
                added = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers if added else 1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy, in nats a byte, of (batch, seqlen) tokens."""
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
