"""Bring a database to the present revision, whole or not at all, by one process at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa

from ..errors import StateError
from .database import Writing
from .tables import REVISION

#: any number; it names the lock under which PostgreSQL's transactions migrate
_LOCK = 0x6D696772617465
#: alembic keeps what it is doing in a global of its own
_one_at_a_time = threading.Lock()


def migrate(tx: Writing) -> None:
    """Within a transaction, which on SQLite locks the file and on PostgreSQL takes a lock of its own.

    Raises:
        StateError: the database is of a newer version, or is not the coordinator's.
    """
    if tx.dialect == "postgresql":
        tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    present = _revision(tx.connection)
    if present == REVISION:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = tx.connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        raise StateError(
            f"the database is at revision {present!r}, which this version of commonweight does not know",
            hint="it was used by a newer version: run that one, or restore the copy made before",
        )
    if present is None and sa.inspect(tx.connection).has_table("runs"):
        raise StateError("the database holds another program's tables", hint="give the coordinator one of its own")
    with _one_at_a_time:
        command.upgrade(config, REVISION)


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
