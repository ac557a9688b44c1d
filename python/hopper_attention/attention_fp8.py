"""Attention of a `Quantized`, and of 16-bit tensors in FP8 with a gradient.

The latter is torch.ops.hopper_attention.attention_fp8: it quantizes, attends, and has the 16-bit
backward pass as its formula (straight through the quantizer).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import _autograd, checks, ops, ops_backward, ops_fp8, ops_quantize
from ._calls import CallTable, Place, moved, places_of
from ._eager import EagerCalls
from .quantize import quantize
from .quantized import Quantized
from .recipe import Fp8Recipe
from .recipe import arguments as of_quantizer

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_library_fragment.define(
    "attention_fp8(Tensor q, Tensor k, Tensor v, str qk_scale, str v_scale, bool hadamard, "
    "int seed, bool smooth_k, str accumulation, bool transpose_v, float softmax_scale, "
    "bool causal, int window_left, int window_right, float softcap, int sm_margin, "
    "bool deterministic) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_NUM_RECIPE = 7  # the recipe's fields among its arguments

# The recipes of calls that passed the checks, as ops.py's plans
_checked: dict[tuple[Any, ...], Fp8Recipe] = {}
# Both steps of a call, for those that take no sum behind them (see `needs_mean`)
_calls = CallTable(
    (
        *("q", "k", "v", "qk_scale", "v_scale", "hadamard", "seed", "smooth_k", "transpose_v"),
        *("accumulation", *ops.SCALAR_NAMES, "out_dtype"),
    ),
    ("out", "lse", "scratch"),
    (),
    ops.memory,
)
_SCRATCH_GRANULE = 512  # bytes, as PyTorch's allocator has it
_of_quantized = EagerCalls("forward_fp8", ops_fp8._calls.arguments, ops.memory)


def forward_arguments(x: Quantized) -> tuple[Any, ...]:
    """The tensors of the e4m3 operator, in its order.

    Raises:
        NotImplementedError: the sequences are packed.
    """
    if x.packed:
        raise NotImplementedError(
            "q: attention of packed sequences in e4m3 is not built yet; quantize them apart, or "
            "padded to one length"
        )
    return (x.q, x.k, x.v, x.q_descale, x.k_descale, x.v_descale, x.v_token_factor, None)


def attend(
    x: Quantized, scalars: ops_fp8.Scalars, out_dtype: torch.dtype, with_lse: bool
) -> ops.Outputs:
    """Attention of dense quantized tensors.

    Args:
        x: the tensors.
        scalars: the e4m3 operator's.
        out_dtype: of the output.
        with_lse: whether the log-sum-exp is used; where not, it may lack what K's mean adds.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), and the log-sum-exp, (batch, heads, seqlen_q)
        float32.

    Raises:
        NotImplementedError: the sequences are packed.
    """
    arguments = _attention_arguments(x, scalars, out_dtype)
    seen = ops_fp8.seen_by_table(*arguments)
    again = None if torch.compiler.is_compiling() else _of_quantized.call(*seen)
    out, lse = again or ops_fp8.forward_fp8(*arguments)
    if again is False:
        _of_quantized.adopt(seen, ops_fp8._calls, seen)
    if with_lse and x.k_mean is not None:
        lse = lse + _mean_scores(x, x.k_mean, scalars[0])
    return out, lse


def _attention_arguments(
    x: Quantized, scalars: ops_fp8.Scalars, out_dtype: torch.dtype
) -> tuple[Any, ...]:
    recipe = x.recipe
    fast = recipe.accumulation == "fast"
    return *forward_arguments(x), out_dtype, recipe.transpose_v, fast, *scalars


def needs_mean(recipe: Fp8Recipe, with_lse: bool) -> bool:
    """Whether `attend` adds to the log-sum-exp what K's mean took from it."""
    return with_lse and recipe.smooth_k


def seen_by_table(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe,
    scalars: ops_fp8.Scalars,
    out_dtype: torch.dtype,
) -> tuple[Any, ...]:
    """A call of `quantize_and_attend` as its table takes it."""
    code = checks.DTYPE_CODES.get(out_dtype)
    return q, k, v, *of_quantizer(recipe), recipe.accumulation, *scalars, code


def quantize_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe,
    scalars: ops_fp8.Scalars,
    out_dtype: torch.dtype,
    with_lse: bool,
) -> ops.Outputs:
    """`attend` of `quantize`, whose results nobody else sees."""
    if torch.compiler.is_compiling() or needs_mean(recipe, with_lse):
        return attend(quantize(q, k, v, recipe), scalars, out_dtype, with_lse)
    seen = seen_by_table(q, k, v, recipe, scalars, out_dtype)
    quantized = quantize(q, k, v, recipe)
    outputs = attend(quantized, scalars, out_dtype, with_lse)
    _remember(seen, quantized, _attention_arguments(quantized, scalars, out_dtype))
    return outputs


def _remember(seen: tuple[Any, ...], quantized: Quantized, of_attention: tuple[Any, ...]) -> None:
    """Has the two steps made as one, the quantized tensors being parts of one allocation."""
    nothing = (None,) * 4  # no rotary embedding, not packed
    first = ops_quantize._calls.known(
        *seen[:3], *nothing, *of_quantizer(quantized.recipe), False, None, 0
    )
    second = ops_fp8._calls.known(*ops_fp8.seen_by_table(*of_attention))
    if first is None or second is None:
        return
    names = _calls.arguments
    out, lse, scratch, stream, workspace, none = range(len(names), len(names) + 6)
    offsets, size = _offsets(first[1])
    made: list[Place] = [(scratch, offset) for offset in offsets]
    made = [place if _bytes(x) else none for place, x in zip(made, first[1], strict=True)]
    behind = [stream, workspace, none]
    places = [*places_of(ops_quantize._calls.arguments, names, none), *made, *behind]
    # What the attention reads is what the quantizer wrote.
    read = dict(zip(ops_quantize.RESULTS, made, strict=False))
    inputs = [read.get(name, none) for name in ops_fp8._calls.arguments]
    steps = (*moved(first[0], places), *moved(second[0], [*inputs, out, lse, *behind]))
    outputs = (*second[1], ops._contiguous((size,), torch.uint8))
    _calls.remember_steps(seen, steps, outputs, 2)


def _bytes(layout: ops.Layout) -> int:
    shape, _, dtype = layout
    return math.prod(shape) * dtype.itemsize


def _offsets(layouts: tuple[ops.Layout, ...]) -> tuple[list[int], int]:
    """Where each begins in an allocation that holds all of them, and its bytes."""
    offsets, size = [], 0
    for layout in layouts:
        offsets.append(size)
        size += -(-_bytes(layout) // _SCRATCH_GRANULE) * _SCRATCH_GRANULE
    return offsets, size


def _mean_scores(x: Quantized, k_mean: torch.Tensor, scale: float) -> torch.Tensor:
    """What subtracting K's mean took from each row's scores: (batch, heads, seqlen_q)."""
    q = x.q.float() * x._per_token(x.q_descale, x.q, None)
    heads, heads_kv = q.shape[2], k_mean.shape[1]
    mean = k_mean.repeat_interleave(heads // max(1, heads_kv), 1)  # (batch, heads, head_dim)
    scores: torch.Tensor = torch.einsum("bshd,bhd->bhs", q, mean) * scale
    return scores


def differentiable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe,
    scalars: ops_fp8.Scalars,
    deterministic: bool,
) -> ops.Outputs:
    """`attend` of `quantize`, in q's dtype, with the 16-bit backward pass."""
    return _operator(
        *(q, k, v, recipe.qk_scale, recipe.v_scale, recipe.hadamard, recipe.seed),
        *(recipe.smooth_k, recipe.accumulation, recipe.transpose_v, *scalars, deterministic),
    )


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> ops.Outputs:
    scalars = rest[_NUM_RECIPE:-1]
    key = (ops.key_of(q), ops.key_of(k), ops.key_of(v), rest)
    recipe = _checked.get(key)
    if recipe is None:
        recipe = Fp8Recipe(*rest[:_NUM_RECIPE])
        checks.request(q, k, v, scalars)  # also what the backward pass asks for
        ops.remember(_checked, key, recipe)
    return quantize_and_attend(q, k, v, recipe, scalars, q.dtype, with_lse=True)


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> ops.Outputs:
    softmax_scale, _, window_left, window_right, softcap, sm_margin = rest[_NUM_RECIPE:-1]
    batch, seqlen_q, _, heads, _, head_dim, head_dim_v = checks.attention_dims(q, k, v)
    checks.kernel_limits(q.dtype, head_dim, head_dim_v)
    checks.scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    return ops._allocate(q, batch, seqlen_q, heads, head_dim_v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
    q, k, v, *rest = inputs
    # The output and log-sum-exp are e4m3's. The P that the backward kernels make anew is not quite
    # theirs; a 16-bit forward pass for its own would take the time that this one saved.
    ops_backward.save(ctx, (q, k, v), output)
    ctx.operator = ops_backward._backward
    ctx.scalars = (*rest[_NUM_RECIPE:-2], rest[-1])  # sm_margin is the forward pass's


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * (_NUM_RECIPE + 7)
    return *ops_backward.gradients(ctx, dout, dlse), *nothing


_library_fragment.impl("attention_fp8", _attention, "CUDA")
_library_fragment.impl("attention_fp8", ops_fp8._forward_cpu, "CPU")
torch.library.register_fake(
    "hopper_attention::attention_fp8", _attention_fake, lib=_library_fragment
)
_autograd.register("attention_fp8", _differentiate, _save, _library_fragment)

formula = ops_backward.formula_of("attention_fp8", ops_backward._backward, ops_backward._DENSE)
_operator: Callable[..., ops.Outputs] = torch.ops.hopper_attention.attention_fp8.default
