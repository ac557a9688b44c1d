"""Exact attention for NVIDIA Hopper GPUs, with FlashAttention-3's Python interface.

Importing needs neither a GPU, a driver nor the compiled kernels: `reference` and `emulation` work
everywhere, and `unavailable_reason()` says what `flash_attn_func` is missing on this machine.
"""

from importlib import metadata as _metadata

from . import emulation, reference
from ._explain import Explanation, explain
from ._library import is_available, unavailable_reason
from .interface import flash_attn_func, flash_attn_qkvpacked_func

try:
    __version__ = _metadata.version("hopper-attention")
except _metadata.PackageNotFoundError:  # a source checkout on sys.path, not installed
    __version__ = "0.0.0+source"

__all__ = [
    "Explanation",
    "__version__",
    "emulation",
    "explain",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "is_available",
    "reference",
    "unavailable_reason",
]
