"""The gradient of packed batches: autograd around the operators, and what they pass to the library.

The library is varlen_library.py's, whose gradients are those of ops_backward.py's formulas.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from varlen_library import (
    CU_K,
    CU_Q,
    STREAM,
    cumulate,
    install_library,
    operators_on_the_cpu,
    random_qkv,
)

from hopper_attention import flash_attn_varlen_func as attend
from hopper_attention import ops_varlen, ops_varlen_backward, reference

SCALARS = (0.25, False, -1, -1, 0.0, False)


@pytest.fixture
def library(monkeypatch):
    with operators_on_the_cpu():
        fake = install_library(monkeypatch)
        monkeypatch.setattr(ops_varlen, "forward", ops_varlen._inference)
        yield fake


def backward_calls(library):
    return [call for call in library.calls if "dout" in call]


def leaves(**changes):
    return [x.requires_grad_() for x in random_qkv(**changes)]


def used(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def assert_differentiates(inputs, lengths=(CU_Q, CU_K), use_lse=True, **arguments):
    """Compares with autograd through the reference."""
    cu_q, cu_k, *seqused = lengths
    out, lse = attend(
        *(*inputs, cu_q, cu_k, 5, None, *seqused), **arguments, return_attn_probs=True
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse[lse == -torch.inf] = 0
    outputs, given_gradients = ((out, lse), (dout, dlse)) if use_lse else ((out,), (dout,))
    found = torch.autograd.grad(outputs, inputs, given_gradients)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    arguments.pop("deterministic", None)
    exact_outputs = reference.varlen_attention(*exact, *lengths, **arguments)
    dlse = dlse if use_lse else torch.zeros_like(lse)
    if len(cu_q) > 1:
        expected = torch.autograd.grad(exact_outputs, exact, (dout.double(), dlse.double()))
    else:  # without sequences nothing depends on them
        expected = [torch.zeros_like(x) for x in exact]
    for x, gradient, wanted in zip(inputs, found, expected, strict=True):
        assert gradient.is_contiguous()
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        tolerance = 0.02 * wanted.abs().max().item() + 1e-6 if wanted.numel() else 0
        torch.testing.assert_close(gradient.double(), wanted, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize(
    "sizes, seqused, arguments",
    [
        ({}, (), {}),
        ({"d_v": 8, "dtype": torch.float16}, (), {"softmax_scale": 0.7}),
        ({"heads_kv": 1, "total_q": 20, "total_k": 15}, (), {"causal": True}),
        ({}, (used(3, 0, 1, 0), used(4, 2, 1, 0)), {"window_size": (2, 1), "softcap": 1.5}),
        ({}, (None, used(0, 6, 1, 1)), {"softmax_scale": -0.3, "deterministic": True}),
    ],
)
def test_gradients(library, sizes, seqused, arguments, use_lse):
    assert_differentiates(leaves(**sizes), (CU_Q, CU_K, *seqused), use_lse, **arguments)
    assert [call["dlse"] != 0 for call in backward_calls(library)] == [use_lse]


@pytest.mark.parametrize(
    "sizes, lengths",
    [
        ({"total_q": 0}, (cumulate(0, 0), cumulate(6, 7))),
        ({"total_k": 0}, (cumulate(5, 7), cumulate(0, 0))),
        ({"total_q": 0, "total_k": 0}, (cumulate(0), cumulate(0))),
        ({"heads": 0}, (cumulate(5), cumulate(7))),
        ({"heads": 0, "heads_kv": 0}, (cumulate(5), cumulate(7))),
        ({}, (cumulate(), cumulate())),  # no sequences: all rows are nobody's
    ],
)
def test_gradients_of_nothing(library, sizes, lengths):
    assert_differentiates(leaves(**sizes), lengths)
    assert len(backward_calls(library)) == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    """Of any lengths, layouts and strides of the gradient that comes in."""
    draw = data.draw
    batch = draw(st.integers(0, 4))
    rows, keys = (draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch)) for _ in "qk")
    behind = draw(st.integers(0, 2))
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def tensor(total, heads):
        x = torch.randn(total, heads, 24).to(torch.float16)  # bf16's O moves small gradients
        layout = draw(st.sampled_from(["contiguous", "heads outside", "padded", "odd"]))
        if layout == "heads outside":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "padded":
            x = torch.cat([x, x], dim=2)[:, :, :24]
        if layout == "odd":
            x = torch.empty(x.numel() + 1).to(x.dtype)[1:].view(x.shape).copy_(x)
        return x.requires_grad_()

    def counts(lengths):
        return draw(st.sampled_from([None, used(*(draw(st.integers(0, n)) for n in lengths))]))

    q = tensor(sum(rows) + behind, heads_kv * group)
    k, v = (tensor(sum(keys) + behind, heads_kv) for _ in "kv")
    lengths = (cumulate(*rows), cumulate(*keys), counts(rows), counts(keys))
    with pytest.MonkeyPatch.context() as monkeypatch, operators_on_the_cpu():
        install_library(monkeypatch)
        assert_differentiates([q, k, v], lengths, draw(st.booleans()), causal=draw(st.booleans()))


def test_arguments_of_the_library(library):
    q, k, v = leaves(d=24, d_v=16)
    used_q, used_k = used(3, 0, 1, 0), used(4, 2, 1, 0)
    out, lse = attend(
        *(q, k, v, CU_Q, CU_K, np.int64(5), 6, used_q, used_k, 0.3, True),
        window_size=(5, 2), softcap=7.0, deterministic=True, sm_margin=3, return_attn_probs=True,
    )  # fmt: skip
    dout = torch.randn_like(out)
    out.backward(dout)
    (call,) = backward_calls(library)
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "seqused_q": used_q, "seqused_k": used_k}
    for name, x in {**tensors, **lengths}.items():
        assert call.pop(name) == x.data_ptr(), name
    for name in ("workspace", "dq", "dk", "dv"):
        assert call.pop(name) % 16 == 0
    assert call == {
        "dlse": 0,
        "stream": STREAM,
        "batch": 4,
        "total_q": 12,
        "total_k": 13,
        "heads": 4,
        "heads_kv": 2,
        "head_dim": 24,
        "head_dim_v": 16,
        **dict.fromkeys(("q_strides", "dq_strides"), (4 * 24, 24)),
        **dict.fromkeys(("k_strides", "dk_strides"), (2 * 24, 24)),
        **dict.fromkeys(("v_strides", "dv_strides"), (2 * 16, 16)),
        **dict.fromkeys(("out_strides", "dout_strides"), (4 * 16, 16)),
        "softmax_scale": 0.3,
        "softcap": 7.0,
        "causal": True,
        "window_left": 5,
        "window_right": 0,  # causal overrides it
        "deterministic": True,
    }
    assert [asked["dtype"] for asked in library.asked] == [1, 1]  # bfloat16


def test_deterministic(library):
    inputs = leaves()
    attend(*inputs, CU_Q, CU_K, 5, 6).sum().backward()
    attend(*inputs, CU_Q, CU_K, 5, 6, deterministic=True).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attend(*inputs, CU_Q, CU_K, 5, 6).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in backward_calls(library)] == [False, True, True]


def test_calls_of_one_problem_are_prepared_once(library):
    inputs = leaves()
    for cu_q in (CU_Q, cumulate(1, 1, 1, 1), cumulate(12, 0, 0, 0)):  # lengths are no part of it
        attend(*inputs, cu_q, CU_K, 5, 6).sum().backward()
    assert len(backward_calls(library)) == 3
    assert ["strides" in x or "dq_strides" in x for x in library.asked] == [False, True]
    attend(*inputs, CU_Q, CU_K, 5, 6, causal=True).sum().backward()
    assert len(library.asked) == 4


def test_only_the_log_sum_exp_is_used(library):
    inputs = leaves()
    _, lse = attend(*inputs, CU_Q, CU_K, 5, 6, return_attn_probs=True)
    weights = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    found = torch.autograd.grad(lse, inputs, weights, materialize_grads=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    _, exact_lse = reference.varlen_attention(*exact, CU_Q, CU_K)
    expected = torch.autograd.grad(exact_lse, exact, weights.double(), materialize_grads=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_input_requires_grad(library, wanted):
    inputs = [x.detach() for x in leaves()]
    inputs[wanted].requires_grad_()
    attend(*inputs, CU_Q, CU_K, None, None).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def test_what_is_saved(library):
    saved = []
    q, k, v = leaves()
    used_k = used(4, 2, 1, 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert not attend(q, k, v, CU_Q, CU_K, 5, 6).requires_grad
        assert not saved
        out, lse = attend(q, k, v, CU_Q, CU_K, 5, 6, seqused_k=used_k, return_attn_probs=True)
    kept = (q, k, v, out, lse, CU_Q, CU_K, used_k)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in kept]


def test_lengths_that_were_changed_since_are_noticed(library):
    cu_q = CU_Q.clone()
    out = attend(*leaves(), cu_q, CU_K, 5, 6)
    cu_q.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_activation_checkpointing(library):
    inputs = leaves()

    def layer(*x):
        return attend(*x, CU_Q, CU_K, 5, 6, causal=True)

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for reentrant in (False, True):
        for x in inputs:
            x.grad = None
        checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected, strict=True))


def test_forward_mode_is_refused(library):
    inputs = leaves()
    out, lse = attend(*inputs, CU_Q, CU_K, None, None, return_attn_probs=True)
    saved = (None, *(x.detach() for x in (*inputs, out, lse)), CU_Q, CU_K, None, None, *SCALARS)
    for function, x in (
        (lambda x: attend(x, *inputs[1:], CU_Q, CU_K, None, None), inputs[0].detach()),
        (lambda x: torch.autograd.grad(out, inputs, x, retain_graph=True), torch.ones_like(out)),
        (lambda x: ops_varlen_backward.backward(x, *saved), torch.ones_like(out)),
    ):
        with torch.autograd.forward_ad.dual_level():
            function(x)
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                function(torch.autograd.forward_ad.make_dual(x, x))


def test_the_second_derivative_is_refused(library):
    inputs = leaves()
    out = attend(*inputs, CU_Q, CU_K, 5, 6)
    first = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        torch.autograd.grad(first[0].sum(), inputs[0])


def test_opcheck(library):
    for sizes, seqused in (({}, (None, None)), ({"d_v": 8}, (None, used(1, 2, 1, 0)))):
        inputs = leaves(**sizes)
        torch.library.opcheck(
            ops_varlen.operator,
            (*inputs, CU_Q, CU_K, *seqused, 0.25, True, 3, -1, 0.0, 0, True),
        )
    out, lse = ops_varlen.operator(*inputs, CU_Q, CU_K, *seqused, 0.25, False)
    tensors = (torch.ones_like(out), None, *(x.detach() for x in (*inputs, out, lse)))
    torch.library.opcheck(
        ops_varlen_backward.backward,
        (*tensors, CU_Q, CU_K, *seqused, *SCALARS),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_with_its_gradient_without_a_graph_break(library, dynamic):
    forwards, backwards = [], []

    def keeping(graphs):
        def compiler(graph, _):
            graphs.append([node.target for node in graph.graph.nodes])
            return graph.forward

        return compiler

    def model(q, k, v, cu_q, cu_k, longest):
        out, lse = attend(
            *(q * 2, k, v, cu_q, cu_k, longest, longest), causal=True, return_attn_probs=True
        )
        return out.float().square().sum() + lse.nan_to_num(neginf=0.0).sum()

    backend = aot_autograd(fw_compiler=keeping(forwards), bw_compiler=keeping(backwards))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for longest, total in ((5, 12), (6, 12), (7, 14)):
        inputs = leaves(total_q=total)
        call = (*inputs, CU_Q, CU_K, longest)
        found = torch.autograd.grad(compiled(*call), inputs)
        for x, y in zip(found, torch.autograd.grad(model(*call), inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    operators = torch.ops.hopper_attention
    assert len(forwards) <= 3  # the second one learns that the longest varies, the third the total
    for targets in forwards:
        assert targets.count(operators.forward_varlen.default) == 1
    for targets in backwards:
        assert targets.count(operators.backward_varlen.default) == 1


def operands(**sizes):
    q, k, v = random_qkv(**sizes)
    out, lse = torch.empty_like(q), torch.zeros(4, 12)
    tensors = {"dout": out, "dlse": lse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    return tensors | {"cu_q": CU_Q, "cu_k": CU_K, "used_q": None, "used_k": used(1, 1, 1, 1)}


def test_fake_implementation():
    names = ("dq", "dk", "dv")
    of_a_view = operands()
    of_a_view["q"] = of_a_view["q"].transpose(0, 1).contiguous().transpose(0, 1)
    with FakeTensorMode():
        on_card = [
            None
            if x is None
            else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            for x in of_a_view.values()
        ]
        found = ops_varlen_backward.backward(*on_card, *SCALARS)
    for name, gradient, like in zip(names, found, on_card[2:5], strict=True):
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype), name
        assert gradient.is_contiguous()
        assert gradient.device.type == "cuda"


WRONG = [
    ("out", lambda x: x[1:], ValueError, r"out must have shape \(12, 4, 16\), got \(11, 4, 16\)"),
    ("dout", lambda x: x[..., 1:], ValueError, r"dout must have shape .* got \(12, 4, 15\)"),
    ("dout", lambda x: x.half(), TypeError, "dout must be torch.bfloat16, got torch.float16"),
    ("lse", lambda x: x.mT, ValueError, r"lse must have shape \(4, 12\), got \(12, 4\)"),
    ("lse", lambda x: x.double(), TypeError, "lse must be torch.float32, got torch.float64"),
    ("dlse", lambda x: x[:1], ValueError, r"dlse must have shape \(4, 12\), got \(1, 12\)"),
    ("dlse", lambda x: x.to("meta"), ValueError, "dlse must be on q's device, cpu, got meta"),
    ("k", lambda x: x[1:], ValueError, "same number of rows .* got k 12, v 13"),
    ("q", lambda x: x[0], ValueError, r"q must have 3 dimensions .* got 2: \(4, 16\)"),
    ("cu_q", lambda x: x.long(), TypeError, "cu_seqlens_q must be torch.int32, got torch.int64"),
    ("cu_k", lambda x: x[1:], ValueError, "must both have .* entries, got 5 and 4"),
    ("used_k", lambda x: x[1:], ValueError, "seqused_k must .* each of the 4 .* got 3"),
]


@pytest.mark.parametrize("name, change, error, message", WRONG)
def test_operator_checks_by_itself(library, name, change, error, message):
    tensors = operands()
    tensors[name] = change(tensors[name])
    with pytest.raises(error, match=message):
        ops_varlen_backward._backward_cuda(*tensors.values(), *SCALARS)
    if tensors[name].device.type == "cpu":
        on_meta = [None if x is None else x.to("meta") for x in tensors.values()]
        with pytest.raises(error, match=message):
            ops_varlen_backward.backward(*on_meta, *SCALARS)
    assert not library.calls


def test_tensors_on_the_cpu():
    message = r"must be on a CUDA device, got cpu; .*reference\.varlen_attention"
    with pytest.raises(ValueError, match=message):
        ops_varlen_backward.backward(*operands().values(), *SCALARS)
    with pytest.raises(ValueError, match=r"q, k and v must be on a CUDA device, got cpu"):
        attend(*leaves(), CU_Q, CU_K, 5, 6)


def test_schema():
    results = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    lengths = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    scalars = "float softmax_scale, bool causal, int window_left, int window_right, "
    assert str(ops_varlen_backward.backward._schema) == (
        f"hopper_attention::backward_varlen({results}{lengths}{scalars}float softcap, "
        "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
