"""Who computes what: standard attention, ours, the registry, and what they are measured against."""

import math

import pytest
import torch

from hopper_attention import emulation, reference
from hopper_attention.study import formats
from hopper_attention.study.distributions import random_inputs
from hopper_attention.study.evaluate import evaluate, merge
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.recipes import RECIPES
from hopper_attention.study.standard import standard_attention

CPU = torch.device("cpu")
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw(
    seqlen_q=24, seqlen_k=24, heads=2, heads_kv=2, head_dim=16, dtype=torch.float16, **options
):
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, seqlen_q, heads, head_dim)] + [(2, seqlen_k, heads_kv, head_dim)] * 2
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return AttentionInputs(q, k, v, softmax_scale=head_dim**-0.5, **options)


def exact(x):
    out, _ = reference.attention(
        x.query,
        x.key,
        x.value,
        softmax_scale=x.softmax_scale,
        causal=x.causal,
        window_size=x.window_size,
        softcap=x.softcap,
    )
    return out


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"causal": True},
        {"causal": True, "seqlen_q": 9},
        {"causal": True, "seqlen_k": 9},
        {"window_size": (3, 2)},
        {"causal": True, "window_size": (5, 0)},
        {"heads": 4, "heads_kv": 2},
        {"softcap": 2.0},
    ],
    ids=str,
)
def test_standard_attention_is_attention(dtype, problem):
    x = draw(dtype=dtype, **problem)
    out = standard_attention(x)
    assert out.dtype == dtype
    # Scores and outputs of a few units, each rounded by half a spacing at most.
    torch.testing.assert_close(out.double(), exact(x), rtol=0, atol=12 * HALF[dtype])


def test_standard_attention_rounds_scores_and_probabilities():
    # Scores 2048 and 2049: in fp16 both are 2048, so that the weights become equal.
    x = AttentionInputs(
        torch.ones(1, 1, 1, 1).half(),
        torch.tensor([2048.0, 2049.0]).half().view(1, 2, 1, 1),
        torch.tensor([1.0, 3.0]).half().view(1, 2, 1, 1),
        softmax_scale=1.0,
    )
    assert standard_attention(x).item() == 2.0
    q = x.query * 1.0
    fine = AttentionInputs(q, x.key - 2048, x.value, softmax_scale=1.0)
    assert standard_attention(fine).item() == 2.0  # 2049 was stored as 2048 already
    spread = AttentionInputs(q, torch.tensor([0.0, 1.0]).half().view(1, 2, 1, 1), x.value, 1.0)
    weights = torch.softmax(torch.tensor([0.0, 1.0]), 0).half().float()
    assert standard_attention(spread).item() == (weights @ torch.tensor([1.0, 3.0])).half().item()


def test_a_row_without_keys_is_zero():
    x = draw(seqlen_q=6, seqlen_k=3, causal=True)
    out = standard_attention(x)
    assert (out[:, :3] == 0).all()
    assert out.isfinite().all()


def test_ours_without_a_card_is_the_emulation():
    x = draw(causal=True)
    ours = formats.contestants(["fp16"])[1]
    assert ours.label == "ours fp16"
    out, by = ours.run(x)
    expected, _ = emulation.attention(
        x.query, x.key, x.value, softmax_scale=x.softmax_scale, causal=True
    )
    assert by == formats.EMULATION
    assert torch.equal(out, expected)


def test_contestants_come_in_the_order_asked_for_and_once():
    chosen = formats.contestants(["bf16", "fp16", "bf16"])
    assert [c.label for c in chosen] == [
        "standard bf16",
        "ours bf16",
        "standard fp16",
        "ours fp16",
    ]
    assert [c.input_dtype for c in chosen][1:3] == [torch.bfloat16, torch.float16]


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match=r"formats has 'fp9'; allowed are fp16, bf16"):
        formats.contestants(["fp16", "fp9"])
    with pytest.raises(ValueError, match="formats is empty"):
        formats.contestants([])


def test_a_format_can_be_added(monkeypatch):
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))

    def run(x):
        return torch.zeros_like(x.query), formats.EMULATION

    coarse = formats.Contestant("ours", "zero", torch.float16, run)
    formats.register(formats.Format("zero", (coarse,)))
    assert formats.names() == ["fp16", "bf16", *RECIPES, "zero"]
    results = evaluate(draw(dtype=torch.float32), formats.contestants(["zero"]), CPU)
    assert merge([results])[coarse].total.metrics().relative_rmse == 1.0
    with pytest.raises(ValueError, match="is a format already"):
        formats.register(formats.Format("zero", (coarse,)))
    with pytest.raises(ValueError, match="expected 'other'"):
        formats.register(formats.Format("other", (coarse,)))


def test_total_counts_the_rounding_of_the_inputs_and_arithmetic_does_not():
    def run(x):
        return exact(x), formats.EMULATION

    perfect = formats.Contestant("ours", "perfect", torch.bfloat16, run)
    x = draw(dtype=torch.float32)
    measured = evaluate(x, [perfect], CPU)[perfect]
    assert measured.arithmetic.over_heads().metrics().rmse == 0.0
    error = exact(x.to(torch.bfloat16)) - exact(x)
    rmse = error.square().mean().sqrt().item()
    assert measured.total.over_heads().metrics().rmse == pytest.approx(rmse, rel=1e-12)
    assert rmse > 1e-4


def test_inputs_that_need_no_rounding_have_one_reference():
    ours = formats.contestants(["fp16"])[1]
    measured = evaluate(draw(dtype=torch.float16), [ours], CPU)[ours]
    assert torch.equal(measured.total.squared_error, measured.arithmetic.squared_error)


def test_pieces_do_not_change_the_result(monkeypatch):
    from hopper_attention.study import evaluate as module

    x = draw(dtype=torch.float32, heads=4, heads_kv=2)
    chosen = formats.contestants(["fp16"])
    whole = evaluate(x, chosen, CPU)
    steps = []
    monkeypatch.setattr(module, "_MAX_SCORES_CPU", 1)
    pieces = evaluate(x, chosen, CPU, lambda: steps.append(1))
    assert len(steps) == 2 * 2
    for contestant in chosen:
        torch.testing.assert_close(
            pieces[contestant].total.squared_error,
            whole[contestant].total.squared_error,
            rtol=1e-6,
            atol=0,
        )
        assert torch.equal(pieces[contestant].total.elements, whole[contestant].total.elements)


def test_merge_adds_heads_of_different_layers():
    chosen = formats.contestants(["fp16"])
    wide = evaluate(draw(heads=4, heads_kv=4), chosen, CPU)
    slim = evaluate(draw(heads=2, heads_kv=2), chosen, CPU)
    merged = merge([wide, slim])[chosen[0]].total
    assert merged.elements.tolist() == [2 * 24 * 16 * (4 + 2)]
    expected = wide[chosen[0]].total.squared_error.sum() + slim[chosen[0]].total.squared_error.sum()
    assert merged.squared_error.item() == pytest.approx(expected.item(), rel=1e-14)


def test_distributions_are_what_they_say():
    shape = {"batch": 1, "seqlen": 1024, "heads": 4, "head_dim": 64, "seed": 3}
    normal, outliers = (random_inputs(name, **shape) for name in ("normal", "outliers"))
    assert normal.query.shape == (1, 1024, 4, 64)
    assert normal.softmax_scale == 64**-0.5
    entries = torch.stack([normal.query, normal.key, normal.value])
    assert entries.mean().item() == pytest.approx(0, abs=5e-3)
    assert entries.std().item() == pytest.approx(1, abs=5e-3)
    assert entries.abs().max() < 6.5
    entries = torch.stack([outliers.query, outliers.key, outliers.value])
    # Var = 1 + 0.001 * 100; beyond 8 lie 0.001 * P(|N(0, 101)| > 8) of the entries.
    assert entries.var().item() == pytest.approx(1.1, abs=0.02)
    beyond = 0.001 * math.erfc(8 / math.sqrt(2 * 101))
    assert (entries.abs() > 8).float().mean().item() == pytest.approx(beyond, rel=0.15)


def test_a_seed_gives_the_same_numbers_again():
    shape = {"batch": 1, "seqlen": 8, "heads": 1, "head_dim": 8}
    first, again = (random_inputs("outliers", seed=5, **shape) for _ in range(2))
    other = random_inputs("outliers", seed=6, **shape)
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.query, other.query)
    assert not torch.equal(first.query, first.key)


@pytest.mark.parametrize("size", ["batch", "seqlen", "heads", "head_dim"])
def test_sizes_below_one_are_named(size):
    shape = {"batch": 1, "seqlen": 1, "heads": 1, "head_dim": 1, size: 0}
    with pytest.raises(ValueError, match=f"{size} is 0"):
        random_inputs("normal", seed=0, **shape)


def test_the_error_is_the_published_kernels():
    """FlashAttention-3 has 1.20e-5 in fp16 at this length and head dimension, cuDNN the same."""
    x = random_inputs("normal", batch=1, seqlen=4096, heads=1, head_dim=128, seed=0)
    chosen = formats.contestants(["fp16"])
    results = evaluate(x, chosen, CPU)
    standard, ours = (results[c].total.metrics().rmse for c in chosen)
    assert ours == pytest.approx(1.20e-5, rel=0.05)
    assert standard == pytest.approx(2.11e-5, rel=0.05)
