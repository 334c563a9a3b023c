"""AFL against NumPy written from the paper; the simplex; what its weights do over rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from commonweight import launch
from commonweight.errors import RecipeError, RoundError
from commonweight.federation.journal import Journal
from commonweight.model.tensors import NamedTensors
from commonweight.recipe import Recipe
from commonweight.recipe.compatibility import check_pairings
from commonweight.registry import resolve
from commonweight.strategies.afl import AFL, nearest_on_simplex
from commonweight.strategies.base import ServerState
from commonweight.strategies.update import Update

Array = NDArray[np.float64]
SHAPES = {"a.lora_A.weight": (3, 5), "a.lora_B.weight": (7, 3), "scale": ()}
WEIGHTS = (3.0, 1.0, 7.5, 20.0)


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> NamedTensors:
    draw = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}
    return NamedTensors.of({name: tensor.to(dtype) for name, tensor in made.items()})


def flat(values: NamedTensors) -> Array:
    return np.concatenate([values[name].to(torch.float64).numpy().ravel() for name in SHAPES])


def cohort(round: int, losses: Sequence[float | None]) -> list[Update]:
    """An update of each site that has a loss."""
    return [
        Update(
            f"site{k}", round, {"delta": tensors(100 * round + k)}, WEIGHTS[k], 1, 1, 1, metrics={"first_loss": loss}
        )
        for k, loss in enumerate(losses)
        if loss is not None
    ]


def play(strategy: AFL, rounds: Sequence[Sequence[Update]], start: NamedTensors) -> ServerState:
    state = strategy.init(start)
    for updates in rounds:
        fold = strategy.open(state)
        for update in updates:
            fold.add(update)
        state = strategy.close(state, fold)
    return state


def projected(values: Array, total: float) -> Array:
    """By bisection for the amount that is taken from every coordinate."""
    low, high = values.min() - total, values.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(values - middle, 0).sum() > total else (low, middle)
    found: Array = np.maximum(values - high, 0)
    return found


@pytest.mark.parametrize("total", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("number", [1, 2, 7, 40])
def test_the_nearest_point_of_the_simplex(number: int, total: float) -> None:
    draw = np.random.default_rng(number)
    for scale in (0.01, 1.0, 30.0):
        values = draw.normal(size=number) * scale
        found = nearest_on_simplex(values.tolist(), total)
        assert min(found) >= 0
        assert math.fsum(found) == pytest.approx(total, abs=1e-13 * (1 + scale))
        np.testing.assert_allclose(found, projected(values, total), atol=1e-12 * (1 + scale))
    inside = draw.dirichlet(np.ones(number))
    np.testing.assert_allclose(nearest_on_simplex(inside.tolist(), 1.0), inside, atol=1e-15)


LOSSES: list[list[float | None]] = [[2.5, 0.75, 1.25, 4.0], [2.0, 0.7, None, 3.0], [None, 0.6, 2.2, 2.9], [2, 1, 2, 3]]


@pytest.mark.parametrize(("gamma", "lr"), [(0.0, 1.0), (0.05, 1.0), (0.2, 0.7), (3.0, 1.0)])
def test_four_rounds_with_unequal_losses_and_missing_sites(gamma: float, lr: float) -> None:
    start = tensors(1)
    strategy = AFL(AFL.Options(gamma=gamma, lr=lr), num_sites=4)
    rounds = [cohort(number, losses) for number, losses in enumerate(LOSSES, start=1)]
    state = play(strategy, rounds, start.clone())

    theta, lam = flat(start), np.full(4, 0.25)
    for number, losses in enumerate(LOSSES, start=1):
        who = [k for k, loss in enumerate(losses) if loss is not None]
        deltas = np.stack([flat(tensors(100 * number + k)) for k in who])
        mass = lam[who].sum()
        p = lam[who] / mass if mass > 0 else np.full(len(who), 1 / len(who))
        theta = theta + lr * p @ deltas
        lam[who] = projected(lam[who] + gamma * np.array([losses[k] for k in who], dtype=np.float64), mass)
    np.testing.assert_allclose(flat(state.theta), theta, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([state.numbers[f"site{k}"] for k in range(4)], lam, atol=1e-12)
    assert sum(state.numbers.values()) == pytest.approx(1)
    assert not state.slots


def test_in_the_end_the_worst_site_alone_counts() -> None:
    losses = [2.0, 1.0, 3.0, 2.9]
    rounds = [cohort(number, losses) for number in range(1, 40)]
    state = play(AFL(AFL.Options(gamma=0.5), num_sites=4), rounds, tensors(1))
    assert state.numbers == {"site0": 0.0, "site1": 0.0, "site2": pytest.approx(1.0), "site3": 0.0}


def test_sites_that_count_nothing_count_alike_when_only_they_answer() -> None:
    first, second = cohort(1, [1.0, 1.0, 9.0, 1.0]), cohort(2, [1.0, 5.0, None, None])
    start = tensors(1)
    strategy = AFL(AFL.Options(gamma=10), num_sites=4)
    after = play(strategy, [first], start.clone())
    moved = flat(play(strategy, [first, second], start.clone()).theta) - flat(after.theta)
    assert after.numbers["site0"] == after.numbers["site1"] == 0
    np.testing.assert_allclose(moved, (flat(second[0].delta) + flat(second[1].delta)) / 2, rtol=1e-9)


@pytest.mark.parametrize("loss", [math.nan, -0.1, math.inf])
def test_an_update_without_a_usable_loss_changes_nothing(loss: float) -> None:
    strategy = AFL(num_sites=4)
    state = strategy.init(tensors(1))
    fold = strategy.open(state)
    for update in cohort(1, [1.0, loss]):
        fold.add(update)
    with pytest.raises(RoundError, match=r"'site1' for round 1 has first_loss .*; afl weighs"):
        strategy.close(state, fold)
    assert state.theta.digest() == tensors(1).digest()
    assert not state.numbers


def test_options_door_and_pairings(make_recipe: Callable[..., Recipe]) -> None:
    assert resolve("strategy", "afl") is AFL
    for wrong in ({"gamma": -0.1}, {"lr": 0}, {"gamma": math.inf}, {"L": 1}):
        with pytest.raises(ValidationError):
            AFL.Options(**wrong)
    recipe = make_recipe(federation={"strategy": "afl"})
    check_pairings(recipe, network=False)
    with pytest.raises(RecipeError, match="'afl' does not go with runs over a network"):
        check_pairings(recipe, network=True)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
def test_a_whole_run_keeps_the_sites_weights_with_each_commit(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    strategy: dict[str, Any] = {"name": "afl", "gamma": 0.3}
    launch.run(make_recipe(federation={"rounds": 2, "strategy": strategy}), tmp_path / "run")
    journal = Journal(tmp_path / "run" / "state.sqlite")
    try:
        kept = [commit["state"].get("numbers") for _, commit in sorted(journal.commits().items())]
    finally:
        journal.close()
    lines = (tmp_path / "run" / "events.jsonl").read_text("utf-8").splitlines()
    accepted = [event for event in map(json.loads, lines) if event["event"] == "update_accepted"]
    lam = {event["site"]: 1 / 3 for event in accepted}
    assert kept[0] is None
    for number in (1, 2):
        losses = {event["site"]: event["first_loss"] for event in accepted if event["round"] == number}
        climbed = np.array([lam[site] + 0.3 * losses[site] for site in lam])
        lam = dict(zip(lam, projected(climbed, 1.0), strict=True))
        assert kept[number] == pytest.approx(lam, abs=1e-9)
