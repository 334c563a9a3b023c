"""What happens in a run, line by line, and which sites are here now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from .database import Part, Writing, found, reading, upsert, writing
from .tables import event_counts, events, presence

_COUNT = (
    event_counts.update()
    .where(event_counts.c.run == sa.bindparam("its_run"))
    .values(last=event_counts.c.last + sa.bindparam("more"))
    .returning(event_counts.c.last)
)
_SEEN = (
    presence.update()
    .where(presence.c.site == sa.bindparam("who"), presence.c.session == sa.bindparam("its_session"))
    .values(last_seen=sa.bindparam("now"))
)


class EventsPart(Part):
    """Events of runs in the store. Topic: `events/<id>`."""

    @writing
    def add_events(self, tx: Writing, run: str, lines: Sequence[str]) -> int:
        """Append events; returns the last one's sequence number (1, 2, … within the run).

        Args:
            lines: JSON, one event each.

        Raises:
            StateError: there is no such run.
        """
        count = tx.execute(_COUNT, {"its_run": run, "more": len(lines)}).scalar_one_or_none()
        last = int(found(count, f"run {run!r}"))
        if lines:
            first = last - len(lines) + 1
            tx.execute(events.insert(), [{"run": run, "sequence": first + k, "line": s} for k, s in enumerate(lines)])
            tx.publish(f"events/{run}")
        return last

    @reading
    def events(self, connection: sa.Connection, run: str, after: int = 0, limit: int = 1000) -> list[tuple[int, str]]:
        """(sequence, line) of the events after a sequence number, in order."""
        query = (
            sa.select(events.c.sequence, events.c.line)
            .where(events.c.run == run, events.c.sequence > after)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        return [(row.sequence, row.line) for row in connection.execute(query)]


class PresencePart(Part):
    """Which replica each site attends. Topic: `sites`."""

    @writing
    def attend(self, tx: Writing, site: str, replica: str, session: str) -> None:
        """A site has come; a session that it had before, here or elsewhere, is over."""
        upsert(tx, presence, {"site": site, "replica": replica, "session": session, "last_seen": tx.now})
        tx.publish("sites")

    @writing
    def seen(self, tx: Writing, site: str, session: str) -> bool:
        """A site gave a sign of life. False: its session is over, because it came back in another."""
        return tx.execute(_SEEN, {"who": site, "its_session": session, "now": tx.now}).rowcount == 1

    @writing
    def seen_all(self, tx: Writing, sessions: Mapping[str, str]) -> None:
        """Signs of life of many sites at once: their sessions, by site."""
        rows = [{"who": site, "its_session": session, "now": tx.now} for site, session in sessions.items()]
        if rows:
            tx.execute(_SEEN, rows)

    @writing
    def left(self, tx: Writing, site: str, session: str) -> None:
        """A site's session has ended."""
        gone = tx.execute(presence.delete().where(presence.c.site == site, presence.c.session == session))
        if gone.rowcount:
            tx.publish("sites")

    @reading
    def attending(self, connection: sa.Connection) -> dict[str, tuple[str, float]]:
        """(replica, when last seen) of each site that came and has not left. A replica that died leaves its sites here:
        look at when they were last seen."""
        rows = connection.execute(sa.select(presence).order_by(presence.c.site))
        return {row.site: (row.replica, row.last_seen) for row in rows}
