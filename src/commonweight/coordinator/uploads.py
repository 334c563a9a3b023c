"""Uploads: the updates that sites send, from the signed manifest to the commit of their round.

    open ──► accepted ──► spent (its round is committed)          (open) ──► refused, with a code

At most one upload of a site counts in a round: a unique index holds that, whatever the code does. In an asynchronous
run an upload's round is its task's, and the version in which it counts says so itself (`Version.answers`). A row stays
for good, so that a repeat gets the answer that the first got; its key and the name of its blob go when the blob is
deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from ..errors import StateError
from ..federation.round import ACCEPTED, Answered, Failed, Round, Verdict
from ..federation.version import Version
from ..wire.refusals import Refusal, Refused
from .audit import append
from .database import Part, Writing, found, reading, writing
from .rounds import apply_all, deciding, locked, locked_by_upload, refusal_code, tell
from .runs import ENDED
from .tables import runs, uploads
from .tasks import end_task

COUNTED = ("accepted", "spent")
#: different updates that a site may offer for one round; each takes a row and, while it is open, a file
MOST_OFFERS = 32


@dataclass(frozen=True)
class Upload:
    """A site's upload for a round.

    Args:
        id: chosen by whoever opens it; random.
        task: the task that it answers.
        digest: hex SHA-256 of the manifest.
        manifest, signature: as the site sent them.
        data_key: the key of the data at rest, wrapped; None once it is forgotten.
        blob: where the data are; empty once they are deleted, and of an update that came in a relay's sum.
        state: open, accepted, refused or spent; `code` (wire/refusals.py) and `reason` say why it was refused.
        opened_at: set by the store.
    """

    id: str
    run: str
    round: int
    site: str
    task: str
    digest: str
    manifest: bytes
    signature: bytes
    data_key: bytes | None
    blob: str
    state: str = "open"
    code: str = ""
    reason: str = ""
    opened_at: float = 0.0

    @property
    def counts(self) -> bool:
        return self.state in COUNTED

    @property
    def verdict(self) -> Verdict | None:
        """What was decided; None while it is open."""
        if self.state == "open":
            return None
        return ACCEPTED if self.counts else Verdict(False, self.reason)


_BY_ID = sa.select(uploads, runs.c.state.label("run_state")).join(runs).where(uploads.c.id == sa.bindparam("upload"))
_OF_SITE = sa.select(uploads).where(
    uploads.c.run == sa.bindparam("run"),
    uploads.c.round == sa.bindparam("round"),
    uploads.c.site == sa.bindparam("site"),
)
_RUN_STATE = sa.select(runs.c.state).where(runs.c.id == sa.bindparam("run"))
_SPEND = (
    uploads.update()
    .where(
        uploads.c.run == sa.bindparam("of_run"),
        uploads.c.round == sa.bindparam("of_round"),
        uploads.c.site == sa.bindparam("of_site"),
        uploads.c.state == "accepted",
    )
    .values(state="spent")
)
_END = (
    uploads.update()
    .where(uploads.c.id == sa.bindparam("upload"))
    .values(state=sa.bindparam("to"), code=sa.bindparam("its_code"), reason=sa.bindparam("why"))
)


class UploadsPart(Part):
    """Uploads in the store. Topic: `run/<id>`."""

    @writing
    def open_upload(self, tx: Writing, upload: Upload, sites: Sequence[str] = ()) -> Upload:
        """Begin an upload, or find the one with this manifest, in whatever state it is.

        Args:
            sites: whose updates are in it, if it is a region's sum.

        Raises:
            Refused: `unknown-run`, `run-ended`; `replayed`: another update of this site counts in the round;
                `not-invited`, `round-closed`, `enough`: the round would not take it any more.
        """
        state = tx.execute(_RUN_STATE, {"run": upload.run}).scalar_one_or_none()
        if state is None:
            raise Refused(Refusal.UNKNOWN_RUN, f"there is no run {upload.run!r}")
        try:
            round = deciding(tx, upload.run, locked(tx, upload.run, upload.round)[0])
        except StateError:
            raise Refused(Refusal.WRONG_TASK, f"round {upload.round} of run {upload.run!r} was never opened") from None
        values = {"run": upload.run, "round": upload.round, "site": upload.site}
        others = _rows(tx.execute(_OF_SITE, values))
        for other in others:
            if other.digest == upload.digest:
                return other
        if any(other.counts for other in others):
            raise Refused(Refusal.REPLAYED, _replayed(upload))
        if len(others) >= MOST_OFFERS:
            raise Refused(
                Refusal.TOO_LARGE, f"{upload.site} has offered {len(others)} different updates for round {upload.round}"
            )
        if state in ENDED:
            raise Refused(Refusal.RUN_ENDED, f"run {upload.run!r} is {state}")
        answers = [Answered(site, upload.round) for site in sites or (upload.site,)]
        _, verdict, place = apply_all(round, answers)
        if not verdict.accepted:
            raise Refused(refusal_code(round, answers[place]), verdict.reason)
        opened = replace(upload, state="open", code="", reason="", opened_at=tx.now)
        tx.execute(uploads.insert(), vars(opened))
        return opened

    @reading
    def upload(self, connection: sa.Connection, upload_id: str) -> Upload | None:
        rows = _rows(connection.execute(sa.select(uploads).where(uploads.c.id == upload_id)))
        return rows[0] if rows else None

    @reading
    def find_upload(self, connection: sa.Connection, run: str, round: int, site: str, digest: str) -> Upload | None:
        """The upload of a site's manifest for a round."""
        query = _OF_SITE.where(uploads.c.digest == digest)
        rows = _rows(connection.execute(query, {"run": run, "round": round, "site": site}))
        return rows[0] if rows else None

    @reading
    def has_offered(self, connection: sa.Connection, run: str, round: int, site: str) -> bool:
        """Whether a site, or a relay, has begun an upload for a round."""
        values = {"run": run, "round": round, "site": site}
        return connection.execute(_OF_SITE, values).first() is not None

    @writing
    def accept_upload(self, tx: Writing, upload_id: str, members: Sequence[Upload] = ()) -> Verdict:
        """The data have arrived and were checked: let the round decide. If it takes the answer, the upload counts from
        this instant and its task is done; if not, the upload is refused. Asking again gives the same verdict.

        Args:
            members: the updates that are in it, if it is a region's sum. They count with it, all or none, and their
                tasks are done.

        Raises:
            StateError: there is no such upload.
        """
        round = locked_by_upload(tx, upload_id)
        upload, run_state = _read(tx, upload_id)
        if upload.verdict is not None:
            return upload.verdict
        if run_state in ENDED:
            return _refuse(tx, upload, Refusal.RUN_ENDED, f"run {upload.run!r} is {run_state}")
        if isinstance(round, Version) and _one_counts(tx, upload):  # perhaps in an earlier version's buffer
            return _refuse(tx, upload, Refusal.REPLAYED, _replayed(upload))
        answers = [Answered(site, upload.round) for site in [m.site for m in members] or [upload.site]]
        _, verdict, place = apply_all(round, answers)
        if not verdict.accepted:
            return _refuse(tx, upload, refusal_code(round, answers[place]), verdict.reason)
        tell(tx, upload.run, round, *answers)
        tx.execute(_END, {"upload": upload.id, "to": "accepted", "its_code": "", "why": ""})
        end_task(tx, upload.task, upload.site, "done")
        details: dict[str, Any] = {"round": upload.round, "manifest": upload.digest}
        if not members:
            append(tx, "update accepted", actor=upload.site, subject=upload.run, **details)
            return verdict
        for member in members:
            _count_member(tx, member, upload.site)
        append(tx, "partial sum accepted", actor=upload.site, subject=upload.run, **details, sites=len(members))
        return verdict

    @writing
    def refuse_upload(self, tx: Writing, upload_id: str, code: Refusal, reason: str) -> Verdict:
        """The data break their contract: the upload is refused, its task has failed, and the round gives the site up
        if it still waits for it. Returns the verdict on the upload; one that is decided already stays as it is.

        Raises:
            StateError: there is no such upload.
        """
        round = locked_by_upload(tx, upload_id)
        upload, _ = _read(tx, upload_id)
        if upload.verdict is not None:
            return upload.verdict
        tell(tx, upload.run, round, Failed(upload.site, upload.round, reason))
        return _refuse(tx, upload, code, reason)

    @reading
    def accepted_uploads(
        self, connection: sa.Connection, run: str, round: int, sites: Collection[str] | None = None
    ) -> list[Upload]:
        """What a round has to fold, by site's name; of these sites alone if they are given."""
        query = (
            sa.select(uploads)
            .where(uploads.c.run == run, uploads.c.round == round, uploads.c.state == "accepted")
            .order_by(uploads.c.site)
        )
        return _rows(connection.execute(query if sites is None else query.where(uploads.c.site.in_(sites))))

    @reading
    def spent_uploads(self, connection: sa.Connection, run: str) -> list[Upload]:
        """Uploads whose data are of no more use and are there still: spent and refused ones, and all of a run that has
        ended."""
        over = uploads.c.state.in_(["spent", "refused"]) | runs.c.state.in_(ENDED)
        query = sa.select(uploads).join(runs).where(uploads.c.run == run, uploads.c.blob != "", over)
        return _rows(connection.execute(query.order_by(uploads.c.opened_at, uploads.c.id)))

    @reading
    def leftovers(self, connection: sa.Connection) -> list[Upload]:
        """Uploads of runs that have ended whose data are there still."""
        query = sa.select(uploads).join(runs).where(uploads.c.blob != "", runs.c.state.in_(ENDED))
        return _rows(connection.execute(query.order_by(uploads.c.opened_at, uploads.c.id)))

    @writing
    def forget_upload(self, tx: Writing, upload_id: str) -> None:
        """Its blob is deleted: forget its key too. The row itself stays.

        Raises:
            StateError: there is no such upload.
        """
        change = uploads.update().where(uploads.c.id == upload_id).values(data_key=None, blob="")
        found(tx.execute(change.returning(uploads.c.id)).one_or_none(), f"upload {upload_id!r}")


def spend(tx: Writing, run: str, round: Round) -> None:
    """A round is committed: what counted in it and before is spent, what was still arriving is refused. Of a version,
    what counts in it is spent, and only what will be too stale for the next is refused."""
    if isinstance(round, Version):
        for site, started in round.answers:
            values = {"of_run": run, "of_round": started + 1, "of_site": site}
            tx.execute(_SPEND, values)
        late, code, reason = uploads.c.round < round.oldest, Refusal.STALE, f"version {round.number} is committed"
    else:
        before = (uploads.c.run == run, uploads.c.round <= round.number, uploads.c.state == "accepted")
        tx.execute(uploads.update().where(*before).values(state="spent"))
        late, code, reason = uploads.c.round <= round.number, Refusal.ROUND_CLOSED, f"round {round.number} is committed"
    arriving = uploads.update().where(uploads.c.run == run, late, uploads.c.state == "open")
    tx.execute(arriving.values(state="refused", code=code, reason=reason))


def _read(tx: Writing, upload_id: str) -> tuple[Upload, str]:
    """An upload, and the state of its run."""
    row = dict(tx.execute(_BY_ID, {"upload": upload_id}).mappings().one())
    run_state = row.pop("run_state")
    return Upload(**row), run_state


def _one_counts(tx: Writing, upload: Upload) -> bool:
    """Whether an update of the same site for the same round counts already."""
    values = {"run": upload.run, "round": upload.round, "site": upload.site}
    return any(other.counts for other in _rows(tx.execute(_OF_SITE, values)))


def _replayed(upload: Upload) -> str:
    return f"another update of {upload.site} counts in round {upload.round} already"


def _refuse(tx: Writing, upload: Upload, code: Refusal, reason: str) -> Verdict:
    tx.execute(_END, {"upload": upload.id, "to": "refused", "its_code": str(code), "why": reason})
    end_task(tx, upload.task, upload.site, "failed", reason)
    details = {"round": upload.round, "manifest": upload.digest, "code": str(code), "reason": reason}
    append(tx, "update refused", actor=upload.site, subject=upload.run, **details)
    tx.publish(f"run/{upload.run}")
    return Verdict(False, reason)


def _count_member(tx: Writing, member: Upload, relay: str) -> None:
    """An update that came in a relay's sum. Its site may have begun to send it here as well: then that row counts, and
    what came of it is of no use."""
    key = (uploads.c.run == member.run, uploads.c.round == member.round, uploads.c.site == member.site)
    change = uploads.update().where(*key, uploads.c.digest == member.digest)
    if not tx.execute(change.values(state="accepted", code="", reason="")).rowcount:
        tx.execute(uploads.insert(), vars(replace(member, state="accepted", opened_at=tx.now)))
    end_task(tx, member.task, member.site, "done")
    tx.publish(f"tasks/{member.site}")  # it waits to be told
    details = {"round": member.round, "manifest": member.digest, "relay": relay}
    append(tx, "update accepted", actor=member.site, subject=member.run, **details)


def _rows(result: sa.CursorResult[Any]) -> list[Upload]:
    return [Upload(**row) for row in result.mappings()]
