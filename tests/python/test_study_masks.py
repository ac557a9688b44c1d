"""Masks of models, read as padding, causal flag and window."""

import pytest
import torch

from hopper_attention import reference
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.masks import UnsupportedMaskError, apply_mask, padding

SEQLEN = 10


def draw(seqlen_q=SEQLEN, batch=2):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, seqlen_q, 2, 8, generator=generator)
    k, v = (torch.randn(batch, SEQLEN, 2, 8, generator=generator) for _ in range(2))
    return AttentionInputs(q, k, v, softmax_scale=0.3)


def band(left, right, seqlen_q=SEQLEN):
    rows = torch.arange(seqlen_q)[:, None] + SEQLEN - seqlen_q
    distance = torch.arange(SEQLEN)[None, :] - rows
    return ((distance >= -left) & (distance <= right))[None, None]


LOWEST = torch.finfo(torch.float32).min


def additive(visible, low=LOWEST):
    return torch.zeros(visible.shape).masked_fill(~visible, low)


def attend(x):
    """Attention as the problem's options say."""
    out, _ = reference.attention(
        x.query, x.key, x.value, x.softmax_scale, x.causal, x.window_size, x.softcap
    )
    return out


def attend_masked(x, visible):
    """Attention as the mask says, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (x.query, x.key, x.value))
    scores = (q @ k.transpose(2, 3) * x.softmax_scale).masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("form", [lambda v: v, additive, lambda v: additive(v, -float("inf"))])
@pytest.mark.parametrize("seqlen_q", [SEQLEN, 4])
@pytest.mark.parametrize(
    "left, right, causal, window",
    [
        (99, 99, False, (-1, -1)),
        (99, 0, True, (-1, -1)),
        (3, 0, True, (3, 0)),
        (2, 1, False, (2, 1)),
        (99, 2, False, (-1, 2)),
    ],
)
def test_patterns_become_options_that_say_the_same(left, right, causal, window, seqlen_q, form):
    x = draw(seqlen_q)
    visible = band(left, right, seqlen_q)
    problems = apply_mask(x, form(visible))
    out = torch.cat([attend(problem) for problem in problems])
    torch.testing.assert_close(out, attend_masked(x, visible))
    # With few queries a window leaves the first keys to nobody, and they are cut off as padding.
    if seqlen_q == SEQLEN or left >= SEQLEN:
        assert len(problems) == 1
        assert (problems[0].causal, problems[0].window_size) == (causal, window)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_cut_off(side, causal):
    x = draw()
    token = torch.ones(2, SEQLEN, dtype=torch.bool)
    token[1, slice(0, 3) if side == "left" else slice(7, None)] = False
    visible = token[:, None, None, :] & band(99, 0 if causal else 99)
    first, second = apply_mask(x, visible)
    assert (first.seqlen_q, second.seqlen_q, second.seqlen_k) == (10, 7, 7)
    assert first.causal is second.causal is causal
    expected = attend_masked(x, visible)
    torch.testing.assert_close(attend(first), expected[:1])
    torch.testing.assert_close(attend(second), expected[1:, token[1]])
    assert torch.equal(padding(visible, 2, SEQLEN), ~token)


def test_a_sequence_of_padding_alone_is_left_out():
    visible = torch.ones(2, 1, SEQLEN, SEQLEN, dtype=torch.bool)
    visible[1] = False
    (problem,) = apply_mask(draw(), visible)
    assert torch.equal(problem.query, draw().query[:1])


def test_without_a_mask_nothing_changes():
    x = draw()
    assert apply_mask(x, None) == [x]
    assert padding(None, 2, SEQLEN) is None
    assert padding(band(99, 0), 2, SEQLEN) is None


def test_a_bias_is_refused():
    bias = torch.randn(1, 1, SEQLEN, SEQLEN)
    with pytest.raises(UnsupportedMaskError, match="adds a bias"):
        apply_mask(draw(), bias)


def test_a_mask_for_each_head_is_refused():
    visible = torch.cat([band(99, 99), band(99, 0)], dim=1)
    with pytest.raises(UnsupportedMaskError, match="from head to head"):
        apply_mask(draw(), visible)


def test_other_patterns_are_refused():
    chunked = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool()[None, None]
    with pytest.raises(UnsupportedMaskError, match="neither full, causal nor"):
        apply_mask(draw(), chunked)
