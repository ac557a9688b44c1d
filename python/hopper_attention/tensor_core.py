"""The product of two FP8 matrices as Hopper's tensor cores compute it.

One instruction multiplies 32 pairs of e4m3 numbers and adds them to an accumulator C. It does not
round as a float32 sum would. Each product is exact; all 33 terms are shifted to the largest
exponent among them and cut to 13 bits after the point; the cut terms are added exactly, and the sum
is cut to 13 bits again:

    e   = max(exponent(C), exponent(a_k) + exponent(b_k) for each k)
    C'  = cut(sum of cut(term, 2^(e - 13)))                      cut drops bits, towards zero

So a product that lies 2^13 below the accumulator adds nothing, however often it comes. That the
accumulator keeps 13 bits is in "SageAttention2" (arXiv:2411.10958, section 3) and "DeepSeek-V3"
(arXiv:2412.19437, section 3.3.2, which counts the leading bit too: 14); models of the sum are in
Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv:2512.07004).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FRACTION_BITS = 13
"""What Hopper's FP8 tensor cores keep behind the leading bit."""

STEP = 32
"""Products that one instruction sums."""

_AT_ONCE = 2**18  # products: 512 KiB, so that all passes over them stay in a core's cache
_LEAST_EXPONENT = 2.0**-6  # of e4m3: subnormal numbers have the least normal number's
_MINUS_HALF = torch.tensor(2.0**-9 - 0.5)
_LEAST_UNIT = 2.0**-100  # no accumulator that matters is as small
_EXPONENT = 0xFF << 23  # the bits of float32's exponent
_ONE_TWICE = 254 << 23  # a power of two's bits taken from it are its reciprocal's


def multiply_accumulate(
    a: torch.Tensor,
    b: torch.Tensor,
    accumulator: torch.Tensor | None = None,
    fraction_bits: int = FRACTION_BITS,
) -> torch.Tensor:
    """Computes accumulator + a b, in steps of 32 along k, in k's order.

    Args:
        a: (n, rows, k), float32 whose values are e4m3's.
        b: (n, k, columns), likewise.
        accumulator: (n, rows, columns) float32; None is zeros. It is not changed.
        fraction_bits: bits that terms and sums keep; at most 17, so that float32 holds the sum.

    Returns:
        (n, rows, columns) float32.
    """
    n, rows, depth = a.shape
    columns = b.shape[2]
    start = torch.zeros(n, rows, columns) if accumulator is None else accumulator
    total = start.float().clone()
    at_once = max(1, _AT_ONCE // (STEP * max(1, columns)))
    buffer = torch.empty(min(at_once, max(1, rows)) * STEP * columns)
    for one in range(n):
        left, positive = _Factor.make(a[one]), not bool((a[one] < 0).any())
        for first in range(0, depth, STEP):
            part = slice(first, first + STEP)
            right = _Factor.make(b[one, part])
            for begin in range(0, rows, at_once):
                chunk = slice(begin, begin + at_once)
                mine = left.at(chunk, part)
                _step(mine, right, positive, total[one, chunk], buffer, fraction_bits)
    return total


class _Factor(NamedTuple):
    """A matrix of e4m3 numbers, taken apart."""

    magnitudes: torch.Tensor
    signs: torch.Tensor
    powers: torch.Tensor

    @classmethod
    def make(cls, x: torch.Tensor) -> _Factor:
        powers = _exponent(x.abs()).clamp_min_(_LEAST_EXPONENT)
        return cls(x.abs(), x.sign(), powers.masked_fill_(x == 0, 0.0))

    def at(self, rows: slice, columns: slice) -> _Factor:
        return _Factor(*(part[rows, columns] for part in self))


def _step(
    left: _Factor,  # (rows, up to 32)
    right: _Factor,  # (up to 32, columns)
    left_is_positive: bool,
    total: torch.Tensor,  # (rows, columns), changed
    buffer: torch.Tensor,
    fraction_bits: int,
) -> None:
    """One instruction for each element of total."""
    rows, depth = left.magnitudes.shape
    products = buffer[: rows * right.magnitudes.numel()].view(rows, depth, -1)
    torch.mul(left.powers[:, :, None], right.powers, out=products)
    largest = _exponent(torch.maximum(total.abs(), products.amax(1)))
    unit = largest.mul_(2.0**-fraction_bits).clamp_min_(_LEAST_UNIT)
    inverse = (_ONE_TWICE - unit.view(torch.int32)).view(torch.float32)
    torch.mul(left.magnitudes[:, :, None], right.magnitudes, out=products)
    # Rounding x - 1/2 + 2^-9 cuts x: a product has 8 bits, so x, where it is not whole, is at least
    # 2^-8 below the next whole number. PyTorch's own trunc takes ten times as long.
    torch.addcmul(_MINUS_HALF, products, inverse[:, None], out=products).round_()
    products.mul_(right.signs)
    if not left_is_positive:
        products.mul_(left.signs[:, :, None])
    before = total * inverse
    units = products.sum(1).add_(before.to(torch.int32)).add_(before, alpha=0)  # NaN stays NaN
    torch.mul(units, unit, out=total)
    # What is behind the kept bits of the mantissa.
    total.view(torch.int32).bitwise_and_(-1 << (23 - fraction_bits))


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not above x, which is not negative; infinity of NaN."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)
