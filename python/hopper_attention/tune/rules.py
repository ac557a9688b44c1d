"""What include/hopper_attention/budget.h says about configs: asked of the headers themselves.

A small host program of the source tree, tools/config_costs.cpp, is compiled against the headers and
answers; so the rules stand in one place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

# The fields of ForwardConfig that can be chosen, by name and in its order; an enumerator's name
# stands for an enumeration's value.
Value: TypeAlias = int | bool | str
Config: TypeAlias = dict[str, Value]

_PROGRAM = Path("tools", "config_costs.cpp")
_INCLUDES = ("include", "hopper")
_MARKERS = (_PROGRAM, Path("hopper", "forward", "instances.def"), Path("CMakeLists.txt"))


class TuneError(Exception):
    """Something that tuning needs is missing or wrong; the message says what to do."""


@dataclass(frozen=True)
class Instance:
    """A row of hopper/forward/instances.def.

    Attributes:
        name: The kernel's name.
        dtype: As the C++ side names it, a torch dtype's name where there is one.
        head_dim: Columns of Q and K.
        head_dim_v: Columns of V.
        mask: "full", "masked", "packed" or "short".
        chosen: What config.h chooses.
    """

    name: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    chosen: Config


@dataclass(frozen=True)
class Cost:
    """A config and what budget.h counts for it.

    Attributes:
        config: The config.
        error: Why it cannot be built, or None.
        tile_m: Query rows of a tile.
        threads: Threads of a block.
        shared_bytes: Shared memory of a block.
        fragment_registers: A thread's registers of S, P and O.
    """

    config: Config
    error: str | None
    tile_m: int
    threads: int
    shared_bytes: int
    fragment_registers: int


def show(value: Value) -> str:
    """Writes a value as C++ does: ``true``, ``96``, ``kAfterRow``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def label(config: Config) -> str:
    """Writes a config in one line, such as ``tile_n=96 stages=2``."""
    return " ".join(f"{name}={show(value)}" for name, value in config.items())


def find_source(folder: Path | None) -> Path:
    """Finds the source checkout.

    Args:
        folder: Where the user says that it is; None: the working directory or a parent of it.

    Raises:
        TuneError: There is none.
    """
    start = (folder or Path.cwd()).resolve()
    for root in (start,) if folder is not None else (start, *start.parents):
        if all((root / marker).is_file() for marker in _MARKERS):
            return root
    what = f"{start} is no source checkout" if folder else f"{start} is not in a source checkout"
    raise TuneError(
        f"{what} of hopper-attention (with {', '.join(map(str, _MARKERS))}): candidates are "
        "compiled from the sources; clone the repository, and run there or name it by --source"
    )


class Rules:
    """The rules of a source tree's headers."""

    def __init__(self, source: Path, folder: Path) -> None:
        """Compiles the program that knows the rules, and asks for the rows.

        Args:
            source: The source checkout.
            folder: Where the program is put; made where it is missing.

        Raises:
            TuneError: There is no C++ compiler, or it fails.
        """
        self._program = folder / "config_costs"
        self._compile(source, folder)
        lines = self._ask([])
        self.schedules: list[str] = lines[0]["schedules"]
        self.instances = {
            row["name"]: Instance(
                row["name"],
                row["dtype"],
                row["head_dim"],
                row["head_dim_v"],
                row["mask"],
                row["config"],
            )
            for row in lines[1:]
        }

    def costs(self, instance: Instance, configs: Sequence[Config]) -> list[Cost]:
        """Counts what configs of an instance would cost, and whether they can be built."""
        questions = [f"{instance.name} {label(config)}" for config in configs]
        answers = self._ask(questions)[1 + len(self.instances) :]
        names = (
            "config", "error", "tile_m", "threads", "shared_bytes", "fragment_registers"
        )  # fmt: skip
        return [Cost(**{name: answer[name] for name in names}) for answer in answers]

    def values(self, field: str, chosen: Value) -> list[Value]:
        """Lists the values that a field may be tried at, before budget.h says which fit."""
        if isinstance(chosen, bool):
            return [False, True]
        if isinstance(chosen, str):
            return list(self.schedules)
        ranges = {"tile_n": range(16, 257, 16), "stages": range(2, 7), "num_consumers": range(2, 4)}
        return list(ranges.get(field, range(1, 5)))

    def _compile(self, source: Path, folder: Path) -> None:
        named = os.environ.get("CXX")
        compiler = named or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise TuneError("no C++ compiler was found: install g++, or set CXX")
        folder.mkdir(parents=True, exist_ok=True)
        command = [*compiler.split(), "-std=c++17", *(f"-I{source / name}" for name in _INCLUDES)]
        command += [str(source / _PROGRAM), "-o", str(self._program)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise TuneError(f"the C++ compiler {compiler} does not run: {error}") from error
        if done.returncode != 0:
            raise TuneError(f"{source / _PROGRAM} does not compile:\n{done.stderr.strip()}")

    def _ask(self, questions: Sequence[str]) -> list[dict[str, Any]]:
        text = "".join(f"{question}\n" for question in questions)
        done = subprocess.run([str(self._program)], input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise TuneError(done.stderr.strip() or f"{self._program} failed")
        return [json.loads(line) for line in done.stdout.splitlines()]
