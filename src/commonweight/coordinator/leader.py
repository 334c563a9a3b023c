"""Which runs this replica leads: claimed under a lease, renewed while they go on, given up when it shuts down."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial

from ..errors import CommonweightError
from .conduct import Conductor
from .context import Context
from .engine import Cancelled, Led, Stopped
from .store import Lease, LeaseLost

_log = logging.getLogger(__name__)

#: a run whose leading failed for want of a database or a blob store is tried again after this
_PAUSE_S = 2.0
#: runs to lead, and wishes to cancel, are looked for at most this often
_LOOK_S = 0.2


class Leader:
    """Leads as many runs as there are to lead. One thread watches and renews; each run has a thread of its own."""

    def __init__(self, context: Context) -> None:
        self.here = context
        self.store, self.lease_s = context.store, context.settings.lease_s
        self._leases: dict[str, Lease] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="leader", daemon=True)
        self._renewed_at: dict[str, float] = {}
        self._cancelled: dict[str, tuple[float, str]] = {}

    def start(self) -> None:
        if not self.store.database.is_postgres:
            self.store.end_leases()  # whoever had one is dead, and need not be waited for
        self._watcher.start()

    def stop(self) -> None:
        """Stop leading: every run ends its step, and its lease is free at once for another replica."""
        self._stopping.set()
        self._news.set()
        for thread in list(self._threads.values()):
            thread.join(timeout=self.lease_s)
        if self._watcher.is_alive():
            self._watcher.join(timeout=self.lease_s)

    def leads(self) -> list[str]:
        with self._lock:
            return sorted(self._leases)

    def _watch(self) -> None:
        with self.store.bus.subscribe("runs", self._news.set):
            while not self._stopping.is_set():
                try:
                    self._renew()
                    for run in self.store.claimable():
                        self._claim(run)
                except CommonweightError as error:
                    _log.warning("runs cannot be led just now: %s", error.message)
                self.here.metrics.leading.set(len(self._leases))
                # a run that begins to wait for a leader, or goes on to another state, is told of on the bus
                self._stopping.wait(_LOOK_S)
                self._news.wait(self.lease_s / 4)
                self._news.clear()

    def _renew(self) -> None:
        for run, lease in list(self._leases.items()):
            if time.monotonic() - self._renewed_at[run] < self.lease_s / 4:
                continue
            try:
                self.store.renew(lease, self.lease_s)
                self._renewed_at[run] = time.monotonic()
            except LeaseLost:
                _log.warning("run %s is led by another replica by now", run)
                self._drop(run)

    def _claim(self, run: str) -> None:
        with self._lock:
            if run in self._threads or self._stopping.is_set():
                return
        lease = self.store.claim(run, self.here.replica, self.lease_s)
        if lease is None:
            return
        with self._lock:
            self._leases[run] = lease
            self._renewed_at[run] = time.monotonic()
            thread = threading.Thread(target=self._lead, args=(lease,), name=f"run-{run[:8]}", daemon=True)
            self._threads[run] = thread
        thread.start()

    def _drop(self, run: str) -> None:
        with self._lock:
            self._leases.pop(run, None)

    def _lead(self, lease: Lease) -> None:
        run = lease.run
        led = Led(lease, partial(self._reason_to_stop, run))
        try:
            Conductor(self.here, led).conduct()
        except LeaseLost:
            _log.warning("run %s is led by another replica by now", run)
        except CommonweightError as error:
            _log.warning("run %s pauses: %s", run, error.message)
            self._stopping.wait(_PAUSE_S)
        except Exception as error:
            _log.exception("run %s failed in a way that it should not", run)
            self._fail(lease, error)
        finally:
            self._drop(run)
            with suppress(CommonweightError):  # lost already, or the database is away: it runs out by itself
                self.store.release(lease)
            with self._lock:
                self._threads.pop(run, None)
                self._cancelled.pop(run, None)
            self._news.set()

    def _fail(self, lease: Lease, error: Exception) -> None:
        message = f"the coordinator failed in a way that it should not: {type(error).__name__}: {error}"
        try:
            self.store.set_run_state(lease.run, "failed", error=message, hint="please report it", lease=lease)
        except CommonweightError as again:
            _log.warning("run %s: %s", lease.run, again.message)

    def _reason_to_stop(self, run: str) -> CommonweightError | None:
        """Why a run must not go on here, if so."""
        if self._stopping.is_set() or run not in self._leases:
            return Stopped("this replica stops leading the run")
        looked_at, cancelled_by = self._cancelled.get(run, (0.0, ""))
        if time.monotonic() - looked_at > _LOOK_S:
            cancelled_by = self.store.run_row(run).cancelled_by
            self._cancelled[run] = (time.monotonic(), cancelled_by)
        return Cancelled(f"cancelled by {cancelled_by}") if cancelled_by else None
