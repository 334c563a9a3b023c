"""Who calls, and whether they may: from the client certificate, the role table and the list of the revoked."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc

from ..errors import AccessError, CommonweightError, RecipeError, StateError, StorageError, UnreachableError
from ..identity.certificates import Holder
from ..identity.roles import may
from ..identity.tls import peer
from ..wire.refusals import Refused
from ..wire.service import CODE_KEY, HINT_KEY, Method, handler
from .metrics import Metrics
from .store import Store

_log = logging.getLogger(__name__)

#: a revocation is noticed within this time even if the bus lost the notice
_FRESH_S = 5.0

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
        away: runs a blocking function away from the event loop.
    """

    def __init__(self, store: Store, metrics: Metrics, away: Callable[..., Awaitable[Any]]) -> None:
        self.store, self.metrics, self.away = store, metrics, away
        self._allowed: dict[tuple[str, str], tuple[bool, float]] = {}
        self._told = store.bus.subscribe("access", self._allowed.clear)

    async def holder(self, context: Any, method: str) -> Holder:
        """The caller, if it may call this method; the call ends otherwise."""
        try:
            holder = peer(context)
        except AccessError as error:
            await self.deny(context, method, "?", error.message)
        if not may(holder.role, method):
            await self.deny(context, method, holder.name, f"a {holder.role} may not call {method}")
        if not await self.is_allowed(holder):
            await self.deny(context, method, holder.name, f"the certificate of {holder.name!r} is revoked or not known")
        return holder

    async def is_allowed(self, holder: Holder) -> bool:
        """Whether a certificate still holds: not expired, and neither it nor its holder revoked."""
        if holder.not_after < time.time():
            return False
        key = (holder.name, holder.serial)
        found = self._allowed.get(key)
        if found is None or time.monotonic() - found[1] > _FRESH_S:
            found = (await self.away(self.store.is_allowed, *key), time.monotonic())
            self._allowed[key] = found
        return found[0]

    async def deny(self, context: Any, method: str, who: str, why: str) -> NoReturn:
        """End a call that may not be made; both sides have it in writing."""
        self.metrics.denied.labels(method).inc()
        await self.away(functools.partial(self.store.audit, "call denied", actor=who, subject=method, reason=why))
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
        raise AssertionError("unreachable")

    def handler(self, methods: Mapping[str, Method], service: Any) -> Any:
        """A service whose methods take (request, holder, context), behind this guard."""
        guarded = {}
        for name, method in methods.items():
            wrap = self._stream if method.kind.endswith("_stream") else self._unary
            guarded[name] = wrap(f"{method.service.rpartition('.')[2]}/{name}", getattr(service, name))
        return handler(methods, _Namespace(guarded))

    def _unary(self, name: str, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            holder = await self.holder(context, name)
            try:
                return await function(request, holder, context)
            except Exception as error:
                await fail(context, name, error)

        return call

    def _stream(self, name: str, function: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            holder = await self.holder(context, name)
            try:
                async for message in function(request, holder, context):
                    yield message
            except Exception as error:
                await fail(context, name, error)

        return call


class _Namespace:
    def __init__(self, functions: Mapping[str, Any]) -> None:
        self.__dict__.update(functions)


async def fail(context: Any, method: str, error: Exception) -> NoReturn:
    """End a call with what went wrong, said so that the other side can tell its person."""
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    if not isinstance(error, CommonweightError):
        _log.exception("a defect in %s", method)
        await context.abort(grpc.StatusCode.INTERNAL, f"the coordinator failed in a way that it should not: {error!r}")
    assert isinstance(error, CommonweightError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
    details = {"kind": type(error).__name__, "hint": error.hint, "retry": error.retry}
    trailing: list[tuple[str, str | bytes]] = [(HINT_KEY + "-bin", json.dumps(details).encode())]
    if isinstance(error, Refused):
        trailing.append((CODE_KEY, str(error.code)))
    await context.abort(status, error.message, trailing_metadata=tuple(trailing))
    raise AssertionError("unreachable")
