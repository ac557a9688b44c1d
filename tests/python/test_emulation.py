"""The CPU emulation: its blocks, its error, and where its tiles come from."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hopper_attention
from hopper_attention import emulation, reference

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half the spacing at 1
DTYPES = list(UNIT)

TILES = [
    {
        "dtype": d,
        "head_dim": qk,
        "head_dim_v": v,
        "mask": mask,
        "tile_m": m,
        "tile_n": n,
        "min_keys": keys,
        "max_row_keys": 1024 if mask == "short" else 2**30 - 1,
    }
    for d in ("float16", "bfloat16")
    for qk, v, mask, m, n, keys in (
        (256, 256, "full", 128, 80, 0),
        (192, 192, "full", 128, 112, 0),
        (192, 128, "full", 128, 128, 0),
        (128, 128, "full", 128, 176, 4097),
        (128, 128, "masked", 128, 96, 0),
        (64, 64, "full", 192, 128, 0),
        (64, 64, "masked", 192, 112, 0),
        (64, 64, "short", 192, 64, 0),
    )
]


@pytest.fixture
def tiles_file(tmp_path, monkeypatch):
    (tmp_path / "tiles.json").write_text(json.dumps(TILES))
    monkeypatch.setattr(hopper_attention, "__path__", [str(tmp_path / "absent"), str(tmp_path)])
    emulation._tiles.cache_clear()
    yield
    emulation._tiles.cache_clear()


def random_qkv(dtype, batch=1, seqlen_q=200, seqlen_k=300, heads=2, heads_kv=1, head_dim=64):
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    shapes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return tuple(
        torch.randn(batch, s, h, head_dim, generator=generator).to(dtype) for s, h in shapes
    )


def rounding_bound(q, k, v, unit, **arguments):
    """What rounding P, the output, and float32 sums can cost, for each element of the output.

    P is rounded to within a unit of itself, so the sum over |P v| bounds its part; the output is
    rounded to within a unit of itself; and scores in float32 are off by head_dim * 2^-24 of the sum
    of their absolute products, which the exponential turns into a relative error of P.
    """
    magnitude, _ = reference.attention(q, k, v.abs(), **arguments)
    largest = [x.abs().amax().item() if x.numel() else 0.0 for x in (q, k)]
    scores = q.shape[3] * 2.0**-24 * q.shape[3] * largest[0] * largest[1]
    subnormal = 2.0**-24 * (1 + v.double().abs().sum(1).amax() if v.numel() else 1)  # in float16
    return magnitude * (unit * (1 + unit) + scores) * 1.01 + magnitude * unit + subnormal


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    seqlen_q=st.integers(0, 70),
    seqlen_k=st.integers(0, 70),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 2),
    tile=st.tuples(st.sampled_from([1, 16, 48]), st.sampled_from([1, 8, 24])),
    scale=st.one_of(st.none(), st.floats(-0.5, 0.5, width=16)),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
    softcap=st.sampled_from([0.0, 1.5]),
)
def test_stays_within_the_error_of_its_roundings(
    dtype, seqlen_q, seqlen_k, heads_kv, group, tile, scale, causal, window, softcap
):
    q, k, v = random_qkv(dtype, 1, seqlen_q, seqlen_k, heads_kv * group, heads_kv, 16)
    arguments = {
        "softmax_scale": scale, "causal": causal, "window_size": window, "softcap": softcap
    }  # fmt: skip
    out, lse = emulation.attention(q, k, v, tile=tile, **arguments)
    expected, expected_lse = reference.attention(q, k, v, **arguments)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.all((out - expected).abs() <= rounding_bound(q, k, v, UNIT[dtype], **arguments))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_that_of_the_roundings(dtype, causal):
    # Independent roundings of P and of the output, each uniform: their variances add up.
    q, k, v = random_qkv(dtype, 1, 512, 512, 4, 4)
    out, _ = emulation.attention(q, k, v, causal=causal, tile=(128, 512))
    exact, lse = reference.attention(q, k, v, causal=causal)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(512, 512).triu(1).bool(), -math.inf)
    weights = torch.exp(scores - lse[..., None])
    # Rounding is relative to the power of two below: P's depends on exp(score - rowmax).
    unnormalised = torch.exp(scores - scores.amax(-1, keepdim=True))
    spacing = 2 * UNIT[dtype] * 2.0 ** torch.floor(torch.log2(unnormalised.clamp_min(2.0**-14)))
    variance = (spacing / unnormalised.clamp_min(1e-300) * weights) ** 2 / 12
    # The maximum itself is 1 and a row's only key too: exact in any format.
    variance = variance.masked_fill(unnormalised == 1.0, 0.0)
    from_p = torch.einsum("bhij,bjhd->bihd", variance.nan_to_num(0.0), v.double() ** 2)
    spacing = 2 * UNIT[dtype] * 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(2.0**-14)))
    predicted = (from_p + spacing**2 / 12).mean().sqrt()
    measured = (out - exact).pow(2).mean().sqrt()
    assert 0.9 < measured / predicted < 1.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_block_is_the_algorithm_written_out(dtype):
    q, k, v = random_qkv(dtype, 1, 20, 30, 1, 1)
    out, lse = emulation.attention(q, k, v, softmax_scale=0.125, tile=(32, 32))
    scores = q[0, :, 0].float() @ k[0, :, 0].float().T
    multiplier = 0.125 * math.log2(math.e)
    exponents = (scores - scores.amax(1, keepdim=True)).double() * multiplier
    p = torch.exp2(exponents).float()
    total = p.to(dtype).float() @ v[0, :, 0].float()
    expected = (total / p.sum(1, keepdim=True)).to(dtype)
    off = (out[0, :, 0].float() - expected.float()).abs()
    # The same roundings: equal bits, but for the few ties that float32's last bit decides.
    assert torch.all(off <= 2.1 * UNIT[dtype] * expected.float().abs())
    assert (off == 0).float().mean() > 0.97
    torch.testing.assert_close(lse[0, 0], torch.logsumexp(scores * 0.125, 1))


def test_probabilities_are_summed_before_they_are_rounded():
    # Two keys with weights 1 and exp(-0.0015): bfloat16 rounds the second to 1. With the unrounded
    # sum the two values add to more than 1; with the rounded one they would give exactly 1.
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    q[..., 0] = 1.0
    k[0, 1, 0, 0] = -0.00146484375  # exact in bfloat16
    v = torch.full((1, 2, 1, 8), 256.0, dtype=torch.bfloat16)
    total = emulation._attend(
        *(x.transpose(1, 2).float() for x in (q, k, v)),
        emulation.Mask.make(1, 2, False, -1, -1),
        emulation.ScoreTransform.make(1.0, 0.0),
        emulation.Arithmetic(torch.bfloat16, torch.float32),
        (64, 2),
    )[0]
    expected = 512.0 / (1.0 + math.exp(-0.00146484375))
    torch.testing.assert_close(total, torch.full((1, 1, 1, 8), expected), rtol=1e-6, atol=0)
    assert expected > 256.1


@pytest.mark.parametrize("score", [3.3125, 8.0])
def test_largest_probability_is_exact(score):
    # The right block's one key has score 0 and value 0, the left one's a higher score. The
    # reference follows the maximum, so the left key's P is exactly 1: rounding it costs nothing.
    q = torch.ones(1, 1, 1, 8)
    k = torch.zeros(1, 1, 2, 8)
    k[0, 0, 0, 0] = score
    v = torch.zeros(1, 1, 2, 8)
    v[0, 0, 0] = 1.0
    out, lse = emulation._attend(
        q,
        k,
        v,
        emulation.Mask.make(1, 2, False, -1, -1),
        emulation.ScoreTransform.make(1.0, 0.0),
        emulation.Arithmetic(torch.bfloat16, torch.float32),
        (64, 1),
    )
    weight = torch.tensor(score).exp()
    torch.testing.assert_close(out[0, 0, 0, 0], weight / (1 + weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse[0, 0, 0], torch.log(1 + weight), rtol=1e-6, atol=0)


def test_blocks_go_from_right_to_left():
    steps = list(emulation.tile_steps(emulation.Mask.make(100, 250, False, -1, -1), (64, 96)))
    assert steps == [
        (range(100), range(192, 250)),
        (range(100), range(96, 192)),
        (range(100), range(96)),
    ]


@settings(max_examples=200, deadline=None)
@given(
    seqlen_q=st.integers(1, 40),
    seqlen_k=st.integers(1, 40),
    causal=st.booleans(),
    left=st.integers(-1, 45),
    right=st.integers(-1, 45),
    tile=st.tuples(st.integers(1, 16), st.integers(1, 16)),
)
def test_every_visible_key_is_visited_and_every_hidden_one_masked(
    seqlen_q, seqlen_k, causal, left, right, tile
):
    mask = emulation.Mask.make(seqlen_q, seqlen_k, causal, left, right)
    positions = torch.arange(seqlen_q) + seqlen_k - seqlen_q
    seen = reference.visible(positions, seqlen_k, left, 0 if causal else right)
    assert mask.full == bool(seen.all())
    visited = torch.zeros_like(seen)
    for rows, keys in emulation.tile_steps(mask, tile):
        block = (slice(rows.start, rows.stop), slice(keys.start, keys.stop))
        assert not visited[block].any()
        visited[block] = True
        assert torch.equal(mask.hidden(rows, keys), ~seen[block])
        assert mask.hides_some(rows, keys) >= bool((~seen[block]).any())
    assert torch.all(visited >= seen)


def test_rows_that_see_no_key_are_zero():
    q, k, v = random_qkv(torch.float16, seqlen_q=100, seqlen_k=40)
    out, lse = emulation.attention(q, k, v, causal=True, tile=(32, 16))
    assert torch.all(out[:, :60] == 0)
    assert torch.all(lse[:, :, :60] == -math.inf)
    assert torch.all(torch.isfinite(lse[:, :, 60:]))


@pytest.mark.parametrize(
    "empty",
    [
        {"batch": 0},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
        {"heads": 0},
        {"heads": 0, "heads_kv": 0},
    ],
)
def test_empty_dimensions(empty):
    q, k, v = random_qkv(torch.bfloat16, **empty)
    out, lse = emulation.attention(q, k, v, tile=(64, 64))
    assert out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert torch.all(out == 0)
    assert torch.all(lse == -math.inf)


def test_nan_stays_in_its_row():
    q, k, v = random_qkv(torch.float16, seqlen_q=8, seqlen_k=20)
    q[0, 3, 0, 0] = math.nan
    out, lse = emulation.attention(q, k, v, tile=(4, 8))
    assert torch.all(torch.isnan(out[0, 3, 0]))
    assert torch.isnan(lse[0, 0, 3])
    assert torch.isnan(out).sum() == 64
    assert torch.isnan(lse).sum() == 1


def test_chunks_of_heads_change_nothing(monkeypatch):
    q, k, v = random_qkv(torch.float16, batch=2, heads=4, heads_kv=2, seqlen_q=30, seqlen_k=30)
    whole = emulation.attention(q, k, v, tile=(16, 16))
    monkeypatch.setattr(emulation, "_MAX_SCORES", 1)
    chunked = emulation.attention(q, k, v, tile=(16, 16))
    torch.testing.assert_close(chunked, whole, rtol=UNIT[torch.float16] * 2.1, atol=1e-6)


@pytest.mark.usefixtures("tiles_file")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dims, masked, tile",
    [
        ((8, 8), False, (192, 128)),
        ((64, 64), False, (192, 128)),
        ((72, 72), False, (128, 176)),
        ((128, 128), True, (128, 96)),
        ((64, 128), False, (128, 176)),
        ((192, 128), False, (128, 128)),
        ((192, 192), False, (128, 112)),
        ((136, 136), False, (128, 112)),
        ((200, 200), False, (128, 80)),
    ],
)
def test_tile_is_the_smallest_that_holds_the_head_dims(dtype, head_dims, masked, tile):
    assert emulation.kernel_tile(dtype, *head_dims, 8192, masked=masked) == tile


@pytest.mark.usefixtures("tiles_file")
@pytest.mark.parametrize(
    "arguments, masked, row_keys",
    [
        ({}, False, 30),
        ({"causal": True}, True, 30),
        ({"window_size": (3, -1)}, True, 30),
        ({"window_size": (3, 2)}, True, 6),
        ({"window_size": (3, 2), "causal": True}, True, 4),
        ({"window_size": (300, 300)}, False, 30),
        ({"softcap": 1.0}, True, 30),
        ({"softmax_scale": -1.0}, True, 30),
        ({"softmax_scale": 0.0}, True, 30),
    ],
)
def test_attention_asks_for_the_kernels_tile(monkeypatch, arguments, masked, row_keys):
    asked = []

    def kernel_tile(*args, masked, row_keys):
        asked.append((*args, masked, row_keys))
        return 64, 64

    monkeypatch.setattr(emulation, "kernel_tile", kernel_tile)
    q, k, v = random_qkv(torch.float16, seqlen_q=30, seqlen_k=30)
    emulation.attention(q, k, v, **arguments)
    assert asked == [(torch.float16, 64, 64, 30, masked, row_keys)]


@pytest.mark.usefixtures("tiles_file")
@pytest.mark.parametrize(
    "keys, row_keys, tile_n",
    [(1024, None, 64), (1025, None, 112), (9000, 1024, 64), (9000, 1025, 112)],
)
def test_rows_that_see_few_keys_run_in_the_kernel_of_narrow_blocks(keys, row_keys, tile_n):
    tile = emulation.kernel_tile(torch.float16, 64, 64, keys, masked=True, row_keys=row_keys)
    assert tile == (192, tile_n)
    assert emulation.kernel_tile(torch.float16, 64, 64, keys, masked=False) == (192, 128)


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (0, 0), (3, 2), (40, -1), (5, 9)])
@pytest.mark.parametrize("seqlens", [(1, 1), (7, 30), (30, 7), (20, 20)])
def test_most_keys_holds_every_row(left, right, seqlens):
    mask = emulation.Mask.make(*seqlens, False, left, right)
    widths = [mask.end_key(row) - mask.first_key(row) for row in range(seqlens[0])]
    assert max(widths) <= mask.most_keys <= seqlens[1]


@pytest.mark.usefixtures("tiles_file")
def test_few_keys_run_in_the_masked_kernel_where_its_tiles_are_faster():
    for keys, tile in ((4096, (128, 96)), (4097, (128, 176))):
        assert emulation.kernel_tile(torch.float16, 128, 128, keys, masked=False) == tile


@pytest.mark.usefixtures("tiles_file")
def test_no_tile_holds_the_head_dims():
    with pytest.raises(ValueError, match=r"no kernel .* holds head dimensions 264 .* pass tile="):
        emulation.kernel_tile(torch.float16, 264, 264, 128, masked=False)


def test_tiles_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(hopper_attention, "__path__", [str(tmp_path)])
    emulation._tiles.cache_clear()
    with pytest.raises(RuntimeError, match=r"tiles\.json is written when .* pass tile="):
        emulation.attention(*random_qkv(torch.float16))


@pytest.mark.parametrize("tile", [(0, 64), (64,), (64, -1)])
def test_tile_must_be_two_positive_numbers(tile):
    with pytest.raises(ValueError, match=r"tile must be \(tile_m, tile_n\)"):
        emulation.attention(*random_qkv(torch.float16), tile=tile)


def test_refuses_other_dtypes_and_devices():
    with pytest.raises(
        TypeError, match=r"must be torch\.float16 or torch\.bfloat16 .*torch\.float32"
    ):
        emulation.attention(*random_qkv(torch.float32), tile=(64, 64))
    meta = tuple(x.to("meta") for x in random_qkv(torch.float16))
    with pytest.raises(ValueError, match="must be on the CPU to be emulated, got meta"):
        emulation.attention(*meta, tile=(64, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_learnable_sink(dtype, causal):
    """Sinks far below, about and far above the scores, of a GQA head each; rows without keys."""
    q, k, v = random_qkv(dtype, batch=2, seqlen_q=150, seqlen_k=100, heads=4, heads_kv=2)
    sink = torch.tensor([-20.0, 3.0, 300.0, 0.5])
    arguments = {"causal": causal, "learnable_sink": sink}
    out, lse = emulation.attention(q, k, v, tile=(64, 32), **arguments)
    expected, expected_lse = reference.attention(q, k, v, **arguments)
    assert torch.all((out - expected).abs() <= rounding_bound(q, k, v, UNIT[dtype], **arguments))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
    if causal:
        assert out[:, :50].eq(0).all()
        assert lse[:, :, :50].eq(sink[:, None]).all()
    assert out[:, :, 2].eq(0).all()
    assert out[:, 50:, 3].ne(0).any()


def test_sink_of_minus_infinity_is_none():
    q, k, v = random_qkv(torch.bfloat16, seqlen_q=70, seqlen_k=50)
    sink = torch.full((2,), -math.inf)
    plain = emulation.attention(q, k, v, causal=True, tile=(64, 32))
    given = emulation.attention(q, k, v, causal=True, tile=(64, 32), learnable_sink=sink)
    assert all(map(torch.equal, plain, given))


def test_nan_in_a_sink_stays_in_its_head():
    q, k, v = random_qkv(torch.bfloat16, seqlen_q=70, seqlen_k=50)
    sink = torch.tensor([math.nan, 1.0])
    for x in emulation.attention(q, k, v, tile=(64, 32), learnable_sink=sink):
        head_first = x if x.dim() == 3 else x.transpose(1, 2)
        assert head_first[:, 0].isnan().all()
        assert head_first[:, 1].isfinite().all()
