"""The suites of e4m3 without a card: peers as stand-ins, our kernels as their emulation."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hopper_attention
from hopper_attention import emulation_fp8, reference
from hopper_attention.bench import fp8, runner, shapes
from hopper_attention.bench.contestants import Bound, UnavailableError
from hopper_attention.bench.fp8 import CudnnFp8, Fa3Fp8, Fp8Ours, gather_fp8
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import FP8, Shape

SHAPE = Shape(FP8, 32, 32, 2, 40, 40, 4, 2, causal=False)
SHAPES = [SHAPE, replace(SHAPE, causal=True)]


class Clock:
    """Gives every call the same time."""

    def batch(self, run, count):
        run()
        return [0.5] * count

    def synchronize(self):
        pass


@pytest.fixture
def emulated(monkeypatch):
    """The package as if there were a card: quantizing is the reference's, attention emulated."""

    def fp8_func(q, k=None, v=None, recipe=None, causal=False, window_size=(-1, -1)):
        x = q if k is None else hopper_attention.quantize(q, k, v, recipe)
        options = {"causal": causal, "window_size": window_size}
        return emulation_fp8.attention(x, **options)[0]

    def func(q, k, v, causal=False, window_size=(-1, -1)):
        out, _ = reference.attention(q, k, v, causal=causal, window_size=window_size)
        return out.to(q.dtype)

    monkeypatch.setattr(hopper_attention, "flash_attn_fp8_func", fp8_func)
    monkeypatch.setattr(hopper_attention, "flash_attn_func", func)
    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda: None)


def timed(contestants, problems=SHAPES):
    outcome = Outcome()
    runner.run_timed("fp8", problems, contestants, outcome, "now", 20, Clock(), "cpu")
    return outcome


# The positional arguments of vLLM's operator.
NAMES = re.findall(
    r"\w+",
    """q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k
    max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary
    q_descale k_descale v_descale softmax_scale is_causal window_size_left window_size_right softcap
    is_rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin s_aux cp_world_size
    cp_rank cp_tot_seqused_k""",
)


def fa3_fp8_forward(*arguments):
    x = SimpleNamespace(**dict(zip(NAMES, arguments, strict=True)))
    assert {t.dtype for t in (x.q, x.k, x.v)} == {torch.float8_e4m3fn}
    assert x.softmax_scale == x.q.shape[-1] ** -0.5
    assert (x.num_splits, x.sm_margin, x.cp_world_size, x.cp_rank) == (1, 0, 1, 0)
    bounds = zip(x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist(), strict=True)
    outputs, last = [], None
    for q_end, k_end in bounds:
        if last is not None:
            parts = x.q[last[0] : q_end], x.k[last[1] : k_end], x.v[last[1] : k_end]
            window = (x.window_size_left, x.window_size_right)
            of_one, _ = reference.attention(
                *(part[None].float() for part in parts), causal=x.is_causal, window_size=window
            )
            outputs.append(of_one[0])
        last = q_end, k_end
    assert x.q_descale.shape == (len(outputs), x.k.shape[1])
    return torch.cat(outputs).bfloat16(), None


@pytest.fixture
def fa3_fp8(monkeypatch, tmp_path):
    """A folder with fa3_fp8.so, which defines vLLM's operator."""

    def load_library(path):
        assert path == str((tmp_path / "fa3_fp8.so").resolve())
        monkeypatch.setattr(torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=fa3_fp8_forward), False)

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.delenv("FA3_FP8_SO", raising=False)
    (tmp_path / "fa3_fp8.so").touch()
    return tmp_path


class FakeNode:
    def __init__(self):
        self.set_log = {}

    def __getattr__(self, name):
        if not name.startswith("set_"):
            raise AttributeError(name)

        def setter(value):
            self.set_log[name] = value
            return self

        return setter


class FakeGraph:
    """cuDNN's graph of one node, computed by the reference."""

    def __init__(self, **types):
        assert types == {
            "io_data_type": "e4m3",
            "intermediate_data_type": "float",
            "compute_data_type": "float",
        }
        self.steps = []

    def __getattr__(self, name):
        return lambda *args: self.steps.append(name)

    def tensor(self, dim, stride, data_type):
        return FakeNode()

    def sdpa_fp8(self, **arguments):
        self.arguments = arguments
        self.outputs = tuple(FakeNode() for _ in range(4))
        return self.outputs

    def get_workspace_size(self):
        return 0

    def execute(self, pack, workspace):
        assert self.steps[-1] == "build_plans"
        given = self.arguments
        qkv = [pack[given[name]].transpose(1, 2).float() for name in "qkv"]
        scale = {n: pack[node].item() for n, node in given.items() if "scale_" in n}
        assert scale["descale_s"] * scale["scale_s"] == 1.0
        assert {scale[f"descale_{n}"] for n in "qkv"} == {scale["scale_o"]} == {1.0}
        assert given["is_inference"] is True
        out, _ = reference.attention(
            *qkv, softmax_scale=given["attn_scale"], causal=given["use_causal_mask"]
        )
        found = self.outputs[0]
        assert found.set_log["set_output"] is True
        target = pack[found]
        assert found.set_log["set_stride"] == list(target.stride())
        target.copy_(out.transpose(1, 2).to(torch.float8_e4m3fn))


@pytest.fixture
def cudnn(monkeypatch):
    module = SimpleNamespace(
        data_type=SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float"),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        pygraph=FakeGraph,
    )
    monkeypatch.setattr(fp8.importlib, "import_module", lambda name: {"cudnn": module}[name])


def test_every_contestant_is_held_against_what_its_tensors_stand_for(emulated, fa3_fp8, cudnn):
    class InBf16:
        name = "fa3"
        context = Fa3Fp8.context

        def bind(self, shape, q, k, v):
            assert q.dtype is torch.bfloat16
            return Bound(
                lambda: hopper_attention.flash_attn_func(q, k, v, causal=shape.causal),
                lambda out: out,
            )

    contestants = [Fp8Ours(), CudnnFp8(), Fa3Fp8(fa3_fp8), InBf16()]
    outcome = timed(contestants)
    assert not outcome.excluded
    names = ["hopper_attention", "cudnn_fp8", "fa3_fp8", "fa3"]
    assert [record["impl"] for record in outcome.records] == names * 2
    errors = {record["impl"]: record["rmse"] for record in outcome.records[:4]}
    # Exact but for the output's rounding are fa3 and fa3_fp8; cuDNN's is rounded to e4m3.
    assert errors["fa3"] < 2e-3
    assert errors["fa3_fp8"] < 2e-3
    assert 2e-3 < errors["hopper_attention"] < 2e-2
    assert 2e-3 < errors["cudnn_fp8"] < 2e-2
    dtypes = {record["impl"]: record["dtype"] for record in outcome.records}
    assert dtypes == {**dict.fromkeys(names, FP8), "fa3": "bfloat16"}
    assert {record["tflops"] for record in outcome.records[:4]} == {
        float(f"{SHAPE.flops() / 0.5e-3 / 1e12:.6g}")
    }


@pytest.mark.parametrize("factor", [1.0, 1.15])
def test_wrong_outputs_are_left_out(emulated, factor):
    class Scaled(Fp8Ours):
        def bind(self, shape, q, k, v):
            bound = super().bind(shape, q, k, v)
            return replace(bound, run=lambda: bound.run() * factor)

    outcome = timed([Scaled()], [SHAPE])
    assert len(outcome.records) == (1 if factor == 1.0 else 0)
    assert outcome.ours_failed() == (factor != 1.0)


@pytest.mark.parametrize("window, causal", [((5, 2), False), ((5, 0), True)])
def test_the_window_reaches_ours_and_fa3_and_not_cudnn(emulated, fa3_fp8, cudnn, window, causal):
    outcome = timed(
        [Fp8Ours(), Fa3Fp8(fa3_fp8), CudnnFp8()], [replace(SHAPE, window=window, causal=causal)]
    )
    assert [record["impl"] for record in outcome.records] == ["hopper_attention", "fa3_fp8"]
    assert [name for name, _, _ in outcome.excluded] == ["cudnn_fp8"]


def test_fast_is_a_contestant_of_its_own(emulated, monkeypatch, tmp_path):
    monkeypatch.delenv("FA3_SO", raising=False)
    monkeypatch.delenv("FA3_FP8_SO", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "cudnn", None)  # import fails
    found, missing = gather_fp8(True, tmp_path)
    assert [one.name for one in found] == ["hopper_attention", "hopper_attention_fast"]
    assert set(missing) == {"cudnn_fp8", "fa3_fp8", "fa3"}
    assert "pip install nvidia-cudnn-frontend" in missing["cudnn_fp8"]
    assert "fa3_fp8.so is missing" in missing["fa3_fp8"]
    assert gather_fp8(False)[1] == {}
    outcome = timed(found, [replace(SHAPE, seqlen_q=16, seqlen_k=512)])
    ours, fast = (record["rmse"] for record in outcome.records)
    assert ours != fast
    with pytest.raises(UnavailableError, match="not found: put fa3_fp8"):
        Fa3Fp8()


def test_ours_is_missing_without_kernels(monkeypatch):
    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda: "no card")
    assert gather_fp8(False) == (
        [],
        {"hopper_attention": "no card", "hopper_attention_fast": "no card"},
    )


def test_suite_fp8_is_the_forward_sweep():
    assert [replace(shape, dtype="bfloat16") for shape in shapes.suite_shapes("fp8")] == (
        shapes.suite_shapes("forward")
    )
    assert shapes.suite_shapes("fp8")[0].label.startswith("e4m3 d64 full")
