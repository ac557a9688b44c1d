"""`hopper-attention study` from the command line."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hopper_attention.cli import app
from hopper_attention.cli.study import parse_layers
from hopper_attention.study import Settings, StudyError, run_study
from hopper_attention.study.formats import names
from hopper_attention.study.records import read_csv, read_json

SMALL = ["--seqlen", "64", "--heads", "2", "--head-dim", "16", "--device", "cpu"]
SIXTEEN = ["--formats", "fp16,bf16"]


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, ["study", *arguments])


def plain(result):
    """What was printed, on one line."""
    return re.sub(r"\s+", " ", result.output + (result.stderr or ""))


def test_a_study_writes_its_files_and_says_where(tmp_path):
    out = tmp_path / "some" / "folder"
    result = invoke("--source", "normal", *SMALL, *SIXTEEN, "--out", str(out))
    assert result.exit_code == 0, result.output
    files = ["error_by_source.png", "study.csv", "study.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    for name in files:
        assert name in plain(result).replace(" ", "")
    study = read_json(out / "study.json")
    assert study.rows == read_csv(out / "study.csv")
    assert [row.format for row in study.select("all")] == ["fp16", "fp16", "bf16", "bf16"]
    for words in ("standard fp16", "ours bf16", "emulation", "in fp16 our error is"):
        assert words in plain(result)


def test_all_formats_are_studied_without_being_asked_for(tmp_path):
    result = invoke("--source", "normal", *SMALL, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    study = read_json(tmp_path / "study.json")
    assert list(dict.fromkeys(row.format for row in study.rows)) == names()
    assert (tmp_path / "error_by_recipe.png").is_file()
    assert not (tmp_path / "error_by_context.png").exists()
    for words in ("ours fp8-tensor", "Verdict for N(0, 1): "):
        assert words in plain(result)


def test_the_context_is_a_source(tmp_path):
    arguments = ["--source", "context", "--max-keys", "8192", "--formats", "bf16,fp8,fp8-fast"]
    result = invoke(*arguments, "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    study = read_json(tmp_path / "study.json")
    assert [(row.format, row.keys) for row in study.context] == [
        (name, keys) for keys in (4096, 8192) for name in ("bf16", "fp8", "fp8-fast")
    ]
    files = ["error_by_context.png", "study.csv", "study.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert "Uniform attention, whose answer is known: " in plain(result)


def test_quiet_prints_only_the_files(tmp_path):
    result = invoke("--source", "outliers", *SMALL, "--out", str(tmp_path), "--quiet")
    assert result.exit_code == 0, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("written: ")


def test_formats_and_seed_are_passed_on(tmp_path):
    arguments = ["--source", "normal", *SMALL, "--out", str(tmp_path), "--quiet"]
    assert invoke(*arguments, "--formats", "bf16", "--seed", "3").exit_code == 0
    study = read_json(tmp_path / "study.json")
    assert {row.format for row in study.rows} == {"bf16"}
    assert study.settings["seed"] == 3


def test_what_the_user_can_put_right_is_said_without_a_traceback(tmp_path):
    result = invoke("--formats", "fp9", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "study: --formats has 'fp9'; allowed are fp16, bf16" in plain(result)
    assert "Traceback" not in plain(result)


def test_brackets_in_messages_are_kept(monkeypatch, tmp_path):
    from hopper_attention.study import models

    monkeypatch.setattr(models, "_DEFAULT_MODULE", "no_such_module")
    result = invoke("--source", "model", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert 'pip install "hopper-attention[demo]"' in plain(result)


def test_an_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--source", "normal", *SMALL, "--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot be a folder" in plain(result)


@pytest.mark.parametrize(
    "text, layers",
    [(None, None), ("3", (3,)), ("0,3,8-11", (0, 3, 8, 9, 10, 11)), ("5-5, 2,2", (2, 5))],
)
def test_layers_are_read(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-x", "1.5", "4-2"])
def test_layers_of_another_form_are_refused(text):
    with pytest.raises(StudyError, match="--layers"):
        parse_layers(text)


@pytest.mark.parametrize("name", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_computed(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    out = tmp_path / "out"
    result = invoke("--source", "normal", *SMALL, *SIXTEEN, "--out", str(out))
    assert result.exit_code == 2
    words = f"not installed: {name}, of the extra 'study': pip install 'hopper-attention[study]'"
    assert words in plain(result)
    assert not out.exists()


def test_the_study_itself_needs_no_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = Settings(sources=("normal",), formats=("fp16",), seqlen=32, heads=1, head_dim=16)
    assert run_study(settings).rows
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"transformers, of the extra 'study': pip inst"):
        run_study(settings)


def test_help_needs_neither_transformers_nor_matplotlib():
    code = (
        "import sys; from typer.testing import CliRunner; from hopper_attention.cli import app\n"
        "result = CliRunner().invoke(app, ['study', '--help'])\n"
        "assert result.exit_code == 0 and 'Measures the error' in result.output\n"
        "print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hopper_attention", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for command in ("study", "bench", "doctor"):
        assert re.search(rf"\b{command}\b", done.stdout)
