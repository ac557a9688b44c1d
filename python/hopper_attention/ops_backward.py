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

from . import _autograd, checks, ops
from ._backward_calls import Gradients, Kind, launch, make_calls
from ._eager import Formula
from ._layout import kernel_view

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_SCHEMA = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "{}float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv{})"
)
# With a sink they also give its gradient. The plain ones are the others without a formula, whose
# Python would take 3.5 us also where no second gradient is asked for.
_SINK_SCHEMA = ("Tensor learnable_sink, ", ", Tensor dsink")
_OPERATORS = {
    "backward": ("", ""),
    "backward.sink": _SINK_SCHEMA,
    "backward.plain": ("", ""),
    "backward.plain_sink": _SINK_SCHEMA,
}
for _name, _sink in _OPERATORS.items():
    _library_fragment.define(_name + _SCHEMA.format(*_sink), tags=(torch.Tag.pt2_compliant_tag,))


_SINK = 9  # its place among forward's arguments


_DENSE = Kind(make_calls((), ("nothing", "nothing")), {}, "prepare_backward", kernel_view)
_WITH_SINK = Kind(
    make_calls(("learnable_sink",), ("learnable_sink", "dsink"), sink=True),
    *({}, "prepare_backward", kernel_view),
    sink=True,
)
_NUM_SCALARS = 6


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
    kind = _DENSE if len(rest) == _NUM_SCALARS else _WITH_SINK
    all_deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, dlse, q, k, v, out, lse, *rest)
    checks.no_tangent(*arguments)
    again: Gradients | None = kind.calls.call(all_deterministic, *arguments)
    if again is not None:
        return again
    if q.get_device() != ops._current_device():
        with torch.cuda.device(q.device):
            return _backward_cuda(*arguments)
    sink, scalars = _split(rest)
    dtype, dims = _check(dout, dlse, q, k, v, out, lse, scalars)
    more = () if sink is None else (ops.sink_in_place(sink, q),)
    return launch(kind, dtype, dims, (q, k, v, out, dout), lse, dlse, more, scalars)


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


class Operator(NamedTuple):
    """A backward operator.

    Attributes:
        name: with its namespace.
        default: the operator.
        plain: the same without a formula of its own.
    """

    name: str
    default: Callable[..., Gradients]
    plain: Callable[..., Gradients]


def operator_of(name: str, default: str = "default", plain: str = "plain") -> Operator:
    """An operator by its name and its overloads'."""
    overloads = getattr(torch.ops.hopper_attention, name)
    without = getattr(overloads, plain)
    return Operator(
        f"hopper_attention::{name}", getattr(overloads, default), getattr(without, "_op", without)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
    q, k, v, scale, causal, left, right, softcap, _, sink, deterministic = inputs
    if sink is not None and ctx.needs_input_grad[_SINK]:
        save(ctx, (q, k, v), output, (sink,))
        ctx.operator = _backward_sink
    else:
        save(ctx, (q, k, v), output)
        ctx.operator = _backward
    ctx.scalars = (scale, causal, left, right, softcap, deterministic)


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
    """What ctx.operator, an `Operator`, gives from what `save` kept and ctx.scalars.

    None for dq, dk and dv where nothing depends on them.
    """
    return gradients_of(ctx.operator, ctx, None, dout, dlse)


def gradients_of(
    operator: Operator,
    ctx: Any,
    saved: tuple[Any, ...] | None,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """As `gradients`, of this operator, and of the tensors that ctx saved where they were taken."""
    if dout is None and dlse is None:
        return None, None, None
    if saved is None:
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out no second time
    checks.no_tangent(dout, dlse, *saved)
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    arguments = (dout, dlse, *saved, *ctx.scalars)
    if torch.is_grad_enabled():  # create_graph=True; the operator's own formula says what is wrong
        return operator.default(*arguments)
    if not torch.compiler.is_compiling() and _autograd.is_plain(operator.name, dout, *saved[:3]):
        return operator.plain(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator.default(*arguments)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, *dsink = gradients(ctx, dout, dlse)
    return dq, dk, dv, None, None, None, None, None, None, dsink[0] if dsink else None, None


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
    if "plain" not in _name:
        torch.library.register_autograd(
            f"hopper_attention::{_name}", differentiate_twice, lib=_library_fragment
        )

_backward = operator_of("backward")
_backward_sink = operator_of("backward", "sink", "plain_sink")
backward: Callable[..., Gradients] = _backward.default
backward_sink: Callable[..., Gradients] = _backward_sink.default


def formula_of(name: str, operator: Operator, kind: Kind) -> Formula:
    """How calls that `_eager` makes get gradients by a backward operator without a sink.

    Args:
        name: of the forward operator.
        operator: the backward one.
        kind: its.
    """
    return Formula(
        name,
        operator.name,
        lambda: kind.calls,
        lambda *arguments: (*gradients_of(operator, *arguments), None),
    )


formula = formula_of("forward", _backward, _DENSE)
# Calls of the forward operator that want a gradient and are plain; see `_autograd.register`.
differentiable: Callable[..., ops.Outputs] = _autograd.register(
    "forward", _differentiate, _save, _library_fragment, ops.without_gradient
)
