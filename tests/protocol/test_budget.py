"""A coordinator's ledger and its budget over all runs, against a coordinator that serves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.spending import Budget
from commonweight.wire import protocol_pb2 as pb
from tests.unit.command_line import call

from .federations import Coordinator, Hand

PRIVATE = {"dp": "site", "clip": 1.0, "delta": 1e-5, "noise_multiplier": 4.0}
THREE_ROUNDS = epsilon(Releases(4.0, 3), 1e-5)


@pytest.fixture
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator whose sites may take part in three rounds of such runs."""
    budget = Budget(unit="site", epsilon=THREE_ROUNDS, delta=1e-5)
    with Coordinator(tmp_path_factory.mktemp("strict"), privacy_budget=budget) as coordinator:
        yield coordinator


def private_job(lead: Hand, **options: Any) -> pb.Job:
    return lead.job(privacy=PRIVATE, weighting="uniform", **options)


def test_the_release_that_would_exceed_the_budget_is_not_made(strict: Coordinator) -> None:
    lead = strict.hand("lena", "lead")
    sites = {name: strict.site(name) for name in ("north", "south")}
    first = lead.wait(lead.submit(private_job(lead, rounds=2, name="first")))
    assert first["round"] == 2
    second = lead.wait(lead.submit(private_job(lead, rounds=2, name="second")), "failed")
    assert second["round"] == 1, "one round was left"
    assert "the budget is ε =" in second["error"]
    assert "the model is as the round before left it" in second["hint"]
    assert sites["north"].trained == [1, 2, 1], "nobody trains for a round that may not be released"
    strict.restart()
    for site in sites.values():
        site.attend()
    third = lead.wait(lead.submit(private_job(lead, name="third", sites=["north"])), "failed")
    assert third["round"] == 0, "a restart gives nothing back"
    open_to_all = lead.wait(lead.submit(lead.job(name="fourth", sites=["south"])), "failed")
    assert "would make it ∞" in open_to_all["error"]

    answer = call("ledger", "--coordinator", "--identity", lead.identity.path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["budget"] == {"unit": "site", "epsilon": THREE_ROUNDS, "delta": 1e-5}
    assert [row["releases"] for row in answer.json["runs"]] == [2, 1]
    for row in answer.json["sites"]:
        assert row["epsilon"] == pytest.approx(THREE_ROUNDS, rel=1e-9)
        assert row["left"] == pytest.approx(0, abs=1e-6)
    said = call("ledger", "--coordinator", "--identity", lead.identity.path).out
    assert f"{THREE_ROUNDS:.3f}" in said


def test_without_a_budget_the_ledger_shows_what_was_not_protected(coordinator: Coordinator, lead: Hand) -> None:
    coordinator.site("unbounded")
    lead.wait(lead.submit(lead.job(name="free", sites=["unbounded"])))
    found = call("ledger", "--coordinator", "--identity", lead.identity.path, "--json").json
    assert found["budget"] is None
    (row,) = [row for row in found["sites"] if row["site"] == "unbounded"]
    assert (row["unit"], row["epsilon"], row["left"]) == ("site", None, None)


def test_a_clipping_norm_follows_what_sites_say_of_their_updates(coordinator: Coordinator, lead: Hand) -> None:
    """Without noise: b̃ is ½, then 1. What a site says that makes no sense counts as any other."""
    said = {1: (0.0, 1.0), 2: (1.0, 7e9)}
    asked: dict[str, list[float]] = {"within": [], "beyond": []}

    def train(place: int) -> Any:
        def answer(site: Any, task: pb.Task) -> None:
            asked[site.name].append(json.loads(task.body)["clip"])
            site.update(task, metrics={"loss": 1.0, "under_clip": said[task.round][place]})

        return answer

    coordinator.site("within", train=train(0))
    coordinator.site("beyond", train=train(1))
    privacy = {**PRIVATE, "noise_multiplier": 0.0, "adaptive_clip": {"quantile": 0.5, "lr": 0.2}}
    job = lead.job(privacy=privacy, weighting="uniform", rounds=2, name="adaptive", sites=["within", "beyond"])
    ended = lead.wait(lead.submit(job))
    assert asked["within"] == asked["beyond"] == [1.0, 1.0]
    assert [round["privacy"]["share"] for round in ended["history"]] == [0.5, 1.0]
    assert ended["history"][1]["privacy"]["next_clip"] == pytest.approx(math.exp(-0.2 * 0.5))


def test_correlated_noise_keeps_sites_apart_and_no_key_outlives_its_run(strict: Coordinator) -> None:
    lead = strict.hand("lena", "lead")
    names = ["east", "north", "south", "west"]
    for name in names:
        strict.site(name)
    privacy = {**PRIVATE, "mechanism": {"name": "banded-toeplitz", "min_separation": 2}}
    options: dict[str, Any] = {"privacy": privacy, "weighting": "uniform", "cohort": 2, "sites": names}
    six = lead.wait(lead.submit(lead.job(rounds=6, name="six", **options)))
    cohorts = [set(round["cohort"]) for round in six["history"]]
    assert all(not earlier & later for earlier, later in itertools.pairwise(cohorts))
    found = lead.json("Control/ReadLedger", pb.LedgerRequest())
    assert {(line["site"], line["mechanism"], line["count"]) for line in found["lines"]} == {
        (name, "banded-toeplitz", 3) for name in names
    }
    failed = lead.wait(lead.submit(lead.job(rounds=6, name="seven", **options)), "failed")
    assert failed["round"] == 0, "three rounds are all that the budget allows"
    too_few = lead.wait(lead.submit(lead.job(rounds=2, name="few", **{**options, "sites": names[:3]})), "failed")
    assert "that takes 4 sites, and there are 3" in too_few["error"]
    store = strict.replica.here.store
    assert all(store.result(run.id, f"noise/{n:04d}") is None for run in store.runs() for n in range(1, 7))
