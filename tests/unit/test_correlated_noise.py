"""Noise that later rounds take back: the factorization, its sensitivity, who takes part when, runs that are killed."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from commonweight.coordinator.stored_model import StoredModel
from commonweight.errors import RecipeError, StateError
from commonweight.federation import private_rounds
from commonweight.federation.cohort import check_separation, choose_cohort, resting_sites
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.private_rounds import PrivateRounds, planned_noise
from commonweight.launch import run
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.noise import GaussianNoise
from commonweight.privacy.toeplitz import CorrelatedNoise, inverse, optimised, rmse, square_root
from commonweight.recipe import Recipe
from commonweight.recipe.schema import FederationSpec
from commonweight.site.policy import Spent, decide_task
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Plan
from tests.unit.command_line import call
from tests.unit.site_policies import make_facts, make_policy
from tests.unit.test_private_runs import PRIVATE, Killed, _Notes, dying, private, theta_of
from tests.unit.test_stored_model import SITES, files_in, stored_update, strategy_of, tensors

MakeRecipe = Callable[..., Recipe]
Array = NDArray[np.float64]
BANDED = {**PRIVATE, "mechanism": {"name": "banded-toeplitz", "min_separation": 3}}
ALONE = {"rounds": 4, "cohort": 1, "weighting": "uniform"}


def dense(c: Array, n: int) -> Array:
    """C, written out."""
    matrix = np.zeros((n, n))
    for row, column in itertools.product(range(n), range(n)):
        if 0 <= row - column < len(c):
            matrix[row, column] = c[row - column]
    return matrix


# --- the factorization ------------------------------------------------------------------------------------------------


def test_known_errors_of_256_rounds_with_32_between() -> None:
    """Sensitivity times error, for 8 participations: 32.1 with independent noise, 11.6 with the square root, whose
    columns overlap, and 8.7 with an optimised band of 32."""
    n, between, k = 256, 32, 8
    assert math.sqrt(k) * rmse(np.ones(1), n) == pytest.approx(32.1, abs=0.05)
    whole = dense(square_root(n), n)
    overlapping = np.linalg.norm(whole[:, ::between].sum(axis=1))
    assert overlapping * rmse(square_root(n), n) == pytest.approx(11.6, abs=0.05)
    assert math.sqrt(k) * rmse(optimised(n, between), n) == pytest.approx(8.7, abs=0.05)


@pytest.mark.parametrize(("n", "band"), [(1, 1), (7, 3), (40, 7), (12, 30)])
def test_inverse_and_error_are_those_of_the_matrices(n: int, band: int) -> None:
    c = optimised(n, band)
    assert np.linalg.norm(c) == pytest.approx(1)
    assert len(c) == min(n, band)
    back = np.linalg.inv(dense(c, n))
    np.testing.assert_allclose(inverse(c, n), back[:, 0], atol=1e-9)
    sums = np.tril(np.ones((n, n))) @ back
    assert rmse(c, n) == pytest.approx(math.sqrt((sums**2).sum() / n), rel=1e-9)


def test_the_square_root_is_one() -> None:
    root = dense(square_root(30), 30)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((30, 30))), atol=1e-12)


@pytest.mark.parametrize(("n", "band"), [(30, 4), (64, 16)])
def test_no_other_band_nearby_has_less_error(n: int, band: int) -> None:
    draw, best = np.random.default_rng(0), optimised(n, band)
    assert rmse(best, n) < rmse(square_root(band) / np.linalg.norm(square_root(band)), n)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            other = best + size * draw.normal(size=band)
            assert np.linalg.norm(other) * rmse(other, n) >= rmse(best, n) * (1 - 1e-7)
    assert (optimised(n, band) == best).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(2, 24), between=st.integers(1, 6))
def test_participations_are_apart_whatever_a_site_sends(data: st.DataObject, n: int, between: int) -> None:
    """Independently: CG for one site's rows, in rounds at least as far apart as the band is wide."""
    c = optimised(n, data.draw(st.integers(1, between)))
    rounds, place = [], data.draw(st.integers(0, n - 1))
    while place < n:
        rounds.append(place)
        place += between + data.draw(st.integers(0, 3))
    assert len(rounds) <= math.ceil(n / between)
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = np.zeros((n, 5))
    for place in rounds:
        sent = draw.normal(size=5)
        rows[place] = sent / np.linalg.norm(sent) * draw.uniform(0, 1)
    assert np.linalg.norm(dense(c, n) @ rows) <= math.sqrt(len(rounds)) * (1 + 1e-9)


def test_what_is_added_is_the_strategy_undone() -> None:
    """Independently: the noise of the last b rounds, weighed with c, is this round's own independent noise."""
    keys = [bytes([place]) * 32 for place in range(9)]
    c = optimised(9, 4)
    noises = [CorrelatedNoise(keys[: t + 1], list(c)).values(2, 100, 50) for t in range(9)]
    for t, key in enumerate(keys):
        weighed = sum(c[j] * noises[t - j] for j in range(min(t + 1, len(c))))
        np.testing.assert_allclose(weighed, GaussianNoise(key).values(2, 100, 50), atol=1e-12)


def test_correlated_noise_is_the_same_in_stretches() -> None:
    noise = CorrelatedNoise([b"a" * 32, b"b" * 32, b"c" * 32], [0.8, 0.6])
    whole = noise.add_(torch.zeros(300_000), 2.0, number=1)
    part = noise.add_(torch.zeros(1000), 2.0, number=1, start=262_000)
    assert torch.equal(part, whole[262_000:263_000])


# --- who takes part when ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 4), separation=st.integers(1, 5), spare=st.integers(0, 5), seed=st.integers(0, 99))
def test_nobody_is_invited_again_too_soon(size: int, separation: int, spare: int, seed: int) -> None:
    sites = [f"s{place}" for place in range(size * separation + spare)]
    spec = FederationSpec.model_validate({"cohort": {"count": size}})
    commits: dict[int, dict[str, Any]] = {0: {}}
    for number in range(1, 13):
        resting = resting_sites(commits, number, separation)
        cohort = choose_cohort(sites, spec, seed=seed, round=number, resting=resting)
        assert len(cohort) == size
        commits[number] = {"cohort": list(cohort)}
    for site in sites:
        rounds = [number for number in range(1, 13) if site in commits[number]["cohort"]]
        assert all(later - earlier >= separation for earlier, later in itertools.pairwise(rounds))
        assert len(rounds) <= math.ceil(12 / separation)


def test_too_few_sites_for_the_separation_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(make_recipe, privacy=BANDED, federation={**ALONE, "cohort": 2})
    with pytest.raises(RecipeError, match="that takes 6 sites, and there are 3") as caught:
        run(recipe, tmp_path / "run")
    assert "at most 1" in caught.value.hint
    check_separation(6, recipe)
    wider = private(make_recipe, privacy=BANDED, federation={**ALONE, "over_selection": 2.0})
    with pytest.raises(RecipeError, match="takes 6 sites"):
        check_separation(5, wider)


def test_a_site_holds_the_coordinator_to_the_separation() -> None:
    facts = make_facts(separation=3)
    for nearest, allowed in ((None, True), (3, True), (2, False), (1, False)):
        decision = decide_task(make_policy(), facts, "train", 5, 5, Spent(nearest=nearest))
        assert decision.allowed == allowed
        assert allowed or "of 3 rounds in a row this site takes part in one" in decision.text
    assert decide_task(make_policy(), make_facts(), "train", 5, 5, Spent(nearest=1)).allowed


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()
    monkeypatch.setattr(private_rounds, "new_key", lambda: next(numbers).to_bytes(32, "big"))


@pytest.mark.usefixtures("keys")
def test_the_model_has_the_noise_of_the_factorization(tmp_path: Path) -> None:
    """Independently: after t rounds the model is off by zC/m times the rows of A·C⁻¹·Z; in memory and in files."""
    theta, chunk_bytes, rounds = tensors(0, mixed=False), 1024, 5
    recipe = Recipe.model_validate(
        {"name": "small", "privacy": BANDED, "federation": {"rounds": rounds, "cohort": 2, "weighting": "uniform"}}
    )
    notes = _Notes()
    models = {
        name: MemoryModel(
            strategy_of("fedavg"),
            theta.clone(),
            RunFolder(tmp_path / name, resume=False),
            lambda theta, path: None,
            private=PrivateRounds.of(changed, journal, 6),
        )
        for name, changed, journal in (
            ("loud", recipe, notes),
            ("quiet", recipe.model_copy(update={"privacy": without_noise(recipe)}), _Notes()),
        )
    }
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored = StoredModel(strategy_of("fedavg"), files, initial.digest, PrivateRounds.of(recipe, notes, 6))
    for model in (*models.values(), stored):
        model.first()
    width = sum(flat.numel() for _, flat in theta.floating())
    # every second key is the quiet run's
    z = np.stack([np.concatenate(noises(2 * number, theta)) for number in range(rounds)])
    assert z.shape == (rounds, width)
    c = optimised(rounds, 3)
    errors = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(dense(c, rounds)) @ z * 0.3 * 0.5 / 2
    for number in range(1, rounds + 1):
        for model in (*models.values(), stored):
            model.open()
        for place, site in enumerate(SITES[:2]):
            delta = tensors(100 * number + place, mixed=False)
            for model in models.values():
                model.fold(Update(site, number, {"delta": delta.clone()}, 1.0, 1, 1, 1))
            stored.fold(stored_update(tmp_path, site, 1.0, {"delta": delta}, chunk_bytes, number))
        for model in (models["loud"], stored, models["quiet"]):
            model.close(number)
        for model in models.values():
            model.committed(number)
        found = [np.concatenate([f.double().numpy() for _, f in m.state.theta.floating()]) for m in models.values()]
        np.testing.assert_allclose(found[0] - found[1], errors[number - 1], atol=2e-5)
        assert stored.digest() == models["loud"].state.theta.digest()
    assert [key for key in notes.kept if key.startswith("noise/")] == []


def without_noise(recipe: Recipe) -> Any:
    return recipe.privacy.model_copy(update={"noise_multiplier": 0.0})


def noises(key: int, theta: Any) -> list[Array]:
    rows = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
    noise = GaussianNoise(key.to_bytes(32, "big"))
    return [noise.values(rows[dtype], 0, flat.numel()) for dtype, flat in theta.floating()]


def noise_keys(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "state.sqlite") as database:
        found = [key for (key,) in database.execute("SELECT key FROM results WHERE key LIKE 'noise/%' ORDER BY key")]
    database.close()
    return found


@pytest.mark.usefixtures("keys")
@pytest.mark.kills
def test_a_killed_run_goes_on_with_the_same_noise_and_keeps_no_key(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private(make_recipe, privacy=BANDED, federation=ALONE)
    metrics = run(recipe, tmp_path / "whole")
    cohorts = Counter(site for record in metrics["rounds"] for site in record.get("cohort", ()))
    assert sorted(cohorts.values()) == [1, 1, 2]
    assert metrics["privacy"]["epsilon"] == pytest.approx(epsilon(Releases(0.3, 2), 1e-5))
    assert metrics["privacy"]["releases"] == 2
    assert noise_keys(tmp_path / "whole") == []
    whole = theta_of(tmp_path / "whole", 4)
    for method, before in (("put", False), ("commit", False), ("drop", False)):
        folder, keys_again = tmp_path / f"{method}-{before}", count()
        monkeypatch.setattr(private_rounds, "new_key", lambda numbers=keys_again: next(numbers).to_bytes(32, "big"))
        with monkeypatch.context() as patched:
            patched.setattr(Journal, method, dying(method, before=before))
            with pytest.raises(Killed):
                run(recipe, folder)
        assert noise_keys(folder)
        run(recipe, folder, resume=True)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in theta_of(folder, 4).items())
        assert noise_keys(folder) == []


def test_without_its_earlier_noise_a_run_does_not_go_on() -> None:
    notes = _Notes()
    recipe = Recipe.model_validate({"name": "small", "privacy": BANDED, "federation": {**ALONE, "rounds": 9}})
    PrivateRounds(recipe, notes, 8).mean(1)
    PrivateRounds(recipe, notes, 8).mean(2)
    notes.drop("noise/0001")
    with pytest.raises(StateError, match="the noise of round 1 is not in the journal"):
        PrivateRounds(recipe, notes, 8).mean(3)


def test_a_target_counts_participations_and_the_plan_says_them(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    sections = {"federation": {**ALONE, "rounds": 64}}
    mechanism = {"name": "banded-toeplitz", "min_separation": 8, "band": 5}
    target = {"dp": "site", "clip": 1.0, "delta": 1e-5, "epsilon": 8.0, "mechanism": mechanism}
    recipe = private(make_recipe, privacy=target, **sections)
    eight = epsilon(Releases(planned_noise(recipe), 8), 1e-5)
    assert 7.99 < eight <= 8
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"name": "small", "privacy": target, **sections}))
    planned = call("plan", file, "--json").json
    assert (planned["mechanism"], planned["participations"]) == ("banded-toeplitz", 8)
    assert planned["epsilon"] == pytest.approx(eight)
    assert planned["epsilon_after_round"][8] == pytest.approx(epsilon(Releases(planned_noise(recipe), 2), 1e-5))
    said = call("plan", file).out
    assert "8 times at most" in said
    assert "over 5 rounds" in said


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"mechanism": {"name": "banded-toeplitz", "min_separation": 3}}, "`mechanism` does nothing with dp: none"),
        ({**PRIVATE, "mechanism": "banded-toeplitz"}, "needs `min_separation`"),
        ({**PRIVATE, "mechanism": {"name": "gaussian", "band": 3}}, "`band` does nothing with gaussian"),
        (
            {**PRIVATE, "mechanism": {"name": "banded-toeplitz", "min_separation": 3, "band": 4}},
            "a site could take part in it twice",
        ),
        ({**BANDED, "adaptive_clip": {}}, "leave that out"),
        ({**PRIVATE, "mechanism": "laplace"}, "privacy.mechanism"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, privacy: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"name": "small", "federation": {"weighting": "uniform"}, "privacy": privacy}))
    answer = call("validate", str(file))
    assert answer.code == 2
    assert words in answer.err
