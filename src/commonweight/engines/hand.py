"""The hand that carries out tasks on a workbench, and the memory that it shares with the coordinator.

A site is data here, not a process: its turn begins by copying the global tensors into the model and ends with the
difference in a slot of memory that the coordinator reads.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError
from ..evaluate.scoring import answer, score_site
from ..federation.folder import read_tensors, write_tensors
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, TrainTask
from ..model.adapters import adapter_off
from ..model.tensors import NamedTensors
from ..seeding import derive_seed
from ..strategies.base import Strategy
from ..train.corrections import correction
from ..train.local import LocalWork
from .bench import Bench
from .chain import Chain

Progress = Callable[[dict[str, Any]], None]


@dataclass
class Memory:
    """Shared memory between the coordinator and the workers.

    Args:
        broadcast: uint8; the global tensors, then each further broadcast channel.
        slots: uint8 each; an update's channels, one after the other.
    """

    broadcast: Tensor
    slots: list[Tensor]

    @classmethod
    def allocate(cls, strategy: Strategy, theta: NamedTensors, num_slots: int) -> Memory:
        size = theta.layout.arena_bytes
        down, up = 1 + len(strategy.broadcast_channels), len(strategy.update_channels)
        return cls(_shared(down * size), [_shared(up * size) for _ in range(num_slots)])

    def channels(self, names: tuple[str, ...], buffer: Tensor, theta: NamedTensors) -> dict[str, NamedTensors]:
        """Views into a buffer, one channel after the other."""
        size = theta.layout.arena_bytes
        return {
            name: NamedTensors.over(buffer[k * size : (k + 1) * size], theta.layout) for k, name in enumerate(names)
        }


def _shared(num_bytes: int) -> Tensor:
    # forks share an anonymous mapping; a file in /dev/shm, which torch would make, may hold 64 MB in a container
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


class Hand:
    """Carries out tasks on a bench, one at a time.

    Args:
        folder: the run's folder, for sites' private state and control arms' tensors.
        progress: told how a long task goes on.
    """

    def __init__(self, bench: Bench, strategy: Strategy, memory: Memory, folder: Path, progress: Progress) -> None:
        self.bench, self.memory, self.folder, self.progress = bench, memory, folder, progress
        self.values = bench.participant.trainables.values
        names = ("theta", *strategy.broadcast_channels)
        self.broadcast = memory.channels(names, memory.broadcast, bench.theta)
        self.slots = [memory.channels(strategy.update_channels, slot, bench.theta) for slot in memory.slots]

    @torch.no_grad()
    def _delta(self, theta: NamedTensors, out: NamedTensors) -> None:
        for dtype, flat in self.values.flats.items():
            _difference(flat, theta.flats[dtype], out.flats[dtype])

    def train(self, task: TrainTask, slot: int) -> dict[str, Any]:
        """One site's turn; its update's tensors are then in the slot."""
        began, site, theta = time.perf_counter(), self.bench.sites[task.site], self.broadcast["theta"]
        state = {} if task.state_in is None else read_tensors(self.folder / task.state_in, theta.layout)
        change = correction(task.correction, theta, self.broadcast, state)
        self.values.copy_(theta)
        result = self.bench.objective.work(
            self.bench.participant,
            LocalWork(
                site.train,
                self.bench.recipe.training,
                lr=task.lr,
                steps=task.steps,
                seed=self.work_seed(task.site, task.round),
                pack_seed=self.bench.pack_seed(task.site),
                correction=change,
            ),
        )
        if not math.isfinite(result.loss):
            raise SiteError(f"the objective reported a training loss of {result.loss}", hint="lower training.lr")
        channels = self.slots[slot]
        delta = channels["delta"]
        self._delta(theta, delta)
        further, new_state = change.finish(delta, lr=task.lr, steps=result.num_steps)
        for name, tensors in further.items():
            channels[name].copy_(tensors)
        if task.state_out is not None:
            write_tensors(self.folder / task.state_out, new_state)
        # plain numbers: an objective of one's own may count in NumPy's or torch's
        return {
            "num_examples": int(result.num_examples),
            "num_label_tokens": int(result.num_label_tokens),
            "num_steps": int(result.num_steps),
            "metrics": {"loss": float(result.loss), "seconds": time.perf_counter() - began},
        }

    def work_seed(self, who: str, round: int) -> int:
        return derive_seed(self.bench.recipe.seed, "work", who, round)

    def evaluate(self, task: EvaluateTask) -> dict[str, Any]:
        self.values.copy_(self.broadcast["theta"])
        if task.arm == "base":
            with adapter_off(self.bench.model):
                return self.score(task.sites, generate=task.generate)
        return self.score(task.sites, generate=task.generate)

    def score(self, sites: tuple[str, ...], *, generate: bool) -> dict[str, Any]:
        recipe, found = self.bench.recipe, {}
        for name in sites:
            site = self.bench.sites[name]
            found[name] = score_site(
                self.bench.participant.language_model,
                site.heldout,
                site.heldout_examples,
                self.bench.base.tokenizer,
                max_tokens=recipe.training.max_tokens,
                generate=recipe.evaluation.max_new_tokens if generate else None,
            ).to_json()
        return found

    def sample(self, task: SampleTask) -> dict[str, Any]:
        self.values.copy_(self.broadcast["theta"])
        if task.arm == "base":
            with adapter_off(self.bench.model):
                return {"answers": [self._answer(*prompt) for prompt in task.prompts]}
        return {"answers": [self._answer(*prompt) for prompt in task.prompts]}

    def _answer(self, name: str, row: int) -> dict[str, str]:
        site = self.bench.sites[name]
        example = site.heldout_examples[row]
        text = answer(
            self.bench.participant.language_model,
            self.bench.base.tokenizer,
            site.heldout.prompt_of(row),
            self.bench.recipe.evaluation.max_new_tokens,
        )
        return {"site": name, "prompt": example.prompt, "reference": example.completion, "answer": text}

    def chain(self, task: ChainTask) -> dict[str, Any]:
        """A control arm's training through all its rounds; goes on where a killed process left it."""
        chain = Chain(self, task)
        for number, lr, steps in task.rounds[chain.done :]:
            chain.round(number, lr, steps)
            self.progress({"arm": task.arm, "sites": len(task.sites), "site": task.sites[0], "round": number})
        return chain.result()


def _difference(values: Tensor, theta: Tensor, out: Tensor) -> None:
    """θᵢ − θ into `out`, in one pass where all lie in the same memory."""
    if not out.dtype.is_floating_point:
        out.zero_()
    elif values.device == out.device:
        torch.sub(values, theta, out=out)
    else:
        out.copy_(values.cpu() - theta)
