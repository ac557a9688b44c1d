"""Attention in e4m3, against float64 attention of what the e4m3 tensors stand for.

What is left is the kernel's own error: P rounded to e4m3 (half a step is 2^-4 of it), sums of the
tensor cores with about 14 bits, and the output's rounding.
"""

import math

import pytest
import torch
from checking import DEVICE, Problem, heads_outside, name, poison_outputs, rmse, sequence_first

import hopper_attention
from hopper_attention import ops_fp8, reference
from hopper_attention.recipe import Fp8Recipe

FP8 = torch.float8_e4m3fn
PROBLEM = Problem(seqlen_q=200, seqlen_k=333, batch=2, heads=4, heads_kv=2)
HEAD_DIM = pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
ROUNDING = 0.08  # of P |v|, summed: 2^-4 and what the scores' own error adds
SUBNORMAL = 2.0**-16  # absolute, of P over its largest: half of e4m3's smallest over 128, twice
# A row sum of P as rounded to e4m3 is within 2^-4, for a row with very few keys.
LSE_ABSOLUTE = 6.5e-2
LSE_RELATIVE = 2e-3
LSE_RMS = 1e-2  # over many rows it averages out
RECIPES = [
    *[Fp8Recipe(qk_scale=scale) for scale in ("tensor", "head", "block", "token")],
    *[Fp8Recipe(v_scale=scale) for scale in ("tensor", "head", "token")],
    *[Fp8Recipe(v_scale=scale, transpose_v=False) for scale in ("head", "channel", "token")],
    Fp8Recipe("token", "token", hadamard=False),
    Fp8Recipe(smooth_k=True),
    Fp8Recipe(accumulation="fast"),
    Fp8Recipe(accumulation="fast", transpose_v=False),
]
V_LAYOUTS = pytest.mark.parametrize(
    "recipe", [Fp8Recipe(), Fp8Recipe(transpose_v=False)], ids=["transposed", "rows"]
)


def recipe_name(recipe):
    flags = [flag for flag in ("hadamard", "smooth_k", "transpose_v") if getattr(recipe, flag)]
    return "-".join([recipe.qk_scale, recipe.v_scale, recipe.accumulation, *flags])


def compare(out, lse, q, k, v, **options):
    """Asserts the rule; q, k and v are what the e4m3 tensors stand for."""
    exact, exact_lse = reference.attention(q, k, v, **options)
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert lse.shape == exact_lse.shape
    assert lse.dtype == torch.float32
    what = f"q {tuple(q.shape)}, k {tuple(k.shape)}, d_v {v.shape[3]}, {options}"
    magnitude = reference.attention(q, k, v.abs(), **options)[0]
    largest_v = v.abs().max().item() if v.numel() else 0.0
    allowed = ROUNDING * magnitude + SUBNORMAL * k.shape[1] * largest_v + 1e-6
    excess = ((out.double() - exact).abs() / allowed).max().item() if out.numel() else 0.0
    assert excess <= 1, f"{what}: an error of {excess:.3g} times what is allowed"
    if out.numel() > 1000:
        error, scale = rmse(out, exact), exact.square().mean().sqrt().item()
        assert error <= 0.04 * scale + 1e-5, f"{what}: RMSE {error:.3g} of {scale:.3g}"
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty), f"{what}: lse is -inf elsewhere"
    assert not out.transpose(1, 2)[empty].any(), f"{what}: a row without a key is not 0"
    lse_error = (lse.double() - exact_lse)[~empty].abs()
    lse_allowed = LSE_ABSOLUTE + LSE_RELATIVE * exact_lse[~empty].abs()
    assert (lse_error <= lse_allowed).all(), f"{what}: lse is off by {lse_error.max().item():.3g}"
    if lse_error.numel() > 100:
        relative = lse_error / (1 + exact_lse[~empty].abs() / 10)
        error = relative.square().mean().sqrt().item()
        assert error <= LSE_RMS, f"{what}: lse is off by {error:.3g} in root mean square"


def check(q, k, v, recipe=None, **options):
    recipe = recipe or Fp8Recipe()
    quantized = hopper_attention.quantize(q, k, v, recipe)
    poison_outputs(q, v)
    out, lse = hopper_attention.flash_attn_fp8_func(
        q, k, v, recipe, return_attn_probs=True, **options
    )
    assert out.dtype == q.dtype
    compare(out, lse, *quantized.dequantize(torch.float64), **options)
    poison_outputs(q, v)
    again, again_lse = hopper_attention.flash_attn_fp8_func(
        quantized, return_attn_probs=True, out_dtype=q.dtype, **options
    )
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)
    return out, lse


@HEAD_DIM
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
def test_recipes(recipe, causal, head_dim):
    q, k, v = PROBLEM.but(head_dim=head_dim).inputs()
    check(q, k + 1, v, recipe, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@V_LAYOUTS
def test_dtypes(recipe, dtype):
    check(*PROBLEM.but(dtype=dtype).inputs(), recipe)


@V_LAYOUTS
@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (72, 72), (80, 48), (192, 128), (248, 248)])
def test_head_dims_that_are_not_a_tiles(dims, recipe):
    check(*PROBLEM.but(head_dim=dims[0], head_dim_v=dims[1]).inputs(), recipe, causal=True)


@V_LAYOUTS
@HEAD_DIM
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 129), (127, 129), (128, 128), (129, 127), (64, 1), (509, 1021), (3, 4096)],
    ids=name,
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(lengths, causal, head_dim, recipe):
    problem = PROBLEM.but(seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=head_dim)
    check(*problem.inputs(), recipe, causal=causal)


@V_LAYOUTS
@pytest.mark.parametrize("lengths", [(1, 0), (200, 0), (0, 200), (0, 0)], ids=name)
def test_no_keys_or_no_queries(lengths, recipe):
    problem = PROBLEM.but(seqlen_q=lengths[0], seqlen_k=lengths[1])
    out, lse = check(*problem.inputs(), recipe)
    assert not out.any()
    assert (lse == -math.inf).all()


@V_LAYOUTS
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0, "heads_kv": 0}], ids=name)
def test_no_sequences_or_no_heads(sizes, recipe):
    q, k, v = PROBLEM.but(**sizes).inputs()
    out = hopper_attention.flash_attn_fp8_func(q, k, v, recipe)
    assert out.shape == q.shape


@V_LAYOUTS
@pytest.mark.parametrize("heads", [(8, 4), (8, 1), (6, 3), (5, 5), (1, 1)], ids=name)
def test_grouped_and_single_kv_heads(heads, recipe):
    problem = PROBLEM.but(heads=heads[0], heads_kv=heads[1])
    check(*problem.inputs(), recipe, causal=True)


@V_LAYOUTS
@HEAD_DIM
@pytest.mark.parametrize("window", [(0, 0), (50, 30), (-1, 100), (128, -1), (1, 0)], ids=name)
def test_windows(window, head_dim, recipe):
    check(*PROBLEM.but(head_dim=head_dim).inputs(), recipe, window_size=window)


@HEAD_DIM
def test_rows_that_see_no_key(head_dim):
    q, k, v = PROBLEM.but(seqlen_q=400, seqlen_k=250, head_dim=head_dim).inputs()
    check(q, k, v, causal=True)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_softcap(softcap, causal):
    check(*PROBLEM.inputs(), softcap=softcap, causal=causal)


@pytest.mark.parametrize("scale", [0.01, 0.3, -0.1, 0.0])
@pytest.mark.parametrize("qk_scale", ["head", "block", "token"])
def test_softmax_scale(scale, qk_scale):
    check(*PROBLEM.inputs(), Fp8Recipe(qk_scale), softmax_scale=scale)


@pytest.mark.parametrize("layout", [heads_outside, sequence_first], ids=["bhsd", "sbhd"])
def test_strides_of_16_bit_tensors(layout):
    q, k, v = PROBLEM.inputs()
    expected = hopper_attention.flash_attn_fp8_func(q, k, v)
    found = hopper_attention.flash_attn_fp8_func(layout(q), layout(k), layout(v))
    assert torch.equal(found, expected)


def e4m3_inputs(problem):
    return tuple(x.to(FP8) for x in problem.inputs())


def bytes_moved(tensor, move):
    return move(tensor.view(torch.uint8)).view(FP8)


@HEAD_DIM
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fa3_callers(head_dim, causal):
    """One scale for each (batch, KV head), and V in rows."""
    q, k, v = e4m3_inputs(PROBLEM.but(head_dim=head_dim))
    scales = [torch.rand(2, 2, device=DEVICE) + 0.5 for _ in range(3)]
    options = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    out, lse = hopper_attention.flash_attn_func(
        q, k, v, causal=causal, return_attn_probs=True, **options
    )
    assert out.dtype == torch.bfloat16
    per_head = [scales[0].repeat_interleave(2, 1), *scales[1:]]
    exact = [
        x.double() * scale[:, None, :, None] for x, scale in zip((q, k, v), per_head, strict=True)
    ]
    compare(out, lse, *exact, causal=causal)


def test_fa3_callers_expanded_and_absent_scales():
    q, k, v = e4m3_inputs(PROBLEM)
    one = torch.tensor(0.5, device=DEVICE).expand(2, 2)
    out, lse = hopper_attention.flash_attn_func(
        q, k, v, k_descale=one, v_descale=one, return_attn_probs=True
    )
    compare(out, lse, q.double(), k.double() / 2, v.double() / 2)


@pytest.mark.parametrize("move", [heads_outside, sequence_first], ids=["bhsd", "sbhd"])
@HEAD_DIM
def test_strides_of_e4m3_tensors(move, head_dim):
    q, k, v = e4m3_inputs(PROBLEM.but(head_dim=head_dim))
    expected = hopper_attention.flash_attn_func(q, k, v)
    assert torch.equal(
        hopper_attention.flash_attn_func(*(bytes_moved(x, move) for x in (q, k, v))), expected
    )


def test_unaligned_e4m3_tensors_are_copied():
    q, k, v = e4m3_inputs(PROBLEM)
    expected = hopper_attention.flash_attn_func(q, k, v)

    def shifted(tensor):
        around = torch.zeros(*tensor.shape[:3], tensor.shape[3] + 3, device=DEVICE).to(FP8)
        view = around[..., 1 : 1 + tensor.shape[3]]
        view.view(torch.uint8).copy_(tensor.view(torch.uint8))
        return view

    found = hopper_attention.flash_attn_func(shifted(q), shifted(k), shifted(v))
    assert torch.equal(found, expected)


@V_LAYOUTS
@HEAD_DIM
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_sequence_or_head_stays_alone(bad, head_dim, recipe):
    inputs = PROBLEM.but(head_dim=head_dim).inputs()
    clean, clean_lse = hopper_attention.flash_attn_fp8_func(*inputs, recipe, return_attn_probs=True)
    for which in range(3):
        tensors = [x.clone() for x in inputs]
        tensors[which][1, :, 1] = bad  # query head 1 reads KV head 0; KV head 1 serves 2 and 3
        out, lse = hopper_attention.flash_attn_fp8_func(*tensors, recipe, return_attn_probs=True)
        heads = [1] if which == 0 else [2, 3]
        touched = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
        touched[1, heads] = True
        assert torch.equal(out.transpose(1, 2)[~touched], clean.transpose(1, 2)[~touched])
        assert torch.equal(lse[~touched], clean_lse[~touched])
        assert not out[1, :, heads].isfinite().any()


@V_LAYOUTS
@HEAD_DIM
def test_a_bad_key_that_a_mask_hides_does_no_harm(head_dim, recipe):
    q, k, v = PROBLEM.but(seqlen_q=300, seqlen_k=300, head_dim=head_dim).inputs()
    clean = hopper_attention.flash_attn_fp8_func(q, k, v, recipe, causal=True)
    k[:, 200:] = math.nan
    found = hopper_attention.flash_attn_fp8_func(q, k, v, recipe, causal=True)
    # Scales may be others without the hidden values: within what rounding allows
    assert found[:, :200].isfinite().all()
    torch.testing.assert_close(found[:, :128], clean[:, :128], rtol=0.1, atol=0.1)
    assert found[:, 200:].isnan().all()


@V_LAYOUTS
def test_memory_behind_the_last_key_is_not_used(recipe):
    for head_dim in (64, 128, 256):
        inputs = PROBLEM.but(batch=1, head_dim=head_dim).inputs()
        x = hopper_attention.quantize(*inputs, recipe)
        clean = hopper_attention.flash_attn_fp8_func(x)
        nan = torch.full_like(x.k.view(torch.uint8), 0x7F).view(FP8)
        x.k = torch.cat([x.k.view(torch.uint8), nan.view(torch.uint8)], 1).view(FP8)[:, :333]
        if not recipe.transpose_v:
            x.v = torch.cat([x.v.view(torch.uint8), nan.view(torch.uint8)], 1).view(FP8)[:, :333]
        assert torch.equal(hopper_attention.flash_attn_fp8_func(x), clean)


@pytest.mark.parametrize("transpose_v", [True, False], ids=["transposed", "rows"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_uniform_attention_over_a_long_context(head_dim, transpose_v):
    # Where the accumulator loses its low bits, this falls to 0.16 at 131,072 keys
    keys = 131_072
    q = torch.zeros(1, 128, 1, head_dim, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, keys, 1, head_dim, device=DEVICE).bfloat16()
    v = (1 + 0.1 * torch.randn(1, keys, 1, head_dim, device=DEVICE)).bfloat16()
    recipe = Fp8Recipe(transpose_v=transpose_v)
    quantized = hopper_attention.quantize(q, k, v, recipe)
    out = hopper_attention.flash_attn_fp8_func(quantized, out_dtype=torch.float16).double()
    error = (out / v.double().mean(1, keepdim=True) - 1).mean().abs().item()
    assert error <= 2e-3, f"an error of {error:.2%}"
    # Rounding V moves single channels by up to 0.2%; the rest is the kernel's.
    stored = quantized.dequantize()[2].double().mean(1, keepdim=True)
    error = (out / stored - 1).abs().max().item()
    assert error <= 2e-3, f"an error of {error:.2%} in a channel"


def test_smoothing_gives_the_log_sum_exp_of_the_scores_themselves():
    q, k, v = PROBLEM.inputs()
    k += 5 * torch.randn(1, 1, 1, 128, device=DEVICE, dtype=k.dtype)
    _, lse = hopper_attention.flash_attn_fp8_func(
        q, k, v, Fp8Recipe(smooth_k=True), return_attn_probs=True
    )
    exact = reference.attention(q, k, v)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=0.8)


@V_LAYOUTS
def test_the_same_bits_again(recipe):
    quantized = hopper_attention.quantize(*Problem(seqlen_q=2000, seqlen_k=2000).inputs(), recipe)
    first = hopper_attention.flash_attn_fp8_func(quantized, causal=True, return_attn_probs=True)
    for sm_margin in (0, 0, 7):
        again = hopper_attention.flash_attn_fp8_func(
            quantized, causal=True, return_attn_probs=True, sm_margin=sm_margin
        )
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_opcheck():
    q, k, v = e4m3_inputs(PROBLEM)
    scales = [torch.ones(2, 2, device=DEVICE) for _ in range(3)]
    rest = (torch.bfloat16, False, False, 0.1, True, -1, -1, 0.0, 0)
    # Not test_schema: it multiplies its inputs, which PyTorch cannot do in e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (q, k, v, *scales, None, None, *rest)
    torch.library.opcheck(ops_fp8.forward_fp8, arguments, test_utils=checks)


@HEAD_DIM
@pytest.mark.parametrize(
    "recipe",
    [Fp8Recipe(v_scale="token"), Fp8Recipe("token", "token", transpose_v=False)],
    ids=recipe_name,
)
def test_rows_without_keys_where_v_is_scaled_by_token(recipe, head_dim):
    # The first 70 rows see no key, in a tile whose other rows do.
    problem = PROBLEM.but(seqlen_q=200, seqlen_k=130, head_dim=head_dim)
    out, lse = check(*problem.inputs(), recipe, causal=True)
    assert not out[:, :70].any()
    assert (lse[:, :, :70] == -math.inf).all()


def test_compile_without_a_graph_break():
    def layer(q, k, v):
        return hopper_attention.flash_attn_fp8_func(q * 2, k, v, causal=True) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = PROBLEM.inputs()
    assert torch.equal(compiled(*inputs), layer(*inputs))


def test_graphs():
    q, k, v = PROBLEM.inputs()
    hopper_attention.flash_attn_fp8_func(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hopper_attention.flash_attn_fp8_func(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, hopper_attention.flash_attn_fp8_func(q, k, v))


def test_the_emulation_agrees():
    from hopper_attention import emulation_fp8

    for recipe in (Fp8Recipe(), Fp8Recipe("token", "token"), Fp8Recipe(accumulation="fast")):
        inputs = Problem(seqlen_q=512, seqlen_k=1024, batch=1, heads=2).inputs()
        x = hopper_attention.quantize(*inputs, recipe)
        exact = reference.attention(*inputs)[0]
        found = rmse(hopper_attention.flash_attn_fp8_func(x), exact)
        emulated = rmse(emulation_fp8.attention(x.to("cpu"))[0], exact.cpu())
        assert abs(found / emulated - 1) <= 0.1, f"{recipe}: {found:.4g}, emulated {emulated:.4g}"
