"""The rotations of Q and K that precede their quantization, in float32.

`rotate` is the incoherent processing of Shah et al., "FlashAttention-3" (arXiv:2407.08608, section
3.3): Q and K are multiplied by one orthogonal matrix, random signs and then a Walsh-Hadamard
transform, which leaves q k^T as it is and spreads an outlier over many channels. `apply_rotary` is
the rotary embedding of Su et al., "RoFormer" (arXiv:2104.09864).
"""

from __future__ import annotations

import torch

from .recipe import hadamard_block, signs


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of blocks of x's last dimension, in float32.

    Args:
        x: (..., head_dim); blocks have `recipe.hadamard_block` channels.

    Returns:
        float32, x's shape: `hadamard_sums` times `hadamard_scale`.
    """
    return hadamard_sums(x) * hadamard_scale(x.shape[-1])


def hadamard_scale(head_dim: int) -> float:
    """What makes `hadamard_sums` orthonormal: the float32 nearest to 1 / sqrt(block)."""
    return torch.tensor(hadamard_block(head_dim) ** -0.5, dtype=torch.float32).item()


def hadamard_sums(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of blocks of x's last dimension, a matrix of 1 and -1.

    How the sums are rounded is part of the definition, so that another implementation can give the
    same bits. Butterflies (a, b) -> (a + b, a - b) over channels that lie 1, 2, 4, ... apart are
    float32; but where x has 16 bits and blocks have 16 channels or more, the first four strides
    are one sum of 16 terms, and that is `_tensor_core_sums`.

    Args:
        x: (..., head_dim); blocks have `recipe.hadamard_block` channels.

    Returns:
        float32, x's shape.
    """
    shape, block, stride = x.shape, hadamard_block(x.shape[-1]), 1
    if x.dtype in (torch.float16, torch.bfloat16) and block >= _TERMS:
        x, stride = _tensor_core_sums(x.float().reshape(-1, _TERMS)), _TERMS
    x = x.float().reshape(-1, block)
    while stride < block:
        pairs = x.view(x.shape[0], block // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), 2).view(x.shape)
        stride *= 2
    return x.view(shape)


_TERMS = 16
_FRACTION_BITS = 25


def _tensor_core_sums(x: torch.Tensor) -> torch.Tensor:
    """Multiplies by the Walsh-Hadamard matrix of 16 rows as Hopper's tensor cores add.

    Terms are shifted to the largest exponent among them and cut to 25 bits after the point, added
    exactly, and the sum is cut to float32's 24 bits (Khattak and Mikaitis, "Accurate Models of
    NVIDIA Tensor Cores", arXiv:2512.07004).

    Args:
        x: (n, 16) float32 whose values have 16 bits.
    """
    counts = x.isfinite() & (x != 0)
    exponent = torch.where(counts, torch.frexp(x).exponent - 1, -200).amax(1, keepdim=True)
    shift = (_FRACTION_BITS - exponent).double()
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < _TERMS:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    total = (x.double() * shift.exp2()).trunc() @ matrix.to(x.device)
    excess = (torch.frexp(total).exponent - 24).clamp_min(0).double()
    cut = (total * (-excess).exp2()).trunc() * excess.exp2()
    return torch.where(total.isfinite(), cut * (-shift).exp2(), total).float()


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The incoherent processing of one tensor: x times `recipe.signs`, then `hadamard`.

    Args:
        x: (..., head_dim).
        seed: `Fp8Recipe.seed`.

    Returns:
        float32, x's shape.
    """
    return hadamard(x * signs(x.shape[-1], seed).to(x))


def rotated_sums(x: torch.Tensor, seed: int) -> torch.Tensor:
    """`rotate` without its factor, `hadamard_scale`."""
    return hadamard_sums(x * signs(x.shape[-1], seed).to(x))


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    offset: int = 0,
) -> torch.Tensor:
    """Rotary embedding in float32: two products and one sum an element, each rounded.

    Args:
        x: (batch, seqlen, heads, head_dim).
        cos: (positions, rotary_dim / 2); positions is at least offset + seqlen. The first
            rotary_dim channels are rotated, the others stay.
        sin: the same shape.
        interleaved: channels 2i and 2i + 1 are a pair, and not i and i + rotary_dim / 2.
        offset: the position of the first token.

    Returns:
        float32, x's shape.

    Raises:
        ValueError: the shapes do not fit together.
    """
    seqlen, head_dim = x.shape[1], x.shape[3]
    if cos.ndim != 2 or cos.shape != sin.shape:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), got {shapes}"
        )
    half = cos.shape[1]
    if 2 * half > head_dim:
        raise ValueError(f"rotary_cos rotates {2 * half} channels, q and k have {head_dim}")
    if offset < 0 or offset + seqlen > cos.shape[0]:
        raise ValueError(
            f"rotary_cos has {cos.shape[0]} positions; tokens at {offset} to {offset + seqlen - 1} "
            "need more"
        )
    cos, sin = (t[offset : offset + seqlen, None].float() for t in (cos, sin))
    x = x.float()
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    together = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((together, x[..., 2 * half :]), -1)
