"""Calls made again by the compiled module (bindings_calls.cpp), which is compiled by itself.

Its tables read the CPU's tensors through PyTorch's exchange interface as they read a GPU's.
"""

import ctypes
import gc
import weakref

import pytest
import torch
from call_tables import EXCHANGE, eager_calls, prepare_compiled, serve_the_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backward import assert_differentiates
from test_backward import random_qkv as dense_qkv
from test_varlen_backward import random_qkv as packed_qkv
from varlen_library import CU_K, CU_Q, operators_on_the_cpu
from varlen_library import install_library as install_varlen_library

import hopper_attention
from hopper_attention import (
    _calls,
    _eager,
    _library,
    interface,
    ops,
    ops_backward,
    ops_varlen,
    ops_varlen_backward,
)

LAYOUT = ((2, 3), (3, 1), torch.float32)


@pytest.fixture(scope="module")
def module(calls_module):
    return calls_module


class Memory:
    """A table, what it allocated, and the addresses of the calls that it made."""

    def __init__(self, module):
        self.device = 0  # the CPU's index, as DLPack has it
        self.asked, self.outputs, self.addresses = [], [], []
        self.workspaces = torch.zeros(4, 64)
        self.call, self._remember, self.known = module.call_table(
            EXCHANGE, self.empty, lambda: self.device, self.workspace
        )
        self.prepared = module.prepared

    def empty(self, shape, strides, dtype):
        self.outputs.append(torch.empty_strided(shape, strides, dtype=dtype))
        return self.outputs[-1]

    def workspace(self, device, stream):
        self.asked.append((device, stream))
        return self.workspaces[len(self.asked)]

    def run(self, *addresses):
        self.addresses.append(addresses)

    def remember(self, arguments, outputs=(LAYOUT,), num_results=1, order=(0,), run=None):
        run = self.prepared(run or self.run, len(order))
        self._remember(arguments, ((run, order),), outputs, num_results, None)


@pytest.fixture
def memory(module):
    return Memory(module)


def test_a_remembered_call_is_made_with_the_tensors_at_hand(memory):
    x, y = torch.zeros(4, 5), torch.zeros(3)
    assert memory.call(x, y, None, 0.5) is None
    # behind the arguments, 0 to 3: outputs 4 and 5, stream, workspace, nothing
    order = (1, 0, 4, 5, 6, 7, 8, 2, 3)
    memory.remember((x, y, None, 0.5), (LAYOUT, ((5,), (1,), torch.uint8)), 1, order)
    assert memory.addresses == memory.outputs == []
    for count in (1, 2):
        x, y = torch.zeros(4, 5), torch.zeros(3)
        (result,) = memory.call(x, y, None, 0.5)
        out, scratch = memory.outputs[-2:]
        assert result is out
        assert (out.shape, out.stride(), out.dtype) == LAYOUT
        assert (scratch.shape, scratch.dtype) == ((5,), torch.uint8)
        tensors = (y, x, out, scratch, memory.workspaces[1])
        a, b, c, d, shared = (tensor.data_ptr() for tensor in tensors)
        assert memory.addresses[-1] == (a, b, c, d, 0, shared, 0, 0, 0)
        assert len(memory.addresses) == count
    assert memory.asked == [(0, 0)]  # the default stream's workspace stays


BASE = (torch.zeros(4, 6, 8, dtype=torch.bfloat16), None, 0.5, True, 3)


@pytest.mark.parametrize(
    "place, value",
    [
        (0, torch.zeros(4, 6, 8, dtype=torch.float16)),
        (0, torch.zeros(4, 6, 8, dtype=torch.int16)),
        (0, torch.zeros(4, 6, 8)),
        (0, torch.zeros(4, 7, 8, dtype=torch.bfloat16)),
        (0, torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16)),
        (0, torch.zeros(4, 8, 6, dtype=torch.bfloat16).mT),
        (0, torch.zeros(4, 6, 16, dtype=torch.bfloat16)[..., :8]),
        (0, torch.zeros(193, dtype=torch.bfloat16)[1:].view(4, 6, 8)),  # at an odd address
        (0, None),
        (1, torch.zeros(3)),
        (1, False),
        (2, 0.25),
        (2, -0.5),
        (2, 1),
        (3, False),
        (3, 1),
        (4, 4),
        (4, 3.0),
        (4, 2**70),
        (4, "3"),
        (4, torch.float32),
    ],
)
def test_what_looks_otherwise_is_another_call(memory, place, value):
    memory.remember(BASE)
    assert memory.call(*BASE) is not None
    assert memory.call(*BASE[:place], value, *BASE[place + 1 :]) is None
    assert memory.call(*BASE[:-1]) is None
    assert memory.call(*BASE, 3) is None
    assert memory.call() is None
    assert len(memory.addresses) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_call_has_its_own_outputs(module, data):
    memory = Memory(module)
    sizes = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    looks = st.tuples(sizes, sizes, st.integers(-1, 1))
    known = {}
    for number, (first, second, scalar) in enumerate(data.draw(st.lists(looks, max_size=12))):
        arguments = (torch.zeros(first), torch.zeros(second), scalar)
        seen = tuple(first), tuple(second), scalar
        found = memory.call(*arguments)
        assert (found is not None) == (seen in known)
        if found is None:
            known[seen] = number + 1
            memory.remember(arguments, (((number + 1,), (1,), torch.uint8),), order=(0, 1))
        else:
            assert found[0].shape == (known[seen],)


def test_another_device_is_current(memory):
    memory.remember(BASE)
    memory.device = 1
    assert memory.call(*BASE) is None
    assert memory.outputs == []


@pytest.mark.parametrize("name", ["run", "empty", "current_device", "workspace"])
def test_errors_arrive(memory, module, name):
    def fail(*_):
        raise MemoryError(f"{name} has none")

    functions = {"empty": memory.empty, "current_device": lambda: 0, "workspace": memory.workspace}
    if name in functions:
        functions[name] = fail
    call, remember, _ = module.call_table(EXCHANGE, *functions.values())
    run = module.prepared(fail if name == "run" else memory.run, 2)
    shared_workspace = len(BASE) + 2  # behind the output and the stream
    remember(BASE, ((run, (0, shared_workspace)),), (LAYOUT,), 1, None)
    for _ in range(2):
        with pytest.raises(MemoryError, match=f"{name} has none"):
            call(*BASE)
    assert memory.addresses == []


def test_what_cannot_be_remembered_is_refused(memory):
    with pytest.raises(ValueError, match="run must be a prepared call"):
        memory._remember(BASE, ((memory.run, (0,)),), (LAYOUT,), 1, None)
    with pytest.raises(ValueError, match="too many arguments"):
        memory.remember((None,) * 33)
    with pytest.raises(ValueError, match=r"too many .* results"):
        memory.remember(BASE, num_results=2)
    with pytest.raises(ValueError, match="an output must be"):
        memory.remember(BASE, outputs=((3, 4),))
    for place in (-2, len(BASE) + 4):
        with pytest.raises(ValueError, match="order has a place that is none"):
            memory.remember(BASE, order=(place,))
    with pytest.raises(ValueError, match="order must have a place for each address"):
        memory._remember(BASE, ((memory.prepared(memory.run, 2), (0,)),), (LAYOUT,), 1, None)
    assert memory.call(*BASE) is None


def test_tables_keep_no_tensor(memory):
    q = torch.zeros(4, 5)
    memory.remember((q, 1))
    (out,) = memory.call(q, 1)
    memory.outputs.clear()
    kept = [weakref.ref(q), weakref.ref(out)]
    del q, out
    gc.collect()
    assert [x() for x in kept] == [None, None]


def test_tables_are_bounded(memory):
    q = torch.zeros(4)
    for number in range(4097):
        memory.remember((q, number))
    assert memory.call(q, 0) is None  # all began anew
    assert memory.call(q, 4096) is not None


def test_calls_in_steps(module):
    memory = Memory(module)
    x = torch.zeros(4)
    scratch = ((64,), (1,), torch.uint8)
    first, second = (memory.prepared(memory.run, count) for count in (2, 3))
    # places: 0 and 1 the arguments, 2 the result, 3 what is freed
    steps = ((first, (0, (3, 16))), (second, ((3, 16), 2, (3, 48))))
    memory._remember((x, "é" * 9), steps, (LAYOUT, scratch), 1, "a note")
    assert memory.known(x, "é" * 9) == (steps, (LAYOUT, scratch), 1, "a note")
    assert memory.known(x, "é" * 8) is None
    (out,) = memory.call(x, "é" * 9)
    begin = memory.outputs[1].data_ptr()
    assert memory.addresses == [
        (x.data_ptr(), begin + 16),
        (begin + 16, out.data_ptr(), begin + 48),
    ]


@pytest.mark.parametrize("value", ["ab", ("ab", 1, None), (), (0.5,), (True, "abcdefghi")])
def test_strings_and_tuples_tell_calls_apart(module, value):
    memory = Memory(module)
    x = torch.zeros(4)
    memory.remember((x, value))
    assert memory.call(x, value) is not None
    others = [
        "ba",
        "ab\0",
        "",
        ("ab", 1),
        ("ab", 1, 0),
        ("ab", 1.0, None),
        (0.25,),
        (1, "abcdefghi"),
    ]
    others += [(True, "abcdefghj"), ((),), ((1,), 2), [], None, (x,)]
    assert all(memory.call(x, other) is None for other in others)


def test_a_tensor_that_no_step_reads_is_not_remembered(module):
    memory = Memory(module)
    x, y = torch.zeros(4), torch.zeros(3)
    memory.remember((x, y))
    assert memory.call(x, y) is None
    memory.remember((x, y), order=(0, 1))
    assert memory.call(x, y) is not None


def test_an_exchange_interface_of_another_version(module):
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        ctypes.py_object,
    )
    name, version = b"dlpack_exchange_api", (ctypes.c_uint32 * 32)(2, 0)
    capsule = new(ctypes.addressof(version), name, None)
    assert module.call_table(capsule, *[len] * 3) is None
    with pytest.raises(TypeError, match="4 arguments"):
        module.call_table(EXCHANGE)


@pytest.fixture(params=["the operators' calls", "eager calls"])
def by(request, monkeypatch):
    """Which tables find calls again."""
    if request.param == "the operators' calls":
        for calls in eager_calls():
            monkeypatch.setattr(calls, "call", _eager._never)
    return request.param


@pytest.fixture
def dense(compiled_library, by):
    return compiled_library


@pytest.mark.parametrize(
    "arguments",
    [{}, {"causal": True}, {"window_size": (5, 2), "softcap": 1.5}],
)
@pytest.mark.parametrize("use_lse", [False, True])
def test_both_passes_again(dense, monkeypatch, arguments, use_lse):
    for again in range(3):
        assert_differentiates(dense_qkv(), use_lse, **arguments)
        if not again:
            # Nothing derives a call once more.
            monkeypatch.setattr(ops, "_plans", None)
            monkeypatch.setattr(ops_backward, "launch", None)
    assert len(dense.calls) == 3
    assert len(dense.prepared) == 1


def test_a_sink_again(dense, monkeypatch):
    sink = torch.randn(4).requires_grad_()
    found = []
    inputs = dense_qkv()
    for again in range(2):
        out = hopper_attention.flash_attn_func(*inputs, learnable_sink=sink)
        found.append(torch.autograd.grad(out, (*inputs, sink), torch.ones_like(out)))
        if not again:
            monkeypatch.setattr(ops_backward, "launch", None)
    assert [call["dsink"] != 0 for call in dense.calls] == [True, True]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_deterministic_algorithms_are_another_call(dense):
    q, k, v = dense_qkv()
    for wanted in (False, True, False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            out = hopper_attention.flash_attn_func(q, k, v)
            out.backward(torch.ones_like(out))
        finally:
            torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in dense.calls] == [False, True, False, True]


def test_what_must_be_copied_is_copied_each_time(dense):
    inputs = dense_qkv()
    expected = None
    for _ in range(2):
        out = hopper_attention.flash_attn_func(*inputs)
        one = torch.ones_like(out)
        odd = torch.ones(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
        for dout in (one, odd, one[:, :, :1, :1].expand(out.shape), one.mT.contiguous().mT):
            found = torch.autograd.grad(out, inputs, dout, retain_graph=True)
            expected = expected or found
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_packed_batches_again(module, by):
    with pytest.MonkeyPatch.context() as patch, operators_on_the_cpu():
        fake = install_varlen_library(patch)
        serve_the_cpu(patch)
        patch.setattr(ops_varlen, "forward", ops_varlen._inference)
        for name in ("prepare_varlen", "prepare_varlen_backward"):
            prepare_compiled(patch, module, fake, name)
        inputs = [x.detach().requires_grad_() for x in packed_qkv()]
        found = []
        for again in range(2):
            out = hopper_attention.flash_attn_varlen_func(*inputs, CU_Q, CU_K, 5, 6, causal=True)
            found.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
            if not again:
                patch.setattr(ops_varlen, "_plans", None)
                patch.setattr(ops_varlen_backward, "launch", None)
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        assert len(fake.calls) == 4
        assert len(fake.asked) == 2


def test_where_pytorch_has_no_exchange_interface(monkeypatch):
    monkeypatch.setattr(_calls, "_exchange", None)
    monkeypatch.setattr(_library, "_module", type("Library", (), {"call_table": None}))
    for _ in range(2):
        ops._calls.remember(BASE, len, (LAYOUT,), 1)
        assert ops._calls.call(*BASE) is None
        interface._eager.adopt(BASE, ops._calls, BASE)
        assert interface._eager.call(*BASE) is None
