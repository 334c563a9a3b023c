"""What arrives: manifests and chunks, each checked before anything of it is used or kept.

    open    signature, site, run, task, round, base, names and shapes, size, weight      nothing is allocated before
    take    a chunk's length, digest, finiteness; then it is sealed and written at its place
    finish  all chunks there, on disk, in the blob store; then, in one transaction, accepted or refused

Everything may be repeated: an open manifest says which chunks are missing, also after a restart (what lies in the
sealed file is verified anew); one that was accepted is accepted again, and nothing changes.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from ..codec.stage import BadPayload
from ..errors import AccessError, UnreachableError, UpdateRefused
from ..federation.folder import storage_errors
from ..federation.round import Answered
from ..identity.certificates import Holder
from ..identity.keys import PARTIAL, UPDATE, verify
from ..strategies.update import check_weight
from ..train.start import FROM_THETA, check_cluster
from ..wire.decode import decode
from ..wire.frames import Frame, chunk_digest, header_digest
from ..wire.manifest import (
    RUN,
    TASK,
    ParsedManifest,
    check_coded_frame,
    check_frame,
    check_text,
    parse_manifest,
)
from ..wire.partial import ParsedPartial, check_sum_frame, parse_partial
from ..wire.protocol_pb2 import Ahead, Manifest, Partial, SignedManifest, SignedPartial, UploadStatus
from ..wire.refusals import Refusal, Refused
from .access import ACTIVE
from .ahead import AheadReceipt, frame_ahead
from .blobs import Blobs
from .coded_updates import CodedFile
from .frame_files import FrameFiles, FrameWriter
from .plans import Plans, RunPlan
from .receipts import InitialReceipt, Receipt, UpdateReceipt
from .rounds import refusal_code
from .spares import Spares
from .store import Store, TaskRow, Upload
from .vault import SealedFile, Vault

#: the kind of spare files that updates leave
SPARE = "updates"

#: refusals for what an update is, not for when it came
_OWN_FAULT = frozenset(
    {
        Refusal.MALFORMED,
        Refusal.BAD_SIGNATURE,
        Refusal.WRONG_BASE,
        Refusal.WRONG_SHAPE,
        Refusal.TOO_LARGE,
        Refusal.NON_FINITE,
        Refusal.BAD_WEIGHT,
    }
)


class Receiver:
    """Takes in updates and initial tensors.

    Args:
        max_bytes: cap on an upload's body.
    """

    def __init__(
        self, store: Store, blobs: Blobs, vault: Vault, plans: Plans, scratch: Path, spares: Spares, *, max_bytes: int
    ) -> None:
        self.store, self.blobs, self.vault, self.plans = store, blobs, vault, plans
        self.scratch, self.spares, self.max_bytes = scratch, spares, max_bytes
        self._receipts: dict[str, Receipt] = {}
        self._lock = threading.Lock()

    # --- opening

    def open_update(self, holder: Holder, signed: SignedManifest) -> UploadStatus:
        """A site offers an update.

        Raises:
            Refused: it breaks a rule that no second attempt could mend; the reason is audited by the caller.
        """
        if not verify(holder.signing_key, UPDATE, signed.manifest, signed.signature):
            raise Refused(
                Refusal.BAD_SIGNATURE, "the manifest's signature is not by the key of this site's certificate"
            )
        manifest = parse_manifest(signed)
        if manifest.site != holder.name:
            raise Refused(
                Refusal.WRONG_SITE, f"the manifest names site {manifest.site!r}, the certificate {holder.name!r}"
            )
        plan = self._plan(manifest)
        task = self._task(manifest, holder.name)
        known = self.store.find_upload(manifest.run, manifest.round, manifest.site, header_digest(signed.manifest))
        if known is None:
            self._check(manifest, task, plan)
            self._check_time(manifest, task)
        return self._status(self._opened(manifest, signed.manifest, signed.signature), manifest.frame)

    def _task(self, offer: ParsedManifest | Ahead, site: str) -> TaskRow:
        task = self.store.task(offer.task)
        if task is None or (task.run, task.site, task.kind) != (offer.run, site, "train"):
            raise Refused(Refusal.WRONG_TASK, f"no training task {offer.task!r} of this run was given to this site")
        if task.round != offer.round:
            raise Refused(Refusal.WRONG_TASK, f"the task is of round {task.round}, the manifest of {offer.round}")
        return task

    def open_ahead(self, holder: Holder, ahead: Ahead) -> UploadStatus:
        """A site will send chunks of an update before its manifest. Asked again, it begins anew.

        Raises:
            Refused: the task is none of its own, or over, or the run's updates are not cut so.
        """
        check_text("a run", ahead.run, RUN)
        check_text("a task", ahead.task, TASK)
        plan, task = self._plan(ahead), self._task(ahead, holder.name)
        if not task.is_open:
            raise Refused(Refusal.WRONG_TASK, f"task {task.id!r} is over: it is {task.state}")
        frame = frame_ahead(plan, holder.name, ahead.chunk_bytes)
        self.check_size("the update", frame)
        number = _ahead(task.id)
        before = self._receipts.get(number)
        if before is not None:
            self._forget(before)
        key, wrapped = self.vault.new_key(_context(task))
        path = self._place(uuid4().hex)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.spares.take(task.run, SPARE, path)
        sealed = SealedFile(path, key, frame.plan.chunk_bytes)
        receipt = AheadReceipt(
            number, holder.name, task.run, frame, task=task.id, sealed=sealed, path=path, wrapped=wrapped
        )
        with self._lock:
            self._receipts[number] = receipt
        return UploadStatus(state=UploadStatus.OPEN, upload=number)

    def _taken_over(self, task: str) -> AheadReceipt | None:
        """What came ahead of a task's update; nothing is added to it any more."""
        receipt = self._receipts.get(_ahead(task))
        if not isinstance(receipt, AheadReceipt):
            return None
        with receipt.lock:
            if receipt.is_over:
                return None
            with self._lock:
                self._receipts.pop(receipt.id, None)
            receipt.is_over = True
        return receipt

    def open_partial(self, holder: Holder, signed: SignedPartial) -> UploadStatus:
        """A relay offers the sum of its region's updates in a round.

        Raises:
            Refused: it breaks a rule, or one of the updates in it does.
        """
        if not verify(holder.signing_key, PARTIAL, signed.partial, signed.signature):
            raise Refused(
                Refusal.BAD_SIGNATURE, "the partial sum's signature is not by the key of this relay's certificate"
            )
        partial = parse_partial(signed)
        if partial.relay != holder.name:
            raise Refused(
                Refusal.WRONG_SITE, f"the partial sum names relay {partial.relay!r}, the certificate {holder.name!r}"
            )
        plan, task = self._plan(partial), self.store.task(partial.task)
        if task is None or (task.run, task.site, task.kind) != (partial.run, partial.relay, "relay"):
            raise Refused(Refusal.WRONG_TASK, f"no task {partial.task!r} of this run was given to this relay")
        if task.round != partial.round:
            raise Refused(Refusal.WRONG_TASK, f"the task is of round {task.round}, the partial sum of {partial.round}")
        if self.store.find_upload(partial.run, partial.round, partial.relay, header_digest(signed.partial)) is None:
            if not task.is_open:
                raise Refused(Refusal.WRONG_TASK, f"task {partial.task!r} is over: it is {task.state}")
            self._check_partial(partial, task, plan)
        return self._status(self._opened(partial, signed.partial, signed.signature), partial.frame)

    def _check_partial(self, partial: ParsedPartial, task: TaskRow, plan: RunPlan) -> None:
        """Every site must be one of the region's, and have signed what would have been taken from itself."""
        self._check_base("the partial sum", partial.base, task)
        self.check_size("the partial sum", partial.frame)
        chunk_bytes = plan.initial.plan.chunk_bytes
        check_sum_frame(partial.frame, plan.layout, plan.update_channels, chunk_bytes=chunk_bytes)
        region = plan.recipe.federation.relays.get(partial.relay, [])
        keys = {p.name: p.signing_key for p in self.store.principals("site") if p.state == ACTIVE}
        total = 0.0
        for signed, manifest in partial.members:
            if manifest.site not in region or manifest.site not in keys:
                raise Refused(
                    Refusal.NOT_INVITED, f"site {manifest.site!r} is none of the region of relay {partial.relay!r}"
                )
            try:
                self._check_member(signed, manifest, partial, plan, keys[manifest.site])
            except Refused as refused:
                raise Refused(refused.code, f"the update of {manifest.site} in it: {refused.message}") from refused
            total += weight_of(manifest, plan)
        if total != partial.total_weight:
            raise Refused(
                Refusal.BAD_WEIGHT,
                f"the partial sum is of weight {partial.total_weight:g}; its updates weigh {total:g}",
            )

    def _check_member(
        self, signed: SignedManifest, manifest: ParsedManifest, partial: ParsedPartial, plan: RunPlan, key: bytes
    ) -> None:
        if not verify(key, UPDATE, signed.manifest, signed.signature):
            raise Refused(Refusal.BAD_SIGNATURE, "the manifest's signature is not by the key of that site")
        task = self.store.task(manifest.task)
        answered = (manifest.run, manifest.site, "train", manifest.round)
        if task is None or (task.run, task.site, task.kind, task.round) != answered or not task.is_open:
            raise Refused(Refusal.WRONG_TASK, f"no open training task {manifest.task!r} was given to this site")
        if (manifest.run, manifest.round) != (partial.run, partial.round):
            raise Refused(Refusal.WRONG_TASK, f"it is of round {manifest.round} of run {manifest.run!r}")
        self._check(manifest, task, plan)

    def _plan(self, offer: ParsedManifest | ParsedPartial | Ahead) -> RunPlan:
        plan = self.plans.of(offer.run)
        if plan is None:
            raise Refused(Refusal.UNKNOWN_RUN, f"there is no run {offer.run!r}")
        return plan

    def _check(self, manifest: ParsedManifest, task: TaskRow, plan: RunPlan) -> None:
        """Everything that can be known before the first byte of a tensor has come."""
        self._check_base("the work", manifest.base, task)
        body = json.loads(task.body)
        asked = body["steps"]
        if not 1 <= manifest.num_steps <= asked:  # a strategy may reckon with it, and one made up pulls at every site's
            raise Refused(
                Refusal.BAD_WEIGHT, f"the update took {manifest.num_steps} local steps, the task asked for {asked}"
            )
        self.check_size("the update", manifest.frame)
        chunk_bytes = plan.initial.plan.chunk_bytes
        if plan.coder is not None:
            check_coded_frame(manifest.frame, plan.coder, plan.update_channels)
        else:
            layout = plan.update_layout(manifest.site)
            check_frame(manifest.frame, layout, plan.update_channels, chunk_bytes=chunk_bytes)
        try:
            check_weight(weight_of(manifest, plan), manifest.site, manifest.round)
        except UpdateRefused as error:
            raise Refused(Refusal.BAD_WEIGHT, error.message) from error
        try:
            check_cluster(manifest.cluster, body.get("start", FROM_THETA), manifest.site, manifest.round)
        except UpdateRefused as error:
            raise Refused(Refusal.WRONG_BASE, error.message) from error

    def _check_base(self, what: str, base: str, task: TaskRow) -> None:
        if task.base != base:
            raise Refused(
                Refusal.WRONG_BASE, f"{what} started from global tensors {base[:16]}…, the task from {task.base[:16]}…"
            )

    def _check_time(self, manifest: ParsedManifest, task: TaskRow) -> None:
        """Whether the answer still comes in time; what has been answered already, `store.open_upload` knows."""
        if task.is_open:
            return
        run = self.store.run_row(manifest.run)
        if run.has_ended:
            raise Refused(Refusal.RUN_ENDED, f"run {manifest.run!r} is {run.state}")
        round = self.store.deciding(manifest.run, manifest.round)
        if round is not None:
            answer = Answered(manifest.site, manifest.round)
            _, verdict = round.apply(answer)
            if not verdict.accepted:
                raise Refused(refusal_code(round, answer), verdict.reason)
        raise Refused(Refusal.WRONG_TASK, f"task {manifest.task!r} is over: it is {task.state}")

    def _opened(self, offer: ParsedManifest | ParsedPartial, manifest: bytes, signature: bytes) -> Upload:
        """The upload's row, and the file that its chunks go to."""
        ahead = self._taken_over(offer.task)
        number, wrapped = uuid4().hex, self.vault.new_key(_context(offer))[1] if ahead is None else ahead.wrapped
        upload = self.store.open_upload(
            Upload(
                id=number,
                run=offer.run,
                round=offer.round,
                site=offer.site,
                task=offer.task,
                digest=header_digest(manifest),
                manifest=manifest,
                signature=signature,
                data_key=wrapped,
                blob=f"runs/{offer.run}/updates/{offer.round:04d}/{offer.site}-{number}",
            ),
            offer.sites if isinstance(offer, ParsedPartial) else (),
        )
        new = upload.id == number
        present = ahead.of(offer.frame) if ahead is not None and new else set[int]()
        if ahead is not None:
            if present:
                with storage_errors(ahead.path):
                    ahead.path.rename(self._place(upload.id))
            ahead.close()
        if upload.state == "open":
            self._receive(upload, offer, present, new=new)
        return upload

    def _receive(self, upload: Upload, offer: ParsedManifest | ParsedPartial, present: set[int], *, new: bool) -> None:
        with self._lock:
            if upload.id in self._receipts:
                return
            path = self._place(upload.id)
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            if present:
                pass
            elif new:
                self.spares.take(upload.run, SPARE, path)
            elif self.blobs.exists(upload.blob):  # stored by a process that was killed before it could say so
                path = self.blobs.open_local(upload.blob)
            assert upload.data_key is not None
            key = self.vault.unwrap(upload.data_key, _context(offer))
            frame = offer.frame
            sealed = SealedFile(path, key, frame.plan.chunk_bytes)
            receipt = UpdateReceipt(
                upload.id, upload.site, upload.run, frame, present, sealed=sealed, path=path, blob=upload.blob
            )
            if isinstance(offer, ParsedPartial):
                receipt.members = tuple(_member(*member) for member in offer.members)
            receipt.lock.acquire()  # before others see it: they wait for what is found, and nobody waits for them
            self._receipts[upload.id] = receipt
        try:
            if not new:  # what lies in a file of another upload, it could not read anyway
                receipt.present.update(
                    sealed.present(
                        frame.plan.num_chunks, lambda index, data: chunk_digest(data) == frame.digests[index]
                    )
                )
        finally:
            receipt.lock.release()

    def _place(self, upload: str) -> Path:
        """Where an update lies until all of it is there."""
        return self.scratch / "uploads" / f"{upload}.sealed"

    def check_size(self, what: str, frame: Frame) -> None:
        """Raises Refused (too-large): a frame has more bytes than one upload may have."""
        if frame.plan.num_bytes > self.max_bytes:
            raise Refused(
                Refusal.TOO_LARGE, f"{what}: {frame.plan.num_bytes:,} bytes, more than the {self.max_bytes:,} allowed"
            )

    def open_initial(self, run: str, frame: Frame, sender: str, files: FrameFiles) -> UploadStatus:
        """A lead offers a run's initial global tensors: resumable as long as this replica lives."""
        number = f"initial-{run}"
        if files.has(frame.digest):
            self.arrived(run)
            return UploadStatus(state=UploadStatus.ACCEPTED, upload=number)
        with self._lock:
            receipt = self._receipts.get(number)
            if receipt is None:
                receipt = InitialReceipt(number, sender, run, frame, writer=FrameWriter(files, frame.plan))
                self._receipts[number] = receipt
        return UploadStatus(state=UploadStatus.OPEN, upload=number, missing=receipt.missing)

    def _status(self, upload: Upload, frame: Frame) -> UploadStatus:
        match upload.state:
            case "accepted" | "spent":
                return UploadStatus(state=UploadStatus.ACCEPTED, upload=upload.id)
            case "refused":
                return UploadStatus(
                    state=UploadStatus.REFUSED, upload=upload.id, code=upload.code, reason=upload.reason
                )
        receipt = self._receipts.get(upload.id)
        if receipt is None:  # it has ended in this very moment
            return self.finish(upload.id, upload.site)
        with receipt.lock:
            missing = receipt.missing
        if not missing:
            return self.finish(upload.id, receipt.sender)
        return UploadStatus(state=UploadStatus.OPEN, upload=upload.id, missing=missing)

    # --- chunks

    def receipt(self, upload: str) -> Receipt | None:
        """The upload under way here of this id."""
        return self._receipts.get(upload)

    def take(self, receipt: Receipt, message: bytes) -> None:
        """One chunk with its index in front.

        Raises:
            Refused: the chunk is not what the manifest promised (it may be sent again), or not finite (final).
            UnreachableError: the upload has ended meanwhile; opening it anew tells how.
        """
        if len(message) < 4:
            raise Refused(Refusal.MALFORMED, "a chunk without its index")
        index, chunk = int.from_bytes(message[:4], "big"), memoryview(message)[4:]
        try:
            receipt.check(index, chunk)
        except Refused as refused:
            if not refused.retry:
                self._drop(receipt, refused)
            raise
        with receipt.lock:
            if receipt.is_over:
                raise _reopen(receipt.id)
            if index not in receipt.present:
                receipt.write(index, chunk)
                receipt.present.add(index)

    def finish(self, upload: str, sender: str) -> UploadStatus:
        """What has become of an upload once its sender has stopped sending.

        Raises:
            AccessError: it is another's.
            UnreachableError: nothing of it is known here; it must be opened anew.
        """
        receipt = self.receipt(upload)
        if receipt is None:
            row = self.store.upload(upload)
            if row is None:
                raise _reopen(upload)
            if row.site != sender:
                raise AccessError(f"upload {upload!r} is not one of {sender!r}")
            return self._status_of(row)
        with receipt.lock:
            if receipt.missing and not receipt.is_over:
                return UploadStatus(state=UploadStatus.OPEN, upload=upload, missing=receipt.missing)
            if isinstance(receipt, InitialReceipt):
                return self._finish_initial(receipt)
            if isinstance(receipt, AheadReceipt):
                return UploadStatus(state=UploadStatus.OPEN, upload=upload)
            assert isinstance(receipt, UpdateReceipt)
            return self._finish_update(receipt)

    def _finish_initial(self, receipt: InitialReceipt) -> UploadStatus:
        assert receipt.writer is not None
        if not receipt.is_over:
            receipt.writer.finish()
            self._end(receipt)
        self.arrived(receipt.run)
        return UploadStatus(state=UploadStatus.ACCEPTED, upload=receipt.id)

    def arrived(self, run: str) -> None:
        """A run's initial tensors are there: it waits to be led, unless it was cancelled meanwhile."""
        if self.store.run_row(run).state == "receiving":
            self.store.set_run_state(run, "waiting")

    def _finish_update(self, receipt: UpdateReceipt) -> UploadStatus:
        assert receipt.sealed is not None
        if not receipt.is_over:
            unreadable = self._unreadable(receipt)
            if unreadable is not None:
                self.store.refuse_upload(receipt.id, unreadable.code, unreadable.message)
                self._end(receipt)
                receipt.path.unlink(missing_ok=True)
                return self.refused_push(receipt, unreadable)
            receipt.sealed.sync()
            if not self.blobs.exists(receipt.blob):
                self.blobs.put(receipt.blob, receipt.path)
            verdict = self.store.accept_upload(receipt.id, receipt.members)
            self._end(receipt)
            if not verdict.accepted:
                self.blobs.delete(receipt.blob)
        row = self.store.upload(receipt.id)
        assert row is not None
        if not row.blob:  # another replica had it from the site too, and its round is over
            self.blobs.delete(receipt.blob)
        return self._status_of(row)

    def _unreadable(self, receipt: UpdateReceipt) -> Refused | None:
        """Read a coded update once, so that one which cannot be read is refused before its round counts on it."""
        plan = self.plans.of(receipt.run)
        if plan is None or plan.coder is None:
            return None
        assert receipt.sealed is not None
        try:
            CodedFile(receipt.sealed, receipt.frame, plan.coder, plan.update_channels, "the update").payloads.check()
        except BadPayload as error:
            return Refused(Refusal.MALFORMED, error.message)
        return None

    def _status_of(self, row: Upload) -> UploadStatus:
        if row.state in ("accepted", "spent"):
            return UploadStatus(state=UploadStatus.ACCEPTED, upload=row.id)
        if row.state == "refused":
            return UploadStatus(state=UploadStatus.REFUSED, upload=row.id, code=row.code, reason=row.reason)
        raise _reopen(row.id)

    def _drop(self, receipt: Receipt, refused: Refused) -> None:
        """An upload that can never be accepted."""
        if isinstance(receipt, UpdateReceipt):
            self.store.refuse_upload(receipt.id, refused.code, refused.message)
        elif isinstance(receipt, InitialReceipt):
            self.store.set_run_state(receipt.run, "failed", error=f"its initial tensors: {refused.message}")
        self._forget(receipt)

    def end_refused_task(self, holder: Holder, signed: SignedManifest, refused: Refused) -> str:
        """A manifest was refused for what it is: the task that it would have answered has failed. Returns its id."""
        if refused.code not in _OWN_FAULT:
            return ""
        try:  # only the task's name is wanted, and the rest may be what is wrong with it
            task = decode(Manifest, signed.manifest).task
            check_text("a manifest's task", task, TASK)
            row = self.store.reply(task, holder.name, "failed", refused.message)
        except Refused:
            return ""
        return row.id if row is not None else ""

    def end_refused_partial(self, holder: Holder, signed: SignedPartial, refused: Refused) -> str:
        """A partial sum was refused, for whatever reason: the relay's task has failed, and its sites send themselves.
        Returns its id."""
        try:
            task = decode(Partial, signed.partial).task
            check_text("a partial sum's task", task, TASK)
            row = self.store.reply(task, holder.name, "failed", refused.message)
        except Refused:
            return ""
        return row.id if row is not None else ""

    def refused_push(self, receipt: Receipt, refused: Refused) -> UploadStatus:
        """What to answer to a sender whose chunk was refused for good."""
        return UploadStatus(
            state=UploadStatus.REFUSED, upload=receipt.id, code=str(refused.code), reason=refused.message
        )

    # --- forgetting

    def _end(self, receipt: Receipt) -> None:
        """Nothing is written to it any more. To be called with its lock held."""
        with self._lock:
            self._receipts.pop(receipt.id, None)
        receipt.is_over = True
        receipt.close()

    def _forget(self, receipt: Receipt, *, delete: bool = True) -> None:
        """It will not be accepted, not here: close it, and delete what has come of it."""
        with receipt.lock:
            if receipt.is_over:
                return
            self._end(receipt)
        if delete and isinstance(receipt, UpdateReceipt):
            receipt.path.unlink(missing_ok=True)

    def forget(self, upload: str) -> None:
        """Drop an upload that was decided, if it is still under way here, or was when an earlier process was killed."""
        receipt = self._receipts.get(upload)
        if receipt is not None:
            self._forget(receipt)
        else:
            self._place(upload).unlink(missing_ok=True)

    def forget_run(self, run: str) -> None:
        """A run has ended: what was under way for it is dropped."""
        for receipt in list(self._receipts.values()):
            if receipt.run == run:
                self._forget(receipt)

    def forget_ended(self) -> None:
        """Drop what is under way here and was decided elsewhere, or came too late. To be called now and then."""
        for receipt in list(self._receipts.values()):
            if isinstance(receipt, UpdateReceipt):
                row = self.store.upload(receipt.id)
                is_open = row is not None and row.state == "open"
            elif isinstance(receipt, AheadReceipt):
                task = self.store.task(receipt.task)
                is_open = task is not None and task.is_open
            else:
                is_open = self.store.run_row(receipt.run).state == "receiving"
            if not is_open:
                self._forget(receipt)

    def sweep(self) -> None:
        """Delete files of uploads that are not open any more: rubbish of a crash."""
        for path in (self.scratch / "uploads").glob("*.sealed"):
            row = self.store.upload(path.stem)
            if row is None or row.state != "open":
                with suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        for receipt in list(self._receipts.values()):
            self._forget(receipt, delete=False)


def _reopen(upload: str) -> UnreachableError:
    return UnreachableError(f"upload {upload[:80]!r} is not open here", hint="open it anew", retry=True)


def weight_of(manifest: ParsedManifest, plan: RunPlan) -> float:
    """What an update weighs, as the recipe's `federation.weighting` says."""
    weights = {"examples": manifest.num_examples, "tokens": manifest.num_label_tokens, "uniform": 1}
    return float(weights[plan.recipe.federation.weighting])


def _ahead(task: str) -> str:
    """The id under which chunks are pushed ahead of a task's update."""
    return f"ahead-{task}"


def _context(offer: ParsedManifest | ParsedPartial | TaskRow) -> str:
    """What a sealed update's key is bound to."""
    return f"{offer.run}/{offer.round}/{offer.site}"


def _member(signed: SignedManifest, manifest: ParsedManifest) -> Upload:
    """The row of an update that comes in a partial sum, if that is accepted. Nothing of its own is kept here."""
    return Upload(
        id=uuid4().hex,
        run=manifest.run,
        round=manifest.round,
        site=manifest.site,
        task=manifest.task,
        digest=header_digest(signed.manifest),
        manifest=signed.manifest,
        signature=signed.signature,
        data_key=None,
        blob="",
    )
