"""Who calls, and whether they may: from the client certificate, the role table and the list of the revoked.

It is asked when a call begins, and again with every message of a call that goes on: a certificate that is revoked or
runs out ends what was begun with it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, NoReturn

import grpc

from ..errors import AccessError, CommonweightError, RecipeError, StateError, StorageError, UnreachableError
from ..identity.certificates import Holder
from ..identity.roles import may
from ..identity.tls import peer
from ..wire.refusals import Refused
from ..wire.service import CODE_KEY, HINT_KEY, Method, handler
from .denials import Denials
from .metrics import Metrics
from .store import Store

_log = logging.getLogger(__name__)

#: a revocation is noticed within this time even if the bus lost the notice
_FRESH_S = 5.0
#: the same trouble is logged this often
_COMPLAIN_S = 10.0
#: what an error may take of a call's metadata; gRPC refuses to send more than 8 KiB of them
_MESSAGE_CHARS, _HINT_CHARS = 1500, 500
#: who has shown no identity
NOBODY = "?"

_STATUS: list[tuple[type[CommonweightError], grpc.StatusCode]] = [
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (Refused, grpc.StatusCode.INVALID_ARGUMENT),
    (RecipeError, grpc.StatusCode.INVALID_ARGUMENT),
    (StateError, grpc.StatusCode.FAILED_PRECONDITION),
    (StorageError, grpc.StatusCode.UNAVAILABLE),
    (UnreachableError, grpc.StatusCode.UNAVAILABLE),
]


class Guard:
    """Lets calls through or not.

    Args:
        denials: where those are written down that are not let through.
        away: runs a blocking function away from the event loop.
    """

    def __init__(self, store: Store, denials: Denials, metrics: Metrics, away: Callable[..., Awaitable[Any]]) -> None:
        self.store, self.denials, self.metrics, self.away = store, denials, metrics, away
        self._allowed: dict[tuple[str, str], tuple[bool, float]] = {}
        self._told = store.bus.subscribe("access", self._allowed.clear)

    def close(self) -> None:
        self._told.close()

    def holder(self, context: Any, method: str) -> Holder:
        """The caller, if its role may call this method.

        Raises:
            AccessError: it has shown no certificate, one that has expired, or one of another role.
        """
        holder = peer(context)
        if not may(holder.role, method):
            raise _Denied(holder.name, f"a {holder.role} may not call {method}")
        return holder

    async def check(self, holder: Holder) -> None:
        """Raises AccessError: the certificate has expired or is revoked, or is not known."""
        if not await self.is_allowed(holder):
            raise _Denied(holder.name, f"the certificate of {holder.name!r} is revoked, has expired or is not known")

    async def is_allowed(self, holder: Holder) -> bool:
        """Whether a certificate still holds: not expired, and neither it nor its holder revoked."""
        if holder.not_after < time.time():
            return False
        key = (holder.name, holder.serial)
        found = self._allowed.get(key)
        if found is None or time.monotonic() - found[1] > _FRESH_S:
            asked_at = time.monotonic()
            found = (await self.away(self.store.is_allowed, *key), asked_at)
            self._allowed[key] = found
        return found[0]

    def handler(self, methods: Mapping[str, Method], service: Any) -> Any:
        """A service whose methods take (request, holder, context), behind this guard."""
        guarded = {}
        for name, method in methods.items():
            wrap = self._stream if method.kind.endswith("_stream") else self._unary
            title = f"{method.service.rpartition('.')[2]}/{name}"
            guarded[name] = wrap(title, getattr(service, name), method.kind.startswith("stream_"))
        return handler(methods, _Namespace(guarded))

    def _unary(self, name: str, function: Callable[..., Awaitable[Any]], many: bool) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            holder = None
            try:
                holder = self.holder(context, name)
                await self.check(holder)
                return await function(self._asked(request, holder) if many else request, holder, context)
            except Exception as error:
                await self._fail(context, name, holder, error)

        return call

    def _stream(
        self, name: str, function: Callable[..., AsyncIterator[Any]], many: bool
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            holder = None
            try:
                holder = self.holder(context, name)
                await self.check(holder)
                asked = self._asked(request, holder) if many else request
                async with aclosing(function(asked, holder, context)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        if not many:  # otherwise what it asks is checked, and it may still be told why it is not heard
                            await self.check(holder)
                        yield message
            except Exception as error:
                await self._fail(context, name, holder, error)

        return call

    async def _asked(self, requests: AsyncIterator[Any], holder: Holder) -> AsyncIterator[Any]:
        """A call's messages for as long as its caller may call."""
        async for message in requests:
            await self.check(holder)
            yield message

    async def _fail(self, context: Any, method: str, holder: Holder | None, error: Exception) -> NoReturn:
        """End a call that did not go well; if it may not be made at all, both sides have that in writing."""
        if isinstance(error, AccessError | Refused):
            who = holder.name if holder is not None else getattr(error, "who", NOBODY)
            await self.note(method, who, error)
        await fail(context, method, error)

    async def note(self, method: str, who: str, error: AccessError | Refused) -> None:
        """Write down that a call was denied. Without a database it is denied all the same."""
        self.metrics.denied.labels(method).inc()
        details = {"code": str(error.code)} if isinstance(error, Refused) else {}
        note = functools.partial(
            self.denials.note, "call denied", actor=who, subject=method, reason=error.message, **details
        )
        with suppress(StorageError):
            if await self.away(note):
                _log.info("%s, called by %s, is denied: %s", method, who, error.message)


class _Denied(AccessError):
    """AccessError of somebody whose name is known."""

    def __init__(self, who: str, message: str) -> None:
        super().__init__(message)
        self.who = who


class _Namespace:
    def __init__(self, functions: Mapping[str, Any]) -> None:
        self.__dict__.update(functions)


class _Complaints:
    """Warnings, each at most once in a while: callers try again and again."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def warn(self, method: str, message: str) -> None:
        now = time.monotonic()
        self._said = {text: at for text, at in self._said.items() if now - at < _COMPLAIN_S}
        if message not in self._said:
            self._said[message] = now
            _log.warning("%s cannot be answered just now: %s", method, message)


_complaints = _Complaints()


async def fail(context: Any, method: str, error: Exception) -> NoReturn:
    """End a call with what went wrong, said so that the other side can tell its person."""
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    if not isinstance(error, CommonweightError):
        _log.error("a defect in %s", method, exc_info=error)
        await context.abort(
            grpc.StatusCode.INTERNAL, "the coordinator failed in a way that it should not; its log says more"
        )
    assert isinstance(error, CommonweightError)
    if isinstance(error, StorageError):
        _complaints.warn(method, error.message)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
    kind = next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_"))
    details = {"kind": kind, "hint": error.hint[:_HINT_CHARS], "retry": error.retry}
    trailing: list[tuple[str, str | bytes]] = [(HINT_KEY + "-bin", json.dumps(details).encode())]
    if isinstance(error, Refused):
        trailing.append((CODE_KEY, str(error.code)))
    await context.abort(status, error.message[:_MESSAGE_CHARS], trailing_metadata=tuple(trailing))
    raise AssertionError("unreachable")
