"""The gradient of `torch.ops.hopper_attention.forward`, as an operator of its own.

`backward` takes what the forward pass read and wrote, allocates the gradients and a workspace, and
returns without waiting for the device. It is registered as the forward operator's formula, so that
autograd, torch.compile and CUDA graphs go through it alike.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import _library, checks, ops
from ._layout import kernel_view

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

ops._library_fragment.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _backward_cuda(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
) -> Gradients:
    scalars = (softmax_scale, causal, window_left, window_right, softcap)
    device_index = q.get_device()
    if device_index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return _backward_cuda(dout, dlse, q, k, v, out, lse, *scalars, deterministic)
    dtype, dims = _check(dout, dlse, q, k, v, out, lse, scalars)
    library = _library.load()
    gradients = dq, dk, dv = _allocate(q, k, v)
    problem = (
        dtype,
        *dims,
        softmax_scale,
        softcap,
        causal,
        min(window_left, checks.INT32_MAX),
        0 if causal else min(window_right, checks.INT32_MAX),
        deterministic,
    )
    workspace = torch.empty(
        library.backward_workspace_bytes(*problem), dtype=torch.uint8, device=q.device
    )
    views = [kernel_view(x) for x in (q, k, v, out, dout, dq, dk, dv)]
    # They must outlive the call: kernel_view may have copied.
    tensors = [tensor for tensor, _ in views]
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    library.backward(
        (
            *(tensor.data_ptr() for tensor in tensors[:5]),
            lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(),
            *(tensor.data_ptr() for tensor in tensors[5:]),
            workspace.data_ptr(),
            ops._raw_stream(device_index),
        ),
        [strides for _, strides in views],
        *problem,
    )
    return gradients


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
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
) -> Gradients:
    scalars = (softmax_scale, causal, window_left, window_right, softcap)
    _check(dout, dlse, q, k, v, out, lse, scalars)
    return _allocate(q, k, v)


def _allocate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _check(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scalars: tuple[float, bool, int, int, float],
) -> tuple[int, checks.Dims]:
    """Checks a call; returns the dtype's code and the dimensions, as `checks.request` does."""
    dtype, dims = checks.request(q, k, v, (*scalars, 0))
    batch, seqlen_q, _, heads, _, _, head_dim_v = dims
    rows = (batch, seqlen_q, heads, head_dim_v)
    _check_tensor("out", out, rows, q.dtype, q.device)
    _check_tensor("dout", dout, rows, q.dtype, q.device)
    _check_tensor("lse", lse, (batch, heads, seqlen_q), torch.float32, q.device)
    if dlse is not None:
        _check_tensor("dlse", dlse, (batch, heads, seqlen_q), torch.float32, q.device)
    return dtype, dims


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device, {device}, got {tensor.device}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: ops.Outputs) -> None:
    q, k, v, softmax_scale, causal, window_left, window_right, softcap, _, deterministic = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.scalars = (softmax_scale, causal, window_left, window_right, softcap, deterministic)
    ctx.set_materialize_grads(False)  # so that an unused LSE has no gradient, not one of zeros


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    nothing = (None,) * 7
    if dout is None:
        if dlse is None:
            return None, None, None, *nothing
        dout = torch.zeros_like(out)
    return *backward(dout, dlse, q, k, v, out, lse, *ctx.scalars), *nothing


def _differentiate_twice(ctx: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError(
        "flash_attn_func can be differentiated once: its backward pass has no gradient of its own "
        "(create_graph=True); hopper_attention.reference.attention can be differentiated twice"
    )


ops._library_fragment.impl("backward", _backward_cuda, "CUDA")
ops._library_fragment.impl("backward", _backward_cpu, "CPU")
torch.library.register_fake("hopper_attention::backward", _backward_fake, lib=ops._library_fragment)
torch.library.register_autograd(
    "hopper_attention::forward", _differentiate, setup_context=_save, lib=ops._library_fragment
)
torch.library.register_autograd(
    "hopper_attention::backward", _differentiate_twice, lib=ops._library_fragment
)

backward = torch.ops.hopper_attention.backward.default
