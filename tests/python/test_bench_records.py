"""Result files: records, their merging and their ratios."""

import json
from dataclasses import replace

import pytest

from hopper_attention.bench import records
from hopper_attention.bench.ratios import compare_records, summary
from hopper_attention.bench.shapes import square

SHAPE = square(128, causal=True, length=4096)
LONGER = square(128, causal=True, length=8192)
HEADER = {"device": "card", "date": "2026-01-02T03:04:05Z", "sources": "a" * 40}


def forward(impl, tflops, shape=SHAPE, run="1"):
    return records.make_record(
        "forward", impl, shape, run, ms=shape.flops() / tflops * 1e-9, tflops=tflops, rmse=1e-3
    )


def test_a_record_has_the_fields_of_the_format():
    record = forward("fa3", 600.0)
    assert list(record)[:13] == ["suite", "impl", *records.SHAPE_FIELDS]
    assert record["window"] == [-1, -1]
    assert (record["dtype"], record["layout"], record["causal"]) == ("bfloat16", "bshd", True)
    assert set(record) - {"suite", "impl", "run", *records.SHAPE_FIELDS} == {
        "ms",
        "tflops",
        "rmse",
    }
    assert records.shape_of(json.loads(json.dumps(record))) == SHAPE


def test_a_file_holds_one_record_a_line(tmp_path):
    path = tmp_path / "new" / "h.json"
    document, _ = records.merge(None, HEADER, [forward("fa3", 600.0), forward("cudnn", 500.0)])
    records.save(path, document)
    assert records.load(path) == document
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["impl"] for line in lines if '"impl"' in line] == [
        "fa3",
        "cudnn",
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["h.json"]


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"records": {}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "h.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"h\.json is no"):
        records.load(path)


def test_merging_replaces_what_was_measured_again_and_keeps_the_rest():
    rmse = records.make_record("rmse", "fa3", SHAPE, "1", distribution="normal", rmse=1e-5)
    other = records.make_record("rmse", "fa3", SHAPE, "1", distribution="outliers", rmse=2e-4)
    old, _ = records.merge(
        None, HEADER, [forward("fa3", 600.0), forward("fa3", 700.0, LONGER), rmse, other]
    )
    again = [
        forward("fa3", 610.0, run="2"),
        records.make_record("rmse", "fa3", SHAPE, "2", distribution="outliers", rmse=3e-4),
    ]
    merged, sentence = records.merge(old, {**HEADER, "date": "later"}, again)
    assert merged["date"] == "later"
    assert len(merged["records"]) == 4
    for record in [*again, old["records"][1], rmse]:
        assert record in merged["records"]
    assert "2 of them in place of old ones; 2 kept" in sentence


@pytest.mark.parametrize(
    "change, words",
    [({"sources": "b" * 40}, "other sources"), ({"device": "another"}, "another device")],
)
def test_records_of_other_sources_or_cards_are_dropped(change, words):
    old, _ = records.merge(None, HEADER, [forward("fa3", 700.0, LONGER)])
    merged, sentence = records.merge(old, {**HEADER, **change}, [forward("fa3", 600.0)])
    assert [record["seqlen_q"] for record in merged["records"]] == [4096]
    assert "the 1 old ones were dropped" in sentence
    assert words in sentence


def test_each_run_keeps_its_ceilings_while_it_has_records():
    first = {**HEADER, "ceilings": {"1": {"copy_gbps": 4000.0}}}
    second = {**HEADER, "ceilings": {"2": {"copy_gbps": 4200.0}}}
    old, _ = records.merge(None, first, [forward("fa3", 600.0), forward("fa3", 610.0, LONGER)])
    both, _ = records.merge(old, second, [forward("fa3", 620.0, run="2")])
    assert both["ceilings"] == {"1": {"copy_gbps": 4000.0}, "2": {"copy_gbps": 4200.0}}
    assert records.run_of(both, "forward") == ("2", {"copy_gbps": 4200.0})
    last, _ = records.merge(both, second, [forward("fa3", 630.0, LONGER, run="2")])
    assert last["ceilings"] == {"2": {"copy_gbps": 4200.0}}
    assert records.run_of({**last, "ceilings": {}}, "forward") == ("2", {})


def test_records_of_unknown_sources_are_never_kept():
    unknown = {**HEADER, "sources": None}
    old, _ = records.merge(None, unknown, [forward("fa3", 700.0, LONGER)])
    merged, _ = records.merge(old, unknown, [forward("fa3", 600.0)])
    assert len(merged["records"]) == 1


def test_the_ratio_is_to_the_best_peer():
    values = [("hopper_attention", 550.0), ("fa3", 500.0), ("cudnn", 400.0), ("fa2", 300.0)]
    (one,) = compare_records([forward(*value) for value in values], "forward")
    assert one.best_peer == "fa3"
    assert one.ratio == pytest.approx(1.1)


def test_a_missing_peer_is_not_counted():
    only_fa2 = [forward("hopper_attention", 550.0), forward("fa2", 275.0)]
    alone = [forward("hopper_attention", 550.0, LONGER)]
    first, second = compare_records(only_fa2 + alone, "forward")
    assert (first.best_peer, first.ratio) == ("fa2", 2.0)
    assert (second.best_peer, second.ratio) == (None, None)


def test_a_variant_of_ours_is_no_peer():
    fast = [forward("hopper_attention", 500.0), forward("hopper_attention_x", 900.0)]
    (one,) = compare_records([*fast, forward("fa3", 500.0)], "forward")
    assert one.ratio == 1.0
    (variant,) = compare_records([*fast, forward("fa3", 500.0)], "forward", "hopper_attention_x")
    assert variant.ratio == 1.8


def test_runs_are_not_mixed():
    older = [forward("hopper_attention", 500.0, run="1"), forward("fa3", 400.0, run="1")]
    newer = [forward("hopper_attention", 440.0, run="2")]
    (one,) = compare_records(older + newer, "forward")
    assert (one.run, one.ratio) == ("2", None)
    (one,) = compare_records([*older, forward("fa3", 300.0, run="2")], "forward")
    assert (one.run, one.ratio) == ("1", 1.25)


def test_less_host_time_is_better():
    def host(impl, microseconds):
        shape = replace(SHAPE, batch=1)
        return records.make_record(
            "host", impl, shape, "1", ms=microseconds / 1e3, host_us=microseconds
        )

    (one,) = compare_records(
        [host("hopper_attention", 10.0), host("fa3", 25.0), host("cudnn", 40.0)], "host"
    )
    assert (one.best_peer, one.ratio) == ("fa3", 2.5)


def test_summary():
    assert summary([]) is None
    mean, least = summary([0.5, 2.0, 1.0])
    assert mean == pytest.approx(1.0)
    assert least == 0.5
