"""Windows, causal masks, scales and soft caps."""

import pytest
import torch
from checking import (
    DTYPES,
    ERROR_FACTOR,
    ERROR_SLACK,
    Problem,
    attention,
    check,
    largest_error,
    name,
    same_precision,
)

import hopper_attention
from hopper_attention import reference

HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
LENGTHS = [(200, 200), (333, 500), (500, 333), (64, 1000), (129, 130), (700, 64)]

WINDOWS = [
    *[(0, 0), (1, 1), (3, 0), (0, 3), (16, 16), (63, 64), (64, 63)],
    *[(0, -1), (5, -1), (100, -1), (400, -1)],
    *[(-1, 0), (-1, 5), (-1, 100), (-1, 400)],
    *[(128, 0), (127, 1), (128, 128), (200, 10), (10, 200)],
    *[(199, 199), (198, 0), (1000, 1000), (2**31 - 1, 2**31 - 1), (2**40, 0)],
]


@HEAD_DIM
@pytest.mark.parametrize("window", WINDOWS, ids=name)
def test_windows(window, head_dim):
    for seqlen_q, seqlen_k in LENGTHS:
        problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
        check(*problem.inputs(), window_size=window)


@pytest.mark.parametrize("tile", [(96, 96), (192, 128), (192, 192)], ids=name)
@pytest.mark.parametrize("window", [(0, 0), (50, -1), (-1, 50), (128, 0), (60, 60)], ids=name)
def test_windows_of_the_other_tiles(window, tile):
    for seqlen_q, seqlen_k in LENGTHS[1:4]:
        problem = Problem(
            seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=tile[0], head_dim_v=tile[1]
        )
        check(*problem.inputs(), window_size=window)


@HEAD_DIM
@pytest.mark.parametrize("left", [0, 1, 30, 128, 250])
def test_causal_windows(left, head_dim):
    for seqlen_q, seqlen_k in LENGTHS:
        problem = Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
        out, lse = check(*problem.inputs(), causal=True, window_size=(left, -1))
        same, same_lse = attention(*problem.inputs(), window_size=(left, 0))
        assert torch.equal(out, same)
        assert torch.equal(lse, same_lse)


def test_long_windows_skip_what_they_do_not_see():
    problem = Problem(batch=1, heads=4, heads_kv=1, seqlen_q=3000, seqlen_k=5000)
    for window in ((128, 0), (1000, 100), (0, 2000)):
        check(*problem.inputs(), window_size=window)


# A tile begins with the last block that it sees, and with 64 keys of it where that is enough. Rows
# see more keys than d64's kernel of few keys takes; of the last block 1, 63, 64, 65, all but one or
# all.
FIRST_BLOCKS = [
    *[{"causal": True}, {"causal": True, "softcap": 5.0}, {"causal": True, "softmax_scale": -0.1}],
    *[{"window_size": (1100, 0)}, {"window_size": (1050, 70)}, {"window_size": (-1, 30)}],
]


@pytest.mark.parametrize("options", FIRST_BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_first_blocks_of_which_few_or_many_keys_are_seen(head_dim, dtype, options):
    sizes = Problem(seqlen_q=333, head_dim=head_dim, heads=4, heads_kv=2, dtype=dtype)
    for seqlen_k in (1281, 1343, 1344, 1345, 1407, 1408, 1409, 1535):
        inputs = sizes.but(seqlen_k=seqlen_k).inputs()
        assert hopper_attention.explain(*inputs, **options).mask == "masked"
        check(*inputs, **options)
    for seqlen_q, seqlen_k in ((1600, 1300), (1300, 1600), (2, 1345), (1500, 1500)):
        check(*sizes.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k).inputs(), **options)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_first_blocks_with_a_sink(head_dim):
    for seqlen_k in (1281, 1344, 1345, 1408):
        inputs = Problem(seqlen_q=333, seqlen_k=seqlen_k, head_dim=head_dim).inputs()
        sink = torch.tensor([-3.0, 4.0, 9.0], device="cuda")
        out, lse = attention(*inputs, causal=True, learnable_sink=sink)
        exact, exact_lse = reference.attention(*inputs, causal=True, learnable_sink=sink)
        without, _ = reference.attention(*inputs, causal=True)
        usual = largest_error(same_precision(*inputs, causal=True), without)
        assert largest_error(out, exact) <= ERROR_FACTOR * usual + ERROR_SLACK
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


def test_a_window_that_reaches_everything_is_no_mask():
    problem = Problem(seqlen_q=300, seqlen_k=300)
    wide, _ = attention(*problem.inputs(), window_size=(299, 299))
    full, _ = attention(*problem.inputs())
    assert torch.equal(wide, full)


MASKS = [{}, {"causal": True}, {"window_size": (90, 20)}]


@pytest.mark.parametrize("options", MASKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("softcap", [1.0, 15.0, 50.0])
def test_softcap(softcap, dtype, options):
    for head_dim in (64, 128, 256):
        problem = Problem(seqlen_q=200, seqlen_k=333, head_dim=head_dim, dtype=dtype)
        q, k, v = problem.inputs()
        check(4 * q, k, v, softcap=softcap, **options)


@pytest.mark.parametrize("options", MASKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("scale", [1e-4, 0.05, 0.125, 1.0, 3.0])
def test_scales(scale, dtype, options):
    problem = Problem(seqlen_q=200, seqlen_k=333, dtype=dtype)
    check(*problem.inputs(), softmax_scale=scale, **options)


@pytest.mark.parametrize("options", MASKS, ids=name)
@pytest.mark.parametrize("scale", [-0.088, -1.0, -20.0])
def test_negative_scales(scale, options):
    for head_dim in (64, 128, 256):
        q, k, v = Problem(seqlen_q=200, seqlen_k=333, head_dim=head_dim).inputs()
        out, lse = check(q, k, v, softmax_scale=scale, **options)
        mirrored, mirrored_lse = attention(-q, k, v, softmax_scale=-scale, **options)
        torch.testing.assert_close(out, mirrored, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse, mirrored_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", MASKS, ids=name)
def test_a_scale_of_zero_is_the_mean(options):
    q, k, v = Problem(seqlen_q=200, seqlen_k=333).inputs()
    check(q, k, v, softmax_scale=0.0, **options)


def test_a_scale_with_a_softcap():
    q, k, v = Problem(seqlen_q=200, seqlen_k=333).inputs()
    for scale in (-0.3, 0.0, 0.3):
        check(q, k, v, softmax_scale=scale, softcap=5.0, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("order", ["rising", "falling", "one"])
def test_maxima_that_move_from_block_to_block(order, causal):
    # A rescale in every block, in none, and by far in one
    for head_dim in (64, 128, 256):
        q, k, v = Problem(seqlen_q=300, seqlen_k=900, head_dim=head_dim).inputs()
        k = k.abs()
        q = q.abs()
        steps = torch.linspace(0.1, 2.0, 900, device=k.device, dtype=k.dtype)[None, :, None, None]
        if order == "rising":
            k = k * steps
        elif order == "falling":
            k = k * steps.flip(1)
        else:
            k[:, 333] *= 20
        check(q, k, v, causal=causal)


def test_scores_in_the_ten_thousands():
    for head_dim in (64, 128, 256):
        q, k, v = Problem(seqlen_q=200, seqlen_k=700, head_dim=head_dim).inputs()
        out, lse = check(100 * q, 10 * k, v)
        assert out.isfinite().all()
        assert lse.abs().max() > 1000


def test_equal_scores_and_values_near_fp16s_end():
    for value in (1.0, 60_000.0):
        q, k, v = Problem(seqlen_q=150, seqlen_k=1000, dtype=torch.float16).inputs()
        v.fill_(value)
        out, _ = check(q, k, v)
        assert largest_error(out, torch.full_like(out, value).double()) <= value * 2e-3
        out, _ = check(torch.zeros_like(q), k, v, causal=True)
        assert largest_error(out, torch.full_like(out, value).double()) <= value * 2e-3


@HEAD_DIM
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_huge_scores_neither_hang_nor_leak(causal, head_dim):
    # Scores of 1e8 and more: their rounding exceeds 1, so that exponentials of a row's largest
    # scores are not 1. Where all are equal the factor cancels; where they overflow, the kernel must
    # still end, and the next call on the stream must not notice.
    shape = (1, 5000, 1, head_dim)
    for entry in (1000.0, 60000.0):
        q = torch.full(shape, entry, dtype=torch.float16, device="cuda")
        out = attention(q, q, torch.ones_like(q), causal=causal)[0]
        torch.cuda.synchronize()
        if entry == 1000.0:  # a factor near 1, of which P's rounding remains
            assert ((out - 1.0).abs() <= 2.0**-10).all()
    check(*Problem(seqlen_q=333, seqlen_k=500, head_dim=head_dim).inputs(), causal=causal)
