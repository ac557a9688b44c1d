"""tools/setup_venv.py: what `make` decides before anything is built."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_venv():
    path = ROOT / "tools" / "setup_venv.py"
    spec = importlib.util.spec_from_file_location("setup_venv", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pyproject():
    return (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH of its own; calling it adds a program that prints a text."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def add(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
        return str(path)

    return add


def test_lists_are_read_from_pyproject(setup_venv, pyproject):
    requires = setup_venv.read_list("requires", pyproject)
    assert sum(line.startswith("nvidia-cutlass==") for line in requires) == 1
    assert any(line.startswith("pytest==") for line in setup_venv.read_list("test", pyproject))
    with pytest.raises(ValueError, match="no list absent"):
        setup_venv.read_list("absent", pyproject)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_lists_are_those_that_a_toml_parser_reads(setup_venv, pyproject):
    import tomllib

    data = tomllib.loads(pyproject)
    assert setup_venv.read_list("requires", pyproject) == data["build-system"]["requires"]
    assert setup_venv.read_list("dependencies", pyproject) == data["project"]["dependencies"]
    for extra, packages in data["project"]["optional-dependencies"].items():
        assert setup_venv.read_list(extra, pyproject) == packages


def test_what_make_installs_brings_the_study(setup_venv, pyproject):
    study = setup_venv.read_list("study", pyproject)
    assert sorted(re.split("[<>=]", line)[0] for line in study) == ["matplotlib", "transformers"]
    assert not set(study) & set(setup_venv.read_list("dependencies", pyproject))
    assert "hopper-attention[study]" in setup_venv.read_list("demo", pyproject)
    for extras in re.findall(r"--extras (\S+)", (ROOT / "Makefile").read_text()):
        assert "demo" in extras.split(",")


@pytest.mark.parametrize(
    "version, suits",
    [
        ("2.8.0", False),
        ("2.9.0", True),
        ("2.11.0+cu130", True),
        ("2.13.0+cpu", True),
        ("2.14.1", True),
        ("2.15.0", False),
        ("3.0.0", False),
    ],
)
def test_the_torch_range_is_compared_by_number(setup_venv, version, suits):
    assert setup_venv.in_range(version, "torch>=2.9,<2.15") is suits


def test_the_torch_range_holds_the_constraint(setup_venv, pyproject):
    wanted = next(
        line for line in setup_venv.read_list("dependencies", pyproject) if line[:6] == "torch>"
    )
    constraints = (ROOT / "tools" / "constraints-cpu.txt").read_text()
    pinned = constraints.split("torch==")[1].strip()
    assert setup_venv.in_range(pinned, wanted)


def test_a_range_of_another_form_is_refused(setup_venv):
    with pytest.raises(ValueError, match="torch~=2"):
        setup_venv.in_range("2.13.0", "torch~=2.9")


def test_cards_are_read_from_nvidia_smi(setup_venv, programs):
    assert setup_venv.card_capabilities() == []
    programs("nvidia-smi", "9.0\n8.0")
    assert setup_venv.card_capabilities() == ["9.0", "8.0"]
    programs("nvidia-smi", "No devices were found")
    assert setup_venv.card_capabilities() == []


@pytest.mark.parametrize(
    "cards, nvcc, expected",
    [("9.0", True, "ON"), ("9.0", False, "OFF"), ("8.0", True, "OFF"), ("", True, "OFF")],
)
def test_the_demo_compiles_kernels_for_a_hopper_card_and_nvcc_only(
    setup_venv, programs, monkeypatch, cards, nvcc, expected
):
    programs("nvidia-smi", cards)
    path = programs("nvcc", "") if nvcc else None
    monkeypatch.setattr(setup_venv, "find_nvcc", lambda: path)
    assert setup_venv.choose_kernels("card") == expected


def test_tests_leave_the_choice_to_cmake(setup_venv):
    assert setup_venv.choose_kernels("auto") == "AUTO"
    assert setup_venv.choose_kernels("off") == "OFF"


def test_nvcc_is_found_on_path_and_by_variable(setup_venv, programs, monkeypatch, tmp_path):
    path = programs("nvcc", "")
    assert setup_venv.find_nvcc() == path
    other = tmp_path / "cuda" / "bin" / "nvcc"
    other.parent.mkdir(parents=True)
    other.write_text("")
    other.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(other))
    assert setup_venv.find_nvcc() == str(other)
    monkeypatch.delenv("CUDACXX")
    os.remove(path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup_venv.find_nvcc() == str(other)


@pytest.mark.parametrize("version, suits", [("3.18.4", False), ("3.25.1", True), ("4.4.4", True)])
def test_an_old_cmake_does_not_do(setup_venv, programs, version, suits):
    assert not setup_venv.has_cmake()
    programs("cmake", f"cmake version {version}")
    assert setup_venv.has_cmake() is suits
