"""Packed batches: neighbours, canaries, lengths that are none, repetition, graphs, PyTorch."""

import math

import pytest
import torch
from checking import DEVICE, name
from varlen_checking import CANARY, Packed, attention, check, compare, cumulate

import hopper_attention
from hopper_attention import _library, ops_varlen
from hopper_attention.checks_varlen import Lengths

MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (100, 30)}], ids=name
)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
NEIGHBOURS = Packed(rows=(77, 300, 129, 1000, 1, 64), keys=(130, 77, 300, 129, 1000, 1), heads=4)


@MASKS
@HEAD_DIM
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_a_bad_sequence_stays_alone(which, bad, head_dim, options):
    batch = NEIGHBOURS.but(head_dim=head_dim)
    q, k, v = batch.inputs()
    lengths = batch.lengths()
    clean, clean_lse = attention(q, k, v, lengths, **options)
    for sequence in (1, 3):
        tensors = [q.clone(), k.clone(), v.clone()]
        bounds = lengths.cu_seqlens_q if which == 0 else lengths.cu_seqlens_k
        begin, end = bounds[sequence : sequence + 2].tolist()
        tensors[which][begin:end] = bad
        out, lse = attention(*tensors, lengths, **options)
        begin, end = lengths.cu_seqlens_q[sequence : sequence + 2].tolist()
        others = torch.ones(q.shape[0], dtype=torch.bool, device=DEVICE)
        others[begin:end] = False
        assert torch.equal(out[others], clean[others])
        assert torch.equal(lse[:, others], clean_lse[:, others])
        assert not out[begin:end].isfinite().all()  # and it is not hidden


@MASKS
def test_what_is_not_used_has_no_part(options):
    rows, keys = (100, 200, 50), (300, 90, 128)
    batch = NEIGHBOURS.but(rows=rows, keys=keys, used_q=(60, 0, 50), used_k=(129, 90, 1), behind=70)
    q, k, v = batch.inputs()
    lengths = batch.lengths()
    expected = check(q, k, v, lengths, **options)
    for tensor, bounds, used in (
        (q, lengths.cu_seqlens_q, batch.used_q),
        (k, lengths.cu_seqlens_k, batch.used_k),
        (v, lengths.cu_seqlens_k, batch.used_k),
    ):
        starts = bounds.tolist()
        for begin, own, end in zip(starts, used, starts[1:], strict=False):
            tensor[begin + own : end] = math.nan
        tensor[starts[-1] :] = math.nan
    found = attention(q, k, v, lengths, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@MASKS
def test_the_batch_does_not_change_a_sequences_bits(options):
    for head_dim in (64, 128, 256):
        batch = NEIGHBOURS.but(head_dim=head_dim)
        q, k, v = batch.inputs()
        lengths = batch.lengths()
        out, lse = attention(q, k, v, lengths, **options)
        bounds_q, bounds_k = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
        for i in range(len(batch.rows)):
            rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
            one = Lengths(cumulate(batch.rows[i : i + 1]), cumulate(batch.keys[i : i + 1]))
            alone, alone_lse = attention(q[rows], k[keys], v[keys], one, **options)
            assert torch.equal(out[rows], alone)
            assert torch.equal(lse[:, rows], alone_lse)


def among_canaries(shape, dtype):
    """A tensor of NaN, and the larger one that it is the middle of."""
    around = torch.full((math.prod(shape) + 4096,), CANARY, dtype=dtype, device=DEVICE)
    return around[2048:-2048].view(shape).fill_(math.nan), around


def run_among_canaries(q, k, v, lengths, causal, with_lse=True):
    """Through the C interface, whose caller brings the outputs; checks what lies around them."""
    total_q, heads, head_dim = q.shape
    shapes = ((total_q, heads, v.shape[2]), (heads, total_q))
    out, out_around = among_canaries(shapes[0], q.dtype)
    lse, lse_around = among_canaries(shapes[1], torch.float32)
    run, workspace_bytes = _library.load().prepare_varlen(
        *(1 if q.dtype == torch.bfloat16 else 0, len(lengths.cu_seqlens_q) - 1),
        *(total_q, k.shape[0], heads, k.shape[1], head_dim, v.shape[2]),
        *(x.stride()[:2] for x in (q, k, v, out)),
        *(head_dim**-0.5, 0.0, causal, -1, 0 if causal else -1, 0),
    )
    workspace, around = among_canaries((workspace_bytes // 4,), torch.float32)
    run(
        *(x.data_ptr() for x in (q, k, v)),
        *(0 if x is None else x.data_ptr() for x in lengths),
        out.data_ptr(),
        lse.data_ptr() if with_lse else 0,
        workspace.data_ptr(),
        torch.cuda.current_stream().cuda_stream,
    )
    torch.cuda.synchronize()
    for outside in (out_around, lse_around, around):
        sides = torch.cat([outside[:2048], outside[-2048:]])
        assert (sides == torch.tensor(CANARY, dtype=sides.dtype)).all()
    assert with_lse or lse.isnan().all()
    return out, lse


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
def test_outputs_are_written_whole_and_nothing_else(head_dim, with_lse, causal):
    used = (70, 1, 0, 999, 1, 64)
    for batch in (NEIGHBOURS, NEIGHBOURS.but(used_q=used, behind=200)):
        batch = batch.but(head_dim=head_dim)
        q, k, v = batch.inputs()
        lengths = batch.lengths()
        out, lse = run_among_canaries(q, k, v, lengths, causal, with_lse)
        if not with_lse:
            _, lse = attention(q, k, v, lengths, causal=causal)
        compare(out, lse, q, k, v, lengths, causal=causal)


NONSENSE = [
    [0, 5000, -7, 428, 100],
    [400, 3, 428, 2, 9],
    [0, 428, 0, 428, 0],
    [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1, 0],
    [0, 428] * 500,
]


@pytest.mark.parametrize("cu_seqlens", NONSENSE)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths_that_are_none_touch_nothing_outside(head_dim, cu_seqlens):
    q, k, v = Packed(rows=(428,), keys=None, head_dim=head_dim, heads=4).inputs()
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    for lengths in (Lengths(bounds, bounds), Lengths(bounds, bounds, bounds[1:], bounds[:-1])):
        run_among_canaries(q, k, v, lengths, causal=True)
    batch = Packed(head_dim=head_dim)
    check(*batch.inputs(), batch.lengths())  # the next call does not notice


def test_the_same_call_gives_the_same_bits():
    batch = Packed(rows=(1500, 3, 700, 64, 2000, 130), keys=None, heads=16)
    for options in ({}, {"causal": True}, {"causal": True, "sm_margin": 100}):
        inputs, lengths = batch.inputs(), batch.lengths()
        first = attention(*inputs, lengths, **options)
        for _ in range(20):
            for one, other in zip(attention(*inputs, lengths, **options), first, strict=True):
                assert torch.equal(one, other)


def test_two_streams_at_once():
    batches = [Packed(rows=(2048, 5, 900), keys=None, heads=8), Packed(head_dim=64)]
    calls = [(*batch.inputs(seed), batch.lengths()) for seed, batch in enumerate(batches)]
    expected = [attention(*call, causal=True) for call in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(10):
        for index, call in enumerate(calls):
            with torch.cuda.stream(streams[(turn + index) % 2]):
                results.append((index, attention(*call, causal=True)))
    torch.cuda.synchronize()
    for index, found in results:
        for one, other in zip(found, expected[index], strict=True):
            assert torch.equal(one, other)


def test_the_lengths_are_read_on_the_current_stream():
    batch = Packed(rows=(700, 300), keys=None)
    inputs, lengths = batch.inputs(), batch.lengths()
    expected, _ = attention(*inputs, lengths, causal=True)
    late = torch.zeros_like(lengths.cu_seqlens_q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms, in which any other stream would be done
        late.copy_(lengths.cu_seqlens_q)
        out, _ = attention(*inputs, Lengths(late, late), causal=True)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_graphs_replay_with_other_lengths(head_dim):
    batch = Packed(rows=(100, 28, 300, 0), keys=(50, 200, 178, 0), head_dim=head_dim)
    inputs, lengths = batch.inputs(), batch.lengths()
    attention(*inputs, lengths, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(*inputs, lengths, causal=True)
    for rows, keys in (
        ((100, 28, 300, 0), (50, 200, 178, 0)),
        ((1, 1, 226, 200), (428, 0, 0, 0)),
        ((428, 0, 0, 0), (0, 128, 128, 172)),
        ((0, 0, 0, 3), (0, 0, 0, 7)),
    ):
        lengths.cu_seqlens_q.copy_(cumulate(rows))
        lengths.cu_seqlens_k.copy_(cumulate(keys))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        compare(out, lse, *inputs, lengths, causal=True)


def test_opcheck():
    for batch in (Packed(rows=(60, 0, 30), keys=(90, 5, 30)), Packed(used_k=(1,) * 16)):
        scalars = (0.088, True, -1, -1, 0.0, 0)
        torch.library.opcheck(
            ops_varlen.operator,
            (*batch.inputs(), *batch.lengths(), *scalars),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_compile_without_a_graph_break():
    def layer(q, k, v, cu_q, cu_k):
        out, lse = hopper_attention.flash_attn_varlen_func(
            q * 1.5, k, v, cu_q, cu_k, 1000, 1000, causal=True, return_attn_probs=True
        )
        return out * 2, lse + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in ((100, 7), (60, 200, 3)):  # the second one makes the sizes dynamic
        batch = Packed(rows=rows, keys=None)
        call = (*batch.inputs(), *batch.lengths()[:2])
        for found, wanted in zip(compiled(*call), layer(*call), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_outputs_beyond_2_to_31_elements(causal):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free device memory")
    rows = (100_000, 37, 60_000)
    batch = Packed(rows=rows, keys=(300, 37, 129), heads=128, heads_kv=1)
    q, k, v = batch.inputs()
    assert q.numel() > 2**31
    out, lse = attention(q, k, v, batch.lengths(), causal=causal)
    tail = slice(sum(rows) - 200, None)  # causal: the first 71 of these see no key
    last = Lengths(cumulate((200,)), cumulate((129,)))
    for head in (0, 77, 127):
        heads, keys = slice(head, head + 1), slice(337, None)
        found = (out[tail, heads].contiguous(), lse[heads, tail].contiguous())
        compare(*found, q[tail, heads], k[keys], v[keys], last, causal=causal)
    if causal:
        assert not out[: 100_000 - 300].any()
    del q, out, lse
    torch.cuda.empty_cache()
