"""The forward pass of packed batches as an operator: torch.ops.hopper_attention.forward_varlen.

Like `forward` it allocates its outputs, passes addresses and strides to the library, and returns
without waiting for the device. The sequences' lengths stay on the device: two kernels are enqueued,
of which the first lists the tiles for the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from . import _library, checks, checks_varlen, ops
from ._calls import CallTable
from ._layout import PackedStrides, packed_view
from .checks import UNBOUNDED
from .checks_varlen import Lengths

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, float softmax_scale, bool causal, int window_left=-1, int window_right=-1, "
    "float softcap=0.0, int sm_margin=0{}) -> (Tensor out, Tensor lse)"
)
# As in ops.py, the first is what autograd and torch.compile see (ops_varlen_backward.py makes it
# differentiable), and the second serves eager calls without gradients.
_OPERATORS = {"forward_varlen": ", bool deterministic=False", "forward_varlen.inference": ""}
for _name, _last_argument in _OPERATORS.items():
    _library_fragment.define(
        _name + _SCHEMA.format(_last_argument), tags=(torch.Tag.pt2_compliant_tag,)
    )


class Plan(NamedTuple):
    """What is settled of a call that has passed the checks; the rest are addresses.

    Attributes:
        run: enqueues the kernels: run(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
            out, lse, workspace, stream), all integers; a seqused that is absent is 0.
        is_empty: whether the output has no elements; nothing is enqueued then.
        out: shape, strides and dtype of the output.
        lse: likewise of the log-sum-exp.
        workspace: likewise of the workspace.
    """

    run: Callable[..., None]
    is_empty: bool
    out: ops.Layout
    lse: ops.Layout
    workspace: ops.Layout


_plans: dict[tuple[Any, ...], Plan] = {}  # as ops.py's
_calls = CallTable(  # as ops.py's
    ("q", "k", "v", *Lengths._fields, *ops.SCALAR_NAMES),
    ("out", "lse", "workspace"),
    ("q", "k", "v", *Lengths._fields, "out", "lse", "workspace", "stream"),
    ops.memory,
)


def _forward_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    softcap: float = 0.0,
    sm_margin: int = 0,
    deterministic: bool = False,
) -> ops.Outputs:
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    scalars: Any = (softmax_scale, causal, window_left, window_right, softcap, sm_margin)
    again: ops.Outputs | None = _calls.call(q, k, v, *lengths, *scalars)
    if again is not None:
        return again
    device_index = q.get_device()
    if device_index != ops._current_device():
        with torch.cuda.device(q.device):
            return _forward_cuda(q, k, v, *lengths, *scalars)
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.is_contiguous() or q.stride(),
        k.is_contiguous() or k.stride(),
        v.is_contiguous() or v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        *map(_seen, lengths),
        scalars,
    )
    plan = _plans.get(key)
    q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if (
        plan is None
        or (q_address | k_address | v_address) & 15
        or not k.get_device() == v.get_device() == device_index
    ):
        q, k, v, plan = _make_plan(key, q, k, v, lengths, scalars)
        q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
    run, is_empty, out_layout, lse_layout, workspace_layout = plan
    out = ops._empty(*out_layout)
    lse = ops._empty(*lse_layout)
    if is_empty:
        return out, lse
    # Of this call alone: PyTorch's allocator gives memory back in the order of the stream.
    workspace = ops._empty(*workspace_layout)
    run(
        q_address,
        k_address,
        v_address,
        cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(),
        0 if seqused_q is None else seqused_q.data_ptr(),
        0 if seqused_k is None else seqused_k.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        workspace.data_ptr(),
        ops._raw_stream(device_index),
    )
    outputs = (out_layout, lse_layout, workspace_layout)
    _calls.remember((q, k, v, *lengths, *scalars), run, outputs, 2)
    return out, lse


def _seen(lengths: torch.Tensor | None) -> tuple[Any, ...] | None:
    """All that the checks look at of one of `Lengths`."""
    if lengths is None:
        return None
    return lengths.shape, lengths.dtype, lengths.is_contiguous(), lengths.get_device()


def _make_plan(
    key: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    scalars: ops.Scalars,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan]:
    """Checks a call; returns its tensors, copied where kernels cannot read them, and its plan."""
    dtype, dims = checks_varlen.request(q, k, v, lengths, scalars)
    _, total_q, _, heads, _, _, head_dim_v = dims
    views = [packed_view(x) for x in (q, k, v)]
    strides = (views[0][1], views[1][1], views[2][1])
    run, workspace_bytes = _library.load().prepare_varlen(*problem(dtype, dims, strides, scalars))
    plan = Plan(
        run,
        not total_q * heads,
        ops._contiguous((total_q, heads, head_dim_v), q.dtype),
        ops._contiguous((heads, total_q), torch.float32),
        ops._contiguous((workspace_bytes,), torch.uint8),
    )
    if all(view is x for (view, _), x in zip(views, (q, k, v), strict=True)):
        ops.remember(_plans, key, plan)
    return views[0][0], views[1][0], views[2][0], plan


def problem(
    dtype: int,
    dims: checks.Dims,
    strides: tuple[PackedStrides, PackedStrides, PackedStrides],
    scalars: ops.Scalars,
) -> tuple[Any, ...]:
    """What the library's functions take, from checked arguments; as `ops.problem`."""
    _, _, _, heads, _, _, head_dim_v = dims
    out_strides = (heads * head_dim_v, head_dim_v)
    return dtype, *dims, *strides, out_strides, *ops.library_scalars(scalars)


def _forward_cpu(q: torch.Tensor, *_: Any) -> NoReturn:
    raise ValueError(
        f"q, k and v must be on a CUDA device, got {q.device}; on the CPU, "
        "hopper_attention.reference.varlen_attention computes attention in float64 and "
        "hopper_attention.emulation_varlen.attention computes what the kernel computes"
    )


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    softcap: float = 0.0,
    sm_margin: int = 0,
    deterministic: bool = False,
) -> ops.Outputs:
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    _, total_q, _, heads, _, head_dim, head_dim_v = checks_varlen.packed_dims(q, k, v, lengths)
    checks_varlen.limits(q.dtype, head_dim, head_dim_v)
    checks.scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    out = torch.empty(total_q, heads, head_dim_v, dtype=q.dtype, device=q.device)
    return out, torch.empty(heads, total_q, dtype=torch.float32, device=q.device)


for _name in _OPERATORS:
    _library_fragment.impl(_name, _forward_cuda, "CUDA")
    _library_fragment.impl(_name, _forward_cpu, "CPU")
    torch.library.register_fake(f"hopper_attention::{_name}", _forward_fake, lib=_library_fragment)

operator = torch.ops.hopper_attention.forward_varlen.default
_inference = torch.ops.hopper_attention.forward_varlen.inference
forward: Callable[..., ops.Outputs] = getattr(_inference, "_op", _inference)


def without_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> ops.Outputs:
    """The operator of all its arguments, in an eager call whose gradient is not its matter."""
    *given, window_left, window_right, softcap, sm_margin, _ = arguments
    if (window_left, window_right, softcap, sm_margin) == ops.DEFAULTS:
        return forward(q, k, v, *given)
    return forward(q, k, v, *arguments[:-1])
