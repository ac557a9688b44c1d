"""Which configs are tried: the neighbourhood of the chosen one, or what the user asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hopper_attention.tune.rules import Config, Cost, Instance, Rules, Value, label, show

_TILE_FIELDS = ("tile_n", "stages", "num_consumers")
_WIDEST = 2  # tiles that are tried of each number of stages and consumers
_NARROWEST = 48  # keys of a tile that is tried unasked: narrower ones wait for shared memory


@dataclass(frozen=True)
class Candidates:
    """What is tried of an instance.

    Attributes:
        costs: The candidates with what they cost, the chosen one first.
        left_out: Configs that were asked for and cannot be built, with the reason.
    """

    costs: list[Cost]
    left_out: list[Cost]


def parse_choices(
    rules: Rules, instance: Instance, choices: Sequence[str]
) -> dict[str, list[Value]]:
    """Reads ``field=value,value,...``; the value ``all`` stands for every one.

    Raises:
        ValueError: A field or a value is unknown.
    """
    found: dict[str, list[Value]] = {}
    for choice in choices:
        field, _, text = choice.partition("=")
        if field not in instance.chosen:
            names = ", ".join(instance.chosen)
            raise ValueError(f"{choice!r} must be FIELD=VALUE,... with a field of {names}")
        allowed = {show(value): value for value in rules.values(field, instance.chosen[field])}
        wanted = list(allowed) if text == "all" else text.split(",")
        unknown = [value for value in wanted if value not in allowed]
        if unknown:
            raise ValueError(
                f"{choice!r}: {unknown[0]!r} is none of {', '.join(allowed)} (or all of them: all)"
            )
        found[field] = [allowed[value] for value in dict.fromkeys(wanted)]
    return found


def choose(
    rules: Rules,
    instance: Instance,
    choices: Mapping[str, Sequence[Value]] | None = None,
) -> Candidates:
    """Picks the configs to try.

    Args:
        rules: What knows which configs can be built.
        instance: The kernel.
        choices: Values of some fields: every combination is tried, the other fields as chosen.
            None or empty tries the neighbourhood of the chosen config: the widest tiles of each
            number of stages and consumers, narrower and wider ones of the chosen, and each other
            field changed alone.

    Returns:
        The candidates; the chosen config is always the first.
    """
    if not choices:
        costs = rules.costs(instance, _neighbourhood(rules, instance))
        return Candidates([cost for cost in costs if cost.error is None], [])
    combinations = itertools.product(*choices.values())
    asked = [instance.chosen | dict(zip(choices, values, strict=True)) for values in combinations]
    costs = rules.costs(instance, _distinct([instance.chosen, *asked]))
    return Candidates(
        [cost for cost in costs if cost.error is None],
        [cost for cost in costs if cost.error is not None],
    )


def _neighbourhood(rules: Rules, instance: Instance) -> list[Config]:
    chosen = instance.chosen
    values = {field: rules.values(field, value) for field, value in chosen.items()}
    # More than one further stage buys nothing that a wider tile would not.
    values["stages"] = [n for n in values["stages"] if int(n) <= int(chosen["stages"]) + 1]
    found = [chosen]
    tiles = [field for field in _TILE_FIELDS if field in chosen]
    grid = [
        chosen | dict(zip(tiles, combination, strict=True))
        for combination in itertools.product(*(values[field] for field in tiles))
    ]
    groups: dict[tuple[Value, ...], list[Config]] = {}
    for cost in rules.costs(instance, grid):
        if cost.error is None:
            shape = tuple(value for field, value in cost.config.items() if field != "tile_n")
            groups.setdefault(shape, []).append(cost.config)
    here = tuple(value for field, value in chosen.items() if field != "tile_n")
    found += _nearest(groups.get(here, []), _keys(chosen))
    for group in groups.values():
        widest = sorted(group, key=_keys)[-_WIDEST:]
        found += [config for config in widest if _keys(config) >= _NARROWEST]
    for field in chosen:
        if field not in tiles:
            found += [chosen | {field: value} for value in values[field]]
    return _distinct(found)


def _keys(config: Config) -> int:
    return int(config["tile_n"])


def _nearest(group: Iterable[Config], tile_n: int) -> list[Config]:
    """The two narrower and the two wider tiles next to the chosen one."""
    ordered = sorted(group, key=_keys)
    narrower = [config for config in ordered if _keys(config) < tile_n]
    wider = [config for config in ordered if _keys(config) > tile_n]
    return narrower[-2:] + wider[:2]


def _distinct(configs: Iterable[Config]) -> list[Config]:
    return list({label(config): config for config in configs}.values())
