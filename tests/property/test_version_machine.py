"""Versions of an asynchronous run: the pure state machine, and the store under sites and leaders in every order.

Whatever comes in between (stale and repeated answers, failures, commits, a leader that dies, another that takes over):
an update that was acknowledged counts in exactly one version, in the order of acceptance; the sites of a buffer are
distinct; none is staler than the bound; and one that was refused counts nowhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from commonweight.coordinator.store import Lease, LeaseLost, Store, StoreJournal, TaskRow, Upload
from commonweight.errors import StateError
from commonweight.federation.round import Answered, Committed, DeadlinePassed, Event, Failed, Phase
from commonweight.federation.version import Version, parsed
from commonweight.wire.refusals import Refusal, Refused

SITES = tuple("abcd")
NUMBER = 4

rounds = st.integers(1, NUMBER + 1)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Answered, st.sampled_from(SITES), rounds),
    st.builds(Failed, st.sampled_from(SITES), rounds, st.just("broken")),
    st.builds(DeadlinePassed, st.just(NUMBER)),
    st.builds(Committed, st.integers(NUMBER - 1, NUMBER)),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.lists(events, max_size=20))
def test_a_version_beside_a_naive_account(buffer: int, max_staleness: int, told: list[Event]) -> None:
    version = Version.first(NUMBER, buffer, max_staleness, last=NUMBER + 1)
    answers, failed, phase = list[tuple[str, int]](), set[str](), "open"
    for event in told:
        before = version
        version, verdict = before.apply(event)
        assert verdict.accepted != bool(verdict.reason)
        assert version is before or verdict.accepted
        known = {site for site, _ in answers} | failed
        match event:
            case Answered(site, round):
                fits = phase == "open" and site not in known and NUMBER - max_staleness <= round <= NUMBER
                assert verdict.accepted == fits
                answers += [(site, round - 1)] if fits else []
                phase = "closed" if len(answers) == buffer and phase == "open" else phase
            case Failed(site, round):
                assert verdict.accepted == (phase == "open" and site not in known and round <= NUMBER)
                failed |= {site} if verdict.accepted else set()
            case DeadlinePassed():
                assert verdict.accepted == (phase == "open")
                phase = "abandoned" if phase == "open" else phase
            case Committed(round):
                assert verdict.accepted == (phase == "closed" and round == NUMBER)
                phase = "committed" if verdict.accepted else phase
        assert (list(version.answers), set(version.failed), version.phase.value) == (answers, failed, phase)
        assert parsed(json.loads(json.dumps(version.to_json()))) == version
    following = version.following()
    assert following == Version.first(NUMBER + 1, buffer, max_staleness, last=NUMBER + 1)
    assert following.following() is None


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 12))
def test_what_a_commit_withdraws_is_what_no_later_version_would_take(number: int, bound: int, round: int) -> None:
    version = Version.first(number, 1, bound, last=10)
    following = version.following()
    assert following is not None
    assert (round < version.oldest) == following.is_stale(round)
    last = Version.first(10, 1, bound, last=10)
    assert round >= last.oldest or round <= 10


# --- the store

LEASE_S = 10.0
LAST, CODES = 5, {Refusal.STALE, Refusal.REPLAYED, Refusal.ENOUGH, Refusal.ROUND_CLOSED}


class Time:
    """The clock of all examples; it never goes back."""

    now = 1_000_000.0


STORE = Store("sqlite://", clock=lambda: Time.now)
RUNS = (f"run {k}" for k in itertools.count())


@dataclass
class Work:
    """A task of one site, and what has become of its update."""

    task: TaskRow
    upload: Upload | None = None
    verdict: bool | None = None


@dataclass
class Account:
    """The naive account: buffers by number, each a list of (site, round) in the order of acceptance."""

    buffer: int
    bound: int
    buffers: dict[int, list[tuple[str, int]]] = field(default_factory=lambda: {1: []})
    failed: dict[int, set[str]] = field(default_factory=dict)
    committed: int = 0

    @property
    def open(self) -> int:
        return max(self.buffers)

    def accept(self, site: str, round: int) -> bool:
        """Whether an answer counts; it then does."""
        number, into = self.open, self.buffers[self.open]
        given_up = self.failed.get(number, set())
        if any((site, round) in buffer for buffer in self.buffers.values()):
            return False
        if len(into) == self.buffer or number - round > self.bound or site in {s for s, _ in into} | given_up:
            return False
        into.append((site, round))
        if len(into) == self.buffer and number < LAST:
            self.buffers[number + 1] = []
        return True


def opened(upload: Upload) -> Upload | Refused:
    try:
        return STORE.open_upload(upload)
    except Refused as refused:
        return refused


class VersionsMachine(RuleBasedStateMachine):
    """One run of five versions; a site may have several tasks, as after a restore from a copy."""

    @initialize(buffer=st.integers(1, 3), bound=st.integers(0, 3))
    def submit(self, buffer: int, bound: int) -> None:
        self.run, self.account = next(RUNS), Account(buffer, bound)
        STORE.add_run(self.run, "small", "", b"job", b"", b"", "lena", {})
        STORE.set_run_state(self.run, "waiting")
        STORE.set_run_state(self.run, "running")
        self.work: list[Work] = []
        self.lease = self.claimed("A")
        StoreJournal(STORE, self.lease).commit(0, {})
        self.open()

    def claimed(self, owner: str) -> Lease:
        lease = STORE.claim(self.run, owner, LEASE_S)
        assert lease is not None
        return lease

    def open(self) -> None:
        """What a leader does as it begins a version, or takes it over."""
        number = self.account.committed + 1
        if number <= LAST:
            fresh = Version.first(number, self.account.buffer, self.account.bound, LAST)
            found, _ = STORE.open_round(self.lease, fresh, f"base {number - 1}")
            assert isinstance(found, Version)
            assert list(found.answers) == [(site, round - 1) for site, round in self.account.buffers[number]]

    @rule(owner=st.sampled_from("AB"))
    def the_leader_dies_and_another_takes_over(self, owner: str) -> None:
        Time.now += LEASE_S
        old, self.lease = self.lease, self.claimed(owner)
        self.open()
        with pytest.raises(LeaseLost):
            StoreJournal(STORE, old).commit(self.account.committed + 1, {})

    @rule(site=st.sampled_from(SITES), again=st.booleans())
    def give_work(self, site: str, again: bool) -> None:
        round = self.account.committed + 1
        if round > LAST or (not again and any(w.task.round == round and w.task.site == site for w in self.work)):
            return
        row = TaskRow(f"{self.run} {len(self.work)}", self.run, round, site, "train", b"{}", f"base {round - 1}")
        STORE.add_tasks(self.lease, [row])
        self.work.append(Work(row))

    @rule(pick=st.integers(0, 99), completes=st.booleans())
    def answer(self, pick: int, completes: bool) -> None:
        """A site opens its upload, or opens it once more, and perhaps all of it arrives, perhaps once more."""
        if not self.work:
            return
        one = self.work[pick % len(self.work)]
        if one.upload is None and not self.begun(one):
            return
        assert one.upload is not None
        if not completes:
            return
        verdict = STORE.accept_upload(one.upload.id).accepted
        if one.verdict is None:
            one.verdict = self.account.accept(one.task.site, one.task.round)
        assert verdict == one.verdict

    def begun(self, one: Work) -> bool:
        site, round, digest = one.task.site, one.task.round, hashlib.sha256(one.task.id.encode()).hexdigest()
        offered = Upload(f"u {one.task.id}", self.run, round, site, one.task.id, digest, b"m", b"", b"key", "blob")
        found = opened(offered)
        if isinstance(found, Upload):
            one.upload = found
            return True
        assert found.code in CODES
        before = [w for w in self.work if w.verdict and (w.task.site, w.task.round) == (site, round)]
        copy = replace(self.account, buffers={number: [*into] for number, into in self.account.buffers.items()})
        assert before or not copy.accept(site, round), "refused although it would count"
        if not before and found.code is Refusal.STALE:
            assert self.account.open - round > self.account.bound
        return False

    @rule(site=st.sampled_from(SITES), round=st.integers(1, LAST))
    def fail(self, site: str, round: int) -> None:
        number = self.account.open
        if round > self.account.committed + 1:
            return
        known = {s for s, _ in self.account.buffers[number]} | self.account.failed.get(number, set())
        full = len(self.account.buffers[number]) == self.account.buffer
        verdict = STORE.apply(self.run, round, Failed(site, round, "broken"))
        assert verdict.accepted == (site not in known and not full)
        if verdict.accepted:
            self.account.failed.setdefault(number, set()).add(site)

    @rule()
    def commit(self) -> None:
        number = self.account.committed + 1
        if number > LAST:
            return
        if len(self.account.buffers[number]) < self.account.buffer:
            with pytest.raises(StateError, match="cannot be committed"):
                StoreJournal(STORE, self.lease).commit(number, {})
            return
        StoreJournal(STORE, self.lease).commit(number, {})
        self.account.committed = number
        for one in self.work:  # what was arriving and will be too stale is refused
            is_late = number == LAST or number + 1 - one.task.round > self.account.bound
            if one.upload is not None and one.verdict is None and is_late:
                one.verdict = False
        self.open()

    @invariant()
    def what_counts_is_what_was_acknowledged(self) -> None:
        account = self.account
        counted = [answer for number in sorted(account.buffers) for answer in account.buffers[number]]
        assert sorted(counted) == sorted((w.task.site, w.task.round) for w in self.work if w.verdict)
        assert len(counted) == len(set(counted)), "at most once for each task's round"
        for number, into in account.buffers.items():
            found = STORE.round_state(self.run, number)
            assert found is not None
            version = found[0]
            assert isinstance(version, Version)
            assert [(site, started + 1) for site, started in version.answers] == into
            assert len({site for site, _ in into}) == len(into) <= account.buffer
            assert all(0 <= number - round <= account.bound for _, round in into)
            assert (version.phase is Phase.COMMITTED) == (number <= account.committed)
            for site, round in into:
                (upload,) = [
                    u for w in self.work if w.upload and (u := STORE.upload(w.upload.id)) and u.counts
                    and (u.site, u.round) == (site, round)
                ]  # fmt: skip
                assert (upload.state == "spent") == (number <= account.committed)

    @invariant()
    def frames_that_are_needed_still_are_known(self) -> None:
        used = STORE.bases_in_use(self.run)
        waiting = [r for n, into in self.account.buffers.items() if n > self.account.committed for _, r in into]
        given_out = [round for _, round in STORE.open_training(self.run).values()]
        assert used == {f"base {round - 1}" for round in [*waiting, *given_out]}
        if self.account.committed < LAST:
            assert all(self.account.committed + 1 - round <= self.account.bound for round in given_out)
        else:
            assert not given_out


VersionsMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestVersionsMachine = VersionsMachine.TestCase


def test_schedules_come_to_their_end_and_lose_nothing() -> None:
    """The same moves, drawn so that most schedules get through all versions, with leaders that die on the way."""
    ended, stale = 0, 0
    for seed in range(30):
        draw, machine = Random(seed), VersionsMachine()
        machine.submit(draw.randint(1, 3), draw.randint(0, 3))
        for _ in range(80):
            move = draw.choices(["work", "answer", "commit", "fail", "dies"], [8, 12, 5, 1, 1])[0]
            if move == "work":
                machine.give_work(draw.choice(SITES), draw.random() < 0.1)
            elif move == "answer":
                machine.answer(max(0, len(machine.work) - draw.randint(1, 5)), draw.random() < 0.8)
            elif move == "commit":
                machine.commit()
            elif move == "fail":
                machine.fail(draw.choice(SITES), draw.randint(1, LAST))
            else:
                machine.the_leader_dies_and_another_takes_over(draw.choice("AB"))
        machine.what_counts_is_what_was_acknowledged()
        machine.frames_that_are_needed_still_are_known()
        ended += machine.account.committed == LAST
        stale += sum(w.verdict is False for w in machine.work)
    assert ended > 5
    assert stale > 10
