"""A site's records and its log of what left: counted before it is sent, kept across crashes, changes noticed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commonweight.errors import AccessError, PolicyError, StateError, StorageError
from commonweight.privacy.accounting import Releases, epsilon
from commonweight.privacy.spending import UNPROTECTED, Spend
from commonweight.site.audit import START, SiteAudit
from commonweight.site.policy import Spent, decide, decide_task
from commonweight.site.records import Head, SiteRecords

from .site_policies import PLAIN, make_facts, make_policy


class Clock:
    """Seconds that pass one a look."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SiteRecords]:
    opened = SiteRecords(tmp_path / "state.sqlite", clock=Clock())
    yield opened
    opened.close()


def spend(records: SiteRecords, num_bytes: int, *, run: str = "r1", round: int = 1, **fields: Any) -> None:
    policy = make_policy(**fields)
    records.spend(policy, run=run, round=round, what="update", num_bytes=num_bytes)


# ---- what leaves


def test_bytes_are_counted_by_round_run_and_in_total(records: SiteRecords) -> None:
    for run, round, num_bytes in (("r1", 1, 500), ("r1", 1, 300), ("r1", 2, 70), ("r2", 1, 5)):
        spend(records, num_bytes, run=run, round=round)
    once, twice = (UNPROTECTED,), (replace(UNPROTECTED, count=2),)
    assert records.spent("r1", 1) == Spent(800, 870, 875, spends_run=once, spends_others=once)
    assert records.spent("r2", 7) == Spent(0, 5, 875, spends_run=once, spends_others=twice)
    first, *_ = records.sent("r1")
    assert (first.what, first.bytes, first.chunks) == ("update", 800, 2)
    assert first.first_t < first.last_t
    assert len(records.sent()) == 3


def test_an_update_costs_privacy_once_a_round_and_never_more_than_the_budget(records: SiteRecords) -> None:
    z = Spend("site", "gaussian", 4.0)
    allowed = {"unit": "site", "epsilon": epsilon(Releases(4.0, 3), 1e-5), "delta": 1e-5}
    policy = make_policy(privacy__budget=allowed, max_bytes_per_round="1 MiB", max_bytes_total="1 MiB")

    def send(run: str, round: int, spend: Spend = z, what: str = "update") -> None:
        records.spend(policy, run=run, round=round, what=what, num_bytes=1, spend=spend)

    for run, round in (("r1", 1), ("r1", 2), ("r1", 1), ("r2", 1), ("r1", 2), ("r2", 1)):
        send(run, round)
    for run, round in (("r1", 3), ("r2", 2), ("r3", 1)):
        with pytest.raises(PolicyError, match=r"privacy\.budget: the budget is ε = .* and this would make it"):
            send(run, round)
    assert records.spent("r1", 3).bytes_round == 0
    send("r3", 1, what="scores")  # costs nothing that is counted
    assert records.spends() == [("r1", replace(z, count=2)), ("r2", z)]
    spent = records.spent("r1", 2)
    assert (spent.spends_run, spent.spends_others) == ((z,), (z,))
    facts = make_facts(spend=z, rounds=1)
    assert decide_task(policy, facts, "train", 1, 5, records.spent("r1", 1)).allowed, "this round has paid"
    assert "in this round" in decide_task(policy, replace(facts, rounds=2), "train", 2, 5, records.spent("r3", 2)).text


def test_what_is_sent_again_counts_again_up_to_the_limit(records: SiteRecords) -> None:
    spend(records, 1_000)
    spend(records, 1_000)
    with pytest.raises(PolicyError, match=r"max_bytes_per_round is 2,000 bytes .*have left already; asked: 1 bytes"):
        spend(records, 1)
    assert records.spent("r1", 1).bytes_round == 2_000  # what was refused was not counted
    spend(records, 1, round=2)


def test_a_tightened_policy_holds_for_the_next_byte(records: SiteRecords) -> None:
    spend(records, 100)
    with pytest.raises(PolicyError, match="max_bytes_total"):
        spend(records, 1, max_bytes_total=100)


def test_what_may_not_leave_is_not_counted(records: SiteRecords) -> None:
    policy = make_policy(share__samples=False)
    with pytest.raises(PolicyError, match=r"share\.samples"):
        records.spend(policy, run="r1", round=0, what="samples", num_bytes=10)
    assert records.sent() == []


def test_sendings_at_the_same_time_cannot_pass_a_limit_together(tmp_path: Path) -> None:
    path, policy = tmp_path / "state.sqlite", make_policy(max_bytes_total=1_000)
    doors = [SiteRecords(path) for _ in range(3)]

    def send(k: int) -> int:
        try:
            doors[k % 3].spend(policy, run=f"r{k % 5}", round=k % 7, what="update", num_bytes=30)
        except PolicyError:
            return 0
        return 30

    with ThreadPoolExecutor(8) as pool:
        left = sum(pool.map(send, range(60)))
    assert left == doors[0].spent("r0").bytes_total == 990
    for door in doors:
        door.close()


def test_records_outlive_a_kill(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from commonweight.site.records import SiteRecords
from tests.unit.site_policies import PLAIN, make_policy
records = SiteRecords(Path(sys.argv[1]))
records.add_job("d", PLAIN)
records.take_task("t1", run="r1", round=1, kind="train", body=b"{}")
policy = make_policy(max_bytes_per_round=10**12, max_bytes_total=10**12)
while True:
    records.spend(policy, run="r1", round=1, what="update", num_bytes=1)
    print(records.spent("r1").bytes_total, flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "state.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    records = SiteRecords(tmp_path / "state.sqlite")
    assert records.spent("r1").bytes_total in (told[-1], told[-1] + 1)
    assert [task.id for task in records.tasks_in_hand()] == ["t1"]
    records.close()


# ---- jobs, rounds, approvals


def test_a_run_is_one_job(records: SiteRecords) -> None:
    records.add_job("d1", PLAIN)
    records.add_job("d1", PLAIN)
    with pytest.raises(AccessError, match="another job: d2, before d1"):
        records.add_job("d2", make_facts(rounds=99))
    job = records.job("r1")
    assert job is not None
    assert (job.digest, job.facts, job.state) == ("d1", PLAIN, "asked")
    assert len(records.alarms()) == 1
    assert records.job("r2") is None
    with pytest.raises(StateError, match="know no run r2"):
        records.set_job("r2", "joined")


def test_a_round_has_one_base(records: SiteRecords) -> None:
    records.take_round("r1", 1, "base1")
    records.take_round("r1", 1, "base1")
    records.take_round("r1", 2, "base2")
    with pytest.raises(AccessError, match="round 1 of run r1 was offered from other tensors: evil, before base1"):
        records.take_round("r1", 1, "evil")
    assert records.spent("r1", 2).rounds == 1  # other rounds than this one
    assert records.spent("r1", 3).rounds == 2
    assert "evil" in records.alarms()[0][1]


def test_runs_of_a_signer_are_those_that_were_joined(records: SiteRecords) -> None:
    policy = make_policy(approval="first-run")
    for run, key in (("r1", "k1"), ("r2", "k1"), ("r3", "k2")):
        records.add_job(run, make_facts(run=run, signer_key=key))
    records.set_job("r1", "refused", "models")
    assert decide(policy, PLAIN, records.spent("r2")).needs_approval
    records.set_job("r1", "joined")
    records.set_job("r1", "ended")
    assert records.spent("r2").runs_of_signer == 1
    assert not decide(policy, PLAIN, records.spent("r2")).needs_approval
    other = records.spent("r3")
    assert (other.runs, other.runs_of_signer) == (1, 0)
    assert records.spent("r1").runs == 0  # not itself


def test_a_person_decides_in_another_process(tmp_path: Path, records: SiteRecords) -> None:
    assert records.state("r1") is None
    assert records.ask("r1", PLAIN.summary()) == "pending"
    assert records.ask("r1", "other words") == "pending"
    door = SiteRecords(tmp_path / "state.sqlite")
    (question,) = door.pending()
    assert (question.run, question.summary) == ("r1", PLAIN.summary())
    door.decide("r1", True, by="ida")
    assert records.state("r1") == "approved"
    assert records.spent("r1").approval == "approved"
    assert records.pending() == []
    door.decide("r1", False, by="max")  # a person may think again
    assert records.ask("r1", PLAIN.summary()) == "denied"
    assert not decide(make_policy(), PLAIN, records.spent("r1")).allowed
    (question,) = records.questions()
    assert (question.state, question.decided_by) == ("denied", "max")
    with pytest.raises(StateError, match="no run r2 has asked") as caught:
        door.decide("r2", True, by="ida")
    assert "waiting for approval: none" in caught.value.hint
    door.close()


def test_old_runs_are_forgotten_but_not_what_left(records: SiteRecords) -> None:
    for run in ("r1", "r2", "r3", "r4"):
        records.add_job(run, make_facts(run=run))
        records.set_job(run, "joined")
        records.take_task(f"t-{run}", run=run, round=1, kind="train")
    spend(records, 5, run="r2")
    for run in ("r2", "r1", "r3"):
        records.set_job(run, "ended")
    assert records.runs_to_forget(2) == ["r2"]
    records.forget_run("r2")
    assert records.runs_to_forget(2) == []
    assert records.runs_to_forget(0) == ["r3", "r1"]
    assert records.spent("r2").bytes_run == 5
    assert [task.run for task in records.tasks_in_hand()] == ["r1", "r3", "r4"]
    assert [job.run for job in records.jobs()] == ["r1", "r2", "r3", "r4"]


# ---- tasks in hand


def test_a_task_is_taken_once_and_its_answer_can_be_given_again(records: SiteRecords) -> None:
    taken = records.take_task("t1", run="r1", round=2, kind="train", base="b", body=b'{"lr": 1}', deadline_t=9.5)
    assert records.take_task("t1", run="r9", round=9, kind="sample") == taken
    assert records.tasks_in_hand() == [taken]
    records.end_task("t1", "done", result=b"{}")
    records.end_task("t1", "done", result=b"{}")
    assert records.tasks_in_hand() == []
    again = records.take_task("t1", run="r1", round=2, kind="train")
    assert (again.state, again.result, again.body) == ("done", b"{}", b'{"lr": 1}')
    with pytest.raises(StateError, match="cannot end failed: it is done"):
        records.end_task("t1", "failed")
    with pytest.raises(StateError, match="it is not known"):
        records.end_task("t2", "done")
    with pytest.raises(ValueError, match="vanished"):
        records.end_task("t1", "vanished")
    assert records.task("t2") is None


# ---- the coordinator's audit log

HASHES = [bytes([k]) * 32 for k in range(5)]


def test_heads_go_forward(records: SiteRecords) -> None:
    assert records.last_head() is None
    for sequence in (1, 3, 3, 4):
        records.keep_head(sequence, HASHES[sequence], b"signature")
    assert records.last_head() == Head(4, HASHES[4], b"signature")
    assert [head.sequence for head in records.heads()] == [1, 3, 4]
    assert records.alarms() == []


@pytest.mark.parametrize(
    ("sequence", "hash", "says"),
    [
        (3, HASHES[3], "went back from entry 4 to 3: entries are missing"),
        (0, HASHES[0], "went back from entry 4 to 0"),
        (4, HASHES[2], "entry 4 of the coordinator's audit log was changed"),
    ],
)
def test_a_log_that_goes_back_or_forks_raises_an_alarm(
    tmp_path: Path, records: SiteRecords, sequence: int, hash: bytes, says: str
) -> None:
    records.keep_head(3, HASHES[3], b"")
    records.keep_head(4, HASHES[4], b"")
    with pytest.raises(AccessError, match=says):
        records.keep_head(sequence, hash, b"")
    door = SiteRecords(tmp_path / "state.sqlite")
    assert door.last_head() == Head(4, HASHES[4], b"")
    ((_, text),) = door.alarms()
    assert says in text
    door.close()


# ---- the file


def test_the_file_is_the_owners_alone(tmp_path: Path, records: SiteRecords) -> None:
    SiteAudit(tmp_path / "audit.jsonl", records).append("joined")
    for name in ("state.sqlite", "audit.jsonl"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, whatever its name may be\n" * 100)
    with pytest.raises(StateError, match="damaged"):
        SiteRecords(tmp_path / "text")
    with pytest.raises(StorageError):
        SiteRecords(tmp_path / "no" / "such" / "folder.sqlite")


def test_records_of_a_later_version_are_refused(tmp_path: Path, records: SiteRecords) -> None:
    records._db.execute("UPDATE about SET value = '2' WHERE key = 'format'")
    with pytest.raises(StateError, match="format 2; this version of commonweight knows 1"):
        SiteRecords(tmp_path / "state.sqlite")


# ---- the site's own log


@pytest.fixture
def audit(tmp_path: Path, records: SiteRecords) -> SiteAudit:
    return SiteAudit(tmp_path / "audit.jsonl", records, clock=Clock())


def filled(audit: SiteAudit) -> SiteAudit:
    audit.append("joined", run="r1", to="coordinator")
    audit.append("update", run="r1", round=1, num_bytes=800, chunks=2, digest="ab", to="coordinator")
    audit.append("update", run="r1", round=2, num_bytes=70, chunks=1, digest="cd", to="coordinator")
    audit.append("scores", run="r1", num_bytes=5, to="coordinator", rows=3)
    audit.append("refused", run="r2", reason="signers: none are allowed; …")
    audit.append("update", run="r3", round=1, num_bytes=9)
    return audit


def test_the_log_says_what_left(audit: SiteAudit) -> None:
    filled(audit)
    assert audit.verify()[0] == 6
    assert [row["what"] for row in audit.rows()] == ["joined", "update", "update", "scores", "refused", "update"]
    assert [row["n"] for row in audit.rows(run="r1")] == [1, 2, 3, 4]
    since = next(audit.rows(run="r2"))["t"]
    assert [row["run"] for row in audit.rows(since=since)] == ["r2", "r3"]
    assert audit.totals() == {"r1": {"update": 870, "scores": 5}, "r3": {"update": 9}}
    assert list(audit.rows(run="r9")) == []


def test_an_empty_log_is_whole(audit: SiteAudit) -> None:
    assert audit.verify() == (0, "0" * 64)
    assert list(audit.rows()) == []
    assert audit.totals() == {}


Lines = list[bytes]


def changed(line: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(line), **fields}).encode() + b"\n"


TAMPERINGS: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "bytes changed": (lambda x: [*x[:1], changed(x[1], bytes=1), *x[2:]], "line 2 of .* was changed"),
    "hash changed": (lambda x: [*x[:1], changed(x[1], hash="0" * 64), *x[2:]], "line 2 of .* was changed"),
    "field added": (lambda x: [*x[:3], changed(x[3], note="ok"), *x[4:]], "line 4 of .* was changed"),
    "line removed": (lambda x: [*x[:2], *x[3:]], "line 3 of .* does not follow"),
    "first line removed": (lambda x: x[1:], "line 1 of .* does not follow"),
    "line doubled": (lambda x: [*x[:2], *x[1:]], "line 3 of .* does not follow"),
    "lines turned": (lambda x: [x[1], x[0], *x[2:]], "line 1 of .* does not follow"),
    "no JSON": (lambda x: [*x[:4], b"oops\n", *x[5:]], "line 5 of .* does not follow"),
    "no object": (lambda x: [*x[:4], b"[5]\n", *x[5:]], "line 5 of .* does not follow"),
    "blank line": (lambda x: [*x[:4], b"\n", *x[4:]], "line 5 of .* does not follow"),
    "last line removed": (lambda x: x[:-1], "ends at line 5, but line 6 was written"),
    "all removed": (lambda x: [], "ends at line 0, but line 6 was written"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found_at_its_place_and_stays_found(name: str, audit: SiteAudit) -> None:
    tamper, says = TAMPERINGS[name]
    filled(audit)
    audit.path.write_bytes(b"".join(tamper(audit.path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(StateError, match=says):
        audit.verify()
    for _ in range(3):  # the log goes on, and does not grow over the break
        audit.append("joined", run="r4")
    with pytest.raises(StateError, match=r"line \d+ of"):
        audit.verify()


def test_a_forged_last_line_is_found(audit: SiteAudit, tmp_path: Path) -> None:
    filled(audit)
    whole = audit.path.read_bytes().splitlines(keepends=True)
    other = SiteRecords(tmp_path / "other.sqlite")
    audit.path.write_bytes(b"".join(whole[:-1]))
    SiteAudit(audit.path, other).append("update", run="r3", num_bytes=1)  # with a right hash of its own
    with pytest.raises(StateError, match=r"line 6 of .* is not the line that was written"):
        audit.verify()
    audit.append("joined", run="r4")
    with pytest.raises(StateError, match=r"line 7 of .* does not follow"):
        audit.verify()
    other.close()


def test_numbers_follow_each_other(audit: SiteAudit, records: SiteRecords) -> None:
    entry = {"n": 2, "t": 1.0, "what": "joined", "run": "r1"}  # bound rightly to nothing, but called the second
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    bound = {"prev": START, "hash": hashlib.sha256(bytes(32) + canonical).hexdigest()}
    audit.path.write_text(json.dumps(entry | bound) + "\n")
    with pytest.raises(StateError, match=r"line 1 of .* does not follow"):
        audit.verify()
    audit.path.write_text(audit.path.read_text().replace('"n": 2', '"n": 1'))
    with pytest.raises(StateError, match=r"line 1 of .* was changed"):
        audit.verify()


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_line_cut_by_a_crash_is_dropped(audit: SiteAudit, records: SiteRecords, keep: int) -> None:
    filled(audit)
    whole, line = audit.path.read_bytes(), changed(b"{}", n=7, what="update", reason="x" * 300_000)
    audit.path.write_bytes(whole + line[: keep or None][: len(line) - 1])
    again = SiteAudit(audit.path, records)
    assert audit.path.read_bytes() == whole
    again.append("joined", run="r4")
    assert again.verify()[0] == 7


def test_a_crash_between_the_line_and_the_records_is_no_break(audit: SiteAudit, records: SiteRecords) -> None:
    filled(audit)
    known = records.own_head()
    audit.append("joined", run="r4")
    assert known is not None
    records._db.execute("UPDATE about SET value = ? WHERE key = 'own head'", (f"{known[0]} {known[1]}",))
    audit.append("joined", run="r5")
    assert audit.verify()[0] == 8


def test_long_texts_are_cut_and_odd_values_kept_readable(audit: SiteAudit) -> None:
    audit.append("failed", reason="é\ud800\n" * 2_000, loss=float("nan"), ok=True)
    row = next(audit.rows())
    assert (len(row["reason"]), row["loss"], row["ok"]) == (2_000, "nan", True)
    assert audit.verify()[0] == 1
    assert audit.path.read_bytes().count(b"\n") == 1
    with pytest.raises(ValueError, match="hash"):
        audit.append("failed", hash="mine")


def test_several_writers_make_one_chain(audit: SiteAudit, tmp_path: Path) -> None:
    doors = [audit, *(SiteAudit(audit.path, SiteRecords(tmp_path / "state.sqlite")) for _ in range(2))]
    go = threading.Barrier(3)

    def write(door: SiteAudit) -> None:
        go.wait(timeout=60)
        for k in range(15):
            door.append("update", run="r1", num_bytes=k)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, doors))
    assert audit.verify()[0] == 45
    assert audit.totals() == {"r1": {"update": 3 * sum(range(15))}}


def test_a_writer_waits_for_another(audit: SiteAudit) -> None:
    with audit.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=audit.append, args=("joined",), daemon=True)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        assert audit.path.read_bytes() == b""
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join(timeout=60)
    assert audit.verify()[0] == 1


def test_a_log_that_is_a_folder_is_explained(tmp_path: Path, records: SiteRecords) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(StorageError, match="cannot be read or written"):
        SiteAudit(tmp_path / "logs", records)
