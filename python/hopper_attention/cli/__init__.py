"""The command line: `hopper-attention study`, `bench`, `tune` and `doctor`.

Each command's module imports what it needs when it runs, so that `--help` does not wait for
transformers or matplotlib.
"""

from __future__ import annotations

import typer

from .bench import bench
from .doctor import doctor
from .study import study
from .tune import tune

app = typer.Typer(
    name="hopper-attention",
    help="Exact attention for NVIDIA Hopper GPUs: error study, benchmarks, tuning, diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(study)
app.command()(bench)
app.command()(tune)
app.command()(doctor)


def main() -> None:
    """The entry point of the `hopper-attention` command."""
    app()
