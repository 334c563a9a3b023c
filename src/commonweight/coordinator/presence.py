"""Who attends, and for how long others have been away, as far as this replica can know."""

from __future__ import annotations

import threading
import time

from .store import Store

#: what other replicas say is read at most this often
_READ_S = 1.0


class Presence:
    """Attendance of sites, here and at other replicas.

    Args:
        replica: this one's name.
        fresh_s: a site that another replica has not heard of for longer is away.
    """

    def __init__(self, store: Store, replica: str, *, fresh_s: float) -> None:
        self.store, self.replica, self.fresh_s = store, replica, fresh_s
        self._began = time.monotonic()
        self._here: dict[str, str] = {}
        self._left: dict[str, float] = {}
        self._elsewhere: frozenset[str] = frozenset()
        self._read_at = -_READ_S
        self._lock = threading.Lock()

    def arrived(self, site: str, session: str) -> None:
        """A site has begun to attend here."""
        with self._lock:
            self._here[site] = session
        self.store.attend(site, self.replica, session)

    def left(self, site: str, session: str) -> None:
        """An attendance has ended; another of the same site may have begun before."""
        with self._lock:
            if self._here.get(site) != session:
                return
            del self._here[site]
            self._left[site] = time.monotonic()
        self.store.left(site, session)

    def here(self) -> dict[str, str]:
        """Sites that attend here, and their sessions."""
        with self._lock:
            return dict(self._here)

    def attending(self) -> set[str]:
        """Every site that attends, here or elsewhere."""
        with self._lock:
            found = set(self._here)
        return found | self._attending_elsewhere()

    def away_for(self, site: str) -> float | None:
        """Seconds that a site has been away; None while it attends. Time in which this replica did not run does not
        count: after a restart sites must be given time to find it again."""
        with self._lock:
            if site in self._here:
                return None
            since = max(self._left.get(site, self._began), self._began)
        if site in self._attending_elsewhere():
            return None
        return time.monotonic() - since

    def _attending_elsewhere(self) -> frozenset[str]:
        now = time.monotonic()
        with self._lock:
            stale = now - self._read_at >= _READ_S
            if stale:
                self._read_at = now
        if stale:
            oldest = self.store.database.clock() - self.fresh_s
            known = self.store.attending().items()
            self._elsewhere = frozenset(
                site for site, (replica, seen) in known if replica != self.replica and seen >= oldest
            )
        return self._elsewhere
