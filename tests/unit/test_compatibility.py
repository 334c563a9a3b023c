"""The table of pairings, cell by cell: what it says is what a recipe meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from commonweight import registry
from commonweight.errors import RecipeError
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import FEATURES, check_pairings, pairings
from commonweight.recipe.methods import catalogue, methods_markdown

#: a recipe for each column that asks for that feature and no other: (values, over a network)
ASKED: dict[str, tuple[Callable[[dict[str, Any]], None], bool]] = {
    "runs over a network": (lambda values: None, True),
    "adapters other than lora, rslora": (lambda values: values["model"]["adapter"].update(kind="ia3"), False),
    "runs without a virtual clock": (lambda values: values["federation"].pop("clock"), False),
    "deadlines, over-selection": (lambda values: values["federation"].update(deadline_s=5.0), False),
    "relays": (lambda values: values["federation"].update(relays={"r": ["s"]}), False),
}

CLOCK = {"slowest": 1.0, "fastest": 2.0}


def plain(strategy: str) -> dict[str, Any]:
    return {"name": "x", "model": {"adapter": {"kind": "lora"}}, "federation": {"strategy": strategy, "clock": CLOCK}}


def test_every_column_has_a_recipe_that_asks_for_it_alone() -> None:
    assert set(ASKED) == {feature.name for feature in FEATURES}
    for name, (change, network) in ASKED.items():
        values = plain("fedavg")
        change(values)
        recipe = Recipe.model_validate(values)
        assert [feature.name for feature in FEATURES if feature.asked(recipe, network)] == [name]


@pytest.mark.parametrize("strategy", registry.names("strategy"))
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_cell_says_what_a_recipe_meets(strategy: str, feature: Any) -> None:
    change, network = ASKED[feature.name]
    values = plain(strategy)
    change(values)
    recipe = Recipe.model_validate(values)
    if pairings(registry.resolve("strategy", strategy))[feature.name]:
        check_pairings(recipe, network=network)
        return
    with pytest.raises(RecipeError) as refused:
        check_pairings(recipe, network=network)
    assert refused.value.message == (
        f"federation.strategy {strategy!r} does not go with {feature.name}: {feature.because}"
    )
    assert refused.value.hint == feature.instead
    assert "fedavg" in feature.instead
    check_pairings(
        Recipe.model_validate({**values, "federation": {**values["federation"], "strategy": "fedavg"}}), network=network
    )


@pytest.mark.parametrize("strategy", registry.names("strategy"))
def test_by_itself_every_strategy_is_let_through(strategy: str) -> None:
    check_pairings(Recipe.model_validate(plain(strategy)), network=False)


def test_methods_and_their_page_show_the_table() -> None:
    rows = {m["name"]: m["goes_with"] for m in catalogue() if m["kind"] == "strategy"}
    assert rows["fedavg"] == dict.fromkeys((feature.name for feature in FEATURES), True)
    page = methods_markdown()
    assert f"| `fedavg` |{' yes |' * len(FEATURES)}" in page
    for feature in FEATURES:
        assert f"- *{feature.name}*, where it says no: {feature.because}. {feature.instead}." in page
    for name, row in rows.items():
        assert f"| `{name}` | {' | '.join('yes' if row[f.name] else 'no' for f in FEATURES)} |" in page
