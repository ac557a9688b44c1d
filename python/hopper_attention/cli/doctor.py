"""``hopper-attention doctor``: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hopper_attention.cli.probes import Check, probe

_MARKS = {True: "[green]ok[/]     ", False: "[red]missing[/]", None: "[yellow]note[/]   "}


@dataclass(frozen=True)
class Use:
    """A thing that users do, and whether they can do it here.

    Attributes:
        name: What it is.
        works: Whether it works.
        because: Names of the checks that stand in its way.
    """

    name: str
    works: bool
    because: tuple[str, ...]


# What each use needs: names of checks
_NEEDS = {
    "reference (float64)": ("Python", "PyTorch"),
    "emulation on the CPU": ("Python", "PyTorch", "tile table"),
    "attention by the kernels": (
        "Python",
        "PyTorch",
        "PyTorch's CUDA",
        "NVIDIA driver",
        "Hopper card",
        "compiled library",
        "instances",
    ),
    "study (error study)": ("Python", "PyTorch", "tile table", "transformers", "matplotlib"),
    "bench (benchmarks)": (
        "Python",
        "PyTorch",
        "PyTorch's CUDA",
        "NVIDIA driver",
        "Hopper card",
        "compiled library",
    ),
}


def uses(checks: Sequence[Check]) -> list[Use]:
    """Says what works, given what was found."""
    failed = {check.name for check in checks if check.ok is False}
    return [
        Use(name, failed.isdisjoint(needs), tuple(need for need in needs if need in failed))
        for name, needs in _NEEDS.items()
    ]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Shows versions, the driver, the card and the compiled kernels, and says what is missing.

    The exit code is 0 when everything works on this machine, else 1.
    """
    checks = probe()
    found = uses(checks)
    healthy = all(use.works for use in found)
    if as_json:
        report = {
            "ok": healthy,
            "checks": [asdict(check) for check in checks],
            "uses": [asdict(use) for use in found],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_report(checks, found)
    raise typer.Exit(0 if healthy else 1)


def _print_report(checks: Sequence[Check], found: Sequence[Use]) -> None:
    console = Console(highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.print(
            f"{_MARKS[check.ok]} {check.name:<{width}}  {escape(check.found)}", soft_wrap=True
        )
        if check.do is not None:
            console.print(f"{'':>{9 + width}} -> {escape(check.do)}", soft_wrap=True)
    console.print()
    for use in found:
        if use.works:
            console.print(f"{_MARKS[True]} {use.name}", soft_wrap=True)
        else:
            why = ", ".join(use.because)
            console.print(f"{_MARKS[False]} {use.name}: see {escape(why)}", soft_wrap=True)
