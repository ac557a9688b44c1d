"""`explain`: what it asks the library, and how its answer reads."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hopper_attention
from hopper_attention import _library, ops

ANSWER = {
    "instance": "bf16_d64_full",
    "dtype": "bfloat16",
    "mask": "full",
    "tile_m": 192,
    "tile_n": 128,
    "stages": 2,
    "num_consumers": 3,
    "cluster": 1,
    "head_dim_tile": 64,
    "head_dim_v_tile": 64,
    "smem_bytes": 200000,
    "grid": 132,
    "num_tiles": 400,
    "scheduler": "static",
    "compiled": True,
    "reason": "three consumers hide exp2",
}


def random_qkv(batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16):
    return (
        torch.randn(batch, seqlen_q, heads, d, dtype=torch.bfloat16),
        torch.randn(batch, seqlen_k, heads_kv, d, dtype=torch.bfloat16),
        torch.randn(batch, seqlen_k, heads_kv, d, dtype=torch.bfloat16),
    )


class FakeLibrary:
    """Records what it is asked, without the pointers."""

    def __init__(self):
        self.calls = []

    def prepare(self, *arguments):
        return lambda *_: self.calls.append(arguments)

    def call_table(self, *memory):
        """None: every call goes through Python."""

    def explain_forward(self, *arguments):
        self.calls.append(arguments)
        return json.dumps(ANSWER)


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setattr(_library, "_module", fake)
    monkeypatch.setattr(ops, "forward", ops._forward_cuda)
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: 0)
    monkeypatch.setattr(ops, "_workspace", lambda *_: torch.zeros(1))
    return fake


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain(library, device):
    tensors = random_qkv(d=24)
    q, k, v = (x.to(device) for x in tensors)
    explanation = hopper_attention.explain(
        q, k, v, softmax_scale=0.5, causal=True, window_size=(5, -1), return_attn_probs=True
    )
    assert explanation == hopper_attention.Explanation(**ANSWER, copies=())
    hopper_attention.flash_attn_func(*tensors, 0.5, True, window_size=(5, 9))
    asked, launched = library.calls
    assert asked == launched


def test_explain_names_copies(library):
    q, k, v = random_qkv(d=32)
    explanation = hopper_attention.explain(q[..., ::2], k[..., :16], v[..., 3:19])
    assert explanation.copies == (
        "q: the last dimension has stride 2, not 1",
        "v: the address is not a multiple of 16 bytes",
    )
    assert library.calls[0][8:10] == ((6 * 4 * 16, 4 * 16, 16), (9 * 2 * 32, 2 * 32, 32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        again = hopper_attention.explain(
            fakes[0][..., ::2], fakes[1][..., :16], fakes[2][..., 3:19]
        )
    assert again.copies == explanation.copies


def test_explanation_reads_well(library):
    lines = str(hopper_attention.explain(*random_qkv())).splitlines()
    assert lines[0] == "instance         bf16_d64_full"
    assert lines[-1] == "copies           none"
    assert len(lines) == len(ANSWER) + 1


def test_explain_refuses_what_the_function_refuses(library):
    q, k, v = random_qkv()
    with pytest.raises(NotImplementedError, match="num_splits is not built yet"):
        hopper_attention.explain(q, k, v, num_splits=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        hopper_attention.explain(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="sm_margin must be"):
        hopper_attention.explain(q, k, v, sm_margin=-1)
    assert not library.calls


def test_explain_without_the_library(monkeypatch):
    monkeypatch.setattr(_library, "_module", None)
    monkeypatch.setattr(_library, "_reason", "no kernels")
    with pytest.raises(RuntimeError, match="no kernels"):
        hopper_attention.explain(*random_qkv())
