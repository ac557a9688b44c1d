"""Sequence lengths, head counts and batch sizes, down to none."""

import math

import pytest
import torch
from checking import TILES, Problem, attention, check, name

import hopper_attention

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])

LENGTHS = [
    *[(1, 1), (1, 2), (2, 1), (3, 3), (1, 129), (1, 1000), (64, 1), (2, 4096)],
    *[(63, 63), (64, 64), (65, 65), (127, 129), (128, 128), (129, 127)],
    *[(509, 509), (1021, 1021), (997, 1009), (1009, 997), (127, 521), (521, 127)],
    *[(191, 300), (192, 300), (193, 300), (1000, 1), (1500, 1500)],
]


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("lengths", LENGTHS, ids=name)
def test_lengths(lengths, head_dim, causal):
    problem = Problem(seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=head_dim)
    check(*problem.inputs(), causal=causal)


@CAUSAL
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_lengths_one_off_a_tile(tile, causal):
    problem = Problem(batch=1, heads=2, head_dim=tile[0], head_dim_v=tile[1])
    plan = hopper_attention.explain(*problem.inputs(), causal=causal)
    for seqlen_q in (plan.tile_m - 1, plan.tile_m, plan.tile_m + 1):
        for blocks in (1, 2, 3, 4):
            for seqlen_k in range(blocks * plan.tile_n - 1, blocks * plan.tile_n + 2):
                sizes = problem.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
                check(*sizes.inputs(), causal=causal)


@CAUSAL
@pytest.mark.parametrize("lengths", [(1, 0), (200, 0), (0, 200), (0, 0)], ids=name)
def test_no_keys_or_no_queries(lengths, causal):
    problem = Problem(seqlen_q=lengths[0], seqlen_k=lengths[1])
    out, lse = check(*problem.inputs(), causal=causal)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}], ids=name)
def test_no_sequences_or_no_heads(sizes):
    q, k, v = Problem().but(**sizes).inputs()
    out, lse = attention(q, k, v)
    assert out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])


@HEAD_DIM
@pytest.mark.parametrize("lengths", [(300, 7), (500, 1), (400, 250), (131, 130)], ids=name)
def test_rows_that_see_no_key_are_zero(lengths, head_dim):
    seqlen_q, seqlen_k = lengths
    problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
    out, lse = check(*problem.inputs(), causal=True)
    empty = seqlen_q - seqlen_k
    assert not out[:, :empty].any()
    assert (lse[:, :, :empty] == -math.inf).all()
    assert lse[:, :, empty:].isfinite().all()
    # the first row that sees a key sees only that one
    torch.testing.assert_close(out[:, empty], problem.inputs()[2][:, 0], rtol=0, atol=0)


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (8, 1), (6, 3), (5, 1), (1, 1)], ids=name)
def test_grouped_and_single_kv_heads(heads, head_dim, causal):
    problem = Problem(
        seqlen_q=257, seqlen_k=300, head_dim=head_dim, heads=heads[0], heads_kv=heads[1]
    )
    check(*problem.inputs(), causal=causal)


@CAUSAL
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 5, "heads": 7, "seqlen_q": 1000, "seqlen_k": 1000},
        {"batch": 13, "heads": 11, "seqlen_q": 130, "seqlen_k": 520},
        {"batch": 1, "heads": 131, "seqlen_q": 128, "seqlen_k": 128},
        {"batch": 1, "heads": 133, "seqlen_q": 128, "seqlen_k": 128},
        {"batch": 300, "heads": 1, "seqlen_q": 5, "seqlen_k": 5},
        {"batch": 1, "heads": 4099, "seqlen_q": 3, "seqlen_k": 3},
        {"batch": 66_000, "heads": 1, "seqlen_q": 3, "seqlen_k": 3},
    ],
    ids=name,
)
def test_more_and_fewer_tiles_than_multiprocessors(sizes, causal):
    check(*Problem(head_dim=64).but(**sizes).inputs(), causal=causal)


@CAUSAL
def test_long_prime_lengths(causal):
    problem = Problem(batch=1, heads=2, heads_kv=1, head_dim=64, seqlen_q=8191, seqlen_k=16_381)
    check(*problem.inputs(), causal=causal)
