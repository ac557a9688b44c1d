"""Kernels do not change without being run: the stored evidence belongs to the sources at hand.

tests/gpu/evidence.json and benchmarks/results/h200.json are written by commands on the card, with
the hash of hopper/ and include/ as they were. Where no card is to be had, "pending": "the reason"
in evidence.json turns the failure into a warning.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hopper_attention.bench import sources
from hopper_attention.bench.contestants import OURS
from hopper_attention.bench.records import shape_of
from hopper_attention.bench.shapes import suite_shapes

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "tests/gpu/evidence.json"
RESULTS = ROOT / "benchmarks/results/h200.json"

TEST_AGAIN = "run: pytest tests/gpu --evidence tests/gpu/evidence.json"
MEASURE_AGAIN = "run: hopper-attention bench all --json benchmarks/results/h200.json"


def wrong_evidence(evidence, current):
    """Says what is wrong with the GPU tests' outcome, as a list of sentences."""
    if not set(evidence) & {"device", "date", "sources", "passed", "failed", "skipped"}:
        return [f"it holds no results; {TEST_AGAIN}"]
    found = [
        f"it has no {name}" for name in ("device", "date", "sources") if not evidence.get(name)
    ]
    found += [
        f"{name} is {evidence.get(name)!r}, not a count"
        for name in ("passed", "failed", "skipped")
        if not isinstance(evidence.get(name), int)
    ]
    if found:
        return found
    if evidence["sources"] != current:
        found.append(f"hopper/ or include/ changed since {evidence['date']}; {TEST_AGAIN}")
    if evidence["failed"] != 0:
        found.append(f"{evidence['failed']} tests failed")
    if evidence["passed"] <= 0:
        found.append("no test passed")
    return found


def wrong_results(results, current):
    """Says what is wrong with the stored measurements, as a list of sentences."""
    found = [f"it has no {name}" for name in ("device", "date", "sources") if not results.get(name)]
    if results.get("sources") not in (None, current):
        found.append(f"hopper/ or include/ changed since {results.get('date')}; {MEASURE_AGAIN}")
    measured = {
        shape_of(record)
        for record in results.get("records", [])
        if record["suite"] == "forward" and record["impl"] == OURS
    }
    missing = [shape.label for shape in suite_shapes("forward") if shape not in measured]
    if missing:
        found.append(f"{len(missing)} shapes of suite forward are missing, such as {missing[0]}")
    return found


def judge(evidence_file, results_file, current):
    """Returns (what is wrong, the reason why that is pending or None)."""
    found, pending = [f"{evidence_file.name}: there is none; {TEST_AGAIN}"], None
    if evidence_file.exists():
        evidence = json.loads(evidence_file.read_text())
        pending = evidence.get("pending")
        found = [f"{evidence_file.name}: {words}" for words in wrong_evidence(evidence, current)]
    if results_file.exists():
        results = json.loads(results_file.read_text())
        found += [f"{results_file.name}: {words}" for words in wrong_results(results, current)]
    else:
        found.append(f"{results_file.name}: there is none; {MEASURE_AGAIN}")
    return found, pending


def test_the_evidence_belongs_to_the_sources():
    found, pending = judge(EVIDENCE, RESULTS, sources.tree_hash(ROOT))
    if found and pending:
        warnings.warn(f"pending ({pending}): {'; '.join(found)}", stacklevel=1)
    else:
        assert not found, "\n".join(found)


CURRENT = "a" * 40
GOOD = {
    "device": "NVIDIA H200",
    "date": "2026-01-02T03:04:05Z",
    "sources": CURRENT,
    "passed": 900,
    "failed": 0,
    "skipped": 1,
}


@pytest.fixture
def files(tmp_path):
    rows = []
    for shape in suite_shapes("forward"):
        fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
        rows.append({"suite": "forward", "impl": OURS, **fields, "ms": 1.0})
    results = {name: GOOD[name] for name in ("device", "date", "sources")} | {"records": rows}
    paths = tmp_path / "evidence.json", tmp_path / "h200.json"
    paths[0].write_text(json.dumps(GOOD))
    paths[1].write_text(json.dumps(results))
    return paths


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_good_evidence_is_accepted(files):
    assert judge(*files, CURRENT) == ([], None)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": "b" * 40}, "changed since 2026-01-02"),
        ({"failed": 2}, "2 tests failed"),
        ({"passed": 0}, "no test passed"),
        ({"passed": "many"}, "passed is 'many', not a count"),
        ({"device": None}, "it has no device"),
    ],
)
def test_bad_evidence_is_refused(files, changes, words):
    edit(files[0], **changes)
    found, pending = judge(*files, CURRENT)
    assert len(found) == 1
    assert words in found[0]
    assert pending is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": "b" * 40}, "changed since 2026-01-02"),
        ({"sources": None}, "it has no sources"),
        ({"records": []}, "36 shapes of suite forward are missing"),
    ],
)
def test_bad_results_are_refused(files, changes, words):
    edit(files[1], **changes)
    found, _ = judge(*files, CURRENT)
    assert any(words in sentence for sentence in found)


def test_missing_files_are_refused(files):
    for path in files:
        path.unlink()
    found, pending = judge(*files, CURRENT)
    assert len(found) == 2
    assert pending is None


def test_evidence_that_is_only_pending_says_what_to_do(files):
    files[0].write_text('{"pending": "no card"}')
    found, pending = judge(*files, CURRENT)
    assert found == [f"evidence.json: it holds no results; {TEST_AGAIN}"]
    assert pending == "no card"


def test_pending_is_passed_on_with_what_is_wrong(files):
    edit(files[0], pending="no card", sources="b" * 40)
    files[1].unlink()
    found, pending = judge(*files, CURRENT)
    assert len(found) == 2
    assert pending == "no card"


RUN = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
from evidence import Recorder
recorder = Recorder(Path("evidence.json"), Path.cwd(), {"device": "card", "sources": "abc"})
options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
sys.exit(pytest.main([*options, *sys.argv[2:]], plugins=[recorder]))
"""
TESTS = """
import pytest

def test_one(): pass
def test_two(): pass

@pytest.mark.skip(reason="no")
def test_skipped(): pass
"""
FAILING = """
import pytest

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in tear-down")

def test_torn_down_badly(broken): pass
def test_wrong(): assert False
"""


def record(folder, *arguments):
    command = [sys.executable, "-c", RUN, str(ROOT / "tests/gpu"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    written = folder / "evidence.json"
    return done.stdout, json.loads(written.read_text()) if written.exists() else None


def test_the_recorder_counts_outcomes(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    output, written = record(tmp_path)
    assert written == {
        "device": "card",
        "sources": "abc",
        "passed": 2,
        "failed": 0,
        "skipped": 1,
    }, output
    (tmp_path / "test_b.py").write_text(FAILING)
    _, written = record(tmp_path)
    assert (written["passed"], written["failed"], written["skipped"]) == (2, 2, 1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-k", "one"], "2 tests were deselected"),
        (["test_a.py"], "not collected: test_b.py"),
        (["-x"], "1 tests were not run"),
    ],
)
def test_a_part_of_the_tests_is_no_evidence(tmp_path, arguments, words):
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text(FAILING if arguments == ["-x"] else "def test_one(): pass")
    output, written = record(tmp_path, *arguments)
    assert written is None
    assert words in output


def test_the_gpu_tests_are_skipped_with_a_reason_where_they_cannot_run(tmp_path):
    import hopper_attention

    reason = hopper_attention.unavailable_reason()
    if reason is None:
        pytest.skip("they can run here")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests/gpu"), "--evidence", str(tmp_path / "evidence.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert reason.split(":")[0][:40] in done.stdout
    assert "no evidence is written: no test passed" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]
    assert not (tmp_path / "evidence.json").exists()
