"""A replica: `commonweight coordinator serve DIR`.

Three ports: the services (gRPC, mutual TLS 1.3), enrolment (gRPC, TLS 1.3, one-time tokens) and HTTP for machines that
watch it (/metrics, /healthz). It may be killed at any instant; asked to stop, it lets go of its runs first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ..errors import CommonweightError, UnreachableError
from ..identity.tls import ServerIdentity, enforce_tls13, enrolment_credentials, server_credentials
from ..wire.service import CONTROL, ENROLMENT, FEDERATION, TRANSFER, channel_options, handler
from .context import Context
from .control import ControlService
from .enrolment import EnrolmentService
from .folder import certificate_ends, hosts_of, renew_server_certificate
from .guard import Guard
from .leader import Leader
from .service import FederationService
from .settings import CoordinatorSettings, load_settings

_log = logging.getLogger(__name__)

_GRACE_S = 5.0
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
        return json.dumps(line, ensure_ascii=False)


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
    settings = load_settings(folder)
    keep_certificate(folder, settings)
    asyncio.run(Replica(folder, settings).serve(ready))


def keep_certificate(folder: Path, settings: CoordinatorSettings) -> None:
    """Renew the coordinator's own certificate if it ends soon; open ports take it up by themselves."""
    if certificate_ends(folder) < time.time() + _RENEW_BEFORE_S:
        renew_server_certificate(folder, settings, hosts_of(folder))
        _log.info("renewed the coordinator's certificate")


class Replica:
    """One process of a coordinator."""

    def __init__(self, folder: Path, settings: CoordinatorSettings) -> None:
        self.folder, self.settings = folder, settings

    async def serve(self, ready: Callable[[CoordinatorSettings, dict[str, int]], None] | None) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        here = Context(self.folder, self.settings)
        server = enrolment = None
        leader, http = Leader(here), None
        background: list[asyncio.Task[None]] = []
        try:
            here.blobs.check()
            here.blobs.sweep()
            server, services = await self._services(here)
            enrolment, enrolments = await self._enrolment(here)
            http = serve_http(self.settings.listen_http, here)
            background = [asyncio.create_task(here.hub.follow()), asyncio.create_task(Watch(here).forever())]
            leader.start()
            ports = {"services": services, "enrolment": enrolments, "http": http.server_address[1]}
            _log.info("serving on ports %s", json.dumps(ports))
            if ready is not None:
                ready(self.settings, ports)
            await stop.wait()
            _log.info("stopping")
        finally:
            await loop.run_in_executor(None, leader.stop)
            for task in background:
                task.cancel()
            for stream in list(here.hub.streams.values()):
                stream.end("the coordinator is stopping", come_back=True)
            for one in (server, enrolment):
                if one is not None:
                    await one.stop(_GRACE_S if one is enrolment else 1.0)
            if http is not None:
                http.shutdown()
            await loop.run_in_executor(None, here.close)

    async def _services(self, here: Context) -> tuple[Any, int]:
        server = grpc.aio.server(options=channel_options())
        guard = Guard(here.store, here.metrics, here.away)
        federation = FederationService(here)
        for methods, service in ((FEDERATION, federation), (TRANSFER, federation), (CONTROL, ControlService(here))):
            server.add_generic_rpc_handlers((guard.handler(methods, service),))
        port = _open(server, self.settings.listen, server_credentials(self._identity))
        await server.start()
        return server, port

    async def _enrolment(self, here: Context) -> tuple[Any, int]:
        server = grpc.aio.server(options=channel_options())
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

    def __init__(self, context: Context) -> None:
        self.here = context
        self.guard = Guard(context.store, context.metrics, context.away)

    async def forever(self) -> None:
        beat = self.here.settings.heartbeat_s
        while True:
            await asyncio.sleep(beat)
            try:
                await self._look(beat)
            except CommonweightError as error:
                _log.warning("attendance cannot be looked after just now: %s", error.message)

    async def _look(self, beat: float) -> None:
        await self.here.away(keep_certificate, self.here.folder, self.here.settings)
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
    try:
        server = ThreadingHTTPServer((host, int(port)), Answers)
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
