"""`explain`: which kernel a call would run, and why."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from . import _library, attention_fp8, checks, checks_varlen, fp8, ops, ops_fp8, ops_varlen
from ._layout import copy_reason, planned_packed_strides, planned_strides
from .checks_fp8 import Tensors
from .interface import flash_attn_func, normalise
from .quantized import Quantized
from .varlen import flash_attn_varlen_func, prepare

_SIGNATURE = inspect.signature(flash_attn_func)
_VARLEN_SIGNATURE = inspect.signature(flash_attn_varlen_func)
_DESCALES = ("q_descale", "k_descale", "v_descale")
_WITHOUT_EFFECT = ("deterministic", "return_attn_probs")  # on which kernel runs


@dataclass(frozen=True)
class Explanation:
    """What a call of `flash_attn_func` would run.

    Attributes:
        instance: the kernel's name, a row of hopper/forward/instances.def.
        dtype: "float16", "bfloat16", "float8_e4m3fn", or "float8_e4m3fn_fast" with fast sums.
        mask: "full", or "masked" for the general kernel: where a mask, a soft cap or a scale that
            is not positive asks for it, or where its tiles are faster; "short" for that of rows
            that see few keys; "packed" for packed batches.
        tile_m: query rows a block works on.
        tile_n: keys a step.
        stages: buffers of K, and as many of V.
        num_consumers: warpgroups that multiply.
        cluster: blocks that work on neighbouring tiles and share their loads of K and V; 1 where
            each is alone.
        head_dim_tile: the head dimension of Q and K that the kernel is compiled for.
        head_dim_v_tile: that of V.
        smem_bytes: shared memory of a block.
        grid: blocks launched.
        num_tiles: tiles of the output that they share; of a packed batch, at most.
        scheduler: "static" or "dynamic".
        compiled: whether this build holds the instance.
        reason: why this tile.
        copies: for each tensor that has to be copied first, its name and why.
    """

    instance: str
    dtype: str
    mask: str
    tile_m: int
    tile_n: int
    stages: int
    num_consumers: int
    cluster: int
    head_dim_tile: int
    head_dim_v_tile: int
    smem_bytes: int
    grid: int
    num_tiles: int
    scheduler: str
    compiled: bool
    reason: str
    copies: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(field.name) for field in fields(self))
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "copies":
                value = "; ".join(value) or "none"
            lines.append(f"{field.name:<{width}}  {value}")
        return "\n".join(lines)


def explain(
    q: torch.Tensor | Quantized,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    **arguments: Any,
) -> Explanation:
    """Says which kernel a call would run, without running it.

    `explain(q, k, v, ...)` is about `flash_attn_func`, with cu_seqlens_q about
    `flash_attn_varlen_func`, and `explain(quantized, ...)` about `flash_attn_fp8_func` with a
    `Quantized`.

    Needs the compiled library but no GPU: the tensors may be on any device, "meta" among them.

    Args:
        q: as in `flash_attn_func`, or a `Quantized`.
        k: as in `flash_attn_func`; None beside a `Quantized`.
        v: likewise.
        arguments: any others of the function, by name.

    Raises:
        ValueError, TypeError, NotImplementedError: as `flash_attn_func`.
        RuntimeError: the compiled library is missing.
    """
    if isinstance(q, Quantized):
        return _explain_quantized(q, k, v, **arguments)
    if "cu_seqlens_q" in arguments:
        return _explain_varlen(q, k, v, **arguments)
    call = _SIGNATURE.bind(q, k, v, **arguments)
    call.apply_defaults()
    for name in _WITHOUT_EFFECT:
        del call.arguments[name]
    sink = call.arguments.pop("learnable_sink")  # without effect, too, but checked
    if sink is not None:
        checks.tensors(learnable_sink=sink)
    if isinstance(q, torch.Tensor) and q.dtype is torch.float8_e4m3fn:
        q_descale, k_descale, v_descale = (call.arguments[name] for name in _DESCALES)
        call.arguments.update(dict.fromkeys(_DESCALES))
        scalars = normalise(**call.arguments)
        k, v = call.arguments["k"], call.arguments["v"]
        x = Tensors(q, k, v, q_descale, k_descale, v_descale, learnable_sink=sink)
        return _explain_fp8(x, scalars)
    scalars = normalise(**call.arguments)
    assert k is not None  # normalise refuses it
    assert v is not None
    dtype, dims = checks.request(q, k, v, scalars)
    if sink is not None:
        checks.sink(sink, dims[3], q.device)
    strides = (planned_strides(q), planned_strides(k), planned_strides(v))
    request = ops.problem(dtype, dims, strides, scalars)
    answer = json.loads(_library.load().explain_forward(*request))
    return Explanation(**answer, copies=_copies(q, k, v))


def _copies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[str, ...]:
    reasons = {name: copy_reason(tensor) for name, tensor in (("q", q), ("k", k), ("v", v))}
    return tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def _explain_varlen(q: torch.Tensor, k: Any, v: Any, **arguments: Any) -> Explanation:
    # Those that are not needed may be left out.
    arguments = {"max_seqlen_q": None, "max_seqlen_k": None, **arguments}
    call = _VARLEN_SIGNATURE.bind(q, k, v, **arguments)
    call.apply_defaults()
    given = call.arguments
    for name in _WITHOUT_EFFECT:
        del given[name]
    lengths = checks_varlen.Lengths(*(given.pop(name) for name in checks_varlen.Lengths._fields))
    scalars = prepare(lengths=lengths, **given)
    dtype, dims = checks_varlen.request(q, k, v, lengths, scalars)
    strides = (planned_packed_strides(q), planned_packed_strides(k), planned_packed_strides(v))
    request = ops_varlen.problem(dtype, dims, strides, scalars)
    answer = json.loads(_library.load().explain_varlen(*request))
    return Explanation(**answer, copies=_copies(q[None], k[None], v[None]))


_QUANTIZED_SIGNATURE = inspect.signature(fp8.flash_attn_fp8_func)


def _explain_quantized(x: Quantized, k: Any, v: Any, **arguments: Any) -> Explanation:
    call = _QUANTIZED_SIGNATURE.bind(x, k, v, **arguments)
    call.apply_defaults()
    given = call.arguments
    scalars, out_dtype = fp8.prepare_quantized(
        x,
        *(given[name] for name in ("k", "v", "recipe", "softmax_scale", "causal")),
        *(given[name] for name in ("window_size", "softcap", "sm_margin", "out_dtype")),
    )
    return _explain_fp8(
        Tensors(*attention_fp8.forward_arguments(x)),
        scalars,
        out_dtype,
        x.recipe.transpose_v,
        x.recipe.accumulation == "fast",
    )


def _explain_fp8(
    x: Tensors,
    scalars: ops_fp8.Scalars,
    out_dtype: torch.dtype = torch.bfloat16,
    v_transposed: bool = False,
    fast: bool = False,
) -> Explanation:
    answer, copies = ops_fp8.explain(x, out_dtype, v_transposed, fast, scalars)
    return Explanation(**json.loads(answer), copies=copies)
