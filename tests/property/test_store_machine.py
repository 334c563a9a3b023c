"""The store under two or three leaders and three sites, in every order: claims, pauses, answers, deadlines, commits.

A naive account is kept beside it. Whatever the order, a round is committed at most once and only under the lease that
holds, a site's update counts at most once in a round, never after the round closed, and never more count than suffice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from commonweight.coordinator.store import Lease, LeaseLost, Store, StoreJournal, TaskRow, Upload, verify_chain
from commonweight.errors import StateError
from commonweight.federation.round import DeadlinePassed, Failed, Round
from commonweight.wire.refusals import Refusal, Refused

LEASE_S = 10.0
SITES = ("a", "b", "c")

leaders = st.sampled_from("ABC")
sites = st.sampled_from([*SITES, *SITES, "stranger"])
#: how many are invited, needed, enough
SHAPES = [(n, needed, target) for n in (1, 2, 3) for needed in range(1, n + 1) for target in range(needed, n + 1)]
ODD = ("claim", "renew", "release", "begin", "offer", "time is up", "commit")
DEEDS = ("answer", "answer", "answer", "begin", "complete", "spoil", "fail")


class Time:
    """The clock of all examples; it never goes back."""

    now = 1_000_000.0


STORE = Store("sqlite://", clock=lambda: Time.now)
RUNS = (f"run {k}" for k in itertools.count())


@dataclass
class Book:
    """The naive account of one round: what was heard, in order, and whether it is still open."""

    cohort: tuple[str, ...]
    needed: int
    target: int
    answered: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    phase: str = "open"

    def awaits(self, site: str) -> bool:
        return self.phase == "open" and site in self.cohort and site not in self.answered and site not in self.failed

    def settle(self, *, time_is_up: bool = False) -> None:
        silent = len(self.cohort) - len(self.answered) - len(self.failed)
        hopeless = len(self.answered) + silent < self.needed
        if time_is_up or not silent or hopeless or len(self.answered) >= self.target:
            self.phase = "closed" if len(self.answered) >= self.needed else "abandoned"


class StoreMachine(RuleBasedStateMachine):
    """One run."""

    @initialize(shape=st.sampled_from(SHAPES))
    def submit(self, shape: tuple[int, int, int]) -> None:
        self.run, self.head = next(RUNS), STORE.audit_head()
        STORE.add_run(self.run, "small", "", b"job", b"", b"", "lena", {})
        STORE.set_run_state(self.run, "waiting")
        STORE.set_run_state(self.run, "running")
        self.cohort, self.needed, self.target = SITES[: shape[0]], shape[1], shape[2]
        self.leases: dict[str, Lease] = {}  # what each leader believes to have
        self.plans: dict[str, int] = {}  # the round that each leader believes to be the next
        self.holder, self.epoch, self.until = "", 0, 0.0  # what is true
        self.books: dict[int, Book] = {}
        self.commits: dict[int, int] = {}  # epoch by round
        self.fenced = 0  # how often a lease that was lost was used
        self.uploads: list[Upload] = []
        self.decided: dict[str, bool] = {}
        self.claim("A")
        self.begin("A", 1)

    # --- leaders

    def holds(self, leader: str) -> bool:
        lease = self.leases[leader]
        return (self.holder, self.epoch) == (leader, lease.epoch) and Time.now < self.until

    def claim(self, leader: str) -> None:
        free = self.holder in ("", leader) or Time.now >= self.until
        lease = STORE.claim(self.run, leader, LEASE_S)
        assert (lease is not None) == free
        if lease is not None:
            self.epoch += 1
            assert lease.epoch == self.epoch
            self.holder, self.until, self.leases[leader] = leader, Time.now + LEASE_S, lease
            self.plans[leader] = STORE.last_round(self.run) + 1

    @rule(leader=leaders, steps=st.integers(1, 4), waits=st.booleans())
    def lead(self, leader: str, steps: int, waits: bool) -> None:
        """A leader does what comes next as far as it knows, which may be long ago."""
        for _ in range(steps):
            if leader not in self.leases:
                self.claim(leader)
            elif not self.holds(leader):
                self.lead_on(leader, waits=False)
                self.leases.pop(leader)  # it was told
            else:
                self.lead_on(leader, waits)

    def lead_on(self, leader: str, waits: bool) -> None:
        number = self.plans[leader]
        book = self.books.get(number)
        if book is None or book.phase == "abandoned":
            self.begin(leader, number)
        elif book.phase == "open" and not waits:
            self.time_is_up(leader, number)
        elif book.phase != "open":
            self.commit(leader, number)
            self.plans[leader] += 1

    @rule(leader=leaders, number=st.integers(1, 3), what=st.sampled_from(ODD))
    def lead_oddly(self, leader: str, number: int, what: str) -> None:
        """A leader does anything at all, out of turn."""
        if leader not in self.leases or what == "claim":
            return self.claim(leader)
        if what in ("renew", "release"):
            return self.renew(leader) if what == "renew" else self.release(leader)
        if what == "begin" or number not in self.books:
            return self.begin(leader, number)
        act = {"offer": self.offer_tasks, "time is up": self.time_is_up, "commit": self.commit}[what]
        return act(leader, number)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def everyone_pauses(self, seconds: float) -> None:
        Time.now += seconds

    def renew(self, leader: str) -> None:
        if not self.holds(leader):
            return self.is_refused(leader, lambda lease: STORE.renew(lease, LEASE_S))
        self.leases[leader] = STORE.renew(self.leases[leader], LEASE_S)
        self.until = Time.now + LEASE_S
        return None

    def release(self, leader: str) -> None:
        if not self.holds(leader):
            return self.is_refused(leader, STORE.release)
        STORE.release(self.leases[leader])
        self.holder, self.until = "", 0.0
        return None

    def begin(self, leader: str, number: int) -> None:
        fresh = Round(number, self.cohort, self.needed, target=self.target)
        if not self.holds(leader):
            return self.is_refused(leader, lambda lease: STORE.open_round(lease, fresh, "base"))
        book = self.books.get(number)
        if book is not None and book.phase == "committed":
            with pytest.raises(StateError, match="is committed already"):
                STORE.open_round(self.leases[leader], fresh, "base")
            return None
        round, _ = STORE.open_round(self.leases[leader], fresh, "base")
        if book is None or book.phase == "abandoned":
            book = self.books[number] = Book(self.cohort, self.needed, self.target)
            self.decided |= {u.id: False for u in self.uploads if u.round == number}
        assert (round.phase.value, list(round.answered)) == (book.phase, book.answered)
        return None

    def offer_tasks(self, leader: str, number: int) -> None:
        name = f"{self.run} {len(STORE.tasks(self.run))}"
        row = TaskRow(name, self.run, number, "a", "train", b"{}")
        if not self.holds(leader):
            return self.is_refused(leader, lambda lease: STORE.add_tasks(lease, [row]))
        STORE.add_tasks(self.leases[leader], [row])
        assert name in {task.id for task in STORE.open_tasks("a")}
        return None

    def time_is_up(self, leader: str, number: int) -> None:
        event = DeadlinePassed(number)
        if not self.holds(leader):
            return self.is_refused(leader, lambda lease: STORE.apply(self.run, number, event, lease=lease))
        book = self.books[number]
        verdict = STORE.apply(self.run, number, event, lease=self.leases[leader])
        assert verdict.accepted == (book.phase == "open")
        if verdict.accepted:
            book.settle(time_is_up=True)
        return None

    def commit(self, leader: str, number: int) -> None:
        """A leader commits what it takes for the next round, or one that another has committed while it slept."""
        record = {"leader": leader, "epoch": self.leases[leader].epoch}
        if not self.holds(leader):
            return self.is_refused(leader, lambda lease: StoreJournal(STORE, lease).commit(number, record))
        book = self.books[number]
        if book.phase != "closed" or number > len(self.commits) + 1:
            with pytest.raises(StateError, match=r"is committed already|cannot be committed"):
                StoreJournal(STORE, self.leases[leader]).commit(number, record)
            return None
        StoreJournal(STORE, self.leases[leader]).commit(number, record)
        book.phase, self.commits[number] = "committed", self.epoch
        arrived = [u.id for u in self.uploads if u.round <= number and u.id not in self.decided]
        self.decided |= dict.fromkeys(arrived, False)
        return None

    def is_refused(self, leader: str, act: Callable[[Lease], object]) -> None:
        """A leader that goes on past its lease is told so; that it changes nothing, the invariants see."""
        with pytest.raises(LeaseLost):
            act(self.leases[leader])
        self.fenced += 1

    # --- sites

    @rule()
    def everyone_answers(self) -> None:
        for site in SITES:
            self.answer(site, b"one", max(self.books))

    @rule(site=sites, what=st.sampled_from(DEEDS), manifest=st.sampled_from([b"one", b"two"]), pick=st.integers(0, 99))
    def take_part(self, site: str, what: str, manifest: bytes, pick: int) -> None:
        number = sorted(self.books, reverse=True)[pick % len(self.books)]
        if what == "answer":
            self.answer(site, manifest, number)
        elif what == "fail":
            self.fail(site, number)
        elif what == "begin" or not self.uploads:
            self.begin_upload(site, manifest, number)
        else:
            upload = self.uploads[pick % len(self.uploads)]
            (self.complete_upload if what == "complete" else self.spoil_upload)(upload)

    def answer(self, site: str, manifest: bytes, number: int) -> None:
        upload = self.begin_upload(site, manifest, number)
        if upload is not None:
            self.complete_upload(upload)

    def begin_upload(self, site: str, manifest: bytes, number: int) -> Upload | None:
        digest = hashlib.sha256(manifest).hexdigest()
        upload = Upload(
            f"{self.run} {len(self.uploads)}", self.run, number, site, "task", digest, manifest, b"", None, "blob"
        )
        known = [u for u in self.uploads if (u.round, u.site, u.digest) == (number, site, digest)]
        counts = any(u.round == number and u.site == site and self.decided.get(u.id) for u in self.uploads)
        if not known and (counts or not self.books[number].awaits(site)):
            with pytest.raises(Refused) as refused:
                STORE.open_upload(upload)
            assert (refused.value.code is Refusal.REPLAYED) == counts
            return None
        found = STORE.open_upload(upload)
        if known:
            assert found.id == known[0].id
        else:
            self.uploads.append(found)
        return found

    def complete_upload(self, upload: Upload) -> None:
        book = self.books[upload.round]
        expected = self.decided.get(upload.id, book.awaits(upload.site))
        assert STORE.accept_upload(upload.id).accepted == expected
        if upload.id not in self.decided:
            self.decided[upload.id] = expected
            if expected:
                book.answered.append(upload.site)
                book.settle()

    def spoil_upload(self, upload: Upload) -> None:
        book = self.books[upload.round]
        verdict = STORE.refuse_upload(upload.id, Refusal.NON_FINITE, "not finite")
        assert verdict.accepted == self.decided.get(upload.id, False)
        if upload.id not in self.decided:
            self.decided[upload.id] = False
            self.give_up(book, upload.site)

    def fail(self, site: str, number: int) -> None:
        book = self.books[number]
        assert STORE.apply(self.run, number, Failed(site, number, "broken")).accepted == book.awaits(site)
        self.give_up(book, site)

    def give_up(self, book: Book, site: str) -> None:
        if book.awaits(site):
            book.failed.add(site)
            book.settle()

    # --- what always holds

    @invariant()
    def every_round_is_committed_at_most_once_and_by_who_led_then(self) -> None:
        stored = STORE.commits(self.run)
        assert {number: record["epoch"] for number, record in stored.items()} == self.commits
        assert len({*self.commits.values()}) <= self.epoch

    @invariant()
    def every_update_counts_at_most_once_and_never_more_than_suffice(self) -> None:
        for number, book in self.books.items():
            found = STORE.round_state(self.run, number)
            assert found is not None
            assert (found[0].phase.value, list(found[0].answered)) == (book.phase, book.answered)
            assert len(book.answered) <= self.target
            mine = [u for u in self.uploads if u.round == number and self.decided.get(u.id)]
            assert Counter(u.site for u in mine) == Counter(book.answered)
            if book.phase != "committed":
                accepted = STORE.accepted_uploads(self.run, number)
                assert [u.id for u in accepted] == [u.id for u in sorted(mine, key=lambda u: u.site)]

    def teardown(self) -> None:
        log = STORE.audit_entries(after=self.head[0], limit=10_000)
        assert verify_chain(log, start=self.head[0], start_hash=self.head[1]) == STORE.audit_head()
        actions = Counter(entry.action for entry in log)
        assert actions["round committed"] == len(self.commits)
        assert actions["update accepted"] >= sum(len(book.answered) for book in self.books.values())


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestStoreMachine = StoreMachine.TestCase


def test_a_thousand_schedules_commit_no_round_twice() -> None:
    """The same moves, drawn so that most schedules get through some rounds and change leaders on the way."""
    rounds, handovers, fenced = 0, 0, 0
    for seed in range(1000):
        draw, machine = Random(seed), StoreMachine()
        machine.submit(draw.choice(SHAPES))
        for _ in range(14):
            move = draw.choices(["lead", "answer", "pause", "oddly", "part"], [8, 5, 2, 1, 1])[0]
            leader = draw.choice("ABC" if seed % 2 else "AB")
            if move == "lead":
                machine.lead(leader, draw.randint(1, 4), draw.random() < 0.7)
            elif move == "answer":
                machine.everyone_answers()
            elif move == "pause":
                machine.everyone_pauses(draw.choice([LEASE_S / 2, LEASE_S]))
            elif move == "oddly":
                machine.lead_oddly(leader, draw.randint(1, 3), draw.choice(ODD))
            else:
                machine.take_part(
                    draw.choice(SITES), draw.choice(DEEDS), draw.choice([b"one", b"two"]), draw.randint(0, 99)
                )
        machine.every_round_is_committed_at_most_once_and_by_who_led_then()
        machine.every_update_counts_at_most_once_and_never_more_than_suffice()
        machine.teardown()
        rounds += len(machine.commits)
        handovers += len(set(machine.commits.values())) > 1
        fenced += machine.fenced
    assert rounds > 1000  # the schedules do get somewhere
    assert handovers > 50
    assert fenced > 500
