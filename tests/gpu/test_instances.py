"""Every compiled kernel, and every head dimension that runs in one."""

import pytest
from checking import DTYPES, TILES, Problem, check, name

import hopper_attention
from hopper_attention import _library

MASKS = {"full": {}, "masked": {"causal": True}, "short": {"causal": True}}
SHORT_TILE = (64, 64)  # alone has a kernel for rows that see few keys
GROUPED = Problem(seqlen_q=333, seqlen_k=461, batch=2, heads=4, heads_kv=2)
# Full problems with few keys may run in the masked kernel; these run in the full one.
LONG = GROUPED.but(seqlen_k=4361)


def instance_problem(dtype, tile, mask):
    if mask == "short" and tile != SHORT_TILE:
        pytest.skip("no kernel for few keys")
    problem = LONG if mask == "full" or (mask, tile) == ("masked", SHORT_TILE) else GROUPED
    return problem.but(head_dim=tile[0], head_dim_v=tile[1], dtype=dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_instance(dtype, tile, mask):
    q, k, v = instance_problem(dtype, tile, mask).inputs()
    options = MASKS[mask]
    plan = hopper_attention.explain(q, k, v, **options)
    assert (plan.head_dim_tile, plan.head_dim_v_tile, plan.mask) == (*tile, mask)
    assert not plan.copies
    if not plan.compiled:
        pytest.skip(f"this build leaves out {plan.instance}")
    check(q, k, v, **options)


def test_the_test_above_runs_all_that_is_compiled():
    tested = set()
    for dtype in DTYPES:
        for tile in TILES:
            for mask, options in MASKS.items():
                if mask == "short" and tile != SHORT_TILE:
                    continue
                problem = instance_problem(dtype, tile, mask)
                tested.add(hopper_attention.explain(*problem.inputs(), **options).instance)
    # Those of e4m3 are test_fp8.py's, those of the backward pass test_backward.py's, and those of
    # packed batches test_varlen.py's.
    others = ("e4m3", "backward")
    names = [name for name in _library.load().instances() if not name.startswith(others)]
    compiled = {name for name in names if not name.endswith("_packed")}
    assert compiled <= tested


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (1100, 20)}, {"window_size": (20, 1100)}, {"softcap": 9.0}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(1301, 1301), (2000, 1301), (1301, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_many_keys_at_the_head_dim_that_has_a_kernel_for_few(dtype, lengths, options):
    problem = GROUPED.but(seqlen_q=lengths[0], seqlen_k=lengths[1], dtype=dtype)
    q, k, v = problem.but(head_dim=64, head_dim_v=64).inputs()
    plan = hopper_attention.explain(q, k, v, **options)
    assert plan.mask == "masked"
    if not plan.compiled:
        pytest.skip(f"this build leaves out {plan.instance}")
    check(q, k, v, **options)


OTHER_HEAD_DIMS = [8, 16, 24, 32, 40, 56, 72, 80, 88, 104, 112, 120]
OTHER_HEAD_DIMS += [136, 144, 160, 168, 184, 200, 208, 224, 240, 248]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_head_dims_that_are_not_a_tiles(head_dim, causal):
    for dtype in DTYPES:
        problem = Problem(seqlen_q=150, seqlen_k=270, head_dim=head_dim, dtype=dtype)
        check(*problem.inputs(), causal=causal)


PAIRS = [(64, 32), (64, 8), (64, 96), (64, 128), (128, 64), (96, 128), (128, 40), (136, 120)]
PAIRS += [(160, 128), (192, 128), (192, 64), (192, 8), (8, 128), (40, 24), (184, 104)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_v_with_a_head_dim_of_its_own(pair, causal):
    for dtype in DTYPES:
        problem = Problem(
            seqlen_q=150, seqlen_k=270, head_dim=pair[0], head_dim_v=pair[1], dtype=dtype
        )
        check(*problem.inputs(), causal=causal)
