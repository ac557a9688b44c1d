"""Blocks in clusters that share their loads of K and V: tiles with and without a partner."""

import pytest
import torch
from checking import DEVICE, DTYPES, Problem, attention, check, name

import hopper_attention

# The kernels that can: (head_dim, head_dim_v), and keys enough for it and for those kernels.
KEYS = {(96, 96): 1111, (128, 128): 4361, (192, 128): 1111, (192, 192): 1111, (256, 256): 1111}
TILE = pytest.mark.parametrize("tile", KEYS, ids=name)

# By the tiles of 128 rows a head (d96 has 192): one, two, two or four with few rows in the last,
# three.
SIZES = {
    "one row": {"seqlen_q": 1},
    "one tile": {"seqlen_q": 128},
    "one row in the second": {"seqlen_q": 129},
    "a consumer without rows": {"seqlen_q": 190},
    "three": {"seqlen_q": 300, "heads": 2, "heads_kv": 1},
    "one row in the fourth": {"seqlen_q": 385, "batch": 1},
    "many sequences": {"seqlen_q": 129, "batch": 70, "heads": 2},
    "many sequences, three": {"seqlen_q": 257, "batch": 40, "heads": 2, "heads_kv": 1},
    "many heads": {"seqlen_q": 700, "heads": 24, "heads_kv": 8},
}


def problem(tile, dtype=torch.bfloat16, **sizes):
    return Problem(seqlen_k=KEYS[tile], head_dim=tile[0], head_dim_v=tile[1], dtype=dtype).but(
        **sizes
    )


@TILE
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_tiles_with_and_without_a_partner(dtype, sizes, tile):
    q, k, v = problem(tile, dtype, **sizes).inputs()
    plan = hopper_attention.explain(q, k, v)
    assert plan.mask == "full"
    if plan.num_tiles <= 16:  # on any device one round, or as many either way
        assert plan.cluster == (2 if sizes["seqlen_q"] > plan.tile_m else 1)
    check(q, k, v)


@TILE
def test_clusters_change_no_bit(tile):
    """With a margin every block is alone."""
    q, k, v = problem(tile, seqlen_q=1000, batch=3, heads=10, heads_kv=5).inputs()
    assert hopper_attention.explain(q, k, v).cluster == 2
    assert hopper_attention.explain(q, k, v, sm_margin=1).cluster == 1
    alone = attention(q, k, v, sm_margin=1)
    for _ in range(20):
        for one, other in zip(attention(q, k, v), alone, strict=True):
            assert torch.equal(one, other)


@TILE
def test_clusters_beside_a_kernel_that_holds_multiprocessors(tile):
    q, k, v = problem(tile, seqlen_q=2048, batch=4, heads=8).inputs()
    assert hopper_attention.explain(q, k, v).cluster == 2
    expected = attention(q, k, v, sm_margin=1)
    other = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(side):
            other @ other
        for one, want in zip(attention(q, k, v), expected, strict=True):
            assert torch.equal(one, want)
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("tile", [(96, 96), (192, 128), (192, 192), (256, 256)], ids=name)
@pytest.mark.parametrize("seqlen_k", [0, 1, 80, 400, 1023, 1024, 1025, 1120, 1121, 1151])
def test_ends_of_keys(seqlen_k, tile):
    for seqlen_q in (129, 300):
        check(*problem(tile, seqlen_q=seqlen_q).but(seqlen_k=seqlen_k).inputs())
