"""Writes the pages and the parts of pages in docs/ that are generated from code; `--check` only says whether they are
current.

A part of a page stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from commonweight.coordinator.metrics import Metrics
from commonweight.coordinator.settings import CoordinatorSettings
from commonweight.identity.roles import COORDINATOR, MEANING
from commonweight.recipe.docs import reference_markdown
from commonweight.recipe.fields import allowed, section_of
from commonweight.recipe.methods import methods_markdown
from commonweight.site.policy import Policy
from commonweight.site.settings import SiteSettings, starter_policy, starter_settings

DOCS = Path(__file__).parent.parent / "docs"
GUIDES = ("coordinator.md", "site.md")

_PART = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end -->", re.S)


def pages() -> dict[Path, str]:
    """The generated pages, by path."""
    whole = {DOCS / "recipe.md": reference_markdown(), DOCS / "methods.md": methods_markdown()}
    return whole | {DOCS / name: with_parts((DOCS / name).read_text(encoding="utf-8")) for name in GUIDES}


def with_parts(text: str) -> str:
    """A page with its generated parts as they are now."""
    return _PART.sub(lambda m: f"<!-- generated: {m[1]} -->\n\n{PARTS[m[1]]().strip()}\n\n<!-- end -->", text)


def table(*columns: str, rows: Iterator[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def coordinator_settings() -> str:
    return table("key", "default", "meaning", rows=_plain_fields())


def _plain_fields() -> Iterator[tuple[str, ...]]:
    for name, field in CoordinatorSettings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        yield f"`{name}`", f"`{yaml.safe_dump(value).split(chr(10))[0]}`", field.description or ""


def site_settings() -> str:
    return table("key", "takes", "default", "meaning", rows=_fields(SiteSettings, with_default=True))


def policy_fields() -> str:
    return table("field", "takes", "meaning", rows=_fields(Policy, with_default=False))


def _fields(model: type[BaseModel], prefix: str = "", *, with_default: bool) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.", with_default=with_default)
            continue
        default = "**required**" if field.is_required() else f"`{_flow(field.get_default(call_default_factory=True))}`"
        takes = allowed(field) or "a mapping"
        yield f"`{prefix}{name}`", takes, *((default,) if with_default else ()), field.description or ""


def _flow(value: Any) -> str:
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def roles() -> str:
    return table("role", "what it is for", rows=((f"`{r}`", text) for r, text in MEANING.items() if r != COORDINATOR))


def metrics() -> str:
    return table("name", "kind", "meaning", rows=_metrics())


def _metrics() -> Iterator[tuple[str, ...]]:
    for family in Metrics().registry.collect():
        end = "_total" if family.type == "counter" else ""
        yield f"`{family.name}{end}`", family.type, family.documentation


def as_yaml(text: str) -> str:
    return f"```yaml\n{text.strip()}\n```"


PARTS: dict[str, Callable[[], str]] = {
    "coordinator-settings": coordinator_settings,
    "metrics": metrics,
    "policy": policy_fields,
    "policy-starter": lambda: as_yaml(starter_policy()),
    "roles": roles,
    "site-settings": site_settings,
    "site-starter": lambda: as_yaml(starter_settings("north", "fed.example.org:8443", "/srv/north/rows.jsonl")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if parser.parse_args().check:
        sys.exit(f"not current: {', '.join(p.name for p in stale)}; run `make docs`" if stale else 0)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote docs/{path.name}")


if __name__ == "__main__":
    main()
