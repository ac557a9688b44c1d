"""Random Q, K and V: the two distributions of the FlashAttention-3 paper's error table."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import AttentionInputs

# One entry in a thousand gets an outlier drawn from N(0, 100), whose standard deviation is 10.
OUTLIER_PROBABILITY = 0.001
OUTLIER_STD = 10.0

DISTRIBUTIONS = {
    "normal": "N(0, 1)",
    "outliers": "N(0, 1) + N(0, 100) · Bernoulli(0.001)",
}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    entries = torch.randn(shape, generator=generator)
    if name == "outliers":
        chosen = torch.rand(shape, generator=generator) < OUTLIER_PROBABILITY
        entries += OUTLIER_STD * torch.randn(shape, generator=generator) * chosen
    return entries


def random_inputs(
    name: str, *, batch: int, seqlen: int, heads: int, head_dim: int, seed: int
) -> AttentionInputs:
    """Draws Q, K and V independently from one of the paper's distributions.

    The draw is made on the CPU in fp32, so that a seed gives the same numbers on every machine.

    Args:
        name: "normal" for N(0, 1), or "outliers" for N(0, 1) + N(0, 100) * Bernoulli(0.001).
        batch: number of sequences.
        seqlen: number of queries and of keys.
        heads: number of query heads and of KV heads.
        head_dim: head dimension of Q, K and V.
        seed: of the random numbers.

    Returns:
        fp32 inputs on the CPU, without a mask, with the scale head_dim ** -0.5.

    Raises:
        ValueError: for a distribution that is not known, or a size below 1.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(DISTRIBUTIONS)}")
    sizes = {"batch": batch, "seqlen": seqlen, "heads": heads, "head_dim": head_dim}
    for size_name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{size_name} is {size}; it must be at least 1")
    # The generator takes 64 bits; the distribution's place keeps the two draws independent.
    generator = torch.Generator().manual_seed(seed * len(DISTRIBUTIONS) + _place(name))
    shape = (batch, seqlen, heads, head_dim)
    query, key, value = (_draw(name, shape, generator) for _ in range(3))
    return AttentionInputs(query, key, value, softmax_scale=head_dim**-0.5)


def _place(name: str) -> int:
    return list(DISTRIBUTIONS).index(name)
