"""A TCP proxy between sites and a coordinator, which counts bytes and cuts connections. TLS passes through it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_READ_BYTES = 1 << 16


class Proxy:
    """Listens on a port of 127.0.0.1 and forwards to another.

    Args:
        target: the port to forward to; may be changed for connections to come.

    Attributes:
        up, down: bytes forwarded to and from the target, of all connections.
        cuts: how often connections were cut.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.up = self.down = self.cuts = 0
        self._cut_at: list[int] = []
        self._way = "up"
        self._open: set[asyncio.StreamWriter] = set()

    @contextmanager
    def serving(self) -> Iterator[Proxy]:
        """Inside, it listens on `port`."""
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(server.close)
            asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        return server

    def cut(self) -> None:
        """Break all connections there are, at once."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def cut_along(self, way: str, num_bytes: int, times: int) -> None:
        """Break all connections `times` times while the next `num_bytes` go along a way (`up` or `down`)."""
        step = num_bytes // (times + 1)
        self._way = way
        self._cut_at = [getattr(self, way) + step * number for number in range(1, times + 1)]

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, there[1]}
        self._open |= pair
        try:
            ways = (self._forward(reader, there[1], "up"), self._forward(there[0], writer, "down"))
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        finally:
            self._open -= pair
            for one in pair:
                one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while data := await reader.read(_READ_BYTES):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
                if way == self._way and self._cut_at and getattr(self, way) >= self._cut_at[0]:
                    self._cut_at.pop(0)
                    self.cuts += 1
                    await self._cut()
                    return
