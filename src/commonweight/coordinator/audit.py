"""The audit log: who did what, in entries that are chained by their hashes.

    hash_i = SHA-256(hash_{i-1} ‖ canonical JSON of entry i)        hash_0 = 32 zero bytes

An entry that is edited, taken out or moved breaks the chain from there on. Entries cut off at the end do not: that is
shown by a head (sequence and hash) that was kept elsewhere, which is why sites keep signed heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ..errors import StateError
from .database import Part, Writing, reading, writing
from .tables import audit

GENESIS = bytes(32)
#: any number; it names the lock under which PostgreSQL's transactions append
_LOCK = 0x636F6D6D6F6E77

_LAST = sa.select(audit.c.sequence, audit.c.hash).order_by(audit.c.sequence.desc()).limit(1)
_TAKE_TURNS = sa.select(sa.func.pg_advisory_xact_lock(_LOCK))


@dataclass(frozen=True)
class AuditEntry:
    """One entry.

    Args:
        sequence: 1, 2, … without gaps.
        t: seconds since the epoch.
        actor: who did it: a principal's name, or `coordinator`.
        action: what was done: `enrolled`, `run submitted`, `update accepted` …
        subject: to what or whom.
        details: further plain data.
        hash: 32 bytes.
    """

    sequence: int
    t: float
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
    hash: bytes

    def hashed_after(self, before: bytes) -> bytes:
        """The hash that it must have after an entry with hash `before`."""
        return hashlib.sha256(before + self.canonical()).digest()

    def canonical(self) -> bytes:
        """The bytes that are hashed: JSON, keys sorted, no spaces, UTF-8."""
        return _canonical({key: value for key, value in vars(self).items() if key != "hash"}).encode()

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal entry."""
        return {**vars(self), "details": dict(self.details), "hash": self.hash.hex()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AuditEntry:
        """Read what `to_json` gave.

        Raises:
            StateError: it is no entry.
        """
        try:
            return cls(**{**value, "hash": bytes.fromhex(value["hash"])})
        except (TypeError, ValueError, KeyError) as error:
            raise StateError("a line of the audit log cannot be read") from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def verify_chain(entries: Iterable[AuditEntry], *, start_hash: bytes = GENESIS, start: int = 0) -> tuple[int, bytes]:
    """Check entries that follow one with sequence `start` and hash `start_hash`; returns the last one's.

    Raises:
        StateError: an entry was edited, taken out or moved; the first bad sequence is named.
    """
    sequence, before = start, start_hash
    for entry in entries:
        sequence += 1
        if entry.sequence != sequence:
            raise StateError(f"audit entry {sequence} is missing or out of its place: {entry.sequence} comes there")
        if entry.hashed_after(before) != entry.hash:
            raise StateError(f"audit entry {sequence} was changed, or an entry before it")
        before = entry.hash
    return sequence, before


def verify_head(entries: Iterable[AuditEntry], sequence: int, hash: bytes) -> None:
    """Check the whole log, from its first entry, against a head kept elsewhere.

    Raises:
        StateError: what `verify_chain` finds, or the log ends before the head, or is another than the one that the
            head was taken from.
    """
    last, before = 0, GENESIS
    at_head = GENESIS if sequence == 0 else None
    for entry in entries:
        last, before = verify_chain([entry], start_hash=before, start=last)
        if last == sequence:
            at_head = before
    if at_head is None:
        raise StateError(f"the audit log ends at entry {last}, but entry {sequence} was seen before: it was cut off")
    if at_head != hash:
        raise StateError(f"audit entry {sequence} is not the one that was seen before: the log was rewritten")


def append(tx: Writing, action: str, *, actor: str, subject: str = "", **details: Any) -> AuditEntry:
    """Append an entry in a transaction; it is there if and only if the rest of the transaction is."""
    if tx.dialect == "postgresql":
        tx.execute(_TAKE_TURNS)
    last = tx.execute(_LAST).one_or_none()
    sequence, before = (last.sequence, last.hash) if last else (0, GENESIS)
    entry = AuditEntry(sequence + 1, round(tx.now, 3), actor, action, subject, details, b"")
    values = {**vars(entry), "details": _canonical(details), "hash": entry.hashed_after(before)}
    tx.execute(audit.insert(), values)
    return AuditEntry(**{**vars(entry), "hash": values["hash"]})


class AuditPart(Part):
    """The audit log in the store."""

    @writing
    def audit(self, tx: Writing, /, action: str, *, actor: str, subject: str = "", **details: Any) -> AuditEntry:
        """Append an entry that belongs to no other change."""
        return append(tx, action, actor=actor, subject=subject, **details)

    @reading
    def audit_entries(self, connection: sa.Connection, after: int = 0, limit: int = 1000) -> list[AuditEntry]:
        """Entries after a sequence number, in order."""
        query = sa.select(audit).where(audit.c.sequence > after).order_by(audit.c.sequence).limit(limit)
        return [
            AuditEntry(**{**row, "details": json.loads(row["details"])}) for row in connection.execute(query).mappings()
        ]

    @reading
    def audit_head(self, connection: sa.Connection) -> tuple[int, bytes]:
        """Sequence and hash of the last entry; 0 and 32 zero bytes before the first."""
        last = connection.execute(_LAST).one_or_none()
        return (last.sequence, last.hash) if last else (0, GENESIS)
