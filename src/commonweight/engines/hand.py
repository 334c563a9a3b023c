"""The hand that carries out tasks in a worker process, and the memory that it shares with the coordinator.

A site is data here, not a process: its turn begins by copying the global tensors into the model and ends with the
difference in a slot of memory that the coordinator reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..federation.folder import read_tensors, write_tensors
from ..federation.messages import ChainTask, EvaluateTask, SampleTask, TrainTask
from ..model.tensors import NamedTensors, shared_memory
from ..strategies.base import Strategy
from .bench import Bench
from .work import Progress, TaskWork


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
        return cls(shared_memory(down * size), [shared_memory(up * size) for _ in range(num_slots)])

    def channels(self, names: tuple[str, ...], buffer: Tensor, theta: NamedTensors) -> dict[str, NamedTensors]:
        """Views into a buffer, one channel after the other."""
        size = theta.layout.arena_bytes
        return {
            name: NamedTensors.over(buffer[k * size : (k + 1) * size], theta.layout) for k, name in enumerate(names)
        }


class Hand:
    """Carries out tasks on a bench, one at a time, from and into shared memory.

    Args:
        folder: the run's folder, for sites' private state and control arms' tensors.
        progress: told how a long task goes on.
    """

    def __init__(self, bench: Bench, strategy: Strategy, memory: Memory, folder: Path, progress: Progress) -> None:
        self.memory, self.folder = memory, folder
        self.work = TaskWork(bench, folder, progress)
        names = ("theta", *strategy.broadcast_channels)
        self.broadcast = memory.channels(names, memory.broadcast, bench.theta)
        self.slots = [memory.channels(strategy.update_channels, slot, bench.theta) for slot in memory.slots]

    def train(self, task: TrainTask, slot: int) -> dict[str, Any]:
        """One site's turn; its update's tensors are then in the slot."""
        channels = self.slots[slot]
        done = self.work.train(task, self.broadcast, channels["delta"], self._state(task.state_in))
        for name, tensors in done.further.items():
            channels[name].copy_(tensors)
        if task.state_out is not None:
            write_tensors(self.folder / task.state_out, done.state)
        return done.figures

    def evaluate(self, task: EvaluateTask) -> dict[str, Any]:
        return self.work.evaluate(task, self.broadcast, self._state(task.state_in))

    def sample(self, task: SampleTask) -> dict[str, Any]:
        return self.work.sample(task, self.broadcast, self._state(task.state_in))

    def _state(self, file: str | None) -> dict[str, NamedTensors]:
        """A site's private state; empty if it has none yet."""
        if file is None:
            return {}
        others = self.work.bench.state_layouts
        return read_tensors(self.folder / file, self.broadcast["theta"].layout, others=others)

    def chain(self, task: ChainTask) -> dict[str, Any]:
        return self.work.chain(task)
