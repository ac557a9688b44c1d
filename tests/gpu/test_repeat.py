"""The same bits every time: repeated, at the same time on two streams, replayed from a graph."""

import threading

import pytest
import torch
from checking import DEVICE, Problem, attention, check, compare, name

HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (700, 100)}], ids=name
)
LARGE = Problem(batch=2, seqlen_q=4096, seqlen_k=4096, heads=16)


@MASKS
@HEAD_DIM
def test_the_same_call_gives_the_same_bits(head_dim, options):
    inputs = LARGE.but(head_dim=head_dim).inputs()
    first, first_lse = attention(*inputs, **options)
    for _ in range(20):
        out, lse = attention(*inputs, **options)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@HEAD_DIM
def test_the_batch_does_not_change_the_bits(head_dim):
    for options in ({}, {"causal": True}):
        q, k, v = Problem(batch=5, seqlen_q=300, seqlen_k=500, head_dim=head_dim).inputs()
        out, lse = attention(q, k, v, **options)
        alone, alone_lse = attention(q[3:4], k[3:4], v[3:4], **options)
        assert torch.equal(out[3:4], alone)
        assert torch.equal(lse[3:4], alone_lse)


@pytest.mark.parametrize("margin", [1, 16, 100, 131, 1000])
def test_a_margin_of_multiprocessors_does_not_change_the_bits(margin):
    for options in ({}, {"causal": True}):
        inputs = Problem(batch=4, seqlen_q=700, seqlen_k=700, heads=8).inputs()
        expected, _ = attention(*inputs, **options)
        out, _ = check(*inputs, sm_margin=margin, **options)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (100, 0)}, {"causal": True, "softcap": 5.0}],
    ids=name,
)
@HEAD_DIM
def test_tiles_of_no_one_and_several_blocks_of_keys_after_each_other(head_dim, options):
    """By one block of the grid, which may begin a tile before it has ended the last one."""
    for seqlen_k in (0, 63, 128, 129, 500):
        sizes = {"batch": 2, "seqlen_q": 700, "seqlen_k": seqlen_k, "heads": 3}
        inputs = Problem(**sizes, head_dim=head_dim).inputs()
        expected, _ = attention(*inputs, **options)
        out, _ = check(*inputs, sm_margin=1000, **options)
        assert torch.equal(out, expected)


def test_two_streams_at_once():
    problems = [
        (Problem(batch=2, seqlen_q=2048, seqlen_k=2048, heads=16), {"causal": True}),
        (Problem(batch=3, seqlen_q=1500, seqlen_k=1700, heads=9, head_dim=64), {"causal": True}),
        (Problem(batch=1, seqlen_q=3000, seqlen_k=900, heads=12, head_dim=256), {}),
        (Problem(batch=2, seqlen_q=2000, seqlen_k=2000, heads=8), {"window_size": (300, 0)}),
    ]
    inputs = [problem.inputs(seed) for seed, (problem, _) in enumerate(problems)]
    expected = [attention(*x, **options) for x, (_, options) in zip(inputs, problems, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(10):
        for index, (_, options) in enumerate(problems):
            with torch.cuda.stream(streams[(turn + index) % 2]):
                results.append((index, attention(*inputs[index], **options)))
    torch.cuda.synchronize()
    for index, (out, lse) in results:
        assert torch.equal(out, expected[index][0])
        assert torch.equal(lse, expected[index][1])


def test_two_threads_at_once():
    inputs = Problem(batch=2, seqlen_q=1024, seqlen_k=1024, heads=16).inputs()
    expected, _ = attention(*inputs, causal=True)
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                out, _ = attention(*inputs, causal=True)
                if not torch.equal(out, expected):
                    wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_current_stream_is_used():
    q, k, v = LARGE.inputs()
    expected, _ = attention(q, k, v, causal=True)
    late = torch.empty_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms, in which any other stream would be done
        late.copy_(q)
        out, _ = attention(late, k, v, causal=True)
    stream.synchronize()
    assert torch.equal(out, expected)


@MASKS
def test_graphs_replay_with_new_inputs(options):
    problem = Problem(batch=2, seqlen_q=700, seqlen_k=900, heads=6, heads_kv=2)
    inputs = problem.inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(*inputs, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(*inputs, **options)
        doubled, _ = attention(inputs[0] * 2, *inputs[1:], **options)
    for seed in range(1, 4):
        fresh = problem.inputs(seed)
        for static, new in zip(inputs, fresh, strict=True):
            static.copy_(new)
        for output in (out, lse, doubled):
            output.fill_(float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(stream):
            beside, _ = attention(*fresh, **options)  # while the graph runs
        torch.cuda.synchronize()
        compare(out, lse, *fresh, **options)
        assert torch.equal(beside, out)
        expected, _ = attention(fresh[0] * 2, *fresh[1:], **options)
        assert torch.equal(doubled, expected)


def test_a_graph_captured_first_of_all_on_a_stream():
    inputs = Problem(seqlen_q=500, seqlen_k=500).inputs()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out, lse = attention(*inputs, causal=True)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        compare(out, lse, *inputs, causal=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_a_device_that_is_not_the_current_one():
    inputs = Problem(seqlen_q=500, seqlen_k=500).inputs()
    expected, _ = attention(*inputs, causal=True)
    other = [x.to("cuda:1") for x in inputs]
    assert torch.cuda.current_device() == 0
    out, lse = attention(*other, causal=True)
    assert torch.cuda.current_device() == 0
    assert (out.device.index, lse.device.index) == (1, 1)
    assert torch.equal(out.to(DEVICE), expected)
