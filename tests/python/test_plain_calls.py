"""Eager calls that want a gradient: the short way past the dispatcher, and who must see them."""

import warnings

import pytest
import torch
from test_backward import random_qkv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hopper_attention
from hopper_attention import _autograd, ops, ops_backward

attend = hopper_attention.flash_attn_func
FORWARD = torch.ops.hopper_attention.forward
BACKWARD = torch.ops.hopper_attention.backward


def is_plain(*tensors):
    return _autograd.is_plain("hopper_attention::forward", *(tensors or random_qkv()))


class Dispatches(TorchDispatchMode):
    """The operators that reach the dispatcher's modes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.append(function)
        return function(*arguments, **(keywords or {}))


class Functions(TorchFunctionMode):
    """The functions that modes in Python see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.seen.append(function)
        return function(*arguments, **(keywords or {}))


class Tensors(torch.Tensor):
    """A subclass, as a user's."""


@pytest.fixture
def seen_by_tensors(monkeypatch):
    """The functions that Tensors see."""
    seen = []

    def see(cls, function, types, arguments=(), keywords=None):
        seen.append(function)
        return torch.Tensor.__torch_function__.__func__(
            cls, function, types, arguments, keywords or {}
        )

    monkeypatch.setattr(Tensors, "__torch_function__", classmethod(see), raising=False)
    return seen


@pytest.fixture
def autocast_rules():
    """Calls that a user's autocast rule for the operator saw."""
    library = torch.library.Library("hopper_attention", "IMPL")
    calls = []

    def rule(q, k, v, *rest):
        calls.append(q.dtype)
        with torch.amp.autocast("cpu", enabled=False):
            return FORWARD.default(*(x.half() for x in (q, k, v)), *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("forward", rule, "AutocastCPU")
        yield calls
        library._destroy()


@pytest.mark.parametrize("arguments", [{}, {"causal": True, "softcap": 2.0, "sm_margin": 1}])
def test_both_ways_give_the_same(gradient_library, monkeypatch, arguments):
    inputs = random_qkv()
    found, names = [], []
    for plain in (True, False):
        assert is_plain(*inputs)
        with monkeypatch.context() as patch:
            if not plain:
                patch.setattr(_autograd, "is_plain", lambda *_: False)
            out, lse = attend(*inputs, **arguments, return_attn_probs=True)
            gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), lse))
        names.append(out.grad_fn.name())
        found.append((out, lse, *gradients))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert names[0] == names[1]


def test_parameters_are_plain():
    q, k, v = random_qkv()
    assert is_plain(torch.nn.Parameter(q.detach()), k, v)
    with torch.no_grad(), torch.profiler.profile():
        assert is_plain(q, k, v)


def test_modes_see_both_operators(gradient_library):
    inputs = random_qkv()
    with Dispatches() as mode:
        assert not is_plain(*inputs)
        attend(*inputs).sum().backward()
    assert mode.seen.count(FORWARD.default) == mode.seen.count(BACKWARD.default) == 1
    assert FORWARD.inference not in mode.seen
    with Functions() as mode:
        assert not is_plain(*inputs)
        attend(*inputs).sum().backward()
    assert ops.operator in mode.seen


def test_subclasses_see_the_operator(seen_by_tensors):
    q, k, v = (x.detach().to("meta").requires_grad_() for x in random_qkv())
    q, k, v = q.as_subclass(Tensors), k, v
    assert not is_plain(q, k, v)
    assert not is_plain(k, k, k, q)
    assert attend(q, k, v).requires_grad
    assert ops.operator in seen_by_tensors


def test_transformations_see_the_operator():
    seen, inputs = [], random_qkv()

    def f(x):
        seen.append(is_plain(*inputs))
        return x * 2

    x = torch.ones(2, 2)
    torch.func.vmap(f)(x)
    torch.func.grad(lambda x: f(x).sum())(x)
    torch.fx.experimental.proxy_tensor.make_fx(f)(x)
    torch.fx.experimental.proxy_tensor.make_fx(f, pre_dispatch=True)(x)
    assert seen == [False] * 4


def test_autograd_that_is_excluded_is_not_brought_back(gradient_library):
    inputs = random_qkv()
    with torch._C._AutoDispatchBelowAutograd():
        assert not is_plain(*inputs)
        assert not attend(*inputs).requires_grad


def test_autocast_without_a_rule(gradient_library):
    inputs = random_qkv()
    with torch.autocast("cpu", dtype=torch.float16):
        assert is_plain(*inputs)
        out = attend(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), inputs[0])[0].dtype == torch.bfloat16


def test_autocast_with_a_users_rule(gradient_library, autocast_rules):
    inputs = random_qkv()
    assert attend(*inputs).dtype == torch.bfloat16
    assert autocast_rules == []
    with torch.autocast("cpu", dtype=torch.float16):
        out = attend(*inputs)
    assert autocast_rules == [torch.bfloat16]
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out.sum(), inputs[0])[0].dtype == torch.bfloat16


def test_the_backward_operators_without_a_formula(gradient_library):
    q, k, v = random_qkv()
    out, lse = attend(q, k, v, return_attn_probs=True)
    arguments = (torch.ones_like(out), None, q, k, v, out.detach(), lse.detach())
    scalars = (0.25, False, -1, -1, 0.0, False)
    with torch.no_grad():
        expected = BACKWARD.default(*arguments, *scalars)
        found = ops_backward._backward.plain(*arguments, *scalars)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
