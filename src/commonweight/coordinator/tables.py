"""The coordinator's tables. `migrations/` brings a database to this form; a test holds the two together.

Columns of one thing bear the names of its dataclass's fields. Times are seconds since the epoch. Bytes that only one
program reads (a round's state, a record of the journal) are JSON text.
"""

from __future__ import annotations

import sqlalchemy as sa

#: the newest revision in `migrations/versions`
REVISION = "0002"

metadata = sa.MetaData()


def _run() -> sa.Column[str]:
    return sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), primary_key=True)


tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("secret_hash", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("replace", sa.Boolean, nullable=False),
    sa.Column("made_by", sa.Text, nullable=False),
    sa.Column("made_at", sa.Double, nullable=False),
    sa.Column("used_at", sa.Double),
)

principals = sa.Table(
    "principals",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("signing_key", sa.LargeBinary, nullable=False),
    sa.Column("enrolled_at", sa.Double, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
)

certificates = sa.Table(
    "certificates",
    metadata,
    sa.Column("serial", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, sa.ForeignKey("principals.name"), nullable=False, index=True),
    sa.Column("not_after", sa.Double, nullable=False),
    sa.Column("replaced", sa.Boolean, nullable=False, default=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("t", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("recipe", sa.Text, nullable=False),
    sa.Column("job", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("certificate", sa.LargeBinary, nullable=False),
    sa.Column("signer", sa.Text, nullable=False),
    sa.Column("upload", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("error", sa.Text, nullable=False, default=""),
    sa.Column("hint", sa.Text, nullable=False, default=""),
    sa.Column("cancelled_by", sa.Text, nullable=False, default=""),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
)

#: who leads a run; apart from `runs`, so that a renewal rewrites a few bytes
leases = sa.Table(
    "leases",
    metadata,
    _run(),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)

members = sa.Table(
    "members",
    metadata,
    _run(),
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

identities = sa.Table(
    "identities", metadata, _run(), sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text)
)

commits = sa.Table(
    "commits",
    metadata,
    _run(),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
)

results = sa.Table(
    "results", metadata, _run(), sa.Column("key", sa.Text, primary_key=True), sa.Column("record", sa.Text)
)

#: what each round cost each site whose update was in it
spends = sa.Table(
    "spends",
    metadata,
    _run(),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("unit", sa.Text, nullable=False),
    sa.Column("adjacency", sa.Text, nullable=False),
    sa.Column("mechanism", sa.Text, nullable=False),
    sa.Column("noise_multiplier", sa.Double, nullable=False),
    sa.Column("sampling", sa.Double, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("t", sa.Double, nullable=False),
    sa.Index("spends_of_site", "site"),
)

rounds = sa.Table(
    "rounds",
    metadata,
    _run(),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
)

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("site", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("deadline_at", sa.Double),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("result", sa.LargeBinary),
    sa.Column("offered_at", sa.Double, nullable=False),
    sa.Index("tasks_of_run", "run", "round"),
    sa.Index("tasks_of_site", "site", "state"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("site", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("data_key", sa.LargeBinary),
    sa.Column("blob", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Index("uploads_by_manifest", "run", "round", "site", "digest", unique=True),
)
sa.Index(
    "uploads_counted_once",
    uploads.c.run,
    uploads.c.round,
    uploads.c.site,
    unique=True,
    sqlite_where=uploads.c.state.in_(["accepted", "spent"]),
    postgresql_where=uploads.c.state.in_(["accepted", "spent"]),
)

#: the number of a run's events so far; apart from them, so that two writers never take one number
event_counts = sa.Table("event_counts", metadata, _run(), sa.Column("last", sa.BigInteger, nullable=False))

events = sa.Table(
    "events",
    metadata,
    _run(),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("line", sa.Text, nullable=False),
)

presence = sa.Table(
    "presence",
    metadata,
    sa.Column("site", sa.Text, primary_key=True),
    sa.Column("replica", sa.Text, nullable=False),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("last_seen", sa.Double, nullable=False),
)
