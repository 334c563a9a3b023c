"""One version of an asynchronous run as a pure state machine: a round whose sites need not have started together.

    OPEN ──(`target` distinct sites have answered)──► CLOSED ──(committed)──► COMMITTED
      └───(the leader finds that no others can)─────► ABANDONED

An answer is to a task, and a task to the version that it starts from: the task of round v + 1 starts from version v.
Whoever asks one question alone is told: is there a buffer open that this answer may go into, and is it not too stale?
The next version opens as this one closes, before it is combined: so an answer is never refused for coming meanwhile.
The order of acceptance is the order of folding, and is kept with the version each site started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from .round import Answered, Event, Failed, Phase, Round, Verdict


@dataclass(frozen=True)
class Version(Round):
    """A version's state. Nobody is invited to it (`cohort` is empty): whoever has a task may answer.

    Args:
        needed, target: both K, the buffer's size.
        answered: sites whose update was accepted, in fold order; no site twice.
        failed: sites whose task has failed for good; they are given work again from the next version.
        started: the version that each of `answered` started from.
        max_staleness: an answer is refused if more versions than this lie between its start and this version's.
        last: the number of the run's last version; after it none opens.
    """

    started: tuple[int, ...] = ()
    max_staleness: int = 0
    last: int = 0

    @classmethod
    def first(cls, number: int, buffer: int, max_staleness: int, last: int) -> Version:
        """A version that nobody has answered yet."""
        return cls(number, (), buffer, target=buffer, max_staleness=max_staleness, last=last)

    def following(self) -> Version | None:
        """The version that opens as this one closes; None after the last."""
        if self.number >= self.last:
            return None
        return Version.first(self.number + 1, self.needed, self.max_staleness, self.last)

    @property
    def answers(self) -> tuple[tuple[str, int], ...]:
        """Site and version that it started from, in fold order."""
        return tuple(zip(self.answered, self.started, strict=True))

    def staleness(self, round: int) -> int:
        """τ of an answer to a task of that round: by how many versions the model has moved on since."""
        return self.number - round

    def is_stale(self, round: int) -> bool:
        """Whether an answer to a task of that round is refused, from now on for ever."""
        return self.staleness(round) > self.max_staleness

    @property
    def oldest(self) -> int:
        """The earliest round whose tasks may still be answered once this version is committed: those before are
        withdrawn. Beyond every round after the last version."""
        return self.last + 1 if self.number >= self.last else self.number + 1 - self.max_staleness

    @property
    def waiting(self) -> tuple[str, ...]:
        """Nobody in particular."""
        return ()

    def apply(self, event: Event) -> tuple[Version, Verdict]:
        after, verdict = super().apply(event)
        assert isinstance(after, Version)
        if verdict.accepted and isinstance(event, Answered):
            after = replace(after, started=(*self.started, event.round - 1))
        return after, verdict

    def _refusal(self, event: Event) -> str:
        if not isinstance(event, Answered | Failed):
            return super()._refusal(event)
        if event.round > self.number:
            return f"it is for round {event.round}; version {self.number} is {self.phase.value}"
        if isinstance(event, Answered) and self.is_stale(event.round):
            return (
                f"it is {self.staleness(event.round)} versions behind, more than max_staleness {self.max_staleness}; "
                "fresh work is given out instead"
            )
        if self.phase is not Phase.OPEN:
            return f"version {self.number} is {self.phase.value}"
        if event.site in self.answered:
            return f"an update of site {event.site!r} lies in version {self.number}'s buffer already"
        if event.site in self.failed:
            return f"site {event.site!r} was given up in version {self.number}"
        return ""

    def _closed_if_decided(self) -> Version:
        closed = self._closed() if len(self.answered) >= self.needed else self
        assert isinstance(closed, Version)
        return closed

    def to_json(self) -> dict[str, Any]:
        more = {"started": list(self.started), "max_staleness": self.max_staleness, "last": self.last}
        return {**super().to_json(), **more}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Version:
        return cls(
            number=value["number"],
            cohort=(),
            needed=value["needed"],
            phase=Phase(value["phase"]),
            answered=tuple(value["answered"]),
            failed=MappingProxyType(dict(value["failed"])),
            target=value["target"],
            started=tuple(value["started"]),
            max_staleness=value["max_staleness"],
            last=value["last"],
        )


def parsed(value: Mapping[str, Any]) -> Round:
    """A round or a version from its plain data."""
    return Version.from_json(value) if "started" in value else Round.from_json(value)
