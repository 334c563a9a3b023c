"""How many chunks are in motion at once: a bound on memory that no slow site can turn into a bound on the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

#: a chunk that takes longer than this gives its place to another one, and goes on
_PATIENCE_S = 0.5


class Lanes:
    """At most `count` chunks in motion, not counting slow ones."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place for one chunk."""
        await self._free.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()
