"""PyTorch's machinery around the gradient, and what it takes of memory."""

import gc
import importlib.util
import shutil

import pytest
import torch
from backward_checking import (
    Call,
    check,
    draw,
    draw_dlse,
    exact_gradients,
    gradients,
    same_bits,
    tile_head_dim,
)
from checking import DEVICE, TILES, Problem, attention, name, rmse
from torch.utils.checkpoint import checkpoint

import hopper_attention

FORWARD = torch.ops.hopper_attention.forward.default
SCALARS = (0.088, True, -1, -1, 0.0, 0)
FIXED = {"causal": True, "deterministic": True}
FP8_CLOSE = 0.1  # relative root mean square; e4m3's own steps are 2^-4


def operands(problem, causal):
    """The backward operator's arguments, by name."""
    (q, k, v), dout = draw(problem)
    out, lse = attention(q, k, v, causal=causal)
    scale = problem.head_dim**-0.5
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", "softmax_scale", "causal")
    names += ("window_left", "window_right", "softcap", "deterministic")
    values = (dout, None, q, k, v, out, lse, scale, causal, -1, -1, 0.0, True)
    return dict(zip(names, values, strict=True))


def backward(**arguments):
    return torch.ops.hopper_attention.backward(**arguments)


def test_opcheck_of_the_forward_operator():
    for problem in (
        Problem(seqlen_q=60, seqlen_k=90),
        Problem(seqlen_q=60, seqlen_k=90, head_dim=192, head_dim_v=128, heads_kv=1),
    ):
        inputs = [x.requires_grad_() for x in problem.inputs()]
        with torch.enable_grad():
            torch.library.opcheck(FORWARD, (*inputs, *SCALARS), {"deterministic": True})


def test_opcheck_of_the_backward_operator():
    operator = torch.ops.hopper_attention.backward.default
    for problem in (Problem(seqlen_q=60, seqlen_k=90), Problem(seqlen_q=60, seqlen_k=0)):
        arguments = operands(problem, causal=False)
        torch.library.opcheck(operator, tuple(arguments.values()))
        arguments["dlse"] = draw_dlse(arguments["q"])
        torch.library.opcheck(operator, tuple(arguments.values()))


def test_the_backward_operator_is_what_autograd_calls():
    problem = Problem(heads=4, heads_kv=2)
    inputs, dout = draw(problem)
    expected = check(inputs, dout, **FIXED)
    assert same_bits(backward(**operands(problem, causal=True)), expected)


def compiled_matches_eager(backend):
    def layer(q, k, v):
        out, lse = hopper_attention.flash_attn_func(
            q * 1.5, k, v, window_size=(50, -1), return_attn_probs=True, **FIXED
        )
        return (out * 2).float().square().mean() + lse.mean() * 0.1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seqlen in (200, 333):  # the second one makes the lengths dynamic
        inputs, _ = draw(Problem(seqlen_q=seqlen, seqlen_k=seqlen))
        leaves = [x.requires_grad_() for x in inputs]
        with torch.enable_grad():
            expected = torch.autograd.grad(layer(*leaves), leaves)
            found = torch.autograd.grad(compiled(*leaves), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=1e-6)


def test_compile_without_a_graph_break():
    compiled_matches_eager("aot_eager")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="inductor needs triton and a C compiler",
)
def test_compile_by_inductor():
    compiled_matches_eager("inductor")


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_activation_checkpointing(reentrant):
    inputs, dout = draw(Problem(heads=4, heads_kv=2))
    expected = check(inputs, dout, **FIXED)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = checkpoint(
            lambda q, k, v: attention(q, k, v, **FIXED)[0], *leaves, use_reentrant=reentrant
        )
    out.backward(dout)
    assert same_bits([x.grad for x in leaves], expected)


def test_a_gradient_that_is_asked_for_twice_is_added_up():
    inputs, dout = draw(Problem())
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, _ = attention(*leaves, **FIXED)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    out.backward(dout, retain_graph=True)
    out.backward(dout)
    assert same_bits([x.grad for x in leaves], [2 * x for x in expected])


def test_a_second_derivative_is_refused():
    inputs, dout = draw(Problem(seqlen_q=20, seqlen_k=20))
    call = Call(inputs)
    with torch.enable_grad():
        dq, _, _ = torch.autograd.grad(call.out, call.leaves, dout, create_graph=True)
        with pytest.raises(NotImplementedError, match="gradient"):
            dq.float().sum().backward()


def test_nothing_is_kept_where_no_gradient_is_wanted():
    inputs, _ = draw(Problem())
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves)  # under no_grad
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.inference_mode():
        assert not attention(*leaves)[0].requires_grad


def test_autocast_leaves_the_gradients_dtype_alone():
    inputs, dout = draw(Problem())
    expected = gradients(inputs, dout, **FIXED)
    with torch.autocast(DEVICE, dtype=torch.float16):
        call = Call(inputs, **FIXED)
        assert same_bits(call.gradients(dout), expected)


def descend(weights, x, target):
    """One step of gradient descent on a layer of attention."""
    batch, seqlen, width = x.shape
    with torch.enable_grad():
        qkv = (x @ weights[0]).view(batch, seqlen, 3, width // 64, 64)
        out = hopper_attention.flash_attn_qkvpacked_func(qkv, **FIXED)
        loss = (out.flatten(2) @ weights[1] - target).float().square().mean()
    for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.sub_(grad, alpha=10.0)
    return loss.detach()


def test_a_training_step_in_a_graph():
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size):
        drawn = torch.randn(size, device=DEVICE, generator=generator)
        return (drawn / size[-2] ** 0.5).bfloat16()

    first = [normal(256, 768), normal(256, 256)]
    x, target = 16 * normal(4, 256, 256), normal(4, 256, 256)
    weights = [w.clone().requires_grad_() for w in first]
    losses = [descend(weights, x, target) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]

    captured = [w.clone().requires_grad_() for w in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        descend(captured, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = descend(captured, x, target)
    for weight, start in zip(captured, first, strict=True):
        weight.copy_(start)
    for expected in losses:
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "fixed-order"])
@pytest.mark.parametrize("tile", [*TILES, (40, 40), (200, 200)], ids=name)
def test_peak_memory_is_the_accumulator_and_some_vectors(tile, deterministic):
    problem = Problem(
        batch=2,
        seqlen_q=3000,
        seqlen_k=5000,
        heads=8,
        heads_kv=2,
        head_dim=tile[0],
        head_dim_v=tile[1],
    )
    inputs, dout = draw(problem)
    call = Call(inputs, causal=True, deterministic=deterministic)
    call.gradients(dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = call.gradients(dout)
    torch.cuda.synchronize()
    extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    extra -= sum(x.numel() * x.element_size() for x in found)
    rows = problem.batch * problem.heads * -(-problem.seqlen_q // 128) * 128
    allowed = rows * (4 * tile_head_dim(problem.head_dim) + 4 * 4)
    assert extra <= allowed + 2**16, f"{extra / allowed:.3f} of the accumulator and four vectors"


def test_memory_is_given_back():
    inputs, dout = draw(Problem(seqlen_q=1000, seqlen_k=1000))
    gradients(inputs, dout, causal=True)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        Call(inputs, causal=True).gradients(dout)
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


WRONG = [
    ({"dout": lambda x: x[:, 1:]}, ValueError, "dout"),
    ({"dout": lambda x: x.float()}, TypeError, "dout"),
    ({"dout": lambda x: x.cpu()}, ValueError, "dout"),
    ({"out": lambda x: x[..., :-8]}, ValueError, "out"),
    ({"out": lambda x: x.half()}, TypeError, "out"),
    ({"lse": lambda x: x.transpose(1, 2)}, ValueError, "lse"),
    ({"lse": lambda x: x.double()}, TypeError, "lse"),
    ({"dlse": lambda x: torch.zeros(3, device=DEVICE)}, ValueError, "dlse"),
    ({"k": lambda x: x[:, :-1]}, ValueError, "sequence length"),
    ({"q": lambda x: x[0]}, ValueError, "4 dimensions"),
]


@pytest.mark.parametrize("changes, error, words", WRONG)
def test_wrong_inputs_raise_and_do_no_harm(changes, error, words):
    arguments = operands(Problem(), causal=True)
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=words):
        backward(**arguments)
    torch.cuda.synchronize()
    check(*draw(Problem(seqlen_q=20, seqlen_k=20)))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_gradients_of_attention_in_e4m3(dtype, tile, causal):
    """Straight through the quantizer: 16-bit gradients at an output that FP8 computed."""
    problem = Problem(
        batch=2,
        seqlen_q=500,
        seqlen_k=500,
        heads=4,
        heads_kv=2,
        head_dim=tile[0],
        head_dim_v=tile[1],
        dtype=dtype,
    )
    inputs, dout = draw(problem)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = hopper_attention.flash_attn_fp8_func(*leaves, causal=causal)
    found = torch.autograd.grad(out, leaves, dout)
    for grad, exact, leaf in zip(
        found, exact_gradients(inputs, dout, causal=causal), leaves, strict=True
    ):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert rmse(grad, exact) <= FP8_CLOSE * exact.square().mean().sqrt().item()
