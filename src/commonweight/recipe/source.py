"""YAML text in, plain values out, with the place in the file of every one.

YAML 1.2's core rules decide what a scalar is, as in editors: `1e-2` is a number, and `no`, `on` and `1:30` are text (a
site may be called `no`). Aliases are refused: a recipe has nowhere to keep what they would repeat, and they can make a
small file expand without bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from commonweight.errors import RecipeError

Loc = tuple[str | int, ...]

MAX_DEPTH = 16

CORE_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)

_ADVICE = (
    ("\\t", "indent with spaces, not tabs"),
    ("alias", "write the value out where it is used"),
    ("mapping values are not allowed", 'text with ": " in it needs quotes; or the indentation of this line is off'),
    ("single document", "a recipe is one document: remove the `---` between parts"),
    ("while scanning a quoted", "a quote is not closed"),
    ("while parsing a flow", "a { or [ is not closed, or text in it needs quotes"),
    ("expected <block end>", "fields of one section start in the same column"),
    ("", 'text that starts with one of { [ * & ! % @ ` or holds ": " needs quotes'),
)


@dataclass(frozen=True)
class Place:
    """Where a value was written, as a message says it: `at recipe.yaml:12`, `in --set seed=1`."""

    text: str
    line: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Source:
    """Plain values, and where each was written."""

    values: dict[str, Any]
    places: Mapping[Loc, Place] = field(default_factory=dict)

    def place(self, loc: Loc) -> Place | None:
        """The place of `loc`, or of the nearest section around it; None when nothing was read from anywhere."""
        return next((self.places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.places), None)


def read_source(text: str, label: str) -> Source:
    """Read a recipe's text; `label` is what messages call the file.

    Raises:
        RecipeError: not YAML, not a mapping, empty, a key given twice, a tag or an alias.
    """
    reader = _Reader(label)
    values = reader.parse(text)
    if values is None:
        raise RecipeError(f"{label} is empty", hint="`commonweight init` writes a recipe to start from")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise RecipeError(f"{label} holds {kind}, not a mapping", hint="a recipe is lines of `field: value`")
    return Source(values, {**reader.places, (): Place(f"in {label}")})


def read_value(text: str, label: str) -> Any:
    """Read one value by the same rules: what stands right of `=` in an override."""
    return _Reader(label, has_lines=False).parse(text)


def add_core_scalars(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Teach a loader or a dumper what a scalar is."""
    for tag, pattern, first in CORE_SCALARS:
        kind.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), first)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"the alias *{event.anchor} is refused", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
add_core_scalars(_Loader)


class _Reader:
    """Turns nodes into values; remembers the line of each."""

    def __init__(self, label: str, *, has_lines: bool = True) -> None:
        self.label = label
        self.has_lines = has_lines
        self.places: dict[Loc, Place] = {}

    def parse(self, text: str) -> Any:
        try:
            node = yaml.compose(text, Loader=_Loader)
            return None if node is None else self._value(node, ())
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            what = f"the character {text[error.position]!r} is not allowed"
            raise RecipeError(f"{self.label} is not YAML: {what}, {self._at(line)}", hint="remove it") from None
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        except RecursionError:
            raise RecipeError(f"{self.label} is nested too deeply to be a recipe") from None

    def _at(self, line: int) -> Place:
        return Place(f"at {self.label}:{line}" if self.has_lines else f"in {self.label}", line)

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> RecipeError:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "it cannot be read"
        what = f"{error.context} {what}" if what.startswith("but") else what
        where = f", {self._at(mark.line + 1)}, column {mark.column + 1}" if mark and self.has_lines else ""
        hint = next(advice for sign, advice in _ADVICE if sign in f"{error.context} {what}")
        return RecipeError(f"{self.label} is not YAML: {what}{where}", hint=hint)

    def _value(self, node: yaml.Node, loc: Loc) -> Any:
        if len(loc) > MAX_DEPTH:
            raise self._refusal(node, "the recipe is nested too deeply", f"{MAX_DEPTH} levels are the most")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._item(item, (*loc, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._bad_tag(node)

    def _item(self, node: yaml.Node, loc: Loc) -> Any:
        self.places[loc] = self._at(node.start_mark.line + 1)
        return self._value(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            path = (*loc, key)
            if key in values:
                first = f": first {self.places[path]}, again" if self.has_lines else ""
                raise self._refusal(key_node, f"`{key}` is given twice{first}", "remove one of them")
            self.places[path] = self._at(key_node.start_mark.line + 1)
            values[key] = self._value(value_node, path)
        return values

    def _key(self, node: yaml.Node) -> str:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            shown = f"the key `{node.value}`" if isinstance(node, yaml.ScalarNode) else "a key"
            raise self._refusal(node, f"{shown} is not text", "put it in quotes")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _SCALARS:
            raise self._bad_tag(node)
        try:
            return _SCALARS[kind](node.value)
        except ValueError:
            shown = node.value if len(node.value) <= 40 else node.value[:40] + "…"
            raise self._refusal(node, f"{shown!r} cannot be read as {_KINDS[kind]}", "correct it") from None

    def _bad_tag(self, node: yaml.Node) -> RecipeError:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        return self._refusal(node, f"the tag {tag} is not allowed", "remove it")

    def _refusal(self, node: yaml.Node, what: str, hint: str) -> RecipeError:
        return RecipeError(f"{what} {self._at(node.start_mark.line + 1)}", hint=hint)


def _text(value: str) -> str:
    """JSON, which is YAML too, may write one character as a pair of escapes; half a pair is no character."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16")


def _bool(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(value)
    return value.lower() == "true"


def _int(value: str) -> int:
    return int(value, 0) if value[:2] in ("0o", "0x") else int(value)


def _float(value: str) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", value.lower()))


_KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "null": "null"}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": _text,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "null": lambda _: None,
}
