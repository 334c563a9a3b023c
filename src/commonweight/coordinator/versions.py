"""The loop of an asynchronous strategy over a network: what `federation/run.py` is to rounds.

    give idle sites that attend work from the present version ─► an update is accepted into the open buffer, by
    whichever replica it arrives at ─► the buffer is full: the next one opens ─► fold in the order of acceptance, the
    strategy's step, commit ─► fresh work

Nobody is waited for: sites that still work when a version is committed go on, and their updates are discounted when
they come. What was accepted, from which version and in which order, is in the database (`federation/version.py`), and
so a coordinator that was killed combines the same updates to the same bits. The order itself is that of arrival: no two
runs have the same.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..errors import QuorumError
from ..federation.asynchronous import Arrivals
from ..federation.evaluation import Evaluation
from ..federation.events import Events
from ..federation.global_model import GlobalModel
from ..federation.ledger import Charges
from ..federation.messages import TrainTask
from ..federation.round import DeadlinePassed, Failed, Phase
from ..federation.shelf import Shelf
from ..federation.tally import Tally
from ..federation.version import Version
from ..recipe.schema import Recipe
from ..seeding import derive_seed
from ..strategies.asynchronous import AsynchronousStrategy
from ..train.schedule import lr_in_round
from .engine import Errand, NetworkEngine
from .journal import StoreJournal
from .roster import Roster
from .store import TaskRow

#: without a notice, the state is looked at this often: for sites that come and go
_LOOK_S = 0.5
#: with more sites than this, looks are spaced out
_FEW = 16


class Versions:
    """The federated arm of a networked run whose strategy is asynchronous.

    Args:
        flush: told when there is nothing to do but wait.
    """

    def __init__(
        self,
        recipe: Recipe,
        roster: Roster,
        strategy: AsynchronousStrategy,
        model: GlobalModel,
        engine: NetworkEngine,
        journal: StoreJournal,
        shelf: Shelf,
        events: Events,
        evaluation: Evaluation,
        flush: Callable[[], None],
        charges: Charges | None = None,
    ) -> None:
        self.charges = charges or Charges(recipe, None)
        self.recipe, self.roster, self.strategy, self.model, self.engine = recipe, roster, strategy, model, engine
        self.journal, self.shelf, self.events, self.evaluation, self.flush = journal, shelf, events, evaluation, flush
        self.store, self.run_id, self.lease = engine.store, engine.run_id, engine.led.lease
        self.sites = roster.present()
        self._out: Mapping[str, tuple[str, int]] = {}
        self._away: set[str] = set()
        self._errand: tuple[int, Errand] | None = None

    def run(self) -> None:
        """Carry the global model through every version that is not committed yet, and evaluate the last.

        Raises:
            QuorumError: so many sites failed that a buffer cannot fill.
        """
        self._begin()
        for number in range(self.journal.last_round() + 1, self.recipe.federation.rounds + 1):
            self._version(number)
        self._evaluate_no_more()
        self.model.announce(self.engine)
        self.evaluation.final()

    def _begin(self) -> None:
        commits = self.journal.commits()
        if commits:
            last = max(commits)
            self.shelf.forget(last, ())  # a kill may have come between the commit and this
            self.model.restore(last, commits[last]["state"])
        else:
            self.journal.commit(0, {"state": self.model.first()})

    def _version(self, number: int) -> None:
        """From a version, which is the present one, to version `number`."""
        last, buffer = self.recipe.federation.rounds, self.strategy.buffer
        lr = lr_in_round(self.recipe.training, number, last)
        self.events.emit("round_opened", round=number, cohort=buffer, lr=lr)
        self.model.announce(self.engine)
        opened = Version.first(number, buffer, self.strategy.max_staleness, last)
        self.store.open_round(self.lease, opened, self.engine.base)
        self.model.open()
        self._evaluate(number - 1)
        arrivals = Arrivals(Tally(lr=lr, layout=self.model.layout, sites=self.sites))
        version = self._filled(number, lr, arrivals)
        if version.phase is Phase.ABANDONED:
            self._abandon(version)
        self._commit(number, arrivals)

    def _filled(self, number: int, lr: float, arrivals: Arrivals) -> Version:
        """The version, once nothing more goes into its buffer."""
        news, bus = threading.Event(), self.store.bus
        with bus.subscribe(f"run/{self.run_id}", news.set), bus.subscribe("sites", news.set):
            while True:
                began = time.monotonic()
                self.engine.led.check()
                news.clear()
                # first the tasks, then the buffer: an update that is accepted in between is in both, never in neither
                out = self.store.open_training(self.run_id)
                found = self.store.round_state(self.run_id, number)
                assert found is not None
                version = found[0]
                assert isinstance(version, Version)
                self._take(version, arrivals)
                if version.phase is not Phase.OPEN:
                    return version
                self._hand_out(version, out, lr, arrivals)
                self._look_at_evaluation()
                self.flush()
                took = time.monotonic() - began
                news.wait(_LOOK_S)
                if len(self.sites.names) > _FEW:  # many answer at once: no look for each, but one for all of a while
                    time.sleep(min(took, _LOOK_S))

    # --- what arrives

    def _take(self, version: Version, arrivals: Arrivals) -> None:
        """Take in what was accepted since the last look, in the order of acceptance, and who has failed."""
        for site, started in version.answers[len(arrivals.answered) :]:
            (upload,) = self.store.accepted_uploads(self.run_id, started + 1, {site})
            update, staleness = self.engine.stored_update(upload), version.staleness(started + 1)
            self.model.fold(replace(update, weight=self.strategy.discount(staleness)))
            arrivals.tally.add(update)
            arrivals.answered.append(site)
            facts = {"site": site, "version": started, "staleness": staleness}
            arrivals.updates.append(facts)
            arrivals.timing.trained_at = time.perf_counter()
            self.events.emit(
                "update_accepted",
                round=version.number,
                **facts,
                examples=update.num_examples,
                loss=update.metrics.get("loss", 0.0),
                **arrivals.tally.bytes_told(update),
            )
        for site, reason in version.failed.items():
            if site not in arrivals.failed:
                arrivals.failed[site] = reason
                self.events.emit("site_failed", round=version.number, site=site, reason=reason)

    # --- work

    def _hand_out(self, version: Version, out: Mapping[str, tuple[str, int]], lr: float, arrivals: Arrivals) -> None:
        """Let as many of the sites that attend work as may at once; who, if there are more, the seed decides.

        A site whose update lies in the buffer, or whose task failed, is given work again from the next version.

        Args:
            out: (site, round) of the training tasks that are open, by id.
        """
        self.sites = self.evaluation.sites = self.roster.present()
        self._hear_of_ended(version, out, arrivals)
        busy = {site for site, _ in out.values()}
        away = self._absences(version.number)
        patience_s = self.recipe.federation.patience_s
        working = sum(away.get(site, 0.0) <= patience_s for site in busy)
        engaged = {*busy, *version.answered, *version.failed, *away}
        idle = [site for site in self.sites.names if site not in engaged]
        free = max(0, self.recipe.federation.cohort.size(max(1, len(self.sites.names))) - working)
        idle.sort(key=lambda site: random.Random(derive_seed(self.recipe.seed, "work", version.number, site)).random())
        states = self.store.task_states(self.run_id, version.number) if idle else {}
        rows = [row for site in idle[:free] if (row := self._task(site, version, lr, states)) is not None]
        self.store.add_tasks(self.lease, rows)
        self._give_up_if_hopeless(version)

    def _task(self, site: str, version: Version, lr: float, states: Mapping[str, tuple[str, str]]) -> TaskRow | None:
        """A site's task from the present version; or nothing, if it has failed at it too often, which the version is
        then told."""
        number, attempt, before = version.number, 0, ""
        task = TrainTask(
            number, site, lr, self.sites.steps[site], correction=self.strategy.correction(), cohort=version.needed
        )
        while (row := self.engine.row(task, number, None, attempt)).id in states:
            before, attempt = row.id, attempt + 1
        if not attempt:
            return row
        ended = self.store.task(before)
        assert ended is not None
        if ended.state != "refused" and attempt <= self.recipe.federation.retries:
            self.events.emit("task_repeated", round=number, site=site, reason=ended.reason)
            return row
        why = f"its policy refused: {ended.reason}" if ended.state == "refused" else ended.reason
        self.store.apply(self.run_id, number, Failed(site, number, why or "its update is lost"))
        return None

    def _hear_of_ended(self, version: Version, out: Mapping[str, tuple[str, int]], arrivals: Arrivals) -> None:
        """Tell of tasks from earlier versions that have ended without an update, since this was last looked at."""
        before, self._out = self._out, out
        for name in before.keys() - out.keys():
            (site, round), row = before[name], self.store.task(name)
            assert row is not None
            if row.state == "done" or round >= version.number:
                continue
            if version.is_stale(round):
                arrivals.stale.append(site)
                self.events.emit("update_refused", round=version.number, site=site, reason=row.reason)
            else:
                self.events.emit("task_repeated", round=version.number, site=site, reason=row.reason)

    def _absences(self, number: int) -> dict[str, float]:
        """Seconds for which each site has been away that is."""
        found = {site: self.engine.presence.away_for(site) for site in self.sites.names}
        away = {site: seconds for site, seconds in found.items() if seconds is not None}
        for site in away.keys() - self._away:
            self.events.emit("site_away", round=number, site=site)
        for site in (self._away - away.keys()).intersection(found):
            self.events.emit("site_back", round=number, site=site)
        self._away = set(away)
        return away

    def _give_up_if_hopeless(self, version: Version) -> None:
        """Abandon a version whose buffer cannot fill, whoever comes back."""
        able = {*self.sites.names, *self.roster.waiting} - {*version.answered, *version.failed}
        short = len(version.answered) + len(able) < version.needed
        if short and (version.failed or self.roster.named):  # to a run that is open to everyone, others may come
            self.store.apply(self.run_id, version.number, DeadlinePassed(version.number), lease=self.lease)

    def _abandon(self, version: Version) -> None:
        self.events.emit("round_abandoned", round=version.number, answered=list(version.answered))
        raise QuorumError(
            f"version {version.number} was abandoned: {len(version.answered)} sites answered, the buffer takes "
            f"{version.needed}, and no other can ({_reasons(version.failed)})",
            hint="mend the sites, or use a smaller buffer, then submit again",
        )

    # --- evaluation, beside the versions

    def _evaluate(self, round: int) -> None:
        """Have a version evaluated if that is due. Nobody waits for it: while the evaluation of an earlier one goes on,
        this one's is left out."""
        tasks = self.evaluation.due(round) if self._errand is None else []
        if tasks:
            errand = Errand(self.engine, tasks, None)
            errand.begin()
            self._errand = round, errand

    def _look_at_evaluation(self) -> None:
        if self._errand is None:
            return
        round, errand = self._errand
        errand.look()
        if len(errand.decided) == len(errand.tasks):
            for index in range(len(errand.tasks)):
                self.evaluation.take(round, errand.outcome_of[index])
            self._errand = None

    def _evaluate_no_more(self) -> None:
        """The last version is evaluated in the end; an evaluation of an earlier one that still goes on is dropped."""
        if self._errand is not None:
            left = [row.id for row in self._errand[1].rows]
            self.store.withdraw(self.lease, left, "the last version is evaluated instead")
            self._errand = None

    # --- a version's end

    def _commit(self, number: int, arrivals: Arrivals) -> None:
        """The strategy's step; then name the new version in the journal."""
        began = time.perf_counter()
        self.charges.pay(number, arrivals.answered)
        record = {
            "state": self.model.close(number),
            **arrivals.record(self.sites, self.strategy),
            "seconds": arrivals.timing.seconds(began, time.perf_counter()),
        }
        self.journal.commit(number, record)
        self.shelf.forget(number, ())
        self.events.emit(
            "round_committed", round=number, answered=len(arrivals.answered), train_loss=record["train_loss"]
        )
        self.events.flush()


def _reasons(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in list(failed.items())[:3]) or "no reason given"
