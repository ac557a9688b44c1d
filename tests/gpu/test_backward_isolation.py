"""No value reaches a gradient that it has no part in, and nothing else is written."""

import math

import pytest
import torch
from backward_checking import (
    Call,
    compare,
    draw,
    draw_dlse,
    gradients,
    same_bits,
)
from checking import DEVICE, TILES, Problem, attention, name, strided, surround

from hopper_attention import _library

PROBLEM = Problem(seqlen_q=333, seqlen_k=461, batch=3, heads=4, heads_kv=2)
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (100, 30)}], ids=name
)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf])
HEADS_OF = {0: [0, 1], 1: [2, 3]}  # query heads by KV head


def by_head(gradient):
    return gradient.transpose(1, 2)


@MASKS
@HEAD_DIM
@BAD
def test_a_bad_sequence_or_head_stays_alone(bad, head_dim, options):
    inputs, dout = draw(PROBLEM.but(head_dim=head_dim))
    clean = gradients(inputs, dout, deterministic=True, **options)
    for which in range(4):
        tensors = [x.clone() for x in (*inputs, dout)]
        tensors[which][1, :, 1] = bad
        dq, dk, dv = gradients(tensors[:3], tensors[3], deterministic=True, **options)
        query_heads = [1] if which in (0, 3) else HEADS_OF[1]
        kv_head = 0 if which in (0, 3) else 1
        of_queries = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
        of_queries[1, query_heads] = True
        of_keys = torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)
        of_keys[1, kv_head] = True
        assert torch.equal(by_head(dq)[~of_queries], by_head(clean[0])[~of_queries])
        assert torch.equal(by_head(dk)[~of_keys], by_head(clean[1])[~of_keys])
        assert torch.equal(by_head(dv)[~of_keys], by_head(clean[2])[~of_keys])
        assert not by_head(dq)[of_queries].isfinite().all()  # and it is not hidden
        assert not by_head(dk)[of_keys].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 9.0}], ids=name)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@BAD
def test_bad_heads_do_not_reach_the_next_tile_of_their_blocks(bad, head_dim, options):
    # Some 300 tiles: a block takes two or three, whose buffers and registers are the same
    problem = PROBLEM.but(
        batch=4, seqlen_q=500, seqlen_k=1030, heads=16, heads_kv=8, head_dim=head_dim
    )
    inputs, dout = draw(problem)
    clean = gradients(inputs, dout, deterministic=True, **options)
    tensors = [x.clone() for x in (*inputs, dout)]
    for x in tensors:
        x[1:3, :, : x.shape[2] // 2] = bad
    found = gradients(tensors[:3], tensors[3], deterministic=True, **options)
    for grad, expected in zip(found, clean, strict=True):
        good = torch.ones(grad.shape[0], grad.shape[2], dtype=torch.bool, device=DEVICE)
        good[1:3, : grad.shape[2] // 2] = False
        assert torch.equal(by_head(grad)[good], by_head(expected)[good])
        assert not by_head(grad)[~good].isfinite().all()


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_a_bad_head_stays_alone_where_sums_have_no_order(tile):
    inputs, dout = draw(PROBLEM.but(head_dim=tile[0], head_dim_v=tile[1]))
    for x in inputs:
        x[1, :, 1] = math.nan
    dq, dk, dv = gradients(inputs, dout, causal=True)
    bad_queries = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
    bad_queries[1, 1:] = True  # head 1 by its q, heads 2 and 3 by their k and v
    assert by_head(dq)[~bad_queries].isfinite().all()
    assert all(by_head(x)[[0, 2]].isfinite().all() for x in (dk, dv))


def test_a_bad_gradient_of_the_log_sum_exp_stays_alone():
    inputs, dout = draw(PROBLEM)
    dlse = draw_dlse(inputs[0])
    call = Call(inputs, causal=True, deterministic=True)
    clean = call.gradients(dout, dlse)
    dlse[2, 3] = math.nan
    dq, dk, dv = call.gradients(dout, dlse)
    for found, expected, head in ((dq, clean[0], 3), (dk, clean[1], 1)):
        touched = torch.zeros(3, found.shape[2], dtype=torch.bool, device=DEVICE)
        touched[2, head] = True
        assert torch.equal(by_head(found)[~touched], by_head(expected)[~touched])
        assert by_head(found)[touched].isnan().any()
    assert torch.equal(dv, clean[2])


@MASKS
@HEAD_DIM
@BAD
def test_memory_around_the_tensors_is_not_used(bad, head_dim, options):
    inputs, dout = draw(PROBLEM.but(head_dim=head_dim))
    clean = gradients(inputs, dout, deterministic=True, **options)
    q, k, v, around = (strided(x, (1, 5, 1, 8), fill=bad) for x in (*inputs, dout))
    assert same_bits(gradients((q, k, v), around, deterministic=True, **options), clean)


@MASKS
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_memory_right_behind_the_last_row_is_not_used(tile, options):
    # As in a packed batch: the next sequence's rows follow at once, in the same tile
    inputs, dout = draw(PROBLEM.but(batch=1, head_dim=tile[0], head_dim_v=tile[1]))
    clean = gradients(inputs, dout, deterministic=True, **options)
    around = [torch.cat([x, torch.full_like(x, math.nan)], dim=1) for x in (*inputs, dout)]
    q, k, v, front = (x[:, : x.shape[1] // 2] for x in around)
    assert same_bits(gradients((q, k, v), front, deterministic=True, **options), clean)


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_a_bad_query_row_spoils_no_other_rows_gradient(tile):
    inputs, dout = draw(PROBLEM.but(head_dim=tile[0], head_dim_v=tile[1]))
    clean, _, _ = gradients(inputs, dout, causal=True, deterministic=True)
    inputs[0][:, 100] = math.nan
    dq, _, _ = gradients(inputs, dout, causal=True, deterministic=True)
    rows = [row for row in range(PROBLEM.seqlen_q) if row != 100]
    assert torch.equal(dq[:, rows], clean[:, rows])
    assert dq[:, 100].isnan().all()


CANARY = -12345.0  # exact in fp16, and no gradient of ours


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@pytest.mark.parametrize("dims", [*TILES, (72, 72)], ids=name)
@pytest.mark.parametrize("lengths", [(333, 461), (1, 5), (300, 40), (129, 0), (0, 129)], ids=name)
def test_gradients_are_written_whole_and_nothing_else(lengths, dims, deterministic, causal):
    """Through the C interface, whose caller brings gradients and workspace, among canaries."""
    problem = PROBLEM.but(
        seqlen_q=lengths[0],
        seqlen_k=lengths[1],
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=torch.float16,
    )
    inputs, dout = draw(problem)
    out, lse = attention(*inputs, causal=causal)
    surrounded = [surround(torch.full_like(x, math.nan), (1, 2, 1, 8), fill=CANARY) for x in inputs]
    found = [view for _, view in surrounded]
    tensors = (*inputs, out, dout, *found)
    run, num_bytes = _library.load().prepare_backward(
        0,
        *(3, *lengths, 4, 2, *dims),
        tuple(tuple(x.stride()[:3]) if x.numel() else (0, 0, 0) for x in tensors),
        dims[0] ** -0.5,
        0.0,
        causal,
        -1,
        0 if causal else -1,
        deterministic,
    )
    workspace = torch.full((num_bytes + 4096,), 255, dtype=torch.uint8, device=DEVICE)  # NaN
    addresses = [x.data_ptr() or workspace.data_ptr() for x in (*tensors[:5], lse, *found)]
    stream = torch.cuda.current_stream().cuda_stream
    run(*addresses[:6], 0, *addresses[6:], workspace.data_ptr(), stream, 0, 0)
    assert (workspace[num_bytes:] == 255).all()
    compare([x.contiguous() for x in found], inputs, dout, causal=causal)
    for around, view in surrounded:
        outside = torch.ones_like(around, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        assert (around[outside] == CANARY).all()


def need_memory(gigabytes):
    # what this process keeps for itself counts as free
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free / 1e9:.0f}")


def check_heads(problem, rows, gigabytes):
    """Compares some heads; only `rows`, the last ones, have a gradient of the output."""
    need_memory(gigabytes)
    inputs, dout = draw(problem)
    dout[:, : rows.start] = 0
    for causal in (False, True):
        found = Call(inputs, causal=causal).gradients(dout)
        for batch, head in ((0, 0), (1, 47), (2, 85)):
            at, heads = slice(batch, batch + 1), slice(head, head + 1)
            q, k, v = (x[at, :, heads] for x in inputs)
            dq, dk, dv = (x[at, :, heads] for x in found)
            part = (q[:, rows], k, v)
            compare((dq[:, rows], dk, dv), part, dout[at, rows, heads], causal=causal)
            assert not dq[:, : rows.start].any()
        del found, dq, dk, dv
    del inputs, dout, q, k, v, part
    torch.cuda.empty_cache()


def test_queries_beyond_2_to_31_elements():
    problem = Problem(batch=3, seqlen_q=65_536, seqlen_k=300, heads=86)
    assert problem.batch * problem.seqlen_q * problem.heads * problem.head_dim > 2**31
    # q, out, dout and dq, and the accumulator of twice their size
    check_heads(problem, slice(65_536 - 400, 65_536), gigabytes=30)


def test_keys_and_values_beyond_2_to_31_elements():
    problem = Problem(batch=3, seqlen_q=16, seqlen_k=65_536, heads=86)
    assert problem.batch * problem.seqlen_k * problem.heads * problem.head_dim > 2**31
    check_heads(problem, slice(0, 16), gigabytes=20)
