"""A site's connection: it dials out, attends for as long as it can, and comes back whenever the connection is lost.

    connect ─► Hello ─► Welcome (10 s) ─► messages and heartbeats, both ways ─► lost ─► wait ─► connect …

Each attempt has connections of its own, so that a renewed certificate is used and nothing old lingers: one to attend,
and one for tensors, which is made when the first are sent or fetched. On a slow line a chunk fills what the operating
system keeps of a connection for many seconds, and heartbeats behind it would come too late. Nothing heard for three
heartbeats and a second means that the other end is gone, whatever the operating system believes.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..identity.folder import IdentityFolder
from ..identity.tls import TARGET_OPTIONS, channel_credentials, relay_options

# isort: split
# only now: the module above says what gRPC may speak, which it asks once, when it is loaded
import grpc
import grpc.aio

from ..errors import AccessError, CommonweightError, SiteError, UnreachableError
from ..wire import protocol_pb2 as pb
from ..wire.messages import check_coordinator_message, parse_json
from ..wire.refusals import Refusal, Refused
from ..wire.service import (
    CERTIFICATE_KEY,
    CODE_KEY,
    FEDERATION,
    HINT_KEY,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    TRANSFER,
    channel_options,
    stub,
)
from .log import Log

WELCOME_S = 10.0
#: a connection that lasted this long was a good one: the next wait begins small again
STEADY_S = 10.0
#: an attempt to connect may take this long, so that with the longest wait a coordinator is found again within 15 s
CONNECT_S = 5.0

_FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
}
_ACCESS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}

#: what a stream's `read` gives at its end
END: object = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs do not know it

OpenChannel = Callable[[], grpc.aio.Channel]


def dial(identity: IdentityFolder, address: str, *, relay: str = "") -> grpc.aio.Channel:
    """A new connection to a coordinator (host:port), or to the relay of this name, by mutual TLS.

    Raises:
        AccessError: the identity's certificate has expired.
    """
    # an attempt to connect ends in time for the next, whatever a firewall swallows
    limits = [("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000))]
    options = [*channel_options(), *(relay_options(relay) if relay else TARGET_OPTIONS), *limits]
    return grpc.aio.secure_channel(address, channel_credentials(identity), options=options)


def transfers(channel: grpc.aio.Channel) -> dict[str, Callable[..., Any]]:
    """The methods by which tensors go over a connection, and by which one asks for them. An upload is opened over the
    one that it is pushed over: behind a load balancer another may lead to another replica, which knows nothing of it.
    """
    federation = stub(channel, FEDERATION)
    return {
        **stub(channel, TRANSFER),
        **{name: federation[name] for name in ("OpenAhead", "OpenUpload", "OpenPartial", "CatchUp")},
    }


class Backoff:
    """Waits of uniform(0, min(longest, first · 2ⁿ)) seconds ("full jitter"): a thousand sites come back spread out."""

    def __init__(self, *, first_s: float = 0.25, longest_s: float = 8.0) -> None:
        self.first_s, self.longest_s = first_s, longest_s
        self.failures = 0

    def next_s(self) -> float:
        limit = min(self.longest_s, self.first_s * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return random.uniform(0, limit)

    def reset(self) -> None:
        self.failures = 0


def problem(error: grpc.aio.AioRpcError) -> CommonweightError:
    """What a failed call means: UnreachableError may be tried again, every other kind is final."""
    code, text = error.code(), error.details() or error.code().name
    trailing: Any = error.trailing_metadata() or ()
    metadata = {str(key): value for key, value in trailing}
    details = _details(metadata.get(HINT_KEY + "-bin", b""))
    hint = str(details.get("hint", ""))
    if metadata.get(CODE_KEY) in set(Refusal):
        return Refused(Refusal(metadata[CODE_KEY]), text, hint=hint)
    if code in _ACCESS:
        return AccessError(text, hint=hint)
    if code in _FINAL and details.get("retry") is not True:
        return SiteError(f"the coordinator answered: {text}", hint=hint)
    return UnreachableError(f"{code.name}: {text}", hint=hint, retry=True)


def _details(raw: Any) -> dict[str, Any]:
    """What a coordinator says about an error beside its message: kind, hint, retry."""
    try:
        return parse_json(raw, max_bytes=1 << 16) if isinstance(raw, bytes) else {}
    except Refused:
        return {}


@contextmanager
def calling() -> Iterator[None]:
    """Turn the ways in which a call can end badly into errors of ours.

    A connection that is closed here cancels its calls, which looks to them as if they themselves had been cancelled.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise problem(error) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise UnreachableError("the connection was closed", retry=True) from error
    except (asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
        raise UnreachableError(f"the connection was closed ({error})", retry=True) from error


class Attendant(Protocol):
    """Who uses a link."""

    def hello(self) -> pb.Hello:
        """What to say first on each connection."""

    def welcomed(self, session: Session) -> None:
        """A connection is up."""

    def heard(self, message: pb.CoordinatorMessage) -> None:
        """A message came: a task, a withdrawal, the end of a run, an audit head. Must not wait."""

    def beat(self) -> pb.Heartbeat:
        """The heartbeat to send; called once every heartbeat."""

    def delivered(self, task: str) -> None:
        """The coordinator has read a task's reply: it answered a heartbeat that was sent after it."""


@dataclass
class Session:
    """One connection that the coordinator has welcomed.

    Args:
        federation, transfer: its services' methods; by `transfer` uploads are opened too.
        certificate: the coordinator's, PEM; empty if it showed none.
    """

    federation: dict[str, Callable[..., Any]]
    transfer: dict[str, Callable[..., Any]]
    welcome: pb.Welcome
    certificate: bytes = b""
    outgoing: asyncio.Queue[pb.SiteMessage] = field(default_factory=asyncio.Queue)
    #: replies written since the last heartbeat, and for each heartbeat on its way those that went before it
    _written: list[str] = field(default_factory=list)
    _beats: deque[list[str]] = field(default_factory=deque)

    @property
    def heartbeat_s(self) -> float:
        """Seconds between heartbeats: the coordinator's wish, but for what would be a flood."""
        return max(self.welcome.heartbeat_s, 0.01)

    def send(self, message: pb.SiteMessage) -> None:
        self.outgoing.put_nowait(message)

    def wrote(self, message: pb.SiteMessage) -> None:
        if message.HasField("reply"):
            self._written.append(message.reply.task)
        elif message.HasField("heartbeat"):
            self._beats.append(self._written)
            self._written = []

    def answered(self) -> list[str]:
        """A heartbeat was answered: the tasks whose replies went before it."""
        return self._beats.popleft() if self._beats else []


class Link:
    """Attendance at a coordinator, for as long as it is let in.

    Args:
        open_channel: makes a new connection (`grpc.aio.Channel`), with the certificate of the moment.
        attendant: is told what is heard, and says what to send.
        log: called on each change of state, not on each attempt.
    """

    def __init__(self, open_channel: OpenChannel, attendant: Attendant, log: Log) -> None:
        self._open, self._attendant, self._log = open_channel, attendant, log
        self._session: asyncio.Future[Session] | None = None
        self._call: Any = None
        self._lost: str | None = ""  # why there is no connection; None while there is one
        self.backoff = Backoff()

    async def run(self) -> None:
        """Attend until cancelled.

        Raises:
            AccessError: the coordinator will not have this site.
        """
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                reason = await self._attend()
            except UnreachableError as error:
                reason = error.message
            except TimeoutError:
                reason = f"no answer within {WELCOME_S:g} s"
            except (SiteError, Refused) as error:
                reason = error.message
            except AccessError as error:
                if not error.retry:
                    raise
                reason = error.message
            self._note_lost(reason)
            if loop.time() - began > STEADY_S:
                self.backoff.reset()
            await asyncio.sleep(self.backoff.next_s())

    async def session(self) -> Session:
        """The connection there is, or the next one."""
        if self._session is None:
            self._session = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._session)

    @property
    def current(self) -> Session | None:
        """The connection there is, if there is one."""
        future = self._session
        return future.result() if future is not None and future.done() else None

    def send(self, message: pb.SiteMessage) -> None:
        """Send on the connection there is; without one it is the attendant's to send it again when one is up."""
        session = self.current
        if session is not None:
            session.send(message)

    def reconnect(self) -> None:
        """Leave the connection and make another, for instance with a new certificate."""
        if self._call is not None:
            self._call.cancel()

    async def _attend(self) -> str:
        """One connection from its beginning to its end; returns why it ended."""
        channel, bulk = self._open(), self._open()
        writer: asyncio.Task[None] | None = None
        try:
            federation = stub(channel, FEDERATION)
            self._call = call = federation["Attend"]()
            async with asyncio.timeout(WELCOME_S):
                welcome, certificate = await self._greet(call)
            session = Session(federation, transfers(bulk), welcome, certificate)
            self._note_found(session)
            writer = asyncio.create_task(self._write(call, session))
            return await self._read(call, session)
        finally:
            self._call = None
            if self.current is not None:  # one that is still awaited stays: its waiters get the next connection
                self._session = None
            if writer is not None:
                writer.cancel()
                with suppress(asyncio.CancelledError, CommonweightError):
                    await writer
            await asyncio.gather(channel.close(None), bulk.close(None))

    async def _greet(self, call: Any) -> tuple[pb.Welcome, bytes]:
        with calling():
            await call.write(pb.SiteMessage(hello=self._attendant.hello()))
            message = await call.read()
        if message is END:
            raise await _ended(call)
        try:
            check_coordinator_message(message)
        except Refused as refused:
            raise UnreachableError(f"the coordinator began with {refused.message}", retry=True) from refused
        if message.HasField("bye"):
            _heed(message.bye)
        if not message.HasField("welcome"):
            raise UnreachableError("the coordinator did not begin with a welcome", retry=True)
        if not PROTOCOL_MIN <= message.welcome.protocol <= PROTOCOL_MAX:
            raise AccessError(
                f"the coordinator speaks version {message.welcome.protocol} of the protocol, "
                f"this site {PROTOCOL_MIN} to {PROTOCOL_MAX}",
                hint="install the version of commonweight that the coordinator has",
            )
        with calling():
            metadata = dict(await call.initial_metadata())
        return message.welcome, bytes(metadata.get(CERTIFICATE_KEY, b""))

    async def _read(self, call: Any, session: Session) -> str:
        patience = 3 * session.heartbeat_s + 1
        while True:
            try:
                async with asyncio.timeout(patience):
                    with calling():
                        message = await call.read()
            except TimeoutError:
                return f"nothing heard for {patience:g} s"
            if message is END:
                raise await _ended(call)
            try:
                check_coordinator_message(message)
            except Refused as refused:
                self._log("message.ignored", code=str(refused.code), reason=refused.message)
                continue
            self._take(message, session)

    def _take(self, message: pb.CoordinatorMessage, session: Session) -> None:
        if message.HasField("bye"):
            _heed(message.bye)
        if message.HasField("heartbeat"):
            for task in session.answered():
                self._attendant.delivered(task)
        else:
            self._attendant.heard(message)

    async def _write(self, call: Any, session: Session) -> None:
        loop, period = asyncio.get_running_loop(), session.heartbeat_s
        beat_at = loop.time() + random.uniform(0, period)  # many sites that came back at once do not beat as one
        while True:
            try:
                async with asyncio.timeout_at(beat_at):
                    message = await session.outgoing.get()
            except TimeoutError:
                message = pb.SiteMessage(heartbeat=self._attendant.beat())
                beat_at = loop.time() + period
            session.wrote(message)  # before it is: the answer may be read before this coroutine goes on
            with calling():
                await call.write(message)

    def _note_found(self, session: Session) -> None:
        if self._session is None:
            self._session = asyncio.get_running_loop().create_future()
        self._session.set_result(session)
        self._log("connected", protocol=session.welcome.protocol, heartbeat_s=session.heartbeat_s)
        self._lost = None
        self._attendant.welcomed(session)

    def _note_lost(self, reason: str) -> None:
        if self._lost is None:
            self._log("disconnected", reason=reason)
        elif self._lost == "":
            self._log("unreachable", reason=reason)
        self._lost = reason or "lost"


def _heed(bye: pb.Bye) -> None:
    """End as the coordinator's last word asks."""
    if bye.come_back:
        raise UnreachableError(bye.reason or "the coordinator said goodbye", retry=True)
    raise AccessError(
        bye.reason or "the coordinator will not have this site",
        hint="ask who runs the coordinator; a revoked site must be enrolled again",
    )


async def _ended(call: Any) -> CommonweightError:
    """Why a stream without further messages has ended."""
    with calling():
        code, details = await call.code(), await call.details()
    if code in _ACCESS:
        return AccessError(details or code.name)
    return UnreachableError(details or f"the coordinator ended the attendance ({code.name})", retry=True)
