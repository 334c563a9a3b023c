"""The network engine: tasks become rows that replicas push to attending sites; outcomes are what the sites sent back.

Nothing is held here that a crash could lose. A task's id follows from what it is, so that a coordinator that was killed
asks for the same tasks again and finds the answers that came meanwhile; a site that returns is offered what is still
open. Waiting is for a notice on the bus; there is no polling on the path of a round.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import CommonweightError, SiteError
from ..federation.cohort import new_round
from ..federation.events import Events
from ..federation.groups import Groups
from ..federation.messages import (
    ChainTask,
    Completed,
    Dropped,
    EvaluateTask,
    Outcome,
    SampleTask,
    SumTask,
    Task,
    TrainTask,
)
from ..federation.round import DeadlinePassed, Failed, Phase, Round
from ..model.tensors import NamedTensors
from ..wire.partial import parse_partial
from ..wire.protocol_pb2 import SignedPartial
from .access import ACTIVE
from .answers import checked_result
from .blobs import Blobs
from .plans import RunPlan
from .presence import Presence
from .relays import KIND as RELAY
from .relays import Desk, sites_of
from .store import Lease, Store, TaskRow, Upload
from .stored_updates import StoredPartial, StoredUpdate
from .tasks import OPEN
from .updates import key_of, stored_update
from .vault import Vault

_KINDS: dict[type[Task], str] = {
    TrainTask: "train",
    EvaluateTask: "evaluate",
    ChainTask: "chain",
    SampleTask: "sample",
}
#: without a notice, the state is looked at this often: for deadlines, and for sites that went away
_LOOK_S = 0.5
#: a relay that has every update may take this many times the recipe's patience to offer their sum
_SUM_PATIENCE = 10
#: with more tasks than this, looks are spaced out
_FEW = 16


class Stopped(CommonweightError):
    """This replica stops leading the run: it is shutting down, or another one leads. The run goes on elsewhere."""


class Cancelled(CommonweightError):
    """Somebody who may do so has cancelled the run."""


@dataclass
class Led:
    """One run as its leader sees it.

    Args:
        lease: the current lease; renewed by the leader's thread.
        stop: asked between steps: why to stop, or nothing.
    """

    lease: Lease
    stop: Callable[[], CommonweightError | None]

    def check(self) -> None:
        """Raises Stopped or Cancelled when the run must not go on here."""
        reason = self.stop()
        if reason is not None:
            raise reason


class NetworkEngine:
    """An engine over the sites of one run.

    Args:
        flush: told when there is nothing to do but wait: events may be written out.
    """

    def __init__(
        self,
        led: Led,
        plan: RunPlan,
        store: Store,
        blobs: Blobs,
        vault: Vault,
        presence: Presence,
        events: Events,
        flush: Callable[[], None],
    ) -> None:
        self.led, self.plan, self.store, self.blobs, self.vault = led, plan, store, blobs, vault
        self.presence, self.events, self.flush = presence, events, flush
        self.run_id = plan.job.id
        self.base = ""
        self.num_sites = 0
        self.desk = Desk(store, presence, self.run_id, plan.recipe.federation.relays)
        self._partials: dict[str, StoredPartial] = {}

    def announce(self, base: str) -> None:
        """Make the frame of this digest what tasks start from."""
        self.base = base

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        raise NotImplementedError("a networked run's tensors are frames; see `announce`")

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        return Errand(self, tasks, deadline_s).outcomes() if tasks else iter(())

    def task_id(self, task: Task | None, kind: str, site: str, round: int, attempt: int) -> str:
        """The same for the same task, whoever asks for it and how often."""
        body = json.dumps(asdict(task), sort_keys=True) if task is not None else ""
        parts = [self.run_id, kind, site, str(round), str(attempt), self.base if kind != "join" else "", body]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def row(self, task: Task, round: int, deadline_at: float | None, attempt: int = 0) -> TaskRow:
        kind, site = task.step if isinstance(task, SumTask) else _KINDS[type(task)], site_of(task)
        return TaskRow(
            id=self.task_id(task, kind, site, round, attempt),
            run=self.run_id,
            round=round,
            site=site,
            kind=kind,
            body=json.dumps(asdict(task)).encode(),
            base=self.base,
            deadline_at=deadline_at,
        )

    def accepted(self, round: int, sites: set[str]) -> dict[str, tuple[Upload, StoredPartial | None]]:
        """The uploads of sites that have answered, and the sum in which an update came if it came in one."""
        relays = set(self.desk.relays)
        uploads = self.store.accepted_uploads(self.run_id, round, sites | relays)
        partials = [self._partial(upload) for upload in uploads if upload.site in relays]
        partial_of = {site: partial for partial in partials for site in partial.sites}
        return {u.site: (u, partial_of.get(u.site)) for u in uploads if u.site not in relays}

    def _partial(self, upload: Upload) -> StoredPartial:
        if upload.id not in self._partials:
            partial = parse_partial(SignedPartial(partial=upload.manifest, signature=upload.signature))
            path, key = self.blobs.open_local(upload.blob), key_of(upload, self.vault)
            self._partials[upload.id] = StoredPartial(upload.site, partial.sites, partial.frame, path, key)
        return self._partials[upload.id]

    def stored_update(self, upload: Upload, partial: StoredPartial | None = None) -> StoredUpdate:
        """An accepted upload as an update whose tensors stay where they are."""
        return stored_update(upload, self.plan, self.blobs, self.vault, partial)


def site_of(task: Task) -> str:
    """The one site that a task is for: over a network no task is for several."""
    match task:
        case TrainTask(site=site) | SumTask(site=site):
            return site
        case EvaluateTask(sites=(site,)) | ChainTask(sites=(site,)):
            return site
        case SampleTask(prompts=((site, _),)):
            return site
    raise ValueError(f"over a network a task is for one site: {task}")


class Errand:
    """One `run`: its tasks, what is known of them, and the round that they belong to if they train."""

    def __init__(self, engine: NetworkEngine, tasks: Sequence[Task], deadline_s: float | None) -> None:
        self.engine, self.tasks, self.store = engine, tasks, engine.store
        self.spec = engine.plan.recipe.federation
        trains = [task for task in tasks if isinstance(task, TrainTask)]
        of_a_round = [task for task in tasks if isinstance(task, TrainTask | SumTask)]
        self.round = of_a_round[0].round if of_a_round else 0
        self.trains = {task.site: task for task in trains}
        self.secure = next((task.secure for task in trains), None)
        deadline_at = self.store.database.clock() + deadline_s if deadline_s is not None and of_a_round else None
        self.deadline_at = deadline_at
        self.rows = [engine.row(task, self.round, None) for task in tasks]
        self.outcome_of: dict[int, Outcome] = {}
        self.decided: set[int] = set()
        self.waits: set[str] = set()
        self.relays: dict[str, TaskRow] = {}
        self.complete_since: dict[str, float] = {}

    def outcomes(self) -> Iterator[Outcome]:
        """In the order of the tasks."""
        news = threading.Event()
        bus = self.store.bus
        with bus.subscribe(f"run/{self.engine.run_id}", news.set), bus.subscribe("sites", news.set):
            self.begin()
            for index in range(len(self.tasks)):
                while index not in self.decided:
                    began = time.monotonic()
                    self.engine.led.check()
                    news.clear()
                    self.look()
                    if index not in self.decided:
                        self.engine.flush()
                        took = time.monotonic() - began
                        news.wait(self._patience())
                        if len(self.tasks) > _FEW:  # many answer at once: no look for each, but one for all of a while
                            time.sleep(min(took, _LOOK_S))
                yield self.outcome_of.pop(index)

    def _decide(self, index: int, outcome: Outcome) -> None:
        self.decided.add(index)
        self.outcome_of[index] = outcome

    def begin(self) -> None:
        """Open the round, or go on with it, and put out the tasks that are not out yet."""
        lease, round = self.engine.led.lease, None
        # before the round: an answer that is accepted meanwhile ends its task too, and must not look lost
        known = {row.id: row for row in self.store.tasks(lease.run, self.round)}
        if self.trains:
            cohort, num_sites = tuple(self.trains), self.engine.num_sites
            fresh = new_round(self.round, cohort, self.spec, num_sites, groups=self._groups())
            found = self.store.round_state(lease.run, self.round)
            if found is not None and found[0].phase is Phase.ABANDONED and self.secure is None:
                fresh = reopened(found[0])  # rows that were masked for another attempt are of no use in this one
            round, _ = self.store.open_round(lease, fresh, self.engine.base)
        waiting = set(round.waiting) if round is not None else set[str]()
        new = []
        for index, task in enumerate(self.tasks):
            lost = isinstance(task, TrainTask) and task.secure is None and task.site in waiting
            standing, attempt = self._standing(task, known, lost=lost)
            if standing is not None:
                self.rows[index] = standing
                if isinstance(task, TrainTask | SumTask):
                    self.deadline_at = standing.deadline_at
            elif not isinstance(task, TrainTask) or task.site in waiting:
                deadline_at = self.deadline_at if isinstance(task, TrainTask | SumTask) else None
                self.rows[index] = self.engine.row(task, self.round, deadline_at, attempt)
                new.append(self.rows[index])
        self.store.add_tasks(lease, [*new, *self._relay_tasks(waiting, known)])

    def _groups(self) -> Groups | None:
        """Of the round's secure sums, those that were lost before it began among them."""
        if self.secure is None:
            return None
        plan = self.engine.plan
        cohort = self.secure["terms"].get("cohort", self.secure["sites"])
        return Groups.of(plan.recipe, cohort, self.round, least=plan.strategy(1).least_updates)

    def _relay_tasks(self, waiting: set[str], known: Mapping[str, TaskRow]) -> list[TaskRow]:
        """The tasks of relays that are not out yet; each relay has one in a round."""
        named = [(task, self.rows[index].id) for index, task in enumerate(self.tasks)]
        tasks = {t.site: (name, t.steps) for t, name in named if isinstance(t, TrainTask) and t.site in waiting}
        rows = self.engine.desk.tasks(self.round, self.engine.base, tasks, self.deadline_at) if tasks else []
        fresh = [row for row in rows if row.id not in known]
        self.relays = {row.id: row for row in [*known.values(), *fresh] if row.kind == RELAY}
        return fresh

    def _standing(self, task: Task, known: Mapping[str, TaskRow], *, lost: bool) -> tuple[TaskRow | None, int]:
        """The row of a task that is out already and not in vain, and the number of rows that were in vain.

        Args:
            lost: what the site says that it has done is not here: this coordinator was restored from a copy.
        """
        attempt = 0
        while (row := known.get(self.engine.row(task, self.round, None, attempt).id)) is not None:
            if row.is_open or (row.state == "done" and not lost):
                return row, attempt
            attempt += 1
        return None, attempt

    def _patience(self) -> float:
        if self.deadline_at is None:
            return _LOOK_S
        return max(0.01, min(_LOOK_S, self.deadline_at - self.store.database.clock()))

    def _deadline_passed(self) -> bool:
        return self.deadline_at is not None and self.store.database.clock() >= self.deadline_at

    # --- looking at what is known

    def look(self) -> None:
        """Take in replies, failures, absences and the deadline."""
        states = self.store.task_states(self.engine.run_id, self.round)
        round = self._round_now()
        waiting = set(round.waiting) if round is not None else set[str]()
        for index, task in enumerate(self.tasks):
            if index in self.decided or self.rows[index].id not in states:
                continue
            site, state = states[self.rows[index].id]
            if not isinstance(task, TrainTask):
                self._other(index, task, site, state)
            elif site in waiting and state in ("failed", "refused", "done"):
                self._train(index)
        self._look_at_relays(states, waiting)
        if round is not None and round.phase is Phase.OPEN:
            round = self._absences(round)
        if round is not None:
            self._settle(round)

    def _look_at_relays(self, states: Mapping[str, tuple[str, str]], waiting: set[str]) -> None:
        """Give up relays that cannot or will not deliver, or are away: their sites send to the coordinator."""
        for name, row in list(self.relays.items()):
            state = states.get(name, ("", ""))[1]
            reason = self._trouble(row, states, waiting) if state in OPEN else "the relay did not deliver"
            if not reason:
                continue
            del self.relays[name]
            if state != "done":
                self.engine.events.emit("relay_given_up", round=self.round, relay=row.site, reason=reason)
                self.store.give_up(self.engine.led.lease, name, sites_of(row), reason)

    def _trouble(self, row: TaskRow, states: Mapping[str, tuple[str, str]], waiting: set[str]) -> str:
        """Why a relay is not to be counted on; "": it is at work."""
        away = self.engine.presence.away_for(row.site)
        if away is not None and away > self.spec.patience_s:
            return f"the relay has been away for {away:.0f} s"
        wanted = [states.get(task, ("", ""))[1] for site, task in sites_of(row).items() if site in waiting]
        if not wanted or set(wanted) != {"held"}:
            self.complete_since.pop(row.id, None)
            return ""
        since = time.monotonic() - self.complete_since.setdefault(row.id, time.monotonic())
        if since > _SUM_PATIENCE * self.spec.patience_s and not self.store.has_offered(row.run, row.round, row.site):
            return f"the relay has had all of its sites' updates for {since:.0f} s"
        return ""

    def _round_now(self) -> Round | None:
        found = self.store.round_state(self.engine.run_id, self.round) if self.trains else None
        return found[0] if found is not None else None

    def _train(self, index: int) -> None:
        """A training task that its site could not or would not do; or that it has done, and what it brought is lost."""
        known = {row.id: row for row in self.store.tasks(self.engine.run_id, self.round)}
        row = known[self.rows[index].id]
        _, attempts = self._standing(self.tasks[index], known, lost=True)
        # two rows under the same masks would show their difference: who has failed within a secure sum is lost to it
        if row.state != "refused" and attempts <= self.spec.retries and self.secure is None:
            self.engine.events.emit("task_repeated", round=self.round, site=row.site, reason=row.reason)
            self.rows[index] = self.engine.row(self.tasks[index], self.round, self.deadline_at, attempts)
            self.store.add_tasks(self.engine.led.lease, [self.rows[index]])
            return
        why = f"its policy refused: {row.reason}" if row.state == "refused" else row.reason or "its update is lost"
        self.store.apply(row.run, self.round, Failed(row.site, self.round, why))

    def _other(self, index: int, task: Task, site: str, state: str) -> None:
        name = self.rows[index].id
        if state in OPEN:
            away = self.engine.presence.away_for(site)
            over = isinstance(task, SumTask) and self._deadline_passed()
            if over or (away is not None and away > self.spec.patience_s):
                reason = "the deadline passed" if over else f"the site has been away for {away:.0f} s"
                self.store.withdraw(self.engine.led.lease, [name], reason)
                self._decide(index, Dropped(task, reason, late=True))
            return
        row = self.store.task(name)
        assert row is not None
        match row.state:
            case "done":
                self._decide(index, _answered(task, row))
            case "refused":
                self._decide(index, Dropped(task, f"its policy refused: {row.reason}"))
            case _:
                self._decide(index, Dropped(task, row.reason or f"it was {row.state}"))

    def _absences(self, round: Round) -> Round:
        """Give up sites that have been away for too long, if the quorum can be had without them; and the deadline."""
        if self._deadline_passed():
            self.store.apply(self.engine.run_id, self.round, DeadlinePassed(self.round), lease=self.engine.led.lease)
            return self._round_now() or round
        waiting = set(round.waiting)
        away = {site: self.engine.presence.away_for(site) for site in round.waiting}
        gone = {site: seconds for site, seconds in away.items() if seconds is not None}
        for site in gone:
            if site not in self.waits:
                self.waits.add(site)
                self.engine.events.emit("site_away", round=self.round, site=site)
        for site in [site for site in self.waits if site not in gone and site in waiting]:
            self.waits.discard(site)
            self.engine.events.emit("site_back", round=self.round, site=site)
        revoked = {p.name for p in self.store.principals("site") if p.state != ACTIVE} if gone else set()
        for site in revoked.intersection(gone):
            reason = "its enrolment was revoked"
            self.store.apply(self.engine.run_id, self.round, Failed(site, self.round, reason))
            del gone[site]
        lost = {site: seconds for site, seconds in gone.items() if seconds > self.spec.patience_s}
        if not lost or not round.met_by({*round.answered, *waiting} - set(lost)):
            return (self._round_now() or round) if revoked else round
        for site, seconds in lost.items():
            reason = f"away for {seconds:.0f} s"
            self.store.apply(self.engine.run_id, self.round, Failed(site, self.round, reason))
        return self._round_now() or round

    def _settle(self, round: Round) -> None:
        """Outcomes that follow from the round's state."""
        fresh = [i for i, t in enumerate(self.tasks) if isinstance(t, TrainTask) and i not in self.decided]
        answered = {site_of(self.tasks[index]) for index in fresh}.intersection(round.answered)
        uploads = self.engine.accepted(self.round, answered) if answered else {}
        closed = round.phase is not Phase.OPEN
        late = []
        for index in fresh:
            task = self.tasks[index]
            assert isinstance(task, TrainTask)
            if task.site in uploads:
                self._decide(index, Completed(task, self.engine.stored_update(*uploads[task.site])))
            elif task.site in round.failed:
                self._decide(index, Dropped(task, round.failed[task.site]))
                late.append(self.rows[index].id)
            elif closed:
                enough = round.target is not None and len(round.answered) >= round.target
                why = "the round had enough answers" if enough else "the deadline passed"
                self._decide(index, Dropped(task, why, late=True))
                late.append(self.rows[index].id)
        if late:
            self.store.withdraw(self.engine.led.lease, late, f"round {self.round} is {round.phase.value}")


def _answered(task: Task, row: TaskRow) -> Outcome:
    try:
        return Completed(task, result=checked_result(task, row.result))
    except SiteError as error:
        return Dropped(task, error.message)


def reopened(round: Round) -> Round:
    """A round that was abandoned, tried again: who has answered stays, who has failed is asked again."""
    return replace(round, phase=Phase.OPEN, failed={}, late=())
