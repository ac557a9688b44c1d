"""The gradient of attention in FP8: the forward pass of e4m3, the backward pass of 16 bits."""

import pytest
import torch

import hopper_attention
from hopper_attention import Fp8Recipe, attention_fp8, reference


def random_qkv(batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16):
    return tuple(
        torch.randn(shape).bfloat16().requires_grad_()
        for shape in (
            (batch, seqlen_q, heads, d),
            (batch, seqlen_k, heads_kv, d),
            (batch, seqlen_k, heads_kv, d),
        )
    )


@pytest.fixture
def attended(gradient_library, monkeypatch):
    """Stands in for the e4m3 kernel: attention of what was quantized, kept with its results."""
    calls = []

    def attend(x, scalars, out_dtype, with_lse):
        assert with_lse
        scale, causal, *window, softcap, _ = scalars
        out, lse = reference.attention(*x.dequantize(), scale, causal, window, softcap)
        calls.append((x, out.to(out_dtype), lse.float()))
        return calls[-1][1:]

    monkeypatch.setattr(attention_fp8, "attend", attend)
    return calls


@pytest.mark.parametrize("recipe", [None, Fp8Recipe("token", "head", seed=7, smooth_k=True)])
def test_fp8_differentiates_straight_through(gradient_library, attended, recipe):
    q, k, v = random_qkv(d=32)
    arguments = {"causal": True, "window_size": (4, 0), "softmax_scale": 0.2}
    out, lse = hopper_attention.flash_attn_fp8_func(
        q, k, v, recipe, **arguments, deterministic=True, return_attn_probs=True
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    ((quantized, out_fp8, lse_fp8),) = attended
    assert quantized.recipe == (recipe or Fp8Recipe())
    assert torch.equal(out, out_fp8)
    (call,) = gradient_library.calls
    assert (call["q"], call["k"], call["v"]) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert (call["out"], call["lse"]) == (out.data_ptr(), lse.data_ptr())
    assert call["deterministic"]
    assert torch.equal(lse, lse_fp8)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outputs = reference.attention(*exact, **arguments)
    expected = torch.autograd.grad(outputs, exact, (dout.double(), dlse.double()))
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() < 0.15 * y.norm()  # e4m3 has 3 bits after the first


def test_fp8_without_gradients_goes_the_old_way(gradient_library, monkeypatch):
    q, k, v = random_qkv()
    monkeypatch.setattr(attention_fp8, "differentiable", None)
    monkeypatch.setattr(attention_fp8, "attend", lambda *_: (torch.ones(1), torch.zeros(1)))
    with torch.no_grad():
        assert hopper_attention.flash_attn_fp8_func(q, k, v).shape == (1,)


def test_fp8_output_of_another_dtype_has_no_gradient(gradient_library):
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match=r"out_dtype must be None or q's dtype, torch.bfloat16"):
        hopper_attention.flash_attn_fp8_func(q, k, v, out_dtype=torch.float16)


def test_fp8_shapes_of_the_gradient():
    q, k, v = (x.detach().to("meta").requires_grad_() for x in random_qkv(d=72))
    out, lse = hopper_attention.flash_attn_fp8_func(q, k, v, return_attn_probs=True)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (2, 4, 6))
    found = torch.autograd.grad((out.float().sum(), lse.sum()), (q, k, v))
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
