"""Runs with differential privacy of examples: kills, what is said of them, what is refused, sites of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commonweight.engines import noise_secret
from commonweight.engines.bench import build_bench
from commonweight.engines.handshake import handshake
from commonweight.engines.noise_secret import SECRET_FILE, NoiseSecret
from commonweight.engines.work import TaskWork
from commonweight.errors import BudgetError, RecipeError, SiteError
from commonweight.federation.journal import Journal
from commonweight.federation.messages import TrainTask
from commonweight.launch import run
from commonweight.model.tensors import NamedTensors
from commonweight.privacy.spending import cost
from commonweight.recipe import Recipe
from commonweight.site.workshop import RecipeWorkshop
from commonweight.train.batches import UnitBatch
from commonweight.train.per_example import Backward, ExampleGradients
from tests.unit.command_line import call
from tests.unit.test_workshop import RUN, job_of, workshop_of

MakeRecipe = Callable[..., Recipe]
PRIVATE = {"dp": "example", "clip": 0.5, "delta": 1e-3, "noise_multiplier": 4.0}


def private(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    sections.setdefault("privacy", PRIVATE)
    return make_recipe(**sections)


@pytest.fixture
def one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same secret in every run, so that runs can be compared."""
    monkeypatch.setattr(noise_secret, "new_key", lambda: bytes(range(32)))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class Killed(Exception):
    pass


@pytest.mark.usefixtures("one_secret")
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.kills
def test_a_killed_run_ends_with_the_same_bits_whatever_the_workers(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def recipe(workers: int) -> Recipe:
        return private(
            make_recipe,
            model={"adapter": {"r": 2, "alpha": 4, "dropout": 0.1}},
            federation={"rounds": 2, "strategy": strategy},
            privacy={**PRIVATE, "noise_multiplier": 30.0},
            engine={"workers": workers, "device": "cpu"},
        )

    run(recipe(1), tmp_path / "whole")
    whole = adapter(tmp_path / "whole")
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
    assert (tmp_path / "killed" / SECRET_FILE).exists()
    metrics = run(recipe(2), tmp_path / "killed", resume=True)
    for name, tensor in adapter(tmp_path / "killed").items():
        assert torch.equal(tensor, whole[name]), name
    assert not (tmp_path / "killed" / SECRET_FILE).exists()
    assert {site["count"] for site in metrics["privacy"]["sites"].values()} == {10, 8, 4}


def test_noise_is_drawn_anew_by_every_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Everybody knows a recipe's seed."""
    recipe = private(make_recipe, federation={"rounds": 1}, privacy={**PRIVATE, "noise_multiplier": 30.0})
    digests = {run(recipe, tmp_path / name)["adapter"]["digest"] for name in ("a", "b")}
    assert len(digests) == 2


def test_metrics_report_plan_and_ledger_say_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """And what an accountant of its own says: dp-accounting, called here."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    metrics = run(private(make_recipe), tmp_path / "runs" / "one")
    found = metrics["privacy"]
    sizes = {"north": (20, 5), "south": (14, 4), "west": (8, 2)}  # rows that are not held out, steps of 4 a round
    for site, (examples, steps) in sizes.items():
        accountant = PLDAccountant()
        accountant.compose(PoissonSampledDpEvent(4 / examples, GaussianDpEvent(4.0)), 2 * steps)
        cost = accountant.get_epsilon(1e-3)
        assert found["sites"][site]["epsilon"] == pytest.approx(cost, rel=1e-6)
        assert found["sites"][site]["count"] == 2 * steps
    assert found["epsilon"] == max(site["epsilon"] for site in found["sites"].values())
    assert found["epsilon_rdp"] > found["epsilon"]
    assert (found["dp"], found["unit"], found["clip"]) == ("example", "example", 0.5)
    page = (tmp_path / "runs" / "one" / "report.html").read_text()
    assert f"ε = {found['epsilon']:.2f}" in page

    planned = call("plan", str(tmp_path / "runs" / "one" / "recipe.yaml"), "--json").json
    assert planned["epsilon"] == pytest.approx(found["epsilon"], rel=1e-6)
    assert {name: site["examples"] for name, site in planned["sites"].items()} == {n: s for n, (s, _) in sizes.items()}
    assert len(planned["epsilon_after_round"]) == 2
    one = call("plan", str(tmp_path / "runs" / "one" / "recipe.yaml"), "--examples", "8", "--json").json
    assert one["epsilon"] == pytest.approx(planned["sites"]["west"]["epsilon"], rel=1e-6)
    text = call("plan", str(tmp_path / "runs" / "one" / "recipe.yaml")).out
    assert "differential privacy of each example" in text
    assert "Not covered by ε" in text
    ledger = call("ledger", str(tmp_path / "runs"), "--json").json
    assert [(entry["unit"], entry["mechanism"]) for entry in ledger["runs"]] == [("example", "noisy steps")]
    of_examples = {a["site"]: a["epsilon"] for a in ledger["sites"] if a["unit"] == "example"}
    assert of_examples == {site: pytest.approx(found["sites"][site]["epsilon"], rel=1e-6) for site in sizes}
    assert all(a["epsilon"] is None for a in ledger["sites"] if a["unit"] == "site"), "nothing bounds all rows together"


def test_a_budget_of_examples_is_charged_when_a_round_opens(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A site's update is a release as soon as it is sent."""
    recipe = private(make_recipe, privacy={**PRIVATE, "noise_multiplier": 20.0})
    call("ledger", str(tmp_path / "book"), "--budget", "0.2", "--delta", "1e-3", "--unit", "example", "--json")
    with pytest.raises(BudgetError, match="the budget is ε"):
        run(private(make_recipe), tmp_path / "loud", ledger=tmp_path / "book")
    assert not list((tmp_path / "loud" / "rounds").glob("*"))
    run(recipe, tmp_path / "quiet", ledger=tmp_path / "book")


def test_what_was_drawn_is_not_told(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Losses on training rows, and numbers of drawn examples and tokens, would say more than the noisy steps do."""
    metrics = run(private(make_recipe, federation={"rounds": 1}), tmp_path / "run")
    (round,) = metrics["rounds"]
    assert round["train_loss"] is None
    assert round["label_tokens"] == 0
    assert round["examples"] == 4 * (5 + 4 + 2), "as many as were to be expected"
    events = (tmp_path / "run" / "events.jsonl").read_text()
    accepted = [line for line in events.splitlines() if "update_accepted" in line]
    assert len(accepted) == 3
    assert not any('"loss"' in line for line in accepted)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "nan" not in page.lower().split("<body")[1]


def test_a_site_pays_for_the_rounds_in_which_it_takes_part(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(make_recipe, training={"steps": 1}, federation={"rounds": 3, "cohort": 1})
    metrics = run(recipe, tmp_path / "run")
    found, asked = metrics["privacy"], [site for round in metrics["rounds"] for site in round["cohort"]]
    assert {name: site["rounds"] for name, site in found["sites"].items()} == {n: asked.count(n) for n in set(asked)}
    assert all(site["count"] == site["rounds"] for site in found["sites"].values())
    assert found["rounds_planned"] == 3
    assert max(asked.count(name) for name in asked) < 3, "as this seed draws"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "planned for three rounds; the busiest site took part in" in page


def test_controls_are_said_to_be_without_noise(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(
        make_recipe, federation={"rounds": 1}, training={"steps": 1}, evaluation={"controls": ["local", "centralised"]}
    )
    run(recipe, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "local and the centralised control trained without it" in page


def test_noise_that_is_not_there_is_infinite_epsilon(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(make_recipe, federation={"rounds": 1}, privacy={**PRIVATE, "noise_multiplier": 0.0})
    assert run(recipe, tmp_path / "run")["privacy"]["epsilon"] is None
    assert "∞" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"adapter": {"kind": "dora"}}}, "adapter.kind dora"),
        ({"model": {"adapter": {"kind": "full"}}}, "adapter.kind full"),
        ({"model": {"adapter": {"kind": "ia3"}}}, "adapter.kind ia3"),
        ({"model": {"adapter": {"kind": "prompt"}}}, "adapter.kind prompt"),
        ({"model": {"adapter": {"budget": {"north": 0.5}}}}, "leave them out"),
        ({"training": {"gradient_checkpointing": True}}, "gradient_checkpointing: false"),
        ({"federation": {"weighting": "tokens"}}, "weighting: examples or uniform"),
        ({"privacy": {"clip": None}}, "needs `clip`"),
        ({"privacy": {"epsilon": 8.0}}, "and not both"),
        ({"privacy": {"adaptive_clip": {}}}, "adaptive_clip"),
        ({"privacy": {"mechanism": {"name": "banded-toeplitz", "min_separation": 2}}}, "mechanism"),
    ],
)
def test_recipes_whose_noise_would_not_cover_all_are_refused(
    make_recipe: MakeRecipe, sections: dict[str, Any], words: str
) -> None:
    sections["privacy"] = {**PRIVATE, **sections.get("privacy", {})}
    with pytest.raises(ValueError, match=words):
        make_recipe(**sections)


def test_an_objective_that_does_not_know_single_examples_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commonweight.train.sft import SupervisedFineTuning

    monkeypatch.setattr(SupervisedFineTuning, "of_examples", False)
    with pytest.raises(RecipeError, match="a sum over examples"):
        run(private(make_recipe), tmp_path / "run")


@pytest.mark.usefixtures("one_secret")
@pytest.mark.parametrize("unit", ["example", "group"])
def test_a_packed_step_is_the_padded_one(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """The same draws, the same noise: what differs is the order in which numbers are added up."""
    deltas: list[torch.Tensor] = []
    passes: list[list[tuple[int, int]]] = []
    take = ExampleGradients.take

    def counting(self: ExampleGradients, units: UnitBatch, backward: Backward) -> Any:
        passes[-1].append((len(units.batch.ids), len(units.pieces)))
        return take(self, units, backward)

    for packing in (False, True):
        privacy = {**PRIVATE, "dp": unit, **({"by": "subject"} if unit == "group" else {})}
        training = {"packing": packing, "max_tokens": 96, "batch_size": 6, "micro_batch_size": 5, "optimizer": "sgd"}
        bench = build_bench(private(make_recipe, privacy=privacy, training=training))
        bench.secret = NoiseSecret(tmp_path)
        bench.secret.make()
        passes.append([])
        task, delta = TrainTask(1, "north", 0.5, bench.facts.steps["north"]), NamedTensors.empty(bench.theta.layout)
        with monkeypatch.context() as patched:
            patched.setattr(ExampleGradients, "take", counting)
            TaskWork(bench, tmp_path, lambda _: None).train(task, {"theta": bench.theta}, delta, {})
        deltas.append(delta.flats[torch.float32])
    padded, packed = passes
    assert float((deltas[0] - deltas[1]).norm()) < 1e-4 * float(deltas[0].norm())
    assert sum(examples for _, examples in packed) == sum(examples for _, examples in padded)
    assert sum(sequences for sequences, _ in packed) < 0.7 * sum(sequences for sequences, _ in padded)
    assert max(examples for _, examples in packed) <= 5, "as many copies of the gradient as the recipe allows"


# --- sites of a network


def at_site(recipe: Recipe, data: Path, folder: Path) -> tuple[RecipeWorkshop, TrainTask, dict[str, NamedTensors]]:
    """A workshop that has joined as the part `south`, round 1's task and the global tensors."""
    bench = build_bench(recipe)
    workshop = workshop_of(folder, data, partition="south")
    workshop.join(job_of(recipe, must_match=handshake(bench)))
    task = TrainTask(1, "clinic", 0.01, bench.facts.steps["south"])
    return workshop, task, {"theta": bench.theta}


@pytest.mark.usefixtures("one_secret")
def test_a_networked_site_gives_the_bits_of_one_machine(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = private(make_recipe)
    workshop, task, base = at_site(recipe, small_data, tmp_path / "site")
    there = workshop.train(RUN, task, base)
    bench = build_bench(recipe)
    bench.secret = NoiseSecret(tmp_path)
    bench.secret.make()
    delta = NamedTensors.empty(bench.theta.layout)
    here = TaskWork(bench, tmp_path, lambda _: None).train(replace(task, site="south"), base, delta, {})
    assert there.channels["delta"].digest() == delta.digest()
    assert (there.num_examples, there.num_label_tokens) == (16, 0) == (here.figures["num_examples"], 0)
    assert set(there.metrics) == {"seconds"}

    killed = workshop_of(tmp_path / "site", small_data, partition="south")
    assert killed.train(RUN, task, base).channels["delta"].digest() == delta.digest()


def test_a_coordinator_that_asks_again_from_another_model_gets_other_noise_and_no_more_of_it(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path
) -> None:
    """The difference of two updates with the same noise would have none. The run has two rounds of 4 steps."""
    recipe = private(make_recipe, privacy={**PRIVATE, "noise_multiplier": 1e4})
    workshop, task, base = at_site(recipe, small_data, tmp_path / "site")
    moved = base["theta"].clone()
    next(iter(moved.flats.values()))[0] += 1e-3
    first, again, other = (workshop.train(RUN, task, {"theta": t}) for t in (base["theta"], base["theta"], moved))
    delta = [work.channels["delta"].flats[torch.float32] for work in (first, again, other)]
    assert torch.equal(delta[0], delta[1])
    assert float((delta[0] - delta[2]).norm()) > 0.1 * float(delta[0].norm())
    workshop = workshop_of(tmp_path / "site", small_data, partition="south")  # a restart resets nothing
    with pytest.raises(SiteError, match="planned for 8 steps in the whole run; 8 are spent"):
        workshop.train(RUN, replace(task, round=2), base)
    workshop.forget(RUN)
    assert not (tmp_path / "site" / "runs" / RUN / SECRET_FILE).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"correction": {"kind": "own", "pull": 0.1, "effort": 1.0}},
        {"start": {"kind": "least-loss", "of": 2, "rows": 4}},
    ],
)
def test_a_site_does_nothing_that_noise_would_not_cover(
    make_recipe: MakeRecipe, small_data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    workshop, task, base = at_site(private(make_recipe), small_data, tmp_path / "site")
    with pytest.raises(SiteError, match="the task asks"):
        workshop.train(RUN, replace(task, **changes), {**base, "cluster-1": base["theta"]})


def test_a_sites_policy_knows_what_a_job_promises(make_recipe: MakeRecipe) -> None:
    from commonweight.site.policy import _planned_epsilon

    promised = {"dp": "example", "clip": 0.5, "delta": 1e-3, "epsilon": 4.0}
    assert _planned_epsilon(private(make_recipe, privacy=promised)) == 4.0
    assert _planned_epsilon(private(make_recipe)) is None, "what a noise costs depends on the site's size"


def test_what_a_job_promises_costs_no_more_than_it_says(make_recipe: MakeRecipe) -> None:
    from commonweight.site.policy import _promised

    promised = private(make_recipe, privacy={"dp": "example", "clip": 0.5, "delta": 1e-3, "epsilon": 4.0})
    whole = replace(_promised(promised), count=2)
    assert 3.99 < cost([whole], "example", 1e-3) <= 4.0
    assert cost([_promised(private(make_recipe))], "example", 1e-3) == math.inf
    known = _promised(private(make_recipe, training={"steps": 3}))
    assert (known.noise_multiplier, known.sampling, known.count) == (4.0, 1.0, 3)
