"""The study's measures on arrays whose answers are known, and how they add up."""

import math

import pytest
import torch

from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.metrics import ErrorSums


def one_head(values):
    """(1, seqlen, 1, 1) of the values."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_metrics_of_known_arrays():
    reference = one_head([3.0, 4.0, 0.0, 0.0])
    out = one_head([3.0, 4.0, 1.0, -2.0])
    m = ErrorSums.measure(out, reference).metrics()
    assert m.rmse == pytest.approx(math.sqrt(5 / 4), rel=1e-15)
    assert m.relative_rmse == pytest.approx(math.sqrt(5 / 25), rel=1e-15)
    assert m.max_error == 2.0
    assert m.cosine == pytest.approx(25 / (5 * math.sqrt(30)), rel=1e-15)
    assert (m.elements, m.nonfinite) == (4, 0)


def test_no_error_is_exactly_none():
    reference = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    m = ErrorSums.measure(reference, reference).over_heads().metrics()
    assert (m.rmse, m.relative_rmse, m.max_error, m.cosine) == (0.0, 0.0, 0.0, 1.0)
    assert m.elements == reference.numel()


def test_zero_output_against_zero_reference_is_no_error():
    m = ErrorSums.measure(one_head([0.0, 0.0]), one_head([0.0, 0.0])).metrics()
    assert (m.relative_rmse, m.cosine) == (0.0, 1.0)


def test_error_against_zero_reference_is_infinitely_large():
    m = ErrorSums.measure(one_head([1.0, 1.0]), one_head([0.0, 0.0])).metrics()
    assert m.rmse == 1.0
    assert m.relative_rmse == math.inf
    assert math.isnan(m.cosine)


def test_heads_are_measured_apart():
    reference = torch.zeros(2, 3, 2, 4, dtype=torch.float64) + 1.0
    out = reference.clone()
    out[:, :, 1] += 0.5
    sums = ErrorSums.measure(out, reference)
    assert sums.metrics(0).rmse == 0.0
    assert sums.metrics(1).rmse == 0.5
    assert sums.over_heads().metrics().rmse == pytest.approx(math.sqrt(0.125), rel=1e-15)
    assert sums.over_heads().metrics().max_error == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_counted_and_not_hidden(bad):
    out = one_head([1.0, bad, 1.0])
    m = ErrorSums.measure(out, one_head([1.0, 1.0, 1.0])).metrics()
    assert m.nonfinite == 1
    assert not math.isfinite(m.rmse)
    assert not math.isfinite(m.max_error)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"out has shape \(1, 2, 1, 1\)"):
        ErrorSums.measure(one_head([1.0, 2.0]), one_head([1.0]))


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(4, 6, 3, 5, dtype=torch.float64, generator=generator)
    out = reference + 0.1 * torch.randn(reference.shape, dtype=torch.float64, generator=generator)
    whole = ErrorSums.measure(out, reference).over_heads().metrics()
    parts = ErrorSums.measure(out[:1], reference[:1]) + ErrorSums.measure(out[1:], reference[1:])
    added = parts.over_heads().metrics()
    assert added.rmse == pytest.approx(whole.rmse, rel=1e-14)
    assert added.cosine == pytest.approx(whole.cosine, rel=1e-14)
    assert added.max_error == whole.max_error
    assert added.elements == whole.elements


def test_sums_can_be_placed_among_other_heads():
    sums = ErrorSums.measure(one_head([1.0]), one_head([0.0])).at_heads(slice(1, 2), 3)
    assert sums.elements.tolist() == [0, 1, 0]
    assert sums.squared_error.tolist() == [0.0, 1.0, 0.0]
    assert (sums + ErrorSums.zeros(3)).metrics(1).rmse == 1.0


@pytest.mark.parametrize("max_scores", [1, 60, 130, 10**6])
def test_pieces_cover_every_sequence_and_head_once(max_scores):
    heads, heads_kv = 6, 3
    q = torch.arange(4 * 5 * heads, dtype=torch.float64).view(4, 5, heads, 1)
    kv = torch.randn(4, 5, heads_kv, 1)
    inputs = AttentionInputs(q, kv, kv, softmax_scale=1.0)
    seen = []
    for where, piece in inputs.pieces(max_scores):
        assert piece.heads == where.stop - where.start == 2 * piece.heads_kv
        assert piece.batch == 1 or piece.batch * piece.heads * 25 <= max_scores
        seen.extend(piece.query.flatten().tolist())
    assert sorted(seen) == q.flatten().tolist()
    assert inputs.num_pieces(max_scores) == len(list(inputs.pieces(max_scores)))
