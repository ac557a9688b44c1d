"""The backward suites' contestants and checks, without a card.

Ours runs through its real operators over a stand-in library (conftest.py), FlashAttention-3 is a
stand-in with its operators' arguments, PyTorch's attention is its own plain backend.
"""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from hopper_attention import reference
from hopper_attention.bench import backward, backward_suites, gradients, records, runner
from hopper_attention.bench.backward import (
    BoundBackward,
    Fa3Backward,
    OursBackward,
    SdpaBackward,
    gather_backward,
)
from hopper_attention.bench.contestants import UnavailableError
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import Shape
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.standard import standard_attention

SHAPE = Shape("float16", 32, 32, 2, 40, 40, 4, 2, causal=False)
SHAPES = [
    SHAPE,
    replace(SHAPE, causal=True),
    replace(SHAPE, causal=True, window=(7, 0)),
    replace(SHAPE, head_dim_v=16, seqlen_q=30, causal=True),
]
OTHERS = [
    replace(SHAPE, window=(3, 5)),
    replace(SHAPE, window=(-1, 2), seqlen_q=50),
    replace(SHAPE, causal=True, seqlen_q=60, heads_kv=1),  # 20 rows see no key
    replace(SHAPE, heads=3, heads_kv=3, batch=1),
]


class Clock:
    """Gives every call the same time."""

    broken = False

    def batch(self, run, count):
        run()
        return [0.5] * count

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def timed(contestants, shapes=SHAPES, clock=None):
    outcome = Outcome()
    backward_suites.run_backward(
        "backward", shapes, contestants, outcome, "now", 20, clock or Clock(), "cpu"
    )
    return outcome


def inputs_of(shape):
    return (*runner.make_inputs(shape, "cpu"), backward_suites.draw_dout(shape, "cpu"))


def through_reference(shape, q, k, v, dout):
    """The exact gradients by autograd, and the forward pass's results."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, causal=shape.causal, window_size=shape.window)
    return torch.autograd.grad(out, leaves, dout.double()), out.detach(), lse.detach()


class Fake:
    """The exact gradients, rounded; or what alter makes of them."""

    def __init__(self, name, alter=lambda found: found):
        self.name = name
        self.alter = alter

    def bind(self, shape, q, k, v, dout):
        exact, _, _ = through_reference(shape, q, k, v, dout)
        found = tuple(x.to(q.dtype) for x in exact)
        return BoundBackward(lambda: self.alter(found), lambda of_call: of_call)


@pytest.fixture
def ours(monkeypatch, gradient_library):
    monkeypatch.setattr("hopper_attention.unavailable_reason", lambda: None)
    return gradient_library


@pytest.fixture
def fa3(monkeypatch, tmp_path):
    """A folder with fa3.so, which defines FlashAttention-3's operators, and the log of calls."""
    log = []

    def shape_of(q, is_causal, left, right):
        return replace(SHAPE, causal=is_causal, window=(left, right))

    def fwd(q, k, v, softmax_scale=None, is_causal=False, num_splits=0, window_size_left=-1,
            window_size_right=-1):  # fmt: skip
        assert softmax_scale == q.shape[-1] ** -0.5
        assert num_splits == 1
        options = {"causal": is_causal, "window_size": (window_size_left, window_size_right)}
        out, lse = reference.attention(q, k, v, **options)
        return out.to(q.dtype), lse.float(), q.new_empty(0), q.new_empty(0)

    def bwd(dout, q, k, v, out, softmax_lse, softmax_scale=None, is_causal=False,
            window_size_left=-1, window_size_right=-1, deterministic=False):  # fmt: skip
        assert softmax_scale == q.shape[-1] ** -0.5
        log.append((q.shape[-1], is_causal, window_size_left, window_size_right, deterministic))
        shape = shape_of(q, is_causal, window_size_left, window_size_right)
        found, exact_out, exact_lse = through_reference(shape, q, k, v, dout)
        torch.testing.assert_close(out, exact_out.to(q.dtype))
        torch.testing.assert_close(softmax_lse, exact_lse.float())
        return [x.to(q.dtype) for x in found] + [q.new_empty(0)] * 3

    operators = SimpleNamespace(fwd=fwd, bwd=bwd)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    monkeypatch.delenv("FA3_SO", raising=False)
    (tmp_path / "fa3.so").touch()
    return SimpleNamespace(folder=tmp_path, log=log, operators=operators)


@pytest.mark.parametrize("shape", SHAPES + OTHERS, ids=lambda shape: shape.label)
@pytest.mark.parametrize("at_a_time", [1 << 27, 300])
def test_exact_gradients_are_those_of_the_reference(monkeypatch, shape, at_a_time):
    monkeypatch.setattr(gradients, "_MAX_SCORES", at_a_time)
    inputs = inputs_of(shape)
    whole, _, _ = through_reference(shape, *inputs)
    for place in [(b, h) for b in range(shape.batch) for h in range(shape.heads_kv)]:
        found = gradients.exact(shape, *gradients.at_place(shape, inputs, place))
        expected = gradients.at_place(shape, whole, place)
        for part, of_reference in zip(found, expected, strict=True):
            torch.testing.assert_close(part, of_reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_standard_gradients_are_those_of_standard_attention(shape):
    q, k, v, dout = inputs_of(shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scale = shape.head_dim**-0.5
    out = standard_attention(AttentionInputs(*leaves, scale, shape.causal, shape.window))
    whole = torch.autograd.grad(out, leaves, dout)
    place = (1, 1)
    found = gradients.standard(
        shape, *gradients.at_place(shape, [x.detach() for x in (q, k, v, dout)], place)
    )
    # sums over the query heads of a group are rounded once or twice
    for part, expected in zip(found, gradients.at_place(shape, whole, place), strict=True):
        torch.testing.assert_close(part, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(found[0], gradients.at_place(shape, whole, place)[0])


def test_the_sample_is_a_few_whole_heads():
    shape = Shape("bfloat16", 8, 8, 9, 5, 5, 32, 4, causal=False)
    places = gradients.draw_places(shape)
    assert len(set(places)) == len(places) == 4
    assert all(0 <= batch < 9 and 0 <= head < 4 for batch, head in places)
    assert gradients.draw_places(replace(shape, batch=1, heads_kv=1)) == [(0, 0)]


def test_all_contestants_find_the_same_gradients(ours, fa3):
    contestants = [
        OursBackward(),
        OursBackward(deterministic=True),
        Fa3Backward(fa3.folder),
        Fa3Backward(fa3.folder, deterministic=True),
        SdpaBackward("math", SDPBackend.MATH),
    ]
    outcome = timed(contestants)
    names = [one.name for one in contestants]
    assert names[:2] == ["hopper_attention", "hopper_attention_deterministic"]
    assert names[2:4] == ["fa3", "fa3_deterministic"]
    assert [(name, reason) for name, _, reason in outcome.excluded] == [
        ("math", "PyTorch's interface to it has no window"),
        ("math", "PyTorch's causal mask is aligned top left, ours bottom right"),
    ]
    assert [r["impl"] for r in outcome.records] == names * 2 + names[:4] * 2
    for record in outcome.records:
        assert record["suite"] == "backward"
        assert (record["ms"], record["run"]) == (0.5, "now")
        assert 0 < record["rmse"] < 2e-3
        shape = records.shape_of(record)
        assert shape in SHAPES
        assert record["tflops"] == pytest.approx(2.5 * shape.flops() / 0.5e-3 / 1e12, rel=1e-5)
    asked = {(call["causal"], call["window_left"], call["deterministic"]) for call in ours.calls}
    assert asked == {
        (causal, left, deterministic)
        for causal, left in ((False, -1), (True, -1), (True, 7))
        for deterministic in (False, True)
    }
    assert {call["softmax_scale"] for call in ours.calls} == {32**-0.5}
    assert set(fa3.log) == {
        (32, causal, left, right, deterministic)
        for causal, left, right in ((False, -1, -1), (True, -1, -1), (True, 7, 0))
        for deterministic in (False, True)
    }


def test_only_the_backward_pass_is_timed(ours, fa3, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the forward pass ran again")

    inputs = inputs_of(SHAPE)
    bound = [
        one.bind(SHAPE, *inputs)
        for one in (OursBackward(), Fa3Backward(fa3.folder), SdpaBackward("x", SDPBackend.MATH))
    ]
    monkeypatch.setattr("hopper_attention.ops.forward", refuse)
    monkeypatch.setattr(fa3.operators, "fwd", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    for one in bound:
        first, second = (one.to_bshd(one.run()) for _ in range(2))
        for x, y, of in zip(first, second, inputs, strict=False):
            assert x.shape == of.shape
            assert x.dtype == of.dtype
            assert torch.equal(x, y)


def test_fa3_is_not_deterministic_at_256(fa3):
    wide = Shape("bfloat16", 256, 256, 1, 16, 16, 1, 1, causal=False)
    contestants = [Fa3Backward(fa3.folder), Fa3Backward(fa3.folder, deterministic=True)]
    outcome = timed(contestants, [wide, replace(wide, head_dim=192, head_dim_v=192)])
    assert [r["impl"] for r in outcome.records] == ["fa3", "fa3", "fa3_deterministic"]
    assert [(name, reason) for name, _, reason in outcome.excluded] == [
        (
            "fa3_deterministic",
            "FlashAttention-3 is not deterministic above head dimension 192",
        )
    ]


def times(index, factor):
    def alter(found):
        return tuple(x * factor if i == index else x for i, x in enumerate(found))

    return alter


def fail(error):
    def alter(found):
        raise error

    return alter


def with_nan(found):
    dq, dk, dv = (x.clone() for x in found)
    dk[:, 3] = math.nan
    return dq, dk, dv


@pytest.mark.parametrize(
    "alter, words",
    [
        (times(0, 1.05), "wrong dq: error up to"),
        (times(1, 1.05), "wrong dk: error up to"),
        (times(2, 1.05), "wrong dv: error up to"),
        (with_nan, "wrong dq: error up to inf"),
        (fail(RuntimeError("No kernel.\nMore.")), "No kernel."),
        (fail(UnavailableError("no such head dimension")), "no such head dimension"),
    ],
)
def test_what_fails_is_left_out_and_the_others_go_on(alter, words):
    fakes = [Fake("hopper_attention"), Fake("fa3", alter), Fake("fa2")]
    outcome = timed(fakes, SHAPES[:2])
    assert [record["impl"] for record in outcome.records] == ["hopper_attention", "fa2"] * 2
    assert [name for name, _, _ in outcome.excluded] == ["fa3", "fa3"]
    assert all(words in reason for _, _, reason in outcome.excluded)
    assert not outcome.ours_failed()


@pytest.mark.parametrize("name", ["hopper_attention", "hopper_attention_deterministic"])
def test_a_failure_of_ours_is_told_apart(name):
    assert timed([Fake(name, times(0, 2.0)), Fake("fa3")], [SHAPE]).ours_failed()


def test_a_lost_device_ends_the_run_and_keeps_the_records():
    clock = Clock()

    class Killer(Fake):
        def bind(self, shape, *inputs):
            if shape.causal:
                clock.broken = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().bind(shape, *inputs)

    outcome = Outcome()
    with pytest.raises(runner.DeviceLostError, match=r"lost after fa3 on .* causal .*illegal"):
        backward_suites.run_backward(
            "backward", SHAPES[:2], [Killer("fa3")], outcome, "now", 20, clock, "cpu"
        )
    assert len(outcome.records) == 1


def test_a_problem_that_does_not_fit_is_left_out(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(gradients, "expect", no_memory)
    outcome = timed([Fake("hopper_attention"), Fake("fa3")], [SHAPE])
    assert not outcome.records
    assert [reason.split(":")[0] for _, _, reason in outcome.excluded] == [
        "not enough device memory for the problem"
    ] * 2


def test_gathering_says_who_is_missing(fa3, monkeypatch, tmp_path):
    monkeypatch.setattr("hopper_attention.unavailable_reason", lambda: "no kernels here")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found, missing = gather_backward(peers_dir=fa3.folder)
    assert [one.name for one in found] == ["fa3", "fa3_deterministic", "cudnn", "fa2"]
    assert set(missing) == {"hopper_attention", "hopper_attention_deterministic"}
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    del fa3.operators.bwd
    found, missing = gather_backward(peers_dir=fa3.folder)
    assert [one.name for one in found] == ["fa2"]
    assert missing["cudnn"] == "this PyTorch has no cuDNN"
    assert "does not define torch.ops.flash_attn_3.bwd" in missing["fa3"]
    assert gather_backward(peers=False)[0] == []


def test_the_backends_of_pytorch_are_the_named_ones(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    chosen = []

    def select(backend):
        chosen.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", select)
    for make in (backward._cudnn, backward._fa2):
        make(None).bind(SHAPE, *inputs_of(SHAPE))
    assert chosen == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
