"""The e4m3 forward as a PyTorch operator: torch.ops.hopper_attention.forward_fp8."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import _library, checks, ops
from ._calls import CallTable
from .checks_fp8 import Request, Tensors, request
from .ops_quantize import spaced

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_library_fragment.define(
    "forward_fp8(Tensor q, Tensor k, Tensor v, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, Tensor? v_token_factor, Tensor? learnable_sink, ScalarType out_dtype, "
    "bool v_transposed, bool fast_accumulation, float softmax_scale, bool causal, int window_left, "
    "int window_right, float softcap, int sm_margin) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_GRANULE = 16  # bytes, and elements of e4m3: TMA's
_MAX_STRIDE = 1 << 39
_NO_SCALE = (0, 0)

Scalars = tuple[float, bool, int, int, float, int]
Strides = tuple[int, int, int]
# q, k, v, q_descale, k_descale, v_descale, v_token_factor
Inputs = tuple[torch.Tensor | None, ...]

_TENSORS = ("q", "k", "v", *ops.DESCALES, "v_token_factor")

_plans: dict[tuple[Any, ...], ops.Plan] = {}  # as ops.py's
_calls = CallTable(  # as ops.py's
    (
        *(*_TENSORS, "learnable_sink", "out_dtype", "v_transposed", "fast_accumulation"),
        *ops.SCALAR_NAMES,
    ),
    ("out", "lse"),
    (*_TENSORS, "out", "lse", "shared workspace", "stream", "learnable_sink"),
    ops.memory,
)


def copy_reason(tensor: torch.Tensor) -> str | None:
    """Why the kernels cannot read an e4m3 tensor in place, or None when they can."""
    if tensor.numel() == 0:
        return None
    if tensor.stride(3) != 1:
        return f"the last dimension has stride {tensor.stride(3)}, not 1"
    for dim, stride in enumerate(_legal_strides(tensor)):
        if stride % _GRANULE or not 0 <= stride < _MAX_STRIDE:
            return f"the stride of dimension {dim}, {stride} bytes, is not a multiple of {_GRANULE}"
    address = 0 if _has_no_memory(tensor) else tensor.data_ptr()
    if address % _GRANULE:
        return f"the address is not a multiple of {_GRANULE} bytes"
    return None


def _has_no_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(
        tensor, torch._subclasses.fake_tensor.FakeTensor
    )


def _legal_strides(tensor: torch.Tensor) -> Strides:
    # That of a dimension of size 1, or of an empty tensor, is never taken.
    empty = tensor.numel() == 0
    first, second, third = (
        0 if empty or tensor.shape[i] == 1 else tensor.stride(i) for i in range(3)
    )
    return first, second, third


def _in_place(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that the kernels can read."""
    if copy_reason(tensor) is None:
        return tensor
    copy = spaced(tuple(tensor.shape), tensor.device)
    copy.copy_(tensor)
    return copy


def _strides(tensor: torch.Tensor, transposed: bool = False) -> Strides:
    """(batch, seq, head), or (batch, channel, head) of a transposed v."""
    batch, first, second = _legal_strides(tensor)
    return (batch, second, first) if transposed else (batch, first, second)


def _planned_strides(tensor: torch.Tensor, transposed: bool = False) -> Strides:
    """Those after the copy that `_in_place` would make."""
    if copy_reason(tensor) is None:
        return _strides(tensor, transposed)
    return _strides(spaced(tuple(tensor.shape), torch.device("meta")), transposed)


def _floats_in_place(descale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales with a contiguous last dimension, where they have one."""
    if descale is None or descale.dim() == 2 or descale.shape[2] <= 1 or descale.stride(2) == 1:
        return descale
    return descale.contiguous()


def _scale_strides(descale: torch.Tensor | None) -> tuple[int, int]:
    return _NO_SCALE if descale is None else (descale.stride(0), descale.stride(1))


def _longs(
    strides: tuple[Strides, Strides, Strides], out: Strides, x: Tensors, r: Request
) -> list[int]:
    """Strides in the order of bindings_fp8.cpp."""
    return [
        *(stride for of_tensor in strides for stride in of_tensor),
        *out,
        *_scale_strides(x.q_descale),
        *_scale_strides(x.k_descale),
        *_scale_strides(x.v_descale),
        int(r.v_per_channel),
        *_scale_strides(x.v_token_factor),
    ]


def _ints(
    r: Request, out_dtype: torch.dtype, v_transposed: bool, fast: bool, scalars: Scalars
) -> list[int]:
    """Sizes and choices in the order of bindings_fp8.cpp."""
    _, causal, window_left, window_right, _, sm_margin = scalars
    return [
        *r.dims,
        int(causal),
        *ops.window(causal, window_left, window_right),
        sm_margin,
        checks.DTYPE_CODES[out_dtype],
        int(fast),
        int(v_transposed),
        r.q_tokens,
        r.k_tokens,
        int(r.q_per_kv),
    ]


def _out_strides(r: Request) -> Strides:
    _, seqlen_q, _, heads, _, _, head_dim_v = r.dims
    return seqlen_q * heads * head_dim_v, heads * head_dim_v, head_dim_v


def _allocate(
    r: Request, out_dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen_q, _, heads, _, _, head_dim_v = r.dims
    out = torch.empty(batch, seqlen_q, heads, head_dim_v, dtype=out_dtype, device=device)
    return out, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=device)


def arguments_of_e4m3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    descales: tuple[torch.Tensor | None, ...],
    learnable_sink: torch.Tensor | None,
    scalars: Scalars,
) -> tuple[Any, ...]:
    """The operator's arguments for tensors in FlashAttention-3's layout."""
    return (
        *(q, k, v, *descales, None, learnable_sink, torch.bfloat16, False, False),
        *scalars,
    )


def seen_by_table(*arguments: Any) -> tuple[Any, ...]:
    """The operator's arguments as its table takes them, to which dtypes mean nothing."""
    *tensors, out_dtype, v_transposed, fast = arguments[:11]
    code = checks.DTYPE_CODES.get(out_dtype)
    return *tensors, code, v_transposed, fast, *arguments[11:]


def _forward_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_descale: torch.Tensor | None,
    k_descale: torch.Tensor | None,
    v_descale: torch.Tensor | None,
    v_token_factor: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (q, k, v, q_descale, k_descale, v_descale, v_token_factor, learnable_sink, *rest)
    if not checks.needs_grad(*arguments[:8]):
        again: ops.Outputs | None = _calls.call(*seen_by_table(*arguments))
        if again is not None:
            return again
    device_index = q.get_device()
    if device_index != ops._current_device():
        with torch.cuda.device(q.device):
            return _forward_cuda(*arguments)
    # Named, as they must outlive the call: some may become copies.
    tensors: Inputs = (q, k, v, q_descale, k_descale, v_descale, v_token_factor)
    key = (*map(ops.key_of, tensors), rest)
    plan = _plans.get(key)
    if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % _GRANULE:
        x = Tensors(q, k, v, q_descale, k_descale, v_descale, v_token_factor, learnable_sink)
        tensors, plan = _make_plan(key, x)
    sink = None if learnable_sink is None else ops.sink_in_place(learnable_sink, q)
    checks.no_gradient(*arguments[:8])
    run, is_empty, out_layout, lse_layout = plan
    out, lse = ops._empty(*out_layout), ops._empty(*lse_layout)
    if is_empty:
        return out, lse
    stream = ops._raw_stream(device_index)
    run(
        *[0 if x is None else x.data_ptr() for x in tensors],
        out.data_ptr(),
        lse.data_ptr(),
        ops._workspace(device_index, stream).data_ptr(),
        stream,
        0 if sink is None else sink.data_ptr(),
    )
    # Tensors that were copied are remembered as the copies, which need none.
    _calls.remember(seen_by_table(*tensors, sink, *rest), run, (out_layout, lse_layout), 2)
    return out, lse


def _make_plan(key: tuple[Any, ...], x: Tensors) -> tuple[Inputs, ops.Plan]:
    """Checks a call; returns its tensors, copied where kernels cannot read them, and its plan."""
    out_dtype, v_transposed, fast, *rest = key[-1]
    scalars: Scalars = tuple(rest)
    r = request(x, out_dtype, v_transposed, scalars)
    batch, seqlen_q, _, heads, _, _, head_dim_v = r.dims
    q, k, v = _in_place(x.q), _in_place(x.k), _in_place(x.v)
    strides = (_strides(q), _strides(k), _strides(v, v_transposed))
    scales = [_floats_in_place(scale) for scale in _inputs(x)[3:]]
    views = Tensors(q, k, v, *scales)
    plan = ops.Plan(
        _library.load().prepare_fp8(
            _longs(strides, _out_strides(r), views, r),
            _ints(r, out_dtype, v_transposed, fast, scalars),
            scalars[0],
            scalars[4],
        ),
        not batch * seqlen_q * heads,
        ops._contiguous((batch, seqlen_q, heads, head_dim_v), out_dtype),
        ops._contiguous((batch, heads, seqlen_q), torch.float32),
    )
    if all(view is given for view, given in zip(_inputs(views), _inputs(x), strict=True)):
        ops.remember(_plans, key, plan)
    return _inputs(views), plan


def _inputs(x: Tensors) -> Inputs:
    return x.q, x.k, x.v, x.q_descale, x.k_descale, x.v_descale, x.v_token_factor


def _forward_cpu(q: torch.Tensor, *_: Any) -> NoReturn:
    raise ValueError(
        f"q, k and v must be on a CUDA device, got {q.device}; on the CPU, "
        "hopper_attention.emulation_fp8.attention computes what the kernel computes"
    )


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_descale: torch.Tensor | None,
    k_descale: torch.Tensor | None,
    v_descale: torch.Tensor | None,
    v_token_factor: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    out_dtype: torch.dtype,
    v_transposed: bool,
    fast_accumulation: bool,
    *scalars: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = Tensors(q, k, v, q_descale, k_descale, v_descale, v_token_factor, learnable_sink)
    r = request(x, out_dtype, v_transposed, scalars)
    checks.no_gradient(q, k, v, q_descale, k_descale, v_descale, v_token_factor, learnable_sink)
    return _allocate(r, out_dtype, q.device)


def explain(
    x: Tensors, out_dtype: torch.dtype, v_transposed: bool, fast: bool, scalars: Scalars
) -> tuple[str, tuple[str, ...]]:
    """How a call would run: the library's JSON, and which tensors would be copied first."""
    r = request(x, out_dtype, v_transposed, scalars)
    strides = (
        _planned_strides(x.q),
        _planned_strides(x.k),
        _planned_strides(x.v, v_transposed),
    )
    ints = _ints(r, out_dtype, v_transposed, fast, scalars)
    answer = _library.load().explain_forward_fp8(
        _longs(strides, _out_strides(r), x, r), ints, scalars[0], scalars[4]
    )
    reasons = {name: copy_reason(tensor) for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v))}
    return answer, tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)


_library_fragment.impl("forward_fp8", _forward_cuda, "CUDA")
_library_fragment.impl("forward_fp8", _forward_cpu, "CPU")
torch.library.register_fake("hopper_attention::forward_fp8", _forward_fake, lib=_library_fragment)

forward_fp8 = torch.ops.hopper_attention.forward_fp8.default
