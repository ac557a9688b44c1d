import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_attention.recipe import Fp8Recipe, signs
from hopper_attention.reference_quantizer import quantize, quantize_packed, token_mean
from hopper_attention.rotation import apply_rotary, hadamard, rotate
from hopper_attention.v_layout import key_of_slot, transpose_v, untranspose_v

PLAIN = {"hadamard": False, "transpose_v": False}
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448


def inputs(batch=2, seqlen_q=130, seqlen_k=150, heads=4, heads_kv=2, head_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seqlen_q, heads, head_dim)] + 2 * [(batch, seqlen_k, heads_kv, head_dim)]
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


def nearest_e4m3(x):
    """The e4m3 number nearest to each, of two the one with an even mantissa; up to 448."""
    magnitudes = x.double().abs().clamp_max(448)
    distance = (magnitudes[..., None] - E4M3).abs()
    least = distance.amin(-1, keepdim=True)
    near = distance == least
    even = torch.arange(127) % 2 == 0
    place = (near.float() + (near & even).float()).argmax(-1)
    return E4M3[place] * x.double().sign()


def along_tokens(descale, seqlen):
    """(batch, heads, n) to (batch, seqlen, heads, 1)."""
    n = descale.shape[2]
    tokens = torch.arange(seqlen) // (1 if n == seqlen else 128 if n > 1 else seqlen)
    return descale[:, :, tokens].transpose(1, 2)[..., None]


@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "token"])
def test_q_and_k_are_the_nearest_e4m3_under_the_scale_of_their_group(granularity):
    q, k, v = inputs()
    found = quantize(q, k, v, Fp8Recipe(qk_scale=granularity, **PLAIN))
    for x, e4m3, descale in ((q, found.q, found.q_descale), (k, found.k, found.k_descale)):
        batch, seqlen, heads, _ = x.shape
        magnitudes = x.float().abs()
        groups = {"tensor": 1, "head": 1, "block": math.ceil(seqlen / 128), "token": seqlen}
        assert descale.shape == (batch, heads, groups[granularity])
        for b in range(batch):
            for h in range(heads):
                for n in range(descale.shape[2]):
                    group = {
                        "tensor": magnitudes,
                        "head": magnitudes[b, :, h],
                        "block": magnitudes[b, 128 * n : 128 * n + 128, h],
                        "token": magnitudes[b, n, h],
                    }[granularity]
                    assert descale[b, h, n] == group.amax() / 448
        factor = 1 / along_tokens(descale.double(), seqlen)
        exact = x.double() * factor
        off = (e4m3.double() - nearest_e4m3(exact)).abs()
        # Where the float32 product fell on the other side of a midpoint, both are as near.
        tie = ((e4m3.double() - exact).abs() - (nearest_e4m3(exact) - exact).abs()).abs()
        assert ((off == 0) | (tie < 1e-5 * exact.abs())).all()


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "token"])
def test_v_under_the_scale_of_its_group(granularity):
    _, _, v = qkv = inputs()
    v[:, :, :, 3] *= 50
    found = quantize(*qkv, Fp8Recipe(v_scale=granularity, **PLAIN))
    magnitudes = v.float().abs()
    expected = {
        "tensor": magnitudes.amax().expand(2, 2, 1),
        "head": magnitudes.amax((1, 3))[..., None],
        "channel": magnitudes.amax(1),
        "token": magnitudes.amax((1, 3))[..., None],
    }[granularity]
    assert torch.equal(found.v_descale, expected / 448)
    value = found.v.double() * found.v_descale.double()[:, None]
    if granularity == "token":
        assert found.v_token_factor.shape == (2, 2, 150)
        assert found.v_token_factor.max() == 1
        value = value * found.v_token_factor.double().transpose(1, 2)[..., None]
    else:
        assert found.v_token_factor is None
    # Half a step of a 4-bit mantissa, or of the least subnormal.
    bound = torch.maximum(v.double().abs() / 16, found.v_descale.double()[:, None] * 2**-10)
    assert ((value - v.double()).abs() <= bound * 1.0001).all()


def test_ties_go_to_even_and_large_values_saturate():
    # amax 448: scale 1
    column = torch.tensor([448.0, 17.0, 19.0, 2**-10, 3 * 2**-10, -17.0, 0.0, -0.0])
    x = column.view(1, 8, 1, 1).repeat(1, 1, 1, 16)
    found = quantize(x, x, x, Fp8Recipe(**PLAIN))
    expected = [448.0, 16.0, 20.0, 0.0, 2**-8, -16.0, 0.0, 0.0]
    assert found.q[0, :, 0, 0].float().tolist() == expected
    assert found.q_descale.item() == 1.0


def test_nan_and_infinity_become_nan_and_leave_the_scale_alone():
    q, k, v = inputs()
    clean = quantize(q, k, v, Fp8Recipe(**PLAIN))
    for x in (q, k, v):
        x[0, 3, 0, 5], x[0, 4, 0, 6], x[0, 5, 0, 7] = math.nan, math.inf, -math.inf
    found = quantize(q, k, v, Fp8Recipe(**PLAIN))
    for name in ("q", "k", "v"):
        e4m3, before = getattr(found, name), getattr(clean, name)
        bad = ~getattr(found, name).float().isfinite()
        assert bad.nonzero().tolist() == [[0, 3, 0, 5], [0, 4, 0, 6], [0, 5, 0, 7]]
        assert (e4m3.view(torch.uint8)[bad] == 0x7F).all()
        assert torch.equal(e4m3.float()[~bad], before.float()[~bad])
    for granularity in ("tensor", "head", "token"):
        found = quantize(q, k, v, Fp8Recipe(granularity, granularity, **PLAIN))
        assert found.q_descale.isfinite().all()
        assert found.v_descale.isfinite().all()


@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
def test_zeros_have_scale_one_and_tiny_values_are_kept(granularity):
    zeros = torch.zeros(1, 3, 1, 16)
    recipe = Fp8Recipe(granularity, granularity, **PLAIN)
    found = quantize(zeros, zeros, zeros, recipe)
    assert (found.q_descale == 1).all()
    assert (found.v_descale == 1).all()
    assert (found.v.float() == 0).all()
    tiny = torch.full((1, 3, 1, 16), 2.0**-120)
    found = quantize(tiny, tiny, tiny, recipe)
    assert torch.equal(found.q_descale, torch.full_like(found.q_descale, 2.0**-100 / 448))
    small = torch.full((1, 3, 1, 16), 2.0**-90)
    found = quantize(small, small, small, recipe)
    assert torch.allclose(
        found.k.float() * along_tokens(found.k_descale, 3), small, rtol=1e-6, atol=0
    )


def test_a_token_of_zeros_does_not_set_the_scale_of_v():
    v = torch.full((1, 4, 1, 16), 1e-3)
    v[:, 1] = 0
    v[:, 2] *= 2**-4
    found = quantize(v, v, v, Fp8Recipe(v_scale="token", **PLAIN))
    assert found.v_descale.item() == torch.tensor(1e-3).div(448).item()
    assert found.v_token_factor.flatten().tolist() == [1.0, 1.0, 2**-4, 1.0]


@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 80, 96, 128, 192, 256])
def test_hadamard_is_the_orthonormal_matrix_by_blocks(head_dim):
    block = head_dim & -head_dim
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(3, 5, head_dim)
    expected = (x.double().view(3, 5, -1, block) @ matrix / math.sqrt(block)).view(x.shape)
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_rotation_cancels_in_the_scores():
    q, k, _ = inputs(head_dim=96, heads=2)
    exact = q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    turned = [rotate(x, seed=3).double().transpose(1, 2) for x in (q, k)]
    torch.testing.assert_close(turned[0] @ turned[1].mT, exact, rtol=0, atol=1e-4)
    by_hand = hadamard(q * signs(96, 3).to(q.dtype))
    assert torch.equal(rotate(q, seed=3), by_hand)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 1, 1, 128)
    x[..., 77] = 100.0
    assert torch.allclose(rotate(x, 0).abs(), torch.full_like(x, 100 / math.sqrt(128)))


def test_smoothing_subtracts_the_mean_of_the_rotated_keys():
    q, k, v = inputs()
    k = (k + 30.0).bfloat16()
    recipe = Fp8Recipe("token", smooth_k=True)
    found = quantize(q, k, v, recipe)
    rotated = rotate(k, 0).double()
    torch.testing.assert_close(found.k_mean.double(), rotated.mean(1), rtol=1e-6, atol=1e-6)
    value = found.k.double() * found.k_descale.double().transpose(1, 2)[..., None]
    off = value - (rotated - rotated.mean(1, keepdim=True))
    assert off.abs().max() < 0.4  # e4m3 of N(0, 1); of values near 30 it would be 1 and more
    assert quantize(q, k, v).k_mean is None


def test_a_mean_takes_what_is_not_finite_for_zero():
    k = torch.ones(1, 4, 1, 16)
    k[0, 0, 0, 3], k[0, 1, 0, 3] = math.nan, math.inf
    mean = token_mean(k)
    assert mean[0, 0, 3] == 0.5
    assert mean[0, 0, 4] == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_by_their_angle(interleaved):
    x = torch.randn(1, 7, 2, 12, dtype=torch.float64)
    angles = torch.randn(9, 4)
    found = apply_rotary(x, angles.cos(), angles.sin(), interleaved=interleaved, offset=2)
    for token in range(7):
        for pair in range(4):
            one, two = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            a, b = x[0, token, :, one], x[0, token, :, two]
            angle = angles[token + 2, pair].double()
            turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
            for place, expected in zip((one, two), turned, strict=True):
                torch.testing.assert_close(
                    found[0, token, :, place].double(), expected, rtol=1e-5, atol=1e-5
                )
    assert torch.equal(found[..., 8:], x[..., 8:].float())


def test_rotary_comes_before_the_rotation():
    q, k, v = inputs()
    angles = torch.randn(200, 16)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    found = quantize(q, k, v, rotary_offset_q=20, **rotary)
    turned_q = apply_rotary(q, angles.cos(), angles.sin(), offset=20)
    turned_k = apply_rotary(k, angles.cos(), angles.sin())
    expected = quantize(turned_q, turned_k, v.float())
    for one, two in zip(found[:7], expected[:7], strict=True):
        assert (one is two) or torch.equal(one, two)


def test_slots_hold_the_keys_of_the_second_product():
    keys = [key_of_slot(slot) for slot in range(16)]
    assert keys == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    v = torch.arange(2 * 130 * 3 * 4).view(2, 130, 3, 4)
    found = transpose_v(v)
    assert found.shape == (2, 3, 4, 256)
    for place in (0, 1, 2, 17, 111, 128, 131):
        key = 16 * (place // 16) + key_of_slot(place % 16)
        expected = v[:, key] if key < 130 else torch.zeros(2, 3, 4)
        assert torch.equal(found[..., place], expected)
    assert (found[..., 144:] == 0).all()
    assert torch.equal(untranspose_v(found, 130), v)


def test_transposed_v_is_the_same_numbers():
    qkv = inputs()
    rows = quantize(*qkv, Fp8Recipe(transpose_v=False))
    transposed = quantize(*qkv, Fp8Recipe())
    assert transposed.v.shape == (2, 2, 32, 256)
    assert torch.equal(untranspose_v(transposed.v, 150).float(), rows.v.float())
    assert torch.equal(transposed.v_descale, rows.v_descale)


@pytest.mark.parametrize("head_dim", [40, 72, 64])
def test_rows_begin_at_multiples_of_sixteen_bytes(head_dim):
    qkv = inputs(head_dim=head_dim)
    found = quantize(*qkv, Fp8Recipe(transpose_v=False))
    for x, e4m3 in zip(qkv, found[:3], strict=True):
        assert e4m3.shape == x.shape
        assert e4m3.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in e4m3.stride()[:-1])


granularities = st.sampled_from(["tensor", "head", "block", "token"])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=1, max_size=4),
    qk_scale=granularities,
    v_scale=st.sampled_from(["tensor", "head", "channel", "token"]),
    smooth_k=st.booleans(),
    transposed=st.booleans(),
)
def test_packed_sequences_are_quantized_as_if_alone(
    lengths, qk_scale, v_scale, smooth_k, transposed
):
    recipe = Fp8Recipe(qk_scale, v_scale, smooth_k=smooth_k, transpose_v=transposed)
    alone = [
        inputs(1, q, k, heads_kv=1, head_dim=16, seed=place) for place, (q, k) in enumerate(lengths)
    ]
    packed = [torch.cat([one[place][0] for one in alone]) for place in range(3)]
    bounds_q, bounds_k = (
        torch.tensor([0, *(length[side] for length in lengths)]).cumsum(0) for side in (0, 1)
    )
    found = quantize_packed(*packed, bounds_q, bounds_k, recipe)
    assert found.q.shape == packed[0].shape
    if "tensor" in (qk_scale, v_scale):
        return
    padded = 0
    for b, qkv in enumerate(alone):
        one = quantize(*qkv, recipe)
        assert same(found.q[bounds_q[b] : bounds_q[b + 1]], one.q[0])
        assert same(found.k[bounds_k[b] : bounds_k[b + 1]], one.k[0])
        if transposed:
            assert same(found.v[..., padded : padded + one.v.shape[-1]], one.v[0])
            padded += one.v.shape[-1]
        else:
            assert same(found.v[bounds_k[b] : bounds_k[b + 1]], one.v[0])
        for name in ("q_descale", "k_descale", "v_descale", "v_token_factor", "k_mean"):
            mine, theirs = getattr(found, name), getattr(one, name)
            if theirs is None:
                assert mine is None
                continue
            assert torch.equal(mine[b, :, : theirs.shape[2]], theirs[0])
            assert (mine[b, :, theirs.shape[2] :] == 1).all()


def test_packed_sequences_share_the_scale_of_the_tensor():
    q, k, v = inputs(batch=1)
    bounds_q, bounds_k = torch.tensor([0, 30, 130]), torch.tensor([0, 100, 150])
    recipe = Fp8Recipe("tensor", "tensor")
    found = quantize_packed(q[0], k[0], v[0], bounds_q, bounds_k, recipe)
    whole = quantize(q, k, v, recipe)
    assert same(found.q, whole.q[0])
    assert (found.q_descale == whole.q_descale[0, 0, 0]).all()
    assert found.q_descale.shape == (2, 4, 1)


def same(one, two):
    return one.shape == two.shape and torch.equal(one.float(), two.float())


def test_a_strided_input_gives_the_same():
    qkv = inputs()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    for one, two in zip(quantize(*qkv)[:6], quantize(*strided)[:6], strict=True):
        assert same(one, two)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotary_cos": torch.ones(200, 8)}, "rotary_sin is None"),
        (
            {"rotary_cos": torch.ones(200, 8), "rotary_sin": torch.ones(200, 9)},
            r"must be \(positions, rotary_dim / 2\), got \(200, 8\) and \(200, 9\)",
        ),
        (
            {"rotary_cos": torch.ones(100, 8), "rotary_sin": torch.ones(100, 8)},
            "rotary_cos has 100 positions; tokens at 0 to 129 need more",
        ),
        (
            {"rotary_cos": torch.ones(200, 17), "rotary_sin": torch.ones(200, 17)},
            "rotary_cos rotates 34 channels, q and k have 32",
        ),
    ],
)
def test_rotary_tables_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quantize(*inputs(), **change)


def test_bounds_that_do_not_fit_are_refused():
    q, k, v = (x[0] for x in inputs(batch=1))
    good = torch.tensor([0, 130])
    with pytest.raises(ValueError, match=r"cu_seqlens_k must rise from 0 to at most 150"):
        quantize_packed(q, k, v, good, torch.tensor([0, 151]))
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be \(batch \+ 1,\) integers"):
        quantize_packed(q, k, v, good.float(), good)
    with pytest.raises(ValueError, match="as many entries as cu_seqlens_q, 2, got 3"):
        quantize_packed(q, k, v, good, torch.tensor([0, 1, 2]))
