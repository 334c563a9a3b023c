"""The table of pairings, cell by cell: what it says is what a recipe meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from commonweight import registry
from commonweight.errors import RecipeError
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import FEATURES, check_pairings, pairings
from commonweight.recipe.methods import catalogue, methods_markdown
from commonweight.strategies.base import NoOptions, ServerState
from commonweight.strategies.individuals import IndividualsStrategy
from commonweight.strategies.update import Update

Change = Callable[[dict[str, Any]], None]


def with_shapes(values: dict[str, Any]) -> None:
    values["model"]["adapter"].update(budget={"x": 0.5})


def use(strategy: str) -> Change:
    return lambda values: values["federation"].update(strategy=strategy)


def private(values: dict[str, Any]) -> None:
    values["privacy"] = {"dp": "site", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}
    values["federation"]["weighting"] = "uniform"


def private_examples(values: dict[str, Any]) -> None:
    values["privacy"] = {"dp": "example", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}


#: a recipe for each column that asks for that feature and no other: (values, over a network); then what the refusal
#: names instead, and how a recipe does that
ASKED: dict[str, tuple[Change, bool, str, Change]] = {
    "runs over a network": (lambda values: None, True, "fedavg", use("fedavg")),
    "adapters other than lora, rslora": (
        lambda values: values["model"]["adapter"].update(kind="ia3"),
        False,
        "fedavg",
        use("fedavg"),
    ),
    "sites of different shapes": (with_shapes, False, "flexlora", use("flexlora")),
    "quantized bases": (
        lambda values: values["model"].update(quantization="8bit"),
        False,
        "flexlora",
        lambda values: values["model"].update(quantization="none"),
    ),
    "runs without a virtual clock": (lambda values: values["federation"].pop("clock"), False, "fedavg", use("fedavg")),
    "deadlines, over-selection": (
        lambda values: values["federation"].update(deadline_s=5.0),
        False,
        "fedavg",
        use("fedavg"),
    ),
    "differential privacy of sites": (private, False, "fedavg", use("fedavg")),
    "differential privacy of examples, groups": (private_examples, False, "fedavg", use("fedavg")),
    "personal parts": (
        lambda values: values["federation"].update(personal=["layers.1"]),
        False,
        "fedavg",
        use("fedavg"),
    ),
    "secure sums": (
        lambda values: values.update(privacy={"secure_aggregation": "on"}),
        False,
        "fedavg",
        use("fedavg"),
    ),
    "secure sums in groups": (
        lambda values: values.update(privacy={"secure_aggregation": "on", "secure_group_size": 3}),
        False,
        "median",
        use("median"),
    ),
    "error feedback": (lambda values: values.update(compression="auto"), False, "fedavg", use("fedavg")),
    "small downloads": (
        lambda values: values.update(compression={"down": "auto"}),
        False,
        "fedavg",
        use("fedavg"),
    ),
    "relays": (lambda values: values["federation"].update(relays={"r": ["s"]}), False, "fedavg", use("fedavg")),
}

CLOCK = {"slowest": 1.0, "fastest": 2.0}


def plain(strategy: str) -> dict[str, Any]:
    return {"name": "x", "model": {"adapter": {"kind": "lora"}}, "federation": {"strategy": strategy, "clock": CLOCK}}


def test_every_column_has_a_recipe_that_asks_for_it_alone() -> None:
    assert set(ASKED) == {feature.name for feature in FEATURES}
    for name, (change, network, _, _) in ASKED.items():
        values = plain("fedavg")
        change(values)
        recipe = Recipe.model_validate(values)
        assert [feature.name for feature in FEATURES if feature.asked(recipe, network)] == [name]


@pytest.mark.parametrize("strategy", registry.names("strategy"))
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_cell_says_what_a_recipe_meets(strategy: str, feature: Any) -> None:
    change, network, word, mend = ASKED[feature.name]
    values = plain(strategy)
    change(values)
    recipe = Recipe.model_validate(values)
    if pairings(registry.resolve("strategy", strategy))[feature.name]:
        check_pairings(recipe, network=network)
        return
    with pytest.raises(RecipeError) as refused:
        check_pairings(recipe, network=network)
    assert refused.value.message == (
        f"federation.strategy {strategy!r} does not go with {feature.name}: "
        + feature.reason(registry.resolve("strategy", strategy))
    )
    assert refused.value.hint == feature.instead
    assert word in feature.instead
    mend(values)
    check_pairings(Recipe.model_validate(values), network=network)


@pytest.mark.parametrize("strategy", registry.names("strategy"))
def test_by_itself_every_strategy_is_let_through(strategy: str) -> None:
    check_pairings(Recipe.model_validate(plain(strategy)), network=False)


def test_methods_and_their_page_show_the_table() -> None:
    rows = {m["name"]: m["goes_with"] for m in catalogue() if m["kind"] == "strategy"}
    others = ("sites of different shapes", "secure sums in groups")
    assert rows["fedavg"] == {feature.name: feature.name not in others for feature in FEATURES}
    page = methods_markdown()
    answers = ("no" if feature.name in others else "yes" for feature in FEATURES)
    assert f"| `fedavg` | {' | '.join(answers)} |" in page
    for feature in FEATURES:
        (line,) = (line for line in page.splitlines() if line.startswith(f"- *{feature.name}*, where it says no: "))
        assert line.endswith(f". {feature.instead}.")
        for name, row in rows.items():
            assert row[feature.name] or feature.reason(registry.resolve("strategy", name)) in line
    for name, row in rows.items():
        assert f"| `{name}` | {' | '.join('yes' if row[f.name] else 'no' for f in FEATURES)} |" in page


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("q-fedavg", "it weighs sites by the loss that they start from, which does not leave a networked site"),
        (f"{__name__}:Whole", "a coordinator combines from files, and this strategy takes its updates whole"),
        (f"{__name__}:Unrelated", "it does not say that a coordinator can run it"),
    ],
)
def test_why_a_coordinator_does_not_run_it(strategy: str, reason: str) -> None:
    recipe = Recipe.model_validate(plain(strategy))
    with pytest.raises(RecipeError) as refused:
        check_pairings(recipe, network=True)
    assert refused.value.message == f"federation.strategy {strategy!r} does not go with runs over a network: {reason}"
    check_pairings(recipe, network=False)


@pytest.mark.parametrize("strategy", ["median", "bulyan", "centered-clipping", "flexlora", "lora-fair"])
def test_a_coordinator_runs_strategies_that_take_updates_a_stretch_at_a_time(strategy: str) -> None:
    check_pairings(Recipe.model_validate(plain(strategy)), network=True)


class Whole(IndividualsStrategy):
    """Somebody's own, written before a coordinator could run any of its kind."""

    name, source, rule = "whole", "", ""

    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        return state


class Unrelated:
    """A class that inherits nothing."""

    name, needs, source, rule, Options = "unrelated", "sum", "", "", NoOptions
