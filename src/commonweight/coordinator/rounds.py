"""Rounds and versions in the database: the pure state machines of `federation/`, one event a transaction.

An answer to a task of round v + 1 is decided by that round. Of versions it is decided by the latest, which is the one
that is open: it was opened in the transaction that closed the one before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import sqlalchemy as sa

from ..errors import StateError
from ..federation.round import (
    ACCEPTED,
    Answered,
    Committed,
    DeadlinePassed,
    Event,
    Failed,
    Phase,
    Round,
    Unopened,
    Verdict,
)
from ..federation.version import Version, parsed
from ..wire.refusals import Refusal
from .database import Part, Writing, found, insert_if_new, reading, writing
from .leases import Lease, hold
from .tables import rounds, tasks, uploads

_ONE = sa.select(rounds).where(rounds.c.run == sa.bindparam("run"), rounds.c.number == sa.bindparam("number"))
_LOCKED = _ONE.with_for_update(key_share=True)
_LOCKED_BY_UPLOAD = (
    sa.select(rounds)
    .where(
        sa.tuple_(rounds.c.run, rounds.c.number).in_(
            sa.select(uploads.c.run, uploads.c.round).where(uploads.c.id == sa.bindparam("upload"))
        )
    )
    .with_for_update(key_share=True, of=rounds)
)
_LATEST = sa.select(sa.func.max(rounds.c.number)).where(rounds.c.run == sa.bindparam("run"))
_CHANGE = (
    rounds.update()
    .where(rounds.c.run == sa.bindparam("its_run"), rounds.c.number == sa.bindparam("its_number"))
    .values(state=sa.bindparam("state"))
)


class RoundsPart(Part):
    """Rounds in the store. Topic: `run/<id>`."""

    @writing
    def open_round(self, tx: Writing, lease: Lease, round: Round, base: str) -> tuple[Round, str]:
        """Open a round, or take over the one that is there. Returns the round as it now is, and its base.

        A round that is open or closed goes on as it is, with its own base, whoever opened it. One that was abandoned
        is begun anew as given: its accepted updates stay if `round.answered` has their sites, the others are refused.
        An abandoned version stays abandoned.

        Args:
            base: hex digest of the frame with the global tensors that it starts from.

        Raises:
            LeaseLost: the run is another's by now.
            StateError: the round is committed.
        """
        hold(tx, lease)
        values = {"run": lease.run, "number": round.number, "state": _text(round), "base": base}
        if insert_if_new(tx, rounds, values):
            tx.publish(f"run/{lease.run}")
            return round, base
        known, its_base = locked(tx, lease.run, round.number)
        if known.phase is Phase.COMMITTED:
            raise StateError(f"round {round.number} of run {lease.run!r} is committed already")
        if known.phase is not Phase.ABANDONED or isinstance(known, Version):
            return known, its_base
        tx.execute(rounds.update().where(*_is(lease.run, round.number)).values(state=_text(round), base=base))
        _refuse_others(tx, lease.run, round)
        tx.publish(f"run/{lease.run}")
        return round, base

    @reading
    def round_state(self, connection: sa.Connection, run: str, number: int) -> tuple[Round, str] | None:
        """A round and its base; None if it was never opened."""
        row = connection.execute(_ONE, {"run": run, "number": number}).one_or_none()
        return None if row is None else (parsed(json.loads(row.state)), row.base)

    @reading
    def deciding(self, connection: sa.Connection, run: str, number: int) -> Round | None:
        """What decides now about an answer to a task of round `number`; None if that round was never opened."""
        row = connection.execute(_ONE, {"run": run, "number": number}).one_or_none()
        if row is None:
            return None
        round = parsed(json.loads(row.state))
        if not isinstance(round, Version):
            return round
        latest = connection.execute(_LATEST, {"run": run}).scalar_one()
        row = connection.execute(_ONE, {"run": run, "number": latest}).one()
        return parsed(json.loads(row.state))

    @writing
    def apply(self, tx: Writing, run: str, number: int, event: Event, *, lease: Lease | None = None) -> Verdict:
        """Tell a round, or of versions the latest, of an event. Any replica may tell that a site failed; only the
        leader that time is up or that a sum stays closed. An answer comes by `accept_upload` alone, and a commit by the
        journal's `commit` alone.

        Raises:
            LeaseLost: the lease is given and no longer holds.
            StateError: there is no such round.
            ValueError: the event is not to be told here, or not without a lease.
        """
        of_leader = isinstance(event, DeadlinePassed | Unopened)
        if isinstance(event, Committed | Answered) or (of_leader and lease is None):
            raise ValueError(event)
        if lease is not None:
            hold(tx, lease)
        return tell(tx, run, deciding(tx, run, locked(tx, run, number)[0]), event)


def locked(tx: Writing, run: str, number: int) -> tuple[Round, str]:
    """A round, which nobody else changes until the end of the transaction, and its base.

    Raises:
        StateError: there is no such round.
    """
    row = tx.execute(_LOCKED, {"run": run, "number": number}).one_or_none()
    row = found(row, f"round {number} of run {run!r}")
    return parsed(json.loads(row.state)), row.base


def locked_by_upload(tx: Writing, upload_id: str) -> Round:
    """The round that decides about an upload, as `locked`. Whoever changes an upload's state holds its round's lock.

    Raises:
        StateError: there is no such upload.
    """
    row = found(tx.execute(_LOCKED_BY_UPLOAD, {"upload": upload_id}).one_or_none(), f"upload {upload_id!r}")
    return deciding(tx, row.run, parsed(json.loads(row.state)))


def deciding(tx: Writing, run: str, round: Round) -> Round:
    """What decides about an answer to a task of a locked round, locked: the round itself, or the latest version."""
    while isinstance(round, Version):  # while this waited for a lock, a later one may have been opened
        latest = tx.execute(_LATEST, {"run": run}).scalar_one()
        if latest == round.number:
            break
        round, _ = locked(tx, run, latest)
    return round


def tell(tx: Writing, run: str, round: Round, *events: Event) -> Verdict:
    """Apply events to a locked round, all or none, and write what became of it. As a version closes, the next is
    opened."""
    after, verdict, _ = apply_all(round, events)
    if verdict.accepted:
        tx.execute(_CHANGE, {"its_run": run, "its_number": round.number, "state": _text(after)})
        following = after.following() if isinstance(after, Version) and after.phase is Phase.CLOSED else None
        if following is not None:
            insert_if_new(tx, rounds, {"run": run, "number": following.number, "state": _text(following), "base": ""})
        tx.publish(f"run/{run}")
    return verdict


def apply_all(round: Round, events: Sequence[Event]) -> tuple[Round, Verdict, int]:
    """The round after these events; or, at the first that is refused, the verdict on it and its place."""
    verdict = ACCEPTED
    for place, event in enumerate(events):
        round, verdict = round.apply(event)
        if not verdict.accepted:
            return round, verdict, place
    return round, verdict, len(events)


def refusal_code(round: Round, event: Answered | Failed) -> Refusal:
    """The kind of a round's refusal of an answer."""
    if isinstance(round, Version) and round.is_stale(event.round):
        return Refusal.STALE
    if event.site in round.answered:
        return Refusal.REPLAYED
    if event.site not in round.cohort and not isinstance(round, Version):
        return Refusal.NOT_INVITED
    if round.target is not None and len(round.answered) >= round.target:
        return Refusal.ENOUGH
    return Refusal.ROUND_CLOSED


def _is(run: str, number: int) -> tuple[sa.ColumnElement[bool], ...]:
    return rounds.c.run == run, rounds.c.number == number


def _text(round: Round) -> str:
    return json.dumps(round.to_json())


def _refuse_others(tx: Writing, run: str, round: Round) -> None:
    relayed = uploads.c.task.in_(sa.select(tasks.c.id).where(tasks.c.run == run, tasks.c.kind == "relay"))
    tx.execute(
        uploads.update()
        .where(
            uploads.c.run == run,
            uploads.c.round == round.number,
            uploads.c.state.in_(["accepted", "open"]),
            uploads.c.site.not_in(list(round.answered)),
            ~(relayed & (uploads.c.state == "accepted")),  # a region's sum, whose sites have all answered
        )
        .values(state="refused", code=Refusal.ROUND_CLOSED, reason=f"round {round.number} was abandoned and begun anew")
    )
