"""The gradient of `torch.ops.hopper_attention.forward`, as an operator of its own.

`backward` takes what the forward pass read and wrote, allocates the gradients and a workspace, and
returns without waiting for the device. It is registered as the forward operator's formula, so that
autograd, torch.compile, activation checkpointing and CUDA graphs go through it alike.

With P = exp(S - LSE) recomputed from q and k, where S are the scores as masked and capped:

    dV = P^T dO        dP = dO V^T        delta = rowsum(dO * O)
    dS = P * (dP - delta + dLSE), times the soft cap's derivative 1 - (S / softcap)^2
    dQ = softmax_scale * dS K             dK = softmax_scale * dS^T Q

as in Dao, "FlashAttention-2" (arXiv:2307.08691), algorithm 2. Beside the gradients it needs dQ in
float32, two numbers for each query of each head and, where it is deterministic, a counter for each
block of queries.

LSE holds the sink t of its head, so that nothing changes with one; and as dO / dt = -p O and
dLSE / dt = p with p = exp(t - LSE), the sink's own gradient, of `backward.sink`, is

    dt = -sum over the head's rows of p * (delta - dLSE)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from . import _autograd, _library, checks, ops
from ._layout import kernel_view

Gradients = tuple[torch.Tensor, ...]  # dq, dk, dv, and dsink where there is a sink
# softmax_scale, causal, window_left, window_right, softcap, deterministic
Scalars = tuple[float, bool, int, int, float, bool]

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_SCHEMA = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "{}float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv{})"
)
# The second also gives the sink's gradient.
_OPERATORS = {
    "backward": ("", ""),
    "backward.sink": ("Tensor learnable_sink, ", ", Tensor dsink"),
}
for _name, _sink in _OPERATORS.items():
    _library_fragment.define(_name + _SCHEMA.format(*_sink), tags=(torch.Tag.pt2_compliant_tag,))


_SINK = 9  # its place among forward's arguments


class Plan(NamedTuple):
    """What is settled of a call; the rest are addresses.

    Attributes:
        run: enqueues the kernels: run(q, k, v, out, dout, lse, dlse, dq, dk, dv, workspace,
            stream, sink, dsink), all integers; dlse, sink and dsink are 0 where there is none.
        workspace: shape, strides and dtype of the workspace.
        gradients: likewise of dq, dk and dv.
    """

    run: Callable[..., None]
    workspace: ops.Layout
    gradients: tuple[ops.Layout, ops.Layout, ops.Layout]


_plans: dict[tuple[Any, ...], Plan] = {}  # as ops.py's


def _backward_cuda(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> Gradients:
    device_index = q.get_device()
    if device_index != ops._current_device():
        with torch.cuda.device(q.device):
            return _backward_cuda(dout, dlse, q, k, v, out, lse, *rest)
    sink, scalars = _split(rest)
    dtype, dims = _check(dout, dlse, q, k, v, out, lse, scalars)
    sink = None if sink is None else ops.sink_in_place(sink, q)
    dsink = None if sink is None else ops._empty((dims[3],), (1,), torch.float32)
    of_sink = (0, 0) if sink is None or dsink is None else (sink.data_ptr(), dsink.data_ptr())
    tensors = (q, k, v, out, dout)
    kind = Kind(_plans, "prepare_backward", kernel_view, dims[:1])
    found = launch(kind, dtype, dims, tensors, lse, dlse, scalars, of_sink)
    return found if dsink is None else (*found, dsink)


class Kind(NamedTuple):
    """What dense and packed batches have apart.

    Attributes:
        plans: where their plans are kept.
        prepare: the library's function that makes a call.
        view: `kernel_view`, or that of tensors without a batch dimension.
        lead: the gradients' dimensions before rows, heads and columns: (batch,) or none.
    """

    plans: dict[tuple[Any, ...], Plan]
    prepare: str
    view: Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, ...]]]
    lead: tuple[int, ...]


def launch(
    kind: Kind,
    dtype: int,
    dims: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    scalars: Scalars,
    more: tuple[int, ...],
) -> Gradients:
    """Allocates dq, dk and dv and enqueues the kernels on the current device.

    Args:
        kind: dense or packed.
        dtype: the library's number of it.
        dims: batch, rows of q, rows of k, heads, heads_kv, head_dim, head_dim_v.
        tensors: q, k, v, out and dout, which passed the checks.
        lse: the log-sum-exp.
        dlse: its gradient, or None.
        scalars: the operator's.
        more: the addresses that the call takes behind the stream.

    Returns:
        dq, dk and dv.
    """
    deterministic = scalars[5] or torch.are_deterministic_algorithms_enabled()
    # Named, as they must outlive the call: some may be copies.
    views = [kind.view(x) for x in tensors]
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    key = (dtype, dims, tuple(strides for _, strides in views), scalars[:5], deterministic)
    run, workspace_layout, layouts = kind.plans.get(key) or _make_plan(kind, key)
    dq, dk, dv = ops._empty(*layouts[0]), ops._empty(*layouts[1]), ops._empty(*layouts[2])
    workspace = ops._empty(*workspace_layout)
    run(
        *(x.data_ptr() for x, _ in views),
        lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        workspace.data_ptr(),
        ops._raw_stream(lse.get_device()),
        *more,
    )
    return dq, dk, dv


def _make_plan(kind: Kind, key: tuple[Any, ...]) -> Plan:
    dtype, dims, strides, scalars, deterministic = key
    _, rows_q, rows_k, heads, heads_kv, head_dim, head_dim_v = dims
    torch_dtype = next(name for name, code in checks.DTYPE_CODES.items() if code == dtype)
    gradients = (
        ops._contiguous((*kind.lead, rows_q, heads, head_dim), torch_dtype),
        ops._contiguous((*kind.lead, rows_k, heads_kv, head_dim), torch_dtype),
        ops._contiguous((*kind.lead, rows_k, heads_kv, head_dim_v), torch_dtype),
    )
    run, workspace_bytes = getattr(_library.load(), kind.prepare)(
        dtype,
        *dims,
        (*strides, *(strides[:-1] for _, strides, _ in gradients)),
        *ops.library_scalars((*scalars, deterministic)),
    )
    plan = Plan(run, ops._contiguous((workspace_bytes,), torch.uint8), gradients)
    ops.remember(kind.plans, key, plan)
    return plan


def _backward_cpu(dout: torch.Tensor, dlse: Any, q: torch.Tensor, *_: Any) -> NoReturn:
    raise ValueError(
        f"dout, q, k, v and out must be on a CUDA device, got {q.device}; on the CPU, autograd "
        "passes through hopper_attention.reference.attention"
    )


def _backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> Gradients:
    sink, scalars = _split(rest)
    batch, seqlen_q, _, heads, _, head_dim, head_dim_v = checks.attention_dims(q, k, v)
    checks.kernel_limits(q.dtype, head_dim, head_dim_v)
    softmax_scale, _, window_left, window_right, softcap, _ = scalars
    checks.scalars(softmax_scale, window_left, window_right, softcap, 0)
    check_results(dout, dlse, q, out, lse, (batch, seqlen_q, heads, head_dim_v))
    # Not new_empty of the tensors' strides: the gradients are contiguous whatever the inputs were.
    if sink is not None:
        checks.sink(sink, heads, q.device)
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _split(rest: tuple[Any, ...]) -> tuple[torch.Tensor | None, tuple[Any, ...]]:
    """The sink, of the operator that has one, and the scalars."""
    return (rest[0], rest[1:]) if isinstance(rest[0], torch.Tensor) else (None, rest)


def _check(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scalars: tuple[Any, ...],
) -> tuple[int, checks.Dims]:
    """Checks a call; returns the dtype's code and the dimensions, as `checks.request` does."""
    softmax_scale, causal, window_left, window_right, softcap, _ = scalars
    dtype, dims = checks.request(
        q, k, v, (softmax_scale, causal, window_left, window_right, softcap, 0)
    )
    check_results(dout, dlse, q, out, lse, (dims[0], dims[1], dims[3], dims[6]))
    return dtype, dims


def check_results(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    shape: tuple[int, ...],
) -> None:
    """Checks the forward pass's results and their gradients.

    Args:
        dout: shape, in q's dtype.
        dlse: lse's shape, float32; or None.
        q: whose dtype and device are meant.
        out: as dout.
        lse: (batch, heads, seqlen_q), float32; without batch where shape has none.
        shape: (batch, seqlen_q, heads, head_dim_v), or of a packed batch (total_q, heads,
            head_dim_v).

    Raises:
        ValueError: a shape or device is not as it should be.
        TypeError: a dtype is not.
    """
    *batch, seqlen_q, heads, _ = shape
    rows = (*batch, heads, seqlen_q)
    _check_tensor("out", out, shape, q.dtype, q)
    _check_tensor("dout", dout, shape, q.dtype, q)
    _check_tensor("lse", lse, rows, torch.float32, q)
    if dlse is not None:
        _check_tensor("dlse", dlse, rows, torch.float32, q)


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, q: torch.Tensor
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
    q, k, v, *scalars, _, sink, deterministic = inputs
    # The dispatcher leaves out what is as by default, so without a sink there may be no such place.
    wanted = sink is not None and ctx.needs_input_grad[_SINK]
    save(ctx, (q, k, v), output, (sink,) if wanted else ())
    ctx.operator = backward_sink if wanted else backward
    ctx.scalars = (*scalars, deterministic)


def save(
    ctx: Any,
    qkv: tuple[torch.Tensor, ...],
    output: ops.Outputs,
    more: tuple[torch.Tensor | None, ...] = (),
) -> None:
    """Keeps what `gradients` reads.

    Args:
        ctx: autograd's.
        qkv: q, k and v in 16 bits.
        output: out and the log-sum-exp.
        more: what the backward operator takes behind these: the sink whose gradient is asked for,
            or a packed batch's lengths.
    """
    ctx.save_for_backward(*qkv, *output, *more)
    ctx.set_materialize_grads(False)  # so that an unused LSE has no gradient, not one of zeros


def gradients(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """What ctx.operator gives, a backward operator, from what `save` kept and ctx.scalars.

    None for dq, dk and dv where nothing depends on them.
    """
    if dout is None and dlse is None:
        return None, None, None
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out no second time
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    arguments = (dout, dlse, *saved, *ctx.scalars)
    operator: Callable[..., Gradients] = ctx.operator
    if torch.is_grad_enabled():  # create_graph=True; the operator's own formula says what is wrong
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # without a formula, 3.5 us
        return operator(*arguments)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, *dsink = gradients(ctx, dout, dlse)
    return dq, dk, dv, *(None,) * 6, dsink[0] if dsink else None, None


def differentiate_twice(ctx: Any, *gradients: Any) -> NoReturn:
    """The backward operators' own formula: there is none."""
    raise NotImplementedError(
        "attention can be differentiated once: its backward pass has no gradient of its own "
        "(create_graph=True); hopper_attention.reference.attention can be differentiated twice"
    )


for _name in _OPERATORS:
    _library_fragment.impl(_name, _backward_cuda, "CUDA")
    _library_fragment.impl(_name, _backward_cpu, "CPU")
    torch.library.register_fake(f"hopper_attention::{_name}", _backward_fake, lib=_library_fragment)
    torch.library.register_autograd(
        f"hopper_attention::{_name}", differentiate_twice, lib=_library_fragment
    )
_autograd.register("forward", _differentiate, _save, _library_fragment)

backward: Callable[..., Gradients] = torch.ops.hopper_attention.backward.default
backward_sink: Callable[..., Gradients] = torch.ops.hopper_attention.backward.sink
