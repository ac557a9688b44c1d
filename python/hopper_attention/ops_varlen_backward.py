"""The gradient of packed batches: torch.ops.hopper_attention.backward_varlen.

The formulas, and the way from autograd to the kernels, are ops_backward.py's; this is what packed
batches have otherwise. The lengths stay on the device, so that the workspace has room for any of
them: beside what a dense batch takes, up to a tile for each sequence, and a list of key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import _autograd, checks, checks_varlen, ops, ops_backward, ops_varlen
from ._backward_calls import Gradients, Kind, launch, make_calls
from ._layout import packed_view
from .checks_varlen import Lengths

_library_fragment = torch.library.Library("hopper_attention", "FRAGMENT")
_SCHEMA = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_OPERATORS = ("backward_varlen", "backward_varlen.plain")  # as in ops_backward.py
for _name in _OPERATORS:
    _library_fragment.define(_name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

_PACKED = Kind(
    make_calls(Lengths._fields, Lengths._fields), {}, "prepare_varlen_backward", packed_view, True
)


def _backward_cuda(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    *scalars: Any,
) -> Gradients:
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    all_deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, dlse, q, k, v, out, lse, *lengths, *scalars)
    checks.no_tangent(*arguments)
    again: Gradients | None = _PACKED.calls.call(all_deterministic, *arguments)
    if again is not None:
        return again
    if q.get_device() != ops._current_device():
        with torch.cuda.device(q.device):
            return _backward_cuda(*arguments)
    dtype, dims = checks_varlen.request(q, k, v, lengths, (*scalars[:5], 0))
    ops_backward.check_results(dout, dlse, q, out, lse, (dims[1], dims[3], dims[6]))
    return launch(_PACKED, dtype, dims, (q, k, v, out, dout), lse, dlse, lengths, scalars)


def _backward_cpu(dout: torch.Tensor, dlse: Any, q: torch.Tensor, *_: Any) -> NoReturn:
    raise ValueError(
        f"dout, q, k, v and out must be on a CUDA device, got {q.device}; on the CPU, autograd "
        "passes through hopper_attention.reference.varlen_attention"
    )


def _backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    *scalars: Any,
) -> Gradients:
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    _, total_q, _, heads, _, head_dim, head_dim_v = checks_varlen.packed_dims(q, k, v, lengths)
    checks_varlen.limits(q.dtype, head_dim, head_dim_v)
    softmax_scale, _, window_left, window_right, softcap, _ = scalars
    checks.scalars(softmax_scale, window_left, window_right, softcap, 0)
    ops_backward.check_results(dout, dlse, q, out, lse, (total_q, heads, head_dim_v))
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *scalars, _, deterministic = inputs
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)  # None where there is none
    ops_backward.save(ctx, (q, k, v), output, lengths)
    ctx.operator = _backward
    ctx.scalars = (*scalars, deterministic)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * 11  # of lengths and scalars
    return *ops_backward.gradients(ctx, dout, dlse), *nothing


for _name in _OPERATORS:
    _library_fragment.impl(_name, _backward_cuda, "CUDA")
    _library_fragment.impl(_name, _backward_cpu, "CPU")
    torch.library.register_fake(f"hopper_attention::{_name}", _backward_fake, lib=_library_fragment)
torch.library.register_autograd(
    "hopper_attention::backward_varlen", ops_backward.differentiate_twice, lib=_library_fragment
)

_backward = ops_backward.operator_of("backward_varlen")
backward: Callable[..., Gradients] = _backward.default
# As ops_backward.py's.
formula = ops_backward.formula_of("forward_varlen", _backward, _PACKED)
differentiable: Callable[..., ops.Outputs] = _autograd.register(
    "forward_varlen", _differentiate, _save, _library_fragment, ops_varlen.without_gradient
)
