"""Runs with differential privacy of sites: their algebra, their noise across kills, what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commonweight.coordinator.stored_model import StoredModel
from commonweight.errors import RecipeError
from commonweight.federation import private_rounds
from commonweight.federation.folder import RunFolder
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.private_rounds import PrivateRounds, Seal
from commonweight.launch import run
from commonweight.model.tensors import l2_norm
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.noise import GaussianNoise
from commonweight.privacy.site_level import clip_
from commonweight.recipe import Recipe
from commonweight.strategies.update import Update
from commonweight.wire.frames import Channel, Plan
from tests.unit.command_line import call
from tests.unit.test_stored_model import SITES, files_in, stored_update, strategy_of, tensors

MakeRecipe = Callable[..., Recipe]
PRIVATE = {"dp": "site", "clip": 0.5, "delta": 1e-5, "noise_multiplier": 0.3}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise keys that come in order, so that a second drawing would show."""
    numbers = count()
    monkeypatch.setattr(private_rounds, "new_key", lambda: next(numbers).to_bytes(32, "big"))


def private(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    sections.setdefault("federation", {"rounds": 2, "weighting": "uniform"})
    sections.setdefault("privacy", PRIVATE)
    return make_recipe(**sections)


def theta_of(folder: Path, round: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "rounds" / f"{round:04d}" / "adapter_model.safetensors")


@pytest.mark.usefixtures("keys")
def test_a_round_adds_noise_of_the_stated_size_to_a_mean_of_clipped_updates(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Independently: with the same updates, the noisy and the noiseless model differ by zC/m times the key's noise."""
    federation = {"rounds": 1, "weighting": "uniform"}
    quiet = private(make_recipe, federation=federation, privacy={**PRIVATE, "noise_multiplier": 0.0})
    loud = private(make_recipe, federation=federation)
    run(quiet, tmp_path / "quiet")
    run(loud, tmp_path / "loud")
    theta = {name: _theta(tmp_path / name).double() for name in ("quiet", "loud")}
    noise = GaussianNoise((1).to_bytes(32, "big")).values(0, 0, len(theta["quiet"]))
    expected = theta["quiet"] + torch.from_numpy(noise) * 0.3 * 0.5 / 3
    torch.testing.assert_close(theta["loud"], expected, rtol=0, atol=2e-6)


def _theta(folder: Path) -> torch.Tensor:
    """The global tensors after the last round, as one row."""
    return load_file(next(folder.glob("state/*.safetensors")))["theta/float32"]


class Killed(Exception):
    pass


def dying(method: str, *, before: bool) -> Callable[..., Any]:
    """A method of the journal that dies when a round is released: before or after it has done its work."""
    original = getattr(Journal, method)

    def dies(journal: Journal, *arguments: Any) -> Any:
        released = arguments[0] != 0 if method == "commit" else str(arguments[0]).startswith("noise/")
        if released and before:
            raise Killed
        found = original(journal, *arguments)
        if released:
            raise Killed
        return found

    return dies


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.kills
def test_a_run_killed_around_a_release_publishes_one_noisy_sum_only(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    recipe = private(make_recipe, engine={"workers": workers, "device": "cpu"})
    run(recipe, tmp_path / "whole")
    whole = theta_of(tmp_path / "whole", 2)

    for method, before in (("put", False), ("commit", True), ("commit", False), ("drop", True), ("drop", False)):
        folder, keys_again = tmp_path / f"{method}-{before}", count()
        monkeypatch.setattr(private_rounds, "new_key", lambda numbers=keys_again: next(numbers).to_bytes(32, "big"))
        with monkeypatch.context() as patched:
            patched.setattr(Journal, method, dying(method, before=before))
            with pytest.raises(Killed):
                run(recipe, folder)
        metrics = run(recipe, folder, resume=True)
        for name, tensor in theta_of(folder, 2).items():
            assert torch.equal(tensor, whole[name]), (method, before, name)
        assert metrics["privacy"]["releases"] == 2


def test_the_noise_cannot_be_taken_off_once_a_round_is_committed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    keys: list[bytes] = []
    draw = private_rounds.new_key

    def noted() -> bytes:
        keys.append(draw())
        return keys[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(private_rounds, "new_key", noted)
        run(private(make_recipe), tmp_path / "run")
    assert len(set(keys)) == 2
    content = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("state.sqlite*"))
    assert b"privacy" in content
    assert not any(key.hex().encode() in content for key in keys)


def test_metrics_report_plan_and_ledger_say_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(make_recipe)
    metrics = run(recipe, tmp_path / "runs" / "one")
    cost = epsilon(Releases(0.3, 2), 1e-5)
    found = metrics["privacy"]
    assert found["epsilon"] == pytest.approx(cost, rel=1e-9)
    assert found["epsilon_rdp"] > found["epsilon"]
    assert (found["dp"], found["unit"], found["clip"], found["releases"]) == ("site", "site", 0.5, 2)
    assert f"ε = {cost:.2f}" in (tmp_path / "runs" / "one" / "report.html").read_text()
    run(recipe, tmp_path / "runs" / "two")
    planned = call("plan", str(tmp_path / "runs" / "one" / "recipe.yaml"), "--json").json
    assert planned["epsilon"] == pytest.approx(cost, rel=1e-9)
    assert len(planned["epsilon_after_round"]) == 2
    ledger = call("ledger", str(tmp_path / "runs"), "--json").json
    assert [entry["epsilon"] for entry in ledger["runs"]] == [pytest.approx(cost, rel=1e-9)] * 2
    sites = {row["site"]: row["epsilon"] for row in ledger["sites"]}
    assert set(sites) == {"north", "south", "west"}
    assert sites["north"] == pytest.approx(epsilon(Releases(0.3, 4), 1e-5), rel=1e-9)
    said = call("ledger", str(tmp_path / "runs")).out
    assert "Not covered by ε" in said
    run(make_recipe(), tmp_path / "runs" / "three")
    assert {row["epsilon"] for row in call("ledger", str(tmp_path / "runs"), "--json").json["sites"]} == {None}
    assert "∞" in call("ledger", str(tmp_path / "runs")).out
    only = call("ledger", str(tmp_path / "runs" / "one"), "--json", "--delta", "1e-6").json
    assert all(row["epsilon"] > cost for row in only["sites"])


def test_a_target_gives_the_noise(make_recipe: MakeRecipe) -> None:
    recipe = private(
        make_recipe,
        federation={"rounds": 20, "weighting": "uniform"},
        privacy={"dp": "site", "clip": 1.0, "delta": 1e-5, "epsilon": 8.0},
    )
    assert private_rounds.planned_noise(recipe) == pytest.approx(2.7, abs=0.05)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["fedavg", "fedadam", "diloco"])
def test_a_model_in_files_is_released_with_the_bits_of_one_in_memory(name: str, mixed: bool, tmp_path: Path) -> None:
    theta, chunk_bytes = tensors(0, mixed=mixed), 1024
    journal = _Notes()
    recipe = Recipe.model_validate(
        {"name": "small", "privacy": PRIVATE, "federation": {"rounds": 2, "weighting": "uniform"}}
    )
    memory = MemoryModel(
        strategy_of(name),
        theta.clone(),
        RunFolder(tmp_path / "run", resume=False),
        lambda theta, path: None,
        private=PrivateRounds.of(recipe, journal, 3),
    )
    memory.first()
    files = files_in(tmp_path)
    initial = files.write({"theta": theta}, Plan(theta.layout, (Channel("theta"),), chunk_bytes))
    stored = StoredModel(strategy_of(name), files, initial.digest, PrivateRounds.of(recipe, journal, 3))
    stored.first()
    for number in (1, 2):
        memory.open()
        stored.open()
        for place, site in enumerate(SITES[:2]):
            delta = tensors(100 * number + place, mixed=mixed)
            clip_(delta, 0.5)
            memory.fold(Update(site, number, {"delta": delta}, 1.0, 1, 1, 1))
            stored.fold(stored_update(tmp_path, site, 1.0, {"delta": delta}, chunk_bytes, number))
        memory.close(number)
        stored.close(number)
        memory.committed(number)
    assert stored.digest() == memory.state.theta.digest()


class _Notes:
    """A journal's results in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self.kept.get(key)

    def put(self, key: str, record: dict[str, Any]) -> None:
        self.kept[key] = dict(record)

    def drop(self, key: str) -> None:
        self.kept.pop(key, None)

    def last_round(self) -> int:
        return 0

    def commit(self, round: int, record: Any) -> None:
        raise NotImplementedError

    def commits(self) -> dict[int, dict[str, Any]]:
        return {}


def test_noise_lies_sealed_where_the_journal_is_sealed() -> None:
    notes = _Notes()
    recipe = Recipe.model_validate({"name": "small", "privacy": PRIVATE, "federation": {"weighting": "uniform"}})
    flipped = Seal(
        lambda name, key: bytes(b ^ 255 for b in key).hex(), lambda n, t: bytes(b ^ 255 for b in bytes.fromhex(t))
    )
    rounds = PrivateRounds(recipe, notes, 3, flipped)
    first = rounds.mean(1).noise.values(0, 0, 8)
    assert (PrivateRounds(recipe, notes, 3, flipped).mean(1).noise.values(0, 0, 8) == first).all()
    assert (PrivateRounds(recipe, notes, 3).mean(1).noise.values(0, 0, 8) != first).any()


def test_the_divisor_is_fixed_before_the_first_round() -> None:
    notes = _Notes()
    recipe = Recipe.model_validate({"name": "small", "privacy": PRIVATE, "federation": {"weighting": "uniform"}})
    assert PrivateRounds(recipe, notes, 8).expected == 8
    assert PrivateRounds(recipe, notes, 5).expected == 8


def test_updates_are_clipped_at_the_site(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    fold = MemoryModel.fold

    def noting(model: MemoryModel, update: Update) -> None:
        norms.append(l2_norm(update.delta))
        fold(model, update)

    monkeypatch.setattr(MemoryModel, "fold", noting)
    run(private(make_recipe, privacy={**PRIVATE, "clip": 0.01}), tmp_path / "run")
    assert len(norms) == 6
    assert all(0.009 < norm <= 0.01 * (1 + 1e-6) for norm in norms)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"dp": "site"}}, "needs `clip`"),
        ({"privacy": {"dp": "site", "clip": 1.0}}, "needs `delta`"),
        ({"privacy": {"dp": "site", "clip": 1.0, "delta": 1e-5}}, "`epsilon` or `noise_multiplier`"),
        ({"privacy": {**PRIVATE, "epsilon": 3.0}}, "and not both"),
        ({"privacy": {"clip": 1.0}}, "does nothing with dp: none"),
        ({"privacy": {**PRIVATE, "delta": 1.0}}, "privacy.delta"),
        ({"privacy": {**PRIVATE, "clip": 0.0}}, "privacy.clip"),
        ({"privacy": PRIVATE, "federation": {"weighting": "examples"}}, "use weighting: uniform"),
        ({"privacy": PRIVATE, "compression": "auto"}, "changes an update after it was clipped"),
    ],
)
def test_settings_that_promise_nothing_are_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    sections = {"federation": {"weighting": "uniform"}, **sections}
    file.write_text(json.dumps({"name": "small", **sections}))
    answer = call("validate", str(file))
    assert answer.code == 2
    assert words in answer.err


@pytest.mark.parametrize("strategy", ["scaffold", "median", "fednova", "rolora", "flexlora"])
def test_strategies_that_look_at_more_than_the_sum_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, strategy: str
) -> None:
    recipe = private(make_recipe, federation={"weighting": "uniform", "strategy": strategy})
    with pytest.raises(RecipeError, match="does not go with differential privacy of sites") as caught:
        run(recipe, tmp_path / "run")
    assert "fedavg" in caught.value.hint


def test_a_sum_strategy_of_ones_own_that_looks_further_is_not_private_unawares() -> None:
    from commonweight.strategies.fedavg import FedAvg

    class Curious(FedAvg):
        def open(self, state: Any) -> Any:
            return super().open(state)

    class Plain(FedAvg):
        pass

    assert not Curious.of_plain_mean
    assert Plain.of_plain_mean


def test_no_noise_is_said_to_be_no_privacy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    metrics = run(private(make_recipe, privacy={**PRIVATE, "noise_multiplier": 0.0}), tmp_path / "run")
    assert metrics["privacy"]["epsilon"] is None
    assert math.isinf(epsilon(Releases(0.0, 2), 1e-5))


def test_wrong_calls_are_explained(tmp_path: Path) -> None:
    for arguments in (["ledger", str(tmp_path / "nowhere")], ["ledger", str(tmp_path), "--delta", "2"]):
        answer = call(*arguments)
        assert answer.code in (2, 6)
        assert "Traceback" not in answer.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: small\n")
    (tmp_path / "run" / "state.sqlite").write_text("this is no database, whatever its name says, and never was one")
    answer = call("ledger", str(tmp_path))
    assert answer.code == 6
    assert "cannot be read" in answer.err


def test_commands_without_privacy(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: small\n")
    assert "ε = ∞" in call("plan", str(file)).out
    assert call("plan", str(file), "--json").json["epsilon"] is None
    (tmp_path / "runs").mkdir()
    assert "nothing is spent" in call("ledger", str(tmp_path / "runs")).out
