"""The coordinator's durable state, on SQLite and on PostgreSQL alike: access, audit, runs, leases, rounds, uploads."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any, TypeVar

import psycopg
import pytest
import sqlalchemy as sa

from commonweight.coordinator import tables
from commonweight.coordinator.audit import GENESIS
from commonweight.coordinator.database import Writing
from commonweight.coordinator.leases import hold
from commonweight.coordinator.store import (
    AuditEntry,
    Lease,
    LeaseLost,
    Store,
    StoreJournal,
    StoreLedger,
    verify_chain,
    verify_head,
)
from commonweight.errors import AccessError, BudgetError, StateError
from commonweight.federation.round import Answered, Committed, DeadlinePassed, Failed, Phase, Round, Verdict
from commonweight.federation.version import Version
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.spending import UNPROTECTED, Budget, Spend, cost
from commonweight.wire.refusals import Refusal, Refused
from tests.postgres import Cluster, postgres  # noqa: F401  (a fixture)

from .stores import (
    LEASE_S,
    Clock,
    add_run,
    answer,
    close_round,
    commit,
    everything,
    lead,
    open_round,
    open_version,
    task,
    upload,
)

R = TypeVar("R")
SPEND = Spend("site", "gaussian", 4.0)
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to copy."""
    path = tmp_path_factory.mktemp("store") / "state.sqlite"
    Store(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="module")
def postgres_url(postgres: Cluster) -> str:  # noqa: F811
    """A store that is emptied before each test."""
    url = postgres.new_database()
    Store(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        path = tmp_path / "state.sqlite"
        shutil.copy(request.getfixturevalue("sqlite_file"), path)
        return f"sqlite:///{path}"
    url: str = request.getfixturevalue("postgres_url")
    with psycopg.connect(url) as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(f"DELETE FROM {table.name}")  # type: ignore[arg-type]
    return url


@pytest.fixture
def another(url: str, clock: Clock) -> Iterator[Callable[[], Store]]:
    """Opens a further Store on the test's database."""
    opened: list[Store] = []

    def open_one() -> Store:
        opened.append(Store(url, clock=clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(another: Callable[[], Store]) -> Store:
    return another()


def at_once(count: int, call: Callable[[int], R]) -> list[R | Exception]:
    """What `call(0)`, `call(1)` … return or raise, each in a thread, begun at one instant."""
    barrier = Barrier(count)

    def one(number: int) -> R | Exception:
        barrier.wait(timeout=30)
        try:
            return call(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def token(store: Store, secret: str = "t1", name: str = "north", role: str = "site", **changes: Any) -> None:
    store.add_token(secret, name, role, 2_000_000.0, "ada", **changes)


# --- who may come in ----------------------------------------------------------------------------------------------


def test_a_token_enrols_once(store: Store, clock: Clock) -> None:
    token(store)
    assert store.redeem_token("t1", KEY) == ("north", "site")
    with pytest.raises(AccessError, match="'north' was used already"):
        store.redeem_token("t1", OTHER_KEY)
    north = store.principal("north")
    assert north is not None
    assert (north.role, north.signing_key, north.state, north.enrolled_at) == ("site", KEY, "active", clock.now)
    assert store.principals("site") == [north]
    assert store.principals("lead") == []


def test_who_did_not_hear_the_answer_may_ask_again_for_a_while(store: Store, clock: Clock) -> None:
    token(store)
    store.redeem_token("t1", KEY)
    clock.now += 890
    assert store.redeem_token("t1", KEY) == ("north", "site")
    assert [e.action for e in store.audit_entries()].count("enrolled") == 1
    clock.now += 20
    with pytest.raises(AccessError, match="used already"):
        store.redeem_token("t1", KEY)


@pytest.mark.parametrize("since", ["revoked", "replaced"])
def test_who_is_not_let_in_any_more_does_not_return_by_an_old_token(store: Store, since: str) -> None:
    token(store)
    store.redeem_token("t1", KEY)
    if since == "revoked":
        store.set_state("north", "revoked", "key stolen", "ada")
    else:
        token(store, "t2", replace=True)
        store.redeem_token("t2", OTHER_KEY)
    with pytest.raises(AccessError, match="used already"):
        store.redeem_token("t1", KEY)


def test_a_token_enrols_once_however_many_try_at_the_same_instant(another: Callable[[], Store]) -> None:
    stores = [another(), another()]
    token(stores[0])
    results = at_once(8, lambda k: stores[k % 2].redeem_token("t1", bytes([k]) * 32))
    assert [r for r in results if not isinstance(r, Exception)] == [("north", "site")]
    refusals = [r for r in results if isinstance(r, Exception)]
    assert all(isinstance(r, AccessError) and "used already" in r.message for r in refusals)
    assert len([e for e in stores[0].audit_entries() if e.action == "enrolled"]) == 1


def test_of_tokens_for_one_name_one_enrols(store: Store) -> None:
    for k in range(4):
        token(store, f"t{k}")
    results = at_once(4, lambda k: store.redeem_token(f"t{k}", bytes([k]) * 32))
    assert [r for r in results if not isinstance(r, Exception)] == [("north", "site")]
    assert all(isinstance(r, AccessError) for r in results if isinstance(r, Exception))


def test_tokens_that_are_unknown_or_too_old_are_refused(store: Store, clock: Clock) -> None:
    with pytest.raises(AccessError, match="not known"):
        store.redeem_token("never made", KEY)
    token(store)
    clock.now = 2_000_000.0
    with pytest.raises(AccessError, match="has expired"):
        store.redeem_token("t1", KEY)
    assert store.principals() == []
    assert [entry.action for entry in store.audit_entries()] == ["token made"]


@pytest.mark.parametrize(("key", "role", "said"), [(OTHER_KEY, "site", "enrolled already"), (KEY, "lead", "as site")])
def test_a_name_is_taken_over_only_by_a_token_that_says_so(store: Store, key: bytes, role: str, said: str) -> None:
    token(store)
    store.redeem_token("t1", KEY)
    store.add_certificate("aa", "north", 3_000_000.0)
    token(store, "t2", role=role)
    with pytest.raises(AccessError, match=said):
        store.redeem_token("t2", key)
    assert store.is_allowed("north", "aa")
    token(store, "t3", role=role, replace=True)
    assert store.redeem_token("t3", key) == ("north", role)
    assert not store.is_allowed("north", "aa")
    assert store.revoked_serials() == {"aa"}
    store.set_state("north", "active", "still here", "ada")
    assert not store.is_allowed("north", "aa")  # the former holder's certificate does not come back


def test_the_same_key_may_enrol_again(store: Store) -> None:
    token(store)
    token(store, "t2")
    store.redeem_token("t1", KEY)
    store.add_certificate("aa", "north", 3_000_000.0)
    assert store.redeem_token("t2", KEY) == ("north", "site")
    assert store.is_allowed("north", "aa")


def test_a_revoked_name_needs_a_token_that_replaces_it(store: Store) -> None:
    token(store)
    token(store, "t2")
    token(store, "t3", replace=True)
    store.redeem_token("t1", KEY)
    store.set_state("north", "revoked", "key stolen", "ada")
    with pytest.raises(AccessError, match="is revoked"):
        store.redeem_token("t2", KEY)
    store.redeem_token("t3", KEY)
    principal = store.principal("north")
    assert principal is not None
    assert principal.state == "active"


def test_certificates_go_and_come_back_with_their_holder(store: Store, clock: Clock) -> None:
    token(store)
    store.redeem_token("t1", KEY)
    store.add_certificate("aa", "north", clock.now + 100)
    store.add_certificate("bb", "north", clock.now + 300)
    assert store.is_allowed("north", "aa")
    assert not store.is_allowed("south", "aa")
    assert not store.is_allowed("north", "cc")
    store.set_state("north", "revoked", "left the consortium", "ada")
    assert not store.is_allowed("north", "aa")
    assert store.revoked_serials() == {"aa", "bb"}
    clock.pass_(200)
    assert store.revoked_serials() == {"bb"}  # the other has ended by itself
    store.set_state("north", "active", "came back", "ada")
    assert store.is_allowed("north", "bb")
    assert store.revoked_serials() == frozenset()
    actions = [(e.actor, e.action, e.details.get("reason")) for e in store.audit_entries() if e.actor == "ada"]
    assert actions[1:] == [("ada", "revoked", "left the consortium"), ("ada", "let in again", "came back")]


def test_nobody_unknown_gets_a_state_or_a_certificate(store: Store) -> None:
    with pytest.raises(StateError, match="'nobody' is not in"):
        store.set_state("nobody", "revoked", "", "ada")
    with pytest.raises(StateError, match="refuses an entry"):
        store.add_certificate("aa", "nobody", 3_000_000.0)
    assert store.audit_head() == (0, GENESIS)


# --- the audit log ------------------------------------------------------------------------------------------------


@pytest.fixture
def log(another: Callable[[], Store]) -> list[AuditEntry]:
    return logged(another())


@pytest.fixture
def some_log(clock: Clock) -> list[AuditEntry]:
    """The same, whatever the database."""
    with Store("sqlite://", clock=clock) as store:
        return logged(store)


def logged(store: Store) -> list[AuditEntry]:
    """Six entries."""
    for k in range(6):
        store.audit("looked", actor="ada", subject=f"run {k}", number=k, share=0.1 * k, said="æ “quoted”", none=None)
    return store.audit_entries()


def test_an_entry_is_chained_to_the_one_before(log: list[AuditEntry], store: Store) -> None:
    assert verify_chain(log) == store.audit_head() == (6, log[-1].hash)
    assert log[0].hash == hashlib.sha256(bytes(32) + log[0].canonical()).digest()
    assert json.loads(log[3].canonical()) == {
        "sequence": 4,
        "t": 1_000_000.0,
        "actor": "ada",
        "action": "looked",
        "subject": "run 3",
        "details": {"number": 3, "share": 0.1 * 3, "said": "æ “quoted”", "none": None},
    }
    assert store.audit_entries(after=4) == log[4:]
    assert store.audit_entries(limit=2) == log[:2]
    assert verify_chain(log[4:], start=4, start_hash=log[3].hash) == store.audit_head()
    assert [AuditEntry.from_json(json.loads(json.dumps(entry.to_json()))) for entry in log] == log


def _drop(log: list[AuditEntry]) -> list[AuditEntry]:
    return log[:2] + log[3:]


def _drop_and_renumber(log: list[AuditEntry]) -> list[AuditEntry]:
    return log[:2] + [replace(entry, sequence=entry.sequence - 1) for entry in log[3:]]


def _swap(log: list[AuditEntry]) -> list[AuditEntry]:
    return [*log[:2], log[3], log[2], *log[4:]]


def _swap_and_renumber(log: list[AuditEntry]) -> list[AuditEntry]:
    return [*log[:2], replace(log[3], sequence=3), replace(log[2], sequence=4), *log[4:]]


@pytest.mark.parametrize("tamper", [_drop, _drop_and_renumber, _swap, _swap_and_renumber])
def test_entries_taken_out_or_moved_are_noticed(some_log: list[AuditEntry], tamper: Callable[[Any], Any]) -> None:
    with pytest.raises(StateError, match="audit entry 3 "):
        verify_chain(tamper(some_log))


@pytest.mark.parametrize(
    "edit",
    [{"t": 1.0}, {"actor": "bob"}, {"action": "peeked"}, {"subject": "run 9"}, {"details": {}}, {"hash": bytes(32)}],
)
def test_an_edited_entry_is_noticed(some_log: list[AuditEntry], edit: dict[str, Any]) -> None:
    some_log[2] = replace(some_log[2], **edit)
    with pytest.raises(StateError, match="audit entry 3 was changed"):
        verify_chain(some_log)


def test_an_edit_in_the_database_is_noticed(log: list[AuditEntry], store: Store) -> None:
    edit = tables.audit.update().where(tables.audit.c.sequence == 5).values(actor="bob")
    store.database.write(lambda tx: tx.execute(edit).rowcount)
    with pytest.raises(StateError, match="audit entry 5 "):
        verify_chain(store.audit_entries())


def test_what_is_cut_off_the_end_is_noticed_by_a_head_kept_elsewhere(some_log: list[AuditEntry]) -> None:
    kept = some_log[4]
    verify_head(some_log, kept.sequence, kept.hash)
    verify_head(some_log, 0, GENESIS)
    verify_head(some_log[:5], kept.sequence, kept.hash)
    verify_chain(some_log[:4])  # by itself it looks whole
    with pytest.raises(StateError, match="ends at entry 4, but entry 5 was seen"):
        verify_head(some_log[:4], kept.sequence, kept.hash)


def test_a_log_written_anew_is_noticed_by_a_head_kept_elsewhere(some_log: list[AuditEntry]) -> None:
    forged, before = [], GENESIS
    for entry in some_log:
        entry = replace(entry, actor="bob")
        before = entry.hashed_after(before)
        forged.append(replace(entry, hash=before))
    verify_chain(forged)
    with pytest.raises(StateError, match="audit entry 5 is not the one"):
        verify_head(forged, 5, some_log[4].hash)


def test_a_line_that_is_no_entry_is_refused(some_log: list[AuditEntry]) -> None:
    for line in ({}, {**some_log[0].to_json(), "hash": "zz"}, {**some_log[0].to_json(), "more": 1}):
        with pytest.raises(StateError, match="cannot be read"):
            AuditEntry.from_json(line)


def test_entries_of_many_writers_make_one_chain(another: Callable[[], Store]) -> None:
    stores = [another(), another()]
    results = at_once(8, lambda k: [stores[k % 2].audit("looked", actor=f"w{k}").sequence for _ in range(5)])
    sequences = sorted(s for result in results if isinstance(result, list) for s in result)
    assert sequences == list(range(1, 41))
    assert verify_chain(stores[0].audit_entries())[0] == 40


def test_what_did_not_happen_is_not_in_the_log(store: Store) -> None:
    token(store)
    with pytest.raises(StateError, match="refuses an entry"):
        token(store)
    assert store.audit_head()[0] == 1


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_once(store: Store) -> None:
    add_run(store, state="receiving")
    before = everything(store)
    add_run(store, state="receiving")
    assert everything(store) == before
    with pytest.raises(StateError, match="another run with the id 'r1'"):
        add_run(store, state="receiving", job=b"another job")
    run = store.run_row("r1")
    assert (run.name, run.job, run.signer, run.upload, run.state) == (
        "small",
        b"job of r1",
        "lena",
        {"frame": "f0"},
        "receiving",
    )
    assert store.find_run("r1") == run
    assert store.find_run("r2") is None
    with pytest.raises(StateError, match="run 'r2' is not in"):
        store.run_row("r2")


def test_of_two_submissions_at_once_one_is_stored(another: Callable[[], Store]) -> None:
    stores = [another(), another()]
    results = at_once(4, lambda k: add_run(stores[k % 2], state="receiving", job=bytes([k // 2])))
    assert sorted(type(r).__name__ for r in results) == ["NoneType", "NoneType", "StateError", "StateError"]


def test_a_run_goes_on_to_its_end(store: Store, clock: Clock) -> None:
    add_run(store, state="receiving")
    for state in ("waiting", "running", "running", "finished", "finished"):
        store.set_run_state("r1", state)
    assert store.run_row("r1").has_ended
    assert store.run_row("r1").ended_at == clock.now
    log = [e.action for e in store.audit_entries()]
    assert log == ["run submitted", "run waiting", "run running", "run finished"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("receiving", "running"),
        ("waiting", "finished"),
        ("running", "waiting"),
        ("failed", "running"),
        ("waiting", "?"),
    ],
)
def test_a_run_goes_no_other_way(store: Store, before: str, after: str) -> None:
    add_run(store, state="waiting" if before == "failed" else before)
    if before == "failed":
        store.set_run_state("r1", "failed", error="no site came", hint="ask them")
    with pytest.raises(StateError, match=f"run 'r1' is {before}; it cannot become"):
        store.set_run_state("r1", after)
    assert store.run_row("r1").state == before


def test_why_a_run_failed_is_kept(store: Store) -> None:
    add_run(store)
    store.set_run_state("r1", "failed", error="no site came", hint="ask them")
    run = store.run_row("r1")
    assert (run.error, run.hint) == ("no site came", "ask them")
    assert store.audit_entries()[-1].details == {"error": "no site came"}


def test_the_end_of_a_run_withdraws_its_tasks(store: Store) -> None:
    add_run(store)
    add_run(store, "r2")
    open_round(store, lead(store))
    open_round(store, lead(store, "r2"))
    store.reply("r1-1-a-train", "a", "done")
    store.set_run_state("r1", "cancelled")
    assert [(row.state, row.reason) for row in store.tasks("r1")] == [
        ("done", ""),
        ("withdrawn", "the run is cancelled"),
        ("withdrawn", "the run is cancelled"),
    ]
    assert [row.run for row in store.open_tasks("b")] == ["r2"]


def test_a_cancelled_run_is_marked_for_its_leader(store: Store) -> None:
    add_run(store)
    store.request_cancel("r1", "lena")
    assert (store.run_row("r1").state, store.run_row("r1").cancelled_by) == ("running", "lena")
    add_run(store, "r2", state="receiving")  # nobody leads it yet
    store.request_cancel("r2", "lena")
    assert store.run_row("r2").state == "cancelled"
    store.set_run_state("r1", "finished")
    head = store.audit_head()
    store.request_cancel("r1", "bob")
    assert store.run_row("r1").cancelled_by == "lena"
    assert store.audit_head() == head
    with pytest.raises(StateError, match="'r3' is not in"):
        store.request_cancel("r3", "lena")


def test_runs_come_newest_first(store: Store, clock: Clock) -> None:
    for run in ("r1", "r2", "r3"):
        add_run(store, run)
        clock.pass_(1)
    assert [run.id for run in store.runs()] == ["r3", "r2", "r1"]
    assert [run.id for run in store.runs(limit=2)] == ["r3", "r2"]


def test_members_are_known_with_what_they_said(store: Store) -> None:
    add_run(store)
    store.put_member("r1", "north", "asked")
    store.put_member("r1", "south", "refused", reason="the policy denies it")
    store.put_member("r1", "north", "joined", {"steps": 4, "layout": "æ"})
    members = [(m.site, m.state, m.facts, m.reason) for m in store.members("r1")]
    assert members == [
        ("north", "joined", {"steps": 4, "layout": "æ"}, ""),
        ("south", "refused", {}, "the policy denies it"),
    ]
    with pytest.raises(StateError, match="refuses an entry"):
        store.put_member("r9", "north", "asked")


# --- leases -------------------------------------------------------------------------------------------------------


def test_one_leader_at_a_time(store: Store, clock: Clock) -> None:
    add_run(store, state="waiting")
    assert store.claimable() == ["r1"]
    first = lead(store)
    assert store.claimable() == []
    assert store.leader("r1") == "A"
    assert store.claim("r1", "B", LEASE_S) is None
    clock.pass_(LEASE_S - 1)
    assert store.claim("r1", "B", LEASE_S) is None
    renewed = store.renew(first, LEASE_S)
    assert renewed.until == clock.now + LEASE_S
    clock.pass_(LEASE_S - 1)
    store.renew(first, LEASE_S)  # an older copy of the same lease
    clock.pass_(LEASE_S)
    assert store.claimable() == ["r1"]
    assert store.leader("r1") is None
    second = lead(store, owner="B")
    assert second.epoch == first.epoch + 1
    store.release(second)
    assert store.claimable() == ["r1"]
    assert lead(store, owner="A").epoch == second.epoch + 1


def test_a_replica_that_claims_again_fences_itself_off(store: Store) -> None:
    add_run(store)
    before = lead(store)
    after = lead(store)
    assert after.epoch == before.epoch + 1
    store.renew(after, LEASE_S)
    with pytest.raises(LeaseLost):
        store.renew(before, LEASE_S)


def test_only_a_run_that_waits_or_runs_is_led(store: Store) -> None:
    assert store.claim("r1", "A", LEASE_S) is None
    add_run(store, state="receiving")
    assert store.claimable() == []
    assert store.claim("r1", "A", LEASE_S) is None
    store.set_run_state("r1", "waiting")
    lead(store)
    store.set_run_state("r1", "failed")
    assert store.claim("r1", "A", LEASE_S) is None


def test_of_many_that_claim_at_once_one_leads(another: Callable[[], Store], clock: Clock) -> None:
    stores = [another(), another()]
    add_run(stores[0])
    for turn in range(3):
        results = at_once(8, lambda k: stores[k % 2].claim("r1", f"replica {k}", LEASE_S))
        leases = [r for r in results if isinstance(r, Lease)]
        assert len(leases) == 1
        assert leases[0].epoch == turn + 1
        assert results.count(None) == 7
        clock.pass_(LEASE_S)


#: a call of each method that takes a lease
LEASED: dict[str, Callable[[Store, Lease], Any]] = {
    "renew": lambda store, lease: store.renew(lease, LEASE_S),
    "release": lambda store, lease: store.release(lease),
    "set_run_state": lambda store, lease: store.set_run_state("r1", "finished", lease=lease),
    "bind": lambda store, lease: StoreJournal(store, lease).bind({"seed": "0"}),
    "commit": lambda store, lease: commit(store, lease, 1),
    "put_result": lambda store, lease: StoreJournal(store, lease).put("scores", {"loss": 1.0}),
    "open_round": lambda store, lease: store.open_round(lease, Round(3, ("a",), 1), "base3"),
    "apply": lambda store, lease: store.apply("r1", 2, DeadlinePassed(2), lease=lease),
    "add_tasks": lambda store, lease: store.add_tasks(lease, [task("a", 3)]),
    "withdraw": lambda store, lease: store.withdraw(lease, ["r1-2-a-train"], "no more needed"),
    "drop_result": lambda store, lease: StoreJournal(store, lease).drop("kept"),
    "charge": lambda store, lease: StoreLedger(store, lease, None).charge(2, {"a": SPEND}),
    "give_up": lambda store, lease: store.give_up(lease, "r1-2-a-train", ["a"], "it is away"),
}


def _run_out(store: Store, clock: Clock) -> None:
    clock.pass_(LEASE_S)


def _taken(store: Store, clock: Clock) -> None:
    clock.pass_(LEASE_S)
    lead(store, owner="B")


def _claimed_again(store: Store, clock: Clock) -> None:
    lead(store, owner="A")


def _released(store: Store, clock: Clock) -> None:
    store.release(Lease("r1", "A", 1, 0.0))


@pytest.fixture
def led(store: Store) -> Lease:
    """The lease of a run with a result, a closed round 1 and an open round 2."""
    add_run(store)
    lease = lead(store)
    store.put_result(lease, "kept", {})
    store.put_result(lease, "noise/0002", {})
    open_round(store, lease)
    close_round(store)
    open_round(store, lease, 2)
    return lease


def test_no_method_that_takes_a_lease_is_forgotten_here() -> None:
    methods = inspect.getmembers(Store, inspect.isfunction)
    assert {name for name, method in methods if "lease" in inspect.signature(method).parameters} == set(LEASED)


@pytest.mark.parametrize("loss", [_run_out, _taken, _claimed_again, _released])
def test_a_leader_that_wakes_past_its_lease_changes_nothing(
    store: Store, clock: Clock, led: Lease, loss: Callable[[Store, Clock], None]
) -> None:
    loss(store, clock)
    before = everything(store)
    for name, call in LEASED.items():
        with pytest.raises(LeaseLost, match="A no longer leads run 'r1'"):
            call(store, led)
        assert everything(store) == before, name


def test_a_claim_waits_for_what_the_leader_is_in_the_middle_of(another: Callable[[], Store], clock: Clock) -> None:
    """Else a leader that was checked and then stopped could write after another has taken over."""
    store, other = another(), another()
    add_run(store)
    lease, checked, go_on = lead(store), Event(), Event()

    def write(tx: Writing) -> None:
        hold(tx, lease)
        checked.set()
        assert go_on.wait(timeout=60)
        tx.execute(tables.results.insert(), {"run": "r1", "key": "k", "record": "{}"})

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(store.database.write, write)
        assert checked.wait(timeout=60)
        clock.pass_(LEASE_S)
        claiming = threads.submit(other.claim, "r1", "B", LEASE_S)
        assert wait([claiming], timeout=0.3).not_done == {claiming}
        go_on.set()
        writing.result(timeout=60)
        heir = claiming.result(timeout=60)
    assert heir is not None
    assert heir.epoch == lease.epoch + 1
    assert other.result("r1", "k") == {}


@pytest.mark.parametrize("name", LEASED)
def test_a_leader_within_its_lease_changes_something(store: Store, clock: Clock, led: Lease, name: str) -> None:
    clock.pass_(LEASE_S - 0.01)
    before = everything(store)
    LEASED[name](store, led)
    assert everything(store) != before


# --- the journal --------------------------------------------------------------------------------------------------


def test_a_round_is_committed_once(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    journal = StoreJournal(store, lease)
    assert journal.last_round() == 0
    assert journal.commits() == {}
    journal.commit(0, {"state": {"frame": "f0"}})
    open_round(store, lease)
    close_round(store)
    commit(store, lease, 1)
    assert journal.last_round() == 1
    assert journal.commits() == {
        0: {"state": {"frame": "f0"}},
        1: {"answered": ["a", "b", "c"], "state": {"frame": "f1"}},
    }
    before = everything(store)
    for number in (0, 1):
        with pytest.raises(StateError, match=f"round {number} of run 'r1' is committed already"):
            journal.commit(number, {"state": {"frame": "another"}})
    assert everything(store) == before


def test_only_a_closed_round_is_committed(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    with pytest.raises(StateError, match="round 1 of run 'r1' is not in"):
        commit(store, lease, 1)
    open_round(store, lease)
    with pytest.raises(StateError, match="a round that is open cannot be committed"):
        commit(store, lease, 1)
    store.apply("r1", 1, DeadlinePassed(1), lease=lease)
    with pytest.raises(StateError, match="a round that is abandoned cannot be committed"):
        commit(store, lease, 1)
    assert store.commits("r1") == {}


def test_rounds_are_committed_in_their_order(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    for number in (1, 2):
        open_round(store, lease, number)
        close_round(store, number)
    before = everything(store)
    with pytest.raises(StateError, match="round 2 of run 'r1' cannot be committed: 1 is the next"):
        commit(store, lease, 2)
    assert everything(store) == before
    commit(store, lease, 1)
    commit(store, lease, 2)
    assert list(store.commits("r1")) == [1, 2]


def test_a_commit_spends_the_rounds_updates_and_ends_its_work(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease, target=2)
    late = store.open_upload(upload("c"))
    assert answer(store, "a").accepted
    assert answer(store, "b").accepted
    assert [u.site for u in store.accepted_uploads("r1", 1)] == ["a", "b"]
    assert store.spent_uploads("r1") == []
    store.add_tasks(lease, [task("a", 1, kind="evaluate")])
    commit(store, lease, 1)
    assert store.accepted_uploads("r1", 1) == []
    found = store.round_state("r1", 1)
    assert found is not None
    assert found[0].phase is Phase.COMMITTED
    assert {u.site: (u.state, u.code) for u in store.spent_uploads("r1")} == {
        "a": ("spent", ""),
        "b": ("spent", ""),
        "c": ("refused", "round-closed"),
    }
    assert store.open_tasks("c") == []
    assert [row.kind for row in store.open_tasks("a")] == ["evaluate"]
    assert store.accept_upload(late.id).reason == "round 1 is committed"
    last = store.audit_entries()[-1]
    assert (last.action, last.subject, last.details["round"]) == ("round committed", "r1", 1)


def test_a_run_stays_bound_to_what_it_began_with(store: Store) -> None:
    add_run(store)
    journal = StoreJournal(store, lead(store))
    journal.bind({"seed": "0", "model": "abc"})
    journal.bind({"seed": "0", "data": "def"})
    with pytest.raises(StateError, match="another model: abc, now xyz"):
        journal.bind({"model": "xyz"})


def test_results_are_kept_by_key(store: Store) -> None:
    add_run(store)
    add_run(store, "r2")
    journal, other = StoreJournal(store, lead(store)), StoreJournal(store, lead(store, "r2"))
    assert journal.get("scores/base") is None
    journal.put("scores/base", {"loss": 2.5})
    journal.put("scores/base", {"loss": 1.5, "said": "æ"})
    assert journal.get("scores/base") == {"loss": 1.5, "said": "æ"}
    assert other.get("scores/base") is None
    assert journal.kept_updates(1) == {}


# --- rounds -------------------------------------------------------------------------------------------------------


def test_a_round_is_taken_over_as_it_is(store: Store, clock: Clock) -> None:
    add_run(store)
    open_round(store, lead(store))
    assert answer(store, "b").accepted
    clock.pass_(LEASE_S)
    heir = lead(store, owner="B")
    round, base = store.open_round(heir, Round(1, ("a", "b"), 1), "another base")
    assert (round.cohort, round.answered, base) == (("a", "b", "c"), ("b",), "base1")
    assert store.round_state("r1", 1) == (round, base)
    assert store.round_state("r1", 2) is None


def test_a_round_hears_of_failures_and_of_time(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    assert store.apply("r1", 1, Failed("a", 1, "out of memory")).accepted
    assert store.apply("r1", 1, Failed("a", 1, "again")).reason == "site 'a' was given up in round 1"
    assert answer(store, "b").accepted
    with pytest.raises(ValueError, match="DeadlinePassed"):
        store.apply("r1", 1, DeadlinePassed(1))
    assert store.apply("r1", 1, DeadlinePassed(1), lease=lease).accepted
    found = store.round_state("r1", 1)
    assert found is not None
    assert found[0].phase is Phase.ABANDONED
    assert (found[0].failed, found[0].late) == ({"a": "out of memory"}, ("c",))
    with pytest.raises(StateError, match="round 7 of run 'r1' is not in"):
        store.apply("r1", 7, Failed("a", 7, "broken"))


@pytest.mark.parametrize("event", [Answered("a", 1), Committed(1)])
def test_answers_and_commits_come_by_their_own_doors(store: Store, event: Any) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    with pytest.raises(ValueError, match=type(event).__name__):
        store.apply("r1", 1, event, lease=lease)


@pytest.mark.parametrize(("kept", "states"), [((), ["refused"]), (("b",), ["accepted"])])
def test_an_abandoned_round_is_begun_anew(store: Store, kept: tuple[str, ...], states: list[str]) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    first = store.open_upload(upload("b"))
    assert store.accept_upload(first.id).accepted
    store.apply("r1", 1, DeadlinePassed(1), lease=lease)
    round, base = store.open_round(lease, Round(1, ("a", "b"), 2, answered=kept), "base1")
    assert (round.phase, round.answered, base) == (Phase.OPEN, kept, "base1")
    again = store.upload(first.id)
    assert again is not None
    assert [again.state] == states
    if kept:
        with pytest.raises(Refused, match="counts in round 1 already"):
            store.open_upload(upload("b", manifest=b"second"))
    else:
        assert answer(store, "b", manifest=b"second").accepted
    assert answer(store, "a").accepted
    assert [u.site for u in store.accepted_uploads("r1", 1)] == ["a", "b"]


def test_a_committed_round_is_not_opened_again(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    close_round(store)
    commit(store, lease, 1)
    with pytest.raises(StateError, match="round 1 of run 'r1' is committed already"):
        store.open_round(lease, Round(1, ("a",), 1), "base")


# --- tasks --------------------------------------------------------------------------------------------------------


def test_a_task_is_offered_taken_and_done(store: Store, clock: Clock) -> None:
    add_run(store)
    lease = lead(store)
    store.add_tasks(lease, [task("a", 1, deadline_at=clock.now + 60)])
    clock.pass_(1)
    store.add_tasks(lease, [task("a", 0, kind="evaluate"), task("b", 0, kind="evaluate")])
    store.add_tasks(lease, [])
    offered = store.open_tasks("a")
    assert [(row.kind, row.state) for row in offered] == [("train", "offered"), ("evaluate", "offered")]
    assert offered[0].deadline_at == clock.now + 59
    taken = store.reply(offered[0].id, "a", "taken")
    assert taken is not None
    assert taken.is_open
    done = store.reply(offered[0].id, "a", "done", result=b"{}")
    assert done is not None
    assert (done.state, done.result, done.is_open) == ("done", b"{}", False)
    assert store.reply(offered[0].id, "a", "failed", "out of memory") == done  # the first word stands
    assert store.task(offered[0].id) == done
    assert [row.kind for row in store.open_tasks("a")] == ["evaluate"]
    assert [row.id for row in store.tasks("r1", 1)] == [offered[0].id]
    assert len(store.tasks("r1")) == 3


def test_a_reply_to_a_task_of_another_site_is_refused(store: Store) -> None:
    add_run(store)
    store.add_tasks(lead(store), [task("a")])
    with pytest.raises(Refused, match="is not b's") as refused:
        store.reply("r1-1-a-train", "b", "done")
    assert refused.value.code is Refusal.WRONG_SITE
    assert store.reply("never offered", "b", "done") is None
    assert [row.state for row in store.tasks("r1")] == ["offered"]


def test_withdrawn_tasks_are_no_longer_offered(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    store.reply("r1-1-a-train", "a", "done")
    ids = ["r1-1-a-train", "r1-1-b-train", "no such task"]
    assert store.withdraw(lease, ids, "enough have answered") == ["r1-1-b-train"]
    assert store.withdraw(lease, ids, "again") == []
    assert store.open_tasks("b") == []
    after = store.reply("r1-1-b-train", "b", "done")
    assert after is not None
    assert (after.state, after.reason) == ("withdrawn", "enough have answered")


def test_a_leader_offers_tasks_of_its_own_run_once(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    store.add_tasks(lease, [task("a")])
    with pytest.raises(StateError, match="refuses an entry"):
        store.add_tasks(lease, [task("b"), task("a")])
    with pytest.raises(ValueError, match="another run"):
        store.add_tasks(lease, [task("a", run="r2")])
    assert [row.site for row in store.tasks("r1")] == ["a"]


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(store: Store) -> Lease:
    """The lease of a run whose round 1 is open."""
    add_run(store)
    lease = lead(store)
    open_round(store, lease)
    return lease


def test_an_upload_counts_once_however_often_it_is_sent(store: Store, opened: Lease, clock: Clock) -> None:
    first = store.open_upload(upload("a"))
    assert (first.state, first.opened_at, first.verdict) == ("open", clock.now, None)
    clock.pass_(1)
    assert store.open_upload(replace(upload("a"), id="another id")) == first
    assert store.find_upload("r1", 1, "a", first.digest) == first
    assert store.find_upload("r1", 1, "b", first.digest) is None
    assert [store.accept_upload(first.id).accepted for _ in range(3)] == [True, True, True]
    found = store.round_state("r1", 1)
    assert found is not None
    assert found[0].answered == ("a",)
    again = store.open_upload(upload("a"))
    assert (again.id, again.state) == (first.id, "accepted")
    finished = store.task(first.task)
    assert finished is not None
    assert finished.state == "done"
    accepted = [e for e in store.audit_entries() if e.action == "update accepted"]
    assert [(e.actor, e.subject, e.details) for e in accepted] == [("a", "r1", {"round": 1, "manifest": first.digest})]


def test_another_update_of_a_site_that_counts_already_is_refused(store: Store, opened: Lease) -> None:
    second = store.open_upload(upload("a", manifest=b"second"))
    assert answer(store, "a").accepted
    with pytest.raises(Refused, match="another update of a counts") as refused:
        store.open_upload(upload("a", manifest=b"third"))
    assert refused.value.code is Refusal.REPLAYED
    assert store.accept_upload(second.id).reason == "site 'a' has answered round 1 already"
    stored = store.upload(second.id)
    assert stored is not None
    assert (stored.state, stored.code) == ("refused", "replayed")


def test_uploads_that_no_round_would_take_are_refused_at_once(store: Store, opened: Lease) -> None:
    def code(*arguments: Any, **options: Any) -> Refusal:
        with pytest.raises(Refused) as refused:
            store.open_upload(upload(*arguments, **options))
        return refused.value.code

    assert code("a", run="r9") is Refusal.UNKNOWN_RUN
    assert code("a", 5) is Refusal.WRONG_TASK
    assert code("stranger") is Refusal.NOT_INVITED
    store.apply("r1", 1, Failed("a", 1, "broken"))
    assert code("a") is Refusal.ROUND_CLOSED
    open_round(store, opened, 2, target=1)
    assert answer(store, "b", 2).accepted
    assert code("c", 2) is Refusal.ENOUGH
    store.set_run_state("r1", "cancelled")
    assert code("b") is Refusal.RUN_ENDED


def test_an_upload_that_comes_too_late_is_refused_with_a_code(store: Store, opened: Lease) -> None:
    late = store.open_upload(upload("c"))
    assert answer(store, "a").accepted
    assert answer(store, "b").accepted
    store.apply("r1", 1, DeadlinePassed(1), lease=opened)
    assert [store.accept_upload(late.id).reason for _ in range(2)] == ["round 1 is closed"] * 2
    stored = store.upload(late.id)
    assert stored is not None
    assert (stored.state, stored.code, stored.verdict) == ("refused", "round-closed", store.accept_upload(late.id))
    ended = store.task(late.task)
    assert ended is not None
    assert (ended.state, ended.reason) == ("failed", "round 1 is closed")


def test_an_upload_to_a_run_that_ended_meanwhile_is_refused(store: Store, opened: Lease) -> None:
    late = store.open_upload(upload("c"))
    store.set_run_state("r1", "failed")
    assert store.accept_upload(late.id).reason == "run 'r1' is failed"
    assert [u.code for u in store.spent_uploads("r1")] == ["run-ended"]


def test_a_refused_upload_gives_its_site_up(store: Store, opened: Lease) -> None:
    bad = store.open_upload(upload("a"))
    verdict = store.refuse_upload(bad.id, Refusal.NON_FINITE, "lora_A is not finite")
    assert (verdict.accepted, verdict.reason) == (False, "lora_A is not finite")
    assert store.refuse_upload(bad.id, Refusal.WRONG_SHAPE, "again") == verdict
    assert store.accept_upload(bad.id) == verdict
    found = store.round_state("r1", 1)
    assert found is not None
    assert found[0].failed == {"a": "lora_A is not finite"}
    ended = store.task(bad.task)
    assert ended is not None
    assert ended.state == "failed"
    assert [(e.actor, e.details["code"]) for e in store.audit_entries() if e.action == "update refused"] == [
        ("a", "non-finite")
    ]
    good = store.open_upload(upload("b"))
    assert store.accept_upload(good.id).accepted
    assert store.refuse_upload(good.id, Refusal.NON_FINITE, "too late to say").accepted


def test_nothing_is_decided_of_an_upload_that_is_not_there(store: Store) -> None:
    assert store.upload("u9") is None
    for decide in (
        lambda: store.accept_upload("u9"),
        lambda: store.refuse_upload("u9", Refusal.MALFORMED, ""),
        lambda: store.forget_upload("u9"),
    ):
        with pytest.raises(StateError, match="upload 'u9' is not in"):
            decide()


def test_what_is_deleted_is_forgotten_but_a_repeat_gets_its_answer(store: Store, opened: Lease) -> None:
    close_round(store)
    commit(store, opened, 1)
    for spent in store.spent_uploads("r1"):
        store.forget_upload(spent.id)
    assert store.spent_uploads("r1") == []
    again = store.open_upload(upload("a"))
    assert (again.state, again.counts, again.data_key, again.blob) == ("spent", True, None, "")
    assert store.accept_upload(again.id).accepted


def test_all_uploads_of_a_run_that_ended_are_to_be_deleted(store: Store, opened: Lease) -> None:
    assert answer(store, "a").accepted
    store.open_upload(upload("b"))
    store.set_run_state("r1", "failed")
    assert [(u.site, u.state) for u in store.spent_uploads("r1")] == [("a", "accepted"), ("b", "open")]


def test_updates_that_arrive_together_are_counted_once_each_and_never_more_than_enough(
    another: Callable[[], Store],
) -> None:
    stores = [another(), another()]
    add_run(stores[0])
    lease = lead(stores[0])
    sites = "abcdefgh"
    open_round(stores[0], lease, cohort=tuple(sites), target=4)
    uploads = [stores[0].open_upload(upload(site, manifest=m)) for site in sites for m in (b"one", b"two")]
    verdicts = at_once(len(uploads), lambda k: stores[k % 2].accept_upload(uploads[k].id))
    assert [v for v in verdicts if isinstance(v, Exception)] == []
    accepted = stores[0].accepted_uploads("r1", 1)
    found = stores[0].round_state("r1", 1)
    assert found is not None
    assert len(accepted) == 4
    assert {u.site for u in accepted} == set(found[0].answered)
    assert found[0].phase is Phase.CLOSED


def test_nothing_that_a_round_hears_at_one_instant_is_lost(another: Callable[[], Store]) -> None:
    stores = [another(), another()]
    add_run(stores[0])
    sites = "abcdefgh"
    open_round(stores[0], lead(stores[0]), cohort=tuple(sites), needed=4)
    opened = {site: stores[0].open_upload(upload(site)).id for site in sites[::2]}

    def hear(k: int) -> bool:
        store, site = stores[k // 2 % 2], sites[k]
        if site in opened:
            return store.accept_upload(opened[site]).accepted
        return store.apply("r1", 1, Failed(site, 1, "broken")).accepted

    assert at_once(len(sites), hear) == [True] * len(sites)
    found = stores[0].round_state("r1", 1)
    assert found is not None
    assert (set(found[0].answered), set(found[0].failed)) == (set(sites[::2]), set(sites[1::2]))
    assert found[0].phase is Phase.CLOSED


def test_the_database_itself_holds_that_one_upload_of_a_site_counts(store: Store, opened: Lease) -> None:
    for manifest in (b"one", b"two"):
        store.open_upload(upload("a", manifest=manifest))
    force = tables.uploads.update().values(state="accepted")
    with pytest.raises(StateError, match="refuses an entry"):
        store.database.write(lambda tx: tx.execute(force).rowcount)


def test_a_commit_and_an_answer_at_the_same_instant_agree(another: Callable[[], Store]) -> None:
    """Over-selection: a late answer races with the commit; whatever wins, the books are consistent."""
    stores = [another(), another()]
    add_run(stores[0])
    lease = lead(stores[0])
    for number in range(1, 9):
        open_round(stores[0], lease, number, target=2)
        assert answer(stores[0], "a", number).accepted
        late = [stores[1].open_upload(upload(site, number)).id for site in "bc"]

        def close(k: int, number: int = number, late: list[str] = late) -> Any:
            return stores[1].accept_upload(late[k]) if k < 2 else commit(stores[0], lease, number)

        results = at_once(3, close)
        assert [r.accepted for r in results[:2]].count(True) <= 1  # type: ignore[union-attr]
        if isinstance(results[2], StateError):
            commit(stores[0], lease, number)
        counted = [u for u in stores[0].spent_uploads("r1") if u.round == number and u.counts]
        found = stores[0].round_state("r1", number)
        assert found is not None
        assert {u.site for u in counted} == set(found[0].answered)
        assert len(counted) == 2


# --- events and presence ------------------------------------------------------------------------------------------


def test_events_are_numbered_within_their_run(store: Store) -> None:
    add_run(store)
    add_run(store, "r2")
    assert store.add_events("r1", ["{}", '{"event": "æ"}']) == 2
    assert store.add_events("r2", ["{}"]) == 1
    assert store.add_events("r1", []) == 2
    assert store.add_events("r1", ['{"event": "third"}']) == 3
    assert store.events("r1") == [(1, "{}"), (2, '{"event": "æ"}'), (3, '{"event": "third"}')]
    assert store.events("r1", after=2) == [(3, '{"event": "third"}')]
    assert store.events("r1", after=1, limit=1) == [(2, '{"event": "æ"}')]
    with pytest.raises(StateError, match="run 'r9' is not in"):
        store.add_events("r9", ["{}"])


def test_events_of_many_writers_have_no_gaps(another: Callable[[], Store]) -> None:
    stores = [another(), another()]
    add_run(stores[0])
    at_once(8, lambda k: [stores[k % 2].add_events("r1", [f'"{k}-{n}-0"', f'"{k}-{n}-1"']) for n in range(3)])
    events = stores[0].events("r1")
    assert [sequence for sequence, _ in events] == list(range(1, 49))
    for (_, one), (_, other) in zip(events[::2], events[1::2], strict=True):
        assert (one[:-2], one[-2], other[-2]) == (other[:-2], "0", "1")  # a writer's lines stay together


def test_a_site_attends_in_one_session(store: Store, clock: Clock) -> None:
    store.attend("north", "A", "s1")
    clock.pass_(5)
    assert store.seen("north", "s1")
    assert store.attending() == {"north": ("A", clock.now)}
    store.attend("north", "B", "s2")
    assert not store.seen("north", "s1")
    store.left("north", "s1")  # the old session's end comes late
    assert store.attending() == {"north": ("B", clock.now)}
    store.left("north", "s2")
    assert store.attending() == {}
    assert not store.seen("north", "s2")


def test_the_tables_hold_nothing_that_a_test_here_did_not_fill(store: Store, led: Lease) -> None:
    """A table that no method fills is one too many."""
    token(store)
    store.redeem_token("t1", KEY)
    store.add_certificate("aa", "north", 3_000_000.0)
    store.put_member("r1", "a", "joined")
    store.add_events("r1", ["{}"])
    store.attend("a", "A", "s1")
    for name in ("bind", "put_result", "commit", "charge"):
        LEASED[name](store, led)
    assert {name for name, rows in everything(store).items() if not rows} == set()
    assert set(everything(store)) == {table.name for table in tables.metadata.sorted_tables}
    assert sa.inspect(store.database._writers).get_table_names()


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_a_budget_is_of_all_runs_together(store: Store) -> None:
    limit = Budget(unit="site", epsilon=epsilon(Releases(4.0, 3), 1e-5), delta=1e-5)
    for run in ("r1", "r2"):
        add_run(store, run)
    first, second = (StoreLedger(store, lead(store, run), limit) for run in ("r1", "r2"))
    both = {"a": SPEND, "b": SPEND}
    for _ in range(2):
        first.charge(1, both)
        first.charge(2, both)
    second.charge(1, {"a": SPEND})
    for refused in (second.check, second.charge):
        with pytest.raises(BudgetError, match="site 'a': the budget is ε = "):
            refused(2, both)
    second.charge(1, {"a": SPEND})  # it has paid for that round
    counted = {(line.run, line.site): line.spend.count for line in store.spent()}
    assert counted == {("small (r1)", "a"): 2, ("small (r1)", "b"): 2, ("small (r2)", "a"): 1}
    StoreLedger(store, lead(store), None).charge(3, {"c": UNPROTECTED})  # no budget, but it is known
    assert cost([line.spend for line in store.spent() if line.site == "c"], "site", 1e-5) == float("inf")


def test_runs_at_the_same_time_do_not_overspend(another: Callable[[], Store]) -> None:
    stores, runs = [another(), another()], ["r1", "r2", "r3", "r4"]
    limit = Budget(unit="site", epsilon=epsilon(Releases(4.0, 10), 1e-5), delta=1e-5)
    for run in runs:
        add_run(stores[0], run)
    leases = [lead(stores[0], run) for run in runs]

    def spend(place: int) -> int:
        ledger = StoreLedger(stores[place % 2], leases[place], limit)
        for round in range(1, 7):
            try:
                ledger.charge(round, {"a": SPEND})
            except BudgetError:
                return round - 1
        return 6

    found = at_once(4, spend)
    assert sum(done for done in found if isinstance(done, int)) == 10, found
    assert sum(line.spend.count for line in stores[1].spent()) == 10


def test_noise_of_a_run_that_has_ended_is_struck_out(store: Store, led: Lease) -> None:
    store.put_result(led, "noisy", {"loss": 1})
    store.set_run_state("r1", "failed", error="no more budget", lease=led)
    assert store.result("r1", "noise/0002") is None
    assert store.result("r1", "noisy") == {"loss": 1}


# --- versions


def version(store: Store, number: int) -> Version:
    found = store.round_state("r1", number)
    assert found is not None
    assert isinstance(found[0], Version)
    return found[0]


def test_the_next_version_opens_as_a_buffer_fills(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    commit(store, lease, 0)
    open_version(store, lease)
    assert answer(store, "b").accepted
    assert answer(store, "b").accepted, "once more is nothing new"
    assert store.round_state("r1", 2) is None
    assert answer(store, "a").accepted
    assert version(store, 1).answers == (("b", 0), ("a", 0))
    assert version(store, 1).phase is Phase.CLOSED
    assert answer(store, "c").accepted, "the first is not combined yet"
    assert version(store, 2).answers == (("c", 0),)
    assert store.bases_in_use("r1") == {"base"}
    commit(store, lease, 1)
    assert [u.site for u in store.spent_uploads("r1")] == ["a", "b"], "what lies in the next buffer stays"
    assert [u.site for u in store.accepted_uploads("r1", 1)] == ["c"]
    known, _ = store.open_round(lease, Version.first(2, 2, 1, 6), "base2")
    assert known == version(store, 2)


def test_an_update_that_is_too_stale_is_refused_and_a_task_that_would_be_is_withdrawn(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    commit(store, lease, 0)
    open_version(store, lease, sites="abcd")
    on_its_way = store.open_upload(upload("c"))
    for number in (1, 2):
        for site in "ab":
            assert answer(store, site, number).accepted
        if number == 1:
            commit(store, lease, 1)
            assert set(store.open_training("r1").values()) == {("c", 1), ("d", 1)}
            open_version(store, lease, 2, sites="ab")
    verdict = store.accept_upload(on_its_way.id)
    assert (verdict.accepted, verdict.reason) == (
        False,
        "it is 2 versions behind, more than max_staleness 1; fresh work is given out instead",
    )
    found = store.upload(on_its_way.id)
    assert found is not None
    assert (found.state, found.code) == ("refused", Refusal.STALE)
    with pytest.raises(Refused) as refused:
        store.open_upload(upload("d"))
    assert refused.value.code is Refusal.STALE
    commit(store, lease, 2)
    assert store.open_training("r1") == {}
    late = store.task(task("d").id)
    assert late is not None
    assert (late.state, "too stale" in late.reason) == ("withdrawn", True)


def test_two_updates_for_one_task_count_once_though_a_version_lies_between(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    commit(store, lease, 0)
    open_version(store, lease)
    second = store.open_upload(upload("a", manifest=b"second"))
    assert answer(store, "a").accepted
    assert answer(store, "b").accepted
    assert version(store, 2).phase is Phase.OPEN
    assert not store.accept_upload(second.id).accepted
    found = store.upload(second.id)
    assert found is not None
    assert found.code == Refusal.REPLAYED
    assert version(store, 2).answers == ()


def test_after_the_last_version_nothing_is_accepted_and_every_task_is_over(store: Store) -> None:
    add_run(store)
    lease = lead(store)
    commit(store, lease, 0)
    open_version(store, lease, last=1)
    assert answer(store, "a").accepted
    assert answer(store, "b").accepted
    with pytest.raises(Refused) as refused:
        answer(store, "c")
    assert refused.value.code is Refusal.ENOUGH
    assert store.round_state("r1", 2) is None
    commit(store, lease, 1)
    assert store.open_training("r1") == {}


def test_an_abandoned_version_stays_so_whoever_leads_next(store: Store) -> None:
    """What was accepted into it is not refused after all; it goes when the run has failed."""
    add_run(store)
    lease = lead(store)
    commit(store, lease, 0)
    open_version(store, lease)
    assert answer(store, "a").accepted
    assert store.apply("r1", 1, DeadlinePassed(1), lease=lease).accepted
    found, _ = store.open_round(lead(store), Version.first(1, 2, 1, 6), "base1")
    assert (found.phase, found.answered) == (Phase.ABANDONED, ("a",))
    assert [u.site for u in store.accepted_uploads("r1", 1)] == ["a"]
    with pytest.raises(Refused, match="version 1 is abandoned"):
        answer(store, "b")


def test_many_answers_at_one_instant_fill_buffer_after_buffer(another: Callable[[], Store]) -> None:
    """By several replicas: each update is in one buffer, each buffer but the last is full."""
    stores = [another() for _ in range(4)]
    sites = [f"s{k}" for k in range(11)]
    add_run(stores[0])
    lease = lead(stores[0])
    commit(stores[0], lease, 0)
    stores[0].open_round(lease, Version.first(1, 2, 9, 9), "base1")
    stores[0].add_tasks(lease, [task(site) for site in sites])
    names = [stores[0].open_upload(upload(site)).id for site in sites]
    verdicts = at_once(len(sites), lambda k: stores[k % 4].accept_upload(names[k]))
    assert verdicts == [Verdict(True)] * len(sites)
    found = [version(stores[0], number) for number in range(1, 7)]
    assert [len(one.answers) for one in found] == [2, 2, 2, 2, 2, 1]
    assert sorted(site for one in found for site in one.answered) == sorted(sites)
    assert stores[0].round_state("r1", 7) is None
