"""The tensor core's sum, against the same sum in Python's integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_attention.tensor_core import FRACTION_BITS, multiply_accumulate


def e4m3(*shape, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.exp(spread * torch.randn(shape, generator=generator))
    x = torch.randn(shape, generator=generator) * exponents
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def exponent(x, least=-200):
    return max(math.frexp(x)[1] - 1, least)


def one_by_one(a, b, accumulator, bits):
    """One element of accumulator + a b, term by term."""
    for first in range(0, len(a), 32):
        pairs = [(x, y) for x, y in zip(a[first : first + 32], b[first : first + 32], strict=True)]
        found = [exponent(x, -6) + exponent(y, -6) for x, y in pairs if x and y]
        found += [exponent(accumulator)] if accumulator else []
        if not found:
            continue
        unit = 2.0 ** (max(found) - bits)
        units = math.trunc(accumulator / unit) + sum(math.trunc(x * y / unit) for x, y in pairs)
        kept = 2.0 ** max(0, exponent(units) - bits) if units else 1.0
        accumulator = math.trunc(units / kept) * kept * unit
    return accumulator


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 100),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    size=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    bits=st.sampled_from([10, FRACTION_BITS, 17]),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_sum_of_cut_terms(depth, spread, size, bits, seed):
    a, b = e4m3(2, 3, depth, spread=spread, seed=seed), e4m3(2, depth, 5, spread=spread, seed=~seed)
    start = size * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    before = start.clone()
    found = multiply_accumulate(a, b, start, bits)
    assert torch.equal(start, before)
    for n in range(2):
        for row in range(3):
            for column in range(5):
                expected = one_by_one(
                    a[n, row].tolist(), b[n, :, column].tolist(), start[n, row, column].item(), bits
                )
                assert found[n, row, column].item() == expected


def test_many_rows_are_the_same_rows():
    a, b = e4m3(1, 300, 64), e4m3(1, 64, 128)
    whole = multiply_accumulate(a, b)
    assert torch.equal(whole[:, 177:179], multiply_accumulate(a[:, 177:179], b))
    torch.testing.assert_close(whole, a @ b, rtol=0, atol=(a.abs() @ b.abs()).max().item() * 2e-3)


def test_a_product_far_below_the_accumulator_adds_nothing():
    ones = torch.ones(1, 1, 32)
    start = torch.full((1, 1, 1), 2.0**FRACTION_BITS)
    assert multiply_accumulate(ones, ones.mT, start).item() == 2**FRACTION_BITS + 32
    assert multiply_accumulate(ones, ones.mT, 2 * start).item() == 2 ** (FRACTION_BITS + 1)


def test_nan_stays_in_its_row_or_column():
    a, b = e4m3(1, 4, 40), e4m3(1, 40, 6)
    start = torch.zeros(1, 4, 6)
    clean = multiply_accumulate(a, b, start)
    a[0, 1, 3] = b[0, 35, 2] = start[0, 3, 4] = math.nan
    found = multiply_accumulate(a, b, start)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1, :] = expected[:, 2] = expected[3, 4] = True
    assert torch.equal(found[0].isnan(), expected)
    assert torch.equal(found[0][~expected], clean[0][~expected])


@pytest.mark.parametrize("shape", [(0, 32, 5), (3, 0, 5), (3, 32, 0)])
def test_empty_matrices(shape):
    rows, depth, columns = shape
    found = multiply_accumulate(torch.ones(1, rows, depth), torch.ones(1, depth, columns))
    assert found.shape == (1, rows, columns)
    assert (found == 0).all()
