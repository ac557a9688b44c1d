"""Gradients of packed batches: neighbours, canaries, lengths that are none."""

import math

import pytest
import torch
from backward_checking import draw, draw_dlse, same_bits
from checking import DEVICE, TILES, name
from test_varlen_isolation import CANARY, NEIGHBOURS, NONSENSE
from varlen_backward_checking import check, compare, gradients
from varlen_checking import Packed, attention, cumulate

from hopper_attention import _library
from hopper_attention.checks_varlen import Lengths

MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (100, 30)}], ids=name
)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
ORDER = pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
TILE = pytest.mark.parametrize("tile", TILES, ids=name)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
GROUPED = {"heads": 4, "heads_kv": 2}


def rows_of(cu_seqlens, sequence):
    return slice(*cu_seqlens[sequence : sequence + 2].tolist())


def all_but(rows, total):
    others = torch.ones(total, dtype=torch.bool, device=DEVICE)
    others[rows] = False
    return others


@MASKS
@HEAD_DIM
@BAD
def test_a_bad_sequence_stays_alone(bad, head_dim, options):
    batch = NEIGHBOURS.but(head_dim=head_dim, **GROUPED)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    clean = gradients(inputs, lengths, dout, deterministic=True, **options)
    for which in range(4):  # of q, k, v and dout
        for sequence in (1, 3):
            tensors = [x.clone() for x in (*inputs, dout)]
            rows = rows_of(lengths.cu_seqlens_q, sequence)
            keys = rows_of(lengths.cu_seqlens_k, sequence)
            tensors[which][keys if which in (1, 2) else rows] = bad
            found = gradients(tensors[:3], lengths, tensors[3], deterministic=True, **options)
            for grad, wanted, own in zip(found, clean, (rows, keys, keys), strict=True):
                others = all_but(own, grad.shape[0])
                assert torch.equal(grad[others], wanted[others])
            assert not found[0][rows].isfinite().all()  # and it is not hidden
            assert not found[1][keys].isfinite().all()


@TILE
def test_a_bad_sequence_stays_alone_where_sums_have_no_order(tile):
    batch = NEIGHBOURS.but(head_dim=tile[0], head_dim_v=tile[1])
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    parts = [lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.cu_seqlens_k]
    for x, bounds in zip((*inputs, dout), (*parts, parts[0]), strict=True):
        for sequence in (0, 2, 4):
            x[rows_of(bounds, sequence)] = math.nan
    for softcap in (0.0, 20.0):
        found = gradients(inputs, lengths, dout, causal=True, softcap=softcap)
        for grad, bounds in zip(found, parts, strict=True):
            for sequence in (1, 3, 5):
                assert grad[rows_of(bounds, sequence)].isfinite().all()


def test_a_bad_gradient_of_the_log_sum_exp_stays_alone():
    batch = NEIGHBOURS.but(**GROUPED)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    dlse = draw_dlse(inputs[0])
    options = {"causal": True, "deterministic": True}
    clean = gradients(inputs, lengths, dout, dlse, **options)
    rows, keys = (rows_of(x, 3) for x in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
    dlse[:, rows] = math.nan
    dq, dk, dv = gradients(inputs, lengths, dout, dlse, **options)
    for grad, wanted, own in ((dq, clean[0], rows), (dk, clean[1], keys)):
        others = all_but(own, grad.shape[0])
        assert torch.equal(grad[others], wanted[others])
        assert grad[own].isnan().any()
    assert torch.equal(dv, clean[2])


@MASKS
@TILE
def test_what_is_not_used_has_no_part(tile, options):
    rows, keys = (100, 200, 50), (300, 90, 128)
    batch = NEIGHBOURS.but(rows=rows, keys=keys, used_q=(60, 0, 50), used_k=(129, 90, 1), behind=70)
    batch = batch.but(head_dim=tile[0], head_dim_v=tile[1], **GROUPED)
    inputs, dout = draw(batch)
    dlse = draw_dlse(inputs[0])
    lengths = batch.lengths()
    options = {**options, "deterministic": True}
    expected = check(inputs, lengths, dout, dlse, **options)
    of_queries = [(0, 60), (100, 100), (300, 350)]
    of_keys = [(0, 129), (300, 390), (390, 391)]
    tensors = (*inputs, dout, dlse.T)
    used = (of_queries, of_keys, of_keys, of_queries, of_queries)
    for x, parts in zip(tensors, used, strict=True):
        idle = torch.ones(x.shape[0], dtype=torch.bool, device=DEVICE)
        for begin, end in parts:
            idle[begin:end] = False
        x[idle] = math.nan
    assert same_bits(gradients(inputs, lengths, dout, dlse, **options), expected)


@MASKS
@TILE
def test_the_batch_does_not_change_a_sequences_bits(tile, options):
    batch = NEIGHBOURS.but(head_dim=tile[0], head_dim_v=tile[1], **GROUPED)
    inputs, dout = draw(batch)
    lengths = batch.lengths()
    options = {**options, "deterministic": True}
    whole = gradients(inputs, lengths, dout, **options)
    for i in range(len(batch.rows)):
        rows, keys = (rows_of(x, i) for x in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
        one = Lengths(cumulate(batch.rows[i : i + 1]), cumulate(batch.keys[i : i + 1]))
        q, k, v = inputs
        alone = gradients((q[rows], k[keys], v[keys]), one, dout[rows], **options)
        assert same_bits([whole[0][rows], whole[1][keys], whole[2][keys]], alone)


def among_canaries(x):
    """A tensor of NaN in x's shape, each row with canaries behind it, and all that lies around."""
    total, heads, head_dim = x.shape
    around = torch.full((total + 8, heads + 1, head_dim + 8), CANARY, dtype=x.dtype, device=DEVICE)
    return around[4 : total + 4, :heads, :head_dim].fill_(math.nan), around


def run_among_canaries(inputs, dout, lengths, causal, deterministic):
    """Through the C interface, whose caller brings gradients and workspace; checks around them."""
    out, lse = attention(*inputs, lengths, causal=causal)
    surrounded = [among_canaries(x) for x in inputs]
    found = [view for view, _ in surrounded]
    q, k, v = inputs
    tensors = (*inputs, out, dout, *found)
    run, num_bytes = _library.load().prepare_varlen_backward(
        *(1 if q.dtype == torch.bfloat16 else 0, len(lengths.cu_seqlens_q) - 1),
        *(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2]),
        tuple(tuple(x.stride()[:2]) for x in tensors),
        *(q.shape[2] ** -0.5, 0.0, causal, -1, 0 if causal else -1, deterministic),
    )
    workspace = torch.full((num_bytes + 4096,), 255, dtype=torch.uint8, device=DEVICE)  # NaN
    run(
        *(x.data_ptr() for x in (*tensors[:5], lse)),
        0,
        *(x.data_ptr() for x in (*found, workspace)),
        torch.cuda.current_stream().cuda_stream,
        *(0 if x is None else x.data_ptr() for x in lengths),
    )
    torch.cuda.synchronize()
    assert (workspace[num_bytes:] == 255).all()
    results = [x.contiguous() for x in found]
    for view, around in surrounded:
        view.fill_(CANARY)
        assert (around == torch.tensor(CANARY, dtype=around.dtype)).all()
    return results


@CAUSAL
@ORDER
@pytest.mark.parametrize("tile", [*TILES, (72, 72)], ids=name)
def test_gradients_are_written_whole_and_nothing_else(tile, deterministic, causal):
    used = {"used_q": (70, 1, 0, 999, 1, 64), "used_k": (0, 77, 1, 129, 1, 0), "behind": 200}
    for batch in (NEIGHBOURS, NEIGHBOURS.but(**used)):
        batch = batch.but(head_dim=tile[0], head_dim_v=tile[1], **GROUPED)
        inputs, dout = draw(batch)
        lengths = batch.lengths()
        found = run_among_canaries(inputs, dout, lengths, causal, deterministic)
        compare(found, inputs, lengths, dout, causal=causal)


@ORDER
@pytest.mark.parametrize("cu_seqlens", NONSENSE)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths_that_are_none_touch_nothing_outside(head_dim, cu_seqlens, deterministic):
    inputs, dout = draw(Packed(rows=(428,), keys=None, head_dim=head_dim, **GROUPED))
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    even = torch.linspace(0, 428, len(cu_seqlens), device=DEVICE).int()
    for lengths in (
        Lengths(bounds, bounds),
        Lengths(bounds, bounds, bounds[1:], bounds[:-1]),
        Lengths(even, bounds),
        Lengths(bounds, even),
        Lengths(even, even, bounds[1:], bounds[:-1]),
    ):
        run_among_canaries(inputs, dout, lengths, True, deterministic)
    batch = Packed(rows=(60, 3, 70), keys=None, head_dim=head_dim, **GROUPED)
    inputs, dout = draw(batch)
    check(inputs, batch.lengths(), dout)  # the next call does not notice


def test_queries_beyond_2_to_31_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 36e9:
        pytest.skip("needs 36 GB of free device memory")
    rows = (100_000, 37, 60_000)
    batch = Packed(rows=rows, keys=(300, 37, 129), heads=108, heads_kv=1)
    inputs, dout = draw(batch)
    assert inputs[0].numel() > 2**31
    dout[:-200] = 0  # so that the last sequence's keys have the gradient of a few rows
    tail, keys = slice(sum(rows) - 200, None), slice(337, None)
    last = Lengths(cumulate((200,)), cumulate((129,)))  # causal: the first 71 see no key
    part = (inputs[0][tail], inputs[1][keys], inputs[2][keys])
    for causal in (False, True):
        dq, dk, dv = gradients(inputs, batch.lengths(), dout, causal=causal)
        assert not any(x[:337].any() for x in (dk, dv))
        assert not dq[:-200].any()
        compare((dq[tail], dk[keys], dv[keys]), part, last, dout[tail], causal=causal)
        del dq, dk, dv
    del inputs, dout, part
    torch.cuda.empty_cache()
