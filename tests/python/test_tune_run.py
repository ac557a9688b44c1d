"""`hopper-attention tune` after the choice of candidates: compiling, turns, processes, tables."""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import hopper_attention
from hopper_attention import reference
from hopper_attention.bench.shapes import Shape
from hopper_attention.cli import app
from hopper_attention.tune import build, report, run, worker
from hopper_attention.tune.build import Builder, Built, PtxasReport, parse_log
from hopper_attention.tune.rules import Cost, Instance, TuneError, label

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = {"tile_n": 128, "stages": 2, "ping_pong": True, "schedule": "kAfterRow"}
FULL = Instance("bf16_d64_full", "bfloat16", 64, 64, "full", CHOSEN)
MASKED = Instance("fp16_d192x128_masked", "float16", 192, 128, "masked", CHOSEN)
LOG = """\
ptxas info    : 11 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for _Z6kernelv
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 168 registers, used 12 barriers
"""


def cost(**changes):
    return Cost(CHOSEN | changes, None, 192, 512, 100 * 1024, 128)


def built(**changes):
    return Built(cost(**changes), Path("/nowhere.so"), PtxasReport(128, 0, ()))


def test_ptxas_log():
    assert parse_log(LOG) == PtxasReport(168, 44, ("C7510",))
    with pytest.raises(ValueError, match="names no kernel"):
        parse_log("ptxas info    : 11 bytes gmem\n")


class FakeTools:
    """CMake and nvcc that leave what they would leave."""

    def __init__(self):
        self.version = "13.0.88"
        self.configured = []
        self.fail = None

    def run(self, command, **_):
        done = SimpleNamespace(returncode=0, stdout="", stderr="")
        if command[-1] == "--version":
            done.stdout = f"Cuda compilation tools, release 13.0, V{self.version}\n"
        elif "--build" in command:
            folder = Path(command[command.index("--build") + 1])
            header = (folder / "candidate.h").read_text()
            if self.fail is not None and self.fail in header:
                done.returncode = 1
                done.stderr = "[1/3] Building\nmma.cuh(7): error: static assertion failed\nstop\n"
                return done
            (folder / "logs").mkdir()
            (folder / "logs" / "forward_16bit_d64.cu.log").write_text(LOG)
            (folder / "libhopper_attention.so").touch()
        else:
            self.configured.append(command)
        return done


@pytest.fixture
def tools(monkeypatch):
    fake = FakeTools()
    monkeypatch.setattr(build.subprocess, "run", fake.run)
    monkeypatch.setattr(build, "find_cmake", lambda: ["cmake"])
    return fake


def test_each_candidate_is_built_in_a_folder_of_its_own(tools, tmp_path):
    builder = Builder(ROOT, tmp_path, FULL, "/cuda/nvcc", ("A=b",))
    steps = []
    found = builder.build([cost(), cost(tile_n=96)], 2, lambda: steps.append(1))
    assert [one.error for one in found] == [None, None]
    assert [one.ptxas for one in found] == [parse_log(LOG)] * 2
    assert found[0].library != found[1].library
    assert len(steps) == len(tools.configured) == 2
    for one in found:
        folder = one.library.parent
        (command,) = (x for x in tools.configured if str(folder) in x)
        assert {
            f"-DCMAKE_PROJECT_INCLUDE={folder / 'candidate.cmake'}",
            "-DCMAKE_CUDA_COMPILER=/cuda/nvcc",
            "-DHOPPER_ATTENTION_INSTANCES=^bf16_d64_full$",
            "-DA=b",
        } <= set(command)
        assert (
            f'-include \\"{folder / "candidate.h"}\\"' in (folder / "candidate.cmake").read_text()
        )
        assert one.label in (folder / "candidate.h").read_text()


def test_what_is_current_is_not_built_again(tools, tmp_path):
    builder = Builder(ROOT, tmp_path, FULL, "/cuda/nvcc")
    builder.build([cost()], 1)
    again = builder.build([cost(), cost(tile_n=96)], 1)
    assert len(tools.configured) == 2
    assert all(one.library.is_file() for one in again)
    tools.version = "13.1.5"
    builder.build([cost()], 1)
    assert len(tools.configured) == 3


def test_without_nvcc_what_was_compiled_elsewhere_is_taken(tools, tmp_path, monkeypatch):
    Builder(ROOT, tmp_path, FULL, "/cuda/nvcc").build([cost()], 1)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    without = Builder(ROOT, tmp_path, FULL, None)
    assert without.build([cost()], 1)[0].error is None
    with pytest.raises(TuneError, match=r"nvcc was not found.*CUDA_HOME"):
        without.build([cost(), cost(tile_n=96)], 1)


def test_a_candidate_that_does_not_compile(tools, tmp_path):
    tools.fail = "tile_n = 96"
    fine, wrong = Builder(ROOT, tmp_path, FULL, "/n").build([cost(), cost(tile_n=96)], 2)
    assert fine.error is None
    assert (wrong.library, wrong.ptxas) == (None, None)
    assert wrong.error == "mma.cuh(7): error: static assertion failed\nstop"


def test_no_cmake(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(TuneError, match=r"CMake was not found.*pip install cmake"):
        build.find_cmake()


def test_nvcc_is_found_where_cmake_finds_it(monkeypatch, tmp_path):
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no version\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)
    with pytest.raises(TuneError, match="does not say its version"):
        build.nvcc_version(str(nvcc))


def test_problems_of_an_instance():
    shapes = run.problems(FULL, (512, 16_384))
    assert [shape.label for shape in shapes] == [
        "bf16 d64 full b32 s512 h32",
        "bf16 d64 full b1 s16384 h32",
    ]
    assert [shape.mask for shape in run.problems(MASKED)] == ["causal"] * 3
    (shape,) = run.problems(MASKED, (4_096,), "full")
    assert shape.label == "fp16 d192x128 full b4 s4096 h10"
    with pytest.raises(ValueError, match="computes no causal mask"):
        run.problems(FULL, mask="causal")
    with pytest.raises(ValueError, match=r"1 or more, got \[512, 0\]"):
        run.problems(FULL, (512, 0))


SHAPES = run.problems(FULL, (512, 2_048))


def fake_times(times, failing=None):
    """Times by tile_n, in milliseconds, and the jobs in their order."""
    jobs = []

    def measure(job):
        jobs.append(job)
        tile_n = int(re.search(r"tile_n=(\d+)", job.label).group(1))
        if tile_n == failing:
            raise TuneError("wrong output")
        return {shape.label: times[tile_n] * (1 + len(jobs) % 2) for shape in job.shapes}

    return measure, jobs


def test_candidates_take_turns():
    candidates = [built(tile_n=n) for n in (128, 96, 64)]
    broken = Built(cost(tile_n=32), None, None, "does not compile")
    measure, jobs = fake_times({128: 1.0, 96: 2.0}, failing=64)
    results = run.take_turns(FULL, [*candidates, broken], SHAPES, 4, 7, measure)
    turns = [int(re.search(r"\d+", job.label).group()) for job in jobs]
    assert turns == [128, 96, 64, 96, 128, 128, 96, 128, 96]
    assert [job.check for job in jobs] == [True] * 3 + [False] * 6
    assert {(job.reps, job.instance, job.shapes) for job in jobs} == {
        (7, "bf16_d64_full", tuple(SHAPES))
    }
    assert [len(result.rounds) for result in results] == [4, 4, 0, 0]
    assert [result.error for result in results] == [None, None, "wrong output", "does not compile"]
    assert [result.chosen for result in results] == [True, False, False, False]


def timed(ms, **changes):
    result = run.Result(built(**changes), not changes)
    result.rounds = [{shape.label: ms * factor for shape in SHAPES} for factor in (1.0, 0.9, 1.5)]
    return result


def test_table_is_sorted_by_speed():
    failed = run.Result(built(tile_n=32), False, [], "wrong output")
    results = [timed(2.0), timed(4.0, tile_n=64), failed, timed(1.6, ping_pong=False)]
    console = report.make_console()
    with console.capture() as capture:
        console.print(report.make_table(console, FULL, results, SHAPES))
    rows = [re.split(r"\s*\|\s*", line) for line in capture.get().splitlines() if "After" in line]
    flops = 4 * 16_384 * 32 * 64  # of one query token's row, times its keys below
    expected = [
        ("128", "false", 1.6, "1.250", ""),
        ("128", "true", 2.0, "1.000", "chosen"),
        ("64", "true", 4.0, "0.500", ""),
    ]
    for row, (tile_n, ping_pong, ms, speed, remark) in zip(rows, expected, strict=False):
        cells = row[1:-1]
        assert cells[:4] == [tile_n, "2", ping_pong, "AfterRow"]
        assert cells[4:7] == ["128", "0", "100"]
        for cell, keys in zip(cells[7:9], (512, 2_048), strict=True):
            assert cell == f"{flops * keys / ms * 1e-9:.0f} ({ms:.3f})"
        assert cells[9:] == [speed, remark]
    assert rows[3][8:12] == ["-", "-", "-", "failed"]
    assert report.summary(results, SHAPES) == (
        "fastest of 3: ping_pong=false, 1.250 times the chosen config's speed"
    )
    assert report.summary(results[:2], SHAPES) == "the chosen config is the fastest of 2"
    assert report.summary([failed], SHAPES) is None


def test_file():
    failed = run.Result(built(tile_n=32), False, [], "wrong output")
    results = [timed(2.0), failed, timed(1.0, tile_n=64)]
    found = json.loads(json.dumps(report.document({"device": "x"}, FULL, results, SHAPES)))
    assert (found["device"], found["instance"]) == ("x", "bf16_d64_full")
    fast, chosen, wrong = found["candidates"]
    assert (fast["config"]["tile_n"], fast["chosen"]) == (64, False)
    assert (chosen["config"], chosen["chosen"], chosen["spill_bytes"]) == (CHOSEN, True, 0)
    assert (wrong["error"], "ms" in wrong) == ("wrong output", False)
    assert chosen["ms"] == {shape.label: 2.0 for shape in SHAPES}
    for shape in SHAPES:
        assert math.isclose(fast["tflops"][shape.label], shape.flops() * 1e-9, rel_tol=1e-2)


def test_processes():
    processes = worker.Processes(timeout=60)
    assert processes.call(math.factorial, 5) == 120
    with pytest.raises(TuneError, match="ValueError: invalid literal"):
        processes.call(int, "x")
    with pytest.raises(TuneError, match=r"died \(exit code 3\)"):
        processes.call(os._exit, 3)
    assert processes.call(os.getenv, "PATH") == os.environ["PATH"]
    with pytest.raises(TuneError, match=r"did not end within 0 s"):
        worker.Processes(timeout=0.2).call(time.sleep, 60)


class FakeClock:
    def batch(self, call, count):
        call()
        return [3.0, 1.0, *[2.0] * (count - 2)]

    def synchronize(self):
        pass


SMALL = Shape("bfloat16", 16, 16, 2, 40, 40, 2, 2, True)


@pytest.fixture
def package(monkeypatch):
    """The package as it were on a candidate's library, by the reference."""
    state = SimpleNamespace(reason="tile_n=1", instance="row", offset=0.0)

    def attend(q, k, v, causal, window_size):
        return (reference.attention(q, k, v, causal=causal)[0] + state.offset).to(q.dtype)

    monkeypatch.setattr(hopper_attention, "flash_attn_func", attend)
    monkeypatch.setattr(hopper_attention, "explain", lambda *_, **__: state)
    return state


def job(check=True):
    return worker.Job(Path("x.so"), "row", "tile_n=1", (SMALL,), 5, check)


def test_a_job_measures(package):
    assert worker.measure(job(), FakeClock(), "cpu") == {SMALL.label: 2.0}


def test_a_job_refuses_a_wrong_output(package):
    package.offset = 0.1
    with pytest.raises(TuneError, match="wrong output"):
        worker.measure(job(), FakeClock(), "cpu")
    assert worker.measure(job(check=False), FakeClock(), "cpu")


@pytest.mark.parametrize("field", ["reason", "instance"])
def test_a_job_refuses_another_kernel(package, field):
    setattr(package, field, "another")
    with pytest.raises(TuneError, match=r"runs .*another.*, not row \(tile_n=1\)"):
        worker.measure(job(), FakeClock(), "cpu")


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200"})


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
def test_command_lists_the_kernels(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = tune()
    assert result.exit_code == 0
    assert re.search(r"^bf16_d128_full +tile_n=\d+ stages=\d", result.stdout, re.MULTILINE)


@needs_compiler
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["bf16"], "no kernel is named 'bf16'"),
        (["bf16_d64_full", "--mask", "causal"], "computes no causal mask"),
        (["bf16_d64_packed"], "bf16_d64_masked, whose tile is the same"),
        (["bf16_d64_full", "--mask", "window"], "allowed: full, causal"),
        (["bf16_d64_full", "--lengths", "1k"], "integers separated by commas"),
        (["bf16_d64_full", "--set", "keys=1"], "a field of tile_n"),
    ],
)
def test_command_refuses(monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    result = tune(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_command_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = tune("bf16_d64_full")
    assert result.exit_code == 1
    assert "is not in a source checkout" in result.output


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_command_without_a_card(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = tune("bf16_d64_full")
    assert result.exit_code == 1
    assert "nothing can be timed here" in result.output
    assert "--compile-only" in result.output


@needs_compiler
@pytest.mark.parametrize("failing, code", [(None, 0), (96, 0), (128, 1)])
def test_command_from_end_to_end(monkeypatch, tmp_path, failing, code):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda: None)
    monkeypatch.setattr(
        Builder,
        "build",
        lambda self, costs, jobs, progress: [
            Built(one, tmp_path / label(one.config), PtxasReport(128, 0, ())) for one in costs
        ],
    )
    measure, _ = fake_times({128: 2.0, 112: 1.0, 96: 3.0}, failing)
    monkeypatch.setattr(worker.Processes, "call", lambda self, function, job: measure(job))
    file = tmp_path / "out.json"
    chosen = ["--set", "tile_n=96,112,256", "--set", "schedule=kAfterRow"]
    result = tune("bf16_d64_full", *chosen, "--rounds", "2", "--json", str(file))
    assert result.exit_code == code, result.output
    assert "left out: tile_n=256" in result.output
    found = json.loads(file.read_text())
    assert found["candidates"][0]["config"]["tile_n"] == 112
    assert (found["rounds"], len(found["candidates"])) == (2, 3)
    assert [one["error"] for one in found["candidates"] if one["error"]] == (
        ["wrong output"] if failing else []
    )
    assert ("failed: tile_n=" in result.output) == (failing is not None)
