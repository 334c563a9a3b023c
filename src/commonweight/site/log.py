"""What an agent does, for people and for programs: short lines on stderr, and JSON lines in the site's `log.jsonl`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..federation.folder import storage_errors

Log = Callable[..., None]

#: fields that a person is shown, in this order
_SHOWN = ("run", "round", "kind", "task", "state", "code", "reason", "hint")
_TEXT_AT_MOST = 300


class SiteLog:
    """Appends events to a file, and tells them on stderr. May be called from any thread.

    Each line is an object with `t` (seconds since the epoch), `event`, and the event's own fields. A disk that is full
    must not end the site's work: what cannot be written is told on stderr.

    Args:
        path: the file, made if need be.
        quiet: write to the file only.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self._lock = threading.Lock()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: str, **fields: Any) -> None:
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False, default=str)
        try:
            with self._lock:
                self._file.write(line + "\n")
        except OSError as error:
            print(f"{self.path} cannot be written ({error.strerror}): {line}", file=sys.stderr, flush=True)
        if not self.quiet:
            print(told(event, fields), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()


def told(event: str, fields: dict[str, Any]) -> str:
    """An event as one line for a person."""
    shown = [f"{key} {fields[key]}" for key in _SHOWN if fields.get(key) not in (None, "")]
    text = ", ".join(shown).replace("\n", " ")
    return f"{time.strftime('%H:%M:%S')} {event}{': ' if text else ''}{text[:_TEXT_AT_MOST]}"
