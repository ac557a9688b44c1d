"""README.md and docs/ hold the figures that stored results give; their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from hopper_attention.study.formats import names
from hopper_attention.study.records import SpeedRow, Study

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    path = ROOT / "tools" / "readme_tables.py"
    sys.path.insert(0, str(path.parent))  # as where it is run
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def stored_sections(tables):
    found = {}
    for page in tables.PAGES:
        found |= tables.sections_of(page.read_text(encoding="utf-8"))
    return found


NAMES = [
    "headline",
    "machine",
    "forward",
    "shapes",
    "host",
    "rmse",
    "backward",
    "backward_deterministic",
    "backward_shapes",
    "backward_rmse",
    "dtypes",
    "evidence",
    "study",
    "varlen_forward",
    "varlen_backward",
    "fp8_headline",
    "fp8_recipes",
    "fp8_context",
    "fp8_words",
    "fp8_speed",
    "fp8_forward",
    "fp8_quantizer",
    "fp8_end_to_end",
    "fp8_rmse",
    "fp8_uniform",
    "tiles",
    "training",
]


def test_every_section_is_checked(tables):
    made, missing = tables.make_sections()
    assert {*made, *missing} == set(NAMES)
    assert set(stored_sections(tables)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sections_hold_what_the_results_give(tables, name):
    made, missing = tables.make_sections()
    if name in missing:
        pytest.skip(f"nothing for it in {missing[name].name}")
    assert stored_sections(tables)[name] == made[name], "out of date; run: make readme"


def test_each_section_is_in_one_page_and_closed(tables):
    text = "\n".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    begun = re.findall(r"^<!-- begin (\w+) -->$", text, re.MULTILINE)
    assert sorted(begun) == sorted(NAMES)
    assert sorted(re.findall(r"^<!-- end (\w+) -->$", text, re.MULTILINE)) == sorted(NAMES)


def test_local_links_lead_somewhere():
    broken = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
                broken.append(f"{page.name}: {target}")
    assert not broken, "\n".join(broken)


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def record(impl, tflops, **changes):
    fields = {
        "suite": "forward",
        "impl": impl,
        "dtype": "bfloat16",
        "head_dim": 64,
        "head_dim_v": 64,
        "batch": 16,
        "seqlen_q": 1024,
        "seqlen_k": 1024,
        "heads": 32,
        "heads_kv": 32,
        "causal": False,
        "window": [-1, -1],
        "layout": "bshd",
        "tflops": tflops,
        "run": "one",
    }
    return fields | changes


def document(*rows):
    return {"device": "a card", "date": "2026-01-02T03:04:05Z", "records": list(rows)}


def test_the_forward_table(tables):
    long = {"batch": 2, "seqlen_q": 8192, "seqlen_k": 8192}
    results = document(
        record("hopper_attention", 450.4),
        record("fa3", 300.0),
        record("cudnn", 500.4),
        record("hopper_attention", 600.0, **long),
        record("fa3", 500.0, **long),
    )
    lines = tables.forward(results).splitlines()
    assert lines[0] == "| d | mask | TFLOP/s | 1k | 8k |"
    assert lines[2] == "| 64 | full | hopper-attention | 450 | 600 |"
    assert lines[4] == "| 64 | full | cuDNN | 500 | – |"
    assert lines[5] == "|  |  | **ours / best peer** | **0.90** | **1.20** |"
    assert "at 1.04 times the speed" in tables.headline(results)  # sqrt(0.90 * 1.20)
    assert "least ratio is 0.90 (bf16 d64 full b16 s1024 h32)" in tables.headline(results)


def test_a_changed_figure_changes_the_page(tables):
    results = document(record("hopper_attention", 450.0), record("fa3", 500.0))
    page = "a\n\n<!-- begin forward -->\n\nold\n\n<!-- end forward -->\n\n<!-- begin other -->\n"
    new = tables.replace_sections(page, {"forward": tables.forward(results)})
    assert tables.sections_of(new) == {"forward": tables.forward(results)}
    assert new.startswith("a\n")
    assert new.endswith("<!-- begin other -->\n")
    assert tables.replace_sections(new, {"forward": tables.forward(results)}) == new


@pytest.mark.parametrize(
    "found, words",
    [
        ({"device": "a card", "date": "2026-01-02T", "passed": 9, "failed": 1, "skipped": 0}, "9 "),
        ({"pending": "no card yet"}, "**Pending: no card yet.**"),
    ],
)
def test_the_evidence_is_told_as_it_is(tables, found, words):
    text = tables.evidence(found)
    assert words in text
    assert ("1 failed" in text) == ("failed" in found)


def test_the_stored_study_is_a_whole_one(tables):
    settings = json.loads(tables.STUDY.read_text(encoding="utf-8"))["settings"]
    assert settings["sources"] == ["model", "normal", "outliers", "context"]
    assert settings["formats"] == names()
    assert settings["max_keys"] == 524_288
    assert settings["layers"] is None


def test_the_table_of_fp8_speed(tables):
    study = Study(
        settings={},
        environment={"device": "a card", "date": "2026-01-02"},
        sources=[],
        rows=[],
        seconds=1.0,
        speed=[
            SpeedRow("bf16", 1, 4096, 16, 128, True, 0.0, 2.0, 2.0),
            SpeedRow("fp8", 1, 4096, 16, 128, True, 0.3, 1.25, 1.6),
        ],
    )
    lines = tables.readme_fp8.fp8_speed(study).splitlines()
    shape = "1 × 4096 × 16 × 128, causal"
    assert lines[2] == f"| {shape} | `bf16` | 0.000 | 2.000 | 2.000 | **1.00** |"
    assert lines[3] == f"| {shape} | `fp8` | 0.300 | 1.250 | 1.600 | **1.25** |"
    assert lines[-1] == "Milliseconds, a card, 2026-01-02."


def fp8(suite, impl, **fields):
    dtype = "bfloat16" if impl == "fa3" else "float8_e4m3fn"
    return record(impl, fields.pop("tflops", None), suite=suite, dtype=dtype) | fields


def test_the_table_of_fp8_attention(tables):
    speeds = {"hopper_attention": 550.0, "cudnn_fp8": 500.0, "fa3_fp8": 400.0, "fa3": 440.0}
    long = {"seqlen_q": 16384, "seqlen_k": 16384, "batch": 1}
    rows = [fp8("fp8", impl, tflops=speed, **long) for impl, speed in speeds.items()]
    text = tables.readme_fp8.forward(document(*rows))
    assert "geometric mean 1.100, least 1.100" in text
    assert "d64 full 1.25 (1.17)" in text
    assert "| 64 | full | hopper-attention | 550 |" in text
    assert "| 64 | full | FlashAttention-3 in bf16 | 440 |" in text
    assert "|  |  | **ours / fa3_fp8** | **1.38** |" in text
    assert "hopper-attention, fast" not in text


def test_the_tables_of_the_quantizer(tables):
    rows = [
        fp8("quantize", "copy", part="quantize", gbps=4000.0),
        fp8("quantize", "hopper_attention", part="quantize", recipe="fp8", gbps=3000.0),
        fp8("quantize", "hopper_attention", part="end to end", tflops=600.0),
        fp8("quantize", "hopper_attention_bf16", part="end to end", tflops=500.0),
    ]
    text = tables.readme_fp8.quantizer(document(*rows))
    assert "| `fp8` | 3000 (0.75) |" in text
    assert "| device copy | 4000 |" in text
    text = tables.readme_fp8.end_to_end(document(*rows))
    assert "| e4m3 d64 full b16 s1024 h32 | 600 | 500 | **1.20** |" in text


def test_the_tables_of_fp8_accuracy(tables):
    small = {"batch": 1, "seqlen_q": 64, "seqlen_k": 64}
    common = {"distribution": "normal", "recipe": "fp8"}
    rows = [
        fp8("fp8-accuracy", "hopper_attention", rmse=1.4e-3, **common),
        fp8("fp8-accuracy", "hopper_attention", rmse=2.0e-3, **common, **small),
        fp8("fp8-accuracy", "emulation", rmse=2.1e-3, **common, **small),
        fp8("fp8-accuracy", "fa3_fp8", rmse=1.5e-3, distribution="normal"),
        fp8("fp8-accuracy", "hopper_attention", rmse=1.0, bias=-0.0123, distribution="uniform"),
    ]
    text = tables.readme_fp8.rmse(document(*rows))
    assert "| `fp8` | 1.40e-03 | 1.050 |" in text
    assert "| FlashAttention-3 of vLLM | 1.50e-03 | – |" in text
    assert "| 64 | hopper-attention | -1.23 |" in tables.readme_fp8.uniform(document(*rows))


def training(tables, tmp_path):
    def run(attention, speed, losses):
        held_out = [[1, losses[0] + 1], [2, losses[1] + 1]]
        return {
            "attention": attention,
            "head_dim": 64,
            "parameters": 25_300_000,
            "tokens_per_second": speed,
            "peak_bytes": 2**31,
            "losses": losses,
            "held_out": held_out,
        }

    settings = {"steps": 2, "batch": 8, "seqlen": 2048, "layers": 8}
    flags = {"compiled": True, "checkpointing": False, "deterministic": False}
    document = {
        "device": "a card",
        "torch": "2.11",
        "date": "2026-01-02T",
        "corpus": {"files": 799, "training_bytes": 12_000_000, "held_out_bytes": 600_000},
        "settings": settings | flags,
        "runs": [run("standard", 1e5, [5.0, 3.0]), run("ours", 2.5e5, [5.0, 3.1])],
    }
    path = tmp_path / "train.json"
    tables.readme_training.training_report.save(document, path)
    return path


def test_the_section_of_training(tables, tmp_path):
    path = training(tables, tmp_path)
    text = tables.readme_training.section(path)
    assert "a card, PyTorch 2.11, 2026-01-02: 25.3 million weights in 8 layers, 2 steps of" in text
    assert "16,384 bytes in sequences of 2,048, blocks compiled by torch.compile; 12.0 MB" in text
    assert "| 64 | hopper-attention | 250,000 | **2.50** | 2.00 | 4.1000 | +0.1000 |" in text
    assert "hopper-attention 0.0500." in text  # the mean of both steps
    assert "](images/training_h200.png)" in text
    tables.readme_training.draw(path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_there_may_be_no_training_yet(tables, tmp_path):
    missing = tmp_path / "none.json"
    assert tables.readme_training.section(missing) == "No run on a card is stored yet."
    tables.readme_training.draw(missing, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
