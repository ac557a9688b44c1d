"""Learnable sinks: what the functions and operators check and pass on, and their gradient."""

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import hopper_attention
from hopper_attention import emulation, ops, ops_backward, reference

attend = hopper_attention.flash_attn_func
SINK = (-1.0, 0.3, 2.0, -math.inf)


def draw(batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16, dtype=torch.bfloat16):
    shapes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    qkv = (torch.randn(batch, seqlen, n, d).to(dtype) for seqlen, n in shapes)
    return tuple(x.requires_grad_() for x in (*qkv, torch.tensor(SINK[:heads])))


def assert_exact(out, lse, q, k, v, sink, **arguments):
    exact, exact_lse = reference.attention(q, k, v, **arguments, learnable_sink=sink)
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"softcap": 2.0, "sm_margin": 1}])
def test_the_library_gets_the_sink(gradient_library, arguments, grad):
    q, k, v, sink = draw(seqlen_q=12)
    with torch.set_grad_enabled(grad):
        out, lse = attend(q, k, v, **arguments, learnable_sink=sink, return_attn_probs=True)
    assert out.requires_grad == grad
    arguments.pop("sm_margin", None)
    assert_exact(out, lse, q, k, v, sink, **arguments)
    if "causal" in arguments:  # three rows without keys
        assert lse[:, :, :3].eq(sink[:, None]).all()


def test_strided_sinks_are_copied(gradient_library):
    q, k, v, sink = (x.detach() for x in draw())
    apart = torch.stack([sink, torch.full((4,), math.nan)], 1)[:, 0]
    out, lse = attend(q, k, v, learnable_sink=apart, return_attn_probs=True)
    assert_exact(out, lse, q, k, v, sink)
    out, lse = attend(q, k, v, learnable_sink=torch.tensor(1.0).expand(4), return_attn_probs=True)
    assert_exact(out, lse, q, k, v, torch.ones(4))


def test_packed_heads(gradient_library):
    qkv = torch.randn(2, 6, 3, 4, 16).bfloat16()
    sink = torch.tensor(SINK)
    out, lse = hopper_attention.flash_attn_qkvpacked_func(
        qkv, causal=True, return_attn_probs=True, learnable_sink=sink
    )
    assert_exact(out, lse, *qkv.unbind(2), sink, causal=True)


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize(
    "sizes, arguments",
    [
        ({}, {}),
        ({"seqlen_q": 9, "seqlen_k": 6, "heads_kv": 1}, {"causal": True}),  # rows without keys
        ({"seqlen_k": 0}, {}),
        ({"seqlen_q": 0}, {}),
        ({"heads": 2, "dtype": torch.float16}, {"window_size": (3, 1), "softcap": 1.5}),
    ],
)
def test_gradients(gradient_library, sizes, arguments, use_lse):
    inputs = draw(**sizes)
    *qkv, sink = inputs
    out, lse = attend(*qkv, **arguments, learnable_sink=sink, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse.masked_fill_(lse == -math.inf, 0.0)
    outputs, given = ((out, lse), (dout, dlse)) if use_lse else ((out,), (dout,))
    found = torch.autograd.grad(outputs, inputs, given)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    exact.append(sink.detach().requires_grad_())
    outputs = reference.attention(*exact[:3], **arguments, learnable_sink=exact[3])
    expected = torch.autograd.grad(
        outputs[: 1 + use_lse], exact, [x.double() for x in given], materialize_grads=True
    )
    for x, gradient, truth in zip(inputs, found, expected, strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        truth = truth.double().nan_to_num(0.0)  # autograd's of a row of -inf alone
        tolerance = 0.02 * truth.abs().max().item() + 1e-6 if truth.numel() else 0
        torch.testing.assert_close(gradient.double(), truth, rtol=0.02, atol=tolerance)


def test_the_sinks_gradient_is_computed_only_where_it_is_asked_for(gradient_library):
    q, k, v, sink = draw()
    attend(q, k, v).sum().backward()
    attend(q, k, v, learnable_sink=sink.detach()).sum().backward()
    attend(q.detach(), k.detach(), v.detach(), learnable_sink=sink).sum().backward()
    assert sink.grad is not None
    assert [call["dsink"] != 0 for call in gradient_library.calls] == [False, False, True]
    assert [call["sink"] != 0 for call in gradient_library.calls] == [False, False, True]


def test_what_is_saved(gradient_library):
    q, k, v, sink = draw()
    for leaf, kept in ((sink, [sink]), (sink.detach(), [])):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x)
        with hooks:
            out, lse = attend(q, k, v, learnable_sink=leaf, return_attn_probs=True)
        addresses = [x.data_ptr() for x in (q, k, v, out, lse, *kept)]
        assert [x.data_ptr() for x in saved] == addresses


def test_the_reference_and_the_emulation_want_a_tensor():
    q, k, v, _ = (x.detach() for x in draw())
    for of in (reference, emulation):
        with pytest.raises(TypeError, match=r"learnable_sink must be a torch\.Tensor, got list"):
            of.attention(q, k, v, learnable_sink=[0.0] * 4)


def test_the_second_derivative_is_refused(gradient_library):
    q, k, v, sink = draw()
    out = attend(q, k, v, learnable_sink=sink)
    (first,) = torch.autograd.grad(out.sum(), sink, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        torch.autograd.grad(first.sum(), sink)


def test_calls_with_and_without_a_sink_share_a_plan(gradient_library):
    q, k, v, sink = (x.detach() for x in draw())
    plain = attend(q, k, v)
    assert not torch.equal(attend(q, k, v, learnable_sink=sink), plain)
    assert torch.equal(attend(q, k, v), plain)
    assert len(ops._plans) == 1


def test_opcheck(gradient_library):
    q, k, v, sink = draw()
    torch.library.opcheck(ops.operator, (q, k, v, 0.25, True, 3, -1, 0.0, 0, sink, True))
    q, k, v, sink = (x.detach() for x in (q, k, v, sink))
    out, lse = ops.operator(q, k, v, 0.25, False, learnable_sink=sink)
    torch.library.opcheck(
        ops_backward.backward_sink,
        (torch.ones_like(out), None, q, k, v, out, lse, sink, 0.25, False, -1, -1, 0.0, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_with_the_backward_pass(gradient_library):
    graphs = []

    def compiler(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    inputs = draw()

    def model(q, k, v, sink):
        return attend(q * 2, k, v, causal=True, learnable_sink=sink * 3).sum()

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile(model, backend=backend, fullgraph=True)(*inputs).backward()
    forward, backward = graphs
    assert forward.count("hopper_attention.forward.default") == 1
    assert backward.count("hopper_attention.backward.sink") == 1
    found = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    model(*inputs).backward()
    for x, gradient in zip(inputs, found, strict=True):
        torch.testing.assert_close(gradient, x.grad)


WRONG = [
    (torch.zeros(3), ValueError, r"learnable_sink must have shape .*\(4,\), got \(3,\)"),
    (torch.zeros(4, 1), ValueError, r"learnable_sink must have shape .*\(4,\), got \(4, 1\)"),
    (torch.zeros(4).half(), TypeError, r"learnable_sink must be torch\.float32, got .*float16"),
    (torch.zeros(4, device="meta"), ValueError, "learnable_sink must be on q's device, cpu"),
    ([0.0] * 4, TypeError, r"learnable_sink must be a torch\.Tensor, got list"),
]


@pytest.mark.parametrize("sink, error, words", WRONG)
def test_errors(gradient_library, sink, error, words):
    q, k, v, _ = draw()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=words):
            attend(q, k, v, learnable_sink=sink)
    with pytest.raises(error, match=words):
        hopper_attention.explain(q, k, v, learnable_sink=sink)
    assert not gradient_library.calls


@pytest.mark.parametrize("sink, error, words", WRONG[:3])
def test_operators_check_by_themselves(gradient_library, sink, error, words):
    q, k, v, _ = (x.detach() for x in draw())
    out, lse = ops.forward(q, k, v, 0.25, False)
    rest = (0.25, False, -1, -1, 0.0, False)
    for device in ("cpu", "meta"):
        x = [tensor.to(device) for tensor in (out, q, k, v, out, lse, sink)]
        with pytest.raises(error, match=words):
            ops_backward.backward_sink(x[0], None, *x[1:], *rest)
        with pytest.raises(error, match=words):
            ops.operator(*x[1:4], 0.25, False, learnable_sink=x[6])
    assert not gradient_library.calls


def test_fake_implementation():
    q, k, v, sink = (x.detach().to("meta").requires_grad_() for x in draw())
    attend(q, k, v, learnable_sink=sink).sum().backward()
    assert (sink.grad.shape, sink.grad.dtype) == ((4,), torch.float32)
