"""Control arms: one model trained in one place through every round of a recipe."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..data.tokens import concatenate
from ..evaluate.scoring import score_tokens
from ..federation.folder import read_tensors, write_tensors
from ..federation.messages import ChainTask
from ..model.tensors import NamedTensors
from ..train.local import LocalWork, make_optimizer

if TYPE_CHECKING:
    from .hand import Hand

_OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Chain:
    """A control arm under way: tensors and optimizer state are written after each round, so that it can go on."""

    def __init__(self, hand: Hand, task: ChainTask) -> None:
        self.hand, self.task, self.bench = hand, task, hand.bench
        self.file = hand.folder / task.folder / "chain.safetensors"
        self.tokens = concatenate([self.bench.sites[s].train for s in task.sites])
        self.who = task.sites[0] if task.arm == "local" else f"<{task.arm}>"
        hand.values.copy_(self.bench.theta)
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
                seed=self.hand.work_seed(self.who, number),
                pack_seed=self.bench.pack_seed(self.who),
                optimizer=self.optimizer,
            ),
        )
        last = number == self.task.rounds[-1][0]
        if last or number % recipe.evaluation.every == 0:
            self._evaluate(number)
        self.seconds += time.perf_counter() - began
        self.done += 1
        self._save()

    def _save(self) -> None:
        layout, flats = self.hand.values.layout, self.bench.participant.trainables.flat_parameters
        groups = {"theta": self.hand.values}
        for name in _OPTIMIZER_STATE:
            states = [self.optimizer.state.get(parameter, {}).get(name) for parameter in flats]
            if all(state is not None for state in states):
                groups[name] = NamedTensors(layout, dict(zip(layout.numels, states, strict=True)))
        steps = [float(self.optimizer.state.get(parameter, {}).get("step", 0)) for parameter in flats]
        record = {"done": self.done, "points": self.points, "best": self.best, "seconds": self.seconds, "steps": steps}
        write_tensors(self.file, groups, {"chain": json.dumps(record)})

    def _restore(self) -> None:
        layout, flats = self.hand.values.layout, self.bench.participant.trainables.flat_parameters
        groups = read_tensors(self.file, layout)
        with safe_open(self.file, framework="pt") as opened:
            record = json.loads(opened.metadata()["chain"])
        self.hand.values.copy_(groups.pop("theta"))
        for k, (dtype, parameter) in enumerate(zip(layout.numels, flats, strict=True)):
            state: dict[str, Any] = {
                name: tensors.flats[dtype].to(parameter.device) for name, tensors in groups.items()
            }
            if "exp_avg" in state:
                state["step"] = torch.tensor(record["steps"][k], device=parameter.device)
            if state:
                self.optimizer.state[parameter] = state
        self.done, self.points = record["done"], record["points"]
        self.best, self.seconds = record["best"], record["seconds"]

    def _evaluate(self, number: int) -> None:
        scores = self.hand.score(self.task.own, generate=False)
        losses = {site: sum(s["nll"]) / max(1, sum(s["tokens"])) for site, s in scores.items()}
        self.points.append({"round": number, "losses": losses})
        mean = sum(losses.values()) / len(losses)
        if self.best is None or mean < self.best["loss"]:
            self.best = {"round": number, "loss": mean, "scores": scores[self.task.own[0]]}

    def result(self) -> dict[str, Any]:
        began = time.perf_counter()
        final = self.hand.score(self.task.own, generate=self.task.generate)
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
