"""Whole rounds against an independent account: each site's work by hand, the mean in float64 NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from commonweight.engines.bench import Bench, build_bench
from commonweight.federation.cohort import choose_cohort
from commonweight.federation.folder import read_tensors
from commonweight.launch import run
from commonweight.model.tensors import Layout, NamedTensors
from commonweight.recipe import Recipe
from commonweight.seeding import derive_seed
from commonweight.train.local import LocalWork
from tests.unit.wayward import ALWAYS

MakeRecipe = Callable[..., Recipe]
Arrays = dict[str, NDArray[np.float64]]
SITES = ("north", "south", "west")
ROWS = {"north": 20, "south": 14, "west": 8}


# --- by hand ------------------------------------------------------------------------------------------------------


def arrays(tensors: NamedTensors) -> Arrays:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


def local_work(bench: Bench, site: str, theta: Arrays, round: int, lr: float) -> tuple[Arrays, dict[str, float]]:
    """What a site changes in a round, θᵢ − θ, and what its update may weigh."""
    recipe, values = bench.recipe, bench.participant.trainables.values
    for name, tensor in values.items():
        tensor.copy_(tensor.new_tensor(theta[name]))
    start = arrays(values)
    task = LocalWork(
        bench.sites[site].train,
        recipe.training,
        lr=lr,
        steps=-(-ROWS[site] // recipe.training.batch_size),
        seed=derive_seed(recipe.seed, "work", site, round),
    )
    result = bench.objective.work(bench.participant, task)
    weights: dict[str, float] = {"examples": ROWS[site], "tokens": result.num_label_tokens, "uniform": 1}
    return {name: after - start[name] for name, after in arrays(values).items()}, weights


def round_by_hand(bench: Bench, theta: Arrays, cohort: Sequence[str], round: int, lr: float) -> Arrays:
    """θ after a round of federated averaging that begins at `theta`."""
    work = [local_work(bench, site, theta, round, lr) for site in cohort]
    weights = np.array([weight[bench.recipe.federation.weighting] for _, weight in work], dtype=np.float64)
    shares = weights / weights.sum()
    return {
        name: value + sum(share * delta[name] for share, (delta, _) in zip(shares, work, strict=True))
        for name, value in theta.items()
    }


def adapter_of(run_folder: Path, round: int) -> Arrays:
    """The adapter that a run kept for a round, under the names of the model's parameters."""
    raw = load_file(run_folder / "rounds" / f"{round:04d}" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value.astype(np.float64) for name, value in raw.items()}


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


# --- federated averaging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_a_round_is_the_weighted_mean_of_what_the_sites_changed(
    make_recipe: MakeRecipe, tmp_path: Path, weighting: str
) -> None:
    recipe = make_recipe(federation={"rounds": 1, "weighting": weighting})
    run(recipe, tmp_path / "run")
    bench = build_bench(recipe)
    start, found = arrays(bench.theta), adapter_of(tmp_path / "run", 1)
    assert_close(found, round_by_hand(bench, start, SITES, 1, 0.01))
    moved = max(float(np.abs(found[name] - start[name]).max()) for name in found)
    assert moved > 1e-3  # far beyond the tolerance


def test_rounds_follow_each_other_over_the_cohorts_drawn_and_the_rates_planned(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(federation={"rounds": 3, "cohort": 2}, training={"schedule": "linear", "final_lr_ratio": 0.5})
    metrics = run(recipe, tmp_path / "run")
    cohorts = [choose_cohort(SITES, recipe.federation, seed=0, round=round) for round in (1, 2, 3)]
    lrs = [0.01, 0.0075, 0.005]
    assert [round["lr"] for round in metrics["rounds"]] == pytest.approx(lrs)
    assert len(set(cohorts)) > 1
    bench = build_bench(recipe)
    theta = arrays(bench.theta)
    for round, (cohort, lr) in enumerate(zip(cohorts, lrs, strict=True), start=1):
        found = adapter_of(tmp_path / "run", round)
        assert_close(found, round_by_hand(bench, theta, cohort, round, lr))
        theta = found


def test_only_those_invited_take_part(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 5, "cohort": 1}, training={"steps": 1}, seed=3)
    metrics = run(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    accepted = [(e["round"], e["site"]) for e in map(json.loads, lines) if e["event"] == "update_accepted"]
    invited = [choose_cohort(SITES, recipe.federation, seed=3, round=round) for round in range(1, 6)]
    assert accepted == [(round, site) for round, cohort in enumerate(invited, start=1) for site in cohort]
    assert [tuple(round["cohort"]) for round in metrics["rounds"]] == invited
    assert [tuple(round["answered"]) for round in metrics["rounds"]] == invited
    assert len(set(invited)) > 1


def test_a_federation_of_one_site_is_that_site_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """With plain SGD, which carries nothing from round to round, the local control arm does the very same steps."""
    metrics = run(
        make_recipe(
            data={"sites": {"by": "site", "only": ["south"]}},
            training={"optimizer": "sgd", "lr": 0.5},
            federation={"rounds": 2},
            evaluation={"controls": ["local"]},
        ),
        tmp_path / "run",
    )
    federated = [point["sites"]["south"] for point in metrics["arms"]["federated"]["rounds"]]
    assert federated[1:] == pytest.approx(metrics["arms"]["local"]["sites"]["south"]["rounds"], rel=1e-6)
    assert federated[0] - federated[2] > 1e-3


# --- SCAFFOLD -----------------------------------------------------------------------------------------------------


def control_variates(recipe: Recipe, run_folder: Path) -> tuple[Arrays, list[Arrays]]:
    """The server's c and every site's cᵢ (0 for one that never answered)."""
    layout: Layout = build_bench(recipe).theta.layout
    (state,) = (run_folder / "state").glob("*.safetensors")
    server = arrays(read_tensors(state, layout)["slot/control"])
    sites = []
    for place in range(len(SITES)):
        files = list((run_folder / "sites" / f"{place:03d}").glob("*.safetensors"))
        assert len(files) <= 1  # older versions are deleted
        nothing = {name: np.zeros_like(value) for name, value in server.items()}
        sites.append(arrays(read_tensors(files[0], layout)["control"]) if files else nothing)
    return server, sites


def assert_is_their_mean(server: Arrays, sites: list[Arrays]) -> None:
    for name, value in server.items():
        mean = np.mean([site[name] for site in sites], axis=0)
        scale = max(float(np.abs(site[name]).max()) for site in sites)
        np.testing.assert_allclose(value, mean, atol=1e-6 * max(1.0, scale), rtol=0, err_msg=name)


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "steps": 2}


@pytest.mark.parametrize("cohort", [1, 2, "all"])
def test_c_is_the_mean_of_every_sites_own_also_of_those_that_were_not_invited(
    make_recipe: MakeRecipe, tmp_path: Path, cohort: int | str
) -> None:
    recipe = make_recipe(federation={"rounds": 4, "strategy": "scaffold", "cohort": cohort}, training=SGD)
    metrics = run(recipe, tmp_path / "run")
    server, sites = control_variates(recipe, tmp_path / "run")
    assert_is_their_mean(server, sites)
    answered = {site for round in metrics["rounds"] for site in round["answered"]}
    silent = [all(not value.any() for value in site.values()) for site in sites]
    assert silent == [name not in answered for name in SITES]


def test_an_update_that_was_refused_changes_neither_c_nor_its_sites_own(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    objective = {
        "name": "tests.unit.wayward:Wayward", "way": "nan values", "rows": ROWS["south"], "folder": str(tmp_path)
    }  # fmt: skip
    federation = {"rounds": 3, "strategy": "scaffold"}
    recipe = make_recipe(federation=federation, training={**SGD, "objective": {**objective, "times": 1}})
    metrics = run(recipe, tmp_path / "run")
    assert [list(round["failed"]) for round in metrics["rounds"]] == [["south"], [], []]
    server, sites = control_variates(recipe, tmp_path / "run")
    assert all(np.isfinite(value).all() for value in server.values())
    assert_is_their_mean(server, sites)

    always = make_recipe(federation=federation, training={**SGD, "objective": {**objective, "times": ALWAYS}})
    run(always, tmp_path / "always")
    server, sites = control_variates_of_answers(always, tmp_path / "always", missing=1)
    assert_is_their_mean(server, sites)


def control_variates_of_answers(recipe: Recipe, run_folder: Path, *, missing: int) -> tuple[Arrays, list[Arrays]]:
    """As `control_variates`, where what one site left of refused rounds is rubbish."""
    for file in (run_folder / "sites" / f"{missing:03d}").glob("*"):
        file.unlink()
    return control_variates(recipe, run_folder)
