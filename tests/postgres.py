"""A PostgreSQL of the tests' own: a cluster in a temporary folder, on a free port of 127.0.0.1.

`from tests.postgres import postgres` gives a module the fixture `postgres` (a running `Cluster`, one for each test
process) and `postgres_url` (a database of its own for each test). Where PostgreSQL's programs are missing, tests that
need it are skipped, or fail if COMMONWEIGHT_REQUIRE_POSTGRES=1.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

_USER = "commonweight"
#: what is committed survives a crash of the server, but not a loss of power
_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "100",
    "listen_addresses": "127.0.0.1",
}
#: waits until its standard input is closed, then ends the server: a test process that is killed leaves none behind
_WATCH = 'cat >/dev/null; kill -QUIT "$0"; sleep 1; rm -rf "$1"'


class Cluster:
    """A PostgreSQL that can be stopped, paused and started again; its data stay."""

    def __init__(self) -> None:
        self._programs = _programs()
        self._account = _unprivileged()
        self.folder = Path(tempfile.mkdtemp(prefix="cwpg", dir="/tmp"))
        if self._account is not None:
            os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        self.port = _free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        arguments = ["-D", self._data, "-U", _USER, "--auth=trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [self._programs / "initdb", *arguments], check=True, capture_output=True, timeout=120, **self._as()
        )

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [part for name, value in _OPTIONS.items() for part in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self._data, "-p", str(self.port), "-k", self.folder, *options]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **self._as())
        watch = ["/bin/sh", "-c", _WATCH, str(self._server.pid), str(self.folder)]
        self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True, **self._as())
        ends = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > ends or self._server.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: connections are cut at once. SIGQUIT: as in a crash, without tidying up."""
        assert self._server is not None
        self.resume()
        self._server.send_signal(how)
        self._server.wait(timeout=60)
        if self._watch is not None:
            self._watch.kill()
            self._watch.wait()

    def pause(self) -> None:
        """It answers nothing until `resume`; connections stay."""
        self._to_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._to_all(signal.SIGCONT)

    def new_database(self) -> str:
        """An empty database; returns its address."""
        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def remove(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _to_all(self, what: signal.Signals) -> None:
        """Signal the server and its workers, which have process groups of their own."""
        assert self._server is not None
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children").read_text().split()
        for pid in (self._server.pid, *map(int, children)):
            try:
                os.kill(pid, what)
            except ProcessLookupError:
                continue

    def _as(self) -> dict[str, Any]:
        """As whom its programs run: it refuses to run as root."""
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": [], "cwd": "/"}


def _programs() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "postgres").exists():
            return folder
    reason = "PostgreSQL's programs (initdb, postgres) are not on PATH"
    if os.environ.get("COMMONWEIGHT_REQUIRE_POSTGRES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _unprivileged() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    accounts = {account.pw_name: account for account in pwd.getpwall()}
    return accounts.get("postgres") or accounts["nobody"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A running cluster for this test process."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def postgres_url(postgres: Cluster) -> str:
    """The address of an empty database."""
    return postgres.new_database()
