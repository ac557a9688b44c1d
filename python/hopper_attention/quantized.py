"""`Quantized`: Q, K and V in e4m3 with their scales."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

from .ops_quantize import FP8, first_slot, slots, spaced
from .recipe import QK_BLOCK_TOKENS, Fp8Recipe, signs
from .rotation import hadamard
from .v_layout import untranspose_v

_RECIPE = "recipe"  # its place in a state dict


@dataclass
class Quantized:
    """Q, K and V in e4m3, their scales, and how they were made: what `quantize` returns.

    x is about x_quantized times descale. Dense tensors have the shapes below. Packed ones
    (cu_seqlens_q and cu_seqlens_k are given) have no batch dimension in q, k, v and in scales of
    blocks and tokens; where a dense dimension counts tokens it counts those of all sequences, and
    where it counts blocks of 128 tokens those of sequence i begin at block
    cu_seqlens[i] // 128 + i of total // 128 + batch.

    Attributes:
        q: (batch, seqlen_q, heads, head_dim) e4m3. Rows begin at multiples of 16 elements, here and
            in k and v.
        k: (batch, seqlen_k, heads_kv, head_dim) e4m3.
        v: (batch, seqlen_k, heads_kv, head_dim_v) e4m3; where recipe.transpose_v
            (batch, heads_kv, head_dim_v, padded), padded = seqlen_k rounded up to 128, with the
            keys in the order of `v_layout.key_of_slot` and zeros past the end.
        q_descale: (batch, heads, n) float32: n is 1 ("tensor", "head"), the number of blocks of 128
            tokens ("block") or seqlen_q ("token").
        k_descale: (batch, heads_kv, n) float32, likewise over keys.
        v_descale: (batch, heads_kv, m) float32: m is head_dim_v ("channel") or 1.
        v_token_factor: (batch, heads_kv, seqlen_k) float32 in (0, 1], only with v_scale="token": a
            token's value is v * v_token_factor * v_descale.
        k_mean: (batch, heads_kv, head_dim) float32, what was subtracted from K after its rotation;
            only with smooth_k.
        recipe: how they were made.
        cu_seqlens_q: (batch + 1,) int32, where packed sequences begin in q; None: dense.
        cu_seqlens_k: the same for k and v.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    v_token_factor: torch.Tensor | None
    k_mean: torch.Tensor | None
    recipe: Fp8Recipe
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the tensors hold sequences one after another."""
        return self.cu_seqlens_q is not None

    def dequantize(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the quantized tensors stand for, in the layout of the originals.

        Undoes the scales, the rotation, the subtraction of K's mean and V's transposition. Rotary
        embedding stays applied. Reads cu_seqlens from the device where sequences are packed.

        Returns:
            q, k and v as `quantize` took them, but for rounding, in dtype.
        """
        q = self.q.float() * self._per_token(self.q_descale, self.q, self.cu_seqlens_q)
        k = self.k.float() * self._per_token(self.k_descale, self.k, self.cu_seqlens_k)
        if self.k_mean is not None:
            k = k + self._per_sequence(self.k_mean[..., None], self.k, self.cu_seqlens_k)
        if self.recipe.hadamard:
            flips = signs(q.shape[-1], self.recipe.seed).to(q.device)
            q, k = hadamard(q) * flips, hadamard(k) * flips
        v = self._v_rows().float()
        if self.v_token_factor is not None:
            v = v * self.v_token_factor.transpose(-1, -2)[..., None]
        v = v * self._per_sequence(self.v_descale[..., None], self.k, self.cu_seqlens_k)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def to(self, device: torch.device | str) -> Quantized:
        """The same on another device; dtypes are what they are."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device)
                moved[field.name] = _respaced(value) if value.dtype == FP8 else value
        return replace(self, **moved)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Contiguous tensors by name, the recipe among them: what safetensors' save_file takes."""
        state = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                state[field.name] = value.contiguous()
        recipe = json.dumps(asdict(self.recipe)).encode()
        state[_RECIPE] = torch.frombuffer(bytearray(recipe), dtype=torch.uint8).clone()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> Quantized:
        """The inverse of `state_dict`.

        Raises:
            ValueError: a tensor is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        optional = {"v_token_factor", "k_mean", "cu_seqlens_q", "cu_seqlens_k"}
        if unknown := sorted(state.keys() - names):
            raise ValueError(f"state has tensors that Quantized does not: {', '.join(unknown)}")
        if missing := sorted(names - optional - state.keys()):
            raise ValueError(f"state lacks tensors of Quantized: {', '.join(missing)}")
        recipe = Fp8Recipe(**json.loads(bytes(state[_RECIPE].cpu().tolist())))
        tensors: dict[str, torch.Tensor | None] = dict.fromkeys(optional)
        for name, tensor in state.items():
            if name != _RECIPE:
                tensors[name] = _respaced(tensor) if tensor.dtype == FP8 else tensor
        return cls(recipe=recipe, **tensors)  # type: ignore[arg-type]

    def _v_rows(self) -> torch.Tensor:
        """V as (batch, seqlen_k, heads_kv, head_dim_v), or (total, heads_kv, head_dim_v)."""
        if not self.recipe.transpose_v:
            return self.v
        as_bytes = self.v.view(torch.uint8)
        if self.cu_seqlens_k is None:
            return untranspose_v(as_bytes, self.k.shape[1]).view(FP8)
        rows = []
        bounds = self.cu_seqlens_k.tolist()
        for i, (first, last) in enumerate(pairwise(bounds)):
            at = first_slot(first, i) * QK_BLOCK_TOKENS
            width = slots(last - first, 0, False) * QK_BLOCK_TOKENS
            rows.append(untranspose_v(as_bytes[None, ..., at : at + width], last - first)[0])
        return torch.cat(rows).view(FP8)

    def _per_token(
        self, descale: torch.Tensor, x: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """A descale of Q or K for each token: (batch, seqlen, heads, 1) or (total, heads, 1)."""
        granularity = self.recipe.qk_scale
        if granularity == "token":
            return descale.transpose(-1, -2)[..., None]
        if granularity != "block":
            return self._per_sequence(descale[..., None], x, cu_seqlens)
        if cu_seqlens is None:
            of_token = descale.repeat_interleave(QK_BLOCK_TOKENS, -1)[..., : x.shape[1]]
            return of_token.transpose(-1, -2)[..., None]
        token = torch.arange(x.shape[0], device=x.device)
        sequence = _sequence_of(token, cu_seqlens)
        first = cu_seqlens[sequence]
        block = first // QK_BLOCK_TOKENS + sequence + (token - first) // QK_BLOCK_TOKENS
        return descale[:, block].transpose(0, 1)[..., None]

    def _per_sequence(
        self, value: torch.Tensor, x: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, heads, n, 1) to (batch, 1, heads, n), or (total, heads, n)."""
        value = value[..., 0]
        if cu_seqlens is None:
            return value[:, None]
        return value[_sequence_of(torch.arange(x.shape[0], device=x.device), cu_seqlens)]


def _sequence_of(token: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)


def _respaced(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows that begin at multiples of 16 elements."""
    if x.shape[-1] % 16 == 0:
        return x.contiguous()
    rows = spaced(tuple(x.shape), x.device)
    rows.copy_(x)
    return rows
