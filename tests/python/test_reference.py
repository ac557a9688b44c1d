"""The float64 reference against PyTorch's own attention and against loops written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_attention import reference


def random_qkv(batch=1, seqlen_q=5, seqlen_k=7, heads=2, heads_kv=1, head_dim=8, head_dim_v=None):
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    shapes = (
        (batch, seqlen_q, heads, head_dim),
        (batch, seqlen_k, heads_kv, head_dim),
        (batch, seqlen_k, heads_kv, head_dim if head_dim_v is None else head_dim_v),
    )
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def by_loops(q, k, v, scale, causal, window, softcap, sink):
    """Attention one query and one key at a time."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    out = torch.zeros(batch, seqlen_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
    left, right = window
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                position = i + seqlen_k - seqlen_q
                weights = {}
                for j in range(seqlen_k):
                    if causal and j > position:
                        continue
                    if left != -1 and j < position - left:
                        continue
                    if not causal and right != -1 and j > position + right:
                        continue
                    head = h // (heads // heads_kv)
                    score = scale * math.fsum((q[b, i, h] * k[b, j, head]).tolist())
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    weights[j] = math.exp(score)
                total = math.fsum(weights.values()) + math.exp(sink[h])
                if total:
                    lse[b, h, i] = math.log(total)
                    for j, weight in weights.items():
                        out[b, i, h] += weight / total * v[b, j, head]
    return out, lse


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    seqlen_q=st.integers(0, 6),
    seqlen_k=st.integers(0, 6),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim_v=st.integers(1, 4),
    scale=st.floats(-2, 2),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    softcap=st.sampled_from([0.0, 0.5, 3.0]),
    sinks=st.one_of(st.none(), st.lists(st.sampled_from([-math.inf, -4.0, 0.5, 9.0]), min_size=6)),
)
def test_equals_loops(
    batch, seqlen_q, seqlen_k, heads_kv, group, head_dim_v, scale, causal, window, softcap, sinks
):
    heads = heads_kv * group
    q, k, v = random_qkv(batch, seqlen_q, seqlen_k, heads, heads_kv, 3, head_dim_v)
    sink = None if sinks is None else torch.tensor(sinks[:heads])
    out, lse = reference.attention(q, k, v, scale, causal, window, softcap, sink)
    without = [-math.inf] * heads
    expected_out, expected_lse = by_loops(q, k, v, scale, causal, window, softcap, sinks or without)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_equals_pytorch(causal, heads_kv):
    q, k, v = random_qkv(2, 33, 33, 4, heads_kv, 16)
    out, _ = reference.attention(q, k, v, causal=causal)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_causal_is_aligned_bottom_right():
    q, k, v = random_qkv(seqlen_q=2, seqlen_k=5)
    out, _ = reference.attention(q, k, v, causal=True)
    whole, _ = reference.attention(q, k, v)
    without_last, _ = reference.attention(q, k[:, :4], v[:, :4])
    torch.testing.assert_close(out[:, 1], whole[:, 1])
    torch.testing.assert_close(out[:, 0], without_last[:, 0])


def test_rows_that_see_no_key_are_zero():
    q, k, v = random_qkv(seqlen_q=5, seqlen_k=2)
    out, lse = reference.attention(q, k, v, causal=True)
    assert torch.all(out[:, :3] == 0)
    assert torch.all(lse[:, :, :3] == -math.inf)
    assert torch.all(torch.isfinite(lse[:, :, 3:]))


def test_no_keys_give_zero():
    q, k, v = random_qkv(seqlen_k=0)
    out, lse = reference.attention(q, k, v)
    assert out.shape == (1, 5, 2, 8)
    assert torch.all(out == 0)
    assert torch.all(lse == -math.inf)


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"seqlen_q": 0}, {"heads": 0}, {"heads": 0, "heads_kv": 0}]
)
def test_empty_outputs_keep_their_shape(empty):
    q, k, v = random_qkv(**empty)
    out, lse = reference.attention(q, k, v)
    assert out.shape == (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])


def test_chunks_of_rows_change_nothing(monkeypatch):
    q, k, v = random_qkv(2, 50, 40, 2, 1)
    whole = reference.attention(q, k, v, causal=True, window_size=(20, -1))
    monkeypatch.setattr(reference, "_MAX_SCORES", 2 * 2 * 40 * 7)
    chunked = reference.attention(q, k, v, causal=True, window_size=(20, -1))
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)


def test_scores_far_from_zero_do_not_overflow():
    q, k, v = random_qkv()
    out, lse = reference.attention(q, k, v, softmax_scale=1e5)
    assert torch.all(torch.isfinite(out))
    assert torch.all(torch.isfinite(lse))


def test_autograd_passes_through():
    q, k, v = (x.requires_grad_() for x in random_qkv(seqlen_q=4, seqlen_k=3, head_dim=2))
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.attention(q, k, v, causal=True, softcap=2.0)[0], (q, k, v)
    )


def test_gradient_of_the_sink():
    """dSink = -sum over rows of exp(sink - LSE) (rowsum(dO O) - dLSE), and autograd's own."""
    q, k, v = random_qkv(batch=2, seqlen_q=5, seqlen_k=4, head_dim=4)
    sink = torch.tensor([-0.5, 1.5], requires_grad=True)
    out, lse = reference.attention(q, k, v, causal=True, learnable_sink=sink)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (gradient,) = torch.autograd.grad((out, lse), sink, (dout, dlse))
    delta = (dout * out).sum(3).transpose(1, 2) - dlse
    expected = -(torch.exp(sink[:, None] - lse) * delta).sum((0, 2))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sink, error, words",
    [
        (torch.zeros(3), ValueError, r"learnable_sink must have shape .*\(2,\), got \(3,\)"),
        (torch.zeros(2, 1), ValueError, r"learnable_sink must have shape .*\(2,\), got \(2, 1\)"),
        (torch.zeros(2).half(), TypeError, r"learnable_sink must be torch\.float32, got .*16"),
        (torch.zeros(2, device="meta"), ValueError, "on q's device, cpu, got meta"),
    ],
)
def test_refuses_other_sinks(sink, error, words):
    with pytest.raises(error, match=words):
        reference.attention(*random_qkv(), learnable_sink=sink)


def test_computes_in_float64_from_any_dtype():
    q, k, v = random_qkv(head_dim=16)
    halves = tuple(x.to(torch.bfloat16) for x in (q, k, v))
    out, lse = reference.attention(*halves)
    assert out.dtype == lse.dtype == torch.float64
    expected = reference.attention(*(x.double() for x in halves))
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)


def test_defaults_to_the_usual_scale():
    q, k, v = random_qkv(head_dim=16)
    torch.testing.assert_close(
        reference.attention(q, k, v), reference.attention(q, k, v, softmax_scale=0.25)
    )


def test_refuses_what_is_not_a_tensor():
    q, k, _ = random_qkv()
    with pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got list"):
        reference.attention(q, k, [[1.0]])
