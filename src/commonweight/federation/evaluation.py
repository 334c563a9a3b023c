"""When models are evaluated on the sites' held-out rows, and where the scores go.

Journal keys: `scores/base`, `scores/federated` (every held-out row's score, by site) and `curve/federated/NNNN` (a
site's [Σ nats, label tokens] after round NNNN).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RoundError
from ..recipe.schema import PROMPT_KINDS, Recipe
from .events import Events
from .journal import Journal
from .messages import Completed, Engine, EvaluateTask, Outcome, SampleTask
from .tally import Sites

_TASKS = 16  # an evaluation is cut into at most so many tasks, whatever the number of workers


class Evaluation:
    """Evaluates the base before round 1, the global model as rounds go by, and the result.

    Scores do not depend on how sites are grouped into tasks.
    """

    def __init__(self, recipe: Recipe, sites: Sites, engine: Engine, journal: Journal, events: Events) -> None:
        self.recipe, self.sites, self.engine, self.journal, self.events = recipe, sites, engine, journal, events
        self._pending: dict[str, Any] = {}

    def base(self) -> None:
        """The base model's scores and sample answers; the global tensors broadcast must be the initial ones."""
        controls = self.recipe.evaluation.controls
        if "base" in controls and self.journal.get("scores/base") is None:
            began = time.perf_counter()
            scores = self._scores("base", generate=self.recipe.evaluation.exact_match)
            self.journal.put("scores/base", {"sites": scores, "seconds": time.perf_counter() - began})
            self._report("base", scores)
        if self.journal.get("curve/federated/0000") is None:
            self._keep_curve(0, self._initial_scores())
        self.sample("base")

    def _initial_scores(self) -> Mapping[str, Any]:
        """Round 0 of the curve. Adapters begin without effect, so that it is the base's, except for learned prompts."""
        base = self.journal.get("scores/base")
        if base is not None and self.recipe.model.adapter.kind not in PROMPT_KINDS:
            return dict(base["sites"])
        return self._scores("global", generate=False)

    def due(self, round: int) -> list[EvaluateTask]:
        """The tasks that evaluate the global model after a round, if that is due and not done."""
        if round == 0 or round % self.recipe.evaluation.every or self.journal.get(_curve(round)) is not None:
            return []
        return self._tasks("global", generate=False)

    def take(self, round: int, outcome: Outcome) -> None:
        """One outcome of `due(round)`."""
        self._pending |= _result(outcome)
        if len(self._pending) == len(self.sites.names):
            self._keep_curve(round, self._pending)
            self._pending = {}

    def final(self) -> None:
        """The result's scores; the global tensors broadcast must be its."""
        last = self.recipe.federation.rounds
        if self.journal.get("scores/federated") is None:
            began = time.perf_counter()
            scores = self._scores("global", generate=self.recipe.evaluation.exact_match)
            self._keep_curve(last, scores)
            self.journal.put("scores/federated", {"sites": scores, "seconds": time.perf_counter() - began})
        self.sample("federated")

    def sample(self, arm: str) -> None:
        """Answers to the run's sample prompts: the first held-out row of the first sites."""
        prompts = tuple((site, 0) for site in self.sites.names[: self.recipe.evaluation.samples])
        if not prompts or self.journal.get(f"samples/{arm}") is not None:
            return
        task = SampleTask(prompts, "base" if arm == "base" else "global")
        self.journal.put(f"samples/{arm}", dict(_result(next(iter(self.engine.run([task]))))))

    def _scores(self, arm: str, *, generate: bool) -> dict[str, Any]:
        return {s: r for o in self.engine.run(self._tasks(arm, generate=generate)) for s, r in _result(o).items()}

    def _tasks(self, arm: str, *, generate: bool) -> list[EvaluateTask]:
        size = -(-len(self.sites.names) // _TASKS)
        names = self.sites.names
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return [EvaluateTask(part, arm, generate) for part in parts]

    def _keep_curve(self, round: int, scores: Mapping[str, Any]) -> None:
        sums = {site: [sum(s["nll"]), sum(s["tokens"])] for site, s in scores.items()}
        self.journal.put(_curve(round), sums)
        self._report("federated", scores, round=round)

    def _report(self, arm: str, scores: Mapping[str, Any], **more: Any) -> None:
        self.events.emit("evaluated", arm=arm, macro_loss=macro_loss(list(scores.values())), **more)


def macro_loss(scores: Sequence[Mapping[str, Any]]) -> float:
    """Nats a label token, mean over sites, from `Scores` as JSON."""
    return float(sum(sum(s["nll"]) / max(1, sum(s["tokens"])) for s in scores) / len(scores))


def _curve(round: int) -> str:
    return f"curve/federated/{round:04d}"


def _result(outcome: Outcome) -> Mapping[str, Any]:
    if isinstance(outcome, Completed):
        return outcome.result
    raise RoundError(
        f"an evaluation failed: {outcome.reason}",
        hint="what was committed is kept: once the cause is mended, go on with --resume",
    )
