"""A connection of a user (lead, admin, auditor) to a coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ..errors import StateError, UpdateRefused
from ..federation.folder import replacing
from ..identity import tls  # before grpc
from ..identity.certificates import needs_renewal
from ..identity.enrol import told
from ..identity.folder import IdentityFolder
from ..model.tensors import NamedTensors, Room, in_memory
from ..wire.frames import Frame, chunk_digest, parse_header, piece_of
from ..wire.protocol_pb2 import (
    AuditRequest,
    FetchRequest,
    FileRequest,
    LedgerRequest,
    ListRunsRequest,
    ListSitesRequest,
    RenewRequest,
    RunRequest,
    SignedJob,
    SubmitReply,
    UploadStatus,
    WatchRequest,
)
from ..wire.service import CONTROL, TRANSFER, UPLOAD_KEY, channel_options, stub

import grpc  # isort: skip

R = TypeVar("R")

#: a coordinator that has not been reached for so long is away
_REACH_S = 8.0
#: calls that answer at once
_TIMEOUT_S = 60.0
#: a transfer is tried anew so often when its connection breaks
_ATTEMPTS = 10


class Client:
    """A user's connection. Use it as a context.

    Args:
        folder: the user's identity folder.

    Raises:
        AccessError: the folder is no identity, or the coordinator does not accept it.
        UnreachableError: the coordinator cannot be reached.
    """

    def __init__(self, folder: Path) -> None:
        self.identity = IdentityFolder.open(folder)
        self._channel = self._open()

    def _open(self) -> Any:
        options = [*channel_options(), *tls.TARGET_OPTIONS]
        channel = grpc.secure_channel(self.identity.address, tls.channel_credentials(self.identity), options=options)
        self._control, self._transfer = stub(channel, CONTROL), stub(channel, TRANSFER)
        return channel

    def __enter__(self) -> Self:
        try:
            self._reach()
            if needs_renewal(self.identity.holder):
                self._renew()
        except BaseException:
            self._channel.close()
            raise
        return self

    def _reach(self) -> None:
        """Wait until the coordinator is there, but not for long; if it is not, say what stood in the way."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=_REACH_S)
        except grpc.FutureTimeoutError:
            self._explained(lambda: self._control["ListRuns"](ListRunsRequest(), timeout=1.0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def _renew(self) -> None:
        reply = self._call("Renew", RenewRequest(csr=self.identity.request()))
        self.identity = self.identity.write_certificate(reply.certificate)
        self._channel.close()
        self._channel = self._open()

    def _call(self, method: str, request: Any) -> Any:
        return self._explained(lambda: self._control[method](request, timeout=_TIMEOUT_S, wait_for_ready=True))

    def _explained(self, call: Callable[[], R]) -> R:
        try:
            return call()
        except grpc.RpcError as error:
            raise told(error, self.identity.address) from error

    def _json(self, method: str, request: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._call(method, request).json)
        return found

    # --- looking

    def runs(self) -> list[dict[str, Any]]:
        """Every run, newest first."""
        return list(self._json("ListRuns", ListRunsRequest())["runs"])

    def run(self, which: str) -> dict[str, Any]:
        """One run in full, by id, the beginning of it, or name."""
        return self._json("GetRun", RunRequest(run=which))

    def sites(self) -> list[dict[str, Any]]:
        return list(self._json("ListSites", ListSitesRequest())["sites"])

    def cancel(self, which: str) -> dict[str, Any]:
        return self._json("Cancel", RunRequest(run=which))

    def events(self, which: str, *, after: int = 0, follow: bool = False) -> Iterator[dict[str, Any]]:
        """A run's events in order; with `follow`, until it has ended. A broken connection is taken up again."""
        attempt = 0
        while True:
            call = self._control["Watch"](WatchRequest(run=which, after=after, follow=follow), wait_for_ready=True)
            try:
                for line in call:
                    after, attempt = line.sequence, 0
                    yield json.loads(line.line)
                return
            except grpc.RpcError as error:
                attempt += 1
                if not _passing(error) or attempt > _ATTEMPTS:
                    raise told(error, self.identity.address) from error
            finally:
                call.cancel()

    def audit(self, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """The coordinator's audit log, oldest first."""
        try:
            for line in self._control["ReadAudit"](AuditRequest(after=after), wait_for_ready=True):
                yield json.loads(line.line)
        except grpc.RpcError as error:
            raise told(error, self.identity.address) from error

    def ledger(self) -> dict[str, Any]:
        """What runs have spent of each site's privacy: `lines` (`federation.ledger.Line` as JSON) and `budget`."""
        return self._json("ReadLedger", LedgerRequest())

    # --- submitting

    def submit(self, signed: SignedJob, initial: Mapping[str, NamedTensors], frame: Frame) -> str:
        """Submit a job and send its initial tensors; returns the run's id. Safe to repeat.

        Raises:
            RecipeError, StateError, UpdateRefused: the coordinator does not take it.
        """
        for attempt in range(_ATTEMPTS):
            reply: SubmitReply = self._call("Submit", signed)
            status = reply.upload
            try:
                if status.state == UploadStatus.OPEN:
                    status = self._push(status, initial, frame)
            except grpc.RpcError as error:
                if not _passing(error) or attempt == _ATTEMPTS - 1:
                    raise told(error, self.identity.address) from error
                continue
            if status.state == UploadStatus.ACCEPTED:
                return reply.run
            if status.state == UploadStatus.REFUSED:
                raise UpdateRefused(f"the initial tensors were refused: {status.reason}")
        raise StateError("the initial tensors did not arrive", hint="submit again", retry=True)

    def _push(self, status: UploadStatus, initial: Mapping[str, NamedTensors], frame: Frame) -> UploadStatus:
        pieces = frame.plan.pieces

        def messages() -> Iterator[bytes]:
            for index in status.missing:
                yield index.to_bytes(4, "big") + piece_of(initial, pieces[index])

        metadata = ((UPLOAD_KEY, status.upload),)
        result: UploadStatus = self._transfer["Push"](messages(), metadata=metadata, wait_for_ready=True)
        return result

    # --- fetching

    def file(self, which: str, name: str, into: Path) -> None:
        """One of a run's files."""
        with replacing(into) as temporary, temporary.open("wb") as file:
            try:
                for piece in self._control["GetFile"](FileRequest(run=which, name=name), wait_for_ready=True):
                    file.write(piece.content)
            except grpc.RpcError as error:
                raise told(error, self.identity.address) from error

    def frame(self, run: str, digest: str, room: Room = in_memory) -> dict[str, NamedTensors]:
        """Tensors of a run by their frame's digest, every chunk verified; goes on where a connection broke.

        Args:
            room: where they are put.

        Raises:
            StateError: what came is not what the digest names.
        """
        tensors: dict[str, NamedTensors] = {}
        frame: Frame | None = None
        done = 0
        for attempt in range(_ATTEMPTS):
            try:
                call = self._transfer["Fetch"](FetchRequest(run=run, frame=digest, first=done), wait_for_ready=True)
                frame = parse_header(next(call))
                if frame.digest != digest:
                    raise StateError("the coordinator sent other tensors than were asked for")
                tensors = tensors or {c.name: room(c.name, frame.plan.layout, wide=c.wide) for c in frame.plan.channels}
                for chunk in call:
                    if chunk_digest(chunk) != frame.digests[done]:
                        raise StateError(f"chunk {done} arrived damaged", hint="try again", retry=True)
                    piece_of(tensors, frame.plan.pieces[done])[:] = chunk
                    done += 1
                if done == frame.plan.num_chunks:
                    return tensors
            except grpc.RpcError as error:
                if not _passing(error) or attempt == _ATTEMPTS - 1:
                    raise told(error, self.identity.address) from error
        raise StateError("the tensors did not arrive as a whole", hint="try again", retry=True)


def _passing(error: Any) -> bool:
    """Whether a call may succeed when it is made again."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
