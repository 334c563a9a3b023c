"""One round as a pure state machine: events in, a new state and a verdict out. No clock, no tensors, no network.

    OPEN ──(everyone answered or failed, or enough did, or the deadline passed)──► CLOSED ──(committed)──► COMMITTED
      └────(too few answered, or too few still can)───────────────────────────────► ABANDONED ◄──(unopened)──┘

An abandoned round leaves the model untouched. Each site is counted at most once, by its first answer; whatever comes
after a round has closed is refused with a reason. The caller folds an update when, and only when, the verdict says so.
More sites may be invited than are needed (over-selection): the round closes when `target` of them have answered.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from ..recipe.schema import FederationSpec
from .groups import Groups


class Phase(Enum):
    OPEN = "open"
    CLOSED = "closed"
    ABANDONED = "abandoned"
    COMMITTED = "committed"


@dataclass(frozen=True)
class Answered:
    """A site's update for a round has arrived and was checked."""

    site: str
    round: int


@dataclass(frozen=True)
class Failed:
    """A site's task has failed for good, or its update was refused."""

    site: str
    round: int
    reason: str


@dataclass(frozen=True)
class DeadlinePassed:
    round: int


@dataclass(frozen=True)
class Committed:
    round: int


@dataclass(frozen=True)
class Unopened:
    """The sum of what sites have answered cannot be opened: nothing of it is of use."""

    round: int


Event = Answered | Failed | DeadlinePassed | Committed | Unopened


@dataclass(frozen=True)
class Verdict:
    """What to do with what the event brought: `accepted` (an answer: fold it), or not, and why."""

    accepted: bool
    reason: str = ""


ACCEPTED = Verdict(True)


@dataclass(frozen=True)
class Round:
    """A round's state.

    Args:
        number: 1, 2, …
        cohort: the sites invited, in fold order.
        needed: answers without which the round is abandoned.
        answered: sites whose update was accepted, in the order of arrival.
        failed: reason by site.
        late: sites that had not answered when the round closed.
        target: answers that are enough; None: the whole cohort's.
        groups: of secure sums: only answers of groups that are whole count, and enough groups must be; None: there are
            none.
    """

    number: int
    cohort: tuple[str, ...]
    needed: int
    phase: Phase = Phase.OPEN
    answered: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    late: tuple[str, ...] = ()
    target: int | None = None
    groups: Groups | None = None

    @property
    def waiting(self) -> tuple[str, ...]:
        """Sites that may still answer, in cohort order."""
        if self.phase is not Phase.OPEN:
            return ()
        heard = {*self.answered, *self.failed}
        return tuple(site for site in self.cohort if site not in heard)

    def apply(self, event: Event) -> tuple[Round, Verdict]:
        """The state after an event, and the verdict on it. A refused event changes nothing."""
        refusal = self._refusal(event)
        if refusal:
            return self, Verdict(False, refusal)
        match event:
            case Answered(site=site):
                after = replace(self, answered=(*self.answered, site))
            case Failed(site=site, reason=reason):
                after = replace(self, failed=MappingProxyType({**self.failed, site: reason}))
            case DeadlinePassed():
                after = replace(self, late=self.waiting)
                return after._closed(), ACCEPTED
            case Committed():
                return replace(self, phase=Phase.COMMITTED), ACCEPTED
            case Unopened():
                return replace(self, phase=Phase.ABANDONED), ACCEPTED
        return after._closed_if_decided(), ACCEPTED

    def _refusal(self, event: Event) -> str:
        if event.round != self.number:
            return f"it is for round {event.round}; round {self.number} is {self.phase.value}"
        if isinstance(event, Committed):
            return "" if self.phase is Phase.CLOSED else f"a round that is {self.phase.value} cannot be committed"
        if isinstance(event, Unopened):
            return "" if self.phase in (Phase.OPEN, Phase.CLOSED) else f"round {self.number} is {self.phase.value}"
        if self.phase is not Phase.OPEN:
            return f"round {self.number} is {self.phase.value}"
        if isinstance(event, DeadlinePassed):
            return ""
        if event.site not in self.cohort:
            return f"site {event.site!r} was not invited to round {self.number}"
        if event.site in self.answered:
            return f"site {event.site!r} has answered round {self.number} already"
        if event.site in self.failed:
            return f"site {event.site!r} was given up in round {self.number}"
        return ""

    def _closed_if_decided(self) -> Round:
        num_waiting = len(self.cohort) - len(self.answered) - len(self.failed)
        if num_waiting == 0 or not self.met_by((*self.answered, *self.waiting)):
            return self._closed()
        if self.target is not None and len(self.answered) >= self.target:
            return replace(self, late=self.waiting)._closed()
        return self

    def _closed(self) -> Round:
        return replace(self, phase=Phase.CLOSED if self.met_by(self.answered) else Phase.ABANDONED)

    def met_by(self, sites: Collection[str]) -> bool:
        """Whether these sites' answers are enough."""
        if self.groups is None:
            return len(sites) >= self.needed
        whole = self.groups.whole(sites)
        counted = len({site for group in whole for site in group}.intersection(sites))
        return len(whole) >= self.groups.needed and counted >= self.needed

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal round."""
        return {
            "number": self.number,
            "cohort": list(self.cohort),
            "needed": self.needed,
            "phase": self.phase.value,
            "answered": list(self.answered),
            "failed": dict(self.failed),
            "late": list(self.late),
            "target": self.target,
            **({"groups": self.groups.to_json()} if self.groups is not None else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Round:
        return cls(
            number=value["number"],
            cohort=tuple(value["cohort"]),
            needed=value["needed"],
            phase=Phase(value["phase"]),
            answered=tuple(value["answered"]),
            failed=MappingProxyType(dict(value["failed"])),
            late=tuple(value["late"]),
            target=value["target"],
            groups=Groups.from_json(value["groups"]) if "groups" in value else None,
        )


def answers_needed(spec: FederationSpec, cohort_size: int) -> int:
    """How many of a cohort must answer: the quorum's share, rounded up, and no fewer than `min_sites`."""
    return max(spec.min_sites, math.ceil(spec.quorum * cohort_size - 1e-9))
