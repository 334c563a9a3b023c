"""Which sites take part in a run: asked to join, heard, and taken in between rounds.

A site joins by answering a `join` task with its facts; its own policy, model and data decide whether it can. A run
begins when every site that may take part has answered, or when enough have and nobody is busy joining. Who takes part
in a round is written down when the round is opened, so that a round that is taken up again has the same cohort.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from ..errors import QuorumError, SiteError
from ..federation.cohort import check_cohort, check_separation
from ..federation.events import Events
from ..federation.journal import RunJournal
from ..federation.private_rounds import unit_count
from ..federation.round import answers_needed
from ..federation.secure_rounds import check_sums
from ..federation.tally import Sites
from ..privacy.secure_aggregation.graph import MIN_SITES
from ..strategies.asynchronous import AsynchronousStrategy
from .access import ACTIVE
from .answers import checked_facts
from .engine import NetworkEngine
from .plans import RunPlan
from .store import TaskRow
from .tasks import OPEN

_LOOK_S = 0.5
#: while more sites than this are waited for, looks are spaced out
_FEW = 16


class Roster:
    """The sites of one run, as its leader sees them."""

    def __init__(self, engine: NetworkEngine, journal: RunJournal, events: Events) -> None:
        self.engine, self.journal, self.events = engine, journal, events
        self.store, self.plan = engine.store, engine.plan
        self.spec = engine.plan.recipe.federation
        self.named = tuple(self.plan.job.sites)
        strategy = self.plan.strategy(1)
        self.buffer = strategy.buffer if isinstance(strategy, AsynchronousStrategy) else 0
        #: sites that are asked to join and have not answered, by the last look
        self.waiting: Mapping[str, str] = {}
        self._tasks: dict[str, str] = {}
        self._sites = Sites((), {}, {})

    def expected(self) -> tuple[str, ...]:
        """The sites that may take part, in the order of folding."""
        if self.named:
            return self.named
        return tuple(sorted(self._active()))

    def _active(self) -> set[str]:
        return {principal.name for principal in self.store.principals("site") if principal.state == ACTIVE}

    def joined(self) -> dict[str, dict[str, Any]]:
        """Facts of the sites that have joined, in the order of folding."""
        facts = {m.site: dict(m.facts) for m in self.store.members(self.engine.run_id) if m.state == "joined"}
        known = self.expected()
        order = {site: place for place, site in enumerate(known)}
        return {site: facts[site] for site in sorted(facts, key=lambda s: (order.get(s, len(known)), s))}

    # --- joining

    def gather(self) -> None:
        """Wait until the run can begin.

        Raises:
            QuorumError: everybody has answered, and too few have joined.
        """
        news = threading.Event()
        bus, since = self.store.bus, time.monotonic()
        with bus.subscribe(f"run/{self.engine.run_id}", news.set), bus.subscribe("sites", news.set):
            joined, told = -1, (-1, -1)
            while True:
                began = time.monotonic()
                self.engine.led.check()
                news.clear()
                waiting = self.ask()
                now = sum(state == "joined" for state in self.store.member_states(self.engine.run_id).values())
                if not waiting and (now, len(self.expected())) != told:  # nobody is left to wait for, but newcomers
                    told = (now, len(self.expected()))
                    self.events.emit("waiting_for_sites", joined=told[0], asked=told[1])
                if now != joined:
                    joined, since = now, time.monotonic()
                if self._may_begin(joined, waiting, time.monotonic() - since):
                    return
                self.engine.flush()
                took = time.monotonic() - began
                news.wait(_LOOK_S)
                if len(waiting) > _FEW:  # many answer at once: no look for each, but one for all of a while
                    time.sleep(min(took, _LOOK_S))

    def _may_begin(self, joined: int, waiting: Mapping[str, str], quiet_s: float) -> bool:
        if quiet_s <= self.spec.patience_s and self.engine.desk.are_awaited():
            return False
        size = self.spec.cohort.size(max(1, len(self.expected())))
        enough = joined >= (self.spec.cohort.count or 1) and self._can_answer(joined, size)
        if not waiting and (self.named or self.expected()):
            if not enough and self.named:
                self._refuse(joined, size)
            return enough
        busy = any(state == "taken" and self.engine.presence.away_for(site) is None for site, state in waiting.items())
        return enough and not busy and quiet_s > self.spec.patience_s

    def _can_answer(self, joined: int, size: int) -> bool:
        """Whether a round, or a version's buffer, can be filled by so many sites."""
        if self.buffer:
            return joined > 0 and self.spec.cohort.size(joined) >= self.buffer
        least = MIN_SITES if self.plan.secure else 0
        return joined >= max(least, answers_needed(self.spec, size))

    def _refuse(self, joined: int, size: int) -> None:
        members = self.store.members(self.engine.run_id)
        reasons = [f"{m.site}: {m.reason}" for m in members if m.state != "joined"][:3]
        raise QuorumError(
            f"{joined} of {len(self.expected())} sites joined, too few for a cohort of {size}: {'; '.join(reasons)}",
            hint="mend what the sites say, then submit again",
        )

    def ask(self) -> dict[str, str]:
        """Ask everybody who was not asked, hear who has answered; the state of the others' tasks, by site."""
        run, active = self.engine.run_id, self._active()
        states, members = self.store.task_states(run, 0), self.store.member_states(run)
        new = [site for site in self.named or sorted(active) if self._task_of(site) not in states]
        rows = [TaskRow(id=self._task_of(s), run=run, round=0, site=s, kind="join", body=b"{}") for s in new]
        if rows:
            self.store.add_tasks(self.engine.led.lease, rows)
        self.engine.desk.ask(self.engine.led.lease)
        waiting = dict.fromkeys(new, "offered")
        for name, (site, state) in states.items():
            if name != self._task_of(site) or members.get(site) in ("joined", "refused"):
                continue
            if state not in OPEN:
                self._hear(name)
            elif site in active:
                waiting[site] = state
            else:
                self._refused(site, "its enrolment was revoked")
        return waiting

    def _task_of(self, site: str) -> str:
        """The id of the task by which a site is asked to join."""
        if site not in self._tasks:
            self._tasks[site] = self.engine.task_id(None, "join", site, 0, 0)
        return self._tasks[site]

    def _hear(self, task: str) -> None:
        """A site has answered: it joins, or it does not and says why."""
        row = self.store.task(task)
        assert row is not None
        reason = row.reason
        if row.state == "done":
            try:
                facts = checked_facts(row.result)
            except SiteError as error:
                reason = f"its facts cannot be used: {error.message}"
            else:
                self.store.put_member(row.run, row.site, "joined", facts)
                self.events.emit("site_joined", site=row.site, steps=facts["steps"])
                return
        self._refused(row.site, reason)

    def _refused(self, site: str, reason: str) -> None:
        self.store.put_member(self.engine.run_id, site, "refused", reason=reason)
        self.events.emit("site_refused", site=site, reason=reason)

    # --- rounds

    def sites(self, round: int) -> Sites:
        """The sites that may be invited to a round: fixed when it is first asked for."""
        joined = self.joined()
        record = self.journal.get(f"roster/{round:04d}")
        if record is None:
            self.ask()
            joined, active = self.joined(), self._active()
            record = {"sites": [site for site in joined if site in active]}
            check_cohort(len(record["sites"]), self.spec)
            check_sums(self.plan.recipe, len(record["sites"]), self.plan.layout)
            if not self.journal.last_round():
                check_separation(len(record["sites"]), self.plan.recipe)
            self.journal.put(f"roster/{round:04d}", record)
        names = tuple(record["sites"])
        self.engine.num_sites = len(names)
        return _sites(names, joined, self.plan)

    def present(self) -> Sites:
        """The sites that may be given work now, attending or not: newcomers are asked, and whoever has answered is
        heard. For runs without rounds: nothing is fixed."""
        self.waiting = self.ask()
        active, states = self._active(), self.store.member_states(self.engine.run_id)
        names = {site for site, state in states.items() if state == "joined" and site in active}
        if names != set(self._sites.names):
            joined = self.joined()
            self._sites = _sites(tuple(site for site in joined if site in names), joined, self.plan)
        return self._sites


def _sites(names: tuple[str, ...], joined: Mapping[str, Mapping[str, Any]], plan: RunPlan) -> Sites:
    return Sites(
        names,
        {site: joined[site]["steps"] for site in names},
        {site: list(joined[site]["groups"]) for site in names},
        # every site fetches the whole, which it evaluates too
        bytes_up={site: shape.layout.num_bytes for site, shape in plan.shapes.items()},
        units={site: joined[site]["data"].get(unit_count(plan.recipe), 0) for site in names},
    )
