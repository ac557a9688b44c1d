"""What a config changes in the emulated FP8 forward: sums by ones, and a late reference."""

import dataclasses
import math

import pytest
import torch

from hopper_attention import emulation, emulation_fp8
from hopper_attention.emulation_fp8 import attention
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.reference_quantizer import quantize

PER_TENSOR = Fp8Recipe("tensor", "tensor", hadamard=False)
FAST = Fp8Recipe(accumulation="fast")
SLACK = emulation.kernel_row("float8_e4m3fn", 64, 64, 1, masked=False)["slack"]


def first_channel(values, head_dim):
    """(1, len(values), 1, head_dim) with values in channel 0."""
    x = torch.zeros(1, len(values), 1, head_dim)
    x[0, :, 0, 0] = torch.tensor(values)
    return x


@pytest.mark.parametrize(
    "head_dim, recipe, sum_is_rounded",
    [
        (16, PER_TENSOR, True),
        (128, PER_TENSOR, True),
        (136, PER_TENSOR, True),  # P V in parts: the ones belong to the last
        (256, PER_TENSOR, True),
        (16, dataclasses.replace(PER_TENSOR, accumulation="fast"), False),
        (16, dataclasses.replace(PER_TENSOR, v_scale="token"), False),
        (256, dataclasses.replace(PER_TENSOR, v_scale="token"), False),
    ],
)
def test_probabilities_are_rounded_to_e4m3_and_so_is_their_sum_by_ones(
    head_dim, recipe, sum_is_rounded
):
    # Two keys with weights w and 1; V has the first alone.
    parts = quantize(
        first_channel([448.0], head_dim),
        first_channel([448.0, 256.0], head_dim),
        first_channel([1.0, 0.0], head_dim),
        recipe,
    )
    scale = -0.3 / (448.0 * 192.0)
    out, lse = attention(parts, softmax_scale=scale, out_dtype=torch.float16)
    weight = math.exp(-0.3)
    rounded = torch.tensor(256 * weight).to(torch.float8_e4m3fn).item() / 256
    assert abs(rounded - weight) > 5e-3
    in_sum = rounded if sum_is_rounded else weight
    assert out[0, 0, 0, 0].item() == pytest.approx(rounded / (1 + in_sum), rel=2e-3)
    larger = 448.0 * 256.0 * scale
    assert lse.item() == pytest.approx(larger + math.log(1 + in_sum), rel=1e-5)


def two_blocks(rise, rows=40, seqlen_k=256, head_dim=16, **options):
    """Row 0 has scores of `rise` in base 2 in the tile visited last, all others have 0."""
    k = torch.zeros(1, seqlen_k, 1, head_dim)
    k[0, :128, 0, 0] = 1.0
    q = torch.zeros(1, rows, 1, head_dim)
    q[0, 0, 0, 0] = 1.0
    v = torch.ones(1, seqlen_k, 1, head_dim)
    recipe = dataclasses.replace(PER_TENSOR, **options)
    return quantize(q, k, v, recipe), rise * math.log(2.0)


@pytest.mark.parametrize(
    "beyond, change, follows",
    [
        (-0.01, {}, False),
        (0.01, {}, True),
        (-0.01, {"head_dim": 192}, False),
        (0.01, {"head_dim": 256}, True),
        (-0.01, {"accumulation": "fast"}, True),
        (-0.01, {"v_scale": "token"}, True),
        (-0.01, {"qk_scale": "token"}, True),
        (-0.01, {"seqlen_k": 128 + 5}, False),  # the first tile is the short one
    ],
    ids=str,
)
def test_the_reference_follows_a_maximum_that_rises_enough(monkeypatch, beyond, change, follows):
    rise = SLACK + beyond
    seen = record_references(monkeypatch)
    parts, scale = two_blocks(rise, **change)
    attention(parts, softmax_scale=scale)
    (reference,) = seen
    assert reference[0].item() == pytest.approx(rise if follows else 0.0, abs=1e-5)
    assert (reference[1:] == 0).all()


def record_references(monkeypatch):
    """The references m after each head, (rows, 1)."""
    seen = []
    attend = emulation_fp8._attend

    def spy(*args):
        result = attend(*args)
        seen.append(result[2])
        return result

    monkeypatch.setattr(emulation_fp8, "_attend", spy)
    return seen


def test_all_rows_of_a_warp_follow_when_one_rises(monkeypatch):
    seen = record_references(monkeypatch)
    q, k, v = torch.zeros(1, 100, 1, 16), torch.zeros(1, 256, 1, 16), torch.ones(1, 256, 1, 16)
    k[0, :128, 0, 0] = 1.0
    q[0, :, 0, 0] = 0.5
    q[0, 37, 0, 0] = 1.0  # of the third warp
    attention(quantize(q, k, v, PER_TENSOR), softmax_scale=1.5 * SLACK * math.log(2.0))
    (reference,) = seen
    expected = torch.zeros(100)
    expected[32:48] = 0.5
    expected[37] = 1.0
    torch.testing.assert_close(reference[:, 0], 1.5 * SLACK * expected)


def test_the_reference_always_follows_in_tiles_with_a_mask(monkeypatch):
    seen = record_references(monkeypatch)
    q, k, v = torch.zeros(1, 256, 1, 16), torch.zeros(1, 256, 1, 16), torch.ones(1, 256, 1, 16)
    k[0, :128, 0, 0], q[0, :, 0, 0] = 0.5, 1.0
    attention(quantize(q, k, v, PER_TENSOR), softmax_scale=math.log(2.0), causal=True)
    (reference,) = seen
    # Rows 0 to 127 see keys 0 to 127 in part, the later ones all of them after a tile of zeros.
    expected = torch.tensor([0.5, 0.0]).repeat_interleave(128)
    torch.testing.assert_close(reference[:, 0], expected)


def test_the_kernel_is_the_one_that_would_run(monkeypatch):
    def row(dtype, mask, tile_n, head_dim=64, ones=False):
        return {
            "dtype": dtype,
            "mask": mask,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "tile_m": 128,
            "tile_n": tile_n,
            "min_keys": 0,
            "max_row_keys": 2**30 - 1,
            "sums_by_ones": ones,
            "slack": 0.5 if ones else 0.0,
            "offset": 7,
        }

    rows = [
        row("float8_e4m3fn", "full", 96, ones=True),
        row("float8_e4m3fn", "masked", 80, ones=True),
        row("float8_e4m3fn_fast", "masked", 128),
        row("float8_e4m3fn", "full", 64, head_dim=128),
    ]
    monkeypatch.setattr(emulation, "_tiles", lambda: rows)

    def kernel(recipe, head_dim=32, masked=False):
        found = emulation_fp8._Kernel.find(recipe, head_dim, 1000, masked)
        assert found.offset == 7
        return found.tile[1], found.fast, found.ones, found.slack

    assert kernel(Fp8Recipe()) == (96, False, True, 0.5)
    assert kernel(Fp8Recipe(), masked=True) == (80, False, True, 0.5)
    assert kernel(Fp8Recipe(v_scale="token"), masked=True) == (80, False, False, 0.5)
    assert kernel(Fp8Recipe(transpose_v=False)) == (80, False, True, 0.5)
    assert kernel(FAST) == (128, True, False, 0.0)
    assert kernel(Fp8Recipe(), head_dim=100) == (64, False, False, 0.0)
    with pytest.raises(ValueError, match="no kernel"):
        kernel(Fp8Recipe(), head_dim=200)


def test_the_tiles_of_the_kernels_say_where_ones_are():
    for row in emulation._tiles():
        ones = row["dtype"] == "float8_e4m3fn"
        assert (row["sums_by_ones"], row["slack"] > 0) == (ones, ones)
        assert (row["v_parts"] > 1) == (ones and row["head_dim"] > 128)
        assert 2 ** (row["offset"] + row["slack"]) <= 448
        assert (row["offset"] > 0) == row["dtype"].startswith("float8")
