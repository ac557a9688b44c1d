"""Checks of timed outputs against attention in float64, on a sample of rows.

A sampled row is computed whole, over every key that it sees; what is sampled is which rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.bench.shapes import Shape
from hopper_attention.study.inputs import AttentionInputs
from hopper_attention.study.standard import standard_attention

SAMPLE_ROWS = 64
SAMPLE_HEADS = 4
SAMPLE_BATCHES = 2

SAMPLE_NOTE = (
    "rmse: against attention in float64 of the same 16-bit inputs. It is taken over whole rows, "
    f"each with all of its keys: at most {SAMPLE_ROWS} random queries, the first and the last "
    f"among them, of {SAMPLE_HEADS} random heads of {SAMPLE_BATCHES} random sequences, the same "
    "for every contestant; in suite rmse over all rows"
)

FP8_NOTE = (
    "suites of e4m3: rmse is against attention in float64 of what the e4m3 tensors stand for, so "
    "that it is the kernel's; in suite fp8-accuracy against that of the 16-bit tensors, so that it "
    "is everything. In suite fp8 ours quantizes by the default recipe and the peers by a scale of "
    "1, before the time is taken; fa3 is FlashAttention-3 in bf16"
)

# A contestant's largest error may be twice that of PyTorch in the same precision, plus this.
ERROR_FACTOR = 2.0
ERROR_SLACK = 1e-5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """Indices of the rows that are checked, each sorted."""

    batches: list[int]
    rows: list[int]
    heads: list[int]

    def take(self, out: Tensor) -> Tensor:
        """Picks the sample from (batch, seqlen_q, heads, d): (batches, rows, heads, d)."""
        for dim, indices in enumerate((self.batches, self.rows, self.heads)):
            out = out.index_select(dim, torch.tensor(indices, device=out.device))
        return out


@dataclass(frozen=True)
class Expected:
    """What the sample should be.

    Attributes:
        sample: Which rows.
        exact: Their values, (batches, rows, heads, head_dim_v) in float64.
        allowed: The largest error that a contestant may have.
    """

    sample: Sample
    exact: Tensor
    allowed: float


@dataclass(frozen=True)
class Errors:
    """How far an output is from the exact one."""

    rmse: float
    largest: float


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over every key in float64."""
    return reference.attention(q, k, v)[0]


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over every key as PyTorch computes it step by step in the inputs' dtype."""
    return standard_attention(AttentionInputs(q, k, v, softmax_scale=q.shape[-1] ** -0.5))


def standard_fp8(q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Attention over every key with probabilities in e4m3: what an FP8 kernel cannot avoid.

    Args:
        q: What the e4m3 tensors stand for, like k and v; float32.
        k: Likewise.
        v: Likewise.
        out_dtype: What the output is rounded to.

    Returns:
        (batch, rows, heads, head_dim_v), float32 that out_dtype holds.
    """
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2)
    key, value = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    if not key.shape[2]:
        return torch.zeros(*q.shape[:3], v.shape[3], device=q.device)
    scores = query @ key.mT * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = (weights * 256).to(torch.float8_e4m3fn).float() / 256
    out = rounded @ value / weights.sum(-1, keepdim=True)
    return out.to(out_dtype).float().transpose(1, 2)


def draw_sample(shape: Shape, seed: int) -> Sample:
    """Draws the rows of a shape to check.

    Args:
        shape: The problem; its rows are there, seqlen_q > 0.
        seed: Makes the same sample again.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(total: int, count: int) -> list[int]:
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())

    rows = set(some(shape.seqlen_q, SAMPLE_ROWS - 2)) | {0, shape.seqlen_q - 1}
    return Sample(some(shape.batch, SAMPLE_BATCHES), sorted(rows), some(shape.heads, SAMPLE_HEADS))


def sampled_attention(
    attend: Attend, shape: Shape, sample: Sample, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Computes the sample's rows by an implementation without masks.

    Args:
        attend: Attention of (batch, rows, heads, head_dim) queries over every key that it is given.
        shape: The problem.
        sample: The rows.
        q: (batch, seqlen_q, heads, head_dim)
        k: (batch, seqlen_k, heads_kv, head_dim)
        v: (batch, seqlen_k, heads_kv, head_dim_v)

    Returns:
        (batches, rows, heads, head_dim_v) in the dtype of attend.
    """
    group = shape.heads // shape.heads_kv
    everything = list(range(shape.seqlen_k))
    keys = Sample(sample.batches, everything, [head // group for head in sample.heads])
    q, k, v = sample.take(q), keys.take(k), keys.take(v)
    if shape.mask == "full":
        return attend(q, k, v)
    outputs = []
    for i, row in enumerate(sample.rows):
        begin, end = shape.visible_keys(row)
        outputs.append(attend(q[:, i : i + 1], k[:, begin:end], v[:, begin:end]))
    return torch.cat(outputs, dim=1)


def expect(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: int = 0,
    usual: Attend = standard,
) -> Expected:
    """Computes what a sample of the outputs should be, and how much error is allowed.

    Args:
        shape: The problem.
        q: (batch, seqlen_q, heads, head_dim)
        k: (batch, seqlen_k, heads_kv, head_dim)
        v: (batch, seqlen_k, heads_kv, head_dim_v)
        seed: Chooses the rows.
        usual: What the errors are measured by: a contestant's may be twice its.
    """
    sample = draw_sample(shape, seed)

    truth = sampled_attention(exact, shape, sample, q, k, v)
    rounded = sampled_attention(usual, shape, sample, q, k, v)
    largest = (rounded.double() - truth).abs().max().item()
    return Expected(sample, truth, ERROR_FACTOR * largest + ERROR_SLACK)


def compare(out: Tensor, expected: Expected) -> Errors:
    """Measures an output's errors on the sample.

    Args:
        out: (batch, seqlen_q, heads, head_dim_v)
        expected: What the sample should be.

    Returns:
        The errors; infinite where the sample holds NaN.
    """
    difference = expected.sample.take(out).double() - expected.exact
    if not difference.isfinite().all():
        return Errors(math.inf, math.inf)
    return Errors(difference.square().mean().sqrt().item(), difference.abs().max().item())


def wrong(errors: Errors, expected: Expected) -> str | None:
    """Says what is wrong with an output, or None when its errors are as allowed."""
    if errors.largest <= expected.allowed:
        return None
    return (
        f"wrong output: error up to {errors.largest:.3g} against float64, "
        f"allowed is {expected.allowed:.3g} (twice that of plain attention in the same precision)"
    )
