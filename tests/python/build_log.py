"""Reading what nvcc with -Xptxas -v printed, and a library's SASS and dynamic section."""

from __future__ import annotations

import dataclasses
import re

MAX_LOCAL_BYTES = 32


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


def row_of(function: str) -> str | None:
    """The row of instances.def, by its instance's name, that a mangled kernel is of."""
    match = re.search(r"_kernelINS_\d+(\w+_d\d+(?:x\d+)?_[a-z]+)E", function)
    return match.group(1).replace("Backward_", "backward_") if match else None


def local_memory_faults(unit: str, log: Log, explained: dict[str, str]) -> list[str]:
    """What is wrong with the local memory of one log's functions, in words."""
    faults = [] if log.functions else [f"{unit}: the log names no function"]
    for function in log.functions:
        name, used = row_of(function.name) or unit, function.local_bytes
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
