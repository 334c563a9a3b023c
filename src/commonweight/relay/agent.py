"""A relay at work: attends at the coordinator, takes in its region's updates, adds them up, and sends the sum.

    Task(relay) ─► open for its sites ─► all that the round still waits for are here, or time is nearly up ─► closed
       ─► added up in the cohort's order ─► OpenPartial, Push ─► accepted or refused ─► forgotten

A task whose work was cut, by a kill or a lost connection, is offered again and begun again: what is here stays, and the
same updates give the same sum, of which the coordinator may have a part already.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import AccessError, CommonweightError, UnreachableError
from ..identity.certificates import needs_renewal
from ..identity.folder import IdentityFolder
from ..identity.keys import PARTIAL
from ..site.inbox import Inbox
from ..site.link import Backoff, Link, OpenChannel, Session, calling, dial
from ..site.log import Log
from ..site.transfer import Transfer
from ..wire import protocol_pb2 as pb
from ..wire.messages import parse_json
from ..wire.service import PROTOCOL_MAX, PROTOCOL_MIN
from .depot import Depot
from .service import serve
from .settings import RelaySettings

#: while sites are waited for, the coordinator is asked this often for whom to wait
LOOK_S = 1.0
#: of the time to a round's deadline, this share is kept for adding up and sending
_SPARE = 0.2
_MAX_TEXT = 2000
_RENEW_AGAIN_S = 60.0
_GRACE_S = 1.0


class RelayAgent:
    """One relay.

    Args:
        folder: the relay's.
        open_channel: makes connections to the coordinator; None: TLS to the address in the settings.
    """

    def __init__(
        self,
        settings: RelaySettings,
        identity: IdentityFolder,
        folder: Path,
        log: Log,
        *,
        open_channel: OpenChannel | None = None,
    ) -> None:
        self.settings, self.identity, self.log = settings, identity, log
        self.depot = Depot(folder, settings, identity.authority)
        self.link = Link(open_channel or (lambda: dial(self.identity, settings.address)), self, log)
        self.transfer = Transfer(self.link, Inbox(folder / "scratch"), log)
        self.reached_at = settings.reached_at
        self._work: dict[str, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._renew_after = 0.0
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, *, signals: bool = False, ready: Callable[[int], None] = lambda port: None) -> None:
        """Attend and serve until `stop`.

        Args:
            signals: stop on SIGTERM and SIGINT.
            ready: told the port at which it serves.

        Raises:
            AccessError: the coordinator will not have this relay.
            UnreachableError: its port cannot be opened.
        """
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.add_signal_handler(number, self.stop)
        server = None
        attending = stopping = None
        try:
            server, port = await serve(self.depot, self.identity, self._news.set)
            host, _, wanted = self.settings.reached_at.rpartition(":")
            self.reached_at = f"{host}:{port if int(wanted) == 0 else wanted}"
            self.log("serving", relay=self.settings.name, reached_at=self.reached_at)
            ready(port)
            attending, stopping = asyncio.create_task(self.link.run()), asyncio.create_task(self._stop.wait())
            await asyncio.wait([attending, stopping], return_when=asyncio.FIRST_COMPLETED)
            if attending.done():
                attending.result()
        finally:
            for task in (attending, stopping, *self._work.values(), *self._chores):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, CommonweightError):
                        await task
            if server is not None:
                await server.stop(_GRACE_S)
            await asyncio.to_thread(self.depot.close)
            self.log("stopped", relay=self.settings.name)

    def stop(self) -> None:
        """Leave. May be called from any thread."""
        if self._loop is None:
            self._stop.set()
        else:
            self._loop.call_soon_threadsafe(self._stop.set)

    # ---- what the link asks and tells (`link.Attendant`)

    def hello(self) -> pb.Hello:
        return pb.Hello(
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            software=f"commonweight {__version__}",
            tasks=list(self._work),
        )

    def welcomed(self, session: Session) -> None:
        """What is open and not in hand is offered by itself."""

    def heard(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "task" if message.task.id not in self._work:
                work = asyncio.create_task(self._carry_out(message.task))
                self._work[message.task.id] = work
                work.add_done_callback(partial(self._done, message.task.id))
            case "withdraw":
                self._news.set()  # whoever waits asks, and hears that it is over
            case "ended":
                self._do(self._end(message.ended.run))

    def _done(self, task: str, work: asyncio.Task[None]) -> None:
        self._work.pop(task, None)

    def beat(self) -> pb.Heartbeat:
        if time.monotonic() > self._renew_after and needs_renewal(self.identity.holder):
            self._renew_after = time.monotonic() + _RENEW_AGAIN_S
            self._do(self._renew())
        return pb.Heartbeat()

    def delivered(self, task: str) -> None:
        """A reply that was lost is made anew when its task is offered again."""

    # ---- work

    async def _carry_out(self, task: pb.Task) -> None:
        """One task. Whatever goes wrong becomes its answer: its sites then send to the coordinator."""
        fields = {"task": task.id, "run": task.run, "round": task.round, "kind": task.kind}
        self.log("task.offered", **fields)
        try:
            await self._job(task.run)
            if task.kind == "join":
                self._reply(task, pb.TaskReply.DONE, result=json.dumps({"address": self.reached_at}).encode())
            elif task.kind == "relay":
                await self._round(task)
            else:
                raise AccessError(f"a relay takes no task of kind {task.kind!r}")
        except Exception as error:
            reason = error.message if isinstance(error, CommonweightError) else f"{type(error).__name__}: {error}"
            self.log("task.trouble", **fields, reason=reason, hint=getattr(error, "hint", ""))
            self._reply(task, pb.TaskReply.FAILED, reason=reason)

    def _reply(self, task: pb.Task, state: Any, *, reason: str = "", result: bytes = b"") -> None:
        plain = "".join(c if c.isprintable() else " " for c in reason[:_MAX_TEXT])
        self.link.send(pb.SiteMessage(reply=pb.TaskReply(task=task.id, state=state, reason=plain, result=result)))

    async def _job(self, run: str) -> None:
        """The run's job, asked for once."""
        backoff = Backoff()
        while not await self.depot.away(self.depot.knows, run):
            session = await self.link.session()
            try:
                with calling():
                    signed = await session.federation["GetJob"](pb.JobRequest(run=run))
            except UnreachableError:
                await asyncio.sleep(backoff.next_s())
                continue
            await self.depot.away(self.depot.admit, run, signed)

    async def _round(self, task: pb.Task) -> None:
        """A round, from its opening to the verdict on its sum."""
        fields = {"task": task.id, "run": task.run, "round": task.round}
        tasks: dict[str, Any] = parse_json(task.body)["tasks"]
        closes_at = time.monotonic() + (1 - _SPARE) * task.seconds_left if task.seconds_left else None
        await self.depot.away(self.depot.open, task, tasks)
        self._reply(task, pb.TaskReply.TAKEN)
        awaited = await self._gathered(task, set(tasks), closes_at)
        if awaited is None:
            self.log("round.over", **fields)
            await self.depot.away(self.depot.forget, task)
            return
        uploads = await self.depot.away(self.depot.close_round, task, tasks)
        uploads = [upload for upload in uploads if upload.site in awaited]  # not what has come another way meanwhile
        if not uploads:
            raise UnreachableError("none of its sites has sent it an update")
        parcel = await self.depot.crunch(self.depot.sum, task, uploads)
        self.log("round.added_up", **fields, sites=[upload.site for upload in uploads])
        signature = self.identity.signing_key.sign(PARTIAL, parcel.manifest)
        signed = pb.SignedPartial(partial=parcel.manifest, signature=signature)
        status = await self.transfer.push(signed, parcel, _nothing_to_tell)
        what = "accepted" if status.state == pb.UploadStatus.ACCEPTED else "refused"
        self.log(f"sum.{what}", **fields, code=status.code, reason=status.reason)
        await self.depot.away(self.depot.forget, task)

    async def _gathered(self, task: pb.Task, awaited: set[str], closes_at: float | None) -> set[str] | None:
        """Wait until every site that the round still waits for has delivered, or it is time. Returns the sites that it
        waits for; None: nobody wants the sum any more."""
        while True:
            self._news.clear()
            here = await self.depot.away(self.depot.delivered, task.run, task.round)
            is_time = closes_at is not None and time.monotonic() >= closes_at
            if not (awaited <= here or is_time):
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
            try:
                session = await self.link.session()
                with calling():
                    region = await session.federation["Region"](pb.RegionRequest(task=task.id))
            except UnreachableError:
                await asyncio.sleep(self.link.backoff.first_s)
                continue
            if region.over:
                return None
            awaited = set(region.waiting)
            if awaited <= here or is_time:
                return awaited

    async def _end(self, run: str) -> None:
        await self.depot.away(self.depot.end, run)
        self.log("run.ended", run=run)

    async def _renew(self) -> None:
        """Get the next certificate, and go on with it; the open port takes it up by itself."""
        session = await self.link.session()
        request = await asyncio.to_thread(self.identity.request)
        with calling():
            reply = await session.federation["Renew"](pb.RenewRequest(csr=request))
        self.identity = await asyncio.to_thread(self.identity.write_certificate, reply.certificate)
        self.log("renewed", until=self.identity.holder.not_after)
        self.link.reconnect()

    def _do(self, chore: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._quietly(chore))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _quietly(self, chore: Any) -> None:
        try:
            await chore
        except (CommonweightError, OSError) as error:
            self.log("trouble", reason=str(error), hint=getattr(error, "hint", ""))


async def _nothing_to_tell(num_bytes: int, chunks: int) -> None:
    """A relay's sums are counted nowhere: its own log has each."""
