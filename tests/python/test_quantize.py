"""`quantize` and `Quantized` on the CPU, and what the operator passes to the library."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import hopper_attention
from hopper_attention import _library, ops, ops_quantize
from hopper_attention.quantized import Quantized
from hopper_attention.recipe import Fp8Recipe, arguments, signs

QUANTIZE = torch.ops.hopper_attention.quantize.default
RECIPES = [
    Fp8Recipe(qk, v, hadamard=hadamard, smooth_k=smooth, transpose_v=transpose)
    for qk, v, (hadamard, smooth, transpose) in itertools.product(
        ("tensor", "head", "block", "token"),
        ("tensor", "head", "channel", "token"),
        ((True, False, True), (False, True, False)),
    )
]
PARTS = ["q", "k", "v", "q_descale", "k_descale", "v_descale", "v_token_factor", "k_mean"]


def random_qkv(batch=2, seqlen_q=130, seqlen_k=257, heads=4, heads_kv=2, d=32, d_v=None):
    return (
        torch.randn(batch, seqlen_q, heads, d).bfloat16(),
        torch.randn(batch, seqlen_k, heads_kv, d).bfloat16() + 3,
        torch.randn(batch, seqlen_k, heads_kv, d if d_v is None else d_v).bfloat16(),
    )


def packed_qkv(lengths_q, lengths_k, **sizes):
    q, k, v = random_qkv(1, sum(lengths_q), sum(lengths_k), **sizes)
    bounds = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return (q[0], k[0], v[0]), {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}


def assert_close_to(found, expected):
    """e4m3 has 4 significant bits: half a step is 1/16 of a number near the largest."""
    for name, one, other in zip("qkv", found, expected, strict=True):
        assert one.shape == other.shape
        error = (one - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30)
        assert error < 0.08, name


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def assert_same(one, other):
    for part in PARTS:
        x, y = getattr(one, part), getattr(other, part)
        assert (x is None) == (y is None), part
        if x is not None:
            assert x.stride() == y.stride(), part
            assert torch.equal(bits(x), bits(y)), part
    assert one.recipe == other.recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_there_and_back(recipe):
    inputs = random_qkv(d=72, d_v=40)
    quantized = hopper_attention.quantize(*inputs, recipe)
    assert_close_to(quantized.dequantize(), inputs)
    assert [x.dtype for x in quantized.dequantize(torch.bfloat16)] == [torch.bfloat16] * 3
    assert_same(Quantized.from_state_dict(quantized.state_dict()), quantized)
    assert_same(quantized.to("cpu"), quantized)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_packed_sequences_are_as_if_alone(recipe):
    lengths_q, lengths_k = [3, 0, 128, 150], [130, 4, 0, 257]
    inputs, bounds = packed_qkv(lengths_q, lengths_k, d=24)
    quantized = hopper_attention.quantize(*inputs, recipe, **bounds)
    assert quantized.packed
    assert_close_to(quantized.dequantize(), inputs)
    assert_same(Quantized.from_state_dict(quantized.state_dict()), quantized)
    if "tensor" in (recipe.qk_scale, recipe.v_scale):
        return
    begin_q = begin_k = 0
    found = quantized.dequantize()
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        of_q, of_k = slice(begin_q, begin_q + length_q), slice(begin_k, begin_k + length_k)
        alone = hopper_attention.quantize(
            inputs[0][None, of_q], inputs[1][None, of_k], inputs[2][None, of_k], recipe
        ).dequantize()
        for x, y, place in zip(found, alone, (of_q, of_k, of_k), strict=True):
            assert torch.equal(x[place], y[0])
        begin_q, begin_k = begin_q + length_q, begin_k + length_k


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_slots_of_packed_sequences_do_not_meet(lengths):
    total, begin, used = sum(lengths), 0, []
    for i, length in enumerate(lengths):
        first = ops_quantize.first_slot(begin, i)
        used += range(first, first + ops_quantize.slots(length, 0, False))
        begin += length
    assert len(set(used)) == len(used)
    assert all(0 <= slot < ops_quantize.slots(total, len(lengths), True) for slot in used)


def test_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    inputs, bounds = packed_qkv([5, 20], [7, 300], d=40)
    quantized = hopper_attention.quantize(*inputs, Fp8Recipe("token", "token", seed=3), **bounds)
    save_file(quantized.state_dict(), tmp_path / "x.safetensors")
    loaded = Quantized.from_state_dict(load_file(tmp_path / "x.safetensors"))
    assert_same(loaded, quantized)
    assert torch.equal(loaded.cu_seqlens_k, quantized.cu_seqlens_k)


def test_a_wrong_state_is_refused():
    state = hopper_attention.quantize(*random_qkv()).state_dict()
    with pytest.raises(ValueError, match="state lacks tensors of Quantized: q_descale"):
        Quantized.from_state_dict({k: v for k, v in state.items() if k != "q_descale"})
    with pytest.raises(ValueError, match="state has tensors that Quantized does not: more"):
        Quantized.from_state_dict({**state, "more": torch.zeros(1)})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_strides_do_not_matter(data):
    d = 8 * data.draw(st.integers(1, 5))
    inputs, views = [], []
    for heads in (4, 2, 2):
        shape = (2, data.draw(st.integers(0, 140)) if heads == 4 else 37, heads, d)
        x = torch.randn(shape).bfloat16()
        order = data.draw(st.permutations(range(4)))
        inverse = [order.index(i) for i in range(4)]
        around = torch.zeros([shape[i] + data.draw(st.integers(0, 2)) for i in order]).bfloat16()
        view = around[tuple(slice(around.shape[n] - shape[i], None) for n, i in enumerate(order))]
        view = view.permute(inverse)
        view.copy_(x)
        inputs.append(x)
        views.append(view)
    assert_same(hopper_attention.quantize(*views), hopper_attention.quantize(*inputs))


@pytest.mark.parametrize("recipe", RECIPES[::5], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_fake_tensors_are_shaped_like_real_ones(recipe, packed):
    inputs, bounds = packed_qkv([3, 130], [77, 5], d=24, d_v=40)
    if not packed:
        inputs, bounds = random_qkv(d=24, d_v=40), {}
    real = hopper_attention.quantize(*inputs, recipe, **bounds)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        fake = hopper_attention.quantize(
            *fakes, recipe, **{name: mode.from_tensor(x) for name, x in bounds.items()}
        )
    for part in PARTS:
        x, y = getattr(real, part), getattr(fake, part)
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), part


@pytest.mark.parametrize("rotary_offset", [None, 4])
def test_opcheck(rotary_offset):
    tables = (torch.randn(300, 8), torch.randn(300, 8))
    rest = ("block", "channel", True, 0, True, True, False, rotary_offset, 0)
    torch.library.opcheck(QUANTIZE, (*random_qkv(), *tables, None, None, *rest))
    inputs, bounds = packed_qkv([3, 130], [77, 5], d=24, d_v=40)
    torch.library.opcheck(QUANTIZE, (*inputs, None, None, *bounds.values(), *rest))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions(interleaved):
    q, k, v = random_qkv(seqlen_q=20, seqlen_k=50)
    angles = torch.randn(80, 16)
    tables = {
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
        "rotary_interleaved": interleaved,
    }
    whole = hopper_attention.quantize(q, k, v, Fp8Recipe("token"), **tables)
    apart = hopper_attention.quantize(
        q[:, 5:], k, v, Fp8Recipe("token"), **tables, rotary_q_offset=35
    )
    assert torch.equal(bits(whole.q[:, 5:]), bits(apart.q))
    later = hopper_attention.quantize(
        q, k[:, 10:], v[:, 10:], Fp8Recipe("token"), **tables, rotary_k_offset=10
    )
    assert torch.equal(bits(whole.k[:, 10:]), bits(later.k))
    assert torch.equal(bits(whole.q), bits(later.q))
    # rotary embedding stays applied
    assert not torch.allclose(whole.dequantize()[0], q.float(), atol=0.5)
    for options, message in (
        (
            {"rotary_q_offset": 0, "rotary_k_offset": 31},
            "k stands at positions 31 to 80, rotary_cos has 0 to 79",
        ),
        ({"rotary_q_offset": -1}, "q stands at positions -1 to 18"),
    ):
        with pytest.raises(ValueError, match=message):
            hopper_attention.quantize(q, k, v, **tables, **options)


ONES = torch.ones(300, 8)
BOUNDS = torch.tensor([0, 130], dtype=torch.int32)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"recipe": "block"}, TypeError, "recipe must be an Fp8Recipe, got str"),
        ({"rotary_cos": ONES}, ValueError, "rotary_sin is None"),
        ({"rotary_sin": ONES}, ValueError, "rotary_cos is None"),
        ({"rotary_cos": ONES, "rotary_sin": ONES[1:]}, ValueError, "must be .positions, rotary_di"),
        ({"rotary_cos": ONES.long(), "rotary_sin": ONES}, TypeError, "rotary_cos must be of 16 or"),
        (
            {"rotary_cos": ONES[:, :4], "rotary_sin": ONES[:, :4]},
            ValueError,
            "rotary_dim, .* must be a multiple of 16 up to head_dim 32, got 8",
        ),
        ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved must be True or False"),
        ({"rotary_q_offset": 1.5}, TypeError, "rotary_q_offset must be an int"),
        ({"cu_seqlens_q": BOUNDS}, ValueError, "cu_seqlens_k is None"),
        ({"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}, ValueError, "q must have 3 dimensions"),
        ({"cu_seqlens_q": 3}, TypeError, "cu_seqlens_q must be a torch.Tensor, got int"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        hopper_attention.quantize(*random_qkv(), **options)


@pytest.mark.parametrize(
    "bounds, error, message",
    [
        ([0, 100], ValueError, r"cu_seqlens_q must rise from 0 to 130, .* got \[0, 100\]"),
        ([1, 130], ValueError, "cu_seqlens_q must rise from 0"),
        ([0, 90, 80, 130], ValueError, "cu_seqlens_q must rise from 0"),
        ([0], ValueError, "cu_seqlens_q must be .batch . 1,.*, with at least 2 entries"),
        ([0.0, 130.0], TypeError, r"cu_seqlens_q must be torch.int32, got torch.float32"),
    ],
)
def test_wrong_bounds(bounds, error, message):
    inputs, good = packed_qkv([130], [130])
    bounds = torch.tensor(bounds)
    if not bounds.is_floating_point():
        bounds = bounds.int()
    good["cu_seqlens_k"] = good["cu_seqlens_k"].expand(1, -1)[0]
    if bounds.shape[0] == 4:
        good["cu_seqlens_k"] = torch.tensor([0, 90, 100, 130], dtype=torch.int32)
    with pytest.raises(error, match=message):
        hopper_attention.quantize(*inputs, cu_seqlens_q=bounds, cu_seqlens_k=good["cu_seqlens_k"])


def test_wrong_tensors():
    q, k, v = random_qkv()
    with pytest.raises(TypeError, match=r"must be torch.float16 or torch.bfloat16, got torch.fl"):
        hopper_attention.quantize(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="head dimension of v must be a multiple of 8"):
        hopper_attention.quantize(q, k, v[..., :20])
    with pytest.raises(NotImplementedError, match="have no gradient"):
        hopper_attention.quantize(q, k.requires_grad_(), v)


def test_no_derivative_is_dropped():
    q, k, v = random_qkv()
    cos, sin = torch.randn(2, 300, 8)
    rest = (*[None] * 4, *arguments(Fp8Recipe()), False, None, 0)

    def rotated(table):
        return hopper_attention.quantize(q, k, v, rotary_cos=cos, rotary_sin=table).q_descale

    def call_operator(x):
        return QUANTIZE(x, k, v, *rest)[0]

    for function, x in (
        (lambda x: hopper_attention.quantize(q, x, v).k_descale, k),
        (rotated, sin),
        (call_operator, q),
    ):
        function(x)
        with pytest.raises(NotImplementedError, match="have no gradient"):
            function(x.clone().requires_grad_())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                function(dual)
        if function is not call_operator:
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.func.jvp(function, (x,), (x,))


class Recorder:
    """Stands in for the library's quantizer."""

    def __init__(self):
        self.prepared = 0

    def prepare_quantize(self, packed, *arguments):
        self.packed = packed
        self.prepared += 1
        return lambda *addresses: self.quantize(addresses, *arguments), 1000

    def quantize(self, addresses, longs, ints, sign_bits):
        *pointers, workspace, stream = addresses
        self.call = (pointers, longs, ints, sign_bits)
        assert workspace % 16 == 0
        assert stream == 77


@pytest.fixture
def recorder(monkeypatch):
    library = Recorder()
    monkeypatch.setattr(_library, "_module", library)
    monkeypatch.setattr(ops_quantize, "_plans", {})
    monkeypatch.setattr(ops, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(ops, "_current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(ops, "_raw_stream", lambda device_index: 77)
    return library


def test_what_reaches_the_library(recorder):
    q, k, v = random_qkv(d=72, d_v=40)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = torch.randn(300, 24), torch.randn(300, 24)
    outputs = ops_quantize._quantize_cuda(
        *(q, k, v, cos, sin, None, None),
        *("token", "token", True, 5, True, True, True, None, 9),
    )
    pointers, longs, ints, sign_bits = recorder.call
    assert not recorder.packed
    assert pointers[:3] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert pointers[3:7] == [0, 0, cos.data_ptr(), sin.data_ptr()]
    assert pointers[7:] == [x.data_ptr() for x in outputs]
    assert longs[:9] == (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    assert longs[9:15] == (130 * 4 * 80, 4 * 80, 80, 257 * 2 * 80, 2 * 80, 80)
    assert longs[15:18] == (2 * 40 * 384, 384, 40 * 384)  # batch, channel, head
    assert longs[18:] == (9, 9)
    assert ints == (1, 2, 130, 257, 4, 2, 72, 40, 3, 3, 1, 1, 1, 48, 300, 1, 1)
    negative = signs(72, 5) < 0
    assert [bool(sign_bits[c // 32] >> c % 32 & 1) for c in range(72)] == negative.tolist()
    assert [x.shape for x in outputs[3:]] == [
        *((2, 4, 130), (2, 2, 257), (2, 2, 1), (2, 2, 257), (2, 2, 72))
    ]


def test_what_reaches_the_library_packed(recorder):
    (q, k, v), bounds = packed_qkv([3, 130], [77, 5], d=24, d_v=40)
    outputs = ops_quantize._quantize_cuda(
        *(q, k, v, None, None, *bounds.values()),
        *("block", "channel", False, 5, False, False, False, 3, 0),
    )
    pointers, longs, ints, sign_bits = recorder.call
    assert recorder.packed
    assert pointers[3:7] == [*(x.data_ptr() for x in bounds.values()), 0, 0]
    assert pointers[7:] == [x.data_ptr() for x in outputs]
    assert longs[:9] == (0, *q.stride()[:2], 0, *k.stride()[:2], 0, *v.stride()[:2])
    assert longs[9:18] == (0, 4 * 32, 32, 0, 2 * 32, 32, 0, 2 * 48, 48)
    assert ints == (1, 2, 133, 82, 4, 2, 24, 40, 2, 4, 0, 0, 0, 0, 0, 0, 0)
    assert not any(sign_bits)
    assert [x.shape for x in outputs[3:]] == [(4, 3), (2, 2), (2, 2, 40), (0,), (0,)]
