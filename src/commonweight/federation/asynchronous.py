"""The loop of an asynchronous strategy, in simulation: sites start and finish when a virtual clock says so.

    give idle sites work from the present version ─► the next arrival by the clock ─► too stale? refused ─► discounted
    and folded ─► the buffer is full? ─► the strategy's step ─► commit: a new version

A version is what a round is elsewhere: the journal's commits, the learning rate, evaluations and the report count
versions. A task depends on nothing but the version that it starts from, so that it is computed before that version is
gone, together with others of the same version, and its update lies by until its virtual arrival. Arrivals are taken in
order of (virtual time, the site's place). A site whose update lies in the buffer, or whose task failed, is given work
again from the next version: the buffer's updates are of distinct sites, and no site works twice from one version.

Each commit names the updates that are still under way, whose files are written before it: a resumed run has exactly
those and computes the rest again, to the same bits. Every update is in one commit, or refused.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import QuorumError, RecipeError, UpdateRefused
from ..model.tensors import NamedTensors
from ..recipe.schema import CohortSpec, Recipe
from ..registry import resolve
from ..seeding import derive_seed
from ..strategies.asynchronous import AsynchronousStrategy
from ..strategies.base import Strategy
from ..strategies.update import Update
from ..train.schedule import lr_in_round
from .clock import VirtualClock
from .evaluation import Evaluation
from .events import Events
from .folder import RunFolder, read_tensors, write_tensors
from .global_model import MemoryModel
from .journal import RunJournal
from .ledger import Charges
from .messages import Completed, Engine, EvaluateTask, Outcome, TrainTask
from .shelf import Shelf
from .tally import Sites, Tally, Timing

_UNDER_WAY = "under-way-"


@dataclass
class Work:
    """One site's task: `update` and `reason` are both empty until it is computed.

    Args:
        version: which it starts from.
        arrives: virtual seconds since the run began.
        update: what came of it, as the strategy keeps it.
        reason: why nothing came of it.
        sha256: of the file that it lies in; empty if it lies in memory only.
    """

    site: str
    version: int
    arrives: float
    update: Update | None = None
    reason: str = ""
    sha256: str = ""

    @property
    def is_computed(self) -> bool:
        return self.update is not None or bool(self.reason)


@dataclass
class Arrivals:
    """What has arrived since the present version began: sites by what became of their work, in order of arrival."""

    tally: Tally
    timing: Timing = field(default_factory=Timing)
    answered: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)

    def record(self, sites: Sites, strategy: Strategy) -> dict[str, Any]:
        arrived = [*self.answered, *self.failed, *self.stale]
        return {
            "cohort": [site for site in sites.names if site in arrived],
            "answered": self.answered,
            "failed": self.failed,
            "late": [site for site in dict.fromkeys(self.stale) if site not in self.answered],
            "updates": self.updates,
            **self.tally.record(arrived, strategy),
        }


class AsynchronousRun:
    """The federated arm of a run whose strategy is asynchronous."""

    def __init__(
        self,
        recipe: Recipe,
        sites: Sites,
        clock: VirtualClock,
        strategy: AsynchronousStrategy,
        model: MemoryModel,
        engine: Engine,
        journal: RunJournal,
        shelf: Shelf,
        folder: RunFolder,
        events: Events,
        evaluation: Evaluation,
        charges: Charges | None = None,
    ) -> None:
        self.charges = charges or Charges(recipe, None)
        self.recipe, self.sites, self.clock, self.strategy, self.model = recipe, sites, clock, strategy, model
        self.engine, self.journal, self.shelf, self.folder = engine, journal, shelf, folder
        self.events, self.evaluation = events, evaluation
        self.now = 0.0
        self.under_way: list[Work] = []

    def run(self) -> None:
        """Carry the global model through every version that is not committed yet, and evaluate the last.

        Raises:
            QuorumError: so many sites failed that a buffer cannot fill.
        """
        self._begin()
        for number in range(self.journal.last_round() + 1, self.recipe.federation.rounds + 1):
            self._version(number)
        self.model.announce(self.engine)
        self.evaluation.final()

    def _begin(self) -> None:
        """The latest committed version, and what was under way when it was committed."""
        commits = self.journal.commits()
        if not commits:
            self.journal.commit(0, {"state": {**self.model.first(), "now": 0.0, "under_way": []}})
            return
        last = max(commits)
        state = commits[last]["state"]
        self.model.restore(last, state)
        self.now, self.under_way = state["now"], [self._read(record) for record in state["under_way"]]
        self._tidy(last)  # a kill may have come between the commit and this

    def _version(self, number: int) -> None:
        """From a version, which is the present one, to version `number`."""
        lr = lr_in_round(self.recipe.training, number, self.recipe.federation.rounds)
        self.events.emit("round_opened", round=number, cohort=self.strategy.buffer, lr=lr)
        self.model.announce(self.engine)
        self.model.open()
        arrivals = Arrivals(Tally(lr=lr, layout=self.model.layout, sites=self.sites))
        while len(arrivals.answered) < self.strategy.buffer:
            self._give_work(number, arrivals)
            if not self.under_way:
                self._abandon(number, arrivals)
            work = min(self.under_way, key=lambda w: (w.arrives, self.sites.place(w.site)))
            if not work.is_computed:
                self._compute(number, lr)
            self.under_way.remove(work)
            self.now = work.arrives
            self._take(number, work, arrivals)
        if number == self.recipe.federation.rounds:  # nobody waits for the rest
            self.under_way.clear()
        self._compute(number, lr)  # what starts from this version must be done before it is gone
        self._commit(number, arrivals)

    def _give_work(self, number: int, arrivals: Arrivals) -> None:
        """Let as many sites work as may at once; who, if there are more, the seed decides."""
        engaged = {work.site for work in self.under_way} | {*arrivals.answered, *arrivals.failed}
        idle = [site for site in self.sites.names if site not in engaged]
        free = self.recipe.federation.cohort.size(len(self.sites.names)) - len(self.under_way)
        if free < len(idle):
            arrived = len(arrivals.answered) + len(arrivals.failed) + len(arrivals.stale)
            draw = random.Random(derive_seed(self.recipe.seed, "work", number, arrived))
            chosen = set(draw.sample(range(len(idle)), max(0, free)))
            idle = [site for index, site in enumerate(idle) if index in chosen]
        for site in idle:
            self.under_way.append(Work(site, number - 1, self.now + self.clock.duration(site, number)))

    def _compute(self, number: int, lr: float) -> None:
        """Carry out every task that is not yet, all of which start from the present version; evaluate it beside them,
        if that is due."""
        todo = {work.site: work for work in self.under_way if not work.is_computed}
        kept = self.shelf.kept(number)
        tasks = [TrainTask(number, site, lr, self.sites.steps[site]) for site in todo]
        fresh = [task for task in tasks if task.site not in kept]
        for task in tasks:
            if task.site in kept:
                self._keep(todo[task.site], self.shelf.take(task))
        for outcome in self.engine.run([*fresh, *self.evaluation.due(number - 1)]):
            if isinstance(outcome.task, EvaluateTask):
                self.evaluation.take(number - 1, outcome)
            else:
                assert isinstance(outcome.task, TrainTask)
                self._keep(todo[outcome.task.site], outcome)

    def _keep(self, work: Work, outcome: Outcome) -> None:
        """Put a fresh update by; it has not arrived yet."""
        if not isinstance(outcome, Completed):
            work.reason = outcome.reason or "no reason given"
            return
        assert outcome.update is not None
        try:
            self.model.check(outcome.update)
        except UpdateRefused as refusal:
            work.reason = refusal.message
            return
        self.shelf.keep(outcome.update)
        work.update = self.strategy.kept(self.model.state.theta, outcome.update)

    def _take(self, number: int, work: Work, arrivals: Arrivals) -> None:
        """One arrival: fold it, or say why not."""
        if work.update is None:
            arrivals.failed[work.site] = work.reason
            self.events.emit("site_failed", round=number, site=work.site, reason=work.reason)
            return
        staleness = number - 1 - work.version
        if staleness > self.strategy.max_staleness:
            arrivals.stale.append(work.site)
            arrivals.tally.hear(work.update)
            reason = f"it is {staleness} versions behind, more than max_staleness {self.strategy.max_staleness}"
            self.events.emit("update_refused", round=number, site=work.site, reason=reason)
            return
        began = time.perf_counter()
        update = work.update
        self.model.fold(replace(update, weight=self.strategy.discount(staleness)))
        arrivals.timing.fold += time.perf_counter() - began
        arrivals.tally.add(update)
        arrivals.answered.append(work.site)
        facts = {"site": work.site, "version": work.version, "staleness": staleness, "virtual_s": work.arrives}
        arrivals.updates.append(facts)
        self.events.emit(
            "update_accepted",
            round=number,
            **facts,
            examples=update.num_examples,
            loss=update.metrics.get("loss", 0.0),
            **arrivals.tally.bytes_told(update),
        )

    def _abandon(self, number: int, arrivals: Arrivals) -> None:
        self.events.emit("round_abandoned", round=number, answered=list(arrivals.answered))
        reasons = [f"{site}: {reason}" for site, reason in list(arrivals.failed.items())[:3]]
        raise QuorumError(
            f"version {number} was abandoned: {len(arrivals.answered)} sites answered, the buffer takes "
            f"{self.strategy.buffer}, and no other can ({'; '.join(reasons)})",
            hint="the model is as the version before left it; mend the sites, then repeat with --resume, or start anew "
            "with a smaller buffer",
            retry=True,
        )

    def _commit(self, number: int, arrivals: Arrivals) -> None:
        """The strategy's step; then name the new version, and what is under way, in the journal."""
        began = arrivals.timing.trained_at = time.perf_counter()
        self.charges.pay(number, arrivals.answered)
        under_way = [self._written(work) for work in self.under_way]
        record = {
            "state": {**self.model.close(number), "now": self.now, "under_way": under_way},
            **arrivals.record(self.sites, self.strategy),
            "virtual_s": self.now,
            "seconds": arrivals.timing.seconds(began, time.perf_counter()),
        }
        self.journal.commit(number, record)
        self._tidy(number)
        self.events.emit(
            "round_committed", round=number, answered=len(arrivals.answered), train_loss=record["train_loss"]
        )
        self.events.flush()

    # --- what lies on disk

    def _file(self, work: Work) -> Path:
        # begins with no digit: what the shelf keeps for one round has other names, and goes when that is committed
        place = self.sites.place(work.site)
        return self.folder.path / "updates" / f"{_UNDER_WAY}{work.version:04d}-{place:03d}.safetensors"

    def _group(self) -> str:
        """The name of the tensors in the file; those called `slot/…` are read back wide."""
        return "delta" if self.strategy.keeps == "delta" else "slot/model"

    def _written(self, work: Work) -> dict[str, Any]:
        """What the journal keeps of a task; its file is written, once."""
        record: dict[str, Any] = {"site": work.site, "version": work.version, "arrives": work.arrives}
        if work.update is None:
            return {**record, "reason": work.reason}
        update = work.update
        if not work.sha256:
            work.sha256 = write_tensors(self._file(work), {self._group(): update.channels[self.strategy.keeps]})
        return {
            **record,
            "sha256": work.sha256,
            "num_examples": update.num_examples,
            "num_label_tokens": update.num_label_tokens,
            "num_steps": update.num_steps,
            "num_bytes": update.num_bytes,
            "codec": update.codec,
            "loss": update.metrics.get("loss", 0.0),
        }

    def _read(self, record: Mapping[str, Any]) -> Work:
        work = Work(record["site"], record["version"], record["arrives"], reason=record.get("reason", ""))
        if work.reason:
            return work
        work.sha256 = record["sha256"]
        tensors: NamedTensors = read_tensors(self._file(work), self.model.layout, sha256=work.sha256)[self._group()]
        work.update = Update(
            work.site,
            work.version + 1,
            {self.strategy.keeps: tensors},
            1.0,
            num_examples=record["num_examples"],
            num_label_tokens=record["num_label_tokens"],
            num_steps=record["num_steps"],
            num_bytes=record.get("num_bytes", 0),
            codec=record.get("codec", ""),
            metrics={"loss": record["loss"]},
        )
        return work

    def _tidy(self, number: int) -> None:
        """Throw away what the commit has made rubbish: arrived updates, among others, and half-written files."""
        self.shelf.forget(number, ())
        current = {self._file(work) for work in self.under_way}
        for file in self.folder.path.glob(f"updates/*{_UNDER_WAY}*"):
            if file not in current:
                file.unlink(missing_ok=True)


def check_asynchronous(recipe: Recipe, num_sites: int | None) -> None:
    """Refuse an asynchronous strategy whose settings no version could meet.

    Args:
        num_sites: all of them; None: nobody knows yet.

    Raises:
        RecipeError: its buffer takes more sites than work at once, or fewer than must answer.
    """
    method, spec = recipe.federation.strategy, recipe.federation
    kind = resolve("strategy", method.name)
    strategy = kind(kind.Options(**method.options))
    if not isinstance(strategy, AsynchronousStrategy):
        return
    if spec.min_sites > strategy.buffer:
        raise RecipeError(
            f"federation.min_sites is {spec.min_sites}, but a version of {strategy.name} takes in the updates of "
            f"{strategy.buffer}",
            hint="lower min_sites, or use fedbuff with a buffer that is as large",
        )
    at_once = spec.cohort.count if num_sites is None else spec.cohort.size(num_sites)
    if at_once is not None and strategy.buffer > at_once:
        of = "" if num_sites is None else f" of {num_sites}"
        raise RecipeError(
            f"federation.strategy.buffer takes updates of {strategy.buffer} distinct sites, but only {at_once}{of} "
            "work at once",
            hint=f"set buffer to at most {at_once}, or let more sites work at once by federation.cohort",
        )


def with_equal_budget(recipe: Recipe, strategy: Strategy, num_sites: int) -> Recipe:
    """The recipe by which control arms plan their steps: a version's updates are a synchronous round's cohort."""
    if not isinstance(strategy, AsynchronousStrategy):
        return recipe
    cohort = CohortSpec(count=min(strategy.buffer, num_sites))
    return recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"cohort": cohort})})
