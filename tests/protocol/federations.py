"""A real coordinator in a thread of the test's process, and sites that say what a test tells them to.

The coordinator is whole: ports with TLS, database, blobs, leader. Sites are hands: an identity, the services' methods,
and answers that a test may replace.
"""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch

from commonweight.coordinator.context import Context
from commonweight.coordinator.folder import enroll, init
from commonweight.coordinator.server import Replica
from commonweight.coordinator.settings import CoordinatorSettings
from commonweight.coordinator.store import AuditEntry, Store
from commonweight.identity.enrol import enrol
from commonweight.identity.folder import IdentityFolder
from commonweight.identity.keys import UPDATE
from commonweight.identity.tls import TARGET_OPTIONS, channel_credentials
from commonweight.lead.client import Client
from commonweight.lead.submit import sign
from commonweight.model.tensors import NamedTensors
from commonweight.recipe.resolved import recipe_text
from commonweight.recipe.schema import Recipe
from commonweight.wire import protocol_pb2 as pb
from commonweight.wire.frames import Channel, Frame, frame_of, pack_chunk, piece_of, plan_for
from commonweight.wire.service import (
    CONTROL,
    FEDERATION,
    HINT_KEY,
    TRANSFER,
    UPLOAD_KEY,
    channel_options,
    stub,
)

import grpc  # isort: skip

WAIT_S = 30.0
BEAT_S = 0.2
CHUNK_BYTES = 1024

T = TypeVar("T")


def wait_for(found: Callable[[], T], seconds: float = WAIT_S) -> T:
    """The first true value."""
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.01)
    return value


def theta(scale: float = 1.0) -> NamedTensors:
    """Five chunks of tensors."""
    a, b = torch.arange(1024.0).reshape(32, 32), torch.ones(64)
    return NamedTensors.of({"a.weight": a * scale, "b.weight": b * scale})


def frame_for(tensors: NamedTensors, channel: str = "theta", chunk_bytes: int = CHUNK_BYTES) -> Frame:
    return frame_of({channel: tensors}, plan_for(tensors.layout, (Channel(channel),), chunk_bytes))


def chunks_of(tensors: NamedTensors, frame: Frame) -> list[bytes]:
    channel = frame.plan.channels[0].name
    return [pack_chunk(piece.index, piece_of({channel: tensors}, piece)) for piece in frame.plan.pieces]


class Coordinator:
    """Stops with the block.

    Args:
        settings: in place of those that suit a test.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.home = folder, folder / "coordinator"
        self.ports = _free_ports("services", "enrolment", "http")
        at = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        values = {"heartbeat_s": BEAT_S, "lease_s": 5.0, "max_upload_mb": 1, **settings}
        self.settings = CoordinatorSettings(
            listen=at["services"],
            listen_enrolment=at["enrolment"],
            listen_http=at["http"],
            address=at["services"],
            address_enrolment=at["enrolment"],
            **values,
        )
        init(self.home, self.settings, ["127.0.0.1"])
        self._open: list[Any] = []

    def __enter__(self) -> Coordinator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open:
            one.close()
        self.stop()

    def start(self) -> None:
        ready, failed = threading.Event(), list[BaseException]()

        async def serve() -> None:
            self.replica = Replica(self.home, self.settings)
            await self.replica.serve(lambda *_: ready.set())

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()

        self._thread = threading.Thread(target=run, name="coordinator", daemon=True)
        self._thread.start()
        assert ready.wait(WAIT_S)
        if failed:
            raise failed[0]

    def stop(self) -> None:
        self.replica.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def here(self) -> Context:
        assert self.replica.here is not None
        return self.replica.here

    @property
    def store(self) -> Store:
        return self.here.store

    def audit(self, action: str | None = None) -> list[AuditEntry]:
        entries, after = list[AuditEntry](), 0
        while found := self.store.audit_entries(after):
            entries += found
            after = found[-1].sequence
        return [entry for entry in entries if action in (None, entry.action)]

    def audited(self, action: str, actor: str, words: str) -> AuditEntry:
        """The entry about somebody whose details hold some words; it may be written after the caller has its answer."""

        def found() -> list[AuditEntry]:
            return [e for e in self.audit(action) if e.actor == actor and words in json.dumps(dict(e.details))]

        return wait_for(found)[0]

    # --- people

    def enrol(self, name: str, role: str, **token: Any) -> IdentityFolder:
        return enrol(enroll(self.home, name, role, **token).to_text(), self.folder / "people" / f"{role}-{name}")

    def hand(self, name: str, role: str) -> Hand:
        """Somebody who is enrolled now."""
        hand = Hand(self.enrol(name, role))
        self._open.append(hand)
        return hand

    def hold(self, identity: IdentityFolder) -> Hand:
        hand = Hand(identity)
        self._open.append(hand)
        return hand

    def site(self, name: str, **answers: Answer) -> Site:
        """A site that attends and answers."""
        site = Site(self.enrol(name, "site"), answers)
        self._open.append(site)
        return site.attend()

    def guest(self, name: str) -> Site:
        """A site that is enrolled and does not attend yet."""
        site = Site(self.enrol(name, "site"), {})
        self._open.append(site)
        return site


class Hand:
    """An identity with its connection: every method of every service."""

    def __init__(self, identity: IdentityFolder) -> None:
        self.identity = identity
        self.name = identity.holder.name

    @cached_property
    def channel(self) -> grpc.Channel:
        options = [*channel_options(), *TARGET_OPTIONS]
        return grpc.secure_channel(self.identity.address, channel_credentials(self.identity), options=options)

    @cached_property
    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {
            f"{table[name].service.rpartition('.')[2]}/{name}": call
            for table in (FEDERATION, TRANSFER, CONTROL)
            for name, call in stub(self.channel, table).items()
        }

    def call(self, method: str, request: Any, **metadata: str) -> Any:
        """A call's answer; of a stream all answers."""
        keys = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        answer = self._methods[method](request, timeout=WAIT_S, metadata=keys)
        kind = method.partition("/")[2]
        return list(answer) if kind in ("Fetch", "Watch", "GetFile", "ReadAudit") else answer

    def stream(self, method: str, request: Any, **keywords: Any) -> Any:
        return self._methods[method](request, **keywords)

    def begin(self, method: str, requests: Iterator[Any], **metadata: str) -> Any:
        """A call with a stream of requests that goes on beside the test; a future."""
        keys = tuple((key.replace("_", "-"), value) for key, value in metadata.items())
        return self._methods[method].future(requests, timeout=WAIT_S, metadata=keys)  # type: ignore[attr-defined]

    def json(self, method: str, request: Any) -> Any:
        return json.loads(self.call(method, request).json)

    def denied(self, method: str, request: Any, **metadata: str) -> Denial:
        """The error that a call ends with."""
        try:
            self.call(method, request, **metadata)
        except grpc.RpcError as error:
            return Denial(error)
        raise AssertionError(f"{method} was answered")

    def close(self) -> None:
        if "channel" in vars(self):
            self.channel.close()

    # --- what a lead does

    def job(
        self,
        *,
        rounds: int = 1,
        sites: Sequence[str] = (),
        tensors: NamedTensors | None = None,
        privacy: Mapping[str, Any] | None = None,
        compression: Any = "none",
        **federation: Any,
    ) -> pb.Job:
        recipe = Recipe.model_validate(
            {
                "name": federation.pop("name", "small"),
                "training": {"lr": 1.0},
                "federation": {"rounds": rounds, "patience_s": 0.3, **federation},
                "privacy": privacy or {},
                "compression": compression,
                "evaluation": {"controls": [], "every": rounds, "samples": 0, "resamples": 100},
                "output": {"keep_rounds": 1},
            }
        )
        return pb.Job(
            id=uuid4().hex,
            name=recipe.name,
            recipe=recipe_text(recipe),
            kind="train",
            sites=sites,
            must_match={"base weights": "0" * 64},
            initial=frame_for(tensors or theta()).header,
            submitted_at=time.time(),
        )

    def sign(self, job: pb.Job) -> pb.SignedJob:
        return sign(job, self.identity)

    def submit(self, job: pb.Job, tensors: NamedTensors | None = None) -> str:
        """Submit a job with its tensors."""
        given = tensors or theta()
        with Client(self.identity.path) as client:
            return client.submit(self.sign(job), {"theta": given}, frame_for(given))

    def run(self, run: str) -> dict[str, Any]:
        return dict(self.json("Control/GetRun", pb.RunRequest(run=run)))

    def wait(self, run: str, state: str = "finished") -> dict[str, Any]:
        """The run, once it has ended as it should."""
        ended = wait_for(lambda: r if (r := self.run(run))["state"] in ("finished", "failed", "cancelled") else None)
        assert ended["state"] == state, (ended["state"], ended["error"])
        return ended

    def events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line.line) for line in self.call("Control/Watch", pb.WatchRequest(run=run))]


class Denial:
    """How a call ended."""

    def __init__(self, error: Any) -> None:
        self.code, self.message = error.code(), error.details() or ""
        self.metadata = dict(error.trailing_metadata() or ())
        details = self.metadata.get(HINT_KEY + "-bin", b"{}")
        self.details: dict[str, Any] = json.loads(details)

    def __repr__(self) -> str:
        return f"Denial({self.code.name}, {self.message!r})"


class Attendance:
    """One held stream of a site. Heartbeats are sent by themselves unless `silent`."""

    def __init__(self, hand: Hand, hello: pb.SiteMessage, heard: Callable[[pb.CoordinatorMessage], None]) -> None:
        self.silent = False
        self.messages: list[pb.CoordinatorMessage] = []
        self.error: Denial | None = None
        self._out: queue.Queue[pb.SiteMessage | None] = queue.Queue()
        self._heard = heard
        self.send(hello)
        self.call = hand.stream("Federation/Attend", self._requests())
        self._thread = threading.Thread(target=self._read, name=f"site {hand.name}", daemon=True)
        self._thread.start()

    def send(self, message: pb.SiteMessage | None) -> None:
        self._out.put(message)

    def _requests(self) -> Iterator[pb.SiteMessage]:
        while True:
            try:
                message = self._out.get(timeout=BEAT_S / 2)
            except queue.Empty:
                if self.silent:
                    continue
                message = pb.SiteMessage(heartbeat=pb.Heartbeat())
            if message is None:
                return
            yield message

    def _read(self) -> None:
        try:
            for message in self.call:
                self.messages.append(message)
                self._heard(message)
        except grpc.RpcError as error:
            self.error = Denial(error)
        self._out.put(None)

    def all(self, body: str) -> list[Any]:
        return [getattr(m, body) for m in list(self.messages) if m.WhichOneof("body") == body]

    def first(self, body: str) -> Any:
        """The first message of a kind, when it comes."""
        return wait_for(lambda: self.all(body))[0]

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def ended(self) -> None:
        wait_for(lambda: self.has_ended)

    def leave(self) -> None:
        self.call.cancel()
        self._thread.join(WAIT_S)


Answer = Callable[["Site", pb.Task], None]


class Site(Hand):
    """A site. It joins every run, answers every task at once, and trains by adding its number.

    Args:
        answers: by kind of task, in place of those.
    """

    def __init__(self, identity: IdentityFolder, answers: Mapping[str, Answer]) -> None:
        super().__init__(identity)
        self.tasks: list[pb.Task] = []
        self.trained: list[int] = []
        self.answers: dict[str, Answer] = {
            "join": lambda site, task: site.done(task, {"steps": 1, "groups": ["0"]}),
            "train": lambda site, task: site.train(task),
            "evaluate": lambda site, task: site.done(task, site.scores()),
            **answers,
        }
        self.stay: Attendance

    def attend(self, *, hello: pb.SiteMessage | None = None) -> Site:
        self.stay = self.attendance(hello)
        self.stay.first("welcome")
        return self

    def attendance(self, hello: pb.SiteMessage | None = None, *, deaf: bool = False) -> Attendance:
        first = hello or pb.SiteMessage(hello=pb.Hello(protocol_min=1, protocol_max=1, software="test"))
        return Attendance(self, first, (lambda _: None) if deaf else self._hear)

    def _hear(self, message: pb.CoordinatorMessage) -> None:
        if message.WhichOneof("body") == "task":
            self.tasks.append(message.task)
            self.answers[message.task.kind](self, message.task)

    def task(self, kind: str = "train", round: int | None = None, run: str | None = None) -> pb.Task:
        """The latest task of a kind that was offered, when it is."""

        def fits(task: pb.Task) -> bool:
            return task.kind == kind and round in (None, task.round) and run in (None, task.run)

        return wait_for(lambda: [task for task in list(self.tasks) if fits(task)])[-1]

    def reply(self, task: pb.Task | str, state: int, *, reason: str = "", result: bytes = b"") -> None:
        name = task if isinstance(task, str) else task.id
        self.stay.send(pb.SiteMessage(reply=pb.TaskReply(task=name, state=state, reason=reason, result=result)))

    def done(self, task: pb.Task, result: Any) -> None:
        self.reply(task, pb.TaskReply.DONE, result=result if isinstance(result, bytes) else json.dumps(result).encode())

    def scores(self) -> dict[str, Any]:
        return {self.name: {"nll": [1.0], "tokens": [1], "correct": [1]}}

    # --- updates

    def manifest(self, task: pb.Task, tensors: NamedTensors | None = None, /, **changes: Any) -> pb.SignedManifest:
        frame = frame_for(theta() if tensors is None else tensors, "delta")
        values: dict[str, Any] = {
            "run": task.run,
            "round": task.round,
            "task": task.id,
            "site": self.name,
            "base": task.base,
            "frame": frame.header,
            "num_examples": 10,
            "num_label_tokens": 100,
            "num_steps": 1,
            "metrics": {"loss": 1.0},
            "policy": "0" * 64,
        }
        manifest = pb.Manifest(**{**values, **changes}).SerializeToString(deterministic=True)
        return pb.SignedManifest(manifest=manifest, signature=self.identity.signing_key.sign(UPDATE, manifest))

    def open(self, signed: pb.SignedManifest) -> pb.UploadStatus:
        status: pb.UploadStatus = self.call("Federation/OpenUpload", signed)
        return status

    def push(self, upload: str, messages: Sequence[bytes]) -> pb.UploadStatus:
        status: pb.UploadStatus = self.call("Transfer/Push", iter(messages), commonweight_upload=upload)
        return status

    def update(self, task: pb.Task, tensors: NamedTensors | None = None, /, **changes: Any) -> pb.UploadStatus:
        """Offer an update and send what is missing of it."""
        given = theta() if tensors is None else tensors
        status = self.open(self.manifest(task, given, **changes))
        if status.state != pb.UploadStatus.OPEN:
            return status
        messages = chunks_of(given, frame_for(given, "delta"))
        return self.push(status.upload, [messages[index] for index in status.missing])

    def train(self, task: pb.Task) -> None:
        self.reply(task, pb.TaskReply.TAKEN)
        if self.update(task).state == pb.UploadStatus.ACCEPTED:
            self.trained.append(task.round)

    def close(self) -> None:
        if "stay" in vars(self):
            self.stay.leave()
        super().close()


assert UPLOAD_KEY == "commonweight-upload"


def _free_ports(*names: str) -> dict[str, int]:
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports
