"""The e4m3 interfaces: what they check, and what they pass to the library.

A library that stands in for the compiled one reads tensors and scales by address and strides, as
the kernels do, and computes with the float64 reference: wrong pointers or strides give wrong
results.
"""

import ctypes
import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import hopper_attention
from hopper_attention import _library, ops, ops_fp8, reference
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.v_layout import untranspose_v

FP8 = torch.float8_e4m3fn
STREAM = 4711
INTS = [
    *("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"),
    *("causal", "window_left", "window_right", "sm_margin", "out_dtype", "accumulation"),
    *("v_transposed", "q_descale_tokens", "k_descale_tokens", "q_descale_per_kv"),
]
POINTERS = ["q", "k", "v", "out", "lse", "q_descale", "k_descale", "v_descale", "v_token_factor"]
POINTERS += ["sink"]


def at(address, shape, strides, dtype):
    """The tensor of this shape at an address."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    size = torch.empty((), dtype=dtype).element_size()
    memory = (ctypes.c_char * (extent * size)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class FakeLibrary:
    """The forward pass that bindings_fp8.cpp describes."""

    def __init__(self):
        self.calls = []

    def forward_fp8(self, pointers, longs, ints, softmax_scale, softcap, workspace, stream):
        p = dict(zip(POINTERS, pointers, strict=True))
        n = dict(zip(INTS, ints, strict=True))
        assert len(longs) == 21
        assert stream == STREAM
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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: STREAM)
    monkeypatch.setattr(ops, "_workspace", lambda *arguments: workspace)
    return fake


@pytest.fixture
def library(monkeypatch):
    return install(monkeypatch)


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


RECIPES = [
    *[Fp8Recipe(qk_scale=scale) for scale in ("tensor", "head", "block", "token")],
    *[Fp8Recipe(v_scale=scale) for scale in ("tensor", "head", "channel", "token")],
    *[Fp8Recipe(v_scale=scale, transpose_v=False) for scale in ("head", "channel", "token")],
    Fp8Recipe(smooth_k=True),
    Fp8Recipe(hadamard=False, accumulation="fast"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("lengths", [(6, 9), (130, 257), (1, 1), (128, 128), (129, 5)], ids=str)
def test_recipes_reach_the_library(library, lengths, recipe):
    q, k, v = random_qkv(seqlen_q=lengths[0], seqlen_k=lengths[1])
    k += 2
    quantized = hopper_attention.quantize(q, k, v, recipe)
    options = {"softmax_scale": 0.3, "causal": True, "window_size": (100, 5)}
    out, lse = hopper_attention.flash_attn_fp8_func(
        q, k, v, recipe, return_attn_probs=True, **options
    )
    assert out.dtype == q.dtype
    assert_attends(quantized, out, lse, **options)
    again = hopper_attention.flash_attn_fp8_func(quantized, return_attn_probs=True, **options)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    assert library.calls[0] == library.calls[1]
    assert library.calls[0]["accumulation"] == int(recipe.accumulation == "fast")


@pytest.mark.parametrize("d, d_v", [(72, 72), (40, 24), (8, 8), (192, 128), (256, 256)])
@pytest.mark.parametrize("transpose_v", [True, False])
def test_head_dims(library, d, d_v, transpose_v):
    q, k, v = random_qkv(d=d, d_v=d_v)
    recipe = Fp8Recipe(transpose_v=transpose_v)
    out, lse = hopper_attention.flash_attn_fp8_func(q, k, v, recipe, return_attn_probs=True)
    assert_attends(hopper_attention.quantize(q, k, v, recipe), out, lse)


def test_dtypes_of_the_output(library):
    q, k, v = random_qkv(dtype=torch.float16)
    assert hopper_attention.flash_attn_fp8_func(q, k, v).dtype == torch.float16
    bf16 = hopper_attention.flash_attn_fp8_func(q, k, v, out_dtype=torch.bfloat16)
    assert bf16.dtype == torch.bfloat16
    quantized = hopper_attention.quantize(q, k, v)
    assert hopper_attention.flash_attn_fp8_func(quantized).dtype == torch.bfloat16
    assert [call["out_dtype"] for call in library.calls] == [0, 1, 1]
    with pytest.raises(TypeError, match=r"out_dtype must be torch.bfloat16 or torch.float16"):
        hopper_attention.flash_attn_fp8_func(quantized, out_dtype=torch.float32)


def test_fa3_callers(library):
    # Scales as vLLM passes them: one number, expanded
    q, k, v = (x.to(FP8) for x in random_qkv(d=64))
    scales = {
        f"{name}_descale": torch.tensor(value).expand(2, 2)
        for name, value in (("q", 0.5), ("k", 2.0), ("v", 3.0))
    }
    out, lse = hopper_attention.flash_attn_func(q, k, v, return_attn_probs=True, **scales)
    assert out.dtype == torch.bfloat16
    exact = reference.attention(q.double() * 0.5, k.double() * 2, v.double() * 3)
    torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)
    q_descale = torch.rand(2, 2) + 0.5
    out = hopper_attention.flash_attn_func(q, k, v, q_descale=q_descale, causal=True)
    per_head = q_descale.repeat_interleave(2, 1)[:, None, :, None]
    exact = reference.attention(q.double() * per_head, k.double(), v.double(), causal=True)
    torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-5)


def test_fa3_callers_packed_qkv(library):
    qkv = torch.randn(2, 6, 3, 4, 32).to(FP8)
    scale = torch.full((2, 4), 0.25)
    out = hopper_attention.flash_attn_qkvpacked_func(qkv, v_descale=scale)
    q, k, v = (x.double() for x in qkv.unbind(2))
    exact = reference.attention(q, k, v * 0.25)[0]
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-5)


def test_learnable_sink(library):
    q, k, v = e4m3_qkv()
    sink = torch.tensor([-2.0, 0.5, 4.0, -torch.inf, 9.0])[:4]
    out, lse = hopper_attention.flash_attn_func(
        q, k, v, causal=True, return_attn_probs=True, learnable_sink=sink
    )
    exact = reference.attention(
        q.double(), k.double(), v.double(), causal=True, learnable_sink=sink
    )
    torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"learnable_sink must have shape .*\(4,\), got \(3,\)"):
        hopper_attention.flash_attn_func(q, k, v, learnable_sink=sink[:3])
    with pytest.raises(NotImplementedError, match="may require grad"):
        hopper_attention.flash_attn_func(q, k, v, learnable_sink=sink.requires_grad_())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_strides_and_granularities(data):
    draw = data.draw
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        batch, heads_kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        heads = heads_kv * draw(st.integers(1, 3))
        seqlen_q, seqlen_k = draw(st.integers(1, 140)), draw(st.integers(1, 140))
        d = 8 * draw(st.integers(1, 6))

        def tensor(seqlen, num_heads):
            extra = [draw(st.integers(0, 2)) for _ in range(2)]
            width = draw(st.sampled_from([d, d + 1, -(-d // 16) * 16]))
            base = torch.randn(batch, seqlen + extra[0], num_heads + extra[1], width).to(FP8)
            view = base[:, extra[0] :, extra[1] :, :d]
            if draw(st.booleans()):
                view = view.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(FP8)
            return view

        def scale(num_heads, counts):
            n = draw(st.sampled_from(counts))
            if n is None:
                return None
            x = torch.rand(batch, num_heads, n) + 0.5
            return x.transpose(1, 2).contiguous().transpose(1, 2) if draw(st.booleans()) else x

        q, k, v = tensor(seqlen_q, heads), tensor(seqlen_k, heads_kv), tensor(seqlen_k, heads_kv)
        q_scale = scale(heads, [None, 1, -(-seqlen_q // 128), seqlen_q])
        k_scale = scale(heads_kv, [None, 1, -(-seqlen_k // 128), seqlen_k])
        v_scale = scale(heads_kv, [None, 1, d])
        factor = scale(heads_kv, [None, seqlen_k])
        out, lse = ops_fp8.forward_fp8(
            *(q, k, v, q_scale, k_scale, v_scale, factor, None, torch.bfloat16, False, False),
            *(0.2, False, -1, -1, 0.0, 0),
        )

        def per_token(x, seqlen):
            if x is None:
                return 1.0
            n = x.shape[2]
            repeat = seqlen if n == 1 else 1 if n == seqlen else 128
            return x.repeat_interleave(repeat, 2)[..., :seqlen].transpose(1, 2)[..., None]

        v_exact = v.double() * (1.0 if v_scale is None else v_scale[:, None])
        exact = reference.attention(
            q.double() * per_token(q_scale, seqlen_q),
            k.double() * per_token(k_scale, seqlen_k),
            v_exact * per_token(factor, seqlen_k),
            0.2,
        )
        torch.testing.assert_close(out.double(), exact[0], rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)


def e4m3_qkv(**sizes):
    return tuple(x.to(FP8) for x in random_qkv(**sizes))


def call_operator(q, k, v, *scales, transposed=False, out_dtype=torch.bfloat16, scalars=None):
    scales = (*scales, *[None] * (4 - len(scales)))
    scalars = scalars or (0.2, False, -1, -1, 0.0, 0)
    return ops_fp8.forward_fp8(q, k, v, *scales, None, out_dtype, transposed, False, *scalars)


@pytest.mark.parametrize(
    "scales, error, message",
    [
        ((torch.ones(2, 4),), ValueError, r"q_descale must be \(batch, heads_kv\), \(2, 2\), or"),
        ((torch.ones(2, 4, 3),), ValueError, "n 1, 2 .* or 200"),
        ((torch.ones(2, 4, 1).double(),), TypeError, "q_descale must be torch.float32, got"),
        ((None, torch.ones(2, 4, 1)), ValueError, "k_descale must be"),
        ((None, None, torch.ones(2, 2, 31)), ValueError, r"v_descale .* n 1 or 32 \(channels\)"),
        ((None, None, None, torch.ones(2, 2, 8)), ValueError, "v_token_factor must be"),
    ],
)
def test_wrong_scales(library, scales, error, message):
    with pytest.raises(error, match=message):
        call_operator(*e4m3_qkv(seqlen_q=200), *scales)


def test_wrong_tensors(library):
    q, k, v = e4m3_qkv()
    with pytest.raises(TypeError, match=r"v must be torch.float8_e4m3fn, got torch.bfloat16"):
        call_operator(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"v must be \(batch, heads_kv, head_dim_v, seqlen_k rou"):
        call_operator(q, k, v, transposed=True)
    with pytest.raises(ValueError, match="softcap must be 0"):
        call_operator(q, k, v, scalars=(0.2, False, -1, -1, -1.0, 0))
    with pytest.raises(ValueError, match="head dimension of q and k must be a multiple of 8"):
        call_operator(*e4m3_qkv(d=12))


def test_wrong_calls(library):
    q, k, v = random_qkv()
    quantized = hopper_attention.quantize(q, k, v)
    attend = hopper_attention.flash_attn_fp8_func
    with pytest.raises(ValueError, match="recipe must be None where q is a Quantized"):
        attend(quantized, recipe=Fp8Recipe())
    with pytest.raises(ValueError, match="k must be None where q is a Quantized"):
        attend(quantized, k)
    with pytest.raises(TypeError, match=r"k and v must be torch.Tensor"):
        attend(q)
    with pytest.raises(TypeError, match="recipe must be an Fp8Recipe or None, got str"):
        attend(q, k, v, "block")
    with pytest.raises(ValueError, match="softcap must be 0 with smooth_k, got 3"):
        attend(q, k, v, Fp8Recipe(smooth_k=True), softcap=3.0)
    with pytest.raises(TypeError, match="causal must be True or False"):
        attend(q, k, v, causal=1)
    cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
    packed = hopper_attention.quantize(
        *(x.flatten(0, 1) for x in (q, q, q)), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    with pytest.raises(NotImplementedError, match="packed sequences in e4m3"):
        attend(packed)


def test_e4m3_tensors_have_no_gradient(library):
    q, k, v = random_qkv()
    quantized = hopper_attention.quantize(q, k, v)
    quantized.k.requires_grad_()
    with pytest.raises(NotImplementedError, match="e4m3fn tensors have no gradient"):
        hopper_attention.flash_attn_fp8_func(quantized)
    with pytest.raises(NotImplementedError, match="e4m3fn tensors have no gradient"):
        call_operator(quantized.q, quantized.k, quantized.v, transposed=True)
    with torch.no_grad():
        hopper_attention.flash_attn_fp8_func(quantized)
    q, k, v = (x.to(FP8) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="e4m3fn tensors have no gradient"):
        hopper_attention.flash_attn_func(q, k, v.requires_grad_())


def test_the_cpu_says_where_to_go():
    with pytest.raises(ValueError, match=r"must be on a CUDA device, got cpu; .*emulation_fp8"):
        hopper_attention.flash_attn_fp8_func(*random_qkv())


@pytest.mark.parametrize("transpose_v", [True, False])
def test_fake_tensors_have_the_outputs_shape(transpose_v):
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, seqlen, heads, 72, dtype=torch.bfloat16)
            for seqlen, heads in ((200, 4), (300, 2), (300, 2))
        )
        out, lse = hopper_attention.flash_attn_fp8_func(
            q, k, v, Fp8Recipe(transpose_v=transpose_v, smooth_k=True), return_attn_probs=True
        )
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == ((2, 4, 200), torch.float32)


def test_explain(library):
    q, k, v = random_qkv()
    assert hopper_attention.explain(*(x.to(FP8) for x in (q, k, v))).instance == "e4m3_0"
    answer = hopper_attention.explain(hopper_attention.quantize(q, k, v), causal=True)
    assert answer.instance == "e4m3_1"
    assert answer.copies == ()
    odd = torch.zeros(2, 9, 2, 33).to(FP8)[..., :32]
    answer = hopper_attention.explain(q.to(FP8), odd, odd, v_descale=torch.ones(2, 2))
    assert answer.copies[0].startswith("k: the stride of dimension")
    with pytest.raises(ValueError, match="v_descale must be"):
        hopper_attention.explain(q.to(FP8), k.to(FP8), v.to(FP8), v_descale=torch.ones(3, 2))


def test_signature():
    parameters = inspect.signature(hopper_attention.flash_attn_fp8_func).parameters
    assert list(parameters) == [
        *("q", "k", "v", "recipe", "softmax_scale", "causal", "window_size", "softcap"),
        *("sm_margin", "return_attn_probs", "out_dtype", "deterministic"),
    ]
