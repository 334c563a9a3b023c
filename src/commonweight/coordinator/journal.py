"""A run's journal in the coordinator's database: the methods of `federation/journal.py`, fenced by the leader's lease.

In one transaction a commit makes a round's new global state the truth, closes the round's book and spends its updates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ..errors import StateError
from ..federation.messages import SUM_STEPS
from ..federation.round import Committed
from ..federation.version import Version
from .audit import append
from .database import Part, Writing, reading, upsert, writing
from .leases import Lease, hold
from .rounds import locked, tell
from .tables import commits, identities, results, tasks
from .tasks import erase_sums, withdraw_where
from .uploads import spend

if TYPE_CHECKING:
    from .store import Store


_LAST = sa.select(sa.func.max(commits.c.round)).where(commits.c.run == sa.bindparam("of"))


class JournalPart(Part):
    """What the journals of all runs are made of. Anybody reads; only a run's leader writes."""

    @writing
    def bind(self, tx: Writing, lease: Lease, identity: Mapping[str, str]) -> None:
        """Tie a run to what it is made of, or check that it still is.

        Raises:
            LeaseLost: the run is another's by now.
            StateError: a value differs from the one that the run began with; both are named.
        """
        hold(tx, lease)
        query = sa.select(identities.c.key, identities.c.value).where(identities.c.run == lease.run)
        known = {row.key: row.value for row in tx.execute(query)}
        for key, value in identity.items():
            if known.get(key, value) != value:
                raise StateError(
                    f"run {lease.run!r} began with another {key}: {known[key]}, now {value}",
                    hint="go on with what it began with, or submit a new run",
                )
        missing = [{"run": lease.run, "key": key, "value": v} for key, v in identity.items() if key not in known]
        if missing:
            tx.execute(identities.insert(), missing)

    @writing
    def commit(self, tx: Writing, lease: Lease, round: int, record: Mapping[str, Any]) -> None:
        """A round's new global state, whose blobs are written, becomes the truth. Its updates and those before are
        spent, its training tasks are over. Round 0 is the initial state.

        Raises:
            LeaseLost: the run is another's by now.
            StateError: the round is committed already, is not the next, or is not closed.
        """
        hold(tx, lease)
        last = tx.execute(_LAST, {"of": lease.run}).scalar_one()
        if last is not None and round <= last:
            raise StateError(f"round {round} of run {lease.run!r} is committed already")
        if round > (last or 0) + 1:
            raise StateError(f"round {round} of run {lease.run!r} cannot be committed: {(last or 0) + 1} is the next")
        text = json.dumps(record)
        row = {"run": lease.run, "round": round, "record": text, "epoch": lease.epoch}
        tx.execute(commits.insert(), row)
        if round > 0:
            self._close(tx, lease.run, round)
        digest = hashlib.sha256(text.encode()).hexdigest()
        append(tx, "round committed", actor="coordinator", subject=lease.run, round=round, record=digest)
        tx.publish(f"run/{lease.run}")

    def _close(self, tx: Writing, run: str, number: int) -> None:
        """A round's or version's book. In a version's stead its successor is open already: tasks go on that may still
        be answered there."""
        round, _ = locked(tx, run, number)
        verdict = tell(tx, run, round, Committed(number))
        if not verdict.accepted:
            raise StateError(f"run {run!r}: {verdict.reason}")
        spend(tx, run, round)
        over, reason = tasks.c.round <= number, f"round {number} is committed"
        if isinstance(round, Version):
            over, reason = tasks.c.round < round.oldest, f"version {number} is committed, and it would be too stale"
            if round.following() is None:
                reason = f"version {number}, the last, is committed"
        of_rounds = tasks.c.kind.in_(["train", "relay", *SUM_STEPS])
        withdraw_where(tx, run, over, of_rounds, reason=reason)
        erase_sums(tx, run, number)

    @reading
    def last_round(self, connection: sa.Connection, run: str) -> int:
        """A run's latest committed round, 0 before the first."""
        return int(connection.execute(_LAST, {"of": run}).scalar_one() or 0)

    @reading
    def commits(self, connection: sa.Connection, run: str, after: int = -1) -> dict[int, dict[str, Any]]:
        """Every committed round's record, in order; `after`: of later rounds only."""
        query = sa.select(commits.c.round, commits.c.record).where(commits.c.run == run, commits.c.round > after)
        return {row.round: json.loads(row.record) for row in connection.execute(query.order_by(commits.c.round))}

    @writing
    def put_result(self, tx: Writing, lease: Lease, key: str, record: Mapping[str, Any]) -> None:
        """Keep a result of a run under a key, in place of what was there.

        Raises:
            LeaseLost: the run is another's by now.
        """
        hold(tx, lease)
        upsert(tx, results, {"run": lease.run, "key": key, "record": json.dumps(record)})

    @writing
    def drop_result(self, tx: Writing, lease: Lease, key: str) -> None:
        """Strike a result of a run out.

        Raises:
            LeaseLost: the run is another's by now.
        """
        hold(tx, lease)
        tx.execute(results.delete().where(results.c.run == lease.run, results.c.key == key))

    @reading
    def result(self, connection: sa.Connection, run: str, key: str) -> dict[str, Any] | None:
        query = sa.select(results.c.record).where(results.c.run == run, results.c.key == key)
        record = connection.execute(query).scalar_one_or_none()
        return None if record is None else json.loads(record)


class StoreJournal:
    """A run's journal, for its leader."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self.store, self.lease = store, lease

    def bind(self, identity: Mapping[str, str]) -> None:
        self.store.bind(self.lease, identity)

    def last_round(self) -> int:
        return self.store.last_round(self.lease.run)

    def commit(self, round: int, record: Mapping[str, Any]) -> None:
        self.store.commit(self.lease, round, record)

    def commits(self) -> dict[int, dict[str, Any]]:
        return self.store.commits(self.lease.run)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        self.store.put_result(self.lease, key, record)

    def get(self, key: str) -> dict[str, Any] | None:
        return self.store.result(self.lease.run, key)

    def drop(self, key: str) -> None:
        self.store.drop_result(self.lease, key)

    def kept_updates(self, round: int) -> dict[str, dict[str, Any]]:
        """None: accepted updates are uploads of the store's (`Store.accepted_uploads`), with nothing to keep beside."""
        return {}
