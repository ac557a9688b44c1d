"""Gradients of packed batches: lengths, masks, head dimensions and layouts against float64."""

import importlib.resources
import json
import random

import pytest
import test_varlen
import torch
from backward_checking import draw, draw_dlse, same_bits
from checking import DTYPES, TILES, name
from test_varlen import CORNERS, heads_outside, odd_address, of_tile, padded
from varlen_backward_checking import Call, check, check_batch, compare, gradients
from varlen_checking import KEYS, ROWS, Packed, cumulate

import hopper_attention
from hopper_attention import _library
from hopper_attention.checks_varlen import Lengths

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
ORDER = pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
TILE = pytest.mark.parametrize("tile", TILES, ids=name)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
MASKS = [{"window_size": (100, 30)}, {"window_size": (50, -1), "causal": True}]
GROUPED = {"heads": 4, "heads_kv": 2}


@ORDER
@CAUSAL
@TILE
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_lengths_of_every_kind(dtype, tile, causal, deterministic):
    batch = of_tile(tile, dtype=dtype, behind=37, **GROUPED)
    check_batch(batch, causal=causal, deterministic=deterministic)


@CAUSAL
@TILE
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_softcap(dtype, tile, causal):
    # Their kernels serve packed and dense batches
    batch = of_tile(tile, dtype=dtype, **GROUPED)
    check_batch(batch, causal=causal, softcap=15.0)


def test_the_tests_above_run_all_that_is_compiled():
    tested = {
        f"backward_{dtype}_d{dims[0]}{'' if dims[0] == dims[1] else f'x{dims[1]}'}_{mask}"
        for dtype in ("fp16", "bf16")
        for dims in TILES
        for mask in ("packed", "capped")
    }
    compiled = {x for x in _library.load().instances() if x.startswith("backward")}
    compiled = {x for x in compiled if x.endswith(("_packed", "_capped"))}
    assert compiled
    assert compiled <= tested


@pytest.mark.parametrize("options", MASKS, ids=name)
@TILE
def test_windows(tile, options):
    for deterministic in (False, True):
        check_batch(of_tile(tile, **GROUPED), deterministic=deterministic, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, *MASKS, {"softcap": 9.0}], ids=name)
@TILE
def test_used_lengths(tile, options):
    used_q = tuple(min(n, max(2 * n // 3, 1)) for n in ROWS)
    used_k = tuple(n // 2 for n in KEYS)
    check_batch(of_tile(tile, used_q=used_q, used_k=used_k, behind=70, **GROUPED), **options)


def tile_sizes(tile):
    """Rows and keys of the kernel's tile."""
    stored = importlib.resources.files(hopper_attention).joinpath("backward_tiles.json")
    (row,) = (
        row
        for row in json.loads(stored.read_text())
        if (row["dtype"], row["mask"]) == ("bfloat16", "packed")
        and (row["head_dim"], row["head_dim_v"]) == tile
    )
    return row["tile_m"], row["tile_n"]


@CAUSAL
@TILE
def test_lengths_one_off_a_tile(tile, causal):
    tile_m, tile_n = tile_sizes(tile)
    pairs = [
        (rows, blocks * tile_n + off)
        for rows in (tile_m - 1, tile_m, tile_m + 1, 2 * tile_m)
        for blocks in (1, 2)
        for off in (-1, 0, 1)
    ]
    rows, keys = zip(*pairs, strict=True)
    check_batch(of_tile(tile, rows=rows, keys=keys, heads=2), causal=causal)


@ORDER
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 9.0}, *MASKS], ids=name)
def test_clusters_that_end_in_a_block_without_keys(options, deterministic):
    # At head dimension 256 two blocks of 64 keys are an entry of the list
    keys = (1, 64, 65, 128, 129, 0, 192, 193, 320)
    batch = Packed(rows=(70,) * len(keys), keys=keys, head_dim=256, **GROUPED)
    used = (None, tuple(n // 3 for n in keys), tuple(min(n, 64) for n in keys))
    for used_k in used:
        check_batch(batch.but(used_k=used_k, behind=70), deterministic=deterministic, **options)


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner, head_dim, causal):
    batch = Packed(head_dim=head_dim).but(**CORNERS[corner])
    check_batch(batch, causal=causal, deterministic=True)


@ORDER
@pytest.mark.parametrize("sizes", [{"heads": 0, "heads_kv": 0}, {"rows": (), "keys": (3,)}])
def test_nothing_to_differentiate(sizes, deterministic):
    batch = Packed().but(**sizes)
    inputs, dout = draw(batch)
    lengths = Lengths(cumulate((0,)), cumulate((3,)))
    found = gradients(inputs, lengths, dout, deterministic=deterministic)
    for grad, x in zip(found, inputs, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@CAUSAL
@HEAD_DIM
def test_hundreds_of_sequences(head_dim, causal):
    generator = random.Random(3)
    rows, keys = (tuple(generator.randint(0, 40) for _ in range(300)) for _ in "qk")
    batch = Packed(rows=rows, keys=keys, head_dim=head_dim, heads=2, heads_kv=1)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    dq, dk, dv = check(inputs, lengths, dout, causal=causal)
    fixed = gradients(inputs, lengths, dout, causal=causal, deterministic=True)
    assert same_bits(fixed[1:], (dk, dv))
    torch.testing.assert_close(fixed[0], dq, rtol=2.0**-6, atol=2.0**-8)


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 9.0}, *MASKS], ids=name)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_more_sequences_of_several_tiles_than_multiprocessors(head_dim, options):
    # Up to head dimension 128 a block takes one tile after another, of whichever sequence
    generator = random.Random(4)
    rows, keys = (tuple(generator.randint(0, 600) for _ in range(150)) for _ in "qk")
    batch = Packed(rows=rows, keys=keys, head_dim=head_dim, behind=200, **GROUPED)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    _, dk, dv = check(inputs, lengths, dout, **options)
    call = Call(inputs, lengths, deterministic=True, **options)
    first = call.gradients(dout)
    compare(first, inputs, lengths, dout, **options)
    assert same_bits(first[1:], (dk, dv))
    for _ in range(20):
        assert same_bits(call.gradients(dout), first)


@CAUSAL
@ORDER
def test_thousands_of_sequences_are_each_as_if_alone(deterministic, causal):
    # All of the same values, so that one tells what all should be
    batch = Packed(rows=(15,) * 3000, keys=None, head_dim=64, heads=2, heads_kv=1)
    one = batch.but(rows=(15,))
    inputs, dout = draw(one)
    expected = check(inputs, one.lengths(), dout, causal=causal)
    many = [x.repeat(3000, 1, 1) for x in (*inputs, dout)]
    found = gradients(
        many[:3], batch.lengths(), many[3], causal=causal, deterministic=deterministic
    )
    for grad, wanted in zip(found, expected, strict=True):
        assert torch.equal(grad.unflatten(0, (3000, 15)), wanted.expand(3000, *wanted.shape))


PAIRS = [(8, 8), (40, 24), (72, 72), (120, 120), (160, 128), (192, 64), (248, 248)]


@CAUSAL
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_head_dims_that_are_not_a_tiles(pair, causal):
    for dtype in DTYPES:
        check_batch(of_tile(pair, dtype=dtype, **GROUPED), causal=causal)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.01, 1.0])
def test_scales(scale):
    check_batch(Packed(), softmax_scale=scale, causal=True)


@pytest.mark.parametrize("window", [(0, 0), (-1, 0), (17, -1), (2**40, 5), (128, 0), (5000, 5000)])
def test_more_windows(window):
    check_batch(Packed(), window_size=window)


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("behind", [0, 100])
def test_the_log_sum_exps_gradient(behind, head_dim, causal):
    batch = Packed(head_dim=head_dim, behind=behind, used_q=tuple(n // 2 for n in ROWS), **GROUPED)
    inputs, dout = draw(batch)
    dlse = draw_dlse(inputs[0])
    check(inputs, batch.lengths(), dout, dlse, causal=causal)
    _, _, dv = check(inputs, batch.lengths(), None, dlse, causal=causal)
    assert not dv.any()


@CAUSAL
@TILE
def test_equal_lengths_give_the_dense_calls_gradients(tile, causal):
    batch = of_tile(tile, rows=(333,) * 4, keys=(461,) * 4)
    inputs, dout = draw(batch)
    found = gradients(inputs, batch.lengths(), dout, causal=causal, deterministic=True)
    leaves = [x.unflatten(0, (4, -1)).requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = hopper_attention.flash_attn_func(*leaves, causal=causal, deterministic=True)
    dense = torch.autograd.grad(out, leaves, dout.unflatten(0, (4, -1)))
    for grad, wanted in zip(found, dense, strict=True):
        torch.testing.assert_close(grad, wanted.flatten(0, 1), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("layout", [heads_outside, padded, odd_address])
def test_layouts(layout, head_dim):
    batch = Packed(head_dim=head_dim, behind=5, **GROUPED)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    options = {"causal": True, "deterministic": True}
    expected = check(inputs, lengths, dout, **options)
    plain = (*inputs, dout)
    moved = [layout(x) for x in plain]
    for which in ({0}, {1}, {2}, {3}, {0, 1, 2, 3}):
        q, k, v, grad = (moved[i] if i in which else plain[i] for i in range(4))
        found = gradients((q, k, v), lengths, grad, **options)
        for one, wanted in zip(found, expected, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one, wanted)


def test_one_value_for_all_of_the_outputs_gradient():
    batch = Packed(**GROUPED)
    inputs, dout = draw(batch)
    call = Call(inputs, batch.lengths(), causal=True, deterministic=True)
    one = torch.ones((), dtype=dout.dtype, device=dout.device)
    expected = call.gradients(torch.ones_like(dout))
    for grad, wanted in zip(call.gradients(one.expand(dout.shape)), expected, strict=True):
        assert torch.equal(grad, wanted)


def test_random_batches(fuzz_case):
    seed, index = fuzz_case
    generator = random.Random(f"varlen-backward-{seed}-{index}")
    batch, options = test_varlen.draw(generator)
    inputs, dout = draw(batch, seed=index)
    dlse = draw_dlse(inputs[0], seed=index) if generator.random() < 0.3 else None
    deterministic = generator.random() < 0.5
    check(inputs, batch.lengths(), dout, dlse, deterministic=deterministic, **options)
