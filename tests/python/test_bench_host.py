"""Suite host's parts beyond the forward pass, with contestants and a clock that need no card."""

import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import hopper_attention
from hopper_attention import reference
from hopper_attention.bench import host, records, session
from hopper_attention.bench.contestants import Sdpa
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import Shape, suite_shapes
from hopper_attention.bench.table import make_console, print_results

SHAPE = Shape("bfloat16", 128, 128, 1, 8, 8, 2, 2, causal=True)


class Clock:
    """Milliseconds that rise from call to call; runs each once."""

    def __init__(self):
        self.results = []

    def batch(self, run, count):
        self.results.append(run())
        return [0.001 * len(self.results)] * count

    def synchronize(self):
        pass


class Ours:
    name = "hopper_attention"

    def context(self):
        return contextlib.nullcontext()


@pytest.fixture
def called(monkeypatch):
    """Ours, computed by the reference."""
    calls = []

    def attend(q, k, v, causal):
        calls.append((q.dtype, causal))
        return reference.attention(q, k, v, causal=causal)[0].to(torch.bfloat16)

    monkeypatch.setattr(hopper_attention, "flash_attn_func", attend)
    monkeypatch.setattr(hopper_attention, "flash_attn_fp8_func", attend)
    return calls


def measure(shapes=(SHAPE,), contestants=None):
    outcome, clock = Outcome(), Clock()
    if contestants is None:
        contestants = [Ours(), Sdpa("fa2", SDPBackend.MATH)]
    host.run_host_parts(shapes, contestants, outcome, "now", 5, clock, "cpu")
    return outcome, clock


def test_each_part_is_timed(called):
    outcome, clock = measure()
    assert outcome.excluded == []
    assert [(r["part"], r["impl"]) for r in outcome.records] == [
        (host.AUTOGRAD, "hopper_attention"),
        (host.AUTOGRAD, "fa2"),
        *((part, "hopper_attention") for part in host.PARTS[1:]),
    ]
    for record in outcome.records:
        assert record["suite"] == "host"
        assert record["host_us"] == pytest.approx(1e3 * record["ms"])
        assert records.shape_of(record) == SHAPE
    assert {dtype for dtype, _ in called} == {torch.bfloat16, torch.float8_e4m3fn}
    assert all(causal for _, causal in called)
    gradients = [x for x in clock.results if isinstance(x, tuple)]
    assert len(gradients) == 2 * 5
    assert {x.shape for found in gradients for x in found} == {(1, 8, 2, 128), (1, 2, 8, 128)}


def test_what_fails_is_left_out(called, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no quantizer")

    monkeypatch.setattr(hopper_attention, "quantize", fail)
    outcome, _ = measure()
    assert outcome.excluded == [("hopper_attention", SHAPE.label, "quantize: no quantizer")]
    assert host.QUANTIZE not in {r["part"] for r in outcome.records}
    assert outcome.ours_failed()


def test_peers_alone_have_no_fp8(called):
    outcome, _ = measure(contestants=[Sdpa("fa2", SDPBackend.MATH)])
    assert [(r["part"], r["impl"]) for r in outcome.records] == [(host.AUTOGRAD, "fa2")]
    assert not called


def test_one_shape_of_the_suite_has_parts(called):
    shapes = suite_shapes("host")
    assert [host.has_parts(shape) for shape in shapes] == [False, False, False, True]
    assert measure([replace(SHAPE, causal=False)])[0].records == []
    work = session.Session([], [("host", shapes), ("rmse", shapes)], device="cpu")
    assert work.steps() == 2 + 5 + 8


def forward_record(impl, us):
    return records.make_record("host", impl, SHAPE, "now", ms=us / 1e3, host_us=us)


@pytest.fixture
def tables(monkeypatch):
    tools = Path(__file__).resolve().parents[2] / "tools"
    monkeypatch.syspath_prepend(str(tools))
    spec = importlib.util.spec_from_file_location("readme_tables", tools / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "readme_tables", module)
    spec.loader.exec_module(module)
    return module


def test_tables_with_and_without_parts(called, tables, capsys):
    old = [forward_record("hopper_attention", 10.0), forward_record("fa2", 12.0)]
    new = old + measure()[0].records
    merged, _ = records.merge({"sources": "1", "device": "a", "records": old},
                              {"sources": "1", "device": "a"}, new[2:])  # fmt: skip
    assert len(merged["records"]) == len(new)
    (one,) = host.compare_host(merged["records"])
    assert one.values == {"hopper_attention": 10.0, "fa2": 12.0}
    before, after = tables.host({"records": old}), tables.host({"records": new})
    assert "at 1.20 times the speed" in before
    assert after.startswith(before)
    assert f"Other calls of {SHAPE.label}" in after
    assert after.count("| forward and backward |") == 1
    assert "\n| quantize |" in after
    print_results(make_console(), old)
    plain = capsys.readouterr().out
    print_results(make_console(), new)
    shown = capsys.readouterr().out
    assert "host forward and backward, µs" in shown
    assert "host quantize and e4m3 forward, µs" in shown
    assert "host quantize" not in plain
    line = "host: ours / best of fa2: geometric mean 1.200, least 1.200"
    assert line in plain
    assert line in shown
