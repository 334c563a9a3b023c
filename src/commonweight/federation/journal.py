"""The journal: what has happened in a run, in one SQLite file. What is not in it has not happened.

Files (a round's tensors, an update kept for later) are written first, under names of their own, and named here
afterwards in one transaction; a file that no row names is rubbish from a crash and is ignored.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..errors import StateError, StorageError

_FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS commits (round INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS updates (
    round INTEGER NOT NULL, site TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (round, site));
CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, record TEXT NOT NULL);
"""


class RunJournal(Protocol):
    """What the loop asks of a journal, wherever it lies."""

    def last_round(self) -> int: ...
    def commit(self, round: int, record: Mapping[str, Any]) -> None: ...
    def commits(self) -> dict[int, dict[str, Any]]: ...
    def put(self, key: str, record: Mapping[str, Any]) -> None: ...
    def get(self, key: str) -> dict[str, Any] | None: ...
    def drop(self, key: str) -> None: ...


class Journal:
    """Opens the journal of a run, making it if need be.

    Raises:
        StateError: the file is no journal, or another format's.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA secure_delete=ON")  # what is struck out must not be left in free pages
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
        self.bind({"format": str(_FORMAT)})

    def close(self) -> None:
        self._db.close()

    def bind(self, identity: Mapping[str, str]) -> None:
        """Tie the run to what it is made of, or check that it still is.

        Raises:
            StateError: a value differs from the one that the run began with; both are named.
        """
        with self._explained():
            known = dict(self._db.execute("SELECT key, value FROM identity"))
            for key, value in identity.items():
                if known.get(key, value) != value:
                    raise StateError(
                        f"this run began with another {key}: {known[key]}, now {value}",
                        hint="resume it with what it began with, or start a new run in another folder (-o)",
                    )
            missing = [(key, value) for key, value in identity.items() if key not in known]
            with self._transaction():
                self._db.executemany("INSERT INTO identity VALUES (?, ?)", missing)

    def last_round(self) -> int:
        """The latest committed round, 0 before the first."""
        with self._explained():
            row = self._db.execute("SELECT max(round) FROM commits").fetchone()
        return int(row[0] or 0)

    def commit(self, round: int, record: Mapping[str, Any]) -> None:
        """A round's new global state, whose files are written, becomes the truth; its kept updates are forgotten.

        Round 0 is the initial state. Committing a round twice is a defect and raises StateError.
        """
        with self._explained(), self._transaction():
            self._db.execute("INSERT INTO commits VALUES (?, ?)", (round, json.dumps(record)))
            self._db.execute("DELETE FROM updates WHERE round <= ?", (round,))

    def commits(self) -> dict[int, dict[str, Any]]:
        """Every committed round's record, in order."""
        with self._explained():
            rows = self._db.execute("SELECT round, record FROM commits ORDER BY round").fetchall()
            return {round: json.loads(record) for round, record in rows}

    def keep_update(self, round: int, site: str, record: Mapping[str, Any]) -> None:
        """An accepted update's file is written: a resumed round uses it instead of asking again."""
        with self._explained():
            self._db.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, ?)", (round, site, json.dumps(record)))

    def kept_updates(self, round: int) -> dict[str, dict[str, Any]]:
        """Records of a round's kept updates, by site."""
        with self._explained():
            rows = self._db.execute("SELECT site, record FROM updates WHERE round = ?", (round,)).fetchall()
            return {site: json.loads(record) for site, record in rows}

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a result (an evaluation, a control arm's outcome) under a key."""
        with self._explained():
            self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, json.dumps(record)))

    def get(self, key: str) -> dict[str, Any] | None:
        with self._explained():
            row = self._db.execute("SELECT record FROM results WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

    def drop(self, key: str) -> None:
        """Strike a result out; nothing happens if there is none."""
        with self._explained():
            self._db.execute("DELETE FROM results WHERE key = ?", (key,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise StateError(f"the journal {self.path} refuses a second entry: {error}") from error
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"the journal {self.path} cannot be read or written: {error}",
                hint="check permissions and free space, and that no other process runs in this folder; then --resume",
                retry=True,
            ) from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise StateError(
                f"the journal {self.path} is damaged: {error}",
                hint="restore the folder from a copy, or start a new run in another folder (-o)",
            ) from error
