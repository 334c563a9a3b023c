"""The JSON Schema, the reference page and the starter recipes say what the schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commonweight.errors import RecipeError
from commonweight.recipe.docs import json_schema, reference_markdown
from commonweight.recipe.fields import dotted, section_of, walk
from commonweight.recipe.load import load_recipe, recipe_text
from commonweight.recipe.schema import CohortSpec, Method, Recipe
from commonweight.recipe.source import read_source
from commonweight.recipe.starters import SCHEMA_LINE, STARTERS, starter

MINIMAL = "name: a\n"
SHORT = "name: a\nfederation: {cohort: 3, strategy: fedadam}\ntraining: {objective: sft, lr: 1e-2}\n"
LONG = "name: a\nfederation: {cohort: {fraction: 0.5}, strategy: {name: fedadam, lr: 1, betas: [0.9]}}\n"
HALF = "name: a\nfederation: {cohort: 0.5}\nmodel: {adapter: {targets: [q_proj]}}\ntraining: {clip_norm: null}\n"
GOOD = {"minimal": MINIMAL, "short forms": SHORT, "long forms": LONG, "half the sites": HALF}
GOOD |= {f"starter {kind}": starter(kind) for kind in STARTERS}

BAD = {
    "unknown section": "name: a\nsplit: {}\n",
    "unknown field": "name: a\ntraining: {learning_rate: 1}\n",
    "no name": "seed: 1\n",
    "range": "name: a\ntraining: {lr: 0}\n",
    "type": "name: a\ntraining: {packing: 1}\n",
    "word": "name: a\ntraining: {optimizer: adam}\n",
    "cohort": "name: a\nfederation: {cohort: some}\n",
    "strategy": "name: a\nfederation: {strategy: {lr: 1}}\n",
}


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_what_loads_validates(text: str, validator: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    validator.validate(read_source(text, "recipe.yaml").values)
    validator.validate(read_source(recipe_text(recipe), "recipe.yaml").values)


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_an_editor_should_mark_does_not_validate(text: str, validator: Any) -> None:
    assert not validator.is_valid(read_source(text, "recipe.yaml").values)


def test_the_json_schema_takes_short_forms_and_knows_the_methods() -> None:
    sections = json_schema()["$defs"]
    strategy = sections["FederationSpec"]["properties"]["strategy"]["anyOf"]
    assert {"fedavg", "fedadam"} <= set(strategy[0]["examples"])
    assert strategy[1] == {"$ref": "#/$defs/Method"}
    assert sections["Method"]["additionalProperties"] is True
    cohort = sections["FederationSpec"]["properties"]["cohort"]["anyOf"]
    assert [form.get("const") or form.get("type") or "section" for form in cohort] == [
        "all",
        "integer",
        "number",
        "section",
    ]


def test_the_json_schema_is_complete_and_closed() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "commonweight recipe"
    assert json.loads(json.dumps(schema)) == schema
    for name, section in [("Recipe", schema), *schema["$defs"].items()]:
        assert section["description"], name
        assert section["additionalProperties"] is (name == "Method"), name
        assert all("title" not in field for field in section["properties"].values()), name


def test_the_reference_has_every_section_and_every_field() -> None:
    page = reference_markdown()
    for loc, field in walk(Recipe):
        if loc[:-1] == ("federation", "cohort"):
            continue
        heading = f"## `{dotted(loc[:-1])}`\n" if loc[:-1] else "## The top level\n"
        section = page.partition(heading)[2].partition("\n## ")[0]
        row = next(line for line in section.splitlines() if line.startswith(f"| `{loc[-1]}` |"))
        _, _, takes, default, meaning, _ = row.replace("\\|", "").split("|")
        assert takes.strip(), loc
        assert meaning.strip() == (field.description or "").replace("|", ""), loc
        assert default.strip() or section_of(field), loc


def test_the_reference_links_lead_to_its_headings() -> None:
    page = reference_markdown()
    anchors = {line[4:-1].replace(".", "") for line in page.splitlines() if line.startswith("## `")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links == anchors


def test_the_reference_says_defaults_as_one_writes_them() -> None:
    page = reference_markdown()
    for row in (
        "| **required** |",
        "| `{by: site}` |",
        "| `[0.9, 0.999]` |",
        "| `fedavg` |",
        "| `all` |",
        "| `false` |",
    ):
        assert row in page
    assert Method.__name__ not in page
    assert CohortSpec.__name__ not in page


@pytest.mark.parametrize("kind", STARTERS)
def test_a_starter_loads_as_it_stands_and_fits_a_screen(kind: str, tmp_path: Path) -> None:
    text = starter(kind)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").name == kind
    assert text.startswith(SCHEMA_LINE)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120


def test_starters_differ_in_how_a_row_is_read(tmp_path: Path) -> None:
    recipes = {}
    for kind in STARTERS:
        (tmp_path / "recipe.yaml").write_text(starter(kind), encoding="utf-8")
        recipes[kind] = load_recipe(tmp_path / "recipe.yaml", ["data.path=mine"])
    assert recipes["chat"].data.messages == "messages"
    assert recipes["text"].data.sites.scheme == "file"
    assert recipes["instruction"].data.sites.by == "site"
    assert {recipe.data.path for recipe in recipes.values()} == {"mine"}


def test_an_unknown_starter_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        starter("instructions")
    assert "'instructions'" in caught.value.message
    assert "did you mean 'instruction'?" in caught.value.hint
