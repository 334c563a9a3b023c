"""Tasks: what sites are asked to do, and what became of it.

offered ──► taken ──► (held by a relay) ──► done | refused | failed          (any open one) ──► withdrawn
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ..federation.messages import SUM_STEPS
from ..wire.refusals import Refusal, Refused
from .database import Part, Writing, reading, writing
from .leases import Lease, hold
from .tables import tasks, uploads

OPEN = ("offered", "taken", "held")
REPLIES = ("taken", "held", "done", "refused", "failed")


@dataclass(frozen=True)
class TaskRow:
    """A task for one site.

    Args:
        kind: join, train, evaluate, chain, sample; keys, shares, consent, reveal.
        body: JSON.
        base: hex digest of the frame to start from; empty for join.
        deadline_at: seconds since the epoch; None: none.
        state: offered, taken, held, done, refused, failed or withdrawn; `reason` says why.
        result: JSON, once it is done.
        offered_at: set by the store.
    """

    id: str
    run: str
    round: int
    site: str
    kind: str
    body: bytes
    base: str = ""
    deadline_at: float | None = None
    state: str = "offered"
    reason: str = ""
    result: bytes | None = None
    offered_at: float = 0.0

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


_OF_SITE = (
    sa.select(tasks)
    .where(tasks.c.site == sa.bindparam("site"), tasks.c.state.in_(OPEN))
    .order_by(tasks.c.offered_at, tasks.c.id)
)
_END = (
    tasks.update()
    .where(tasks.c.id == sa.bindparam("task"), tasks.c.site == sa.bindparam("by"), tasks.c.state.in_(OPEN))
    .values(state=sa.bindparam("to"), reason=sa.bindparam("why"), result=sa.bindparam("outcome"))
    .returning(*tasks.c)
)


class TasksPart(Part):
    """Tasks in the store. Topics: `tasks/<site>` when there is something for a site, `run/<id>` when it replied."""

    @writing
    def add_tasks(self, tx: Writing, lease: Lease, rows: Sequence[TaskRow]) -> None:
        """Offer tasks of the lease's run.

        Raises:
            LeaseLost: the run is another's by now.
            StateError: there is a task with such an id.
        """
        hold(tx, lease)
        if not rows:
            return
        if any(row.run != lease.run for row in rows):
            raise ValueError("a task of another run than the lease's")
        tx.execute(tasks.insert(), [{**vars(row), "offered_at": tx.now} for row in rows])
        tx.publish(*(f"tasks/{row.site}" for row in rows))

    @reading
    def open_tasks(self, connection: sa.Connection, site: str) -> list[TaskRow]:
        """What a site is to work on, in the order in which it was offered."""
        return _rows(connection.execute(_OF_SITE, {"site": site}))

    @reading
    def tasks(self, connection: sa.Connection, run: str, round: int | None = None) -> list[TaskRow]:
        """A run's tasks, or one round's, in the order in which they were offered."""
        query = sa.select(tasks).where(tasks.c.run == run).order_by(tasks.c.offered_at, tasks.c.id)
        return _rows(connection.execute(query if round is None else query.where(tasks.c.round == round)))

    @reading
    def task_states(self, connection: sa.Connection, run: str, round: int) -> dict[str, tuple[str, str]]:
        """(site, state) of each of a round's tasks, by id: what is wanted often, of many."""
        query = sa.select(tasks.c.id, tasks.c.site, tasks.c.state).where(tasks.c.run == run, tasks.c.round == round)
        return {row.id: (row.site, row.state) for row in connection.execute(query)}

    @reading
    def open_training(self, connection: sa.Connection, run: str) -> dict[str, tuple[str, int]]:
        """(site, round) of each of a run's training tasks that is open, whatever its round, by id."""
        query = sa.select(tasks.c.id, tasks.c.site, tasks.c.round)
        mine = query.where(tasks.c.run == run, tasks.c.kind == "train", tasks.c.state.in_(OPEN))
        return {row.id: (row.site, row.round) for row in connection.execute(mine)}

    @reading
    def bases_in_use(self, connection: sa.Connection, run: str) -> set[str]:
        """The frames that open tasks start from, and those that accepted updates, not yet folded, started from."""
        accepted = sa.select(uploads.c.task).where(uploads.c.run == run, uploads.c.state == "accepted")
        used = tasks.c.state.in_(OPEN) | tasks.c.id.in_(accepted)
        query = sa.select(tasks.c.base).distinct().where(tasks.c.run == run, tasks.c.base != "", used)
        return set(connection.execute(query).scalars())

    @reading
    def task(self, connection: sa.Connection, task: str) -> TaskRow | None:
        rows = _rows(connection.execute(sa.select(tasks).where(tasks.c.id == task)))
        return rows[0] if rows else None

    @writing
    def reply(
        self, tx: Writing, task: str, site: str, state: str, reason: str = "", result: bytes | None = None
    ) -> TaskRow | None:
        """What a site says of a task: one of `REPLIES`. Returns the task as it now is; one that
        has ended stays as it is, so that a reply may be repeated. None: there is no such task.

        Raises:
            Refused (wrong-site): the task is another site's.
        """
        if state not in REPLIES:
            raise ValueError(state)
        values = {"task": task, "by": site, "to": state, "why": reason, "outcome": result}
        changed = _rows(tx.execute(_END, values))
        if changed:
            tx.publish(f"run/{changed[0].run}")
            return changed[0]
        rows = _rows(tx.execute(sa.select(tasks).where(tasks.c.id == task)))
        if rows and rows[0].site != site:
            raise Refused(Refusal.WRONG_SITE, f"task {task} is not {site}'s")
        return rows[0] if rows else None

    @writing
    def withdraw(self, tx: Writing, lease: Lease, ids: Iterable[str], reason: str) -> list[str]:
        """Take tasks back that are still open; returns the ids of those.

        Raises:
            LeaseLost: the run is another's by now.
        """
        hold(tx, lease)
        return withdraw_where(tx, lease.run, tasks.c.id.in_(list(ids)), reason=reason)

    @writing
    def give_up(self, tx: Writing, lease: Lease, task: str, sites: Iterable[str], reason: str) -> None:
        """A relay's task has ended or ends now without its sum: its sites are told to send to the coordinator.

        Raises:
            LeaseLost: the run is another's by now.
        """
        hold(tx, lease)
        withdraw_where(tx, lease.run, tasks.c.id == task, reason=reason)
        tx.publish(*(f"tasks/{site}" for site in sites))


def erase_sums(tx: Writing, run: str, last_round: int) -> None:
    """What sites have said for the secure sums of these rounds, and were told, is of no more use to anybody honest."""
    of_sums = tasks.c.kind.in_(SUM_STEPS)
    change = tasks.update().where(tasks.c.run == run, tasks.c.round <= last_round, of_sums)
    tx.execute(change.values(body=b"{}", result=None))


def withdraw_where(tx: Writing, run: str, *conditions: sa.ColumnElement[bool], reason: str) -> list[str]:
    """Take a run's open tasks back, those that meet all conditions; returns their ids."""
    change = (
        tasks.update()
        .where(tasks.c.run == run, tasks.c.state.in_(OPEN), *conditions)
        .values(state="withdrawn", reason=reason)
        .returning(tasks.c.id, tasks.c.site)
    )
    rows = tx.execute(change).all()
    tx.publish(*(f"tasks/{row.site}" for row in rows))
    return [row.id for row in rows]


def end_task(tx: Writing, task: str, site: str, state: str, reason: str = "") -> None:
    """End a site's task if it is open still."""
    tx.execute(_END, {"task": task, "by": site, "to": state, "why": reason, "outcome": None})


def _rows(found: sa.CursorResult[Any]) -> list[TaskRow]:
    return [TaskRow(**row) for row in found.mappings()]
