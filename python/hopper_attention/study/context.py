"""The error of attention as the context grows: uniform attention, whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .formats import Contestant
from .inputs import AttentionInputs
from .recipes import RECIPES
from .records import ContextRow
from .settings import MIN_KEYS, Progress, Settings

# Every query is 0, so that all rows are one: a few show that, and cost little.
_QUERIES = 4
_HEAD_DIM = 64
NOISE = 0.25  # standard deviation
TITLE = "uniform attention over V = 1 + N(0, 1/16)"


def uniform_inputs(keys: int, seed: int) -> AttentionInputs:
    """Q = 0, so that every key counts the same, and V = 1 + N(0, 1/16): outputs are near 1.

    Args:
        keys: number of keys.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, keys, 1, _HEAD_DIM)
    query = torch.zeros(1, _QUERIES, 1, _HEAD_DIM)
    key = torch.randn(shape, generator=generator)
    value = torch.randn(shape, generator=generator).mul_(NOISE).add_(1.0)
    return AttentionInputs(query, key, value, softmax_scale=_HEAD_DIM**-0.5)


def study_context(
    settings: Settings, chosen: Sequence[Contestant], device: torch.device, progress: Progress
) -> list[ContextRow]:
    """Measures ours at every power of 2 of keys from 4,096 to `settings.max_keys`.

    Of the FP8 recipes, only the accumulation matters here: the first of each kind stands for all.
    """
    lengths = [MIN_KEYS]
    while 2 * lengths[-1] <= settings.max_keys:
        lengths.append(2 * lengths[-1])
    ours = _distinct(chosen)
    progress.start(TITLE)
    progress.expect(len(lengths) * len(ours))
    rows = []
    for keys in lengths:
        inputs = uniform_inputs(keys, settings.seed)
        for contestant in ours:
            rounded = inputs.to(contestant.input_dtype)
            exact = rounded.value.double().mean(1, keepdim=True)
            out, by = contestant.run(rounded.to(device))
            error = out.double().cpu() / exact - 1
            bias, rms = error.mean().item(), error.square().mean().sqrt().item()
            rows.append(ContextRow(contestant.format, by, _HEAD_DIM, keys, bias, rms))
            progress.advance()
    progress.finish()
    return rows


def _distinct(chosen: Sequence[Contestant]) -> list[Contestant]:
    kinds: dict[str, Contestant] = {}
    for contestant in chosen:
        if contestant.method == "ours":
            named = RECIPES.get(contestant.format)
            kinds.setdefault(named.recipe.accumulation if named else contestant.format, contestant)
    return list(kinds.values())
