"""A library that stands in for the compiled one in tests of packed batches.

It reads and writes tensors by address and strides, as the kernels do, and computes with the float64
reference: wrong pointers or strides give wrong results.
"""

import contextlib
import dataclasses
import json
import warnings

import numpy as np
import torch
from gradient_formulas import at, formulas

import hopper_attention
from hopper_attention import _library, ops, ops_varlen, ops_varlen_backward, reference

ADDRESSES = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"]
ADDRESSES += ["out", "lse", "workspace", "stream"]
SIZES = ["batch", "total_q", "total_k", "heads", "heads_kv", "head_dim", "head_dim_v"]
STRIDES = ["q_strides", "k_strides", "v_strides", "out_strides"]
SCALARS = ["softmax_scale", "softcap", "causal", "window_left", "window_right", "sm_margin"]
BACKWARD_TENSORS = ["q", "k", "v", "out", "dout", "dq", "dk", "dv"]
BACKWARD_ADDRESSES = [*BACKWARD_TENSORS[:5], "lse", "dlse", *BACKWARD_TENSORS[5:], "workspace"]
BACKWARD_ADDRESSES += ["stream", *ADDRESSES[3:7]]
GRADIENTS = BACKWARD_TENSORS[5:]
BACKWARD_SCALARS = [*SCALARS[:-1], "deterministic"]
STREAM = 4711
WORKSPACE_BYTES = 640
ANSWER = {x.name: x.name for x in dataclasses.fields(hopper_attention.Explanation)}
del ANSWER["copies"]


def tensors_of(dtype, call, addresses, names):
    """The 16-bit tensors of a call, where its addresses and strides say."""
    assert addresses["stream"] == STREAM
    _, total_q, total_k, heads, heads_kv, d, d_v = (call[name] for name in SIZES)
    rows, keys = (total_q, heads), (total_k, heads_kv)
    shapes = {"q": (*rows, d), "k": (*keys, d), "v": (*keys, d_v), "out": (*rows, d_v)}
    tensors = {}
    for name in names:
        strides = call[f"{name}_strides"]
        assert addresses[name] % 16 == 0
        assert all(stride % 8 == 0 for stride in strides)
        shape = shapes[name.removeprefix("d")]
        tensors[name] = at(
            addresses[name], shape, (*strides, 1), (torch.float16, torch.bfloat16)[dtype]
        )
    return tensors


def lengths_of(call, addresses):
    """cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k."""
    batch = call["batch"]
    sizes = {"cu_seqlens": batch + 1, "seqused": batch}
    found = [(addresses[f"{name}_{x}"], size) for name, size in sizes.items() for x in "qk"]
    return [at(a, (size,), (1,), torch.int32) if a else None for a, size in found]


def options_of(call):
    """softmax_scale, causal, window_size, softcap."""
    window = (call["window_left"], call["window_right"])
    return call["softmax_scale"], call["causal"], window, call["softcap"]


class FakeLibrary:
    def __init__(self):
        self.calls = []
        self.asked = []

    def call_table(self, *memory):
        """None, as where PyTorch cannot show the library its tensors."""

    def prepare_varlen(self, dtype, *arguments):
        prepared = dict(zip([*SIZES, *STRIDES, *SCALARS], arguments, strict=True))
        self.asked.append(prepared | {"dtype": dtype})
        return lambda *addresses: self.forward(dtype, prepared, addresses), WORKSPACE_BYTES

    def explain_varlen(self, dtype, *arguments):
        prepared = dict(zip([*SIZES, *STRIDES, *SCALARS], arguments, strict=True))
        self.asked.append(prepared | {"dtype": dtype})
        return json.dumps(ANSWER)

    def forward(self, dtype, call, addresses):
        p = dict(zip(ADDRESSES, addresses, strict=True))
        self.calls.append(call | p)
        tensors = tensors_of(dtype, call, p, ("q", "k", "v", "out"))
        at(p["workspace"], (WORKSPACE_BYTES,), (1,), torch.uint8).fill_(255)
        exact, lse = reference.varlen_attention(
            *(tensors[name] for name in "qkv"), *lengths_of(call, p), *options_of(call)
        )
        tensors["out"].copy_(exact)
        at(p["lse"], lse.shape, (call["total_q"], 1), torch.float32).copy_(lse)

    def prepare_varlen_backward(self, dtype, *arguments):
        prepared = dict(zip([*SIZES, "strides", *BACKWARD_SCALARS], arguments, strict=True))
        strides = zip(BACKWARD_TENSORS, prepared.pop("strides"), strict=True)
        prepared |= {f"{name}_strides": x for name, x in strides}
        self.asked.append(prepared | {"dtype": dtype})
        return lambda *addresses: self.backward(dtype, prepared, addresses), WORKSPACE_BYTES

    def backward(self, dtype, call, addresses):
        p = dict(zip(BACKWARD_ADDRESSES, addresses, strict=True))
        self.calls.append(call | p)
        tensors = tensors_of(dtype, call, p, BACKWARD_TENSORS)
        at(p["workspace"], (WORKSPACE_BYTES,), (1,), torch.uint8).fill_(255)
        rows = ((call["heads"], call["total_q"]), (call["total_q"], 1), torch.float32)
        lse, dlse = at(p["lse"], *rows), at(p["dlse"], *rows) if p["dlse"] else None
        cu_q, cu_k, used_q, used_k = lengths_of(call, p)
        for name in GRADIENTS:
            tensors[name].zero_()
        for i in range(call["batch"]):
            q_begin, q_end, k_begin, k_end = (int(x[j]) for x in (cu_q, cu_k) for j in (i, i + 1))
            q_end = q_end if used_q is None else q_begin + int(used_q[i])
            k_end = k_end if used_k is None else k_begin + int(used_k[i])
            of_rows, of_keys = slice(q_begin, q_end), slice(k_begin, k_end)
            parts = {n: x[None, of_keys if n[-1] in "kv" else of_rows] for n, x in tensors.items()}
            statistics = [x if x is None else x[None, :, of_rows] for x in (lse, dlse)]
            found = formulas(*(parts[n] for n in ("q", "k", "v", "out", "dout")), *statistics, call)
            for name, gradient in zip(GRADIENTS, found, strict=True):
                parts[name].copy_(gradient)


def install_library(monkeypatch):
    """A stand-in library, and CPU tensors that go the way of CUDA ones to it."""
    fake = FakeLibrary()
    monkeypatch.setattr(_library, "_module", fake)
    monkeypatch.setattr(ops_varlen, "forward", ops_varlen._forward_cuda)
    monkeypatch.setattr(ops_varlen, "_plans", {})
    packed = ops_varlen_backward._PACKED._replace(plans={})
    monkeypatch.setattr(ops_varlen_backward, "_PACKED", packed)
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: STREAM)
    return fake


@contextlib.contextmanager
def operators_on_the_cpu():
    """The operators' kernels for CUDA serve CPU tensors, under all of PyTorch's machinery."""
    implementations = torch.library.Library("hopper_attention", "IMPL")
    functions = {
        "forward_varlen": ops_varlen._forward_cuda,
        "forward_varlen.inference": ops_varlen._forward_cuda,
        "backward_varlen": ops_varlen_backward._backward_cuda,
        "backward_varlen.plain": ops_varlen_backward._backward_cuda,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that others are overridden
        for name, function in functions.items():
            implementations.impl(name, function, "CPU", allow_override=True)
        yield
        implementations._destroy()


def cumulate(*lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


CU_Q, CU_K = cumulate(3, 0, 5, 2), cumulate(4, 6, 1, 2)


def random_qkv(total_q=12, total_k=13, heads=4, heads_kv=2, d=16, d_v=None, dtype=torch.bfloat16):
    return (
        torch.randn(total_q, heads, d).to(dtype),
        torch.randn(total_k, heads_kv, d).to(dtype),
        torch.randn(total_k, heads_kv, d if d_v is None else d_v).to(dtype),
    )
