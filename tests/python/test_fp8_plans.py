"""What the FP8 operators keep of a call: nothing that another call could get wrong."""

import contextlib

import pytest
import torch
from fp8_library import FP8, install, random_qkv
from test_quantize import PARTS, bits, packed_qkv

import hopper_attention
from hopper_attention import attention_fp8, ops, ops_fp8, ops_quantize
from hopper_attention.recipe import Fp8Recipe

SCALARS = (0.2, False, -1, -1, 0.0, 0)


@pytest.fixture
def library(monkeypatch):
    return install(monkeypatch)


class Quantizer:
    """Stands in for the library's quantizer: records addresses, and fills what it is given."""

    def __init__(self):
        self.calls = []
        self.prepared = []

    def call_table(self, *memory):
        """None, as where PyTorch cannot show the library its tensors."""

    def prepare_quantize(self, packed, longs, ints, signs):
        self.prepared.append((packed, longs, ints, signs))
        return lambda *addresses: self.calls.append(addresses), 100


@pytest.fixture
def quantizer(monkeypatch):
    install(monkeypatch)
    fake = Quantizer()
    monkeypatch.setattr("hopper_attention._library._module", fake)
    monkeypatch.setattr(ops_quantize, "_plans", {})
    return fake


def run_quantizer(q, k, v, recipe=None, tables=(None,) * 4, rotary=(False, None, 0)):
    """The operator's kernel for CUDA."""
    r = recipe or Fp8Recipe()
    fields = (r.qk_scale, r.v_scale, r.hadamard, r.seed, r.smooth_k, r.transpose_v)
    return ops_quantize._quantize_cuda(q, k, v, *tables, *fields, *rotary)


def forward(q, k, v, *scales, sink=None, out_dtype=torch.bfloat16, transposed=False, fast=False,
            scalars=SCALARS):  # fmt: skip
    scales = (*scales, *[None] * (4 - len(scales)))
    return ops_fp8.forward_fp8(q, k, v, *scales, sink, out_dtype, transposed, fast, *scalars)


def e4m3_qkv(**sizes):
    return tuple(x.to(FP8) for x in random_qkv(**sizes))


def heads_first(x):
    """The same values, each head in one piece."""
    as_bytes = x.view(torch.uint8) if x.dtype == FP8 else x
    return as_bytes.transpose(1, 2).contiguous().transpose(1, 2).view(x.dtype)


def shifted(x, elements):
    """The same values at an address that is that much off."""
    storage = torch.zeros(x.numel() + 16, dtype=torch.uint8 if x.dtype == FP8 else x.dtype)
    moved = storage[elements : elements + x.numel()].view(x.dtype).view(x.shape)
    return moved.copy_(x)


def test_quantizer_calls_of_one_problem_are_prepared_once(quantizer):
    q, k, v = random_qkv()
    for _ in range(3):
        run_quantizer(q, k, v)
    run_quantizer(*random_qkv())
    assert (len(quantizer.prepared), len(quantizer.calls)) == (1, 4)
    tables = (torch.zeros(20, 8), torch.zeros(20, 8), None, None)
    others = [
        lambda: run_quantizer(q.half(), k.half(), v.half()),
        lambda: run_quantizer(q, heads_first(k), v),
        lambda: run_quantizer(q, k[:, :8], v[:, :8]),
        *(
            lambda recipe=recipe: run_quantizer(q, k, v, recipe)
            for recipe in (
                Fp8Recipe("token"),
                Fp8Recipe(v_scale="head"),
                Fp8Recipe(hadamard=False),
                Fp8Recipe(seed=1),
                Fp8Recipe(smooth_k=True),
                Fp8Recipe(transpose_v=False),
            )
        ),
        lambda: run_quantizer(q, k, v, tables=tables),
        lambda: run_quantizer(q, k, v, tables=tables, rotary=(True, None, 0)),
        lambda: run_quantizer(q, k, v, tables=tables, rotary=(False, 3, 0)),
        lambda: run_quantizer(q, k, v, tables=tables, rotary=(False, None, 2)),
        lambda: run_quantizer(q, k, v, tables=(*(x[:15] for x in tables[:2]), None, None)),
    ]
    for count, other in enumerate(others, start=2):
        for _ in range(2):
            other()
            assert len(quantizer.prepared) == count
    assert len(set(quantizer.prepared)) == len(quantizer.prepared)


def test_a_prepared_quantizer_is_given_this_calls_addresses(quantizer):
    (q, k, v), bounds = packed_qkv([3, 130], [77, 5], d=24, d_v=40)
    recipe = Fp8Recipe(transpose_v=False)
    for _ in range(2):
        (q, k, v), bounds = packed_qkv([3, 130], [77, 5], d=24, d_v=40)
        q, cos, sin = shifted(q, 1), shifted(torch.zeros(200, 8), 1), torch.zeros(200, 8).half()
        outputs = run_quantizer(q, k, v, recipe, (cos, sin, *bounds.values()))
        call = quantizer.calls[-1]
        assert call[:5] == tuple(x.data_ptr() for x in (q, k, v, *bounds.values()))
        for copy, x in zip(call[5:7], (cos, sin), strict=True):
            assert copy % 16 == 0
            assert copy != x.data_ptr()
        assert call[7:15] == tuple(x.data_ptr() for x in outputs)
    assert len(quantizer.prepared) == 1


def test_a_last_dimension_with_gaps_is_copied_in_every_call(quantizer):
    q, k, v = random_qkv(d=64)
    gaps = k[..., ::2]
    for count in (1, 2):
        run_quantizer(q[..., :32].contiguous(), gaps, v)
        assert quantizer.calls[-1][1] not in (0, gaps.data_ptr())
        assert quantizer.prepared[-1][1][3:6] == (9 * 2 * 32, 2 * 32, 32)
        assert len(quantizer.prepared) == count


@pytest.mark.parametrize("shape", [{}, {"seqlen_q": 0}, {"batch": 0}, {"heads": 0, "heads_kv": 0}])
@pytest.mark.parametrize(
    "recipe",
    [Fp8Recipe(), Fp8Recipe("token", "token", smooth_k=True, transpose_v=False)],
    ids=["default", "token"],
)
@pytest.mark.parametrize("d", [32, 40])
def test_the_quantizers_outputs_are_as_on_the_cpu(quantizer, shape, recipe, d):
    qkv = random_qkv(**shape, d=d)
    expected = ops_quantize._quantize_cpu(*qkv, *(None,) * 4, recipe.qk_scale, recipe.v_scale,
                                          recipe.hadamard, 0, recipe.smooth_k, recipe.transpose_v,
                                          False, None, 0)  # fmt: skip
    for _ in range(2):
        for name, x, y in zip(PARTS, run_quantizer(*qkv, recipe), expected, strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), name
            # the kernel fills the gap behind the last row, too
            assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes(), name
    assert len(quantizer.calls) == (0 if 0 in (qkv[0].shape[0], qkv[0].shape[2]) else 2)


def test_a_quantizer_that_was_prepared_still_refuses(quantizer):
    q, k, v = random_qkv()
    run_quantizer(q, k, v)
    for _ in range(2):
        with pytest.raises(TypeError, match="q, k and v must have one dtype"):
            run_quantizer(q, k.half(), v)
        with pytest.raises(ValueError, match="must be on one device, got cpu, meta, cpu"):
            run_quantizer(q, k.to("meta"), v)
        with pytest.raises(ValueError, match='qk_scale must be "tensor"'):
            ops_quantize._quantize_cuda(q, k, v, *[None] * 4, "row", "head", True, 0, False, True,
                                        False, None, 0)  # fmt: skip
        with pytest.raises(ValueError, match="rotary_sin is None"):
            run_quantizer(q, k, v, tables=(torch.zeros(20, 8), None, None, None))
    assert len(quantizer.calls) == 1


def test_forward_calls_of_one_problem_are_prepared_once(library):
    q, k, v = e4m3_qkv()
    scale = torch.ones(2, 2)
    for _ in range(3):
        forward(q, k, v, scale)
    forward(*e4m3_qkv(), scale + 1)
    assert (library.prepared, len(library.calls)) == (1, 4)
    per_channel = torch.ones(2, 2, 32)
    others = [
        {"scales": (scale[:, :1].expand(2, 2),)},
        {"scales": (torch.ones(2, 4, 1),)},
        {"scales": (None, scale)},
        {"scales": (None, None, scale)},
        {"scales": (None, None, per_channel)},
        {"scales": (None, None, None, torch.ones(2, 2, 9))},
        {"out_dtype": torch.float16},
        {"fast": True},
        *(
            {"scalars": scalars}
            for scalars in (
                (0.3, False, -1, -1, 0.0, 0),
                (0.2, True, -1, -1, 0.0, 0),
                (0.2, False, 3, -1, 0.0, 0),
                (0.2, False, -1, 3, 0.0, 0),
                (0.2, False, -1, -1, 2.0, 0),
                (0.2, False, -1, -1, 0.0, 1),
            )
        ),
        {"tensors": (heads_first(q), k, v)},
        {"tensors": (q, k[:, :8], v[:, :8])},
    ]
    for count, other in enumerate(others, start=2):
        for _ in range(2):
            arguments = dict(other)
            tensors = arguments.pop("tensors", (q, k, v))
            forward(*tensors, *arguments.pop("scales", ()), **arguments)
            assert library.prepared == count
    sink = torch.zeros(4)
    forward(q, k, v, scale, sink=sink)
    assert (library.prepared, library.pointers[-1]["sink"]) == (count, sink.data_ptr())


def test_a_prepared_forward_still_looks_at_addresses(library):
    q, k, v = e4m3_qkv()
    expected = forward(q, k, v)
    odd = shifted(k, 1)
    for count in (2, 3):
        found = forward(q, odd, v)
        assert library.pointers[-1]["k"] not in (odd.data_ptr(), k.data_ptr())
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert library.prepared == count
    forward(q, k, v)
    assert (library.pointers[-1]["k"], library.prepared) == (k.data_ptr(), count)


def test_scales_with_gaps_are_copied_in_every_call(library):
    q, k, v = e4m3_qkv()
    gaps = torch.rand(2, 2, 64)[..., ::2]
    expected = forward(q, k, v, None, None, gaps.contiguous())
    for count in (2, 3):
        found = forward(q, k, v, None, None, gaps)
        assert library.pointers[-1]["v_descale"] != gaps.data_ptr()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert library.prepared == count


def test_a_forward_that_was_prepared_still_refuses(library):
    q, k, v = e4m3_qkv()
    scale = torch.ones(2, 2)
    forward(q, k, v, scale)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be on one device, got cpu, meta, cpu"):
            forward(q, k.to("meta"), v, scale)
        with pytest.raises(ValueError, match="q_descale must be on q's device, cpu, got meta"):
            forward(q, k, v, scale.to("meta"))
        with pytest.raises(TypeError, match=r"q_descale must be torch.float32, got torch.float64"):
            forward(q, k, v, scale.double())
        with pytest.raises(ValueError, match=r"learnable_sink must have shape .* got \(3,\)"):
            forward(q, k, v, scale, sink=torch.zeros(3))
        with pytest.raises(ValueError, match="softmax_scale must be a finite float32, got nan"):
            forward(q, k, v, scale, scalars=(float("nan"), *SCALARS[1:]))
        with pytest.raises(NotImplementedError, match="have no gradient"):
            forward(q, k, v.clone().requires_grad_(), scale)
    assert (library.prepared, len(library.calls)) == (1, 1)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen_q": 0}, {"heads": 0}])
def test_empty_forwards_launch_nothing(library, empty):
    q, k, v = e4m3_qkv(**empty)
    for _ in range(2):
        out, lse = forward(q, k, v)
        assert (out.shape, lse.shape) == (q.shape, (q.shape[0], q.shape[2], q.shape[1]))
    assert (library.prepared, library.calls) == (1, [])


@pytest.mark.parametrize("run", [run_quantizer, forward], ids=["quantize", "forward"])
def test_device_is_the_tensors_during_the_launch(monkeypatch, request, run):
    fake = request.getfixturevalue("quantizer" if run is run_quantizer else "library")
    current, launched_on = [3], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], torch.empty(0, device=wanted).get_device()
        yield
        current[0] = before

    def prepare(*arguments):
        def launch(*addresses):
            launched_on.append(current[0])

        return (launch, 16) if run is run_quantizer else launch

    monkeypatch.setattr(ops, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(fake, "prepare_quantize", prepare, raising=False)
    monkeypatch.setattr(fake, "prepare_fp8", prepare, raising=False)
    run(*(random_qkv() if run is run_quantizer else e4m3_qkv()))
    assert launched_on == [-1]
    assert current == [3]


def test_plans_are_bounded(library, quantizer, monkeypatch):
    monkeypatch.setattr(ops, "_MAX_PLANS", 3)
    for seed in range(5):
        run_quantizer(*random_qkv(), Fp8Recipe(seed=seed))
        assert len(ops_quantize._plans) == seed % 3 + 1
    install(monkeypatch)
    for margin in range(5):
        forward(*e4m3_qkv(), scalars=(*SCALARS[:5], margin))
        assert len(ops_fp8._plans) == margin % 3 + 1


def test_a_recipe_is_checked_once_for_each_call(gradient_library, monkeypatch):
    monkeypatch.setattr(attention_fp8, "_checked", {})
    monkeypatch.setattr(ops, "_MAX_PLANS", 3)
    recipes = []

    def attend(x, scalars, out_dtype, with_lse):
        recipes.append(x.recipe)
        return torch.zeros(2, 6, 4, 32, dtype=out_dtype), torch.zeros(2, 4, 6)

    monkeypatch.setattr(attention_fp8, "attend", attend)
    q, k, v = (x.requires_grad_() for x in random_qkv())
    wanted = [Fp8Recipe(seed=seed) for seed in (0, 0, 1, 2, 3)]
    for recipe, count in zip(wanted, (1, 1, 2, 3, 1), strict=True):
        hopper_attention.flash_attn_fp8_func(q, k, v, recipe)
        assert len(attention_fp8._checked) == count
    assert recipes == wanted
    for _ in range(2):
        with pytest.raises(ValueError, match=r"softcap must be 0 .* or a positive"):
            hopper_attention.flash_attn_fp8_func(q, k, v, softcap=-1.0)


def test_repeated_calls_quantize_alike():
    q, k, v = random_qkv(d=40)
    first, second = (hopper_attention.quantize(q, k, v) for _ in range(2))
    assert all(torch.equal(bits(getattr(first, x)), bits(getattr(second, x))) for x in PARTS[:6])
