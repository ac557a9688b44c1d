"""Attention in e4m3: from 16-bit tensors by a recipe, from a `Quantized`, or from FA3's tensors."""

from __future__ import annotations

from typing import Any

import torch

from . import attention_fp8, checks, ops, ops_fp8
from ._eager import EagerCalls
from .quantize import DEFAULT_RECIPE
from .quantized import Quantized
from .recipe import Fp8Recipe
from .recipe import arguments as of_quantizer

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_is_compiling = torch.compiler.is_compiling
_eager = EagerCalls(
    "attention_fp8",
    (
        *("q", "k", "v", "recipe", "accumulation", "softmax_scale", "causal", "window_size"),
        *("softcap", "sm_margin", "out_dtype", "deterministic"),
    ),
    ops.memory,
    attention_fp8.formula,
)


def flash_attn_fp8_func(
    q: torch.Tensor | Quantized,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    recipe: Fp8Recipe | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Result:
    """Attention whose two products run in FP8 (e4m3).

    `flash_attn_fp8_func(q, k, v, recipe)` quantizes 16-bit tensors first;
    `flash_attn_fp8_func(quantized)` takes what `quantize` returned, which pays where K and V are
    used again. Masks and shapes are those of `flash_attn_func`.

    16-bit tensors may require grad. Their gradient is that of 16-bit attention, as if quantizing
    were the identity (a straight-through estimate): the backward pass of `flash_attn_func` on q, k
    and v as given, with the output and log-sum-exp of this FP8 forward pass. A `Quantized` has no
    gradient.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16, on a Hopper GPU; or a
            `Quantized` of dense tensors.
        k: (batch, seqlen_k, heads_kv, head_dim); None beside a `Quantized`.
        v: (batch, seqlen_k, heads_kv, head_dim_v); likewise.
        recipe: how to quantize and how to add up; None is `Fp8Recipe()`, and beside a `Quantized`
            its own.
        softmax_scale: finite factor of q k^T; None is head_dim ** -0.5.
        causal: row i sees keys up to its position; overrides window_size[1] by 0.
        window_size: (left, right), the keys seen before and after a row's position; -1 or None is
            unbounded.
        softcap: where positive, scores become softcap * tanh(scores / softcap); not with smooth_k,
            since the scores lack what K's mean would add.
        sm_margin: multiprocessors to leave free for other work.
        return_attn_probs: also return the log-sum-exp, that of the scores before K's mean was
            subtracted.
        out_dtype: torch.bfloat16 or torch.float16; None is q's dtype, bfloat16 for a `Quantized`.
            q's dtype where a tensor requires grad.
        deterministic: as in `flash_attn_func`, of the backward pass.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), contiguous, in out_dtype; or (out, softmax_lse)
        where return_attn_probs, softmax_lse (batch, heads, seqlen_q) in float32 with the natural
        logarithm.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        NotImplementedError: sequences are packed, a `Quantized`'s tensor requires grad, or a tensor
            has a forward-mode tangent.
        RuntimeError: the compiled library is missing, the device is no Hopper GPU, or CUDA fails.
    """
    deterministic = checks.flag("deterministic", deterministic)
    if isinstance(q, Quantized):
        scalars, out_dtype = prepare_quantized(
            *(q, k, v, recipe, softmax_scale, causal, window_size, softcap, sm_margin, out_dtype)
        )
        checks.no_gradient(*attention_fp8.forward_arguments(q), q.k_mean)
        return _result(
            attention_fp8.attend(q, scalars, out_dtype, return_attn_probs), return_attn_probs
        )
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"recipe must be an Fp8Recipe or None, got {type(recipe).__name__}")
    again = None
    if not _is_compiling() and not attention_fp8.needs_mean(recipe, bool(return_attn_probs)):
        given = (
            *(q, k, v, of_quantizer(recipe), recipe.accumulation, softmax_scale, causal),
            *(window_size, softcap, sm_margin, _code(out_dtype), deterministic),
        )
        again = _eager.call(*given)
        if again:
            return _result(again, return_attn_probs)
    if k is None or v is None:
        raise TypeError("k and v must be torch.Tensor where q is one, got None")
    checks.tensors(q=q, k=k, v=v)
    scalars = _scalars(q, softmax_scale, causal, window_size, softcap, sm_margin)
    _check_combination(recipe, scalars[4])
    out_dtype = q.dtype if out_dtype is None else out_dtype
    if not checks.needs_grad(q, k, v):
        outputs = attention_fp8.quantize_and_attend(
            q, k, v, recipe, scalars, out_dtype, return_attn_probs
        )
    elif out_dtype is not q.dtype:
        raise ValueError(
            f"out_dtype must be None or q's dtype, {q.dtype}, where a tensor requires grad, got "
            f"{out_dtype}"
        )
    else:
        outputs = attention_fp8.differentiable(q, k, v, recipe, scalars, deterministic)
    if again is False:
        differentiable = out_dtype is q.dtype and not recipe.smooth_k
        _eager.adopt(
            given,
            attention_fp8._calls,
            attention_fp8.seen_by_table(q, k, v, recipe, scalars, out_dtype),
            (*scalars[:-1], deterministic) if differentiable else None,
        )
    return _result(outputs, return_attn_probs)


def _code(out_dtype: Any) -> int | None:
    """What stands for it in a table of calls; -1 is none that there is."""
    if out_dtype is None:
        return None
    return checks.DTYPE_CODES.get(out_dtype, -1) if type(out_dtype) is torch.dtype else -1


def attention_of_e4m3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    descales: tuple[Any, Any, Any],
    learnable_sink: torch.Tensor | None,
    scalars: ops_fp8.Scalars,
) -> ops.Outputs:
    """What `flash_attn_func` does with e4m3 tensors: FlashAttention-3's interface.

    Args:
        q: (batch, seqlen_q, heads, head_dim) e4m3, and k and v likewise, V in rows.
        k: as q, with heads_kv heads.
        v: as k.
        descales: q_descale, k_descale, v_descale: (batch, heads_kv) float32 each, any strides; or
            None for 1.
        learnable_sink: (heads,) float32, or None.
        scalars: the operator's.

    Returns:
        The output, in bfloat16, and the log-sum-exp.
    """
    q_descale, k_descale, v_descale = descales
    if q_descale is not None or k_descale is not None or v_descale is not None:
        checks.optional_tensors(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    checks.no_gradient(q, k, v, *descales, learnable_sink)
    outputs: ops.Outputs = ops_fp8.forward_fp8(
        *ops_fp8.arguments_of_e4m3(q, k, v, descales, learnable_sink, scalars)
    )
    return outputs


def _result(outputs: tuple[torch.Tensor, torch.Tensor], return_attn_probs: bool) -> Result:
    return outputs if return_attn_probs else outputs[0]


def prepare_quantized(
    x: Quantized,
    k: Any,
    v: Any,
    recipe: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    sm_margin: Any,
    out_dtype: torch.dtype | None,
) -> tuple[ops_fp8.Scalars, torch.dtype]:
    """The operator's scalars and out_dtype for `flash_attn_fp8_func` with a `Quantized`.

    Raises:
        ValueError, TypeError: as `flash_attn_fp8_func`.
    """
    for name, value in (("k", k), ("v", v), ("recipe", recipe)):
        if value is not None:
            raise ValueError(f"{name} must be None where q is a Quantized, which has its own")
    scalars = _scalars(x.q, softmax_scale, causal, window_size, softcap, sm_margin)
    _check_combination(x.recipe, scalars[4])
    return scalars, torch.bfloat16 if out_dtype is None else out_dtype


def _scalars(
    q: torch.Tensor, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, sm_margin: Any
) -> ops_fp8.Scalars:
    """Checks types; values are checked by the operator."""
    if softmax_scale is None:
        softmax_scale = checks.default_scale(q)
    left, right = checks.window(window_size)
    return (
        checks.real("softmax_scale", softmax_scale),
        checks.flag("causal", causal),
        left,
        right,
        checks.real("softcap", softcap),
        checks.integer("sm_margin", sm_margin),
    )


def _check_combination(recipe: Fp8Recipe, softcap: float) -> None:
    if recipe.smooth_k and softcap != 0:
        raise ValueError(
            f"softcap must be 0 with smooth_k, got {softcap}: subtracting K's mean shifts a row's "
            "scores, and a soft cap sees the shift"
        )
