"""Learnable sinks: output, log-sum-exp and all gradients against float64, and the corners.

The rules are those of checking.py and backward_checking.py, with standard attention whose softmax
has the sink as a column more. The sink's own gradient is a sum over all rows of what is left of
rowsum(dO * O) in 16 bits: it may be off by a few standard deviations of those roundings.
"""

import math
import random

import backward_checking
import pytest
import test_fuzz
import torch
from backward_checking import GRADIENTS, draw, draw_dlse, last_places, same_bits, sum_rounding
from checking import (
    DEVICE,
    DTYPES,
    ERROR_FACTOR,
    ERROR_SLACK,
    LSE_ABSOLUTE,
    LSE_RELATIVE,
    LSE_SOFTCAP,
    TILES,
    Problem,
    attention,
    largest_error,
    name,
    poison_outputs,
    standard_inputs,
)

from hopper_attention import ops, ops_backward, reference
from hopper_attention.study.standard import standard_scores

GROUPED = Problem(seqlen_q=333, seqlen_k=461, batch=2, heads=4, heads_kv=2)
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
MASKS = pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 20)}], ids=name
)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half the spacing at 1
DEVIATIONS = 6
# relative, of a sum over rows of products that are fp32, with powers of 2 good to 2^-22 each
SINK_RELATIVE = 1e-5


def draw_sink(heads, seed=0):
    """Logits about as large as a row's log-sum-exp, some far below and above it."""
    generator = torch.Generator(DEVICE).manual_seed(seed + 3_000_003)
    return 4 + 4 * torch.randn(heads, device=DEVICE, generator=generator)


class Call:
    """A call with a sink, on poisoned outputs, that can be differentiated again and again."""

    def __init__(self, inputs, sink, **options):
        poison_outputs(inputs[0], inputs[2])
        self.leaves = [x.detach().requires_grad_() for x in (*inputs, sink)]
        q, k, v, sink = self.leaves
        with torch.enable_grad():
            self.out, self.lse = attention(q, k, v, learnable_sink=sink, **options)

    def gradients(self, dout, dlse=None):
        """dq, dk, dv and dsink, written to poisoned memory."""
        poison = torch.full((self.leaves[3].numel(),), math.nan, device=DEVICE)
        del poison
        backward_checking.poison_gradients(*(x.detach() for x in self.leaves[:3]))
        return differentiate((self.out, self.lse), self.leaves, dout, dlse)


def differentiate(outputs, leaves, dout, dlse):
    pairs = [
        (x, g.to(x.dtype)) for x, g in zip(outputs, (dout, dlse), strict=True) if g is not None
    ]
    return torch.autograd.grad(
        [x for x, _ in pairs],
        leaves,
        [g for _, g in pairs],
        retain_graph=True,
        materialize_grads=True,
    )


def usual_attention(q, k, v, sink, **options):
    """PyTorch's attention, step by step in the inputs' dtype, and its log-sum-exp."""
    of_call = standard_inputs(q, k, v, **options)
    scores = standard_scores(of_call).float()
    logits = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], dim=3)
    weights = torch.softmax(logits, dim=3)[..., :-1].to(q.dtype)
    values = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], dim=1)
    return (weights @ values).transpose(1, 2), torch.logsumexp(logits, dim=3)


def delta_rounding(out, dout, inputs, softmax_scale=None, **_):
    """Four deviations of what O's rounding in delta = rowsum(dO * O) does to dQ and dK.

    With a sink a row that sees one key has P below 1, so that its O is rounded, and dP - delta is
    small: there this is all of the error, and PyTorch's rounded P has no part like it.
    """
    q, k, _ = inputs
    if dout is None or not (out.numel() and k.numel()):
        return dict.fromkeys(GRADIENTS, 0.0)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    deviation = torch.finfo(out.dtype).eps / 2 / math.sqrt(3)
    delta = 4 * deviation * (dout.float() * out.float()).norm(dim=3).max().item()
    largest = {"dq": k.float().abs().max().item(), "dk": q.float().abs().max().item(), "dv": 0.0}
    return {name: scale * delta * x for name, x in largest.items()}


def check(inputs, sink, dout, dlse=None, **options):
    """Runs both passes and compares; returns out, lse and the four gradients."""
    call = Call(inputs, sink, **options)
    found = call.gradients(dout, dlse)
    of_attention = {n: x for n, x in options.items() if n not in backward_checking.OF_KERNELS}
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    exact_sink = sink.detach().clone().requires_grad_()
    usual_leaves = [x.detach().requires_grad_() for x in (*inputs, sink)]
    with torch.enable_grad():
        exact = reference.attention(*leaves, **of_attention, learnable_sink=exact_sink)
        usual = usual_attention(*usual_leaves, **of_attention)
    what = f"{[tuple(x.shape) for x in inputs]}, {inputs[0].dtype}, {options}"
    compare_outputs(what, call, exact, usual, options)
    truths = differentiate(exact, [*leaves, exact_sink], dout, dlse)
    rounded = differentiate(usual, usual_leaves, dout, dlse)
    rounding = sum_rounding(inputs, dout, **of_attention)
    of_delta = delta_rounding(call.out, dout, inputs, **of_attention)
    for i, gradient in enumerate(GRADIENTS):
        assert found[i].shape == inputs[i].shape
        assert found[i].dtype == inputs[i].dtype
        allowed = ERROR_FACTOR * largest_error(rounded[i], truths[i]) + ERROR_SLACK
        allowed += last_places(truths[i], inputs[i]) + rounding[gradient] + of_delta[gradient]
        error = largest_error(found[i], truths[i])
        assert error <= allowed, f"{what}: {gradient} is off by {error:.3g}, allowed {allowed:.3g}"
    compare_dsink(what, found[3], truths[3], inputs, sink, exact, dout, dlse, of_attention)
    return call.out, call.lse, found


def compare_outputs(what, call, exact, usual, options):
    out, lse = call.out, call.lse
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (usual[0].shape, usual[0].dtype)
    assert (lse.shape, lse.dtype) == (exact[1].shape, torch.float32)
    error = largest_error(out, exact[0])
    allowed = ERROR_FACTOR * largest_error(usual[0], exact[0]) + ERROR_SLACK
    assert error <= allowed, f"{what}: out is off by {error:.3g}, allowed {allowed:.3g}"
    lse_allowed = LSE_ABSOLUTE + LSE_RELATIVE * exact[1].abs()
    lse_allowed += LSE_SOFTCAP * options.get("softcap", 0.0)
    assert ((lse.double() - exact[1]).abs() <= lse_allowed).all(), f"{what}: lse"


def compare_dsink(what, found, truth, inputs, sink, exact, dout, dlse, options):
    """dsink is -sum of p * delta; 16 bits leave errors of O, and of P within it, in delta."""
    q, k, v = (x.double().transpose(1, 2) for x in inputs)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out, lse = (x.detach() for x in exact)
    share = torch.exp(sink.double()[:, None] - lse)
    of_lse = torch.zeros_like(lse) if dlse is None else dlse.double()
    size = (share * of_lse).abs().sum((0, 2))
    variance = torch.zeros_like(lse)
    if dout is not None:
        grad = dout.double().transpose(1, 2)
        products = grad * out.transpose(1, 2)
        wide = (x.double() for x in inputs)
        scores = standard_scores(standard_inputs(*wide, **options))
        weights = torch.exp(scores - lse[..., None])
        variance = products.square().sum(3) + (weights * (grad @ v.mT)).square().sum(3)
        size = size + (share * products.abs().sum(3)).sum((0, 2))
    deviation = UNIT[inputs[0].dtype] / 3**0.5 * (share.square() * variance).sum((0, 2)).sqrt()
    allowed = DEVIATIONS * deviation + SINK_RELATIVE * size + ERROR_SLACK
    if options.get("softcap"):
        allowed = allowed + LSE_SOFTCAP * options["softcap"] * size
    assert (found.shape, found.dtype) == (sink.shape, torch.float32)
    assert ((found - truth).abs() <= allowed).all(), f"{what}: dsink {found}, exact {truth}"


@CAUSAL
@pytest.mark.parametrize("dims", [*TILES, (40, 40), (200, 200)], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_kernel(dtype, dims, causal):
    problem = GROUPED.but(head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    inputs, dout = draw(problem)
    check(inputs, draw_sink(4), dout, draw_dlse(inputs[0]), causal=causal)


@MASKS
@pytest.mark.parametrize(
    "scores",
    [{"softcap": 15.0}, {"softmax_scale": -0.1}, {"softmax_scale": 0.0}, {"deterministic": True}],
    ids=name,
)
def test_masks_and_scores(scores, options):
    for head_dim in (64, 128, 256):
        inputs, dout = draw(GROUPED.but(head_dim=head_dim))
        check(inputs, draw_sink(4), dout, **scores, **options)


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (6, 2), (1, 1)], ids=name)
def test_grouped_heads(heads):
    inputs, dout = draw(GROUPED.but(heads=heads[0], heads_kv=heads[1]))
    check(inputs, draw_sink(heads[0]), dout, causal=True)


@pytest.mark.parametrize(
    "sizes",
    [(700, 3), (1, 1023), (1, 1024), (2, 1025), (3, 5000), (2000, 1), (1, 1)],
    ids=name,
)
def test_the_sinks_gradient_sums_over_every_row(sizes):
    batch, seqlen_q = sizes
    inputs, dout = draw(Problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=70, head_dim=64))
    dlse = draw_dlse(inputs[0])
    check(inputs, draw_sink(3), dout, dlse)
    check(inputs, draw_sink(3), None, dlse)


def test_random_problems(fuzz_case):
    seed, index = fuzz_case
    generator = random.Random(f"sink-{seed}-{index}")
    problem, options, layouts = test_fuzz.draw(generator)
    inputs, dout = draw(problem, seed=index)
    inputs = [layout(x) for layout, x in zip(layouts, inputs, strict=True)]
    dlse = draw_dlse(inputs[0], seed=index) if generator.random() < 0.5 else None
    check(inputs, draw_sink(problem.heads, seed=index), dout, dlse, **options)


@CAUSAL
@pytest.mark.parametrize("dims", TILES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_sink_of_minus_infinity_is_none(dtype, dims, causal):
    problem = Problem(300, 200, *dims, heads=4, heads_kv=2, dtype=dtype)  # rows without keys
    inputs, dout = draw(problem)
    dlse = draw_dlse(inputs[0])
    options = {"causal": causal, "deterministic": True}
    plain = backward_checking.Call(inputs, **options)
    given = Call(inputs, torch.full((4,), -math.inf, device=DEVICE), **options)
    assert same_bits([plain.out], [given.out])
    assert torch.equal(plain.lse, given.lse)
    *found, dsink = given.gradients(dout, dlse)
    assert same_bits(plain.gradients(dout, dlse), found)
    assert torch.equal(dsink, torch.zeros_like(dsink))


def test_heads_without_a_sink_beside_others():
    inputs, dout = draw(GROUPED)
    sink = torch.tensor([-math.inf, 5.0, 5.0, -math.inf], device=DEVICE)
    out, lse, _ = check(inputs, sink, dout, causal=True)
    plain, plain_lse = attention(*inputs, causal=True)
    assert torch.equal(out[:, :, ::3], plain[:, :, ::3])
    assert torch.equal(lse[:, ::3], plain_lse[:, ::3])


@CAUSAL
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("factor", [(1, 1), (30, 10)], ids=["usual-scores", "scores-in-thousands"])
def test_sinks_far_from_the_scores(factor, head_dim, causal):
    (q, k, v), dout = draw(GROUPED.but(head_dim=head_dim))
    inputs = (factor[0] * q, factor[1] * k, v)
    sink = torch.tensor([-1e30, 40.0, 2000.0, -2000.0], device=DEVICE)
    out, lse, found = check(inputs, sink, dout, causal=causal)
    assert lse.isfinite().all()
    assert all(x.isfinite().all() for x in found)
    if factor == (1, 1):
        assert not out[:, :, 2].any()
        assert (lse[:, 2] - 2000.0).abs().max() <= 1e-3


def test_a_sink_beyond_all_scores_leaves_nothing():
    inputs = GROUPED.inputs()
    for value in (1e4, 1e30, math.inf):
        out, lse = attention(*inputs, learnable_sink=torch.full((4,), value, device=DEVICE))
        assert not out.any()
        torch.testing.assert_close(lse, torch.full_like(lse, value))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "lengths, options",
    [((300, 100), {"causal": True}), ((300, 0), {}), ((300, 100), {"window_size": (5, 2)})],
    ids=["causal", "no-keys", "window"],
)
def test_rows_that_see_no_key(lengths, options, head_dim):
    problem = GROUPED.but(seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=head_dim)
    inputs, dout = draw(problem)
    sink = draw_sink(4)
    out, lse, (dq, *_) = check(inputs, sink, dout, draw_dlse(inputs[0]), **options)
    left, right = options.get("window_size", (-1, 0 if options.get("causal") else -1))
    positions = torch.arange(300, device=DEVICE) + lengths[1] - 300
    empty = ~reference.visible(positions, lengths[1], left, right).any(1)
    assert empty.any()
    assert not out[:, empty].any()
    assert not dq[:, empty].any()
    assert torch.equal(lse[:, :, empty], sink[:, None].expand_as(lse)[:, :, empty])


def test_no_queries():
    inputs, dout = draw(GROUPED.but(seqlen_q=0))
    _, _, (*_, dsink) = check(inputs, draw_sink(4), dout)
    assert torch.equal(dsink, torch.zeros(4, device=DEVICE))


@CAUSAL
def test_nan_stays_in_its_head(causal):
    inputs, dout = draw(GROUPED)
    sink = draw_sink(4)
    options = {"causal": causal, "deterministic": True}
    clean = Call(inputs, sink, **options)
    dirty = Call(inputs, sink.index_fill(0, torch.tensor([1], device=DEVICE), math.nan), **options)
    assert dirty.out[:, :, 1].isnan().all()
    assert dirty.lse[:, 1].isnan().all()
    for one, other in zip(clean.gradients(dout), dirty.gradients(dout), strict=True):
        # heads 0 and 1 share a KV head, 2 and 3 the other
        at = slice(2, 4) if one.dim() == 1 else (..., slice(one.shape[2] // 2, None), slice(None))
        assert torch.equal(one[at], other[at])
        assert not other[at].isnan().any()
    for head in (0, 2, 3):
        assert torch.equal(clean.out[:, :, head], dirty.out[:, :, head])
        assert torch.equal(clean.lse[:, head], dirty.lse[:, head])


def test_the_same_bits_every_time():
    inputs, dout = draw(GROUPED.but(batch=3, seqlen_q=2000, head_dim=64))
    call = Call(inputs, draw_sink(4), causal=True)
    first = call.gradients(dout)[3]
    for _ in range(100):
        assert torch.equal(call.gradients(dout)[3], first)


def test_any_strides():
    inputs, dout = draw(GROUPED)
    sink = draw_sink(4)
    expected = Call(inputs, sink, deterministic=True)
    apart = torch.full((4, 3), math.nan, device=DEVICE)
    apart[:, 1] = sink
    found = Call(inputs, apart[:, 1], deterministic=True)
    assert torch.equal(found.out, expected.out)
    for one, other in zip(found.gradients(dout), expected.gradients(dout), strict=True):
        assert torch.equal(one, other)


@CAUSAL
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_e4m3(head_dim, causal):
    problem = GROUPED.but(head_dim=head_dim, seqlen_q=500)  # causal: rows without keys
    q, k, v = (x.to(torch.float8_e4m3fn) for x in problem.inputs())
    sink = torch.tensor([-math.inf, 3.0, 8.0, 500.0], device=DEVICE)
    out, lse = attention(q, k, v, causal=causal, learnable_sink=sink)
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = reference.attention(*wide, causal=causal, learnable_sink=sink)
    magnitude, _ = reference.attention(*wide[:2], wide[2].abs(), causal=causal, learnable_sink=sink)
    assert ((out.double() - exact).abs() <= 0.08 * magnitude + 2e-2).all()
    assert (out.double() - exact).square().mean().sqrt() <= 0.04 * exact.square().mean().sqrt()
    seen = exact_lse > -math.inf
    assert (lse.double() - exact_lse)[seen].abs().max() <= 6.5e-2
    assert torch.equal(lse > -math.inf, seen)
    plain, plain_lse = attention(q, k, v, causal=causal)
    assert torch.equal(plain[:, :, 0], out[:, :, 0])
    assert torch.equal(plain_lse[:, 0], lse[:, 0])
    if causal:
        assert torch.equal(lse[:, :, :39], sink[:, None].expand_as(lse)[:, :, :39])


def test_opcheck():
    problem = Problem(seqlen_q=60, seqlen_k=90, heads=4, heads_kv=2)
    (q, k, v), dout = draw(problem)
    sink = draw_sink(4)
    out, lse = attention(q, k, v, learnable_sink=sink)
    rest = (128**-0.5, False, -1, -1, 0.0, True)
    torch.library.opcheck(
        ops_backward.backward_sink, (dout, draw_dlse(q), q, k, v, out, lse, sink, *rest)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    with torch.enable_grad():
        torch.library.opcheck(
            ops.operator, (*leaves[:3], 128**-0.5, True, -1, -1, 0.0, 0, leaves[3], True)
        )


def test_graphs_follow_the_sinks_values():
    inputs, dout = draw(GROUPED)
    leaves = [x.requires_grad_() for x in (*inputs, draw_sink(4))]

    def step():
        with torch.enable_grad():
            out = attention(*leaves[:3], learnable_sink=leaves[3], deterministic=True)[0]
            return torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    leaves[3].copy_(draw_sink(4, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)
