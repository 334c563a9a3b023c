"""A replica: `commonweight coordinator serve DIR`.

Three ports: the services (gRPC, mutual TLS 1.3), enrolment (gRPC, TLS 1.3, one-time tokens) and HTTP for machines that
watch it (/metrics, /healthz). It may be killed at any instant; asked to stop, it lets go of its runs first.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ..errors import CommonweightError, StateError, UnreachableError
from ..federation.folder import storage_errors
from ..identity.tls import ServerIdentity, enforce_tls13, enrolment_credentials, server_credentials
from ..wire.buffers import bound_memory
from ..wire.service import CONTROL, ENROLMENT, FEDERATION, TRANSFER, channel_options, handler
from .context import Context
from .control import ControlService
from .enrolment import MAX_REQUEST_BYTES, EnrolmentService
from .folder import certificate_ends, hosts_of, renew_server_certificate
from .guard import Guard
from .leader import Leader
from .service import FederationService
from .settings import CoordinatorSettings, load_settings

_log = logging.getLogger(__name__)

_GRACE_S = 5.0
#: one that was asked to stop may still be at it
_ENDING_S = 3.0
_MOST = "grpc.max_receive_message_length"
#: what is under way and was decided elsewhere is dropped this often
_TIDY_S = 30.0
#: who connects to the HTTP port and then says nothing is dropped after this
_HTTP_S = 10.0
#: the coordinator's certificate is renewed when less than this is left of it
_RENEW_BEFORE_S = 30 * 24 * 3600.0


class JsonLines(logging.Formatter):
    """One JSON object a line: for machines that gather logs."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "t": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("commonweight."),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII: whatever somebody put into a name, it does nothing to a terminal


def log_to_stderr() -> None:
    """Structured logs of this program, on standard error."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JsonLines())
    logger = logging.getLogger("commonweight")
    logger.handlers = [out]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def serve(folder: Path, *, ready: Callable[[CoordinatorSettings, dict[str, int]], None] | None = None) -> None:
    """Serve a coordinator's folder until SIGTERM or SIGINT.

    Args:
        ready: told when all ports are open, with the number of each (`services`, `enrolment`, `http`).

    Raises:
        StateError, RecipeError, StorageError: the folder, its settings or its stores cannot be used.
        UnreachableError: a port cannot be opened.
    """
    enforce_tls13()
    bound_memory()
    settings = load_settings(folder)
    keep_certificate(folder, settings)
    asyncio.run(Replica(folder, settings).serve(ready, signals=True))


def keep_certificate(folder: Path, settings: CoordinatorSettings) -> None:
    """Renew the coordinator's own certificate if it ends soon; open ports take it up by themselves."""
    if certificate_ends(folder) < time.time() + _RENEW_BEFORE_S:
        renew_server_certificate(folder, settings, hosts_of(folder))
        _log.info("renewed the coordinator's certificate")


class Replica:
    """One process of a coordinator.

    Attributes:
        here: its parts, once it serves.
    """

    def __init__(self, folder: Path, settings: CoordinatorSettings) -> None:
        self.folder, self.settings = folder, settings
        self.here: Context | None = None
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """End `serve`. May be called from any thread, once it is ready."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    async def serve(
        self, ready: Callable[[CoordinatorSettings, dict[str, int]], None] | None = None, *, signals: bool = False
    ) -> None:
        """Serve until `stop`.

        Args:
            ready: as `serve` has it.
            signals: stop on SIGTERM and SIGINT too; only in a process's main thread.
        """
        with alone(self.folder):
            await self._serve(ready, signals)

    async def _serve(self, ready: Callable[[CoordinatorSettings, dict[str, int]], None] | None, signals: bool) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.add_signal_handler(number, self._stop.set)
        here = self.here = Context(self.folder, self.settings)
        guard = Guard(here.store, here.denials, here.metrics, here.away)
        server = enrolment = None
        leader, http = Leader(here), None
        background: list[asyncio.Task[None]] = []
        try:
            here.blobs.check()
            here.sweep()
            server, services = await self._services(here, guard)
            enrolment, enrolments = await self._enrolment(here)
            http = serve_http(self.settings.listen_http, here)
            background = [asyncio.create_task(here.hub.follow()), asyncio.create_task(Watch(here, guard).forever())]
            leader.start()
            ports = {"services": services, "enrolment": enrolments, "http": http.server_address[1]}
            _log.info("serving on ports %s", json.dumps(ports))
            if ready is not None:
                ready(self.settings, ports)
            await self._stop.wait()
            _log.info("stopping")
        finally:
            await loop.run_in_executor(None, leader.stop)
            for task in background:
                task.cancel()
            for stream in list(here.hub.streams.values()):
                stream.end("the coordinator is stopping", come_back=True)
            guard.close()
            for one in (server, enrolment):
                if one is not None:
                    await one.stop(_GRACE_S if one is enrolment else 1.0)
            if http is not None:
                http.shutdown()
            await loop.run_in_executor(None, here.close)

    async def _services(self, here: Context, guard: Guard) -> tuple[Any, int]:
        server = grpc.aio.server(options=channel_options())
        federation = FederationService(here)
        for methods, service in ((FEDERATION, federation), (TRANSFER, federation), (CONTROL, ControlService(here))):
            server.add_generic_rpc_handlers((guard.handler(methods, service),))
        port = _open(server, self.settings.listen, server_credentials(self._identity))
        await server.start()
        return server, port

    async def _enrolment(self, here: Context) -> tuple[Any, int]:
        options = [option for option in channel_options() if option[0] != _MOST]
        server = grpc.aio.server(options=[*options, (_MOST, MAX_REQUEST_BYTES)])
        server.add_generic_rpc_handlers((handler(ENROLMENT, EnrolmentService(here)),))
        port = _open(server, self.settings.listen_enrolment, enrolment_credentials(self._identity))
        await server.start()
        return server, port

    def _identity(self) -> ServerIdentity:
        return ServerIdentity(
            tls_key=(self.folder / "server" / "tls.key").read_bytes(),
            certificate=(self.folder / "server" / "tls.pem").read_bytes(),
            authority=(self.folder / "authority" / "authority.pem").read_bytes(),
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process serves a coordinator's folder; replicas have folders of their own.

    Raises:
        StateError: another process does.
        StorageError: the folder cannot be written.
    """
    with storage_errors(folder):
        (folder / "scratch").mkdir(exist_ok=True)
        lock = (folder / "scratch" / "lock").open("a")
    with lock:
        ends = time.monotonic() + _ENDING_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > ends:
                    raise StateError(
                        f"another process serves {folder}",
                        hint="stop it first; a further replica needs a folder of its own",
                        retry=True,
                    ) from error
            time.sleep(0.05)
        yield


def _open(server: Any, address: str, credentials: Any) -> int:
    try:
        port = int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        port, cause = 0, error
        raise _not_open(address) from cause
    if port == 0:
        raise _not_open(address)
    return port


def _not_open(address: str) -> UnreachableError:
    return UnreachableError(
        f"cannot listen on {address}", hint="another program may; choose another port in coordinator.yaml", retry=True
    )


class Watch:
    """Looks after the attending sites: those that fell silent, and those that may no longer attend."""

    def __init__(self, context: Context, guard: Guard) -> None:
        self.here, self.guard = context, guard
        self._tidied_at = 0.0

    async def forever(self) -> None:
        beat = self.here.settings.heartbeat_s
        while True:
            await asyncio.sleep(beat)
            for look in (self._attendance, self._tidy):
                try:
                    await look(beat)
                except CommonweightError as error:
                    _log.warning("the coordinator cannot look after itself just now: %s", error.message)
                except Exception:  # the next look must come, whatever this one met
                    _log.exception("a defect in looking after the coordinator")

    async def _tidy(self, beat: float) -> None:
        """What needs to be done now and then."""
        now = asyncio.get_running_loop().time()
        if now - self._tidied_at >= _TIDY_S:
            self._tidied_at = now
            await self.here.away(keep_certificate, self.here.folder, self.here.settings)
            await self.here.away(self.here.receiver.forget_ended)
            self.here.forget_files(self.here.hub.ended_runs())
        await self.here.away(self.here.denials.flush)

    async def _attendance(self, beat: float) -> None:
        hub, now = self.here.hub, asyncio.get_running_loop().time()
        for stream in list(hub.streams.values()):
            if now - stream.heard_at > 3 * beat + 1:
                _log.info("site %s has not been heard for %.0f s", stream.site, now - stream.heard_at)
                stream.end("nothing was heard of the site", come_back=True)
            elif not await self.guard.is_allowed(stream.holder):
                stream.end("the site's certificate is revoked or has expired", come_back=False)
        sessions = self.here.presence.here()
        if sessions:
            await self.here.away(self.here.store.seen_all, sessions)
        head = await self.here.away(self.here.audit_head)
        for stream in list(hub.streams.values()):
            if stream.audit_sequence != head.sequence:
                stream.audit_sequence = head.sequence
                stream.send(audit_head=head)


def serve_http(address: str, context: Context) -> ThreadingHTTPServer:
    """/metrics and /healthz, in threads of their own."""

    class Answers(BaseHTTPRequestHandler):
        timeout = _HTTP_S

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(context.metrics.registry))
            elif self.path == "/healthz":
                self._answer(*_health(context))
            else:
                self._answer(404, "text/plain", b"there is /metrics, and /healthz\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes come every few seconds; they are not worth a line."""

    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        daemon_threads = True

    try:
        server = Server((bare, int(port)), Answers)
    except (OSError, ValueError) as error:
        raise _not_open(address) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _health(context: Context) -> tuple[int, str, bytes]:
    """200 if the database and the blob store answer, else 503 with the reason."""
    problems = {}
    for name, check in (("database", context.store.audit_head), ("blobs", context.blobs.check)):
        try:
            check()
        except CommonweightError as error:
            problems[name] = error.message
    body = {"ok": not problems, "replica": context.replica, "attending": len(context.hub.streams), **problems}
    return 200 if not problems else 503, "application/json", json.dumps(body).encode() + b"\n"
