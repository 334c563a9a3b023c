"""Accepted updates that are masked, in their sealed files: only their sum can be read, a stretch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..model.tensors import Entry, Layout
from ..privacy.secure_aggregation.masks import Expander, Ring
from ..privacy.secure_aggregation.rows import MASKED, NUM_TOTALS, RowCode, Totals, as_ring, row_starts
from ..strategies.base import WeightedSum
from ..strategies.side_by_side import Stretch
from ..wire.frames import Piece
from .stored_updates import StoredUpdate


@dataclass(frozen=True)
class OpenedSum:
    """What opens one masked sum.

    Args:
        place: its group's, if there are several.
        sites: whose updates are in it.
        code: how they became rows.
        masks: what takes the masks off (`Collector.masks`).
    """

    place: int
    sites: tuple[str, ...]
    code: RowCode
    masks: Sequence[tuple[bytes, int]]


#: elements of a sum that are added up at once: 4 MiB, as much as a chunk of the files has
_SPAN = 1 << 20


class MaskedUpdates:
    """Masked updates of one sum. Several threads may read stretches; memory is O(stretch) for each.

    Args:
        updates: of a round; those of the sum are looked out.
    """

    def __init__(self, updates: Sequence[StoredUpdate], opened: OpenedSum) -> None:
        self.place, self.code, self._masks = opened.place, opened.code, opened.masks
        self.starts = row_starts(opened.code.layout)
        self._files = [(update, update.open()) for update in updates if update.site in opened.sites]

    @cached_property
    def totals(self) -> Totals:
        """Raises RoundError: as `RowCode.totals`."""
        return self.code.totals(self.sum(self.code.length - NUM_TOTALS, NUM_TOTALS), len(self._files))

    def sum(self, first: int, length: int) -> Ring:
        """A stretch of the sum of all rows, without masks."""
        total: Ring = np.zeros(length, dtype=np.uint32)
        for update, file in self._files:
            assert update.frame is not None
            for part in update.frame.plan.pieces.over(MASKED, torch.int32, first, first + length):
                values = torch.empty(part.numel, dtype=torch.int32)
                update.read(file, part, values)
                begin, end = max(first, part.start), min(first + length, part.start + part.numel)
                total[begin - first : end - first] += as_ring(values)[begin - part.start : end - part.start]
        expander = Expander()
        for key, sign in self._masks:
            expander.add(total, key, sign=sign, first=first)
        return total

    def into(self, fold: WeightedSum, piece: Piece) -> None:
        """Make a fold of a stretch of the sum, as if the updates had been folded into it."""
        self.code.spread(self.sum, piece.dtype, piece.start, fold.sums["delta"].flats[piece.dtype])
        fold.total_weight, fold.num_updates = self.totals.weight, len(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for _, file in self._files:
            file.close()


class GroupReader:
    """The mean of a group's updates, read in stretches by one thread at a time as if it were an update.

    The span of the sum that was added up last stays at hand, so that reading from front to back decrypts every chunk
    once: O(span) of memory.

    Args:
        totals: the group's; None: they cannot be, and the mean is zeros.
    """

    def __init__(self, masked: MaskedUpdates, totals: Totals | None) -> None:
        self._masked, self._totals = masked, totals
        self._span: Ring = np.empty(0, dtype=np.uint32)
        self._number = -1

    def at_hand(self, channel: str, stretch: Stretch) -> bool:
        """Whether a stretch lies in the span that was added up last."""
        first = self._masked.starts[stretch.dtype] + stretch.start
        return first // _SPAN == (first + stretch.numel - 1) // _SPAN == self._number

    def read(self, channel: str, stretch: Stretch) -> Tensor:
        fold = WeightedSum(Layout((Entry("", stretch.dtype, (stretch.numel,), 0, stretch.numel),)), (channel,))
        if self._totals is None:
            return fold.sums[channel].flats[stretch.dtype]
        first = self._masked.starts[stretch.dtype] + stretch.start
        total: Ring = np.empty(stretch.numel, dtype=np.uint32)
        for number in range(first // _SPAN, (first + stretch.numel - 1) // _SPAN + 1):
            begin, end = max(first, number * _SPAN), min(first + stretch.numel, (number + 1) * _SPAN)
            total[begin - first : end - first] = self._added_up(number)[begin - number * _SPAN : end - number * _SPAN]
        self._masked.code.decode(total, fold.sums[channel].flats[stretch.dtype])
        fold.total_weight, fold.num_updates = self._totals.weight, 1
        return fold.mean().flats[stretch.dtype]

    def _added_up(self, number: int) -> Ring:
        if number != self._number:
            start = number * _SPAN
            rows = self._masked.code.length - NUM_TOTALS
            self._span, self._number = self._masked.sum(start, min(_SPAN, rows - start)), number
        return self._span

    def close(self) -> None:
        self._masked.close()
