"""What the services of one replica share."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from ..errors import AccessError, StateError
from ..identity.authority import Authority
from ..identity.certificates import Holder, holder_of, requested_key
from ..identity.keys import AUDIT, SigningKey
from ..wire.protocol_pb2 import AuditHead
from ..wire.refusals import Refusal, Refused
from .blobs import Blobs
from .catch_ups import CatchUps
from .denials import Denials
from .frame_files import FrameFiles
from .hub import Hub
from .lanes import Lanes
from .metrics import Metrics
from .plans import Plans, RunPlan
from .presence import Presence
from .receive import SPARE, Receiver
from .relays import Routes
from .settings import CoordinatorSettings
from .spares import Spares
from .store import Store, Upload
from .vault import Vault

R = TypeVar("R")

#: threads for the database: calls are short, and a writer waits for the one before
_STORE_THREADS = 16
#: nobody's certificate is renewed twice within this time
_RENEWAL_S = 60.0


class Context:
    """One replica's parts. Make it inside the event loop.

    Args:
        folder: the coordinator's folder.
    """

    def __init__(self, folder: Path, settings: CoordinatorSettings) -> None:
        self.folder, self.settings = folder, settings
        self.replica = f"{settings.name}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
        self.scratch = folder / "scratch"
        self.store = Store(settings.database_url(folder))
        self.blobs = Blobs(settings.blobs_url(folder), self.scratch / "blobs", **settings.blob_options)
        self.vault = Vault.open(folder / "master.key")
        self.authority = Authority.load(folder / "authority")
        self.signing_key = SigningKey.load(folder / "server" / "signing.key")
        self.plans = Plans(self.store, settings.strategies)
        self.catch_ups = CatchUps(self.store)
        self.spares = Spares(self.scratch / "spares")
        self.metrics = Metrics()
        self.denials = Denials(self.store)
        limit = settings.max_upload_mb << 20
        self.receiver = Receiver(
            self.store, self.blobs, self.vault, self.plans, self.scratch, self.spares, max_bytes=limit
        )
        self.presence = Presence(self.store, self.replica, fresh_s=3 * settings.heartbeat_s + 2)
        self._store_pool = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")
        self._crunch_pool = ThreadPoolExecutor(os.cpu_count() or 2, thread_name_prefix="crunch")
        self.hub = Hub(self.store, self.away, Routes(self.store, self.plans))
        self.lanes = Lanes(settings.transfers_at_once)
        self._files: dict[str, FrameFiles] = {}
        self._renewed_at: dict[str, float] = {}
        self._lock = threading.Lock()

    async def away(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that may wait for the database or a disk, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, partial(function, *args))

    async def crunch(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that keeps a core busy, away from the event loop; as many at once as there are cores."""
        return await asyncio.get_running_loop().run_in_executor(self._crunch_pool, partial(function, *args))

    def files(self, run: str) -> FrameFiles:
        """The frames of one run."""
        with self._lock:
            if run not in self._files:
                self._files[run] = FrameFiles(self.blobs, self.scratch, run, self.spares)
            return self._files[run]

    def sweep(self) -> None:
        """Delete what an earlier process left half done; before anything else is done."""
        self.blobs.sweep()
        self.receiver.sweep()
        for path in self.scratch.glob("frame-*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.scratch / "runs", ignore_errors=True)  # it is made anew from the store
        for upload in self.store.leftovers():
            self.discard(upload)
            self.spares.forget(upload.run)

    def discard(self, upload: Upload) -> None:
        """Delete the data of an upload that is over: its key, and with it whatever can be read of its file."""
        self.receiver.forget(upload.id)  # if it is still under way here, it came too late
        place = self.spares.place(upload.run, SPARE)
        spare = self.blobs.take_back(upload.blob, place)
        self.store.forget_upload(upload.id)
        if spare:
            self.spares.give(upload.run, SPARE, place)

    def plan_for(self, run: str, holder: Holder) -> RunPlan:
        """A run's plan, if it is any business of the caller's.

        Raises:
            Refused: there is no such run.
            AccessError: it was not submitted for this site, or does not name this relay.
        """
        plan = self.plans.of(run)
        if plan is None:
            raise Refused(Refusal.UNKNOWN_RUN, f"there is no run {run!r}")
        if holder.role == "site" and plan.job.sites and holder.name not in plan.job.sites:
            raise AccessError(f"run {plan.job.name!r} is not for site {holder.name!r}")
        if holder.role == "relay" and holder.name not in plan.recipe.federation.relays:
            raise AccessError(f"run {plan.job.name!r} does not name the relay {holder.name!r}")
        return plan

    def certificate(self) -> bytes:
        """This coordinator's own, PEM."""
        return (self.folder / "server" / "tls.pem").read_bytes()

    def audit_head(self) -> AuditHead:
        """The head of the audit log, signed, for others to keep."""
        sequence, digest = self.store.audit_head()
        signature = self.signing_key.sign(AUDIT, sequence.to_bytes(8, "big") + digest)
        return AuditHead(sequence=sequence, hash=digest, signature=signature)

    def forget_files(self, runs: Iterable[str]) -> None:
        """Close the frames of runs that have ended; whoever asks for one later opens it anew."""
        with self._lock:
            closed = [self._files.pop(run) for run in runs if run in self._files]
        for files in closed:
            files.close()

    def renew(self, holder: Holder, request: bytes) -> bytes:
        """A new certificate for someone who still holds a good one: the same name, role and signing key.

        Raises:
            AccessError: the request is none.
            StateError: it is too soon after the one before. Each is an entry in the audit log.
        """
        requested_key(request)
        now, pause = time.monotonic(), min(_RENEWAL_S, self.settings.certificate_hours * 3600 / 20)
        with self._lock:
            if now - self._renewed_at.get(holder.name, -pause) < pause:
                raise StateError(f"{holder.name!r} has renewed its certificate a moment ago", retry=True)
            self._renewed_at[holder.name] = now
        pem = self.authority.issue(
            request,
            name=holder.name,
            role=holder.role,
            signing_key=holder.signing_key,
            hours=self.settings.certificate_hours,
        )
        issued = holder_of(pem)
        self.store.add_certificate(issued.serial, holder.name, issued.not_after)
        return pem

    def close(self) -> None:
        self._store_pool.shutdown(wait=True, cancel_futures=True)
        self._crunch_pool.shutdown(wait=True, cancel_futures=True)
        self.receiver.close()
        for files in self._files.values():
            files.close()
        self.store.close()
