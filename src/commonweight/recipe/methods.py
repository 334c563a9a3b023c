"""Every method that a recipe may name, in one table: for `commonweight methods` and for the docs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ..registry import GROUPS, names, resolve
from .compatibility import FEATURES, Feature, pairings

_ADAPTERS = (
    ("lora", "W + (α/r)·BA", "Hu 2022, arXiv:2106.09685"),
    ("dora", "m · (W + (α/r)·BA) / ‖W + (α/r)·BA‖", "Liu 2024, arXiv:2402.09353"),
    ("rslora", "W + (α/√r)·BA", "Kalajdzievski 2023, arXiv:2312.03732"),
    ("ia3", "keys, values and feed-forward rescaled by learned vectors", "Liu 2022, arXiv:2205.05638"),
    ("prompt", "learned embeddings in front of the text", "Lester 2021, arXiv:2104.08691"),
    ("prefix", "learned keys and values in front of every layer's", "Li 2021, arXiv:2101.00190"),
    ("p-tuning", "learned embeddings through a small encoder", "Liu 2021, arXiv:2103.10385"),
    ("full", "every weight", ""),
)


def catalogue() -> list[dict[str, Any]]:
    """Strategies, objectives, codecs' stages and adapters: kind, name, needs, rule, source, options, and what a
    strategy goes with."""
    found = []
    for kind in GROUPS:
        for name in names(kind):
            method = resolve(kind, name)
            found.append(
                {
                    "kind": kind,
                    "name": name,
                    "needs": getattr(method, "needs", ""),
                    "rule": getattr(method, "rule", "") or (method.__doc__ or "").strip().splitlines()[0],
                    "source": method.source,
                    "goes_with": pairings(method) if kind == "strategy" else {},
                    "options": _options(method.Options),
                }
            )
    adapters = [
        {"kind": "adapter", "name": n, "needs": "", "rule": rule, "source": source, "goes_with": {}, "options": []}
        for n, rule, source in _ADAPTERS
    ]
    return found + adapters


def _options(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {"name": name, "default": field.default, "description": field.description or ""}
        for name, field in model.model_fields.items()
    ]


def methods_markdown() -> str:
    """The methods as a page: a table a kind, and each method's options."""
    parts = [
        "# Methods",
        "Generated from the code by `make docs`; `commonweight methods` prints the same. A class of one's own is named "
        "as `package.module:Class` and satisfies the same protocol as these.",
    ]
    titles = {"strategy": "Strategies", "objective": "Objectives", "adapter": "Adapters"}
    titles |= {"shortening": "Codecs: fewer numbers", "rounding": "Codecs: fewer bits", "packing": "Codecs: packing"}
    for kind, title in titles.items():
        parts += [f"## {title}", _table([m for m in catalogue() if m["kind"] == kind])]
    parts += [_pairing_table()]
    parts += [_option_table(m) for m in catalogue() if m["options"]]
    return "\n\n".join(parts) + "\n"


def _table(found: list[dict[str, Any]]) -> str:
    rows = [
        f"| `{m['name']}` | {m['needs'] or '–'} | {_cell(m['rule'])} | {_cell(m['source']) or '–'} |" for m in found
    ]
    return "\n".join(["| name | needs | rule | source |", "| --- | --- | --- | --- |", *rows])


def _pairing_table() -> str:
    features = [feature.name for feature in FEATURES]
    rows = [
        f"| `{m['name']}` | {' | '.join('yes' if m['goes_with'][f] else 'no' for f in features)} |"
        for m in catalogue()
        if m["kind"] == "strategy"
    ]
    reasons = [f"- *{f.name}*, where it says no: {_reasons(f)}. {f.instead}." for f in FEATURES]
    head = [f"| strategy | {' | '.join(features)} |", f"| --- |{' --- |' * len(features)}"]
    return "\n".join(["## What goes with what\n", *head, *rows, "", *reasons])


def _reasons(feature: Feature) -> str:
    """Why a column says no; where strategies differ, each reason after the strategies that it holds for."""
    if isinstance(feature.because, str):
        return feature.because
    strategies: dict[str, list[str]] = {}
    for name in names("strategy"):
        strategy = resolve("strategy", name)
        if not feature.goes_with(strategy):
            strategies.setdefault(feature.because(strategy), []).append(f"`{name}`")
    return "; ".join(f"{', '.join(found)}: {reason}" for reason, found in strategies.items())


def _option_table(method: dict[str, Any]) -> str:
    rows = [f"| `{o['name']}` | `{o['default']}` | {_cell(o['description'])} |" for o in method["options"]]
    return "\n".join(
        [f"### Options of `{method['name']}`\n", "| option | default | meaning |", "| --- | --- | --- |", *rows]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
