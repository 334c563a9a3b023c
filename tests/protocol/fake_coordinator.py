"""A coordinator for tests of the site's agent: speaks the wire's protocol, remembers everything, fails when told to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commonweight.identity.authority import Authority
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import AUDIT, JOB, UPDATE, verify
from commonweight.identity.tls import server_credentials
from commonweight.model.tensors import NamedTensors
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, Frame, frame_of, parse_header, piece_of, plan_for, unpack_chunk
from commonweight.wire.manifest import check_chunk
from commonweight.wire.service import (
    CERTIFICATE_KEY,
    FEDERATION,
    HINT_KEY,
    TRANSFER,
    UPLOAD_KEY,
    Parcel,
    channel_options,
    handler,
)

import grpc  # isort: skip
import grpc.aio  # isort: skip

CHUNK_BYTES = 1024


class People:
    """An authority, and identities of its issue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority", name="test")

    def enrol(self, name: str, role: str, *, hours: float = 24.0, now: float | None = None) -> IdentityFolder:
        path = self.folder / "identities" / f"{role}-{name}"
        asked = IdentityFolder.prepare(path)
        certificate = self.authority.issue(
            asked.csr, name=name, role=role, signing_key=asked.signing_key, hours=hours, now=now
        )
        pem = self.authority.certificate_pem
        return IdentityFolder.complete(
            path, name=name, role=role, certificate=certificate, authority=pem, address="127.0.0.1:1"
        )


def signed_job(lead: IdentityFolder, run: str, recipe: str, initial: bytes, **changes: Any) -> pb.SignedJob:
    values: dict[str, Any] = {
        "id": run,
        "name": "small",
        "recipe": recipe,
        "kind": "train",
        "purpose": "research",
        "sites": ["north", "south", "west"],
        "must_match": {"base weights": "ab" * 32},
        "initial": initial,
        "submitted_at": time.time(),
    }
    job = pb.Job(**{**values, **changes}).SerializeToString(deterministic=True)
    return pb.SignedJob(job=job, signature=lead.signing_key.sign(JOB, job), certificate=lead.certificate)


@dataclass
class Body:
    """A frame with its chunks."""

    frame: Frame
    chunks: list[bytes]

    @classmethod
    def of(cls, channels: dict[str, NamedTensors], wide: tuple[str, ...] = ()) -> Body:
        layout = next(iter(channels.values())).layout
        plan = plan_for(layout, tuple(Channel(name, name in wide) for name in channels), CHUNK_BYTES)
        frame = frame_of(channels, plan)
        return cls(frame, [bytes(piece_of(channels, piece)) for piece in plan.pieces])


@dataclass
class Upload:
    signed: pb.SignedManifest
    manifest: pb.Manifest
    frame: Frame
    chunks: dict[int, bytes] = field(default_factory=dict)
    state: int = pb.UploadStatus.OPEN


@dataclass
class Visit:
    """One attendance."""

    hello: pb.Hello
    out: asyncio.Queue[pb.CoordinatorMessage | None] = field(default_factory=asyncio.Queue)
    replies: list[pb.TaskReply] = field(default_factory=list)
    progress: list[str] = field(default_factory=list)


class FakeCoordinator:
    """See above. What it does wrong is set by attributes:

    mute: answers nothing any more, but keeps the connection.
    cut_fetch, cut_push: chunks after which (each once) a transfer is cut.
    spoil: chunks of fetches that are damaged, and how often.
    lose: chunks of pushes that are dropped as broken, and how often.
    hasty: answers a push at the first broken chunk.
    refuse: (code, reason) for every upload.
    busy: uploads that cannot be opened now, but may be later.
    lost: questions for a way that no answer comes to, but may later.
    abort: status with which `Attend` ends at once.
    """

    def __init__(self, people: People, *, heartbeat_s: float = 0.05, tls: bool = False) -> None:
        self.people, self.heartbeat_s, self.tls = people, heartbeat_s, tls
        self.identity = people.enrol("coordinator", "coordinator")
        self.port = 0
        self.visits: list[Visit] = []
        self.ended: dict[str, pb.TaskReply] = {}
        self.jobs: dict[str, pb.SignedJob] = {}
        self.jobs_asked: Counter[str] = Counter()
        self.frames: dict[str, Body] = {}
        self.fetched: Counter[int] = Counter()
        self.fetches: list[int] = []
        self.wanted: list[str] = []
        self.ways: dict[tuple[str, str], list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.lost = 0
        self.pushed: Counter[int] = Counter()
        self.uploads: dict[str, Upload] = {}
        self.head: pb.AuditHead | None = None
        self.on_visit: Callable[[Visit], None] = lambda visit: None
        self.mute = False
        self.cut_fetch: set[int] = set()
        self.cut_push: set[int] = set()
        self.spoil: Counter[int] = Counter()
        self.lose: Counter[int] = Counter()
        self.hasty = False
        self.busy = 0
        self.refuse: tuple[str, str] | None = None
        self.abort: grpc.StatusCode | None = None
        self.renewals = 0

    # ---- for tests

    async def start(self) -> None:
        self.server = grpc.aio.server(options=channel_options())
        of_sites = {name: method for name, method in FEDERATION.items() if hasattr(self, name)}
        self.server.add_generic_rpc_handlers((handler(of_sites, self), handler(TRANSFER, self)))
        address = f"127.0.0.1:{self.port}"
        if self.tls:
            self.port = self.server.add_secure_port(address, server_credentials(lambda: self.identity))
        else:
            self.port = self.server.add_insecure_port(address)
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    def add(self, body: Body) -> str:
        self.frames[body.frame.digest] = body
        return body.frame.digest

    def send(self, **body: Any) -> None:
        """Send a message on the latest attendance."""
        self.visits[-1].out.put_nowait(pb.CoordinatorMessage(**body))

    def replies(self, task: str) -> list[int]:
        return [reply.state for visit in self.visits for reply in visit.replies if reply.task == task]

    def last_reply(self, task: str) -> pb.TaskReply | None:
        return self.ended.get(task)

    def sign_head(self, sequence: int, hash: bytes) -> pb.AuditHead:
        signature = self.identity.signing_key.sign(AUDIT, sequence.to_bytes(8, "big") + hash)
        return pb.AuditHead(sequence=sequence, hash=hash, signature=signature)

    # ---- Federation

    async def Attend(self, _: Any, context: Any) -> None:
        if self.abort is not None:
            await context.abort(self.abort, "go away")
        hello = (await context.read()).hello
        await context.send_initial_metadata(((CERTIFICATE_KEY, self.identity.certificate),))
        visit = Visit(hello)
        self.visits.append(visit)
        if self.mute:
            await asyncio.sleep(60)
        welcome = pb.Welcome(protocol=1, name="north", heartbeat_s=self.heartbeat_s, audit_head=self.head)
        await context.write(pb.CoordinatorMessage(welcome=welcome))
        self.on_visit(visit)
        reading = asyncio.create_task(self._listen(visit, context))
        try:
            while (message := await visit.out.get()) is not None:
                await context.write(message)
                if message.HasField("bye"):
                    return
        finally:
            reading.cancel()

    async def _listen(self, visit: Visit, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if self.mute:
                continue
            if message.HasField("reply"):
                visit.replies.append(message.reply)
                if message.reply.state != pb.TaskReply.TAKEN:
                    self.ended[message.reply.task] = message.reply
            if message.HasField("heartbeat"):
                visit.progress.extend(progress.note for progress in message.heartbeat.progress)
                visit.out.put_nowait(pb.CoordinatorMessage(heartbeat=pb.Heartbeat()))
        visit.out.put_nowait(None)

    async def GetJob(self, request: pb.JobRequest, context: Any) -> pb.SignedJob:
        self.jobs_asked[request.run] += 1
        if request.run not in self.jobs:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no run {request.run}")
        return self.jobs[request.run]

    async def OpenUpload(self, signed: pb.SignedManifest, context: Any) -> pb.UploadStatus:
        manifest = pb.Manifest.FromString(signed.manifest)
        if self.busy > 0:
            self.busy -= 1
            details = json.dumps({"kind": "StateError", "hint": "", "retry": True}).encode()
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now", ((HINT_KEY + "-bin", details),))
        if self.refuse is not None:
            code, reason = self.refuse
            return pb.UploadStatus(state=pb.UploadStatus.REFUSED, code=code, reason=reason)
        name = hashlib.sha256(signed.manifest).hexdigest()
        self.uploads.setdefault(name, Upload(signed, manifest, parse_header(manifest.frame)))
        return self._status(name)

    def _status(self, name: str) -> pb.UploadStatus:
        upload = self.uploads[name]
        missing = [k for k in range(upload.frame.plan.num_chunks) if k not in upload.chunks]
        if not missing:
            upload.state = pb.UploadStatus.ACCEPTED
        return pb.UploadStatus(state=upload.state, upload=name, missing=missing)

    async def CatchUp(self, request: pb.CatchUpRequest, context: Any) -> pb.CatchUpReply:
        if self.lost > 0:
            self.lost -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        self.asked.append((request.held, request.wanted))
        return pb.CatchUpReply(frames=self.ways.get((request.held, request.wanted), []))

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        self.renewals += 1
        site = IdentityFolder.open(self.people.folder / "identities" / "site-north").holder
        pem = self.people.authority.issue(request.csr, name=site.name, role=site.role, signing_key=site.signing_key)
        return pb.RenewReply(certificate=pem)

    # ---- Transfer

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[Parcel]:
        body = self.frames.get(request.frame)
        if body is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no frame {request.frame}")
        assert body is not None
        self.fetches.append(request.first)
        self.wanted.append(request.frame)
        yield Parcel(body.frame.header)
        for index in range(request.first, len(body.chunks)):
            chunk = body.chunks[index]
            if self.spoil[index] > 0:
                self.spoil[index] -= 1
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            self.fetched[index] += 1
            yield Parcel(chunk)
            if index in self.cut_fetch:
                self.cut_fetch.discard(index)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def Push(self, messages: AsyncIterator[Parcel], context: Any) -> pb.UploadStatus:
        name = dict(context.invocation_metadata())[UPLOAD_KEY]
        upload = self.uploads[name]
        async for parcel in messages:
            index, chunk = unpack_chunk(parcel.take())
            self.pushed[index] += 1
            if self.lose[index] > 0:
                self.lose[index] -= 1
                if self.hasty:
                    return self._status(name)
                continue
            check_chunk(upload.frame, index, chunk)
            upload.chunks[index] = bytes(chunk)
            if index in self.cut_push:
                self.cut_push.discard(index)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        status = self._status(name)
        if status.state == pb.UploadStatus.ACCEPTED:  # the task is over for the coordinator before the site knows why
            self.send(withdraw=pb.Withdraw(task=upload.manifest.task, reason="it is over"))
            await asyncio.sleep(0.02)
        return status

    def signed_by(self, upload: Upload, site: IdentityFolder) -> bool:
        return verify(site.holder.signing_key, UPDATE, upload.signed.manifest, upload.signed.signature)
