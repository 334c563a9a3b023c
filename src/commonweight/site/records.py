"""What a site remembers across restarts, in one SQLite file of its own: the site's word against the coordinator's.

Bytes are written down before they are sent, so that a crash can only count too many. Approvals are set by a person in
another process (`commonweight site approve`) while the agent goes on; it looks here. Every head of the coordinator's
audit log that this site was shown is compared with those before.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import AccessError, PolicyError, StateError, StorageError
from ..privacy.spending import UNPROTECTED, Spend
from .policy import Decision, JobFacts, Policy, Spent, decide_sending

Approval = Literal["pending", "approved", "denied"]
JobState = Literal["asked", "joined", "refused", "ended"]

_FORMAT = "1"
_HEADS_KEPT = 1000
_BUSY_MS = 10_000
_KIND = "unit, mechanism, noise_multiplier, sampling"
_SPEND = f"{_KIND}, sum(count)"

_TABLES = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    run TEXT PRIMARY KEY, digest TEXT NOT NULL, signer_key TEXT NOT NULL, facts TEXT NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL, joined INTEGER NOT NULL, t REAL NOT NULL, forgotten INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, base TEXT NOT NULL, t REAL NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS sent (
    run TEXT NOT NULL, round INTEGER NOT NULL, what TEXT NOT NULL, bytes INTEGER NOT NULL, chunks INTEGER NOT NULL,
    first_t REAL NOT NULL, last_t REAL NOT NULL, PRIMARY KEY (run, round, what));
CREATE TABLE IF NOT EXISTS spends (
    run TEXT NOT NULL, round INTEGER NOT NULL, unit TEXT NOT NULL, adjacency TEXT NOT NULL, mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sampling REAL NOT NULL, count INTEGER NOT NULL, t REAL NOT NULL,
    PRIMARY KEY (run, round));
CREATE TABLE IF NOT EXISTS approvals (
    run TEXT PRIMARY KEY, summary TEXT NOT NULL, state TEXT NOT NULL, asked_t REAL NOT NULL, decided_t REAL,
    decided_by TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, base TEXT NOT NULL,
    body BLOB NOT NULL, deadline_t REAL NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, result BLOB NOT NULL,
    t REAL NOT NULL);
CREATE TABLE IF NOT EXISTS peers (name TEXT PRIMARY KEY, key BLOB NOT NULL, t REAL NOT NULL);
CREATE TABLE IF NOT EXISTS sums (
    run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, state BLOB NOT NULL, row TEXT NOT NULL,
    opened INTEGER NOT NULL, PRIMARY KEY (run, round, attempt));
CREATE TABLE IF NOT EXISTS heads (sequence INTEGER PRIMARY KEY, hash BLOB NOT NULL, signature BLOB NOT NULL, t REAL);
CREATE TABLE IF NOT EXISTS alarms (number INTEGER PRIMARY KEY, t REAL NOT NULL, text TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Question:
    """A run that a person was asked about; times in seconds since the epoch."""

    run: str
    summary: str
    state: Approval
    asked_t: float
    decided_t: float | None
    decided_by: str


@dataclass(frozen=True)
class JobRecord:
    """A job that this site was asked to join."""

    run: str
    digest: str
    facts: JobFacts
    state: JobState
    reason: str
    t: float


@dataclass(frozen=True)
class TaskRecord:
    """A task that this site has taken on. `state`: taken, or how it ended: done, refused, failed, withdrawn."""

    id: str
    run: str
    round: int
    kind: str
    base: str
    body: bytes
    deadline_t: float
    state: str
    reason: str
    result: bytes


@dataclass(frozen=True)
class Sent:
    """What has left in one round of one run (round 0: outside of rounds)."""

    run: str
    round: int
    what: str
    bytes: int
    chunks: int
    first_t: float
    last_t: float


@dataclass(frozen=True)
class Head:
    """A head of the coordinator's audit log, as it signed it."""

    sequence: int
    hash: bytes
    signature: bytes


class SiteRecords:
    """Opens a site's records, making them if need be. May be used by several threads and processes at once.

    Raises:
        StateError: the file holds something else.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._lock = threading.RLock()
        with self._explained():
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._transaction():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT OR IGNORE INTO about VALUES ('format', ?)", (_FORMAT,))
        if self._about("format") != _FORMAT:
            raise StateError(
                f"{path} is of format {self._about('format')}; this version of commonweight knows {_FORMAT}",
                hint="use the version that wrote it",
            )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ---- jobs and rounds

    def add_job(self, digest: str, facts: JobFacts) -> None:
        """A signed job has arrived; `digest` is the SHA-256 of its bytes. The same job again changes nothing.

        Raises:
            AccessError: this run's id came with another job before. An alarm is kept.
        """
        with self._writing():
            row = self._one("SELECT digest FROM jobs WHERE run = ?", facts.run)
            if row is None:
                values = (facts.run, digest, facts.signer_key, json.dumps(facts.to_json()), "asked", "", 0, self._now())
                self._db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
        if row is not None and row[0] != digest:
            self._alarm(f"the run {facts.run} came with another job: {digest}, before {row[0]}")

    def set_job(self, run: str, state: JobState, reason: str = "") -> None:
        """What has become of a job. `joined` and `ended` count as having taken part, once it was joined.

        Raises:
            StateError: no such job.
        """
        with self._writing():
            done = self._db.execute(
                "UPDATE jobs SET state = ?, reason = ?, joined = max(joined, ?), t = ? WHERE run = ?",
                (state, reason, state == "joined", self._now(), run),
            )
            if not done.rowcount:
                raise StateError(f"this site's records know no run {run}")

    def job(self, run: str) -> JobRecord | None:
        """A job by its run's id."""
        return next(iter(self._jobs("WHERE run = ?", run)), None)

    def jobs(self) -> list[JobRecord]:
        """Every job, in the order of arrival."""
        return self._jobs("ORDER BY rowid")

    def runs_to_forget(self, keep: int) -> list[str]:
        """Runs whose folders are to go: the ended and refused ones, but for the `keep` that changed last."""
        rows = self._all(
            "SELECT run, forgotten FROM jobs WHERE state IN ('ended', 'refused') ORDER BY t DESC, rowid DESC"
        )
        return [run for run, forgotten in rows[keep:] if not forgotten]

    def forget_run(self, run: str) -> None:
        """A run's folder is gone: its tasks are forgotten; what left, approvals and the job itself are kept."""
        with self._writing():
            self._db.execute("DELETE FROM tasks WHERE run = ?", (run,))
            self._db.execute("UPDATE sums SET state = x'' WHERE run = ?", (run,))
            self._db.execute("UPDATE jobs SET forgotten = 1 WHERE run = ?", (run,))

    def take_round(self, run: str, round: int, base: str) -> None:
        """This site takes part in a round, from the global tensors `base` (a frame's digest). Once more is nothing new.

        Raises:
            AccessError: the round was begun from other tensors before: a coordinator that shows a site several bases
                learns more of its rows than one update tells. An alarm is kept.
        """
        with self._writing():
            row = self._one("SELECT base FROM rounds WHERE run = ? AND round = ?", run, round)
            if row is None:
                self._db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?)", (run, round, base, self._now()))
        if row is not None and row[0] != base:
            self._alarm(f"round {round} of run {run} was offered from other tensors: {base}, before {row[0]}")

    # ---- what leaves

    def spent(self, run: str, round: int = 0) -> Spent:
        """What has happened so far, as `policy.decide` wants to know it; `round` 0: outside of rounds."""
        with self._reading():
            (total,) = self._row("SELECT coalesce(sum(bytes), 0) FROM sent")
            (of_run,) = self._row("SELECT coalesce(sum(bytes), 0) FROM sent WHERE run = ?", run)
            (of_round,) = self._row("SELECT coalesce(sum(bytes), 0) FROM sent WHERE run = ? AND round = ?", run, round)
            (rounds,) = self._row("SELECT count(*) FROM rounds WHERE run = ? AND round != ?", run, round)
            (nearest,) = self._row(
                "SELECT min(abs(round - ?)) FROM rounds WHERE run = ? AND round != ?", round, run, round
            )
            (runs,) = self._row("SELECT count(*) FROM jobs WHERE joined AND run != ?", run)
            (of_signer,) = self._row(
                "SELECT count(*) FROM jobs WHERE joined AND run != ? "
                "AND signer_key = (SELECT signer_key FROM jobs WHERE run = ?)",
                run,
                run,
            )
            approval = self._one("SELECT state FROM approvals WHERE run = ?", run)
            spends = self._spends("run = ? AND round != ?", run, round), self._spends("run != ?", run)
        said = approval[0] if approval else None
        return Spent(of_round, of_run, total, rounds, runs, of_signer, nearest, *spends, said)

    def spend(
        self,
        policy: Policy,
        *,
        run: str,
        round: int,
        what: str,
        num_bytes: int,
        chunks: int = 1,
        spend: Spend = UNPROTECTED,
    ) -> None:
        """Write down that bytes are about to leave, and only then may they be sent. Sent again, they count again.
        What an update costs of this site's privacy counts once in a round.

        The policy is checked and the bytes are counted in one transaction, so that sendings at the same time cannot
        pass a limit together.

        Args:
            round: 0 for what leaves outside of rounds.
            what: update, masks, scores, samples or facts.
            spend: what an update costs.

        Raises:
            PolicyError: the policy does not let them leave; nothing was counted.
        """
        with self._writing():
            decision = decide_sending(policy, what, num_bytes, self.spent(run, round), spend)
            if decision.allowed:
                self._count(run, round, what, num_bytes, chunks)
                if what == "update":
                    self._charge(run, round, spend)
        _enforce(decision)

    def _charge(self, run: str, round: int, spend: Spend) -> None:
        values = (spend.unit, spend.adjacency, spend.mechanism, spend.noise_multiplier, spend.sampling, spend.count)
        self._db.execute(
            "INSERT OR IGNORE INTO spends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (run, round, *values, self._now())
        )

    def spends(self) -> list[tuple[str, Spend]]:
        """What updates have cost of this site's privacy, by run, in the order of the runs."""
        rows = self._all(f"SELECT run, {_SPEND} FROM spends GROUP BY run, {_KIND} ORDER BY min(rowid)")
        return [(run, Spend(*spend)) for run, *spend in rows]

    def _spends(self, where: str, *values: Any) -> tuple[Spend, ...]:
        rows = self._db.execute(f"SELECT {_SPEND} FROM spends WHERE {where} GROUP BY {_KIND}", values)
        return tuple(Spend(*row) for row in rows)

    def _count(self, run: str, round: int, what: str, num_bytes: int, chunks: int) -> None:
        now = self._now()
        self._db.execute(
            "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "bytes = bytes + excluded.bytes, chunks = chunks + excluded.chunks, last_t = excluded.last_t",
            (run, round, what, num_bytes, chunks, now, now),
        )

    def sent(self, run: str | None = None) -> list[Sent]:
        """What has left, by run, round and kind."""
        where, values = ("", ()) if run is None else ("WHERE run = ?", (run,))
        rows = self._all(f"SELECT * FROM sent {where} ORDER BY first_t, run, round, what", *values)
        return [Sent(*row) for row in rows]

    # ---- a person's word

    def ask(self, run: str, summary: str) -> Approval:
        """Put a run before a person, once; returns what was said so far. Never waits: look at `state` again later."""
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO approvals (run, summary, state, asked_t) VALUES (?, ?, 'pending', ?)",
                (run, summary, self._now()),
            )
            return self._row("SELECT state FROM approvals WHERE run = ?", run)[0]  # type: ignore[no-any-return]

    def pending(self) -> list[Question]:
        """Runs that wait for a person, the oldest first."""
        return [question for question in self.questions() if question.state == "pending"]

    def questions(self) -> list[Question]:
        """Every run that a person was asked about."""
        rows = self._all(
            "SELECT run, summary, state, asked_t, decided_t, decided_by FROM approvals ORDER BY asked_t, run"
        )
        return [Question(*row) for row in rows]

    def decide(self, run: str, approved: bool, by: str) -> None:
        """A person's decision; a later one takes the place of an earlier one, also while the run goes on.

        Raises:
            StateError: nobody was asked about this run.
        """
        with self._writing():
            done = self._db.execute(
                "UPDATE approvals SET state = ?, decided_t = ?, decided_by = ? WHERE run = ?",
                ("approved" if approved else "denied", self._now(), by, run),
            )
            if not done.rowcount:
                known = ", ".join(question.run for question in self.pending()) or "none"
                raise StateError(f"no run {run} has asked for approval", hint=f"waiting for approval: {known}")

    def state(self, run: str) -> Approval | None:
        """What was said about a run; None if nobody was asked."""
        row = self._fetch("SELECT state FROM approvals WHERE run = ?", run)
        return row[0] if row else None

    # ---- tasks in hand

    def take_task(
        self, id: str, *, run: str, round: int, kind: str, base: str = "", body: bytes = b"", deadline_t: float = 0.0
    ) -> TaskRecord:
        """A task is taken on, or was before: then what is known of it is returned unchanged."""
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, 'taken', '', x'', ?)",
                (id, run, round, kind, base, body, deadline_t, self._now()),
            )
            return self._tasks("WHERE id = ?", id)[0]

    def end_task(self, id: str, state: str, *, reason: str = "", result: bytes = b"") -> None:
        """How a task ended: done, refused, failed or withdrawn; kept so that the answer can be given again.

        Raises:
            StateError: no such task, or it has ended in another way.
        """
        if state not in ("done", "refused", "failed", "withdrawn"):
            raise ValueError(f"a task does not end {state!r}")
        with self._writing():
            task = next(iter(self._tasks("WHERE id = ?", id)), None)
            if task is None or task.state not in ("taken", state):
                raise StateError(f"the task {id} cannot end {state}: it is {task.state if task else 'not known'}")
            self._db.execute(
                "UPDATE tasks SET state = ?, reason = ?, result = ?, t = ? WHERE id = ?",
                (state, reason, result, self._now(), id),
            )

    def task(self, id: str) -> TaskRecord | None:
        with self._reading():
            return next(iter(self._tasks("WHERE id = ?", id)), None)

    def tasks_in_hand(self) -> list[TaskRecord]:
        """Tasks that were taken on and have not ended, in that order: what a restarted agent goes on with."""
        with self._reading():
            return self._tasks("WHERE state = 'taken' ORDER BY rowid")

    # ---- secure sums

    def enter_sum(self, run: str, round: int, attempt: int) -> None:
        """This site takes part in an attempt at a round's secure sum. Secrets of earlier ones are erased. Once more is
        nothing new.

        Raises:
            AccessError: it took part in a later one, or has helped to open another attempt at this round: two sums that
                differ by one site show what that site sent.
        """
        with self._writing():
            latest = self._one(
                "SELECT round, attempt FROM sums WHERE run = ? ORDER BY round DESC, attempt DESC LIMIT 1", run
            )
            opened = self._one(
                "SELECT attempt FROM sums WHERE run = ? AND round = ? AND attempt != ? AND opened", run, round, attempt
            )
            if opened is None and (latest is None or (round, attempt) >= latest):
                self._db.execute("INSERT OR IGNORE INTO sums VALUES (?, ?, ?, x'', '', 0)", (run, round, attempt))
                self._db.execute(
                    "UPDATE sums SET state = x'' WHERE run = ? AND NOT (round = ? AND attempt = ?)",
                    (run, round, attempt),
                )
                return
        what = f"attempt {attempt} at the secure sum of round {round} of run {run}"
        if opened is not None:
            raise AccessError(f"{what}: this site has helped to open attempt {opened[0]}")
        raise AccessError(f"{what}: this site took part in a later one")

    def keep_sum(self, run: str, round: int, attempt: int, state: bytes) -> None:
        """What this site has decided in a secure sum, which is secret, before anything of it is said."""
        with self._writing():
            self._db.execute(
                "UPDATE sums SET state = ? WHERE run = ? AND round = ? AND attempt = ?", (state, run, round, attempt)
            )

    def sum_state(self, run: str, round: int, attempt: int) -> bytes | None:
        """What was kept last; None if nothing was, or if it was erased."""
        state = self._fetch("SELECT state FROM sums WHERE run = ? AND round = ? AND attempt = ?", run, round, attempt)
        return state[0] or None if state else None

    def send_row(self, run: str, round: int, attempt: int, digest: str) -> None:
        """A masked row is about to leave; `digest` names it.

        Raises:
            AccessError: another one was, under the same masks: together they would show their difference.
        """
        with self._writing():
            where = (run, round, attempt)
            self._db.execute(
                "UPDATE sums SET row = ? WHERE run = ? AND round = ? AND attempt = ? AND row = ''", (digest, *where)
            )
            row = self._one("SELECT row FROM sums WHERE run = ? AND round = ? AND attempt = ?", *where)
        if row is None or row[0] != digest:
            raise AccessError(f"another masked update has left in attempt {attempt} at round {round} of run {run}")

    def open_sum(self, run: str, round: int, attempt: int) -> None:
        """This site is about to help to open a sum."""
        with self._writing():
            self._db.execute(
                "UPDATE sums SET opened = 1 WHERE run = ? AND round = ? AND attempt = ?", (run, round, attempt)
            )

    def erase_sums(self, run: str) -> None:
        """A run has ended: its secrets are of no more use."""
        with self._writing():
            self._db.execute("UPDATE sums SET state = x'' WHERE run = ?", (run,))

    # ---- other sites, with whose keys this one masks

    def pin_peer(self, name: str, key: bytes) -> None:
        """Another site's signing key, as its certificate names it. The first that is seen is kept for good.

        Raises:
            AccessError: another key is known. An alarm is kept.
        """
        with self._writing():
            known = self._one("SELECT key FROM peers WHERE name = ?", name)
            if known is None:
                self._db.execute("INSERT INTO peers VALUES (?, ?, ?)", (name, bytes(key), self._now()))
        if known is not None and known[0] != bytes(key):
            text = f"site {name} shows the signing key {bytes(key).hex()}, before {known[0].hex()}"
            with self._writing():
                self._db.execute("INSERT INTO alarms (t, text) VALUES (?, ?)", (self._now(), text))
            raise AccessError(
                text,
                hint="ask that site whether it has enrolled anew; if so, forget the old key: commonweight site peers "
                f"DIR --forget {name}",
            )

    def peers(self) -> dict[str, bytes]:
        """The signing keys of other sites that are known here, by name."""
        return dict(self._all("SELECT name, key FROM peers ORDER BY name"))

    def forget_peer(self, name: str) -> None:
        """A person has found out why a site has another key: the next that is seen is kept.

        Raises:
            StateError: no key of such a site is known.
        """
        with self._writing():
            if not self._db.execute("DELETE FROM peers WHERE name = ?", (name,)).rowcount:
                known = ", ".join(self.peers()) or "none"
                raise StateError(f"no key of a site {name} is known here", hint=f"known: {known}")

    # ---- the coordinator's audit log, as it was shown

    def keep_head(self, sequence: int, hash: bytes, signature: bytes) -> None:
        """Keep a head whose signature the caller has verified.

        Raises:
            AccessError: the log has become shorter, or an entry has another hash than before. An alarm is kept, and
                the head that was known stays.
        """
        with self._writing():
            last = self._last_head()
            if last is None or sequence > last.sequence:
                values = (sequence, bytes(hash), bytes(signature), self._now())
                self._db.execute("INSERT INTO heads VALUES (?, ?, ?, ?)", values)
                self._db.execute(
                    "DELETE FROM heads WHERE sequence NOT IN "
                    "(SELECT sequence FROM heads ORDER BY sequence DESC LIMIT ?)",
                    (_HEADS_KEPT,),
                )
                return
        if sequence < last.sequence:
            self._alarm(
                f"the coordinator's audit log went back from entry {last.sequence} to {sequence}: entries are missing"
            )
        if bytes(hash) != last.hash:
            self._alarm(
                f"entry {sequence} of the coordinator's audit log was changed: its hash is {bytes(hash).hex()}, "
                f"before {last.hash.hex()}"
            )

    def forget_heads(self) -> Head | None:
        """A person has found out why the log is another than before, and goes on with it; the last head that was kept.
        Alarms stay."""
        with self._writing():
            last = self._last_head()
            self._db.execute("DELETE FROM heads")
        return last

    def last_head(self) -> Head | None:
        """The furthest head that this site was shown."""
        with self._reading():
            return self._last_head()

    def heads(self) -> list[Head]:
        """The latest heads, in order: what an auditor compares the coordinator's log with."""
        return [Head(*row) for row in self._all("SELECT sequence, hash, signature FROM heads ORDER BY sequence")]

    def alarms(self) -> list[tuple[float, str]]:
        """What a coordinator did that an honest one does not: (time, what)."""
        return [(t, text) for t, text in self._all("SELECT t, text FROM alarms ORDER BY number")]

    # ---- this site's own audit log

    def keep_own_head(self, number: int, hash: str) -> None:
        """Line `number` of this site's own audit log was written; `hash` (hex) is its hash."""
        with self._writing():
            known = self.own_head()
            if known is None or number > known[0]:
                self._db.execute("INSERT OR REPLACE INTO about VALUES ('own head', ?)", (f"{number} {hash}",))

    def own_head(self) -> tuple[int, str] | None:
        """The last line of this site's own audit log that is known to have been written: its number and hash."""
        known = self._about("own head")
        if known is None:
            return None
        number, hash = known.split()
        return int(number), hash

    # ---- the database

    def _alarm(self, text: str) -> None:
        with self._writing():
            self._db.execute("INSERT INTO alarms (t, text) VALUES (?, ?)", (self._now(), text))
        raise AccessError(
            text, hint="do not go on: tell the federation's auditor, and keep this site's folder as it is"
        )

    def _jobs(self, rest: str, *values: Any) -> list[JobRecord]:
        rows = self._all(f"SELECT run, digest, facts, state, reason, t FROM jobs {rest}", *values)
        return [JobRecord(run, digest, JobFacts.from_json(json.loads(f)), *more) for run, digest, f, *more in rows]

    def _tasks(self, rest: str, *values: Any) -> list[TaskRecord]:
        columns = "id, run, round, kind, base, body, deadline_t, state, reason, result"
        return [TaskRecord(*row) for row in self._db.execute(f"SELECT {columns} FROM tasks {rest}", values)]

    def _last_head(self) -> Head | None:
        row = self._one("SELECT sequence, hash, signature FROM heads ORDER BY sequence DESC LIMIT 1")
        return Head(*row) if row else None

    def _about(self, key: str) -> str | None:
        row = self._fetch("SELECT value FROM about WHERE key = ?", key)
        return row[0] if row else None

    def _now(self) -> float:
        return self._clock()

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        return self._db.execute(statement, values).fetchone()  # type: ignore[no-any-return]

    def _row(self, statement: str, *values: Any) -> tuple[Any, ...]:
        row = self._one(statement, *values)
        assert row is not None
        return row

    def _fetch(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        with self._reading():
            return self._one(statement, *values)

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One state of the file for several reads."""
        with self._lock, self._explained():
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._explained(), self._transaction():
            yield

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
        except (sqlite3.OperationalError, OSError) as error:
            raise StorageError(
                f"this site's records {self.path} cannot be read or written: {error}",
                hint="check permissions and free space; nothing is sent until they can",
                retry=True,
            ) from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise StateError(
                f"this site's records {self.path} are damaged: {error}",
                hint="restore the file from a copy: without it this site cannot know what has left",
            ) from error


def _enforce(decision: Decision) -> None:
    if not decision.allowed:
        raise PolicyError(f"this site's policy does not let it leave: {decision.text}")
