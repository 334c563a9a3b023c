"""Sites that attend this replica: tasks are pushed to them as they appear, and taken back when they end.

Each attending site has one held stream. What there is to push is read from the store when its bus says so, or when the
site arrives; nothing about a task is remembered here but whether this stream was told of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ..identity.certificates import Holder
from ..wire.protocol_pb2 import Bye, CoordinatorMessage, RunEnded, Task, Withdraw
from .bus import ALL
from .store import Store, TaskRow

R = TypeVar("R")
#: runs a blocking function of the store away from the event loop
Away = Callable[..., Awaitable[Any]]


class Stream:
    """One site's held stream.

    Args:
        told: ids of the tasks that the site knows of: those in hand when it came, and those pushed since.
    """

    def __init__(self, site: str, session: str, holder: Holder, told: set[str]) -> None:
        self.site, self.session, self.holder, self.told = site, session, holder, told
        self.progress: dict[str, str] = {}
        self.audit_sequence = -1
        self.heard_at = asyncio.get_running_loop().time()
        self.ended_runs: set[str] = set()
        self._out: asyncio.Queue[CoordinatorMessage | None] = asyncio.Queue()

    def send(self, **body: Any) -> None:
        """Queue a message: one keyword, the name of its body."""
        self._out.put_nowait(CoordinatorMessage(**body))

    def end(self, reason: str, *, come_back: bool) -> None:
        """Say good-bye, and end the stream after it."""
        self.send(bye=Bye(reason=reason, come_back=come_back))
        self._out.put_nowait(None)

    async def messages(self) -> AsyncIterator[CoordinatorMessage]:
        while (message := await self._out.get()) is not None:
            yield message


class Hub:
    """The streams of this replica."""

    def __init__(self, store: Store, away: Away) -> None:
        self.store, self.away = store, away
        self.streams: dict[str, Stream] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._news: asyncio.Event | None = None

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
            rows: list[TaskRow] = await self.away(self.store.open_tasks, site)
            open_ids = {row.id for row in rows}
            for task in stream.told - open_ids:
                stream.send(withdraw=Withdraw(task=task, reason="it is over"))
            for row in rows:
                if row.id not in stream.told:
                    stream.send(task=self._task(row))
            stream.told = open_ids

    def _task(self, row: TaskRow) -> Task:
        left = 0.0 if row.deadline_at is None else max(0.001, row.deadline_at - self.store.database.clock())
        return Task(
            id=row.id, run=row.run, round=row.round, kind=row.kind, body=row.body, base=row.base, seconds_left=left
        )

    async def run_ended(self, run: str, state: str) -> None:
        """Tell every attending site that a run is over."""
        for stream in self.streams.values():
            if run not in stream.ended_runs:
                stream.ended_runs.add(run)
                stream.send(ended=RunEnded(run=run, state=state))

    async def follow(self) -> None:
        """Push whenever the store's bus tells of something, for as long as this replica serves."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        with self.store.bus.subscribe("tasks/", lambda: _set(loop, news)) as told:
            while True:
                await news.wait()
                news.clear()
                topics = told.take()
                sites = list(self.streams) if ALL in topics else [t.removeprefix("tasks/") for t in topics]
                await asyncio.gather(*(self.push(site) for site in sites if site in self.streams))


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
