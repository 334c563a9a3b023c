"""Sites that attend this replica: tasks are pushed to them as they appear, and taken back when they end.

Each attending site has one held stream. What there is to push is read from the store when its bus says so, or when the
site arrives; nothing about a task is remembered here but whether this stream was told of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from ..errors import CommonweightError
from ..identity.certificates import Holder
from ..wire.protocol_pb2 import Bye, CoordinatorMessage, RunEnded, Task, Withdraw
from .bus import ALL
from .relays import Route, Routes
from .store import Store, TaskRow

_log = logging.getLogger(__name__)

R = TypeVar("R")
#: runs a blocking function of the store away from the event loop
Away = Callable[..., Awaitable[Any]]

#: messages that may wait for a site that does not read them; a task is one of them
_MOST_WAITING = 4096
#: a stream that was to end is cut when its last messages are not read for so long
_LAST_WORDS_S = 2.0
#: runs that ended lately; a site that was away is told of them when it comes
_ENDED_RUNS = 50
#: what could not be pushed for want of a database is pushed after this
_AGAIN_S = 1.0


class Stream:
    """One site's held stream. Make it in the call that serves it.

    Args:
        told: ids of the tasks that the site knows of: those in hand when it came, and those pushed since.

    Attributes:
        doing: what the site says that it is doing.
        audit_sequence: of the latest head of the audit log that it was told.
        heard_at: when it was last heard, by the event loop's clock.
        ended_runs: those that it was told of.
        direct: ids of the tasks of which it was told that their updates come here, and not to its relay.
    """

    def __init__(self, site: str, session: str, holder: Holder, told: set[str]) -> None:
        self.site, self.session, self.holder, self.told = site, session, holder, told
        self.doing = ""
        self.audit_sequence = -1
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self.ended_runs: set[str] = set()
        self.direct: set[str] = set()
        self._call = asyncio.current_task()
        self._ending = False
        self._out: asyncio.Queue[CoordinatorMessage | None] = asyncio.Queue()

    def send(self, **body: Any) -> None:
        """Queue a message: one keyword, the name of its body."""
        if self._ending:
            return
        if self._out.qsize() >= _MOST_WAITING:
            self.end("the site does not read what it is sent", come_back=True)
            return
        self._out.put_nowait(CoordinatorMessage(**body))

    def end(self, reason: str, *, come_back: bool) -> None:
        """Say good-bye, and end the stream after it, whether the site reads it or not."""
        if self._ending:
            return
        self._ending = True
        self._out.put_nowait(CoordinatorMessage(bye=Bye(reason=reason, come_back=come_back)))
        self._out.put_nowait(None)
        if self._call is not None:
            self._loop.call_later(_LAST_WORDS_S, self._call.cancel)

    async def messages(self) -> AsyncIterator[CoordinatorMessage]:
        while (message := await self._out.get()) is not None:
            yield message


class Hub:
    """The streams of this replica."""

    def __init__(self, store: Store, away: Away, routes: Routes) -> None:
        self.store, self.away, self.routes = store, away, routes
        self.streams: dict[str, Stream] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._ended: dict[str, tuple[str, frozenset[str]]] = {}

    def add(self, stream: Stream) -> None:
        """A site has come. An older stream of the same site ends: the newer one is the truth."""
        older = self.streams.get(stream.site)
        if older is not None:
            older.end("the site has connected anew", come_back=True)
        self.streams[stream.site] = stream

    def remove(self, stream: Stream) -> None:
        if self.streams.get(stream.site) is stream:
            del self.streams[stream.site]

    async def push(self, site: str) -> None:
        """Bring a site's stream up to date: offer what is open and not told, take back what is open no more."""
        async with self._locks.setdefault(site, asyncio.Lock()):
            stream = self.streams.get(site)
            if stream is None:
                return
            rows: list[tuple[TaskRow, Route | None]] = await self.away(self._open_tasks, site)
            open_ids = {row.id for row, _ in rows}
            for task in stream.told - open_ids:
                stream.send(withdraw=Withdraw(task=task, reason="it is over"))
            for row, route in rows:
                past_relay = route is not None and not route.relay
                # one that was to go to a relay is offered anew when that is given up
                if row.id not in stream.told or (past_relay and row.id not in stream.direct):
                    stream.send(task=self._task(row, route))
                if past_relay:
                    stream.direct.add(row.id)
            stream.told = open_ids
            stream.direct &= open_ids

    def _open_tasks(self, site: str) -> list[tuple[TaskRow, Route | None]]:
        return [(row, self.routes.of(row)) for row in self.store.open_tasks(site)]

    def _task(self, row: TaskRow, route: Route | None) -> Task:
        left = 0.0 if row.deadline_at is None else max(0.001, row.deadline_at - self.store.database.clock())
        return Task(
            id=row.id,
            run=row.run,
            round=row.round,
            kind=row.kind,
            body=row.body,
            base=row.base,
            seconds_left=left,
            relay=route.relay if route else "",
            relay_address=route.address if route else "",
        )

    # --- runs that are over

    def ended_runs(self) -> list[str]:
        """Those that ended lately."""
        return list(self._ended)

    def tell_ended(self, stream: Stream) -> None:
        """Tell a site of the runs that it took part in and that have ended lately, of each once."""
        for run, (state, sites) in self._ended.items():
            if stream.site in sites and run not in stream.ended_runs:
                stream.ended_runs.add(run)
                stream.send(ended=RunEnded(run=run, state=state))

    async def _learn_ended(self, topics: set[str]) -> None:
        """Find out which runs have ended and who took part in them, and tell those who are here."""
        runs = [topic.removeprefix("ended/") for topic in topics if topic.startswith("ended/")]
        if ALL in topics:
            latest = await self.away(partial(self.store.runs, _ENDED_RUNS))
            runs = [run.id for run in reversed(latest) if run.has_ended]
        for run in runs:
            if run not in self._ended:
                self._ended[run] = await self.away(self._end_of, run)
        for run in list(self._ended)[:-_ENDED_RUNS]:
            del self._ended[run]
        if runs:
            for stream in list(self.streams.values()):
                self.tell_ended(stream)

    def _end_of(self, run: str) -> tuple[str, frozenset[str]]:
        sites = frozenset(m.site for m in self.store.members(run) if m.state == "joined")
        return self.store.run_row(run).state, sites | self.routes.names(run)

    # --- following the store

    async def follow(self) -> None:
        """Push whenever the store's bus tells of something, for as long as this replica serves."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        notify = partial(_set, loop, news)
        bus = self.store.bus
        with bus.subscribe("tasks/", notify) as tasks, bus.subscribe("ended/", notify) as ended:
            left = {ALL}
            while True:
                if not left:
                    await news.wait()
                news.clear()
                left = await self._heed(left | tasks.take() | ended.take())
                if left:
                    await asyncio.sleep(_AGAIN_S)

    async def _heed(self, topics: set[str]) -> set[str]:
        """Do what topics of the bus ask for; returns those that it could not be done for just now."""
        sites, left = set(self.streams), set[str]()
        if ALL not in topics:
            sites &= {topic.removeprefix("tasks/") for topic in topics}
        try:
            async with asyncio.TaskGroup() as group:
                for site in sites:
                    group.create_task(self.push(site))
                group.create_task(self._learn_ended(topics))
        except* CommonweightError as errors:
            _log.warning("sites cannot be told of their tasks just now: %s", errors.exceptions[0])
            left = topics
        return left


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
