"""A site's own log of what left it, `audit.jsonl`: one JSON object a line, each bound to the line before.

    hash_n = SHA-256(hash_{n-1} ‖ canonical JSON of line n without `prev` and `hash`),  hash_0 = 32 zero bytes

A line that was changed, taken out or put in breaks the chain at its place. The last line's hash is kept in the site's
records as well, so that a missing end is noticed. A line about something that leaves is written before it does: what a
crash leaves behind says too much rather than too little.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import StateError, StorageError
from .records import SiteRecords

START = "0" * 64
_TEXT_AT_MOST = 2000
_TAIL_BYTES = 1 << 18

#: kinds of lines about something that left; all others tell what happened (refused, approved, joined …)
LEFT = ("update", "masks", "scores", "samples", "facts")


class SiteAudit:
    """Opens a site's log, making it if need be; a last line that a crash cut short is dropped.

    May be used by several threads and processes at once: each line is appended under a lock on the file.

    Args:
        records: where the last line's hash is kept as well.

    Raises:
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, records: SiteRecords, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._records, self._clock = path, records, clock
        with self._locked() as file:
            _drop_cut_line(file)

    def append(
        self,
        what: str,
        *,
        run: str = "",
        round: int = 0,
        num_bytes: int = 0,
        chunks: int = 0,
        digest: str = "",
        to: str = "",
        **details: str | int | float | bool,
    ) -> dict[str, Any]:
        """Write a line, on disk when this returns.

        Args:
            what: update, scores, samples, facts: it leaves, `num_bytes` of it in `chunks`, to `to`. Else what
                happened: refused, approved, denied, joined, alarm …
            digest: SHA-256 of what leaves, in hex.
            details: more, as plain values; texts are cut at 2,000 characters.
        """
        entry: dict[str, Any] = {"t": self._clock(), "what": what, "run": run, "round": round}
        entry |= {"bytes": num_bytes, "chunks": chunks, "digest": digest, "to": to}
        clash = (set(entry) | {"n", "prev", "hash"}) & set(details)
        if clash:
            raise ValueError(f"{sorted(clash)} are fields of every line")
        entry |= {key: _plain(value) for key, value in details.items()}
        with self._locked() as file:
            _drop_cut_line(file)
            number, before = self._last(file)
            entry = {"n": number + 1, **entry}
            entry |= {"prev": before, "hash": _hash(before, entry)}
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._records.keep_own_head(entry["n"], entry["hash"])
        return entry

    def verify(self) -> tuple[int, str]:
        """Check every line; returns the last one's number and hash.

        Raises:
            StateError: names the first bad line, or says that the end is missing.
        """
        number, before = 0, START
        known = self._records.own_head()
        met = known is None
        for number, line in enumerate(self._lines(), start=1):
            entry = _entry(line)
            if entry is None or entry.get("n") != number or entry.get("prev") != before:
                raise self._broken(number, "it does not follow the line before")
            before = _hash(before, {k: v for k, v in entry.items() if k not in ("prev", "hash")})
            if entry.get("hash") != before:
                raise self._broken(number, "it was changed")
            if known is not None and number == known[0]:
                met = before == known[1]
                if not met:
                    raise self._broken(number, "it is not the line that was written")
        if not met and known is not None:
            raise StateError(
                f"{self.path} ends at line {number}, but line {known[0]} was written: its end was removed", hint=_HINT
            )
        return number, before

    def rows(self, run: str | None = None, since: float | None = None) -> Iterator[dict[str, Any]]:
        """The lines, in order: of one run, and not older than `since` (seconds since the epoch).

        Raises:
            StateError: a line is no JSON object.
        """
        for number, line in enumerate(self._lines(), start=1):
            entry = _entry(line)
            if entry is None:
                raise self._broken(number, "it is no JSON object")
            if (run is None or entry["run"] == run) and (since is None or entry["t"] >= since):
                yield entry

    def totals(self) -> dict[str, dict[str, int]]:
        """Bytes that left, by run and kind: {run: {update: …, scores: …}}."""
        totals: dict[str, dict[str, int]] = defaultdict(dict)
        for entry in self.rows():
            if entry["what"] in LEFT:
                of_run = totals[entry["run"]]
                of_run[entry["what"]] = of_run.get(entry["what"], 0) + entry["bytes"]
        return dict(totals)

    def _last(self, file: IO[bytes]) -> tuple[int, str]:
        """The last line's number and hash, from which the chain goes on.

        Where the file's end is not what the records say was written, the chain goes on from the records: the break
        stays in the file for good, and `verify` finds it.
        """
        known = self._records.own_head() or (0, START)
        entry = _entry(_last_line(file))
        if entry is None or not isinstance(entry.get("n"), int) or not isinstance(entry.get("hash"), str):
            return known
        return (entry["n"], entry["hash"]) if entry["n"] > known[0] else known

    def _lines(self) -> Iterator[bytes]:
        """Whole lines; one that is being written, or was cut, is left out."""
        with self._explained(), self.path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _broken(self, number: int, why: str) -> StateError:
        return StateError(f"line {number} of {self.path} is broken: {why}", hint=_HINT)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with self._explained():
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"this site's audit log {self.path} cannot be read or written: {error.strerror or error}",
                hint="check permissions and free space; nothing is sent until it can",
                retry=True,
            ) from error


_HINT = "keep the file as evidence, and compare it with a backup"


def _hash(before: str, entry: Mapping[str, Any]) -> str:
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(bytes.fromhex(before) + canonical.encode()).hexdigest()


def _plain(value: str | int | float | bool) -> str | int | float | bool:
    """Text of bounded length; NaN and infinity, which JSON does not know, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:_TEXT_AT_MOST] if isinstance(value, str) else value


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _drop_cut_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    keep = end
    while keep and _tail(file, keep, 1) != b"\n":
        tail = _tail(file, keep, _TAIL_BYTES)
        keep -= len(tail) - (tail.rfind(b"\n") + 1)
    if keep < end:
        file.truncate(keep)
        os.fsync(file.fileno())


def _last_line(file: IO[bytes]) -> bytes:
    end, size = file.seek(0, os.SEEK_END), _TAIL_BYTES
    while True:
        lines = _tail(file, end, size).splitlines(keepends=True)
        if len(lines) > 1 or size >= end:
            return lines[-1] if lines else b""
        size *= 2


def _tail(file: IO[bytes], end: int, size: int) -> bytes:
    file.seek(max(0, end - size))
    return file.read(min(size, end))
