"""`quantize`: Q, K and V from 16 bits to e4m3, as an `Fp8Recipe` says."""

from __future__ import annotations

from typing import Any

import torch

from . import checks, ops, ops_quantize
from ._eager import EagerCalls
from .quantized import Quantized
from .recipe import Fp8Recipe, arguments

DEFAULT_RECIPE = Fp8Recipe()

_is_compiling = torch.compiler.is_compiling
_eager = EagerCalls("quantize", ops_quantize._calls.arguments, ops.memory)


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe = DEFAULT_RECIPE,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_q_offset: int | None = None,
    rotary_k_offset: int = 0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> Quantized:
    """Quantizes Q, K and V to e4m3, on a Hopper GPU or on the CPU.

    On the GPU one kernel does it, behind K's mean where that is asked for; where a scale needs all
    of a tensor, head or channel, it looks at the elements twice.
    Finite values saturate; NaN and infinities become NaN, and take no part in scales and means.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16, any strides; head_dim is a
            multiple of 8 up to 256. With cu_seqlens_q: (total_q, heads, head_dim).
        k: (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim).
        v: (batch, seqlen_k, heads_kv, head_dim_v), or (total_k, heads_kv, head_dim_v).
        recipe: scales, rotation, smoothing and V's layout.
        rotary_cos: (positions, rotary_dim / 2), 16 or 32 bits: apply rotary embedding to the first
            rotary_dim channels of q and k before all else. rotary_dim is a multiple of 16.
        rotary_sin: the same shape; both or neither.
        rotary_interleaved: pairs are channels 2i and 2i + 1, in place of i and i + rotary_dim / 2.
        rotary_q_offset: the position of the first query; None aligns the last query with the last
            key: rotary_k_offset + seqlen_k - seqlen_q.
        rotary_k_offset: the position of the first key.
        cu_seqlens_q: (batch + 1,) int32 on q's device, from 0 to total_q: where packed sequences
            begin. Each is quantized as if alone, but for scale "tensor".
        cu_seqlens_k: the same for k and v; both or neither.

    Returns:
        The quantized tensors, their scales and the recipe.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        NotImplementedError: a tensor requires grad, or has a forward-mode tangent.
        RuntimeError: CUDA tensors, and the compiled library is missing, the device is no Hopper
            GPU, or CUDA fails.
    """
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"recipe must be an Fp8Recipe, got {type(recipe).__name__}")
    given = (
        *(q, k, v, rotary_cos, rotary_sin, cu_seqlens_q, cu_seqlens_k, *arguments(recipe)),
        *(rotary_interleaved, rotary_q_offset, rotary_k_offset),
    )
    again = None if _is_compiling() else _eager.call(*given)
    # Fewer results, where the last ones are empty.
    num_results = 8 if recipe.smooth_k else 7 if recipe.v_scale == "token" else 6
    outputs = again or _call_operator(*given)
    if again is False:
        _eager.adopt(given, ops_quantize._calls, given, num_results=num_results)
    new_q, new_k, new_v, q_descale, k_descale, v_descale, *more = outputs
    return Quantized(
        q=new_q,
        k=new_k,
        v=new_v,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        v_token_factor=more[0] if recipe.v_scale == "token" else None,
        k_mean=more[1] if recipe.smooth_k else None,
        recipe=recipe,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def _call_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    *rest: Any,
) -> ops_quantize.Outputs:
    checks.tensors(q=q, k=k, v=v)
    checks.optional_tensors(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    checks.optional_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    *recipe, rotary_interleaved, rotary_q_offset, rotary_k_offset = rest
    if rotary_q_offset is not None:
        rotary_q_offset = checks.integer("rotary_q_offset", rotary_q_offset)
    checks.no_gradient(q, k, v, rotary_cos, rotary_sin)
    outputs: ops_quantize.Outputs = ops_quantize.quantize(
        *(q, k, v, rotary_cos, rotary_sin, cu_seqlens_q, cu_seqlens_k, *recipe),
        checks.flag("rotary_interleaved", rotary_interleaved),
        rotary_q_offset,
        checks.integer("rotary_k_offset", rotary_k_offset),
    )
    return outputs
