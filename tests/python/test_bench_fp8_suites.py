"""The suites quantize and fp8-accuracy without a card, and the tables of all suites of e4m3."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import hopper_attention
from hopper_attention import emulation_fp8, reference
from hopper_attention.bench import fp8_table, records, session, shapes, table
from hopper_attention.bench.contestants import Bound
from hopper_attention.bench.fp8 import Fp8Ours
from hopper_attention.bench.fp8_accuracy import run_fp8_accuracy
from hopper_attention.bench.quantizer import (
    BF16,
    COPY,
    QUANTIZER_RECIPES,
    quantized_bytes,
    run_quantize,
)
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import FP8, Shape
from hopper_attention.study.recipes import RECIPES

SHAPE = Shape(FP8, 32, 32, 2, 40, 40, 4, 2, causal=False)


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


def test_rates_count_every_byte_once():
    shape = Shape(FP8, 64, 32, 3, 10, 20, 4, 2, causal=False)
    elements = 3 * (10 * 4 * 64 + 20 * 2 * (64 + 32))
    assert quantized_bytes(shape) == 2 * elements + elements


@pytest.fixture
def quantize_records(emulated, monkeypatch):
    problems = [
        Shape(FP8, 64, 64, 1, 32, 32, 2, 2, False),
        Shape(FP8, 128, 128, 1, 32, 32, 1, 1, False),
        Shape(FP8, 128, 128, 2, 16, 16, 1, 1, True),
    ]
    monkeypatch.setattr("hopper_attention.bench.quantizer.TOKENS", 32)
    outcome = Outcome()
    run_quantize(problems, outcome, "now", 20, Clock(), "cpu")
    assert not outcome.excluded
    return problems, outcome.records


def test_the_quantizer_is_timed_beside_a_copy_and_with_attention(quantize_records):
    problems, found = quantize_records
    rates = [record for record in found if record["part"] == "quantize"]
    names = [record.get("recipe", record["impl"]) for record in rates]
    assert names == [COPY, *QUANTIZER_RECIPES] * 2
    assert set(QUANTIZER_RECIPES) == set(RECIPES) - {"fp8-fast"}
    for record, shape in zip(rates[::8], problems[:2], strict=True):
        expected = quantized_bytes(shape) / 0.5e-3 / 1e9
        assert record["gbps"] == pytest.approx(expected, rel=1e-5)
    ends = [(r["impl"], r["causal"], r["head_dim"]) for r in found if r["part"] == "end to end"]
    assert ends == [
        (name, causal, 128) for causal in (False, True) for name in ("hopper_attention", BF16)
    ]


def test_a_recipe_that_fails_is_left_out(emulated, monkeypatch):
    def refuse(q, k, v, recipe):
        if recipe.smooth_k:
            raise RuntimeError("no means today")
        return quantize(q, k, v, recipe)

    quantize = hopper_attention.quantize
    monkeypatch.setattr(hopper_attention, "quantize", refuse)
    monkeypatch.setattr("hopper_attention.bench.quantizer.TOKENS", 32)
    outcome = Outcome()
    problem = Shape(FP8, 64, 64, 1, 32, 32, 1, 1, False)
    run_quantize([problem], outcome, "now", 20, Clock(), "cpu")
    assert [reason for _, _, reason in outcome.excluded] == ["no means today"]
    assert outcome.ours_failed()
    assert "fp8-smooth" not in {record.get("recipe") for record in outcome.records}
    assert len(outcome.records) == len(QUANTIZER_RECIPES)


@pytest.fixture
def accuracy_records(emulated):
    problems = [
        Shape(FP8, 32, 32, 1, 200, 200, 2, 2, False),
        Shape(FP8, 32, 32, 1, 64, 64, 1, 1, False),
        Shape(FP8, 64, 64, 1, shapes.UNIFORM_QUERIES, 4096, 1, 1, False),
    ]
    peer = SimpleNamespace(
        name="fa3_fp8",
        context=nullcontext,
        bind=lambda shape, q, k, v: Bound(
            lambda: reference.attention(q, k, v)[0].to(q.dtype), lambda out: out
        ),
    )
    outcome = Outcome()
    labels = []
    run_fp8_accuracy(problems, [peer], outcome, "now", Clock(), "cpu", labels.append)
    assert labels == [shape.label for shape in problems]
    assert not outcome.excluded
    return outcome.records


def test_accuracy_is_measured_by_recipe_and_by_context(accuracy_records):
    found = fp8_table.read_accuracy(accuracy_records)
    names = {*RECIPES, "fa3_fp8"}
    assert set(found.rmse) == {(n, d) for n in names for d in ("normal", "outliers")}
    assert found.rmse["fp8", "outliers"] < found.rmse["fp8-tensor", "outliers"]
    assert found.rmse["fa3_fp8", "normal"] < 0.2 * found.rmse["fp8", "normal"]
    # Both are the emulation here.
    assert set(found.emulated) == {(n, d) for n in RECIPES for d in ("normal", "outliers")}
    assert set(found.emulated.values()) == {1.0}
    assert abs(found.bias[64, "hopper_attention", 4096]) < 2e-3
    assert -0.10 < found.bias[64, "hopper_attention_fast", 4096] < -0.03
    uniform = [r for r in accuracy_records if r["distribution"] == "uniform"]
    assert all(r["rmse"] >= abs(r["bias"]) for r in uniform)


def test_an_output_that_is_not_finite_is_left_out(emulated, monkeypatch):
    monkeypatch.setattr(
        hopper_attention,
        "flash_attn_fp8_func",
        lambda q, k, v, recipe: torch.full_like(q, math.nan),
    )
    outcome = Outcome()
    problem = Shape(FP8, 64, 64, 1, shapes.UNIFORM_QUERIES, 256, 1, 1, False)
    run_fp8_accuracy([problem], [], outcome, "now", Clock(), "cpu")
    assert not outcome.records
    assert outcome.ours_failed()


SPEEDS = {
    "hopper_attention": 1.1,
    "hopper_attention_fast": 1.21,
    "cudnn_fp8": 1.0,
    "fa3_fp8": 0.8,
    "fa3": 0.5,
}


def fp8_records():
    rows = []
    for shape in shapes.suite_shapes("fp8"):
        for impl, speed in SPEEDS.items():
            of = replace(shape, dtype="bfloat16") if impl == "fa3" else shape
            slow = 0.9 if (shape.head_dim, shape.mask, impl) == (256, "full", "fa3_fp8") else 1.0
            row = records.make_record("fp8", impl, of, "1", ms=1.0, tflops=900 * speed / slow)
            rows.append(row)
    return sorted(rows, key=records._order)  # as result files have them


def printed(found):
    console = Console(width=130, highlight=False, force_terminal=False)
    with console.capture() as capture:
        table.print_results(console, found)
    return capture.get()


def test_the_summary_names_every_ratio():
    text = printed(fp8_records())
    lines = [line for line in text.splitlines() if line.startswith("fp8: ")]
    assert lines[0].startswith(
        "fp8: hopper_attention / cudnn_fp8: geometric mean 1.100, least 1.100"
    )
    mean = 1.1 / 0.8 * 0.9 ** (1 / 6)
    assert f"hopper_attention / fa3_fp8: geometric mean {mean:.3f}, least 1.238" in lines[1]
    assert "e4m3 d256 full" in lines[1]
    assert "hopper_attention_fast / hopper_attention: geometric mean 1.100" in lines[2]
    assert "d64 full 2.20 (1.17), d64 causal 2.20 (1.12), d128 full 2.20 (1.29)" in lines[3]
    assert lines[3].endswith("d256 full 2.20 (1.54), d256 causal 2.20 (1.45)")
    assert text.count("ours / cudnn_fp8") == text.count("ours / fa3 in bf16") == 6


def test_the_summary_says_what_is_missing():
    found = [record for record in fp8_records() if record["impl"] not in ("fa3_fp8", "fa3")]
    lines = fp8_table.fp8_lines(fp8_table.compare_fp8(found))
    assert lines[1] == "fp8: no shape with both hopper_attention and fa3_fp8 in one run"
    assert len(lines) == 3


def test_tables_of_the_quantizer(quantize_records):
    text = printed(quantize_records[1])
    assert re.search(r"fp8-token +\|( +\d+ \(1\.00\) \|){2}", text)
    assert "quantize: d64, rate / copy's: fp8 1.00, fp8-tensor 1.00" in text
    assert re.search(r"e4m3 d128 causal b2 s16 h1 +\|( +\d+ \|){2} +1\.00", text)
    assert "over our own bf16: full s32 1.00, causal s16 1.00" in text


def test_a_newer_run_replaces_an_older_one_by_shape(quantize_records):
    found = quantize_records[1]
    newer = [
        {**r, "run": "pow", "gbps": 7.0} for r in found if r.get("gbps") and r["head_dim"] == 64
    ]
    rates = {one.shape.head_dim: one for one in fp8_table.quantizer_rates([*found[::-1], *newer])}
    assert list(rates) == [64, 128]
    assert rates[64].copy == 7.0
    assert rates[128].copy != 7.0


def test_tables_of_accuracy(accuracy_records):
    text = printed(accuracy_records)
    assert re.search(r"fp8-vtoken +\|( +\d\.\d{3}e-0\d \|){2}( +1\.000 \|){2}", text)
    assert "emulated rmse / the card's: 1.000 to 1.000" in text
    assert re.search(r"64 +\| hopper_attention_fast +\| +-\d\.\d\d", text)
    assert re.search(r"hopper_attention_fast: uniform attention is off by -\d\.\d+% at most", text)


def test_a_session_gives_each_suite_its_contestants(emulated, monkeypatch, tmp_path):
    path = tmp_path / "h.json"
    problems = [
        ("fp8", [SHAPE]),
        ("quantize", [Shape(FP8, 128, 128, 1, 16, 16, 1, 1, True)]),
        ("fp8-accuracy", [Shape(FP8, 32, 32, 1, shapes.UNIFORM_QUERIES, 130, 1, 1, False)]),
    ]
    made = session.Session([], problems, 20, path, device="cpu", clock=Clock(), fp8=[Fp8Ours()])
    labels = []
    made.run(labels.append)
    assert len(labels) == made.steps()
    stored = records.load(path)
    assert {(r["suite"], r["impl"]) for r in stored["records"]} == {
        ("fp8", "hopper_attention"),
        ("quantize", "hopper_attention"),
        ("quantize", BF16),
        ("fp8-accuracy", "hopper_attention"),
        ("fp8-accuracy", "hopper_attention_fast"),
    }
    assert any("e4m3" in note for note in stored["notes"])
