"""Gradients of tensors in every memory layout, and of outputs' gradients in every layout."""

import math

import pytest
import torch
from backward_checking import Call, check, draw, gradients, same_bits
from checking import (
    DEVICE,
    DTYPES,
    Problem,
    heads_outside,
    name,
    sequence_first,
    strided,
)

import hopper_attention

GROUPED = Problem(seqlen_q=150, seqlen_k=270, heads=4, heads_kv=2)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
FIXED = {"causal": True, "deterministic": True}


def head_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def padded(x):
    return strided(x, (1, 3, 2, 16))


def odd_address(x):
    flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)[1:]
    return flat.view(x.shape).copy_(x)


def odd_stride(x):
    around = torch.full((*x.shape[:3], x.shape[3] + 1), math.nan, dtype=x.dtype, device=x.device)
    return around[..., : x.shape[3]].copy_(x)


def every_other(x):
    around = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan, dtype=x.dtype, device=x.device)
    return around[..., ::2].copy_(x)


IN_PLACE = [heads_outside, sequence_first, head_first, padded]
COPIED = [odd_address, odd_stride, every_other]


@HEAD_DIM
@pytest.mark.parametrize("layout", [*IN_PLACE, *COPIED])
def test_layouts_do_not_change_the_bits(layout, head_dim):
    inputs, dout = draw(GROUPED.but(head_dim=head_dim))
    expected = check(inputs, dout, **FIXED)
    moved, moved_dout = [layout(x) for x in inputs], layout(dout)
    q, k, v = inputs
    for mixed, grad in (
        (moved, moved_dout),
        (moved, dout),
        ([moved[0], k, v], dout),
        ([q, moved[1], v], dout),
        ([q, k, moved[2]], dout),
        (inputs, moved_dout),
    ):
        assert same_bits(gradients(mixed, grad, **FIXED), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_an_expanded_gradient_of_the_output(dim):
    """Of stride 0, as those of a sum or a mean are."""
    inputs, dout = draw(GROUPED)
    expanded = dout.narrow(dim, 0, 1).expand(dout.shape)
    expected = check(inputs, expanded.contiguous(), **FIXED)
    assert same_bits(gradients(inputs, expanded, **FIXED), expected)


def test_a_sum_and_a_mean_of_the_output():
    inputs, _ = draw(GROUPED)
    for reduce in (torch.sum, torch.mean):
        call = Call(inputs, **FIXED)
        with torch.enable_grad():
            loss = reduce(call.out.float())
        found = torch.autograd.grad(loss, call.leaves)
        each = 1.0 if reduce is torch.sum else 1.0 / call.out.numel()
        expected = gradients(inputs, torch.full_like(call.out, each), **FIXED)
        assert same_bits(found, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "kv"])
def test_expanded_inputs(which, dim):
    """One sequence, one token or one head that stands for all: gradients of each are summed."""
    (q, k, v), dout = draw(GROUPED.but(heads_kv=4))

    def expand(x):
        return x.narrow(dim, 0, 1).expand(x.shape)

    expanded = [expand(q), k, v] if which == "q" else [q, expand(k), expand(v)]
    # Not held against PyTorch's: over equal keys its differences cancel, and ours are rounded
    expected = gradients([x.contiguous() for x in expanded], dout, **FIXED)
    assert same_bits(gradients(expanded, dout, **FIXED), expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["equal-heads", "grouped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_packed_qkv(dtype, grouped):
    heads_kv = 2 if grouped else 4
    inputs, dout = draw(Problem(heads=4, heads_kv=heads_kv, dtype=dtype))
    expected = check(inputs, dout, **FIXED)
    qkv = torch.cat(inputs, dim=2) if grouped else torch.stack(inputs, dim=2)
    qkv.requires_grad_()
    with torch.enable_grad():
        out = hopper_attention.flash_attn_qkvpacked_func(
            qkv, num_heads_q=4 if grouped else None, **FIXED
        )
    (found,) = torch.autograd.grad(out, [qkv], dout)
    assert found.shape == qkv.shape
    parts = found.split([4, heads_kv, heads_kv], dim=2) if grouped else found.unbind(dim=2)
    assert same_bits(parts, expected)


def test_strides_of_single_dimensions_do_not_matter():
    inputs, dout = draw(Problem(batch=1, heads=1))
    expected = check(inputs, dout, **FIXED)
    moved = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in (*inputs, dout)]
    assert same_bits(gradients(moved[:3], moved[3], **FIXED), expected)


def test_a_gradient_of_the_log_sum_exp_that_is_not_contiguous():
    inputs, dout = draw(GROUPED)
    whole = torch.randn(2, 2 * 150, 4, device=DEVICE)
    dlse = whole[:, ::2].transpose(1, 2)
    call = Call(inputs, **FIXED)
    expected = call.gradients(dout, dlse.contiguous())
    assert same_bits(call.gradients(dout, dlse), expected)


def test_q_k_and_v_may_be_one_tensor():
    (x, _, _), dout = draw(Problem())
    expected = gradients((x, x.clone(), x.clone()), dout, **FIXED)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        out = hopper_attention.flash_attn_func(leaf, leaf, leaf, **FIXED)
    (found,) = torch.autograd.grad(out, [leaf], dout)
    torch.testing.assert_close(
        found.double(), sum(x.double() for x in expected), rtol=0.02, atol=0.05
    )
