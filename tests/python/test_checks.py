"""Every error of the argument checks, by name: what it was, and what is allowed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopper_attention import checks


def qkv(batch=2, seqlen_q=3, seqlen_k=5, heads=4, heads_kv=2, head_dim=64, head_dim_v=64, **like):
    like = {"dtype": torch.float16, "device": "meta"} | like
    return [
        torch.empty(batch, seqlen_q, heads, head_dim, **like),
        torch.empty(batch, seqlen_k, heads_kv, head_dim, **like),
        torch.empty(batch, seqlen_k, heads_kv, head_dim_v, **like),
    ]


@given(
    batch=st.integers(0, 3),
    seqlen_q=st.integers(0, 3),
    seqlen_k=st.integers(0, 3),
    heads_kv=st.integers(0, 3),
    group=st.integers(0, 3),
    head_dim=st.integers(0, 300),
    head_dim_v=st.integers(0, 300),
)
def test_shapes_that_fit(batch, seqlen_q, seqlen_k, heads_kv, group, head_dim, head_dim_v):
    dims = (batch, seqlen_q, seqlen_k, heads_kv * group, heads_kv, head_dim, head_dim_v)
    assert checks.attention_dims(*qkv(*dims)) == dims


@pytest.mark.parametrize(
    "position, shape, message",
    [
        (0, (3, 4, 64), r"q must have 4 dimensions .* got 3: \(3, 4, 64\)"),
        (1, (2, 5, 128), r"k must have 4 dimensions .* got 3: \(2, 5, 128\)"),
        (2, (1, 2, 5, 2, 64), r"v must have 4 dimensions .* got 5"),
        (1, (1, 5, 2, 64), r"q, k and v must have the same batch .* got q 2, k 1, v 2"),
        (2, (1, 5, 2, 64), r"q, k and v must have the same batch .* got q 2, k 2, v 1"),
        (2, (2, 6, 2, 64), r"k and v must have the same sequence length .* got k 5, v 6"),
        (2, (2, 5, 4, 64), r"k and v must have the same number of heads .* got k 2, v 4"),
        (1, (2, 5, 2, 32), r"q and k must have the same head dimension .* got q 64, k 32"),
        (0, (2, 3, 3, 64), r"heads of q must be a multiple .* got q 3, k and v 2"),
    ],
)
def test_shapes_that_do_not_fit(position, shape, message):
    tensors = qkv()
    tensors[position] = torch.empty(shape, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=message):
        checks.attention_dims(*tensors)


def test_heads_without_any_to_read():
    q, k, v = qkv(heads=4, heads_kv=0)
    with pytest.raises(ValueError, match=r"heads of q must be a multiple .* got q 4, k and v 0"):
        checks.attention_dims(q, k, v)


@pytest.mark.parametrize("position", [1, 2])
def test_dtypes_differ(position):
    tensors = qkv()
    tensors[position] = tensors[position].to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"must have one dtype, got torch\.float16, .*bfloat16"):
        checks.attention_dims(*tensors)


@pytest.mark.parametrize("position", [1, 2])
def test_devices_differ(position):
    tensors = qkv()
    tensors[position] = torch.empty(2, 5, 2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must be on one device, got meta, .*cpu"):
        checks.attention_dims(*tensors)


def test_not_tensors():
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor, got ndarray"):
        checks.tensors(q=torch.empty(1), k=np.zeros(1))


@pytest.mark.parametrize("dtype, code", [(torch.float16, 0), (torch.bfloat16, 1)])
@pytest.mark.parametrize(
    "head_dims", [(8, 8), (64, 64), (104, 104), (256, 256), (192, 128), (64, 128), (96, 8)]
)
def test_kernel_limits_allow(dtype, code, head_dims):
    assert checks.kernel_limits(dtype, *head_dims) == code


@pytest.mark.parametrize("head_dim", [0, 4, 100, 264])
def test_head_dim_out_of_range(head_dim):
    message = f"head dimension of q and k must be a multiple of 8 from 8 to 256, got {head_dim}"
    with pytest.raises(ValueError, match=message):
        checks.kernel_limits(torch.float16, head_dim, head_dim)


@pytest.mark.parametrize("head_dims", [(64, 0), (64, 12), (64, 136), (200, 128), (256, 64)])
def test_head_dim_of_v_out_of_range(head_dims):
    message = f"head dimension of v must equal .* got {head_dims[1]} beside {head_dims[0]}"
    with pytest.raises(ValueError, match=message):
        checks.kernel_limits(torch.float16, *head_dims)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_other_dtypes(dtype):
    message = f"must be torch.float16 or torch.bfloat16, got {dtype}"
    with pytest.raises(TypeError, match=message):
        checks.kernel_limits(dtype, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_has_an_operator_of_its_own(dtype):
    with pytest.raises(NotImplementedError, match=f"{dtype} is not built here; use torch.float16"):
        checks.kernel_limits(dtype, 64, 64)


GOOD_SCALARS = {
    "softmax_scale": 0.125,
    "window_left": -1,
    "window_right": 2**40,
    "softcap": 0.0,
    "sm_margin": 0,
}


def test_scalars_allowed():
    checks.scalars(**GOOD_SCALARS)
    checks.scalars(**GOOD_SCALARS | {"softmax_scale": -3.0, "softcap": 30.0, "sm_margin": 8})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"softmax_scale": float("nan")}, "softmax_scale must be a finite float32, got nan"),
        ({"softmax_scale": float("-inf")}, "softmax_scale must be a finite float32, got -inf"),
        ({"softmax_scale": 1e39}, r"softmax_scale must be a finite float32, got 1e\+39"),
        ({"window_left": -2}, r"window_size must be \(left, right\).* got \(-2, 1099511627776\)"),
        ({"window_right": -7}, r"window_size must be \(left, right\).* got \(-1, -7\)"),
        ({"softcap": -1.0}, r"softcap must be 0 \(off\) or a positive finite .* got -1.0"),
        ({"softcap": float("inf")}, "softcap must be 0 .* got inf"),
        ({"softcap": float("nan")}, "softcap must be 0 .* got nan"),
        ({"sm_margin": -1}, "sm_margin must be .* 0 or more; got -1"),
        ({"sm_margin": 2**31}, "sm_margin must be .* got 2147483648"),
    ],
)
def test_scalars_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        checks.scalars(**GOOD_SCALARS | wrong)


@pytest.mark.parametrize(
    "position, name",
    [
        (0, "batch"),
        (1, "sequence length of q"),
        (2, "sequence length of k and v"),
        (3, "number of heads of q"),
    ],
)
def test_lengths_beyond_what_kernels_count(position, name):
    dims = [1, 1, 1, 1]
    dims[position] = checks.MAX_LENGTH
    checks.lengths(*dims)
    dims[position] += 1
    with pytest.raises(ValueError, match=f"{name} must be at most 1073741823, got 1073741824"):
        checks.lengths(*dims)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_no_gradient(position):
    tensors = qkv(device="cpu")
    checks.no_gradient(*tensors)
    tensors[position].requires_grad_()
    with torch.no_grad():
        checks.no_gradient(*tensors)
    with pytest.raises(NotImplementedError, match=r"have no gradient.*16-bit.*no_grad"):
        checks.no_gradient(*tensors)


@pytest.mark.parametrize("shape, scale", [((1, 1, 1, 64), 0.125), ((1, 1, 1, 0), 1.0), ((), 1.0)])
def test_default_scale(shape, scale):
    assert checks.default_scale(torch.empty(shape, device="meta")) == scale


@pytest.mark.parametrize("value", [1, 1.5, np.float32(1.5), np.int64(2)])
def test_real(value):
    result = checks.real("softcap", value)
    assert type(result) is float
    assert result == value


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0), 1j])
def test_not_real(value):
    with pytest.raises(TypeError, match=f"softcap must be a float, got {type(value).__name__}"):
        checks.real("softcap", value)


@pytest.mark.parametrize("value", [3, np.int32(3)])
def test_integer(value):
    result = checks.integer("sm_margin", value)
    assert type(result) is int
    assert result == 3


@pytest.mark.parametrize("value", ["1", None, True, 1.0, torch.tensor(1)])
def test_not_an_integer(value):
    with pytest.raises(TypeError, match=f"sm_margin must be an int, got {type(value).__name__}"):
        checks.integer("sm_margin", value)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_flag(value):
    assert checks.flag("causal", value) is bool(value)


@pytest.mark.parametrize("value", [0, 1, None, "yes", torch.tensor(True)])
def test_not_a_flag(value):
    with pytest.raises(TypeError, match="causal must be True or False, got "):
        checks.flag("causal", value)


@pytest.mark.parametrize(
    "window_size, expected",
    [
        (None, (-1, -1)),
        ((3, 4), (3, 4)),
        ([3, None], (3, -1)),
        ((None, 0), (-1, 0)),
        ((np.int64(5), -1), (5, -1)),
    ],
)
def test_window(window_size, expected):
    assert checks.window(window_size) == expected


@pytest.mark.parametrize(
    "window_size, message",
    [
        (3, r"window_size must be a pair \(left, right\) or None, got int"),
        ("ab", r"window_size must be a pair \(left, right\) or None, got str"),
        ((1, 2, 3), "window_size must have 2 numbers, got 3"),
        ((1.0, 2), r"window_size\[0\] must be an int, got float"),
        ((1, "2"), r"window_size\[1\] must be an int, got str"),
    ],
)
def test_not_a_window(window_size, message):
    with pytest.raises(TypeError, match=message):
        checks.window(window_size)
