"""What sites call: attendance, jobs, uploads, chunks. Who calls is known from the certificate (`guard.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from uuid import uuid4

import grpc

from ..errors import AccessError, StateError
from ..identity.certificates import Holder, holder_of
from ..wire.protocol_pb2 import (
    Bye,
    CoordinatorMessage,
    FetchRequest,
    Heartbeat,
    Hello,
    JobRequest,
    RenewReply,
    RenewRequest,
    RunEnded,
    SignedJob,
    SignedManifest,
    SiteMessage,
    TaskReply,
    UploadStatus,
    Welcome,
)
from ..wire.refusals import Refusal, Refused
from ..wire.service import CERTIFICATE_KEY, PROTOCOL_MAX, PROTOCOL_MIN, UPLOAD_KEY
from .context import Context
from .frame_files import StoredFrame
from .hub import Stream
from .receive import InitialReceipt

_STATES = {
    TaskReply.TAKEN: "taken",
    TaskReply.DONE: "done",
    TaskReply.REFUSED: "refused",
    TaskReply.FAILED: "failed",
}
#: a site is given this long to say hello
_HELLO_S = 10.0
#: the longest reason that is kept of a site's reply
_REASON_CHARS = 4000
#: runs that ended lately; a site that was away is told of them when it comes
_ENDED_RUNS = 50


class FederationService:
    """The services `Federation` and `Transfer`."""

    def __init__(self, context: Context) -> None:
        self.here = context

    # --- attendance

    async def Attend(
        self, requests: AsyncIterator[SiteMessage], holder: Holder, context: Any
    ) -> AsyncIterator[CoordinatorMessage]:
        await context.send_initial_metadata(((CERTIFICATE_KEY, self.here.certificate()),))
        hello = await self._hello(requests)
        if hello is None:
            yield CoordinatorMessage(bye=Bye(reason="the first message must be a hello", come_back=True))
            return
        version = min(PROTOCOL_MAX, hello.protocol_max)
        if version < max(PROTOCOL_MIN, hello.protocol_min):
            reason = (
                f"no version of the protocol in common: this coordinator speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}, "
                f"the site {hello.protocol_min} to {hello.protocol_max}"
            )
            yield CoordinatorMessage(bye=Bye(reason=reason, come_back=False))
            return
        hub, presence = self.here.hub, self.here.presence
        stream = Stream(holder.name, uuid4().hex, holder, set(hello.tasks))
        hub.add(stream)
        await self.here.away(presence.arrived, stream.site, stream.session)
        self.here.metrics.attending.set(len(hub.streams))
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            head = await self.here.away(self.here.audit_head)
            welcome = Welcome(
                protocol=version, name=holder.name, heartbeat_s=self.here.settings.heartbeat_s, audit_head=head
            )
            yield CoordinatorMessage(welcome=welcome)
            for run in await self.here.away(partial(self.here.store.runs, _ENDED_RUNS)):
                if run.has_ended:
                    stream.ended_runs.add(run.id)
                    yield CoordinatorMessage(ended=RunEnded(run=run.id, state=run.state))
            await hub.push(stream.site)
            async for message in stream.messages():
                yield message
        finally:
            reader.cancel()
            hub.remove(stream)
            self.here.metrics.attending.set(len(hub.streams))
            await asyncio.shield(self.here.away(presence.left, stream.site, stream.session))

    async def _hello(self, requests: AsyncIterator[SiteMessage]) -> Hello | None:
        try:
            first = await asyncio.wait_for(anext(requests, None), _HELLO_S)
        except TimeoutError:
            return None
        return first.hello if first is not None and first.WhichOneof("body") == "hello" else None

    async def _read(self, requests: AsyncIterator[SiteMessage], stream: Stream) -> None:
        """Take in what a site says, until it stops saying anything."""
        try:
            async for message in requests:
                stream.heard_at = asyncio.get_running_loop().time()
                match message.WhichOneof("body"):
                    case "heartbeat":
                        stream.progress = {p.task: p.note[:200] for p in message.heartbeat.progress}
                        stream.send(heartbeat=Heartbeat())
                    case "reply":
                        await self._reply(message.reply, stream)
                    case _:
                        stream.end("a hello comes once, at the beginning", come_back=True)
        except (grpc.RpcError, asyncio.CancelledError):
            raise
        except Refused as refused:
            stream.end(refused.message, come_back=True)
        finally:
            stream.end("", come_back=True)

    async def _reply(self, reply: TaskReply, stream: Stream) -> None:
        state = _STATES.get(reply.state)
        if state is None:
            raise Refused(Refusal.MALFORMED, "a reply without a state")
        result = reply.result or None
        reason = reply.reason[:_REASON_CHARS]
        row = await self.here.away(self.here.store.reply, reply.task, stream.site, state, reason, result)
        if row is not None and state in ("refused", "failed"):
            details = {"run": row.run, "round": row.round, "kind": row.kind, "reason": reason}
            audit = partial(self.here.store.audit, f"task {state}", actor=stream.site, subject=row.id, **details)
            await self.here.away(audit)

    async def GetJob(self, request: JobRequest, holder: Holder, context: Any) -> SignedJob:
        plan = await self.here.away(self.here.plan_for, request.run, holder)
        row = await self.here.away(self.here.store.run_row, plan.job.id)
        return SignedJob(job=row.job, signature=row.signature, certificate=row.certificate)

    async def Renew(self, request: RenewRequest, holder: Holder, context: Any) -> RenewReply:
        return RenewReply(certificate=await self.here.away(self.here.renew, holder, request.csr))

    # --- uploads

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
        self.here.store.audit(
            "update refused", actor=holder.name, subject=subject, code=str(refused.code), reason=refused.message
        )
        return UploadStatus(state=UploadStatus.REFUSED, code=str(refused.code), reason=refused.message)

    async def Push(self, requests: AsyncIterator[bytes], holder: Holder, context: Any) -> UploadStatus:
        upload = dict(context.invocation_metadata() or ()).get(UPLOAD_KEY, "")
        receiver = self.here.receiver
        receipt = receiver.receipt(upload, holder.name)
        if receipt is None:
            raise StateError(f"no upload {upload!r} is open here", hint="open it anew", retry=True)
        if isinstance(receipt, InitialReceipt) != (holder.role != "site"):
            raise AccessError(f"upload {upload!r} is not one that a {holder.role} sends")
        try:
            while True:
                async with self.here.lanes.one():
                    message = await anext(requests, None)
                    if message is None:
                        break
                    await self.here.crunch(receiver.take, receipt, message)
                self.here.metrics.received.inc(len(message))
            status: UploadStatus = await self.here.away(receiver.finish, upload, holder.name)
        except Refused as refused:
            if refused.code is Refusal.CORRUPT_CHUNK:
                return UploadStatus(state=UploadStatus.OPEN, upload=upload, missing=receipt.missing)
            return await self.here.away(receiver.refused_push, receipt, refused)
        outcome = {UploadStatus.ACCEPTED: "accepted", UploadStatus.REFUSED: status.code}.get(status.state)
        if outcome is not None:
            self.here.metrics.uploads.labels(outcome).inc()
        return status

    # --- global tensors

    async def Fetch(self, request: FetchRequest, holder: Holder, context: Any) -> AsyncIterator[bytes]:
        await self.here.away(self.here.plan_for, request.run, holder)
        stored: StoredFrame = await self.here.away(self.here.files(request.run).open, request.frame)
        yield stored.frame.header
        if request.header_only:
            return
        for index in range(request.first, stored.frame.plan.num_chunks):
            async with self.here.lanes.one():
                chunk = await self.here.crunch(stored.chunk, index)
                await context.write(chunk)
            self.here.metrics.sent.inc(len(chunk))


def holder_name(certificate: bytes) -> str:
    """The name in a certificate."""
    return holder_of(certificate).name
