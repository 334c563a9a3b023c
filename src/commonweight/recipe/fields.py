"""What a field of the schema allows, in words: the one wording of error messages and of the recipe reference."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from .schema import CohortSpec, CompressionSpec, DownSpec, Method
from .source import Loc

SHORT_FORMS: dict[type[BaseModel], str] = {
    CompressionSpec: "`none`, `auto`, or a section: a mapping of its own fields",
    DownSpec: "`none`, `auto`, or a section: a mapping of its own fields",
    Method: "a method's name, or `{name: …}` with its options",
    CohortSpec: "`all`, a whole number of sites, a fraction (0.5), `{count: …}` or `{fraction: …}`",
}

_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers"}
_BOUNDS = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "of at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "of at most"),
)


def dotted(loc: Loc) -> str:
    """`("evaluation", "controls", 1)` as a person writes it: `evaluation.controls[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a section of the recipe (or a method, or a cohort), else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def entries_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that each name of a field holds, where the field is a mapping of names to sections, else None."""
    args = get_args(field.annotation)
    entry = args[1] if get_origin(field.annotation) is dict else None
    return entry if isinstance(entry, type) and issubclass(entry, BaseModel) else None


def long_form(field: FieldInfo, value: Any) -> Any:
    """`value` with its short form written out: `fedavg` becomes `{name: fedavg}`."""
    for item in field.metadata:
        if isinstance(item, BeforeValidator):
            value = item.func(value)  # type: ignore[call-arg]
    return value


def field_at(model: type[BaseModel], loc: Loc) -> FieldInfo | None:
    """The field at `loc` below `model`; None where the schema has none (an unknown key, a list item, an option)."""
    section = section_at(model, loc[:-1])
    return section.model_fields.get(str(loc[-1])) if section and loc else None


def section_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The section at `loc` below `model`, an entry of a mapping of sections too; None where there is none."""
    section: type[BaseModel] | None = model
    entry: type[BaseModel] | None = None
    for part in loc:
        field = section.model_fields.get(str(part)) if section else None
        section, entry = entry or (section_of(field) if field else None), entries_of(field) if field else None
    return section


def walk(model: type[BaseModel], prefix: Loc = ()) -> Iterator[tuple[Loc, FieldInfo]]:
    """Every field below `model`, in the schema's order, each section before its own fields."""
    for name, field in model.model_fields.items():
        loc = (*prefix, name)
        yield loc, field
        section = section_of(field)
        if section and section is not Method:
            yield from walk(section, loc)


def choices(field: FieldInfo) -> list[str]:
    """The words that a field knows, wherever they stand in its type."""
    return [word for word in _literals(field.annotation) if isinstance(word, str)]


def takes_text(field: FieldInfo) -> bool:
    """Whether free text is among what the field, or an item of its list or mapping, may be."""
    return str in _leaves(field.annotation)


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number of at least 1, or null`; empty for types that have none."""
    section = section_of(field)
    if section:
        return SHORT_FORMS.get(section, "a section: a mapping of its own fields")
    return _words(field.annotation, _limits(field.metadata))


def _words(kind: Any, limits: str) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        parts = [_words(arg, limits if arg in (int, float, str) else "") for arg in args]
        return "" if "" in parts else _either(parts)
    if origin is Literal:
        return _either([f"`{_yaml(arg)}`" for arg in args])
    if origin is list:
        inner = args[0]
        return f"a list of {_PLURAL.get(inner) or _words(inner, '')}"
    if origin is dict:
        return f"a mapping of names, each to {_words(args[1], '')}"
    if origin is Annotated:
        return _words(args[0], _limits([item for extra in args[1:] for item in extra.metadata]))
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)} {_PLURAL.get(args[0], 'values')}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section of its own fields"
    return f"{_PLAIN[kind]}{limits}" if kind in _PLAIN else ""


def _either(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    seam = ", or " if any(" " in part for part in parts) else " or "
    return ", ".join(parts[:-1]) + seam + parts[-1]


def _limits(metadata: list[Any]) -> str:
    bounds = [
        f"{word} {_bound(getattr(item, name))}"
        for kind, name, word in _BOUNDS
        for item in metadata
        if isinstance(item, kind)
    ]
    patterns = [item.pattern for item in metadata if getattr(item, "pattern", None)]
    shortest = [item.min_length for item in metadata if isinstance(item, annotated_types.MinLen)]
    limits = f" {' and '.join(bounds)}" if bounds else ""
    limits += f" matching `{patterns[0]}`" if patterns else ""
    return limits + (", not empty" if any(shortest) else "")


def _bound(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 53:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _yaml(word: Any) -> str:
    return str(word).lower() if isinstance(word, bool) or word is None else str(word)


def _literals(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for arg in get_args(kind) for word in _literals(arg)]


def _leaves(kind: Any) -> set[Any]:
    args = get_args(kind)
    if get_origin(kind) is Literal or not args:
        return {kind}
    if get_origin(kind) is Annotated:
        args = args[:1]
    if get_origin(kind) is dict:
        args = args[1:]
    return {leaf for arg in args for leaf in _leaves(arg)}
