"""Where a site's local work stands, so that a killed process goes on from there with the same bits.

`state_of` takes down everything that the next step depends on; `restore` puts it back. Where it is kept is a
`Checkpoint`'s affair. `FileCheckpoint` keeps one safetensors file; how bytes reach the disk whole is handed to it, as
this layer knows nothing of folders.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from ..model.tensors import NamedTensors
from ..model.trainables import Trainables

_OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_VALUES, _CPU_RANDOM, _GPU_RANDOM = "values", "random/cpu", "random/cuda"

#: writes tensors and metadata to a path as one safetensors file, whole or not at all
Writer = Callable[[Path, Mapping[str, Tensor], Mapping[str, str]], None]


@dataclass
class Sums:
    """What local work has added up so far: steps, examples, label tokens, nats; and the mean nats a label token of its
    first step."""

    steps: int = 0
    examples: int = 0
    labels: int = 0
    nats: float = 0.0
    first_loss: float | None = None


@dataclass(frozen=True)
class WorkState:
    """Local work between two steps.

    Args:
        tensors: flats of the values and of the optimizer's state by `name/dtype`, on the CPU; torch's random state as
            uint8.
        optimizer_steps: the optimizer's own count for each flat.
    """

    sums: Sums
    tensors: Mapping[str, Tensor]
    optimizer_steps: list[float] = field(default_factory=list)


class Checkpoint(Protocol):
    """Keeps one task's state."""

    def due(self) -> bool:
        """Whether it is time to save."""

    def save(self, state: WorkState) -> None:
        """Keep this state in place of the one before. Tensors may be changed by the caller afterwards."""

    def load(self) -> WorkState | None:
        """The state last saved for this very task, or None."""


def optimizer_state(optimizer: Optimizer, trainables: Trainables) -> tuple[dict[str, NamedTensors], list[float]]:
    """What an optimizer over the flat parameters remembers: its tensors by name, and its step count for each flat."""
    layout, flats = trainables.values.layout, trainables.flat_parameters
    groups = {}
    for name in _OPTIMIZER_STATE:
        states = [optimizer.state.get(parameter, {}).get(name) for parameter in flats]
        if all(state is not None for state in states):
            groups[name] = NamedTensors(layout, dict(zip(layout.numels, states, strict=True)))
    return groups, [float(optimizer.state.get(parameter, {}).get("step", 0)) for parameter in flats]


def restore_optimizer(
    optimizer: Optimizer, trainables: Trainables, groups: Mapping[str, NamedTensors], steps: list[float]
) -> None:
    """Make an optimizer remember what `optimizer_state` took down."""
    layout, flats = trainables.values.layout, trainables.flat_parameters
    for k, (dtype, parameter) in enumerate(zip(layout.numels, flats, strict=True)):
        state: dict[str, Any] = {name: tensors.flats[dtype].to(parameter.device) for name, tensors in groups.items()}
        if "exp_avg" in state:
            state["step"] = torch.tensor(steps[k], device=parameter.device)
        if state:
            optimizer.state[parameter] = state


def state_of(sums: Sums, trainables: Trainables, optimizer: Optimizer) -> WorkState:
    """Everything that the next step depends on."""
    groups, steps = optimizer_state(optimizer, trainables)
    tensors = {
        f"{group}/{_name(dtype)}": flat.detach().cpu()
        for group, held in {_VALUES: trainables.values, **groups}.items()
        for dtype, flat in held.flats.items()
    }
    tensors[_CPU_RANDOM] = torch.get_rng_state()
    device = trainables.flat_parameters[0].device
    if device.type == "cuda":
        tensors[_GPU_RANDOM] = torch.cuda.get_rng_state(device)
    return WorkState(sums, tensors, steps)


def restore(state: WorkState, trainables: Trainables, optimizer: Optimizer) -> Sums:
    """Put values, optimizer and random numbers back to where `state_of` took them down; returns the sums."""
    layout = trainables.values.layout
    groups: dict[str, dict[torch.dtype, Tensor]] = {}
    for dtype in layout.numels:
        for group in (_VALUES, *_OPTIMIZER_STATE):
            flat = state.tensors.get(f"{group}/{_name(dtype)}")
            if flat is not None:
                groups.setdefault(group, {})[dtype] = flat
    held = {group: NamedTensors(layout, flats) for group, flats in groups.items()}
    trainables.values.copy_(held.pop(_VALUES))
    restore_optimizer(optimizer, trainables, held, state.optimizer_steps)
    torch.set_rng_state(state.tensors[_CPU_RANDOM])
    if _GPU_RANDOM in state.tensors:
        torch.cuda.set_rng_state(state.tensors[_GPU_RANDOM], trainables.flat_parameters[0].device)
    return state.sums


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class FileCheckpoint:
    """One task's state in one safetensors file, saved every so often.

    Args:
        path: the file.
        task: what the work is and starts from, as plain values. A file of any other task is deleted, and so is one that
            cannot be read: at worst the work begins anew.
        write: see `Writer`.
        every_s: seconds between saves, by `clock`.
    """

    def __init__(
        self,
        path: Path,
        task: Mapping[str, Any],
        write: Writer,
        *,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.write, self.every_s, self.clock = path, write, every_s, clock
        self.task = json.loads(json.dumps(dict(task)))
        self.saved_at = clock()

    def due(self) -> bool:
        return self.clock() - self.saved_at >= self.every_s

    def save(self, state: WorkState) -> None:
        """Raises StorageError, or what else `write` raises."""
        record = {"task": self.task, "sums": vars(state.sums), "optimizer_steps": state.optimizer_steps}
        self.write(self.path, state.tensors, {"checkpoint": json.dumps(record)})
        self.saved_at = self.clock()

    def load(self) -> WorkState | None:
        state = self._read()
        if state is None:
            self.path.unlink(missing_ok=True)
        return state

    def _read(self) -> WorkState | None:
        try:
            with safe_open(self.path, framework="pt") as opened:
                record = json.loads((opened.metadata() or {})["checkpoint"])
                if record["task"] != self.task:
                    return None
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return WorkState(Sums(**record["sums"]), tensors, record["optimizer_steps"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
