"""A library that stands in for the compiled one in tests of the e4m3 interfaces.

It reads tensors and scales by address and strides, as the kernels do, and computes with the float64
reference: wrong pointers or strides give wrong results.
"""

import inspect
import json

import torch
from gradient_formulas import at

import hopper_attention
from hopper_attention import _library, ops, ops_fp8, reference
from hopper_attention.v_layout import untranspose_v

FP8 = torch.float8_e4m3fn
STREAM = 4711
INTS = [
    *("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"),
    *("causal", "window_left", "window_right", "sm_margin", "out_dtype", "accumulation"),
    *("v_transposed", "q_descale_tokens", "k_descale_tokens", "q_descale_per_kv"),
]
POINTERS = ["q", "k", "v", "q_descale", "k_descale", "v_descale", "v_token_factor", "out", "lse"]
POINTERS += ["workspace", "stream", "sink"]


class FakeLibrary:
    """The forward pass that bindings_fp8.cpp describes."""

    def __init__(self):
        self.calls = []
        self.pointers = []
        self.prepared = 0

    def call_table(self, *memory):
        """None, as where PyTorch cannot show the library its tensors."""

    def prepare_fp8(self, longs, ints, softmax_scale, softcap):
        assert len(longs) == 21
        self.prepared += 1
        return lambda *pointers: self.forward(pointers, longs, ints, softmax_scale, softcap)

    def forward(self, pointers, longs, ints, softmax_scale, softcap):
        p = dict(zip(POINTERS, pointers, strict=True))
        n = dict(zip(INTS, ints, strict=True))
        assert p.pop("stream") == STREAM
        self.pointers.append(p)
        self.calls.append(n | {"softmax_scale": softmax_scale, "softcap": softcap, "longs": longs})
        q, k, v, out = self.tensors(p, n, longs)
        window = (n["window_left"], n["window_right"])
        sink = at(p["sink"], (n["heads"],), (1,), torch.float32) if p["sink"] else None
        exact, lse = reference.attention(
            q, k, v, softmax_scale, bool(n["causal"]), window, softcap, sink
        )
        out.copy_(exact)
        at(p["lse"], (lse.numel(),), (1,), torch.float32).copy_(lse.flatten())

    def tensors(self, p, n, longs):
        """Q, K and V dequantized, and the output."""
        batch, heads, heads_kv = n["batch"], n["heads"], n["heads_kv"]
        q_shape = (batch, n["seqlen_q"], heads, n["head_dim"])
        k_shape = (batch, n["seqlen_k"], heads_kv, n["head_dim"])
        for name, address in p.items():
            assert address % (16 if name in "qkv" or name == "out" else 4) == 0
        assert all(stride % 16 == 0 for stride in longs[:9])
        q = at(p["q"], q_shape, (*longs[0:3], 1), FP8).double()
        k = at(p["k"], k_shape, (*longs[3:6], 1), FP8).double()
        padded = -(-n["seqlen_k"] // 128) * 128
        if n["v_transposed"]:
            strides = (longs[6], longs[8], longs[7], 1)
            v = at(p["v"], (batch, heads_kv, n["head_dim_v"], padded), strides, FP8).double()
            v = untranspose_v(v, n["seqlen_k"])
        else:
            v_shape = (*k_shape[:3], n["head_dim_v"])
            v = at(p["v"], v_shape, (*longs[6:9], 1), FP8).double()
        q_heads = heads_kv if n["q_descale_per_kv"] else heads
        q_scale = self.scale(p, "q", longs[12:14], batch, q_heads, n["seqlen_q"], n)
        q_scale = q_scale.repeat_interleave(heads // q_heads, 1)
        k_scale = self.scale(p, "k", longs[14:16], batch, heads_kv, n["seqlen_k"], n)
        v_scale = torch.ones(batch, heads_kv, 1)
        if p["v_descale"]:
            channels = n["head_dim_v"] if longs[18] else 1
            shape = (batch, heads_kv, channels)
            v_scale = at(p["v_descale"], shape, longs[16:19], torch.float32)
        v = v * v_scale[:, None]
        if p["v_token_factor"]:
            shape = (batch, heads_kv, n["seqlen_k"])
            factor = at(p["v_token_factor"], shape, (*longs[19:21], 1), torch.float32)
            v = v * factor.transpose(1, 2)[..., None]
        out_shape = (batch, n["seqlen_q"], heads, n["head_dim_v"])
        out_dtype = [torch.float16, torch.bfloat16][n["out_dtype"]]
        out = at(p["out"], out_shape, (*longs[9:12], 1), out_dtype)
        return (
            q * q_scale.transpose(1, 2)[..., None],
            k * k_scale.transpose(1, 2)[..., None],
            v,
            out,
        )

    def scale(self, p, name, strides, batch, heads, seqlen, n):
        """(batch, heads, seqlen)"""
        if not p[f"{name}_descale"]:
            return torch.ones(batch, heads, seqlen)
        tokens = n[f"{name}_descale_tokens"] or max(1, seqlen)
        shape = (batch, heads, -(-seqlen // tokens))
        scale = at(p[f"{name}_descale"], shape, (*strides, 1), torch.float32)
        return scale.repeat_interleave(tokens, 2)[..., :seqlen]

    def explain_forward_fp8(self, longs, ints, softmax_scale, softcap):
        n = dict(zip(INTS, ints, strict=True))
        keys = [*inspect.signature(hopper_attention.Explanation).parameters]
        answer = dict.fromkeys(keys[:-1], 0)
        return json.dumps(answer | {"instance": f"e4m3_{n['v_transposed']}", "reason": str(longs)})


def install(monkeypatch):
    """A stand-in library, and CPU tensors that go the way of CUDA ones to it."""
    fake = FakeLibrary()
    workspace = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(_library, "_module", fake)
    monkeypatch.setattr(ops_fp8, "forward_fp8", ops_fp8._forward_cuda)
    monkeypatch.setattr(ops_fp8, "_plans", {})
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: STREAM)
    monkeypatch.setattr(ops, "_workspace", lambda *arguments: workspace)
    return fake


def random_qkv(
    batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=32, d_v=None, dtype=torch.bfloat16
):
    return (
        torch.randn(batch, seqlen_q, heads, d).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, d).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, d if d_v is None else d_v).to(dtype),
    )


def assert_attends(quantized, out, lse, **arguments):
    q, k, v = quantized.dequantize(torch.float64)
    exact, exact_lse = reference.attention(q, k, v, **arguments)
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
