"""The compiled library, loaded when it is first needed, and the reason when it cannot be."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

_NAME = "hopper_attention._C"

_module: Any = None
_reason: str | None = None


def load() -> Any:
    """Returns the extension module `hopper_attention._C`, loading it at the first call.

    Raises:
        RuntimeError: the package was installed without compiled kernels, or they do not load.
    """
    global _module, _reason
    if _module is not None:
        return _module
    if _reason is None:
        if importlib.util.find_spec(_NAME) is None:
            _reason = (
                f"hopper_attention was installed without its compiled kernels: {built_without()}. "
                "Install the CUDA toolkit (12.5 or newer, nvcc on PATH) and reinstall; "
                "`hopper-attention doctor` shows what is missing"
            )
        else:
            try:
                _module = importlib.import_module(_NAME)
            except (ImportError, OSError) as error:
                _reason = f"hopper_attention's compiled library does not load: {error}"
            else:
                return _module
    raise RuntimeError(_reason)


def built_without() -> str:
    """Why the build left the kernels out, as CMake wrote it into build.json."""
    import hopper_attention

    for folder in hopper_attention.__path__:  # an editable install has two
        path = Path(folder) / "build.json"
        if path.is_file():
            reason: str = json.loads(path.read_text(encoding="utf-8"))["reason"]
            return reason or "the build has them, but they are not where the package is"
    return "these are sources that were not built"


def is_compiled() -> bool:
    """Whether the compiled library is installed and loads; says nothing about the GPU."""
    try:
        load()
    except RuntimeError:
        return False
    return True


def unavailable_reason() -> str | None:
    """Why `flash_attn_func` cannot run on the current device, or None when it can.

    Initialises CUDA in this process where the compiled library and a device are present.
    """
    try:
        load()
    except RuntimeError as error:
        return str(error)
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            f"PyTorch {torch.__version__} (built {build}) finds no CUDA device: "
            "torch.cuda.is_available() is False"
        )
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name = torch.cuda.get_device_name()
        return (
            f"the current CUDA device, {name}, has compute capability "
            f"{capability[0]}.{capability[1]}; the kernels need 9.0 (Hopper: H100, H200, GH200)"
        )
    return None


def is_available() -> bool:
    """Whether `flash_attn_func` can run on the current device; see `unavailable_reason`."""
    return unavailable_reason() is None
