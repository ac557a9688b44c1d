"""The suites' problems, and what is counted for them."""

from dataclasses import replace

import pytest

from hopper_attention.bench.shapes import SUITES, Shape, square, suite_shapes

SMALL = Shape("bfloat16", 64, 64, 1, 6, 9, 2, 1, causal=True)


def test_forward_is_the_papers_sweep():
    shapes = suite_shapes("forward")
    assert len(shapes) == 36
    assert {shape.batch * shape.seqlen_q for shape in shapes} == {16_384}
    assert {shape.heads * shape.head_dim for shape in shapes} == {2_048}
    assert {shape.seqlen_q for shape in shapes} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {(shape.head_dim, shape.causal) for shape in shapes} == {
        (d, causal) for d in (64, 128, 256) for causal in (False, True)
    }
    assert {shape.dtype for shape in shapes} == {"bfloat16"}


def test_other_shapes_hold_every_kind():
    labels = " | ".join(shape.label for shape in suite_shapes("forward-shapes"))
    for part in (
        "d96 causal",
        "d192 full",
        "d192x128 causal b2 s4096 h128",
        "d128 causal b2 s8192 h64/8",
        "d128 causal b1 s8192 h32/8",
        "d64 window(128,0) b2 s8192 h64/8",
        "d128 window(4096,0) b1 s32768 h32/8",
        "fp16 d256 causal b1 s16384 h8",
    ):
        assert part in labels


@pytest.mark.parametrize("suite", SUITES)
def test_no_suite_measures_a_shape_twice(suite):
    for quick in (False, True):
        shapes = suite_shapes(suite, quick)
        assert shapes
        assert len(set(shapes)) == len(shapes)
        assert len({shape.label for shape in shapes}) == len(shapes)
        assert all(shape.heads % shape.heads_kv == 0 for shape in shapes)


def test_quick_is_a_part():
    assert set(suite_shapes("forward", quick=True)) < set(suite_shapes("forward"))
    assert set(suite_shapes("forward-shapes", True)) < set(suite_shapes("forward-shapes"))


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match="'sideways'; allowed are forward, "):
        suite_shapes("sideways")


@pytest.mark.parametrize(
    "window, causal", [((-1, -1), False), ((-1, -1), True), ((2, 1), False), ((3, -1), True)]
)
@pytest.mark.parametrize("lengths", [(6, 9), (9, 6), (5, 5), (4, 0)])
def test_visible_keys(window, causal, lengths):
    seqlen_q, seqlen_k = lengths
    shape = replace(SMALL, causal=causal, window=window, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    left, right = window[0], 0 if causal else window[1]
    for row in range(seqlen_q):
        position = row + seqlen_k - seqlen_q
        keys = [
            key
            for key in range(seqlen_k)
            if (left < 0 or key >= position - left) and (right < 0 or key <= position + right)
        ]
        assert list(range(*shape.visible_keys(row))) == keys


def test_flops():
    full = square(128, causal=False, length=4096)
    assert full.flops() == 4 * 4 * 16 * 4096**2 * 128
    assert square(128, causal=True, length=4096).flops() == full.flops() / 2
    mixed = replace(full, head_dim=192)
    assert mixed.flops() == 2 * 4 * 16 * 4096**2 * (192 + 128)
    # rows 0, 1 and 2 see 1, 2 and 3 keys, all others 3
    narrow = replace(full, causal=True, window=(2, 0))
    assert narrow.flops() == 4 * 4 * 16 * 128 * (1 + 2 + 3 * 4094)
