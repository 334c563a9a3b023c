"""What a relay keeps: updates of open rounds, encrypted, until their sum has been delivered; and nothing after that.

Runs, rounds, tasks and uploads lie in a database of the coordinator's own kind, so that an update is checked and kept
here by the coordinator's own code (`coordinator/receive.py`), and a relay that is killed goes on where it was. Here
"accepted" means that the relay has all of it: whether it counts, the coordinator decides.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

from ..coordinator.blobs import Blobs
from ..coordinator.denials import Denials
from ..coordinator.frame_files import FrameFiles, StoredFrame
from ..coordinator.lanes import Lanes
from ..coordinator.metrics import Metrics
from ..coordinator.plans import Plans, RunPlan
from ..coordinator.receive import Receiver
from ..coordinator.spares import Spares
from ..coordinator.store import ENDED, Lease, Store, TaskRow, Upload
from ..coordinator.updates import stored_update
from ..coordinator.vault import Vault
from ..errors import AccessError, StateError
from ..federation.folder import storage_errors
from ..federation.round import DeadlinePassed, Round
from ..identity.jobs import verify_job
from ..strategies.base import SumStrategy
from ..wire.frames import Frame, pack_chunk
from ..wire.protocol_pb2 import Partial, SignedJob, SignedManifest, Task
from .settings import RelaySettings
from .sums import add_up

R = TypeVar("R")

#: chunks in motion at once
_LANES = 4
_THREADS = 4
_LEASE_S = 10 * 366 * 86400.0


@dataclass(frozen=True)
class Sum:
    """A region's sum, ready to be sent (`transfer.Sendable`).

    Args:
        manifest: the `Partial`, as it is signed.
    """

    manifest: bytes
    stored: StoredFrame

    @property
    def frame(self) -> Frame:
        return self.stored.frame

    def packed(self, index: int) -> bytes:
        return pack_chunk(index, self.stored.chunk(index))


class Depot:
    """A relay's folder. Its methods block, but for `away` and `crunch`.

    Args:
        authority: whom to trust, PEM.
    """

    def __init__(self, folder: Path, settings: RelaySettings, authority: bytes) -> None:
        self.settings, self.authority = settings, authority
        self.scratch = folder / "scratch"
        with storage_errors(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            (folder / "blobs").mkdir(exist_ok=True)
        self.store = Store(f"sqlite:///{folder.resolve() / 'state.sqlite'}")
        self.blobs = Blobs(str(folder.resolve() / "blobs"), self.scratch / "blobs")
        key = folder / "master.key"
        self.vault = Vault.open(key) if key.exists() else Vault.create(key)
        self.plans = Plans(self.store, settings.strategies)
        self.spares = Spares(self.scratch / "spares")
        self.metrics, self.denials, self.lanes = Metrics(), Denials(self.store), Lanes(_LANES)
        limit = settings.max_upload_mb << 20
        self.receiver = Receiver(
            self.store, self.blobs, self.vault, self.plans, self.scratch, self.spares, max_bytes=limit
        )
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="depot")
        self._sweep()

    async def away(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that waits for the database or a disk, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *args))

    async def crunch(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that keeps a core busy, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._cores, partial(function, *args))

    @cached_property
    def _cores(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 2, thread_name_prefix="crunch")

    def _sweep(self) -> None:
        """Delete what an earlier process left half done, and what is left of runs that have ended."""
        self.blobs.sweep()
        self.receiver.sweep()
        for path in self.scratch.glob("frame-*"):
            path.unlink(missing_ok=True)
        self._discard(self.store.leftovers())

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._cores.shutdown(wait=True, cancel_futures=True)
        self.receiver.close()
        self.store.close()

    # --- runs

    def knows(self, run: str) -> bool:
        return self.store.find_run(run) is not None

    def admit(self, run: str, signed: SignedJob) -> None:
        """Verify a job that has arrived, and keep it.

        Raises:
            AccessError: it is not signed by a lead, is another run's, or does not name this relay.
            RecipeError: it cannot be carried out here.
            Refused: it cannot be read.
        """
        job, holder = verify_job(signed, run, self.authority)
        plan = RunPlan.of(job, self.settings.strategies)
        if self.settings.name not in plan.recipe.federation.relays:
            raise AccessError(f"the job of run {run} does not name the relay {self.settings.name!r}")
        found = self.store.add_run(
            run, job.name, job.recipe, signed.job, signed.signature, signed.certificate, holder.name, {}
        )
        if found.state == "receiving":
            self.store.set_run_state(run, "waiting")

    def end(self, run: str) -> None:
        """A run has ended: nothing of it is kept."""
        found = self.store.find_run(run)
        if found is None:
            return
        if found.state not in ENDED:
            self.store.set_run_state(run, "cancelled")
        self.receiver.forget_run(run)
        self._discard(self.store.leftovers())
        self.blobs.delete_prefix(f"runs/{run}")
        self.spares.forget(run)

    # --- rounds

    def open(self, task: Task, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin to take in updates for a round, or go on with it."""
        lease = self._lease(task.run)
        self.store.open_round(lease, Round(task.round, tuple(tasks), needed=1), task.base)
        rows = [
            TaskRow(
                id=given["task"],
                run=task.run,
                round=task.round,
                site=site,
                kind="train",
                body=b'{"steps": %d}' % given["steps"],
                base=task.base,
            )
            for site, given in tasks.items()
            if self.store.task(given["task"]) is None
        ]
        self.store.add_tasks(lease, rows)

    def _lease(self, run: str) -> Lease:
        """The relay leads whatever it has, and alone."""
        lease = self.store.claim(run, self.settings.name, _LEASE_S)
        if lease is None:
            raise StateError(f"run {run} has ended at this relay")
        return lease

    def delivered(self, run: str, round: int) -> set[str]:
        """The sites whose updates are here."""
        found = self.store.round_state(run, round)
        return set(found[0].answered) if found is not None else set()

    def close_round(self, task: Task, tasks: Mapping[str, Mapping[str, Any]]) -> list[Upload]:
        """Take in no more; what has come, in the order of folding."""
        self.store.apply(task.run, task.round, DeadlinePassed(task.round), lease=self._lease(task.run))
        found = {upload.site: upload for upload in self.store.accepted_uploads(task.run, task.round) if upload.blob}
        return [found[site] for site in tasks if site in found]

    def sum(self, task: Task, uploads: list[Upload]) -> Sum:
        """Add updates up. The same ones give the same bits."""
        plan = self.plans.of(task.run)
        assert plan is not None
        updates = [stored_update(upload, plan, self.blobs, self.vault) for upload in uploads]
        files, frame = self._files(task.run), plan.initial.plan
        strategy = cast(SumStrategy, plan.strategy(len(uploads)))
        summed = add_up(strategy, updates, frame.layout, frame.chunk_bytes, files)
        manifest = Partial(
            run=task.run,
            round=task.round,
            task=task.id,
            relay=self.settings.name,
            base=task.base,
            frame=summed.header,
            members=[SignedManifest(manifest=u.manifest, signature=u.signature) for u in uploads],
            total_weight=sum(update.weight for update in updates),
        )
        return Sum(manifest.SerializeToString(deterministic=True), files.open(summed.digest))

    def _files(self, run: str) -> FrameFiles:
        return FrameFiles(self.blobs, self.scratch, run)

    def forget(self, task: Task) -> None:
        """A round's sum has been delivered, or nobody wants it: no update is needed any more."""
        self._discard([u for u in self.store.accepted_uploads(task.run, task.round) if u.blob])
        files = self._files(task.run)
        files.forget(files.digests())

    def _discard(self, uploads: list[Upload]) -> None:
        """Delete updates, and with their keys whatever could be read of their files."""
        for upload in uploads:
            self.receiver.forget(upload.id)
            self.blobs.delete(upload.blob)
            self.store.forget_upload(upload.id)
