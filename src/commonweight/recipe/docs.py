"""The recipe's JSON Schema, for editors, and its reference page: both generated from the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from commonweight import registry

from .fields import allowed, dotted, entries_of, section_of
from .load import builtin_text
from .problems import shown
from .schema import STAGES, CohortSpec, Method, Recipe
from .source import Loc

DRAFT = "https://json-schema.org/draft/2020-12/schema"

INTRODUCTION = """\
# The recipe

<!-- Generated from src/commonweight/recipe/schema.py; edit the descriptions there. -->

A recipe says what to run: which model, on whose data, trained how, combined how, judged by what. It is one YAML file,
and only `name` is required; every other field has a default.

- A key that is not on this page is refused, and so is a value of the wrong type: `true` is no number and `"5"` is text.
- Scalars follow YAML 1.2: `1e-2` is a number; `yes`, `no` and `on` are text, so a site may be called `no`.
- `--set training.lr=5e-3` changes a field from the command line: the section's path, the field's name, and a value in
  YAML.
- A method (`federation.strategy`, `training.objective`, `compression.round` …) is a name, `fedadam`, or a mapping with
  the method's own options, `{{name: fedadam, lr: 1e-2}}`. `commonweight methods` lists the methods and their options. A
  class of your own goes by its dotted name, `package.module:Class`.
- `commonweight init` writes a starter recipe with this page's JSON Schema beside it, so that an editor completes and
  checks fields while you type.

`commonweight run demo` runs this one:

```yaml
{demo}
```
"""


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema (2020-12): whatever loads also validates.

    Rules between fields ("`epochs` or `steps`, not both") are not in it; they are checked when the recipe is loaded.
    """
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for field in section["properties"].values():
            field.pop("title", None)
    sections = schema["$defs"]
    _allow(sections["FederationSpec"], "strategy", _method_forms("strategy"), sections)
    _allow(sections["TrainingSpec"], "objective", _method_forms("objective"), sections)
    for section in ("CompressionSpec", "DownSpec"):
        for stage, kind in STAGES.items():
            _allow(sections[section], stage, _method_forms(kind), sections)
    _allow(sections["CompressionSpec"], "down", [{"enum": ["none", "auto"]}], sections)
    _allow(schema, "compression", [{"enum": ["none", "auto"]}], sections)
    _allow(sections["FederationSpec"], "cohort", _cohort_forms(sections), sections)
    return {"$schema": DRAFT, **schema, "title": "commonweight recipe"}


def reference_markdown() -> str:
    """The recipe reference: a section a spec, a table row a field."""
    demo = builtin_text("demo").partition("\n")[2].strip()
    parts = [INTRODUCTION.format(demo=demo), *(_section(loc, section) for loc, section in _sections(Recipe, ()))]
    return "\n".join(parts)


def _allow(section: dict[str, Any], name: str, short: list[dict[str, Any]], sections: dict[str, Any]) -> None:
    """Let a field of the JSON Schema take its short forms beside its mapping."""
    field = section["properties"][name]
    long = {"$ref": field.pop("$ref")}
    section["properties"][name] = {"anyOf": [*short, long], **field}
    sections[long["$ref"].rpartition("/")[2]].pop("title", None)


def _method_forms(kind: str) -> list[dict[str, Any]]:
    return [{"type": "string", "minLength": 1, "examples": registry.names(kind)}]


def _cohort_forms(sections: dict[str, Any]) -> list[dict[str, Any]]:
    limits = sections["CohortSpec"]["properties"]
    return [{"const": "all"}, limits["count"]["anyOf"][0], limits["fraction"]["anyOf"][0]]


def _sections(model: type[BaseModel], loc: Loc) -> Iterator[tuple[Loc, type[BaseModel]]]:
    yield loc, model
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section and section not in (Method, CohortSpec):
            yield from _sections(section, (*loc, name))
        entry = entries_of(field)
        if entry:
            yield from _sections(entry, (*loc, name))


def _section(loc: Loc, model: type[BaseModel]) -> str:
    heading = f"## `{dotted(loc)}`" if loc else "## The top level"
    text = "\n".join(line.strip() for line in (model.__doc__ or "").strip().splitlines())
    rows = [_row(loc, name, field, model) for name, field in model.model_fields.items()]
    table = ["| field | takes | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([heading, "", text, "", *table, ""])


def _row(loc: Loc, name: str, field: FieldInfo, model: type[BaseModel]) -> str:
    cells = (f"`{name}`", _takes(loc, name, field), _default(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _takes(loc: Loc, name: str, field: FieldInfo) -> str:
    section = section_of(field)
    if section and section not in (Method, CohortSpec):
        path = dotted((*loc, name))
        return f"[a section](#{path.replace('.', '')})"
    if entries_of(field):
        path = dotted((*loc, name))
        return f"a mapping of names, each to [a section](#{path.replace('.', '')})"
    return allowed(field)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Method):
        return f"`{value.name}`"
    if isinstance(value, CohortSpec):
        return "`all`"
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_unset=True)
        return f"`{_flow(given)}`" if given else ""
    return "none" if value is None else f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """A value as one writes it in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return value if isinstance(value, str) else shown(value)
