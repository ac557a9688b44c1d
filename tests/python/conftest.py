"""What several test files share: a library that stands in for the compiled one, with gradients.

It reads and writes tensors by address and strides, as the kernels do, in float64 and by the
formulas of ops_backward.py: wrong pointers, strides or formulas give gradients other than those of
autograd through the reference. The operators' kernels for CUDA serve CPU tensors, so that all of
PyTorch's machinery is the real one.
"""

import warnings

import call_tables
import pytest
import torch
from gradient_formulas import at, formulas

from hopper_attention import _library, attention_fp8, ops, ops_backward, reference

STREAM = 4711
TENSORS = ["q", "k", "v", "out", "dout", "dq", "dk", "dv"]
POINTERS = [*TENSORS[:5], "lse", "dlse", *TENSORS[5:], "workspace", "stream", "sink", "dsink"]
SIZES = ["batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"]
SCALARS = ["softmax_scale", "softcap", "causal", "window_left", "window_right", "deterministic"]
WORKSPACE_BYTES = 640


class FakeLibrary:
    def __init__(self):
        self.calls = []
        self.prepared = []

    def prepare(self, dtype, *arguments):
        sizes = dict(zip(SIZES, arguments, strict=False))
        strides = arguments[7:11]
        scale, softcap, causal, *window = arguments[11:16]
        return lambda *pointers: self.forward(
            dtype, sizes, strides, (scale, causal, window, softcap), pointers
        )

    def forward(self, dtype, sizes, strides, options, pointers):
        batch, seqlen_q, seqlen_k, heads, heads_kv, d, d_v = sizes.values()
        dtype = (torch.float16, torch.bfloat16)[dtype]
        rows, keys = (batch, seqlen_q, heads), (batch, seqlen_k, heads_kv)
        shapes = ((*rows, d), (*keys, d), (*keys, d_v), (*rows, d_v))
        q, k, v, out = (
            at(address, shape, (*of_tensor, 1), dtype)
            for address, shape, of_tensor in zip(pointers[:4], shapes, strides, strict=True)
        )
        sink = at(pointers[7], (heads,), (1,), torch.float32) if pointers[7] else None
        exact, lse = reference.attention(q, k, v, *options, sink)
        out.copy_(exact)
        at(pointers[4], (lse.numel(),), (1,), torch.float32).copy_(lse.flatten())

    def workspace_bytes(self):
        return 64

    def call_table(self, *memory):
        """None, as where PyTorch cannot show the library its tensors."""

    def prepare_backward(self, dtype, *arguments):
        call = dict(zip([*SIZES, "strides", *SCALARS], arguments, strict=True))
        self.prepared.append(call | {"dtype": dtype})
        return lambda *pointers: self.backward(dtype, call, pointers), WORKSPACE_BYTES

    def backward(self, dtype, call, pointers):
        p = dict(zip(POINTERS, pointers, strict=True))
        self.calls.append(call | p)
        assert p["stream"] == STREAM
        batch, seqlen_q, seqlen_k, heads, heads_kv, d, d_v = (call[name] for name in SIZES)
        rows, keys = (batch, seqlen_q, heads), (batch, seqlen_k, heads_kv)
        q, k, v, out, dout, dq, dk, dv = ((*rows, d), (*keys, d), (*keys, d_v), *[(*rows, d_v)] * 2,
                                          (*rows, d), (*keys, d), (*keys, d_v))  # fmt: skip
        tensors = []
        for name, shape, strides in zip(
            TENSORS, (q, k, v, out, dout, dq, dk, dv), call["strides"], strict=True
        ):
            assert p[name] % 16 == 0
            assert all(stride % 8 == 0 for stride in strides)
            tensors.append(
                at(p[name], shape, (*strides, 1), (torch.float16, torch.bfloat16)[dtype])
            )
        of_rows = ((batch, heads, seqlen_q), (heads * seqlen_q, seqlen_q, 1), torch.float32)
        lse = at(p["lse"], *of_rows)
        dlse = at(p["dlse"], *of_rows) if p["dlse"] else None
        if p["dsink"]:
            sink = at(p["sink"], (heads,), (1,), torch.float32).double()
            delta = (tensors[3].double() * tensors[4].double()).sum(3).transpose(1, 2)
            delta = delta - (0 if dlse is None else dlse.double())
            share = torch.exp(sink[:, None] - lse.double()).masked_fill(lse == -torch.inf, 0.0)
            at(p["dsink"], (heads,), (1,), torch.float32).copy_(-(share * delta).sum((0, 2)))
        for to, gradient in zip(tensors[5:], formulas(*tensors[:5], lse, dlse, call), strict=True):
            to.copy_(gradient)


@pytest.fixture(scope="session")
def calls_module(tmp_path_factory):
    """What finds calls again, compiled by itself."""
    if call_tables.UNAVAILABLE is not None:
        pytest.skip(call_tables.UNAVAILABLE)
    return call_tables.compile_module(tmp_path_factory.mktemp("calls"))


@pytest.fixture(autouse=True)
def no_calls_from_before(monkeypatch):
    """Tables of calls without any: what they keep of a test is of libraries that stand in."""
    call_tables.empty(monkeypatch)


@pytest.fixture
def gradient_library(monkeypatch):
    """A stand-in library, and CPU tensors that go the way of CUDA ones to it."""
    fake = FakeLibrary()
    workspace = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(_library, "_module", fake)
    monkeypatch.setattr(ops, "_plans", {})
    for kind in ("_DENSE", "_WITH_SINK"):
        monkeypatch.setattr(ops_backward, kind, getattr(ops_backward, kind)._replace(plans={}))
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: STREAM)
    monkeypatch.setattr(ops, "_workspace", lambda device_index, stream: workspace)
    implementations = torch.library.Library("hopper_attention", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that others are overridden
        for name, function in (
            ("forward", ops._forward_cuda),
            ("forward.inference", ops._forward_cuda),
            ("backward", ops_backward._backward_cuda),
            ("backward.sink", ops_backward._backward_cuda),
            ("backward.plain", ops_backward._backward_cuda),
            ("backward.plain_sink", ops_backward._backward_cuda),
            ("attention_fp8", attention_fp8._attention),
        ):
            implementations.impl(name, function, "CPU", allow_override=True)
        yield fake
        implementations._destroy()


@pytest.fixture
def compiled_library(monkeypatch, calls_module, gradient_library):
    """The stand-in library, whose calls are found again as the compiled one's."""
    call_tables.serve_the_cpu(monkeypatch)
    for name in ("prepare", "prepare_backward"):
        call_tables.prepare_compiled(monkeypatch, calls_module, gradient_library, name)
    return gradient_library
