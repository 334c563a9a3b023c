"""The database below the store: opened, brought up to date, lost and found again; and who is told of what."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from commonweight.coordinator.bus import ALL, Bus
from commonweight.coordinator.connections import explained
from commonweight.coordinator.database import Writing
from commonweight.coordinator.store import Store, verify_chain
from commonweight.coordinator.tables import REVISION, metadata
from commonweight.errors import RecipeError, StateError, StorageError
from tests.postgres import Cluster, postgres  # noqa: F401  (a fixture)

from .stores import add_run, lead, open_round, upload

OTHER_PROCESS = "from commonweight.coordinator.store import Store; import sys; store = Store(sys.argv[1]); "
HOLD = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
db.execute("COMMIT")
print("released", flush=True)
"""


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.sqlite'}"


@pytest.fixture
def postgres_url(postgres: Cluster) -> str:  # noqa: F811
    return postgres.new_database()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    """Opens stores that are closed at the end."""
    stores: list[Store] = []

    def open_one(url: str, **options: Any) -> Store:
        stores.append(Store(url, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def is_still_waiting(future: Future[Any]) -> bool:
    time.sleep(0.3)
    return not future.done()


def in_another_process(url: str, statement: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS + statement, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- opening ------------------------------------------------------------------------------------------------------


def test_the_migrations_make_what_the_tables_say(url: str, opened: Callable[..., Store]) -> None:
    store = opened(url)
    with store.database._readers.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == REVISION
        indexes = {index["name"]: index for index in sa.inspect(connection).get_indexes("uploads")}
    counted = indexes["uploads_counted_once"]
    assert counted["unique"]
    predicate = " ".join(map(str, counted["dialect_options"].values()))
    assert "accepted" in predicate
    assert "spent" in predicate


def test_a_store_opened_again_is_as_it_was_left(url: str, opened: Callable[..., Store]) -> None:
    with Store(url) as store:
        add_run(store)
        head = store.audit_head()
    again = opened(url)
    assert again.run_row("r1").state == "running"
    assert again.audit_head() == head


def test_processes_that_open_an_empty_database_at_once_make_it_once(url: str, opened: Callable[..., Store]) -> None:
    others = [in_another_process(url, f"store.audit('opened', actor='p{k}'); store.close()") for k in range(3)]
    for other in others:
        _, said = other.communicate(timeout=60)
        assert other.returncode == 0, said
    entries = opened(url).audit_entries()
    assert verify_chain(entries)[0] == 3
    assert {entry.actor for entry in entries} == {"p0", "p1", "p2"}


def test_a_second_process_may_look_in_and_write(url: str, opened: Callable[..., Store]) -> None:
    store = opened(url)
    add_run(store)
    ask = "store.request_cancel('r1', 'ada'); print(store.run_row('r1').state); store.close()"
    said, _ = in_another_process(url, ask).communicate(timeout=60)
    assert said == "running\n"
    assert store.run_row("r1").cancelled_by == "ada"
    verify_chain(store.audit_entries())


def _set_version(store: Store, version: str) -> None:
    change = sa.text("UPDATE alembic_version SET version_num = :version")
    store.database.write(lambda tx: tx.execute(change, {"version": version}).rowcount)


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str, opened: Callable[..., Store]) -> None:
    store = opened(url)
    add_run(store)
    _set_version(store, "9999")
    with pytest.raises(StateError, match="'9999', which this version of commonweight does not know") as refused:
        Store(url)
    assert "newer version" in refused.value.hint
    _set_version(store, REVISION)
    assert opened(url).run_row("r1").name == "small"


def test_another_programs_database_is_refused(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE runs (id INTEGER)"))
    engine.dispose()
    with pytest.raises(StateError, match="another program's tables"):
        Store(url)


@pytest.mark.parametrize("address", ["", "not an address", "mysql://root@127.0.0.1/x", "state.sqlite"])
def test_an_address_of_no_such_database_is_refused(address: str) -> None:
    with pytest.raises(RecipeError, match="the database's address") as refused:
        Store(address)
    assert "sqlite:///" in refused.value.hint


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "state.sqlite", tmp_path / "missing" / "state.sqlite", tmp_path):
        with pytest.raises(StorageError, match=str(path)) as refused:
            Store(f"sqlite:///{path}", patience_s=0.0)
        assert not refused.value.retry


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"a text that is long enough to be taken for a header" * 100)
    with pytest.raises(StateError, match="is damaged"):
        Store(f"sqlite:///{tmp_path / 'state.sqlite'}")


def test_a_database_that_lost_a_table_is_refused(sqlite_url: str, opened: Callable[..., Store]) -> None:
    store = opened(sqlite_url)
    store.database.write(lambda tx: tx.execute(sa.text("DROP TABLE presence")).rowcount)
    with pytest.raises(StateError, match="does not fit this program") as refused:
        store.attend("north", "A", "s1")
    assert "presence" in refused.value.message


def test_the_file_is_its_owners_alone(tmp_path: Path, sqlite_url: str, opened: Callable[..., Store]) -> None:
    store = opened(sqlite_url)
    store.audit("looked", actor="ada")
    files = [path for path in tmp_path.iterdir() if path.name.startswith("state.sqlite")]
    assert len(files) > 1  # the write-ahead log too
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_every_commit_is_on_the_disk_when_it_is_answered(sqlite_url: str, opened: Callable[..., Store]) -> None:
    def settings(tx: Writing) -> list[Any]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [tx.execute(sa.text(f"PRAGMA {name}")).scalar_one() for name in names]

    assert opened(sqlite_url).database.write(settings) == ["wal", 2, 1]


def test_an_old_sqlite_is_refused(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 26, 0))
    with pytest.raises(StorageError, match=r"3\.35 or newer"):
        Store(sqlite_url)


def test_what_is_said_of_a_database_does_not_give_its_password_away() -> None:
    with pytest.raises(StorageError) as refused:
        Store("postgresql://ada:secret@127.0.0.1:1/nothing", patience_s=0.0)
    assert "secret" not in refused.value.message
    assert "ada:***@127.0.0.1:1/nothing" in refused.value.message
    assert refused.value.retry


# --- passing faults -----------------------------------------------------------------------------------------------


@pytest.fixture
def holder(sqlite_url: str, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Another process that holds the SQLite file's lock until it is sent a line."""
    processes: list[subprocess.Popen[str]] = []

    def hold() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "state.sqlite")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.communicate("\n", timeout=30)


def release(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "released\n"


def test_a_file_that_another_process_holds_is_waited_for(
    sqlite_url: str, opened: Callable[..., Store], holder: Callable[[], Any], threads: ThreadPoolExecutor
) -> None:
    store = opened(sqlite_url, patience_s=60.0)
    other = holder()
    written = [threads.submit(store.audit, "looked", actor="ada") for _ in range(2)]
    assert is_still_waiting(written[0])
    assert store.audit_head()[0] == 0  # reading goes on
    release(other)
    assert sorted(entry.result(timeout=60).sequence for entry in written) == [1, 2]


def test_a_file_that_is_held_for_too_long_is_an_error_that_passes(
    sqlite_url: str, opened: Callable[..., Store], holder: Callable[[], Any]
) -> None:
    store = opened(sqlite_url, patience_s=0.1)
    other = holder()
    for _ in range(2):
        with pytest.raises(StorageError, match="locked") as refused:
            store.audit("looked", actor="ada")
        assert refused.value.retry
    release(other)
    assert store.audit("looked", actor="ada").sequence == 1


def test_a_thread_that_waits_too_long_for_another_gives_up(
    sqlite_url: str, opened: Callable[..., Store], threads: ThreadPoolExecutor
) -> None:
    store, inside, go_on = opened(sqlite_url, patience_s=0.1), threading.Event(), threading.Event()

    def slow(tx: Writing) -> bool:
        inside.set()
        return go_on.wait(timeout=60)

    blocking = threads.submit(store.database.write, slow)
    assert inside.wait(timeout=60)
    with pytest.raises(StorageError, match="busy") as refused:
        store.audit("looked", actor="ada")
    assert refused.value.retry
    go_on.set()
    assert blocking.result(timeout=60)
    assert store.audit("looked", actor="ada").sequence == 1


def test_a_full_disk_is_an_error_that_passes(sqlite_url: str, opened: Callable[..., Store]) -> None:
    store = opened(sqlite_url)
    add_run(store)

    def fill(tx: Writing) -> None:
        tx.execute(sa.text("PRAGMA max_page_count = 1"))  # as many as there are
        tx.connection.execute(sa.text("CREATE TABLE large AS SELECT zeroblob(1000000) AS content"))

    with pytest.raises(StorageError, match="cannot grow") as refused:
        store.database.write(fill)
    assert refused.value.retry
    store.add_events("r1", ["{}"] * 100)
    assert len(store.events("r1")) == 100


def test_all_connections_in_use_is_an_error_that_passes() -> None:
    with pytest.raises(StorageError, match="in use") as refused, explained("x"):
        raise sa.exc.TimeoutError("QueuePool limit")
    assert refused.value.retry


# --- a PostgreSQL that goes and comes -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_database_that_goes_away_is_found_again(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,
    opened: Callable[..., Store],
    how: signal.Signals,
) -> None:
    store = opened(postgres_url, patience_s=0.2)
    add_run(store)
    assert store.runs()
    head = store.audit_head()
    postgres.stop(how)
    try:
        for call in (
            lambda: store.audit("looked", actor="ada"),
            store.runs,
            lambda: Store(postgres_url, patience_s=0.1),
        ):
            with pytest.raises(StorageError, match="cannot be reached") as refused:
                call()
            assert refused.value.retry
    finally:
        postgres.start()
    assert store.run_row("r1").name == "small"
    assert store.audit_head() == head
    assert store.audit("looked", actor="ada").sequence == head[0] + 1


def test_a_short_restart_is_waited_for(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,
    opened: Callable[..., Store],
    threads: ThreadPoolExecutor,
) -> None:
    store = opened(postgres_url, patience_s=60.0)
    add_run(store)
    postgres.stop()
    try:
        written, read = threads.submit(store.add_events, "r1", ["{}"]), threads.submit(store.run_row, "r1")
        assert is_still_waiting(written)
    finally:
        postgres.start()
    assert written.result(timeout=60) == 1
    assert read.result(timeout=60).name == "small"
    assert len(store.events("r1")) == 1


def test_a_database_that_answers_nothing_for_a_while_is_waited_for(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,
    opened: Callable[..., Store],
    threads: ThreadPoolExecutor,
) -> None:
    store = opened(postgres_url)
    add_run(store)
    postgres.pause()
    try:
        written = threads.submit(store.add_events, "r1", ["{}"])
        assert is_still_waiting(written)
    finally:
        postgres.resume()
    assert written.result(timeout=60) == 1


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a store lose its connection in the middle of the next COMMIT."""

    def at_next_commit(store: Store, *, done: bool, then: Callable[[], None] = lambda: None) -> None:
        dialect = store.database._writers.dialect
        commit, cuts = dialect.do_commit, [True]

        def do_commit(connection: Any) -> None:
            if not cuts:
                return commit(connection)
            cuts.clear()
            if done:
                commit(connection)
            connection.dbapi_connection.close()
            then()
            raise psycopg.OperationalError("the connection is lost")

        monkeypatch.setattr(dialect, "do_commit", do_commit)

    return at_next_commit


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_whose_answer_is_lost_is_neither_doubled_nor_lost(
    postgres_url: str, opened: Callable[..., Store], cut: Callable[..., None], done: bool
) -> None:
    store = opened(postgres_url)
    add_run(store)
    store.add_token("t1", "north", "site", 4e9, "ada")
    calls: list[tuple[Callable[[], Any], Any]] = [
        (lambda: store.add_events("r1", ["{}"]), 1),
        (lambda: store.redeem_token("t1", b"k" * 32), ("north", "site")),
        (lambda: store.claim("r1", "A", 600.0).epoch, 1),  # type: ignore[union-attr]
    ]
    for call, expected in calls:
        cut(store, done=done)
        assert call() == expected
    lease = lead(store)
    open_round(store, lease, needed=1, target=1)
    entering = store.open_upload(upload("a"))
    cut(store, done=done)
    assert store.accept_upload(entering.id).accepted
    cut(store, done=done)
    store.commit(lease, 1, {"answered": ["a"]})
    assert list(store.commits("r1")) == [1]
    assert len(store.events("r1")) == 1
    actions = [entry.action for entry in store.audit_entries()]
    assert [actions.count(a) for a in ("enrolled", "update accepted", "round committed")] == [1, 1, 1]


def test_a_commit_of_which_nothing_can_be_learnt_says_so(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,
    opened: Callable[..., Store],
    cut: Callable[..., None],
) -> None:
    store = opened(postgres_url, patience_s=0.2)
    cut(store, done=True, then=postgres.stop)
    try:
        with pytest.raises(StorageError, match="whether it was done is not known yet") as refused:
            store.audit("looked", actor="ada")
        assert refused.value.retry
    finally:
        postgres.start()
    assert store.audit_head()[0] == 1


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "57P01", "53300"])
def test_a_transaction_that_the_database_breaks_off_is_done_again(
    postgres_url: str, opened: Callable[..., Store], code: str
) -> None:
    store, attempts = opened(postgres_url), []

    def work(tx: Writing) -> str:
        attempts.append(len(attempts))
        tx.publish(f"attempt {len(attempts)}")
        if len(attempts) < 3:
            tx.execute(sa.text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$"))
        return "done"

    assert store.bus.listening.wait(60)
    with store.bus.subscribe("attempt 3") as third, store.bus.subscribe("attempt 1") as first:
        assert store.database.write(work) == "done"
        assert third.take() == {"attempt 3"}
        assert first.take() == set()
    assert len(attempts) == 3


def test_a_defect_is_not_tried_again(url: str, opened: Callable[..., Store]) -> None:
    store, attempts = opened(url), []

    def work(tx: Writing) -> None:
        attempts.append(1)
        tx.execute(sa.text("SELECT * FROM no_such_table"))

    with pytest.raises(StateError, match="does not fit this program"):
        store.database.write(work)
    assert len(attempts) == 1


# --- who is told --------------------------------------------------------------------------------------------------


def test_a_subscriber_hears_of_its_own_topics() -> None:
    bus = Bus()
    with bus.subscribe("tasks/a") as one, bus.subscribe("tasks/") as tasks, bus.subscribe("") as all_:
        for topic in ("tasks/a", "tasks/ab", "run/a", "tasks/a"):
            bus.publish(topic)
        assert one.take() == {"tasks/a"}
        assert tasks.wait(0) == {"tasks/a", "tasks/ab"}
        assert all_.wait(None) == {"tasks/a", "tasks/ab", "run/a"}
        assert one.wait(0) == set()
        bus.publish(ALL)
        assert one.take() == tasks.take() == all_.take() == {ALL}


def test_a_subscriber_that_waits_is_woken(threads: ThreadPoolExecutor) -> None:
    bus = Bus()
    subscription = bus.subscribe("run/r1")
    heard = threads.submit(subscription.wait, 60.0)
    assert is_still_waiting(heard)
    bus.publish("run/r1")
    assert heard.result(timeout=60) == {"run/r1"}
    heard = threads.submit(subscription.wait, None)
    subscription.close()
    assert heard.result(timeout=60) == set()
    bus.publish("run/r1")
    assert subscription.wait(None) == set()


def test_a_task_of_an_event_loop_is_woken_from_another_thread(threads: ThreadPoolExecutor) -> None:
    bus = Bus()
    subscription = bus.subscribe("run/r1")

    async def listen() -> list[set[str]]:
        assert await subscription.wait_async(0.01) == set()
        waiting = asyncio.create_task(subscription.wait_async(60))
        await asyncio.sleep(0)
        threads.submit(bus.publish, "run/r1")
        first = await waiting
        bus.publish("run/r1")
        second = await subscription.wait_async(60)
        threads.submit(bus.close)
        return [first, second, await subscription.wait_async(60)]

    assert asyncio.run(listen()) == [{"run/r1"}, {"run/r1"}, set()]


def test_a_subscriber_that_fails_does_not_undo_what_happened(
    sqlite_url: str, opened: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store, called = opened(sqlite_url), []

    def fail() -> None:
        called.append(1)
        raise RuntimeError("the event loop is closed")

    with store.bus.subscribe("run/", fail):
        add_run(store, state="receiving")
    assert called
    assert store.run_row("r1").state == "receiving"
    assert "a subscriber to 'run/' failed" in caplog.text


def test_what_has_happened_is_told_and_what_has_not_is_not(sqlite_url: str, opened: Callable[..., Store]) -> None:
    store = opened(sqlite_url)
    with store.bus.subscribe("") as told:
        add_run(store, state="receiving")
        assert told.take() == {"run/r1", "runs"}
        with pytest.raises(StateError):
            store.set_run_state("r1", "finished")
        assert told.take() == set()
        add_run(store)
        lease = lead(store)
        told.take()
        open_round(store, lease)
        assert told.take() == {"run/r1", "tasks/a", "tasks/b", "tasks/c"}
        store.reply("r1-1-a-train", "a", "taken")
        assert told.take() == {"run/r1"}
        store.accept_upload(store.open_upload(upload("a")).id)
        assert told.take() == {"run/r1"}
        store.add_events("r1", ["{}"])
        assert told.take() == {"events/r1"}
        store.withdraw(lease, ["r1-1-b-train"], "enough")
        assert told.take() == {"tasks/b"}
        store.attend("a", "A", "s1")
        assert told.take() == {"sites"}
        store.add_token("t1", "north", "site", 4e9, "ada")
        store.redeem_token("t1", b"k" * 32)
        assert told.take() == {"access"}
        store.set_run_state("r1", "finished")
        assert told.take() == {"run/r1", "runs", "ended/r1", "tasks/c"}


def test_replicas_hear_each_other(postgres_url: str, opened: Callable[..., Store]) -> None:
    one, other = opened(postgres_url), opened(postgres_url)
    assert one.bus.listening.wait(60)
    assert other.bus.listening.wait(60)
    with one.bus.subscribe("") as here, other.bus.subscribe("") as there:
        for k in range(20):
            one.add_run(f"r{k}", "small", "", b"job", b"", b"", "lena", {})
        expected, heard = {"runs", *(f"run/r{k}" for k in range(20))}, set[str]()
        assert here.take() == expected
        while heard != expected and (more := there.wait(60)):
            heard |= more
        assert heard == expected
        other.set_run_state("r0", "waiting")
        changed, heard = {"run/r0", "runs"}, set[str]()
        while heard != changed and (more := here.wait(60)):
            heard |= more
        assert heard == changed
        assert there.take() == changed


def test_a_replica_that_was_deaf_for_a_while_looks_at_everything(
    postgres: Cluster,  # noqa: F811
    postgres_url: str,
    opened: Callable[..., Store],
) -> None:
    one, other = opened(postgres_url), opened(postgres_url)
    assert one.bus.listening.wait(60)
    with one.bus.subscribe("run/r1") as told:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            assert connection.execute(cut).fetchall()
        assert told.wait(60) == {ALL}
        assert one.bus.listening.wait(60)
        add_run(other, state="receiving")
        assert told.wait(60) == {"run/r1"}


def test_a_store_opened_before_its_bus_hears_looks_at_everything(
    postgres_url: str, opened: Callable[..., Store]
) -> None:
    """Whatever was told between opening and listening was missed."""
    heard = threading.Event()
    bus = Bus(sa.make_url(postgres_url))
    try:
        with bus.subscribe("run/r1", heard.set) as told:
            bus.open()
            assert heard.wait(60)
            assert told.take() == {ALL}
    finally:
        bus.close()


def test_postgres_is_skipped_only_where_its_programs_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import postgres as module

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(module.Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.delenv("COMMONWEIGHT_REQUIRE_POSTGRES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not on PATH"):
        module._programs()
    monkeypatch.setenv("COMMONWEIGHT_REQUIRE_POSTGRES", "1")
    with pytest.raises(pytest.fail.Exception, match="not on PATH"):
        module._programs()
