"""The forward pass as a PyTorch operator: torch.ops.hopper_attention.forward.

`forward` allocates its outputs, passes pointers, strides and the current stream to the library, and
returns without waiting for the device. It is traced by torch.compile and captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import torch

from . import _library, checks
from ._calls import CallTable
from ._layout import Strides, kernel_view
from .checks import UNBOUNDED

Outputs = tuple[torch.Tensor, torch.Tensor]

_library_fragment = torch.library.Library("hopper_attention", "DEF")
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int window_left=-1, "
    "int window_right=-1, float softcap=0.0, int sm_margin=0, Tensor? learnable_sink=None{}) "
    "-> (Tensor out, Tensor lse)"
)
# ops_backward.py makes the first differentiable. That puts a Python function between the dispatcher
# and the kernel, 3.5 us also where no gradient is asked for; eager calls then take the second.
_OPERATORS = {"forward": ", bool deterministic=False", "forward.inference": ""}
for _name, _last_argument in _OPERATORS.items():
    _library_fragment.define(
        _name + _SCHEMA.format(_last_argument), tags=(torch.Tag.pt2_compliant_tag,)
    )

# Zeroed device memory that a call leaves zeroed, by (device index, stream): calls on one stream run
# one after the other and share it. Entries live as long as the process; PyTorch pools its streams,
# so they are few, and they are small.
_workspaces: dict[tuple[int, int], torch.Tensor] = {}

# The operator's arguments after q, k and v, but for the last two: learnable_sink is a tensor, and
# deterministic says how the gradients are to be computed (ops_backward.py), at which the forward
# pass does not look.
Scalars = tuple[float, bool, int, int, float, int]
SCALAR_NAMES = ("softmax_scale", "causal", "window_left", "window_right", "softcap", "sm_margin")
DESCALES = ("q_descale", "k_descale", "v_descale")  # of e4m3 tensors
# Of SCALAR_NAMES' last four. An argument that a call leaves out costs the dispatcher nothing,
# another 0.2 us.
DEFAULTS = (UNBOUNDED, UNBOUNDED, 0.0, 0)
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class Plan(NamedTuple):
    """What is settled of a call that has passed the checks; the rest are addresses.

    Attributes:
        run: enqueues the kernel: run(q, k, v, out, lse, workspace, stream, sink), all integers;
            sink is 0 where there is none. That of e4m3 tensors takes what bindings_fp8.cpp says.
        is_empty: whether the output has no elements; nothing is enqueued then.
        out: shape, strides and dtype of the output.
        lse: likewise of the log-sum-exp.
    """

    run: Callable[..., None]
    is_empty: bool
    out: Layout
    lse: Layout


# Plans of calls that need no copies, by all that the checks look at but the devices and addresses:
# a model repeats a few problems, and the checks would take a third of a call.
_plans: dict[tuple[Any, ...], Plan] = {}
_MAX_PLANS = 4096


def memory() -> tuple[Callable[..., Any], ...]:
    """What call_table.h calls empty, current_device and workspace."""
    return _empty, _current_device, _workspace


# Calls that were made before, without their Python.
_calls = CallTable(
    ("q", "k", "v", *SCALAR_NAMES, "learnable_sink"),
    ("out", "lse"),
    ("q", "k", "v", "out", "lse", "shared workspace", "stream", "learnable_sink"),
    memory,
)


def remember(plans: dict[tuple[Any, ...], Any], key: tuple[Any, ...], plan: Any) -> None:
    """Keeps a plan; all begin anew where there are too many."""
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan


def key_of(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """All of a tensor that checks look at but its address, for a plan's key.

    Contiguous tensors of one shape differ at most in the strides of dimensions of size 1, which are
    never taken.
    """
    if tensor is None:
        return None
    strides = tensor.is_contiguous() or tensor.stride()
    return tensor.shape, strides, tensor.dtype, tensor.device


def _forward_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    softcap: float = 0.0,
    sm_margin: int = 0,
    learnable_sink: torch.Tensor | None = None,
    deterministic: bool = False,
) -> Outputs:
    scalars = (softmax_scale, causal, window_left, window_right, softcap, sm_margin)
    again: Outputs | None = _calls.call(q, k, v, *scalars, learnable_sink)
    if again is not None:
        return again
    device_index = q.get_device()
    if device_index != _current_device():
        with torch.cuda.device(q.device):
            return _forward_cuda(q, k, v, *scalars, learnable_sink)
    key = (  # as of key_of, whose calls would take 0.5 us
        q.shape,
        k.shape,
        v.shape,
        q.is_contiguous() or q.stride(),
        k.is_contiguous() or k.stride(),
        v.is_contiguous() or v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        *scalars,
    )
    plan = _plans.get(key)
    q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if (
        plan is None
        or (q_address | k_address | v_address) & 15
        or not k.get_device() == v.get_device() == device_index
    ):
        q, k, v, plan = _make_plan(key, q, k, v, scalars)
        q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if learnable_sink is not None:
        learnable_sink = sink_in_place(learnable_sink, q)
    run, is_empty, out_layout, lse_layout = plan
    out = _empty(*out_layout)
    lse = _empty(*lse_layout)
    if is_empty:
        return out, lse
    stream = _raw_stream(device_index)
    workspace = _workspace(device_index, stream)
    run(
        q_address,
        k_address,
        v_address,
        out.data_ptr(),
        lse.data_ptr(),
        workspace.data_ptr(),
        stream,
        0 if learnable_sink is None else learnable_sink.data_ptr(),
    )
    # Tensors that were copied are remembered as the copies, which need none.
    _calls.remember((q, k, v, *scalars, learnable_sink), run, (out_layout, lse_layout), 2)
    return out, lse


def sink_in_place(learnable_sink: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A sink that was checked, contiguous; copied where it is not."""
    checks.sink(learnable_sink, q.shape[2], q.device)
    return learnable_sink.contiguous()


def _make_plan(
    key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scalars: Scalars
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan]:
    """Checks a call; returns its tensors, copied where kernels cannot read them, and its plan."""
    dtype, dims = checks.request(q, k, v, scalars)
    batch, seqlen_q, _, heads, _, _, head_dim_v = dims
    views = [kernel_view(x) for x in (q, k, v)]
    strides = (views[0][1], views[1][1], views[2][1])
    plan = Plan(
        _library.load().prepare(*problem(dtype, dims, strides, scalars)),
        not batch * seqlen_q * heads,
        _contiguous((batch, seqlen_q, heads, head_dim_v), q.dtype),
        _contiguous((batch, heads, seqlen_q), torch.float32),
    )
    if all(view is x for (view, _), x in zip(views, (q, k, v), strict=True)):
        remember(_plans, key, plan)
    return views[0][0], views[1][0], views[2][0], plan


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return shape, tuple(reversed(strides)), dtype


def _forward_cpu(q: torch.Tensor, *_: Any) -> NoReturn:
    raise ValueError(
        f"q, k and v must be on a CUDA device, got {q.device}; on the CPU, "
        "hopper_attention.reference.attention computes attention in float64 and "
        "hopper_attention.emulation.attention computes what the kernel computes"
    )


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    softcap: float = 0.0,
    sm_margin: int = 0,
    learnable_sink: torch.Tensor | None = None,
    deterministic: bool = False,
) -> Outputs:
    batch, seqlen_q, _, heads, _, head_dim, head_dim_v = checks.attention_dims(q, k, v)
    checks.kernel_limits(q.dtype, head_dim, head_dim_v)
    checks.scalars(softmax_scale, window_left, window_right, softcap, sm_margin)
    if learnable_sink is not None:
        checks.sink(learnable_sink, heads, q.device)
    return _allocate(q, batch, seqlen_q, heads, head_dim_v)


def _allocate(q: torch.Tensor, batch: int, seqlen_q: int, heads: int, head_dim_v: int) -> Outputs:
    device = q.device
    out = torch.empty(batch, seqlen_q, heads, head_dim_v, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=device)
    return out, lse


def problem(
    dtype: int,
    dims: checks.Dims,
    strides: tuple[Strides, Strides, Strides],
    scalars: Scalars,
) -> tuple[Any, ...]:
    """What the library's functions take after the pointers, from checked arguments.

    Args:
        dtype: the code of `checks.DTYPE_CODES`.
        dims: of `checks.attention_dims`.
        strides: of q, k and v as `_layout` makes them.
        scalars: the operator's arguments after q, k and v.
    """
    _, seqlen_q, _, heads, _, _, head_dim_v = dims
    out_strides = (seqlen_q * heads * head_dim_v, heads * head_dim_v, head_dim_v)
    return dtype, *dims, *strides, out_strides, *library_scalars(scalars)


def library_scalars(scalars: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's scalars, whose last is sm_margin or deterministic, in the library's order."""
    softmax_scale, causal, window_left, window_right, softcap, last = scalars
    left, right = window(causal, window_left, window_right)
    return softmax_scale, softcap, causal, left, right, last


def window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """A window as the library takes it, in int32; causal masks end it at the row's position."""
    return min(left, checks.INT32_MAX), 0 if causal else min(right, checks.INT32_MAX)


def _public_raw_stream(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


def _public_empty(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# PyTorch's private ways to what the public ones give. The current stream takes 0.1 us in place of 1
# to 2. The current device comes without a look at whether CUDA runs, as there is a CUDA tensor.
# Memory comes from the same allocator, on the current device, but not through the dispatcher:
# TorchInductor's code allocates so, too.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _public_raw_stream
)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None),
    "_empty_strided_cuda",
    _public_empty,
)


def _workspace(device_index: int, stream: int) -> torch.Tensor:
    # Nothing is captured on the default stream, 0.
    if stream and torch.cuda.is_current_stream_capturing():
        # Of the graph's own: its replays may run beside later calls on this stream.
        return torch.zeros(
            _library.load().workspace_bytes(),
            dtype=torch.uint8,
            device=torch.device("cuda", device_index),
        )
    workspace = _workspaces.get((device_index, stream))
    if workspace is None:
        workspace = _lasting_workspace(_library.load().workspace_bytes(), device_index)
        _workspaces[device_index, stream] = workspace
    return workspace


def _lasting_workspace(num_bytes: int, device_index: int) -> torch.Tensor:
    # Memory pools (torch.cuda.use_mem_pool, the warm-up of torch.compile's CUDA graphs) catch what
    # their thread and stream allocate, and must not catch memory that outlives them: another thread
    # allocates it, on the default stream.
    def allocate() -> torch.Tensor:
        with torch.cuda.device(device_index), torch.cuda.stream(default_stream):
            return torch.zeros(
                num_bytes, dtype=torch.uint8, device=torch.device("cuda", device_index)
            )

    default_stream = torch.cuda.default_stream(device_index)
    with ThreadPoolExecutor(max_workers=1) as thread:
        workspace = thread.submit(allocate).result()
    torch.cuda.current_stream(device_index).wait_stream(default_stream)  # zeroed before it is used
    return workspace


for _name in _OPERATORS:
    _library_fragment.impl(_name, _forward_cuda, "CUDA")
    _library_fragment.impl(_name, _forward_cpu, "CPU")
    torch.library.register_fake(f"hopper_attention::{_name}", _forward_fake, lib=_library_fragment)

# What torch.compile traces, and autograd differentiates.
operator = torch.ops.hopper_attention.forward.default
# For eager calls that need no gradient: without one, and without OpOverload's Python, 0.2 us.
_inference = torch.ops.hopper_attention.forward.inference
forward: Callable[..., Outputs] = getattr(_inference, "_op", _inference)


def without_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sm_margin: int,
    learnable_sink: torch.Tensor | None,
    deterministic: bool,
) -> Outputs:
    """The operator of all its arguments, in an eager call whose gradient is not its matter."""
    scalars = (window_left, window_right, softcap, sm_margin)
    if learnable_sink is not None:
        return forward(q, k, v, softmax_scale, causal, *scalars, learnable_sink)
    if scalars == DEFAULTS:
        return forward(q, k, v, softmax_scale, causal)
    return forward(q, k, v, softmax_scale, causal, *scalars)
