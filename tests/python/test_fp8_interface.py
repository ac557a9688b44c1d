"""The e4m3 interfaces: what they check, and what they pass to the library (fp8_library.py)."""

import inspect
from dataclasses import replace

import pytest
import torch
from fp8_library import FP8, assert_attends, install, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import hopper_attention
from hopper_attention import ops_fp8, reference
from hopper_attention.recipe import Fp8Recipe


@pytest.fixture
def library(monkeypatch):
    return install(monkeypatch)


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


def test_scales_have_no_derivative(library):
    q, k, v = random_qkv()
    quantized = hopper_attention.quantize(q, k, v)
    q, k, v = (x.to(FP8) for x in (q, k, v))

    def of_quantized(scale):
        return hopper_attention.flash_attn_fp8_func(replace(quantized, v_descale=scale))

    def of_e4m3(scale):
        return hopper_attention.flash_attn_func(q, k, v, k_descale=scale)

    def of_operator(scale):
        return call_operator(q, k, v, scale)

    ones = torch.ones(2, 2)
    for function, scale in (
        (of_quantized, quantized.v_descale),
        (of_e4m3, ones),
        (of_operator, ones),
    ):
        for _ in range(2):
            function(scale)
            with pytest.raises(NotImplementedError, match="e4m3fn tensors have no gradient"):
                function(scale.clone().requires_grad_())
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(scale, scale)
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    function(dual)
        if function is not of_operator:
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.func.jvp(function, (scale,), (scale,))


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
