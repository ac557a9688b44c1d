"""The quantizer as a PyTorch operator: torch.ops.hopper_attention.quantize.

On CUDA it calls the library's kernels, on the CPU `reference_quantizer`; both give the same bits,
but for K's mean, whose sum is rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from . import _library, checks, ops, reference_quantizer
from ._calls import CallTable
from .checks_quantize import Call, request
from .recipe import QK_BLOCK_TOKENS, signs
from .rotation import apply_rotary

FP8 = torch.float8_e4m3fn
ROW_GRANULE = 16
"""e4m3 rows begin at multiples of so many elements: TMA reads in steps of 16 bytes."""

# hopper_attention_scale in include/hopper_attention/abi_quantize.h
_SCALE_CODES = {"tensor": 0, "head": 1, "block": 2, "token": 3, "channel": 4}

# q, k, v, q_descale, k_descale, v_descale, v_token_factor, k_mean; the last two are empty where the
# recipe has none
Outputs = tuple[torch.Tensor, ...]

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_library_fragment.define(
    "quantize(Tensor q, Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, str qk_scale, str v_scale, bool hadamard, "
    "int seed, bool smooth_k, bool transpose_v, bool rotary_interleaved, int? rotary_q_offset, "
    "int rotary_k_offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def slots(tokens: int, batch: int, packed: bool) -> int:
    """Blocks of 128 tokens: of a sequence, or of all packed ones (see `Quantized`)."""
    return tokens // QK_BLOCK_TOKENS + batch if packed else -(-tokens // QK_BLOCK_TOKENS)


def _with_gaps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the memory of an e4m3 tensor: the gap behind a row is part of the row."""
    return *shape[:-1], -(-shape[-1] // ROW_GRANULE) * ROW_GRANULE


def spaced(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An e4m3 tensor whose rows begin at multiples of `ROW_GRANULE` elements."""
    return torch.empty(_with_gaps(shape), dtype=FP8, device=device)[..., : shape[-1]]


def _shapes(dims: checks.Dims, call: Call) -> tuple[tuple[int, ...], ...]:
    """The outputs' shapes; the first three are of e4m3, the others of float32."""
    batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v = dims
    recipe, packed = call.recipe, call.packed
    lead = () if packed else (batch,)
    slots_k = slots(seqlen_k, batch, packed)

    def descale(num_heads: int, tokens: int) -> tuple[int, ...]:
        if recipe.qk_scale == "block":
            return *lead, num_heads, slots(tokens, batch, packed)
        if recipe.qk_scale == "token":
            return *lead, num_heads, tokens
        return batch, num_heads, 1

    v = (*lead, seqlen_k, heads_kv, head_dim_v)
    if recipe.transpose_v:
        v = (*lead, heads_kv, head_dim_v, slots_k * QK_BLOCK_TOKENS)
    return (
        (*lead, seqlen_q, heads, head_dim),
        (*lead, seqlen_k, heads_kv, head_dim),
        v,
        descale(heads, seqlen_q),
        descale(heads_kv, seqlen_k),
        (batch, heads_kv, head_dim_v if recipe.v_scale == "channel" else 1),
        (*lead, heads_kv, seqlen_k) if recipe.v_scale == "token" else (0,),
        (batch, heads_kv, head_dim) if recipe.smooth_k else (0,),
    )


def _allocate(dims: checks.Dims, call: Call, device: torch.device) -> Outputs:
    q, k, v, *floats = _shapes(dims, call)
    return (
        spaced(q, device),
        spaced(k, device),
        torch.empty(v, dtype=FP8, device=device)
        if call.recipe.transpose_v  # its rows are multiples of 128
        else spaced(v, device),
        *(torch.empty(shape, dtype=torch.float32, device=device) for shape in floats),
    )


def _quantize_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    call = Call.make(*rest)
    return _allocate(request(q, k, v, call), call, q.device)


@lru_cache(maxsize=64)
def _sign_bits(head_dim: int, seed: int) -> tuple[int, ...]:
    """Bit c % 32 of word c / 32 says that channel c is negated."""
    negative = (signs(head_dim, seed) < 0).tolist()
    words = [0] * 8
    for channel, is_negative in enumerate(negative):
        words[channel // 32] |= int(is_negative) << channel % 32
    return tuple(words)


def _contiguous_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its last dimension has gaps."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (0 where packed), of what comes next, and of heads.

    That of a dimension of size 1 is never taken, and may be anything: here a legal one.
    """
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    legal = [n if size > 1 else ROW_GRANULE for size, n in zip(sizes, strides, strict=True)]
    return (*([0] * (3 - len(legal))), *legal)  # type: ignore[return-value]


def _v_out_strides(v: torch.Tensor, transposed: bool) -> tuple[int, int, int]:
    batch, first, second = _strides(v)
    return (batch, second, first) if transposed else (batch, first, second)


def _float_table(table: torch.Tensor) -> torch.Tensor:
    table = table.to(torch.float32).contiguous()
    return table if table.data_ptr() % 16 == 0 else table.clone()


class Plan(NamedTuple):
    """What is settled of a call that has passed the checks; the rest are addresses.

    Attributes:
        run: enqueues the kernel, with the addresses that bindings_quantize.cpp says.
        is_empty: whether there is nothing to quantize; nothing is enqueued then.
        outputs: shape, strides and dtype of each output's memory.
        columns: for the outputs whose rows have gaps, which one it is and its last dimension.
        workspace: as outputs.
    """

    run: Callable[..., None]
    is_empty: bool
    outputs: tuple[ops.Layout, ...]
    columns: tuple[tuple[int, int], ...]
    workspace: ops.Layout


_plans: dict[tuple[Any, ...], Plan] = {}  # as ops.py's
_INPUTS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "rotary_cos", "rotary_sin")
RESULTS = ("q", "k", "v", *ops.DESCALES, "v_token_factor", "k_mean")
_OUTPUTS = (*(f"new {name}" for name in RESULTS), "workspace")
_calls = CallTable(  # as ops.py's
    (
        *("q", "k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_q", "cu_seqlens_k", "qk_scale"),
        *("v_scale", "hadamard", "seed", "smooth_k", "transpose_v", "rotary_interleaved"),
        *("rotary_q_offset", "rotary_k_offset"),
    ),
    _OUTPUTS,
    (*_INPUTS, *_OUTPUTS, "stream"),
    ops.memory,
)


def _quantize_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    checks.no_gradient(q, k, v, *rest[:2])
    again: Outputs | None = _calls.call(q, k, v, *rest)
    if again is not None:
        return again
    device_index = q.get_device()
    if device_index != ops._current_device():
        with torch.cuda.device(q.device):
            return _quantize_cuda(q, k, v, *rest)
    cos, sin, cu_seqlens_q, cu_seqlens_k = rest[:4]
    key = (*map(ops.key_of, (q, k, v, cos, sin, cu_seqlens_q, cu_seqlens_k)), rest[4:])
    plan = _plans.get(key)
    if plan is None:
        q, k, v, plan = _make_plan(key, q, k, v, rest)
    run, is_empty, layouts, columns, workspace_layout = plan
    outputs = [ops._empty(*layout) for layout in layouts]
    for place, count in columns:
        outputs[place] = outputs[place][..., :count]
    if is_empty:
        return tuple(outputs)
    if cos is not None:
        cos, sin = _float_table(cos), _float_table(sin)
    workspace = ops._empty(*workspace_layout)
    run(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *[0 if x is None else x.data_ptr() for x in (cu_seqlens_q, cu_seqlens_k, cos, sin)],
        *[x.data_ptr() for x in outputs],
        workspace.data_ptr(),
        ops._raw_stream(device_index),
    )
    if not columns:  # outputs are what was allocated
        # Tensors that were copied are remembered as the copies, which need none.
        arguments = (q, k, v, cos, sin, cu_seqlens_q, cu_seqlens_k, *rest[4:])
        _calls.remember(arguments, run, (*layouts, workspace_layout), len(outputs))
    return tuple(outputs)


def _make_plan(
    key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan]:
    """Checks a call; returns q, k and v, copied where kernels cannot read them, and its plan."""
    call = Call.make(*rest)
    dims = request(q, k, v, call)
    recipe, shapes = call.recipe, _shapes(dims, call)
    views = (_contiguous_last(q), _contiguous_last(k), _contiguous_last(v))
    outputs = _allocate(dims, call, torch.device("meta"))
    run, workspace_bytes = _library.load().prepare_quantize(
        call.packed,
        (
            *(stride for x in views for stride in _strides(x)),
            *(*_strides(outputs[0]), *_strides(outputs[1])),
            *_v_out_strides(outputs[2], recipe.transpose_v),
            call.rotary_k_offset if call.rotary_q_offset is None else call.rotary_q_offset,
            call.rotary_k_offset,
        ),
        _ints(q.dtype, dims, call),
        _sign_bits(dims[5], recipe.seed) if recipe.hadamard else (0,) * 8,
    )
    in_memory = [*map(_with_gaps, shapes[:3]), *shapes[3:]]
    plan = Plan(
        run,
        not dims[0] or not (dims[3] or dims[4]),
        tuple(ops._contiguous(shape, x.dtype) for shape, x in zip(in_memory, outputs, strict=True)),
        tuple((i, shapes[i][-1]) for i in range(3) if shapes[i] != in_memory[i]),
        ops._contiguous((max(16, workspace_bytes),), torch.uint8),
    )
    if views[0] is q and views[1] is k and views[2] is v:
        ops.remember(_plans, key, plan)
    return *views, plan


def _ints(dtype: torch.dtype, dims: checks.Dims, call: Call) -> tuple[int, ...]:
    recipe, cos = call.recipe, call.rotary_cos
    return (
        checks.DTYPE_CODES[dtype],
        *dims,
        _SCALE_CODES[recipe.qk_scale],
        _SCALE_CODES[recipe.v_scale],
        recipe.hadamard,
        recipe.smooth_k,
        recipe.transpose_v,
        0 if cos is None else 2 * cos.shape[1],
        0 if cos is None else cos.shape[0],
        call.rotary_interleaved,
        cos is not None and call.rotary_q_offset is None,
    )


def _quantize_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    checks.no_gradient(q, k, v, *rest[:2])
    call = Call.make(*rest)
    dims = request(q, k, v, call)
    outputs = _allocate(dims, call, q.device)
    if call.packed:
        _fill_packed(outputs, q, k, v, call)
    else:
        if call.rotary_cos is not None:
            (q, k), v = _rotate_positions(q, k, call), v.float()
        parts = reference_quantizer.quantize(q, k, v, call.recipe)
        for output, part in zip(outputs, parts, strict=False):  # the last part is the recipe
            if isinstance(part, torch.Tensor):
                output.copy_(part)
    return outputs


def _rotate_positions(
    q: torch.Tensor, k: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of one dense batch, in float32."""
    cos, sin = call.rotary_cos, call.rotary_sin
    assert cos is not None
    assert sin is not None
    offset = call.rotary_q_offset
    if offset is None:
        offset = k.shape[1] - q.shape[1] + call.rotary_k_offset
    turned = []
    for x, first in ((q, offset), (k, call.rotary_k_offset)):
        if not x.shape[1]:
            turned.append(x.float())
            continue
        turned.append(apply_rotary(x, cos, sin, interleaved=call.rotary_interleaved, offset=first))
    return turned[0], turned[1]


def _fill_packed(
    outputs: Outputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> None:
    """Quantizes packed sequences and puts what comes of it at the operator's places."""
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for name, bounds, tensor in (("q", bounds_q, q), ("k", bounds_k, k)):
        if bounds[0] != 0 or bounds[-1] != tensor.shape[0] or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens_{name} must rise from 0 to {tensor.shape[0]}, the tokens of {name}, "
                f"got {bounds}"
            )
    if call.rotary_cos is not None:
        q, k, v = q.float(), k.float(), v.float()
        for i in range(len(bounds_q) - 1):
            of_q, of_k = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
            turned = _rotate_positions(q[None, of_q], k[None, of_k], call)
            q[of_q], k[of_k] = turned[0][0], turned[1][0]
    parts = reference_quantizer.quantize_packed(
        q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.recipe
    )
    out_q, out_k, out_v, q_descale, k_descale, v_descale, factor, mean = outputs
    out_q.copy_(parts.q)
    out_k.copy_(parts.k)
    v_descale.copy_(parts.v_descale)
    if parts.k_mean is not None:
        mean.copy_(parts.k_mean)
    granularity = call.recipe.qk_scale
    _place(q_descale, parts.q_descale, bounds_q, granularity)
    _place(k_descale, parts.k_descale, bounds_k, granularity)
    if parts.v_token_factor is not None:
        _place(factor, parts.v_token_factor, bounds_k, "token")
    if not call.recipe.transpose_v:
        out_v.copy_(parts.v)
        return
    out_v.zero_()
    begin = 0
    for i, (first, last) in enumerate(pairwise(bounds_k)):
        width = slots(last - first, 0, False) * QK_BLOCK_TOKENS
        at = first_slot(first, i) * QK_BLOCK_TOKENS
        out_v[..., at : at + width] = parts.v[..., begin : begin + width]
        begin += width


def first_slot(first_token: int, sequence: int) -> int:
    """The first block of a packed sequence that begins at this token."""
    return first_token // QK_BLOCK_TOKENS + sequence


def _place(to: torch.Tensor, of: torch.Tensor, bounds: list[int], granularity: str) -> None:
    """(batch, heads, the longest sequence's) to (heads, of all sequences)."""
    if granularity in ("tensor", "head"):
        to.copy_(of)
        return
    to.fill_(1.0)
    for i, (first, last) in enumerate(pairwise(bounds)):
        if granularity == "block":
            count, at = slots(last - first, 0, False), first_slot(first, i)
        else:
            count, at = last - first, first
        to[:, at : at + count] = of[i, :, :count]


_library_fragment.impl("quantize", _quantize_cuda, "CUDA")
_library_fragment.impl("quantize", _quantize_cpu, "CPU")
torch.library.register_fake("hopper_attention::quantize", _quantize_fake, lib=_library_fragment)

quantize = torch.ops.hopper_attention.quantize.default
