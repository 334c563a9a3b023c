"""START HERE: the loop that drives a run, round by round.

    choose a cohort ─► broadcast the global tensors ─► each site trains (engines/, train/) ─► check and fold each update
    (strategies/) ─► enough answered? ─► the strategy's step ─► commit (journal.py, folder.py) ─► next round

Whether sites are simulated or live is the engine's affair. What a round may do is decided by `round.py`. Updates are
folded in cohort order, one at a time, so that the same recipe gives the same bits whatever the engine and however
often it was killed. The global model of round r is evaluated while round r+1 trains from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import QuorumError, RoundError, UpdateRefused
from ..model.tensors import Layout, NamedTensors, first_non_finite
from ..recipe.schema import Recipe
from ..strategies.base import Fold, ServerState, Strategy
from ..strategies.update import Update, check
from ..train.schedule import lr_in_round
from .cohort import choose_cohort
from .evaluation import Evaluation
from .events import Events
from .folder import RunFolder, read_tensors, up_to_round, write_tensors
from .journal import Journal
from .messages import Completed, Dropped, Engine, EvaluateTask, Outcome, TrainTask
from .round import Answered, Committed, DeadlinePassed, Failed, Phase, Round, answers_needed
from .tally import Sites, Tally, Timing

#: an accepted update that took its site longer than this is kept on disk until its round commits; others are redone
KEEP_UPDATES_OVER_S = 1.0


class FederatedRun:
    """The federated arm of a run.

    Args:
        save_adapter: writes global tensors into a folder as an adapter that others can open.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Sites,
        strategy: Strategy,
        engine: Engine,
        folder: RunFolder,
        journal: Journal,
        events: Events,
        evaluation: Evaluation,
        save_adapter: Callable[[NamedTensors, Path], None],
    ) -> None:
        self.recipe, self.sites, self.strategy, self.engine = recipe, sites, strategy, engine
        self.folder, self.journal, self.events, self.save_adapter = folder, journal, events, save_adapter
        self.evaluation = evaluation
        self.last_answered = self._last_answered()

    def run(self, theta: NamedTensors) -> ServerState:
        """Carry the global tensors through every round that is not committed yet, and evaluate the last.

        Args:
            theta: the initial global tensors; a resumed run takes their layout only.

        Raises:
            QuorumError: a round was abandoned; the model is as the round before left it, and a resumed run tries again.
        """
        state = self._begin(theta)
        for number in range(self.journal.last_round() + 1, self.recipe.federation.rounds + 1):
            state = self._round(number, state)
        self.engine.broadcast(state.theta, {})
        self.evaluation.final()
        return state

    def _begin(self, theta: NamedTensors) -> ServerState:
        """The latest committed state; at the start, the initial one, which is then round 0's."""
        commits = self.journal.commits()
        if commits:
            last = max(commits)
            self._forget(last, commits[last].get("answered", ()))  # a kill may have come between a commit and this
            return self._read_state(last, commits[last]["state"], theta.layout)
        state = self.strategy.init(theta)
        self.journal.commit(0, {"state": self._write_state(0, state)})
        return state

    def _round(self, number: int, state: ServerState) -> ServerState:
        """One round, from invitation to commit."""
        spec, timing = self.recipe.federation, Timing()
        cohort = choose_cohort(self.sites.names, spec, seed=self.recipe.seed, round=number)
        round = Round(number, cohort, answers_needed(spec, len(cohort)))
        lr = lr_in_round(self.recipe.training, number, spec.rounds)
        self.events.emit(
            "round_opened", round=number, cohort=list(cohort) if len(cohort) <= 100 else len(cohort), lr=lr
        )
        channels = {name: state.slots[name] for name in self.strategy.broadcast_channels}
        self.engine.broadcast(state.theta, channels)

        fold = self.strategy.open(state)
        tally = Tally(lr=lr, bytes_a_copy=state.theta.layout.num_bytes)
        for outcome in self._outcomes(number, cohort, lr, state):
            round = self._hear(round, outcome, state, fold, tally, timing)
        if tally.late:
            round, _ = round.apply(DeadlinePassed(number))
        evaluated_at = time.perf_counter()
        if round.phase is not Phase.CLOSED:
            self._abandon(round)

        state = self.strategy.close(state, fold)
        bad = first_non_finite(state.theta)
        if bad is not None:
            raise RoundError(
                f"round {number}: {self.strategy.name}'s step made {bad!r} non-finite; the round was not committed",
                hint="lower the strategy's lr or the sites' training.lr",
            )
        self._commit(round, state, tally, timing, evaluated_at)
        return state

    def _outcomes(self, number: int, cohort: Sequence[str], lr: float, state: ServerState) -> Iterator[Outcome]:
        """The round's outcomes in cohort order, kept updates in their places; then those of the round before's
        evaluation."""
        kept = self.journal.kept_updates(number)
        tasks = [self._task(number, site, lr) for site in cohort]
        todo: list[TrainTask | EvaluateTask] = [task for task in tasks if task.site not in kept]
        fresh = self.engine.run([*todo, *self.evaluation.due(number - 1)], deadline_s=self.recipe.federation.deadline_s)
        for task in tasks:
            yield self._kept(task, kept[task.site], state) if task.site in kept else next(fresh)
        yield from fresh

    def _task(self, number: int, site: str, lr: float) -> TrainTask:
        place, before = self.sites.place(site), self.last_answered.get(site)
        state = self.strategy.site_state
        return TrainTask(
            number,
            site,
            lr,
            self.sites.steps[site],
            correction=self.strategy.correction(),
            state_in=self.folder.site_file(place, before) if state and before is not None else None,
            state_out=self.folder.site_file(place, number) if state else None,
        )

    def _hear(
        self, round: Round, outcome: Outcome, state: ServerState, fold: Fold, tally: Tally, timing: Timing
    ) -> Round:
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
        round = self._accept(round, outcome.update, state, fold, tally)
        timing.trained_at = time.perf_counter()
        timing.fold += timing.trained_at - began
        return round

    def _accept(self, round: Round, update: Update, state: ServerState, fold: Fold, tally: Tally) -> Round:
        """Check one update, fold it, and keep it if it was dear."""
        try:
            check(update, round=round.number, layout=state.theta.layout, channels=self.strategy.update_channels)
        except UpdateRefused as refusal:
            return self._give_up(round, update.site, refusal.message)
        after, verdict = round.apply(Answered(update.site, update.round))
        if not verdict.accepted:
            self.events.emit("update_refused", round=round.number, site=update.site, reason=verdict.reason)
            return round
        if update.metrics.get("seconds", 0.0) > KEEP_UPDATES_OVER_S and not update.metrics.get("kept"):
            self._keep(update)
        fold.add(update)
        tally.add(update)
        self.events.emit(
            "update_accepted", round=round.number, site=update.site, examples=update.num_examples, **update.metrics
        )
        return after

    def _give_up(self, round: Round, site: str, reason: str) -> Round:
        self.events.emit("site_failed", round=round.number, site=site, reason=reason)
        return round.apply(Failed(site, round.number, reason))[0]

    def _abandon(self, round: Round) -> None:
        self.events.emit("round_abandoned", round=round.number, answered=list(round.answered))
        reasons = [f"{site}: {reason}" for site, reason in list(round.failed.items())[:3]]
        reasons += [f"{site}: no answer within federation.deadline_s" for site in round.late[:3]]
        raise QuorumError(
            f"round {round.number} was abandoned: {len(round.answered)} of {len(round.cohort)} sites answered, "
            f"{round.needed} are needed ({'; '.join(reasons) or 'no reason given'})",
            hint="the model is as the round before left it; mend the sites or lower federation.quorum or min_sites, "
            "then repeat with --resume",
            retry=True,
        )

    def _commit(self, round: Round, state: ServerState, tally: Tally, timing: Timing, evaluated_at: float) -> None:
        """Write the new state, then name it in the journal: from that instant the round has happened."""
        number = round.number
        round, verdict = round.apply(Committed(number))
        assert verdict.accepted, verdict.reason
        self.save_adapter(state.theta, self.folder.round_folder(number))
        record = {
            "state": self._write_state(number, state),
            "cohort": list(round.cohort),
            "answered": list(round.answered),
            "failed": dict(round.failed),
            "late": list(round.late),
            **tally.record(len(round.cohort), self.strategy),
            "seconds": timing.seconds(evaluated_at, time.perf_counter()),
        }
        self.journal.commit(number, record)
        self.last_answered.update(dict.fromkeys(round.answered, number))
        self._forget(number, round.answered)
        self.events.emit("round_committed", round=number, answered=len(round.answered), train_loss=record["train_loss"])
        self.events.flush()

    def _forget(self, round: int, answered: Sequence[str]) -> None:
        """Delete what the commit of `round` has made rubbish."""
        self.folder.forget_before(round, self.recipe.output.keep_rounds)
        for site in answered if self.strategy.site_state else ():
            current = self.folder.path / self.folder.site_file(self.sites.place(site), round)
            for file in up_to_round(current.parent, round):
                if file != current:
                    file.unlink(missing_ok=True)

    def _last_answered(self) -> dict[str, int]:
        """The latest committed round that each site answered: which version of its private state is true."""
        return {s: r for r, record in self.journal.commits().items() for s in record.get("answered", ())}

    def _write_state(self, round: int, state: ServerState) -> dict[str, str]:
        groups = {"theta": state.theta, **{f"slot/{name}": slot for name, slot in state.slots.items()}}
        file = self.folder.state_file(round)
        return {"file": file.name, "sha256": write_tensors(file, groups)}

    def _read_state(self, round: int, record: Mapping[str, str], layout: Layout) -> ServerState:
        groups = read_tensors(self.folder.state_file(round), layout, sha256=record["sha256"])
        slots = {name.removeprefix("slot/"): t for name, t in groups.items() if name != "theta"}
        return ServerState(groups["theta"], slots)

    def _keep(self, update: Update) -> None:
        file = self.folder.update_file(update.round, self.sites.place(update.site))
        sha256 = write_tensors(file, update.channels)
        numbers = {
            "weight": update.weight,
            "num_examples": update.num_examples,
            "num_label_tokens": update.num_label_tokens,
            "num_steps": update.num_steps,
            "metrics": dict(update.metrics),
        }
        self.journal.keep_update(update.round, update.site, {"sha256": sha256, **numbers})

    def _kept(self, task: TrainTask, record: Mapping[str, Any], state: ServerState) -> Completed:
        """An update that a killed process had accepted."""
        numbers = {key: value for key, value in record.items() if key not in ("sha256", "metrics")}
        file = self.folder.update_file(task.round, self.sites.place(task.site))
        channels = read_tensors(file, state.theta.layout, sha256=record["sha256"])
        metrics = {**record["metrics"], "kept": 1.0}
        return Completed(task, Update(task.site, task.round, channels, metrics=metrics, **numbers))
