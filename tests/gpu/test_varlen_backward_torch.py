"""Gradients of packed batches: the same bits again, streams, graphs, and PyTorch's machinery."""

import importlib.util
import shutil

import pytest
import torch
from backward_checking import draw, draw_dlse, same_bits
from checking import DEVICE, TILES, name
from torch.utils.checkpoint import checkpoint
from varlen_backward_checking import Call, check, compare, gradients
from varlen_checking import Packed, attention, cumulate

import hopper_attention
from hopper_attention import ops_varlen, ops_varlen_backward
from hopper_attention.checks_varlen import Lengths

FIXED = {"causal": True, "deterministic": True}
GROUPED = {"heads": 4, "heads_kv": 2}
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
SMALL = Packed(rows=(60, 0, 30, 129), keys=(90, 5, 30, 64), **GROUPED)
MASKS = [{}, {"causal": True}, {"window_size": (700, 100)}]


def differs(found, expected):
    """Whether any bit differs, as a tensor, so that the device need not be waited for."""
    return sum(
        (a.view(torch.int16) != b.view(torch.int16)).any().int()
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("options", MASKS, ids=name)
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_the_same_call_gives_the_same_bits(tile, options):
    batch = Packed(rows=(1500, 3, 700, 64, 2000, 130), keys=None, heads=8)
    batch = batch.but(head_dim=tile[0], head_dim_v=tile[1])
    inputs, dout = draw(batch)
    call = Call(inputs, batch.lengths(), deterministic=True, **options)
    first = call.gradients(dout)
    count = torch.zeros((), dtype=torch.int32, device=DEVICE)
    for _ in range(30):
        count += differs(call.gradients(dout), first) > 0
    assert int(count) == 0
    _, dk, dv = Call(inputs, batch.lengths(), **options).gradients(dout)
    assert same_bits((dk, dv), first[1:])  # which always are


def test_two_streams_at_once():
    batches = [Packed(rows=(2048, 5, 900), keys=None, heads=8), Packed(head_dim=64)]
    calls = [(*draw(batch, seed), batch.lengths()) for seed, batch in enumerate(batches)]
    expected = [gradients(inputs, lengths, dout, **FIXED) for inputs, dout, lengths in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(10):
        for index, (inputs, dout, lengths) in enumerate(calls):
            with torch.cuda.stream(streams[(turn + index) % 2]):
                results.append((index, Call(inputs, lengths, **FIXED).gradients(dout)))
    torch.cuda.synchronize()
    assert all(same_bits(found, expected[index]) for index, found in results)


def test_the_lengths_are_read_on_the_current_stream():
    batch = Packed(rows=(700, 300), keys=None)
    (q, k, v), dout = draw(batch)
    lengths = batch.lengths()
    expected = gradients((q, k, v), lengths, dout, **FIXED)
    out, lse = attention(q, k, v, lengths, causal=True)
    late = torch.zeros_like(lengths.cu_seqlens_q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms, in which any other stream would be done
        late.copy_(lengths.cu_seqlens_q)
        scalars = (128**-0.5, True, -1, -1, 0.0, True)
        found = ops_varlen_backward.backward(
            *(dout, None, q, k, v, out, lse, late, late, None, None), *scalars
        )
    stream.synchronize()
    assert same_bits(found, expected)


CHANGING = [
    ((100, 28, 300, 0), (50, 200, 178, 0)),
    ((1, 1, 226, 200), (428, 0, 0, 0)),
    ((428, 0, 0, 0), (0, 128, 128, 172)),
    ((107, 107, 107, 107), (128, 64, 128, 108)),
    ((0, 0, 0, 3), (0, 0, 0, 7)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@HEAD_DIM
def test_graphs_replay_with_other_lengths(head_dim, deterministic):
    batch = Packed(*CHANGING[0], head_dim=head_dim, **GROUPED)
    inputs, dout = draw(batch)
    dlse = draw_dlse(inputs[0])
    lengths = batch.lengths()
    options = {"causal": True, "deterministic": deterministic}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        Call(inputs, lengths, **options).gradients(dout, dlse)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = Call(inputs, lengths, **options).gradients(dout, dlse)
    for rows, keys in CHANGING:
        lengths.cu_seqlens_q.copy_(cumulate(rows))
        lengths.cu_seqlens_k.copy_(cumulate(keys))
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        compare(found, inputs, lengths, dout, dlse, **options)


def test_opcheck_of_the_forward_operator():
    for batch in (SMALL, SMALL.but(used_k=(90, 0, 1, 64), behind=3)):
        inputs = [x.requires_grad_() for x in batch.inputs()]
        scalars = (0.088, True, -1, -1, 0.0, 0)
        with torch.enable_grad():
            torch.library.opcheck(
                ops_varlen.operator,
                (*inputs, *batch.lengths(), *scalars),
                {"deterministic": True},
            )


def operands(batch, **changes):
    """The backward operator's arguments, by name."""
    (q, k, v), dout = draw(batch)
    lengths = batch.lengths()
    out, lse = attention(q, k, v, lengths, causal=True)
    scale = batch.head_dim**-0.5
    named = {"dout": dout, "dlse": None, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    named |= {**lengths._asdict(), "softmax_scale": scale, "causal": True, "window_left": -1}
    named |= {"window_right": -1, "softcap": 0.0, "deterministic": True}
    return named | changes


def test_opcheck_of_the_backward_operator():
    for dlse in (None, draw_dlse(SMALL.inputs()[0])):
        arguments = operands(SMALL, dlse=dlse)
        torch.library.opcheck(ops_varlen_backward.backward, tuple(arguments.values()))


def test_the_backward_operator_is_what_autograd_calls():
    inputs, dout = draw(SMALL)
    expected = check(inputs, SMALL.lengths(), dout, **FIXED)
    found = torch.ops.hopper_attention.backward_varlen(**operands(SMALL))
    assert same_bits(found, expected)


def compiled_matches_eager(backend):
    def layer(q, k, v, cu_q, cu_k, longest):
        out, lse = hopper_attention.flash_attn_varlen_func(
            *(q * 1.5, k, v, cu_q, cu_k, longest, longest),
            window_size=(50, -1),
            return_attn_probs=True,
            **FIXED,
        )
        return (out * 2).float().square().mean() + lse.mean() * 0.1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in ((100, 7), (60, 200, 3), (333,)):  # the second one makes the sizes dynamic
        batch = Packed(rows=rows, keys=None)
        leaves = [x.requires_grad_() for x in batch.inputs()]
        call = (*leaves, *batch.lengths()[:2], max(rows))
        with torch.enable_grad():
            expected = torch.autograd.grad(layer(*call), leaves)
            found = torch.autograd.grad(compiled(*call), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=1e-6)


def test_compile_without_a_graph_break():
    compiled_matches_eager("aot_eager")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="inductor needs triton and a C compiler",
)
def test_compile_by_inductor():
    compiled_matches_eager("inductor")


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_activation_checkpointing(reentrant):
    inputs, dout = draw(SMALL)
    lengths = SMALL.lengths()
    expected = check(inputs, lengths, dout, **FIXED)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = checkpoint(
            lambda q, k, v: attention(q, k, v, lengths, **FIXED)[0],
            *leaves,
            use_reentrant=reentrant,
        )
    out.backward(dout)
    assert same_bits([x.grad for x in leaves], expected)


def test_a_second_derivative_is_refused():
    inputs, dout = draw(SMALL)
    call = Call(inputs, SMALL.lengths())
    with torch.enable_grad():
        dq, _, _ = torch.autograd.grad(call.out, call.leaves, dout, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated once"):
            dq.float().sum().backward()


def test_nothing_waits_for_the_device():
    inputs, dout = draw(SMALL)
    lengths = SMALL.lengths()
    Call(inputs, lengths, **FIXED).gradients(dout)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            Call(inputs, lengths, **FIXED).gradients(dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_memory_is_the_accumulator_and_some_vectors_with_a_tile_for_each_sequence():
    batch = Packed(rows=(1000, 3, 700, 64, 2000, 130), keys=None, heads=8)
    inputs, dout = draw(batch)
    call = Call(inputs, batch.lengths(), **FIXED)
    call.gradients(dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = call.gradients(dout)
    torch.cuda.synchronize()
    extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    extra -= sum(x.numel() * x.element_size() for x in found)
    rows = batch.heads * (sum(batch.rows) + 128 * (len(batch.rows) + 1))
    assert extra <= rows * (4 * batch.head_dim + 4 * 4) + 2**16


def changed(name, change):
    arguments = operands(SMALL)
    arguments[name] = change(arguments[name])
    return arguments


WRONG = [
    ("dout", lambda x: x[1:], ValueError, "dout"),
    ("dout", lambda x: x.float(), TypeError, "dout"),
    ("out", lambda x: x[..., :-8], ValueError, "out"),
    ("lse", lambda x: x.T, ValueError, "lse"),
    ("dlse", lambda x: torch.zeros(3, device=DEVICE), ValueError, "dlse"),
    ("k", lambda x: x[:-1], ValueError, "number of rows"),
    ("cu_seqlens_q", lambda x: x.cpu(), ValueError, "cu_seqlens_q must be on q's device"),
    ("seqused_k", lambda x: torch.zeros(4, device=DEVICE), TypeError, "seqused_k must be"),
]


@pytest.mark.parametrize("argument, change, error, words", WRONG)
def test_wrong_inputs_raise_and_do_no_harm(argument, change, error, words):
    with pytest.raises(error, match=words):
        torch.ops.hopper_attention.backward_varlen(**changed(argument, change))
    torch.cuda.synchronize()
    inputs, dout = draw(SMALL)
    check(inputs, SMALL.lengths(), dout)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_a_device_that_is_not_the_current_one():
    inputs, dout = draw(SMALL)
    expected = check(inputs, SMALL.lengths(), dout, **FIXED)
    other = [x.to("cuda:1") for x in inputs]
    lengths = Lengths(*(None if x is None else x.to("cuda:1") for x in SMALL.lengths()))
    found = Call(other, lengths, **FIXED).gradients(dout.to("cuda:1"))
    assert all(x.device.index == 1 for x in found)
    assert same_bits([x.to(DEVICE) for x in found], expected)
