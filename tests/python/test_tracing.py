"""The operator without a device: fake tensors, torch.compile, torch.export."""

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hopper_attention


def random_qkv(batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16):
    return (
        torch.randn(batch, seqlen_q, heads, d, dtype=torch.bfloat16),
        torch.randn(batch, seqlen_k, heads_kv, d, dtype=torch.bfloat16),
        torch.randn(batch, seqlen_k, heads_kv, d, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("d_v", [16, 8])
def test_fake_implementation(device, d_v):
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        q = torch.empty(2, 4, 6, 16, dtype=torch.float16, device=device).transpose(1, 2)
        k = torch.empty(2, 9, 2, 16, dtype=torch.float16, device=device)
        v = torch.empty(2, 9, 2, d_v, dtype=torch.float16, device=device)
        out, lse = hopper_attention.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.device.type == lse.device.type == device
    assert (out.shape, out.dtype, out.stride()) == (
        (2, 6, 4, d_v), torch.float16, (24 * d_v, 4 * d_v, d_v, 1)
    )  # fmt: skip
    assert (lse.shape, lse.dtype, lse.stride()) == ((2, 4, 6), torch.float32, (24, 6, 1))


def test_fake_implementation_checks():
    q, k, v = (x.to("meta") for x in random_qkv())
    with pytest.raises(ValueError, match="k and v must have the same sequence length"):
        hopper_attention.flash_attn_func(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="softcap must be 0"):
        hopper_attention.flash_attn_func(q, k, v, softcap=-1.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    graphs = []

    def backend(graph, _):
        graphs.append(graph.graph)
        return lambda *_: (torch.zeros(1), torch.zeros(1))

    def model(q, k, v):
        out, lse = hopper_attention.flash_attn_func(
            q * 2, k, v, causal=True, window_size=(7, None), return_attn_probs=True
        )
        return out + 1, lse

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*random_qkv())
    (graph,) = graphs
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.hopper_attention.forward.default) == 1


def test_exports_with_dynamic_lengths():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return hopper_attention.flash_attn_func(q, k, v, causal=True)

    batch, seqlen_k = torch.export.Dim("batch"), torch.export.Dim("seqlen_k")
    shapes = {"q": {0: batch}, "k": {0: batch, 1: seqlen_k}, "v": {0: batch, 1: seqlen_k}}
    exported = torch.export.export(Model(), random_qkv(), dynamic_shapes=shapes)
    assert "torch.ops.hopper_attention.forward.default" in str(exported.graph)


def compiled_graphs(function, *inputs, **options):
    """The operators of the graphs that compiling makes, forward first, by AOTAutograd."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    outputs = torch.compile(function, backend=backend, fullgraph=True, **options)(*inputs)
    return graphs, outputs


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_the_backward_pass(dynamic):
    def model(q, k, v):
        out, lse = hopper_attention.flash_attn_func(
            q * 2, k, v, causal=True, deterministic=True, return_attn_probs=True
        )
        return (out * 3).sum() + lse.sum()

    inputs = [x.to("meta").requires_grad_() for x in random_qkv()]
    graphs, loss = compiled_graphs(model, *inputs, dynamic=dynamic)
    loss.backward()
    forward, backward = graphs
    assert forward.count("hopper_attention.forward.default") == 1
    assert backward.count("hopper_attention.backward.default") == 1
    assert not any("forward" in target for target in backward)  # nothing is computed again
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def test_compiled_code_without_gradients_has_no_backward_pass():
    inputs = [x.to("meta").requires_grad_() for x in random_qkv()]
    with torch.no_grad():
        graphs, out = compiled_graphs(hopper_attention.flash_attn_func, *inputs)
    assert len(graphs) == 1
    assert not out.requires_grad


def test_modes_and_subclasses_see_the_operator():
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            seen.append(("function", function))
            return function(*arguments, **(keywords or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(("dispatch", function))
            return function(*arguments, **(keywords or {}))

    class Tensors(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            seen.append(("subclass", function))
            return super().__torch_function__(function, types, arguments, keywords or {})

    q, k, v = (x.to("meta") for x in random_qkv())
    operator = torch.ops.hopper_attention.forward.inference
    for arguments in ({}, {"sm_margin": 1}):
        for name, mode in (("function", Functions()), ("dispatch", Dispatches())):
            with mode:
                out = hopper_attention.flash_attn_func(q, k, v, **arguments)
            assert out.shape == q.shape
            assert (name, operator) in seen
        hopper_attention.flash_attn_func(q.as_subclass(Tensors), k, v, **arguments)
        assert ("subclass", operator) in seen
        seen.clear()


def test_schema():
    assert str(torch.ops.hopper_attention.forward.default._schema) == (
        "hopper_attention::forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, "
        "int window_left=-1, int window_right=-1, float softcap=0., int sm_margin=0, "
        "Tensor? learnable_sink=None, bool deterministic=False) -> (Tensor out, Tensor lse)"
    )
    assert str(torch.ops.hopper_attention.backward.default._schema) == (
        "hopper_attention::backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
        "Tensor out, Tensor lse, float softmax_scale, bool causal, int window_left, "
        "int window_right, float softcap, bool deterministic) "
        "-> (Tensor dq, Tensor dk, Tensor dv)"
    )
