"""Quantization of Q, K and V to e4m3 in plain PyTorch: what the CUDA quantizer is tested against.

For each group of elements that share a scale (`recipe.Fp8Recipe` says which do):

    amax    = the largest magnitude of the group's finite elements, at least 2^-100
    descale = amax / 448                        1 where the group has no finite element but zeros
    x_q     = round to e4m3(x * (448 / amax))   nearest even; magnitudes above 448 become 448

so that x is about x_q * descale. All of it is float32. NaN and infinities become e4m3's NaN. Where
x is a factor times the sums of a Walsh-Hadamard transform, 448 / amax is multiplied by the factor,
and each sum by that, so that an element is multiplied once.

Before that Q and K get their rotary embedding, are rotated (`rotation.py`), and K's mean over the
tokens is subtracted, each only where asked for. With v_scale="token", a token t of V has a descale
d_t of its own, and

    v_descale        = max over t of d_t        over tokens with a non-zero finite element
    v_token_factor_t = d_t / v_descale          1 for other tokens

so that attention can multiply the probabilities by the factor and leave one scale for the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from . import checks
from .recipe import E4M3_MAX, QK_BLOCK_TOKENS, Fp8Recipe
from .rotation import apply_rotary, hadamard_scale, rotated_sums
from .v_layout import transpose_v

_LEAST_AMAX = 2.0**-100  # descale stays a normal number, and so does its inverse
_LEAST_FACTOR = torch.finfo(torch.float32).tiny
_ROW_ELEMENTS = 16  # TMA steps from row to row in multiples of 16 bytes


class QuantizedParts(NamedTuple):
    """Q, K and V in e4m3 with their scales; packed sequences have no batch dimension.

    Attributes:
        q: (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim). The memory between two
            rows is a multiple of 16 elements, here and in k and v.
        k: (batch, seqlen_k, heads_kv, head_dim) or (total_k, heads_kv, head_dim).
        v: (batch, seqlen_k, heads_kv, head_dim_v) or (total_k, heads_kv, head_dim_v). Transposed:
            (batch, heads_kv, head_dim_v, padded) or (heads_kv, head_dim_v, padded), see
            `v_layout.transpose_v`; packed, a sequence begins where the lengths before it end, each
            rounded up to `v_layout.V_TOKENS_PADDING`.
        q_descale: (batch, heads, n) float32: n = 1 ("tensor", "head"), the number of blocks of
            `QK_BLOCK_TOKENS` tokens ("block"), or the number of tokens ("token"). Packed: of the
            longest sequence; places that a sequence does not have hold 1.
        k_descale: (batch, heads_kv, n) float32, likewise.
        v_descale: (batch, heads_kv, m) float32: m = head_dim_v ("channel") or 1.
        v_token_factor: (batch, heads_kv, seqlen_k) float32 in (0, 1]; None without "token".
        k_mean: (batch, heads_kv, head_dim) float32, of K after its rotation; None without smooth_k.
        recipe: how they were made.
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


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe | None = None,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_offset_q: int = 0,
) -> QuantizedParts:
    """Quantizes a dense batch.

    Args:
        q: (batch, seqlen_q, heads, head_dim), any floating-point dtype, CPU or CUDA.
        k: (batch, seqlen_k, heads_kv, head_dim).
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        recipe: None is `Fp8Recipe()`.
        rotary_cos: (positions, rotary_dim / 2): apply rotary embedding to q and k first.
        rotary_sin: likewise; both or none.
        rotary_interleaved: see `rotation.apply_rotary`.
        rotary_offset_q: the position of the first query; the first key's is 0.

    Raises:
        ValueError: a shape or a number is not allowed.
        TypeError: a type is not allowed.
    """
    checks.tensors(q=q, k=k, v=v)
    checks.attention_dims(q, k, v)
    rotary = _Rotary.make(rotary_cos, rotary_sin, rotary_interleaved, rotary_offset_q)
    return _quantize([q], [k], [v], recipe or Fp8Recipe(), rotary, packed=False)


def quantize_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    recipe: Fp8Recipe | None = None,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_offset_q: int = 0,
) -> QuantizedParts:
    """Quantizes sequences that lie one after another, each as if it were alone.

    Only v_scale="tensor" and qk_scale="tensor" look at all of them together.

    Args:
        q: (total_q, heads, head_dim), any floating-point dtype, CPU or CUDA.
        k: (total_k, heads_kv, head_dim).
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,) integers: where each sequence of q begins, and where the last
            one ends.
        cu_seqlens_k: the same for k and v.
        recipe: None is `Fp8Recipe()`.
        rotary_cos: as for `quantize`; positions count from each sequence's begin.
        rotary_sin: likewise.
        rotary_interleaved: likewise.
        rotary_offset_q: likewise.

    Raises:
        ValueError: a shape or a number is not allowed.
        TypeError: a type is not allowed.
    """
    checks.tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be (total, heads, head_dim), got {tuple(tensor.shape)}")
    qs = _sequences("q", q, cu_seqlens_q)
    ks, vs = _sequences("k", k, cu_seqlens_k), _sequences("v", v, cu_seqlens_k)
    if len(qs) != len(ks):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q, {len(qs) + 1}, got "
            f"{len(ks) + 1}"
        )
    checks.attention_dims(qs[0], ks[0], vs[0])
    rotary = _Rotary.make(rotary_cos, rotary_sin, rotary_interleaved, rotary_offset_q)
    return _quantize(qs, ks, vs, recipe or Fp8Recipe(), rotary, packed=True)


class _Rotary(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    offset_q: int

    @classmethod
    def make(
        cls, cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool, offset_q: int
    ) -> _Rotary | None:
        if (cos is None) != (sin is None):
            missing = "rotary_cos" if cos is None else "rotary_sin"
            raise ValueError(f"{missing} is None: rotary_cos and rotary_sin must come together")
        if cos is None or sin is None:
            return None
        checks.tensors(rotary_cos=cos, rotary_sin=sin)
        return cls(cos, sin, interleaved, offset_q)

    def apply(self, x: torch.Tensor, offset: int) -> torch.Tensor:
        return apply_rotary(x, self.cos, self.sin, interleaved=self.interleaved, offset=offset)


def _quantize(
    qs: list[torch.Tensor],
    ks: list[torch.Tensor],
    vs: list[torch.Tensor],
    recipe: Fp8Recipe,
    rotary: _Rotary | None,
    packed: bool,
) -> QuantizedParts:
    """The sequences as (batch, seqlen, heads, dim) each: one dense batch, or packed ones."""
    if rotary is not None:
        qs = [rotary.apply(q, rotary.offset_q) for q in qs]
        ks = [rotary.apply(k, 0) for k in ks]
    q_factor = k_factor = 1.0
    if recipe.hadamard:
        q_factor = k_factor = hadamard_scale(qs[0].shape[-1])
        qs = [rotated_sums(q, recipe.seed) for q in qs]
        ks = [rotated_sums(k, recipe.seed) for k in ks]
    means = None
    if recipe.smooth_k:
        ks, k_factor = [k.float() * k_factor for k in ks], 1.0
        means = [token_mean(k) for k in ks]
        ks = [k - mean[:, None] for k, mean in zip(ks, means, strict=True)]
    q_e4m3, q_descales = _by_tokens(qs, recipe.qk_scale, q_factor)
    k_e4m3, k_descales = _by_tokens(ks, recipe.qk_scale, k_factor)
    factors = None
    if recipe.v_scale == "token":
        v_e4m3, v_descales, factors = _by_v_token(vs)
    elif recipe.v_scale == "channel":
        v_e4m3, v_descales = _by_channel(vs)
    else:
        v_e4m3, v_descales = _by_tokens(vs, recipe.v_scale)
    if recipe.transpose_v:
        v_e4m3 = [transpose_v(v) for v in v_e4m3]
    v_dim = 3 if recipe.transpose_v else 1
    return QuantizedParts(
        q=_spaced(_join(q_e4m3, 1, packed)),
        k=_spaced(_join(k_e4m3, 1, packed)),
        v=_join(v_e4m3, v_dim, packed) if recipe.transpose_v else _spaced(_join(v_e4m3, 1, packed)),
        q_descale=_join_scales(q_descales),
        k_descale=_join_scales(k_descales),
        v_descale=_join_scales(v_descales),
        v_token_factor=None if factors is None else _join_scales(factors),
        k_mean=None if means is None else torch.cat(means),
        recipe=recipe,
    )


def token_mean(k: torch.Tensor) -> torch.Tensor:
    """K's mean over its tokens, where NaN and infinities count as zeros.

    Summed in float64 and rounded once, so that the order of the sum does not matter. A kernel that
    sums in float32 differs by a few times 2^-24 of the largest |k|.

    Args:
        k: (batch, seqlen_k, heads_kv, head_dim).

    Returns:
        (batch, heads_kv, head_dim) float32; 0 without tokens.
    """
    finite = torch.nan_to_num(k.double(), nan=0.0, posinf=0.0, neginf=0.0)
    return (finite.sum(1) / max(1, k.shape[1])).float()


def _by_tokens(
    parts: Sequence[torch.Tensor], granularity: str, factor: float = 1.0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """e4m3 and (batch, heads, n) descales of factor times each part; channels share a scale."""
    amaxes = []
    for x in parts:
        magnitudes = _finite_magnitudes(x).amax(3) * factor  # (batch, seqlen, heads)
        amaxes.append(_group_maximum(magnitudes.transpose(1, 2), granularity))
    if granularity == "tensor":
        whole = torch.stack(
            [amax.amax() if amax.numel() else amax.new_zeros(()) for amax in amaxes]
        )
        amaxes = [whole.amax().expand_as(amax) for amax in amaxes]
    quantized = []
    for x, amax in zip(parts, amaxes, strict=True):
        tokens = {"block": QK_BLOCK_TOKENS, "token": 1}.get(granularity, max(1, x.shape[1]))
        of_token = amax.repeat_interleave(tokens, 2)[:, :, : x.shape[1]]
        quantized.append(_to_e4m3(x, of_token.transpose(1, 2)[..., None], factor))
    return quantized, [_descale(amax) for amax in amaxes]


def _group_maximum(magnitudes: torch.Tensor, granularity: str) -> torch.Tensor:
    """(batch, heads, seqlen) to (batch, heads, n); 0 for a group without tokens."""
    if granularity == "token":
        return magnitudes
    tokens = magnitudes.shape[2]
    size = QK_BLOCK_TOKENS if granularity == "block" else max(1, tokens)
    groups = -(-tokens // size) if granularity == "block" else 1
    padded = torch.nn.functional.pad(magnitudes, (0, groups * size - tokens))
    return padded.view(*magnitudes.shape[:2], groups, size).amax(3)


def _by_channel(
    parts: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    quantized, descales = [], []
    for v in parts:
        shape = (v.shape[0], v.shape[2], v.shape[3])
        amax = _finite_magnitudes(v).amax(1) if v.shape[1] else v.new_zeros(shape).float()
        quantized.append(_to_e4m3(v, amax[:, None]))
        descales.append(_descale(amax))
    return quantized, descales


def _by_v_token(
    parts: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    quantized, descales, factors = [], [], []
    for v in parts:
        amax = _finite_magnitudes(v).amax(3).transpose(1, 2)  # (batch, heads_kv, seqlen_k)
        largest = _group_maximum(amax, "head")
        descale = _descale(largest)
        factor = (_descale(amax) / descale).clamp_min(_LEAST_FACTOR)
        quantized.append(_to_e4m3(v, amax.transpose(1, 2)[..., None]))
        descales.append(descale)
        factors.append(torch.where(amax > 0, factor, 1.0))
    return quantized, descales, factors


def _finite_magnitudes(x: torch.Tensor) -> torch.Tensor:
    x = x.float().abs()
    return torch.where(x.isfinite(), x, 0.0)


def _descale(amax: torch.Tensor) -> torch.Tensor:
    return torch.where(amax > 0, amax.clamp_min(_LEAST_AMAX) / E4M3_MAX, 1.0)


def _to_e4m3(x: torch.Tensor, amax: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Factor times x in e4m3; amax is its largest magnitude."""
    x = x.float()
    # A tensor divides a tensor: PyTorch turns a number over a tensor into a reciprocal's multiple.
    scale = torch.full_like(amax, E4M3_MAX) / amax.clamp_min(_LEAST_AMAX)
    scaled = (x * (torch.where(amax > 0, scale, 1.0) * factor)).clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(x.isfinite(), scaled, torch.nan).to(torch.float8_e4m3fn)


def _sequences(name: str, x: torch.Tensor, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Each sequence as (1, seqlen, heads, dim)."""
    label = f"cu_seqlens_{'q' if name == 'q' else 'k'}"
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"{label} must be (batch + 1,) integers, got {tuple(cu_seqlens.shape)} of "
            f"{cu_seqlens.dtype}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > x.shape[0] or bounds != sorted(bounds):
        raise ValueError(
            f"{label} must rise from 0 to at most {x.shape[0]}, {name}'s tokens, got {bounds}"
        )
    return [x[begin:end][None] for begin, end in pairwise(bounds)]


def _join(parts: list[torch.Tensor], dim: int, packed: bool) -> torch.Tensor:
    if not packed:
        return parts[0]
    as_bytes = torch.cat([part.view(torch.uint8) for part in parts], dim)
    return as_bytes.view(torch.float8_e4m3fn)[0]


def _join_scales(parts: list[torch.Tensor]) -> torch.Tensor:
    longest = max(part.shape[2] for part in parts)
    padded = [
        torch.nn.functional.pad(part, (0, longest - part.shape[2]), value=1.0) for part in parts
    ]
    return torch.cat(padded).contiguous()


def _spaced(x: torch.Tensor) -> torch.Tensor:
    """The same with rows that begin at multiples of 16 elements."""
    width = _round_up(x.shape[-1], _ROW_ELEMENTS)
    if width == x.shape[-1]:
        return x.contiguous()
    whole = torch.zeros(*x.shape[:-1], width, dtype=torch.uint8, device=x.device)
    whole[..., : x.shape[-1]] = x.view(torch.uint8)
    return whole.view(x.dtype)[..., : x.shape[-1]]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
