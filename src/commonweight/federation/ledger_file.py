"""A ledger in a SQLite file: what runs on one machine share, in whatever folders they lie."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ..errors import StateError, StorageError
from ..privacy.spending import Budget, Spend
from .journal import RunJournal
from .ledger import Line

_FORMAT = "1"
_BUSY_S = 60.0
_TABLES = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spends (
    run TEXT NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL, site TEXT NOT NULL, unit TEXT NOT NULL,
    adjacency TEXT NOT NULL, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL, sampling REAL NOT NULL,
    count INTEGER NOT NULL, t REAL NOT NULL, PRIMARY KEY (run, round, site));
CREATE INDEX IF NOT EXISTS spends_of_site ON spends (site);
"""
_SPEND = "unit, mechanism, noise_multiplier, sampling, sum(count)"
_KINDS = "unit, mechanism, noise_multiplier, sampling"


class LedgerFile:
    """Opens a ledger, making it if need be. Use it as a context. Several processes may at once.

    Args:
        make: False: it must be there.

    Raises:
        StateError: the file is no ledger, or another format's, or is not there.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, *, make: bool = True) -> None:
        self.path = path
        if not make and not path.is_file():
            raise StateError(f"there is no ledger {path}", hint="`commonweight run --ledger FILE` makes one")
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._transaction():
                tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if tables and not {"about", "spends"} <= tables:
                    raise StateError(f"{path} is another program's database", hint="name a file of the ledger's own")
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                for key, value in (("format", _FORMAT), ("id", uuid.uuid4().hex)):
                    self._db.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (key, value))
        if self._about("format") != _FORMAT:
            raise StateError(
                f"the ledger {path} is of format {self._about('format')}; this version of commonweight knows {_FORMAT}",
                hint="use the version that wrote it",
            )

    @property
    def id(self) -> str:
        return str(self._about("id"))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def budget(self) -> Budget | None:
        """The budget of every site; None: nothing is refused."""
        found = self._about("budget")
        return None if found is None else Budget.model_validate_json(found)

    def set_budget(self, budget: Budget) -> None:
        """Set the budget of every site, in place of the one before."""
        text = budget.model_dump_json(exclude_none=True)
        with self._explained(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO about VALUES ('budget', ?)", (text,))

    def check(self, run: str, round: int, spends: Mapping[str, Spend]) -> None:
        """As `Ledger.check`, for a run's id."""
        with self._explained():
            self._check(run, round, spends)

    def charge(self, run: str, name: str, round: int, spends: Mapping[str, Spend]) -> None:
        """As `Ledger.charge`, for a run's id and the name by which it is shown."""
        self.check(run, round, spends)  # what takes long is worked out before others must wait
        now = time.time()
        with self._explained(), self._transaction():
            self._check(run, round, spends)
            self._db.executemany(
                "INSERT OR IGNORE INTO spends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(run, name, round, site),
                        *(s.unit, s.adjacency, s.mechanism, s.noise_multiplier, s.sampling, s.count, now),
                    )
                    for site, s in spends.items()
                ],
            )

    def _check(self, run: str, round: int, spends: Mapping[str, Spend]) -> None:
        budget = self.budget()
        if budget is None:
            return
        for site, spend in spends.items():
            rows = self._db.execute(
                f"SELECT {_SPEND} FROM spends WHERE site = ? AND NOT (run = ? AND round = ?) GROUP BY {_KINDS}",
                (site, run, round),
            ).fetchall()
            budget.check(site, [Spend(*row) for row in rows], spend)

    def lines(self) -> list[Line]:
        """Everything that was spent, run by run in the order of their first charge."""
        with self._explained():
            rows = self._db.execute(
                f"SELECT run, name, site, {_SPEND} FROM spends GROUP BY run, name, site, {_KINDS} ORDER BY min(rowid)"
            ).fetchall()
        names = Counter(name for _, name in {(run, name) for run, name, *_ in rows})
        return [
            Line(name if names[name] == 1 else f"{name} ({run[:8]})", site, Spend(*spend))
            for run, name, site, *spend in rows
        ]

    def _about(self, key: str) -> str | None:
        with self._explained():
            row = self._db.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"the ledger {self.path} cannot be read or written: {error}",
                hint="check the path, permissions and free space; nothing is released until it can",
                retry=True,
            ) from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise StateError(
                f"the ledger {self.path} is damaged: {error}",
                hint="restore it from a copy: without it nobody knows what was spent",
            ) from error


class RunsLedger:
    """A file's ledger, for one run.

    Args:
        journal: keeps the id under which the run is charged, and which ledger it is charged to.

    Raises:
        StateError: the run began with another ledger, or with none.
    """

    def __init__(self, file: LedgerFile, journal: RunJournal, name: str) -> None:
        check_ledger(journal, file)
        known = journal.get("ledger")
        if known is None:
            known = {"id": file.id, "run": uuid.uuid4().hex}
            journal.put("ledger", known)
        self.file, self.name, self.run = file, name, str(known["run"])

    def check(self, round: int, spends: Mapping[str, Spend]) -> None:
        self.file.check(self.run, round, spends)

    def charge(self, round: int, spends: Mapping[str, Spend]) -> None:
        self.file.charge(self.run, self.name, round, spends)


def check_ledger(journal: RunJournal, file: LedgerFile | None) -> None:
    """A run's rounds are all charged to one ledger, or none.

    Raises:
        StateError: this run's other rounds were charged elsewhere.
    """
    known: dict[str, Any] | None = journal.get("ledger")
    if known is None and file is not None and journal.last_round() > 0:
        raise StateError(
            "this run began without a ledger", hint="resume it without --ledger, or start a new run in another folder"
        )
    if known is not None and (file is None or file.id != known["id"]):
        raise StateError(
            f"this run is charged to another ledger (id {known['id'][:12]})",
            hint="resume it with the --ledger FILE that it began with",
        )
