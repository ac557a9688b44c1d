"""The operator: what it checks, and what it passes to the library.

A library that stands in for the compiled one reads tensors by address and strides, as the kernels
do, and computes with the float64 reference: wrong pointers or strides give wrong results.
"""

import contextlib
import math

import pytest
import torch
from gradient_formulas import at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import hopper_attention
from hopper_attention import _layout, _library, checks, ops, reference

# The library's arguments, in its order.
POINTERS = ["q", "k", "v", "out", "lse", "workspace", "stream", "sink"]
SIZES = ["batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"]
STRIDES = ["q_strides", "k_strides", "v_strides", "out_strides"]
SCALARS = ["softmax_scale", "softcap", "causal", "window_left", "window_right", "sm_margin"]
NAMES = [*POINTERS, "dtype", *SIZES, *STRIDES, *SCALARS]
STREAM = 4711


class FakeLibrary:
    def __init__(self):
        self.calls = []
        self.prepared = 0

    def workspace_bytes(self):
        return 64

    def call_table(self, *memory):
        """None, as where PyTorch cannot show the library its tensors."""

    def prepare(self, *arguments):
        self.prepared += 1
        return lambda *addresses: self.forward(*addresses, *arguments)

    def forward(self, *arguments):
        call = dict(zip(NAMES, arguments, strict=True))
        self.calls.append(call)
        dtype = {0: torch.float16, 1: torch.bfloat16}[call["dtype"]]
        batch, seqlen_q, seqlen_k = call["batch"], call["seqlen_q"], call["seqlen_k"]
        heads, heads_kv, d, d_v = (call[name] for name in SIZES[3:])
        for name in "qkv":
            assert call[name] != 0 or (name != "q" and seqlen_k == 0)  # then it is not read
            assert call[name] % 16 == 0
            assert all(stride % 8 == 0 for stride in call[f"{name}_strides"])
        q = at(call["q"], (batch, seqlen_q, heads, d), (*call["q_strides"], 1), dtype)
        k = at(call["k"], (batch, seqlen_k, heads_kv, d), (*call["k_strides"], 1), dtype)
        v = at(call["v"], (batch, seqlen_k, heads_kv, d_v), (*call["v_strides"], 1), dtype)
        out = at(call["out"], (batch, seqlen_q, heads, d_v), (*call["out_strides"], 1), dtype)
        lse = at(call["lse"], (batch * heads * seqlen_q,), (1,), torch.float32)
        window = (call["window_left"], call["window_right"])
        sink = at(call["sink"], (heads,), (1,), torch.float32) if call["sink"] else None
        exact = reference.attention(
            q, k, v, call["softmax_scale"], call["causal"], window, call["softcap"], sink
        )
        out.copy_(exact[0])
        lse.copy_(exact[1].flatten())


def install_library(monkeypatch):
    """A stand-in library, and CPU tensors that go the way of CUDA ones to it."""
    fake = FakeLibrary()
    workspace = torch.zeros(64, dtype=torch.uint8)
    fake.workspace = workspace.data_ptr()
    monkeypatch.setattr(_library, "_module", fake)
    monkeypatch.setattr(ops, "forward", ops._forward_cuda)
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: STREAM)
    monkeypatch.setattr(ops, "_workspace", lambda device_index, stream: workspace)
    return fake


@pytest.fixture
def library(monkeypatch):
    return install_library(monkeypatch)


def random_qkv(
    batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16, d_v=None, dtype=torch.bfloat16
):
    return (
        torch.randn(batch, seqlen_q, heads, d).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, d).to(dtype),
        torch.randn(batch, seqlen_k, heads_kv, d if d_v is None else d_v).to(dtype),
    )


def assert_attends(q, k, v, **arguments):
    out, lse = hopper_attention.flash_attn_func(q, k, v, **arguments, return_attn_probs=True)
    exact_out, exact_lse = reference.attention(q, k, v, **arguments)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(out, exact_out.to(q.dtype), rtol=0, atol=0)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype, code", [(torch.float16, 0), (torch.bfloat16, 1)])
def test_arguments_of_the_library(library, dtype, code):
    q, k, v = random_qkv(2, 6, 9, 4, 2, 24, 16, dtype=dtype)
    out, lse = hopper_attention.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.3,
        causal=True,
        window_size=(5, 2),
        softcap=7.0,
        sm_margin=3,
        return_attn_probs=True,
    )
    assert library.calls == [
        {
            "q": q.data_ptr(),
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "out": out.data_ptr(),
            "lse": lse.data_ptr(),
            "workspace": library.workspace,
            "stream": STREAM,
            "sink": 0,
            "dtype": code,
            "batch": 2,
            "seqlen_q": 6,
            "seqlen_k": 9,
            "heads": 4,
            "heads_kv": 2,
            "head_dim": 24,
            "head_dim_v": 16,
            "q_strides": (6 * 4 * 24, 4 * 24, 24),
            "k_strides": (9 * 2 * 24, 2 * 24, 24),
            "v_strides": (9 * 2 * 16, 2 * 16, 16),
            "out_strides": (6 * 4 * 16, 4 * 16, 16),
            "softmax_scale": 0.3,
            "softcap": 7.0,
            "causal": True,
            "window_left": 5,
            "window_right": 0,  # causal overrides it
            "sm_margin": 3,
        }
    ]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_layout(data):
    """Permuted, sliced, expanded, shifted: read in place or copied, the result is right."""
    draw = data.draw
    batch, seqlen_q, seqlen_k = (draw(st.integers(0, 3)) for _ in range(3))
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def tensor(seqlen, heads):
        order = draw(st.permutations(range(4)))
        padding = draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 8), (1, 0, 0, 3), (0, 2, 1, 0)]))
        shape = (batch, seqlen, heads, 16)
        sizes = [shape[i] + padding[i] for i in order]
        shift = draw(st.sampled_from([0, 0, 8, 1]))
        storage = torch.randn(math.prod(sizes) + shift).to(torch.float16)
        x = storage[shift:].view(sizes).permute([order.index(i) for i in range(4)])
        x = x[:batch, :seqlen, :heads, :16]
        expanded = draw(st.sampled_from([None, None, 0, 1, 2]))
        if expanded is None or x.shape[expanded] == 0:
            return x
        return x.narrow(expanded, 0, 1).expand(x.shape)

    q, k, v = (tensor(*s) for s in ((seqlen_q, heads_kv * group), *[(seqlen_k, heads_kv)] * 2))
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = install_library(monkeypatch)
        assert_attends(q, k, v, causal=draw(st.booleans()))
        assert len(fake.calls) == (batch * seqlen_q > 0)
        for name, x in (("q", q), ("k", k), ("v", v)) if fake.calls else ():
            in_place = fake.calls[0][name] == x.data_ptr() or x.numel() == 0
            assert in_place == (_layout.copy_reason(x) is None)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # (b, h, s, d)
        lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
        lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
        lambda x: x[:, ::2],
    ],
)
def test_these_are_not_copied(library, view):
    q, k, v = (view(x) for x in random_qkv())
    assert_attends(q, k, v)
    call = library.calls[0]
    assert (call["q"], call["k"], call["v"]) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert call["k_strides"] == k.stride()[:3]


@pytest.mark.parametrize(
    "view, reason",
    [
        (lambda x: x[..., ::2], "the last dimension has stride 2, not 1"),
        (lambda x: torch.cat([x] * 3, 3)[..., 1:17], "the address is not a multiple of 16 bytes"),
        (
            lambda x: torch.cat([x, x[..., :4]], 3)[..., :16],
            "the head stride, 40 bytes, is not a multiple of 16",
        ),
        (
            lambda x: torch.cat([x.flatten(1), x[:, 0, 0, :4]], 1)[:, :288].unflatten(
                1, (9, 2, 16)
            ),
            "the batch stride, 584 bytes, is not a multiple of 16",
        ),
    ],
)
def test_these_are_copied(library, view, reason):
    q, k, v = random_qkv(2, 6, 9, 2, 2, 32 if "stride 2" in reason else 16)
    k = view(k)
    q, v = q[..., :16], v[..., :16]
    assert _layout.copy_reason(k) == reason
    assert_attends(q, k, v)
    assert library.calls[0]["k"] != k.data_ptr()


def test_strides_of_size_one_dimensions_do_not_matter(library):
    q, k, v = random_qkv(1, 6, 9, 1, 1)
    k = k.as_strided(k.shape, (3, 16, 5, 1))
    assert_attends(q, k, v)
    assert library.calls[0]["k"] == k.data_ptr()
    assert library.calls[0]["k_strides"] == (0, 16, 0)


@pytest.mark.parametrize(
    "window, passed", [((2**40, 2**40), (2**31 - 1, 2**31 - 1)), ((-1, 3), (-1, 3))]
)
def test_windows_fit_32_bits(library, window, passed):
    assert_attends(*random_qkv(), window_size=window)
    assert (library.calls[0]["window_left"], library.calls[0]["window_right"]) == passed


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"seqlen_q": 0}, {"heads": 0}, {"heads": 0, "heads_kv": 0}]
)
def test_empty_outputs_launch_nothing(library, empty):
    assert_attends(*random_qkv(**empty))
    assert not library.calls


def test_no_keys(library):
    q, k, v = random_qkv(seqlen_k=0)
    assert_attends(q, k, v)
    assert len(library.calls) == 1
    assert not any(stride % 8 for stride in library.calls[0]["k_strides"])


def test_operator_checks_by_itself(library):
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="k and v must have the same sequence length"):
        ops.forward(q, k, v[:, 1:], 1.0, False, -1, -1, 0.0, 0)
    with pytest.raises(ValueError, match="head dimension of q and k must be a multiple of 8"):
        ops.forward(q[..., :4], k[..., :4], v[..., :4], 1.0, False, -1, -1, 0.0, 0)
    with pytest.raises(ValueError, match="window_size must be"):
        ops.forward(q, k, v, 1.0, False, -5, -1, 0.0, 0)
    with pytest.raises(TypeError, match=r"must be torch\.float16 or torch.bfloat16"):
        ops.forward(q.float(), k.float(), v.float(), 1.0, False, -1, -1, 0.0, 0)
    long = q[:1, :1].expand(checks.MAX_LENGTH + 1, -1, -1, -1)
    with pytest.raises(ValueError, match="batch must be at most"):
        ops.forward(long, long, long, 1.0, False, -1, -1, 0.0, 0)
    assert not library.calls


def test_library_is_missing(library, monkeypatch):
    monkeypatch.setattr(_library, "_module", None)
    monkeypatch.setattr(_library, "_reason", "no kernels")
    with pytest.raises(RuntimeError, match="no kernels"):
        hopper_attention.flash_attn_func(*random_qkv())


def test_device_is_the_tensors_during_the_launch(library, monkeypatch):
    current = [3]
    launched_on = []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], torch.empty(0, device=wanted).get_device()
        yield
        current[0] = before

    monkeypatch.setattr(ops, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(library, "forward", lambda *_: launched_on.append(current[0]))
    hopper_attention.flash_attn_func(*random_qkv())
    assert launched_on == [-1]
    assert current == [3]


def test_calls_of_one_problem_are_prepared_once(library):
    q, k, v = random_qkv()
    for _ in range(3):
        assert_attends(q, k, v)
    assert_attends(*random_qkv())
    assert (library.prepared, len(library.calls)) == (1, 4)
    others = [
        {"causal": True},
        {"softcap": 2.0},
        {"softmax_scale": 0.5},
        {"window_size": (3, -1)},
        {"window_size": (-1, 3)},
    ]
    for count, arguments in enumerate(others, start=2):
        assert_attends(q, k, v, **arguments)
        assert library.prepared == count
    assert_attends(q.half(), k.half(), v.half())
    assert_attends(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert_attends(q, k[:, :8], v[:, :8])
    hopper_attention.flash_attn_func(q, k, v, sm_margin=1)
    assert library.prepared == 10


def test_a_prepared_problem_still_looks_at_addresses(library):
    q, k, v = random_qkv()
    assert_attends(q, k, v)
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape).copy_(k)
    assert_attends(q, odd, v)
    assert library.calls[1]["k"] not in (odd.data_ptr(), k.data_ptr())
    assert_attends(q, k, v)
    assert library.calls[2]["k"] == k.data_ptr()
    assert library.prepared == 2


def test_contiguous_tensors_share_a_plan(library):
    """Whatever the strides of their dimensions of size 1."""
    q, k, v = random_qkv(1, 6, 9, 1, 1)
    assert_attends(q, k, v)
    assert_attends(q, k.as_strided(k.shape, (3, 16, 5, 1)), v)
    assert library.prepared == 1


@pytest.mark.parametrize("shape", [{}, {"seqlen_q": 0}, {"batch": 0}, {"d_v": 8}])
def test_public_and_private_allocation_agree(library, monkeypatch, shape):
    tensors = random_qkv(**shape)
    found = ops.forward(*tensors, 0.25, True)
    with FakeTensorMode():
        ways = [ops._public_empty(*ops._contiguous(x.shape, x.dtype)) for x in found]
    expected = ops._allocate(tensors[0], *tensors[0].shape[:3], tensors[2].shape[3])
    for private, public, plain in zip(found, ways, expected, strict=True):
        assert private.shape == public.shape == plain.shape
        assert private.stride() == public.stride() == plain.stride()
        assert private.dtype == public.dtype == plain.dtype
        assert (private.device.type, public.device.type) == ("cpu", "cuda")


def test_one_workspace_for_each_device_and_stream(monkeypatch):
    monkeypatch.setattr(ops, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_library, "_module", FakeLibrary())
    monkeypatch.setattr(ops, "_lasting_workspace", lambda size, index: torch.zeros(size))
    made = {key: ops._workspace(*key) for key in [(0, 0), (0, 7), (1, 7)]}
    assert len({workspace.data_ptr() for workspace in made.values()}) == 3
    for key, workspace in made.items():
        assert ops._workspace(*key) is workspace
        assert workspace.shape == (64,)


def test_graph_capture_has_workspaces_of_its_own(monkeypatch):
    monkeypatch.setattr(ops, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_library, "_module", FakeLibrary())
    with FakeTensorMode():
        first, second = (ops._workspace(0, 7) for _ in range(2))
    assert first is not second
    assert first.device == torch.device("cuda", 0)
    assert first.shape == (64,)
    assert not ops._workspaces
