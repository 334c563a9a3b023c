"""Relays as a run's leader and the hub see them: who is ready, who serves whom in a round, and who is given up.

A relay is asked to join a run as a site is, and answers with the address at which its region's sites reach it. In each
round it has one task, `relay`, put out in one transaction with those of its sites, which names the tasks that it may
take updates for. As long as that task is open, its sites are told to send to the relay; when it has ended in any way
but by a sum that was accepted, they are told to send to the coordinator. So all that is known of relays is in tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import AccessError
from ..identity.tokens import check_address
from ..wire.messages import parse_json
from ..wire.refusals import Refused
from .access import ACTIVE
from .plans import Plans
from .presence import Presence
from .store import Lease, Store, TaskRow
from .tasks import OPEN

#: what a relay's task is called
KIND = "relay"


@dataclass(frozen=True)
class Route:
    """The relay to which a site sends an update, and where it is reached (host:port). Without a name: to the
    coordinator, for its relay is not to be counted on."""

    relay: str = ""
    address: str = ""


def task_of(run: str, relay: str, round: int) -> str:
    """The id of a relay's task for a round; round 0: by which it is asked to join the run."""
    return hashlib.sha256("\n".join([run, KIND, relay, str(round)]).encode()).hexdigest()[:32]


def sites_of(task: TaskRow) -> dict[str, str]:
    """The sites of a relay's task, and the tasks of theirs that it takes updates for."""
    return {site: given["task"] for site, given in json.loads(task.body)["tasks"].items()}


class Routes:
    """What sites are to be told. Read from the store each time: any replica may tell them.

    Args:
        plans: of the runs.
    """

    def __init__(self, store: Store, plans: Plans) -> None:
        self.store, self.plans = store, plans

    def of(self, row: TaskRow) -> Route | None:
        """Where a site that has a relay sends what answers a task; None: it has none, or sends no update."""
        relay = self._relays(row.run).get(row.site) if row.kind == "train" else None
        if relay is None:
            return None
        task = self.store.task(task_of(row.run, relay, row.round))
        if task is None or not task.is_open or sites_of(task).get(row.site) != row.id:
            return Route()
        return Route(relay, json.loads(task.body)["address"])

    def names(self, run: str) -> frozenset[str]:
        """The relays of a run."""
        return frozenset(self._relays(run).values())

    def _relays(self, run: str) -> Mapping[str, str]:
        plan = self.plans.of(run)
        return {} if plan is None else plan.recipe.federation.relay_of


class Desk:
    """The relays of one run, for its leader."""

    def __init__(self, store: Store, presence: Presence, run: str, relays: Mapping[str, Sequence[str]]) -> None:
        self.store, self.presence, self.run, self.relays = store, presence, run, relays

    def ask(self, lease: Lease) -> None:
        """Ask the relays to join that have enrolled and were not asked yet."""
        if not self.relays:
            return
        known = self.store.task_states(self.run, 0)
        new = [relay for relay in self._enrolled() if task_of(self.run, relay, 0) not in known]
        rows = [
            TaskRow(id=task_of(self.run, relay, 0), run=self.run, round=0, site=relay, kind="join", body=b"{}")
            for relay in new
        ]
        self.store.add_tasks(lease, rows)

    def are_awaited(self) -> bool:
        """Whether a relay has been asked and has not answered."""
        known = self.store.task_states(self.run, 0) if self.relays else {}
        return any(known.get(task_of(self.run, relay, 0), ("", ""))[1] in OPEN for relay in self.relays)

    def ready(self) -> dict[str, str]:
        """The relays that have joined and are here, and their addresses."""
        found = {}
        for relay in self._enrolled() if self.relays else ():
            row = self.store.task(task_of(self.run, relay, 0))
            address = _address(row.result) if row is not None and row.state == "done" else ""
            if address and self.presence.away_for(relay) is None:
                found[relay] = address
        return found

    def _enrolled(self) -> list[str]:
        active = {p.name for p in self.store.principals("relay") if p.state == ACTIVE}
        return [relay for relay in self.relays if relay in active]

    def tasks(
        self, round: int, base: str, tasks: Mapping[str, tuple[str, int]], deadline_at: float | None
    ) -> list[TaskRow]:
        """The tasks of a round's relays.

        Args:
            tasks: the sites that are to train, in the cohort's order: the id of each one's task, and its steps.
        """
        rows = []
        for relay, address in self.ready().items():
            given = {site: task for site, task in tasks.items() if site in self.relays[relay]}
            region = {site: {"task": task, "steps": steps} for site, (task, steps) in given.items()}
            if region:
                body = json.dumps({"address": address, "tasks": region}).encode()
                name = task_of(self.run, relay, round)
                rows.append(TaskRow(name, self.run, round, relay, KIND, body, base, deadline_at))
        return rows


def _address(result: bytes | None) -> str:
    """Where a relay says that it is reached, or nothing that can be used."""
    try:
        return check_address(str(parse_json(result or b"").get("address")))
    except (Refused, AccessError):
        return ""
