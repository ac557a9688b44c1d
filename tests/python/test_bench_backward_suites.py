"""The backward suites as wholes: shapes, errors of gradients, tables, the command, README."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hopper_attention import reference
from hopper_attention.bench import (
    backward,
    backward_suites,
    backward_table,
    contestants,
    fp8,
    gradients,
    records,
    rmse,
    runner,
    session,
    shapes,
    table,
    timing,
)
from hopper_attention.bench.backward import BoundBackward
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import Shape, suite_shapes
from hopper_attention.cli import app

ROOT = Path(__file__).resolve().parents[2]
SPEEDS = {
    "hopper_attention": 550.0,
    "hopper_attention_deterministic": 440.0,
    "fa3": 500.0,
    "fa3_deterministic": 400.0,
    "cudnn": 450.0,
    "fa2": 250.0,
}


class Clock:
    """Gives every call the same time."""

    def batch(self, run, count):
        run()
        return [0.5] * count

    def synchronize(self):
        pass


class Fake:
    """The exact gradients, rounded; or what alter makes of them."""

    def __init__(self, name, alter=lambda found: found):
        self.name = name
        self.alter = alter

    def bind(self, shape, q, k, v, dout):
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, _ = reference.attention(*leaves, causal=shape.causal, window_size=shape.window)
        exact = torch.autograd.grad(out, leaves, dout.double())
        found = tuple(x.to(q.dtype) for x in exact)
        return BoundBackward(lambda: self.alter(found), lambda of_call: of_call)


def test_backward_is_the_forwards_sweep_from_1k_on():
    found = suite_shapes("backward")
    assert len(found) == 30
    assert {shape.seqlen_q for shape in found} == {1024, 2048, 4096, 8192, 16384}
    assert set(found) < set(suite_shapes("forward"))
    assert set(suite_shapes("backward", quick=True)) < set(found)


def test_other_shapes_are_those_of_models():
    assert [shape.label for shape in suite_shapes("backward-shapes")] == [
        "bf16 d96 causal b4 s4096 h16",
        "bf16 d192 causal b4 s4096 h16",
        "bf16 d192x128 causal b2 s4096 h128",
        "bf16 d128 causal b2 s8192 h64/8",
        "bf16 d128 causal b1 s8192 h32/8",
        "bf16 d64 window(128,0) b2 s8192 h64/8",
        "bf16 d128 window(4096,0) b1 s32768 h32/8",
    ]


def test_the_errors_are_of_both_dtypes_and_all_tuned_head_dims():
    found = suite_shapes("backward-rmse")
    assert {(s.dtype, s.head_dim) for s in found} == {
        (dtype, d) for dtype in ("float16", "bfloat16") for d in (64, 128, 256)
    }
    assert {s.causal for s in found} == {False, True}


def test_the_backward_suites_are_done_within_a_minute():
    """As fast as FlashAttention-2, the slowest, for a third of the contestants' calls."""
    calls = timing.WARM_UPS + 1 + timing.ROUNDS * (30 / timing.ROUNDS + 1)
    operations = sum(
        shapes.BACKWARD_FACTOR * shape.flops()
        for suite in ("backward", "backward-shapes")
        for shape in suite_shapes(suite)
    )
    seconds = calls * operations * (4 / 400e12 + 2 / 230e12)
    assert 10 < seconds < 50


SMALL = Shape("float16", 32, 32, 2, 48, 48, 2, 2, causal=True)


def errors_of(fakes, shape=SMALL):
    outcome, labels = Outcome(), []
    backward_suites.run_backward_rmse([shape], fakes, outcome, "now", Clock(), "cpu", labels.append)
    assert [re.sub(".* ", "", label) for label in labels] == ["normal", "outliers"]
    return outcome


def test_errors_of_each_gradient():
    def twice_dk(found):
        dq, dk, dv = found
        return dq, dk * 2, dv

    outcome = errors_of(
        [Fake("hopper_attention"), Fake("hopper_attention_deterministic"), Fake("fa3", twice_dk)]
    )
    assert not outcome.excluded
    found = {(r["impl"], r["distribution"], r["part"]): r["rmse"] for r in outcome.records}
    assert set(found) == {
        (impl, distribution, part)
        for impl in ("hopper_attention", "fa3", "standard")
        for distribution in ("normal", "outliers")
        for part in ("dq", "dk", "dv")
    }
    inputs = rmse.draw(SMALL, "outliers", "cpu")
    dout = backward_suites.draw_dout(SMALL, "cpu")
    leaves = [x.double().requires_grad_() for x in inputs]
    out, _ = reference.attention(*leaves, causal=True)
    exact = torch.autograd.grad(out, leaves, dout.double())
    for part, truth in zip(("dq", "dk", "dv"), exact, strict=True):
        rounded = (truth.half().double() - truth).square().mean().sqrt().item()
        ours = found["hopper_attention", "outliers", part]
        assert ours == pytest.approx(rounded)
        assert ours < found["standard", "outliers", part] < 0.1
        doubled = truth.square().mean().sqrt().item()
        expected = doubled if part == "dk" else rounded
        assert found["fa3", "outliers", part] == pytest.approx(expected, rel=1e-3)


def test_gradients_that_are_not_finite_have_no_error():
    def with_nan(found):
        dq, dk, dv = found
        return dq, dk, dv * math.nan

    def refuse(found):
        raise RuntimeError("not today")

    outcome = errors_of([Fake("hopper_attention", with_nan), Fake("fa3", refuse)])
    assert {record["impl"] for record in outcome.records} == {"standard"}
    assert {(name, reason) for name, _, reason in outcome.excluded} == {
        ("hopper_attention", "the gradients hold NaN or infinity"),
        ("fa3", "not today"),
    }
    assert outcome.ours_failed()


def stored(speeds=SPEEDS):
    rows = []
    for suite in ("backward", "backward-shapes"):
        for shape in suite_shapes(suite):
            for impl, speed in speeds.items():
                if impl == "fa3_deterministic" and shape.head_dim == 256:
                    continue
                if impl in ("cudnn", "fa2") and shape.window != (-1, -1):
                    continue
                measured = {"ms": 1.0, "tflops": speed, "rmse": 1e-4}
                rows.append(records.make_record(suite, impl, shape, "1", **measured))
    for shape in suite_shapes("backward-rmse"):
        for distribution in ("normal", "outliers"):
            for part in ("dq", "dk", "dv"):
                for impl, error in (("hopper_attention", 1.02), ("fa3", 1.0), ("standard", 3.0)):
                    of = {"distribution": distribution, "part": part, "rmse": error * 1e-4}
                    rows.append(records.make_record("backward-rmse", impl, shape, "1", **of))
    return rows


def test_merging_keeps_each_gradients_record():
    rows = stored()
    header = {"device": "card", "date": "1", "sources": "a" * 40}
    document, _ = records.merge(None, header, rows)
    again = [{**row, "run": "2", "rmse": 1.0} for row in rows]
    merged, sentence = records.merge(document, header, again)
    assert len(merged["records"]) == len(rows)
    assert sentence.endswith("; 0 kept")


def printed(rows):
    target = Console(width=100, highlight=False, force_terminal=False)
    with target.capture() as capture:
        table.print_results(target, rows)
    return capture.get()


def test_tables_and_the_lines_that_sum_them_up():
    text = printed(stored())
    rows = [line for line in text.splitlines() if line.startswith(("+", "|")) or " | " in line]
    assert max(map(len, rows)) <= 100
    assert "…" not in text
    assert re.search(r"ours / best peer +\|( *1\.10 \|){4} *1\.10", text)
    assert re.search(r"ours: deterministic / not +\|( *0\.80 \|){4} *0\.80", text)
    assert re.search(r"d64 window\(128,0\) b2 s8192 h64/8 +\| +550 \| +500 \| +- \| +- \|", text)
    lines = text.splitlines()
    for line in (
        "backward: ours / best of fa3, cudnn, fa2: geometric mean 1.100, least 1.100 "
        "(bf16 d64 full b16 s1024 h32), 30 shapes",
        "backward: deterministic: ours / fa3: geometric mean 1.100, least 1.100 "
        "(bf16 d64 full b16 s1024 h32), 20 shapes",
        "backward: ours: deterministic / not: geometric mean 0.800, least 0.800 "
        "(bf16 d64 full b16 s1024 h32), 30 shapes",
        "backward-rmse: ours / fa3: at most 1.020 (dq, normal, fp16 d64 full b1 s4096 h4), "
        "48 gradients",
    ):
        assert line in lines
    assert any(line.startswith("backward-shapes: deterministic: ours / fa3") for line in lines)


def test_without_peers_there_are_no_ratios():
    text = printed(stored({"hopper_attention": 550.0}))
    assert "backward: no shape with both ours and a peer's measurement in one run" in text
    assert "backward: deterministic" not in text


def test_errors_are_compared_within_a_run():
    rows = [row for row in stored() if row["suite"] == "backward-rmse"]
    newer = [{**row, "run": "2", "rmse": 9.0} for row in rows if row["impl"] == "fa3"]
    assert backward_table.read_errors(rows + newer) == backward_table.read_errors(rows)
    newer += [{**row, "run": "2", "rmse": 9.9} for row in rows if row["impl"] != "fa3"]
    for one in backward_table.read_errors(rows + newer):
        assert one.ratio() == pytest.approx(1.1)


@pytest.fixture
def small_world(monkeypatch):
    """A CPU that passes for a card, with small shapes and rounded exact gradients."""
    small = replace(SMALL, dtype="bfloat16", head_dim=16, head_dim_v=16, seqlen_q=8, seqlen_k=8)
    monkeypatch.setattr(shapes, "suite_shapes", lambda suite, quick: [small])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "small card")
    fakes = [Fake(name) for name in SPEEDS if name != "cudnn"]
    gathered = []

    def gather(peers, folder):
        gathered.append(peers)
        return list(fakes), {"cudnn": "not here"}

    def refuse(*args):
        raise AssertionError("these suites were not asked for")

    monkeypatch.setattr(backward, "gather_backward", gather)
    monkeypatch.setattr(contestants, "gather", refuse)
    monkeypatch.setattr(fp8, "gather_fp8", refuse)
    monkeypatch.setattr(
        session,
        "start",
        lambda found, plan, reps, json_file: session.Session(
            found, plan, reps, json_file, device="cpu", clock=Clock()
        ),
    )
    return fakes


def test_a_whole_run(small_world, tmp_path):
    path = tmp_path / "h.json"
    suites = ["backward", "backward-shapes", "backward-rmse"]
    result = CliRunner().invoke(app, ["bench", *suites, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "cudnn takes no part: not here" in result.output
    assert "backward: deterministic: ours / fa3: geometric mean 1.000" in result.output
    document = records.load(path)
    assert any("2.5 times" in note for note in document["notes"])
    counted = [(record["suite"], record["impl"]) for record in document["records"]]
    assert {suite for suite, _ in counted} == set(suites)
    assert counted.count(("backward", "fa3_deterministic")) == 1
    assert counted.count(("backward-rmse", "hopper_attention")) == 6
    assert ("backward-rmse", "hopper_attention_deterministic") not in counted
    shown = CliRunner().invoke(app, ["bench", "backward", "--plot-only", str(path)])
    assert "backward: ours / best of fa3, fa2" in shown.output
    assert "backward-rmse" not in shown.output


def test_a_wrong_deterministic_variant_fails_the_command(small_world):
    small_world[1].alter = lambda found: tuple(x * 2 for x in found)
    result = CliRunner().invoke(app, ["bench", "backward"])
    assert result.exit_code == 1
    assert "hopper_attention_deterministic was not measured on" in result.output
    assert "wrong dq: error up to" in result.output


def test_the_steps_of_a_session():
    plan = [(suite, suite_shapes(suite)) for suite in shapes.BACKWARD_SUITES]
    assert session.Session([], plan).steps() == 2 + 30 + 7 + 2 * 8


def test_all_suites_are_in_the_help():
    from hopper_attention.cli.bench import _SUITES_HELP

    assert all(f"{suite}: " in _SUITES_HELP for suite in shapes.BACKWARD_SUITES)
    assert f"What to measure: {', '.join(shapes.SUITES)}, or all." in _SUITES_HELP


@pytest.fixture
def readme_backward(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_backward

    yield readme_backward
    sys.modules.pop("readme_backward")


def test_readmes_sections(readme_backward):
    results = {"device": "a card", "date": "1", "records": stored()}
    text = readme_backward.backward(results)
    assert "- ours / best of fa3, cudnn, fa2: geometric mean 1.100" in text
    assert "| d | mask | TFLOP/s | 1k | 2k | 4k | 8k | 16k |" in text
    assert "| 256 | causal | hopper-attention | 550 | 550 | 550 | 550 | 550 |" in text
    assert "deterministic" not in text
    text = readme_backward.deterministic(results)
    assert "| 64 | full | FlashAttention-3, deterministic | 400 |" in text
    assert text.count("**deterministic: ours / fa3** | **1.10** |") == 4
    assert text.count("**ours: deterministic / not** | **0.80** |") == 6
    text = readme_backward.shapes(results)
    assert (
        "| bf16 d128 causal b2 s8192 h64/8 | 550 | 500 | 450 | 250 | 440 | 400 | **1.10** |" in text
    )
    assert "h32/8 | 550 | 500 | – | – | 440 | 400 | **1.10** |" in text
    text = readme_backward.rmse(results)
    assert "- ours / fa3: at most 1.020" in text
    row = "| bf16 | 128 causal | N(0, 1) | dK | 1.02e-04 | 1.00e-04 | 3.00e-04 | **1.020** |"
    assert row in text


def test_readmes_sections_without_peers(readme_backward):
    rows = [row for row in stored() if row["impl"] == "hopper_attention"]
    results = {"device": "a card", "date": "1", "records": rows}
    for make in (readme_backward.backward, readme_backward.shapes, readme_backward.rmse):
        assert "hopper-attention" in make(results)
    assert readme_backward.deterministic(results).startswith("| d | mask |")


def test_the_sample_and_the_inputs_are_the_same_in_every_run():
    one, other = (backward_suites.draw_dout(SMALL, "cpu") for _ in range(2))
    assert torch.equal(one, other)
    inputs = runner.make_inputs(SMALL, "cpu")
    assert not torch.equal(one, inputs[0])
    assert gradients.draw_places(SMALL) == gradients.draw_places(SMALL)
