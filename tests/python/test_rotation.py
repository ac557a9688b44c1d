"""The Walsh-Hadamard transform whose first sums are the tensor cores'."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hopper_attention.recipe import E4M3_MAX, Fp8Recipe
from hopper_attention.reference_quantizer import quantize
from hopper_attention.rotation import hadamard, hadamard_scale, hadamard_sums, rotated_sums

TERMS = 16
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
WORDS = st.lists(st.integers(0, 2**16 - 1), min_size=TERMS, max_size=TERMS)
SUBNORMALS = st.lists(st.integers(0, 2**7 - 1), min_size=TERMS, max_size=TERMS)


def matrix(block):
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < block:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    return rows


def from_words(words, dtype):
    """The numbers of these 16 bits; 0 for what is not finite."""
    x = torch.tensor(words, dtype=torch.int32).to(torch.uint16).view(dtype)
    return x.nan_to_num(0, 0, 0)


def exponent(number):
    """Of a number that is not 0: the largest e with 2^e <= |number|."""
    number = abs(number)
    e = number.numerator.bit_length() - number.denominator.bit_length()
    return e if number >= Fraction(2) ** e else e - 1


def cut(number, bits):
    """Without what lies behind 2^-bits, towards zero."""
    scale = Fraction(2) ** bits
    return int(number * scale) / scale


def sum_by_hand(terms):
    """The rule in `rotation.py` in exact fractions."""
    if not any(terms):
        return Fraction(0)
    largest = max(exponent(term) for term in terms if term)
    total = sum(cut(term, 25 - largest) for term in terms)
    return cut(total, 23 - exponent(total)) if total else total


@HALVES
@settings(max_examples=60, deadline=None)
@given(words=st.one_of(WORDS, SUBNORMALS))
@example(words=[0] * TERMS)
@example(words=[0x8000] * TERMS)
@example(words=[1] + [0x8001] * (TERMS - 1))
def test_sums_follow_the_rule_to_the_bit(dtype, words):
    x = from_words(words, dtype)
    numbers = [Fraction(number) for number in x.tolist()]
    for found, signs in zip(hadamard_sums(x).tolist(), matrix(TERMS).tolist(), strict=True):
        total = sum_by_hand([int(s) * number for s, number in zip(signs, numbers, strict=True)])
        if abs(total) >= 2**128:
            assert found == math.copysign(math.inf, total)
        else:
            assert Fraction(found) == total


@HALVES
@settings(max_examples=60, deadline=None)
@given(words=st.one_of(WORDS, SUBNORMALS))
def test_sums_are_near_the_exact_ones(dtype, words):
    x = from_words(words, dtype).double()
    x = x.clamp(-(2.0**100), 2.0**100).to(dtype)
    exact = matrix(TERMS) @ x.double()
    largest = x.double().abs().max()
    off = (hadamard_sums(x).double() - exact).abs()
    # 15 terms lose less than 2^-25 of the largest each, and the sum its last bit.
    assert (off <= 15 * 2.0**-25 * largest + 2.0**-23 * exact.abs()).all()


def test_terms_are_cut_25_bits_below_the_largest():
    x = torch.zeros(3, TERMS)
    x[:, 0], x[:, 1] = 1, -1
    x[:, 2] = torch.tensor([2.0**-25, 2.0**-26, -(2.0**-26)])
    assert hadamard_sums(x.bfloat16())[:, 0].tolist() == [2.0**-25, 0, 0]
    assert hadamard_sums(x)[:, 0].tolist() == [2.0**-25, 2.0**-26, -(2.0**-26)]


@HALVES
def test_sums_are_cut_to_24_bits_and_not_rounded(dtype):
    x = torch.zeros(2, TERMS, dtype=dtype)
    x[0, :2] = torch.tensor([4.0, 2.0**-21 + 2.0**-22], dtype=dtype)  # 1.5 of float32's last bit
    x[1] = -x[0]
    last = 2.0**-21
    assert hadamard_sums(x)[:, 0].tolist() == [4 + last, -4 - last]


@HALVES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_block_alone(dtype, bad):
    x = torch.randn(2, 96).to(dtype)
    x[0, 40] = bad
    finite = hadamard(x).isfinite()
    assert not finite[0, 32:64].any()
    assert finite[0, :32].all()
    assert finite[0, 64:].all()
    assert finite[1].all()


@HALVES
@pytest.mark.parametrize("head_dim", [8, 16, 40, 80, 96, 128, 256])
def test_sixteen_bits_and_float32_agree(head_dim, dtype):
    x = torch.randn(3, 5, head_dim).to(dtype)
    block = head_dim & -head_dim
    expected = (x.double().view(3, 5, -1, block) @ matrix(block) / math.sqrt(block)).view(x.shape)
    for found in (hadamard(x), hadamard(x.float())):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    if block < TERMS:
        assert torch.equal(hadamard(x), hadamard(x.float()))


@HALVES
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_quantizer_multiplies_a_sum_once(head_dim, dtype):
    q, k, v = (torch.randn(1, 40, 2, head_dim).to(dtype) for _ in range(3))
    found = quantize(q, k, v, Fp8Recipe("token", seed=5))
    for x, e4m3, descale in ((q, found.q, found.q_descale), (k, found.k, found.k_descale)):
        sums = rotated_sums(x, 5)
        amax = sums.abs().amax(3, keepdim=True) * hadamard_scale(head_dim)
        assert torch.equal(descale, (amax / E4M3_MAX)[..., 0].transpose(1, 2))
        factor = torch.full_like(amax, E4M3_MAX) / amax * hadamard_scale(head_dim)
        expected = (sums * factor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        assert torch.equal(e4m3.view(torch.uint8), expected.view(torch.uint8))
