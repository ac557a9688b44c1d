"""Running suites, with contestants and a clock that need no card."""

import contextlib
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from hopper_attention import reference
from hopper_attention.bench import accuracy, contestants, rmse, runner, timing
from hopper_attention.bench.contestants import Bound, Sdpa, UnavailableError
from hopper_attention.bench.runner import Outcome
from hopper_attention.bench.shapes import Shape

SHAPE = Shape("float16", 32, 32, 2, 40, 40, 4, 2, causal=False)
SHAPES = [
    SHAPE,
    replace(SHAPE, causal=True),
    replace(SHAPE, causal=True, window=(7, 0)),
    replace(SHAPE, head_dim_v=16, seqlen_q=30, causal=True),
]


class FakeClock:
    """Gives the times that it was told, and writes down who ran."""

    def __init__(self, times=None):
        self.times = times or {}
        self.log = []
        self.broken = False

    def batch(self, run, count):
        run()
        self.log.append(run)
        return [self.times.get(run, 1.0)] * count

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Fake:
    """The reference, rounded; or what alter makes of it."""

    def __init__(self, name, alter=lambda out: out):
        self.name = name
        self.alter = alter
        self.depth = 0

    @contextlib.contextmanager
    def context(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def bind(self, shape, q, k, v):
        def run():
            assert self.depth == 1, "called outside of its context"
            exact, _ = reference.attention(q, k, v, causal=shape.causal, window_size=shape.window)
            return self.alter(exact.to(q.dtype)).transpose(1, 2)

        return Bound(run, lambda out: out.transpose(1, 2))


def fail(error):
    def alter(out):
        raise error

    return alter


def timed(fakes, shapes=SHAPES, clock=None, suite="forward"):
    outcome = Outcome()
    runner.run_timed(
        suite, shapes, fakes, outcome, run="now", reps=20, clock=clock or FakeClock(), device="cpu"
    )
    return outcome


def test_records_are_made_for_every_shape_and_contestant():
    outcome = timed([Fake("hopper_attention"), Fake("fa3")])
    assert not outcome.excluded
    assert [(r["impl"], r["causal"], r["window"]) for r in outcome.records] == [
        (name, shape.causal, list(shape.window))
        for shape in SHAPES
        for name in ("hopper_attention", "fa3")
    ]
    for record, shape in zip(outcome.records[::2], SHAPES, strict=True):
        assert record["ms"] == 1.0
        assert record["tflops"] == pytest.approx(shape.flops() / 1e-3 / 1e12, rel=1e-5)
        assert 0 < record["rmse"] < 1e-3
        assert record["run"] == "now"


def test_host_times_are_microseconds():
    outcome = timed([Fake("hopper_attention")], [SHAPE], suite="host")
    assert outcome.records[0]["host_us"] == 1000.0
    assert "tflops" not in outcome.records[0]


def test_contestants_take_turns():
    clock = FakeClock()
    runs = {name: (lambda name=name: name) for name in "abc"}
    clock.times = dict(zip(runs.values(), (1.0, 2.0, 3.0), strict=True))
    assert timing.round_robin(runs, 23, clock) == {"a": 1.0, "b": 2.0, "c": 3.0}
    order = "".join(run() for run in clock.log)
    assert order == "abcbcacababcbca"


def test_at_least_as_many_repetitions_as_asked_for():
    counts = []

    class Counting(FakeClock):
        def batch(self, run, count):
            counts.append(count)
            return [float(len(counts))] * count

    medians = timing.round_robin({"a": lambda: None}, 21, Counting())
    assert sum(counts) >= 21
    assert medians == {"a": 3.0}  # the median round of five


@pytest.mark.parametrize(
    "alter, words",
    [
        (lambda out: out * 1.02, "wrong output: error up to"),
        (
            lambda out: out.index_fill(1, torch.tensor([0]), math.nan),
            "wrong output: error up to inf",
        ),
        (fail(RuntimeError("No kernel.\nMore.")), "No kernel."),
        (fail(UnavailableError("no windows")), "no windows"),
        (fail(NotImplementedError()), "NotImplementedError"),
    ],
)
def test_what_fails_is_left_out_and_the_others_go_on(alter, words):
    outcome = timed([Fake("hopper_attention"), Fake("fa3", alter), Fake("fa2")], SHAPES[:2])
    assert [record["impl"] for record in outcome.records] == ["hopper_attention", "fa2"] * 2
    assert [(name, label) for name, label, _ in outcome.excluded] == [
        ("fa3", shape.label) for shape in SHAPES[:2]
    ]
    assert all(words in reason for _, _, reason in outcome.excluded)
    assert not outcome.ours_failed()


def test_our_own_failure_is_told_apart():
    outcome = timed([Fake("hopper_attention", lambda out: out + 1), Fake("fa3")], [SHAPE])
    assert outcome.ours_failed()


def test_a_lost_device_ends_the_run_and_keeps_the_records():
    clock = FakeClock()

    class Killer(Fake):
        def bind(self, shape, q, k, v):
            if shape.causal:
                clock.broken = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().bind(shape, q, k, v)

    outcome = Outcome()
    saves = []
    with pytest.raises(
        runner.DeviceLostError, match=r"lost after fa3 on .* causal .*illegal memory"
    ):
        runner.run_timed(
            "forward",
            SHAPES[:2],
            [Killer("fa3")],
            outcome,
            run="now",
            clock=clock,
            device="cpu",
            after_shape=lambda: saves.append(len(outcome.records)),
        )
    assert saves == [1]


def test_warnings_explain_a_refused_backend():
    def alter(out):
        import warnings

        warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        warnings.warn(
            "Flash attention only supports head dim up to 256 (Triggered internally at x.cpp)",
            stacklevel=1,
        )
        warnings.warn("cuDNN attention has been runtime disabled.", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    outcome = timed([Fake("fa2", alter)], [SHAPE])
    assert outcome.excluded[0][2] == (
        "No available kernel. Aborting execution.; Flash attention only supports head dim up to 256"
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_the_sample_is_what_the_reference_gives(shape):
    q, k, v = runner.make_inputs(shape, "cpu")
    expected = accuracy.expect(shape, q, k, v, seed=3)
    whole, _ = reference.attention(q, k, v, causal=shape.causal, window_size=shape.window)
    torch.testing.assert_close(expected.exact, expected.sample.take(whole))
    assert {0, shape.seqlen_q - 1} <= set(expected.sample.rows)
    assert accuracy.compare(whole, expected).largest < 1e-12
    assert 1e-5 < expected.allowed < 1e-2


def test_the_sample_is_small_and_has_no_row_twice():
    sample = accuracy.draw_sample(Shape("bfloat16", 8, 8, 9, 5000, 10, 32, 4, False), seed=0)
    assert len(set(sample.rows)) == len(sample.rows) <= accuracy.SAMPLE_ROWS
    assert len(sample.heads) == accuracy.SAMPLE_HEADS
    assert len(sample.batches) == accuracy.SAMPLE_BATCHES


@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: shape.label)
def test_pytorchs_attention_is_bound_in_its_own_layout(shape):
    outcome = timed([Sdpa("math", SDPBackend.MATH)], [shape])
    assert not outcome.excluded
    assert outcome.records[0]["rmse"] < 1e-3


def test_pytorchs_attention_declines_what_it_cannot_say():
    outcome = timed([Sdpa("math", SDPBackend.MATH)], SHAPES[2:])
    assert [reason for _, _, reason in outcome.excluded] == [
        "PyTorch's interface to it has no window",
        "PyTorch's causal mask is aligned top left, ours bottom right",
    ]


def test_ours_is_flash_attn_func(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, causal, window_size):
        calls.append((causal, window_size))
        return reference.attention(q, k, v, causal=causal, window_size=window_size)[0].to(q.dtype)

    monkeypatch.setattr("hopper_attention.flash_attn_func", flash_attn_func)
    monkeypatch.setattr("hopper_attention.unavailable_reason", lambda: None)
    found, missing = contestants.gather(peers=False)
    assert [one.name for one in found] == ["hopper_attention"]
    assert not missing
    assert not timed(found).excluded
    assert set(calls) == {(shape.causal, shape.window) for shape in SHAPES}


def test_selecting_shapes():
    assert runner.select(SHAPES, None) == SHAPES
    assert runner.select(SHAPES, "causal|window") == SHAPES[1:]
    with pytest.raises(ValueError, match="no regular expression"):
        runner.select(SHAPES, "(")


@pytest.mark.parametrize("causal", [False, True])
def test_rmse_of_whole_outputs(causal):
    shape = Shape("float16", 32, 32, 2, 48, 48, 2, 2, causal=causal)
    outcome = Outcome()
    fakes = [Fake("hopper_attention"), Fake("fa3", fail(RuntimeError("no")))]
    labels = []
    rmse.run_rmse(
        [shape], fakes, outcome, "now", clock=FakeClock(), device="cpu", progress=labels.append
    )
    assert [re.sub(".* ", "", label) for label in labels] == ["normal", "outliers"]
    found = {(r["impl"], r["distribution"]): r["rmse"] for r in outcome.records}
    assert set(found) == {
        (impl, distribution)
        for impl in ("hopper_attention", "standard")
        for distribution in ("normal", "outliers")
    }
    for distribution in ("normal", "outliers"):
        ours, standard = found["hopper_attention", distribution], found["standard", distribution]
        assert 0 < ours < standard < 1e-2
    assert {(name, reason) for name, _, reason in outcome.excluded} == {("fa3", "no")}
    q, k, v = rmse.draw(shape, "normal", "cpu")
    exact, _ = reference.attention(q, k, v, causal=causal)
    rounded = (exact.half().double() - exact).square().mean().sqrt().item()
    assert found["hopper_attention", "normal"] == pytest.approx(rounded)


def test_an_output_that_is_not_finite_has_no_rmse():
    outcome = Outcome()
    shape = Shape("float16", 16, 16, 1, 16, 16, 1, 1, causal=False)
    fakes = [Fake("fa3", lambda out: out * math.nan)]
    rmse.run_rmse([shape], fakes, outcome, "now", clock=FakeClock(), device="cpu")
    assert {record["impl"] for record in outcome.records} == {"standard"}
    assert {reason for _, _, reason in outcome.excluded} == {"the output holds NaN or infinity"}
