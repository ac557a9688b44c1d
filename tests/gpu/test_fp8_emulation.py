"""The emulated FP8 forward predicts the card's error, for every recipe and both accumulations."""

from dataclasses import replace

import pytest
import torch
from checking import DEVICE, rmse

import hopper_attention
from hopper_attention import emulation_fp8, reference
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.study.context import uniform_inputs
from hopper_attention.study.distributions import random_inputs
from hopper_attention.study.recipes import RECIPES

TOLERANCE = 0.10
BASES = {
    name: named.recipe
    for name, named in RECIPES.items()
    if named.recipe.accumulation == Fp8Recipe().accumulation
}


def on_card(q, k, v, recipe, **options):
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    return hopper_attention.flash_attn_fp8_func(q, k, v, recipe=recipe, **options)


def draw(distribution, head_dim, seqlen=1024, heads=4, heads_kv=2):
    drawn = random_inputs(
        distribution, batch=1, seqlen=seqlen, heads=heads, head_dim=head_dim, seed=2
    ).to(torch.bfloat16)
    return drawn.query, drawn.key[:, :, :heads_kv], drawn.value[:, :, :heads_kv]


@pytest.mark.parametrize("accumulation", ["fp32", "fast"])
@pytest.mark.parametrize("recipe", BASES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("distribution", ["normal", "outliers"])
def test_the_emulation_predicts_the_error(distribution, head_dim, recipe, accumulation):
    qkv = draw(distribution, head_dim)
    chosen = replace(BASES[recipe], accumulation=accumulation)
    exact, _ = reference.attention(*qkv)
    emulated, _ = emulation_fp8.attention_from_16_bits(*qkv, chosen)
    out = on_card(*qkv, chosen)
    predicted, found = rmse(emulated, exact), rmse(out.cpu(), exact)
    assert abs(found / predicted - 1) <= TOLERANCE, (found, predicted)
    # The roundings are the same ones: the card is nearer to the emulation than to the truth.
    assert rmse(out.cpu(), emulated.double()) < found


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (200, 30)}, {"softcap": 5.0}, {"softmax_scale": -0.05}],
    ids=str,
)
def test_the_emulation_predicts_the_error_under_masks_and_caps(options):
    qkv = draw("normal", 128)
    exact, _ = reference.attention(*qkv, **options)
    emulated, _ = emulation_fp8.attention_from_16_bits(*qkv, **options)
    out = on_card(*qkv, Fp8Recipe(), **options)
    predicted, found = rmse(emulated, exact), rmse(out.cpu(), exact)
    assert abs(found / predicted - 1) <= TOLERANCE, (found, predicted)


@pytest.mark.parametrize("keys", [4096, 32_768, 131_072])
@pytest.mark.parametrize("accumulation", ["fp32", "fast"])
def test_the_emulation_predicts_what_a_long_context_costs(keys, accumulation):
    x = uniform_inputs(keys, seed=0).to(torch.bfloat16)
    qkv = x.query, x.key, x.value
    recipe = Fp8Recipe(accumulation=accumulation)
    exact = x.value.double().mean(1, keepdim=True).expand_as(x.query)
    emulated, _ = emulation_fp8.attention_from_16_bits(*qkv, recipe)
    predicted, found = rmse(emulated, exact), rmse(on_card(*qkv, recipe).cpu(), exact)
    if accumulation == "fp32":
        assert found <= 2.5e-3  # e4m3's rounding of V, which averages out, and bfloat16's of O
    assert abs(found / predicted - 1) <= TOLERANCE, (found, predicted)
