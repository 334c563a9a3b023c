"""Validation whose errors a person can act on: the field's path, the value, the place, and what is allowed instead."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from commonweight.errors import RecipeError

from .fields import allowed, choices, dotted, field_at, section_at, takes_text, walk
from .source import Loc, Place, Source, read_value

PLANNED = ("alignment", "split")
"""Sections that later versions will have. Ignoring one would train without what its author relies on."""

ELSEWHERE = {
    "learning_rate": "training.lr",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "max_length": "training.max_tokens",
    "max_seq_length": "training.max_tokens",
    "num_rounds": "federation.rounds",
    "rank": "model.adapter.r",
    "lora_r": "model.adapter.r",
    "lora_alpha": "model.adapter.alpha",
    "target_modules": "model.adapter.targets",
    "base_model": "model.name",
    "dataset": "data.path",
}
"""Names that the same fields have in other tools."""

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing wrong, in one sentence."""

    text: str
    place: Place | None


def validate(model: type[M], source: Source, prefix: Loc = ()) -> M:
    """Build `model` from plain values, strictly: no text for a number, no number for a yes or no.

    Args:
        source: the values, and where each was written.
        prefix: where the values stand in the recipe, for messages.

    Raises:
        RecipeError: names every field that is wrong.
    """
    problems = [_not_finite(loc, value, source, prefix) for loc, value in _infinities(source.values)]
    try:
        built = model.model_validate_json(json.dumps(source.values, default=str), strict=True)
    except ValidationError as error:
        problems += _explain(model, error, source, prefix)
    if problems:
        raise _as_error(problems)
    return built


def shown(value: Any) -> str:
    """A value as messages quote it: as JSON, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def _as_error(problems: Sequence[Problem]) -> RecipeError:
    ordered = sorted(problems, key=lambda p: p.place.line if p.place else 0)
    first, *rest = dict.fromkeys(problem.text for problem in ordered)
    return RecipeError(first, hint="\n".join(f"also: {text}" for text in rest))


def _explain(model: type[BaseModel], error: ValidationError, source: Source, prefix: Loc) -> Iterator[Problem]:
    """One problem a place: the members of a union that failed at the same value are one problem."""
    failed: dict[Loc, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        failed.setdefault(_trimmed(detail, source.values), detail)
    for loc, detail in failed.items():
        is_whole_of_another = any(other[: len(loc)] == loc and other != loc for other in failed)
        if detail["type"] == "value_error" or not is_whole_of_another:
            yield _problem(model, loc, detail, source, prefix)


def _trimmed(detail: ErrorDetails, values: Any) -> Loc:
    """The error's path as far as it stands in the values: without pydantic's names for the members of a union."""
    loc: Loc = ()
    for part in detail["loc"]:
        if part in (values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()):
            values = values[part]
            loc = (*loc, part)
        elif detail["type"] == "missing" and isinstance(values, dict):
            return (*loc, part)
    return loc


def _problem(model: type[BaseModel], loc: Loc, detail: ErrorDetails, source: Source, prefix: Loc) -> Problem:
    path, place = dotted((*prefix, *loc)), source.place(loc)
    at = f" {place}" if place else ""
    if detail["type"] == "extra_forbidden":
        return Problem(_unknown(model, loc, prefix, at), place)
    if detail["type"] == "missing" and loc == detail["loc"]:
        return Problem(f"`{path}` is missing{at}; {_must_be(model, loc, detail, prefix)}", place)
    if detail["type"] == "value_error":
        return _contradiction(model, loc, str(detail["ctx"]["error"]), source, path)
    value = _value_at(source.values, loc)
    if value is None and detail["type"] == "model_type":
        return Problem(f"`{path}` is empty{at}; give it fields, or remove the line", place)
    fix = f"{_must_be(model, loc, detail, prefix)}{_advice(model, loc, value)}"
    return Problem(f"`{path}` is {shown(value)}{at}; {fix}", place)


def _contradiction(model: type[BaseModel], loc: Loc, text: str, source: Source, path: str) -> Problem:
    """A rule between fields: shown at the first of the fields that the rule speaks of."""
    section = _value_at(source.values, loc)
    spoken = [key for key in section if re.search(rf"\b{re.escape(key)}\b", text)] if isinstance(section, dict) else []
    place = source.place((*loc, spoken[0]) if spoken else loc)
    head, tail = f"`{path}`: " if path else "", f" ({place})" if place else ""
    return Problem(f"{head}{text}{tail}", place)


def _must_be(model: type[BaseModel], loc: Loc, detail: ErrorDetails, prefix: Loc) -> str:
    depth = next((n for n in range(len(loc), 0, -1) if field_at(model, loc[:n])), 0)
    field = field_at(model, loc[:depth])
    words = allowed(field) if field else ""
    if not field or not words:
        return detail["msg"].replace("Input should", "it must", 1)
    needs_telling = "matching" in words or len(words.split()) == 1 or detail["type"] == "missing"
    if needs_telling and field.description:
        words += f" ({field.description.rstrip('.')})"
    subject = "it" if depth == len(loc) else f"`{dotted((*prefix, *loc[:depth]))}`"
    return f"{subject} must be {words}"


def _advice(model: type[BaseModel], loc: Loc, value: Any) -> str:
    field = field_at(model, loc) or field_at(model, loc[:-1])
    if field is None:
        return ""
    if takes_text(field) and value is not None and not isinstance(value, str | list):
        return "; put it in quotes to make it text"
    if value is None:
        return "; remove the line to take the default"
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower(), choices(field), n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return "; write it without quotes" if _is_number(value) and "number" in allowed(field) else ""


def _unknown(model: type[BaseModel], loc: Loc, prefix: Loc, at: str) -> str:
    path = dotted((*prefix, *loc))
    if path in PLANNED:
        return f"`{path}` is not available in this version of commonweight; remove it{f' ({at.strip()})' if at else ''}"
    found = _likely(model, loc, prefix)
    section = section_at(model, loc[:-1]) or model
    known = ", ".join(f"`{name}`" for name in section.model_fields)
    others = f"known here: {known}" if known else "it takes no options: remove it"
    return f"unknown key `{path}`{at}; " + (f"did you mean {found}?" if found else others)


def _likely(model: type[BaseModel], loc: Loc, prefix: Loc) -> str:
    """The field that an unknown key was probably meant to be: a near name beside it, else its name elsewhere."""
    key = str(loc[-1])
    fields = [path for path, _ in walk(model)]
    section = section_at(model, loc[:-1])
    beside = {name: (*loc[:-1], name) for name in section.model_fields} if section else {}
    near = difflib.get_close_matches(key.lower().replace("-", "_"), beside, n=1)
    same = [beside[near[0]]] if near else [path for path in fields if path[-1] == key]
    if same:
        return " or ".join(f"`{dotted((*prefix, *path))}`" for path in same[:3])
    if key not in ELSEWHERE or prefix:
        return ""
    own = beside.get(ELSEWHERE[key].rpartition(".")[2])  # a site's `rank` is its own `r`
    return f"`{dotted(own) if own else ELSEWHERE[key]}`"


def _value_at(values: Any, loc: Loc) -> Any:
    for part in loc:
        values = values[part]
    return values


def _infinities(value: Any, loc: Loc = ()) -> Iterator[tuple[Loc, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield loc, value
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for part, item in inside:
        yield from _infinities(item, (*loc, part))


def _not_finite(loc: Loc, value: float, source: Source, prefix: Loc) -> Problem:
    place = source.place(loc)
    at = f" {place}" if place else ""
    return Problem(f"`{dotted((*prefix, *loc))}` is {value}{at}; it must be a finite number", place)


def _is_number(text: str) -> bool:
    try:
        return isinstance(read_value(text, "value"), int | float)
    except RecipeError:
        return False
