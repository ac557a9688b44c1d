"""The gradient of attention: autograd around the operators, and what they pass to the library."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hopper_attention
from hopper_attention import ops, ops_backward, reference


def random_qkv(
    batch=2, seqlen_q=6, seqlen_k=9, heads=4, heads_kv=2, d=16, d_v=None, dtype=torch.bfloat16
):
    return tuple(
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in (
            (batch, seqlen_q, heads, d),
            (batch, seqlen_k, heads_kv, d),
            (batch, seqlen_k, heads_kv, d if d_v is None else d_v),
        )
    )


def exact_gradients(inputs, out, lse, dout, dlse, **arguments):
    """Of the reference, from what the pass at hand gave: autograd through it in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs = reference.attention(*exact, **arguments)
    return torch.autograd.grad(outputs, exact, (dout.double(), dlse.double()))


def assert_differentiates(inputs, use_lse=True, **arguments):
    out, lse = hopper_attention.flash_attn_func(*inputs, **arguments, return_attn_probs=True)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse) if use_lse else torch.zeros_like(lse)
    dlse[lse == -torch.inf] = 0
    outputs, gradients = ((out, lse), (dout, dlse)) if use_lse else ((out,), (dout,))
    found = torch.autograd.grad(outputs, inputs, gradients)
    expected = exact_gradients(inputs, out, lse, dout, dlse, **arguments)
    for x, gradient, exact in zip(inputs, found, expected, strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        tolerance = 0.02 * exact.abs().max().item() + 1e-6 if exact.numel() else 0
        torch.testing.assert_close(gradient.double(), exact, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize(
    "sizes, arguments",
    [
        ({}, {}),
        ({"d_v": 8, "dtype": torch.float16}, {"softmax_scale": 0.7}),
        ({"heads_kv": 1}, {"causal": True}),
        ({"seqlen_q": 9, "seqlen_k": 6}, {"causal": True}),  # rows without keys
        ({"seqlen_k": 40}, {"window_size": (5, 2), "softcap": 1.5}),
        ({}, {"softmax_scale": -0.3}),
    ],
)
def test_gradients(gradient_library, sizes, arguments, use_lse):
    assert_differentiates(random_qkv(**sizes), use_lse, **arguments)
    assert [call["dlse"] != 0 for call in gradient_library.calls] == [use_lse]


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k", "heads", "heads heads_kv"])
def test_gradients_of_nothing(gradient_library, empty):
    assert_differentiates(random_qkv(**dict.fromkeys(empty.split(), 0)))


def test_arguments_of_the_library(gradient_library):
    q, k, v = random_qkv(2, 6, 9, 4, 2, 24, 16)
    out, lse = hopper_attention.flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(5, 2), softcap=7.0,
        deterministic=True, return_attn_probs=True,
    )  # fmt: skip
    dout = torch.randn_like(out)
    out.backward(dout)
    (call,) = gradient_library.calls
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
    assert call.items() >= {name: x.data_ptr() for name, x in tensors.items()}.items()
    sizes = {"batch": 2, "seqlen_q": 6, "seqlen_k": 9, "heads": 4, "heads_kv": 2}
    assert call.items() >= (sizes | {"head_dim": 24, "head_dim_v": 16, "dlse": 0}).items()
    q_strides, k_strides = (6 * 4 * 24, 4 * 24, 24), (9 * 2 * 24, 2 * 24, 24)
    v_strides, out_strides = (9 * 2 * 16, 2 * 16, 16), (6 * 4 * 16, 4 * 16, 16)
    inputs, gradients = (q_strides, k_strides, v_strides), (q_strides, k_strides, v_strides)
    assert call["strides"] == (*inputs, out_strides, out_strides, *gradients)
    options = {"softmax_scale": 0.3, "softcap": 7.0, "causal": True, "deterministic": True}
    window = {"window_left": 5, "window_right": 0}  # causal overrides its right side
    assert call.items() >= (options | window).items()
    assert [prepared["dtype"] for prepared in gradient_library.prepared] == [1]  # bfloat16


def test_deterministic(gradient_library):
    q, k, v = random_qkv()
    attend = hopper_attention.flash_attn_func
    attend(q, k, v).sum().backward()
    attend(q, k, v, deterministic=True).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attend(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in gradient_library.calls] == [False, True, True]
    with pytest.raises(TypeError, match="deterministic must be True or False"):
        attend(q, k, v, deterministic=1)


def test_strided_tensors_are_read_in_place(gradient_library):
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv())
    assert_differentiates([x.requires_grad_() for x in (q, k, v)])
    call = gradient_library.calls[0]
    assert (call["q"], call["k"], call["v"]) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert call["strides"][0] == q.stride()[:3]
    assert call["strides"][5] == (6 * 4 * 16, 4 * 16, 16)  # gradients are contiguous


def test_gradients_of_any_layout_arrive(gradient_library):
    inputs = random_qkv()
    out = hopper_attention.flash_attn_func(*inputs)
    one = torch.ones_like(out)
    expected = torch.autograd.grad(out, inputs, one, retain_graph=True)
    odd = torch.ones(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    for dout in (one[:, :, :1, :1].expand(out.shape), odd, one.mT.contiguous().mT):
        found = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_only_the_log_sum_exp_is_used(gradient_library):
    inputs = random_qkv()
    _, lse = hopper_attention.flash_attn_func(*inputs, return_attn_probs=True)
    found = torch.autograd.grad(lse.sum(), inputs, materialize_grads=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(
        reference.attention(*exact)[1].sum(), exact, materialize_grads=True
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_input_requires_grad(gradient_library, wanted):
    inputs = [x.detach() for x in random_qkv()]
    inputs[wanted].requires_grad_()
    hopper_attention.flash_attn_func(*inputs).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def test_what_is_saved(gradient_library):
    saved = []
    q, k, v = random_qkv()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hopper_attention.flash_attn_func(q.detach(), k.detach(), v.detach())
        with torch.no_grad():
            hopper_attention.flash_attn_func(q, k, v)
        assert not saved
        out, lse = hopper_attention.flash_attn_func(q, k, v, return_attn_probs=True)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (q, k, v, out, lse)]


def test_activation_checkpointing(gradient_library):
    inputs = random_qkv()
    attend = hopper_attention.flash_attn_func
    expected = torch.autograd.grad(attend(*inputs, causal=True).sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(lambda *x: attend(*x, causal=True), *inputs, use_reentrant=reentrant)
        for x in inputs:
            x.grad = None
        out.sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected, strict=True))


def test_packed_heads(gradient_library):
    qkv = torch.randn(2, 6, 3, 4, 16).bfloat16().requires_grad_()
    hopper_attention.flash_attn_qkvpacked_func(qkv, causal=True).sum().backward()
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    hopper_attention.flash_attn_func(q, k, v, causal=True).sum().backward()
    assert torch.equal(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 2))


def test_the_second_derivative_is_refused(gradient_library):
    inputs = random_qkv()
    first = torch.autograd.grad(
        hopper_attention.flash_attn_func(*inputs).sum(), inputs, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        torch.autograd.grad(first[0].sum(), inputs[0])


def test_forward_mode_is_refused(gradient_library):
    q, k, v = (x.detach() for x in random_qkv())
    attend = hopper_attention.flash_attn_func
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: attend(q, x, v), (k,), (torch.ones_like(k),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        for function in (attend, hopper_attention.flash_attn_fp8_func):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                function(dual, k, v)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.hopper_attention.forward(dual, k, v, 1.0, False)
        assert attend(q, k, v).isfinite().all()  # without a tangent
    _, of_reference = torch.func.jvp(
        lambda x: reference.attention(x, k, v)[0], (q,), (torch.ones_like(q),)
    )
    assert of_reference.any()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("use_lse", [False, True])
def test_forward_mode_through_the_backward_pass_is_refused(gradient_library, use_lse, create_graph):
    inputs = random_qkv()
    outputs = hopper_attention.flash_attn_func(*inputs, return_attn_probs=True)
    place = int(use_lse)

    def gradients(grad_output):
        return torch.autograd.grad(
            outputs[place], inputs, grad_output, retain_graph=True, create_graph=create_graph
        )

    one = torch.ones_like(outputs[place])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(gradients, (one,), (one,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            gradients(torch.autograd.forward_ad.make_dual(one, one))
        saved = (None, *(x.detach() for x in (*inputs, *outputs)), 1.0, False, -1, -1, 0.0, False)
        dout = torch.ones_like(outputs[0]).detach()
        ops_backward.backward(dout, *saved)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            ops_backward.backward(torch.autograd.forward_ad.make_dual(dout, dout), *saved)
        assert gradients(one)[0].isfinite().all()  # without a tangent


def test_calls_of_one_problem_are_prepared_once(gradient_library):
    q, k, v = random_qkv()
    for _ in range(3):
        hopper_attention.flash_attn_func(q, k, v).sum().backward()
    assert (len(gradient_library.prepared), len(gradient_library.calls)) == (1, 3)
    others = [
        {"causal": True},
        {"softcap": 2.0},
        {"softmax_scale": 0.5},
        {"window_size": (3, -1)},
        {"deterministic": True},
    ]
    for count, arguments in enumerate(others, start=2):
        hopper_attention.flash_attn_func(q, k, v, **arguments).sum().backward()
        assert len(gradient_library.prepared) == count


def test_opcheck(gradient_library):
    for sizes in ({}, {"d_v": 8}, {"seqlen_k": 0}):
        inputs = random_qkv(**sizes)
        torch.library.opcheck(ops.operator, (*inputs, 0.25, True, 3, -1, 0.0, 0, None, True))
    out, lse = ops.operator(*inputs, 0.25, False)
    torch.library.opcheck(
        ops_backward.backward,
        (torch.ones_like(out), None, *(x.detach() for x in (*inputs, out, lse))),
        {"softmax_scale": 0.25, "causal": False, "window_left": -1, "window_right": -1,
         "softcap": 0.0, "deterministic": False},
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


SCALAR_ARGUMENTS = (0.25, False, -1, -1, 0.0, False)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("out", lambda x: x[:, 1:], ValueError, r"out must have shape \(2, 6, 4, 16\), got \(2, 5"),
        ("dout", lambda x: x[..., 1:], ValueError, "dout must have shape"),
        ("dout", lambda x: x.half(), TypeError, r"dout must be torch.bfloat16, got torch.float16"),
        ("lse", lambda x: x.mT, ValueError, r"lse must have shape \(2, 4, 6\), got \(2, 6, 4\)"),
        ("lse", lambda x: x.double(), TypeError, "lse must be torch.float32"),
        ("dlse", lambda x: x[:1], ValueError, "dlse must have shape"),
        ("dlse", lambda x: x.to("meta"), ValueError, "dlse must be on q's device, cpu, got meta"),
        ("k", lambda x: x[:, 1:], ValueError, "k and v must have the same sequence length"),
        ("q", lambda x: x[..., :12], ValueError, "q and k must have the same head dimension"),
    ],
)
def test_operator_checks_by_itself(gradient_library, name, change, error, message):
    q, k, v = (x.detach() for x in random_qkv())
    out, lse = torch.empty_like(q), torch.zeros(2, 4, 6)
    tensors = {"dout": out, "dlse": lse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    tensors[name] = change(tensors[name])
    with pytest.raises(error, match=message):
        ops_backward._backward_cuda(*tensors.values(), *SCALAR_ARGUMENTS)
    if tensors[name].device.type == "cpu":
        with pytest.raises(error, match=message):
            ops_backward.backward(*(x.to("meta") for x in tensors.values()), *SCALAR_ARGUMENTS)
    assert not gradient_library.calls


def test_tensors_on_the_cpu():
    q, k, v = (x.detach() for x in random_qkv())
    with pytest.raises(ValueError, match=r"must be on a CUDA device, got cpu; .*reference"):
        ops_backward.backward(q, None, q, k, v, q, torch.zeros(2, 4, 6), *SCALAR_ARGUMENTS)
