"""What was denied or refused, in the audit log, without letting anybody fill it.

The first of its kind is written at once. The same again within a minute is only counted, and written with its count
when the minute is over; while it goes on, the minute grows to an hour. Different ones of one actor are written up to
`PER_ACTOR` a minute, then counted together. Callers who have shown no identity are one actor, `?`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .store import Store

#: different entries that one actor may cause in a minute
PER_ACTOR = 20
WINDOW_S, LONGEST_S = 60.0, 3600.0

_Key = tuple[str, str, str, str]


@dataclass
class _Window:
    """The time in which the same is only counted."""

    ends: float
    length_s: float
    more: int = 0


@dataclass
class _Budget:
    """What an actor has caused in a minute: entries written, and others that were only counted."""

    ends: float
    written: int = 0
    more: int = 0


class Denials:
    """Writes denials and refusals to the audit log. Its methods wait for the database; any thread may call them.

    Args:
        clock: seconds; where it begins does not matter.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self._clock = store, clock
        self._windows: dict[_Key, _Window] = {}
        self._budgets: dict[str, _Budget] = {}
        self._lock = threading.Lock()

    def note(self, action: str, *, actor: str, subject: str = "", **details: Any) -> bool:
        """Somebody was denied or refused something: an entry, or (False) one more to count."""
        key = action, actor, subject, json.dumps(details, sort_keys=True)
        is_new = self._is_new(key)
        if is_new:
            self.store.audit(action, actor=actor, subject=subject, **details)
        return is_new

    def flush(self) -> None:
        """Write the counts whose time is over. To be called now and then."""
        repeated, others = self._over()
        for (action, actor, subject, details), more in repeated:
            self.store.audit(action, actor=actor, subject=subject, repeated=more, **json.loads(details))
        for actor, more in others:
            self.store.audit("more was denied", actor=actor, repeated=more)

    def _is_new(self, key: _Key) -> bool:
        now = self._clock()
        with self._lock:
            window = self._windows.get(key)
            if window is not None:
                window.more += 1
                return False
            budget = self._budgets.setdefault(key[1], _Budget(now + WINDOW_S))
            if budget.written >= PER_ACTOR:
                budget.more += 1
                return False
            budget.written += 1
            self._windows[key] = _Window(now + WINDOW_S, WINDOW_S)
            return True

    def _over(self) -> tuple[list[tuple[_Key, int]], list[tuple[str, int]]]:
        """What has been counted until now, and begin to count anew."""
        now, repeated, others = self._clock(), [], []
        with self._lock:
            for key, window in [(k, w) for k, w in self._windows.items() if w.ends <= now]:
                if not window.more:
                    del self._windows[key]
                    continue
                repeated.append((key, window.more))
                length = min(2 * window.length_s, LONGEST_S)
                self._windows[key] = _Window(now + length, length)
            for actor, budget in [(a, b) for a, b in self._budgets.items() if b.ends <= now]:
                del self._budgets[actor]
                if budget.more:
                    others.append((actor, budget.more))
        return repeated, others
