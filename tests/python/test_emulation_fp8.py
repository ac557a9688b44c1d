"""The emulated FP8 forward: what it computes, how far off it is, and what it costs."""

import dataclasses
import itertools
import math
import time

import pytest
import torch

from hopper_attention import reference
from hopper_attention.emulation_fp8 import attention, attention_from_16_bits
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.reference_quantizer import quantize
from hopper_attention.study.context import uniform_inputs
from hopper_attention.study.distributions import random_inputs
from hopper_attention.v_layout import untranspose_v

PER_TENSOR = Fp8Recipe("tensor", "tensor", hadamard=False)
FAST = Fp8Recipe(accumulation="fast")


def draw(batch=2, seqlen_q=200, seqlen_k=300, heads=4, heads_kv=2, head_dim=32, dim_v=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dims = (head_dim, head_dim, dim_v or head_dim)
    places = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return tuple(
        torch.randn(batch, seqlen, n, dim, generator=generator).bfloat16()
        for (seqlen, n), dim in zip(places, dims, strict=True)
    )


def rmse(out, exact):
    return (out.double() - exact.double()).square().mean().sqrt().item()


def dequantized(parts):
    """What the e4m3 tensors and scales stand for, in float64."""

    def per_token(descale, seqlen):
        n = descale.shape[2]
        tokens = torch.arange(seqlen) // (1 if n == seqlen else 128 if n > 1 else seqlen)
        return descale.double()[:, :, tokens].transpose(1, 2)[..., None]

    seqlen_k = parts.k.shape[1]
    q = parts.q.double() * per_token(parts.q_descale, parts.q.shape[1])
    k = parts.k.double() * per_token(parts.k_descale, seqlen_k)
    v = untranspose_v(parts.v, seqlen_k) if parts.recipe.transpose_v else parts.v
    v = v.double() * parts.v_descale.double()[:, None]
    if parts.v_token_factor is not None:
        v = v * parts.v_token_factor.double().transpose(1, 2)[..., None]
    if parts.k_mean is not None:
        k = k + parts.k_mean.double()[:, None]
    return q, k, v


MASKS = [
    {},
    {"causal": True},
    {"window_size": (40, 10)},
    {"softcap": 3.0},
    {"softmax_scale": -0.1},
    {"causal": True, "softmax_scale": 0.05, "window_size": (130, -1)},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("accumulation", ["fp32", "fast"])
def test_it_is_attention_of_the_dequantized_tensors(options, accumulation):
    qkv = draw()
    recipe = Fp8Recipe("block", "channel", accumulation=accumulation)
    parts = quantize(*qkv, recipe)
    exact, exact_lse = reference.attention(*dequantized(parts), **options)
    out, lse = attention(parts, **options)
    assert out.dtype == torch.bfloat16
    # P's four bits are averaged over the keys that a row sees, which may be one.
    assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()
    assert rmse(out, exact) < 0.03 * exact.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-2)


@pytest.mark.parametrize("accumulation", ["fp32", "fast"])
@pytest.mark.parametrize("causal", [False, True])
def test_learnable_sink(accumulation, causal):
    parts = quantize(*draw(seqlen_q=310), Fp8Recipe(accumulation=accumulation, smooth_k=False))
    sink = torch.tensor([-30.0, 4.0, 200.0, -math.inf])
    exact, exact_lse = reference.attention(*dequantized(parts), causal=causal, learnable_sink=sink)
    out, lse = attention(parts, causal=causal, learnable_sink=sink)
    assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-2)
    plain, _ = attention(parts, causal=causal)
    assert torch.equal(out[:, :, 3], plain[:, :, 3])
    assert out[:, :, 2].eq(0).all()
    if causal:
        assert lse[:, :, :10].eq(sink[:, None]).all()


def test_a_sink_is_refused_where_scores_lack_the_mean_of_k():
    parts = quantize(*draw(), Fp8Recipe(smooth_k=True))
    with pytest.raises(ValueError, match="learnable_sink must be None with smooth_k"):
        attention(parts, learnable_sink=torch.zeros(4))


@pytest.mark.parametrize(
    "qk_scale, v_scale, smooth_k, transpose_v",
    [
        *itertools.product(
            ["tensor", "head", "block", "token"], ["tensor", "channel", "token"], [False], [True]
        ),
        ("block", "head", True, False),
        ("token", "token", True, True),
    ],
)
def test_every_scale_is_applied(qk_scale, v_scale, smooth_k, transpose_v):
    q, k, v = draw(dim_v=48)
    # Groups of all kinds differ, so that a scale in the wrong place would show.
    tokens = torch.logspace(0, 1, 300)[:, None, None]
    k, v = (k * tokens.flip(0) / 5).bfloat16(), (v * tokens * torch.arange(1, 49) / 48).bfloat16()
    q = (q * tokens[:200] / 5 * torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None]).bfloat16()
    recipe = Fp8Recipe(qk_scale, v_scale, smooth_k=smooth_k, transpose_v=transpose_v)
    parts = quantize(q, k, v, recipe)
    exact, exact_lse = reference.attention(*dequantized(parts))
    out, lse = attention(parts)
    assert rmse(out, exact) < 0.04 * exact.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-2, atol=2e-2)


def test_v_in_rows_gives_the_same_bits_as_transposed():
    qkv = draw()
    rows, columns = (
        attention_from_16_bits(*qkv, Fp8Recipe(transpose_v=transposed))
        for transposed in (False, True)
    )
    assert torch.equal(rows[0], columns[0])
    assert torch.equal(rows[1], columns[1])


def test_the_smoothed_mean_is_put_back_into_the_log_sum_exp():
    q, k, v = draw()
    k = (k + 5).bfloat16()
    recipe = Fp8Recipe("token", smooth_k=True)
    _, exact = reference.attention(q, k, v)
    _, lse = attention_from_16_bits(q, k, v, recipe)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=1.0)  # of sums near 30
    assert exact.abs().mean() > 5
    without = attention(quantize(q, k, v, recipe)._replace(k_mean=None))[1]
    assert (without.double() - exact).abs().mean() > 3


def test_rows_without_keys_are_zero():
    out, lse = attention_from_16_bits(*draw(seqlen_q=140, seqlen_k=10), causal=True)
    assert (out[:, :130] == 0).all()
    assert (lse[:, :, :130] == -math.inf).all()
    assert lse[:, :, 130:].isfinite().all()
    out, lse = attention_from_16_bits(*draw(seqlen_k=0))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_nan_stays_in_its_head():
    q, k, v = draw()
    clean, _ = attention_from_16_bits(q, k, v)
    v[0, 7, 1] = math.nan
    k[1, 9, 0, 3] = math.inf
    out, _ = attention_from_16_bits(q, k, v)
    assert out[0, :, 2:].isnan().all()
    assert out[1, :, :2].isnan().all()
    assert torch.equal(out[0, :, :2], clean[0, :, :2])
    assert torch.equal(out[1, :, 2:], clean[1, :, 2:])


@pytest.mark.parametrize("seqlen", [127, 129, 300])
def test_tiles_of_keys_change_only_the_rounding(seqlen):
    parts = quantize(*draw(seqlen_k=seqlen))
    one, lse_one = attention(parts, tile=(64, 96))
    two, lse_two = attention(parts, tile=(128, 128))
    torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=0.03)
    # The sums are of P as rounded, and a tile's P are relative to the reference of its time.
    torch.testing.assert_close(lse_one, lse_two, rtol=0, atol=2e-2)


@pytest.mark.slow
def test_errors_are_those_of_the_published_kernels():
    """At 4,096 keys and d 128: FlashAttention-3 has 1.37e-3 per tensor, outliers 1.98e-2."""
    errors = {}
    for name in ("normal", "outliers"):
        x = random_inputs(name, batch=1, seqlen=4096, heads=4, head_dim=128, seed=0)
        qkv = [t.bfloat16() for t in (x.query, x.key, x.value)]
        exact, _ = reference.attention(*qkv)
        for recipe in (Fp8Recipe(), PER_TENSOR):
            out, _ = attention_from_16_bits(*qkv, recipe, fraction_bits=None)
            errors[name, recipe] = rmse(out, exact)
    assert errors["normal", PER_TENSOR] == pytest.approx(1.37e-3, rel=0.03)
    assert errors["normal", Fp8Recipe()] <= 1.40e-3
    assert errors["outliers", PER_TENSOR] == pytest.approx(1.98e-2, rel=0.2)
    assert errors["outliers", Fp8Recipe()] <= 0.5 * errors["outliers", PER_TENSOR]


def test_the_tensor_core_costs_nothing_at_short_contexts():
    qkv = draw(batch=1, seqlen_q=128, seqlen_k=1024, head_dim=64)
    exact, _ = reference.attention(*qkv)
    for recipe in (Fp8Recipe(), FAST):
        short, _ = attention_from_16_bits(*qkv, recipe)
        long, _ = attention_from_16_bits(*qkv, recipe, fraction_bits=None)
        assert not torch.equal(short, long)
        assert rmse(short, exact) == pytest.approx(rmse(long, exact), rel=0.02)


@pytest.mark.parametrize(
    "keys, least, most",  # of fast accumulation's error; FlashAttention-3's on the card between
    [(4096, -0.10, -0.04), (32_768, -0.50, -0.40), (131_072, -0.87, -0.82)],
)
def test_fast_accumulation_collapses_with_the_context_and_fp32_does_not(keys, least, most):
    x = uniform_inputs(keys, seed=0)
    qkv = [t.bfloat16() for t in (x.query[:, :1], x.key, x.value)]
    exact = qkv[2].double().mean(1, keepdim=True)
    fast, _ = attention_from_16_bits(*qkv, FAST)
    assert least < (fast.double() / exact - 1).mean() < most
    right, _ = attention_from_16_bits(*qkv)
    assert abs((right.double() / exact - 1).mean()) < 2e-3


def test_the_default_is_no_worse_than_a_scale_per_tensor():
    generator = torch.Generator().manual_seed(1)

    def normal():
        return torch.randn(1, 512, 2, 64, generator=generator)

    channels = torch.ones(64)
    channels[[5, 23, 42]] = 20.0
    tokens = torch.ones(512, 1, 1)
    tokens[::100] = 20.0
    problems = {
        "normal": (normal(), normal(), normal()),
        "channels of q and k": (normal() * channels, normal() * channels, normal()),
        "channels of v": (normal(), normal(), normal() * channels),
        "channels of all": (normal() * channels, normal() * channels, normal() * channels),
        "tokens of q": (normal() * tokens, normal(), normal()),
        "tokens of k": (normal(), normal() * tokens, normal()),
        "tokens of v": (normal(), normal(), normal() * tokens),
        "tiny": (normal() * 1e-6, normal() * 1e3, normal() * 1e-6),
        "large": (normal() * 1e3, normal() * 1e-3, normal() * 1e3),
        "sharp": (normal() * 8, normal(), normal()),
    }
    for name, qkv in problems.items():
        rounded = [x.bfloat16() for x in qkv]
        exact, _ = reference.attention(*rounded)
        default, plain = (
            rmse(attention_from_16_bits(*rounded, recipe, fraction_bits=None)[0], exact)
            for recipe in (Fp8Recipe(), PER_TENSOR)
        )
        assert default < 1.08 * plain, name  # two random roundings of the same size
        if name == "channels of q and k":
            assert default < 0.6 * plain


def test_heads_are_shared_among_threads_and_the_setting_is_kept():
    threads = torch.get_num_threads()
    attention_from_16_bits(*draw())
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError):
        attention_from_16_bits(*draw(), softmax_scale=math.nan)
    assert torch.get_num_threads() == threads


def test_it_is_fast_enough_for_a_study():
    qkv = draw(batch=1, seqlen_q=512, seqlen_k=2048, heads=2, heads_kv=1, head_dim=128)
    begin = time.perf_counter()
    attention_from_16_bits(*qkv)
    assert time.perf_counter() - begin < 20  # an eighth of 4,096 tokens; it takes about one


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"out_dtype": torch.float32}, TypeError, r"out_dtype must be torch\.bfloat16 or"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
        ({"window_size": (-2, 0)}, ValueError, "window_size must be"),
    ],
)
def test_arguments_out_of_range_are_named(change, error, message):
    with pytest.raises(error, match=message):
        attention(quantize(*draw()), **change)


def test_a_softcap_beside_smoothing_is_refused():
    parts = quantize(*draw(), Fp8Recipe(smooth_k=True))
    with pytest.raises(ValueError, match=r"softcap is 2\.0: with smooth_k it must be 0"):
        attention(parts, softcap=2.0)


def test_tensors_of_other_dtypes_are_refused():
    parts = quantize(*draw())
    with pytest.raises(TypeError, match=r"k must be torch\.float8_e4m3fn, got torch\.float32"):
        attention(parts._replace(k=parts.k.float()))
    assert dataclasses.is_dataclass(parts.recipe)
