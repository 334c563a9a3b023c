"""The ledger of a coordinator: what every round of every run has cost each site, and the budget over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from ..federation.ledger import Line
from ..privacy.spending import Budget, Spend
from .database import Part, Writing, insert_for, reading, writing
from .leases import Lease, hold
from .tables import runs, spends

#: any number; it names the lock under which PostgreSQL's transactions look at a budget and spend of it
_LOCK = 0x6C6564676572

_KIND = (spends.c.unit, spends.c.mechanism, spends.c.noise_multiplier, spends.c.sampling)
_SPEND = (*_KIND, sa.func.sum(spends.c.count).label("count"))


class SpendsPart(Part):
    """Spends in the store."""

    @writing
    def charge(self, tx: Writing, lease: Lease, round: int, costs: Mapping[str, Spend], budget: Budget | None) -> None:
        """Write down what a round is about to cost its sites. Those who are charged for this round already pay nothing.

        Raises:
            LeaseLost: the run is another's by now.
            BudgetError: a site would have spent more than the budget, over all runs; nobody was charged.
        """
        hold(tx, lease)
        if tx.dialect == "postgresql" and budget is not None:
            tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        _check(tx.connection, lease.run, round, costs, budget)
        rows = [
            {
                "run": lease.run,
                "round": round,
                "site": site,
                "unit": spend.unit,
                "adjacency": spend.adjacency,
                "mechanism": spend.mechanism,
                "noise_multiplier": spend.noise_multiplier,
                "sampling": spend.sampling,
                "count": spend.count,
                "t": tx.now,
            }
            for site, spend in costs.items()
        ]
        if rows:
            tx.execute(insert_for(tx, spends).on_conflict_do_nothing(), rows)

    @reading
    def check_budget(
        self, connection: sa.Connection, run: str, round: int, costs: Mapping[str, Spend], budget: Budget | None
    ) -> None:
        """As `charge`, without charging.

        Raises:
            BudgetError: a site would have spent more than the budget.
        """
        _check(connection, run, round, costs, budget)

    @reading
    def spent(self, connection: sa.Connection) -> list[Line]:
        """Everything that was spent, the runs in the order in which they were submitted."""
        query = (
            sa.select(runs.c.name, spends.c.run, spends.c.site, *_SPEND)
            .join_from(spends, runs, spends.c.run == runs.c.id)
            .group_by(runs.c.submitted_at, runs.c.name, spends.c.run, spends.c.site, *_KIND)
            .order_by(runs.c.submitted_at, spends.c.run, spends.c.site, *_KIND)
        )
        return [
            Line(f"{row['name']} ({row['run'][:8]})", row["site"], Spend.from_json(dict(row)))
            for row in connection.execute(query).mappings()
        ]


def _check(connection: sa.Connection, run: str, round: int, costs: Mapping[str, Spend], budget: Budget | None) -> None:
    if budget is None:
        return
    before = _before(connection, run, round, costs)
    for site, spend in costs.items():
        budget.check(site, before.get(site, ()), spend)


def _before(connection: sa.Connection, run: str, round: int, sites: Iterable[str]) -> dict[str, list[Spend]]:
    """What sites have spent in all other rounds of all runs."""
    others = sa.not_((spends.c.run == run) & (spends.c.round == round))
    query = sa.select(spends.c.site, *_SPEND).where(spends.c.site.in_(list(sites)), others)
    found: dict[str, list[Spend]] = {}
    for row in connection.execute(query.group_by(spends.c.site, *_KIND)).mappings():
        found.setdefault(row["site"], []).append(Spend.from_json(dict(row)))
    return found


class StoreLedger:
    """A coordinator's ledger, for the leader of one run."""

    def __init__(self, store: SpendsPart, lease: Lease, budget: Budget | None) -> None:
        self.store, self.lease, self.budget = store, lease, budget

    def check(self, round: int, spends: Mapping[str, Spend]) -> None:
        self.store.check_budget(self.lease.run, round, spends, self.budget)

    def charge(self, round: int, spends: Mapping[str, Spend]) -> None:
        self.check(round, spends)  # what takes long is worked out before others must wait for the database
        self.store.charge(self.lease, round, spends, self.budget)
