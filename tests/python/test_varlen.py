"""Packed batches: the function's arguments, and what the operator passes to the library.

The library is varlen_library.py's.
"""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from varlen_library import ANSWER, CU_K, CU_Q, STREAM, cumulate, install_library, random_qkv

import hopper_attention
from hopper_attention import _layout, reference
from hopper_attention import flash_attn_varlen_func as attend


@pytest.fixture
def library(monkeypatch):
    return install_library(monkeypatch)


def assert_attends(q, k, v, cu_q=CU_Q, cu_k=CU_K, used_q=None, used_k=None, **arguments):
    found = attend(
        q, k, v, cu_q, cu_k, 5, None, used_q, used_k, **arguments, return_attn_probs=True
    )
    exact = reference.varlen_attention(q, k, v, cu_q, cu_k, used_q, used_k, **arguments)
    for tensor, expected, dtype in zip(found, exact, (q.dtype, torch.float32), strict=True):
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, expected.to(dtype), rtol=0, atol=0)


def test_signature_is_flash_attention_3s():
    parameters = inspect.signature(attend).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    needed = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert [p.name for p in parameters if p.default is p.empty] == needed
    assert [(p.name, p.default) for p in parameters if p.default is not p.empty] == [
        ("seqused_q", None),
        ("seqused_k", None),
        ("softmax_scale", None),
        ("causal", False),
        ("qv", None),
        ("q_descale", None),
        ("k_descale", None),
        ("v_descale", None),
        ("window_size", (-1, -1)),
        ("attention_chunk", 0),
        ("softcap", 0.0),
        ("num_splits", 1),
        ("pack_gqa", None),
        ("deterministic", False),
        ("sm_margin", 0),
        ("return_attn_probs", False),
    ]


@pytest.mark.parametrize("dtype, code", [(torch.float16, 0), (torch.bfloat16, 1)])
def test_arguments_of_the_library(library, dtype, code):
    q, k, v = random_qkv(d=24, d_v=16, dtype=dtype)
    used_q, used_k = (torch.tensor(x, dtype=torch.int32) for x in ([3, 0, 1, 0], [4, 2, 1, 0]))
    out, lse = attend(
        *(q, k, v, CU_Q, CU_K, 5, 6, used_q, used_k, 0.3, True),
        window_size=(5, 2),
        softcap=7.0,
        sm_margin=3,
        return_attn_probs=True,
    )
    (call,) = library.calls
    assert call.pop("workspace") % 16 == 0
    assert call == {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "cu_seqlens_q": CU_Q.data_ptr(),
        "cu_seqlens_k": CU_K.data_ptr(),
        "seqused_q": used_q.data_ptr(),
        "seqused_k": used_k.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "stream": STREAM,
        "batch": 4,
        "total_q": 12,
        "total_k": 13,
        "heads": 4,
        "heads_kv": 2,
        "head_dim": 24,
        "head_dim_v": 16,
        "q_strides": (4 * 24, 24),
        "k_strides": (2 * 24, 24),
        "v_strides": (2 * 16, 16),
        "out_strides": (4 * 16, 16),
        "softmax_scale": 0.3,
        "softcap": 7.0,
        "causal": True,
        "window_left": 5,
        "window_right": 0,  # causal overrides it
        "sm_margin": 3,
    }
    assert library.asked[0]["dtype"] == code


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch_in_any_layout(data):
    """Permuted, sliced, expanded, shifted: read in place or copied, the result is right."""
    draw = data.draw
    batch = draw(st.integers(0, 4))
    rows, keys = (draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch)) for _ in "qk")
    behind_q, behind_k = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    heads_kv, group = draw(st.integers(0, 2)), draw(st.integers(1, 2))

    def tensor(total, heads):
        order = draw(st.permutations(range(3)))
        padding = draw(st.sampled_from([(0, 0, 0), (0, 0, 8), (1, 0, 3), (2, 1, 0)]))
        shape = (total, heads, 16)
        sizes = [shape[i] + padding[i] for i in order]
        shift = draw(st.sampled_from([0, 0, 8, 1]))
        storage = torch.randn(math.prod(sizes) + shift).to(torch.float16)
        x = storage[shift:].view(sizes).permute([order.index(i) for i in range(3)])
        x = x[:total, :heads, :16]
        expanded = draw(st.sampled_from([None, None, 0, 1]))
        return x if expanded is None or 0 in x.shape else x.narrow(expanded, 0, 1).expand(x.shape)

    def used(lengths):
        counts = [draw(st.integers(0, n)) for n in lengths]
        return draw(st.sampled_from([None, torch.tensor(counts, dtype=torch.int32)]))

    q = tensor(sum(rows) + behind_q, heads_kv * group)
    k, v = (tensor(sum(keys) + behind_k, heads_kv) for _ in "kv")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = install_library(monkeypatch)
        lengths = (cumulate(*rows), cumulate(*keys), used(rows), used(keys))
        assert_attends(q, k, v, *lengths, causal=draw(st.booleans()))
        assert len(fake.calls) == (q.numel() > 0)
        for name, x in (("q", q), ("k", k), ("v", v)) if fake.calls else ():
            in_place = fake.calls[0][name] == x.data_ptr() or x.numel() == 0
            assert in_place == (_layout.copy_reason(x[None]) is None)


def test_calls_of_one_problem_are_prepared_once(library):
    q, k, v = random_qkv()
    for cu in (CU_Q, cumulate(1, 1, 1, 1), cumulate(12, 0, 0, 0)):  # lengths are no part of it
        assert_attends(q, k, v, cu)
    assert_attends(*random_qkv())
    assert (len(library.asked), len(library.calls)) == (1, 4)
    others = [{"causal": True}, {"softcap": 2.0}, {"softmax_scale": 0.5}, {"window_size": (3, -1)}]
    for count, arguments in enumerate(others, start=2):
        assert_attends(q, k, v, **arguments)
        assert len(library.asked) == count
    assert_attends(q, k, v, cumulate(2, 3), cumulate(4, 4))
    assert_attends(q[:11], k, v)
    assert len(library.asked) == 7


def test_a_prepared_problem_still_looks_at_what_may_change(library):
    q, k, v = random_qkv()
    assert_attends(q, k, v)
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape).copy_(k)
    assert_attends(q, odd, v)
    assert library.calls[1]["k"] not in (odd.data_ptr(), k.data_ptr())
    for wrong, error in ((CU_Q.long(), TypeError), (CU_Q.repeat(2)[::2], ValueError)):
        with pytest.raises(error, match="cu_seqlens_q must"):
            attend(q, k, v, wrong, CU_K, None, None)
    with pytest.raises(ValueError, match="seqused_k must be on q's device, cpu, got meta"):
        attend(q, k, v, CU_Q, CU_K, None, None, seqused_k=CU_K[1:].to("meta"))
    assert len(library.calls) == 2


@pytest.mark.parametrize("empty", [{"total_q": 0}, {"heads": 0}, {"heads": 0, "heads_kv": 0}])
def test_empty_outputs_launch_nothing(library, empty):
    nothing = cumulate(0, 0)
    assert_attends(*random_qkv(**empty), nothing, nothing)
    assert not library.calls


def test_without_sequences_or_keys(library):
    assert_attends(*random_qkv(), cumulate(), cumulate())
    assert_attends(*random_qkv(total_k=0), CU_Q, cumulate(0, 0, 0, 0))
    assert len(library.calls) == 2


def test_wide_windows_fit_32_bits(library):
    assert_attends(*random_qkv(), window_size=(2**40, 2**40))
    assert library.calls[0]["window_left"] == library.calls[0]["window_right"] == 2**31 - 1


WRONG = [
    ({"q": lambda x: x[0]}, ValueError, r"q must have 3 dimensions .* got 2: \(4, 16\)"),
    ({"v": lambda x: x[None]}, ValueError, r"v must have 3 dimensions .* got 4"),
    ({"v": lambda x: x[1:]}, ValueError, r"the same number of rows .* got k 13, v 12"),
    ({"v": lambda x: x[:, 1:]}, ValueError, r"the same number of heads \(dimension 1\), got k 2"),
    ({"k": lambda x: x[..., 8:]}, ValueError, r"head dimension \(dimension 2\), got q 16, k 8"),
    ({"q": lambda x: x[:, 1:]}, ValueError, "heads of q must be a multiple .* got q 3, k and v 2"),
    ({"k": lambda x: x.half()}, TypeError, "must have one dtype, got torch.bfloat16, torch.float"),
    ({"k": lambda x: x.to("meta")}, ValueError, "must be on one device, got cpu, meta, cpu"),
    ({"v": lambda x: x[..., :4]}, ValueError, "head dimension of v must equal .* got 4 beside 16"),
    ({"cu_seqlens_q": lambda x: x[None]}, ValueError, r"cu_seqlens_q must have 1 dim.*\(1, 5\)"),
    (
        {"cu_seqlens_k": lambda x: x.long()},
        TypeError,
        "cu_seqlens_k must be torch.int32, got",
    ),
    (
        {"cu_seqlens_k": lambda x: x[1:]},
        ValueError,
        "must both have .* entries, got 5 and 4",
    ),
    ({"cu_seqlens_k": lambda x: x.to("meta")}, ValueError, "must be on q's device, cpu, got meta"),
    ({"seqused_q": lambda _: CU_Q}, ValueError, "seqused_q must .* each of the 4 .* got 5"),
    ({"seqused_k": lambda _: [1]}, TypeError, "seqused_k must be a torch.Tensor, got list"),
    ({"cu_seqlens_q": lambda _: None}, TypeError, "cu_seqlens_q must be a torch.Tensor, got None"),
    ({"k": lambda _: None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    ({"max_seqlen_q": lambda _: -1}, ValueError, "max_seqlen_q must be 0 or more, or None, got -1"),
    ({"max_seqlen_k": lambda _: 1.0}, TypeError, "max_seqlen_k must be an int, got float"),
    ({"softcap": lambda _: -1.0}, ValueError, "softcap must be 0"),
    ({"window_size": lambda _: (-2, 0)}, ValueError, "window_size must be"),
    ({"causal": lambda _: 1}, TypeError, "causal must be True or False, got 1"),
    ({"deterministic": lambda _: 1}, TypeError, "deterministic must be True or False, got 1"),
    ({"num_splits": lambda _: 2}, NotImplementedError, "num_splits is not built yet"),
    ({"qv": lambda _: CU_Q}, NotImplementedError, "qv is not built yet"),
    ({"k_descale": lambda _: CU_Q}, ValueError, "k_descale must be None where q is torch.bfloat16"),
    (dict.fromkeys("qkv", lambda x: x.float()), TypeError, "must be torch.float16 or .*float32"),
    (
        dict.fromkeys("qkv", lambda x: x.to(torch.float8_e4m3fn)),
        NotImplementedError,
        "packed batches of torch.float8_e4m3fn are not built yet",
    ),
]


@pytest.mark.parametrize("changes, error, message", WRONG)
def test_wrong_arguments(library, changes, error, message):
    names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    call = dict(zip(names, (*random_qkv(), CU_Q, CU_K, np.int64(5), None), strict=True))
    call |= {name: change(call.get(name)) for name, change in changes.items()}
    with pytest.raises(error, match=message):
        attend(**call)
    assert not library.calls


def test_tensors_on_the_cpu():
    message = r"got cpu; .*reference\.varlen_attention .*emulation_varlen\.attention"
    with pytest.raises(ValueError, match=message):
        attend(*random_qkv(), CU_Q, CU_K, 5, 6)


def test_explain(library):
    q, k, v = random_qkv(d=24)
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    options = {"softmax_scale": 0.5, "causal": True, "window_size": (5, -1)}
    found = hopper_attention.explain(q, k, v, **lengths, **options, return_attn_probs=True)
    assert found == hopper_attention.Explanation(**ANSWER, copies=())
    attend(q, k, v, *lengths.values(), 5, 6, **options)
    asked, launched = library.asked
    assert asked == launched
    copied = hopper_attention.explain(q[..., ::3], k[..., :8], v[..., 3:11], **lengths)
    assert copied.copies == (
        "q: the last dimension has stride 3, not 1",
        "v: the address is not a multiple of 16 bytes",
    )
    assert library.asked[-1]["q_strides"] == (4 * 8, 8)
    with pytest.raises(ValueError, match="seqused_q must have an entry"):
        hopper_attention.explain(q, k, v, **lengths, seqused_q=CU_Q)
