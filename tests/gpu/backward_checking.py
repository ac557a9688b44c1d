"""Gradients for the GPU tests, and the comparison that they share.

The rule, for each of dQ, dK and dV against the gradient of attention in float64: the largest error
is at most twice that of the gradient of PyTorch's attention in the same precision, plus 1e-5, plus
what `last_places` and `sum_rounding` say. Queries without keys and keys without queries have
gradients of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from checking import (
    DEVICE,
    ERROR_FACTOR,
    ERROR_SLACK,
    TILES,
    Problem,
    attention,
    largest_error,
    standard_inputs,
)
from torch import Tensor

from hopper_attention import checks, reference
from hopper_attention.study.standard import standard_attention, standard_scores

if TYPE_CHECKING:
    from varlen_checking import Packed

Tensors = tuple[Tensor, Tensor, Tensor]

GRADIENTS = ("dq", "dk", "dv")
# Arguments of the kernels that exact attention has not
OF_KERNELS = ("sm_margin", "deterministic")
# Relative error of a sum over the head dimension
SUM_ROUNDING = 2.0**-22
# Rows that the workspace is padded to, at most
_LARGEST_TILE = 128


def draw(problem: Problem | Packed, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draws (q, k, v) as `Problem.inputs` or `Packed.inputs` does, and dout, all from N(0, 1)."""
    q, k, v = problem.inputs(seed)
    generator = torch.Generator(DEVICE).manual_seed(seed + 1_000_003)
    size = (*q.shape[:-1], v.shape[-1])
    return (q, k, v), torch.randn(size, device=DEVICE, dtype=q.dtype, generator=generator)


def draw_dlse(q: Tensor, seed: int = 0) -> Tensor:
    """Draws the gradient of the log-sum-exp from N(0, 1): (batch, heads, seqlen_q).

    Of a packed batch it is (heads, total_q).
    """
    generator = torch.Generator(DEVICE).manual_seed(seed + 2_000_003)
    *batch, rows, heads, _ = q.shape
    return torch.randn(*batch, heads, rows, device=DEVICE, generator=generator)


class Call:
    """A forward call that can be differentiated again and again.

    Attributes:
        leaves: q, k and v as given, in their own layout, with a gradient.
        out: (batch, seqlen_q, heads, head_dim_v)
        lse: (batch, heads, seqlen_q)
    """

    def __init__(self, inputs: Sequence[Tensor], **options: Any) -> None:
        self.leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            self.out, self.lse = attention(*self.leaves, **options)

    def gradients(self, dout: Tensor | None, dlse: Tensor | None = None) -> Tensors:
        """dQ, dK and dV, given the gradient of the output, of the log-sum-exp, or of both."""
        return differentiate(self.out, self.lse, self.leaves, dout, dlse)


def differentiate(
    out: Tensor,
    lse: Tensor | None,
    leaves: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None = None,
) -> Tensors:
    """The gradients of attention's outputs, as often as they are asked for."""
    pairs = [(out, dout), (lse, dlse)]
    given = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
    dq, dk, dv = torch.autograd.grad(
        [output for output, _ in given],
        leaves,
        [grad.to(output.dtype) for output, grad in given],
        retain_graph=True,
        materialize_grads=True,  # v has no part in the log-sum-exp
    )
    return dq, dk, dv


def gradients(
    inputs: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None = None, **options: Any
) -> Tensors:
    """The kernels' dQ, dK and dV, written to poisoned memory."""
    call = Call(inputs, **options)
    poison_gradients(*inputs)
    return call.gradients(dout, dlse)


def poison_gradients(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Leaves NaN in the memory that gradients and workspace will be allocated in, if it can."""
    batch, seqlen_q, heads, head_dim = q.shape
    rows = batch * heads * -(-seqlen_q // _LARGEST_TILE) * _LARGEST_TILE
    poisons = [torch.full(x.shape, math.nan, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    columns = tile_head_dim(head_dim) + 2
    poisons.append(torch.full((rows * columns,), math.nan, device=q.device))
    del poisons


def tile_head_dim(head_dim: int) -> int:
    """The head dimension of the kernel that q and k of this one run in."""
    return min(tile for tile, _ in TILES if tile >= head_dim)


def exact_gradients(
    inputs: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None = None, **options: Any
) -> Tensors:
    """The gradients of attention in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = reference.attention(*leaves, **options)
    return differentiate(out, lse, leaves, dout, dlse)


def usual_gradients(
    inputs: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None = None, **options: Any
) -> Tensors:
    """The gradients of PyTorch's attention, step by step in the inputs' dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        of_leaves = standard_inputs(*leaves, **options)
        out = standard_attention(of_leaves)
        lse = None if dlse is None else torch.logsumexp(standard_scores(of_leaves).float(), dim=-1)
    return differentiate(out, lse, leaves, dout, dlse)


def check(
    inputs: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None = None, **options: Any
) -> Tensors:
    """Runs the kernels on poisoned memory and compares with float64; returns the gradients."""
    found = gradients(inputs, dout, dlse, **options)
    compare(found, inputs, dout, dlse, **options)
    return found


def check_problem(problem: Problem, **options: Any) -> Tensors:
    """`check` of a problem's random inputs."""
    inputs, dout = draw(problem)
    return check(inputs, dout, **options)


def compare(
    found: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> None:
    """Asserts the rule for gradients that are there already."""
    of_attention = {name: x for name, x in options.items() if name not in OF_KERNELS}
    exact = exact_gradients(inputs, dout, dlse, **of_attention)
    usual = usual_gradients(inputs, dout, dlse, **of_attention)
    rounding = sum_rounding(inputs, dout, **of_attention)
    shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip("qkv", inputs, strict=True))
    what = f"{shapes}, {inputs[0].dtype}, {options}"
    apply_rule(found, exact, usual, inputs, rounding, what)
    check_unseen(found, inputs, what, **of_attention)


def apply_rule(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    usual: Sequence[Tensor],
    inputs: Sequence[Tensor],
    rounding: dict[str, float],
    what: str,
) -> None:
    """Asserts the rule, from all that it compares, each for q, k and v with a batch dimension."""
    for name, grad, truth, rounded, of in zip(GRADIENTS, found, exact, usual, inputs, strict=True):
        assert (grad.shape, grad.dtype) == (of.shape, of.dtype), f"{what}: {name}"
        error = largest_error(grad, truth)
        allowed = ERROR_FACTOR * largest_error(rounded, truth) + ERROR_SLACK
        allowed += last_places(truth, of) + rounding[name]
        assert error <= allowed, (
            f"{what}: {name} is off by {error:.3g}, allowed {allowed:.3g}; "
            f"{where_wrong(grad, truth, allowed)}"
        )


def last_places(exact: Tensor, of: Tensor) -> float:
    """Twice what may be lost of a gradient in its dtype when 0.3 is added and taken away again.

    FlashAttention-3's own tests allow this, and need it (they do the sum, which may happen to lose
    nothing): PyTorch subtracts rounded dP from their own mean, so that in a row that sees a few
    keys most of its error cancels. Without this one gradient in four hundred is refused that is as
    good as the algorithm's can be.
    """
    if not exact.numel():
        return 0.0
    exponent = torch.frexp(exact.abs().max() + 0.3).exponent.item() - 1
    return math.ldexp(torch.finfo(of.dtype).eps, exponent)


def sum_rounding(inputs: Sequence[Tensor], dout: Tensor | None, **options: Any) -> dict[str, float]:
    """What sums in fp32 may be off by where a gradient is made of differences that are 0.

    dP - delta vanishes in a row that sees one key. Both are sums over the head dimension, by tensor
    cores and by FMA, good to some 2^-22 of |dO| |v|. From there it goes through dQ's product with
    K, and dK's with the Q of all rows that share a key.
    """
    q, k, v = (x.detach().float() for x in inputs)
    if dout is None or not (q.numel() and k.numel() and v.numel()):
        return dict.fromkeys(GRADIENTS, 0.0)
    scale = options.get("softmax_scale")
    scale = q.shape[3] ** -0.5 if scale is None else abs(scale)
    lengths = (dout.float().norm(dim=3).max() * v.norm(dim=3).max()).item()
    difference = SUM_ROUNDING * scale * lengths
    rows_of_a_key = q.shape[1] * q.shape[2] / min(q.shape[1], k.shape[1]) / k.shape[2]
    return {
        "dq": difference * k.abs().max().item(),
        "dk": difference * q.abs().max().item() * rows_of_a_key,
        "dv": 0.0,
    }


def check_unseen(
    found: Sequence[Tensor], inputs: Sequence[Tensor], what: str, **options: Any
) -> None:
    """Asserts that what has no part in any output has a gradient of exactly 0."""
    seqlen_q, seqlen_k = inputs[0].shape[1], inputs[1].shape[1]
    left, right = checks.window(options.get("window_size", (-1, -1)))
    right = 0 if options.get("causal", False) else right
    positions = torch.arange(seqlen_q, device=DEVICE) + seqlen_k - seqlen_q
    seen = reference.visible(positions, seqlen_k, left, right)
    assert not found[0][:, ~seen.any(1)].any(), f"{what}: dq of a query without keys is not 0"
    for name, grad in zip(GRADIENTS[1:], found[1:], strict=True):
        assert not grad[:, ~seen.any(0)].any(), f"{what}: {name} of a key not seen is not 0"


def where_wrong(grad: Tensor, exact: Tensor, allowed: float) -> str:
    """Which elements of (batch, seq, head, dim) are off by more than allowed, for a message."""
    wrong = ~((grad.double() - exact).abs() <= allowed)
    places = wrong.nonzero().tolist()
    first, last = tuple(places[0]), tuple(places[-1])
    rows = wrong.any(3).any(2).any(0)
    columns = wrong.flatten(0, 2).any(0)
    return (
        f"{len(places)} of {wrong.numel()} wrong, {int(grad.isnan().sum())} NaN, {first} to {last}"
        f", first {grad[first].item():.4g} for {exact[first].item():.4g}; "
        f"rows by 16: {_marks(rows, 16)}, columns by 8: {_marks(columns, 8)}"
    )


def _marks(wrong: Tensor, size: int) -> str:
    return "".join("x" if part.any() else "." for part in wrong.split(size)[:100])


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether gradients are the same to the bit, NaN and the sign of 0 included."""
    return all(
        torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))
        for a, b in zip(one, other, strict=True)
    )
