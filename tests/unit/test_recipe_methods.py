"""A method's own options are checked by its class, and reported like the recipe's own fields."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from commonweight.errors import RecipeError
from commonweight.recipe.load import check_methods
from commonweight.recipe.schema import Recipe


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Adaptive:
    class Options(Strict):
        lr: float = Field(0.1, gt=0)
        nesterov: bool = False
        mode: Literal["fast", "slow"] = "fast"
        low: float = 0
        high: float = 1

        @model_validator(mode="after")
        def _ordered(self) -> Adaptive.Options:
            if self.low > self.high:
                raise ValueError(f"low {self.low} is above high {self.high}")
            return self


class Plain:
    class Options(Strict):
        pass


class Demanding:
    class Options(Strict):
        rank: int = Field(ge=1, description="How many.")


class Undeclared:
    pass


HERE = __name__


def recipe(strategy: object, objective: object = None) -> Recipe:
    chosen = objective or f"{HERE}:Plain"
    return Recipe.model_validate({"name": "a", "federation": {"strategy": strategy}, "training": {"objective": chosen}})


def adaptive(**options: object) -> dict[str, object]:
    return {"name": f"{HERE}:Adaptive", **options}


@pytest.mark.parametrize("strategy", [f"{HERE}:Plain", adaptive(), adaptive(lr=1, nesterov=True, mode="slow")])
def test_options_that_the_class_takes_are_accepted(strategy: object) -> None:
    check_methods(recipe(strategy))


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (adaptive(lr=-1), ["`federation.strategy.lr` is -1", "a number above 0"]),
        (adaptive(lr="0.1"), ['`federation.strategy.lr` is "0.1"', "without quotes"]),
        (adaptive(lr=float("inf")), ["`federation.strategy.lr` is inf", "finite"]),
        (adaptive(nesterov=1), ["`federation.strategy.nesterov` is 1", "true or false"]),
        (adaptive(mode="fats"), ['`federation.strategy.mode` is "fats"', "`fast` or `slow`", "mean `fast`?"]),
        (adaptive(learn=1), ["unknown key `federation.strategy.learn`", "known here: `lr`, `nesterov`, `mode`"]),
        (adaptive(nestorov=True), ["`federation.strategy.nestorov`", "mean `federation.strategy.nesterov`?"]),
        (adaptive(low=3), ["`federation.strategy`: low 3.0 is above high 1"]),
        ({"name": f"{HERE}:Plain", "lr": 1}, ["`federation.strategy.lr`", "takes no options"]),
        (f"{HERE}:Demanding", ["`federation.strategy.rank` is missing", "whole number of at least 1", "How many"]),
        (f"{HERE}:Undeclared", ["`federation.strategy`", "declares no options", "Options"]),
        (f"{HERE}:Absent", ["`federation.strategy`", "cannot be imported", "Absent"]),
        ("fedavgg", ["`federation.strategy`", "no strategy is called 'fedavgg'", "'fedavg'"]),
    ],
)
def test_a_bad_strategy_is_refused_in_words(strategy: object, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_methods(recipe(strategy))
    said = f"{caught.value.message} {caught.value.hint}"
    assert [word for word in words if word not in said] == [], said


def test_the_objective_is_checked_too() -> None:
    with pytest.raises(RecipeError, match=r"`training\.objective\.rank` is 0; it must be a whole number of at least 1"):
        check_methods(recipe(f"{HERE}:Plain", {"name": f"{HERE}:Demanding", "rank": 0}))
    with pytest.raises(RecipeError, match=r"`training\.objective`: no objective is called 'sfft'"):
        check_methods(recipe(f"{HERE}:Plain", "sfft"))


def test_all_bad_options_are_listed() -> None:
    with pytest.raises(RecipeError) as caught:
        check_methods(recipe(adaptive(lr=0, mode=3)))
    assert "`federation.strategy.lr` is 0" in caught.value.message
    assert "also: `federation.strategy.mode` is 3" in caught.value.hint
