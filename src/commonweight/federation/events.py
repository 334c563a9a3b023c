"""What happens in a run, one line an event: for progress bars, for logs, for whoever asks later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .folder import storage_errors

Listener = Callable[[str, Mapping[str, Any]], None]


class Events:
    """Appends events to a JSON Lines file and tells listeners.

    Each line is an object with `t` (seconds since the epoch), `event` and the event's own fields. A line that a crash
    cut short is removed when the run resumes.
    """

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()) -> None:
        self._listeners = listeners
        with storage_errors(path):
            if path.exists():
                _drop_partial_line(path)
            self._file = path.open("a", encoding="utf-8", buffering=1 << 16)
        self._path = path

    def emit(self, event: str, **fields: Any) -> None:
        with storage_errors(self._path):
            self._file.write(
                json.dumps({"t": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False) + "\n"
            )
        for listener in self._listeners:
            listener(event, fields)

    def flush(self) -> None:
        with storage_errors(self._path):
            self._file.flush()

    def close(self) -> None:
        with storage_errors(self._path):
            self._file.close()


def _drop_partial_line(path: Path) -> None:
    with path.open("rb+") as handle:
        content = handle.read()
        handle.truncate(content.rfind(b"\n") + 1)
