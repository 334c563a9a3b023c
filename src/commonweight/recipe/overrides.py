"""`--set key.sub=value`: fields changed from the command line, by the same rules as the file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from commonweight.errors import RecipeError

from .fields import dotted, field_at, long_form
from .source import Loc, Place, Source, read_value

EXAMPLE = "write --set training.lr=0.01"


def apply_overrides(source: Source, overrides: Sequence[str], model: type[BaseModel]) -> Source:
    """The source with each override put in its place, in order; what they say is checked with the rest, later.

    An override below a short form (`federation.strategy.lr=0.01` where `strategy: fedadam`) writes the form out first;
    below a section that the file leaves out, it starts from that section's default.

    Raises:
        RecipeError: an override is not `key=value`, its value is not YAML, or a later one would discard it.
    """
    values, places = copy.deepcopy(source.values), dict(source.places)
    earlier: dict[Loc, str] = {}
    for text in overrides:
        loc, value = _parsed(text)
        _refuse_discarding(loc, text, earlier)
        rewritten = _put(values, loc, value, model)
        places = {known: place for known, place in places.items() if known[: len(loc)] != loc}
        places |= dict.fromkeys(rewritten, Place(f"in --set {_short(text)}"))
        earlier[loc] = text
    return Source(values, places)


def _parsed(text: str) -> tuple[Loc, Any]:
    key, equals, value = text.partition("=")
    loc: Loc = tuple(part.strip() for part in key.split("."))
    if not equals:
        raise RecipeError(f"--set {_short(text)} has no `=`", hint=EXAMPLE)
    if not all(loc):
        raise RecipeError(f"--set {_short(text)} names no field", hint=EXAMPLE)
    if not value.strip():
        hint = f"write {dotted(loc)}=null for none, or {dotted(loc)}='\"\"' for empty text"
        raise RecipeError(f"--set {_short(text)} has no value", hint=hint)
    return loc, read_value(value, f"--set {_short(text)}")


def _refuse_discarding(loc: Loc, text: str, earlier: dict[Loc, str]) -> None:
    for other, other_text in earlier.items():
        if other[: len(loc)] == loc and other != loc:
            raise RecipeError(
                f"--set {_short(text)} would discard the earlier --set {_short(other_text)}",
                hint="put the wider one first",
            )


def _put(values: dict[str, Any], loc: Loc, value: Any, model: type[BaseModel]) -> list[Loc]:
    """Put a value in place; answers what the override wrote: its field, and the sections made on the way."""
    section, rewritten = values, [loc]
    for depth in range(1, len(loc)):
        key = str(loc[depth - 1])
        if not isinstance(section.get(key), dict):
            section[key] = _as_mapping(section, key, loc[:depth], model)
            rewritten.append(loc[:depth])
        section = section[key]
    section[str(loc[-1])] = value
    return rewritten


def _as_mapping(section: dict[str, Any], key: str, loc: Loc, model: type[BaseModel]) -> dict[str, Any]:
    field = field_at(model, loc)
    if section.get(key) is not None:
        value = long_form(field, section[key]) if field else section[key]
    else:
        default = field.get_default(call_default_factory=True) if field else None
        value = default.model_dump(exclude_unset=True) if isinstance(default, BaseModel) else None
    return value if isinstance(value, dict) else {}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
