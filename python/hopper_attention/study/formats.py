"""The formats that the study compares, and who computes attention in each.

A `Format` is a name that `--formats` takes. It has one contestant or more; a contestant is a way
to compute attention, judged against float64. `register` adds a format. The FP8 recipes take 16-bit
inputs, quantize them inside their `run`, and are measured like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hopper_attention
from hopper_attention import emulation, emulation_fp8
from hopper_attention.recipe import Fp8Recipe

from .errors import StudyError
from .inputs import AttentionInputs
from .recipes import RECIPES
from .standard import standard_attention

KERNEL = "kernel"
EMULATION = "emulation"
PYTORCH = "pytorch"

# The largest head dimension of the kernels, and what a head dimension must be a multiple of.
_KERNEL_MAX_HEAD_DIM = 256
_KERNEL_HEAD_DIM_STEP = 8


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        method: "standard" or "ours".
        format: the name of the format it belongs to.
        input_dtype: what Q, K and V are rounded to before `run` sees them.
        run: takes the rounded inputs and returns O, (batch, seqlen_q, heads, head_dim_v), and
            who computed it: `KERNEL`, `EMULATION` or `PYTORCH`.
    """

    method: str
    format: str
    input_dtype: torch.dtype
    run: Callable[[AttentionInputs], tuple[Tensor, str]]

    @property
    def label(self) -> str:
        """Method and format in words, as tables and pictures show them."""
        return f"{self.method} {self.format}"


@dataclass(frozen=True)
class Format:
    """A number format and the contestants that compute in it."""

    name: str
    contestants: tuple[Contestant, ...]


_FORMATS: dict[str, Format] = {}


def register(entry: Format) -> None:
    """Adds a format that `--formats` can name.

    Raises:
        ValueError: where the name is taken, or a contestant names another format.
    """
    if entry.name in _FORMATS:
        raise ValueError(f"name is {entry.name!r}, which is a format already")
    for contestant in entry.contestants:
        if contestant.format != entry.name:
            raise ValueError(
                f"contestants has one of format {contestant.format!r}; expected {entry.name!r}"
            )
    _FORMATS[entry.name] = entry


def names() -> list[str]:
    """The registered formats, in the order of their registration."""
    return list(_FORMATS)


def contestants(format_names: Iterable[str]) -> list[Contestant]:
    """The contestants of some formats, in the order given.

    Raises:
        ValueError: for a name that is not registered, or none at all.
    """
    chosen: list[Contestant] = []
    for name in dict.fromkeys(format_names):
        if name not in _FORMATS:
            raise ValueError(f"formats has {name!r}; allowed are {', '.join(_FORMATS)}")
        chosen.extend(_FORMATS[name].contestants)
    if not chosen:
        raise ValueError(f"formats is empty; allowed are {', '.join(_FORMATS)}")
    return chosen


def _run_standard(x: AttentionInputs) -> tuple[Tensor, str]:
    return standard_attention(x), PYTORCH if x.query.is_cuda else EMULATION


def _kernel_takes(x: AttentionInputs) -> bool:
    """Whether these inputs can go to a kernel on this machine."""
    head_dims = (x.query.shape[-1], x.value.shape[-1])
    return (
        x.query.is_cuda
        and hopper_attention.is_available()
        and all(d <= _KERNEL_MAX_HEAD_DIM and d % _KERNEL_HEAD_DIM_STEP == 0 for d in head_dims)
    )


def _run_ours(x: AttentionInputs) -> tuple[Tensor, str]:
    if _kernel_takes(x):
        result = hopper_attention.flash_attn_func(
            x.query,
            x.key,
            x.value,
            softmax_scale=x.softmax_scale,
            causal=x.causal,
            window_size=x.window_size,
            softcap=x.softcap,
        )
        assert isinstance(result, Tensor), "without return_attn_probs there is O alone"
        return result, KERNEL
    device = x.query.device
    on_cpu = x.to(torch.device("cpu"))
    try:
        out, _ = emulation.attention(
            on_cpu.query,
            on_cpu.key,
            on_cpu.value,
            softmax_scale=x.softmax_scale,
            causal=x.causal,
            window_size=x.window_size,
            softcap=x.softcap,
        )
    except (ValueError, RuntimeError) as error:
        # No kernel for these head dimensions, or a source checkout that was never built.
        raise StudyError(f"ours cannot compute this: {error}") from error
    return out.to(device), EMULATION


def _run_fp8(recipe: Fp8Recipe, x: AttentionInputs) -> tuple[Tensor, str]:
    options: dict[str, Any] = {
        "softmax_scale": x.softmax_scale,
        "causal": x.causal,
        "window_size": x.window_size,
        "softcap": x.softcap,
    }
    try:
        if _kernel_takes(x):
            fp8_func: Any = vars(hopper_attention)["flash_attn_fp8_func"]
            return fp8_func(x.query, x.key, x.value, recipe=recipe, **options), KERNEL
        cpu = x.to(torch.device("cpu"))
        out, _ = emulation_fp8.attention_from_16_bits(
            cpu.query, cpu.key, cpu.value, recipe, **options
        )
    except ValueError as error:
        # A softcap beside smoothing, or head dimensions without a kernel.
        raise StudyError(f"{recipe} cannot compute this: {error}") from error
    return out.to(x.query.device), EMULATION


def _fp8(name: str, recipe: Fp8Recipe) -> Format:
    # Serving runs in bfloat16; its rounding is a sixteenth of e4m3's.
    return Format(name, (Contestant("ours", name, torch.bfloat16, partial(_run_fp8, recipe)),))


def _sixteen_bit(name: str, dtype: torch.dtype) -> Format:
    return Format(
        name,
        (
            Contestant("standard", name, dtype, _run_standard),
            Contestant("ours", name, dtype, _run_ours),
        ),
    )


register(_sixteen_bit("fp16", torch.float16))
register(_sixteen_bit("bf16", torch.bfloat16))
for _name, _named in RECIPES.items():
    register(_fp8(_name, _named.recipe))
