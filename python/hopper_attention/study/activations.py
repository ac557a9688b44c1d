"""The study of a model's own activations: every layer and head, on a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .capture import LayerActivations, recording
from .errors import StudyError
from .evaluate import Results, add_results, evaluate, merge
from .formats import Contestant
from .inputs import AttentionInputs
from .models import LoadedModel, load, read_text, sequences
from .records import Row, Source, describe_shape, head_rows, make_row
from .settings import MODEL, Progress, Settings, max_context


class _Layers:
    """Adds up what is measured layer by layer while the model runs."""

    def __init__(
        self,
        only: tuple[int, ...] | None,
        chosen: Sequence[Contestant],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.names: dict[int, str] = {}
        self.results: dict[int, Results] = {}
        self.first: AttentionInputs | None = None
        self._only = only
        self._chosen = chosen
        self._device = device
        self._progress = progress

    def listen(self, activations: LayerActivations) -> None:
        place = activations.index
        self.names[place] = activations.name
        if self._only is not None and place not in self._only:
            return
        for problem in activations.problems:
            self.first = self.first or problem
            results = evaluate(problem, self._chosen, self._device)
            known = self.results.get(place)
            self.results[place] = results if known is None else add_results(known, results)
        self._progress.advance()

    def rows(self) -> list[Row]:
        together = merge(self.results.values())
        rows = [make_row(c, m, source=MODEL, level="all") for c, m in together.items()]
        places = sorted(self.results)
        for place in places:
            rows += [
                make_row(
                    c, m, source=MODEL, level="layer", layer=place, layer_name=self.names[place]
                )
                for c, m in self.results[place].items()
            ]
        for place in places:
            rows += head_rows(self.results[place], MODEL, place, self.names[place])
        return rows


def study_model(
    settings: Settings, chosen: Sequence[Contestant], device: torch.device, progress: Progress
) -> tuple[Source, list[Row]]:
    """Runs the model on the text and measures the contestants on what its layers were given.

    Args:
        settings: the model, the text, how much of it, and which layers.
        chosen: the contestants.
        device: where the model and the contestants run.
        progress: told of every layer of every sequence.

    Raises:
        StudyError: where the model cannot be loaded or recorded, or lacks a layer asked for.
    """
    text_name, text = read_text(settings.text)
    title = f"{_short_name(settings.model)} on {text_name}"
    progress.start(title)
    loaded = load(settings.model, device)
    context = settings.context or min(loaded.context, max_context(device))
    batches = sequences(loaded, text, context=context, max_tokens=settings.max_tokens)
    num_layers = len(settings.layers) if settings.layers else _num_layers(loaded)
    if num_layers:
        progress.expect(num_layers * len(batches))

    layers = _Layers(settings.layers, chosen, device, progress)
    with recording(loaded.model, layers.listen):
        for tokens in batches:
            loaded.model(input_ids=tokens[None].to(device))
            _check_layers(settings, loaded.name, layers.names)
    progress.finish()
    assert layers.first is not None
    source = Source(
        MODEL,
        title,
        {**describe_shape(layers.first), "batch": len(batches)},
        layers=len(layers.results),
        tokens=sum(len(tokens) for tokens in batches),
    )
    return source, layers.rows()


def _short_name(model: str) -> str:
    """A folder's last part, or a model's name as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _num_layers(loaded: LoadedModel) -> int | None:
    """How many layers the configuration promises; for the progress bar alone."""
    layers: Any = getattr(loaded.model.config, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None


def _check_layers(settings: Settings, model: str, names: dict[int, str]) -> None:
    if not names:
        raise StudyError(
            f"--model is {model}, whose layers call neither transformers' attention interface nor "
            "PyTorch's scaled_dot_product_attention: its activations cannot be recorded"
        )
    missing = [layer for layer in settings.layers or () if layer not in names]
    if missing:
        raise StudyError(f"--layers has {missing[0]}; {model} has the layers 0 to {max(names)}")
