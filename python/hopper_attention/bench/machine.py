"""What this machine is, for result files and ``hopper-attention doctor``."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.util
import re
from pathlib import Path

import torch


def driver_version() -> str | None:
    """Reads the NVIDIA driver's version, such as "580.159.04"; None without a driver."""
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0:
            found = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0
            nvml.nvmlShutdown()
            if found:
                return text.value.decode()
    with contextlib.suppress(OSError):
        module = Path("/proc/driver/nvidia/version").read_text()
        match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", module)
        if match:
            return match.group(1)
    return None


def driver_cuda_version() -> tuple[int, int] | None:
    """Reads the newest CUDA version that the driver supports; None without a driver."""
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(number)) == 0:
            return number.value // 1000, number.value % 1000 // 10
    return None


def package_files(pattern: str) -> list[Path]:
    """Finds files of the installed package, also where its parts lie in several folders."""
    spec = importlib.util.find_spec("hopper_attention")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(file for folder in folders for file in Path(folder).glob(pattern))


def library_file() -> Path | None:
    """Finds the compiled library; None where the package was installed without."""
    extension = importlib.util.find_spec("hopper_attention._C")
    if extension is not None and extension.origin is not None:
        library = Path(extension.origin).with_name("libhopper_attention.so")
        if library.is_file():
            return library
    return next(iter(package_files("libhopper_attention.so")), None)


def describe() -> dict[str, str | None]:
    """Describes the machine as result files do.

    Returns:
        ``device`` (the current CUDA device's name), ``driver``, ``cuda`` (PyTorch's), ``torch`` and
        ``date`` (UTC, ISO 8601 to the second). What is missing is None.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    return {
        "device": device,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "date": now.isoformat().replace("+00:00", "Z"),
    }


def hopper_devices() -> list[int]:
    """Lists the CUDA devices of compute capability 9.0."""
    if not torch.cuda.is_available():
        return []
    return [
        index
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index) == (9, 0)
    ]
