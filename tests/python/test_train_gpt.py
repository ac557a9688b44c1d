"""examples/train_gpt.py on the CPU: what it trains on, what it trains, and what it tells."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import hopper_attention

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example():
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)  # as where it is run
    spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "examples" / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    sys.path.remove(folder)
    return module


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small: threads wait for each other more than they help
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(example):
    return example.read_corpus()


def run(example, *arguments):
    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, ["--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    kinds = [f"--attention={kind}" for kind in ("standard", "reference")]
    files = ["--json", folder / "run.json", "--plot", folder / "run.png"]
    dims = ["--head-dim=32", "--head-dim=64"]
    result = run(example, *kinds, *dims, *files, "--width=64", "--seqlen=64", "--steps=9")
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "run.json").read_text()), folder / "run.png"


def test_attentions_train_alike(trained):
    _, document, _ = trained
    assert [(one["head_dim"], one["attention"]) for one in document["runs"]] == [
        (dim, kind) for dim in (32, 64) for kind in ("standard", "reference")
    ]
    for dim in (32, 64):
        standard, other = [one for one in document["runs"] if one["head_dim"] == dim]
        assert len(standard["losses"]) == 9
        assert abs(standard["losses"][0] - math.log(256)) < 0.3  # nothing is known yet
        assert standard["held_out"][-1][1] < standard["losses"][0] - 0.3
        assert [step for step, _ in standard["held_out"]] == [4, 8, 9]
        torch.testing.assert_close(
            torch.tensor(other["losses"]), torch.tensor(standard["losses"]), atol=2e-4, rtol=0
        )
    assert document["runs"][0]["losses"] != document["runs"][2]["losses"]  # another model
    assert document["corpus"]["files"] > 100


def test_the_table_and_the_picture(trained):
    output, document, picture = trained
    assert "9 steps of 2 × 64 bytes" in output
    for one in document["runs"]:
        rate = one["tokens_per_second"]  # a tenth is the file's last digit
        assert any(f"{x:,.0f}" in output for x in (rate - 0.05, rate, rate + 0.05))
        assert f"{one['held_out'][-1][1]:.4f}" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--attention=ours"], "ours cannot run here"),
        (["--attention=ours-fp8"], "reference, standard and sdpa can"),
        (["--head-dim=48"], "even divisors of the width"),
        (["--device=tpu"], "neither cpu nor cuda"),
        (["--seqlen=1000000000"], "the text allows"),
    ],
)
def test_what_cannot_be_had_is_said(example, arguments, words):
    result = run(example, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def small(example, **changes):
    return example.Settings(
        **{"steps": 1, "batch": 2, "seqlen": 32, "layers": 2, "width": 64, "held_out_batches": 1}
        | changes
    )


def test_recomputed_activations_give_the_same_gradients(example, corpus):
    gradients = []
    for checkpointing in (False, True):
        settings = small(example, checkpointing=checkpointing)
        one = example.Training(example.Attention.STANDARD, 32, settings, corpus, "cpu")
        one.loss(one.text, one.starts[0]).backward()
        gradients.append([p.grad for p in one.model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("kind", ["standard", "sdpa", "ours", "ours-fp8", "reference"])
def test_each_attention_is_causal_attention(example, monkeypatch, kind):
    def stands_in(q, k, v, **options):
        options.pop("deterministic", None)
        return hopper_attention.reference.attention(q, k, v, **options)[0].to(q.dtype)

    monkeypatch.setattr(hopper_attention, "flash_attn_func", stands_in)
    monkeypatch.setattr(hopper_attention, "flash_attn_fp8_func", stands_in)
    q, k, v = torch.randn(3, 2, 17, 4, 16, dtype=torch.float64).unbind()
    expected, _ = hopper_attention.reference.attention(q, k, v, causal=True)
    function = example.attention_function(example.Attention(kind))
    tolerance = 1e-6 if kind == "standard" else 1e-12  # its softmax is in float32
    torch.testing.assert_close(function(q, k, v), expected, atol=tolerance, rtol=0)


def test_rotation_depends_on_distances_alone(example):
    gpt = sys.modules["gpt"]
    model = example.GPT(1, 16, 16, 32, gpt.standard_attention)
    one, other = torch.randn(2, 16).expand(32, 1, 2, 16).unsqueeze(0).unbind(3)
    one, other = gpt.rotate(one, model.cos, model.sin), gpt.rotate(other, model.cos, model.sin)
    scores = one[0, :, 0] @ other[0, :, 0].T
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_text_is_held_out_by_file(example, tmp_path):
    for index in range(200):
        (tmp_path / f"m{index}.py").write_text(f"{index:03}" * 2000)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("skipped")
    (tmp_path / "notes.txt").write_text("skipped")
    corpus = example.read_corpus(tmp_path)
    parts = [bytes(part.tolist()) for part in (corpus.training, corpus.held_out)]
    found = [{text[:3] for text in part.split(b"\0")[:-1]} for part in parts]
    assert corpus.files == 200
    assert not found[0] & found[1]
    assert found[0] | found[1] == {f"{index:03}".encode() for index in range(200)}
    assert 2 <= len(found[1]) <= 30
    assert all(b"skipped" not in part for part in parts)
    assert example.read_corpus(tmp_path).sha256 == corpus.sha256
    (tmp_path / "m0.py").write_text("other")
    assert example.read_corpus(tmp_path).sha256 != corpus.sha256


def test_too_little_text_is_refused(example, tmp_path):
    (tmp_path / "one.py").write_text("short")
    with pytest.raises(ValueError, match=r"too little text in .*: 1 \.py files"):
        example.read_corpus(tmp_path)


def test_targets_are_the_next_bytes(example):
    text = torch.arange(100, dtype=torch.uint8)
    tokens, targets = example.windows(text, torch.tensor([0, 60]), 39)
    assert torch.equal(tokens, torch.stack([torch.arange(0, 39), torch.arange(60, 99)]))
    assert torch.equal(targets, tokens + 1)


def test_the_learning_rate_rises_and_falls(example):
    settings = small(example, steps=100, warmup=10, learning_rate=1.0)
    rates = [example.learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_means_of_losses(example):
    report = example.training_report
    assert report.smoothed([4.0, 2.0]) == [4.0, 3.0]
    assert report.smoothed([0.0] * 5 + [1.0] * 25)[-1] == pytest.approx(1.0)
    assert report.smoothed([0.0] * 5 + [1.0] * 19)[-1] == pytest.approx(0.95)
