"""Coordinate-wise median and trimmed mean (Yin et al. 2018, arXiv:1803.01498)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import ServerState
from ..update import Update
from .rows import mean_of, middle, sorted_columns, stretches
from .strategy import RobustStrategy, StatedOptions

_SOURCE = (
    "Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, arXiv:1803.01498"
)


def median(rows: Tensor) -> Tensor:
    """The median of each column of n × d rows, for even n the mean of the middle two: (d,)."""
    found = torch.empty(rows.shape[1], dtype=rows.dtype)
    for columns in stretches(*rows.shape):
        found[columns] = middle(sorted_columns(rows[:, columns]))
    return found


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """The mean of each column of n × d rows without its f smallest and its f largest values: (d,).

    Raises:
        ValueError: f is negative, or n < 2f + 1.
    """
    n = len(rows)
    if f < 0 or n < 2 * f + 1:
        raise ValueError(f"{n} rows cannot be trimmed by f = {f} at each end")
    if f == 0:
        return mean_of(rows)
    found = torch.empty(rows.shape[1], dtype=rows.dtype)
    for columns in stretches(*rows.shape):
        kept = sorted_columns(rows[:, columns])[f : n - f]
        total = kept[0].double()
        for values in kept[1:]:
            total = total.add_(values)
        found[columns] = total.div_(len(kept))
    return found


class Median(RobustStrategy):
    """θ ← θ + η·median(Δᵢ), coordinate by coordinate. Sites count alike.

    With fewer hostile sites than honest ones every coordinate stays within the range of the honest ones' values.
    """

    name = "median"
    rule = "θ ← θ + η·median Δᵢ, coordinate by coordinate"
    source = _SOURCE

    def aggregate(self, rows: Tensor, state: ServerState, updates: Sequence[Update]) -> Tensor:
        return median(rows)


class TrimmedMean(RobustStrategy):
    """θ ← θ + η·(mean of Δᵢ without the f smallest and the f largest values of each coordinate). Sites count alike."""

    name = "trimmed-mean"
    rule = "θ ← θ + η·mean of Δᵢ without the f smallest and f largest, coordinate by coordinate"
    source = _SOURCE
    Options = StatedOptions

    def aggregate(self, rows: Tensor, state: ServerState, updates: Sequence[Update]) -> Tensor:
        return trimmed_mean(rows, self.options.f)
