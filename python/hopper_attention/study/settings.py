"""What a run of the study is asked for, and whom it tells how far it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

import hopper_attention

from .distributions import DISTRIBUTIONS
from .errors import StudyError
from .models import DEFAULT_MODEL

MODEL = "model"
CONTEXT = "context"
SOURCES = (MODEL, *DISTRIBUTIONS, CONTEXT)

# Context lengths are powers of 2 from the first on.
MIN_KEYS = 4096
DEFAULT_MAX_KEYS = 2**19

# The error depends on the length and on the head dimension, not on how many heads there are, so
# a CPU gets fewer of them.
_SHAPE_CUDA = {"batch": 2, "seqlen": 4096, "heads": 16, "head_dim": 128}
_SHAPE_CPU = {"batch": 1, "seqlen": 4096, "heads": 2, "head_dim": 128}

# A text is cut into sequences as long as the model takes, up to so many tokens.
_MAX_CONTEXT_CUDA = 8192
_MAX_CONTEXT_CPU = 2048


@dataclass(frozen=True)
class Settings:
    """What to study; None stands for a default that depends on the model or the device.

    Attributes:
        sources: any of `SOURCES`.
        formats: names of registered formats.
        model: path or name of a Hugging Face model.
        text: a text file; None for the one that the package carries.
        layers: places of the attention layers to study; None for all.
        max_tokens: tokens of text in all.
        context: tokens in a sequence of text.
        batch, seqlen, heads, head_dim: the shape of the distributions.
        max_keys: the largest number of keys of the source "context".
        seed: of the random numbers.
        device: "auto", "cpu" or "cuda".
    """

    sources: tuple[str, ...] = SOURCES
    formats: tuple[str, ...] = ("fp16", "bf16")
    model: str = DEFAULT_MODEL
    text: Path | None = None
    layers: tuple[int, ...] | None = None
    max_tokens: int = 4096
    context: int | None = None
    batch: int | None = None
    seqlen: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    max_keys: int = DEFAULT_MAX_KEYS
    seed: int = 0
    device: str = "auto"

    def checked(self) -> Settings:
        """These settings, if they can be studied.

        Raises:
            StudyError: for a source that is not known, or a number that is too small.
        """
        if not self.sources:
            raise StudyError(f"--source is empty; allowed are {', '.join(SOURCES)}")
        for source in self.sources:
            if source not in SOURCES:
                raise StudyError(f"--source is {source}; allowed are {', '.join(SOURCES)}")
        for name in ("max_tokens", "context", "batch", "seqlen", "heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise StudyError(f"--{option} is {value}; it must be at least 1")
        if self.max_keys < MIN_KEYS:
            raise StudyError(f"--max-keys is {self.max_keys}; it must be at least {MIN_KEYS}")
        for layer in self.layers or ():
            if layer < 0:
                raise StudyError(f"--layers has {layer}; layers count from 0")
        return self

    def shape_on(self, device: torch.device) -> dict[str, int]:
        """The shape of the distributions: as set, else as fits the device."""
        defaults = _SHAPE_CUDA if device.type == "cuda" else _SHAPE_CPU
        return {name: getattr(self, name) or default for name, default in defaults.items()}

    def with_shape(self, device: torch.device) -> Settings:
        """These settings with the shape of the distributions filled in."""
        shape = self.shape_on(device)
        return replace(
            self,
            batch=shape["batch"],
            seqlen=shape["seqlen"],
            heads=shape["heads"],
            head_dim=shape["head_dim"],
        )


def max_context(device: torch.device) -> int:
    """The longest sequence of text on a device where --context does not ask for another."""
    return _MAX_CONTEXT_CUDA if device.type == "cuda" else _MAX_CONTEXT_CPU


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for on this machine.

    "auto" is the GPU where our kernels can run on it. Elsewhere ours is emulated on the CPU, and
    a GPU would only be given a problem of a size that takes the CPU hours.

    Raises:
        StudyError: for another name, or for "cuda" where PyTorch finds no CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise StudyError(f"--device is {name}; allowed are auto, cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise StudyError("--device is cuda, but PyTorch finds no CUDA device: use auto or cpu")
    if name == "auto":
        name = "cuda" if hopper_attention.is_available() else "cpu"
    return torch.device(name)


class Progress(Protocol):
    """Who is told how far the study is."""

    def start(self, title: str) -> None:
        """A source begins."""

    def expect(self, steps: int) -> None:
        """It has so many steps."""

    def advance(self) -> None:
        """One step is done."""

    def finish(self) -> None:
        """The source is done."""


class Silent:
    """Tells nobody."""

    def start(self, title: str) -> None:
        """Does nothing."""

    def expect(self, steps: int) -> None:
        """Does nothing."""

    def advance(self) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""
