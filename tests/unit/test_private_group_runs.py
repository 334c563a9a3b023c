"""Runs with differential privacy of groups of rows, such as patients: kills, what is said, budgets, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commonweight.data.canaries import plant
from commonweight.data.sites import load_sites
from commonweight.engines import noise_secret
from commonweight.engines.bench import build_bench
from commonweight.engines.noise_secret import NoiseSecret
from commonweight.engines.work import TaskWork
from commonweight.errors import BudgetError, DataError, RecipeError, SiteError
from commonweight.federation.journal import Journal
from commonweight.launch import run
from commonweight.leaks.audit import claim
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.spending import cost
from commonweight.recipe import Recipe
from commonweight.recipe.schema import CanariesSpec
from tests.unit.command_line import call
from tests.unit.test_private_example_runs import Killed, adapter, at_site
from tests.unit.test_workshop import RUN, workshop_of
from tests.unit.tiny_tokenizers import bpe

MakeRecipe = Callable[..., Recipe]
#: `subject` has two rows each
PRIVATE = {"dp": "group", "by": "subject", "clip": 0.5, "delta": 1e-3, "noise_multiplier": 4.0}
#: groups that are not held out, and steps of two groups a round
GROUPS = {"north": (10, 5), "south": (7, 4), "west": (4, 2)}


def private(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    sections["privacy"] = {**PRIVATE, **sections.get("privacy", {})}
    sections["training"] = {"batch_size": 2, **sections.get("training", {})}
    return make_recipe(**sections)


@pytest.fixture
def one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same secret in every run, so that runs can be compared."""
    monkeypatch.setattr(noise_secret, "new_key", lambda: bytes(range(32)))


@pytest.mark.usefixtures("one_secret")
@pytest.mark.kills
def test_a_killed_run_ends_with_the_same_bits_whatever_the_workers(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(workers: int) -> Recipe:
        return private(
            make_recipe,
            federation={"rounds": 1},
            training={"steps": 2},
            privacy={"rows_per_group": 1, "noise_multiplier": 30.0},
            engine={"workers": workers, "device": "cpu"},
        )

    run(recipe(1), tmp_path / "whole")
    commit, done = Journal.commit, {"commits": 0}

    def dies(journal: Journal, number: int, record: dict[str, Any]) -> None:
        done["commits"] += 1
        if done["commits"] == 2:  # round 1 is trained, not committed
            raise Killed
        commit(journal, number, record)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "commit", dies)
        with pytest.raises(Killed):
            run(recipe(2), tmp_path / "killed")
    run(recipe(2), tmp_path / "killed", resume=True)
    whole = adapter(tmp_path / "whole")
    for name, tensor in adapter(tmp_path / "killed").items():
        assert torch.equal(tensor, whole[name]), name


def test_metrics_report_plan_and_ledger_say_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    metrics = run(private(make_recipe), tmp_path / "runs" / "one")
    found = metrics["privacy"]
    for site, (groups, steps) in GROUPS.items():
        cost = epsilon(Releases(4.0, 2 * steps, 2 / groups), 1e-3)
        assert found["sites"][site]["epsilon"] == pytest.approx(cost, rel=1e-6)
    assert found["epsilon"] == max(site["epsilon"] for site in found["sites"].values())
    assert (found["dp"], found["unit"], found["by"], found["rows_per_group"]) == (
        "group",
        "group by subject",
        "subject",
        4,
    )
    assert found["adjacency"] == "one subject of a site, with all of its rows, more or fewer"
    assert found["sampling"].startswith("Poisson's: a site draws each group")
    assert {name: site["train_groups"] for name, site in metrics["sites"].items()} == {
        name: groups for name, (groups, _) in GROUPS.items()
    }
    for round in metrics["rounds"]:
        assert (round["train_loss"], round["label_tokens"]) == (None, 0)
        assert round["examples"] == 2 * (5 + 4 + 2), "as many groups as were to be expected"
    page = (tmp_path / "runs" / "one" / "report.html").read_text()
    assert f"group (all rows of one subject), ε = {found['epsilon']:.2f}" in page

    recipe = str(tmp_path / "runs" / "one" / "recipe.yaml")
    planned = call("plan", recipe, "--json").json
    assert planned["epsilon"] == pytest.approx(found["epsilon"], rel=1e-6)
    assert planned["unit"] == "group by subject"
    assert {n: (site["groups"], site["steps"]) for n, site in planned["sites"].items()} == GROUPS
    one = call("plan", recipe, "--groups", "4", "--json").json
    assert one["epsilon"] == pytest.approx(planned["sites"]["west"]["epsilon"], rel=1e-6)
    assert "differential privacy of each subject" in call("plan", recipe).out
    assert "does not count with privacy.dp group" in call("plan", recipe, "--examples", "4").err

    ledger = call("ledger", str(tmp_path / "runs"), "--json").json
    assert [(entry["unit"], entry["mechanism"]) for entry in ledger["runs"]] == [("group by subject", "noisy steps")]
    of_groups = {a["site"]: a["epsilon"] for a in ledger["sites"] if a["unit"] == "group by subject"}
    assert of_groups == {site: pytest.approx(found["sites"][site]["epsilon"], rel=1e-6) for site in GROUPS}
    assert all(a["epsilon"] is None for a in ledger["sites"] if a["unit"] == "site")


def test_a_budget_of_groups_is_of_their_field(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    book = str(tmp_path / "book")
    set_to = ("--budget", "1", "--delta", "1e-3", "--unit", "group", "--by")
    call("ledger", book, *set_to, "subject")
    with pytest.raises(BudgetError, match="for each subject over all runs"):
        run(private(make_recipe, privacy={"noise_multiplier": 1.0}), tmp_path / "loud", ledger=Path(book))
    run(private(make_recipe, privacy={"noise_multiplier": 20.0}), tmp_path / "quiet", ledger=Path(book))
    call("ledger", book, *set_to, "doctor")
    with pytest.raises(BudgetError, match="for each doctor over all runs; ∞ is spent"):
        run(private(make_recipe, privacy={"noise_multiplier": 20.0}), tmp_path / "other", ledger=Path(book))
    assert "group with the field --by" in call("ledger", book, *set_to[:-1]).err


def test_each_site_plans_for_its_groups(make_recipe: MakeRecipe) -> None:
    bench = build_bench(private(make_recipe))
    assert {name: (one.count, one.sampling) for name, one in bench.planned.items()} == {
        name: (steps, 2 / groups) for name, (groups, steps) in GROUPS.items()
    }


# --- rows and recipes that cannot be


def test_a_row_without_an_owner_is_named(make_recipe: MakeRecipe, small_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in small_data.read_text().splitlines()]
    for row, patient in zip(rows, ("a", "b", " ", None), strict=False):
        row["patient"] = patient
    for row in rows[4:]:
        row["patient"] = row["subject"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = private(make_recipe, data={"path": str(path)}, privacy={"by": "patient"})
    with pytest.raises(DataError, match=r"privacy.by needs a value in 'patient', which 2 .* rows.jsonl, line 3"):
        build_bench(recipe)
    with pytest.raises(RecipeError, match=r"privacy.by names the field 'pateint', which no row has") as unknown:
        build_bench(private(make_recipe, data={"path": str(path)}, privacy={"by": "pateint"}))
    assert "did you mean 'patient'" in unknown.value.hint


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"by": None}}, "dp: group needs `by`"),
        ({"privacy": {"dp": "example"}}, "`by` does nothing with dp: example"),
        ({"privacy": {"dp": "site", "by": None, "rows_per_group": 2}}, "`rows_per_group` does nothing with dp: site"),
        ({"data": {"chunks": True}}, "joins rows of several groups"),
        ({"model": {"adapter": {"kind": "dora"}}}, "privacy.dp group needs each example's own gradient"),
        ({"federation": {"weighting": "tokens"}}, "weighting: examples or uniform"),
        ({"privacy": {"adaptive_clip": {}}}, "adaptive_clip"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(make_recipe: MakeRecipe, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        private(make_recipe, **sections)


# --- canaries


def test_a_canary_has_a_group_of_its_own_with_its_copies(make_recipe: MakeRecipe) -> None:
    recipe, tokenizer = private(make_recipe), bpe()
    sites, _ = load_sites(recipe.data, seed=0, tokenizer=tokenizer, max_tokens=48, owner="subject")
    planted, canaries = plant(sites, CanariesSpec(count=20, repeat=3), seed=0, tokenizer=tokenizer)
    for before, after in zip(sites, planted, strict=True):
        assert after.units[: len(before.units)] == before.units
        own = sum(canaries.planted[i] for i, site in enumerate(canaries.sites) if site == before.name)
        added = after.units[len(before.units) :]
        assert [len(unit) for unit in added] == [3] * own
        for unit in added:
            assert len({after.train.ids_of(row).tobytes() for row in unit}) == 1
    private(make_recipe, privacy={"canaries": {"count": 20, "repeat": 3}})  # what an example would not cover


def test_an_audit_takes_the_claim_of_groups_as_it_stands() -> None:
    found = claim({"dp": "group", "by": "patient", "epsilon": 3.0, "delta": 1e-6})
    assert (found["epsilon"], found["delta"]) == (3.0, 1e-6)
    assert "a patient with all rows more or fewer" in found["why"]


# --- sites of a network


@pytest.mark.usefixtures("one_secret")
def test_a_networked_site_gives_the_bits_of_one_machine_and_refuses_more_steps(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = private(make_recipe, privacy={"rows_per_group": 1})
    workshop, task, base = at_site(recipe, small_data, tmp_path / "site")
    there = workshop.train(RUN, task, base)
    bench = build_bench(recipe)
    bench.secret = NoiseSecret(tmp_path)
    bench.secret.make()
    delta = NamedTensors.empty(bench.theta.layout)
    TaskWork(bench, tmp_path, lambda _: None).train(replace(task, site="south"), base, delta, {})
    assert there.channels["delta"].digest() == delta.digest()
    assert (there.num_examples, there.num_label_tokens, set(there.metrics)) == (8, 0, {"seconds"})

    moved = base["theta"].clone()
    next(iter(moved.flats.values()))[0] += 1e-3
    again = workshop_of(tmp_path / "site", small_data, partition="south")
    again.train(RUN, task, {"theta": moved})
    with pytest.raises(SiteError, match="planned for 8 steps in the whole run; 8 are spent"):
        again.train(RUN, replace(task, round=2), base)


def test_a_site_says_how_many_groups_it_has(make_recipe: MakeRecipe, small_data: Path, tmp_path: Path) -> None:
    from commonweight.engines.handshake import handshake
    from tests.unit.test_workshop import job_of

    recipe = private(make_recipe)
    workshop = workshop_of(tmp_path, small_data, partition="south")
    facts = workshop.join(job_of(recipe, must_match=handshake(build_bench(recipe))))
    assert (facts["train_groups"], facts["steps"]) == GROUPS["south"]


def test_a_sites_policy_knows_what_a_job_promises(make_recipe: MakeRecipe) -> None:
    from commonweight.site.policy import _planned_epsilon, _promised

    recipe = private(make_recipe, privacy={"noise_multiplier": None, "epsilon": 4.0})
    assert _planned_epsilon(recipe) == 4.0
    promised = _promised(recipe)
    assert promised.unit == "group by subject"
    assert 3.99 < cost([replace(promised, count=2)], "group by subject", 1e-3) <= 4.0
