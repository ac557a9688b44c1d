"""The study's files: what is written is read again, and the pictures are drawn from it."""

import csv
import json
import math
from dataclasses import fields, replace

import pytest
from PIL import Image

from hopper_attention.study.plots import plot_heads, plot_sources
from hopper_attention.study.records import (
    Row,
    Source,
    Study,
    read_csv,
    read_json,
    write_csv,
    write_json,
)
from hopper_attention.study.report import shape_in_words, source_table
from hopper_attention.study.words import in_words

SHAPE = {
    "batch": 2,
    "seqlen_q": 512,
    "seqlen_k": 512,
    "heads": 4,
    "heads_kv": 2,
    "head_dim": 64,
    "head_dim_v": 32,
    "causal": True,
}


def make_row(**changes):
    row = Row(
        source="model",
        level="all",
        layer=None,
        layer_name=None,
        head=None,
        format="fp16",
        method="ours",
        by="kernel",
        rmse=1e-5,
        relative_rmse=2e-5,
        max_error=3e-4,
        cosine=1 - 1e-10,
        arithmetic_rmse=5e-6,
        arithmetic_relative_rmse=1e-5,
        elements=1000,
        nonfinite=0,
    )
    return replace(row, **changes)


def make_study():
    rows = []
    for name, factor in (("fp16", 1.0), ("bf16", 8.0)):
        for method, more in (("standard", 2.0), ("ours", 1.0)):
            unit = factor * more
            for source in ("model", "normal"):
                rows.append(
                    make_row(
                        source=source,
                        format=name,
                        method=method,
                        rmse=unit * 1e-5,
                        arithmetic_rmse=unit * more * 1e-6,
                        relative_rmse=unit * 1e-4,
                    )
                )
            for layer in range(3):
                place = {"layer": layer, "layer_name": f"layers.{layer}.attn", "format": name}
                at_layer = unit * (layer + 1) * 1e-4
                rows.append(make_row(level="layer", method=method, relative_rmse=at_layer, **place))
                for head in range(4):
                    error = at_layer * (2 if head == 1 else 0.5)
                    rows.append(
                        make_row(
                            level="head", method=method, head=head, relative_rmse=error, **place
                        )
                    )
    return Study(
        settings={"seed": 0, "formats": ["fp16", "bf16"]},
        environment={"device": "CPU"},
        sources=[
            Source("model", "some/model on text.txt", SHAPE, layers=3, tokens=1024),
            Source("normal", "N(0, 1)", {**SHAPE, "causal": False, "heads_kv": 4}),
        ],
        rows=rows,
        seconds=1.5,
    )


def test_json_round_trip(tmp_path):
    study = make_study()
    write_json(study, tmp_path / "study.json")
    assert read_json(tmp_path / "study.json") == study


def test_csv_round_trip(tmp_path):
    study = make_study()
    write_csv(study, tmp_path / "study.csv")
    assert read_csv(tmp_path / "study.csv") == study.rows
    with (tmp_path / "study.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [field.name for field in fields(Row)]


def test_values_that_are_not_finite_survive(tmp_path):
    row = make_row(rmse=math.nan, relative_rmse=math.inf, nonfinite=3)
    study = replace(make_study(), rows=[row])
    write_json(study, tmp_path / "study.json")
    text = (tmp_path / "study.json").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"JSON has {name}"))
    assert document["rows"][0]["rmse"] is None
    again = read_json(tmp_path / "study.json").rows[0]
    assert math.isnan(again.rmse)
    assert again.nonfinite == 3
    write_csv(study, tmp_path / "study.csv")
    (again,) = read_csv(tmp_path / "study.csv")
    assert math.isnan(again.rmse)
    assert again.relative_rmse == math.inf


def test_json_of_another_schema_is_refused(tmp_path):
    (tmp_path / "study.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="is 99; allowed is 2"):
        read_json(tmp_path / "study.json")


def test_rows_are_selected_by_level_and_source():
    study = make_study()
    assert len(study.select("all")) == 8
    assert len(study.select("all", "normal")) == 4
    assert len(study.select("layer")) == 12
    assert len(study.select("head", "model")) == 48
    assert study.select("head", "normal") == []


def test_words_are_made_from_the_numbers():
    model, normal = in_words(make_study())
    assert model.startswith("some/model on text.txt: in fp16 our error is 0.50 times standard's")
    assert "(0.25 times in the arithmetic alone)" in model
    assert "Our error in bf16 is 8.0 times that in fp16." in model
    assert "least exact in layer 2 (relative RMSE 3.0e-04)" in model
    assert "in head 1 of layer 2 (6.0e-04)" in model
    assert normal.startswith("N(0, 1): ")
    assert "layer" not in normal


def test_words_tell_of_outputs_that_are_not_finite():
    study = make_study()
    broken = make_row(source="normal", nonfinite=7, rmse=math.nan)
    (line,) = in_words(replace(study, sources=study.sources[1:], rows=[broken]))
    assert "7 of 1,000 outputs of ours fp16 are not finite." in line


def test_the_table_has_a_row_for_each_contestant():
    study = make_study()
    table = source_table(study, study.sources[0])
    assert list(table.columns[0].cells) == [
        "standard fp16",
        "ours fp16",
        "standard bf16",
        "ours bf16",
    ]
    assert list(table.columns[2].cells) == ["2.00e-05", "1.00e-05", "1.60e-04", "8.00e-05"]


def test_shapes_in_words():
    model, normal = make_study().sources
    assert shape_in_words(model) == (
        "3 layers, 1,024 tokens of text: batch 2, 512 tokens, 4 heads over 2 KV heads, "
        "head dim 64 (V 32), causal"
    )
    assert shape_in_words(normal) == ("batch 2, 512 tokens, 4 heads, head dim 64 (V 32), no mask")


@pytest.mark.parametrize("plot", [plot_heads, plot_sources])
def test_pictures_are_drawn(plot, tmp_path):
    path = tmp_path / "picture.png"
    assert plot(make_study(), path)
    with Image.open(path) as picture:
        assert picture.width > 900
        assert picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_pictures_take_missing_contestants_and_values(tmp_path):
    study = make_study()
    odd = [
        replace(row, relative_rmse=math.nan) if row.head == 2 else row
        for row in study.rows
        if (row.method, row.format) != ("standard", "bf16") and (row.layer, row.head) != (2, 3)
    ]
    assert plot_heads(replace(study, rows=odd), tmp_path / "heads.png")
    assert plot_sources(replace(study, rows=odd), tmp_path / "sources.png")


def test_without_rows_there_is_no_picture(tmp_path):
    study = replace(make_study(), rows=[])
    assert not plot_heads(study, tmp_path / "heads.png")
    assert not plot_sources(study, tmp_path / "sources.png")
    assert list(tmp_path.iterdir()) == []
