"""Eager calls of the quantizer and of attention in e4m3, made again by the compiled module."""

import dataclasses

import pytest
import torch
from call_tables import STREAM, prepare_compiled
from fp8_library import FP8, assert_attends, random_qkv
from fp8_library import FakeLibrary as AttentionLibrary
from gradient_formulas import at
from test_quantize import bits

import hopper_attention
from hopper_attention import (
    Fp8Recipe,
    attention_fp8,
    checks,
    checks_quantize,
    interface,
    ops_fp8,
    ops_quantize,
)

fp8_attend = hopper_attention.flash_attn_fp8_func
WORKSPACE_BYTES = 100
INTS = ["dtype", "batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"]
SCALES = {code: name for name, code in ops_quantize._SCALE_CODES.items()}
RECIPES = [
    Fp8Recipe(),
    Fp8Recipe("token", "token", hadamard=False, seed=3, accumulation="fast", transpose_v=False),
    Fp8Recipe("head", "head", smooth_k=True),
    Fp8Recipe("tensor", "token", smooth_k=True),
]
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


class Quantizer:
    """What bindings_quantize.cpp describes, of dense tensors without rotary embedding."""

    def __init__(self):
        self.addresses = []

    def prepare_quantize(self, packed, longs, ints, signs):
        assert not packed
        n = dict(zip(INTS, ints, strict=False))
        qk_scale, v_scale, hadamard, smooth_k, transpose_v = ints[8:13]
        seed = next(s for s in range(9) if not hadamard or self.has_signs(n, s, signs))
        rest = (SCALES[qk_scale], SCALES[v_scale], bool(hadamard), seed, bool(smooth_k))
        call = checks_quantize.Call.make(*[None] * 4, *rest, bool(transpose_v), False, None, 0)
        return lambda *addresses: self.run(n, longs, call, addresses), WORKSPACE_BYTES

    def has_signs(self, n, seed, signs):
        return ops_quantize._sign_bits(n["head_dim"], seed) == signs

    def run(self, n, longs, call, addresses):
        self.addresses.append(addresses)
        assert addresses[16] == STREAM
        dtype = next(x for x, code in checks.DTYPE_CODES.items() if code == n["dtype"])
        dims = tuple(n[name] for name in INTS[1:])
        batch, seqlen_q, seqlen_k, heads, heads_kv, d, d_v = dims
        shapes = (batch, seqlen_q, heads, d), (batch, seqlen_k, heads_kv, d)
        shapes = (*shapes, (*shapes[1][:3], d_v))
        q, k, v = (
            at(addresses[i], shapes[i], (*longs[3 * i : 3 * i + 3], 1), dtype) for i in range(3)
        )
        recipe = call.recipe
        fields = (recipe.qk_scale, recipe.v_scale, recipe.hadamard, recipe.seed, recipe.smooth_k)
        parts = ops_quantize._quantize_cpu(
            q, k, v, *[None] * 4, *fields, recipe.transpose_v, False, None, 0
        )
        for address, part in zip(addresses[7:15], parts, strict=True):
            assert address or not part.numel()
            if part.numel():
                at(address, part.shape, part.contiguous().stride(), part.dtype).copy_(part)
        at(addresses[15], (WORKSPACE_BYTES,), (1,), torch.uint8).fill_(255)


@pytest.fixture
def library(compiled_library, calls_module, monkeypatch):
    fakes = {"prepare_fp8": AttentionLibrary(), "prepare_quantize": Quantizer()}
    for name, fake in fakes.items():
        monkeypatch.setattr(compiled_library, name, getattr(fake, name), raising=False)
        prepare_compiled(monkeypatch, calls_module, compiled_library, name)
    monkeypatch.setattr(ops_quantize, "_plans", {})
    monkeypatch.setattr(ops_quantize, "quantize", ops_quantize._quantize_cuda)
    monkeypatch.setattr(ops_fp8, "_plans", {})
    monkeypatch.setattr(ops_fp8, "forward_fp8", ops_fp8._forward_cuda)
    return fakes


@pytest.fixture
def no_long_way(monkeypatch):
    """Forbids the operators when it is called."""

    def forbid():
        monkeypatch.setattr(ops_quantize, "quantize", None)
        monkeypatch.setattr(ops_fp8, "forward_fp8", None)
        monkeypatch.setattr(attention_fp8, "differentiable", None)

    return forbid


def parts_of(quantized):
    fields = (getattr(quantized, field.name) for field in dataclasses.fields(quantized))
    return [x for x in fields if isinstance(x, torch.Tensor)]


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.equal(bits(x), bits(y))


@by_recipe
def test_the_quantizer_again(library, no_long_way, recipe):
    inputs = [random_qkv(d=32) for _ in range(3)]
    expected = [hopper_attention.quantize(*qkv, recipe) for qkv in inputs]
    # An equal recipe of one's own is the same.
    recipe = dataclasses.replace(recipe)
    hopper_attention.quantize(*inputs[0], recipe)
    no_long_way()
    for qkv, quantized in zip(inputs, expected, strict=True):
        found = hopper_attention.quantize(*qkv, recipe)
        assert found.recipe == recipe
        assert (found.v_token_factor is None) == (recipe.v_scale != "token")
        assert (found.k_mean is None) == (not recipe.smooth_k)
        assert_same_bits(parts_of(found), parts_of(quantized))
        assert len({x.untyped_storage().data_ptr() for x in parts_of(found)}) == len(
            parts_of(found)
        )


def test_another_recipe_is_another_call(library):
    qkv = random_qkv(d=32)
    for _ in range(3):
        for recipe in RECIPES:
            assert hopper_attention.quantize(*qkv, recipe).recipe == recipe
            assert_same_bits(
                parts_of(hopper_attention.quantize(*qkv, recipe)),
                parts_of(hopper_attention.quantize(*(x.clone() for x in qkv), recipe)),
            )


def test_rows_with_gaps_are_quantized_by_the_long_way(library):
    qkv = random_qkv(d=40)
    found = [hopper_attention.quantize(*qkv, Fp8Recipe(transpose_v=False)) for _ in range(3)]
    assert all(x.q.stride(-2) == 48 for x in found)


@by_recipe
@pytest.mark.parametrize("return_lse", [False, True])
def test_both_steps_again(library, no_long_way, recipe, return_lse):
    inputs = [random_qkv(d=32) for _ in range(3)]

    def run(qkv):
        found = fp8_attend(*qkv, recipe, causal=True, return_attn_probs=return_lse)
        return found if return_lse else (found,)

    expected = [run(qkv) for qkv in inputs]
    if not (return_lse and recipe.smooth_k):
        no_long_way()
        count = len(library["prepare_quantize"].addresses)
        for qkv, outputs in zip(inputs, expected, strict=True):
            assert_same_bits(run(qkv), outputs)
        assert len(library["prepare_quantize"].addresses) == count + len(inputs)


def test_both_steps_are_right(library):
    qkv = random_qkv(seqlen_q=150, seqlen_k=140, d=32)
    for _ in range(3):
        out, lse = fp8_attend(*qkv, return_attn_probs=True)
    assert_attends(hopper_attention.quantize(*qkv), out, lse)


@by_recipe
def test_a_quantized_again(library, no_long_way, recipe):
    quantized = hopper_attention.quantize(*random_qkv(d=32), recipe)
    expected = [fp8_attend(quantized, out_dtype=x) for x in (None, torch.float16)]
    no_long_way()
    found = [fp8_attend(quantized, out_dtype=x) for x in (None, torch.float16)]
    assert_same_bits(found, expected)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("arguments", [{}, {"window_size": (3, 1), "softcap": 2.0}])
def test_gradients_again(library, no_long_way, arguments):
    found = []
    inputs = [x.requires_grad_() for x in random_qkv(d=32)]
    for again in range(3):
        out = fp8_attend(*inputs, **arguments)
        found.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        assert_same_bits(found[-1], found[0])
        if not again:
            no_long_way()
    assert out.grad_fn.name() == "attention_fp8_formulaBackward"


def test_gradients_with_smooth_k_take_the_long_way(library):
    inputs = [x.requires_grad_() for x in random_qkv(d=32)]
    found = []
    for _ in range(3):
        out, lse = fp8_attend(*inputs, Fp8Recipe(smooth_k=True), return_attn_probs=True)
        found.append((out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        assert_same_bits(found[-1], found[0])
        fp8_attend(*(x.detach() for x in inputs), Fp8Recipe(smooth_k=True))


def test_what_was_refused_still_is(library):
    q, k, v = random_qkv(d=32)
    for _ in range(2):
        fp8_attend(q, k, v)
        hopper_attention.quantize(q, k, v)
    needing = q.detach().requires_grad_()
    fp8_attend(needing, k, v)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="gradient"):
            hopper_attention.quantize(needing, k, v)
        with pytest.raises(ValueError, match="out_dtype must be None or q's dtype"):
            fp8_attend(needing, k, v, out_dtype=torch.float16)
        with pytest.raises(TypeError, match="out_dtype"):
            fp8_attend(q, k, v, out_dtype=torch.float32)
        with pytest.raises(ValueError, match="softcap must be 0 with smooth_k"):
            fp8_attend(q, k, v, Fp8Recipe(smooth_k=True), softcap=1.0)
        with pytest.raises(TypeError, match="recipe must be"):
            fp8_attend(q, k, v, "block")


def test_e4m3_tensors_again(library, no_long_way):
    q, k, v = (x.to(FP8) for x in random_qkv(d=32))
    scales = torch.rand(3, 2, 2) + 0.5
    names = ("q_descale", "k_descale", "v_descale")
    attend = hopper_attention.flash_attn_func
    given = [dict(zip(names, scales, strict=True)), {}, {"k_descale": scales[0].mT.clone().mT}]
    expected = [attend(q, k, v, **x, return_attn_probs=True) for x in given]
    no_long_way()
    for arguments, outputs in zip(given, expected, strict=True):
        assert_same_bits(attend(q, k, v, **arguments, return_attn_probs=True), outputs)
    with pytest.raises(NotImplementedError, match="gradient"):
        attend(q, k, v.float().requires_grad_().to(FP8))


def test_scales_that_are_negative_by_a_bit_alone(library):
    q, k, v = (x.to(FP8) for x in random_qkv(d=32))
    scale = torch.rand(2, 2)
    imaginary = torch.complex(scale, -scale).conj().imag
    assert imaginary.is_neg()
    strided = torch.stack([scale, scale], -1)[..., 0]
    assert strided.stride() == imaginary.stride()
    seen = []
    for _ in range(2):
        hopper_attention.flash_attn_func(q, k, v, k_descale=strided)
    call = interface._eager.call
    for k_descale in (strided, imaginary):
        given = (q, k, v, None, False, None, None, k_descale, None, (-1, -1), 0, 0.0, 1, None)
        seen.append(call(*given, False, 0, None))
    assert isinstance(seen[0], tuple)
    assert seen[1] is None  # the dispatcher makes a positive one of it
