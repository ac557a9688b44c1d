"""What the FP8 forward kernels compute, on the CPU: the same tiles, scales, order and roundings.

As in `emulation.py` a query row visits tiles of keys from right to left, and keeps a reference m,
the sum l and the unnormalised output O in float32. Q, K and V are e4m3 with scales:

    S = q k^T                                          `tensor_core.py`, from zero
    X = log2(e) softmax_scale q_descale k_descale S    softcap and mask as in 16 bits
    m' = max(m, rowmax(X))
    alpha = exp2(m - m')
    P = exp2(X - m' + offset)                          so that e4m3's range is used
    P' = round to e4m3(P v_token_factor)
    l = alpha l + rowsum(P)                            in float32, P before it is rounded
    O = alpha O + P' v            accumulation "fp32": the tile's product from zero, then float32
    O = (alpha O) + P' v          accumulation "fast": the tensor core adds to O
    out = round(v_descale O / l), lse = ln(l) + (m - offset) ln(2)      with a sink as in 16 bits

Kernels with a row of ones behind V's channels (`sums_by_ones` of tiles.json: accumulation "fp32")
differ in two things. Unless V's tokens have factors, l is one more column of O:
the tensor core's sum of P'. And where a warp of 16 rows sees the whole of a tile, m follows only
when the tile's maximum is more than `slack` above m in one of the rows; then all of them follow. So
P may reach 2^(offset + slack), which e4m3 holds. Both numbers are in tiles.json, from fp8.h.

Left out: at head_dim 64 a sixteenth of the exp2 is a polynomial (`exp2_by_fma` of config.h), within
0.3%. Tried here on N(0,1), it changes the error by 0.01% of itself.

An offset and the fast accumulation are those of Shah et al., "FlashAttention-3" (arXiv:2407.08608);
the float32 sum of short products is that of "DeepSeek-V3" (arXiv:2412.19437).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from . import checks
from .emulation import Mask, finish_rows, kernel_row, tile_steps
from .recipe import E4M3_MAX, QK_BLOCK_TOKENS, Fp8Recipe
from .reference_quantizer import QuantizedParts, quantize
from .tensor_core import FRACTION_BITS, multiply_accumulate
from .v_layout import untranspose_v

_LOG2_E = math.log2(math.e)
_OUTPUTS = (torch.float16, torch.bfloat16)
_WARP_ROWS = 16
_CONSUMER_ROWS = 64  # a warpgroup's, which decide together whether a tile needs a mask


def attention(
    quantized: QuantizedParts,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: tuple[int, int] | None = None,
    fraction_bits: int | None = FRACTION_BITS,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of e4m3 tensors with the kernel's roundings, on the CPU.

    Args:
        quantized: a dense batch, or anything with `QuantizedParts`' fields; on the CPU.
        softmax_scale: factor of q k^T; None is head_dim ** -0.5.
        causal: row i sees keys up to its position; overrides window_size[1] by 0.
        window_size: (left, right), the keys seen before and after a row's position; -1 or None is
            unbounded.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        out_dtype: torch.bfloat16 or torch.float16.
        tile: (tile_m, tile_n), query rows and keys of a block; None is the kernel's own.
        fraction_bits: what the tensor core keeps, see `tensor_core.multiply_accumulate`; None sums
            in float32, which is faster and shows what the tensor core's sum costs.
        learnable_sink: (heads,) float32, as in `flash_attn_func`; not with smooth_k.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in out_dtype and lse (batch, heads, seqlen_q) in
        float32. A row that sees no key has out 0 and its sink, or -inf, as lse.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        RuntimeError: the kernels' tiles were not written when this was installed.
    """
    x, recipe = quantized, quantized.recipe
    if out_dtype not in _OUTPUTS:
        raise TypeError(f"out_dtype must be torch.bfloat16 or torch.float16, got {out_dtype}")
    for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v)):
        if tensor.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} must be torch.float8_e4m3fn, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU to be emulated, got {tensor.device}")
    v = untranspose_v(x.v, x.k.shape[1]) if recipe.transpose_v else x.v
    batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v = checks.attention_dims(
        x.q, x.k, v
    )
    scale = checks.default_scale(x.q) if softmax_scale is None else softmax_scale
    left, right = checks.window(window_size)
    checks.scalars(scale, left, right, softcap, sm_margin=0)
    if softcap > 0 and recipe.smooth_k:
        raise ValueError(
            f"softcap is {softcap}: with smooth_k it must be 0, since a softcap sees K's mean"
        )
    sinks = _sinks(learnable_sink, heads, recipe)
    mask = Mask.make(seqlen_q, seqlen_k, causal, left, right)
    transformed = softcap > 0 or scale <= 0 or "token" in (recipe.qk_scale, recipe.v_scale)
    kernel = _Kernel.find(
        recipe, max(head_dim, head_dim_v), seqlen_k, masked=transformed or not mask.full
    )
    if tile is not None:
        kernel = replace(kernel, tile=tile)
    if transformed:
        kernel = replace(kernel, slack=0.0)  # every tile is treated as one with a mask

    q, k, v = (t.float().transpose(1, 2) for t in (x.q, x.k, v))  # (batch, heads, seq, dim)
    q_descale = _per_token(x.q_descale, seqlen_q)
    k_descale = _per_token(x.k_descale, seqlen_k)
    factor = x.v_token_factor
    out = torch.zeros(batch, heads, seqlen_q, head_dim_v, dtype=out_dtype)
    lse = torch.full((batch, heads, seqlen_q), -torch.inf)
    group = heads // heads_kv if heads_kv else 1

    def compute(b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv = h // group
        head = _Head(
            q=q[b, h].contiguous(),
            k=k[b, kv].contiguous(),
            v=v[b, kv].contiguous(),
            row_factor=q_descale[b, h],
            key_factor=k_descale[b, kv],
            v_factor=None if factor is None else factor[b, kv],
            scale=scale,
            softcap=softcap,
        )
        total, row_sum, reference = _attend(head, mask, kernel, fraction_bits)
        weight, of_rows = finish_rows(row_sum, reference - kernel.offset, sinks[h])
        return (total * weight * x.v_descale[b, kv]).to(out_dtype), of_rows[:, 0]

    for place, result in enumerate(_for_each_head(compute, batch, heads)):
        b, h = divmod(place, heads)
        out[b, h], lse[b, h] = result
    if x.k_mean is not None:
        lse += _mean_scores(q * q_descale[..., None], x.k_mean, scale)
    return out.transpose(1, 2).contiguous(), lse


def attention_from_16_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    fraction_bits: int | None = FRACTION_BITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes float16 or bfloat16 tensors and attends: `reference_quantizer` and `attention`.

    Args:
        q: (batch, seqlen_q, heads, head_dim), on the CPU; its dtype is the output's.
        k: (batch, seqlen_k, heads_kv, head_dim).
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        recipe: None is `Fp8Recipe()`.
        softmax_scale: as for `attention`, like all that follow.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        fraction_bits: likewise.

    Returns:
        out in q's dtype, and lse, as `attention` returns them.
    """
    with _one_thread():
        parts = quantize(q, k, v, recipe)
    return attention(
        parts, softmax_scale, causal, window_size, softcap, q.dtype, None, fraction_bits
    )


@dataclass(frozen=True)
class _Head:
    """One query head's problem."""

    q: torch.Tensor  # (seqlen_q, head_dim)
    k: torch.Tensor  # (seqlen_k, head_dim)
    v: torch.Tensor  # (seqlen_k, head_dim_v)
    row_factor: torch.Tensor  # (seqlen_q,)
    key_factor: torch.Tensor  # (seqlen_k,)
    v_factor: torch.Tensor | None  # (seqlen_k,)
    scale: float
    softcap: float

    def exponents(self, scores: torch.Tensor, rows: slice, keys: slice) -> torch.Tensor:
        """X of S."""
        factor = self.row_factor[rows, None] * self.key_factor[keys]
        if self.softcap > 0:
            capped = torch.tanh(scores * (factor * (self.scale / self.softcap)))
            return capped * (self.softcap * _LOG2_E)
        return scores * (factor * (self.scale * _LOG2_E))


@dataclass(frozen=True)
class _Kernel:
    """What a kernel's config says about its arithmetic."""

    tile: tuple[int, int]
    fast: bool
    ones: bool
    slack: float  # 0: m always follows
    offset: int

    @classmethod
    def find(cls, recipe: Fp8Recipe, head_dim: int, seqlen_k: int, masked: bool) -> _Kernel:
        """The kernel that runs a problem.

        Args:
            recipe: how Q, K and V were quantized.
            head_dim: the larger of q's and v's: kernels have one for all.
            seqlen_k: keys.
            masked: whether there is a mask, a soft cap, a scale that is not positive, or a scale
                of a single key.
        """
        fast = recipe.accumulation == "fast"
        name = "float8_e4m3fn" + ("_fast" if fast else "")
        # The kernels without a mask take V transposed; those that accumulate fast all have one.
        general = masked or fast or not recipe.transpose_v
        row = kernel_row(name, head_dim, head_dim, seqlen_k, masked=general)
        ones = row["sums_by_ones"] and recipe.v_scale != "token"
        return cls((row["tile_m"], row["tile_n"]), fast, ones, row["slack"], row["offset"])


def _attend(
    x: _Head, mask: Mask, kernel: _Kernel, fraction_bits: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """O, l and m; l and m have a trailing dimension of 1."""
    reference = torch.full((x.q.shape[0], 1), -torch.inf)
    row_sum = torch.zeros_like(reference)
    v = torch.cat([x.v, torch.ones(x.v.shape[0], 1)], 1) if kernel.ones else x.v
    total = torch.zeros(x.q.shape[0], v.shape[1])
    for row_range, key_range in tile_steps(mask, kernel.tile):
        rows = slice(row_range.start, row_range.stop)
        keys = slice(key_range.start, key_range.stop)
        scores = x.exponents(_product(x.q[rows], x.k[keys].T, None, fraction_bits), rows, keys)
        if mask.hides_some(row_range, key_range):
            scores.masked_fill_(mask.hidden(row_range, key_range), -torch.inf)
        old, block_max = reference[rows], scores.amax(1, keepdim=True)
        new = torch.maximum(old, block_max)
        if kernel.slack > 0:
            stays = _stays(old, block_max, mask, row_range, key_range, kernel)
            new = torch.where(stays, old, new)
        # A row that has seen no key yet has only scores of -inf, whatever is subtracted.
        shift = new.masked_fill(new == -torch.inf, 0.0)
        alpha = torch.exp2(old - shift)
        probabilities = torch.exp2(scores - (shift - kernel.offset))
        if not kernel.ones:
            row_sum[rows] = row_sum[rows] * alpha + probabilities.sum(1, keepdim=True)
        if x.v_factor is not None:
            probabilities = probabilities * x.v_factor[keys]
        # Rounding X may lift P above its limit by a hair, and NaN stays NaN.
        rounded = probabilities.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).float()
        if kernel.fast:
            total[rows] = _product(rounded, v[keys], total[rows] * alpha, fraction_bits)
        else:
            product = _product(rounded, v[keys], None, fraction_bits)
            total[rows] = total[rows] * alpha + product
        reference[rows] = new
    if kernel.ones:
        return total[:, :-1], total[:, -1:], reference
    return total, row_sum, reference


def _stays(
    old: torch.Tensor,  # (rows, 1)
    block_max: torch.Tensor,
    mask: Mask,
    rows: range,
    keys: range,
    kernel: _Kernel,
) -> torch.Tensor:
    """Which rows keep their reference though a tile's maximum may be larger: (rows, 1)."""
    # The kernel compares scores as integers, whose order is right only from 0 on.
    rises = block_max.clamp_min(0.0) - kernel.slack > old
    padded = torch.zeros(-(-len(rows) // _WARP_ROWS) * _WARP_ROWS, dtype=torch.bool)
    padded[: len(rows)] = rises[:, 0]
    of_warp = padded.view(-1, _WARP_ROWS).any(1).repeat_interleave(_WARP_ROWS)[: len(rows)]
    plain = []
    for first in range(rows.start, rows.stop, _CONSUMER_ROWS):
        consumer = range(first, min(first + _CONSUMER_ROWS, rows.stop))
        plain.append(len(keys) == kernel.tile[1] and not mask.hides_some(consumer, keys))
    of_consumer = torch.tensor(plain).repeat_interleave(_CONSUMER_ROWS)[: len(rows)]
    return (of_consumer & ~of_warp)[:, None]


_Result = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def _one_thread() -> Iterator[int]:
    """PyTorch with one thread inside; gives the number outside.

    The tensors of one step are small: shared among threads they take longer, not shorter, and many
    times longer where another process has one of the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _for_each_head(compute: Callable[[int, int], _Result], batch: int, heads: int) -> list[_Result]:
    """The results of compute(b, h) for all, each computed by one of PyTorch's threads."""

    def alone(place: int) -> _Result:
        with torch.no_grad():
            return compute(*divmod(place, heads))

    with _one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, range(batch * heads)))


def _product(
    a: torch.Tensor, b: torch.Tensor, accumulator: torch.Tensor | None, fraction_bits: int | None
) -> torch.Tensor:
    if fraction_bits is None:
        return a @ b if accumulator is None else torch.addmm(accumulator, a, b)
    start = None if accumulator is None else accumulator[None]
    return multiply_accumulate(a[None], b.contiguous()[None], start, fraction_bits)[0]


def _sinks(learnable_sink: torch.Tensor | None, heads: int, recipe: Fp8Recipe) -> torch.Tensor:
    """A sink a head, -inf for none."""
    if learnable_sink is None:
        return torch.full((heads,), -torch.inf)
    checks.sink(learnable_sink, heads, torch.device("cpu"))
    if recipe.smooth_k:
        raise ValueError(
            "learnable_sink must be None with smooth_k: subtracting K's mean shifts a row's "
            "scores, but not its sink"
        )
    return learnable_sink.detach()


def _mean_scores(q: torch.Tensor, k_mean: torch.Tensor, scale: float) -> torch.Tensor:
    """What subtracting K's mean took from each row's scores: (batch, heads, seqlen_q)."""
    batch, heads = q.shape[:2]
    mean = k_mean.repeat_interleave(heads // max(1, k_mean.shape[1]), 1)
    return (q @ mean[..., None])[..., 0].mul_(scale).reshape(batch, heads, -1)


def _per_token(descale: torch.Tensor, seqlen: int) -> torch.Tensor:
    """(batch, heads, n) to (batch, heads, seqlen): n is 1, a block's or a token's."""
    n = descale.shape[2]
    if n == seqlen:
        return descale
    if n == 1:
        return descale.expand(*descale.shape[:2], seqlen)
    return descale.repeat_interleave(QK_BLOCK_TOKENS, 2)[..., :seqlen]
