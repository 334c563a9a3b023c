"""A round's updates side by side, wherever they lie: in this process's memory, or in a coordinator's sealed files.

A strategy that takes them a stretch of elements at a time needs memory for the cohort's stretches, not for its models:
O(cohort × stretch). It is written once, against `SideBySide`, and gives the same bits over either form: the stretches
are the same whatever the size of a file's chunks, and the arithmetic is done by one thread, because products of
matrices and decompositions are summed in another order by more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.tensors import Entry, Layout, all_finite
from .base import ServerState, non_finite
from .individuals import IndividualsStrategy
from .lora.factors import Factors
from .update import Update

#: the state's name for the global tensors; its other names are the slots'
THETA = "theta"

# elements of all updates together that are worked on at once: 2 MiB in float64, which stay in cache
_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Stretch:
    """Elements `start` … `stop` of the flat of the layout's `dtype`; at least one."""

    dtype: torch.dtype
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @classmethod
    def of(cls, entry: Entry) -> Stretch:
        """A whole tensor."""
        return cls(entry.dtype, entry.offset, entry.offset + entry.numel)

    def cut(self, num_rows: int) -> Iterator[Stretch]:
        """Parts of as many elements as may be worked on at once in `num_rows` rows."""
        step = elements_at_once(num_rows)
        for start in range(self.start, self.stop, step):
            yield Stretch(self.dtype, start, min(start + step, self.stop))


def elements_at_once(num_rows: int) -> int:
    """The most elements of a stretch that is worked on in `num_rows` rows."""
    return max(1, _ELEMENTS // max(1, num_rows))


def stretches(layout: Layout, num_rows: int) -> Iterator[Stretch]:
    """All floating elements of a layout, one dtype after the other, in stretches to be worked on in `num_rows` rows."""
    for dtype, numel in layout.numels.items():
        if dtype.is_floating_point:
            yield from Stretch(dtype, 0, numel).cut(num_rows)


class SideBySide(ABC):
    """A round's updates, and the state that they are to change.

    Args:
        layout: of the global tensors.
        updates: who answered, in cohort order. Their tensors are read by `sent` alone: they may lie elsewhere.
        residual: what the round adds to the base, as in `ServerState`.
    """

    def __init__(self, layout: Layout, updates: Sequence[Update]) -> None:
        self.layout, self.updates = layout, updates
        self.residual: dict[str, Factors] = {}

    @abstractmethod
    def sent(self, stretch: Stretch, channel: str = "delta") -> list[Tensor]:
        """A stretch of every update, each 1-D in the layout's dtype: not to be written to, good until the next call."""

    @abstractmethod
    def held(self, name: str, stretch: Stretch) -> Tensor:
        """A stretch of theta or of a slot, 1-D; not to be written to. What `hold` has changed may be there already."""

    def hold(self, name: str, stretch: Stretch, values: Tensor) -> None:
        """Change a stretch of theta or of a slot; what nobody changes stays.

        Args:
            values: of any shape and floating dtype, rounded once to the one in which the stretch is held.

        Raises:
            RoundError: they hold NaN or infinity there.
        """
        rounded = values.reshape(-1).to(self.held_as(name, stretch.dtype))
        if not all_finite(rounded):
            place = stretch.start + int(rounded.isfinite().logical_not().nonzero()[0])
            raise non_finite(_name_at(self.layout, stretch.dtype, place), name)
        self._hold(name, stretch, rounded)

    def leave(self, module: str, factors: Factors) -> None:
        """Let a module's base take up these factors.

        Raises:
            RoundError: they hold NaN or infinity.
        """
        if not (bool(factors.B.isfinite().all()) and bool(factors.A.isfinite().all())):
            raise non_finite(module, "residual")
        self.residual[module] = factors

    @abstractmethod
    def held_as(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which theta or a slot holds what is of `dtype` in the layout."""

    @abstractmethod
    def _hold(self, name: str, stretch: Stretch, values: Tensor) -> None: ...


class InMemory(SideBySide):
    """Updates and a state in this process's memory; the state is changed in place."""

    def __init__(self, state: ServerState, updates: Sequence[Update]) -> None:
        super().__init__(state.theta.layout, updates)
        self._held = {THETA: state.theta, **state.slots}

    def sent(self, stretch: Stretch, channel: str = "delta") -> list[Tensor]:
        return [u.channels[channel].flats[stretch.dtype][stretch.start : stretch.stop] for u in self.updates]

    def held(self, name: str, stretch: Stretch) -> Tensor:
        return self._held[name].flats[stretch.dtype][stretch.start : stretch.stop]

    def held_as(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return self._held[name].flats[dtype].dtype

    def _hold(self, name: str, stretch: Stretch, values: Tensor) -> None:
        self.held(name, stretch).copy_(values)


class SideBySideStrategy(IndividualsStrategy):
    """A strategy that needs individual updates, a stretch at a time. A subclass writes `merge`.

    On one machine the updates are held in memory until the round closes; a coordinator leaves them in their files.
    """

    not_networked = ""

    def combine(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        table = InMemory(state, updates)
        with one_thread():
            self.merge(table)
        state.residual = table.residual
        return state

    @abstractmethod
    def merge(self, table: SideBySide) -> None:
        """Bring theta and the slots to their values after the round. There is at least one update.

        Raises:
            RoundError: there are too few updates for the rule to hold what it promises, or the result is not finite.
        """


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's arithmetic in this thread is done by it alone, so that its bits do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name_at(layout: Layout, dtype: torch.dtype, place: int) -> str:
    return next(e.name for e in layout.entries if e.dtype == dtype and e.offset <= place < e.offset + e.numel)
