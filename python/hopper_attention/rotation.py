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

    The order of the additions is part of the definition, so that another implementation can give
    the same bits: butterflies (a, b) -> (a + b, a - b) over channels that lie 1, 2, 4, ... apart,
    and then one multiplication by the float32 nearest to 1 / sqrt(block).

    Args:
        x: (..., head_dim); blocks have `recipe.hadamard_block` channels.

    Returns:
        float32, x's shape.
    """
    shape, block = x.shape, hadamard_block(x.shape[-1])
    x = x.float().reshape(-1, block)
    stride = 1
    while stride < block:
        pairs = x.view(x.shape[0], block // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), 2).view(x.shape)
        stride *= 2
    return (x * torch.tensor(block**-0.5, dtype=torch.float32, device=x.device)).view(shape)


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The incoherent processing of one tensor: x times `recipe.signs`, then `hadamard`.

    Args:
        x: (..., head_dim).
        seed: `Fp8Recipe.seed`.

    Returns:
        float32, x's shape.
    """
    return hadamard(x.float() * signs(x.shape[-1], seed).to(x.device))


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
