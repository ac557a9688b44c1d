"""Exact attention for NVIDIA Hopper GPUs, with FlashAttention-3's Python interface.

Importing needs neither a GPU, a driver nor the compiled kernels: `reference` and `emulation` work
everywhere, and `unavailable_reason()` says what `flash_attn_func` is missing on this machine.
"""

from importlib import metadata as _metadata

from . import emulation, emulation_fp8, emulation_varlen, reference
from ._explain import Explanation, explain
from ._library import is_available, unavailable_reason
from .fp8 import flash_attn_fp8_func
from .interface import flash_attn_func, flash_attn_qkvpacked_func
from .quantize import quantize
from .quantized import Quantized
from .recipe import Fp8Recipe
from .varlen import flash_attn_varlen_func

try:
    __version__ = _metadata.version("hopper-attention")
except _metadata.PackageNotFoundError:  # a source checkout on sys.path, not installed
    __version__ = "0.0.0+source"

__all__ = [
    "Explanation",
    "Fp8Recipe",
    "Quantized",
    "__version__",
    "emulation",
    "emulation_fp8",
    "emulation_varlen",
    "explain",
    "flash_attn_fp8_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "is_available",
    "quantize",
    "reference",
    "unavailable_reason",
]
