"""What the forward kernels compute, on the CPU: the same blocks, order and roundings.

A query block of tile_m rows visits key blocks of tile_n keys from right to left and keeps for each
row a reference m, the sum l and the unnormalised output O, all in float32 (the online softmax of
"FlashAttention", arXiv:2205.14135, with the base 2 of "FlashAttention-2", arXiv:2307.08691):

    S = q k^T                                 products of 16-bit elements summed in float32
    m' = max(m, rowmax(S))
    alpha = exp2(c (m - m'))
    P = exp2(c S - c m')                      one fused multiply-add; c = softmax_scale log2(e)
    l = alpha l + rowsum(P)                   P before it is rounded
    O = alpha O + round(P) v                  P in the inputs' dtype
    out = round(O / l), lse = ln(2) (c m + log2(l))

Where softcap is positive or softmax_scale is not, S is first replaced by
softcap tanh(S softmax_scale / softcap), or by S softmax_scale, and c is log2(e).

A head's sink joins its rows at the end: with s = log2(e) learnable_sink and m'' = max(c m, s),
O and l are multiplied by exp2(c m - m''), and l gains exp2(s - m'').
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import checks

_LOG2_E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()
_MAX_SCORES = 2**23  # of float32 held at a time, a few times over: 32 MiB each


@dataclass(frozen=True)
class Arithmetic:
    """How a kernel rounds; scores, sums and accumulators are float32.

    Attributes:
        probabilities: P's dtype as the second product reads it.
        output: the result's dtype.
    """

    probabilities: torch.dtype
    output: torch.dtype


# By the dtype of q, k and v. A further kind of kernel is a further row here.
ARITHMETIC = {dtype: Arithmetic(dtype, dtype) for dtype in (torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Mask:
    """Query row i, at key i + seqlen_k - seqlen_q, sees `left` keys before it and `right` after.

    A side that reaches the end of the keys from every row is unbounded: None.
    """

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None

    @classmethod
    def make(cls, seqlen_q: int, seqlen_k: int, causal: bool, left: int, right: int) -> Mask:
        """From arguments where -1 is unbounded and causal overrides right by 0."""
        right = 0 if causal else right
        return cls(
            seqlen_q,
            seqlen_k,
            None if left < 0 or left >= seqlen_k - 1 else left,
            None if right < 0 or right >= seqlen_q - 1 else right,
        )

    @property
    def full(self) -> bool:
        """Whether every row sees every key."""
        return self.left is None and self.right is None

    @property
    def most_keys(self) -> int:
        """The most keys that a row sees, or a little more."""
        left = self.seqlen_k if self.left is None else self.left
        right = self.seqlen_q if self.right is None else self.right
        return min(self.seqlen_k, left + 1 + right)

    def first_key(self, row: int) -> int:
        """The first key that row sees."""
        if self.left is None:
            return 0
        return max(0, row + self.seqlen_k - self.seqlen_q - self.left)

    def end_key(self, row: int) -> int:
        """One past the last key that row sees; no key where it is not above `first_key`."""
        if self.right is None:
            return self.seqlen_k
        return min(self.seqlen_k, max(0, row + self.seqlen_k - self.seqlen_q + self.right + 1))

    def key_blocks(self, row_begin: int, row_end: int, tile_n: int) -> range:
        """The blocks of tile_n keys that some row in [row_begin, row_end) sees."""
        first, end = self.first_key(row_begin), self.end_key(row_end - 1)  # both rise with the row
        return range(first // tile_n, -(-end // tile_n)) if end > first else range(0)

    def hides_some(self, rows: range, keys: range) -> bool:
        """Whether some row does not see all of these keys."""
        return keys.start < self.first_key(rows[-1]) or keys.stop > self.end_key(rows[0])

    def hidden(self, rows: range, keys: range) -> torch.Tensor:
        """Which of the keys each row does not see: bool (rows, keys)."""
        offset = self.seqlen_k - self.seqlen_q
        positions = torch.arange(rows.start, rows.stop)[:, None] + offset
        distance = torch.arange(keys.start, keys.stop) - positions
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            hidden |= distance < -self.left
        if self.right is not None:
            hidden |= distance > self.right
        return hidden


@dataclass(frozen=True)
class ScoreTransform:
    """How scores become exponents: P = exp2(multiplier * (S' - reference)), all in float32.

    Attributes:
        multiplier: c.
        inner_scale: S' = softcap * tanh(S * inner_scale), or S * inner_scale without a softcap;
            None where S' = S.
        softcap: 0 is off.
    """

    multiplier: float
    inner_scale: float | None
    softcap: float

    @classmethod
    def make(cls, softmax_scale: float, softcap: float) -> ScoreTransform:
        """From the caller's arguments. A maximum of S is one of c S only where c is positive."""
        if softcap > 0:
            return cls(_LOG2_E, softmax_scale / softcap, softcap)
        if softmax_scale <= 0:
            return cls(_LOG2_E, softmax_scale, 0.0)
        return cls(_float32(softmax_scale * _LOG2_E), None, 0.0)

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """S' of S."""
        if self.inner_scale is None:
            return scores
        scores = scores * self.inner_scale
        return torch.tanh(scores).mul_(self.softcap) if self.softcap > 0 else scores


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    tile: tuple[int, int] | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the kernel's roundings, on the CPU.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16, on the CPU.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads.
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        softmax_scale: factor of q k^T; None is head_dim ** -0.5.
        causal: row i sees keys up to its position; overrides window_size[1] by 0.
        window_size: (left, right), the keys seen before and after a row's position; -1 or None is
            unbounded.
        softcap: where positive, scores become softcap * tanh(scores / softcap).
        tile: (tile_m, tile_n), query rows and keys of a block; None is the kernel's own,
            `kernel_tile`.
        learnable_sink: (heads,) float32, as in `flash_attn_func`.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in q's dtype and lse (batch, heads, seqlen_q) in
        float32. A row that sees no key has out 0 and its sink, or -inf, as lse.

    Raises:
        ValueError: a shape, device or number is not allowed.
        TypeError: a type or dtype is not allowed.
        RuntimeError: tile is None, and the kernels' tiles were not written when this was installed.
    """
    checks.tensors(q=q, k=k, v=v)
    dims = checks.attention_dims(q, k, v)
    batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v = dims
    if q.device.type != "cpu":
        raise ValueError(f"q, k and v must be on the CPU to be emulated, got {q.device}")
    if q.dtype not in ARITHMETIC:
        allowed = " or ".join(str(dtype) for dtype in ARITHMETIC)
        raise TypeError(f"q, k and v must be {allowed} to be emulated, got {q.dtype}")
    scale = checks.default_scale(q) if softmax_scale is None else softmax_scale
    left, right = checks.window(window_size)
    checks.scalars(scale, left, right, softcap, sm_margin=0)
    mask = Mask.make(seqlen_q, seqlen_k, causal, left, right)
    if tile is None:
        masked = not mask.full or softcap > 0 or scale <= 0
        most = mask.most_keys
        tile = kernel_tile(q.dtype, head_dim, head_dim_v, seqlen_k, masked=masked, row_keys=most)
    elif len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile must be (tile_m, tile_n), both 1 or more, got {tile}")

    if learnable_sink is None:
        sinks = torch.full((heads,), -torch.inf)
    else:
        checks.sink(learnable_sink, heads, q.device)
        sinks = learnable_sink.detach()

    q_dtype = q.dtype
    group = heads // heads_kv if heads_kv else 0
    # (batch * heads_kv, group, seq, dim), so that one K and V serve the group
    q = q.transpose(1, 2).reshape(batch * heads_kv, group, seqlen_q, head_dim).float()
    k = k.transpose(1, 2).reshape(batch * heads_kv, 1, seqlen_k, head_dim).float()
    v = v.transpose(1, 2).reshape(batch * heads_kv, 1, seqlen_k, head_dim_v).float()
    arithmetic = ARITHMETIC[q_dtype]
    out = torch.empty(*q.shape[:3], head_dim_v, dtype=arithmetic.output)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    transform = ScoreTransform.make(scale, softcap)
    sinks = sinks.reshape(heads_kv, group, 1, 1).repeat(batch, 1, 1, 1)
    at_once = max(1, _MAX_SCORES // max(1, group * seqlen_q * tile[1]))
    for begin in range(0, q.shape[0], at_once):
        part = slice(begin, begin + at_once)
        out[part], lse[part] = _attend(
            q[part], k[part], v[part], mask, transform, arithmetic, tile, sinks[part]
        )
    out = out.reshape(batch, heads, seqlen_q, head_dim_v).transpose(1, 2).contiguous()
    return out, lse.reshape(batch, heads, seqlen_q)


def kernel_tile(
    dtype: torch.dtype | str,
    head_dim: int,
    head_dim_v: int,
    seqlen_k: int,
    *,
    masked: bool,
    row_keys: int | None = None,
) -> tuple[int, int]:
    """(tile_m, tile_n) of the kernel that runs these head dimensions: the smallest that holds them.

    Args:
        dtype: torch.float16, torch.bfloat16, or a kernel's name for its dtype.
        head_dim: of q and k.
        head_dim_v: of v.
        seqlen_k: keys. Some kernels without a mask leave problems with few keys to the masked one.
        masked: a kernel for masks, soft caps and scales that are not positive.
        row_keys: the most keys that a row sees; None is seqlen_k. Few may mean narrower blocks.

    Raises:
        ValueError: no kernel holds them.
        RuntimeError: the kernels' tiles were not written when this was installed.
    """
    row = kernel_row(dtype, head_dim, head_dim_v, seqlen_k, masked=masked, row_keys=row_keys)
    return row["tile_m"], row["tile_n"]


def kernel_row(
    dtype: torch.dtype | str,
    head_dim: int,
    head_dim_v: int,
    seqlen_k: int,
    *,
    masked: bool,
    packed: bool = False,
    row_keys: int | None = None,
) -> dict[str, Any]:
    """The row of tiles.json that `kernel_tile` finds; with `packed` that of packed batches."""
    row_keys = seqlen_k if row_keys is None else row_keys
    kinds = ("packed",) if packed else ("short", "masked") if masked else ("full",)
    rows = [
        row
        for row in _tiles()
        if row["dtype"] == str(dtype).removeprefix("torch.")
        and row["mask"] in kinds
        and row["head_dim"] >= head_dim
        and row["head_dim_v"] >= head_dim_v
        and row_keys <= row["max_row_keys"]
    ]
    if not rows:
        raise ValueError(
            f"no kernel for {dtype} holds head dimensions {head_dim} of q and k and {head_dim_v} "
            "of v: pass tile=(tile_m, tile_n)"
        )
    row = min(rows, key=lambda row: (row["head_dim"], row["head_dim_v"], row["max_row_keys"]))
    if seqlen_k < row["min_keys"]:
        return kernel_row(dtype, head_dim, head_dim_v, seqlen_k, masked=True)
    return row


def _attend(
    q: torch.Tensor,  # (n, group, seqlen_q, head_dim)
    k: torch.Tensor,  # (n, 1, seqlen_k, head_dim)
    v: torch.Tensor,  # (n, 1, seqlen_k, head_dim_v)
    mask: Mask,
    transform: ScoreTransform,
    arithmetic: Arithmetic,
    tile: tuple[int, int],
    sink: torch.Tensor | float = -math.inf,  # (n, group, 1, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    multiplier = transform.multiplier
    reference = torch.full((*q.shape[:3], 1), -torch.inf)
    row_sum = torch.zeros_like(reference)
    total = torch.zeros(*q.shape[:3], v.shape[3])
    for rows, keys in tile_steps(mask, tile):
        mine = (..., slice(rows.start, rows.stop), slice(None))
        theirs = (..., slice(keys.start, keys.stop), slice(None))
        scores = transform.apply(q[mine] @ k[theirs].mT)
        if mask.hides_some(rows, keys):
            scores.masked_fill_(mask.hidden(rows, keys), -torch.inf)
        block_max, old = scores.amax(3, keepdim=True), reference[mine]
        moved = block_max > old
        new = torch.where(moved, block_max, old)
        alpha = torch.where(moved, torch.exp2((old - new) * multiplier), 1.0)
        # A row that has seen no key yet has only scores of -inf, whatever is subtracted.
        shift = new.masked_fill(new == -torch.inf, 0.0) * multiplier
        probabilities = torch.exp2(_multiply_subtract(scores, multiplier, shift))
        row_sum[mine] = row_sum[mine] * alpha + probabilities.sum(3, keepdim=True)
        product = probabilities.to(arithmetic.probabilities).float() @ v[theirs]
        total[mine] = total[mine] * alpha + product
        reference[mine] = new
    weight, lse = finish_rows(row_sum, reference * multiplier, sink)
    return (total * weight).to(arithmetic.output), lse.squeeze(3)


def finish_rows(
    row_sum: torch.Tensor, shift: torch.Tensor, sink: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends rows whose P, exp2(exponent - shift), sum to row_sum, in float32.

    Args:
        row_sum: of each row.
        shift: likewise; -inf where the row has seen no key.
        sink: each row's sink, -inf for none, in any shape that fits.

    Returns:
        What O is to be multiplied by, and the log-sum-exp.
    """
    empty = row_sum == 0
    sink_log2 = sink * _LOG2_E
    ahead = shift - sink_log2
    below = ahead < 0
    weight = torch.exp2(ahead.masked_fill(~below, 0.0))
    row_sum = row_sum * weight + torch.exp2(-ahead.masked_fill(below, 0.0))
    lse = (torch.where(below, sink_log2, shift) + row_sum.log2()) * math.log(2)
    return (weight / row_sum).masked_fill(empty, 0.0), torch.where(empty, sink, lse)


def tile_steps(mask: Mask, tile: tuple[int, int]) -> Iterator[tuple[range, range]]:
    """Key blocks from right to left, each with the rows of the query blocks that visit it.

    Every row meets its blocks in the kernel's order, and all rows that share a block do so at once:
    they are neighbours, since both ends of what a block sees rise with the row.
    """
    tile_m, tile_n = tile
    row_blocks = [
        range(begin, min(begin + tile_m, mask.seqlen_q))
        for begin in range(0, mask.seqlen_q, tile_m)
    ]
    visits = [mask.key_blocks(rows.start, rows.stop, tile_n) for rows in row_blocks]
    for n_block in reversed(range(-(-mask.seqlen_k // tile_n))):
        visitors = [
            rows for rows, blocks in zip(row_blocks, visits, strict=True) if n_block in blocks
        ]
        if visitors:
            keys = range(n_block * tile_n, min((n_block + 1) * tile_n, mask.seqlen_k))
            yield range(visitors[0].start, visitors[-1].stop), keys


def _multiply_subtract(x: torch.Tensor, factor: float, y: torch.Tensor) -> torch.Tensor:
    """Rounds x * factor - y once, as a fused multiply-add does: doubles hold the product."""
    return x.double().mul_(factor).sub_(y).float()


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@cache
def _tiles() -> list[dict[str, Any]]:
    import hopper_attention

    for directory in hopper_attention.__path__:  # an editable install has two
        path = Path(directory) / "tiles.json"
        if path.is_file():
            tiles: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            return tiles
    raise RuntimeError(
        "the kernels' tiles are unknown: hopper_attention's tiles.json is written when the package "
        "is built; install it, or pass tile=(tile_m, tile_n)"
    )
