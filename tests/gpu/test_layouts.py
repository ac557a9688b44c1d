"""Tensors in every memory layout: read in place, or copied where TMA cannot, with the same bits."""

import math

import pytest
import torch
from checking import (
    DEVICE,
    DTYPES,
    Problem,
    attention,
    check,
    heads_outside,
    name,
    sequence_first,
    strided,
)

import hopper_attention

GROUPED = Problem(seqlen_q=150, seqlen_k=270, heads=4, heads_kv=2)


def head_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def padded(x):
    return strided(x, (1, 3, 2, 16))


IN_PLACE = [heads_outside, sequence_first, head_first, padded]


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=name)
@pytest.mark.parametrize("layout", IN_PLACE)
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
def test_layouts_read_in_place(layout, head_dim, options):
    q, k, v = GROUPED.but(head_dim=head_dim).inputs()
    expected = check(q, k, v, **options)
    moved = [layout(x) for x in (q, k, v)]
    assert not hopper_attention.explain(*moved, **options).copies
    for mixed in (moved, [moved[0], k, v], [q, moved[1], v], [q, k, moved[2]]):
        out, lse = attention(*mixed, **options)
        assert out.is_contiguous()
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def odd_address(x):
    flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)[1:]
    return flat.view(x.shape).copy_(x)


def odd_stride(x):
    sizes = (*x.shape[:3], x.shape[3] + 1)
    around = torch.full(sizes, math.nan, dtype=x.dtype, device=x.device)
    view = around[..., : x.shape[3]]
    return view.copy_(x)


def every_other(x):
    sizes = (*x.shape[:3], 2 * x.shape[3])
    around = torch.full(sizes, math.nan, dtype=x.dtype, device=x.device)
    view = around[..., ::2]
    return view.copy_(x)


@pytest.mark.parametrize("layout", [odd_address, odd_stride, every_other])
def test_layouts_that_are_copied(layout):
    q, k, v = GROUPED.inputs()
    expected, _ = attention(q, k, v, causal=True)
    moved = [layout(x) for x in (q, k, v)]
    assert len(hopper_attention.explain(*moved).copies) == 3
    out, _ = attention(*moved, causal=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_packed_qkv(dtype):
    qkv = torch.randn(2, 333, 3, 4, 128, device=DEVICE, dtype=dtype)
    q, k, v = (qkv[:, :, i].contiguous() for i in range(3))
    expected, expected_lse = check(q, k, v, causal=True)
    out, lse = hopper_attention.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_packed_grouped_heads():
    qkv = torch.randn(2, 333, 6 + 2 + 2, 64, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (part.contiguous() for part in qkv.split([6, 2, 2], dim=2))
    expected, _ = check(q, k, v)
    out = hopper_attention.flash_attn_qkvpacked_func(qkv, num_heads_q=6)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "kv"])
def test_expanded_tensors(which, dim):
    """Of stride 0: one sequence, one token or one head that stands for all."""
    q, k, v = GROUPED.but(heads_kv=4).inputs()

    def expand(x):
        return x.narrow(dim, 0, 1).expand(x.shape)

    expanded = [expand(q), k, v] if which == "q" else [q, expand(k), expand(v)]
    assert not hopper_attention.explain(*expanded).copies
    for options in ({}, {"causal": True}):
        expected, expected_lse = check(*(x.contiguous() for x in expanded), **options)
        out, lse = attention(*expanded, **options)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def test_strides_of_single_dimensions_do_not_matter():
    q, k, v = Problem(batch=1, heads=1).inputs()
    expected, _ = check(q, k, v)
    q, k, v = (x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in (q, k, v))
    assert not hopper_attention.explain(q, k, v).copies
    out, _ = attention(q, k, v)
    assert torch.equal(out, expected)


def test_q_k_and_v_may_be_one_tensor():
    x, _, _ = Problem().inputs()
    check(x, x, x, causal=True)
