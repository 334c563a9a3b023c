"""Runs: what was submitted, how far it is, which sites take part, and which replica leads it.

receiving ──► waiting ──► running ──► finished
    └────────────┴───────────┴──────► failed | cancelled
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ..errors import StateError
from .audit import append
from .database import Part, Writing, found, insert_if_new, reading, upsert, writing
from .leases import Lease, hold
from .tables import event_counts, leases, members, results, runs
from .tasks import withdraw_where

_NEXT = {
    "receiving": {"waiting", "failed", "cancelled"},
    "waiting": {"running", "failed", "cancelled"},
    "running": {"finished", "failed", "cancelled"},
}
ENDED = ("finished", "failed", "cancelled")
MEMBER_STATES = ("asked", "joined", "refused", "gone")


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        recipe: resolved, YAML.
        job, signature, certificate: what the lead signed, and by what.
        signer: the lead's name.
        upload: how the initial global tensors arrive; plain data of the service's.
        state: see above; `error` and `hint` say why it failed.
        cancelled_by: who asked for it to be cancelled, if anyone did.
        submitted_at, ended_at: seconds since the epoch.
    """

    id: str
    name: str
    recipe: str
    job: bytes
    signature: bytes
    certificate: bytes
    signer: str
    upload: Mapping[str, Any]
    state: str
    error: str
    hint: str
    cancelled_by: str
    submitted_at: float
    ended_at: float | None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Member:
    """A site's part in a run.

    Args:
        state: `asked`, `joined`, `refused` or `gone`.
        facts: what it said of itself when it joined.
        reason: why it refused or went.
    """

    run: str
    site: str
    state: str
    facts: Mapping[str, Any]
    reason: str


class RunsPart(Part):
    """Runs and their members in the store. Topics: `run/<id>`, and `ended/<id>` when one has ended."""

    @writing
    def add_run(
        self,
        tx: Writing,
        run_id: str,
        name: str,
        recipe_text: str,
        job: bytes,
        signature: bytes,
        certificate: bytes,
        signer: str,
        upload: Mapping[str, Any],
    ) -> Run:
        """A run was submitted; it is `receiving` its initial tensors. Submitting the same job again changes nothing.

        Raises:
            StateError: there is a run with this id and another job.
        """
        row = {
            "id": run_id,
            "name": name,
            "recipe": recipe_text,
            "job": job,
            "signature": signature,
            "certificate": certificate,
            "signer": signer,
            "upload": json.dumps(upload),
            "state": "receiving",
            "submitted_at": tx.now,
        }
        added = insert_if_new(tx, runs, row)
        run = _run(tx.connection, run_id)
        if (run.job, run.signer) != (job, signer):
            raise StateError(f"there is another run with the id {run_id!r}", hint="submit it again under a new id")
        if added:
            tx.execute(leases.insert(), {"run": run_id, "epoch": 0, "owner": "", "until": 0.0})
            tx.execute(event_counts.insert(), {"run": run_id, "last": 0})
            append(tx, "run submitted", actor=signer, subject=run_id, name=name)
            tx.publish(f"run/{run_id}", "runs")
        return run

    @writing
    def set_run_state(
        self, tx: Writing, run: str, state: str, *, error: str = "", hint: str = "", lease: Lease | None = None
    ) -> None:
        """A run goes on to another state; to the one that it is in already changes nothing. When it ends, its open
        tasks are withdrawn, and what its noise could be taken off with is struck out.

        Raises:
            StateError: there is no such run, or it cannot go there from where it is.
            LeaseLost: the lease is given and no longer holds.
        """
        if lease is not None:
            hold(tx, lease)
        _set_state(tx, run, state, error, hint, actor="coordinator")

    @writing
    def request_cancel(self, tx: Writing, run: str, by: str) -> None:
        """Somebody wants a run to end. Its leader sees `cancelled_by`; one that is still receiving ends at once; one
        that has ended stays as it is.

        Raises:
            StateError: there is no such run.
        """
        state = _state(tx, run)
        if state in ENDED:
            return
        tx.execute(runs.update().where(runs.c.id == run).values(cancelled_by=by))
        append(tx, "cancel requested", actor=by, subject=run)
        if state == "receiving":
            _set_state(tx, run, "cancelled", "", "", actor=by)
        tx.publish(f"run/{run}")

    @reading
    def run_row(self, connection: sa.Connection, run: str) -> Run:
        """Raises:
        StateError: there is no such run.
        """
        return _run(connection, run)

    @reading
    def find_run(self, connection: sa.Connection, run: str) -> Run | None:
        row = connection.execute(sa.select(runs).where(runs.c.id == run)).mappings().one_or_none()
        return None if row is None else _run_of(row)

    @reading
    def runs(self, connection: sa.Connection, limit: int = 1000) -> list[Run]:
        """The latest runs, newest first."""
        query = sa.select(runs).order_by(runs.c.submitted_at.desc(), runs.c.id).limit(limit)
        return [_run_of(row) for row in connection.execute(query).mappings()]

    @writing
    def put_member(
        self, tx: Writing, run: str, site: str, state: str, facts: Mapping[str, Any] | None = None, reason: str = ""
    ) -> None:
        """How a site stands to a run, in place of what was known before."""
        if state not in MEMBER_STATES:
            raise ValueError(state)
        upsert(
            tx, members, {"run": run, "site": site, "state": state, "facts": json.dumps(facts or {}), "reason": reason}
        )
        if state != "asked":
            append(tx, f"site {state}", actor=site, subject=run, **({"reason": reason} if reason else {}))
        tx.publish(f"run/{run}")

    @reading
    def member_states(self, connection: sa.Connection, run: str) -> dict[str, str]:
        """The state of each member, by site: what is wanted often, of many."""
        query = sa.select(members.c.site, members.c.state).where(members.c.run == run)
        return {row.site: row.state for row in connection.execute(query)}

    @reading
    def members(self, connection: sa.Connection, run: str) -> list[Member]:
        """By site's name."""
        query = sa.select(members).where(members.c.run == run).order_by(members.c.site)
        return [Member(**{**row, "facts": json.loads(row["facts"])}) for row in connection.execute(query).mappings()]


def _run(connection: sa.Connection, run: str) -> Run:
    row = connection.execute(sa.select(runs).where(runs.c.id == run)).mappings().one_or_none()
    return _run_of(found(row, f"run {run!r}"))


def _run_of(row: Mapping[Any, Any]) -> Run:
    return Run(**{**row, "upload": json.loads(row["upload"])})


def _state(tx: Writing, run: str) -> str:
    query = sa.select(runs.c.state).where(runs.c.id == run).with_for_update(key_share=True)
    return str(found(tx.execute(query).scalar_one_or_none(), f"run {run!r}"))


def _set_state(tx: Writing, run: str, state: str, error: str, hint: str, *, actor: str) -> None:
    before = _state(tx, run)
    if before == state:
        return
    if state not in _NEXT.get(before, ()):
        raise StateError(f"run {run!r} is {before}; it cannot become {state}")
    ended = state in ENDED
    values = {"state": state, "error": error, "hint": hint, "ended_at": tx.now if ended else None}
    tx.execute(runs.update().where(runs.c.id == run).values(**values))
    if ended:
        withdraw_where(tx, run, reason=f"the run is {state}")
        tx.execute(results.delete().where(results.c.run == run, results.c.key.like("noise/%")))
        tx.publish(f"ended/{run}")
    tx.publish("runs")
    append(tx, f"run {state}", actor=actor, subject=run, **({"error": error} if error else {}))
    tx.publish(f"run/{run}")
