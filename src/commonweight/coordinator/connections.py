"""SQLAlchemy engines for the two databases, and what their errors mean to a person."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from ..errors import RecipeError, StateError, StorageError

#: the first SQLite with UPDATE … RETURNING
_SQLITE = (3, 35)
_READERS = 8
_POSTGRES_CONNECTIONS = 16


def parse_url(url: str) -> sa.URL:
    """The address of a database, with the driver that is used for it."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise RecipeError("the database's address cannot be read", hint=_FORMS) from error
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise RecipeError(f"the database's address begins with {backend!r}", hint=_FORMS)
    return parsed.set(drivername="sqlite" if backend == "sqlite" else "postgresql+psycopg")


_FORMS = "sqlite:////folder/state.sqlite or postgresql://user:password@host:5432/database"


def connect_engines(url: sa.URL, patience_s: float) -> tuple[sa.Engine, sa.Engine]:
    """Engines for writing and for reading; nothing is connected yet."""
    if url.get_backend_name() == "postgresql":
        engine = _postgres(url, patience_s)
        return engine, engine.execution_options(isolation_level="AUTOCOMMIT")
    if sqlite3.sqlite_version_info < _SQLITE:
        raise StorageError(
            f"this Python has SQLite {sqlite3.sqlite_version}; 3.35 or newer is needed",
            hint="use a newer Python build, or PostgreSQL",
        )
    if url.database in (None, "", ":memory:"):
        engine = _sqlite(url, patience_s, read_only=False, poolclass=StaticPool)
        return engine, engine
    assert url.database is not None
    _make_private(Path(url.database))
    writers = _sqlite(url, patience_s, read_only=False, poolclass=NullPool)
    readers = _sqlite(
        url,
        patience_s,
        read_only=True,
        poolclass=QueuePool,
        pool_size=_READERS,
        max_overflow=_READERS,
        pool_timeout=max(patience_s, 1.0),
    )
    return writers, readers


def _make_private(path: Path) -> None:
    """The file is its owner's alone; SQLite gives its companions the same permissions."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(
            f"the database {path} cannot be opened: {error.strerror}",
            hint="check that the folder exists and that you may write there",
        ) from error


def _sqlite(url: sa.URL, patience_s: float, *, read_only: bool, **pool: Any) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": patience_s, "check_same_thread": False}, **pool)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        if read_only:
            connection.execute("PRAGMA query_only=ON")

    if not read_only:

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgres(url: sa.URL, patience_s: float) -> sa.Engine:
    engine = sa.create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=_POSTGRES_CONNECTIONS,
        max_overflow=_POSTGRES_CONNECTIONS,
        pool_timeout=max(patience_s, 1.0),
        connect_args=postgres_arguments(patience_s),
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.autocommit = True
        # a process that is stopped within a transaction must not hold its locks for ever
        connection.execute(
            f"SET lock_timeout = {max(1, round(patience_s * 1000))}; SET idle_in_transaction_session_timeout = 10000"
        )
        connection.autocommit = False

    return engine


def postgres_arguments(patience_s: float) -> dict[str, Any]:
    """How to connect: a server that has vanished is noticed within about ten seconds."""
    return {
        "connect_timeout": max(2, math.ceil(patience_s)),
        "application_name": "commonweight",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }


def is_transient(error: Exception) -> bool:
    """Whether the same transaction may succeed in a moment."""
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return _primary_code(error.orig) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return error.connection_invalidated or isinstance(error, OperationalError)


def _primary_code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
_FORBIDDEN = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn a database's errors into ours."""
    try:
        yield
    except PoolTimeout as error:
        raise StorageError(f"every connection to the database {name} is in use", retry=True) from error
    except IntegrityError as error:
        raise StateError(f"the database {name} refuses an entry: {_first_line(error)}") from error
    except DBAPIError as error:
        raise _explanation(error, name) from error


def _explanation(error: DBAPIError, name: str) -> StateError | StorageError:
    reason = _first_line(error)
    code = _primary_code(error.orig) if isinstance(error.orig, sqlite3.Error) else None
    if code in _DAMAGED:
        return StateError(f"the database {name} is damaged: {reason}", hint="restore it from a copy")
    if code in _FORBIDDEN:
        return StorageError(
            f"the database {name} cannot be opened or written: {reason}",
            hint="check that the folder exists and that you may write there",
        )
    if code == sqlite3.SQLITE_FULL:
        return StorageError(f"the database {name} cannot grow: {reason}", hint="free some space", retry=True)
    if code in _PASSING or (code is None and (error.connection_invalidated or isinstance(error, OperationalError))):
        return StorageError(
            f"the database {name} cannot be reached or written just now: {reason}",
            hint="nothing that was answered is lost; it goes on by itself when the database is back",
            retry=True,
        )
    return StateError(f"the database {name} does not fit this program: {reason}", hint="restore it from a copy")


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
