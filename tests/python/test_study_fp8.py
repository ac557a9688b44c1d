"""The study's FP8 recipes: who computes, the context, the verdict, and the pictures."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hopper_attention import emulation_fp8
from hopper_attention.recipe import Fp8Recipe
from hopper_attention.study import Settings, StudyError, run_study
from hopper_attention.study.context import uniform_inputs
from hopper_attention.study.distributions import random_inputs
from hopper_attention.study.formats import EMULATION, contestants
from hopper_attention.study.plots import plot_heads, plot_sources
from hopper_attention.study.plots_fp8 import plot_context, plot_recipes
from hopper_attention.study.recipes import DEFAULT, RECIPES, is_fp8
from hopper_attention.study.records import (
    ContextRow,
    Row,
    Source,
    SpeedRow,
    Study,
    read_json,
    write_json,
)
from hopper_attention.study.report import context_table, speed_table
from hopper_attention.study.verdict import fp8_in_words

SMALL = {"batch": 1, "seqlen": 64, "heads": 2, "head_dim": 16, "max_keys": 4096, "device": "cpu"}
SHAPE = {"batch": 1, "seqlen_q": 8, "seqlen_k": 8, "heads": 2, "heads_kv": 2, "head_dim": 16}
SHAPE |= {"head_dim_v": 16, "causal": False}


def row(format_name, rmse, source="model", level="all", head=None, nonfinite=0):
    layer = None if head is None else 0
    return Row(
        source=source,
        level=level,
        layer=layer,
        layer_name=None,
        head=head,
        format=format_name,
        method="ours",
        by="emulation",
        rmse=rmse,
        relative_rmse=10 * rmse,
        max_error=1.0,
        cosine=1.0,
        arithmetic_rmse=rmse,
        arithmetic_relative_rmse=10 * rmse,
        elements=100,
        nonfinite=nonfinite,
    )


def make_study(**changes):
    study = Study(
        settings={},
        environment={"device": "CPU"},
        sources=[Source("model", "some/model on text.txt", SHAPE), Source("normal", "N", SHAPE)],
        rows=[
            *(row("bf16", 1e-4, source) for source in ("model", "normal")),
            *(row("fp8", 1e-3, source) for source in ("model", "normal")),
            *(row("fp8-tensor", 2e-3, source) for source in ("model", "normal")),
            *(row("fp8-fast", 9e-4, source) for source in ("model", "normal")),
            *(row("fp8", 1e-3, level="head", head=head) for head in range(4)),
            *(
                row("fp8-smooth", error, level="head", head=head)
                for head, error in enumerate((8e-4, 9e-4, 5e-4, 2e-3))
            ),
        ],
        seconds=1.0,
        context=[
            ContextRow(name, "emulation", 64, keys, bias, abs(bias))
            for name, keys, bias in (
                ("fp8", 4096, -1e-3),
                ("fp8-fast", 4096, -0.05),
                ("fp8", 8192, 0.0002),
                ("fp8-fast", 8192, -0.13),
            )
        ],
        speed=[
            SpeedRow("bf16", 1, 4096, 16, 128, False, 0.0, 2.0, 2.0),
            SpeedRow("fp8", 1, 4096, 16, 128, False, 0.25, 1.2, 1.6),
            SpeedRow("fp8", 1, 4096, 16, 128, True, 0.25, 0.7, 1.0),
        ],
    )
    return replace(study, **changes)


def test_the_first_recipe_is_the_default_and_all_differ():
    assert next(iter(RECIPES)) == DEFAULT
    assert RECIPES[DEFAULT].recipe == Fp8Recipe()
    assert len({named.recipe for named in RECIPES.values()}) == len(RECIPES)
    assert not is_fp8("bf16")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_a_card_is_the_emulation(name):
    x = random_inputs("outliers", batch=1, seqlen=150, heads=2, head_dim=32, seed=0)
    (contestant,) = contestants([name])
    assert (contestant.method, contestant.format) == ("ours", name)
    out, by = contestant.run(x.to(contestant.input_dtype))
    q, k, v = (t.bfloat16() for t in (x.query, x.key, x.value))
    expected, _ = emulation_fp8.attention_from_16_bits(q, k, v, RECIPES[name].recipe)
    assert by == EMULATION
    assert torch.equal(out, expected)


def test_a_recipe_that_cannot_compute_is_named():
    x = random_inputs("normal", batch=1, seqlen=8, heads=1, head_dim=16, seed=0)
    (smooth,) = contestants(["fp8-smooth"])
    with pytest.raises(StudyError, match=r"smooth_k=True.*cannot compute this: softcap is 2"):
        smooth.run(replace(x, softcap=2.0).to(torch.bfloat16))


def test_uniform_attention_has_a_known_answer():
    x = uniform_inputs(4096, seed=1)
    assert (x.query == 0).all()
    assert x.value.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert x.value.std().item() == pytest.approx(0.25, abs=1e-3)


def test_one_recipe_of_each_accumulation_is_studied_over_the_context():
    formats = ("fp16", "fp8-tensor", "fp8", "fp8-fast")
    study = run_study(Settings(sources=("context",), formats=formats, **SMALL))
    assert [row.format for row in study.context] == ["fp16", "fp8-tensor", "fp8-fast"]
    exact, right, fast = study.context
    assert abs(exact.bias) < 1e-3
    assert abs(right.bias) < 3e-3
    assert -0.1 < fast.bias < -0.03
    assert all(row.rms >= abs(row.bias) for row in study.context)
    assert study.rows == []
    assert study.speed == []


def test_the_study_ranks_the_recipes_on_outliers():
    study = run_study(
        Settings(
            sources=("outliers",),
            formats=("bf16", "fp8", "fp8-tensor", "fp8-plain"),
            **{**SMALL, "seqlen": 512, "head_dim": 64},
        )
    )
    error = {row.format: row.rmse for row in study.select("all") if row.method == "ours"}
    assert error["bf16"] < error["fp8"] < error["fp8-plain"] < error["fp8-tensor"]


def test_context_and_speed_survive_the_file(tmp_path):
    study = make_study()
    write_json(study, tmp_path / "study.json")
    assert read_json(tmp_path / "study.json") == study
    broken = replace(study, context=[replace(study.context[0], bias=math.nan)])
    write_json(broken, tmp_path / "study.json")
    assert math.isnan(read_json(tmp_path / "study.json").context[0].bias)


def test_the_verdict_is_made_from_the_numbers():
    text = "\n".join(fp8_in_words(make_study()))
    assert "FP8 on some/model on text.txt: the default's relative RMSE is 1.0e-02" in text
    assert "10 times that of bf16" in text
    assert "fp8-fast 0.90, fp8-tensor 2.00." in text
    assert "Smoothing K lowers the error in 3 of the model's 4 heads: 0.50 to 2.00" in text
    assert "fp8 is off by -0.10% at 4,096 keys and +0.02% at 8,192" in text
    assert "fp8-fast is off by -5.0% at 4,096 keys and -13.0% at 8,192" in text
    assert "quantizer included: 1.25 at 4,096 tokens, full." in text
    # Fast accumulation is never the advice, whatever its error at this length.
    assert "Verdict for some/model on text.txt: fp8 (the default: " in text
    assert "Its cost: a rotation in the quantizer" in text


def test_the_verdict_prefers_another_recipe_only_where_it_is_worth_it():
    rows = [row("fp8", 1.0e-3), row("fp8-token", 0.98e-3)]
    study = make_study(rows=rows, sources=make_study().sources[:1])
    assert "Verdict for some/model on text.txt: fp8 (" in fp8_in_words(study)[-1]
    study = replace(study, rows=[rows[0], row("fp8-token", 0.8e-3)])
    assert "Verdict for some/model on text.txt: fp8-token (" in fp8_in_words(study)[-1]
    study = replace(study, rows=[rows[0], row("fp8-token", 0.8e-3, nonfinite=1)])
    assert "Verdict for some/model on text.txt: fp8 (" in fp8_in_words(study)[-1]


def test_without_fp8_there_is_no_verdict():
    assert fp8_in_words(make_study(rows=[row("bf16", 1e-4)], context=[], speed=[])) == []


def test_tables_of_context_and_speed():
    study = make_study()
    table = context_table(study)
    assert list(table.columns[0].cells) == ["4,096", "8,192"]
    assert list(table.columns[2].cells) == ["-5.00 (5.00)", "-13.00 (13.00)"]
    table = speed_table(study)
    assert list(table.columns[4].cells) == ["2.000", "1.600", "1.000"]
    empty = make_study(context=[], speed=[])
    assert context_table(empty) is None
    assert speed_table(empty) is None


@pytest.mark.parametrize("plot", [plot_recipes, plot_context])
def test_pictures_are_drawn(plot, tmp_path):
    path = tmp_path / "picture.png"
    assert plot(make_study(), path)
    with Image.open(path) as picture:
        assert picture.width > 900
        assert picture.height > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_pictures_of_16_bits_leave_fp8_out(tmp_path):
    only_fp8 = make_study(rows=[row for row in make_study().rows if row.format != "bf16"])
    assert not plot_heads(only_fp8, tmp_path / "heads.png")
    assert not plot_sources(only_fp8, tmp_path / "sources.png")
    assert not plot_recipes(make_study(rows=[row("bf16", 1e-4)]), tmp_path / "recipes.png")
    assert not plot_context(make_study(context=[]), tmp_path / "context.png")
    assert list(tmp_path.iterdir()) == []
