"""Packages that come with an extra of this one, and what to say where they are missing."""

from __future__ import annotations

import importlib.util

STUDY = "study"  # of pyproject.toml: what the error study and pictures need


class MissingExtraError(ModuleNotFoundError):
    """A package that an extra brings is not installed."""


def command(extra: str) -> str:
    """What installs an extra."""
    return f"pip install 'hopper-attention[{extra}]'"


def require(extra: str, *packages: str) -> None:
    """Looks for an extra's packages, without importing them.

    Raises:
        MissingExtraError: one is not installed; the message says what to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"not installed: {' and '.join(missing)}, of the extra {extra!r}: {command(extra)}",
            name=missing[0],
        )
