"""The problems that the suites time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

TOKENS = 16_384  # batch x length of every shape of the forward suite
HIDDEN_SIZE = 2_048  # heads x head_dim of the forward suite
LENGTHS = (512, 1_024, 2_048, 4_096, 8_192, 16_384)
HEAD_DIMS = (64, 128, 256)
UNIFORM_QUERIES = 128  # of uniform attention, whose rows are all alike

BACKWARD_SUITES = ("backward", "backward-shapes", "backward-rmse")
FP8_SUITES = ("fp8", "quantize", "fp8-accuracy")
SUITES = ("forward", "forward-shapes", "host", "rmse", *BACKWARD_SUITES, "varlen", *FP8_SUITES)
# The forward pass has two matrix products, the backward pass five.
BACKWARD_FACTOR = 2.5
FP8 = "float8_e4m3fn"

# Layouts of packed batches: the sequences end to end in one tensor, (tokens, heads, head_dim), all
# of one length, or of lognormal lengths.
PACKED = "packed"
LOGNORMAL = "packed lognormal"
LOGNORMAL_TOKENS = 29_534

_SHORT_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    FP8: "e4m3",
    FP8 + "_fast": "e4m3 fast",
}


@dataclass(frozen=True)
class Shape:
    """One attention problem.

    Attributes:
        dtype: Name of the torch dtype of q, k, v and the output, "bfloat16" or "float16"; or of q,
            k and v alone, "float8_e4m3fn", where they are made from bfloat16 and the output is
            bfloat16.
        head_dim: Columns of q and k.
        head_dim_v: Columns of v and the output.
        batch: Sequences.
        seqlen_q: Queries of each sequence; of lognormal lengths the longest.
        seqlen_k: Keys of each sequence.
        heads: Query heads.
        heads_kv: Key and value heads; divides heads.
        causal: Whether query i sees no key after i + seqlen_k - seqlen_q.
        window: Keys seen to the left and to the right of that position; -1 is unbounded.
        layout: Order of the tensors' axes in memory, "bshd", or a packed batch's, "packed" or
            "packed lognormal".
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    causal: bool
    window: tuple[int, int] = (-1, -1)
    layout: str = "bshd"

    @property
    def label(self) -> str:
        """The shape in one line, for tables, messages and the ``--only`` filter."""
        dims = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"x{self.head_dim_v}"
        lengths = f"s{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths += f"x{self.seqlen_k}"
        heads = f"h{self.heads}"
        if self.heads_kv != self.heads:
            heads += f"/{self.heads_kv}"
        parts = [short_dtype(self.dtype), dims, self.mask, f"b{self.batch}", lengths, heads]
        return " ".join(parts if self.layout == "bshd" else [*parts, self.layout])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        if self.layout == LOGNORMAL:
            return lognormal_lengths(self.batch)
        return (self.seqlen_q,) * self.batch

    @property
    def input_dtype(self) -> str:
        """Name of the dtype of the tensors that are drawn."""
        return "bfloat16" if self.dtype == FP8 else self.dtype

    @property
    def mask(self) -> str:
        """Name of the mask: "full", "causal", or the window's bounds."""
        if self.window != (-1, -1):
            left, right = self.window[0], 0 if self.causal else self.window[1]
            return f"window({left},{right})"
        return "causal" if self.causal else "full"

    def visible_keys(self, row: int) -> tuple[int, int]:
        """Finds the keys that a query row sees.

        Args:
            row: Index of the query.

        Returns:
            The first key and one past the last; equal when it sees none.
        """
        left, right = self.window[0], 0 if self.causal else self.window[1]
        position = row + self.seqlen_k - self.seqlen_q
        begin = 0 if left < 0 else max(0, position - left)
        end = self.seqlen_k if right < 0 else min(self.seqlen_k, position + right + 1)
        return min(begin, max(end, 0)), max(end, 0)

    def sequence(self, length: int) -> Shape:
        """One sequence of the batch, of so many queries and keys, as a batch of its own."""
        return replace(self, batch=1, seqlen_q=length, seqlen_k=length, layout="bshd")

    def flops(self) -> float:
        """Counts the floating-point operations that the problem needs.

        Returns:
            ``2 b h (d + d_v)`` for each pair of a query and a key: ``s_q s_k`` pairs without a
            mask, by convention half as many with a causal one, and exactly the visible ones with a
            window.
        """
        if self.layout == LOGNORMAL:
            return sum(self.sequence(length).flops() for length in self.lengths)
        pairs: float = self.seqlen_q * self.seqlen_k
        if self.window != (-1, -1):
            bounds = map(self.visible_keys, range(self.seqlen_q))
            pairs = sum(end - begin for begin, end in bounds)
        elif self.causal:
            pairs /= 2
        return 2.0 * self.batch * self.heads * (self.head_dim + self.head_dim_v) * pairs


def short_dtype(dtype: str) -> str:
    """Abbreviates a torch dtype's name, as in "bf16"."""
    return _SHORT_DTYPES.get(dtype, dtype)


def lognormal_lengths(count: int, tokens: int = LOGNORMAL_TOKENS) -> tuple[int, ...]:
    """Lengths with a lognormal distribution, as of documents: its quantiles, short and long mixed.

    Args:
        count: How many.
        tokens: Their sum.
    """
    quantiles = [math.exp(NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [round(tokens * x / sum(quantiles)) for x in quantiles]
    lengths[-1] += tokens - sum(lengths)
    step = next(n for n in range(count // 3 + 1, 2 * count) if math.gcd(n, count) == 1)
    return tuple(lengths[i * step % count] for i in range(count))


def square(
    head_dim: int, causal: bool, length: int, dtype: str = "bfloat16", heads: int | None = None
) -> Shape:
    """Makes a shape of 16,384 tokens in sequences of one length, with heads of their own K and V.

    Args:
        head_dim: Columns of q, k and v.
        causal: Whether the mask is causal.
        length: Tokens of each sequence; divides 16,384.
        dtype: Name of the torch dtype.
        heads: Number of heads; by default as many as make the hidden size 2048.
    """
    heads = heads or HIDDEN_SIZE // head_dim
    return Shape(dtype, head_dim, head_dim, TOKENS // length, length, length, heads, heads, causal)


def _forward(quick: bool) -> list[Shape]:
    lengths = (1_024, 4_096, 16_384) if quick else LENGTHS
    return [
        square(head_dim, causal, length)
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for length in lengths
    ]


def _forward_shapes(quick: bool) -> list[Shape]:
    shapes = []
    for causal in (False, True):
        shapes += [square(d, causal, 4_096, heads=16) for d in (96, 192)]
        shapes.append(Shape("bfloat16", 192, 128, 2, 4_096, 4_096, 128, 128, causal))
        shapes.append(Shape("bfloat16", 128, 128, 2, 8_192, 8_192, 64, 8, causal))
        shapes.append(Shape("bfloat16", 128, 128, 1, 8_192, 8_192, 32, 8, causal))
    # short and long windows: the first sees one tile of keys, the second most of a long cache
    shapes.append(Shape("bfloat16", 64, 64, 2, 8_192, 8_192, 64, 8, True, (128, 0)))
    shapes.append(Shape("bfloat16", 128, 128, 1, 32_768, 32_768, 32, 8, True, (4_096, 0)))
    if quick:
        shapes = [shape for shape in shapes if shape.causal]
    lengths = (4_096,) if quick else (4_096, 16_384)
    shapes += [
        square(head_dim, causal, length, dtype="float16")
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for length in lengths
    ]
    return shapes


def _host(quick: bool) -> list[Shape]:
    del quick  # one tiny problem for each head dimension is quick already
    return [
        Shape("bfloat16", head_dim, head_dim, 1, 64, 64, 1, 1, causal)
        for head_dim in (64, 128)
        for causal in (False, True)
    ]


def _rmse(quick: bool) -> list[Shape]:
    bf16 = Shape("bfloat16", 128, 128, 2, 4_096, 4_096, 16, 16, False)
    if quick:
        bf16 = replace(bf16, batch=1, heads=4, heads_kv=4)
    return [replace(bf16, dtype="float16"), bf16]


def _backward(quick: bool) -> list[Shape]:
    return [shape for shape in _forward(quick) if shape.seqlen_q >= 1_024]


def _backward_shapes(quick: bool) -> list[Shape]:
    shapes = [s for s in _forward_shapes(False) if s.causal and s.dtype == "bfloat16"]
    return [s for s in shapes if s.window == (-1, -1)] if quick else shapes


def _backward_rmse(quick: bool) -> list[Shape]:
    kinds = [(128, False)] if quick else [(64, False), (128, False), (128, True), (256, False)]
    return [
        Shape(dtype, head_dim, head_dim, 1, 4_096, 4_096, 4, 4, causal)
        for dtype in ("float16", "bfloat16")
        for head_dim, causal in kinds
    ]


def _varlen(quick: bool) -> list[Shape]:
    def packed(head_dim: int, count: int, length: int, layout: str = PACKED) -> Shape:
        sizes = (head_dim, head_dim, count, length, length, 32, 8)
        return Shape("bfloat16", *sizes, causal=True, layout=layout)

    lognormal = packed(128, 32, max(lognormal_lengths(32)), LOGNORMAL)
    if quick:
        return [packed(128, 16, 1_024), lognormal]
    of_one_length = [(16, 1_024), (4, 4_096), (2, 8_192), (64, 256)]
    return [*(packed(128, *sizes) for sizes in of_one_length), lognormal, packed(64, 16, 1_024)]


def _fp8(quick: bool) -> list[Shape]:
    return [replace(shape, dtype=FP8) for shape in _forward(quick)]


def _quantize(quick: bool) -> list[Shape]:
    lengths = (4_096, 16_384) if quick else (1_024, 2_048, 4_096, 8_192, 16_384)
    ends = [square(128, causal, length, FP8) for causal in (False, True) for length in lengths]
    return [square(64, False, TOKENS, FP8), square(256, False, TOKENS, FP8), *ends]


def _fp8_accuracy(quick: bool) -> list[Shape]:
    large = Shape(FP8, 128, 128, 2, 4_096, 4_096, 16, 16, False)
    if quick:
        large = replace(large, batch=1, heads=4, heads_kv=4)
    longest = 16 if quick else 19
    contexts = [1 << log2 for log2 in range(12, longest + 1)]
    uniform = [
        Shape(FP8, d, d, 1, UNIFORM_QUERIES, keys, 1, 1, False)
        for d in HEAD_DIMS
        for keys in contexts
    ]
    emulated = replace(large, batch=1, seqlen_q=512, seqlen_k=512, heads=4, heads_kv=4)
    return [large, emulated, *uniform]


def suite_shapes(suite: str, quick: bool = False) -> list[Shape]:
    """Lists a suite's problems.

    Args:
        suite: One of `SUITES`.
        quick: Whether to leave out the shapes that a first look does not need.

    Raises:
        ValueError: There is no such suite.
    """
    makers = {
        "forward": _forward,
        "forward-shapes": _forward_shapes,
        "host": _host,
        "rmse": _rmse,
        "backward": _backward,
        "backward-shapes": _backward_shapes,
        "backward-rmse": _backward_rmse,
        "varlen": _varlen,
        "fp8": _fp8,
        "quantize": _quantize,
        "fp8-accuracy": _fp8_accuracy,
    }
    if suite not in makers:
        raise ValueError(f"suite is {suite!r}; allowed are {', '.join(SUITES)}")
    return makers[suite](quick)
