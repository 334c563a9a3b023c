"""Who is told when something changed: topics, within this process and, by PostgreSQL's NOTIFY, among replicas.

A topic is a hint to look again, never the news itself; hints may come twice. `ALL` means that some may have been
missed (the connection that listens is new, or was lost for a while): look at everything.

    tasks/<site>   run/<id>   ended/<id>   events/<id>   runs   sites   access
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa

CHANNEL = "commonweight"
ALL = "*"
_log = logging.getLogger(__name__)


class Subscription:
    """What has been told of topics that begin with `prefix` since it was last asked for.

    `tasks/north` hears of `tasks/north` alone; a prefix that is empty or ends in `/` hears of all below it. Close it,
    or use it as a context.
    """

    def __init__(self, bus: Bus, prefix: str, notify: Callable[[], None] | None) -> None:
        self._bus, self._prefix, self._notify = bus, prefix, notify
        self._topics: set[str] = set()
        self._changed = threading.Condition()

    def wait(self, timeout: float | None) -> set[str]:
        """The topics told of since the last call, as soon as there are any; none after `timeout` seconds or closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._topics or self not in self._bus, timeout)
            return self._take()

    def take(self) -> set[str]:
        """The topics told of since the last call, without waiting."""
        with self._changed:
            return self._take()

    async def wait_async(self, timeout: float | None) -> set[str]:
        """`wait` for an event loop, without a thread. One task at a time may wait for a subscription."""
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            if self._topics or self not in self._bus:
                return self._take()
            before, self._notify = self._notify, lambda: _call_in(loop, told.set)
        try:
            async with asyncio.timeout(timeout):
                await told.wait()
        except TimeoutError:
            pass
        finally:
            self._notify = before
        return self.take()

    def close(self) -> None:
        self._bus.forget(self)
        self._wake()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> set[str]:
        topics, self._topics = self._topics, set()
        return topics

    def hear(self, topic: str) -> None:
        """Called by the bus, in whichever thread tells."""
        whole = not self._prefix or self._prefix.endswith("/")
        if topic == ALL or topic == self._prefix or (whole and topic.startswith(self._prefix)):
            with self._changed:
                self._topics.add(topic)
            self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            notify = self._notify
        if notify is None:
            return
        try:
            notify()
        except Exception:  # what is told has happened; a listener's defect must not look like a failure of it
            _log.exception("a subscriber to %r failed", self._prefix)


class Bus:
    """Tells subscribers of topics.

    Args:
        url: the PostgreSQL database through which replicas hear each other; None: this process only.
    """

    def __init__(self, url: sa.URL | None = None) -> None:
        self._url = url
        self._sender = secrets.token_hex(4)
        self._subscriptions: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._listener: threading.Thread | None = None
        self._waker = socket.socketpair()
        self.listening = threading.Event()

    def subscribe(self, prefix: str, notify: Callable[[], None] | None = None) -> Subscription:
        """Hear of topics from now on.

        Args:
            notify: called in the thread that tells whenever there is something to take; it must not block.
        """
        subscription = Subscription(self, prefix, notify)
        with self._lock:
            self._subscriptions += (subscription,)
        return subscription

    def __contains__(self, subscription: Subscription) -> bool:
        return subscription in self._subscriptions

    def forget(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def publish(self, topic: str) -> None:
        """Tell this process; what a transaction of the store changes is told to every replica by the store itself."""
        self.tell((topic,))

    def tell(self, topics: Iterable[str]) -> None:
        for topic in dict.fromkeys(topics):
            for subscription in self._subscriptions:
                subscription.hear(topic)

    def addressed(self, topic: str) -> str:
        """A topic as it goes through the database: with its sender, who needs no echo."""
        return f"{self._sender} {topic}"

    def open(self) -> None:
        """Begin to listen to the other replicas (PostgreSQL)."""
        if self._url is not None and self._listener is None:
            self._listener = threading.Thread(target=self._listen, name="commonweight-bus", daemon=True)
            self._listener.start()

    def close(self) -> None:
        self._stopped.set()
        for subscription in self._subscriptions:
            subscription.close()
        self._waker[1].close()  # which the other end sees
        if self._listener is not None:
            self._listener.join(timeout=5.0)
        self._waker[0].close()

    def _listen(self) -> None:
        import psycopg

        pause, heard = 0.1, True
        while not self._stopped.is_set():
            try:
                with self._connected() as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    self.tell((ALL,))  # what was told before this instant has been missed
                    self.listening.set()
                    pause, heard = 0.1, True
                    self._hear_from(connection)
            except (psycopg.Error, OSError) as error:
                level, heard = logging.WARNING if heard else logging.DEBUG, False
                _log.log(level, "the database's notices cannot be heard just now: %s", str(error).partition("\n")[0])
            self.listening.clear()
            self._stopped.wait(pause)
            pause = min(2 * pause, 2.0)

    def _connected(self) -> Any:
        import psycopg

        from .connections import postgres_arguments

        assert self._url is not None
        address = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        return psycopg.connect(address, autocommit=True, **postgres_arguments(2.0))

    def _hear_from(self, connection: Any) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._waker[0], selectors.EVENT_READ)
            while not self._stopped.is_set():
                for notice in connection.notifies(timeout=0):
                    sender, _, topic = notice.payload.partition(" ")
                    if sender != self._sender:
                        self.tell((topic,))
                selector.select()


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
