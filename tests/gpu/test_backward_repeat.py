"""The same bits every time: repeated, at the same time on two streams, replayed from a graph."""

import pytest
import torch
from backward_checking import Call, check, compare, draw, draw_dlse, gradients, same_bits
from checking import DEVICE, TILES, Problem, attention, name

TILE = pytest.mark.parametrize("tile", TILES, ids=name)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (700, 100)}], ids=name
)
LARGE = Problem(batch=2, seqlen_q=2048, seqlen_k=2048, heads=8, heads_kv=2)


def differs(found, expected):
    """Whether any bit differs, as a tensor, so that the device need not be waited for."""
    return sum(
        (a.view(torch.int16) != b.view(torch.int16)).any().int()
        for a, b in zip(found, expected, strict=True)
    )


def repeat(call, dout, times, dlse=None):
    """How many of the repetitions differ from the first."""
    first = call.gradients(dout, dlse)
    count = torch.zeros((), dtype=torch.int32, device=DEVICE)
    for _ in range(times):
        count += differs(call.gradients(dout, dlse), first) > 0
    return int(count), first


@MASKS
@TILE
@pytest.mark.parametrize("heads_kv", [2, 8], ids=["grouped", "equal-heads"])
def test_the_same_call_gives_the_same_bits(heads_kv, tile, options):
    problem = LARGE.but(head_dim=tile[0], head_dim_v=tile[1], heads_kv=heads_kv)
    inputs, dout = draw(problem)
    call = Call(inputs, deterministic=True, **options)
    different, first = repeat(call, dout, 20)
    assert different == 0
    assert same_bits(gradients(inputs, dout, deterministic=True, **options), first)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@HEAD_DIM
def test_a_thousand_runs_give_the_same_bits(head_dim, causal):
    problem = LARGE.but(seqlen_q=1000, seqlen_k=1100, head_dim=head_dim, batch=1)
    inputs, dout = draw(problem)
    call = Call(inputs, causal=causal, deterministic=True)
    different, first = repeat(call, dout, 1000)
    assert different == 0
    compare(first, inputs, dout, causal=causal)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 20)}, {"softcap": 20.0}], ids=name
)
@pytest.mark.parametrize("heads_kv", [8, 16], ids=["grouped", "equal-heads"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_blocks_that_take_many_tiles_give_the_same_bits(head_dim, heads_kv, options):
    # They draw their tiles, so which block has which differs from run to run
    problem = Problem(
        batch=4, seqlen_q=700, seqlen_k=1030, heads=16, heads_kv=heads_kv, head_dim=head_dim
    )
    inputs, dout = draw(problem)
    call = Call(inputs, deterministic=True, **options)
    different, first = repeat(call, dout, 100)
    assert different == 0
    compare(first, inputs, dout, **options)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 20)}, {"softcap": 20.0}], ids=name
)
def test_a_thousand_runs_of_an_odd_number_of_clustered_blocks(options):
    # Two blocks of 64 keys exchange dS in every step; the last one's neighbour has no keys
    problem = LARGE.but(seqlen_q=500, seqlen_k=1050, head_dim=256, batch=1)
    inputs, dout = draw(problem)
    call = Call(inputs, deterministic=True, **options)
    different, first = repeat(call, dout, 1000)
    assert different == 0
    compare(first, inputs, dout, **options)


@TILE
def test_other_work_on_the_device_does_not_change_the_bits(tile):
    # What runs beside the kernels changes the order in which their blocks come
    problem = Problem(head_dim=tile[0], head_dim_v=tile[1], seqlen_q=600, seqlen_k=600, heads=6)
    inputs, dout = draw(problem)
    call = Call(inputs, causal=True, deterministic=True)
    first = call.gradients(dout)
    count = torch.zeros((), dtype=torch.int32, device=DEVICE)
    other = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for turn in range(100):
        with torch.cuda.stream(other):
            for _ in range(turn % 4):
                noise @ noise
        count += differs(call.gradients(dout), first) > 0
    torch.cuda.synchronize()
    assert int(count) == 0


@MASKS
@TILE
def test_the_gradients_of_k_and_v_always_have_the_same_bits(tile, options):
    inputs, dout = draw(LARGE.but(head_dim=tile[0], head_dim_v=tile[1]))
    for deterministic in (False, True):
        call = Call(inputs, deterministic=deterministic, **options)
        _, dk, dv = call.gradients(dout)
        for _ in range(5):
            _, dk_again, dv_again = call.gradients(dout)
            assert same_bits((dk_again, dv_again), (dk, dv))


@TILE
def test_the_batch_does_not_change_the_bits(tile):
    problem = Problem(
        batch=5, seqlen_q=300, seqlen_k=500, head_dim=tile[0], head_dim_v=tile[1], heads_kv=1
    )
    for causal in (False, True):
        inputs, dout = draw(problem)
        options = {"causal": causal, "deterministic": True}
        whole = gradients(inputs, dout, **options)
        alone = gradients([x[3:4] for x in inputs], dout[3:4], **options)
        assert same_bits([x[3:4] for x in whole], alone)


def test_two_streams_at_once():
    sizes = [
        (Problem(batch=2, seqlen_q=1024, seqlen_k=1024, heads=8), {"causal": True}),
        (Problem(batch=3, seqlen_q=700, seqlen_k=900, heads=9, head_dim=64), {"causal": True}),
        (Problem(batch=1, seqlen_q=1500, seqlen_k=900, heads=12, head_dim=256), {}),
        (Problem(batch=2, seqlen_q=1000, seqlen_k=1000, heads=8), {"window_size": (300, 0)}),
    ]
    calls = []
    for seed, (problem, options) in enumerate(sizes):
        inputs, dout = draw(problem, seed)
        calls.append((inputs, dout, options))
    expected = [gradients(x, dout, deterministic=True, **o) for x, dout, o in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(10):
        for index, (inputs, dout, options) in enumerate(calls):
            with torch.cuda.stream(streams[(turn + index) % 2]):
                call = Call(inputs, deterministic=True, **options)
                results.append((index, call.gradients(dout)))
    torch.cuda.synchronize()
    assert all(same_bits(found, expected[index]) for index, found in results)


def test_the_current_stream_is_used():
    inputs, dout = draw(LARGE)
    call = Call(inputs, causal=True, deterministic=True)
    expected = call.gradients(dout)
    late = torch.empty_like(dout)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    # The engine runs a backward pass on its forward pass's stream, and has that wait for this one
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 25 ms, in which any other stream would be done
        late.copy_(dout)
        found = call.gradients(late)
    stream.synchronize()
    assert same_bits(found, expected)


def capture(inputs, dout, dlse, options):
    """A graph of a forward and a backward pass, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        Call(inputs, **options).gradients(dout, dlse)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call = Call(inputs, **options)
        found = call.gradients(dout, dlse)
    return graph, (call.out, call.lse), found


@MASKS
@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@HEAD_DIM
def test_graphs_replay_with_new_inputs(head_dim, deterministic, options):
    problem = Problem(batch=2, seqlen_q=500, seqlen_k=700, heads=6, heads_kv=2, head_dim=head_dim)
    options = {**options, "deterministic": deterministic}
    inputs, dout = draw(problem)
    dlse = draw_dlse(inputs[0])
    graph, outputs, found = capture(inputs, dout, dlse, options)
    for seed in range(1, 4):
        fresh, fresh_dout = draw(problem, seed)
        fresh_dlse = draw_dlse(fresh[0], seed)
        statics = (*inputs, dout, dlse)
        for static, new in zip(statics, (*fresh, fresh_dout, fresh_dlse), strict=True):
            static.copy_(new)
        with torch.no_grad():
            for x in (*outputs, *found):
                x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        compare(found, fresh, fresh_dout, fresh_dlse, **options)
        if deterministic:
            eager = Call(fresh, **options).gradients(fresh_dout, fresh_dlse)
            assert same_bits(found, eager)


def test_a_graph_beside_other_calls_on_its_stream():
    inputs, dout = draw(LARGE)
    options = {"causal": True, "deterministic": True}
    expected = gradients(inputs, dout, **options)
    graph, _, found = capture(inputs, dout, None, options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        graph.replay()
        with torch.cuda.stream(stream):
            beside = Call(inputs, **options).gradients(dout)  # while the graph runs
        torch.cuda.synchronize()
        assert same_bits(found, expected)
        assert same_bits(beside, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_a_device_that_is_not_the_current_one():
    inputs, dout = draw(Problem(seqlen_q=500, seqlen_k=500))
    options = {"causal": True, "deterministic": True}
    expected = check(inputs, dout, **options)
    other = [x.to("cuda:1").requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, _ = attention(*other, **options)
    found = torch.autograd.grad(out, other, dout.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in found)
    assert same_bits([x.to(DEVICE) for x in found], expected)
