"""Suite varlen without a card: contestants over stand-in libraries, checks, tables, README.

Ours run through their real operators, FlashAttention-3 is a stand-in with its operators' arguments.
"""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner
from varlen_library import install_library, operators_on_the_cpu

import hopper_attention
from hopper_attention import ops_varlen, reference
from hopper_attention.bench import (
    contestants,
    records,
    session,
    shapes,
    table,
    varlen,
    varlen_suite,
    varlen_table,
)
from hopper_attention.bench.contestants import UnavailableError
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import LOGNORMAL, PACKED, Shape, suite_shapes
from hopper_attention.cli import app

ROOT = Path(__file__).resolve().parents[2]
EQUAL = Shape("bfloat16", 16, 16, 2, 12, 12, 4, 2, causal=True, layout=PACKED)
MIXED = replace(EQUAL, batch=5, seqlen_q=30, seqlen_k=30, layout=LOGNORMAL)
LENGTHS = (7, 30, 1, 20, 13)
SPEEDS = {
    "hopper_attention": 600.0,
    "hopper_attention_deterministic": 500.0,
    "hopper_attention_dense": 625.0,
    "fa3": 500.0,
    "fa3_deterministic": 400.0,
}
OF_BACKWARD = {name: 0.8 * speed for name, speed in SPEEDS.items()}


class Clock:
    """Gives every call the same time."""

    def batch(self, run, count):
        run()
        return [0.5] * count

    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def short_lengths(monkeypatch):
    whole = shapes.lognormal_lengths
    monkeypatch.setattr(
        shapes, "lognormal_lengths", lambda count: LENGTHS if count == 5 else whole(count)
    )


def test_the_shapes_are_those_of_the_comparison():
    found = suite_shapes("varlen")
    assert [shape.label for shape in found] == [
        "bf16 d128 causal b16 s1024 h32/8 packed",
        "bf16 d128 causal b4 s4096 h32/8 packed",
        "bf16 d128 causal b2 s8192 h32/8 packed",
        "bf16 d128 causal b64 s256 h32/8 packed",
        "bf16 d128 causal b32 s4989 h32/8 packed lognormal",
        "bf16 d64 causal b16 s1024 h32/8 packed",
    ]
    assert set(suite_shapes("varlen", quick=True)) < set(found)


def test_lognormal_lengths():
    lengths = next(s for s in suite_shapes("varlen") if s.layout == LOGNORMAL).lengths
    assert (len(lengths), sum(lengths), max(lengths)) == (32, 29_534, 4_989)
    ordered = sorted(lengths)
    assert len(set(ordered)) == 32
    # Symmetric on a logarithmic scale, about the median
    assert ordered[0] * ordered[-1] == pytest.approx(ordered[15] * ordered[16], rel=0.05)
    falls = sum(a > b for a, b in pairwise(lengths))
    assert falls > 8  # short and long ones are mixed


def test_operations_are_those_of_the_sequences():
    assert EQUAL.lengths == (12, 12)
    assert EQUAL.flops() == replace(EQUAL, layout="bshd").flops()
    assert MIXED.flops() == sum(2 * 4 * (16 + 16) * n * n / 2 for n in LENGTHS)
    assert MIXED.sequence(7).label == "bf16 d16 causal b1 s7 h4/2"


def test_a_batch_is_drawn_end_to_end():
    batch = varlen.draw(MIXED, "cpu")
    assert batch.cu_seqlens.tolist() == [0, 7, 37, 38, 58, 71]
    assert batch.cu_seqlens.dtype == torch.int32
    assert [batch.rows(i) for i in (0, 1, 4)] == [slice(0, 7), slice(7, 37), slice(58, 71)]
    assert (batch.q.shape, batch.k.shape, batch.longest) == ((71, 4, 16), (71, 2, 16), 30)


class Fa3:
    """The operators' arguments with cu_seqlens, in float64 over autograd."""

    def __init__(self):
        self.deterministic = []

    def attend(self, q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, causal):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert longest == cu_seqlens_q.diff().max()
        return reference.varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, None, None, scale, causal
        )

    def fwd(
        self, q, k, v, *, num_splits, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, is_causal,
    ):  # fmt: skip
        assert num_splits == 1
        assert max_seqlen_q == max_seqlen_k
        out, lse = self.attend(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, is_causal
        )
        return out.to(q.dtype), lse.float(), None, None

    def bwd(
        self, dout, q, k, v, out, lse, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, is_causal, deterministic,
    ):  # fmt: skip
        self.deterministic.append(deterministic)
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact, _ = self.attend(
            *leaves, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, softmax_scale, is_causal
        )
        found = torch.autograd.grad(exact, leaves, dout.double())
        return [*(x.to(q.dtype) for x in found), None]


@pytest.fixture
def fa3(monkeypatch):
    operators = Fa3()
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    monkeypatch.setattr(varlen, "load_fa3", lambda folder: "fa3.so")
    return operators


@pytest.fixture
def ours(monkeypatch, gradient_library):
    """Our contestants over stand-in libraries, of packed and of dense batches."""
    from hopper_attention import _library

    with operators_on_the_cpu():
        dense = _library._module
        fake = install_library(monkeypatch)
        for name in ("prepare", "prepare_backward", "workspace_bytes"):
            setattr(fake, name, getattr(dense, name))
        monkeypatch.setattr(ops_varlen, "forward", ops_varlen._inference)
        monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda: None)
        yield fake


def timed(found, problems=(EQUAL, MIXED)):
    outcome, labels = Outcome(), []
    varlen_suite.run_varlen(problems, found, outcome, "now", 20, Clock(), "cpu", labels.append)
    assert labels == [shape.label for shape in problems]
    return outcome


def test_everyone_is_right_and_is_recorded(ours, fa3):
    found, missing = varlen.gather_varlen()
    assert not missing
    assert [one.name for one in found] == list(SPEEDS)
    outcome = timed(found)
    assert not outcome.excluded
    packed = {"hopper_attention", "fa3"}
    fixed = {"hopper_attention_deterministic", "fa3_deterministic"}
    dense = {"hopper_attention_dense"}
    for layout, part, names in (
        (PACKED, "forward", packed | dense),
        (PACKED, "backward", packed | fixed | dense),
        (LOGNORMAL, "forward", packed),
        (LOGNORMAL, "backward", packed | fixed),
    ):
        of_part = [r for r in outcome.records if (r["layout"], r["part"]) == (layout, part)]
        assert {r["impl"] for r in of_part} == names
        assert all(0 < r["rmse"] < 0.1 for r in of_part)
        shape = EQUAL if layout == PACKED else MIXED
        operations = shape.flops() * (2.5 if part == "backward" else 1)
        assert {r["tflops"] for r in of_part} == {float(f"{operations / 0.5e9:.6g}")}
    assert set(fa3.deterministic) == {False, True}
    assert {c["deterministic"] for c in ours.calls if "dout" in c} == {False, True}


def test_a_problem_that_does_not_fit_is_left_out(fa3, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(varlen_suite, "expect", no_memory)
    outcome, done = Outcome(), []
    varlen_suite.run_varlen(
        [EQUAL, MIXED],
        [varlen.Fa3Packed()],
        outcome,
        "now",
        clock=Clock(),
        device="cpu",
        after_shape=lambda: done.append(len(outcome.excluded)),
    )
    assert not outcome.records
    assert [(name, reason.split(":")[0]) for name, _, reason in outcome.excluded] == [
        ("fa3", "not enough device memory for the problem")
    ] * 2
    assert done == [1, 2]  # results are saved and progress is shown all the same


class Wrong:
    """Right, but for one sequence's results."""

    name = "wrong"
    parts = varlen.PARTS

    def __init__(self, part, sequence, found):
        self.part, self.sequence, self.found = part, sequence, found

    def takes(self, shape):
        return True

    def forward(self, batch):
        return self.spoiled("forward", batch, self.found.forward(batch))

    def backward(self, batch):
        return self.spoiled("backward", batch, self.found.backward(batch))

    def spoiled(self, part, batch, run):
        if part != self.part:
            return run
        rows = batch.rows(self.sequence)
        if part == "backward":
            dq, dk, dv = (x.clone() for x in run())
            dk[rows] *= 2
            return lambda: (dq, dk, dv)
        out = run().clone()
        out[rows] += 1
        return lambda: out


@pytest.mark.parametrize("part, words", [("forward", "wrong output"), ("backward", "wrong dk")])
def test_wrong_results_are_excluded(fa3, part, words):
    right = varlen.Fa3Packed()
    outcome = timed([Wrong(part, 1, right)], [MIXED])  # the longest
    ((name, label, reason),) = outcome.excluded
    assert (name, label) == ("wrong", f"{MIXED.label} {part}")
    assert reason.startswith(words)
    assert {record["part"] for record in outcome.records} == set(varlen.PARTS) - {part}


def test_contestants_that_are_missing_are_named(monkeypatch):
    def load(folder):
        raise UnavailableError("no such file")

    monkeypatch.setattr(varlen, "load_fa3", load)
    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda: "no card")
    found, missing = varlen.gather_varlen(peers_dir=Path("nowhere"))
    assert not found
    assert missing == {name: "no card" if "hopper" in name else "no such file" for name in SPEEDS}
    assert "fa3" not in varlen.gather_varlen(peers=False)[1]


def stored():
    rows = []
    for shape in suite_shapes("varlen"):
        for part, speeds in (("forward", SPEEDS), ("backward", OF_BACKWARD)):
            for impl, speed in speeds.items():
                if part == "forward" and "deterministic" in impl:
                    continue
                if shape.layout == LOGNORMAL and impl.endswith("dense"):
                    continue
                measured = {"part": part, "ms": 1.0, "tflops": speed, "rmse": 1e-4}
                rows.append(records.make_record("varlen", impl, shape, "1", **measured))
    return rows


def test_tables_and_lines():
    console = Console(width=100, highlight=False, force_terminal=False)
    with console.capture() as capture:
        table.print_results(console, stored())
    text = capture.get()
    assert "varlen forward, TFLOP/s" in text
    assert "ours dense" in text
    for line in (
        "varlen forward: ours / fa3: geometric mean 1.200, least 1.200 "
        "(bf16 d128 causal b16 s1024 h32/8 packed), 6 shapes",
        "varlen forward: packed / dense: geometric mean 0.960, least 0.960 "
        "(bf16 d128 causal b16 s1024 h32/8 packed), 5 shapes",
        "varlen backward: deterministic: ours / fa3: geometric mean 1.250, least 1.250 "
        "(bf16 d128 causal b16 s1024 h32/8 packed), 6 shapes",
    ):
        assert line in text.splitlines()
    assert "varlen forward: deterministic" not in text


def test_records_of_both_passes_stay_apart():
    found = varlen_table.compare_varlen(stored(), "backward")
    assert [one.values["fa3"] for one in found] == [400.0] * 6
    assert len({records.key_of(record) for record in stored()}) == len(stored())


@pytest.fixture
def readme_varlen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_varlen

    yield readme_varlen
    sys.modules.pop("readme_varlen")


def test_the_pages_sections(readme_varlen):
    results = {"device": "a card", "date": "1", "records": stored()}
    text = readme_varlen.forward(results)
    assert "| TFLOP/s | hopper-attention | FlashAttention-3 | ours, dense | ours / fa3 |" in text
    assert "| d128 32/8 causal, 16 × 1,024 | 600 | 500 | 625 | **1.20** | **0.96** |" in text
    assert (
        "| d128 32/8 causal, 32 lognormal, 29,534 tokens | 600 | 500 | – | **1.20** | **–** |"
        in text
    )
    assert text.startswith("- ours / fa3: geometric mean 1.200")
    assert text.endswith("a card, 1.")
    text = readme_varlen.backward(results)
    assert "| d64 32/8 causal, 16 × 1,024 | 480 | 400 | 500 | 400 | 320 |" in text


def test_a_whole_run(monkeypatch, fa3, tmp_path):
    monkeypatch.setattr(shapes, "suite_shapes", lambda suite, quick: [EQUAL, MIXED])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "small card")
    right, other = varlen.Fa3Packed(), varlen.Fa3Packed()
    right.name = "hopper_attention"
    gathered = ([right, other], {"fa3_deterministic": "not here"})
    monkeypatch.setattr(varlen, "gather_varlen", lambda peers, folder: gathered)
    monkeypatch.setattr(contestants, "gather", lambda *a: pytest.fail("was not asked for"))
    monkeypatch.setattr(
        session,
        "start",
        lambda found, plan, reps, json_file: session.Session(
            found, plan, reps, json_file, device="cpu", clock=Clock()
        ),
    )
    path = tmp_path / "h.json"
    result = CliRunner().invoke(app, ["bench", "varlen", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "fa3_deterministic takes no part: not here" in result.output
    assert "varlen backward: ours / fa3: geometric mean 1.000" in result.output
    document = records.load(path)
    assert len(document["records"]) == 2 * 2 * 2
    assert any("suite varlen" in note for note in document["notes"])
    shown = CliRunner().invoke(app, ["bench", "varlen", "--plot-only", str(path)])
    assert "varlen forward: ours / fa3" in shown.output


def test_the_suite_is_in_the_help():
    from hopper_attention.cli.bench import _SUITES_HELP

    assert "varlen: " in _SUITES_HELP
    assert session.Session([], [("varlen", suite_shapes("varlen"))]).steps() == 2 + 6
