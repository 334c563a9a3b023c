"""Which sites take part in a run: asked to join, heard, and taken in between rounds.

A site joins by answering a `join` task with its facts; its own policy, model and data decide whether it can. A run
begins when every site that may take part has answered, or when enough have and nobody is busy joining. Who takes part
in a round is written down when the round is opened, so that a round that is taken up again has the same cohort.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ..errors import QuorumError, SiteError
from ..federation.cohort import check_cohort
from ..federation.events import Events
from ..federation.journal import RunJournal
from ..federation.round import answers_needed
from ..federation.tally import Sites
from .access import ACTIVE
from .answers import checked_facts
from .engine import NetworkEngine
from .store import TaskRow

_LOOK_S = 0.5


class Roster:
    """The sites of one run, as its leader sees them."""

    def __init__(self, engine: NetworkEngine, journal: RunJournal, events: Events) -> None:
        self.engine, self.journal, self.events = engine, journal, events
        self.store, self.plan = engine.store, engine.plan
        self.spec = engine.plan.recipe.federation
        self.named = tuple(self.plan.job.sites)
        self._asked: set[str] = set()

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
            joined = -1
            while True:
                self.engine.led.check()
                news.clear()
                waiting = self.ask()
                now = len(self.joined())
                if now != joined:
                    joined, since = now, time.monotonic()
                if self._may_begin(joined, waiting, time.monotonic() - since):
                    return
                self.engine.flush()
                news.wait(_LOOK_S)

    def _may_begin(self, joined: int, waiting: list[TaskRow], quiet_s: float) -> bool:
        size = self.spec.cohort.size(max(1, len(self.expected())))
        enough = joined >= answers_needed(self.spec, size) and joined >= (self.spec.cohort.count or 1)
        if not waiting and (self.named or self.expected()):
            if not enough and self.named:
                self._refuse(joined, size)
            return enough
        busy = any(row.state == "taken" and self.engine.presence.away_for(row.site) is None for row in waiting)
        return enough and not busy and quiet_s > self.spec.patience_s

    def _refuse(self, joined: int, size: int) -> None:
        members = self.store.members(self.engine.run_id)
        reasons = [f"{m.site}: {m.reason}" for m in members if m.state != "joined"][:3]
        raise QuorumError(
            f"{joined} of {len(self.expected())} sites joined, too few for a cohort of {size}: {'; '.join(reasons)}",
            hint="mend what the sites say, then submit again",
        )

    def ask(self) -> list[TaskRow]:
        """Ask everybody who was not asked, hear who has answered; the tasks of those who have not."""
        run = self.engine.run_id
        members = {member.site: member.state for member in self.store.members(run)}
        rows = {row.site: row for row in self.store.tasks(run, 0) if row.kind == "join"}
        new = [self._task(site) for site in self.expected() if site not in rows]
        if new:
            self.store.add_tasks(self.engine.led.lease, new)
        waiting, active = list(new), self._active()
        for site, row in rows.items():
            if members.get(site) in ("joined", "refused"):
                continue
            if not row.is_open:
                self._hear(row)
            elif site in active:
                waiting.append(row)
            else:
                self._refused(row, "its enrolment was revoked")
        return waiting

    def _task(self, site: str) -> TaskRow:
        run = self.engine.run_id
        return TaskRow(
            id=self.engine.task_id(None, "join", site, 0, 0), run=run, round=0, site=site, kind="join", body=b"{}"
        )

    def _hear(self, row: TaskRow) -> None:
        """A site has answered: it joins, or it does not and says why."""
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
        self._refused(row, reason)

    def _refused(self, row: TaskRow, reason: str) -> None:
        self.store.put_member(row.run, row.site, "refused", reason=reason)
        self.events.emit("site_refused", site=row.site, reason=reason)

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
            self.journal.put(f"roster/{round:04d}", record)
        names = tuple(record["sites"])
        self.engine.num_sites = len(names)
        return Sites(
            names,
            {site: joined[site]["steps"] for site in names},
            {site: list(joined[site]["groups"]) for site in names},
        )
