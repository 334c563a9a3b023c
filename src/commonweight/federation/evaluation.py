"""When models are evaluated on the sites' held-out rows, and where the scores go.

Journal keys: `scores/base`, `scores/federated`, `scores/personal` (every held-out row's score, by site) and
`curve/federated/NNNN`, `curve/personal/NNNN` (a site's [Σ nats, label tokens] after round NNNN). Where sites have
different global models, `scores/federated` also has `clusters`: whose model each site was scored with.

A site is evaluated with the model that it uses: the global one, in which its personal parts stand in their places. If
its strategy gives each site a whole model of its own, that is an arm beside the global one: `personal`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RoundError
from ..recipe.compatibility import personal_parts
from ..recipe.schema import PROMPT_KINDS, Recipe
from ..strategies.base import Strategy
from ..train.start import FROM_THETA
from .events import Events
from .journal import RunJournal
from .messages import Completed, Engine, EvaluateTask, Outcome, SampleTask
from .tally import Sites

#: what a task calls an arm, and what the run's figures do
_ARMS = {"base": "base", "global": "federated", "personal": "personal"}
_TASKS = 16  # an evaluation is cut into at most so many tasks, whatever the number of workers


class Evaluation:
    """Evaluates the base before round 1, the global model as rounds go by, and the result.

    Scores do not depend on how sites are grouped into tasks.

    Args:
        strategy: whose sites may have models of their own.
        apart: each site is evaluated by a task of its own, and one that cannot be is left out, with an event: so it is
            where sites come and go, or use private state, which may be damaged. Otherwise a failed evaluation ends the
            run.
        state_of: the file of a site's private state, if it has any; the loop sets it.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Sites,
        engine: Engine,
        journal: RunJournal,
        events: Events,
        *,
        strategy: Strategy | None = None,
        apart: bool = False,
    ) -> None:
        self.recipe, self.sites, self.engine, self.journal, self.events = recipe, sites, engine, journal, events
        self.personal = strategy is not None and strategy.own_model
        self.alpha = strategy.alpha if strategy is not None else None
        self.private = self.personal or bool(personal_parts(recipe))
        self.apart = apart or self.private
        self.state_of: Callable[[str], str | None] = lambda site: None
        #: by site and whether it is the result that is evaluated: which of several global models is the site's
        self.start: Callable[[str, bool], Mapping[str, Any]] = lambda site, final: FROM_THETA
        self._pending: dict[str, dict[str, Any]] = {}
        self._awaited = 0

    def base(self) -> None:
        """The base model's scores and sample answers; the global tensors broadcast must be the initial ones."""
        controls = self.recipe.evaluation.controls
        if "base" in controls and self.journal.get("scores/base") is None:
            began = time.perf_counter()
            scores = self._scores("base", generate=self.recipe.evaluation.exact_match)
            self.journal.put("scores/base", {"sites": scores, "seconds": time.perf_counter() - began})
            self._report("base", scores)
        if self.journal.get(_curve("federated", 0)) is None:
            initial = self._initial_scores()
            if self.personal:
                self._keep_curve("personal", 0, initial)
            self._keep_curve("federated", 0, initial)
        self.sample("base")

    def _initial_scores(self) -> Mapping[str, Any]:
        """Round 0 of the curve. Adapters begin without effect, so that it is the base's, except for learned prompts."""
        base = self.journal.get("scores/base")
        if base is not None and self.recipe.model.adapter.kind not in PROMPT_KINDS:
            return dict(base["sites"])
        return self._scores("federated", generate=False)

    def due(self, round: int) -> list[EvaluateTask]:
        """The tasks that evaluate the model, or models, after a round, if that is due and not done."""
        if round == 0 or round % self.recipe.evaluation.every:
            return []
        arms = [arm for arm in self._arms if self.journal.get(_curve(arm, round)) is None]
        tasks = [task for arm in arms for task in self._tasks(arm, generate=False)]
        self._pending, self._awaited = {arm: {} for arm in arms}, len(tasks)
        return tasks

    def take(self, round: int, outcome: Outcome) -> None:
        """One outcome of `due(round)`."""
        assert isinstance(outcome.task, EvaluateTask)
        self._pending[_ARMS[outcome.task.arm]].update(self._result(outcome))
        self._awaited -= 1
        for arm, scores in self._pending.items() if not self._awaited else ():
            if scores:
                self._keep_curve(arm, round, scores)

    def final(self) -> None:
        """The result's scores; the global tensors broadcast must be its."""
        for arm in self._arms:
            if self.journal.get(f"scores/{arm}") is None:
                self._final(arm)
        self.sample("federated")

    @property
    def _arms(self) -> tuple[str, ...]:
        return ("federated", "personal") if self.personal else ("federated",)

    def _final(self, arm: str) -> None:
        began = time.perf_counter()
        scores = self._scores(arm, generate=self.recipe.evaluation.exact_match, final=True)
        alphas = {site: found.pop("alpha") for site, found in scores.items() if "alpha" in found}
        clusters = {site: found.pop("cluster") for site, found in scores.items() if "cluster" in found}
        self._keep_curve(arm, self.recipe.federation.rounds, scores)
        more = {name: found for name, found in (("alpha", alphas), ("clusters", clusters)) if found}
        self.journal.put(f"scores/{arm}", {"sites": scores, "seconds": time.perf_counter() - began, **more})

    def sample(self, arm: str) -> None:
        """Answers to the run's sample prompts: the first held-out row of the first sites."""
        prompts = tuple((site, 0) for site in self.sites.names[: self.recipe.evaluation.samples])
        if not prompts or self.journal.get(f"samples/{arm}") is not None:
            return
        kind = "base" if arm == "base" else "global"
        starts = self._starts([site for site, _ in prompts], kind, final=True)
        tasks = [SampleTask(prompts, kind, starts)]
        if self.apart:
            tasks = [
                SampleTask(((site, row),), kind, _of(starts, site), self._state(site, kind)) for site, row in prompts
            ]
        answers: list[Any] = []
        for outcome in self.engine.run(tasks):
            answers += self._result(outcome).get("answers", [])
        self.journal.put(f"samples/{arm}", {"answers": answers})

    def _scores(self, arm: str, *, generate: bool, final: bool = False) -> dict[str, Any]:
        outcomes = list(self.engine.run(self._tasks(arm, generate=generate, final=final)))
        scores = {site: dict(result) for outcome in outcomes for site, result in self._result(outcome).items()}
        if not scores:
            reasons = {outcome.reason for outcome in outcomes if not isinstance(outcome, Completed)}
            raise RoundError(
                f"no site could evaluate the model: {'; '.join(sorted(reasons)[:3]) or 'none was asked'}",
                hint="a run needs scores of one site at least, which that site's policy lets leave (share.scores)"
                if self.apart and not self.private
                else "what was committed is kept: once the cause is mended, go on with --resume",
                retry=True,
            )
        return scores

    def _result(self, outcome: Outcome) -> Mapping[str, Any]:
        if isinstance(outcome, Completed):
            return outcome.result
        if self.apart:
            task = outcome.task
            sites = task.sites if isinstance(task, EvaluateTask) else ()
            self.events.emit("evaluation_missing", sites=list(sites), reason=outcome.reason)
            return {}
        raise RoundError(
            f"an evaluation failed: {outcome.reason}",
            hint="what was committed is kept: once the cause is mended, go on with --resume",
        )

    def _tasks(self, arm: str, *, generate: bool, final: bool = False) -> list[EvaluateTask]:
        names = self.sites.names
        size = 1 if self.apart else -(-len(names) // _TASKS)
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        kind = {name: kind for kind, name in _ARMS.items()}[arm]
        own = {"alpha": self.alpha} if kind == "personal" else {}
        return [
            EvaluateTask(part, kind, generate, self._starts(part, kind, final=final), self._state(part[0], kind), **own)
            for part in parts
        ]

    def _starts(self, sites: Sequence[str], arm: str, *, final: bool) -> dict[str, Mapping[str, Any]]:
        """Where a site's model is not simply the global one."""
        starts = {site: self.start(site, final) for site in sites} if arm == "global" else {}
        return {site: start for site, start in starts.items() if start != FROM_THETA}

    def _state(self, site: str, kind: str) -> str | None:
        """The private state that a site's model is made with."""
        return self.state_of(site) if self.private and kind != "base" else None

    def _keep_curve(self, arm: str, round: int, scores: Mapping[str, Any]) -> None:
        sums = {site: [sum(s["nll"]), sum(s["tokens"])] for site, s in scores.items()}
        self.journal.put(_curve(arm, round), sums)
        self._report(arm, scores, round=round)

    def _report(self, arm: str, scores: Mapping[str, Any], **more: Any) -> None:
        self.events.emit("evaluated", arm=arm, macro_loss=macro_loss(list(scores.values())), **more)


def _of(starts: Mapping[str, Mapping[str, Any]], site: str) -> dict[str, Mapping[str, Any]]:
    return {site: starts[site]} if site in starts else {}


def macro_loss(scores: Sequence[Mapping[str, Any]]) -> float:
    """Nats a label token, mean over sites, from `Scores` as JSON."""
    return float(sum(sum(s["nll"]) / max(1, sum(s["tokens"])) for s in scores) / len(scores))


def _curve(arm: str, round: int) -> str:
    return f"curve/{arm}/{round:04d}"
