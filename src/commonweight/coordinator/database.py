"""One database, SQLite or PostgreSQL: short transactions that are tried again when the fault is a passing one.

SQLite: one connection writes, under a lock and in `BEGIN IMMEDIATE`; others read what is committed (WAL). Every commit
is on the disk before it is answered (`synchronous=FULL`).
PostgreSQL: READ COMMITTED, with row locks where a method reads before it writes. Rows are always locked in one order:
lease, round, upload, task, event count, the end of the audit log. A connection that breaks during COMMIT leaves open
whether it was done; the transaction's status is then asked for, so that nothing is done twice.

A method marked `writing` is one transaction and gets it as its first argument; one marked `reading` gets a connection.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..errors import StateError, StorageError
from .bus import CHANNEL, Bus
from .connections import connect_engines, explained, is_transient, parse_url

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Part")

_ANNOUNCE = sa.text(
    "SELECT CAST(pg_current_xact_id() AS text), "
    f"(SELECT count(pg_notify('{CHANNEL}', t)) FROM unnest(CAST(:topics AS text[])) AS t)"
)
_STATUS = sa.text("SELECT pg_xact_status(CAST(:xid AS xid8))")
#: what PostgreSQL says of a transaction that it does not know of: invalid_parameter_value
_IN_THE_FUTURE = "22023"


@dataclass
class Writing:
    """A transaction: its connection, the time at which it began, and what to tell the others once it is committed."""

    connection: sa.Connection
    now: float
    topics: list[str] = field(default_factory=list)

    @property
    def dialect(self) -> str:
        return self.connection.dialect.name

    def execute(self, statement: sa.Executable, values: Any = None) -> sa.CursorResult[Any]:
        return self.connection.execute(statement, values)

    def publish(self, *topics: str) -> None:
        """After the commit: these may have changed."""
        self.topics.extend(topics)


class Database:
    """Opens a database and brings it to the present revision.

    Args:
        url: `sqlite:///PATH`, `sqlite://` (in memory, for tests) or `postgresql://…`.
        patience_s: for how long a passing fault is waited for before it becomes an error.

    Raises:
        RecipeError: the address is none of these.
        StateError: the database is damaged, or a newer version's.
        StorageError: it cannot be opened or written; `retry` when it may come back.
    """

    def __init__(self, url: str, *, clock: Callable[[], float], patience_s: float) -> None:
        self.url = parse_url(url)
        self.clock, self.patience_s = clock, patience_s
        self.name = self.url.set(drivername=self.url.get_backend_name()).render_as_string(hide_password=True)
        self.is_postgres = self.url.get_backend_name() == "postgresql"
        self._writer_lock = threading.Lock()
        self._writer: sa.Connection | None = None
        with explained(self.name):
            self._writers, self._readers = connect_engines(self.url, patience_s)
        self._in_memory = self._readers is self._writers
        self.bus = Bus(self.url if self.is_postgres else None)

    def open(self) -> None:
        """Migrate, then begin to listen to the other replicas."""
        from .migrate import migrate

        try:
            self._patiently(lambda: self._once(migrate))
        except BaseException:
            self.close()
            raise
        self.bus.open()

    def close(self) -> None:
        self.bus.close()
        with self._writer_lock:
            self._drop_writer()
        self._readers.dispose()
        self._writers.dispose()

    def write(self, work: Callable[[Writing], R]) -> R:
        """Carry out `work` in one transaction, from its beginning again after a passing fault. It must do nothing
        outside the transaction."""
        result, topics = self._patiently(lambda: self._once(work))
        self.bus.tell(topics)
        return result

    def read(self, work: Callable[[sa.Connection], R]) -> R:
        """Carry out `work` on a connection that commits nothing."""

        def attempt() -> R:
            if self._in_memory:
                with self._sqlite_writer() as connection, connection.begin():
                    return work(connection)
            with self._readers.connect() as connection:
                return work(connection)

        return self._patiently(attempt)

    def _once(self, work: Callable[[Writing], R]) -> tuple[R, list[str]]:
        if self.is_postgres:
            with self._writers.connect() as connection:
                return self._once_postgres(work, connection)
        with self._sqlite_writer() as connection, connection.begin():
            tx = Writing(connection, self.clock())
            return work(tx), tx.topics

    def _once_postgres(self, work: Callable[[Writing], R], connection: sa.Connection) -> tuple[R, list[str]]:
        tx = Writing(connection, self.clock())
        with connection.begin() as transaction:
            result = work(tx)
            topics = [self.bus.addressed(topic) for topic in dict.fromkeys(tx.topics)]
            xid = connection.execute(_ANNOUNCE, {"topics": topics}).scalar_one()
            try:
                transaction.commit()
            except DBAPIError as error:
                if not error.connection_invalidated or not self._was_committed(xid):
                    raise
        return result, tx.topics

    def _was_committed(self, xid: str) -> bool:
        """What became of a transaction whose COMMIT was never answered."""
        ends = time.monotonic() + self.patience_s
        while True:
            try:
                with self._readers.connect() as connection:
                    status = connection.execute(_STATUS, {"xid": xid}).scalar_one_or_none()
                if status != "in progress":
                    return bool(status == "committed")
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) == _IN_THE_FUTURE:
                    return False  # nothing of it had reached the disk when the server crashed
                if not is_transient(error):
                    raise
            if time.monotonic() > ends:
                raise StorageError(
                    f"the database {self.name} was lost during a commit; whether it was done is not known yet",
                    hint="look at the state again before repeating",
                    retry=True,
                )
            time.sleep(0.1)

    @contextmanager
    def _sqlite_writer(self) -> Iterator[sa.Connection]:
        """The one writing connection. After an error it is opened anew."""
        if not self._writer_lock.acquire(timeout=max(self.patience_s, 0.001)):
            raise StorageError(f"the database {self.name} is busy for {self.patience_s:g} s already", retry=True)
        try:
            if self._writer is None:
                self._writer = self._writers.connect()
            yield self._writer
        except SQLAlchemyError:
            self._drop_writer()
            raise
        finally:
            self._writer_lock.release()

    def _drop_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _patiently(self, attempt: Callable[[], R]) -> R:
        ends, pause = time.monotonic() + self.patience_s, 0.01
        while True:
            with explained(self.name):
                try:
                    return attempt()
                except DBAPIError as error:
                    if not is_transient(error) or time.monotonic() + pause > ends:
                        raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 0.5)


class Part:
    """One aspect of the store: methods over its database."""

    database: Database


def writing(method: Callable[Concatenate[S, Writing, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method one transaction, whose handle it gets as its first argument."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.database.write(lambda tx: method(self, tx, *args, **kwargs))

    return call


def reading(method: Callable[Concatenate[S, sa.Connection, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method a look at what is committed; it gets a connection as its first argument."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.database.read(lambda connection: method(self, connection, *args, **kwargs))

    return call


def upsert(tx: Writing, table: sa.Table, values: dict[str, Any]) -> None:
    """Insert a row, or overwrite the one with its primary key."""
    keys = [column.name for column in table.primary_key]
    statement = insert_for(tx, table).values(values)
    changed = {name: statement.excluded[name] for name in values if name not in keys}
    tx.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))


def insert_if_new(tx: Writing, table: sa.Table, values: dict[str, Any]) -> bool:
    """Insert a row unless there is one with its primary key; whether it was inserted."""
    first = next(iter(table.primary_key))
    return (
        tx.execute(insert_for(tx, table).values(values).on_conflict_do_nothing().returning(first)).first() is not None
    )


def insert_for(tx: Writing, table: sa.Table) -> Any:
    """An INSERT that knows `on_conflict_do_…`."""
    if tx.dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgres_insert

        return postgres_insert(table)
    from sqlalchemy.dialects.sqlite import insert as sqlite_insert

    return sqlite_insert(table)


def found(row: R | None, what: str) -> R:
    """A row that must be there.

    Raises:
        StateError: it is not.
    """
    if row is None:
        raise StateError(f"{what} is not in the coordinator's database")
    return row
