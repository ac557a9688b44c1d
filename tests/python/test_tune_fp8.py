"""`hopper-attention tune` on kernels of e4m3: what is quantized, run and checked."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import hopper_attention
from hopper_attention import emulation_fp8
from hopper_attention.bench.shapes import FP8, Shape
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.tune import run, worker
from hopper_attention.tune.build import Built, PtxasReport
from hopper_attention.tune.rules import Cost, Instance, TuneError

FULL = Instance("e4m3_d64_full", FP8, 64, 64, "full", {})
MASKED = replace(FULL, name="e4m3_d64_masked", mask="masked")
FAST = replace(MASKED, name="e4m3fast_d64_masked", dtype=FP8 + "_fast")
BF16 = replace(FULL, name="bf16_d64_full", dtype="bfloat16")
SMALL = Shape(FP8, 16, 16, 2, 40, 40, 2, 2, True)


@pytest.mark.parametrize(
    "instance, mask, recipe",
    [
        (FULL, None, Fp8Recipe()),
        (MASKED, None, Fp8Recipe()),
        (MASKED, "full", Fp8Recipe(transpose_v=False)),
        (FAST, None, Fp8Recipe(accumulation="fast")),
        (FAST, "full", Fp8Recipe(accumulation="fast")),
        (BF16, None, None),
    ],
)
def test_problems_are_quantized_so_that_the_kernel_serves_them(instance, mask, recipe):
    shapes = run.problems(instance, (512, 2_048), mask)
    assert run.recipe_for(instance, shapes) == recipe
    assert {shape.dtype for shape in shapes} == {"bfloat16" if instance is BF16 else FP8}
    jobs = []
    one = Built(Cost({}, None, 192, 512, 1024, 128), Path("/x.so"), PtxasReport(128, 0, ()))
    run.take_turns(instance, [one], shapes, 1, 5, lambda job: jobs.append(job) or {})
    assert [job.recipe for job in jobs] == [recipe]


class FakeClock:
    def batch(self, call, count):
        call()
        return [2.0] * count

    def synchronize(self):
        pass


@pytest.fixture
def package(monkeypatch):
    """The package as it were on a candidate's library, emulated."""
    state = SimpleNamespace(reason="tile_n=1", instance="row", factor=1.0, seen=[])

    def attend(x, causal, window_size):
        state.seen.append(x.recipe)
        return emulation_fp8.attention(x, causal=causal)[0] * state.factor

    def explain(x, causal, window_size):
        assert isinstance(x, hopper_attention.Quantized)
        return state

    monkeypatch.setattr(hopper_attention, "flash_attn_fp8_func", attend)
    monkeypatch.setattr(hopper_attention, "explain", explain)
    return state


@pytest.mark.parametrize("recipe", [Fp8Recipe(), Fp8Recipe(transpose_v=False)], ids=str)
def test_a_job_quantizes_measures_and_checks(package, recipe):
    job = worker.Job(Path("x.so"), "row", "tile_n=1", (SMALL,), 5, True, recipe)
    assert worker.measure(job, FakeClock(), "cpu") == {SMALL.label: 2.0}
    assert set(package.seen) == {recipe}
    package.factor = 1.2
    with pytest.raises(TuneError, match="wrong output"):
        worker.measure(job, FakeClock(), "cpu")
