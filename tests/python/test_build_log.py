"""What the compilers said about the kernels, and what the library became.

Reads <build>/logs (for each source all that its compiler printed, nvcc with -Xptxas -v; kept by
cmake/log_compile.sh) of the newest build of this checkout for this Python. Where no kernels were
compiled these tests skip; test_build_log_parsing.py tests the parsing everywhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_log import (
    Log,
    expected_products,
    local_memory_faults,
    needed_libraries,
    parse_log,
    products,
    row_of,
    sass_functions,
    touches_local_memory,
)

ROOT = Path(__file__).resolve().parents[2]
MAX_LIBRARY_BYTES = 25 * 2**20

# Instances that may use local memory (at most `MAX_LOCAL_BYTES`), each with the reason.
OUTSIDE_THE_LOOP = "addresses that are written once and read once a tile, outside the key loop"
TRANSPOSING = "the warps that transpose V have 24 registers; and addresses outside the key loop"
IN_THE_LOOP = "a few words of the state of a tile or of the loop, read at most once a step"
LOADING = "the warps that load, add and store have 24 registers; those that multiply use none of it"
EXPLAINED_LOCAL_MEMORY: dict[str, str] = {
    "fp16_d256_masked": OUTSIDE_THE_LOOP,
    "bf16_d256_masked": OUTSIDE_THE_LOOP,
    **{
        f"backward_{dtype}_d{dims}_{mask}": IN_THE_LOOP if mask == "capped" else LOADING
        for dtype in ("fp16", "bf16")
        for dims in ("64", "96", "128")
        for mask in ("full", "masked", "packed", "capped")
    },
    **{
        f"backward_{dtype}_{dims}_capped": IN_THE_LOOP
        for dtype in ("fp16", "bf16")
        for dims in ("d192", "d192x128")
    },
    **{
        f"backward_{dtype}_d256_{mask}": IN_THE_LOOP
        for dtype in ("fp16", "bf16")
        for mask in ("full", "masked")
    },
    "e4m3_d128_masked": IN_THE_LOOP,
    "e4m3_d256_masked": TRANSPOSING,
    "e4m3fast_d128_masked": TRANSPOSING,
    "e4m3fast_d256_masked": TRANSPOSING,
    "quantize_launch": "the task's number or its tensor's, a token's scale and whether it is "
    "finite, or one of a thread's 64 elements where the largest is found",
}
# The logs of kernels that multiply no matrices.
OTHER_KERNELS = (
    "quantize_launch",
    "quantize_prepare",
    "backward_preprocess",
    "backward_sink",
    "backward_convert",
    "forward_list_tiles",
)
# ptxas's advisories that do no harm here, by number, each with the reason.
EXPLAINED_ADVISORIES: dict[str, str] = {}


def find_build() -> Path | None:
    """The folder of this checkout's newest build with kernels, for this Python."""
    named = os.environ.get("HOPPER_ATTENTION_BUILD_DIR")
    pattern = "build/cp{}{}-*/libhopper_attention.so".format(*sys.version_info)
    libraries = [Path(named) / "libhopper_attention.so"] if named else list(ROOT.glob(pattern))
    libraries = [path for path in libraries if path.exists()]
    return max(libraries, key=lambda path: path.stat().st_mtime).parent if libraries else None


@pytest.fixture(scope="module")
def build() -> Path:
    folder = find_build()
    if folder is None:
        pytest.skip("no kernels were compiled in this checkout (build/cp*/libhopper_attention.so)")
    return folder


@pytest.fixture(scope="module")
def instances(build: Path) -> list[str]:
    """The compiled rows, by the instances' names."""
    names = []
    for table, before in (("compiled_instances", ""), ("compiled_backward_instances", "backward_")):
        rows = (build / "instances" / f"{table}.def").read_text()
        found = re.findall(r"^HOPPER_ATTENTION_\w+\((\w+),", rows, re.MULTILINE)
        names += [before + name for name in found]
    assert names
    return names


@pytest.fixture(scope="module")
def logs(build: Path) -> dict[str, Log]:
    """The log of each generated source and of `OTHER_KERNELS`, by the source's name."""
    units = [path.stem for path in (build / "instances").glob("*.cu")]
    folder = build / "logs"
    return {u: parse_log((folder / f"{u}.cu.log").read_text()) for u in (*units, *OTHER_KERNELS)}


def test_every_row_is_in_a_log(logs, instances):
    rows = [row_of(function.name) for log in logs.values() for function in log.functions]
    assert sorted(filter(None, rows)) == sorted(instances)


def find_tool(name: str) -> str | None:
    """A CUDA binary utility: on PATH, or from its PyPI package."""
    if path := shutil.which(name):
        return path
    folders = [Path(folder) / "nvidia" for folder in sys.path]
    found = [path for folder in folders for path in folder.glob(f"*/bin/{name}")]
    return str(found[0]) if found else None


def test_the_kernels_compile_without_warnings(logs):
    assert {name: log.warnings for name, log in logs.items() if log.warnings} == {}


def test_the_host_code_compiles_without_warnings(build):
    host_logs = {path.name: path.read_text() for path in (build / "logs").glob("*.cpp.log")}
    assert "dispatch.cpp.log" in host_logs
    assert {name: text for name, text in host_logs.items() if text.strip()} == {}


def test_ptxas_has_no_advisories(logs):
    # C7510: WGMMA serialized; C7508: setmaxnreg ignored; C7519: a warpgroup.arrive was added.
    seen = {
        f"{name} {line}"
        for name, log in logs.items()
        for number, line in log.advisories.items()
        if number not in EXPLAINED_ADVISORIES
    }
    assert not seen, "\n".join(sorted(seen))


def test_local_memory_is_small_and_explained(logs):
    faults = [
        fault
        for name, log in logs.items()
        for fault in local_memory_faults(name, log, EXPLAINED_LOCAL_MEMORY)
    ]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def sass(build: Path) -> dict[str, str]:
    """The instructions of each kernel that multiplies matrices."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump not found (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
    result = subprocess.run(
        [cuobjdump, "-sass", str(build / "libhopper_attention.so")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    functions = sass_functions(result.stdout)
    attention = ("forward_kernel", "backward_kernel")
    return {n: code for n, code in functions.items() if any(kernel in n for kernel in attention)}


def test_every_kernel_multiplies_by_wgmma(sass, instances):
    assert sorted(map(row_of, sass)) == sorted(instances)
    wrong = {n: products(c) for n, c in sass.items() if products(c) != expected_products(n)}
    assert wrong == {}


def test_local_memory_is_not_touched_among_the_products(sass):
    # What EXPLAINED_LOCAL_MEMORY says: nothing else is spilled inside the loop over key blocks.
    allowed = [name for name, why in EXPLAINED_LOCAL_MEMORY.items() if why == IN_THE_LOOP]
    found = [name for name, code in sass.items() if touches_local_memory(code)]
    assert [name for name in found if row_of(name) not in allowed] == []


def test_the_library_is_small(build):
    assert (build / "libhopper_attention.so").stat().st_size <= MAX_LIBRARY_BYTES


def test_the_library_needs_neither_driver_nor_torch_nor_cudart(build):
    result = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(build / "libhopper_attention.so")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    needed = needed_libraries(result.stdout)
    assert any(name.startswith("libc.so") for name in needed)
    strangers = ("libcuda", "libcudart", "libtorch", "libc10", "libpython")
    assert [name for name in needed if name.startswith(strangers)] == []


def test_the_library_exports_its_c_interface_only(build):
    result = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(build / "libhopper_attention.so")],
        capture_output=True,
        text=True,
        check=True,
    )
    functions = re.findall(r"^\w+ T (\S+)$", result.stdout, re.MULTILINE)
    headers = sorted((ROOT / "include" / "hopper_attention").glob("abi*.h"))
    declared = "".join(header.read_text() for header in headers)
    assert functions
    assert [name for name in functions if f"{name}(" not in declared] == []
