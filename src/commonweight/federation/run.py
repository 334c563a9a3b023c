"""START HERE: the loop that drives a run, round by round.

    choose a cohort ─► broadcast the global tensors ─► each site trains (engines/, train/) ─► check and fold each update
    (strategies/) ─► enough answered? ─► the strategy's step ─► commit (journal.py, folder.py) ─► next round

With secure sums (`secure_rounds.py`) keys go round before sites train, and masks come off before the strategy's step.

Whether sites are simulated or live is the engine's affair. What a round may do is decided by `round.py`. Updates are
folded in cohort order, one at a time, so that the same recipe gives the same bits whatever the engine and however
often it was killed. The global model of round r is evaluated while round r+1 trains from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import QuorumError, UpdateRefused
from ..privacy.adaptive_clip import UNDER_CLIP
from ..privacy.secure_aggregation.rows import Most
from ..recipe.compatibility import keeps_state
from ..recipe.schema import Recipe
from ..strategies.base import Strategy
from ..strategies.update import Update
from ..train.schedule import lr_in_round
from ..train.start import check_cluster
from .catch_up import bytes_to_catch_up
from .clusters import clusters_in_rounds
from .cohort import choose_cohort, new_round, resting_sites
from .evaluation import Evaluation
from .events import Events
from .global_model import GlobalModel
from .groups import Groups
from .journal import RunJournal
from .ledger import Charges
from .messages import Dropped, Engine, EvaluateTask, Outcome, TrainTask
from .private_rounds import spends_of
from .round import Answered, Committed, DeadlinePassed, Failed, Phase, Round
from .secure_rounds import SecureRounds, Terms
from .shelf import Shelf
from .tally import Sites, Tally, Timing

#: what an event says by itself, or does not say; a site's metric of such a name is not shown with it
_EVENT_FIELDS = frozenset(
    {"self", "t", "event", "round", "site", "examples", "bytes_up", "bytes_down", "codec", UNDER_CLIP}
)


class FederatedRun:
    """The federated arm of a run.

    Args:
        sites: the sites that may be invited to a round; asked for each, for sites may join on the way.
        secure: carries secure sums through; None: updates are seen one by one.
        charges: what rounds cost; None: nobody keeps a ledger.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Callable[[int], Sites],
        strategy: Strategy,
        model: GlobalModel,
        engine: Engine,
        journal: RunJournal,
        shelf: Shelf,
        events: Events,
        evaluation: Evaluation,
        secure: SecureRounds | None = None,
        charges: Charges | None = None,
    ) -> None:
        self.secure = secure
        self.recipe, self.strategy, self.model, self.engine = recipe, strategy, model, engine
        self.charges = charges or Charges(recipe, None)
        self.journal, self.shelf, self.events, self.evaluation = journal, shelf, events, evaluation
        self._sites = sites
        self.sites = sites(journal.last_round() + 1)
        self.last_answered = self._last_answered()
        model.clusters = clusters_in_rounds(journal)
        evaluation.start = self._start_of_evaluation
        self._enter(journal.last_round() + 1)
        self.keeps_state = keeps_state(recipe, strategy)
        evaluation.state_of = self.state_of

    def run(self) -> None:
        """Carry the global model through every round that is not committed yet, and evaluate the last.

        Raises:
            QuorumError: a round was abandoned; the model is as the round before left it, and a resumed run tries again.
            BudgetError: a round would have cost a site more than its budget; likewise.
        """
        self._begin()
        for number in range(self.journal.last_round() + 1, self.recipe.federation.rounds + 1):
            self._round(number)
        self._enter(self.recipe.federation.rounds + 1)
        self.model.announce(self.engine)
        self.evaluation.final()

    def _enter(self, number: int) -> None:
        """Round `number` is the next: what its tasks need to know of all sites' clusters."""
        self._number = number
        self._num_clusters = 1 + max(self.model.clusters.values(), default=-1)

    def _begin(self) -> None:
        """The latest committed state; at the start, the initial one, which is then round 0's."""
        commits = self.journal.commits()
        if commits:
            last = max(commits)
            # a kill may have come between a commit and this
            self.shelf.forget(last, commits[last].get("answered", ()))
            self.model.restore(last, commits[last]["state"])
        else:
            self.journal.commit(0, {"state": self.model.first()})

    def _round(self, number: int) -> None:
        """One round, from invitation to commit."""
        spec, timing = self.recipe.federation, Timing()
        self._enter(number)
        self.sites = self.evaluation.sites = self._sites(number)
        self.strategy.num_sites = len(self.sites.names)
        cohort = self._cohort(number)
        self.charges.foresee(number, cohort, self.sites)
        round = new_round(number, cohort, spec, len(self.sites.names), groups=self._groups(number, cohort))
        lr = lr_in_round(self.recipe.training, number, spec.rounds)
        self.events.emit(
            "round_opened", round=number, cohort=list(cohort) if len(cohort) <= 100 else len(cohort), lr=lr
        )
        self.model.announce(self.engine)

        self.model.open()
        if self.model.private is not None:
            self.model.private.open()
        up, down = len(self.strategy.update_channels), 1 + len(self.strategy.broadcast_channels)
        tally = Tally(lr, self.model.layout, self.sites, channels=up, copies_down=down)
        small = self.recipe.compression.down.has_stages
        if small or self.strategy.moves_base:
            whole = {site: tally.bytes_to(site) for site in cohort}
            tally.fetched = bytes_to_catch_up(self.journal.commits(), whole, small=small)
        if self.secure is not None:
            round = self._share_keys(round, lr, self.secure)
        if round.phase is not Phase.ABANDONED:
            for outcome in self._outcomes(number, cohort, lr, lost=round.failed):
                round = self._hear(round, outcome, tally, timing)
        if tally.late:
            round, _ = round.apply(DeadlinePassed(number))
        evaluated_at = time.perf_counter()
        if round.phase is not Phase.CLOSED:
            self._abandon(round)
        self._commit(round, tally, timing, evaluated_at)

    def _cohort(self, number: int) -> tuple[str, ...]:
        """The sites that are invited to a round."""
        separation = self.recipe.privacy.mechanism.separation
        resting = resting_sites(self.journal.commits(), number, separation) if separation > 1 else set[str]()
        spec, seed = self.recipe.federation, self.recipe.seed
        cohort = choose_cohort(self.sites.names, spec, seed=seed, round=number, resting=resting)
        if not cohort:
            raise QuorumError(
                f"round {number} has nobody to invite: all {len(self.sites.names)} sites took part in one of the "
                f"{separation - 1} rounds before",
                hint="let more sites join, or lower privacy.mechanism.min_separation in a new run",
                retry=True,
            )
        return cohort

    def _groups(self, number: int, cohort: Sequence[str]) -> Groups | None:
        """Of a round's secure sums."""
        if self.secure is None:
            return None
        return Groups.of(self.recipe, cohort, number, least=self.strategy.least_updates)

    def _share_keys(self, round: Round, lr: float, secure: SecureRounds) -> Round:
        """The keys and shares of a secure sum go round, before anybody trains."""
        most = Most.of(self.recipe, max(self.sites.steps[site] for site in round.cohort))
        told = round.cohort if self.recipe.privacy.secure_group_size is not None else ()
        assert round.groups is not None
        lost = secure.begin(round.number, round.groups, Terms(lr, self.strategy.correction(), most, told))
        for site, reason in lost.items():
            if round.phase is Phase.OPEN:
                round = self._give_up(round, site, reason)
        return round

    def _outcomes(self, number: int, cohort: Sequence[str], lr: float, lost: Collection[str]) -> Iterator[Outcome]:
        """The round's outcomes in cohort order, kept updates in their places; then those of the round before's
        evaluation. Sites that are `lost` already are asked for nothing."""
        kept = self.shelf.kept(number)
        tasks = [self._task(number, site, lr, len(cohort)) for site in cohort if site not in lost]
        todo: list[TrainTask | EvaluateTask] = [task for task in tasks if task.site not in kept]
        fresh = self.engine.run([*todo, *self.evaluation.due(number - 1)], deadline_s=self.recipe.federation.deadline_s)
        for task in tasks:
            yield self.shelf.take(task) if task.site in kept else next(fresh)
        yield from fresh

    def _task(self, number: int, site: str, lr: float, cohort: int) -> TrainTask:
        return TrainTask(
            number,
            site,
            lr,
            self.sites.steps[site],
            correction=self.strategy.correction(),
            state_in=self.state_of(site),
            state_out=self.shelf.site_file(site, number) if self.keeps_state else None,
            cohort=cohort,
            start=self._start(number, site),
            clip=self.model.private.task_clip if self.model.private is not None else None,
            secure=self.secure.seat(site) if self.secure is not None else None,
        )

    def _start(self, number: int, site: str) -> dict[str, Any]:
        """Which of the strategy's models a site starts from in a round."""
        return self.strategy.start(number, self.model.clusters.get(site), self._num_clusters)

    def _start_of_evaluation(self, site: str, final: bool) -> Mapping[str, Any]:
        """Which model a site is scored with: its cluster's. The result is scored as if another round began."""
        cluster = self.model.clusters.get(site)
        if cluster is None or final:
            return self._start(self._number, site)
        return {"kind": "cluster", "cluster": cluster}

    def state_of(self, site: str) -> str | None:
        """The file of a site's private state as it is true now: after the last round that it answered."""
        before = self.last_answered.get(site)
        return self.shelf.site_file(site, before) if self.keeps_state and before is not None else None

    def _hear(self, round: Round, outcome: Outcome, tally: Tally, timing: Timing) -> Round:
        """Take in one outcome: fold an update, note a failure, or keep an evaluation."""
        task = outcome.task
        if isinstance(task, EvaluateTask):
            self.evaluation.take(round.number - 1, outcome)
            return round
        assert isinstance(task, TrainTask)
        if isinstance(outcome, Dropped):
            timing.trained_at = time.perf_counter()
            if outcome.late:
                tally.late.append(task.site)
                self.events.emit("site_late", round=round.number, site=task.site)
                return round
            return self._give_up(round, task.site, outcome.reason)
        assert outcome.update is not None
        began = time.perf_counter()
        round = self._accept(round, task, outcome.update, tally)
        timing.trained_at = time.perf_counter()
        timing.fold += timing.trained_at - began
        return round

    def _accept(self, round: Round, task: TrainTask, update: Update, tally: Tally) -> Round:
        """Check one update, fold it, and keep it if it was dear."""
        try:
            self.model.check(update)
            check_cluster(update.cluster, task.start, update.site, update.round)
        except UpdateRefused as refusal:
            return self._give_up(round, update.site, refusal.message)
        after, verdict = round.apply(Answered(update.site, update.round))
        if not verdict.accepted:
            self.events.emit("update_refused", round=round.number, site=update.site, reason=verdict.reason)
            return round
        self.shelf.keep(update)
        self.model.fold(update)
        if self.model.private is not None:
            self.model.private.hear(update)
        if self.secure is not None:
            sent = self.secure.num_bytes(update.site)
            update = replace(update, num_bytes=sent, codec=self.recipe.privacy.rows_are)
        tally.add(update, relay=self.model.relay(update))
        if self.secure is not None:
            update = self.secure.shown(update)
        figures = {name: value for name, value in update.metrics.items() if name not in _EVENT_FIELDS}
        if self.secure is None:
            figures["examples"] = update.num_examples
        figures |= tally.bytes_told(update)
        self.events.emit("update_accepted", round=round.number, site=update.site, **figures)
        return after

    def _give_up(self, round: Round, site: str, reason: str) -> Round:
        self.events.emit("site_failed", round=round.number, site=site, reason=reason)
        return round.apply(Failed(site, round.number, reason))[0]

    def _abandon(self, round: Round) -> None:
        self._came_to_nothing(round)
        reasons = [f"{site}: {reason}" for site, reason in list(round.failed.items())[:3]]
        reasons += [f"{site}: no answer within federation.deadline_s" for site in round.late[:3]]
        needed, groups = f"{round.needed} are needed", round.groups
        if groups is not None and len(groups.members) > 1:
            whole = len(groups.whole(round.answered))
            needed = f"in {whole} of {len(groups.members)} groups enough for a sum; {groups.needed} groups are needed"
        raise QuorumError(
            f"round {round.number} was abandoned: {len(round.answered)} of {len(round.cohort)} sites answered, "
            f"{needed} ({'; '.join(reasons) or 'no reason given'})",
            hint="the model is as the round before left it; mend the sites or lower federation.quorum or min_sites, "
            "then repeat with --resume",
            retry=True,
        )

    def _came_to_nothing(self, round: Round) -> None:
        self.events.emit("round_abandoned", round=round.number, answered=list(round.answered))
        if self.secure is not None:
            self.secure.abandon(round.number)

    def _open(self, round: Round, secure: SecureRounds) -> Mapping[int, str]:
        """Get what takes the masks off the sums; why groups are lost, by their places.

        Raises:
            QuorumError: too few sites or groups went along.
        """
        try:
            return secure.open(round.number, round.answered)
        except QuorumError as error:
            self.events.emit("sum_not_opened", round=round.number, reason=error.message)
            self._came_to_nothing(round)
            raise

    def _commit(self, round: Round, tally: Tally, timing: Timing, evaluated_at: float) -> None:
        """The strategy's step; then name the new state in the journal: from that instant the round has happened."""
        number, lost = round.number, dict[int, str]()
        if self.secure is not None:
            lost.update(self._open(round, self.secure))
        round, verdict = round.apply(Committed(number))
        assert verdict.accepted, verdict.reason
        self.charges.pay(number, round.answered)
        state = self.model.close(number)
        if self.model.totals is not None:
            tally.take(self.model.totals)
        lost |= self.model.spoilt
        record = {
            "state": state,
            "cohort": list(round.cohort),
            "answered": list(round.answered),
            "failed": dict(round.failed),
            "late": list(round.late),
            **self._clusters_of(round.answered),
            **self._sums_of(round, lost),
            **tally.record(round.cohort, self.strategy, relays=bool(self.recipe.federation.relays)),
            "seconds": timing.seconds(evaluated_at, time.perf_counter()),
        }
        if self.model.private is not None:
            record["privacy"] = self.model.private.record()
        elif self.recipe.privacy.noisy_steps:
            # whoever was asked pays: it may have answered too late, or to no avail
            spends = spends_of(self.recipe, round.cohort, self.sites)
            record["privacy"] = {"sites": {site: asdict(spend) for site, spend in spends.items()}}
        self.journal.commit(number, record)
        self.model.committed(number)
        if self.secure is not None:
            self.secure.committed(number)
        self.last_answered.update(dict.fromkeys(round.answered, number))
        self.shelf.forget(number, round.answered)
        self.events.emit("round_committed", round=number, answered=len(round.answered), train_loss=record["train_loss"])
        self.events.flush()

    def _clusters_of(self, sites: Sequence[str]) -> dict[str, dict[str, int]]:
        """What a round's record says of its sites' clusters: nothing where there are none."""
        found = {site: self.model.clusters[site] for site in sites if site in self.model.clusters}
        return {"clusters": found} if found else {}

    def _sums_of(self, round: Round, lost: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
        """What a round's record says of its groups: nothing where there are none."""
        if round.groups is None or self.recipe.privacy.secure_group_size is None:
            return {}
        for place, reason in lost.items():
            self.events.emit("group_lost", round=round.number, sites=list(round.groups.members[place]), reason=reason)
        groups = enumerate(round.groups.members)
        return {"groups": [{"sites": list(s), **({"lost": lost[p]} if p in lost else {})} for p, s in groups]}

    def _last_answered(self) -> dict[str, int]:
        """The latest committed round that each site answered: which version of its private state is true."""
        return {s: r for r, record in self.journal.commits().items() for s in record.get("answered", ())}
