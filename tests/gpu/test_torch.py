"""PyTorch's machinery around the operator, and what wrong inputs are told."""

import importlib.util
import math
import shutil

import pytest
import torch
from checking import DEVICE, Problem, attention, check, compare

import hopper_attention

OPERATOR = torch.ops.hopper_attention.forward.default
SCALARS = (0.088, True, -1, -1, 0.0, 0)


def test_opcheck():
    for problem in (
        Problem(seqlen_q=60, seqlen_k=90),
        Problem(seqlen_q=60, seqlen_k=90, head_dim=192, head_dim_v=128, heads_kv=1),
        Problem(seqlen_q=60, seqlen_k=0),
    ):
        torch.library.opcheck(OPERATOR, (*problem.inputs(), *SCALARS))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in Problem().inputs())
    torch.library.opcheck(OPERATOR, (q, k, v, *SCALARS))


def compiled_matches_eager(backend):
    def layer(q, k, v):
        out, lse = hopper_attention.flash_attn_func(
            q * 1.5, k, v, causal=True, window_size=(50, -1), return_attn_probs=True
        )
        return out * 2, lse + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seqlen in (200, 333):  # the second one makes the lengths dynamic
        inputs = Problem(seqlen_q=seqlen, seqlen_k=seqlen).inputs()
        expected = layer(*inputs)
        for found, wanted in zip(compiled(*inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_compile_without_a_graph_break():
    compiled_matches_eager("aot_eager")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="inductor needs triton and a C compiler",
)
def test_compile_by_inductor():
    compiled_matches_eager("inductor")


def test_autocast_leaves_the_operator_alone():
    inputs = Problem(dtype=torch.bfloat16).inputs()
    with torch.autocast(DEVICE, dtype=torch.float16):
        out, lse = attention(*inputs)
    compare(out, lse, *inputs)


def test_inference_mode():
    with torch.inference_mode():
        check(*Problem().inputs(), causal=True)


def changed(**changes):
    names = {"q": 0, "k": 1, "v": 2}

    def make():
        tensors = list(Problem().inputs())
        for tensor_name, change in changes.items():
            tensors[names[tensor_name]] = change(tensors[names[tensor_name]])
        return tensors

    return make


WRONG = [
    (changed(k=lambda x: x.cpu()), {}, ValueError, "device"),
    (
        changed(q=lambda x: x.cpu(), k=lambda x: x.cpu(), v=lambda x: x.cpu()),
        {},
        ValueError,
        "CUDA",
    ),
    (
        changed(q=lambda x: x.float(), k=lambda x: x.float(), v=lambda x: x.float()),
        {},
        TypeError,
        "float32",
    ),
    (changed(k=lambda x: x.half()), {}, TypeError, "dtype"),
    (changed(k=lambda x: x[:, :-1]), {}, ValueError, "sequence length"),
    (changed(v=lambda x: x[:, :, :-1]), {}, ValueError, "heads"),
    (changed(k=lambda x: x[..., :-8]), {}, ValueError, "head dimension"),
    (changed(q=lambda x: x[..., :12], k=lambda x: x[..., :12]), {}, ValueError, "multiple of 8"),
    (changed(q=lambda x: x[0]), {}, ValueError, "4 dimensions"),
    (changed(), {"softmax_scale": math.nan}, ValueError, "softmax_scale"),
    (changed(), {"softcap": -1.0}, ValueError, "softcap"),
    (changed(), {"window_size": (-2, 0)}, ValueError, "window_size"),
    (changed(), {"sm_margin": -1}, ValueError, "sm_margin"),
    (changed(), {"num_splits": 2}, NotImplementedError, "num_splits"),
]


@pytest.mark.parametrize("make, options, error, words", WRONG)
def test_wrong_inputs_raise_and_do_no_harm(make, options, error, words):
    with pytest.raises(error, match=words):
        attention(*make(), **options)
    torch.cuda.synchronize()
    check(*Problem(seqlen_q=20, seqlen_k=20).inputs())


def test_head_dims_that_no_kernel_holds():
    for head_dim, head_dim_v in ((264, 264), (256, 128), (64, 136), (200, 64)):
        problem = Problem(head_dim=head_dim, head_dim_v=head_dim_v)
        with pytest.raises(ValueError, match="head dimension"):
            attention(*problem.inputs())


def test_memory_is_given_back():
    inputs = Problem(seqlen_q=1000, seqlen_k=1000).inputs()
    attention(*inputs, causal=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        attention(*inputs, causal=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
