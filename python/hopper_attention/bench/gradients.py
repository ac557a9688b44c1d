"""Checks of gradients against those of attention in float64, on a sample of heads.

The gradients of a sampled KV head are computed whole, with all of its query heads: every query adds
to a key's gradient, so that rows alone would not do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.bench.accuracy import ERROR_FACTOR, ERROR_SLACK
from hopper_attention.bench.backward import Gradients
from hopper_attention.bench.shapes import Shape
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.standard import standard_attention

NAMES = ("dq", "dk", "dv")
SAMPLE_KV_HEADS = 2
SAMPLE_BATCHES = 2
_MAX_SCORES = 1 << 27  # of float64 held at a time, a few times over: 1 GiB each

GRADIENTS_NOTE = (
    "backward suites: tflops counts 2.5 times the forward pass's operations. rmse: against the "
    "gradients of attention in float64 of the same 16-bit inputs, over dQ, dK and dV together: all "
    f"rows of at most {SAMPLE_KV_HEADS} random KV heads, with all of their query heads, of at most "
    f"{SAMPLE_BATCHES} random sequences. In suite backward-rmse over all heads, for each part (dq, "
    "dk, dv) by itself; Q, K and V are of the distribution, dO is of N(0, 1)"
)

Place = tuple[int, int]  # a sequence and a KV head of it


@dataclass(frozen=True)
class ExpectedGradients:
    """What the sample of a shape's gradients should be.

    Attributes:
        shape: The problem.
        exact: dQ, dK and dV of each sampled place, in float64, as `at_place` cuts them out.
        allowed: The largest error that a contestant may have in dQ, dK and dV.
    """

    shape: Shape
    exact: dict[Place, Gradients]
    allowed: tuple[float, ...]


@dataclass(frozen=True)
class GradientErrors:
    """How far gradients are from the exact ones.

    Attributes:
        rmse: Over dQ, dK and dV together.
        largest: In each of dQ, dK and dV.
    """

    rmse: float
    largest: tuple[float, ...]


def at_place(shape: Shape, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
    """Cuts one KV head and its query heads out of tensors of a problem.

    Args:
        shape: The problem.
        tensors: (batch, seqlen, heads or heads_kv, d) each.
        place: The sequence, and the KV head.

    Returns:
        (seqlen, heads / heads_kv, d) of tensors with the query heads, (seqlen, 1, d) of the others.
    """
    batch, head_kv = place
    group = shape.heads // shape.heads_kv
    parts = []
    for x in tensors:
        heads = group if x.shape[2] == shape.heads else 1
        parts.append(x[batch, :, head_kv * heads : (head_kv + 1) * heads])
    return parts


def exact(shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Gradients:
    """The gradients of one KV head in float64.

    With P = softmax(S), masked, and S = q k^T / sqrt(head_dim): dV = P^T dO, dP = dO V^T,
    dS = P * (dP - rowsum(P * dP)), dQ = dS K / sqrt(head_dim), dK = dS^T Q / sqrt(head_dim).

    Args:
        shape: The problem that the head is of.
        q: (seqlen_q, group, head_dim), the query heads that share the KV head.
        k: (seqlen_k, 1, head_dim)
        v: (seqlen_k, 1, head_dim_v)
        dout: (seqlen_q, group, head_dim_v)

    Returns:
        dQ, dK and dV in the shapes of q, k and v.
    """
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    scale = shape.head_dim**-0.5
    step = max(1, _MAX_SCORES // max(1, shape.seqlen_k))
    for first in range(0, shape.seqlen_q, step):
        rows = slice(first, min(first + step, shape.seqlen_q))
        hidden, keys = _hidden(shape, rows, q.device)
        key, value = k[keys, 0], v[keys, 0]
        for head in range(q.shape[1]):
            query, grad = q[rows, head], dout[rows, head]
            weights = query @ key.T * scale
            if hidden is not None:
                weights.masked_fill_(hidden, -math.inf)
            weights = torch.softmax(weights, dim=1)
            if hidden is not None:
                weights.masked_fill_(hidden, 0.0)  # rows without keys
            dv[keys, 0] += weights.T @ grad
            slope = grad @ value.T
            slope -= (weights * slope).sum(dim=1, keepdim=True)
            slope *= weights
            slope *= scale
            dq[rows, head] = slope @ key
            dk[keys, 0] += slope.T @ query
    return dq, dk, dv


def _hidden(shape: Shape, rows: slice, device: torch.device) -> tuple[Tensor | None, slice]:
    """Which of the keys that any row sees each row does not: (rows, keys), and these keys."""
    if shape.mask == "full":
        return None, slice(0, shape.seqlen_k)
    keys = slice(shape.visible_keys(rows.start)[0], shape.visible_keys(rows.stop - 1)[1])
    offset = shape.seqlen_k - shape.seqlen_q - keys.start
    positions = torch.arange(rows.start, rows.stop, device=device) + offset
    left, right = shape.window[0], 0 if shape.causal else shape.window[1]
    return ~reference.visible(positions, keys.stop - keys.start, left, right), keys


def standard(shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Gradients:
    """The gradients of one KV head as PyTorch finds them step by step in the inputs' dtype.

    Arguments and results are as those of `exact`. One query head at a time: what is summed over the
    group is rounded for each of them and once more in the end.
    """
    of_queries, of_keys, of_values = [], [], []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        query, key, value = (x[None].detach().requires_grad_() for x in (q[:, one], k, v))
        with torch.enable_grad():
            out = standard_attention(
                AttentionInputs(
                    query,
                    key,
                    value,
                    softmax_scale=shape.head_dim**-0.5,
                    causal=shape.causal,
                    window_size=shape.window,
                )
            )
        dq, dk, dv = torch.autograd.grad(out, (query, key, value), dout[None, :, one])
        of_queries.append(dq[0])
        of_keys.append(dk[0])
        of_values.append(dv[0])
    sums = (torch.stack(x).float().sum(0).to(q.dtype) for x in (of_keys, of_values))
    dk, dv = sums
    return torch.cat(of_queries, dim=1), dk, dv


def draw_places(shape: Shape, seed: int = 0) -> list[Place]:
    """Draws the KV heads that are checked."""
    generator = torch.Generator().manual_seed(seed)

    def some(total: int, count: int) -> list[int]:
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())

    batches, heads = some(shape.batch, SAMPLE_BATCHES), some(shape.heads_kv, SAMPLE_KV_HEADS)
    return [(batch, head) for batch in batches for head in heads]


def expect(shape: Shape, inputs: Sequence[Tensor], seed: int = 0) -> ExpectedGradients:
    """Computes what a sample of the gradients should be, and how much error is allowed.

    Args:
        shape: The problem.
        inputs: q, k, v and dout, (batch, seqlen, heads, d) each.
        seed: Chooses the heads.
    """
    truths: dict[Place, Gradients] = {}
    largest = [0.0] * len(NAMES)
    for place in draw_places(shape, seed):
        q, k, v, dout = at_place(shape, inputs, place)
        truths[place] = exact(shape, q, k, v, dout)
        usual = standard(shape, q, k, v, dout)
        for i, (rounded, truth) in enumerate(zip(usual, truths[place], strict=True)):
            largest[i] = max(largest[i], _largest(rounded, truth))
    return ExpectedGradients(
        shape, truths, tuple(ERROR_FACTOR * error + ERROR_SLACK for error in largest)
    )


def compare(found: Gradients, expected: ExpectedGradients) -> GradientErrors:
    """Measures the errors of gradients on the sample.

    Args:
        found: dQ, dK and dV, (batch, seqlen, heads, d) each.
        expected: What the sample should be.

    Returns:
        The errors; infinite where the sample holds NaN.
    """
    squares, count = 0.0, 0
    largest = [0.0] * len(NAMES)
    for place, truth in expected.exact.items():
        parts = at_place(expected.shape, found, place)
        for i, (part, of_part) in enumerate(zip(parts, truth, strict=True)):
            squares += (part.double() - of_part).square().sum().item()
            count += of_part.numel()
            largest[i] = max(largest[i], _largest(part, of_part))
    if not math.isfinite(squares):
        return GradientErrors(math.inf, (math.inf,) * len(NAMES))
    return GradientErrors(math.sqrt(squares / max(count, 1)), tuple(largest))


def wrong(errors: GradientErrors, expected: ExpectedGradients) -> str | None:
    """Says what is wrong with gradients, or None when their errors are as allowed."""
    for name, error, allowed in zip(NAMES, errors.largest, expected.allowed, strict=True):
        if not error <= allowed:
            return (
                f"wrong {name}: error up to {error:.3g} against float64, allowed is {allowed:.3g} "
                "(twice that of plain attention in the same precision)"
            )
    return None


def _largest(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item() if truth.numel() else 0.0
