"""Gradients at sequence lengths, masks and numbers of tiles, down to none."""

import importlib.resources
import json

import pytest
from backward_checking import check, check_problem, draw, draw_dlse, gradients
from checking import TILES, Problem, name

import hopper_attention

HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
TILE = pytest.mark.parametrize("tile", TILES, ids=name)

LENGTHS = [
    *[(1, 1), (1, 2), (2, 1), (3, 3), (1, 129), (1, 1000), (64, 1), (2, 2039)],
    *[(63, 63), (64, 64), (65, 65), (127, 129), (128, 128), (129, 127)],
    *[(509, 509), (1021, 1021), (997, 1009), (1009, 997), (127, 521), (521, 127)],
    *[(191, 300), (192, 300), (193, 300), (1000, 1)],
]


def of_tile(tile, **sizes):
    return Problem(head_dim=tile[0], head_dim_v=tile[1]).but(**sizes)


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("lengths", LENGTHS, ids=name)
def test_lengths(lengths, head_dim, causal):
    problem = Problem(seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=head_dim)
    check_problem(problem, causal=causal)


def tile_sizes(tile, causal):
    """Rows and keys of the kernel's tile."""
    stored = importlib.resources.files(hopper_attention).joinpath("backward_tiles.json")
    mask = "masked" if causal else "full"
    (row,) = (
        row
        for row in json.loads(stored.read_text())
        if (row["dtype"], row["mask"]) == ("bfloat16", mask)
        and (row["head_dim"], row["head_dim_v"]) == tile
    )
    return row["tile_m"], row["tile_n"]


@CAUSAL
@TILE
def test_lengths_one_off_a_tile(tile, causal):
    tile_m, tile_n = tile_sizes(tile, causal)
    for seqlen_q in (tile_m - 1, tile_m, tile_m + 1, 3 * tile_m + 1):
        for blocks in (1, 2, 3):
            for seqlen_k in range(blocks * tile_n - 1, blocks * tile_n + 2):
                problem = of_tile(tile, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1, heads=2)
                check_problem(problem, causal=causal)


@CAUSAL
@TILE
@pytest.mark.parametrize("lengths", [(1, 0), (200, 0), (0, 200), (0, 1), (0, 0)], ids=name)
def test_no_keys_or_no_queries(lengths, tile, causal):
    inputs, dout = draw(of_tile(tile, seqlen_q=lengths[0], seqlen_k=lengths[1]))
    for deterministic in (False, True):
        options = {"causal": causal, "deterministic": deterministic}
        for found in (
            check(inputs, dout, **options),
            check(inputs, dout, draw_dlse(inputs[0]), **options),
        ):
            assert not any(x.any() for x in found)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}], ids=name)
def test_no_sequences_or_no_heads(sizes):
    inputs, dout = draw(Problem().but(**sizes))
    found = gradients(inputs, dout, causal=True)
    assert [x.shape for x in found] == [x.shape for x in inputs]


@TILE
@pytest.mark.parametrize("lengths", [(300, 7), (500, 1), (400, 250), (131, 130)], ids=name)
def test_rows_that_see_no_key_have_no_gradient(lengths, tile):
    seqlen_q, seqlen_k = lengths
    for deterministic in (False, True):
        dq, _, dv = check_problem(
            of_tile(tile, seqlen_q=seqlen_q, seqlen_k=seqlen_k),
            causal=True,
            deterministic=deterministic,
        )
        assert not dq[:, : seqlen_q - seqlen_k].any()
        assert dv.any()


@CAUSAL
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 5, "heads": 7, "seqlen_q": 700, "seqlen_k": 700},
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
    for deterministic in (False, True):
        problem = Problem(head_dim=64).but(**sizes)
        check_problem(problem, causal=causal, deterministic=deterministic)


# Up to head dimension 128 a block takes one tile of keys after another. These have two to five a
# block; of "keys_unseen" most have no queries.
MANY_TILES = {
    "square": ({"batch": 4, "heads": 16, "seqlen_q": 1000, "seqlen_k": 1024}, {"causal": True}),
    "ragged": ({"batch": 4, "heads": 16, "heads_kv": 8, "seqlen_q": 500, "seqlen_k": 1030}, {}),
    "grouped": (
        {"batch": 8, "heads": 12, "heads_kv": 6, "seqlen_q": 333, "seqlen_k": 1100},
        {"causal": True},
    ),
    "keys_unseen": (
        {"batch": 3, "heads": 16, "seqlen_q": 200, "seqlen_k": 1500},
        {"window_size": (70, 20)},
    ),
    "softcap": (  # a tile a block
        {"batch": 3, "heads": 16, "heads_kv": 8, "seqlen_q": 300, "seqlen_k": 1500},
        {"softcap": 15.0, "window_size": (200, 50)},
    ),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@pytest.mark.parametrize("case", MANY_TILES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_blocks_that_take_many_tiles(head_dim, case, deterministic):
    sizes, options = MANY_TILES[case]
    problem = Problem(head_dim=head_dim).but(**sizes)
    check_problem(problem, deterministic=deterministic, **options)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_v_with_a_head_dim_of_its_own_in_many_tiles(head_dim):
    sizes, options = MANY_TILES["square"]
    check_problem(Problem(head_dim=head_dim, head_dim_v=40).but(**sizes), **options)


# At head dimension 256 blocks of 64 keys come in clusters of two that go through the same queries.
CLUSTERED = Problem(head_dim=256, batch=2, heads=3, heads_kv=1)
NARROW = [(0, 0), (5, -1), (-1, 5), (70, 0), (0, 70)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@pytest.mark.parametrize("seqlen_k", [1, 63, 64, 65, 128, 129, 192, 193, 321])
def test_clusters_of_blocks_that_see_different_queries(seqlen_k, deterministic):
    # Of an odd number of blocks the last cluster has one without keys; of narrow windows most have
    # query blocks that see one of the two alone.
    masks = [{"causal": True}, *({"window_size": window} for window in NARROW)]
    for seqlen_q in (1, 64, 130, 257):
        problem = CLUSTERED.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        for options in ({}, {"softcap": 20.0}, {"causal": True, "softcap": 20.0}, *masks):
            check_problem(problem, deterministic=deterministic, **options)


@CAUSAL
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 5, "heads": 7, "seqlen_q": 300, "seqlen_k": 700},
        {"batch": 1, "heads": 66, "seqlen_q": 130, "seqlen_k": 129},
        {"batch": 1, "heads": 67, "seqlen_q": 130, "seqlen_k": 64},
        {"batch": 3, "heads": 1031, "seqlen_q": 65, "seqlen_k": 65},
        {"batch": 3000, "heads": 1, "seqlen_q": 3, "seqlen_k": 3},
    ],
    ids=name,
)
def test_more_and_fewer_clusters_than_multiprocessors(sizes, causal):
    for deterministic in (False, True):
        problem = Problem(head_dim=256).but(**sizes)
        check_problem(problem, causal=causal, deterministic=deterministic)


@CAUSAL
@pytest.mark.parametrize("lengths", [(4093, 8191), (8191, 4093)], ids=name)
def test_long_prime_lengths(lengths, causal):
    problem = Problem(
        batch=1, heads=2, heads_kv=1, head_dim=64, seqlen_q=lengths[0], seqlen_k=lengths[1]
    )
    check_problem(problem, causal=causal)


WINDOWS = [
    *[(0, 0), (1, 1), (3, 0), (0, 3), (16, 16), (63, 64), (64, 63)],
    *[(0, -1), (5, -1), (100, -1), (400, -1)],
    *[(-1, 0), (-1, 5), (-1, 100), (-1, 400)],
    *[(128, 0), (127, 1), (200, 10), (10, 200)],
    *[(199, 199), (198, 0), (2**31 - 1, 2**31 - 1), (2**40, 0)],
]


@HEAD_DIM
@pytest.mark.parametrize("window", WINDOWS, ids=name)
def test_windows(window, head_dim):
    for seqlen_q, seqlen_k in [(200, 200), (333, 500), (500, 333), (700, 64)]:
        problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
        check_problem(problem, window_size=window)


@pytest.mark.parametrize("tile", [(96, 96), (192, 128), (192, 192)], ids=name)
@pytest.mark.parametrize("window", [(0, 0), (50, -1), (-1, 50), (128, 0), (60, 60)], ids=name)
def test_windows_of_the_other_tiles(window, tile):
    for seqlen_q, seqlen_k in [(333, 500), (500, 333)]:
        check_problem(of_tile(tile, seqlen_q=seqlen_q, seqlen_k=seqlen_k), window_size=window)


@TILE
@pytest.mark.parametrize("left", [0, 1, 30, 128, 250])
def test_causal_windows(left, tile):
    for seqlen_q, seqlen_k in [(333, 500), (500, 333), (129, 130)]:
        problem = of_tile(tile, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        check_problem(problem, causal=True, window_size=(left, -1), deterministic=left == 30)


@TILE
def test_windows_skip_what_they_do_not_see(tile):
    # Whole blocks of queries see no key here, and whole blocks of keys are seen by no query
    for window in ((128, 0), (500, 100), (0, 700)):
        for seqlen_q, seqlen_k in ((2000, 500), (500, 2000), (1500, 1700)):
            problem = of_tile(
                tile, batch=1, heads=4, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k
            )
            check_problem(problem, window_size=window, deterministic=window[1] == 100)
