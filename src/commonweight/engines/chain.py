"""Control arms: one model trained in one place through every round of a recipe."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..data.tokens import concatenate
from ..evaluate.scoring import score_tokens
from ..federation.folder import read_tensors, write_tensors
from ..federation.messages import ChainTask
from ..model.tensors import NamedTensors
from ..train.checkpoint import optimizer_state, restore_optimizer
from ..train.local import LocalWork, make_optimizer

if TYPE_CHECKING:
    from .work import TaskWork


class Chain:
    """A control arm under way: tensors and optimizer state are written after each round, so that it can go on.

    Args:
        theta: what it starts from.
    """

    def __init__(self, work: TaskWork, task: ChainTask, theta: NamedTensors) -> None:
        self.work, self.task, self.bench = work, task, work.bench
        self.file = work.folder / task.folder / "chain.safetensors"
        self.tokens = concatenate([self.bench.sites[s].train for s in task.sites])
        self.who = task.sites[0] if task.arm == "local" else f"<{task.arm}>"
        self.bench.take_up(theta)
        self.optimizer = make_optimizer(self.bench.participant.trainables, self.bench.recipe.training)
        self.points: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0
        self.done = 0
        if self.file.exists():
            self._restore()

    def round(self, number: int, lr: float, steps: int) -> None:
        began = time.perf_counter()
        recipe = self.bench.recipe
        self.bench.objective.work(
            self.bench.participant,
            LocalWork(
                self.tokens,
                recipe.training,
                lr=lr,
                steps=steps,
                seed=self.work.seed(self.who, number),
                pack_seed=self.bench.pack_seed(self.who),
                optimizer=self.optimizer,
                interrupted=self.work.interrupted,
            ),
        )
        last = number == self.task.rounds[-1][0]
        if last or number % recipe.evaluation.every == 0:
            self._evaluate(number)
        self.seconds += time.perf_counter() - began
        self.done += 1
        self._save()

    def _save(self) -> None:
        groups, steps = optimizer_state(self.optimizer, self.bench.participant.trainables)
        record = {"done": self.done, "points": self.points, "best": self.best, "seconds": self.seconds, "steps": steps}
        write_tensors(self.file, {"theta": self.work.values, **groups}, {"chain": json.dumps(record)})

    def _restore(self) -> None:
        groups = read_tensors(self.file, self.work.values.layout)
        with safe_open(self.file, framework="pt") as opened:
            record = json.loads(opened.metadata()["chain"])
        self.work.values.copy_(groups.pop("theta"))
        restore_optimizer(self.optimizer, self.bench.participant.trainables, groups, record["steps"])
        self.done, self.points = record["done"], record["points"]
        self.best, self.seconds = record["best"], record["seconds"]

    def _evaluate(self, number: int) -> None:
        scores = self.work.score(self.task.own, generate=False)
        losses = {site: sum(s["nll"]) / max(1, sum(s["tokens"])) for site, s in scores.items()}
        self.points.append({"round": number, "losses": losses})
        mean = sum(losses.values()) / len(losses)
        if self.best is None or mean < self.best["loss"]:
            self.best = {"round": number, "loss": mean, "scores": scores[self.task.own[0]]}

    def result(self) -> dict[str, Any]:
        began = time.perf_counter()
        final = self.work.score(self.task.own, generate=self.task.generate)
        if self.best is None:  # never invited to a round: the site keeps the base
            self._evaluate(0)
        result: dict[str, Any] = {"rounds": self.points, "final": final, "best": self.best}
        if self.task.everyone:
            result["everyone_loss"] = self._everyone_loss()
        return {**result, "seconds": self.seconds + time.perf_counter() - began}

    def _everyone_loss(self) -> float:
        losses = []
        for name in self.task.everyone:
            nats, labels, _ = score_tokens(self.bench.participant.language_model, self.bench.sites[name].heldout)
            losses.append(float(nats.sum() / max(1, labels.sum())))
        return sum(losses) / len(losses)
