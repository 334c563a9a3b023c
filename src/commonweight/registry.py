"""One door for every method: built in, installed by a package, or named by its dotted path.

A recipe names a method (`fedavg`), and a class answers to it. Names come from entry points in the groups
`commonweight.strategies`, `commonweight.objectives` and those of a codec's stages; a dotted name `package.module:Class`
needs no registration. Built-in methods are registered in this project's own `pyproject.toml` and use the same door.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError

GROUPS = {
    "strategy": "commonweight.strategies",
    "objective": "commonweight.objectives",
    "shortening": "commonweight.shortenings",
    "rounding": "commonweight.roundings",
    "packing": "commonweight.packings",
}
#: in a list of methods that may run somewhere: all that are commonweight's own
BUILT_IN = "built-in"


def names(kind: str) -> list[str]:
    """The registered names of a kind (`strategy`, `objective`, …), sorted."""
    return sorted({point.name for point in entry_points(group=GROUPS[kind])})


@lru_cache
def built_in(kind: str) -> frozenset[str]:
    """Names of the methods of a kind that are commonweight's own, and nobody else's as well."""
    points = list(entry_points(group=GROUPS[kind]))
    foreign = {point.name for point in points if not point.module.startswith("commonweight.")}
    return frozenset(point.name for point in points) - foreign


def is_listed(kind: str, name: str, listed: Collection[str]) -> bool:
    """Whether a list of methods, which may hold `built-in`, holds this one. Nothing is imported for the answer."""
    return name in listed or (BUILT_IN in listed and name in built_in(kind))


def resolve(kind: str, name: str) -> type[Any]:
    """The class that a recipe's method name stands for.

    Raises:
        RecipeError: no such name, or its module or class cannot be imported.
    """
    if ":" in name:
        return _import(kind, name)
    for point in entry_points(group=GROUPS[kind]):
        if point.name == name:
            return _import(kind, point.value)
    known = names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    raise RecipeError(
        f"no {kind} is called {name!r}",
        hint=(f"did you mean {near[0]!r}? " if near else "")
        + f"Known: {', '.join(known)}; or name a class of your own as package.module:Class",
    )


def _import(kind: str, path: str) -> type[Any]:
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the {kind} {path!r} cannot be imported: {error}",
            hint="install the package that holds it, or correct the name (package.module:Class)",
        ) from error
    if not isinstance(found, type):
        raise RecipeError(f"the {kind} {path!r} is not a class", hint="name a class as package.module:Class")
    return found
