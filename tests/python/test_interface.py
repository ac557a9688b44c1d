"""The public functions: signatures, what they pass to the operator, what they refuse."""

import importlib.metadata
import inspect
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import hopper_attention
from hopper_attention import _library, interface, ops, ops_backward
from hopper_attention import flash_attn_func as attend
from hopper_attention import flash_attn_qkvpacked_func as attend_packed

DEFAULTS = {
    "softmax_scale": 0.125,
    "causal": False,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "sm_margin": 0,
    "learnable_sink": None,
    "deterministic": False,
}
# softmax_scale and causal have none.
OPERATOR_DEFAULTS = {
    argument.name: argument.default_value for argument in ops.operator._schema.arguments[3:]
}


@pytest.fixture
def operator(monkeypatch):
    """Stands in for the operator; holds the arguments of its last call."""

    class Operator:
        def __call__(self, q, k, v, *scalars):
            self.tensors = (q, k, v)
            left_out = list(OPERATOR_DEFAULTS.values())[len(scalars) :]
            self.scalars = dict(zip(DEFAULTS, (*scalars, *left_out), strict=True))
            return "out", "lse"

    recorder = Operator()
    monkeypatch.setattr(ops, "forward", recorder)
    monkeypatch.setattr(ops, "operator", recorder)  # with gradients
    monkeypatch.setattr(ops_backward, "differentiable", recorder)  # the same, past the dispatcher
    return recorder


def qkv(dtype=torch.bfloat16):
    return (
        torch.zeros(2, 6, 4, 64, dtype=dtype),
        torch.zeros(2, 5, 2, 64, dtype=dtype),
        torch.zeros(2, 5, 2, 64, dtype=dtype),
    )


def test_signature_of_flash_attn_func():
    parameters = inspect.signature(attend).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("q", inspect.Parameter.empty),
        ("k", inspect.Parameter.empty),
        ("v", inspect.Parameter.empty),
        ("softmax_scale", None),
        ("causal", False),
        ("qv", None),
        ("q_descale", None),
        ("k_descale", None),
        ("v_descale", None),
        ("window_size", (-1, -1)),
        ("attention_chunk", 0),
        ("softcap", 0.0),
        ("num_splits", 1),
        ("pack_gqa", None),
        ("deterministic", False),
        ("sm_margin", 0),
        ("return_attn_probs", False),
        ("learnable_sink", None),
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_signature_of_flash_attn_qkvpacked_func():
    parameters = inspect.signature(attend_packed).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("qkv", inspect.Parameter.empty),
        ("softmax_scale", None),
        ("causal", False),
        ("q_descale", None),
        ("k_descale", None),
        ("v_descale", None),
        ("window_size", (-1, -1)),
        ("attention_chunk", 0),
        ("softcap", 0.0),
        ("deterministic", False),
        ("num_heads_q", None),
        ("sm_margin", 0),
        ("return_attn_probs", False),
        ("learnable_sink", None),
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_defaults(operator):
    q, k, v = qkv()
    assert attend(q, k, v) == "out"
    assert operator.tensors == (q, k, v)
    assert operator.scalars == DEFAULTS


def test_returns_the_log_sum_exp_where_asked(operator):
    assert attend(*qkv(), return_attn_probs=True) == ("out", "lse")


@pytest.mark.parametrize(
    "arguments, passed",
    [
        ({"softmax_scale": 2}, {"softmax_scale": 2.0}),
        ({"softmax_scale": np.float32(0.5)}, {"softmax_scale": 0.5}),
        ({"causal": True}, {"causal": True}),
        ({"causal": np.True_}, {"causal": True}),
        ({"window_size": (3, None)}, {"window_left": 3}),
        ({"window_size": [-1, 7]}, {"window_right": 7}),
        ({"window_size": None}, {}),
        ({"softcap": 30}, {"softcap": 30.0}),
        ({"sm_margin": np.int64(4)}, {"sm_margin": 4}),
        ({"num_splits": 1}, {}),
        ({"num_splits": 0}, {}),
        ({"pack_gqa": True}, {}),
        ({"pack_gqa": False}, {}),
        ({"deterministic": True}, {}),  # where no tensor requires grad
    ],
)
def test_arguments_reach_the_operator(operator, arguments, passed):
    attend(*qkv(), **arguments)
    assert operator.scalars == DEFAULTS | passed
    for name, value in operator.scalars.items():
        assert type(value) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    "name, value",
    [
        ("qv", torch.zeros(1)),
        ("attention_chunk", 128),
        ("num_splits", 2),
    ],
)
def test_what_is_not_built_yet(name, value):
    with pytest.raises(NotImplementedError, match=f"^{name} is not built yet: it must be "):
        attend(*qkv(), **{name: value})


def test_what_is_not_built_yet_packed():
    with pytest.raises(NotImplementedError, match=r"^attention_chunk is not built yet"):
        attend_packed(torch.zeros(2, 6, 3, 4, 64, dtype=torch.float16), attention_chunk=1)


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_sixteen_bits_have_no_scales(name):
    message = f"^{name} must be None where q is torch.float16: scales belong to torch.float8_e4m3fn"
    with pytest.raises(ValueError, match=message):
        attend(*qkv(torch.float16), **{name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=message):
        attend_packed(torch.zeros(2, 6, 3, 4, 64, dtype=torch.float16), **{name: torch.ones(2, 2)})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale must be a float, got Te"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"window_size": 5}, TypeError, "window_size must be a pair"),
        ({"softcap": "1"}, TypeError, "softcap must be a float, got str"),
        ({"sm_margin": 1.0}, TypeError, "sm_margin must be an int, got float"),
        ({"num_splits": -1}, ValueError, "num_splits must be 0 or more, got -1"),
        ({"num_splits": "a"}, TypeError, "num_splits must be an int, got str"),
        ({"pack_gqa": 3}, TypeError, "pack_gqa must be True or False, got 3"),
    ],
)
def test_arguments_of_wrong_types(operator, arguments, error, message):
    with pytest.raises(error, match=message):
        attend(*qkv(), **arguments)
    assert not hasattr(operator, "tensors")


def test_not_a_tensor():
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor, got list"):
        attend(q, k.tolist(), v)
    with pytest.raises(TypeError, match=r"qkv must be a torch\.Tensor, got NoneType"):
        attend_packed(None)


def test_tensors_on_the_cpu():
    message = r"must be on a CUDA device, got cpu; .*reference\.attention .*emulation\.attention"
    with pytest.raises(ValueError, match=message):
        attend(*qkv())


def test_deterministic_reaches_the_operator_with_gradients(operator):
    q, k, v = qkv()
    attend(q, k.requires_grad_(), v, deterministic=np.True_)
    assert operator.scalars == DEFAULTS | {"deterministic": True}
    with pytest.raises(TypeError, match="deterministic must be True or False, got 1"):
        attend(q, k, v, deterministic=1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_inputs_that_require_grad(position):
    tensors = [x.to("meta") for x in qkv()]
    tensors[position].requires_grad_()
    out, lse = attend(*tensors, return_attn_probs=True)
    assert out.requires_grad
    assert lse.requires_grad
    with torch.no_grad():
        out = attend(*tensors)
    assert out.shape == tensors[0].shape
    assert not out.requires_grad


def test_packed_heads(operator):
    qkv = torch.randn(2, 6, 3, 4, 64)
    attend_packed(qkv, causal=True, window_size=(9, 0), softcap=2.0, sm_margin=1)
    for i, part in enumerate(operator.tensors):
        assert part.data_ptr() == qkv[:, :, i].data_ptr()  # not a copy
        assert torch.equal(part, qkv[:, :, i])
    assert operator.scalars == DEFAULTS | {
        "causal": True, "window_left": 9, "window_right": 0, "softcap": 2.0, "sm_margin": 1
    }  # fmt: skip


@pytest.mark.parametrize("num_heads_q, heads_kv", [(4, 1), (4, 2), (2, 2), (0, 0)])
def test_packed_grouped_heads(operator, num_heads_q, heads_kv):
    qkv = torch.randn(2, 6, num_heads_q + 2 * heads_kv, 64)
    assert attend_packed(qkv, num_heads_q=num_heads_q, return_attn_probs=True) == ("out", "lse")
    parts = qkv.tensor_split([num_heads_q, num_heads_q + heads_kv], dim=2)
    for part, expected in zip(operator.tensors, parts, strict=True):
        assert part.data_ptr() == expected.data_ptr()
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    "shape, num_heads_q, message",
    [
        ((2, 6, 4, 64), None, "num_heads_q must be given where qkv has 4 dimensions"),
        ((2, 6, 5, 64), 2, "num_heads_q must leave an even number .* got 2 of qkv's 5 heads"),
        ((2, 6, 4, 64), 6, "num_heads_q must leave an even number .* got 6 of qkv's 4 heads"),
        ((2, 6, 4, 64), -2, "num_heads_q must leave an even number .* got -2"),
        ((2, 6, 3, 4, 64), 3, "num_heads_q must be None or qkv's 4 heads .* got 3"),
        ((2, 6, 2, 4, 64), None, r"qkv must be .* got shape \(2, 6, 2, 4, 64\)"),
        ((6, 4, 64), 2, r"qkv must be .* got shape \(6, 4, 64\)"),
    ],
)
def test_packed_shapes_that_do_not_fit(shape, num_heads_q, message):
    with pytest.raises(ValueError, match=message):
        attend_packed(torch.zeros(shape, dtype=torch.float16), num_heads_q=num_heads_q)


def test_packed_num_heads_q_may_repeat_what_qkv_says(operator):
    assert attend_packed(torch.zeros(2, 6, 3, 4, 64), num_heads_q=4) == "out"


def test_public_names():
    for name in hopper_attention.__all__:
        assert hasattr(hopper_attention, name)
    assert hopper_attention.flash_attn_func is interface.flash_attn_func


def test_version():
    try:
        expected = importlib.metadata.version("hopper-attention")
    except importlib.metadata.PackageNotFoundError:
        expected = "0.0.0+source"
    assert hopper_attention.__version__ == expected


def test_import_loads_neither_library_nor_cuda():
    package = pathlib.Path(hopper_attention.__file__).parent.parent
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hopper_attention, torch; "
        "assert 'hopper_attention._C' not in sys.modules; assert not torch.cuda.is_initialized(); "
        "assert not {'matplotlib', 'transformers', 'typer', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(package)], check=True)


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(_library, "_module", None)
    monkeypatch.setattr(_library, "_reason", None)


@pytest.mark.usefixtures("unloaded")
def test_library_is_missing(monkeypatch):
    monkeypatch.setattr(_library, "_NAME", "hopper_attention._absent")
    assert not _library.is_compiled()
    assert not hopper_attention.is_available()
    with pytest.raises(RuntimeError, match="without its compiled kernels"):
        _library.load()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "build, words",
    [
        ('{"reason": "the CUDA compiler is 12.2, older than 12.5"}', "12.2, older than 12.5. Ins"),
        ('{"reason": ""}', "not where the package is"),
        (None, "sources that were not built"),
    ],
)
def test_why_the_library_is_missing(monkeypatch, tmp_path, build, words):
    monkeypatch.setattr(_library, "_NAME", "hopper_attention._absent")
    monkeypatch.setattr(hopper_attention, "__path__", [str(tmp_path)])
    if build is not None:
        (tmp_path / "build.json").write_text(build)
    assert words in hopper_attention.unavailable_reason()


@pytest.mark.usefixtures("unloaded")
def test_library_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken_extension.py").write_text("raise ImportError('GLIBCXX_9 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_library, "_NAME", "broken_extension")
    assert not _library.is_compiled()
    assert hopper_attention.unavailable_reason().endswith("does not load: GLIBCXX_9 not found")


@pytest.mark.usefixtures("unloaded")
def test_library_is_loaded_once(monkeypatch, tmp_path):
    (tmp_path / "good_extension.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_library, "_NAME", "good_extension")
    assert _library.is_compiled()
    assert _library.load() is _library.load() is sys.modules["good_extension"]


@pytest.mark.parametrize(
    "found, capability, reason",
    [
        (False, None, r"finds no CUDA device: torch\.cuda\.is_available\(\) is False"),
        (True, (8, 0), r"A card, has compute capability 8\.0; the kernels need 9\.0"),
        (True, (10, 0), r"has compute capability 10\.0"),
        (True, (9, 0), None),
    ],
)
def test_device(monkeypatch, found, capability, reason):
    monkeypatch.setattr(_library, "_module", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert hopper_attention.is_available() == (reason is None)
    if reason is not None:
        with pytest.raises(RuntimeError, match=reason):
            raise RuntimeError(hopper_attention.unavailable_reason())
