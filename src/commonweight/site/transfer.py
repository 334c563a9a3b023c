"""Tensors to and from the coordinator, chunk by chunk, through any number of cuts.

Only chunks that are missing travel again: on the way in the site knows them by their digests, on the way out the
coordinator says which. One header and one chunk are in memory at a time. An error that may pass is waited out; the
wait begins small again with every chunk that came through.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

from ..errors import SiteError, UnreachableError
from ..model.tensors import Layout, NamedTensors
from ..wire import protocol_pb2 as pb
from ..wire.frames import Frame, header_digest, parse_header
from ..wire.service import UPLOAD_KEY
from .inbox import Arrival, Inbox
from .link import END, Backoff, calling
from .log import Log

#: a transfer that does not move for so long is cut here and begun again where it stopped
STALL_S = 60.0
#: a chunk that came through broken this often ends the task
TRIES = 3
#: work on more bytes than this is done beside the event loop
_ASIDE_BYTES = 1 << 18
#: an update of fewer bytes is counted as a whole before it is even offered
_SMALL_BYTES = 1 << 20

_DAMAGE = "the network or a disk between here and the coordinator changes data"

#: (bytes, chunks) that are about to leave
Leaving = Callable[[int, int], Awaitable[None]]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def aside(num_bytes: int, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
    """Do some work on `num_bytes`: here if they are few, in a thread of the process's pool if they are many."""
    if num_bytes <= _ASIDE_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


class Calls(Protocol):
    """The methods by which tensors go to and from the other end."""

    @property
    def transfer(self) -> dict[str, Callable[..., Any]]: ...


class Way(Protocol):
    """A connection that comes back: to the coordinator (`Link`), or to a relay (`Door`)."""

    @property
    def backoff(self) -> Backoff: ...

    async def session(self) -> Calls: ...


class Sendable(Protocol):
    """What can be pushed: an update (`Parcel`), or a region's sum."""

    @property
    def manifest(self) -> bytes: ...

    @property
    def frame(self) -> Frame: ...

    def packed(self, index: int) -> bytes: ...


@dataclass
class _Course:
    """How one transfer is going: its waits, and how often each chunk came through broken."""

    link: Way
    log: Log
    what: dict[str, Any]
    backoff: Backoff = field(default_factory=Backoff)
    broken: Counter[int] = field(default_factory=Counter)
    waiting: bool = False

    def moved(self) -> None:
        self.backoff.reset()
        self.link.backoff.reset()  # a connection over which chunks come through is a good one, however short
        self.waiting = False

    async def wait(self, error: Exception) -> None:
        if not self.waiting:
            self.log("transfer.cut", **self.what, reason=str(error) or type(error).__name__)
        self.waiting = True
        await asyncio.sleep(self.backoff.next_s())

    def count_broken(self, chunk: int, hint: str) -> None:
        self.broken[chunk] += 1
        self.log("transfer.broken", **self.what, chunk=chunk, times=self.broken[chunk])
        if self.broken[chunk] >= TRIES:
            raise SiteError(f"chunk {chunk} came through broken {TRIES} times", hint=hint)


class Transfer:
    """Fetches frames into an inbox, and pushes updates."""

    def __init__(self, link: Way, inbox: Inbox, log: Log) -> None:
        self._link, self._inbox, self._log = link, inbox, log

    async def fetch(
        self,
        run: str,
        digest: str,
        round: int,
        *,
        fits: Callable[[Frame], None],
        wanted: Callable[[], Iterable[str]] = tuple,
    ) -> dict[str, NamedTensors]:
        """The channels of a frame, fetched unless they are here.

        Args:
            digest: the frame's, in hex.
            fits: raises what is to be raised if its header is not one that is expected here (`of_layout`).
            wanted: digests that other tasks in hand name; their frames are not written over, nor deleted.

        Raises:
            SiteError: it is another frame than asked for, or a chunk came broken three times; as `fits`.
            StorageError: no room for it.
        """
        held = self._inbox.held(run, digest)
        if held is not None:
            return held
        arrival = await asyncio.to_thread(self._inbox.resume, run, digest)
        course = _Course(self._link, self._log, {"run": run, "frame": digest[:12]})
        while arrival is None or arrival.first_missing() is not None:
            session = await self._link.session()
            try:
                arrival = await self._fetch_some(session, run, digest, arrival, fits, course, wanted)
            except (UnreachableError, TimeoutError) as error:
                arrival = arrival or await asyncio.to_thread(self._inbox.resume, run, digest)
                await course.wait(error)
        return self._inbox.finish(run, round, arrival, wanted=wanted())

    async def _fetch_some(
        self,
        session: Calls,
        run: str,
        digest: str,
        arrival: Arrival | None,
        fits: Callable[[Frame], None],
        course: _Course,
        wanted: Callable[[], Iterable[str]],
    ) -> Arrival:
        """One call: chunks from the first missing one on, up to one that is here or came broken."""
        first = 0 if arrival is None else arrival.first_missing() or 0
        call = session.transfer["Fetch"](pb.FetchRequest(run=run, frame=digest, first=first))
        try:
            header = await _next(call)
            if header_digest(header) != digest:
                raise SiteError(f"the coordinator sent another frame than {digest[:12]}, which was asked for")
            if arrival is None:
                frame = parse_header(header)
                fits(frame)
                arrival = self._inbox.begin(run, frame, wanted=wanted())
            for index in range(first, len(arrival.held)):
                if arrival.held[index]:
                    return arrival
                chunk = await _next(call)
                if not await aside(len(chunk), arrival.keep, index, chunk):
                    course.count_broken(index, _DAMAGE)
                    return arrival
                course.moved()
            return arrival
        finally:
            call.cancel()

    async def push(
        self,
        signed: pb.SignedManifest | pb.SignedPartial,
        parcel: Sendable,
        leaving: Leaving,
        *,
        settling: Callable[[bool], None] = lambda _: None,
        may_be_there: bool = False,
    ) -> pb.UploadStatus:
        """Send an update until it is accepted or refused, or a relay holds it; or a region's sum.

        Args:
            leaving: told before they are sent how many bytes and chunks are; what it raises ends the push.
            settling: told True when everything is sent and only the verdict is awaited, False when it is not so.
            may_be_there: the other end may have it already, by another way.

        Raises:
            SiteError: a chunk came through broken three times, or the coordinator asks for one that there is not.
            Refused: the coordinator will not hear of it.
        """
        course = _Course(self._link, self._log, {"frame": parcel.frame.digest[:12]})
        push = _Push(parcel, leaving, settling, course, fewest=parcel.frame.plan.num_chunks)
        await push.count_manifest(alone=may_be_there)
        method = "OpenPartial" if isinstance(signed, pb.SignedPartial) else "OpenUpload"
        while True:
            session = await self._link.session()
            try:
                with calling():
                    status: pb.UploadStatus = await session.transfer[method](signed)
                if status.state == pb.UploadStatus.OPEN:
                    status = await push.send(session, status)
            except (UnreachableError, TimeoutError) as error:
                settling(False)
                await course.wait(error)
                continue
            if status.state in (pb.UploadStatus.ACCEPTED, pb.UploadStatus.REFUSED, pb.UploadStatus.HELD):
                return status
            if status.state != pb.UploadStatus.OPEN:
                await course.wait(UnreachableError(status.reason or "the coordinator does not know the upload"))


@dataclass
class _Push:
    """One update on its way out.

    Args:
        fewest: how many chunks the coordinator missed when it missed fewest.
        counted: chunks whose bytes `leaving` was told of, and that have not been sent since.
    """

    parcel: Sendable
    leaving: Leaving
    settling: Callable[[bool], None]
    course: _Course
    fewest: int
    counted: set[int] = field(default_factory=set)

    async def count_manifest(self, *, alone: bool) -> None:
        """Tell of the manifest; a small update is told of with it, for that is a disk's wait less."""
        plan = self.parcel.frame.plan
        small = plan.num_bytes <= _SMALL_BYTES and not alone
        self.counted = set(range(plan.num_chunks)) if small else set()
        await self.leaving(len(self.parcel.manifest) + small * plan.num_bytes, len(self.counted))

    async def send(self, session: Calls, status: pb.UploadStatus) -> pb.UploadStatus:
        """One call: the chunks that are missing, in the order in which they were asked for."""
        if len(status.missing) < self.fewest:  # what was sent has arrived, and was kept
            self.course.moved()
            self.fewest = len(status.missing)
        await self._count(status.missing)
        self.settling(False)
        sent: list[int] = []
        call = session.transfer["Push"](metadata=((UPLOAD_KEY, status.upload),))
        try:
            for index in status.missing:
                if not await self._send_chunk(call, index):
                    break
                sent.append(index)
            self.settling(len(sent) == len(status.missing))
            with calling():
                if not call.done():
                    await call.done_writing()
                after: pb.UploadStatus = await call
        finally:
            call.cancel()
        self._note_broken(sent, set(after.missing))
        return after

    async def _send_chunk(self, call: Any, index: int) -> bool:
        """False: the coordinator has answered early, and takes no more in this call."""
        piece = self.parcel.frame.plan.pieces[index]
        message = await aside(piece.num_bytes, self.parcel.packed, index)
        if call.done():
            return False
        self.counted.discard(index)
        try:
            async with asyncio.timeout(STALL_S):
                with calling():
                    await call.write(message)
        except UnreachableError:
            if call.done():  # what it answered, the call itself will tell
                return False
            raise
        return True

    def _note_broken(self, sent: list[int], missing: set[int]) -> None:
        """Chunks are taken in order: the first of those sent that is missing still came through broken."""
        broken = next((index for index in sent if index in missing), None)
        if broken is not None:
            self.course.count_broken(broken, _DAMAGE)

    async def _count(self, missing: Iterable[int]) -> None:
        """Tell of what is about to leave: a chunk that is sent again counts again."""
        pieces = self.parcel.frame.plan.pieces
        fresh = set(missing) - self.counted
        if fresh and max(fresh) >= len(pieces):
            raise SiteError(f"the coordinator asks for chunk {max(fresh)} of {len(pieces)}")
        if fresh:
            await self.leaving(sum(pieces[index].num_bytes for index in fresh), len(fresh))
        self.counted |= fresh


def of_layout(layout: Layout) -> Callable[[Frame], None]:
    """Demands of a frame the tensors of the signed job: raises SiteError if it has others."""

    def fits(frame: Frame) -> None:
        if frame.plan.layout != layout:
            raise SiteError("the global tensors' names, shapes or dtypes are not those of the signed job")

    return fits


async def _next(call: Any) -> bytes:
    """The next raw message of a stream; its end is an error, for more was promised."""
    async with asyncio.timeout(STALL_S):
        with calling():
            message = await call.read()
            if message is END:
                await call.code()
                raise UnreachableError("the coordinator ended the transfer before it was complete", retry=True)
    return message  # type: ignore[no-any-return]
