"""The card's quantizer gives the bits of the one in PyTorch, whatever the recipe and the layout."""

import math

import pytest
import torch
from checking import DEVICE, heads_outside, name, sequence_first, strided
from quantize_checking import (
    assert_same,
    bits,
    check,
    in_cpu_memory,
    random_qkv,
    recipe_name,
)

from hopper_attention import ops_quantize
from hopper_attention.quantize import quantize
from hopper_attention.recipe import Fp8Recipe

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
HEAD_DIMS = [8, 16, 40, 64, 72, 80, 96, 128, 136, 192, 248, 256]
QK_SCALES = ["tensor", "head", "block", "token"]
V_SCALES = ["tensor", "head", "channel", "token"]
RECIPES = [
    *[Fp8Recipe(qk_scale=scale) for scale in QK_SCALES],
    *[Fp8Recipe(qk_scale=scale, hadamard=False, seed=9) for scale in QK_SCALES],
    *[Fp8Recipe(v_scale=scale) for scale in V_SCALES],
    *[Fp8Recipe(v_scale=scale, transpose_v=False) for scale in V_SCALES],
]
NAN = 0x7F


@DTYPES
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_recipes(head_dim, recipe, dtype):
    check(*random_qkv(head_dim=head_dim, dtype=dtype), recipe)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("recipe", RECIPES[::3], ids=recipe_name)
def test_head_dims(head_dim, recipe):
    check(*random_qkv(head_dim=head_dim), recipe)


@pytest.mark.parametrize("dims", [(192, 128), (128, 64), (64, 40), (40, 200), (256, 8)], ids=name)
@pytest.mark.parametrize("recipe", RECIPES[-8:], ids=recipe_name)
def test_head_dim_of_v(dims, recipe):
    check(*random_qkv(head_dim=dims[0], head_dim_v=dims[1]), recipe)


LENGTHS = [(1, 1), (0, 5), (5, 0), (0, 0), (127, 129), (128, 128), (129, 127), (1021, 4099)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=name)
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
def test_lengths(lengths, recipe):
    check(*random_qkv(*lengths, head_dim=64), recipe)


def odd_strides(tensor):
    """A contiguous last dimension, and nothing aligned to 16 bytes."""
    around = torch.full(
        (*tensor.shape[:2], tensor.shape[2] + 1, tensor.shape[3] + 3),
        math.nan,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    view = around[:, :, 1:, 3:]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(
    "layout",
    [
        heads_outside,
        sequence_first,
        odd_strides,
        lambda x: strided(x, (1, 5, 1, 8)),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["bhsd", "sbhd", "odd", "gaps", "last", "expanded"],
)
@pytest.mark.parametrize("head_dim", [72, 128])
def test_strides(layout, head_dim):
    q, k, v = random_qkv(head_dim=head_dim)
    check(layout(q), layout(k), layout(v), Fp8Recipe())
    check(layout(q), layout(k), layout(v), Fp8Recipe(qk_scale="token", transpose_v=False))


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_packed(head_dim, recipe):
    lengths_q, lengths_k = [3, 0, 128, 500, 1, 77], [130, 4, 0, 1021, 256, 1]
    q, k, v = (x[0] for x in random_qkv(sum(lengths_q), sum(lengths_k), head_dim=head_dim, batch=1))
    cu_seqlens = [
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        for lengths in (lengths_q, lengths_k)
    ]
    check(q, k, v, recipe, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1])


def rotary_tables(positions, rotary_dim):
    angles = torch.randn(positions, rotary_dim // 2, device=DEVICE) * 3
    return {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    "dims", [(64, 64), (64, 16), (80, 80), (80, 32), (128, 128), (192, 64), (256, 256)], ids=name
)
@DTYPES
def test_rotary(dims, interleaved, dtype):
    options = {**rotary_tables(400, dims[1]), "rotary_interleaved": interleaved}
    q, k, v = random_qkv(head_dim=dims[0], dtype=dtype)
    check(q, k, v, Fp8Recipe(), **options)
    check(q, k, v, Fp8Recipe(qk_scale="head", hadamard=False), **options)
    check(q, k, v, Fp8Recipe(), **options, rotary_q_offset=7, rotary_k_offset=60)
    check(q, k, v, Fp8Recipe(), **options, rotary_k_offset=60)


def test_rotary_of_packed_sequences():
    q, k, v = (x[0] for x in random_qkv(600, 900, batch=1))
    cu_q = torch.tensor([0, 100, 100, 600], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 150, 160, 900], dtype=torch.int32, device=DEVICE)
    check(q, k, v, Fp8Recipe(), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **rotary_tables(740, 128))


def test_a_position_past_the_rotary_table_is_seen():
    q, k, v = (x[0] for x in random_qkv(200, 200, batch=1))
    cu = torch.tensor([0, 200], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **rotary_tables(150, 128)}
    quantized = quantize(q, k, v, Fp8Recipe(), **options)
    for x in (quantized.q, quantized.k):
        assert not (bits(x)[:150] == NAN).any()
        assert (bits(x)[150:] == NAN).all()


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_alone(bad, recipe):
    q, k, v = random_qkv(head_dim=96, dtype=torch.float16)
    for x in (q, k, v):
        x[0, 5, 1, 40] = bad
        x[1, 130:, 0] = bad
    found = check(q, k, v, recipe)
    q_bits = bits(found.q)
    assert (q_bits[0, 5, 1, 32:64] == NAN).sum() == (32 if recipe.hadamard else 1)
    assert (q_bits[1, 130:, 0] == NAN).all()
    others = torch.ones(2, 200, 4, 96, dtype=torch.bool, device=DEVICE)
    others[0, 5, 1] = others[1, 130:, 0] = False
    assert not (q_bits[others] == NAN).any()


TINY = [0.0, 1e-45, 1e-40, 2.0**-126, 1e-36, 1e-30]


@pytest.mark.parametrize("size", [*TINY, 1e30, 3e38])
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
def test_zeros_subnormal_and_huge(size, recipe):
    shape, generator = (2, 150, 2, 64), torch.Generator(DEVICE).manual_seed(1)

    def draw():
        x = torch.randn(shape, device=DEVICE, dtype=torch.float64, generator=generator)
        return (x.clamp(-1, 1) * size).bfloat16()

    q, k, v = draw(), draw(), draw()
    k[:, :128] = 0
    v[..., 3:5] = 0
    found = check(q, k, v, recipe)
    for descale in (found.q_descale, found.k_descale, found.v_descale):
        assert (descale >= torch.finfo(torch.float32).tiny).all()


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_the_sums_of_unlike_sizes(head_dim, dtype):
    # In a sum of 16 terms the tensor cores cut those that are small beside the largest; zeros of
    # either sign count for nothing
    def unlike(x):
        factors = torch.exp2(torch.randint(-10, 10, x.shape, device=DEVICE).float())
        zeros = torch.rand(x.shape, device=DEVICE) < 0.3
        return (x.float() * factors).masked_fill(zeros, -0.0).to(dtype)

    q, k, v = (unlike(x) for x in random_qkv(head_dim=head_dim, dtype=dtype))
    check(q, k, v, Fp8Recipe(qk_scale="token"))
    check(q, k, v, Fp8Recipe())


def test_one_step_of_every_size():
    # All 65,536 numbers of each dtype, as they are: no rotation, a scale of 1
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(2**16, device=DEVICE).to(torch.uint16).view(dtype)
        x = numbers.view(1, 512, 1, 128)
        for recipe in (Fp8Recipe(hadamard=False), Fp8Recipe("token", "token", hadamard=False)):
            check(x, x, x, recipe)


@pytest.mark.parametrize("recipe", [Fp8Recipe(), Fp8Recipe("head", "token")], ids=recipe_name)
def test_the_same_bits_again(recipe):
    q, k, v = random_qkv(3000, 3000)
    first = quantize(q, k, v, recipe)
    for _ in range(5):
        assert_same(quantize(q, k, v, recipe), in_cpu_memory(first))


def test_beyond_two_to_the_31_elements():
    seqlen, heads, head_dim = 70_000, 240, 128  # 2.15e9
    x = torch.zeros(1, seqlen, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    tail = torch.randn(1, 300, 3, head_dim, device=DEVICE).bfloat16()
    x[:, -300:, -3:] = tail
    small = x[:, -(300 + 68_000 % 128) :, -3:]
    found = quantize(x[:, :1], x, x, Fp8Recipe("token", "channel"))
    for part in ("k", "k_descale", "v_descale"):
        expected = getattr(quantize(small, small, small, Fp8Recipe("token", "channel")), part)
        whole = getattr(found, part)
        if part == "k":
            assert torch.equal(bits(whole[:, -300:, -3:]), bits(expected[:, -300:]))
        elif part == "k_descale":
            assert torch.equal(whole[:, -3:, -300:], expected[:, :, -300:])
        else:
            assert torch.equal(whole[:, -3:], expected)
    del x


def test_opcheck():
    q, k, v = random_qkv(60, 90)
    tables = rotary_tables(90, 64)
    arguments = (q, k, v, tables["rotary_cos"], tables["rotary_sin"], None, None)
    rest = ("block", "token", True, 0, True, True, False, None, 0)
    torch.library.opcheck(ops_quantize.quantize, (*arguments, *rest))


def test_streams_and_graphs():
    q, k, v = random_qkv()
    expected = in_cpu_memory(quantize(q, k, v))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = quantize(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantize(q, k, v)
    q.mul_(2)
    graph.replay()
    assert_same(captured, in_cpu_memory(quantize(q, k, v)))
