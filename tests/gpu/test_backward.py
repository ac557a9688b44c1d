"""dQ, dK and dV of every kernel and head dimension, and of every kind of scores."""

import pytest
import torch
from backward_checking import (
    Call,
    check,
    check_problem,
    draw,
    draw_dlse,
    exact_gradients,
    gradients,
    same_bits,
    usual_gradients,
)
from checking import DEVICE, DTYPES, TILES, Problem, attention, name, rmse

from hopper_attention import _library
from hopper_attention.study.distributions import random_inputs

GROUPED = Problem(seqlen_q=333, seqlen_k=461, batch=2, heads=4, heads_kv=2)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 128, 256])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 20)}], ids=name
)
ORDER = pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
PADDED = [(40, 40), (80, 80), (120, 120), (200, 200)]


@ORDER
@CAUSAL
@pytest.mark.parametrize("dims", [*TILES, *PADDED], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_kernel(dtype, dims, causal, deterministic):
    problem = GROUPED.but(head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    check_problem(problem, causal=causal, deterministic=deterministic)


def test_the_test_above_runs_all_that_is_compiled():
    tested = {
        f"backward_{dtype}_d{dims[0]}{'' if dims[0] == dims[1] else f'x{dims[1]}'}_{mask}"
        for dtype in ("fp16", "bf16")
        for dims in TILES
        for mask in ("full", "masked", "capped")  # test_softcap runs the last
    }
    # Those of packed batches are test_varlen_backward.py's.
    names = [name for name in _library.load().instances() if name.startswith("backward")]
    compiled = {name for name in names if not name.endswith("_packed")}
    assert compiled
    assert compiled <= tested


@CAUSAL
@pytest.mark.parametrize("dims", TILES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("distribution", ["normal", "outliers"])
def test_the_error_is_below_that_of_standard_attention(distribution, dtype, dims, causal):
    drawn = random_inputs(distribution, batch=1, seqlen=1024, heads=2, head_dim=dims[0], seed=1)
    drawn = drawn.to(dtype).to(torch.device(DEVICE))
    inputs = (drawn.query, drawn.key, drawn.value[..., : dims[1]])
    _, dout = draw(Problem(1024, 1024, *dims, batch=1, heads=2, dtype=dtype))
    exact = exact_gradients(inputs, dout, causal=causal)
    usual = usual_gradients(inputs, dout, causal=causal)
    found = gradients(inputs, dout, causal=causal)
    for grad, rounded, truth in zip(found, usual, exact, strict=True):
        assert rmse(grad, truth) < 0.9 * rmse(rounded, truth)  # 0.8 with the kernels' roundings


OTHER_HEAD_DIMS = [8, 16, 24, 32, 48, 56, 72, 88, 104, 112, 136, 144, 160, 168, 184, 208, 248]


@CAUSAL
@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_head_dims_that_are_not_a_tiles(head_dim, causal):
    check_problem(Problem(seqlen_q=150, seqlen_k=270, head_dim=head_dim), causal=causal)


PAIRS = [(64, 32), (64, 8), (64, 96), (64, 128), (128, 64), (96, 128), (128, 40), (136, 120)]
PAIRS += [(160, 128), (192, 64), (192, 8), (8, 128), (40, 24), (184, 104)]


@CAUSAL
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_v_with_a_head_dim_of_its_own(pair, causal):
    problem = Problem(seqlen_q=150, seqlen_k=270, head_dim=pair[0], head_dim_v=pair[1])
    check_problem(problem, causal=causal)


@CAUSAL
@HEAD_DIM
@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (8, 1), (6, 3), (5, 1), (1, 1)], ids=name)
def test_grouped_and_single_kv_heads(heads, head_dim, causal):
    problem = Problem(
        seqlen_q=257, seqlen_k=300, head_dim=head_dim, heads=heads[0], heads_kv=heads[1]
    )
    check_problem(problem, causal=causal)


@MASKS
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("softcap", [1.0, 15.0, 50.0])
def test_softcap(softcap, dtype, options):
    for dims in TILES:
        problem = Problem(
            seqlen_q=200, seqlen_k=333, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype
        )
        (q, k, v), dout = draw(problem)
        check((4 * q, k, v), dout, softcap=softcap, **options)


@MASKS
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("scale", [1e-4, 0.05, 0.125, 1.0, 3.0])
def test_scales(scale, dtype, options):
    problem = Problem(seqlen_q=200, seqlen_k=333, dtype=dtype)
    check_problem(problem, softmax_scale=scale, **options)


@MASKS
@pytest.mark.parametrize("scale", [-0.088, -1.0, -3.0])
def test_negative_scales(scale, options):
    for dims in TILES:
        problem = Problem(seqlen_q=200, seqlen_k=333, head_dim=dims[0], head_dim_v=dims[1])
        check_problem(problem, softmax_scale=scale, **options)


@MASKS
@HEAD_DIM
def test_a_scale_of_zero(head_dim, options):
    problem = Problem(seqlen_q=200, seqlen_k=333, head_dim=head_dim)
    dq, dk, dv = check_problem(problem, softmax_scale=0.0, **options)
    assert not dq.any()
    assert not dk.any()
    assert dv.any()


def test_a_scale_with_a_softcap():
    for scale in (-0.3, 0.0, 0.3):
        problem = Problem(seqlen_q=200, seqlen_k=333)
        check_problem(problem, softmax_scale=scale, softcap=5.0, causal=True)


@CAUSAL
@HEAD_DIM
def test_scores_in_the_thousands(head_dim, causal):
    (q, k, v), dout = draw(Problem(seqlen_q=200, seqlen_k=700, head_dim=head_dim))
    assert all(x.isfinite().all() for x in check((30 * q, 10 * k, v), dout, causal=causal))


@CAUSAL
@HEAD_DIM
def test_huge_scores_neither_hang_nor_leak(head_dim, causal):
    # Scores of 1e8 and more, whose rounding exceeds 1: what comes out is of no use, but the kernels
    # must end, and the next call must not notice.
    shape = (1, 2000, 1, head_dim)
    for entry in (1000.0, 60000.0):
        q = torch.full(shape, entry, dtype=torch.float16, device=DEVICE)
        for deterministic in (False, True):
            call = Call((q, q, torch.ones_like(q)), causal=causal, deterministic=deterministic)
            call.gradients(torch.ones_like(q))
        torch.cuda.synchronize()
    problem = Problem(seqlen_q=333, seqlen_k=500, head_dim=head_dim)
    check_problem(problem, causal=causal)


@MASKS
@HEAD_DIM
def test_gradients_are_linear_in_douts_powers_of_two(head_dim, options):
    inputs, dout = draw(GROUPED.but(head_dim=head_dim))
    call = Call(inputs, deterministic=True, **options)
    usual = call.gradients(dout)
    for factor in (2.0**-40, 2.0**40):
        assert same_bits(call.gradients(dout * factor), [x * factor for x in usual])


@MASKS
@pytest.mark.parametrize("dims", TILES, ids=name)
def test_the_gradient_of_the_log_sum_exp(dims, options):
    problem = GROUPED.but(head_dim=dims[0], head_dim_v=dims[1])
    inputs, dout = draw(problem)
    dlse = draw_dlse(inputs[0])
    check(inputs, dout, dlse, **options)
    _, _, dv = check(inputs, None, dlse, **options)
    assert not dv.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_the_gradient_of_the_log_sum_exp_of_all_kinds_of_scores(dtype):
    for options in (
        {"softcap": 8.0, "causal": True},
        {"softmax_scale": -0.2},
        {"softmax_scale": 0.0},
        {"deterministic": True},
    ):
        inputs, dout = draw(GROUPED.but(dtype=dtype))
        check(inputs, dout, draw_dlse(inputs[0]), **options)


@HEAD_DIM
def test_the_log_sum_exp_of_rows_that_see_no_key_has_no_gradient(head_dim):
    inputs, dout = draw(GROUPED.but(seqlen_q=300, seqlen_k=100, head_dim=head_dim))
    dlse = draw_dlse(inputs[0])
    dq, _, _ = check(inputs, dout, dlse, causal=True)
    assert not dq[:, :200].any()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_only_what_requires_a_gradient_has_one(wanted):
    inputs, dout = draw(GROUPED)
    call = Call(inputs, causal=True, deterministic=True)
    expected = dict(zip("qkv", call.gradients(dout), strict=True))
    leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in zip("qkv", inputs, strict=True)}
    with torch.enable_grad():
        out, _ = attention(*leaves.values(), causal=True, deterministic=True)
    out.backward(dout)
    for letter, leaf in leaves.items():
        assert (leaf.grad is not None) == (letter in wanted)
        assert leaf.grad is None or same_bits([leaf.grad], [expected[letter]])
