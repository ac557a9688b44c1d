"""What the quantizer's passes find and hand on: means of K, scales, factors of V's tokens."""

import math
from itertools import pairwise

import pytest
import torch
from checking import DEVICE
from quantize_checking import (
    assert_same,
    bits,
    check,
    in_cpu_memory,
    in_pytorch,
    on_the_card,
    random_qkv,
    recipe_name,
)

from hopper_attention.quantize import quantize
from hopper_attention.recipe import Fp8Recipe

NOT_FINITE = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
TRANSPOSED = pytest.mark.parametrize("transpose_v", [True, False], ids=["columns", "rows"])


def check_smoothed(q, k, v, recipe, **options):
    # The card sums in float32: K's mean may differ in its last bits, and an element that lies
    # between two e4m3 numbers may fall to the other side.
    found, expected = (
        on_the_card(q, k, v, recipe, **options),
        in_pytorch(q, k, v, recipe, **options),
    )
    largest = k.float().nan_to_num(0, 0, 0).abs().max().item() * k.shape[-1] ** 0.5
    torch.testing.assert_close(found.k_mean.cpu(), expected.k_mean, rtol=0, atol=2e-7 * largest)
    torch.testing.assert_close(found.k_descale.cpu(), expected.k_descale, rtol=1e-4, atol=0)
    assert torch.equal(bits(found.q).cpu(), bits(expected.q))
    assert torch.equal(bits(found.v).cpu(), bits(expected.v))
    assert torch.equal(found.k.float().isnan().cpu(), expected.k.float().isnan())
    steps = (bits(found.k).cpu().int() - bits(expected.k).int()).abs()
    # beside zero e4m3's steps are finer than what the means may differ by
    apart = found.k.cpu().float().nan_to_num() - expected.k.float().nan_to_num()
    apart = apart.abs() * found.k_descale.min().item()
    assert ((steps <= 1) | (apart <= 4e-7 * largest)).all()
    assert (steps != 0).float().mean() < 2e-3
    return found


def shifted(q, k, v):
    return q, k + 20 * torch.randn(1, 1, 1, k.shape[-1], device=DEVICE, dtype=k.dtype), v


@pytest.mark.parametrize("qk_scale", ["tensor", "head", "block", "token"])
@pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
def test_smoothing(head_dim, qk_scale):
    q, k, v = shifted(*random_qkv(seqlen_k=5000, head_dim=head_dim))
    recipe = Fp8Recipe(qk_scale=qk_scale, smooth_k=True)
    found = check_smoothed(q, k, v, recipe)
    again = quantize(q, k, v, recipe)
    assert torch.equal(again.k_mean, found.k_mean)


def test_smoothing_of_packed_sequences():
    q, k, v = (x[0] for x in random_qkv(700, 6000, batch=1))
    bounds_k = [0, 1, 1, 300, 6000]
    cu_q = torch.tensor([0, 100, 200, 300, 700], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor(bounds_k, dtype=torch.int32, device=DEVICE)
    recipe = Fp8Recipe(smooth_k=True)
    packed = quantize(q, k, v, recipe, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for i, (first, last) in enumerate(pairwise(bounds_k)):
        alone = quantize(q[None, :100], k[None, first:last], v[None, first:last], recipe)
        assert torch.equal(packed.k_mean[i], alone.k_mean[0])
        assert torch.equal(bits(packed.k[first:last]), bits(alone.k[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seqlen", [1, 2, 15, 17, 127, 128, 129, 1000])
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
def test_means_of_integers_are_exact(head_dim, seqlen, dtype):
    # Every sum is an integer that float32 has: a row too many or too few is seen
    generator = torch.Generator(DEVICE).manual_seed(seqlen)
    q, k, v = (
        torch.randint(-99, 100, (2, seqlen, heads, head_dim), device=DEVICE, generator=generator)
        .float()
        .to(dtype)
        for heads in (4, 2, 2)
    )
    check(q, k, v, Fp8Recipe(hadamard=False, smooth_k=True))
    cu_seqlens = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    packed = (x.flatten(0, 1) for x in (q, k, v))
    check(*packed, Fp8Recipe(hadamard=False, smooth_k=True), **options)


@NOT_FINITE
@pytest.mark.parametrize("hadamard", [True, False], ids=["hadamard", "plain"])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_smoothing_passes_over_what_is_not_finite(head_dim, hadamard, bad):
    q, k, v = shifted(*random_qkv(seqlen_k=700, head_dim=head_dim))
    k[0, 5, 1, 40] = bad
    k[1, 130:150, 0] = bad  # tokens of a tile
    k[1, 256:384, 1] = bad  # a tile
    k[1, 699, 1, :8] = bad
    found = check_smoothed(q, k, v, Fp8Recipe(smooth_k=True, hadamard=hadamard))
    assert found.k_mean.isfinite().all()
    k[0, :, 0] = bad
    found = check_smoothed(q, k, v, Fp8Recipe(smooth_k=True, hadamard=hadamard))
    assert (found.k_mean[0, 0] == 0).all()


def test_smoothing_leaves_k_where_its_sum_overflows():
    q, k, v = random_qkv(seqlen_k=300, head_dim=64)
    k[0, :, 1, 7] = 3e38
    found = on_the_card(q, k, v, Fp8Recipe(smooth_k=True, hadamard=False))
    assert found.k_mean[0, 1, 7] == 0
    assert found.k_mean.isfinite().all()
    assert not found.k.float().isnan().any()


@NOT_FINITE
@TRANSPOSED
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
def test_factors_of_tokens_that_are_not_finite(head_dim, transpose_v, bad):
    recipe = Fp8Recipe("token", "token", transpose_v=transpose_v)
    q, k, v = random_qkv(head_dim=head_dim)
    v[0, 3, 0, 5] = bad
    v[0, 3, 1] = bad
    v[1, :, 0] = bad  # a head
    v[1, 128:256, 1] = 0
    found = check(q, k, v, recipe)
    assert found.v_descale[1, 0] == 1
    assert (found.v_token_factor[1, 0] == 1).all()


@NOT_FINITE
@TRANSPOSED
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_factors_of_packed_tokens_that_are_not_finite(head_dim, transpose_v, bad):
    lengths_q, lengths_k = [3, 0, 128, 500, 1, 77], [130, 4, 0, 1021, 256, 1]
    q, k, v = (x[0] for x in random_qkv(sum(lengths_q), sum(lengths_k), head_dim=head_dim, batch=1))
    cu_seqlens = [
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        for lengths in (lengths_q, lengths_k)
    ]
    v[130:134] = bad  # a sequence
    v[129, :, 3] = bad
    v[134, 1] = bad
    v[200, 0, head_dim - 1] = bad
    recipe = Fp8Recipe("block", "token", transpose_v=transpose_v)
    found = check(q, k, v, recipe, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1])
    assert (found.v_descale[1] == 1).all()


LONG = pytest.mark.parametrize("shape", [(64, 33_000), (128, 16_500), (256, 8_300)], ids=str)


@LONG
@pytest.mark.parametrize(
    "recipe",
    [
        Fp8Recipe(),
        Fp8Recipe("head", "head"),
        Fp8Recipe("tensor", "tensor"),
        Fp8Recipe("token", "token"),
    ],
    ids=recipe_name,
)
def test_groups_of_heads(shape, recipe):
    # More tiles than passes over some heads take before the next ones begin
    head_dim, seqlen = shape
    check(*random_qkv(seqlen // 2, seqlen, head_dim=head_dim, batch=1), recipe)


@pytest.mark.parametrize("shape", [(64, 33_000), (128, 33_000)], ids=str)
def test_groups_of_smoothed_heads(shape):
    head_dim, seqlen = shape
    check_smoothed(
        *shifted(*random_qkv(300, seqlen, head_dim=head_dim, batch=1)), Fp8Recipe(smooth_k=True)
    )


@pytest.mark.parametrize("v_scale", ["channel", "token"])
@pytest.mark.parametrize("shape", [(64, 34_000), (128, 9_000), (256, 18_000)], ids=str)
def test_queries_that_come_before_the_mean(shape, v_scale):
    # One or several tiles for each block of threads
    head_dim, seqlen = shape
    q, k, v = shifted(*random_qkv(seqlen, 3000, head_dim=head_dim, batch=1))
    check_smoothed(q, k, v, Fp8Recipe(v_scale=v_scale, smooth_k=True))


def test_calls_behind_each_other():
    # A call's kernels start before those ahead of them have ended, and share a workspace
    recipes = [
        Fp8Recipe(smooth_k=True),
        Fp8Recipe(),
        Fp8Recipe("head", smooth_k=True),
        Fp8Recipe("tensor", "tensor"),
        Fp8Recipe("token", "token", smooth_k=True),
    ]
    tensors = [
        shifted(*random_qkv(seqlen_q, seqlen_k, head_dim=64, seed=seqlen_q))
        for seqlen_q, seqlen_k in ((18_000, 3000), (200, 20_000), (1000, 1500))
    ]
    calls = [(*qkv, recipe) for recipe in recipes for qkv in tensors]
    expected = [in_cpu_memory(quantize(*call)) for call in calls]
    for _ in range(3):
        found = [quantize(*call) for call in calls]
        for mine, alone in zip(found, expected, strict=True):
            assert_same(mine, alone)


def test_smoothing_of_rotated_keys():
    # After rotary embedding K is summed in another way
    q, k, v = shifted(*random_qkv(seqlen_k=700))
    angles = torch.randn(700, 32, device=DEVICE) * 3
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    check_smoothed(q, k, v, Fp8Recipe(smooth_k=True), **options)
    k[0, 5, 1, 40] = math.inf
    check_smoothed(q, k, v, Fp8Recipe(smooth_k=True), **options)
