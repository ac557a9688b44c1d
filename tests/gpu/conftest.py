"""Tests that need a Hopper card and the compiled kernels; elsewhere skipped, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hopper_attention
from hopper_attention.bench import machine, sources

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # checking.py and evidence.py are imported by their names

from evidence import Recorder  # noqa: E402

DEFAULT_SEED = 20_261_121
DEFAULT_CASES = 200


def pytest_addoption(parser):
    group = parser.getgroup("hopper-attention")
    group.addoption(
        "--evidence", metavar="FILE", type=Path, help="write the outcome of all GPU tests to FILE"
    )
    group.addoption(
        "--fuzz-seed", type=int, default=DEFAULT_SEED, help="seed of the random problems"
    )
    group.addoption(
        "--fuzz-cases", type=int, default=DEFAULT_CASES, help="number of random problems"
    )


def pytest_configure(config):
    path = config.getoption("--evidence")
    if path is None or hasattr(config, "workerinput"):  # pytest-xdist's processes only run tests
        return
    header = {**machine.describe(), "sources": sources.current_sources()}
    if header["sources"] is None:
        raise pytest.UsageError("--evidence needs the source tree: hopper/ and include/")
    config.pluginmanager.register(Recorder(path, FOLDER, header), "evidence-recorder")


def pytest_collection_modifyitems(config, items):
    reason = hopper_attention.unavailable_reason()
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc):
    if "fuzz_case" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--fuzz-seed")
        cases = [(seed, index) for index in range(metafunc.config.getoption("--fuzz-cases"))]
        metafunc.parametrize("fuzz_case", cases, ids=lambda case: f"seed{case[0]}-{case[1]}")


@pytest.fixture(autouse=True)
def _no_gradients():
    import torch

    with torch.no_grad():
        yield
