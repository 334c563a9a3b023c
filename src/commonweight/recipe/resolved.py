"""A recipe written out in full, compared, and reduced to a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import yaml

from .schema import STAGES, Recipe
from .source import add_core_scalars

WITHOUT_EFFECT = (("name",), ("engine", "workers"), ("output",))
"""Fields that neither the adapter nor any figure depends on: a run may resume with others."""

HEADER = "# Every field of the run, what its recipe left out filled in.\n"


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out, in the schema's order; it loads to an equal recipe."""
    values = _values(recipe)
    cohort = {key: value for key, value in values["federation"]["cohort"].items() if value is not None}
    values["federation"]["cohort"] = cohort or "all"
    body = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return HEADER + body


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256, in hex, over what decides a run's result: all but `WITHOUT_EFFECT`.

    Equal recipes have equal digests however they were written: `16` and `16.0` are one number. Options that a method
    would fill in by itself count as different from none, since only the method's own class knows its defaults.
    """
    effects = sorted([list(path), _one_number(value)] for path, value in _effects(recipe))
    return hashlib.sha256(json.dumps(effects).encode()).hexdigest()


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """What separates two recipes, as lines like `training.lr: 0.01 -> 0.02`; empty when their digests are equal."""
    before, after = dict(_effects(old)), dict(_effects(new))
    return [
        f"{'.'.join(path)}: {_side(before, path)} -> {_side(after, path)}"
        for path in dict.fromkeys([*before, *after])
        if (path in before) != (path in after) or _canonical(before[path]) != _canonical(after[path])
    ]


def _side(effects: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> str:
    return json.dumps(effects[path], ensure_ascii=False) if path in effects else "not given"


def _values(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    codecs = (values["compression"], values["compression"]["down"])
    stages = ((codec, stage) for codec in codecs for stage in STAGES)
    for section, key in ((values["federation"], "strategy"), (values["training"], "objective"), *stages):
        method = section[key]
        section[key] = {"name": method.pop("name"), **_sorted(method)}
    return values


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _effects(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, value in _leaves(_values(recipe), ()):
        if not any(path[: len(left_out)] == left_out for left_out in WITHOUT_EFFECT):
            yield path, value


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _canonical(value: Any) -> str:
    return json.dumps(_one_number(value), sort_keys=True)


def _one_number(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _one_number(item) for key, item in value.items()}
    return [_one_number(item) for item in value] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as text; keeps a text with line breaks on one line.

    Line breaks go in double quotes because PyYAML loses U+0085 and its like in single ones.
    """


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    has_breaks = len(value.splitlines()) > 1 or value != value.strip()
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if has_breaks else None)


add_core_scalars(_Dumper)
_Dumper.add_representer(str, _text)
