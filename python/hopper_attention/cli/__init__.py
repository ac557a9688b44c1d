"""The command line: `hopper-attention study`, `bench`, `tune` and `doctor`.

Each command's module imports what it needs when it runs, so that `--help` does not wait for
transformers or matplotlib.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hopper_attention import __version__

from .bench import bench
from .doctor import doctor
from .study import study
from .tune import tune

app = typer.Typer(
    name="hopper-attention",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hopper-attention {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Exact attention for NVIDIA Hopper GPUs: error study, benchmarks, tuning, diagnosis."""


app.command()(study)
app.command()(bench)
app.command()(tune)
app.command()(doctor)


def main() -> None:
    """The entry point of the `hopper-attention` command."""
    app()
