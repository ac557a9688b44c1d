"""Packed batches: lengths, masks, head dimensions and layouts against float64."""

import math
import random

import pytest
import torch
from checking import DTYPES, TILES, name
from varlen_checking import KEYS, ROWS, Packed, attention, check, cumulate

import hopper_attention
from hopper_attention import _library
from hopper_attention.checks_varlen import Lengths

OPTIONS = [{}, {"causal": True}, {"window_size": (100, 30)}, {"causal": True, "softcap": 5.0}]
MASKS = pytest.mark.parametrize("options", OPTIONS, ids=name)
TILE = pytest.mark.parametrize("tile", TILES, ids=name)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])


def of_tile(tile, **changes):
    return Packed(head_dim=tile[0], head_dim_v=tile[1], **changes)


@MASKS
@TILE
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_lengths_of_every_kind(dtype, tile, options):
    batch = of_tile(tile, dtype=dtype)
    check(*batch.inputs(), batch.lengths(), **options)


@MASKS
@TILE
def test_used_lengths(tile, options):
    used_q = tuple(min(n, max(2 * n // 3, 1)) for n in ROWS)
    batch = of_tile(tile, used_q=used_q, used_k=tuple(n // 2 for n in KEYS))
    check(*batch.inputs(), batch.lengths(), **options)


def instance_of(batch):
    named = {n: x for n, x in batch.lengths()._asdict().items() if x is not None}
    return hopper_attention.explain(*batch.inputs(), **named)


def test_the_tests_above_run_all_that_is_compiled():
    tested = set()
    for dtype in DTYPES:
        for tile in TILES:
            plan = instance_of(of_tile(tile, dtype=dtype))
            assert (plan.head_dim_tile, plan.head_dim_v_tile, plan.mask) == (*tile, "packed")
            tested.add(plan.instance)
    # Those of the backward pass are test_varlen_backward.py's.
    names = [x for x in _library.load().instances() if not x.startswith("backward")]
    assert {x for x in names if x.endswith("_packed")} <= tested


@CAUSAL
@TILE
def test_lengths_one_off_a_tile(tile, causal):
    plan = instance_of(of_tile(tile))
    pairs = [
        (rows, blocks * plan.tile_n + off)
        for rows in (plan.tile_m - 1, plan.tile_m, plan.tile_m + 1)
        for blocks in (1, 2, 3)
        for off in (-1, 0, 1)
    ]
    rows, keys = zip(*pairs, strict=True)
    batch = of_tile(tile, rows=rows, keys=keys, heads=2)
    check(*batch.inputs(), batch.lengths(), causal=causal)


CORNERS = {
    "rows behind the last sequence": {"behind": 333},
    "no sequences": {"rows": (), "keys": (), "behind": 200},
    "one sequence": {"rows": (300,), "keys": (500,)},
    "empty sequences only": {"rows": (0, 0, 0), "keys": (0, 7, 0), "behind": 3},
    "no keys": {"rows": (3, 200), "keys": (0, 0)},
    "nothing used": {"used_q": (0,) * len(ROWS), "used_k": (0,) * len(ROWS)},
    "some used": {"rows": (50, 60, 70), "used_q": (0, 60, 1), "keys": None, "used_k": (50, 0, 70)},
    "many keys": {"rows": (1, 2, 3), "keys": (4099, 8191, 1), "heads": 2},
    "long": {"rows": (3000, 64, 700, 5000), "keys": None, "heads": 2, "heads_kv": 2},
    "more queries than keys": {"rows": (700, 1300, 129, 400, 256), "keys": (100, 128, 1, 0, 255)},
    "few used of many": {
        "rows": (500, 300, 128, 900),
        "used_q": (400, 1, 0, 900),
        "keys": None,
        "used_k": (3, 128, 128, 0),
        "behind": 200,
    },
    "few rows before many of nobody's": {"rows": (20, 30), "keys": None, "behind": 4000},
    "one head": {"heads": 1, "heads_kv": 1},
    "mqa": {"heads": 8, "heads_kv": 1},
}


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner, head_dim, causal):
    batch = Packed(head_dim=head_dim).but(**CORNERS[corner])
    check(*batch.inputs(), batch.lengths(), causal=causal)


@pytest.mark.parametrize("sizes", [{"heads": 0, "heads_kv": 0}, {"rows": (), "keys": (3,)}])
def test_no_output(sizes):
    batch = Packed().but(**sizes)
    lengths = Lengths(cumulate((0,)), cumulate((3,)))
    out, lse = attention(*batch.inputs(), lengths)
    assert out.shape[:2] == (sum(batch.rows), batch.heads)
    assert lse.shape == (batch.heads, sum(batch.rows))


@CAUSAL
@HEAD_DIM
def test_thousands_of_sequences(head_dim, causal):
    generator = random.Random(3)
    rows = tuple(generator.randint(0, 40) for _ in range(2000))
    batch = Packed(rows=rows, keys=None, head_dim=head_dim, heads=2, heads_kv=1)
    check(*batch.inputs(), batch.lengths(), causal=causal)


@TILE
def test_tiles_without_keys_again_and_again(tile):
    """Where O lies on V, such a tile was once over before the producer had come to it."""
    keys = (0, 300, 0, 0, 5, 0, 0, 0, 130, 0) * 6
    batch = of_tile(tile, rows=(200, 300, 129, 64, 1) * 12, keys=keys, heads=8, heads_kv=4)
    inputs, lengths = batch.inputs(), batch.lengths()
    for _ in range(100):
        attention(*inputs, lengths, causal=True)
    check(*inputs, lengths, causal=True)


@HEAD_DIM
def test_many_tiles_of_few_key_blocks(head_dim):
    generator = random.Random(4)
    rows = tuple(generator.randint(0, 640) for _ in range(150))
    keys = tuple(max(n + generator.choice((-200, -1, 0, 0, 0, 1)), 0) for n in rows)
    batch = Packed(rows=rows, keys=keys, head_dim=head_dim, heads=16, heads_kv=4)
    check(*batch.inputs(), batch.lengths(), causal=True)


# 1,024 threads list the tiles, and find them twice where one of them has several.
LISTS = {
    "a tile a thread": {"rows": (1,) * 992 + (257,), "keys": None},
    "a thread with two": {"rows": (1,) * 1024, "keys": None, "behind": 1},
    "one long sequence": {"rows": (1024 * 192 + 1,), "keys": (3,)},
    "a long one among others": {"rows": (5,) * 40 + (40 * 192,) + (0, 200) * 9, "keys": None},
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_tiles(name):
    batch = Packed(heads=2, heads_kv=1).but(**LISTS[name])
    check(*batch.inputs(), batch.lengths(), causal=True)


@CAUSAL
@pytest.mark.parametrize("pair", [(8, 8), (40, 24), (72, 72), (120, 120), (160, 128), (248, 248)])
def test_head_dims_that_are_not_a_tiles(pair, causal):
    for dtype in DTYPES:
        batch = of_tile(pair, dtype=dtype)
        check(*batch.inputs(), batch.lengths(), causal=causal)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.01, 1.0])
def test_scales(scale):
    batch = Packed()
    check(*batch.inputs(), batch.lengths(), softmax_scale=scale, causal=True)


@pytest.mark.parametrize("window", [(0, 0), (-1, 0), (17, -1), (2**40, 5), (128, 0), (5000, 5000)])
def test_windows(window):
    batch = Packed()
    check(*batch.inputs(), batch.lengths(), window_size=window)


@HEAD_DIM
@pytest.mark.parametrize("window", [(5, 0), (200, 0)])
def test_windows_ahead_of_the_first_key(window, head_dim):
    batch = Packed(rows=(700, 300, 900, 256), keys=(700, 1000, 100, 128), head_dim=head_dim)
    check(*batch.inputs(), batch.lengths(), window_size=window)


def test_first_rows_that_see_no_key_are_zero():
    batch = Packed(rows=(300, 500), keys=(7, 1), heads=2)
    out, lse = check(*batch.inputs(), batch.lengths(), causal=True)
    for rows in (slice(0, 293), slice(300, 799)):
        assert not out[rows].any()
        assert (lse[:, rows] == -math.inf).all()


@CAUSAL
@HEAD_DIM
def test_equal_lengths_give_the_dense_calls_result(head_dim, causal):
    batch = Packed(rows=(333,) * 4, keys=(461,) * 4, head_dim=head_dim)
    q, k, v = batch.inputs()
    out, lse = check(q, k, v, batch.lengths(), causal=causal)
    dense, dense_lse = hopper_attention.flash_attn_func(
        *(x.unflatten(0, (4, -1)) for x in (q, k, v)), causal=causal, return_attn_probs=True
    )
    torch.testing.assert_close(out, dense.flatten(0, 1), rtol=2.0**-6, atol=2.0**-8)
    dense_lse = dense_lse.transpose(0, 1).flatten(1)
    torch.testing.assert_close(lse, dense_lse, rtol=1e-5, atol=1e-5)


def heads_outside(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def padded(x):
    around = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 8), math.nan, dtype=x.dtype)
    return around.to(x.device)[:, 1:, : x.shape[2]].copy_(x)


def odd_address(x):
    flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)[1:]
    return flat.view(x.shape).copy_(x)


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("layout, copies", [(heads_outside, 0), (padded, 0), (odd_address, 3)])
def test_layouts(layout, copies, head_dim):
    batch = Packed(head_dim=head_dim, behind=5)
    q, k, v = batch.inputs()
    lengths = batch.lengths()
    expected = check(q, k, v, lengths, causal=True)
    moved = [layout(x) for x in (q, k, v)]
    named = {"cu_seqlens_q": lengths.cu_seqlens_q, "cu_seqlens_k": lengths.cu_seqlens_k}
    assert len(hopper_attention.explain(*moved, **named).copies) == copies
    for mixed in (moved, [moved[0], k, v], [q, moved[1], v], [q, k, moved[2]]):
        found = attention(*mixed, lengths, causal=True)
        for tensor, wanted in zip(found, expected, strict=True):
            assert tensor.is_contiguous()
            assert torch.equal(tensor, wanted)


def draw(generator):
    """A batch and options, with the corners more often than chance would have them."""

    def length():
        kind = generator.random()
        if kind < 0.3:
            return generator.randint(0, 3)
        if kind < 0.6:
            return max(0, 16 * generator.randint(1, 16) + generator.randint(-1, 1))
        return generator.randint(1, 500)

    if generator.random() < 0.5:
        head_dim, head_dim_v = generator.choice(TILES)
    else:
        head_dim = head_dim_v = 8 * generator.randint(1, 32)
        if head_dim <= 192 and generator.random() < 0.3:
            head_dim_v = 8 * generator.randint(1, 16)
    size, heads_kv = generator.randint(0, 12), generator.randint(1, 4)
    rows, keys = (tuple(length() for _ in range(size)) for _ in "qk")
    used = [
        tuple(generator.randint(0, n) for n in x) if generator.random() < 0.3 else None
        for x in (rows, keys)
    ]
    batch = Packed(
        rows,
        keys,
        *used,
        behind=generator.choice([0, 0, 1, generator.randint(0, 300)]),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads=heads_kv * generator.choice([1, 2, 3, 8]),
        heads_kv=heads_kv,
        dtype=generator.choice(DTYPES),
    )
    options = {}
    if generator.random() < 0.5:
        options["causal"] = True
    if generator.random() < 0.3:
        sides = [-1, 0, generator.randint(0, 20), generator.randint(0, 700)]
        options["window_size"] = (generator.choice(sides), generator.choice(sides))
    if generator.random() < 0.15:
        options["softcap"] = generator.uniform(5.0, 50.0)
    if generator.random() < 0.2:
        options["softmax_scale"] = generator.choice([0.0, -0.1, 0.01, 0.5])
    if generator.random() < 0.2:
        options["sm_margin"] = generator.randint(1, 140)
    return batch, options


def test_random_batches(fuzz_case):
    seed, index = fuzz_case
    batch, options = draw(random.Random(f"varlen-{seed}-{index}"))
    check(*batch.inputs(seed=index), batch.lengths(), **options)
