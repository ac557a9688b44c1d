"""Eager calls made again by the compiled module (bindings_eager.cpp), and who must see them."""

import gc
import weakref

import pytest
import torch
from call_tables import EXCHANGE
from test_backward import random_qkv
from test_calls import Memory
from test_plain_calls import (
    BACKWARD,
    FORWARD,
    Dispatches,
    Functions,
    Tensors,
    autocast_rules,
    seen_by_tensors,
)
from torch.utils.checkpoint import checkpoint

import hopper_attention
from hopper_attention import _autograd, _eager, interface, ops_backward

__all__ = ["autocast_rules", "seen_by_tensors"]  # fixtures

attend = hopper_attention.flash_attn_func


@pytest.fixture
def library(compiled_library):
    return compiled_library


@pytest.fixture
def long_ways(monkeypatch, library):
    """How often a pass went the long way: forward, backward."""
    counts = {"forward": 0, "backward": 0}

    def counted(name, function):
        def count(*arguments):
            counts[name] += 1
            return function(*arguments)

        return count

    for module, function, name in (
        (_autograd, "shortest_way", "forward"),
        (ops_backward, "gradients_of", "backward"),
    ):
        monkeypatch.setattr(module, function, counted(name, getattr(module, function)))
    return counts


def both_passes(inputs, **arguments):
    out, lse = attend(*inputs, return_attn_probs=True, **arguments)
    gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), lse.detach()))
    return out, lse, *gradients


def remembered(inputs):
    """Makes both passes until they are found again."""
    found = both_passes(inputs)
    both_passes(inputs)
    return found


def assert_equal(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"causal": True, "softmax_scale": 0.3},
        {"window_size": (5, None), "softcap": 2.0, "sm_margin": 1, "deterministic": True},
        {"window_size": None, "num_splits": 0, "pack_gqa": True},
    ],
)
def test_the_short_way_gives_the_same(long_ways, arguments):
    inputs = random_qkv()
    found = [both_passes(inputs, **arguments) for _ in range(4)]
    assert long_ways == {"forward": 1, "backward": 1}
    for again in found[1:]:
        assert_equal(again, found[0])
        assert again[0].data_ptr() != found[0][0].data_ptr()
    assert {x[0].grad_fn.name() for x in found} == {"forward_formulaBackward"}
    with torch.no_grad():
        out = attend(*inputs, **arguments)
    assert not out.requires_grad
    assert_equal([out], found[0][:1])
    with torch.inference_mode():
        assert attend(*inputs, **arguments).is_inference()
    assert long_ways["forward"] == 1


def test_what_only_one_gradient_depends_on(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    q, k, v = inputs[0].detach(), *inputs[1:]
    out = attend(q, k, v)
    assert_equal(
        torch.autograd.grad(out, v, torch.ones_like(out)),
        torch.autograd.grad(attend(*inputs), v, torch.ones_like(out)),
    )
    assert long_ways["forward"] == 1


def test_only_the_log_sum_exp_is_used(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    _, lse = attend(*inputs, return_attn_probs=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), inputs)
    assert long_ways["backward"] == 2  # out's gradient, of zeros, is made in Python
    assert dq.any()
    assert dk.any()
    assert not dv.any()


def test_tensors_elsewhere_are_read(long_ways):
    """Their elements are no part of what a call looks like."""
    inputs = random_qkv()
    for scale in (0.25, 0.5, 0.25):
        with pytest.raises(TypeError, match="softmax_scale must be"):
            attend(*inputs, softmax_scale=torch.tensor(scale))
    assert interface._eager.call(*inputs, torch.tensor(0.25), *[None] * 13) in (None, False)


def test_modes_see_both_operators(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    with Dispatches() as mode:
        both_passes(inputs)
    assert mode.seen.count(FORWARD.default) == mode.seen.count(BACKWARD.default) == 1
    with Functions() as mode:
        both_passes(inputs)
    assert FORWARD.default in mode.seen
    assert long_ways == {"forward": 3, "backward": 3}


def test_profilers_see_both_operators(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    with torch.profiler.profile() as profile:
        both_passes(inputs)
        with torch.no_grad():
            attend(*inputs)
    names = [event.name for event in profile.events()]
    assert names.count("hopper_attention::forward") == 2
    assert names.count("hopper_attention::backward") == 1
    both_passes(inputs)
    assert long_ways == {"forward": 3, "backward": 2}


def test_subclasses_see_the_operator(long_ways, seen_by_tensors):
    inputs = random_qkv()
    remembered(inputs)
    for place in range(3):
        seen_by_tensors.clear()
        given = [x.as_subclass(Tensors) if i == place else x for i, x in enumerate(inputs)]
        attend(*given)
        assert FORWARD.default in seen_by_tensors
        with torch.no_grad():
            attend(*given)
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out).as_subclass(Tensors))
    assert long_ways["forward"] == 7
    assert long_ways["backward"] == 2


def test_parameters_take_the_short_way(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    both_passes([torch.nn.Parameter(x.detach()) for x in inputs])
    assert long_ways == {"forward": 1, "backward": 1}


def test_transformations_see_the_operator(long_ways):
    inputs = [x.detach() for x in random_qkv()]
    with torch.no_grad():
        attend(*inputs)
        attend(*inputs)
        seen = long_ways["forward"]
        traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: attend(*x))(*inputs)
    assert any("hopper_attention" in str(node.target) for node in traced.graph.nodes)
    assert long_ways["forward"] == seen + 1
    with pytest.raises(RuntimeError, match="setup_context"):  # there is no rule for functorch
        torch.func.vjp(lambda x: attend(x, *inputs[1:]), inputs[0])
    assert long_ways["forward"] == seen + 2


def test_wrappers_that_outlived_their_transformation(long_ways):
    inputs = [x.detach() for x in random_qkv()]
    with torch.no_grad():
        expected = attend(*inputs)
        kept = []
        torch.func.grad(lambda x: (kept.append(x), x.float().sum())[1])(inputs[0])
        assert_equal([attend(kept[0], *inputs[1:])], [expected])


def test_autograd_that_is_excluded_is_not_brought_back(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    with torch._C._AutoDispatchBelowAutograd():
        assert not attend(*inputs).requires_grad


def test_autocast(long_ways):
    inputs = random_qkv()
    expected = remembered(inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        assert_equal(both_passes(inputs), expected)
    assert long_ways == {"forward": 1, "backward": 1}


def test_a_users_rule_for_autocast(long_ways, autocast_rules):
    inputs = random_qkv()
    remembered(inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        assert attend(*inputs).dtype == torch.float16
    assert autocast_rules == [torch.bfloat16]


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_forward_mode_is_refused(long_ways, wants_gradient):
    inputs = random_qkv()
    remembered(inputs)
    q, k, v = inputs if wants_gradient else [x.detach() for x in inputs]
    attend(q, k, v)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            attend(dual, k, v)
        assert attend(q, k, v).isfinite().all()  # without a tangent


def test_second_derivatives_are_refused(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    out = attend(*inputs)
    (dq,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(dq.sum(), inputs[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(long_ways, use_reentrant):
    inputs = random_qkv()
    remembered(inputs)
    one = torch.ones_like(inputs[0])
    expected = torch.autograd.grad(attend(*inputs), inputs, one)  # without a gradient of LSE's
    assert long_ways == {"forward": 1, "backward": 2}
    checkpoint(attend, *inputs, use_reentrant=use_reentrant).backward(one)
    assert_equal([x.grad for x in inputs], expected)
    assert long_ways == {"forward": 1, "backward": 2}


def test_checkpointed_tensors_are_taken_once(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    out = checkpoint(attend, *inputs, use_reentrant=False)
    odd = torch.ones(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)  # must be copied
    out.backward(odd)
    expected = torch.autograd.grad(attend(*inputs), inputs, torch.ones_like(out))
    assert_equal([x.grad for x in inputs], expected)
    assert long_ways["backward"] == 2


def test_hooks_on_saved_tensors(long_ways):
    inputs = random_qkv()
    expected = remembered(inputs)
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = both_passes(inputs)
    assert len(packed) == 5
    assert_equal(found, expected)


def test_saved_tensors_that_were_changed(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    k = inputs[1].detach().clone()
    out = attend(inputs[0], k, inputs[2])
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_graph_is_freed_and_can_be_kept(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    out = attend(*inputs).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert_equal(torch.autograd.grad(out, inputs), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs)


def test_compiled_autograd(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    out = attend(*inputs)
    expected = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out.sum().backward()
    assert_equal([x.grad for x in inputs], expected)


def test_torch_compile_sees_the_operator(long_ways):
    inputs = random_qkv()
    expected = remembered(inputs)
    compiled = torch.compile(lambda *x: attend(*x), backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    found = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert_equal([out], expected[:1])
    assert all(x.shape == y.shape for x, y in zip(found, inputs, strict=True))


def test_nothing_is_kept(long_ways):
    inputs = random_qkv()
    remembered(inputs)
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out = attend(q, k, v)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    kept = [weakref.ref(x) for x in (q, k, v, out, *gradients)]
    node = weakref.ref(out.grad_fn)
    gc.disable()
    try:
        del q, k, v, out, gradients
        assert [x() for x in kept] == [None] * 7
        assert node() is None
    finally:
        gc.enable()


def test_errors_arrive(long_ways, library, monkeypatch):
    inputs = random_qkv()
    remembered(inputs)
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    before = dict(long_ways)

    def fail(*arguments):
        raise MemoryError("there is none")

    monkeypatch.setattr(type(library), "forward", fail)
    monkeypatch.setattr(type(library), "backward", fail)
    for _ in range(2):
        with pytest.raises(MemoryError, match="there is none"):
            attend(*inputs)
        with torch.no_grad(), pytest.raises(MemoryError, match="there is none"):
            attend(*inputs)
        with pytest.raises(MemoryError, match="there is none"):
            torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert long_ways == before


def test_what_the_compiled_functions_refuse(calls_module):
    conditions = _eager._conditions("hopper_attention::forward")
    table = Memory(calls_module)
    with pytest.raises(TypeError, match="3 arguments"):
        calls_module.eager_calls(table.call, conditions)
    with pytest.raises(TypeError, match="5 arguments"):
        calls_module.eager_backward(table.call)
    with pytest.raises(ValueError, match="no call of a table"):
        calls_module.eager_calls(attend, conditions, None)
    with pytest.raises(ValueError, match="no place"):
        calls_module.eager_calls(table.call, conditions, (attend, (99,), (), ()))
    with pytest.raises(TypeError):
        calls_module.eager_calls(table.call, (), None)
    for arguments in ((), (1,), (1, 2), (1, EXCHANGE)):
        with pytest.raises((TypeError, ValueError)):
            calls_module.eager_forward(*arguments)
