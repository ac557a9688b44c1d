"""How build_log.py reads compilers' output, on samples."""

from __future__ import annotations

import pytest
from build_log import (
    Function,
    expected_products,
    local_memory_faults,
    needed_libraries,
    parse_log,
    products,
    row_of,
    sass_functions,
    touches_local_memory,
)

CLEAN = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 12 barriers
ptxas info    : Compile time = 5.250 ms
"""
SPILLING = CLEAN.replace("0 bytes stack", "40 bytes stack").replace(
    "0 bytes spill s", "36 bytes spill s"
)


def test_a_clean_log_has_functions_and_nothing_else():
    log = parse_log(CLEAN)
    assert log.functions == [Function("_Z6kernelv", 0, 0, 0)]
    assert log.warnings == []
    assert log.advisories == {}
    assert local_memory_faults("a", log, {}) == []


@pytest.mark.parametrize(
    "line",
    [
        "/src/hopper/forward/mma.cuh(12): warning #177-D: variable was declared but never used",
        "/src/hopper/forward/load.cuh:7:3: warning: unused variable 'x' [-Wunused-variable]",
        "nvcc warning : incompatible redefinition for option 'std'",
        "ptxas warning : Stack size for entry function cannot be statically determined",
        "ptxas info : Potential Performance Loss: wgmma.mma_async instructions are serialized",
    ],
)
def test_every_kind_of_warning_is_seen(line):
    assert parse_log(CLEAN + line + "\n").warnings == [line]


@pytest.mark.parametrize("number", ["C7508", "C7510", "C7519"])
def test_advisories_are_seen_by_number(number):
    line = f"ptxas info    : ({number}) Potential Performance Loss: wgmma.mma_async instructions"
    assert parse_log(line + "\n" + CLEAN).advisories == {number: line}


def test_local_memory_over_the_limit_is_a_fault_even_when_explained():
    log = parse_log(SPILLING)
    assert log.functions == [Function("_Z6kernelv", 40, 36, 0)]
    assert "40 bytes" in local_memory_faults("a", log, {"a": "why"})[0]


def test_local_memory_under_the_limit_must_be_explained():
    log = parse_log(SPILLING.replace("40", "8").replace("36", "4"))
    assert "nothing explains" in local_memory_faults("a", log, {})[0]
    assert local_memory_faults("a", log, {"a": "why"}) == []


@pytest.mark.parametrize(
    ("function", "row"),
    [
        (
            "_ZN16hopper_attention14forward_kernelINS_11e4m3_d64_fullEEEvNS_13ForwardParamsE",
            "e4m3_d64_full",
        ),
        (
            "_ZN16hopper_attention15backward_kernelINS_29Backward_bf16_d192x128_maskedEEEvNS_1E",
            "backward_bf16_d192x128_masked",
        ),
        ("_Z6kernelv", None),
    ],
)
def test_a_kernel_is_told_by_its_mangled_name(function, row):
    assert row_of(function) == row


def test_local_memory_is_counted_by_row():
    name = "_ZN16hopper_attention14forward_kernelINS_11e4m3_d64_fullEEEvNS_13ForwardParamsE"
    log = parse_log(CLEAN + SPILLING.replace("40", "8").replace("_Z6kernelv", name))
    assert local_memory_faults("unit", log, {"e4m3_d64_full": "why"}) == []
    assert "e4m3_d64_full: 8 bytes" in local_memory_faults("unit", log, {"unit": "why"})[0]


def test_a_log_without_functions_is_a_fault():
    assert "no function" in local_memory_faults("a", parse_log(""), {})[0]


def test_needed_libraries_are_read():
    sample = " 0x0000000000000001 (NEEDED)             Shared library: [libcuda.so.1]\n"
    assert needed_libraries(sample) == ["libcuda.so.1"]


def test_sass_is_split_by_function():
    sample = "\n\t\tFunction : first\n HGMMA.64x8 R1\n\t\tFunction : second\n FFMA R2\n"
    functions = sass_functions(sample)
    assert list(functions) == ["first", "second"]
    assert "HGMMA" in functions["first"]
    assert "HGMMA" not in functions["second"]


def test_products_are_told_apart():
    assert products("HGMMA.64x8x16.F32 R1\n FFMA R2\n") == {"HGMMA"}
    assert products("QGMMA.64x8x32.F32.E4M3.E4M3 R1\n HGMMA R2\n") == {"HGMMA", "QGMMA"}
    assert products("FFMA R2\n") == set()
    assert expected_products("_ZN16hopper_attention14forward_kernelINS_11e4m3_d64_fullEE") == {
        "QGMMA"
    }
    assert expected_products("_ZN16hopper_attention14forward_kernelINS_11bf16_d64_fullEE") == {
        "HGMMA"
    }


def test_local_memory_is_seen_among_the_products_only():
    assert touches_local_memory("QGMMA R1\n LDL R5, [R1]\n QGMMA R2\n")
    assert touches_local_memory("HGMMA R1\n LDL R5, [R1]\n HGMMA R2\n")
    assert touches_local_memory("HGMMA R1\n STL.64 [R1], R4\n HGMMA R2\n")
    assert not touches_local_memory("STL [R1], R5\n HGMMA R1\n FFMA R5\n HGMMA R2\n LDL R5\n")
