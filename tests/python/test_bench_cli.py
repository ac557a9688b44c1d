"""The command line over stored and over faked results: tables, pictures, files, exit codes."""

import json
import re
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hopper_attention import reference
from hopper_attention.bench import contestants, records, session, table, timing
from hopper_attention.bench.contestants import Bound, Sdpa
from hopper_attention.bench.plot import plot_forward
from hopper_attention.bench.shapes import Shape, suite_shapes
from hopper_attention.cli import app

HEADER = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11",
    "date": "2026-01-02T03:04:05Z",
    "sources": "a" * 40,
    "ceilings": {"2026-01-02T03:04:05Z": {"matmul_bf16_tflops": 790.0, "copy_gbps": 4250.0}},
}
SPEEDS = {"hopper_attention": 1.0, "fa3": 0.98, "cudnn": 0.9, "fa2": 0.5}


@pytest.fixture
def stored(tmp_path):
    rows = []
    for shape in suite_shapes("forward"):
        best = 800 * shape.seqlen_q / (shape.seqlen_q + 400)
        for impl, speed in SPEEDS.items():
            rows.append(
                records.make_record(
                    "forward", impl, shape, HEADER["date"], ms=1.0, tflops=best * speed, rmse=1e-4
                )
            )
    tiny = suite_shapes("host")[0]
    rows.append(records.make_record("host", "hopper_attention", tiny, "1", ms=0.01, host_us=10.0))
    rows.append(records.make_record("host", "fa3", tiny, "1", ms=0.024, host_us=24.0))
    for distribution in ("normal", "outliers"):
        for impl in ("hopper_attention", "fa3", "standard"):
            shape = suite_shapes("rmse")[0]
            rows.append(
                records.make_record("rmse", impl, shape, "1", distribution=distribution, rmse=1e-5)
            )
    path = tmp_path / "h200.json"
    records.save(path, {**HEADER, "records": rows})
    return path


def printed(stored, **console):
    target = Console(width=100, highlight=False, **console)
    with target.capture() as capture:
        table.print_results(target, records.load(stored)["records"])
    return capture.get()


def test_tables_are_plain_where_there_is_no_terminal(stored):
    text = printed(stored, force_terminal=False)
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith(("+", "|"))]
    assert max(map(len, rows)) <= 100
    assert text.count("ours / best peer") == 7  # one of each head dim and mask, and rmse
    assert re.search(r"ours / best peer \|( *1\.02 \|){5} *1\.02 *\|?\n", text)
    line = next(line for line in text.splitlines() if line.startswith("forward: "))
    assert "best of fa3, cudnn, fa2: geometric mean 1.020, least 1.020" in line
    assert "36 shapes" in line
    assert re.search(r"bf16 d64 full b1 s64 h1 +\| +10\.0 \| +24\.0 \| +2\.40", text)
    assert re.search(r"fp16 +\| outliers +\|( +1e-05 \|){3} +1\.000", text)


def test_tables_have_colours_in_a_terminal(stored):
    assert "\x1b[1;32m1.02" in printed(stored, force_terminal=True, color_system="standard")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_the_same_for_the_same_results(stored, tmp_path, suffix):
    document = records.load(stored)
    pictures = [tmp_path / "new" / f"{name}.{suffix}" for name in "ab"]
    for picture in pictures:
        plot_forward(document, picture)
    first = pictures[0].read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(first) > 10_000
    if suffix == "png":
        assert first == pictures[1].read_bytes()


def test_pictures_need_the_extra_that_is_named(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib, of the extra 'study': pip inst"):
        plot_forward(records.load(stored), tmp_path / "a.png")
    stored_only = ["bench", "--plot-only", str(stored)]
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    for arguments in ([*stored_only, "--plot", "a.png"], ["bench", "forward", "--plot", "a.png"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert "pip install 'hopper-attention[study]'" in result.output
    assert runner.invoke(app, stored_only).exit_code == 0


def test_the_picture_shows_every_contestant_in_every_panel(stored, monkeypatch):
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    plot_forward(records.load(stored), stored.with_suffix(".png"))
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == [
        f"head dimension {d}, {mask}" for mask in ("full", "causal") for d in (64, 128, 256)
    ]
    for axis in axes:
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert set(lines) == {
            "hopper-attention",
            "FlashAttention-3",
            "cuDNN",
            "FlashAttention-2",
            "matrix product, 8192³",
        }
        assert list(lines["cuDNN"].get_xdata()) == [512, 1024, 2048, 4096, 8192, 16384]
    assert "NVIDIA H200: 16,384 tokens, hidden size 2,048" in drawn[0].get_suptitle()
    assert not plt.get_fignums()


def test_stored_results_are_shown_without_a_card(stored, tmp_path):
    picture = tmp_path / "images" / "forward.png"
    result = CliRunner().invoke(app, ["bench", "--plot-only", str(stored), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "geometric mean 1.020" in result.output
    assert "bf16 matrix product 790 TFLOP/s, copy 4250 GB/s" in result.output
    assert picture.stat().st_size > 10_000
    only_host = CliRunner().invoke(app, ["bench", "host", "--plot-only", str(stored)])
    assert "host: ours / best of fa3: geometric mean 2.400" in only_host.output
    assert "forward" not in only_host.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            [],
            "name a suite: forward, forward-shapes, host, rmse, backward, backward-shapes, "
            "backward-rmse, varlen, fp8, quantize, fp8-accuracy or all",
        ),
        (["sideways"], "unknown suite 'sideways'"),
        (["forward", "--only", "d512"], "'d512' matches no shape"),
        (["forward", "--only", "("], "no regular expression"),
        (["forward", "--reps", "5"], "reps"),
        (["--plot-only", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "220"})
    assert result.exit_code == 2
    assert words in re.sub(r"\s+", " ", result.output.replace("│", " "))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so():
    result = CliRunner().invoke(app, ["bench", "forward"])
    assert result.exit_code == 1
    assert "hopper-attention doctor" in result.output


class Ours:
    name = "hopper_attention"
    error = 0.0

    def context(self):
        return torch.no_grad()

    def bind(self, shape, q, k, v):
        def run():
            out, _ = reference.attention(q, k, v, causal=shape.causal)
            return (out + self.error).to(q.dtype)

        return Bound(run, lambda out: out)


@pytest.fixture
def small_world(monkeypatch):
    """A CPU that passes for a card: small shapes, our reference, PyTorch's plain attention."""
    shapes = [Shape("bfloat16", 16, 16, 1, 8, 8, 2, 2, causal) for causal in (False, True)]
    monkeypatch.setattr("hopper_attention.bench.shapes.suite_shapes", lambda suite, quick: shapes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "small card")
    from torch.nn.attention import SDPBackend

    ours = Ours()
    found = [ours, Sdpa("fa2", SDPBackend.MATH)]
    missing = {"fa3": "not [here]"}
    monkeypatch.setattr(contestants, "gather", lambda peers, folder: (list(found), dict(missing)))

    class Clock:
        def batch(self, run, count):
            run()
            return [0.5] * count

        def synchronize(self):
            pass

    class NoCeilings:
        def __init__(self, clock):
            pass

        def measure(self):
            pass

        def result(self):
            return {"matmul_bf16_tflops": 700.0, "copy_gbps": 4000.0}

    def start(found, plan, reps, json_file):
        made = session.Session(found, plan, reps, json_file, device="cpu", clock=Clock())
        made.ceilings = NoCeilings(None)
        return made

    monkeypatch.setattr(session, "start", start)
    return ours


def test_a_whole_run(small_world, tmp_path):
    path, picture = tmp_path / "h.json", tmp_path / "p.png"
    arguments = ["bench", "forward", "host", "rmse", "--json", str(path), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "fa3 takes no part: not [here]" in result.output
    assert "geometric mean 1.000" in result.output
    assert "a new file" in result.output
    document = records.load(path)
    assert {"device", "driver", "cuda", "torch", "date", "sources", "ceilings"} <= set(document)
    assert document["device"] == "small card"
    assert document["ceilings"][document["date"]]["copy_gbps"] == 4000.0
    counted = {}
    for record in document["records"]:
        counted[record["suite"], record["impl"]] = (
            counted.get((record["suite"], record["impl"]), 0) + 1
        )
    assert counted == {
        **{
            (suite, impl): 2
            for suite in ("forward", "host")
            for impl in ("hopper_attention", "fa2")
        },
        **{("rmse", impl): 4 for impl in ("hopper_attention", "fa2", "standard")},
    }
    assert picture.is_file()
    again = CliRunner().invoke(app, ["bench", "host", "--only", "causal", "--json", str(path)])
    assert again.exit_code == 0, again.output
    if document["sources"] is not None:
        assert "2 of them in place of old ones; 18 kept" in again.output
        assert len(records.load(path)["records"]) == len(document["records"])


def test_wrong_outputs_of_ours_fail_the_command(small_world, tmp_path):
    small_world.error = 0.5
    path = tmp_path / "h.json"
    result = CliRunner().invoke(app, ["bench", "forward", "--json", str(path)])
    assert result.exit_code == 1
    assert "hopper_attention was not measured on bf16 d16 full b1 s8 h2 and 1 more" in result.output
    assert "wrong output: error up to 0." in result.output
    assert {record["impl"] for record in records.load(path)["records"]} == {"fa2"}


def test_an_unreadable_result_file_is_refused_before_measuring(small_world, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps([1]))
    result = CliRunner().invoke(app, ["bench", "forward", "--json", str(path)])
    assert result.exit_code == 2
    assert json.loads(path.read_text()) == [1]


def test_the_sessions_own_ceilings_are_the_cards(monkeypatch, tmp_path):
    made = session.start([], [], 20, tmp_path / "none.json")
    assert isinstance(made.ceilings, timing.Ceilings)
    assert made.steps() == 2
