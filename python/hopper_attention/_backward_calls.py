"""The backward operators' way to the library, which dense and packed batches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _library, checks, ops
from ._calls import CallTable

Gradients = tuple[torch.Tensor, ...]  # dq, dk, dv, and dsink where there is a sink
# softmax_scale, causal, window_left, window_right, softcap, deterministic
Scalars = tuple[float, bool, int, int, float, bool]


class Plan(NamedTuple):
    """What is settled of a call; the rest are addresses.

    Attributes:
        run: enqueues the kernels, from the addresses that `Kind.calls` says.
        outputs: shape, strides and dtype of each gradient, and of the workspace behind them.
    """

    run: Callable[..., None]
    outputs: tuple[ops.Layout, ...]


class Kind(NamedTuple):
    """What dense and packed batches, with and without a sink's gradient, have apart.

    Attributes:
        calls: calls that were made before.
        plans: plans, as ops.py's.
        prepare: the library's function that makes a call.
        view: `kernel_view`, or that of tensors without a batch dimension.
        packed: whether the gradients have no batch dimension.
        sink: whether the sink's gradient is computed.
    """

    calls: CallTable
    plans: dict[tuple[Any, ...], Plan]
    prepare: str
    view: Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, ...]]]
    packed: bool = False
    sink: bool = False


def make_calls(inputs: tuple[str, ...], more: tuple[str, ...], sink: bool = False) -> CallTable:
    """A table of backward calls.

    Args:
        inputs: the tensors that the operator takes behind lse.
        more: the addresses that the prepared calls take behind the stream.
        sink: whether there is dsink.

    Returns:
        A table whose `call` takes whether PyTorch asks for deterministic algorithms, and then the
        operator's arguments.
    """
    tensors = ("dout", "dlse", "q", "k", "v", "out", "lse", *inputs)
    scalars = (*ops.SCALAR_NAMES[:-1], "deterministic")
    return CallTable(
        ("all deterministic", *tensors, *scalars),
        ("dq", "dk", "dv", *(("dsink",) if sink else ()), "workspace"),
        (
            *("q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv", "workspace"),
            *("stream", *more),
        ),
        ops.memory,
    )


def launch(
    kind: Kind,
    dtype: int,
    dims: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    more: tuple[torch.Tensor | None, ...],
    scalars: Scalars,
) -> Gradients:
    """Allocates the gradients and enqueues the kernels on the current device.

    Args:
        kind: of the call.
        dtype: the library's number of it.
        dims: batch, rows of q, rows of k, heads, heads_kv, head_dim, head_dim_v.
        tensors: q, k, v, out and dout, which passed the checks.
        lse: the log-sum-exp.
        dlse: its gradient, or None.
        more: the tensors that the operator takes behind lse.
        scalars: the operator's.

    Returns:
        dq, dk and dv, and dsink where the kind has it.
    """
    all_deterministic = torch.are_deterministic_algorithms_enabled()
    views = [kind.view(x) for x in tensors]
    strides = tuple(strides for _, strides in views)
    key = (dtype, dims, strides, scalars[:5], scalars[5] or all_deterministic)
    run, layouts = kind.plans.get(key) or _make_plan(kind, key)
    q, k, v, out, dout = (x for x, _ in views)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    arguments = (all_deterministic, dout, dlse, q, k, v, out, lse, *more, *scalars)
    outputs = tuple(ops._empty(*layout) for layout in layouts)
    addresses = [
        *(x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in (*arguments, *outputs)),
        *(ops._raw_stream(lse.get_device()), 0, 0),
    ]
    run(*(addresses[place] for place in kind.calls.order))
    if q.numel() and k.numel():
        # Tensors that were copied are remembered as the copies, which need none.
        kind.calls.remember(arguments, run, layouts, len(outputs) - 1)
    return outputs[:-1]


def _make_plan(kind: Kind, key: tuple[Any, ...]) -> Plan:
    dtype, dims, strides, scalars, deterministic = key
    batch, rows_q, rows_k, heads, heads_kv, head_dim, head_dim_v = dims
    lead = () if kind.packed else (batch,)
    torch_dtype = next(name for name, code in checks.DTYPE_CODES.items() if code == dtype)
    gradients = (
        ops._contiguous((*lead, rows_q, heads, head_dim), torch_dtype),
        ops._contiguous((*lead, rows_k, heads_kv, head_dim), torch_dtype),
        ops._contiguous((*lead, rows_k, heads_kv, head_dim_v), torch_dtype),
    )
    run, workspace_bytes = getattr(_library.load(), kind.prepare)(
        dtype,
        *dims,
        (*strides, *(strides[:-1] for _, strides, _ in gradients)),
        *ops.library_scalars((*scalars, deterministic)),
    )
    dsink = (ops._contiguous((heads,), torch.float32),) if kind.sink else ()
    plan = Plan(run, (*gradients, *dsink, ops._contiguous((workspace_bytes,), torch.uint8)))
    ops.remember(kind.plans, key, plan)
    return plan
