"""A site's way to its relay: a connection for one update, given up when nothing comes through for too long.

Whoever listens at the address must hold the certificate of the relay of that name (`identity/tls.py`). Chunks go there
as they would to the coordinator; what the relay does with them, the site learns from the coordinator alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import CommonweightError
from .link import Backoff, OpenChannel, transfers


class RelayGone(CommonweightError):
    """The relay cannot be reached, or is not to be waited for: the update goes to the coordinator."""


class _Patience(Backoff):
    """Waits between attempts, and since when nothing has come through."""

    def __init__(self) -> None:
        super().__init__()
        self.since = time.monotonic()

    def reset(self) -> None:
        super().reset()
        self.since = time.monotonic()


class Door:
    """What `transfer.Transfer` needs of a connection.

    Args:
        open_channel: makes the connection.
        patience_s: for so long the relay may be away.
        is_given_up: asked before each attempt: whether the coordinator no longer counts on the relay.
    """

    def __init__(self, open_channel: OpenChannel, *, patience_s: float, is_given_up: Callable[[], bool]) -> None:
        self._channel = open_channel()
        self._patience_s, self._is_given_up = patience_s, is_given_up
        self.backoff = _Patience()
        self.transfer = transfers(self._channel)

    async def session(self) -> Door:
        """Itself, for another attempt.

        Raises:
            RelayGone: there is to be none.
        """
        if self._is_given_up():
            raise RelayGone("the coordinator has given it up")
        if (away := time.monotonic() - self.backoff.since) > self._patience_s:
            raise RelayGone(f"nothing came through for {away:.0f} s")
        return self

    async def close(self) -> None:
        await self._channel.close(None)
