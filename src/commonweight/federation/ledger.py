"""The ledger: what rounds have spent of their sites' privacy, over all runs, and whether a budget lets them go on.

A round is charged before its release is made, in the ledger's own transaction, and once: what has been charged for a
run's round and site is not charged again when the run is resumed. A release that is charged may fail to come about; one
that was not charged never does. A site pays in the rounds in which its update is in the sum.

Ledgers lie in a file (`ledger_file.py`), in a coordinator's database, or, of what is committed, in the journals of a
folder of runs.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from ..errors import StateError
from ..privacy.spending import UNPROTECTED, Budget, Spend, cost
from ..recipe.load import load_recipe
from ..recipe.schema import Recipe
from .private_rounds import spends_in, spends_of
from .tally import Sites


class Ledger(Protocol):
    """What one run asks of a ledger."""

    def check(self, round: int, spends: Mapping[str, Spend]) -> None:
        """Raises BudgetError: a site would have spent more than the budget after this."""

    def charge(self, round: int, spends: Mapping[str, Spend]) -> None:
        """Write down what a round is about to cost its sites; nothing for those who have paid for it already.

        Raises:
            BudgetError: a site would have spent more than the budget; nobody was charged.
        """


class Charges:
    """What a run's rounds cost, and the ledger that hears of it.

    Args:
        ledger: None: nobody keeps one.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger | None) -> None:
        self.recipe, self.ledger = recipe, ledger
        #: where sites add the noise themselves, an update is a release as soon as it is sent, whatever comes of it
        self.at_once = recipe.privacy.noisy_steps

    def foresee(self, round: int, names: Iterable[str], sites: Sites) -> None:
        """A round is about to be opened with these sites.

        Raises:
            BudgetError: one of them may not spend that much.
        """
        if self.ledger is None:
            return
        spends = spends_of(self.recipe, names, sites)
        if self.at_once:
            self.ledger.charge(round, spends)
        else:
            self.ledger.check(round, spends)

    def pay(self, round: int, sites: Iterable[str]) -> None:
        """A round's release is about to be made, with the updates of these sites.

        Raises:
            BudgetError: one of them may not spend that much; nothing was charged.
        """
        if self.ledger is not None and not self.at_once:
            self.ledger.charge(round, spends_of(self.recipe, sites))


@dataclass(frozen=True)
class Line:
    """What one site has spent in one run, of one kind."""

    run: str
    site: str
    spend: Spend

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "site": self.site, **asdict(self.spend), "adjacency": self.spend.adjacency}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(values["run"], values["site"], Spend.from_json(values))


@dataclass(frozen=True)
class Account:
    """How a site stands, over all runs.

    Args:
        epsilon: spent.
        left: of the budget; None: there is none for this unit.
    """

    site: str
    unit: str
    epsilon: float
    left: float | None


def accounts(lines: Sequence[Line], delta: float, budget: Budget | None) -> list[Account]:
    """Every site's account of its own privacy, and of that of its examples and groups where any run or the budget
    protects these."""
    by_site: dict[str, list[Spend]] = {}
    for line in lines:
        by_site.setdefault(line.site, []).append(line.spend)
    protected = {line.spend.unit for line in lines} | ({budget.protects} if budget is not None else set())
    units = ["site", *sorted(protected - {"site", "none"})]
    return [
        Account(
            site,
            unit,
            cost(spends, unit, delta),
            budget.left(spends) if budget is not None and budget.protects == unit else None,
        )
        for site, spends in sorted(by_site.items())
        for unit in units
    ]


@dataclass(frozen=True)
class RunSpending:
    """What one run has spent.

    Args:
        releases: of the site that took part most often.
        noise_multiplier, sampling: None where rounds differ.
        epsilon: of the site that spent most, of the unit that the run protects.
    """

    run: str
    unit: str
    mechanism: str
    releases: int
    noise_multiplier: float | None
    sampling: float | None
    epsilon: float


def by_run(lines: Sequence[Line], delta: float) -> list[RunSpending]:
    """Every run's spending, in the order of the lines."""
    runs: dict[tuple[str, str, str], dict[str, list[Spend]]] = {}
    for line in lines:
        of_run = runs.setdefault((line.run, line.spend.unit, line.spend.mechanism), {})
        of_run.setdefault(line.site, []).append(line.spend)
    return [_spending(*key, of_run, delta) for key, of_run in runs.items()]


def _spending(run: str, unit: str, mechanism: str, by_site: Mapping[str, Sequence[Spend]], delta: float) -> RunSpending:
    noises = {spend.noise_multiplier for spends in by_site.values() for spend in spends}
    samplings = {spend.sampling for spends in by_site.values() for spend in spends}
    of = "site" if unit == "none" else unit
    return RunSpending(
        run,
        unit,
        mechanism,
        max(sum(spend.count for spend in spends) for spends in by_site.values()),
        next(iter(noises)) if len(noises) == 1 and unit != "none" else None,
        next(iter(samplings)) if len(samplings) == 1 and unit != "none" else None,
        max(cost(spends, of, delta) for spends in by_site.values()),
    )


def lines_of_run(folder: Path) -> list[Line]:
    """What a run has spent, whether it has ended or not: what its journal says of committed rounds.

    Raises:
        StateError: its journal cannot be read.
        RecipeError: its recipe cannot.
    """
    private = load_recipe(folder / "recipe.yaml").privacy.dp != "none"
    counts: dict[tuple[str, Spend], int] = {}
    for number, record in _commits(folder).items():
        if number == 0:
            continue
        spends = spends_in(record) if private else dict.fromkeys(record.get("answered", ()), UNPROTECTED)
        for site, spend in spends.items():
            counts[site, spend] = counts.get((site, spend), 0) + spend.count
    return [
        Line(folder.name, site, Spend(s.unit, s.mechanism, s.noise_multiplier, s.sampling, count))
        for (site, s), count in counts.items()
    ]


def _commits(run: Path) -> dict[int, dict[str, Any]]:
    """Without taking the run's lock: a run may be looked at while it goes on."""
    path = run / "state.sqlite"
    if not path.exists():
        return {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT round, record FROM commits ORDER BY round").fetchall()
        return {number: json.loads(record) for number, record in rows}
    except (sqlite3.Error, json.JSONDecodeError) as error:
        raise StateError(
            f"the journal {path} cannot be read: {error}", hint="restore the run's folder from a copy"
        ) from error
