"""What ``hopper-attention doctor`` looks at, one function for each thing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import hopper_attention
from hopper_attention import _extras
from hopper_attention import _library as loader
from hopper_attention.bench import machine, session, sources
from hopper_attention.bench.contestants import FA3_VARIABLE

_PYTHON_RANGE = ((3, 10), (3, 13))
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir {where}"


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Attributes:
        name: The thing.
        ok: True when it is as it should be, False when it is missing or wrong, None for
            information that nothing depends on.
        found: What is there, in words.
        do: What the user can do about it, or None.
    """

    name: str
    ok: bool | None
    found: str
    do: str | None = None


def probe() -> list[Check]:
    """Looks at everything.

    Returns:
        The checks; a probe that itself fails becomes one that is not ok.
    """
    checks: list[Check] = []
    for name, look in _PROBES.items():
        try:
            checks += look()
        except Exception as error:  # the doctor speaks, whatever is broken
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def _python() -> Iterator[Check]:
    low, high = _PYTHON_RANGE
    version = sys.version_info[:2]
    fine = low <= version <= high
    words = f"{platform.python_version()} ({sys.executable})"
    advice = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    yield Check("Python", True if fine else None, words, None if fine else advice)


def _package() -> Iterator[Check]:
    version = hopper_attention.__version__
    folder = Path(hopper_attention.__file__).parent
    yield Check("hopper-attention", None, f"{version} ({folder})")
    stale = session.stale_sources()
    if stale is not None:
        yield Check("sources", None, stale, _reinstall())


def _torch() -> Iterator[Check]:
    yield Check("PyTorch", True, str(torch.__version__))
    cuda = torch.version.cuda
    if cuda is not None:
        yield Check("PyTorch's CUDA", True, cuda)
        return
    yield Check(
        "PyTorch's CUDA",
        False,
        "none: this is a build for CPUs",
        "install a CUDA build: PyPI's for Linux is one (pip install --force-reinstall torch, "
        "without a further index)",
    )


def _driver() -> Iterator[Check]:
    version, newest = machine.driver_version(), machine.driver_cuda_version()
    if version is None and newest is None:
        yield Check(
            "NVIDIA driver",
            False,
            "none",
            "install NVIDIA's driver (in a container: start it with the card, as by "
            "docker run --gpus all)",
        )
        return
    words = str(version)
    fine, advice = True, None
    if newest is not None:
        words += f", for CUDA up to {newest[0]}.{newest[1]}"
        needed = int((torch.version.cuda or "0").split(".")[0])
        if newest[0] < needed:
            fine = False
            advice = f"PyTorch is built for CUDA {torch.version.cuda}: install a newer driver"
    yield Check("NVIDIA driver", fine, words, advice)


def _cards() -> Iterator[Check]:
    if not torch.cuda.is_available():
        advice = (
            "the kernels need an H100, H200 or GH200; without one, use the reference and the "
            "emulation"
        )
        if torch.version.cuda is None and machine.driver_version() is not None:
            advice = "there is a driver, but this build of PyTorch uses none: see PyTorch's CUDA"
        yield Check("Hopper card", False, "PyTorch sees no CUDA device", advice)
        return
    hopper = machine.hopper_devices()
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        words = (
            f"{index}: {card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB"
        )
        if index in hopper:
            yield Check("Hopper card", True, words)
        elif hopper:
            yield Check("other card", None, words, "the kernels do not run on this one")
        else:
            yield Check(
                "Hopper card", False, words, "the kernels need compute capability 9.0 (Hopper)"
            )


def _library() -> Iterator[Check]:
    library = machine.library_file()
    if library is None:
        nvcc = _nvcc()
        if nvcc is None:
            advice = f"install the CUDA toolkit (nvcc on PATH or CUDA_HOME), then: {_reinstall()}"
        else:
            advice = f"nvcc is here ({nvcc}): {_reinstall()}"
        words = f"not installed: {loader.built_without()}"
        yield Check("compiled library", False, words, advice)
        return
    size = f"{library} ({library.stat().st_size / 2**20:.1f} MiB)"
    try:
        module = loader.load()
    except RuntimeError as error:
        yield Check("compiled library", False, f"{size}: {error}", _reinstall())
        return
    yield Check("compiled library", True, f"{module.version()}, {size}")
    yield _instances(set(module.instances()))


def _instances(compiled: set[str]) -> Check:
    tiles = [*machine.package_files("tiles.json"), *machine.package_files("backward_tiles.json")]
    known = {row["name"] for file in tiles for row in json.loads(file.read_text())} or compiled
    left_out = sorted(known - compiled)
    if not compiled:
        return Check("instances", False, "none is compiled", _reinstall())
    words = f"{len(compiled)} of {len(known)} kernels are compiled"
    if not left_out:
        return Check("instances", True, words)
    return Check(
        "instances",
        None,
        f"{words}; left out: {', '.join(left_out)}",
        "build with HOPPER_ATTENTION_INSTANCES='.*' for all",
    )


def _tiles() -> Iterator[Check]:
    files = machine.package_files("tiles.json")
    if files:
        yield Check("tile table", True, str(files[0]))
    else:
        yield Check("tile table", False, "tiles.json is not installed", _reinstall())


def _packages() -> Iterator[Check]:
    for name, purpose in (
        ("transformers", "study needs"),
        ("matplotlib", "study and pictures need"),
    ):
        try:
            yield Check(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, False, f"not installed; {purpose} it", _extras.command(_extras.STUDY))


def _peers() -> Iterator[Check]:
    named = os.environ.get(FA3_VARIABLE)
    if named:
        there = Path(named).is_file()
        words = f"{named} ({FA3_VARIABLE})" if there else f"{named} ({FA3_VARIABLE}) is no file"
        yield Check("peer: fa3", None, words)
    elif importlib.util.find_spec("flash_attn_3") is not None:
        yield Check("peer: fa3", None, "the installed package flash_attn_3")
    else:
        yield Check("peer: fa3", None, "none; only bench compares with it (--peers-dir)")
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    yield Check("peer: cudnn", None, "none" if cudnn is None else f"{cudnn}, inside PyTorch")


def _nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    usual = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (usual if Path(usual).is_file() else None)


def _reinstall() -> str:
    root = sources.source_root()
    return _REINSTALL.format(where="hopper-attention" if root is None else root)


_PROBES: dict[str, Callable[[], Iterator[Check]]] = {
    "Python": _python,
    "hopper-attention": _package,
    "PyTorch": _torch,
    "NVIDIA driver": _driver,
    "Hopper card": _cards,
    "compiled library": _library,
    "tile table": _tiles,
    "packages": _packages,
    "peers": _peers,
}
