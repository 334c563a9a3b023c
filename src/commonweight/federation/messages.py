"""What goes between the loop and whoever runs participants: tasks out, outcomes back.

Everything but the tensors is plain data that turns into JSON. Tensors stay in flat memory (`model/tensors.py`): the
engine holds the global ones since `broadcast`, and an update's are views that are valid until the next outcome is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..model.tensors import NamedTensors
from ..strategies.update import Update
from ..train.start import FROM_THETA


@dataclass(frozen=True)
class TrainTask:
    """One site's local work in one round, from the global tensors last broadcast.

    Args:
        lr: this round's learning rate.
        steps: optimizer steps.
        correction: what the strategy changes in the local gradient.
        start: which of the global models the work starts from (`train/start.py`).
        state_in, state_out: files of the site's private state before and after (SCAFFOLD's cᵢ), relative to the run's
        folder.
        cohort: sites invited to the round; 0: not said.
        clip: the norm to which the update is clipped, where rounds differ in that; None: as the recipe says.
        secure: the sum in which the update is to be masked, over a network (`secure_rounds.py`); None: it is not.
    """

    round: int
    site: str
    lr: float
    steps: int
    correction: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    state_in: str | None = None
    state_out: str | None = None
    cohort: int = 0
    start: Mapping[str, Any] = field(default_factory=lambda: dict(FROM_THETA))
    clip: float | None = None
    secure: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class EvaluateTask:
    """Score a model on sites' held-out rows. The result is `Scores` as JSON, by site.

    Args:
        sites: on whose rows.
        arm: `global` (the tensors last broadcast), `base` (adapter off), or `personal` (the site's own model, mixed
            with the global one).
        generate: also generate an answer for each prompt, for exact match.
        starts: by site, which of several global models is the site's (`train/start.py`). Its result then says beside
            the scores which it was, as `cluster`.
        state_in: file of the private state of the one site, whose parts then stand in the place of the initial ones.
        alpha: `personal`: the share of the site's own model; None: the site chooses, and says so in the result.
    """

    sites: tuple[str, ...]
    arm: str = "global"
    generate: bool = False
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state_in: str | None = None
    alpha: float | None = 1.0


@dataclass(frozen=True)
class ChainTask:
    """A control arm: train on some sites' data alone through every round, on the federated arm's budget of steps.

    Args:
        key: names the result in the journal.
        arm: `local` (one site) or `centralised` (all of them pooled).
        sites: whose training rows.
        rounds: (round, learning rate, optimizer steps) in order; the optimizer's state carries on between them.
        own: the sites whose held-out rows are scored after each round.
        everyone: the sites whose held-out rows are scored after the last.
        folder: where its tensors are kept, relative to the run's folder.
        generate: also generate answers for exact match at the end.
    """

    key: str
    arm: str
    sites: tuple[str, ...]
    rounds: tuple[tuple[int, float, int], ...]
    own: tuple[str, ...]
    everyone: tuple[str, ...]
    folder: str
    generate: bool = False


@dataclass(frozen=True)
class SampleTask:
    """Answer held-out prompts: `prompts` are (site, index of its held-out row). The result has `answers`, in their
    order. `starts` and `state_in` are as in `EvaluateTask`."""

    prompts: tuple[tuple[str, int], ...]
    arm: str = "global"
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state_in: str | None = None


#: the steps of a secure sum that a site takes beside training, in order; over a network each is a kind of task
SUM_STEPS = ("keys", "shares", "consent", "reveal")


@dataclass(frozen=True)
class SumTask:
    """One step of a secure sum, by one site (`secure_rounds.py`). The result is the step's message, bytes as hex.

    Args:
        step: one of `SUM_STEPS`.
        attempt: which of the round's; each has keys of its own.
        sites: those invited to the sum, in the order of folding.
        terms: what all of them are told alike (`Terms`).
        said: what others have said so far. `shares`: each site's keys; `consent`: `survivors`; `reveal`: each
            survivor's signature.
    """

    round: int
    site: str
    step: str
    attempt: int
    sites: tuple[str, ...]
    terms: Mapping[str, Any]
    said: Mapping[str, Any]


Task = TrainTask | EvaluateTask | ChainTask | SampleTask | SumTask


@dataclass(frozen=True)
class Completed:
    """A task is done: a training task brings an update, the others plain data."""

    task: Task
    update: Update | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A task will not be done: it failed for good, or (`late`) the deadline passed or its site is away."""

    task: Task
    reason: str
    late: bool = False


Outcome = Completed | Dropped


class Engine(Protocol):
    """Carries tasks to participants and outcomes back."""

    def broadcast(self, theta: NamedTensors, further: Mapping[str, NamedTensors]) -> None:
        """Make these the global tensors. Nothing may be running."""

    def run(self, tasks: Sequence[Task], *, deadline_s: float | None = None) -> Iterator[Outcome]:
        """Carry out tasks, at once as far as there is room, and give their outcomes in the order of `tasks`.

        Training tasks that are not done `deadline_s` after the start come as `Dropped(late=True)`; other tasks are
        waited for.
        """
