"""How Q, K and V become FP8: `Fp8Recipe`, and what follows from it alone.

Scales for blocks of tokens and the incoherent processing (a random orthogonal rotation of Q and K,
which cancels in their product) are those of Shah et al., "FlashAttention-3" (arXiv:2407.08608,
section 3.3); the subtraction of K's mean is that of Zhang et al., "SageAttention"
(arXiv:2410.02367); folding the partial products in float32 is the remedy of "DeepSeek-V3"
(arXiv:2412.19437, section 3.3.2) for the short accumulator of Hopper's FP8 tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

QkScale = Literal["tensor", "head", "block", "token"]
VScale = Literal["tensor", "head", "channel", "token"]
Accumulation = Literal["fp32", "fast"]

QK_BLOCK_TOKENS = 128
"""Tokens that share a scale of Q or K where `Fp8Recipe.qk_scale` is "block"."""

E4M3_MAX = 448.0
"""The largest finite number of torch.float8_e4m3fn."""

_CHOICES = {"qk_scale": QkScale, "v_scale": VScale, "accumulation": Accumulation}


@dataclass(frozen=True)
class Fp8Recipe:
    """How Q, K and V are quantized to e4m3, and how their attention is accumulated.

    Attributes:
        qk_scale: what shares a scale in Q and in K: the whole tensor, a (batch, head), a block of
            `QK_BLOCK_TOKENS` tokens of one, or a token of one.
        v_scale: the same for V: the whole tensor, a (batch, head), a channel of one, or a token of
            one. A token's scale is folded into the probabilities before they are rounded.
        hadamard: rotate Q and K by random signs and then an orthonormal Walsh-Hadamard transform,
            which spreads an outlier over all channels and leaves q k^T as it is.
        seed: of the signs, see `signs`; 0 to 2**63 - 1.
        smooth_k: subtract from K its mean over the tokens of a (batch, head). That shifts all
            scores of a row by the same amount, which softmax does not see.
        accumulation: "fp32" sums the products with V of one key tile in the tensor core and the
            tiles in float32; "fast" sums them all in the tensor core, whose accumulator keeps
            about 14 bits: the error grows with the number of keys.
        transpose_v: store V transposed and its keys permuted, as the second product reads it.

    Raises:
        ValueError: a field has a value that is not allowed.
        TypeError: a field has a type that is not allowed.
    """

    qk_scale: QkScale = "block"
    v_scale: VScale = "channel"
    hadamard: bool = True
    seed: int = 0
    smooth_k: bool = False
    accumulation: Accumulation = "fp32"
    transpose_v: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(choices))
        for name in ("hadamard", "smooth_k", "transpose_v"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


def arguments(recipe: Fp8Recipe) -> tuple[str, str, bool, int, bool, bool]:
    """What the quantizer is told: all fields but accumulation."""
    return (
        *(recipe.qk_scale, recipe.v_scale, recipe.hadamard, recipe.seed, recipe.smooth_k),
        recipe.transpose_v,
    )


def signs(head_dim: int, seed: int) -> torch.Tensor:
    """The random signs that precede the Walsh-Hadamard transform, the same for Q, K and all heads.

    Args:
        head_dim: of Q and K.
        seed: `Fp8Recipe.seed`.

    Returns:
        (head_dim,) float32 on the CPU, each entry 1 or -1.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator).mul_(2).sub_(1).float()


def hadamard_block(head_dim: int) -> int:
    """Channels that one Walsh-Hadamard transform mixes: the largest power of 2 dividing head_dim.

    64, 128 and 256 are one block each; 96 is three of 32, 192 three of 64, 80 five of 16.

    Raises:
        ValueError: head_dim is not positive.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    return head_dim & -head_dim


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        quoted = ", ".join(f'"{choice}"' for choice in allowed[:-1])
        raise ValueError(f'{name} must be {quoted} or "{allowed[-1]}", got {value!r}')
