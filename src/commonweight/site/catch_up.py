"""Global tensors that are made small on their way down, at a site: what it holds, and the differences that it lacks.

    held (or made out of the recipe's seed) ─► CatchUp ─► the differences, fetched ─► added, in a copy ─► the digest
                                                 └─ none, or something does not fit ─► the tensors themselves, fetched

What comes of adding is used only if it is to the bit what the task names: the digest of its frame is that of the task's
base. So neither a damaged file here nor whoever sends differences can make a site start from anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from ..codec.coded import CHOICES, CODED, LENGTHS, PAYLOADS, Payloads
from ..codec.down import THETA, Down, add_to, down_of
from ..codec.stage import BadPayload
from ..errors import SiteError, UnreachableError
from ..model.tensors import NamedTensors
from ..wire import protocol_pb2 as pb
from ..wire.frames import Channel, frame_of, header_digest, plan_for
from ..wire.manifest import DIGEST, check_coded_frame
from ..wire.refusals import Refused
from .gate import KnownJob
from .inbox import Inbox
from .link import Backoff, calling
from .log import Log
from .transfer import Transfer, Way, of_layout

#: the initial global tensors, as this site makes them by itself
Initial = Callable[[], Awaitable[NamedTensors]]


class CatchUp:
    """Brings a site's global tensors up to date."""

    def __init__(self, link: Way, transfer: Transfer, inbox: Inbox, log: Log) -> None:
        self._link, self._transfer, self._inbox, self._log = link, transfer, inbox, log

    async def fetch(
        self, known: KnownJob, digest: str, round: int, initial: Initial, wanted: Callable[[], Iterable[str]]
    ) -> dict[str, NamedTensors]:
        """The channels of the frame of this digest, in the fewest bytes.

        Args:
            wanted: as `Transfer.fetch` has it.

        Raises:
            SiteError, StorageError: as `Transfer.fetch`.
        """
        run = known.job.id
        down = down_of(known.recipe.compression.down, known.layout, known.recipe.seed)
        whole = partial(self._transfer.fetch, run, digest, round, fits=of_layout(known.layout), wanted=wanted)
        if down is None or self._inbox.held(run, digest) is not None:
            return await whole()
        held = await self._held(known, digest, initial, wanted)
        if held is None or held == digest:
            return await whole()
        try:
            frames = await self._differences(run, held, digest)
            if frames:
                return await self._caught_up(known, down, held, digest, round, frames, wanted)
        except (SiteError, Refused, BadPayload) as error:
            self._log("catch_up.left", run=run, frame=digest[:12], reason=error.message)
        return await whole()

    async def _held(
        self, known: KnownJob, digest: str, initial: Initial, wanted: Callable[[], Iterable[str]]
    ) -> str | None:
        """The digest of the latest global tensors that lie here; those of the beginning are made if there are none."""
        run, beginning = known.job.id, header_digest(known.job.initial)
        held = None if digest == beginning else await asyncio.to_thread(self._inbox.latest, run, known.layout)
        if held is not None:
            return held
        tensors = {THETA: await initial()}
        plan = plan_for(tensors[THETA].layout, (Channel(THETA),), known.chunk_bytes)
        frame = await asyncio.to_thread(frame_of, tensors, plan)
        if frame.digest != beginning:
            self._log("initial.differs", run=run, reason="this machine draws other initial tensors from the seed")
            return None
        await asyncio.to_thread(self._inbox.put, run, 0, frame, tensors, wanted={digest, *wanted()})
        return beginning

    async def _differences(self, run: str, held: str, digest: str) -> list[str]:
        """The frames of the differences that lead from one to the other."""
        backoff = Backoff()
        while True:
            session = await self._link.session()
            try:
                with calling():
                    reply = await session.transfer["CatchUp"](pb.CatchUpRequest(run=run, held=held, wanted=digest))
                break
            except UnreachableError:
                await asyncio.sleep(backoff.next_s())
        frames = list(reply.frames)
        return frames if all(map(DIGEST.fullmatch, frames)) else []

    async def _caught_up(
        self,
        known: KnownJob,
        down: Down,
        held: str,
        digest: str,
        round: int,
        frames: Sequence[str],
        wanted: Callable[[], Iterable[str]],
    ) -> dict[str, NamedTensors]:
        """The channels of a frame that differences lead to.

        Raises:
            SiteError: they are no fewer bytes than the tensors, or what comes of them is not what is wanted.
            Refused, BadPayload: one is none.
        """
        run, needed = known.job.id, {held, digest, *frames}
        fits = lambda frame: check_coded_frame(frame, down.coder, (THETA,))  # noqa: E731
        keep = lambda: {*needed, *wanted()}  # noqa: E731
        fetched: list[NamedTensors] = []
        for one in frames:
            fetched.append((await self._transfer.fetch(run, one, round, fits=fits, wanted=keep))[CODED])
            if sum(sent.layout.num_bytes for sent in fetched) >= known.layout.num_bytes:
                raise SiteError("the differences are no fewer bytes than the tensors")
        await self._transfer.fetch(run, held, round, fits=of_layout(known.layout), wanted=keep)
        add = partial(_add, down, fetched)
        found = await asyncio.to_thread(self._inbox.move_on, run, round, held, digest, add, wanted=set(wanted()))
        if found is None:
            raise SiteError("what comes of the differences is not what the task starts from")
        self._log("caught_up", run=run, frame=digest[:12], differences=len(frames))
        return found


def _add(down: Down, sent: Sequence[NamedTensors], channels: Mapping[str, NamedTensors]) -> None:
    for one in sent:
        add_to(channels[THETA], down.coder, _payloads(down, one))


def _payloads(down: Down, sent: NamedTensors) -> Payloads:
    body: torch.Tensor = sent[PAYLOADS]
    fetch = lambda start, stop: body[start:stop].numpy().tobytes()  # noqa: E731
    return Payloads(down.coder, (THETA,), sent[LENGTHS].tolist(), sent[CHOICES].tolist(), len(body), fetch)
