"""An update on its way before it is whole: its chunks leave while the rest of them is being made.

    the workshop's thread   makes a stretch of the update, says so (`Desk.written`), makes the next one
    this, beside it         reads the chunks that are finished, hashes, counts and sends them, one at a time

Nothing depends on it: what did not get through, for whatever reason, is sent when the manifest has been signed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import torch

from ..model.tensors import NamedTensors
from ..wire import protocol_pb2 as pb
from ..wire.frames import Channel, Piece, Plan, chunk_digest, pack_chunk, piece_of
from ..wire.service import UPLOAD_KEY
from .link import calling
from .log import Log
from .outbox import Desk
from .transfer import STALL_S, Way, aside

#: so many bytes are counted at once before they leave: each time a disk is waited for
COUNTED_BYTES = 16 << 20

#: (bytes, chunks, their SHA-256 in hex) that are about to leave
Leaving = Callable[[int, int, str], Awaitable[None]]


class Ahead:
    """Sends what is finished on a desk.

    Args:
        task: whose update it is.
        chunk_bytes: of the frame that tensors of a name will have.
        leaving: told before they are sent how many bytes and chunks are; what it raises ends it.
    """

    def __init__(
        self, link: Way, log: Log, task: pb.Task, desk: Desk, chunk_bytes: Callable[[str], int], leaving: Leaving
    ) -> None:
        self._link, self._log, self._task, self._desk = link, log, task, desk
        self._chunk_bytes, self._leaving = chunk_bytes, leaving
        #: of the chunks that were sent, by index
        self.digests: dict[int, bytes] = {}
        self._news = asyncio.Event()
        self._is_open = self._is_over = False
        self._loop = asyncio.get_running_loop()
        desk.tell = self._told
        self._sending = asyncio.create_task(self._send())

    def _told(self) -> None:
        """Called by the thread that makes the update."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def stop(self, *, now: bool) -> None:
        """The update is whole, or given up: send no more than has been counted.

        Args:
            now: not even that.
        """
        self._desk.tell = lambda: None
        self._is_over = True
        self._news.set()
        if now or not self._is_open:  # a connection that is not there may not come back
            self._sending.cancel()
        await asyncio.wait([self._sending])

    async def _send(self) -> None:
        try:
            await self._news.wait()
            if not self._is_over:
                await self._pushed()
        except Exception as error:  # whatever it is, the update is sent all the same
            fields = {"task": self._task.id, "run": self._task.run, "round": self._task.round}
            self._log("ahead.left", **fields, chunks=len(self.digests), reason=str(error) or type(error).__name__)

    async def _pushed(self) -> None:
        session, task = await self._link.session(), self._task
        assert self._desk.finished is not None
        name, tensors = self._desk.finished
        plan = Plan(tensors.layout, (Channel(name),), self._chunk_bytes(name))
        ahead = pb.Ahead(run=task.run, round=task.round, task=task.id, chunk_bytes=plan.chunk_bytes)
        with calling():
            status = await session.transfer["OpenAhead"](ahead)
        if status.state != pb.UploadStatus.OPEN:
            return
        self._is_open = True
        call = session.transfer["Push"](metadata=((UPLOAD_KEY, status.upload),))
        try:
            sent: dict[torch.dtype, int] = {}
            while not self._is_over:
                self._news.clear()
                pieces = self._finished(plan, sent)
                if not pieces:
                    await self._news.wait()
                elif not await self._batch(call, {name: tensors}, pieces):
                    return
            with calling():
                if not call.done():
                    await call.done_writing()
                await call
        finally:
            call.cancel()

    def _finished(self, plan: Plan, sent: dict[torch.dtype, int]) -> list[Piece]:
        """Chunks that were not sent and will not change any more, as many as are counted at once; [] if there are not
        so many."""
        (channel,), count = plan.channels, -(-COUNTED_BYTES // plan.chunk_bytes)
        for dtype, stop in list(self._desk.stops.items()):
            found = plan.pieces.over(channel.name, dtype, sent.get(dtype, 0), stop)[:count]
            if len(found) == count and found[-1].start + found[-1].numel <= stop:
                sent[dtype] = found[-1].start + found[-1].numel
                return found
        return []

    async def _batch(self, call: Any, tensors: Mapping[str, NamedTensors], pieces: Sequence[Piece]) -> bool:
        """Send some chunks; False: the coordinator takes no more."""
        size = sum(piece.num_bytes for piece in pieces)
        digests = await aside(size, lambda: [chunk_digest(piece_of(tensors, piece)) for piece in pieces])
        await self._leaving(size, len(pieces), hashlib.sha256(b"".join(digests)).hexdigest())
        for piece, digest in zip(pieces, digests, strict=True):
            message = await aside(piece.num_bytes, pack_chunk, piece.index, piece_of(tensors, piece))
            if call.done():
                return False
            async with asyncio.timeout(STALL_S):
                with calling():
                    await call.write(message)
            self.digests[piece.index] = digest
        return True
