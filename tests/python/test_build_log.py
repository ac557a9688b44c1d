"""What the compilers said about the kernels, and what the library became.

Reads <build>/logs (for each source all that its compiler printed, nvcc with -Xptxas -v; kept by
cmake/log_compile.sh) of the newest build of this checkout for this Python. Where no kernels were
compiled those tests skip; the parsing is tested everywhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LOCAL_BYTES = 32
MAX_LIBRARY_BYTES = 25 * 2**20

# Instances that may use local memory (at most MAX_LOCAL_BYTES), each with the reason.
OUTSIDE_THE_LOOP = "addresses that are written once and read once a tile, outside the key loop"
TRANSPOSING = "the warps that transpose V have 24 registers; and addresses outside the key loop"
IN_THE_LOOP = "a few words of the state of a tile or of the loop, read at most once a step"
LOADING = "the warps that load, add and store have 24 registers; those that multiply use none of it"
EXPLAINED_LOCAL_MEMORY: dict[str, str] = {
    "fp16_d256_full": OUTSIDE_THE_LOOP,
    "bf16_d256_full": OUTSIDE_THE_LOOP,
    "fp16_d256_masked": OUTSIDE_THE_LOOP,
    "bf16_d256_masked": OUTSIDE_THE_LOOP,
    **{
        f"{dtype}_d{dims}_packed": OUTSIDE_THE_LOOP
        for dtype in ("fp16", "bf16")
        for dims in ("128", "192x128", "192", "256")
    },
    **{
        f"backward_{dtype}_d{dims}_{mask}": IN_THE_LOOP if mask == "capped" else LOADING
        for dtype in ("fp16", "bf16")
        for dims in ("64", "96", "128")
        for mask in ("full", "masked", "packed", "capped")
    },
    **{
        f"backward_{dtype}_{dims}_{mask}": IN_THE_LOOP
        for dtype in ("fp16", "bf16")
        for dims in ("d192", "d192x128")
        for mask in ("full", "masked", "packed", "capped")
    },
    "e4m3_d128_masked": IN_THE_LOOP,
    "e4m3_d256_full": OUTSIDE_THE_LOOP,
    "e4m3_d256_masked": TRANSPOSING,
    "e4m3fast_d128_masked": TRANSPOSING,
    "e4m3fast_d256_masked": TRANSPOSING,
    "quantize": "the task's number, a token's scale, or one of a thread's 64 elements where the "
    "largest is found",
}
# Kernels that multiply no matrices, with the log of each.
OTHER_KERNELS = {
    "quantize": "quantize_launch.cu.log",
    "preprocess": "backward_preprocess.cu.log",
    "sink": "backward_sink.cu.log",
    "convert": "backward_convert.cu.log",
    "list_tiles": "forward_list_tiles.cu.log",
}
# ptxas's advisories that do no harm here, by number, each with the reason.
EXPLAINED_ADVISORIES: dict[str, str] = {}


@dataclasses.dataclass
class Function:
    """One device function in ptxas's report; sizes in bytes."""

    name: str
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def local_bytes(self) -> int:
        return self.stack  # what a thread has; a spilled word may be read in several places


@dataclasses.dataclass
class Log:
    """A compiler's output: the functions, the warnings and ptxas's numbered advisories."""

    functions: list[Function]
    warnings: list[str]
    advisories: dict[str, str]  # number to line


def parse_log(text: str) -> Log:
    functions: list[Function] = []
    warnings: list[str] = []
    advisories: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            name = match.group(1)
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            functions.append(Function(name, *map(int, match.groups())))
        elif match := re.search(r"\((C\d+)\)", line):
            advisories[match.group(1)] = line
        elif re.search(r"\b(warning|advisory|performance loss|serialized)\b", line, re.IGNORECASE):
            warnings.append(line)
    return Log(functions, warnings, advisories)


def local_memory_faults(name: str, log: Log, explained: dict[str, str]) -> list[str]:
    """What is wrong with the local memory of one instance's functions, in words."""
    faults = []
    used = max((function.local_bytes for function in log.functions), default=0)
    if not log.functions:
        faults.append(f"{name}: the log names no function")
    if used > MAX_LOCAL_BYTES:
        faults.append(f"{name}: {used} bytes of local memory, more than {MAX_LOCAL_BYTES}")
    elif used > 0 and name not in explained:
        faults.append(f"{name}: {used} bytes of local memory that nothing explains")
    return faults


def needed_libraries(readelf: str) -> list[str]:
    """The shared libraries that `readelf --dynamic` says are needed."""
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf)


def sass_functions(sass: str) -> dict[str, str]:
    """From `cuobjdump -sass`: each kernel's name and instructions."""
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def products(code: str) -> set[str]:
    """The kinds of WGMMA in a kernel: HGMMA multiplies 16-bit numbers, QGMMA 8-bit ones."""
    return set(re.findall(r"\b([HQ]GMMA)\b", code))


def expected_products(name: str) -> set[str]:
    """What a kernel of this mangled name must multiply with."""
    return {"QGMMA" if "e4m3" in name else "HGMMA"}


def touches_local_memory(code: str) -> bool:
    """Whether local memory is read or written between a kernel's first and last WGMMA."""
    places = [match.start() for match in re.finditer(r"\b[HQ]GMMA\b", code)]
    return re.search(r"\b(LDL|STL)\b", code[places[0] : places[-1]]) is not None


# ---------------------------------------------------------------------------------------------
# Parsing, on samples.

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


# ---------------------------------------------------------------------------------------------
# The build.


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
def logs(build: Path) -> dict[str, Log]:
    """The log of each compiled instance, by the instance's name, and of `OTHER_KERNELS`."""
    files = dict(OTHER_KERNELS)
    for table, before in (("compiled_instances", ""), ("compiled_backward_instances", "backward_")):
        rows = (build / "instances" / f"{table}.def").read_text()
        for direction, name in re.findall(r"^HOPPER_ATTENTION_(\w+)\((\w+),", rows, re.MULTILINE):
            files[before + name] = f"{direction.lower()}_{name}.cu.log"
    assert len(files) > len(OTHER_KERNELS)
    return {name: parse_log((build / "logs" / file).read_text()) for name, file in files.items()}


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


def test_every_kernel_multiplies_by_wgmma(sass, logs):
    assert len(sass) == len(logs) - len(OTHER_KERNELS)
    wrong = {n: products(c) for n, c in sass.items() if products(c) != expected_products(n)}
    assert wrong == {}


def test_local_memory_is_not_touched_among_the_products(sass):
    # What EXPLAINED_LOCAL_MEMORY says: nothing else is spilled inside the loop over key blocks.
    allowed = [name for name, why in EXPLAINED_LOCAL_MEMORY.items() if why == IN_THE_LOOP]
    found = [name for name, code in sass.items() if touches_local_memory(code)]
    # A backward kernel's mangled name has Backward_ and its row's.
    symbols = [row.replace("backward_", "Backward_") for row in allowed]
    assert [name for name in found if not any(symbol in name for symbol in symbols)] == []


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
