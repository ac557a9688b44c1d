"""Packed batches on the CPU: the float64 reference and the emulation, sequence by sequence."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hopper_attention
from hopper_attention import emulation, emulation_varlen, reference
from hopper_attention._sequences import attend_to_each
from hopper_attention.checks_varlen import Lengths


def cumulate(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)]).int()


def random_qkv(total_q, total_k, heads=2, heads_kv=1, d=8, d_v=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(total_q * 1000 + total_k)
    shapes = ((total_q, heads, d), (total_k, heads_kv, d), (total_k, heads_kv, d_v))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def by_one_mask(q, k, v, owner_q, owner_k, place_q, place_k, causal):
    """Attention over the whole batch at once, with a mask that says who is whose.

    owner: each row's sequence, -1 where it is nobody's; place: its position from the right end.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    hidden = (owner_q[:, None] != owner_k) | (owner_q[:, None] < 0)
    if causal:
        hidden |= place_k < place_q[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(2)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, v), lse


@settings(max_examples=60, deadline=None)
@given(data=st.data(), causal=st.booleans(), with_used=st.booleans())
def test_equals_one_mask_over_the_whole_batch(data, causal, with_used):
    batch = data.draw(st.integers(0, 4))
    sides = []
    for _ in "qk":
        lengths = data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
        used = [data.draw(st.integers(0, n)) if with_used else n for n in lengths]
        total = sum(lengths) + data.draw(st.integers(0, 2))
        owner, place = torch.full((total,), -1), torch.zeros(total, dtype=torch.int64)
        begin = 0
        for i, (length, own) in enumerate(zip(lengths, used, strict=True)):
            owner[begin : begin + own] = i
            place[begin : begin + own] = torch.arange(own - 1, -1, -1)
            begin += length
        given_used = torch.tensor(used, dtype=torch.int32) if with_used else None
        sides.append((cumulate(lengths), given_used, total, owner, place))
    (cu_q, used_q, total_q, owner_q, place_q), (cu_k, used_k, total_k, owner_k, place_k) = sides
    q, k, v = random_qkv(total_q, total_k)
    found = reference.varlen_attention(q, k, v, cu_q, cu_k, used_q, used_k, causal=causal)
    expected = by_one_mask(q, k, v, owner_q, owner_k, place_q, place_k, causal)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_options_reach_each_sequence():
    q, k, v = random_qkv(7, 9)
    options = {"softmax_scale": 0.7, "window_size": (2, 1), "softcap": 3.0}
    out, lse = reference.varlen_attention(q, k, v, cumulate([3, 4]), cumulate([4, 5]), **options)
    for rows, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 7), slice(4, 9))):
        alone, alone_lse = reference.attention(
            q[None, rows], k[None, keys], v[None, keys], **options
        )
        assert torch.equal(out[rows], alone[0])
        assert torch.equal(lse[:, rows], alone_lse[0])


def test_gradients_pass_through():
    tensors = [x.requires_grad_() for x in random_qkv(6, 5)]
    lengths = (cumulate([2, 0, 3]), cumulate([1, 2, 2]))
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.varlen_attention(q, k, v, *lengths, causal=True)[0], tensors
    )


@pytest.mark.parametrize(
    "lengths, message",
    [
        (([0, 3, 2], [0, 1, 2]), r"cu_seqlens_q must rise from 0 to at most 6, got \[0, 3, 2\]"),
        (([1, 3], [0, 1]), "cu_seqlens_q must rise from 0"),
        (([0, 6], [0, 6]), r"cu_seqlens_k must rise from 0 to at most 5, got \[0, 6\]"),
        (([0, 6], [0, 5], [7]), r"seqused_q must be from 0 to the sequences' \[6\], got \[7\]"),
        (([0, 6], [0, 5], None, [-1]), "seqused_k must be from 0"),
    ],
)
def test_wrong_lengths(lengths, message):
    lengths = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in lengths]
    with pytest.raises(ValueError, match=message):
        reference.varlen_attention(*random_qkv(6, 5), *lengths)


def test_wrong_arguments_without_sequences():
    q, k, v = random_qkv(6, 5)
    with pytest.raises(ValueError, match="softcap must be 0"):
        reference.varlen_attention(q, k, v, cumulate([]), cumulate([]), softcap=-1.0)
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be a torch\.Tensor, got list"):
        reference.varlen_attention(q, k, v, cumulate([]), [0])


@pytest.fixture
def tiles_file(tmp_path, monkeypatch):
    """Tiles that differ by kind of kernel."""
    common = {"dtype": "bfloat16", "head_dim": 64, "head_dim_v": 64, "min_keys": 0}
    common["max_row_keys"] = 2**30 - 1
    kinds = (("full", 64, 48), ("masked", 32, 16), ("packed", 16, 32))
    rows = [common | {"mask": kind, "tile_m": m, "tile_n": n} for kind, m, n in kinds]
    (tmp_path / "tiles.json").write_text(json.dumps(rows))
    monkeypatch.setattr(hopper_attention, "__path__", [str(tmp_path)])
    emulation._tiles.cache_clear()
    yield
    emulation._tiles.cache_clear()


@pytest.mark.usefixtures("tiles_file")
def test_emulation_has_the_packed_kernels_tiles():
    q, k, v = random_qkv(90, 120, d=64, d_v=64, dtype=torch.bfloat16)
    lengths = (cumulate([50, 0, 33]), cumulate([70, 7, 43]))
    out, lse = emulation_varlen.attention(q, k, v, *lengths, causal=True)
    exact, exact_lse = reference.varlen_attention(q, k, v, *lengths, causal=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-7, atol=2.0**-8)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    again = emulation_varlen.attention(q, k, v, *lengths, causal=True, tile=(16, 32))
    assert torch.equal(out, again[0])
    rows, keys = slice(50, 83), slice(77, 120)
    alone, _ = emulation.attention(
        q[None, rows], k[None, keys], v[None, keys], causal=True, tile=(16, 32)
    )
    assert torch.equal(out[rows], alone[0])


def test_each_sequence_is_attended_to_once():
    seen = []

    def attention(q, k, v):
        seen.append((q.shape[1], k.shape[1]))
        return reference.attention(q, k, v)

    attend_to_each(attention, *random_qkv(6, 5), Lengths(cumulate([2, 3]), cumulate([1, 4])))
    assert seen == [(2, 1), (3, 4), (0, 0)]  # the last for its dtypes alone
