"""The ledger across runs: what releases cost whom, budgets that refuse, kills between a charge and a release."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from commonweight.coordinator import tables
from commonweight.coordinator.store import Store
from commonweight.errors import BudgetError, StateError
from commonweight.federation.global_model import MemoryModel
from commonweight.federation.journal import Journal
from commonweight.federation.ledger import Line, accounts, by_run
from commonweight.federation.ledger_file import LedgerFile
from commonweight.launch import run
from commonweight.privacy.accounting import Releases, epsilon, epsilon_of_all, noise_multiplier
from commonweight.privacy.spending import UNPROTECTED, Budget, Spend, cost
from commonweight.recipe import Recipe
from tests.unit.command_line import call
from tests.unit.test_private_runs import private, theta_of

MakeRecipe = Callable[..., Recipe]
SITE = Spend("site", "gaussian", 4.0)
ROWS = Spend("example", "dp-sgd", 1.2, sampling=0.05, count=40)


def budget(epsilon: float, unit: str = "site", delta: float = 1e-5) -> Budget:
    return Budget.model_validate({"unit": unit, "epsilon": epsilon, "delta": delta})


# --- what a release costs ---------------------------------------------------------------------------------------------


def test_costs_of_one_unit_add_up_as_one_plan() -> None:
    assert cost([SITE] * 9, "site", 1e-5) == pytest.approx(epsilon(Releases(4.0, 9), 1e-5), rel=1e-12)
    assert cost([ROWS, ROWS], "example", 1e-5) == pytest.approx(epsilon(Releases(1.2, 80, 0.05), 1e-5), rel=1e-9)
    assert cost([], "site", 1e-5) == 0


def test_an_examples_update_is_replaced_where_a_sites_is_left_out() -> None:
    """Independently: two updates in a ball of radius C are up to 2C apart, so that z protects an example like z/2."""
    assert cost([SITE] * 3, "example", 1e-5) == pytest.approx(epsilon(Releases(2.0, 3), 1e-5), rel=1e-12)
    both = epsilon_of_all([Releases(2.0, 3), Releases(1.2, 40, 0.05)], 1e-5)
    assert cost([SITE, ROWS, SITE, SITE], "example", 1e-5) == pytest.approx(both, rel=1e-9)


def test_what_a_run_that_protects_groups_costs() -> None:
    """A row more or fewer leaves its group where it is: its gradient is replaced, and no longer away from another than
    twice the bound."""
    patients = Spend("group by patient", "noisy steps", 4.0, sampling=0.05, count=20)
    assert cost([patients], "group by patient", 1e-5) == pytest.approx(epsilon(Releases(4.0, 20, 0.05), 1e-5), rel=1e-9)
    for unit in ("site", "group by doctor"):
        assert cost([patients], unit, 1e-5) == math.inf
    of_examples = cost([patients], "example", 1e-5)
    # more than with half the noise on examples that come and go; less than if every group were in every step
    assert epsilon(Releases(2.0, 20, 0.05), 1e-5) < of_examples < epsilon(Releases(2.0, 20), 1e-5)
    assert cost([patients, SITE], "example", 1e-5) > of_examples
    assert cost([ROWS], "group by patient", 1e-5) == cost([UNPROTECTED], "group by patient", 1e-5) == math.inf
    assert cost([SITE] * 3, "group by patient", 1e-5) == pytest.approx(epsilon(Releases(2.0, 3), 1e-5), rel=1e-12)
    assert patients.adjacency == "one patient of a site, with all of its rows, more or fewer"


def test_a_budget_of_groups_names_their_field() -> None:
    patients = Budget(unit="group", by="patient", epsilon=1.0, delta=1e-5)
    assert patients.protects == "group by patient"
    more = Spend("group by patient", "noisy steps", 0.5, count=3)
    assert "for each patient over all runs; 0.000 is spent" in patients.excess([], more)
    for wrong in ({"unit": "group"}, {"unit": "site", "by": "patient"}):
        with pytest.raises(ValueError, match="unit: group needs `by`"):
            Budget.model_validate({**wrong, "epsilon": 1.0, "delta": 1e-5})


def test_what_is_not_protected_costs_everything() -> None:
    assert cost([SITE, UNPROTECTED], "site", 1e-5) == cost([UNPROTECTED], "example", 1e-5) == math.inf
    assert cost([ROWS], "site", 1e-5) == math.inf
    assert not math.isinf(cost([ROWS, SITE], "example", 1e-5))


@settings(max_examples=60, deadline=None)
@given(noises=st.lists(st.floats(0.5, 20), min_size=1, max_size=8), allowed=st.floats(0.05, 30))
def test_a_budget_lets_through_what_fits_and_nothing_more(noises: list[float], allowed: float) -> None:
    """Independently: squared ratios of C to σ add up, and one Gaussian release has their root."""
    before: list[Spend] = []
    for z in noises:
        more = Spend("site", "gaussian", z)
        squared = sum(1 / spend.noise_multiplier**2 for spend in [*before, more])
        fits = epsilon(Releases(1 / math.sqrt(squared), 1), 1e-5) <= allowed * (1 - 1e-9)
        why = budget(allowed).excess(before, more)
        assert bool(why) != fits or abs(cost([*before, more], "site", 1e-5) - allowed) < 1e-6
        if not why:
            before.append(more)
        assert cost(before, "site", 1e-5) <= allowed
        assert budget(allowed).left(before) == pytest.approx(allowed - cost(before, "site", 1e-5))


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.sampled_from([SITE, Spend("site", "banded-toeplitz", 2.5, count=3)]), max_size=5),
    z=st.floats(0.5, 20),
    more=st.integers(1, 9),
    wider=st.floats(1.0, 3),
    unit=st.sampled_from(["site", "example"]),
)
def test_a_ledger_never_falls_and_more_noise_never_costs_more(
    before: list[Spend], z: float, more: int, wider: float, unit: Any
) -> None:
    spent, one = cost(before, unit, 1e-5), Spend("site", "gaussian", z)
    after = cost([*before, one], unit, 1e-5)
    assert after >= spent
    assert cost([*before, *[one] * more], unit, 1e-5) >= after
    assert cost([*before, Spend("site", "gaussian", z * wider)], unit, 1e-5) <= after * (1 + 1e-9)
    assert cost([one, *before], unit, 1e-5) == pytest.approx(after, rel=1e-9)
    assert cost([*before, one], "example", 1e-5) >= cost([*before, one], "site", 1e-5)


def test_accounts_by_site_and_unit() -> None:
    lines = [Line("one", "north", SITE), Line("two", "north", ROWS), Line("one", "south", SITE)]
    found = {(a.site, a.unit): a for a in accounts(lines, 1e-5, budget(9.0, "example"))}
    assert set(found) == {(site, unit) for site in ("north", "south") for unit in ("site", "example")}
    assert found["north", "site"].epsilon == math.inf
    assert found["north", "site"].left is None
    assert found["south", "example"].left == pytest.approx(9 - epsilon(Releases(2.0, 1), 1e-5))
    one, two = by_run(lines, 1e-5)
    assert (one.run, one.unit, one.releases, one.noise_multiplier) == ("one", "site", 1, 4.0)
    assert (two.unit, two.releases, two.sampling) == ("example", 40, 0.05)
    assert {account.unit for account in accounts(lines[:1], 1e-5, None)} == {"site"}


# --- a ledger in a file -----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LedgerFile]:
    with LedgerFile(tmp_path / "ledger") as found:
        yield found


def test_a_round_is_charged_once_and_only_within_the_budget(file: LedgerFile) -> None:
    limit = epsilon(Releases(4.0, 3), 1e-5)
    file.set_budget(budget(limit))
    for _ in range(2):
        file.charge("a", "first", 1, {"north": SITE, "south": SITE})
        file.charge("a", "first", 2, {"north": SITE})
    file.charge("b", "second", 1, {"north": SITE})
    with pytest.raises(BudgetError, match=r"site 'north': the budget is ε = .* is spent, and this would make it") as no:
        file.charge("b", "second", 2, {"south": SITE, "north": SITE})
    assert "model is as the round before left it" in no.value.hint
    with pytest.raises(BudgetError):
        file.check("b", 2, {"north": SITE})
    file.charge("b", "second", 1, {"north": SITE})  # it has paid for that one
    spent = {(line.run, line.site): line.spend.count for line in file.lines()}
    assert spent == {("first", "north"): 2, ("first", "south"): 1, ("second", "north"): 1}
    with pytest.raises(BudgetError, match="make it ∞"):
        file.charge("c", "third", 1, {"south": UNPROTECTED})


def test_runs_of_one_name_are_told_apart(file: LedgerFile) -> None:
    file.charge("a" * 32, "demo", 1, {"north": SITE})
    file.charge("b" * 32, "demo", 1, {"north": SITE})
    file.charge("c" * 32, "other", 1, {"north": SITE})
    assert [line.run for line in file.lines()] == ["demo (aaaaaaaa)", "demo (bbbbbbbb)", "other"]


@pytest.mark.parametrize(("target", "rounds"), [(8.0, 20), (1.0, 7), (3.0, 1)])
def test_a_run_that_was_calibrated_to_the_budget_fits_it(target: float, rounds: int) -> None:
    spend = Spend("site", "gaussian", noise_multiplier(target, 1e-5, count=rounds))
    assert budget(target).excess([spend] * (rounds - 1), spend) == ""
    assert "would make it" in budget(target).excess([spend] * rounds, spend)


def test_runs_at_the_same_time_do_not_overspend(tmp_path: Path) -> None:
    path, limit = tmp_path / "ledger", epsilon(Releases(4.0, 10), 1e-5)
    with LedgerFile(path) as file:
        file.set_budget(budget(limit))

    def spend(run: str) -> int:
        done = 0
        with LedgerFile(path) as mine:
            for round in range(1, 7):
                try:
                    mine.charge(run, run, round, {"north": SITE})
                except BudgetError:
                    break
                done += 1
        return done

    with ThreadPoolExecutor(4) as threads:
        done = sum(threads.map(spend, "abcd"))
    assert done == 10
    with LedgerFile(path) as file:
        assert cost([line.spend for line in file.lines()], "site", 1e-5) <= limit


def test_files_that_are_no_ledgers(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, whatever its name says, and it never has been one at all")
    with pytest.raises(StateError, match="damaged"):
        LedgerFile(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE things (name TEXT)")
    other.close()
    with pytest.raises(StateError, match="another program's"):
        LedgerFile(tmp_path / "other")
    with pytest.raises(StateError, match="there is no ledger"):
        LedgerFile(tmp_path / "nowhere", make=False)
    with LedgerFile(tmp_path / "newer") as file:
        file._db.execute("UPDATE about SET value = '9' WHERE key = 'format'")
    with pytest.raises(StateError, match="of format 9"):
        LedgerFile(tmp_path / "newer")


# --- runs that are charged to it --------------------------------------------------------------------------------------


def test_a_budget_holds_across_runs_and_a_resumed_run_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, ledger = private(make_recipe), tmp_path / "ledger"
    three = epsilon(Releases(0.3, 3), 1e-5)
    assert call("ledger", ledger, "--budget", three * 1.0001, "--delta", "1e-5").code == 0
    run(recipe, tmp_path / "one", ledger=ledger)
    with pytest.raises(BudgetError, match="site 'north'"):
        run(recipe, tmp_path / "two", ledger=ledger)
    assert theta_of(tmp_path / "two", 1)
    assert not (tmp_path / "two" / "rounds" / "0002").exists()
    shown = call("ledger", ledger, "--json").json
    assert [(line["site"], line["count"], line["unit"], line["sampling"]) for line in shown["lines"]] == [
        *((site, 2, "site", 1.0) for site in ("north", "south", "west")),
        *((site, 1, "site", 1.0) for site in ("north", "south", "west")),
    ]
    assert all(line["adjacency"].startswith("one site") for line in shown["lines"])
    assert [row["epsilon"] for row in shown["sites"]] == [pytest.approx(three, rel=1e-9)] * 3
    said = call("ledger", ledger).out
    assert f"{three:.3f}" in said
    assert "0.00" in said
    with pytest.raises(StateError, match="charged to another ledger"):
        run(recipe, tmp_path / "two", resume=True)
    with pytest.raises(StateError, match="charged to another ledger"):
        run(recipe, tmp_path / "two", resume=True, ledger=tmp_path / "another")
    assert call("ledger", ledger, "--budget", 1e6, "--delta", "1e-5").code == 0
    metrics = run(recipe, tmp_path / "two", resume=True, ledger=ledger)
    assert metrics["privacy"]["releases"] == 2
    with LedgerFile(ledger) as file:
        assert {line.spend.count for line in file.lines()} == {2}


def test_a_run_without_privacy_spends_everything(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    run(make_recipe(), tmp_path / "one", ledger=ledger)
    shown = call("ledger", ledger).out
    assert "∞" in shown
    assert "none" in shown
    with LedgerFile(ledger) as file:
        file.set_budget(budget(50.0))
    with pytest.raises(BudgetError, match="∞ is spent"):
        run(private(make_recipe), tmp_path / "two", ledger=ledger)
    with LedgerFile(tmp_path / "fresh") as file:
        file.set_budget(budget(50.0))
    asynchronous = {"rounds": 2, "strategy": {"name": "fedbuff", "buffer": 2}, "clock": {"slowest": 1, "fastest": 3}}
    for name, federation in (("three", {}), ("four", asynchronous)):
        with pytest.raises(BudgetError, match="would make it ∞"):
            run(make_recipe(federation=federation), tmp_path / name, ledger=tmp_path / "fresh")
    run(make_recipe(), tmp_path / "five")
    with pytest.raises(StateError, match="began without a ledger"):
        run(make_recipe(), tmp_path / "five", resume=True, ledger=ledger)


class Killed(Exception):
    pass


def dies(owner: type[Any], method: str, nth: int, *, before: bool, patched: pytest.MonkeyPatch) -> None:
    """Let the nth call of a method be the last thing that a run does."""
    original, calls = getattr(owner, method), iter(range(1, 100))

    def dying(self: Any, *arguments: Any) -> Any:
        last = next(calls) == nth
        if last and before:
            raise Killed
        found = original(self, *arguments)
        if last:
            raise Killed
        return found

    patched.setattr(owner, method, dying)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("owner", "method", "nth"),
    [(LedgerFile, "charge", 2), (MemoryModel, "close", 2), (Journal, "commit", 3), (Journal, "drop", 2)],
    ids=["charge", "release", "commit", "noise struck out"],
)
@pytest.mark.kills
def test_a_kill_never_charges_twice_or_not_at_all(
    make_recipe: MakeRecipe, tmp_path: Path, owner: type[Any], method: str, nth: int, before: bool
) -> None:
    """The budget is exactly what the run needs: whoever counted anything twice would be refused."""
    recipe, ledger = private(make_recipe), tmp_path / "ledger"
    with LedgerFile(ledger) as file:
        file.set_budget(budget(epsilon(Releases(0.3, 2), 1e-5)))
    with pytest.MonkeyPatch.context() as patched:
        dies(owner, method, nth, before=before, patched=patched)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run", ledger=ledger)
    run(recipe, tmp_path / "run", resume=True, ledger=ledger)
    with LedgerFile(ledger) as file:
        assert {(line.site, line.spend.count) for line in file.lines()} == {("north", 2), ("south", 2), ("west", 2)}
    with pytest.raises(BudgetError):
        run(recipe, tmp_path / "another", ledger=ledger)


def test_only_sites_in_the_sum_pay(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private(make_recipe, federation={"rounds": 3, "cohort": 2, "weighting": "uniform"})
    run(recipe, tmp_path / "runs" / "one", ledger=tmp_path / "ledger")
    with LedgerFile(tmp_path / "ledger") as file:
        charged = {line.site: line.spend.count for line in file.lines()}
    assert sum(charged.values()) == 6
    journal = Journal(tmp_path / "runs" / "one" / "state.sqlite")
    answered = [site for record in journal.commits().values() for site in record.get("answered", ())]
    journal.close()
    assert charged == {site: answered.count(site) for site in set(answered)}
    told = call("ledger", tmp_path / "runs", "--json").json
    assert {line["site"]: line["count"] for line in told["lines"]} == charged


def test_wrong_calls_are_explained(tmp_path: Path) -> None:
    for arguments in (
        ["ledger", tmp_path, "--budget", "3", "--delta", "1e-5"],
        ["ledger", tmp_path / "new", "--budget", "3"],
        ["ledger", tmp_path / "new", "--budget", "-3", "--delta", "1e-5"],
        ["ledger", tmp_path / "new", "--budget", "3", "--delta", "1e-5", "--unit", "patient"],
        ["ledger", tmp_path / "nowhere"],
    ):
        answer = call(*arguments)
        assert answer.code in (2, 6), arguments
        assert "Traceback" not in answer.err
    assert not (tmp_path / "new").exists()
    assert call("ledger", tmp_path / "new", "--budget", "3", "--delta", "1e-5").code == 0
    assert "nothing is spent" in call("ledger", tmp_path / "new").out
    other = call("ledger", tmp_path / "new", "--delta", "1e-6")
    assert (other.code, "added up at δ = 1e-05" in other.err) == (2, True)


# --- a coordinator's (more of it: test_store.py) ------------------------------------------------------------------


def test_what_was_spent_before_there_was_a_ledger_is_in_it(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    url, folder = f"sqlite:///{tmp_path / 'old.sqlite'}", Path(tables.__file__).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        values = {"id": "r1", "name": "old", "recipe": "", "signer": "lena", "upload": "{}", "state": "finished"}
        blobs = {"job": b"", "signature": b"", "certificate": b"", "submitted_at": 5.0}
        connection.execute(tables.runs.insert(), {**values, **blobs})
        records = (
            '{"state": {}}',
            '{"answered": ["a", "b"], "privacy": {"noise_multiplier": 4.0, "clip": 1}}',
            '{"answered": ["a"]}',
        )
        for round, record in enumerate(records):
            connection.execute(tables.commits.insert(), {"run": "r1", "round": round, "record": record, "epoch": 1})
    engine.dispose()
    with Store(url) as store:
        found = {(line.site, line.spend) for line in store.spent()}
    assert found == {("a", SITE), ("b", SITE), ("a", UNPROTECTED)}
