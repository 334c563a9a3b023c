"""Accepted updates that are masked, in their sealed files: only their sum can be read, a stretch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ..privacy.secure_aggregation.masks import Expander, Ring
from ..privacy.secure_aggregation.rows import MASKED, NUM_TOTALS, RowCode, Totals, as_ring, row_starts
from ..strategies.base import WeightedSum
from ..wire.frames import Piece
from .stored_updates import StoredUpdate


class MaskedUpdates:
    """A round's masked updates. Several threads may read stretches; memory is O(stretch) for each.

    Args:
        code: how updates became rows.
        masks: what takes the masks off their sum (`Collector.masks`).
    """

    def __init__(self, updates: Sequence[StoredUpdate], code: RowCode, masks: Sequence[tuple[bytes, int]]) -> None:
        self._code, self._masks, self._starts = code, masks, row_starts(code.layout)
        self._files = [(update, update.open()) for update in updates]
        self.totals: Totals = code.totals(self._sum(code.length - NUM_TOTALS, NUM_TOTALS), len(updates))

    def _sum(self, first: int, length: int) -> Ring:
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
        total = self._sum(self._starts[piece.dtype] + piece.start, piece.numel)
        self._code.decode(total, fold.sums["delta"].flats[piece.dtype])
        fold.total_weight, fold.num_updates = self.totals.weight, len(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, file in self._files:
            file.close()
