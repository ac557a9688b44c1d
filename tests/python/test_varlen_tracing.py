"""Packed batches without a device: fake tensors and torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from varlen_library import CU_K, CU_Q, random_qkv

from hopper_attention import flash_attn_varlen_func as attend
from hopper_attention import ops_varlen


def meta_call(**changes):
    return [x.to("meta") for x in (*random_qkv(**changes), CU_Q, CU_K)]


def test_fake_implementation():
    on_meta = meta_call(d_v=8)
    with FakeTensorMode():
        on_card = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in on_meta]
        found = attend(*on_card, 5, 6, return_attn_probs=True)
    for out, lse in (found, attend(*on_meta, 5, 6, return_attn_probs=True)):
        assert (out.shape, out.dtype, out.stride()) == ((12, 4, 8), torch.bfloat16, (32, 8, 1))
        assert (lse.shape, lse.dtype, lse.stride()) == ((4, 12), torch.float32, (12, 1))
    assert found[0].device.type == "cuda"
    q, k, v, cu_q, cu_k = meta_call()
    with pytest.raises(ValueError, match=r"must both have .* entries"):
        attend(q, k, v, cu_q[1:], cu_k, 5, 6)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(dynamic):
    graphs = []

    def backend(graph, _):
        graphs.append(graph.graph)
        return lambda *_: (torch.zeros(1), torch.zeros(1))

    def model(q, k, v, cu_q, cu_k, longest, used):
        out, lse = attend(
            *(q * 2, k, v, cu_q, cu_k, longest, longest),
            seqused_k=used, causal=True, window_size=(7, None), return_attn_probs=True
        )  # fmt: skip
        return out + 1, lse

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for longest in (5, 6, 7, 8):
            compiled(*random_qkv(), CU_Q, CU_K, longest, CU_K.diff().int())
    assert len(graphs) <= 2  # the longest sequence's length makes no graph of its own
    targets = [node.target for node in graphs[-1].nodes if node.op == "call_function"]
    assert targets.count(torch.ops.hopper_attention.forward_varlen.default) == 1


def test_schema():
    lengths = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k"
    scalars = "float softmax_scale, bool causal, int window_left=-1, int window_right=-1, "
    assert str(ops_varlen.operator._schema) == (
        f"hopper_attention::forward_varlen(Tensor q, Tensor k, Tensor v, {lengths}, {scalars}"
        "float softcap=0., int sm_margin=0, bool deterministic=False) -> (Tensor out, Tensor lse)"
    )
