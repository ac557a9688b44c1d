"""Runs the study: each source through every contestant, measured against float64."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

import hopper_attention
from hopper_attention._extras import STUDY, require

from .context import study_context
from .distributions import DISTRIBUTIONS, random_inputs
from .errors import StudyError
from .evaluate import evaluate, max_scores
from .formats import Contestant, contestants
from .records import ContextRow, Row, Source, Study, describe_shape, head_rows, make_row
from .settings import CONTEXT, MODEL, Progress, Settings, Silent, choose_device
from .speed import measure_speed


def run_study(settings: Settings, progress: Progress | None = None) -> Study:
    """Measures every contestant on every source.

    Args:
        settings: what to study.
        progress: who is told how far it is.

    Returns:
        The rows and all that is needed to read them.

    Raises:
        StudyError: for settings that cannot be studied; the message says what to change.
        ModuleNotFoundError: a package of the extra "study" is not installed.
    """
    require(STUDY, "transformers")
    progress = progress or Silent()
    started = time.perf_counter()
    device = choose_device(settings.device)
    settings = settings.checked().with_shape(device)
    try:
        chosen = contestants(settings.formats)
    except ValueError as error:
        raise StudyError(f"--{error}") from error
    sources: list[Source] = []
    rows: list[Row] = []
    context: list[ContextRow] = []
    with torch.inference_mode():
        for name in dict.fromkeys(settings.sources):
            if name == CONTEXT:
                context = study_context(settings, chosen, device, progress)
                continue
            if name == MODEL:
                # Here, since transformers takes seconds to import and the others do without.
                from .activations import study_model

                source, new_rows = study_model(settings, chosen, device, progress)
            else:
                source, new_rows = _study_distribution(name, settings, chosen, device, progress)
            sources.append(source)
            rows.extend(new_rows)
        speed = measure_speed(settings, device, progress)
    return Study(
        settings={**asdict(settings), "text": str(settings.text) if settings.text else None},
        environment=_environment(device),
        sources=sources,
        rows=rows,
        seconds=time.perf_counter() - started,
        context=context,
        speed=speed,
    )


def _study_distribution(
    name: str,
    settings: Settings,
    chosen: Sequence[Contestant],
    device: torch.device,
    progress: Progress,
) -> tuple[Source, list[Row]]:
    title = DISTRIBUTIONS[name]
    progress.start(title)
    inputs = random_inputs(name, **settings.shape_on(device), seed=settings.seed)
    progress.expect(inputs.num_pieces(max_scores(device)))
    results = evaluate(inputs, chosen, device, progress.advance)
    progress.finish()
    rows = [make_row(c, m, source=name, level="all") for c, m in results.items()]
    rows += head_rows(results, name, None, None)
    return Source(name, title, describe_shape(inputs)), rows


def _environment(device: torch.device) -> dict[str, Any]:
    """The versions and the device, for the record."""
    on_card = device.type == "cuda"
    return {
        "hopper_attention": hopper_attention.__version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_card else f"CPU ({platform.machine()})",
        "date": time.strftime("%Y-%m-%d"),
    }
