"""What sites call: attendance, jobs, uploads, chunks. Who calls is known from the certificate (`guard.py`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from ..errors import AccessError, CommonweightError, StateError, StorageError
from ..identity.certificates import Holder
from ..wire.manifest import DIGEST, TASK, check_text
from ..wire.messages import check_site_message
from ..wire.protocol_pb2 import (
    Ahead,
    Bye,
    CatchUpReply,
    CatchUpRequest,
    CoordinatorMessage,
    FetchRequest,
    Heartbeat,
    Hello,
    JobRequest,
    RegionReply,
    RegionRequest,
    RenewReply,
    RenewRequest,
    SignedJob,
    SignedManifest,
    SignedPartial,
    SiteMessage,
    TaskReply,
    UploadStatus,
    Welcome,
)
from ..wire.refusals import Refusal, Refused
from ..wire.service import CERTIFICATE_KEY, PROTOCOL_MAX, PROTOCOL_MIN, Parcel
from .context import Context
from .frame_files import StoredFrame
from .hub import Stream
from .pushes import Pushes
from .relays import sites_of

_log = logging.getLogger(__name__)

_STATES = {
    TaskReply.TAKEN: "taken",
    TaskReply.HELD: "held",
    TaskReply.DONE: "done",
    TaskReply.REFUSED: "refused",
    TaskReply.FAILED: "failed",
}
#: a site is given this long to say hello
_HELLO_S = 10.0


class FederationService(Pushes):
    """The services `Federation` and `Transfer`."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.here: Context = context

    # --- attendance

    async def Attend(
        self, requests: AsyncIterator[SiteMessage], holder: Holder, context: Any
    ) -> AsyncIterator[CoordinatorMessage]:
        await context.send_initial_metadata(((CERTIFICATE_KEY, self.here.certificate()),))
        hello = await self._hello(requests)
        if isinstance(hello, Bye):
            yield CoordinatorMessage(bye=hello)
            return
        hub, presence = self.here.hub, self.here.presence
        stream = Stream(holder.name, uuid4().hex, holder, set(hello.tasks))
        hub.add(stream)
        reader: asyncio.Task[None] | None = None
        try:
            await self.here.away(presence.arrived, stream.site, stream.session)
            self.here.metrics.attending.set(len(hub.streams))
            head = await self.here.away(self.here.audit_head)
            stream.audit_sequence = head.sequence
            yield CoordinatorMessage(
                welcome=Welcome(
                    protocol=min(PROTOCOL_MAX, hello.protocol_max),
                    name=holder.name,
                    heartbeat_s=self.here.settings.heartbeat_s,
                    audit_head=head,
                )
            )
            reader = asyncio.create_task(self._read(requests, stream))
            hub.tell_ended(stream)
            await hub.push(stream.site)
            async for message in stream.messages():
                yield message
        finally:
            if reader is not None:
                reader.cancel()
            hub.remove(stream)
            self.here.metrics.attending.set(len(hub.streams))
            await asyncio.shield(self.here.away(presence.left, stream.site, stream.session))

    async def _hello(self, requests: AsyncIterator[SiteMessage]) -> Hello | Bye:
        """A site's first message, or why it cannot attend."""
        try:
            first = await asyncio.wait_for(anext(requests, None), _HELLO_S)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("body") != "hello":
            return Bye(reason="the first message must be a hello", come_back=True)
        try:
            check_site_message(first)
        except Refused as refused:
            return Bye(reason=refused.message, come_back=True)
        hello = first.hello
        if min(PROTOCOL_MAX, hello.protocol_max) < max(PROTOCOL_MIN, hello.protocol_min):
            reason = (
                f"no version of the protocol in common: this coordinator speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}, "
                f"the site {hello.protocol_min} to {hello.protocol_max}"
            )
            return Bye(reason=reason, come_back=False)
        return hello

    async def _read(self, requests: AsyncIterator[SiteMessage], stream: Stream) -> None:
        """Take in what a site says, until it stops saying anything."""
        reason, come_back = "", True
        try:
            async for message in requests:
                stream.heard_at = asyncio.get_running_loop().time()
                await self._hear(message, stream)
        except AccessError as error:  # of the guard: it may not attend any more
            reason, come_back = error.message, False
        except CommonweightError as error:
            reason = error.message
        finally:
            stream.end(reason, come_back=come_back)

    async def _hear(self, message: SiteMessage, stream: Stream) -> None:
        match message.WhichOneof("body"):
            case "heartbeat":
                stream.doing = _doing(message)
                stream.send(heartbeat=Heartbeat())
            case "reply":
                try:
                    await self._reply(message, stream)
                except Refused as refused:
                    details = {"code": str(refused.code), "reason": refused.message}
                    note = lambda: self.here.denials.note("reply refused", actor=stream.site, **details)  # noqa: E731
                    await self.here.away(note)
                    raise
            case _:
                stream.end("a hello comes once, at the beginning", come_back=True)

    async def _reply(self, message: SiteMessage, stream: Stream) -> None:
        """What a site says of a task. What cannot be used is no answer: the task has failed then.

        Raises:
            Refused: it is nothing that could be said of one of the site's tasks.
        """
        reply = message.reply
        state, reason, result = _STATES.get(reply.state, ""), reply.reason, reply.result or None
        try:
            check_site_message(message)
        except Refused as refused:
            if not TASK.fullmatch(reply.task):
                raise
            state, reason, result = "failed", f"its answer was refused: {refused.message}", None
        await self.here.away(self._take_reply, stream.site, reply.task, state, reason, result)

    def _take_reply(self, site: str, task: str, state: str, reason: str, result: bytes | None) -> None:
        store = self.here.store
        if state in ("taken", "held"):
            store.reply(task, site, state, reason)
            return
        known = store.task(task)
        if known is None or (known.site == site and not known.is_open):
            return  # over, or said before
        if known.kind == "train" and state == "done":  # an update that was accepted has ended its task already
            state, reason = "failed", "it says that it is done, but no update of it was accepted"
        store.reply(task, site, state, reason, result)
        if state in ("refused", "failed"):
            details = {"run": known.run, "round": known.round, "kind": known.kind, "reason": reason}
            store.audit(f"task {state}", actor=site, subject=task, **details)

    async def GetJob(self, request: JobRequest, holder: Holder, context: Any) -> SignedJob:
        plan = await self.here.away(self.here.plan_for, request.run, holder)
        row = await self.here.away(self.here.store.run_row, plan.job.id)
        return SignedJob(job=row.job, signature=row.signature, certificate=row.certificate)

    async def Renew(self, request: RenewRequest, holder: Holder, context: Any) -> RenewReply:
        return RenewReply(certificate=await self.here.away(self.here.renew, holder, request.csr))

    # --- uploads

    async def OpenAhead(self, request: Ahead, holder: Holder, context: Any) -> UploadStatus:
        return await self.here.away(self.here.receiver.open_ahead, holder, request)

    async def OpenUpload(self, request: SignedManifest, holder: Holder, context: Any) -> UploadStatus:
        try:
            status = await self.here.away(self.here.receiver.open_update, holder, request)
        except Refused as refused:
            return await self.here.away(self._refused, holder, request, refused)
        return status

    def _refused(self, holder: Holder, signed: SignedManifest, refused: Refused) -> UploadStatus:
        """A refusal as an answer, in the audit log, and as the end of the task that it would have answered."""
        self.here.metrics.uploads.labels(str(refused.code)).inc()
        subject = self.here.receiver.end_refused_task(holder, signed, refused)
        self.here.denials.note(
            "update refused", actor=holder.name, subject=subject, code=str(refused.code), reason=refused.message
        )
        return UploadStatus(state=UploadStatus.REFUSED, code=str(refused.code), reason=refused.message)

    async def OpenPartial(self, request: SignedPartial, holder: Holder, context: Any) -> UploadStatus:
        try:
            return await self.here.away(self.here.receiver.open_partial, holder, request)
        except Refused as refused:
            return await self.here.away(self._refused_partial, holder, request, refused)

    def _refused_partial(self, holder: Holder, signed: SignedPartial, refused: Refused) -> UploadStatus:
        self.here.metrics.uploads.labels(str(refused.code)).inc()
        subject = self.here.receiver.end_refused_partial(holder, signed, refused)
        self.here.denials.note(
            "partial sum refused", actor=holder.name, subject=subject, code=str(refused.code), reason=refused.message
        )
        return UploadStatus(state=UploadStatus.REFUSED, code=str(refused.code), reason=refused.message)

    async def Region(self, request: RegionRequest, holder: Holder, context: Any) -> RegionReply:
        """For whom a relay may still wait."""
        return await self.here.away(self._region, request.task, holder)

    def _region(self, task: str, holder: Holder) -> RegionReply:
        check_text("a relay's task", task, TASK)
        row = self.here.store.task(task)
        if row is None or (row.site, row.kind) != (holder.name, "relay"):
            raise Refused(Refusal.WRONG_TASK, f"no task {task!r} was given to this relay")
        found = self.here.store.round_state(row.run, row.round)
        waiting = set(found[0].waiting) if found is not None else set[str]()
        return RegionReply(waiting=[site for site in sites_of(row) if site in waiting], over=not row.is_open)

    # --- global tensors

    async def CatchUp(self, request: CatchUpRequest, holder: Holder, context: Any) -> CatchUpReply:
        """What leads a site to the tensors that it wants, if that is less than they are."""
        plan = await self.here.away(self.here.plan_for, request.run, holder)
        for digest in (request.held, request.wanted):
            check_text("the digest of global tensors", digest, DIGEST)
        whole, run = plan.layout.num_bytes, plan.job.id
        return CatchUpReply(
            frames=await self.here.away(self.here.catch_ups.frames, run, request.held, request.wanted, whole)
        )

    async def Fetch(self, request: FetchRequest, holder: Holder, context: Any) -> AsyncIterator[Parcel]:
        await self.here.away(self.here.plan_for, request.run, holder)
        stored: StoredFrame = await self.here.away(self._frame, request.run, request.frame)
        yield Parcel(stored.frame.header)
        if request.header_only:
            return
        with self.transfer(holder):
            for index in range(request.first, stored.frame.plan.num_chunks):
                async with self.here.lanes.one():
                    yield Parcel(await self.here.crunch(stored.chunk, index))
                self.here.metrics.sent.inc(stored.frame.plan.pieces[index].num_bytes)

    def _frame(self, run: str, digest: str) -> StoredFrame:
        if not DIGEST.fullmatch(digest):
            raise Refused(Refusal.MALFORMED, f"{digest[:80]!r} is no frame's digest")
        files = self.here.files(run)
        try:
            return files.open(digest)
        except StorageError as error:
            if error.retry or files.has(digest):
                raise
            raise StateError(f"run {run!r} has no frame {digest[:16]}…, or has it no more") from error


def _doing(message: SiteMessage) -> str:
    """What a site says that it is doing, if that can be shown."""
    try:
        check_site_message(message)
    except Refused:
        return ""
    return next((progress.note for progress in message.heartbeat.progress), "")
