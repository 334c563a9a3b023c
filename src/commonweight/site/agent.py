"""A site's agent: attends at the coordinator, works on what the site's policy allows, and answers.

    offered ─► job verified ─► policy ─► taken ─► base fetched ─► workshop ─► answer or update, counted ─► sent
                                 └─ a person must approve: waits, asked again at each heartbeat

One task at a time, training before evaluation, while the attendance goes on beside it. Every ending is written down
before it is told, so that an agent that is killed at any instant goes on where it was: a finished update waits in the
outbox, a fetched chunk in the inbox, an answer in the records. Many agents can live in one process and event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .. import __version__
from ..codec.coded import CODED
from ..errors import AccessError, CommonweightError, PolicyError, SiteError, UnreachableError
from ..federation.messages import SUM_STEPS, SumTask, TrainTask
from ..identity.certificates import needs_renewal
from ..identity.folder import IdentityFolder
from ..identity.keys import UPDATE
from ..model.tensors import NamedTensors
from ..train.local import Cancelled
from ..wire import protocol_pb2 as pb
from ..wire.frames import Channel, frame_of, plan_for
from ..wire.messages import JSON_BYTES, parse_json
from ..wire.refusals import Refused
from ..wire.service import PROTOCOL_MAX, PROTOCOL_MIN
from .ahead import Ahead
from .audit import SiteAudit
from .catch_up import CatchUp
from .door import Door, RelayGone
from .gate import ANSWERS, STATES, Alarm, Gate, KnownJob, task_of
from .inbox import Inbox
from .link import Backoff, Link, OpenChannel, Session, calling, dial
from .log import Log, SiteLog
from .outbox import Desk, Outbox, Parcel
from .policy import PolicyFile
from .records import SiteRecords
from .settings import SiteSettings
from .sums import SiteSums
from .transfer import Leaving, Transfer
from .workshop import Work, Workshop, reason_for_others

#: work that took longer is kept on disk before it is sent; cheaper work is done again
KEEP_AFTER_S = 1.0
#: of a coded update's chunks, unless the run's are smaller
CODED_CHUNK_BYTES = 256 << 10
#: text that goes to the coordinator is cut here
_MAX_TEXT = 2000
#: an attempt to renew the certificate that failed is repeated after so long
_RENEW_AGAIN_S = 60.0

T = TypeVar("T")


@dataclass
class _Item:
    """A task in hand.

    Args:
        number: order of arrival.
        cancelled: nobody wants it any more, or the agent stops.
        withdrawn: the coordinator wants it no more.
        settling: nothing is left to do but to hear or tell how it ended.
        held: a relay has its update.
        news: of its update, which a relay has or is given: it counts, or goes to the coordinator.
        parked: waits for a person, until the next heartbeat.
        note: how it is going, for the coordinator.
    """

    task: pb.Task
    number: int
    cancelled: bool = False
    withdrawn: bool = False
    settling: bool = False
    held: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    parked: bool = False
    asked: bool = False
    note: str = ""

    @property
    def rank(self) -> tuple[bool, int]:
        return self.task.kind not in ("join", "train", *SUM_STEPS), self.number

    def tell(self, note: str) -> None:
        self.note = note

    def settle(self, settling: bool) -> None:
        self.settling = settling


@dataclass
class _Answer:
    """How a task ended, until the coordinator has it. `what`: what of the site's leaves by it, if anything does."""

    task: pb.Task
    reply: pb.TaskReply
    what: str = ""


@dataclass
class _Hand:
    """What an agent has in hand: tasks, answers that may not have arrived, and the one task at work."""

    items: dict[str, _Item] = field(default_factory=dict)
    answers: dict[str, _Answer] = field(default_factory=dict)
    running: tuple[_Item, asyncio.Task[bool]] | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def next(self) -> _Item | None:
        ready = [item for item in self.items.values() if not item.parked]
        return min(ready, key=lambda item: item.rank, default=None)

    def of_run(self, run: str) -> list[_Item]:
        return [item for item in self.items.values() if item.task.run == run]


class Agent:
    """One site's agent.

    Args:
        settings: the site's.
        identity: its keys and certificate; the certificate is renewed here when its time has come.
        workshop: does the work.
        policy_file: read again whenever it changes. Its folder is the site's folder.
        records, audit: the site's own.
        executor: where work is done; agents of one process may share one. None: a thread of this agent's own.
        log: called with an event's name and its fields; None: `SiteLog` in the site's folder.
        open_channel: makes connections; None: TLS to the address in the settings.
        keep_after_s: training that took longer is kept on disk until it is accepted.
    """

    def __init__(
        self,
        settings: SiteSettings,
        identity: IdentityFolder,
        workshop: Workshop,
        policy_file: PolicyFile,
        records: SiteRecords,
        audit: SiteAudit,
        *,
        executor: Executor | None = None,
        log: Log | None = None,
        open_channel: OpenChannel | None = None,
        keep_after_s: float = KEEP_AFTER_S,
    ) -> None:
        folder = policy_file.path.parent
        self.settings, self.identity, self.workshop = settings, identity, workshop
        self._own_log = log is None
        self.log: Log = log if log is not None else SiteLog(folder / "log.jsonl")
        self.gate = Gate(folder, lambda: self.identity, policy_file, records, audit, self.log, to=settings.address)
        self.sums = SiteSums(folder, lambda: self.identity, self.gate.policy, records)
        self.keep_after_s = keep_after_s
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix=f"work-{settings.name}")
        runs = folder / "runs"
        self.inbox, self.outbox = Inbox(runs), Outbox(runs)
        self.link = Link(open_channel or self._dial, self, self.log)
        self.transfer = Transfer(self.link, self.inbox, self.log)
        self.catch_up = CatchUp(self.link, self.transfer, self.inbox, self.log)
        self._hand = _Hand()
        self._numbers = itertools.count()
        self._heads: asyncio.Queue[tuple[pb.AuditHead, bytes]] = asyncio.Queue()
        self._chores: set[asyncio.Task[None]] = set()
        self._renew_after = 0.0
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- from start to stop

    async def run(self, *, signals: bool = False) -> None:
        """Attend and work until `stop`.

        Args:
            signals: stop on SIGTERM and SIGINT.

        Raises:
            AccessError: the coordinator will not have this site, or did what an honest one does not (`Alarm`).
        """
        self._loop = loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT) if signals else ()
        for number in numbers:
            loop.add_signal_handler(number, self.stop)
        parts = [asyncio.create_task(part) for part in (self.link.run(), self._work(), self._keep_heads())]
        stopping = asyncio.create_task(self._stop.wait())
        self.log("started", site=self.settings.name, address=self.settings.address)
        try:
            await asyncio.wait([*parts, stopping], return_when=asyncio.FIRST_COMPLETED)
            for part in parts:
                if part.done():
                    part.result()
        except AccessError as error:
            self.log("ended", reason=error.message, hint=error.hint)
            raise
        finally:
            await _cancelled(stopping, *self._chores, *parts)
            for number in numbers:
                loop.remove_signal_handler(number)
            if self._own_executor:
                self._executor.shutdown(wait=False)
            self.log("stopped", site=self.settings.name)
            if self._own_log and isinstance(self.log, SiteLog):
                self.log.close()

    def stop(self) -> None:
        """Leave: work in hand is interrupted where it can be taken up again. May be called from any thread."""
        if self._loop is None:
            self._stop.set()
        else:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _dial(self) -> Any:
        return dial(self.identity, self.settings.address)

    def _dial_relay(self, address: str, relay: str) -> Any:
        return dial(self.identity, address, relay=relay)

    # ---- what the link asks and tells (`link.Attendant`)

    def hello(self) -> pb.Hello:
        in_hand = {**self._hand.items, **self._hand.answers}
        return pb.Hello(
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            software=f"commonweight {__version__}",
            tasks=in_hand,
            audit_head=self.gate.last_head(),
        )

    def welcomed(self, session: Session) -> None:
        self._note_head(session.welcome.audit_head)
        for answer in list(self._hand.answers.values()):
            self._do(self._deliver(answer))
        for item in self._hand.items.values():
            if item.held:
                self._tell_held(item)

    def _tell_held(self, item: _Item) -> None:
        self.link.send(pb.SiteMessage(reply=pb.TaskReply(task=item.task.id, state=pb.TaskReply.HELD)))

    def heard(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "task":
                self._offered(message.task)
            case "withdraw":
                self._withdraw(message.withdraw.task, message.withdraw.reason)
            case "ended":
                self._run_ended(message.ended.run, message.ended.state)
            case "audit_head":
                self._note_head(message.audit_head)

    def beat(self) -> pb.Heartbeat:
        for item in self._hand.items.values():
            item.parked = False
        self._hand.wake.set()
        if time.monotonic() > self._renew_after and needs_renewal(self.identity.holder):
            self._renew_after = time.monotonic() + _RENEW_AGAIN_S
            self._do(self._renew())
        running = self._hand.running
        if running is None or not running[0].note:
            return pb.Heartbeat()
        return pb.Heartbeat(progress=[pb.Progress(task=running[0].task.id, note=_plain(running[0].note))])

    def delivered(self, task: str) -> None:
        self._hand.answers.pop(task, None)

    # ---- tasks come and go

    def _offered(self, task: pb.Task) -> None:
        item = self._hand.items.get(task.id)
        if item is not None:
            if item.task.relay and not task.relay:
                self.log("relay.given_up", task=task.id, run=task.run, round=task.round, relay=item.task.relay)
                item.task = task
                item.news.set()
            return
        if task.id in self._hand.answers:
            self._do(self._deliver(self._hand.answers[task.id]))
            return
        self.log("task.offered", task=task.id, run=task.run, round=task.round, kind=task.kind)
        self._hand.items[task.id] = _Item(task, next(self._numbers))
        self._hand.wake.set()

    def _withdraw(self, task: str, reason: str) -> None:
        self._hand.answers.pop(task, None)
        item = self._hand.items.get(task)
        if item is None or item.withdrawn or item.settling:  # one that is as good as over ends by itself
            if item is not None:
                item.news.set()
            return
        self.log("task.withdrawn", task=task, run=item.task.run, reason=reason)
        item.withdrawn = item.cancelled = True
        running = self._hand.running
        if running is not None and running[0] is item:
            running[1].cancel()
        else:
            del self._hand.items[task]
            self._do(self._forget_task(item))

    def _run_ended(self, run: str, state: str) -> None:
        for item in self._hand.of_run(run):
            item.settling = False
            self._withdraw(item.task.id, "the run has ended")
        for answer in [a for a in self._hand.answers.values() if a.task.run == run]:
            self.delivered(answer.task.id)
        self._do(self._forget_run(run, state))

    async def _forget_task(self, item: _Item) -> None:
        """What a withdrawn task leaves is deleted."""
        await asyncio.to_thread(self.outbox.delete, item.task.run, item.task.id)
        record = await asyncio.to_thread(self.gate.records.task, item.task.id)
        if record is not None and record.state == "taken":
            await asyncio.to_thread(self.gate.end, item.task, "withdrawn")

    async def _forget_run(self, run: str, state: str) -> None:
        """A coordinator names the runs that have ended at each connection: only the first time is news."""
        if not await asyncio.to_thread(self.gate.goes_on, run):
            return
        self.log("run.ended", run=run, state=state)
        await asyncio.to_thread(self.workshop.forget, run)  # work under way for it stops within a step
        running = self._hand.running
        if running is not None and running[0].task.run == run:
            await asyncio.wait([running[1]])
        await asyncio.to_thread(self.inbox.forget, run)
        await asyncio.to_thread(self.outbox.forget, run)
        await asyncio.to_thread(self.gate.ended, run, self.settings.keep.runs)

    # ---- work, one task at a time

    async def _work(self) -> None:
        while True:
            item = self._hand.next()
            if item is None:
                self._hand.wake.clear()
                await self._hand.wake.wait()
                continue
            job = asyncio.create_task(self._carry_out(item))
            self._hand.running = item, job
            try:
                await asyncio.wait([job])
            finally:
                item.cancelled = item.cancelled or not job.done()
                await _cancelled(job)
                self._hand.running = None
            item.parked = not job.cancelled() and not job.result() and not item.withdrawn
            if not item.parked:
                self._hand.items.pop(item.task.id, None)
            if item.withdrawn:
                await self._forget_task(item)

    async def _carry_out(self, item: _Item) -> bool:
        """One task to its end, or False: a person must be asked first. Whatever goes wrong becomes its answer.

        Raises:
            Alarm: the agent must end.
        """
        try:
            return await self._attempt(item)
        except Alarm as alarm:
            await self._raise_alarm(alarm)
        except (PolicyError, AccessError) as refused:
            await self._end(item, "refused", reason=refused.message)
        except Cancelled as cancelled:
            if not item.cancelled:
                await self._end(item, "failed", reason=cancelled.message)
        except Refused as refused:
            await self._end(item, "failed", reason=f"{refused.code.value}: {refused.message}")
        except CommonweightError as error:
            self.log("task.trouble", task=item.task.id, reason=error.message, hint=error.hint)
            await self._end(item, "failed", reason=_told(error))
        except Exception as error:  # its words may quote rows: they stay here
            self.log("task.trouble", task=item.task.id, reason=f"{type(error).__name__}: {error}")
            await self._end(item, "failed", reason=f"{type(error).__name__} at the site; its own log says more")
        return True

    async def _attempt(self, item: _Item) -> bool:
        task = item.task
        before = await asyncio.to_thread(self.gate.before, task.id)
        if before is not None:
            reason = before.reason if before.state != "withdrawn" else "it was withdrawn"
            reply = pb.TaskReply(
                task=task.id, state=STATES.get(before.state, pb.TaskReply.FAILED), reason=reason, result=before.result
            )
            await self._answer(_Answer(task, reply, ANSWERS.get(task.kind, "") if before.result else ""))
            return True
        known = await self._job(task.run)
        decision = await asyncio.to_thread(self.gate.decide, known, task)
        if not decision.allowed:
            raise PolicyError(f"this site's policy does not allow it: {decision.text}")
        if decision.needs_approval:
            self._tell_of_approval(item, known)
            return False
        await asyncio.to_thread(self.gate.take, task)
        self.link.send(pb.SiteMessage(reply=pb.TaskReply(task=task.id, state=pb.TaskReply.TAKEN)))
        self.log("task.taken", task=task.id, run=task.run, round=task.round, kind=task.kind)
        if task.kind == "train":
            await self._train(item, known)
        else:
            await self._reply(item, known, decision.withheld)
        return True

    def _tell_of_approval(self, item: _Item, known: KnownJob) -> None:
        if not item.asked:
            hint = f"commonweight site approve {item.task.run}"
            self.log("approval.needed", run=item.task.run, reason=known.facts.summary(), hint=hint)
        item.asked = True

    async def _job(self, run: str) -> KnownJob:
        """The run's job, asked for once."""
        known = await asyncio.to_thread(self.gate.known, run)
        backoff = Backoff()
        while known is None:
            session = await self.link.session()
            try:
                with calling():
                    signed = await session.federation["GetJob"](pb.JobRequest(run=run))
            except UnreachableError:
                await asyncio.sleep(backoff.next_s())
                continue
            known = await asyncio.to_thread(self.gate.admit, run, signed)
        return known

    async def _reply(self, item: _Item, known: KnownJob, withheld: tuple[str, ...]) -> None:
        """A task whose answer is plain data."""
        task = item.task
        if task.kind == "join":
            result: Mapping[str, Any] = await self._do_work(item, lambda: self.workshop.join(known.job, item.tell))
        elif task.kind in SUM_STEPS:
            step = task_of(task, parse_json(task.body))
            assert isinstance(step, SumTask)
            result = await asyncio.to_thread(self.sums.answer, known, task, step)
        else:
            body, base = task_of(task, parse_json(task.body)), await self._base(item, known)
            result = await self._do_work(item, lambda: self._answered(item, body, base))
        shared = await asyncio.to_thread(self.gate.shareable, task.kind, result)
        content = json.dumps(shared).encode()
        if len(content) > JSON_BYTES:
            raise SiteError(f"the answer takes {len(content):,} bytes, more than the {JSON_BYTES:,} that fit")
        if task.kind == "join":
            await asyncio.to_thread(self.gate.joined, task.run, result)
            self.log("joined", run=task.run, withheld=list(withheld))
        await self._end(item, "done", result=content, what=ANSWERS[task.kind])

    def _answered(self, item: _Item, body: Any, base: Mapping[str, NamedTensors]) -> dict[str, Any]:
        return self.workshop.answer(item.task.run, body, base, cancelled=lambda: item.cancelled, progress=item.tell)

    async def _train(self, item: _Item, known: KnownJob) -> None:
        task, body = item.task, task_of(item.task, parse_json(item.task.body))
        site = self.identity.holder.name
        assert isinstance(body, TrainTask)
        if known.secure and body.secure is None:
            raise PolicyError("the signed job promises that updates are seen in sums alone; this task wants one bare")
        parcel = await asyncio.to_thread(self.outbox.find, task.run, task.id, base=task.base, site=site)
        if parcel is None:
            base = await self._base(item, known)
            parcel = await self._made(item, known, body, base)
        if body.secure is not None:
            where = (task.run, task.round, body.secure["attempt"], parcel.frame.digest)
            await asyncio.to_thread(self.gate.records.send_row, *where)
        item.note = "sending the update"
        await self._push(item, known, parcel)

    async def _made(self, item: _Item, known: KnownJob, body: TrainTask, base: Mapping[str, NamedTensors]) -> Parcel:
        """The update, made here. If it is large it is on its way by then; not one that others must not see alone."""
        task = item.task
        desk = self.outbox.desk(task.run, task.id)
        if body.secure is not None or task.relay:
            return await self._do_work(item, lambda: self._trained(item, known, body, base, desk, {}))

        async def leaving(num_bytes: int, chunks: int, digest: str) -> None:
            await self._leaving(task, digest, "")(num_bytes, chunks)

        ahead = Ahead(self.link, self.log, task, desk, lambda name: _chunk_bytes(known, name), leaving)
        try:
            return await self._do_work(item, lambda: self._trained(item, known, body, base, desk, ahead.digests))
        finally:
            await ahead.stop(now=item.cancelled)

    def _trained(
        self,
        item: _Item,
        known: KnownJob,
        body: TrainTask,
        base: Mapping[str, NamedTensors],
        desk: Desk,
        digests: Mapping[int, bytes],
    ) -> Parcel:
        """Train, and put the update on disk if it was dear, or is masked and must not be made twice. Blocks for as long
        as training takes.

        Args:
            digests: of chunks that were sent meanwhile.
        """
        task, began = item.task, time.monotonic()
        try:
            work = self.workshop.train(
                task.run,
                body,
                base,
                cancelled=lambda: item.cancelled,
                progress=item.tell,
                base_digest=task.base,
                room=desk,
            )
            if body.secure is not None:
                work = self.sums.mask(known, task, body, work)
            took = time.monotonic() - began
            parcel = self._parcel(task, known, work, digests)
            if (took > self.keep_after_s or body.secure is not None) and not item.withdrawn:
                self.outbox.keep(task.run, task.id, parcel, desk)
            return parcel
        finally:
            desk.clear()

    def _parcel(self, task: pb.Task, known: KnownJob, work: Work, digests: Mapping[int, bytes]) -> Parcel:
        names = tuple(work.channels)
        plan = plan_for(work.channels[names[0]].layout, tuple(map(Channel, names)), _chunk_bytes(known, names[0]))
        frame = frame_of(work.channels, plan, digests)
        manifest = pb.Manifest(
            run=task.run,
            round=task.round,
            task=task.id,
            site=self.identity.holder.name,
            base=task.base,
            frame=frame.header,
            num_examples=work.num_examples,
            num_label_tokens=work.num_label_tokens,
            num_steps=work.num_steps,
            cluster=work.cluster,
            metrics={name: float(value) for name, value in work.metrics.items()},
            policy=self.gate.policy().digest,
        )
        return Parcel(manifest.SerializeToString(deterministic=True), frame, work.channels)

    async def _push(self, item: _Item, known: KnownJob, parcel: Parcel) -> None:
        task = item.task
        signature = self.identity.signing_key.sign(UPDATE, parcel.manifest)
        signed = pb.SignedManifest(manifest=parcel.manifest, signature=signature)
        try:
            relay = await asyncio.to_thread(self.gate.relay_for, known, task)
            if relay:
                await self._push_to_relay(item, known, relay, signed, parcel)
            leaving = self._leaving(task, parcel.frame.digest, "")
            status = await self.transfer.push(signed, parcel, leaving, settling=item.settle, may_be_there=bool(relay))
        except (CommonweightError, OSError):
            await asyncio.to_thread(self.outbox.delete, task.run, task.id)
            raise
        if status.state == pb.UploadStatus.ACCEPTED:
            self.log("update.accepted", task=task.id, run=task.run, round=task.round)
            await self._end(item, "done")
        else:
            fields = {"run": task.run, "round": task.round, "task": task.id, "code": status.code}
            self.log("update.refused", **fields, reason=status.reason)
            await asyncio.to_thread(lambda: self.gate.note("update refused", **fields, reason=status.reason))
            await self._end(item, "failed", reason=f"{status.code}: {status.reason}")
        await asyncio.to_thread(self.outbox.delete, task.run, task.id)

    def _leaving(self, task: pb.Task, digest: str, to: str) -> Leaving:
        """What is told before bytes of an update leave.

        Args:
            digest: of its frame, or of the chunks.
            to: who gets them; by default the coordinator.
        """

        async def leaving(num_bytes: int, chunks: int) -> None:
            await asyncio.to_thread(
                lambda: self.gate.leaving(
                    task.run,
                    task.round,
                    "update",
                    num_bytes=num_bytes,
                    chunks=chunks,
                    digest=digest,
                    task=task.id,
                    to=to,
                )
            )

        return leaving

    async def _push_to_relay(
        self, item: _Item, known: KnownJob, relay: str, signed: pb.SignedManifest, parcel: Parcel
    ) -> None:
        """Give an update to a relay, and wait until the coordinator says what became of it. If the relay cannot be
        reached or will not take it, there is nothing to wait for. The update stays in the outbox meanwhile.

        Raises:
            PolicyError, StorageError: it may not leave, or that cannot be written down.
        """
        task, fields = item.task, {"task": item.task.id, "run": item.task.run, "round": item.task.round, "relay": relay}
        address = task.relay_address
        door = Door(
            lambda: self._dial_relay(address, relay),
            patience_s=known.federation.patience_s,
            is_given_up=item.news.is_set,
        )
        leaving = self._leaving(task, parcel.frame.digest, f"relay {relay} ({address})")
        pushing = asyncio.create_task(
            Transfer(door, self.inbox, self.log).push(signed, parcel, leaving, settling=item.settle)
        )
        news = asyncio.create_task(item.news.wait())
        try:
            await asyncio.wait([pushing, news], return_when=asyncio.FIRST_COMPLETED)
            if not pushing.done():
                return
            status = pushing.result()
            if status.state == pb.UploadStatus.HELD:
                self.log("update.held", **fields)
                item.settle(True)
                item.held = True
                self._tell_held(item)
                await news
            else:
                self.log("relay.refused", **fields, code=status.code, reason=status.reason)
        except (RelayGone, SiteError, AccessError, Refused) as error:
            self.log("relay.left", **fields, reason=error.message)
        finally:
            item.held = False
            await _cancelled(pushing, news)
            await door.close()

    async def _base(self, item: _Item, known: KnownJob) -> dict[str, NamedTensors]:
        task = item.task
        item.note = "fetching the global tensors"

        def wanted() -> set[str]:
            return {other.task.base for other in self._hand.of_run(task.run)}

        initial = lambda: self._do_work(item, lambda: self.workshop.initial(task.run, item.tell))  # noqa: E731
        return await self.catch_up.fetch(known, task.base, task.round, initial, wanted)

    async def _do_work(self, item: _Item, work: Callable[[], T]) -> T:
        """Do work in the executor. Cancelled, it waits until the work has noticed, for nothing may run beside it."""
        future = self._executor.submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            item.cancelled = True
            if not future.cancel():
                done = asyncio.wrap_future(future)
                while not done.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([done])
                done.exception()
            raise

    # ---- answers

    async def _end(self, item: _Item, state: str, *, reason: str = "", result: bytes = b"", what: str = "") -> None:
        """Write down how a task ended, then tell."""
        item.settling = True
        task, reason = item.task, _plain(reason)
        self.log(f"task.{state}", task=task.id, run=task.run, round=task.round, kind=task.kind, reason=reason)
        try:
            await asyncio.to_thread(lambda: self.gate.end(task, state, reason=reason, result=result))
        except CommonweightError as error:  # a full disk must not silence the site
            self.log("records.failed", task=task.id, reason=error.message, hint=error.hint)
        reply = pb.TaskReply(task=task.id, state=STATES[state], reason=reason, result=result)
        await self._answer(_Answer(task, reply, what))

    async def _answer(self, answer: _Answer) -> None:
        self._hand.answers[answer.task.id] = answer
        await self._deliver(answer)

    async def _deliver(self, answer: _Answer) -> None:
        """Send an answer if there is a connection; what leaves by it is counted first, each time."""
        if self.link.current is None:
            return
        if answer.what:
            try:
                await asyncio.to_thread(self._count, answer)
            except PolicyError as error:
                task = answer.task.id
                self.log("task.withheld", task=task, run=answer.task.run, reason=error.message)
                reply = pb.TaskReply(task=task, state=pb.TaskReply.REFUSED, reason=_plain(error.message))
                answer = self._hand.answers[task] = _Answer(answer.task, reply)
        self.link.send(pb.SiteMessage(reply=answer.reply))

    def _count(self, answer: _Answer) -> None:
        task, content = answer.task, answer.reply.result
        self.gate.leaving(
            task.run,
            task.round,
            answer.what,
            num_bytes=len(content),
            chunks=1,
            digest=hashlib.sha256(content).hexdigest(),
            task=task.id,
        )

    # ---- the coordinator's audit log, and this site's certificate

    def _note_head(self, head: pb.AuditHead) -> None:
        session = self.link.current
        if head.sequence and session is not None:
            self._heads.put_nowait((head, session.certificate))

    async def _keep_heads(self) -> None:
        """Heads in the order in which they came."""
        while True:
            head, certificate = await self._heads.get()
            try:
                await asyncio.to_thread(self.gate.keep_head, head, certificate)
            except Alarm as alarm:
                await self._raise_alarm(alarm)
            except CommonweightError as error:
                self.log("head.not_kept", reason=error.message, hint=error.hint)

    async def _raise_alarm(self, alarm: Alarm) -> None:
        self.log("alarm", reason=alarm.message, hint=alarm.hint)
        with suppress(CommonweightError):
            await asyncio.to_thread(lambda: self.gate.note("alarm", reason=alarm.message))
        raise alarm

    async def _renew(self) -> None:
        """Get the next certificate, and go on with it."""
        session = await self.link.session()
        request = await asyncio.to_thread(self.identity.request)
        with calling():
            reply = await session.federation["Renew"](pb.RenewRequest(csr=request))
        self.identity = await asyncio.to_thread(self.identity.write_certificate, reply.certificate)
        self.log("renewed", until=self.identity.holder.not_after)
        self.link.reconnect()

    # ---- chores beside the work

    def _do(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._quietly(chore))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _quietly(self, chore: Coroutine[Any, Any, None]) -> None:
        try:
            await chore
        except (CommonweightError, OSError) as error:
            self.log("trouble", reason=str(error), hint=getattr(error, "hint", ""))


def _chunk_bytes(known: KnownJob, channel: str) -> int:
    """How a run's updates are cut, by the name of their first channel."""
    # a coded update is read a span at a time, and a chunk is read as a whole
    return min(known.chunk_bytes, CODED_CHUNK_BYTES) if channel == CODED else known.chunk_bytes


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, however long that takes them."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)


def _plain(text: str) -> str:
    """Text as the coordinator will take it: no control characters, and not without end."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_TEXT])


def _told(error: CommonweightError) -> str:
    """An error as the coordinator may know it."""
    reason = reason_for_others(error)
    return f"{reason} ({error.hint})" if error.hint and reason == error.message else reason
