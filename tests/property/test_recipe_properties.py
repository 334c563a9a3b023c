"""What holds for every recipe: it survives being written and read, and every refusal is in words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.errors import RecipeError
from commonweight.recipe.docs import json_schema
from commonweight.recipe.fields import dotted, section_of, walk
from commonweight.recipe.load import load_recipe, recipe_differences, recipe_digest, recipe_text
from commonweight.recipe.schema import Recipe
from commonweight.recipe.source import Source, read_source

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
TRICKY = st.sampled_from(
    [
        "no",
        "1e-2",
        "010",
        "1:30",
        "null",
        "~",
        "",
        " a ",
        "a: b",
        "# c",
        "{q}",
        "2024-01-01",
        "\n",
        "a\nb\n",
        "\x85",
        "=",
        "<<",
    ]
)
TEXT = st.text(max_size=20) | TRICKY
FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300) | st.integers(1, 2**60)
SHARE = st.floats(min_value=1e-300, max_value=1, exclude_max=True)
COUNT = st.integers(1, 10**9)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
METHODS = TEXT.filter(bool) | st.dictionaries(TEXT, PLAIN, max_size=3).map(
    lambda options: {**options, "name": "fedadam"}
)
COHORTS = (
    st.just("all")
    | COUNT
    | st.floats(min_value=0.001, max_value=1)
    | st.fixed_dictionaries({}, optional={"count": COUNT})
    | st.fixed_dictionaries({"fraction": SHARE})
)


def sections(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


MODEL = sections(
    name=TEXT.filter(bool),
    revision=st.none() | TEXT,
    dtype=st.sampled_from(["auto", "float32"]),
    adapter=sections(
        r=COUNT,
        alpha=POSITIVE,
        dropout=SHARE,
        targets=st.just("auto") | st.lists(TEXT, max_size=3),
        virtual_tokens=COUNT,
    ),
)
DATA = sections(
    path=TEXT.filter(bool),
    text=st.none() | TEXT,
    sites=st.fixed_dictionaries({"by": TEXT}, optional={"only": st.lists(TEXT, max_size=3), "take": st.none() | COUNT}),
    holdout=sections(by=TEXT) | sections(examples=COUNT) | sections(fraction=SHARE),
)
TRAINING = sections(
    objective=METHODS,
    lr=POSITIVE,
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.none() | COUNT,
    batch_size=COUNT,
    packing=st.booleans(),
    clip_norm=st.none() | POSITIVE,
    betas=st.lists(SHARE, min_size=2, max_size=2),
)
FEDERATION = sections(rounds=COUNT, cohort=COHORTS, quorum=SHARE, deadline_s=st.none() | POSITIVE, strategy=METHODS)
EVALUATION = sections(controls=st.lists(st.sampled_from(["base", "local", "centralised"]), max_size=3), samples=COUNT)
ENGINE = sections(workers=st.just("auto") | COUNT, device=st.sampled_from(["auto", "cpu"]))
VALUES = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "model": MODEL,
        "data": DATA,
        "training": TRAINING,
        "federation": FEDERATION,
        "evaluation": EVALUATION,
        "engine": ENGINE,
        "output": sections(keep_rounds=st.just("all") | COUNT),
    },
)
RECIPES = VALUES.map(Recipe.model_validate)
LEAVES = [loc for loc, field in walk(Recipe) if not section_of(field)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def reloaded(text: str, path: Path, *overrides: str) -> Recipe:
    path.write_text(text, encoding="utf-8", newline="")
    return load_recipe(path, overrides)


def outcome(text: str, path: Path, *overrides: str) -> Recipe | str:
    """The recipe, or what its author reads: anything but a RecipeError fails the test."""
    try:
        return reloaded(text, path, *overrides)
    except RecipeError as error:
        return f"{error.message}\n{error.hint}"


@given(recipe=RECIPES)
@settings(max_examples=100, deadline=None)
def test_a_written_recipe_loads_to_an_equal_one(recipe: Recipe, path: Path) -> None:
    text = recipe_text(recipe)
    again = reloaded(text, path)
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)
    assert recipe_differences(recipe, again) == []
    assert recipe_text(again) == recipe_text(reloaded(recipe_text(again), path))


@given(recipe=RECIPES)
@settings(max_examples=50, deadline=None)
def test_a_written_recipe_has_every_field_in_the_schemas_order(recipe: Recipe) -> None:
    values = read_source(recipe_text(recipe), "recipe.yaml").values
    assert list(values) == list(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        section = section_of(field)
        assert section is None or list(values[name]) == list(section.model_fields)


@given(values=VALUES)
@settings(max_examples=100, deadline=None)
def test_what_python_accepts_a_file_accepts(values: dict[str, Any], path: Path) -> None:
    assert reloaded(json.dumps(values), path) == Recipe.model_validate(values)


@given(values=VALUES)
@settings(max_examples=50, deadline=None)
def test_what_loads_validates_against_the_json_schema(values: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(json_schema()).validate(values)


@given(one=RECIPES, other=RECIPES)
@settings(max_examples=100, deadline=None)
def test_digests_are_equal_where_there_are_no_differences(one: Recipe, other: Recipe) -> None:
    assert (recipe_digest(one) == recipe_digest(other)) == (recipe_differences(one, other) == [])


@given(recipe=RECIPES, name=NAMES, workers=COUNT, keep=COUNT)
@settings(max_examples=50, deadline=None)
def test_the_digest_leaves_out_what_has_no_effect(
    recipe: Recipe, name: str, workers: int, keep: int, path: Path
) -> None:
    overrides = (f"name='{name}'", f"engine.workers={workers}", f"output.keep_rounds={keep}")
    other = reloaded(recipe_text(recipe), path, *overrides)
    assert recipe_digest(other) == recipe_digest(recipe)
    assert recipe_differences(recipe, other) == []


@given(recipe=RECIPES, lr=POSITIVE)
@settings(max_examples=50, deadline=None)
def test_a_change_is_named(recipe: Recipe, lr: float, path: Path) -> None:
    other = reloaded(recipe_text(recipe), path, f"training.lr={lr}")
    said = recipe_differences(recipe, other)
    assert (
        (len(said) == 1) == (recipe.training.lr != other.training.lr) == (recipe_digest(recipe) != recipe_digest(other))
    )
    assert all(line.startswith("training.lr: ") and " -> " in line for line in said)


@given(loc=st.sampled_from(LEAVES), value=PLAIN)
@settings(max_examples=200, deadline=None)
def test_any_value_of_any_field_loads_or_is_refused_by_name(loc: tuple[str, ...], value: Any, path: Path) -> None:
    values: Any = value
    for part in reversed(loc):
        values = {part: values}
    in_file = outcome(json.dumps({"name": "a", **values}), path)
    if isinstance(in_file, str):
        assert any(dotted(loc[:depth]) in in_file for depth in range(1, len(loc) + 1)), in_file
        assert "Input should" not in in_file


@given(loc=st.sampled_from(LEAVES), value=PLAIN)
@settings(max_examples=100, deadline=None)
def test_an_override_does_what_the_same_line_in_the_file_does(loc: tuple[str, ...], value: Any, path: Path) -> None:
    text = recipe_text(Recipe.model_validate({"name": "a"}))
    source = read_source(text, "recipe.yaml")
    section = _without_short_form(source, loc)
    section[loc[-1]] = value
    in_file = outcome(json.dumps(source.values), path)
    set_later = outcome(text, path, f"{'.'.join(loc)}={json.dumps(value)}")
    assert isinstance(in_file, str) == isinstance(set_later, str)
    assert isinstance(in_file, str) or in_file == set_later


def _without_short_form(source: Source, loc: tuple[str, ...]) -> dict[str, Any]:
    section = source.values
    for part in loc[:-1]:
        inside = section[part]
        section[part] = inside if isinstance(inside, dict) else {}
        section = section[part]
    return section


@given(text=st.text(alphabet="abn:-[]{}'\"#&*!|>%@`, \n\t\r.0123e~\\<=?\x85\u2028\x00\ud800", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_loads_or_is_refused_in_words(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(RecipeError):
        load_recipe(path)


@given(override=st.text(alphabet="name.sed={}[]:'\" ,1-\n~", max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_override_applies_or_is_refused_in_words(override: str, path: Path) -> None:
    said = outcome("name: a\n", path, override)
    assert said
