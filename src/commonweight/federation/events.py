"""What happens in a run, one line an event: for progress bars, for logs, for whoever asks later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError
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


def last_event(path: Path, name: str) -> dict[str, Any]:
    """The fields of a run's latest event of a name; empty if there is none. The run may be going on."""
    if not path.exists():
        return {}
    with storage_errors(path):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = (_parsed(line, path) for line in reversed(lines) if f'"event": "{name}"' in line)
    return next((event for event in found if event["event"] == name), {})


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise StateError(f"{path} is damaged: a line is no JSON: {line[:60]!r}", hint="remove that line") from error
    return event


def _drop_partial_line(path: Path) -> None:
    with path.open("rb+") as handle:
        content = handle.read()
        handle.truncate(content.rfind(b"\n") + 1)


#: the phase that each of these events begins; `run_started` also begins a new process's part of the run
_PHASES = {
    "run_started": "load",
    "engine_started": "evaluate",
    "round_opened": "federated",
    "controls_started": "controls",
    "run_finished": "",
}


def phase_seconds(path: Path) -> dict[str, float]:
    """Seconds of a run by phase, over all the processes that worked on it, from its events.

    `load` is reading data and model; `evaluate` the base model's evaluation; `federated` the rounds and the result's
    evaluation; `controls` the control arms; `total` their sum. Work that was lost to a kill counts too.
    """
    seconds = dict.fromkeys(("load", "evaluate", "federated", "controls"), 0.0)
    phase, since = "", 0.0
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        event = _parsed(line, path)
        if phase and event["event"] != "run_started":
            seconds[phase] += event["t"] - since
        phase, since = _PHASES.get(event["event"], phase), event["t"]
    return {**seconds, "total": sum(seconds.values())}
