"""``hopper-attention doctor`` on machines that have everything, nothing, and what lies between."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import hopper_attention
from hopper_attention.bench import machine, session
from hopper_attention.cli import app, probes

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30
)
L40S = SimpleNamespace(
    name="NVIDIA L40S", major=8, minor=9, multi_processor_count=142, total_memory=45 << 30
)
NAMES = ["bf16_d64_full", "bf16_d64_masked", "backward_bf16_d64_full"]


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A machine with everything; tests take things away."""
    library = tmp_path / "libhopper_attention.so"
    library.write_bytes(b"\0" * (3 << 20))
    tiles = tmp_path / "tiles.json"
    tiles.write_text(json.dumps([{"name": name} for name in NAMES[:2]]))
    backward_tiles = tmp_path / "backward_tiles.json"
    backward_tiles.write_text(json.dumps([{"name": name} for name in NAMES[2:]]))
    state = SimpleNamespace(
        cards=[H200],
        instances=list(NAMES),
        library=library,
        tiles=[tiles, backward_tiles],
        load_error=None,
    )

    def load():
        if state.load_error:
            raise RuntimeError(state.load_error)
        return SimpleNamespace(version=lambda: "0.1.0", instances=lambda: state.instances)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(state.cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(state.cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: state.cards[i])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda i: (state.cards[i].major, state.cards[i].minor),
    )
    monkeypatch.setattr(machine, "driver_version", lambda: "580.159.04")
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: (13, 0))
    monkeypatch.setattr(machine, "library_file", lambda: state.library)
    monkeypatch.setattr(
        machine, "package_files", lambda name: [file for file in state.tiles if file.name == name]
    )
    monkeypatch.setattr(session, "stale_sources", lambda: None)
    monkeypatch.setattr("hopper_attention._library.load", load)
    monkeypatch.setattr(probes.metadata, "version", lambda name: "1.0")
    return state


def report(expected_code):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == expected_code, result.output
    parsed = json.loads(result.output)
    assert parsed["ok"] == (expected_code == 0)
    text = CliRunner().invoke(app, ["doctor"])
    assert text.exit_code == expected_code
    checks = {check["name"]: check for check in parsed["checks"]}
    for check in checks.values():
        assert check["found"] in text.output
        assert check["do"] is None or check["do"] in text.output
    uses = {use["name"]: use for use in parsed["uses"]}
    return checks, uses


def test_everything_is_there(world):
    checks, uses = report(expected_code=0)
    assert all(use["works"] for use in uses.values())
    assert checks["Hopper card"]["found"] == (
        "0: NVIDIA H200, compute capability 9.0, 132 multiprocessors, 141 GiB"
    )
    assert checks["NVIDIA driver"]["found"] == "580.159.04, for CUDA up to 13.0"
    assert checks["instances"]["found"] == "3 of 3 kernels are compiled"
    assert "0.1.0" in checks["compiled library"]["found"]
    assert "(3.0 MiB)" in checks["compiled library"]["found"]


def test_no_card(world):
    world.cards = []
    checks, uses = report(expected_code=1)
    assert "H100, H200 or GH200" in checks["Hopper card"]["do"]
    assert uses["attention by the kernels"]["because"] == ["Hopper card"]
    assert uses["study (error study)"]["works"]
    assert uses["reference (float64)"]["works"]


def test_a_card_of_another_kind(world):
    world.cards = [L40S]
    checks, _ = report(expected_code=1)
    assert checks["Hopper card"]["ok"] is False
    assert "compute capability 8.9" in checks["Hopper card"]["found"]


def test_a_card_of_another_kind_beside_a_hopper_card(world):
    world.cards = [L40S, H200]
    checks, _ = report(expected_code=0)
    assert checks["other card"]["ok"] is None
    assert checks["Hopper card"]["found"].startswith("1: NVIDIA H200")


@pytest.mark.parametrize(
    "nvcc, words", [(None, "install the CUDA toolkit"), ("/x/nvcc", "nvcc is here (/x/nvcc)")]
)
def test_no_library(world, monkeypatch, nvcc, words):
    world.library = None
    monkeypatch.setattr(probes, "_nvcc", lambda: nvcc)
    checks, uses = report(expected_code=1)
    assert words in checks["compiled library"]["do"]
    assert "pip install" in checks["compiled library"]["do"]
    assert not uses["attention by the kernels"]["works"]
    assert uses["emulation on the CPU"]["works"]


def test_why_there_is_no_library(world, monkeypatch):
    world.library = None
    monkeypatch.setattr(probes.loader, "built_without", lambda: "the CUDA compiler is 12.2")
    checks, _ = report(expected_code=1)
    assert checks["compiled library"]["found"] == "not installed: the CUDA compiler is 12.2"


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"hopper-attention {hopper_attention.__version__}\n"


def test_a_library_that_does_not_load(world):
    world.load_error = "undefined symbol: x"
    checks, _ = report(expected_code=1)
    assert "undefined symbol: x" in checks["compiled library"]["found"]


def test_instances_left_out_are_named(world):
    world.instances = [NAMES[0], NAMES[2]]
    checks, _ = report(expected_code=0)
    assert "2 of 3 kernels are compiled; left out: bf16_d64_masked" in checks["instances"]["found"]
    assert "HOPPER_ATTENTION_INSTANCES" in checks["instances"]["do"]
    world.instances = []
    checks, uses = report(expected_code=1)
    assert uses["attention by the kernels"]["because"] == ["instances"]


def test_no_driver(world, monkeypatch):
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: None)
    world.cards = []
    checks, _ = report(expected_code=1)
    assert "install NVIDIA's driver" in checks["NVIDIA driver"]["do"]


def test_a_driver_older_than_pytorch(world, monkeypatch):
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: (12, 4))
    checks, _ = report(expected_code=1)
    assert "PyTorch is built for CUDA 13.0" in checks["NVIDIA driver"]["do"]


def test_pytorch_without_cuda(world, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    world.cards = []
    checks, _ = report(expected_code=1)
    assert "install a CUDA build" in checks["PyTorch's CUDA"]["do"]
    assert "see PyTorch's CUDA" in checks["Hopper card"]["do"]


def test_no_tile_table(world):
    world.tiles = []
    _, uses = report(expected_code=1)
    assert uses["emulation on the CPU"]["because"] == ["tile table"]
    assert uses["reference (float64)"]["works"]


def test_a_missing_package_is_named(world, monkeypatch):
    def version(name):
        if name == "transformers":
            raise probes.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(probes.metadata, "version", version)
    checks, uses = report(expected_code=1)
    assert checks["transformers"]["do"] == "pip install 'hopper-attention[study]'"
    assert uses["study (error study)"]["because"] == ["transformers"]


def test_an_old_library_is_noted(world, monkeypatch):
    monkeypatch.setattr(session, "stale_sources", lambda: "2 sources were written after")
    checks, _ = report(expected_code=0)
    assert checks["sources"]["ok"] is None


def test_a_probe_that_fails_is_reported(world, monkeypatch):
    def broken():
        raise ValueError("odd machine")

    monkeypatch.setattr(machine, "library_file", broken)
    checks, _ = report(expected_code=1)
    assert checks["compiled library"]["found"] == "ValueError: odd machine"


def test_a_python_that_is_not_tested_is_noted(world, monkeypatch):
    monkeypatch.setattr(probes, "_PYTHON_RANGE", ((2, 6), (2, 7)))
    checks, _ = report(expected_code=0)
    assert checks["Python"]["do"] == "use Python 2.6 to 2.7"


def test_it_works_on_this_machine_whatever_it_is():
    checks = {check.name: check for check in probes.probe()}
    assert checks["PyTorch"].found == torch.__version__
    assert {"Python", "NVIDIA driver", "Hopper card", "compiled library"} <= set(checks)
    assert not any(check.found.startswith("AttributeError") for check in checks.values())


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="there is a driver")
def test_without_a_driver_there_is_no_version():
    assert machine.driver_version() is None
    assert machine.driver_cuda_version() is None
